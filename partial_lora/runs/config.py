"""The settings of a run: composed values become a checked `Config`, stored ones come back as one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from partial_lora.calibration.budget import Shapes, even_sparsity, masked_units, parameter_count
from partial_lora.calibration.config import BUDGETED, CALIBRATED, UNIFORM, CalibrationConfig
from partial_lora.errors import PartialLoraError, require
from partial_lora.files import at_home, redacted
from partial_lora.masks import PAPER_BUDGET, Sparsity, assign_sparsity, read_sparsity
from partial_lora.runs.rates import tuned
from partial_lora.runs.schema import (
    SECTIONS,
    Config,
    ModelConfig,
    TaskConfig,
    accelerate_file,
    defaults,
    plain_name,
    upgraded_settings,
)
from partial_lora.training.config import TRACKER_PACKAGES

GROUPS = ("model", "task", "method", "importance", "calibration", "mask", "trainer", "preset", "experiment")


_OF_PHOTOGRAPHS, _OF_SETS = 98, 56  # pixels of model.image_size=null, both multiples of vit_s14's patch
OmegaConf.register_new_resolver("at_home", at_home, replace=True)  # for the folder of a sweep, which Hydra makes


def conf_dir() -> Path:
    """Return the folder of group files: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def resolve(composed: DictConfig) -> Config:
    """Return the checked settings of a run: a mixture's members, data files, budget and tuned rate filled in.

    Raises PartialLoraError, in one line that names the key, for a missing value, a value out of range, and a file that
    is not there; OmegaConf's own errors for an unknown key or a value of another type.
    """
    # As plain data: of typed settings OmegaConf would take a key that `+key=value` has put past Hydra's own check.
    composed = OmegaConf.merge(_schema(), OmegaConf.to_container(composed))
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise PartialLoraError(f"{missing[0]}: expected a value, its group file sets none")
    name, known = composed.importance.name, sorted(file.stem for file in (conf_dir() / "importance").glob("*.yaml"))
    require(name in known, "importance.name", name, f"one of {', '.join(known)}")
    config = OmegaConf.to_object(composed)  # runs every __post_init__
    _check_surroundings(config)
    task = _with_members(config.task, conf_dir() / "task")
    fits = not task.members or task.kind != "label" or config.calibration.score in _SCORES
    require(fits, "calibration.score", config.calibration.score, f"one of {', '.join(sorted(_SCORES))}, for a mixture")
    if config.data_dir is not None:
        task = with_files(task, Path(config.data_dir))
    calibration, model = _with_budget(config.calibration, config.method.name), config.model
    if model.image_size is None:
        model = replace(model, image_size=_OF_PHOTOGRAPHS if task.path == "files" else _OF_SETS)
    config, trainer = replace(config, model=model, task=task, calibration=calibration), config.trainer
    if trainer.tuned is not None:  # before the run has its id, which the rate decides
        return replace(config, trainer=replace(trainer, **tuned(trainer.tuned, plain(config), trainer.tuned_on)))
    return config


@functools.cache
def _schema() -> DictConfig:
    """Return the schema as a node that is only read, so that a sweep of hundreds of runs makes it once."""
    return OmegaConf.structured(Config)


def _with_budget(calibration: CalibrationConfig, method: str) -> CalibrationConfig:
    """Return the settings with PAPER_BUDGET for a budget of null, where nothing is calibrated but a size is to be met.

    A method that only spends a budget ignores `calibration.sparsity`, which becomes null.
    """
    if method in BUDGETED:
        calibration = replace(calibration, sparsity=None)
    elif calibration.sparsity != UNIFORM:
        return calibration
    return calibration if calibration.budget else replace(calibration, budget=PAPER_BUDGET)


