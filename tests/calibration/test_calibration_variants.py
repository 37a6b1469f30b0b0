"""Axes, scopes and the rule above chance against a literal twin: every point a full pass over a copy of the model."""

from __future__ import annotations

import math
import os
import signal

import pytest
import torch
from scored_models import Counted, Named, full_accuracy, scored_draw, tiny_vit, with_zeroed
from torch import nn

from partial_lora import PartialLoraError, calibrate
from partial_lora.calibration.budget import kept_parameters
from partial_lora.calibration.score import FewShotScore
from partial_lora.calibration.search import bisect, digest_of, line, passes, passes_at_most, scan, threshold_of
from partial_lora.masks import AXES

BLOCKS = "vit.blocks"

TARGETS = ["attn.qkv", "mlp.fc2"]
NAMES = [f"vit.blocks.{block}.{target}" for block in range(3) for target in TARGETS]
LEVELS = [0.2, 0.4, 0.6, 0.8]
GRID = {"target_modules": TARGETS, "levels": 0.2, "max_sparsity": 0.8}


class Twin:
    """The score of a copy of the model with cuts made, each set of cuts once."""

    def __init__(self):
        self.model = Named(tiny_vit())
        self.batches = scored_draw(self.model)
        self.baseline, self.known = full_accuracy(self.model, self.batches), {}

    def __call__(self, cuts):
        key = frozenset(cut for cut in cuts if cut[2])
        if key not in self.known:
            self.known[key] = full_accuracy(with_zeroed(self.model, key), self.batches)
        return self.known[key]

    def calibrated(self, enough, axes="separate", scope="independent", search=scan, levels=LEVELS):
        """Algorithm 1, as it is said: the sparsities, and the score with all of them."""
        made, names = [], NAMES if scope != "cumulative_backward" else NAMES[::-1]
        sparsity = {name: {} for name in NAMES}
        for name in names:
            for together in [("rows",), ("columns",)] if axes == "separate" else [AXES]:

                def survives(level, name=name, together=together):
                    before = made if scope != "independent" else []
                    return enough(self([*before, *((name, axis, level) for axis in together)]))

                level = search(survives, levels)
                for axis in together:
                    sparsity[name][axis] = level
                    made.append((name, axis, level))
        return sparsity, self(made)


@pytest.fixture(scope="module")
def twin():
    return Twin()


class Strict(Counted):
    """A score with bounds that trusts nobody: only the module named may differ from what it has last been told of."""

    def __init__(self, batches, limit=math.inf):
        super().__init__(batches, limit)
        self.told = None

    def __call__(self, model):
        if self.told is None:
            self.told = {name: value.clone() for name, value in model.state_dict().items()}
        return super().__call__(model)

    def settled(self, module):
        self.told[f"{module}.weight"] = self.model.get_submodule(module).weight.clone()

    def bounds(self, model, module, undecided, known=None):
        self.model = model
        for name, value in model.state_dict().items():
            assert name == f"{module}.weight" or torch.equal(value, self.told[name])
        score, (low, high) = super().__call__(model), known or (0.0, 1.0)
        assert low <= score <= high
        while low < high and undecided(low, high):
            low, high = min(score, low + 1 / 8), max(score, high - 1 / 8)
        return low, high


def enough(twin, threshold, chance=None):
    return lambda score: passes(score, baseline=twin.baseline, threshold=threshold, chance=chance)


VARIANTS = [
    (axes, scope)
    for axes in ("separate", "joint")
    for scope in ("independent", "cumulative", "cumulative_backward")
    if (axes, scope) != ("separate", "independent")
]


