"""How often the right one of several options is the likeliest, as lm-evaluation-harness counts it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from scipy.special import softmax
from torch import Tensor
from torch.nn import functional as F

from partial_lora.calibration.likelihood import IGNORED


def log_likelihoods(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """The log likelihood of each row's answer, and the number of its tokens (rows, 2), float64.

    Args:
        logits: (rows, length, vocabulary), or a model's outputs, of which they are the first.
        labels: (rows, length), -100 where no token is asked for; each is foretold at the place before it.

    As Trainer's preprocess_logits_for_metrics it keeps two numbers a row of what would be a vocabulary a token.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    following = labels[:, 1:]
    asked = following != IGNORED
    # Of the logits only those of answers are copied: prompts are longer than answers, vocabularies than either.
    losses = F.cross_entropy(logits[:, :-1][asked].float(), following[asked], reduction="none").double()
    sums = losses.new_zeros(asked.shape).masked_scatter(asked, losses).sum(1)
    return torch.stack([-sums, asked.sum(1).double()], dim=1)


def predictions(log_likelihoods: np.ndarray, items: np.ndarray, right: np.ndarray, characters: np.ndarray) -> dict:
    """What is said about every question, in the order of their numbers.

    Args:
        log_likelihoods: (rows,), one an option, a sum over its tokens. items: the question's number (rows,); the
            options of one are in their order. right: whether it is the right option (rows,). characters: how long it
            is (rows,).

    Returns label, prediction and prediction_norm (places of options: the right one, the likeliest, the likeliest a
    character; of equals the first), and scores: the softmax over a question's options, an array each.
    """
    columns: dict[str, list] = {"label": [], "prediction": [], "prediction_norm": [], "scores": []}
    for rows in _questions(items):
        said = np.asarray(log_likelihoods[rows], dtype=np.float64)
        columns["label"].append(int(np.argmax(right[rows])))
        columns["prediction"].append(int(np.argmax(said)))
        columns["prediction_norm"].append(int(np.argmax(said / np.maximum(characters[rows], 1))))
        columns["scores"].append(softmax(said))
    return columns


def option_metrics(
    log_likelihoods: np.ndarray, items: np.ndarray, right: np.ndarray, characters: np.ndarray
) -> dict[str, float]:
    """The share of questions whose right option is the likeliest, in sum and a character; arguments as above.

    They are lm-evaluation-harness's acc and acc_norm.
    """
    said = predictions(log_likelihoods, items, right, characters)
    label = np.asarray(said["label"])
    return {
        "accuracy": float(np.mean(np.asarray(said["prediction"]) == label)),
        "accuracy_norm": float(np.mean(np.asarray(said["prediction_norm"]) == label)),
    }


def _questions(items: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of every question."""
    order = np.argsort(items, kind="stable")
    yield from np.split(order, np.flatnonzero(np.diff(items[order])) + 1)
