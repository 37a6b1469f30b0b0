"""The arguments of a command line as Hydra takes them: values in its grammar, a file in place of config.yaml."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import yaml

from partial_lora.errors import PartialLoraError, in_yaml, require
from partial_lora.files import flatten, mapped, read_yaml
from partial_lora.models.config import FROM_FILES
from partial_lora.settings.keys import no_such_option
from partial_lora.settings.schema import GROUPS, SECTIONS, conf_dir, list_keys
from partial_lora.settings.versions import of_yaml

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override


CONFIG_NAME = "config"


def for_hydra(arguments: Sequence[str]) -> list[str]:
    """Return arguments as Hydra takes them: a FILE.yaml as its primary config, values in its grammar."""
    is_sweep = bool({"-m", "--multirun"} & set(arguments))
    names = _names_of_models(arguments)
    return [in_grammar(_with_own_models(argument, names), is_sweep) for argument in _with_file(arguments, names)]


def parse(arguments: Sequence[str]) -> Namespace:
    """Return Hydra's options and, as `overrides`, the settings; raises PartialLoraError for what is neither."""

    def refuse(message: str) -> NoReturn:
        raise PartialLoraError(message)

    parser = options()
    parser.error = refuse  # in place of a page
    parsed = parser.parse_intermixed_args(list(arguments))
    for name in ("package", "resolve"):
        if getattr(parsed, name) and not parsed.cfg:
            refuse(f"--{name}: expected --cfg beside it")
    return parsed


def options() -> ArgumentParser:
    """Return the parser of Hydra's options, which has no public name."""
    from hydra._internal.utils import get_args_parser

    return get_args_parser()


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
        lists = (value if value[0] == "[" else f"[{value}]" for value in override.sweep_string_iterator())
        return f"{key}={','.join(lists)}"
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

    texts = mapped(value, lambda _, item: QuotedString(item, Quote.double) if isinstance(item, str) else item)
    return Override._get_value_element_as_str(texts)


def as_text(argument: str) -> str:
    """Return KEY=VALUE as it is typed in a shell so that the value is one text."""
    key, _, text = argument.partition("=")
    return shlex.quote(f"{key}={quoted(text)}")


# --- A model that is no file of conf/model: a folder, or a repository of the hub.

OWN_MODELS: set[str] = set()  # names made by this process for folders and repositories, which are no choices
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")


def _names_of_models(arguments: Sequence[str]) -> set[str]:
    """Return the names of group files for models, the user's own among them."""
    folder = parse(arguments).config_dir
    places = [conf_dir(), *([Path(folder)] if folder else [])]
    return {file.stem for place in places for file in (place / "model").glob("*.yaml")}


def _with_own_models(argument: str, names: Collection[str]) -> str:
    """Return `model=` with names of group files in place of folders and repositories."""
    key, equals, value = argument.partition("=")
    if key != "model" or not equals:
        return argument
    chosen = [value] if os.path.isdir(os.path.expanduser(value)) else value.split(",")
    return f"model={','.join(own_model(model, names) for model in chosen)}"


def own_model(value: str, names: Collection[str]) -> str:
    """Return the name of the group file that a value of `model` stands for.

    A repository that a file of conf/model has as its weights is that model. For any other, and for a folder, a file is
    made here: it has a name and says where the weights are. All else is left to the model's own files, which are read
    once the task is known (`resolving`).
    """
    require(bool(value), "model", value, "a name of conf/model, a folder or an id of the hub")
    folder = Path(value).expanduser()
    if value in names:
        return value
    if not folder.is_dir():
        require(
            not value.startswith(("./", "../", "/", "~")), "model", value, "a folder with a config.json; none is there"
        )
        if not _REPOSITORY.fullmatch(value):
            return value
        files = sorted((conf_dir() / "model").glob("*.yaml"))
        model = next((file.stem for file in files if read_yaml(file).get("weights") == value), None)
        if model is not None:
            return model
    from hydra.core.config_store import ConfigStore

    plain = folder.resolve().name if folder.is_dir() else value.partition("@")[0].rpartition("/")[2]
    plain = re.sub(r"[^\w.-]", "_", plain).lstrip(".-") or "model"
    name = f"{plain}-{hashlib.sha256(value.encode()).hexdigest()[:8]}"
    OWN_MODELS.add(name)
    ConfigStore.instance().store(name=name, group="model", node={"name": plain, "weights": value, **FROM_FILES})
    return name


# --- A file of the user's own in place of config.yaml: the command line as YAML, or a run's config.yaml.

OWN = "own"  # Hydra's name for the file


