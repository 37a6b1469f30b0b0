"""Training: what selects, what stops, and steps that do not depend on how many processes share them."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from method_settings import adapted as tiny
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import default_data_collator

from partial_lora import methods, models
from partial_lora.errors import PartialLoraError
from partial_lora.runs import directory as results
from partial_lora.training import checkpoints, objectives
from partial_lora.training import metrics as evaluation
from partial_lora.training import trainer as fit
from partial_lora.training.config import TrainerConfig
from partial_lora.training.trainer import build_trainer

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
BATCH = 8


def rows(count: int, real: bool = False, size: int = 16) -> datasets.Dataset:
    generator = torch.Generator().manual_seed(count)
    labels = torch.arange(count) % 3
    pixels = torch.randn(count, 3, size, size, generator=generator) + labels[:, None, None, None]
    table = datasets.Dataset.from_dict(
        {"pixel_values": pixels.numpy(), "labels": (labels / 2 if real else labels).tolist()}
    )
    return table.with_format("torch")


@pytest.fixture
def adapted() -> PeftModel:
    torch.manual_seed(0)
    settings = {"name": "tiny", "weights": "random", "architecture": "vit_tiny_patch16_224", "image_size": 16}
    model = models.load(model_args=TINY, labels=["a", "b", "c"], **settings)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["attn.qkv"], modules_to_save=["timm_model.head"]))


@pytest.fixture
def adapted_to_a_number() -> PeftModel:
    torch.manual_seed(0)
    settings = {"name": "tiny", "weights": "random", "architecture": "vit_tiny_patch16_224", "image_size": 16}
    model = models.load(model_args=TINY, labels=[], **settings)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["attn.qkv"], modules_to_save=["timm_model.head"]))


def collate(some: list[dict]) -> dict[str, torch.Tensor]:
    return default_data_collator([{key: row[key] for key in ("pixel_values", "labels")} for row in some])


def trainer(model: PeftModel, directory: Path, count: int = 20, real: bool = False, size: int = 16, **changes: object):
    of_config = {field.name for field in dataclasses.fields(TrainerConfig)} & changes.keys()
    settings = {"epochs": 3.0, "batch_size": BATCH, "eval_batch_size": 5, "learning_rate": 1e-2, "weight_decay": 0.0}
    settings |= {key: changes.pop(key) for key in of_config}
    metrics = changes.pop("metrics", ("accuracy",))
    return build_trainer(
        model,
        TrainerConfig(**settings),
        train=rows(count, real, size),
        validation=rows(12, real, size),
        directory=directory / results.CHECKPOINTS,
        collate=collate,
        loss=objectives.loss_of_batch,
        measure=lambda said: evaluation.metrics_of(metrics, said.predictions, np.asarray(said.label_ids)),
        selects=metrics[0],
        device="cpu",
        precision="no",
        seed=0,
        **{"world_size": 1, "versions": {"torch": torch.__version__}} | changes,
    )


def trained_state(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def test_every_step_has_a_whole_batch_and_evaluation_sees_every_row(adapted: PeftModel, tmp_path: Path) -> None:
    training = trainer(adapted, tmp_path, count=20)
    seen = []
    hook = adapted.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["pixel_values"])) if module.training else None,
        with_kwargs=True,
    )
    training.train()
    hook.remove()
    assert seen == [BATCH] * (3 * (20 // BATCH))
    assert len(training.predict(rows(12)).predictions) == 12


def test_fewer_rows_than_a_batch_still_train(adapted: PeftModel, tmp_path: Path) -> None:
    before = trained_state(adapted)
    assert trainer(adapted, tmp_path, count=5).train().global_step == 3
    assert any(not torch.equal(value, before[name]) for name, value in trained_state(adapted).items())


def test_the_checkpoint_that_did_best_on_validation_is_what_is_left(adapted: PeftModel, tmp_path: Path) -> None:
    training = trainer(adapted, tmp_path, epochs=6.0, learning_rate=0.3)
    training.train()
    measured = [entry["eval_accuracy"] for entry in training.state.log_history if "eval_accuracy" in entry]
    assert len(measured) == 6
    assert min(measured) < max(measured)  # else anything would do
    assert training.evaluate()["eval_accuracy"] == max(measured)


def test_of_checkpoints_that_are_equally_good_the_one_with_the_least_loss_is_left(adapted, tmp_path: Path) -> None:
    training = trainer(adapted, tmp_path, epochs=4.0, learning_rate=3e-3)
    training.compute_metrics = lambda said: {"accuracy": 0.5}
    training.train()
    losses_of = {entry["step"]: entry["eval_loss"] for entry in training.state.log_history if "eval_loss" in entry}
    best = min(losses_of, key=losses_of.get)
    assert best != min(losses_of)  # else the first would do
    assert training.state.best_global_step == best
    assert training.evaluate()["eval_loss"] == pytest.approx(losses_of[best])


def getting_worse(said):
    """A measure by which every look at validation is worse than the one before."""
    getting_worse.looks += 1
    return {"accuracy": -getting_worse.looks}


def test_a_checkpoint_before_the_adapter_has_its_final_size_is_not_chosen(tmp_path: Path) -> None:
    model, _ = tiny("adalora", "tiny_vit")
    aids = methods.training("adalora", model)
    settings = {"callbacks": aids.callbacks, "final_after": aids.final_after, "epochs": 10.0, "learning_rate": 0.05}
    training = trainer(model, tmp_path, count=BATCH, size=32, save_total_limit=10, **settings)
    getting_worse.looks = 0
    training.compute_metrics = getting_worse
    training.train()
    assert training.state.best_global_step == 8  # of ten; the ranks are chosen in the eighth
    assert aids.summary()["ranks"] <= aids.summary()["target_ranks"]
    checkpoints.load_trainable(model, tmp_path / results.CHECKPOINTS / "checkpoint-4")
    assert aids.summary()["ranks"] > aids.summary()["target_ranks"]


def test_where_only_the_last_has_it_the_last_is_chosen(adapted: PeftModel, tmp_path: Path) -> None:
    training = trainer(adapted, tmp_path, epochs=3.0, final_after=lambda steps: steps - 1)
    getting_worse.looks = 0
    training.compute_metrics = getting_worse
    training.train()
    assert training.state.best_global_step == training.state.max_steps == 6


def test_a_bounded_run_ends_with_a_look_at_validation(adapted: PeftModel, tmp_path: Path) -> None:
    training = trainer(adapted, tmp_path, max_steps=5, save_steps=2)
    training.train()
    steps = [entry["step"] for entry in training.state.log_history if "eval_accuracy" in entry]
    assert steps == [2, 4, 5]


def test_a_loss_that_is_not_finite_stops_before_anything_moves(adapted: PeftModel, tmp_path: Path) -> None:
    with torch.no_grad():
        adapted.get_base_model().timm_model.norm.weight[0] = float("nan")
    before = trained_state(adapted)
    with pytest.raises(PartialLoraError, match=r"not finite at step 1 .* lower trainer\.learning_rate") as stop:
        trainer(adapted, tmp_path).train()
    assert "\n" not in str(stop.value)
    assert all(torch.equal(value, before[name]) for name, value in trained_state(adapted).items())
    assert not list((tmp_path / results.CHECKPOINTS).glob("*"))


def test_a_batch_that_does_not_divide_among_the_accelerators_is_refused(adapted: PeftModel, tmp_path: Path) -> None:
    with pytest.raises(PartialLoraError, match=r"trainer\.batch_size=8: expected a multiple of the 3 processes"):
        trainer(adapted, tmp_path, world_size=3)


@pytest.mark.parametrize("native", [True, False])
def test_precision_is_that_of_the_device_and_never_of_the_processor(monkeypatch, native: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: native)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert fit.mixed_precision("auto", "cpu") == "no"
    assert fit.mixed_precision("auto", "cuda") == ("bf16" if native else "no")
    assert fit.mixed_precision("no", "cpu") == "no"
    assert fit.mixed_precision("bf16", "cpu") == "bf16"


@pytest.mark.parametrize("real", [False, True])
def test_parts_of_a_step_add_up_to_the_mean_over_its_examples(real: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 1 if real else 3, generator=generator)
    labels = torch.randn(7, generator=generator) if real else torch.arange(7) % 3
    literal = nn.functional.mse_loss(logits[:, 0], labels) if real else nn.functional.cross_entropy(logits, labels)
    parts = [(logits[:4], labels[:4]), (logits[4:], labels[4:])]  # uneven, as accumulation and processes may be
    total = sum(objectives.loss_of_batch(SimpleNamespace(logits=part), of, num_items_in_batch=7) for part, of in parts)
    assert torch.allclose(total, literal)
    assert torch.allclose(objectives.loss_of_batch(SimpleNamespace(logits=logits), labels), literal)


def test_texts_of_like_length_share_a_batch_in_an_order_that_seed_and_epoch_decide() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 400).tolist()

    def order(seed: int, epoch: int) -> list[int]:
        sampler = fit.ByLength(BATCH, lengths, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert sorted(order(0, 0)) == list(range(400))
    batches = np.array(lengths)[order(0, 0)].reshape(-1, BATCH)
    assert np.ptp(batches, axis=1).mean() < 10 < np.ptp(np.array(lengths).reshape(-1, BATCH), axis=1).mean()
    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert order(0, 1) == order(0, 1)  # whatever epochs came before


def test_every_epoch_of_a_training_by_length_has_its_own_order(adapted: PeftModel, tmp_path: Path) -> None:
    training = trainer(adapted, tmp_path, count=24, length_grouped=True)
    training.train_dataset = training.train_dataset.add_column("length", list(range(24)))
    seen = []
    hook = adapted.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"]) if module.training else None,
        with_kwargs=True,
    )
    training.train()
    said = training.predict(rows(12).add_column("length", list(range(12))[::-1]))
    hook.remove()
    assert said.label_ids.tolist() == list(rows(12)["labels"])  # evaluation keeps the order of the rows
    first, second = torch.cat(seen[:3]), torch.cat(seen[3:6])
    assert not torch.equal(first, second)
    assert torch.equal(first.flatten(1).sum(1).sort().values, second.flatten(1).sum(1).sort().values)


@pytest.mark.parametrize(("primary", "best"), [("pearson", max), ("mse", min)])
def test_a_regression_is_selected_by_its_metric(adapted_to_a_number, tmp_path: Path, primary: str, best) -> None:
    training = trainer(adapted_to_a_number, tmp_path, epochs=5.0, metrics=(primary, "mse"), real=True)
    training.train()
    measured = [entry[f"eval_{primary}"] for entry in training.state.log_history if f"eval_{primary}" in entry]
    assert min(measured) < max(measured)
    assert training.evaluate()[f"eval_{primary}"] == pytest.approx(best(measured))


def test_no_process_loads_data_beside_a_cpu_unless_asked_to() -> None:
    assert fit.loading_processes(None, "cpu", 1) == 0
    assert fit.loading_processes(3, "cpu", 1) == 3
    assert 1 <= fit.loading_processes(None, "cuda", 1) <= 8


def test_a_process_that_loads_data_outlives_what_asks_the_run_to_stop() -> None:
    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 40

        def __getitem__(self, row: int) -> dict:
            return {"row": row, "pid": os.getpid()}

    def batch(some: list[dict]) -> dict:
        return {key: torch.tensor([row[key] for row in some]) for key in some[0]}

    loaded = iter(torch.utils.data.DataLoader(Rows(), batch_size=4, num_workers=1, collate_fn=fit.Undisturbed(batch)))
    first = next(loaded)
    assert first["pid"][0] != os.getpid()
    os.kill(int(first["pid"][0]), signal.SIGTERM)
    assert torch.cat([first["row"], *(each["row"] for each in loaded)]).tolist() == list(range(40))


def test_texts_are_in_the_order_of_the_epoch_whatever_stands_between(adapted, tmp_path: Path, monkeypatch) -> None:
    training = trainer(adapted, tmp_path, count=24, length_grouped=True)
    training.train_dataset = training.train_dataset.add_column("length", list(range(24)))
    sampler = training._get_train_sampler()
    monkeypatch.setattr(fit.ResumingTrainer, "_run_epoch", lambda self, **settings: None)
    training._run_epoch(epoch=2)
    own = fit.ByLength(BATCH, list(range(24)), 0, 24)
    own.set_epoch(2)
    assert list(sampler) == list(own)
