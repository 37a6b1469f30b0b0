"""The propagation bound on a ViT: above what is measured for any size of update, and made of the right errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import theory_propagation as script

from partial_lora import theory_figures


@pytest.fixture(scope="module")
def network() -> script.Network:
    return script.Network("tiny_vit")


def test_no_change_is_above_its_bound_and_small_ones_grow_with_the_update(network, monkeypatch) -> None:
    monkeypatch.setattr(script, "Network", lambda name: network)
    monkeypatch.setattr(script, "SIZES", (1e-4, 1e-3, 3.0))
    record = script.measured("tiny_vit", 3)
    for point in record["points"]:
        assert point["measured"]["least"] > 0
        for key in ("secant", "bound"):
            assert point["measured"]["median"] <= point[key]["median"]
    small, ten_times, _ = record["points"]
    for key in ("measured", "secant", "slopes", "bound"):
        assert ten_times[key]["median"] == pytest.approx(10 * small[key]["median"], rel=0.02)
    assert small["measured"]["most"] < small["slopes"]["most"] < small["bound"]["least"]


def test_without_a_gap_nothing_changes_and_the_bound_is_zero(network) -> None:
    dense, _ = script.updates_of(network, 0.1)
    network.put(dense)
    with torch.no_grad():
        known = network.seen(script.images_of(network.image_size, 2))
    constants = [script.Constants(block) for block in network.vit.blocks]
    gap = {name: torch.zeros_like(update) for name, update in dense.items()}
    branches = script.branches_of(network, constants, known, gap, 0)
    assert script.bound(network, branches, known["norm"][0]) == 0
    gap["1.mlp.fc2"] += 1e-3  # the error of one module: what enters it times the gap, and nothing else
    branches = script.branches_of(network, constants, known, gap, 0)
    errors = [step.error for branch in branches for step in branch]
    entered = known["1.mlp.fc2"][0].sum(1) * 1e-3
    assert sum(errors) == pytest.approx(float(entered.norm()) * network.vit.blocks[1].mlp.fc2.out_features ** 0.5)
    assert sum(error > 0 for error in errors) == 1


def test_updates_stay_inside_kept_rows_and_columns(network) -> None:
    dense, masked = script.updates_of(network, 0.1)
    for name, weight in network.weights.items():
        assert dense[name].norm() / weight.norm() == pytest.approx(0.1)
        assert torch.linalg.matrix_rank(dense[name]) == script.RANK
        kept = masked[name] != 0
        rows, columns = kept.any(1), kept.any(0)
        assert abs(rows.float().mean() - script.DENSITY) < 0.02
        assert torch.equal(masked[name], dense[name] * rows[:, None] * columns)


def test_the_largest_slope_is_the_jacobians_norm() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 6, dtype=torch.float64) / 3
    at = torch.randn(2, 3, 6, dtype=torch.float64)
    found = script.largest_slope(lambda tokens: torch.tanh(tokens @ weight), at)
    for one, slope in zip(at, found, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda tokens: torch.tanh(tokens @ weight), one)
        assert slope == pytest.approx(float(torch.linalg.matrix_norm(jacobian.reshape(18, 18), 2)), rel=0.1)
        assert slope <= torch.linalg.matrix_norm(jacobian.reshape(18, 18), 2) * (1 + 1e-9)


def test_what_is_recorded_says_what_the_page_and_the_figure_say(tmp_path) -> None:
    folder = Path(__file__).resolve().parents[1] / "results" / "theory"
    record = json.loads((folder / "propagation.json").read_text(encoding="utf-8"))
    assert [model["name"] for model in record["models"]] == ["tiny_vit", "vit_s14"]
    assert (folder / "propagation.md").read_text(encoding="utf-8") == script.page(record)
    written = theory_figures.propagation(record, tmp_path / "figure.png")
    assert written.read_bytes().startswith(b"\x89PNG")
    for model in record["models"]:
        for point in model["points"]:
            assert point["measured"]["median"] <= point["secant"]["median"] <= point["bound"]["median"]
