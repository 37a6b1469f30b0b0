"""Hydra composes the settings of a run or a sweep from command-line arguments; its errors become one line each."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from partial_lora.calibration.config import BUDGETED
from partial_lora.errors import PartialLoraError, require
from partial_lora.runs.config import GROUPS, conf_dir, no_such_key, no_such_option, resolve
from partial_lora.runs.schema import Config, list_keys

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

CONFIG_NAME = "config"
_OF_RECORDS = ("model", "task", "method", "importance", "calibration", "mask", "trainer")  # of which a run's has all
USAGE_ERROR = 2


@dataclass(frozen=True)
class Plan:
    """One run, or the runs of a sweep, composed and checked before any of them starts.

    Attributes:
        runs: the overrides and the settings of every run. A sampler chooses its own: one example stands for them, with
            the first or the middle of the values that each key may get.
        refused: why runs are refused, a line each.
        is_sweep: Hydra's multirun; launcher, sweeper: their names; sweep_dir: where Hydra writes of it.
        swept: the keys in which its runs differ.
        direction: of a sampler, where it has such a key.
    """

    runs: list[tuple[list[str], Config]]
    refused: list[str]
    is_sweep: bool = False
    launcher: str = "basic"
    sweeper: str = "basic"
    sweep_dir: Path = Path()
    swept: frozenset[str] = frozenset()
    direction: str | None = None

    @property
    def is_sampled(self) -> bool:
        """True where the sweeper chooses each run by the results of others."""
        return self.sweeper != "basic"

    def name(self, overrides: Sequence[str]) -> str:
        """Return the overrides of swept keys, which tell a run from the others."""
        return " ".join(override for override in overrides if override.partition("=")[0] in self.swept)


def plan(arguments: Sequence[str]) -> Plan:
    """Compose and check all runs of arguments of Hydra's command line; nothing is written.

    Raises Hydra's and OmegaConf's own errors for what does not compose.
    """
    from hydra._internal.utils import get_args_parser
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    flags = get_args_parser().parse_args(_for_hydra(arguments))
    name, overrides = flags.config_name or CONFIG_NAME, list(flags.overrides)
    try:
        hydra = _hydra_of_plan(flags)
        mode = RunMode.MULTIRUN if flags.multirun else hydra.get_mode(name, overrides) or RunMode.RUN
        master = hydra.compose_config(name, overrides, run_mode=mode, with_log_configuration=False)
        if mode != RunMode.MULTIRUN:
            return _checked([([], master)])
        choices, sweeper = master.hydra.runtime.choices, master.hydra.sweeper
        parsed = _sweep_overrides(master, hydra.config_loader)
        combinations = _combinations(parsed) if choices["hydra/sweeper"] == "basic" else [_example(parsed)]
        runs = ((each, hydra.config_loader.load_sweep_config(master, list(each))) for each in combinations)
        direction = getattr(sweeper.get("direction"), "name", sweeper.get("direction"))
        return _checked(
            runs,
            is_sweep=True,
            launcher=choices["hydra/launcher"],
            sweeper=choices["hydra/sweeper"],
            sweep_dir=Path(master.hydra.sweep.dir),
            swept=frozenset(override.get_key_element() for override in parsed if override.is_sweep_override()),
            direction=direction if isinstance(direction, str) else None,  # one of several goals is not the direction
        )
    finally:
        GlobalHydra.instance().clear()  # the next composition in this process starts from nothing


@contextmanager
def config_loader_of(arguments: Sequence[str]) -> Iterator[tuple]:
    """Give Hydra's config loader for arguments, the name of their primary config and their overrides."""
    from hydra._internal.utils import get_args_parser
    from hydra.core.global_hydra import GlobalHydra

    flags = get_args_parser().parse_args(_for_hydra(arguments))
    try:
        yield _hydra_of_plan(flags).config_loader, flags.config_name or CONFIG_NAME, flags.overrides
    finally:
        GlobalHydra.instance().clear()


def _hydra_of_plan(flags):
    """Return Hydra as `hydra.main` makes it for the same flags."""
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_automatic_config_search_path
    from hydra.core.config_search_path import SearchPathQuery
    from hydra.core.global_hydra import GlobalHydra

    search_path = create_automatic_config_search_path(None, None, str(flags.config_path or conf_dir()))
    if flags.config_dir:
        folder = Path(flags.config_dir).absolute()
        search_path.prepend("command-line", f"file://{folder}", anchor=SearchPathQuery(provider="schema"))
    GlobalHydra.instance().clear()
    _register_schema()
    return Hydra.create_main_hydra2("partial-lora", search_path)


