"""What is forgotten: transformers' own loss of the trained and of the untouched model, measured once."""

from __future__ import annotations

import functools

import finished_runs
import pytest
import torch
from finished_runs import GENERATION, exchange_files, override, tables, trained
from peft import PeftModel
from refusals import refusal

from partial_lora.building import build
from partial_lora.compare import measure_forgetting
from partial_lora.compare.measure_forgetting import Other
from partial_lora.files import read_json
from partial_lora.finished.run import FinishedRun
from partial_lora.launching import packs
from partial_lora.report.forgetting import changes_of
from partial_lora.settings.compose import composed
from partial_lora.training.objectives import loss_of_tokens


def pissa_run() -> FinishedRun:
    """An adapter whose start is taken out of W while it trains."""
    given = ("model=tiny_llama", "task=text_generation", "method=pissa", *GENERATION, "task.metrics=[perplexity]")
    return trained("pissa", *given, override(exchange_files()))


@functools.cache
def other_file() -> str:
    """Texts of another kind, of unlike lengths."""
    rows = [{"prompt": f"count {'to ' * (n % 5)}{n}", "response": f"{'one ' * (n % 3)}{n}"} for n in range(7)]
    return tables({"other": rows}, "other")["other"]


@pytest.mark.parametrize("make", [finished_runs.generation_run, pissa_run])
def test_it_is_transformers_own_loss_of_the_trained_and_of_the_untouched_model(make, monkeypatch) -> None:
    run = make()
    other = Other.of(other_file(), run.config)
    assert measure_forgetting.measure([run.directory], [other]) == []
    found = read_json(run.directory / packs.FORGETTING)["sets"]["other"]
    rows, transform = measure_forgetting._rows(run.config, other.task)
    base = build.model_of(run.config.model, ()).eval()
    for when in ("before", "after"):
        model = base if when == "before" else PeftModel.from_pretrained(base, str(run.adapter)).eval()
        losses, tokens = [], []
        for row in rows:
            batch = transform.collate([row])
            with torch.inference_mode():
                output = model(**batch)  # transformers shifts the labels
                assert loss_of_tokens(output, batch["labels"]).item() == pytest.approx(output.loss.item(), rel=1e-5)
            losses.append(output.loss.item())
            tokens.append((batch["labels"][:, 1:] != -100).sum().item())
        each = [loss * count * len(tokens) / sum(tokens) for loss, count in zip(losses, tokens, strict=True)]
        assert found[when] == pytest.approx(each, rel=1e-5)
    (changes,) = changes_of({"own": {0: packs.forgetting(run.directory)}}).values()
    assert changes.by_row["own"][0].mean() == pytest.approx(sum(found["after"]) / 7 - sum(found["before"]) / 7)
    assert abs(changes.by_row["own"][0].mean()) > 1e-4
    monkeypatch.setattr(measure_forgetting, "RunModel", pytest.fail)
    assert measure_forgetting.measure([run.directory], [other]) == []  # nothing is measured twice


def test_of_questions_it_is_the_loss_of_right_options_and_what_cannot_be_measured_is_named(tmp_path) -> None:
    run = finished_runs.choice_run()
    other = Other("questions", "id", run.config.task)
    assert measure_forgetting.measure([run.directory], [other]) == []
    after = packs.forgetting(run.directory)["questions"]["after"]
    assert sum(after) / len(after) == pytest.approx(run.result["metrics"]["test"]["loss"], rel=1e-5)
    (line,) = measure_forgetting.measure([tmp_path / "gone"], [other])
    assert str(tmp_path / "gone") in line


def test_what_says_nothing_of_forgetting_is_refused_before_anything_is_loaded(tmp_path) -> None:
    causal, classifier = composed("model=tiny_llama", "task=arc_easy"), composed("model=tiny_bert", "task=text_table")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    for config, named, begins in (
        (classifier, other_file(), "forgets"),
        (causal, str(tmp_path / "none.jsonl"), "forgets"),
        (causal, "sst2", "forgets=sst2"),
        (causal, "mixture", ".*mixture"),
        (causal, "nothing", ".*nothing"),
        (causal, str(empty), ".*empty"),
    ):
        with refusal(begins):
            Other.of(named, config)
