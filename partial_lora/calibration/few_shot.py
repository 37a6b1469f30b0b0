"""Calibration on a handful of a task's examples: the two draws, the head fitted on one, the score on the other.

The model's head is usually new, so calibration scores the model with a head that is fitted on the fit draw.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F

from partial_lora import progress
from partial_lora.calibration.calibrate import calibrate
from partial_lora.calibration.config import CalibrationConfig, ImportanceConfig
from partial_lora.calibration.importance import MEASURES, NEEDS_DATA, ModuleScores, data_scores, scores_of
from partial_lora.calibration.level_search import most_passes, seconds_at_most
from partial_lora.calibration.peers import Alone, Peers, of_first
from partial_lora.calibration.reliability import reliability, split_half
from partial_lora.calibration.result import Calibration
from partial_lora.calibration.score import FewShotScore
from partial_lora.errors import PartialLoraError
from partial_lora.files import cache_dir
from partial_lora.models import weights_digest
from partial_lora.models.modes import frozen
from partial_lora.tasks import Draws, strata
from partial_lora.tasks.mixture import starts, within
from partial_lora.tasks.task import Transform

VERSION = 1  # of the computation of scores; a calibration that was cached under another version is not used
_ITERATIONS = 5000  # of the logistic regression; a few hundred are needed
_BATCH = 32

Batch = dict[str, Tensor]

logger = logging.getLogger(__name__)


# --- The head that a frozen model is scored with before any training


def features(model: nn.Module, head: str, batches: Sequence[Batch]) -> tuple[np.ndarray, np.ndarray]:
    """Return the inputs of the head for every example (N, d), and the labels (N,)."""
    entering: list[Tensor] = []
    hook = model.get_submodule(head).register_forward_pre_hook(
        lambda module, inputs: entering.append(inputs[0].float())
    )
    device = next(model.parameters()).device
    try:
        with frozen(model):
            for batch in batches:
                model(**{key: value.to(device) for key, value in batch.items() if key != "labels"})
    finally:
        hook.remove()
    labels = torch.cat([batch["labels"] for batch in batches])
    return torch.cat(entering).cpu().numpy(), labels.numpy()


def fitted_head(inputs: np.ndarray, labels: np.ndarray, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Return weight (outputs, d) and bias (outputs,) of a linear model of the labels (N,) on features (N, d).

    Classes: a multinomial logistic regression with C = 1; a class without an example gets a zero row and a bias so low
    that it is never predicted. Real numbers: a ridge regression with a penalty of 1.
    """
    from sklearn.linear_model import LogisticRegression, Ridge  # half a second to import, and not every run fits a head

    if np.issubdtype(labels.dtype, np.floating):
        ridge = Ridge(alpha=1.0).fit(inputs, labels)
        return ridge.coef_.reshape(1, -1).astype(np.float32), np.float32(ridge.intercept_).reshape(1)
    if len(np.unique(labels)) < 2:
        raise PartialLoraError(
            f"calibration: every example to fit a head on is of one class ({int(labels[0])}), expected two or more"
        )
    regression = LogisticRegression(C=1.0, max_iter=_ITERATIONS).fit(inputs, labels)
    coefficients, intercepts = regression.coef_, regression.intercept_
    if len(regression.classes_) == 2:  # scikit-learn keeps the one logit of the second class against the first
        coefficients = np.concatenate([-coefficients / 2, coefficients / 2])
        intercepts = np.concatenate([-intercepts / 2, intercepts / 2])
    weight = np.zeros((outputs, inputs.shape[1]), dtype=np.float32)
    bias = np.full(outputs, -1e4, dtype=np.float32)
    weight[regression.classes_], bias[regression.classes_] = coefficients, intercepts
    return weight, bias


