"""Run every example with the options given here, such as --short, and print one table."""

import re
import subprocess
import sys
import time
from pathlib import Path

NAMES = ("sentiment", "forecast", "sine", "generate", "translate", "bptt", "convert")
HEADER = ("example", "metric", "value", "seconds", "torch.nn s", "rnnfast s")


def run(name):
    """A row of the table."""
    print(f"\n{name}", flush=True)
    start = time.perf_counter()
    command = [sys.executable, Path(__file__).with_name(f"{name}.py"), *sys.argv[1:]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        lines = [print(line, end="", flush=True) or line for line in process.stdout]
    seconds = f"{time.perf_counter() - start:.0f}"
    metric = re.search(r"^metric: (.+) (\S+) in \S+ s$", "".join(lines), re.MULTILINE)
    times = re.search(r"^time: torch.nn (\S+) s, rnnfast (\S+) s$", "".join(lines), re.MULTILINE)
    if process.returncode or not metric:
        return name, "FAILED", f"exit code {process.returncode}", seconds, "", ""
    return name, *metric.groups(), seconds, *(times.groups() if times else ("", ""))


if shared := {"--save", "--load", "--plot"} & {argument.split("=")[0] for argument in sys.argv}:
    print(f"run_all.py: All examples would share the file of {shared.pop()}.", file=sys.stderr)
    sys.exit(2)
rows = [HEADER, *map(run, NAMES)]
widths = [max(map(len, column)) for column in zip(*rows)]
print()
for row in rows:
    print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
sys.exit(any(row[1] == "FAILED" for row in rows))
