"""A finished run's adapter as files for other programs: an ordinary LoRA adapter, a compact one, or the merged model.

An export is built in a folder beside its own and takes its name when it is whole and, where asked for, proven.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from partial_lora.errors import PartialLoraError, ProofError
from partial_lora.runs.finished import FinishedRun
from partial_lora.sealed import file_sha256

FORMATS = ("peft", "compact", "merged")


@dataclass(frozen=True)
class Exported:
    """What an export came to: its folder and bytes, whether the same was there before, and what a check found."""

    folder: Path
    size: int
    existed: bool
    proof: str | None


def check_target(run: FinishedRun, to: str, out: Path | None) -> Path:
    """The folder an export goes to, absolute.

    Raises PartialLoraError for a format that the run's method does not have, and for a folder of somebody else's files.
    """
    if to == "compact" and not run.is_masked:
        raise PartialLoraError(
            f"{run.directory}: method={run.method} masks nothing, so that there is nothing to leave out: export it with"
            " --to peft or merged"
        )
    folder = (run.directory / "export" / to if out is None else Path(out)).resolve()
    if folder == run.adapter.resolve():
        raise PartialLoraError(f"{folder} is the run's own adapter: choose another --out")
    if folder.exists() and not folder.is_dir():
        raise PartialLoraError(f"{folder} is a file, expected a folder to write to: choose another --out")
    if folder.is_dir() and any(folder.iterdir()) and not _tensor_files(folder):
        raise _foreign(folder)
    return folder


def export(run: FinishedRun, to: str, out: Path | None = None, *, check: bool = False) -> Exported:
    """Write a finished run's adapter into a folder (default: export/FORMAT in the run's directory).

    Args:
        to: "peft", an ordinary LoRA adapter, zero-filled; "compact", its kept values alone; "merged", the whole model.
        check: prove that it can be used, and computes what the run's own adapter does, before it gets its name.

    Raises PartialLoraError, leaving nothing behind, where the run's files are broken or the folder holds other files,
    and ProofError where the check fails.
    """
    folder = check_target(run, to, out)
    from partial_lora.runs import formats  # torch and its kin: only once there is something to write

    with _building(folder) as building:
        formats.WRITE[to](run, building)
        proof = _proven(formats.PROVE[to], run, building, folder) if check else None
        existed = _is_same(building, folder)
        if folder.is_dir() and any(folder.iterdir()) and not existed:
            raise _foreign(folder)
        size = sum(file.stat().st_size for file in building.rglob("*") if file.is_file())
    return Exported(folder, size, existed, proof)


def _proven(prove: Callable[[FinishedRun, Path], str], run: FinishedRun, building: Path, folder: Path) -> str:
    try:
        return prove(run, building)
    except ProofError as error:  # it knows the folder by the name it has while it is built
        raise ProofError(str(error).replace(str(building), str(folder))) from error


def _foreign(folder: Path) -> PartialLoraError:
    return PartialLoraError(f"{folder} holds other files than this export: choose another --out, or remove it")


@contextlib.contextmanager
def _building(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that takes its name when the block ends well, and is gone when it does not."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    except OSError as error:
        raise PartialLoraError(f"{folder} cannot be written ({error.strerror}): choose another --out") from error
    try:
        yield building
        building.chmod(0o755)  # mkdtemp lets only its maker in, and safetensors writes likewise
        for file in building.iterdir():
            file.chmod(0o644)
        _put(building, folder)
    except OSError as error:
        raise PartialLoraError(f"{folder} cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _put(building: Path, folder: Path) -> None:
    """Give a whole folder its name; one of that name goes once the new one is in its place."""
    before = building.with_suffix(".old")
    try:
        if folder.exists():
            folder.rename(before)
        building.rename(folder)
    except BaseException:
        if before.exists() and not folder.exists():
            before.rename(folder)
        raise
    finally:
        shutil.rmtree(before, ignore_errors=True)


def _is_same(building: Path, folder: Path) -> bool:
    """Whether a folder holds the very files of an export: the same names, and the same tensors to the last bit."""
    if not folder.is_dir() or _names(building) != _names(folder):
        return False
    return all(file_sha256(file) == file_sha256(folder / file.name) for file in _tensor_files(building))


def _names(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*")}


def _tensor_files(folder: Path) -> list[Path]:
    return list(folder.glob("*.safetensors"))
