"""A table of evidence as data: what it tests, raw numbers, what is read of them, what is missing; and its files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from tabulate import tabulate

from partial_lora.results import write_atomic
from partial_lora.runs import NONE

_WORDS = {
    "model",
    "mixture",
    "importance",
    "operating point",
    "method",
    "task",
    "difference",
    "over",
    "verdict",
    "what",
}


@dataclass(frozen=True)
class Artefact:
    """One table, perhaps of several parts.

    name: table1. claim: the paper's, in a sentence. verdict: what was found of it, in a sentence. numbers: as measured,
    a row a number, `part` saying of which part. shown: {title: what is read}. missing: what it would also show.
    """

    name: str
    title: str
    claim: str
    verdict: str
    numbers: pd.DataFrame
    shown: Mapping[str, pd.DataFrame]
    notes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    origin: str = ""  # of the runs: preset, tuning, commit, device
    made: str = field(default="", kw_only=True)  # the command


def rows_of(numbers: pd.DataFrame, part: str) -> list[dict]:
    """The rows of one part of a table's numbers."""
    return numbers[numbers["part"] == part].to_dict("records") if "part" in numbers else []


def write(artefact: Artefact, folder: Path) -> list[Path]:
    """Write folder/NAME.md, .csv and .tex, each whole or not at all; gives the files."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    above = [line for line in (artefact.made, artefact.origin) if line]
    contents = {
        "md": markdown(artefact),
        "csv": "".join(f"# {line}\n" for line in above) + artefact.numbers.convert_dtypes().to_csv(index=False),
        "tex": "".join(f"% {line}\n" for line in above) + latex(artefact),
    }
    for suffix, content in contents.items():
        write_atomic(folder / f"{artefact.name}.{suffix}", content)
    return [folder / f"{artefact.name}.{suffix}" for suffix in contents]


def markdown(artefact: Artefact) -> str:
    """What is read: the command, the claim, the verdict, the tables, what has to be said of them."""
    parts = [f"    {artefact.made}"] if artefact.made else []
    parts += [artefact.origin] if artefact.origin else []
    parts += [f"# {artefact.title}", f"The paper: {artefact.claim}", f"Here: {artefact.verdict}"]
    for title, shown in artefact.shown.items():
        parts += [f"**{title}**", _tabulated(shown, "pipe")]
    if artefact.notes:
        parts.append("\n".join(f"- {note}" for note in artefact.notes))
    if artefact.missing:
        parts.append("\n".join(f"- missing: {line}" for line in artefact.missing))
    return "\n\n".join(parts) + "\n"


def latex(artefact: Artefact) -> str:
    """The tables alone, for a paper (booktabs); each title a comment."""
    return "\n".join(
        f"% {title}\n{_in_latex(_tabulated(shown, 'latex_booktabs'))}\n" for title, shown in artefact.shown.items()
    )


def _in_latex(tabulated: str) -> str:
    bold = re.sub(r"\*\*(.+?)\*\*", r"\\textbf{\1}", tabulated)
    for sign, written in {"±": r"$\pm$", "−": "$-$", "×": r"$\times$", NONE: "--"}.items():
        bold = bold.replace(sign, written)
    return bold


def _tabulated(shown: pd.DataFrame, form: str) -> str:
    align = ["left" if name in _WORDS else "right" for name in shown.columns]
    cells = shown.values.tolist()
    return tabulate(cells, list(shown.columns), tablefmt=form, disable_numparse=True, colalign=align)
