"""Fits the costs by which csrc/cuda/plan.h compares the cuts of a layer to what `gpu_day.py --stages costs` measured.

    python bench/cuda_costs.py bench/results/nvidia-h200/costs.json           # prints the fit, and how well it chooses
    python bench/cuda_costs.py bench/results/nvidia-h200/costs.json --write   # and puts it into plan.h

The model of a step, in cycles, is that of weigh() and Plan::estimate() in plan.h. A block waits, however much it has to
do, for barriers and for latencies, in a backward for longer; blocks that exchange vectors wait for the bytes that they
receive, and again for each further 8 rows. And it works: products, reading vectors and matrix from shared memory, the
cell's elements, and sums that warps hand over. Work grows with the blocks that share a multiprocessor, waiting does
not. All of it comes once more for each wave of blocks that the device does not hold at once. So the time is linear in
the costs.

What matters is which of a layer's cuts is chosen: errors are relative, those of a cut near the best count more, and
those of cuts that take three times as long do not count. Steps by products of the whole device are not fitted: they
are for the layers that no cut serves well.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import nnls

PLAN = Path(__file__).resolve().parents[1] / "csrc" / "cuda" / "plan.h"
# Those of the struct Costs that are fitted, and what plan.h gives one for so many of.
COSTS = (
    *("kMultiprocessor", "kSplitMultiprocessor", "kCluster", "kChip", "kFlags", "kBackward"),
    *("kProduct", "kExactProduct", "kRead", "kElement", "kHandOver"),
    *("kClusterRows", "kClusterBytes", "kChipRows", "kChipBytes", "kFlaggedRows", "kFlaggedBytes"),
)
UNITS = {"kRead": 128}
LONGEST = 16  # us of a step; for what takes longer, products of the whole device are there
SHORTEST = 0.2  # us: below, the two lengths were not told apart
KEY = ("cell", "dtype", "tf32", "H", "N", "pass")


class Chip(NamedTuple):
    processors: int
    shared: int  # bytes that a block can have
    mhz: float

    @classmethod
    def of(cls, records: list[dict[str, Any]]) -> Chip:
        found = next(record for record in records if record["item"] == "machine")
        mhz = float(found["nvidia-smi"]["clocks.max.sm"].split()[0])
        return cls(found["multi_processor_count"], found["shared_memory_per_block_optin"], mhz)


def counts(cut: dict[str, Any], chip: Chip) -> Counter[str]:
    """How often a step of the cut has each cost."""
    regime, members, threads, row_blocks = cut["regime"], cut["members"], cut["threads"], cut["rows"] // 8
    backward, exact = cut["pass"] == "backward", cut["dtype"] == "float32" and not cut["tf32"]
    G, value_bytes = {"LSTM": 4, "GRU": 3}[cut["cell"]], 4 if cut["dtype"] == "float32" else 2

    # The kernel, as persistent.cu and block.cuh have it.
    warps, tiles_of_layer = threads // 32, math.ceil(cut["H"] / 16)
    split = {"cluster": 4, "chip": 8, "multiprocessor": warps // tiles_of_layer}[regime]
    alone = regime == "multiprocessor" and split == 4
    mixes_gates = alone and not backward
    tiles, gates, shares = 1 if backward or mixes_gates else G, G if backward else 1, 1 if mixes_gates else split
    if alone:
        registers = 48 if exact else 32
    elif regime == "multiprocessor":
        registers = 96 if tiles > 1 else 104
    elif regime == "cluster" and row_blocks == 4:
        registers = 64 if tiles > 1 else 96
    else:
        registers = 96 if regime == "cluster" and row_blocks == 2 and value_bytes == 4 else 128
    kept = registers // (tiles * 8 * (3 if exact else 1))

    gate_bytes = 64 * math.ceil(members * (warps // split) * 16 * value_bytes / 64)
    pairs = math.ceil(gates * gate_bytes // 64 / shares)
    matrix_of_warp = max(pairs - kept, 0) * tiles * 1024
    received = row_blocks * gates * gate_bytes * 8 * (members - 1) / members
    schedulers = threads / 128

    fixed, shared = Counter[str](), Counter[str]()
    flags = cut["flags"]
    here = {"multiprocessor": "kSplitMultiprocessor" if split > 1 else "kMultiprocessor", "cluster": "kCluster"}
    fixed[here.get(regime, "kFlags" if flags else "kChip")] = 1
    fixed["kBackward"] = backward
    if members > 1:
        which = "Cluster" if regime == "cluster" else "Flagged" if flags else "Chip"
        fixed[f"k{which}Bytes"] = received
        fixed[f"k{which}Rows"] = (row_blocks - 1) * (2.5 if backward and regime == "cluster" else 1)
    shared["kExactProduct" if exact else "kProduct"] = pairs * 2 * tiles * row_blocks * schedulers
    shared["kRead"] = row_blocks * warps * (pairs * 512 + matrix_of_warp)
    if not backward:
        shared["kElement"] = schedulers * (4 if split == 1 else max(1, 4 * row_blocks / split))
    if shares > 1:
        shared["kHandOver"] = row_blocks * schedulers * (4 if tiles > 2 else tiles)

    # What the device holds, as far as that is known without its driver.
    size = max(2, 1 << (members - 1).bit_length()) if regime == "cluster" else members
    usable = {4: 0.9, 8: 0.85, 16: 0.73}.get(size, 1) if regime == "cluster" else 1
    of_one = max(1, min(65536 // ((128 if alone else 256) * threads), chip.shared // (1024 * cut["kb"] + 1024)))
    resident = max(1, int(chip.processors * usable) * of_one // size)
    groups = math.ceil(cut["N"] / cut["rows"])
    waves, on_one = math.ceil(groups / resident), max(1, min(groups, resident) * size / chip.processors)
    for name in shared:
        shared[name] *= on_one
    return Counter({name: waves * count for name, count in (fixed + shared).items()})


class Measured:
    """The cuts of a file, and a row for each: counts by its microseconds, so that a good fit says 1 of it."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        self.chip = Chip.of(records)
        passed = [record for record in records if record["outcome"] == "passed" and "members" in record]
        self.cuts = [cut for cut in passed if cut["step_us"] > SHORTEST]
        self.us = np.array([cut["step_us"] for cut in self.cuts])
        rows = [counts(cut, self.chip) for cut in self.cuts]
        self.relative = np.array([[row[name] for name in COSTS] for row in rows]) / self.us[:, None] / self.chip.mhz
        self.layers = defaultdict(list)
        for i, cut in enumerate(self.cuts):
            self.layers[tuple(cut[name] for name in KEY)].append(i)
        self.best = np.empty(len(self.cuts))
        for of_layer in self.layers.values():
            self.best[of_layer] = self.us[of_layer].min()
        self.near = (self.us < LONGEST) & (self.us < 3 * self.best)

    def fit(self) -> dict[str, float]:
        weights = (self.best / self.us)[self.near] ** 1.5
        found, _ = nnls(self.relative[self.near] * weights[:, None], weights)
        return dict(zip(COSTS, map(float, found)))

    def report(self, costs: dict[str, float]) -> str:
        predicted = self.relative @ [costs[name] for name in COSTS]
        rms = np.sqrt(np.mean((predicted[self.near] - 1) ** 2))
        found = []
        for layer, of_layer in self.layers.items():
            chosen = min(of_layer, key=lambda i: predicted[i] * self.us[i])
            best = min(of_layer, key=lambda i: self.us[i])
            found.append((self.us[chosen] / self.us[best], layer, chosen, best))
        found.sort(key=lambda choice: -choice[0])
        mean = np.mean([ratio for ratio, *_ in found])
        lines = [f"off by {rms:.1%} (rms); what it chooses takes {mean:.3f} of the best, in the mean of {len(found)}:"]
        for ratio, (cell, dtype, tf32, H, N, name), chosen, best in found[:10]:
            layer = f"{cell} {'tf32' if tf32 else dtype} H{H} N{N} {name}"
            lines.append(f"  {ratio:.2f} {layer}: {self.describe(chosen)} instead of {self.describe(best)}")
        return "\n".join(lines)

    def describe(self, i: int) -> str:
        cut = self.cuts[i]
        flags = ", flags" * cut["flags"]
        return f"{cut['regime']} {cut['members']} x {cut['threads']}, {cut['rows']} rows{flags} ({self.us[i]:.2f} us)"


