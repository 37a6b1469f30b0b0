"""What several tests need: the shared data sets where they are, and calibrations that stay inside a test."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def cifar10_files() -> dict[str, str]:
    folder = SHARED / "cifar10"
    if not folder.is_dir():
        pytest.skip(f"the real CIFAR-10 rows are not on this machine (looked in {folder})")
    return {split: str(folder / f"{split}.parquet") for split in ("train", "test")}