def _checked(runs, **known: object) -> Plan:
    configs, refused = [], []
    for overrides, composed in runs:
        try:
            configs.append((list(overrides), _resolved(composed)))
        except PartialLoraError as error:  # collected, so that all are printed at once
            refused.append(str(error))
    return Plan(configs, list(dict.fromkeys(refused)), **known)


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
    """Return the runs of Hydra's own sweeper, in its order."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    for override in overrides:
        if override.is_interval_sweep():
            expected = "expected values, or a sampler: hydra/sweeper=optuna"
            raise PartialLoraError(f"{override.input_line}: an interval has no end of values; {expected}")
    return BasicSweeper.split_arguments(overrides, None)[0]


def _example(overrides: list) -> list[str]:
    """Return one combination of those a sampler may choose."""
    values = {}
    for override in overrides:
        if override.is_interval_sweep():
            value = str(_middle(override.value()))
        elif override.is_sweep_override():
            value = next(iter(override.sweep_string_iterator()))
        else:
            value = override.get_value_element_as_str()
        values[override.get_key_element()] = value
    return [f"{key}={value}" for key, value in values.items()]


def _middle(interval) -> float | int:
    start, end = interval.start, interval.end
    middle = math.sqrt(start * end) if "log" in interval.tags and start > 0 else (start + end) / 2
    return int(middle) if isinstance(start, int) and isinstance(end, int) else middle


_SWEEPS = "pip install 'partial-lora[sweeps]'"
_PLUG_INS = {  # of Hydra, by the launchers and sweepers that they bring
    "joblib": _SWEEPS,
    "submitit_local": _SWEEPS,
    "submitit_slurm": _SWEEPS,
    "ray": "pip install 'partial-lora[ray]'",
    "optuna": _SWEEPS,
}
# Flags by which Hydra prints something and runs nothing.
_HELP = {"--help", "-h"}
_SHOWS = {"--cfg", "-c", "--hydra-help", "--info", "-i", "--shell-completion", "-sc"}


def compose(
    command: str,
    arguments: list[str],
    work: Callable[[Config], int],
    *,
    sweep: Callable[[Plan, Callable[[Callable], None]], int] | None = None,
) -> int:
    """Compose one run or a sweep from the arguments, and `work` with each once all are checked; return the exit code.

    sweep: has all runs of a plan launched, given what makes Hydra call a job for each; None for work that is done here,
    one after another.

    The exit code is the highest of the runs, USAGE_ERROR where one was refused. No further run starts after one that
    was interrupted. Raises PartialLoraError for arguments that do not compose.
    """
    refuse_group_lists(arguments)
    _refuse_options(arguments)
    _refuse_hidden_files(arguments)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here, instead of out of Hydra on several lines
    if _HELP & {*arguments}:
        with _in_one_line(arguments):
            _print_help([each for each in arguments if each not in _HELP])
        return 0
    hydra = partial(_hydra, command, arguments)
    if _SHOWS & {argument.partition("=")[0] for argument in arguments}:
        hydra(lambda composed: None)
        return 0
    with _in_one_line(arguments):
        planned = plan(arguments)
    refused = [*planned.refused, *(_uncalibrated(config) for _, config in planned.runs if command == "calibrate")]
    for line in filter(None, dict.fromkeys(refused)):
        print(f"partial-lora: {line}", file=sys.stderr)
    if any(refused):
        return USAGE_ERROR
    if planned.is_sweep and sweep is not None:
        return sweep(planned, hydra)
    for key, name in (("launcher", planned.launcher), ("sweeper", planned.sweeper)):
        if planned.is_sweep and name != "basic":
            raise PartialLoraError(f"hydra/{key}={name}: expected basic; {command} has no runs to be launched")
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


def _print_help(arguments: Sequence[str]) -> None:
    from hydra.core.object_type import ObjectType
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    from partial_lora.runs.keys import page

    with config_loader_of(arguments) as (loader, name, overrides):
        settings = OmegaConf.to_container(loader.load_configuration(name, overrides, RunMode.RUN))
        groups = {group: loader.get_group_options(group, ObjectType.CONFIG) for group in GROUPS}
    print(page(settings, groups, shutil.get_terminal_size((120, 24)).columns), flush=True)


def _uncalibrated(config: Config) -> str | None:
    """Return why a run has no calibration that could be made alone; None where it has."""
    if config.method.name in BUDGETED:
        return f"method.name={config.method.name}: expected another method for calibrate: this one is not calibrated"
    sparsity = config.calibration.sparsity
    return None if sparsity is None else f"calibration.sparsity={sparsity}: expected null for calibrate, which finds it"


def composed(*overrides: str) -> Config:
    """Return the settings of one run, whatever sweep its group files are made for; a FILE.yaml may be among overrides.

    Raises PartialLoraError for overrides that do not compose or are refused.
    """
    from hydra._internal.utils import get_args_parser
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    with _in_one_line(overrides):
        try:
            flags = get_args_parser().parse_args(_for_hydra(overrides))
            name = flags.config_name or CONFIG_NAME
            one = _hydra_of_plan(flags).compose_config(
                name, flags.overrides, run_mode=RunMode.RUN, with_log_configuration=False
            )
            return _resolved(one)
        finally:
            GlobalHydra.instance().clear()


def _for_hydra(arguments: Sequence[str]) -> list[str]:
    """Return arguments as Hydra takes them: a FILE.yaml as its primary config, values in its grammar."""
    is_sweep = bool({"-m", "--multirun"} & set(arguments))
    return [in_grammar(each, is_sweep) for each in _with_file(arguments)]


def in_grammar(argument: str, is_sweep: bool = False) -> str:
    """Return KEY=VALUE so that Hydra reads in it what was meant; one that has no meaning stays as it is.

    A text of characters that are not in its grammar is quoted, and so is a file's path of which it would make several
    values or a number; `{train: ~/a (1).csv}` is read as YAML; where a list is expected, its words will do. is_sweep:
    several values are a run for each.
    """
    key, equals, text = argument.partition("=")
    if argument.startswith(("-", "~")) or not (equals and key):
        return argument
    override, is_list = _parsed(argument), key.lstrip("+") in list_keys()
    is_file = not is_list and os.path.exists(os.path.expanduser(text))
    if override is None:
        value = text if is_file else _from_yaml(text)
        return argument if value is None else f"{key}={_quoted([value] if is_list and value == text else value)}"
    several = override.is_sweep_override()
    if is_list and several and is_sweep:
        each = (value if value[0] == "[" else f"[{value}]" for value in override.sweep_string_iterator())
        return f"{key}={','.join(each)}"
    if is_list and (several or isinstance(override.value(), (str, int, float))):
        return f"{key}=[{text}]"
    number = key.startswith("task.data_files") and isinstance(override.value(), (int, float))
    return f"{key}={_quoted(text)}" if is_file and (number or (several and not is_sweep)) else argument


def _parsed(argument: str) -> Override | None:
    """Return an argument as Hydra reads it; None where its grammar has no such value."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None


