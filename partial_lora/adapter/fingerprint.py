"""The fingerprint of an adapter's base model, made from a few values of each weight.

Shapes alone cannot tell a model from its fine-tuned sibling, and reading all weights on every load is slow. So:

digest   sha256 over the name, shape, dtype and a diagonal of every base parameter. The diagonal has at least one value
         of each row and column, so that a change to many of them, such as a merged masked adapter, shows. Models with
         the same dtypes must have the same digest. Quantised parameters are left out: some are packed anew once they
         have run.
samples  two values from the middle of each of the two largest parameters outside linear layers, in bfloat16, and one
         from the middle of each of four linear layers. Models with different dtypes must agree in these, up to
         rounding; where one is quantised, only in the values outside linear layers.

Merging and unmerging an adapter restores a base weight only up to rounding. `remember_base` keeps the diagonals from
before; they count as the weight's own while it is still near them. `forget_base` drops them where an adapter stays in
the weights for good.

Buffers are left out, since running averages change in training, and so are an adapter's own parameters.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from partial_lora.adapter.sharding import is_sharded

_SAMPLED = 2  # parameters outside linear layers, with two values each
_SAMPLED_LINEAR = 4  # weights of linear layers, with one value each
_ROUNDING = 2**-6  # four times the rounding error of bfloat16; other weights hardly ever agree so closely
_REMEMBERED = "_diagonals_before_merging"
_TINY = 1e-6  # below this, float16 has little relative precision


@dataclass(frozen=True)
class Fingerprint:
    """A base model's identity: the dtypes of its parameters, a digest, and a few values to compare across dtypes.

    ``digest`` is None where a value cannot be read (parameters on the meta device, or spread over processes).
    """

    dtypes: str
    digest: str | None
    samples: tuple[float, ...]
    linear_samples: tuple[float, ...] = ()

    def agrees(self, other: Fingerprint) -> bool:
        """Return whether both can be of one model: True also where a digest is missing, so that nothing is compared."""
        if self.digest is None or other.digest is None:
            return True
        if self.dtypes == other.dtypes:
            return self.digest == other.digest
        if len(self.samples) != len(other.samples):
            return False
        pairs = list(zip(self.samples, other.samples, strict=True))
        if not (self.is_quantised or other.is_quantised):
            if len(self.linear_samples) != len(other.linear_samples):
                return False
            pairs += zip(self.linear_samples, other.linear_samples, strict=True)
        return all(abs(ours - theirs) <= _ROUNDING * max(abs(ours), abs(theirs)) + _TINY for ours, theirs in pairs)

    @property
    def is_quantised(self) -> bool:
        """True where some parameters are codes, which cannot be compared with another model's numbers."""
        return any(not name.startswith(("float", "bfloat")) or "float8" in name for name in self.dtypes.split("+"))

    def __str__(self) -> str:
        both = (torch.tensor(values, dtype=torch.bfloat16) for values in (self.samples, self.linear_samples))
        return " ".join([self.dtypes, self.digest or "-", *(_bytes(values).hex() or "-" for values in both)])

    @classmethod
    def parse(cls, text: str) -> Fingerprint:
        """Return the fingerprint that ``str`` has written; raises ValueError for any other text."""
        dtypes, digest, *samples = text.split(" ")
        values, linear_values = (
            () if part == "-" else torch.frombuffer(bytearray.fromhex(part), dtype=torch.bfloat16).tolist()
            for part in samples
        )
        return cls(dtypes, None if digest == "-" else digest, tuple(values), tuple(linear_values))


def fingerprint(model: nn.Module, exclude: Collection[str] = ()) -> Fingerprint:
    """Return the fingerprint of a base model, adapted or not, over all its parameters but those in ``exclude``."""
    parameters = [entry for entry in base_parameters(model) if entry[0] not in exclude]
    parameters.sort(key=lambda entry: entry[0])
    dtypes = "+".join(sorted({_kind_of(parameter) for _, _, parameter in parameters}))
    if not all(_readable(parameter) for _, _, parameter in parameters):
        return Fingerprint(dtypes, None, (), ())
    # A tied parameter has several owners, of which one has an adapter and so the diagonal from before merging.
    merged = {id(parameter): owner for _, owner, parameter in parameters if _REMEMBERED in vars(owner)}
    digest = hashlib.sha256()
    for name, owner, parameter in parameters:
        if not _is_plain(parameter):
            continue
        owner = merged.get(id(parameter), owner)
        digest.update(f"{name} {tuple(parameter.shape)} {_name_of(parameter.dtype)}\n".encode())
        digest.update(_bytes(_diagonal_as_loaded(name, owner, parameter)))
    return Fingerprint(dtypes, short(digest), _samples(parameters), _linear_samples(parameters))


