"""Iterative magnitude pruning: importance by how long a row or column outlasts the others while the model trains."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from partial_lora.calibration.saliency import Batch, Loss, Scores, gradients, lent, precise
from partial_lora.errors import PartialLoraError

Kept = dict[str, tuple[Tensor, Tensor]]  # which rows (m,) and columns (n,) of each module are left, as booleans


def imp(
    model: nn.Module,
    modules: Mapping[str, nn.Linear],
    batches: Sequence[Batch],
    *,
    loss: Loss,
    seed: int = 0,
    rounds: int = 3,
    fraction: float = 0.2,
    steps: int = 10,
    learning_rate: float = 1e-5,
) -> dict[str, Scores]:
    """The order in which rows and columns fall when the smallest are pruned, round after round.

    A round trains the modules' weights, as far as they are left, for `steps` steps from their pre-trained values;
    prunes `fraction` of the rows and of the columns that are left in each module, those with the smallest norm over
    what is left of them; and rewinds the rest to the pre-trained values. A score is a place in that order: 0 for the
    first to fall, size - 1 for the largest of those that never do. Later rounds beat earlier ones, within a round the
    larger norm wins, and of equals the lower index.
    Rows and columns of all modules are pruned together, so a late round sees all of them small at once.
    Source: Frankle and Carbin 2019 (arXiv 1803.03635), iterative pruning with resetting, by structure in place of by
    entry; from pre-trained values as Chen et al. 2020 (arXiv 2007.12223) do. Raises PartialLoraError for options out of
    range and for training that diverges.
    """
    _check(rounds, fraction, steps, learning_rate)
    pretrained = {name: module.weight.detach().clone() for name, module in modules.items()}
    kept: Kept = {
        name: tuple(torch.ones(size, dtype=torch.bool, device=own.device) for size in own.shape)
        for name, own in pretrained.items()
    }
    lasted = {name: tuple(np.zeros(size) for size in own.shape) for name, own in pretrained.items()}
    norms = {name: tuple(np.zeros(size) for size in own.shape) for name, own in pretrained.items()}
    order = torch.Generator().manual_seed(seed)
    try:
        with lent(model, modules):
            for number in range(rounds):
                remains = _train(model, modules, pretrained, kept, _steps(batches, steps, order), loss, learning_rate)
                for name, weight in remains.items():
                    for axis in (0, 1):
                        left = kept[name][axis].cpu().numpy()
                        size = torch.linalg.vector_norm(weight, dim=1 - axis, dtype=torch.float64).cpu().numpy()
                        norms[name][axis][left], lasted[name][axis][left] = size[left], number
                        fallen = order_of(lasted[name][axis], norms[name][axis])[len(left) - left.sum() :]
                        kept[name][axis][torch.from_numpy(fallen[: _count(left.sum(), fraction)].copy())] = False
    finally:
        for name, module in modules.items():
            module.weight.data.copy_(pretrained[name])
    return {name: tuple(places(*pair) for pair in zip(lasted[name], norms[name], strict=True)) for name in modules}


def order_of(lasted: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """Indices from the first to fall to the last: by round, then by norm; of equals the higher index falls first."""
    return np.lexsort((-np.arange(len(norms)), norms, lasted))


def places(lasted: np.ndarray, norms: np.ndarray) -> Tensor:
    """The place of each row or column in that order, from 0, as float64."""
    place = np.empty(len(norms))
    place[order_of(lasted, norms)] = np.arange(len(norms))
    return torch.from_numpy(place)


def _count(left: int, fraction: float) -> int:
    """How many of those left fall in a round: at least one, and never the last."""
    return min(max(1, math.floor(fraction * left + 0.5)), left - 1)


def _train(
    model: nn.Module,
    modules: Mapping[str, nn.Linear],
    pretrained: Mapping[str, Tensor],
    kept: Kept,
    batches: Iterator[Batch],
    loss: Loss,
    learning_rate: float,
) -> dict[str, Tensor]:
    """What the weights become, pruned rows and columns zero throughout; AdamW without decay, on float32 copies.

    Decay would shrink all rows alike. In bfloat16 itself steps this small would be rounded away.
    """

    def pruned(name: str, weight: Tensor) -> Tensor:
        rows, columns = kept[name]
        return weight.to(precise(weight)) * rows[:, None] * columns

    trained = {name: nn.Parameter(pruned(name, own)) for name, own in pretrained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=learning_rate, weight_decay=0.0)
    for batch in batches:
        for name, module in modules.items():
            module.weight.data.copy_(trained[name].data)
        for name, gradient in gradients(model, modules, batch, loss).items():
            trained[name].grad = pruned(name, gradient)
        optimizer.step()
    for name, weight in trained.items():
        if not torch.isfinite(weight).all():
            raise PartialLoraError(f"importance=imp: training {name} diverged; lower importance.learning_rate")
    return {name: weight.detach() for name, weight in trained.items()}


def _steps(batches: Sequence[Batch], steps: int, order: torch.Generator) -> Iterator[Batch]:
    """A batch a step, every example once before any comes again; shuffled anew each time through."""
    for step in range(steps):
        if step % len(batches) == 0:
            shuffled = _shuffled(batches, order)
        yield shuffled[step % len(batches)]


def _shuffled(batches: Sequence[Batch], order: torch.Generator) -> list[Batch]:
    """The same examples in batches of the same sizes; whole batches where examples differ in shape.

    Data often comes sorted by class, and a batch of one class teaches nothing.
    """
    shapes = {tuple((name, value.shape[1:]) for name, value in sorted(batch.items())) for batch in batches}
    if len(shapes) > 1:
        return [batches[index] for index in torch.randperm(len(batches), generator=order)]
    sizes = [len(next(iter(batch.values()))) for batch in batches]
    parts = torch.randperm(sum(sizes), generator=order).split(sizes)
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    return [{name: value[part] for name, value in whole.items()} for part in parts]


def _check(rounds: int, fraction: float, steps: int, learning_rate: float) -> None:
    if rounds < 1:
        raise PartialLoraError(f"importance.rounds={rounds}: expected at least 1")
    if not 0 < fraction < 1:
        raise PartialLoraError(f"importance.fraction={fraction}: expected a share in (0, 1)")
    if steps < 0:
        raise PartialLoraError(f"importance.steps={steps}: expected 0 or more")
    if not 0 < learning_rate < math.inf:
        raise PartialLoraError(f"importance.learning_rate={learning_rate}: expected a number above 0")
