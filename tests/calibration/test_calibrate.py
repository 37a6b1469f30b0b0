"""Algorithm 1 in every variant against a literal twin: every point a full pass over a copy of the model."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from refusals import refusal
from scored_models import GRID, TARGETS, VARIANTS, Counted, Named, full_accuracy, scored_draw, tiny_vit, with_zeroed
from torch import nn

from partial_lora import PartialLoraError, calibrate
from partial_lora.budget import kept_parameters
from partial_lora.calibration.importance import svd
from partial_lora.calibration.level_search import bisect, line, passes, passes_at_most, scan
from partial_lora.calibration.score import FewShotScore
from partial_lora.masks import AXES

NAMES = [f"vit.blocks.{block}.{target}" for block in range(2) for target in TARGETS]
LEVELS = [0.2, 0.4, 0.6, 0.8]


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
        """Algorithm 1 to the letter: the sparsities, and the score with all of them."""
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

    def joint(self, sparsity):
        return self([(name, axis, level) for name, axes in sparsity.items() for axis, level in axes.items()])


@pytest.fixture(scope="module")
def twin():
    return Twin()


class Strict(Counted):
    """A score with bounds that trusts nobody: only the module named may differ from the model it knows."""

    def __init__(self, batches, limit=math.inf):
        super().__init__(batches, limit)
        self.weights = None

    def __call__(self, model):
        if self.weights is None:
            self.weights = {name: value.clone() for name, value in model.state_dict().items()}
        return super().__call__(model)

    def settled(self, module):
        self.weights[f"{module}.weight"] = self.model.get_submodule(module).weight.clone()

    def bounds(self, model, module, undecided, known=None):
        self.model = model
        for name, value in model.state_dict().items():
            assert name == f"{module}.weight" or torch.equal(value, self.weights[name])
        score, (low, high) = super().__call__(model), known or (0.0, 1.0)
        assert low <= score <= high
        while low < high and undecided(low, high):
            low, high = min(score, low + 1 / 8), max(score, high - 1 / 8)
        return low, high


def enough(twin, threshold, chance=None):
    return lambda score: passes(score, baseline=twin.baseline, threshold=threshold, chance=chance)


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model, before):
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("axes", "scope", "search"),
    [*((*variant, "scan") for variant in VARIANTS), *((*variant, "bisect") for variant in (VARIANTS[0], VARIANTS[4]))],
)
def test_every_variant_is_that_of_the_literal_twin(model, batches, score, twin, axes, scope, search):
    before, kind = weights_of(model), {"axes": axes, "scope": scope}
    expected = twin.calibrated(enough(twin, 0.8), **kind, search={"scan": scan, "bisect": bisect}[search])
    strict = Strict(batches)
    for each in (strict, score):
        result = calibrate(model, each, threshold=0.8, search=search, **GRID, **kind)
        assert (result.sparsity, result.joint) == expected
        assert list(result.sparsity) == NAMES
        assert (result.axes, result.scope, result.baseline) == (axes, scope, twin.baseline)
        assert (result.threshold, result.search, result.cached) == (0.8, search, False)
    if scope == "independent":
        for name, entries in result.modules.items():
            for axis, entry in entries.items():
                together = AXES if axes == "joint" else (axis,)
                for level, value in entry["curve"]:
                    low, high = value if isinstance(value, list) else (value, value)
                    assert low <= twin([(name, each, level) for each in together]) <= high
    else:
        assert enough(twin, 0.8)(result.joint)
        others = {"independent", "cumulative", "cumulative_backward"} - {scope}
        assert expected[0] not in [twin.calibrated(enough(twin, 0.8), axes=axes, scope=other)[0] for other in others]
    assert_unchanged(model, before)
    assert_unchanged(model, strict.weights)  # it knows that the weights are back


def test_a_plain_score_gives_what_one_with_bounds_gives(model, batches, score):
    plain = calibrate(model, Counted(batches), target_modules=TARGETS, levels=0.1, threshold=0.7)
    bounded = calibrate(model, score, target_modules=TARGETS, levels=0.1, threshold=0.7)
    assert (bounded.sparsity, bounded.joint) == (plain.sparsity, plain.joint)
    assert bounded.evaluations == plain.evaluations == score.evaluations.passes
    rows = sum(len(batch["labels"]) for batch in batches)
    assert score.evaluations.sample_blocks < 0.75 * plain.evaluations * len(model.vit.blocks) * rows


def test_a_score_that_cannot_settle_is_evaluated_in_full(model, batches, twin):
    class Unsettled(Strict):
        @property
        def settled(self):
            raise AttributeError

    result = calibrate(model, Unsettled(batches), threshold=0.8, scope="cumulative", **GRID)
    assert (result.sparsity, result.joint) == twin.calibrated(enough(twin, 0.8), scope="cumulative")


@pytest.mark.parametrize(("axes", "names"), [("separate", AXES), ("joint", ("joint",))])
def test_progress_counts_every_curve(model, score, axes, names):
    reports = []
    result = calibrate(model, score, axes=axes, **GRID, progress=lambda *count, **what: reports.append((count, what)))
    curves = len(NAMES) * len(names)
    assert (first := reports.pop(0))[0] == (0, curves)
    assert first[1].keys() == {"share", "left"}  # what it will take
    assert [count for count, _ in reports] == [(done, curves) for done in range(1, curves + 1)]
    assert [(what["module"], what["axis"]) for _, what in reports] == [(name, each) for name in NAMES for each in names]
    for _, what in reports:
        axis = "rows" if what["axis"] == "joint" else what["axis"]
        assert result.sparsity[what["module"]][axis] == what["sparsity"]


def test_progress_weighs_a_curve_by_the_blocks_that_its_passes_run(model, batches, tmp_path):
    def shares(score, **kind):
        told = []
        calibrate(model, score, **GRID, **kind, progress=lambda *count, share, **what: told.append(share))
        return told

    store, blocks = tmp_path / "curves.json", FewShotScore(model, batches, blocks="vit.blocks")
    costs = [2] * 4 + [1] * 4  # the two curves of two modules in each of two blocks
    assert shares(blocks, store=store) == pytest.approx([sum(costs[:done]) / 12 for done in range(9)])
    assert shares(Counted(batches)) == pytest.approx([done / 8 for done in range(9)])
    assert set(shares(blocks, store=store, threshold=0.95)) == {0.0, 1.0}  # what is known already takes no time
    for kind in ({"budget": 0.5}, {"threshold": 0.8, "repair": True}):  # of the most that there can be
        told = shares(Counted(batches), **kind)
        assert (told[0], told[-1]) == (0.0, 1.0)
        assert told == sorted(told)
        assert max(told[:-1]) < 1


@pytest.mark.parametrize("scope", ["independent", "cumulative"])
def test_weights_come_back_however_a_calibration_ends(model, batches, scope):
    model.train()
    before = weights_of(model)
    for limit in (5, 9, 14):
        score = Strict(batches, limit)
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, score, threshold=0.8, scope=scope, **GRID)
        assert_unchanged(model, before)
        assert_unchanged(model, score.weights)
    assert all(module.training for module in model.modules())


def test_weights_come_back_from_a_signal_amid_zeroing(model, batches):
    def interrupted(frame, event: str, function) -> None:
        if event == "c_return" and function.__name__ == "index_fill_":
            raise KeyboardInterrupt

    before = weights_of(model)
    sys.setprofile(interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, Counted(batches), threshold=0.8, **GRID)
    finally:
        sys.setprofile(None)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("search", "more"),
    [("scan", {}), ("bisect", {"axes": "joint"}), ("scan", {"scope": "cumulative"}), ("bisect", {"repair": True})],
)
def test_no_calibration_takes_more_passes_than_the_most(model, batches, search, more):
    result = calibrate(
        model, Counted(batches), target_modules=TARGETS, levels=0.2, search=search, threshold=0.8, **more
    )
    most = passes_at_most(4, 1 if "axes" in more else 2, 4, search=search, repair="repair" in more)
    assert result.evaluations <= most + 1  # and the baseline


# Losses, and the rule above chance


def minus_loss(batches):
    def score(model):
        with torch.no_grad():
            logits = torch.cat([model(batch["pixel_values"]) for batch in batches])
        return -float(nn.functional.cross_entropy(logits, torch.cat([batch["labels"] for batch in batches])))

    return score


@pytest.mark.parametrize(
    ("above_chance", "scope"), [(False, "cumulative"), (True, "cumulative"), (True, "independent")]
)
def test_bounds_and_repairs_of_a_loss(model, batches, above_chance, scope):
    """The bounds of a loss reach down to infinity, and a repair takes none of it for the score."""
    kind = {"threshold": 0.85, "above_chance": above_chance, "scope": scope, "repair": True, "chance": -1.9, **GRID}
    scores = (minus_loss(batches), FewShotScore(model, batches, "loss", "vit.blocks"))
    expected, result = (calibrate(model, by, **kind) for by in scores)
    assert result.sparsity == expected.sparsity
    assert result.joint == pytest.approx(expected.joint, rel=1e-5)
    assert result.joint >= line(baseline=result.baseline, threshold=0.85, chance=-1.9 if above_chance else None)
    assert 0 < sum(level for axes in result.sparsity.values() for level in axes.values()) < 0.8 * 8


def test_modules_of_a_model_with_an_adapter_have_the_names_of_its_base(model, batches):
    expected = calibrate(model, Counted(batches), **GRID).sparsity
    adapted = get_peft_model(Named(tiny_vit()), LoraConfig(r=2, target_modules=["head"]))
    assert calibrate(adapted, Counted(batches), **GRID).sparsity == expected


@pytest.mark.parametrize("search", ["scan", "bisect"])
def test_a_budget_gives_the_same_shares_with_and_without_chance(model, score, search):
    kind = {"budget": 0.3, "search": search, "chance": 0.2, **GRID}
    ignored, majority = (calibrate(model, score, above_chance=above, **kind) for above in (False, True))
    assert ignored.sparsity == majority.sparsity
    assert ignored.threshold != majority.threshold  # the same line, as a share of another height


@pytest.mark.parametrize("scope", ["independent", "cumulative"])
def test_the_threshold_above_chance_against_the_literal_twin(model, score, twin, scope):
    result = calibrate(model, score, threshold=0.6, chance=0.5, above_chance=True, scope=scope, **GRID)
    assert (result.sparsity, result.joint) == twin.calibrated(enough(twin, 0.6, 0.5), scope=scope)
    assert (result.chance, result.above_chance) == (0.5, True)
    assert result.sparsity != twin.calibrated(enough(twin, 0.6), scope=scope)[0]


def test_chance_is_the_score_s_own_unless_it_is_given(model, batches):
    score = Counted(batches)
    score.chance = 0.5
    kind = {"threshold": 0.6, "above_chance": True, **GRID}
    own, given = calibrate(model, score, **kind), calibrate(model, Counted(batches), chance=0.5, **kind)
    assert (own.chance, own.sparsity) == (0.5, given.sparsity)
    assert calibrate(model, score, chance=0.4, **kind).chance == 0.4


def test_a_baseline_at_chance_leaves_nothing_to_calibrate(model, batches, twin):
    score = Counted(batches)
    result = calibrate(model, score, chance=twin.baseline, above_chance=True, **GRID)
    assert all(level == 0 for axes in result.sparsity.values() for level in axes.values())
    assert score.calls == 2  # the baseline and the joint score: no level could have passed
    assert "poorly suited model" in result.warnings[0]
    share = calibrate(model, score, chance=twin.baseline, above_chance=True, budget=0.3, **GRID)
    densities = [1 - level for axes in share.sparsity.values() for level in axes.values()]
    assert min(densities) == pytest.approx(max(densities), abs=0.04)  # all alike, to within a row


# Budgets


def shapes_of(model):
    return {name: tuple(model.get_submodule(name).weight.shape) for name in NAMES}


@pytest.mark.parametrize(
    ("budget", "kind"),
    [
        (0.25, {}),
        (0.7, {"scope": "cumulative"}),
        (0.7, {"axes": "joint"}),
        (0.25, {"axes": "joint", "scope": "cumulative"}),
    ],
)
def test_budgets_are_met_in_every_variant(model, batches, twin, kind, budget):
    result = calibrate(model, Strict(batches), budget=budget, rank=4, chance=0.3, **GRID, **kind)
    shapes = shapes_of(model)
    count = math.floor(budget * 4 * sum(map(sum, shapes.values())))
    assert 0.99 * count <= kept_parameters(shapes, 4, result.sparsity) <= count
    chosen, _ = twin.calibrated(enough(twin, result.threshold), **kind)
    assert (result.budget, result.scaled) == (budget, chosen != result.sparsity)
    for name, axes in result.modules.items():
        for axis, entry in axes.items():
            assert entry.get("level", entry["sparsity"]) == chosen[name][axis]
    assert result.joint == twin.joint(result.sparsity)


@pytest.mark.parametrize("budget", [0.5, 0.9])
def test_a_budget_is_the_largest_threshold_that_meets_it(model, score, twin, budget):
    result = calibrate(model, score, budget=budget, rank=4, chance=0.0, **GRID)
    shapes = shapes_of(model)
    count = math.floor(budget * 4 * sum(map(sum, shapes.values())))
    cuts = [[(name, axis, level)] for name in NAMES for axis in AXES for level in LEVELS]
    thresholds = sorted({twin(cut) / twin.baseline for cut in cuts} | {1.0}, reverse=True)
    meeting = (
        at for at in thresholds if at <= 1 and kept_parameters(shapes, 4, twin.calibrated(enough(twin, at))[0]) <= count
    )
    assert result.threshold == pytest.approx(next(meeting), abs=2e-6)


def test_a_budget_never_follows_scores_below_chance(model, score, twin):
    chance = 0.8 * twin.baseline
    result = calibrate(model, score, budget=0.2, chance=chance, **GRID)
    assert result.threshold == pytest.approx(0.8)
    assert result.scaled
    shapes, (chosen, _) = shapes_of(model), twin.calibrated(enough(twin, 0.8))
    sizes = {(name, axis): size for name in NAMES for axis, size in zip(AXES, shapes[name], strict=True)}
    kept = {(name, axis): (1 - chosen[name][axis]) * size for (name, axis), size in sizes.items()}
    factor = 0.2 * sum(sizes.values()) / sum(kept.values())  # every density times one factor, to within a row
    for (name, axis), size in sizes.items():
        assert abs((1 - result.sparsity[name][axis]) * size - factor * kept[name, axis]) <= 1
    assert 0.99 * 0.2 <= kept_parameters(shapes, 1, result.sparsity) / sum(sizes.values()) <= 0.2


# Arguments


def test_importance_by_name_by_function_or_given(model, batches):
    scores = {name: svd(model.get_submodule(name).weight, k=4) for name in NAMES}
    options = {"threshold": 0.8, **GRID}
    by_name = calibrate(model, Counted(batches), importance_options={"k": 4}, **options)
    assert by_name.modules == calibrate(model, Counted(batches), importance=scores, **options).modules
    by_function = calibrate(model, Counted(batches), importance=svd, importance_options={"k": 4}, **options)
    assert by_name.modules == by_function.modules
    random = [
        calibrate(model, Counted(batches), importance="random", seed=seed, **options).sparsity for seed in (0, 0, 1)
    ]
    assert random[0] == random[1] != random[2]


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"threshold": 0}, r"calibration.threshold=0: "),
        ({"repair": True, "budget": 0.5}, r"calibration.repair=.*calibration.budget=0.5"),
        ({"above_chance": True}, r"calibration.chance=majority: "),
        ({"chance": math.nan}, r"calibration.chance=nan: "),
        ({"importance": "snap"}, r"importance=snap: .*svd"),
        ({"importance_options": {"k": 99}}, r"importance.k=99: .*vit.blocks.0.attn.qkv"),
        ({"budget": 2.0}, r"calibration.budget=2: .*128"),
        ({"budget": -1}, r"calibration.budget=-1: "),
        ({"sparsity": 0.5}, r"calibration.sparsity=0.5: "),
        ({"budget": 1e9}, r"calibration.budget=1e.09: "),
    ],
)
def test_bad_arguments_are_named(model, arguments, key):
    with refusal(f".*({key})"):
        calibrate(model, lambda model: 1.0, **GRID | arguments)


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        *(("calibration.threshold", {"threshold": value}) for value in ("a", None, True)),
        ("calibration.budget", {"budget": "0.1"}),
        ("calibration.levels", {"levels": 1e-9}),  # a grid of a billion levels
        ("calibration.seed", {"seed": 0.5}),
        ("calibration.repair", {"repair": "yes"}),
        ("calibration.file", {"file": "calibration.json"}),
        *(("rank", {"rank": value}) for value in (0, "16")),
        ("granularity", {"granularity": "cell"}),
        *(("target_modules", {"target_modules": value}) for value in (None, "(")),
        ("model", {"model": None}),
        *(("score", {"score": value}) for value in (None, 3, lambda model: "x", lambda model: None, lambda model: "1")),
        ("importance=", {"importance": lambda weight, **others: None}),
        ("importance.energy", {"importance_options": {"energy": -1}}),
        ("importance=svd", {"importance_options": {"k": "a"}}),
        *((key, {key: value}) for key, value in {"shots": 1, "shrink": 0.5, "kept": 1e6, "reliability": True}.items()),
    ],
)
def test_what_calibrate_cannot_use_is_refused_by_name(model, score, key, settings):
    with refusal(key):
        calibrate(**{"model": model, "score": score, **GRID, **settings})


def test_numbers_of_numpy_are_as_good_as_others(model, score):
    found = calibrate(model, score, threshold=np.float32(0.75), seed=np.int64(0), **GRID)
    assert found.sparsity == calibrate(model, score, threshold=0.75, **GRID).sparsity


def test_a_baseline_that_is_no_number_is_refused(model):
    with pytest.raises(PartialLoraError, match=r"frozen model is inf"):
        calibrate(model, lambda model: math.inf, target_modules=TARGETS)


def test_a_compiled_model_is_calibrated_by_the_names_that_an_adapter_has(model, score):
    found = calibrate(torch.compile(model, backend="eager"), score, target_modules=["mlp.fc2"], levels=0.4)
    assert found.sparsity == calibrate(model, score, target_modules=["mlp.fc2"], levels=0.4).sparsity
