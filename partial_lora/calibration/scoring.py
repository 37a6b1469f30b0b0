"""What a frozen model is worth on a handful of examples, evaluated again and again with one module altered.

A score is anything that can be called as `score(model) -> float`, larger = better. A score that also has `bounds` says
only as much as is needed to decide a question about it, and does not compute again what the altered module cannot have
changed. Both give the numbers of a full pass: they save time and nothing else.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from partial_lora.calibration.likelihood import Loss, OptionLikelihood
from partial_lora.calibration.metric import METRICS, Metric, Whole
from partial_lora.calibration.ordering import arranged, enough, next_batch
from partial_lora.calibration.reuse import Reuse, logits_of
from partial_lora.calibration.rubric import Batch, Bounds, Correctness, Rubric, Tally, WholeRubric
from partial_lora.calibration.slices import Within
from partial_lora.errors import PartialLoraError

__all__ = ["MEASURES", "BoundedScore", "Bounds", "Evaluations", "FewShotAccuracy", "FewShotScore", "Score", "frozen"]

MEMORY = 2**31
MEASURES: dict[str, Callable[[], Rubric]] = {
    "accuracy": Correctness,
    "loss": Loss,
    "options": OptionLikelihood,
    "options_per_token": lambda: OptionLikelihood(per_token=True),
    **{name: lambda metric=metric: Whole(metric) for name, metric in METRICS.items()},
}
_NO_INPUTS = ("labels", "items", "answers")


class Score(Protocol):
    """What a model is worth; larger = better."""

    def __call__(self, model: nn.Module) -> float: ...


@runtime_checkable
class BoundedScore(Protocol):
    """A score that can stop as soon as a question about it is decided.

    It may also have `settled(module)`, to be called once that module's weights have been altered for good, `chance`,
    what guessing scores (None where that means nothing), and `size`, the number of examples.
    """

    def __call__(self, model: nn.Module) -> float: ...

    def bounds(
        self,
        model: nn.Module,
        module: str,
        undecided: Callable[[float, float], bool],
        known: Bounds | None = None,
    ) -> Bounds: ...


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Dropout off and no gradients, for as long as the block lasts; every module's training flag is put back."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode(False), torch.no_grad():  # tensors of inference mode do not say when they change
            yield
    finally:
        for module, training in flags:
            module.training = training


@dataclass
class Evaluations:
    """How much work a score has done: passes begun, examples seen, blocks run (one block on one batch), and the same
    for each example (one block on one example of a batch)."""

    passes: int = 0
    examples: int = 0
    blocks: int = 0
    sample_blocks: int = 0


class FewShotScore:
    """What a model is worth on the scored draw, by any measure.

    batches: the scored draw; each holds the model's inputs by name and "labels" (what else "options" needs: see
    `likelihood.OptionLikelihood`). measure: a name out of `MEASURES`, or a function (predictions, labels) -> float of
    two arrays. blocks: the name of the model's sequence of blocks, or None for no reuse: before the block that holds
    the altered module nothing changes. memory: bytes that may be kept for that between passes.
    sizes: where several tasks' heads are side by side, how many outputs each has (`slices`); of accuracy or loss.

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
        self.evaluations = Evaluations()
        self.rubric = Within(_rubric(measure), sizes) if sizes else _rubric(measure)
        self._batches = list(batches)
        for batch in self._batches:
            self.rubric.check(batch)
        self._sizes = [self._units(batch) for batch in self._batches]
        self.size = sum(self._sizes)
        if not self._sizes or min(self._sizes) == 0:
            raise PartialLoraError("batches: the scored draw is empty, expected at least 1 example in every batch")
        self.chance = self.rubric.chance(self._batches)
        self._weight = sum(self.rubric.weight(batch) for batch in self._batches)
        self._arranged = False
        self._reuse = Reuse(model, blocks, memory)
        self._stopped: dict[tuple[str, Bounds], Tally | None] = {}  # what had been seen; None if that is ambiguous

    @property
    def rows(self) -> int:
        """How many rows one full pass runs: of a choice one for each option."""
        return sum(len(batch["labels"]) for batch in self._batches)

    @property
    def bytes(self) -> int:
        """The memory that is kept between passes."""
        return self._reuse.bytes

    def __call__(self, model: nn.Module) -> float:
        """The score by a full pass from the inputs on, whatever was altered."""
        with frozen(model):
            if not self._arranged:
                self._arrange(model)
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
        """What is known of the score once `undecided(low, high)` turns False: equal bounds are the score itself.

        model: as it was at the first pass, or when `settled` was last called, but for the weights of `module`.
        known: bounds that an earlier, cut-short call gave for these very weights; it goes on where that one stopped.
        """
        self.evaluations.passes += 1
        before = None if known is None else self._stopped.get((module, known))
        tally = Tally() if before is None else before.copy()
        if known is not None and not undecided(*known):
            return known
        counted = (self.rubric.lowest, self.rubric.highest) == (0.0, 1.0)
        needed = enough(undecided, self.size) if counted else None
        with frozen(model):
            while len(tally.seen) < len(self._batches) and undecided(*self._bounds(tally)):
                index = len(tally.seen) if needed is None else next_batch(self._sizes, tally, needed)
                if not self._see(model, index, module, tally):
                    return math.nan, math.nan
        found = self._bounds(tally)
        if found[0] < found[1]:
            other = self._stopped.get((module, found), tally)
            same = other is not None and set(other.seen) == set(tally.seen)
            self._stopped[module, found] = tally if same else None
        return found

    def settled(self, module: str) -> None:
        """The weights of a module have been altered for good: from now on the model with them is the intact one."""
        self._reuse.settled(module)

    def _see(self, model: nn.Module, index: int, module: str | None, tally: Tally) -> bool:
        """Add what the model says of one batch to a tally; False if it says nothing that is a number."""
        values = self.rubric.values(self._logits(model, index, module), self._batches[index])
        tally.add(index, values, keep=isinstance(self.rubric, WholeRubric))
        return bool(values.isfinite().all())

    def _logits(self, model: nn.Module, index: int, module: str | None) -> Tensor:
        """The logits of a batch, on the device of its labels, where only `module` differs from the intact model."""
        batch = self._batches[index]
        device = next(model.parameters()).device
        inputs: dict[str, Any] = {name: value.to(device) for name, value in batch.items() if name not in _NO_INPUTS}
        if "use_cache" in inspect.signature(model.forward).parameters:
            inputs["use_cache"] = False  # nothing is generated, and a cache is something to write into
        if module is None:
            output = self._reuse.full(model, inputs)
        else:
            output = self._reuse.altered(model, inputs, index, module)
        self.evaluations.examples += self._sizes[index]
        self.evaluations.blocks += self._reuse.ran
        self.evaluations.sample_blocks += self._reuse.ran * len(batch["labels"])
        return logits_of(output).to(batch["labels"].device)

    def _bounds(self, tally: Tally) -> Bounds:
        """What the score is at least and at most, whatever the units are that have not been seen."""
        rest = self.size - tally.units
        if isinstance(self.rubric, WholeRubric):
            if rest:
                return -math.inf, math.inf
            values = torch.cat([tally.values[index] for index in range(len(self._batches))])
            return (self.rubric.whole(values, torch.cat([batch["labels"] for batch in self._batches])),) * 2
        if not rest:
            return (tally.total / self._weight,) * 2
        low, high = (tally.total + rest * least for least in (self.rubric.lowest, self.rubric.highest))
        return low / self._weight, high / self._weight

    def _arrange(self, model: nn.Module) -> None:
        """Put the examples in the order that decides soonest."""
        logits = [self._logits(model, index, None) for index in range(len(self._batches))]
        sureness = [self.rubric.sureness(*pair).cpu() for pair in zip(logits, self._batches, strict=True)]
        self._batches = arranged(self._batches, sureness, self.rubric)
        self._sizes = [self._units(batch) for batch in self._batches]

    def _units(self, batch: Batch) -> int:
        return int(self.rubric.units(batch)[-1]) + 1 if len(batch["labels"]) else 0


class FewShotAccuracy(FewShotScore):
    """The share of the scored draw that a classifier gets right."""

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[dict[str, Tensor]],
        blocks: str | None = None,
        memory: int = MEMORY,
    ) -> None:
        super().__init__(model, batches, "accuracy", blocks, memory)


def _rubric(measure: str | Metric) -> Rubric:
    if callable(measure):
        return Whole(measure)
    if measure not in MEASURES:
        raise PartialLoraError(f"calibration.score={measure}: expected one of {', '.join(MEASURES)}")
    return MEASURES[measure]()
