"""Single entries of W itself as the adapter: PEFT's SHiRA (arXiv 2406.13175), with a number of entries for each module.

SHiRA trains r * (out + in) entries of every module for one whole r. Here a module may have fewer. Only its own entries
exist as parameters; what is saved is SHiRA of the least r that has room for them, filled up with entries that are zero,
so that plain PEFT loads it, exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from peft import PeftModel, ShiraConfig, get_peft_model
from peft.tuners.shira import ShiraLayer
from peft.tuners.shira.layer import Linear
from torch import Tensor, nn
from torch.nn import functional as F

from partial_lora.errors import PartialLoraError
from partial_lora.masks import random_keys

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
