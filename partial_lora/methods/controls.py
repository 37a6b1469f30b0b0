"""A control: a smaller dense adapter in place of a sparse one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import torch
from peft import LoraConfig, PeftModel, ShiraConfig, get_peft_model
from peft.tuners.shira import ShiraLayer
from peft.tuners.shira.layer import Linear
from torch import Tensor, nn
from torch.nn import functional as F

from partial_lora.adapter import PartialLoraConfig
from partial_lora.calibration.budget import TOLERANCE, Shapes, scaled
from partial_lora.errors import PartialLoraError
from partial_lora.masks import AXES, Sparsity, random_keys
from partial_lora.methods.setting import Setting, calibrated

_MOVES = (0, 1, -1, 2, -2)  # how far the rank units of a size may be from their proportional share


@calibrated
def low_rank(model: nn.Module, setting: Setting) -> PeftModel:
    """Control: dense LoRA of as low a rank as gives it the trainable parameters of `partial`, to within 1 %.

    Ranks of two modules differ by at most a few, and alpha / rank is everywhere what it is for the others. Where rank 1
    on every module would be too much, fewer modules have it, drawn by `mask_seed`. Raises PartialLoraError, "not
    applicable", where no ranks meet the budget.
    """
    ranks = ranks_within(setting.budget(), setting.shapes, setting.mask_seed)
    adapted = {module: rank for module, rank in ranks.items() if rank}
    scaling, usual = setting.alpha / setting.rank, Counter(adapted.values()).most_common(1)[0][0]
    exact = {module: f"^{re.escape(module)}" for module in adapted}  # as PEFT matches patterns: the end of a name
    unusual = {exact[module]: rank for module, rank in adapted.items() if rank != usual}
    config = LoraConfig(
        **setting.lora()
        | {
            "r": usual,
            "lora_alpha": scaling * usual,
            "target_modules": list(adapted),
            "rank_pattern": unusual,
            "alpha_pattern": {pattern: scaling * rank for pattern, rank in unusual.items()},
        }
    )
    return get_peft_model(model, config)


def ranks_within(budget: int, shapes: Shapes, seed: int) -> dict[str, int]:
    """A rank for every module of W (out, in), 0 for none, so that rank * (out + in) sums to the budget within 1 %.

    Every size out + in has close to its proportional share of rank units, and modules of one size differ by at most
    one; which have the one more is drawn by the seed.
    """
    sizes = {module: m + n for module, (m, n) in shapes.items()}
    even = budget / sum(sizes.values())
    groups = {size: [module for module in sizes if sizes[module] == size] for size in sorted(set(sizes.values()))}
    shares = [even * len(group) for group in groups.values()]

    def missed(units: tuple[int, ...]) -> int:
        return abs(budget - sum(size * count for size, count in zip(groups, units, strict=True)))

    choices = [sorted({max(0, round(share) + move) for move in _MOVES}) for share in shares]
    within = [units for units in product(*choices) if missed(units) <= TOLERANCE * budget and any(units)]
    if not within:
        raise PartialLoraError(
            f"method=low_rank: not applicable: no ranks give a dense adapter within 1 % of {budget:,} trainable "
            f"parameters; one rank of a module has at least {min(groups):,}"
        )
    apart = {units: sum(abs(count - share) for count, share in zip(units, shares, strict=True)) for units in within}
    chosen = min(within, key=lambda units: (round(apart[units], 6), missed(units)))
    ranks = {}
    for group, count in zip(groups.values(), chosen, strict=True):
        keys = random_keys(len(group), mask_seed=seed, module=f"{len(group)}/{sizes[group[0]]}", axis="ranks")
        extra = set(np.argsort(keys)[: count % len(group)].tolist())
        ranks |= {module: count // len(group) + (place in extra) for place, module in enumerate(group)}
    return {module: ranks[module] for module in shapes}


# --- A control: does it matter how much each module keeps?


@calibrated
def uniform(model: nn.Module, setting: Setting) -> PeftModel:
    """Control: one sparsity for every module and axis, with the trainable parameters of `partial`.

    Modules of one shape gain a row or column at the same sparsity; where the budget does not reach for all of them, the
    first in the model's order have one more.
    """
    alike = {module: dict.fromkeys(AXES, 0.5) for module in setting.sparsity}  # any one sparsity: it is scaled
    sparsity = scaled(alike, *setting.units(), setting.budget())
    return get_peft_model(model, PartialLoraConfig(**setting.masked(), sparsity=sparsity))


# --- A control: does it matter which module keeps how much?


@calibrated
def shuffled(model: nn.Module, setting: Setting) -> PeftModel:
    """Control: the sparsities of `partial`, dealt out again among modules of the same shape, at its parameters."""
    given = permuted(setting.sparsity, setting.shapes, setting.mask_seed)
    sparsity = scaled(given, *setting.units(), setting.budget())
    return get_peft_model(model, PartialLoraConfig(**setting.masked(), sparsity=sparsity))


def permuted(sparsity: Sparsity, shapes: Shapes, seed: int) -> dict[str, Mapping[str, float]]:
    """The sparsities of both axes in a random order, drawn by the seed, among modules of the same shape (out, in).

    A module that is the only one of its shape keeps its own, and any other may: one of its shape, on average.
    """
    found = {}
    for shape in dict.fromkeys(shapes[module] for module in sparsity):
        alike = [module for module in sparsity if shapes[module] == shape]
        keys = random_keys(len(alike), mask_seed=seed, module=f"{shape[0]}x{shape[1]}", axis="modules")
        found |= {module: sparsity[alike[other]] for module, other in zip(alike, np.argsort(keys), strict=True)}
    return {module: found[module] for module in sparsity}


# --- A control: what if the modules keep most that calibration lets keep least?


@calibrated
def inverted(model: nn.Module, setting: Setting) -> PeftModel:
    """Control: the densities of `partial` in reverse order over the modules, scaled to its trainable parameters."""
    sparsity = scaled(reversed_ranks(setting.sparsity), *setting.units(), setting.budget())
    return get_peft_model(model, PartialLoraConfig(**setting.masked(), sparsity=sparsity))


def reversed_ranks(sparsity: Sparsity) -> dict[str, dict[str, float]]:
    """On each axis, the highest of all modules' sparsities for the module that has the lowest, and so on.

    Modules that were equal stay equal: they share the mean of what their ranks would get.
    """
    found: dict[str, dict[str, float]] = {module: {} for module in sparsity}
    for axis in AXES:
        values = np.array([axes[axis] for axes in sparsity.values()])
        order = np.argsort(values, kind="stable")
        given = np.empty_like(values)
        given[order] = values[order][::-1]
        for value in np.unique(values):
            given[values == value] = given[values == value].mean()
        for module, share in zip(sparsity, given, strict=True):
            found[module][axis] = float(share)
    return found


# --- Single entries of W itself as the adapter: PEFT's SHiRA (arXiv 2406.13175), with a number of entries for each

_ADAPTER = "default"


def train_entries(
    model: nn.Module, counts: Mapping[str, int], *, seed: int, modules_to_save: Sequence[str] | None = None
) -> PeftModel:
    """The model with `counts` {module's full name: number} of entries of W that train, drawn by the seed, from zero.

    Raises PartialLoraError for a module that has too few entries.
    """
    modules = {module: model.get_submodule(module) for module in counts}
    shapes = {module: (linear.out_features, linear.in_features) for module, linear in modules.items()}
    rank = max(-(-count // sum(shapes[module])) for module, count in counts.items())
    for module, (m, n) in shapes.items():
        if rank * (m + n) > m * n:
            raise PartialLoraError(
                f"method=random_weights: not applicable: {module} has {m * n:,} weights, expected at least "
                f"{rank * (m + n):,}; lower method.rank or calibration.budget"
            )
    config = ShiraConfig(r=rank, target_modules=list(counts), modules_to_save=modules_to_save)
    config.mask_fn = _first  # which ones is decided below
    adapted = get_peft_model(model, config)
    for name, layer in adapted.get_base_model().named_modules():
        if isinstance(layer, ShiraLayer):
            _keep(layer, counts[name], seed=seed, module=name)
    return adapted


def _first(base: nn.Module, r: int, **more) -> Tensor:
    """As many entries of W as SHiRA has for r."""
    m, n = base.out_features, base.in_features
    mask = torch.zeros(m * n, dtype=torch.bool)
    mask[: r * (m + n)] = True
    return mask.view(m, n)


def _keep(layer: Linear, count: int, *, seed: int, module: str) -> None:
    """Leave `count` random entries of a layer's to train; those that the file is filled up with come after them."""
    room, width = layer.shira_weight[_ADAPTER].numel(), layer.in_features
    (drawn,) = random_keys(1, mask_seed=seed, module=module, axis="entries")
    places = np.random.default_rng(int(drawn)).choice(layer.out_features * width, room, replace=False)
    indices = torch.from_numpy(np.stack([places // width, places % width])).to(torch.int32)
    held = layer.shira_weight[_ADAPTER]
    layer.shira_indices[_ADAPTER] = indices.to(held.device)
    layer.shira_weight = _FilledUp({_ADAPTER: nn.Parameter(held.data[:count].clone())}, room)
    layer.__class__ = _Entries


class _Entries(Linear):
    """PEFT's layer, of which the first entries exist."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The change of W (out, in), sparse."""
        values = self.shira_weight[adapter]
        indices = self.shira_indices[adapter].to(values.device)[:, : len(values)]
        shape = (self.out_features, self.in_features)
        return torch.sparse_coo_tensor(indices, values * self.scaling[adapter], shape, check_invariants=False)


class _FilledUp(nn.ParameterDict):
    """The values of entries, which are `room` of them in a state dict; those that do not exist are zero there."""

    def __init__(self, values: Mapping[str, nn.Parameter], room: int) -> None:
        super().__init__(values)
        self._room = room

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, values in self.items():
            destination[prefix + name] = F.pad(destination[prefix + name], (0, self._room - len(values)))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *given) -> None:
        for name, values in self.items():
            if prefix + name in state_dict:
                state_dict[prefix + name] = state_dict[prefix + name][: len(values)]
        super()._load_from_state_dict(state_dict, prefix, *given)


# --- A control: is a low-rank adapter any better than random entries of the weights themselves?


@calibrated
def random_weights(model: nn.Module, setting: Setting) -> PeftModel:
    """Control: random entries of W itself train, in every module as many as `partial` has parameters there.

    There is no alpha and no dropout. Raises PartialLoraError, "not applicable", where a module has too few weights.
    """
    return train_entries(model, setting.counts(), seed=setting.mask_seed, modules_to_save=setting.whole() or None)
