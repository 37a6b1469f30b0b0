"""From settings to masks: the rows and columns, or the single entries, that each module keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from weakref import WeakValueDictionary

import numpy as np
import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import nn

from partial_lora.errors import PartialLoraError
from partial_lora.masks import AXES, GRANULARITIES, MASKED, Mask, Sparsity, assign_sparsity, kept_count, random_keys

Values = dict[str, dict[str, np.ndarray]]
"""Scores or indices: {module: {"rows": array (size,), "columns": array (size,)}}."""


@dataclass(frozen=True)
class Geometry:
    """The shapes of a module: all that a mask needs to know about it.

    Attributes:
        shape: (out, in) of W; for a convolution its output and input channels.
        a: the shape of the dense A, (rank, in) or (rank, in, height, width).
        b: the shape of the dense B, (out, rank) or (out, rank / groups, 1, 1).
        experts: how many weights W of this shape a parameter holds; None for a module's own weight. PEFT then has A as
            (experts · rank, in), expert by expert, and B as (out, rank · experts), unit by unit.
    """

    shape: tuple[int, int]
    a: tuple[int, ...]
    b: tuple[int, ...]
    experts: int | None = None

    def sizes(self, granularity: str) -> dict[str, int]:
        """Return the sizes of masks: rows and columns of W, or ("element", "units", experts) entries of B and A."""
        entries = self.experts is not None or GRANULARITIES[granularity].over_entries
        sizes = (math.prod(self.b), math.prod(self.a)) if entries else self.shape
        return dict(zip(AXES, sizes, strict=True))

    @property
    def rank(self) -> int:
        """The rank of the adapter, of each expert."""
        return self.a[0] // (self.experts or 1)


@dataclass(frozen=True)
class ModuleMasks:
    """The masks of one module.

    Masks of rows and columns: ``rows`` is over the outputs of W, ``columns`` over its inputs; ``shape`` is (out, in).
    Masks of entries: ``rows`` is over the entries of B, ``columns`` over the entries of A, both flat and row-major;
    only ``shape`` then holds (out, in).
    """

    rows: Mask
    columns: Mask
    shape: tuple[int, int]

    @property
    def element(self) -> bool:
        """True for masks of entries; False at rank 1, where every row of B and column of A is one entry."""
        return (self.rows.size, self.columns.size) != self.shape


# Masks of all modules, by each selection.

Factors = Mapping[str, str]
"""Choice for each factor, {"rows": B's, "columns": A's}: "masked", "frozen" (whole) or "one_hot"."""

BOTH_TRAIN = dict.fromkeys(AXES, MASKED)

_ALIVE: WeakValueDictionary[tuple, Mask] = WeakValueDictionary()
"""Random masks that something still holds, by what they are drawn from: a save or a check does not draw them again."""


def random_masks(
    geometries: Mapping[str, Geometry],
    sparsity: float | Sparsity,
    factors: Factors = BOTH_TRAIN,
    *,
    granularity: str,
    count: str,
    mask_seed: int,
) -> dict[str, ModuleMasks]:
    """Draw the masks of modules with these ``geometries`` {module: geometry}: the selection "random"."""
    shares = shares_of(geometries, sparsity)
    form = GRANULARITIES[granularity]

    def choose(module: str, axis: str, size: int) -> Mask:
        geometry = geometries[module]
        names = _drawn_names(module, geometry)
        of_each = tuple(shares.get(name, shares.get(module))[axis] for name in names)
        drawn_from = (granularity, count, mask_seed, module, axis, geometry, of_each)
        if (mask := _ALIVE.get(drawn_from)) is None:
            if geometry.experts is None:
                mask = draw(module, axis, size, *of_each, shape=geometry.b if axis == "rows" else geometry.a)
            else:
                mask = of_experts(dict(zip(names, of_each, strict=True)), axis, size, geometry)
            _ALIVE[drawn_from] = mask
        return mask

    def draw(name: str, axis: str, size: int, share: float, *, shape: tuple[int, ...]) -> Mask:
        options: dict = {"mask_seed": mask_seed, "module": name, "axis": axis}
        if form.apart:
            options["shape"] = shape
        return form.drawn(count)(size, share, **options)

    def of_experts(share_of: Mapping[str, float], axis: str, size: int, geometry: Geometry) -> Mask:
        """Draw the mask of each expert by its own name, as a mask over the entries of all."""
        (out, inputs), rank = geometry.shape, geometry.rank
        shape = (out, rank) if axis == "rows" else (rank, inputs)  # of one expert's factor
        features = out if axis == "rows" else inputs
        kept = []
        for name, share in share_of.items():
            mask = draw(name, axis, math.prod(shape) if form.over_entries else features, share, shape=shape).dense()
            if not form.over_entries:
                mask = np.broadcast_to(mask[:, None] if axis == "rows" else mask, shape)
            kept.append(mask)
        masks = np.stack([mask.reshape(shape) for mask in kept], axis=0 if axis == "columns" else -1)
        return Mask(size, np.flatnonzero(masks))

    return _masks(geometries, granularity, factors, choose, mask_seed=mask_seed)


def shares_of(geometries: Mapping[str, Geometry], sparsity: float | Sparsity) -> Sparsity:
    """Return one {"rows": s, "columns": s} for each module, or for each expert of a parameter where these are named."""
    names = [name for module, each in geometries.items() for name in _masked_names(module, each, sparsity)]
    return assign_sparsity(sparsity, names)


def _masked_names(module: str, geometry: Geometry, sparsity: float | Sparsity) -> list[str]:
    """Return the names that have shares: the module's or, where these are said, those of its experts."""
    experts = [f"{module}.{expert}" for expert in range(geometry.experts or 0)]
    return experts if isinstance(sparsity, Mapping) and {*experts} & sparsity.keys() else [module]


