"""What the examples share: options, checkpoints, the line with the result, and one way to refuse bad input."""

import argparse
import contextlib
import copy
import json
import math
import os
import random
import statistics
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import rnnfast

CELLS = {"lstm": rnnfast.LSTM, "gru": rnnfast.GRU, "rnn": rnnfast.RNN}
START = time.perf_counter()


class BadInput(Exception):
    """What the user gave cannot be used; the message is the one sentence that says why."""


def positive(text):
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def seed(text):
    value = int(text)
    if not 0 <= value < 2**32:
        raise ValueError
    return value


def positive_float(text):
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


def make_parser(description, epochs, short_epochs=1, lr=None, plots=(".png",)):
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.set_defaults(full_epochs=epochs, short_epochs=short_epochs, plots=plots)
    add = parser.add_argument
    add("--seed", type=seed, default=0, help="of the weights, the batches and the dropout (0)")
    add(
        "--epochs",
        type=positive,
        help=f"counted from the start, also after --load ({epochs}, with --short {short_epochs})",
    )
    if lr:
        add("--lr", type=positive_float, default=lr, help=f"learning rate of Adam ({lr})")
    add("--device", default="cpu", help="such as cpu or cuda (cpu)")
    add("--backend", help="of rnnfast, such as cpu or reference (the best for the device)")
    add("--save", type=Path, metavar="FILE", help="write a checkpoint, in the format of safetensors")
    add("--load", type=Path, metavar="FILE", help="go on from such a checkpoint")
    add("--plot", type=Path, metavar="FILE", default=f"{Path(parser.prog).stem}.png", help="where the picture goes")
    add("--short", action="store_true", help="train less: what `make examples` runs")
    add("--compare", action="store_true", help="then time the same training with torch.nn and with rnnfast")
    return parser


def run(parser, main):
    """Call ``main(args)`` with what all examples take checked and prepared."""
    args = parser.parse_args()
    if args.epochs is None:
        args.epochs = args.short_epochs if args.short else args.full_epochs
    with refusing(parser):
        check(args)
        random.seed(args.seed)
        torch.manual_seed(args.seed)
        with use_backend(args.backend):
            main(args)


def use_backend(name):
    return rnnfast.use_backend(name) if name else contextlib.nullcontext()


@contextlib.contextmanager
def refusing(parser):
    """Bad input ends in one sentence on stderr and exit code 2."""
    try:
        yield
        return
    except BadInput as error:
        why = str(error)
    except OSError as error:
        why = f"{error.filename}: {error.strerror}." if error.filename else f"{error}."
    except ModuleNotFoundError as error:
        why = f"The package {error.name.split('.')[0]} is not installed (pip install rnnfast[examples])."
    parser.exit(2, f"{parser.prog}: {why}\n")


def check(args):
    check_plot(args.plot, *args.plots)
    if args.save:
        check_writable(args.save)
    try:
        args.device = torch.device(args.device)
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BadInput(f"The device {args.device} cannot be used: {str(error).splitlines()[0].rstrip('.')}.") from error
    try:
        with use_backend(args.backend):
            rnnfast.explain(rnnfast.RNN(1, 1, device=args.device), torch.zeros(1, 1, 1, device=args.device))
    except (RuntimeError, ValueError) as error:
        raise BadInput(f"The backend {args.backend} cannot be used: {error}.") from error


def check_plot(path, *suffixes):
    if path.suffix not in suffixes:
        raise BadInput(f"--plot must name a {' or '.join(suffixes)} file, and {path} does not.")
    check_writable(path)


def check_writable(path):
    """Better now than after the training."""
    if not os.access(path.parent, os.W_OK) or (path.exists() and not (path.is_file() and os.access(path, os.W_OK))):
        raise BadInput(f"{path} cannot be written.")


def report(name, value):
    """The line that `make examples` collects."""
    print(f"metric: {name} {value:.4g} in {time.perf_counter() - START:.0f} s", flush=True)


def detach(state):
    """A state, or the two of an LSTM, to go on from without a gradient going back."""
    return tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()


def plot_progress(path, losses, title, scores):
    """A picture of the loss of each step and of a score after each epoch."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    window = min(50, len(losses))
    left.plot(torch.tensor(losses).unfold(0, window, 1).mean(1).numpy())
    left.set(title=f"Training loss, mean of {window} steps", xlabel="step")
    right.plot(range(1, len(scores) + 1), scores, marker="o")
    right.set(title=title, xlabel="epoch")
    figure.savefig(path, dpi=120)


def compare(model, train, what="time", rounds=3):
    """Print the seconds of ``train(model)`` with torch.nn's layers and with rnnfast's, which take turns.

    Both start from copies of the model and get the same random numbers. The first round of each warms up.
    """
    models = {"torch.nn": rnnfast.revert(copy.deepcopy(model)), "rnnfast": copy.deepcopy(model)}
    seconds = {name: [] for name in models}
    for number in range(1 + rounds):
        for name, contestant in models.items():
            torch.manual_seed(number)
            start = time.perf_counter()
            train(contestant)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    print(f"{what}: " + ", ".join(f"{name} {statistics.median(found[1:]):.3g} s" for name, found in seconds.items()))


def save(path, model, optimizer=None, **metadata):
    """Write the model's tensors under their own names, the optimizer's beside them, and metadata as JSON.

    All goes to a file beside ``path``, which then takes its place: at any time one of them is whole.
    """
    path, tensors = path.resolve(), dict(model.state_dict())
    if optimizer is not None:
        for number, of in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in of.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, {name: json.dumps(value) for name, value in metadata.items()})
        os.replace(temporary, path)
    except SafetensorError as error:
        raise BadInput(f"{path} cannot be written: {error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


class Checkpoint:
    """What ``save`` wrote: ``tensors`` and ``metadata``, of which the names in ``needed`` must be there."""

    def __init__(self, path, *needed):
        self.path = path
        try:
            path.open("rb").close()  # an OSError that names the file; that of safetensors does not
            with safe_open(path, "pt") as file:
                self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                self.metadata = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
        except (SafetensorError, json.JSONDecodeError) as error:
            raise BadInput(f"{path} is no checkpoint: {error}.") from error
        if missing := set(needed) - self.metadata.keys():
            raise BadInput(f"{path} is no checkpoint of this example: it has no {' and no '.join(sorted(missing))}.")

    def restore(self, model, optimizer=None):
        mine = {name: tensor.shape for name, tensor in model.state_dict().items()}
        its = {name: tensor.shape for name, tensor in self.tensors.items() if not name.startswith("optimizer.")}
        for name in sorted(mine.keys() | its.keys()):
            if mine.get(name) != its.get(name):
                here, there = (f"has {list(of[name])}" if name in of else "has none" for of in (mine, its))
                raise BadInput(f"{self.path} is of another model: of {name} it {there}, and the model {here}.")
        model.load_state_dict({name: self.tensors[name] for name in mine})
        if optimizer is not None:
            state = {}
            for name in self.tensors.keys() - its.keys():
                _, number, key = name.split(".")
                state.setdefault(int(number), {})[key] = self.tensors[name].clone()  # Adam adds to it in place
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
