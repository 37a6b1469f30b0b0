"""The masked low-rank factors and the forward pass that uses them: only the kept entries exist as parameters.

For W (out × in), kept rows I and kept columns J, the adapter adds ``scaling * B A x`` where A (rank × in) is zero
outside the columns J and B (out × rank) is zero outside the rows I. Stored are A' (rank × |J|) and B' (|I| × rank).
"""

from __future__ import annotations

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn
from torch.nn import functional as F

from partial_lora.adapter.selection import ModuleMasks
from partial_lora.errors import PartialLoraError
from partial_lora.masks import Mask

COMPACT_DENSITY = 0.25
"""Up to this density, gathering the kept entries of the activations beats a product with the zero-filled factor."""


class MaskedFactor(nn.Module):
    """One low-rank factor of which only the slices kept by ``mask`` along ``axis`` are a parameter, the rest zero.

    ``kept`` is that parameter. Everyone else sees the whole factor: ``weight`` is the dense tensor with zeros where
    masked, and the state dict holds it under PEFT's own key, ``weight``. Writing into ``weight.data`` changes nothing.
    """

    axis: int  # of the dense tensor, along which it is masked

    def __init__(self, dense: nn.Parameter, mask: Mask) -> None:
        super().__init__()
        self.mask = mask
        # No buffer: DistributedDataParallel would send it every step, and a detour over the meta device would empty it.
        self._index = torch.tensor(mask.kept, device=dense.device)
        self.kept = nn.Parameter(self._gather(dense.detach()), requires_grad=dense.requires_grad)

    @property
    def full(self) -> bool:
        """Whether the mask keeps everything; the factor is then the one plain LoRA has, and treated alike."""
        return len(self.mask.kept) == self.mask.size

    @property
    def compact(self) -> bool:
        """Whether the forward pass gathers instead of multiplying zeros."""
        return self.mask.density <= COMPACT_DENSITY

    def index_on(self, device: torch.device) -> Tensor:
        """The kept indices on ``device``."""
        if self._index.device != device:
            self._index = torch.tensor(self.mask.kept, device=device)
        return self._index

    @property
    def weight(self) -> Tensor:
        """The dense factor, zero where masked; gradients reach ``kept`` through it."""
        if self.full:
            return self.kept
        index = self.index_on(self.kept.device)
        return self.kept.new_zeros(self._dense_shape()).index_copy(self.axis, index, self.kept)

    def forward(self, x: Tensor) -> Tensor:
        """The dense factor times x (..., inputs), as the linear layer it stands in for computes it."""
        return F.linear(x, self.weight)

    def _gather(self, dense: Tensor) -> Tensor:
        return dense.index_select(self.axis, self.index_on(dense.device))

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        weight = self.weight
        destination[prefix + "weight"] = weight if keep_vars else weight.detach()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        own = {}
        dense = state_dict.get(prefix + "weight")
        if dense is None:
            missing_keys.append(prefix + "weight")
        elif dense.shape != (shape := self._dense_shape()):
            error_msgs.append(f"size mismatch for {prefix}weight: {tuple(dense.shape)} is not {tuple(shape)}")
        else:
            kept = self._gather(dense)
            # Zeros are no proof of the right mask, but values where this mask has none prove the wrong one.
            if not dense.is_meta and dense.count_nonzero() != kept.count_nonzero():
                raise PartialLoraError(
                    f"{prefix}weight has values outside this adapter's mask: it was trained under another mask or"
                    " none, load it with PartialLoraConfig.from_pretrained of its own folder."
                )
            own[prefix + "kept"] = kept
        super()._load_from_state_dict(own, prefix, local_metadata, strict, [], unexpected_keys, error_msgs)

    def _dense_shape(self) -> torch.Size:
        shape = list(self.kept.shape)
        shape[self.axis] = self.mask.size
        return torch.Size(shape)

    def extra_repr(self) -> str:
        return f"{tuple(self._dense_shape())}, kept={len(self.mask.kept)} of {self.mask.size} {self.axis_name}"


class KeptColumns(MaskedFactor):
    """A (rank × in) of which the columns J exist, as ``kept`` (rank × |J|)."""

    axis = 1
    axis_name = "columns"

    def project(self, x: Tensor, dropout: nn.Module) -> Tensor:
        """A x for x (..., in): (..., rank). Only the kept features of x are kept for the backward pass, if few."""
        if self.compact:
            return F.linear(dropout(x.index_select(-1, self.index_on(x.device))), self.kept)
        return F.linear(dropout(x), self.weight)


class KeptRows(MaskedFactor):
    """B (out × rank) of which the rows I exist, as ``kept`` (|I| × rank)."""

    axis = 0
    axis_name = "rows"

    def add_to(self, result: Tensor, low: Tensor, scaling: float) -> Tensor:
        """result + scaling * B low for result (..., out) and low (..., rank); only the features I change."""
        if self.full:
            return result + F.linear(low, self.kept) * scaling  # PEFT's order of operations: equal to the last bit
        low = low * scaling  # the narrow one of the two
        if self.compact:
            change = F.linear(low, self.kept)
            dtype = torch.promote_types(result.dtype, change.dtype)  # as the sum below would
            return result.to(dtype).index_add(-1, self.index_on(change.device), change.to(dtype))
        return result + F.linear(low, self.weight)


class PartialLoraVariant(LoraVariant):
    """How PEFT's own LoRA layers, quantised ones included, run and merge a masked adapter."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs) -> None:
        """Called when a layer that is masked already gets its adapter built again, which would make it dense."""
        raise PartialLoraError(
            f"adapter {adapter_name!r} of {module.get_base_layer()} was built again: delete it first."
        )

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs) -> Tensor:
        """The base layer's ``result`` (..., out) plus scaling * B A dropout(x), for x (..., in)."""
        low = module.lora_A[active_adapter].project(x, module.lora_dropout[active_adapter])
        return module.lora_B[active_adapter].add_to(result, low, module.scaling[active_adapter])

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """A new tensor: the base weight with the adapter in it."""
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        """Put the adapter into the base weight in place."""
        orig_weight.data += module.get_delta_weight(active_adapter)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """A new tensor: the base weight with the adapter taken out again."""
        return orig_weight.data - module.get_delta_weight(active_adapter).to(orig_weight.dtype)


def mask_layer(layer: LoraLayer, adapter_name: str, masks: ModuleMasks) -> None:
    """Keep only what ``masks`` keeps of the adapter PEFT has just put into ``layer``; its values stay as drawn."""
    layer.lora_A[adapter_name] = KeptColumns(layer.lora_A[adapter_name].weight, masks.columns)
    layer.lora_B[adapter_name] = KeptRows(layer.lora_B[adapter_name].weight, masks.rows)
    layer.lora_variant[adapter_name] = PartialLoraVariant()
