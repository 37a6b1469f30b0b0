"""Runs of a study: the commands that `study` in a file of conf/experiment lists, one after another.

    python scripts/study.py race                                  # as `make race` does
    python scripts/study.py decided --only task=digits stage=first --list

An entry is one command, or its parts, of which those that are lists are alternatives: each of one is combined with each
of the others. "" adds nothing to what the file sweeps by itself. Where it names no command it is the words of
`partial-lora train -m`; the experiment and the folder of the data are added. `stage=NAME` is for --only alone.

Sets without files in that folder are left out, but for those of preset=paper, which come from the hub. Finished runs
are skipped. A run that failed ends its command with 1, and the study goes on; whatever else goes wrong ends it.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from itertools import product
from pathlib import Path

import yaml

from partial_lora.settings.schema import conf_dir

OF_RUNS = ("train", "compare", "calibrate")
WITHOUT_FILES = {"digits", "mixture"}


def commands(name: str, data: Path, only: Mapping[str, Collection[str]]) -> Iterator[list[str]]:
    """Yield the words of each command of a study; only: the values that a key may have where a command names it."""
    study = yaml.safe_load((conf_dir() / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")).get("study", ())
    there = WITHOUT_FILES.union(file.parent.name for file in data.glob("*/train.parquet"))
    for entry in study:
        parts = [[part] if isinstance(part, str) else part for part in (entry if isinstance(entry, list) else [entry])]
        for chosen in product(*parts):
            words = shlex.split(" ".join(chosen))
            if "preset=paper" not in words:
                words = [_left(word, "task", there) for word in words]
            for key, values in only.items():
                words = [_left(word, key, values) for word in words]
            if all(words):
                yield _whole([word for word in words if not word.startswith("stage=")], name, data)


def _left(word: str, key: str, values: Collection[str]) -> str:
    """Return a word with those of its values that a key may have; an empty one where none is left."""
    own, _, text = word.partition("=")
    if own == "task.members" and key == "task":
        return word if values >= set(text.strip("[]").split(",")) else ""
    if own != key:
        return word
    left = ",".join(value for value in text.split(",") if value in values)
    return left and f"{key}={left}"


def _whole(words: list[str], name: str, data: Path) -> list[str]:
    if words[0] not in (*OF_RUNS, "report", "python"):
        words = ["train", "-m", *words]
    if words[0] in OF_RUNS and not any(word.startswith("experiment=") for word in words):
        words = [*words, f"experiment={name}"]
    of_rows = words[0] in OF_RUNS or any(word.startswith("task=") for word in words)
    return [*words, f"data_dir={data}"] if of_rows and data.is_dir() and "preset=paper" not in words else words


def main() -> int:
    """Run a study; return the exit code of the command that ended it, or 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a file of conf/experiment")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of NAME/{train,test}.parquet")
    parser.add_argument("--only", nargs="*", default=[], metavar="KEY=A,B", help="leave out what has another value")
    parser.add_argument("--with", nargs="*", default=[], metavar="KEY=VALUE", dest="settings", help="of all runs")
    parser.add_argument("--list", action="store_true", help="print the commands alone")
    options = parser.parse_args()
    only = {key: set(values.split(",")) for key, _, values in (word.partition("=") for word in options.only)}
    for words in commands(options.name, options.data, only):
        words += options.settings if words[0] in OF_RUNS else []
        print("+", shlex.join(words), flush=True)
        if not options.list:
            command = words if words[0] == "python" else ["python", "-m", "partial_lora", *words]
            code = subprocess.run([sys.executable, *command[1:]], check=False).returncode
            if code > 1:
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
