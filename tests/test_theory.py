"""Every statement of partial_lora.theory against its simulation, at several sizes; seeds are fixed.

A simulated mean may be off by five of its standard errors.
"""

from __future__ import annotations

import ast
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

import partial_lora.theory
from partial_lora import cli, theory_command
from partial_lora.errors import PartialLoraError
from partial_lora.masks import kept_count
from partial_lora.theory import Simulated, elements, first_order, propagation, rows_columns, subset_sums
from partial_lora.theory.propagation import Step

SIZES = [(12, 20, 3, 0.5), (64, 48, 8, 0.13), (200, 300, 16, 0.3)]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20251222)


def agrees(values: np.ndarray, expected: float) -> bool:
    """Whether draws have this mean, within five standard errors."""
    simulated = Simulated.share(values) if set(np.unique(values)) <= {0, 1} else Simulated.of(values)
    return abs(simulated.mean - expected) <= 5 * simulated.standard_error + 1e-12


def low_rank(rows: int, columns: int, rank: int, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, columns))


# Rows and columns


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize(("rows", "columns", "rank", "keep"), SIZES)
def test_the_least_error_against_a_fixed_target_is_one_minus_p_q(rows, columns, rank, keep, counted, rng) -> None:
    target = low_rank(rows, columns, rank, rng) * np.exp(rng.standard_normal((rows, 1)))  # uneven rows
    a, b = kept_count(rows, 1 - keep), kept_count(columns, 1 - keep / 2)
    errors = rows_columns.least_errors(target, a, b, draws=3000, rng=rng, counted=counted)
    assert agrees(errors, rows_columns.least_error(a / rows, b / columns))
    deviation = rows_columns.error_deviation(target, a, b, counted=counted)
    squares = (errors - rows_columns.least_error(a / rows, b / columns)) ** 2
    assert agrees(squares, deviation**2)


def test_no_update_inside_the_mask_is_nearer_than_the_restricted_target(rng) -> None:
    target = low_rank(10, 14, 3, rng)
    rows, columns = np.array([1, 4, 5, 8]), np.array([0, 2, 3, 9, 13])
    best = rows_columns.best_update(target, rows, columns, rank=3)
    inside = np.zeros_like(target)
    inside[np.ix_(rows, columns)] = 1
    np.testing.assert_allclose(best, target * inside, atol=1e-12)
    least = rows_columns.relative_error(target, best)
    for _ in range(200):
        other = best + inside * low_rank(10, 14, 3, rng) * rng.choice([1e-3, 1])
        assert rows_columns.relative_error(target, other) > least
    errors = [
        rows_columns.relative_error(target, rows_columns.best_update(target, rows, columns, r)) for r in (1, 2, 3)
    ]
    assert errors[0] > errors[1] > errors[2] == pytest.approx(least)


def test_the_simulated_error_is_that_of_the_best_update(rng) -> None:
    target = low_rank(9, 7, 2, rng)
    indicators = [
        rows_columns.kept_indicators(size, kept, draws=5, rng=np.random.default_rng(seed))
        for seed, (size, kept) in enumerate([(9, 4), (7, 3)])
    ]
    for row, column in zip(*indicators, strict=True):
        rows, columns = np.flatnonzero(row), np.flatnonzero(column)
        assert (len(rows), len(columns)) == (4, 3)
        best = rows_columns.best_update(target, rows, columns, 2)
        expected = 1 - row @ rows_columns.shares(target) @ column
        assert rows_columns.relative_error(target, best) == pytest.approx(expected)


def test_rows_that_are_not_kept_bound_the_error_of_outputs_for_any_inputs(rng) -> None:
    target, mixing = low_rank(40, 30, 4, rng), low_rank(30, 30, 2, rng)  # inputs with two directions: columns are known
    errors = []
    for _ in range(400):
        rows, columns = (np.sort(rng.choice(size, kept, replace=False)) for size, kept in ((40, 10), (30, 9)))
        inputs = mixing @ rng.standard_normal((30, 6))
        update = np.zeros((40, 30))
        update[np.ix_(rows, columns)] = np.linalg.lstsq(inputs[columns].T, (target[rows] @ inputs).T, rcond=None)[0].T
        wanted = target @ inputs
        errors.append(((wanted - update @ inputs) ** 2).sum() / (wanted**2).sum())
    assert agrees(np.array(errors), rows_columns.least_output_error(10 / 40))  # here the bound is attained
    assert np.mean(errors) < rows_columns.least_error(10 / 40, 9 / 30) - 0.05  # and is not that of the weights


