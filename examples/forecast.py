"""What comes next? Many to one: a recurrent net reads a window of a monthly series and says the next value.

    python examples/forecast.py --cell lstm --window 36
    python examples/forecast.py --synthetic

The series is the turnover of electrical equipment makers in the euro area. To forecast a year, each value that the net
says joins the window from which it says the next one.
"""

import numpy as np
import torch
from common import CELLS, BadInput, Checkpoint, compare, make_parser, positive, report, run, save
from matplotlib.figure import Figure
from torch import nn
from tqdm import trange

YEAR = 12
HELD_OUT = 5 * YEAR  # the last months: nothing is fitted on them


class Forecaster(nn.Module):
    def __init__(self, cell, hidden):
        super().__init__()
        self.rnn = CELLS[cell](1, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 1)

    def forward(self, window):
        """From ``[N, window]`` to the next value of each row, ``[N]``."""
        output, _ = self.rnn(window[:, :, None])
        return self.head(output[:, -1]).squeeze(1)


def electrical_equipment():
    from statsmodels.datasets import elec_equip

    series = elec_equip.load().data.iloc[:, 0]
    return torch.tensor(series.to_numpy(), dtype=torch.float32), series.index.year[0]


def random_walk_sales(months=240):
    """Made-up sales, each month a random per cent above or below the last: nothing here can be foreseen."""
    return 100 * torch.exp(torch.cumsum(0.05 * torch.randn(months), 0)), 2000


def growth_of(series):
    """Growth over the same month of the year before, as a logarithm: it has neither season nor trend."""
    return series[YEAR:].log() - series[:-YEAR].log()


def forecast(model, series, origins, scaling, window):
    """A year from each origin on, ``[origins, YEAR]``, out of nothing but what lies before the origin."""
    mean, std = scaling
    growth = (growth_of(series) - mean) / std
    known = growth.unfold(0, window, 1)[origins - YEAR - window]  # growth starts a year after the series
    known = known.to(model.head.weight.device)
    with torch.no_grad():
        for _ in range(YEAR):
            following = model(known[:, -window:])
            known = torch.cat([known, following[:, None]], dim=1)
    return year_before(series, origins) * torch.exp(known[:, -YEAR:].cpu() * std + mean)


def year_before(series, origins):
    return series[origins[:, None] + torch.arange(-YEAR, 0)]


def train_epoch(model, optimizer, windows, lr=1e-2, epoch=1):
    for group in optimizer.param_groups:
        group["lr"] = lr * 0.93**epoch
    for batch in windows[torch.randperm(len(windows))].split(32):
        read, following = batch[:, :-1], batch[:, -1]
        read = read + 0.2 * torch.randn_like(read)  # there are so few windows that it would learn them by heart
        loss = nn.functional.mse_loss(model(read), following)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return loss.item()


def plot(series, forecasts, origins, first_year, path):
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    months = first_year + np.arange(len(series)) / 12
    axes.plot(months, series.numpy(), color="silver", linewidth=4)
    for origin, year in list(zip(origins, forecasts))[::YEAR]:
        axes.plot(months[origin : origin + YEAR], year.numpy(), color="tab:red", marker=".")
    axes.set(title="Each red line was forecast at its left end", xlim=(months[-2 * HELD_OUT], months[-1]))
    axes.legend(axes.get_lines()[:2], ["truth", "forecast"])
    figure.savefig(path, dpi=150)


def main(args):
    if not YEAR <= args.window <= 50:
        raise BadInput(f"--window must lie between {YEAR} and 50, and {args.window} does not.")
    series, first_year = random_walk_sales() if args.synthetic else electrical_equipment()
    split = len(series) - HELD_OUT
    growth = growth_of(series[:split])
    scaling = growth.mean().item(), growth.std().item()  # of the train part only, as all that is fitted
    windows = ((growth - scaling[0]) / scaling[1]).unfold(0, args.window + 1, 1).to(args.device)

    model = Forecaster(args.cell, args.hidden).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, weight_decay=1e-2)
    done = 0
    if args.load:
        checkpoint = Checkpoint(args.load, "epoch")
        checkpoint.restore(model, optimizer)
        done = checkpoint.metadata["epoch"]
    with trange(done, args.epochs, desc="training", unit="epoch") as progress:
        for epoch in progress:
            torch.manual_seed(args.seed + epoch)  # a run that goes on draws what an unbroken one does
            loss = train_epoch(model, optimizer, windows, args.lr, epoch)
            progress.set_postfix(loss=f"{loss:.4f}", refresh=False)

    origins = torch.arange(split, len(series) - YEAR + 1)
    forecasts = forecast(model, series, origins, scaling, args.window)
    truth = year_before(series, origins + YEAR)
    scale = (series[YEAR:split] - series[: split - YEAR]).abs().mean()  # MASE 1 is the naive error of the train part
    print(f"\n{'forecasts of a year':22}{'MAE':>8}{'MASE':>8}")
    for name, values in {
        f"{args.cell}, recursive": forecasts,
        "seasonal naive": year_before(series, origins),
        "last value": series[origins - 1, None],
    }.items():
        error = (values - truth).abs().mean()
        print(f"{name:22}{error:8.2f}{error / scale:8.3f}")
    print(f"mean of the years from {len(origins)} months on, all in the last {HELD_OUT} of {len(series)}\n")
    plot(series, forecasts, origins, first_year, args.plot)
    if args.save:
        save(args.save, model, optimizer, epoch=max(done, args.epochs))
    if args.compare:
        compare(model, lambda model: train_epoch(model, torch.optim.Adam(model.parameters()), windows))
    report("MASE", ((forecasts - truth).abs().mean() / scale).item())


if __name__ == "__main__":
    parser = make_parser(__doc__, epochs=100, short_epochs=60, lr=1e-2)
    add = parser.add_argument
    add("--cell", choices=CELLS, default="rnn", help="recurrent cell (rnn)")
    add("--hidden", type=positive, default=50, help="units of the recurrent layer (50)")
    add("--window", type=int, default=24, help="months that are read, 12 to 50 (24)")
    add("--synthetic", action="store_true", help="forecast made-up sales, which walk at random")
    run(parser, main)
