"""Calibration curves: what is left of the model's score when part of one module is zeroed, level by level.

A point of a curve is known as bounds (low, high) of the score; equal bounds are the score. Points are evaluated when a
question needs them, no further than the question needs, and are kept on disk so that the next calibration need not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from partial_lora.calibration_file import AXES, Sparsity
from partial_lora.errors import PartialLoraError
from partial_lora.importance import Scores
from partial_lora.masks import Mask
from partial_lora.results import write_json
from partial_lora.scoring import BoundedScore, Bounds, Score

VERSION = 1
_UNKNOWN: Bounds = (-math.inf, math.inf)

logger = logging.getLogger(__name__)


@contextmanager
def zeroed(weight: Tensor, axis: str, mask: Mask) -> Iterator[None]:
    """Zero the rows (columns) of a weight that a mask does not keep; they come back, bit for bit, whatever happens."""
    dimension = AXES.index(axis)
    removed = torch.from_numpy(~mask.dense()).nonzero().squeeze(1).to(weight.device)
    values = weight.detach()
    own = values.index_select(dimension, removed)
    values.index_fill_(dimension, removed, 0)
    try:
        yield
    finally:
        values.index_copy_(dimension, removed, own)


class Curves:
    """Every point of every curve that has been asked for, each evaluated at most once.

    modules: what may be zeroed. importance: gives (rows, columns) scores of a module by its name, larger = keep; asked
    for when first needed. store: what is known already, and where to keep it.
    """

    def __init__(
        self,
        model: nn.Module,
        score: Score,
        modules: Mapping[str, nn.Linear],
        importance: Callable[[str], Scores],
        store: Store,
    ) -> None:
        self.evaluations = 0
        self._model, self._score, self._modules, self._importance = model, score, modules, importance
        self._store = store
        self._started: set[tuple[str, str, float]] = set()  # points evaluated by this score: it may go on with them

    def intact(self) -> float:
        """The baseline: the score of the frozen model. Curves in the store that belong to another one are dropped."""
        baseline = self._score_of_model("of the frozen model")
        known = self._store.baseline
        if known is not None and not math.isclose(known, baseline, rel_tol=1e-6, abs_tol=1e-9):
            self._store.discard(f"its baseline score is {known}, this model's is {baseline}")
        self._store.baseline = baseline
        return baseline

    def survives(self, module: str, axis: str, level: float, passes: Callable[[float], bool]) -> bool:
        """Whether the score passes with all but the most important rows (columns) of one module zeroed.

        `passes` must be monotone: where it holds for a score it holds for every larger one.
        """

        def undecided(low: float, high: float) -> bool:
            return passes(high) and not passes(low)

        curve = self._store.curve(module, axis)
        if undecided(*curve.get(level, _UNKNOWN)):
            curve[level] = self._evaluate(module, axis, level, undecided)
            self._store.changed = True
        return passes(curve[level][0])

    def joint(self, sparsity: Sparsity) -> float:
        """The score with every module at its own sparsity at once."""
        with ExitStack() as stack:
            for module, axes in sparsity.items():
                for axis, scores in zip(AXES, self._importance(module), strict=True):
                    mask = Mask.top(scores, axes[axis])
                    stack.enter_context(zeroed(self._modules[module].weight, axis, mask))
            return self._score_of_model("with all sparsities at once")

    def points(self, module: str, axis: str) -> list[list]:
        """One curve by rising level: [level, score] or, where the evaluation was cut short, [level, [low, high]]."""
        return _listed(self._store.curve(module, axis))

    def save(self) -> None:
        """Keep what is known so far."""
        self._store.save()

    def _evaluate(self, module: str, axis: str, level: float, undecided: Callable[[float, float], bool]) -> Bounds:
        point = module, axis, level
        mask = Mask.top(self._importance(module)[AXES.index(axis)], level)
        what = f"of {module} with {level:g} of its {axis} zeroed"
        with zeroed(self._modules[module].weight, axis, mask):
            if not isinstance(self._score, BoundedScore):
                return (self._score_of_model(what),) * 2
            known = self._store.curve(module, axis)[level] if point in self._started else None
            self.evaluations += 1
            low, high = self._score.bounds(self._model, module, undecided, known)
        self._started.add(point)
        return _finite(low, what), _finite(high, what)

    def _score_of_model(self, what: str) -> float:
        self.evaluations += 1
        return _finite(self._score(self._model), what)


class Store:
    """Curves and finished results on disk, for one model, score, importance and search.

    path: a JSON file, or None to keep nothing. key: plain data that says what the curves are of. A file that is broken
    or has another key is named, removed and never used.
    """

    def __init__(self, path: Path | None, key: Mapping) -> None:
        self.path, self.key = None if path is None else Path(path), json.loads(json.dumps(key))
        self.baseline: float | None = None
        self.results: dict[str, dict] = {}
        self.changed = False
        self._curves: dict[str, dict[str, dict[float, Bounds]]] = {}
        if self.path is not None and self.path.exists():
            try:
                self._read(json.loads(self.path.read_text(encoding="utf-8")))
            except (OSError, ValueError, KeyError, TypeError) as error:
                self.discard(f"not the curves that were kept there ({type(error).__name__}: {error})")

    def curve(self, module: str, axis: str) -> dict[float, Bounds]:
        """The points known of one curve, by level; to be added to."""
        return self._curves.setdefault(module, {}).setdefault(axis, {})

    def discard(self, reason: str) -> None:
        """Forget everything, and say of which file and why."""
        logger.warning("%s: %s; removed, its points are evaluated again", self.path, reason)
        self.baseline, self.results, self._curves = None, {}, {}
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Write the file once the block ends, and where it is interrupted."""
        try:
            yield
        finally:
            self.save()

    def save(self) -> None:
        """Write the file, if there is one and anything is new."""
        if self.path is None or not self.changed:
            return
        curves = {
            module: {axis: _listed(curve) for axis, curve in axes.items()} for module, axes in self._curves.items()
        }
        content = {"key": self.key, "baseline": self.baseline, "curves": curves, "results": self.results}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"version": VERSION, "sha256": _digest(content), "content": content})
        self.changed = False

    def _read(self, file: dict) -> None:
        content = file["content"]
        if file["version"] != VERSION or file["sha256"] != _digest(content):
            raise ValueError("wrong version or checksum")
        if content["key"] != self.key:
            raise ValueError("made for another question")
        self.baseline, self.results = content["baseline"], content["results"]
        for module, axes in content["curves"].items():
            for axis, points in axes.items():
                for level, value in points:
                    self.curve(module, axis)[level] = tuple(value) if isinstance(value, list) else (value, value)


def _finite(score: float, what: str) -> float:
    if not math.isfinite(score):
        raise PartialLoraError(f"calibration: the score {what} is {score}, expected a finite number")
    return float(score)


def _digest(content: Mapping) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _listed(curve: Mapping[float, Bounds]) -> list[list]:
    return [[level, low if low == high else [low, high]] for level, (low, high) in sorted(curve.items())]
