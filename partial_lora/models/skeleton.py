"""Skeletons of models: names, classes and shapes, from which `partial-lora info` counts without importing torch.

skeletons.json holds the models of conf/model, as timm and transformers build them; a model of another geometry is built
on the meta device. configs.json holds what the files of these models say of them, by their weights.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from partial_lora.errors import PartialLoraError, shortlist
from partial_lora.models.config import value_in

if TYPE_CHECKING:
    from torch import nn

FILE = Path(__file__).with_name("skeletons.json")
CONFIGS = Path(__file__).with_name("configs.json")
ALL_LINEAR = "all-linear"  # as in PEFT: every linear layer but a causal model's output, and fused experts
_CONFIG = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim", "vocab_size")


@dataclass(frozen=True)
class Skeleton:
    """A model without its numbers.

    modules: the class of every module, by full name in the model's order; "" is the model. parameters: shapes by full
    name, those of a shared parameter once. linears: (out, in) of the linear modules with plain weights. output: the
    linear module that gives a causal model's logits. config: the keys of the model's config that decide how much memory
    its activations take. experts: (experts, out, in) of the parameters that hold the weights of several experts.
    """

    modules: Mapping[str, str]
    parameters: Mapping[str, tuple[int, ...]]
    linears: Mapping[str, tuple[int, int]]
    output: str | None = None
    config: Mapping[str, int | str | None] = field(default_factory=dict)
    experts: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The class of the model."""
        return self.modules[""]

    @property
    def _called(self) -> str:
        """The names of the linear modules, for a message."""
        return shortlist(list(dict.fromkeys(name.rpartition(".")[2] for name in self.linears)))

    def size(self, module: str = "") -> int:
        """Count the parameters in a module, or in all of the model."""
        return sum(math.prod(shape) for name, shape in self.parameters.items() if _is_in(name, module))

    def targets(
        self, target_modules: str | Sequence[str], head: str | None = None, new_modules: Sequence[str] = ()
    ) -> dict[str, tuple[int, int]]:
        """Return (out, in) of the modules to adapt, by full name in the model's order, matched as PEFT matches them.

        target_modules: a list of names or suffixes, one regular expression or "all-linear", as PEFT's LoraConfig takes
        them. A name in a list may be that of fused experts, "experts.down_proj", each of which then counts as a module,
        "….experts.down_proj.7". Raises PartialLoraError where nothing matches, where a match is no linear layer with a
        plain weight, and for a head or new module that is not there. These train whole, so patterns pass over them, as
        over PEFT's modules_to_save.
        """
        whole = dict.fromkeys(new_modules, "new_modules") | ({} if head is None else {head: "head"})
        for name, key in whole.items():
            if name not in self.modules:
                raise PartialLoraError(f"model.{key}={name}: {self.kind} has no module of that name")
        if not isinstance(target_modules, Collection):
            raise PartialLoraError(f"target_modules={target_modules}: expected names or a regular expression")
        if ALL_LINEAR in ([target_modules] if isinstance(target_modules, str) else target_modules):
            matched = [name for name in (*self.linears, *self.experts) if name != self.output]
        elif isinstance(target_modules, str):
            try:
                matched = [name for name in self.modules if re.fullmatch(target_modules, name)]
            except re.error as error:
                raise PartialLoraError(f"target_modules={target_modules}: no regular expression ({error})") from error
        else:
            target_modules, ends = list(target_modules), {name: f".{name}" for name in (*self.modules, *self.experts)}
            matched = [name for name in ends if ends[name].endswith(tuple(f".{target}" for target in target_modules))]
            for target in target_modules:
                if not any(ends[name].endswith(f".{target}") for name in matched):
                    raise PartialLoraError(
                        f"target_modules: no module of {self.kind} matches {target!r}; there are {self._called}"
                    )
        matched = [name for name in matched if not any(_is_in(name, module) for module in whole)]
        if not matched:
            raise PartialLoraError(
                f"target_modules={target_modules}: no module of {self.kind} matches; there are {self._called}"
            )
        if unfit := [name for name in matched if name not in self.linears and name not in self.experts]:
            kind, advice = self.modules[unfit[0]], "use longer names to leave it out"
            if "4bit" in kind or "8bit" in kind:
                advice = "calibrate inside `partial_lora.models.dequantised(model)`"
            elif any(name.startswith(f"{unfit[0]}.lora_") for name in self.modules):
                advice = "calibrate before the model gets an adapter"
            raise PartialLoraError(
                f"target_modules={target_modules}: {unfit[0]} is a {kind}, expected nn.Linear with plain weights; "
                f"{advice}"
            )
        shapes = {}
        for name in matched:
            if name in self.linears:
                shapes[name] = self.linears[name]
            else:
                count, *shape = self.experts[name]
                shapes |= {f"{name}.{expert}" if count > 1 else name: tuple(shape) for expert in range(count)}
        return shapes

    def expert_parameters(self, shapes: Collection[str]) -> list[str]:
        """Return the parameters of fused experts among modules to adapt, as `targets` gives them."""
        return [name for name in self.experts if name in shapes or f"{name}.0" in shapes]


