"""Table 4: controls with partial's trainable parameters at the sparser point, and how reliable the sparsities are."""

from __future__ import annotations

import pandas as pd

from partial_lora.closing import cell, measured
from partial_lora.evidence import differences, finding, pivot
from partial_lora.evidence.artefact import Artefact
from partial_lora.evidence.assembled import assembled
from partial_lora.evidence.gaps import UNCALIBRATED, missing, rows
from partial_lora.evidence.recorded import BUDGET, Evidence, at_points
from partial_lora.retest import reliability
from partial_lora.runs import NONE

TITLE = "Table 4: controls of equal size, at 13 % of dense LoRA's parameters"
CLAIM = "how much each layer keeps matters, which entries it keeps does not, and no repair of the flow is needed."
PLANNED = {"cpu": ("digits",)}
HOW_MUCH = ("uniform", "shuffled", "inverted")
WHICH = ("targeted", "flow", "low_rank", "random_weights", "partial (element)")
CONTROLS = (*HOW_MUCH, *WHICH)
METHODS = ("partial", *CONTROLS, *UNCALIBRATED)
FEWER = ("flow", "partial (element)", *(name for name in UNCALIBRATED if name != "lora"))  # have three seeds alone


def make(evidence: Evidence) -> Artefact:
    """The table of the tasks that have controls of how much is kept."""
    runs = at_points(evidence.kept, METHODS, (BUDGET,))
    tasks = set(runs.loc[runs["method"].isin(HOW_MUCH), "task"])
    runs = runs[runs["task"].isin(tasks) & (runs["mixture"] == "")]
    scores = pivot.scores(runs)
    reliable = runs.groupby([*pivot.ROW, "task"])["record"].apply(reliability)
    keys = pd.MultiIndex.from_frame(scores[[*pivot.ROW, "task"]])
    scores["reliability"] = reliable.reindex(keys).to_numpy() if len(scores) else []
    beside = differences.differences(runs, [("partial", method) for method in METHODS[1:]])
    numbers = pd.concat([scores, beside], ignore_index=True)
    planned = PLANNED.get(evidence.results_dir.name, ())
    more = [name for name in METHODS if name not in FEWER]
    lacking = [
        line
        for alike, of in ((more, planned), (FEWER, ()))
        for line in missing(runs, rows(alike, (BUDGET,)), of, "make reproduce-table4")
    ]
    shown = readable(numbers)
    return assembled(
        *("table4", TITLE, CLAIM, verdict(numbers), numbers, runs, evidence, lacking),
        notes=[_RELIABILITY, _SEEDS],
        shown={"Beside partial": shown} if len(shown) else {},
    )


_RELIABILITY = (
    "Reliability is of the calibrated sparsities: how far those of different seeds, each with examples of its own, "
    "correlate over modules and axes; where a run calibrated on halves of its draw, the Spearman–Brown correlation."
)
_SEEDS = "A score is over all n seeds of its method, a difference over those that partial has, too."


def readable(numbers: pd.DataFrame) -> pd.DataFrame:
    """A row a method: its score, what partial has over it, its parameters, how reliable its sparsities are."""
    beside = {
        (row["model"], row["task"], row["second"]): row
        for row in differences.of_differences(numbers).to_dict("records")
    }
    scores = numbers[(numbers["part"] == pivot.PART) & (numbers["task"] != differences.AVERAGE)]
    found = []
    for row in scores.to_dict("records"):
        other = beside.get((row["model"], row["task"], row["method"]))
        score = measured(row["metric"], row["mean"], row["std"])
        found.append(
            {
                "model": row["model"],
                "task": row["task"],
                "method": row["method"],
                "n": f"{row['n']:.0f}",
                "score": f"**{score}**" if row["best"] else score,
                "partial − it [95 %]": NONE if other is None else differences.said(other),
                "over seeds": NONE if other is None else f"{other['seeds']:.0f}",
                "partial is": NONE if other is None else other["verdict"],
                "parameters": cell(row["parameters"], ",.0f"),
                "of dense": cell(row["share"], ".1%"),
                "reliability": cell(row["reliability"], ".2f"),
            }
        )
    return differences.plain(pd.DataFrame(found))


def verdict(numbers: pd.DataFrame) -> str:
    """Whether partial is better than controls that keep other amounts, and as good as all that keep other entries."""
    much = [(method, finding.find(numbers, "partial", method, BUDGET)) for method in HOW_MUCH]
    which = [(method, finding.find(numbers, "partial", method, BUDGET)) for method in WHICH]
    clauses = [f"that it beats {method} {finding.better(row)}, {finding.measured(row)}" for method, row in much]
    clauses += [f"that it matches {method} {finding.as_good(row)}, {finding.measured(row)}" for method, row in which]
    claim = "At equal size partial beats other amounts a module, and does as well as other entries to within a point"
    return finding.sentence(claim, *clauses, table="table 4")
