"""Settings become what a run works with: a task, the transform of its rows, the frozen model, draws, a judge."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel

from partial_lora import methods, models, tasks
from partial_lora.budget import Shapes, shrunk
from partial_lora.calibration.config import CalibrationConfig
from partial_lora.calibration.few_shot import FewShot
from partial_lora.calibration.peers import Peers, of_first
from partial_lora.calibration.reliability import verdict
from partial_lora.calibration.result import Calibration
from partial_lora.errors import PartialLoraError
from partial_lora.files import write_json
from partial_lora.masks import Sparsity
from partial_lora.methods import tuners
from partial_lora.methods.config import MethodConfig
from partial_lora.methods.setting import ModuleScores, Setting
from partial_lora.models.config import ModelConfig
from partial_lora.models.from_files import RESAMPLING
from partial_lora.models.skeleton import ALL_LINEAR, skeleton_of
from partial_lora.settings.compatibility import check_modality
from partial_lora.settings.schema import Config
from partial_lora.tasks import Draws, Task
from partial_lora.tasks.config import TaskConfig
from partial_lora.tasks.image_folders import left_out
from partial_lora.tasks.kinds import kind_of
from partial_lora.tasks.metrics import OF_TEXTS
from partial_lora.tasks.sources import label_warnings
from partial_lora.tasks.task import Transform
from partial_lora.training import objectives
from partial_lora.training.generation import room_for_prompts

logger = logging.getLogger(__name__)


def task_of(config: Config, *, mixtures: bool = False) -> Task:
    """Load the task of a run. Raises PartialLoraError for a mixture, unless the caller knows `mixtures`."""
    chosen, seed = config.task, config.seed
    check_modality(config.model, chosen)
    if not chosen.members:
        return tasks.load(chosen, seed)
    if not mixtures:
        raise PartialLoraError(
            f"task={chosen.name}: a mixture can be trained on and calibrated, no more: take one "
            f"of its members, {', '.join(chosen.members)}"
        )
    members = [tasks.load(member, seed) for member in chosen.members.values()]
    mixing = seed if chosen.split_seed is None else chosen.split_seed
    return tasks.mix(chosen.name, members, mixing=chosen.mixing, seed=mixing)


def warnings_of(config: Config, task: Task) -> list[str]:
    """Return warnings about a training's settings and rows, a sentence each."""
    warnings, chosen = config.warnings, config.task
    size, rows = config.trainer.batch_size, len(task.train)
    if size > rows:
        warnings.append(f"trainer.batch_size={size}: there are {rows} training rows, so that an epoch is a single step")
    settings = (chosen.members or {"": chosen}).values()
    for own, member in zip(settings, getattr(task, "members", ()) or (task,), strict=True):
        warnings += left_out(own.data_files)
        warnings += label_warnings(member.labels, own)
        if shared := tasks.shared_inputs(member.test, member.train):
            warnings.append(f"task={member.name}: {shared} of {len(member.test)} test rows are training rows, too")
        warnings += _enlarged(config.model, member)
    return warnings


_SMALL, _SEEN = 64, 32  # pixels of an image, and images that are looked at


def _enlarged(model: ModelConfig, task: Task) -> list[str]:
    """Return a line about small images that are made much larger, for a model that takes other sizes, too."""
    if task.modality != "image" or model.image_size < 2 * _SMALL or not model.takes_any_size:
        return []
    largest = max(
        side for image in task.train.select(range(min(_SEEN, len(task.train))))["image"] for side in image.size
    )
    if largest > _SMALL:
        return []
    times = (model.image_size / _SMALL) ** 2
    return [
        f"model.image_size={model.image_size}: no image side has more than {largest} pixels; model.image_size={_SMALL} "
        f"takes about 1/{times:.0f} of the time"
    ]


