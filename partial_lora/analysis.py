"""`partial-lora analyse`: one analysis of a calibration, kept part by part, and its table and figure.

An analysis that was stopped goes on where it was; a finished one only has its table and figure made again.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from rich.console import Console

from partial_lora import analysis_figures, analysis_schema, analysis_tables, fewshot, record, results
from partial_lora.errors import PartialLoraError
from partial_lora.examinations import ANALYSES, Part
from partial_lora.subject import Subject

VERSION = 1  # of what a part holds; parts of another one are done again
ANALYSIS, LOG = "analysis.json", "analysis.log"
_ORIGIN = ("config", "versions", "git_commit", "started")  # of a run's record


def analyse(what: str, settings: Mapping, command: str, console: Console | None = None) -> int:
    """Do one analysis and leave analysis.json, table.md, figure.png and figure.svg; gives the exit code.

    settings: as `analysis_schema.resolve` gives them. command: what the table says made it. Raises PartialLoraError, in
    one line, where a calibration is refused, or another process holds the directory.
    """
    console = console or Console()
    if not console.is_terminal:
        console.width = 100  # what the tables are made for; rich's own guess for a file is narrower
    if settings["calibration"]["file"]:
        raise PartialLoraError("calibration.file: an analysis calibrates itself, on draws that differ; leave it out")
    directory = analysis_schema.directory(settings, what)
    console.print(f"analyse {what} {directory}", highlight=False, soft_wrap=True)
    with results.locked(directory), _logged(directory / LOG):
        found = None if settings["overwrite"] else _kept(directory / ANALYSIS, what)
        if found is None:
            found = _begun(what, settings, command)
        if found["status"] == "finished":
            console.print("finished before, not run again (overwrite=true runs it again)")
        else:
            _work(ANALYSES[what].parts(settings), found, settings, directory / ANALYSIS, console)
            found |= {"status": "finished", "summary": ANALYSES[what].summary(settings, found["parts"])}
            results.write_json(directory / ANALYSIS, found)
        results.write_atomic(directory / "table.md", analysis_tables.markdown(found))
        for name in ("figure.png", "figure.svg"):
            analysis_figures.draw(found, directory / name)
    console.print(analysis_tables.on_screen(found))
    console.print(f"files in {directory}", highlight=False, soft_wrap=True)
    return 0


def _work(parts: Mapping[str, Part], found: dict, settings: Mapping, path: Path, console: Console) -> None:
    """Do the parts that are not there yet and keep each once it is done; the model is loaded if one is missing."""
    subject = cache(lambda: Subject(settings))
    for number, (name, part) in enumerate(parts.items(), start=1):
        where = f"{number}/{len(parts)} {name}"
        if name in found["parts"]:
            console.print(f"{where}: done before", highlight=False)
            continue
        began = time.perf_counter()
        found["device"] = subject().device
        found["parts"][name] = part(subject())
        results.write_json(path, found)
        console.print(f"{where}: {time.perf_counter() - began:,.1f} s", highlight=False)


def _begun(what: str, settings: Mapping, command: str) -> dict:
    """An analysis of which no part is done: what it is of and where its numbers come from."""
    origin = record.new(settings)
    return {
        "what": what,
        "status": "running",
        "version": _version(),
        "command": command,
        "device": None,
        **{key: origin[key] for key in _ORIGIN},
        "parts": {},
    }


def _kept(path: Path, what: str) -> dict | None:
    """What an earlier command found; None where there is nothing, or nothing that this code would find the same way."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        known = found["what"] == what and found["version"] == _version() and isinstance(found["parts"], dict)
        whole = found["status"] == "running" or "summary" in found
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if known and whole else None


def _version() -> list[int]:
    return [VERSION, fewshot.VERSION]


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Warnings of the calibrations go into a file: there are many, and the terminal shows the table."""
    logger, handler = logging.getLogger("partial_lora"), logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