def remember_base(model: nn.Module) -> None:
    """Keep the diagonals of the weights under adapters, before an adapter is merged into them for the first time."""
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer) and not layer.merged:
            for name, owner, parameter in base_parameters(layer):
                if _is_plain(parameter) and _readable(parameter):
                    diagonals = vars(owner).setdefault(_REMEMBERED, {})
                    diagonals[name.rpartition(".")[2]] = _diagonal_as_loaded(name, owner, parameter)


def forget_base(layers: Iterable[nn.Module]) -> None:
    """Drop the diagonals kept for the weights under these layers: the weights have changed for good."""
    for layer in layers:
        for _, owner, _ in base_parameters(layer):
            vars(owner).pop(_REMEMBERED, None)


def _diagonal_as_loaded(name: str, owner: nn.Module, parameter: Tensor) -> Tensor:
    """Return a parameter's diagonal: the one from before merging where the two differ only by rounding."""
    here = _diagonal(parameter)
    before = vars(owner).get(_REMEMBERED, {}).get(name.rpartition(".")[2])
    if before is None or before.shape != here.shape:
        return here
    largest = before.abs().max().item() if before.numel() else 0.0
    near = torch.allclose(here.double(), before.double(), rtol=0, atol=_ROUNDING * largest)
    return before.to(here.dtype) if near else here


def short(digest: hashlib._Hash) -> str:
    """Return 64 bits of a digest in eleven characters: enough to catch mistakes, not attacks."""
    return base64.urlsafe_b64encode(digest.digest()[:8]).decode().rstrip("=")


def base_parameters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Yield the parameters that a model has without its adapters: name in the base model, module, parameter."""
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    while isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, module, parameter
    for name, child in module._modules.items():
        if child is not None:
            yield from base_parameters(child, prefix if name == "_orig_mod" else f"{prefix}{name}.")


def _samples(parameters: list[tuple[str, nn.Module, nn.Parameter]]) -> tuple[float, ...]:
    plain = [weight for _, owner, weight in parameters if _is_plain(weight) and not isinstance(owner, nn.Linear)]
    largest = sorted(plain, key=lambda weight: -weight.numel())[:_SAMPLED]  # of equals the first by name
    return tuple(value for weight in largest for value in _middle(weight, count=2))


def _linear_samples(parameters: list[tuple[str, nn.Module, nn.Parameter]]) -> tuple[float, ...]:
    linear = [entry for entry in parameters if type(entry[1]) is nn.Linear and entry[0].endswith("weight")]
    weights = [parameter for *_, parameter in linear if _is_plain(parameter)]
    chosen = sorted({(len(weights) - 1) * number // (_SAMPLED_LINEAR - 1) for number in range(_SAMPLED_LINEAR)})
    return tuple(value for number in chosen if weights for value in _middle(weights[number], count=1))


def _middle(parameter: Tensor, *, count: int) -> list[float]:
    """Return up to ``count`` neighbouring values from the middle of every dimension, rounded to bfloat16."""
    values = parameter.detach()
    if values.numel() > 0 and values.dim() > 0:
        for size in values.shape[:-1]:
            values = values[size // 2]
        start = values.shape[-1] // 2
        values = values[start : start + count]
    return values.reshape(-1).to("cpu", torch.bfloat16).tolist()


def _diagonal(parameter: Tensor) -> Tensor:
    """Return values of a parameter, taken as a matrix: at least one of each row and column; on the CPU."""
    values = parameter.detach()
    if values.dim() < 2 or values.numel() == 0:
        return values.reshape(-1).cpu()
    matrix = values.flatten(0, -2)
    steps = torch.arange(max(matrix.shape), device=matrix.device)
    return matrix[steps % matrix.shape[0], steps % matrix.shape[1]].cpu()


def _bytes(values: Tensor) -> bytes:
    return values.contiguous().view(torch.uint8).numpy().tobytes() if values.numel() else b""


def _is_plain(parameter: Tensor) -> bool:
    """Return True for an ordinary tensor of numbers, False for a quantiser's codes or its class of tensor."""
    return parameter.is_floating_point() and type(parameter) in (nn.Parameter, Tensor)


def _readable(parameter: Tensor) -> bool:
    """Return True where this process has the values: not on the meta device, nor sharded (DTensor, ZeRO's stage 3)."""
    return not parameter.is_meta and not is_sharded(parameter)


def _kind_of(parameter: Tensor) -> str:
    """Return the dtype; for a quantiser's codes stored as numbers (bnb_4bit_quant_storage), their class."""
    is_codes = parameter.is_floating_point() and not _is_plain(parameter) and hasattr(parameter, "quant_state")
    return type(parameter).__name__ if is_codes else _name_of(parameter.dtype)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
