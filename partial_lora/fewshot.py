"""Calibration on a handful of a task's examples: the two draws, the head fitted on one, the score on the other.

A model pre-trained on something else has no head for the task, and calibration needs its score before any training:
scikit-learn's LogisticRegression on frozen features of the fit draw.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from partial_lora import progress
from partial_lora.cache import cache_dir
from partial_lora.calibration import Calibration, calibrate
from partial_lora.errors import PartialLoraError
from partial_lora.importance import NEEDS_DATA, data_scores, scores_of
from partial_lora.models import weights_digest
from partial_lora.peers import Alone, Peers, of_first
from partial_lora.reliability import reliability, split_half
from partial_lora.scoring import MEMORY, FewShotScore
from partial_lora.tasks import Draws, ImageTransform, few_shot_draws

logger = logging.getLogger(__name__)

VERSION = 1  # of how scores are computed; another one leaves every kept calibration unused
_BATCH = 32
_ITERATIONS = 5000  # of the logistic regression; a few hundred are needed

Batch = dict[str, Tensor]
Scores = dict[str, tuple[Tensor, Tensor]]  # importance of rows (m,) and columns (n,) by module


def batches_of(train: Dataset, rows: np.ndarray, transform: ImageTransform) -> list[Batch]:
    """A draw as the model sees it."""
    return transform.batches(train.select(rows), _BATCH)


def importance_few_shot(
    model: nn.Module,
    train: Dataset,
    transform: ImageTransform,
    *,
    measure: str,
    modules: Sequence[str],
    draws: Draws,
    head: str,
    seed: int,
    options: Mapping,
) -> Scores:
    """Importance of every row and column of the modules, by a measure's name.

    A measure that needs data sees the fit draw alone, with the head fitted on it in place of the model's own; any other
    sees the weights alone.
    """
    targets = {name: model.get_submodule(name) for name in modules}
    if measure not in NEEDS_DATA:
        return {
            name: scores_of(name, module.weight, measure, seed=seed, options=options)
            for name, module in targets.items()
        }
    fit = batches_of(train, draws.fit, transform)
    with few_shot_head(model, head, fit):
        return data_scores(measure, model, targets, fit, seed=seed, options=options)


def calibrate_few_shot(
    model: nn.Module,
    train: Dataset,
    transform: ImageTransform,
    *,
    scores: Scores,
    importance: Mapping[str, object],
    architecture: Mapping[str, object],
    rank: int,
    granularity: str,
    head: str,
    blocks: str | None,
    threshold: float,
    budget: float | None,
    shots: int,
    max_samples: int | None,
    seed: int,
    levels: float,
    max_sparsity: float,
    search: str,
    axes: str = "separate",
    scope: str = "independent",
    repair: bool = False,
    chance: str = "ignore",
    score: str = "auto",
    memory: int = MEMORY,
    draws: Draws | None = None,
    peers: Peers | None = None,
    stage: str = "calibrate",
) -> Calibration:
    """Find the sparsities of a task's model (Algorithm 1), reusing what any earlier run found for the same question.

    Args:
        train: the training rows that both draws come from.
        scores: importance of rows and columns by module; `importance` says how it was measured.
        architecture: what, beside its weights, decides what the model computes.
        head: the module that is fitted on the fit draw; left as it was found.
        chance: "majority" where the threshold is of what the score is above that of always the largest class.
        score: what is left of the model, a name of `scoring.MEASURES`; "auto" is accuracy. memory: bytes it may keep.
        stage: what progress is told of.
        peers: the processes that share the work (`calibration.calibrate`); all see the head that the first one fitted.
        draws: the two draws, where they are not to be `shots`, `max_samples` and `seed`'s of `train`.
        The others as in `calibration.calibrate` and `tasks.few_shot_draws`.
    """
    draws = draws or few_shot_draws(train["label"], shots=shots, seed=seed, max_samples=max_samples)
    fit, scored = (batches_of(train, rows, transform) for rows in (draws.fit, draws.scored))
    decides = {
        "version": VERSION,
        "architecture": dict(architecture),
        "importance": dict(importance),
        "modules": sorted(scores),
        "levels": levels,
        "max_sparsity": max_sparsity,
        "search": search,
    }
    measure = "accuracy" if score == "auto" else score
    if measure != "accuracy":  # which calibrations were of before there was another
        decides["score"] = measure
    key = _key(weights_digest(model, exclude=head), (*fit, *scored), decides)
    with few_shot_head(model, head, fit, peers):
        return calibrate(
            model,
            FewShotScore(model, scored, measure, blocks, memory),
            target_modules=list(scores),
            importance=dict(scores),
            threshold=threshold,
            budget=budget,
            rank=rank,
            granularity=granularity,
            search=search,
            levels=levels,
            max_sparsity=max_sparsity,
            seed=seed,
            settings=decides | {"shots": shots, "max_samples": max_samples, "seed": seed, "key": key},
            store=cache_dir() / "calibrations" / f"{key}.json",
            axes=axes,
            scope=scope,
            repair=repair,
            above_chance=chance == "majority",
            peers=peers,
            say=_say,
            progress=lambda done, total, **detail: progress.emit(stage, done, total, **detail),
        )


def halves_few_shot(
    model: nn.Module, train: Dataset, transform: ImageTransform, *, draws: Draws, seed: int, **asked: Any
) -> dict:
    """How far two halves of the scored draw lead to the same sparsities: `reliability.reliability` of the two.

    Arguments as of `calibrate_few_shot`, which is asked the same of each half, with the head of the whole fit draw.
    """
    labels = np.asarray(train["label"])[draws.scored]
    found = []
    for number, half in enumerate(split_half(labels, seed), start=1):
        logger.info("reliability: half %d of the scored draw, %d examples", number, len(half))
        part, stage = Draws(draws.fit, draws.scored[half]), f"half {number}"
        asked_of = {"draws": part, "seed": seed, "stage": stage}
        found.append(calibrate_few_shot(model, train, transform, **asked_of, **asked).sparsity)
    return reliability(*found)


def _say(words: str) -> None:
    """Words for the log and for whoever watches."""
    logger.info("%s", words)
    progress.say(words)


def _key(weights: str, batches: Sequence[Mapping[str, Tensor]], decides: Mapping) -> str:
    """Names everything a score depends on: the weights, the two draws as the model sees them, and the settings."""
    digest = hashlib.sha256(weights.encode())
    for batch in batches:
        for name in sorted(batch):
            digest.update(name.encode())
            digest.update(batch[name].contiguous().numpy().tobytes())
    digest.update(json.dumps(decides, sort_keys=True).encode())
    return digest.hexdigest()[:32]


@torch.no_grad()
def features(model: nn.Module, head: str, batches: Sequence[Batch]) -> tuple[np.ndarray, np.ndarray]:
    """What enters the head for every example (N, d), and the labels (N,)."""
    entering: list[Tensor] = []
    hook = model.get_submodule(head).register_forward_pre_hook(
        lambda module, inputs: entering.append(inputs[0].float())
    )
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        for batch in batches:
            model(**{key: value.to(device) for key, value in batch.items() if key != "labels"})
    finally:
        hook.remove()
        model.train(training)
    labels = torch.cat([batch["labels"] for batch in batches])
    return torch.cat(entering).cpu().numpy(), labels.numpy()


def logistic_head(inputs: np.ndarray, labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Weight (classes, d) and bias (classes,) of a multinomial logistic regression with C = 1.

    A class without an example gets a zero row and a bias that no other logit falls below.
    """
    regression = LogisticRegression(C=1.0, max_iter=_ITERATIONS).fit(inputs, labels)
    coefficients, intercepts = regression.coef_, regression.intercept_
    if len(regression.classes_) == 2:  # scikit-learn keeps the one logit of the second class against the first
        coefficients = np.concatenate([-coefficients / 2, coefficients / 2])
        intercepts = np.concatenate([-intercepts / 2, intercepts / 2])
    weight = np.zeros((classes, inputs.shape[1]), dtype=np.float32)
    bias = np.full(classes, -1e4, dtype=np.float32)
    weight[regression.classes_], bias[regression.classes_] = coefficients, intercepts
    return weight, bias


@contextmanager
def few_shot_head(model: nn.Module, head: str, batches: Sequence[Batch], peers: Peers | None = None) -> Iterator[None]:
    """Give the model a head fitted on `batches` for as long as the block lasts; its own comes back afterwards.

    peers: the processes that all need the very same head; the first one fits it.
    """
    layer = model.get_submodule(head)
    if not isinstance(layer, nn.Linear) or layer.bias is None:
        raise PartialLoraError(f"model.head={head}: expected a linear layer with a bias, found {type(layer).__name__}")
    own = {name: value.clone() for name, value in layer.state_dict().items()}
    weight, bias = of_first(
        peers or Alone(), lambda: logistic_head(*features(model, head, batches), classes=layer.out_features)
    )
    try:
        layer.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
        yield
    finally:
        layer.load_state_dict(own)
