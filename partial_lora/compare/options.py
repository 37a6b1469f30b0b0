"""The settings of `compare` itself: what is compared, under which limit, and how much may be spent to decide it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from partial_lora.compare.rate_search import FINALISTS, HALF, QUARTER, SURVIVORS, runs_at_least
from partial_lora.errors import PartialLoraError, one_of, require
from partial_lora.files import flatten
from partial_lora.methods import called
from partial_lora.settings.arguments import is_file, is_record, parsed, settings_of
from partial_lora.settings.compose import checked
from partial_lora.settings.study_commands import commands

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
# What `methods=auto` tries, in the order of the mean difference from lora in results/race.
CANDIDATES = (
    *("hira", "oft", "entries", "unilora", "lokr", "random_weights"),
    *("lora", "lori", "gralora", "partial", "lorafa"),
)
QUICK, FULL, EVERY = "quick", "full", "auto"
_UNITS = {"bytes": {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9}, "seconds": {"": 1, "S": 1}}


@dataclass
class Options:
    """Methods that are compared, and how.

    budgets: shares of dense LoRA's parameters, or numbers of parameters; null: as without a budget. limit: one of
    LIMITS, by name, in place of budgets. serve: leave out what servers cannot load. margin: points within which a
    method is as good as another. hours: that it may take; None: as many as it needs. jobs: runs side by side; None: one
    on an accelerator, else as many as cores and memory allow. search: "quick" drops learning rates at a quarter of
    their steps, "full" trains them all. seeds: of every method; None: two, and up to eight where they decide. rates:
    with which a search begins. reference: the method that others are compared with; by default lora, else the first.
    forgets: other sets, files or tasks by name, on which runs are measured before and after their training.
    """

    methods: list[str]
    budgets: list[float | None] = field(default_factory=lambda: [0.13])
    limit: dict[str, float] = field(default_factory=dict)
    serve: bool = False
    margin: float = 1.0
    hours: float | None = None
    jobs: int | None = None
    search: str = QUICK
    seeds: int | None = None
    rates: int | None = None
    reference: str | None = None
    forgets: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        sets = all(isinstance(one, str) and one for one in self.forgets)
        require(sets, "forgets", self.forgets, "a file of rows or the name of a task, or several in brackets")
        named = bool(self.methods) and all(isinstance(method, str) and method for method in self.methods)
        require(named, "methods", self.methods, "some of conf/method, such as [partial,lora,lokr], or auto")
        numbers = self.budgets == [None] or (bool(self.budgets) and all(map(_is_positive, self.budgets)))
        require(numbers, "budgets", self.budgets, "shares or numbers of parameters, such as [0.13,0.02], or null")
        require(len(self.limit) < 2, "limit", ", ".join(self.limit), "one of them: one limit sizes every method")
        for name, value in self.limit.items():
            self.limit[name] = _quantity(f"limit.{name}", value, LIMITS[name][1])
        one_of("search", self.search, QUICK, FULL)
        require(_is_positive(self.margin), "margin", self.margin, "points, such as 1")
        require(self.hours is None or _is_positive(self.hours), "hours", self.hours, "a number above 0, such as 0.5")
        is_full = self.search == FULL
        self.rates = (5 if is_full else 3) if self.rates is None else self.rates
        self.seeds = 3 if self.seeds is None and is_full else self.seeds
        for key, least in (("seeds", 1), ("rates", 2), ("jobs", 1)):
            value = getattr(self, key)
            whole = type(value) is int and value >= least
            require(whole or (value is None and key != "rates"), key, value, f"a whole number, at least {least}")
        one_of("serve", self.serve, True, False)
        methods = CANDIDATES if self.methods == [EVERY] else self.methods
        usual = (method for method in methods if called(method).reference)
        self.reference = self.reference or next(usual, methods[0])
        require(self.reference in methods, "reference", self.reference, f"one of {', '.join(methods)}")

    @property
    def until(self) -> float:
        """The share of its steps after which a search looks at a run."""
        return 1.0 if self.search == FULL else QUARTER

    def is_race(self, methods: int) -> bool:
        """Return whether some of so many methods are dropped after half a run: not where all have as many seeds."""
        return self.search == QUICK and self.seeds is None and methods > SURVIVORS

    def runs_of(self, methods: int, seeds: int) -> float:
        """Return how many whole runs so many methods take, searches included, if so many seeds decide.

        They are more at edges, and where validation tells few methods apart.
        """
        if self.search == FULL:
            return methods * runs_at_least(self.rates, seeds)
        raced, left = (HALF - QUARTER, SURVIVORS) if self.is_race(methods) else (0.0, methods)
        to_the_end = FINALISTS * (1 - QUARTER) - raced + seeds - 1
        return methods * (self.rates * QUARTER + raced) + left * to_the_end


def _is_positive(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _quantity(key: str, value: object, unit: str) -> float:
    """Return a number of bytes or seconds; raises PartialLoraError, naming the key, for anything else."""
    written = re.fullmatch(r"\s*(\d*\.?\d+(?:e[+-]?\d+)?)\s*([A-Za-z]*)\s*", str(value))
    number, scale = (float(written[1]), _UNITS[unit].get(written[2].upper())) if written else (0.0, None)
    fits = _is_positive(number) and scale is not None
    require(fits, key, value, "bytes, such as 40MB" if unit == "bytes" else "seconds, such as 0.2")
    return number * scale


def of_study(settings: Sequence[str]) -> list[list[str]]:
    """Return the settings of each comparison: as they are or, without methods, those of an experiment's study."""
    named = dict(setting.partition("=")[::2] for setting in settings)
    if "methods" in named or "experiment" not in named:
        return [list(settings)]
    only = {"preset": {named.get("preset", "cpu")}}
    only |= {key: set(named[key].split(",")) for key in ("task", "stage") if key in named}
    chosen = ("experiment", "task", "stage", "data_dir", "preset")
    more = [setting for setting in settings if setting.partition("=")[0] not in chosen]
    data = Path(named.get("data_dir", "data"))
    require("data_dir" not in named or data.is_dir(), "data_dir", data, "an existing folder")
    study = [[*words[1:], *more] for words in commands(named["experiment"], data, only) if words[0] == "compare"]
    if any(key.startswith("limit.") for key in named):  # which sizes methods in place of the study's budgets
        study = [[word for word in words if not word.startswith("budgets=")] for words in study]
    require(bool(study), "experiment", named["experiment"], f"a study of comparisons whose data sets are in {data}")
    return study


