"""What the processes of test_distributed.py do: torchrun starts them, and each writes what went wrong, by check.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/ranks.py DIRECTORY
"""

from __future__ import annotations

import copy
import json
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pack_padded_sequence

import rnnfast

N, T, I, H = 4, 5, 3, 6
LENGTHS = torch.tensor([5, 2, 5, 1])
LAYERS = {
    "RNN": ("RNN", {}),
    "LSTM": ("LSTM", {}),
    "GRU": ("GRU", {}),
    "projection": ("LSTM", {"proj_size": 2}),
    "recompute": ("LSTM", {"recompute": True}),
    "reset-before": ("GRU", {"reset_after": False}),
}
FORMS = ("rectangular", "packed", "lengths")


class Model(nn.Module):
    """A stack of layers, a cell for each of its steps, and a head."""

    def __init__(self, layer: str, library=rnnfast) -> None:
        super().__init__()
        name, options = LAYERS[layer]
        self.rnn = getattr(library, name)(I, H, 2, bidirectional=True, dtype=torch.float64, **options)
        self.cell = library.GRUCell(2 * (self.rnn.proj_size or H), H, dtype=torch.float64)
        self.head = nn.Linear(H, 2, dtype=torch.float64)

    def forward(self, x: Tensor, lengths: Tensor, form: str) -> Tensor:
        if form == "packed":
            packed, _ = self.rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))
            y, _ = nn.utils.rnn.pad_packed_sequence(packed, total_length=T)
        else:
            y, _ = self.rnn(x, lengths=lengths) if form == "lengths" else self.rnn(x)
        h = None
        for step in y:
            h = self.cell(step, h)
        return self.head(h).square().mean()


def problem(layer: str) -> tuple[Model, Tensor]:
    """The same in each process."""
    torch.manual_seed(0)
    return Model(layer), torch.randn(T, N, I, dtype=torch.float64)


def share(of: Tensor) -> Tensor:
    """Of the batch, in the last dimension of lengths and the one before features."""
    rows = range(distributed.get_rank(), N, distributed.get_world_size())
    return of.index_select(1 if of.dim() == 3 else 0, torch.tensor(rows))


def train(model: nn.Module, x: Tensor, lengths: Tensor, form: str, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(3):
        optimizer.zero_grad()
        model(x, lengths, form).backward()
        optimizer.step()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), 0.01)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_as_alone(model: nn.Module, alone: nn.Module) -> None:
    """Weights and last gradients."""
    for (name, ours), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
        for of in ("", ".grad"):
            a, e = (t.grad if of else t for t in (ours, expected))
            torch.testing.assert_close(whole(a), e, msg=lambda text, what=name + of: f"{what}: {text}")


def data_parallel(layer: str, form: str, **options: bool) -> None:
    alone, x = problem(layer)
    model = DistributedDataParallel(copy.deepcopy(alone), **options)
    train(model, share(x), share(LENGTHS), form, adam(model))
    train(alone, x, LENGTHS, form, adam(alone))
    assert_as_alone(model.module, alone)


def sharded(layer: str, form: str) -> None:
    alone, x = problem(layer)
    model = copy.deepcopy(alone)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for module in (model.rnn, model):
        fully_shard(module, mesh=mesh)
    train(model, share(x), share(LENGTHS), form, adam(model))
    train(alone, x, LENGTHS, form, adam(alone))
    assert_as_alone(model, alone)


def saved_and_loaded(directory: Path) -> None:
    """By shards, to go on from with other shards; and for torch.nn's own layers."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))

    def make() -> tuple[nn.Module, torch.optim.Optimizer, nn.Module, Tensor]:
        alone, x = problem("LSTM")
        model = fully_shard(copy.deepcopy(alone), mesh=mesh)
        return model, adam(model), alone, x

    model, optimizer, alone, x = make()
    train(model, share(x), share(LENGTHS), "lengths", optimizer)
    kept = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    checkpoint.save(kept, checkpoint_id=directory)
    again, other, _, _ = make()
    nn.init.zeros_(again.head.weight)
    state = dict(zip(("model", "optimizer"), get_state_dict(again, other)))
    checkpoint.load(state, checkpoint_id=directory)
    set_state_dict(again, other, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    train(again, share(x), share(LENGTHS), "lengths", other)
    of_one = adam(alone)
    train(alone, x, LENGTHS, "lengths", of_one)
    of_torch = Model("LSTM", nn)
    state = of_torch.state_dict()
    checkpoint.load({"model": state}, checkpoint_id=directory)
    torch.testing.assert_close(of_torch.state_dict(), alone.state_dict())
    train(alone, x, LENGTHS, "lengths", of_one)
    assert_as_alone(again, alone)


def checks(directory: Path) -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {"checkpoint": lambda: saved_and_loaded(directory / "checkpoint")}
    for layer in LAYERS:
        for form in FORMS:
            found[f"ddp-{layer}-{form}"] = lambda layer=layer, form=form: data_parallel(layer, form)
            found[f"fsdp-{layer}-{form}"] = lambda layer=layer, form=form: sharded(layer, form)
    for option in ("gradient_as_bucket_view", "static_graph"):
        found[f"ddp-{option}"] = lambda option=option: data_parallel("LSTM", "packed", **{option: True})
    return found


def failure(check: Callable[[], None]) -> str:
    """Empty if there is none. A warning is one: of unused parameters, say, or of strides."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            check()
        except Exception:
            return traceback.format_exc()
    return "\n".join(str(warning.message) for warning in caught)


if __name__ == "__main__":
    where = Path(sys.argv[1])
    distributed.init_process_group("gloo")
    result = {name: failure(check) for name, check in checks(where).items()}
    (where / f"{distributed.get_rank()}.json").write_text(json.dumps(result))
    distributed.destroy_process_group()
