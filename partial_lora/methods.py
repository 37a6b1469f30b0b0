"""The methods that are compared: each takes the frozen model and gives it back with what it trains.

Every method trains the task's head; they differ in what else they train. A new one is one function here and one file in
conf/method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial as bind

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn

from partial_lora.adapter import PartialLoraConfig
from partial_lora.budget import kept_parameters, uniform_sparsity
from partial_lora.errors import PartialLoraError
from partial_lora.masks import Mask

Sparsity = Mapping[str, Mapping[str, float]]
Scores = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Setting:
    """What a method may use.

    `sparsity` is what calibration chose, {module: {"rows": s, "columns": s}}, and `scores` the importance it chose by,
    {module: (rows, columns)}; both are None for a method that is not calibrated.
    """

    target_modules: Sequence[str]
    head: str
    rank: int
    alpha: float
    dropout: float
    mask_seed: int
    sparsity: Sparsity | None = None
    scores: Scores | None = None

    def lora(self) -> dict:
        """The arguments that every low-rank adapter here shares."""
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": list(self.target_modules),
            "modules_to_save": [self.head],
        }


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
    config = PartialLoraConfig(**setting.lora(), sparsity=dict(setting.sparsity), mask_seed=setting.mask_seed)
    return get_peft_model(model, config)


@calibrated
def targeted(model: nn.Module, setting: Setting) -> PeftModel:
    """Targeted-LoRA: the calibrated number of rows and columns of each module, the most important ones."""
    indices = {}
    for module, axes in setting.sparsity.items():
        rows, columns = setting.scores[module]
        kept = bind(lambda scores, sparsity: Mask.top(scores.cpu().numpy(), sparsity).kept.tolist())
        indices[module] = {"rows": kept(rows, axes["rows"]), "columns": kept(columns, axes["columns"])}
    config = PartialLoraConfig(
        **setting.lora(), sparsity=dict(setting.sparsity), selection="top", indices=indices, mask_seed=setting.mask_seed
    )
    return get_peft_model(model, config)


@calibrated
def uniform(model: nn.Module, setting: Setting) -> PeftModel:
    """Control: one sparsity for every module and axis, with as many trainable parameters as `partial`."""
    shapes = {module: tuple(model.get_submodule(module).weight.shape) for module in setting.sparsity}
    count = kept_parameters(shapes, setting.rank, setting.sparsity)
    sparsity = uniform_sparsity(shapes, setting.rank, count)
    config = PartialLoraConfig(**setting.lora(), sparsity=sparsity, mask_seed=setting.mask_seed)
    return get_peft_model(model, config)


def lora(model: nn.Module, setting: Setting) -> PeftModel:
    """Dense LoRA, PEFT's own."""
    return get_peft_model(model, LoraConfig(**setting.lora()))


def probe(model: nn.Module, setting: Setting) -> PeftModel:
    """The head alone: an adapter that adapts no module, so that it is saved and loaded like the others."""
    return get_peft_model(model, LoraConfig(**setting.lora() | {"target_modules": DUMMY_TARGET_MODULES}))


def importance_scores(
    model: nn.Module, modules: Sequence[str], measure: Callable, *, seed: int, **options: object
) -> dict[str, tuple[Tensor, Tensor]]:
    """Importance of the rows (m,) and columns (n,) of every module's weight (m, n)."""
    with torch.no_grad():
        return {
            module: measure(model.get_submodule(module).weight.float(), module=module, seed=seed, **options)
            for module in modules
        }
