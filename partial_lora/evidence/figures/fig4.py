"""Figure 4: a small dense adapter or a large sparse one: rank against sparsity at equal trainable parameters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, ScalarFormatter

from partial_lora.evidence.figures import frames, panels
from partial_lora.runs import Run

NEEDS = "runs of partial at several ranks, and of low_rank, with as many trainable parameters"
METHODS = ("partial", "low_rank")
RANKS = (2, 4, 8, 16, 32, 64)
_ALIKE = 1.05  # sizes that differ by no more are one


def numbers(found: Sequence[Run], results_dir: Path) -> pd.DataFrame:
    """Means over seeds by rank; `level` is the size that runs share: of those of one size there are two ranks at least.

    low_rank is the end of a level where nothing is sparse: dense, of about the rank that its parameters come to.
    """
    known = frames.usual(frames.frame(found), varied=("rank",))
    known = known[known["method"].isin(METHODS) & known["point"].str.startswith("budget")]
    of_dense = (known["rank"] * known["share"]).round().clip(lower=1).astype(int)
    dense = known["method"] == "low_rank"
    known = known.assign(rank=known["rank"].where(~dense, of_dense), sparsity=known["sparsity"].where(~dense, 0.0))
    table, notes = frames.means(known, [*frames.PLACE, "method", "point", "rank"])
    parts = []
    for _, part in frames.places(table):
        part = part.assign(level=levels(part["parameters"].tolist()))
        parts += [of for _, of in part.groupby("level") if of["rank"].nunique() > 1]
    found_levels = pd.concat([table.iloc[:0].assign(level=0.0), *parts])
    for (task, model, _), part in frames.places(found_levels):
        lacking = sorted(set(RANKS) - set(part["rank"]))
        notes += [f"missing: {task}, {model}, rank {', '.join(map(str, lacking))}"] if lacking else []
    return frames.noted(found_levels, notes)


def levels(sizes: Sequence[float]) -> list[float]:
    """For each size the smallest of those that are the same within five percent, from the smallest on."""
    level, found = None, {}
    for size in sorted(sizes):
        if level is None or size > level * _ALIKE:
            level = size
        found[size] = level
    return [found[size] for size in sizes]


def draw(table: pd.DataFrame) -> Figure:
    """A panel a task: test score over rank, a line for each number of parameters, with the sparsities as numbers."""
    parts = frames.places(table)[: panels.MOST]
    figure, drawn = panels.panels(len(parts), wide=4.6, high=3.4, least=6)
    for axes, ((task, model, metric), part) in zip(drawn, parts, strict=True):
        for place, (level, line) in enumerate(part.groupby("level")):
            line = line.sort_values("rank")
            color, marker = panels.COLOURS[place % 8], panels.MARKERS[place % 8]
            dash = ("-", "--", "-.", ":")[place % 4]
            style = {"color": color, "marker": marker, "linestyle": dash, "linewidth": 1.3, "markersize": 6}
            said = f"{panels.said_size(level)} parameters"
            sparse, dense = (line[line["method"] == method] for method in METHODS)
            axes.errorbar(sparse["rank"], sparse["mean"], yerr=sparse["std"], capsize=2, label=said, **style)
            style |= {"marker": "s", "linestyle": "", "markerfacecolor": "white"}
            axes.errorbar(dense["rank"], dense["mean"], yerr=dense["std"], capsize=2, **style)
            for row in line.itertuples():
                panels.numbered(axes, row.rank, row.mean, f"{row.sparsity:.0%}")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(sorted(part["rank"].unique())))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("rank", fontsize=9)
        panels.scored(axes, metric)
        axes.set_title(f"{task}, {model} ({panels.seeds(part)})", fontsize=10, loc="left")
        axes.legend(fontsize=7.5, frameon=False)
        panels.plain(axes)
    panels.above(figure, "Numbers: adapter sparsity; open squares: dense; bars: one standard deviation")
    return figure
