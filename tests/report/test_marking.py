"""The best of a table is marked only where its predictions say that it is better than every other."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from test_comparison_table import LABEL, leave

from partial_lora.report import records, statistics, tables
from partial_lora.report.records import Predictions
from partial_lora.runs import directory


@pytest.fixture
def place(tmp_path):
    for seed in (0, 1):
        leave(tmp_path, "partial", wrong=10, seed=seed)
        leave(tmp_path, "targeted", wrong=70, seed=seed)
        leave(tmp_path, "lora", wrong=10, seed=seed)
        leave(tmp_path, "probe", wrong=11, seed=seed)  # one example more: no difference that holds
    return tmp_path


def marked(place):
    table = records.group(records.collect(place)[0])
    return table.loc[sorted(statistics.best(table, Predictions(place))), "method"].tolist()


def written(place):
    """The table, with its best rows marked."""
    frame = records.collect(place)[0]
    best = statistics.best(records.group(frame), Predictions(place))
    return tables.write(frame, place, command="x", marked=best)[0].read_text(encoding="utf-8")


def test_only_what_holds_is_marked(place):
    assert marked(place) == ["partial"]
    text = written(place)
    assert "**95.00 ± 0.00**" in text
    assert text.count("**") == 2
    assert "Bold: better than every other" in text
    assert r"\textbf{95.00 $\pm$ 0.00}" in (place / "report" / "table.tex").read_text(encoding="utf-8")
    assert pd.read_csv(place / "report" / "table.csv", comment="#")["best"].sum() == 1


def test_without_predictions_or_beside_nothing_none_is_marked(place):
    for folder in place.glob("runs/*/*/targeted*/seed1"):
        (folder / directory.PREDICTIONS).unlink()
    assert marked(place) == []
    text = written(place)
    assert "**" not in text
    assert "Bold" not in text


def test_predictions_of_other_examples_are_no_proof(place):
    (folder,) = place.glob("runs/*/*/targeted*/seed1")
    said = np.zeros(100, int)
    pd.DataFrame({"label": LABEL[:100], "prediction": said}).to_parquet(folder / directory.PREDICTIONS)
    assert marked(place) == []


def test_to_beat_one_of_the_others_is_not_enough(place):
    for seed in (0, 1):
        leave(place, "uniform", wrong=11, seed=seed)  # of partial's own block, and as good
    assert marked(place) == []


def test_a_row_is_the_best_of_those_under_its_own_conditions(place):
    for seed in (0, 1):
        leave(place, "uniform", wrong=0, seed=seed, settings={"epochs": 50.0})
    assert marked(place) == ["partial"]  # uniform is better, and has nothing beside it
    assert "Conditions stand for all settings" in written(place)
    table = pd.read_csv(place / "report" / "table.csv", comment="#", dtype=str).set_index("method")
    assert table.loc["uniform", "conditions"] != table.loc["partial", "conditions"] == table.loc["lora", "conditions"]


def test_one_seed_is_no_proof(tmp_path):
    leave(tmp_path, "partial", wrong=10)
    leave(tmp_path, "targeted", wrong=70)
    assert marked(tmp_path) == []
