"""Hydra composes the settings of a run or a sweep from command-line arguments; its errors become one line each."""

from __future__ import annotations

import itertools
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path

import yaml

from partial_lora.errors import TYPES, PartialLoraError, require
from partial_lora.methods import FORMER
from partial_lora.settings.arguments import (
    CHOICES,
    CONFIG_NAME,
    OWN,
    OWN_MODELS,
    as_text,
    for_hydra,
    in_grammar,
    is_file,
    options,
    parse,
    parsed,
    refuse,
)
from partial_lora.settings.keys import no_such_key
from partial_lora.settings.resolving import resolve
from partial_lora.settings.schema import GROUPS, Config, conf_dir, defaults

USAGE_ERROR = 2


@dataclass(frozen=True)
class Plan:
    """One run, or the runs of a sweep, composed and checked before any of them starts.

    Attributes:
        runs: the overrides and the settings of every run.
        refused: why runs are refused, a line each.
        is_sweep: Hydra's multirun; launcher: its name; sweep_dir: the folder that Hydra writes to.
        swept: the keys in which its runs differ.
    """

    runs: list[tuple[list[str], Config]]
    refused: list[str]
    is_sweep: bool = False
    launcher: str = "basic"
    sweep_dir: Path = Path()
    swept: frozenset[str] = frozenset()

    def name(self, overrides: Sequence[str]) -> str:
        """Return the overrides of swept keys, which tell a run from the others."""
        words = (override.lstrip("+") for override in overrides)
        return " ".join(word for word in words if word.partition("=")[0] in self.swept)


def plan(arguments: Sequence[str]) -> Plan:
    """Compose and check all runs of arguments of Hydra's command line; nothing is written.

    Raises Hydra's and OmegaConf's own errors for what does not compose.
    """
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    with hydra_of(arguments) as (hydra, name, overrides, flags):
        if not flags.multirun and hydra.get_mode(name, overrides) != RunMode.MULTIRUN:
            return _checked([([], hydra.compose_config(name, overrides, run_mode=RunMode.RUN))])
        master = hydra.compose_config(name, overrides, run_mode=RunMode.MULTIRUN)
        choices, sweeper = master.hydra.runtime.choices, master.hydra.sweeper
        parsed = _sweep_overrides(master, hydra.config_loader)
        combinations = _combinations(parsed)
        swept = frozenset(override.get_key_element().lstrip("+") for override in parsed if override.is_sweep_override())
        if swept or sweeper.get("params") or OmegaConf.missing_keys(choices):  # refused in a run alone
            load = hydra.config_loader.load_sweep_config
            runs = ((overrides, load(master, list(overrides))) for overrides in combinations)
        else:
            runs = [(combinations[0], master)]
        return _checked(
            runs,
            is_sweep=True,
            launcher=choices["hydra/launcher"],
            sweep_dir=Path(master.hydra.sweep.dir),
            swept=swept,
        )


def checked(arguments: Sequence[str]) -> Plan:
    """Return the runs of arguments as `plan` does; raises PartialLoraError in one line where one is refused."""
    with in_one_line(arguments):
        planned = plan(arguments)
    for reason in planned.refused:
        raise PartialLoraError(reason)
    return planned


@contextmanager
def hydra_of(arguments: Sequence[str]) -> Iterator[tuple]:
    """Give Hydra, with a loader for which files are data; the primary config's name, the overrides, and all options."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from partial_lora.settings.hydra_loader import Loader

    refuse(arguments)
    flags = parse(for_hydra(arguments))
    folder = Path(flags.config_dir).absolute() if flags.config_dir else None
    register_schema()
    file = next(filter(is_file, arguments), None)
    GlobalHydra.instance().clear()  # what another composition in this process has left
    with initialize_config_dir(str(conf_dir()), job_name="partial-lora", version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        search_path = hydra.config_loader.get_search_path()
        hydra.config_loader = Loader(search_path, flags.overrides, file=file, folder=folder)
        yield hydra, flags.config_name or CONFIG_NAME, list(flags.overrides), flags


def _checked(runs, **fields: object) -> Plan:
    configs, refused = [], []
    for overrides, composed in runs:
        try:
            configs.append((list(overrides), _resolved(composed)))
        except PartialLoraError as error:  # collected, so that all are printed at once
            refused.append(str(error))
    return Plan(configs, list(dict.fromkeys(refused)), **fields)


def _resolved(composed) -> Config:
    """Return the checked settings of what Hydra has composed, its own part left out."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import open_dict, read_write

    HydraConfig.instance().set_config(composed)
    with read_write(composed), open_dict(composed):
        del composed["hydra"]
    return resolve(composed)


