"""What got faster or slower from one table of run.py to another: rows by the ratio of our times, and the geomean.

    python bench/compare.py before.csv after.csv

Where torch.nn's ratio is far from 1, it was the machine that changed.
"""

import argparse
import csv
import statistics
from pathlib import Path

KEY = ["device", "cell", "dtype", "mode", "threads", "T", "N", "I", "H", "layers", "directions", "form"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    args = parser.parse_args()
    before, after = _read(args.before), _read(args.after)
    for table in (before, after):
        print(*sorted({f"{row['commit']} on {row['machine']}; {row['versions']}" for row in table.values()}), sep="\n")
    rows = [(_speedup(before[key], after[key], "ours"), key) for key in before.keys() & after.keys()]
    if not rows:
        parser.exit(1, "the tables have no row in common\n")

    print(f"{'before ms':>10}{'after ms':>10}{'faster':>9}{'torch.nn':>10}")
    for speedup, key in sorted(rows):
        torch_speedup = _speedup(before[key], after[key], "torch")
        numbers = f"{float(before[key]['ours_ms']):10.3f}{float(after[key]['ours_ms']):10.3f}"
        print(f"{numbers}{speedup:8.2f}x{torch_speedup:9.2f}x  {' '.join(key)}")
    ours = statistics.geometric_mean(speedup for speedup, _ in rows)
    torchs = statistics.geometric_mean(_speedup(before[key], after[key], "torch") for _, key in rows)
    print(f"{'geomean':>20}{ours:8.2f}x{torchs:9.2f}x  of {len(rows)} rows")
    for name, keys in (("before", before.keys() - after.keys()), ("after", after.keys() - before.keys())):
        if keys:
            print(f"only in {name}: {len(keys)} rows")


def _read(path: Path) -> dict[tuple[str, ...], dict[str, str]]:
    with path.open(newline="") as file:
        return {tuple(row[name] for name in KEY): row for row in csv.DictReader(file)}


def _speedup(before: dict[str, str], after: dict[str, str], name: str) -> float:
    return float(before[f"{name}_ms"]) / float(after[f"{name}_ms"])


if __name__ == "__main__":
    main()
