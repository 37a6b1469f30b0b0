"""The benchmarks: what they count and how they judge, by hand, and a run of each on tiny models."""

from __future__ import annotations

import gc
import json
from types import SimpleNamespace

import bench
import numpy as np
import pytest
import torch
from checkout import RESULTS, needs_results

VARIANTS = ["floor", "dense", "rows_columns", "element", "shira"]
CELLS = [("vit_b16", 8), ("llama_8l", 8)]


@pytest.fixture(scope="module", autouse=True)
def in_this_process():
    """The allocator stays as it is, and what other tests have left is not walked through when tensors are counted."""
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "keep_freed_memory", list)
        yield
    gc.unfreeze()
    gc.collect()
    gc.freeze()  # what is left, as it was


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of a quick run of all models and variants."""
    out = tmp_path_factory.mktemp("bench")
    bench.main(["adapter", "--quick", "--ranks", "8", "--repeats", "6", "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def result(out) -> dict:
    return json.loads((out / "adapter.json").read_text(encoding="utf-8"))


def test_every_model_rank_and_variant_is_measured(result):
    assert [(cell["model"], cell["rank"]) for cell in result["cells"]] == CELLS
    for cell in result["cells"]:
        assert cell["modules"] == {"vit_b16": 8, "llama_8l": 14}[cell["model"]]
        assert list(cell["variants"]) == list(cell["ratios"]) == VARIANTS
        for name, variant in cell["variants"].items():
            every = bench.EVERY if name in ("element", "shira") else 1
            assert variant["repetitions"] == list(range(0, 6, every))
            assert len(variant["seconds"]) == 6 // every
    assert {"torch", "peft", "partial-lora"} <= set(result["machine"]["versions"])


def test_bytes_are_proportional_to_what_the_masks_keep(result):
    for cell in result["cells"]:
        floor, dense, rows_columns, element, shira = (cell["variants"][name] for name in VARIANTS)
        for variant in (rows_columns, element):
            kept = variant["trainable_parameters"]
            assert variant["gradient_bytes"] == 4 * kept
            assert variant["optimizer_bytes"] == 8 * kept + 4 * 2 * cell["modules"]
            assert variant["file_bytes"]["dense"] == pytest.approx(dense["file_bytes"]["dense"], rel=0.02)
            assert 4 * kept < variant["file_bytes"]["compact"] <= 4 * kept + 400 * cell["modules"]
        assert floor["file_bytes"] == {"dense": None, "compact": None}
        assert dense["file_bytes"]["compact"] is shira["file_bytes"]["compact"] is None
        assert shira["trainable_parameters"] == rows_columns["trainable_parameters"]
        assert rows_columns["trainable_parameters"] / dense["trainable_parameters"] == pytest.approx(0.13, abs=0.01)
        assert floor["saved_bytes"] < rows_columns["saved_bytes"] < dense["saved_bytes"]
        assert floor["saved_bytes"] < element["saved_bytes"]
        assert [cell["ratios"][name]["saved"]["ratio"] for name in ("floor", "dense")] == [0, 1]


@pytest.mark.parametrize("name", bench.QUICK_MODELS)
def test_variants_share_the_frozen_tensors_and_the_floor_goes_as_deep_as_it_should(name):
    model = bench.QUICK_MODELS[name]()
    base, batch = model.build(), model.batch()
    frozen = {parameter.data_ptr() for parameter in base.parameters()}
    losses = []
    for name in VARIANTS:
        variant = bench.built(name, base, model, 4)
        assert {each.data_ptr() for each in variant.parameters() if not each.requires_grad} == frozen
        losses.append(variant(**batch).loss.item())
        if name == "floor":  # down to the first block
            assert not bench.trainable(variant)
            seen, block = {}, variant.get_submodule(model.first_block)
            block.register_forward_pre_hook(lambda _, args, seen=seen: seen.update(entered=args[0]))
            block.register_forward_hook(lambda _, args, output, seen=seen: seen.update(left=output))
            variant(**batch).loss.backward()
            left = seen["left"] if torch.is_tensor(seen["left"]) else seen["left"][0]
            assert left.requires_grad
            assert seen["entered"].grad is not None
        for layer in variant.modules():
            if isinstance(layer, bench.ShiraLayer):
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
    assert bench.saved_bytes(Counted(loss), {"x": torch.ones(100)}) == kept


def test_state_bytes_of_a_model_counted_by_hand():
    model = Counted(torch.sum)
    assert bench.state_bytes(model, bench.optimizer_of(model), {"x": torch.ones(100)}) == {
        "trainable_parameters": 100,
        "gradient_bytes": 400,
        "optimizer_bytes": 804,
    }


def test_a_ratio_is_of_means_of_differences_without_their_ends():
    ones = np.ones(8)
    assert bench.ratio(1.25 * ones, 2 * ones, ones) == {"ratio": 0.25, "low": 0.25, "high": 0.25}
    floor = np.array([1, 1, 1, 1, 9.0])
    values, dense = floor + np.array([[1, 2, 3, 4, 50], [5, 6, 4, 90, 0]])  # in the last, dense LoRA costs nothing
    assert bench.ratio(values, dense, floor) == {"ratio": 3 / 5, "low": None, "high": None}
    draw = np.random.default_rng(0)
    values, dense, floor, slow = draw.random((4, 12)) + np.array([[3], [6], [1], [0]])
    steady, disturbed = (bench.ratio(values + s, dense + s, floor + s) for s in (0, 100 * slow))
    assert disturbed == pytest.approx(steady)  # what slows a whole repetition changes nothing
    assert steady["low"] < steady["ratio"] < steady["high"]


@needs_results
@pytest.mark.parametrize("name", bench.PAGES)
def test_the_records_here_have_the_page_that_is_beside_them(name) -> None:
    record = json.loads((RESULTS / "bench" / f"{name}.json").read_text())
    assert bench.PAGES[name](record).rstrip() + "\n" == (RESULTS / "bench" / f"{name}.md").read_text()


# Whole runs


def test_a_step_of_a_method_is_weighed_by_its_run() -> None:
    measured = bench.work("partial", 3, ("model=tiny_vit", "task=digits", "calibration.budget=0.13"))
    assert min(measured.values()) > 0


@pytest.mark.parametrize("variant", bench.LONG_TITLES)
def test_a_step_on_a_long_text_keeps_less_with_gradient_checkpointing(variant) -> None:
    plain, checkpointed = (bench.work(variant, 1, [way, "quick"]) for way in bench.WAYS[:2])
    assert plain["parameters"] == checkpointed["parameters"] > 0
    assert 0 < checkpointed["saved"] < plain["saved"] / 2


def test_a_quick_one_does_not_take_the_place_of_the_results() -> None:
    with pytest.raises(SystemExit):
        bench.main(["long", "--quick"])


def test_what_is_done_once_is_measured_for_both_adapters(tmp_path) -> None:
    bench.main(["growth", "--quick", "--repeats", "1", "--out", str(tmp_path)])
    ((size, found),) = json.loads((tmp_path / "runs.json").read_text())["growth"]["found"].items()
    assert size == "14"
    assert found["ours"][0].keys() == found["lora"][0].keys() | bench.BESIDE.keys()
