"""What forms of adapter hold of a gradient: against brute force, and against a step of a real adapter."""

from __future__ import annotations

import first_steps as reach
import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from partial_lora.adapter.selection import Geometry, random_masks


def gradient_of(m: int, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(m, n)) * np.geomspace(1, 20, n)


def test_directions_are_those_that_alternating_least_squares_finds() -> None:
    gradient = gradient_of(9, 7)
    b = np.random.default_rng(1).normal(size=(9, 2))
    for _ in range(500):
        a = np.linalg.lstsq(b, gradient, rcond=None)[0]
        b = np.linalg.lstsq(a.T, gradient.T, rcond=None)[0].T
    held = 1 - ((gradient - b @ a) ** 2).sum() / (gradient**2).sum()
    assert reach.directions(gradient, 2) == pytest.approx(held, abs=1e-6)
    assert reach.directions(gradient, 7) == pytest.approx(1)
    rows, columns = np.array([0, 3, 4]), np.array([1, 6])
    block = gradient[np.ix_(rows, columns)]
    assert reach.rows_columns(gradient, rows, columns, 2) == pytest.approx((block**2).sum() / (gradient**2).sum())


def test_units_find_a_sum_of_products_within_their_supports_and_never_what_is_outside() -> None:
    generator = np.random.default_rng(2)
    supports = [
        (np.arange(0, 4), np.arange(0, 3)),
        (np.arange(3, 8), np.arange(4, 9)),
        (np.arange(6, 9), np.arange(2, 6)),
    ]
    gradient, inside = np.zeros((10, 10)), np.zeros((10, 10), bool)
    for rows, columns in supports:
        gradient[np.ix_(rows, columns)] += np.outer(
            generator.normal(size=len(rows)), generator.normal(size=len(columns))
        )
        inside[np.ix_(rows, columns)] = True
    assert reach.units(gradient, supports) > 0.97
    spread = gradient_of(10, 10)
    assert reach.units(spread, supports) <= (spread[inside] ** 2).sum() / (spread**2).sum()
    assert reach.units(spread, supports[:1]) == pytest.approx(reach.rows_columns(spread, *supports[0], 1))


def test_the_start_is_the_first_step_of_an_adapter_of_peft() -> None:
    """One small step of plain gradient descent on a linear layer, whose gradient is known."""
    m, n, rank, gradient = 12, 10, 2, gradient_of(12, 10)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(n, m, bias=False)).double()
    adapted = get_peft_model(model, LoraConfig(r=rank, target_modules=["0"])).double()
    layer = adapted.base_model.model[0]
    a = layer.lora_A["default"].weight.detach().numpy()
    (adapted(torch.eye(n, dtype=torch.float64)) * torch.from_numpy(gradient.T.copy())).sum().backward()
    change = layer.lora_B["default"].weight.grad.numpy() @ a
    cosine = (change * gradient).sum() / np.sqrt((change**2).sum() * (gradient**2).sum())
    rows_of_a = iter(a)
    same = type("Drawn", (), {"normal": lambda self, size: next(rows_of_a)})()
    assert reach.start(gradient, [(np.arange(m), np.arange(n))] * rank, same) == pytest.approx(cosine**2)


def test_in_the_mean_a_mask_reaches_pq_and_a_first_step_what_it_moves_of_the_entries() -> None:
    gradient = np.random.default_rng(3).normal(size=(96, 80))
    found = pd.DataFrame(
        [row for seed in range(30) for row in reach.forms(gradient, seed)], columns=["form", "reach", "start"]
    )
    mean = found.groupby("form").mean()
    sizes = reach.kept_count(96, 1 - reach.BUDGET), reach.kept_count(80, 1 - reach.BUDGET)
    assert mean.loc["rows and columns", "reach"] == pytest.approx(sizes[0] * sizes[1] / (96 * 80), rel=0.06)
    assert mean.loc["random_weights", "reach"] == pytest.approx(reach.RANK * sum(sizes) / (96 * 80), rel=0.05)
    assert mean.loc["low_rank", "start"] == pytest.approx(reach.LOW / 80, rel=0.15)
    of_rows, kept = sizes[0] / 96 * reach.RANK / 80, sizes[1]  # were the rows of A orthonormal
    found_of_rows = mean.loc["rows and columns", "start"]
    assert found_of_rows == pytest.approx(of_rows * kept / (kept + reach.RANK + 1), rel=0.15)
    assert (found["start"] <= found["reach"] + 1e-9)[~found["form"].isin(["units", "entries"])].all()


def test_units_have_rows_as_masks_by_units_deal_them() -> None:
    kept = reach.kept_count(96, 1 - reach.BUDGET)
    dealt = reach._in_turn(np.random.default_rng(0), 96, kept)
    shapes = {"m": Geometry((96, 80), (16, 80), (96, 16))}
    masks = random_masks(shapes, 1 - reach.BUDGET, granularity="units", count="exact", mask_seed=0)
    taken = np.bincount(masks["m"].rows.kept // 16, minlength=96)  # entries of B: row by row, 16 units each
    assert sorted(np.bincount(dealt.ravel(), minlength=96)) == sorted(taken)
    assert all(len(set(unit)) == kept for unit in dealt)


def test_accuracies_of_a_form_are_those_of_its_name(tmp_path) -> None:
    names = ["low_rank", "rows and columns", "entries", "random_weights"]
    measured = pd.DataFrame({"form": names, "task": "t", "reach": [0.5, 0.02, 0.1, 0.01], "start": 0.005})
    measured["reach_median"] = measured["reach"]
    forms = ["low_rank", "partial", "partial row_exponent=0", "partial mask=units", "entries", "entries fan_in=kept"]
    tested = pd.DataFrame(
        {
            "form": [*forms, "random_weights"],
            "task": "t",
            "size": "0.13",
            "test": [0.5, 0.4, 0.45, 0.9, 0.6, 0.8, 0.7],
            "difference": [np.nan, -0.12, 0, 0, 0.1, 0.3, 0.2],  # of the seeds that both have
        }
    )
    table = reach.beside(measured, tested)
    assert table["above"].tolist() == pytest.approx([0, -0.12, 0.1, 0.2])
    reach.draw_reach(table, tmp_path)
    assert "reach +0.00" not in (tmp_path / "reach.md").read_text(encoding="utf-8")
    assert (tmp_path / "reach.svg").is_file()
