"""How far runs have moved: CKA against its definition, what is measured of a trained run, and of which runs."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import recorded_runs
import torch
from dynamics import Moments, drift, main, measure, positions
from finished_runs import cache, changed, image_run
from peft import LoraConfig, get_peft_model
from recorded_runs import leave
from refusals import refusal
from transformers import BertConfig, BertForSequenceClassification

from partial_lora.finished import export
from partial_lora.finished.predict import RunModel
from partial_lora.launching.packs import DYNAMICS, dynamics


def literal_cka(first: np.ndarray, second: np.ndarray) -> float:
    """By Gram matrices and the centring matrix, as the definition has it."""
    centring = np.eye(len(first)) - 1 / len(first)
    grams = [centring @ each @ each.T @ centring for each in (first, second)]
    return np.trace(grams[0] @ grams[1]) / np.sqrt(np.trace(grams[0] @ grams[0]) * np.trace(grams[1] @ grams[1]))


def cka(first: np.ndarray, second: np.ndarray, *ends: int) -> float:
    """By batches that end at these examples."""
    moments = Moments()
    for start, end in zip((0, *ends), (*ends, len(first)), strict=True):
        moments.add(torch.tensor(first[start:end]), torch.tensor(second[start:end]))
    return moments.cka()


def test_sums_over_batches_give_the_cka_of_the_definition() -> None:
    generator = np.random.default_rng(0)
    first = generator.normal(size=(40, 5)) + 3.0
    second = first @ generator.normal(size=(5, 7)) + 2 * generator.normal(size=(40, 7)) - 1.0
    assert cka(first, second, 13, 14) == pytest.approx(literal_cka(first, second), rel=1e-9)
    assert 0.1 < literal_cka(first, second) < 0.9
    rotation = np.linalg.qr(generator.normal(size=(5, 5)))[0]
    assert cka(first, 5 * first @ rotation + 2) == pytest.approx(1)
    assert np.isnan(cka(first, np.ones((40, 2))))


def test_positions_are_tokens_without_padding_and_places_of_maps() -> None:
    tokens = torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert positions(tokens, mask).tolist() == [[0, 1], [2, 3], [6, 7]]
    assert positions(tokens).shape == (6, 2)
    maps = torch.arange(8.0).reshape(1, 2, 2, 2)
    assert positions(maps).tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_a_trained_run_is_measured_on_the_rows_it_has_seen_and_not_seen(monkeypatch) -> None:
    monkeypatch.setenv("PARTIAL_LORA_CACHE", cache())
    run = image_run()
    content, recorded = measure(run, device="cpu"), run.result["metrics"]["test"]
    assert dynamics(run.directory) == json.loads(json.dumps(content))
    assert content["metrics"]["test"]["accuracy"] == pytest.approx(recorded["accuracy"])
    assert content["metrics"]["test"]["loss"] == pytest.approx(recorded["loss"], rel=1e-4)
    assert content["metrics"]["train"]["loss"] != pytest.approx(recorded["loss"], rel=1e-4)
    assert content["rows"] == {"train": 54, "test": 21}
    assert list(content["cka"]) == [f"timm_model.blocks.{block}" for block in range(3)]
    assert all(0 < value < 1 - 1e-6 for value in content["cka"].values())
    trained = RunModel(run, "cpu")
    batch = {"pixel_values": torch.randn(6, 3, 32, 32), "labels": torch.zeros(6, dtype=torch.long)}
    with trained.model.disable_adapter():
        still = drift(export.base_model(run).eval(), trained, [batch], "timm_model.blocks")
    assert list(still.values()) == pytest.approx([1, 1, 1], abs=1e-9)


def test_features_move_from_the_trained_block_on_and_padding_is_no_example(monkeypatch) -> None:
    shape = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 3}
    torch.manual_seed(0)
    frozen = BertForSequenceClassification(BertConfig(vocab_size=20, max_position_embeddings=8, **shape)).eval()
    lora = LoraConfig(target_modules=["bert.encoder.layer.1.intermediate.dense"])
    adapted = get_peft_model(copy.deepcopy(frozen), lora).eval()
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    trained = SimpleNamespace(model=adapted, device="cpu", forward=lambda batch: adapted(**batch))
    tokens, mask = torch.arange(20).reshape(4, 5), torch.tensor([[1] * 5, [1] * 5, [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    counts, add = [], Moments.add
    monkeypatch.setattr(Moments, "add", lambda self, *pair: (counts.append([*map(len, pair)]), add(self, *pair)))
    moved = drift(frozen, trained, [{"input_ids": tokens, "attention_mask": mask}], "bert.encoder.layer")
    assert counts == [[13, 13]] * 3
    assert moved["bert.encoder.layer.0"] == pytest.approx(1, abs=1e-12)
    assert max(moved["bert.encoder.layer.1"], moved["bert.encoder.layer.2"]) < 1 - 1e-4


def test_other_rows_a_model_without_blocks_and_a_mixture_are_refused() -> None:
    run = image_run()
    of_other_files = replace(run, result=run.result | {"digests": {"task.data_files.train": "of other rows"}})
    mixture = changed(run, "task", path="members", members={"a": run.config.task})
    without = changed(run, "model", blocks=None)
    for other, key in ((of_other_files, ".*task.data_files"), (without, ".*model.blocks"), (mixture, ".*mixture")):
        with refusal(key):
            measure(other, device="cpu")


def test_a_measured_run_is_left_alone_and_one_without_weights_is_named(tmp_path: Path, capsys) -> None:
    done = leave(tmp_path, "lora", 0.9)
    recorded_runs.measure(done, 1.0, 0.9)
    before = (done / DYNAMICS).read_bytes()
    record = leave(tmp_path, "partial", 0.9, labels=["0", "1", "2", "3"])
    assert main([str(done)]) == 0
    assert main([str(done), str(record)]) == 3
    assert (done / DYNAMICS).read_bytes() == before
    assert capsys.readouterr().err.startswith(f"{record}: ")


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"version": 0, "metrics": {}, "cka": {}}', '{"version": 1, "cka": {}}']
)
def test_a_broken_or_foreign_file_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / DYNAMICS).write_text(content)
    assert dynamics(tmp_path) is None
