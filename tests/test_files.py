"""Files are whole or absent, the cache is built once, and credentials are in nothing that is written."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import math
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from partial_lora import files
from partial_lora.errors import PartialLoraError
from partial_lora.files import MARKER, building, cache_dir, fault, file_sha256, replace_folder, verified_folder


def build_two_files(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(b"w" * 1000)
    (folder / "sub").mkdir()
    (folder / "sub" / "config.json").write_text("{}")


def never(folder: Path, purpose: str = "") -> None:
    raise AssertionError("a whole entry was built again")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"PARTIAL_LORA_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/partial-lora"),
        ({"HOME": "/home/someone"}, "/home/someone/.cache/partial-lora"),
        ({"PARTIAL_LORA_CACHE": "", "HOME": "/home/someone"}, "/home/someone/.cache/partial-lora"),
    ],
)
def test_cache_dir_is_the_most_specific_that_is_set(monkeypatch, environment, expected):
    for name in ("PARTIAL_LORA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(expected)


def test_entry_is_built_once_with_nothing_left_beside_it_and_then_used_without_writing_anything(tmp_path, monkeypatch):
    entry = tmp_path / "models" / "entry"
    assert verified_folder(entry, build_two_files) == entry
    assert (entry / "weights.bin").read_bytes() == b"w" * 1000
    assert {path.name for path in entry.parent.iterdir()} == {"entry", ".entry.lock"}
    monkeypatch.setattr(files, "one_writer", never)  # a read-only cache could not hold a lock either
    assert verified_folder(entry, never) == entry


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda entry: os.truncate(entry / "weights.bin", 999), r"weights\.bin .*999 .*1000"),
        (lambda entry: (entry / "weights.bin").write_bytes(b"w" * 500 + b"x" + b"w" * 499), r"SHA-256 .*weights\.bin"),
        (lambda entry: (entry / "weights.bin").unlink(), r"weights\.bin "),
        (lambda entry: (entry / "other.bin").write_bytes(b""), "other.bin"),
        (lambda entry: (entry / MARKER).unlink(), MARKER),
        (lambda entry: os.truncate(entry / MARKER, 20), MARKER),
        (lambda entry: (entry / MARKER).write_text("[1, 2]"), MARKER),
    ],
)
def test_broken_entry_is_named_and_built_again(tmp_path, caplog, damage, named):
    entry = verified_folder(tmp_path / "entry", build_two_files)
    damage(entry)
    assert re.search(named, fault(entry))
    with caplog.at_level(logging.WARNING):
        verified_folder(entry, build_two_files)
    assert str(entry) in caplog.text
    assert re.search(named, caplog.text)
    assert fault(entry) is None
    assert (entry / "weights.bin").read_bytes() == b"w" * 1000
    assert not (entry / "other.bin").exists()


def test_failed_build_leaves_no_entry(tmp_path):
    def fail(folder: Path) -> None:
        build_two_files(folder)
        raise PartialLoraError("no connection")

    with pytest.raises(PartialLoraError, match="no connection"):
        verified_folder(tmp_path / "entry", fail)
    assert [path.name for path in tmp_path.iterdir()] == [".entry.lock"]


@pytest.mark.parametrize("function", [os.mkdir, os.rename, os.unlink])
@pytest.mark.parametrize("has_its_name", [False, True])
def test_a_signal_leaves_a_folder_as_it_was_or_will_be_and_none_beside_it(tmp_path, function, has_its_name):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").touch()

    def signal(frame, event: str, called) -> None:
        if event == "c_return" and called is function and (folder / "new").exists() == has_its_name:
            raise KeyboardInterrupt

    sys.setprofile(signal)
    try:
        with contextlib.suppress(KeyboardInterrupt), building(folder) as built:
            (built / "new").touch()
    finally:
        sys.setprofile(None)
    assert list(tmp_path.iterdir()) == [folder]
    assert len(list(folder.iterdir())) == 1


def test_a_folder_has_the_modes_of_the_umask_whatever_made_its_files_and_what_links_lead_to_keeps_its_own(tmp_path):
    (tmp_path / "elsewhere").touch(mode=0o600)
    before = os.umask(0o027)
    try:
        with building(tmp_path / "folder") as built:
            (built / "private").touch(mode=0o600)
            (built / "link").symlink_to(tmp_path / "elsewhere")
    finally:
        os.umask(before)
    paths = (tmp_path / "folder", tmp_path / "folder" / "private", tmp_path / "elsewhere")
    assert [path.stat().st_mode & 0o777 for path in paths] == [0o750, 0o640, 0o600]


def test_a_file_for_which_there_is_no_room_is_named_and_stays_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "record.json").write_text("before")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="JSON"):  # which has no word for it
        files.write_json(tmp_path / "record.json", {"loss": math.nan})
    with pytest.raises(OSError, match="No space") as refused:
        files.write_json(tmp_path / "record.json", "after")
    assert refused.value.filename == str(tmp_path / "record.json")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["before"]


def test_two_writers_of_one_file_have_temporary_names_of_their_own(tmp_path, monkeypatch):
    names, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (names.append(source), replace(source, target)))
    for _ in range(2):
        files.write_atomic(tmp_path / "file", "")
    assert len(set(names)) == 2


def run(script: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=Path(__file__).parents[1], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("fails", [False, True])
def test_a_folder_that_a_killed_replacement_left_without_its_name_is_brought_back(tmp_path, fails):
    built, folder = tmp_path / "built", tmp_path / "folder"
    built.mkdir()
    folder.mkdir()
    (folder / "old").touch()
    killed = run(
        """
        import os, sys
        from pathlib import Path
        from partial_lora.files import replace_folder

        built, folder = map(Path, sys.argv[1:])
        rename = Path.rename
        Path.rename = lambda self, target: os._exit(9) if self == built else rename(self, target)
        replace_folder(built, folder)
        """,
        built,
        folder,
    )
    assert killed.wait(timeout=60) == 9
    assert not folder.exists()
    with contextlib.suppress(InterruptedError), building(folder) as again:
        assert (folder / "old").exists()
        (again / "new").touch()
        if fails:
            raise InterruptedError
    assert [path.name for path in folder.iterdir()] == ["old" if fails else "new"]
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "built"}


def test_folders_that_killed_builders_left_are_removed_and_those_of_living_ones_are_not(tmp_path):
    program = """
        import os, pathlib, signal, sys
        from partial_lora.files import building
        with building(pathlib.Path(sys.argv[1])) as built:
            (built / "part").write_text("half")
            print(built, flush=True)
            sys.stdin.read()
    """
    start = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "merged")]
    builders = [
        subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in ("dead", "alive")
    ]
    dead, alive = (Path(builder.stdout.readline().strip()) for builder in builders)
    foreign = tmp_path / ".merged.building-another.machine-0a1b2c3d"
    foreign.mkdir()
    builders[0].kill()
    builders[0].wait()
    for folder in (dead, alive, foreign):
        os.utime(folder, (0, 0))
    with building(tmp_path / "merged"):
        assert [folder.exists() for folder in (dead, alive, foreign)] == [False, True, True]
    builders[1].communicate("")
    assert (tmp_path / "merged" / "part").read_text() == "half"
    assert sorted(path.name for path in tmp_path.iterdir()) == [foreign.name, "merged"]


def test_killed_build_leaves_no_entry_and_its_remains_are_cleared(tmp_path):
    killed = run(
        """
        import os, signal, sys
        from pathlib import Path
        from partial_lora.files import verified_folder

        def build(folder):
            (folder / "weights.bin").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

        verified_folder(Path(sys.argv[1]), build)
        """,
        tmp_path / "entry",
    )
    assert killed.wait(timeout=60) == -9
    assert len(list(tmp_path.glob(".entry.building-*"))) == 1
    assert not (tmp_path / "entry").exists()
    verified_folder(tmp_path / "entry", build_two_files)
    assert {path.name for path in tmp_path.iterdir()} == {"entry", ".entry.lock"}


def test_processes_at_once_build_once_and_all_get_the_whole_entry(tmp_path):
    script = """
        import sys, time
        from pathlib import Path
        from partial_lora.files import verified_folder

        entry, log = map(Path, sys.argv[1:])

        def build(folder):
            with open(log, "a") as file:
                file.write("built\\n")
            for part in range(5):
                (folder / f"{part}.bin").write_bytes(b"x" * part)
                time.sleep(0.05)

        print("ready", flush=True)
        sys.stdin.readline()
        print(len(list(verified_folder(entry, build).glob("*.bin"))))
        """
    log = tmp_path / "log"
    processes = [run(script, tmp_path / "entry", log) for _ in range(3)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 3
    assert [process.communicate("go\n", timeout=60)[0].strip() for process in processes] == ["5"] * 3
    assert log.read_text() == "built\n"


def test_cache_that_cannot_be_written_is_named_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PARTIAL_LORA_CACHE", str(tmp_path / "file"))
    with pytest.raises(PartialLoraError, match="PARTIAL_LORA_CACHE") as caught:
        verified_folder(cache_dir() / "entry", build_two_files)
    assert str(tmp_path / "file") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_file_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_lock_is_looked_at_as_nfs_has_it_which_locks_what_may_be_written(tmp_path, monkeypatch):
    flock = fcntl.flock

    def of_nfs(descriptor: int, operation: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", of_nfs)
    lock = tmp_path / "lock"
    assert not files.is_locked(lock)
    with lock.open("w") as held:
        assert not files.is_locked(lock)
        assert files.lock(held.fileno())
        assert files.is_locked(lock)


def test_a_folder_that_cannot_take_the_place_of_another_leaves_it(tmp_path, monkeypatch):
    built, folder = tmp_path / "built", tmp_path / "folder"
    for each in (built, folder):
        each.mkdir()
        (each / f"{each.name}.txt").write_text("")
    rename = Path.rename

    def failing(self, target):
        if self == built:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="No space left"):
        replace_folder(built, folder)
    assert [path.name for path in folder.iterdir()] == ["folder.txt"]
    assert {path.name for path in tmp_path.iterdir()} == {"built", "folder"}