@pytest.mark.parametrize("search", ["scan", "bisect"])
@pytest.mark.parametrize(("axes", "scope"), VARIANTS)
def test_variants_against_the_literal_twin(model, batches, score, twin, axes, scope, search):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kind = {"axes": axes, "scope": scope}
    expected = twin.calibrated(enough(twin, 0.8), **kind, search={"scan": scan, "bisect": bisect}[search])
    strict = Strict(batches)
    for each in (strict, score):
        found = calibrate(model, each, threshold=0.8, search=search, **GRID, **kind)
        assert (found.sparsity, found.joint) == expected
        assert list(found.sparsity) == NAMES
        assert (found.axes, found.scope, found.baseline) == (axes, scope, twin.baseline)
    if scope != "independent":
        assert enough(twin, 0.8)(found.joint)
        assert expected[0] != twin.calibrated(enough(twin, 0.8), axes=axes)[0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert torch.equal(value, strict.told[name])  # it has been told that the weights are back


def test_a_score_that_cannot_be_told_of_choices_is_asked_in_full(model, batches, twin):
    class Deaf(Strict):
        @property
        def settled(self):
            raise AttributeError

    found = calibrate(model, Deaf(batches), threshold=0.8, scope="cumulative", **GRID)
    assert (found.sparsity, found.joint) == twin.calibrated(enough(twin, 0.8), scope="cumulative")


def test_joint_axes_share_one_curve(model, score):
    found = calibrate(model, score, axes="joint", **GRID)
    for axes in found.modules.values():
        assert axes["rows"] == axes["columns"]
    told = []
    calibrate(model, score, axes="joint", **GRID, progress=lambda done, total, **what: told.append((done, total, what)))
    assert [(done, total, what["axis"]) for done, total, what in told] == [(n, 6, "joint") for n in range(1, 7)]


def test_scopes_differ_by_the_order_in_which_modules_choose(twin):
    assert len({str(twin.calibrated(enough(twin, 0.8), scope=scope)[0]) for _, scope in VARIANTS}) == 3


def test_weights_come_back_however_a_cumulative_calibration_ends(model, batches):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for limit in (9, 17, 26):
        score = Strict(batches, limit)
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, score, threshold=0.8, scope="cumulative", **GRID)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name])
            assert torch.equal(value, score.told[name])


# The rule above chance


def test_what_is_just_enough():
    assert line(baseline=0.8, threshold=0.9) == pytest.approx(0.72)
    assert line(baseline=-0.45, threshold=0.9) == pytest.approx(-0.5)
    assert line(baseline=0.8, threshold=0.9, chance=0.5) == pytest.approx(0.77)
    assert line(baseline=-0.4, threshold=0.75, chance=-2.4) == pytest.approx(-0.9)
    assert passes(0.77, baseline=0.8, threshold=0.9, chance=0.5)
    assert not passes(0.77 - 1e-8, baseline=0.8, threshold=0.9, chance=0.5)
    for threshold in (0.0, 0.5, 1.0):
        assert not passes(1.0, baseline=0.5, threshold=threshold, chance=0.5)  # nothing is above chance
        assert not passes(math.nan, baseline=-0.5, threshold=threshold)
    for baseline, chance in ((0.8, 0.2), (-0.4, -2.3)):
        at = threshold_of(chance, baseline=baseline)
        assert line(baseline=baseline, threshold=at) == pytest.approx(chance)


@pytest.mark.parametrize("scope", ["independent", "cumulative"])
def test_the_threshold_above_chance_against_the_literal_twin(model, score, twin, scope):
    found = calibrate(model, score, threshold=0.6, chance=0.5, above_chance=True, scope=scope, **GRID)
    assert (found.sparsity, found.joint) == twin.calibrated(enough(twin, 0.6, 0.5), scope=scope)
    assert (found.chance, found.above_chance) == (0.5, True)
    assert found.sparsity != twin.calibrated(enough(twin, 0.6), scope=scope)[0]


