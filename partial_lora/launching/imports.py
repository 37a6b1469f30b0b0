"""Imports into a process of this package: which are kept out, and how the others cost less."""

from __future__ import annotations

import gc
import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from partial_lora.settings.schema import Config


def refuse_hub_code() -> None:
    """Keep libraries from fetching compiled kernels from the hub; to be called before any of them is imported.

    transformers does so for some kinds of attention, bitsandbytes on some processors as soon as it is imported, both by
    way of the package `kernels`. bitsandbytes computes without them. A repository's own code (trust_remote_code) is
    never asked for: what is fetched from the hub is data.
    """
    os.environ["USE_HUB_KERNELS"] = "NO"
    sys.modules.setdefault("kernels", None)  # for `import` and `find_spec` the same as not installed


@contextmanager
def none_of_this_folder() -> Iterator[None]:
    """Inside the block, keep programs that this process starts from importing what lies in the working directory.

    That may be a folder of somebody else's, with settings to train by and a `numpy.py` beside them. Python heeds the
    variable from 3.11 on. A checkout, which Python may have found in the working directory, is named instead.
    """
    root, earlier = str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")
    paths = [path for path in (earlier, None if root in sysconfig.get_paths().values() else root) if path]
    with variables({"PYTHONSAFEPATH": "1", **({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})}):
        yield


@contextmanager
def variables(changes: Mapping[str, str]) -> Iterator[None]:
    """Change variables of this process's environment inside the block."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ |= changes
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ |= {} if value is None else {name: value}


@contextmanager
def importing() -> Iterator[None]:
    """Import inside the block without collecting garbage: all imports stay, and looking takes a third of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def may_need_bitsandbytes(config: Config) -> bool:
    """Return whether a run may need it: for an optimizer, or since a folder or the hub may have a quantised model."""
    model = config.model
    stored = model.modality == "text" and model.weights != "random" and model.weights[:8] != "bundled:"
    return model.quantization is not None or stored or config.trainer.optimizer is not None


def hide_bitsandbytes() -> None:
    """Make bitsandbytes look as if it were not installed, to `import` and `find_spec`; before PEFT is imported.

    PEFT imports it whatever a model is made of, and bitsandbytes imports torch's compiler: 1.5 s of a start.
    """
    sys.modules.setdefault("bitsandbytes", None)
