"""Records of runs that the evidence is made of, without training: settings, scores, predictions wrong by a count."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
from evidence.dynamics import DYNAMICS, VERSION

from partial_lora import files
from partial_lora.runs import directory

EXAMPLES = 200
LABEL = np.arange(EXAMPLES) % 4
UNCALIBRATED = ("lora", "dora", "probe")
_CONFIG = {
    "model": {"name": "vit", "image_size": 56, "target_modules": ["qkv"]},
    "task": {"name": "digits", "modality": "image", "kind": "label", "train_samples": 600, "members": None},
    "method": {"name": "partial", "rank": 16, "alpha": 16.0},
    "importance": {"name": "svd"},
    "calibration": {"threshold": 0.9, "budget": None, "seed": None, "search": "scan", "repair": False},
    "mask": {"granularity": "rows_columns", "count": "exact", "seed": None},
    "trainer": {"epochs": 3, "batch_size": 16, "learning_rate": 1e-3},
}


def leave(
    place: Path,
    method: str = "partial",
    test: float | None = None,
    *,
    wrong: int = 0,
    seed: int = 0,
    task: str = "digits",
    model: str = "vit",
    threshold: float = 0.9,
    budget: float | None = None,
    share: float | None = None,
    members: dict[str, int] | None = None,
    calibration: dict | None = None,
    sparsity: dict | None = None,
    history: list | None = None,
    measured: dict | None = None,
    tuning: str = "tuned",
    started: str = "2026-01-01T00:00:00+00:00",
    **settings: object,
) -> Path:
    """A finished run; gives its directory.

    wrong: of EXAMPLES test examples, with predictions; test: a score without any. members: {name: wrong} makes it a
    mixture. measured: the content of its dynamics.json. settings: by their full key, two underscores for the dot
    (method__rank=8).
    """
    config = copy.deepcopy(_CONFIG) | {"seed": seed, "results_dir": str(place)}
    for group, name in {"task": task, "model": model, "method": method}.items():
        config[group]["name"] = name
    config["calibration"] |= {"threshold": threshold, "budget": budget}
    for key, value in settings.items():
        group, _, name = key.partition("__")
        config[group][name] = value
    calibrated = method not in UNCALIBRATED
    scores = {"primary": "accuracy", "accuracy": 1 - wrong / EXAMPLES if test is None else test}
    frame = predicted(wrong)
    if members:
        config["task"] |= {"name": "mixture", "members": {name: {"metrics": ["accuracy"]} for name in members}}
        each = {f"{name}/accuracy": 1 - count / EXAMPLES for name, count in members.items()}
        scores = {"primary": "average", "average": float(np.mean(list(each.values()))), **each}
        parts = [predicted(count).assign(member=name) for name, count in members.items()]
        frame = pd.concat(parts, ignore_index=True)
    dense = 0 if method == "probe" else 1000 * config["method"]["rank"] // 16
    trainable = round(dense * (share or budget or 0.7)) if calibrated else dense
    record = {
        "status": "finished",
        "seed": seed,
        "config": config,
        "versions": {"partial-lora": "0.1.0"},
        "git_commit": "0123456789abcdef",
        "device": "cpu",
        "preset": "cpu",
        "tuning": tuning,
        "started": started,
        "seconds": {"calibrate": 60.0, "train": 45.0, "evaluate": 1.0},
        "peak_memory_bytes": 1 << 30,
        "parameters": {
            "base": 22_000,
            "adapter_dense": dense,
            "adapter_trainable": trainable,
            "head": 10,
            "adapter_sparsity": 1 - trainable / dense if dense else None,
        },
        "sparsity": sparsity or ({"blocks.0.qkv": {"rows": 0.2, "columns": 0.4}} if calibrated else None),
        "calibration": {
            "baseline": 0.8,
            "joint": 0.1,
            "chance": 0.1,
            "threshold": threshold,
            "budget": budget,
            "cached": False,
            "reliability": {"spearman_brown": 0.75},
            **(calibration or {}),
        }
        if calibrated
        else None,
        "metrics": {"validation": scores, "test": scores},
        "history": history or [],
        "cost": {
            "adapter_bytes": 4000,
            "optimizer_bytes": 2000 + seed,
            "step_seconds": 0.25,
            "saved_activation_bytes": 1e6,
        },
    }
    same = json.dumps(config | {"seed": None, "results_dir": None}, sort_keys=True)
    name = f"{method}-{hashlib.sha256(same.encode()).hexdigest()[:8]}"
    folder = place.joinpath("runs", config["task"]["name"], model, name, f"seed{seed}")
    folder.mkdir(parents=True)
    files.write_json(folder / directory.RESULT, record)
    if test is None:
        frame.to_parquet(folder / directory.PREDICTIONS)
    if measured:
        files.write_json(folder / DYNAMICS, {"version": VERSION} | measured)
    return folder


def predicted(wrong: int) -> pd.DataFrame:
    """Predictions that are wrong about the first `wrong` examples."""
    miss = np.arange(EXAMPLES) < wrong
    return pd.DataFrame({"label": LABEL, "prediction": np.where(miss, (LABEL + 1) % 4, LABEL)})


def dynamics(train: float, test: float, cka: dict[str, float] | None = None) -> dict:
    """The content of dynamics.json."""
    metrics = {"train": {"primary": "accuracy", "accuracy": train}, "test": {"primary": "accuracy", "accuracy": test}}
    return {"metrics": metrics, "cka": cka or {"blocks.0": 0.99}}
