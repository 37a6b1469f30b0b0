"""A timm ViT whose activations are seen, and the bound of partial_lora.theory.propagation along its branches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from partial_lora import models
from partial_lora.config import conf_dir
from partial_lora.theory import propagation
from partial_lora.theory.propagation import Step

SEEN = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


class Network:
    """A timm ViT whose activations are seen and whose target weights can be swapped."""

    def __init__(self, name: str) -> None:
        settings = yaml.safe_load((conf_dir() / "model" / f"{name}.yaml").read_text(encoding="utf-8"))
        keys = ("name", "weights", "architecture", "model_args", "image_size")
        self.name, self.image_size = name, settings["image_size"]
        loaded = models.load(labels=["one", "other"], **{key: settings[key] for key in keys})
        self.vit = loaded.timm_model.eval().double()  # the smallest changes are near float32's rounding
        for block in self.vit.blocks:
            block.attn.fused_attn = False  # the fused product has no forward derivative
        self.modules = {
            f"{index}.{kind}": block.get_submodule(kind)
            for index, block in enumerate(self.vit.blocks)
            for kind in settings["target_modules"]
        }
        self.weights = {name: module.weight.detach().clone() for name, module in self.modules.items()}

    def put(self, updates: Mapping[str, Tensor]) -> None:
        for name, module in self.modules.items():
            module.weight.data.copy_(self.weights[name] + updates[name])

    def seen(self, images: Tensor) -> dict[str, Tensor]:
        """What enters every module of every block, every block, and the last normalisation; and the output."""
        entered: dict[str, Tensor] = {}

        def see(name: str, module: nn.Module, inputs: tuple) -> None:
            entered[name] = inputs[0].detach()

        watched = {f"{i}.{kind}": block.get_submodule(kind) for i, block in enumerate(self.vit.blocks) for kind in SEEN}
        watched |= {f"{i}": block for i, block in enumerate(self.vit.blocks)} | {"norm": self.vit.norm}
        hooks = [module.register_forward_pre_hook(partial(see, name)) for name, module in watched.items()]
        try:
            features = self.vit.forward_features(images)
        finally:
            for hook in hooks:
                hook.remove()
        return entered | {"output": features[:, 0]}


def spectral(weight: Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.double(), ord=2))


class Constants:
    """What of a block's constants the other weights decide alone, found once for all images."""

    def __init__(self, block: nn.Module) -> None:
        attention = block.attn
        gains = [(norm.weight.detach(), norm.bias.detach()) for norm in (block.norm1, block.norm2)]
        qkv, bias = attention.qkv.weight.detach(), attention.qkv.bias.detach()
        self.qkv = spectral(qkv * gains[0][0])  # the normalisation's gain is folded into what follows it
        self.proj, self.fc2 = spectral(attention.proj.weight.detach()), spectral(block.mlp.fc2.weight.detach())
        self.fc1 = spectral(block.mlp.fc1.weight.detach() * gains[1][0])
        heads, width = attention.num_heads, qkv.shape[1]
        queries = qkv[:width].reshape(heads, -1, width), bias[:width].reshape(heads, -1)
        gain, shift = (one.double().numpy() for one in gains[0])
        self.longest_queries = [
            propagation.longest(weight.double().numpy(), offset.double().numpy(), gain, shift)
            for weight, offset in zip(*queries, strict=True)
        ]


def bound(network: Network, branches: Sequence[Sequence[Step]], known: Tensor) -> float:
    """The bound on the change of one image's output; known (tokens, width) is what enters the last normalisation."""
    change = 0.0
    for branch in branches:
        change = propagation.residual(branch, change)
    norm = network.vit.norm
    return change * _normalisation(norm, known[:1]) * float(norm.weight.detach().abs().max())


def branches_of(
    network: Network, constants: Sequence[Constants], known: Mapping[str, Tensor], gap: Mapping[str, Tensor], at: int
) -> list[list[Step]]:
    """The maps of every residual branch, in order, for one image: all of them from what is known of the dense network.

    gap: the weights of the masked network, which are in place, minus those of the dense one.
    """

    def error(name: str) -> float:
        return float((known[name][at] @ gap[name].T).norm())

    branches = []
    for index, (block, constant) in enumerate(zip(network.vit.blocks, constants, strict=True)):
        of = {kind: f"{index}.{kind}" for kind in SEEN}
        attention = block.attn
        with torch.no_grad():  # queries, keys and values of the dense network: the masked one's less the gap
            entered = known[of["attn.qkv"]][at]
            outputs = attention.qkv(entered) - entered @ gap[of["attn.qkv"]].T
        _, keys, values = outputs.reshape(len(outputs), 3, attention.num_heads, -1).permute(1, 2, 0, 3).numpy()
        branches += [
            [
                Step(_normalisation(block.norm1, known[of["norm1"]][at])),
                Step(constant.qkv, error(of["attn.qkv"])),
                Step(propagation.attention(keys, values, np.array(constant.longest_queries), attention.scale)),
                Step(constant.proj, error(of["attn.proj"])),
                Step(_layer_scale(block.ls1)),
            ],
            [
                Step(_normalisation(block.norm2, known[of["norm2"]][at])),
                Step(constant.fc1, error(of["mlp.fc1"])),
                Step(propagation.GELU),
                Step(constant.fc2, error(of["mlp.fc2"])),
                Step(_layer_scale(block.ls2)),
            ],
        ]
    return branches


def _normalisation(norm: nn.LayerNorm, tokens: Tensor) -> float:
    return propagation.normalisation(propagation.deviations(tokens.numpy(), norm.eps), norm.eps)


def _layer_scale(scale: nn.Module) -> float:
    return float(scale.gamma.detach().abs().max()) if hasattr(scale, "gamma") else 1.0