def _drawn_names(module: str, geometry: Geometry) -> list[str]:
    """Return the names that masks are drawn by: the module's or, of several, those of its experts."""
    count = geometry.experts or 1
    return [module] if count == 1 else [f"{module}.{expert}" for expert in range(count)]


def frozen_a(geometry: Geometry, *, mask_seed: int, module: str) -> np.ndarray:
    """Draw the dense A (rank × in, float32) of a module from the seed and its name alone, distributed as PEFT draws it.

    Uniform between ±1/√n for n inputs (times the places of the kernel, for a convolution), the same on every machine.
    """
    keys = random_keys(math.prod(geometry.a), mask_seed=mask_seed, module=module, axis="frozen")
    uniform = (keys >> np.uint64(11)) * 2.0**-52 - 1  # from the 53 bits that a double holds
    return (uniform / math.sqrt(math.prod(geometry.a[1:]))).astype(np.float32).reshape(geometry.a)


def top_masks(
    geometries: Mapping[str, Geometry],
    sparsity: float | Sparsity,
    factors: Factors,
    values: Values,
    *,
    key: str,
    granularity: str,
    mask_seed: int,
) -> dict[str, ModuleMasks]:
    """Return the masks of the selection "top", chosen by the caller's ``values``.

    key: "scores", of which the highest stay, as many as ``sparsity`` leaves; or "indices", which are those that stay,
    and as many as ``sparsity`` leaves unless that is 0.
    """
    for module in values:
        if module not in geometries:
            raise PartialLoraError(
                f"{key} names {module!r}, which is no target module (first: {next(iter(geometries))})."
            )
    for module in geometries:
        if module not in values:
            raise PartialLoraError(f"{key} has no entry for the target module {module}: selection 'top' needs one.")
    shares = assign_sparsity(sparsity, list(geometries))

    def choose(module: str, axis: str, size: int) -> Mask:
        name, numbers, share = f"{key}[{module!r}][{axis!r}]", values[module][axis], shares[module][axis]
        if key == "scores":
            if len(numbers) != size:
                raise PartialLoraError(f"{name} has {len(numbers)} scores: expected {size}.")
            return Mask.top(numbers, share)
        try:
            mask = Mask(size, numbers)
        except PartialLoraError as error:
            raise PartialLoraError(f"{name}: {error}") from None
        if sparsity != 0 and len(numbers) != kept_count(size, share):
            raise PartialLoraError(
                f"{name} keeps {len(numbers)} of {size}, but its sparsity {share} keeps {kept_count(size, share)}: give"
                " one of the two."
            )
        return mask

    masks = _masks(geometries, granularity, factors, choose, mask_seed=mask_seed)
    for module, axis in product(masks if key == "indices" else (), AXES):
        mask, numbers = getattr(masks[module], axis), values[module][axis]
        if factors[axis] != MASKED and not (len(numbers) == mask.size or np.array_equal(numbers, mask.kept)):
            raise PartialLoraError(f"{key}[{module!r}][{axis!r}] leaves some out: {axis} is {factors[axis]!r}.")
    return masks


def _masks(
    geometries: Mapping[str, Geometry],
    granularity: str,
    factors: Factors,
    choose: Callable[[str, str, int], Mask],
    *,
    mask_seed: int,
) -> dict[str, ModuleMasks]:
    """Return for every module the masks of its factors; ``choose(module, axis, size)`` returns those that train.

    A frozen factor keeps everything. One of unit vectors keeps as many rows or columns of W as its rank, at random.
    """

    def mask(module: str, axis: str, size: int) -> Mask:
        geometry = geometries[module]
        if factors[axis] == MASKED:
            return choose(module, axis, size)
        if factors[axis] == "frozen":
            return Mask.full(size)
        features = dict(zip(AXES, geometry.shape, strict=True))[axis]
        if geometry.rank > features:
            raise PartialLoraError(
                f"{axis}='one_hot': {module} has {features} {axis}, fewer than rank {geometry.rank}."
            )
        share = 1 - geometry.rank / features
        return Mask.random(features, share, mask_seed=mask_seed, module=module, axis=f"one-hot {axis}")

    return {
        module: ModuleMasks(
            **{axis: mask(module, axis, size) for axis, size in geometry.sizes(granularity).items()},
            shape=geometry.shape,
        )
        for module, geometry in geometries.items()
    }


