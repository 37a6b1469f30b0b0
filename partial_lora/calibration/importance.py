"""Importance of each row and each column of a pre-trained weight: larger = keep.

A measure is a pure function of one weight W (m, n) that returns row scores (m,) and column scores (n,). Every measure
takes the full name of the module and a seed, whether it needs them or not, and its own options by name. A measure that
needs examples too is a function of the model, its modules and batches, and returns the scores of all modules at once.
"""

from __future__ import annotations

import inspect
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from accelerate.utils import send_to_device
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from partial_lora.calibration.reuse import logits_of
from partial_lora.errors import PartialLoraError, one_line, require
from partial_lora.masks import random_keys
from partial_lora.models.modes import differentiable

Scores = tuple[Tensor, Tensor]  # of rows (m,) and of columns (n,)
ModuleScores = Mapping[str, Scores]  # by module
Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]

logger = logging.getLogger(__name__)


# --- Measures of the weight alone


def magnitude(weight: Tensor, *, module: str = "", seed: int = 0) -> Scores:
    """Return the squared norms of the rows and of the columns: the control that looks at size alone."""
    squares = weight.detach().double().square()
    return squares.sum(1), squares.sum(0)


def random(weight: Tensor, *, module: str = "", seed: int = 0) -> Scores:
    """Return an order drawn at random: the control that looks at nothing.

    The rows (columns) that score highest are those that a random mask of the same seed, module and axis keeps.
    """

    def draw(size: int, axis: str) -> Tensor:
        """Return ranks as scores, `size` for the smallest key: keys have more digits than a float64 holds."""
        order = np.argsort(random_keys(size, mask_seed=seed, module=module, axis=axis), kind="stable")
        return torch.from_numpy(size - np.argsort(order)).double()

    return draw(weight.shape[0], "rows"), draw(weight.shape[1], "columns")


def svd(weight: Tensor, *, module: str = "", seed: int = 0, k: int | None = None, energy: float = 0.9) -> Scores:
    """Return leverage scores: squared norms of the rows of the k leading left and right singular vectors.

    W ~ P_k L_k Q_k': row i scores |P_k[i, :]|^2, column j scores |Q_k[j, :]|^2, so either sums to k. Without `k`, k is
    the smallest that holds `energy` of the squared spectrum; at full rank every row of a square matrix scores 1.
    Q_k and L_k come from the eigenvectors of W'W, for the shorter side, then P_k = W Q_k / L_k: tens of times faster
    than the SVD of W, and in float64 the squaring costs no digit that W has.
    Source: the paper's importance; that `energy` decides k is the project's own. Raises PartialLoraError for a k above
    the rank, and for a weight that is zero or not finite.
    """
    if weight.shape[0] < weight.shape[1]:
        columns, rows = svd(weight.T, module=module, seed=seed, k=k, energy=energy)
        return rows, columns
    weight = weight.detach()
    if not 0 < float(weight.abs().max()) < math.inf:
        raise PartialLoraError(f"importance=svd: {module or 'the weight'} is zero or not finite, so it has no spectrum")
    squares, right = torch.linalg.eigh(_lower_gram(weight))
    squares, right = squares.flip(0), right.flip(1)
    squares = squares[squares > 1e-14 * squares[0]]  # as many as the rank: what is below is rounding
    if k is None:
        require(0 < energy <= 1, "importance.energy", energy, "a share in (0, 1]")
        held = squares.cumsum(0)
        k = int((held < energy * held[-1]).sum()) + 1
    if not 1 <= k <= len(squares):
        raise PartialLoraError(
            f"importance.k={k}: expected 1 to the rank of {module or 'the weight'} {tuple(weight.shape)}"
        )
    leading = right[:, :k] / squares[:k].sqrt()
    rows = [(part.double() @ leading).square().sum(1) for part in weight.split(4096)]
    return torch.cat(rows), right[:, :k].square().sum(1)


def _lower_gram(weight: Tensor, width: int = 512) -> Tensor:
    """Return the lower triangle of W'W in float64, all that eigh reads, from few rows of W in float64 at a time."""
    size = weight.shape[1]
    gram = torch.zeros(size, size, dtype=torch.float64, device=weight.device)
    for part in weight.split(4096):
        rows = part.double()
        for first in range(0, size, width):
            gram[first:, first : first + width] += rows[:, first:].T @ rows[:, first : first + width]
    return gram


