"""Calibration curves: what is left of the model's score when part of one module is zeroed, level by level.

A point of a curve is known as bounds (low, high) of the score; equal bounds are the score. Points are evaluated when a
question needs them, no further than the question needs, and are kept on disk so that the next calibration need not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from partial_lora.calibration.importance import Scores
from partial_lora.calibration.points import AXES, BOTH, UNKNOWN, Bounds, Levels, Sparsity, bounds_of, digest_of
from partial_lora.calibration.scoring import BoundedScore, Score
from partial_lora.calibration.store import Store
from partial_lora.errors import PartialLoraError
from partial_lora.masks import Mask

__all__ = ["Curves", "Store", "zeroed"]


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
        self._started: set[tuple[str, str, str, float]] = set()  # points of this score: it may go on with them
        self._chosen: Levels = {}  # what stays zeroed while curves are measured
        self._after = ""  # its digest
        self._untold: set[str] = set()  # modules altered for good, as far as the score need not know yet

    def intact(self) -> float:
        """The score of the model as it is. Raises PartialLoraError where it is no finite number."""
        score = self._score_of_model()
        if not math.isfinite(score):
            raise PartialLoraError(
                f"calibration: the score of the frozen model is {score}, expected a finite number; "
                "check the weights, the precision and the examples"
            )
        return score

    def survives(self, module: str, axis: str, level: float, passes: Callable[[float], bool]) -> bool:
        """Whether the score passes with all but the most important rows (columns) of one module zeroed.

        `passes` must be monotone: where it holds for a score it holds for every larger one.
        """
        low, _ = self._point(module, axis, level, lambda low, high: passes(high) and not passes(low))
        return passes(low)

    def exact(self, module: str, axis: str, level: float) -> float:
        """The score itself with so much of one module zeroed; NaN where it is no number."""
        return self._point(module, axis, level, lambda low, high: low < high)[0]

    def joint(self, sparsity: Sparsity) -> float | None:
        """The score with every module at its own sparsity at once; None where it is no number."""
        with ExitStack() as stack:
            for module, axes in sparsity.items():
                for axis in AXES:
                    stack.enter_context(self._zeroed(module, axis, axes[axis]))
            score = self._score_of_model()
            return score if math.isfinite(score) else None

    @contextmanager
    def choices(self) -> Iterator[Callable[[str, str, float], None]]:
        """Let curves be measured after earlier choices: gives a function that zeroes a level of a module and axis.

        What is chosen stays zeroed until the block ends; then the weights are back, and the score has been told.
        """
        altered: set[str] = set()

        def choose(module: str, axis: str, level: float) -> None:
            stack.enter_context(self._zeroed(module, axis, level))
            self._chosen.setdefault(module, {})[axis] = level
            self._after = digest_of(self._chosen)
            if level:
                altered.add(module)
                self._untold.add(module)

        try:
            with ExitStack() as stack:
                yield choose
        finally:
            self._chosen, self._after = {}, ""
            self._settle(altered - self._untold)  # of the others it has never known that they were altered
            self._untold = set()

    def curve(self, module: str, axis: str) -> dict[float, Bounds]:
        """The points known of one curve, by level, after the choices that are in force; to be added to."""
        return self._store.curve(module, axis, self._after)

    def learn(self, module: str, axis: str, points: Mapping[float, Bounds]) -> None:
        """Take points that were evaluated elsewhere."""
        self.curve(module, axis).update(points)
        self._store.changed = True

    def save(self) -> None:
        """Keep what is known so far."""
        self._store.save()

    def _settle(self, modules: Collection[str]) -> None:
        """Tell the score that the weights of modules have been altered for longer than one evaluation, or are back."""
        if hasattr(self._score, "settled"):
            for module in modules:
                self._score.settled(module)

    def _point(self, module: str, axis: str, level: float, undecided: Callable[[float, float], bool]) -> Bounds:
        curve = self.curve(module, axis)
        if undecided(*curve.get(level, UNKNOWN)):
            curve[level] = self._evaluate(module, axis, level, undecided)
            self._store.changed = True
        return curve.get(level, UNKNOWN)

    def _evaluate(self, module: str, axis: str, level: float, undecided: Callable[[float, float], bool]) -> Bounds:
        point = self._after, module, axis, level
        # Without `settled` a score goes by the intact model, and reuses what the earlier choices have changed.
        bounded = isinstance(self._score, BoundedScore) and (not self._after or hasattr(self._score, "settled"))
        with self._zeroed(module, axis, level):
            if not bounded:
                return bounds_of(*(self._score_of_model(),) * 2)
            others = self._untold - {module}
            self._settle(others)
            self._untold -= others
            known = self.curve(module, axis)[level] if point in self._started else None
            self.evaluations += 1
            bounds = self._score.bounds(self._model, module, undecided, known)
        self._started.add(point)
        return bounds_of(*bounds)

    @contextmanager
    def _zeroed(self, module: str, axis: str, level: float) -> Iterator[None]:
        """All but the most important rows, columns or both of a module zeroed, as importance ranks the intact one."""
        with ExitStack() as stack:
            for each in AXES if axis == BOTH else (axis,):
                mask = Mask.top(self._importance(module)[AXES.index(each)], level)
                stack.enter_context(zeroed(self._modules[module].weight, each, mask))
            yield

    def _score_of_model(self) -> float:
        self.evaluations += 1
        return float(self._score(self._model))