def _check_surroundings(config: Config) -> None:
    """Raise PartialLoraError, naming the key, for a file, folder or package that a run names and that is not there."""
    trainer, calibration, data_dir = config.trainer, config.calibration.file, config.data_dir
    known = calibration is None or Path(calibration).is_file()
    require(known, "calibration.file", calibration, "an existing calibration.json")
    known = trainer.tuned is None or Path(trainer.tuned).is_file()
    require(known, "trainer.tuned", trainer.tuned, "a file that scripts/tune.py makes")
    where = trainer.tuned_elsewhere
    require(where is None, "trainer.tuned_elsewhere", where, "null: a run notes there how trainer.tuned was found")
    missing = [TRACKER_PACKAGES[name] for name in trainer.report_to if not _installed(name)]
    to_do = f"trackers that are installed: `pip install {' '.join(missing)}` (all: partial-lora's extra `trackers`)"
    require(not missing, "trainer.report_to", trainer.report_to, to_do)
    if trainer.accelerate_config is not None:
        accelerate_file(trainer.accelerate_config)  # runs.launch checks it together with the keys of the trainer
    known = data_dir is None or Path(data_dir).is_dir()
    require(known, "data_dir", data_dir, "a folder of NAME/{train,validation,test}.parquet")
    check_files(config.task)
    _refuse_results_among_rows(config)


def _installed(module: str) -> bool:
    """Return whether a package can be imported; a mere folder of that name, as wandb leaves behind, does not count."""
    found = find_spec(module)
    return found is not None and found.origin is not None


def check_files(task: TaskConfig) -> None:
    """Raise PartialLoraError for a file of a task's rows that is not there; a mixture has its files in its members."""
    for key, path in _files_of(task):
        require(Path(path).is_file() or Path(path).is_dir(), key, path, "an existing file or folder")


def _files_of(task: TaskConfig) -> Iterator[tuple[str, str]]:
    """Give the key and the path of each of a task's files and folders."""
    files = task.data_files
    if files is None or task.path == "members":
        return
    for split, path in files.items() if isinstance(files, Mapping) else [(None, files)]:
        yield f"task.data_files.{split}" if split else "task.data_files", str(path)


def _refuse_results_among_rows(config: Config) -> None:
    """Refuse results in a folder of images: their pictures would become rows, and each run would change the ids."""
    place = Path(config.results_dir).resolve()
    for key, path in _files_of(config.task):
        folder = Path(path).resolve()
        if folder.is_dir() and place.is_relative_to(folder):
            hidden = any(part.startswith(".") for part in place.relative_to(folder).parts)
            require(hidden, "results_dir", config.results_dir, f"a folder outside of {key}={path}")


# --- The members of a mixture.

_FOR_EACH = (
    "train_samples",
    "test_samples",
    "validation_share",
    "test_share",
    "split_seed",
    "label_noise",
    "cache_bytes",
)
_OF_MIXTURE = {"name", "path", "members", "mixing", "data_files", *_FOR_EACH}
_FROM_MEMBERS = {"modality", "kind", "classes"}
_OF_NUMBERS = {"pearson", "spearman", "mse"}
_SCORES = {"auto", "accuracy", "loss"}  # scores that are means over examples, each within its member's classes


def _with_members(task: TaskConfig, folder: Path) -> TaskConfig:
    """Return a mixture whose members are {name: TaskConfig}, in place of names; another task as it is.

    folder: of the group files. Raises PartialLoraError, in one line that names the member, for a member that is not
    there, is wrong, or is of another modality or kind than the others.
    """
    if not task.members:
        return task
    usual = TaskConfig()
    for field in sorted(dataclasses.fields(task), key=lambda each: each.name):
        key, value = field.name, getattr(task, field.name)
        own = key not in _OF_MIXTURE | _FROM_MEMBERS
        require(not own or value == getattr(usual, key), f"task.{key}", value, "nothing: it is each member's own")
    settings, files = _member_settings(task.members, folder), task.data_files or {}
    by_member = isinstance(files, Mapping) and set(files) <= set(settings)
    expected = f"files by member, {{{next(iter(settings))}: {{train: PATH, …}}, …}}"
    require(by_member, "task.data_files", files, expected)
    for_each = {key: getattr(task, key) for key in _FOR_EACH if getattr(task, key) != getattr(usual, key)}
    members = {}
    for name, own in settings.items():
        of_files = {"data_files": files[name]} if name in files else {}
        require(own.get("name", name) == name, f"task.members.{name}.name", own.get("name"), f"{name}, or nothing")
        members[name] = _member(name, {"name": name, **own, **for_each, **of_files})
    (first, one), *others = members.items()
    for other, its in others:
        for key, its_own, expected in (("modality", its.modality, one.modality), ("kind", its.kind, one.kind)):
            alike = f"tasks of one {key}: {first} is of {expected}, {other} of {its_own}"
            require(its_own == expected, "task.members", list(members), alike)
    classes = [member.classes for member in members.values()]
    return replace(
        task,
        members=members,
        data_files=None,
        modality=one.modality,
        kind=one.kind,
        classes=None if None in classes else sum(classes),
    )


