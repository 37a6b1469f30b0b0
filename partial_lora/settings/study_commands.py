"""Runs of a study: the commands that `study` in a file of conf/experiment lists.

An entry is one command, or its parts, of which those that are lists are alternatives: each of one is combined with each
of the others. "" adds nothing to what the file sweeps by itself. Where it names no command it is the words of `train
-m`; the experiment and the folder of the data are added. `stage=NAME` only names an entry, to choose it by, and so does
what stands before `python`. An entry that begins with the name of another study is those of its entries that the values
after it choose.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import product
from pathlib import Path

import yaml

from partial_lora.errors import require
from partial_lora.settings.schema import conf_dir

OF_RUNS = ("train", "compare", "calibrate")
WITHOUT_FILES = {"digits", "mixture"}


def commands(name: str, data: Path, only: Mapping[str, Set[str]] = {}) -> Iterator[list[str]]:
    """Yield the words of each command of a study, one that comes again where it comes last; none where none is listed.

    data: the folder of sets; those without files there are left out, but for those of preset=paper, which come from the
    hub. only: the values that a key may have where a command names it.
    """
    if "preset" not in keys(name):  # a study of one preset need not name it
        preset = ",".join(only.get("preset", {"cpu"}))
        require(preset == "cpu", "preset", preset, f"cpu, as {name} has no other")
    found = list(_commands(name, data, only))
    yield from (words for at, words in enumerate(found) if words not in found[at + 1 :])


def keys(name: str) -> set[str]:
    """Return the keys that a study's entries name, and those of the studies that it takes entries of."""
    named = set()
    for parts in _entries(name):
        words = [word for part in parts for text in part for word in shlex.split(text)]
        named |= {word.partition("=")[0] for word in words if "=" in word}
        named |= keys(words[0]) if words and words[0] in _files() else set()
    return named


def chosen_from(study: Sequence[str | list]) -> str | None:
    """Return the study with settings that the first entry takes runs of; None where it has runs of its own."""
    name = str(study[0]).partition(" ")[0] if study else ""
    if name not in _files():
        return None
    return chosen_from(_study(name)) or name


def _files() -> dict[str, Path]:
    return {file.stem: file for file in sorted((conf_dir() / "experiment").glob("*.yaml"))}


def _study(name: str) -> Sequence[str | list]:
    """Return the entries of a study; none where its file lists none."""
    files = _files()
    require(name in files, "experiment", name, f"one of {', '.join(files)}")
    settings = yaml.safe_load(files[name].read_text(encoding="utf-8")) or {}
    return settings.get("study") or ()


def _entries(name: str) -> Iterator[list[list[str]]]:
    """Yield the parts of each entry of a study, of each part its alternatives."""
    for entry in _study(name):
        yield [[part] if isinstance(part, str) else part for part in (entry if isinstance(entry, list) else [entry])]


def _commands(name: str, data: Path, only: Mapping[str, Set[str]]) -> Iterator[list[str]]:
    there, studies = WITHOUT_FILES.union(file.parent.name for file in data.glob("*/train.parquet")), _files()
    for parts in _entries(name):
        for chosen in product(*parts):
            words = shlex.split(" ".join(chosen))
            if words and words[0] in studies:
                named = dict(_values(word) for word in words[1:])
                both = named | {key: values & named.get(key, values) for key, values in only.items()}
                yield from _commands(words[0], data, both) if all(both.values()) else ()
                continue
            if "preset=paper" not in words:
                words = [_left(word, "task", there) for word in words]
            for key, values in only.items():
                words = [_left(word, key, values) for word in words]
            if all(words):
                yield _whole([word for word in words if not word.startswith("stage=")], name, data)


def _values(word: str) -> tuple[str, set[str]]:
    """Return the key of a word and its values: of a=b,c or a=[b,c] b and c."""
    key, _, text = word.partition("=")
    return key, set(text.strip("[]").split(","))


def _left(word: str, key: str, values: Set[str]) -> str:
    """Return a word with those of its values that a key may have; an empty one where none is left."""
    name, _, text = word.partition("=")
    if name == "task.members" and key == "task":
        return word if values >= _values(word)[1] else ""
    if name != key:
        return word
    left = ",".join(value for value in text.strip("[]").split(",") if value in values)
    if not left:
        return ""
    return f"{key}=[{left}]" if text.startswith("[") else f"{key}={left}"


def _whole(words: list[str], name: str, data: Path) -> list[str]:
    words = words[words.index("python") :] if "python" in words else words
    if not words or words[0] not in (*OF_RUNS, "report", "python"):
        words = ["train", "-m", *words]
    if words[0] in OF_RUNS and not any(word.startswith("experiment=") for word in words):
        words = [*words, f"experiment={name}"]
    of_rows = words[0] in OF_RUNS or any(word.startswith("task=") for word in words)
    return [*words, f"data_dir={data}"] if of_rows and data.is_dir() and "preset=paper" not in words else words
