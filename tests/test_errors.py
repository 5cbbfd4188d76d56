"""What is refused: in torch.nn's own words, which are asked of torch.nn when the test runs, and in our own."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import (
    CELL_MODULES,
    HANG,
    LAYERS,
    assert_equal_modules,
    assert_same,
    chooser,
    error_of,
    flatten,
    leaves,
    pair,
    states,
    values_and_grads,
)
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

import rnnfast

R, DOUBLE = torch.randn, torch.float64
PACKED = {
    "": lambda *shape, **kw: pack_padded_sequence(R(*shape, **kw), torch.tensor([3, 2])),
    "unsorted": lambda *shape, **kw: pack_padded_sequence(R(*shape, **kw), torch.tensor([2, 3]), enforce_sorted=False),
}

CONSTRUCTIONS: dict[str, tuple[tuple, dict]] = {
    "no-sizes": ((), {}),
    "no-hidden-size": ((4,), {}),
    "unknown-keyword": ((4, 5), {"colour": "red"}),
    "positional-batch-first": ((4, 5, 1, True, 3), {}),
    "bias-int": ((4, 5), {"bias": 1}),
    "bias-none": ((4, 5), {"bias": None}),
    "batch-first-str": ((4, 5), {"batch_first": "yes"}),
    "input-size-float": ((4.0, 5), {}),
    "hidden-size-str": ((4, "5"), {}),
    "hidden-size-none": ((4, None), {}),
    "input-size-zero": ((0, 5), {}),
    "input-size-negative": ((-1, 5), {}),
    "hidden-size-zero": ((4, 0), {}),
    "num-layers-zero": ((4, 5, 0), {}),
    "num-layers-str": ((4, 5, "2"), {}),
    "dropout-bool": ((4, 5, 2), {"dropout": True}),
    "dropout-above-one": ((4, 5, 2), {"dropout": 1.5}),
    "dropout-negative": ((4, 5, 2), {"dropout": -0.1}),
    "dropout-str": ((4, 5, 2), {"dropout": "x"}),
    "dropout-numeric-str": ((4, 5, 2), {"dropout": "0.5"}),
    "proj-size": ((4, 5), {"proj_size": 5}),
    "proj-size-zero": ((4, 5), {"proj_size": 0, "bias": 3}),
    "proj-size-negative": ((4, 5), {"proj_size": -1}),
    "nonlinearity": ((4, 5), {"nonlinearity": "sine"}),
    "nonlinearity-positional": ((4, 5, 1, "sine"), {}),
    "dtype-int": ((4, 5), {"dtype": torch.int64}),
    "device-unknown": ((4, 5), {"device": "abacus"}),
}


@pytest.mark.parametrize("name", LAYERS + CELL_MODULES)
@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_construction(construction: str, name: str) -> None:
    args, kwargs = CONSTRUCTIONS[construction]

    def outcome(library: Any) -> Any:
        try:
            return repr(getattr(library, name)(*args, **kwargs))
        except Exception as error:  # torch names the base, whose constructor has the parameters
            return type(error), str(error).replace("RNNBase.__init__()", f"{name}.__init__()")

    assert outcome(rnnfast) == outcome(nn)


def test_construction_with_an_argument_twice() -> None:
    """Of torch.nn.RNN's nonlinearity Python says, less clearly, that it is unexpected."""
    with pytest.raises(TypeError, match=r"RNN.__init__\(\) got multiple values for argument 'nonlinearity'"):
        rnnfast.RNN(4, 5, 1, "tanh", nonlinearity="tanh")


# Forward. Each case is a call on a module; torch.nn's module says what has to be raised.

