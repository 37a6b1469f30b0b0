"""The arguments of a command line as Hydra takes them: values in its grammar, a file in place of config.yaml."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from partial_lora.errors import PartialLoraError, one_line, require
from partial_lora.runs.config import GROUPS, conf_dir, no_such_option
from partial_lora.runs.schema import SECTIONS, list_keys

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

CONFIG_NAME = "config"


def for_hydra(arguments: Sequence[str]) -> list[str]:
    """Return arguments as Hydra takes them: a FILE.yaml as its primary config, values in its grammar."""
    is_sweep = bool({"-m", "--multirun"} & set(arguments))
    given = [in_grammar(each, is_sweep) for each in _with_file(arguments) if each not in ("-m", "--multirun")]
    return [*given, "-m"] if is_sweep else given  # argparse takes no override after an option


def in_grammar(argument: str, is_sweep: bool = False) -> str:
    """Return KEY=VALUE so that Hydra reads it as it was meant; an argument without a meaning stays as it is.

    A text with characters outside Hydra's grammar is quoted, and so is a path that Hydra would read as several values
    or a number. `{train: ~/a (1).csv}` is read as YAML. A list needs no brackets. is_sweep: several values are a run
    for each.
    """
    key, equals, text = argument.partition("=")
    if argument.startswith(("-", "~")) or not (equals and key):
        return argument
    if key.startswith("model.model_args"):  # a mapping of any keys, which Hydra lets be added with two signs alone
        argument = f"++{argument}"
        key = f"++{key}"
    override, is_list = parsed(argument), key.lstrip("+") in list_keys()
    is_path = not is_list and os.path.exists(os.path.expanduser(text))
    if override is None:
        value = text if is_path else _from_yaml(text)
        return argument if value is None else f"{key}={quoted([value] if is_list and value == text else value)}"
    several = override.is_sweep_override()
    if is_list and several and is_sweep:
        each = (value if value[0] == "[" else f"[{value}]" for value in override.sweep_string_iterator())
        return f"{key}={','.join(each)}"
    if is_list and (several or isinstance(override.value(), (str, int, float))):
        return f"{key}=[{text}]"
    number = key.startswith("task.data_files") and isinstance(override.value(), (int, float))
    return f"{key}={quoted(text)}" if is_path and (number or (several and not is_sweep)) else argument


def parsed(argument: str) -> Override | None:
    """Return an argument as Hydra reads it; None where its grammar has no such value."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None


def _from_yaml(text: str) -> object:
    """Return the list or mapping that a text is, or the text; None for a broken list, mapping or quotation."""
    if not text.startswith(("[", "{", "'", '"')):
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    return value if isinstance(value, (list, dict)) else None


def quoted(value: object) -> str:
    """Return a value in Hydra's grammar, its texts in quotes."""
    from hydra.core.override_parser.types import Override, Quote, QuotedString

    def texts(value: object) -> object:
        if isinstance(value, Mapping):
            return {key: texts(each) for key, each in value.items()}
        if isinstance(value, list):
            return [texts(each) for each in value]
        return QuotedString(value, Quote.double) if isinstance(value, str) else value

    return Override._get_value_element_as_str(texts(value))


def as_text(argument: str) -> str:
    """Return KEY=VALUE as it is typed in a shell so that the value is one text."""
    key, _, text = argument.partition("=")
    return shlex.quote(f"{key}={quoted(text)}")


# --- A file of the user's own in place of config.yaml: the command line as YAML, or a run's config.yaml.

OWN = "own"  # Hydra's name for the file


def _with_file(arguments: Sequence[str]) -> list[str]:
    """Return the arguments as Hydra takes them: a FILE.yaml among them becomes its primary config."""
    files = [each for each in arguments if is_file(each)]
    if not files:
        return list(arguments)
    if len(files) > 1:
        raise PartialLoraError(f"{files[1]}: expected KEY=VALUE, and one file at most; {files[0]} is one already")
    others = [each for each in arguments if each != files[0]]
    named = [each for each in others if each.partition("=")[0] in ("--config-name", "-cn")]
    if named:
        raise PartialLoraError(f"{named[0]}: expected one or the other; {files[0]} is the config already")
    from hydra.core.config_store import ConfigStore

    settings = settings_of(files[0])
    primary = _primary_of_record(settings, others) if is_record(settings) else _primary(files[0], settings)
    ConfigStore.instance().store(name=OWN, node=primary)
    return [*others, f"--config-name={OWN}"]


def rate_in_file(config_name: str) -> list[str]:
    """Return the learning rate that the user's own file sets, as an argument would; not that of a run's record."""
    from hydra.core.config_store import ConfigStore

    own = ConfigStore.instance().load(f"{OWN}.yaml").node if config_name == OWN else {}
    trainer = (own.get("trainer") or {}) if CONFIG_NAME in own.get("defaults", ()) else {}
    return [f"trainer.learning_rate={trainer['learning_rate']}"] if "learning_rate" in trainer else []


def is_record(settings: Mapping) -> bool:
    """Return whether the settings of a file are a run's config.yaml, and no command line."""
    return all(isinstance(settings.get(group), Mapping) for group in SECTIONS)


def is_file(argument: str) -> bool:
    """Return whether an argument is a file of settings; KEY=VALUE may end like one."""
    named = argument.endswith((".yaml", ".yml")) and not argument.startswith("-")
    return named and ("=" not in argument or Path(argument).is_file())


