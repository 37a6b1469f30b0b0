"""Scores that gradients predict: to first order, a model's outputs are linear in the zeroing of rows and columns.

With row i of W zeroed, output c of an example changes by -sum_t d[t, i] (W x)[t, i]; with column j by -sum_t x[t, j]
(W'd)[t, j]. x is the module's input, d the gradient of c at the module's output, t a token. So one forward pass, and
one backward pass for each output, are enough for all modules, rows, columns and levels at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn

from partial_lora.calibration.level_search import BOTH, COMPETING, Curve, Levels, checks, scan
from partial_lora.calibration.reuse import wrapped
from partial_lora.errors import PartialLoraError
from partial_lora.masks import AXES

Removed = Mapping[str, Mapping[str, Tensor]]  # {module: {"rows" | "columns": (size, levels)}}, 1 where a level zeroes
Changes = dict[str, dict[str, Tensor]]  # {module: {axis of a curve: (examples, outputs, levels)}}
Answer = Callable[[slice], tuple[Tensor, Tensor]]
Point = tuple[str, str, float]  # module, axis, level


def linearised(
    answer: Answer,
    modules: Mapping[str, nn.Linear],
    removed: Removed,
    axes: Sequence[str],
    rows: range,
    reached: set[str],
) -> tuple[Tensor, Tensor, Changes]:
    """Return the outputs of some rows of a batch, which of them compete, and how these change at every level.

    answer: the outputs of a slice of the batch (rows, all), and the places of those that compete (rows, outputs).
    reached: gets the names of the modules that were called.
    Where a module's input does not hold one item for each row (shared positions, windows, an expert's tokens), each
    row goes through the model by itself.
    """
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in modules}  # input and output of each call

    def noted(name: str, original: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def forward(input: Tensor) -> Tensor:
            entering = input.view_as(input) if input.requires_grad else input.detach().requires_grad_()
            calls[name].append((entering, original(entering)))
            return calls[name][-1][1].clone()  # since the model may write into it

        return forward

    with wrapped(modules, noted), torch.enable_grad():
        outputs, places = answer(slice(rows.start, rows.stop))
        competing = outputs.gather(1, places).sum(0).unbind()  # rows may be summed: they do not depend on each other
    reached |= {name for name, pairs in calls.items() if pairs}
    if len(rows) > 1 and any(len(entering) != len(rows) for pairs in calls.values() for entering, _ in pairs):
        singly = [linearised(answer, modules, removed, axes, rows[at : at + 1], reached) for at in range(len(rows))]
        all_outputs, all_places, parts = zip(*singly, strict=True)
        changes = {name: {axis: torch.cat([part[name][axis] for part in parts]) for axis in axes} for name in modules}
        return torch.cat(all_outputs), torch.cat(all_places), changes
    if not outputs.requires_grad:
        raise PartialLoraError(
            "calibration.search=gradient: no gradient flows from the model's outputs to its modules; "
            "expected scan or bisect"
        )
    ends = [end for pairs in calls.values() for pair in pairs for end in pair]
    by_output = []
    for output in competing:
        arriving = iter(torch.autograd.grad(output, ends, retain_graph=True, materialize_grads=True))
        traced = {name: [(*call, next(arriving), next(arriving)) for call in calls[name]] for name in modules}
        by_output.append(
            {name: _changes(traced[name], module, removed[name], axes, len(rows)) for name, module in modules.items()}
        )
    changes = {
        name: {axis: torch.stack([part[name][axis] for part in by_output], 1) for axis in axes} for name in modules
    }
    return outputs.detach(), places, changes


def _changes(
    calls: Sequence[tuple[Tensor, ...]],
    module: nn.Linear,
    removed: Mapping[str, Tensor],
    axes: Sequence[str],
    count: int,
) -> dict[str, Tensor]:
    """Return how one output of each row changes by the zeroing in one module (rows, levels), by axis.

    calls: input, output, and the gradients at both, of each call of the module.
    """
    rows, columns = (removed[axis] for axis in AXES)
    changes = {axis: rows.new_zeros(count, rows.shape[1]) for axis in axes}
    for call in calls:
        x, product, entering, d = (part.detach().reshape(count, -1, part.shape[-1]).to(rows.dtype) for part in call)
        if module.bias is not None:
            product = product - module.bias.detach().to(rows.dtype)
        lost = {"rows": (d * product).sum(1) @ rows, "columns": (x * entering).sum(1) @ columns}
        if BOTH in axes:  # an entry in a zeroed row and a zeroed column is lost once, not twice
            weight = module.weight.detach().to(rows.dtype)
            entries = (weight * (gradient.T @ inputs) for gradient, inputs in zip(d, x, strict=True))
            twice = torch.stack([(rows.T @ matrix * columns.T).sum(1) for matrix in entries])
            lost[BOTH] = lost["rows"] + lost["columns"] - twice
        for axis in axes:
            changes[axis] -= lost[axis]
    return changes


# --- Levels of predicted curves


def levels_of(
    predicted: Mapping[str, Mapping[str, Curve]],
    grid: Sequence[float],
    enough: Callable[[float], bool],
    evaluated: Mapping[Point, bool] = MappingProxyType({}),
) -> Levels:
    """Return the level before the first failure of every predicted curve; `evaluated` points override predictions."""

    def survives(module: str, axis: str, level: float) -> bool:
        return evaluated.get((module, axis, level), enough(predicted[module][axis][level][0]))

    return {
        module: {axis: scan(partial(survives, module, axis), grid) for axis in axes}
        for module, axes in predicted.items()
    }


def checked(
    predicted: Mapping[str, Mapping[str, Curve]],
    grid: Sequence[float],
    *,
    enough: Callable[[float], bool],
    line: float,
    survives: Callable[[str, str, float], bool],
    outputs: int = COMPETING,
) -> dict[Point, bool]:
    """Evaluate some points of the predicted curves, as many as `checks` gives their scan; return which survive.

    line: the score that is just enough. survives: evaluates a point. Each time it is the point, among the chosen levels
    and those after them, whose prediction is nearest to the line. outputs: those of each example that compete.
    """
    evaluated: dict[Point, bool] = {}

    def beside(level: float) -> Sequence[float]:
        place = grid.index(level) if level else -1
        return grid[max(place, 0) : place + 2]

    levels = levels_of(predicted, grid, enough)
    tried = sum(grid.index(beside(level)[-1]) + 1 for axes in levels.values() for level in axes.values()) if grid else 0
    for _ in range(checks(tried, outputs)):
        distances = {
            (module, axis, near): abs(predicted[module][axis][near][0] - line)
            for module, axes in levels.items()
            for axis, level in axes.items()
            for near in beside(level)
        }
        left = [point for point, distance in distances.items() if point not in evaluated and math.isfinite(distance)]
        if not left:
            break
        point = min(left, key=distances.__getitem__)
        evaluated[point] = survives(*point)
        levels = levels_of(predicted, grid, enough, evaluated)
    return evaluated
