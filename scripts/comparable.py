"""Runs of a study that stand beside each other: a row a run, one for each task, method, size and seed."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from partial_lora.errors import PartialLoraError
from partial_lora.files import read_json
from partial_lora.report.pairs import Outcome
from partial_lora.report.predictions import Predictions
from partial_lora.report.records import Run, read
from partial_lora.report.rows import COSTS, NONE, conditions, number, of_method
from partial_lora.tasks.kinds import kind_in

THRESHOLD, BUDGET = "threshold 0.9", "budget 0.13"
POINTS = (BUDGET, THRESHOLD)  # the paper's claim is of the first
BESIDE = {"cpu": ("causal",)}  # of which preset runs lie elsewhere, too: those of `make causal` take hours
PLACE = ["task", "model", "mixture"]
CELL = ["method", "importance", "operating_point"]
COLUMNS = (
    *(*PLACE, "kind", *CELL, "metric", "seed", "test", "adapter_parameters", "share_of_dense", "adapter_sparsity"),
    *("learning_rate", "tuning", "validation", "validation_loss", "calibrate_seconds", "seconds", *COSTS),
    *("peak_memory_bytes", "baseline", "joint", "chance"),
    *("train_samples", "label_noise", "rank", "mask_seed", "started", "conditions", "own"),
    *("preset", "commit", "device", "precision", "run", "outcome"),
)
# Settings that only figures and single tables vary: elsewhere they are as the schema has them.
VARIED = {"method.rank", "task.label_noise", "mask.seed", "mask.count"}
VARIED |= {f"calibration.{name}" for name in ("repair", "scope", "axes", "chance", "max_sparsity", "file", "shrink")}
# Settings in which runs of one method, measure and operating point may differ, or which these three are.
_NOT_OWN = {"calibration.seed", "calibration.reliability", "importance.name", "mask.granularity"}


def collect(*results_dirs: Path) -> tuple[pd.DataFrame, list[str]]:
    """The finished runs under results directories, with COLUMNS, and what was left out, a line each.

    A mixture has a row for each of its members, whose name is the row's task; `mixture` names all of them, and is empty
    for a run of one task. kind: images, texts (classified), causal (multiple choice) or generation (free text). A
    directory without runs adds none.
    """
    rows, problems = [], []
    for results_dir in results_dirs:
        try:
            runs, left_out = read(results_dir)
        except PartialLoraError:
            continue
        stored = Predictions(results_dir)
        rows += [row for run in runs for row in _rows(run, stored)]
        problems += [f"{results_dir}: {line}" for line in left_out]
    return pd.DataFrame(rows, columns=list(COLUMNS)), problems


def _rows(run: Run, stored: Predictions) -> list[dict]:
    config, test = run.record["config"], run.record["metrics"]["test"]
    task, trainer = config["task"], config["trainer"]
    calibration = run.record.get("calibration") or {}
    rows_of_training = task.get("train_samples")
    # The sparsities that an uncalibrated method does without make no other run of it.
    own = {
        key: value for key, value in of_method(config).items() if calibration or key.startswith(("method.", "trainer."))
    }
    row = run.row | {
        "mixture": "",
        "kind": kind_in(task).name,
        "importance": config.get("importance", {}).get("name", NONE) if calibration else NONE,
        "peak_memory_bytes": number(run.record.get("peak_memory_bytes")),
        **{name: number(calibration.get(name)) for name in ("baseline", "joint", "chance")},
        "train_samples": math.inf if rows_of_training is None else float(rows_of_training),
        "label_noise": task.get("label_noise", 0.0),
        "rank": config["method"].get("rank"),
        "mask_seed": own.get("mask.seed", NONE),
        "started": run.record.get("started") or "",
        "conditions": conditions(run.record),
        "own": own | {f"trainer.{name}": trainer.get(name) for name in ("learning_rate", "tuned_elsewhere")},
        "run": run,
    }
    members = task.get("members") or {}
    if not members:
        return [row | {"outcome": Outcome.of(row, stored)}]
    rows = []
    for name, member in members.items():
        measured = [
            key.removeprefix(f"{name}/") for key in test if key.startswith(f"{name}/") and key != f"{name}/loss"
        ]
        metric = (member.get("metrics") or measured)[0]
        score = float(test[f"{name}/{metric}"])
        of_member = {"task": name, "mixture": "+".join(members), "metric": metric, "test": score}
        rows.append(row | of_member | {"outcome": replace(Outcome.of(row | of_member, stored), member=name)})
    return rows


def draw_of(record: Mapping) -> int:
    """The seed that a run's few-shot data are drawn with: runs with the same one share a calibration."""
    own = record["config"]["calibration"].get("seed")
    return record["seed"] if own is None else own


def at_points(
    runs: pd.DataFrame, methods: Collection[str], points: Collection[str], importance: Collection[str] = ("svd",)
) -> pd.DataFrame:
    """The runs of methods at operating points, calibrated by a measure; and those that are not calibrated."""
    chosen = runs["method"].isin(methods) & runs["operating_point"].isin([*points, NONE])
    return runs[chosen & runs["importance"].isin([*importance, NONE])]


