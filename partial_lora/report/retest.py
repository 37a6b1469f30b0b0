"""How reliable the sparsities of finished runs are, by their records: what calibrating again would bring back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import fmean

from partial_lora.calibration.stability import every_two, mean_difference

_AS_CALIBRATED = ("partial", "targeted", "flow")  # methods whose sparsities are calibration's own


def reliability(records: Iterable[Mapping]) -> float:
    """A correlation that two calibrations are expected to have; NaN where the runs do not tell.

    records: runs that differ in their seed alone. Where they calibrated on halves of their draw
    (`calibration.reliability`) it is the Spearman–Brown correlation, the mean over runs. Where every seed calibrated on
    examples of its own (`calibration.seed=null`) it is Pearson's correlation of their sparsities, over modules and
    axes, the mean over all pairs of seeds: of `partial`, `targeted` and `flow`, since controls do not have the
    sparsities that were calibrated.
    """
    records = list(records)
    halves = [(record.get("calibration") or {}).get("reliability") or {} for record in records]
    corrected = [each["spearman_brown"] for each in halves if each.get("spearman_brown") is not None]
    if corrected:
        return fmean(corrected)
    own = {record["seed"]: record["sparsity"] for record in records if _calibrated_itself(record)}
    found = mean_difference(every_two([own[seed] for seed in sorted(own)]))["pearson"]
    return math.nan if found is None else found


def _calibrated_itself(record: Mapping) -> bool:
    config, calibration = record["config"], record.get("calibration")
    if not calibration or config["method"]["name"] not in _AS_CALIBRATED:
        return False
    return config["calibration"].get("file") is None and config["calibration"].get("seed", 0) is None
