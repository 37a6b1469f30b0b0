"""What a command line asks for: one run, or the runs of a sweep, composed and checked before any of them starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from partial_lora.errors import PartialLoraError

CONFIG_NAME = "config"


@dataclass(frozen=True)
class Plan:
    """What is to be run, and by whom.

    Attributes:
        runs: the overrides and the settings of every run. A sampler chooses its own: of these stands one example, with
            the first of the values, or the middle one, that each key may get.
        refused: why runs cannot be, a line each.
        is_sweep: Hydra's multirun; launcher, sweeper: their names; sweep_dir: where Hydra writes of it.
        swept: the keys in which its runs differ.
        direction: what a sampler aims at, where it has such a key.
    """

    runs: list[tuple[list[str], dict]]
    refused: list[str]
    is_sweep: bool = False
    launcher: str = "basic"
    sweeper: str = "basic"
    sweep_dir: Path = Path()
    swept: frozenset[str] = frozenset()
    direction: str | None = None

    @property
    def is_sampled(self) -> bool:
        """True where the sweeper chooses each run by what others came to."""
        return self.sweeper != "basic"

    def name(self, overrides: Sequence[str]) -> str:
        """What tells a run from the others: the overrides of swept keys."""
        return " ".join(override for override in overrides if override.partition("=")[0] in self.swept)


def plan(arguments: Sequence[str], conf_dir: Path, resolve: Callable[[object], dict]) -> Plan:
    """Compose everything that arguments of Hydra's command line ask for, and check it; nothing is written.

    Raises Hydra's and OmegaConf's own errors for what does not compose.
    """
    from hydra.core.global_hydra import GlobalHydra

    try:
        return _plan(arguments, conf_dir, resolve)
    finally:
        GlobalHydra.instance().clear()  # whoever composes next in this process begins anew


def _plan(arguments: Sequence[str], conf_dir: Path, resolve: Callable[[object], dict]) -> Plan:
    from hydra._internal.utils import get_args_parser
    from hydra.types import RunMode

    flags = get_args_parser().parse_args(list(arguments))
    hydra, name = _hydra(flags, conf_dir), flags.config_name or CONFIG_NAME

    def composed(mode: RunMode):
        return hydra.compose_config(name, list(flags.overrides), run_mode=mode, with_log_configuration=False)

    if not flags.multirun and hydra.get_mode(name, list(flags.overrides)) != RunMode.MULTIRUN:
        return _checked([([], composed(RunMode.RUN))], resolve)
    master = composed(RunMode.MULTIRUN)
    choices, sweeper = master.hydra.runtime.choices, master.hydra.sweeper
    chosen = {"launcher": choices["hydra/launcher"], "sweeper": choices["hydra/sweeper"]}
    given = _given(master, hydra.config_loader)
    overrides = _combinations(given) if chosen["sweeper"] == "basic" else [_example(given)]
    runs = ((each, hydra.config_loader.load_sweep_config(master, list(each))) for each in overrides)
    return _checked(
        runs,
        resolve,
        is_sweep=True,
        sweep_dir=Path(master.hydra.sweep.dir),
        swept=frozenset(override.get_key_element() for override in given if override.is_sweep_override()),
        direction=_name(sweeper.direction) if "direction" in sweeper else None,
        **chosen,
    )


def _hydra(flags, conf_dir: Path):
    """Hydra as `hydra.main` makes it for the same flags."""
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_automatic_config_search_path
    from hydra.core.config_search_path import SearchPathQuery
    from hydra.core.global_hydra import GlobalHydra

    search_path = create_automatic_config_search_path(None, None, str(flags.config_path or conf_dir))
    if flags.config_dir:
        folder = Path(flags.config_dir).absolute()
        if not folder.is_dir():
            raise PartialLoraError(f"--config-dir {flags.config_dir}: no such directory")
        search_path.prepend("command-line", f"file://{folder}", anchor=SearchPathQuery(provider="schema"))
    GlobalHydra.instance().clear()
    return Hydra.create_main_hydra2("partial-lora", search_path)


def _checked(runs, resolve: Callable[[object], dict], **known: object) -> Plan:
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import open_dict, read_write

    settings, refused = [], []
    for overrides, composed in runs:
        HydraConfig.instance().set_config(composed)
        with read_write(composed), open_dict(composed):
            del composed["hydra"]
        try:
            settings.append((list(overrides), resolve(composed)))
        except PartialLoraError as error:  # collected: all that is wrong is said at once
            refused.append(str(error))
    return Plan(settings, list(dict.fromkeys(refused)), **known)


def _given(master, config_loader) -> list:
    """The overrides of a sweep: those of its sweeper's params, then those of the command line."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    params = master.hydra.sweeper.get("params") or {}
    given = [f"{key}={value}" for key, value in params.items() if isinstance(value, (str, int, float))]
    parser = OverridesParser.create(config_loader=config_loader)
    return parser.parse_overrides([*given, *master.hydra.overrides.task])


def _combinations(given: list) -> list[list[str]]:
    """What Hydra's own sweeper runs, in its order."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    for override in given:
        if override.is_interval_sweep():
            expected = "expected values, or a sampler: hydra/sweeper=optuna"
            raise PartialLoraError(f"{override.input_line}: an interval has no end of values; {expected}")
    return BasicSweeper.split_arguments(given, None)[0]


def _example(given: list) -> list[str]:
    """One combination of those a sampler may choose."""
    found = {}
    for override in given:
        if override.is_interval_sweep():
            value = str(_middle(override.value()))
        elif override.is_sweep_override():
            value = next(iter(override.sweep_string_iterator()))
        else:
            value = override.get_value_element_as_str()
        found[override.get_key_element()] = value
    return [f"{key}={value}" for key, value in found.items()]


def _middle(interval) -> float | int:
    start, end = interval.start, interval.end
    middle = math.sqrt(start * end) if "log" in interval.tags and start > 0 else (start + end) / 2
    return int(middle) if isinstance(start, int) and isinstance(end, int) else middle


def _name(direction) -> str | None:
    """One direction's name; None of several."""
    found = getattr(direction, "name", direction)
    return found if isinstance(found, str) else None
