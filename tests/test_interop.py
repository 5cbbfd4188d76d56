"""Weights and configurations from and to other libraries, by those libraries' own results."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import states_of, tensors_of
from torch import Tensor, nn

import rnnfast

os.environ.setdefault("KERAS_BACKEND", "torch")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # Keras' own
N, T, I, H = 3, 5, 4, 6


def library(name: str) -> Any:
    """Our module for a library, where that is installed."""
    pytest.importorskip(name, reason=f"{name} is not installed: pip install rnnfast[interop]")
    return importlib.import_module(f"rnnfast.interop.{name}")


def assert_close(ours: Any, theirs: Any) -> None:
    for a, b in zip(tensors_of(ours), tensors_of(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def random_weights(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


# Keras


@pytest.fixture
def keras() -> Any:
    return pytest.importorskip("keras", reason="keras is not installed: pip install rnnfast[interop]")


KERAS = {
    "simple": ("SimpleRNN", {}),
    "simple-relu": ("SimpleRNN", {"activation": "relu", "use_bias": False}),
    "lstm": ("LSTM", {}),
    "lstm-no-bias": ("LSTM", {"use_bias": False, "unit_forget_bias": False}),
    "gru": ("GRU", {}),
    "gru-no-bias": ("GRU", {"use_bias": False}),
    "gru-before": ("GRU", {"reset_after": False}),
    "gru-before-no-bias": ("GRU", {"reset_after": False, "use_bias": False}),
}


def keras_layer(keras: Any, name: str, bidirectional: bool = False, inputs: int = I, **more: Any) -> Any:
    kind, options = KERAS[name]
    options = {"return_sequences": True, **options, **more}
    layer = getattr(keras.layers, kind)(H, bias_initializer="random_normal", **options)
    layer = keras.layers.Bidirectional(layer) if bidirectional else layer
    layer.build((N, T, inputs))
    return layer


def keras_run(layers: list, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return torch.as_tensor(x)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "bidirectional"])
@pytest.mark.parametrize("name", KERAS)
def test_keras(keras: Any, name: str, bidirectional: bool, layers: int) -> None:
    ways, x = library("keras"), torch.randn(N, T, I)
    width = H * (1 + bidirectional)
    theirs = [keras_layer(keras, name, bidirectional, width if k else I) for k in range(layers)]
    expected = keras_run(theirs, x)
    ours = ways.from_keras(theirs if layers > 1 else theirs[0])
    assert type(ours) is getattr(rnnfast, {"SimpleRNN": "RNN"}.get(KERAS[name][0], KERAS[name][0]))
    assert (ours.num_layers, ours.bidirectional, ours.batch_first) == (layers, bidirectional, True)
    torch.testing.assert_close(ours(x)[0], expected)
    again = ways.to_keras(random_weights(ours))
    torch.testing.assert_close(keras_run(again, x), ours(x)[0])
    back = ways.from_keras(keras.Sequential(again))
    torch.testing.assert_close(back(x)[0], ours(x)[0])
    assert repr(back) == repr(ours)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_keras_from_torchs(keras: Any, name: str) -> None:
    theirs = getattr(nn, name)(I, H, 2, dropout=0.25)  # time first, with dropout
    layers = library("keras").to_keras(theirs)
    assert [type(layer).__name__ for layer in layers[1:2]] == ["Dropout"]
    x = torch.randn(T, N, I)
    torch.testing.assert_close(keras_run(layers, x.transpose(0, 1)), theirs.eval()(x)[0].transpose(0, 1))
    back = library("keras").from_keras(layers)
    assert back.dropout == 0.25
    torch.testing.assert_close(back.eval()(x.transpose(0, 1))[0].transpose(0, 1), theirs(x)[0])


def test_keras_of_a_half_type(keras: Any) -> None:
    theirs = keras.layers.LSTM(H, return_sequences=True, recurrent_initializer="random_normal", dtype="bfloat16")
    theirs.build((None, None, I))
    ours = library("keras").from_keras(theirs)
    assert ours.weight_hh_l0.dtype == torch.bfloat16
    (again,) = library("keras").to_keras(ours)
    assert [weight.dtype for weight in again.weights] == ["bfloat16"] * 3
    for ours_, theirs_ in zip(again.weights, theirs.weights):
        assert torch.equal(ours_.value, theirs_.value)


def test_keras_lengths_are_its_masks(keras: Any) -> None:
    theirs = keras_layer(keras, "lstm", True, zero_output_for_mask=True)
    x, lengths = torch.randn(N, T, I), torch.tensor([2, 5, 3])
    expected = theirs(x, mask=torch.arange(T) < lengths[:, None])
    torch.testing.assert_close(library("keras").from_keras(theirs)(x, lengths=lengths)[0], expected)


REFUSED = {
    "activation": "activation='gelu', which torch's layers do not have",
    "recurrent_activation": "recurrent_activation='hard_sigmoid', torch's layers have 'sigmoid' only",
    "dropout": "dropout=0.5",
    "recurrent_dropout": "recurrent_dropout=0.5",
    "stateful": "stateful=True",
    "go_backwards": "go_backwards=True",
    "kernel_regularizer": "kernel_regularizer=",
    "recurrent_constraint": "recurrent_constraint=",
}
VALUES = {"activation": "gelu", "recurrent_activation": "hard_sigmoid", "kernel_regularizer": "l2"}
VALUES |= {"dropout": 0.5, "recurrent_dropout": 0.5, "recurrent_constraint": "unit_norm"}


@pytest.mark.parametrize("option", REFUSED)
def test_keras_refuses_options(keras: Any, option: str) -> None:
    layer = keras_layer(keras, "lstm", **{option: VALUES.get(option, True)})
    with pytest.raises(ValueError, match=f"Keras' LSTM has {REFUSED[option]}"):
        library("keras").from_keras(layer)


def test_keras_refuses(keras: Any) -> None:
    from_keras, to_keras = library("keras").from_keras, library("keras").to_keras
    make, dropout = lambda *args, **more: keras_layer(keras, *args, **more), keras.layers.Dropout
    wide = {"inputs": H}
    cases: list[tuple[Any, type[Exception], str]] = [
        (keras.layers.Dense(3), TypeError, "Dense is no SimpleRNN, LSTM or GRU of Keras"),
        (keras.layers.LSTM(3), ValueError, "LSTM has no weights yet"),
        (keras.layers.Bidirectional(keras.layers.LSTM(3), "sum"), ValueError, "merge_mode='sum'"),
        ([], ValueError, "no Keras layer in the list"),
        ([make("lstm", return_sequences=False), make("lstm", **wide)], ValueError, "return_sequences=False leaves no"),
        ([make("lstm"), make("gru", **wide)], ValueError, "several kinds"),
        ([make("lstm"), make("lstm")], ValueError, "takes 4 features, the one before gives 6"),
        ([make("gru"), make("gru-before", **wide)], ValueError, "several kinds"),
        ([make("gru"), make("gru-no-bias", **wide)], ValueError, "several kinds"),
        ([make("lstm"), dropout(0.1)], ValueError, "Dropout has to stand between"),
        ([make("lstm"), make("lstm", **wide), dropout(0.1)], ValueError, "Dropout has to stand between"),
        ([make("lstm"), dropout(0.1), dropout(0.1), make("lstm", **wide)], ValueError, "Dropout has to stand between"),
        (
            [make("lstm"), dropout(0.1), make("lstm", **wide), dropout(0.2), make("lstm", **wide)],
            ValueError,
            "with one rate",
        ),
        ([make("lstm"), dropout(0.1, noise_shape=(None, 1, H)), make("lstm", **wide)], ValueError, "no noise_shape"),
    ]
    for layers, error, why in cases:
        with pytest.raises(error, match=why):
            from_keras(layers)
    backward = keras.layers.GRU(H, return_sequences=True, go_backwards=True)
    mixed = keras.layers.Bidirectional(keras.layers.LSTM(H, return_sequences=True), backward_layer=backward)
    mixed.build((None, None, I))
    with pytest.raises(ValueError, match="or two directions, are of several kinds"):
        from_keras(mixed)
    with pytest.raises(ValueError, match="Keras has no layers with proj_size=2"):
        to_keras(nn.LSTM(I, H, proj_size=2))
    with pytest.raises(TypeError, match="LSTMCell is no RNN, LSTM or GRU"):
        to_keras(nn.LSTMCell(I, H))


# ONNX


def published() -> dict[str, Callable[[], None]]:
    """The node tests that ONNX publishes, by name: each calls ``expect`` of its module."""
    found = {}
    for kind in ("lstm", "gru", "rnn"):
        try:
            module = importlib.import_module(f"onnx.backend.test.case.node.{kind}")
        except ImportError:
            continue
        cases = getattr(module, kind.upper())
        found |= {
            f"{kind}{name.removeprefix('export')}": (module, getattr(cases, name))
            for name in dir(cases)
            if "export_" in name
        }
    return found


PUBLISHED = published()


@pytest.mark.parametrize("name", PUBLISHED)
def test_onnx_published_tests(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from onnx import numpy_helper

    module, export = PUBLISHED[name]
    found = []
    monkeypatch.setattr(module, "expect", lambda node, inputs, outputs, name: found.append((node, inputs, outputs)))
    export()
    ((node, arrays, expected),) = found
    inputs = dict(zip(filter(None, node.input), arrays, strict=True))
    initializers = [numpy_helper.from_array(inputs[key], key) for key in ("W", "R", "B", "P") if key in inputs]
    own = library("onnx").Node(node, initializers)
    given = {key: torch.from_numpy(inputs[key]) for key in ("sequence_lens", "initial_h", "initial_c") if key in inputs}
    outputs = dict(zip(("Y", "Y_h", "Y_c"), own(torch.from_numpy(inputs["X"]), **given)))
    asked = [("Y", "Y_h", "Y_c")[k] for k, output in enumerate(node.output) if output]
    assert asked
    for key, array in zip(asked, expected, strict=True):
        torch.testing.assert_close(outputs[key], torch.from_numpy(array), rtol=1e-4, atol=1e-6)


def test_onnx_publishes_what_we_test() -> None:
    pytest.importorskip("onnx", reason="onnx is not installed: pip install rnnfast[interop]")
    names = ("defaults", "initial_bias", "batchwise", "reverse", "bidirectional")
    assert {f"{kind}_{name}" for kind in ("lstm", "gru", "rnn") for name in names} <= set(PUBLISHED)
    assert {"lstm_peepholes", "gru_seq_length", "rnn_seq_length"} <= set(PUBLISHED)


def onnx_model(node: Any, initializers: list, inputs: dict[str, Tensor], outputs: int) -> Any:
    """A session of onnxruntime with the node alone."""
    from onnx import TensorProto, helper

    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install rnnfast[interop]")
    kinds = {torch.float32: TensorProto.FLOAT, torch.int32: TensorProto.INT32}
    given = [helper.make_tensor_value_info(key, kinds[of.dtype], list(of.shape)) for key, of in inputs.items()]
    made = [helper.make_tensor_value_info(key, TensorProto.FLOAT, None) for key in node.output[:outputs]]
    graph = helper.make_graph([node], "node", given, made, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(of) for of in session.run(None, {key: of.numpy() for key, of in inputs.items()})]


ONNX = {
    "tanh": ("RNN", {}),
    "relu": ("RNN", {"nonlinearity": "relu"}),
    "lstm": ("LSTM", {}),
    "lstm-no-bias": ("LSTM", {"bias": False}),
    "gru": ("GRU", {}),
    "gru-before": ("GRU", {"reset_after": False}),
}


@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "bidirectional"])
@pytest.mark.parametrize("name", ONNX)
def test_onnx(name: str, bidirectional: bool) -> None:
    ways = library("onnx")
    kind, options = ONNX[name]
    ours = random_weights(getattr(rnnfast, kind)(I, H, bidirectional=bidirectional, **options))
    node, initializers = ways.to_onnx(ours, "encoder.")
    assert list(node.input) == [f"encoder.{key}" for key in ("X", "W", "R", "B") if ours.bias or key != "B"]
    x = torch.randn(T, N, I)
    Y, *finals = onnx_model(node, initializers, {"encoder.X": x}, len(node.output))
    output, hidden = ours(x)
    assert_close((output, hidden), (Y.transpose(1, 2).flatten(2), finals))
    assert_close(ways.Node(node, initializers)(x), (Y, *finals))
    back = ways.from_onnx(node, initializers)
    assert repr(back) == repr(ours)
    for key, weight in ours.state_dict().items():
        assert torch.equal(back.state_dict()[key], weight)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("peepholes", [False, True], ids=["plain", "peepholes"])
def test_onnx_lengths_states_and_peepholes(direction: str, peepholes: bool) -> None:
    from onnx import helper, numpy_helper

    ways, D = library("onnx"), 1 + (direction == "bidirectional")
    shapes = {"W": (D, 4 * H, I), "R": (D, 4 * H, H), "B": (D, 8 * H), "P": (D, 3 * H)}
    initializers = [numpy_helper.from_array((torch.randn(shape) / 2).numpy(), key) for key, shape in shapes.items()]
    names = ["X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", *["P"] * peepholes]
    node = helper.make_node("LSTM", names, ["Y", "Y_h", "Y_c"], hidden_size=H, direction=direction)
    inputs = {"X": torch.randn(T, N, I), "sequence_lens": torch.tensor([3, 0, 5], dtype=torch.int32)}
    inputs |= {"initial_h": torch.randn(D, N, H), "initial_c": torch.randn(D, N, H)}
    expected = onnx_model(node, initializers[: 3 + peepholes], inputs, 3)
    own = ways.Node(node, initializers)
    assert_close(own(*inputs.values()), expected)
    assert_close(own(inputs["X"], inputs["sequence_lens"], None, None)[0][:, :, 1], torch.zeros(T, D, H))
    if peepholes or direction == "reverse":
        with pytest.raises(
            ValueError, match=f"has {'the reverse' if direction == 'reverse' else 'peepholes'}.*Node runs"
        ):
            ways.from_onnx(node, initializers)


def test_onnx_node_trains_and_takes_layout_1() -> None:
    ways = library("onnx")
    ours = rnnfast.GRU(I, H, batch_first=True, bidirectional=True)
    own = ways.Node(*ways.to_onnx(ours))
    x, h = torch.randn(N, T, I), states_of(ours, N).float()
    output, h_n = ours(x, h)
    Y, Y_h = own(x, initial_h=h.transpose(0, 1))
    assert_close((Y.flatten(2), Y_h.transpose(0, 1)), (output, h_n))
    (output.square().sum()).backward()
    (Y.square().sum()).backward()
    assert_close([weight.grad for weight in own.weights], [weight.grad for weight in ours.parameters()])


def test_onnx_refuses() -> None:
    pytest.importorskip("onnx", reason="onnx is not installed: pip install rnnfast[interop]")
    from onnx import helper

    ways = library("onnx")
    _, initializers = ways.to_onnx(rnnfast.LSTM(I, H))
    for kind, attributes, why in (
        ("LSTM", {"clip": 3.0}, "LSTM has clip=3.0"),
        ("LSTM", {"input_forget": 1}, "LSTM has input_forget=1"),
        ("LSTM", {"activations": ["Sigmoid", "Relu", "Tanh"]}, "has activations=.*'relu'.*, our layers have"),
        ("RNN", {"direction": "bidirectional", "activations": ["Tanh", "Relu"]}, "has activations="),
        ("GRU", {"direction": "sideways"}, "GRU has direction='sideways'"),
        ("Add", {}, "ONNX's Add is no LSTM, GRU or RNN"),
    ):
        with pytest.raises(ValueError, match=why):
            ways.Node(helper.make_node(kind, ["X", "W", "R"], ["Y"], **attributes), initializers)
    with pytest.raises(ValueError, match="the weight 'V' of ONNX's LSTM is no initializer"):
        ways.Node(helper.make_node("LSTM", ["X", "V", "R"], ["Y"]), initializers)
    for module, error, why in (
        (rnnfast.LSTM(I, H, 2), ValueError, "one layer, got 2: torch.onnx.export"),
        (nn.LSTM(I, H, dtype=torch.complex64), ValueError, "cannot be of torch.complex64"),
        (rnnfast.LSTM(I, H, proj_size=2), ValueError, "ONNX has no layers with proj_size=2"),
        (nn.Linear(I, H), TypeError, "Linear is no RNN, LSTM or GRU"),
    ):
        with pytest.raises(error, match=why):
            ways.to_onnx(module)


def test_onnx_refuses_shapes() -> None:
    pytest.importorskip("onnx", reason="onnx is not installed: pip install rnnfast[interop]")
    from onnx import helper, numpy_helper

    ways, make = library("onnx"), lambda *shape: torch.zeros(shape).numpy()
    arrays = {"W": make(1, 3 * H, I), "R": make(1, 3 * H, H), "B": make(1, 6 * H), "P": make(1, 3 * H)}
    arrays |= {"two": make(2, 3 * H, I), "flat": make(3 * H, I), "long": make(1, 6 * H + 1)}
    initializers = [numpy_helper.from_array(array, key) for key, array in arrays.items()]

    def node(names: str = "X W R B", **attributes: Any) -> Any:
        return helper.make_node("GRU", [name.strip("-") for name in names.split()], ["Y"], **attributes)

    for wrong, why in (
        (node(hidden_size=99), r"GRU has W of shape \[1, 18, 4\], expected \[1, 297, 4\]"),
        (node(direction="bidirectional"), r"GRU has W of shape \[1, 18, 4\], expected \[2, 18, 4\]"),
        (node("X two R B"), r"GRU has W of shape \[2, 18, 4\], expected \[1, 18, 4\]"),
        (node("X flat R B"), r"GRU has W of shape \[18, 4\], expected \[1, 18, 4\]"),
        (node("X W W B"), r"GRU has W of shape \[1, 18, 4\], expected \[1, 12, 4\]"),
        (node("X W R long"), r"GRU has B of shape \[1, 37\], expected \[1, 36\]"),
        (node("X W R B - - - P"), "GRU has no peepholes"),
        (node("X W"), "GRU needs W and R, got 'W' and ''"),
        (node("X - R"), "GRU needs W and R, got '' and 'R'"),
    ):
        with pytest.raises(ValueError, match=why):
            ways.Node(wrong, initializers)
    x = torch.randn(T, N, I)
    for direction in ("forward", "reverse"):
        own = ways.Node(node(direction=direction, hidden_size=H), initializers)
        for lengths in ([1, 2, T + 1], [1, 2, -1]):
            with pytest.raises(ValueError, match="lengths"):
                own(x, torch.tensor(lengths))
        for lengths in ([1, 2], [1], [1.0, 2.0, 3.0]):
            with pytest.raises(ValueError, match="lengths must"):
                own(x, torch.tensor(lengths))
        with pytest.raises(TypeError, match="sequence_lens must be a Tensor, got list"):
            own(x, [1, 2, 3])
        with pytest.raises(ValueError, match="X has to have 3 dimensions, got 2"):
            own(x[0])


def test_onnx_attributes_and_dtypes() -> None:
    """No layout but where it is not the default: operators of older opsets have none."""
    pytest.importorskip("onnx", reason="onnx is not installed: pip install rnnfast[interop]")
    ways = library("onnx")
    for batch_first in (False, True):
        node, _ = ways.to_onnx(rnnfast.GRU(I, H, batch_first=batch_first))
        layouts = [attribute.i for attribute in node.attribute if attribute.name == "layout"]
        assert layouts == [1] * batch_first
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        ours = rnnfast.LSTM(I, H, dtype=dtype)
        back = ways.from_onnx(*ways.to_onnx(ours))
        for key, weight in ours.state_dict().items():
            assert back.state_dict()[key].dtype == dtype
            assert torch.equal(back.state_dict()[key], weight)


@pytest.mark.parametrize("name", ["bias_ih_l0", "bias_hh_l0", "both"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("to", ["onnx", "keras"])
def test_deleted_biases_are_zeros(to: str, kind: str, name: str) -> None:
    ways = library(to)
    theirs = random_weights(getattr(nn, kind)(I, H, batch_first=True))
    whole = getattr(nn, kind)(I, H, batch_first=True)
    whole.load_state_dict(theirs.state_dict())
    for key in ("bias_ih_l0", "bias_hh_l0") if name == "both" else (name,):
        setattr(theirs, key, None)
        nn.init.zeros_(getattr(whole, key))
    found = getattr(ways, f"to_{to}")(theirs)
    ours = getattr(ways, f"from_{to}")(*(found if to == "onnx" else (found,)))
    assert ours.bias == (name != "both")
    x = torch.randn(N, T, I)
    assert_close(ours(x)[0], whole(x)[0])


@pytest.mark.parametrize("library_", [nn, rnnfast], ids=["torch", "ours"])
@pytest.mark.parametrize("to", ["onnx", "keras"])
def test_parametrized_weights(to: str, library_: Any) -> None:
    ways = library(to)
    module = library_.LSTM(I, H, batch_first=True)
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    nn.init.constant_(module.parametrizations.weight_hh_l0.original0, 3.0)
    found = getattr(ways, f"to_{to}")(module)
    ours = getattr(ways, f"from_{to}")(*(found if to == "onnx" else (found,)))
    assert_close([ours.weight_hh_l0], [module.weight_hh_l0])
    assert ours.weight_hh_l0.norm() > 3


def test_arrays_of_the_other_byte_order() -> None:
    numpy = importlib.import_module("numpy")
    from_array = importlib.import_module("rnnfast.interop.weights").from_array
    for dtype in (">f4", "<f4"):
        assert torch.equal(from_array(numpy.array([1.5, -2.0], dtype)), torch.tensor([1.5, -2.0]))


# Flax


@pytest.fixture
def linen() -> Any:
    pytest.importorskip("flax", reason="flax is not installed: pip install rnnfast[interop]")
    return importlib.import_module("flax.linen")


FLAX = {"LSTMCell": "LSTMCell", "OptimizedLSTMCell": "LSTMCell", "GRUCell": "GRUCell", "SimpleCell": "RNNCell"}


def flax_step(cell: Any, params: Any, x: Tensor, hx: Any) -> Tensor:
    """h after a step; Flax has (c, h)."""
    carry = tuple(of.numpy() for of in reversed(hx)) if isinstance(hx, tuple) else hx.numpy()
    return torch.tensor(cell.apply({"params": params}, carry, x.numpy())[1].tolist())


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("name", FLAX)
def test_flax(linen: Any, name: str, activation: str) -> None:
    import jax

    if activation == "relu" and name != "SimpleCell":
        with pytest.raises(ValueError, match=f"Flax's {name} has activation_fn="):
            library("flax").from_flax(getattr(linen, name)(H, activation_fn=linen.relu), {})
        return
    cell = getattr(linen, name)(H, activation_fn=getattr(linen, activation), bias_init=linen.initializers.normal())
    x, h, c = torch.randn(N, I), torch.randn(N, H), torch.randn(N, H)
    hx = (h, c) if "LSTM" in name else h
    carry = cell.initialize_carry(jax.random.key(0), (N, I))
    params = cell.init(jax.random.key(1), carry, x.numpy())["params"]
    ours = library("flax").from_flax(cell, params)
    assert type(ours) is getattr(rnnfast, FLAX[name])
    first = lambda found: found[0] if isinstance(found, tuple) else found
    assert_close(first(ours(x, hx)), flax_step(cell, params, x, hx))
    again = library("flax").to_flax(random_weights(ours))
    assert_close(flax_step(*again, x, hx), first(ours(x, hx)))
    back = library("flax").from_flax(*again)
    assert repr(back) == repr(ours)
    assert_close(first(back(x, hx)), first(ours(x, hx)))


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_flax_of_deleted_and_parametrized(linen: Any, kind: str) -> None:
    ways = library("flax")
    for deleted in ("bias_ih", "bias_hh"):
        ours, whole = random_weights(getattr(rnnfast, kind)(I, H)), getattr(rnnfast, kind)(I, H)
        whole.load_state_dict(ours.state_dict())
        setattr(ours, deleted, None)
        nn.init.zeros_(getattr(whole, deleted))
        nn.utils.parametrizations.weight_norm(ours, "weight_hh")
        x = torch.randn(N, I)
        assert_close(ways.from_flax(*ways.to_flax(ours))(x), whole(x))


def test_flax_refuses(linen: Any) -> None:
    ways = library("flax")
    cell, params = ways.to_flax(rnnfast.GRUCell(I, H))
    for wrong in ({"params": params}, {}, {"ir": params["ir"]}):
        with pytest.raises(ValueError, match=r"params of Flax's GRUCell have .*: give variables\['params'\]"):
            ways.from_flax(cell, wrong)
    with pytest.raises(TypeError, match="MGUCell is no LSTMCell, OptimizedLSTMCell, GRUCell, SimpleCell"):
        ways.from_flax(linen.MGUCell(H), {})
    with pytest.raises(ValueError, match="GRUCell has gate_fn="):
        ways.from_flax(linen.GRUCell(H, gate_fn=linen.relu), {})
    with pytest.raises(ValueError, match="SimpleCell has residual=True"):
        ways.from_flax(linen.SimpleCell(H, residual=True), {})
    with pytest.raises(TypeError, match="GRU is no RNNCell, LSTMCell or GRUCell"):
        ways.to_flax(rnnfast.GRU(I, H))
    with pytest.raises(ValueError, match="Flax has no OptimizedLSTMCell with bias=False"):
        ways.to_flax(rnnfast.LSTMCell(I, H, bias=False))
    with pytest.raises(ValueError, match="Flax has no GRUCell with reset_after=False"):
        ways.to_flax(rnnfast.GRUCell(I, H, reset_after=False))
