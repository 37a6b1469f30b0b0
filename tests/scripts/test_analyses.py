"""Analyses of a calibration against the same done by hand; their files, and how a stopped one goes on."""

from __future__ import annotations

import json
import shutil
from functools import cache
from itertools import combinations
from pathlib import Path
from statistics import fmean

import analyses
import finished_runs
import numpy as np
import pytest
import torch

from partial_lora import tasks
from partial_lora.calibration.calibrate import calibrate
from partial_lora.calibration.few_shot import batches_of, few_shot_head
from partial_lora.calibration.reliability import difference, reliability, split_half
from partial_lora.settings import versions
from partial_lora.settings.compose import composed

TINY = ("model=tiny_vit", "trainer.device=cpu", "calibration=threshold", "calibration.shots=4")
TINY += ("calibration.levels=0.3", "calibration.max_sparsity=0.9", "model.target_modules=[attn.qkv,mlp.fc2]")
FEW = {"measures": ["svd", "magnitude", "activation"], "sparsities": [0.5], "splits": 1, "shots": [2, 4]}
FEW |= {"noise": [0.0, 0.2], "seeds": [0, 1]}
FILES = {"analysis.json", "table.md"}


def settings(*words: str, **options) -> dict:
    return versions.plain(composed(*TINY, *words)) | {"analysis": analyses.OPTIONS | options}


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PARTIAL_LORA_CACHE", str(place / "cache"))
        patch.setattr(analyses, "OPTIONS", analyses.OPTIONS | FEW)
        yield place


@pytest.fixture(scope="module")
def subject(place) -> analyses.Subject:
    return analyses.Subject(settings())


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


def literal(subject: analyses.Subject, train, draws: tasks.Draws, importance="svd", seed=0) -> tuple[dict, int]:
    """The sparsities of a calibration that reuses nothing, and how many full passes it took."""
    fit, scored = (batches_of(train, rows, subject.transform) for rows in (draws.fit, draws.scored))
    score = Full(scored)
    with few_shot_head(subject.model, "timm_model.head", fit):
        chosen = {"importance": importance, "seed": seed, "levels": 0.3, "max_sparsity": 0.9}
        calibration = calibrate(subject.model, score, target_modules=list(subject.shapes), **chosen)
    return calibration.sparsity, score.calls


# Agreement


def by_sets(first, second) -> float:
    return len(set(first) & set(second)) / len(set(first) | set(second))


@pytest.mark.parametrize("size", [1, 2, 5, 6])
def test_chance_is_the_mean_over_every_pair_of_subsets(size: int) -> None:
    for kept in range(1, size + 1):
        subsets = list(combinations(range(size), kept))
        pairs = [by_sets(one, other) for one in subsets for other in subsets]
        assert analyses.jaccard_by_chance(size, kept) == pytest.approx(fmean(pairs), abs=1e-12)


def scores(*pairs) -> dict:
    return {f"m{index}": tuple(torch.tensor(values) for values in pair) for index, pair in enumerate(pairs)}


UP, DOWN = [1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]


def test_every_two_measures_are_compared_at_the_common_sparsity() -> None:
    measures = {"up": scores((UP, UP)), "down": scores((DOWN, UP)), "again": scores((UP, DOWN))}
    lines = analyses.comparisons(measures, {"m0": {"rows": 0.5, "columns": 0.25}})
    assert [(line["first"], line["second"], line["axis"]) for line in lines] == [
        (*pair, axis) for pair in (("up", "down"), ("up", "again"), ("down", "again")) for axis in ("rows", "columns")
    ]
    # Of 4 rows 2 are kept, of 4 columns 3: opposite orders share none of two, and two of three.
    assert [line["jaccard"] for line in lines] == [0.0, 1.0, 1.0, 0.5, 0.0, 0.5]
    assert [line["kept"] for line in lines] == [2, 3] * 3
    assert lines[0]["chance"] == pytest.approx((1 + 4 / 3) / 6)  # 1 of 6 pairs equal, 4 share one of three


