"""The methods that are compared: each takes the frozen model and returns it with what it trains.

Every method trains the task's head; they differ in what else they train. A new one is a function, its entry in
`METHODS`, which says all that its name tells before any model is there, and a file in conf/method. Settings are checked
by these entries in processes that import no torch, so a function is imported once it is called.
"""

from __future__ import annotations

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

    from partial_lora.methods.setting import Setting


@dataclass(frozen=True)
class Method:
    """A method, to be called with the frozen model and a `Setting`.

    Attributes:
        function: MODULE:NAME in this package.
        training: MODULE:NAME of what it adds to AdamW on the task's loss.
        size: who decides how many parameters it trains: "calibrated", a calibration; "budget", calibration.budget
            (null: PAPER_BUDGET, or method.rank where modules have ranks of their own); "rank", calibration.budget too
            (null: method.rank, or the options of a tuner of PEFT); "own", its own keys, whatever the budget.
        as_calibrated: it has the sparsities that a calibration chooses.
        size_alone: a calibration decides nothing about it but how many parameters it trains.
        even: it has one sparsity for all modules and axes.
        dense: it is LoRA of method.rank, which budgets are shares of.
        masked: its adapter is masked, as `mask` says.
        ranked: it ranks rows and columns by importance, calibrated or not.
        any_rank: its random rows and columns go with any rank.
        own_ranks: its modules have ranks of their own.
        product: it trains both factors of a product B A. AdaLoRA's is one of three.
        head_alone: nothing but the head trains.
        granularity, rows, columns: what these keys of `mask` may be; empty: anything.
        importance: the only measure that it ranks by; None: any.
        reference: others are compared with it at equal size, unless another is named.
        words: what a page calls it; "": by its name.
    """

    function: str
    training: str | None = None
    size: str = "own"
    as_calibrated: bool = False
    size_alone: bool = False
    even: bool = False
    dense: bool = False
    masked: bool = False
    ranked: bool = False
    any_rank: bool = False
    own_ranks: bool = False
    product: bool = True
    head_alone: bool = False
    granularity: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    importance: str | None = None
    reference: bool = False
    words: str = ""

    @property
    def is_sparse(self) -> bool:
        """True where sparsities, calibrated or even ones, say what it keeps of a module."""
        return self.size in ("calibrated", "budget")

    def __call__(self, model: nn.Module, setting: Setting) -> PeftModel:
        return resolve_name(f"{__name__}.{self.function}")(model, setting)


_CALIBRATED: dict[str, Any] = {"size": "calibrated", "masked": True}
_SPENT: dict[str, Any] = {"size": "budget", "masked": True}
_ONE: dict[str, Any] = {**_SPENT, "product": False}  # factor trains
_WHOLE: dict[str, Any] = {"granularity": ("rows_columns",)}
_RANKED: dict[str, Any] = {**_ONE, **_WHOLE, "own_ranks": True}
_BOTH: dict[str, Any] = {"rows": ("masked",), "columns": ("masked",)}
METHODS = {
    "partial": Method(
        "partial:partial",
        **_CALIBRATED,
        as_calibrated=True,
        any_rank=True,
        words="Partial-LoRA: a random subset of the rows and columns of LoRA's factors, the others are zero",
    ),
    "targeted": Method("partial:targeted", **_CALIBRATED, **_WHOLE, as_calibrated=True, ranked=True),
    "entries": Method("controls:uniform", **_SPENT, granularity=("element",), **_BOTH),
    "lori": Method("controls:uniform", **_ONE, granularity=("element",), columns=("frozen",)),
    "lorafa": Method("partial:whole", **_RANKED, columns=("frozen",)),
    "paca": Method("partial:whole", **_RANKED, columns=("one_hot",)),
    "rows": Method("partial:whole", **_RANKED, rows=("one_hot",)),
    "ticket": Method("partial:ticket", **_SPENT, **_WHOLE, **_BOTH, ranked=True, importance="adapter"),
    # It chooses rows that meet the kept columns of the next module.
    "flow": Method("flow:flow", **_CALIBRATED, as_calibrated=True, granularity=("rows_columns", "element"), **_BOTH),
    "uniform": Method("controls:uniform", **_CALIBRATED, size_alone=True, even=True, any_rank=True),
    "shuffled": Method("controls:shuffled", **_CALIBRATED, any_rank=True),
    "inverted": Method("controls:inverted", **_CALIBRATED, any_rank=True),
    "random_weights": Method("controls:random_weights", size="calibrated", size_alone=True, product=False),
    "lora": Method("lora:lora", size="rank", own_ranks=True, reference=True, words="LoRA"),
    "dense": Method("lora:dense", dense=True, words="dense LoRA"),
    "adalora": Method("lora:adalora", "lora:train_adalora", product=False),
    "full": Method("full:full", product=False),
    "probe": Method("full:probe", product=False, head_alone=True),
    "peft": Method("tuners:peft", "tuners:train_tuner", size="rank"),
}
FORMER = {"low_rank": "lora, as it is called now"}  # what is expected in place of a name of before 1.0


def called(name: str) -> Method:
    """Return the method of a name; conf/method gives tuners of PEFT names of their own."""
    return METHODS.get(name, METHODS["peft"])
