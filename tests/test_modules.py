"""What a module is beside its maths: construction, parameters, and everything torch can do to an ``nn.Module``."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from helpers import (
    CELL_MODULES,
    LAYERS,
    assert_equal_modules,
    assert_same,
    error_of,
    flatten,
    leaves,
    pair,
    states,
    tensors_of,
    train,
    values_and_grads,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast

DOUBLE = torch.float64
CONFIGS = {
    "RNN": ("RNN", (4, 5), {}),
    "RNN-positional": ("RNN", (4, 5, 2, "relu", False, True, 0.25, True), {}),
    "RNN-relu": ("RNN", (1, 1), {"nonlinearity": "relu", "dropout": 0, "dtype": DOUBLE}),
    "LSTM": ("LSTM", (4, 5), {}),
    "LSTM-positional": ("LSTM", (4, 5, 3, False, True, 0.25, True, 2), {}),
    "LSTM-projected": ("LSTM", (4, 5), {"num_layers": 2, "proj_size": 3, "device": "cpu", "dtype": DOUBLE}),
    "GRU": ("GRU", (4, 5), {}),
    "GRU-positional": ("GRU", (4, 5, 2, False, True, 1, True), {}),
    "GRU-keywords": ("GRU", (), {"input_size": 7, "hidden_size": 3, "num_layers": 2, "bidirectional": True}),
    "RNNCell": ("RNNCell", (4, 5), {}),
    "RNNCell-positional": ("RNNCell", (4, 5, False, "relu"), {}),
    "RNNCell-unknown": ("RNNCell", (4, 5), {"nonlinearity": "sine"}),  # refused in forward only
    "LSTMCell": ("LSTMCell", (4, 5), {}),
    "LSTMCell-no-bias": ("LSTMCell", (4, 5, False), {"dtype": DOUBLE}),
    "GRUCell": ("GRUCell", (4, 5), {}),
    "GRUCell-no-bias": ("GRUCell", (4, 5), {"bias": False, "device": "cpu"}),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_construction(config: str) -> None:
    name, args, kwargs = CONFIGS[config]
    torch.manual_seed(3)
    theirs = getattr(nn, name)(*args, **kwargs)
    torch.manual_seed(3)
    ours = getattr(rnnfast, name)(*args, **kwargs)
    assert_same(dict(ours.named_parameters()), dict(theirs.named_parameters()), rtol=0, atol=0)
    assert repr(ours) == repr(theirs)
    assert type(ours).__constants__ == type(theirs).__constants__
    public = lambda module: {key: value for key, value in vars(module).items() if not key.startswith("_")}
    assert public(ours) == public(theirs)
    assert list(ours._parameters) == list(theirs._parameters)  # with bias_ih and bias_hh registered as None
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    torch.manual_seed(4)
    theirs.reset_parameters()
    torch.manual_seed(4)
    ours.reset_parameters()
    assert_same(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    if isinstance(theirs, nn.RNNBase):
        assert isinstance(ours, nn.RNNBase)
        assert ours._flat_weights_names == theirs._flat_weights_names
        assert ours._all_weights == theirs._all_weights
        assert all(a is getattr(ours, n) for a, n in zip(ours._flat_weights, ours._flat_weights_names))
        assert [list(map(id, ws)) for ws in ours.all_weights] == [
            [id(getattr(ours, n)) for n in names] for names in theirs._all_weights
        ]
    else:
        assert isinstance(ours, nn.RNNCellBase)


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_with_one_layer_warns(name: str) -> None:
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last") as theirs:
        getattr(nn, name)(4, 5, dropout=0.5)
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last") as ours:
        getattr(rnnfast, name)(4, 5, dropout=0.5)
    assert str(ours[0].message) == str(theirs[0].message)


@pytest.mark.parametrize("name", LAYERS)
def test_module_interface(name: str) -> None:
    projection = {"proj_size": 2} if name == "LSTM" else {}
    theirs, ours = pair(name, 4, 5, num_layers=2, bidirectional=True, batch_first=True, **projection)
    x, sizes, width = torch.randn(3, 7, 4), torch.tensor([2, 1]), projection.get("proj_size", 5)
    h = states(name, 4, 3, width, c=(4, 3, 5), dtype=x.dtype)
    flip = torch.tensor([2, 0, 1])
    for module in (theirs, ours):
        module.flatten_parameters()
        module.check_input(x, None)
        module.check_forward_args(x, h, None)
        module.check_hidden_size(torch.zeros(4, 3, width), (4, 3, width))
        assert module.get_expected_hidden_size(x, None) == (4, 3, width)
        assert module.get_expected_hidden_size(x[0], sizes) == (4, 2, width)
        if name == "LSTM":
            assert module.get_expected_cell_size(x, None) == (4, 3, 5)
    assert_same(
        dict(flatten(ours.permute_hidden(h, flip))), dict(flatten(theirs.permute_hidden(h, flip))), rtol=0, atol=0
    )
    assert error_of(ours.check_hidden_size, torch.zeros(1, 3, 5), (4, 3, 5), "{} for {}") == error_of(
        theirs.check_hidden_size, torch.zeros(1, 3, 5), (4, 3, 5), "{} for {}"
    )


# Everything that torch does to a module: each treatment is applied to torch.nn's module and to ours, which then
# compute the same and train the same.


class _Scaled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 1.5

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


class _Functional(nn.Module):
    """A module called with weights of a caller's own making."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any) -> Any:
        weights = {name: p.sin() for name, p in self.module.named_parameters()}
        return torch.func.functional_call(self.module, weights, inputs)


