"""The masked low-rank factors: modules whose one parameter holds only the kept entries.

For W (out × in), kept rows I and kept columns J, A (rank × in) is zero outside the columns J and B (out × rank) is zero
outside the rows I; only A' (rank × |J|) and B' (|I| × rank) are stored. Kept single entries are stored as a column
(kept × 1), so that optimizers and schedules that tell weights from biases by their dimensions take them for weights.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from partial_lora.adapter.dense_view import read_only
from partial_lora.adapter.sharding import entry_like, gathered, is_sharded, sharded_like, whole
from partial_lora.errors import PartialLoraError
from partial_lora.masks import GATHER_DENSITY, Mask, TiedMask

SCATTER_DENSITY_PER_RANK = 0.01
"""Up to a density of this times the rank, adding to kept features beats adding a zero-filled product to all."""

PARTS = {"weight": "kept", "bias": "kept_bias"}
"""Names of what other code sees of a factor, and of the parameters that hold the kept part of it."""

_CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}  # by the dimensions of the weight


class MaskedFactor(nn.Module):
    """A low-rank factor that holds only what its ``mask`` keeps, as the parameter ``kept``; the rest is zero.

    Other code sees the whole factor: ``weight`` is the dense tensor with zeros where masked, and the state dict holds
    it under PEFT's own key, ``weight``. A state dict with ``kept``, the parameter's own name, loads as well. Where B
    has a bias (``lora_bias``), it is one more column: ``kept_bias`` holds that of kept rows, and ``bias`` is the whole.

    Args:
        dense: the factor as PEFT has drawn it, a linear layer or a convolution.
        mask: what stays: rows of B or columns of A, or entries in row-major order.
        entries: True where the mask is over entries.
        multiple: what ``kept`` is multiplied by in the whole factor. In a product it joins the scaling.

    Where the mask keeps everything (``full``), this is plain LoRA's factor and is computed as in PEFT.
    """

    axis_name: str
    axis: int  # the weight's axis of W's own features; its other axis is the rank
    multiple: float

    def __init__(self, dense: nn.Module, mask: Mask, *, entries: bool, multiple: float = 1.0) -> None:
        super().__init__()
        weight, bias, groups, is_convolution = dense.weight, dense.bias, 1, not isinstance(dense, nn.Linear)
        if is_convolution:
            groups = dense.groups
            settings = {name: getattr(dense, name) for name in ("stride", "padding", "dilation", "groups")}
            apply_weight = partial(_CONVOLUTIONS[weight.dim()], **settings)
        else:
            apply_weight = F.linear
            self._set(out_features=weight.shape[0], in_features=weight.shape[1])  # as of the layer that it replaces
        self._set(
            mask=mask,
            entries=entries,
            multiple=multiple,
            full=len(mask.kept) == mask.size,
            shape=weight.shape,
            rank=weight.shape[1 - self.axis] * groups,
            is_convolution=is_convolution,
            channels=1 - weight.dim() if is_convolution else -1,  # of an activation, with a batch or without
            in_groups=groups > 1,  # a gather of features would mix groups up
            _apply_weight=apply_weight,
        )
        self._find_places()
        self._move_indices(weight.device)
        self.kept = nn.Parameter(self.keep(weight.detach()), requires_grad=weight.requires_grad)
        kept = None if bias is None else nn.Parameter(self.keep(bias.detach()), requires_grad=bias.requires_grad)
        self.register_parameter("kept_bias", kept)

    def _set(self, **values: Any) -> None:
        """Set plain attributes: one by one, torch would first take each for a parameter, a buffer or a module."""
        vars(self).update(values)

    def _find_places(self) -> None:
        """Find what the mask keeps, in the forms in which products need it."""
        places = {"kept": self.mask.kept}
        if self.entries:
            places |= _within_features(self.mask.kept, self.shape, self.axis)
        if isinstance(self.mask, TiedMask):
            places |= _groups(self.mask)
        # Not in the forward pass: a compiler that reads them off the arrays there warns that these are read-only.
        touched = len(places["features" if self.entries else "kept"])
        self._set(_places=places, touched=touched, density=touched / self.shape[self.axis])

    def swap(self, mask: Mask, dense: Tensor, drawn: np.ndarray | None, bias: Tensor | None = None) -> None:
        """Take over another factor, of a mask that keeps as many, into the same tensors as far as their sizes agree.

        dense: the other factor, of this rank or padded to it. drawn: its values where it does not train. bias: its own.
        """
        self.mask = mask
        self._find_places()
        for name, index in self._indices.items():
            places = torch.tensor(self._places[name], device=index.device)
            self._indices[name] = index.copy_(places) if index.shape == places.shape else places
        dense = self.padded(self._unpadded(dense), self.rank).to(self.kept)
        self.kept.data.copy_(self._checked(dense, f"lora_{'BA'[self.axis]}"))
        if bias is not None:
            self.kept_bias.data.copy_(self._checked(bias.to(self.kept_bias), "the bias of lora_B"))

    @property
    def widens(self) -> bool:
        """True where units of zeros can be added to the rank."""
        return not (self.entries or self.in_groups)

    def widen(self, rank: int) -> MaskedFactor:
        """Add units of zeros to the factor, up to ``rank``, and return it."""
        if rank == self.rank:
            return self
        if rank < self.rank or not self.widens:
            raise PartialLoraError(f"target_rank={rank}: {self} cannot be padded to it; expected {self.rank}.")
        self.kept = nn.Parameter(self.padded(self.kept.data, rank), requires_grad=self.kept.requires_grad)
        self.rank, unit = rank, 1 - self.axis
        self.shape = torch.Size([rank if axis == unit else size for axis, size in enumerate(self.shape)])
        if not self.is_convolution:
            self.out_features, self.in_features = self.shape
        return self

    @property
    def gathers(self) -> bool:
        """True where products with activations take only the features that have kept entries; else they take all.

        Channels of a convolution are contiguous, so gathering them always pays.
        """
        if self.density == 1 or self.in_groups:
            return False
        return self.is_convolution or self.density <= GATHER_DENSITY

    @property
    def scatters(self) -> bool:
        """True where a product is added to an activation's kept features alone; else it is zero-filled for all."""
        return self.gathers and (self.is_convolution or self.density <= SCATTER_DENSITY_PER_RANK * self.rank)

    def _apply(self, *args, **kwargs) -> MaskedFactor:
        """Move the indices with the module: if they moved later, a compiler would see a change."""
        moved = super()._apply(*args, **kwargs)
        self._move_indices(self.kept.device)
        return moved

    def _move_indices(self, device: torch.device) -> None:
        # No buffers: DistributedDataParallel would send them every step, and a move over the meta device would empty
        # them.
        with torch.inference_mode(False):  # a tensor made inside inference mode could not serve training later
            self._set(_indices={name: torch.tensor(places, device=device) for name, places in self._places.items()})

    def _index(self, name: str, device: torch.device) -> Tensor:
        if self._indices[name].device != device:
            self._move_indices(device)
        return self._indices[name]

    def features_on(self, device: torch.device) -> Tensor:
        """Return the features of W that have kept entries, ascending, on ``device``."""
        return self._index("features" if self.entries else "kept", device)

    def keep(self, dense: Tensor) -> Tensor:
        """Return what the mask keeps of ``dense``, like the dense factor or its bias, in the form of ``kept``."""
        index = self._index("kept", dense.device)
        if self.entries:
            return dense.flatten().index_select(0, index).unsqueeze(1)
        return dense.index_select(self.axis, index)

    def fill(self, kept: Tensor) -> Tensor:
        """Return a factor or bias with ``kept`` where the mask keeps, zeros elsewhere; the inverse of `keep`."""
        if self.full:
            return kept.view(self.shape) if self.entries else kept
        index = self._index("kept", kept.device)
        if self.entries:
            return kept.new_zeros(self.shape.numel()).index_copy(0, index, kept.squeeze(1)).view(self.shape)
        shape = [*kept.shape]
        shape[self.axis] = self.shape[self.axis]
        return kept.new_zeros(shape).index_copy(self.axis, index, kept)

    def nearest(self, dense: Tensor) -> Tensor:
        """Return the values of ``kept`` that bring the factor nearest to ``dense``."""
        return self.keep(dense)

    def dense(self, kept: Tensor) -> Tensor:
        """Return the dense factor, or its bias, as other code sees it."""
        return self.fill(kept) if self.multiple == 1 else self.fill(kept * self.multiple)

    def padded(self, dense: Tensor, rank: int) -> Tensor:
        """Return a dense factor padded with units of zeros to ``rank``, as on disk."""
        missing = rank - dense.shape[1 - self.axis]
        if missing <= 0 or self.in_groups:  # whose rank is that of all modules
            return dense
        zeros = dense.new_zeros([missing if axis == 1 - self.axis else size for axis, size in enumerate(dense.shape)])
        return torch.cat([dense, zeros], dim=1 - self.axis)

    def _unpadded(self, dense: Tensor) -> Tensor:
        """Return a factor from disk without its units of zeros, if it has any; the inverse of `padded`."""
        unit = 1 - self.axis
        if dense.dim() != len(self.shape) or dense.shape[unit] <= self.shape[unit]:
            return dense
        factor, zeros = dense.split([self.shape[unit], dense.shape[unit] - self.shape[unit]], dim=unit)
        return dense if not zeros.is_meta and zeros.any() else factor

    @property
    def weight(self) -> Tensor:
        """The dense factor, zero where masked; gradients reach ``kept`` through it.

        Writing into it raises. Assigning a dense factor with other values makes ``kept`` a new parameter with what the
        mask keeps. All processes have to read a sharded factor (FSDP2, ZeRO) together.
        """
        dense = self.dense(whole(self.kept))
        # With a full mask this is a view of `kept`: nothing written is lost.
        return dense if self.full and self.multiple == 1 else read_only(dense)

    @weight.setter
    def weight(self, dense: Tensor) -> None:
        if dense.shape != self.shape:
            raise PartialLoraError(f"weight has shape {tuple(dense.shape)}, this masked factor {tuple(self.shape)}.")
        kept, here = self._checked(dense.detach(), "weight"), self.kept
        is_same = (kept.dtype, kept.device) == (here.dtype, here.device) and not (kept.is_meta or is_sharded(here))
        # Else an optimizer goes on with it, as after functional_call; by `dense`, since dividing may round.
        if not (is_same and torch.equal(dense, self.dense(here))):
            self.kept = nn.Parameter(kept, requires_grad=here.requires_grad)

    @property
    def bias(self) -> Tensor | None:
        """The dense bias, zero where masked, as ``weight`` is; None where the factor has none."""
        return None if self.kept_bias is None else read_only(self.dense(whole(self.kept_bias)))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register as any module does, but assign ``weight``, which is not a parameter here."""
        if name == "weight":
            self.weight = param.data  # not as a parameter, or this method would be called again
        else:
            super().register_parameter(name, param)

    def _checked(self, dense: Tensor, name: str) -> Tensor:
        """Return ``kept`` of a factor; refuse one with values elsewhere, which was trained under another mask."""
        kept = self.keep(dense)
        if not dense.is_meta and dense.count_nonzero() != kept.count_nonzero():
            raise PartialLoraError(
                f"{name} has values outside this adapter's mask: it was trained under another mask or none, load it"
                " with PartialLoraConfig.from_pretrained of its own folder, or remove a partial_lora.json that another"
                " adapter has left there."
            )
        return kept / self.multiple

    def operand(self, kept: Tensor) -> Tensor:
        """Return the matrix of a product: the factor's part for the gathered features, or the dense factor."""
        if not self.gathers:
            return self.fill(kept)
        if not self.entries:
            return kept
        shape = [*self.shape]
        shape[self.axis] = self.touched
        narrow = kept.new_zeros(math.prod(shape))
        return narrow.index_copy(0, self._index("narrow", kept.device), kept.squeeze(1)).view(shape)

    def times(self, x: Tensor, kept: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return `operand` x, plus the kept part of a bias."""
        return self._apply_weight(x, self.operand(kept), bias)

    def transposed(self, x: Tensor, kept: Tensor) -> Tensor:
        """Return the transpose of `operand` times x (tokens × features)."""
        return x @ self.operand(kept)

    def kept_of_operand(self, gradient: Tensor) -> Tensor:
        """Return the gradient of ``kept``, from the gradient of `operand`."""
        if not self.gathers:
            return self.keep(gradient).view_as(self.kept)
        if not self.entries:
            return gradient
        return gradient.flatten().index_select(0, self._index("narrow", gradient.device)).unsqueeze(1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the dense factor times x, as the linear layer or convolution it stands in for computes it."""
        bias = None if self.kept_bias is None else self.dense(self.kept_bias)
        return self._apply_weight(x, self.dense(self.kept), bias)

    def gather(self, x: Tensor) -> Tensor:
        """Return an activation's features that meet `operand`: those that have kept entries."""
        index = self.features_on(x.device)
        if self.is_convolution:
            return x.index_select(self.channels, index)
        # As a matrix: on a CPU, selecting from the last dimension of anything else is four times slower.
        return x.reshape(-1, x.shape[-1]).index_select(1, index).view(*x.shape[:-1], len(index))

    def scatter(self, result: Tensor, change: Tensor) -> None:
        """Add a change, in place and in the wider dtype, to those features (tokens × features) that `gather` takes."""
        index = self.features_on(result.device)
        if result.dtype == change.dtype:
            result.index_add_(1, index, change)
        else:
            result.index_copy_(1, index, (result.index_select(1, index) + change).to(result.dtype))

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        if getattr(self.kept, "_fsdp_flattened", False):  # FSDP 1 looks parameters up by their names
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        for name, part in PARTS.items():
            if (kept := getattr(self, part)) is not None:
                values = whole(kept) if keep_vars else whole(kept).detach()
                destination[prefix + name] = entry_like(kept, self.dense(values))

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        state = {}
        for name, part in PARTS.items():
            here, shape = getattr(self, part), self.shape if name == "weight" else self.shape[:1]
            dense, kept = state_dict.get(prefix + name), state_dict.get(prefix + part)
            dense = dense if dense is None else self._unpadded(dense)
            if here is None:
                unexpected_keys += [] if dense is None else [prefix + name]
            elif dense is None and kept is not None:  # parameters copied by name, as by averaging of weights
                state[prefix + part] = sharded_like(here, whole(kept))
            elif dense is None:
                missing_keys.append(prefix + name)
            elif dense.shape != shape:
                error_msgs.append(f"size mismatch for {prefix}{name}: {tuple(dense.shape)} is not {tuple(shape)}")
            else:
                state[prefix + part] = sharded_like(here, self._checked(whole(dense), prefix + name))
        with gathered(self.kept), gathered(self.kept_bias):
            super()._load_from_state_dict(state, prefix, local_metadata, strict, [], unexpected_keys, error_msgs)

    def extra_repr(self) -> str:
        unit = "entries" if self.entries else self.axis_name
        return f"{tuple(self.shape)}, kept={len(self.mask.kept)} of {self.mask.size} {unit}"


class FactorA(MaskedFactor):
    """A (rank × in), whose columns (input features or channels) are masked."""

    axis_name, axis = "columns", 1

    def project(self, x: Tensor, dropout: nn.Module) -> Tensor:
        """Return A dropout(x), for x with features in the last dimension (a convolution's channels in the second).

        Where features are gathered, only these features of x are stored for the backward pass.
        """
        if self.gathers:
            return self.times(dropout(self.gather(x)), self.kept)
        return self._apply_weight(dropout(x), self.fill(self.kept))


class FactorB(MaskedFactor):
    """B (out × rank), whose rows (output features or channels) are masked."""

    axis_name, axis = "rows", 0

    def add_to(self, result: Tensor, low: Tensor, scaling: float) -> Tensor:
        """Return result + scaling * B low; where it `scatters`, only the kept features are touched."""
        scaling = scaling * self.multiple
        if self.full:  # PEFT's order of operations: equal to the last bit
            return result + self._apply_weight(low, self.fill(self.kept), self.kept_bias) * scaling
        low = low * scaling  # narrower than the result
        bias = None if self.kept_bias is None else self.kept_bias * scaling
        if self.scatters:
            return self._with(result, self.times(low, self.kept, bias))
        return result + self._apply_weight(low, self.fill(self.kept), None if bias is None else self.fill(bias))

    def _with(self, result: Tensor, change: Tensor) -> Tensor:
        """Return result with a change of those features that `gather` takes."""
        index, features = self.features_on(change.device), self.channels
        if result.dtype == change.dtype:
            return result.index_add(features, index, change)
        # Sum in the wider dtype, as `+` does, but only the features that change.
        return result.index_copy(features, index, (self.gather(result) + change).to(result.dtype))


class _Frozen:
    """A factor that a seed draws: it does not train and need not be saved.

    It is no parameter, which PEFT would set to train, and no buffer, which DistributedDataParallel would send. So
    nothing moves or casts it: whenever it is read, it follows the other factor to another device or dtype.

    Args:
        dense: the factor as PEFT has drawn it.
        mask: what of it is not zero.
        drawn: the values there, in float32.
        beside: the factor that trains.
        multiple: as of other factors.
    """

    def __init__(
        self,
        dense: nn.Module,
        mask: Mask,
        drawn: np.ndarray,
        beside: MaskedFactor,
        *,
        entries: bool,
        multiple: float = 1.0,
    ) -> None:
        super().__init__(dense, mask, entries=entries, multiple=multiple)
        del self._parameters["kept"]
        self._drawn = self._cast = torch.from_numpy(drawn.copy())
        self._beside = (beside,)  # in a tuple: it is a module of the layer, not of this one

    widens = False

    def swap(self, mask: Mask, dense: Tensor, drawn: np.ndarray | None, bias: None = None) -> None:
        """Take over another frozen factor, of other values or features."""
        self.mask = mask
        self._find_places()
        for name, index in self._indices.items():
            index.copy_(torch.tensor(self._places[name]))
        self._drawn.copy_(torch.from_numpy(drawn))
        if self._cast is not self._drawn:
            self._cast.copy_(self._drawn)

    @property
    def kept(self) -> Tensor:
        """The values."""
        like = self._beside[0].kept
        if (self._cast.device, self._cast.dtype) != (like.device, like.dtype):
            with torch.inference_mode(False):  # training may follow, as in `_move_indices`
                self._cast = self._drawn.to(like.device, like.dtype)
        return self._cast

    @property
    def weight(self) -> Tensor:
        """The factor, read-only; nothing but its own values can be assigned."""
        return read_only(self.dense(self.kept))

    @weight.setter
    def weight(self, dense: Tensor) -> None:
        self._check_values(dense, "weight")

    def _check_values(self, dense: Tensor, name: str) -> None:
        """Refuse a factor that is not the one drawn, rounded to its own dtype or to this one's."""
        expected = self.dense(self.kept)
        matches = dense.shape == expected.shape and (
            dense.is_meta
            or expected.is_meta
            or torch.equal(self.dense(self._drawn.to(dense.device, dense.dtype)), dense)
            or torch.equal(dense.to(expected), expected)
        )
        if not matches:
            raise PartialLoraError(
                f"{name} is not the frozen factor that mask_seed draws: it was trained over another, load it with"
                " PartialLoraConfig.from_pretrained of its own folder."
            )

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *arguments) -> None:
        dense = state_dict.get(prefix + "weight")
        if dense is not None:
            self._check_values(self._unpadded(whole(dense)), prefix + "weight")


