"""A model that is as it was before, whatever went wrong in between."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_CONTAINERS = (dict, list, set)


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Put a model's modules, parameters and settings back as they were if the block raises.

    Everything a module holds is remembered by reference, and its dictionaries, lists and sets one level deep: enough
    for code that puts modules and parameters in, takes them out or freezes them. Values written into a tensor in place
    are not undone.
    """
    parameters = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modules = [(module, dict(vars(module)), _containers(module)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, attributes, containers in modules:
            vars(module).clear()
            vars(module).update(attributes)
            for container, content in containers:
                _refill(container, content)
        for parameter, requires_grad in parameters:
            parameter.requires_grad_(requires_grad)
        raise


def _containers(module: nn.Module) -> list[tuple[object, object]]:
    held = [value for value in vars(module).values() if isinstance(value, _CONTAINERS)]
    return [(container, copy.copy(container)) for container in held]


def _refill(container: object, content: object) -> None:
    """Give a container its former content, without replacing it: others may hold it too."""
    container.clear()
    container.extend(content) if isinstance(container, list) else container.update(content)
