"""Table 5, calibration: what it costs, what all sparsities do at once, what repair gives back, how stable it is."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable

import pandas as pd

from partial_lora.closing import cell
from partial_lora.evidence import finding
from partial_lora.evidence.artefact import Artefact, rows_of
from partial_lora.evidence.assembled import left_out, of_runs
from partial_lora.evidence.differences import plain
from partial_lora.evidence.measures import ANALYSES, of_analyses, shown_analyses
from partial_lora.evidence.recorded import POINTS, THRESHOLD, Evidence, at_points, draw_of
from partial_lora.grouping import half_interval
from partial_lora.results import read_result
from partial_lora.runs import number

TITLE = "Table 5: calibration"
CLAIM = "each layer's sparsity can be found by itself, from few-shot data and the frozen model, without repair."
JOINT, REPAIR = "joint", "repair"
_PLACE = ["task", "model", "importance", "operating_point"]
_NOTES = (
    "Share kept: the frozen model's few-shot score with all sparsities at once, of its intact score; ± is half the "
    "95 % interval of the mean over calibrations (Student's t).",
    "seconds: of calibrations that were made, not those found in the cache.",
)


def make(evidence: Evidence) -> Artefact:
    """The table of what calibrations and analyses there are."""
    runs = at_points(evidence.kept, ("partial",), POINTS, ("svd", "snip", "imp", "magnitude", "activation", "random"))
    repaired = repairs(_calibrations(evidence))
    files = {name: evidence.files(f"analyses/{name}/*/*/analysis.json") for name in ANALYSES}
    analyses = [json.loads(file.read_text(encoding="utf-8")) for found in files.values() for file in found]
    numbers = pd.concat([joint(runs), repaired, of_analyses(analyses)], ignore_index=True)
    lacking = [] if len(runs) else ["calibrated runs of partial; make reproduce-table1"]
    lacking += [] if len(repaired) else ["calibrations with calibration.repair=true; make reproduce-table5"]
    lacking += [f"analysis of {name}; make calibration-analyses" for name, found in files.items() if not found]
    shown = shown_joint(numbers) | shown_repair(numbers) | shown_analyses(numbers)
    return Artefact(
        *("table5", TITLE, CLAIM, verdict(numbers), numbers, shown),
        notes=(*_NOTES, *left_out(runs, evidence)),
        missing=tuple(lacking),
        origin=of_runs(runs),
    )


def joint(runs: pd.DataFrame) -> pd.DataFrame:
    """For each task and point: what share of its score the frozen model keeps with all sparsities at once.

    n, and the interval, are of calibrations: seeds that share one count once.
    """
    task = runs["task"].where(runs["mixture"] == "", runs["mixture"])  # whose members share a calibration
    known = runs.assign(task=task, ratio=runs["joint"] / runs["baseline"]).dropna(subset=["ratio"])
    known = known.assign(draw=[draw_of(config) for config in known["config"]])
    # Of runs that share a calibration the one that made it says how long that took; the others found it in the cache.
    made = known.sort_values("calibrate_seconds", na_position="last", kind="stable")
    known = known.loc[made.drop_duplicates([*_PLACE, "draw"]).index.sort_values()]
    found = known.groupby(_PLACE, sort=False).agg(
        n=("draw", "size"),
        baseline=("baseline", "mean"),
        joint=("joint", "mean"),
        chance=("chance", "mean"),
        ratio=("ratio", "mean"),
        deviation=("ratio", "std"),
        kept=("share_of_dense", "mean"),
        seconds=("calibrate_seconds", "mean"),
    )
    halves = [half_interval(row.deviation, row.n) for row in found.itertuples()]
    found = found.assign(part=JOINT, low=found["ratio"] - halves, high=found["ratio"] + halves)
    return found.reset_index()


def _calibrations(evidence: Evidence) -> Iterable[dict]:
    """The records of all calibrations, of runs or by themselves."""
    for pattern in ("runs/*/*/*/seed*", "calibrations/*/*/*"):
        for folder in sorted(evidence.results_dir.glob(pattern)):
            record = read_result(folder)
            if record and record["status"] == "finished" and record.get("calibration"):
                yield record


def repairs(records: Iterable[dict]) -> pd.DataFrame:
    """What repairs did to the joint score, and how many steps that took, means over calibrations."""
    rows = []
    for record in records:
        config, calibration = record["config"], record["calibration"]
        if not (found := calibration.get("repaired")):
            continue
        parameters = record.get("parameters") or {}
        rows.append(
            {
                "part": REPAIR,
                "seed": draw_of(config),
                "task": config["task"]["name"],
                "model": config["model"]["name"],
                "importance": config["importance"]["name"],
                "operating_point": f"threshold {calibration['threshold']:g}",
                "baseline": number(calibration["baseline"]),
                "before": number(found.get("joint_before")),
                "joint": number(calibration.get("joint")),
                "steps": number(found.get("steps")),
                "kept": 1 - number(parameters.get("adapter_sparsity")),
            }
        )
    if not rows:
        return pd.DataFrame()
    means = {name: (name, "mean") for name in ("baseline", "before", "joint", "steps", "kept")}
    once = pd.DataFrame(rows).drop_duplicates([*_PLACE, "seed"])  # methods share a calibration
    found = once.groupby(["part", *_PLACE], sort=False)
    return found.agg(n=("seed", "size"), **means).reset_index()


def shown_joint(numbers: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The joint scores as they are read."""
    rows = [
        {
            **{name.replace("_", " "): row[name] for name in _PLACE},
            "n": f"{row['n']:.0f}",
            "intact": cell(row["baseline"], ".4f"),
            "all at once": cell(row["joint"], ".4f"),
            "guessing": cell(row["chance"], ".4f"),
            "share kept": cell(row["ratio"], ".1%") + ("" if math.isnan(row["high"]) else f" ± {_half(row):.1f}"),
            "parameters kept": cell(row["kept"], ".1%"),
            "seconds": cell(row["seconds"], ",.0f"),
        }
        for row in rows_of(numbers, JOINT)
    ]
    return {"All sparsities at once": plain(pd.DataFrame(rows))} if rows else {}