@pytest.mark.parametrize(("keep", "delta"), [(0.5, 0.05), (0.13, 0.05), (0.9, 0.3)])
def test_no_fixed_target_is_met_more_precisely_than_the_mean_allows(keep, delta, rng) -> None:
    precision = rows_columns.least_precision(keep, keep, delta)
    for rank in (1, 8):
        kept = round(keep * 100)
        errors = rows_columns.least_errors(low_rank(100, 100, rank, rng), kept, kept, draws=2000, rng=rng)
        assert np.quantile(errors, 1 - delta) >= precision


@pytest.mark.parametrize(("rows", "rank", "keep"), [(2, 2, 0.5), (3, 2, 0.7), (1, 5, 0.6)])
def test_masks_of_entries_are_seldom_masks_of_rows(rows, rank, keep, rng) -> None:
    drawn = rng.random((40_000, rows, rank)) < keep
    whole = (drawn == drawn[:, :, :1]).all((1, 2)).astype(float)
    assert agrees(whole, 10 ** rows_columns.row_mask_probability(rows, rank, keep))


def test_another_solution_is_exact_and_far_from_the_dense_one(rng) -> None:
    rows, columns, outputs, examples, a, b = 60, 80, 5, 20, 15, 24
    readout, inputs = rng.standard_normal((outputs, rows)), rng.standard_normal((columns, examples))
    change = rng.standard_normal((outputs, examples))
    dense = np.linalg.pinv(readout) @ change @ np.linalg.pinv(inputs)
    distances = []
    for _ in range(50):
        kept = [np.sort(rng.choice(size, number, replace=False)) for size, number in ((rows, a), (columns, b))]
        update = rows_columns.another_solution(readout, inputs, change, *kept)
        np.testing.assert_allclose(readout @ update @ inputs, change, atol=1e-9)
        assert np.linalg.matrix_rank(update) <= outputs
        outside = np.ones((rows, columns), dtype=bool)
        outside[np.ix_(*kept)] = False
        assert not update[outside].any()
        distances.append(rows_columns.relative_error(dense, update))
    assert min(distances) > 0.5
    assert np.mean(distances) >= rows_columns.least_error(a / rows, b / columns) - 0.02
    for few in ((outputs - 1, b), (a, examples - 1)):
        with pytest.raises(PartialLoraError, match="no exact solution in this mask"):
            rows_columns.another_solution(readout, inputs, change, np.arange(few[0]), np.arange(few[1]))


# Single entries


def test_the_rank_by_blocks_is_what_the_formula_gives() -> None:
    assert elements.block_rank(768, 4, 0.5, 0.05) == 16 * 4
    assert elements.block_rank(768, 4, 0.13, 0.05) == 80 * 4