def _member_settings(members: object, folder: Path) -> dict[str, dict]:
    """Return the settings of each member as they are written: in its group file, or in place of its name."""
    if isinstance(members, Mapping):
        for name, own in members.items():
            plain_name("task.members", str(name))
            require(isinstance(own, Mapping), f"task.members.{name}", own, "settings of a task")
        return {str(name): dict(own) for name, own in members.items()}
    names = list(members) if isinstance(members, Sequence) and not isinstance(members, str) else [members]
    known = sorted(file.stem for file in folder.glob("*.yaml"))
    for name in names:
        require(name in known, "task.members", name, f"names out of {', '.join(known)}")
    require(len(set(names)) == len(names), "task.members", members, "every name once")
    return {name: yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8")) for name in names}


def _member(name: str, own: Mapping) -> TaskConfig:
    try:
        member = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TaskConfig), dict(own)))
        check_files(member)
    except OmegaConfBaseException as error:
        known = not isinstance(error, ConfigKeyError)
        reason = str(error.msg or error).splitlines()[0] if known else "no such key of a task"
        raise PartialLoraError(f"task.members.{name}.{error.full_key}: {reason}") from error
    except PartialLoraError as error:
        raise PartialLoraError(f"task.members, {name}: {error}") from error
    require(not member.members, "task.members", name, "tasks that are no mixtures")
    numbers = member.regression or _OF_NUMBERS & set(member.metrics)
    require(not numbers, "task.members", name, "tasks with classes: squared errors and cross entropies cannot be added")
    return member


# --- A folder of many tasks' rows, NAME/{train,validation,test}.parquet, so that a sweep can be over tasks.


def with_files(task: TaskConfig, folder: Path) -> TaskConfig:
    """Return a task that reads the files that `data_dir` has for it; of a mixture each member does.

    A task out of a package, and a task with `task.data_files` of its own, stay as they are. Raises PartialLoraError, in
    one line, where the folder has no training rows of a task.
    """
    if task.members:
        return replace(task, members={name: with_files(member, folder) for name, member in task.members.items()})
    if task.path.startswith("bundled:") or task.data_files is not None:
        return task
    files = {split: folder / task.name / f"{split}.parquet" for split in ("train", "validation", "test")}
    if not files["train"].is_file():
        raise PartialLoraError(
            f"data_dir={folder}: expected {files['train']} with the training rows of task={task.name}; put them "
            "there, set task.data_files, or leave data_dir out"
        )
    return replace(task, data_files={split: str(file) for split, file in files.items() if file.is_file()})


# --- What settings say of a run before it begins.

_EXAMPLE = {"image": "vit_s14", "text": "minilm_l6"}  # models by modality
_TASKS = {"image": "digits", "encoder": "sst2", "causal": "arc_easy"}  # tasks by the family of a model