def comparable(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The runs that tables set beside each other, one for each task, model, method, point and seed; and notes."""
    ordinary, notes = usual(runs)
    parts = [ordinary.iloc[:0]]
    for _, cell in ordinary.groupby([*PLACE, *CELL], sort=False):
        one, left_out = settled(cell)
        parts.append(one)
        notes += left_out
    return pd.concat(parts).reset_index(drop=True), notes


def usual(runs: pd.DataFrame, varied: Collection[str] = ()) -> tuple[pd.DataFrame, list[str]]:
    """The runs of each task and model under the same conditions, as the schema has them but for the settings `varied`.

    Of several conditions those count that most methods and points share, of these those of the most runs, and of these
    those of the most training rows; where the number of rows is varied, each number has its own. Whatever else there
    is has a note.
    """
    fixed, parts, notes = VARIED.difference(varied), [runs.iloc[:0]], []
    for place, part in runs.groupby(PLACE, sort=False):
        moved = [fixed & {*shared, *own} for shared, own in zip(part["conditions"], part["own"], strict=True)]
        ordinary = part[[not each for each in moved]]
        if any(moved):
            named = ", ".join(sorted(set().union(*moved)))
            notes.append(_left_out(place, len(part) - len(ordinary), f"with other settings ({named})"))
        if ordinary.empty:
            continue
        words = [_words(each, VARIED.union(varied)) for each in ordinary["conditions"]]
        ordinary = ordinary.assign(words=words, cell=ordinary[CELL].agg("/".join, axis=1))
        sizes = ordinary["train_samples"] if "task.train_samples" in varied else [0] * len(ordinary)
        for _, alike in ordinary.groupby(sizes, sort=False):
            ranked = alike.groupby("words").agg(
                cells=("cell", "nunique"), n=("seed", "size"), rows=("train_samples", "max")
            )
            shared = _first(ranked)
            parts.append(alike[alike["words"] == shared].drop(columns=["words", "cell"]))
            if len(other := alike[alike["words"] != shared]):
                named = _differing([shared, *other["words"]])
                notes.append(_left_out(place, len(other), f"under other conditions ({named})"))
    return pd.concat(parts), notes


def settled(cell: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """One run for each seed of a cell, all of the same settings of their own; and notes on the others.

    Of several settings (learning rate, few-shot data) the tuned ones count, of these those that were run last, since a
    search made again has outdated the others, and of these those of the most runs.
    """
    words = pd.Series([_words(each, _NOT_OWN) for each in cell["own"]], cell.index)
    tuned = [2 if word == "tuned" else int(word != "untuned") for word in cell["tuning"]]
    ranked = cell.assign(words=words, tuned=tuned).groupby("words")
    ranked = ranked.agg(tuned=("tuned", "max"), last=("started", "max"), n=("seed", "size"))
    chosen = _first(ranked)
    same = cell[words == chosen]
    one = same.drop_duplicates("seed")
    where = cell.iloc[0][[*PLACE, *CELL]]
    notes = []
    if len(same) < len(cell):
        named = _differing([chosen, *ranked.index])
        notes.append(_left_out(where, len(cell) - len(same), f"with other settings of their own ({named})"))
    if len(one) < len(same):
        notes.append(_left_out(where, len(same) - len(one), "of seeds that are there twice"))
    return one, notes


def _first(ranked: pd.DataFrame) -> str:
    return ranked.sort_values(list(ranked.columns), ascending=False, kind="stable").index[0]


def _words(settings: Mapping, without: Collection[str]) -> str:
    """Settings as one comparable text."""
    chosen = {key: value for key, value in settings.items() if key not in without and value is not None}
    return json.dumps(chosen, sort_keys=True, default=str)


def _differing(words: Iterable[str]) -> str:
    """The names of the settings that are not the same in all texts of `_words`."""
    each = [json.loads(text) for text in dict.fromkeys(words)]
    names = sorted({name for one in each for name in one})
    return ", ".join(name for name in names if any(one.get(name) != each[0].get(name) for one in each))


def _left_out(where: Iterable[str], count: int, why: str) -> str:
    return f"{', '.join(filter(None, where))}: {count} {'run' if count == 1 else 'runs'} left out, {why}"


@dataclass(frozen=True)
class Evidence:
    """Material of a table: the runs of a results directory, and measurements of other kinds.

    comparable: the runs that can stand beside each other; runs: all of them; notes: what was left out.
    """

    results_dir: Path
    runs: pd.DataFrame
    comparable: pd.DataFrame
    notes: tuple[str, ...] = ()

    def files(self, pattern: str) -> list[Path]:
        """The files of a pattern in the results directory, or else in the one that holds it."""
        here, above = (sorted(place.glob(pattern)) for place in (self.results_dir, self.results_dir.parent))
        return here or above


def analyses(results_dir: Path, what: str) -> tuple[list[tuple[dict, str]], list[Path]]:
    """Return the finished analyses of a kind, each with its model, and the files of those that are not finished.

    They lie in the results directory or in the one that holds it; of one that is in both the first. The model has its
    id, as in analyses/WHAT/TASK/MODEL-ID, where several are of one model and task.
    """
    files: dict[tuple[str, ...], Path] = {}  # by task and MODEL-ID
    for place in (results_dir, results_dir.parent):
        for file in sorted(place.glob(f"analyses/{what}/*/*/analysis.json")):
            files.setdefault(file.parts[-3:-1], file)
    read = {place: read_json(file) for place, file in files.items()}
    finished = {place: content for place, content in read.items() if content["status"] == "finished"}
    names = [(task, of_model.rpartition("-")[0]) for task, of_model in finished]
    models = [place[1] if names.count(name) > 1 else name[1] for place, name in zip(finished, names, strict=True)]
    unfinished = [file for place, file in files.items() if place not in finished]
    return list(zip(finished.values(), models, strict=True)), unfinished


def gather(results_dir: Path) -> Evidence:
    """The evidence in a preset's results directory, and in what lies beside it."""
    results_dir = Path(results_dir)
    runs, problems = collect(results_dir, *(results_dir.parent / name for name in BESIDE.get(results_dir.name, ())))
    beside, notes = comparable(runs)
    return Evidence(results_dir, runs, beside, (*problems, *notes))
