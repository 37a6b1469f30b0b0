"""Curves predicted from gradients against a literal twin, against linear models, and as a search of a calibration."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from scored_models import (
    GRID,
    Counted,
    Named,
    graded,
    labelled,
    linears,
    questions,
    random_model,
    scored_draw,
    texts,
    tiny_vit,
    word_batches,
)
from torch import nn

from partial_lora import PartialLoraError, calibrate
from partial_lora.budget import kept_parameters
from partial_lora.calibration import gradient, level_search, score
from partial_lora.calibration.importance import svd
from partial_lora.calibration.level_search import COMPETING, passes_at_most
from partial_lora.calibration.reuse import logits_of
from partial_lora.calibration.score import FewShotScore
from partial_lora.masks import AXES, Mask

LEVELS = [0.2, 0.4, 0.6, 0.8]
CURVES = (*AXES, "joint")


def removed_from(modules):
    """The rows and columns that each level zeroes, as 1, the others as 0."""
    removed = {}
    for name, module in modules.items():
        kept = [[Mask.top(of_axis, level).dense() for level in LEVELS] for of_axis in svd(module.weight.detach())]
        removed[name] = {
            axis: 1 - torch.from_numpy(np.stack(of, 1)).float() for axis, of in zip(AXES, kept, strict=True)
        }
    return removed


def literally(scored, model, modules, removed, batches, most=COMPETING):
    """The score at every level, from the gradient of each output of each row for the weights themselves."""
    weights = [module.weight.requires_grad_() for module in modules.values()]
    values = {(name, axis, place): [] for name in modules for axis in CURVES for place in range(len(LEVELS))}
    for batch in batches:
        intact, moved = [], {point: [] for point in values}
        for row in range(len(batch["labels"])):
            own = {name: value[row : row + 1] for name, value in batch.items()}
            inputs = {name: value for name, value in own.items() if name not in ("labels", "items", "answers")}
            outputs = scored.measure.outputs(logits_of(model(**inputs)), own).reshape(1, -1)
            places = range(outputs.shape[1])
            if len(places) > most:
                label = int(own["labels"])
                places = [label, *[place for place in outputs[0].argsort(descending=True).tolist() if place != label]]
            intact.append(outputs.detach())
            changed = {point: outputs.detach().clone() for point in values}
            for place in places[:most]:
                for name, of_weight in zip(
                    modules, torch.autograd.grad(outputs[0, place], weights, retain_graph=True), strict=True
                ):
                    entries = (of_weight * modules[name].weight).detach()
                    for level in range(len(LEVELS)):
                        rows, columns = (removed[name][axis][:, level].bool() for axis in AXES)
                        together = rows[:, None] | columns
                        for axis, gone in zip(
                            CURVES,
                            (rows[:, None].expand_as(together), columns.expand_as(together), together),
                            strict=True,
                        ):
                            changed[name, axis, level][0, place] -= entries[gone].sum()
            for point, output in changed.items():
                moved[point].append(output)
        for point, rows in moved.items():
            values[point].append(scored.measure.judged(torch.cat(rows), batch))
    for weight in weights:
        weight.requires_grad_(False)
    weight = sum(map(scored.measure.weight, batches))
    return {point: float(torch.cat(of).sum()) / weight for point, of in values.items()}


def shared_positions():
    return random_model("deberta"), word_batches(), None


def images():
    model = Named(tiny_vit())
    return model, scored_draw(model), "vit.blocks"


CASES = {
    "accuracy": (images, "accuracy"),
    "class loss": (labelled, "loss"),
    "squared error": (graded, "loss"),
    "token loss": (texts, "loss"),
    "options": (questions, "options_per_token"),
    "inputs that rows share": (shared_positions, "loss"),
}


@pytest.mark.parametrize("case", CASES)
def test_predictions_are_those_of_the_gradients_of_each_row_for_the_weights(case):
    make, measure = CASES[case]
    model, batches, blocks = make()
    scored = FewShotScore(model, batches, measure, blocks)
    part = "layer" if blocks != "vit.blocks" else "blocks"
    modules = {name: model.get_submodule(name) for name in linears(model, part)[1:6:2]}
    removed = removed_from(modules)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    predicted, passes = scored.predicted(model, modules, removed, CURVES)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert asked == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert (
        passes
        == scored.evaluations.passes
        == 1 + {"accuracy": 4, "class loss": 3}.get(case, 1 if case != "inputs that rows share" else 3)
    )
    expected = literally(scored, model, modules, removed, batches)
    assert len({round(value, 6) for value in expected.values()}) > 3
    for (name, axis, place), value in expected.items():
        assert predicted[name][axis][place] == pytest.approx(value, rel=1e-3, abs=1e-5), (name, axis, place)


def test_of_many_classes_the_right_one_and_the_likeliest_compete(monkeypatch):
    monkeypatch.setattr(score, "COMPETING", 2)
    model, batches, blocks = images()
    scored = FewShotScore(model, batches, "loss", blocks)
    modules = {name: model.get_submodule(name) for name in linears(model)[:4]}
    predicted, passes = scored.predicted(model, modules, removed_from(modules), CURVES)
    assert passes == 3
    for (name, axis, place), value in literally(scored, model, modules, removed_from(modules), batches, 2).items():
        assert predicted[name][axis][place] == pytest.approx(value, rel=1e-3, abs=1e-5)


# A linear model, of which a prediction is the truth


class Linear(nn.Module):
    """Two linear layers, one on every token, and the mean over tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 10), nn.Linear(10, 4)

    def forward(self, pixel_values):
        return self.second(self.first(pixel_values)).mean(1)


