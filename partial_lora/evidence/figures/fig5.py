"""Figure 5: whether measures of importance choose the same rows and columns, and whether it matters to accuracy."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from partial_lora.evidence.figures import frames, panels
from partial_lora.runs import Run

NEEDS = "finished analysis of agreement (`partial-lora analyse agreement`)"
MEASURES = ("svd", "snip", "imp")  # that targeted has runs with, in table 2
SPARSITIES = ("calibrated", "0.5")
POINTS = ("threshold 0.9", "budget 0.13")
_COLUMNS = ["part", "task", "model", "point", "first", "second", "jaccard", "chance", "beyond_chance"]
_COLUMNS += ["metric", "method", "importance", "n", "seeds", "mean", "std", "half"]
_MOST_PANELS = 4


def numbers(found: Sequence[Run], results_dir: Path) -> pd.DataFrame:
    """part "agreement": of every two measures, means over modules and axes of what analyses have found.

    part "accuracy": test scores of targeted by the measure that chose its rows and columns, and of partial, on the
    tasks of these analyses. Analyses are those of results_dir and of the folder beside it.
    """
    rows, notes = list(_agreements(results_dir)), []
    if not rows:
        return frames.noted(pd.DataFrame(columns=_COLUMNS), notes)
    known = frames.usual(frames.frame(found), varied=("importance",))
    known = known[known["method"].isin(("partial", "targeted")) & known["point"].isin(POINTS)]
    known = known[known["task"].isin({row["task"] for row in rows})]
    table, notes = frames.means(known, [*frames.PLACE, "point", "method", "importance"])
    there = set(table.loc[table["method"] == "targeted", "importance"])
    lacking = [measure for measure in MEASURES if measure not in there]
    notes += [f"missing: runs of targeted with importance {', '.join(lacking)}"] if lacking else []
    rows += [{"part": "accuracy"} | row for row in table.to_dict("records")]
    return frames.noted(pd.DataFrame(rows, columns=_COLUMNS), notes)


def _agreements(results_dir: Path) -> Iterator[dict]:
    """A row for every two measures of every analysis and point; of analyses in both folders the nearer one."""
    seen = set()
    for place in (Path(results_dir), Path(results_dir).parent):
        for file in sorted(place.glob("analyses/agreement/*/*/analysis.json")):
            try:
                analysis = json.loads(file.read_text(encoding="utf-8"))
                names = {"task": analysis["config"]["task"]["name"], "model": analysis["config"]["model"]["name"]}
                summary = analysis["summary"] if analysis["status"] == "finished" else {}
                rows = [
                    {"part": "agreement", **names, "point": point}
                    | {name: line[name] for name in ("first", "second", "jaccard", "chance", "beyond_chance")}
                    for point, lines in summary.items()
                    for line in lines
                ]
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                continue
            if file.parts[-3:-1] not in seen:
                seen.add(file.parts[-3:-1])
                yield from rows


def draw(table: pd.DataFrame) -> Figure:
    """Matrices of agreement beyond chance, and beside them the accuracy that each measure's choice leads to."""
    agreed, scored = (table[table["part"] == part] for part in ("agreement", "accuracy"))
    by = agreed.groupby(["task", "model"], sort=False)
    shown = [(key, point, of) for key, part in by for point, of in part.groupby("point") if point in SPARSITIES]
    shown = (shown or [(key, point, of) for key, part in by for point, of in part.groupby("point")])[:_MOST_PANELS]
    places = frames.places(scored)[: panels.MOST - _MOST_PANELS]
    figure, drawn = panels.panels(len(shown) + len(places), wide=4.0, high=3.2, least=6)
    for axes, ((task, model), point, part) in zip(drawn, shown, strict=False):
        _matrix(axes, part)
        said = "calibrated sparsities" if point == "calibrated" else f"{float(point):.0%} removed"
        axes.set_title(f"{task}, {model}: {said}", fontsize=9.5, loc="left")
    for axes, ((task, _, metric), part) in zip(drawn[len(shown) :], places, strict=True):
        _accuracies(axes, part, metric)
        axes.set_title(f"{task}: what each choice leads to", fontsize=9.5, loc="left")
    panels.above(
        figure, "Agreement of the rows and columns chosen, beyond chance: 1 the same choice, 0 what chance gives"
    )
    return figure


def _matrix(axes: Axes, part: pd.DataFrame) -> None:
    names = list(dict.fromkeys([*part["first"], *part["second"]]))
    values = np.full((len(names), len(names)), np.nan)
    for row in part.itertuples():
        at = names.index(row.second), names.index(row.first)
        values[at] = np.nan if row.beyond_chance is None else row.beyond_chance
    panels.heat(axes, values[1:, :-1], low=0, high=1, form=".2f")
    axes.set_xticks(range(len(names) - 1), names[:-1], rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names) - 1), names[1:])


def _accuracies(axes: Axes, part: pd.DataFrame, metric: str) -> None:
    """A row a method and measure, its points side by side with one standard deviation."""
    targeted = part[part["method"] == "targeted"]
    names = [("partial", measure) for measure in MEASURES if (part["method"] == "partial").any()]
    names += [("targeted", measure) for measure in dict.fromkeys([*MEASURES, *targeted["importance"]])]
    known = set(zip(part["method"], part["importance"], strict=True))
    names = [name for name in names if name in known]
    points = list(part["point"].unique())
    for row in part.itertuples():
        if (row.method, row.importance) not in names:
            continue
        own = panels.look(row.method, row.point)
        shift = 0.16 * (points.index(row.point) - (len(points) - 1) / 2)
        style = own.markers | {"color": own.color, "capsize": 2, "markersize": 6, "linestyle": ""}
        axes.errorbar([row.mean], [names.index((row.method, row.importance)) + shift], xerr=[row.std], **style)
    axes.set_yticks(range(len(names)), [f"{method}, {measure}" for method, measure in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    panels.scored(axes, metric, axis="x")
    panels.plain(axes)
    axes.set_xlabel(f"test {metric}; filled: threshold, open: budget", fontsize=8)
