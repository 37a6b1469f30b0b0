"""A small ViT as an ONNX graph, written operation by operation: what the conversion is tested against."""

from __future__ import annotations

import functools

import numpy as np
import timm
import torch
from onnx import TensorProto, helper, numpy_helper

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "init_values": 0.5}
MODEL_ARGS |= {"dynamic_img_size": True}


class Graph:
    """An ONNX graph as the exporter writes a DINOv2: biases keep their names, the matrices of linear layers do not."""

    def __init__(self) -> None:
        self.nodes, self.initialisers = [], []

    def weight(self, name: str, value: torch.Tensor | np.ndarray) -> str:
        self.initialisers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def op(self, kind: str, *inputs: str, **attributes: object) -> str:
        output = f"/{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def shape(self, *sizes: int) -> str:
        return self.weight(f"shape_{len(self.nodes)}", np.array(sizes, dtype=np.int64))

    def norm(self, x: str, name: str, module: torch.nn.LayerNorm) -> str:
        scale, bias = self.weight(f"{name}.weight", module.weight), self.weight(f"{name}.bias", module.bias)
        return self.op("LayerNormalization", x, scale, bias, epsilon=module.eps)

    def linear(self, x: str, name: str, weight: torch.Tensor, bias: torch.Tensor) -> str:
        product = self.op("MatMul", x, self.weight(f"onnx::MatMul_{len(self.nodes)}", weight.T))
        return self.op("Add", self.weight(f"{name}.bias", bias), product)


def exported(model: torch.nn.Module) -> bytes:
    """timm's ViT, written operation by operation; the input is one image of the native size."""
    graph, width, heads = Graph(), model.embed_dim, model.blocks[0].attn.num_heads
    embeddings, grid = "backbone.embeddings", model.patch_embed.grid_size[0]
    patches = graph.op(
        "Conv",
        "input_image",
        graph.weight(f"{embeddings}.patch_embeddings.projection.weight", model.patch_embed.proj.weight),
        graph.weight(f"{embeddings}.patch_embeddings.projection.bias", model.patch_embed.proj.bias),
        strides=model.patch_embed.patch_size,
    )
    patches = graph.op("Reshape", patches, graph.shape(1, width, grid * grid))
    patches = graph.op("Transpose", patches, perm=[0, 2, 1])
    token = graph.op("Expand", graph.weight(f"{embeddings}.cls_token", model.cls_token), graph.shape(1, 1, width))
    x = graph.op("Concat", token, patches, axis=1)
    positions = graph.weight("onnx::Reshape_7", model.pos_embed[:, 1:])
    positions = graph.op("Reshape", positions, graph.shape(1, grid, grid, width))
    positions = graph.op("Reshape", positions, graph.shape(1, grid * grid, width))
    positions = graph.op("Concat", graph.weight("onnx::Concat_3", model.pos_embed[:, :1]), positions, axis=1)
    x = graph.op("Add", x, positions)
    for index, block in enumerate(model.blocks):
        name = f"backbone.encoder.layer.{index}"
        h = graph.norm(x, f"{name}.norm1", block.norm1)
        parts = dict(zip(("query", "key", "value"), range(3), strict=True))
        split = {}
        for part in ("key", "value", "query"):  # the order in which the exporter writes them
            rows = slice(parts[part] * width, (parts[part] + 1) * width)
            weight, bias = block.attn.qkv.weight[rows], block.attn.qkv.bias[rows]
            h_part = graph.linear(h, f"{name}.attention.attention.{part}", weight, bias)
            h_part = graph.op("Reshape", h_part, graph.shape(1, grid * grid + 1, heads, width // heads))
            split[part] = graph.op("Transpose", h_part, perm=[0, 2, 3, 1] if part == "key" else [0, 2, 1, 3])
        scores = graph.op("MatMul", split["query"], split["key"])
        scores = graph.op("Mul", scores, graph.weight(f"scale_{index}", np.float32((width // heads) ** -0.5)))
        h = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), split["value"])
        h = graph.op("Transpose", h, perm=[0, 2, 1, 3])
        h = graph.op("Reshape", h, graph.shape(1, grid * grid + 1, width))
        h = graph.linear(h, f"{name}.attention.output.dense", block.attn.proj.weight, block.attn.proj.bias)
        x = graph.op("Add", graph.op("Mul", h, graph.weight(f"{name}.layer_scale1.lambda1", block.ls1.gamma)), x)
        h = graph.norm(x, f"{name}.norm2", block.norm2)
        h = graph.linear(h, f"{name}.mlp.fc1", block.mlp.fc1.weight, block.mlp.fc1.bias)
        half = graph.op("Mul", h, graph.weight(f"half_{index}", np.float32(0.5)))
        erf = graph.op("Erf", graph.op("Mul", h, graph.weight(f"root_{index}", np.float32(0.5**0.5))))
        h = graph.op("Mul", half, graph.op("Add", erf, graph.weight(f"one_{index}", np.float32(1))))
        h = graph.linear(h, f"{name}.mlp.fc2", block.mlp.fc2.weight, block.mlp.fc2.bias)
        x = graph.op("Add", graph.op("Mul", h, graph.weight(f"{name}.layer_scale2.lambda1", block.ls2.gamma)), x)
    features = graph.norm(x, "backbone.layernorm", model.norm)
    whole = helper.make_graph(
        graph.nodes,
        "vit",
        [helper.make_tensor_value_info("input_image", TensorProto.FLOAT, [1, 3, None, None])],
        [helper.make_tensor_value_info(features, TensorProto.FLOAT, None)],
        graph.initialisers,
    )
    return helper.make_model(whole, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


@functools.cache
def content() -> bytes:
    """A random ViT whose every weight, biases and norms too, differs from what a new model has."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        model = timm.create_model(ARCHITECTURE, num_classes=0, **MODEL_ARGS)
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
        return exported(model)
