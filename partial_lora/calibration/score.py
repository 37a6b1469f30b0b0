"""Scores of a frozen model on a handful of examples, evaluated again and again with one module altered.

A score is anything that can be called as `score(model) -> float`, larger = better. A score that also has `bounds`
evaluates only as much as decides a question about it, and does not compute again what the altered module cannot have
changed. Both save time and change no number. A measure makes the score from the model's answers to each example.
"""

from __future__ import annotations

import inspect
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from scipy.special import entr
from torch import Tensor, nn
from torch.nn import functional as F

from partial_lora.calibration.gradient import Removed, linearised
from partial_lora.calibration.reuse import Reuse, logits_of
from partial_lora.calibration.search import COMPETING, Bounds
from partial_lora.errors import PartialLoraError
from partial_lora.tasks.metrics import IGNORED, f1, matthews, pearson, spearman

Batch = Mapping[str, Tensor]
Metric = Callable[[np.ndarray, np.ndarray], float]
Score = Callable[[nn.Module], float]

MEMORY = 2**31
_NO_INPUTS = ("labels", "items", "answers")


@runtime_checkable
class BoundedScore(Protocol):
    """A score that can stop as soon as a question about it is decided.

    It may also have `settled(module)`, to be called once that module's weights have been altered for good; `chance`,
    the score of guessing (None where that means nothing); `size`, the number of examples; and `cost(model, module)`,
    what a call of `bounds` takes in proportion to those of other modules.
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
    """Turn dropout and gradients off for as long as the block lasts; every module's training flag is put back."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.inference_mode(False), torch.no_grad():  # inference tensors do not count how often they change
            yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def differentiable(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Turn dropout off, and gradients on for the weights of these modules alone, for as long as the block lasts.

    A classifier of transformers that computes a loss sets its config.problem_type; that is put back, too.
    """
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with frozen(model):
        try:
            for parameter, _ in required:
                parameter.requires_grad_(False)
            for module in modules.values():
                module.weight.requires_grad_(True)
            yield
        finally:
            for parameter, own in required:
                parameter.requires_grad_(own)
            if getattr(config, "problem_type", None) != problem:
                config.problem_type = problem


# --- Measures: the value of what a model answers to each example


class Measure:
    """Value of a model's answers, by units: a unit is an example here, an item of several options below.

    `lowest` and `highest` are the least and the most that a unit adds to the score.
    """

    lowest: float | None = None
    highest: float | None = None

    def check(self, batch: Batch) -> None:
        """Raise PartialLoraError, in one line, for labels of the wrong kind."""
        labels = batch["labels"]
        if labels.ndim != 1 or labels.is_floating_point():
            raise PartialLoraError(
                f"labels: expected whole numbers (batch,), found {labels.dtype} {list(labels.shape)}"
            )

    def units(self, batch: Batch) -> Tensor:
        """Return the unit that each row belongs to, counted from 0 (rows,)."""
        return torch.arange(len(batch["labels"]))

    def weight(self, batch: Batch) -> float:
        """Return the batch's part of the divisor: the score is the sum of all values over the sum of all weights."""
        return len(batch["labels"])

    def values(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return one number for each unit (units,), float64; not finite where the model's answer is not."""
        return self.judged(self.outputs(logits, batch), batch)

    def outputs(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return what the values depend on (rows, outputs): the logits, or one number for each row of tokens."""
        return logits

    def judged(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the `values` of these `outputs`."""
        raise NotImplementedError

    def sureness(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return a number for each unit (units,), the largest for those that decide soonest."""
        raise NotImplementedError

    def chance(self, batches: Sequence[Batch]) -> float | None:
        """Return the score of guessing; None where that means nothing."""
        raise NotImplementedError


class Correctness(Measure):
    """1 for an example whose label has the largest logit, 0 for another; guessing always says the majority class."""

    lowest, highest = 0.0, 1.0

    def judged(self, outputs: Tensor, batch: Batch) -> Tensor:
        right = (outputs.argmax(-1) == batch["labels"]).double()
        return torch.where(outputs.isfinite().all(-1), right, math.nan)

    def sureness(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the margin of the label: the examples that stay right longest come first."""
        labels = batch["labels"][:, None]
        best_other = logits.scatter(1, labels, -math.inf).max(1).values
        return logits.gather(1, labels).squeeze(1) - best_other

    def chance(self, batches: Sequence[Batch]) -> float:
        return float(_class_shares(batches).max())


def _class_shares(batches: Sequence[Batch]) -> np.ndarray:
    """Return the share of every class that occurs (classes,)."""
    _, counts = torch.cat([batch["labels"] for batch in batches]).unique(return_counts=True)
    return (counts.double() / counts.sum()).cpu().numpy()


class Whole(Measure):
    """Any function (predictions, labels) -> float, larger = better, of all examples at once, as numpy arrays (N,).

    It is no mean over examples, so it needs all of them. A prediction is the class with the largest logit or, where
    labels are real numbers, the model's one output.
    """

    def __init__(self, metric: Metric) -> None:
        self.metric = metric

    def check(self, batch: Batch) -> None:
        if batch["labels"].ndim != 1:
            raise PartialLoraError(f"labels: expected one for each example, found {list(batch['labels'].shape)}")

    def judged(self, outputs: Tensor, batch: Batch) -> Tensor:
        if batch["labels"].is_floating_point():
            return _real_outputs(outputs, batch["labels"]).double()
        return torch.where(outputs.isfinite().all(-1), outputs.argmax(-1).double(), math.nan)

    def sureness(self, logits: Tensor, batch: Batch) -> Tensor:
        return torch.zeros(len(logits))  # all are needed whatever comes first

    def whole(self, values: Tensor, labels: Tensor) -> float:
        """Return the score of all units."""
        predictions = values.cpu().numpy() if labels.is_floating_point() else values.long().cpu().numpy()
        return float(self.metric(predictions, labels.cpu().numpy()))

    def chance(self, batches: Sequence[Batch]) -> float | None:
        """Return the metric of always answering the majority class; for real labels, 0 for a correlation, else None."""
        labels = torch.cat([batch["labels"] for batch in batches])
        if labels.is_floating_point():
            return 0.0 if self.metric in (pearson, spearman) else None
        majority = labels.unique()[_class_shares(batches).argmax()]
        return self.whole(majority.expand(len(labels)).double(), labels)


def _real_outputs(logits: Tensor, labels: Tensor) -> Tensor:
    outputs = logits.squeeze(-1) if logits.ndim == labels.ndim + 1 and logits.shape[-1] == 1 else logits
    if outputs.shape != labels.shape:
        raise PartialLoraError(
            f"labels: real numbers {list(labels.shape)} need outputs of that shape, found {list(logits.shape)}"
        )
    return outputs


class OptionLikelihood(Measure):
    """1 for an item whose right option is likelier than all its others, 0 for any other item.

    A batch holds one row for each option: input_ids, attention_mask and labels (rows, length), labels being `IGNORED`
    outside the option; `items` (rows,), the number of the row's item; `answers` (rows,), True for the right option. All
    options of an item are in one batch, next to each other. The likelihood of an option is the sum of its tokens' log
    probabilities, or their mean if `per_token`.
    """

    lowest, highest = 0.0, 1.0

    def __init__(self, per_token: bool = False) -> None:
        self.per_token = per_token

    def check(self, batch: Batch) -> None:
        missing = {"labels", "items", "answers"} - batch.keys()
        if missing:
            raise PartialLoraError(f"batches: options need {', '.join(sorted(missing))}; found {', '.join(batch)}")
        _check_tokens(batch["labels"])
        starts = 1 + int((batch["items"].diff() != 0).sum())
        if starts != len(batch["items"].unique()):
            raise PartialLoraError("batches: items: expected the options of an item next to each other")
        right = torch.zeros(starts).index_add_(0, self.units(batch), batch["answers"].float().cpu())
        if not (right == 1).all():
            raise PartialLoraError("batches: answers: expected one right option for each item, all in one batch")

    def units(self, batch: Batch) -> Tensor:
        changes = batch["items"].cpu().diff() != 0
        return torch.cat([torch.zeros(1, dtype=torch.long), changes.cumsum(0)])

    def weight(self, batch: Batch) -> float:
        return int(self.units(batch)[-1]) + 1

    def outputs(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the log likelihood of every option (rows, 1)."""
        log_likelihood = -_token_losses(logits, batch["labels"])
        if self.per_token:
            log_likelihood = log_likelihood / _tokens(batch["labels"]).clamp(min=1)
        return log_likelihood[:, None]

    def judged(self, outputs: Tensor, batch: Batch) -> Tensor:
        margin = self._margin(outputs.squeeze(1), batch)
        return torch.where(margin.isfinite() | (margin == math.inf), (margin > 0).double(), math.nan)

    def sureness(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return how much likelier the right option is than the best other; infinite where there is no other."""
        return self._margin(self.outputs(logits, batch).squeeze(1), batch)

    def _margin(self, log_likelihood: Tensor, batch: Batch) -> Tensor:
        log_likelihood = torch.where(log_likelihood.isfinite(), log_likelihood, math.nan)
        right, unit = batch["answers"].bool(), self.units(batch).to(log_likelihood.device)
        best = log_likelihood.new_full((int(unit[-1]) + 1,), -math.inf)
        best_other = best.scatter_reduce(0, unit[~right], log_likelihood[~right], "amax")
        return log_likelihood[right] - best_other

    def chance(self, batches: Sequence[Batch]) -> float:
        """Return the score of the position that is right most often, or of a random option where that is higher."""
        positions, options = [], []
        for batch in batches:
            sizes = torch.bincount(self.units(batch))
            first = sizes.cumsum(0) - sizes
            positions.append(batch["answers"].bool().cpu().nonzero().squeeze(1) - first)
            options.append(sizes.double())
        shares = torch.bincount(torch.cat(positions)).double() / sum(map(len, positions))
        return max(float(shares.max()), float((1 / torch.cat(options)).mean()))


class Loss(Measure):
    """Minus the mean loss: cross entropy of classes, squared error of real labels, cross entropy of the next tokens.

    The labels decide between them: whole numbers (batch,), real numbers (batch,) or (batch, outputs), tokens (batch,
    length) with `IGNORED` where none counts; the mean is over examples or over the tokens that count. No loss is below
    zero, so a failure may show early in a pass, while a success shows only at its end.
    """

    lowest, highest = -math.inf, 0.0

    def check(self, batch: Batch) -> None:
        if not _per_example(batch["labels"]):
            _check_tokens(batch["labels"])

    def weight(self, batch: Batch) -> float:
        labels = batch["labels"]
        return len(labels) if _per_example(labels) else int(_tokens(labels).sum())

    def outputs(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the logits, or the log likelihood of each row's tokens (rows, 1)."""
        return logits if _per_example(batch["labels"]) else -_token_losses(logits, batch["labels"])[:, None]

    def judged(self, outputs: Tensor, batch: Batch) -> Tensor:
        labels = batch["labels"]
        if labels.is_floating_point():
            return -((_real_outputs(outputs, labels) - labels).double() ** 2).reshape(len(labels), -1).mean(1)
        if _per_example(labels):
            return -F.cross_entropy(outputs.float(), labels, reduction="none").double()
        return outputs.squeeze(1)

    def sureness(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the loss of the intact model: the examples with the largest loss bring the sum to the line soonest."""
        return -self.values(logits, batch)

    def chance(self, batches: Sequence[Batch]) -> float | None:
        """Return minus the entropy of the classes' shares, or minus the variance of real labels; None for tokens."""
        if not _per_example(batches[0]["labels"]):
            return None
        labels = torch.cat([batch["labels"] for batch in batches])
        if labels.is_floating_point():
            return -float(labels.double().var(0, correction=0).mean())
        return -float(entr(_class_shares(batches)).sum())


def _per_example(labels: Tensor) -> bool:
    return labels.is_floating_point() or labels.ndim == 1


def _check_tokens(labels: Tensor) -> None:
    if labels.is_floating_point() or labels.ndim != 2 or labels.shape[1] < 2:
        raise PartialLoraError(f"labels: expected tokens (batch, length), found {labels.dtype} {list(labels.shape)}")
    if not _tokens(labels).any():
        raise PartialLoraError(f"labels: every token is {IGNORED}, expected one that counts")


def _tokens(labels: Tensor) -> Tensor:
    """Return the number of next tokens that count in each row (batch,)."""
    return (labels[:, 1:] != IGNORED).sum(1)


def _token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the summed cross entropy (batch,), float64, of each row's tokens that count, given those before them."""
    following = labels[:, 1:]
    counts = following != IGNORED
    losses = F.cross_entropy(logits[:, :-1][counts].float(), following[counts], reduction="none").double()
    return losses.new_zeros(counts.shape).masked_scatter(counts, losses).sum(1)


SCORES: dict[str, Callable[[], Measure]] = {
    "accuracy": Correctness,
    "loss": Loss,
    "options": OptionLikelihood,
    "options_per_token": lambda: OptionLikelihood(per_token=True),
    "f1": lambda: Whole(f1),
    "matthews": lambda: Whole(matthews),
    "pearson": lambda: Whole(pearson),
    "spearman": lambda: Whole(spearman),
}


# --- Heads of several tasks side by side in one linear layer: an example has only the outputs of its own task


def starts(sizes: Sequence[int]) -> list[int]:
    """Return the first output of each task."""
    return [sum(sizes[:number]) for number in range(len(sizes))]


def _owners(sizes: Sequence[int], device: torch.device) -> Tensor:
    """Return the number of the task that each output belongs to (outputs,)."""
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.as_tensor(list(sizes))).to(device)


def within(logits: Tensor, labels: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return logits (N, outputs) in float32; those of other tasks than the row's own are so low that softmax gives 0.

    They stay finite, so that logits which are not finite still show a model that broke down. labels: (N,).
    """
    owners, labels, logits = _owners(sizes, logits.device), labels.to(logits.device), logits.float()
    return logits.masked_fill(owners != owners[labels][:, None], torch.finfo(logits.dtype).min)


def mean_loss_within(sizes: Sequence[int]) -> Callable[[nn.Module, Mapping[str, Tensor]], Tensor]:
    """Return the mean cross entropy of a batch, each row's over its own task's outputs (`importance.data_scores`)."""

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        return F.cross_entropy(within(logits, batch["labels"], sizes), batch["labels"])

    return loss


class Within(Measure):
    """A measure that sees only the outputs of each example's own task."""

    def __init__(self, measure: Measure, sizes: Sequence[int]) -> None:
        self._measure, self._sizes = measure, sizes
        self.lowest, self.highest = measure.lowest, measure.highest
        self.check, self.units, self.weight, self.judged = measure.check, measure.units, measure.weight, measure.judged

    def outputs(self, logits: Tensor, batch: Batch) -> Tensor:
        return self._measure.outputs(within(logits, batch["labels"], self._sizes), batch)

    def sureness(self, logits: Tensor, batch: Batch) -> Tensor:
        return self._measure.sureness(within(logits, batch["labels"], self._sizes), batch)

    def chance(self, batches: Sequence[Batch]) -> float | None:
        """Return the score of guessing within each task, weighed by its examples."""
        labels = torch.cat([batch["labels"] for batch in batches])
        owners = _owners(self._sizes, labels.device)[labels]
        parts = [labels[owners == number] for number in owners.unique()]
        chances = [self._measure.chance([{"labels": part}]) for part in parts]
        if None in chances:
            return None
        return sum(chance * len(part) for chance, part in zip(chances, parts, strict=True)) / len(labels)


# --- The order of examples that decides soonest whether a score survives


@dataclass
class Tally:
    """Batches seen so far, by position; their units, the sum of the units' values, and the values where needed."""

    seen: list[int] = field(default_factory=list)
    units: int = 0
    total: float = 0.0
    values: dict[int, Tensor] = field(default_factory=dict)

    def copy(self) -> Tally:
        """Return a copy that can be added to while this one stays."""
        return Tally(list(self.seen), self.units, self.total, dict(self.values))

    def add(self, batch: int, values: Tensor, keep: bool) -> None:
        self.seen.append(batch)
        self.units += len(values)
        self.total += float(values.sum())
        if keep:
            self.values[batch] = values


# (End of a part of the draw, largest batch in it, both as shares of the draw; units that such a batch may always have.)
# Batches are small where most questions are decided, and large where all is seen anyway: small ones take longer.
_BATCHES = ((0.6, 0.15, 24), (0.8, 0.1, 16), (1.0, 0.05, 8))
_OF_TEXTS = 16  # texts that a batch of them may always have
# Share of the less sure units that are right, as on vit_s14 and digits; any value from 0.06 to 0.2 saves as much.
_LESS_SURE = 1 / 8


def arranged(batches: Sequence[Batch], sureness: Sequence[Tensor], measure: Measure) -> list[Batch]:
    """Return the same units in other batches: those with the largest `sureness` (units,) first.

    Images are in batches that get smaller. Texts come in thirds, the surest first; in each third those of like length
    share a batch, padded to the longest of them. Inputs of several shapes that are no texts stay in the batches of the
    caller, and whole batches change places.
    """
    widened = _as_wide(batches)
    if widened is None:
        order = torch.stack([part.float().mean() for part in sureness]).argsort(descending=True, stable=True)
        return [batches[index] for index in order]
    sizes = [len(part) for part in sureness]
    firsts = [0, *accumulate(sizes)]
    unit = torch.cat([measure.units(batch) + first for batch, first in zip(batches, firsts, strict=False)])
    by_unit = unit.argsort(stable=True).split(torch.bincount(unit).tolist())  # the rows of each unit
    whole = {name: torch.cat([batch[name] for batch in widened]) for name in widened[0]}
    surest = torch.cat(list(sureness)).float().argsort(descending=True, stable=True)
    if _is_text(whole):
        lengths = whole["attention_mask"].sum(1).cpu()
        longest = torch.stack([lengths[of_unit].max() for of_unit in by_unit])
        thirds = [third[longest[third].argsort(stable=True)] for third in surest.chunk(3)]
        chosen = [some for third in thirds for some in third.split(min(max(_OF_TEXTS, len(third) // 4), max(sizes)))]
    else:
        chosen = surest.split(batch_sizes(sizes))
    rows = [torch.cat([by_unit[index] for index in some]) for some in chosen]
    return [_cut({name: value[some] for name, value in whole.items()}) for some in rows]


def _is_text(batch: Batch) -> bool:
    """Return whether an attention_mask (rows, length) says what is padding, of tensors (rows,) and (rows, length)."""
    mask = batch.get("attention_mask")
    return mask is not None and all(each.ndim == 1 or each.shape == mask.shape for each in batch.values())


def _as_wide(batches: Sequence[Batch]) -> list[Batch] | None:
    """Return batches of one width: texts are padded on the right to the longest batch, as others of them are padded.

    None for inputs of several shapes that are no texts, or of which none is padded.
    """
    if all(len({batch[name].shape[1:] for batch in batches}) == 1 for name in batches[0]):
        return list(batches)
    padded = [batch for batch in batches if _is_text(batch) and not batch["attention_mask"].all()]
    if not padded or not all(map(_is_text, batches)):
        return None
    row, place = (padded[0]["attention_mask"] == 0).nonzero()[0]
    filler = {name: each[row, place].item() for name, each in padded[0].items() if each.ndim == 2}
    width = max(batch["attention_mask"].shape[1] for batch in batches)

    def widened(name: str, each: Tensor) -> Tensor:
        return F.pad(each, (0, width - each.shape[1]), value=filler[name]) if name in filler else each

    return [{name: widened(name, each) for name, each in batch.items()} for batch in batches]


def _cut(batch: Batch) -> Batch:
    """Return a batch of texts without the last places that are padding in every row; others as they are."""
    if not _is_text(batch):
        return batch
    width = int(batch["attention_mask"].any(0).nonzero().max()) + 1
    return {name: each[:, :width] if each.ndim == 2 else each for name, each in batch.items()}


def _together(output: Any, batch: Batch) -> tuple[Tensor, Batch]:
    """Return the logits, and what a batch has beside the model's inputs on their device: logits of tokens are large."""
    logits = logits_of(output)
    if logits.device.type == "mps":  # which has no float64
        logits = logits.cpu()
    return logits, {name: batch[name].to(logits.device) for name in _NO_INPUTS if name in batch}


def batch_sizes(sizes: Sequence[int]) -> list[int]:
    """Return sizes of batches that get smaller, for as many units in all, none larger than the largest of `sizes`."""
    size, smaller = sum(sizes), []
    for until, share, least in _BATCHES:
        most = min(max(least, math.ceil(share * size)), max(sizes))
        while sum(smaller) < until * size:
            smaller.append(min(most, size - sum(smaller)))
    return smaller


def enough(undecided: Callable[[float, float], bool], size: int) -> int:
    """Return how many of `size` units must be right to decide a question on their share; size + 1 if no number does."""
    return bisect_left(range(size + 1), True, key=lambda right: not undecided(right / size, 1.0))


def next_batch(sizes: Sequence[int], tally: Tally, needed: int) -> int:
    """Return the batch to see next, of batches arranged by sureness, where `needed` units have to be right.

    The batch of the `needed`-th unit comes first, which decides if examples turn wrong in their order; then the two
    surer ones. If these promise a pass, the surest of the others follow, most of which are right; if not, the least
    sure, most of which are wrong anyway. That choice stands: what follows it is no fair sample of the rest.
    """
    unseen = [index for index in range(len(sizes)) if index not in tally.seen]
    hinge = min(sum(end < needed for end in accumulate(sizes)), len(sizes) - 1)
    tried = range(hinge, max(-1, hinge - 3), -1)
    for index in tried:
        if index in unseen:
            return index
    followed = next((index for index in tally.seen if index not in tried), None)
    if followed is not None:
        return unseen[0] if followed < hinge else unseen[-1]
    surer, less = (sum(sizes[index] for index in unseen if (index < hinge) == before) for before in (True, False))
    return unseen[0] if tally.total + surer + _LESS_SURE * less >= needed else unseen[-1]


# --- The score


@dataclass
class Evaluations:
    """Work that a score has done: passes begun, examples seen, blocks run (one block on one batch), and the same for
    each example (one block on one example of a batch)."""

    passes: int = 0
    examples: int = 0
    blocks: int = 0
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
            other = self._stopped.get((module, (low, high)), tally)
            same = other is not None and set(other.seen) == set(tally.seen)
            self._stopped[module, (low, high)] = tally if same else None
        return low, high

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
                outputs, places = (each.to(batch["labels"].device) for each in (outputs, places))
                passes = 1 + places.shape[1]
                self.evaluations.examples += passes * self._sizes[index]
                self.evaluations.blocks += passes * self._reuse.depth
                self.evaluations.sample_blocks += passes * self._reuse.depth * len(rows)
                for module, of_module in changes.items():
                    for axis, change in of_module.items():
                        own = tallies[module][axis] = tallies[module][axis] or [Tally() for _ in range(change.shape[2])]
                        for tally, moved in zip(own, change.to(outputs).unbind(2), strict=True):
                            values = self.measure.judged(outputs.scatter_add(1, places, moved), batch)
                            tally.add(index, values, keep=isinstance(self.measure, Whole))
                seen(sum(self._sizes[: index + 1]) / self.size, places.shape[1])
        self.evaluations.passes += passes
        for module in modules:
            if module not in reached:
                raise PartialLoraError(
                    f"calibration.search=gradient: no input reaches {module}; its weight may be read without a call: "
                    "expected scan or bisect, or other target_modules"
                )
        scores = {
            module: {axis: [self._bounds(tally)[0] for tally in own] for axis, own in of_module.items()}
            for module, of_module in tallies.items()
        }
        return scores, passes

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
        self.evaluations.blocks += self._reuse.ran
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