def of_one(parts: Sequence[Options]) -> Options:
    """Return the settings of comparisons that are made as one; raises PartialLoraError where they are not the same."""
    first = parts[0]
    for key in (option.name for option in fields(Options) if option.name not in ("methods", "budgets", "reference")):
        values = list(dict.fromkeys(str(getattr(part, key)) for part in parts))
        require(len(values) == 1, key, " and ".join(values), "one value for a whole study")
    return first


def check(options: Options, overrides: Sequence[str]) -> None:
    """Raise PartialLoraError for a key or a method that `train` does not know, or for several values of a key.

    It is known in a second, before the libraries that count and train are imported.
    """
    methods = [CANDIDATES[0]] if options.methods == [EVERY] else options.methods
    planned = checked(["-m", *overrides, f"method={','.join(dict.fromkeys(methods))}"])
    if swept := ", ".join(sorted(planned.swept - {"method"})):
        raise PartialLoraError(f"{swept}: expected one value; compare sweeps learning rates and seeds by itself")


def read(settings: Sequence[str]) -> tuple[Options, list[str]]:
    """Return what a command line says of the comparison, and the settings that are those of `train`."""
    names = {field.name for field in fields(Options)}
    values: dict[str, Any] = {"methods": []}
    others = []
    for setting in settings:
        key, _, value = setting.partition("=")
        if key.startswith("limit."):
            name = key.removeprefix("limit.")
            one_of("limit", name, *LIMITS)
            values.setdefault("limit", {})[name] = value
            continue
        if key not in names or key == "limit":
            others.append(setting)
            continue
        written = parsed(setting)
        require(written is not None and not written.is_sweep_override(), key, value, "one value, such as [a,b]")
        values[key] = written.value()
        if key == "budgets" and values[key] is None:
            values[key] = [None]
        if key in ("methods", "budgets", "forgets") and not isinstance(values[key], (list, type(None))):
            values[key] = [values[key]]
    is_sized = "limit" in values and "budgets" in values
    require(not is_sized, "budgets", values.get("budgets"), "no budgets beside a limit, which sizes every method")
    given: dict[str, object] = {}
    for setting in others:
        if not is_file(setting):
            key, _, value = setting.lstrip("+~").partition("=")
            require(key not in _INSTEAD, key, value, _INSTEAD.get(key, ""))
            given[key] = value
        elif not is_record(content := settings_of(setting)):  # a record has all keys, those that are replaced, too
            for key, value in flatten(content).items():
                typed = _INSTEAD.get(key.removesuffix(".name"))
                is_own = key.partition(".")[0] in names
                require(not typed and not is_own, f"{setting}: {key}", value, typed or f"{key}=… on the command line")
                given[key] = value
    options = Options(**values)
    # Forked workers take some seconds less a run, and the results are the same.
    usual = {"results_dir": "results/compare", "trainer.start": "fork"}
    return options, others + [f"{key}={value}" for key, value in usual.items() if key not in given]
