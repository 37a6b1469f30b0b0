"""How important each row and each column of a pre-trained weight is: larger = keep.

A measure is a pure function of one weight W (m, n) that gives row scores (m,) and column scores (n,). Every measure
takes the full name of the module and a seed, whether it needs them or not, and its own options by name. Measures that
need examples too are functions of the model, its modules and batches, and give the scores of all modules at once.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from partial_lora.errors import PartialLoraError
from partial_lora.masks import random_keys

# --- Leverage scores: how much of the leading singular subspace of a weight lies in each of its rows and columns.

# Up to here the exact way takes 2 seconds on 2 cores, and the other saves little.
EXACT_SIZE = 2048
# For 14336 x 4096, on 2 cores: exact 15 to 19 s; 5 to 9 iterations on n / 8 = 512 dimensions 6 s, on twice as many as
# long as exact.
WIDEST = 1 / 8
FIRST_WIDTH = 128
ITERATIONS = 12
# What is still to come in the scores when the iteration stops, by its own estimate. That is up to 4 times too low, as
# the fast part of the change dies first; 1e-3 is promised.
TOLERANCE = 3e-5

Scores = tuple[Tensor, Tensor]


def svd(weight: Tensor, *, module: str = "", seed: int = 0, k: int | None = None, energy: float = 0.9) -> Scores:
    """Leverage scores: squared norms of the rows of the k leading left and right singular vectors.

    W ~ P_k L_k Q_k': row i scores |P_k[i, :]|^2, column j scores |Q_k[j, :]|^2, so either sums to k. Without `k`, k is
    the smallest that holds `energy` of the squared spectrum; at full rank every row of a square matrix scores 1.
    The scores of a weight with more than EXACT_SIZE rows and columns may differ from the exact ones by 1e-3 (a score
    is at most 1); `seed` and `module` decide the random start and nothing else.
    Source: the paper's importance; what decides k is DESIGN section 3. Raises PartialLoraError for a k above the rank,
    and for a weight that is zero or not finite.
    """
    if weight.shape[0] < weight.shape[1]:
        columns, rows = svd(weight.T, module=module, seed=seed, k=k, energy=energy)
        return rows, columns
    weight = weight.detach()
    largest = float(weight.abs().max())
    if not 0 < largest < math.inf:
        raise PartialLoraError(f"importance=svd: {module or 'the weight'} is zero or not finite, so it has no spectrum")
    if k is not None and not 1 <= k <= weight.shape[1]:
        raise above_rank(k, module, weight)
    scores = None
    if weight.shape[1] > EXACT_SIZE:
        start = int(random_keys(1, mask_seed=seed, module=module, axis="svd")[0])
        scores = randomized(weight, torch.Generator().manual_seed(start), k=k, energy=energy)
    scores = exact(weight, k=k, energy=energy) if scores is None else scores
    if scores is None:
        raise above_rank(k, module, weight)
    return scores


def exact(weight: Tensor, *, k: int | None = None, energy: float = 0.9) -> Scores | None:
    """Leverage scores of W (m, n), m >= n, from the eigenvectors of W'W; None for a k above the rank.

    Q_k and L_k from the n x n matrix, then P_k = W Q_k / L_k: tens of times faster than the SVD of W, and in float64
    the squaring costs no digit that W has.
    """
    squares, right = torch.linalg.eigh(_lower_gram(weight))
    squares, right = squares.flip(0).clamp(min=0), right.flip(1)
    k = leading_rank(squares, energy) if k is None else k
    if squares[k - 1] <= 1e-14 * squares[0]:
        return None
    leading = right[:, :k] / squares[:k].sqrt()
    rows = [(part.double() @ leading).square().sum(1) for part in weight.split(4096)]
    return torch.cat(rows), right[:, :k].square().sum(1)


def _lower_gram(weight: Tensor, width: int = 512) -> Tensor:
    """The lower triangle of W'W in float64, all that eigh reads; few rows of W at a time are held in float64."""
    size = weight.shape[1]
    gram = torch.zeros(size, size, dtype=torch.float64, device=weight.device)
    for part in weight.split(4096):
        rows = part.double()
        for first in range(0, size, width):
            gram[first:, first : first + width] += rows[:, first:].T @ rows[:, first : first + width]
    return gram


