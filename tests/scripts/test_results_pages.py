"""The numbers that pages for people have of the evidence are those of the tables."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pages
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checkout import RESULTS, ROOT, needs_results
from refusals import refusal

pytestmark = needs_results


@pytest.fixture(autouse=True)
def committed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of the committed results."""
    monkeypatch.setattr(pages, "RESULTS", RESULTS)


def test_a_number_is_of_one_row_of_its_table() -> None:
    assert float(pages.score("gtsrb", "dense")) == pytest.approx(74.6, abs=0.1)
    assert float(pages.score("trec", "partial")) == pytest.approx(90.7, abs=0.1)  # at 13 %; at threshold 0.9 it is 91.1
    for where in ({"method": "no_method"}, {"method": "partial", "part": "score"}):  # partial: at two operating points
        with refusal("tables/decided"):
            pages._one("tables/decided", task="trec", **where)


def test_pages_are_those_that_the_tables_make() -> None:
    made = pages.pages()
    assert {path.name for path in made} >= {"README.md", "operating-points.md", "dense-lora.md", "equal-size.md"}
    assert [path for path, text in made.items() if path.read_text("utf-8") != text] == [], "make pages"
    assert all(
        f"<!-- {name} -->\n" in made[path] and f"<!-- end of {name} -->" in made[path]
        for path, names in pages.BLOCKS.items()
        for name in names
    )


def test_a_difference_of_two_forms_is_of_their_runs_at_the_best_rates() -> None:
    for task, form in (("gtsrb", "lori"), ("signdigits", "lora on attn.qkv"), ("trec", "rows")):
        size = "own" if " on " in form else "0.13"
        assert pages.apart(task, form, "lora") == pages.cell(task, form, size)["less"]


_FOLDER = re.compile(r"(?<![\w./:<-])(?:/|[A-Za-z]:\\\\)[\w.-]+[/\\][\w./-]*")  # "/work/data", and no share such as 1/2


def _texts(file: Path) -> Iterator[str]:
    """The texts of a table: of every column that has any."""
    if file.suffix != ".parquet":
        yield file.read_text("utf-8")
        return
    table = pq.read_table(file)
    for column in table.columns:
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            yield from column.cast(kind).unique().drop_null().to_pylist()


def test_no_committed_table_says_where_its_runs_were_made() -> None:
    listed = ["git", "-C", str(ROOT), "ls-files", "results/**/*.parquet", "results/**/*.csv", "results/**/*.json"]
    tracked = [ROOT / name for name in subprocess.check_output(listed, text=True).split()]
    assert _FOLDER.search('{"data_dir":"/work/data/trec"}')
    assert not _FOLDER.search("trec/train.parquet, 1/2, https://a.b/c/d, </svg/>")
    assert {path.suffix for path in tracked} == {".parquet", ".csv", ".json"}
    assert [
        (str(path.relative_to(ROOT)), found[0])
        for path in tracked
        for text in _texts(path)
        if (found := _FOLDER.search(text))
    ] == []


@pytest.mark.parametrize("table", ["runs.parquet", "predictions.parquet"])
def test_every_column_of_a_committed_pack_is_described(table: str) -> None:
    _, _, described = (ROOT / "docs" / "reference" / "packs.md").read_text("utf-8").partition(f"## {table}\n")
    columns = {name for pack in RESULTS.glob(f"*/{table}") for name in pq.read_schema(pack).names}
    assert columns
    assert [name for name in sorted(columns) if f"`{name}`" not in described.partition("\n## ")[0]] == []
