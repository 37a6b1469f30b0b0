"""The tables of an analysis, on a terminal of 100 columns and as Markdown. Every number is one of analysis.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text
from tabulate import tabulate

NONE = "–"  # for what does not apply
_CORRECTED = "corrected: Spearman-Brown, for the whole draw; r, rows and r, columns: Pearson of one axis alone."


_COMPARED = ("pearson", "mean_absolute")


@dataclass(frozen=True)
class Sheet:
    """One table: cells as they are read, the first column words, the others numbers; and what has to be said of it."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: tuple[str, ...] = ()


def markdown(analysis: Mapping) -> str:
    """table.md: the command, where the numbers come from, the tables."""
    commit, device = (analysis["git_commit"] or NONE)[:12], analysis["device"]
    parts = [f"    {' '.join(analysis['command'].split())}", f"Commit: {commit}. Device: {device}."]
    for sheet in sheets(analysis):
        align = ["left", *["right"] * (len(sheet.columns) - 1)]
        table = tabulate(sheet.rows, sheet.columns, tablefmt="pipe", disable_numparse=True, colalign=align)
        parts += [f"**{sheet.title}**", table, *sheet.notes]
    return "\n\n".join(parts) + "\n"


def on_screen(analysis: Mapping) -> Group:
    """The same tables for a terminal."""
    shown: list[Table | Text] = []
    for sheet in sheets(analysis):
        drawn = Table(title=sheet.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for number, name in enumerate(sheet.columns):
            drawn.add_column(name, justify="right" if number else "left", no_wrap=not number)
        for row in sheet.rows:
            drawn.add_row(*row)
        shown += [drawn, *(Text(note) for note in sheet.notes)]
    return Group(*shown)


def sheets(analysis: Mapping) -> list[Sheet]:
    """The tables of an analysis that is finished."""
    return _SHEETS[analysis["what"]](analysis)


def _agreement(analysis: Mapping) -> list[Sheet]:
    measures = analysis["config"]["analysis"]["measures"]
    found = []
    for point, lines in analysis["summary"].items():
        cells = {(line["first"], line["second"]): line for line in lines}
        rows = [
            [second, *(_pair(cells.get((first, second))) for first in measures[:-1])]
            for second in measures[1:]
        ]  # fmt: skip
        line = lines[0]
        whole = f"; {line['whole']} kept whole, where all agree, are left out" if line["whole"] else ""
        of = f"{line['n']} rows or columns of modules{whole}"
        title = f"Jaccard at {point_name(point)}: {number(line['chance'])} by chance, {of}"
        found.append(Sheet(title, ["", *measures[:-1]], rows))
    note = "In brackets: agreement beyond chance, as a share of what there is room for (1: the same choice, 0: chance)."
    return [*found[:-1], Sheet(found[-1].title, found[-1].columns, found[-1].rows, (note,))]


def _pair(line: Mapping | None) -> str:
    return "" if line is None else f"{number(line['jaccard'])} ({number(line['beyond_chance'])})"


def _reliability(analysis: Mapping) -> list[Sheet]:
    names = {
        "pearson": "Pearson",
        "spearman": "Spearman",
        "spearman_brown": "corrected",
        "rows": "r, rows",
        "columns": "r, columns",
    }
    rows = []
    for name, part in analysis["parts"].items():
        values = part["reliability"] | {axis: part[axis]["pearson"] for axis in ("rows", "columns")}
        examples = " + ".join(str(half["examples"]) for half in part["halves"])
        density = " / ".join(number(half["density"]) for half in part["halves"])
        rows.append([name, examples, *(number(values[key]) for key in names), density])
    summary = analysis["summary"]
    rows.append(["mean", "", *(number(summary[key]["mean"]) for key in names), ""])
    rows.append(["sd", "", *(number(summary[key]["deviation"]) for key in names), ""])
    title = "Split-half reliability of the sparsities"
    return [Sheet(title, ["", "examples", *names.values(), "density"], rows, (_CORRECTED, *summary["said"]))]


def _stability(analysis: Mapping) -> list[Sheet]:
    summary = analysis["summary"]
    lines = summary["conditions"]
    rows = [
        [
            condition(line),
            *(number(line["between_seeds"][key]) for key in _COMPARED),
            *(NONE if is_reference(line, summary) else number(line["to_reference"][key]) for key in _COMPARED),
            spread(line["density"]),
            number(line["baseline"]["mean"]),
            number(line["evaluations"]["mean"], ",.0f"),
            number(line["seconds"]["mean"], ",.1f"),
        ]
        for line in lines
    ]
    heads = ["", "r, seeds", "diff.", "r, ref.", "diff.", "density", "score", "passes", "seconds"]
    seeds, reference = lines[0]["seeds"], summary["reference"]["shots"]
    notes = [
        f"r: Pearson; diff.: mean absolute difference of the sparsities; seeds: between {seeds} seeds; ref.: to the "
        f"same seed at {reference} shots without noise; score: of the frozen model.",
        f"passes, seconds: of what was not in the cache; {NONE}: all of it was.",
    ]
    for line in lines:
        for key in ("between_seeds", "to_reference"):
            if line[key]["said"]:
                notes.append(f"{condition(line)}, {key.replace('_', ' ')}: {line[key]['said']}.")
    return [Sheet("Stability of the sparsities", heads, rows, tuple(notes))]


def _cost(analysis: Mapping) -> list[Sheet]:
    summary = analysis["summary"]
    searches = {name: cost for name, cost in summary["searches"].items() if cost is not None}
    first = searches.get("literal", searches["scan"])
    rows = [
        [
            name,
            number(cost["passes"], ",d"),
            number(cost["sample_blocks"], ",d"),
            f"{first['sample_blocks'] / cost['sample_blocks']:.1f} ×",
            number(cost["seconds"], ",.1f"),
        ]
        for name, cost in searches.items()
    ]
    notes = (f"Scan and bisect differ in {summary['differ']:.1%} of the sparsities.",)
    if "literal" in searches:
        notes += ("literal: every level upward to the first failure as a full pass; counted, not run.",)
    heads = ["search", "passes", "sample-block evaluations", "fewer", "seconds"]
    measures = [[name, number(seconds, ",.2f")] for name, seconds in summary["importance"].items()]
    return [
        Sheet("Cost of the search", heads, rows, notes),
        Sheet("Cost of the importance", ["measure", "seconds"], measures),
    ]


def condition(line: Mapping) -> str:
    """A condition of stability in words."""
    return f"{line['shots']} shots" + (f", {line['noise']:.0%} wrong" if line["noise"] else "")


def is_reference(line: Mapping, summary: Mapping) -> bool:
    """True for the condition of stability that the others are compared with."""
    return all(line[key] == value for key, value in summary["reference"].items())


def point_name(point: str) -> str:
    """The sparsities of an agreement in words."""
    return "the calibrated sparsities" if point == "calibrated" else f"sparsity {point}"


def number(value: float | None, form: str = ".2f") -> str:
    """A number as it is read; "–" for none."""
    return NONE if value is None else format(value, form)


def spread(found: Mapping[str, float | None]) -> str:
    """A mean and, where there are several, their standard deviation."""
    deviation = "" if found["deviation"] is None else f" ± {found['deviation']:.2f}"
    return number(found["mean"]) + deviation


_SHEETS: dict[str, Callable[[Mapping], list[Sheet]]] = {
    "agreement": _agreement,
    "reliability": _reliability,
    "stability": _stability,
    "cost": _cost,
}