def _from_yaml(text: str) -> object:
    """Return the list or mapping that a text is, or the text; None for one that was begun as these or in quotes."""
    if text[0] not in "[{\"'":
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    return value if isinstance(value, (list, dict)) else None


def _quoted(value: object) -> str:
    """Return a value in Hydra's grammar, its texts in quotes."""
    from hydra.core.override_parser.types import Override, Quote, QuotedString

    def texts(value: object) -> object:
        if isinstance(value, Mapping):
            return {key: texts(each) for key, each in value.items()}
        if isinstance(value, list):
            return [texts(each) for each in value]
        return QuotedString(value, Quote.double) if isinstance(value, str) else value

    return Override._get_value_element_as_str(texts(value))


# --- A file of the user's own in place of config.yaml: the command line as YAML, or a run's config.yaml.

_OWN = "own"  # what Hydra calls it


def _with_file(arguments: Sequence[str]) -> list[str]:
    """Return the arguments as Hydra takes them: a FILE.yaml among them becomes its primary config."""
    files = [each for each in arguments if _is_file(each)]
    if not files:
        return list(arguments)
    if len(files) > 1:
        raise PartialLoraError(f"{files[1]}: expected KEY=VALUE, and one file at most; {files[0]} is one already")
    others = [each for each in arguments if each != files[0]]
    from hydra.core.config_store import ConfigStore

    content = _content(files[0])
    is_record = all(isinstance(content.get(group), Mapping) for group in _OF_RECORDS)
    primary = _primary_of_record(content, others) if is_record else _primary(files[0], content)
    ConfigStore.instance().store(name=_OWN, node=primary)
    return [*others, f"--config-name={_OWN}"]


