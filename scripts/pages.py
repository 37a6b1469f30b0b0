"""Numbers of pages, out of the tables of results/.

    python scripts/pages.py      # or `make pages`

On a page of PAGES a number stands before a comment that says which one it is. Such a source is
`<!-- TABLE: WHERE: METHOD -->`, of a row's score with its deviation, or with `FIRST − SECOND` of their difference with
its interval, in points. TABLE is a csv of results/ without its suffix, or a study with one table. WHERE is a task (or
all sets, average), and perhaps an operating point and a measure of importance other than svd. As many digits are
written as are there, two where there is no number yet. Exit code 2 where a source is of no row, or several.
The pages of results/templates are whole templates, and of README.md the table between two marks is made of one.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path

import pandas as pd
from evidence import CLAIMS, VERDICTS, raced
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from partial_lora import cli
from partial_lora.errors import PartialLoraError
from partial_lora.files import write_atomic

ROOT = Path(__file__).resolve().parents[1]
RESULTS, README = ROOT / "results", ROOT / "README.md"
PAGES = ("results/claims.md", "docs/concepts/operating-points.md")
SIGNED = r"[+−]\d+\.\d+"
SETS = ("digits", "trec", "sst2", "gtsrb")  # of the decided claims
DECISION = re.compile(r"(?<=<!-- decision -->\n).*?(?=<!-- end of decision -->)", re.DOTALL)
NUMBER = rf"{SIGNED} \[{SIGNED}, {SIGNED}\]|\d+\.\d+ ± \d+\.\d+"  # a difference, or a score
SOURCED = re.compile(rf"(?P<number>{NUMBER})?(?P<after>\**)<!-- (?P<source>[\w/]+: [^>]*?) -->")


@cache
def rows(table: str) -> list[tuple[str, set, set, list[float]]]:
    """Return the rows of a table as (method or difference, where, measure, numbers).

    where: tasks, models and operating points. measure: of importance, where it is not svd. numbers: in points, a score
    with its deviation or a difference with its interval.
    """
    made, places = [], (f"{table}.csv", f"{table}/{table}.csv", f"{table}/tables/{table}.csv")
    file = next((RESULTS / place for place in places if (RESULTS / place).is_file()), None)
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

    def with_number(match: re.Match) -> str:
        digits = len(re.match(r".\d*\.(\d+)", match["number"])[1]) if match["number"] else 2
        return f"{written(found(match['source']), digits)}{match['after']}<!-- {match['source']} -->"

    return SOURCED.sub(with_number, text)


def written(numbers: list[float], digits: int = 2) -> str:
    """Return a score with its deviation, or a difference with its interval."""
    if len(numbers) == 2:
        return f"{numbers[0]:.{digits}f} ± {numbers[1]:.{digits}f}"
    mean, low, high = (_signed(f"{each:+.{digits}f}") for each in numbers)
    return f"{mean} [{low}, {high}]"


def _signed(number: str) -> str:
    return number.replace("-", "−")


# --- What templates ask for.


def score(task: str, method: str) -> str:
    """Return the test accuracy of a method that has one operating point, of the decided claims."""
    return f"{found(f'decided: {task}: {method}')[0]:.1f}"


def less(task: str, first: str, second: str, point: str = "budget 0.13", table: str = "decided") -> str:
    """Return a method less another, with its 95 % interval."""
    return written(found(f"{table}: {task}, {point}: {first} − {second}"))


def claim(second: str, point: str = "budget 0.13") -> list[dict[str, str]]:
    """Return what is found of a claim about rows and columns and another method, by set, and then their mean."""
    folder = RESULTS / "decided" / "tables"
    numbers, verdicts = pd.read_csv(folder / "decided.csv"), pd.read_csv(folder / "verdicts.csv")
    of_pair = (numbers["first"] == "partial") & (numbers["second"] == second) & (numbers["operating_point"] == point)
    seeds = numbers[of_pair].set_index("task")["seeds"]
    rows = verdicts[verdicts["claim"] == CLAIMS[second][1]].set_index("where")
    tasks = {f"{'all' if task == 'all sets' else task}, {point}": task for task in (*SETS, "all sets")}
    lines = []
    for where in filter(rows.index.__contains__, tasks):
        after, _, among = rows.loc[where, "verdict"].partition(", among ")
        lines.append(
            {"task": tasks[where], "less": less(tasks[where], "partial", second, point), "count": among}
            | {"before": _in_words(rows.loc[where, "alone"]), "after": _in_words(after)}
            | {"seeds": f"{seeds[tasks[where]]:.0f}"}
        )
    return lines


def _in_words(verdict: str) -> str:
    """Return a verdict as pages have it."""
    word, doubt = VERDICTS[verdict][0], re.search(r"\((.*)\)", verdict)
    return doubt[1] if doubt else word


@cache
def _raced() -> pd.DataFrame:
    return raced(RESULTS).set_index(["task", "form", "size"]).sort_index()


def cell(task: str, form: str, size: str = "0.13") -> dict[str, str]:
    """Return what the race has of a form at a size: scores, distances, seeds, bytes."""
    row = _raced().loc[(task, form, size)]
    test, half, mean, mean_half = (100 * row[name] for name in ("test", "half", "difference", "difference_half"))
    verdict = f"**{'better' if mean > 0 else 'worse'}**" if row["holds"] else "not significant"
    return {
        "lead": _signed(f"{row['lead']:+.1f}"),
        "lead_seeds": f"{row['lead_seeds']:.0f}",
        "less": written([mean, mean - mean_half, mean + mean_half]) if row["paired"] else "–",
        "after": verdict if row["paired"] else "–",
        "test": f"{test:.1f} ± {half:.1f}",
        "share": f"{100 * row['share']:.1f}",
        "seeds": f"{row['seeds']:.0f}",
        "kept": f"{row['saved_bytes'] / 1e6:.0f}",
        "file": f"{row['file_size'] / 1e6:.2g}",
    }


def pages() -> dict[Path, str]:
    """Return all pages as the tables make them, by path."""
    loader = FileSystemLoader(RESULTS / "templates")
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.globals |= {"claim": claim, "less": less, "score": score, "cell": cell}
    names = [name for name in environment.list_templates() if not name.startswith("_")]
    made = {RESULTS / name: environment.get_template(name).render(up="../" * name.count("/")) for name in names}
    decision = environment.get_template("_decision.md").render()
    made[README] = DECISION.sub(lambda _: decision, README.read_text("utf-8"))
    return made | {ROOT / name: filled((ROOT / name).read_text("utf-8")) for name in PAGES}


@cli.script
def main() -> None:
    for path, text in pages().items():
        if not path.is_file() or path.read_text("utf-8") != text:
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, text)
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
