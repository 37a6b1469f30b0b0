"""Size of a run, counted on the skeleton of its model: nothing is downloaded, and for most methods nothing is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from partial_lora.budget import Shapes, dense_parameters
from partial_lora.building import peak, size
from partial_lora.calibration.level_search import most_passes
from partial_lora.calibration.result import Calibration
from partial_lora.masks import PAPER_BUDGET, Sparsity
from partial_lora.models.skeleton import Skeleton, skeleton
from partial_lora.settings import rates
from partial_lora.settings.compatibility import check_modality
from partial_lora.settings.schema import Config
from partial_lora.tasks.config import TaskConfig
from partial_lora.tasks.kinds import KINDS, kind_of

_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Outline:
    """Size of a run that has not begun.

    counts: counts and bytes as `size` gives them. sparsity_is: where their sparsity is from. outputs: of
    the head; 0 for a model without a new head. passes: of the calibration, at most; 0 without one. memory: of causal
    models, bytes at the peak of a training step (`peak.peak_memory`) by the format of the frozen weights. width: of the
    model (`rates.width`). is_known: whether the task or its files say how many outputs there are; else they are two.
    kept: bytes that a step keeps for its backward pass (`memory.StepMemory`), where they are counted.
    """

    counts: dict[str, int | float | None]
    sparsity_is: str
    outputs: int
    passes: int
    memory: dict[str, dict[str, int]]
    width: int
    is_known: bool = True
    kept: dict[str, int | None] | None = None

    @property
    def density(self) -> float:
        """The share of dense LoRA's parameters that trains."""
        trained, dense = (self.counts[f"adapter_{name}"] for name in ("trainable", "dense"))
        return trained / dense if dense else 0.0


def without_task(config: Config) -> Config:
    """Return the settings with a task of two classes if the default task does not suit the model; else as they are."""
    family = config.model.family
    if family in kind_of(config.task).families:
        return config
    modality, kind = next(key for key, kind in KINDS.items() if family in kind.families)
    return replace(config, task=TaskConfig(name="none", path="none", modality=modality, kind=kind, classes=2))


def outline(config: Config, *, memory: bool = False) -> Outline:
    """Return the outline of a run; the head is for two classes where neither the task nor its files say how many.

    memory: also count what a step keeps, which takes seconds.
    """
    kept = None
    if memory or config.calibration.kept:
        from partial_lora.building import memory as steps  # with torch

        config = steps.within(config)
        kept = asdict(steps.step_memory(config))
    model, method, calibration = config.model, config.method, config.calibration
    check_modality(model, config.task)
    head_size = 0 if model.head is None else 1 if config.task.regression else _classes(config, config.task)
    outputs = 2 if head_size is None else head_size
    bare = skeleton(**model.geometry, outputs=outputs or 2)
    shapes = bare.targets(**model.trained_modules)
    granularity, passes = config.mask.counted, 0
    sparsity = config.sizing.sparsity(shapes)
    if sparsity is not None:
        point = config.sizing.point or {"sparsity": 0}
        source = ", ".join(f"calibration.{key}={value}" for key, value in point.items())
    elif method.traits.size == "calibrated":
        sparsity, source = _expected_sparsity(config, shapes)
        passes = most_passes(calibration, len(shapes))
    elif method.traits.dense:
        sparsity, granularity, source = 0.0, "rows_columns", "nothing is masked"
    if sparsity is None or method.traits.own_ranks or method.rank == "auto":  # ranks of their own decide
        counts = _counted(config, shapes, outputs or 2, sparsity)
        source = "counted on the adapter itself" if sparsity is None else source
    else:
        modules = model.trained_modules
        counts = size.describe(bare, **modules, rank=method.nominal_rank, sparsity=sparsity, granularity=granularity)
    at_peak, width = _memory(config, bare, shapes, counts), rates.width(shapes.values())
    return Outline(counts, source, outputs, passes, at_peak, width, head_size is not None, kept)


def _classes(config: Config, task: TaskConfig) -> int | None:
    """Return how many outputs a task needs, by its settings or its files of rows; None where neither is at hand."""
    if task.members:
        counts = [_classes(config, member) for member in task.members.values()]
        return None if None in counts else sum(counts)
    if task.classes or not task.data_files:
        return task.classes
    from partial_lora.building.build import task_of

    return len(task_of(replace(config, task=task)).labels) or 1


def _expected_sparsity(config: Config, shapes: Shapes) -> tuple[float | Sparsity, str]:
    """Return the sparsity of a calibrated method as far as it is known before calibration, and its source.

    The control methods have as many parameters.
    """
    calibration = config.calibration
    if calibration.file:
        reused = Calibration.load(Path(calibration.file)).reused_for(list(shapes))
        return reused.sparsity, f"sparsities of {calibration.file}"
    budget, source = calibration.budget, f"calibration.budget={calibration.budget}"
    if budget is None:
        budget = PAPER_BUDGET
        source = "the sparsity of a threshold is known once it is calibrated; here the paper's 87 % (or set a budget)"
    return config.sizing.evenly(shapes, budget), source


def _counted(config: Config, shapes: Shapes, outputs: int, sparsity: Sparsity | None) -> dict[str, int | float | None]:
    """Return the counts of an adapter that is made on the meta device."""
    from partial_lora.building.memory import adapted
    from partial_lora.training.cost import describe_adapted

    dense = dense_parameters(shapes, config.method.nominal_rank)
    model = adapted(config, sparsity, outputs=outputs)
    return describe_adapted(model, config.model.head, new_modules=config.model.new_modules, dense=dense)


def _memory(config: Config, model: Skeleton, shapes: Shapes, counts: Mapping) -> dict[str, dict[str, int]]:
    """Return the memory of a causal model as it is set, in bf16 and in 4 bits, for a batch of the longest sequences.

    Nothing where its config has other names for its sizes than Llama's.
    """
    if config.model.family != "causal" or not model.config.keys() >= {*peak.KEYS}:
        return {}
    of_step = {"shapes": shapes, "counts": counts, "rank": config.method.nominal_rank}
    of_step |= {"batch_size": config.trainer.local_batch_size, "length": config.model.max_length}
    own = config.model.quantization or config.model.dtype
    found = {}
    for kind in dict.fromkeys((own, "bfloat16", "nf4")):
        dtype = config.model.dtype if kind == own else "bfloat16"
        quantization = kind if kind in ("nf4", "int8") else None
        found[_SHORT.get(kind, kind)] = peak.peak_memory(model, dtype=dtype, quantization=quantization, **of_step)
    return found