def _sweep_overrides(master, config_loader) -> list:
    """Return the parsed overrides of a sweep: those of its sweeper's params, then those of the command line."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    params = master.hydra.sweeper.get("params") or {}
    swept = [f"{key}={value}" for key, value in params.items() if isinstance(value, (str, int, float))]
    parser = OverridesParser.create(config_loader=config_loader)
    return parser.parse_overrides([*swept, *master.hydra.overrides.task])


def _combinations(overrides: list) -> list[list[str]]:
    """Return the runs of a sweep, in the order of Hydra's own sweeper."""
    values = {}
    for override in overrides:
        key = override.get_key_element()
        if not override.is_sweep_override():
            values[key] = [override.get_value_element_as_str()]
        elif override.is_interval_sweep():
            expected = "list some, or search by Optuna (examples/optuna_search.py)"
            raise PartialLoraError(f"{override.input_line}: an interval has infinitely many values; {expected}")
        else:
            values[key] = list(override.sweep_string_iterator())
        if not values[key]:
            raise PartialLoraError(f"{override.input_line}: no value, expected one or more")
    chosen = itertools.product(*values.values())
    return [[f"{key}={value}" for key, value in zip(values, some, strict=True)] for some in chosen]


# Flags by which Hydra prints something and runs nothing.
_HELP = {"--help", "-h"}
_SHOWS = {"--cfg", "-c", "--hydra-help", "--info", "-i"}


def compose(
    command: str,
    arguments: list[str],
    work: Callable[[Config], int],
    *,
    sweep: Callable[[Plan, Callable[[Callable], None]], int] | None = None,
) -> int:
    """Compose one run or a sweep from the arguments, and `work` with each once all are checked; return the exit code.

    sweep: launches the runs of a plan; it is given a function by which Hydra calls a job for each. None: `work` runs
    here, one run after another.

    The exit code is the highest of the runs, USAGE_ERROR where one was refused. No further run starts after one that
    was interrupted. Raises PartialLoraError for arguments that do not compose.
    """
    with in_one_line(arguments):
        if _HELP & {*arguments}:
            _print_help([argument for argument in arguments if argument not in _HELP])
            return 0
        if _SHOWS & {argument.partition("=")[0] for argument in arguments}:
            _show(arguments)
            return 0
        planned = plan(arguments)
    for line in _set_twice(arguments):
        print(f"partial-lora: beware: {line}", file=sys.stderr)
    refused = [*planned.refused, *(_uncalibrated(config) for _, config in planned.runs if command == "calibrate")]
    if sweep is not None:
        refused += [_unfit(config, planned.launcher) for _, config in planned.runs]
    for line in filter(None, dict.fromkeys(refused)):
        print(f"partial-lora: {line}", file=sys.stderr)
    if any(refused):
        return USAGE_ERROR
    if planned.is_sweep and sweep is not None:
        return sweep(planned, partial(_sweep, arguments))
    expected = f"basic; {command} has no runs to be launched"
    require(not planned.is_sweep or planned.launcher == "basic", "hydra/launcher", planned.launcher, expected)
    code = 0
    for _, config in planned.runs:
        try:
            code = max(code, work(config))
        except PartialLoraError as error:  # the other runs go on
            print(f"partial-lora: {error}", file=sys.stderr)
            code = max(code, USAGE_ERROR)
        if code > USAGE_ERROR:
            break
    return code


def _set_twice(arguments: Sequence[str]) -> Iterator[str]:
    """Yield a line about each key that the command line sets to two values: as in Hydra, the last one counts."""
    values: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.lstrip("+").partition("=")
        if equals and not is_file(argument):
            if values.get(key, value) != value:
                yield f"{key}={values[key]} has no effect, since {key}={value} comes after it"
            values[key] = value


