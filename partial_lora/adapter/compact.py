"""Write and load the compact form of an adapter: its kept values, and nothing that can be made again.

The masks are made again from what they were made from, and must be those the adapter was trained with. See
`compact_file` for what the file holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from partial_lora.adapter.compact_base import (
    check_geometries,
    check_model,
    check_values,
    modules_of,
    refuse_merged,
    trained_whole,
)
from partial_lora.adapter.compact_file import FILE_NAME, Compact, decode, encode
from partial_lora.adapter.config import PartialLoraConfig
from partial_lora.adapter.fingerprint import fingerprint
from partial_lora.adapter.geometry import geometry
from partial_lora.adapter.model import module_masks
from partial_lora.adapter.restore import unchanged_on_error
from partial_lora.adapter.sharding import is_sharded
from partial_lora.errors import PartialLoraError
from partial_lora.sealed import write_atomic


def write_compact(
    model: PeftModel, folder: str | Path, adapter_name: str = "default", dtype: torch.dtype | None = None
) -> Path:
    """Write what an adapter keeps into ``folder``, made if need be, and give the file's path.

    The file takes 4 bytes a kept value in float32 (2 in bfloat16), those of a head in modules_to_save included, 4 bytes
    an index where the selection is "top", and less than 400 bytes a module (a head is one, where there are only one
    or two others).

    Args:
        model: any PEFT model with a Partial-LoRA adapter called ``adapter_name``, not merged.
        dtype: torch.float32 or torch.bfloat16, to which values are rounded; None writes them as trained.

    Raises PartialLoraError, and writes nothing, where there is no such adapter, or it is plain LoRA, merged or sharded.
    """
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise PartialLoraError(f"dtype is {dtype}: expected torch.float32, torch.bfloat16, or None for as trained.")
    config = _config_of(model, adapter_name)
    base = model.get_base_model()
    masks = module_masks(model, adapter_name)
    modules = modules_of(base)
    whole = {_plain(key): value for key, value in _whole(model, adapter_name, masks).items()}
    compact = Compact(
        config=config,
        geometries={name: geometry(name, modules[name], config.r) for name in masks},
        masks=masks,
        kept={name: _kept(modules[name], adapter_name) for name in masks},
        whole=whole,
        base=fingerprint(base, exclude=trained_whole(base, config, whole)),
    ).rounded_to(dtype)
    path = Path(folder) / FILE_NAME
    content = encode(compact)
    if decode(content, path).masks != masks:
        raise PartialLoraError(f"adapter {adapter_name!r}: its masks are not those that its config makes again.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    except OSError as error:
        raise PartialLoraError(f"{path} cannot be written ({error.strerror}).") from None
    return path


def read_compact(folder: str | Path) -> tuple[PartialLoraConfig, dict[str, Tensor]]:
    """The config and the kept tensors of a compact adapter, checked as far as they can be without its base model.

    Tensors are called "MODULE.lora_A" (of rows and columns: rank × kept columns), "MODULE.lora_B" (kept rows × rank),
    and as in the base model what trained whole; single entries come as lists (kept,). Raises PartialLoraError, naming
    the file, where it is missing, truncated or broken, and where the masks do not match their digests.
    """
    compact = _read(folder)
    factors = {f"{name}.lora_{factor}": value for name, both in compact.kept.items() for factor, value in both.items()}
    return compact.config, factors | compact.whole


def load_compact(
    model: nn.Module,
    folder: str | Path,
    adapter_name: str = "default",
    is_trainable: bool = False,
    check_base: bool = True,
) -> PeftModel:
    """The base ``model`` with the compact adapter in ``folder``, masked, its values as they were written, bit for bit.

    A PeftModel with other Partial-LoRA adapters gets this one beside them, not activated, as by PEFT's load_adapter.
    Values that were rounded when written load in the dtype PEFT gives an adapter (float32 for a base in half
    precision). Everything else is as with PeftModel.from_pretrained.

    check_base: False takes it on trust that the values of the base are those the adapter was trained over, where the
    fingerprint cannot know: rows of an embedding that `resize_token_embeddings` has drawn anew, say.

    Raises PartialLoraError, and leaves the model as it was, for what `read_compact` refuses, a missing module, a wrong
    shape, another base model (see `fingerprint`) and a name that is taken.
    """
    compact = _read(folder)
    path = Path(folder) / FILE_NAME
    is_adapted = isinstance(model, PeftModel)
    check_model(model, adapter_name)
    base = model.get_base_model() if is_adapted else model
    check_geometries(base, compact, path)
    if check_base:
        check_values(base, compact, path)
    config = compact.config
    config.inference_mode = not is_trainable
    try:
        with unchanged_on_error(model):
            if is_adapted:
                adapted = model
                adapted.add_adapter(adapter_name, config)
                if is_trainable:
                    adapted.set_requires_grad(adapter_name)
            else:
                kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
                adapted = kind(model, config, adapter_name)
            _check_built(adapted, compact, adapter_name)
            _fill(adapted, compact, adapter_name)
            if not is_trainable:
                adapted.eval()
    except (PartialLoraError, ValueError, TypeError, RuntimeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise PartialLoraError(f"{path} does not fit this model: {reason}") from error
    return adapted


def _read(folder: str | Path) -> Compact:
    path = Path(folder) / FILE_NAME
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PartialLoraError(f"{path} cannot be read ({error.strerror}): expected a compact adapter.") from None
    return decode(content, path)


def _config_of(model: nn.Module, adapter_name: str) -> PartialLoraConfig:
    """The config of an adapter that can be written; raises PartialLoraError for any other."""
    if not isinstance(model, PeftModel):
        raise PartialLoraError(f"a compact adapter is written from a PeftModel, not from a {type(model).__name__}.")
    if adapter_name not in model.peft_config:
        known = ", ".join(map(repr, model.peft_config))
        raise PartialLoraError(f"adapter_name is {adapter_name!r}: the model has {known}.")
    config = model.peft_config[adapter_name]
    if not isinstance(config, PartialLoraConfig):
        raise PartialLoraError(
            f"adapter {adapter_name!r} is a {type(config).__name__}, which masks nothing: use save_pretrained."
        )
    refuse_merged(model)
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise PartialLoraError(f"{name} is spread over processes: use save_pretrained, which puts it together.")
    return config


def _check_built(adapted: PeftModel, compact: Compact, adapter_name: str) -> None:
    """Raise PartialLoraError where the adapter just built has other masks or tensors than the file."""
    if module_masks(adapted, adapter_name) != compact.masks:
        raise PartialLoraError("the masks made again for this model are not those of the file.")
    here = {_plain(key): value for key, value in _whole(adapted, adapter_name, compact.masks).items()}
    for name in sorted(here.keys() ^ compact.whole.keys()):
        where = "the file" if name in here else "this model"
        raise PartialLoraError(f"{name} trains beside the adapter, but {where} does not have it.")
    for name, value in sorted(compact.whole.items()):
        if here[name].shape != value.shape:
            raise PartialLoraError(
                f"{name} is {list(here[name].shape)} in this model, but {list(value.shape)} in the file."
            )


def _fill(adapted: PeftModel, compact: Compact, adapter_name: str) -> None:
    """Put the file's values into the adapter just built."""
    modules = modules_of(adapted.get_base_model())
    for name, factors in compact.kept.items():
        for factor, value in factors.items():
            own = getattr(modules[name], f"lora_{factor}")[adapter_name].kept
            dtype = own.dtype if compact.rounded else value.dtype
            own.data = value.to(own.device, dtype).reshape(own.shape)
    for name, module in modules.items():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            for key, own in module.modules_to_save[adapter_name].named_parameters():
                value = compact.whole[f"{name}.{key}"]
                own.data = own.data.to(torch.promote_types(own.dtype, value.dtype))  # as wide as what it is to hold
    with torch.no_grad():
        for key, own in _whole(adapted, adapter_name, compact.masks).items():
            own.copy_(compact.whole[_plain(key)])


def _kept(layer: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    factors = {"A": layer.lora_A[adapter_name], "B": layer.lora_B[adapter_name]}
    return {name: factor.kept.detach().cpu() for name, factor in factors.items()}


def _whole(model: PeftModel, adapter_name: str, masked: Mapping[str, object]) -> dict[str, Tensor]:
    """What PEFT saves of an adapter beside the masked factors, by PEFT's keys; the tensors are the model's own."""
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    factors = {f"{name}.lora_{factor}.weight" for name in masked for factor in "AB"}
    again = (".modules_to_save.", ".original_module.")  # with bias="all", biases of a head are there once more
    return {
        key: value
        for key, value in state.items()
        if _plain(key) not in factors and not any(part in key for part in again)
    }


def _plain(key: str) -> str:
    return key.removeprefix("base_model.model.").replace("_orig_mod.", "")
