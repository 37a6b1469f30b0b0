"""Settings: what Hydra composed, checked and made plain; the id they give a run, and where its files go."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from partial_lora.errors import PartialLoraError, require
from partial_lora.files import file_sha256
from partial_lora.runs import identity
from partial_lora.runs.identity import defaults
from partial_lora.runs.rates import tuned
from partial_lora.runs.schema import Config, TaskConfig, plain_name, read
from partial_lora.training.config import TRACKERS

# --- The members of a mixture: their settings out of group files, and what a mixture is by what they are.

_FOR_EACH = ("train_samples", "test_samples", "validation_share", "split_seed", "label_noise", "cache_bytes")
_OF_MIXTURE = {"name", "path", "members", "mixing", "data_files", *_FOR_EACH}
_FOUND = {"modality", "kind", "classes"}  # by what the members are
_OF_NUMBERS = {"pearson", "spearman", "mse"}
_SCORES = {"auto", "accuracy", "loss"}  # that are means of examples, each seen within its member's classes


def with_members(settings: Mapping, folder: Path) -> dict:
    """Settings whose mixture has its members' settings, {name: settings}, in place of names; others as they are.

    folder: of the group files. Raises PartialLoraError, in one line that names the member, for one that is not there,
    is wrong, or is of another modality or kind than the others.
    """
    task = dict(settings["task"])
    if not task["members"]:
        return dict(settings)
    defaults = OmegaConf.to_container(OmegaConf.structured(TaskConfig))
    for key in sorted(task.keys() - _OF_MIXTURE - _FOUND):
        require(task[key] == defaults[key], f"task.{key}", task[key], "nothing: it is each member's own")
    given, files = _given(task["members"], folder), task["data_files"] or {}
    by_member = isinstance(files, Mapping) and set(files) <= set(given)
    require(by_member, "task.data_files", files, f"files by member, {{{next(iter(given))}: {{train: PATH, …}}, …}}")
    for_each = {key: task[key] for key in _FOR_EACH if task[key] != defaults[key]}
    members = {}
    for name, own in given.items():
        of_files = {"data_files": files[name]} if name in files else {}
        require(own.get("name", name) == name, f"task.members.{name}.name", own.get("name"), f"{name}, or nothing")
        members[name] = _checked(name, {"name": name, **own, **for_each, **of_files})
    task |= {"members": members, "data_files": None} | _alike(members)
    score = settings["calibration"]["score"]
    fits = task["kind"] != "label" or score in _SCORES
    require(fits, "calibration.score", score, f"one of {', '.join(sorted(_SCORES))}, for a mixture")
    return {**settings, "task": task}


def _given(members: object, folder: Path) -> dict[str, dict]:
    """What is said of each member: its group file, or the settings that stand in its place."""
    if isinstance(members, Mapping):
        for name in members:
            plain_name("task.members", str(name))
        return {str(name): dict(own) for name, own in members.items()}
    names = list(members) if isinstance(members, Sequence) and not isinstance(members, str) else [members]
    known = sorted(file.stem for file in folder.glob("*.yaml"))
    for name in names:
        require(name in known, "task.members", name, f"names out of {', '.join(known)}")
    require(len(set(names)) == len(names), "task.members", members, "every name once")
    return {name: yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8")) for name in names}


def _checked(name: str, own: Mapping) -> dict:
    """The whole settings of a member."""
    unknown = sorted(own.keys() - {field.name for field in dataclasses.fields(TaskConfig)})
    if unknown:
        raise PartialLoraError(f"task.members.{name}.{unknown[0]}: no such key of a task")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(TaskConfig), dict(own))
        for key in sorted(OmegaConf.missing_keys(merged)):
            raise PartialLoraError(f"task.members.{name}.{key}: expected a value")
        check_files(OmegaConf.to_object(merged))  # after its __post_init__
    except OmegaConfBaseException as error:
        reason = str(error.msg or error).splitlines()[0]
        raise PartialLoraError(f"task.members.{name}.{error.full_key}: {reason}") from error
    except PartialLoraError as error:
        raise PartialLoraError(f"task.members, {name}: {error}") from error
    found = OmegaConf.to_container(merged, resolve=True)
    require(not found["members"], "task.members", name, "tasks that are no mixtures")
    numbers = found["regression"] or _OF_NUMBERS & set(found["metrics"])
    require(not numbers, "task.members", name, "tasks of classes: an error squared is not to be added to cross entropy")
    return found


def _alike(members: Mapping[str, Mapping]) -> dict:
    """The modality and kind that all members share, and how many classes they have together, where all say it."""
    first, *others = members
    for other in others:
        for key in ("modality", "kind"):
            expected = f"tasks of one {key}: {first} is of {members[first][key]}, {other} of {members[other][key]}"
            require(members[other][key] == members[first][key], "task.members", list(members), expected)
    classes = [member["classes"] for member in members.values()]
    return {
        "modality": members[first]["modality"],
        "kind": members[first]["kind"],
        "classes": None if None in classes else sum(classes),
    }


# --- A folder of many tasks' rows, NAME/{train,validation,test}.parquet, so that a sweep can be over tasks.

_SPLITS = ("train", "validation", "test")


def with_files(settings: Mapping) -> dict:
    """Settings whose task, or each member of a mixture, reads the files that `data_dir` has for it.

    A task that came out of a package and one that has `task.data_files` of its own stay as they are. Raises
    PartialLoraError, in one line, where the folder has no training rows of a task.
    """
    if settings["data_dir"] is None:
        return dict(settings)
    folder, task = Path(settings["data_dir"]), settings["task"]
    if not task["members"]:
        return {**settings, "task": _found(folder, task)}
    members = {name: _found(folder, own) for name, own in task["members"].items()}
    return {**settings, "task": {**task, "members": members}}


def _found(folder: Path, task: Mapping) -> dict:
    if task["path"].startswith("bundled:") or task["data_files"] is not None:
        return dict(task)
    files = {split: folder / task["name"] / f"{split}.parquet" for split in _SPLITS}
    if not files["train"].is_file():
        raise PartialLoraError(
            f"data_dir={folder}: expected {files['train']} with the training rows of task={task['name']}; put them "
            "there, set task.data_files, or leave data_dir out"
        )
    return {**task, "data_files": {split: str(file) for split, file in files.items() if file.is_file()}}


# --- What is said of a key that no group of settings has.

_ELSEWHERE = {  # what other tools call it
    "lr": "trainer.learning_rate",
    "r": "method.rank",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "num_train_epochs": "trainer.epochs",
    "per_device_train_batch_size": "trainer.batch_size",
    "gpus": "trainer.num_processes",
    "sparsity": "calibration.budget",
}


def no_such_key(key: str, about: str = "job") -> str:
    """One line that names the key, the one that is likest to it if any is, and where all are listed.

    about: whose keys, as `--cfg` has it: job or hydra.
    """
    likest = None if about == "hydra" else _likest(key)
    meant = "" if likest is None else f"did you mean {likest}? "
    return f"{key}: no such key; {meant}`partial-lora train --cfg {about}` lists the keys there are"


def _likest(key: str) -> str | None:
    """What another tool's name stands for, the key of that name, or one of the same group that is spelt almost so."""
    group, _, name = key.rpartition(".")
    if name in _ELSEWHERE:
        return _ELSEWHERE[name]
    names = {each: each.rpartition(".")[2] for each in defaults()}
    same = [each for each, own in names.items() if own == name]
    if len(same) == 1:
        return same[0]
    of_group = {own: each for each, own in names.items() if each.rpartition(".")[0] == group}
    found = get_close_matches(name, of_group, n=1, cutoff=0.75)
    return of_group[found[0]] if found else None


