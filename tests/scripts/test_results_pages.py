"""The numbers that pages for people have of the evidence are those of one row of one table each."""

from __future__ import annotations

import re
from functools import cache
from itertools import product

import pandas as pd
import pyarrow.parquet as pq
import pytest
from checkout import needs_results

from partial_lora.report import race, records
from partial_lora.settings import schema

ROOT = schema.conf_dir().parent
SIGNED = r"([+−]\d+\.\d+)"
NUMBER = re.compile(rf"{SIGNED} \[{SIGNED}, {SIGNED}\]|(\d+\.\d+) ± (\d+\.\d+)")  # a difference, or a score
WHERE = ["task", "model", "mixture", "operating_point"]

# For each page where its numbers are from, in their order: a table, what its row is of, and the method whose score or
# the two methods whose difference it has; a|b: of both in turn. Measure svd where no other is named.
SOURCES = {
    "README.md": """
race/race: gtsrb|trec, budget 0.13: low_rank
race/race: gtsrb|trec, budget 0.02: low_rank
race/race: gtsrb|trec, budget 0.13: partial − low_rank
race/race: gtsrb|trec, budget 0.02: partial − low_rank
race/race: gtsrb|trec, budget 0.13: entries − low_rank
race/race: gtsrb|trec, budget 0.02: entries − low_rank
race/race: gtsrb|trec, budget 0.13: random_weights − low_rank
race/race: gtsrb|trec, budget 0.02: random_weights − low_rank
race/race: gtsrb|trec, budget 0.13: oft − low_rank
race/race: gtsrb|trec, budget 0.02: oft − low_rank
race/race: gtsrb|trec, budget own: lora − low_rank
decided/tables/decided: digits|sst2|trec|gtsrb, budget 0.13: partial − lora
decided/tables/decided: gtsrb, budget 0.13: uniform − lora
decided/tables/decided: all sets, budget 0.13: partial − targeted; partial − uniform
decided/tables/decided: gtsrb, budget 0.13: entries − uniform; entries − low_rank
""",
    "results/README.md": """
decided/tables/decided: gtsrb, budget 0.13: partial − lora
decided/tables/decided: all sets, budget 0.13: partial − targeted; partial − uniform
decided/tables/decided: gtsrb, budget 0.13: entries − uniform
decided/tables/decided: digits|trec|sst2|gtsrb|all sets, budget 0.13: partial − lora
decided/tables/decided: digits|trec|sst2|gtsrb|all sets, budget 0.13: partial − low_rank
decided/tables/decided: digits|trec|sst2|gtsrb|all sets, budget 0.13: partial − targeted
decided/tables/decided: digits|trec|sst2|gtsrb|all sets, budget 0.13: partial − random_weights
decided/tables/decided: digits|trec|sst2|gtsrb|all sets, budget 0.13: partial − uniform
decided/tables/decided: trec|gtsrb|all sets, budget 0.13: partial − entries
decided/tables/decided: digits|trec|all sets, budget 0.13: partial, by gradient − partial
decided/tables/decided: digits|trec|sst2|gtsrb|all sets, budget 0.13: uniform − lora
decided/tables/decided: digits|trec|sst2|gtsrb|all sets, budget 0.13: low_rank − lora
decided/tables/decided: digits|trec|sst2|gtsrb|all sets, budget 0.13: random_weights − lora
decided/tables/decided: trec|gtsrb|all sets, budget 0.13: entries − lora
decided/tables/decided: gtsrb, budget 0.13: uniform − lora; targeted − lora; entries − lora; random_weights − lora
decided/tables/decided: trec, threshold 0.9: partial − targeted
decided/tables/decided: trec, budget 0.13: partial − uniform, partial's rate
decided/tables/decided: trec, threshold 0.9: partial − uniform
decided/tables/decided: trec, budget 0.13: partial, caps at 0.99 − partial
decided/tables/decided: trec, budget 0.13: partial − shuffled; partial − partial, shrink 0.5;\
 partial − partial, shrink 2
decided/tables/decided: trec, threshold 0.9: partial, by gradient − partial
decided/tables/decided: gtsrb, budget 0.13: entries − uniform; entries − low_rank
decided/tables/decided: trec, budget 0.13: entries − low_rank; entries − lora;\
 partial mask=element, PEFT's draw − entries; oft − lora; oft − low_rank; partial − partial, PEFT's draw
decided/tables/decided: trec, threshold 0.9: partial − lora
race/race: gtsrb, budget 0.13: hira − low_rank; random_weights − low_rank
decided/tables/decided: gtsrb, budget 0.13: random_weights − low_rank
race/race: trec, budget 0.13: entries − low_rank; dora − low_rank; fourierft − low_rank
forms/forms: trec, budget 0.13: ticket − low_rank
race/race: digits, budget 0.13: low_rank
race/race: gtsrb, budget own: lora − low_rank
race/race: gtsrb, budget 0.02: oft − low_rank; entries − low_rank; unilora − low_rank; random_weights − low_rank
forms/forms: trec, budget 0.02: entries − low_rank
race/race: digits, budget 0.02: low_rank
race/from_dense: gtsrb: entries at 0.02 − lora; entries at 0.13 − lora; low_rank at 0.13 − lora
race/race: gtsrb, budget 0.02: partial − low_rank
forms/forms: trec, budget 0.02: partial; partial rank=auto; partial mask=units; low_rank
forms/forms: gtsrb, budget 0.02: partial rank=auto − low_rank; partial mask=units − low_rank
forms/forms: signdigits, budget 0.02: partial − low_rank; entries − low_rank
forms/forms: trec, budget own: lora on query, value − low_rank
forms/forms: gtsrb, budget own: lora on attn.qkv − low_rank
forms/forms: gtsrb, budget 0.13: partial − low_rank
""",
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


def test_what_is_bold_in_the_readme_s_table_holds_among_all() -> None:
    numbers = pd.read_csv(ROOT / "results" / "race" / "race.csv")
    holds = {f"{100 * row.difference:+.2f}".replace("-", "−") for row in numbers.itertuples() if row.holds}
    table = [line for line in (ROOT / "README.md").read_text("utf-8").splitlines() if line.startswith("| ")]
    cells = re.findall(rf"(\*\*)?{SIGNED} \[", "\n".join(table))
    assert len(cells) == 18
    assert {number for bold, number in cells if bold} == {number for _, number in cells} & holds


@cache
def on_gtsrb() -> pd.Series:
    """Test scores on gtsrb in the race, in points, by form, size and seed, each form at its best rate."""
    runs, _ = records.read(ROOT / "results" / "race")
    chosen = race.at_best_rates(race.rows_of(runs))
    return 100 * chosen[chosen["task"] == "gtsrb"].set_index(["form", "size", "seed"])["test"].sort_index()


def test_the_readme_has_the_distance_on_gtsrb_over_the_seeds_that_both_have() -> None:
    distance = (on_gtsrb()["lora", "own"] - on_gtsrb()["partial", "0.13"]).mean()
    shown = " ".join((ROOT / "README.md").read_text("utf-8").split())
    assert f"{distance:.0f} and 13 points below it on gtsrb (200 and 600 steps)" in shown
    (row,) = (each for each in rows("race/from_dense") if each[0] == "partial at 0.13 − lora" and "gtsrb" in each[1])
    assert row[-1][0] == pytest.approx(-distance, abs=1e-3)


def test_what_entries_of_2_percent_cost_on_gtsrb_and_what_cannot_be_told_from_them() -> None:
    scores, shown = on_gtsrb(), " ".join((ROOT / "README.md").read_text("utf-8").split())
    entries = scores["entries", "0.02"]
    behind = [round((scores[other] - entries).mean()) for other in (("lora", "own"), ("low_rank", "0.13"))]
    assert "they are {} points below dense LoRA, and {} below plain LoRA of 13 %".format(*behind) in shown
    for form in ("oft", "unilora"):
        difference = scores[form, "0.02"] - entries
        assert abs(difference.mean()) < records.half_interval(difference.std(), len(difference))


@pytest.mark.parametrize("table", ["runs.parquet", "predictions.parquet"])
def test_every_column_of_a_committed_pack_is_described(table: str) -> None:
    _, _, described = (ROOT / "docs" / "reference" / "packs.md").read_text("utf-8").partition(f"## {table}\n")
    columns = {name for pack in (ROOT / "results").glob(f"*/{table}") for name in pq.read_schema(pack).names}
    assert columns
    assert [name for name in sorted(columns) if f"`{name}`" not in described.partition("\n## ")[0]] == []
