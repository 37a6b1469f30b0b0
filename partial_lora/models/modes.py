"""Modes of a model: without dropout, without gradients or with those of some weights, and with frozen statistics."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Turn dropout and gradients off for as long as the block lasts; every module's training flag is put back."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.inference_mode(False), torch.no_grad():  # inference tensors do not count how often they change
            yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def differentiable(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Turn dropout off, and gradients on for the weights of these modules alone, for as long as the block lasts.

    A classifier of transformers that computes a loss sets its config.problem_type; that is put back, too.
    """
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with frozen(model):
        try:
            for parameter, _ in required:
                parameter.requires_grad_(False)
            for module in modules.values():
                module.weight.requires_grad_(True)
            yield
        finally:
            for parameter, trains in required:
                parameter.requires_grad_(trains)
            if getattr(config, "problem_type", None) != problem:
                config.problem_type = problem


def keep_statistics(model: nn.Module) -> None:
    """Keep batch norms that do not train in evaluation, also after `model.train()`.

    Their running statistics are saved nowhere, so that a saved adapter would meet others than it was trained with.
    """
    for name, module in model.named_modules():
        is_whole = "modules_to_save" in name.split(".") or any(value.requires_grad for value in module.parameters())
        if isinstance(module, nn.modules.batchnorm._NormBase) and not is_whole:
            module.eval()
            module.train = functools.partial(_unchanged, module)


def _unchanged(module: nn.Module, mode: bool = True) -> nn.Module:
    return module
