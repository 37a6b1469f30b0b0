"""Repair against a literal twin that takes one step at a time and sorts anew before each."""

from __future__ import annotations

import itertools
import random

import pytest
from scored_models import GRID, Counted, full_accuracy, with_zeroed

from partial_lora import calibrate
from partial_lora.calibration.level_search import both_axes, passes
from partial_lora.calibration.repair import relax, relaxations
from partial_lora.masks import kept_count

LEVELS = [0.2, 0.4, 0.6, 0.8]
SHAPES = {"a": (12, 8), "b": (30, 7), "c": (5, 5)}


def below(level):
    return ([0.0, *LEVELS])[LEVELS.index(level)]


def literal_order(levels, shapes, own):
    """Every step, from the definition: lowest own score, then fewest rows and columns given back, then model order."""
    levels = {module: dict(of) for module, of in levels.items()}
    while any(level for of in levels.values() for level in of.values()):

        def key(place):
            _, (module, axis) = place
            level, (out, into) = levels[module][axis], shapes[module]
            sizes = {"rows": [out], "columns": [into], "joint": [out, into]}[axis]
            back = sum(kept_count(size, below(level)) - kept_count(size, level) for size in sizes)
            return own(module, axis, level), back, place[0]

        open_ = [(module, axis) for module, of in levels.items() for axis in of]
        _, (module, axis) = min((it for it in enumerate(open_) if levels[it[1][0]][it[1][1]]), key=key)
        levels[module][axis] = below(levels[module][axis])
        yield module, axis


def drawn(seed, axes=("rows", "columns")):
    generator = random.Random(seed)
    levels = {module: {axis: generator.choice([0.0, *LEVELS]) for axis in axes} for module in SHAPES}
    curves = {(m, a, level): generator.randrange(4) / 4 for m in SHAPES for a in axes for level in LEVELS}
    return levels, lambda *point: curves[point]


@pytest.mark.parametrize("axes", [("rows", "columns"), ("joint",)])
@pytest.mark.parametrize("seed", range(20))
def test_the_order_against_the_literal_twin(seed, axes):
    levels, own = drawn(seed, axes)
    assert list(relaxations(levels, LEVELS, SHAPES, own)) == list(literal_order(levels, SHAPES, own))


def test_a_level_without_a_score_has_lost_all_of_it():
    levels = {"a": {"rows": 0.4}, "b": {"rows": 0.4}}
    own = {("a", "rows", 0.4): 0.3, ("b", "rows", 0.4): float("nan")}
    assert next(relaxations(levels, LEVELS, SHAPES, lambda *point: own[point])) == ("b", "rows")


@pytest.mark.parametrize("seed", range(20))
def test_as_few_steps_as_are_enough_where_each_adds_to_the_score(seed):
    levels, own = drawn(seed)
    order = list(literal_order(levels, SHAPES, own))
    states = [levels]
    for module, axis in order:
        state = {name: dict(of) for name, of in states[-1].items()}
        state[module][axis] = below(state[module][axis])
        states.append(state)
    worth = {str(both_axes(state)): place / max(1, len(order)) for place, state in enumerate(states)}
    asked = []

    def joint(sparsity):
        asked.append(worth[str(sparsity)])
        return asked[-1]

    for needed in range(len(states)):
        asked.clear()
        bound = needed / max(1, len(order))
        found, score, steps = relax(
            levels, LEVELS, SHAPES, own=own, joint=joint, enough=lambda value, bound=bound: value >= bound, before=0.0
        )
        assert (found, score, steps) == (states[needed], bound if needed else 0.0, needed)
        assert len(asked) == len(set(asked)) <= 2 * max(1, needed).bit_length() + 1


def test_one_step_fewer_is_not_enough_even_where_scores_jump():
    levels = {"a": {"rows": 0.8, "columns": 0.8}, "b": {"rows": 0.8, "columns": 0.8}}
    for seed in range(30):
        generator = random.Random(seed)
        scores = [0.0, *(generator.choice([0.0, None, 1.0]) for _ in range(15)), 1.0]
        total = sum(LEVELS.index(level) + 1 for of in levels.values() for level in of.values())

        def joint(sparsity, scores=scores, total=total):
            left = sum([0.0, *LEVELS].index(level) for of in sparsity.values() for level in of.values())
            return scores[total - left]

        _, score, steps = relax(
            levels, LEVELS, SHAPES, own=lambda *_: 0.5, joint=joint, enough=lambda value: value >= 1, before=0.0
        )
        assert score == scores[steps] == 1
        assert steps > 0
        assert scores[steps - 1] != 1


def test_nothing_to_relax_is_left_as_it_is():
    kept = {"a": {"rows": 0.0, "columns": 0.0}}
    given = {"own": pytest.fail, "joint": pytest.fail}
    assert relax(kept, LEVELS, SHAPES, enough=lambda score: False, before=0.3, **given) == (kept, 0.3, 0)
    full = {"a": {"rows": 0.8, "columns": 0.8}}
    assert relax(full, LEVELS, SHAPES, enough=lambda score: True, before=0.9, **given) == (full, 0.9, 0)


# With a model


@pytest.mark.parametrize(("axes", "threshold", "bounded"), [("separate", 0.85, True), ("joint", 0.8, False)])
def test_a_repaired_calibration_against_the_literal_twin(model, batches, score, axes, threshold, bounded):
    kind = GRID | {"threshold": threshold}
    plain = calibrate(model, Counted(batches), axes=axes, **kind)
    assert not passes(plain.joint, baseline=plain.baseline, threshold=threshold)
    found = calibrate(model, score if bounded else Counted(batches), axes=axes, repair=True, **kind)

    def accuracy(cuts):
        return full_accuracy(with_zeroed(model, cuts), batches)

    def own(module, axis, level):
        return accuracy([(module, each, level) for each in (("rows", "columns") if axis == "joint" else (axis,))])

    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in plain.modules}
    levels = plain.chosen
    for module, axis in itertools.islice(literal_order(levels, shapes, own), found.repaired["steps"]):
        last = [(name, each, level) for name, of in both_axes(levels).items() for each, level in of.items()]
        levels[module][axis] = below(levels[module][axis])
    assert found.sparsity == both_axes(levels)
    cuts = [(name, axis, level) for name, of in found.sparsity.items() for axis, level in of.items()]
    assert found.joint == accuracy(cuts)
    assert passes(found.joint, baseline=found.baseline, threshold=threshold)
    assert not passes(accuracy(last), baseline=found.baseline, threshold=threshold)
    assert found.repaired["joint_before"] == plain.joint
    assert found.repaired["threshold"] == threshold
    assert 0 < found.repaired["evaluations"] < found.evaluations
    assert found.chosen == plain.chosen  # what the curves said stays on record
    assert not [words for words in found.warnings if "joint score" in words]


def test_a_repair_that_was_not_needed_says_so(model):
    found = calibrate(model, lambda model: 1.0, target_modules=["mlp.fc2"], levels=0.4, repair=True)
    assert found.repaired == {"joint_before": 1.0, "steps": 0, "threshold": 0.9, "evaluations": 0}
