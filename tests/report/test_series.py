"""The numbers behind the figures of a report."""

from __future__ import annotations

import numpy as np
import pytest
from recorded_runs import budget, leave, place, record, rows_of

from partial_lora.report import figures, records
from partial_lora.report.records import Predictions


def test_the_front_is_what_nothing_beats_at_its_size():
    points = [(10, 0.5), (100, 0.4), (100, 0.7), (50, 0.5), (1000, 0.9), (2000, 0.9)]
    assert figures.front(points, "accuracy") == [(10, 0.5), (100, 0.7), (1000, 0.9)]
    assert figures.front(points, "mse") == [(10, 0.5), (100, 0.4)]


def test_a_band_is_over_the_steps_that_all_seeds_have():
    one = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 9.0}]
    other = [{"step": 2, "loss": 3.0}, {"step": 3, "loss": 0.0}]
    assert figures.band([one, other], "loss") == [(2, 2.0, 1.0, 3.0)]
    assert figures.band([one, []], "loss") == [(1, 2.0, 2.0, 2.0), (2, 1.0, 1.0, 1.0)]
    assert figures.band([[], []], "loss") == []
    broken = [{"step": 2, "loss": None}, {"step": 3, "loss": float("nan")}, {"step": 4, "loss": 1.0}]
    assert figures.band([broken], "loss") == [(4, 1.0, 1.0, 1.0)]


def test_a_map_is_of_partial_and_a_mean_over_its_seeds(tmp_path):
    sparse = {"blocks.0.qkv": {"rows": 0.2, "columns": 0.4}}
    for seed, rows in enumerate((0.2, 0.4)):
        place(tmp_path, record(seed=seed, sparsity={"blocks.0.qkv": {"rows": rows, "columns": 0.4}}))
    place(tmp_path, record("uniform", sparsity={"blocks.0.qkv": {"rows": 0.9, "columns": 0.9}}))
    place(tmp_path, record("lora", sparsity=sparse))
    (found,) = figures.maps(records.read(tmp_path)[0]).values()
    assert found["blocks.0.qkv"] == pytest.approx({"rows": 0.3, "columns": 0.4})


def test_calibrations_of_a_model_are_correlated(tmp_path):
    modules = [f"blocks.{block}.qkv" for block in range(4)]
    rising = {name: {"rows": 0.1 * number, "columns": 0.1 * number + 0.2} for number, name in enumerate(modules)}
    falling = {name: {axis: 0.9 - value for axis, value in axes.items()} for name, axes in rising.items()}
    place(tmp_path, record(sparsity=rising))
    place(tmp_path, record(task="cifar10", sparsity=falling))
    place(tmp_path, record(task="rte", model="tiny", sparsity=rising))
    ((model, (names, matrix)),) = figures.sparsity_agreement(records.read(tmp_path)[0]).items()
    assert model == "vit_s14"
    assert len(names) == 2
    assert matrix == pytest.approx(np.array([[1, -1], [-1, 1]]))


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
    for number, result in enumerate((record(seed=0), record(seed=1), budget(record(), 0.13))):
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


def test_validation_falls_back_to_its_loss():
    result = {"metrics": {"test": {"primary": "rouge_l"}}, "history": [{"step": 1, "eval_loss": 1.0}]}
    assert figures.selected(result) == "loss"
    result["history"].append({"step": 2, "eval_rouge_l": 0.1})
    assert figures.selected(result) == "rouge_l"


def test_nothing_is_read_of_broken_predictions(tmp_path):
    leave(tmp_path, "partial", wrong=20)
    leave(tmp_path, "lora", wrong=20)
    for file in tmp_path.rglob("predictions.parquet"):
        file.write_bytes(b"no parquet")
    table = records.group(rows_of(tmp_path))
    assert figures.prediction_agreement(table, Predictions(tmp_path)) is None
