"""The committed tables of models are what the code counts."""

from __future__ import annotations

import json

import model_table
from checkout import RESULTS, needs_results

from partial_lora.settings import schema

COMMITTED = RESULTS / "models"


@needs_results
def test_every_model_is_in_the_tables_with_the_numbers_that_are_counted_now() -> None:
    names = {file.stem for file in (schema.conf_dir() / "model").glob("*.yaml")}
    kept = json.loads((COMMITTED / "models.json").read_text(encoding="utf-8"))
    assert kept.keys() == names
    assert kept == model_table.outlines()
    assert (COMMITTED / "models.md").read_text(encoding="utf-8") == model_table.page(kept)
