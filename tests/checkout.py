"""A mark for tests of the committed results, which a source distribution leaves out."""

from __future__ import annotations

from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parents[1] / "results"
needs_results = pytest.mark.skipif(not RESULTS.is_dir(), reason="needs a checkout")