def settings_of(file: str) -> dict:
    """Return what a file sets; raise PartialLoraError, in one line that names it, where it is no mapping of keys."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        content = OmegaConf.to_container(OmegaConf.load(file))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = error.strerror if isinstance(error, OSError) else f"no YAML ({one_line(error)})"
        raise PartialLoraError(f"{file}: cannot be read: {reason}") from error
    if not isinstance(content, dict) or not content:
        raise PartialLoraError(f"{file}: expected a line KEY: VALUE for each setting, such as model: minilm_l6")
    if "defaults" in content:
        raise PartialLoraError(f"{file}: defaults: expected a line GROUP: NAME for each, such as model: minilm_l6")
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
    for node in ("hydra", "hydra.sweeper", "hydra.sweeper.params"):
        own = OmegaConf.select(keys, node, default={})
        require(isinstance(own, Mapping), f"{file}: {node}", own, "keys and values, or no such line")
    settings = OmegaConf.to_container(keys)
    for group, _, name in (key.partition(".") for key in list_keys()):
        if isinstance(settings.get(group), dict) and isinstance(word := settings[group].get(name), str):
            settings[group][name] = [word]
    swept = settings.get("hydra", {}).get("sweeper", {}).get("params") or {}
    for key, values in swept.items():  # Hydra takes a list for one value
        if isinstance(values, list):
            swept[key] = ",".join(each if isinstance(each, str) else quoted(each) for each in values)
    described = [group for group in GROUPS if "name" in (settings.get(group) or {}) and group not in chosen]
    chosen |= dict.fromkeys(described)
    return {
        "defaults": [CONFIG_NAME, *({f"override {key}": name} for key, name in chosen.items()), "_self_"],
        **settings,
    }


def _primary_of_record(content: Mapping, overrides: Sequence[str]) -> dict:
    """Return the primary config of a run's config.yaml, which has every key: a group that is chosen stands in for it.

    Nothing of the run's own stays in such a group, but that another method keeps rank, alpha, dropout and the mask's
    seed. `overwrite` and `trainer.tuned_elsewhere` are left out, since they concern that one run.
    """
    whole = yaml.safe_load((conf_dir() / f"{CONFIG_NAME}.yaml").read_text(encoding="utf-8"))
    after = [entry for entry in whole["defaults"] if entry not in ("schema", "_self_")]
    groups = [{key: None if key in GROUPS else name for key, name in entry.items()} for entry in after]
    chosen = {override.partition("=")[0] for override in overrides} & SECTIONS.keys() - {"mask"}
    settings = {key: value for key, value in content.items() if key not in chosen | {"overwrite"}}
    method = dict(content["method"])
    if method.pop("ranks", "one") == "auto":
        method["rank"] = "auto"
    if "method" in chosen:
        method = {key: method[key] for key in ("rank", "alpha", "dropout") if key in method}
        settings["mask"] = {"seed": content["mask"].get("seed")}
    settings["method"] = method
    if "trainer" not in chosen:
        settings["trainer"] = {key: value for key, value in content["trainer"].items() if key != "tuned_elsewhere"}
    return {"defaults": ["schema", "_self_", *groups], **settings, "hydra": whole["hydra"]}


# --- What Hydra would take for something else, or read past.


def refuse(arguments: Sequence[str]) -> None:
    """Raise PartialLoraError for an argument that is no setting, or that Hydra would misread or ignore."""
    refuse_group_lists(arguments)
    _refuse_options(arguments)
    _refuse_hidden_files(arguments)


def refuse_group_lists(arguments: Sequence[str]) -> None:
    """Raise PartialLoraError for a list of group files, which Hydra would merge into one, and for a plug-in's name with
    a dot, which it would take for the plug-in's settings.
    """
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in GROUPS and value == "null":
            none = f", or ~{key} for none" if key in ("preset", "experiment") else ""
            raise PartialLoraError(f"{argument}: expected one name{none}")
        if key.lstrip("+") in GROUPS and value.startswith("["):
            raise PartialLoraError(f"{argument}: expected one name; for a run of each use -m {key}={value.strip('[]')}")
        if key.lstrip("+").startswith("hydra.sweeper.params"):  # Hydra reads these from files alone
            raise PartialLoraError(f"{argument}: expected -m KEY=A,B, or the key in a FILE.yaml")
        if key in ("hydra.launcher", "hydra.sweeper"):
            raise PartialLoraError(f"{argument}: expected {key.replace('.', '/')}={value}, with a slash")


def _refuse_options(arguments: Sequence[str]) -> None:
    """Raise PartialLoraError for an option that Hydra does not have, as other tools may."""
    from hydra._internal.utils import get_args_parser

    known = get_args_parser()._option_string_actions
    for argument, following in pairwise([*arguments, None]):
        option, _, value = argument.partition("=")
        if option.startswith("-") and option not in known:
            stands_alone = following is None or following.startswith("-") or "=" in following
            raise PartialLoraError(no_such_option(option, value or (None if stands_alone else following)))


def _refuse_hidden_files(arguments: Sequence[str]) -> None:
    """Raise PartialLoraError for a --config-dir that is no folder, or has a file that the package's would hide."""
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
