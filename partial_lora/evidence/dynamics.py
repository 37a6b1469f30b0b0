"""What `scripts/dynamics.py` leaves beside a run's record: dynamics.json, read without torch."""

from __future__ import annotations

import json
from pathlib import Path

DYNAMICS = "dynamics.json"
VERSION = 1


def read_dynamics(directory: Path) -> dict | None:
    """The file's content: metrics by split (train, test), `cka` of every block; None where there is none, or another.

    cka: {block: linear CKA between the features after it in the frozen and in the trained model}.
    """
    try:
        content = json.loads((Path(directory) / DYNAMICS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(content, dict) and content.get("version") == VERSION and {"metrics", "cka"} <= content.keys()
    return content if whole else None


def gap(content: dict) -> tuple[float, float]:
    """The main metric on training rows and on test rows."""
    test = content["metrics"]["test"]
    return float(content["metrics"]["train"][test["primary"]]), float(test[test["primary"]])
