"""Which base model an adapter belongs to: a fingerprint that costs a few values of each weight.

Shapes alone cannot tell a model from its fine-tuned sibling, and all weights are too much to read on every load. So:

digest   sha256 over the name, shape, dtype and first eight values of every base parameter. It must match on a model
         that has the same dtypes. Quantised parameters are left out: some are packed otherwise once they have run.
samples  two values from the middle of each of the two largest parameters outside linear layers, in bfloat16. On a
         model of other dtypes (half precision, quantised linear layers) these must agree, up to rounding.

Buffers are left out, since running averages move in training, and so are the parameters an adapter has of its own.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

_VALUES = 8  # of every parameter, in the digest
_SAMPLED = 2  # parameters
_ROUNDING = 2**-6  # four times what bfloat16 rounds off; other weights hardly ever agree so far
_TINY = 1e-6  # float16 has no relative precision below


@dataclass(frozen=True)
class Fingerprint:
    """A base model's identity: the dtypes of its parameters, a digest, and a few values for models of other dtypes.

    ``digest`` is None where a value cannot be read (parameters on the meta device, or spread over processes).
    """

    dtypes: str
    digest: str | None
    samples: tuple[float, ...]

    def agrees(self, other: Fingerprint) -> bool:
        """Whether both can be of one model; True where neither digests nor samples can be compared."""
        if self.digest is None or other.digest is None:
            return True
        if self.dtypes == other.dtypes:
            return self.digest == other.digest
        if len(self.samples) != len(other.samples):
            return False
        pairs = zip(self.samples, other.samples, strict=True)
        return all(abs(own - its) <= _ROUNDING * max(abs(own), abs(its)) + _TINY for own, its in pairs)

    def __str__(self) -> str:
        values = torch.tensor(self.samples, dtype=torch.bfloat16)
        return f"{self.dtypes} {self.digest or '-'} {_bytes(values).hex() or '-'}"

    @classmethod
    def parse(cls, text: str) -> Fingerprint:
        """The inverse of ``str``; raises ValueError for another text."""
        dtypes, digest, samples = text.split(" ")
        values = torch.frombuffer(bytearray.fromhex(samples.replace("-", "0000")), dtype=torch.bfloat16)
        return cls(dtypes, None if digest == "-" else digest, () if samples == "-" else tuple(values.tolist()))


def fingerprint(model: nn.Module, exclude: Collection[str] = ()) -> Fingerprint:
    """The fingerprint of a base model, with or without adapters in it; parameters named in ``exclude`` are left out."""
    found = sorted(
        ((name, owner, parameter) for name, owner, parameter in base_parameters(model) if name not in exclude),
        key=lambda entry: entry[0],
    )
    dtypes = "+".join(sorted({_name_of(parameter.dtype) for _, _, parameter in found}))
    if not all(_readable(parameter) for _, _, parameter in found):
        return Fingerprint(dtypes, None, ())
    digest = hashlib.sha256()
    for name, _, parameter in found:
        if not parameter.is_floating_point():
            continue
        digest.update(f"{name} {tuple(parameter.shape)} {_name_of(parameter.dtype)}\n".encode())
        digest.update(_bytes(_some(parameter, at=0, count=_VALUES)))
    return Fingerprint(dtypes, short(digest), _samples(found))


def short(digest: hashlib._Hash) -> str:
    """64 bits of a digest in eleven characters: enough against mistakes, which is all that it is for."""
    return base64.urlsafe_b64encode(digest.digest()[:8]).decode().rstrip("=")


def base_parameters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """The parameters (name in the base model, its module, itself) that a model has without its adapters."""
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


def _samples(found: list[tuple[str, nn.Module, nn.Parameter]]) -> tuple[float, ...]:
    plain = [
        (name, parameter)
        for name, owner, parameter in found
        if parameter.is_floating_point() and not isinstance(owner, nn.Linear)
    ]
    largest = sorted(plain, key=lambda entry: (-entry[1].numel(), entry[0]))[:_SAMPLED]
    middles = [_some(parameter, at=0.5, count=2) for _, parameter in largest]
    return tuple(value for middle in middles for value in middle.to(torch.bfloat16).tolist())


def _some(parameter: Tensor, *, at: float, count: int) -> Tensor:
    """Up to ``count`` neighbouring values, on the CPU, starting at a share ``at`` of every dimension."""
    values = parameter.detach()
    if values.dim() == 0 or values.numel() == 0:
        return values.reshape(-1).cpu()
    for size in values.shape[:-1]:
        values = values[int(size * at)]
    start = int(values.shape[-1] * at)
    return values[start : start + count].cpu()


def _bytes(values: Tensor) -> bytes:
    return values.contiguous().view(torch.uint8).numpy().tobytes() if values.numel() else b""


def _readable(parameter: Tensor) -> bool:
    """Whether its values are here: not those of a DTensor, nor what DeepSpeed leaves of a parameter in stage 3."""
    return not parameter.is_meta and not hasattr(parameter, "full_tensor") and not hasattr(parameter, "ds_id")


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