def _is_in(name: str, module: str) -> bool:
    return module in ("", name) or name.startswith(f"{module}.")


def skeleton_of(model: nn.Module) -> Skeleton:
    """Return the skeleton of a model, on the meta device or any other."""
    from torch import nn

    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    plain = {name: module.weight for name, module in linears.items() if module.weight.is_floating_point()}
    config = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):  # of a model that reads images, too
        config = config.get_text_config()
    output = model.get_output_embeddings() if hasattr(config, "vocab_size") else None
    return Skeleton(
        modules={name: type(module).__name__ for name, module in model.named_modules()},
        parameters={name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        linears={name: tuple(weight.shape) for name, weight in plain.items() if weight.ndim == 2},
        output=next((name for name, module in linears.items() if module is output), None),
        config={key: value for key in _CONFIG if (value := value_in(config, key)) is not None},
        experts=_experts(model),
    )


def _experts(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Return the parameters of transformers' classes of experts, which hold one weight of each."""
    experts = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if type(module).__name__.endswith("Experts") and parameter.ndim == 3:
                count, *shape = parameter.shape
                is_transposed = getattr(module, "is_transposed", False)
                experts[f"{path}.{name}"] = (count, *(reversed(shape) if is_transposed else shape))
    return experts


def skeleton(*, family: str, architecture: str, model_args: Mapping, outputs: int) -> Skeleton:
    """Return the skeleton of a model with these settings; outputs: how many its head has, where it has one.

    Raises PartialLoraError for an architecture or an argument that the family's library does not know.
    """
    geometry = {"family": family, "architecture": architecture, "model_args": model_args}
    if stored := stored_skeleton(**geometry, outputs=outputs):
        return stored
    from partial_lora.models.family import empty

    return skeleton_of(empty(**geometry, num_labels=outputs))


def stored_skeleton(*, family: str, architecture: str, model_args: Mapping, outputs: int) -> Skeleton | None:
    """Return the skeleton of a model of conf/model; None for another geometry."""
    stored = _content(FILE).get(key_of(family, architecture, model_args))
    return None if stored is None else _read(stored, outputs)


def stored_settings(weights: str) -> Mapping[str, object] | None:
    """Return what the files of a model of conf/model say of it, as `configs.settings_of` would; None for others."""
    return _content(CONFIGS).get(weights)


# --- Skeletons as they are stored: a tree of {class, parameters: {name: shape}, modules: {name: tree}}. A run of equal
# trees is stored once, under the numbers of the first and the last ("0-11").


def key_of(family: str, architecture: str, model_args: Mapping) -> str:
    """Return the name of a geometry among the stored ones."""
    return json.dumps([family, architecture, dict(model_args)], sort_keys=True)


@cache
def _content(file: Path) -> dict[str, dict]:
    return json.loads(file.read_text(encoding="utf-8"))


def _read(stored: Mapping, outputs: int) -> Skeleton:
    modules, parameters, linears = {}, {}, {}
    for name, node in _walk(stored["tree"]):
        modules[name] = node["class"]
        shapes = {key: tuple(shape) for key, shape in node.get("parameters", {}).items()}
        if name == stored["head"]:
            shapes = {key: (outputs, *shape[1:]) for key, shape in shapes.items()}
        parameters |= {f"{name}.{key}" if name else key: shape for key, shape in shapes.items()}
        if node["class"] == "Linear":
            linears[name] = shapes["weight"]
    for name in stored["shared"]:
        del parameters[name]
    return Skeleton(modules, parameters, linears, output=stored["output"], config=stored["config"])


def _walk(node: Mapping, name: str = "") -> Iterator[tuple[str, Mapping]]:
    yield name, node
    for key, child in node.get("modules", {}).items():
        first, _, last = key.partition("-")
        for part in range(int(first), int(last) + 1) if last else [key]:
            yield from _walk(child, f"{name}.{part}" if name else str(part))
