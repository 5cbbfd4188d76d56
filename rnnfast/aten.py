"""PyTorch's own kernels: a whole stack of layers, or a cell, by the operators that ``torch.nn``'s modules call.

They serve every device that torch serves, and their names stand in the graphs that others are given to run.
Letters as in ``reference.py``, and L layers.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from . import onnx, reference
from .backends import is_recorded
from .cells import GATES
from .records import Inputs, names_of

STACKS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "RNN_TANH": torch._VF.rnn_tanh,
    "RNN_RELU": torch._VF.rnn_relu,
    "LSTM": torch._VF.lstm,
    "GRU": torch._VF.gru,
}
CELLS: dict[str, Callable[..., Any]] = {
    "RNN_TANH": torch._VF.rnn_tanh_cell,
    "RNN_RELU": torch._VF.rnn_relu_cell,
    "LSTM": torch._VF.lstm_cell,
    "GRU": torch._VF.gru_cell,
}


def stack(
    mode: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    training: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A stack of layers without dropout; arguments as :func:`rnnfast.functional.rnn`'s.

    Returns:
        y, h_n and, for an LSTM, c_n, else shape ``[0]``.
    """
    if num_layers == 1 and batch_sizes is None and onnx.is_exporting():
        return onnx.layer(mode, x, h0, c0, weights, lengths, bidirectional)
    if lengths is not None:
        return _padded(mode, x, h0, c0, weights, lengths, num_layers, bidirectional, training)
    states = _states(mode, x, h0, c0, weights, batch_sizes, num_layers * (1 + bidirectional))
    form, inputs = (mode, num_layers, bidirectional, batch_sizes, len(states)), (x, *states, *weights)
    is_traced = is_recorded()
    if torch.compiler.is_compiling() and not is_traced:
        y, h_n, *c_n = torch.ops.rnnfast.torch_stack(*form[:-1], x, states, weights, training)
        return y, h_n, c_n[0] if c_n else x.new_empty(0)
    if not is_traced and all(isinstance(w, nn.Parameter) for w in weights):
        _flatten(mode, weights, num_layers, bidirectional)
    if is_traced or _can_derive_twice(x) or not _is_differentiated(inputs):
        y, h_n, *c_n = _call(inputs, training, *form)
    else:
        y, h_n, *c_n = _Stack.apply(*form, *inputs)  # type: ignore[no-untyped-call]
    return y, h_n, c_n[0] if c_n else x.new_empty(0)


