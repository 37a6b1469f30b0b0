"""The numbers that pages for people have of the evidence are those of one row of one table each."""

from __future__ import annotations

import re
from functools import cache
from itertools import product
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from checkout import needs_results

from partial_lora.report import evidence
from partial_lora.settings import schema

ROOT = schema.conf_dir().parent
SIGNED = r"([+−]\d+\.\d+)"
NUMBER = re.compile(rf"{SIGNED} \[{SIGNED}, {SIGNED}\]|(\d+\.\d+) ± (\d+\.\d+)")  # a difference, or a score
WHERE = ["task", "model", "mixture", "operating_point"]

# For each page where its numbers are from, in their order: a table, what its row is of, and the method whose score or
# the two methods whose difference it has; a|b: of both in turn. Measure svd where no other is named.
SOURCES = {
    "docs/concepts/operating-points.md": """
forms/from_dense: gtsrb|trec|digits: partial at 0.6 − lora
forms/from_dense: gtsrb|trec|digits: partial at 0.13 − lora
forms/from_dense: gtsrb|trec|digits: partial at 0.05 − lora
forms/from_dense: gtsrb|trec|digits: partial at 0.02 − lora
""",
    "results/claims.md": """
cpu/tables/table1: all sets|digits|gtsrb, budget 0.13: partial − lora
cpu/tables/table1: all sets, threshold 0.9: partial − lora
cpu/tables/table2: all sets, budget 0.13: partial − targeted
cpu/tables/table2: signdigits, budget 0.13: targeted
digits_rate/tables/table1: all sets, budget 0.13: partial − targeted
cpu/tables/table2: digits, budget 0.13, mean over svd, snip and imp: partial − targeted
cpu/tables/table2: all sets, threshold 0.9: partial − targeted
digits_rate/tables/table1: all sets, threshold 0.9: partial − targeted
same_rate/report/comparison: digits|cifar10|signdigits, threshold 0.9: partial − targeted
cpu/tables/table3: sst2|trec, budget 0.13: partial − targeted
cpu/tables/table3: sst2|trec, threshold 0.9: partial − targeted
cpu/tables/table3: sst2|trec, budget 0.13: partial − lora
cpu/tables/table3: sst2: lora
sst2_rate/report/comparison: sst2, budget 0.13: partial − lora
sst2_rate/report/comparison: sst2, threshold 0.9: partial − lora
cpu/tables/table3: trec, threshold 0.9: partial − lora
cpu/tables/table3: arc_easy|piqa, budget 0.13: partial − lora
cpu/tables/table4: digits, budget 0.13: partial − uniform
cpu/report/comparison: digits, threshold 0.9: partial − uniform
cpu/report/comparison: digits, threshold 0.8: partial − uniform
cpu/report/comparison: digits, threshold 0.7: partial − uniform
cpu/report/comparison: digits, threshold 0.5: partial − uniform
cpu/tables/table4: digits, budget 0.13: partial − shuffled; partial − inverted; partial − targeted;\
 partial − partial (element); partial − flow; partial − low_rank; partial − random_weights; partial − vera
cpu/report/comparison: digits, budget 0.05: partial − low_rank
cpu/report/comparison: digits, budget 0.02: partial − low_rank
cpu/report/comparison: digits, budget 0.01: partial − low_rank
cpu/tables/table6: digits+signdigits, average, budget 0.13: partial − lora
cpu/tables/table6: digits+signdigits, average, threshold 0.9: partial − lora
cpu/tables/table6: digits+signdigits, average: lora − lora, alone
longer/report/comparison: digits, budget 0.13: lora; lora − partial; partial; uniform; uniform − partial
""",
}

pytestmark = needs_results


