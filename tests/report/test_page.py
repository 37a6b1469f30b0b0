"""The page of a report: one file that needs nothing else, and works in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import datasets
import finished_runs
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from recorded_runs import leave, place, record
from refusals import refusal

from partial_lora import cli
from partial_lora.launching.directory import EXAMPLE, PICTURE, is_drawn
from partial_lora.report import page
from partial_lora.report.summary import measured
from partial_lora.settings.versions import plain

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_VOID = {"meta", "link", "img", "br", "input", "hr"}


class Elements(HTMLParser):
    """Every element of a page; fails where they do not close in the order in which they opened."""

    def __init__(self, text):
        super().__init__()
        self.every, self.stack = [], []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        self.every.append((tag, dict(attributes)))
        if tag not in _VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.every.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def all(self, tag):
        return [attributes for name, attributes in self.every if name == tag]


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A report over runs of several methods, one of them with a model's name that must not become markup."""
    folder = tmp_path_factory.mktemp("results")
    history = [{"step": step, "loss": 1 / step, "eval_accuracy": 0.5 + step / 100} for step in (10, 20, 30)]
    warned = {"warnings": ["blocks.0.attention.self.query." * 3 + "dense keeps nothing"]}
    for seed in (0, 1, 2):
        place(folder, record(test=0.9 + seed / 100, seed=seed, history=history, calibration=warned))
    place(folder, record("lora", 0.3, history=history))
    place(folder, record("uniform", 1.0, budget=0.13))
    place(folder, record("probe", 0.08, model="<b>&amp;"))
    place(folder, record("probe", seed=5, status="failed", error="<script>alert(1)</script>"))
    assert cli.report([str(folder)]) == 0
    return folder / "report" / "index.html"


@pytest.fixture(scope="module")
def text(reported):
    return reported.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def elements(text):
    return Elements(text)


def test_the_same_records_give_the_same_bytes(reported):
    def content():
        return {file: file.read_bytes() for file in reported.parent.rglob("*") if file.is_file()}

    before = content()
    assert cli.report([str(reported.parents[1])]) == 0
    assert content() == before


def test_nothing_is_fetched(text, elements):
    for tag, attributes in elements.every:
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, name, value)
    assert not re.search(r"url\((?!#)|@import|fetch\(|XMLHttpRequest|import\(", text.replace("base64", ""))


def test_words_of_records_are_no_markup(text):
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "&lt;b&gt;&amp;amp;" in text


def test_a_page_opens_with_the_best_of_each_method_and_a_link_leads_to_its_runs(text, elements):
    names = [re.search(rf'<h2 id="of-tab-{number}">(.*?)</h2>', text)[1] for number in range(3)]
    assert names == ["All tasks", "digits · &lt;b&gt;&amp;amp;", "digits · vit"]
    assert [each["href"] for each in elements.all("a") if each["href"].startswith("#tab")][:3] == [
        "#tab-0", "#tab-1", "#tab-2"
    ]  # fmt: skip
    first = text[text.index('id="tab-2"') :].split("</table>")[0]
    run = re.search(r'<td class="words"><a href="#(run-\d)">partial</a><small>threshold 0.9</small></td>', first)[1]
    assert f'<details id="{run}">' in text
    assert "88.52 to 93.48" in first  # of three seeds, by Student's t


def test_figures_of_the_page_are_those_of_the_files(reported, text):
    files = sorted((reported.parent / "figures").glob("*.svg"))
    assert [file.stem for file in files] == ["methods-1", "methods-2", "pareto-1", "pareto-2", "sparsity", "training"]
    assert all(text.count(file.read_text(encoding="utf-8")) == 1 for file in files)


def test_a_line_of_the_overview_leads_to_the_metric_that_it_is_of(tmp_path):
    place(tmp_path, record("dora", trainer__epochs=9))  # the first row of accuracy, and none of the usual ones
    place(tmp_path, record("lora", metrics={split: {"primary": "f1", "f1": 0.5} for split in ("validation", "test")}))
    place(tmp_path, record("partial"))
    place(tmp_path, record("probe"))
    assert cli.report([str(tmp_path)]) == 0
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    best = dict(re.findall(r'<a href="#tab-\d">digits, vit, (\w+)</a> (\w+)', page))
    assert best["f1"] == "lora"
    assert best["accuracy"] != "lora"