def _with_file(arguments: Sequence[str], models: Collection[str]) -> list[str]:
    """Return the arguments as Hydra takes them: a FILE.yaml among them becomes its primary config."""
    files = [argument for argument in arguments if is_file(argument)]
    if not files:
        return list(arguments)
    if len(files) > 1:
        raise PartialLoraError(f"{files[1]}: expected KEY=VALUE, and one file at most; {files[0]} is one already")
    others = [argument for argument in arguments if argument != files[0]]
    from hydra.core.config_store import ConfigStore

    settings = settings_of(files[0])
    if is_record(settings):
        primary = _primary_of_record(of_yaml(settings, files[0]), others)
    else:
        primary = _primary(files[0], settings, models)
    ConfigStore.instance().store(name=OWN, node=primary)
    return [*others, f"--config-name={OWN}"]


def is_record(settings: Mapping) -> bool:
    """Return whether the settings of a file are a run's config.yaml, and no command line."""
    return "hydra" not in settings and all(isinstance(settings.get(group), Mapping) for group in SECTIONS)


def is_file(argument: str) -> bool:
    """Return whether an argument is a file of settings; KEY=VALUE may end like one."""
    named = argument.endswith((".yaml", ".yml")) and not argument.startswith("-")
    return named and ("=" not in argument or Path(argument).is_file())


def settings_of(file: str) -> dict:
    """Return what a file sets; raise PartialLoraError, in one line that names it, where it is no mapping of keys."""
    content = read_yaml(file)
    if not isinstance(content, dict) or not content:
        raise PartialLoraError(f"{file}: expected a line KEY: VALUE for each setting, such as model: minilm_l6")
    if "defaults" in content:
        raise PartialLoraError(f"{file}: defaults: expected a line GROUP: NAME for each, such as model: minilm_l6")
    return content


def _primary(file: str, content: Mapping, models: Collection[str]) -> dict:
    """Return the primary config of a file that is a command line: GROUP: NAME chooses, all else is set after it.

    A group that is described in the file itself, with a name of its own, has no group file beneath it.
    """
    from omegaconf import OmegaConf

    keys, chosen, seen = OmegaConf.create({}), {}, set()
    for key, value in content.items():
        if not re.fullmatch(r"[^.\[\]]+(\.[^.\[\]]+)*", str(key)):
            raise PartialLoraError(f"{file}: {key!r}: expected a key, such as model or trainer.epochs")
        if key in CHOICES or (key in GROUPS and not isinstance(value, Mapping)):
            is_name = value and isinstance(value, str)
            is_none = value is None and key in ("preset", "experiment")
            require(is_name or is_none, f"{file}: {key}", value, "a name, or keys of the group")
            chosen[key] = own_model(value, models) if key == "model" else value
        else:
            names = flatten({str(key): value}).keys()
            for name, other in product(names, seen):
                if f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}."):
                    raise PartialLoraError(f"{file}: {name}: expected one value, {other} is set already")
            seen |= names
            OmegaConf.update(keys, str(key), value, force_add=True)  # the key may have dots
    settings = OmegaConf.to_container(keys)
    for group, _, name in (key.partition(".") for key in list_keys()):
        if isinstance(settings.get(group), dict) and isinstance(word := settings[group].get(name), str):
            settings[group][name] = [word]
    for key, value in flatten({"hydra": settings.get("hydra", {})}).items():
        if reason := refused_of_files(key, value):
            raise PartialLoraError(f"{file}: {reason}")
    swept = settings.get("hydra", {}).get("sweeper", {}).get("params", {})
    for key, values in swept.items():  # Hydra takes a list for one value
        require(not isinstance(values, Mapping), f"{file}: hydra.sweeper.params.{key}", values, "values, no more keys")
        if isinstance(values, list):
            swept[key] = ",".join(item if _is_one(item) else quoted(item) for item in values)
    described = [group for group in GROUPS if "name" in (settings.get(group) or {}) and group not in chosen]
    chosen |= dict.fromkeys(described)
    return {
        "defaults": [CONFIG_NAME, *({f"override {key}": name} for key, name in chosen.items()), "_self_"],
        **settings,
    }


def _is_one(item: object) -> bool:
    """Return whether a value in a sweep's list is a text that Hydra reads as one value, or as a function of several."""
    if not isinstance(item, str):
        return False
    sweep = None if re.match(r"\w+\(", item) else parsed(f"key={item}")
    return sweep is None or not sweep.is_sweep_override()


def _primary_of_record(content: Mapping, overrides: Sequence[str]) -> dict:
    """Return the primary config of a run's config.yaml, which has every key: a group that is chosen stands in for it.

    Nothing of the run's own stays in such a group, but that another method keeps rank, alpha and dropout, and another
    mask or method the mask's seed. `overwrite` is left out, since it concerns that one run.
    """
    whole = yaml.safe_load((conf_dir() / f"{CONFIG_NAME}.yaml").read_text(encoding="utf-8"))
    after = [entry for entry in whole["defaults"] if entry not in ("schema", "_self_")]
    groups = [{key: None if key in GROUPS else name for key, name in entry.items()} for entry in after]
    chosen = {override.partition("=")[0] for override in overrides} & SECTIONS.keys()
    settings = {key: value for key, value in content.items() if key not in chosen | {"overwrite"}}
    if "method" in chosen:
        kept = ("rank", "alpha", "dropout")
        settings["method"] = {key: content["method"][key] for key in kept if key in content["method"]}
    if chosen & {"method", "mask"}:
        settings["mask"] = {"seed": content["mask"].get("seed")}
    return {"defaults": ["schema", "_self_", *groups], **settings, "hydra": whole["hydra"]}


