"""Several tasks in one run: each member alone, from the settings to the scores, is the twin of its part."""

from __future__ import annotations

import dataclasses
import functools
import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
from datasets import Dataset
from finished_runs import trained
from judged_tasks import choices
from refusals import refusal
from rich.console import Console
from tiny_causal import llama, merging_tokenizer
from torch.nn import functional as F

from partial_lora import tasks as tasks_of
from partial_lora.building import build
from partial_lora.calibration import answer_scores
from partial_lora.calibration.answer_scores import SCORES
from partial_lora.calibration.config import ImportanceConfig
from partial_lora.calibration.few_shot import features, fitted_head
from partial_lora.calibration.score import FewShotScore
from partial_lora.errors import PartialLoraError
from partial_lora.finished import export
from partial_lora.launching import directory
from partial_lora.report import summary
from partial_lora.settings import identity, versions
from partial_lora.settings.compose import composed
from partial_lora.settings.schema import Config
from partial_lora.tasks import Task
from partial_lora.training import objectives

WORDS = ["fine", "poor", "warm", "cold", "long", "odd"]
DIGITS = "{path: 'bundled:digits'}"
pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Reviews of two classes, 100 rows, and questions of three, pairs of texts, 60 rows."""
    folder = tmp_path_factory.mktemp("tables")
    reviews = [{"review": f"{WORDS[n % 2]} film {n}", "label": ["good", "bad"][n % 2]} for n in range(100)]
    questions = [{"a": f"{WORDS[n % 3]} {n}", "b": "is it", "label": "xyz"[n % 3]} for n in range(60)]
    for name, rows in (("reviews", reviews), ("questions", questions)):
        pandas.DataFrame(rows).to_parquet(folder / f"{name}.parquet")
    return {name: str(folder / f"{name}.parquet") for name in ("reviews", "questions")}


def members(tables: dict[str, str], *names: str) -> list[str]:
    """The overrides of a mixture of tables."""
    own = {
        "reviews": "{modality: text, path: files, metrics: [matthews, accuracy]}",
        "questions": "{modality: text, path: files, text_columns: [a, b]}",
    }
    files = ",".join(f"{name}: '{tables[name]}'" for name in names)
    listed = ",".join(f"{name}: {own[name]}" for name in names)
    return ["task=mixture", f"task.members={{{listed}}}", f"task.data_files={{{files}}}", "model=tiny_bert"]


def mixture(chosen: Config) -> tasks_of.Mixture:
    return build.task_of(chosen, mixtures=True)


def alone(chosen: Config, name: str) -> Config:
    """The settings of a member's own run."""
    return dataclasses.replace(chosen, task=chosen.task.members[name])


# Settings


def test_members_by_name_have_the_settings_of_their_group_files(tables) -> None:
    files = f"{{sst2: {tables['reviews']}, cola: {{train: {tables['reviews']}, test: {tables['reviews']}}}}}"
    given = ("model=tiny_bert", f"task.data_files={files}", "task.train_samples=7")
    found = composed("task=mixture", "task.members=[sst2,cola]", *given)
    for name in ("sst2", "cola"):
        expected = composed(f"task={name}", "model=tiny_bert", "task.train_samples=7").task
        assert dataclasses.replace(found.task.members[name], data_files=None) == expected
    assert found.task.members["sst2"].data_files == tables["reviews"]
    assert found.task.members["cola"].data_files["test"] == tables["reviews"]
    assert (found.task.modality, found.task.kind, found.task.classes) == ("text", "label", 4)
    assert versions.load(versions.plain(found)) == found


