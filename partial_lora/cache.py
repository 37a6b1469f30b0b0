"""What is fetched or computed once and used by every later run: whole and verified, or built again.

An entry is a folder with a marker that lists every file in it with its size and SHA-256. The marker is written last and
the folder takes its name after that, so whatever ended a build half-way leaves nothing that looks like an entry; and
since the marker is compared with the files on every use, neither does a file that was cut short or changed later.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from partial_lora.errors import PartialLoraError

MARKER = "complete.json"
_BUILDING = ".building-"  # part of the name of a folder that is not an entry yet

logger = logging.getLogger(__name__)


def cache_dir() -> Path:
    """The folder of all entries: $PARTIAL_LORA_CACHE, else $XDG_CACHE_HOME/partial-lora, else ~/.cache/partial-lora."""
    own = os.environ.get("PARTIAL_LORA_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser().absolute() if shared else Path.home() / ".cache") / "partial-lora"


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex; the file is never held in memory whole."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def verified_folder(path: Path, build: Callable[[Path], None]) -> Path:
    """The folder at `path` with exactly the files that `build` once wrote; built first where it is absent or broken.

    `build(folder)` fills an empty folder, which gets its name only when it is whole. What is broken is logged by name
    and removed. Two processes that ask at once build it once: the second waits. A whole entry is only read, so a cache
    that others filled may be read-only. Raises PartialLoraError where the cache cannot be written.
    """
    if path.exists() and fault(path) is None:
        return path
    try:
        with _locked(path):
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


def fault(folder: Path) -> str | None:
    """What keeps a folder from being a whole entry, naming the file; None where nothing does."""
    try:
        files = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
        expected = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MARKER} is missing or cannot be read"
    for name in sorted(set(_files(folder)) - set(expected)):
        return f"{name} is not one of its files"
    for name, (size, sha256) in expected.items():
        try:
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, not {size}"
            if file_sha256(folder / name) != sha256:
                return f"the SHA-256 of {name} is not {sha256}"
        except OSError as error:
            return f"{name} cannot be read, {error.strerror}"
    return None


def _build(path: Path, build: Callable[[Path], None]) -> None:
    for abandoned in path.parent.glob(f".{path.name}{_BUILDING}*"):  # its builder held the lock, so it is gone
        _remove(abandoned)
    building = Path(tempfile.mkdtemp(prefix=f".{path.name}{_BUILDING}", dir=path.parent))
    try:
        build(building)
        for name in _files(building):
            (building / name).chmod(0o644)
            _sync(building / name)
        _write_marker(building)
        building.chmod(0o755)  # a cache may be shared; mkdtemp lets only its maker in
        os.rename(building, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_marker(folder: Path) -> None:
    files = {
        name: {"size": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)} for name in _files(folder)
    }
    with open(folder / MARKER, "w", encoding="utf-8") as file:
        json.dump({"files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _files(folder: Path) -> list[str]:
    """Names, relative to the folder, of all its files but the marker."""
    names = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir())
    return sorted(name for name in names if name != MARKER)


def _sync(path: Path) -> None:
    """Let a file's content, or a folder's names, reach the disk before what is written next."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the right to build `path`; waits for whoever holds it. The kernel frees it when the holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path.parent / f".{path.name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process is building %s: waiting for it", path)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