def read_values(values: object, key: str) -> Values:
    """Return scores or indices in one form: lists, arrays or tensors become arrays of numbers.

    ``values`` is {module: {"rows": numbers, "columns": numbers}}; ``key`` is its name in errors. Raises
    PartialLoraError, naming the entry, for any other form and for numbers that are not finite.
    """
    if not isinstance(values, Mapping):
        raise PartialLoraError(f"{key} is a {type(values).__name__}: expected {{module: {{rows, columns}}}}.")
    read = {}
    for module, axes in values.items():
        if not isinstance(axes, Mapping) or set(axes) != set(AXES):
            has = sorted(map(str, axes)) if isinstance(axes, Mapping) else type(axes).__name__
            raise PartialLoraError(f"{key}[{module!r}] has {has}: expected rows and columns.")
        read[str(module)] = {axis: _numbers(axes[axis], f"{key}[{module!r}][{axis!r}]") for axis in AXES}
    return read


def _numbers(values: object, key: str) -> np.ndarray:
    try:
        if isinstance(values, torch.Tensor):
            values = values.detach().cpu()
            values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()  # numpy has no bfloat16
        numbers = np.array(values)  # a copy, which nobody else changes
    except (ValueError, TypeError, RuntimeError):  # a ragged list, a tensor that is sparse or has no values
        numbers = np.array(None)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iuf":
        raise PartialLoraError(
            f"{key} is no list of numbers: expected one dimension (single entries in row-major order)."
        )
    if not np.isfinite(numbers).all():
        raise PartialLoraError(f"{key} has NaN or infinity: expected finite numbers.")
    whole = numbers.dtype.kind != "f" and numbers.max(initial=0) <= np.iinfo(np.int64).max
    numbers = numbers.astype(np.int64 if whole else np.float64)
    numbers.flags.writeable = False
    return numbers


# The base layers that a masked adapter fits, and the shapes of its factors there.

# EmbeddingBag sums embeddings itself, and MultiheadAttention has its projections in one tensor, not in modules.
_UNFIT = (nn.EmbeddingBag, nn.MultiheadAttention)


def geometry(name: str, layer: nn.Module, rank: int) -> Geometry:
    """Return the shapes of W, A and B for the base ``layer`` called ``name`` (or PEFT's layer around it).

    Linear layers, quantised ones and transformers' Conv1D included, have W (out × in). In a convolution, rows are
    output channels and columns input channels; in an embedding, rows are tokens and columns dimensions. Raises
    PartialLoraError for a layer that masks do not fit.
    """
    if isinstance(layer, ParamWrapper):
        return parameter_geometry(layer.get_base_layer(), layer.parameter_name, rank)
    layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return _convolution(name, layer, rank)
    if isinstance(layer, nn.Embedding):
        shape = (layer.num_embeddings, layer.embedding_dim)
        return Geometry(shape=shape, a=(rank, shape[1]), b=(shape[0], rank))
    inputs, outputs = (None, None) if isinstance(layer, _UNFIT) else _get_in_out_features(layer)
    if not isinstance(inputs, int) or not isinstance(outputs, int):
        raise PartialLoraError(
            f"target module {name} is a {type(layer).__name__}: only linear layers, convolutions and embeddings can"
            " be masked; name the targets so that it does not match."
        )
    return Geometry(shape=(outputs, inputs), a=(rank, inputs), b=(outputs, rank))


def parameter_geometry(module: nn.Module, name: str, rank: int) -> Geometry:
    """Return the shapes of a parameter that is a weight (out × in), or several: experts × out × in.

    Modules that say ``is_transposed`` hold experts × in × out. Raises PartialLoraError for other shapes.
    """
    parameter = getattr(module, name)
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # of ZeRO's stage 3
    if len(shape) not in (2, 3):
        raise PartialLoraError(
            f"target_parameters: {name} of {type(module).__name__} has shape {shape}: expected 2 or 3."
        )
    experts, out, inputs = (1, *shape)[-3:]
    if len(shape) == 3 and getattr(module, "is_transposed", False):
        out, inputs = inputs, out
    return Geometry(shape=(out, inputs), a=(rank * experts, inputs), b=(out, rank * experts), experts=experts)


def _convolution(name: str, layer: nn.modules.conv._ConvNd, rank: int) -> Geometry:
    for option, plain in (("dilation", 1), ("padding_mode", "zeros"), ("transposed", False)):
        value = getattr(layer, option)
        if value != plain and set(value if isinstance(value, tuple) else ()) != {plain}:
            raise PartialLoraError(
                f"target module {name} is a convolution with {option}={value}, which PEFT's LoRA ignores: name the"
                " targets so that it does not match."
            )
    if rank % layer.groups:
        raise PartialLoraError(
            f"target module {name} is a convolution in {layer.groups} groups, and rank {rank} is no multiple of that:"
            " choose another rank or name the targets so that it does not match."
        )
    shape = (layer.out_channels, layer.in_channels)
    a = (rank, layer.in_channels, *layer.kernel_size)
    return Geometry(shape=shape, a=a, b=(layer.out_channels, rank // layer.groups, *(1 for _ in layer.kernel_size)))
