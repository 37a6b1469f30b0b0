"""What a model has learnt, in one number."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def weights_digest(model: nn.Module, exclude: str) -> str:
    """The SHA-256 of what a model has learnt: names, shapes, types and bytes of all parameters and buffers.

    Of quantised weights the scales, too. The module named `exclude` (the head) is left out. Two models of one
    architecture and the same digest compute the same features, so what was found out about one holds for the other.
    """
    digest = hashlib.sha256()
    learnt = dict([*model.named_parameters(), *model.named_buffers()])
    if getattr(model, "quantization_method", None) is not None:
        learnt |= model.state_dict()  # where bitsandbytes puts what its numbers mean
    for name, tensor in sorted(learnt.items()):
        if name.startswith(f"{exclude}."):
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
