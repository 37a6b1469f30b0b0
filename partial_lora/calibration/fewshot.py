"""Calibration on a handful of a task's examples: the two draws, the head fitted on one, the score on the other.

The model's head is new, as a rule, so calibration scores it with one that is fitted on the fit draw (heads.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor, nn

from partial_lora import progress
from partial_lora.cache import cache_dir
from partial_lora.calibration.calibration import Calibration, calibrate
from partial_lora.calibration.heads import Batch, scored_head
from partial_lora.calibration.importance import NEEDS_DATA, data_scores, scores_of
from partial_lora.calibration.peers import Peers
from partial_lora.calibration.reliability import reliability, split_half
from partial_lora.calibration.scoring import MEMORY, FewShotScore
from partial_lora.calibration.slices import mean_loss_within
from partial_lora.models import weights_digest
from partial_lora.tasks import Draws, drawn_from
from partial_lora.tasks.mixture import training_batches
from partial_lora.tasks.task import Transform

logger = logging.getLogger(__name__)

VERSION = 1  # of how scores are computed; another one leaves every kept calibration unused
_BATCH = 32

Scores = dict[str, tuple[Tensor, Tensor]]  # importance of rows (m,) and columns (n,) by module


def batches_of(train: Dataset, rows: np.ndarray, transform: Transform) -> list[Batch]:
    """A draw as the model sees it."""
    return transform.batches(train.select(rows), _BATCH)


def importance_few_shot(
    model: nn.Module,
    train: Dataset,
    transform: Transform,
    *,
    measure: str,
    modules: Sequence[str],
    draws: Draws,
    head: str | None,
    seed: int,
    options: Mapping,
    new_head: bool = True,
    sizes: Sequence[int] = (),
) -> Scores:
    """Importance of every row and column of the modules, by a measure's name.

    A measure that needs data sees the fit draw alone, with the head fitted on it in place of the model's own, unless
    that one is not new; any other sees the weights alone. sizes: of a mixture, how many classes each member has.
    """
    targets = {name: model.get_submodule(name) for name in modules}
    if measure not in NEEDS_DATA:
        return {
            name: scores_of(name, module.weight, measure, seed=seed, options=options)
            for name, module in targets.items()
        }
    fit = training_batches(train.select(draws.fit), transform, _BATCH)
    loss = mean_loss_within(sizes) if sizes else None
    with scored_head(model, head, fit, new_head, sizes=sizes):
        return data_scores(measure, model, targets, fit, seed=seed, options=options, loss=loss)


def calibrate_few_shot(
    model: nn.Module,
    train: Dataset,
    transform: Transform,
    *,
    scores: Scores,
    importance: Mapping[str, object],
    architecture: Mapping[str, object],
    rank: int,
    granularity: str,
    head: str | None,
    blocks: str | None,
    threshold: float,
    budget: float | None,
    drawn: Mapping[str, object],
    seed: int,
    levels: float,
    max_sparsity: float,
    search: str,
    axes: str = "separate",
    scope: str = "independent",
    repair: bool = False,
    chance: str = "ignore",
    score: str = "accuracy",
    memory: int = MEMORY,
    draws: Draws,
    new_head: bool = True,
    sizes: Sequence[int] = (),
    peers: Peers | None = None,
    stage: str = "calibrate",
) -> Calibration:
    """Find the sparsities of a task's model (Algorithm 1), reusing what any earlier run found for the same question.

    Args:
        train: the training rows that both draws come from.
        scores: importance of rows and columns by module; `importance` says how it was measured.
        architecture: what, beside its weights, decides what the model computes.
        head: the module that is fitted on the fit draw, where it is new; left as it was found.
        drawn: in words of settings, how the two draws were made; recorded, no more.
        chance: "majority" where the threshold is of what the score is above that of always the largest class.
        score: what is left of the model, a name of `scoring.MEASURES`. memory: bytes it may keep.
        sizes: of a mixture, how many classes each member has, whose heads are fitted and scored each by itself.
        stage: what progress is told of.
        peers: the processes that share the work (`calibration.calibrate`); all see the head that the first one fitted.
        draws: the two draws of `train`.
        The others as in `calibration.calibrate`.
    """
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
    if score != "accuracy":  # which calibrations were of before there was another
        decides["score"] = {"f1": "f1, of the second class where there are two"}.get(score, score)
    if sizes:
        decides["sizes"] = list(sizes)
    key = _key(weights_digest(model, exclude=head if new_head else ""), (*fit, *scored), decides)
    with scored_head(model, head, fit, new_head, peers, sizes):
        return calibrate(
            model,
            FewShotScore(model, scored, score, blocks, memory, sizes),
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
            settings=decides | dict(drawn) | {"seed": seed, "key": key},
            store=cache_dir() / "calibrations" / f"{key}.json",
            axes=axes,
            scope=scope,
            repair=repair,
            above_chance=chance == "majority",
            peers=peers,
            progress=lambda done, total, **detail: progress.emit(stage, done, total, **detail),
        )


def halves_few_shot(
    model: nn.Module, train: Dataset, transform: Transform, *, draws: Draws, seed: int, **asked: Any
) -> dict:
    """How far two halves of the scored draw lead to the same sparsities: `reliability.reliability` of the two.

    Arguments as of `calibrate_few_shot`, which is asked the same of each half, with the head of the whole fit draw.
    """
    labels = drawn_from(train)[draws.scored]
    found = []
    for number, half in enumerate(split_half(labels, seed), start=1):
        logger.info("reliability: half %d of the scored draw, %d examples", number, len(half))
        part, stage = Draws(draws.fit, draws.scored[half]), f"half {number}"
        asked_of = {"draws": part, "seed": seed, "stage": stage}
        found.append(calibrate_few_shot(model, train, transform, **asked_of, **asked).sparsity)
    return reliability(*found)


def _key(weights: str, batches: Sequence[Mapping[str, Tensor]], decides: Mapping) -> str:
    """Names everything a score depends on: the weights, the two draws as the model sees them, and the settings."""
    digest = hashlib.sha256(weights.encode())
    for batch in batches:
        for name in sorted(batch):
            digest.update(name.encode())
            digest.update(batch[name].contiguous().numpy().tobytes())
    digest.update(json.dumps(decides, sort_keys=True).encode())
    return digest.hexdigest()[:32]
