"""`partial-lora analyse`: what it leaves behind, what it refuses, and that it goes on where it was stopped."""

from __future__ import annotations

import dataclasses
import json
import logging
import re

import numpy as np
import pytest
from analysed import TINY, settings
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console

from partial_lora import analysis, analysis_figures, analysis_schema, analysis_tables, cli, examinations
from partial_lora.errors import PartialLoraError
from partial_lora.examinations import ANALYSES

FEW = {
    "agreement": ("analysis.measures=[svd,magnitude,activation]", "analysis.sparsities=[0.5]"),
    "reliability": ("analysis.splits=2",),
    "stability": ("analysis.shots=[2,4]", "analysis.noise=[0.0,0.2]", "analysis.seeds=[0,1]"),
    "cost": ("analysis.measures=[svd,activation]",),
}
FILES = {"analysis.json", "analysis.log", "table.md", "figure.png", "figure.svg"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("place")


@pytest.fixture(autouse=True)
def _own_cache(place, monkeypatch):
    monkeypatch.setenv("PARTIAL_LORA_CACHE", str(place / "cache"))


def asked(what: str, place, *more: str) -> dict:
    return settings(*FEW[what], f"results_dir={place / 'results'}", *more)


def quiet() -> Console:
    return Console(record=True, width=100, file=open("/dev/null", "w"))


@pytest.fixture(scope="module", params=list(FEW))
def done(request, place):
    """Each analysis, once: its settings, directory, record and what was on the terminal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PARTIAL_LORA_CACHE", str(place / "cache"))
        chosen, console = asked(request.param, place), quiet()
        assert analysis.analyse(request.param, chosen, f"partial-lora analyse {request.param}", console) == 0
        directory = analysis_schema.directory(chosen, request.param)
        found = json.loads((directory / "analysis.json").read_text())
        return request.param, chosen, directory, found, console.export_text()


def test_everything_promised_is_left_and_nothing_else(done) -> None:
    what, _, directory, found, _ = done
    assert {entry.name for entry in directory.iterdir()} - {".lock"} == FILES
    assert directory.parent.parent.parts[-2:] == ("analyses", what)
    assert re.fullmatch(r"tiny_vit-[0-9a-f]{8}", directory.name)
    assert (found["status"], found["what"]) == ("finished", what)
    assert imread(directory / "figure.png").shape[1] > 500
    assert (directory / "figure.svg").read_text(encoding="utf-8").rstrip().endswith("</svg>")


def test_the_summary_is_that_of_the_parts(done) -> None:
    what, chosen, _, found, _ = done
    assert list(found["parts"]) == list(ANALYSES[what].parts(chosen))
    assert found["summary"] == json.loads(json.dumps(ANALYSES[what].summary(chosen, found["parts"])))


def test_the_table_is_on_the_terminal_and_in_the_file(done) -> None:
    what, _, directory, found, shown = done
    written = (directory / "table.md").read_text(encoding="utf-8")
    assert written.startswith(f"    partial-lora analyse {what}\n")
    for sheet in analysis_tables.sheets(found):
        assert sheet.title in written
        for row in sheet.rows:
            cells = [cell for cell in row if cell]
            assert any(all(cell in line for cell in cells) for line in written.splitlines())
            assert any(all(cell in line for cell in cells) for line in shown.splitlines())  # none is cut at 100 columns


def test_a_finished_analysis_is_not_done_again_but_drawn(done, monkeypatch) -> None:
    what, chosen, directory, _, _ = done
    before = {name: (directory / name).read_bytes() for name in FILES}
    (directory / "table.md").unlink()
    (directory / "figure.png").unlink()
    monkeypatch.setattr(analysis, "Subject", None)  # whoever loads the model fails
    console = quiet()
    assert analysis.analyse(what, chosen, "another", console) == 0
    assert "not run again" in console.export_text()
    assert {name: (directory / name).read_bytes() for name in FILES} == before


def stopped_after(part_number: int, monkeypatch) -> None:
    """Stability, interrupted in the part after this one."""
    own, begun = examinations.stability_parts, []

    def parts(chosen):
        def counted(part):
            def work(subject):
                begun.append(part)
                if len(begun) > part_number:
                    raise KeyboardInterrupt
                return part(subject)

            return work

        return {name: counted(part) for name, part in own(chosen).items()}

    interrupted = dataclasses.replace(ANALYSES["stability"], parts=parts)
    monkeypatch.setitem(ANALYSES, "stability", interrupted)


def test_a_stopped_analysis_goes_on_with_the_next_part(tmp_path) -> None:
    chosen = asked("stability", tmp_path, "analysis.noise=[0.0]")
    path = analysis_schema.directory(chosen, "stability") / "analysis.json"
    with pytest.MonkeyPatch.context() as patch:
        stopped_after(2, patch)
        with pytest.raises(KeyboardInterrupt):
            analysis.analyse("stability", chosen, "first", quiet())
    kept = json.loads(path.read_text())
    assert (kept["status"], len(kept["parts"])) == ("running", 2)
    console = quiet()
    analysis.analyse("stability", chosen, "second", console)
    assert console.export_text().count("done before") == 2
    found = json.loads(path.read_text())
    assert (found["status"], len(found["parts"])) == ("finished", 4)
    assert {name: found["parts"][name] for name in kept["parts"]} == kept["parts"]


@pytest.mark.parametrize("change", ["overwrite=true", "version", "broken"])
def test_parts_that_cannot_be_trusted_are_done_again(tmp_path, monkeypatch, change) -> None:
    chosen = asked("reliability", tmp_path, "analysis.splits=1")
    analysis.analyse("reliability", chosen, "first", quiet())
    path = analysis_schema.directory(chosen, "reliability") / "analysis.json"
    if change == "version":
        monkeypatch.setattr(analysis, "VERSION", analysis.VERSION + 1)
    elif change == "broken":
        path.write_text(path.read_text()[:-100])
    else:
        chosen = asked("reliability", tmp_path, "analysis.splits=1", change)
    analysis.analyse("reliability", chosen, "second", quiet())
    found = json.loads(path.read_text())
    assert (found["command"], found["status"]) == ("second", "finished")


def test_warnings_of_the_calibrations_are_in_the_log_and_the_logger_is_left_alone(done) -> None:
    what, _, directory, _, _ = done
    if what != "cost":
        assert "poorly suited model" in (directory / "analysis.log").read_text(encoding="utf-8")
    assert not [one for one in logging.getLogger("partial_lora").handlers if isinstance(one, logging.FileHandler)]


def test_a_calibration_file_is_refused(tmp_path) -> None:
    file = tmp_path / "calibration.json"
    file.write_text("{}")
    with pytest.raises(PartialLoraError, match=r"calibration\.file: an analysis calibrates itself"):
        analysis.analyse("cost", asked("cost", tmp_path, f"calibration.file={file}"), "first", quiet())


def test_ids_depend_on_what_is_asked_and_not_on_where_files_go() -> None:
    def named(*overrides: str) -> str:
        return analysis_schema.directory(settings(*overrides), "cost").name

    assert named() == named("analysis.splits=5") == named("results_dir=elsewhere", "overwrite=true")
    assert len({named(), named("analysis.splits=6"), named("calibration.shots=5"), named("importance=snip")}) == 4


def test_a_key_that_is_new_leaves_the_ids_of_old_analyses_alone() -> None:
    chosen = settings()
    before = settings()
    del before["analysis"]["splits"]  # as if there were no such key yet
    assert analysis_schema.directory(chosen, "cost") == analysis_schema.directory(before, "cost")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["foo"], "analyse foo: expected one of agreement|reliability|stability|cost"),
        ([], "analyse: expected one of"),
        (["cost", "+analysis.split=3"], "analysis.split: no such key"),
        (["cost", "analysis.splits=0"], "analysis.splits=0: expected at least 1"),
        (["cost", "analysis.measures=[svd,foo]"], "2 or more distinct measures out of activation, imp, "),
        (["cost", "analysis.seeds=[0]"], "analysis.seeds=[0]: expected 2 or more"),
        (["cost", "analysis.shots=[4,4]"], "analysis.shots=[4, 4]: expected 1 or more distinct"),
        (["cost", "analysis.noise=[1.5]"], "analysis.noise"),
        (["agreement", "analysis.sparsities=[1.0]"], "analysis.sparsities"),
        (["agreement", "analysis.sparsities=[]", "analysis.calibrated=false"], "analysis.sparsities=[]"),
        (["cost", "calibration.threshold=2"], "calibration.threshold=2"),
        (["-m", "cost"], "analyse -m: expected one of"),
    ],
)
def test_wrong_words_are_refused_in_one_line(capsys, monkeypatch, tmp_path, arguments, words) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(analysis, "analyse", None)  # whatever is not refused fails at once
    assert cli.main(["analyse", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("partial-lora: ")
    assert words in said
    assert said.count("\n") == 1


def test_other_commands_know_no_keys_of_analyses(capsys) -> None:
    assert cli.main(["info", *TINY, "analysis.splits=3"]) == 2
    assert "analysis.splits: no such key" in capsys.readouterr().err


def drawn(found, monkeypatch, tmp_path) -> Figure:
    kept = []
    write = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda one, *a, **k: (kept.append(one), write(one, *a, **k))[1])
    analysis_figures.draw(found, tmp_path / "figure.png")
    return kept[0]


def test_what_is_drawn_is_what_was_found(done, monkeypatch, tmp_path) -> None:
    what, _, _, found, _ = done
    figure, summary = drawn(found, monkeypatch, tmp_path), found["summary"]
    if what == "agreement":
        for axes, lines in zip(figure.axes, summary.values(), strict=False):
            assert [text.get_text() for text in axes.texts] == [f"{line['jaccard']:.2f}" for line in lines]
    elif what == "reliability":
        points = sum(len(axes.collections[0].get_offsets()) for axes in figure.axes[:2])
        pairs = {
            (axis, half[0]["sparsity"][module][axis], half[1]["sparsity"][module][axis])
            for half in (part["halves"] for part in found["parts"].values())
            for module in half[0]["sparsity"]
            for axis in ("rows", "columns")
        }
        assert points == len(pairs)
    elif what == "stability":
        (between, reference), right = figure.axes[0].lines, figure.axes[1].lines
        by_shots = [line for line in summary["conditions"] if line["noise"] == 0]
        expected = [[line["shots"], line["between_seeds"]["pearson"]] for line in by_shots]
        assert between.get_xydata().tolist() == [point for point in expected if point[1] is not None]
        assert 4 not in reference.get_xdata()  # the reference is not compared with itself
        assert set(right[0].get_xdata()) <= {0.0, 0.2}
    else:
        widths = [bar.get_width() for bar in figure.axes[0].patches]
        assert widths == [cost["sample_blocks"] for cost in summary["searches"].values()]


def test_rows_and_columns_and_both_lines_differ_without_colour(done, monkeypatch, tmp_path) -> None:
    what, _, _, found, _ = done
    figure = drawn(found, monkeypatch, tmp_path)
    for axes in figure.axes:
        looks = [
            (line.get_linestyle(), line.get_marker(), line.get_markerfacecolor() == "none")
            for line in axes.lines
            if not line.get_label().startswith("_")
        ]
        assert len(set(looks)) == len(looks)
    if what in ("agreement", "stability"):
        assert np.size(figure.axes) > 2


def test_without_any_correlation_there_is_a_table_and_a_figure(tmp_path) -> None:
    """A model that nothing changes is cut to the highest level everywhere: nothing correlates, and that is said."""
    halves = [{"examples": 2, "density": 0.1, "sparsity": {"m.0": {"rows": 0.9, "columns": 0.9}}}] * 2
    none = {"pearson": None, "spearman": None, "spearman_brown": None, "n": 2, "said": "all equal"}
    parts = {"split 0": {"halves": halves, "reliability": none, "rows": none, "columns": none}}
    found = {"what": "reliability", "config": settings(), "parts": parts, "git_commit": None, "device": "cpu"}
    found |= {"command": "c", "summary": examinations.reliability_summary(settings(), parts)}
    assert found["summary"]["said"] == ["split 0: all equal", "no reliability: there is nothing to correlate"]
    assert "no reliability: there is nothing to correlate" in analysis_tables.markdown(found)
    assert analysis_figures.draw(found, tmp_path / "figure.svg").is_file()
