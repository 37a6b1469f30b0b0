"""How good a model is: metrics computed offline, and what it said about every example."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pandas
from scipy.special import log_softmax

from partial_lora.results import write_atomic


@cache
def accuracy():
    """The share of examples whose predicted label is the true one, as a metric of `evaluate`.

    evaluate fetches its own metric scripts from the hub; a subclass in the package needs no network. Its import is
    slow and must not share a line with that of datasets, hence here.
    """
    import datasets
    import evaluate

    class Accuracy(evaluate.Metric):
        def _info(self) -> evaluate.MetricInfo:
            integers = datasets.Value("int64")
            return evaluate.MetricInfo(
                description="Share of predictions that equal their reference.",
                citation="",
                inputs_description="predictions and references: class indices",
                features=datasets.Features({"predictions": integers, "references": integers}),
            )

        def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
            return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}

    return Accuracy(keep_in_memory=True)


def classification_metrics(prediction) -> dict[str, float]:
    """Metrics of an EvalPrediction: logits (N, classes) against labels (N,)."""
    predicted = np.argmax(prediction.predictions, axis=-1)
    return accuracy().compute(predictions=predicted, references=prediction.label_ids)


def split_metrics(output, primary: str) -> dict:
    """Metrics of a PredictionOutput under their plain names, `primary` naming the main one.

    The loss is the cross entropy averaged over examples, which Trainer's own average over batches is not where the last
    batch is smaller or, with several processes, filled up.
    """
    log_chances = np.take_along_axis(log_softmax(output.predictions, axis=-1), output.label_ids[:, None], axis=-1)
    loss = -log_chances.mean()
    return {"primary": primary, **classification_metrics(output), "loss": float(loss)}


def write_predictions(path: Path, logits: np.ndarray, references: np.ndarray, labels: Sequence[str]) -> None:
    """Keep what was said about every example, so that two methods can be compared example by example.

    One row an example, in the order of the split: index, label, prediction (class indices), their names, score (the
    softmax probability of the prediction) and the logits.
    """
    probabilities = np.exp(log_softmax(logits, axis=-1))
    predicted = logits.argmax(axis=-1)
    frame = pandas.DataFrame(
        {
            "index": np.arange(len(logits)),
            "label": references,
            "prediction": predicted,
            "label_name": [labels[index] for index in references],
            "prediction_name": [labels[index] for index in predicted],
            "score": probabilities.max(axis=-1),
            "logits": list(logits.astype(np.float32)),
        }
    )
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    write_atomic(path, buffer.getvalue())