def _is_file(argument: str) -> bool:
    """Return whether an argument is a file of settings; KEY=VALUE may end like one."""
    named = argument.endswith((".yaml", ".yml")) and not argument.startswith("-")
    return named and ("=" not in argument or Path(argument).is_file())


def _content(file: str) -> dict:
    """Return what a file sets; raise PartialLoraError, in one line that names it, where it is no mapping of keys."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        content = OmegaConf.to_container(OmegaConf.load(file))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise PartialLoraError(f"{file}: cannot be read as YAML: {reason}") from error
    if not isinstance(content, dict) or not content:
        raise PartialLoraError(f"{file}: expected a line KEY: VALUE for each setting, such as model: minilm_l6")
    if "defaults" in content:
        expected = (
            "expected GROUP: NAME in its place, such as model: minilm_l6; config.yaml's defaults are there already"
        )
        raise PartialLoraError(f"{file}: defaults: {expected}")
    return content


def _primary(file: str, content: Mapping) -> dict:
    """Return the primary config of a file that is a command line: GROUP: NAME chooses, all else is set after it.

    A group that is described in the file itself, with a name of its own, has no group file beneath it.
    """
    from omegaconf import OmegaConf

    keys, chosen = OmegaConf.create({}), {}
    for key, value in content.items():
        if key in GROUPS and not isinstance(value, Mapping):
            require(value is None or isinstance(value, str), f"{file}: {key}", value, "a name, or keys of the group")
            chosen[key] = value
        else:
            OmegaConf.update(keys, str(key), value, force_add=True)  # the key may have dots
    settings = OmegaConf.to_container(keys)
    for group, _, name in (key.partition(".") for key in list_keys()):
        if isinstance(settings.get(group), dict) and isinstance(word := settings[group].get(name), str):
            settings[group][name] = [word]
    described = [group for group in GROUPS if "name" in (settings.get(group) or {}) and group not in chosen]
    chosen |= dict.fromkeys(described)
    return {
        "defaults": [CONFIG_NAME, *({f"override {key}": name} for key, name in chosen.items()), "_self_"],
        **settings,
    }


def _primary_of_record(content: Mapping, overrides: Sequence[str]) -> dict:
    """Return the primary config of a run's config.yaml, which has every key: a group that is chosen comes after it.

    Of the run's own model or task nothing stays where another one is chosen. What the record says of that one run, that
    it was to overwrite and where its rate was searched for, is no setting of another.
    """
    whole = yaml.safe_load((conf_dir() / f"{CONFIG_NAME}.yaml").read_text(encoding="utf-8"))
    after = [entry for entry in whole["defaults"] if entry not in ("schema", "_self_")]
    groups = [{key: None if key in GROUPS else name for key, name in entry.items()} for entry in after]
    chosen = {override.partition("=")[0] for override in overrides} & {"model", "task"}
    settings = {key: value for key, value in content.items() if key not in chosen | {"overwrite"}}
    settings["trainer"] = {key: value for key, value in content["trainer"].items() if key != "tuned_elsewhere"}
    return {"defaults": ["schema", "_self_", *groups], **settings, "hydra": whole["hydra"]}


def _refuse_hidden_files(arguments: Sequence[str]) -> None:
    """Raise PartialLoraError for a --config-dir that is none, or where the package's files would hide some."""
    from hydra._internal.utils import get_args_parser

    folder = get_args_parser().parse_known_args(list(arguments))[0].config_dir
    if folder is None:
        return
    if not Path(folder).is_dir():
        raise PartialLoraError(f"--config-dir {folder}: no such directory")
    for file in sorted(conf_dir().rglob("*.yaml")):
        name = file.relative_to(conf_dir())
        if (Path(folder) / name).exists():
            other = f"; `partial-lora train {Path(folder) / name}` trains by it" if name.parent == Path() else ""
            raise PartialLoraError(
                f"--config-dir {folder}: {name} is the name of a file of the package, which goes before it; expected "
                f"another name{other}"
            )


def _register_schema() -> None:
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    if "schema.yaml" not in store.repo:
        store.store(name="schema", node=Config)


