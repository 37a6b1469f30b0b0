"""What an analysis examines and finds, against the same done by hand."""

from __future__ import annotations

import finished_runs
import numpy as np
import pytest
import torch
from analysed import settings

from partial_lora import examinations, record, tasks, train
from partial_lora.calibration import calibrate
from partial_lora.errors import PartialLoraError
from partial_lora.fewshot import batches_of
from partial_lora.heads import few_shot_head
from partial_lora.importance import scores_of
from partial_lora.masks import Mask
from partial_lora.reliability import reliability, split_half
from partial_lora.stability import difference
from partial_lora.subject import Subject

HEAD = "timm_model.head"


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Subject:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PARTIAL_LORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Subject(settings())


class Full:
    """The literal score: every example through the whole model, and how often that was done."""

    def __init__(self, batches) -> None:
        self.batches, self.calls = batches, 0

    @torch.no_grad()
    def __call__(self, model) -> float:
        self.calls += 1
        model.eval()
        right = [model(pixel_values=one["pixel_values"]).logits.argmax(-1) == one["labels"] for one in self.batches]
        return float(torch.cat(right).double().mean())


def literal(subject: Subject, train, draws: tasks.Draws, importance="svd", seed=0) -> tuple[dict, int]:
    """The sparsities of a calibration that reuses nothing, and how many full passes it took."""
    model, targets = subject._model, list(subject.shapes)
    fit, scored = (batches_of(train, rows, subject._transform) for rows in (draws.fit, draws.scored))
    score = Full(scored)
    with few_shot_head(model, HEAD, fit):
        chosen = {"importance": importance, "seed": seed, "levels": 0.3, "max_sparsity": 0.9}
        found = calibrate(model, score, target_modules=targets, **chosen)
    return found.sparsity, score.calls


def test_wrong_labels_are_in_both_draws_and_nothing_else_changes(subject) -> None:
    draws = subject.draws()
    rows, drawn = subject.mislabelled(draws, 0.2, seed=3)
    assert not set(drawn.fit) & set(drawn.scored)
    for own, new in ((draws.fit, drawn.fit), (draws.scored, drawn.scored)):
        before, after = subject.train.select(own), rows.select(new)
        assert sum(a != b for a, b in zip(before["label"], after["label"], strict=True)) == 8  # of 40
        assert all(np.array_equal(a, b) for a, b in zip(before["image"], after["image"], strict=True))
    assert rows.features == subject.train.features


def test_without_noise_the_calibration_is_the_ordinary_one_and_found_in_the_cache(subject) -> None:
    draws = subject.draws()
    ordinary = subject.calibration(draws)
    again = subject.calibration(draws)
    rows, drawn = subject.mislabelled(draws, 0.0, seed=3)
    clean = subject.calibration(drawn, train=rows)
    assert ordinary.sparsity == literal(subject, subject.train, draws)[0]
    assert (again.cached, clean.cached) == (True, True)
    assert clean.sparsity == ordinary.sparsity


def test_another_seed_and_size_is_what_calibrate_finds_with_them(subject) -> None:
    usual = Subject(settings("importance=random"))
    draws = usual.draws(seed=1, shots=2)
    found = usual.calibration(draws, seed=1, shots=2)
    assert found.sparsity == literal(usual, usual.train, draws, "random", seed=1)[0]
    asked = Subject(settings("importance=random", "calibration.seed=1", "calibration.shots=2"))
    again = asked.calibration(asked.draws())
    assert (found.cached, again.cached) == (False, True)
    assert (again.settings, again.sparsity) == (found.settings, found.sparsity)


def test_halves_are_calibrated_on_what_is_theirs(subject) -> None:
    part = examinations.reliability_parts(settings("analysis.splits=2"))["split 1"](subject)
    draws = subject.draws()
    labels = np.asarray(subject.train["label"])[draws.scored]
    halves = [draws.scored[half] for half in split_half(labels, 1)]
    twins = [literal(subject, subject.train, tasks.Draws(fit=draws.fit, scored=half))[0] for half in halves]
    assert [half["sparsity"] for half in part["halves"]] == twins
    assert [half["examples"] for half in part["halves"]] == [20, 20]
    assert part["reliability"] == reliability(*twins)
    rows = [[axes["rows"] for axes in twin.values()] for twin in twins]
    assert part["rows"]["pearson"] == pytest.approx(np.corrcoef(*rows)[0, 1])


