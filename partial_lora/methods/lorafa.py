"""LoRA-FA (Zhang et al. 2023, arXiv 2308.03303)."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import TrainerCallback

from partial_lora.methods.setting import Setting, Training


def lorafa(model: nn.Module, setting: Setting) -> PeftModel:
    """LoRA with A frozen as it was drawn; B alone trains, so that of a module's inputs only A x is kept."""
    adapted = get_peft_model(model, LoraConfig(**setting.lora()))
    for name, parameter in adapted.named_parameters():
        if ".lora_A." in name:
            parameter.requires_grad_(False)
    return adapted


def training(adapted: PeftModel) -> Training:
    """AdamW as for every method, on the gradient of B that brings B A closest to where the gradient of W would."""
    return Training(callbacks=[Project(adapted)])


class Project(TrainerCallback):
    """Before every optimizer step, makes of the gradient G of B the one that is closest to W's, G (A Aᵀ)⁻¹ / scaling².

    PEFT's LoraFAOptimizer does so inside an AdamW of its own, which has another eps, decays biases, and rounds the
    product to bfloat16 wherever that can be computed; here training differs in nothing else from other methods'.
    """

    def __init__(self, adapted: PeftModel) -> None:
        self._layers = [layer for layer in adapted.modules() if isinstance(layer, LoraLayer)]
        self._inverses: list[Tensor] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self._inverses = [_inverse(layer) for layer in self._layers]  # once: A does not change

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for layer, inverse in zip(self._layers, self._inverses, strict=True):
            gradient = layer.lora_B["default"].weight.grad
            if gradient is not None:  # of a module that the pass has gone through
                gradient.copy_((gradient.flatten(1) @ inverse).view_as(gradient))


def _inverse(layer: LoraLayer) -> Tensor:
    """(A Aᵀ)⁻¹ / scaling², (rank × rank)."""
    with torch.no_grad():
        a = layer.lora_A["default"].weight.flatten(1)  # a convolution's, too
        added = 1e-8 * torch.eye(len(a), device=a.device)  # PEFT's, against a singular A Aᵀ
        return torch.linalg.pinv(a @ a.T + added) / layer.scaling["default"] ** 2
