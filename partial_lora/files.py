"""Files: whole or absent, one writer at a time, checksums, the cache.

A file or folder gets its name by one rename, once all of it is on disk, so that an interrupted write leaves
nothing that looks whole. A sealed folder also holds a marker that lists its files with their sizes and SHA-256, which
shows a file that was cut short, changed, lost or added later.
"""

from __future__ import annotations

import errno
import functools
import glob
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import yaml

from partial_lora.errors import PartialLoraError, one_line, require

logger = logging.getLogger(__name__)
T = TypeVar("T")
Key = TypeVar("Key")

MARKER = "complete.json"
FULL = (errno.ENOSPC, errno.EDQUOT)  # of a disk, or of a user's share of it


# The format of what is stored: of records, settings, packs, calibrations, masks and compact adapters.

FORMAT = 1  # raised when a reader of the format before would misread one of them


def other_format(number: object, writer: str = "partial-lora before 1.0") -> str | None:
    """Return why a file is not read, by the number of its format (None: it has none) and its writer; None where it is.

    Files of before 1.0 have no number.
    """
    if number == FORMAT and not isinstance(number, bool):
        return None
    if number is None:
        return f"written by {writer}; version 0.20 reads it"
    return f"of format {number!r}, and this version reads format {FORMAT}; upgrade partial-lora"


