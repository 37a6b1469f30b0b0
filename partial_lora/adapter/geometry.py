"""Which base layers a masked adapter fits on, and the shapes of its factors there."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import nn

from partial_lora.adapter.selection import Geometry
from partial_lora.errors import PartialLoraError

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def geometry(name: str, layer: nn.Module, rank: int) -> Geometry:
    """The shapes of W, A and B for the base ``layer`` called ``name`` (or PEFT's layer around it).

    Linear layers, quantised ones and transformers' Conv1D included, have W (out × in). Of a convolution, rows are
    output channels and columns input channels. Raises PartialLoraError for a layer that masks do not fit.
    """
    layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    if isinstance(layer, _CONVOLUTIONS):
        return _convolution(name, layer, rank)
    inputs, outputs = (None, None) if isinstance(layer, _UNFIT) else _get_in_out_features(layer)
    if not isinstance(inputs, int) or not isinstance(outputs, int):
        raise PartialLoraError(
            f"target module {name} is a {type(layer).__name__}: only linear layers and convolutions are masked, name"
            " the targets so that it does not match."
        )
    return Geometry(shape=(outputs, inputs), a=(rank, inputs), b=(outputs, rank))


# An embedding looks rows of A up instead of multiplying, and attention's projections are one tensor without modules.
_UNFIT = (nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention)


def _convolution(name: str, layer: nn.modules.conv._ConvNd, rank: int) -> Geometry:
    for option, plain in (("dilation", 1), ("padding_mode", "zeros"), ("transposed", False)):
        value = getattr(layer, option)
        if value != plain and set(value if isinstance(value, tuple) else ()) != {plain}:
            raise PartialLoraError(
                f"target module {name} is a convolution with {option}={value}, which PEFT's LoRA leaves out: name the"
                " targets so that it does not match."
            )
    if rank % layer.groups:
        raise PartialLoraError(
            f"target module {name} is a convolution in {layer.groups} groups, which rank {rank} is not a multiple of:"
            " choose another rank or name the targets so that it does not match."
        )
    shape = (layer.out_channels, layer.in_channels)
    a = (rank, layer.in_channels, *layer.kernel_size)
    return Geometry(shape=shape, a=a, b=(layer.out_channels, rank // layer.groups, *(1 for _ in layer.kernel_size)))
