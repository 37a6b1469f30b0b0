"""What runs of a search for learning rates leave: records of a tiny model, with the validation that a test says."""

from __future__ import annotations

import copy
import functools

from partial_lora.runs import directory
from partial_lora.runs.compose import composed
from partial_lora.runs.config import plain

RATES = (1e-3, 3e-3, 1e-2, 3e-2)


@functools.cache
def known(*overrides: str) -> dict:
    return plain(composed("model=tiny_vit", *overrides))


def run(rate: float, worth: float | None, *overrides: str, loss: float = 1.0, seed: int = 0) -> dict:
    """What a run of the search leaves; `worth` None for one that diverged."""
    settings = copy.deepcopy(known(*overrides)) | {"seed": seed}
    settings["trainer"]["learning_rate"] = rate
    calibrated = settings["method"]["name"] in ("partial", "uniform")
    entry = directory.new(settings) | {"calibration": {"threshold": 0.9} if calibrated else None}
    if settings["method"]["name"] == "entries":
        entry["fixed"] = {"budget": settings["calibration"]["budget"]}
    if worth is None:
        return entry | {"status": "failed", "error": "the loss is not finite at step 3 with learning rate 0.03: lower"}
    validation = {"primary": "accuracy", "accuracy": worth, "loss": loss}
    return entry | {"status": "finished", "metrics": {"validation": validation, "test": {"accuracy": 0.0}}}


def search(worths, *overrides: str, seed: int = 0) -> list[dict]:
    return [run(rate, worth, *overrides, seed=seed) for rate, worth in zip(RATES, worths, strict=True)]
