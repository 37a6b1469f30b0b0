"""Figures over many runs: what is drawn is what the records say, and nothing is told by colour alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
from drawn_records import calibrated
from matplotlib.image import imread
from recorded_runs import budget, leave, place, record

from partial_lora.report import figures, records, tables
from partial_lora.report.figures import look
from partial_lora.report.records import Predictions


@pytest.fixture
def found(tmp_path):
    history = [{"step": step, "loss": 1 / step, "eval_accuracy": 0.5 + step / 100} for step in (10, 20, 30)]
    for seed, accuracy in enumerate((0.90, 0.91, 0.95)):
        place(tmp_path, record(seed=seed, accuracy=accuracy, history=history))
    place(tmp_path, record("lora", accuracy=0.96, history=history))
    place(tmp_path, budget(record("uniform", accuracy=0.80), 0.13))
    place(tmp_path, record("lora", task="cifar10", accuracy=0.7))
    return records.read(tmp_path)[0]


def test_every_method_has_a_marker_of_its_own():
    looks = {method: look(method, "–") for method in figures._PANEL_LOOKS}
    assert len({each.marker for each in looks.values()}) == len(looks)
    assert look("partial", "threshold 0.9").filled != look("partial", "budget 0.13").filled
    assert look("partial", "threshold 0.9").linestyle != look("partial", "budget 0.13").linestyle
    assert look("a_method_of_ones_own", "–").marker in figures.MARKERS
    entries = {method: look(f"{method} (element)", "–") for method in figures._PANEL_LOOKS}
    assert len({each.marker for each in (*looks.values(), *entries.values())}) == 2 * len(looks)
    assert all(entries[method].color == looks[method].color for method in looks)


def test_a_figure_says_of_how_many_places_it_draws_some(tmp_path):
    for number in range(figures.MOST + 2):
        place(tmp_path, record(task=f"task{number:02}"))
    found = records.read(tmp_path)[0]
    table = records.group(records.table(found))
    for drawing in (figures.pareto(table), figures.methods(table, records.table(found))):
        assert len([axes for axes in drawing.figure.axes if axes.get_visible()]) == figures.MOST
        assert drawing.cut == "9 of 11 places are drawn; --where chooses others."
    assert figures.sparsity(found).cut == "5 of 11 calibrations are drawn; --where chooses others."
    assert figures.pareto(table.head(3)).cut == ""


def test_points_of_the_front_are_means_at_their_sizes(found):
    frame = records.table(found)
    figure = figures.pareto(records.group(frame)).figure
    cifar, digits = figure.axes
    assert [axes.get_title(loc="left") for axes in (cifar, digits)] == ["cifar10, vit_s14", "digits, vit_s14"]
    points = {
        tuple(point) for line in digits.lines for point in line.get_xydata().tolist() if line.get_marker() != "None"
    }
    assert (700 + 3850, pytest.approx(0.92)) in [(size, score) for size, score in points]
    assert (1000 + 3850, 0.96) in points
    low, high = digits.get_xlim()
    assert high / low >= 10


def test_every_method_is_a_row_with_its_interval(found):
    frame = records.table(found)
    figure = figures.methods(records.group(frame), frame).figure
    digits = figure.axes[1]
    assert [text.get_text() for text in digits.get_yticklabels()] == [
        "lora",
        "partial, threshold 0.9",
        "uniform, budget 0.13",
    ]
    ends = [path.get_extents().bounds for bars in digits.collections for path in bars.get_paths() if len(path) == 2]
    half = 4.302653 * np.std([0.90, 0.91, 0.95], ddof=1) / np.sqrt(3)
    assert any(width == pytest.approx(2 * half, rel=1e-5) for _, _, width, _ in ends)


def test_what_is_cut_says_so(tmp_path):
    for number in range(figures._MOST_ROWS + 2):
        place(tmp_path, record(accuracy=0.9), id=f"{number:02}")
    frame = records.table(records.read(tmp_path)[0])
    (axes,) = figures.methods(records.group(frame), frame).figure.axes
    assert axes.get_title(loc="left").endswith(f"({figures._MOST_ROWS} of {figures._MOST_ROWS + 2})")
    assert len({text.get_text() for text in axes.get_yticklabels()}) == figures._MOST_ROWS


def test_lists_are_as_high_as_their_rows_and_fill_the_shorter_column():
    lengths = (2, 20, 3, 4)
    figure, drawn = figures.lists(lengths, wide=4.6)
    figure.draw_without_rendering()
    boxes = [axes.get_position() for axes in drawn]
    left, right = boxes[0].x0, boxes[1].x0
    assert [round(box.x0, 6) for box in boxes] == [round(each, 6) for each in (left, right, left, left)]
    assert boxes[0].y0 > boxes[2].y1 > boxes[2].y0 > boxes[3].y1
    inches = [box.height * figure.get_figheight() for box in boxes]
    assert sorted(inches) == [inches[number] for number in np.argsort(lengths)]
    assert inches[1] > 20 * 0.2


def test_bands_reach_over_seeds_and_axes_share_their_steps(tmp_path):
    for seed in (0, 1):
        history = [{"step": step, "loss": step + seed} for step in (1, 5, 9)] + [{"step": 9, "eval_accuracy": 0.5}]
        place(tmp_path, record(seed=seed, history=history))
    above, below = figures.training(records.read(tmp_path)[0]).figure.axes
    assert above.lines[0].get_xydata().tolist() == [[1, 1.5], [5, 5.5], [9, 9.5]]
    (extent,) = [band.get_paths()[0].get_extents() for band in above.collections]
    assert (extent.y0, extent.y1) == (1, 10)
    assert above.get_xlim() == below.get_xlim()


def test_differences_are_those_of_the_comparison(tmp_path):
    for seed in (0, 1):
        leave(tmp_path, "partial", wrong=20, seed=seed)
        leave(tmp_path, "lora", wrong=60, seed=seed)
    compared = tables.differences(records.read(tmp_path)[0], Predictions(tmp_path)).rows
    (axes,) = figures.differences(compared).figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["lora: worse"]
    assert any(line.get_xydata().tolist() == [[pytest.approx(-0.2), 0]] for line in axes.lines)
    assert figures.differences(compared.assign(difference=np.nan)) is None


def test_only_a_metric_with_a_margin_has_the_strip_that_matches(tmp_path):
    for method, wrong in (("partial", 20), ("lora", 60)):
        for seed in (0, 1):
            leave(tmp_path, method, wrong=wrong, seed=seed)
    compared = tables.differences(records.read(tmp_path)[0], Predictions(tmp_path)).rows
    strips = [
        len(figures.differences(compared.assign(metric=metric)).figure.axes[0].patches)
        for metric in ("accuracy", "mse")
    ]
    assert strips == [1, 0]
    assert "hatched" in figures._matching(compared)
    assert "hatched" not in figures._matching(compared.assign(metric="mse"))
    assert "below zero is better" in figures._matching(compared.assign(metric="mse"))


@pytest.mark.parametrize(("far", "said"), [(-0.2, "◂ -20.0"), (0.2, "+20.0 ▸")])
def test_a_difference_far_from_all_others_is_a_number_and_presses_none_together(tmp_path, far, said):
    for method, wrong in (("partial", 100), ("lora", 102), ("targeted", 97), ("uniform", 99), ("probe", 100)):
        for seed in (0, 1):
            leave(tmp_path, method, wrong=wrong, seed=seed)
    rows = tables.differences(records.read(tmp_path)[0], Predictions(tmp_path)).rows
    close = figures.differences(rows).figure.axes[0]
    assert not close.texts
    last = rows["method"] == "probe"
    rows.loc[last, ["difference", "low", "high"]] = far, far - 0.01, far + 0.01
    (axes,) = figures.differences(rows).figure.axes
    assert [(text.get_text(), text.get_position()[1]) for text in axes.texts] == [
        (said, [text.get_text() for text in axes.get_yticklabels()].index("probe: " + rows.loc[last, "verdict"].item()))
    ]
    near = rows.loc[~last, ["low", "high"]]
    left, right = axes.get_xlim()
    assert left < near["low"].min()
    assert near["high"].max() < right
    assert right - left < 0.15


def test_a_report_draws_each_figure_that_it_has_numbers_for(tmp_path, found):
    modules = calibrated()[1]
    runs_of = [run for run in found if run.row["method"] == "partial"]
    (runs_of[0].directory / "calibration.json").write_text(json.dumps({"baseline": 0.87, "modules": modules}))
    frame = records.table(found)
    old = tmp_path / "report" / "figures" / "differences.png"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"of an earlier report")
    predictions = Predictions(tmp_path)
    compared = tables.differences(found, predictions).rows
    drawn = figures.draw_gallery(found, records.group(frame), compared, predictions, tmp_path)
    stems = [each.files[0].stem for each in drawn]
    assert stems == ["pareto", "methods", "training", "sparsity", "calibration", "sparsity_agreement"]
    assert not old.exists()
    for each in drawn:
        assert [file.suffix for file in each.files] == [".png", ".svg"]
        assert min(imread(each.files[0]).shape[:2]) > 200
        assert each.files[1].read_text(encoding="utf-8").rstrip().endswith("</svg>")


def test_sparsities_stand_in_their_cells(found):
    figure = figures.sparsity(found).figure
    said = [text.get_text() for axes in figure.axes[:2] for text in axes.texts]
    assert said == ["20", "40", "40", "50"]