@pytest.mark.parametrize(("rows", "target_rank", "keep"), [(20, 1, 0.5), (30, 3, 0.4), (100, 2, 0.7)])
def test_ranks_that_suffice_do_and_are_counted_right(rows, target_rank, keep, rng) -> None:
    blocks = elements.block_rank(rows, target_rank, keep, 0.1)
    counted = elements.sufficient_rank(rows, target_rank, keep, 0.1)
    assert counted <= blocks
    assert rows * elements.short_row(counted, target_rank, keep) <= 0.1
    assert counted == target_rank or rows * elements.short_row(counted - 1, target_rank, keep) > 0.1
    for rank in (counted, max(target_rank, counted // 2)):
        full = elements.full_rows(rows, rank, target_rank, keep, draws=3000, rng=rng)
        assert agrees(full, elements.exact_probability(rows, rank, target_rank, keep))
    groups = subset_sums.kept_groups(rows * target_rank, blocks // target_rank, keep, draws=1000, rng=rng)
    assert groups.mean() >= 0.9 - 5 * (0.09 / 1000) ** 0.5
    assert elements.exact_probability(rows, counted, target_rank, keep) >= 0.9


def test_masks_of_an_exact_count_have_the_same_union_bound(rng) -> None:
    rows, target_rank, keep = 25, 2, 0.4
    rank = elements.sufficient_rank(rows, target_rank, keep, 0.1, counted=True)
    drawn = [elements.masks(rows, rank, keep, rng=rng, counted=True) for _ in range(4000)]
    assert {int(mask.sum()) for mask in drawn} == {kept_count(rows * rank, 1 - keep)}
    short = np.array([(mask.sum(1) < target_rank).sum() / rows for mask in drawn])
    assert agrees(short, elements.short_row(rank, target_rank, keep, rows=rows))
    assert np.mean([(mask.sum(1) >= target_rank).all() for mask in drawn]) >= 0.9


@pytest.mark.parametrize("target_rank", [1, 2, 4])
def test_rows_that_keep_the_targets_rank_make_it_exact(target_rank, rng) -> None:
    rows, columns, rank = 30, 17, 9
    mask = np.zeros((rows, rank), dtype=bool)
    for row in mask:
        row[rng.choice(rank, target_rank, replace=False)] = True
    left, right = rng.standard_normal((rows, target_rank)), rng.standard_normal((target_rank, columns))
    b, a = elements.exact_factors(left, right, mask, rng=rng)
    assert not b[~mask].any()
    np.testing.assert_allclose(b @ a, left @ right, atol=1e-8)
    mask[7] = False  # a row that keeps nothing is a row of zeros
    b, a = elements.exact_factors(left, right, mask, rng=rng)
    difference = abs(b @ a - left @ right)
    assert difference[7].max() > 0.1
    assert np.delete(difference, 7, axis=0).max() < 1e-8


def test_a_target_is_reached_in_blocks_of_copies(rng) -> None:
    rows, columns, target_rank, keep = 12, 9, 2, 0.6
    rank = elements.block_rank(rows, target_rank, keep, 0.01)
    size = rank // target_rank
    mask = elements.masks(rows, rank, keep, rng=rng)
    assert mask.reshape(rows, target_rank, size).any(2).all()
    left, right = rng.standard_normal((rows, target_rank)), rng.standard_normal((target_rank, columns))
    b = np.zeros((rows, rank))
    for row, block in itertools.product(range(rows), range(target_rank)):
        b[row, block * size + mask[row, block * size : (block + 1) * size].argmax()] = left[row, block]
    np.testing.assert_allclose((b * mask) @ np.repeat(right, size, axis=0), left @ right)


@pytest.mark.parametrize(("rows", "rank", "target_rank", "keep"), [(30, 4, 2, 0.2), (25, 6, 3, 0.3), (40, 5, 1, 0.5)])
def test_what_masks_leave_reachable_has_no_more_dimensions_than_counted(rows, rank, target_rank, keep, rng) -> None:
    short = 0
    for _ in range(20):
        mask = elements.masks(rows, rank, keep, rng=rng)
        dimension = elements.reachable_dimension(mask, target_rank, rng=rng)
        missing = elements.deficit(mask, target_rank)
        assert dimension <= rows * target_rank - missing + elements.allowance(rank, target_rank)
        if missing > elements.allowance(rank, target_rank):
            short += 1
            assert dimension < rows * target_rank
        if missing == 0:
            assert dimension == rows * target_rank
    assert short > 0


@pytest.mark.parametrize(("rows", "target_rank", "keep"), [(768, 4, 0.5), (768, 4, 0.13), (100, 2, 0.4), (50, 1, 0.3)])
def test_below_the_necessary_rank_few_masks_leave_enough(rows, target_rank, keep, rng) -> None:
    needed = elements.necessary_rank(rows, target_rank, keep, 0.05)
    assert needed <= elements.sufficient_rank(rows, target_rank, keep, 0.05)
    assert needed > target_rank
    drawn = [elements.masks(rows, needed - 1, keep, rng=rng) for _ in range(300)]
    missing = [elements.deficit(mask, target_rank) for mask in drawn]
    assert agrees(np.array(missing, float), rows * elements.expected_shortage(needed - 1, target_rank, keep))
    enough = np.mean([one <= elements.allowance(needed - 1, target_rank) for one in missing])
    assert enough < 0.95 + 5 * (0.05 / 300) ** 0.5


# Known results


@pytest.mark.parametrize(("groups", "keep", "delta"), [(10, 0.5, 0.1), (200, 0.13, 0.05), (50, 0.9, 0.01)])
def test_a_group_keeps_a_member_at_the_size_of_the_union_bound(groups, keep, delta, rng) -> None:
    size, least = subset_sums.group_size(groups, keep, delta), subset_sums.least_group_size(groups, keep, delta)
    assert least in (size, size - 1)
    for one in (size, max(1, size // 2)):
        kept = subset_sums.kept_groups(groups, one, keep, draws=3000, rng=rng)
        assert agrees(kept, subset_sums.group_probability(groups, one, keep))
    assert subset_sums.group_probability(groups, least, keep) >= 1 - delta
    assert least == 1 or subset_sums.group_probability(groups, least - 1, keep) < 1 - delta


def test_the_worst_distance_is_that_of_every_point_tried_one_by_one(rng) -> None:
    for size in (1, 3, 6):
        values = rng.uniform(-1, 1, size)
        sums = np.array([sum(subset) for k in range(size + 1) for subset in itertools.combinations(values, k)])
        points = np.linspace(-0.5, 0.5, 20_001)
        literal = abs(points[:, None] - sums).min(1).max()
        assert subset_sums.worst_distance(values) == pytest.approx(literal, abs=1e-4)


def test_fewer_values_than_counted_never_reach_everything_and_some_more_do(rng) -> None:
    enough = []
    for precision in (0.1, 0.03, 0.01, 0.003):
        fewest = subset_sums.fewest_values(precision)
        assert 2**fewest * 2 * precision >= 1 > 2 ** (fewest - 1) * 2 * precision
        assert (subset_sums.worst_distances(fewest - 1, draws=200, rng=rng) > precision).all()
        size = fewest
        while (subset_sums.worst_distances(size, draws=200, rng=rng) <= precision).mean() < 0.95:
            size += 1
        enough.append(size)
    steps = np.diff(enough) / np.diff(np.log2([1 / 0.1, 1 / 0.03, 1 / 0.01, 1 / 0.003]))
    assert (steps < 2.5).all()  # logarithmic in the precision, as Lueker has it


# First order


@pytest.mark.parametrize(("rows", "columns", "rank", "keep"), SIZES)
def test_random_rows_and_columns_hold_p_q_of_a_gradient_and_top_in_turn_never_less(
    rows, columns, rank, keep, rng
) -> None:
    a, b = kept_count(rows, 1 - keep), kept_count(columns, 1 - keep)
    for gradient in (
        first_order.spread_gradient(rows, columns, rng=rng),
        first_order.concentrated_gradient(rows, columns, rng=rng),
        low_rank(rows, columns, 1, rng),
    ):
        drawn = [(rng.choice(rows, a, replace=False), rng.choice(columns, b, replace=False)) for _ in range(2000)]
        expected = first_order.expected_mass(a / rows, b / columns)
        assert agrees(np.array([first_order.mass(gradient, *one) for one in drawn]), expected)
        assert first_order.mass(gradient, *first_order.top_in_turn(gradient, a, b)) >= expected
        start = first_order.start_gradients(gradient, drawn, rank, 0.25, rng=rng)
        assert agrees(start, first_order.start_gradient(rank, 0.25, a / rows, b / columns))


def test_rows_and_columns_chosen_apart_can_hold_nothing_at_all() -> None:
    gradient = np.array([[0.0, 1, 1], [1, 0, 0], [1, 0, 0]])
    assert first_order.mass(gradient, *first_order.top(gradient, 1, 1)) == 0
    assert first_order.mass(gradient, *first_order.top_in_turn(gradient, 1, 1)) >= first_order.expected_mass(
        1 / 3, 1 / 3
    )


def logistic(weight: np.ndarray, inputs: np.ndarray, signs: np.ndarray) -> tuple[float, np.ndarray]:
    """The summed mean logistic losses of every row of W (rows, features), and its gradient."""
    margins = signs * (weight @ inputs)
    pull = -signs / (1 + np.exp(margins)) / inputs.shape[1]
    return float(np.logaddexp(0, -margins).sum() / inputs.shape[1]), pull @ inputs.T


@pytest.mark.parametrize("rank", [None, 1, 3])
@pytest.mark.parametrize(("rows", "columns", "examples"), [(6, 10, 30), (30, 20, 15)])
def test_a_step_inside_the_mask_lowers_a_smooth_loss_by_what_is_guaranteed(rows, columns, examples, rank, rng) -> None:
    inputs, signs = rng.standard_normal((columns, examples)), rng.choice([-1.0, 1], (rows, examples))
    smoothness = np.linalg.norm(inputs, 2) ** 2 / (4 * examples)
    weight = rng.standard_normal((rows, columns))
    before, gradient = logistic(weight, inputs, signs)
    drawn = [np.sort(rng.choice(size, size // 2, replace=False)) for size in (rows, columns)]
    for kept in (drawn, first_order.top(gradient, rows // 2, columns // 2)):
        move = first_order.step(gradient, *kept, smoothness, rank)
        outside = np.ones_like(gradient, dtype=bool)
        outside[np.ix_(*kept)] = False
        assert not move[outside].any()
        after, _ = logistic(weight + move, inputs, signs)
        guaranteed = first_order.guaranteed_decrease(gradient, *kept, smoothness, rank)
        assert before - after >= guaranteed > 0
    whole = first_order.mass(gradient, *kept) * (gradient**2).sum() / (2 * smoothness)
    full = first_order.guaranteed_decrease(gradient, *kept, smoothness)
    assert full == pytest.approx(whole)
    assert first_order.guaranteed_decrease(gradient, *kept, smoothness, 1) < full


def test_a_block_that_keeps_its_share_of_the_gradient_holds_a_solution_as_good_as_the_best(rng) -> None:
    columns, examples, b = 120, 10, 40
    inputs, wanted = rng.standard_normal((columns, examples)), rng.standard_normal((4, examples))
    values = np.linalg.svd(inputs, compute_uv=False)
    smoothness, convexity = (values**2 / examples)[[0, -1]]
    kept = np.sort(rng.choice(columns, b, replace=False))
    weight, losses, masses = np.zeros((4, columns)), [], []
    for _ in range(60):
        rest = weight @ inputs - wanted
        gradient = rest @ inputs.T / examples
        losses.append((rest**2).sum() / (2 * examples))
        masses.append(first_order.mass(gradient, np.arange(4), kept))
        weight = weight + first_order.step(gradient, np.arange(4), kept, smoothness)
    for steps, loss in enumerate(losses):
        left = first_order.contraction(min(masses), convexity, smoothness, steps)
        assert loss <= losses[0] * left * (1 + 1e-9)
    assert losses[-1] < 1e-3 * losses[0]
    dense = wanted @ np.linalg.pinv(inputs)
    assert rows_columns.relative_error(dense, weight) > 0.5  # not by approximating the dense solution


# Propagation


def test_the_recursion_is_the_closed_form(rng) -> None:
    steps = [Step(*pair) for pair in rng.uniform(0.1, 3, (7, 2))]
    assert propagation.propagated(steps) == pytest.approx(propagation.in_closed_form(steps))
    assert propagation.residual(steps, 0.5) == pytest.approx(0.5 + propagation.propagated(steps, 0.5))


@pytest.mark.parametrize("apart", [1e-4, 0.1, 1, 100])
def test_normalisation_moves_no_farther_than_its_constant(apart, rng) -> None:
    def normalised(tokens: np.ndarray, floor: float) -> np.ndarray:
        return (tokens - tokens.mean(-1, keepdims=True)) / propagation.deviations(tokens, floor)[..., None]

    for floor, scale in itertools.product((1e-6, 0.1), (0.01, 1, 30)):
        known = scale * rng.standard_normal((5, 12))
        constant = propagation.normalisation(propagation.deviations(known, floor), floor)
        for _ in range(50):
            other = known + apart * scale * rng.standard_normal((5, 12)) * rng.random((5, 1))
            moved = np.linalg.norm(normalised(other, floor) - normalised(known, floor))
            assert moved <= constant * np.linalg.norm(other - known) * (1 + 1e-9)
    gain = rng.standard_normal(12)
    assert np.linalg.norm(normalised(other, floor)[0] * gain - normalised(known, floor)[0] * gain) <= (
        propagation.farthest(gain)
    )


def test_normalisation_attains_its_constant_without_the_factor_two(rng) -> None:
    known = np.array([[1.0, -1, 0, 0]])
    constant = propagation.normalisation(propagation.deviations(known, 1e-12), 1e-12)
    other = known + 1e-6 * np.array([[0, 0, 1.0, -1]])
    moved = np.linalg.norm((other - known) / propagation.deviations(known, 1e-12))
    assert moved / np.linalg.norm(other - known) == pytest.approx(constant / 2, rel=1e-3)


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def attended(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float) -> np.ndarray:
    return softmax(scale * queries @ keys.transpose(0, 2, 1)) @ values


@pytest.mark.parametrize("apart", [1e-3, 0.3, 3])
@pytest.mark.parametrize(("heads", "tokens", "size"), [(1, 2, 3), (3, 9, 4)])
def test_attention_moves_no_farther_than_its_constant(heads, tokens, size, apart, rng) -> None:
    for scale in (0.1, 0.5, 2):
        known = [rng.standard_normal((heads, tokens, size)) for _ in range(3)]
        for _ in range(60):
            others = [one + apart * rng.standard_normal(one.shape) * (rng.random() < 0.7) for one in known]
            limits = np.linalg.norm(others[0], axis=2).max(1)
            constant = propagation.attention(known[1], known[2], limits, scale)
            moved = np.linalg.norm(attended(*others, scale) - attended(*known, scale))
            assert moved <= constant * math.hypot(*(np.linalg.norm(x - y) for x, y in zip(others, known, strict=True)))


def test_slopes_of_gelu_and_softmax(rng) -> None:
    points = np.linspace(-6, 6, 4001)
    gelu = points * np.array([0.5 * (1 + math.erf(point / 2**0.5)) for point in points])
    slope = (np.diff(gelu) / np.diff(points)).max()
    assert 0.998 * propagation.GELU < slope <= propagation.GELU
    steepest = 0.0
    for _ in range(300):
        probabilities = softmax(rng.standard_normal(rng.integers(2, 8)) * 3)
        steepest = max(steepest, np.linalg.norm(np.diag(probabilities) - np.outer(probabilities, probabilities), 2))
    assert 0.4 < steepest <= propagation.SOFTMAX


def test_longest_bounds_what_a_linear_map_makes_of_a_normalised_token(rng) -> None:
    weight, bias, gain, shift = (
        rng.standard_normal((5, 8)),
        *rng.standard_normal((3, 5))[:1],
        *rng.standard_normal((2, 8)),
    )
    tokens = rng.standard_normal((2000, 8)) * 10
    normalised = (tokens - tokens.mean(1, keepdims=True)) / tokens.std(1, keepdims=True)
    lengths = np.linalg.norm((normalised * gain + shift) @ weight.T + bias, axis=1)
    assert lengths.max() <= propagation.longest(weight, bias, gain, shift) < 5 * lengths.max()


def test_a_residual_network_changes_no_more_than_its_modules_errors_allow(rng) -> None:
    width, floor = 8, 1e-6
    layers = [(rng.standard_normal((16, width)) / 4, rng.standard_normal((width, 16)) / 8) for _ in range(4)]
    others = [tuple(weight + 0.01 * rng.standard_normal(weight.shape) for weight in layer) for layer in layers]
    for _ in range(20):
        known = other = rng.standard_normal((3, width))
        bound = 0.0
        for (first, second), (first_other, second_other) in zip(layers, others, strict=True):
            deviation = propagation.deviations(known, floor)
            normal = (known - known.mean(1, keepdims=True)) / deviation[:, None]
            hidden = np.maximum(normal @ first.T, 0)
            steps = [
                Step(propagation.normalisation(deviation, floor)),
                Step(np.linalg.norm(first_other, 2), np.linalg.norm(normal @ (first_other - first).T)),
                Step(1.0),  # the rectifier
                Step(np.linalg.norm(second_other, 2), np.linalg.norm(hidden @ (second_other - second).T)),
            ]
            bound = propagation.residual(steps, bound)
            known = known + hidden @ second.T
            normal = (other - other.mean(1, keepdims=True)) / propagation.deviations(other, floor)[:, None]
            other = other + np.maximum(normal @ first_other.T, 0) @ second_other.T
            assert 0 < np.linalg.norm(other - known) <= bound


# The command


def test_theory_stands_on_numpy_and_the_standard_library_alone() -> None:
    folder = Path(partial_lora.theory.__file__).parent
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                own = name in ("partial_lora.errors", "partial_lora.theory") or name.startswith("partial_lora.theory.")
                assert own or name == "numpy" or name.split(".")[0] in sys.stdlib_module_names, (file.name, name)


COMMAND = ["--rows", "60", "--columns", "40", "--rank", "8", "--sparsity", "0.5", "0.87", "--draws", "300"]


def test_the_command_prints_bounds_and_simulated_values_that_agree(capsys) -> None:
    assert theory_command.main([*COMMAND, "--json"]) == 0
    reported = json.loads(capsys.readouterr().out)
    assert [one["sparsity"] for one in reported] == [0.5, 0.87]
    for one in reported:
        for line in one["lines"]:
            if line["holds"] == "equal":
                assert abs(line["simulated"] - line["bound"]) <= 5 * line["standard_error"] + 1e-12, line
            elif line["holds"] == "at least":
                assert line["simulated"] + 5 * (line["standard_error"] or 0) >= line["bound"], line
    error = next(line for line in reported[1]["lines"] if "error" in line["what"])
    assert error["bound"] == pytest.approx(1 - (8 / 60) * (5 / 40))
    assert theory_command.main(COMMAND) == 0
    assert "0.9833" in capsys.readouterr().out


def test_the_figure_is_written_and_the_same_twice(tmp_path, capsys) -> None:
    files = [tmp_path / name for name in ("one.svg", "two.svg", "three.png")]
    for file in files:
        assert theory_command.main([*COMMAND, "--figure", str(file)]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[2].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sparsity", "1"], "--sparsity"),
        (["--sparsity", "often"], "--sparsity"),
        (["--rows", "0"], "--rows"),
        (["--sparsity", "0.9999999"], "sparsity="),
        (["--rank", "2", "--target-rank", "4"], "--target-rank"),
        (["--delta", "0"], "--delta"),
        (["--draws", "1"], "--draws"),
        (["--figure", "bounds.txt"], "--figure"),
        (["--widht", "3"], "--widht"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(arguments, said, capsys) -> None:
    assert cli.main(["theory", *arguments]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert not printed.out


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: rows_columns.least_error(0, 0.5),
        lambda: rows_columns.shares(np.zeros((2, 2))),
        lambda: subset_sums.group_size(0, 0.5, 0.1),
        lambda: subset_sums.fewest_values(1),
        lambda: elements.sufficient_rank(10, 2, 0.5, 1.0),
        lambda: first_order.guaranteed_decrease(np.eye(2), np.arange(2), np.arange(2), 0.0),
        lambda: Simulated.of(np.ones(1)),
    ],
)
def test_a_statement_refuses_what_it_does_not_hold_for(wrong) -> None:
    with pytest.raises(PartialLoraError):
        wrong()