# Whole or absent.


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader finds the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")  # a pid is not unique on a shared disk
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        error.filename = str(path)  # of a full disk Python says no more than that
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """Write plain data as indented JSON, atomically; refuses NaN, which JSON has no word for."""
    write_atomic(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def grouped(things: Iterable[T], key: Callable[[T], Key]) -> dict[Key, list[T]]:
    """Return things by their key, in the order in which the keys first come."""
    groups: dict[Key, list[T]] = {}
    for one in things:
        groups.setdefault(key(one), []).append(one)
    return groups


def flatten(content: Mapping, separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """Return nested plain data as one mapping, each value by its full key ("trainer.epochs")."""
    flat = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, separator, f"{prefix}{key}{separator}")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def mapped(content: object, change: Callable[[str, object], object], key: str = "") -> object:
    """Return nested plain data with every value changed, by its full key and itself; tuples become lists."""
    if isinstance(content, Mapping):
        return {name: mapped(value, change, f"{key}.{name}" if key else name) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [mapped(item, change, key) for item in content]
    return change(key, content)


def leads_back(link: Path) -> bool:
    """Return whether a path is a link to a folder above it."""
    return link.is_symlink() and link.resolve() in {part.resolve() for part in link.absolute().parents}


def walk(folder: str | os.PathLike) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield as os.walk does, in order, without hidden folders, and through links, but none to a folder above."""
    for parent, folders, names in os.walk(folder, followlinks=True):
        visible = (name for name in sorted(folders) if not name.startswith("."))
        folders[:] = [name for name in visible if not leads_back(Path(parent, name))]
        yield parent, folders, names


_LARGEST = 2**18  # bytes of a file of settings
_MOST = 100_000  # values in one, those that an alias repeats included
_COMPUTED = re.compile(r"\$\{(?!\s*\.*[\w.]+\s*\})[^}]{0,40}")  # by OmegaConf; a reference to a key is not


def with_an_end(path: str | os.PathLike) -> Path:
    """Return the path that a user names; raises OSError for a device, or a pipe, which may have no writer."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "no regular file", str(path))
    return Path(path)


def read_text(path: str | os.PathLike, most: int = _LARGEST) -> str:
    """Return the text of a file that a user names; raises OSError for what is no file of at most so many bytes."""
    with open(with_an_end(path), "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"larger than {most / 2**10:,.0f} KiB", str(path))
    return content.decode("utf-8-sig")


def read_json(path: str | os.PathLike, most: int = 2**26) -> Any:
    """Return the content of a JSON file that a user names; raises OSError as `read_text`, ValueError for no JSON."""
    try:
        return json.loads(read_text(path, most))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_yaml(path: str | os.PathLike, name: str | None = None) -> Any:
    """Return the plain data in a YAML file that a user names, read as Hydra reads it.

    Raises PartialLoraError, in one line that begins with `name` (the path), for what is no YAML, is too large, becomes
    too large by its aliases, or refers to more than keys: `${oc.env:…}` would put a token into an address.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import GrammarParseError, OmegaConfBaseException

    try:
        text = read_text(path)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if isinstance(root, yaml.ScalarNode):
            raise ValueError("a single value")
        if _values(root, {}) > _MOST:
            raise ValueError(f"more than {_MOST:,} values, with those that aliases repeat")
        content = OmegaConf.to_container(OmegaConf.create(text))
    except GrammarParseError as error:
        reason = f"{error.full_key}: expected a value, or a reference to a key with both braces: ${{seed}}"
        raise PartialLoraError(f"{name or path}: {reason}") from error
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = error.strerror if isinstance(error, OSError) else f"no YAML ({one_line(error)})"
        raise PartialLoraError(f"{name or path}: cannot be read: {reason}") from error
    if computed := _COMPUTED.search(repr(content)):
        raise PartialLoraError(f"{name or path}: {computed[0]}: expected a value, or a reference to a key: ${{seed}}")
    return content


def _values(node: Any, counts: dict[int, int]) -> int:
    """Return the number of values in a node of YAML, an alias counted as what it stands for."""
    if id(node) not in counts:
        counts[id(node)] = _MOST + 1  # while it is counted: a node inside itself has no end
        inside = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = chain.from_iterable(inside) if isinstance(node, yaml.MappingNode) else inside
        counts[id(node)] = 1 + sum(_values(part, counts) for part in parts)
    return counts[id(node)]


def plain_name(key: str, value: str) -> None:
    """Raise PartialLoraError for a name that cannot be a folder's; one that is missing is refused later."""
    plain = re.fullmatch(r"\w[\w.-]*", value) is not None
    require(plain or value == "???", key, value, "letters, digits, dots, dashes, underscores")


def at_home(path: Any) -> Any:
    """Return a path, or a mapping of paths, with the home folder in place of `~`; all else as it is."""
    if isinstance(path, Mapping):
        return {key: at_home(value) for key, value in path.items()}
    return os.path.expanduser(path) if isinstance(path, str) and path.startswith("~") else path


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `folder` when the block ends, and is removed when it raises.

    It is locked. Those of killed processes of this machine are removed; another machine's lock may not be seen here.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _replaced(folder)
    start = f".{folder.name}.building-{platform.node()}-"
    for left in folder.parent.glob(f"{glob.escape(start)}*"):
        with suppress(FileNotFoundError), _held(left) as is_free:
            if is_free and time.time() - left.stat().st_mtime > _LOCKED_WITHIN:
                shutil.rmtree(left, ignore_errors=True)
    beside = folder.with_name(f"{start}{uuid.uuid4().hex[:8]}")
    try:
        beside.mkdir()  # a signal may come at once
        with _held(beside):
            yield beside
            replace_folder(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(_replaced(folder), ignore_errors=True)


@contextmanager
def written(path: Path, remedy: str) -> Iterator[None]:
    """Raise PartialLoraError, one line with a remedy, where the block cannot write what is to lie at `path`.

    An error of reading passes: it names a file that lies elsewhere.
    """
    try:
        yield
    except Exception as error:
        if reason := _why_unwritten(error, path):
            raise PartialLoraError(f"{path} cannot be written ({reason}): {remedy}") from error
        raise


def _why_unwritten(error: BaseException, path: Path) -> str | None:
    """Return why something was not written, in the system's words where the error has them; None for other errors.

    safetensors hides an OSError in a text, numpy counts what was written, and torch.save says no more than where in its
    own source it stopped.
    """
    if isinstance(error, OSError) and error.strerror:
        is_there = error.filename is None or Path(os.fsdecode(error.filename)).is_relative_to(path.parent)
        return error.strerror if is_there else None
    hidden = re.search(r"(?:I/O error: )?([^:]+) \(os error \d+\)", str(error))
    if hidden and type(error).__name__ == "SafetensorError":
        return hidden[1].strip()
    in_part = r"PytorchStreamWriter|inline_container|basic_ios|\d+ requested and \d+ written"
    is_in_part = isinstance(error, (RuntimeError, OSError)) and re.search(in_part, str(error))
    return "the disk took a part of it alone" if is_in_part else None


_LOCKED_WITHIN = 60  # seconds after a folder is made


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder; give False where another process holds it, and where folders cannot be locked."""
    with ExitStack() as stack:
        is_held = False
        with suppress(OSError, ImportError):
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            is_held = lock(descriptor)
        yield is_held


def replace_folder(built: Path, folder: Path) -> None:
    """Give the folder `built` the name `folder`, once all of it is on disk, then remove what had that name."""
    umask = os.umask(0o077)  # which can be read only so
    os.umask(umask)
    for path in (built, *built.rglob("*")):  # safetensors lets only the owner in, whatever the umask
        if not path.is_symlink():
            path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
    sync(built)
    before = _replaced(folder)
    shutil.rmtree(before, ignore_errors=True)
    try:
        if folder.exists():
            folder.rename(before)
        built.rename(folder)
    except BaseException:
        _replaced(folder)
        raise
    _sync(folder.parent)
    shutil.rmtree(before, ignore_errors=True)


def _replaced(folder: Path) -> Path:
    """Return the place of a folder that is about to be replaced; bring back one that was left there, without a name."""
    before = folder.with_name(f".{folder.name}.replaced")
    if before.exists() and not folder.exists():
        before.rename(folder)
    return before


def sync(folder: Path) -> None:
    """Flush everything in a folder to the disk, whatever wrote it."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink() and (path.is_file() or path.is_dir()):
            _sync(path)


def _sync(path: Path) -> None:
    """Flush a file's content, or a folder's names, to the disk before anything else is written."""
    if os.name == "nt":
        return  # Windows syncs only what is open for writing, which a folder cannot be
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Checksums.


def sha256_once(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex; a file of the same size and time is not read again."""
    stat = path.stat()
    return _sha256_once(path.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@functools.cache
def _sha256_once(path: Path, *_: int) -> str:
    return file_sha256(path)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex, read a part at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def seal(built: Path, folder: Path) -> None:
    """Mark what lies in `built` as whole and give it the name `folder`."""
    _mark(built)
    replace_folder(built, folder)


def _mark(folder: Path) -> None:
    entries = {name: entry(folder / name) for name in _files(folder)}
    (folder / MARKER).write_text(json.dumps({"files": entries}, indent=1), encoding="utf-8")


def entry(path: Path) -> dict[str, int | str]:
    """Return what tells a file from any other: its size in bytes and its SHA-256."""
    return {"size": path.stat().st_size, "sha256": sha256_once(path)}


def fault(folder: Path) -> str | None:
    """Return the first difference between a sealed folder and its marker, naming the file; None where it is whole."""
    try:
        files = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
        expected = {name: {"size": int(entry["size"]), "sha256": str(entry["sha256"])} for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MARKER} is missing or cannot be read"
    for name in sorted(set(_files(folder)) - set(expected)):
        return f"{name} is not one of its files"
    return difference(folder, expected)


def difference(folder: Path, expected: Mapping[str, Mapping | int | None]) -> str | None:
    """Return the first file of a folder that is not as expected, in words; None where all are.

    expected: by the name of each file its `entry`, or its size alone, or None where it only has to be there.
    """
    for name, known in expected.items():
        known = known if isinstance(known, Mapping) else {"size": known}
        try:
            if not (folder / name).is_file():
                return f"{name} is missing"
            measured = (folder / name).stat().st_size
            if known.get("size") not in (None, measured):
                return f"{name} has {measured} bytes, not {known['size']}"
            if known.get("sha256") not in (None, sha256_once(folder / name)):
                return f"the SHA-256 of {name} is not {known['sha256']}"
        except OSError as error:
            return f"{name} cannot be read, {error.strerror}"
    return None


def _files(folder: Path) -> list[str]:
    """Return the names, relative to the folder, of all its files but the marker."""
    names = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir())
    return sorted(name for name in names if name != MARKER)


# One writer at a time.


def lock(descriptor: int, *, wait: bool = False) -> bool:
    """Lock an open file and return True; return False, or wait, where another process holds it.

    The kernel frees the lock when the last process that inherited the descriptor ends, so a dead holder blocks no one,
    and a worker holds on what its killed parent held. The package filelock gives no descriptor to inherit, locks no
    folder, and where a disk has no such locks it makes files that stay after a kill.
    """
    import fcntl  # a system without it can still load and save adapters

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def is_locked(path: Path) -> bool:
    """Return True while another process holds the lock of a file; False for a missing file."""
    try:
        with open(path, "r+b") as file:  # NFS locks only what may be written
            return not lock(file.fileno())
    except FileNotFoundError:
        return False


@contextmanager
def one_writer(path: Path, purpose: str) -> Iterator[None]:
    """Hold the right to write `path`; where another process holds it, log that and wait.

    purpose: what is done to `path`, a verb for the log. The lock is a file beside it; their folder is made if need be.
    Raises OSError where the lock cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path.parent / f".{path.name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not lock(descriptor):
            logger.info("%s: another process is about to %s it; waiting", path, purpose)
            lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


# The cache: what is fetched or computed once and read by every later run.


def cache_dir() -> Path:
    """Return $PARTIAL_LORA_CACHE, else $XDG_CACHE_HOME/partial-lora, else ~/.cache/partial-lora."""
    folder = os.environ.get("PARTIAL_LORA_CACHE")
    if folder:
        return Path(folder).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser().absolute() if shared else Path.home() / ".cache") / "partial-lora"


def verified_folder(path: Path, build: Callable[[Path], None]) -> Path:
    """Return the folder at `path` with exactly the files that `build` wrote; built first where absent or broken.

    `build(folder)` fills an empty folder, which gets its name only when it is whole. A broken folder is logged by name
    and removed. Where two processes call this at once, one builds and the other waits. A whole folder is only read, so
    a cache that others filled may be read-only. Raises PartialLoraError where the cache cannot be written.
    """
    if path.exists() and fault(path) is None:
        return path
    try:
        with one_writer(path, "build"):
            if path.exists():  # another process may have built it while this one waited
                broken = fault(path)
                if broken is None:
                    return path
                logger.warning("%s in the cache is broken (%s): it is removed and built again", path, broken)
                shutil.rmtree(path)
            for abandoned in path.parent.glob(f".{path.name}.building-*"):  # its builder held the lock, so it has ended
                shutil.rmtree(abandoned)
            with building(path) as folder:
                build(folder)
                _mark(folder)
    except OSError as error:
        raise PartialLoraError(
            f"cache {cache_dir()}: cannot store {path.name} ({error.strerror or error}); make room there or set "
            "PARTIAL_LORA_CACHE to a folder that can be written"
        ) from error
    return path
