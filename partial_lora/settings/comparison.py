"""The settings of `compare` itself: what is compared, at which sizes, with how many seeds and learning rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from partial_lora.errors import PartialLoraError, require
from partial_lora.methods import called
from partial_lora.settings.arguments import is_file, is_record, settings_of
from partial_lora.settings.study import commands

_INSTEAD = {  # of keys of `train` that a comparison sets
    "seed": "seeds=N: compare takes seeds 0 to N − 1",
    "method": "methods=[…]",
    "calibration.budget": "budgets=[…]",
}


@dataclass
class Comparison:
    """Methods that are compared, and how.

    budgets: shares of dense LoRA's parameters, or numbers of parameters. rates: learning rates of a search. reference:
    the method that others are compared with; by default low_rank, else the first.
    """

    methods: list[str]
    budgets: list[float] = field(default_factory=lambda: [0.13])
    seeds: int = 3
    rates: int = 5
    reference: str | None = None

    def __post_init__(self) -> None:
        named = bool(self.methods) and all(isinstance(method, str) for method in self.methods)
        require(named, "methods", self.methods, "some of conf/method, such as [partial,low_rank,lokr]")
        self.budgets = [_as_number(budget) for budget in self.budgets]
        numbers = bool(self.budgets) and all(
            type(each) in (int, float) and 0 < each < math.inf for each in self.budgets
        )
        require(numbers, "budgets", self.budgets, "shares or numbers of parameters, such as [0.13,0.02]")
        for key, least in (("seeds", 1), ("rates", 2)):
            value = getattr(self, key)
            require(type(value) is int and value >= least, key, value, f"a whole number, at least {least}")
        usual = (method for method in self.methods if called(method).reference)
        self.reference = self.reference or next(usual, self.methods[0])
        known = ", ".join(self.methods)
        require(self.reference in self.methods, "reference", self.reference, f"one of {known}")


def of_study(settings: Sequence[str]) -> list[list[str]]:
    """Return the settings of each comparison: as they are or, without methods, those of an experiment's study."""
    named = dict(setting.partition("=")[::2] for setting in settings)
    if "methods" in named or "experiment" not in named:
        return [list(settings)]
    only = {"task": named["task"].split(",")} if "task" in named else {}
    more = [each for each in settings if each.partition("=")[0] not in ("experiment", "task", "data_dir")]
    study = commands(named["experiment"], Path(named.get("data_dir", "data")), only)
    return [[*words[1:], *more] for words in study if words[0] == "compare"] or [list(settings)]


def read(settings: Sequence[str]) -> tuple[Comparison, list[str]]:
    """Return what a command line says of the comparison, and the settings that are those of `train`."""
    names = {each.name for each in fields(Comparison)}
    own: dict[str, object] = {"methods": []}
    others = []
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in names:
            others.append(setting)
            continue
        try:
            own[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise PartialLoraError(f"{key}={value}: expected YAML, such as [a,b]") from error
        if key in ("methods", "budgets") and not isinstance(own[key], list):
            own[key] = [own[key]]
    comparison = Comparison(**own)
    for setting in others:
        key, _, value = setting.lstrip("+~").partition("=")
        require(key not in _INSTEAD, key, value, _INSTEAD.get(key, ""))
    written = [settings_of(setting) for setting in others if is_file(setting)]
    in_file = any("results_dir" in content and not is_record(content) for content in written)
    if not in_file and not any(setting.startswith("results_dir=") for setting in others):
        others.append("results_dir=results/compare")
    return comparison, others


def _as_number(word: object) -> object:
    """Return a text that is a number as one: to YAML 1.1, 1e6 and 1e-2 are texts."""
    try:
        return float(word) if isinstance(word, str) else word
    except ValueError:
        return word