@pytest.mark.parametrize("cut", [True, False])
def test_what_is_kept_whole_does_not_enter_the_summary(cut: bool) -> None:
    measures = {"a": scores((UP, UP)), "b": scores((DOWN, DOWN))}
    lines = analyses.comparisons(measures, {"m0": {"rows": 0.5 * cut, "columns": 0.0}})
    (line,) = analyses.agreement_summary({}, {"0.5": {"comparisons": lines}})["0.5"]
    chance = analyses.jaccard_by_chance(4, 2)
    expected = (1, 1, 0.0, chance, pytest.approx(-chance / (1 - chance))) if cut else (0, 2, None, None, None)
    assert tuple(line[key] for key in ("n", "whole", "jaccard", "chance", "beyond_chance")) == expected


# Reliability


def test_halves_are_calibrated_on_what_is_theirs(subject) -> None:
    part = analyses.reliability_parts(settings(splits=2))["split 1"](subject)
    draws, train = subject.draws(), subject.task.train
    halves = [draws.scored[half] for half in split_half(np.asarray(train["label"])[draws.scored], 1)]
    twins = [literal(subject, train, tasks.Draws(fit=draws.fit, scored=half))[0] for half in halves]
    assert [half["sparsity"] for half in part["halves"]] == twins
    assert [half["examples"] for half in part["halves"]] == [20, 20]
    assert part["reliability"] == reliability(*twins)
    rows = [[axes["rows"] for axes in twin.values()] for twin in twins]
    assert part["rows"]["pearson"] == pytest.approx(np.corrcoef(*rows)[0, 1])


def test_without_any_correlation_there_is_a_table() -> None:
    """A model that nothing changes is cut to the highest level everywhere: nothing correlates, and a note tells why."""
    halves = [{"examples": 2, "sparsity": {"m.0": {"rows": 0.9, "columns": 0.9}}}] * 2
    none = {"pearson": None, "spearman": None, "spearman_brown": None, "n": 2, "said": "all equal"}
    parts = {"split 0": {"halves": halves, "reliability": none, "rows": none, "columns": none}}
    analysis = {"what": "reliability", "config": settings(), "parts": parts, "git_commit": None, "device": "cpu"}
    analysis |= {"command": "c", "summary": analyses.reliability_summary(settings(), parts)}
    assert "split 0: all equal" in analyses.markdown(analysis)


# Stability


def test_wrong_labels_are_in_both_draws_and_nothing_else_changes(subject) -> None:
    draws, train = subject.draws(), subject.task.train
    rows, drawn = subject.mislabelled(draws, 0.2, seed=3)
    assert not set(drawn.fit) & set(drawn.scored)
    for own, new in ((draws.fit, drawn.fit), (draws.scored, drawn.scored)):
        before, after = train.select(own), rows.select(new)
        assert sum(a != b for a, b in zip(before["label"], after["label"], strict=True)) == 8  # of 40
        assert all(np.array_equal(a, b) for a, b in zip(before["image"], after["image"], strict=True))
    assert rows.features == train.features


def test_without_noise_the_calibration_is_the_ordinary_one_out_of_the_cache(subject) -> None:
    draws = subject.draws()
    ordinary = subject.calibrate(draws)
    rows, drawn = subject.mislabelled(draws, 0.0, seed=3)
    clean = subject.calibrate(drawn, train=rows)
    assert ordinary.sparsity == literal(subject, subject.task.train, draws)[0] == clean.sparsity
    assert clean.cached


def test_stability_is_that_of_the_calibrations_made(subject) -> None:
    chosen = settings(noise=[0.0, 0.5])
    parts = {name: part(subject) for name, part in analyses.stability_parts(chosen).items()}
    assert len(parts) == 6
    train, drawn = subject.mislabelled(subject.draws(seed=1), 0.5, seed=1)
    assert parts["4 shots, 50% noise, seed 1"]["sparsity"] == literal(subject, train, drawn)[0]
    assert parts["2 shots, 0% noise, seed 0"]["examples"] == 20
    lines = {(line["shots"], line["noise"]): line for line in analyses.stability_summary(chosen, parts)["conditions"]}
    two = [parts[f"2 shots, 0% noise, seed {seed}"]["sparsity"] for seed in (0, 1)]
    assert lines[2, 0.0]["between_seeds"]["mean_absolute"] == difference(*two)["mean_absolute"]


def test_there_are_no_wrong_labels_where_there_are_no_classes() -> None:
    generation = ("task=text_generation", "model=tiny_llama", *finished_runs.GENERATION)
    generation += ("model.target_modules=[q_proj,down_proj]",)
    assert (4, 0.2) in analyses.conditions(settings())
    for given in (generation, ["task.regression=true"]):
        assert analyses.conditions(settings(*given)) == [(2, 0.0), (4, 0.0)]