GROUPS = ("model", "task", "method", "importance", "calibration", "mask", "trainer", "preset", "experiment")

_FILES = {"calibration.file", "task.data_files"}
_PLACES = {"model.weights", "model.text_weights", "task.path"}  # names, or folders


def conf_dir() -> Path:
    """The folder of group files: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def resolve(composed: DictConfig) -> dict:
    """The plain, checked settings of a composed config.

    Raises PartialLoraError, in one line that names the key, for an unknown key, a missing value, a value of another
    type or out of range.
    """
    unknown = _unknown_keys(composed, OmegaConf.structured(Config))
    if unknown:
        raise PartialLoraError(no_such_key(unknown[0]))
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise PartialLoraError(f"{missing[0]}: expected a value, its group file sets none")
    for group in ("method", "importance"):
        name, known = composed[group].name, sorted(file.stem for file in (conf_dir() / group).glob("*.yaml"))
        if name not in known:
            raise PartialLoraError(f"{group}.name={name}: expected one of {', '.join(known)}")
    _check_surroundings(OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), composed)))
    settings = with_files(with_members(OmegaConf.to_container(composed, resolve=True), conf_dir() / "task"))
    if settings["trainer"]["tuned"] is not None:  # before the run has its id, which is of the rate
        settings["trainer"] |= tuned(settings["trainer"]["tuned"], settings, settings["trainer"]["tuned_on"])
    return settings


def _check_surroundings(config: Config) -> None:
    """Raise PartialLoraError, by its key, for a file, folder or package that a run names and that is not there."""
    trainer, calibration, data_dir = config.trainer, config.calibration.file, config.data_dir
    known = calibration is None or Path(calibration).is_file()
    require(known, "calibration.file", calibration, "an existing calibration.json")
    known = trainer.tuned is None or Path(trainer.tuned).is_file()
    require(known, "trainer.tuned", trainer.tuned, "a file that scripts/tune.py makes")
    where = trainer.tuned_elsewhere
    require(where is None, "trainer.tuned_elsewhere", where, "null: a run notes there how trainer.tuned was found")
    missing = [TRACKERS[name] for name in trainer.report_to if not _installed(name)]
    to_do = f"trackers that are installed: `pip install {' '.join(missing)}` (all: `partial-lora[trackers]`)"
    require(not missing, "trainer.report_to", trainer.report_to, to_do)
    if trainer.accelerate_config is not None:
        read(trainer.accelerate_config)  # and runs.launch checks what comes of it and the keys beside it
    known = data_dir is None or Path(data_dir).is_dir()
    require(known, "data_dir", data_dir, "a folder of NAME/{train,validation,test}.parquet")
    check_files(config.task)


def check_files(task: TaskConfig) -> None:
    """Raise PartialLoraError for a file of a task's rows that is not there; those of a mixture are its members'."""
    files = task.data_files
    if files is None or task.path == "members":
        return
    for key, path in files.items() if isinstance(files, Mapping) else [(None, files)]:
        name = f"task.data_files.{key}" if key else "task.data_files"
        require(Path(str(path)).exists(), name, path, "an existing file or folder")


def _installed(module: str) -> bool:
    """Return whether a package can be imported; a mere folder of that name, as wandb leaves behind, is none."""
    found = find_spec(module)
    return found is not None and found.origin is not None


def _unknown_keys(node: DictConfig, schema: DictConfig, prefix: str = "") -> list[str]:
    """Keys that the schema does not have; `+key=value` can put them past Hydra's own check."""
    known = set(schema.keys())  # `key in schema` is False for a key whose value is missing
    unknown = [f"{prefix}{key}" for key in node if key not in known]
    for key in known & set(node.keys()):
        inner = schema._get_node(key)
        # A free mapping (model_args) and one that stands for no schema (data_files) have no keys to check.
        if OmegaConf.is_dict(inner) and OmegaConf.get_type(inner) is not dict:
            unknown += _unknown_keys(node[key], inner, f"{prefix}{key}.")
    return unknown


