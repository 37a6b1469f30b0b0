"""Scores of a frozen model on a handful of examples, evaluated again and again with one module altered.

A score is anything that can be called as `score(model) -> float`, larger = better. A score that also has `bounds`
evaluates only as much as decides a question about it, and does not compute again what the altered module cannot have
changed. Both save time and change no number.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from partial_lora.calibration.answer_scores import SCORES, Batch, Metric, Whole, Within
from partial_lora.calibration.gradient import Removed, linearised
from partial_lora.calibration.level_search import COMPETING, Bounds
from partial_lora.calibration.order import Tally, arranged, enough, next_batch
from partial_lora.calibration.reuse import Reuse, logits_of
from partial_lora.errors import PartialLoraError
from partial_lora.models.modes import differentiable, frozen

Score = Callable[[nn.Module], float]

MEMORY = 2**31
_NO_INPUTS = ("labels", "items", "answers")
_TRIAL = 1.0  # seconds of passes over a few rows that tell how long one over all of them takes


@runtime_checkable
class BoundedScore(Protocol):
    """A score that can stop as soon as a question about it is decided.

    It may also have `settled(module)`, to be called once that module's weights have been altered for good; `chance`,
    the score of guessing (None where that means nothing); `size`, the number of examples; and `cost(model, module)`,
    what a call of `bounds` takes in proportion to those of other modules.
    """

    def __call__(self, model: nn.Module) -> float: ...

    def bounds(
        self, model: nn.Module, module: str, undecided: Callable[[float, float], bool], known: Bounds | None = None
    ) -> Bounds: ...


def _together(output: Any, batch: Batch) -> tuple[Tensor, Batch]:
    """Return the logits, and what a batch has beside the model's inputs on their device: logits of tokens are large."""
    logits = logits_of(output)
    if logits.device.type == "mps":  # which has no float64
        logits = logits.cpu()
    return logits, {name: batch[name].to(logits.device) for name in _NO_INPUTS if name in batch}


def _entries(batch: Batch) -> int:
    """Return the size of a batch's first input: of texts padding counts, too."""
    return next(value.numel() for name, value in batch.items() if name not in _NO_INPUTS)


@dataclass
class Evaluations:
    """Work that a score has done: passes begun, examples seen, and blocks run (one block on one example of a batch)."""

    passes: int = 0
    examples: int = 0
    sample_blocks: int = 0


