"""PartialLoraConfig: a LoraConfig that also says what share of each module is removed, and how it is chosen."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, fields
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HTTPError
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from partial_lora.adapter import sidecar
from partial_lora.adapter.adapter_card import complete_card
from partial_lora.adapter.layer import EMBEDDED
from partial_lora.adapter.selection import (
    Geometry,
    ModuleMasks,
    frozen_a,
    random_masks,
    read_values,
    top_masks,
)
from partial_lora.errors import PartialLoraError, one_line
from partial_lora.files import write_atomic
from partial_lora.masks import (
    AXES,
    CHOICES,
    GRANULARITIES,
    MASKED,
    PAPER_BUDGET,
    Columns,
    Count,
    FanIn,
    Granularity,
    Mask,
    Rows,
    Selection,
    Sparsity,
    check_factors,
    read_sparsity,
)


class _PeftType(str):
    """A string that PEFT can read as a member of its PeftType, which has a ``value`` and a longer name as text."""

    @property
    def value(self) -> str:
        return str.__str__(self)

    def __str__(self) -> str:
        return f"PeftType.{self.value}"

    def __format__(self, spec: str) -> str:
        return format(self.value, spec)


PEFT_TYPE = _PeftType("PARTIAL_LORA")
COMPACT_FILE = "partial_lora.safetensors"  # what compact.py writes
Drawn = tuple[Mapping[str, ModuleMasks], Mapping[str, Geometry]]
"""Masks and geometry that a config gives the modules of a model: {module: masks}, {module: geometry}."""

PASSED = frozenset(
    {
        # What is adapted, and what trains beside it.
        *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("modules_to_save", "trainable_token_indices", "bias", "lora_bias", "ensure_weight_tying"),
        "layer_replication",
        # How each adapter is sized, scaled, drawn and run.
        *("r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora", "lora_dropout"),
        *("init_lora_weights", "fan_in_fan_out", "inference_mode", "runtime_config", "alora_invocation_tokens"),
        # The labels of the adapter.
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    }
)
"""Options of LoRA that go with masks. Together with REFUSED it names every field of LoraConfig."""

REFUSED = {
    "use_dora": "magnitudes of the kept rows alone lost four points on gtsrb",
    "use_qalora": "it pools the columns that a mask tells apart",
    "qalora_group_size": "it belongs to use_qalora",
    "use_bdlora": "its factors are block diagonal",
    "velora_config": "it replaces the backward pass",
    "arrow_config": "it replaces the forward pass",
    "kasa_config": "it changes the base weights and trains singular values densely",
    "monteclora_config": "it samples dense factors",
    "megatron_config": "its layers are split over devices",
    "megatron_core": "it belongs to megatron_config",
    "loftq_config": "it belongs to an initialisation that fits dense factors to the base weights",
    "eva_config": "it belongs to an initialisation that fits dense factors to data",
    "corda_config": "it belongs to an initialisation that fits dense factors to data",
    "lora_ga_config": "it belongs to an initialisation that fits dense factors to gradients",
}
"""Options that do not go with masks, with the reason. Each must have its default."""


@dataclass
class PartialLoraConfig(LoraConfig):
    """LoRA that trains only a part of every module: some rows of B and some columns of A, or single entries.

    The adapted form of a base weight W (out × in) is W + ΔW,

        ΔW = (alpha / rank) · (u_row ⊙ B) (u_col ⊙ A)

    with A (rank × in) and B (out × rank) as in LoRA. ``u_row`` ∈ {0, 1}^out keeps rows of B and ``u_col`` ∈ {0, 1}^in
    keeps columns of A; masks of single entries have the shapes of B and A. Only what is kept exists as a parameter. In
    a convolution, rows are output channels and columns input channels; in an embedding (tokens × dimensions), rows are
    tokens and columns dimensions. In fused experts (``target_parameters``) each expert has rows and columns of its own,
    drawn by its own name, "….experts.gate_up_proj.7"; their shares are those of the parameter or, by these names, of
    each expert. One of the two factors may be frozen (``columns``, ``rows``).

    Where a module keeps a share p of its rows and q of its columns, A is drawn for the kept columns (``fan_in``), and
    ΔW is p^-row_exponent · q^-column_exponent times what alpha / rank gives, so that dense LoRA's learning rate suits
    densities down to 12 %; below, it is lower. This factor is in B as other code sees it, in files too, so that
    ``lora_alpha`` is the alpha of every module; what trains is B without it. Every default is that of the command line.

    Attributes:
        r, lora_alpha: 16 and 16, in place of LoraConfig's 8 and 8.
        sparsity: the share removed, in [0, 1). One number for everything; or {module: number or {"rows": number,
            "columns": number}}, where a module is a full name or, as in ``target_modules``, a regular expression for
            the end of one (a full name wins, then the first match); or the path (str or PathLike) of a
            calibration.json. 0 is plain LoRA. None: 0.87, or what ``indices`` leave out.
        granularity: what stays or goes together: "rows_columns" (rows of B and columns of A), "units" (each unit of the
            rank has its own rows and columns, disjoint while they last), "element" (single entries of both; "rows" then
            stands for B and "columns" for A wherever both are named), or "groups" (rows and columns fall into random
            groups that share one set of values up to random signs: none is zero, and as many numbers train).
        selection: how the kept ones are chosen: "random" (by ``mask_seed``) or "top" (by ``scores`` or ``indices``).
        mask_seed: the seed of random masks, 0 or more; no other seed moves them.
        count: the number of random entries kept: "exact" (the share, rounded; at least one) or, for granularity
            "element" only, "bernoulli" (each on its own with probability 1 - sparsity; at least one).
        scores: for "top", the importance of all that may be kept: the largest stay, and the lower index among equals.
            {module's full name: {"rows": (out,), "columns": (in,)}} for every target module, as lists, arrays or
            tensors; for single entries, scores of B and A, flat in row-major order. ``sparsity`` says how many stay.
        indices: for "top" instead of ``scores``, the kept indices, ascending: {module's full name: {"rows": [...],
            "columns": [...]}} for every target module; for single entries, flat row-major indices into B and A.
            ``sparsity`` is left out, or agrees.
        columns: what becomes of A. "masked": what is kept of it trains. "frozen": it stays whole, as ``mask_seed``
            draws it. "one_hot": its rows are unit vectors, of as many columns as the rank, which ``mask_seed`` draws,
            so that A x is a part of x. Frozen either way, only what is kept of B trains, and the sparsity of columns
            has no meaning. docs/concepts/factors.md says which published method is which choice.
        rows: likewise of B: "masked", or "one_hot": its columns are unit vectors, and A trains, from zeros.
        fan_in: the inputs that A is drawn for: "dense", all of them, as in PEFT, or "kept", those that stay, so that
            the features A x are as large at every sparsity as in plain LoRA. None: "kept"; "dense" for single entries
            and for init_lora_weights="gaussian", which ignores the number of inputs.
        row_exponent: the exponent of p in the scaling, in [0, 1]; 0 leaves the scaling alone. None: 1; 0 for single
            entries.
        column_exponent: likewise of q; 0 by default.

    Every other attribute is LoraConfig's own. ``rank_pattern`` gives some modules a rank of their own; a saved adapter
    has the highest rank everywhere, and pads lower ones with zeros. Options that do not go with masks (``use_dora``,
    initialisations that fit the factors to weights or data, ...) are refused by name.

    Raises PartialLoraError, naming the attribute, for values that are out of range or do not go together.
    get_peft_model raises it, before the model is changed, where the settings do not fit the model's modules.
    """

    r: int = 16
    lora_alpha: int = 16
    sparsity: float | dict | str | PathLike | None = None
    granularity: Granularity = "rows_columns"
    selection: Selection = "random"
    mask_seed: int = 0
    count: Count = "exact"
    scores: dict | None = None
    indices: dict | None = None
    columns: Columns = "masked"
    rows: Rows = "masked"
    fan_in: FanIn | None = None
    row_exponent: float | None = None
    column_exponent: float = 0.0

    def __post_init__(self) -> None:
        refuse_options(self)  # first, before PEFT's own checks complain of a refused option
        self._check_choices()
        for name, value in GRANULARITIES[self.granularity].draw.items():
            if getattr(self, name) is None:
                setattr(self, name, "dense" if name == "fan_in" and self._is_gaussian else value)
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        self.check()
        self.expected: dict[str, dict] | None = None  # the sidecar's modules, when read from a folder
        self.drawn: Callable[[], Drawn] | None = None  # gives the masks that are saved with this

    def check(self) -> None:
        """Normalise our settings; raise PartialLoraError for an option that is refused or a value out of range."""
        refuse_options(self)
        self._check_choices()
        if not isinstance(self.mask_seed, Integral) or isinstance(self.mask_seed, bool) or self.mask_seed < 0:
            raise PartialLoraError(f"mask_seed is {self.mask_seed!r}: expected a whole number, 0 or more.")
        self.mask_seed = int(self.mask_seed)  # from numpy's types, which JSON does not know
        self.r, self.lora_alpha, self.lora_dropout = map(_plain, (self.r, self.lora_alpha, self.lora_dropout))
        for name in ("rank_pattern", "alpha_pattern"):
            setattr(self, name, {module: _plain(value) for module, value in (getattr(self, name) or {}).items()})
        for name in ("target_modules", "exclude_modules"):
            names = getattr(self, name)
            setattr(self, name, names if names is None or isinstance(names, str) else set(map(str, names)))
        form = GRANULARITIES[self.granularity]
        if self.count == "bernoulli" and not (form.single and self.selection == "random"):
            raise PartialLoraError("count is 'bernoulli': it needs granularity 'element' and selection 'random'.")
        values = [name for name in ("scores", "indices") if getattr(self, name) is not None]
        if len(values) != (self.selection == "top"):
            has = " and ".join(values) or "neither"
            raise PartialLoraError(
                f"selection is {self.selection!r} with {has}: 'top' takes one of scores and indices, 'random' neither."
            )
        for name in ("row_exponent", "column_exponent"):
            _check_number(name, getattr(self, name), Real, lambda exponent: 0 <= exponent <= 1, "a number in [0, 1]")
            setattr(self, name, float(getattr(self, name)))
        if not form.ranked and self.selection != "random":
            raise PartialLoraError(f"granularity is {self.granularity!r}: it needs selection 'random'.")
        check_factors(self.granularity, self.rows, self.columns)
        if self.lora_bias and (form.over_entries or self.rows != MASKED):
            raise PartialLoraError(
                "lora_bias: a row that is kept has its bias: expected granularity 'rows_columns' or 'groups', and rows"
                " 'masked'."
            )
        if self.fan_in == "kept" and self._is_gaussian:
            raise PartialLoraError("fan_in is 'kept': init_lora_weights='gaussian' ignores the number of inputs.")
        if self.sparsity is None:
            self.sparsity = 1 - PAPER_BUDGET if self.indices is None else 0.0
        self.sparsity = cast("float | dict", read_sparsity(self.sparsity))
        for name in values:
            setattr(self, name, read_values(getattr(self, name), name))

    def _check_choices(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices and not (name == "fan_in" and value is None):
                expected = " or ".join(map(repr, choices))
                raise PartialLoraError(f"{name} is {value!r}: expected {expected}.")

    @property
    def _is_gaussian(self) -> bool:
        return str(self.init_lora_weights).lower() == "gaussian"

    @property
    def shares(self) -> float | Sparsity:
        """The sparsity, as `check` has normalised it."""
        return cast("float | Sparsity", self.sparsity)

    def choose_masks(self, geometries: Mapping[str, Geometry]) -> dict[str, ModuleMasks]:
        """Return the masks of modules with these ``geometries`` {module: geometry}.

        Raises PartialLoraError where settings and modules do not fit, or where an adapter read from a folder had other
        masks.
        """
        self.check()  # again: attributes may have changed since
        highest = max(geometry.rank for geometry in geometries.values())
        for module, geometry in geometries.items():
            if geometry.rank != highest and geometry.rank != geometry.b[1]:
                raise PartialLoraError(
                    f"rank_pattern: {module} is a grouped convolution or has several experts, and its rank"
                    f" {geometry.rank} cannot be padded on disk: give it the highest rank, {highest}."
                )
            fits = self.selection == "random" and "one_hot" not in (self.rows, self.columns)
            if geometry.experts is not None and (not fits or GRANULARITIES[self.granularity].tied):
                raise PartialLoraError(
                    f"target_parameters: {module} takes random masks of whole rows and columns, of units or of single"
                    " entries: expected no selection='top', granularity='groups' nor 'one_hot' beside it."
                )
        factors = {"rows": self.rows, "columns": self.columns}
        options: dict[str, Any] = {"granularity": self.granularity, "mask_seed": self.mask_seed}
        if self.selection == "random":
            masks = random_masks(geometries, self.shares, factors, count=self.count, **options)
        else:
            key = "indices" if self.scores is None else "scores"
            masks = top_masks(geometries, self.shares, factors, getattr(self, key), key=key, **options)
            sidecar.check_size(masks)
        if self.expected is not None:
            sidecar.verify(masks, geometries, self.expected)
        return masks

    @property
    def frozen_axis(self) -> str | None:
        """The axis whose factor does not train: "rows" (B), "columns" (A), or None."""
        return next((axis for axis in AXES if getattr(self, axis) != MASKED), None)

    def frozen(self, module: str, geometry: Geometry) -> np.ndarray | None:
        """Return what is kept of the factor that does not train; None for none.

        Unit vectors are the identity over the rows or columns that they meet.
        """
        if self.columns == "frozen":
            return frozen_a(geometry, mask_seed=self.mask_seed, module=module)
        return None if self.frozen_axis is None else np.eye(geometry.rank, dtype=np.float32)

    def rank_of(self, module: str) -> int:
        ranks = self.rank_pattern or {}
        return ranks.get(get_pattern_key(list(ranks), module), self.r)

    def density_factor(self, masks: ModuleMasks) -> float:
        """Return the factor p^-row_exponent · q^-column_exponent on the change of a module with these masks.

        A factor that does not train has a density of 1 here.
        """
        exponents = {"rows": cast("float", self.row_exponent), "columns": self.column_exponent}  # set by __post_init__
        trains = [axis for axis in AXES if axis != self.frozen_axis]
        return math.prod(getattr(masks, axis).reach ** -exponents[axis] for axis in trains)

    def as_lora(self, rank: int | None = None) -> LoraConfig:
        """Return the plain LoraConfig of the same adapter on disk: all modules with one alpha and one ``rank``.

        The rank is the highest of any module; None: r.
        """
        options = {option.name: getattr(self, option.name) for option in fields(LoraConfig)}
        options |= {"rank_pattern": {}, "alpha_pattern": {}}
        if rank not in (None, self.r):  # the same scaling
            options |= {"r": rank, "lora_alpha": self.lora_alpha * self.unit(rank) / self.unit(self.r)}
        return LoraConfig(**options)

    def own_scaling(self, module: str) -> float:
        """Return a module's scaling over that of a module without a rank or alpha of its own: on disk it is in B."""
        if not (self.rank_pattern or self.alpha_pattern):
            return 1.0
        return scaling_of(self, module, self.rank_of(module)) * self.unit(self.r) / self.lora_alpha

    def unit(self, rank: int) -> float:
        """Return the alpha that gives a scaling of 1 at a rank."""
        return math.sqrt(rank) if self.use_rslora else rank

    def to_dict(self) -> dict:
        """Return everything in plain types, scores and indices as lists; runtime_config is left out, as PEFT does."""
        content = super().to_dict()
        for name in ("scores", "indices"):
            if content[name] is not None:
                content[name] = {
                    module: {axis: values.tolist() for axis, values in axes.items()}
                    for module, axes in content[name].items()
                }
        return content

    def __eq__(self, other: object) -> bool:
        # As plain types: comparing arrays gives no single truth value.
        return type(other) is type(self) and self.to_dict() == other.to_dict()

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json as for a LoRA adapter, partial_lora.json beside it, and our part of the card."""
        if self.drawn is None:
            raise PartialLoraError("this PartialLoraConfig is in no model, and has no masks to save: save the model.")
        masks, geometries = self.drawn()
        if self.choose_masks(geometries) != masks:
            raise PartialLoraError(
                "this PartialLoraConfig makes other masks than its adapter has: expected it unchanged."
            )
        self.as_lora(max(geometry.rank for geometry in geometries.values())).save_pretrained(save_directory, **kwargs)
        content = sidecar.describe(masks, geometries, {name: getattr(self, name) for name in sidecar.SETTINGS})
        # Without spaces: it may have millions of indices.
        text = json.dumps(content, separators=(",", ":"), allow_nan=False)
        write_atomic(Path(save_directory, sidecar.FILE_NAME), text + "\n")
        complete_card(Path(save_directory), size=self._size(masks, geometries))

    def _size(self, masks: Mapping[str, ModuleMasks], geometries: Mapping[str, Geometry]) -> str:
        """Return a sentence on how many numbers train of those of plain LoRA."""
        trained = whole = 0
        for module, shapes in geometries.items():
            for axis, factor in zip(AXES, (shapes.b, shapes.a), strict=True):
                mask: Mask = getattr(masks[module], axis)
                whole += math.prod(factor)
                trained += 0 if axis == self.frozen_axis else round(math.prod(factor) * len(mask.kept) / mask.size)
            if self.lora_bias:
                whole, trained = whole + shapes.b[0], trained + len(masks[module].rows.kept)
        share = 1 - trained / whole
        return f"Of the {whole:,} numbers in the low-rank factors {trained:,} were trained (sparsity {share:.3f})."

    def __getstate__(self) -> dict:
        """Leave out the model: a copy is not yet in one, and a file of the config does not hold it."""
        return vars(self) | {"drawn": None}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PartialLoraConfig:
        """Return the config of a saved adapter with its masks, from its folder (or hub repository).

        Raises PartialLoraError where a factor is missing; get_peft_model does so where masks differ from their digests.
        """
        hub_options = cls._split_kwargs(kwargs)[0]
        file = saved_file(pretrained_model_name_or_path, CONFIG_NAME, subfolder=subfolder, **hub_options)
        if file.with_name(COMPACT_FILE).is_file() and not file.is_file():
            raise PartialLoraError(f"{pretrained_model_name_or_path} holds a compact adapter: use load_compact.")
        if not file.is_file():  # PEFT would look for it on the hub
            raise PartialLoraError(f"{file} is not there: expected an adapter's folder, or OWNER/NAME of the hub.")
        try:
            lora = LoraConfig.from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise PartialLoraError(f"{file} is broken ({one_line(error)}): copy the adapter's folder again.") from None
        path = saved_file(pretrained_model_name_or_path, sidecar.FILE_NAME, subfolder=subfolder, **hub_options)
        saved = sidecar.read(path)  # a folder of another method has none
        refuse_options(lora)
        modules = saved["modules"]
        check_values(file.parent, modules, is_here=Path(pretrained_model_name_or_path).is_dir())
        options = {option.name: getattr(lora, option.name) for option in fields(LoraConfig)}
        try:
            config = cls(**options | sidecar.settings(saved))
        except PartialLoraError as error:
            raise PartialLoraError(f"{path} is broken: {error}") from None
        if config.r != lora.r:  # the same scaling
            config.lora_alpha = lora.lora_alpha * config.unit(config.r) / config.unit(lora.r)
        config.expected = modules
        return config


def scaling_of(config: LoraConfig, module: str, rank: int) -> float:
    """Return the factor of a module's B A: alpha / rank, or alpha / sqrt(rank) with rslora."""
    return _alpha_of(config, module) / (math.sqrt(rank) if config.use_rslora else rank)


