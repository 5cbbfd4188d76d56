"""Malformed calls of the raw operators, as a program: `python tests/border_calls.py BACKEND SEED CALLS [LIBRARY]`.

A call is made valid, then changed in one to three places. Whether it still is valid is decided by a predicate of this
file's own. It has to be refused with nothing changed, or to give the reference's results. The operator of a plain call
refuses in no words: it returns nothing.
"""

from __future__ import annotations

import functools
import itertools
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GATES = {"RNN_TANH": 1, "RNN_RELU": 1, "LSTM": 4, "GRU": 3, "PEEPHOLE_LSTM": 4}
LSTMS = {"LSTM": 0, "PEEPHOLE_LSTM": 3}  # which have c and may have a projection, and their weights of the units' own
MODES = [*((mode, False) for mode in GATES), *((mode, True) for mode in LSTMS)]
FUSED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DTYPES = {"reference": (*FUSED, torch.complex64), "cpu": FUSED, "triton": FUSED, "cuda": FUSED}
LAYERS = [f"{name}_{way}" for name in DTYPES for way in ("forward", "backward", "gate_gradients")]
LAYERS.remove("reference_gate_gradients")  # which there is not
OF_LAYER = ("mode", "x", "h0", "c0", "batch_sizes", "lengths", "resets", "bidirectional", "names", "weights")
PLAIN = ["cpu_plain", "cpu_flex_plain"]
STEPS = ["cuda_forward_steps", "cuda_backward_steps", "cuda_states_before"]
BORDERS = {
    "reference": ["reference_forward", "reference_backward", "checked_lengths"],
    "cpu": ["cpu_forward", "cpu_backward", "cpu_gate_gradients", *PLAIN, "cpu_isa"],
    "triton": ["triton_forward", "triton_backward", "triton_gate_gradients"],
    "cuda": ["cuda_forward", "cuda_backward", "cuda_gate_gradients", *STEPS, "cuda_plan", "cuda_regime"],
}
LARGE = 10_000  # elements; tensors of more are a zero repeated

Arguments = dict[str, Any]


# A valid call