class FrozenA(_Frozen, FactorA):
    """A (rank × in), whole."""


class _OneHot(_Frozen):
    """A frozen factor of unit vectors, in the order of the features that they meet: a product selects features."""

    gathers = scatters = True

    def times(self, x: Tensor, kept: Tensor, bias: None = None) -> Tensor:
        """Return x: the operand is the identity."""
        return x

    transposed = times


class OneHotA(_OneHot, FactorA):
    """A (rank × in) of unit vectors: A x is a part of x."""


class OneHotB(_OneHot, FactorB):
    """B (out × rank) of unit vectors: it adds to as many features as the rank."""


class _Tied:
    """A factor whose features are tied in groups (`TiedMask`): each has the values of its group's kept one, times ±1.

    In a product with an activation, the signed sum of a group's features stands for one feature.
    """

    @property
    def gathers(self) -> bool:
        return self.density != 1 and not self.in_groups

    @property
    def scatters(self) -> bool:
        return self.gathers

    def fill(self, kept: Tensor) -> Tensor:
        """Return the dense factor, every feature with its sign; `keep` is the inverse."""
        return kept if self.full else self._spread(kept, self.axis)

    def nearest(self, dense: Tensor) -> Tensor:
        """Return the signed mean of each group's features."""
        places = torch.tensor(self.mask.places, device=dense.device)
        sizes = places.bincount().view([-1 if axis == self.axis else 1 for axis in range(dense.dim())])
        return self._sums(dense, self.axis) / sizes

    def kept_of_operand(self, gradient: Tensor) -> Tensor:
        """Return the gradient of ``kept``, from the gradient of `operand`."""
        return gradient if self.gathers or self.full else self._sums(gradient, self.axis)

    def gather(self, x: Tensor) -> Tensor:
        """Return the signed sum of each group's features of an activation."""
        return self._sums(x, x.dim() + self.channels)

    def scatter(self, result: Tensor, change: Tensor) -> None:
        """Add each group's change, with signs, to its features in result (tokens × features), in place."""
        result.copy_(result + self._spread(change, 1))

    def _sums(self, x: Tensor, axis: int) -> Tensor:
        signed = self._signed(x, axis, "members", "signs_of_members")
        return signed.unflatten(axis, (len(self.mask.kept), -1)).sum(axis + 1)

    def _spread(self, x: Tensor, axis: int) -> Tensor:
        return self._signed(x, axis, "places", "signs")

    def _signed(self, x: Tensor, axis: int, places: str, signs: str) -> Tensor:
        """Return the entries of x along an axis at some places, each times its sign."""
        shape = [1] * x.dim()
        shape[axis] = -1
        of_each = self._index(signs, x.device).to(x.dtype).view(shape)
        return x.index_select(axis, self._index(places, x.device)) * of_each

    def _checked(self, dense: Tensor, name: str) -> Tensor:
        """Return ``kept`` of a factor; refuse one that is not tied in the same groups."""
        kept = self.keep(dense)
        if not dense.is_meta and not torch.equal(self.fill(kept), dense):
            raise PartialLoraError(
                f"{name} is not tied in this adapter's groups: it was trained under others or none, load it with"
                " PartialLoraConfig.from_pretrained of its own folder."
            )
        return kept / self.multiple


