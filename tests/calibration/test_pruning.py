"""Iterative magnitude pruning: against a loop that trains and prunes one by one, and what every round must hold to."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from test_saliency import Perceptron, assert_same, draw
from torch.nn import functional

from partial_lora.calibration import importance
from partial_lora.errors import PartialLoraError


@pytest.fixture
def perceptron():
    return Perceptron().eval()


@pytest.fixture
def modules(perceptron):
    return {"first": perceptron.first, "second": perceptron.second}


def imp(model, modules, batches=None, *, seed=0, loss=None, **options):
    batches = draw() if batches is None else batches
    return importance.data_scores("imp", model, modules, batches, seed=seed, options=options, loss=loss)


class Watched:
    """The loss, and what it was asked about: the weights of each step and its examples."""

    def __init__(self, modules):
        self.modules, self.weights, self.batches = modules, [], []

    def __call__(self, model, batch):
        self.weights.append({name: module.weight.detach().clone() for name, module in self.modules.items()})
        self.batches.append(batch)
        return importance.task_loss(model, batch)


def norm(entries):
    return math.sqrt(sum(entry**2 for entry in entries.tolist()))


def literal(model, names, batch, *, rounds, fraction, steps, learning_rate):
    """The slow twin: AdamW written out, on all examples at once; rows and columns fall one at a time."""
    fallen = {name: ([], []) for name in names}
    for _ in range(rounds):
        trained = copy.deepcopy(model)  # rewound
        weights = {name: trained.get_submodule(name).weight for name in names}

        def clear(weights=weights):
            for name, weight in weights.items():
                for row in fallen[name][0]:
                    weight.data[row] = 0
                for column in fallen[name][1]:
                    weight.data[:, column] = 0

        clear()
        first = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        second = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        for step in range(1, steps + 1):
            trained.zero_grad()
            functional.cross_entropy(trained(batch["inputs"]), batch["labels"]).backward()
            for name, weight in weights.items():
                first[name] = 0.9 * first[name] + 0.1 * weight.grad
                second[name] = 0.999 * second[name] + 0.001 * weight.grad**2
                root = (second[name] / (1 - 0.999**step)).sqrt()
                weight.data -= learning_rate * (first[name] / (1 - 0.9**step)) / (root + 1e-8)
            clear()
        for name, weight in weights.items():
            rows = [norm(weight[i]) for i in range(len(weight))]
            columns = [norm(weight[:, j]) for j in range(weight.shape[1])]
            for gone, norms in zip(fallen[name], (rows, columns), strict=True):
                left = len(norms) - len(gone)
                for _ in range(min(max(1, math.floor(fraction * left + 0.5)), left - 1)):
                    candidates = [index for index in range(len(norms)) if index not in gone]
                    gone.append(min(candidates, key=lambda index: (norms[index], -index)))
            last = fallen[name][0], rows, fallen[name][1], columns
            fallen_and_left = []
            for gone, norms in (last[:2], last[2:]):
                left = [index for index in range(len(norms)) if index not in gone]
                fallen_and_left.append([*gone, *sorted(left, key=lambda index: (norms[index], -index))])
            weights[name] = fallen_and_left
        order = weights
    return {
        name: tuple(
            torch.tensor([float(axis.index(i)) for i in range(len(axis))], dtype=torch.float64) for axis in axes
        )
        for name, axes in order.items()
    }


@pytest.mark.parametrize("rounds", [1, 2, 4])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_it_is_training_pruning_and_rewinding(rounds, steps, perceptron, modules):
    options = {"rounds": rounds, "fraction": 0.3, "steps": steps, "learning_rate": 0.05}
    (batch,) = draw((11,))
    assert_same(imp(perceptron, modules, [batch], **options), literal(perceptron, list(modules), batch, **options))


def test_training_has_a_say(perceptron, modules):
    still = imp(perceptron, modules, steps=0)
    moved = imp(perceptron, modules, steps=5, learning_rate=0.05)
    assert any(not torch.equal(still[name][axis], moved[name][axis]) for name in modules for axis in (0, 1))


def test_one_round_without_training_is_magnitude(perceptron, modules):
    for name, pair in imp(perceptron, modules, rounds=1, steps=0).items():
        for some, size in zip(pair, importance.magnitude(modules[name].weight), strict=True):
            assert torch.equal(some.argsort(), size.argsort())


@pytest.mark.parametrize("rounds", [1, 3, 20])
@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.99])
def test_the_order_is_total(rounds, fraction, perceptron, modules):
    with torch.no_grad():
        perceptron.first.weight[:3] = perceptron.first.weight[0]  # rows alike
        perceptron.second.weight.zero_()
    found = imp(perceptron, modules, rounds=rounds, fraction=fraction, steps=0)
    for axis in (0, 1):
        assert sorted(found["first"][axis].tolist()) == list(range(len(found["first"][axis])))
        size = len(found["second"][axis])
        assert found["second"][axis].tolist() == list(range(size - 1, -1, -1))  # of equals the lower index is kept
    assert found["first"][0][0] > found["first"][0][1] > found["first"][0][2]


def test_every_round_starts_from_the_pretrained_values_of_what_is_left(perceptron, modules):
    watched = Watched(modules)
    found = imp(perceptron, modules, rounds=3, fraction=0.34, steps=4, learning_rate=0.05, loss=watched)
    left = {"first": [(6, 7), (4, 5), (3, 3)], "second": [(5, 6), (3, 4), (2, 3)]}
    for number in range(3):
        for name, module in modules.items():
            rows, columns = (len(axis) - kept for axis, kept in zip(found[name], left[name][number], strict=True))
            kept = (found[name][0] >= rows)[:, None] & (found[name][1] >= columns)
            assert torch.equal(watched.weights[4 * number][name], module.weight * kept)
            for step in range(1, 4):
                weight = watched.weights[4 * number + step][name]
                assert torch.equal(weight != 0, kept)  # what has fallen never moves
                assert not torch.equal(weight, module.weight * kept)


def test_examples_are_mixed_and_each_is_seen_before_any_comes_again(perceptron, modules):
    watched = Watched(modules)
    batches = draw((4, 4, 3))
    sorted_by_class = torch.cat([batch["inputs"] for batch in batches])
    imp(perceptron, modules, batches, rounds=1, steps=6, loss=watched)
    first, second = (torch.cat([batch["inputs"] for batch in watched.batches[i : i + 3]]) for i in (0, 3))
    for seen in (first, second):
        assert not torch.equal(seen, sorted_by_class)
        assert sorted(seen[:, 0].tolist()) == sorted(sorted_by_class[:, 0].tolist())
    assert not torch.equal(first, second)
    labels = {tuple(row.tolist()): int(label) for batch in batches for row, label in zip(*batch.values(), strict=True)}
    for batch in watched.batches:
        assert [labels[tuple(row.tolist())] for row in batch["inputs"]] == batch["labels"].tolist()


def test_batches_of_other_lengths_stay_whole():
    batches = [{"input_ids": torch.full((2, length), length)} for length in (3, 4, 5)]
    shuffled = importance._shuffled(batches, torch.Generator().manual_seed(0))
    assert sorted(batch["input_ids"].shape[1] for batch in shuffled) == [3, 4, 5]


def test_equal_seeds_agree_and_others_see_the_examples_in_another_order(perceptron, modules):
    options = {"steps": 3, "learning_rate": 0.05}
    assert_same(
        imp(perceptron, modules, seed=1, **options), imp(perceptron, modules, seed=1, **options), atol=0, rtol=0
    )
    seen = [Watched(modules) for _ in range(2)]
    for seed, watched in enumerate(seen):
        imp(perceptron, modules, seed=seed, loss=watched, **options)
    assert not torch.equal(seen[0].batches[0]["inputs"], seen[1].batches[0]["inputs"])


def test_training_that_diverges_is_said_and_leaves_the_model_alone(perceptron, modules):
    before = perceptron.first.weight.detach().clone()
    with pytest.raises(PartialLoraError, match=r"first diverged; lower importance\.learning_rate"):
        imp(perceptron, modules, steps=2, loss=lambda model, batch: model(batch["inputs"]).sum() * math.nan)
    assert torch.equal(perceptron.first.weight, before)
