"""The inputs of a prediction: image files, folders, texts and lines, read one by one and never all held at once."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from partial_lora.errors import PartialLoraError
from partial_lora.files import walk
from partial_lora.tasks.config import TaskConfig
from partial_lora.tasks.image_folders import is_image
from partial_lora.tasks.kinds import kind_of

_LONGEST = 2**24  # bytes of a line


@dataclass(frozen=True)
class Input:
    """One thing to predict.

    text: its words on the command line or in a file: a path, a text, or texts with tabs between them.
    content: what the model is shown: the path, the text, the two texts, or a prompt and its options.
    problem: why there is nothing to show, in one line; None for an input that can be predicted.
    place: the line it was read from, "FILE, line 3"; "" for an argument.
    """

    text: str
    content: str | tuple[str, str] | tuple[str, tuple[str, ...]]
    problem: str | None = None
    place: str = ""


def read_inputs(arguments: Sequence[str], task: TaskConfig, stdin: BinaryIO) -> tuple[Iterator[Input], int | None]:
    """Return an iterator over the inputs that arguments name, in order, and their number where it is known.

    Args:
        arguments: an image file, a folder of images or a text; @FILE for the lines of a file, - for those of `stdin`.
            A line is a text, several of them with tabs between them, or the path of an image; it is read when needed.
        task: whose inputs they are.

    Raises PartialLoraError, in one line, for an argument that is no such thing.
    """
    if sum(map(is_stdin, arguments)) > 1:
        raise PartialLoraError("-: standard input can be read once, and is named twice")
    modality, reads = task.modality, kind_of(task).reads
    parse = _pair if reads == "text" and len(task.text_columns) == 2 else LINES[reads]
    sources: list[tuple[Iterable[Input], int | None]] = []
    for argument in arguments:
        if is_stdin(argument):
            sources.append((_lines(stdin, "standard input", parse), None))
        elif argument.startswith("@"):
            sources.append((_lines_of_file(argument, modality, parse), None))
        elif modality == "image":
            images = [Input(file, file) for file in _images(argument)]
            sources.append((images, len(images)))
        else:
            sources.append(([_argument(argument, parse)], 1))
    totals = [total for _, total in sources]
    return chain.from_iterable(inputs for inputs, _ in sources), None if None in totals else sum(totals)


def is_stdin(argument: str) -> bool:
    """Return whether an argument stands for the lines of standard input."""
    return argument in ("-", "@-")


def is_stream(argument: str) -> bool:
    """Return whether an argument stands for lines that may still be written: standard input, or a pipe."""
    return is_stdin(argument) or (argument.startswith("@") and not os.path.isfile(argument[1:]))


def _images(argument: str) -> list[str]:
    """Return an image file, or those in a folder: by name, before those of its sub-folders; no hidden ones."""
    if not os.path.exists(argument):
        hint = "" if is_image(argument) else "; the run's model reads images, not texts"
        raise PartialLoraError(f"{argument or repr(argument)}: no such image file or folder{hint}")
    if not os.path.isdir(argument):
        return [argument]
    files = []
    for parent, _, names in walk(argument):  # a class may be a link to a folder
        images = [name for name in sorted(names) if is_image(name)]
        files += [os.path.join(parent, name) for name in images if not name.startswith(".")]
    if not files:
        raise PartialLoraError(f"{argument}: no image in this folder")
    return files


_TABLES = (".csv", ".json", ".jsonl", ".parquet", ".tsv", ".txt")  # how a file of texts ends


def _argument(argument: str, parse: Callable[[str], Input]) -> Input:
    if os.path.isfile(argument) or (os.sep in argument and os.path.exists(argument)):
        raise PartialLoraError(
            f"{argument} is a file or folder, and the run's model reads texts: @{argument} stands for the lines of a "
            "file; a text of that very wording goes through standard input"
        )
    if argument.endswith(_TABLES) and not re.search(r"\s", argument):
        raise PartialLoraError(f"{argument}: no such file; a text of that very wording goes through standard input")
    parsed = parse(argument)
    if parsed.problem:
        raise PartialLoraError(f"{argument!r}: {parsed.problem}")
    return parsed


def _lines_of_file(argument: str, modality: str, parse: Callable[[str], Input]) -> Iterator[Input]:
    file = argument[1:]
    if not (os.access(file, os.R_OK) and (os.path.isfile(file) or Path(file).is_fifo())):
        reason = "a folder" if os.path.isdir(file) else "cannot be read" if os.path.exists(file) else "no such file"
        hint = "; a text that starts with @ goes through standard input" if modality == "text" else ""
        raise PartialLoraError(f"{file or argument}: {reason}, expected a file of lines{hint}")

    def lines() -> Iterator[Input]:
        with open(file, "rb") as stream:
            yield from _lines(stream, file, parse)

    return lines()


def _lines(stream: BinaryIO, name: str, parse: Callable[[str], Input]) -> Iterator[Input]:
    """Yield an input a line. Only a newline ends a line: texts may hold other characters that Unicode calls breaks."""
    for number, raw in enumerate(iter(lambda: stream.readline(_LONGEST + 1), b""), 1):
        place = f"{name}, line {number}"
        if len(raw) > _LONGEST:  # a device has no end
            raise PartialLoraError(f"{place}: expected a line of at most {_LONGEST / 2**20:g} MiB")
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            parsed = parse(line) if line.strip() else Input(line, line, "an empty line")
        except UnicodeDecodeError:
            line = raw.decode("utf-8", errors="backslashreplace").rstrip("\r\n")
            parsed = Input(line, line, "not UTF-8")
        yield replace(parsed, place=place)


def _text(line: str) -> Input:
    return Input(line, line, None if line.strip() else "an empty text")


def _pair(line: str) -> Input:
    parts = tuple(line.split("\t"))
    if len(parts) != 2 or not all(part.strip() for part in parts):
        return Input(line, line, "expected two texts with a tab between them")
    return Input(line, parts)


def _question(line: str) -> Input:
    prompt, *options = line.split("\t")
    problem = problem_of_question(prompt, options)
    return Input(line, line if problem else (prompt, tuple(options)), problem)


LINES = {"image": _text, "text": _text, "prompt": _text, "question": _question}  # by what the kind of a task reads


def problem_of_question(prompt: str, options: Sequence[str]) -> str | None:
    """Return why there is nothing to choose among options, in a few words; None where there is."""
    texts = [text.strip() for text in (prompt, *options)]
    if len(options) < 2 or not all(texts):
        return "expected a prompt and two or more options, with tabs between them"
    twice = next((text for text in texts[1:] if texts[1:].count(text) > 1), None)
    return f"the option {twice!r} is there twice" if twice else None
