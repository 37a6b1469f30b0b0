from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from partial_lora import files
from partial_lora.errors import PartialLoraError
from partial_lora.files import MARKER, cache_dir, fault, file_sha256, verified_folder


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


def test_entry_is_built_once_and_nothing_is_left_beside_it(tmp_path):
    entry = tmp_path / "models" / "entry"
    assert verified_folder(entry, build_two_files) == entry
    assert (entry / "weights.bin").read_bytes() == b"w" * 1000
    assert verified_folder(entry, never) == entry
    assert {path.name for path in entry.parent.iterdir()} == {"entry", ".entry.lock"}


def test_whole_entry_is_used_without_writing_anything(tmp_path, monkeypatch):
    entry = verified_folder(tmp_path / "entry", build_two_files)
    monkeypatch.setattr(files, "one_writer", never)  # a read-only cache could not hold a lock either
    verified_folder(entry, never)


def damage(entry: Path, how: str) -> None:
    weights = entry / "weights.bin"
    if how == "cut short":
        os.truncate(weights, 999)
    elif how == "one byte changed":
        weights.write_bytes(b"w" * 500 + b"x" + b"w" * 499)
    elif how == "removed":
        weights.unlink()
    elif how == "a file too many":
        (entry / "other.bin").write_bytes(b"")
    elif how == "no marker":
        (entry / MARKER).unlink()
    elif how == "half a marker":
        os.truncate(entry / MARKER, 20)
    elif how == "a marker of something else":
        (entry / MARKER).write_text("[1, 2]")


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("cut short", "weights.bin has 999 bytes, not 1000"),
        ("one byte changed", "the SHA-256 of weights.bin"),
        ("removed", "weights.bin cannot be read"),
        ("a file too many", "other.bin"),
        ("no marker", MARKER),
        ("half a marker", MARKER),
        ("a marker of something else", MARKER),
    ],
)
def test_broken_entry_is_named_and_built_again(tmp_path, caplog, how, named):
    entry = verified_folder(tmp_path / "entry", build_two_files)
    damage(entry, how)
    assert named in fault(entry)
    with caplog.at_level(logging.WARNING):
        verified_folder(entry, build_two_files)
    assert str(entry) in caplog.text
    assert named in caplog.text
    assert fault(entry) is None
    assert (entry / "weights.bin").read_bytes() == b"w" * 1000
    assert not (entry / "other.bin").exists()


def test_file_in_the_place_of_an_entry_is_replaced(tmp_path):
    (tmp_path / "entry").write_text("not a folder")
    assert (verified_folder(tmp_path / "entry", build_two_files) / "weights.bin").is_file()


def test_failed_build_leaves_no_entry(tmp_path):
    def fail(folder: Path) -> None:
        build_two_files(folder)
        raise PartialLoraError("no connection")

    with pytest.raises(PartialLoraError, match="no connection"):
        verified_folder(tmp_path / "entry", fail)
    assert [path.name for path in tmp_path.iterdir()] == [".entry.lock"]


def run(script: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True)


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

        entry, log, go = map(Path, sys.argv[1:])

        def build(folder):
            with open(log, "a") as file:
                file.write("built\\n")
            for part in range(5):
                (folder / f"{part}.bin").write_bytes(b"x" * part)
                time.sleep(0.05)

        while not go.exists():
            time.sleep(0.01)
        print(len(list(verified_folder(entry, build).glob("*.bin"))))
        """
    log, go = tmp_path / "log", tmp_path / "go"
    processes = [run(script, tmp_path / "entry", log, go) for _ in range(3)]
    go.touch()
    assert [process.communicate(timeout=60)[0].strip() for process in processes] == ["5"] * 3
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