# --- Measures of the weight and of examples


def snip(
    model: nn.Module, modules: Mapping[str, nn.Linear], batches: Sequence[Batch], *, loss: Loss, seed: int = 0
) -> dict[str, Scores]:
    """Return the connection sensitivity |W * dL/dW|, summed over the row (column).

    L is the mean loss of all examples, so gradients are summed over the batches before the absolute value is taken:
    memory holds the sums in float32 and the gradients of one batch. Weights are pre-trained, where the source draws new
    ones.
    Source: SNIP, Lee, Ajanthan and Torr 2019 (arXiv 1810.02340), section 4.1, without its division by the sum of all
    entries. Raises PartialLoraError for a module that the loss does not depend on.
    """
    total = sum(map(_examples, batches))
    sums: dict[str, Tensor] = {}
    with differentiable(model, modules):
        for batch in batches:
            for name, gradient in gradients(model, modules, batch, loss).items():
                share = gradient.to(_precise(gradient)) * (_examples(batch) / total)
                sums[name] = sums[name].add_(share) if name in sums else share
    scores = {}
    for name, module in modules.items():
        entries = (module.weight.detach().to(sums[name].dtype) * sums[name]).abs()
        scores[name] = entries.sum(1, dtype=torch.float64), entries.sum(0, dtype=torch.float64)
    return scores


