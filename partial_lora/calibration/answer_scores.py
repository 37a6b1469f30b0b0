"""Measures of a score: the value of what a model answers to each example.

Each says, too, what guessing would score, and which examples decide soonest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from scipy.special import entr
from torch import Tensor
from torch.nn import functional as F

from partial_lora.errors import PartialLoraError
from partial_lora.tasks.metrics import FUNCTIONS, IGNORED, OF_ALL_TOGETHER, pearson, spearman
from partial_lora.tasks.mixture import owners, within

Batch = Mapping[str, Tensor]
Metric = Callable[[np.ndarray, np.ndarray], float]


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
        log_likelihood = -token_losses(logits, batch["labels"])
        if self.per_token:
            log_likelihood = log_likelihood / tokens(batch["labels"]).clamp(min=1)
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
        return len(labels) if _per_example(labels) else int(tokens(labels).sum())

    def outputs(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the logits, or the log likelihood of each row's tokens (rows, 1)."""
        return logits if _per_example(batch["labels"]) else -token_losses(logits, batch["labels"])[:, None]

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
    if not tokens(labels).any():
        raise PartialLoraError(f"labels: every token is {IGNORED}, expected one that counts")


def tokens(labels: Tensor) -> Tensor:
    """Return the number of next tokens that count in each row (batch,)."""
    return (labels[:, 1:] != IGNORED).sum(1)


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the summed cross entropy (batch,), float64, of each row's tokens that count, given those before them."""
    following = labels[:, 1:]
    counts = following != IGNORED
    # Only the logits that count are copied: prompts are longer than answers, and vocabularies larger than either.
    losses = F.cross_entropy(logits[:, :-1][counts].float(), following[counts], reduction="none").double()
    return losses.new_zeros(counts.shape).masked_scatter(counts, losses).sum(1)


SCORES: dict[str, Callable[[], Measure]] = {
    "accuracy": Correctness,
    "loss": Loss,
    "options": OptionLikelihood,
    "options_per_token": lambda: OptionLikelihood(per_token=True),
    **{name: partial(Whole, FUNCTIONS[name]) for name in sorted(OF_ALL_TOGETHER)},
}


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
        owner = owners(self._sizes, labels.device)[labels]
        parts = [labels[owner == number] for number in owner.unique()]
        chances = [self._measure.chance([{"labels": part}]) for part in parts]
        if None in chances:
            return None
        return sum(chance * len(part) for chance, part in zip(chances, parts, strict=True)) / len(labels)
