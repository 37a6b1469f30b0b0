"""Records of a search for learning rates by a tiny model, with the validation that a test wants."""

from __future__ import annotations

import copy
import functools

import tune

from partial_lora.launching import directory
from partial_lora.settings.compose import composed
from partial_lora.settings.versions import plain

RATES = (1e-3, 3e-3, 1e-2, 3e-2)


@functools.cache
def settings(*overrides: str) -> dict:
    return plain(composed("model=tiny_vit", *overrides))


def run(rate: float, value: float | None, *overrides: str, loss: float = 1.0, seed: int = 0) -> dict:
    """The record of a run. value: its metric on validation; None for one that diverged."""
    own = copy.deepcopy(settings(*overrides)) | {"seed": seed}
    own["trainer"]["learning_rate"] = rate
    calibrated = own["method"]["name"] in ("partial", "uniform")
    entry = directory.new(own) | {"calibration": {"threshold": 0.9} if calibrated else None}
    if own["method"]["name"] == "entries":
        entry["fixed"] = {"budget": own["calibration"]["budget"]}
    if value is None:
        return entry | {"status": "failed", "error": "the loss is not finite at step 3 with learning rate 0.03: lower"}
    validation = {"primary": "accuracy", "accuracy": value, "loss": loss}
    return entry | {"status": "finished", "metrics": {"validation": validation, "test": {"accuracy": 0.0}}}


def search(values, *overrides: str, seed: int = 0, losses=(1.0, 1.0, 1.0, 1.0)) -> list[dict]:
    rates = zip(RATES, values, losses, strict=True)
    return [run(rate, value, *overrides, loss=loss, seed=seed) for rate, value, loss in rates]


def best(*records: dict, before: list[dict] = ()) -> list[dict]:
    """The entries that the records of searches come to."""
    return tune.best_rates(records, before)[0]
