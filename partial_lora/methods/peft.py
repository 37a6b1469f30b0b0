"""The reference: LoRA as it is."""

from __future__ import annotations

import warnings

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.adalora.layer import AdaLoraLayer, RankAllocator
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from partial_lora.errors import PartialLoraError
from partial_lora.methods.setting import Setting, Training


def lora(model: nn.Module, setting: Setting) -> PeftModel:
    """Dense LoRA, PEFT's own."""
    return get_peft_model(model, LoraConfig(**setting.lora()))


# --- AdaLoRA (Zhang et al. 2023, arXiv 2303.10512).

# Of the steps: ranks are whole for the first tenth, and as they will stay for the last three.
_WHOLE, _FINAL = 0.1, 0.3
_LEAST_STEPS = 4  # so that each of the three phases has one
_WIDER = 1.5  # how much higher the rank is at first, as in the paper (12 for 8)
_SMOOTHED = ("exp_avg_ipt", "exp_avg_unc")  # what the allocator remembers of every weight
_REGULARISED = 0.5  # PEFT's weight of the penalty that keeps A and B orthogonal


def adalora(model: nn.Module, setting: Setting) -> PeftModel:
    """AdaLoRA, PEFT's own: starts at 1.5 times the rank, and keeps the ranks that matter until the mean is `rank`.

    A rank that is left has the scaling alpha / rank of LoRA.
    """
    first = max(setting.rank + 1, round(_WIDER * setting.rank))
    with warnings.catch_warnings():  # that r is not used
        warnings.simplefilter("ignore")
        config = AdaLoraConfig(
            **setting.lora() | {"lora_alpha": setting.alpha * first / setting.rank},
            target_r=setting.rank,
            init_r=first,
            total_step=_LEAST_STEPS,  # until training knows how many there are
            tinit=1,
            tfinal=1,
            orth_reg_weight=_REGULARISED,
        )
    adapted = get_peft_model(model, config)
    for layer in _layers(adapted):
        layer.ranknum["default"].requires_grad_(False)  # on another device than the CPU, PEFT leaves it to train
    return adapted


def train_adalora(adapted: PeftModel) -> Training:
    """The allocator is called until ranks are final, and the loss has the penalty that the method asks for."""
    return Training(
        callbacks=[Allocate(adapted)],
        penalty=lambda: penalty(adapted),
        final_after=lambda steps: steps - _last(steps) + 1,
        said=lambda: budget(adapted),
    )


class Allocate(TrainerCallback):
    """Has PEFT's allocator choose which ranks of which modules go on, at every optimizer step until the last ones.

    The smoothed importance of every weight, which its choice is made by, lies in the optimizer's state and so in every
    checkpoint. PEFT's own note of the ranks that are left would have it save tensors of other sizes; ranks that have
    gone are zeros here. A step that the gradient scaler of fp16 skipped, its gradients being no numbers, tells the
    allocator nothing; the choice that is final is made at its step nevertheless.
    """

    def __init__(self, adapted: PeftModel) -> None:
        self._tuner: AdaLoraModel = adapted.base_model
        self._ranks = [layer.lora_E["default"] for layer in _layers(adapted)]
        self._gone: list[Tensor] = []

    @property
    def _config(self) -> AdaLoraConfig:
        return self._tuner.peft_config["default"]

    @property
    def _final(self) -> int:
        """The step, counted from 0, at which the ranks that stay are chosen."""
        return self._config.total_step - self._config.tfinal

    def on_train_begin(self, args, state, control, **kwargs):
        steps, config = state.max_steps, self._config
        if steps < _LEAST_STEPS:
            raise PartialLoraError(f"method=adalora: expected at least {_LEAST_STEPS} optimizer steps, got {steps}")
        config.total_step = steps
        config.tinit, config.tfinal = max(1, int(_WHOLE * steps)), _last(steps)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step > self._final and not self._gone:  # once, of this attempt
            self._gone = [rank == 0 for rank in self._ranks]

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step > self._final:  # Adam moves what is zero, too
            with torch.no_grad():
                for rank, gone in zip(self._ranks, self._gone, strict=True):
                    rank.masked_fill_(gone, 0.0)
        elif state.global_step == self._final or not getattr(optimizer, "step_was_skipped", False):
            self._allocate(state.global_step, optimizer)

    def _allocate(self, step: int, optimizer: Optimizer) -> None:
        allocator = self._tuner.rankallocator
        weights = {name: weight for name, weight in self._tuner.model.named_parameters() if weight.requires_grad}
        self._remember(allocator, weights, optimizer)
        if step == self._final and not allocator.exp_avg_ipt:
            raise PartialLoraError(
                f"method=adalora: none of the first {step + 1} steps had finite gradients to choose ranks by: set "
                "trainer.mixed_precision=no"
            )
        self._tuner.update_and_allocate(step)
        for name, weight in weights.items():
            if name in allocator.exp_avg_ipt:
                optimizer.state[weight] |= {key: getattr(allocator, key)[name] for key in _SMOOTHED}
        self._config.rank_pattern = None

    def _remember(self, allocator: RankAllocator, weights: dict[str, nn.Parameter], optimizer: Optimizer) -> None:
        """Give an allocator that has just been made what one before the interruption knew."""
        for name, weight in weights.items():
            if name not in allocator.ipt and _SMOOTHED[0] in optimizer.state.get(weight, ()):
                allocator.ipt[name] = torch.zeros_like(weight)
                for key in _SMOOTHED:
                    getattr(allocator, key)[name] = optimizer.state[weight][key]


