"""Every statement of scripts/theory.py against its simulation, at several sizes; seeds are fixed.

A simulated mean may be off by five of its standard errors.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import theory

from partial_lora.masks import kept_count


def agrees(values, expected: float) -> bool:
    mean, error = theory.estimate(values)
    return abs(mean - expected) <= 5 * error + 1e-12


def low_rank(m: int, n: int, rank: int, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((m, rank)) @ rng.standard_normal((rank, n))


def relative_error(target: np.ndarray, update: np.ndarray) -> float:
    return ((target - update) ** 2).sum() / (target**2).sum()


def draw_block(m: int, n: int, a: int, b: int, rng: np.random.Generator) -> list[np.ndarray]:
    return [np.sort(rng.choice(size, kept, replace=False)) for size, kept in ((m, a), (n, b))]


def outside(shape: tuple[int, int], block) -> np.ndarray:
    mask = np.ones(shape, dtype=bool)
    mask[np.ix_(*block)] = False
    return mask


# The command, which simulates what it states


COMMAND = ["--rows", "60", "--columns", "40", "--rank", "8", "--sparsity", "0.87", "0", "--draws", "300"]


@pytest.mark.parametrize(
    "size", [(12, 20, 3, 1, 0.5), (64, 48, 8, 2, 0.87), (200, 300, 16, 4, 0.7), (60, 40, 8, 4, 0.0)]
)
def test_bounds_and_simulated_values_agree(size) -> None:
    lines = theory.lines(theory.Setting(*size, delta=0.05, draws=1000, seed=0))
    simulated = [line for line in lines if line["holds"]]
    assert len(simulated) >= 12
    for line in simulated:
        slack = 5 * (line["standard_error"] or 0) + 1e-12
        assert line["holds"] == "at least" or line["simulated"] <= line["bound"] + slack, line
        assert line["holds"] == "at most" or line["simulated"] >= line["bound"] - slack, line


def test_the_command_prints_the_same_numbers_every_time(capsys) -> None:
    half, whole = (theory.lines(theory.Setting(60, 40, 8, 4, sparsity, 0.05, 300, 0)) for sparsity in (0.87, 0))
    assert half[0]["bound"] == pytest.approx(1 - (8 / 60) * (5 / 40))
    assert [line["bound"] for line in whole if line["what"].startswith("rank that")] == [4, 4, 4]
    printed = []
    for _ in range(2):
        theory.main(COMMAND)
        printed.append(capsys.readouterr().out)
    assert "0.9833" in printed[0] == printed[1]


# Rows and columns


def test_the_error_of_a_mask_is_that_of_the_nearest_update_inside_it(rng) -> None:
    target = low_rank(10, 14, 3, rng)
    block = np.array([1, 4, 5, 8]), np.array([0, 2, 3, 9, 13])
    inside = ~outside(target.shape, block)
    best = theory.best_update(target, *block, rank=3)
    np.testing.assert_allclose(best, target * inside, atol=1e-12)
    least = relative_error(target, best)
    for _ in range(200):
        assert relative_error(target, best + inside * low_rank(10, 14, 3, rng) * rng.choice([1e-3, 1])) > least
    errors = [relative_error(target, theory.best_update(target, *block, rank)) for rank in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2] == pytest.approx(least)
    (simulated,) = theory.least_errors(target, 4, 5, draws=1, rng=np.random.default_rng(7))
    same = np.random.default_rng(7)
    drawn = [np.flatnonzero(theory.indicators(size, kept, draws=1, rng=same)) for size, kept in ((10, 4), (14, 5))]
    assert simulated == pytest.approx(relative_error(target, theory.best_update(target, *drawn, 3)))


def test_the_least_error_of_an_uneven_target_is_one_minus_p_q(rng) -> None:
    target, a, b = low_rank(64, 48, 8, rng) * np.exp(rng.standard_normal((64, 1))), 8, 3
    errors = theory.least_errors(target, a, b, draws=3000, rng=rng)
    least = theory.least_error(a / 64, b / 48)
    assert agrees(errors, least)
    assert agrees((errors - least) ** 2, theory.error_deviation(target, a, b) ** 2)
    for delta in (0.05, 0.3):
        assert np.quantile(errors, 1 - delta) >= theory.least_precision(a / 64, b / 48, delta)


def test_rows_that_are_not_kept_bound_the_error_of_outputs_for_any_inputs(rng) -> None:
    target, mixing = low_rank(40, 30, 4, rng), low_rank(30, 30, 2, rng)  # inputs with two directions: columns are known
    errors = []
    for _ in range(400):
        rows, columns = draw_block(40, 30, 10, 9, rng)
        inputs = mixing @ rng.standard_normal((30, 6))
        update = np.zeros((40, 30))
        update[np.ix_(rows, columns)] = np.linalg.lstsq(inputs[columns].T, (target[rows] @ inputs).T, rcond=None)[0].T
        errors.append(relative_error(target @ inputs, update @ inputs))
    assert agrees(errors, theory.least_output_error(10 / 40))  # here the bound is attained
    assert np.mean(errors) < theory.least_error(10 / 40, 9 / 30) - 0.05  # and is not that of the weights


def test_another_solution_is_exact_and_far_from_the_dense_one(rng) -> None:
    m, n, outputs, examples, a, b = 60, 80, 5, 20, 15, 24
    readout, inputs = rng.standard_normal((outputs, m)), rng.standard_normal((n, examples))
    change = rng.standard_normal((outputs, examples))
    dense = np.linalg.pinv(readout) @ change @ np.linalg.pinv(inputs)
    distances = []
    for _ in range(50):
        block = draw_block(m, n, a, b, rng)
        update = theory.another_solution(readout, inputs, change, *block)
        np.testing.assert_allclose(readout @ update @ inputs, change, atol=1e-9)
        assert np.linalg.matrix_rank(update) <= outputs
        assert not update[outside((m, n), block)].any()
        distances.append(relative_error(dense, update))
    assert min(distances) > 0.5
    for few in ((outputs - 1, b), (a, examples - 1)):
        with pytest.raises(AssertionError):
            theory.another_solution(readout, inputs, change, np.arange(few[0]), np.arange(few[1]))


# Random candidates


@pytest.mark.parametrize(("groups", "keep", "delta"), [(10, 0.5, 0.1), (200, 0.13, 0.05), (50, 0.9, 0.01)])
def test_a_group_keeps_a_member_at_the_size_of_the_union_bound(groups, keep, delta, rng) -> None:
    size, least = theory.group_size(groups, keep, delta), theory.least_group_size(groups, keep, delta)
    assert least in (size, size - 1)
    full = [(rng.random((groups, least)) < keep).any(1).all() for _ in range(3000)]
    assert agrees(full, theory.group_probability(groups, least, keep))
    assert theory.group_probability(groups, least, keep) >= 1 - delta
    assert least == 1 or theory.group_probability(groups, least - 1, keep) < 1 - delta


def test_masks_of_entries_are_seldom_masks_of_rows(rng) -> None:
    drawn = rng.random((40_000, 3, 2)) < 0.7
    assert agrees((drawn == drawn[:, :, :1]).all((1, 2)), 10 ** theory.row_mask_probability(3, 2, 0.7))


def test_the_worst_distance_is_that_of_every_point_tried_one_by_one(rng) -> None:
    for size in (1, 3, 6):
        values = rng.uniform(-1, 1, size)
        sums = np.array([sum(subset) for k in range(size + 1) for subset in itertools.combinations(values, k)])
        literal = abs(np.linspace(-0.5, 0.5, 20_001)[:, None] - sums).min(1).max()
        assert theory.worst_distance(values) == pytest.approx(literal, abs=1e-4)


# Entries of B


@pytest.mark.parametrize(("m", "t", "keep"), [(20, 1, 0.5), (30, 3, 0.4), (768, 4, 0.13)])
def test_the_ranks_that_suffice_and_are_necessary_are_the_first_that_do(m, t, keep, rng) -> None:
    enough, needed = theory.sufficient_rank(m, t, keep, 0.1), theory.necessary_rank(m, t, keep, 0.1)
    assert t < needed <= enough <= theory.block_rank(m, t, keep, 0.1)
    assert m * theory.short_row(enough, t, keep) <= 0.1 < m * theory.short_row(enough - 1, t, keep)
    assert theory.exact_probability(m, enough, t, keep) >= 0.9
    drawn = [theory.entry_mask(m, needed - 1, keep, rng=rng) for _ in range(300)]
    shortages = [np.maximum(0, t - mask.sum(1)).mean() for mask in drawn]
    assert agrees(shortages, theory.expected_shortage(needed - 1, t, keep))


def test_masks_of_an_exact_count_have_the_same_union_bound(rng) -> None:
    m, t, keep = 25, 2, 0.4
    rank = theory.sufficient_rank(m, t, keep, 0.1, counted=True)
    drawn = [theory.entry_mask(m, rank, keep, rng=rng, counted=True) for _ in range(4000)]
    assert {mask.sum() for mask in drawn} == {kept_count(m * rank, 1 - keep)}
    assert agrees([(mask.sum(1) < t).mean() for mask in drawn], theory.short_row(rank, t, keep, counted_of=m))
    assert np.mean([(mask.sum(1) >= t).all() for mask in drawn]) >= 0.9


def exact_factors(left, right, mask, rng) -> tuple[np.ndarray, np.ndarray]:
    """B inside `mask` (m, r) and A (r, n), B A as near to left (m, t) right (t, n) as Gaussian rows of A let it be."""
    mixing = rng.standard_normal((mask.shape[1], left.shape[1]))
    factor = np.zeros(mask.shape)
    for row, kept in enumerate(mask):
        if kept.any():
            factor[row, kept] = np.linalg.lstsq(mixing[kept].T, left[row], rcond=None)[0]
    return factor, mixing @ right


@pytest.mark.parametrize("t", [1, 4])
def test_rows_that_keep_the_targets_rank_make_it_exact(t, rng) -> None:
    m, n, r = 30, 17, 9
    mask = np.zeros((m, r), dtype=bool)
    for row in mask:
        row[rng.choice(r, t, replace=False)] = True
    left, right = rng.standard_normal((m, t)), rng.standard_normal((t, n))
    b, a = exact_factors(left, right, mask, rng)
    assert not b[~mask].any()
    np.testing.assert_allclose(b @ a, left @ right, atol=1e-8)
    mask[7] = False  # a row that keeps nothing is a row of zeros
    b, a = exact_factors(left, right, mask, rng)
    difference = abs(b @ a - left @ right)
    assert difference[7].max() > 0.1
    assert np.delete(difference, 7, axis=0).max() < 1e-8


def test_a_target_is_reached_in_blocks_of_copies(rng) -> None:
    m, n, t, keep = 12, 9, 2, 0.6
    rank = theory.block_rank(m, t, keep, 0.01)
    blocks = theory.entry_mask(m, rank, keep, rng=rng).reshape(m, t, -1)
    assert blocks.any(2).all()
    left, right = rng.standard_normal((m, t)), rng.standard_normal((t, n))
    b = np.zeros(blocks.shape)
    np.put_along_axis(b, blocks.argmax(2)[..., None], left[..., None], axis=2)
    np.testing.assert_allclose((b * blocks).reshape(m, rank) @ np.repeat(right, rank // t, axis=0), left @ right)


def reachable_dimension(mask: np.ndarray, t: int, rng) -> int:
    """The dimension of {B G : B inside mask (m, r), G (r, t)}: the Jacobian's rank at a random point."""
    factor, mixing = rng.standard_normal(mask.shape) * mask, rng.standard_normal((mask.shape[1], t))
    by_factor = np.kron(np.eye(len(mask)), mixing)[mask.ravel()]
    by_mixing = np.kron(factor.T, np.eye(t))
    return int(np.linalg.matrix_rank(np.vstack([by_factor, by_mixing])))


