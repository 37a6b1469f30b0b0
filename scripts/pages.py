"""Numbers of pages, out of the tables of results/: each stands before a comment that says which one it is.

    python scripts/pages.py results/claims.md      # or `make pages`: all of PAGES

A source is `<!-- TABLE: WHERE: METHOD -->`, of a row's score with its deviation, or with `FIRST − SECOND` of their
difference with its interval, in points. TABLE is a csv of results/ without its suffix, or a study with one table. WHERE
is a task (or all sets, average), and perhaps an operating point and a measure of importance other than svd. As many
digits are written as are there, two where there is no number yet. Exit code 2 where a source is of no row, or several.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pandas as pd

from partial_lora import cli
from partial_lora.errors import PartialLoraError
from partial_lora.files import write_atomic

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("results/claims.md", "docs/concepts/operating-points.md")
SIGNED = r"[+−]\d+\.\d+"
NUMBER = rf"{SIGNED} \[{SIGNED}, {SIGNED}\]|\d+\.\d+ ± \d+\.\d+"  # a difference, or a score
SOURCED = re.compile(rf"(?P<number>{NUMBER})?(?P<after>\**)<!-- (?P<source>[\w/]+: [^>]*?) -->")


@cache
def rows(table: str) -> list[tuple[str, set, set, list[float]]]:
    """Return the rows of a table as (method or difference, where, measure, numbers).

    where: tasks, models and operating points. measure: of importance, where it is not svd. numbers: in points, a score
    with its deviation or a difference with its interval.
    """
    made, places = [], (f"{table}.csv", f"{table}/{table}.csv", f"{table}/tables/{table}.csv")
    file = next((ROOT / "results" / place for place in places if (ROOT / "results" / place).is_file()), None)
    if file is None:
        raise PartialLoraError(f"{table}: expected a table of results/, without its suffix")
    for row in pd.read_csv(file, comment="#").to_dict("records"):
        if "form" in row:  # of forms and of the race
            mean, half = 100 * row["difference"], 100 * row["difference_half"]
            interval = [mean, mean - half, mean + half]
            if table.endswith("from_dense"):
                made.append((f"{row['form']} − lora", {row["task"]}, set(), interval))
                continue
            where = {row["task"], f"budget {row['size']}"}
            made.append((row["form"], where, set(), [100 * row["test"], 100 * row["half"]]))
            made.append((f"{row['form']} − low_rank", where, set(), interval))
            continue
        where = {row.get(name) for name in ("task", "model", "mixture", "operating_point")}
        measure = {each for each in {row.get("importance", "svd")} - {"svd", "–"} if isinstance(each, str)}
        difference, low, high = (100 * row[name] for name in ("difference", "low", "high"))
        if row.get("part") == "difference":
            made.append((f"{row['first']} − {row['second']}", where, measure, [difference, low, high]))
            continue
        mean, std = ("mean", "std") if "mean" in row else ("test_mean", "test_std")
        made.append((row["method"], where, measure, [100 * row[mean], 100 * row[std]]))
        if "comparison" in table:  # which sets every method beside partial
            made.append((f"{row['method']} − partial", where, measure, [difference, low, high]))
            made.append((f"partial − {row['method']}", where, measure, [-difference, -high, -low]))
    return made


def found(source: str) -> list[float]:
    """Return the numbers of a source; raises PartialLoraError where there are none, or several."""
    table, where, method = source.split(": ")
    wanted = set(re.split(r", (?!snip)", where))
    known = [
        numbers
        for what, words, measure, numbers in rows(table)
        if what == method and measure <= wanted <= words | measure
    ]
    if len(known) != 1:
        raise PartialLoraError(f"{source}: {len(known)} rows of that table, expected one")
    return known[0]


def filled(text: str) -> str:
    """Return a page with the numbers of its sources."""

    def written(match: re.Match) -> str:
        digits = len(re.match(r".\d*\.(\d+)", match["number"])[1]) if match["number"] else 2
        numbers = found(match["source"])
        if len(numbers) == 2:
            number = f"{numbers[0]:.{digits}f} ± {numbers[1]:.{digits}f}"
        else:
            mean, low, high = (f"{each:+.{digits}f}".replace("-", "−") for each in numbers)
            number = f"{mean} [{low}, {high}]"
        return f"{number}{match['after']}<!-- {match['source']} -->"

    return SOURCED.sub(written, text)


@cli.script
def main(arguments: Sequence[str] | None = None) -> None:
    names = sys.argv[1:] if arguments is None else arguments
    for name in names or PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        if (made := filled(text)) != text:
            write_atomic(ROOT / name, made)
            print(f"wrote {name}")


if __name__ == "__main__":
    sys.exit(main())