def only(module: str) -> str:
    """Return a pattern that one module alone matches: PEFT compares it with the end of a name, so ^ anchors it."""
    return "^" + re.escape(module)


def _alpha_of(config: LoraConfig, module: str) -> float:
    alphas = config.alpha_pattern or {}
    return alphas.get(get_pattern_key(list(alphas), module), config.lora_alpha)


def refuse_options(config: LoraConfig) -> None:
    """Raise PartialLoraError, naming the option, if ``config`` sets an option that does not go with masks.

    An option of a newer PEFT, which is in neither list, is refused too unless it has its default.
    """
    for option in fields(LoraConfig):
        value = getattr(config, option.name)
        default = option.default if option.default_factory is MISSING else option.default_factory()
        is_default = value is default or (isinstance(value, type(default)) and value == default)
        if option.name not in PASSED and not is_default:
            reason = REFUSED.get(option.name, "this version of partial-lora does not know the option")
            raise PartialLoraError(f"{option.name}={value!r} does not go with Partial-LoRA: {reason}.")
    if not isinstance(config.init_lora_weights, bool) and str(config.init_lora_weights).lower() != "gaussian":
        raise PartialLoraError(
            f"init_lora_weights={config.init_lora_weights!r} does not go with Partial-LoRA: its values depend on each"
            " other, so that no part of them can be left out; use True, 'gaussian' or False."
        )
    for name in ("target_modules", "exclude_modules"):
        names = getattr(config, name)
        _check_names(name, None if isinstance(names, str) else names)  # a string is a pattern
    _check_names("modules_to_save", config.modules_to_save)
    rank = (Integral, lambda number: number >= 1, "a whole number, at least 1")
    alpha = (Real, lambda number: number > 0, "a number above 0")
    _check_number("r", config.r, *rank)
    _check_number("lora_alpha", config.lora_alpha, *alpha)
    _check_number("lora_dropout", config.lora_dropout, Real, lambda share: 0 <= share < 1, "a share in [0, 1)")
    for name, expected in (("rank_pattern", rank), ("alpha_pattern", alpha)):
        for module, value in (getattr(config, name) or {}).items():
            _check_number(f"{name}[{module!r}]", value, *expected)


