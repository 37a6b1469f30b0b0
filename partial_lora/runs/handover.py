"""How a worker gets its settings from the parent that composed them.

They go from process to process, through the environment, and never through a file: what people read, config.yaml and
result.json, has its credentials hidden, and a worker needs them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import yaml

from partial_lora.runs import results

_VARIABLE = "PARTIAL_LORA_SETTINGS"


def variables(settings: Mapping) -> dict[str, str]:
    """What the environment of a worker needs beside the parent's."""
    return {_VARIABLE: yaml.safe_dump(dict(settings), sort_keys=False)}


def taken(directory: Path) -> dict:
    """The settings that this worker was given, and its children will not be; else those in the run's config.yaml."""
    given = os.environ.pop(_VARIABLE, None)
    return yaml.safe_load(given or (directory / results.CONFIG).read_text(encoding="utf-8"))
