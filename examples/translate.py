"""When was the 3rd of May '79? Many to many, of unequal lengths: a date as people write it in, an ISO date out.

    python examples/translate.py --save translate.safetensors
    python examples/translate.py --load translate.safetensors --translate "Sunday, 17 july 1994"

An encoder reads the text in both directions. A decoder goes on from its last states and writes one character after
another; for each it looks back at the text, and the picture shows where. In training it is told the true character
before (teacher forcing), later it reads its own.
"""

import random
from datetime import date, timedelta

import torch
from common import CELLS, BadInput, Checkpoint, compare, make_parser, positive, report, run, save
from matplotlib.figure import Figure
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from tqdm import tqdm

DATES = [date(1950, 1, 1) + timedelta(days) for days in range(36_525)]  # a hundred years, so that '79 is one of them
FORMATS = """{d} %B %Y|{d} %b '%y|%d %B %y|{d}{th} %b %Y|%B {d}, %Y|%b {d}{th}, '%y|the {d}{th} of %B %Y|%A, {d} %B %Y
%a %b {d} %Y|%Y, %B {d}|{d}-%b-%y|%d.%m.%Y|{d}.{m}.%y|%m/%d/%Y|{m}/{d}/%y|%Y%m%d""".replace("\n", "|")
CHARACTERS = "_abcdefghijklmnopqrstuvwxyz0123456789 ,./-'"  # the first one pads, and starts an answer


def written(day, rng):
    """A date in one of the ways in which people write it."""
    th = {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10 * (day.day not in (11, 12, 13)), "th")
    return day.strftime(rng.choice(FORMATS.split("|"))).format(d=day.day, m=day.month, th=th)


def encode(text):
    return torch.tensor([CHARACTERS.index(character) for character in text.lower()])


def make_batches(days, seed, size=64):
    """Batches of (texts, answers): each day once, written in a way drawn at random."""
    rng = random.Random(seed)
    days = rng.sample(days, len(days))
    parts = [days[start : start + size] for start in range(0, len(days), size)]
    return [([encode(written(d, rng)) for d in part], torch.stack([encode(str(d)) for d in part])) for part in parts]


class Translator(nn.Module):
    def __init__(self, cell, hidden, embedding=32):
        super().__init__()
        self.embedding = nn.Embedding(len(CHARACTERS), embedding, padding_idx=0)
        self.encoder = CELLS[cell](embedding, hidden, batch_first=True, bidirectional=True)
        self.decoder = CELLS[cell](embedding, 2 * hidden, batch_first=True)
        self.head = nn.Linear(4 * hidden, len(CHARACTERS))

    def encode(self, texts):
        """What is known at each character of the texts, ``[N, T, 2H]``, where there is one, and the last states."""
        padded = pad_sequence(texts, batch_first=True).to(self.head.weight.device)
        lengths = torch.tensor([len(text) for text in texts])
        packed = pack_padded_sequence(self.embedding(padded), lengths, batch_first=True, enforce_sorted=False)
        output, state = self.encoder(packed)
        memory, _ = pad_packed_sequence(output, batch_first=True)
        join = lambda s: torch.cat([s[0], s[1]], dim=1).unsqueeze(0)  # both directions, as one layer twice as wide
        return memory, padded > 0, tuple(map(join, state)) if isinstance(state, tuple) else join(state)

    def decode(self, previous, memory, mask, state):
        """Logits of what follows each of ``previous [N, S]``, where it looked, ``[N, S, T]``, and the state."""
        output, state = self.decoder(self.embedding(previous), state)
        scores = output @ memory.mT / memory.size(2) ** 0.5
        attention = scores.masked_fill(~mask[:, None], -torch.inf).softmax(dim=2)
        return self.head(torch.cat([output, attention @ memory], dim=2)), attention, state

    def forward(self, texts, answers):
        """Teacher forcing: all characters before are known, so that the decoder takes all its steps in one call."""
        previous = nn.functional.pad(answers[:, :-1], (1, 0))
        return self.decode(previous, *self.encode(texts))[0]

    @torch.inference_mode()
    def translate(self, texts):
        """Greedy decoding: the likeliest character is written, and read in the next step."""
        memory, mask, state = self.encode(texts)
        steps = [(torch.zeros(len(texts), 1, dtype=torch.long, device=memory.device), None)]
        for _ in "1979-05-03":
            logits, attention, state = self.decode(steps[-1][0], memory, mask, state)
            steps.append((logits.argmax(dim=2), attention))
        numbers, attention = (torch.cat(of, dim=1).cpu() for of in zip(*steps[1:]))
        return ["".join(CHARACTERS[number] for number in row) for row in numbers.tolist()], attention