def _check_names(name: str, names: Any) -> None:
    """Raise PartialLoraError where an option is no collection of names, or None."""
    listed = isinstance(names, Collection) and not isinstance(names, str)
    if names is not None and not (listed and all(isinstance(entry, str) and entry for entry in names)):
        raise PartialLoraError(f"{name} is {names!r}: expected names of modules.")


def _check_number(name: str, value: Any, kind: type, fits: Callable[[Any], bool], expected: str) -> None:
    """Raise PartialLoraError where an option is no finite number of a kind, Integral or Real, that fits."""
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and fits(value)):
        raise PartialLoraError(f"{name} is {value!r}: expected {expected}.")


def _plain(number: int | float) -> int | float:
    """Return a number as Python's own, which JSON knows, from numpy's, too."""
    return int(number) if isinstance(number, Integral) else float(number)


def saved_file(folder: str | PathLike, name: str, *, subfolder: str | None = None, **options: Any) -> Path:
    """Return the path of a file in a folder or, downloaded, in a repository of the model hub ("owner/name").

    options: of hf_hub_download. Raises PartialLoraError, naming the file, where there is neither.
    """
    path = Path(folder, subfolder or "", name)
    if Path(folder).is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
        return path
    try:
        return Path(hf_hub_download(str(folder), name, subfolder=subfolder, **options))
    except (OSError, ValueError, EntryNotFoundError, HTTPError) as error:
        raise PartialLoraError(
            f"{path} cannot be read ({one_line(error)}): expected it in a folder or a repository of the hub."
        ) from None


