"""A picture of a table that run.py wrote: the ratios to torch.nn and to the best peer, and the share of the ceiling.

python bench/plot.py bench/results/<machine>.csv
python bench/plot.py table.csv --against T  # instead: milliseconds over T, of rows that differ in nothing else
"""

import argparse
import csv
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

COLOURS = {"LSTM": "#1f6f8b", "GRU": "#c8553d", "RNN": "#7a9e3f"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("-o", "--out", type=Path, help="the picture (beside the CSV)")
    parser.add_argument("--against", choices=["T", "N", "H"], help="draw how time grows with it")
    args = parser.parse_args()
    with args.csv.open(newline="") as file:
        rows = list(csv.DictReader(file))
    path = args.out or args.csv.with_suffix(".png")
    (draw_growth(rows, args.against) if args.against else draw(rows)).savefig(path, dpi=130)
    print(path)


def draw(rows: list[dict[str, str]]) -> Figure:
    """A column of panels for each mode, a group of bars for each shape, a bar for each cell."""
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    threads = sorted({int(row["threads"]) for row in rows})
    labels = list(dict.fromkeys(_label(row, len(threads) > 1) for row in rows))
    cells = [cell for cell in COLOURS if any(row["cell"] == cell for row in rows)]
    figure = Figure(figsize=(max(4.5, 1.5 + 0.55 * len(labels)) * len(modes), 8.5), layout="constrained")
    panels = figure.subplots(2, len(modes), sharex=True, sharey="row", squeeze=False)
    for (ratios, shares), mode in zip(panels.T, modes):
        for row in (row for row in rows if row["mode"] == mode):
            at = labels.index(_label(row, len(threads) > 1)) + 0.27 * (cells.index(row["cell"]) - (len(cells) - 1) / 2)
            colour = COLOURS[row["cell"]]
            to_torch, to_best, share = (float(row[name]) for name in ("ratio_torch", "ratio_best", "share_of_ceiling"))
            ratios.bar(at, to_torch - 1, 0.24, bottom=1, color=colour, alpha=0.55)
            ratios.plot(at, to_best, "o", color=colour, markeredgecolor="black", markeredgewidth=0.6, markersize=5)
            shares.bar(at, 100 * share, 0.24, color=colour)
        ratios.axhline(1, color="black", linewidth=1)
        ratios.set_title(mode)
        ratios.set_yscale("log", base=2)
        ratios.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        shares.set_xticks(range(len(labels)), labels, rotation=45, ha="right", fontsize=8)
        for panel in (ratios, shares):
            panel.grid(axis="y", alpha=0.3)
            panel.set_axisbelow(True)
            panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("times as fast as")
    panels[1, 0].set_ylabel("% of torch.mm of large squares")
    panels[1, 0].set_ylim(bottom=0)
    keys = [Patch(color=COLOURS[cell], alpha=0.55, label=cell) for cell in cells]
    keys += [Patch(color="grey", alpha=0.55, label="bar: torch.nn")]
    keys += [
        Line2D([], [], marker="o", color="grey", linestyle="", markeredgecolor="black", label="dot: the best peer")
    ]
    panels[0, 0].legend(handles=keys, fontsize=8, ncols=2)
    first = rows[0]
    on = f"{' and '.join(map(str, threads))} threads" if first["device"] == "cpu" else "CUDA"
    figure.suptitle(f"rnnfast {first['commit']} on {first['machine']}, {on}\n{first['versions']}", fontsize=9)
    figure.supxlabel("T x N x H, or T x N x I x H", fontsize=9)
    return figure


def draw_growth(rows: list[dict[str, str]], size: str) -> Figure:
    """A panel for each mode: milliseconds of ours and of torch.nn over one of the sizes."""
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    figure = Figure(figsize=(4.5 * len(modes), 4), layout="constrained")
    for panel, mode in zip(figure.subplots(1, len(modes), sharey=True, squeeze=False)[0], modes):
        for cell, colour in COLOURS.items():
            of_cell = sorted((r for r in rows if (r["mode"], r["cell"]) == (mode, cell)), key=lambda r: int(r[size]))
            for name, style in (("ours", "o-"), ("torch", ".:")):
                points = [(int(row[size]), float(row[f"{name}_ms"])) for row in of_cell]
                panel.plot(*zip(*points), style, color=colour, label=f"{cell}, {name}") if points else None
        panel.set(title=mode, xlabel=size, xscale="log", yscale="log")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.axes[0].set_ylabel("milliseconds")
    fixed = " x ".join(f"{name} {rows[0][name]}" for name in ("T", "N", "H") if name != size)
    figure.suptitle(f"rnnfast {rows[0]['commit']} on {rows[0]['machine']}: {fixed}", fontsize=9)
    return figure


def _label(row: dict[str, str], with_threads: bool) -> str:
    """The shape, and whatever is not the usual."""
    sizes = [row["T"], row["N"], row["I"], row["H"]]
    if row["I"] == row["H"]:
        sizes.pop(2)
    words = ["x".join(sizes)]
    if row["layers"] != "1":
        words.append(f"{row['layers']} layers")
    if row["directions"] != "1":
        words.append("bidir.")
    words += [row[name] for name, usual in (("dtype", "float32"), ("form", "rectangular")) if row[name] != usual]
    words += [f"{row['threads']} threads"] if with_threads else []
    return "\n".join([words[0], " ".join(words[1:])]).rstrip()


if __name__ == "__main__":
    main()
