"""Figures: what is drawn is what the records say, and nothing is told by colour alone."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from matplotlib.image import imread
from PIL import Image
from recorded_runs import place, record

from partial_lora.launching.directory import PICTURE, PREDICTIONS
from partial_lora.report import drawing, figures, records, seed_groups
from partial_lora.report.depth import depth_of
from partial_lora.report.drawing import look

KINDS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def test_names_of_classes_are_no_mathematics(tmp_path):
    names = ["$1_$2", "US$ & CA$"]
    rows = Dataset.from_dict({"image": [Image.new("RGB", (8, 8))] * 2, "label": [0, 1]})
    predicted = {"prediction": [1, 1], "prediction_name": names[1:] * 2, "logits": [[0.0, 1.0]] * 2}
    pd.DataFrame({"label": [0, 1], "label_name": names} | predicted).to_parquet(tmp_path / PREDICTIONS)
    assert figures.draw_predictions(record(), tmp_path, rows) == tmp_path / PICTURE


def calibrated(depth=3, kinds=KINDS, start="timm_model.blocks"):
    """A record with a different sparsity everywhere, and its curves.

    They are known within bounds where a level passes and just past it, at one level exactly and at one not at all.
    """
    modules = [f"{start}.{block}.{kind}" for block in range(depth) for kind in kinds]
    sparsity = {module: {"rows": index / 40, "columns": 0.95 - index / 50} for index, module in enumerate(modules)}
    curves = {}
    for name, axes in sparsity.items():
        curves[name] = {}
        for axis, value in axes.items():
            passing = [[round(0.05 * step, 10), [0.72, 0.95]] for step in range(1, int(value / 0.05) + 1)]
            curve = [*passing, [0.96, [0.1, 0.71]], [0.97, 0.2], [0.98, None], [0.99, [None, 0.3]]]
            curves[name][axis] = {"sparsity": value, "curve": curve}
    return record(test=0.9512, sparsity=sparsity), curves


def words(labels):
    return [text.get_text() for text in labels]


def data(line):
    return line.get_xydata().tolist()


# Training


def test_a_metric_that_validation_did_not_log_gives_way_to_the_loss():
    f1 = record(metrics={"validation": {"primary": "f1", "f1": 0.5}}, history=[{"eval_f1": 0.5, "step": 10}])
    assert figures.selected(f1) == "f1"
    assert figures.selected(f1 | {"history": [{"eval_loss": 2.0, "step": 10}]}) == "loss"


def test_a_band_is_over_the_steps_that_all_seeds_have():
    one = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 9.0}]
    other = [{"step": 2, "loss": 3.0}, {"step": 3, "loss": 0.0}]
    assert figures.band([one, other], "loss") == [(2, 2.0, 1.0, 3.0)]
    assert figures.band([one, []], "loss") == [(1, 2.0, 2.0, 2.0), (2, 1.0, 1.0, 1.0)]
    assert figures.band([[], []], "loss") == []
    broken = [{"step": 2, "loss": None}, {"step": 3, "loss": float("nan")}, {"step": 4, "loss": 1.0}]
    assert figures.band([broken], "loss") == [(4, 1.0, 1.0, 1.0)]


def test_bands_reach_over_seeds_and_axes_share_their_steps(tmp_path):
    for seed in (0, 1):
        history = [{"step": step, "loss": step + seed} for step in (1, 5, 9)] + [{"step": 9, "eval_accuracy": 0.5}]
        place(tmp_path, record(seed=seed, history=history))
    above, below = figures.training(records.read(tmp_path)[0]).figure.axes
    assert data(above.lines[0]) == [[1, 1.5], [5, 5.5], [9, 9.5]]
    (extent,) = [band.get_paths()[0].get_extents() for band in above.collections]
    assert (extent.y0, extent.y1) == (1, 10)
    assert above.get_xlim() == below.get_xlim()


# Sparsities


def test_every_module_is_at_its_kind_and_depth():
    result, _ = calibrated(12)
    del result["sparsity"]["timm_model.blocks.1.mlp.fc1"]
    rows, columns = figures.sparsity_by_depth(result).axes
    assert tuple(words(rows.get_yticklabels())) == KINDS
    assert words(rows.get_xticklabels()) == [str(block) for block in range(12)]  # by number, not by letter
    for axes, axis in ((rows, "rows"), (columns, "columns")):
        cells = axes.images[0].get_array()
        assert cells.mask.sum() == 1  # the module that is not there
        for module, sparsity in result["sparsity"].items():
            (depth,), kind = depth_of(module)[1], module.split(".", 3)[3]
            assert cells[KINDS.index(kind), depth] == pytest.approx(np.clip(sparsity[axis], 0, 1))
        assert (axes.images[0].norm.vmin, axes.images[0].norm.vmax) == (0, 1)  # the same scale in every figure
    few, _ = calibrated(2)
    axes = figures.sparsity_by_depth(few).axes[0]
    assert words(axes.texts) == [f"{100 * value:.0f}" for value in axes.images[0].get_array().compressed()]
    (axes, _) = figures.sparsity_by_depth(calibrated(32, KINDS[:3])[0]).axes  # no room for numbers
    assert (len(axes.texts), axes.images[0].get_array().shape) == (0, (3, 32))


@pytest.mark.parametrize("modules", [["layers.0.blocks.0.qkv", "layers.1.blocks.0.qkv"], ["dense"], ["a", "a.b"]])
def test_any_names_can_be_drawn(modules):
    sparsity = {module: {"rows": 0.5, "columns": 0.0} for module in modules}
    figure = figures.sparsity_by_depth(record(sparsity=sparsity))
    figure.draw_without_rendering()
    drawn = [axes.images[0].get_array().compressed().tolist() for axes in figure.axes[:2]]
    assert drawn == [[0.5] * len(modules), [0.0] * len(modules)]


def test_a_map_is_of_partial_and_a_mean_over_its_seeds(tmp_path):
    modules = [f"blocks.{block}.qkv" for block in range(4)]
    rising = {name: {"rows": 0.1 * number, "columns": 0.1 * number + 0.2} for number, name in enumerate(modules)}
    falling = {name: {axis: 0.9 - value for axis, value in axes.items()} for name, axes in rising.items()}
    for seed, moved in enumerate((0.0, 0.2)):
        own = {name: {axis: value + moved for axis, value in axes.items()} for name, axes in rising.items()}
        place(tmp_path, record(seed=seed, sparsity=own))
        place(tmp_path, record(seed=seed, sparsity=falling, task__train_samples=150))  # other conditions
    place(tmp_path, record("uniform", sparsity=falling))
    place(tmp_path, record("lora", sparsity=falling))
    place(tmp_path, record(task="cifar10", sparsity=falling))
    place(tmp_path, record(task="rte", model="tiny", sparsity=rising))
    runs = records.read(tmp_path)[0]
    digits = next(of for (task, *_), of in figures.maps(runs).items() if task == "digits")
    assert digits["blocks.1.qkv"] == pytest.approx({"rows": 0.2, "columns": 0.4})


# Calibration curves


def test_a_panel_is_a_module_and_shows_what_is_known_of_it():
    result, modules = calibrated(depth=2)
    figure = figures.curves_by_depth(result, modules)
    assert len(figure.axes) == len(KINDS) * 2
    for index, axes in enumerate(figure.axes):  # a line of panels for every kind
        of = modules[f"timm_model.blocks.{index % 2}.{KINDS[index // 2]}"]
        low, high = axes.get_ylim()
        assert low < 0.1
        assert high > 0.95
        for number, axis in enumerate(("rows", "columns")):
            of_axis = [line for line in axes.lines if line.get_color() == figures._CURVES[axis][0]["color"]]
            lows, highs, chosen = of_axis
            assert data(chosen) == [[of[axis]["sparsity"], pytest.approx(0.72)]]  # 0.9 of 0.8
            levels = [0.0] + [level for level, _ in of[axis]["curve"]]
            assert lows.get_xdata().tolist() == highs.get_xdata().tolist() == levels
            passing = len(levels) - 5
            expected = [0.8, *[0.72] * passing, 0.1, 0.2, np.nan, low]
            np.testing.assert_allclose(lows.get_ydata(), expected)
            np.testing.assert_allclose(highs.get_ydata(), [0.8, *[0.95] * passing, 0.71, 0.2, np.nan, 0.3])
            assert axes.collections[number].get_hatch() == figures._CURVES[axis][1]


@pytest.mark.parametrize(
    ("settings", "held"),
    [
        ({}, 0.9 * 0.8),
        ({"chance": 0.1, "above_chance": True}, 0.1 + 0.9 * 0.7),
        ({"chance": 0.9, "above_chance": True}, 0.8),  # nothing would do: the intact model's own score
        ({"threshold": None}, 0.8),
        ({"baseline": -0.5}, -0.5 / 0.9),
    ],
)
def test_the_line_to_hold_follows_the_rule(settings, held):
    result, modules = calibrated(depth=1)
    result["calibration"] |= settings
    lines = figures.curves_by_depth(result, modules).axes[0].lines
    dotted = next(line for line in lines if line.get_linestyle() == ":")
    assert list(dotted.get_ydata()) == pytest.approx([held, held])


def test_of_many_depths_a_dozen_are_drawn_the_first_and_the_last_among_them():
    figure = figures.curves_by_depth(*calibrated(32, ("self_attn.q_proj",)))
    titles = [axes.get_title() for axes in figure.axes if axes.get_visible()]
    assert (len(titles), titles[0], titles[-1]) == (12, "0", "31")
    assert "(12 of 32)" in figure.get_suptitle()


def test_a_curve_after_earlier_choices_does_not_start_from_the_intact_model_and_there_may_be_none():
    result, modules = calibrated(depth=1)
    result["calibration"]["scope"] = "cumulative"
    modules["timm_model.blocks.0.attn.proj"]["rows"] = {"sparsity": 0.5}
    for axes in figures.curves_by_depth(result, modules).axes[:2]:
        assert 0.0 not in [line.get_xdata()[0] for line in axes.lines[2:] if len(line.get_xdata()) > 1]


def test_curves_of_a_kind_are_medians_of_what_is_known():
    modules = {
        f"blocks.{block}.qkv": {
            "rows": {"curve": [[0.5, score], [0.6, [0.1, 0.3]]]},
            "columns": {"curve": [[0.5, None]]},
        }
        for block, score in enumerate((0.7, 0.8, 0.95))
    }
    assert figures.kind_curves(modules) == {("qkv", "rows"): [(0.5, 0.8, 0.8), (0.6, 0.1, 0.3)]}


def test_one_calibration_of_each_kind_is_read(tmp_path):
    for name, result in (("0", record()), ("1", record()), ("2", record(budget=0.13))):
        folder = place(tmp_path, result, id=name)
        (folder / "calibration.json").write_text('{"baseline": 0.5, "modules": {"a.0.b": {}}}' if name != "0" else "{")
    for task, modules in (("rte", "{}"), ("sst2", '{"a": [1]}')):
        folder = tmp_path / "calibrations" / task / "minilm" / "svd-1"
        folder.mkdir(parents=True)
        (folder / "calibration.json").write_text(f'{{"baseline": 0.6, "modules": {modules}}}')
    runs = records.read(tmp_path)[0]
    contents = figures.calibrations(runs, tmp_path)
    baselines = {title: content["baseline"] for title, content in contents.items()}
    assert baselines == {"digits, vit, svd": 0.5, "rte, minilm, svd": 0.6}
    assert figures.calibrations(runs, None).keys() == {"digits, vit, svd"}


# Figures over many runs


def test_every_method_has_a_marker_of_its_own():
    looks = {method: look(method, "–") for method in drawing._LOOKS}
    entries = {method: look(f"{method} (element)", "–") for method in drawing._LOOKS}
    assert len({each.marker for each in (*looks.values(), *entries.values())}) == 2 * len(looks)
    assert all(entries[method].color == looks[method].color for method in looks)
    assert len({look(f"partial {masks}", "–").marker for masks in ("(element)", "(frozen)", "(units)")}) == 3
    assert look("a_method_of_ones_own", "–").marker in drawing.MARKERS
    threshold, budget = look("partial", "threshold 0.9"), look("partial", "budget 0.13")
    assert threshold.filled != budget.filled
    assert threshold.linestyle != budget.linestyle


@pytest.fixture
def runs(tmp_path):
    history = [{"step": step, "loss": 1 / step, "eval_accuracy": 0.5 + step / 100} for step in (10, 20, 30)]
    for seed, accuracy in enumerate((0.90, 0.91, 0.95)):
        place(tmp_path, record(test=accuracy, seed=seed, history=history))
    place(tmp_path, record("lora", 0.96, history=history))
    place(tmp_path, record("uniform", 0.80, budget=0.13))
    place(tmp_path, record("lora", 0.7, task="cifar10"))
    return records.read(tmp_path)[0]


def test_methods_are_drawn_with_means_sizes_and_intervals(runs):
    frame = seed_groups.table(runs)
    table = seed_groups.group(frame)
    of_digits = table[table["task"] == "digits"]
    (digits,) = figures.pareto(of_digits).figure.axes
    assert digits.get_title(loc="left") == "digits, vit"
    points = [tuple(point) for line in digits.lines if line.get_marker() != "None" for point in data(line)]
    assert (700 + 3850, pytest.approx(0.92)) in points
    assert (1000 + 3850, 0.96) in points
    (digits,) = figures.methods(of_digits, frame).figure.axes
    assert words(digits.get_yticklabels()) == ["lora", "partial, threshold 0.9", "uniform, budget 0.13"]
    ends = [path.get_extents().bounds for bars in digits.collections for path in bars.get_paths() if len(path) == 2]
    half = 4.302653 * np.std([0.90, 0.91, 0.95], ddof=1) / np.sqrt(3)
    assert any(width == pytest.approx(2 * half, rel=1e-5) for _, _, width, _ in ends)


def test_the_front_is_what_nothing_beats_at_its_size():
    points = [(10, 0.5), (100, 0.4), (100, 0.7), (50, 0.5), (1000, 0.9), (2000, 0.9)]
    assert figures.front(points, "accuracy") == [(10, 0.5), (100, 0.7), (1000, 0.9)]
    assert figures.front(points, "mse") == [(10, 0.5), (100, 0.4)]


def intervals(margin=1.0, **differences):
    """What is judged of methods, an interval of two points around each difference."""
    rows = pd.DataFrame({"method": list(differences), "difference": list(differences.values())})
    rows = rows.assign(low=rows["difference"] - 1, high=rows["difference"] + 1, verdict="worse")
    (axes,) = figures.intervals([figures.Intervals("digits", "points from partial", margin, rows)]).figure.axes
    return axes


def test_intervals_are_those_that_were_judged_beside_the_strip_of_what_is_as_good():
    axes = intervals(2.0, lora=-20.0)
    assert words(axes.get_yticklabels()) == ["lora: worse"]
    assert [[-20.0, 0]] in [data(line) for line in axes.lines]
    (strip,) = axes.patches
    assert (strip.get_x(), strip.get_width()) == (-2, 2)
    assert figures.intervals([figures.Intervals("digits", "points", 1.0, pd.DataFrame())]) is None


@pytest.mark.parametrize(("far", "text"), [(-20.0, "◂ -20"), (20.0, "+20 ▸")])
def test_a_difference_far_from_all_others_is_a_number_and_presses_none_together(far, text):
    near = {"lora": -1.0, "targeted": 1.5, "uniform": 0.5}
    assert not intervals(**near).texts
    axes = intervals(probe=far, **near)
    assert [(each.get_text(), each.get_position()[1]) for each in axes.texts] == [(text, 0)]
    left, right = axes.get_xlim()
    assert -5 < left < -2
    assert 2.5 < right < 5


# Files


def test_figures_of_a_run_need_no_display_and_the_same_record_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "tkagg")
    monkeypatch.delenv("DISPLAY", raising=False)
    result, modules = calibrated(depth=1)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        figures.draw_calibration(result, modules, tmp_path / name)
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a", "b")]
    assert contents[0] == contents[1]
    assert sorted(contents[0]) == ["curves.png", "curves.svg", "sparsity.png", "sparsity.svg"]
    (tmp_path / "dense").mkdir()
    figures.draw_calibration(result | {"sparsity": {}}, None, tmp_path / "dense")
    assert list((tmp_path / "dense").iterdir()) == []


def test_a_report_draws_each_figure_that_it_has_numbers_for(tmp_path, runs):
    partial = next(run for run in runs if run.row["method"] == "partial")
    (partial.directory / "calibration.json").write_text(json.dumps({"baseline": 0.87, "modules": calibrated()[1]}))
    old = tmp_path / "report" / "figures" / "pareto-9.png"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"of an earlier report")
    drawn = figures.draw_gallery(runs, tmp_path)
    stems = [each.files[0].stem for each in drawn]
    assert stems == ["pareto-1", "methods-1", "pareto-2", "methods-2", "training", "sparsity", "calibration"]
    assert [each.place and each.place[0] for each in drawn] == ["cifar10"] * 2 + ["digits"] * 2 + [None] * 3
    assert "<title>partial, threshold 0.9: 92.00" in drawn[2].files[1].read_text(encoding="utf-8")
    assert not old.exists()
    for each in drawn:
        assert [file.suffix for file in each.files] == [".png", ".svg"]
        assert min(imread(each.files[0]).shape[:2]) > 150
        assert each.files[1].read_text(encoding="utf-8").rstrip().endswith("</svg>")
