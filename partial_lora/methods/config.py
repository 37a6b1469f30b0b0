"""The settings of a method and of its masks: every key, its default and its range."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Optional

from partial_lora import methods
from partial_lora.budget import counted_of
from partial_lora.errors import one_of, require
from partial_lora.files import plain_name
from partial_lora.masks import CHOICES, GRANULARITIES, check_factors
from partial_lora.ranges import check

AUTO = "auto"  # in place of a rank
_NOMINAL_RANK = 16


def nominal_rank(rank: int | str) -> int:
    """Return the rank that sizes are counted by, where `auto` gives each module a rank of its own, too."""
    return _NOMINAL_RANK if rank == AUTO else rank


@dataclass
class MethodConfig:
    """The method, and the adapter's size before masking."""

    name: str = "partial"  # a file of conf/method, and the method's name in folders and tables
    # rank of the adapter; auto: sizes are those of rank 16, and each module gets the rank that reaches most of W at
    # its size
    rank: Annotated[Any, int, "[1, inf)", (AUTO,)] = 16
    alpha: Annotated[float, "(0, inf)"] = 16.0  # the adapter is scaled by alpha / rank
    dropout: Annotated[float, "[0, 1)"] = 0.0  # share of the adapter's inputs that training drops
    peft_type: Optional[str] = None  # method=peft: the type of PEFT's tuner, such as LOKR
    # the learning rate to try first, as a multiple of dense LoRA's (trainer.learning_rate=auto, compare)
    rate_factor: Annotated[float, "(0, inf)"] = 1.0
    # how fast that rate grows as the adapter gets smaller: with its density to the power of minus this
    rate_power: Annotated[float, "[0, 1]"] = 0.0
    # method=peft: options of the tuner's configuration, {option: value}; calibration.budget may set its size
    peft: Annotated[Any, Optional[dict]] = None

    @property
    def traits(self) -> methods.Method:
        """The method that goes by this name."""
        return methods.called(self.name)

    @property
    def nominal_rank(self) -> int:
        """The rank that sizes are counted by."""
        return nominal_rank(self.rank)

    @property
    def function(self) -> str:
        """The key of methods.METHODS: the method's name, or "peft" for a tuner of PEFT, which goes by any name."""
        return self.name if self.peft_type is None else "peft"

    def __post_init__(self) -> None:
        check(self, "method")
        fits = self.rank != AUTO or self.traits.any_rank
        require(fits, "method.rank", AUTO, f"a whole number, for method={self.name}")
        self._check_tuner()

    def _check_tuner(self) -> None:
        kind, options = self.peft_type, self.peft
        plain_name("method.name", self.name)
        if kind is None:
            require(self.name != "peft", "method.peft_type", None, "one of PEFT's tuners, such as LOKR")
            expected = methods.FORMER.get(self.name, f"one of {', '.join(methods.METHODS)}")
            require(self.name in methods.METHODS, "method.name", self.name, expected)
            require(options is None, "method.peft", options, f"null, for method={self.name}")
            return
        require(self.traits is methods.METHODS["peft"], "method.peft_type", kind, f"null, for method={self.name}")
        self.peft_type = kind.upper()
        if self.name == "peft":  # runs of two tuners are of two methods
            self.name = f"peft_{kind.lower()}"
        require(isinstance(options, (Mapping, type(None))), "method.peft", options, "{option: value}")


@dataclass
class MaskConfig:
    """The entries that a sparsity keeps."""

    # what is kept: rows_columns, whole rows of B and columns of A; units, other rows and columns for each unit of
    # the rank; element, single entries; groups, all rows and columns, tied in random groups
    granularity: Annotated[str, CHOICES["granularity"]] = "rows_columns"
    # how many are kept: exact, the share, rounded; bernoulli, each single entry with probability 1 - sparsity
    count: Annotated[str, CHOICES["count"]] = "exact"
    seed: Optional[int] = None  # draws the masks; null: the run's seed
    # masked: the kept columns of A train; frozen: A is whole, drawn by mask.seed, and only what is kept of B trains;
    # one_hot: likewise, but A's rows are unit vectors, of as many columns as the rank, drawn by mask.seed
    columns: Annotated[str, CHOICES["columns"]] = "masked"
    # masked: the kept rows of B train; one_hot: B's columns are unit vectors, and only what is kept of A trains
    rows: Annotated[str, CHOICES["rows"]] = "masked"
    # the inputs that A is drawn for: dense, all of them; kept, those whose columns are kept; null: kept, but dense for
    # single entries and where nothing is masked
    fan_in: Annotated[Optional[str], CHOICES["fan_in"]] = None
    # multiplies a module's scaling, alpha / rank, by (density of its rows) ** -row_exponent; null: 1, but 0 for single
    # entries and where nothing is masked
    row_exponent: Annotated[Optional[float], "[0, 1]"] = None
    # multiplies it by (density of its columns) ** -column_exponent
    column_exponent: Annotated[float, "[0, 1]"] = 0.0

    @property
    def counted(self) -> str:
        """Name what a budget is spent on (`budget.counted_of`)."""
        return counted_of(self.granularity, self.rows, self.columns)

    def __post_init__(self) -> None:
        check(self, "mask")
        if not GRANULARITIES[self.granularity].single:
            one_of("mask.count", self.count, "exact")
        check_factors(self.granularity, self.rows, self.columns, "mask.")