def train(model, batches, optimizer):
    for texts, answers in batches:
        answers = answers.to(model.head.weight.device)
        loss = nn.functional.cross_entropy(model(texts, answers).flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def exact_match(model, days):
    """The share of the days that are translated without a mistake."""
    rng = random.Random(0)
    answers, _ = model.translate([encode(written(day, rng)) for day in days])
    return sum(answer == str(day) for day, answer in zip(days, answers)) / len(days)


def plot(texts, translations, attentions, path):
    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, text, translation, attention in zip(figure.subplots(2, 2).flat, texts, translations, attentions):
        axes.imshow(attention[:, : len(text)].numpy(), cmap="Greys", aspect="auto", vmin=0, vmax=1)
        axes.set_xticks(range(len(text)), text)
        axes.set_yticks(range(len(translation)), translation)
    figure.suptitle("Where it looked (across) for each character that it wrote (down)")
    figure.savefig(path, dpi=120)


def main(args):
    if args.translate is not None:
        if not args.load:
            raise BadInput("--translate needs a trained model: name one with --load.")
        if not args.translate or not set(args.translate.lower()) <= set(CHARACTERS[1:]):
            raise BadInput(f'A date is written with "{CHARACTERS[1:]}", and not as "{args.translate}".')
    model, done = Translator(args.cell, args.hidden).to(args.device), 0
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    if args.load:
        checkpoint = Checkpoint(args.load, "epoch")
        checkpoint.restore(model, optimizer)
        done = checkpoint.metadata["epoch"]
    if args.translate is not None:
        print(model.translate([encode(args.translate)])[0][0])
        return

    days = random.Random(0).sample(DATES, len(DATES))
    held_out, days = days[: len(DATES) // 10], days[len(DATES) // 10 :][: args.days]
    for epoch in range(done + 1, args.epochs + 1):
        train(model, tqdm(make_batches(days, args.seed + epoch), f"epoch {epoch}", unit="batch"), optimizer)
    if args.save:
        save(args.save, model, optimizer, epoch=max(done, args.epochs))

    texts = [written(day, random.Random(number)) for number, day in enumerate(held_out[:4])]
    translations, attentions = model.translate([encode(text) for text in texts])
    for text, translation in zip(texts, translations):
        print(f"{text:30} {translation}")
    plot(texts, translations, attentions, args.plot)
    report("exact match", exact_match(model, held_out))
    if args.compare:
        batches = make_batches(days, args.seed)[:50]
        compare(model, lambda model: train(model, batches, torch.optim.Adam(model.parameters())))


if __name__ == "__main__":
    parser = make_parser(__doc__, epochs=2, lr=3e-3)
    add = parser.add_argument
    add("--cell", choices=CELLS, default="gru", help="recurrent cell (gru)")
    add("--hidden", type=positive, default=64, help="units of a direction of the encoder, half of the decoder's (64)")
    add("--days", type=positive, help="to learn from (the nine tenths of a hundred years that are not held out)")
    add("--translate", metavar="TEXT", help="translate this date with the model of --load")
    run(parser, main)
