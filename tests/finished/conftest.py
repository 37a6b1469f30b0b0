"""What tests of finished runs share: what is made of rows is kept where the runs that are trained once keep it."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def same_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    import finished_runs

    monkeypatch.setenv("PARTIAL_LORA_CACHE", finished_runs.cache())
