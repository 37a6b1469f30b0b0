"""The numbers that pages for people have of the evidence are those of the tables."""

from __future__ import annotations

import re
from functools import cache

import pages
import pandas as pd
import pyarrow.parquet as pq
import pytest
from checkout import needs_results
from refusals import refusal

from partial_lora.report import race, records
from partial_lora.settings import schema

ROOT = schema.conf_dir().parent
pytestmark = needs_results


@pytest.mark.parametrize("page", pages.PAGES)
def test_every_number_on_a_page_is_that_of_its_source(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    assert pages.filled(text) == text
    assert len(re.findall(pages.NUMBER, text)) == len(pages.SOURCED.findall(text)) > 0


def test_a_source_without_a_number_gets_one_and_a_wrong_number_goes() -> None:
    source = "<!-- race: gtsrb, budget 0.13: low_rank -->"
    number = pages.filled(source).removesuffix(source)
    assert re.fullmatch(pages.NUMBER, number)
    short = pages.filled(f"1.0 ± 2.0{source}").removesuffix(source)  # as many digits as there were
    mean, deviation = (float(each) for each in number.split(" ± "))
    assert short == f"{mean:.1f} ± {deviation:.1f}"
    with refusal("race"):
        pages.found("race: gtsrb, budget 0.13: no_method")


def test_what_is_bold_in_the_readme_s_table_holds_among_all() -> None:
    numbers = pd.read_csv(ROOT / "results" / "race" / "race.csv")
    holds = {f"{100 * row.difference:+.2f}".replace("-", "−") for row in numbers.itertuples() if row.holds}
    table = [line for line in (ROOT / "README.md").read_text("utf-8").splitlines() if line.startswith("| ")]
    cells = re.findall(rf"(\*\*)?({pages.SIGNED}) \[", "\n".join(table))
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
    (row,) = (
        each for each in pages.rows("race/from_dense") if each[0] == "partial at 0.13 − lora" and "gtsrb" in each[1]
    )
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
