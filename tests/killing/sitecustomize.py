"""Kills a process at a chosen moment: KILL_AT=partial_lora.module:function:N, as its N-th call of that begins.

Python imports this file before anything else where its folder is on PYTHONPATH.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import signal
import sys


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the chosen module as everybody else does, and wraps one of its functions."""

    def __init__(self, module: str, function: str, count: int) -> None:
        self._module, self._function, self._left = module, function, count

    def find_spec(self, name, path=None, target=None):
        if name != self._module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            holder, _, attribute = self._function.rpartition(".")
            holder = getattr(module, holder) if holder else module
            setattr(holder, attribute, self._killing(getattr(holder, attribute)))

        spec.loader.exec_module = exec_module
        return spec

    def _killing(self, function):
        def killed(*arguments, **settings):
            self._left -= 1
            if not self._left:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **settings)

        return killed


if os.environ.get("KILL_AT"):
    _module, _function, _count = os.environ["KILL_AT"].split(":")
    sys.meta_path.insert(0, _Finder(_module, _function, int(_count)))
