"""What groups of settings stand for: a task, the way its rows enter the model, and the frozen model itself."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel

from partial_lora import methods, models, tasks
from partial_lora.calibration.config import CalibrationConfig, ImportanceConfig
from partial_lora.calibration.few_shot import calibrate_few_shot, importance_few_shot
from partial_lora.calibration.peers import Peers, of_first
from partial_lora.calibration.reliability import verdict
from partial_lora.calibration.result import Calibration
from partial_lora.errors import PartialLoraError
from partial_lora.tasks import Draws, Task, task
from partial_lora.tasks.task import Transform

_MODALITY = {"timm": "image", "clip": "image", "encoder": "text", "causal": "text"}
_EXAMPLE = {"image": "vit_s14", "text": "minilm_l6"}  # models that read these
_TASKS = {"image": "digits", "encoder": "sst2", "causal": "arc_easy"}  # of what models of a family do


def named(settings: Mapping, *names: str) -> dict:
    """The named arguments that a group of settings gives a function."""
    return {name: settings[name] for name in names}


def modality(model: Mapping) -> str:
    """What a model of these settings reads: "image" or "text"."""
    return _MODALITY[model["family"]]


def check_modality(settings: Mapping) -> None:
    """Raises PartialLoraError where the task's inputs are not what the model reads."""
    model, task = settings["model"], settings["task"]
    if modality(model) != task["modality"]:
        raise PartialLoraError(
            f"model={model['name']} reads {modality(model)}s, and task={task['name']} has {task['modality']}s: choose "
            f"another task, such as task={_TASKS.get(model['family'], _TASKS['image'])}, or another model, such as "
            f"model={_EXAMPLE[task['modality']]}"
        )
    causal, answers = model["family"] == "causal", task["kind"] != "label"
    if causal != answers:
        kinds = "chooses options or writes texts" if causal else "tells labels"
        other = "minilm_l6" if causal else "smollm2_135m"
        raise PartialLoraError(
            f"model={model['name']} {kinds}, and task={task['name']} is of kind {task['kind']}: choose another task, "
            f"or a model such as model={other}"
        )


def task_of(settings: Mapping, *, mixtures: bool = False) -> Task:
    """The task of a run's settings. Raises PartialLoraError for several in one, unless the caller knows `mixtures`."""
    check_modality(settings)
    chosen = settings["task"]
    if not chosen.get("members"):
        return tasks.load(**named(chosen, *tasks.SETTINGS))
    if not mixtures:
        raise PartialLoraError(
            f"task={chosen['name']}: a mixture can be trained on and calibrated, no more: take one "
            f"of its members, {', '.join(chosen['members'])}"
        )
    members = [tasks.load(**named(member, *tasks.SETTINGS)) for member in chosen["members"].values()]
    return tasks.mix(chosen["name"], members, mixing=chosen["mixing"], seed=chosen["split_seed"])


def transform_of(settings: Mapping, task: Task | None = None) -> Transform:
    """How rows of a run's task enter its model. Of a mixture `task` says where the rows are, if any are to be read."""
    model, chosen = settings["model"], settings["task"]
    if chosen.get("members"):
        members = chosen["members"].values()
        return tasks.MixtureTransform([transform_of({**settings, "task": member}) for member in members], task)
    if modality(model) == "image":
        return tasks.ImageTransform(**named(model, "image_size", "mean", "std", "interpolation"))
    tokenizer = models.tokenizer(**named(model, "name", "weights", "family"))
    if chosen["kind"] == "label":
        return tasks.TextTransform(tokenizer, model["max_length"])
    chat = chosen["chat_template"]
    if chat is None:  # of a benchmark the prompt is part of what is compared
        chat = chosen["path"] == "files" and tokenizer.chat_template is not None
    return tasks.CausalTransform(tokenizer, model["max_length"], kind=chosen["kind"], chat=chat)


def model_of(model: Mapping, labels: Sequence[str], class_names: Sequence[str] = ()) -> PreTrainedModel:
    """The frozen model of the settings' group `model` with a head for `labels`, or for one number where none is given.

    A head that is new is drawn from torch's global generator as it is. It and the other modules that train whole are in
    float32 whatever `model.dtype` says of the frozen rest. class_names: what CLIP's sentences call the classes, where
    that is not what they are told apart by. Raises PartialLoraError where texts of the settings' length do not fit, and
    for a `head` that does not give the logits.
    """
    loaded = models.load(labels=list(class_names or labels), **named(model, *models.SETTINGS))
    if class_names:
        loaded.config.id2label = dict(enumerate(labels))
        loaded.config.label2id = {label: index for index, label in enumerate(labels)}
    whole = list(model["new_modules"])
    if model["head"] is not None:
        head = models.head_name(loaded, model["family"])
        if model["head"] != head:
            raise PartialLoraError(
                f"model.head={model['head']}: expected {head}, which gives the logits of {model['name']}"
            )
        whole.append(head)
    for name in whole:
        models.in_full_precision(_module(loaded, name))
    if modality(model) == "text":
        _check_length(loaded, model)
    return loaded


