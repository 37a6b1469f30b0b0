"""The record of a run that becomes result.json: raw numbers, and enough to know where they come from."""

from __future__ import annotations

import math
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from partial_lora.redaction import redacted

_LIBRARIES = ("partial-lora", "torch", "transformers", "timm", "peft", "accelerate", "datasets", "numpy")


def new(settings: Mapping) -> dict:
    """The record of a run that has just begun (DESIGN, result.json)."""
    return {
        "status": "running",
        "seed": settings["seed"],
        "config": redacted(settings),
        "preset": settings.get("preset"),
        "tuning": _tuning(settings.get("trainer", {})),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in _LIBRARIES},
        "git_commit": _git_commit(),
        "device": None,
        "attempts": 1,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": {"calibrate": 0.0, "train": 0.0, "evaluate": 0.0},
        "peak_memory_bytes": None,
        "parameters": {},
        "sparsity": {},
        "shapes": {},
        "calibration": None,
        "metrics": {},
        "history": [],
    }


def finite(value: object) -> object:
    """The same plain data with None for every number that is none: JSON has no word for it."""
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def timed(record: dict, stage: str) -> Iterator[None]:
    """Note the wall seconds that a stage took, beside those of earlier attempts."""
    start = time.perf_counter()
    yield
    record["seconds"][stage] = round(record["seconds"].get(stage, 0.0) + time.perf_counter() - start, 3)


def carry_on(record: dict, earlier: Mapping) -> None:
    """Let the record of a run that is gone on with know of the attempts before: when they began, what they took."""
    record["started"] = earlier["started"]
    record["attempts"] = earlier.get("attempts", 1) + 1
    kept = {"calibrate", "reliability"} & earlier["seconds"].keys()  # a checkpoint knows the seconds of training
    record["seconds"] |= {stage: earlier["seconds"][stage] for stage in kept}


def _tuning(trainer: Mapping) -> str:
    """Whether the learning rate was searched for, and where if not for such a run, as tables say it."""
    if trainer.get("tuned") is None:
        return "untuned"
    return trainer.get("tuned_elsewhere") or "tuned"


def _git_commit() -> str | None:
    """The commit of the checkout this package runs from; None where it is installed from a wheel."""
    package = Path(__file__).resolve().parents[1]
    if not (package.parent / ".git").exists():
        return None
    command = ["git", "-C", str(package), "rev-parse", "HEAD"]
    try:
        head = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return None
    return head.stdout.strip() or None