def laid_out(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random values that lie in memory one way or another."""
    how = rng.choice(("contiguous", "contiguous", "strided", "transposed", "expanded"))
    if how == "strided":
        return torch.randn(*shape, 2, dtype=dtype)[..., 1]
    if how == "transposed" and len(shape) > 1:
        return torch.randn(*shape[1:], shape[0], dtype=dtype).movedim(-1, 0)
    if how == "expanded":
        return torch.randn(shape[1:], dtype=dtype).expand(shape)
    return torch.randn(shape, dtype=dtype)


def sizes(rng: random.Random, count: int) -> list[int]:
    return rng.choices(range(5), (1, 5, 5, 5, 5), k=count)


def maybe(rng: random.Random, value: Any) -> Any:
    return value if rng.random() < 0.7 else None


def saved_gates(backend: str, mode: str) -> int:
    return 4 if backend != "reference" and GATES[mode] > 1 else 0


def saved_by_forward(backend: str, call: Arguments) -> Arguments:
    """What the backward needs: of the kernels for GPUs the same as of those for CPUs, which are quicker here."""
    backend = backend if backend == "reference" else "cpu"
    arguments = {name: call[name] for name in OF_LAYER}
    y, _, _, c, gates = getattr(torch.ops.rnnfast, f"{backend}_forward")(**arguments, keep_c=True, keep_gates=True)
    return {"y": y, "c": c, "gates": gates}


def valid_layer(rng: random.Random, operator: str) -> Arguments:
    backend, _, way = operator.partition("_")
    mode, projected = rng.choice(MODES)
    form = rng.choice(("rectangular", "packed", "lengths", "resets", "both"))
    # torch has no relu of a complex number.
    dtype, D = rng.choice(FUSED if mode == "RNN_RELU" else DTYPES[backend]), rng.choice((1, 2))
    (T, N, I, H, P), G = sizes(rng, 5), GATES[mode]
    P = P if projected else H
    make = lambda *shape, dtype=dtype: laid_out(rng, shape, dtype)
    batch_sizes = lengths = resets = None
    rows = T, N
    if form == "packed":
        T, N = max(T, 1), max(N, 1)
        steps = [T, *(rng.randint(1, T) for _ in range(N - 1))]
        batch_sizes = torch.tensor([sum(length > t for length in steps) for t in range(T)])
        rows = (sum(steps),)
    if form in ("lengths", "both"):
        lengths = torch.tensor([rng.randint(0, T) for _ in range(N)], dtype=torch.int64)
    if form in ("resets", "both"):
        resets = torch.rand(T, N) < 0.4
    has_bias = rng.random() < 0.7
    names = "w_ih w_hh" + " b_ih b_hh" * has_bias + " w_hr" * projected + " w_units" * bool(LSTMS.get(mode))
    shapes = {"w_ih": (G * H, I), "w_hh": (G * H, P), "b_ih": (G * H,), "b_hh": (G * H,), "w_hr": (P, H)}
    shapes["w_units"] = (LSTMS.get(mode, 0) * H,)
    is_lstm = mode in LSTMS
    call = {
        "mode": mode,
        "x": make(*rows, I),
        "h0": maybe(rng, make(D, N, P)),
        "c0": maybe(rng, make(D, N, H)) if is_lstm else None,
        "batch_sizes": batch_sizes,
        "lengths": lengths,
        "resets": resets,
        "bidirectional": D == 2,
        "names": names,
        "weights": [make(*shapes[name]) for name in names.split() * D],
    }
    if way == "forward":
        return call | {"keep_c": rng.random() < 0.7, "keep_gates": rng.random() < 0.7}
    saved = saved_by_forward(backend, call)
    gradients = {
        "dy": maybe(rng, make(*rows, D * P)),
        "dh_n": maybe(rng, make(D, N, P)),
        "dc_n": maybe(rng, make(D, N, H) if is_lstm else make(0)),
        "dc": maybe(rng, make(*(saved["c"].shape), dtype=saved["c"].dtype)),
    }
    needs = {"need_dx": rng.random() < 0.7, "need_dw": rng.random() < 0.7} if way == "backward" else {}
    return call | gradients | saved | needs


def valid_plain(rng: random.Random, operator: str) -> Arguments:
    """Of a stack, or of one step of a cell, that is a stack of one layer and one direction."""
    is_cell = rng.random() < 0.4
    mode, projected = rng.choice([(m, p) for m, p in MODES if not (p and is_cell)])
    dtype, D, L = rng.choice(FUSED), 1 if is_cell else rng.choice((1, 2)), 1 if is_cell else rng.choice((1, 2, 3))
    (N, I, H, P), T, G = sizes(rng, 4), rng.randint(1, 4), GATES[mode]
    P = P if projected else H
    batched, layout = rng.random() < 0.7, 2 if is_cell else rng.randrange(2)
    make = lambda *shape: laid_out(rng, shape, dtype)
    of_batch, of_layers, steps = (N,) if batched else (), () if is_cell else (L * D,), () if is_cell else (T,)
    biased = rng.random() < 0.7
    shapes = {"w_hh": (G * H, P)} | ({"b_ih": (G * H,), "b_hh": (G * H,)} if biased else {})
    shapes |= {"w_hr": (P, H)} if projected else {}
    shapes |= {"w_units": (LSTMS[mode] * H,)} if LSTMS.get(mode) else {}
    of_direction = lambda k: [(G * H, D * P if k else I), *shapes.values()]
    return {
        "form": L << 8 | list(GATES).index(mode) << 3 | layout << 1 | (D == 2),
        "x": make(*(of_batch + steps if layout == 1 else steps + of_batch), I),
        "weights": [make(*shape) for k in range(L) for shape in of_direction(k) * D],
        "h0": maybe(rng, make(*of_layers, *of_batch, P)),
        "c0": maybe(rng, make(*of_layers, *of_batch, H)) if mode in LSTMS else None,
    }


@functools.cache
def program_of_lstm() -> list[Tensor]:
    """As any cell's."""
    from rnnfast import cells, evaluator

    return evaluator.programs(cells.lstm, (), 1, 4).plain


def valid_flex(rng: random.Random, operator: str) -> Arguments:
    """A plain call of an LSTM as one of any cell."""
    while True:
        call = valid_plain(rng, operator)
        L, D, weights, states = call["form"] >> 8, 1 + (call["form"] & 1), call["weights"], [call["h0"], call["c0"]]
        is_lstm = mode_of(call) == "LSTM" and call["form"] >> 1 & 3 != 2 and len(weights) % (2 * L * D) == 0
        if is_lstm and len(weights[0]) and (states[0] is None) == (states[1] is None):
            break
    kind = 2 + (len(weights) == 4 * L * D)
    of_call = {"x": call["x"], "weights": weights, "states": [] if states[0] is None else states}
    return {"form": call["form"] & ~(31 << 3) | kind << 3, "program": list(program_of_lstm())} | of_call


def valid_steps(rng: random.Random, operator: str) -> Arguments:
    mode, projected = rng.choice(MODES)
    dtype, D, G = rng.choice(FUSED), rng.choice((1, 2)), GATES[mode]
    T, N, H, P = (max(size, 1) for size in sizes(rng, 4))
    P = P if projected else H
    acc, S = torch.promote_types(dtype, torch.float32), 4 if G > 1 else 0
    new = lambda *shape, dtype=dtype: torch.randn(shape, dtype=dtype)
    lengths = torch.tensor([T, *(rng.randint(1, T) for _ in range(N - 1))])
    offsets = resets = None
    R = T * N
    if rng.random() < 0.4:
        sizes_of = [sum(length > t for length in lengths.tolist()) for t in range(T)]
        offsets, R = torch.tensor(sizes_of).cumsum(0) - torch.tensor(sizes_of), sum(sizes_of)
    else:
        lengths = maybe(rng, lengths)
        resets = maybe(rng, torch.randint(0, 2, (T, N), dtype=torch.uint8))
    is_lstm = mode in LSTMS
    of_cell = lambda *shape, dtype=acc: new(*shape, dtype=dtype) if is_lstm else None
    call = {
        "mode": mode,
        "x_gates": new(D, R, G * H),
        "w_hh": [new(G * H, P) for _ in range(D)],
        "b_hh": [new(G * H) for _ in range(D)] if rng.random() < 0.7 else [],
        "w_hr": [new(P, H) for _ in range(D)] if projected else [],
        "w_units": [new(3 * H) for _ in range(D)] if LSTMS.get(mode) else [],
        "h": new(D, N, P),
        "c": of_cell(D, N, H),
        "y": new(R, D * P),
        "cs": of_cell(R, D * H),
        "gates": new(D, R, S * H) if S else None,
        "dy": maybe(rng, new(R, D * P)),
        "dcs": maybe(rng, of_cell(R, D * H)),
        "h0": maybe(rng, new(D, N, P)),
        "c0": maybe(rng, of_cell(D, N, H, dtype=dtype)),
        "dh": new(D, N, P, dtype=acc),
        "dc": of_cell(D, N, H),
        "dgates": new(D, R, (max(S, 1) + LSTMS.get(mode, 0)) * H),
        "dprojections": new(D, R, P) if projected else None,
        "out": new(D, R, P),
        "offsets": offsets,
        "lengths": lengths,
        "resets": resets,
        "steps": T,
        "tf32": False,
        "stream": 0,
    }
    if operator == "cuda_backward_steps":  # what it cannot do without has shape [0] where a cell has it not
        call["cs"] = new(0, dtype=acc) if call["cs"] is None else call["cs"]
        call["gates"] = new(0) if call["gates"] is None else call["gates"]
    return {argument: call[argument] for argument in arguments_of(operator)}


def valid_numbers(rng: random.Random, operator: str) -> Arguments:
    if operator == "checked_lengths":
        T, N = sizes(rng, 2)
        return {"lengths": torch.tensor([rng.randint(0, T) for _ in range(N)], dtype=torch.int64), "steps": T}
    if operator == "cuda_plan":
        call = {name: rng.random() < 0.5 for name in ("bidirectional", "projected", "tf32", "backward")}
        mode, dtype = rng.choice(list(GATES)), rng.choice(FUSED)
        return {"mode": mode, "dtype": dtype, "batch": rng.randint(0, 300), "hidden": rng.randint(0, 3000)} | call | {
            "device": 0
        }  # fmt: skip
    return {"use": rng.choice((None, 0))}


def valid_call(rng: random.Random, operator: str) -> Arguments:
    torch.default_generator.manual_seed(rng.randrange(2**31))
    kinds = (
        (LAYERS, valid_layer),
        (["cpu_plain"], valid_plain),
        (["cpu_flex_plain"], valid_flex),
        (STEPS, valid_steps),
    )
    return next((valid for names, valid in kinds if operator in names), valid_numbers)(rng, operator)


def arguments_of(operator: str) -> list[str]:
    return [argument.name for argument in getattr(torch.ops.rnnfast, operator).default._schema.arguments]


# What is changed: a tensor, by the kind of change, and what an operator as a whole may be given wrongly.


def longer(rng: random.Random, t: Tensor) -> Tensor | None:
    if not t.dim():
        return None
    dim = rng.randrange(t.dim())
    return torch.cat([t, t.new_zeros(*t.shape[:dim], 1, *t.shape[dim + 1 :])], dim)


def shorter(rng: random.Random, t: Tensor) -> Tensor | None:
    dims = [dim for dim in range(t.dim()) if t.shape[dim]]
    return t.narrow(dim := rng.choice(dims), 0, t.shape[dim] - 1) if dims else None


def of_another_dtype(rng: random.Random, t: Tensor) -> Tensor:
    others = (*FUSED, torch.complex64, torch.int64, torch.int32, torch.uint8, torch.bool)
    return t.to(rng.choice([dtype for dtype in others if dtype != t.dtype]))


def mkldnn(rng: random.Random, t: Tensor) -> Tensor | None:
    return t.to_mkldnn() if t.dtype == torch.float32 and t.dim() and t.numel() else None


def quantized(rng: random.Random, t: Tensor) -> Tensor | None:
    return torch.quantize_per_tensor(t, 0.1, 0, torch.qint8) if t.dtype == torch.float32 else None


TENSOR_CHANGES: dict[str, Callable[[random.Random, Tensor], Any]] = {
    "longer": longer,
    "shorter": shorter,
    "deeper": lambda rng, t: t.unsqueeze(rng.randint(0, t.dim())),
    "flat": lambda rng, t: t.reshape(-1) if t.dim() != 1 else t.sum(),
    "huge": lambda rng, t: t.new_zeros(()).expand(2**31, *[1] * (t.dim() - 1)),
    "of another dtype": of_another_dtype,
    "on meta": lambda rng, t: t.to("meta"),
    "sparse": lambda rng, t: t.to_sparse(),
    "mkldnn": mkldnn,
    "quantized": quantized,
    "a list": lambda rng, t: t.tolist(),
    "another kind of thing": lambda rng, t: rng.choice((3, "x", object())),
}
HARMLESS: dict[str, Callable[[random.Random, Tensor], Any]] = {
    "strided": lambda rng, t: torch.stack([t, t], -1)[..., 0],
    "negated twice": lambda rng, t: torch._neg_view(-t) if t.is_floating_point() else None,
    "asking for a gradient": lambda rng, t: t.detach().clone().requires_grad_() if t.is_floating_point() else None,
}
FLOATING = ("mkldnn", "quantized", "negated twice", "asking for a gradient")
INTEGERS = ("batch_sizes", "lengths", "resets", "offsets")


def is_plain(t: Any) -> bool:
    """A tensor whose values can be read."""
    of_cpu = isinstance(t, Tensor) and t.layout == torch.strided and t.device.type == "cpu"
    return of_cpu and not t.is_quantized and t.numel() <= LARGE


def change_tensor(name: str, change: Callable[[random.Random, Tensor], Any]) -> Callable[..., bool]:
    def apply(rng: random.Random, call: Arguments) -> bool:
        of, key = call, name
        if isinstance(call[name], list):
            of, key = call[name], rng.randrange(max(len(call[name]), 1))
            if not of:
                return False
        if not is_plain(of[key]) or (new := change(rng, of[key])) is None:
            return False
        of[key] = new
        return True

    return apply


def put(name: str, *values: Any) -> Callable[..., bool]:
    """One of these values, made new where it is a function of the call; None: it does not apply."""

    def apply(rng: random.Random, call: Arguments) -> bool:
        value = rng.choice(values)
        value = value(rng, call) if callable(value) else value
        call[name] = call[name] if value is None else value
        return value is not None

    return apply


def absent(name: str) -> Callable[..., bool]:
    def apply(rng: random.Random, call: Arguments) -> bool:
        given = call[name] is not None
        call[name] = None
        return given

    return apply


def value_changed(name: str, low: int, high: int) -> Callable[..., bool]:
    """An element of a vector of integers."""

    def apply(rng: random.Random, call: Arguments) -> bool:
        t = call[name]
        if not is_plain(t) or t.dtype != torch.int64 or t.dim() != 1 or not len(t):
            return False
        call[name] = t.clone()
        call[name][rng.randrange(len(t))] = rng.choice((low, high))
        return True

    return apply


BIG = 2**62
PARTS = itertools.product(("", " b_ih b_hh"), ("", " w_hr"), ("", " w_units"))
NAMES = tuple("w_ih w_hh" + "".join(parts) for parts in PARTS)
NO_NAMES = (
    "",
    "w_ih",
    "w_ih w_hh b_ih",
    "w_hh w_ih",
    "w_ih  w_hh",
    " w_ih w_hh",
    "w_ih w_hh w_ih",
    "w_ih w_hh x",
    "w_ih w_hh\0",
)
NO_MODES = ("TANH", "", "lstm", "LSTM ", "RNN", "\0")
COUNTS = (-(2**63), -BIG, -(2**31), -1, 2**31 - 1, 2**31, 2**40, BIG, 2**63 - 1)


def changes_of(operator: str) -> dict[str, Callable[..., bool]]:
    found: dict[str, Callable[..., bool]] = {}
    for argument in getattr(torch.ops.rnnfast, operator).default._schema.arguments:
        name, kind = argument.name, str(argument.type)
        if "Tensor" in kind:
            for how, change in (TENSOR_CHANGES | HARMLESS).items():
                # The operators of steps, which write to their arguments, serve neither autograd nor lazy views.
                if how not in FLOATING or (name not in INTEGERS and (how not in HARMLESS or operator not in STEPS)):
                    found[f"{name} {how}"] = change_tensor(name, change)
            if "List" not in kind:
                found[f"{name} absent"] = absent(name)
                found[f"{name} empty"] = put(name, lambda rng, call, name=name: emptied(call[name]))
        elif kind == "bool":
            found[f"{name} no bool"] = put(name, "yes", None)
        if name == "mode":
            found["mode unknown"] = put(name, *NO_MODES)
            found["mode of another cell"] = put(name, other_mode)
            found["mode no string"] = put(name, 3)
        if name == "names":
            found["names unknown"] = put(name, *NO_NAMES)
            found["names of other weights"] = put(name, *NAMES)
            found["names no string"] = put(name, 3, None)
        if kind == "List[Tensor]":
            found[f"{name} fewer"] = put(name, lambda rng, call, name=name: call[name][:-1] if call[name] else None)
            found[f"{name} none"] = put(name, lambda rng, call, name=name: [] if call[name] else None)
            found[f"{name} more"] = put(name, lambda rng, call, name=name: more(call[name]))
            found[f"{name} with a hole"] = put(name, lambda rng, call, name=name: [*call[name][:-1], None])
            found[f"{name} many"] = put(name, lambda rng, call, name=name: call[name] * 5 if call[name] else None)
        if name in ("lengths", "batch_sizes", "offsets"):
            found[f"{name} out of range"] = value_changed(name, -1, 7)
            found[f"{name} out of all range"] = value_changed(name, -BIG, BIG)
        if name in ("steps", "batch", "hidden", "use", "form"):
            found[f"{name} out of range"] = put(name, *COUNTS)
    if operator == "reference_backward":  # whose gates are empty
        for how in ("shorter", "mkldnn", "empty"):
            del found[f"gates {how}"]
    if operator == "checked_lengths":  # of any shape
        for how in ("longer", "shorter", "deeper", "flat", "huge", "empty", "on meta"):
            del found[f"lengths {how}"]
    if operator in LAYERS:
        found["the other number of directions"] = put("bidirectional", lambda rng, call: not call["bidirectional"])
        found["a cell state of no LSTM"] = put("c0", cell_state)
        found["weights in another order"] = put("weights", lambda rng, call: call["weights"][::-1])
        found["batch_sizes of a rectangle"] = put("batch_sizes", lambda rng, call: torch.tensor([2, 1]))
        found["lengths of packed rows"] = put("lengths", lambda rng, call: of_packed(call, torch.tensor([1])))
        found["resets of packed rows"] = put("resets", lambda rng, call: of_packed(call, torch.zeros(1, 1).bool()))
        found["batch_sizes that increase"] = put("batch_sizes", increasing)
        found["batch_sizes of more than all memory"] = put("batch_sizes", lambda rng, call: torch.tensor([BIG] * 4))
        found["x of 2^62 steps"] = put("x", lambda rng, call: call["x"].new_zeros(1, 1, 1).expand(BIG, 1, 1))
        found["units without end"] = endless
        found["directions that differ"] = put("weights", differing)
    if operator == "cpu_plain":
        found["a cell state of no LSTM"] = put(
            "c0", lambda rng, call: None if mode_of(call) in LSTMS or call["h0"] is None else call["h0"]
        )
    if operator == "cpu_flex_plain":  # what would be another program, and no wrong one; what does not apply
        for name in ("program longer", "program shorter", "program mkldnn", "program quantized", "states none"):
            del found[name]
    if operator in PLAIN:
        found["weights in another order"] = put("weights", lambda rng, call: call["weights"][::-1])
        found["x of no steps"] = put("x", lambda rng, call: without_steps(call))
        found["the other number of directions"] = put("form", lambda rng, call: call["form"] ^ 1)
        found["another layout"] = put("form", lambda rng, call: call["form"] | 6)
        found["another cell"] = put("form", lambda rng, call: call["form"] | 31 << 3)
        found["no layers"] = put("form", lambda rng, call: call["form"] & 255)
    if operator in STEPS and operator != "cuda_states_before":
        found["no projection of a projected state"] = put(
            "w_hr",
            lambda rng, call: [] if call["w_hr"] and call["w_hh"][0].shape[1] * 4 != len(call["w_hh"][0]) else None,
        )
    if "steps" in found:
        found["steps zero"] = put("steps", 0)
    if operator == "cuda_plan":
        found["dtype without kernels"] = put("dtype", torch.int32, torch.complex64, torch.bool, torch.float8_e5m2)
    return found


def emptied(t: Any) -> Tensor | None:
    return t.new_empty(0) if isinstance(t, Tensor) and t.shape != (0,) else None


def mode_of(call: Arguments) -> str | None:
    """Of a plain call."""
    return dict(enumerate(GATES)).get(call["form"] >> 3 & 31)


def without_steps(call: Arguments) -> Tensor | None:
    x, layout = call["x"], call["form"] >> 1 & 3
    if not is_plain(x) or x.dim() < 2 or layout == 2:
        return None
    return x.narrow(1 if x.dim() == 3 and layout == 1 else 0, 0, 0)


def other_mode(rng: random.Random, call: Arguments) -> str:
    return rng.choice([mode for mode in GATES if GATES[mode] != GATES.get(call["mode"])])


def more(weights: list) -> list | None:
    return [*weights, weights[-1]] if weights else None


def cell_state(rng: random.Random, call: Arguments) -> Tensor | None:
    x, w = call["x"], call["weights"]
    if call["mode"] in LSTMS or not isinstance(x, Tensor) or x.dim() != 3 or not w:
        return None
    return torch.zeros(1 + call["bidirectional"], x.shape[1], len(w[0]) // GATES.get(call["mode"], 1), dtype=x.dtype)


def of_packed(call: Arguments, value: Tensor) -> Tensor | None:
    return None if call["batch_sizes"] is None else value


def increasing(rng: random.Random, call: Arguments) -> Tensor | None:
    found = call["batch_sizes"]
    return found.flip(0) if is_plain(found) and found.dim() == 1 else None


def endless(rng: random.Random, call: Arguments) -> bool:
    x = call["x"]
    new = lambda *shape: torch.empty(shape, dtype=x.dtype if isinstance(x, Tensor) else None)
    of_direction = [new(BIG, 0), new(BIG, 0), *([new(0, BIG // 4)] if call["mode"] in LSTMS else [])]
    call["names"] = "w_ih w_hh" + " w_hr" * (len(of_direction) > 2)
    if LSTMS.get(call["mode"]):
        of_direction, call["names"] = [*of_direction, new(0)], call["names"] + " w_units"
    call["weights"] = of_direction * (1 + bool(call["bidirectional"]))
    return True


def differing(rng: random.Random, call: Arguments) -> list[Tensor] | None:
    weights = call["weights"]
    half = len(weights) // 2
    if not call["bidirectional"] or not half or len(weights) % 2 or not all(isinstance(w, Tensor) for w in weights):
        return None
    return [*weights[:half], *(torch.cat([w, w.new_zeros(1, *w.shape[1:])]) for w in weights[half:])]


# What a call has to do


class Invalid(Exception):
    pass


def need(fact: bool) -> None:
    if not fact:
        raise Invalid


def need_tensor(t: Any, shape: tuple[int, ...], dtype: torch.dtype, optional: bool = True) -> None:
    need((t is None and optional) or isinstance(t, Tensor))
    if t is not None:
        need(t.layout == torch.strided and t.device.type == "cpu" and tuple(t.shape) == shape and t.dtype == dtype)


def check_layer(call: Arguments, operator: str) -> None:
    backend, _, way = operator.partition("_")
    mode, x, weights, batch_sizes = (call[name] for name in ("mode", "x", "weights", "batch_sizes"))
    need(mode in GATES and isinstance(x, Tensor) and x.layout == torch.strided and x.device.type == "cpu")
    need(x.dtype in DTYPES[backend] or (backend == "reference" and (x.is_floating_point() or x.is_complex())))
    need(all(isinstance(w, Tensor) for w in weights) and isinstance(call["bidirectional"], bool))
    flags = {"forward": ("keep_c", "keep_gates"), "backward": ("need_dx", "need_dw")}.get(way, ())
    need(all(isinstance(call[flag], bool) for flag in flags))
    D, G = 1 + call["bidirectional"], GATES[mode]
    need(x.dim() == (3 if batch_sizes is None else 2))
    *rows, I = x.shape
    if batch_sizes is None:
        T, N = rows
        need(max(T, N) < 2**31)
        need_tensor(call["lengths"], (N,), torch.int64)
        need(call["lengths"] is None or all(0 <= length <= T for length in call["lengths"].tolist()))
        need_tensor(call["resets"], (T, N), torch.bool)
    else:
        need(call["lengths"] is None and call["resets"] is None and isinstance(batch_sizes, Tensor))
        need_tensor(batch_sizes, (batch_sizes.numel(),), torch.int64)
        need(batch_sizes.numel() <= rows[0])
        of_steps = batch_sizes.tolist()
        need(bool(of_steps) and min(of_steps) > 0 and sum(of_steps) == rows[0])
        need(all(a >= b for a, b in zip(of_steps, of_steps[1:])))
        N = of_steps[0]
    names = call["names"]
    need(names in NAMES and ("w_hr" not in names or mode in LSTMS))
    need(("w_units" in names) == bool(LSTMS.get(mode)))
    each = len(names.split())
    need(len(weights) == D * each)
    need(weights[0].dim() == 2 and len(weights[0]) % G == 0)
    w_hr = weights[names.split().index("w_hr")] if "w_hr" in names else None
    need(w_hr is None or w_hr.dim() > 0)
    H = len(weights[0]) // G
    P = H if w_hr is None else len(w_hr)
    need(H < 2**31)
    shapes = [(G * H, I), (G * H, P), *[(G * H,)] * 2 * ("b_ih" in names), *[(P, H)] * ("w_hr" in names)]
    shapes = [*shapes, *[(LSTMS.get(mode, 0) * H,)] * ("w_units" in names)] * D
    for weight, shape in zip(weights, shapes):
        need_tensor(weight, shape, x.dtype)
    need_tensor(call["h0"], (D, N, P), x.dtype)
    need_tensor(call["c0"], (D, N, H), x.dtype)
    need(call["c0"] is None or mode in LSTMS)
    if way == "forward":
        return
    acc = torch.promote_types(x.dtype, torch.float32)
    of_c, of_c_n = ((*rows, D * H), (D, N, H)) if mode in LSTMS else ((0,), (0,))
    R, saved = x[..., :1].numel() if I else torch.Size(rows).numel(), saved_gates(backend, mode)
    need_tensor(call["y"], (*rows, D * P), x.dtype, optional=False)
    need_tensor(call["c"], of_c, acc, optional=False)
    need_tensor(call["gates"], (D, R, saved * H) if saved else (0,), x.dtype, optional=False)
    need_tensor(call["dy"], (*rows, D * P), x.dtype)
    need_tensor(call["dh_n"], (D, N, P), x.dtype)
    need_tensor(call["dc_n"], of_c_n, x.dtype)
    need_tensor(call["dc"], of_c, acc)


def layers_of(call: Arguments) -> Iterator[Arguments]:
    """A plain call as calls of a layer's forward, each with x of zeros but for the first."""
    form, x, h0, c0, weights = (call[name] for name in ("form", "x", "h0", "c0", "weights"))
    need(isinstance(x, Tensor) and x.layout == torch.strided and all(isinstance(w, Tensor) for w in weights))
    need(isinstance(form, int))
    mode, L, D, layout, dims = mode_of(call), form >> 8, 1 + (form & 1), form >> 1 & 3, x.dim()
    is_cell = layout == 2
    need(mode is not None and L > 0 and layout < 3 and (not is_cell or (L == 1 and D == 1)))
    need(dims in ((1, 2) if is_cell else (2, 3)) and len(weights) % (L * D) == 0)
    x = x.unsqueeze(0) if is_cell else x
    x = x.unsqueeze(1) if x.dim() == 2 else x.transpose(0, 1) if layout == 1 else x
    need(x.shape[0] > 0)
    states = []
    for state in (h0, c0):
        need(state is None or (isinstance(state, Tensor) and state.layout == torch.strided and state.dim() == dims))
        state = state.unsqueeze(0) if is_cell and state is not None else state
        state = state.unsqueeze(1) if state is not None and state.dim() == 2 else state
        need(state is None or len(state) == L * D)
        states.append(state)
    each, P = len(weights) // L, None
    more_weights = each // D - 2 - bool(LSTMS.get(mode))
    need(0 <= more_weights < 4 and (mode in LSTMS or more_weights in (0, 2)) and not (is_cell and more_weights % 2))
    names = "w_ih w_hh" + " b_ih b_hh" * (more_weights > 1) + " w_hr" * (more_weights % 2)
    names += " w_units" * bool(LSTMS.get(mode))
    for k in range(L):
        layer = {"mode": mode, "x": x, "batch_sizes": None, "lengths": None, "resets": None}
        layer |= {"h0": states[0] if states[0] is None else states[0][k * D : (k + 1) * D]}
        layer |= {"c0": states[1] if states[1] is None else states[1][k * D : (k + 1) * D]}
        layer |= {"bidirectional": D == 2, "names": names, "weights": weights[k * each : (k + 1) * each]}
        layer |= {"keep_c": False, "keep_gates": False}
        check_layer(layer, "cpu_forward")
        sizes_of = len(layer["weights"][0]), layer["weights"][1].shape[1]
        need(P in (None, sizes_of))
        P = sizes_of
        yield layer
        x = x.new_zeros(*x.shape[:2], D * sizes_of[1])


def as_plain(call: Arguments) -> Arguments:
    """The other way round than ``valid_flex``."""
    form, program, states = call["form"], call["program"], call["states"]
    need(isinstance(form, int) and form >> 3 & 31 in (2, 3) and form >> 1 & 3 < 2 and form >> 8 > 0)
    need(len(program) == 5 and len(states) in (0, 2) and all(isinstance(s, Tensor) for s in states))
    for given, right in zip(program, program_of_lstm()):
        need_tensor(given, right.shape, right.dtype, optional=False)
        need(torch.equal(given.detach(), right))
    need(len(call["weights"]) == (form >> 8) * (1 + (form & 1)) * (4 if form >> 3 & 1 else 2))
    of_call = {"x": call["x"], "weights": call["weights"]}
    h0, c0 = states or (None, None)
    return {"form": form & ~(31 << 3) | list(GATES).index("LSTM") << 3, "h0": h0, "c0": c0} | of_call


def check_plain(call: Arguments, operator: str) -> None:
    for layer in layers_of(call if operator == "cpu_plain" else as_plain(call)):
        need(operator == "cpu_plain" or len(layer["weights"][0]) > 0)  # a layer of any cell has units


def check_steps(call: Arguments, operator: str) -> None:
    forward = operator == "cuda_forward_steps"
    like, state = {
        "cuda_forward_steps": ("x_gates", "h"),
        "cuda_backward_steps": ("dgates", "dh"),
        "cuda_states_before": ("out", "out"),
    }[operator]
    like, state, steps, lengths = call[like], call[state], call["steps"], call["lengths"]
    need(isinstance(like, Tensor) and like.dtype in FUSED and like.dim() == 3 and 0 < steps < 2**31)
    need(isinstance(state, Tensor) and state.dim() == 3 and isinstance(call.get("tf32", False), bool))
    dtype, acc, P, R = like.dtype, torch.promote_types(like.dtype, torch.float32), state.shape[2], like.shape[1]
    if operator == "cuda_states_before":
        need(lengths is None or (isinstance(lengths, Tensor) and lengths.dim() == 1))
        D, N = like.shape[0], R // steps if call["offsets"] is None or lengths is None else len(lengths)
        expected = {"out": ((D, R, P), dtype), "y": ((R, D * P), dtype), "h0": ((D, N, P), dtype)}
    else:
        need(call["mode"] in GATES and all(isinstance(w, Tensor) for n in ("w_hh", "w_hr") for w in call[n]))
        D, N, G, is_lstm = len(call["w_hh"]), state.shape[1], GATES[call["mode"]], call["mode"] in LSTMS
        need(D in (1, 2) and call["w_hh"][0].dim() == 2 and len(call["w_hh"][0]) % G == 0 and N > 0 and R > 0)
        H, S = len(call["w_hh"][0]) // G, 4 if G > 1 else 0
        need(H < 2**20 and (len(call["w_hr"]) == D and is_lstm if call["w_hr"] else P == H))
        need(len(call["b_hh"]) in (0, D) and all(isinstance(b, Tensor) for b in call["b_hh"]))
        units = LSTMS.get(call["mode"], 0)
        need(len(call["w_units"]) == (D if units else 0) and all(isinstance(w, Tensor) for w in call["w_units"]))
        for name, shape in (("w_hh", (G * H, P)), ("b_hh", (G * H,)), ("w_hr", (P, H)), ("w_units", (units * H,))):
            for weight in call[name]:
                need_tensor(weight, shape, dtype)
                need(weight.is_contiguous())
        of_cell = lambda *shape, dtype=acc: (shape if is_lstm else (0,), dtype)
        expected = {"y": ((R, D * P), dtype), "cs": of_cell(R, D * H)}
        expected["gates"] = ((D, R, S * H) if S else (0,), dtype)
        needed = ["c" if forward else "dc"] if is_lstm else []
        if forward:
            expected |= {"x_gates": ((D, R, G * H), dtype), "h": ((D, N, P), dtype), "c": of_cell(D, N, H)}
        else:
            expected |= {"dy": ((R, D * P), dtype), "dcs": of_cell(R, D * H), "h0": ((D, N, P), dtype)}
            expected |= {"c0": of_cell(D, N, H, dtype=dtype), "dh": ((D, N, P), acc), "dc": of_cell(D, N, H)}
            expected |= {"dgates": ((D, R, (max(S, 1) + units) * H), dtype)}
            expected |= {"dprojections": ((D, R, P) if call["w_hr"] else (0,), dtype)}
            needed += ["gates", "cs"] + ["dprojections"] * bool(call["w_hr"])
        need(all(call[name] is not None for name in needed))
    need(isinstance(call["y"], Tensor) and D in (1, 2))
    if call["offsets"] is None:
        need(steps * N == R)
    else:
        need(lengths is not None and call["resets"] is None)
    expected |= {"offsets": ((steps,), torch.int64), "lengths": ((N,), torch.int64)}
    expected |= {"resets": ((steps, N), torch.uint8)}
    for name, (shape, of) in expected.items():
        need_tensor(call[name], shape, of)
        need(call[name] is None or call[name].is_contiguous())


def check_numbers(call: Arguments, operator: str) -> None:
    if operator == "cuda_plan":
        need(call["mode"] in GATES and call["dtype"] in FUSED)
        need(0 <= call["batch"] < 2**31 - 1 and 0 <= call["hidden"] < 2**20)
        need(all(isinstance(call[name], bool) for name in ("bidirectional", "projected", "tf32", "backward")))
    elif operator == "checked_lengths":
        lengths, steps = call["lengths"], call["steps"]
        need(isinstance(lengths, Tensor) and lengths.layout == torch.strided and steps >= 0)
        need(not (lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool))
        need(lengths.is_meta or all(0 <= length <= steps for length in lengths.reshape(-1).tolist()))
    else:
        use = call["use"]  # of a regime's cuts, too: see csrc/cuda/recurrence.cu
        need(use is None or (isinstance(use, int) and (0 <= use < 4 or (operator == "cuda_regime" and is_cut(use)))))


def is_cut(use: int) -> bool:
    return 0 <= use < 1024 and use % 16 < 6


def is_valid(call: Arguments, operator: str) -> bool:
    try:
        kinds = ((LAYERS, check_layer), (PLAIN, check_plain), (STEPS, check_steps))
        next((check for names, check in kinds if operator in names), check_numbers)(call, operator)
    except Invalid:
        return False
    return True


# One call


def tensors_of(call: Arguments) -> Iterator[tuple[str, Tensor]]:
    """Those whose values can be compared, by argument."""
    for name, value in call.items():
        for t in value if isinstance(value, list) else [value]:
            if is_plain(t):
                yield name, t


def agree(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Equal but for a few roundings of the dtype of x."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    scale = max(expected.abs().max().item(), 1) if expected.numel() else 1
    roundings = 16 if dtype.itemsize == 2 else 64
    return torch.allclose(actual, expected, rtol=0, atol=roundings * torch.finfo(dtype).eps * scale)


def reference_of(call: Arguments, way: str) -> Arguments:
    """The call for the reference, which keeps no gates."""
    gates = {"gates": call["gates"].new_empty(0)} if way != "forward" and isinstance(call["gates"], Tensor) else {}
    needs = {"need_dx": True, "need_dw": True} if way == "gate_gradients" else {}
    return call | gates | needs


def by_reference(call: Arguments, way: str) -> Any:
    """What the reference makes of it, of gate gradients the gradients that are products of those."""
    name = "forward" if way == "forward" else "backward"
    return getattr(torch.ops.rnnfast, f"reference_{name}")(**reference_of(call, way))


def products_of(call: Arguments, dgates: Tensor, *of_states: Tensor) -> tuple:
    """The results of a backward, from gradients at the gates."""
    from rnnfast import records, samples

    inputs, saved = (of(*(call[name] for name in of._fields)) for of in (records.Inputs, records.Saved))
    dweights = [of.squeeze(0) for of in samples._weight_gradients(inputs, saved, dgates, 1)]
    return samples._input_gradient(inputs, dgates), *of_states, dweights


def are_right(call: Arguments, operator: str, results: tuple) -> bool:
    """Whether the results of a valid call are the reference's."""
    backend, _, way = operator.partition("_")
    expected = by_reference(call, way)
    results = products_of(call, *results) if way == "gate_gradients" else results
    if way == "forward":
        *results, gates = results
        saved = saved_gates(backend, call["mode"]) * call["keep_gates"]
        D = 1 + call["bidirectional"]
        H = len(call["weights"][0]) // GATES[call["mode"]]
        rows = call["x"].shape[:-1].numel()
        if gates.shape != ((D, rows, saved * H) if saved else (0,)):
            return False
        expected = expected[:-1]
    else:
        if call["mode"] == "RNN_RELU" and call["x"].dtype in (torch.bfloat16, torch.float16):
            return True  # at relu's kink rounding picks the gradient
        results, expected = (*results[:3], *results[3]), (*expected[:3], *expected[3])
    return len(results) == len(expected) and all(agree(a, e, call["x"].dtype) for a, e in zip(results, expected))


def are_right_plain(call: Arguments, results: tuple) -> bool:
    """Whether the results of a valid plain call are those of the reference, layer by layer."""
    y, finals, layout = None, [], call["form"] >> 1 & 3
    for layer in layers_of(call):
        y, *final, _, _ = torch.ops.rnnfast.reference_forward(**(layer if y is None else layer | {"x": y}))
        finals.append(final)
    h_n, c_n = (torch.cat(of) for of in zip(*finals))
    dims, is_cell = call["x"].dim(), layout == 2
    if dims == (1 if is_cell else 2):
        y, h_n, c_n = (t.squeeze(1) if t.dim() == 3 else t for t in (y, h_n, c_n))
    elif layout == 1:
        y = y.transpose(0, 1)
    of_states = [h_n, c_n if mode_of(call) in LSTMS else None]
    expected = [None, *(s if s is None else s.squeeze(0) for s in of_states)] if is_cell else [y, *of_states]
    return len(results) == len(expected) and all(
        (a is None and e is None) or (agree(a, e, call["x"].dtype) and (a.stride() == e.stride() or not a.numel()))
        for a, e in zip(results, expected)
    )


# What is not the operators' to refuse: types and backends, by the dispatcher, and lengths, in the layers' words.
TORCHS = ("rnnfast::", "Could not run 'rnnfast::", "lengths must be within")


def is_malformed(change: str, operator: str) -> bool | None:
    """Whether the change may leave no call as valid as it was; None: it depends on the call."""
    how = change.partition(" ")[2]
    if how in HARMLESS:
        return None if operator in STEPS else False
    clamped = operator in STEPS and how in ("out of range", "out of all range") and not change.startswith("steps")
    optional = how == "absent" or change == "b_hh none" or (change, operator) == ("mode of another cell", "cuda_plan")
    return None if clamped or optional else True


def changed_call(operator: str, rng: random.Random, number: int, changes: dict[str, Callable[..., bool]]) -> tuple:
    """The call of that number, and how it was changed: the first ones each in one way, the others in up to three."""
    names = list(changes)
    for _ in range(200):  # what cannot be changed so in one call, or stays valid, may do in another
        call = {k: list(v) if isinstance(v, list) else v for k, v in valid_call(rng, operator).items()}
        if number >= len(names):
            chosen = rng.sample(names, min(rng.choice((0, 1, 2, 2, 3)), len(names)))
            return call, [name for name in chosen if changes[name](rng, call)]
        name = names[number]
        if changes[name](rng, call) and (not is_malformed(name, operator) or not is_valid(call, operator)):
            return call, [name]
    raise AssertionError(f"no call was changed by {names[number]}")


def check_call(operator: str, seed: int, number: int, changes: dict[str, Callable[..., bool]]) -> tuple[list, bool]:
    """Makes one call; returns how it was changed, and whether it was refused. An AssertionError says what is wrong."""
    rng = random.Random(f"{operator} {seed} {number}")
    call, done = changed_call(operator, rng, number, changes)
    backend, _, way = operator.partition("_")
    valid = is_valid(call, operator)
    if valid and operator in LAYERS and way != "forward" and any(is_malformed(n, operator) is not False for n in done):
        call |= saved_by_forward(backend, call)  # it has to be that of the arguments as they are now
    if operator in BORDERS["cuda"][:-2]:
        torch.ops.rnnfast.cuda_regime(rng.choice((0, 4, 5)))

    tensors = list(tensors_of(call))
    before = [t.detach().clone() for _, t in tensors]
    op, error, results = getattr(torch.ops.rnnfast, operator).default, None, None
    try:
        results = op(**call)
    except Exception as raised:
        error = raised
    if operator in PLAIN and (error is not None or not (isinstance(results[1], Tensor) or results[1])):
        assert error is None or str(error).startswith(TORCHS), f"it was refused in words: {error!r}"
        error = RuntimeError("rnnfast: of no such call")
    written = [a.name for a in op._schema.arguments if a.alias_info is not None and error is None]
    for (name, t), old in zip(tensors, before):
        assert name in written or torch.equal(t, old), f"{name} was changed"
    if error is None:
        assert valid, "it was not refused"
        assert operator not in LAYERS or are_right(call, operator, results), "the results are not the reference's"
        if operator == "cpu_flex_plain":
            call, results = as_plain(call), (results[0], *results[1])
        assert operator not in PLAIN or are_right_plain(call, results), "the results are not the reference's"
        return done, False
    assert not valid, f"it was refused: {error!r}"
    text = str(error)
    assert text.startswith(("rnnfast: ", *TORCHS)), f"it was refused in other words: {error!r}"
    # The reference keeps no gates, and has other dtypes; of several mistakes another may come first.
    alike = operator in LAYERS and len(done) == 1 and not done[0].startswith("gates")
    if alike and text.startswith("rnnfast: ") and "no kernel for dtype" not in text:
        try:
            expected = by_reference(call, way)
        except Exception as raised:
            expected = str(raised)
        text, expected = (of.partition("\0")[0] for of in (text, expected))  # where the text of a C++ exception ends
        assert text == expected, f"{text!r} is {expected!r} of the reference"
    return done, True


def main(backend: str, seed: int, more: int, library: str = "") -> None:
    """All calls of a backend; what is wrong goes to stdout, and so does the call under way, should it crash."""
    if backend == "triton":
        import interpreter  # noqa: F401  # before Triton's kernels
    if backend == "cpu" and library:
        load = torch.ops.load_library
        torch.ops.load_library = lambda path: load(library if Path(path).name == "_cpu.so" else path)
    import rnnfast  # noqa: F401

    if backend == "cuda":
        torch.ops.load_library(library)
        torch.backends.cudnn.rnn.fp32_precision = "ieee"
    torch.set_num_threads(1)
    torch.backends.mkldnn.set_flags(False)  # it compiles a kernel for every shape of a half type
    for operator in BORDERS[backend]:
        changes = changes_of(operator)
        refused, taken = Counter(), Counter()
        for number in range(len(changes) + more):
            print(f"{operator}, seed {seed}, call {number}", end=": ", flush=True)
            try:
                done, was_refused = check_call(operator, seed, number, changes)
            except AssertionError as error:
                print("WRONG", error, flush=True)
                continue
            (refused if was_refused else taken).update(done if len(done) == 1 else ["several"])
            print(", ".join(done), "is refused" if was_refused else "is taken", flush=True)
        for name in changes:
            expected = is_malformed(name, operator)
            if not (refused[name] if expected else taken[name] if expected is False else True):
                print(f"{operator}: WRONG {name!r} was never {'refused' if expected else 'taken'}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
