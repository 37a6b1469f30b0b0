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

import math
import re
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from evidence import CLAIMS, VERDICTS, raced
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from partial_lora import cli
from partial_lora.errors import PartialLoraError
from partial_lora.files import write_atomic
from partial_lora.report.statistics import Estimate, half_interval, over_sets

ROOT = Path(__file__).resolve().parents[1]
RESULTS, README = ROOT / "results", ROOT / "README.md"
PAGES = ("docs/concepts/operating-points.md",)
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
    return made


def found(source: str) -> list[float]:
    """Return the numbers of a source; raises PartialLoraError where there are none, or several."""
    if source.count(": ") != 2:
        raise PartialLoraError(f"<!-- {source} -->: expected TABLE: WHERE: METHOD")
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


def less(
    task: str, first: str, second: str, point: str = "budget 0.13", table: str = "decided", digits: int = 2
) -> str:
    """Return a method less another, with its 95 % interval."""
    return written(found(f"{table}: {task}, {point}: {first} − {second}"), digits)


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


def kept(task: str, point: str) -> str:
    """Return what share of its score a frozen model keeps with all calibrated shares at once, in per cent."""
    numbers = pd.read_csv(RESULTS / "decided" / "tables" / "table5.csv", comment="#")
    at = (numbers["part"] == "joint") & (numbers["task"] == task) & (numbers["operating_point"] == point)
    ((ratio, low, high),) = numbers.loc[at & (numbers["importance"] == "svd"), ["ratio", "low", "high"]].to_numpy()
    return f"{100 * ratio:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


def noisy(part: str, less: str = "targeted, equal shares", condition: str = "40% wrong labels") -> str:
    """Return equal shares less another form under a condition: their "difference", or its "change" (figure 7)."""
    rows = pd.read_csv(RESULTS / "decided" / "figures" / "fig7.csv", comment="#")
    rows = rows[(rows["part"] == part) & (rows["condition"] == condition) & (rows["less"] == less)]
    ((mean, half),) = 100 * rows[["mean", "half"]].to_numpy()
    return written([mean, mean - half, mean + half], digits=1)


def with_digits(second: str, point: str = "budget 0.13") -> str:
    """Return rows and columns less another method as the mean over all sets of the decided claims, digits too."""
    numbers = pd.read_csv(RESULTS / "decided" / "tables" / "decided.csv")
    of_pair = (numbers["first"] == "partial") & (numbers["second"] == second) & (numbers["operating_point"] == point)
    sets = numbers[of_pair & numbers["task"].isin(SETS)]
    mean = over_sets([Estimate(row.difference, row.error, row.freedom) for row in sets.itertuples()])
    return written([100 * number for number in (mean.difference, *mean.interval())])


def _in_words(verdict: str) -> str:
    """Return a verdict as pages have it."""
    word, doubt = VERDICTS[verdict][0], re.search(r"\((.*)\)", verdict)
    return doubt[1] if doubt else word


CELL = ["task", "form", "size"]


@cache
def _raced() -> pd.DataFrame:
    return raced(RESULTS).set_index(CELL).sort_index()


@cache
def _cells(table: str) -> pd.DataFrame:
    return pd.read_csv(RESULTS / f"{table}.csv", dtype={"size": str}).set_index(CELL).sort_index()


@cache
def _runs(study: str) -> pd.DataFrame:
    columns = [*CELL, "learning_rate", "seed", "adapter_parameters", "test"]
    return pd.read_parquet(RESULTS / study / "runs.parquet", columns=columns)


def cell(task: str, form: str, size: str = "0.13") -> dict[str, str]:
    """Return what the race has of a form at a size: scores, distances, losses, seeds, bytes."""
    row = _raced().loc[(task, form, size)]
    test, half, mean, mean_half = (100 * row[name] for name in ("test", "half", "difference", "difference_half"))
    verdict = f"**{'better' if mean > 0 else 'worse'}**" if row["holds"] else "not significant"
    return {
        "lead": _signed(f"{row['lead']:+.1f}"),
        "lead_seeds": f"{row['lead_seeds']:.0f}",
        "from_dense": written([row["lead"], row["lead"] - row["lead_half"], row["lead"] + row["lead_half"]]),
        "less": written([mean, mean - mean_half, mean + mean_half]) if row["paired"] else "–",
        "after": verdict if row["paired"] else "–",
        "loss": loss(task, form, size, f"{row['study']}/loss"),
        "study": row["study"],
        "test": f"{test:.1f} ± {half:.1f}",
        "share": f"{100 * row['share']:.1f}",
        "seeds": f"{row['seeds']:.0f}",
        "kept": f"{row['saved_bytes'] / 1e6:.0f}",
        "file": f"{row['file_size'] / 1e6:.2g}",
    }