@pytest.mark.parametrize(("m", "r", "t", "keep"), [(30, 4, 2, 0.2), (25, 6, 3, 0.3), (40, 5, 1, 0.5)])
def test_what_masks_leave_reachable_has_no_more_dimensions_than_counted(m, r, t, keep, rng) -> None:
    too_few = 0
    for _ in range(20):
        mask = theory.entry_mask(m, r, keep, rng=rng)
        dimension = reachable_dimension(mask, t, rng)
        assert dimension <= theory.dimension_bound(mask, t)
        too_few += theory.dimension_bound(mask, t) < m * t
        if (mask.sum(1) >= t).all():
            assert dimension == m * t
    assert too_few > 0


@pytest.mark.parametrize(("r", "t", "p", "q"), [(8, 1, 0.3, 0.3), (16, 2, 0.5, 0.25), (7, 3, 0.4, 0.6)])
@pytest.mark.parametrize("counted", [False, True])
def test_masks_of_entries_of_both_factors_hold_a_part_of_every_target_that_grows_with_the_rank(
    r, t, p, q, counted, rng
) -> None:
    m, n, errors = 40, 30, []
    for _ in range(300):
        left = theory.entry_mask(m, r, p, rng=rng, counted=counted)
        right = theory.entry_mask(r, n, q, rng=rng, counted=counted)
        target = low_rank(m, n, t, rng)
        update = theory.shared_directions(target, left, right, t, p, q)
        assert not update[~(left.astype(int) @ right > 0)].any()
        errors.append(relative_error(target, update))
    mean, error = theory.estimate(errors)
    assert (1 - p * q) ** r <= mean <= theory.most_error(r, t, p, q) + 5 * error
    assert theory.most_error(r, t, p, q) < theory.least_error(p, q)


