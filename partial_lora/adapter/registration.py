"""Changes to PEFT that the import of this package makes, and every part of PEFT that they need.

PEFT has no door for a method that it does not list: `register_peft_method` refuses it. So `register` writes into PEFT's
maps and wraps some of its functions. Each is named in `REACHES`; a PEFT that lacks one is refused by its name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress
from operator import attrgetter
from os import PathLike
from pathlib import Path
from typing import Any

import peft
import peft.mapping
import peft.utils.hotswap
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.tuners.lora import LoraModel

from partial_lora.adapter import sidecar
from partial_lora.adapter.config import PEFT_TYPE, PartialLoraConfig, saved_file
from partial_lora.adapter.factor import MaskedFactor
from partial_lora.adapter.hotswap import swap_masked
from partial_lora.adapter.model import PartialLoraModel, drawn
from partial_lora.errors import PartialLoraError

REACHES = {
    "mapping.PEFT_TYPE_TO_CONFIG_MAPPING": "the config of each type of adapter",
    "mapping.PEFT_TYPE_TO_TUNER_MAPPING": "the tuner of each type",
    "mapping.PEFT_TYPE_TO_PREFIX_MAPPING": "the prefix of each type's parameters",
    "PeftModel.add_adapter": "puts plain LoRA and masked adapters into one model",
    "PeftModel.load_adapter": "loads a folder with its masks",
    "PeftModel.from_pretrained": "trains a folder with its masks",
    "PeftModel._split_kwargs": "tells the options of the hub from others",
    "tuners.lora.layer.LoraVariant": "computes a masked adapter in PEFT's layers",
    "tuners.lora.variants.ALoraLinearVariant": "refuses to merge an adapter that is invoked",
    "tuners.lora.layer.ParamWrapper": "adapts a parameter that is not a module's weight",
    "tuners.tuners_utils.check_target_module_exists": "matches target_modules",
    "tuners.tuners_utils.check_adapters_to_merge": "names the adapters to merge",
    "tuners.tuners_utils._maybe_include_all_linear_layers": "reads target_modules='all-linear'",
    "tuners.tuners_utils._get_in_out_features": "gives the shape of a quantised layer",
    "utils.hotswap.PEFT_TYPE_TO_CONFIG_MAPPING": "reads the config of an adapter that is swapped in",
    "utils.hotswap.check_hotswap_configs_compatible": "compares it with the one in its place",
    "utils.hotswap.hotswap_adapter_from_state_dict": "puts the tensors in their place",
    "utils.hotswap._get_padded_linear": "pads a factor of a linear layer for a hot swap",
    "utils.hotswap._get_padded_conv2d": "pads a factor of a convolution",
    "utils.hotswap._update_scaling": "sets a scaling, a number or a tensor",
    "utils.other.get_pattern_key": "matches rank_pattern and alpha_pattern",
    "utils.other.AuxiliaryTrainingWrapper": "holds what trains whole",
}
"""Private parts of PEFT that the package uses, which PEFT does not promise to keep: {name in ``peft``: purpose}."""


def check_peft() -> None:
    """Raise AttributeError, by its name, where PEFT lacks one of `REACHES`, or a method that the tuner overrides.

    The override would never be called.
    """
    for name in REACHES:
        attrgetter(name)(peft)
    for name in vars(PartialLoraModel).keys() - PartialLoraModel.OWN:
        getattr(LoraModel, name)


def register() -> None:
    """Register the method with PEFT, once `check_peft` has passed."""
    check_peft()
    peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = PartialLoraConfig
    peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = PartialLoraModel
    peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = PartialLoraModel.prefix
    PeftModel.add_adapter = _beside_others(PeftModel.add_adapter)
    PeftModel.load_adapter = _with_its_masks(PeftModel.load_adapter)
    PeftModel.from_pretrained = classmethod(_trained_with_masks(PeftModel.from_pretrained.__func__))
    swaps = peft.utils.hotswap  # whose functions find each other here, even where a user has imported one before
    swaps.PEFT_TYPE_TO_CONFIG_MAPPING = {**swaps.PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.LORA: _OfFolder}
    swaps.check_hotswap_configs_compatible = _of_plain_lora(swaps.check_hotswap_configs_compatible)
    swaps.hotswap_adapter_from_state_dict = _into_masked(swaps.hotswap_adapter_from_state_dict)
    for name in ("_get_padded_linear", "_get_padded_conv2d"):
        setattr(swaps, name, _widened(getattr(swaps, name)))


def _beside_others(add_adapter: Callable) -> Callable:
    """Return PEFT's add_adapter, made to put plain LoRA and masked adapters into one model.

    PEFT keeps one type of adapter in a model. PartialLoraModel is a LoraModel that leaves plain LoRA alone, so it does
    for both.
    """

    @functools.wraps(add_adapter)
    def add(model: PeftModel, adapter_name: str, peft_config: PeftConfig, *args, **kwargs) -> None:
        if {model.peft_type, peft_config.peft_type} != {PeftType.LORA, PEFT_TYPE}:
            return add_adapter(model, adapter_name, peft_config, *args, **kwargs)
        kind, name = type(model.base_model), model.peft_type
        model.base_model.__class__ = PartialLoraModel
        model.peft_type = peft_config.peft_type  # which PEFT compares
        try:
            add_adapter(model, adapter_name, peft_config, *args, **kwargs)
            kind, name = PartialLoraModel, PEFT_TYPE
        finally:
            model.base_model.__class__, model.peft_type = kind, name

    return add


def _with_its_masks(load_adapter: Callable) -> Callable:
    """Return PEFT's load_adapter, made to load a folder or repository of ours with its masks: to train, or beside
    masked adapters.

    Else it is plain LoRA, as for PEFT alone. Values of other masks than the adapter's are refused. Those of a smaller
    mask would fit a larger one, but its scaling would be another, and the optimizer's state beside them, in a Trainer's
    checkpoint, would not fit, which torch does not check: it writes past the end. PEFT tells a tuner the tensors, not
    their folder.
    """

    @functools.wraps(load_adapter)
    def load(
        model: PeftModel, model_id: str | PathLike, adapter_name: str, is_trainable: bool = False, *args, **kwargs
    ) -> Any:
        config, (of_hub, _) = model.peft_config.get(adapter_name), model._split_kwargs(kwargs)
        is_new, path = config is None and (is_trainable or model.peft_type == PEFT_TYPE), None
        if is_new or isinstance(config, PartialLoraConfig):
            path = _masks_of(model_id, **of_hub)
        if path and is_new:
            config = PartialLoraConfig.from_pretrained(str(model_id), **of_hub)
            config.inference_mode = not is_trainable
            options = {key: kwargs[key] for key in ("low_cpu_mem_usage", "autocast_adapter_dtype") if key in kwargs}
            model.add_adapter(adapter_name, config, **options)
            if is_trainable:
                model.set_requires_grad(adapter_name)
        elif path:
            modules = sidecar.read(path)["modules"]
            if config.expected != modules:  # which its masks were compared with
                sidecar.verify(*drawn(model, adapter_name), modules)
        return load_adapter(model, model_id, adapter_name, is_trainable, *args, **kwargs)

    return load


def _trained_with_masks(from_pretrained: Callable) -> Callable:
    """Return PeftModel.from_pretrained, made to train a folder or repository of ours with its masks.

    A config asks for itself: with a LoraConfig such a folder trains as dense LoRA.
    """

    @functools.wraps(from_pretrained)
    def load(
        cls: type[PeftModel],
        model: Any,
        model_id: str | PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        **kwargs,
    ) -> PeftModel:
        of_hub, _ = cls._split_kwargs(kwargs)
        if config is None and is_trainable and _masks_of(model_id, **of_hub):
            config = PartialLoraConfig.from_pretrained(str(model_id), **of_hub)
        return from_pretrained(cls, model, model_id, adapter_name, is_trainable, config, **kwargs)

    return load


def _masks_of(folder: str | PathLike, **of_hub: Any) -> Path | None:
    """Return the sidecar of a folder or repository; None where there is none, or no way to it, which PEFT then says."""
    with suppress(PartialLoraError):
        path = saved_file(folder, sidecar.FILE_NAME, **of_hub)
        return path if path.is_file() else None
    return None


class _OfFolder:
    """LoraConfig, as a hot swap reads it: it knows where it is from, and so where its masks are."""

    @staticmethod
    def from_pretrained(folder: str, **options: Any) -> LoraConfig:
        """Return the config of a folder or repository."""
        config = LoraConfig.from_pretrained(folder, **options)
        config.folder = functools.partial(PartialLoraConfig.from_pretrained, str(folder), **options)
        return config


def _of_plain_lora(check: Callable) -> Callable:
    """Return PEFT's comparison of two configs, which leaves masked adapters to `swap_masked`."""

    @functools.wraps(check)
    def compare(config0: PeftConfig, config1: PeftConfig) -> None:
        if not isinstance(config0, PartialLoraConfig):
            check(config0, config1)

    return compare


def _into_masked(swap_tensors: Callable) -> Callable:
    """Return PEFT's hot swap, made to swap a masked adapter for a masked one, too."""

    @functools.wraps(swap_tensors)
    def swap(model: Any, state_dict: dict, adapter_name: str, config: LoraConfig, *args, **kwargs) -> None:
        if not isinstance(getattr(model, "peft_config", {}).get(adapter_name), PartialLoraConfig):
            swap_tensors(model, state_dict, adapter_name, config, *args, **kwargs)
        elif hasattr(config, "folder"):
            swap_masked(model, state_dict, adapter_name, config.folder())
        else:  # tensors do not tell the masks
            raise PartialLoraError(f"{adapter_name!r} is masked: expected hotswap_adapter with a folder of masks.")

    return swap


def _widened(pad: Callable) -> Callable:
    """Return PEFT's function that pads a factor to a rank, made to leave a masked one masked."""

    @functools.wraps(pad)
    def padded(factor: Any, target_rank: int, *args, **kwargs) -> Any:
        if isinstance(factor, MaskedFactor):
            return factor.widen(target_rank)
        return pad(factor, target_rank, *args, **kwargs)

    return padded