def _print_help(arguments: Sequence[str]) -> None:
    from hydra.core.object_type import ObjectType
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    from partial_lora.settings.keys import page

    with hydra_of(arguments) as (hydra, name, overrides, _):
        loader = hydra.config_loader
        settings = OmegaConf.to_container(loader.load_configuration(name, overrides, RunMode.RUN))
        groups = {group: loader.get_group_options(group, ObjectType.CONFIG) for group in GROUPS}
        groups["model"] = [model for model in groups["model"] if model not in OWN_MODELS]
        folders = [Path(source.path, "method") for source in loader.get_sources() if source.scheme() == "file"]
    methods = {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}
    print(page(settings, groups, methods, shutil.get_terminal_size((120, 24)).columns), flush=True)


def _show(arguments: Sequence[str]) -> None:
    """Print what Hydra says of its own options, of what it composes, or of where it looks for files."""
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    with hydra_of(arguments) as (hydra, name, overrides, flags):
        if flags.hydra_help:
            hydra.hydra_help(name, options(), flags)
        elif flags.cfg:
            if flags.package not in (None, "_global_"):
                whole, absent = hydra.compose_config(name, overrides, RunMode.RUN), object()
                value = OmegaConf.select(hydra.get_sanitized_cfg(whole, flags.cfg), flags.package, default=absent)
                if value is absent:
                    raise PartialLoraError(no_such_key(flags.package))
                if value is None:  # Hydra says that it is not there
                    print("null")
                    return
            hydra.show_cfg(name, overrides, flags.cfg, flags.package, flags.resolve)
        else:
            hydra.show_info(flags.info, name, overrides)


def _unfit(config: Config, launcher: str) -> str | None:
    """Return why a run would be refused once its libraries are imported; None where it would not."""
    from partial_lora.settings.compatibility import check

    try:
        check(config, here=launcher in ("basic", "joblib"))
    except PartialLoraError as error:
        return str(error)
    return None


def _uncalibrated(config: Config) -> str | None:
    """Return why a run has no calibration that could be made alone; None where it has one."""
    if config.method.traits.size == "budget":
        return f"method.name={config.method.name}: expected another method for calibrate: this one is not calibrated"
    sparsity = config.calibration.sparsity
    return None if sparsity is None else f"calibration.sparsity={sparsity}: expected null for calibrate, which finds it"


def composed(*overrides: str) -> Config:
    """Return the settings of one run, whatever sweep its group files are made for; a FILE.yaml may be among overrides.

    Raises PartialLoraError for overrides that do not compose or are refused.
    """
    from hydra.types import RunMode

    with in_one_line(overrides), hydra_of(overrides) as (hydra, name, parsed, _):
        return _resolved(hydra.compose_config(name, parsed, run_mode=RunMode.RUN))


def register_schema() -> None:
    """Tell Hydra of the schema, and of what only studies have."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf, open_dict

    store = ConfigStore.instance()
    if "schema.yaml" not in store.repo:
        schema = OmegaConf.structured(Config)
        with open_dict(schema):
            schema.study = None  # the runs of an experiment's file (scripts/study.py), no setting of one
        store.store(name="schema", node=schema)


def _sweep(arguments: Sequence[str], job: Callable) -> None:
    """Call `job` with the settings of every run, by Hydra's launcher; raises PartialLoraError in one line."""
    with in_one_line(arguments), hydra_of(arguments) as (hydra, name, overrides, _):
        hydra.multirun(name, job, [*overrides, "hydra.mode=MULTIRUN"])


