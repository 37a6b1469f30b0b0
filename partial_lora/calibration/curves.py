"""Calibration curves: what is left of the model's score when part of one module is zeroed, level by level.

A point of a curve is known as bounds (low, high) of the score; equal bounds are the score. Points are evaluated when a
question needs them, no further than it needs, and are stored on disk for the next calibration.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from partial_lora.calibration import level_search
from partial_lora.calibration.importance import Scores
from partial_lora.calibration.peers import Peers, gathered
from partial_lora.calibration.score import BoundedScore, Score
from partial_lora.errors import PartialLoraError, kind_and_line, require
from partial_lora.files import one_writer, write_json
from partial_lora.masks import AXES, Mask, Sparsity

VERSION = 1
PREDICTED = "predicted"  # names predicted curves in a store, in place of what is zeroed in other modules

logger = logging.getLogger(__name__)


@contextmanager
def zeroed(weight: Tensor, axis: str, mask: Mask) -> Iterator[None]:
    """Zero the rows (columns) of a weight that a mask does not keep; they come back, bit for bit, whatever happens."""
    dimension = AXES.index(axis)
    removed = torch.from_numpy(~mask.dense()).nonzero().squeeze(1).to(weight.device)
    values = weight.detach()
    saved = values.index_select(dimension, removed)
    try:
        values.index_fill_(dimension, removed, 0)
        yield
    finally:
        values.index_copy_(dimension, removed, saved)


class Curves:
    """The curves of one calibration, evaluated point by point as questions need them.

    modules: what may be zeroed. importance: returns the (rows, columns) scores of a module by its name, larger = keep;
    called when first needed. store: what is known already, and where to keep it.
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
        self.outputs = level_search.COMPETING  # of each example, as far as `trial` has told
        self._model, self._score, self._modules, self._importance = model, score, modules, importance
        self.store = store
        self._started: set[tuple[str, str, str, float]] = set()  # points of this score: it may go on with them
        self._chosen: level_search.Levels = {}  # what stays zeroed while curves are measured
        self._after = ""  # its digest
        self._unsettled: set[str] = set()  # modules altered for good that the score does not know of yet

    def trial(self) -> tuple[float, int] | None:
        """Return `FewShotScore.measured` of the model as it is; None of a score that has none."""
        if not hasattr(self._score, "measured"):
            return None
        seconds, self.outputs = self._score.measured(self._model)
        return seconds, self.outputs

    def intact(self) -> float:
        """Return the score of the model as it is. Raises PartialLoraError where it is no finite number."""
        score = self._score_of_model()
        if not math.isfinite(score):
            raise PartialLoraError(
                f"calibration: the score of the frozen model is {score}, expected a finite number; "
                "check the weights, the precision and the examples"
            )
        return score

    def cost(self, module: str, axis: str) -> float:
        """Return what a point of a curve costs beside those of others; 0 of a curve that was found before."""
        if self.curve(module, axis):
            return 0.0
        return self._score.cost(self._model, module) if hasattr(self._score, "cost") else 1.0

    def survives(self, module: str, axis: str, level: float, passes: Callable[[float], bool]) -> bool:
        """Return True where the score passes with all but the most important rows (columns) of one module zeroed.

        `passes` must be monotone: where it holds for a score it holds for every larger one.
        """
        low, _ = self._point(module, axis, level, lambda low, high: passes(high) and not passes(low))
        return passes(low)

    def exact(self, module: str, axis: str, level: float) -> float:
        """Return the score itself with a level of one module zeroed; NaN where it is not finite."""
        return self._point(module, axis, level, lambda low, high: low < high)[0]

    def joint(self, sparsity: Sparsity) -> float | None:
        """Return the score with every module at its own sparsity at once; None where it is no number."""
        with ExitStack() as stack:
            for module, axes in sparsity.items():
                for axis in AXES:
                    stack.enter_context(self._zeroed(module, axis, axes[axis]))
            score = self._score_of_model()
            return score if math.isfinite(score) else None

    def predicted(
        self, axes: Sequence[str], grid: Sequence[float], seen: Callable[[float, int], None]
    ) -> dict[str, dict[str, level_search.Curve]]:
        """Return every curve as gradients predict it around the intact model, by module and axis (gradient.py).

        seen: called as `FewShotScore.predicted` does.
        """
        curves = {
            module: {axis: self.store.curve(module, axis, PREDICTED) for axis in axes} for module in self._modules
        }
        if any(set(grid) - curve.keys() for of_module in curves.values() for curve in of_module.values()):
            removed = {
                module: {axis: torch.stack([self._removed(module, axis, level) for level in grid], 1) for axis in AXES}
                for module in self._modules
            }
            scores, passes = self._score.predicted(self._model, self._modules, removed, axes, seen)
            self.evaluations += passes
            for module, of_module in curves.items():
                for axis, curve in of_module.items():
                    known = (level_search.bounds_of(score, score) for score in scores[module][axis])
                    curve.update(zip(grid, known, strict=True))
            self.store.changed = True
            self.store.save()
        return curves

    def _removed(self, module: str, axis: str, level: float) -> Tensor:
        """Return 1 for every row or column of a module that a level zeroes, else 0 (size,), in float32 or better."""
        weight = self._modules[module].weight
        mask = Mask.top(self._importance(module)[AXES.index(axis)], level)
        return torch.from_numpy(~mask.dense()).to(weight.device, torch.promote_types(weight.dtype, torch.float32))

    @contextmanager
    def choices(self) -> Iterator[Callable[[str, str, float], None]]:
        """Measure curves after earlier choices: yields a function that zeroes a level of a module and axis.

        What is chosen stays zeroed until the block ends; then the weights are back, and the score knows it.
        """
        altered: set[str] = set()

        def choose(module: str, axis: str, level: float) -> None:
            stack.enter_context(self._zeroed(module, axis, level))
            self._chosen.setdefault(module, {})[axis] = level
            self._after = level_search.digest_of(self._chosen)
            if level:
                altered.add(module)
                self._unsettled.add(module)

        try:
            with ExitStack() as stack:
                yield choose
        finally:
            self._chosen, self._after = {}, ""
            self._settle(altered - self._unsettled)  # the score never knew that the others were altered
            self._unsettled = set()

    def curve(self, module: str, axis: str) -> level_search.Curve:
        """Return the points known of one curve after the choices that are in force; the caller may add points."""
        return self.store.curve(module, axis, self._after)

    def _settle(self, modules: Collection[str]) -> None:
        """Tell the score that modules have been altered for longer than one evaluation, or are as they were."""
        if hasattr(self._score, "settled"):
            for module in modules:
                self._score.settled(module)

    def _point(
        self, module: str, axis: str, level: float, undecided: Callable[[float, float], bool]
    ) -> level_search.Bounds:
        curve = self.curve(module, axis)
        if undecided(*curve.get(level, level_search.UNKNOWN)):
            curve[level] = self._evaluate(module, axis, level, undecided)
            self.store.changed = True
        return curve.get(level, level_search.UNKNOWN)

    def _evaluate(
        self, module: str, axis: str, level: float, undecided: Callable[[float, float], bool]
    ) -> level_search.Bounds:
        point = self._after, module, axis, level
        # A score without `settled` would reuse what it knows of the intact model, which earlier choices have changed.
        bounded = isinstance(self._score, BoundedScore) and (not self._after or hasattr(self._score, "settled"))
        with self._zeroed(module, axis, level):
            if not bounded:
                return level_search.bounds_of(*(self._score_of_model(),) * 2)
            others = self._unsettled - {module}
            self._settle(others)
            self._unsettled -= others
            earlier = self.curve(module, axis)[level] if point in self._started else None
            self.evaluations += 1
            bounds = self._score.bounds(self._model, module, undecided, earlier)
        self._started.add(point)
        return level_search.bounds_of(*bounds)

    @contextmanager
    def _zeroed(self, module: str, axis: str, level: float) -> Iterator[None]:
        """Zero all but the most important rows, columns or both of a module, as importance ranks the intact one."""
        with ExitStack() as stack:
            for mask_axis in AXES if axis == level_search.BOTH else (axis,):
                mask = Mask.top(self._importance(module)[AXES.index(mask_axis)], level)
                stack.enter_context(zeroed(self._modules[module].weight, mask_axis, mask))
            yield

    def _score_of_model(self) -> float:
        if not callable(self._score):
            raise PartialLoraError(f"score: expected a function score(model) -> float, found {self._score!r:.60}")
        self.evaluations += 1
        score = self._score(self._model)
        with suppress(TypeError, ValueError, RuntimeError):
            if not isinstance(score, (str, bytes)):  # of which float() would read digits
                return float(score)
        raise PartialLoraError(f"score: expected a number from score(model), found {score!r:.60}")


