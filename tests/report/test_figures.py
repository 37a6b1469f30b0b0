"""Figures: what is drawn is what the records say, and nothing is told by colour alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
from drawn_records import KINDS, calibrated, record
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread
from recorded_runs import budget, leave, place, rows_of
from recorded_runs import record as finished

from partial_lora.report import drawing, figures, records, tables
from partial_lora.report.drawing import look
from partial_lora.report.records import Predictions


def titles(axes):
    return axes.get_title(loc="left")


def names(labels):
    return [text.get_text() for text in labels]


# Training


@pytest.fixture
def saved(monkeypatch):
    """The figures that are written, to look at what is in them."""
    kept, write = [], Figure.savefig

    def keep(figure, *arguments, **options):
        kept.append(figure)
        write(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def logged(history, key):
    return [[entry["step"], entry[key]] for entry in history if key in entry]


def test_the_curve_is_the_history(tmp_path, saved):
    result = record()
    figures.training_curve(result, tmp_path / "training.png")
    above, below = saved[0].axes
    training, validation = above.lines
    accuracy, best, test = below.lines
    for drawn, key in ((training, "loss"), (validation, "eval_loss"), (accuracy, "eval_accuracy")):
        assert drawn.get_xydata().tolist() == logged(result["history"], key)
    assert best.get_xydata().tolist() == [[48, 0.975]]
    assert set(test.get_ydata()) == {0.9512}
    labels = names(below.get_legend().get_texts())
    assert labels[1:] == ["best on validation: 97.50 %, step 48", "test, once at the end: 95.12 %"]
    for axes in (above, below):
        looks = {(line.get_linestyle(), line.get_marker()) for line in axes.lines}
        assert len(looks) == len(axes.lines)  # without colour


@pytest.mark.parametrize("losses", [(2.3, 2.25), (2.3, 0.0)])
def test_the_axis_of_the_loss_fits_its_values_and_ends_at_zero(tmp_path, saved, losses):
    history = [{"loss": loss, "step": step} for step, loss in enumerate(losses)]
    figures.training_curve(record() | {"history": history}, tmp_path / "training.png")
    bottom, top = saved[0].axes[0].get_ylim()
    assert 0 <= bottom <= min(losses)
    assert max(losses) < top
    assert max(losses) - min(losses) > 0.8 * (top - bottom)


def test_a_metric_that_validation_did_not_log_gives_way_to_the_loss(tmp_path, saved):
    result = record() | {"metrics": {"validation": {"primary": "f1", "f1": 0.5}}}
    result["history"] = [{"eval_f1": 0.5, "step": 10}]
    figures.training_curve(result, tmp_path / "training.png")
    assert saved[0].axes[1].lines[0].get_xydata().tolist() == [[10, 0.5]]
    result["history"] = [{"eval_loss": 2.0, "step": 10}, {"eval_loss": 1.0, "step": 20}]
    assert figures.selected(result) == "loss"
    figures.training_curve(result, tmp_path / "training.png")
    assert saved[1].axes[1].lines[1].get_xydata().tolist() == [[20, 1]]  # the best is the lowest


def test_without_a_log_there_is_no_figure_of_training(tmp_path):
    empty = record() | {"history": [{"train_runtime": 1.0, "step": 0}]}
    assert figures.training_curve(empty, tmp_path / "training.png") is None
    assert list(tmp_path.iterdir()) == []
    alone = record() | {"history": [{"loss": 1.0, "step": 1}], "metrics": {}}
    assert figures.training_curve(alone, tmp_path / "training.png").is_file()


def test_figures_need_no_display_and_the_same_record_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "tkagg")
    monkeypatch.delenv("DISPLAY", raising=False)
    result, modules = calibrated(depth=1)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        figures.draw_calibration(result, modules, tmp_path / name)
        figures.training_curve(result, tmp_path / name / "training.png")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["curves.png", "curves.svg", "sparsity.png", "sparsity.svg", "training.png"]
    for file in files:
        content = (tmp_path / "a" / file).read_bytes()
        assert content == (tmp_path / "b" / file).read_bytes()
        if file.endswith(".png"):
            assert min(imread(tmp_path / "a" / file).shape[:2]) > 300
        else:
            assert content.rstrip().endswith(b"</svg>")
    (tmp_path / "dense").mkdir()
    figures.draw_calibration(result | {"sparsity": {}}, None, tmp_path / "dense")
    assert list((tmp_path / "dense").iterdir()) == []


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
        place(tmp_path, finished(seed=seed, history=history))
    above, below = figures.training(records.read(tmp_path)[0]).figure.axes
    assert above.lines[0].get_xydata().tolist() == [[1, 1.5], [5, 5.5], [9, 9.5]]
    (extent,) = [band.get_paths()[0].get_extents() for band in above.collections]
    assert (extent.y0, extent.y1) == (1, 10)
    assert above.get_xlim() == below.get_xlim()


# Sparsities


def test_every_module_is_at_its_kind_and_depth():
    result = record()
    del result["sparsity"]["timm_model.blocks.1.mlp.fc1"]
    rows, columns = figures.sparsity_by_depth(result).axes
    assert tuple(names(rows.get_yticklabels())) == KINDS
    for axes, axis in ((rows, "rows"), (columns, "columns")):
        cells = axes.images[0].get_array()
        assert cells.mask.sum() == 1  # the module that is not there
        for line, kind in enumerate(KINDS):
            for depth in range(3):
                of = result["sparsity"].get(f"timm_model.blocks.{depth}.{kind}")
                assert of is None or cells[line, depth] == pytest.approx(of[axis])
        assert names(axes.texts) == [f"{100 * value:.0f}" for value in cells.compressed()]
        assert (axes.images[0].norm.vmin, axes.images[0].norm.vmax) == (0, 1)  # the same scale in every figure


def test_depth_is_in_order_of_numbers_and_a_deep_model_has_none_in_its_cells():
    (axes, _) = figures.sparsity_by_depth(record(depth=12)).axes
    assert names(axes.get_xticklabels()) == [str(block) for block in range(12)]
    deep = record(32, ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"), "model.layers")
    (axes, _) = figures.sparsity_by_depth(deep).axes
    assert len(axes.texts) == 0
    assert axes.images[0].get_array().shape == (3, 32)


@pytest.mark.parametrize(
    "modules",
    [
        ["encoder.layers.0.blocks.0.qkv", "encoder.layers.0.blocks.1.qkv", "encoder.layers.1.blocks.0.qkv"],
        ["dense"],
        ["a", "a.b", "layers.0.a"],
    ],
)
def test_any_names_can_be_drawn(modules):
    result = record() | {"sparsity": {module: {"rows": 0.5, "columns": 0.0} for module in modules}}
    figures.sparsity_by_depth(result).draw_without_rendering()


def test_a_map_is_of_partial_and_a_mean_over_its_seeds(tmp_path):
    sparse = {"blocks.0.qkv": {"rows": 0.2, "columns": 0.4}}
    for seed, rows in enumerate((0.2, 0.4)):
        place(tmp_path, finished(seed=seed, sparsity={"blocks.0.qkv": {"rows": rows, "columns": 0.4}}))
    place(tmp_path, finished("uniform", sparsity={"blocks.0.qkv": {"rows": 0.9, "columns": 0.9}}))
    place(tmp_path, finished("lora", sparsity=sparse))
    (found,) = figures.maps(records.read(tmp_path)[0]).values()
    assert found["blocks.0.qkv"] == pytest.approx({"rows": 0.3, "columns": 0.4})


def test_calibrations_of_a_model_are_correlated(tmp_path):
    modules = [f"blocks.{block}.qkv" for block in range(4)]
    rising = {name: {"rows": 0.1 * number, "columns": 0.1 * number + 0.2} for number, name in enumerate(modules)}
    falling = {name: {axis: 0.9 - value for axis, value in axes.items()} for name, axes in rising.items()}
    place(tmp_path, finished(sparsity=rising))
    place(tmp_path, finished(task="cifar10", sparsity=falling))
    place(tmp_path, finished(task="rte", model="tiny", sparsity=rising))
    ((model, (names, matrix)),) = figures.sparsity_agreement(records.read(tmp_path)[0]).items()
    assert model == "vit_s14"
    assert len(names) == 2
    assert matrix == pytest.approx(np.array([[1, -1], [-1, 1]]))


# Calibration curves


def panels_of(figure):
    """The panels that show a module, by (kind, depth) as places in the grid."""
    shape = figure.axes[0].get_subplotspec().get_gridspec().get_geometry()
    panels = np.asarray(figure.axes, dtype=object).reshape(shape)
    return {index: panel for index, panel in np.ndenumerate(panels) if panel.get_visible()}


def test_a_panel_is_a_module_and_shows_what_is_known_of_it():
    result, modules = calibrated(depth=2)
    panels = panels_of(figures.curves_by_depth(result, modules))
    assert sorted(panels) == [(kind, depth) for kind in range(len(KINDS)) for depth in range(2)]
    for (kind, depth), axes in panels.items():
        found = modules[f"timm_model.blocks.{depth}.{KINDS[kind]}"]
        low, high = axes.get_ylim()
        for number, axis in enumerate(("rows", "columns")):
            of_axis = [line for line in axes.lines if line.get_color() == figures._CURVES[axis][0]["color"]]
            lows, highs, chosen = of_axis
            assert chosen.get_xydata().tolist() == [[found[axis]["sparsity"], 0.9 * 0.87]]
            levels = [0.0] + [level for level, _ in found[axis]["curve"]]
            assert lows.get_xdata().tolist() == highs.get_xdata().tolist() == levels
            passing = len(levels) - 5
            expected = [0.87, *[0.9 * 0.87] * passing, 0.1, 0.2, np.nan, low]
            assert np.allclose(lows.get_ydata(), expected, equal_nan=True)
            assert np.allclose(highs.get_ydata(), [0.87, *[0.95] * passing, 0.773, 0.2, np.nan, 0.3], equal_nan=True)
            assert len(axes.collections) == 2
            assert np.allclose(axes.collections[number].get_facecolor()[0][:3], to_rgb(of_axis[0].get_color()))
        assert low < 0.1
        assert high > 0.95


def test_the_line_to_hold_follows_the_rule():
    for settings, held in (
        ({}, 0.9 * 0.87),
        ({"chance": 0.1}, 0.9 * 0.87),
        ({"chance": 0.1, "above_chance": True}, 0.1 + 0.9 * 0.77),
        ({"chance": 0.9, "above_chance": True}, 0.87),  # nothing would do: the intact model's own score
        ({"threshold": None}, 0.87),
        ({"baseline": -0.5}, -0.5 / 0.9),
    ):
        result, modules = calibrated(depth=1)
        result["calibration"] |= settings
        dotted = next(
            line for line in figures.curves_by_depth(result, modules).axes[0].lines if line.get_linestyle() == ":"
        )
        assert list(dotted.get_ydata()) == pytest.approx([held, held])


def test_of_many_depths_a_dozen_are_drawn_the_first_and_the_last_among_them():
    result, modules = calibrated(32, kinds=("self_attn.q_proj",), start="model.layers")
    figure = figures.curves_by_depth(result, modules)
    titles = [axes.get_title() for axes in panels_of(figure).values()]
    assert len(titles) == 12
    assert (titles[0], titles[-1]) == ("0", "31")
    assert "(12 of 32)" in figure.get_suptitle()


def test_a_curve_after_earlier_choices_does_not_start_from_the_intact_model():
    result, modules = calibrated(depth=1)
    result["calibration"]["scope"] = "cumulative"
    modules["timm_model.blocks.0.attn.proj"]["rows"]["curve"] = []
    for axes in figures.curves_by_depth(result, modules).axes[:2]:
        assert 0.0 not in [line.get_xdata()[0] for line in axes.lines[2:] if len(line.get_xdata()) > 1]


def test_a_calibration_without_curves_is_drawn_too():
    result, modules = calibrated(depth=1)
    bare = {name: {axis: {"sparsity": of["sparsity"]} for axis, of in axes.items()} for name, axes in modules.items()}
    figures.curves_by_depth(result, bare).draw_without_rendering()


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
    for number, result in enumerate((finished(seed=0), finished(seed=1), budget(finished(), 0.13))):
        folder = place(tmp_path, result, id=str(number))
        (folder / "calibration.json").write_text('{"baseline": 0.5, "modules": {"a.0.b": {}}}' if number else "{")
    alone = tmp_path / "calibrations" / "rte" / "minilm" / "svd-1"
    alone.mkdir(parents=True)
    (alone / "calibration.json").write_text('{"baseline": 0.6, "modules": {}}')
    foreign = tmp_path / "calibrations" / "sst2" / "minilm" / "svd-1"
    foreign.mkdir(parents=True)
    (foreign / "calibration.json").write_text('{"baseline": 0.6, "modules": {"a": [1]}}')
    found = figures.calibrations(records.read(tmp_path)[0], tmp_path)
    assert {title: content["baseline"] for title, content in found.items()} == {
        "digits, vit_s14, –": 0.5,
        "rte, minilm, svd": 0.6,
    }


# Figures over many runs


@pytest.fixture
def runs(tmp_path):
    history = [{"step": step, "loss": 1 / step, "eval_accuracy": 0.5 + step / 100} for step in (10, 20, 30)]
    for seed, accuracy in enumerate((0.90, 0.91, 0.95)):
        place(tmp_path, finished(seed=seed, accuracy=accuracy, history=history))
    place(tmp_path, finished("lora", accuracy=0.96, history=history))
    place(tmp_path, budget(finished("uniform", accuracy=0.80), 0.13))
    place(tmp_path, finished("lora", task="cifar10", accuracy=0.7))
    return records.read(tmp_path)[0]


def test_every_method_has_a_marker_of_its_own():
    looks = {method: look(method, "–") for method in drawing._LOOKS}
    assert len({each.marker for each in looks.values()}) == len(looks)
    assert look("partial", "threshold 0.9").filled != look("partial", "budget 0.13").filled
    assert look("partial", "threshold 0.9").linestyle != look("partial", "budget 0.13").linestyle
    assert look("a_method_of_ones_own", "–").marker in drawing.MARKERS
    entries = {method: look(f"{method} (element)", "–") for method in drawing._LOOKS}
    assert len({each.marker for each in (*looks.values(), *entries.values())}) == 2 * len(looks)
    assert all(entries[method].color == looks[method].color for method in looks)


def test_a_figure_says_of_how_many_places_it_draws_some(tmp_path):
    for number in range(figures.MOST + 2):
        place(tmp_path, finished(task=f"task{number:02}"))
    runs = records.read(tmp_path)[0]
    table = records.group(records.table(runs))
    for each in (figures.pareto(table), figures.methods(table, records.table(runs))):
        assert len([axes for axes in each.figure.axes if axes.get_visible()]) == figures.MOST
        assert each.cut == "9 of 11 places are drawn; --where chooses others."
    assert figures.sparsity(runs).cut == "5 of 11 calibrations are drawn; --where chooses others."
    assert figures.pareto(table.head(3)).cut == ""


def test_a_legend_of_many_methods_leaves_its_panel_room():
    figure, (axes,) = drawing.panels(1, wide=3.9, high=2.9)
    points = ("threshold 0.9", "budget 0.13")
    drawing.legend(figure, [(method, point) for method in drawing._LOOKS for point in points], lines=False)
    figure.draw_without_rendering()
    assert axes.get_window_extent().y0 > figure.legends[0].get_window_extent().y1


def test_points_of_the_front_are_means_at_their_sizes(runs):
    frame = records.table(runs)
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


def test_every_method_is_a_row_with_its_interval(runs):
    frame = records.table(runs)
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
        place(tmp_path, finished(accuracy=0.9), id=f"{number:02}")
    frame = records.table(records.read(tmp_path)[0])
    (axes,) = figures.methods(records.group(frame), frame).figure.axes
    assert axes.get_title(loc="left").endswith(f"({figures._MOST_ROWS} of {figures._MOST_ROWS + 2})")
    assert len({text.get_text() for text in axes.get_yticklabels()}) == figures._MOST_ROWS


def test_lists_are_as_high_as_their_rows_and_fill_the_shorter_column():
    lengths = (2, 20, 3, 4)
    figure, drawn = drawing.lists(lengths, wide=4.6)
    figure.draw_without_rendering()
    boxes = [axes.get_position() for axes in drawn]
    left, right = boxes[0].x0, boxes[1].x0
    assert [round(box.x0, 6) for box in boxes] == [round(each, 6) for each in (left, right, left, left)]
    assert boxes[0].y0 > boxes[2].y1 > boxes[2].y0 > boxes[3].y1
    inches = [box.height * figure.get_figheight() for box in boxes]
    assert sorted(inches) == [inches[number] for number in np.argsort(lengths)]
    assert inches[1] > 20 * 0.2


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
    assert "hatched" in figures._of_differences(compared)
    assert "hatched" not in figures._of_differences(compared.assign(metric="mse"))
    assert "below zero is better" in figures._of_differences(compared.assign(metric="mse"))


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


def test_a_report_draws_each_figure_that_it_has_numbers_for(tmp_path, runs):
    modules = calibrated()[1]
    runs_of = [run for run in runs if run.row["method"] == "partial"]
    (runs_of[0].directory / "calibration.json").write_text(json.dumps({"baseline": 0.87, "modules": modules}))
    frame = records.table(runs)
    old = tmp_path / "report" / "figures" / "differences.png"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"of an earlier report")
    predictions = Predictions(tmp_path)
    compared = tables.differences(runs, predictions).rows
    drawn = figures.draw_gallery(runs, records.group(frame), compared, predictions, tmp_path)
    stems = [each.files[0].stem for each in drawn]
    assert stems == ["pareto", "methods", "training", "sparsity", "calibration", "sparsity_agreement"]
    assert not old.exists()
    for each in drawn:
        assert [file.suffix for file in each.files] == [".png", ".svg"]
        assert min(imread(each.files[0]).shape[:2]) > 200
        assert each.files[1].read_text(encoding="utf-8").rstrip().endswith("</svg>")


def test_sparsities_stand_in_their_cells(runs):
    figure = figures.sparsity(runs).figure
    said = [text.get_text() for axes in figure.axes[:2] for text in axes.texts]
    assert said == ["20", "40", "40", "50"]


def test_the_front_is_what_nothing_beats_at_its_size():
    points = [(10, 0.5), (100, 0.4), (100, 0.7), (50, 0.5), (1000, 0.9), (2000, 0.9)]
    assert figures.front(points, "accuracy") == [(10, 0.5), (100, 0.7), (1000, 0.9)]
    assert figures.front(points, "mse") == [(10, 0.5), (100, 0.4)]


def test_agreement_of_predictions_is_over_common_seeds(tmp_path):
    for seed in (0, 1):
        leave(tmp_path, "partial", wrong=20, seed=seed)
        leave(tmp_path, "lora", wrong=50, seed=seed + 1)
    leave(tmp_path, "probe", wrong=0, seed=7)
    table = records.group(rows_of(tmp_path))
    order = table["method"].tolist()
    matrix = figures.prediction_agreement(table, Predictions(tmp_path))
    assert matrix[order.index("partial"), order.index("lora")] == pytest.approx(1 - 30 / 200)
    assert np.isnan(matrix[order.index("partial"), order.index("probe")])
    assert figures.prediction_agreement(table.head(1), Predictions(tmp_path)) is None


def test_nothing_is_read_of_broken_predictions(tmp_path):
    leave(tmp_path, "partial", wrong=20)
    leave(tmp_path, "lora", wrong=20)
    for file in tmp_path.rglob("predictions.parquet"):
        file.write_bytes(b"no parquet")
    table = records.group(rows_of(tmp_path))
    assert figures.prediction_agreement(table, Predictions(tmp_path)) is None