class _Replicated(_Functional):
    """What DataParallel makes of a module: a replica whose weights are no parameters."""

    def forward(self, *inputs: Any) -> Any:
        replica = self.module._replicate_for_data_parallel()
        for name, p in self.module._parameters.items():
            setattr(replica, name, None if p is None else p.clone())
        return replica(*inputs)


def _weight(module: nn.Module) -> str:
    return "weight_hh_l0" if isinstance(module, nn.RNNBase) else "weight_hh"


def _assign(module: nn.Module) -> nn.Module:
    setattr(module, _weight(module), nn.Parameter(getattr(module, _weight(module)).detach() / 2))
    return module


def _through_file(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _from_meta(module: nn.Module) -> nn.Module:
    empty = copy.deepcopy(module).to("meta").to_empty(device="cpu")
    empty.load_state_dict(module.state_dict())
    return empty


def _load_by_assigning(module: nn.Module) -> nn.Module:
    module.load_state_dict({name: p.detach() / 2 for name, p in module.named_parameters()}, assign=True)
    return module


def _from_old_pickle(module: nn.Module) -> nn.Module:
    """The state that versions of torch before projections and names in ``all_weights`` wrote."""
    state = dict(module.__dict__)
    if isinstance(module, nn.RNNBase):
        for key in ("proj_size", "_flat_weights", "_flat_weights_names", "_all_weights", "_flat_weight_refs"):
            del state[key]
        state["all_weights"] = module.all_weights
    restored = type(module).__new__(type(module))
    restored.__setstate__(state)
    return restored


def _from_pickle_before_projections(module: nn.Module) -> nn.Module:
    state = pickle.loads(pickle.dumps(module)).__dict__
    state.pop("proj_size", None)
    restored = type(module).__new__(type(module))
    restored.__setstate__(state)
    return restored


def _parametrize(module: nn.Module) -> nn.Module:
    parametrize.register_parametrization(module, _weight(module), _Scaled())
    return module


def _unparametrize(module: nn.Module) -> nn.Module:
    parametrize.remove_parametrizations(_parametrize(module), _weight(module))
    return module


def _prune(module: nn.Module) -> nn.Module:
    return prune.l1_unstructured(module, _weight(module), amount=0.3)


def _prune_for_good(module: nn.Module) -> nn.Module:
    return prune.remove(_prune(module), _weight(module))


def _old_weight_norm(module: nn.Module) -> nn.Module:
    return nn.utils.weight_norm(module, _weight(module))


def _orthogonal(module: nn.Module) -> nn.Module:
    torch.manual_seed(2)  # it draws what completes a weight that is not square
    return nn.utils.parametrizations.orthogonal(module, _weight(module))


def _tie(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.RNNBase):
        module.weight_ih_l0_reverse = module.weight_ih_l0
        module.weight_hh_l1_reverse = module.weight_hh_l1
    module.bias_ih_l0 = module.bias_hh_l0 if isinstance(module, nn.RNNBase) else None
    return module


def _freeze(module: nn.Module) -> nn.Module:
    getattr(module, _weight(module)).requires_grad_(False)
    return module


TREATMENTS = {
    "none": lambda module: module,
    "assign": _assign,
    "cast": lambda module: module.float().to(torch.bfloat16).to(DOUBLE),
    "half": lambda module: module.half().double(),
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "old-pickle": _from_old_pickle,
    "pickle-before-projections": _from_pickle_before_projections,
    "torch-save": _through_file,
    "deepcopy": copy.deepcopy,
    "to-empty": _from_meta,
    "load-assign": _load_by_assigning,
    "share-memory": lambda module: module.share_memory(),
    "functional-call": _Functional,
    "data-parallel": _Replicated,
    "parametrize": _parametrize,
    "parametrize-deepcopy": lambda module: copy.deepcopy(_parametrize(module)),
    "unparametrize": _unparametrize,
    "old-weight-norm": _old_weight_norm,
    "weight-norm": lambda module: nn.utils.parametrizations.weight_norm(module, _weight(module)),
    "orthogonal": _orthogonal,
    "prune": _prune,
    "prune-for-good": _prune_for_good,
    "tied": _tie,
    "frozen": _freeze,
    "flatten": lambda module: (getattr(module, "flatten_parameters", lambda: None)(), module)[1],
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("name", LAYERS + CELL_MODULES)
@pytest.mark.parametrize("treatment", TREATMENTS)
def test_treated_module_computes_and_trains_as_torchs(treatment: str, name: str) -> None:
    layer = name in LAYERS
    kwargs = {"num_layers": 2, "bidirectional": True} if layer else {}
    theirs, ours = map(TREATMENTS[treatment], pair(name, 4, 5, **kwargs, dtype=DOUBLE))
    assert [key for key, _ in ours.named_parameters()] == [key for key, _ in theirs.named_parameters()]
    if isinstance(ours, nn.RNNBase):
        assert_same(dict(flatten(ours._flat_weights)), dict(flatten(theirs._flat_weights)))
        assert [w is getattr(ours, n) for w, n in zip(ours._flat_weights, ours._flat_weights_names)] == [
            w is getattr(theirs, n) for w, n in zip(theirs._flat_weights, theirs._flat_weights_names)
        ]
    x = torch.randn(6, 3, 4, dtype=DOUBLE) if layer else torch.randn(3, 4, dtype=DOUBLE)
    hx = states(name, 4, 3, 5) if layer else states(name, 3, 5)
    assert_equal_modules(theirs, ours, x, hx)
    assert train(ours, x, hx) == pytest.approx(train(theirs, x, hx), rel=1e-11)
    assert_same(ours.state_dict(), theirs.state_dict())
    theirs.eval()
    ours.eval()
    assert_equal_modules(theirs, ours, x)


@pytest.mark.parametrize("name", LAYERS + CELL_MODULES)
def test_parametrization_is_computed_once_a_forward(name: str) -> None:
    # torch.nn's layers read a weight several times, so a random or an iterated parametrization moves on each time.
    class Counted(nn.Module):
        calls = 0

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return weight

    module, counted = getattr(rnnfast, name)(4, 5), Counted()
    parametrize.register_parametrization(module, _weight(module), counted)
    counted.calls = 0
    module(torch.randn(3, 2, 4) if name in LAYERS else torch.randn(2, 4))
    assert counted.calls == 1


@pytest.mark.parametrize("name", LAYERS + CELL_MODULES)
def test_functional_call_in_another_dtype(name: str) -> None:
    theirs, ours = pair(name, 4, 5)
    x = torch.randn(3, 2, 4) if name in LAYERS else torch.randn(2, 4)
    for module in (theirs, ours, ours):
        doubles = {key: p.double() for key, p in module.named_parameters()}
        output = torch.func.functional_call(module, doubles, x.double())
        assert {t.dtype for _, t in flatten(output)} == {DOUBLE}
        assert {t.dtype for _, t in flatten(module(x))} == {torch.float32}  # and it is itself again


@pytest.mark.parametrize("name", LAYERS + CELL_MODULES)
def test_meta(name: str) -> None:
    layer = name in LAYERS
    kwargs = {"num_layers": 2, "bidirectional": True} if layer else {}
    x = torch.empty(7, 3, 4, device="meta") if layer else torch.empty(3, 4, device="meta")
    outputs = [getattr(library, name)(4, 5, **kwargs, device="meta")(x) for library in (rnnfast, nn)]
    actual, expected = ([(path, t.shape, t.device, t.dtype) for path, t in flatten(o)] for o in outputs)
    assert actual == expected


# Forward of the layers.

FORWARDS = {
    "plain": ({}, (7, 3, 4), (1, 3, 5)),
    "unbatched": ({}, (7, 4), (1, 5)),
    "unbatched-batch-first": ({"batch_first": True, "num_layers": 2}, (7, 4), (2, 5)),
    "batch-first": ({"batch_first": True, "num_layers": 2}, (3, 7, 4), (2, 3, 5)),
    "bidirectional": ({"bidirectional": True, "num_layers": 3}, (7, 3, 4), (6, 3, 5)),
    "no-bias": ({"bias": False, "bidirectional": True}, (7, 3, 4), (2, 3, 5)),
    "one-step": ({"num_layers": 2}, (1, 3, 4), (2, 3, 5)),
    "one-row": ({"bidirectional": True}, (7, 1, 4), (2, 1, 5)),
    "empty-batch": ({"bidirectional": True, "num_layers": 2}, (7, 0, 4), (4, 0, 5)),
    "dropout": ({"dropout": 0.4, "num_layers": 3}, (7, 3, 4), (3, 3, 5)),
    "dropout-bidirectional": ({"dropout": 0.4, "num_layers": 3, "bidirectional": True}, (7, 3, 4), (6, 3, 5)),
    "dropout-batch-first": ({"dropout": 0.4, "num_layers": 2, "batch_first": True}, (3, 7, 4), (2, 3, 5)),
    "dropout-unbatched": ({"dropout": 0.4, "num_layers": 2}, (7, 4), (2, 5)),
    "dropout-of-all": ({"dropout": 1, "num_layers": 2}, (7, 3, 4), (2, 3, 5)),
}


@pytest.mark.few(2, "backend", "name", "form")
@pytest.mark.runs(DOUBLE)
@pytest.mark.parametrize("form", [*FORWARDS, "plain-eval", "dropout-bidirectional-eval"])
@pytest.mark.parametrize("name", [*LAYERS, "relu", "projected"])
def test_forward(name: str, form: str, backend: str) -> None:
    training, form = not form.endswith("-eval"), form.removesuffix("-eval")
    kwargs, shape, h_shape = FORWARDS[form]
    cls, extra = {"relu": ("RNN", {"nonlinearity": "relu"}), "projected": ("LSTM", {"proj_size": 2})}.get(
        name, (name, {})
    )
    theirs, ours = (m.train(training) for m in pair(cls, 4, 5, **kwargs, **extra, dtype=DOUBLE))
    x = torch.randn(shape, dtype=DOUBLE)
    hx = states(cls, *h_shape[:-1], extra.get("proj_size", 5), c=h_shape)
    assert_equal_modules(theirs, ours, x)
    assert_equal_modules(theirs, ours, x, hx)
    with torch.no_grad():
        torch.manual_seed(1)
        expected = dict(flatten(theirs(x, hx)))
        torch.manual_seed(1)
        assert_same(dict(flatten(ours(x, hx))), expected)


@pytest.mark.runs(DOUBLE)
@pytest.mark.parametrize("name", LAYERS)
def test_strides(name: str, backend: str) -> None:
    theirs, ours = pair(name, 4, 5, num_layers=2, bidirectional=True, dtype=DOUBLE)
    transposed = torch.randn(3, 7, 4, dtype=DOUBLE).transpose(0, 1)
    every_second = torch.randn(7, 3, 8, dtype=DOUBLE)[..., ::2]
    expanded = torch.randn(7, 1, 4, dtype=DOUBLE).expand(7, 3, 4)
    strided = states(name, 4, 5, 3)
    strided = tuple(s.transpose(1, 2) for s in strided) if name == "LSTM" else strided.transpose(1, 2)
    for x in (transposed, every_second, expanded):
        assert_equal_modules(theirs, ours, x, strided)
    base = torch.randn(4, 1, 5, dtype=DOUBLE, requires_grad=True)
    found = []
    for module in (theirs, ours):
        h = base.expand(4, 3, 5)
        output, _ = module(transposed, (h, h) if name == "LSTM" else h)
        found.append(torch.autograd.grad(output.square().sum(), base)[0])
    torch.testing.assert_close(found[1], found[0])
    assert found[1].abs().min() > 0


def test_states_of_an_lstm_as_a_list() -> None:
    theirs, ours = pair("LSTM", 4, 5, dtype=DOUBLE)
    x, hx = torch.randn(7, 3, 4, dtype=DOUBLE), list(states("LSTM", 1, 3, 5))
    assert_equal_modules(theirs, ours, x, hx)
    output, hidden = ours(x, hx)
    assert type(hidden) is tuple
    assert type(ours(x, hx)) is tuple
    assert ours(input=x, hx=hx)[0].equal(output)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize("name", LAYERS + CELL_MODULES)
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, DOUBLE, torch.complex64], ids=lambda d: str(d)[6:]
)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    layer = name in LAYERS
    theirs, ours = pair(name, 4, 5, **({"num_layers": 2, "bidirectional": True} if layer else {}), dtype=dtype)
    x = torch.randn(*((7, 3, 4) if layer else (3, 4)), dtype=dtype) / 2  # a complex tanh has poles
    hx = states(name, *((4, 3, 5) if layer else (3, 5)), dtype=dtype)
    actual, expected = values_and_grads(ours, x, hx), values_and_grads(theirs, x, hx)
    if dtype == DOUBLE:
        assert_same(actual, expected)
        return
    precise = torch.complex128 if dtype.is_complex else DOUBLE
    wide = tuple(s.to(precise) for s in hx) if isinstance(hx, tuple) else hx.to(precise)
    exact = values_and_grads(theirs.to(precise), x.to(precise), wide)
    assert list(actual) == list(expected)
    for key, e in expected.items():
        assert (actual[key].dtype, actual[key].shape) == (e.dtype, e.shape), key
        off, allowed = ((t.to(precise) - exact[key]).norm() / exact[key].norm() for t in (actual[key], e))
        assert off <= 2 * allowed + 4 * torch.finfo(dtype).eps, key


