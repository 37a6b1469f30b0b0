"""What training makes smaller: sums over the examples, or tokens, of a whole optimizer step, divided by their number.

transformers' own classifiers average over their part of a step, and so multiply loss and gradient by the number of
parts that accumulation and processes make of it (transformers issue 47688).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn import functional as F

from partial_lora.calibration.likelihood import IGNORED
from partial_lora.calibration.slices import within


def loss_of_batch(outputs, labels: Tensor, num_items_in_batch: int | Tensor | None = None) -> Tensor:
    """The cross entropy of classes, or squared error of real labels, of a batch (N, outputs) against labels (N,).

    num_items_in_batch: the number of examples of the whole step, over all processes; None stands for this batch's.
    """
    logits = outputs.logits.float()
    if labels.is_floating_point():
        total = F.mse_loss(logits.view(labels.shape), labels.float(), reduction="sum")
    else:
        total = F.cross_entropy(logits, labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def loss_of_batch_within(sizes: Sequence[int]) -> Callable[..., Tensor]:
    """`loss_of_batch` of classes, each row's over the outputs of its own task (`slices`)."""

    def loss(outputs, labels: Tensor, num_items_in_batch: int | Tensor | None = None) -> Tensor:
        total = F.cross_entropy(within(outputs.logits, labels, sizes), labels, reduction="sum")
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    return loss


def loss_of_tokens(outputs, labels: Tensor, num_items_in_batch: int | Tensor | None = None) -> Tensor:
    """The cross entropy of the tokens that are asked for, each from those before it; labels (N, L), else -100.

    num_items_in_batch: the number of such tokens in the whole step; None stands for this batch's. Of the logits only
    those that foretell one are made float32: prompts are longer than answers.
    """
    following = labels[:, 1:]
    asked = following != IGNORED
    total = F.cross_entropy(outputs.logits[:, :-1][asked].float(), following[asked], reduction="sum")
    return total / (asked.sum() if num_items_in_batch is None else num_items_in_batch)