def cell(mode: str, x: Tensor, h: Tensor | None, c: Tensor | None, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """h and, for an LSTM, c, else shape ``[0]``, after one step; x ``[N, I]``, h and c ``[N, H]``, None is zero."""
    h = x.new_zeros(x.size(0), weights[1].size(1)) if h is None else h
    if mode == "LSTM":
        h, c = CELLS[mode](x, (h, torch.zeros_like(h) if c is None else c), *weights)
        return h, c
    return CELLS[mode](x, h, *weights), x.new_empty(0)


def _states(
    mode: str, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor], batch_sizes: Tensor | None,
    count: int,
) -> list[Tensor]:  # fmt: skip
    """The initial state. A batch size that is read off a tensor stays one where a graph is recorded."""
    batch: Any = x.size(1) if batch_sizes is None else batch_sizes[0]
    widths = {"h": weights[1].size(1), "c": weights[0].size(0) // GATES[mode]}
    given = {"h": h0, "c": c0} if mode == "LSTM" else {"h": h0}
    return [x.new_zeros(count, batch, widths[name]) if t is None else t for name, t in given.items()]


def _is_differentiated(inputs: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in inputs)


_flattening = threading.Lock()


def _flatten(mode: str, weights: Sequence[Tensor], num_layers: int, bidirectional: bool) -> None:
    """Move weights on a GPU into one chunk of memory, as cuDNN reads them: once, for there each has part of a storage.

    What has part of one before, as an optimizer's flat buffer or a chunk of another layer's, stays there.
    """
    first = weights[0]
    if not first.is_cuda or isinstance(first, FakeTensor):
        return
    if torch.cuda.is_current_stream_capturing():  # the copies would be the graph's
        return
    with _flattening:  # a thread that waited here finds them moved
        if any(w.untyped_storage().nbytes() != w.numel() * w.element_size() for w in weights):
            return
        names = names_of(mode, len(weights) // (num_layers * (1 + bidirectional)))
        out, hidden = weights[1].size(1), weights[0].size(0) // GATES[mode]
        layer = SimpleNamespace(
            _flat_weights=list(weights), _flat_weights_names=weights, mode=mode, bias="b_ih" in names,
            proj_size=out if "w_hr" in names else 0, input_size=first.size(1), hidden_size=hidden,
            num_layers=num_layers, batch_first=False, bidirectional=bidirectional,
        )  # fmt: skip
        nn.RNNBase.flatten_parameters(layer)  # type: ignore[arg-type]  # it has all that this reads


def _call(
    inputs: Sequence[Tensor],
    training: bool,
    mode: str,
    num_layers: int,
    bidirectional: bool,
    batch_sizes: Tensor | None,
    states: int,
) -> tuple[Tensor, ...]:
    x, hx, weights = inputs[0], inputs[1 : 1 + states], list(inputs[1 + states :])
    biased = "b_ih" in names_of(mode, len(weights) // (num_layers * (1 + bidirectional)))
    form = (hx if mode == "LSTM" else hx[0], weights, biased, num_layers, 0.0, training, bidirectional)
    # The operands are cast already; of the meta device there is no autocast.
    uncast = contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
    with uncast:
        return STACKS[mode](x, *form, False) if batch_sizes is None else STACKS[mode](x, batch_sizes, *form)


def _can_derive_twice(x: Tensor) -> bool:
    """Whether torch's kernels have derivatives of any order: on a CPU alone."""
    return x.is_cpu


def can_derive(inputs: Inputs) -> bool:
    """Whether ``derivable`` takes a layer."""
    x = inputs.x
    dtypes = torch.float32, torch.float64  # in the others each of torch's operators would round
    is_plain = inputs.lengths is None and inputs.resets is None
    return inputs.mode in STACKS and _can_derive_twice(x) and x.dtype in dtypes and is_plain and x.numel() > 0


def derivable(inputs: Inputs) -> tuple[Tensor, ...]:
    """y, h_n and, for an LSTM, c_n of a layer, which can be derived any number of times."""
    mode, x, h0, c0, batch_sizes, _, _, bidirectional, _, weights = inputs
    states = _states(mode, x, h0, c0, weights, batch_sizes, 1 + bidirectional)
    return _call((x, *states, *weights), False, mode, 1, bidirectional, batch_sizes, len(states))


def _is_batched(t: Tensor) -> bool:
    """Whether by a vmap, of torch.func or the one before."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(t) or functorch.is_legacy_batchedtensor(t)


class _Stack(torch.autograd.Function):
    """What torch has kernels for that can be derived once; a derivative of that goes through plain torch."""

    @staticmethod
    def forward(
        ctx: Any, mode: str, num_layers: int, bidirectional: bool, batch_sizes: Tensor | None, states: int,
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        leaves = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
        ctx.form = mode, num_layers, bidirectional, batch_sizes, states
        with torch.enable_grad():
            outputs = _call(leaves, True, *ctx.form)  # cuDNN keeps what a backward needs in training only
        ctx.graph = outputs, leaves
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        leaves, twice = ctx.saved_tensors, torch.is_grad_enabled()
        keep = twice or torch._C._autograd._get_current_graph_task_keep_graph()
        if twice or any(grad is not None and _is_batched(grad) for grad in grads):
            with torch.enable_grad():  # cuDNN's backward knows no batches of gradients either
                outputs = _reference(leaves, *ctx.form)
        else:
            outputs, leaves = ctx.graph
        if not keep:
            del ctx.graph
        live = [(output, grad) for output, grad in zip(outputs, grads) if grad is not None]
        needs = ctx.needs_input_grad[5:]
        wanted = [leaf for leaf, need in zip(leaves, needs) if need]
        found = iter(
            torch.autograd.grad(
                [output for output, _ in live], wanted, [grad for _, grad in live],
                retain_graph=keep, create_graph=twice, allow_unused=True,
            )
        )  # fmt: skip
        return (None,) * 5 + tuple(next(found) if need else None for need in needs)


def _reference(
    inputs: Sequence[Tensor],
    mode: str,
    num_layers: int,
    bidirectional: bool,
    batch_sizes: Tensor | None,
    states: int,
) -> tuple[Tensor, ...]:
    """What ``_call`` computes, in plain torch."""
    y, h0, c0, weights = inputs[0], inputs[1], inputs[2] if states == 2 else None, inputs[1 + states :]
    per_layer, directions, finals = len(weights) // num_layers, 1 + bidirectional, []
    form = batch_sizes, None, None, bidirectional, names_of(mode, per_layer // directions)
    for k in range(num_layers):
        of_layer = slice(k * directions, (k + 1) * directions)
        h, c = h0[of_layer], c0 if c0 is None else c0[of_layer]
        of_weights = weights[k * per_layer : (k + 1) * per_layer]
        y, *final, _ = reference.layer(Inputs(mode, y, h, c, *form, of_weights))
        finals.append(final[:states])
    return y, *(torch.cat(final) for final in zip(*finals))


def _padded(
    mode: str, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor], lengths: Tensor,
    num_layers: int, bidirectional: bool, training: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """By packing, which wants a step of every row: what a row without any makes of it is put right afterwards."""
    steps, rows, _ = x.shape
    initials = _states(mode, x, h0, c0, weights, None, num_layers * (1 + bidirectional))
    if steps == 0 or rows == 0:
        h_n, c_n = initials[0].clone(), initials[1] if len(initials) > 1 else x.new_empty(0)
        return x.new_empty(steps, rows, h_n.size(2) * (1 + bidirectional)), h_n, c_n
    packed = pack_padded_sequence(x, lengths.clamp(min=1).cpu(), enforce_sorted=False)
    order, inverse = packed.sorted_indices, packed.unsorted_indices
    assert order is not None and inverse is not None  # as it is not taken for sorted
    states = [state.index_select(1, order) for state in initials]
    y, *finals = stack(
        mode, packed.data, states[0], states[1] if len(states) > 1 else None, weights, num_layers=num_layers,
        bidirectional=bidirectional, training=training, batch_sizes=packed.batch_sizes,
    )  # fmt: skip
    y, _ = pad_packed_sequence(packed._replace(data=y), total_length=steps)
    y = torch.where((lengths > 0)[:, None], y, 0)
    for i, initial in enumerate(initials):
        finals[i] = torch.where((lengths > 0)[:, None], finals[i].index_select(1, inverse), initial)
    return y, finals[0], finals[1]


# For torch.compile a whole stack is one operator. Its backward runs the forward once more, as none hands a graph on.

_LIBRARY = torch.library.Library("rnnfast", "FRAGMENT")
_ARGUMENTS = (
    "str mode, int num_layers, bool bidirectional, Tensor? batch_sizes, Tensor x, Tensor[] hx, Tensor[] weights"
)
_RECORDING = ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView")


def _operator(
    mode: str, layers: int, bidirectional: bool, sizes: Any, x: Tensor, hx: Any, weights: Any, training: bool
) -> Any:
    return list(_call((x, *hx, *weights), training, mode, layers, bidirectional, sizes, len(hx)))


def _operator_fake(mode: str, layers: int, bidirectional: bool, sizes: Any, x: Tensor, hx: Any, *rest: Any) -> Any:
    return [x.new_empty(*x.shape[:-1], hx[0].size(2) * (1 + bidirectional)), *map(torch.empty_like, hx)]


def _derivative(
    mode: str, layers: int, bidirectional: bool, sizes: Any, x: Tensor, hx: Any, weights: Any, grads: Any
) -> Any:
    leaves = [t.detach().requires_grad_() for t in (x, *hx, *weights)]
    excluded = torch._C._dispatch_tls_local_exclude_set()  # within an operator nothing is recorded unless asked for
    for key in _RECORDING:
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        outputs = _call(leaves, True, mode, layers, bidirectional, sizes, len(hx))
        live = [(output, grad) for output, grad in zip(outputs, grads) if grad is not None]
        found = torch.autograd.grad(
            [output for output, _ in live], leaves, [grad for _, grad in live], materialize_grads=True
        )
    return list(found)


def _derivative_fake(
    mode: str, layers: int, bidirectional: bool, sizes: Any, x: Tensor, hx: Any, weights: Any, grads: Any
) -> Any:
    return list(map(torch.empty_like, (x, *hx, *weights)))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *ctx.form, batch_sizes, x, hx, weights, _ = inputs
    ctx.states, ctx.packed = len(hx), batch_sizes is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(t for t in (batch_sizes, x, *hx, *weights) if t is not None))


def _derive(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    saved, last = list(ctx.saved_tensors), 1 + ctx.states
    batch_sizes = saved.pop(0) if ctx.packed else None
    if all(grad is None for grad in grads):
        return (None,) * 8
    form = *ctx.form, batch_sizes, saved[0], saved[1:last], saved[last:]
    found = torch.ops.rnnfast.torch_stack_backward(*form, grads)
    return None, None, None, None, found[0], found[1:last], found[last:], None


for _name, _more, _kernel, _fake in (
    ("torch_stack", "bool training", _operator, _operator_fake),
    ("torch_stack_backward", "Tensor?[] grads", _derivative, _derivative_fake),
):
    _LIBRARY.define(f"{_name}({_ARGUMENTS}, {_more}) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rnnfast::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd("rnnfast::torch_stack", _derive, setup_context=_setup, lib=_LIBRARY)