def _module(loaded: PreTrainedModel, name: str) -> torch.nn.Module:
    try:
        return loaded.get_submodule(name)
    except AttributeError as error:
        kind = type(loaded).__name__
        raise PartialLoraError(f"model.new_modules: {kind} has no module of the name {name}") from error


def _check_length(loaded: PreTrainedModel, model: Mapping) -> None:
    """Positions that are embedded one by one come to an end; some models start to count after the padding's."""
    for name, module in loaded.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            longest = module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
            if model["max_length"] > longest:
                raise PartialLoraError(
                    f"model.max_length={model['max_length']}: expected at most {longest}, the positions that "
                    f"model={model['name']} has"
                )


def has_new_head(model: Mapping) -> bool:
    """Whether the model comes without a head for the task; CLIP makes one of the names of the classes."""
    return not models.has_own_head(model)


def drawn_by(settings: Mapping) -> dict:
    """The keys of `calibration` that decide the few-shot draws: texts are drawn by `share`, unless that is 0."""
    chosen = settings["calibration"]
    by_share = settings["task"]["modality"] == "text" and chosen["share"] > 0
    return named(chosen, "share" if by_share else "shots", "max_samples")


def calibration_seed(settings: Mapping) -> int:
    """The seed of everything that calibration draws: its own, so that runs share one calibration, or the run's."""
    own = settings["calibration"]["seed"]
    return settings["seed"] if own is None else own


def draws_of(settings: Mapping, rows: Dataset, **changes: int) -> Draws:
    """The few-shot draws of training rows; `changes` are of `shots`, which then count, and of `seed`."""
    drawn = drawn_by(settings)
    if "shots" in changes:
        drawn.pop("share", None)
    asked = {"seed": calibration_seed(settings)} | drawn | changes
    if settings["task"].get("members"):
        return tasks.member_draws(rows, list(settings["task"]["members"]), **asked)
    return tasks.few_shot_draws(tasks.strata(rows), **asked)


def calibration_score(settings: Mapping, task: Task) -> str:
    """What calibration counts: what was asked for or, on "auto", the task's primary metric."""
    asked = settings["calibration"]["score"]
    if asked != "auto":
        return asked
    if task.kind != "label":
        return {"choice": "options", "generation": "loss"}[task.kind]
    if task.sizes:  # the only one that is the same for all members
        return "accuracy"
    primary = task.metrics[0]
    return {"mse": "loss"}.get(primary, primary)


# --- What a run asks of its few-shot draws, out of its settings, and what is made of the answer.

logger = logging.getLogger(__name__)


def importance(
    settings: dict,
    task: tasks.Task,
    transform: task.Transform,
    model: nn.Module,
    targets: list[str],
    draws: tasks.Draws,
) -> methods.Scores:
    """Importance of every row and column of the modules that are to be adapted."""
    return importance_few_shot(
        model,
        task.train,
        transform,
        ImportanceConfig(**settings["importance"]),
        modules=targets,
        draws=draws,
        head=settings["model"]["head"],
        seed=calibration_seed(settings),
        new_head=has_new_head(settings["model"]),
        sizes=task.sizes,
    )


def asked(settings: dict, task: tasks.Task, scores: methods.Scores, draws: tasks.Draws, peers: Peers) -> dict:
    """What is asked of the few-shot draws (`calibrate_few_shot`)."""
    found = {"seed": calibration_seed(settings), "score": calibration_score(settings, task)}
    return {
        "config": CalibrationConfig(**settings["calibration"] | found),
        "scores": scores,
        "draws": draws,
        "peers": peers,
        "rank": settings["method"]["rank"],
        "granularity": settings["mask"]["granularity"],
        "importance": ImportanceConfig(**settings["importance"]),
        "architecture": named(settings["model"], "architecture", "model_args"),
        "new_head": has_new_head(settings["model"]),
        "sizes": task.sizes,
        "drawn": drawn_by(settings),
        **named(settings["model"], "head", "blocks"),
    }


def calibration(file: str | None, given: tuple, asked: dict) -> Calibration:
    """The sparsities: those of a file where one is named, whatever else is asked; else what the draws say.

    What is wrong with the draws is among the warnings.
    """
    if file:
        return Calibration.load(Path(file)).reused_for(list(asked["scores"]))
    found = calibrate_few_shot(*given, **asked)
    return dataclasses.replace(found, warnings=[*asked["draws"].warnings, *found.warnings])


def before(file: Path, targets: Sequence[str], peers: Peers) -> Calibration | None:
    """What an earlier attempt of this run had found, which stands, at its cost; None where there is none.

    It is not found again, since on another device or processor a close call may end otherwise than it did there.
    """

    def read() -> Calibration | None:
        try:
            found = Calibration.load(file) if file.is_file() else None
        except PartialLoraError as error:
            logger.warning("%s; found again", error)
            return None
        return found if found and found.modules.keys() == set(targets) else None

    return of_first(peers, read)


def doubted(calibration: Calibration, agreement: dict) -> Calibration:
    """The same, with a warning where two halves of the scored draw do not support it."""
    weak = agreement["said"] or verdict(agreement["spearman_brown"])
    if not weak or weak in calibration.warnings:
        return calibration
    logger.warning("calibration: %s", weak)
    return dataclasses.replace(calibration, warnings=[*calibration.warnings, weak])
