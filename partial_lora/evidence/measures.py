"""What the analyses of calibration found, as rows of numbers and as they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import pandas as pd

from partial_lora.analysis_tables import condition
from partial_lora.closing import cell
from partial_lora.evidence.differences import plain
from partial_lora.runs import number

ANALYSES = ("cost", "reliability", "stability")
_TITLES = {
    "cost": "Cost of the search",
    "reliability": "Split halves of the scored draw",
    "stability": "Stability of the sparsities",
}


def of_analyses(analyses: Iterable[Mapping]) -> pd.DataFrame:
    """A row a number: {part, task, model, condition, quantity, value, deviation}."""
    rows = []
    for analysis in analyses:
        config = analysis["config"]
        named = {"part": analysis["what"], "task": config["task"]["name"], "model": config["model"]["name"]}
        rows += [named | row for row in _OF[analysis["what"]](analysis["summary"])]
    return pd.DataFrame(rows)


def _row(of: str, quantity: str, value: float | None, deviation: float | None = None) -> dict:
    return {"condition": of, "quantity": quantity, "value": number(value), "deviation": number(deviation)}


def _cost(summary: Mapping) -> list[dict]:
    names = {"passes": "passes", "sample_blocks": "sample-block evaluations", "seconds": "seconds"}
    searches = {name: cost for name, cost in summary["searches"].items() if cost is not None}
    return [_row(name, said, cost[key]) for name, cost in searches.items() for key, said in names.items()]


def _reliability(summary: Mapping) -> list[dict]:
    names = {
        "spearman_brown": "corrected",
        "pearson": "Pearson",
        "rows": "Pearson, rows",
        "columns": "Pearson, columns",
    }
    of = f"{summary['splits']} splits"
    return [_row(of, said, summary[key]["mean"], summary[key]["deviation"]) for key, said in names.items()]


def _stability(summary: Mapping) -> list[dict]:
    rows = []
    for line in summary["conditions"]:
        of, between = f"{condition(line)}, {line['seeds']} seeds", line["between_seeds"]
        rows.append(_row(of, "Pearson between seeds", between["pearson"]))
        rows.append(_row(of, "mean absolute difference", between["mean_absolute"]))
        density, score = line["density"], line["baseline"]
        rows.append(_row(of, "density", density["mean"], density["deviation"]))
        rows.append(_row(of, "score of the frozen model", score["mean"], score["deviation"]))
    return rows


_OF: dict[str, Callable[[Mapping], list[dict]]] = {
    "cost": _cost,
    "reliability": _reliability,
    "stability": _stability,
}


def shown_analyses(numbers: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """{title: a row a condition, a column a quantity}."""
    shown = {}
    for what, title in _TITLES.items():
        part = numbers[numbers["part"] == what] if "part" in numbers else numbers
        rows = []
        for (task, model, of), own in part.groupby(["task", "model", "condition"], sort=False) if len(part) else ():
            cells = {row["quantity"]: _cell(row) for row in own.to_dict("records")}
            rows.append({"task": task, "model": model, "what": of} | cells)
        if rows:
            shown[title] = plain(pd.DataFrame(rows))
    return shown


def _cell(row: Mapping) -> str:
    value = cell(row["value"], ",.0f" if row["value"] >= 10 else ".2f")
    return value + ("" if row["deviation"] != row["deviation"] else f" ± {row['deviation']:.2f}")
