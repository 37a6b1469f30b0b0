"""PartialLoraConfig: a LoraConfig that also says how much of each module stays, and which part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from huggingface_hub import hf_hub_download
from peft import LoraConfig

from partial_lora.adapter import sidecar
from partial_lora.adapter.selection import (
    AXES,
    Geometry,
    ModuleMasks,
    check_counts,
    given_masks,
    random_masks,
    read_sparsity,
)
from partial_lora.errors import PartialLoraError

PEFT_TYPE = "PARTIAL_LORA"

# What the masked form cannot hold, and why. Each must have its falsy default.
REFUSED = {
    "use_dora": "its magnitudes are trained densely",
    "rank_pattern": "every module has one rank, which is what other readers of the adapter expect",
    "lora_bias": "it would train entries no mask covers",
    "target_parameters": "only whole nn.Linear modules are masked",
    "layer_replication": "two modules would share one name",
    "use_qalora": "its input is pooled",
    "use_bdlora": "its factors are block diagonal",
    "velora_config": "it replaces the forward pass",
    "alora_invocation_tokens": "it replaces the forward pass",
    "arrow_config": "it replaces the forward pass",
    "kasa_config": "it replaces the forward pass",
    "monteclora_config": "it replaces the forward pass",
    "megatron_config": "its layers are no nn.Linear",
}


@dataclass
class PartialLoraConfig(LoraConfig):
    """LoRA of which every module trains only a part: some rows of B and some columns of A.

    Attributes:
        sparsity: the share removed, in [0, 1): one number, {module name or pattern: number or {"rows": number,
            "columns": number}}, or the path of a calibration.json. 0 is plain LoRA.
        granularity: what is kept or removed; "rows_columns" is the one there is.
        selection: "random" (by ``mask_seed`` and ``sparsity``) or "top" (by ``indices``).
        mask_seed: the seed of random masks; other seeds do not move them.
        indices: for "top", what every target module keeps, ascending: {module: {"rows": [...], "columns": [...]}}.

    Raises PartialLoraError for a value out of range and for options of LoRA that the masked form does not have.
    """

    sparsity: float | dict | str = field(default=0.0, metadata={"help": "Share of rows and columns removed."})
    granularity: str = field(default="rows_columns", metadata={"help": "What a mask keeps or removes."})
    selection: str = field(default="random", metadata={"help": "How the kept ones are chosen: random or top."})
    mask_seed: int = field(default=0, metadata={"help": "Seed of the random masks."})
    indices: dict | None = field(default=None, metadata={"help": "Kept rows and columns of every module, for top."})

    def __post_init__(self) -> None:
        self.refuse_unsupported()  # first, so that PEFT's own checks do not speak of what is refused anyway
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        self.sparsity = read_sparsity(self.sparsity)
        self.masks: dict[str, ModuleMasks] = {}  # of the model this was last injected into
        self.expected: dict[str, dict] | None = None  # the sidecar's modules, when read from a folder

    def refuse_unsupported(self) -> None:
        """Raise PartialLoraError, naming the option, if one is set that the masked form does not have."""
        for name, reason in REFUSED.items():
            if getattr(self, name):
                raise PartialLoraError(f"{name}={getattr(self, name)!r} does not go with Partial-LoRA: {reason}.")
        if not isinstance(self.init_lora_weights, bool):
            raise PartialLoraError(
                f"init_lora_weights={self.init_lora_weights!r} does not go with Partial-LoRA: A is drawn as plain LoRA"
                " draws it and B is zero, use True."
            )
        if self.granularity != "rows_columns":
            raise PartialLoraError(f"granularity is {self.granularity!r}: only 'rows_columns' is implemented.")
        if self.selection not in ("random", "top"):
            raise PartialLoraError(f"selection is {self.selection!r}: expected 'random' or 'top'.")
        if (self.selection == "top") != (self.indices is not None):
            raise PartialLoraError(f"selection is {self.selection!r}: indices go with 'top', and with nothing else.")
        if not isinstance(self.mask_seed, int) or isinstance(self.mask_seed, bool):
            raise PartialLoraError(f"mask_seed is {self.mask_seed!r}: expected a whole number.")

    def choose_masks(self, geometries: Mapping[str, Geometry | tuple[int, int]]) -> dict[str, ModuleMasks]:
        """The masks of modules with the given ``geometries`` {module: geometry}; they are remembered for saving.

        Raises PartialLoraError where settings and modules do not fit, or where an adapter read from a folder had other
        masks.
        """
        self.refuse_unsupported()
        geometries = {
            module: geometry if isinstance(geometry, Geometry) else _linear(geometry, self.r)
            for module, geometry in geometries.items()
        }
        if self.selection == "random":
            masks = random_masks(geometries, self.sparsity, mask_seed=self.mask_seed)
        else:
            masks = given_masks(geometries, self.indices)
            if self.sparsity != 0:
                check_counts(masks, self.sparsity)
        if self.expected is not None:
            sidecar.verify(masks, self.expected)
        self.masks = masks
        return masks

    def as_lora(self) -> LoraConfig:
        """The plain LoraConfig of the same adapter, seen as dense."""
        return LoraConfig(**{option.name: getattr(self, option.name) for option in fields(LoraConfig)})

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Write adapter_config.json as of a LoRA adapter, and partial_lora.json beside it."""
        if not self.masks:
            raise PartialLoraError("a PartialLoraConfig can be saved once get_peft_model has made its masks.")
        self.as_lora().save_pretrained(save_directory, **kwargs)
        sidecar.write(
            Path(save_directory),
            self.masks,
            granularity=self.granularity,
            selection=self.selection,
            mask_seed=self.mask_seed,
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs
    ) -> PartialLoraConfig:
        """The config that masks a saved adapter again, from its folder (or hub repository).

        Masks made from it must match the digests saved there, else PartialLoraError.
        """
        lora = LoraConfig.from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        path = Path(pretrained_model_name_or_path, subfolder or "", sidecar.FILE_NAME)
        if not path.parent.is_dir():
            hub, _, _ = cls._split_kwargs(kwargs)
            path = Path(hf_hub_download(pretrained_model_name_or_path, sidecar.FILE_NAME, subfolder=subfolder, **hub))
        saved = sidecar.read(path)
        modules = saved["modules"]
        config = cls(
            **{option.name: getattr(lora, option.name) for option in fields(LoraConfig)},
            sparsity={module: {axis: entry[axis] for axis in AXES} for module, entry in modules.items()},
            granularity=saved["granularity"],
            selection=saved["selection"],
            mask_seed=saved["mask_seed"],
            indices=None
            if saved["selection"] == "random"
            else {module: entry["indices"] for module, entry in modules.items()},
        )
        config.expected = modules
        return config


def _linear(shape: tuple[int, int], rank: int) -> Geometry:
    return Geometry(shape, a=(rank, shape[1]), b=(shape[0], rank))
