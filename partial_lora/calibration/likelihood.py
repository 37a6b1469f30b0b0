"""Rubrics made of likelihood: the loss of a model, and which of several options a language model finds likelier."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from partial_lora.calibration.rubric import Batch, Rows, as_labels, shares
from partial_lora.errors import PartialLoraError

IGNORED = -100  # the label of a token that is not asked for, as in transformers


class OptionLikelihood:
    """1 for an item whose right option the model finds likelier than all its others, 0 for another.

    A batch holds one row for each option: input_ids, attention_mask and labels (rows, length), the labels those of
    `IGNORED` outside the option; `items` (rows,), the number of the item a row is an option of; `answers` (rows,), True
    for the right option. All options of an item are in one batch, next to each other. The likelihood of an option is
    the sum of its tokens' log probabilities, or their mean where `per_token`.
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

    def values(self, logits: Tensor, batch: Batch) -> Tensor:
        margin = self.sureness(logits, batch)
        return torch.where(margin.isfinite() | (margin == math.inf), (margin > 0).double(), math.nan)

    def sureness(self, logits: Tensor, batch: Batch) -> Tensor:
        """How much likelier the right option is than the best other; infinite where there is no other."""
        log_likelihood = -_token_losses(logits, batch["labels"])
        if self.per_token:
            log_likelihood = log_likelihood / _tokens(batch["labels"]).clamp(min=1)
        log_likelihood = torch.where(log_likelihood.isfinite(), log_likelihood, math.nan)
        right, unit = batch["answers"].bool(), self.units(batch).to(logits.device)
        best = torch.full((int(unit[-1]) + 1,), -math.inf, dtype=torch.float64, device=logits.device)
        best_other = best.scatter_reduce(0, unit[~right], log_likelihood[~right], "amax")
        return log_likelihood[right] - best_other

    def chance(self, batches: Sequence[Batch]) -> float:
        """Always the position that is right most often, but no less than one of its options at random."""
        positions, options = [], []
        for batch in batches:
            unit = self.units(batch)
            sizes = torch.bincount(unit)
            first = sizes.cumsum(0) - sizes
            positions.append(batch["answers"].bool().cpu().nonzero().squeeze(1) - first)
            options.append(sizes.double())
        shares = torch.bincount(torch.cat(positions)).double() / sum(map(len, positions))
        return max(float(shares.max()), float((1 / torch.cat(options)).mean()))


class Loss(Rows):
    """Minus the mean loss: cross entropy of classes, squared error of real labels, cross entropy of the next tokens.

    Which of them the labels say: whole numbers (batch,), real numbers (batch,) or (batch, outputs), tokens (batch,
    length) with `IGNORED` where none is asked for; the mean is over examples or over tokens asked for. No loss is below
    zero, so what has been lost so far is lost, while it takes a whole pass to see that enough is left.
    """

    lowest, highest = -math.inf, 0.0

    def check(self, batch: Batch) -> None:
        labels = batch["labels"]
        if not labels.is_floating_point() and labels.ndim > 1:
            _check_tokens(labels)

    def weight(self, batch: Batch) -> float:
        labels = batch["labels"]
        return len(labels) if _per_example(labels) else int(_tokens(labels).sum())

    def values(self, logits: Tensor, batch: Batch) -> Tensor:
        labels = batch["labels"]
        if labels.is_floating_point():
            outputs = as_labels(logits, labels)
            return -((outputs - labels).double() ** 2).reshape(len(labels), -1).mean(1)
        if _per_example(labels):
            return -F.cross_entropy(logits.float(), labels, reduction="none").double()
        return -_token_losses(logits, labels)

    def sureness(self, logits: Tensor, batch: Batch) -> Tensor:
        """The loss of the intact model: what is lost most already is first to pass the line."""
        return -self.values(logits, batch)

    def chance(self, batches: Sequence[Batch]) -> float | None:
        """Minus the entropy of the labels' shares, minus the labels' variance; of tokens None."""
        labels = torch.cat([batch["labels"] for batch in batches]) if _per_example(batches[0]["labels"]) else None
        if labels is None:
            return None
        if labels.is_floating_point():
            return -float(labels.double().var(0, correction=0).mean())
        return -float(stats.entropy(shares(batches)))


def _per_example(labels: Tensor) -> bool:
    return labels.is_floating_point() or labels.ndim == 1


def _check_tokens(labels: Tensor) -> None:
    if labels.is_floating_point() or labels.ndim != 2 or labels.shape[1] < 2:
        raise PartialLoraError(f"labels: expected tokens (batch, length), found {labels.dtype} {list(labels.shape)}")
    if not _tokens(labels).any():
        raise PartialLoraError(f"labels: every token is {IGNORED}: none is asked for")


def _tokens(labels: Tensor) -> Tensor:
    """How many next tokens each row asks for (batch,)."""
    return (labels[:, 1:] != IGNORED).sum(1)


def _token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The summed cross entropy of the tokens each row asks for, every one from those before it (batch,), float64."""
    following = labels[:, 1:]
    losses = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), following.flatten(), reduction="none", ignore_index=IGNORED
    )
    return losses.double().view_as(following).sum(1)