# Cost


def test_the_literal_reference_is_what_a_calibration_without_reuse_takes(subject) -> None:
    subject.calibrate(subject.draws())  # which leaves it in the cache, and is not what is measured
    chosen = settings()
    parts = {name: part(subject) for name, part in analyses.cost_parts(chosen).items()}
    summary = analyses.cost_summary(chosen, parts)
    sparsity, passes = literal(subject, subject.task.train, subject.draws())
    costs, bisected = summary["searches"], parts["search bisect"]["sparsity"]
    assert parts["search scan"]["sparsity"] == sparsity
    assert (costs["literal"]["passes"], costs["literal"]["sample_blocks"]) == (passes, passes * 40 * 3)
    assert 0 < costs["bisect"]["sample_blocks"] < costs["scan"]["sample_blocks"] < costs["literal"]["sample_blocks"]
    moved = [sparsity[module][axis] != bisected[module][axis] for module in sparsity for axis in ("rows", "columns")]
    agreement = summary["from_scan"]
    assert agreement["bisect"]["differ"] == np.mean(moved)
    assert (agreement["scan"]["differ"], agreement["scan"]["mean_absolute"]) == (0, 0)
    assert 0 < costs["gradient"]["passes"] < costs["bisect"]["passes"]
    assert agreement["gradient"]["differ"] > 0


# Files and command line


@pytest.fixture(scope="module")
def finished(place):
    """Each analysis, once, by its command line: its folder."""

    @cache
    def folder_of(what: str) -> Path:
        assert analyses.main([what, *TINY, f"results_dir={place / 'results'}"]) == 0
        (folder,) = (place / "results" / "analyses" / what / "digits").iterdir()
        return folder

    return folder_of


@pytest.fixture(params=analyses.ANALYSES)
def done(request, finished):
    """Name, folder and record of a finished analysis."""
    folder = finished(request.param)
    return request.param, folder, json.loads((folder / "analysis.json").read_text())


def test_an_analysis_leaves_its_files_and_the_summary_of_its_parts(done) -> None:
    what, folder, analysis = done
    chosen = settings(f"results_dir={folder.parents[3]}")
    assert folder == analyses.folder_of(chosen, what)
    assert {entry.name for entry in folder.iterdir()} - {".lock"} == FILES
    assert (analysis["what"], analysis["config"]) == (what, chosen)
    assert list(analysis["parts"]) == list(analyses.ANALYSES[what].parts(chosen))
    assert analysis["summary"] == json.loads(json.dumps(analyses.ANALYSES[what].summary(chosen, analysis["parts"])))
    assert (folder / "table.md").read_text(encoding="utf-8") == analyses.markdown(analysis)


def test_a_finished_analysis_is_not_done_again_but_its_table_is_made(done, monkeypatch) -> None:
    what, folder, _ = done
    before = {name: (folder / name).read_bytes() for name in FILES}
    (folder / "table.md").unlink()
    monkeypatch.setattr(analyses, "Subject", None)  # whoever loads the model fails
    assert analyses.main([what, *TINY, f"results_dir={folder.parents[3]}"]) == 0
    assert {name: (folder / name).read_bytes() for name in FILES} == before


def test_an_analysis_with_other_settings_is_refused_and_done_again_where_that_is_said(finished, tmp_path: Path) -> None:
    folder = finished("reliability")
    shutil.copytree(folder.parents[3], tmp_path, dirs_exist_ok=True)
    path = tmp_path / folder.relative_to(folder.parents[3]) / "analysis.json"
    before, words = path.read_bytes(), ["reliability", *TINY, f"results_dir={tmp_path}"]
    assert analyses.main([*words, "importance=magnitude"]) == 2
    assert path.read_bytes() == before
    assert analyses.main([*words, "importance=magnitude", "overwrite=true"]) == 0
    assert json.loads(path.read_text())["config"]["importance"]["name"] == "magnitude"


@pytest.mark.parametrize("word", ["analysis.split=3", "calibration.sparsity=0.5"])
def test_a_wrong_word_is_refused_in_one_line(capsys, monkeypatch, word: str) -> None:
    monkeypatch.setattr(analyses.directory, "locked", None)  # whatever is not refused fails at once
    assert analyses.main(["cost", word]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert word.partition("=")[0] in line
