"""What the library computes, by hand: an Elman net and backpropagation through time in NumPy, from the equations.

    h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)

Its outputs and gradients are checked against rnnfast's. The picture shows what becomes of a gradient on its way back
through a hundred steps, and the net being trained by hand, with and without clipping.
"""

import copy
import sys

import numpy as np
import torch
from common import CELLS, Checkpoint, compare, make_parser, report, run, save
from matplotlib.figure import Figure
from torch import nn
from tqdm import trange


class Echo(nn.Module):
    """Says at the end of a sequence the number with which it began."""

    def __init__(self, hidden):
        super().__init__()
        self.rnn = CELLS["rnn"](1, hidden, dtype=torch.float64)
        self.head = nn.Linear(hidden, 1, dtype=torch.float64)
        give_gain(self.rnn, 1.2)

    def forward(self, x):
        output, _ = self.rnn(x)
        return self.head(output[-1])


def give_gain(layer, gain):
    """Make W_hh, of each gate, a rotation times the gain: by that a step multiplies h, and on the way back dL/dh."""
    for w in layer.weight_hh_l0.detach().split(layer.hidden_size):
        nn.init.orthogonal_(w, gain)


def forward(x, h_0, W_ih, W_hh, b_ih, b_hh):
    """From ``x [T, N, I]`` and ``h_0 [N, H]`` to h, ``[1 + T, N, H]``: h_0 and the states after it."""
    h = [h_0]
    for x_t in x:
        h.append(np.tanh(x_t @ W_ih.T + b_ih + h[-1] @ W_hh.T + b_hh))
    return np.stack(h)


def backward(d_output, x, h, W_ih, W_hh, b_ih, b_hh):
    """From dL/doutput ``[T, N, H]`` to the gradients of all that ``forward`` takes."""
    d_x, d_W_ih, d_W_hh, d_b = np.zeros_like(x), np.zeros_like(W_ih), np.zeros_like(W_hh), np.zeros_like(b_ih)
    d_h = np.zeros_like(h[0])
    for t in reversed(range(len(x))):
        d_h = d_h + d_output[t]  # h_t is what comes out at t, and what goes into step t + 1
        d_a = d_h * (1 - h[t + 1] ** 2)  # a is what tanh is taken of, and tanh' = 1 - tanh²
        d_W_ih += d_a.T @ x[t]
        d_W_hh += d_a.T @ h[t]  # h[t] is h_{t-1}, since h[0] is h_0
        d_b += d_a.sum(axis=0)
        d_x[t] = d_a @ W_ih
        d_h = d_a @ W_hh
    return d_x, d_h, d_W_ih, d_W_hh, d_b, d_b


def clip(gradients, longest):
    """Shorten all gradients, taken as one vector, to a length; also its length before."""
    norm = np.sqrt(sum((g**2).sum() for g in gradients))
    return [g * min(1, longest / norm) for g in gradients], norm


def largest_difference(layer, device):
    """Between this file's outputs and gradients and those of rnnfast, for random input."""
    x, h_0, d_output = (torch.randn(steps, 5, size).double() for steps, size in ((20, 1), (1, 32), (20, 32)))
    weights = [weight.detach().numpy() for weight in layer.parameters()]
    h = forward(x.numpy(), h_0[0].numpy(), *weights)
    by_hand = [h[1:], *backward(d_output.numpy(), x.numpy(), h, *weights)]

    layer = copy.deepcopy(layer).to(device)
    x, h_0, d_output = (tensor.to(device).requires_grad_() for tensor in (x, h_0, d_output))
    output, _ = layer(x, h_0)
    by_rnnfast = [output, *torch.autograd.grad(output, [x, h_0, *layer.parameters()], d_output)]
    differences = [np.abs(a - b.detach().cpu().numpy()).max() for a, b in zip(by_hand, by_rnnfast)]
    for name, difference in zip(("output", "d_x", "d_h_0", "d_W_ih", "d_W_hh", "d_b_ih", "d_b_hh"), differences):
        print(f"{name:6} by hand and by rnnfast differ by {difference:.1e} at most")
    return float(np.max(differences))  # NaN, if one is


