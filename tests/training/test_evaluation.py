"""Metrics without a network, and what was said about every example."""

from __future__ import annotations

from pathlib import Path

import evaluate
import numpy as np
import pandas
import pytest
from scipy.special import softmax
from sklearn import metrics

from partial_lora.training import metrics as evaluation

LOGITS = np.array([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [0.0, 4.0], [0.0, 1.0]])
CLASSES = np.array([0, 1, 1, 1, 0])
OUTPUTS, NUMBERS = np.array([[0.5], [1.0], [2.0], [4.0]]), np.array([0.0, 1.0, 4.0, 3.0])


def test_metrics_need_no_network_and_keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", "/dev/null/metrics")  # no folder can be made there
    evaluation.offline.cache_clear()
    for _ in range(2):
        assert evaluation.metrics_of(["accuracy"], LOGITS, CLASSES) == {"accuracy": 0.6}


def test_metrics_of_classes_are_those_of_scikit_learn() -> None:
    found = evaluation.metrics_of(["matthews", "f1"], LOGITS, CLASSES)
    said = LOGITS.argmax(-1)
    assert found == {"matthews": metrics.matthews_corrcoef(CLASSES, said), "f1": metrics.f1_score(CLASSES, said)}
    three = np.eye(3)[[0, 1, 2, 2, 0]]
    macro = metrics.f1_score(CLASSES, three.argmax(-1), average="macro")
    assert evaluation.metrics_of(["f1"], three, CLASSES) == {"f1": pytest.approx(macro)}


def test_metrics_of_numbers() -> None:
    found = evaluation.metrics_of(["pearson", "spearman", "mse"], OUTPUTS, NUMBERS)
    assert found["pearson"] == pytest.approx(np.corrcoef(OUTPUTS[:, 0], NUMBERS)[0, 1])
    assert found["spearman"] == pytest.approx(0.8)  # ranks 1 2 3 4 against 1 2 4 3
    assert found["mse"] == pytest.approx((0.25 + 0 + 4 + 1) / 4)


def test_a_split_has_its_primary_metric_and_the_loss_averaged_over_examples() -> None:
    found = evaluation.split_metrics(("accuracy", "f1"), LOGITS, CLASSES)
    assert (found["primary"], found["accuracy"]) == ("accuracy", 0.6)
    assert found["loss"] == pytest.approx(metrics.log_loss(CLASSES, softmax(LOGITS, axis=-1)))
    assert evaluation.split_metrics(("pearson",), OUTPUTS, NUMBERS)["loss"] == pytest.approx(1.3125)


def test_predictions_of_a_regression_are_numbers(tmp_path: Path) -> None:
    evaluation.write_predictions(tmp_path / "predictions.parquet", evaluation.predictions_of(OUTPUTS, NUMBERS, ()))
    frame = pandas.read_parquet(tmp_path / "predictions.parquet")
    assert list(frame) == ["index", "label", "prediction", "score", "logits"]
    assert frame["label"].tolist() == NUMBERS.tolist()
    assert frame["prediction"].tolist() == frame["score"].tolist() == OUTPUTS[:, 0].tolist()


def test_predictions_say_what_was_said_about_every_example(tmp_path: Path) -> None:
    logits = np.array([[0.0, np.log(3.0)], [1000.0, 0.0]])
    said = evaluation.predictions_of(logits, np.array([1, 1]), ("cat", "dog"))
    evaluation.write_predictions(tmp_path / "predictions.parquet", said)
    frame = pandas.read_parquet(tmp_path / "predictions.parquet")
    assert frame[["index", "label", "prediction"]].values.tolist() == [[0, 1, 1], [1, 1, 0]]
    assert frame["label_name"].tolist() == ["dog", "dog"]
    assert frame["prediction_name"].tolist() == ["dog", "cat"]
    assert frame["score"].tolist() == pytest.approx([0.75, 1.0])
    assert np.allclose(np.stack(frame["logits"]), logits)