@cache
def rows(table: str) -> list[tuple[str, set, set, list[float]]]:
    """What a row has, the score of a method or the difference of two; what it is of; its measure of importance where
    that is not svd; and its numbers in points, a score with its deviation or a difference with its interval."""
    made = []
    for row in pd.read_csv(ROOT / "results" / f"{table}.csv", comment="#").to_dict("records"):
        if "form" in row:
            mean, half = 100 * row["difference"], 100 * row["difference_half"]
            if table.endswith("from_dense"):
                made.append((f"{row['form']} − lora", {row["task"]}, set(), [mean, mean - half, mean + half]))
                continue
            where = {row["task"], f"budget {row['size']}"}
            made.append((row["form"], where, set(), [100 * row["test"], 100 * row["half"]]))
            made.append((f"{row['form']} − low_rank", where, set(), [mean, mean - half, mean + half]))
            continue
        where, measure = {row.get(name) for name in WHERE}, {row.get("importance", "svd")} - {"svd", "–"}
        measure = {each for each in measure if isinstance(each, str)}  # a table may leave it empty
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


@pytest.mark.parametrize("page", SOURCES)
def test_every_number_on_a_page_is_that_of_its_row(page: str) -> None:
    sources = []
    for line in SOURCES[page].strip().splitlines():
        table, where, methods = line.split(": ")
        tasks, *words = re.split(r", (?!snip)", where)
        each = product(re.split("; ?", methods), tasks.split("|"))
        sources += [(table, {task, *words}, method) for method, task in each]
    shown = [[each for each in match if each] for match in NUMBER.findall((ROOT / page).read_text("utf-8"))]
    assert len(shown) == len(sources)
    for numbers, (table, where, method) in zip(shown, sources, strict=True):
        own = [
            values
            for what, words, measure, values in rows(table)
            if what == method and measure <= where <= words | measure
        ]
        assert len(own) == 1, (table, where, method, own)
        half_a_digit = 0.51 * 10.0 ** -len(numbers[0].partition(".")[2])
        assert own[0] == pytest.approx([float(each.replace("−", "-")) for each in numbers], abs=half_a_digit), (
            table,
            where,
            method,
        )


def test_pages_are_those_that_their_templates_make() -> None:
    made = evidence.pages(ROOT)
    assert {path.name for path in made} >= {"README.md", "dense-lora.md", "equal-size.md"}
    assert [path for path, text in made.items() if path.read_text("utf-8") != text] == [], "make pages"


@pytest.mark.parametrize("task", ["gtsrb", "trec", "digits"])
def test_rows_and_columns_are_best_at_dense_lora_s_rate(task: str) -> None:
    """The table of what to take says so to those who are short of time to tune."""
    rates = evidence.raced(ROOT / "results").set_index(["task", "form", "size"])["learning_rate"]
    assert rates[task, "partial", "0.13"] == rates[task, "lora", "own"]


def test_every_figure_has_a_name_beside_every_mark_that_it_explains(tmp_path: Path) -> None:
    for study in ("race", "forms", "decided"):
        (tmp_path / study).symlink_to(ROOT / "results" / study)
    evidence.figures(tmp_path)
    drawn = {path.name: path.read_text("utf-8") for path in (tmp_path / "figures").iterdir()}
    assert drawn.keys() == {f"{name}{theme}.svg" for name in ("memory", "size", "claims") for theme in ("", "-dark")}
    for name, _, _, _ in evidence.LOOKS.values():
        assert name in drawn["memory.svg"]
    verdicts = [drawn["claims.svg"].count(f">{word}<") for word in ("holds", "refuted", "open")]
    assert verdicts == [3, 3, 18]


@pytest.mark.parametrize("table", ["runs.parquet", "predictions.parquet"])
def test_every_column_of_a_committed_pack_is_described(table: str) -> None:
    _, _, described = (ROOT / "docs" / "reference" / "packs.md").read_text("utf-8").partition(f"## {table}\n")
    columns = {name for pack in (ROOT / "results").glob(f"*/{table}") for name in pq.read_schema(pack).names}
    assert columns
    assert [name for name in sorted(columns) if f"`{name}`" not in described.partition("\n## ")[0]] == []