def test_every_folder_has_a_section_with_all_there_is_to_say(text, elements):
    sections = [each["id"] for each in elements.all("details") if each.get("id", "").startswith("run-")]
    assert sorted(sections) == [f"run-{number}" for number in range(1, 5)]
    for part in ("91.00 ± 1.00 %", "70.00 % of the dense adapter", "calibration.budget"):
        assert part in text


def test_what_scrolls_is_named_and_can_be_reached(elements):
    scrolling = [each for each in elements.all("div") if each.get("class") in ("wide", "paper")]
    assert scrolling
    assert all(each["tabindex"] == "0" and each["aria-label"] for each in scrolling)
    assert all(each.get("alt") for each in elements.all("img"))
    assert all(each["type"] == "button" for each in elements.all("button"))


def test_a_run_leaves_a_page_with_its_score_its_classes_and_its_own_test_images():
    run = finished_runs.image_run()

    def pictures():
        text = (run.directory / page.PAGE).read_text(encoding="utf-8")
        images = [each for each in Elements(text).all("img") if each["src"].startswith("data:image/webp")]
        return len(images), text

    page.draw_run(run.directory, plain(run.config))
    assert is_drawn(run.directory, "train")
    count, text = pictures()
    assert count == page.EXAMPLES
    assert "Calibration curves" in text
    assert "every level of every module passes" in text  # what its calibration warns of
    score = measured("accuracy", run.result["metrics"]["test"]["accuracy"])
    assert text.index(score) < text.index("partial-lora predict ") < text.index("Each class")
    matrix = text[text.index('class="map confusion"') :].split("</table>")[0]
    frame = pd.read_parquet(run.directory / "predictions.parquet")
    assert sum(map(int, re.findall(r">(\d+)</td>", matrix))) == len(frame)
    (first, *_) = datasets.load_dataset("parquet", data_files=finished_runs.picture_files(), split="test")["image"]
    with Image.open(run.directory / EXAMPLE) as example:
        assert example.tobytes() == first.convert("RGB").tobytes()
    (run.directory / page.PAGE).unlink()
    assert cli.report([str(run.directory), "--examples", "2"]) == 0
    assert pictures()[0] == 2


def test_a_run_without_a_calibration_leaves_a_page_and_a_page_that_cannot_be_made_ends_no_run(tmp_path, caplog):
    result = record("lora", history=[{"step": 10, "loss": 1.0}])
    directory = place(tmp_path, result)
    page.draw_run(directory, result["config"])
    assert is_drawn(directory, "train")
    assert not (directory / PICTURE).exists()  # its rows are not at hand
    assert "Calibration curves" not in (directory / page.PAGE).read_text(encoding="utf-8")
    assert not caplog.text
    (tmp_path / "result.json").write_text('{"seed": 0}')
    page.draw_run(tmp_path, {})
    assert str(tmp_path) in caplog.text
    assert not (tmp_path / page.PAGE).exists()


# The command


@pytest.mark.usefixtures("no_figures")
def test_the_command_filters_groups_and_names_what_it_left_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for seed, accuracy in enumerate((0.98, 0.985, 0.9925)):
        place(tmp_path, record(test=accuracy, seed=seed))
    place(tmp_path, record("lora", task="cifar10"))
    place(tmp_path, record(budget=0.13))
    for seed in (8, 9):
        place(tmp_path, record(seed=seed, status="failed", error="no space left"))
    arguments = [str(tmp_path), "--where", "task=digits", "--by", "calibration.budget"]
    assert cli.report(arguments) == 0
    text = (tmp_path / "report" / "table.md").read_text(encoding="utf-8")
    assert text.splitlines()[0].endswith("--where task=digits --by calibration.budget")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert rows[0][:3] == ["calibration.budget", "n", "test accuracy (%)"]
    assert [row[:2] for row in rows[2:]] == [["0.13", "1"], ["–", "3"]]
    assert rows[3][2].startswith("98.58 ± 0.6")
    printed = capsys.readouterr()
    assert all(len(line) <= 80 for line in printed.out.splitlines() if not line.startswith("wrote"))
    (line,) = printed.err.splitlines()
    assert "2 failed" in line
    assert "seed8/result.json: failed: no space left" in line
    broken = place(tmp_path, record(seed=10)) / "result.json"
    broken.write_text("{")
    assert cli.report([str(tmp_path)]) == 1
    assert "seed10/result.json" in capsys.readouterr().err