@contextmanager
def in_one_line(arguments: Sequence[str]) -> Iterator[None]:
    """Turn Hydra's and OmegaConf's errors into PartialLoraErrors of one line."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: an override without a key
        raise PartialLoraError(_composition_error(error, arguments)) from error


# OmegaConf's words on a value of another type, and what it expected.
_MISTYPED = re.compile(r"Value '(.*)' (?:of type '\w+' could not be converted to (Float|Integer)|is not a valid bool)")
_EXPECTED = {"Float": TYPES[float], "Integer": TYPES[int], None: TYPES[bool]}


def _composition_error(error: BaseException, arguments: Sequence[str]) -> str:
    """Return one line that names the key or the argument, out of Hydra's and OmegaConf's messages of several lines."""
    from omegaconf.errors import ConfigKeyError, GrammarParseError, InterpolationResolutionError

    overrides = parse(arguments).overrides
    files = [argument for argument in overrides if is_file(argument)]
    for argument in overrides:
        if argument not in files and (reason := _misread(argument)):
            return reason
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if lines[0].startswith("Could not override"):
        return no_such_key(lines[0].split("'")[1])
    if absent := re.match(r"Could not delete from config\. '(.*)' does not exist", lines[0]):
        key = absent[1]
        return _undeletable(key) if key in defaults() else no_such_key(key)
    if cause := _of_key(error):
        key = cause.full_key
        place = f"{files[0]}: " if f"In '{OWN}'" in lines[0] else ""
        if isinstance(cause, ConfigKeyError):
            return place + no_such_key(key)
        reason = str(getattr(cause, "msg", None) or cause).splitlines()[0]
        if "does not support deletion" in reason:
            return _undeletable(key)
        if isinstance(cause, GrammarParseError):
            return f"{place}{key}: {_written(key, overrides)}: expected ${{KEY}} or ${{oc.env:NAME}}, with both braces"
        if isinstance(cause, InterpolationResolutionError):
            missing = f"{_written(key, overrides)} cannot be resolved ({reason.rpartition(': ')[2]})"
            return f"{place}{key}: {missing}; `partial-lora train --cfg job` lists the keys there are"
        if mistyped := _MISTYPED.match(reason):
            return f"{place}{key}={mistyped[1]}: expected {_EXPECTED[mistyped[2]]}"
        is_null = "is not Optional" in reason or reason.startswith("Incompatible value 'None'")
        return f"{place}{key}: {'expected a value, not null' if is_null else reason}"
    if group := re.search("Could not.*?'(.*?)'.*Available options", str(error), re.DOTALL):
        start = next(index for index, line in enumerate(lines) if "Available options" in line) + 1
        options = [line for line in lines[start:] if "=" not in line and "search path" not in line]
        return _no_such_file(group[1], options)
    if lines[0].startswith("Config group override"):  # of a number
        for group, _, names in (each.lstrip("+").partition("=") for each in overrides):
            for name in names.split(",") if group in GROUPS else ():
                if not isinstance(yaml.safe_load(name), str):
                    expected = sorted(file.stem for file in (conf_dir() / group).glob("*.yaml"))
                    return _no_such_file(f"{group}/{name}", expected)
    if "ambiguous" in " ".join(lines).lower():
        for argument in arguments:
            override = parsed(in_grammar(argument, bool({"-m", "--multirun"} & {*arguments})))
            if override is not None and override.is_sweep_override():
                several = "--cfg shows one run" if {"-m", "--multirun"} & {*arguments} else "for a run of each add -m"
                return f"{argument}: several values; {several}; one text is {as_text(argument)}"
    return " ".join(lines)


def _undeletable(key: str) -> str:
    return f"~{key}: a key cannot be taken away; expected {key}=VALUE"


def _written(key: str, overrides: Sequence[str]) -> str:
    """Return the value of a key as it was written; of one that a file sets, a word for it."""
    written = dict(override.lstrip("+").partition("=")[::2] for override in overrides)
    return written.get(key, "its value")


def _misread(argument: str) -> str | None:
    """Return why an argument has no meaning in Hydra's grammar; None where it has one."""
    key, equals, text = argument.partition("=")
    if key and parsed(in_grammar(argument)) is not None:
        return None
    if not key or not equals:
        record = Path(key, "config.yaml") if key else Path()
        return f"{argument!r}: expected KEY=VALUE, or a file that ends in .yaml" + f": {record}" * record.is_file()
    inside = "; quote the texts inside it" if text[:1] in ("[", "{") else ""
    return f"{argument!r}: expected KEY=VALUE{inside}; one text is {as_text(argument)}"


def _no_such_file(choice: str, expected: Sequence[str]) -> str:
    """Return one line on a choice, GROUP/NAME, that is none of the expected ones."""
    group, _, name = choice.partition("/") if choice.startswith("model/") else choice.rpartition("/")
    if group == "method" and name in FORMER:
        return f"method={name}: expected {FORMER[name]}"
    expected = [*expected, *["a folder with a config.json", "OWNER/NAME of the hub"] * (group == "model")]
    extra = "ray" if name == "ray" else "sweeps"
    brought = f"; partial-lora's extra `{extra}` brings it" if name in CHOICES.get(group, ()) else ""
    close = get_close_matches(name, expected, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{group}={name}: no such {group}{hint}; there are {', '.join(expected)}{brought}"


def _of_key(error: BaseException | None) -> BaseException | None:
    """Return the first exception of a chain of causes that names a key; None if none does."""
    while error is not None and not getattr(error, "full_key", None):
        error = error.__cause__ or error.__context__
    return error
