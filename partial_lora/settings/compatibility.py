"""Checks of what goes together, before any download: model and task, device and machine, images and patches."""

from __future__ import annotations

import sys
from pathlib import Path

from partial_lora.budget import parameter_count
from partial_lora.errors import PartialLoraError, require
from partial_lora.models.config import ModelConfig
from partial_lora.models.skeleton import Skeleton, stored_skeleton
from partial_lora.settings.schema import Config
from partial_lora.tasks.config import TaskConfig
from partial_lora.tasks.image_folders import FILES
from partial_lora.tasks.kinds import kind_of, kinds_for


def check_modality(model: ModelConfig, task: TaskConfig) -> None:
    """Raise PartialLoraError where the model does not read the task's inputs, or does not give the task's answers."""
    kind, kinds = kind_of(task), kinds_for(model.family)
    if kind not in kinds:
        raise PartialLoraError(
            f"model={model.name} gives {' or '.join(other.asked for other in kinds)}, and task={task.name} asks for "
            f"{kind.asked}: choose another task, such as task={kinds[0].example}, or another model, such as "
            f"model={kind.model}"
        )


def check(config: Config, *, here: bool) -> None:
    """Raise PartialLoraError for a task, device, image size, module or budget that does not fit the model or machine.

    here: the run starts on this machine. Names and shapes are checked if the model's skeleton is stored.
    """
    model, calibration = config.model, config.calibration
    check_modality(model, config.task)
    for task in (config.task.members or {}).values() or (config.task,):
        expected = f"{{train: PATH, test: PATH}}, or one PATH that a test split is cut from, for task={task.name}"
        require(task.path != FILES or bool(task.data_files), "task.data_files", task.data_files, expected)
    if here and config.trainer.device == "cuda" and sys.platform == "linux":
        require(has_accelerator(), "trainer.device", "cuda", "cpu, or a machine with such a device: this one has none")
    bare = stored_skeleton(**model.geometry, outputs=2)
    if bare is None:
        return
    _check_image_size(model, bare)
    shapes = bare.targets(**model.trained_modules)
    config.sizing.sparsity(shapes)  # refuses shares of modules that are not adapted
    if config.sizing.is_calibrated and calibration.budget is not None:
        parameter_count(calibration.budget, shapes, config.method.nominal_rank, config.mask.counted)


def _check_image_size(model: ModelConfig, bare: Skeleton) -> None:
    size, args = model.image_size, model.model_args
    patches = [shape[-1] for name, shape in bare.parameters.items() if name.endswith("patch_embed.proj.weight")]
    if model.modality != "image" or not patches or args.get("dynamic_img_pad"):
        return
    if not args.get("dynamic_img_size") and args.get("img_size"):
        require(size == args["img_size"], "model.image_size", size, f"{args['img_size']}, those of model={model.name}")
    require(size % patches[0] == 0, "model.image_size", size, f"a multiple of {patches[0]}, the patch of {model.name}")


_DEVICES = ("nvidia[0-9]*", "kfd", "dxg")  # of CUDA, ROCm and Windows' own Linux


def has_accelerator() -> bool:
    """Return True where this machine shows an accelerator; torch, which takes seconds to import, is not asked."""
    return any(any(Path("/dev").glob(name)) for name in _DEVICES)