def check_modality(model: ModelConfig, task: TaskConfig) -> None:
    """Raise PartialLoraError where the model does not read the task's inputs, or does not give the task's answers."""
    if model.modality != task.modality:
        raise PartialLoraError(
            f"model={model.name} reads {model.modality}s, and task={task.name} has {task.modality}s: choose another "
            f"task, such as task={_TASKS.get(model.family, _TASKS['image'])}, or another model, such as "
            f"model={_EXAMPLE[task.modality]}"
        )
    causal = model.family == "causal"
    if causal != (task.kind != "label"):
        kinds = "chooses options or writes texts" if causal else "tells labels"
        other = "minilm_l6" if causal else "smollm2_135m"
        raise PartialLoraError(
            f"model={model.name} {kinds}, and task={task.name} is of kind {task.kind}: choose another task, or a "
            f"model such as model={other}"
        )


def is_calibrated(config: Config) -> bool:
    """Return whether a calibration finds a run's sparsities, or its size.

    `method=uniform` meets a budget without one, unless calibration.file or calibration.reliability is set.
    """
    calibration, method = config.calibration, config.method.name
    met = method == "uniform" and calibration.budget is not None and not (calibration.file or calibration.reliability)
    return method in CALIBRATED and calibration.sparsity is None and not met


def fixed_sparsity(config: Config, shapes: Shapes) -> Sparsity | None:
    """Return the sparsities that are known without a calibration; None where one finds them, or there are none.

    A method that spends a budget by a rule of its own gets one share everywhere that costs as much. Raises
    PartialLoraError for `calibration.sparsity` of other modules than are adapted.
    """
    calibration = config.calibration
    if is_calibrated(config) or config.method.name not in (*CALIBRATED, *BUDGETED):
        return None
    if calibration.sparsity in (None, UNIFORM):
        masks = shapes, config.method.rank, config.mask.counted
        return even_sparsity(*masked_units(*masks), parameter_count(calibration.budget, *masks))
    try:
        return assign_sparsity(read_sparsity(calibration.sparsity), list(shapes))
    except PartialLoraError as error:
        raise PartialLoraError(f"calibration.{error}") from error


def tuner_size(config: Config, shapes: Shapes) -> int | None:
    """Return the parameters that a tuner of PEFT is to train; None where its own options decide that."""
    budget = config.calibration.budget
    if config.method.peft_type is None or budget is None:
        return None
    return parameter_count(budget, shapes, config.method.rank, "element")


def fixed_point(calibration: CalibrationConfig) -> dict[str, object]:
    """Return what decides the size of a run that is not calibrated."""
    key = "sparsity" if calibration.budget is None else "budget"
    return {key: getattr(calibration, key)}


# --- Settings as plain data: config.yaml, and `config` in result.json.


def plain(config: Config | TaskConfig) -> dict[str, Any]:
    """Return settings as nested mappings."""
    return dataclasses.asdict(config)


def without_places(settings: object) -> object:
    """Return settings in which a file or folder of this machine has its name alone."""
    if isinstance(settings, Mapping):
        return {key: without_places(value) for key, value in settings.items()}
    if isinstance(settings, list):
        return [without_places(each) for each in settings]
    is_place = isinstance(settings, str) and Path(settings).is_absolute()
    return Path(settings).name if is_place else redacted(settings)


def load(settings: Mapping) -> Config:
    """Return the Config of nested mappings, as in config.yaml or a record of any version (`schema.CHANGES`)."""
    settings = upgraded_settings(settings)

    def made(kind: type, values: Mapping) -> Any:
        return kind(**{field.name: values[field.name] for field in dataclasses.fields(kind) if field.name in values})

    task = settings.get("task", {})
    if isinstance(task.get("members"), Mapping):
        members = {name: made(TaskConfig, own) for name, own in task["members"].items()}
        settings = {**settings, "task": {**task, "members": members}}
    groups = {name: made(kind, settings[name]) for name, kind in SECTIONS.items() if name in settings}
    return made(Config, {**settings, **groups})


# --- A key that no group of settings has.

