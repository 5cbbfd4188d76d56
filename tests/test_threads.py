"""The CPU kernels where threads are not theirs alone: several callers, worker processes, forked children."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers import HANG

import rnnfast

pytestmark = pytest.mark.skipif(not rnnfast.backends()["cpu"].available, reason="the native library is not built")


def problems() -> list[tuple[torch.nn.Module, torch.Tensor]]:
    """Layers that share rows, and layers that share hidden units between threads."""
    shapes = ((20, 33, 64), (30, 2, 160))
    return [(getattr(rnnfast, cell)(h, h), torch.randn(t, n, h)) for cell in ("LSTM", "GRU") for t, n, h in shapes]


def gradients(module: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y, _ = module(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]


def test_several_python_threads_at_once() -> None:
    """Each gets its own answer, bit by bit, and none waits for another's team."""
    cases = problems()
    expected = [gradients(*case) for case in cases]
    wrong: list[int] = []

    def call(start: int) -> None:
        for i in range(start, start + 2 * len(cases)):
            k = i % len(cases)
            if not all(map(torch.equal, gradients(*cases[k]), expected[k])):
                wrong.append(k)

    callers = [threading.Thread(target=call, args=(i,), daemon=True) for i in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=HANG)
    assert not any(caller.is_alive() for caller in callers)
    assert not wrong


class Outputs(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.cases = problems()

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> torch.Tensor:
        module, x = self.cases[index]
        return module(x)[0].detach()


def test_in_workers_of_a_data_loader() -> None:
    data = Outputs()
    expected = [data[i] for i in range(len(data))]
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=2, timeout=HANG)
    for actual, e in zip(loader, expected, strict=True):
        assert torch.equal(actual, e)


FORK = """
import os, torch, rnnfast
torch.set_num_threads(2)
layer, x = rnnfast.LSTM(64, 128), torch.randn(50, 32, 64)
with torch.no_grad():
    expected = layer(x)[0].numpy()
    if (child := os.fork()) == 0:
        os._exit(0 if (layer(x)[0].numpy() == expected).all() else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_in_a_forked_child() -> None:
    """Where an OpenMP pool of the parent's would be waited for in vain."""
    path = os.pathsep.join([str(Path(rnnfast.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=HANG, env=os.environ | {"PYTHONPATH": path})


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_a_crew_whose_members_do_not_turn_up(tmp_path: Path) -> None:
    """One of them then does all the tasks: a busy machine's schedule, played by a program of its own."""
    program = tmp_path / "crew"
    source = Path(__file__).with_name("crew.cpp")
    subprocess.run(["c++", "-std=c++17", "-DRNNFAST_ISA=portable", source, "-o", program], check=True, timeout=HANG)
    done = subprocess.run([program], capture_output=True, text=True, timeout=HANG, check=True)
    assert done.stdout.split() == 8 * ["1111"]
