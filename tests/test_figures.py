"""Figures of a run: that what is drawn is what the record says."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from partial_lora import figures

KINDS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def record(depth=3, kinds=KINDS, start="timm_model.blocks"):
    """A result.json with a different sparsity everywhere and five looks at validation, the fourth the best."""
    history = [
        {"loss": 2.0 / step, "grad_norm": 1.0, "learning_rate": 1e-3, "step": step} for step in range(10, 60, 10)
    ]
    for step, accuracy in zip((12, 24, 36, 48, 60), (0.5, 0.8, 0.9, 0.975, 0.96), strict=True):
        history.append({"eval_loss": 1 - accuracy, "eval_accuracy": accuracy, "eval_runtime": 1.0, "step": step})
    history.append({"train_loss": 0.3, "train_runtime": 30.0, "step": 60})
    modules = [f"{start}.{block}.{kind}" for block in range(depth) for kind in kinds]
    return {
        "seed": 0,
        "config": {"method": {"name": "partial"}, "model": {"name": "tiny_vit"}, "task": {"name": "digits"}},
        "parameters": {"adapter_sparsity": 0.31},
        "sparsity": {
            module: {"rows": index / 40, "columns": 0.95 - index / 50} for index, module in enumerate(modules)
        },
        "metrics": {"test": {"primary": "accuracy", "accuracy": 0.9512, "loss": 0.2}},
        "history": history,
    }


@pytest.fixture
def saved(monkeypatch):
    """The figures that were written, to look at what is in them."""
    kept = []
    write = Figure.savefig

    def keep(figure, *arguments, **options):
        kept.append(figure)
        write(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def test_every_module_is_at_its_kind_and_depth(tmp_path, saved):
    result = record()
    assert figures.sparsity_by_depth(result, tmp_path / "sparsity.png") == tmp_path / "sparsity.png"
    rows, columns = saved[0].axes[:2]
    for axes, axis in ((rows, "rows"), (columns, "columns")):
        assert tuple(label.get_text() for label in axes.get_yticklabels()) == KINDS
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
    assert figures.place(module) == (kind, depth)


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
    assert labels[1:] == ["best on validation: 97.50%, step 48", "test, once at the end: 95.12%"]


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


@pytest.mark.parametrize("draw", [figures.sparsity_by_depth, figures.training_curve])
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