@pytest.mark.parametrize("name", LAYERS + CELL_MODULES)
def test_autocast_runs_in_the_low_dtype(name: str) -> None:
    layer = name in LAYERS
    module = getattr(rnnfast, name)(4, 5, **({"num_layers": 2, "bidirectional": True} if layer else {}))
    low = copy.deepcopy(module).bfloat16()
    x = torch.randn(*((7, 3, 4) if layer else (3, 4)))
    hx = states(name, *((4, 3, 5) if layer else (3, 5)), dtype=x.dtype)
    low_hx = tuple(s.bfloat16() for s in hx) if isinstance(hx, tuple) else hx.bfloat16()
    expected = values_and_grads(low, x.bfloat16(), low_hx)

    def cast(*inputs: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(*inputs)

    found = values_and_grads(_Called(module, cast), x, hx)
    for key, e in expected.items():
        actual = found[key.replace("gradient of ", "gradient of module.") if "_" in key else key]
        assert actual.dtype == (torch.bfloat16 if key.startswith("output") else torch.float32), key
        torch.testing.assert_close(actual, e.to(actual.dtype), rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which leaves float64 alone
        assert {t.dtype for _, t in flatten(module.double()(x.double()))} == {DOUBLE}


class _Called(nn.Module):
    def __init__(self, module: nn.Module, call: Any) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, *inputs: Any) -> Any:
        return self.call(*inputs)


@pytest.mark.parametrize("name", LAYERS + CELL_MODULES)
def test_double_backward(name: str) -> None:
    layer = name in LAYERS
    found = []
    x = torch.randn(*((4, 3, 4) if layer else (3, 4)), dtype=DOUBLE)
    hx = states(name, *((4, 3, 5) if layer else (3, 5)))
    for module in pair(name, 4, 5, **({"num_layers": 2, "bidirectional": True} if layer else {}), dtype=DOUBLE):
        inputs = leaves((x, hx))
        asked = [t for _, t in flatten(inputs)] + list(module.parameters())
        loss = sum((t * t.detach()).sum() for _, t in flatten(module(*inputs)))
        first = torch.autograd.grad(loss, asked, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), asked))
    for actual, expected in zip(found[1], found[0]):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


