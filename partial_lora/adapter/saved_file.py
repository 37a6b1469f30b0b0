"""The values of a saved adapter: there for every module that its masks are for, before a model is touched."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from partial_lora.errors import PartialLoraError


def check_values(folder: Path, modules: Collection[str]) -> None:
    """Refuse a folder whose adapter_model.safetensors is cut short or lacks a factor of one of ``modules``.

    PEFT only warns of the second, and of the first says so after it has changed the model. Reads the file's header
    alone; a folder without such a file is PEFT's to judge. Raises PartialLoraError, naming the file and the module.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return
    try:
        with safe_open(path, "pt") as file:
            keys = {key.replace("_orig_mod.", "").removeprefix("base_model.model.") for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise PartialLoraError(f"{path} is broken or truncated ({error}): copy it again.") from None
    for module in modules:
        for factor in ("lora_A", "lora_B"):
            if f"{module}.{factor}.weight" not in keys:
                raise PartialLoraError(f"{path} has no {factor} of {module}, which its masks are for: copy it again.")
