"""Makes the table of a GPU by which rnnfast chooses, from one that bench/run.py --gpu or bench/gpu_day.py has written.

    python bench/ship.py bench/results/nvidia-h200/table.csv    # writes rnnfast/tables/nvidia-h200.json

How long a call takes depends on the host, how long its kernels take does not. Of the two pairs of times the one that is
worse for ours goes into the table: where it says that ours are faster, they are so with any host.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from rnnfast import timings

ROOT = Path(__file__).resolve().parents[1]
# How the columns of float32's times go on, and the switches: TF32 in recurrent layers, and in other products.
SWITCHES = {"": (False, False), "_tf32": (True, True), "_default": (True, False)}


def entries(rows: list[dict[str, str]]) -> dict[timings.Key, timings.Times]:
    found = {}
    for row in rows:
        size = {name: int(row[name]) for name in ("T", "N", "I", "H", "layers", "directions")}
        if row["mode"] == "forward" or row["wrong"] or row["form"] == "lengths":
            continue
        for suffix, (tf32, products_tf32) in SWITCHES.items():
            pairs = [(row[f"ours{suffix}_ms"], row[f"torch{suffix}_ms"])]
            if suffix == "":
                pairs.append((row["ours_gpu_ms"], row["torch_gpu_ms"]))
            measured = [(float(ours), float(theirs)) for ours, theirs in pairs if ours and theirs]
            backend = row[f"ours{suffix}_ran"].partition(" ")[0]
            if not measured or backend == "torch":
                continue
            key = timings.Key(
                f"{row['cell']}_TANH" if row["cell"] == "RNN" else row["cell"], row["dtype"], tf32, products_tf32,
                size["I"], size["H"], size["H"], size["layers"], size["directions"], row["form"], False,
                row["mode"] == "train", size["T"], size["N"],
            )  # fmt: skip
            ours, theirs = max(measured, key=lambda pair: pair[0] / pair[1])
            found[key] = {backend: ours, "torch": theirs}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    args = parser.parse_args()
    with args.table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    (name,) = {row["machine"] for row in rows}
    path = timings.shipped_path(name)
    timings.write(path, {"gpu": name}, entries(rows))
    print(path)


if __name__ == "__main__":
    main()