def test_the_id_of_a_run_covers_its_members_and_their_order(tables, tmp_path: Path) -> None:
    given = members(tables, "reviews", "questions")
    same = Path(tmp_path / "copy.parquet")
    same.write_bytes(Path(tables["reviews"]).read_bytes())
    elsewhere = [override.replace(tables["reviews"], str(same)) for override in given]
    first = identity.run_id(composed(*given))
    assert first == identity.run_id(composed(*elsewhere)) == identity.run_id(composed(*given, "task.cache_bytes=1"))
    others = [
        composed(*members(tables, "questions", "reviews")),
        composed(*members(tables, "reviews")),
        composed(*given, "task.mixing=equal"),
        composed(*[override.replace("text_columns: [a, b]", "text_columns: [a]") for override in given]),
        composed(*[override.replace(tables["reviews"], tables["questions"]) for override in given]),
    ]
    assert len({first, *map(identity.run_id, others)}) == len(others) + 1


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ([], r"task\.members=null"),
        (["task.members=[sst2,nowhere]"], r"task\.members=nowhere"),
        (["task.members=[sst2,sst2]"], r"task\.members"),
        (["task.members=[sst2,digits]"], r"task\.members.*digits .*images"),
        (["task.members=[sst2,piqa]"], r"task\.members.*piqa .*questions"),
        (["task.members=[sst2,stsb]"], r"task\.members=stsb"),
        (["task.members={a: {path: files, size: 3}}"], r"task\.members\.a\.size"),
        (["task.members={a: {path: files, name: b}}"], r"task\.members\.a\.name=b"),
        (["task.members={a: {modality: text}}"], r"task\.members\.a\.path"),
        (["task.members={a: {path: files, classes: two}}"], r"task\.members\.a\.classes"),
        (["task.members={a: {path: files, modality: sound}}"], r"task\.members, a: task\.modality=sound"),
        (["task.members={a: {path: members, members: [sst2]}}"], r"task\.members"),
        (["task.members=[sst2]", "task.data_files=/"], r"task\.data_files=/"),
        (["task.members=[sst2]", "task.data_files={mrpc: /}"], r"task\.data_files=.*mrpc"),
        (["task.members=[sst2]", "task.data_files={sst2: /nowhere}"], r"sst2: task\.data_files=/nowhere"),
        (["task.members=[sst2]", "task.label_column=x"], r"task\.label_column=x"),
        (["task.members=[sst2]", "task.mixing=some"], r"task\.mixing=some"),
        (["task.members=[sst2]", "calibration.score=f1"], r"calibration\.score=f1"),
    ],
)
def test_what_is_no_mixture_is_refused_in_one_line(overrides: list[str], key: str) -> None:
    with refusal(f".*({key})"):
        composed("task=mixture", *overrides)


def test_members_of_a_single_task_are_refused() -> None:
    with pytest.raises(PartialLoraError, match=r"task\.members=\[sst2\]"):
        composed("task=cola", "task.members=[sst2]")


