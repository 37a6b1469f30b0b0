"""What is fetched or computed once and used by every later run: whole and verified, or built again.

An entry is a sealed folder (sealed.py), and its seal is compared with the files on every use.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from partial_lora.errors import PartialLoraError
from partial_lora.locks import alone
from partial_lora.sealed import fault, seal

_BUILDING = ".building-"  # part of the name of a folder that is not an entry yet

logger = logging.getLogger(__name__)


def cache_dir() -> Path:
    """The folder of all entries: $PARTIAL_LORA_CACHE, else $XDG_CACHE_HOME/partial-lora, else ~/.cache/partial-lora."""
    own = os.environ.get("PARTIAL_LORA_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser().absolute() if shared else Path.home() / ".cache") / "partial-lora"


def verified_folder(path: Path, build: Callable[[Path], None]) -> Path:
    """The folder at `path` with exactly the files that `build` once wrote; built first where it is absent or broken.

    `build(folder)` fills an empty folder, which gets its name only when it is whole. What is broken is logged by name
    and removed. Two processes that ask at once build it once: the second waits. A whole entry is only read, so a cache
    that others filled may be read-only. Raises PartialLoraError where the cache cannot be written.
    """
    if path.exists() and fault(path) is None:
        return path
    try:
        with alone(path, "build"):
            if path.exists():  # another process may have built it while this one waited
                broken = fault(path)
                if broken is None:
                    return path
                logger.warning("%s in the cache is broken (%s): it is removed and built again", path, broken)
                _remove(path)
            _build(path, build)
    except OSError as error:
        raise PartialLoraError(
            f"cache {cache_dir()}: cannot store {path.name} ({error.strerror or error}); make room there or set "
            "PARTIAL_LORA_CACHE to a folder that can be written"
        ) from error
    return path


def _build(path: Path, build: Callable[[Path], None]) -> None:
    for abandoned in path.parent.glob(f".{path.name}{_BUILDING}*"):  # its builder held the lock, so it is gone
        _remove(abandoned)
    building = Path(tempfile.mkdtemp(prefix=f".{path.name}{_BUILDING}", dir=path.parent))
    try:
        build(building)
        for file in building.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)  # a cache may be shared; mkdtemp lets only its maker in
        building.chmod(0o755)
        seal(building, path)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