# --- What of Hydra itself can be set.

# The launchers that a file may choose, and the only sweeper.
CHOICES = {
    "hydra/launcher": ("basic", "joblib", "submitit_local", "submitit_slurm", "ray"),
    "hydra/sweeper": ("basic",),
}
_FIELDS = ("hydra.launcher.", "hydra.sweeper.")


def refused_of_files(key: str, value: object) -> str | None:
    """Return why a file may not set a key of `hydra`, or choose in one of its groups; None where it may.

    Files are data. Most keys of Hydra name what it is to run, read or write, and a launcher's texts are part of shell
    scripts. So what a file says of a launcher is a name out of a list, or a number.
    """
    if key in CHOICES:
        expected = f"one of {', '.join(CHOICES[key])}"
        fits = value in CHOICES[key]
    elif key == "hydra.mode" or key.startswith("hydra.sweeper.params."):
        is_of_run = "._" not in key and ".hydra" not in key.replace("+", "")
        expected, fits = "values of a run's keys", isinstance(value, (str, int, float, list)) and is_of_run
    elif key.startswith(_FIELDS) and key != "hydra.sweeper.params":
        expected, fits = "a number in a file; the command line may set it", isinstance(value, (int, float))
    else:
        expected, fits = "hydra.mode, values in hydra.sweeper.params, or numbers of a launcher or sweeper", False
    return None if fits else f"{key}={in_yaml(value)}: expected {expected}"


# --- What Hydra would take for something else, or read past.

# Options of Hydra that would stand in for a FILE.yaml, or read a pickle.
_UNUSED = {"--config-path", "-cp", "--config-name", "-cn", "--experimental-rerun"}


def refuse(arguments: Sequence[str]) -> None:
    """Raise PartialLoraError for an argument that is no setting, or that Hydra would misread or ignore."""
    refuse_group_lists(arguments)
    _refuse_options(arguments)
    _refuse_hidden_files(arguments)


def refuse_group_lists(arguments: Sequence[str]) -> None:
    """Raise PartialLoraError for a list of group files, which Hydra would merge, or a key of it that no run heeds."""
    for argument in arguments:
        signed, _, value = argument.partition("=")
        key = signed.lstrip("+~")
        if key in GROUPS and value == "null" and not argument.startswith("~"):
            none = f", or ~{key} for none" if key in ("preset", "experiment") else ""
            raise PartialLoraError(f"{argument}: expected one name{none}")
        if key in GROUPS and value.startswith("["):
            raise PartialLoraError(f"{argument}: expected one name; for a run of each use -m {key}={value.strip('[]')}")
        if key.startswith("hydra/sweeper") and argument not in ("hydra/sweeper=basic", "~hydra/sweeper"):
            raise PartialLoraError(f"{argument}: expected hydra/sweeper=basic; examples/optuna_search.py is a search")
        if key.startswith("hydra.sweeper.params"):  # Hydra reads these from files alone
            raise PartialLoraError(f"{argument}: expected -m KEY=A,B, or the key in a FILE.yaml")
        heeded = key in CHOICES or key == "hydra.mode" or key.startswith(_FIELDS)
        if re.match(r"hydra\b", key) and not heeded and ("=" in argument or argument.startswith("~")):
            expected = "expected hydra/launcher or a key of it; files go to results_dir"
            raise PartialLoraError(f"{argument}: no key of a run or a sweep; {expected}")


def _refuse_options(arguments: Sequence[str]) -> None:
    """Raise PartialLoraError for an option that Hydra does not have, as other tools may."""
    hydra_options = options()._option_string_actions.keys() - _UNUSED
    for argument, following in pairwise([*arguments, None]):
        option, _, value = argument.partition("=")
        if option.startswith("-") and option not in hydra_options:
            stands_alone = following is None or following.startswith("-") or "=" in following
            raise PartialLoraError(no_such_option(option, value or (None if stands_alone else following)))


def _refuse_hidden_files(arguments: Sequence[str]) -> None:
    """Raise PartialLoraError for a --config-dir that is no folder, or has a name that is the package's or Hydra's."""
    folder = parse(arguments).config_dir
    if folder is None:
        return
    if not (folder and Path(folder).is_dir()):
        raise PartialLoraError(f"--config-dir {folder}: no such directory")
    of_package = [file.relative_to(conf_dir()) for file in sorted(conf_dir().rglob("*.yaml"))]
    for name in (*of_package, Path("schema.yaml"), Path(f"{OWN}.yaml"), Path("hydra")):
        if (Path(folder) / name).exists():
            raise PartialLoraError(f"--config-dir {folder}: {name} is a name of the package itself; expected another")