def loss(task: str, form: str, size: str = "0.13", table: str = "decided/tables/loss") -> str:
    """Return a form's test loss less plain LoRA's, in nats, bold where that is significant after correction."""
    losses = _cells(table)
    if (task, form, size) not in losses.index:
        return "–"
    row = losses.loc[(task, form, size)]
    number = written([row["difference"], row["difference"] - row["half"], row["difference"] + row["half"]])
    return f"**{number}**" if row["holds"] else number


def apart(task: str, first: str, second: str, size: str = "0.13", table: str = "forms") -> str:
    """Return a form less another of about its size, at their best rates, with its interval over the seeds of both."""
    scores = [100 * _at_best(task, form, size, table) for form in (first, second)]
    differences = (scores[0] - scores[1]).dropna()
    mean, half = differences.mean(), half_interval(differences.std(), len(differences))
    return written([mean, mean - half, mean + half])


def _at_best(task: str, form: str, size: str, study: str) -> pd.Series:
    """Return the test scores of a form at its best rate, by seed. A form on some modules has a size of its own."""
    method, _, modules = form.partition(" on ")
    size = "own" if modules else size
    best, runs = _cells(f"{study}/{study}").loc[(task, form, size)], _runs(study)
    own = runs[(runs["task"] == task) & (runs["form"] == method) & (runs["size"] == size)]
    for column, known in (("learning_rate", "learning_rate"), ("adapter_parameters", "parameters")):
        own = own[np.isclose(own[column], best[known], rtol=1e-4)]
    return own.drop_duplicates("seed").set_index("seed")["test"]


def responses(size: str) -> list[dict[str, str]]:
    """Return what methods of a size made of a language model, the lowest loss first (`make language`).

    Losses are of held-out responses, in nats; their differences are those of perplexities, over the reference's.
    """
    folder = RESULTS / "language"
    cells = pd.read_csv(folder / "language.csv", dtype={"size": str}).set_index("form")
    dense = cells[cells["size"] == "own"].loc["lora"]
    cells = cells[cells["size"] == size].sort_values("test")
    plain = dense if size == "own" else cells.loc["low_rank"]
    from_dense = pd.read_csv(folder / "from_dense.csv").set_index("form")
    lines = []
    for form, row in cells.iterrows():
        line = {"form": form, "loss": f"{math.log(row['test']):.3f}", "seeds": f"{row['seeds']:.0f}"}
        line |= {"kept": f"{row['saved_bytes'] / 1e6:.0f}", "seconds": f"{row['step_seconds']:.2f}"}
        line |= {"less": "–", "after": "–", "from_dense": "–", "rate": f"{row['learning_rate']:.2g}"}
        if row["paired"]:
            verdict = "**worse**" if row["difference"] > 0 else "**better**"
            line["less"] = _nats(row["difference"], row["difference_half"], plain["test"])
            line["after"] = verdict if row["holds"] else "not significant"
        if f"{form} at {size}" in from_dense.index:
            apart = from_dense.loc[f"{form} at {size}"]
            line["from_dense"] = _nats(apart["difference"], apart["difference_half"], dense["test"])
        lines.append(line | {task: forgotten(form, size, task) for task in ("piqa", "arc_easy")})
    return lines


def response(form: str, size: str = "0.13") -> dict[str, str]:
    """Return what one method of a size made of a language model."""
    return next(line for line in responses(size) if line["form"] == form)


def _nats(difference: float, half: float, perplexity: float) -> str:
    """Return a difference of perplexities in nats, to first order."""
    mean, half = difference / perplexity, half / perplexity
    return written([mean, mean - half, mean + half], digits=3)


def forgotten(form: str, size: str, name: str) -> str:
    """Return what a form has changed on another set, a mean over seeds: loss in nats, or points of accuracy."""
    scores = pd.read_csv(RESULTS / "language" / "forgetting.csv", dtype={"size": str})
    scores = scores[scores["set"] == name]
    (before,) = scores.loc[scores["form"] == "frozen", "value"]
    changes = scores.loc[(scores["form"] == form) & (scores["size"] == size), "value"] - before
    if changes.empty:
        return "–"
    half = half_interval(changes.std(), len(changes))
    times, digits = (1, 3) if name == "piqa" else (100, 1)
    return written([times * end for end in (changes.mean(), changes.mean() - half, changes.mean() + half)], digits)


def pages() -> dict[Path, str]:
    """Return all pages as the tables make them, by path."""
    loader = FileSystemLoader(RESULTS / "templates")
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.globals |= {"claim": claim, "less": less, "score": score, "with_digits": with_digits}
    environment.globals |= {"kept": kept, "noisy": noisy}
    environment.globals |= {"cell": cell, "loss": loss, "apart": apart, "responses": responses, "response": response}
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
