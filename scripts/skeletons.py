"""Skeletons of the models in conf/model, as the installed timm and transformers build them. Downloads nothing.

    python scripts/skeletons.py        # writes partial_lora/models/skeletons.json

`partial-lora info` counts by them without importing either. To be run again where a model of conf/model is added or
changed; tests/models/test_skeleton.py compares the file with what is built.
"""

from __future__ import annotations

import json
import sys

from torch import nn

from partial_lora import models
from partial_lora.files import write_atomic
from partial_lora.models.config import ModelConfig
from partial_lora.models.skeleton import FILE, key_of, skeleton_of
from partial_lora.settings import schema
from partial_lora.settings.compose import composed

_TASKS = {"encoder": "text_table", "causal": "text_generation"}  # of each family; images otherwise
OUTPUTS = 2


def own_task(name: str) -> tuple[str, str]:
    """The family of a model of conf/model, and the task of one's own data that goes with it."""
    family = composed(f"model={name}").model.family
    return family, _TASKS.get(family, "image_table")


def settings_of(name: str) -> ModelConfig:
    """The settings of a model of conf/model."""
    return composed(f"model={name}", f"task={own_task(name)[1]}").model


def empty(model: ModelConfig) -> nn.Module:
    """The model on the meta device."""
    geometry = {"family": model.family, "architecture": model.architecture, "model_args": model.model_args}
    return models.empty(**geometry, num_labels=OUTPUTS)


def tree(module: nn.Module) -> dict:
    """A module and those in it, equal ones that follow each other once."""
    node = {"class": type(module).__name__}
    own = {name: list(parameter.shape) for name, parameter in module._parameters.items() if parameter is not None}
    if own:
        node["parameters"] = own
    runs: list[tuple[str, str, dict]] = []  # the names of the first and the last, and what they are
    for name, child in module.named_children():
        below = tree(child)
        if runs and name.isdecimal() and runs[-1][2] == below and int(runs[-1][1]) + 1 == int(name):
            runs[-1] = (runs[-1][0], name, below)
        else:
            runs.append((name, name, below))
    if runs:
        node["modules"] = {first if first == last else f"{first}-{last}": below for first, last, below in runs}
    return node


def stored(model: ModelConfig) -> dict:
    """What is stored of a model."""
    built = empty(model)
    whole, every = skeleton_of(built), dict(built.named_parameters(remove_duplicate=False))
    return {
        "head": model.head,
        "output": whole.output,
        "config": whole.config,
        "shared": sorted(every.keys() - whole.parameters.keys()),
        "tree": tree(built),
    }


def main() -> int:
    """Write all of them, a line each."""
    every = {}
    for file in sorted((schema.conf_dir() / "model").glob("*.yaml")):
        model = settings_of(file.stem)
        every[key_of(model.family, model.architecture, model.model_args)] = stored(model)
    lines = [f"{json.dumps(key)}: {json.dumps(content)}" for key, content in every.items()]
    write_atomic(FILE, "{\n" + ",\n".join(lines) + "\n}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