_ELSEWHERE = {  # what other tools call it: PEFT, transformers, TRL, Lightning, timm, torchrun
    "trainer.learning_rate": "lr base_lr learning_rate",
    "trainer.loraplus_ratio": "loraplus_lr_ratio",
    "trainer.epochs": "num_train_epochs num_epochs n_epochs max_epochs",
    "trainer.max_steps": "num_training_steps train_steps",
    "trainer.batch_size": "per_device_train_batch_size train_batch_size bs",
    "trainer.eval_batch_size": "per_device_eval_batch_size",
    "trainer.gradient_accumulation_steps": "grad_accum accumulate_grad_batches",
    "trainer.max_grad_norm": "gradient_clip_val clip_grad",
    "trainer.warmup": "warmup_ratio",
    "trainer.save_steps": "eval_steps save_freq",
    "trainer.mixed_precision": "precision amp",
    "trainer.mixed_precision=bf16": "bf16",
    "trainer.mixed_precision=fp16": "fp16",
    "trainer.num_processes": "gpus devices num_gpus nproc_per_node",
    "trainer.num_machines": "nnodes num_nodes",
    "trainer.num_workers": "dataloader_num_workers workers",
    "trainer.strategy": "fsdp",
    "trainer.accelerate_config": "deepspeed",
    "trainer.report_to": "logger",
    "method.rank": "r lora_r lora_rank",
    "method.alpha": "lora_alpha",
    "method.dropout": "lora_dropout",
    "model": "model_name model_name_or_path pretrained_model_name_or_path base_model",
    "model.target_modules": "lora_target_modules",
    "model.new_modules": "modules_to_save",
    "model.dtype": "torch_dtype",
    "model.quantization=nf4": "load_in_4bit",
    "model.quantization=int8": "load_in_8bit",
    "model.max_length": "max_seq_length max_seq_len cutoff_len",
    "task": "dataset dataset_name",
    "task.data_files": "data data_path dataset_path train_file",
    "task.metrics": "metric metric_for_best_model",
    "results_dir": "output_dir out_dir save_dir output",
    "overwrite": "overwrite_output_dir",
    "seed": "seed random_seed random_state data_seed",
}
_KEYS = {name: key for key, names in _ELSEWHERE.items() for name in names.split()}


def no_such_key(key: str) -> str:
    """Return one line that names the key, the one that was probably meant, and where all are listed."""
    if key.startswith("task.data_files."):  # Hydra adds no split to a task without files, or with one path for all
        return f"{key}: expected all files in one setting, task.data_files={{train: FILE, test: FILE}}"
    about, meant = ("hydra", None) if key.startswith("hydra.") else ("job", _meant(key))
    hint = "" if meant in (None, key) else f"did you mean {meant}? "
    return f"{key}: no such key; {hint}`partial-lora train --cfg {about}` lists the keys there are"


def no_such_option(option: str, value: str | None) -> str:
    """Return one line that names an unknown option, and the setting that was probably meant by it."""
    name = option.strip("-").replace("-", "_")
    if name in ("config", "config_file", "config_name", "config_path", "cn", "cp"):
        return f"{option}: no such option; a file of settings stands alone: {value or 'FILE.yaml'}"
    meant = name if name in GROUPS or name in defaults() else _meant(name)
    if meant and "=" not in meant:
        meant = f"{meant}={value or 'VALUE'}"
    hint = f", such as {meant}" if meant else ""
    return f"{option}: no such option; settings are KEY=VALUE{hint} (`partial-lora train --help` lists them)"


def _meant(key: str) -> str | None:
    """Return the key that another tool's name stands for, the only key of that name, or one of its group like it."""
    group, _, name = key.rpartition(".")
    if name in _KEYS:
        return _KEYS[name]
    names = {each: each.rpartition(".")[2] for each in defaults()}
    same = [each for each, own in names.items() if own == name]
    if len(same) == 1:
        return same[0]
    of_group = {own: each for each, own in names.items() if each.rpartition(".")[0] == group}
    if not group:
        of_group |= {each: each for each in GROUPS}
    close = get_close_matches(name, of_group, n=1, cutoff=0.75)
    return of_group[close[0]] if close else None