class FewShotScore:
    """Score of a model on the scored draw, by any measure.

    batches: the scored draw; each holds the model's inputs by name and "labels" (what else "options" needs: see
    `OptionLikelihood`). measure: a name out of `SCORES`, or a function (predictions, labels) -> float of two arrays.
    blocks: the name of the model's sequence of blocks, or None for no reuse: before the block that holds the altered
    module nothing changes. memory: bytes that may be kept for that between passes.
    sizes: where several tasks' heads are side by side, how many outputs each has; for accuracy or loss.

    The first full pass, which must be of the intact model, puts the examples in the order that decides soonest.

    Raises PartialLoraError where the batches do not suit the measure, and as `reuse.Reuse` does.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[dict[str, Tensor]],
        measure: str | Metric = "accuracy",
        blocks: str | None = None,
        memory: int = MEMORY,
        sizes: Sequence[int] = (),
    ) -> None:
        if not callable(measure) and measure not in SCORES:
            raise PartialLoraError(f"calibration.score={measure}: expected one of {', '.join(SCORES)}")
        self.evaluations = Evaluations()
        self.measure = Whole(measure) if callable(measure) else SCORES[measure]()
        if sizes:
            self.measure = Within(self.measure, sizes)
        for batch in batches:
            self.measure.check(batch)
        self._take(batches)
        self.size = sum(self._sizes)
        if not self._sizes or min(self._sizes) == 0:
            raise PartialLoraError("batches: the scored draw is empty, expected at least 1 example in every batch")
        self.chance = self.measure.chance(self._batches)
        self._weight = sum(self.measure.weight(batch) for batch in self._batches)
        self._arranged = False
        self._reuse = Reuse(model, blocks, memory)
        self._stopped: dict[tuple[str, Bounds], Tally | None] = {}  # what had been seen; None if that is ambiguous

    def _take(self, batches: Sequence[Batch]) -> None:
        self._batches = list(batches)
        self._sizes = [int(self.measure.units(batch)[-1]) + 1 if len(batch["labels"]) else 0 for batch in self._batches]

    @property
    def rows(self) -> int:
        """Rows of one full pass; a choice has one for each option."""
        return sum(len(batch["labels"]) for batch in self._batches)

    def __call__(self, model: nn.Module) -> float:
        """Return the score by a full pass from the inputs on, whatever was altered."""
        with frozen(model):
            if not self._arranged:
                places = range(len(self._batches))
                sureness = [self.measure.sureness(*self._answers(model, index, None)).cpu() for index in places]
                self._take(arranged(self._batches, sureness, self.measure))
                self._arranged = True
            self.evaluations.passes += 1
            tally = Tally()
            for index in range(len(self._batches)):
                if not self._see(model, index, None, tally):
                    return math.nan
            return self._bounds(tally)[0]

    def bounds(
        self, model: nn.Module, module: str, undecided: Callable[[float, float], bool], known: Bounds | None = None
    ) -> Bounds:
        """Return what is known of the score once `undecided(low, high)` turns False: equal bounds are the score itself.

        model: as it was at the first pass, or when `settled` was last called, but for the weights of `module`.
        known: bounds that an earlier, cut-short call gave for these very weights; this call goes on where it stopped.
        """
        self.evaluations.passes += 1
        if known is not None and not undecided(*known):
            return known
        before = None if known is None else self._stopped.get((module, known))
        tally = Tally() if before is None else before.copy()
        counted = (self.measure.lowest, self.measure.highest) == (0.0, 1.0)
        needed = enough(undecided, self.size) if counted else None
        with frozen(model):
            while len(tally.seen) < len(self._batches) and undecided(*self._bounds(tally)):
                index = len(tally.seen) if needed is None else next_batch(self._sizes, tally, needed)
                if not self._see(model, index, module, tally):
                    return math.nan, math.nan
        low, high = self._bounds(tally)
        if low < high:
            earlier = self._stopped.get((module, (low, high)), tally)
            agrees = earlier is not None and set(earlier.seen) == set(tally.seen)
            self._stopped[module, (low, high)] = tally if agrees else None
        return low, high

    def measured(self, model: nn.Module) -> tuple[float, int]:
        """Return the seconds of a full pass, as its first rows take them, and how many outputs of each example compete.

        Rows double until a second has passed, so that this takes little more however large a model is.
        """
        batch = self._batches[0]
        count, width = len(batch["labels"]), _entries(batch)
        with frozen(model):
            start = time.perf_counter()
            for number, rows in enumerate((1, *(2**power for power in range(count.bit_length())))):
                began = time.perf_counter()
                outputs, places = self._competing(model, batch, slice(0, rows))
                outputs.sum().item()  # which waits for an accelerator
                now = time.perf_counter()
                if now - start > _TRIAL and number:  # the first pass also warms up
                    break
        return (now - began) * sum(map(_entries, self._batches)) / (width * rows / count), places.shape[1]

    def predicted(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Linear],
        removed: Removed,
        axes: Sequence[str],
        seen: Callable[[float, int], None] = lambda examples, outputs: None,
    ) -> tuple[dict[str, dict[str, list[float]]], int]:
        """Return the scores at the levels of every curve as gradients predict them (gradient.py), and the passes taken.

        removed: what each level zeroes. seen: called after each batch with the share of the examples that were seen and
        the outputs of each whose gradients were taken. A backward pass counts as one. Of many classes, the right one
        and those that the intact model finds likeliest compete; the logits of the others are taken not to change.
        """
        tallies = {module: {axis: [] for axis in axes} for module in modules}
        passes, reached = 0, set()
        with differentiable(model, {}):
            for index, batch in enumerate(self._batches):
                answer, rows = partial(self._competing, model, batch), range(len(batch["labels"]))
                outputs, places, changes = linearised(answer, modules, removed, axes, rows, reached)
                outputs, places = (tensor.to(batch["labels"].device) for tensor in (outputs, places))
                passes = 1 + places.shape[1]
                self.evaluations.examples += passes * self._sizes[index]
                self.evaluations.sample_blocks += passes * self._reuse.depth * len(rows)
                for module, of_module in changes.items():
                    for axis, change in of_module.items():
                        tallies[module][axis] = tallies[module][axis] or [Tally() for _ in range(change.shape[2])]
                        self._tally_levels(tallies[module][axis], index, outputs, places, change)
                seen(sum(self._sizes[: index + 1]) / self.size, places.shape[1])
        self.evaluations.passes += passes
        for module in modules:
            if module not in reached:
                raise PartialLoraError(
                    f"calibration.search=gradient: no input reaches {module}; its weight may be read without a call: "
                    "expected scan or bisect, or other target_modules"
                )
        scores = {
            module: {axis: [self._bounds(tally)[0] for tally in levels] for axis, levels in of_module.items()}
            for module, of_module in tallies.items()
        }
        return scores, passes

    def _tally_levels(
        self, tallies: Sequence[Tally], index: int, outputs: Tensor, places: Tensor, change: Tensor
    ) -> None:
        """Add a batch to the tally of every level of a curve: its outputs, moved at `places` by the level's change."""
        for tally, moved in zip(tallies, change.to(outputs).unbind(2), strict=True):
            values = self.measure.judged(outputs.scatter_add(1, places, moved), self._batches[index])
            tally.add(index, values, keep=isinstance(self.measure, Whole))

    def _competing(self, model: nn.Module, batch: Batch, rows: slice) -> tuple[Tensor, Tensor]:
        """Return the outputs of some rows of a batch (rows, all), and the places of those that compete."""
        batch = {name: value[rows] for name, value in batch.items()}
        logits, batch = _together(model(**self._inputs(model, batch)), batch)
        outputs, labels = self.measure.outputs(logits, batch), batch["labels"]
        outputs = outputs.reshape(len(labels), -1)
        if labels.is_floating_point() or outputs.shape[1] <= COMPETING:
            return outputs, torch.arange(outputs.shape[1], device=labels.device).expand_as(outputs)
        return outputs, outputs.detach().scatter(1, labels[:, None], math.inf).topk(COMPETING).indices

    def cost(self, model: nn.Module, module: str) -> int:
        """Return how many blocks a pass runs where this module alone is altered."""
        return self._reuse.depth - self._reuse.first_block(model, module)

    def settled(self, module: str) -> None:
        """Treat the model, with this module altered for good, as the intact one from now on."""
        self._reuse.settled(module)

    def _see(self, model: nn.Module, index: int, module: str | None, tally: Tally) -> bool:
        """Add the model's answers to one batch to a tally; False if one of them is no number."""
        values = self.measure.values(*self._answers(model, index, module)).cpu()
        tally.add(index, values, keep=isinstance(self.measure, Whole))
        return bool(values.isfinite().all())

    def _answers(self, model: nn.Module, index: int, module: str | None) -> tuple[Tensor, Batch]:
        """Return `_together` of the model's answers to a batch; only `module` differs from the intact model."""
        batch = self._batches[index]
        inputs = self._inputs(model, batch)
        if module is None:
            output = self._reuse.full(model, inputs)
        else:
            output = self._reuse.altered(model, inputs, index, module)
        self.evaluations.examples += self._sizes[index]
        self.evaluations.sample_blocks += self._reuse.ran * len(batch["labels"])
        return _together(output, batch)

    def _inputs(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        """Return the model's inputs out of a batch, on its device."""
        device = next(model.parameters()).device
        inputs: dict[str, Any] = {name: value.to(device) for name, value in batch.items() if name not in _NO_INPUTS}
        if "use_cache" in inspect.signature(model.forward).parameters:
            inputs["use_cache"] = False  # nothing is generated, and passes would write into a cache
        return inputs

    def _bounds(self, tally: Tally) -> Bounds:
        """Return the least and the most that the score can be, whatever the unseen units add."""
        rest = self.size - tally.units
        if isinstance(self.measure, Whole):
            if rest:
                return -math.inf, math.inf
            values = torch.cat([tally.values[index] for index in range(len(self._batches))])
            return (self.measure.whole(values, torch.cat([batch["labels"] for batch in self._batches])),) * 2
        if not rest:
            return (tally.total / self._weight,) * 2
        low, high = (tally.total + rest * least for least in (self.measure.lowest, self.measure.highest))
        return low / self._weight, high / self._weight