Case = Callable[[nn.Module, Any], Any]  # (module, a maker of states fit for it) -> the call
LAYER_CALLS: dict[str, Case] = {
    "input-1D": lambda m, h: m(R(4)),
    "input-4D": lambda m, h: m(R(1, 3, 2, 4)),
    "input-scalar": lambda m, h: m(R(())),
    "input-4D-with-states": lambda m, h: m(R(1, 3, 2, 4), h(1, 2, 5)),
    "input-none": lambda m, h: m(None),
    "input-list": lambda m, h: m([R(3, 2, 4)]),
    "input-missing": lambda m, h: m(),
    "input-size": lambda m, h: m(R(3, 2, 3)),
    "input-size-with-states": lambda m, h: m(R(3, 2, 3), h(1, 2, 5)),
    "input-size-unbatched": lambda m, h: m(R(3, 5)),
    "input-dtype": lambda m, h: m(R(3, 2, 4, dtype=DOUBLE)),
    "input-dtype-half": lambda m, h: m(R(3, 2, 4).half()),
    "input-dtype-int": lambda m, h: m(torch.ones(3, 2, 4, dtype=torch.int64)),
    "input-dtype-and-size": lambda m, h: m(R(3, 2, 3, dtype=DOUBLE)),
    "input-device": lambda m, h: m(R(3, 2, 4, device="meta")),
    "no-steps": lambda m, h: m(R(0, 2, 4)),
    "no-steps-unbatched": lambda m, h: m(R(0, 4)),
    "no-steps-with-states": lambda m, h: m(R(0, 2, 4), h(1, 2, 5)),
    "states-2D": lambda m, h: m(R(3, 2, 4), h(2, 5)),
    "states-4D": lambda m, h: m(R(3, 2, 4), h(1, 1, 2, 5)),
    "states-3D-unbatched": lambda m, h: m(R(3, 4), h(1, 1, 5)),
    "states-1D-unbatched": lambda m, h: m(R(3, 4), h(5)),
    "states-batch": lambda m, h: m(R(3, 2, 4), h(1, 9, 5)),
    "states-width": lambda m, h: m(R(3, 2, 4), h(1, 2, 6)),
    "states-layers": lambda m, h: m(R(3, 2, 4), h(2, 2, 5)),
    "states-layers-unbatched": lambda m, h: m(R(3, 4), h(2, 5)),
    "states-dtype": lambda m, h: m(R(3, 2, 4), h(1, 2, 5, dtype=DOUBLE)),
    "states-dtype-bfloat16": lambda m, h: m(R(3, 2, 4), h(1, 2, 5, dtype=torch.bfloat16)),
    "states-device": lambda m, h: m(R(3, 2, 4), h(1, 2, 5, device="meta")),
    "states-stacked": lambda m, h: m(R(3, 2, 4), R(2, 1, 2, 5)),
    "states-one-tensor": lambda m, h: m(R(3, 2, 4), R(1, 2, 5).expand(2, 2, 5)),
    "states-one-of-two": lambda m, h: m(R(3, 2, 4), (R(1, 2, 5),)),
    "states-two-of-one": lambda m, h: m(R(3, 2, 4), [R(1, 2, 5)] * (1 if type(m).__name__ == "LSTM" else 2)),
    "cell-state-width": lambda m, h: m(R(3, 2, 4), (R(1, 2, 5), R(1, 2, 6))),
    "cell-state-2D": lambda m, h: m(R(3, 2, 4), (R(1, 2, 5), R(2, 5))),
    "cell-state-batch": lambda m, h: m(R(3, 2, 4), (R(1, 2, 5), R(1, 3, 5))),
    "packed-input-size": lambda m, h: m(PACKED[""](3, 2, 5)),
    "packed-input-dtype": lambda m, h: m(PACKED[""](3, 2, 4, dtype=DOUBLE)),
    "packed-states-batch": lambda m, h: m(PACKED[""](3, 2, 4), h(1, 3, 5)),
    "packed-states-width": lambda m, h: m(PACKED[""](3, 2, 4), h(1, 2, 6)),
    "packed-states-layers": lambda m, h: m(PACKED[""](3, 2, 4), h(2, 2, 5)),
    "packed-states-2D": lambda m, h: m(PACKED[""](3, 2, 4), h(2, 5)),
    "packed-states-dtype": lambda m, h: m(PACKED[""](3, 2, 4), h(1, 2, 5, dtype=DOUBLE)),
    "unsorted-states-width": lambda m, h: m(PACKED["unsorted"](3, 2, 4), h(1, 2, 6)),
    "unsorted-states-few": lambda m, h: m(PACKED["unsorted"](3, 2, 4), h(1, 1, 5)),
    "autocast-float64": lambda m, h: _under_autocast(m, R(3, 2, 4, dtype=DOUBLE)),
}
CELL_CALLS: dict[str, Case] = {
    "input-3D": lambda m, h: m(R(3, 2, 4)),
    "input-scalar": lambda m, h: m(R(())),
    "input-none": lambda m, h: m(None),
    "input-missing": lambda m, h: m(),
    "input-size": lambda m, h: m(R(2, 3)),
    "input-size-unbatched": lambda m, h: m(R(3)),
    "input-dtype": lambda m, h: m(R(2, 4, dtype=DOUBLE)),
    "input-dtype-int": lambda m, h: m(torch.ones(2, 4, dtype=torch.int64)),
    "states-3D": lambda m, h: m(R(2, 4), h(1, 2, 5)),
    "states-scalar": lambda m, h: m(R(2, 4), h()),
    "states-width": lambda m, h: m(R(2, 4), h(2, 6)),
    "states-batch": lambda m, h: m(R(2, 4), h(3, 5)),
    "states-batch-and-width": lambda m, h: m(R(2, 4), h(3, 6)),
    "states-1D": lambda m, h: m(R(2, 4), h(5)),
    "states-2D-unbatched": lambda m, h: m(R(4), h(2, 5)),
    "states-dtype": lambda m, h: m(R(2, 4), h(2, 5, dtype=DOUBLE)),
    "states-one-of-two": lambda m, h: m(R(2, 4), (R(2, 5),)),
    "states-three-of-two": lambda m, h: m(R(2, 4), (R(2, 5),) * 3),
    "states-stacked": lambda m, h: m(R(2, 4), R(2, 2, 5)),
    "cell-state-width": lambda m, h: m(R(2, 4), (R(2, 5), R(2, 6))),
    "cell-state-batch": lambda m, h: m(R(2, 4), (R(2, 5), R(3, 5))),
    "cell-state-3D": lambda m, h: m(R(2, 4), (R(2, 5), R(1, 2, 5))),
}
# What we say where torch's words are about the inside of its own operators, or untrue, or torch takes what cannot be
# meant: the beginning of our text, and why it is another one.
_ONEDNN = "oneDNN's words name a primitive; RNN and GRU have better ones, which serve the LSTM, too"
OURS_DIFFER = {
    ("LSTM", "states-dtype"): ("mat1 and mat2 must have the same dtype, but got Double and Float", _ONEDNN),
    ("LSTM", "states-dtype-bfloat16"): ("mat1 and mat2 must have the same dtype, but got BFloat16 and Float", _ONEDNN),
    ("LSTM", "states-stacked"): ("lstm() received an invalid combination of arguments", "torch lists its overloads"),
    ("LSTM", "packed-states-layers"): ("Expected fewer hidden states in stacked_rnn", "torch says more for two of one"),
    **{
        (name, "unsorted-states-few"): ("Expected hidden batch size 2, got [1, 1, 5]", "torch's index_select fails")
        for name in LAYERS
    },
}


