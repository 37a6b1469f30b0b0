"""Data sets of the hub as files that `data_dir=data` reads: data/NAME/{train,validation,test}.parquet, and a README.

    python scripts/data_sets.py sst2 trec          # or: make data SETS="sst2 trec"

A NAME is a task of conf/task, whose file says which data set, at which revision, and which splits. The README has its
origin, its licence as the hub's card says, and the SHA-256 of each file. A set that is there is compared with its
README, and not fetched again. Exit code 1 where a set can neither be found nor fetched; the others are then whole.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError

from partial_lora.errors import PartialLoraError
from partial_lora.files import building, file_sha256
from partial_lora.settings.compose import composed
from partial_lora.tasks.config import TaskConfig
from partial_lora.tasks.image_folders import FILES
from partial_lora.tasks.sources import first_line, read_hub
from partial_lora.tasks.task import places

ROOT = Path(__file__).resolve().parents[1]
README = "README.md"
_CHECKSUM = re.compile(r"^\| (\w+\.parquet) \|.*`([0-9a-f]{64})`", re.MULTILINE)


def folder() -> Path:
    """Return the folder of real rows, which is make's DATA: that variable, else data, else ../shared/data if there."""
    if "DATA" in os.environ:
        return Path(os.environ["DATA"]).absolute()
    return next((place for place in (ROOT / "data", ROOT.parent / "shared" / "data") if place.is_dir()), ROOT / "data")


def put(task: TaskConfig, place: Path) -> str:
    """Fetch a task's rows into a folder, or compare those that it has with its README; return what was done.

    Raises PartialLoraError, and leaves the folder as it was, where neither can be done.
    """
    if place.exists():
        _check(place)
        return "is there, as its README says"
    if "/" not in task.path:
        source = "no data set of the hub" if task.path == FILES else task.path
        raise PartialLoraError(f"task={task.name}: its rows are those of {source}; nothing is fetched")
    rows = read_hub(task.name, task.path, task.subset, task.revision)
    try:
        card = HfApi().dataset_info(task.path, revision=task.revision).card_data or {}
    except (OSError, HTTPError) as error:
        raise PartialLoraError(f"task={task.name}: no card of {task.path} ({first_line(error)}); try again") from error
    with building(place) as built:
        for split, name in places(task.name, rows, task.train_split, task.test_split, own_files=False).items():
            rows[name].to_parquet(built / f"{split}.parquet")
        (built / README).write_text(_readme(task, card.get("license"), built), encoding="utf-8")
    return "fetched"


def _check(place: Path) -> None:
    """Raise PartialLoraError for a set without a README that has its checksums, or with another file than that says."""
    readme = place / README
    known = dict(_CHECKSUM.findall(readme.read_text(encoding="utf-8"))) if readme.is_file() else {}
    others = [name for name, sha in known.items() if not (place / name).is_file() or file_sha256(place / name) != sha]
    if others or "train.parquet" not in known:
        said = f"{', '.join(others)} not as {README} says" if others else f"no checksums in {README}"
        raise PartialLoraError(f"{place}: {said}; remove the folder to fetch the set again")


def _readme(task: TaskConfig, licence: str | Sequence[str] | None, built: Path) -> str:
    named = f"{task.path}, {task.subset}" if task.subset else task.path
    files = sorted(built.glob("*.parquet"))
    lines = [f"| {file.name} | {file.stat().st_size:,} | `{file_sha256(file)}` |" for file in files]
    licence = ", ".join(licence) if isinstance(licence, list) else licence
    return "\n".join(
        [
            *(f"# {task.name}", ""),
            f"- Origin: the hub's {named}, revision `{task.revision}`, whole; test.parquet is its `{task.test_split}`.",
            f"- Licence, as its card there says: {licence or 'the card names none'}.",
            *("", "| file | bytes | sha256 |", "| --- | --- | --- |", *lines, ""),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", metavar="NAME", help="a task of conf/task")
    parser.add_argument("--to", type=Path, default=Path("data"), metavar="FOLDER", help="default: data")
    parsed = parser.parse_args(arguments)
    code = 0
    for name in parsed.names:
        try:
            print(f"{name}: {put(composed(f'task={name}').task, parsed.to / name)}")
        except PartialLoraError as error:  # the other sets go on
            print(error, file=sys.stderr)
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
