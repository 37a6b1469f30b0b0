"""Numbers of pages, out of the tables of results/.

    python scripts/pages.py      # or `make pages`

The pages of results/templates are whole templates. On a page of BLOCKS, what stands between two marks is made of one.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pandas as pd
from evidence import claim_of, differences_at_rates, plainly, raced
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from protocol import BUDGET, PARTIAL, THRESHOLD

from partial_lora import cli
from partial_lora.errors import PartialLoraError
from partial_lora.files import write_atomic
from partial_lora.report.pairs import Outcome, Pair, between
from partial_lora.report.predictions import Predictions
from partial_lora.report.ranking import CHANGE, at_best_rates, rows_of
from partial_lora.report.records import read
from partial_lora.report.rows import NONE
from partial_lora.report.statistics import Estimate, half_interval, over_sets

ROOT = Path(__file__).resolve().parents[1]
RESULTS, README = ROOT / "results", ROOT / "README.md"
DOCS = ROOT / "docs"
BLOCKS = {  # between <!-- NAME --> marks
    README: ("picture", "findings"),
    DOCS / "concepts" / "operating-points.md": ("shares",),
    DOCS / "evidence" / "tables.md": ("found",),
    DOCS / "evidence" / "field.md": ("field",),
}
SETS = ("digits", "sst2", "trec", "gtsrb")  # of the decided claims


def written(numbers: Iterable[float], digits: int = 2) -> str:
    """Return a difference and its interval as a page has them."""
    mean, low, high = (_signed(f"{each:+.{digits}f}") for each in numbers)
    return f"{mean} [{low}, {high}]"


def around(mean: float, half: float, digits: int = 2) -> str:
    """Return a difference and its interval, of which half the width is known, as a page has them."""
    return written((mean, mean - half, mean + half), digits)


def _signed(number: str) -> str:
    return number.replace("-", "−")


@cache
def _table(name: str) -> pd.DataFrame:
    names = dict.fromkeys(("importance", "mixture", "paper's"), str)
    return pd.read_csv(RESULTS / "decided" / f"{name}.csv", comment="#", dtype=names).fillna(dict.fromkeys(names, ""))


def _one(table: str, **where: str) -> pd.Series:
    """Return the one row of a table of results/decided that has these values."""
    rows = _table(table)
    for name, value in where.items():
        rows = rows[rows[name] == value]
    if len(rows) != 1:
        raise PartialLoraError(f"{table}: {len(rows)} rows of {where}, expected one")
    return rows.iloc[0]


# --- What templates ask for.


def score(task: str, method: str) -> str:
    """Return the test accuracy of dense LoRA, or of another method at 13 %, of the decided claims."""
    where = {"importance": "", "task": task, "method": method}
    point = NONE if method == "dense" else BUDGET
    return f"{100 * _one('tables/decided', part='score', operating_point=point, **where)['mean']:.1f}"


def _difference(task: str, first: str, second: str, point: str, importance: str = "") -> pd.Series:
    own = {"importance": importance, "part": "difference", "first": first, "second": second}
    return _one("tables/decided", task=task, operating_point=point, **own)


def less(task: str, first: str, second: str, point: str = BUDGET, importance: str = "", digits: int = 2) -> str:
    """Return a method less another, with its 95 % interval."""
    row = _difference(task, first, second, point, importance)
    return written(100 * row[["difference", "low", "high"]], digits)


def share(task: str, *, ends: bool = False) -> str:
    """Return what calibrated shares keep of dense LoRA's parameters at threshold 0.9: the mean over seeds, in per cent.

    ends: with the lowest and highest seed.
    """
    row = _one("tables/decided", part="score", importance="", task=task, method=PARTIAL, operating_point=THRESHOLD)
    mean, low, high = (f"{100 * row[name]:.0f}" for name in ("share", "share_min", "share_max"))
    return f"{mean} % ({low} to {high})" if ends else f"{mean} %"


def mixed(first: str, second: str, task: str = "average") -> str:
    """Return a method less another with one adapter for two tasks, or less its adapters for each, "METHOD, alone"."""
    row = _one("tables/table6", part="difference", task=task, first=first, second=second)
    return written(100 * row[["difference", "low", "high"]])


def claim(second: str) -> list[dict[str, str]]:
    """Return what is found of a claim about rows and columns and another method, by set."""
    verdicts = _table("tables/verdicts")
    rows = verdicts[verdicts["claim"] == claim_of(second)].set_index("where")
    lines = []
    for task in SETS:
        row = rows.loc[f"{task}, {BUDGET}"]
        papers, _, of_papers = row["paper's"].partition(", among ")
        after, _, among = row["verdict"].partition(", among ")
        found, seeds = row["found"].split(f" points, {task}, ")
        lines.append(
            {"task": task, "less": _signed(found), "seeds": seeds}
            | {"alone": plainly(row["alone"], second), "papers": plainly(papers, second), "papers_count": of_papers}
            | {"after": plainly(after, second), "count": among}
        )
    return lines


def kept(task: str, point: str) -> str:
    """Return what share of its score a frozen model keeps with all calibrated shares at once, in per cent."""
    row = _one("tables/table5", part="joint", task=task, operating_point=point, importance="svd")
    return "{:.0f} % [{:.0f}, {:.0f}]".format(*100 * row[["ratio", "low", "high"]])


def noisy(
    part: str,
    less: str = "targeted, equal shares",
    condition: str = "40% wrong labels",
    task: str = "trec",
    digits: int = 1,
) -> str:
    """Return equal shares less another form under a condition: their "difference", or its "change" (figure 7)."""
    row = _one("figures/fig7", part=part, condition=condition, less=less, task=task)
    return around(100 * row["mean"], 100 * row["half"], digits)


def with_digits(second: str, point: str = BUDGET) -> str:
    """Return rows and columns less another method as the mean over all sets of the decided claims, digits too."""
    sets = [_difference(task, PARTIAL, second, point) for task in SETS]
    mean = over_sets([Estimate(row["difference"], row["error"], row["freedom"]) for row in sets])
    return written(100 * number for number in (mean.difference, *mean.interval()))


@cache
def _on_all_rows() -> dict[tuple[str, str], dict[int, Outcome]]:
    """Return the test scores by seed of the runs on all rows, 1,200 steps each, by task and method."""
    stored, scores = Predictions(RESULTS / "decided"), {}
    for run in read(RESULTS / "decided")[0]:
        config = run.record["config"]
        if config["trainer"]["max_steps"] == 1200 and config["task"]["train_samples"] > 1000:
            cell = scores.setdefault((run.row["task"], run.row["method"]), {})
            cell[run.row["seed"]] = Outcome.of(run.row, stored)
    return scores


def on_all_rows(first: str, second: str, task: str = "gtsrb", digits: int = 1) -> str:
    """Return a method less another, in points, where both train on all rows of a set for 1,200 steps."""
    scores = _on_all_rows()
    apart = between(Pair(scores[task, first], scores[task, second], "accuracy"))
    return written((100 * apart.difference, 100 * apart.low, 100 * apart.high), digits)


def in_effect(task: str) -> str:
    """Return the lowest and highest threshold, over seeds, that a calibration to 13 % comes to."""
    thresholds = [
        run.record["calibration"]["threshold"]
        for run in read(RESULTS / "decided")[0]
        if (run.row["task"], run.row["method"], run.row["operating_point"]) == (task, PARTIAL, BUDGET)
        and not run.record["config"]["calibration"]["shrink"]
    ]
    return f"{min(thresholds):.2f} to {max(thresholds):.2f}"


def one_rate(task: str) -> list[str]:
    """Return rsLoRA less plain LoRA on a set at each choice of learning rates, as the picture has them."""
    return [written((found.difference, *found.interval()), 1) for found in differences_at_rates(RESULTS, task).values()]


CELL = ["task", "form", "size"]


@cache
def _raced() -> pd.DataFrame:
    return raced(RESULTS).set_index(CELL).sort_index()


@cache
def _cells(table: str) -> pd.DataFrame:
    return pd.read_csv(RESULTS / f"{table}.csv", dtype={"size": str}).set_index(CELL).sort_index()


@cache
def _chosen() -> pd.DataFrame:
    return at_best_rates(rows_of(read(RESULTS / "race")[0]))


def cell(task: str, form: str, size: str = "0.13") -> dict[str, str]:
    """Return what the race has of a form at a size: scores, distances, losses, seeds, bytes."""
    row = _raced().loc[(task, form, size)]
    test, half, mean, mean_half = (100 * row[name] for name in ("test", "half", "difference", "difference_half"))
    verdict = f"**{'better' if mean > 0 else 'worse'}**" if row["holds"] else "not significant"
    return {
        "lead": _signed(f"{row['lead']:+.1f}"),
        "lead_seeds": f"{row['lead_seeds']:.0f}",
        "from_dense": around(row["lead"], row["lead_half"]),
        "less": around(mean, mean_half) if row["paired"] else "–",
        "after": verdict if row["paired"] else "–",
        "loss": loss(task, form, size, "race/loss"),
        "test": f"{test:.1f} ± {half:.1f}",
        "share": f"{100 * row['share']:.1f}",
        "rate": re.sub("e-0", "e-", f"{row['learning_rate']:.1e}".replace(".0e", "e")),
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
    number = around(row["difference"], row["half"])
    return f"**{number}**" if row["holds"] else number


def apart(task: str, first: str, second: str) -> str:
    """Return a form less another at 13 % (`make race`), with its interval over the seeds of both."""
    runs = _chosen()
    runs = runs[(runs["task"] == task) & runs["size"].isin(("0.13", "own"))]  # on some modules it has a size of its own
    scores = 100 * runs.pivot(index="seed", columns="form", values="test")
    differences = (scores[first] - scores[second]).dropna()
    return around(differences.mean(), half_interval(differences.std(), len(differences)))


def responses(size: str) -> list[dict[str, str]]:
    """Return what methods of a size made of a language model, the lowest loss first (`make language`).

    Losses are of held-out responses, in nats; their differences are logarithms of the ratio of perplexities.
    """
    folder = RESULTS / "language"
    cells = pd.read_csv(folder / "language.csv", dtype={"size": str}).set_index("form")
    dense = cells[cells["size"] == "own"].loc["dense"]
    cells = cells[cells["size"] == size].sort_values("test")
    plain = dense if size == "own" else cells.loc["lora"]
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
        changes = [name for name in cells if CHANGE in name and not name.endswith("half")]
        lines.append(line | {name.partition(CHANGE)[0]: _change(row, name) for name in changes})
    return lines


def _change(row: pd.Series, name: str) -> str:
    """Return what training has changed on another set: a loss in nats, or a share in points."""
    times, digits = (1, 3) if name.endswith("loss") else (100, 1)
    return around(times * row[name], times * row[f"{name}, half"], digits)


def response(form: str, size: str = "0.13") -> dict[str, str]:
    """Return what one method of a size made of a language model."""
    return next(line for line in responses(size) if line["form"] == form)


def _nats(difference: float, half: float, perplexity: float) -> str:
    """Return a difference from a perplexity, with its interval, in nats."""
    return written((math.log1p((difference + side * half) / perplexity) for side in (0, -1, 1)), digits=3)


def pages() -> dict[Path, str]:
    """Return all pages as the tables make them, by path."""
    loader = FileSystemLoader(RESULTS / "templates")
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.globals |= {"claim": claim, "less": less, "score": score, "with_digits": with_digits}
    environment.globals |= {"on_all_rows": on_all_rows, "one_rate": one_rate, "in_effect": in_effect}
    environment.globals |= {"kept": kept, "share": share, "noisy": noisy, "mixed": mixed}
    environment.globals |= {"cell": cell, "loss": loss, "apart": apart, "responses": responses, "response": response}
    names = [name for name in environment.list_templates() if not name.startswith("_")]
    made = {RESULTS / name: environment.get_template(name).render(up="../" * name.count("/")) for name in names}
    for path, names in BLOCKS.items():
        made[path] = path.read_text("utf-8")
        for name in names:
            block = environment.get_template(f"_{name}.md").render()
            marks = rf"(?<=<!-- {name} -->\n).*?(?=<!-- end of {name} -->)"
            made[path] = re.sub(marks, lambda _, block=block: block, made[path], flags=re.DOTALL)
    return made


@cli.script
def main() -> None:
    for path, text in pages().items():
        if not path.is_file() or path.read_text("utf-8") != text:
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, text)
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
