"""Records of runs that were never trained, as runs leave them: to report on."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd

from partial_lora import files
from partial_lora.launching import directory, packs
from partial_lora.methods.config import nominal_rank
from partial_lora.report import records, seed_groups

EXAMPLES = 200
LABEL = np.arange(EXAMPLES) % 4
UNCALIBRATED = ("lora", "dense", "dora", "probe", "entries")
KEPT = {"mask__fan_in": "kept", "mask__row_exponent": 1.0}  # masks as the methods draw them
_CONFIG = {
    "task": {"name": "digits", "modality": "image", "kind": "label", "train_samples": 600, "members": None},
    "model": {"name": "vit", "image_size": 56, "target_modules": ["qkv"]},
    "method": {"name": "partial", "rank": 16, "alpha": 16.0},
    "importance": {"name": "svd"},
    "calibration": {"threshold": 0.9, "budget": None, "seed": None, "search": "scan", "repair": False},
    "mask": {"granularity": "rows_columns", "count": "exact", "seed": None, "rows": "masked", "columns": "masked"}
    | {"fan_in": "dense", "row_exponent": 0.0, "column_exponent": 0.0},
    "trainer": {"epochs": 3, "batch_size": 16, "learning_rate": 1e-3},
}


def record(
    method: str = "partial",
    test: float = 0.9861,
    *,
    seed: int = 0,
    task: str = "digits",
    model: str = "vit",
    threshold: float = 0.9,
    budget: float | None = None,
    share: float | None = None,
    calibration: dict | None = None,
    **changes: object,
) -> dict:
    """A result.json.

    share: of the dense adapter, what trains. calibration: changes of its record. changes: whole fields, and settings by
    their full key with two underscores for the dot (method__rank=8).
    """
    config = copy.deepcopy(_CONFIG) | {"seed": seed}
    config["calibration"] |= {"threshold": threshold, "budget": budget}
    settings = {key: value for key, value in changes.items() if "__" in key}
    for key, value in {"task__name": task, "model__name": model, "method__name": method, **settings}.items():
        group, _, name = key.partition("__")
        config[group][name] = value
    calibrated = method not in UNCALIBRATED
    dense = 0 if method == "probe" else 1000 * nominal_rank(config["method"]["rank"]) // 16
    is_sized = method == "lora" and budget is not None
    changes |= {"fixed": {"budget": budget}} if is_sized and "fixed" not in changes else {}
    trainable = round(dense * (share or budget or 0.7)) if calibrated or is_sized else dense
    scores = {"primary": "accuracy", "accuracy": test, "loss": 0.1}
    chosen = {"baseline": 0.8, "joint": 0.1, "chance": 0.1, "threshold": threshold, "budget": budget, "search": "scan"}
    chosen |= {"evaluations": 1234, "cached": False, "reliability": {"spearman_brown": 0.75, "pearson": 0.6}}
    parameters = {"base": 22_000_000, "adapter_dense": dense, "adapter_trainable": trainable, "head": 3850}
    parameters["adapter_sparsity"] = 1 - trainable / dense if dense else None
    return {
        "format": files.FORMAT,
        "status": "finished",
        "seed": seed,
        "config": config,
        "versions": {"partial-lora": "0.1.0"},
        "git_commit": "0123456789abcdef",
        "device": "cpu",
        "mixed_precision": "no",
        "preset": "cpu",
        "started": "2026-01-01T00:00:00+00:00",
        "seconds": {"calibrate": 60.0 if calibrated else 0.0, "train": 100.0, "evaluate": 2.5},
        "peak_memory_bytes": 1 << 30,
        "parameters": parameters,
        "sparsity": {"blocks.0.qkv": {"rows": 0.25, "columns": 0.4}, "blocks.1.qkv": {"rows": 0.0, "columns": 0.95}}
        if calibrated
        else None,
        "calibration": chosen | (calibration or {}) if calibrated and not changes.get("fixed") else None,
        "metrics": {"validation": scores, "test": scores},
        "training": {"rows": 600, "steps": 10, "passes": 3, "learning_rate": config["trainer"]["learning_rate"]},
        "history": [],
        "cost": {
            "adapter_bytes": 4000,
            "optimizer_bytes": 2000 + seed,
            "step_seconds": 0.25,
            "saved_activation_bytes": 1e6,
        },
    } | {key: value for key, value in changes.items() if key not in settings}


def place(results_dir: Path, result: dict, *, id: str | None = None) -> Path:
    """Write a record where its run would lie; gives that directory. id: by default one for its settings."""
    config = result["config"]
    settings = json.dumps(config | {"seed": None}, sort_keys=True)
    id = id or hashlib.sha256(settings.encode()).hexdigest()[:8]
    names = config["task"]["name"], config["model"]["name"], f"{config['method']['name']}-{id}"
    folder = results_dir.joinpath("runs", *names, f"seed{result['seed']}")
    folder.mkdir(parents=True)
    files.write_json(folder / directory.RESULT, result)
    return folder


def leave(
    results_dir: Path,
    method: str = "partial",
    test: float | None = None,
    *,
    wrong: int = 0,
    members: dict[str, int] | None = None,
    id: str | None = None,
    **changes: object,
) -> Path:
    """Write a run of EXAMPLES test examples, `wrong` about the first, with its predictions; gives its directory.

    test: its score instead, without predictions. members: {name: wrong} makes it a mixture. changes: of `record`.
    """
    frame = _predicted(wrong)
    if members:
        each = {f"{name}/accuracy": 1 - count / EXAMPLES for name, count in members.items()}
        scores = {"primary": "average", "average": float(np.mean(list(each.values()))), **each}
        own = {name: {"metrics": ["accuracy"]} for name in members}
        changes |= {"task": "mixture", "task__members": own, "metrics": {"validation": scores, "test": scores}}
        frame = pd.concat([_predicted(count).assign(member=name) for name, count in members.items()], ignore_index=True)
    folder = place(results_dir, record(method, 1 - wrong / EXAMPLES if test is None else test, **changes), id=id)
    if test is None:
        frame.to_parquet(folder / directory.PREDICTIONS)
    return folder


def measure(folder: Path, train: float, test: float, cka: dict[str, float] | None = None) -> None:
    """Write what scripts/dynamics.py measures of a run into its directory."""
    metrics = {"train": {"primary": "accuracy", "accuracy": train}, "test": {"primary": "accuracy", "accuracy": test}}
    files.write_json(
        folder / packs.DYNAMICS, {"version": packs.OF_DYNAMICS, "metrics": metrics, "cka": cka or {"blocks.0": 0.99}}
    )


def _predicted(wrong: int) -> pd.DataFrame:
    return pd.DataFrame({"label": LABEL, "prediction": np.where(np.arange(EXAMPLES) < wrong, (LABEL + 1) % 4, LABEL)})


def rows_of(results_dir: Path) -> pd.DataFrame:
    """The rows of the runs under a results directory."""
    return seed_groups.table(records.read(results_dir)[0])
