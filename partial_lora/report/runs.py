"""The records of finished runs, as rows of a table.

Nothing here is typed by hand and nothing is measured again: every number is one of a result.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from partial_lora.errors import PartialLoraError
from partial_lora.report import wellformed
from partial_lora.report.conditions import conditions, digest, precision
from partial_lora.runs.operating_point import NO_POINT, said
from partial_lora.runs.results import ADAPTER, RESULT

NONE = NO_POINT  # for what does not apply
ROWS_COLUMNS = "rows_columns"  # the granularity of masks that goes without saying
_RUNS = "runs/*/*/*/seed*"  # runs/task/model/method-id/seedK


@dataclass(frozen=True)
class Run:
    """A finished run: its directory, its record, and the numbers of it that tables have (`row`)."""

    directory: Path
    record: dict
    row: dict


def collect(results_dir: Path) -> tuple[pd.DataFrame, list[str]]:
    """The finished runs under a results directory, a row each, and what was left out, a line each (`read`)."""
    found, problems = read(results_dir)
    return table(found), problems


def one(directory: Path) -> Run:
    """The finished run of a directory; raises PartialLoraError, naming its record, where there is none."""
    directory = Path(directory)
    try:
        return run_of(record(directory), directory)
    except ValueError as error:
        raise PartialLoraError(f"{directory / RESULT}: {error}") from error


def run_of(result: dict, directory: Path) -> Run:
    """A record as a run, wherever its directory is; raises ValueError for a record that lacks or garbles something."""
    place = Path(directory).resolve()
    return Run(Path(directory), result, {"group": place.parent.name} | row(result, Path(f"seed{result.get('seed')}")))


def table(found: list[Run]) -> pd.DataFrame:
    """The rows of runs."""
    return pd.DataFrame([run.row for run in found])


def read(results_dir: Path) -> tuple[list[Run], list[str]]:
    """The finished runs under a results directory, and what was left out, a line each.

    A row's group is the folder that runs of other seeds share. Left out and named is a run that failed, has not
    finished or only calibrated, and a result.json that is broken, foreign or copied from another run. Raises
    PartialLoraError where the directory holds no runs at all.
    """
    results_dir = Path(results_dir)
    directories = sorted(path for path in results_dir.glob(_RUNS) if path.is_dir())
    if not directories:
        raise PartialLoraError(f"{results_dir}: expected runs in {results_dir}/runs; `partial-lora train` makes them")
    found, problems = [], []
    for directory in directories:
        try:
            result = record(directory)
            group = {"group": str(directory.parent.relative_to(results_dir))}
            found.append(Run(directory, result, group | row(result, directory)))
        except ValueError as error:
            problems.append(f"{directory.relative_to(results_dir)}/{RESULT}: {error}")
    return found, problems


def record(directory: Path) -> dict:
    """The record of a finished run; raises ValueError that says what is there instead."""
    try:
        result = json.loads((directory / RESULT).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError("missing, the run never started or was interrupted") from error
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError("broken, not JSON") from error
    if not isinstance(result, dict) or "status" not in result:
        raise ValueError("foreign, no record of a run")
    if result["status"] != "finished":
        detail = f": {result['error']}" if result.get("error") else ""
        raise ValueError(f"{result['status']}{detail}")
    if not result.get("metrics"):
        raise ValueError("calibrated only, nothing was trained")
    return result


def row(result: Mapping, directory: Path) -> dict:
    """One run as a row of plain numbers; raises ValueError for a record that lacks or garbles one.

    conditions: what runs have in common that may be compared (`conditions.digest`).
    """
    try:
        config, test, parameters = result["config"], result["metrics"]["test"], result["parameters"]
        seconds, calibration = result["seconds"], result["calibration"]
        # What AdaLoRA has left is its size, as in its paper; that it began with more shows in its bytes.
        dense, size = parameters["adapter_dense"], parameters.get("adapter_final", parameters["adapter_trainable"])
        wellformed.check(result)
        found = {
            "seed": result["seed"],
            "task": config["task"]["name"],
            "model": config["model"]["name"],
            "method": method_of(result),
            "operating_point": operating_point(result),
            "metric": test["primary"],
            "test": float(test[test["primary"]]),
            "adapter_parameters": size,
            "adapter_dense": dense,
            "share_of_dense": size / dense if dense else math.nan,
            "head_parameters": parameters["head"],
            "adapter_sparsity": number(parameters["adapter_sparsity"]),
            "adapter_bytes": _adapter_bytes(result),
            "calibrate_seconds": _calibrate_seconds(result),
            "calibration_reused": bool(calibration and calibration.get("cached")),
            "train_seconds": number(seconds["train"]),
            "evaluate_seconds": number(seconds["evaluate"]),
            "learning_rate": float(config["trainer"]["learning_rate"]),
            "tuning": result.get("tuning", "untuned"),
            "conditions": digest(conditions(result)),
            "preset": result.get("preset") or NONE,
            "commit": _code(result),
            "device": result.get("device") or NONE,
            "precision": precision(result),
        }
    except KeyError as error:
        raise ValueError(f"foreign, no {error.args[0]} in it") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"foreign, not the fields of a run ({error})") from error
    if not math.isfinite(found["test"]):
        raise ValueError(f"broken, its test {found['metric']} is {found['test']}")
    if directory.name != f"seed{found['seed']}":
        raise ValueError(f"a copy of another run, its seed is {found['seed']}")
    return found


def method_of(result: Mapping) -> str:
    """What a run's method is called: one whose masks are of single entries is another than that of rows and columns."""
    name = result["config"]["method"]["name"]
    masks = result["config"].get("mask", {}).get("granularity", ROWS_COLUMNS)
    return name if masks == ROWS_COLUMNS or result.get("calibration") is None else f"{name} ({masks})"


def operating_point(result: Mapping) -> str:
    """Where on the curve of accuracy against size a run was put: "threshold 0.9", "budget 0.13", or "–"."""
    if result["calibration"] is None:
        return NONE
    chosen = result["config"]["calibration"]
    if chosen.get("file"):  # the file's own point, whatever the settings beside it say
        chosen = result["calibration"]
    return said(chosen)


def _adapter_bytes(result: Mapping) -> float:
    """What the adapter's tensors weigh on disk; NaN for records made before that was kept."""
    kept = (result.get("cost") or {}).get("adapter_bytes")
    if kept is None:
        sizes = (result.get("files") or {}).items()
        kept = sum(size for name, size in sizes if name.startswith(f"{ADAPTER}/") and name.endswith(".safetensors"))
    return number(kept or None)


def _calibrate_seconds(result: Mapping) -> float:
    """What calibrating cost; NaN where nothing was calibrated, and where an earlier run had paid for it."""
    calibration = result["calibration"]
    if calibration is None or calibration.get("cached"):
        return math.nan
    return number(result["seconds"]["calibrate"])


def _code(result: Mapping) -> str:
    """What the run was computed by: the commit of a checkout, else the version of the installed package."""
    return (result.get("git_commit") or "")[:12] or f"partial-lora {result['versions']['partial-lora']}"


def number(value: float | None) -> float:
    """A number as a float; NaN for one that does not apply, which averages leave out."""
    return math.nan if value is None else float(value)