@pytest.mark.parametrize(
    ("above_chance", "scope"), [(False, "cumulative"), (True, "cumulative"), (True, "independent")]
)
def test_losses_are_below_zero_in_every_variant(model, batches, above_chance, scope):
    """The bounds of a loss reach down to infinity, and a repair takes none of it for the score."""

    def minus_loss(model):
        with torch.no_grad():
            logits = torch.cat([model(batch["pixel_values"]) for batch in batches])
        return -float(nn.functional.cross_entropy(logits, torch.cat([batch["labels"] for batch in batches])))

    kind = {"threshold": 0.85, "above_chance": above_chance, "scope": scope, "repair": True, "chance": -1.9, **GRID}
    expected, found = (
        calibrate(model, by, **kind) for by in (minus_loss, FewShotScore(model, batches, "loss", BLOCKS))
    )
    assert found.sparsity == expected.sparsity
    assert found.joint == pytest.approx(expected.joint, rel=1e-5)
    needed = line(baseline=found.baseline, threshold=0.85, chance=-1.9 if above_chance else None)
    assert found.joint >= needed
    assert 0 < sum(level for axes in found.sparsity.values() for level in axes.values()) < 0.8 * 12


def test_chance_is_what_the_score_says_unless_it_is_given(model, batches):
    score = Counted(batches)
    score.chance = 0.5
    kind = {"threshold": 0.6, "above_chance": True, **GRID}
    said, given = calibrate(model, score, **kind), calibrate(model, Counted(batches), chance=0.5, **kind)
    assert (said.chance, said.sparsity) == (0.5, given.sparsity)
    assert calibrate(model, score, chance=0.4, **kind).chance == 0.4


def test_a_baseline_at_chance_leaves_nothing_to_calibrate(model, batches, twin):
    score = Counted(batches)
    found = calibrate(model, score, chance=twin.baseline, above_chance=True, **GRID)
    assert all(level == 0 for axes in found.sparsity.values() for level in axes.values())
    assert score.calls == 2  # the baseline and the joint score: no level could have passed
    assert "poorly suited model" in found.warnings[0]
    share = calibrate(model, score, chance=twin.baseline, above_chance=True, budget=0.3, **GRID)
    densities = [1 - level for axes in share.sparsity.values() for level in axes.values()]
    assert min(densities) == pytest.approx(max(densities), abs=0.04)  # all alike, to within a row


# Budgets


@pytest.mark.parametrize("kind", [{"scope": "cumulative"}, {"axes": "joint"}, {"axes": "joint", "scope": "cumulative"}])
@pytest.mark.parametrize("budget", [0.25, 0.7])
def test_budgets_are_met_in_every_variant(model, batches, twin, kind, budget):
    found = calibrate(model, Strict(batches), budget=budget, rank=4, chance=0.3, **GRID, **kind)
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in NAMES}
    count = math.floor(budget * 4 * sum(map(sum, shapes.values())))
    assert 0.99 * count <= kept_parameters(shapes, 4, found.sparsity) <= count
    chosen, _ = twin.calibrated(enough(twin, found.threshold), **kind)
    assert found.scaled == (chosen != found.sparsity)
    for name, axes in found.modules.items():
        for axis, entry in axes.items():
            assert entry.get("level", entry["sparsity"]) == chosen[name][axis]
    cuts = [(name, axis, level) for name, axes in found.sparsity.items() for axis, level in axes.items()]
    assert found.joint == full_accuracy(with_zeroed(twin.model, cuts), batches)


# Nothing twice


@pytest.mark.parametrize(("axes", "scope"), VARIANTS)
def test_thresholds_share_what_has_the_same_choices_before_it(model, batches, tmp_path, axes, scope):
    kind, store = {"axes": axes, "scope": scope, **GRID}, tmp_path / "curves.json"
    alone = calibrate(model, Counted(batches), threshold=0.85, **kind)
    calibrate(model, Counted(batches), threshold=0.9, store=store, **kind)
    score = Counted(batches)
    shared = calibrate(model, score, threshold=0.85, store=store, **kind)
    assert (shared.modules.keys(), shared.sparsity, shared.joint) == (alone.modules.keys(), alone.sparsity, alone.joint)
    assert score.calls < alone.evaluations
    again = calibrate(model, lambda model: pytest.fail("evaluated again"), threshold=0.85, store=store, **kind)
    assert again.cached
    assert again.modules == shared.modules


