"""A small DINOv2 as an ONNX graph by torch's exporter: what the conversion is tested against."""

from __future__ import annotations

import functools
import io
import warnings

import onnx
import torch
from transformers import Dinov2Config, Dinov2Model

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "init_values": 0.5}
MODEL_ARGS |= {"dynamic_img_size": True}
_NAMES = {f"attention.{name[0]}_proj": f"attention.attention.{name}" for name in ("query", "key", "value")}
_NAMES |= {"attention.o_proj": "attention.output.dense"}  # what transformers 5 calls it, and what it was exported as


class Exported(torch.nn.Module):
    """The backbone with its name in front of its weights', which all differ from what a new model has."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 16, "patch_size": 4}
        self.backbone = Dinov2Model(Dinov2Config(**sizes, attn_implementation="eager"))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape) * 0.3

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.backbone(image).last_hidden_state


@functools.cache
def content() -> bytes:
    file, named = io.BytesIO(), {"input_names": ["input_image"], "dynamic_axes": {"input_image": {2: "h", 3: "w"}}}
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(5)
        torch.onnx.export(Exported().eval(), torch.zeros(1, 3, 16, 16), file, opset_version=17, dynamo=False, **named)
    model = onnx.load_model_from_string(file.getvalue())
    for now, then in _NAMES.items():
        for tensor in model.graph.initializer:
            tensor.name = tensor.name.replace(now, then)
        for node in model.graph.node:
            node.input[:] = [name.replace(now, then) for name in node.input]
    return model.SerializeToString()