def transform_of(model: ModelConfig, chosen: TaskConfig, task: Task | None = None) -> Transform:
    """Return the transform by which a task's rows enter a model. task: needed to read the rows of a mixture."""
    if chosen.members:
        members = [transform_of(model, member) for member in chosen.members.values()]
        return tasks.MixtureTransform(members, task)
    if model.modality == "image":
        inputs = {name: getattr(model, name) for name in ("image_size", "mean", "std", "channels", "interpolation")}
    else:
        tokenizer = models.tokenizer(name=model.name, weights=model.weights, family=model.family)
        inputs = {"tokenizer": tokenizer, "max_length": model.max_length}
    return resolve_name(f"partial_lora.tasks.{kind_of(chosen).transform}")(chosen, **inputs)


def judge_of(config: Config, task: Task, transform: Transform, peers: Peers) -> objectives.Judge:
    """Return the loss and the metrics of a task, or of the members of a mixture."""
    chosen, size = config.task, config.trainer.eval_batch_size
    if not isinstance(task, tasks.Mixture):
        return objectives.judge_of(task, transform, chosen, peers, batch_size=size)
    members = zip(task.members, transform.transforms, chosen.members.values(), strict=True)
    judges = [objectives.judge_of(*member, peers, batch_size=size) for member in members]
    return objectives.judge_of_members(task, judges)


def model_of(model: ModelConfig, labels: Sequence[str], class_names: Sequence[str] = ()) -> PreTrainedModel:
    """Load the frozen model with a head for `labels`, or for one number where there are none.

    A new head is drawn from torch's global generator. It and the other modules that train whole are in float32,
    whatever `model.dtype` says of the frozen rest. class_names: the names of the classes in CLIP's sentences, where
    these are not the labels. Raises PartialLoraError where texts of the settings' length do not fit, and for a `head`
    that does not give the logits.
    """
    loaded = models.load(model, list(class_names or labels))
    if class_names:
        loaded.config.id2label = dict(enumerate(labels))
        loaded.config.label2id = {label: index for index, label in enumerate(labels)}
    whole = list(model.new_modules)
    if model.head is not None:
        head = models.head_name(loaded, model.family)
        if model.head != head:
            raise PartialLoraError(f"model.head={model.head}: expected {head}, which gives the logits of {model.name}")
        whole.append(head)
    for name in whole:
        try:
            models.in_full_precision(loaded.get_submodule(name))
        except AttributeError as error:
            kind = type(loaded).__name__
            raise PartialLoraError(f"model.new_modules: {kind} has no module of the name {name}") from error
    longest = models.longest_text(loaded) if model.modality == "text" else None
    if longest is not None and model.max_length > longest:
        raise PartialLoraError(
            f"model.max_length={model.max_length}: expected at most {longest}, the positions that model={model.name} "
            "has"
        )
    return loaded


def check_room(chosen: TaskConfig, task: Task, model: PreTrainedModel) -> None:
    """Raise PartialLoraError where the model has too few positions for the texts that a task's metrics are of."""
    for member in getattr(task, "members", ()) or (task,):
        own = chosen.members[member.name] if chosen.members else chosen
        if OF_TEXTS.keys() & set(member.metrics):
            room_for_prompts(model, own.max_new_tokens)


# --- Calibration, on few-shot draws of the training rows.


def draw_settings(config: Config) -> dict[str, int | float | None]:
    """Return the keys of `calibration` that decide the draws: texts are drawn by `share`, unless that is 0."""
    calibration = config.calibration
    key = kind_of(config.task).draws_by if calibration.share > 0 else "shots"
    return {key: getattr(calibration, key), "max_samples": calibration.max_samples}


def draws_of(config: Config, rows: Dataset, **changes: int) -> Draws:
    """Draw the rows to fit on and those to score on; `changes`: `shots`, which then goes before `share`, and `seed`."""
    settings, members = {"seed": config.calibration_seed} | draw_settings(config) | changes, config.task.members
    if "shots" in changes:
        settings.pop("share", None)
    if members:
        return tasks.member_draws(rows, list(members), **settings)
    return tasks.few_shot_draws(tasks.strata(rows), **settings)