def declared(name: str) -> re.Pattern[str]:
    return re.compile(rf"\b{name} = ([\d.]+)( / \d+)?(?=[,;])")


def costs_of(text: str) -> dict[str, float]:
    """Those that plan.h has."""
    return {name: float(declared(name).search(text)[1]) / UNITS.get(name, 1) for name in COSTS}


def with_costs(text: str, costs: dict[str, float]) -> str:
    for name, value in costs.items():
        unit = f" / {UNITS[name]}" if name in UNITS else ""
        text, count = declared(name).subn(f"{name} = {rounded(value * UNITS.get(name, 1))}{unit}", text)
        assert count == 1, name
    return text


def rounded(value: float) -> str:
    return f"{float(f'{value:.3g}'):g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("costs", type=Path, help="costs.json of gpu_day.py")
    parser.add_argument("--write", action="store_true", help="put them into csrc/cuda/plan.h; clang-format aligns it")
    args = parser.parse_args()
    measured = Measured(json.loads(args.costs.read_text()))
    text = PLAN.read_text()
    before, after = costs_of(text), measured.fit()
    print(f"{len(measured.cuts)} cuts, {measured.near.sum()} of them near the best of their layer")
    print(f"\n{'':22}{'plan.h':>10}{'fit':>10}")
    for name in COSTS:
        unit = UNITS.get(name, 1)
        values = [f"{rounded(costs[name] * unit):>10}" for costs in (before, after)]
        print(f"{name + f' x {unit}' * (unit > 1):22}{''.join(values)}")
    print(f"\nplan.h is {measured.report(before)}\n\nthe fit is {measured.report(after)}")
    if args.write:
        PLAN.write_text(with_costs(text, after))


if __name__ == "__main__":
    main()
