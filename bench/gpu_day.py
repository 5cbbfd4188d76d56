"""Everything that half an hour on a GPU can tell, in stages in the order of their worth.

    python bench/gpu_day.py               # results/<gpu>/, in up to 30 minutes
    python bench/gpu_day.py --minutes 9   # stops in time
    python bench/gpu_day.py --resume      # goes on where the last one stopped
    python bench/gpu_day.py --rehearse    # all of it without a GPU: the tests' emulation, tiny sizes

A stage is a process of its own, with a time limit. Each of its items (a test, a row of the table) is recorded when it
ends, so a stop at any moment leaves what was found until then. One that hangs or kills its process is recorded as such,
and a new process goes on with the next.

The folder then holds records.jsonl, a line for each item; and, made from it, table.csv (the columns of run.py),
costs.json, flex.json, failures.txt (a line each) and summary.txt (a line for each stage). log.txt is what the
processes printed.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
AGAIN = 3  # exit status of a process that wants a new one for the rest
RESTARTS = 6  # after that many hangs and deaths a stage is given up
GOOD = ("passed", "skipped")

# The tests of test_gpu.py by worth, for pytest's -k. smoke: each CUDA kernel in every form of a sequence. triton: its
# kernels, each of which takes seconds to compile. forms: all else that is fast. deep: large sizes, and Triton's rest.
# And all of test_gpu_flex.py: cells.
DEEP = "(sizes[ or hidden_size or long_sequence or many_rows or 32_bits)"
TRITON = "triton and (names_the_kernel or (twice_torchs and (H63 or wide) and (lstm or gru or tanh) and {}))"
TRITON = TRITON.format("(float32 or bfloat16)")
TESTS = {
    "smoke": "not triton and (every_regime[ or names_the_kernel or choice_is)",
    "triton": TRITON,
    "cells": "",
    "forms": f"not (triton or every_regime[ or names_the_kernel or choice_is or sanitizer or {DEEP})",
    "sanitizer": "sanitizer",
    "deep": f"({DEEP} and not triton) or (triton and not ({TRITON}))",
}
# Of each a few that take the emulation or the interpreter seconds.
REHEARSED = {
    "smoke": "every_regime[ and lstm-5-float32-rect",
    "triton": "H63 and tanh and float32 and packed",
    "cells": "what_runs[fused] or (mgu and fused)",
    "forms": "eval_mode and lstm",
    "sanitizer": "chip",
    "deep": "sizes[ and tanh-1-9 and bfloat16",
}


class Stage(NamedTuple):
    name: str
    predicted: float  # seconds, on an H200 and 16 cores
    limit: float  # seconds
    patience: float  # seconds after which one item hangs
    command: list[str]
    complete: tuple[int, ...] = (0,)  # exit statuses
    worst: Callable | None = None  # of its figures: min or max
    figure: str = ""


def stages(rehearsed: bool) -> list[Stage]:
    def work(name: str, *args: Any) -> Stage:
        return Stage(name, *args[:3], [sys.executable, str(BENCH / "gpu_work.py"), name], (0,), *args[3:])

    def tests(name: str, *args: Any, workers: int) -> Stage:
        chosen = " and ".join(f"({words})" for words in (TESTS[name], REHEARSED[name] if rehearsed else "") if words)
        file = ROOT / "tests" / ("test_gpu_flex.py" if name == "cells" else "test_gpu.py")
        command = [sys.executable, "-m", "pytest", str(file), "-p", "gpu_tests", "-k", chosen]
        command += ["-q", "--tb=line", "-p", "no:cacheprovider", "--maxfail", "40"]  # more tell no more
        workers = min(workers, os.cpu_count() or 1)
        if workers > 1 and not rehearsed and importlib.util.find_spec("xdist"):
            command += ["-n", str(workers)]
        return Stage(name, *args, command, (0, 1, 2, 5))  # 1: some failed; 2: too many; 5: none is left

    return [
        work("versions", 56, 200, 40, max, "largest error"),
        tests("smoke", 150, 240, 30, workers=8),
        tests("triton", 70, 120, 90, workers=14),
        tests("cells", 130, 160, 90, workers=14),
        work("cudnn", 90, 160, 60, min, "least ratio"),
        work("costs", 60, 120, 30, max, "largest error"),
        work("flex", 40, 120, 60, min, "least ratio"),
        tests("forms", 250, 400, 60, workers=8),
        tests("sanitizer", 150, 300, 200, workers=8),
        tests("deep", 320, 480, 120, workers=12),
        work("more", 120, 300, 60, min, "least ratio"),
    ]


class Results:
    """The records of a folder, and the files that are made from them."""

    def __init__(self, folder: Path, anew: list[str]) -> None:
        """Those of the stages that are to run anew are dropped."""
        self.folder, self.path = folder, folder / "records.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        whole = [line for line in lines if line.endswith("}")]  # the last one may have been cut short
        self.records = [record for record in map(json.loads, whole) if record["stage"] not in anew]
        self.path.write_text("".join(json.dumps(record) + "\n" for record in self.records))
        self.write()

    def add(self, stage: str, **record: Any) -> None:
        self.records.append({"stage": stage, **record})
        with self.path.open("a") as file:
            file.write(json.dumps(self.records[-1]) + "\n")
        # Costs are many and take milliseconds, less than their file does.
        if record.keys() & {"row", "line"} or record["outcome"] not in GOOD or len(self.records) % 100 == 0:
            self.write()

    def of(self, stage: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["stage"] == stage and "item" in record]

    def has_ended(self, stage: str) -> bool:
        return any(record["stage"] == stage and record.get("ended") for record in self.records)

    def write(self) -> None:
        rows = [record["row"] for record in self.records if "row" in record]
        if rows:
            with (self.folder / "table.csv").open("w", newline="") as file:
                table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
                table.writeheader()
                table.writerows(rows)
        for stage in ("costs", "flex"):
            without = ("stage", "seconds", "figure")
            lines = [json.dumps({k: v for k, v in of.items() if k not in without}) for of in self.of(stage)]
            if lines:
                (self.folder / f"{stage}.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")
        bad = [record for record in self.records if record.get("outcome", "passed") not in GOOD]
        text = "".join(f"{r['stage']}: {r['item']}: {r['outcome']}: {r.get('reason', '')}\n" for r in bad)
        (self.folder / "failures.txt").write_text(text)
        last = {record["stage"]: record["line"] for record in self.records if "line" in record}
        (self.folder / "summary.txt").write_text("".join(f"{line}\n" for line in last.values()))


def run_stage(stage: Stage, results: Results, until: float, environment: dict[str, str]) -> str:
    """Until all items are done or ``until``, a time of the monotonic clock. Returns how it ended, where not well."""
    for _ in range(RESTARTS):
        while True:
            before = len(results.of(stage.name))
            status = _attempt(stage, results, until, environment)
            if status != AGAIN or len(results.of(stage.name)) == before:
                break
        if status in stage.complete and results.of(stage.name):
            return ""
        if status == "late":
            return "stopped by its time limit"
        if len(results.of(stage.name)) == before:
            return f"given up: exit status {status}, see log.txt"
    return f"given up after {RESTARTS} hangs or deaths"


def _attempt(stage: Stage, results: Results, until: float, environment: dict[str, str]) -> int | str:
    """One process: its exit status, ``hang`` or ``late``. Items that were running at its death or hang are recorded."""
    running: dict[str, float] = {}
    done = {record["item"] for record in results.of(stage.name)}
    with tempfile.TemporaryDirectory() as folder, (results.folder / "log.txt").open("a+", errors="replace") as log:
        report, left_out = Path(folder, "report"), Path(folder, "done")
        report.touch()
        left_out.write_text("\n".join(done))
        command = [*stage.command, "--report", str(report), "--done", str(left_out)]
        printed = log.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=ROOT / "tests", env=environment, start_new_session=True
        )
        try:
            with report.open() as said:
                status, unfinished, heard = None, "", time.monotonic()
                while status is None:
                    status = process.poll()  # before the last lines are read
                    *lines, unfinished = (unfinished + said.read()).split("\n")
                    now = time.monotonic()
                    for line in map(json.loads, lines):
                        heard = now
                        if "start" in line:
                            running[line["start"]] = now
                        elif line["item"] not in done:  # a test may fail twice, when it runs and when it ends
                            running.pop(line["item"], None)
                            done.add(line["item"])
                            results.add(stage.name, **line)
                    # A process may take long to start; of those that run, only some hang.
                    late = [item for item, since in running.items() if now - since > stage.patience]
                    if status is None and (late or (not running and now - heard > stage.patience + 60)):
                        status, running = "hang", dict.fromkeys(late, 0)
                    elif status is None and now > until:
                        status, running = "late", {}
                    time.sleep(0.02)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold one whose kernel hangs
                process.wait(20)
        log.seek(printed)
        words = [line.strip() for line in log.read().splitlines() if line.strip()]
    if status not in (*stage.complete, AGAIN):
        for item in running:
            reason = (
                f"after {stage.patience:.0f} s" if status == "hang" else f"exit status {status}: {(words or [''])[-1]}"
            )
            results.add(stage.name, item=item, outcome="hang" if status == "hang" else "died", reason=reason[:300])
    return status


def line_of(stage: Stage, results: Results, seconds: float, ending: str) -> str:
    """What, how many, the worst figure, seconds."""
    records = results.of(stage.name)
    outcomes = Counter(record["outcome"] for record in records)
    parts = [f"{stage.name:9} {len(records)} items: " + ", ".join(f"{n} {name}" for name, n in outcomes.items())]
    figures = [(record["figure"], record["item"]) for record in records if "figure" in record]
    if figures:
        figure, item = stage.worst((float(figure), item) for figure, item in figures)
        parts.append(f"{stage.figure} {figure:.3g} ({item})")
    if bad := [record for record in records if record["outcome"] not in GOOD]:
        parts.append(f"first: {bad[0]['item']}: {bad[0].get('reason', '')[:120]}")
    parts.append(f"{seconds:.0f} s (predicted {stage.predicted:.0f})")
    return "; ".join(parts + [ending] * bool(ending))


def perform(stage: Stage, results: Results, left: float, rehearsed: bool, library: Path | None) -> str:
    """Runs what is left of a stage, for as long as it may and ``left`` seconds at most. Returns its line."""
    start = time.monotonic()
    without = unusable(results) if stage.name != "versions" else []
    more = [*(f"--without={regime}" for regime in without), *["--rehearse"] * rehearsed]
    with with_library(library) as imported:
        path = os.pathsep.join([str(imported), str(BENCH), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": path}
        if rehearsed:
            environment["TRITON_INTERPRET"] = "1"  # to be set before rnnfast is imported
        until = start + min(stage.limit, left)
        ending = run_stage(stage._replace(command=[*stage.command, *more]), results, until, environment)
    line = line_of(stage, results, time.monotonic() - start, ending)
    line += f"; without {', '.join(without)}" if without else ""
    results.add(stage.name, line=line, ended=not ending)
    return line


def unusable(results: Results) -> list[str]:
    """The regimes of the CUDA kernels whose smallest call hangs or breaks its process, as each of their tests would."""
    bad = [
        record["item"]
        for record in results.of("versions")
        if record["outcome"] in ("hang", "died") or "CUDA error" in record.get("reason", "")
    ]
    return [item.removeprefix("cuda ") for item in bad if item.startswith("cuda ")]


def package() -> Path:
    """That of rnnfast: of this tree, unless another is installed."""
    found = importlib.util.find_spec("rnnfast")
    return Path(found.origin).parent if found else ROOT / "rnnfast"


@contextlib.contextmanager
def with_library(library: Path | None) -> Iterator[Path]:
    """A folder to import rnnfast from, whose CUDA library is this one."""
    if library is None:
        yield package().parent
        return
    with tempfile.TemporaryDirectory() as folder:
        copied = shutil.copytree(package(), Path(folder, "rnnfast"), ignore=shutil.ignore_patterns("_cuda*.so"))
        shutil.copy(library, copied / "_cuda.so")
        yield Path(folder)


def gpu_name() -> str:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        name = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        sys.exit("nvidia-smi finds no GPU: --rehearse runs without one")
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="stop in time (30)")
    parser.add_argument("--stages", metavar="A,B", help="only these; parity: smoke,triton,cells,forms,deep")
    parser.add_argument("--resume", action="store_true", help="go on with the results that are there")
    parser.add_argument("--out", type=Path, help="the folder of the results (results/<gpu>)")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, at tiny sizes")
    parser.add_argument("--library", type=Path, help="the CUDA library of stage `versions` (rnnfast/_cuda_debug.so)")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the processes of a stage end with this one

    every = {stage.name: stage for stage in stages(args.rehearse)}
    asked = (args.stages or ",".join(every)).replace("parity", "smoke,triton,cells,forms,deep").split(",")
    if unknown := set(asked) - set(every):
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(every)}")
    folder = args.out or (ROOT / "build" / "rehearsal" if args.rehearse else BENCH / "results" / gpu_name())
    results = Results(folder, [] if args.resume else asked)

    debug = package() / "_cuda_debug.so"
    library = args.library or (debug if debug.exists() and not args.rehearse else None)
    failed = False
    for name in asked:
        stage = every[name]
        left = deadline - time.monotonic() - 3  # to end a process takes a moment
        if results.has_ended(name):
            print(f"{name:9} skipped: its results are there", flush=True)
        elif left < 5:
            print(f"{name:9} not begun: no time is left", flush=True)
            failed = True
        else:
            print(perform(stage, results, left, args.rehearse, library if name == "versions" else None), flush=True)
            failed |= not results.has_ended(name) or any(record["outcome"] not in GOOD for record in results.of(name))
    print(f"in {folder}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
