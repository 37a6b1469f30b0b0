"""The runs that tables of evidence are made of: a row a run, told apart by its settings, not by its folder."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
from pyarrow import ArrowInvalid
from pyarrow.parquet import ParquetFile

from partial_lora.errors import PartialLoraError
from partial_lora.results import PREDICTIONS
from partial_lora.runs import NONE, Run, number, read

THRESHOLD, BUDGET = "threshold 0.9", "budget 0.13"
POINTS = (BUDGET, THRESHOLD)  # the paper's claim is of the first
BESIDE = {"cpu": ("causal",)}  # of which preset runs lie elsewhere, too: those of `make causal` take hours
WORDS = {BUDGET: "with 87 % fewer parameters", THRESHOLD: "at threshold 0.9"}
COSTS = ("adapter_bytes", "optimizer_bytes", "step_seconds", "saved_activation_bytes")
_ROWS_COLUMNS = "rows_columns"
_COMPARED = {"label", "prediction", "prediction_norm", "exact_match", "rouge_l", "member", "logits"}
COLUMNS = (
    *("task", "model", "mixture", "kind", "method", "importance", "operating_point", "metric", "seed", "test"),
    *("adapter_parameters", "adapter_dense", "share_of_dense", "learning_rate", "tuning", "calibrate_seconds"),
    *(*COSTS, "peak_memory_bytes", "baseline", "joint", "chance", "repaired_from", "repair_steps"),
    *("preset", "commit", "device", "config", "record", "outcome"),
)


@dataclass(frozen=True)
class Outcome:
    """How one run did on the test examples of one task: its score, and what it predicted where that was kept.

    member: of a mixture, the task that is meant.
    """

    score: float
    directory: Path
    member: str | None = None

    @cached_property
    def predictions(self) -> pd.DataFrame | None:
        """A row a test example, the columns that methods are compared by; None where none can be read."""
        try:
            with ParquetFile(self.directory / PREDICTIONS) as file:
                names = [name for name in file.schema_arrow.names if name in _COMPARED]
                frame = file.read(names, use_threads=False).to_pandas()
        except (OSError, ArrowInvalid):
            return None
        if self.member is None or "member" not in frame:
            return frame
        own = frame[frame["member"] == self.member].drop(columns="member")
        return own.reset_index(drop=True)


def collect(*results_dirs: Path) -> tuple[pd.DataFrame, list[str]]:
    """The finished runs under results directories, with COLUMNS, and what was left out, a line each.

    A mixture has a row for each of its members, whose name is the row's task; `mixture` names all of them, and is empty
    of a run of one task. kind: images, texts (classified), causal (multiple choice) or generation (free text). A
    directory without runs adds none.
    """
    rows, problems = [], []
    for results_dir in results_dirs:
        try:
            found, left_out = read(results_dir)
        except PartialLoraError:
            continue
        rows += [row for run in found for row in _rows(run)]
        problems += [f"{results_dir}: {line}" for line in left_out]
    return pd.DataFrame(rows, columns=list(COLUMNS)), problems


def _rows(run: Run) -> list[dict]:
    config, test = run.record["config"], run.record["metrics"]["test"]
    calibration = run.record.get("calibration") or {}
    calibrated, repaired = bool(calibration), calibration.get("repaired") or {}
    method, masks = config["method"]["name"], config.get("mask", {}).get("granularity", _ROWS_COLUMNS)
    cost = run.record.get("cost") or {}
    row = run.row | {
        "mixture": "",
        "kind": _kind(config["task"]),
        "method": f"{method} ({masks})" if calibrated and masks != _ROWS_COLUMNS else method,
        "importance": config.get("importance", {}).get("name", NONE) if calibrated else NONE,
        **{name: number(cost.get(name, run.row.get(name))) for name in COSTS},
        "peak_memory_bytes": number(run.record.get("peak_memory_bytes")),
        **{name: number(calibration.get(name)) for name in ("baseline", "joint", "chance")},
        "repaired_from": number(repaired.get("joint_before")),
        "repair_steps": number(repaired.get("steps")),
        "config": config,
        "record": run.record,
        "outcome": Outcome(run.row["test"], run.directory),
    }
    members = config["task"].get("members") or {}
    if not members:
        return [row]
    each = []
    for name, own in members.items():
        metric = (own.get("metrics") or _metrics_of(name, test))[0]
        score = float(test[f"{name}/{metric}"])
        of_member = {"task": name, "mixture": "+".join(members), "metric": metric, "test": score}
        each.append(row | of_member | {"outcome": Outcome(score, run.directory, name)})
    return each


def _metrics_of(member: str, test: Mapping) -> list[str]:
    names = [key.removeprefix(f"{member}/") for key in test if key.startswith(f"{member}/")]
    return [name for name in names if name != "loss"]


def _kind(task: Mapping) -> str:
    if (kind := task.get("kind", "label")) != "label":
        return "causal" if kind == "choice" else kind
    return "texts" if task.get("modality") == "text" else "images"


def draw_of(config: Mapping) -> int:
    """The seed that a run's few-shot data are drawn with: runs that have the same share a calibration."""
    own = config["calibration"].get("seed")
    return config["seed"] if own is None else own


def at_points(
    runs: pd.DataFrame, methods: Collection[str], points: Collection[str], importance: Collection[str] = ("svd",)
) -> pd.DataFrame:
    """The runs of methods at operating points, calibrated by a measure; and those that are not calibrated."""
    found = runs[runs["method"].isin(methods) & runs["operating_point"].isin([*points, NONE])]
    return found[found["importance"].isin([*importance, NONE])]


@dataclass(frozen=True)
class Evidence:
    """What a table is made of: the runs of a results directory, and where measurements of other kinds may lie.

    kept: the runs that can be compared (`comparable.comparable`); runs: all of them; notes: what was left out.
    """

    results_dir: Path
    runs: pd.DataFrame
    kept: pd.DataFrame
    notes: tuple[str, ...] = ()

    def file(self, *parts: str) -> Path | None:
        """A file of the results directory or of the one that holds it; None where neither has it."""
        files = self.files("/".join(parts))
        return files[0] if files else None

    def files(self, pattern: str) -> list[Path]:
        """All files that a pattern finds in the results directory, or else in the one that holds it."""
        for place in (self.results_dir, self.results_dir.parent):
            if found := sorted(place.glob(pattern)):
                return found
        return []
