"""Other runtimes on the weights of a torch.nn module, through ONNX: float32 inference of rectangular sequences."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from rnnfast.onnx import ORDER

Runner = Callable[[np.ndarray], np.ndarray]


def installed() -> list[str]:
    """Those of :data:`RUNTIMES` that this environment has."""
    return [name for name in RUNTIMES if all(map(importlib.util.find_spec, ("onnx", name)))]


def runners(module: nn.RNNBase, steps: int, batch: int, threads: int) -> dict[str, Runner]:
    """By name, of each runtime that is installed, the function from input to output."""
    return {name: RUNTIMES[name](_onnx(module, steps, batch), threads) for name in installed()}


def _onnx(module: nn.RNNBase, steps: int, batch: int) -> bytes:
    """The module as an ONNX model: a node a layer."""
    from onnx import TensorProto, helper, numpy_helper

    cell, hidden, directions = type(module).__name__, module.hidden_size, 1 + module.bidirectional
    order = ORDER[module.mode]
    nodes, constants, x = [], [], "x"

    def constant(name: str, value: Tensor) -> str:
        constants.append(numpy_helper.from_array(value.numpy(), name))
        return name

    def stacked(kind: str, layer: int) -> Tensor:
        of_directions = [getattr(module, f"{kind}_l{layer}{end}").detach() for end in ("", "_reverse")[:directions]]
        return torch.stack([torch.cat([p.chunk(len(order))[gate] for gate in order]) for p in of_directions])

    for k in range(module.num_layers):
        operands = [
            constant(f"W{k}", stacked("weight_ih", k)),
            constant(f"R{k}", stacked("weight_hh", k)),
            constant(f"B{k}", torch.cat([stacked("bias_ih", k), stacked("bias_hh", k)], 1)),
        ]
        attributes = {"hidden_size": hidden, "direction": "forward" if directions == 1 else "bidirectional"}
        if cell == "GRU":
            attributes["linear_before_reset"] = 1
        nodes.append(helper.make_node(cell, [x, *operands], [f"y{k}"], **attributes))  # T, directions, N, H
        if directions == 2:
            nodes.append(helper.make_node("Transpose", [f"y{k}"], [f"t{k}"], perm=(0, 2, 1, 3)))
        shape = constant(f"S{k}", torch.tensor([steps, batch, directions * hidden]))
        nodes.append(helper.make_node("Reshape", [nodes[-1].output[0], shape], [f"x{k}"]))
        x = f"x{k}"
    value = lambda name, width: helper.make_tensor_value_info(name, TensorProto.FLOAT, (steps, batch, width))
    graph = helper.make_graph(nodes, "rnn", [value("x", module.input_size)], [value(x, directions * hidden)], constants)
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


def _onnxruntime(model: bytes, threads: int) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or it slows who comes next
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x})[0]


def _openvino(model: bytes, threads: int) -> Runner:
    import openvino

    core = openvino.Core()
    precision = {"INFERENCE_PRECISION_HINT": "f32"}  # or it computes in bfloat16 where the processor can
    options = precision | {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(core.read_model(model), "CPU", options).create_infer_request()
    return lambda x: request.infer({0: x}, share_inputs=True, share_outputs=True)[0]


RUNTIMES = {"onnxruntime": _onnxruntime, "openvino": _openvino}
