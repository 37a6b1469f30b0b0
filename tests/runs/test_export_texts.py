"""Exports of a text encoder whose pooler trained beside the head: others compute its logits from the files alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from finished_runs import cache, override, sentence_files, trained
from safetensors import safe_open

from partial_lora.runs import export, finished


@pytest.fixture(scope="module")
def run() -> finished.FinishedRun:
    settings = ("model=tiny_deberta", "task=text_table", "calibration.levels=0.45", "trainer.learning_rate=0.05")
    return trained("masked texts", *settings, override(sentence_files()))


@pytest.fixture(autouse=True)
def same_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARTIAL_LORA_CACHE", cache())


@pytest.mark.parametrize(
    ("to", "by"), [("peft", "plain PEFT"), ("compact", "a fresh base model"), ("merged", "transformers alone")]
)
def test_a_text_run_is_computed_by_others_from_its_files(run, tmp_path: Path, to: str, by: str) -> None:
    done = export.export(run, to, tmp_path / to, check=True)  # raises where the logits differ
    assert f"{by}: logits differ by at most" in done.proof


def test_the_adapter_has_the_pooler_that_trained(run) -> None:
    with safe_open(run.adapter / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {"base_model.model.pooler.dense.weight", "base_model.model.classifier.weight"} <= names
    heads = run.result["parameters"]["head"]
    assert heads == 32 * 32 + 32 + 2 * 32 + 2
