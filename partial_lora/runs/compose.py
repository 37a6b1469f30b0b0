"""From command-line arguments to checked settings: what Hydra composes, and its errors in one line."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from partial_lora.errors import PartialLoraError
from partial_lora.runs.config import no_such_key

# --- What a command line asks for: one run, or the runs of a sweep, composed and checked before any of them starts.

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
    hydra, name = _hydra_of_plan(flags, conf_dir), flags.config_name or CONFIG_NAME

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


def _hydra_of_plan(flags, conf_dir: Path):
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


USAGE_ERROR = 2
_SWEEPS = "pip install 'partial-lora[sweeps]'"
_PLUG_INS = {  # of Hydra, by the launchers and sweepers that they bring
    "joblib": _SWEEPS,
    "submitit_local": _SWEEPS,
    "submitit_slurm": _SWEEPS,
    "ray": "pip install 'partial-lora[ray]'",
    "optuna": _SWEEPS,
}


def compose(
    command: str,
    arguments: list[str],
    work: Callable[[dict], int],
    *,
    sweep: Callable[[Plan, Callable[[Callable], None]], int] | None = None,
) -> int:
    """Let Hydra compose one run or a sweep from the arguments, and `work` with each once all are checked.

    sweep: does the runs of a plan by whatever launches them, from the job that Hydra calls with every config; None for
    work that is done here, one run after another.

    Returns the exit code: the highest of the runs, USAGE_ERROR where one was refused. No further run starts after one
    that was interrupted. Raises PartialLoraError for arguments that do not compose.
    """
    from hydra.core.config_store import ConfigStore

    from partial_lora.runs import config, schema

    refuse_group_lists(arguments)
    ConfigStore.instance().store(name="schema", node=schema.Config)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here, instead of out of Hydra on several lines
    shows = {"--cfg", "-c", "--help", "-h", "--hydra-help", "--info", "-i"}
    if not shows & {argument.partition("=")[0] for argument in arguments}:
        with _in_one_line(arguments):
            planned = plan(arguments, config.conf_dir(), config.resolve)
        for line in planned.refused:
            print(f"partial-lora: {line}", file=sys.stderr)
        if planned.refused:
            return USAGE_ERROR
        if planned.is_sweep and sweep:
            return sweep(planned, partial(_hydra, command, arguments))
        for key, name in (("launcher", planned.launcher), ("sweeper", planned.sweeper)):
            if planned.is_sweep and name != "basic":
                raise PartialLoraError(f"hydra/{key}={name}: expected basic; {command} has no runs to be launched")
    codes: list[int] = []

    def job(composed) -> None:
        try:
            codes.append(work(config.resolve(composed)))
        except PartialLoraError as error:  # said here: Hydra would add lines of its own
            print(f"partial-lora: {error}", file=sys.stderr)
            codes.append(USAGE_ERROR)
        if codes[-1] > USAGE_ERROR:  # interrupted: no further run of a sweep starts
            raise SystemExit(codes[-1])

    _hydra(command, arguments, job)
    return max(codes, default=0)


def _hydra(command: str, arguments: list[str], job: Callable) -> None:
    """Call `job` with every config that Hydra composes from the arguments; raises PartialLoraError in one line."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    from partial_lora.runs import config

    GlobalHydra.instance().clear()
    sys.argv = [f"partial-lora {command}", *arguments]
    with _in_one_line(arguments):
        hydra.main(version_base="1.3", config_path=str(config.conf_dir()), config_name=CONFIG_NAME)(job)()


@contextmanager
def _in_one_line(arguments: Sequence[str]) -> Iterator[None]:
    """Make PartialLoraErrors of Hydra's and OmegaConf's errors."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: an override without a key
        if isinstance(error, PartialLoraError):
            raise
        raise PartialLoraError(composition_error(error, arguments)) from error


def refuse_group_lists(arguments: Sequence[str]) -> None:
    """Hydra would merge the files of a list of groups into one, or take a plug-in's name for its settings."""
    from partial_lora.runs.config import GROUPS

    for argument in arguments:
        key, _, value = argument.partition("=")
        if key.lstrip("+") in GROUPS and value.startswith("["):
            raise PartialLoraError(f"{argument}: expected one name; for a run of each use -m {key}={value.strip('[]')}")
        if key in ("hydra.launcher", "hydra.sweeper"):
            raise PartialLoraError(f"{argument}: expected {key.replace('.', '/')}={value}, with a slash")


def composition_error(error: BaseException, arguments: Sequence[str]) -> str:
    """One line that names the key or the argument, out of Hydra's and OmegaConf's messages of several."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    for argument in arguments:
        if argument.startswith("-"):
            continue
        try:
            OverridesParser.create().parse_override(argument)
        except HydraException:
            return f"{argument!r}: expected KEY=VALUE, with quotes around a value of special characters"
        if not argument.partition("=")[0]:
            return f"{argument!r}: expected KEY=VALUE"
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    key = getattr(cause, "full_key", None)
    if lines[0].startswith("Could not override"):
        key = lines[0].split("'")[1]
        return no_such_key(key, "hydra" if key.startswith("hydra.") else "job")
    if key:
        reason = str(getattr(cause, "msg", None) or cause).splitlines()[0]
        return f"{key}: {'expected a value, not null' if 'is not Optional' in reason else reason}"
    if any("Available options" in line for line in lines):
        missing = next(line for line in lines if "Could not" in line)
        start = next(index for index, line in enumerate(lines) if "Available options" in line) + 1
        options = [line for line in lines[start:] if "=" not in line and "search path" not in line]
        group = missing.split("'")[-2] if missing.count("'") >= 2 else missing
        folder, _, name = group.rpartition("/")
        said = f"{folder}={name}: no such file in the group; expected one of {', '.join(options)}"
        return said + (f"; {_PLUG_INS[name]} brings it" if name in _PLUG_INS else "")
    for argument in arguments:
        if "," in argument and "ambiguous" in " ".join(lines).lower():
            return f"{argument}: several values; for a run of each add -m"
    return " ".join(lines)
