"""Measurements of the benchmark on one model: seconds of a training step, and the bytes it holds."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Mapping
from pathlib import Path
from time import process_time

import torch
from torch import Tensor, nn

from partial_lora.adapter.compact import write_compact
from partial_lora.training.cost import Storages, alive, kept_by_forward, storages, tensors_in, total

STAGES = ("forward", "backward", "optimizer")

Batch = Mapping[str, Tensor]

# glibc's malloc gives large blocks back to the kernel when they are freed and asks for them again at the next step, and
# clearing their pages then costs more than what is compared here. So it is told to keep what it has, as the caching
# allocator of a GPU does. (name: parameter of mallopt, value)
_MALLOC = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2**31 - 1), "M_TOP_PAD": (-2, 2**26)}


def keep_freed_memory() -> list[str]:
    """Tell the C library's allocator to keep freed memory; gives the settings it took, none where it has no mallopt."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return []
    return [f"{name}={value}" for name, (parameter, value) in _MALLOC.items() if mallopt(parameter, value)]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer | None:
    """AdamW over what trains; None for a floor, where nothing does."""
    parameters = trainable(model)
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True) if parameters else None


def step(model: nn.Module, optimizer: torch.optim.Optimizer | None, batch: Batch) -> dict[str, float]:
    """Train on ``batch`` once: {stage: processor seconds of this process}."""
    times = [process_time()]
    loss = model(**batch).loss
    times.append(process_time())
    loss.backward()
    times.append(process_time())
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    times.append(process_time())
    return {stage: end - start for stage, start, end in zip(STAGES, times, times[1:], strict=False)}


def saved_bytes(model: nn.Module, batch: Batch) -> int:
    """Bytes that one forward pass keeps for its backward pass, the loss itself apart (`activations`).

    To be called after a first step, so that everything that lasts exists.
    """
    with kept_by_forward() as kept:
        loss = model(**batch).loss
    return kept.bytes - total(storages([loss]), without={})


def state_bytes(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, batch: Batch, before: Storages
) -> dict[str, int]:
    """Return what trains, and the bytes that training holds from step to step. Takes a training step.

    ``lasting_bytes`` is what the variant holds beyond the frozen model, its parameters and Adam (indices, buffers);
    ``before`` is what was alive before the variant was built.
    """
    model(**batch).loss.backward()
    parameters = trainable(model)
    gradients = storages(parameter.grad for parameter in parameters)
    state: Storages = {}
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
        state = storages(tensors_in(optimizer.state.values()))
    counted = {**before, **storages(parameters), **gradients, **state}
    return {
        "trainable_parameters": sum(parameter.numel() for parameter in parameters),
        "trainable_tensors": len(parameters),
        "gradient_bytes": total(gradients, without={}),
        "optimizer_bytes": total(state, without={}),
        "lasting_bytes": total(alive(), without=counted),
    }


def file_bytes(model: nn.Module, *, compact: bool) -> dict[str, int | None]:
    """Bytes of the adapter on disk: the safetensors file that save_pretrained writes (``dense``), and the whole folder
    that holds kept values only (``compact``). None for a form the variant does not have.
    """
    if not trainable(model):
        return {"dense": None, "compact": None}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/dense")
        if compact:
            write_compact(model, f"{folder}/compact")
        return {
            "dense": Path(folder, "dense", "adapter_model.safetensors").stat().st_size,
            "compact": sum(file.stat().st_size for file in Path(folder, "compact").iterdir()) if compact else None,
        }
