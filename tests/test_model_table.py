"""The committed table of models is what the code counts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import model_table  # noqa: E402

from partial_lora import config  # noqa: E402
from partial_lora.outline import outline  # noqa: E402

COMMITTED = Path(__file__).parent.parent / "results" / "models"


def test_every_model_is_in_the_table_with_the_numbers_that_are_counted_now() -> None:
    names = {file.stem for file in (config.conf_dir() / "model").glob("*.yaml")}
    kept = json.loads((COMMITTED / "models.json").read_text())
    assert kept.keys() == names
    assert kept == {name: outline(model_table.settings_of(name)).counts for name in names}
    assert model_table.table(kept) in (COMMITTED / "models.md").read_text()
