"""A model's predictions, one row an example, and their metrics, computed offline."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import pandas
import torch
from scipy.special import log_softmax, softmax
from torch import Tensor

from partial_lora.calibration.answer_scores import token_losses, tokens
from partial_lora.tasks.metrics import FUNCTIONS, mse


@cache
def offline(name: str):
    """Return a metric of `evaluate` by its name.

    evaluate fetches its own metric scripts from the hub; a subclass in the package needs no network. It is imported
    here because that is slow.
    """
    import datasets
    import evaluate

    kind = datasets.Value("float64" if name in ("pearson", "spearman", "mse") else "int64")

    class Offline(evaluate.Metric):
        def _info(self) -> evaluate.MetricInfo:
            return evaluate.MetricInfo(
                description=FUNCTIONS[name].__doc__,
                citation="",
                inputs_description="predictions and references: class indices, or numbers",
                features=datasets.Features({"predictions": kind, "references": kind}),
            )

        def _compute(self, predictions: Sequence, references: Sequence, **options: int) -> dict[str, float]:
            return {name: FUNCTIONS[name](np.asarray(predictions), np.asarray(references), **options)}

    with tempfile.TemporaryDirectory() as unused:  # evaluate makes a folder even for what it keeps in memory
        return Offline(keep_in_memory=True, cache_dir=unused)


def predicted(logits: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Return the classes of logits (N, outputs), or the one output where references are real numbers (N,)."""
    if np.issubdtype(references.dtype, np.floating):
        return logits.reshape(len(references))
    return logits.argmax(axis=-1)


def metrics_of(names: Sequence[str], logits: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """Return the named metrics of logits (N, classes) or (N, 1) against class indices or real numbers (N,)."""
    predictions, values = predicted(logits, references), {}
    for name in names:
        options = {"classes": logits.shape[-1]} if name == "f1" else {}
        values |= offline(name).compute(predictions=predictions, references=references, **options)
    return values


def mean_loss(logits: np.ndarray, references: np.ndarray) -> float:
    """Return the cross entropy, or squared error of real numbers, averaged over examples.

    Trainer's own average is over batches, which differs where the last batch is smaller or, with several processes,
    padded.
    """
    if np.issubdtype(references.dtype, np.floating):
        return mse(predicted(logits, references), references)
    return float(-np.take_along_axis(log_softmax(logits, axis=-1), references[:, None], axis=-1).mean())


def predictions_of(logits: np.ndarray, references: np.ndarray, labels: Sequence[str]) -> pandas.DataFrame:
    """Return one row an example, in the order of the split, so that two methods can be compared by example.

    Columns: index, label, prediction (class indices), their names, score (the softmax probability of the prediction)
    and the logits. A regression, which has no labels, has index, label, prediction and score (the same number), and
    the logits.
    """
    predictions = predicted(logits, references)
    columns = {"index": np.arange(len(logits)), "label": references, "prediction": predictions}
    if labels:
        columns["label_name"] = [labels[index] for index in references]
        columns["prediction_name"] = [labels[index] for index in predictions]
        columns["score"] = np.exp(log_softmax(logits, axis=-1)).max(axis=-1)
    else:
        columns["score"] = predictions
    columns["logits"] = list(logits.astype(np.float32))
    return pandas.DataFrame(columns)


# Answers of a language model: their likelihood, in parts of a batch. Of options the share of questions whose right one
# is the most likely, as lm-evaluation-harness counts it.

_TOKENS = 2048  # whose logits are made at once: with a vocabulary of 128,000 words they take a gigabyte in float32


def in_parts(batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return a batch of texts in parts of at most _TOKENS tokens, or of one text."""
    rows, length = batch["input_ids"].shape
    at_once = max(1, _TOKENS // length)
    return [{name: tensor[at : at + at_once] for name, tensor in batch.items()} for at in range(0, rows, at_once)]


def log_likelihoods(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Return the log likelihood of each row's answer and the number of its tokens (rows, 2), float64.

    Args:
        logits: (rows, length, vocabulary), or a model's outputs, whose first item they are.
        labels: (rows, length), -100 for tokens outside the answer; each is predicted at the place before it.

    So an evaluation keeps two numbers a row instead of a vocabulary a token.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    return torch.stack([-token_losses(logits, labels), tokens(labels).double()], dim=1)


def option_predictions(
    log_likelihoods: np.ndarray, items: np.ndarray, right: np.ndarray, characters: np.ndarray
) -> dict[str, list]:
    """Return the columns label, prediction, prediction_norm and scores of all questions, in the order of their numbers.

    Args:
        log_likelihoods: (rows,), of one option each, a sum over its tokens.
        items: the number of the question (rows,); the options of a question are in their order.
        right: True for the right option (rows,).
        characters: the length of the option (rows,).

    label, prediction and prediction_norm are places of options: the right one, the most likely in sum and per
    character (of equals the first). scores: the softmax over a question's options, an array each.
    """
    columns: dict[str, list] = {"label": [], "prediction": [], "prediction_norm": [], "scores": []}
    order = np.argsort(items, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(items[order])) + 1):
        sums = np.asarray(log_likelihoods[rows], dtype=np.float64)
        columns["label"].append(int(np.argmax(right[rows])))
        columns["prediction"].append(int(np.argmax(sums)))
        columns["prediction_norm"].append(int(np.argmax(sums / np.maximum(characters[rows], 1))))
        columns["scores"].append(softmax(sums))
    return columns


def option_metrics(columns: dict[str, list]) -> dict[str, float]:
    """Return lm-evaluation-harness's acc and acc_norm of `option_predictions`."""
    label = np.asarray(columns["label"])
    return {
        "accuracy": float(np.mean(np.asarray(columns["prediction"]) == label)),
        "accuracy_norm": float(np.mean(np.asarray(columns["prediction_norm"]) == label)),
    }