def _under_autocast(module: nn.Module, x: torch.Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return module(x)


def _assert_refuses_alike(theirs: nn.Module, ours: nn.Module, case: str, call: Case, good: tuple) -> None:
    name = type(ours).__name__

    def make(*shape: int, **kwargs: Any) -> Any:
        return (R(*shape, **kwargs), R(*shape, **kwargs)) if name.startswith("LSTM") else R(*shape, **kwargs)

    before, expected_state = values_and_grads(ours, *good), copy.deepcopy(ours.state_dict())
    error, text = error_of(call, ours, make)
    if (name, case) in OURS_DIFFER:
        beginning, _why = OURS_DIFFER[name, case]
        assert error is error_of(call, theirs, make)[0]
        assert text.startswith(beginning)
        assert text != error_of(call, theirs, make)[1], "torch says the same by now"
    else:
        expected = error_of(call, theirs, make)
        # Python names a missing argument's function by its class.
        assert (error, text.replace("_Recurrent", name).replace("_Cell", name)) == expected
    assert_same(ours.state_dict(), expected_state, rtol=0, atol=0)
    assert_same(values_and_grads(ours, *good), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("case", LAYER_CALLS)
def test_layer(case: str, name: str) -> None:
    if case.startswith("cell-state") and name != "LSTM":
        case, call = "states-a-tuple", lambda m, h: m(R(3, 2, 4), (R(1, 2, 5), R(1, 2, 5)))
    else:
        call = LAYER_CALLS[case]
    theirs, ours = pair(name, 4, 5)
    good = R(3, 2, 4), states(name, 1, 2, 5, dtype=torch.float32)
    _assert_refuses_alike(theirs, ours, case, call, good)


@pytest.mark.parametrize("name", CELL_MODULES)
@pytest.mark.parametrize("case", CELL_CALLS)
def test_cell(case: str, name: str) -> None:
    if case.startswith("cell-state") and name != "LSTMCell":
        case, call = "states-a-tuple", lambda m, h: m(R(2, 4), (R(2, 5), R(2, 5)))
    else:
        call = CELL_CALLS[case]
    theirs, ours = pair(name, 4, 5)
    _assert_refuses_alike(theirs, ours, case, call, (R(2, 4), states(name, 2, 5, dtype=torch.float32)))


@pytest.mark.parametrize("nonlinearity", ["sine", None, "RELU"])
def test_nonlinearity_of_a_cell(nonlinearity: str | None) -> None:
    theirs, ours = pair("RNNCell", 4, 5, nonlinearity=nonlinearity)
    assert error_of(ours, R(2, 4)) == error_of(theirs, R(2, 4))
    ours.nonlinearity = theirs.nonlinearity = "relu"
    assert_equal_modules(theirs, ours, R(2, 4))


def test_states_of_a_projected_bidirectional_stack() -> None:
    theirs, ours = pair("LSTM", 4, 5, 2, bidirectional=True, proj_size=3)
    for h, c in [((4, 2, 5), (4, 2, 5)), ((4, 2, 3), (4, 2, 3)), ((2, 2, 3), (4, 2, 5)), ((4, 2, 3), (2, 2, 5))]:
        hx = R(h), R(c)
        assert error_of(ours, R(3, 2, 4), hx) == error_of(theirs, R(3, 2, 4), hx)


@pytest.mark.parametrize(
    "info", [i for i in module_db if i.name in ("nn." + n for n in LAYERS + CELL_MODULES)], ids=lambda info: info.name
)
def test_torchs_own_error_inputs(info: Any) -> None:
    name = info.name.removeprefix("nn.")
    samples = info.module_error_inputs_func(
        info, device=torch.device("cpu"), dtype=torch.float32, requires_grad=False, training=True
    )
    for sample in samples:
        make, call = sample.module_error_input.constructor_input, sample.module_error_input.forward_input
        if sample.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(sample.error_type, match=sample.error_regex):
                getattr(rnnfast, name)(*make.args, **make.kwargs)
            continue
        module = getattr(rnnfast, name)(*make.args, **make.kwargs)
        with pytest.raises(sample.error_type, match=sample.error_regex):
            module(*call.args, **call.kwargs)


@pytest.mark.parametrize("name", LAYERS)
def test_states_of_another_batch_than_an_unsorted_packed_sequence(name: str) -> None:
    # torch.nn picks the first rows of states that are too many, without a word.
    module = getattr(rnnfast, name)(4, 5)
    with pytest.raises(RuntimeError, match=r"Expected hidden batch size 2, got \[1, 3, 5\]"):
        module(PACKED["unsorted"](3, 2, 4), states(name, 1, 3, 5, dtype=torch.float32))


@pytest.mark.parametrize("name", LAYERS)
def test_weights_that_do_not_fit(name: str) -> None:
    # torch.nn's texts come from whichever operator meets the weights first.
    for weight in (R(7, 5), R(5, 5), R(5), R(()), R(15, 5, 1)):
        module = getattr(rnnfast, name)(4, 5)
        if weight.shape == module.weight_hh_l0.shape:
            continue
        module.weight_hh_l0 = nn.Parameter(weight)
        with pytest.raises((RuntimeError, IndexError)):
            module(R(3, 2, 4))
    module = getattr(rnnfast, name)(4, 5)
    module.bias_hh_l0 = nn.Parameter(module.bias_hh_l0.detach().double())
    with pytest.raises(RuntimeError, match="must have the same dtype, but got Float and Double"):
        module(R(3, 2, 4))


# Our own arguments.

P = SimpleNamespace(packed=lambda: PACKED[""](3, 2, 4), x=lambda: R(3, 2, 4))
EXTENSIONS: dict[str, tuple[Callable[[], Any], dict[str, Any], type, str]] = {
    "lengths-packed": (P.packed, {"lengths": torch.tensor([3, 2])}, ValueError, "lengths cannot be given together"),
    "resets-packed": (P.packed, {"resets": torch.zeros(3, 2).bool()}, ValueError, "resets cannot be given together"),
    "lengths-above": (P.x, {"lengths": torch.tensor([4, 2])}, ValueError, r"within 0\.\.3.* got values in 2\.\.4"),
    "lengths-below": (P.x, {"lengths": torch.tensor([-1, 2])}, ValueError, r"within 0\.\.3.* got values in -1\.\.2"),
    "lengths-float": (P.x, {"lengths": torch.tensor([1.0, 2.0])}, ValueError, "integer tensor, got torch.float32"),
    "lengths-bool": (P.x, {"lengths": torch.tensor([True, False])}, ValueError, "integer tensor, got torch.bool"),
    "lengths-2D": (P.x, {"lengths": torch.tensor([[3, 2]])}, ValueError, r"shape \[2\], .* got \[1, 2\]"),
    "lengths-many": (P.x, {"lengths": torch.tensor([3, 2, 1])}, ValueError, r"shape \[2\], .* got \[3\]"),
    "lengths-scalar": (P.x, {"lengths": torch.tensor(2)}, ValueError, r"shape \[2\], .* got \[\]"),
    "lengths-list": (P.x, {"lengths": [3, 2]}, TypeError, "lengths must be a Tensor, got list"),
    "resets-int": (P.x, {"resets": torch.zeros(3, 2).long()}, ValueError, "bool tensor, got torch.int64"),
    "resets-transposed": (P.x, {"resets": torch.zeros(2, 3).bool()}, ValueError, r"shape \[3, 2\], .* got \[2, 3\]"),
    "resets-1D": (P.x, {"resets": torch.zeros(3).bool()}, ValueError, r"shape \[3, 2\], .* got \[3\]"),
    "resets-device": (P.x, {"resets": torch.zeros(3, 2, device="meta").bool()}, ValueError, "input's device cpu"),
    "positional": (P.x, {"hx": None, "length": torch.tensor([3, 2])}, TypeError, "unexpected keyword argument"),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("case", EXTENSIONS)
def test_extension(case: str, name: str) -> None:
    make, kwargs, error, text = EXTENSIONS[case]
    module, x = getattr(rnnfast, name)(4, 5, bidirectional=True), make()
    before = dict(flatten(module(x)))
    with pytest.raises(error, match=text):
        module(x, **kwargs)
    assert_same(dict(flatten(module(x))), before, rtol=0, atol=0)
    with pytest.raises(TypeError):
        module(x, None, torch.tensor([3, 2]))  # keyword-only


@pytest.mark.parametrize("name", LAYERS)
def test_extensions_of_batch_first_and_unbatched_input(name: str) -> None:
    module = getattr(rnnfast, name)(4, 5, batch_first=True)
    with pytest.raises(ValueError, match="resets must have shape"):
        module(R(2, 3, 4), resets=torch.zeros(3, 2).bool())
    with pytest.raises(ValueError, match="resets must have shape"):
        module(R(2, 3, 4), resets=torch.zeros(3).bool())
    with pytest.raises(ValueError, match=r"within 0\.\.3"):
        module(R(2, 3, 4), lengths=torch.tensor([4, 3]))
    with pytest.raises(ValueError, match=r"within 0\.\.3"):
        module(R(3, 4), lengths=torch.tensor(4))
    with pytest.raises(ValueError, match="resets must have shape"):
        module(R(3, 4), resets=torch.zeros(4).bool())


@pytest.mark.parametrize("name", LAYERS)
def test_no_steps_with_lengths_give_the_initial_states(name: str) -> None:
    module, hx = getattr(rnnfast, name)(4, 5, 2, bidirectional=True), states(name, 4, 2, 5, dtype=torch.float32)
    output, hidden = module(R(0, 2, 4), hx, lengths=torch.tensor([0, 0]))
    assert output.shape == (0, 2, 10)
    assert_same(dict(flatten(hidden)), dict(flatten(hx)), rtol=0, atol=0)


def test_use_backend() -> None:
    with pytest.raises(ValueError, match="unknown backend 'abacus', expected one of reference, torch, cpu"):
        rnnfast.use_backend("abacus").__enter__()
    for name, backend in rnnfast.backends().items():
        if not backend.available:
            with pytest.raises(RuntimeError, match=f"backend '{name}' is missing here: "):
                rnnfast.use_backend(name).__enter__()
    module, x = rnnfast.LSTM(4, 5), R(3, 2, 4)
    expected = module(x)[0]
    with pytest.raises(ZeroDivisionError), rnnfast.use_backend("reference"):
        raise ZeroDivisionError
    torch.testing.assert_close(module(x)[0], expected, rtol=0, atol=0)  # the choice ended with the context
    before = rnnfast.explain(module)[0].backend
    with rnnfast.use_backend("reference"):
        for name, backend in rnnfast.backends().items():
            if backend.available:
                with rnnfast.use_backend(name):
                    assert rnnfast.explain(module)[0].backend == name
            assert rnnfast.explain(module)[0].backend == "reference"
    assert rnnfast.explain(module)[0].backend == before


def test_use_backend_is_of_a_thread() -> None:
    module, found = rnnfast.LSTM(4, 5), []
    chosen = lambda: rnnfast.explain(module)[0].backend
    usual, entered, leave = chosen(), threading.Event(), threading.Event()

    def within() -> None:
        found.append(chosen())
        with rnnfast.use_backend("torch"):
            entered.set()
            leave.wait(HANG)
            found.append(chosen())

    thread = threading.Thread(target=within, daemon=True)
    with rnnfast.use_backend("reference"):
        thread.start()
        assert entered.wait(HANG)
        assert chosen() == "reference"
    assert chosen() == usual
    leave.set()
    thread.join(HANG)
    assert found == [usual, "torch"]


def test_use_backend_is_of_a_task() -> None:
    module = rnnfast.LSTM(4, 5)

    async def chosen() -> str:
        return rnnfast.explain(module)[0].backend

    async def within(name: str) -> tuple[str, str]:
        with rnnfast.use_backend(name):
            await asyncio.sleep(0)  # now the other task is within, too
            return await chosen(), await asyncio.create_task(chosen())

    async def both() -> None:
        usual = await chosen()
        found = await asyncio.gather(*map(within, ("reference", "torch")))
        assert found == [("reference", "reference"), ("torch", "torch")]
        assert await chosen() == usual

    asyncio.run(both())


@pytest.mark.parametrize("name", LAYERS + CELL_MODULES)
def test_a_backend_refuses_what_it_cannot_serve(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = getattr(rnnfast, name)(4, 5, dtype=torch.complex64)
    x = R(*((3, 2, 4) if name in LAYERS else (2, 4)), dtype=torch.complex64)
    # Where the library is not built the refusal is the same: it is decided before any kernel.
    there = chooser.BACKENDS["cpu"]._replace(probe=lambda device: chooser.Availability(True, "C++"))
    monkeypatch.setitem(chooser.BACKENDS, "cpu", there)
    expected = dict(flatten(module(x)))  # on the reference
    with rnnfast.use_backend("cpu"), pytest.raises(RuntimeError, match=r"'cpu' cannot serve this call: .*complex64"):
        module(x)
    assert_same(dict(flatten(module(x))), expected, rtol=0, atol=0)


# Between forward and backward.


IN_PLACE = "one of the variables needed for gradient computation has been modified by an inplace operation"


def _change_before_backward(module: nn.Module, changed: str, inputs: tuple) -> Callable[[], dict[str, torch.Tensor]]:
    """The forward, the change of one tensor in place, and a call that runs the backward."""
    x, hx = leaves(inputs)
    used_x, used_hx = x * 1, tuple(h * 1 for h in hx) if isinstance(hx, tuple) else hx * 1
    output = module(used_x, used_hx)
    loss = sum((t * 1).square().sum() for _, t in flatten(output))
    changes = {"input": used_x, "hx": used_hx, "output": output, "w_ih": None, "w_hh": None, "nothing": torch.zeros(1)}
    target = changes[changed] if changes[changed] is not None else list(module.parameters())[changed == "w_hh"]
    with torch.no_grad():
        next(flatten(target))[1].add_(1)
    asked = {"x": x, **dict(flatten(hx, "hx")), **dict(module.named_parameters())}
    return lambda: dict(zip(asked, torch.autograd.grad(loss, list(asked.values()))))


@pytest.mark.few(2, "backend", "name", "changed")
@pytest.mark.runs(DOUBLE)
@pytest.mark.parametrize("name", LAYERS + CELL_MODULES)
@pytest.mark.parametrize("changed", ["input", "hx", "w_ih", "w_hh", "output"])
def test_change_in_place_before_backward(name: str, changed: str, backend: str) -> None:
    shape, h_shape = ((3, 2, 4), (1, 2, 5)) if name in LAYERS else ((2, 4), (2, 5))
    inputs = R(shape, dtype=DOUBLE), states(name, *h_shape)
    theirs, ours = pair(name, 4, 5, dtype=DOUBLE)
    backward = _change_before_backward(ours, changed, inputs)
    if changed == "output" and name in CELL_MODULES:  # the backward does not need it, so it may change
        assert_same(backward(), _change_before_backward(theirs, "nothing", inputs)())
        return
    error, text = error_of(backward)
    assert error is RuntimeError
    assert IN_PLACE in text
    if changed != "output":  # of torch.nn's layers some keep their output for backward, some a copy
        assert error_of(_change_before_backward(theirs, changed, inputs))[0] is RuntimeError


@pytest.mark.few(1, "backend", "name")
@pytest.mark.runs(torch.float32, 2, 5)
@pytest.mark.parametrize("name", LAYERS + CELL_MODULES)
def test_second_backward_through_a_freed_graph(name: str, backend: str) -> None:
    x = R(3, 2, 4) if name in LAYERS else R(2, 4)
    texts = []
    for module in pair(name, 4, 5):
        loss = sum(t.sum() for _, t in flatten(module(x)))
        loss.backward()
        texts.append(error_of(loss.backward))
    assert texts[0] == texts[1]


# NaN and infinity.


@pytest.mark.few(3, "backend", "name", "value", "where")
@pytest.mark.runs(DOUBLE)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30], ids=str)
@pytest.mark.parametrize("name", [*LAYERS, *CELL_MODULES, "relu"])
@pytest.mark.parametrize("where", ["input", "hx", "cx", "weight"])
def test_not_finite(name: str, value: float, where: str, backend: str) -> None:
    kwargs = {"nonlinearity": "relu"} if name == "relu" else {}
    name = "RNN" if name == "relu" else name
    layer = name in LAYERS
    for dtype in (torch.float32, DOUBLE):
        theirs, ours = pair(name, 4, 5, **kwargs, dtype=dtype)
        x = R(*((4, 2, 4) if layer else (2, 4)), dtype=dtype)
        hx = states(name, *((1, 2, 5) if layer else (2, 5)), dtype=dtype)
        target = {"input": x, "hx": next(flatten(hx))[1], "cx": list(flatten(hx))[-1][1]}.get(where)
        for module in (theirs, ours) if target is None else (None,):
            t = target if module is None else next(module.parameters()).data
            t[(1, 0) if t.dim() == 2 else (-1, 1, 2) if where != "input" else (1, 0, 2)] = value
        with torch.no_grad():
            expected = dict(flatten(theirs(x, hx)))
            finite = torch.cat([t[t.isfinite()].abs() for t in expected.values()] + [torch.ones(1, dtype=dtype)])
            rounding = 4 * torch.finfo(dtype).eps * finite.max().item()  # of sums of what is large
            assert_same(dict(flatten(ours(x, hx))), expected, atol=rounding)
        if where == "input" and value != value:
            assert any(t.isnan().any() for t in expected.values())


@pytest.mark.runs(DOUBLE)
@pytest.mark.parametrize("name", ["relu", *LAYERS])
def test_gradients_of_a_row_with_nan(name: str, backend: str) -> None:
    """NaN where torch has it: relu lets a gradient through at NaN, so those of the biases are numbers."""
    kwargs = {"nonlinearity": "relu"} if name == "relu" else {}
    theirs, ours = pair("RNN" if name == "relu" else name, 4, 5, **kwargs, dtype=DOUBLE)
    x = R(1, 3, 4, dtype=DOUBLE)
    x[0, 1, 2] = float("nan")
    expected = values_and_grads(theirs, x)
    assert_same(values_and_grads(ours, x), expected)
    assert expected["output[0]"][0, 1].isnan().all()


@pytest.mark.few(2, "backend", "name", "value", "where")
@pytest.mark.runs(torch.float32, 20, 200)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.4e38], ids=str)
@pytest.mark.parametrize("name", [*LAYERS, "relu"])
@pytest.mark.parametrize("where", ["input", "hx"])
def test_not_finite_in_a_wide_layer(name: str, value: float, where: str, backend: str) -> None:
    """Where kernels may add up products of the parts of floats, one value that has none spoils only its own row."""
    kwargs = {"nonlinearity": "relu"} if name == "relu" else {}
    name = "RNN" if name == "relu" else name
    theirs, ours = pair(name, 200, 200, **kwargs)
    x, hx = R(3, 20, 200, dtype=torch.float32), states(name, 1, 20, 200, dtype=torch.float32)
    target = x if where == "input" else next(flatten(hx))[1]
    target[0, 7, 5] = value
    with torch.no_grad():
        expected, actual = dict(flatten(theirs(x, hx))), dict(flatten(ours(x, hx)))
    for path, e in expected.items():
        # Of relu and 3.4e38 a row's elements are sums of 200 terms of that size, some of which nearly cancel.
        torch.testing.assert_close(actual[path], e, rtol=1e-4, atol=1e-4, equal_nan=True, msg=path)
        assert e[:, [*range(7), *range(8, 20)]].isfinite().all()
