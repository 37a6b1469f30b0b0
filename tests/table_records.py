"""Records of runs as a preset leaves them, without training: settings, scores, and predictions wrong by a count."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pandas as pd

from partial_lora import results

EXAMPLES = 200
LABEL = np.arange(EXAMPLES) % 4
UNCALIBRATED = ("lora", "dora", "probe")
_CONFIG = {
    "model": {"name": "vit", "image_size": 56, "target_modules": ["qkv"]},
    "task": {"name": "digits", "modality": "image", "kind": "label", "train_samples": 600, "members": None},
    "method": {"name": "partial", "rank": 16, "alpha": 16.0},
    "importance": {"name": "svd"},
    "calibration": {"threshold": 0.9, "budget": None, "seed": 0, "search": "scan", "repair": False},
    "mask": {"granularity": "rows_columns", "count": "exact", "seed": None},
    "trainer": {"epochs": 3, "batch_size": 16, "learning_rate": 1e-3},
}


def said_wrong(wrong: int, start: int = 0) -> pd.DataFrame:
    """Predictions that are wrong about `wrong` examples from `start` on."""
    place = np.arange(EXAMPLES)
    miss = (place >= start) & (place < start + wrong)
    return pd.DataFrame({"label": LABEL, "prediction": np.where(miss, (LABEL + 1) % 4, LABEL)})


def leave(
    place: Path,
    method: str = "partial",
    *,
    wrong: int = 0,
    seed: int = 0,
    budget: float | None = None,
    predictions: bool = True,
    tuning: str = "tuned",
    started: str = "2026-01-01T00:00:00+00:00",
    settings: dict | None = None,
    calibration: dict | None = None,
    members: dict[str, int] | None = None,
    metrics: dict | None = None,
) -> Path:
    """A finished run; gives its directory.

    wrong: of EXAMPLES test examples. settings: {group: {key: value}} over those of a plain run. members: {name: wrong}
    makes it a mixture. The folder's name is of the settings, so that seeds of one calibration each lie apart.
    """
    config = copy.deepcopy(_CONFIG)
    for group, own in (settings or {}).items():
        config[group] |= own
    config |= {"seed": seed, "method": config["method"] | {"name": method}}
    config["calibration"]["budget"] = budget
    calibrated = method not in UNCALIBRATED
    primary = {"primary": "accuracy", "accuracy": 1 - wrong / EXAMPLES} if metrics is None else metrics
    frame = said_wrong(wrong)
    if members:
        config["task"] |= {"name": "mixture", "members": {name: {"metrics": ["accuracy"]} for name in members}}
        scores = {name: 1 - count / EXAMPLES for name, count in members.items()}
        primary = {"primary": "average", "average": float(np.mean(list(scores.values())))}
        primary |= {f"{name}/accuracy": score for name, score in scores.items()}
        parts = [said_wrong(count).assign(member=name) for name, count in members.items()]
        frame = pd.concat(parts, ignore_index=True)
    trainable = 130 if budget else 700
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
            "adapter_dense": 1000,
            "adapter_trainable": trainable if calibrated else 1000,
            "head": 10,
            "adapter_sparsity": 1 - trainable / 1000 if calibrated else 0.0,
        },
        "calibration": {
            "baseline": 0.8,
            "joint": 0.1,
            "chance": 0.1,
            "threshold": 0.9,
            "budget": budget,
            "cached": False,
            "reliability": {"spearman_brown": 0.75},
            **(calibration or {}),
        }
        if calibrated
        else None,
        "metrics": {"validation": primary, "test": primary},
        "history": [],
        "cost": {
            "adapter_bytes": 4000,
            "optimizer_bytes": 2000 + seed,
            "step_seconds": 0.25,
            "saved_activation_bytes": 1e6,
        },
    }
    names = [each["name"] for each in (config["task"], config["model"])]
    identifier = results_id(config)
    folder = place.joinpath("runs", *names, f"{method}-{identifier}", f"seed{seed}")
    folder.mkdir(parents=True)
    results.write_json(folder / results.RESULT, record)
    if predictions:
        frame.to_parquet(folder / results.PREDICTIONS)
    return folder


def results_id(config: dict) -> str:
    """A name for settings, as good as a hash here."""
    words = [
        config["importance"]["name"],
        *map(str, config["calibration"].values()),
        *map(str, config["mask"].values()),
    ]
    words += [str(config["trainer"]), str(config["task"]["train_samples"]), str(config["method"]["rank"])]
    return "".join(each for each in "".join(words) if each.isalnum())[:120]