class TiedA(_Tied, FactorA):
    """A (rank × in), whose columns are tied in groups."""


class TiedB(_Tied, FactorB):
    """B (out × rank), whose rows are tied in groups."""

    def _with(self, result: Tensor, change: Tensor) -> Tensor:
        """Return result with each group's change, by signs, in all its features."""
        return (result + self._spread(change, change.dim() + self.channels)).to(result.dtype)


def _groups(mask: TiedMask) -> dict[str, np.ndarray]:
    """Return a mask's ties, and the members of its groups in turn, each group padded to one size with sign 0."""
    order = np.argsort(mask.places, kind="stable")
    sizes = np.bincount(mask.places, minlength=len(mask.kept))
    shape = (len(sizes), sizes.max())
    is_member = np.arange(shape[1]) < sizes[:, None]
    members, signs = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    members[is_member], signs[is_member] = order, mask.signs[order]
    return {
        "places": mask.places,
        "signs": mask.signs,
        "members": members.flatten(),
        "signs_of_members": signs.flatten(),
    }


def _within_features(entries: np.ndarray, shape: torch.Size, axis: int) -> dict[str, np.ndarray]:
    """Return the features along ``axis`` that have any of the flat ``entries``, and the entries' places among these.

    "features" are ascending; "narrow" are flat row-major places in the tensor of these features alone.
    """
    places = list(np.unravel_index(entries, shape))
    features, places[axis] = np.unique(places[axis], return_inverse=True)
    narrow = [*shape]
    narrow[axis] = len(features)
    return {"features": features, "narrow": np.ravel_multi_index(places, narrow)}
