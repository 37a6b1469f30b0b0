"""What the pages for people say of the evidence is what its tables say."""

from __future__ import annotations

import re

import pytest

from partial_lora.runs import config

ROOT = config.conf_dir().parent
PAGES = ("README.md", "results/README.md")
TABLES = ("results/*/tables/*.md", "results/*/report/comparison.md")
INTERVAL = re.compile(r"([+−-]\d+\.\d+) \[([+−-]\d+\.\d+), ([+−-]\d+\.\d+)\]")

pytestmark = pytest.mark.skipif(not (ROOT / "results").is_dir(), reason="needs a checkout")


def intervals(text: str) -> set[tuple[float, ...]]:
    """Every difference with the ends of its interval that a text has."""
    return {tuple(float(number.replace("−", "-")) for number in found) for found in INTERVAL.findall(text)}


@pytest.mark.parametrize("page", PAGES)
def test_every_interval_on_a_page_is_one_of_a_table(page: str) -> None:
    there = {each for pattern in TABLES for file in ROOT.glob(pattern) for each in intervals(file.read_text("utf-8"))}
    there |= {(-difference, -high, -low) for difference, low, high in there}  # the other way round
    said = intervals((ROOT / page).read_text("utf-8"))
    assert said
    assert not said - there