def _last(steps: int) -> int:
    """How many steps, of so many, train with the ranks that are final."""
    return max(1, int(_FINAL * steps))


def penalty(adapted: PeftModel) -> Tensor:
    """How far the factors are from orthogonal, ‖A Aᵀ − I‖ and ‖Bᵀ B − I‖ averaged, weighted as PEFT does."""
    found = []
    for layer in _layers(adapted):
        for product in (layer.lora_A["default"], layer.lora_B["default"].T):
            found.append(torch.linalg.norm(product @ product.T - torch.eye(len(product), device=product.device)))
    return _REGULARISED * torch.stack(found).mean()


def budget(adapted: PeftModel) -> dict[str, int]:
    """What the allocator has left: ranks of all modules together, their parameters, and how many it was to leave."""
    ranks = [(layer, int((layer.lora_E["default"] != 0).sum())) for layer in _layers(adapted)]
    return {
        "target_ranks": adapted.base_model.rankallocator.target_bgt,
        "ranks": sum(rank for _, rank in ranks),
        "adapter_final": sum(rank * (layer.in_features + layer.out_features + 1) for layer, rank in ranks),
    }


def _layers(adapted: PeftModel) -> list[AdaLoraLayer]:
    return [layer for layer in adapted.modules() if isinstance(layer, AdaLoraLayer)]


# --- DoRA (Liu et al. 2024, arXiv 2402.09353).


def dora(model: nn.Module, setting: Setting) -> PeftModel:
    """DoRA, PEFT's own: dense LoRA of the direction of every row of W, and a trained length for each."""
    return get_peft_model(model, LoraConfig(**setting.lora(), use_dora=True))


# --- VeRA (Kopiczko et al. 2023, arXiv 2310.11454).


def vera(model: nn.Module, setting: Setting) -> PeftModel:
    """VeRA, PEFT's own: all modules share two frozen random matrices, and each trains two vectors that scale them.

    The rank is `setting.projections`; modules smaller than the largest use a part of the matrices. They are in the
    adapter's file, so that it loads everywhere as it was. There is no alpha: the vectors have its part.
    """
    config = VeraConfig(
        r=setting.projections,
        target_modules=list(setting.target_modules),
        vera_dropout=setting.dropout,
        projection_prng_key=setting.mask_seed,
        modules_to_save=setting.whole() or None,
    )
    return get_peft_model(model, config)


# --- LoRA-FA (Zhang et al. 2023, arXiv 2308.03303).


def lorafa(model: nn.Module, setting: Setting) -> PeftModel:
    """LoRA with A frozen as it was drawn; B alone trains, so that of a module's inputs only A x is kept."""
    adapted = get_peft_model(model, LoraConfig(**setting.lora()))
    for name, parameter in adapted.named_parameters():
        if ".lora_A." in name:
            parameter.requires_grad_(False)
    return adapted


def train_lorafa(adapted: PeftModel) -> Training:
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