def test_numbers_that_only_the_rows_show_and_other_commands_are_refused(tables, tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.parquet"
    pandas.DataFrame({"text": WORDS * 9, "label": np.arange(54) / 7}).to_parquet(numbers)
    own = f"{{modality: text, path: files, data_files: '{numbers}'}}"
    chosen = composed("task=mixture", f"task.members={{numbers: {own}}}", "model=tiny_bert")
    with pytest.raises(PartialLoraError, match=r"task\.members.*numbers"):
        mixture(chosen)
    with pytest.raises(PartialLoraError, match=r"reviews, questions"):
        build.task_of(composed(*members(tables, "reviews", "questions")))


# Rows


def test_rows_are_the_members_rows_and_labels_count_on(tables) -> None:
    chosen = composed(*members(tables, "reviews", "questions"))
    mixed = mixture(chosen)
    assert mixed.labels == ("reviews/bad", "reviews/good", "questions/x", "questions/y", "questions/z")
    assert mixed.class_names == ("bad", "good", "x", "y", "z")
    assert mixed.sizes == (2, 3)
    own = [build.task_of(alone(chosen, name)) for name in ("reviews", "questions")]
    for split in tasks_of.SPLITS:
        rows = getattr(mixed, split)
        expected = [(n, label + 2 * n) for n, each in enumerate(own) for label in getattr(each, split)["label"]]
        assert list(zip(rows["member"], rows["label"], strict=True)) == expected
        shuffled = rows.select(np.random.default_rng(0).permutation(len(rows))[:20])
        for number, each in enumerate(own):
            places = [r for m, r in zip(shuffled["member"], shuffled["row"], strict=True) if m == number]
            assert mixed.rows_of(number, shuffled).to_list() == getattr(each, split).select(places).to_list()


def test_equal_mixing_trains_on_as_many_rows_of_each_and_tests_on_all(tables) -> None:
    given = members(tables, "reviews", "questions")
    whole = mixture(composed(*given))
    assert [np.bincount(getattr(whole, split)["member"]).tolist() for split in tasks_of.SPLITS] == [
        [72, 43],
        [8, 5],
        [20, 12],
    ]
    equal, again, other = (
        mixture(composed(*given, "task.mixing=equal", f"task.split_seed={seed}")) for seed in (0, 0, 1)
    )
    assert np.bincount(equal.train["member"]).tolist() == [43, 43]
    assert np.bincount(equal.train["label"]).tolist()[:2] in ([21, 22], [22, 21])  # the same share of every class
    assert equal.test.to_list() == whole.test.to_list()
    assert equal.members[0].train.to_list() == again.members[0].train.to_list()
    assert equal.members[0].train.to_list() != other.members[0].train.to_list()


def test_prepared_rows_and_batches_are_those_of_the_members(tables) -> None:
    chosen = composed(*members(tables, "reviews", "questions"))
    mixed = mixture(chosen)
    transform = build.transform_of(chosen.model, chosen.task, mixed)
    joined = transform.prepare(mixed.train, cache_bytes=2**20)
    twins = []
    for number, name in enumerate(("reviews", "questions")):
        own = build.task_of(alone(chosen, name)).train
        prepared = build.transform_of(chosen.model, chosen.task.members[name]).prepare(own, cache_bytes=2**20)
        twins += [row | {"label": row["label"] + 2 * number} for row in prepared.to_list()]
    assert [joined[place] for place in range(len(joined))] == twins
    assert joined["length"] == [row["length"] for row in twins]
    order = np.random.default_rng(0).permutation(len(joined)).tolist()
    assert joined.__getitems__(order) == [twins[place] for place in order]
    rows = mixed.train.select(range(60, 90))
    seen = transform.batches(rows, 8)
    assert [len(batch["labels"]) for batch in seen] == [8, 4, 8, 8, 2]  # no batch has rows of two members
    assert torch.cat([batch["labels"] for batch in seen]).tolist() == rows["label"]
    for batch, place in zip(seen, (60, 68, 72, 80, 88), strict=True):
        literal = transform.collate(twins[place : place + len(batch["labels"])])
        assert all(torch.equal(batch[key], literal[key]) for key in batch)


@pytest.mark.parametrize("changes", [{}, {"share": 0.0}, {"share": 0.0, "max_samples": 5}])
def test_draws_are_each_members_own(tables, changes: dict) -> None:
    chosen = composed(*members(tables, "reviews", "questions"))
    chosen = dataclasses.replace(chosen, calibration=dataclasses.replace(chosen.calibration, **changes))
    found = build.draws_of(chosen, mixture(chosen).train)
    fit, scored, warnings = [], [], []
    for name, start in (("reviews", 0), ("questions", 72)):
        own = build.draws_of(alone(chosen, name), build.task_of(alone(chosen, name)).train)
        fit += (own.fit + start).tolist()
        scored += (own.scored + start).tolist()
        warnings += [f"{name}: {words}" for words in own.warnings]
    assert (found.fit.tolist(), found.scored.tolist()) == (fit, scored)
    assert len(found.warnings) == len(warnings)


# Loss, head and score: each example within its member's outputs


def logits_and_labels(rows: int = 40, sizes: tuple[int, ...] = (2, 3, 4)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    total = sum(sizes)
    logits = 3 * torch.randn(rows, total, generator=generator)
    return logits, torch.randint(0, total, (rows,), generator=generator)


def parts(labels: torch.Tensor, sizes: tuple[int, ...]):
    start = 0
    for size in sizes:
        yield (labels >= start) & (labels < start + size), slice(start, start + size), start
        start += size


SIZES = (2, 3, 4)


def test_the_loss_of_a_mixed_batch_is_the_sum_of_the_members_losses() -> None:
    logits, labels = logits_and_labels()
    logits.requires_grad_()
    loss = functools.partial(objectives.loss_of_batch, sizes=SIZES)
    found = loss(SimpleNamespace(logits=logits), labels, 100)
    expected = sum(
        F.cross_entropy(logits[own, columns], labels[own] - start, reduction="sum")
        for own, columns, start in parts(labels, SIZES)
    )
    assert torch.allclose(found, expected / 100)
    assert torch.allclose(loss(SimpleNamespace(logits=logits), labels), expected / len(labels))
    (gradient,) = torch.autograd.grad(found, logits, retain_graph=True)
    (literal,) = torch.autograd.grad(expected / 100, logits)
    assert torch.allclose(gradient, literal, atol=1e-7)
    one = objectives.loss_of_batch(SimpleNamespace(logits=logits), labels, sizes=(9,))
    assert torch.equal(one, objectives.loss_of_batch(SimpleNamespace(logits=logits), labels))


@pytest.mark.parametrize("measure", ["accuracy", "loss"])
def test_an_example_is_scored_within_its_member_and_guessed_there(measure: str) -> None:
    logits, labels = logits_and_labels()
    rubric, batch = answer_scores.Within(SCORES[measure](), SIZES), {"labels": labels}
    values, sureness, chance = (torch.empty(len(labels), dtype=torch.float64) for _ in range(3))
    plain = SCORES[measure]()
    for own, columns, start in parts(labels, SIZES):
        of_member = {"labels": labels[own] - start}
        values[own] = plain.values(logits[own, columns], of_member)
        sureness[own] = plain.sureness(logits[own, columns], of_member).double()
        chance[own] = plain.chance([of_member])
    assert torch.allclose(rubric.values(logits, batch), values)
    assert torch.allclose(rubric.sureness(logits, batch).double(), sureness)
    halves = [{"labels": labels[:15]}, {"labels": labels[15:]}]
    assert rubric.chance(halves) == pytest.approx(float(chance.mean()))
    assert not rubric.values(logits.fill_(float("nan")), batch).isfinite().any()


def said(model, batch: dict, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The logits of a head of our own on what enters the model's."""
    entering = []
    hook = model.classifier.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
    model(**{key: value for key, value in batch.items() if key != "labels"})
    hook.remove()
    return entering[0] @ weight.T + bias


def test_calibration_fits_and_scores_each_member_by_itself(tables) -> None:
    chosen = composed(*members(tables, "reviews", "questions"), "calibration.share=0", "calibration.shots=6")
    mixed = mixture(chosen)
    transform = build.transform_of(chosen.model, chosen.task, mixed)
    torch.manual_seed(0)
    model = build.model_of(chosen.model, mixed.labels, mixed.class_names)
    assert list(model.config.id2label.values()) == list(mixed.labels)
    draws = build.draws_of(chosen, mixed.train)
    examples = dataclasses.replace(
        build.few_shot_of(chosen, mixed, transform, model, draws),
        config=dataclasses.replace(build.calibration_config(chosen, mixed), levels=0.3, max_sparsity=0.3),
        measure=ImportanceConfig("snip"),
    )
    (module,) = modules = ["bert.encoder.layer.0.output.dense"]
    scores = examples.importance(modules)
    found = examples.calibrate(scores)
    fit, scored = (transform.batches(mixed.train.select(rows), 99) for rows in (draws.fit, draws.scored))
    right, gradients = [], 0.0
    matrix = model.get_submodule(module).weight
    for of_fit, of_scored, size, start in zip(fit, scored, (2, 3), (0, 2), strict=True):
        entering, labels = features(model, "classifier", [of_fit])
        weight, bias = map(torch.from_numpy, fitted_head(entering, labels - start, size))
        right += (said(model, of_scored, weight, bias).argmax(-1) == of_scored["labels"] - start).tolist()
        loss = F.cross_entropy(said(model, of_fit, weight, bias), of_fit["labels"] - start, reduction="sum")
        gradients = gradients + torch.autograd.grad(loss / len(draws.fit), matrix)[0]
    assert found.baseline == pytest.approx(np.mean(right))
    assert 0.3 < np.mean(right) < 1
    entries = (matrix * gradients).abs().double()
    assert torch.allclose(scores[module][0], entries.sum(1), rtol=1e-3, atol=0)


# Whole runs


def test_a_mixture_of_one_is_that_task(tables) -> None:
    short = ("calibration.max_sparsity=0.2", "calibration.levels=0.2", "model.target_modules=[query,output.dense]")
    reviews = ("task=text_table", f"task.data_files='{tables['reviews']}'", "model=tiny_bert")
    single = trained("one-alone", *reviews, "task.metrics=[matthews,accuracy]", "calibration.score=accuracy", *short)
    mixed = trained("one-mixture", *members(tables, "reviews"), *short)
    assert [entry.get("loss") for entry in single.result["history"]] == [
        entry.get("loss") for entry in mixed.result["history"]
    ]
    assert single.result["sparsity"] == mixed.result["sparsity"]
    assert single.result["calibration"]["baseline"] == mixed.result["calibration"]["baseline"]
    for split in ("validation", "test"):
        own, joint = single.result["metrics"][split], mixed.result["metrics"][split]
        assert (joint["primary"], joint["average"], joint["loss"]) == ("average", own["matthews"], own["loss"])
        for name in ("matthews", "accuracy", "loss"):
            assert joint[f"reviews/{name}"] == own[name]
    own, joint = (pandas.read_parquet(run.directory / directory.PREDICTIONS) for run in (single, mixed))
    assert joint.drop(columns="member").equals(own)
    assert set(joint["member"]) == {"reviews"}


def test_members_of_images_share_an_adapter_and_are_scored_each_on_its_own_head() -> None:
    given = ("task.train_samples=200", "task.test_samples=60", "method=lora", "trainer.max_steps=20")
    given += ("trainer.save_steps=20", "trainer.learning_rate=1e-3", "trainer.batch_size=32")
    run = trained(
        "digits-twice", "task=mixture", f"task.members={{a: {DIGITS}, b.c: {DIGITS}}}", "model=tiny_vit", *given
    )
    assert run.labels() == [f"{name}/{digit}" for name in ("a", "b.c") for digit in range(10)]
    test = run.result["metrics"]["test"]
    model, own = export.adapted_model(run), alone(run.config, "a")
    (batch,) = build.transform_of(own.model, own.task).batches(build.task_of(own).test, 60)
    with torch.no_grad():
        logits = model(pixel_values=batch["pixel_values"]).logits
    frame = pandas.read_parquet(run.directory / directory.PREDICTIONS)
    assert frame["member"].tolist() == ["a"] * 60 + ["b.c"] * 60
    for place, name in enumerate(("a", "b.c")):  # the same rows, by two heads
        alone_of = logits[:, 10 * place : 10 * place + 10]
        accuracy = float((alone_of.argmax(-1) == batch["labels"]).float().mean())
        assert test[f"{name}/accuracy"] == pytest.approx(accuracy)
        assert test[f"{name}/loss"] == pytest.approx(float(F.cross_entropy(alone_of, batch["labels"])), rel=1e-4)
        part = frame[frame["member"] == name]
        assert part["prediction"].nunique() > 1
        assert part["index"].tolist() == list(range(60))
        assert part["prediction_name"].tolist() == [str(int(digit)) for digit in alone_of.argmax(-1)]
    assert test["average"] == pytest.approx((test["a/accuracy"] + test["b.c/accuracy"]) / 2)
    assert test["a/loss"] != test["b.c/loss"]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(summary.summary(run.result))
    assert f"accuracy {test['b.c/accuracy']:.2%}".replace("%", " %") in console.export_text()


def test_clip_calls_the_classes_of_a_mixture_by_their_own_names() -> None:
    chosen = composed("model=tiny_clip").model
    names, labels = ["cat", "dog", "cat"], ["a/cat", "a/dog", "b/cat"]
    model = build.model_of(chosen, labels, names)
    head, single = model.get_submodule(chosen.head), build.model_of(chosen, names[:2])
    assert torch.equal(head.weight[[0, 1]], single.get_submodule(chosen.head).weight)
    assert torch.equal(head.weight[2], head.weight[0])
    assert list(model.config.id2label.values()) == labels
    assert model.config.num_labels == 3


# Options and texts: whole runs are in tests/finished/test_mixture_task.py


def test_questions_of_several_sets_are_calibrated_on_as_one() -> None:
    tokenizer = merging_tokenizer()
    model, rows = llama(tokenizer), [choices(12, 0), choices(5, 20)]
    settings = {"modality": "text", "labels": (), "metrics": ("accuracy",), "kind": "choice"}
    splits = [{split: Dataset.from_list(each.to_list(), split=split) for split in tasks_of.SPLITS} for each in rows]
    own = [Task(name=name, **settings, **each) for name, each in zip("ab", splits, strict=True)]
    mixed = tasks_of.mix("mixture", own, mixing="proportional", seed=0)
    transform = tasks_of.ChoiceTransform(tokenizer, 64)
    batches = tasks_of.MixtureTransform([transform, transform], mixed).batches(mixed.test, 8)
    first, second = (FewShotScore(model, transform.batches(each, 8), "options")(model) for each in rows)
    assert first != second
    assert FewShotScore(model, batches, "options")(model) == pytest.approx((12 * first + 5 * second) / 17)


def test_main_metrics_that_cannot_be_averaged_are_refused() -> None:
    main = {"a": "rouge_l", "b": "perplexity"}
    members = [SimpleNamespace(name=name, metrics=(metric,)) for name, metric in main.items()]
    with pytest.raises(PartialLoraError, match=r"task\.members.*'b': 'perplexity'"):
        objectives.judge_of_members(SimpleNamespace(members=members, sizes=()), [])
