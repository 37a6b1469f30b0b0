"""Figure 6: past 87 %: what is left of the score when 90, 95, 98 and 99 % of the adapter are removed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from partial_lora.evidence.figures import frames, panels
from partial_lora.runs import Run

NEEDS = "runs of partial at budgets below 0.13"
METHODS = ("partial", "targeted", "uniform", "low_rank", "shuffled", "inverted", "random_weights")
DENSE = ("lora", "probe")
BUDGETS = (0.13, 0.1, 0.05, 0.02, 0.01)


def numbers(found: Sequence[Run], results_dir: Path) -> pd.DataFrame:
    """Means over seeds at every budget, of the tasks on which partial has one below 0.13; dense LoRA and the head."""
    known = frames.usual(frames.frame(found), varied=("max_sparsity",))
    budget = known["point"].map(lambda point: frames.value_of(point, "budget")).astype(float)
    usual = frames.usual(known)  # of what no budget concerns
    sparse = known[known["method"].isin(METHODS) & (budget <= max(BUDGETS))]
    known = pd.concat([sparse, usual[usual["method"].isin(DENSE)]])
    table, notes = frames.means(known, [*frames.PLACE, "method", "point"])
    table["budget"] = table["point"].map(lambda point: frames.value_of(point, "budget")).astype(float)
    enough = [
        part
        for _, part in frames.places(table)
        if ((part["method"] == "partial") & (part["budget"] < max(BUDGETS))).any()
    ]
    table = pd.concat([table.iloc[:0], *enough])
    for (task, model, _), part in frames.places(table):
        there = set(part.loc[part["method"] == "partial", "budget"])
        lacking = [f"{budget:g}" for budget in BUDGETS if budget not in there]
        notes += [f"missing: {task}, {model}, partial, budget {', '.join(lacking)}"] if lacking else []
        notes += [f"missing: {task}, {model}, {name}" for name in DENSE if name not in set(part["method"])]
    return frames.noted(table, notes)


def draw(table: pd.DataFrame) -> Figure:
    """A panel a task: test score over the share of dense LoRA's parameters that is left, down to the right."""
    parts = frames.places(table)[: panels.MOST]
    figure, drawn = panels.panels(len(parts), wide=4.6, high=3.4, least=6)
    for axes, ((task, model, metric), part) in zip(drawn, parts, strict=True):
        for method in METHODS:
            panels.swept(axes, part[part["method"] == method], method, "share", joined=True)
        for method in DENSE:
            panels.level(axes, part[part["method"] == method].assign(parameters=0), method)
            for row in part[part["method"] == method].itertuples():
                axes.annotate(method, (0.01, row.mean), (0, 2), xycoords=("axes fraction", "data"), fontsize=7,
                              textcoords="offset points", color="0.3")  # fmt: skip
        shares = part.loc[~part["method"].isin(DENSE), "share"]
        axes.set_xscale("log")
        axes.set_xlim(shares.max() * 1.4, shares.min() / 1.4)
        axes.xaxis.set_major_locator(FixedLocator(sorted(part.loc[part["method"] == "partial", "budget"].dropna())))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{1 - share:.0%}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("share of dense LoRA's parameters removed", fontsize=9)
        panels.scored(axes, metric)
        axes.set_title(f"{task}, {model} ({panels.seeds(part)})", fontsize=10, loc="left")
        panels.plain(axes)
    there = [method for method in METHODS if (table["method"] == method).any()]
    panels.legend(figure, [(method, "budget") for method in there], lines=False)
    panels.above(
        figure,
        "Dotted: dense LoRA, and the head alone; bars: one standard deviation over seeds; 13 % is of "
        "table 1, with other levels and calibrations",
    )
    return figure
