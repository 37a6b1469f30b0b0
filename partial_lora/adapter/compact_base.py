"""Whether a model is one that a compact adapter can be read into, and by which of its parameters that is known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from partial_lora.adapter.compact_file import Compact
from partial_lora.adapter.config import PartialLoraConfig
from partial_lora.adapter.fingerprint import base_parameters, fingerprint
from partial_lora.adapter.geometry import geometry
from partial_lora.adapter.model import PartialLoraModel
from partial_lora.errors import PartialLoraError


def check_model(model: nn.Module, adapter_name: str) -> None:
    """Raise PartialLoraError for a model that takes no adapter of this name."""
    if isinstance(model, PeftModel):
        if not isinstance(model.base_model, PartialLoraModel):
            raise PartialLoraError("the model has adapters of another method: load into the base model itself.")
        if adapter_name in model.peft_config:
            raise PartialLoraError(f"adapter_name is {adapter_name!r}: the model has one of that name, choose another.")
    elif any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise PartialLoraError("the model has adapters but is no PeftModel: load into the base model itself.")
    refuse_merged(model)


def refuse_merged(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise PartialLoraError(f"{name} has an adapter merged into its base weight: call unmerge_adapter() first.")


def check_geometries(base: nn.Module, compact: Compact, path: Path) -> None:
    """Raise PartialLoraError, naming it, where ``base`` lacks a module of the adapter or has it in another shape."""
    modules = modules_of(base)
    for name, expected in compact.geometries.items():
        if name not in modules:
            raise PartialLoraError(f"{path}: this model has no module {name}, which the adapter is for.")
        here = geometry(name, modules[name], compact.config.r)
        if here != expected:
            raise PartialLoraError(
                f"{path}: {name} is {here.shape[0]} x {here.shape[1]} in this model (A {here.a}, B {here.b}), but"
                f" {expected.shape[0]} x {expected.shape[1]} in the adapter (A {expected.a}, B {expected.b})."
            )


def check_values(base: nn.Module, compact: Compact, path: Path) -> None:
    """Raise PartialLoraError where the fingerprint of ``base`` is not of the model the adapter belongs to."""
    if not compact.base.agrees(fingerprint(base, exclude=trained_whole(base, compact.config, compact.whole))):
        known = compact.config.base_model_name_or_path
        raise PartialLoraError(
            f"{path}: the weights of this model are not those of the base model that the adapter belongs to"
            f"{f' ({known})' if known else ''}: load that one, anew if an adapter was merged into it; check_base=False "
            "loads all the same, as where tokens were added since."
        )


def trained_whole(base: nn.Module, config: PartialLoraConfig, whole: Mapping[str, Tensor]) -> set[str]:
    """The parameters of ``base``, by name, that the adapter has of its own, so that they say nothing about the base."""
    heads = tuple(config.modules_to_save or ())
    copied = tuple(f"{name}." for name in modules_of(base) if heads and name.endswith(heads))
    own = {name.replace(".base_layer", "") for name in whole}
    tokens = [module.weight for module in _token_embeddings(base, config)]  # and what is tied to them
    return {
        name
        for name, _, parameter in base_parameters(base)
        if name in own or name.startswith(copied) or any(parameter is weight for weight in tokens)
    }


def _token_embeddings(base: nn.Module, config: PartialLoraConfig) -> list[nn.Module]:
    """The embeddings of which rows train (trainable_token_indices), whose other rows say too little about the base."""
    tokens = config.trainable_token_indices
    if not tokens:
        return []
    if isinstance(tokens, dict):
        found = [module for name, module in modules_of(base).items() if name.endswith(tuple(tokens))]
    else:
        found = [base.get_input_embeddings()]
    return [_without_wrapper(module) for module in found]


def _without_wrapper(module: nn.Module) -> nn.Module:
    while isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    return module


def modules_of(base: nn.Module) -> dict[str, nn.Module]:
    """The modules of a base model by their names as loaded, whether or not torch.compile has wrapped it since."""
    return {name.replace("_orig_mod.", ""): module for name, module in base.named_modules()}