def linear():
    model = Linear()
    images = torch.randn(60, 5, 12, generator=torch.Generator().manual_seed(1))
    labels = model(images).argmax(-1)
    labels[::6] = (labels[::6] + 1) % 4
    parts = zip(images.split(20), labels.split(20), strict=True)
    return model, [{"pixel_values": part, "labels": label} for part, label in parts]


@pytest.mark.parametrize(
    ("measure", "axes"), [("accuracy", "separate"), ("accuracy", "joint"), ("loss", "separate"), ("f1", "joint")]
)
def test_of_a_linear_model_the_curves_are_those_of_a_scan(measure, axes):
    model, batches = linear()
    kind = {"target_modules": ["first", "second"], "levels": 0.1, "axes": axes}
    for asked in ({"threshold": 0.9}, {"threshold": 0.6}, {"budget": 0.6, "chance": 0.2}):
        kind |= {"chance": None} | asked
        found = calibrate(model, FewShotScore(model, batches, measure), search="gradient", **kind)
        scanned = calibrate(model, FewShotScore(model, batches, measure), **kind)
        assert found.sparsity == scanned.sparsity
        assert found.threshold == pytest.approx(scanned.threshold, abs=1e-5)
        assert (found.search, found.joint) == ("gradient", pytest.approx(scanned.joint))
        for name, entries in found.modules.items():
            for axis, entry in entries.items():
                predicted = dict(entry["curve"])
                assert list(predicted) == found.grid
                for level, value in scanned.modules[name][axis]["curve"]:
                    low, high = value if isinstance(value, list) else (value, value)
                    given = predicted[level] if isinstance(predicted[level], list) else [predicted[level]] * 2
                    assert given[0] <= high + 1e-5
                    assert low is None or low - 1e-5 <= given[1]


# The search