def leading_rank(squares: Tensor, energy: float) -> int:
    """The smallest k whose k largest squared singular values (given from large to small) hold `energy` of them all."""
    held = squares.cumsum(0)
    return min(int((held < energy * held[-1]).sum()) + 1, len(squares))


def randomized(weight: Tensor, generator: torch.Generator, *, k: int | None, energy: float) -> Scores | None:
    """Leverage scores of W (m, n), m >= n, within 1e-3 of the exact ones, or None where the exact way is the better.

    Subspace iteration from a random start until the scores settle: how much is still to come is extrapolated from their
    last two changes, which shrink geometrically. The subspace has twice k dimensions or more, and as many as allowed
    where the scores settle too slowly. Without `k` it grows until half of it holds `energy` of the squared norm of W:
    what a subspace holds is never more than what as many singular vectors hold, so that much is proven. None where even
    WIDEST * n dimensions are too few or settle too slowly, and where rounding in float32 could decide k, or which of
    two directions is the k-th.
    Source: Halko, Martinsson and Tropp 2011 (arXiv 0909.4061), algorithms 4.4 and 5.1.
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    weight = (weight / weight.abs().max()).float()
    widest = int(WIDEST * weight.shape[1])
    wanted = energy * float(torch.linalg.vector_norm(weight, dtype=torch.float64) ** 2)
    width = FIRST_WIDTH if k is None else max(FIRST_WIDTH, oversampled(k))
    if width > widest:
        return None
    basis = torch.empty(weight.shape[1], 0, device=weight.device)
    while True:
        added = torch.randn(len(basis), width - basis.shape[1], generator=generator).to(weight.device)
        basis, settling, wider = torch.cat([basis, added], 1), Settling(), widest
        for step, (left, spectrum, right) in enumerate(_iterate(weight, basis)):
            held = spectrum.square().cumsum(0)
            rank = int((held < wanted).sum()) + 1 if k is None else k
            if oversampled(rank) > width:
                if step < 2:
                    continue
                if held[-1] + (widest // 2 - width) * spectrum[-1] ** 2 < wanted:
                    return None  # not even the widest could hold it: no later direction holds more than the last one
                wider = 2 * width
                break
            scores = left[:, :rank].square().sum(1), right[:, :rank].square().sum(1)
            settling.see(rank, scores)
            if settling.hopeless(ITERATIONS - step):
                break
            if settling.done():
                near = k is None and (held[max(rank - 2, 0) : rank] - wanted).abs().min() < 1e-6 * wanted
                if near or spectrum[rank - 1] - spectrum[rank] < 1e-5 * spectrum[0]:
                    return None
                return scores[0].double(), scores[1].double()
        if width == widest:
            return None
        basis, width = right, min(wider, widest)


def oversampled(k: int) -> int:
    """Dimensions of the subspace in which k are looked for: they settle as (s_2k / s_k)^2 to the number of steps."""
    return 2 * k + 16


def _iterate(weight: Tensor, basis: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Left vectors (m, l), singular values (l,) and right vectors (n, l) of W seen in ever better subspaces.

    Orthogonal again after either product, or float32 would keep the strongest direction alone.
    """
    for _ in range(ITERATIONS):
        left, _ = torch.linalg.qr(weight @ basis)
        basis, small = torch.linalg.qr(weight.T @ left)  # W ~ left left' W = left small' basis'
        inner_right, spectrum, inner_left = torch.linalg.svd(small.double())
        yield left @ inner_left.T.float(), spectrum, basis @ inner_right.float()