@pytest.mark.usefixtures("no_figures")
def test_predictions_of_other_columns_end_nothing(tmp_path):
    broken = leave(tmp_path, "lora", wrong=20)
    columns = {"label": [0], "prediction": [0], "label_name": ["a"], "logits": [1.0]}
    pq.write_table(pa.table(columns), broken / "predictions.parquet")
    assert cli.report([str(tmp_path)]) == 0
    text = (tmp_path / "report" / page.PAGE).read_text(encoding="utf-8")
    assert "hardest examples cannot be told from predictions.parquet" in text


def test_a_folder_where_nothing_finished_is_refused_and_nothing_written(tmp_path, capsys):
    place(tmp_path, record(status="running"))
    with refusal(str(tmp_path)):
        cli.report([str(tmp_path)])
    assert "seed0/result.json: running" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_a_report_needs_no_torch():
    task = "{'task': {'name': 'digits', 'path': 'bundled:digits'}}"
    code = "import sys, partial_lora.cli; from partial_lora.report import examples;"
    code += f"rows = examples.rows_of({task}); sys.exit('torch' in sys.modules or len(rows) != 360)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# A real browser

SORTS = """<script>
addEventListener("load", () => {
const shown = () => [...document.querySelectorAll(".tab")].filter((tab) => tab.offsetParent).map((tab) => tab.id);
const tabs = [shown()];
location.hash = "#tab-2";
tabs.push(shown());
const table = document.querySelector("#tab-2 table.sortable"), heads = [...table.tHead.rows[0].cells];
const at = heads.findIndex((head) => head.textContent.startsWith("test"));
const column = () => [...table.tBodies[0].rows].map((row) => row.cells[at].textContent).join("|");
heads[at].querySelector("button").focus();
heads[at].querySelector("button").click();
const rising = column();
heads[at].querySelector("button").click();
const focused = document.activeElement === heads[at].querySelector("button");
const falling = column(), order = heads[at].getAttribute("aria-sort");
const last = heads.length - 1, days = ["2026-03-01 10:00", "2026-01-02 09:00", "2026-02-01 08:00"];
days.forEach((day, row) => { table.tBodies[0].rows[row].cells[last].textContent = day; });
heads[last].querySelector("button").click();
const dated = [...table.tBodies[0].rows].map((row) => row.cells[last].textContent).join("|");
const link = table.querySelector("a");
link.click();
document.querySelectorAll("details").forEach((each) => { each.open = true; });
const fits = document.documentElement.scrollWidth <= innerWidth;
parent.document.body.dataset.seen = [rising, falling, order, focused, fits, dated, tabs.join("|")].join(";");
});
</script>"""
FRAME = '<!doctype html><body style="margin:0"><iframe src="page.html" style="border:0;width:{}px;height:900px">'


@pytest.mark.parametrize("width", [360, 1280])
def test_in_a_browser_tables_sort_nothing_overflows_and_the_console_is_silent(text, tmp_path, width):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    (tmp_path / "page.html").write_text(text.replace("</body>", f"{SORTS}</body>"), encoding="utf-8")
    outer = tmp_path / "frame.html"  # Chromium's own window is never below 500 pixels
    outer.write_text(FRAME.format(width), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += ["--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--window-size={max(width, 500)},900", "--dump-dom", outer.as_uri()]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    rising, falling, order, focused, fits, dated, tabs = re.search(r'data-seen="([^"]*)"', done.stdout)[1].split(";")
    assert rising.split("|") == ["30.00", "91.00", "100.00"]
    assert falling.split("|") == rising.split("|")[::-1]
    assert (order, focused, fits) == ("descending", "true", "true")
    assert dated.split("|") == ["2026-01-02 09:00", "2026-02-01 08:00", "2026-03-01 10:00"]
    assert tabs.split("|") == ["tab-0", "tab-2"]  # one at a time: the first, and what the address names
