"""Figures of a calibration: that what is drawn is what was found."""

from __future__ import annotations

import numpy as np
import pytest
from drawn_records import KINDS, calibrated, kept_figures, record
from matplotlib.colors import to_rgb

from partial_lora.report import figures, records


@pytest.fixture
def saved(monkeypatch):
    return kept_figures(monkeypatch)


def test_every_module_is_at_its_kind_and_depth(tmp_path, saved):
    result = record()
    assert figures.sparsity_by_depth(result, tmp_path / "sparsity.png") == tmp_path / "sparsity.png"
    rows, columns = saved[0].axes[:2]
    assert tuple(label.get_text() for label in rows.get_yticklabels()) == KINDS
    assert rows.get_shared_y_axes().joined(rows, columns)  # side by side, and named once
    for axes, axis in ((rows, "rows"), (columns, "columns")):
        cells = axes.images[0].get_array()
        for line, kind in enumerate(KINDS):
            for depth in range(3):
                assert cells[line, depth] == result["sparsity"][f"timm_model.blocks.{depth}.{kind}"][axis]
        written = [text.get_text() for text in axes.texts]
        assert written == [f"{100 * value:.0f}" for value in np.asarray(cells).ravel()]
    assert rows.images[0].norm.vmin == 0
    assert rows.images[0].norm.vmax == 1  # the same scale in every figure


def test_modules_that_a_block_lacks_stay_empty(tmp_path, saved):
    result = record()
    del result["sparsity"]["timm_model.blocks.1.mlp.fc1"]
    figures.sparsity_by_depth(result, tmp_path / "sparsity.png")
    assert saved[0].axes[0].images[0].get_array().mask.sum() == 1
    assert len(saved[0].axes[0].texts) == 11


def test_depth_is_in_order_of_numbers(tmp_path, saved):
    figures.sparsity_by_depth(record(depth=12), tmp_path / "sparsity.png")
    ticks = [label.get_text() for label in saved[0].axes[1].get_xticklabels()]
    assert ticks == [str(block) for block in range(12)]


def test_a_deep_model_has_no_numbers_in_its_cells(tmp_path, saved):
    kinds = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
    figures.sparsity_by_depth(record(32, kinds, "model.layers"), tmp_path / "sparsity.png")
    assert len(saved[0].axes[0].texts) == 0
    assert saved[0].axes[0].images[0].get_array().shape == (3, 32)


@pytest.mark.parametrize(
    ("module", "kind", "depth"),
    [
        ("timm_model.blocks.3.attn.qkv", "timm_model.blocks.attn.qkv", (3,)),
        ("layers.1.blocks.0.mlp.fc1", "layers.blocks.mlp.fc1", (1, 0)),
        ("fc1", "fc1", ()),
    ],
)
def test_place(module, kind, depth):
    assert records.place(module) == (kind, depth)


@pytest.mark.parametrize(
    "modules",
    [
        ["encoder.layers.0.blocks.0.qkv", "encoder.layers.0.blocks.1.qkv", "encoder.layers.1.blocks.0.qkv"],
        ["dense"],
        ["a", "a.b", "layers.0.a"],
    ],
)
def test_any_names_can_be_drawn(tmp_path, modules):
    result = record() | {"sparsity": {module: {"rows": 0.5, "columns": 0.0} for module in modules}}
    assert figures.sparsity_by_depth(result, tmp_path / "sparsity.png").is_file()


def test_without_an_adapter_there_is_no_figure(tmp_path):
    assert figures.sparsity_by_depth(record() | {"sparsity": {}}, tmp_path / "sparsity.png") is None
    assert list(tmp_path.iterdir()) == []


def panels_of(figure):
    """The panels that show a module, by (kind, depth) as places in the grid."""
    shape = figure.axes[0].get_subplotspec().get_gridspec().get_geometry()
    panels = np.asarray(figure.axes, dtype=object).reshape(shape)
    return {index: panel for index, panel in np.ndenumerate(panels) if panel.get_visible()}