class Settling:
    """How far a sequence of scores still has to go, if its changes shrink as the last two did."""

    def __init__(self) -> None:
        self._last: tuple[int, Scores] | None = None
        self._changes: list[float] = []

    def see(self, rank: int, scores: Scores) -> None:
        if self._last is not None and self._last[0] == rank:
            pairs = zip(scores, self._last[1], strict=True)
            self._changes.append(max(float((one - other).abs().max()) for one, other in pairs))
        else:
            self._changes = []
        self._last = rank, scores

    def left(self, steps: int = 0) -> float:
        """An estimate of what would still change after so many further steps; infinite where nothing tells."""
        if len(self._changes) < 2:
            return math.inf
        before, change = self._changes[-2:]
        if change <= 1e-7:
            return 0.0
        rate = change / before
        return change * rate ** (steps + 1) / (1 - rate) if rate < 1 else math.inf

    def done(self) -> bool:
        return self.left() <= TOLERANCE

    def hopeless(self, steps: int) -> bool:
        """Whether so many further steps will not do: said only once the rate can be trusted."""
        return len(self._changes) > 3 and self.left(steps) > 10 * TOLERANCE


def above_rank(k: int | None, module: str, weight: Tensor) -> PartialLoraError:
    return PartialLoraError(
        f"importance.k={k}: expected 1 to the rank of {module or 'the weight'} {tuple(weight.shape)}"
    )


# --- Importance that takes examples to see: what the loss, or what enters a module, says about its rows and columns

Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]


def snip(
    model: nn.Module, modules: Mapping[str, nn.Linear], batches: Sequence[Batch], *, loss: Loss, seed: int = 0
) -> dict[str, Scores]:
    """How much the loss hangs on each entry, |W * dL/dW|, summed over the row (column).

    L is the mean loss of all examples and the absolute value is taken of its gradient, so gradients are first summed
    over the batches: one copy of the modules' weights in float32 is held, and the gradients of one batch. Weights are
    as pre-trained, where the source draws them anew.
    Source: SNIP, Lee, Ajanthan and Torr 2019 (arXiv 1810.02340), the connection sensitivity of section 4.1, without its
    division by the sum of all entries.
    Raises PartialLoraError for a module that the loss does not depend on.
    """
    gradients = mean_gradients(model, modules, batches, loss)
    scores = {}
    for name, gradient in gradients.items():
        entries = (modules[name].weight.detach().to(gradient.dtype) * gradient).abs()
        scores[name] = entries.sum(1, dtype=torch.float64), entries.sum(0, dtype=torch.float64)
    return scores


def mean_gradients(
    model: nn.Module, modules: Mapping[str, nn.Linear], batches: Sequence[Batch], loss: Loss
) -> dict[str, Tensor]:
    """The gradient of the mean loss of all examples for the weight of each module, in float32 or better."""
    total = sum(map(examples, batches))
    sums: dict[str, Tensor] = {}
    with lent(model, modules):
        for batch in batches:
            for name, gradient in gradients(model, modules, batch, loss).items():
                share = gradient.to(precise(gradient)) * (examples(batch) / total)
                sums[name] = sums[name].add_(share) if name in sums else share
    return {name: sums[name] for name in modules}


def gradients(model: nn.Module, modules: Mapping[str, nn.Linear], batch: Batch, loss: Loss) -> dict[str, Tensor]:
    """The gradient of the loss of one batch for the weight of each module; for use within `lent`."""
    with torch.enable_grad():
        value = loss(model, on_device_of(model, batch))
        weights = [module.weight for module in modules.values()]
        found = torch.autograd.grad(value, weights, allow_unused=True) if value.requires_grad else [None] * len(weights)
    for name, gradient in zip(modules, found, strict=True):
        if gradient is None:
            raise PartialLoraError(f"importance: the loss does not depend on the weight of {name}; leave it out")
    return dict(zip(modules, found, strict=True))


