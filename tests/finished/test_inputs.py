"""What a user names is what gets predicted: in order, line by line, and whatever is none of it is named."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from refusals import refusal

from partial_lora.finished import inputs
from partial_lora.finished.inputs import Input, read_inputs
from partial_lora.finished.predict import read_image
from partial_lora.finished.run import _with_found_files
from partial_lora.models.config import ModelConfig
from partial_lora.settings.schema import Config
from partial_lora.tasks.config import TaskConfig


def read(*arguments: str, modality: str = "text", stdin: bytes = b"", pairs: bool = False, kind: str = "label"):
    """The inputs, and how many they are."""
    columns = ["first", "second"] if pairs else []
    task = TaskConfig("own", "files", modality=modality, kind=kind, text_columns=columns)
    stream, total = read_inputs(arguments, task, io.BytesIO(stdin))
    return list(stream), total


def contents(*arguments: str, **how: object) -> list:
    return [each.content for each in read(*arguments, **how)[0]]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder `photos` with sub-folders, in the current directory, beside an empty one."""
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for name in ("b.JPG", "a.png", "notes.txt", ".hidden.png", "form.pdf", "z/1.webp", "c/2.jfif", ".cache/3.png"):
        file = tmp_path / "photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def test_images_are_files_folders_and_lines_in_the_order_in_which_they_were_named(photos) -> None:
    Path("list.txt").write_bytes(b"photos/b.JPG\r\nno such.png\n")
    stream, total = read("photos/notes.txt", "photos", "@list.txt", "photos/a.png", modality="image")
    in_folder = ["photos/a.png", "photos/b.JPG", "photos/c/2.jfif", "photos/z/1.webp"]
    expected = ["photos/notes.txt", *in_folder, "photos/b.JPG", "no such.png", "photos/a.png"]
    assert total is None  # of lines nobody knows how many there are
    assert [each.text for each in stream] == [each.content for each in stream] == expected
    assert [each.place for each in stream if each.place] == ["list.txt, line 1", "list.txt, line 2"]
    assert not any(each.problem for each in stream)
    assert read("photos", "photos/a.png", modality="image")[1] == 5


def test_a_folder_of_links_is_read_as_training_reads_it(photos) -> None:
    Path("links").mkdir()
    Path("links", "c").symlink_to(Path("photos", "c").resolve())
    for name in "xy":  # and ends, though each leads to all of the others
        Path("links", name).symlink_to(".")
    assert [each.content for each in read("links", modality="image")[0]] == ["links/c/2.jfif"]


def test_a_line_has_an_end_and_an_image_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_LONGEST", 8)
    assert contents("-", stdin=b"12345678") == ["12345678"]
    with refusal("standard input, line 2: "):
        read("-", stdin=b"1\n123456789")
    for device in ("/dev/zero", "/dev/random"):
        with refusal(f"{device}: "):
            read(f"@{device}")
    os.mkfifo(tmp_path / "pipe.png")
    for place in ("/dev/zero", str(tmp_path / "pipe.png")):
        with refusal(f"{place}: "):
            read_image(place)


def test_texts_are_arguments_and_lines(tmp_path: Path) -> None:
    file = tmp_path / "lines.txt"
    file.write_bytes("\ufeffgrün\r\nno\u2028break\x0bhere\nlast".encode())
    lines = ["grün", "no\u2028break\x0bhere", "last", "one", "two"]
    assert contents("a text", f"@{file}", "@-", stdin=b"one\ntwo\n") == ["a text", *lines]
    assert contents("one\ttwo") == ["one\ttwo"]  # of no pair a tab is a part
    assert contents("one\ttwo", "-", kind="generation", stdin=b"three\n") == ["one\ttwo", "three"]
    assert contents("-") == []
    with refusal("-: "):  # which is read once
        read("-", "@-")