def test_one_store_keeps_every_variant_apart(model, batches, tmp_path):
    store = tmp_path / "curves.json"
    for axes, scope in [("separate", "independent"), *VARIANTS]:
        for more in ({}, {"above_chance": True, "chance": 0.4}, {"repair": True}):
            kind = {"axes": axes, "scope": scope, "threshold": 0.8, **GRID, "target_modules": ["mlp.fc2"], **more}
            found, fresh = (calibrate(model, Counted(batches), store=at, **kind) for at in (store, None))
            assert not found.cached
            assert (found.sparsity, found.joint) == (fresh.sparsity, fresh.joint)


def test_a_digest_names_what_is_zeroed_and_not_how_it_came_about():
    rows_then_columns = {"a": {"rows": 0.5, "columns": 0.5}, "b": {"rows": 0.2}}
    assert digest_of(rows_then_columns) == digest_of({"b": {"rows": 0.2, "columns": 0.0}, "a": {"joint": 0.5}})
    assert digest_of({}) == digest_of({"a": {"rows": 0.0}}) == ""
    others = [{"a": {"rows": 0.5}}, {"a": {"columns": 0.5}}, {"b": {"rows": 0.5}}, {"a": {"rows": 0.6}}]
    assert len({digest_of(cuts) for cuts in (rows_then_columns, *others)}) == 5


@pytest.mark.parametrize("kind", [{"scope": "cumulative"}, {"axes": "joint", "scope": "cumulative_backward"}])
def test_a_killed_calibration_keeps_every_finished_module(model, batches, tmp_path, kind):
    store = tmp_path / "curves.json"
    whole = calibrate(model, Counted(batches), threshold=0.8, **GRID, **kind)
    reached = 2 * whole.evaluations // 3

    class Killed(Counted):
        def __call__(self, model):
            if self.calls == reached:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(model)

    child = os.fork()
    if not child:
        try:
            calibrate(model, Killed(batches), threshold=0.8, store=store, **GRID, **kind)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    rest = calibrate(model, Counted(batches), threshold=0.8, store=store, **GRID, **kind)
    assert rest.modules == whole.modules
    most = 2 * len(LEVELS)  # of the module it died in
    assert rest.evaluations <= whole.evaluations - reached + 1 + most


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"axes": "both"}, r"calibration.axes=both: expected one of separate, joint"),
        ({"scope": "all"}, r"calibration.scope=all: expected one of independent, cumulative, cumulative_backward"),
        ({"repair": True, "budget": 0.5}, r"calibration.repair=true: .*calibration.budget=0.5"),
        ({"above_chance": True}, r"calibration.chance=majority: this score does not say"),
        ({"chance": math.nan}, r"calibration.chance=nan"),
    ],
)
def test_variants_that_make_no_sense_are_named(model, arguments, message):
    with pytest.raises(PartialLoraError, match=message) as error:
        calibrate(model, lambda model: 1.0, **GRID | arguments)
    assert "\n" not in str(error.value)


def test_passes_are_counted_by_hand():
    assert passes_at_most(48, 2, 19, search="scan") == 48 * 2 * 19 + 1
    assert passes_at_most(48, 1, 19, search="bisect") == 48 * 5 + 1
    assert [passes_at_most(1, 1, levels, search="bisect") - 1 for levels in (1, 3, 4, 7, 8)] == [1, 2, 3, 3, 4]


@pytest.mark.parametrize("search", ["scan", "bisect"])
@pytest.mark.parametrize("more", [{}, {"axes": "joint"}, {"scope": "cumulative"}, {"repair": True}])
def test_no_calibration_takes_more_passes_than_foretold(model, batches, search, more):
    found = calibrate(model, Counted(batches), target_modules=TARGETS, levels=0.2, search=search, threshold=0.8, **more)
    axes = 1 if "axes" in more else 2
    foretold = passes_at_most(6, axes, 4, search=search, repair="repair" in more)
    assert found.evaluations <= foretold + 1  # and the baseline
