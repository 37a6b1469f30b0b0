"""What a user names is what gets predicted: in order, line by line, and whatever is none of it is said by name."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from partial_lora.errors import PartialLoraError
from partial_lora.runs import inputs
from partial_lora.runs.inputs import Input


def read(
    *arguments: str, modality: str = "text", pairs: bool = False, kind: str = "label", stdin: bytes = b""
) -> tuple[Iterator[Input], int | None]:
    return inputs.read(arguments, modality=modality, pairs=pairs, kind=kind, stdin=io.BytesIO(stdin))


def refused(*arguments: str, **how: object) -> str:
    with pytest.raises(PartialLoraError) as error:
        read(*arguments, **how)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `photos` with sub-folders, in the current directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("b.JPG", "a.png", "notes.txt", ".hidden.png", "z/1.webp", "c/2.gif", ".cache/3.png"):
        file = tmp_path / "photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return tmp_path / "photos"


def test_images_are_files_folders_and_lines_in_the_order_in_which_they_were_named(photos: Path) -> None:
    Path("list.txt").write_bytes(b"photos/b.JPG\r\nno such.png\n")
    found = read("photos/notes.txt", "photos", "@list.txt", "photos/a.png", modality="image")
    in_folder = ["photos/a.png", "photos/b.JPG", "photos/c/2.gif", "photos/z/1.webp"]
    expected = ["photos/notes.txt", *in_folder, "photos/b.JPG", "no such.png", "photos/a.png"]
    assert found[1] is None
    stream = list(found[0])
    assert [each.text for each in stream] == [each.content for each in stream] == expected
    assert [each.place for each in stream if each.place] == ["list.txt, line 1", "list.txt, line 2"]
    assert not any(each.problem for each in stream)
    assert read("photos", "photos/a.png", modality="image")[1] == 5


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("a sunny day", "a sunny day: no such image file or folder; the run's model reads images, not texts"),
        ("cat.png", "cat.png: no such image file or folder"),
        ("", "'': no such image file or folder; the run's model reads images, not texts"),
        ("empty", "empty: no image in this folder"),
        ("@none.txt", "none.txt: no such file, expected a file of lines"),
        ("@empty", "empty: a folder, expected a file of lines"),
        ("a\0b", "no such image file"),
    ],
)
def test_what_is_no_image_is_refused_by_name(photos: Path, argument: str, said: str) -> None:
    Path("empty").mkdir()
    assert said in refused(argument, modality="image")


def test_texts_are_arguments_and_lines(tmp_path: Path) -> None:
    file = tmp_path / "lines.txt"
    file.write_bytes("\ufeffgrün\r\nno\u2028break\x0bhere\nlast".encode())
    found = list(read("a text", f"@{file}", "-", stdin=b"one\ntwo\n")[0])
    assert [each.content for each in found] == ["a text", "grün", "no\u2028break\x0bhere", "last", "one", "two"]
    assert [each.place for each in found[-2:]] == ["standard input, line 1", "standard input, line 2"]


def test_lines_that_are_nothing_are_named_and_the_others_go_on() -> None:
    found = list(read("-", stdin=b"one\n\n  \n\xff\xfe\ntwo\n")[0])
    assert [each.problem for each in found] == [None, "an empty line", "an empty line", "not UTF-8", None]
    assert [each.place for each in found] == [f"standard input, line {number}" for number in range(1, 6)]
    assert not list(read("-")[0])


def test_a_pair_is_two_texts_with_a_tab_between_them() -> None:
    lines = b"a question\tan answer\nalone\na\t\na\tb\tc\n"
    found = list(read("one\ttwo", "-", pairs=True, stdin=lines)[0])
    assert found[:2] == [
        Input("one\ttwo", ("one", "two")),
        Input("a question\tan answer", ("a question", "an answer"), place="standard input, line 1"),
    ]
    assert {each.problem for each in found[2:]} == {"expected two texts with a tab between them"}
    assert "'alone': expected two texts with a tab between them" in refused("alone", pairs=True)


def test_a_tab_in_a_text_that_is_no_pair_is_part_of_it() -> None:
    assert next(read("one\ttwo")[0]).content == "one\ttwo"


def test_a_question_is_a_prompt_and_its_options_with_tabs_between_them() -> None:
    lines = b"which?\tone\ntwo of\twhich?\t \t\nwhich?\tone\ttwo\tone \n\tone\ttwo\n"
    found = list(read("which\none?\tthis\tthat\tnone", "-", kind="choice", stdin=lines)[0])
    assert found[0] == Input("which\none?\tthis\tthat\tnone", ("which\none?", ("this", "that", "none")))
    expected = "expected a prompt and two or more options, with tabs between them"
    assert [each.problem for each in found[1:]] == [expected, expected, "the option 'one' is there twice", expected]
    assert f"'which one?': {expected}" in refused("which one?", kind="choice")


def test_a_prompt_is_a_text() -> None:
    assert [each.content for each in read("one\ttwo", "-", kind="generation", stdin=b"three\n")[0]] == [
        "one\ttwo",
        "three",
    ]


@pytest.mark.parametrize("argument", ["", "  "])
def test_an_empty_text_is_refused(argument: str) -> None:
    assert "an empty text" in refused(argument)


def test_a_file_is_no_text_but_a_word_that_is_also_a_folder_is(photos: Path) -> None:
    assert "@photos/notes.txt stands for the lines" in refused("photos/notes.txt")
    assert "is a file or folder" in refused(f"photos{os.sep}z")
    assert next(read("photos")[0]).content == "photos"
    assert "a text that starts with @ goes through standard input" in refused("@somebody hello")


def test_standard_input_is_read_once() -> None:
    assert "named twice" in refused("-", "@-")
    assert [each.content for each in read("@-", stdin=b"one")[0]] == ["one"]


def test_lines_are_read_as_they_are_asked_for() -> None:
    class Endless(io.RawIOBase):
        """A stream without an end."""

        asked = 0

        def readable(self) -> bool:
            return True

        def __next__(self) -> bytes:
            self.asked += 1
            return b"again\n"

    endless = Endless()
    found = inputs.read(["first", "-"], modality="text", pairs=False, stdin=endless)
    assert [each.content for each in itertools.islice(found[0], 4)] == ["first", "again", "again", "again"]
    assert endless.asked == 3