def _hydra(command: str, arguments: list[str], job: Callable) -> None:
    """Call `job` with every config that Hydra composes from the arguments; raises PartialLoraError in one line."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    _register_schema()
    with _in_one_line(arguments):
        sys.argv = [f"partial-lora {command}", *_for_hydra(arguments)]
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=CONFIG_NAME)(job)()


@contextmanager
def _in_one_line(arguments: Sequence[str]) -> Iterator[None]:
    """Turn Hydra's and OmegaConf's errors into PartialLoraErrors of one line."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: an override without a key
        if isinstance(error, PartialLoraError):
            raise
        raise PartialLoraError(composition_error(error, arguments)) from error


def refuse_group_lists(arguments: Sequence[str]) -> None:
    """Raise PartialLoraError for a list of group files, which Hydra would merge into one, and for a plug-in's name with
    a dot, which it would take for the plug-in's settings.
    """
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key.lstrip("+") in GROUPS and value.startswith("["):
            raise PartialLoraError(f"{argument}: expected one name; for a run of each use -m {key}={value.strip('[]')}")
        if key in ("hydra.launcher", "hydra.sweeper"):
            raise PartialLoraError(f"{argument}: expected {key.replace('.', '/')}={value}, with a slash")


def _refuse_options(arguments: Sequence[str]) -> None:
    """Raise PartialLoraError for an option that Hydra has not, where other tools may have a setting."""
    from hydra._internal.utils import get_args_parser

    known = get_args_parser()._option_string_actions
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        option, _, value = argument.partition("=")
        if option.startswith("-") and option not in known:
            stands_alone = following is None or following.startswith("-") or "=" in following
            raise PartialLoraError(no_such_option(option, value or (None if stands_alone else following)))


def composition_error(error: BaseException, arguments: Sequence[str]) -> str:
    """Return one line that names the key or the argument, out of Hydra's and OmegaConf's messages of several."""
    from hydra._internal.utils import get_args_parser
    from omegaconf.errors import ConfigKeyError

    overrides = get_args_parser().parse_known_args(list(arguments))[0].overrides
    files = [each for each in overrides if _is_file(each)]
    for argument in overrides:
        if argument in files:
            continue
        key, _, text = argument.partition("=")
        if not key:
            return f"{argument!r}: expected KEY=VALUE, or a file that ends in .yaml"
        if _parsed(in_grammar(argument)) is None:
            inside = "; quote the texts inside it" if text[:1] in ("[", "{") else ""
            return f"{argument!r}: expected KEY=VALUE{inside}; one text is {shlex.quote(f'{key}={_quoted(text)}')}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if lines[0].startswith("Could not override"):
        return _no_such_key(lines[0].split("'")[1])
    if cause := _of_key(error):
        key = cause.full_key
        place = f"{files[0]}: " if f"In '{_OWN}'" in lines[0] else ""
        if isinstance(cause, ConfigKeyError):
            return place + _no_such_key(key)
        reason = str(getattr(cause, "msg", None) or cause).splitlines()[0]
        return f"{place}{key}: {'expected a value, not null' if 'is not Optional' in reason else reason}"
    if any("Available options" in line for line in lines):
        missing = next(line for line in lines if "Could not" in line)
        start = next(index for index, line in enumerate(lines) if "Available options" in line) + 1
        options = [line for line in lines[start:] if "=" not in line and "search path" not in line]
        group = missing.split("'")[-2] if missing.count("'") >= 2 else missing
        folder, _, name = group.rpartition("/")
        line = f"{folder}={name}: no such file in the group; expected one of {', '.join(options)}"
        return line + (f"; {_PLUG_INS[name]} brings it" if name in _PLUG_INS else "")
    for argument in arguments:
        if "," in argument and "ambiguous" in " ".join(lines).lower():
            key, _, text = argument.partition("=")
            as_text = shlex.quote(f"{key}={_quoted(text)}")
            return f"{argument}: several values; for a run of each add -m, for one text write {as_text}"
    return " ".join(lines)


def _of_key(error: BaseException | None) -> BaseException | None:
    """Return the first of an exception and those that it came from which names a key."""
    while error is not None and not getattr(error, "full_key", None):
        error = error.__cause__ or error.__context__
    return error


def _no_such_key(key: str) -> str:
    return no_such_key(key, "hydra" if key.startswith("hydra.") else "job")
