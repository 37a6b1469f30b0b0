"""The benchmark of the adapter: what it counts, how it judges, and a run of it on tiny models."""

from __future__ import annotations

import copy
import gc
import json
from types import SimpleNamespace

import bench_adapter
import bench_measure
import bench_models
import bench_profile
import bench_report
import numpy as np
import pytest
import torch

VARIANTS = ["floor", "short_floor", "lora", "rows_columns", "element", "shira"]
CELLS = [(model, rank) for model in ("vit_b16", "llama_8l") for rank in (8, 16)]
ONE = ("--models", "vit_b16", "--repeats", "2", "--ranks", "2")


@pytest.fixture(scope="module", autouse=True)
def in_this_process():
    """The allocator stays as it is, and what other tests have left is not walked through when tensors are counted."""
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_measure, "keep_freed_memory", list)
        yield
    gc.unfreeze()
    gc.collect()
    gc.freeze()  # what is left, as it was


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of a quick run of all models and variants."""
    out = tmp_path_factory.mktemp("bench")
    bench_adapter.main(["--quick", "--ranks", "8", "16", "--repeats", "24", "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def result(out) -> dict:
    return json.loads((out / "adapter.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "words",
    [["--ranks", "8", "0"], ["--repeats", "0"], ["--models", "resnet"]],
)
def test_wrong_words_are_refused_before_anything_is_built(words, monkeypatch, capsys):
    monkeypatch.setattr(bench_models, "build_variant", None)
    with pytest.raises(SystemExit) as refusal:
        bench_adapter.main(words)
    assert refusal.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_every_model_rank_and_variant_is_measured(result):
    assert [(cell["model"], cell["rank"]) for cell in result["cells"]] == CELLS
    for cell in result["cells"]:
        assert cell["modules"] == {"vit_b16": 8, "llama_8l": 14}[cell["model"]]
        assert list(cell["variants"]) == list(cell["ratios"]) == VARIANTS
        for name, variant in cell["variants"].items():
            every = bench_adapter.EVERY if name in ("element", "shira") else 1
            assert variant["repetitions"] == list(range(0, 24, every))
            assert {stage: len(each) for stage, each in variant["seconds"].items()} == dict.fromkeys(
                ("forward", "backward", "optimizer"), 24 // every
            )
    assert {"torch", "peft", "partial-lora"} <= set(result["machine"]["versions"])


def test_bytes_are_proportional_to_what_the_masks_keep(result):
    for cell in result["cells"]:
        floor, _, lora, rows_columns, element, shira = (cell["variants"][name] for name in VARIANTS)
        for variant in (rows_columns, element):
            kept = variant["kept_entries"]
            assert variant["trainable_parameters"] == kept
            assert variant["gradient_bytes"] == 4 * kept
            assert variant["optimizer_bytes"] == 8 * kept + 4 * 2 * cell["modules"]
            assert variant["file_bytes"]["dense"] == pytest.approx(lora["file_bytes"]["dense"], rel=0.02)
            assert 4 * kept < variant["file_bytes"]["compact"] <= 4 * kept + 400 * cell["modules"]
        assert floor["file_bytes"] == {"dense": None, "compact": None}
        assert lora["file_bytes"]["compact"] is shira["file_bytes"]["compact"] is None
        assert shira["trainable_parameters"] == rows_columns["trainable_parameters"]
        assert rows_columns["trainable_parameters"] / lora["trainable_parameters"] == pytest.approx(0.13, abs=0.01)
        assert floor["saved_bytes"] < rows_columns["saved_bytes"] < lora["saved_bytes"]
        assert floor["saved_bytes"] < element["saved_bytes"]
        assert [cell["ratios"][name]["saved"]["ratio"] for name in ("floor", "lora")] == [0, 1]
    state = [aim["verdict"] for aim in result["aims"] if aim["aim"].startswith("trainable state")]
    assert state == ["met"] * 2 * len(CELLS)
    cell = copy.deepcopy(result["cells"][0])
    cell["variants"]["element"]["optimizer_bytes"] += 1  # one byte more is seen
    cell["ratios"] = bench_report.ratios(cell["variants"])
    verdicts = {aim["variant"]: aim["verdict"] for aim in bench_report.judge([cell]) if "state" in aim["aim"]}
    assert verdicts == {"rows_columns": "met", "element": "not met"}


@pytest.mark.parametrize("model", bench_models.QUICK_MODELS.values(), ids=bench_models.QUICK_MODELS)
def test_variants_share_the_frozen_tensors_and_floors_go_as_deep_as_they_should(model):
    base, batch = model.build(), model.batch()
    frozen = {parameter.data_ptr() for parameter in base.parameters()}
    losses = []
    for name in VARIANTS:
        variant = bench_models.build_variant(name, base, model, 4, 0.5)
        assert {each.data_ptr() for each in variant.parameters() if not each.requires_grad} == frozen
        losses.append(variant(**batch).loss.item())
        if name in ("floor", "short_floor"):  # down to the first block, and to the first adapter
            assert not bench_measure.trainable(variant)
            seen, block = {}, variant.get_submodule(model.first_block)
            block.register_forward_pre_hook(lambda _, args, seen=seen: seen.update(entered=args[0]))
            block.register_forward_hook(lambda _, args, output, seen=seen: seen.update(left=output))
            variant(**batch).loss.backward()
            left = seen["left"] if torch.is_tensor(seen["left"]) else seen["left"][0]
            assert left.requires_grad
            assert (seen["entered"].grad is not None) == (name == "floor")
        for layer in variant.modules():
            if isinstance(layer, bench_models.ShiraLayer):
                positions = layer.shira_indices["default"]
                assert positions.shape == (2, layer.shira_weight["default"].numel())
                assert positions.unique(dim=1).shape == positions.shape
                assert (positions.amax(1) < torch.tensor([layer.out_features, layer.in_features])).all()
    assert max(losses) - min(losses) < 1e-6


# Counts and ratios by hand


class Hidden(torch.autograd.Function):
    """x² summed, which keeps x where autograd does not see it."""

    @staticmethod
    def forward(ctx, x):
        ctx.kept = x.clone()
        return x.square().sum()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.kept * gradient


class Counted(torch.nn.Module):
    def __init__(self, loss) -> None:
        super().__init__()
        self.weight, self.loss = torch.nn.Parameter(torch.ones(100)), loss

    def forward(self, x):
        return SimpleNamespace(loss=self.loss(self.weight * x))


@pytest.mark.parametrize(
    ("loss", "kept"),
    [
        (torch.sum, 0),  # the product itself keeps the weight and the batch, which existed before
        (lambda y: y.exp().sum(), 400),  # keeps its result
        (lambda y: (y.exp()[:50] * 2).exp().sum(), 400 + 200),  # one whole, of the other the result alone
        (Hidden.apply, 400),
    ],
    ids=["nothing", "one", "whole", "hidden"],
)
def test_saved_bytes_of_a_model_counted_by_hand(loss, kept):
    assert bench_measure.saved_bytes(Counted(loss), {"x": torch.ones(100)}) == kept


def test_state_bytes_of_a_model_counted_by_hand():
    batch, before = {"x": torch.ones(100)}, bench_measure.alive()
    model = Counted(torch.sum)
    model.index = torch.arange(10)
    assert bench_measure.state_bytes(model, bench_measure.optimizer_of(model), batch, before) == {
        "trainable_parameters": 100,
        "trainable_tensors": 1,
        "gradient_bytes": 400,
        "optimizer_bytes": 804,
        "lasting_bytes": 80,
    }


def test_a_ratio_is_of_means_of_differences_without_their_ends():
    ones = np.ones(8)
    assert bench_report.ratio(1.25 * ones, 2 * ones, ones) == {"ratio": 0.25, "low": 0.25, "high": 0.25}
    floor = np.array([1, 1, 1, 1, 9.0])
    values, dense = floor + np.array([[1, 2, 3, 4, 50], [5, 6, 4, 90, 0]])  # in the last, dense LoRA costs nothing
    assert bench_report.ratio(values, dense, floor) == {"ratio": 3 / 5, "low": None, "high": None}
    draw = np.random.default_rng(0)
    values, dense, floor, slow = draw.random((4, 12)) + np.array([[3], [6], [1], [0]])
    steady, disturbed = (bench_report.ratio(values + s, dense + s, floor + s) for s in (0, 100 * slow))
    assert disturbed == pytest.approx(steady)  # what slows a whole repetition changes nothing
    assert steady["low"] < steady["ratio"] < steady["high"]


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.1, 0.3, "met"), (0.31, 0.4, "not met"), (0.3, 0.4, "open"), (None, None, "open")]
)
def test_verdicts(low, high, verdict):
    assert bench_report.verdict({"ratio": 0.3, "low": low, "high": high}, 0.3).partition(":")[0] == verdict


# Profiles


def test_a_profile_has_the_operations_that_an_adapter_adds(tmp_path):
    floor = {("mm", "2,3"): (4.0, 4), ("add", "2"): (1.0, 2)}
    spent = {("mm", "2,3"): (6.0, 6), ("mm", "9,9"): (1.5, 1), ("add", "2"): (0.6, 1)}
    assert bench_profile.own_operations(spent, floor) == {"mm": 2.0 + 1.5, "add": -0.5}
    bench_adapter.main(["--quick", "--profile", *ONE, "--out", str(tmp_path)])
    (profile,) = json.loads((tmp_path / "profile.json").read_text(encoding="utf-8"))["profiles"]
    assert set(profile["own"]) == set(profile["same"]) == set(VARIANTS)
    assert sum(profile["own"]["short_floor"].values()) == 0
    assert profile["own"]["rows_columns"]["aten::index_select"] > 0
    page = (tmp_path / "profile.md").read_text(encoding="utf-8")
    assert "## A tiny ViT, 2 images of 32 px a step, rank 2" in page
    assert "| own operations, together " in page
