"""Records of runs that were never trained, as runs leave them: to report on."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console

from partial_lora.report import records
from partial_lora.runs.directory import PREDICTIONS, RESULT

LABEL = np.arange(200) % 4


def record(method="partial", *, seed=0, accuracy=0.9861, task="digits", model="vit_s14", **changes) -> dict:
    """A result.json; changes: whole fields of it."""
    calibrated = method in ("partial", "targeted", "uniform")
    dense = 0 if method == "probe" else 1_000
    trainable = 700 if calibrated else dense
    calibration = {"baseline": 0.86875, "joint": 0.4, "threshold": 0.9, "search": "scan", "evaluations": 1234}
    return {
        "status": "finished",
        "seed": seed,
        "config": {
            "model": {"name": model},
            "task": {"name": task},
            "method": {"name": method, "rank": 16, "alpha": 16.0},
            "calibration": {"threshold": 0.9, "budget": None},
            "trainer": {"learning_rate": 1e-3},
        },
        "versions": {"partial-lora": "0.1.0", "torch": "2.13.0"},
        "git_commit": "0123456789abcdef",
        "device": "cpu",
        "started": "2026-01-01T00:00:00+00:00",
        "seconds": {"calibrate": 60.0 if calibrated else 0.0, "train": 100.0, "evaluate": 2.5},
        "peak_memory_bytes": 1 << 30,
        "parameters": {
            "base": 22_000_000,
            "adapter_dense": dense,
            "adapter_trainable": trainable,
            "head": 3850,
            "adapter_sparsity": 1 - trainable / dense if dense else None,
        },
        "sparsity": {"blocks.0.qkv": {"rows": 0.2, "columns": 0.4}, "blocks.1.qkv": {"rows": 0.4, "columns": 0.5}},
        "calibration": calibration | {"seconds": 59.0, "cached": False} if calibrated else None,
        "metrics": {
            "validation": {"primary": "accuracy", "accuracy": 0.98, "loss": 0.1},
            "test": {"primary": "accuracy", "accuracy": accuracy, "loss": 0.1},
        },
        "history": [],
    } | changes


def budget(result: dict, share: float) -> dict:
    """The record of a run at a budget."""
    changed = copy.deepcopy(result)
    changed["config"]["calibration"]["budget"] = share
    return changed


def place(results_dir: Path, result: dict, *, id: str = "0a1b2c3d") -> Path:
    """Write a record where its run would lie; gives that directory."""
    config = result["config"]
    names = config["task"]["name"], config["model"]["name"], f"{config['method']['name']}-{id}"
    directory = results_dir.joinpath("runs", *names, f"seed{result['seed']}")
    directory.mkdir(parents=True)
    (directory / RESULT).write_text(json.dumps(result))
    return directory


def leave(
    results_dir: Path,
    method: str,
    *,
    wrong: int,
    seed: int = 0,
    budget: float | None = None,
    settings: dict | None = None,
    importance: str = "svd",
    mask_seed: int | None = None,
    **mask: object,
) -> None:
    """Write a run and its predictions, wrong about the first examples; settings: of its trainer, mask: of its masks."""
    calibrated = method not in ("lora", "probe")
    result = record(method, seed=seed, accuracy=1 - wrong / 200, model="vit", tuning="tuned")
    result["config"] |= {
        "method": {"name": method},
        "importance": {"name": importance},
        "mask": {"granularity": "rows_columns", "seed": mask_seed, **mask},
        "calibration": {"threshold": 0.9, "budget": budget},
        "trainer": {"learning_rate": 1e-3} | (settings or {}),
    }
    result["parameters"] |= {"adapter_trainable": 130, "adapter_sparsity": 0.87}
    result["calibration"] = {"reliability": {"spearman_brown": 0.75}} if calibrated else None
    result["cost"] = {"adapter_bytes": 4000, "optimizer_bytes": 2000 + seed, "step_seconds": 0.25}
    own = [*(settings or {}).values(), *mask.values(), *([] if importance == "svd" else [importance])]
    own += [] if mask_seed is None else [f"mask{mask_seed}"]
    directory = place(results_dir, result, id=f"{budget}-{''.join(map(str, own))}".replace(".", ""))
    predicted = np.where(np.arange(200) < wrong, (LABEL + 1) % 4, LABEL)
    pd.DataFrame({"label": LABEL, "prediction": predicted}).to_parquet(directory / PREDICTIONS)


def rows_of(results_dir: Path) -> pd.DataFrame:
    """The rows of the runs under a results directory."""
    return records.table(records.read(results_dir)[0])


def drawn(table: object, width: int = 100) -> str:
    """A table as a terminal shows it."""
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(table)
    return console.file.getvalue()
