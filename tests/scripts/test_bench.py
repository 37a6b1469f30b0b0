"""The benchmark of the adapter: what it counts, how it judges, and a run of it on tiny models."""

from __future__ import annotations

import copy
import gc
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import bench_adapter  # noqa: E402
import bench_measure  # noqa: E402
import bench_models  # noqa: E402
import bench_profile  # noqa: E402
import bench_report  # noqa: E402

VARIANTS = ["floor", "short_floor", "lora", "rows_columns", "element", "shira"]
MODULES = {"vit_b16": 8, "llama_8l": 14}


@pytest.fixture(scope="module", autouse=True)
def few_objects():
    """What other tests have left behind need not be walked through whenever tensors are counted."""
    gc.freeze()
    yield
    gc.unfreeze()
    gc.collect()
    gc.freeze()  # what is left, as it was


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the script leaves after a quick run of everything: all models, ranks and variants."""
    out = tmp_path_factory.mktemp("bench")
    script = ROOT / "scripts" / "bench_adapter.py"
    command = [sys.executable, str(script), "--quick", "--repeats", "16", "--every", "2", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 of 6: vit_b16 rank 8" in done.stdout
    assert "6 of 6: llama_8l rank 64" in done.stdout
    return out


@pytest.fixture(scope="module")
def result(folder) -> dict:
    return json.loads((folder / "adapter.json").read_text(encoding="utf-8"))


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the benchmark in this process, whose allocator stays as it is, on one tiny model."""
    monkeypatch.setattr(bench_measure, "keep_freed_memory", list)
    monkeypatch.setattr(bench_adapter, "_digest", lambda: "the code")

    def run(*words: str) -> Path:
        given = ["--quick", "--models", "vit_b16", "--variants", "rows_columns", "--repeats", "2"]
        bench_adapter.main([*given, "--out", str(tmp_path), *words])
        return tmp_path

    return run


@pytest.fixture
def measured(monkeypatch):
    """The ranks that are measured, in their order; the run is interrupted at rank 4, the first time."""
    measure_cell, ranks = bench_adapter.measure_cell, []

    def measure(options, model, rank):
        ranks.append(rank)
        if ranks.count(4) == 1 and rank == 4:
            raise KeyboardInterrupt
        return measure_cell(options, model, rank)

    monkeypatch.setattr(bench_adapter, "measure_cell", measure)
    return ranks


@pytest.fixture(scope="module")
def built() -> dict[str, torch.nn.Module]:
    """Every variant of the tiny ViT at rank 8, each after one step."""
    options = bench_adapter.arguments(["--quick", "--out", "nowhere"])
    variants, _ = bench_adapter.build_cell(options, bench_models.QUICK_MODELS["vit_b16"], 8)
    return {name: variant["model"] for name, variant in variants.items()}


def test_every_model_rank_and_variant_is_measured(result):
    cells = result["cells"]
    assert [(cell["model"], cell["rank"]) for cell in cells] == [(m, r) for m in MODULES for r in (8, 16, 64)]
    for cell in cells:
        assert cell["modules"] == MODULES[cell["model"]]
        assert list(cell["variants"]) == list(cell["ratios"]) == VARIANTS
        for variant in cell["variants"].values():
            assert list(variant["seconds"]) == ["forward", "backward", "optimizer"]
            assert {len(seconds) for seconds in variant["seconds"].values()} == {len(variant["repetitions"])}
        repetitions = [variant["repetitions"] for variant in cell["variants"].values()]
        assert repetitions == 4 * [list(range(16))] + 2 * [list(range(0, 16, 2))]
    settings = {"variants": VARIANTS[3:], "sparsity": 0.87, "repeats": 16, "every": 2, "quick": True}
    assert result["settings"] == settings
    assert result["machine"]["threads"] == 1
    assert {"torch", "peft", "partial-lora"} <= set(result["machine"]["versions"])


def test_state_is_proportional_to_what_the_masks_keep(result):
    for cell in result["cells"]:
        for name in ("rows_columns", "element"):
            variant = cell["variants"][name]
            assert variant["trainable_parameters"] == variant["kept_entries"]
            assert variant["gradient_bytes"] == 4 * variant["kept_entries"]
            assert variant["optimizer_bytes"] == 8 * variant["kept_entries"] + 4 * 2 * cell["modules"]
    state = [aim for aim in result["aims"] if aim["aim"].startswith("trainable state")]
    assert len(state) == 2 * 6
    assert {aim["verdict"] for aim in state} == {"met"}


def test_shira_has_the_parameters_of_rows_and_columns(result, built):
    for cell in result["cells"]:
        kept = {name: cell["variants"][name]["trainable_parameters"] for name in ("shira", "rows_columns", "lora")}
        assert kept["shira"] == kept["rows_columns"]
        assert kept["rows_columns"] / kept["lora"] == pytest.approx(0.13, abs=0.01)
    for layer in built["shira"].modules():
        if isinstance(layer, bench_models.ShiraLayer):
            positions = layer.shira_indices["default"]
            assert positions.shape == (2, layer.shira_weight["default"].numel())
            assert positions.unique(dim=1).shape == positions.shape
            assert (positions.amax(1) < torch.tensor([layer.out_features, layer.in_features])).all()


