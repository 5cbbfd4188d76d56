"""Nested tensors and rows with cu_seqlens: against each sequence alone, in every layout; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import LAYERS, states, tensors_of
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import rnnfast
from rnnfast import jagged

DOUBLE = torch.float64
I, H, SIZES = 3, 5, (3, 0, 5, 1)
BOUNDS = torch.tensor([0, 3, 3, 8, 9])
OPTIONS = {"one": {}, "stack": {"num_layers": 2, "bidirectional": True}, "batch-first": {"batch_first": True}}


def make(name: str, options: str = "stack") -> nn.Module:
    return getattr(rnnfast, name)(I, H, dtype=DOUBLE, **OPTIONS[options])


def rows(size: int = 9) -> Tensor:
    return torch.randn(size, I, dtype=DOUBLE, requires_grad=True)


def one_by_one(module: nn.Module, x: Tensor, hx: Any, resets: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Of each sequence by itself the output and every step's states, joined, and the final states."""
    at_steps, finals = [], []
    for n, (begin, end) in enumerate(zip(BOUNDS, BOUNDS[1:])):
        own = [h[:, n] for h in tensors_of([hx])]
        if begin == end:
            finals.append(own)
            continue
        given = tuple(own) if isinstance(hx, tuple) else own[0]
        y, final, every = module(x[begin:end], given, resets=resets[begin:end], return_states=True)
        finals.append(tensors_of([final]))
        at_steps.append([y, *tensors_of([every])])
    joined = [torch.cat(of, 0 if k == 0 else 1) for k, of in enumerate(zip(*at_steps))]
    return joined, [torch.stack(of, 1) for of in zip(*finals)]