def _half(row: dict) -> float:
    return 100 * (row["high"] - row["ratio"])


def shown_repair(numbers: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The repairs as they are read."""
    rows = [
        {
            **{name.replace("_", " "): row[name] for name in _PLACE},
            "n": f"{row['n']:.0f}",
            "intact": cell(row["baseline"], ".4f"),
            "before": cell(row["before"], ".4f"),
            "after": cell(row["joint"], ".4f"),
            "steps": cell(row["steps"], ",.1f"),
            "parameters kept": cell(row["kept"], ".1%"),
        }
        for row in rows_of(numbers, REPAIR)
    ]
    return {"Repair": plain(pd.DataFrame(rows))} if rows else {}


def _calibrations_said(n: float) -> str:
    return "1 calibration" if n == 1 else f"{n:.0f} calibrations"


def verdict(numbers: pd.DataFrame) -> str:
    """Whether the model still scores 90 % with all sparsities at once, as it does with each of them alone.

    The claim is of every task: one whose interval is below 90 % refutes it, whatever the others say.
    """
    claim = "With every module's sparsity at once the frozen model keeps 90 % of its score, as with each alone"
    rows = [row for row in rows_of(numbers, JOINT) if row["operating_point"] == THRESHOLD]
    if not rows:
        return finding.sentence(claim, f"{finding.OPEN}, no calibrations at threshold 0.9", table="table 5")
    wanted = float(THRESHOLD.split()[1])
    holding = sum(row["low"] >= wanted for row in rows)  # of one calibration there is no interval: neither of both
    failing = sum(row["high"] < wanted for row in rows)
    said = finding.FAILS if failing else finding.HOLDS if holding == len(rows) else finding.OPEN
    if len(rows) > 1:
        said += f" (it does on {holding} of {len(rows)} tasks and measures, not on {failing}), the lowest is"
    else:
        said += ","
    lowest = min(rows, key=lambda row: row["ratio"])
    ends = "" if math.isnan(lowest["low"]) else f" [{lowest['low']:.1%}, {lowest['high']:.1%}]"
    of = f"{lowest['importance']}, {_calibrations_said(lowest['n'])}"
    where = f"{lowest['ratio']:.1%}{ends} on {lowest['task']} ({of})"
    found = rows_of(numbers, "reliability")
    more = [f"the sparsities' split-half reliability is {found[0]['value']:.2f} on {found[0]['task']}"] if found else []
    return finding.sentence(claim, f"{said} {where}", *more, table="table 5")
