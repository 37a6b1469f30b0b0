"""The figures of the evidence: each a module that says its numbers and draws them, from what runs have left behind.

`numbers(found, results_dir)` gives a frame whose attrs["notes"] name what is missing; `draw(frame)` gives the figure;
NEEDS says what there has to be at all.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from partial_lora import runs
from partial_lora.errors import PartialLoraError
from partial_lora.results import write_atomic

NAMES = ("fig1", "fig2", "fig3", "fig4", "fig5", "fig6", "fig7")


def make(name: str, results_dir: Path, out_dir: Path | None = None, say: Callable[[str], None] = print) -> list[Path]:
    """Draw a figure from the runs under results_dir, as out_dir/NAME.png, .svg and .csv; gives the files.

    out_dir: results_dir/figures where none is named. say: told in a line each what is missing or left out. Where there
    is nothing to draw, files of an earlier time go, and none is given. Raises PartialLoraError for another name.
    """
    if name not in NAMES:
        raise PartialLoraError(f"{name}: expected one of {', '.join(NAMES)}")
    from partial_lora.evidence.figures import frames
    from partial_lora.figures import save  # matplotlib, for those who draw

    results_dir = Path(results_dir)
    folder = Path(out_dir or results_dir / "figures")
    module = importlib.import_module(f"{__name__}.{name}")
    found, problems = _read(results_dir)
    frame = module.numbers(found, results_dir)
    notes = [f"{name}: {note}" for note in frame.attrs.get("notes", [])]
    notes += [f"{name}: {note}" for note in frames.elsewhere(frames.frame(found))]
    if problems:
        notes.append(f"{name}: left out, as no finished runs: {_few(problems)}")
    for old in folder.glob(f"{name}.*"):
        old.unlink()
    if frame.empty:
        notes.append(f"{name}: no {module.NEEDS} in {results_dir}; make reproduce-{name}")
    for note in notes:
        say(note)
    if frame.empty:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    figure = module.draw(frame)
    written = [save(figure, folder / f"{name}.png")]
    figure.set_layout_engine("none")  # everything has its place, which takes as long to find as to draw
    written.append(save(figure, folder / f"{name}.svg"))
    write_atomic(folder / f"{name}.csv", _table(frame, [_command(name, results_dir), *notes]))
    return [*written, folder / f"{name}.csv"]


def _read(results_dir: Path) -> tuple[list[runs.Run], list[str]]:
    """The finished runs, none where there is not even a folder of them, and what was left out."""
    try:
        return runs.read(results_dir)
    except PartialLoraError:
        return [], []


def _command(name: str, results_dir: Path) -> str:
    return f"python scripts/reproduce.py {name} --results {results_dir}"


def _table(frame: pd.DataFrame, above: list[str]) -> str:
    return "".join(f"# {line}\n" for line in above) + frame.to_csv(index=False)


def _few(lines: list[str], most: int = 3) -> str:
    return "; ".join(lines[:most]) + (f"; and {len(lines) - most} more" if len(lines) > most else "")