def gradient_lengths(cell, gain, gate_bias, device):
    """Of the gradient of the last of a hundred outputs with respect to what was read at each step."""
    layer = CELLS[cell](1, 64, dtype=torch.float64, device=device)
    give_gain(layer, gain)
    with torch.no_grad():
        layer.bias_hh_l0[64:128] += gate_bias  # the gate by which an LSTM or a GRU keeps its state
    x = torch.randn(100, 8, 1, dtype=torch.float64, device=device).mul_(0.1).requires_grad_()
    output, _ = layer(x)
    return torch.autograd.grad(output[-1].sum(), x)[0].norm(dim=(1, 2)).cpu()


def make_batch(seed, steps=50, rows=32):
    return np.random.default_rng(seed).standard_normal((steps, rows, 1))


def train(model, longest, steps, seed, lr=0.03):
    """Gradient descent by hand: returns the loss and the length of the gradient at each step."""
    history = []
    *weights, V, c = parameters = [parameter.detach().numpy() for parameter in model.parameters()]  # the same memory
    for step in steps:
        x = make_batch([seed, step])
        h = forward(x, np.zeros((x.shape[1], len(V.T))), *weights)
        error = h[-1] @ V.T + c - x[0]
        d_y = 2 * error / error.size  # the loss is the mean of error²
        d_output = np.zeros_like(h[1:])
        d_output[-1] = d_y @ V
        _, _, *gradients = backward(d_output, x, h, *weights)
        gradients, length = clip([*gradients, d_y.T @ h[-1], d_y.sum(axis=0)], longest)
        for parameter, gradient in zip(parameters, gradients):
            parameter -= lr * gradient
        history.append(((error**2).mean(), length))
    return history


def plot(histories, device, path):
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for color, cell, (low, high) in (("red", "rnn", (0.8, 2)), ("blue", "lstm", (1, 6)), ("green", "gru", (1, 6))):
        for style, gain, gate_bias in (("-", low, 0), ("--", high, 0), (":", low, 4))[: 2 if cell == "rnn" else 3]:
            label = f"{cell.upper()}, W_hh x {gain}" + ", gates open" * bool(gate_bias)
            lengths = gradient_lengths(cell, gain, gate_bias, device).flip(0)
            left.plot(lengths.numpy(), style, color=f"tab:{color}", label=label)
    left.set(title="Length of a gradient that goes back", xlabel="steps", yscale="log", ylim=(1e-16, 1e26))
    left.legend(fontsize="x-small", loc="upper left")
    for name, history in histories.items():
        for axes, column in ((middle, 0), (right, 1)):
            axes.plot([step[column] for step in history], label=name, linewidth=0.8)
    middle.set(title="Loss", xlabel="training step", ylim=(0, 2))
    right.set(title="Length of the gradient before clipping", xlabel="training step", yscale="log")
    middle.legend()
    figure.savefig(path, dpi=100)


def main(args):
    model, done = Echo(32), 0
    if args.load:
        checkpoint = Checkpoint(args.load, "steps")
        checkpoint.restore(model)
        done = checkpoint.metadata["steps"]
    difference = largest_difference(model.rnn, args.device)
    if not difference < 1e-6:  # true of NaN, too
        sys.exit("By hand and by rnnfast it is not the same.")
    histories = {
        name: train(trained, longest, trange(done, args.epochs, desc=name, unit="step"), args.seed)
        for name, trained, longest in (("not clipped", copy.deepcopy(model), np.inf), ("clipped to 1", model, 1.0))
    }
    plot(histories, args.device, args.plot)
    if args.save:
        save(args.save, model, steps=max(done, args.epochs))
    report("largest difference", difference)
    if args.compare:
        x = torch.from_numpy(make_batch(args.seed)).to(args.device)
        compare(
            model.to(args.device), lambda model: [nn.functional.mse_loss(model(x), x[0]).backward() for _ in range(20)]
        )


if __name__ == "__main__":
    run(make_parser(__doc__, epochs=600, short_epochs=300), main)