def run_id(settings: Mapping) -> str:
    """Eight hex digits that name everything a run computes from, its seed apart.

    The SHA-256 of the settings that differ from the schema's defaults, as sorted JSON. Files enter by content, so a
    copy elsewhere gives the same id and an edited file another one. The members of a mixture enter as tasks do, and in
    their order, which is that of the outputs.
    """
    members, changed = list(settings.get("task", {}).get("members") or ()), identity.computed_from(settings)
    for key, value in changed.items():
        own = identity.plain(key, members)
        is_file = own in _FILES or own.startswith("task.data_files.")
        if is_file or (own in _PLACES and Path(value).is_dir()):
            changed[key] = _digest(Path(value))
    if "trainer.tuned" in changed:  # whichever file it was: the rate found there is among the settings
        changed["trainer.tuned"] = True
    return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]


def with_defaults(settings: Mapping) -> dict:
    """Recorded settings with the defaults of keys that came later."""
    defaults = OmegaConf.to_container(OmegaConf.structured(Config))
    return {
        key: {**value, **settings.get(key, {})} if isinstance(value, dict) else settings.get(key, value)
        for key, value in defaults.items()
    }


def run_directory(settings: Mapping) -> Path:
    """Where a run's files go: results_dir/runs/task/model/method-id/seed."""
    names = settings["task"]["name"], settings["model"]["name"], f"{settings['method']['name']}-{run_id(settings)}"
    return Path(settings["results_dir"]).joinpath("runs", *names, f"seed{settings['seed']}")


def calibration_directory(settings: Mapping) -> Path:
    """Where `partial-lora calibrate` puts the sparsities of a model and task; each seed that draws has its own."""
    chosen = settings["calibration"]
    if chosen["seed"] is None:
        settings = {**settings, "calibration": {**chosen, "seed": settings["seed"]}}
    names = settings["task"]["name"], settings["model"]["name"], f"{settings['importance']['name']}-{run_id(settings)}"
    return Path(settings["results_dir"]).joinpath("calibrations", *names)


def _digest(path: Path) -> str:
    """The SHA-256 of a file's content, or of the names and contents of all files in a folder that are not hidden."""
    if not path.is_dir():
        return file_sha256(path)
    files = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path)))
    content = [(file.relative_to(path).as_posix(), file_sha256(file)) for file in files]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