def activation(
    model: nn.Module, modules: Mapping[str, nn.Linear], batches: Sequence[Batch], *, loss: Loss, seed: int = 0
) -> dict[str, Scores]:
    """How much each entry carries, |W_ij| * |x_j|, summed over the row (column).

    |x_j| is the norm of input feature j over all tokens of all examples. Tokens that the batch's attention_mask (batch,
    tokens) leaves out do not count, wherever a module's input has one row a token; in an encoder-decoder, where the
    mask is of the encoder alone, all tokens count. The source compares entries within a row and needs no sum; here a
    whole row or column goes, and like snip's, the scores of entries that go together add up.
    Source: Wanda, Sun, Liu, Bair and Kolter 2024 (arXiv 2306.11695), equation 1. `loss` decides how the model is run.
    Raises PartialLoraError for a module that no input reaches.
    """
    squares: dict[str, Tensor] = {}
    masks: list[Tensor | None] = [None]

    def see(module: nn.Module, args: tuple, kwargs: dict, name: str) -> None:
        entering = (args or tuple(kwargs.values()))[0]
        tokens = counted(entering, masks[0]).float().square().sum(0, dtype=torch.float64)
        squares[name] = squares.get(name, 0) + tokens

    hooks = [
        module.register_forward_pre_hook(partial(see, name=name), with_kwargs=True) for name, module in modules.items()
    ]
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    try:
        with lent(model), torch.no_grad():
            for batch in batches:
                masks[0] = None if both else batch.get("attention_mask")
                loss(model, on_device_of(model, batch))
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


def counted(entering: Tensor, mask: Tensor | None) -> Tensor:
    """The tokens (tokens, features) of a module's input that no mask leaves out."""
    flat = entering.detach().reshape(-1, entering.shape[-1])
    if mask is None or mask.ndim != 2 or entering.shape[:-1] not in (mask.shape, (mask.numel(),)):
        return flat
    return flat[mask.flatten().to(flat.device) != 0]


def task_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own loss where it gives one, else the mean cross entropy of its logits (batch, classes)."""
    known = inspect.signature(model.forward).parameters.values()
    takes_labels = any(one.name == "labels" or one.kind is inspect.Parameter.VAR_KEYWORD for one in known)
    output = model(**{name: value for name, value in batch.items() if takes_labels or name != "labels"})
    own = getattr(output, "loss", None)
    if own is not None:
        return own
    logits, labels = getattr(output, "logits", output), batch.get("labels")
    if not isinstance(logits, Tensor) or labels is None or labels.is_floating_point() or logits.ndim != 2:
        raise PartialLoraError(
            f"importance: {type(model).__name__} gives no loss, and none can be made of what it gives; pass `loss`"
        )
    return functional.cross_entropy(logits.float(), labels)


@contextmanager
def lent(model: nn.Module, trained: Mapping[str, nn.Linear] | None = None) -> Iterator[None]:
    """Dropout off, and gradients for the weights of these modules alone, for as long as the block lasts.

    A classifier of transformers that computes a loss writes down of what type; that is put back too.
    """
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    flags = [(module, module.training) for module in model.modules()]
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    try:
        for parameter, _ in trains:
            parameter.requires_grad_(False)
        for module in (trained or {}).values():
            module.weight.requires_grad_(True)
        yield
    finally:
        for parameter, required in trains:
            parameter.requires_grad_(required)
        for module, training in flags:
            module.training = training
        if getattr(config, "problem_type", None) != problem:
            config.problem_type = problem


def examples(batch: Batch) -> int:
    """How many examples a batch holds."""
    return len(batch["labels"] if "labels" in batch else next(iter(batch.values())))


def on_device_of(model: nn.Module, batch: Batch) -> Batch:
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in batch.items()}


def precise(tensor: Tensor) -> torch.dtype:
    """float32, or the tensor's own type where that is better."""
    return torch.promote_types(tensor.dtype, torch.float32)


# --- Iterative magnitude pruning: importance by how long a row or column outlasts the others while the model trains

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


logger = logging.getLogger(__name__)


def magnitude(weight: Tensor, *, module: str = "", seed: int = 0) -> Scores:
    """Squared norms of the rows and of the columns: the control that looks at size alone."""
    squares = weight.detach().double().square()
    return squares.sum(1), squares.sum(0)


def random(weight: Tensor, *, module: str = "", seed: int = 0) -> Scores:
    """An order drawn at random: the control that looks at nothing.

    The rows (columns) that score highest are those that a random mask of the same seed, module and axis keeps.
    """
    rows, columns = weight.shape
    return _drawn(rows, seed, module, "rows"), _drawn(columns, seed, module, "columns")


