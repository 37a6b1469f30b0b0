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
PLANNED = {"cpu": ("sst2", "trec", "arc_easy", "piqa")}
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
    frozen = zero_shot(runs, json.loads(file.read_text(encoding="utf-8")) if file else {})
    parts = [frozen, pivot.scores(runs), differences(runs, PAIRS)]
    numbers = pd.concat([part for part in parts if len(part)] or parts, ignore_index=True)
    planned = PLANNED.get(evidence.results_dir.name, ())
    lacking = missing(runs, rows(METHODS, POINTS), planned, "make reproduce-table3")
    lacking += [f"{model}, {task}: zero-shot" for model, task in _causal(runs) if not _has(frozen, model, task)]
    notes = ["zero-shot: the frozen model, by `python scripts/zero_shot.py`."] if len(frozen) else []
    if len(generated):
        tasks = ", ".join(sorted(set(generated["task"])))
        count = "1 run" if len(generated) == 1 else f"{len(generated)} runs"
        notes.append(f"Left out, as their answers are generated and not chosen: {count} on {tasks}.")
    return assembled("table3", TITLE, CLAIM, verdict(numbers), numbers, runs, evidence, lacking, notes)


def _causal(runs: pd.DataFrame) -> dict[tuple[str, str], str]:
    """{(model, task): metric} of multiple choice."""
    causal = runs[runs["kind"] == "causal"]
    return dict(zip(zip(causal["model"], causal["task"], strict=True), causal["metric"], strict=True))


def _has(frozen: pd.DataFrame, model: str, task: str) -> bool:
    return len(frozen) > 0 and ((frozen["model"] == model) & (frozen["task"] == task)).any()


def zero_shot(runs: pd.DataFrame, frozen: dict) -> pd.DataFrame:
    """The frozen models as a method of causal models' tasks: scores, and their average where a model has all of them.

    frozen: {task: {model, package: {metric: score}}} of scripts/zero_shot.py. A score is shown beside runs of the model
    that it is of, and of no other.
    """
    wanted: dict[str, dict[str, str]] = {}
    for (model, task), metric in _causal(runs).items():
        wanted.setdefault(model, {})[task] = metric
    return pd.DataFrame([row for model, metrics in wanted.items() for row in _of_model(model, metrics, frozen)])


def _of_model(model: str, metrics: dict[str, str], frozen: dict) -> list[dict]:
    named = {"part": pivot.PART, "model": model, "mixture": "", "importance": NONE, "operating_point": NONE}
    named |= {"method": ZERO_SHOT, "n": 0, "parameters": 0.0, "share": 0.0, "best": False}
    own = {task: record["package"] for task, record in frozen.items() if record.get("model") == model}
    found = [
        named | {"task": task, "metric": metric, "mean": own[task][metric]}
        for task, metric in metrics.items()
        if metric in own.get(task, {})
    ]
    if len(found) == len(metrics) > 1:
        mean = sum(row["mean"] for row in found) / len(found)
        found.append(named | {"task": AVERAGE, "metric": AVERAGE, "mean": mean})
    return found


def verdict(numbers: pd.DataFrame) -> str:
    """Whether partial is as good as dense LoRA, for every model."""
    found = finding.clauses(numbers, "partial", "lora", WORDS)
    return finding.sentence("Partial-LoRA matches dense LoRA on language, to within a point", *found, table="table 3")
