"""Records of runs that the evidence is made of, as literal as they need to be, in the folders that runs have."""

from __future__ import annotations

import json
from pathlib import Path

from partial_lora.evidence.dynamics import DYNAMICS, VERSION

DENSE = ("lora", "probe")
DENSE_SIZE = 1_000_000  # of rank 16


def leave(
    place: Path,
    method: str,
    test: float,
    *,
    seed: int = 0,
    task: str = "digits",
    model: str = "vit_s14",
    threshold: float = 0.9,
    budget: float | None = None,
    share: float | None = None,
    history: list | None = None,
    sparsity: dict | None = None,
    measured: dict | None = None,
    tuning: str = "tuned",
    started: str = "2026-01-01T00:00:00+00:00",
    **settings: object,
) -> Path:
    """A finished run's record under place/runs, and dynamics.json beside it where `measured` has its content.

    settings: by their full key with two underscores for the dot (method__rank=8).
    """
    dense = DENSE_SIZE * settings.get("method__rank", 16) // 16 if method != "probe" else 0
    size = 1.0 if method in DENSE else share or budget or 0.7
    config = {
        "model": {"name": model},
        "task": {"name": task, "train_samples": 600},
        "method": {"name": method, "rank": 16},
        "importance": {"name": "svd"},
        "calibration": {"threshold": threshold, "budget": budget, "max_sparsity": 0.95, "seed": None},
        "mask": {"granularity": "rows_columns", "seed": None},
        "trainer": {"learning_rate": 1e-3, "epochs": 3.0, "batch_size": 16},
        "seed": seed,
        "results_dir": str(place),
    }
    for key, value in settings.items():
        group, _, name = key.partition("__")
        config[group][name] = value
    calibrated = method not in DENSE
    record = {
        "status": "finished",
        "seed": seed,
        "config": config,
        "preset": "cpu",
        "versions": {"partial-lora": "0.1.0"},
        "git_commit": "0123456789abcdef",
        "device": "cpu",
        "seconds": {"calibrate": 1.0, "train": 2.0, "evaluate": 3.0},
        "parameters": {
            "base": 22_000_000,
            "adapter_dense": dense,
            "adapter_trainable": round(dense * size),
            "head": 3850,
            "adapter_sparsity": 1 - size if dense else None,
        },
        "sparsity": sparsity or ({"blocks.0.qkv": {"rows": 0.2, "columns": 0.4}} if calibrated else None),
        "calibration": {"baseline": 0.8, "joint": 0.5, "threshold": threshold, "cached": False} if calibrated else None,
        "metrics": {"test": {"primary": "accuracy", "accuracy": test, "loss": 0.1}},
        "history": history or [],
        "tuning": tuning,
        "started": started,
    }
    name = "-".join([method, f"{threshold:g}", f"{budget}", *map(str, settings.values())])
    folder = place / "runs" / task / model / name / f"seed{seed}"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(record))
    if measured:
        (folder / DYNAMICS).write_text(json.dumps({"version": VERSION} | measured))
    return folder


def dynamics(train: float, test: float, cka: dict[str, float] | None = None) -> dict:
    """The content of dynamics.json."""
    metrics = {"train": {"primary": "accuracy", "accuracy": train}, "test": {"primary": "accuracy", "accuracy": test}}
    return {"metrics": metrics, "cka": cka or {"blocks.0": 0.99}}
