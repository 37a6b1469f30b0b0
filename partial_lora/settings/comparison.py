"""The settings of `compare` itself: what is compared, under which limit, and how much may be spent to decide it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Optional

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from partial_lora.errors import PartialLoraError, one_of, positive, require
from partial_lora.methods import called
from partial_lora.settings.arguments import is_file, is_record, settings_of
from partial_lora.settings.study import commands

_INSTEAD = {  # of keys of `train` that a comparison sets
    "seed": "seeds=N: compare takes seeds 0 to N − 1",
    "method": "methods=[…]",
    "calibration.budget": "budgets=[…]",
}


LIMITS = {  # of `limit.NAME`: what is limited, and its unit
    "served": ("file that is served", "bytes"),
    "kept": ("kept for the backward pass", "bytes"),
    "memory": ("peak memory", "bytes"),
    "seconds": ("a step", "seconds"),
}
# What `methods=auto` tries, in the order of the mean difference from low_rank in results/race and forms, and how
# many of them it takes.
CANDIDATES = (
    *("hira", "oft", "entries", "unilora", "lokr", "random_weights"),
    *("low_rank", "lori", "gralora", "partial", "lorafa"),
)
TAKEN = 4
QUICK, FULL, EVERY = "quick", "full", "auto"
_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9}


@dataclass
class Comparison:
    """Methods that are compared, and how.

    budgets: shares of dense LoRA's parameters, or numbers of parameters. limit: one of LIMITS, by name, in place of
    budgets. serve: leave out what servers cannot load. margin: points within which a method is as good as another.
    hours: that it may take; None: as many as it needs. jobs: runs side by side; None: one
    on an accelerator, else as many as cores and memory allow. search: "quick" drops learning rates at a quarter of
    their steps, "full" trains them all. seeds: of every method; None: two, and up to eight where they decide. rates:
    with which a search begins. reference: the method that others are compared with; by default low_rank, else the
    first.
    """

    methods: list[str]
    budgets: list[int | float] = field(default_factory=lambda: [0.13])
    limit: dict[str, Any] = field(default_factory=dict)
    serve: bool = False
    margin: float = 1.0
    hours: Optional[float] = None
    jobs: Optional[int] = None
    search: str = QUICK
    seeds: Optional[int] = None
    rates: Optional[int] = None
    reference: Optional[str] = None

    def __post_init__(self) -> None:
        methods = bool(self.methods)
        require(methods, "methods", self.methods, "some of conf/method, such as [partial,low_rank,lokr], or auto")
        numbers = bool(self.budgets) and all(0 < budget < math.inf for budget in self.budgets)
        require(numbers, "budgets", self.budgets, "shares or numbers of parameters, such as [0.13,0.02]")
        require(len(self.limit) < 2, "limit", ", ".join(self.limit), "one of them: one limit sizes every method")
        for name, value in self.limit.items():
            one_of("limit", name, *LIMITS)
            self.limit[name] = _quantity(f"limit.{name}", value, LIMITS[name][1])
        one_of("search", self.search, QUICK, FULL)
        positive("margin", self.margin)
        if self.hours is not None:
            positive("hours", self.hours)
        is_full = self.search == FULL
        self.rates = self.rates or (5 if is_full else 3)
        self.seeds = 3 if self.seeds is None and is_full else self.seeds
        for key, least in (("seeds", 1), ("rates", 2), ("jobs", 1)):
            value = getattr(self, key)
            require(value is None or value >= least, key, value, f"a whole number, at least {least}")
        if self.methods == [EVERY]:
            return
        usual = (method for method in self.methods if called(method).reference)
        self.reference = self.reference or next(usual, self.methods[0])
        known = ", ".join(self.methods)
        require(self.reference in self.methods, "reference", self.reference, f"one of {known}")


def _quantity(key: str, value: object, unit: str) -> float:
    """Return a number of bytes or seconds; raises PartialLoraError, naming the key, for anything else."""
    match = re.fullmatch(r"\s*(\d*\.?\d+(?:e[+-]?\d+)?)\s*([A-Z]*)\s*", str(value), re.IGNORECASE)
    number, name = match.groups() if match else ("0", "")
    scale = _UNITS.get(name.upper()) if unit == "bytes" or not name else None
    fits = scale is not None and 0 < float(number) < math.inf
    require(fits, key, value, "bytes, such as 40MB" if unit == "bytes" else "seconds, such as 0.2")
    return float(number) * scale


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
    own, others = ["methods=[]"], []
    for setting in settings:
        key, _, value = setting.partition("=")
        if key in ("methods", "budgets") and not value.startswith("["):
            setting = f"{key}=[{value}]"
        (own if key.partition(".")[0] in names else others).append(setting)
    try:
        typed = OmegaConf.merge(OmegaConf.structured(Comparison), OmegaConf.from_dotlist(own))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        key = getattr(error, "full_key", None) or ", ".join(own[1:])
        raise PartialLoraError(f"{key}: {str(error).splitlines()[0]}") from error
    comparison = OmegaConf.to_object(typed)
    for setting in others:
        key, _, value = setting.lstrip("+~").partition("=")
        require(key not in _INSTEAD, key, value, _INSTEAD.get(key, ""))
    written = [settings_of(setting) for setting in others if is_file(setting)]
    in_file = any("results_dir" in content and not is_record(content) for content in written)
    if not in_file and not any(setting.startswith("results_dir=") for setting in others):
        others.append("results_dir=results/compare")
    if not any(setting.startswith("trainer.start=") for setting in others):
        others.append("trainer.start=fork")  # some seconds less a run, and the same results
    return comparison, others
