"""The head a frozen model is scored with before any training.

A model pre-trained on something else has none for the task: it gets scikit-learn's LogisticRegression, or Ridge for
real labels, on frozen features of the fit draw. A model that has one, such as CLIP by the names of the classes, is
scored with its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor, nn

from partial_lora.calibration.peers import Alone, Peers, of_first
from partial_lora.calibration.slices import starts
from partial_lora.errors import PartialLoraError

_ITERATIONS = 5000  # of the logistic regression; a few hundred are needed

Batch = dict[str, Tensor]


@torch.no_grad()
def features(model: nn.Module, head: str, batches: Sequence[Batch]) -> tuple[np.ndarray, np.ndarray]:
    """What enters the head for every example (N, d), and the labels (N,)."""
    entering: list[Tensor] = []
    hook = model.get_submodule(head).register_forward_pre_hook(
        lambda module, inputs: entering.append(inputs[0].float())
    )
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        for batch in batches:
            model(**{key: value.to(device) for key, value in batch.items() if key != "labels"})
    finally:
        hook.remove()
        model.train(training)
    labels = torch.cat([batch["labels"] for batch in batches])
    return torch.cat(entering).cpu().numpy(), labels.numpy()


def fitted_head(inputs: np.ndarray, labels: np.ndarray, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Weight (outputs, d) and bias (outputs,) of a linear model of the labels (N,) on features (N, d).

    Classes: a multinomial logistic regression with C = 1; one without an example gets a zero row and a bias that no
    other logit falls below. Real numbers: a ridge regression with a penalty of 1.
    """
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
    """Weight and bias of several tasks' heads side by side, each fitted on its own task's examples (`slices`)."""
    fitted = []
    for start, size in zip(starts(sizes), sizes, strict=True):
        own = (labels >= start) & (labels < start + size)
        fitted.append(fitted_head(inputs[own], labels[own] - start, size))
    weights, biases = zip(*fitted, strict=True)
    return np.concatenate(weights), np.concatenate(biases)


def scored_head(
    model: nn.Module,
    head: str,
    batches: Sequence[Batch],
    new: bool,
    peers: Peers | None = None,
    sizes: Sequence[int] = (),
) -> AbstractContextManager:
    """The head that the model is scored with: one fitted on `batches` in place of a new one, else its own."""
    return few_shot_head(model, head, batches, peers, sizes) if new else nullcontext()


@contextmanager
def few_shot_head(
    model: nn.Module, head: str, batches: Sequence[Batch], peers: Peers | None = None, sizes: Sequence[int] = ()
) -> Iterator[None]:
    """Give the model a head fitted on `batches` for as long as the block lasts; its own comes back afterwards.

    peers: the processes that all need the very same head; the first one fits it. sizes: as of `fitted_heads`, where it
    is the heads of several tasks.
    """
    layer = model.get_submodule(head)
    if not isinstance(layer, nn.Linear) or layer.bias is None:
        raise PartialLoraError(f"model.head={head}: expected a linear layer with a bias, found {type(layer).__name__}")
    own = {name: value.clone() for name, value in layer.state_dict().items()}

    def fitted() -> tuple[np.ndarray, np.ndarray]:
        seen = features(model, head, batches)
        return fitted_heads(*seen, sizes) if sizes else fitted_head(*seen, layer.out_features)

    weight, bias = of_first(peers or Alone(), fitted)
    try:
        layer.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
        yield
    finally:
        layer.load_state_dict(own)
