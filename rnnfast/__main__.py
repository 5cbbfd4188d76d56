"""``python -m rnnfast``: what this machine can use, and a parity check against torch.nn run on the spot.

``python -m rnnfast tune`` measures on a GPU which backend serves which call.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence

import torch
from torch import nn

import rnnfast

from . import choice, tune

_ROUNDING = 1e-5  # float32: the largest difference that is rounding, relative to the largest value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code is 1 if something fails."""
    about = "Show what this machine can use, and check it."
    parser = argparse.ArgumentParser(prog="python -m rnnfast", description=about)
    commands = parser.add_subparsers(dest="command")
    about = "Measure on a GPU which backend serves which call, keep that in the user's cache folder, and print it."
    tune.add_arguments(commands.add_parser("tune", help="measure on a GPU", description=about))
    args = parser.parse_args(arguments)
    return tune.tune(args) if args.command else _check()


def _check() -> int:
    """Print versions, backends and the parity check; the exit code is 1 if the check fails."""
    print(f"rnnfast {rnnfast.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"{platform.machine()}, {torch.get_num_threads()} threads\n")
    available = []
    for name, backend in rnnfast.backends().items():
        print(f"{name:<10} {'yes' if backend.available else 'no ':<4} {backend.detail}")
        available += [name] if backend.available else []
    for index in range(torch.cuda.device_count()):
        print(choice.known_on(torch.device("cuda", index)))

    print("\nparity with torch.nn, float32: largest difference of outputs and gradients, relative to the largest value")
    passed = True
    for name in available:
        for cell in ("RNN", "LSTM", "GRU"):
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                difference = _difference(name, cell)
            ok = difference <= _ROUNDING  # false for NaN, too
            passed &= ok
            print(f"{name:<10} {cell:<5} {difference:.1e} {'ok' if ok else 'FAILED'}")
    return 0 if passed else 1


def _difference(backend: str, cell: str) -> float:
    torch.manual_seed(0)
    device = "cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu"
    theirs = getattr(nn, cell)(24, 40, num_layers=2, bidirectional=True, device=device)
    ours = getattr(rnnfast, cell)(24, 40, num_layers=2, bidirectional=True, device=device)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(17, 6, 24, device=device)

    def values(module: nn.Module) -> list[torch.Tensor]:
        inputs = x.clone().requires_grad_()
        output, hidden = module(inputs)
        tensors = [output, *(hidden if cell == "LSTM" else (hidden,))]
        sum(t.square().sum() for t in tensors).backward()
        return [*tensors, inputs.grad, *(p.grad for p in module.parameters())]

    expected = values(theirs)
    with rnnfast.use_backend(backend):
        actual = values(ours)
    return max(((a - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, expected))


if __name__ == "__main__":
    sys.exit(main())