def test_saved_bytes_lie_between_the_floor_and_dense_lora(result):
    for cell in result["cells"]:
        saved = {name: variant["saved_bytes"] for name, variant in cell["variants"].items()}
        assert saved["floor"] < saved["rows_columns"] < saved["lora"]
        assert saved["floor"] < saved["element"]
        assert cell["ratios"]["floor"]["saved"]["ratio"] == 0
        assert cell["ratios"]["lora"]["saved"]["ratio"] == 1


def test_files(result):
    for cell in result["cells"]:
        files = {name: variant["file_bytes"] for name, variant in cell["variants"].items()}
        assert files["floor"] == {"dense": None, "compact": None}
        assert files["lora"]["compact"] is files["shira"]["compact"] is None
        for name in ("rows_columns", "element"):
            assert files[name]["dense"] == pytest.approx(files["lora"]["dense"], rel=0.02)
            kept = cell["variants"][name]["kept_entries"]
            assert 4 * kept < files[name]["compact"] <= 4 * kept + 400 * cell["modules"]


def test_the_page_has_each_table(folder, result):
    page = (folder / "adapter.md").read_text(encoding="utf-8")
    titles = [line for line in page.splitlines() if line.startswith("#")]
    assert titles == [
        "# The adapter against dense LoRA",
        "## Aims",
        "## A tiny ViT, 2 images of 32 px a step, 8 adapted modules",
        "## A tiny Llama, one text of 16 tokens a step, 14 adapted modules",
        "## How it is measured",
        "## Where",
    ]
    assert "these times mean nothing" in page
    rows = [[entry.strip() for entry in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    for variant in VARIANTS:
        for rank in ("8", "16", "64"):
            assert (
                len([row for row in rows if row[:2] == [rank, bench_report.NAMES[variant]]]) == 4
            )  # 2 models, 2 tables
    first = result["cells"][0]["variants"]["floor"]
    step = np.median(np.sum(list(first["seconds"].values()), axis=0))
    shown = next(row for row in rows if row[:2] == ["8", "frozen floor"])
    assert shown[2] == f"{2 / step:.2f}"  # two images a step
    assert shown[3].startswith(f"{step:.3f} [")
    assert len(result["aims"]) == 4 + 4 + 6 + 12
    assert not (folder / "parts").exists()


def test_an_interrupted_run_goes_on_where_it_was(run, measured, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run("--ranks", "2", "4")
    assert not (tmp_path / "adapter.json").exists()
    part = json.loads((tmp_path / "parts" / "vit_b16-r2.json").read_text(encoding="utf-8"))
    run("--ranks", "2", "4")
    assert measured == [2, 4, 4]
    cells = json.loads((tmp_path / "adapter.json").read_text(encoding="utf-8"))["cells"]
    assert cells[0]["variants"] == part["cell"]["variants"]
    assert not (tmp_path / "parts").exists()


@pytest.mark.parametrize("change", ["settings", "code", "broken"])
def test_what_was_measured_otherwise_is_measured_again(run, measured, monkeypatch, tmp_path, change):
    with pytest.raises(KeyboardInterrupt):
        run("--ranks", "2", "4")
    if change == "code":
        monkeypatch.setattr(bench_adapter, "_digest", lambda: "other code")
    if change == "broken":
        (tmp_path / "parts" / "vit_b16-r2.json").write_text("{")
    run("--ranks", "2", "4", "--sparsity", "0.5" if change == "settings" else "0.87")
    assert measured == [2, 4, 2, 4]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "8", "0"], "--ranks, --repeats and --every are whole numbers of at least 1"),
        (["--repeats", "0"], "--ranks, --repeats and --every are whole numbers of at least 1"),
        (["--sparsity", "1"], "--sparsity is 1.0: it is the share removed, between 0 and 1"),
        (["--models", "resnet"], "invalid choice: 'resnet'"),
        (["--variants", "lora"], "invalid choice: 'lora'"),
        (["--quick"], "give another folder with --out"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_built(words, message, monkeypatch, capsys):
    monkeypatch.setattr(bench_models, "build_variant", None)
    with pytest.raises(SystemExit) as refusal:
        bench_adapter.main(words)
    assert refusal.value.code == 2
    assert message in capsys.readouterr().err


def test_variants_share_the_frozen_tensors_and_start_as_the_same_model():
    model = bench_models.QUICK_MODELS["llama_8l"]
    base, batch = model.build(), model.batch()
    frozen = {parameter.data_ptr() for parameter in base.parameters()}
    losses = {}
    for name in VARIANTS:
        variant = bench_models.build_variant(name, base, model, 4, 0.5)
        own = {p.data_ptr() for p in variant.parameters() if not p.requires_grad}
        assert own == frozen
        losses[name] = variant(**batch).loss.item()
    assert len(set(losses.values())) == 1 or max(losses.values()) - min(losses.values()) < 1e-6


@pytest.mark.parametrize("model", bench_models.QUICK_MODELS.values(), ids=bench_models.QUICK_MODELS)
def test_the_floor_goes_down_to_the_first_block_and_the_short_floor_to_the_first_adapter(model):
    base, batch = model.build(), model.batch()
    for name, reached in (("floor", True), ("short_floor", False)):
        variant = bench_models.build_variant(name, base, model, 4, 0.5)
        assert not bench_measure.trainable(variant)
        seen = {}
        block = variant.get_submodule(model.first_block)
        block.register_forward_pre_hook(lambda _, args, seen=seen: seen.update(entered=args[0]))
        block.register_forward_hook(lambda _, args, output, seen=seen: seen.update(left=output))
        variant(**batch).loss.backward()
        left = seen["left"] if torch.is_tensor(seen["left"]) else seen["left"][0]
        assert left.requires_grad
        assert (seen["entered"].grad is not None) == reached


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
        self.weight = torch.nn.Parameter(torch.ones(100))
        self.loss = loss

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
    batch = {"x": torch.ones(100)}
    before = bench_measure.alive()
    model = Counted(torch.sum)
    model.index = torch.arange(10)
    state = bench_measure.state_bytes(model, bench_measure.optimizer_of(model), batch, before)
    assert state == {
        "trainable_parameters": 100,
        "trainable_tensors": 1,
        "gradient_bytes": 400,
        "optimizer_bytes": 804,
        "lasting_bytes": 80,
    }


def seconds(*values: float) -> np.ndarray:
    return np.array(values)


def test_a_ratio_of_steady_numbers_is_exact():
    ones = np.ones(8)
    assert bench_report.ratio(1.25 * ones, 2 * ones, ones) == {"ratio": 0.25, "low": 0.25, "high": 0.25}


def test_a_ratio_is_of_means_of_differences_without_their_ends():
    floor = seconds(1, 1, 1, 1, 9)
    values = floor + seconds(1, 2, 3, 4, 50)
    dense = floor + seconds(5, 6, 4, 90, 0)  # in the last, dense LoRA costs nothing: no ratio of its own
    assert bench_report.ratio(values, dense, floor) == {"ratio": 3 / 5, "low": None, "high": None}


def test_what_slows_a_whole_repetition_changes_nothing():
    draw = np.random.default_rng(0)
    values, dense, floor, slow = draw.random((4, 12)) + np.array([[3], [6], [1], [0]])
    steady, disturbed = (bench_report.ratio(values + s, dense + s, floor + s) for s in (0, 100 * slow))
    assert disturbed == pytest.approx(steady)
    assert steady["low"] < steady["ratio"] < steady["high"]


def test_intervals_hold_the_truth_as_often_as_they_say():
    draw, held, trials = np.random.default_rng(1), 0, 60
    for _ in range(trials):
        noise = 0.03 * draw.standard_normal((3, 24))
        found = bench_report.ratio(*(np.array([[1.06], [1.2], [1.0]]) + noise))  # 0.3 is the truth
        held += found["low"] <= 0.3 <= found["high"]
    assert held >= 0.9 * trials


def test_verdicts():
    def verdict(low, high):
        return bench_report.verdict({"ratio": 0.3, "low": low, "high": high}, 0.3)

    assert verdict(0.1, 0.3) == "met"
    assert verdict(0.31, 0.4) == "not met"
    assert verdict(0.3, 0.4) == "open: the limit is inside the interval"
    assert verdict(None, None) == "open: too few repetitions"


def test_one_byte_more_of_state_is_seen(result):
    cell = copy.deepcopy(result["cells"][0])
    cell["variants"]["element"]["optimizer_bytes"] += 1
    cell["ratios"] = bench_report.ratios(cell["variants"])
    verdicts = {aim["variant"]: aim["verdict"] for aim in bench_report.judge([cell]) if "state" in aim["aim"]}
    assert verdicts == {"rows_columns": "met", "element": "not met"}


def test_own_operations_are_calls_beyond_those_of_the_floor():
    floor = {("mm", "2,3"): (4.0, 4), ("add", "2"): (1.0, 2)}
    spent = {("mm", "2,3"): (6.0, 6), ("mm", "9,9"): (1.5, 1), ("add", "2"): (0.6, 1)}
    assert bench_profile.own_operations(spent, floor) == {"mm": 2.0 + 1.5, "add": -0.5}


def test_a_profile_says_what_an_adapter_adds(run):
    folder = run("--profile", "--ranks", "2")
    (found,) = json.loads((folder / "profile.json").read_text(encoding="utf-8"))["profiles"]
    assert set(found["own"]) == set(found["same"]) == {"floor", "short_floor", "lora", "rows_columns"}
    assert sum(found["own"]["short_floor"].values()) == 0
    assert found["own"]["rows_columns"]["aten::index_select"] > 0
    page = (folder / "profile.md").read_text(encoding="utf-8")
    assert "## A tiny ViT, 2 images of 32 px a step, rank 2" in page
    assert "| own operations, together " in page