class Store:
    """Curves and finished results on disk, for one model, score, importance and search.

    path: a JSON file, or None to store nothing. key: plain data that says what the curves are of. A file that is broken
    or has another key is never used: a warning names it, and it is removed.
    """

    def __init__(self, path: Path | None, key: Mapping) -> None:
        self.path, self.key = None if path is None else Path(path), json.loads(json.dumps(key))
        self.baseline: float | None = None
        self.results: dict[str, dict] = {}
        self.changed = False
        self._curves: dict[str, dict[str, level_search.Curve]] = {}
        if self.path is not None and self.path.exists():
            try:
                text = self.path.read_text(encoding="utf-8", errors="replace")
                is_ours = not text.strip() or '"sha256"' in text[:100]
                require(is_ours, "store", self.path, "a file of curves, or a new one: this is another file")
                file = json.loads(text)
                if file["version"] != VERSION or file["sha256"] != _digest(file["content"]):
                    raise ValueError("wrong version or checksum")
                if file["content"]["key"] != self.key:
                    raise ValueError("made for another question")
                self.take(file["content"])
            except OSError as error:
                logger.warning(
                    "%s cannot be read (%s): what is found is kept in memory alone", self.path, error.strerror
                )
                self.path = None
            except (ValueError, KeyError, TypeError) as error:
                self.discard(f"not the curves that were kept there ({kind_and_line(error)})")

    @classmethod
    @contextmanager
    def shared(cls, path: Path | None, key: Mapping, peers: Peers) -> Iterator[Store]:
        """Open the store of processes that share a calibration: rank 0 has the file, all know its content.

        The file is held until the block ends, and written then, interrupted or not: another run with the same question
        waits, and finds the answer.
        """
        with ExitStack() as held:
            opened: list[Store] = []

            def content() -> dict | None:
                file = path if peers.rank == 0 else None
                if file is not None:
                    with suppress(OSError):  # a store that cannot be written is only read
                        held.enter_context(one_writer(Path(file), "calibrate into"))
                opened.append(cls(file, key))
                return opened[0].content() if peers.size > 1 and peers.rank == 0 else None

            shared_content = gathered(peers, content)[0]
            if peers.rank:
                opened[0].take(shared_content)
            try:
                yield opened[0]
            finally:
                opened[0].save()

    def curve(self, module: str, axis: str, after: str = "") -> level_search.Curve:
        """Return the points known of one curve; the caller may add points. `after` names what is zeroed elsewhere."""
        return self._curves.setdefault(module, {}).setdefault(f"{axis}@{after}" if after else axis, {})

    def check_baseline(self, baseline: float) -> None:
        """Take the baseline score of the model that is calibrated; curves of a model with another one are dropped."""
        if self.baseline is not None and not math.isclose(self.baseline, baseline, rel_tol=1e-6, abs_tol=1e-9):
            self.discard(f"its baseline score is {self.baseline}, this model's is {baseline}")
        self.baseline = baseline

    def discard(self, reason: str) -> None:
        """Forget everything, and warn of which file and why."""
        self.baseline, self.results, self._curves = None, {}, {}
        if self.path is not None:
            logger.warning("%s: %s; its points are evaluated again", self.path, reason)
            with suppress(OSError):  # a store that cannot be written is only read
                self.path.unlink()

    def content(self) -> dict:
        """Return everything that is known, as plain data."""
        curves = {
            module: {axis: level_search.points_of(curve) for axis, curve in axes.items()}
            for module, axes in self._curves.items()
        }
        return {"key": self.key, "baseline": self.baseline, "curves": curves, "results": self.results}

    def take(self, content: Mapping) -> None:
        """Add another store's `content`. A broken one raises before anything is taken."""
        curves = {
            (module, axis): level_search.curve_of(points)
            for module, axes in content["curves"].items()
            for axis, points in axes.items()
        }
        self.baseline, self.results = content["baseline"], dict(content["results"])
        for (module, axis), curve in curves.items():
            self.curve(module, axis).update(curve)

    def save(self) -> None:
        """Write the file, if there is one and anything is new."""
        if self.path is None or not self.changed:
            return
        content = self.content()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {"version": VERSION, "sha256": _digest(content), "content": content})
        except OSError as error:  # a full or a read-only cache costs another run's time, not this one
            logger.warning(
                "%s cannot be written (%s): what is found is kept in memory alone", self.path, error.strerror
            )
            self.path = None
        self.changed = False


def _digest(content: Mapping) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
