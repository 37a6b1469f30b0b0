"""Table 3, language: encoders that classify, causal models on multiple choice, beside the frozen model's answers."""

from __future__ import annotations

import json

import pandas as pd

from partial_lora.evidence import finding, pivot
from partial_lora.evidence.artefact import Artefact
from partial_lora.evidence.assembled import assembled
from partial_lora.evidence.differences import AVERAGE, differences
from partial_lora.evidence.gaps import missing, rows
from partial_lora.evidence.recorded import POINTS, WORDS, Evidence, at_points
from partial_lora.runs import NONE

TITLE = "Table 3: language, dense against sparse adapters"
CLAIM = "sparse subnetworks of LoRA match dense LoRA on language, too (twelve tasks)."
PLANNED = {"cpu": ("sst2", "trec", "qnli", "mrpc", "arc_easy", "piqa")}
METHODS = ("lora", "targeted", "partial")
PAIRS = (("partial", "lora"), ("targeted", "lora"), ("partial", "targeted"))
ZERO_SHOT = "zero-shot"


def make(evidence: Evidence) -> Artefact:
    """The table of what runs there are, and of the frozen causal model's scores where these were measured."""
    runs = at_points(evidence.kept, METHODS, POINTS)
    runs = runs[runs["mixture"] == ""]
    generated = runs[runs["kind"] == "generation"]
    runs = runs[runs["kind"].isin(["texts", "causal"])]
    file = evidence.file("zero_shot.json") or evidence.file("causal", "zero_shot.json")
    frozen = json.loads(file.read_text(encoding="utf-8")) if file else {}
    parts = [zero_shot(runs, frozen), pivot.scores(runs), differences(runs, PAIRS)]
    numbers = pd.concat([part for part in parts if len(part)] or parts, ignore_index=True)
    planned = PLANNED.get(evidence.results_dir.name, ())
    lacking = missing(runs, rows(METHODS, POINTS), planned, "make reproduce-table3")
    lacking += [f"{task}: zero-shot" for task in _causal(runs) if task not in frozen]
    notes = ["zero-shot: the frozen model, by `python scripts/zero_shot.py`."] if frozen else []
    if len(generated):
        tasks = ", ".join(sorted(set(generated["task"])))
        notes.append(f"Left out, as their answers are generated and not chosen: {len(generated)} runs on {tasks}.")
    return assembled("table3", TITLE, CLAIM, verdict(numbers), numbers, runs, evidence, lacking, notes)


def _causal(runs: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(runs.loc[runs["kind"] == "causal", "task"]))


def zero_shot(runs: pd.DataFrame, frozen: dict) -> pd.DataFrame:
    """The frozen model as a method of a causal model's tasks: scores, and their average where it has all of them.

    frozen: {task: {package: {metric: score}}} of scripts/zero_shot.py, which asks the only causal model that is
    bundled; beside several models none is shown.
    """
    causal = runs[runs["kind"] == "causal"]
    if causal["model"].nunique() != 1:
        return pd.DataFrame()
    model = causal["model"].iloc[0]
    named = {"part": pivot.PART, "model": model, "mixture": "", "importance": NONE, "operating_point": NONE}
    named |= {"method": ZERO_SHOT, "n": 0, "parameters": 0.0, "share": 0.0, "best": False}
    metrics = dict(zip(causal["task"], causal["metric"], strict=True))
    found = [
        named | {"task": task, "metric": metric, "mean": frozen[task]["package"][metric]}
        for task, metric in metrics.items()
        if metric in frozen.get(task, {}).get("package", {})
    ]
    if len(found) == len(metrics) > 1:
        mean = sum(row["mean"] for row in found) / len(found)
        found.append(named | {"task": AVERAGE, "metric": AVERAGE, "mean": mean})
    return pd.DataFrame(found)


def verdict(numbers: pd.DataFrame) -> str:
    """Whether partial is as good as dense LoRA, for every model."""
    found = finding.clauses(numbers, "partial", "lora", WORDS)
    return finding.sentence("Partial-LoRA matches dense LoRA on language, to within a point", *found, table="table 3")
