"""Metrics without a network, and what was said about every example."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import pytest

from partial_lora import evaluation


def test_accuracy_is_the_share_of_right_labels_and_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    logits = np.array([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [0.0, 4.0]])
    prediction = SimpleNamespace(predictions=logits, label_ids=np.array([0, 1, 1, 1]))
    assert evaluation.classification_metrics(prediction) == {"accuracy": 0.75}
    assert evaluation.classification_metrics(prediction) == {"accuracy": 0.75}  # nothing is left from the first time


def test_predictions_say_what_was_said_about_every_example(tmp_path: Path) -> None:
    logits = np.array([[0.0, np.log(3.0)], [1000.0, 0.0]])
    evaluation.write_predictions(tmp_path / "predictions.parquet", logits, np.array([1, 1]), ("cat", "dog"))
    frame = pandas.read_parquet(tmp_path / "predictions.parquet")
    assert frame[["index", "label", "prediction"]].values.tolist() == [[0, 1, 1], [1, 1, 0]]
    assert frame["label_name"].tolist() == ["dog", "dog"]
    assert frame["prediction_name"].tolist() == ["dog", "cat"]
    assert frame["score"].tolist() == pytest.approx([0.75, 1.0])
    assert np.allclose(np.stack(frame["logits"]), logits)
