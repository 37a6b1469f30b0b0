"""Calibration as a run asks for it: from settings to the record, on a tiny model."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from sklearn import metrics

from partial_lora import Calibration, progress, tasks, train
from partial_lora.budget import kept_parameters
from partial_lora.building import build
from partial_lora.calibration import few_shot
from partial_lora.calibration import score as scoring
from partial_lora.calibration.reliability import reliability
from partial_lora.launching import directory as record
from partial_lora.settings.compose import composed
from partial_lora.settings.versions import plain

TINY = ("model=tiny_vit", "trainer.device=cpu", "calibration.shots=4", "calibration.seed=3", "calibration.levels=0.2")
TINY += ("model.target_modules=[attn.qkv,mlp.fc2]",)


class Place:
    """A cache and the directories of the calibrations that share it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def calibrate(self, *overrides: str) -> tuple[Path, dict]:
        """A calibration's directory and its record, which has to fit into JSON."""
        self.count += 1
        directory = self.folder / str(self.count)
        directory.mkdir()
        chosen = composed(*TINY, *overrides)
        entry = record.new(plain(chosen))
        train.run(chosen, directory, entry, "calibrate")
        json.dumps(entry, allow_nan=False)
        return directory, entry


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("PARTIAL_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(progress.VARIABLE, str(tmp_path / "events"))
    monkeypatch.setattr(progress, "_last", {})
    return Place(tmp_path)


@torch.no_grad()
def literal_scores(seed: int = 3, shots: int = 4) -> dict[str, float]:
    """Every score of the frozen model, from its predictions on the scored draw."""
    chosen = composed(*TINY)
    task = build.task_of(chosen)
    transform = build.transform_of(chosen.model, chosen.task)
    draws = tasks.few_shot_draws(task.train["label"], shots=shots, seed=seed)
    fit, scored = (transform.batches(task.train.select(rows), 40) for rows in (draws.fit, draws.scored))
    torch.manual_seed(chosen.seed)
    model = build.model_of(chosen.model, task.labels).eval()
    with few_shot.few_shot_head(model, chosen.model.head, fit):
        logits, labels = model(pixel_values=scored[0]["pixel_values"]).logits, scored[0]["labels"]
    predictions = logits.argmax(-1)
    return {
        "auto": metrics.accuracy_score(labels, predictions),
        "f1": metrics.f1_score(labels, predictions, average="macro"),
        "matthews": metrics.matthews_corrcoef(labels, predictions),
        "loss": -metrics.log_loss(labels, logits.double().softmax(-1).numpy(), labels=range(10)),
    }


def test_the_score_that_is_asked_for_is_the_one_that_is_held(place: Place) -> None:
    expected = literal_scores()
    keys = set()
    for score, value in expected.items():
        directory, entry = place.calibrate(f"calibration.score={score}", "calibration.max_sparsity=0.05")
        assert entry["calibration"]["baseline"] == pytest.approx(value, abs=1e-5)
        keys.add(json.loads((directory / "calibration.json").read_text())["settings"]["key"])
    assert len(keys) == len(expected)  # nothing that one score has found is taken for another's
    directory, entry = place.calibrate("calibration.score=accuracy", "calibration.max_sparsity=0.05")
    assert entry["calibration"]["cached"]


def test_without_a_seed_of_its_own_it_has_the_run_s_and_the_methods_of_one_seed_share_it(place: Place) -> None:
    asked = ("calibration.max_sparsity=0.05", "importance=random")
    found = [
        place.calibrate(*asked, *more)[1]["calibration"]["cached"]
        for more in (
            ("calibration.seed=null", "seed=5", "method=partial"),
            ("calibration.seed=null", "seed=6", "method=partial"),
            ("calibration.seed=null", "seed=6", "method=shuffled"),
            ("calibration.seed=5", "seed=0", "method=partial"),
        )
    ]
    assert found == [False, False, True, True]


@pytest.mark.parametrize(
    ("overrides", "holds"),
    [
        (["calibration.axes=joint"], lambda found: all(a["rows"] == a["columns"] for a in found.sparsity.values())),
        (
            ["calibration=threshold", "calibration.scope=cumulative"],
            lambda found: found.joint >= 0.9 * found.baseline - 1e-9,
        ),
        (
            ["calibration=threshold", "calibration.scope=cumulative_backward"],
            lambda found: found.joint >= 0.9 * found.baseline - 1e-9,
        ),
        (
            ["calibration.repair=true"],
            lambda found: found.joint >= 0.9 * found.baseline - 1e-9 and found.repaired["steps"],
        ),
        (["calibration.chance=majority"], lambda found: found.above_chance and found.chance == 0.1),
        (["calibration=budget"], lambda found: found.budget == 0.13 and not found.above_chance),
    ],
)
def test_a_variant_is_what_it_promises(place: Place, overrides: list[str], holds) -> None:
    directory, entry = place.calibrate(*overrides)
    found = Calibration.load(directory / "calibration.json")
    assert holds(found)
    assert {name: entry["calibration"][name] for name in ("axes", "scope", "repaired", "above_chance")} == {
        "axes": found.axes,
        "scope": found.scope,
        "repaired": found.repaired,
        "above_chance": found.above_chance,
    }
    assert entry["sparsity"] == found.sparsity


def test_memory_changes_nothing_that_is_found(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = []

    class Watched(scoring.FewShotScore):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            scores.append(self)

        def bounds(self, *arguments: object) -> tuple[float, float]:
            found = super().bounds(*arguments)
            self.most = max(getattr(self, "most", 0), self._reuse.bytes)
            return found

    monkeypatch.setattr(few_shot, "FewShotScore", Watched)
    _, none = place.calibrate("calibration=threshold", "calibration.memory=0")
    (place.folder / "cache" / "calibrations").rename(place.folder / "kept")
    place.calibrate("calibration=threshold")
    assert [score.most > 0 for score in scores if hasattr(score, "most")] == [False, True]
    _, much = place.calibrate("calibration=threshold")
    assert much["calibration"]["cached"]
    assert (none["calibration"]["cached"], none["sparsity"]) == (False, much["sparsity"])


def test_options_of_another_measure_leave_what_was_found_usable(place: Place) -> None:
    def cached(*overrides: str) -> bool:
        return place.calibrate("calibration.max_sparsity=0.05", *overrides)[1]["calibration"]["cached"]

    assert [cached("importance.rounds=5"), cached("importance.rounds=6")] == [False, True]
    by_pruning = ("importance=imp", "importance.steps=1", "importance.rounds=1")
    assert [cached(*by_pruning), cached(*by_pruning), cached(*by_pruning, "importance.fraction=0.5")] == [0, 1, 0]


def test_a_budget_is_met_by_the_shapes_on_record(place: Place) -> None:
    _, entry = place.calibrate("calibration=budget")
    shapes = {name: tuple(shape) for name, shape in entry["shapes"].items()}
    dense = kept_parameters(shapes, 16, 0.0)
    assert 0.99 * 0.13 * dense <= kept_parameters(shapes, 16, entry["sparsity"]) <= 0.13 * dense


def test_warnings_come_everywhere(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        directory, entry = place.calibrate("calibration.shots=100", "calibration.max_samples=40")
    warnings = entry["calibration"]["warnings"]
    assert warnings[0].startswith("calibration.shots=100: ")
    assert len(warnings) > 1  # random weights: the joint score, at the least
    assert all(warning in caplog.text for warning in warnings)
    assert json.loads((directory / "calibration.json").read_text())["warnings"] == warnings


def test_a_file_is_used_as_it_is_whatever_stands_beside_it(place: Place) -> None:
    directory, own = place.calibrate("calibration.threshold=0.8")
    file = directory / "calibration.json"
    _, entry = place.calibrate(f"calibration.file={file}", "calibration.threshold=0.95", "calibration.axes=joint")
    assert entry["sparsity"] == own["sparsity"]
    used = entry["calibration"]
    assert (used["threshold"], used["axes"], used["cached"]) == (0.8, "separate", True)
    assert used["warnings"] == own["calibration"]["warnings"]


def test_reliability_is_of_two_halves_and_warns_of_chance(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    calibrate = few_shot.FewShot.calibrate

    def watched(self, scores, **settings):
        found = calibrate(self, scores, **settings)
        asked.append((self.draws, found, {"scores": scores, "peers": settings["peers"]}))
        return found

    monkeypatch.setattr(few_shot.FewShot, "calibrate", watched)
    directory, entry = place.calibrate("calibration.reliability=true")
    (whole, found, how), (first, one, how_one), (second, other, _) = asked
    assert not set(first.scored) & set(second.scored)
    assert sorted([*first.scored, *second.scored]) == sorted(whole.scored)
    assert all((half.fit == whole.fit).all() for half in (first, second))
    assert {key: how_one[key] for key in how} == how
    result = entry["calibration"]["reliability"]
    assert result == reliability(one.sparsity, other.sparsity)
    assert entry["sparsity"] == found.sparsity  # the whole draw decides
    assert entry["seconds"]["reliability"] > 0  # which is no cost of calibrating
    weak = any(warning.startswith("inconsistent") for warning in entry["calibration"]["warnings"])
    assert weak == (result["spearman_brown"] < 0.5)
    assert entry["calibration"]["warnings"] == json.loads((directory / "calibration.json").read_text())["warnings"]


@pytest.mark.parametrize(("agreement", "warned"), [(1.0, False), (0.5, False), (0.49, True), (None, True)])
def test_sparsities_that_halves_do_not_support_are_warned_of(place: Place, monkeypatch, agreement, warned) -> None:
    said = "there is nothing to correlate" if agreement is None else ""
    found = {"pearson": agreement, "spearman": agreement, "spearman_brown": agreement, "n": 24, "said": said}
    monkeypatch.setattr(few_shot.FewShot, "halves", lambda *arguments: found)
    _, entry = place.calibrate("calibration.reliability=true", "calibration.max_sparsity=0.05")
    doubts = [each for each in entry["calibration"]["warnings"] if each.startswith(said or "inconsistent: ")]
    assert bool(doubts) == warned