def test_lines_that_are_nothing_are_named_and_the_others_go_on() -> None:
    stream, _ = read("-", stdin=b"one\n\n  \n\xff\xfe\ntwo\n")
    assert [each.problem for each in stream] == [None, "an empty line", "an empty line", "not UTF-8", None]
    assert [each.place for each in stream] == [f"standard input, line {number}" for number in range(1, 6)]


def test_pairs_and_questions_have_tabs_between_their_parts() -> None:
    stream, _ = read("one\ttwo", "-", pairs=True, stdin=b"a question\tan answer\nalone\na\t\na\tb\tc\n")
    assert stream[:2] == [
        Input("one\ttwo", ("one", "two")),
        Input("a question\tan answer", ("a question", "an answer"), place="standard input, line 1"),
    ]
    assert all(each.problem for each in stream[2:])
    lines = b"which?\tone\ntwo of\twhich?\t \t\nwhich?\tone\ttwo\tone \n\tone\ttwo\n"
    stream, _ = read("which\none?\tthis\tthat\tnone", "-", kind="choice", stdin=lines)
    assert stream[0] == Input("which\none?\tthis\tthat\tnone", ("which\none?", ("this", "that", "none")))
    problems = [each.problem for each in stream[1:]]
    assert all(problems)
    assert "'one'" in problems[2]  # which is there twice


@pytest.mark.parametrize(
    ("argument", "how", "begins"),
    [
        *((each, {"modality": "image"}, f"^{each}: ") for each in ("a sunny day", "cat.png", "empty")),
        ("a\0b", {"modality": "image"}, r"^a\\x00b: "),
        ("", {"modality": "image"}, "^'': "),
        *((each, {"modality": "image"}, f"^{each[1:]}: ") for each in ("@none.txt", "@empty")),
        ("photos/notes.txt", {}, "^photos/notes.txt .*@photos/notes.txt"),
        (f"photos{os.sep}z", {}, f"^photos{os.sep}z "),
        ("none.csv", {}, "^none.csv: no such file"),
        ("@somebody hello", {}, "^somebody hello: .*@"),
        ("", {}, "^'': "),
        ("  ", {}, "^'  ': "),
        ("alone", {"pairs": True}, "^'alone': "),
        ("which one?", {"kind": "choice"}, r"^'which one\?': "),
    ],
)
def test_what_is_no_input_is_refused_by_name(photos, argument: str, how: dict, begins: str) -> None:
    with refusal(begins):
        read(argument, **how)
    assert contents("photos") == ["photos"]  # a word that is also a folder is a text


def test_the_files_of_a_run_are_found_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "out" / "results" / "runs" / "own" / "vit" / "partial-0a1b2c3d" / "seed0"
    for folder in (run, tmp_path / "base", tmp_path / "rows"):
        folder.mkdir(parents=True)
    (tmp_path / "rows.csv").write_text("text,label")
    files = {"train": "rows.csv", "test": "gone.csv", "validation": "/dev/null"}
    task, model = TaskConfig(name="own", path="rows", data_files=files), ModelConfig(weights="base")
    config = Config(task=task, model=model, results_dir="out/results")
    read = {"digests": dict.fromkeys(["model.weights", *(f"task.data_files.{split}" for split in files)], "of it")}
    monkeypatch.chdir("/")
    found = _with_found_files(config, run, read)
    assert found.task.data_files == files | {"train": str(tmp_path / "rows.csv")}
    assert (found.model.weights, found.task.path) == (str(tmp_path / "base"), "rows")  # a data set's name
    monkeypatch.chdir(tmp_path)
    assert _with_found_files(config, Path("out/results/runs/own/vit/partial-0a1b2c3d/seed0"), read) == config
    moved = read | {"places": {"task.data_files.train": str(tmp_path / "elsewhere.csv"), "model.weights": "/gone"}}
    (tmp_path / "elsewhere.csv").write_text("text,label")
    found = _with_found_files(config, run, moved)  # where they were, before what is called so here
    assert (found.task.data_files["train"], found.model.weights) == (str(tmp_path / "elsewhere.csv"), "base")
