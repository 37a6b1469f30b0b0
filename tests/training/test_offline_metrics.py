"""Metrics without a network; predictions by example; options against one sequence at a time."""

from __future__ import annotations

from pathlib import Path

import datasets
import evaluate
import numpy as np
import pandas
import pytest
import torch
from scipy.special import softmax
from sklearn import metrics as sklearn_metrics
from tiny_causal import llama, merging_tokenizer

from partial_lora import tasks
from partial_lora.tasks import questions
from partial_lora.training import offline_metrics

LOGITS = np.array([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [0.0, 4.0], [0.0, 1.0]])
CLASSES = np.array([0, 1, 1, 1, 0])
OUTPUTS, NUMBERS = np.array([[0.5], [1.0], [2.0], [4.0]]), np.array([0.0, 1.0, 4.0, 3.0])


def test_metrics_need_no_network_and_keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", "/dev/null/metrics")  # no folder can be made there
    offline_metrics.offline.cache_clear()
    for _ in range(2):
        assert offline_metrics.metrics_of(["accuracy"], LOGITS, CLASSES) == {"accuracy": 0.6}


def test_metrics_of_classes_are_those_of_scikit_learn() -> None:
    classes = LOGITS.argmax(-1)
    assert offline_metrics.metrics_of(["matthews", "f1"], LOGITS, CLASSES) == {
        "matthews": sklearn_metrics.matthews_corrcoef(CLASSES, classes),
        "f1": sklearn_metrics.f1_score(CLASSES, classes),
    }
    three = np.eye(3)[[0, 1, 2, 2, 0]]
    macro = sklearn_metrics.f1_score(CLASSES, three.argmax(-1), average="macro")
    assert offline_metrics.metrics_of(["f1"], three, CLASSES) == {"f1": pytest.approx(macro)}


def test_metrics_of_numbers() -> None:
    found = offline_metrics.metrics_of(["pearson", "spearman", "mse"], OUTPUTS, NUMBERS)
    assert found["pearson"] == pytest.approx(np.corrcoef(OUTPUTS[:, 0], NUMBERS)[0, 1])
    assert found["spearman"] == pytest.approx(0.8)  # ranks 1 2 3 4 against 1 2 4 3
    assert found["mse"] == pytest.approx((0.25 + 0 + 4 + 1) / 4)


def test_the_loss_is_averaged_over_examples() -> None:
    expected = sklearn_metrics.log_loss(CLASSES, softmax(LOGITS, axis=-1))
    assert offline_metrics.mean_loss(LOGITS, CLASSES) == pytest.approx(expected)
    assert offline_metrics.mean_loss(OUTPUTS, NUMBERS) == pytest.approx(1.3125)


def test_predictions_of_a_regression_are_numbers(tmp_path: Path) -> None:
    offline_metrics.predictions_of(OUTPUTS, NUMBERS, ()).to_parquet(tmp_path / "predictions.parquet", index=False)
    frame = pandas.read_parquet(tmp_path / "predictions.parquet")
    assert list(frame) == ["index", "label", "prediction", "score", "logits"]
    assert frame["label"].tolist() == NUMBERS.tolist()
    assert frame["prediction"].tolist() == frame["score"].tolist() == OUTPUTS[:, 0].tolist()


def test_predictions_are_one_row_an_example(tmp_path: Path) -> None:
    logits = np.array([[0.0, np.log(3.0)], [1000.0, 0.0]])
    frame = offline_metrics.predictions_of(logits, np.array([1, 1]), ("cat", "dog"))
    frame.to_parquet(tmp_path / "predictions.parquet", index=False)
    frame = pandas.read_parquet(tmp_path / "predictions.parquet")
    assert frame[["index", "label", "prediction"]].values.tolist() == [[0, 1, 1], [1, 1, 0]]
    assert frame["label_name"].tolist() == ["dog", "dog"]
    assert frame["prediction_name"].tolist() == ["dog", "cat"]
    assert frame["score"].tolist() == pytest.approx([0.75, 1.0])
    assert np.allclose(np.stack(frame["logits"]), logits)


