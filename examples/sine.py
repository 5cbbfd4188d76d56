"""Sine in, cosine out. Many to many: for each value that a small net reads it says another one.

    python examples/sine.py --plot sine.gif
    python examples/sine.py --show

From one value of a sine nobody can tell the cosine: is it going up or down? The hidden state remembers. From one window
to the next it is carried over, detached: its value goes on, and no gradient goes back.
"""

import math

import matplotlib
import numpy as np
import torch
from common import CELLS, BadInput, Checkpoint, compare, detach, make_parser, positive, report, run, save
from matplotlib import animation, pyplot
from torch import nn
from tqdm import trange

STEPS = 10  # of a window, which is half a period long


class SineToCosine(nn.Module):
    def __init__(self, cell, hidden):
        super().__init__()
        self.rnn = CELLS[cell](1, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 1)

    def forward(self, sine, state=None):
        output, state = self.rnn(sine, state)
        return self.head(output), state


def window(number, device):
    """The times of a window, and there the sine and the cosine."""
    time = math.pi * (number + torch.arange(STEPS, device=device) / STEPS)
    return time, time.sin().view(1, STEPS, 1), time.cos().view(1, STEPS, 1)


def train_window(model, optimizer, number, state):
    _, sine, cosine = window(number, model.head.weight.device)
    output, state = model(sine, state)
    loss = nn.functional.mse_loss(output, cosine)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item(), output.detach().flatten().cpu(), detach(state)


def train_windows(model, lr, count):
    optimizer, state = torch.optim.Adam(model.parameters(), lr), None
    for number in range(count):
        _, _, state = train_window(model, optimizer, number, state)


@torch.inference_mode()
def evaluate(model, windows=20):
    """The mean squared error on a sine that starts anew, after a window that fills the state, and the last windows."""
    results, state = [], None
    for number in range(1 + windows):
        _, sine, cosine = window(number, model.head.weight.device)
        output, state = model(sine, state)
        results.append((number, nn.functional.mse_loss(output, cosine).item(), output.flatten().cpu()))
    return sum(loss for _, loss, _ in results[1:]) / windows, results[-6:]


def draw(axes, title, recent):
    """The last few windows, given as (number, loss, output)."""
    time = torch.cat([window(number, "cpu")[0] for number, _, _ in recent]).numpy()
    axes.clear()
    axes.plot(time, np.sin(time), color="lightsteelblue", label="sine, read")
    axes.plot(time, np.cos(time), color="silver", linewidth=5, label="cosine, wanted")
    axes.plot(time, torch.cat([output for _, _, output in recent]).numpy(), color="tab:red", label="said")
    axes.set(title=title, xlabel="time", ylim=(-1.5, 1.2))
    axes.legend(loc="lower center", ncols=3)


def main(args):
    gif = args.plot.suffix == ".gif"
    model = SineToCosine(args.cell, args.hidden).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    done, state = 0, None
    if args.load:
        checkpoint = Checkpoint(args.load, "windows", "state")
        checkpoint.restore(model, optimizer)
        done, state = checkpoint.metadata["windows"], tuple(torch.tensor(checkpoint.metadata["state"]).to(args.device))
        state = state if args.cell == "lstm" else state[0]

    if not args.show:
        matplotlib.use("agg")  # draws into memory: no screen is needed
    elif pyplot.get_backend().lower() == "agg":
        raise BadInput("--show needs a screen.")
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    film, recent = animation.PillowWriter(fps=8), []
    if gif:
        film.setup(figure, args.plot, dpi=70)
    for number in (progress := trange(done, args.epochs, desc="training", unit="window")):
        loss, output, state = train_window(model, optimizer, number, state)
        progress.set_postfix(loss=f"{loss:.4f}", refresh=False)
        recent = [*recent[-5:], (number, loss, output)]
        filmed = gif and number < done + 150
        if args.show or filmed:
            draw(axes, f"window {number + 1}, loss {loss:.4f}", recent)
        if filmed:
            film.grab_frame()
        if args.show:
            pyplot.pause(0.02)

    error, recent = evaluate(model)
    draw(axes, f"a sine that starts anew, after {max(done, args.epochs)} windows of learning", recent)
    if gif:
        film.grab_frame()
        film.finish()
    else:
        figure.savefig(args.plot, dpi=120)
    if args.save:
        states = state if args.cell == "lstm" else (state,)
        save(args.save, model, optimizer, windows=max(done, args.epochs), state=[s.tolist() for s in states])
    report("squared error", error)
    if args.compare:
        compare(model, lambda model: train_windows(model, args.lr, 100))


if __name__ == "__main__":
    parser = make_parser(__doc__, epochs=300, short_epochs=150, lr=1e-2, plots=(".png", ".gif"))
    add = parser.add_argument
    add("--cell", choices=CELLS, default="rnn", help="recurrent cell (rnn)")
    add("--hidden", type=positive, default=32, help="units of the recurrent layer (32)")
    add("--show", action="store_true", help="show the plot in a window while the net learns")
    run(parser, main)
