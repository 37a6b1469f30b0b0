"""How good a model is: metrics computed offline, and what it said about every example."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas
from scipy.special import log_softmax

from partial_lora.calibration import metric
from partial_lora.sealed import write_atomic


def _accuracy(predictions: np.ndarray, references: np.ndarray) -> float:
    return float(np.mean(predictions == references))


def _mse(predictions: np.ndarray, references: np.ndarray) -> float:
    return float(np.mean((predictions - references) ** 2))


_FUNCTIONS: dict[str, Callable[..., float]] = {
    "accuracy": _accuracy,
    "f1": metric.f1,
    "matthews": metric.matthews,
    "pearson": metric.pearson,
    "spearman": metric.spearman,
    "mse": _mse,
}
_SAID = {
    "accuracy": "Share of predictions that equal their reference.",
    "f1": "Harmonic mean of precision and recall of the second of two classes, or averaged over more.",
    "matthews": "Matthews' correlation of predicted and true classes.",
    "pearson": "Linear correlation.",
    "spearman": "Correlation of the ranks.",
    "mse": "Mean squared error.",
}


@cache
def offline(name: str):
    """A metric of `evaluate` by its name.

    evaluate fetches its own metric scripts from the hub; a subclass in the package needs no network. Its import is
    slow and must not share a line with that of datasets, hence here.
    """
    import datasets
    import evaluate

    kind = datasets.Value("float64" if name in ("pearson", "spearman", "mse") else "int64")

    class Offline(evaluate.Metric):
        def _info(self) -> evaluate.MetricInfo:
            return evaluate.MetricInfo(
                description=_SAID[name],
                citation="",
                inputs_description="predictions and references: class indices, or numbers",
                features=datasets.Features({"predictions": kind, "references": kind}),
            )

        def _compute(self, predictions: Sequence, references: Sequence, **options: int) -> dict[str, float]:
            return {name: _FUNCTIONS[name](np.asarray(predictions), np.asarray(references), **options)}

    with tempfile.TemporaryDirectory() as unused:  # evaluate makes a folder even for what it keeps in memory
        return Offline(keep_in_memory=True, cache_dir=unused)


def function_of(name: str, classes: int | None = None) -> Callable[[np.ndarray, np.ndarray], float]:
    """The bare function (predictions, references) -> float of a metric, for who calls it thousands of times."""
    options = {"classes": classes} if name == "f1" else {}
    return partial(_FUNCTIONS[name], **options)


def predicted(logits: np.ndarray, references: np.ndarray) -> np.ndarray:
    """What logits (N, outputs) say: the class, or the one output where references are real numbers (N,)."""
    if np.issubdtype(references.dtype, np.floating):
        return logits.reshape(len(references))
    return logits.argmax(axis=-1)


def metrics_of(names: Sequence[str], logits: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """The named metrics of logits (N, classes) or (N, 1) against class indices or real numbers (N,)."""
    said = predicted(logits, references)
    options = {"f1": {"classes": logits.shape[-1]}}
    found = {}
    for name in names:
        found |= offline(name).compute(predictions=said, references=references, **options.get(name, {}))
    return found


def mean_loss(logits: np.ndarray, references: np.ndarray) -> float:
    """The cross entropy, or squared error of real numbers, averaged over examples.

    Trainer's own average over batches is not that where the last batch is smaller or, with several processes, filled
    up.
    """
    if np.issubdtype(references.dtype, np.floating):
        return _mse(predicted(logits, references), references)
    log_chances = np.take_along_axis(log_softmax(logits, axis=-1), references[:, None], axis=-1)
    return float(-log_chances.mean())


def split_metrics(names: Sequence[str], logits: np.ndarray, references: np.ndarray) -> dict:
    """The metrics of a split under their plain names, and its loss; `primary` names the main one, the first."""
    found = metrics_of(names, logits, references)
    return {"primary": names[0], **found, "loss": mean_loss(logits, references)}


def predictions_of(logits: np.ndarray, references: np.ndarray, labels: Sequence[str]) -> pandas.DataFrame:
    """What was said about every example, so that two methods can be compared example by example.

    One row an example, in the order of the split: index, label, prediction (class indices), their names, score (the
    softmax probability of the prediction) and the logits. Of a regression, which has no labels: index, label,
    prediction and score (the same number), and the logits.
    """
    said = predicted(logits, references)
    columns = {"index": np.arange(len(logits)), "label": references, "prediction": said}
    if labels:
        columns["label_name"] = [labels[index] for index in references]
        columns["prediction_name"] = [labels[index] for index in said]
        columns["score"] = np.exp(log_softmax(logits, axis=-1)).max(axis=-1)
    else:
        columns["score"] = said
    columns["logits"] = list(logits.astype(np.float32))
    return pandas.DataFrame(columns)


def write_predictions(path: Path, frame: pandas.DataFrame) -> None:
    """Keep predictions as parquet, whole or not at all."""
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    write_atomic(path, buffer.getvalue())