def test_conditions_begin_with_the_reference_and_repeat_none() -> None:
    chosen = settings("analysis.shots=[2,4,8]", "analysis.noise=[0.0,0.1]")
    assert examinations.conditions(chosen) == [(4, 0.0), (2, 0.0), (8, 0.0), (4, 0.1)]
    other = settings("analysis.shots=[2]", "analysis.noise=[0.2]")
    assert examinations.conditions(other) == [(4, 0.0), (2, 0.0), (4, 0.2)]


def test_stability_is_that_of_the_calibrations_made(subject) -> None:
    chosen = settings("analysis.shots=[2,4]", "analysis.noise=[0.0,0.5]", "analysis.seeds=[0,1]")
    parts = {name: part(subject) for name, part in examinations.stability_parts(chosen).items()}
    assert len(parts) == 6
    noisy = parts["4 shots, 50% noise, seed 1"]
    train, drawn = subject.mislabelled(subject.draws(seed=1), 0.5, seed=1)
    assert noisy["sparsity"] == literal(subject, train, drawn)[0]
    assert parts["2 shots, 0% noise, seed 0"]["examples"] == 20
    lines = {
        (line["shots"], line["noise"]): line for line in examinations.stability_summary(chosen, parts)["conditions"]
    }
    first, second = (parts[f"2 shots, 0% noise, seed {seed}"]["sparsity"] for seed in (0, 1))
    references = [parts[f"4 shots, 0% noise, seed {seed}"]["sparsity"] for seed in (0, 1)]
    found = lines[2, 0.0]
    assert found["between_seeds"]["mean_absolute"] == difference(first, second)["mean_absolute"]
    same = [difference(*pair)["mean_absolute"] for pair in zip((first, second), references, strict=True)]
    assert found["to_reference"]["mean_absolute"] == pytest.approx(np.mean(same))
    assert lines[4, 0.0]["to_reference"]["mean_absolute"] == 0


def test_density_is_the_share_of_the_dense_adapter(subject) -> None:
    sparsity = {module: {"rows": 0.5, "columns": 0.25} for module in subject.shapes}
    dense = sum(m + n for m, n in subject.shapes.values())
    assert subject.density(sparsity) == sum(m * 0.5 + n * 0.75 for m, n in subject.shapes.values()) / dense


def test_agreement_is_of_the_most_important_ones_at_one_sparsity(subject) -> None:
    chosen = settings("analysis.measures=[svd,magnitude,snip]", "analysis.sparsities=[0.5]")
    parts = {name: part(subject) for name, part in examinations.agreement_parts(chosen).items()}
    assert list(parts) == ["calibrated", "0.5"]
    assert parts["calibrated"]["sparsity"] == subject.calibration(subject.draws()).sparsity
    line = next(one for one in parts["0.5"]["comparisons"] if (one["first"], one["second"]) == ("svd", "magnitude"))
    weight = subject._model.get_submodule(line["module"]).weight
    kept = [
        set(Mask.top(scores_of("", weight, measure, seed=0, options={})[0].numpy(), 0.5).kept)
        for measure in ("svd", "magnitude")
    ]
    assert line["axis"] == "rows"
    assert line["jaccard"] == len(kept[0] & kept[1]) / len(kept[0] | kept[1])


def test_measures_see_the_fit_draw_and_never_the_scored_one(subject) -> None:
    draws = subject.draws()
    other = tasks.Draws(fit=draws.fit, scored=subject.draws(seed=5).scored)
    same, moved = subject.importance("snip", other), subject.importance("snip", subject.draws(seed=5))
    own = subject.importance("snip", draws)
    module = next(iter(own))
    assert torch.equal(own[module][0], same[module][0])
    assert not torch.equal(own[module][0], moved[module][0])