def activation(
    model: nn.Module, modules: Mapping[str, nn.Linear], batches: Sequence[Batch], *, loss: Loss, seed: int = 0
) -> dict[str, Scores]:
    """Return |W_ij| * |x_j|, how much each entry carries, summed over the row (column).

    |x_j| is the norm of input feature j over all tokens of all examples. Tokens that the batch's attention_mask (batch,
    tokens) leaves out do not count, wherever a module's input has one row a token; in an encoder-decoder, where the
    mask is of the encoder alone, all tokens count. The source compares entries within a row and needs no sum; here a
    whole row or column goes, so the scores of its entries add up, as in `snip`.
    Source: Wanda, Sun, Liu, Bair and Kolter 2024 (arXiv 2306.11695), equation 1. `loss` decides how the model is run.
    Raises PartialLoraError for a module that no input reaches.
    """
    squares: dict[str, Tensor] = {}
    mask: Tensor | None = None

    def add(module: nn.Module, args: tuple, kwargs: dict, name: str) -> None:
        tokens = real_tokens((args or tuple(kwargs.values()))[0], mask)
        squares[name] = squares.get(name, 0) + tokens.float().square().sum(0, dtype=torch.float64)

    hooks = [
        module.register_forward_pre_hook(partial(add, name=name), with_kwargs=True) for name, module in modules.items()
    ]
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    try:
        with differentiable(model, {}):
            for batch in batches:
                mask = None if encoder_decoder else batch.get("attention_mask")
                loss(model, send_to_device(batch, next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    scores = {}
    for name, module in modules.items():
        if name not in squares:
            raise PartialLoraError(f"importance: no input of the fit draw reaches {name}; leave it out")
        entries = module.weight.detach().abs().double() * squares[name].sqrt()
        scores[name] = entries.sum(1), entries.sum(0)
    return scores


def real_tokens(inputs: Tensor, mask: Tensor | None) -> Tensor:
    """Return the tokens (tokens, features) of a module's input that no mask leaves out."""
    flat = inputs.detach().reshape(-1, inputs.shape[-1])
    if mask is None or mask.ndim != 2 or inputs.shape[:-1] not in (mask.shape, (mask.numel(),)):
        return flat
    return flat[mask.flatten().to(flat.device) != 0]


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
    """Return the order in which rows and columns fall when the smallest are pruned, round after round.

    A round trains the modules' weights, as far as they are left, for `steps` steps from their pre-trained values;
    prunes `fraction` of the rows and of the columns that are left in each module, those with the smallest norm over
    what is left of them; and rewinds the rest to the pre-trained values. A score is a place in that order: 0 for the
    first to fall, size - 1 for the largest of those that never do. Later rounds beat earlier ones, within a round the
    larger norm wins, and of equals the lower index.
    Rows and columns of all modules are pruned together, so a late round sees all of them small at once.
    Source: Frankle and Carbin 2019 (arXiv 1803.03635), iterative pruning with resetting, by structure in place of by
    entry; from pre-trained values as Chen et al. 2020 (arXiv 2007.12223) do. Raises PartialLoraError for training that
    diverges.
    """
    pretrained = {name: module.weight.detach().clone() for name, module in modules.items()}
    # Of rows and of columns: which are left, and those that have fallen, in their order.
    left = {
        name: tuple(torch.ones(size, dtype=torch.bool, device=weight.device) for size in weight.shape)
        for name, weight in pretrained.items()
    }
    fallen: dict[str, tuple[list[int], list[int]]] = {name: ([], []) for name in modules}
    generator = torch.Generator().manual_seed(seed)
    try:
        with differentiable(model, modules):
            for number in range(rounds):
                seen = _training_batches(batches, steps, generator)
                for name, weight in _train(model, modules, pretrained, left, seen, loss, learning_rate).items():
                    for axis in (0, 1):
                        falling = _by_norm(weight, left[name][axis], axis)
                        if number < rounds - 1:
                            count = max(1, math.floor(fraction * len(falling) + 0.5))
                            falling = falling[: min(count, len(falling) - 1)]  # never the last
                        fallen[name][axis].extend(falling.tolist())
                        left[name][axis][torch.from_numpy(falling)] = False
    finally:
        for name, module in modules.items():
            module.weight.data.copy_(pretrained[name])
    return {
        name: tuple(torch.from_numpy(np.argsort(order)).double() for order in axes) for name, axes in fallen.items()
    }


def _by_norm(weight: Tensor, left: Tensor, axis: int) -> np.ndarray:
    """Return the rows (axis 0) or columns (axis 1) of a weight that are left, the smallest norm first."""
    norms = torch.linalg.vector_norm(weight, dim=1 - axis, dtype=torch.float64).cpu().numpy()
    places = np.flatnonzero(left.cpu().numpy())
    return places[np.lexsort((-places, norms[places]))]  # of equals the higher index


def _train(
    model: nn.Module,
    modules: Mapping[str, nn.Linear],
    pretrained: Mapping[str, Tensor],
    left: Mapping[str, tuple[Tensor, Tensor]],
    batches: Iterator[Batch],
    loss: Loss,
    learning_rate: float,
) -> dict[str, Tensor]:
    """Return the trained weights, pruned rows and columns zero throughout; AdamW without decay, on float32 copies.

    Decay would shrink all rows alike. In bfloat16 itself steps this small would be rounded away.
    """

    def pruned(name: str, weight: Tensor) -> Tensor:
        rows, columns = left[name]
        return weight.to(_precise(weight)) * rows[:, None] * columns

    trained = {name: nn.Parameter(pruned(name, weight)) for name, weight in pretrained.items()}
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


def adapter(
    model: nn.Module,
    modules: Mapping[str, nn.Linear],
    batches: Sequence[Batch],
    *,
    loss: Loss,
    seed: int = 0,
    rank: int = 16,
    alpha: float = 16.0,
    steps: int = 30,
    learning_rate: float = 1e-3,
) -> dict[str, Scores]:
    """Return how far the rows of B and the columns of A of a dense adapter move in a short training, as norms.

    B starts from zero, so that its change is B itself. A's drawn values would hide its change: on digits the norms of
    its columns after 30 steps are those they were drawn with (correlation 0.94), and where W is four times as wide,
    they are half as large. Movement has one unit everywhere, a step of Adam, and B's rows and A's columns move about as
    far, so one ranking holds all of them. Norms themselves, or their products with the other factor's norm (what BA
    loses with a row or column), would rank modules by their shapes, and keep little but columns of A.
    The adapter trains for `steps` steps by AdamW without decay, drawn with `seed` as `get_peft_model` draws it; it is
    taken off again, and torch's random numbers go on as if it had never been. A run of that seed and rank starts from
    the same A: what is kept of it is a winning ticket, rewound to the values that it was trained from.
    Source: Frankle and Carbin 2019 (arXiv 1803.03635), one-shot pruning with resetting, of rows and columns of an
    adapter's factors in place of entries of a network's weights; by movement, |trained - initial|, in place of
    magnitude: Zhou, Lan, Liu and Yosinski 2019 (arXiv 1905.01067). Raises PartialLoraError for training that diverges.
    """
    named = "|".join(map(re.escape, modules))  # a list would match the ends of other names, too
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=f"({named})")
    with differentiable(model, {}), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators too
        adapted = get_peft_model(model, config)
        try:
            layers = {name: model.get_submodule(name) for name in modules}
            factors = {
                f"{name}.{factor}": getattr(layer, factor)["default"]
                for name, layer in layers.items()
                for factor in ("lora_A", "lora_B")
            }
            weights = [factor.weight for factor in factors.values()]
            start = {name: factor.weight.detach().clone() for name, factor in factors.items()}
            optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
            for batch in _training_batches(batches, steps, torch.Generator().manual_seed(seed)):
                for name, gradient in gradients(model, factors, batch, loss).items():
                    factors[name].weight.grad = gradient
                optimizer.step()
        finally:
            adapted.unload()
    change = {name: factor.weight.detach().double() - start[name].double() for name, factor in factors.items()}
    scores = {}
    for name in modules:
        scores[name] = change[f"{name}.lora_B"].norm(dim=1), change[f"{name}.lora_A"].norm(dim=0)
        if not all(torch.isfinite(axis).all() for axis in scores[name]):
            raise PartialLoraError(f"importance=adapter: training {name} diverged; lower importance.learning_rate")
    return scores


def _training_batches(batches: Sequence[Batch], steps: int, generator: torch.Generator) -> Iterator[Batch]:
    """Yield a batch a step, every example once before any comes again, in another order each time through."""
    for step in range(steps):
        if step % len(batches) == 0:
            shuffled = _shuffled(batches, generator)
        yield shuffled[step % len(batches)]


def _shuffled(batches: Sequence[Batch], generator: torch.Generator) -> list[Batch]:
    """Return the same examples in batches of the same sizes; whole batches where examples differ in shape.

    Data often comes sorted by class, and a batch of one class teaches nothing.
    """
    shapes = {tuple((name, value.shape[1:]) for name, value in sorted(batch.items())) for batch in batches}
    if len(shapes) > 1:
        return [batches[index] for index in torch.randperm(len(batches), generator=generator)]
    sizes = [len(next(iter(batch.values()))) for batch in batches]
    parts = torch.randperm(sum(sizes), generator=generator).split(sizes)
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    return [{name: value[part] for name, value in whole.items()} for part in parts]


def task_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the model's own loss where it computes one, else the mean cross entropy of its logits (batch, classes)."""
    parameters = inspect.signature(model.forward).parameters.values()
    takes_labels = any(one.name == "labels" or one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)
    output = model(**{name: value for name, value in batch.items() if takes_labels or name != "labels"})
    loss = getattr(output, "loss", None)
    if loss is not None:
        return loss
    logits, labels = logits_of(output), batch.get("labels")
    if not isinstance(logits, Tensor) or labels is None or labels.is_floating_point() or logits.ndim != 2:
        raise PartialLoraError(
            f"importance: {type(model).__name__} returns no loss, and its output does not suffice for one; pass `loss`"
        )
    return F.cross_entropy(logits.float(), labels)


def gradients(model: nn.Module, modules: Mapping[str, nn.Linear], batch: Batch, loss: Loss) -> dict[str, Tensor]:
    """Return the gradient of the loss of one batch for the weight of each module; for use within `differentiable`."""
    with torch.enable_grad():
        value = loss(model, send_to_device(batch, next(model.parameters()).device))
        weights = [module.weight for module in modules.values()]
        by_weight = (
            torch.autograd.grad(value, weights, allow_unused=True) if value.requires_grad else [None] * len(weights)
        )
    by_module = dict(zip(modules, by_weight, strict=True))
    for name, gradient in by_module.items():
        if gradient is None:
            raise PartialLoraError(f"importance: the loss does not depend on the weight of {name}; leave it out")
    return by_module


def _examples(batch: Batch) -> int:
    return len(batch["labels"] if "labels" in batch else next(iter(batch.values())))


def _precise(tensor: Tensor) -> torch.dtype:
    """Return float32, or the tensor's own type where that is better."""
    return torch.promote_types(tensor.dtype, torch.float32)


# --- Scores by a measure's name

MEASURES: dict[str, Callable[..., Scores]] = {"svd": svd, "magnitude": magnitude, "random": random}
NEEDS_DATA: dict[str, Callable[..., dict[str, Scores]]] = {
    "snip": snip,
    "imp": imp,
    "activation": activation,
    "adapter": adapter,
}

Importance = str | Callable[..., Scores] | Mapping[str, Scores]


def scores_of(module: str, weight: Tensor, importance: Importance, *, seed: int, options: Mapping) -> Scores:
    """Return row scores (m,) and column scores (n,) of a module's weight (m, n), on the CPU.

    importance: a measure by name or as a function, or the scores themselves, {module: (rows, columns)}. Raises
    PartialLoraError, naming the module, for scores that are missing, of another shape or not finite, and for options
    that the measure does not take.
    """
    name = name_of(importance)
    try:
        if isinstance(importance, Mapping):
            if module not in importance:
                raise PartialLoraError(f"importance: expected scores of {module}, found none")
            rows, columns = importance[module]
        else:
            measure = MEASURES[name] if isinstance(importance, str) else importance
            rows, columns = measure(weight.detach(), module=module, seed=seed, **options)
        return _checked(module, weight, rows, columns)
    except (TypeError, ValueError) as error:
        raise PartialLoraError(f"importance={name}: no scores of {module} ({one_line(error)})") from error


def data_scores(
    name: str,
    model: nn.Module,
    modules: Mapping[str, nn.Linear],
    batches: Sequence[Batch],
    *,
    seed: int,
    options: Mapping | None = None,
    loss: Loss | None = None,
) -> dict[str, Scores]:
    """Return the scores of each module's rows (m,) and columns (n,) by a measure that needs data, on the CPU.

    name: a key of NEEDS_DATA. model: with a head for the task; left as it was, bit for bit. modules: the modules of the
    model to score, by full name. batches: the fit draw; each holds the model's inputs by name and "labels" (batch,).
    loss: `loss(model, batch) -> scalar`, the mean over the batch; by default the model's own, else cross entropy.
    Raises PartialLoraError where there is nothing to score by, and, naming the module, for scores that are not finite.
    """
    if not batches:
        raise PartialLoraError(f"importance={name}: the fit draw is empty, expected at least 1 example")
    by_module = NEEDS_DATA[name](model, modules, batches, loss=loss or task_loss, seed=seed, **(options or {}))
    scores = {module: _checked(module, modules[module].weight, *pair) for module, pair in by_module.items()}
    for module, axes in scores.items():
        if any(len(axis) > 1 and (axis == axis[0]).all() for axis in axes):
            logger.warning(
                "importance=%s: all rows or all columns of %s score alike: it does not rank them", name, module
            )
    return scores


def _checked(module: str, weight: Tensor, rows: object, columns: object) -> Scores:
    rows, columns = (torch.as_tensor(side).detach().cpu().double() for side in (rows, columns))  # NumPy has no bfloat16
    if (rows.shape, columns.shape) != (weight.shape[:1], weight.shape[1:]):
        raise PartialLoraError(
            f"importance: expected scores of {tuple(weight.shape)} rows and columns of {module}, "
            f"found {tuple(rows.shape)} and {tuple(columns.shape)}"
        )
    if not (torch.isfinite(rows).all() and torch.isfinite(columns).all()):
        raise PartialLoraError(f"importance: the scores of {module} are not finite")
    return rows, columns


def name_of(importance: Importance) -> str:
    """Return the name of an importance in records. Raises PartialLoraError for a name of no weight-only measure."""
    if isinstance(importance, Mapping):
        return "given"
    if callable(importance):
        return getattr(importance, "__qualname__", type(importance).__qualname__)
    if importance in NEEDS_DATA:
        raise PartialLoraError(
            f"importance={importance}: needs examples, which are not at hand here; pass what data_scores returns"
        )
    if importance not in MEASURES:
        raise PartialLoraError(f"importance={importance}: expected one of {', '.join(MEASURES)}")
    return importance
