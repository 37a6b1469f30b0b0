"""A Vision Transformer's weights out of an ONNX graph, under timm's names.

The exporter keeps the names of biases, norms and scales, but the weight of every linear layer becomes a transposed
matrix with a number for a name, in an order that is not the module's (key, value, query). What a matrix is, the graph
says: the product with it is added to a bias, and the bias has kept its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from partial_lora.errors import PartialLoraError

if TYPE_CHECKING:
    from onnx import GraphProto

_LAYER = re.compile(r"backbone\.encoder\.layer\.(\d+)\.")

# timm's name in a block: the exported one; q, k and v are one matrix in timm
_BLOCK = {
    "norm1": "norm1",
    "attn.proj": "attention.output.dense",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_QKV = tuple(f"attention.attention.{name}" for name in ("query", "key", "value"))


def state_dict(content: bytes) -> dict[str, np.ndarray]:
    """Every weight that timm's ViT of the same shape has, its head apart, by timm's names; float32.

    `content` is a serialised ONNX model of a DINOv2 backbone (and whatever follows it, which is left out). Raises
    PartialLoraError that names a weight the graph does not have.
    """
    import onnx

    graph = onnx.load_model_from_string(content).graph
    named = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = named | _linear_weights(graph, named)

    def get(name: str) -> np.ndarray:
        if name not in weights:
            raise PartialLoraError(f"ONNX graph: expected a weight {name}, which no initialiser or product holds")
        return weights[name]

    state = {
        "cls_token": get("backbone.embeddings.cls_token"),
        "pos_embed": _position_embedding(graph, named),
        "patch_embed.proj.weight": get("backbone.embeddings.patch_embeddings.projection.weight"),
        "patch_embed.proj.bias": get("backbone.embeddings.patch_embeddings.projection.bias"),
        "norm.weight": get("backbone.layernorm.weight"),
        "norm.bias": get("backbone.layernorm.bias"),
    }
    layers = {int(match[1]) for name in named if (match := _LAYER.match(name))}
    for layer in sorted(layers):
        block = _block(get, f"backbone.encoder.layer.{layer}.")
        state |= {f"blocks.{layer}.{name}": value for name, value in block.items()}
    return {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in state.items()}


def _block(get: Callable[[str], np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    block = {}
    for kind in ("weight", "bias"):
        for name, exported in _BLOCK.items():
            block[f"{name}.{kind}"] = get(f"{prefix}{exported}.{kind}")
        block[f"attn.qkv.{kind}"] = np.concatenate([get(f"{prefix}{part}.{kind}") for part in _QKV])
    for number in (1, 2):
        block[f"ls{number}.gamma"] = get(f"{prefix}layer_scale{number}.lambda1")
    return block


def _linear_weights(graph: GraphProto, named: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weight (out x in) of each linear layer, named as its bias is: x @ matrix + bias, with matrix (in x out)."""
    matrix = {
        node.output[0]: named[node.input[1]]
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in named
    }
    weights = {}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        products = [name for name in node.input if name in matrix]
        biases = [name for name in node.input if name in named and name.endswith(".bias")]
        if products and biases:
            weights[biases[0].removesuffix("bias") + "weight"] = matrix[products[0]].T
    return weights


def _position_embedding(graph: GraphProto, named: Mapping[str, np.ndarray]) -> np.ndarray:
    """The embedding (1 x 1 + patches x width) of the class token and the patches, which the exporter cut in two.

    The patches' part is the one weight that is reshaped (into the grid that is then resized to the image); the class
    token's is the one that is put before the result.
    """
    patches = [node.input[0] for node in graph.node if node.op_type == "Reshape" and node.input[0] in named]
    tokens = [node.input[0] for node in graph.node if node.op_type == "Concat" and node.input[0] in named]
    if len(patches) != 1 or len(tokens) != 1:
        raise PartialLoraError(
            f"ONNX graph: expected one position embedding in two parts, found {len(tokens)} + {len(patches)}"
        )
    return np.concatenate([named[tokens[0]], named[patches[0]]], axis=1)