def test_a_panel_is_a_module_and_shows_what_is_known_of_it(tmp_path, saved):
    result, modules = calibrated(depth=2)
    figures.draw_curves(result, modules, tmp_path / "curves.png")
    panels = panels_of(saved[0])
    assert sorted(panels) == [(kind, depth) for kind in range(len(KINDS)) for depth in range(2)]
    for (kind, depth), axes in panels.items():
        found = modules[f"timm_model.blocks.{depth}.{KINDS[kind]}"]
        low, high = axes.get_ylim()
        for place, axis in enumerate(("rows", "columns")):
            of_axis = [line for line in axes.lines if line.get_color() == figures._CURVE_LOOKS[axis]["color"]]
            lows, highs, chosen = of_axis
            assert chosen.get_xydata().tolist() == [[found[axis]["sparsity"], 0.9 * 0.87]]
            levels = [0.0] + [level for level, _ in found[axis]["curve"]]
            assert lows.get_xdata().tolist() == highs.get_xdata().tolist() == levels
            passing = len(levels) - 5
            expected = [0.87, *[0.9 * 0.87] * passing, 0.1, 0.2, np.nan, low]
            assert np.allclose(lows.get_ydata(), expected, equal_nan=True)
            assert np.allclose(highs.get_ydata(), [0.87, *[0.95] * passing, 0.773, 0.2, np.nan, 0.3], equal_nan=True)
            assert len(axes.collections) == 2
            assert np.allclose(axes.collections[place].get_facecolor()[0][:3], to_rgb(of_axis[0].get_color()))
        assert low < 0.1
        assert high > 0.95


def test_the_line_to_hold_follows_the_rule(tmp_path, saved):
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
        figures.draw_curves(result, modules, tmp_path / "curves.png")
        dotted = next(line for line in saved[-1].axes[0].lines if line.get_linestyle() == ":")
        assert list(dotted.get_ydata()) == pytest.approx([held, held])


def test_of_many_depths_a_dozen_are_drawn_the_first_and_the_last_among_them(tmp_path, saved):
    result, modules = calibrated(32, kinds=("self_attn.q_proj",), start="model.layers")
    figures.draw_curves(result, modules, tmp_path / "curves.png")
    titles = [axes.get_title() for axes in panels_of(saved[0]).values()]
    assert len(titles) == 12
    assert (titles[0], titles[-1]) == ("0", "31")
    assert "(12 of 32)" in saved[0].get_suptitle()


def test_curves_differ_without_colour(tmp_path, saved):
    result, modules = calibrated(depth=1)
    figures.draw_curves(result, modules, tmp_path / "curves.png")
    axes = saved[0].axes[0]
    looks = {(line.get_linestyle(), line.get_marker()) for line in axes.lines}
    assert len(looks) == 6  # intact, to hold; and of each axis a line and a marker
    assert len({band.get_hatch() for band in axes.collections}) == 2


def test_a_curve_after_earlier_choices_does_not_start_from_the_intact_model(tmp_path, saved):
    result, modules = calibrated(depth=1)
    result["calibration"]["scope"] = "cumulative"
    modules["timm_model.blocks.0.attn.proj"]["rows"]["curve"] = []
    figures.draw_curves(result, modules, tmp_path / "curves.png")
    for axes in saved[0].axes[:2]:
        assert 0.0 not in [line.get_xdata()[0] for line in axes.lines[2:] if len(line.get_xdata()) > 1]


def test_a_calibration_without_curves_is_drawn_too(tmp_path):
    result, modules = calibrated(depth=1)
    bare = {name: {axis: {"sparsity": of["sparsity"]} for axis, of in axes.items()} for name, axes in modules.items()}
    assert figures.draw_curves(result, bare, tmp_path / "curves.png").is_file()


def test_a_directory_gets_every_figure_as_png_and_svg(tmp_path):
    result, modules = calibrated(depth=1)
    written = figures.draw_calibration(result, modules, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in written)
    assert sorted(path.name for path in written) == ["curves.png", "curves.svg", "sparsity.png", "sparsity.svg"]
    uncalibrated = tmp_path / "uncalibrated"
    uncalibrated.mkdir()
    figures.draw_calibration(result | {"sparsity": {}}, None, uncalibrated)
    assert list(uncalibrated.iterdir()) == []
