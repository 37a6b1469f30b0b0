"""How far a run has moved: CKA against its definition, and what is measured of a run that was trained."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from finished_runs import cache, image_run
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from partial_lora.errors import PartialLoraError
from partial_lora.evidence import drift
from partial_lora.evidence.dynamics import gap, read_dynamics
from partial_lora.finished import FinishedRun
from partial_lora.inference import RunModel


def literal_cka(first: np.ndarray, second: np.ndarray) -> float:
    """By Gram matrices and the centring matrix, as the definition has it."""
    count = len(first)
    centring = np.eye(count) - 1 / count
    grams = [centring @ each @ each.T @ centring for each in (first, second)]
    return np.trace(grams[0] @ grams[1]) / np.sqrt(np.trace(grams[0] @ grams[0]) * np.trace(grams[1] @ grams[1]))


def of_batches(first: np.ndarray, second: np.ndarray, *ends: int) -> float:
    moments = drift.Moments()
    for start, end in zip((0, *ends), (*ends, len(first)), strict=True):
        moments.add(torch.tensor(first[start:end]), torch.tensor(second[start:end]))
    return moments.cka()


def test_sums_over_batches_give_the_cka_of_the_definition() -> None:
    generator = np.random.default_rng(0)
    first = generator.normal(size=(40, 5)) + 3.0
    second = first @ generator.normal(size=(5, 7)) + 2 * generator.normal(size=(40, 7)) - 1.0
    assert of_batches(first, second, 13, 14) == pytest.approx(literal_cka(first, second), rel=1e-9)
    assert 0.1 < literal_cka(first, second) < 0.9


def test_cka_does_not_see_rotation_scale_or_shift() -> None:
    generator = np.random.default_rng(1)
    first = generator.normal(size=(30, 6))
    rotation = np.linalg.qr(generator.normal(size=(6, 6)))[0]
    assert of_batches(first, 5 * first @ rotation + 2) == pytest.approx(1)
    assert np.isnan(of_batches(first, np.ones((30, 2))))


def test_positions_are_tokens_without_padding_and_places_of_maps() -> None:
    tokens = torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert drift.positions(tokens, mask).tolist() == [[0, 1], [2, 3], [6, 7]]
    assert drift.positions(tokens).shape == (6, 2)
    maps = torch.arange(8.0).reshape(1, 2, 2, 2)
    assert drift.positions(maps).tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]


@pytest.fixture(scope="module")
def measured() -> dict:
    run = image_run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PARTIAL_LORA_CACHE", cache())
        return drift.measure(run, device="cpu")


def test_a_run_is_measured_on_the_rows_it_has_seen_and_not_seen(measured) -> None:
    run = image_run()
    content = read_dynamics(run.directory)
    assert content == json.loads(json.dumps(measured))
    recorded = run.result["metrics"]["test"]
    assert content["metrics"]["test"]["accuracy"] == pytest.approx(recorded["accuracy"])
    assert content["metrics"]["test"]["loss"] == pytest.approx(recorded["loss"], rel=1e-4)
    assert content["metrics"]["train"]["loss"] != pytest.approx(recorded["loss"], rel=1e-4)
    assert content["rows"] == {"train": 54, "test": 21}
    assert gap(content) == (content["metrics"]["train"]["accuracy"], recorded["accuracy"])


def test_drift_is_of_every_block_and_none_where_nothing_was_trained(measured) -> None:
    assert list(measured["cka"]) == [f"timm_model.blocks.{block}" for block in range(3)]
    assert all(0 < value < 1 - 1e-6 for value in measured["cka"].values())
    run = image_run()
    trained = RunModel(run, "cpu")
    batch = {"pixel_values": torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    batch["labels"] = torch.zeros(6, dtype=torch.long)
    with trained.model.disable_adapter():
        still = drift.drift(drift._frozen(run, "cpu"), trained, [batch], "timm_model.blocks")
    assert list(still.values()) == pytest.approx([1, 1, 1], abs=1e-9)


def test_what_trained_moves_from_its_block_on_and_padding_is_no_example(monkeypatch) -> None:
    shape = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 3}
    torch.manual_seed(0)
    frozen = BertForSequenceClassification(BertConfig(vocab_size=20, max_position_embeddings=8, **shape)).eval()
    targets = ["bert.encoder.layer.1.intermediate.dense"]
    adapted = get_peft_model(copy.deepcopy(frozen), LoraConfig(target_modules=targets)).eval()
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    trained = SimpleNamespace(model=adapted, device="cpu", logits=lambda batch, reduce: adapted(**batch))
    tokens, mask = torch.arange(20).reshape(4, 5), torch.tensor([[1] * 5, [1] * 5, [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    counts, add = [], drift.Moments.add
    monkeypatch.setattr(drift.Moments, "add", lambda self, *pair: (counts.append([*map(len, pair)]), add(self, *pair)))
    found = drift.drift(frozen, trained, [{"input_ids": tokens, "attention_mask": mask}], "bert.encoder.layer")
    assert counts == [[13, 13]] * 3
    assert found["bert.encoder.layer.0"] == pytest.approx(1, abs=1e-12)
    assert max(found["bert.encoder.layer.1"], found["bert.encoder.layer.2"]) < 1 - 1e-4


def test_rows_that_have_changed_since_the_training_are_refused(tmp_path) -> None:
    run = image_run()
    of_other_files = FinishedRun(tmp_path / f"{run.method}-00000000" / "seed0", run.settings, run.result)
    with pytest.raises(PartialLoraError, match="not the rows that the run was trained on"):
        drift.measure(of_other_files, device="cpu")


def test_a_model_without_blocks_is_refused() -> None:
    run = image_run()
    settings = run.settings | {"model": run.settings["model"] | {"blocks": None}}
    with pytest.raises(PartialLoraError, match=r"model\.blocks=null"):
        drift.measure(FinishedRun(run.directory, settings, run.result))
