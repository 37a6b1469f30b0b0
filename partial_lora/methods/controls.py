"""Controls as large as Partial-LoRA: each trains as many parameters and takes away one of its choices."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from peft import PeftModel, ShiraConfig, get_peft_model
from peft.tuners.shira import ShiraLayer
from peft.tuners.shira.layer import Linear
from torch import Tensor, nn
from torch.nn import functional as F

from partial_lora.adapter import PartialLoraConfig
from partial_lora.budget import Shapes, even_sparsity, scaled
from partial_lora.errors import PartialLoraError
from partial_lora.masks import AXES, Sparsity, random_keys
from partial_lora.methods.setting import Setting

# --- Other sparsities of the modules, at the same parameters in all.


def uniform(model: nn.Module, setting: Setting) -> PeftModel:
    """One sparsity for every module and axis, and nothing calibrated. Does it matter how much each module keeps?

    `entries` draws single entries of both factors so, as `PartialLoraConfig(granularity="element", sparsity=0.87)` in
    Python. `lori` draws those of B alone, under an A that stays as it is drawn: LoRI (Zhang et al. 2025, arXiv
    2504.07448), whose entries are the largest after a first training.

    Modules of one shape gain a row, column or entry at the same sparsity; where the budget is too small for all of
    them, the first in the model's order gain it.
    """
    even = even_sparsity(*setting.units(), setting.budget())
    return get_peft_model(model, PartialLoraConfig(**setting.randomly_masked(even)))


def shuffled(model: nn.Module, setting: Setting) -> PeftModel:
    """Control: the sparsities of `partial`, permuted among modules of one shape. Does it matter whose they are?"""
    return _masked_at_budget(model, setting, permuted(setting.sparsity, setting.shapes, setting.mask_seed))


def inverted(model: nn.Module, setting: Setting) -> PeftModel:
    """Control: the densities of `partial` in reverse order over the modules.

    The modules that calibration lets keep least keep most.
    """
    return _masked_at_budget(model, setting, reversed_ranks(setting.sparsity))


def _masked_at_budget(model: nn.Module, setting: Setting, sparsity: Sparsity) -> PeftModel:
    at_budget = scaled(sparsity, *setting.units(), setting.budget())
    return get_peft_model(model, PartialLoraConfig(**setting.randomly_masked(at_budget)))


def permuted(sparsity: Sparsity, shapes: Shapes, seed: int) -> dict[str, Mapping[str, float]]:
    """Permute the sparsities, of both axes together, among modules of one shape (out, in), at random by the seed.

    A module that is the only one of its shape keeps its own; in any other shape, one module does so on average.
    """
    dealt = {}
    for shape in dict.fromkeys(shapes[module] for module in sparsity):
        group = [module for module in sparsity if shapes[module] == shape]
        keys = random_keys(len(group), mask_seed=seed, module=f"{shape[0]}x{shape[1]}", axis="modules")
        dealt |= {module: sparsity[group[giver]] for module, giver in zip(group, np.argsort(keys), strict=True)}
    return {module: dealt[module] for module in sparsity}


def reversed_ranks(sparsity: Sparsity) -> dict[str, dict[str, float]]:
    """Give, on each axis, the highest sparsity to the module that has the lowest, and so on.

    Modules that were equal stay equal: they share the mean of what their ranks would get.
    """
    swapped: dict[str, dict[str, float]] = {module: {} for module in sparsity}
    for axis in AXES:
        values = np.array([axes[axis] for axes in sparsity.values()])
        order = np.argsort(values, kind="stable")
        reverse = np.empty_like(values)
        reverse[order] = values[order][::-1]
        for value in np.unique(values):
            reverse[values == value] = reverse[values == value].mean()
        for module, share in zip(sparsity, reverse, strict=True):
            swapped[module][axis] = float(share)
    return swapped


# --- Random entries of W itself in place of a low-rank adapter: PEFT's SHiRA (arXiv 2406.13175).

_ADAPTER = "default"


def random_weights(model: nn.Module, setting: Setting) -> PeftModel:
    """Control: train random entries of W itself, in every module as many as `partial` trains parameters there.

    SHiRA has rank * (out + in) entries in every module; here each has its own number. There is no alpha and no dropout.
    Raises PartialLoraError, "not applicable", where a module has too few weights.
    """
    counts = setting.counts()
    shapes = {module: setting.shapes[module] for module in counts}
    rank = max(-(-count // sum(shapes[module])) for module, count in counts.items())
    for module, (m, n) in shapes.items():
        if rank * (m + n) > m * n:
            raise PartialLoraError(
                f"method=random_weights: not applicable: {module} has {m * n:,} weights, expected at least "
                f"{rank * (m + n):,}; lower method.rank or calibration.budget"
            )
    config = ShiraConfig(r=rank, target_modules=list(counts), modules_to_save=setting.whole() or None)
    config.mask_fn = _first_entries  # `_draw_entries` replaces them
    adapted = get_peft_model(model, config)
    for name, layer in adapted.get_base_model().named_modules():
        if isinstance(layer, ShiraLayer):
            _draw_entries(layer, counts[name], seed=setting.mask_seed, module=name)
    return adapted


def _first_entries(base: nn.Module, r: int, **more) -> Tensor:
    """Return a mask of as many entries of W as SHiRA has for r."""
    m, n = base.out_features, base.in_features
    mask = torch.zeros(m * n, dtype=torch.bool)
    mask[: r * (m + n)] = True
    return mask.view(m, n)


def _draw_entries(layer: Linear, count: int, *, seed: int, module: str) -> None:
    """Let `count` random entries of a layer train; the entries after them only pad the saved file."""
    weight, width = layer.shira_weight[_ADAPTER], layer.in_features
    (drawn,) = random_keys(1, mask_seed=seed, module=module, axis="entries")
    places = np.random.default_rng(int(drawn)).choice(layer.out_features * width, weight.numel(), replace=False)
    indices = torch.from_numpy(np.stack([places // width, places % width])).to(torch.int32)
    layer.shira_indices[_ADAPTER] = indices.to(weight.device)
    layer.shira_weight = PaddedEntries({_ADAPTER: nn.Parameter(weight.data[:count].clone())}, weight.numel())
    layer.__class__ = _EntriesLinear


class _EntriesLinear(Linear):
    """PEFT's layer with only the first of its entries."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the change of W (out, in), sparse."""
        values = self.shira_weight[adapter]
        indices = self.shira_indices[adapter].to(values.device)[:, : len(values)]
        shape = (self.out_features, self.in_features)
        return torch.sparse_coo_tensor(indices, values * self.scaling[adapter], shape, check_invariants=False)


class PaddedEntries(nn.ParameterDict):
    """The values of entries, padded in a state dict with zeros to the `length` that plain SHiRA expects."""

    def __init__(self, values: Mapping[str, nn.Parameter], length: int) -> None:
        super().__init__(values)
        self._length = length

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, values in self.items():
            destination[prefix + name] = F.pad(destination[prefix + name], (0, self._length - len(values)))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *arguments) -> None:
        for name, values in self.items():
            if prefix + name in state_dict:
                state_dict[prefix + name] = state_dict[prefix + name][: len(values)]
        super()._load_from_state_dict(state_dict, prefix, *arguments)