# First order


def test_rows_and_columns_chosen_apart_can_hold_nothing_at_all() -> None:
    gradient = np.array([[0.0, 1, 1], [1, 0, 0], [1, 0, 0]])
    assert theory.mass(gradient, *theory.top(gradient, 1, 1)) == 0
    assert theory.mass(gradient, *theory.top_in_turn(gradient, 1, 1)) >= 1 / 9


def logistic(weight: np.ndarray, inputs: np.ndarray, signs: np.ndarray) -> tuple[float, np.ndarray]:
    """The summed mean logistic losses of every row of W (rows, features), and its gradient."""
    margins = signs * (weight @ inputs)
    pull = -signs / (1 + np.exp(margins)) / inputs.shape[1]
    return float(np.logaddexp(0, -margins).sum() / inputs.shape[1]), pull @ inputs.T


@pytest.mark.parametrize("rank", [None, 1, 3])
@pytest.mark.parametrize(("m", "n", "examples"), [(6, 10, 30), (30, 20, 15)])
def test_a_step_inside_the_mask_lowers_a_smooth_loss_by_what_is_guaranteed(m, n, examples, rank, rng) -> None:
    inputs, signs = rng.standard_normal((n, examples)), rng.choice([-1.0, 1], (m, examples))
    beta = np.linalg.norm(inputs, 2) ** 2 / (4 * examples)
    weight = rng.standard_normal((m, n))
    before, gradient = logistic(weight, inputs, signs)
    for block in (draw_block(m, n, m // 2, n // 2, rng), theory.top(gradient, m // 2, n // 2)):
        move = theory.step(gradient, *block, beta, rank)
        assert not move[outside((m, n), block)].any()
        after, _ = logistic(weight + move, inputs, signs)
        assert before - after >= theory.guaranteed_decrease(gradient, *block, beta, rank) > 0
        whole = theory.guaranteed_decrease(gradient, *block, beta)
        assert whole == pytest.approx(theory.mass(gradient, *block) * (gradient**2).sum() / (2 * beta))
        assert theory.guaranteed_decrease(gradient, *block, beta, 1) < whole


def test_a_block_that_keeps_its_share_of_the_gradient_holds_a_solution_as_good_as_the_best(rng) -> None:
    n, examples, b = 120, 10, 40
    inputs, wanted = rng.standard_normal((n, examples)), rng.standard_normal((4, examples))
    beta, mu = (np.linalg.svd(inputs, compute_uv=False) ** 2 / examples)[[0, -1]]
    block = draw_block(4, n, 4, b, rng)
    weight, losses, masses = np.zeros((4, n)), [], []
    for _ in range(60):
        rest = weight @ inputs - wanted
        gradient = rest @ inputs.T / examples
        losses.append((rest**2).sum() / (2 * examples))
        masses.append(theory.mass(gradient, *block))
        weight = weight + theory.step(gradient, *block, beta)
    for steps, loss in enumerate(losses):
        assert loss <= losses[0] * theory.contraction(min(masses), mu, beta, steps) * (1 + 1e-9)
    assert losses[-1] < 1e-3 * losses[0]
    assert relative_error(wanted @ np.linalg.pinv(inputs), weight) > 0.5  # not by approximating the dense solution
    weight, without_a_row = np.zeros((4, n)), (block[0][:3], block[1])
    for _ in range(400):
        gradient = (weight @ inputs - wanted) @ inputs.T / examples
        weight = weight + theory.step(gradient, *without_a_row, beta)
    assert theory.mass(gradient, *without_a_row) < 1e-9  # the outputs of the fourth never move