def fitted_heads(inputs: np.ndarray, labels: np.ndarray, sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return weight and bias of several tasks' heads side by side, each fitted on its own task's examples."""
    fitted = []
    for start, size in zip(starts(sizes), sizes, strict=True):
        rows = (labels >= start) & (labels < start + size)
        fitted.append(fitted_head(inputs[rows], labels[rows] - start, size))
    weights, biases = zip(*fitted, strict=True)
    return np.concatenate(weights), np.concatenate(biases)


@contextmanager
def few_shot_head(
    model: nn.Module, head: str | None, batches: Sequence[Batch], peers: Peers | None = None, sizes: Sequence[int] = ()
) -> Iterator[None]:
    """Give the model a head fitted on `batches` for as long as the block lasts; its own comes back afterwards.

    head: None for a model that has a head for its task, which stays. peers: the processes that all need the very same
    head; the first one fits it. sizes: as in `fitted_heads`, for the heads of several tasks.
    """
    if head is None:
        yield
        return
    layer = model.get_submodule(head)
    if not isinstance(layer, nn.Linear) or layer.bias is None:
        raise PartialLoraError(f"model.head={head}: expected a linear layer with a bias, found {type(layer).__name__}")
    state = {name: value.clone() for name, value in layer.state_dict().items()}

    def fitted() -> tuple[np.ndarray, np.ndarray]:
        seen = features(model, head, batches)
        return fitted_heads(*seen, sizes) if sizes else fitted_head(*seen, layer.out_features)

    weight, bias = of_first(peers or Alone(), fitted)
    try:
        layer.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
        yield
    finally:
        layer.load_state_dict(state)


# --- Importance and sparsities by the two draws


@dataclass(frozen=True)
class FewShot:
    """A task's frozen model and rows, and what a few of the rows are to tell of it.

    Attributes:
        train: the training rows.
        draws: the two draws of them.
        config: the settings of the calibration, with `score` and `seed` in place of "auto" and null.
        measure: of importance.
        head: the new module, which is fitted on the fit draw and left as it was; None where there is none.
        blocks: the name of the model's sequence of blocks.
        rank, alpha: of the adapter.
        granularity: what its budget is spent on (`budget.counted_of`).
        architecture: what, beside its weights, decides what the model computes.
        drawn: the settings that draws are made with, which are only recorded.
        sizes: the number of classes of each member of a mixture; each member's head is fitted and scored by itself.
    """

    model: nn.Module
    train: Dataset
    transform: Transform
    draws: Draws
    config: CalibrationConfig
    measure: ImportanceConfig
    head: str | None
    blocks: str | None = None
    rank: int = 16
    alpha: float = 16.0
    granularity: str = "rows_columns"
    architecture: Mapping[str, object] = field(default_factory=dict)
    drawn: Mapping[str, object] = field(default_factory=dict)
    sizes: Sequence[int] = ()

    def announce(self, modules: Sequence[str], processes: int = 1) -> None:
        """Say what the calibration will take, as a pass over a few rows tells; importance has a bar of its own."""
        scored = batches_of(self.train, self.draws.scored, self.transform)
        one_pass, outputs = self._score(scored).measured(self.model)
        passes = most_passes(self.config, len(modules), outputs)
        left = seconds_at_most(self.config, len(modules), one_pass, outputs, processes=processes)
        bound = "about" if self.config.search == "gradient" else "at most"
        examples = len(self.draws.scored)
        note = f"{bound} {timedelta(seconds=round(left))}: at most {passes:,} passes over {examples:,} examples"
        progress.emit("calibrate", 0, len(modules), share=0.0, left=left, note=note)

    def importance(self, modules: Sequence[str]) -> ModuleScores:
        """Return the importance of every row and column of the modules.

        A measure that needs data sees the fit draw alone, and a new head is fitted on it; any other measure sees the
        weights alone.
        """
        name, seed, options = self.measure.name, self.config.seed, self._options()
        targets = {module: self.model.get_submodule(module) for module in modules}
        if name not in NEEDS_DATA:
            costs = {module: layer.weight.numel() * min(layer.weight.shape) for module, layer in targets.items()}
            scores, spent = {}, 0
            for module, layer in targets.items():
                progress.emit("importance", len(scores), len(targets), share=spent / sum(costs.values()))
                scores[module] = scores_of(module, layer.weight, name, seed=seed, options=options)
                spent += costs[module]
            progress.emit("importance", len(targets), len(targets), share=1.0)
            return scores
        fit = self.transform.training_batches(self.train.select(self.draws.fit), _BATCH)
        loss = partial(mean_loss_within, self.sizes) if self.sizes else None
        with few_shot_head(self.model, self.head, fit, sizes=self.sizes):
            return data_scores(name, self.model, targets, fit, seed=seed, options=options, loss=loss)

    def _score(self, scored: Sequence[Batch]) -> FewShotScore:
        return FewShotScore(self.model, scored, self.config.score, self.blocks, self.config.memory, self.sizes)

    def _options(self) -> dict[str, object]:
        """Return the options that the measure takes: its keys, and the adapter's rank and alpha if it trains one."""
        takes = inspect.signature((MEASURES | NEEDS_DATA)[self.measure.name]).parameters
        options = dataclasses.asdict(self.measure) | {"rank": self.rank, "alpha": self.alpha}
        return {name: value for name, value in options.items() if name in takes}

    def calibrate(self, scores: ModuleScores, *, peers: Peers | None = None, stage: str = "calibrate") -> Calibration:
        """Find the sparsities (Algorithm 1), reusing what any earlier run found for the same question.

        Args:
            scores: importance of rows and columns by module.
            peers: the processes that share the work (`calibration.calibrate`); all see the head that the first fitted.
            stage: the name of this work in progress reports.
        """
        config, draws = self.config, self.draws
        fit, scored = (batches_of(self.train, rows, self.transform) for rows in (draws.fit, draws.scored))
        decides = {
            "version": VERSION,
            "architecture": dict(self.architecture),
            "importance": {"seed": config.seed, "name": self.measure.name} | self._options(),
            "modules": sorted(scores),
            "levels": config.levels,
            "max_sparsity": config.max_sparsity,
            "search": config.search,
            "score": config.score,
            "sizes": list(self.sizes or ()),
        }
        key = _key(weights_digest(self.model, exclude=self.head or ""), (*fit, *scored), decides)
        with few_shot_head(self.model, self.head, fit, peers, self.sizes):
            found = calibrate(
                self.model,
                self._score(scored),
                config,
                target_modules=list(scores),
                importance=dict(scores),
                rank=self.rank,
                granularity=self.granularity,
                settings=decides | dict(self.drawn) | {"seed": config.seed, "key": key},
                store=cache_dir() / "calibrations" / f"{key}.json",
                peers=peers,
                progress=lambda done, total, **detail: progress.emit(stage, done, total, **detail),
            )
        progress.emit(stage, 1, 1, share=1.0)  # one that was found in the cache has told nothing
        return found

    def halves(self, scores: ModuleScores, peers: Peers | None = None) -> dict:
        """Return the agreement of two halves of the scored draw: `reliability.reliability` of their sparsities.

        Each half has the head of the whole fit draw. scores, peers: as `calibrate` takes them.
        """
        labels, sparsities = strata(self.train)[self.draws.scored], []
        for number, half in enumerate(split_half(labels, self.config.seed), start=1):
            logger.info("reliability: half %d of the scored draw, %d examples", number, len(half))
            part = dataclasses.replace(self, draws=Draws(self.draws.fit, self.draws.scored[half]))
            sparsities.append(part.calibrate(scores, peers=peers, stage=f"half {number}").sparsity)
        return reliability(*sparsities)


def batches_of(train: Dataset, rows: np.ndarray, transform: Transform) -> list[Batch]:
    """Return a draw as the model sees it."""
    return transform.batches(train.select(rows), _BATCH)


def _key(weights: str, batches: Sequence[Mapping[str, Tensor]], decides: Mapping) -> str:
    """Return a name for what decides a score: the weights, the two draws as the model sees them, and the settings."""
    digest = hashlib.sha256(weights.encode())
    for batch in batches:
        for name in sorted(batch):
            digest.update(name.encode())
            digest.update(batch[name].contiguous().numpy().tobytes())
    digest.update(json.dumps(decides, sort_keys=True).encode())
    return digest.hexdigest()[:32]


def mean_loss_within(sizes: Sequence[int], model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mean cross entropy of a batch, each row's over its own task's outputs (`importance.data_scores`)."""
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return F.cross_entropy(within(logits, batch["labels"], sizes), batch["labels"])
