"""The methods that are compared: each takes the frozen model and gives it back with what it trains.

Every method trains the task's head; they differ in what else they train. A new one is one function here and one file in
conf/method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn

from partial_lora.adapter import PartialLoraConfig
from partial_lora.budget import kept_parameters, masked_units, parameter_count, uniform_sparsity
from partial_lora.calibration import Calibration
from partial_lora.errors import PartialLoraError
from partial_lora.masks import Mask

_PAPER_DENSITY = 0.13  # of the trainable parameters, in the paper's abstract

Sparsity = Mapping[str, Mapping[str, float]]
Scores = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Setting:
    """What a method may use.

    `sparsity` is what calibration chose, {module: {"rows": s, "columns": s}}, and `scores` the importance it chose by,
    {module: (rows, columns)}; both are None for a method that is not calibrated. `new_modules` have no pre-trained
    weights and train whole, as the head does.
    """

    target_modules: Sequence[str]
    head: str | None
    rank: int
    alpha: float
    dropout: float
    mask_seed: int
    granularity: str = "rows_columns"
    count: str = "exact"
    sparsity: Sparsity | None = None
    scores: Scores | None = None
    new_modules: Sequence[str] = ()

    def lora(self) -> dict:
        """The arguments that every low-rank adapter here shares."""
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": list(self.target_modules),
            "modules_to_save": [*([] if self.head is None else [self.head]), *self.new_modules] or None,
        }

    def masked(self) -> dict:
        """The arguments that every adapter with random masks shares."""
        return self.lora() | {"granularity": self.granularity, "count": self.count, "mask_seed": self.mask_seed}


Method = Callable[[nn.Module, Setting], PeftModel]


def calibrated(method: Method) -> Method:
    """Marks a method whose sparsities come from calibration."""
    method.calibrated = True
    return method


def named(name: str) -> Method:
    """The method that conf/method/NAME.yaml names."""
    known = {method.__name__: method for method in (partial, targeted, uniform, lora, probe)}
    if name not in known:
        raise PartialLoraError(f"method.name={name}: expected one of {', '.join(known)}")
    return known[name]


def is_calibrated(method: Method) -> bool:
    """True where the method uses what calibration finds."""
    return getattr(method, "calibrated", False)


@calibrated
def partial(model: nn.Module, setting: Setting) -> PeftModel:
    """Partial-LoRA: the calibrated number of rows and columns of each module, drawn at random."""
    config = PartialLoraConfig(**setting.masked(), sparsity=dict(setting.sparsity))
    return get_peft_model(model, config)


@calibrated
def targeted(model: nn.Module, setting: Setting) -> PeftModel:
    """Targeted-LoRA: the calibrated number of rows and columns of each module, the most important ones."""
    indices = {}
    for module, axes in setting.sparsity.items():
        scores = dict(zip(("rows", "columns"), setting.scores[module], strict=True))
        indices[module] = {axis: Mask.top(scores[axis].cpu().numpy(), axes[axis]).kept.tolist() for axis in scores}
    config = PartialLoraConfig(
        **setting.lora(), sparsity=dict(setting.sparsity), selection="top", indices=indices, mask_seed=setting.mask_seed
    )
    return get_peft_model(model, config)


@calibrated
def uniform(model: nn.Module, setting: Setting) -> PeftModel:
    """Control: one sparsity for every module and axis, with at most the trainable parameters of `partial`.

    All modules gain a row or column at nearly the same sparsity, so a little of the budget may stay unused.
    """
    shapes = {module: tuple(model.get_submodule(module).weight.shape) for module in setting.sparsity}
    counted = masked_units(shapes, setting.rank, setting.granularity)
    sparsity = uniform_sparsity(*counted, kept_parameters(*counted, setting.sparsity))
    return get_peft_model(model, PartialLoraConfig(**setting.masked(), sparsity=sparsity))


def lora(model: nn.Module, setting: Setting) -> PeftModel:
    """Dense LoRA, PEFT's own."""
    return get_peft_model(model, LoraConfig(**setting.lora()))


def probe(model: nn.Module, setting: Setting) -> PeftModel:
    """The head alone: an adapter that adapts no module, so that it is saved and loaded like the others.

    Raises PartialLoraError for a model without a new head, of which nothing would train.
    """
    if setting.head is None:
        raise PartialLoraError("method=probe: the model has no new head, so that nothing would train; choose another")
    return get_peft_model(model, LoraConfig(**setting.lora() | {"target_modules": DUMMY_TARGET_MODULES}))


def foreseen_sparsity(
    name: str, shapes: Mapping[str, tuple[int, int]], rank: int, calibration: Mapping
) -> tuple[float | Sparsity | None, str]:
    """The sparsity a method will train with, as far as that is known before any calibration, and how it is known."""
    if name == "probe":
        return None, "no adapter"
    if not is_calibrated(named(name)):
        return 0.0, "dense"
    if calibration["file"]:
        return Calibration.load(Path(calibration["file"])).sparsity, f"sparsities of {calibration['file']}"
    budget, source = calibration["budget"], f"calibration.budget={calibration['budget']}"
    if budget is None:
        budget = _PAPER_DENSITY
        source = "the sparsity of a threshold is known once it is calibrated; here the paper's 87 % (or set a budget)"
    return uniform_sparsity(shapes, rank, parameter_count(budget, shapes, rank)), source