def calibration_config(config: Config, task: Task) -> CalibrationConfig:
    """Return the settings of calibration with the seed and the score that null and "auto" stand for."""
    calibration = config.calibration
    score = calibration.score
    if score == "auto":
        primary = "accuracy" if task.sizes else task.metrics[0]  # the only metric that all members of a mixture have
        score = kind_of(task).score or {"mse": "loss"}.get(primary, primary)
    return dataclasses.replace(calibration, seed=config.calibration_seed, score=score)


def new_head_of(model: ModelConfig) -> str | None:
    """Return the head that is new for every task; None for CLIP, which has one of its texts, and language models."""
    return None if model.family == "clip" else model.head


def few_shot_of(
    config: Config, task: Task, transform: Transform, loaded: nn.Module, draws: Draws | None = None
) -> FewShot:
    """Return a run's model and rows for importance and calibration. draws: those of `draws_of` where there are none."""
    model, sizing = config.model, config.sizing
    return FewShot(
        loaded,
        task.train,
        transform,
        draws or draws_of(config, task.train),
        calibration_config(config, task),
        config.importance,
        head=new_head_of(model),
        blocks=model.blocks,
        rank=sizing.method.nominal_rank,
        alpha=sizing.method.alpha,
        granularity=sizing.counted,
        architecture={"architecture": model.architecture, "model_args": model.model_args},
        drawn=draw_settings(config),
        sizes=task.sizes,
    )


def calibration(
    file: str | None, modules: Sequence[str], examples: FewShot | None, scores: ModuleScores | None, peers: Peers
) -> Calibration:
    """Return the calibration in a file if one is named, whatever the other keys say; else calibrate on few examples.

    Warnings about the draws are among its warnings. examples, scores: not read beside a file.
    """
    if file:
        return Calibration.load(Path(file)).reused_for(list(modules))
    calibrated = examples.calibrate(scores, peers=peers)
    return dataclasses.replace(calibrated, warnings=[*examples.draws.warnings, *calibrated.warnings])


def earlier_calibration(file: Path, modules: Sequence[str], peers: Peers) -> Calibration | None:
    """Return the calibration of an earlier attempt of this run, with its cost; None where there is none.

    It is not made again, since another device or processor may decide a close call otherwise.
    """

    def load() -> Calibration | None:
        try:
            earlier = Calibration.load(file) if file.is_file() else None
        except PartialLoraError as error:
            logger.warning("%s; calibrated again", error)
            return None
        return earlier if earlier and earlier.modules.keys() == set(modules) else None

    return of_first(peers, load)


def with_reliability(calibration: Calibration, agreement: dict) -> Calibration:
    """Return the calibration, with a warning where two halves of the scored draw do not support it."""
    weak = agreement["said"] or verdict(agreement["spearman_brown"])
    if not weak or weak in calibration.warnings:
        return calibration
    logger.warning("calibration: %s", weak)
    return dataclasses.replace(calibration, warnings=[*calibration.warnings, weak])


def method_of(method: MethodConfig) -> methods.Method:
    """Return the function of a method; raises PartialLoraError for options that PEFT refuses whatever the model is."""
    if method.peft_type is not None:
        tuners.configuration(method.peft_type, method.peft or {})
    return methods.METHODS[method.function]


def modules_of(model: PreTrainedModel, chosen: ModelConfig, *, ranked: bool) -> tuple[Shapes, list[str]]:
    """Return the modules to adapt by the shape of W (out, in), and the parameters among them that hold fused experts.

    ranked: rows and columns are ordered by importance. Raises PartialLoraError, since those of experts have none.
    """
    bare = skeleton_of(model)
    shapes = bare.targets(**chosen.trained_modules)
    experts = bare.expert_parameters(shapes)
    if experts and ranked:
        raise PartialLoraError(
            f"model.target_modules: {experts[0]} has fused experts, of which rows and columns have no importance:"
            " expected calibration=fixed and a method that ranks nothing, or other modules"
        )
    return shapes, experts