def _drawn(size: int, seed: int, module: str, axis: str) -> Tensor:
    """size for the smallest key, down to 1 for the largest: keys have more digits than a float64 holds."""
    order = np.argsort(random_keys(size, mask_seed=seed, module=module, axis=axis), kind="stable")
    scores = torch.empty(size, dtype=torch.float64)
    scores[torch.from_numpy(order)] = torch.arange(size, 0, -1, dtype=torch.float64)
    return scores


MEASURES: dict[str, Callable[..., Scores]] = {"svd": svd, "magnitude": magnitude, "random": random}
NEEDS_DATA: dict[str, Callable[..., dict[str, Scores]]] = {"snip": snip, "imp": imp, "activation": activation}
# The keys of the group `importance` that each measure takes.
OPTIONS = {
    "svd": ("k", "energy"),
    "magnitude": (),
    "random": (),
    "snip": (),
    "imp": ("rounds", "fraction", "steps", "learning_rate"),
    "activation": (),
}

Importance = str | Callable[..., Scores] | Mapping[str, Scores]


def scores_of(module: str, weight: Tensor, importance: Importance, *, seed: int, options: Mapping) -> Scores:
    """Row scores (m,) and column scores (n,) of a module's weight (m, n), on the CPU.

    importance: a measure by name or as a function, or the scores themselves, {module: (rows, columns)}. Raises
    PartialLoraError, naming the module, for scores that are missing, of another shape or not finite.
    """
    if isinstance(importance, Mapping):
        if module not in importance:
            raise PartialLoraError(f"importance: expected scores of {module}, found none")
        rows, columns = importance[module]
    else:
        measure = MEASURES[name_of(importance)] if isinstance(importance, str) else importance
        rows, columns = measure(weight.detach(), module=module, seed=seed, **options)
    return _checked(module, weight, rows, columns)


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
    """Row scores (m,) and column scores (n,) of each module's weight (m, n) by a measure that needs data, on the CPU.

    name: a key of NEEDS_DATA. model: with a head for the task; given back bit for bit. modules: those of the model that
    are scored, by full name. batches: the fit draw; each holds the model's inputs by name and "labels" (batch,).
    loss: `loss(model, batch) -> scalar`, the mean over the batch; by default the model's own, else cross entropy.
    Raises PartialLoraError where there is nothing to score by, and, naming the module, for scores that are not finite.
    """
    if name not in NEEDS_DATA:
        raise PartialLoraError(f"importance={name}: expected one of {', '.join(NEEDS_DATA)}, which need data")
    if not batches:
        raise PartialLoraError(f"importance={name}: the fit draw is empty, expected at least 1 example")
    found = NEEDS_DATA[name](model, modules, batches, loss=loss or task_loss, seed=seed, **(options or {}))
    scores = {module: _checked(module, modules[module].weight, *pair) for module, pair in found.items()}
    for module, axes in scores.items():
        if any(len(axis) > 1 and (axis == axis[0]).all() for axis in axes):
            logger.warning(
                "importance=%s: all rows or all columns of %s score alike: it does not rank them", name, module
            )
    return scores


def _checked(module: str, weight: Tensor, rows: object, columns: object) -> Scores:
    rows, columns = torch.as_tensor(rows).detach().cpu(), torch.as_tensor(columns).detach().cpu()
    if (rows.shape, columns.shape) != (weight.shape[:1], weight.shape[1:]):
        raise PartialLoraError(
            f"importance: expected scores of {tuple(weight.shape)} rows and columns of {module}, "
            f"found {tuple(rows.shape)} and {tuple(columns.shape)}"
        )
    if not (torch.isfinite(rows).all() and torch.isfinite(columns).all()):
        raise PartialLoraError(f"importance: the scores of {module} are not finite")
    return rows, columns


def name_of(importance: Importance) -> str:
    """What a record says of an importance. Raises PartialLoraError for a name that no weight-only measure has."""
    if isinstance(importance, Mapping):
        return "given"
    if callable(importance):
        return getattr(importance, "__qualname__", type(importance).__qualname__)
    if importance in NEEDS_DATA:
        raise PartialLoraError(
            f"importance={importance}: needs examples, which are not at hand here; give what data_scores returns"
        )
    if importance not in MEASURES:
        raise PartialLoraError(f"importance={importance}: expected one of {', '.join(MEASURES)}")
    return importance
