"""Folders that are whole or not there: a marker, written last, lists every file with its size and SHA-256.

A folder takes its name after its marker is on disk, so whatever ended the writing half-way leaves nothing that looks
like a whole one; and a file that was cut short, changed, lost or added later no longer agrees with the marker.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

MARKER = "complete.json"


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex; the file is never held in memory whole."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def settle(folder: Path) -> None:
    """Let everything in a folder reach the disk, whatever wrote it."""
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink() and (path.is_file() or path.is_dir()):
            _sync(path)


def seal(building: Path, folder: Path) -> None:
    """Mark what lies in `building` as whole and give it the name `folder`, all of it on disk before the name is."""
    for name in _files(building):
        _sync(building / name)
    _write_marker(building)
    os.rename(building, folder)
    _sync(folder.parent)


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


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader finds the old content or the new one, never a part.

    The content reaches the disk under a temporary name before the file takes its own.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # and the name
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """Write plain data as indented JSON, atomically; refuses NaN, which JSON has no word for."""
    write_atomic(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