def setting_of(
    config: Config,
    shapes: Mapping[str, tuple[int, int]],
    sparsity: Sparsity | None = None,
    scores: ModuleScores | None = None,
    experts: Sequence[str] = (),
) -> Setting:
    """Return what a method makes an adapter of: the settings, the shapes of the modules, sparsities and importance."""
    modules, sizing = config.model.trained_modules, config.sizing
    if ALL_LINEAR in modules["target_modules"]:  # PEFT takes the word alone, not in a list
        modules["target_modules"] = [name for name in shapes if name.rpartition(".")[0] not in experts]
    setting = Setting(
        **modules,
        method=sizing.method,
        mask=config.mask,
        mask_seed=config.mask_seed,
        size=sizing.parameters(shapes),
        shapes=shapes,
        sparsity=sparsity,
        scores=scores,
        experts=experts,
    )
    shrink = sizing.calibration.shrink
    if sparsity is None or not shrink:
        return setting
    return dataclasses.replace(setting, sparsity=shrunk(sparsity, *setting.units(), shrink))


# --- What a model's files say beside its weights: how inputs are made, and the names of the classes.

# Keys of a timm configuration that hold whatever head the model has.
_OF_MODEL = ("classifier", "first_conv", "fixed_input_size", "min_input_size")


def describe(model: PreTrainedModel, config: ModelConfig, transform: Transform, folder: Path) -> None:
    """Write config.json, with the names of the classes, and what makes inputs: a tokenizer, or the size of images."""
    if config.family in ("timm", "clip"):
        write_json(folder / "config.json", _timm_config(model, config))
        return
    model.config.save_pretrained(folder)
    if config.family == "image":
        write_json(folder / "preprocessor_config.json", _processor(config))
        return
    tokenizer = getattr(transform, "transforms", [transform])[0].tokenizer  # members of a mixture share it
    if config.family == "encoder":
        tokenizer.model_max_length = config.max_length  # where texts are cut
    tokenizer.save_pretrained(folder)


def _processor(config: ModelConfig) -> dict[str, Any]:
    """Return an image processor's settings in transformers' format, of the class that resizes and crops as here."""
    flips = config.channels != "RGB"
    return {
        "image_processor_type": "MobileViTImageProcessor" if flips else "CLIPImageProcessor",
        **({"do_flip_channel_order": True} if flips else {}),
        "do_convert_rgb": True,
        "size": {"shortest_edge": config.image_size},
        "crop_size": {"height": config.image_size, "width": config.image_size},
        "resample": RESAMPLING[config.interpolation],
        "image_mean": list(config.mean),
        "image_std": list(config.std),
    }


def _timm_config(model: PreTrainedModel, config: ModelConfig) -> dict[str, Any]:
    """Return a config.json in timm's format, which transformers and its image processor read, too."""
    pretrained = {key: model.timm_model.pretrained_cfg.get(key) for key in _OF_MODEL}
    return {
        "architecture": model.config.architecture,
        "num_classes": model.config.num_labels,
        "num_features": model.timm_model.num_features,
        "label_names": [model.config.id2label[index] for index in range(model.config.num_labels)],
        "model_args": dict(model.config.model_args or {}),
        "pretrained_cfg": {key: value for key, value in pretrained.items() if value is not None}
        | {
            "num_classes": model.config.num_labels,
            "custom_load": False,
            "input_size": [3, config.image_size, config.image_size],
            "mean": list(config.mean),
            "std": list(config.std),
            "interpolation": config.interpolation,
            "crop_pct": 1.0,  # the shorter side is resized to the image's size and the middle square kept
            "crop_mode": "center",
        },
    }
