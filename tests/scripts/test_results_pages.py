"""The numbers that pages for people have of the evidence are those of the tables."""

from __future__ import annotations

import re
from pathlib import Path

import evidence
import pages
import pyarrow.parquet as pq
import pytest
from checkout import needs_results
from refusals import refusal

from partial_lora.settings import schema

ROOT = schema.conf_dir().parent
pytestmark = needs_results


@pytest.mark.parametrize("page", pages.PAGES)
def test_every_number_on_a_page_has_a_source(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
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


def test_a_comment_that_is_no_source_is_named() -> None:
    with refusal("<!-- note: see below -->"):
        pages.found("note: see below")


def test_pages_are_those_that_the_tables_make() -> None:
    made = pages.pages()
    assert {path.name for path in made} >= {"README.md", "operating-points.md", "dense-lora.md", "equal-size.md"}
    assert [path for path, text in made.items() if path.read_text("utf-8") != text] == [], "make pages"


@pytest.mark.parametrize("task", ["gtsrb", "trec", "digits", "signdigits"])
def test_plain_lora_of_a_lower_rank_has_one_best_rate(task: str) -> None:
    """The table of what to take says so to those who are short of time to tune."""
    rates = evidence.raced(ROOT / "results").set_index(["task", "form", "size"])["learning_rate"]
    assert rates[task, "low_rank", "0.13"] == 4e-3


def test_a_difference_of_two_forms_is_of_their_runs_at_the_best_rates() -> None:
    for task, form in (("gtsrb", "lori"), ("signdigits", "lora on attn.qkv"), ("trec", "rows")):
        size = "own" if " on " in form else "0.13"
        assert pages.apart(task, form, "low_rank") == pages.cell(task, form, size)["less"]


def test_every_figure_has_a_name_beside_every_mark_that_it_explains(tmp_path: Path) -> None:
    for study in ("race", "forms", "decided"):
        (tmp_path / study).symlink_to(ROOT / "results" / study)
    evidence.figures(tmp_path)
    drawn = {path.name: path.read_text("utf-8") for path in (tmp_path / "figures").iterdir()}
    names = ("memory", "memory-more", "size", "claims")
    assert drawn.keys() == {f"{name}{theme}.svg" for name in names for theme in ("", "-dark")}
    for _, name, _ in evidence.NAMED.values():
        assert name in drawn["memory.svg"]
    words = {word for word, *_ in evidence.VERDICTS.values()}
    assert sum(drawn["claims.svg"].count(f">{word}<") for word in words) == 5 * len(evidence.CLAIMS)


@pytest.mark.parametrize("table", ["runs.parquet", "predictions.parquet"])
def test_every_column_of_a_committed_pack_is_described(table: str) -> None:
    _, _, described = (ROOT / "docs" / "reference" / "packs.md").read_text("utf-8").partition(f"## {table}\n")
    columns = {name for pack in (ROOT / "results").glob(f"*/{table}") for name in pq.read_schema(pack).names}
    assert columns
    assert [name for name in sorted(columns) if f"`{name}`" not in described.partition("\n## ")[0]] == []
