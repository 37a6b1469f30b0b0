"""The record of the first day: rows of earlier calls stay, and data is written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import first_day
import pandas as pd
import pytest


def rows(table: str, test: float = 0.8) -> pd.DataFrame:
    one = {"table": table, "held_out": True, "rows": 400, "classes": 3, "method": "lora", "seed": 0, "steps": 300}
    one |= {"learning_rate": 2e-3, "seconds": 60.0, "validation": 0.9, "test": test}
    return pd.DataFrame([one | {"factor": factor} for factor in (1.0, 0.5, 2.0)])


def test_a_call_for_one_table_keeps_the_rows_of_others_and_replaces_its_own(tmp_path: Path) -> None:
    first_day.write(rows("questions"), tmp_path)
    first_day.write(rows("reviews"), tmp_path)
    first_day.write(rows("reviews", 0.5), tmp_path)
    found = pd.read_csv(tmp_path / "first_day.csv")
    assert found.groupby("table")["test"].agg(list).to_dict() == {"questions": [0.8] * 3, "reviews": [0.5] * 3}


def test_data_of_an_interrupted_call_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def drawn(*_):
        if written:
            raise KeyboardInterrupt
        written.append("train")
        return first_day.Dataset.from_dict({"text": ["a"], "class": ["b"]})

    monkeypatch.setattr(first_day, "_of_sets", lambda *_: [first_day.Dataset.from_dict({"text": ["a"]})])
    monkeypatch.setattr(first_day, "_drawn", drawn)
    with pytest.raises(KeyboardInterrupt):
        first_day.write_table(first_day.TABLES["questions"], tmp_path, tmp_path / "questions")
    assert list(tmp_path.iterdir()) == []