# Packed sequences.

PACKED = {
    "sorted": ([7, 4, 4, 1], True),
    "unsorted": ([4, 1, 7, 4], False),
    "sorted-but-not-said": ([7, 4, 4, 1], False),
    "one-row": ([3], True),
    "one-step": ([1, 1, 1], False),
    "all-full": ([7, 7], True),
}


@pytest.mark.few(2, "backend", "name", "lengths", "kwargs")
@pytest.mark.runs(DOUBLE)
@pytest.mark.parametrize("lengths", PACKED)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"num_layers": 2, "bidirectional": True, "dropout": 0.3, "batch_first": True}],
    ids=["plain", "bidirectional-2-layers-dropout"],
)
def test_packed_sequence(name: str, kwargs: dict, lengths: str, backend: str) -> None:
    lengths, in_order = PACKED[lengths]
    theirs, ours = pair(name, 4, 5, **kwargs, dtype=DOUBLE)
    padded = torch.randn(max(lengths), len(lengths), 4, dtype=DOUBLE)
    packed = pack_padded_sequence(padded, torch.tensor(lengths), enforce_sorted=in_order)
    assert_equal_modules(theirs, ours, packed)
    hx = states(name, 4 if kwargs else 1, len(lengths), 5)
    assert_equal_modules(theirs, ours, packed, hx)
    output, _ = ours(packed, hx)
    assert isinstance(output, PackedSequence)
    assert output.batch_sizes is packed.batch_sizes
    assert output.sorted_indices is packed.sorted_indices
    assert output.unsorted_indices is packed.unsorted_indices
    # Row n of the states belongs to the caller's row n.
    n, alone = len(lengths) - 1, lengths[-1]
    ours.eval()
    row = (lambda s: s[:, n : n + 1]) if name != "LSTM" else (lambda s: tuple(t[:, n : n + 1] for t in s))
    x = padded[:alone, n : n + 1]
    _, expected = ours(x.transpose(0, 1) if ours.batch_first else x, row(hx))
    assert_same(dict(flatten(row(ours(packed, hx)[1]))), dict(flatten(expected)))