def check_values(folder: Path, modules: Mapping[str, Mapping], *, is_here: bool) -> None:
    """Refuse a folder whose adapter_model.safetensors is cut short or lacks a factor of one of ``modules``.

    PEFT only warns of a missing factor, and refuses a truncated file after it has changed the model. Only the file's
    header is read; a pickle is left to PEFT. is_here: whether the folder is the user's, so that it has to have a file;
    PEFT would look for it on the hub. Raises PartialLoraError, naming file and module.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        if is_here and not (folder / WEIGHTS_NAME).is_file():
            raise PartialLoraError(f"{path} is not there, but the adapter's masks are: copy it again.")
        return
    try:
        with safe_open(path, "pt") as file:
            keys = {key.replace("_orig_mod.", "").removeprefix("base_model.model.") for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise PartialLoraError(f"{path} is broken or truncated ({error}): copy it again.") from None
    inside = {re.sub(r"(\.base_layer)*\.lora_", ".lora_", key) for key in keys}  # PEFT nests the parameters of a module
    for module, entry in modules.items():
        owner, names = (module.rpartition(".")[0], inside) if "experts" in entry else (module, keys)
        for factor in ("lora_A", "lora_B"):
            if not {f"{owner}.{factor}.weight", f"{owner}.{EMBEDDED[factor]}"} & names:
                raise PartialLoraError(f"{path} has no {factor} of {module}, which has masks: copy it again.")