class Read(nn.Linear):
    """A linear layer around which the model goes to the weight."""

    def __init__(self, own: nn.Linear) -> None:
        super().__init__(own.in_features, own.out_features)
        self.load_state_dict(own.state_dict())

    def __call__(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


def found_by(model, batches, **kind):
    scored = FewShotScore(model, batches, blocks="vit.blocks")
    return calibrate(model, scored, search="gradient", **GRID | kind), scored


def test_few_points_are_evaluated_and_what_they_say_goes_before_the_prediction(model, batches, monkeypatch):
    monkeypatch.setattr(level_search, "CHECKED", 0.3)
    literal, differing = calibrate(model, Counted(batches), threshold=0.01, **GRID), 0
    for threshold in (0.9, 0.8, 0.6):
        found, scored = found_by(model, batches, threshold=threshold)
        modules = {name: model.get_submodule(name) for name in found.modules}
        predicted, _ = scored.predicted(model, modules, removed_from(modules), AXES)
        curves = {
            name: {axis: dict(zip(LEVELS, ((score, score) for score in own), strict=True)) for axis, own in of.items()}
            for name, of in predicted.items()
        }
        levels = gradient.levels_of(curves, LEVELS, partial(found.passes, threshold=threshold))
        tried = sum(min(round(level / 0.2) + 1, 4) for of in levels.values() for level in of.values())
        evaluated = 0
        for name, entries in found.modules.items():
            for axis, entry in entries.items():
                truth = dict(literal.modules[name][axis]["curve"])
                for level, value in entry["curve"]:
                    if value != curves[name][axis][level][0]:
                        low, high = value if isinstance(value, list) else (value, value)
                        assert low <= truth.get(level, low) <= high
                        evaluated += 1
        assert evaluated <= found.evaluations - 2 - 5 <= 0.3 * tried
        for axes in found.modules.values():  # the points on file say why each level was chosen
            for entry in axes.values():
                low = [value[0] if isinstance(value, list) else value for _, value in entry["curve"]]
                passed = [found.passes(score, threshold) for score in low]
                assert entry["sparsity"] == [0.0, *found.grid][[*passed, False].index(False)]
        differing += evaluated
    assert differing


def test_the_points_nearest_to_the_line_are_evaluated_first(monkeypatch):
    grid, asked = [0.25, 0.5, 0.75], []
    scores = {"a": [0.95, 0.82, 0.5], "b": [0.95, 0.7, 0.79], "c": [0.99, 0.98, 0.97]}
    predicted = {
        name: {"rows": {level: (each, each) for level, each in zip(grid, of, strict=True)}}
        for name, of in scores.items()
    }
    kind = {"enough": lambda score: score >= 0.8, "line": 0.8}

    def survives(module, axis, level):
        asked.append((module, level))
        return module == "b"

    for share, expected in ((0.0, []), (0.25, [("a", 0.5), ("b", 0.5)]), (0.4, [("a", 0.5), ("b", 0.5), ("b", 0.75)])):
        asked.clear()
        monkeypatch.setattr(level_search, "CHECKED", share)
        found = gradient.checked(predicted, grid, survives=survives, **kind)
        assert asked == expected
        levels = gradient.levels_of(predicted, grid, kind["enough"], found)
        b = {0: 0.25, 2: 0.5, 3: 0.75}[len(asked)]
        assert levels == {"a": {"rows": 0.25 if asked else 0.5}, "b": {"rows": b}, "c": {"rows": 0.75}}


def test_of_many_points_few_are_evaluated():
    assert [level_search.checks(points) for points in (0, 19, 100, 639, 640, 10**4)] == [0, 0, 5, 31, 32, 32]
    assert [level_search.checks(points, outputs=1) for points in (100, 10**4)] == [5, 7]  # as long as one gradient


def test_what_is_stored_is_what_a_fresh_calibration_finds(model, batches, tmp_path, monkeypatch):
    store = tmp_path / "curves.json"
    fresh = {threshold: found_by(model, batches, threshold=threshold)[0] for threshold in (0.9, 0.8, 0.6)}
    with monkeypatch.context() as patch:  # a calibration that is stopped once the curves are predicted
        patch.setattr(FewShotScore, "bounds", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            found_by(model, batches, threshold=0.8, store=store)
    monkeypatch.setattr(FewShotScore, "predicted", None)  # from here on nothing is predicted
    for threshold, expected in fresh.items():  # what one has evaluated decides nothing for another
        found, _ = found_by(model, batches, threshold=threshold, store=store)
        assert (found.modules, found.joint, found.cached) == (expected.modules, expected.joint, False)
        again = calibrate(model, None, threshold=threshold, search="gradient", store=store, **GRID)
        assert (again.modules, again.cached, again.evaluations) == (expected.modules, True, 0)
    scanned = calibrate(model, FewShotScore(model, batches), threshold=0.8, store=store, **GRID)
    assert scanned.modules == calibrate(model, FewShotScore(model, batches), threshold=0.8, **GRID).modules


@pytest.mark.parametrize("kind", [{}, {"axes": "joint"}, {"repair": True}, {"budget": 0.3, "rank": 4}])
def test_it_takes_no_more_passes_than_the_most_and_tells_its_share_of_them(model, batches, kind):
    told = []
    found, scored = found_by(model, batches, progress=lambda *count, **what: told.append((count, what)), **kind)
    curves = 4 if "axes" in kind else 8
    most = passes_at_most(4, curves // 4, 4, search="gradient", repair="repair" in kind)
    assert found.evaluations == scored.evaluations.passes <= most + 1  # and the baseline
    assert [count for count, _ in told] == [(0, curves)] * (len(told) - 1) + [(curves, curves)]
    shares = [what["share"] for _, what in told]
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert shares == sorted(shares)  # from batch to batch, and from point to point
    if "repair" not in kind:
        assert len(set(shares)) >= len(batches)
    if "budget" in kind:
        shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in found.modules}
        count = int(0.3 * 4 * sum(map(sum, shapes.values())))
        assert 0.99 * count <= kept_parameters(shapes, 4, found.sparsity) <= count
        assert found.evaluations == 2 + 5  # no point is evaluated


def test_what_cannot_be_predicted_is_refused_by_its_key(model, batches):
    class Inference(Named):
        def forward(self, pixel_values):
            with torch.no_grad():
                return super().forward(pixel_values)

    for calibrated in (
        lambda: calibrate(model, Counted(batches), search="gradient", **GRID),
        lambda: found_by(Inference(tiny_vit()), batches),
    ):
        with pytest.raises(PartialLoraError, match=r"^calibration\.search=gradient: .*"):
            calibrated()
    with pytest.raises(PartialLoraError, match=r"^calibration\.scope=cumulative: .*gradient"):
        found_by(model, batches, scope="cumulative")
    last = list(model.vit.blocks)[-1].mlp
    own = last.fc2  # its weight is read without a call, as some models of timm do
    last.fc2 = Read(own)
    with pytest.raises(PartialLoraError, match=r"^calibration\.search=gradient: .*fc2"):
        found_by(model, batches)
    last.fc2 = own