@pytest.mark.few(2, "backend", "name", "options", "form")
@pytest.mark.runs(DOUBLE, len(SIZES), H, True)
@pytest.mark.parametrize("form", ["cu_seqlens", "max_seqlen", "nested"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_as_each_sequence_alone(backend: str, name: str, options: str, form: str) -> None:
    """Output, final states, those of every step, and all gradients."""
    module, x, resets = make(name, options), rows(), torch.rand(9) < 0.3
    hx = states(name, module.num_layers * (1 + module.bidirectional), len(SIZES), H)
    if form == "nested":
        nested = torch.nested.nested_tensor_from_jagged(x, BOUNDS)
        y, final, every = module(nested, hx, resets=resets, return_states=True)
        assert y.layout is torch.jagged and y.shape[:2] == nested.shape[:2]  # and so can be added to it
        y = y.values()
    else:
        more = {"max_seqlen": 7} if form == "max_seqlen" else {}
        y, final, every = module(x, hx, cu_seqlens=BOUNDS.int(), resets=resets, return_states=True, **more)
    found = [y, *tensors_of([every])], tensors_of([final])
    expected = one_by_one(module, x, hx, resets)
    wanted = [x, *module.parameters()]
    for of in zip(found, expected):
        torch.testing.assert_close(*of)
    grads = [
        torch.autograd.grad(sum(t.square().sum() for of in part for t in of), wanted) for part in (found, expected)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("cell", [rnnfast.cells.slstm, rnnfast.cells.gru], ids=str)
def test_layers_of_any_cell(cell: Any) -> None:
    module = rnnfast.FlexRNN(cell, I, H, num_layers=2, bidirectional=True, dtype=DOUBLE)
    x, resets = rows(), torch.rand(9) < 0.3
    hx = tuple(torch.rand(4, len(SIZES), H, dtype=DOUBLE) for _ in cell.states)
    joined, finals = one_by_one(module, x, hx, resets)
    for form in ({"cu_seqlens": BOUNDS}, {"cu_seqlens": BOUNDS, "max_seqlen": 6}, {}):
        nested = torch.nested.nested_tensor_from_jagged(x, BOUNDS)
        y, final, every = module(x if form else nested, hx, resets=resets, return_states=True, **form)
        torch.testing.assert_close([y if form else y.values(), *every], joined)
        torch.testing.assert_close(list(final), finals)


def test_nested_leaves_get_gradients() -> None:
    module = make("LSTM")
    nested = torch.nested.nested_tensor([rows(4), rows(2)], layout=torch.jagged).detach().requires_grad_()
    module(nested)[0].values().square().sum().backward()
    for sequence, of in zip(nested.detach().unbind(), nested.grad.unbind()):
        alone = sequence.clone().requires_grad_()
        torch.testing.assert_close(of, torch.autograd.grad(module(alone)[0].square().sum(), alone)[0])


def test_nested_with_holes() -> None:
    """Sequences that leave out rows of the memory which they share."""
    module, x = make("GRU"), rows()
    y, _ = module(torch.nested.nested_tensor_from_jagged(x, BOUNDS, lengths=torch.tensor([2, 0, 4, 1])))
    for of, expected in zip(y.unbind()[::2], (x[:2], x[3:7])):
        torch.testing.assert_close(of, module(expected)[0])


def test_gradients_of_nested_with_holes() -> None:
    """Those of the rows left out are zero."""
    module, found = make("GRU"), []
    padded = torch.randn(3, 6, I, dtype=DOUBLE, requires_grad=True)
    begins, lengths = torch.tensor([0, 1, 2]), torch.tensor([3, 2, 4])
    y, _ = module(torch.nested.narrow(padded, 1, begins, lengths, layout=torch.jagged))
    own = [row[begin : begin + length] for row, begin, length in zip(padded, begins, lengths)]
    for values in (y.values(), torch.cat([module(sequence)[0] for sequence in own])):
        found.append((values.detach(), *torch.autograd.grad(values.square().sum(), padded)))
    torch.testing.assert_close(*found)


def test_a_forward_of_the_users_own_runs_once() -> None:
    class Scaled(rnnfast.LSTM):
        def forward(self, input: Any, hx: Any = None, **more: Any) -> Any:
            return super().forward(2 * input, hx, **more)

    module, usual, x = Scaled(I, H, dtype=DOUBLE), make("LSTM", "one"), rows()
    usual.load_state_dict(module.state_dict())
    expected, _ = usual(2 * x, cu_seqlens=BOUNDS)
    torch.testing.assert_close(module(x, cu_seqlens=BOUNDS)[0], expected)
    torch.testing.assert_close(module(torch.nested.nested_tensor_from_jagged(x, BOUNDS))[0].values(), expected)


@pytest.mark.runs(DOUBLE, 2, H, True)
@pytest.mark.parametrize("count", [0, 2])
def test_nothing_but_empty_sequences(backend: str, count: int) -> None:
    module, x = make("LSTM"), rows(0)
    hx = states("LSTM", 4, count, H)
    for more in ({}, {"max_seqlen": 4}):
        y, final = module(x, hx, cu_seqlens=torch.zeros(count + 1, dtype=torch.long), **more)
        assert y.shape == (0, 2 * H) and all(map(torch.equal, final, hx))
        assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_weights_are_dropped_once() -> None:
    """In a call the same for all sequences, and by the same draws as with lengths."""
    module = rnnfast.GRU(I, H, weight_dropout=0.5, dtype=DOUBLE)
    x, found = rows(8), []
    for call in (lambda: module(x, cu_seqlens=torch.tensor([0, 8])), lambda: module(x)):
        torch.manual_seed(0)
        found.append(call()[0])
    torch.testing.assert_close(*found)


def _changed(**changes: Any) -> dict[str, Any]:
    return {"input": rows().detach(), "cu_seqlens": BOUNDS} | changes


OF_MEMORY = {"cu_seqlens": None, "input": torch.nested.nested_tensor([torch.zeros(2, I)], layout=torch.strided)}
NESTED = torch.nested.nested_tensor([torch.zeros(2, I), torch.zeros(1, I)], layout=torch.jagged, dtype=DOUBLE)
WRONG = {
    "decreasing": ({"cu_seqlens": torch.tensor([0, 4, 3, 9])}, ValueError, "must not decrease, from 0 to the 9 rows"),
    "beginning": ({"cu_seqlens": torch.tensor([1, 9])}, ValueError, "must not decrease, from 0 to the 9 rows"),
    "end": ({"cu_seqlens": torch.tensor([0, 8])}, ValueError, "must not decrease, from 0 to the 9 rows"),
    "end beyond": ({"cu_seqlens": torch.tensor([0, 10])}, ValueError, "must not decrease, from 0 to the 9 rows"),
    "no sequence": ({"cu_seqlens": torch.tensor([0])}, ValueError, "must not decrease, from 0 to the 9 rows"),
    "empty": ({"cu_seqlens": BOUNDS[:0]}, ValueError, r"must have shape \[N \+ 1\], of N sequences, got \[0\]"),
    "deep": ({"cu_seqlens": BOUNDS[None]}, ValueError, r"must have shape \[N \+ 1\], of N sequences, got \[1, 5\]"),
    "dtype": ({"cu_seqlens": BOUNDS.double()}, ValueError, "must be int32 or int64, got torch.float64"),
    "device": ({"cu_seqlens": BOUNDS.to("meta")}, ValueError, "must be on the input's device cpu, got meta"),
    "list": ({"cu_seqlens": [0, 9]}, TypeError, "cu_seqlens must be a Tensor, got list"),
    "alone": ({"cu_seqlens": None, "max_seqlen": 5}, TypeError, "cu_seqlens must be a Tensor, got NoneType"),
    "short": ({"max_seqlen": 4}, ValueError, "max_seqlen=4 is less than 5, the longest of cu_seqlens"),
    "negative": ({"max_seqlen": -1}, ValueError, "max_seqlen must not be negative, got -1"),
    "float": ({"max_seqlen": 5.0}, TypeError, "max_seqlen must be an int, got float"),
    "padded": ({"input": torch.zeros(3, 3, I)}, ValueError, r"must have shape \[rows, features\], got \[3, 3, 3\]"),
    "lengths": ({"lengths": torch.tensor(SIZES)}, ValueError, "cannot be given together with lengths"),
    "packed": ({"input": pack_sequence([torch.zeros(2, I)])}, ValueError, "together with lengths or a PackedSequence"),
    "nested": ({"input": NESTED}, ValueError, "a nested input knows its lengths"),
    "strided": (OF_MEMORY, ValueError, "must be of the layout torch.jagged"),
    "ragged features": (
        {"cu_seqlens": None, "input": NESTED.transpose(1, 2)},
        ValueError,
        "of the layout torch.jagged",
    ),
    "resets": ({"resets": torch.zeros(8, dtype=torch.bool)}, ValueError, r"resets must have shape \[9\], one a row"),
}


@pytest.mark.parametrize("case", WRONG)
def test_refuses(case: str) -> None:
    changes, kind, why = WRONG[case]
    with pytest.raises(kind, match=why):
        make("LSTM")(**_changed(**changes))


def test_what_a_device_would_be_asked_for_is_clamped(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU with max_seqlen nobody looks at the values: whatever they are, no row is read that there is not."""
    monkeypatch.setattr(Tensor, "is_cpu", property(lambda self: False))
    clamped = torch.ops.rnnfast.checked_cu_seqlens(torch.tensor([5, -9, 3, 10**12]), 9, 5)
    monkeypatch.undo()
    assert clamped.tolist() == [5, 5, 5, 9]
    places = jagged._places(torch.tensor([0, 3, 9]), 9, 6)
    assert places.of_padded.max() < 9 and places.of_rows.max() < 2 * 6
    with pytest.raises(ValueError, match="max_seqlen=4 is"):
        jagged._places(torch.tensor([0, 3, 9]), 9, 4)


# Compiled


def counting(graphs: list) -> Any:
    return lambda graph, inputs: graphs.append(graph) or graph


@pytest.mark.parametrize("name", LAYERS)
def test_lengths_are_compiled_once(name: str) -> None:
    """For all T and N, with dimensions that are marked, or whatever they are."""
    module = make(name)
    for dynamic in (True, None):
        graphs: list = []
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda x, lengths: module(x, lengths=lengths), backend=counting(graphs), fullgraph=True, dynamic=dynamic
        )
        for steps, count in ((6, 8), (11, 8), (7, 9), (12, 2)):
            x, lengths = torch.randn(steps, count, I, dtype=DOUBLE), torch.randint(0, steps + 1, (count,))
            if dynamic is None:
                torch._dynamo.mark_dynamic(x, (0, 1))
                torch._dynamo.mark_dynamic(lengths, 0)
            torch.testing.assert_close(compiled(x, lengths), module(x, lengths=lengths))
        assert len(graphs) == 1


def test_cu_seqlens_are_compiled_once() -> None:
    module, graphs = make("LSTM"), []
    compiled = torch.compile(
        lambda x, bounds: module(x, cu_seqlens=bounds, max_seqlen=12)[0],
        backend=counting(graphs), fullgraph=True, dynamic=True,
    )  # fmt: skip
    for size, bounds in ((9, BOUNDS), (13, torch.tensor([0, 6, 13]))):
        x = rows(size).detach()
        torch.testing.assert_close(compiled(x, bounds), module(x, cu_seqlens=bounds)[0])
    assert len(graphs) == 1


def test_explain() -> None:
    (choice,) = rnnfast.explain(make("LSTM"), NESTED)
    assert choice.backend in ("cpu", "torch", "reference")
    assert rnnfast.explain(make("LSTM", "batch-first"), rows().detach(), cu_seqlens=BOUNDS)[0].backend == choice.backend
