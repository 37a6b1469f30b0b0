"""Figures of a run's training: that what is drawn is what the record says."""

from __future__ import annotations

import pytest
from drawn_records import drawn_curves, kept_figures, record
from matplotlib.image import imread

from partial_lora.report import figures


@pytest.fixture
def saved(monkeypatch):
    return kept_figures(monkeypatch)


def test_the_curve_is_the_history(tmp_path, saved):
    result = record()
    figures.training_curve(result, tmp_path / "training.png")
    above, below = saved[0].axes
    training, validation = above.lines
    assert training.get_xydata().tolist() == [[e["step"], e["loss"]] for e in result["history"] if "loss" in e]
    assert validation.get_xydata().tolist() == [
        [e["step"], e["eval_loss"]] for e in result["history"] if "eval_loss" in e
    ]
    accuracy, best, test = below.lines
    assert accuracy.get_xydata().tolist() == [
        [e["step"], e["eval_accuracy"]] for e in result["history"] if "eval_accuracy" in e
    ]
    assert best.get_xydata().tolist() == [[48, 0.975]]
    assert set(test.get_ydata()) == {0.9512}
    labels = [text.get_text() for text in below.get_legend().get_texts()]
    assert labels[1:] == ["best on validation: 97.50 %, step 48", "test, once at the end: 95.12 %"]


@pytest.mark.parametrize("losses", [(2.3, 2.25), (2.3, 0.0)])
def test_the_axis_of_the_loss_fits_its_values_and_ends_at_zero(tmp_path, saved, losses):
    history = [{"loss": loss, "step": step} for step, loss in enumerate(losses)]
    figures.training_curve(record() | {"history": history}, tmp_path / "training.png")
    bottom, top = saved[0].axes[0].get_ylim()
    assert 0 <= bottom <= min(losses)
    assert max(losses) < top
    assert max(losses) - min(losses) > 0.8 * (top - bottom)


def test_lines_differ_without_colour(tmp_path, saved):
    figures.training_curve(record(), tmp_path / "training.png")
    above, below = saved[0].axes
    for axes in (above, below):
        looks = [(line.get_linestyle(), line.get_marker()) for line in axes.lines]
        assert len(set(looks)) == len(looks)


def test_another_primary_metric(tmp_path, saved):
    result = record() | {"metrics": {"validation": {"primary": "f1", "f1": 0.5}}}
    result["history"] = [{"eval_f1": 0.5, "step": 10}]
    figures.training_curve(result, tmp_path / "training.png")
    assert saved[0].axes[1].get_ylabel() == "f1"
    assert saved[0].axes[1].lines[0].get_xydata().tolist() == [[10, 0.5]]


def test_an_empty_history_is_no_figure(tmp_path):
    assert (
        figures.training_curve(record() | {"history": [{"train_runtime": 1.0, "step": 0}]}, tmp_path / "t.png") is None
    )
    assert list(tmp_path.iterdir()) == []


def test_training_loss_alone(tmp_path):
    result = record() | {"history": [{"loss": 1.0, "step": 1}], "metrics": {}}
    assert figures.training_curve(result, tmp_path / "training.png").is_file()


@pytest.mark.parametrize("draw", [figures.sparsity_by_depth, drawn_curves, figures.training_curve])
def test_files_are_images_whole_and_the_same_twice(tmp_path, draw):
    first, second = draw(record(), tmp_path / "a.png"), draw(record(), tmp_path / "b.png")
    assert first.read_bytes() == second.read_bytes()
    pixels = imread(first)
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 500
    drawing, again = draw(record(), tmp_path / "a.svg"), draw(record(), tmp_path / "b.svg")
    assert drawing.read_text(encoding="utf-8").rstrip().endswith("</svg>")
    assert drawing.read_bytes() == again.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.svg", "b.png", "b.svg"]


def test_figures_need_no_display(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "tkagg")
    monkeypatch.delenv("DISPLAY", raising=False)
    assert figures.training_curve(record(), tmp_path / "training.png").is_file()
