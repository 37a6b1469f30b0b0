"""The committed results alone: what runs, reports and comparisons have left in a checkout is no test's business."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_COPY = tempfile.TemporaryDirectory(prefix="partial-lora-results-")
RESULTS = Path(_COPY.name) / "results"


def _copy_of_committed() -> bool:
    """Copy every file of results/ that git tracks; return whether there are any (a source distribution has none)."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z", "results"], cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    for name in listed.stdout.decode().split("\0"):
        if (ROOT / name).is_file():
            place = RESULTS.parent / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, place)
    return RESULTS.is_dir()


needs_results = pytest.mark.skipif(not _copy_of_committed(), reason="needs a git checkout")
