"""Which options of LoRA go with masks: an allow-list over every field of LoraConfig."""

from __future__ import annotations

import re
from dataclasses import MISSING, Field, fields
from numbers import Integral

from peft import LoraConfig

from partial_lora.errors import PartialLoraError

PASSED = frozenset(
    {
        # What is adapted, and what trains beside it.
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("modules_to_save", "trainable_token_indices", "bias", "ensure_weight_tying"),
        # How each adapter is sized, scaled, drawn and run.
        *("r", "lora_alpha", "alpha_pattern", "use_rslora", "lora_dropout", "init_lora_weights", "fan_in_fan_out"),
        *("inference_mode", "runtime_config"),
        # What the adapter says of itself.
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    }
)

REFUSED = {
    "use_dora": "its magnitudes are trained densely",
    "rank_pattern": "every module has one rank, which is what other readers of the adapter expect",
    "lora_bias": "it would train entries that no mask covers",
    "target_parameters": "only linear layers and convolutions are masked, not single parameters",
    "layer_replication": "two modules would share one name, and their masks",
    "use_qalora": "it pools the columns that a mask tells apart",
    "qalora_group_size": "it belongs to use_qalora",
    "use_bdlora": "its factors are block diagonal",
    "velora_config": "it replaces the backward pass",
    "alora_invocation_tokens": "it replaces the forward pass",
    "arrow_config": "it replaces the forward pass",
    "kasa_config": "it changes the base weights and trains singular values densely",
    "monteclora_config": "it samples dense factors",
    "megatron_config": "its layers are split over devices",
    "megatron_core": "it belongs to megatron_config",
    "loftq_config": "it belongs to an initialisation that fits dense factors to the base weights",
    "eva_config": "it belongs to an initialisation that fits dense factors to data",
    "corda_config": "it belongs to an initialisation that fits dense factors to data",
    "lora_ga_config": "it belongs to an initialisation that fits dense factors to gradients",
}
"""What the masked form cannot hold, and why. Each must have its default."""


def refuse_options(config: LoraConfig) -> None:
    """Raise PartialLoraError, naming the option, if ``config`` sets one of LoRA's that does not go with masks.

    An option of a PEFT that is more recent than this list is refused too, unless it has its default.
    """
    for option in fields(LoraConfig):
        value = getattr(config, option.name)
        if option.name in PASSED or _is_default(option, value):
            continue
        reason = REFUSED.get(option.name, "this version of partial-lora does not know the option")
        raise PartialLoraError(f"{option.name}={value!r} does not go with Partial-LoRA: {reason}.")
    if not isinstance(config.init_lora_weights, bool) and config.init_lora_weights != "gaussian":
        raise PartialLoraError(
            f"init_lora_weights={config.init_lora_weights!r} does not go with Partial-LoRA: its values depend on each"
            " other, so that no part of them can be left out; use True, 'gaussian' or False."
        )
    for name in ("target_modules", "exclude_modules"):
        _refuse_pattern(name, getattr(config, name))
    if not isinstance(config.r, Integral) or isinstance(config.r, bool) or config.r < 1:
        raise PartialLoraError(f"r is {config.r!r}: the rank is a whole number, at least 1.")


def _refuse_pattern(name: str, given: object) -> None:
    """Raise PartialLoraError for a text that is no regular expression, which a single text is."""
    try:
        re.compile(given if isinstance(given, str) else "")
    except re.error as error:
        raise PartialLoraError(f"{name} is {given!r}: expected names or a regular expression ({error}).") from None


def _is_default(option: Field, value: object) -> bool:
    default = option.default if option.default_factory is MISSING else option.default_factory()
    return value is default or (isinstance(value, type(default)) and value == default)
