"""The package as installed: what it names, what it imports, and that it works without its native library."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from emulation import build

import rnnfast

PACKAGE = Path(rnnfast.__file__).parent


def _run(script: str, directory: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(directory)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


PARITY = """
import sys, torch, rnnfast
torch.manual_seed(0)
theirs, ours = torch.nn.LSTM(4, 5, 2, bidirectional=True), rnnfast.LSTM(4, 5, 2, bidirectional=True)
ours.load_state_dict(theirs.state_dict())
x = torch.randn(7, 3, 4)
found = []
for module in (theirs, ours):
    inputs = x.clone().requires_grad_()
    output, (h_n, c_n) = module(inputs)
    (output.square().sum() + h_n.sum() + c_n.sum()).backward()
    found.append([output, h_n, c_n, inputs.grad, *(p.grad for p in module.parameters())])
for actual, expected in zip(*found[::-1]):
    torch.testing.assert_close(actual, expected)
cpu = rnnfast.backends()["cpu"]
print(rnnfast.__file__, cpu.available, cpu.detail, rnnfast.explain(ours)[0].backend, sep="\\n")
"""


def _copy(directory: Path) -> Path:
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    return Path(shutil.copytree(PACKAGE, directory / "rnnfast", ignore=ignored))


def test_works_without_the_native_library(tmp_path: Path) -> None:
    copy = _copy(tmp_path)
    where, available, detail, backend = _run(PARITY, tmp_path).splitlines()
    assert Path(where).parent == copy
    assert available == "False"
    assert "the native library is not built" in detail
    assert backend == "torch"


def test_works_with_a_native_library_that_does_not_load(tmp_path: Path) -> None:
    (_copy(tmp_path) / "_cpu.so").write_bytes(b"no library")
    _, available, detail, *_, backend = _run(PARITY, tmp_path).splitlines()
    assert available == "False"
    assert "the native library does not load: " in detail
    assert backend == "torch"


def test_import_is_frugal() -> None:
    script = "import sys, torch; before = set(sys.modules); import rnnfast; print(*sorted(set(sys.modules) - before))"
    found = _run(script, PACKAGE.parent).split()
    assert "rnnfast.modules" in found
    assert not {"triton", "numpy", "torch._dynamo", "torch._inductor", "rnnfast.__main__"} & set(found)


def test_public_names() -> None:
    assert rnnfast.__all__ == [
        "GRU",
        "LSTM",
        "RNN",
        "FlexRNN",
        "GRUCell",
        "LSTMCell",
        "RNNCell",
        "Stream",
        "backends",
        "cell",
        "convert",
        "explain",
        "functional",
        "revert",
        "set_choice",
        "share_choice",
        "use_backend",
    ]
    for name in rnnfast.__all__:
        assert inspect.getdoc(getattr(rnnfast, name)), name
    names = {}
    exec("from rnnfast import *", names)
    assert set(rnnfast.__all__) <= set(names)


def test_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_extensions_are_keyword_only(name: str) -> None:
    parameters = inspect.signature(getattr(rnnfast, name).forward).parameters
    own = ["lengths", "resets", "return_states", "cu_seqlens", "max_seqlen"]
    assert list(parameters) == ["self", "input", "hx", "more", *own]
    assert parameters["more"].kind is inspect.Parameter.VAR_POSITIONAL  # refused, but for an exporter of torch's
    assert [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY] == own


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
def test_constructors_name_their_parameters(name: str) -> None:
    parameters = inspect.signature(getattr(rnnfast, name)).parameters.values()
    theirs = getattr(torch.nn, name)
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    if name.endswith("Cell"):
        expected = inspect.signature(theirs).parameters.values()
        assert [(p.name, p.default) for p in positional] == [(p.name, p.default) for p in expected]
    else:  # torch.nn's say *args, **kwargs, and what they mean by that at the beginning of their documentation
        documented = theirs.__doc__.partition("(")[2].partition(")")[0].replace(" ", "").split(",")
        assert [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in positional] == documented
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    of_steps = ["recurrent_dropout", "zoneout", "layer_norm", "state_clip", "num_heads"]
    expected = {
        "RNN": ["recompute", "init", "weight_dropout", *of_steps, "proj_size"],
        "LSTM": ["recompute", "init", "forget_bias", "weight_dropout", *of_steps],
        "GRU": ["recompute", "reset_after", "init", "weight_dropout", *of_steps, "proj_size"],
        "RNNCell": ["init"],
        "LSTMCell": ["init", "forget_bias"],
        "GRUCell": ["reset_after", "init"],
    }
    assert keywords == expected[name]


def test_version() -> None:
    text = (PACKAGE.parent / "pyproject.toml").read_text() if (PACKAGE.parent / "pyproject.toml").is_file() else None
    versions = {rnnfast.__version__}
    if text is not None:
        versions |= {line.split('"')[1] for line in text.splitlines() if line.startswith("version = ")}
    versions |= {d.version for d in importlib.metadata.distributions() if d.metadata["Name"] == "rnnfast"}
    assert len(versions) == 1, versions


@pytest.mark.full
def test_sources_compile_with_the_oldest_headers(tmp_path: Path) -> None:
    """Those of the first torch that the library is for, from its smallest wheel: they are the same for every system."""
    wheel = "torch==2.10.0 --no-deps --only-binary :all: --platform macosx_11_0_arm64 --python-version 3.11"
    command = [sys.executable, "-m", "pip", "download", *wheel.split(), "--dest", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"torch 2.10 was not to be had: {done.stderr.splitlines()[-1]}")
    (found,) = tmp_path.glob("torch-2.10.0*.whl")
    with zipfile.ZipFile(found) as archive:
        archive.extractall(tmp_path, [name for name in archive.namelist() if name.startswith("torch/include/")])
    headers = ["-isystem", str(tmp_path / "torch" / "include")]
    root = PACKAGE.parent
    cpu = [f"cpu/{name}.cpp" for name in build.CPU_SOURCES]
    for source in ("ops.cpp", *cpu, "cuda/recurrence.cu", "cuda/stepwise.cu"):
        flags = [*build.FLAGS.split(), "-fsyntax-only", f"-I{root / 'csrc'}"]
        if source.endswith(".cu"):  # as for the emulation, which needs no CUDA
            flags.append(f"-I{root / 'tests' / 'emulation'}")
        subprocess.run([os.environ.get("CXX", "c++"), *flags, *headers, str(root / "csrc" / source)], check=True)