# Options

QUESTIONS = ["Question: which of these is a bird?\nAnswer:", "the man", "two and two is", "the end\nthe start"]
OPTIONS = [
    [" the robin", " snow", " a bird, and four"],
    [" writes", " drives on"],
    [" four", " two"],
    [" of it", " is"],
]
LABELS = [0, 0, 1, 1]


def rows() -> datasets.Dataset:
    prompts = [[prompt] * len(options) for prompt, options in zip(QUESTIONS, OPTIONS, strict=True)]
    data = {"prompts": prompts, "options": OPTIONS, "label": LABELS}
    return datasets.Dataset.from_dict(data, features=questions.CHOICE_FEATURES)


@torch.no_grad()
def literal(model, row: dict) -> float:
    """Return the log probability of an option: token after token, one sequence, no padding."""
    total = 0.0
    for place in range(row["answer_start"], row["length"]):
        logits = model(input_ids=torch.tensor([row["input_ids"][:place]])).logits[0, -1]
        total += float(logits.double().log_softmax(0)[row["input_ids"][place]])
    return total


@pytest.fixture(scope="module")
def scored() -> tuple:
    tokenizer = merging_tokenizer()
    transform, model = tasks.ChoiceTransform(tokenizer, 64), llama(tokenizer, seed=2)
    options = transform.options(rows(), cache_bytes=0)
    return model, transform, options, np.array([literal(model, row) for row in options])


def test_likelihoods_are_those_of_a_loop_over_tokens(scored) -> None:
    model, transform, options, expected = scored
    batch = transform.collate(options.to_list())
    assert len(set(options["length"])) > 2  # so there is padding
    with torch.no_grad():
        logits = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
    found = offline_metrics.log_likelihoods(logits, batch["labels"])
    assert found.shape == (len(options), 2)
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-4)
    assert found[:, 1].tolist() == [row["length"] - row["answer_start"] for row in options]
    assert torch.equal(offline_metrics.log_likelihoods((logits, "cache"), batch["labels"]), found)


def test_accuracies_are_those_of_a_loop_over_questions(scored) -> None:
    *_, options, likelihoods = scored
    columns = [np.asarray(options[name]) for name in ("item", "right", "characters")]
    at, hits, normed, chosen = 0, [], [], offline_metrics.option_predictions(likelihoods, *columns)
    for number, (texts, label) in enumerate(zip(OPTIONS, LABELS, strict=True)):
        sums = likelihoods[at : at + len(texts)]
        a_character = [value / len(text[1:]) for value, text in zip(sums, texts, strict=True)]
        hits.append(max(range(len(texts)), key=lambda place: sums[place]) == label)
        normed.append(max(range(len(texts)), key=lambda place: a_character[place]) == label)
        assert chosen["label"][number] == label
        np.testing.assert_allclose(chosen["scores"][number], np.exp(sums) / np.exp(sums).sum())
        at += len(texts)
    assert np.mean(hits) != np.mean(normed)
    assert chosen["prediction"] == [int(np.argmax(likelihoods[columns[0] == item])) for item in range(len(OPTIONS))]
    assert offline_metrics.option_metrics(chosen) == {"accuracy": np.mean(hits), "accuracy_norm": np.mean(normed)}


def test_of_equally_likely_options_the_first_counts_and_length_is_in_characters() -> None:
    items, right = np.array([0, 0, 1, 1]), np.array([True, False, False, True])
    likelihoods, characters = np.array([-4.0, -4.0, -4.0, -6.0]), np.array([4, 4, 2, 6])
    columns = offline_metrics.option_predictions(likelihoods, items, right, characters)
    assert offline_metrics.option_metrics(columns) == {"accuracy": 0.5, "accuracy_norm": 1.0}
