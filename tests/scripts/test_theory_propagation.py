"""The propagation bound: constants against what maps do, above what is measured on a ViT, of the right errors."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import theory_propagation as script
import torch
from theory_propagation import Step


@pytest.fixture(scope="module")
def network() -> script.Network:
    return script.Network("tiny_vit")


def normalised(tokens: np.ndarray, floor: float) -> np.ndarray:
    return (tokens - tokens.mean(-1, keepdims=True)) / script.deviations(tokens, floor)[..., None]


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def test_the_recursion_is_the_closed_form(rng) -> None:
    steps = [Step(*pair) for pair in rng.uniform(0.1, 3, (7, 2))]
    closed = sum(one.error * math.prod(later.constant for later in steps[at + 1 :]) for at, one in enumerate(steps))
    assert script.propagated(steps) == pytest.approx(closed)
    assert script.residual(steps, 0.5) == pytest.approx(0.5 + script.propagated(steps, 0.5))


@pytest.mark.parametrize("apart", [1e-4, 0.1, 1, 100])
def test_normalisation_moves_no_farther_than_its_constant(apart, rng) -> None:
    gain = rng.standard_normal(12)
    for floor, scale in product((1e-6, 0.1), (0.01, 1, 30)):
        known = scale * rng.standard_normal((5, 12))
        constant = script.normalisation(script.deviations(known, floor), floor)
        for _ in range(50):
            other = known + apart * scale * rng.standard_normal((5, 12)) * rng.random((5, 1))
            moved = normalised(other, floor) - normalised(known, floor)
            assert np.linalg.norm(moved) <= constant * np.linalg.norm(other - known) * (1 + 1e-9)
            assert np.linalg.norm(moved[0] * gain) <= script.farthest(gain)


def test_normalisation_attains_its_constant_without_the_factor_two() -> None:
    known, floor = np.array([[1.0, -1, 0, 0]]), 1e-12
    move = 1e-6 * np.array([[0, 0, 1.0, -1]])
    constant = script.normalisation(script.deviations(known, floor), floor)
    moved = np.linalg.norm(normalised(known + move, floor) - normalised(known, floor))
    assert moved / np.linalg.norm(move) == pytest.approx(constant / 2, rel=1e-3)


@pytest.mark.parametrize("apart", [1e-3, 0.3, 3])
@pytest.mark.parametrize(("heads", "tokens", "size"), [(1, 2, 3), (3, 9, 4)])
def test_attention_moves_no_farther_than_its_constant(heads, tokens, size, apart, rng) -> None:
    def attended(queries: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        return softmax(scale * queries @ keys.transpose(0, 2, 1)) @ values

    for scale in (0.1, 0.5, 2):
        known = [rng.standard_normal((heads, tokens, size)) for _ in range(3)]
        for _ in range(60):
            others = [one + apart * rng.standard_normal(one.shape) * (rng.random() < 0.7) for one in known]
            limits = np.linalg.norm(others[0], axis=2).max(1)
            constant = script.attention(known[1], known[2], limits, scale)
            moved = np.linalg.norm(attended(*others) - attended(*known))
            assert moved <= constant * math.hypot(*(np.linalg.norm(x - y) for x, y in zip(others, known, strict=True)))


def test_slopes_of_gelu_and_softmax(rng) -> None:
    points = np.linspace(-6, 6, 4001)
    gelu = points * np.array([0.5 * (1 + math.erf(point / 2**0.5)) for point in points])
    assert 0.998 * script.GELU < (np.diff(gelu) / np.diff(points)).max() <= script.GELU
    slopes = []
    for _ in range(300):
        probabilities = softmax(rng.standard_normal(rng.integers(2, 8)) * 3)
        slopes.append(np.linalg.norm(np.diag(probabilities) - np.outer(probabilities, probabilities), 2))
    assert 0.4 < max(slopes) <= script.SOFTMAX


def test_longest_bounds_what_a_linear_map_makes_of_a_normalised_token(rng) -> None:
    weight, bias, (gain, shift) = rng.standard_normal((5, 8)), rng.standard_normal(5), rng.standard_normal((2, 8))
    tokens = normalised(rng.standard_normal((2000, 8)) * 10, 0)
    lengths = np.linalg.norm((tokens * gain + shift) @ weight.T + bias, axis=1)
    assert lengths.max() <= script.longest(weight, bias, gain, shift) < 5 * lengths.max()


def test_a_residual_network_changes_no_more_than_its_modules_errors_allow(rng) -> None:
    width, floor = 8, 1e-6
    layers = [(rng.standard_normal((16, width)) / 4, rng.standard_normal((width, 16)) / 8) for _ in range(4)]
    others = [tuple(weight + 0.01 * rng.standard_normal(weight.shape) for weight in layer) for layer in layers]
    for _ in range(20):
        known = other = rng.standard_normal((3, width))
        bound = 0.0
        for (first, second), (first_other, second_other) in zip(layers, others, strict=True):
            normal = normalised(known, floor)
            hidden = np.maximum(normal @ first.T, 0)
            steps = [
                Step(script.normalisation(script.deviations(known, floor), floor)),
                Step(np.linalg.norm(first_other, 2), np.linalg.norm(normal @ (first_other - first).T)),
                Step(1.0),  # the rectifier
                Step(np.linalg.norm(second_other, 2), np.linalg.norm(hidden @ (second_other - second).T)),
            ]
            bound = script.residual(steps, bound)
            known = known + hidden @ second.T
            other = other + np.maximum(normalised(other, floor) @ first_other.T, 0) @ second_other.T
            assert 0 < np.linalg.norm(other - known) <= bound


def test_no_change_is_above_its_bound_and_small_ones_grow_with_the_update(network, monkeypatch) -> None:
    monkeypatch.setattr(script, "Network", lambda name: network)
    monkeypatch.setattr(script, "SIZES", (1e-4, 1e-3, 3.0))
    record = script.measured("tiny_vit", 3)
    for point in record["points"]:
        assert 0 < point["measured"] <= min(point["secant"], point["bound"])
    small, ten_times, _ = record["points"]
    for key in ("measured", "secant", "slopes", "bound"):
        assert ten_times[key] == pytest.approx(10 * small[key], rel=0.02)
    assert small["measured"] < small["slopes"] < small["bound"]


def test_the_bound_is_of_the_modules_errors_alone(network) -> None:
    dense, _ = script.updates_of(network, 0.1)
    network.add(dense)
    known = network.activations(script.images_of(network.image_size, 2))
    constants = [script.constants_of(block) for block in network.vit.blocks]
    gap = {name: torch.zeros_like(update) for name, update in dense.items()}
    branches = script.branches_of(network, constants, known, gap, 0)
    assert script.bound(network, branches, known["norm"][0]) == 0
    gap["1.mlp.fc2"] += 1e-3  # the error of one module: what enters it times the gap, and nothing else
    errors = [step.error for branch in script.branches_of(network, constants, known, gap, 0) for step in branch]
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
    slopes = script.largest_slope(lambda tokens: torch.tanh(tokens @ weight), at)
    for one, slope in zip(at, slopes, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda tokens: torch.tanh(tokens @ weight), one)
        norm = float(torch.linalg.matrix_norm(jacobian.reshape(18, 18), 2))
        assert 0.9 * norm <= slope <= norm * (1 + 1e-9)