# Cells.


@pytest.mark.few(2, "backend", "name", "bias", "shape")
@pytest.mark.runs(DOUBLE)
@pytest.mark.parametrize("name", CELL_MODULES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", [(3,), (1,), (), (0,)], ids=["batch", "one-row", "unbatched", "empty-batch"])
def test_cell(name: str, bias: bool, shape: tuple[int, ...], backend: str) -> None:
    kwargs = {"nonlinearity": "relu"} if name == "RNNCell" and not bias else {}
    theirs, ours = pair(name, 4, 5, bias, **kwargs, dtype=DOUBLE)
    x, hx = torch.randn(*shape, 4, dtype=DOUBLE), states(name, *shape, 5)
    assert_equal_modules(theirs, ours, x)
    assert_equal_modules(theirs, ours, x, hx)
    assert_equal_modules(theirs.eval(), ours.eval(), x, hx)
    assert type(ours(x, hx)) is type(theirs(x, hx))
    if name == "LSTMCell":
        assert_equal_modules(theirs, ours, x, list(hx))


@pytest.mark.parametrize("name", CELL_MODULES)
def test_cell_as_a_loop_trains(name: str) -> None:
    class Loop(nn.Module):
        def __init__(self, cell: nn.Module) -> None:
            super().__init__()
            self.cell = cell

        def forward(self, x: torch.Tensor) -> list:
            hx, found = None, []
            for step in x:
                hx = self.cell(step, hx)
                found.append(hx)
            return found

    theirs, ours = (Loop(cell) for cell in pair(name, 4, 5, dtype=DOUBLE))
    x = torch.randn(6, 3, 4, dtype=DOUBLE)
    assert_equal_modules(theirs, ours, x)
    assert train(ours, x) == pytest.approx(train(theirs, x), rel=1e-11)


CONNECTED = {
    "chunks": lambda m, x: (lambda y, h: torch.cat([y, m(x[2:], h)[0]]))(*m(x[:2])),
    "twice": lambda m, x: m(m(x)[0])[0],
    "state of the input": lambda m, x: m(x, x[:1] * 2)[0],
    "final state alone": lambda m, x: m(x)[1],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("how", [*CONNECTED, "tied weights", "hooks"])
@pytest.mark.parametrize("name", ["RNN", "GRU"])
def test_second_derivatives_of_connected_calls(name: str, how: str, dtype: torch.dtype) -> None:
    """The gradient of a call ends at its inputs, whatever these were made of."""
    pairs = pair(name, 3, 3, dtype=dtype)
    x = torch.randn(4, 2, 3, dtype=dtype)

    def derivatives(module: nn.Module) -> list[Tensor]:
        call = CONNECTED.get(how, CONNECTED["twice"])
        if how == "tied weights":
            module.bias_hh_l0 = module.bias_ih_l0
        of_x = x.clone().requires_grad_()
        read = of_x.sin()
        if how == "hooks":
            module.weight_hh_l0.register_hook(lambda grad: grad * 2)
            read.register_hook(lambda grad: grad * 3)
            read.retain_grad()
        asked = [of_x, *module.parameters()]
        first = torch.autograd.grad(call(module, read).square().sum(), asked, create_graph=True)
        second = torch.autograd.grad(sum(t.square().sum() for t in first), asked)
        return [*first, *second]

    theirs, ours = map(derivatives, pairs)
    for a, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, e, **({"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}))


@pytest.mark.parametrize("form", ["rectangular", "packed", "lengths"])
@pytest.mark.parametrize("name", LAYERS)
def test_third_derivatives(name: str, form: str) -> None:
    theirs, ours = pair(name, 3, 4, 2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    given = pack_padded_sequence(x, [3, 2]) if form == "packed" else x

    def third(module: nn.Module, **more: Tensor) -> list[Tensor]:
        weights, y = list(module.parameters()), module(leaves(given), **more)[0]
        value = torch.cat([t.sin().reshape(-1) for t in tensors_of(y) if t.is_floating_point()]).sum()
        for order in (1, 2, 3):
            grads = torch.autograd.grad(value, weights, create_graph=order < 3)
            value = sum(grad.square().sum() for grad in grads)
        return list(grads)

    expected = third(theirs)
    more = {"lengths": torch.tensor([3, 3])} if form == "lengths" else {}
    for a, e in zip(third(ours, **more), expected, strict=True):
        torch.testing.assert_close(a, e)