def test_the_literal_reference_is_what_a_calibration_without_reuse_takes(subject) -> None:
    chosen = settings("analysis.measures=[svd,magnitude]")
    parts = {name: part(subject) for name, part in examinations.cost_parts(chosen).items()}
    summary = examinations.cost_summary(chosen, parts)
    sparsity, passes = literal(subject, subject.train, subject.draws())
    assert parts["search scan"]["sparsity"] == sparsity
    costs = summary["searches"]
    assert costs["literal"]["passes"] == passes
    assert costs["literal"]["sample_blocks"] == passes * 40 * 3
    assert costs["bisect"]["sample_blocks"] < costs["scan"]["sample_blocks"] < costs["literal"]["sample_blocks"]
    assert list(summary["importance"]) == ["svd", "magnitude"]
    bisected = parts["search bisect"]["sparsity"]
    moved = [sparsity[module][axis] != bisected[module][axis] for module in sparsity for axis in ("rows", "columns")]
    assert summary["differ"] == np.mean(moved)


@pytest.fixture(scope="module")
def of_causal(tmp_path_factory):
    """The settings and the subject of a small causal model on a task of some kind."""

    def subject_of(kind: str, *overrides: str) -> tuple[dict, Subject]:
        given = ("model=tiny_llama", f"task={kind}", "calibration.levels=0.9", "calibration.share=0.1", *overrides)
        chosen = settings(*given)
        return chosen, Subject(chosen)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PARTIAL_LORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield subject_of


def test_a_pass_over_questions_runs_a_row_for_every_option(of_causal) -> None:
    given = (*finished_runs.CHOICE, finished_runs.override(finished_runs.question_files()))
    chosen, subject = of_causal("choice_table", *given)
    parts = {name: part(subject) for name, part in examinations.cost_parts(chosen).items() if "search" in name}
    scan = parts["search scan"]
    options = sum(len(subject.train[int(row)]["options"]) for row in subject.draws().scored)
    assert scan["rows"] == options > scan["scored"]
    literal = examinations.cost_summary(chosen, parts)["searches"]["literal"]
    assert literal["sample_blocks"] == literal["passes"] * options * subject.blocks
    assert literal["examples"] == literal["passes"] * scan["scored"]


@pytest.mark.parametrize("quantization", ["null", "nf4"])
def test_what_a_run_has_calibrated_is_kept_for_an_analysis(of_causal, tmp_path, quantization) -> None:
    given = (*finished_runs.CHOICE, finished_runs.override(finished_runs.question_files()))
    chosen, subject = of_causal("choice_table", *given, f"model.quantization={quantization}")
    entry = record.new(chosen)
    train.run(chosen, tmp_path, entry, "calibrate")
    found = subject.calibration(subject.draws())
    assert found.cached
    assert found.sparsity == entry["sparsity"]


GENERATION = ("text_generation", *finished_runs.GENERATION)


def test_halves_of_rows_without_labels_are_of_all_alike(of_causal) -> None:
    given = (*GENERATION, finished_runs.override(finished_runs.exchange_files()))
    chosen, subject = of_causal(*given, "analysis.splits=1")
    part = examinations.reliability_parts(chosen)["split 0"](subject)
    assert "label" not in subject.train.column_names
    assert sum(half["examples"] for half in part["halves"]) == len(subject.draws().scored)


def test_wrong_labels_are_refused_where_there_are_none() -> None:
    chosen = settings("task=text_generation", "model=tiny_llama", *finished_runs.GENERATION, "analysis.shots=[8]")
    with pytest.raises(PartialLoraError, match=r"analysis\.noise=\[0\.0, 0\.1, 0\.2\]: .* kind generation"):
        examinations.stability_parts(chosen)
    chosen["analysis"]["noise"] = [0.0]
    assert len(examinations.stability_parts(chosen)) == 6  # 8 shots and the usual ones, 3 seeds each
    with pytest.raises(PartialLoraError, match="kind regression"):
        examinations.stability_parts(settings("task.regression=true"))


def test_the_cost_is_measured_anew_whatever_the_cache_holds(subject) -> None:
    subject.calibration(subject.draws())
    calibration, score = subject.counted(subject.draws(), "scan")
    assert not calibration.cached
    assert score.evaluations.passes == calibration.evaluations


def test_what_a_cached_calibration_had_cost_is_not_known(subject) -> None:
    part = examinations.stability_parts(settings("analysis.shots=[4]"))["4 shots, 0% noise, seed 0"]
    part(subject)
    assert part(subject)["cost"] == {"evaluations": None, "seconds": None}
