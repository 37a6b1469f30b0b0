"""Training: what selects, what stops, and steps that do not depend on the number of processes or parts."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import configured
import datasets
import numpy as np
import pytest
import torch
from method_settings import adapted as adapted_by
from peft import LoraConfig, PeftModel, get_peft_model
from refusals import refusal
from tiny_trainer import BATCH, adapted, rows, trained_state, trainer
from torch import nn
from transformers import Trainer, TrainingArguments, default_data_collator
from transformers.modeling_outputs import ModelOutput

from partial_lora.errors import PartialLoraError
from partial_lora.launching import directory as results
from partial_lora.methods.setting import training as training_of
from partial_lora.tasks.metrics import standard_error
from partial_lora.training import checkpoints, objectives, offline_metrics
from partial_lora.training import trainer as training_module
from partial_lora.training.config import TrainerConfig
from partial_lora.training.distributed import World, join
from partial_lora.training.fsdp import ShardedTrainer
from partial_lora.training.trainer import (
    OVERRIDDEN,
    Computation,
    LengthSampler,
    Pause,
    ResumableTrainer,
    UninterruptedCollate,
    build_trainer,
    check_arguments,
    data_workers,
    mixed_precision,
    still_rising,
)


def test_the_states_that_an_encoder_gives_beside_its_logits_change_no_score(tmp_path: Path) -> None:
    training = trainer(adapted(), tmp_path)
    expected = training.evaluate()["eval_accuracy"]
    forward = training.model.forward

    def with_states(**inputs: torch.Tensor) -> ModelOutput:
        outputs = forward(**inputs)
        return ModelOutput(logits=outputs.logits, encoder_last_hidden_state=torch.zeros(len(outputs.logits), 3, 2))

    training.model.forward = with_states
    assert training.evaluate()["eval_accuracy"] == expected


def test_what_is_overridden_of_the_trainer_is_looked_for_before_it_is_relied_on() -> None:
    own = {name for kind in (ResumableTrainer, ShardedTrainer) for name in vars(kind) if name[:2] != "__"}
    private = {name for name in own if name.startswith("_") and hasattr(Trainer, name)}
    assert private == set(OVERRIDDEN)


def test_fewer_rows_than_a_batch_still_train(tmp_path: Path) -> None:
    model = adapted()
    before = trained_state(model)
    assert trainer(model, tmp_path, count=5).train().global_step == 3
    assert any(not torch.equal(value, before[name]) for name, value in trained_state(model).items())


@pytest.mark.parametrize("whole", [[], ["patch_embed"]], ids=["frozen", "trained"])
def test_running_statistics_change_only_where_their_batch_norm_trains(tmp_path: Path, whole: list[str]) -> None:
    model = adapted().unload()
    model.timm_model.patch_embed.norm = nn.BatchNorm1d(4)  # over the four patches
    model = get_peft_model(model, LoraConfig(target_modules=["attn.qkv"], modules_to_save=["head", *whole]))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    trainer(model, tmp_path, max_steps=2).train()
    model.train()
    assert [bool(norm.running_mean.any()) for norm in norms] == [norm.training for norm in norms]
    assert any(norm.training for norm in norms) == bool(whole)


def test_of_checkpoints_that_are_equally_good_the_one_with_the_least_loss_is_left(tmp_path: Path) -> None:
    training = trainer(adapted(), tmp_path, epochs=4.0, learning_rate=3e-3, select_within=0)
    training.compute_metrics = lambda said: {"accuracy": 0.5}
    training.train()
    losses_of = {entry["step"]: entry["eval_loss"] for entry in training.state.log_history if "eval_loss" in entry}
    best = min(losses_of, key=losses_of.get)
    assert best != min(losses_of)  # else the first would do
    assert training.state.best_global_step == best
    assert training.evaluate()["eval_loss"] == pytest.approx(losses_of[best])


@pytest.mark.parametrize(("within", "expected"), [(1, 8), (1.1, 10)])
def test_the_latest_checkpoint_so_near_the_best_is_left(tmp_path: Path, within: float, expected: int) -> None:
    scores = iter([5 / 12, 9 / 12, 8 / 12, 8.5 / 12, 7.5 / 12, 5 / 12, 0.0])  # of 12 rows: an error of 0.121 at 9 / 12
    training = trainer(adapted(), tmp_path, max_steps=12, save_steps=2, select_within=within)
    training.compute_metrics = lambda said: {"accuracy": next(scores)}
    training.train()
    assert training.state.best_global_step == expected
    assert training.state.best_model_checkpoint.endswith(f"checkpoint-{expected}")


def impatient(folder: Path, scores: list[float]) -> ResumableTrainer:
    training = trainer(adapted(), folder, max_steps=12, save_steps=2, save_total_limit=9, patience=2, select_within=0)
    rest = iter(scores)
    training.compute_metrics = lambda said: {"accuracy": next(rest)}
    return training


def test_training_ends_where_validation_is_no_better_for_a_while_and_so_does_a_resumed_one(tmp_path: Path) -> None:
    training = impatient(tmp_path, [0.5, 0.9, 0.8, 0.85, 1.0])
    assert training.train().global_step == 8
    assert training.state.best_global_step == 4
    checkpoint = {step: tmp_path / results.CHECKPOINTS / f"checkpoint-{step}" for step in (6, 8)}
    assert impatient(tmp_path, [1.0]).train(checkpoint[8]).global_step == 8
    resumed = impatient(tmp_path, [0.85, 1.0])
    assert resumed.train(checkpoint[6]).global_step == 8
    assert resumed.state.best_global_step == 4


def test_training_pauses_at_the_first_checkpoint_of_its_share_and_a_later_one_ends_as_if_it_had_not(
    tmp_path: Path,
) -> None:
    pause = Pause(0.3)
    training = trainer(adapted(), tmp_path, max_steps=12, save_steps=2, callbacks=[pause])
    assert (training.train().global_step, pause.is_over) == (4, True)
    checkpoint = tmp_path / results.CHECKPOINTS / "checkpoint-4"
    whole = Pause(1.0)
    resumed = trainer(adapted(), tmp_path, max_steps=12, save_steps=2, callbacks=[whole])
    resumed.train(checkpoint)
    straight = trainer(adapted(), tmp_path / "straight", max_steps=12, save_steps=2)
    straight.train()
    assert not whole.is_over
    states = [trained_state(each.model) for each in (resumed, straight)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_optimizer_schedule_and_further_arguments_are_transformers_own(tmp_path: Path) -> None:
    settings = {"schedule": "constant_with_warmup", "optimizer": "sgd", "args": {"optim_args": "momentum=0.9"}}
    training = trainer(adapted(), tmp_path, max_steps=4, save_steps=4, **settings)
    training.train()
    assert type(training.optimizer.optimizer) is torch.optim.SGD
    assert training.args.optim_args == "momentum=0.9"
    rates = [entry["learning_rate"] for entry in training.state.log_history if "learning_rate" in entry]
    assert rates[-1] == training.args.learning_rate  # which a cosine would have left


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"schedule": "sine"}, "trainer.schedule=sine"),
        ({"optimizer": "adam9"}, "trainer.optimizer=adam9"),
        ({"patience": 0}, "trainer.patience=0"),
        ({"until": 0.0}, "trainer.until=0.0"),
        ({"args": ["seed"]}, "trainer.args="),
        ({"args": {"sedd": 1}}, "trainer.args.sedd=1"),
        ({"args": {"seed": 1}}, "trainer.args.seed=1"),
        ({"args": {"save_steps": 1}}, "trainer.args.save_steps=1"),
        ({"args": {"warmup_steps": 1}}, "trainer.args.warmup_steps=1.*warmup_ratio"),
        ({"args": {"neftune_noise_alpha": "lots"}}, "trainer.args.neftune_noise_alpha=lots"),
        ({"args": {"use_cache": True}}, "trainer.args.use_cache="),  # by which packed texts would see each other
        ({"args": {"bf16_full_eval": True}}, "trainer.args.bf16_full_eval=.*mixed_precision"),  # and saved so
    ],
)
def test_a_name_that_is_none_and_an_argument_that_a_run_sets_are_refused(settings: dict, key: str) -> None:
    with refusal(key):
        TrainerConfig(**settings)


def test_arguments_that_transformers_refuses_together_are_found_before_anything_is_computed() -> None:
    world = join("cpu")
    check_arguments(TrainerConfig(args={"dataloader_prefetch_factor": 2}, num_workers=1), world)
    for name, value in (("dataloader_prefetch_factor", 2), ("torch_compile_backend", "nothing")):
        with refusal("trainer.args=", name, "expected"):
            check_arguments(TrainerConfig(args={name: value}), world)


def test_every_argument_that_a_run_sets_is_refused(tmp_path: Path, monkeypatch) -> None:
    set_here: dict = {}

    def noted(**settings: object) -> TrainingArguments:
        set_here.update(settings)
        return TrainingArguments(**settings)

    monkeypatch.setattr(training_module, "TrainingArguments", noted)
    trainer(adapted(), tmp_path)
    for name in set_here:
        with refusal(f"trainer.args.{name}="):
            TrainerConfig(args={name: None})


def getting_worse(said):
    """A measure by which every look at validation is worse than the one before."""
    getting_worse.looks += 1
    return {"accuracy": -getting_worse.looks}


def test_a_checkpoint_before_the_adapter_has_its_final_size_is_not_chosen(tmp_path: Path) -> None:
    model, _ = adapted_by("adalora", "tiny_vit")
    aids = training_of("adalora", model)
    settings = {"method": aids, "epochs": 10.0, "learning_rate": 0.05, "select_within": 0}
    training = trainer(model, tmp_path, count=BATCH, size=32, save_total_limit=10, **settings)
    getting_worse.looks = 0
    training.compute_metrics = getting_worse
    training.train()
    assert training.state.best_global_step == 8  # of ten; the ranks are chosen in the eighth
    assert aids.summary()["ranks"] <= aids.summary()["target_ranks"]
    checkpoints.load_trainable(model, tmp_path / results.CHECKPOINTS / "checkpoint-4")
    assert aids.summary()["ranks"] > aids.summary()["target_ranks"]


def test_a_bounded_run_ends_with_a_look_at_validation(tmp_path: Path) -> None:
    training = trainer(adapted(), tmp_path, max_steps=5, save_steps=2)
    training.train()
    steps = [entry["step"] for entry in training.state.log_history if "eval_accuracy" in entry]
    assert steps == [2, 4, 5]


@pytest.mark.parametrize("native", [True, False])
def test_precision_is_that_of_the_device_and_never_of_the_processor(monkeypatch, native: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: native)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert mixed_precision("auto", "cpu") == "no"
    assert mixed_precision("auto", "cuda") == ("bf16" if native else "no")
    assert mixed_precision("no", "cpu") == "no"
    assert mixed_precision("bf16", "cpu") == "bf16"


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
        sampler = LengthSampler(BATCH, lengths, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert sorted(order(0, 0)) == list(range(400))
    batches = np.array(lengths)[order(0, 0)].reshape(-1, BATCH)
    assert np.ptp(batches, axis=1).mean() < 10 < np.ptp(np.array(lengths).reshape(-1, BATCH), axis=1).mean()
    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert order(0, 1) == order(0, 1)  # whatever epochs came before


def test_every_epoch_of_a_training_by_length_has_its_own_order(tmp_path: Path) -> None:
    training = trainer(adapted(), tmp_path, count=24, length_grouped=True)
    training.train_dataset = training.train_dataset.add_column("length", list(range(24)))
    seen = []
    hook = training.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"]) if module.training else None, with_kwargs=True
    )
    training.train()
    predictions = training.predict(rows(12).add_column("length", list(range(12))[::-1]))
    hook.remove()
    assert predictions.label_ids.tolist() == list(rows(12)["labels"])  # evaluation keeps the order of the rows
    first, second = torch.cat(seen[:3]), torch.cat(seen[3:6])
    assert not torch.equal(first, second)
    assert torch.equal(first.flatten(1).sum(1).sort().values, second.flatten(1).sum(1).sort().values)


@pytest.mark.parametrize(("metric", "best"), [("accuracy", max), ("mse", min)])
def test_the_checkpoint_that_did_best_on_validation_is_what_is_left(tmp_path: Path, metric: str, best) -> None:
    real = metric != "accuracy"
    model = adapted(labels=()) if real else adapted()
    training = trainer(
        model, tmp_path, epochs=6.0, learning_rate=0.01 if real else 0.3, metrics=(metric,), real=real, select_within=0
    )
    training.train()
    measured = [entry[f"eval_{metric}"] for entry in training.state.log_history if f"eval_{metric}" in entry]
    assert len(measured) == 6
    assert min(measured) < max(measured)  # else anything would do
    assert training.evaluate()[f"eval_{metric}"] == pytest.approx(best(measured))


def test_no_process_loads_data_beside_a_cpu_by_default(monkeypatch) -> None:
    assert data_workers(None, "cpu", 1) == 0
    assert data_workers(3, "cpu", 1) == 3
    found = []
    for cores in (1, 6, 64):
        monkeypatch.setattr("partial_lora.training.trainer.cpu_count", lambda cores=cores: cores)
        found.append((cores, data_workers(None, "cuda", 1)))
    assert found == [(1, 1), (6, 5), (64, 8)]


def test_a_process_that_loads_data_outlives_a_signal() -> None:
    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 40

        def __getitem__(self, row: int) -> dict:
            return {"row": row, "pid": os.getpid()}

    def batch(some: list[dict]) -> dict:
        return {key: torch.tensor([row[key] for row in some]) for key in some[0]}

    loaded = iter(
        torch.utils.data.DataLoader(Rows(), batch_size=4, num_workers=1, collate_fn=UninterruptedCollate(batch))
    )
    first = next(loaded)
    assert first["pid"][0] != os.getpid()
    os.kill(int(first["pid"][0]), signal.SIGTERM)
    assert torch.cat([first["row"], *(each["row"] for each in loaded)]).tolist() == list(range(40))


def test_texts_are_in_the_order_of_the_epoch_whatever_stands_between(tmp_path: Path, monkeypatch) -> None:
    training = trainer(adapted(), tmp_path, count=24, length_grouped=True)
    training.train_dataset = training.train_dataset.add_column("length", list(range(24)))
    sampler = training._get_train_sampler()
    monkeypatch.setattr(Trainer, "_run_epoch", lambda self, **settings: None)
    training._run_epoch(epoch=2)
    own = LengthSampler(BATCH, list(range(24)), 0, 24)
    own.set_epoch(2)
    assert list(sampler) == list(own)


# Steps in parts

ROWS = 44  # five batches and half of one
TARGETS = {"tiny_bert": ["query", "dense"], "tiny_llama": ["q_proj", "down_proj"], "tiny_vit": ["attn.qkv", "mlp.fc1"]}
# Sums over parts are taken in another order; Adam makes of that what its small denominators let it.
TOLERANCE = {"atol": 1e-6, "rtol": 1e-5}


def inputs(name: str, count: int) -> datasets.Dataset:
    """Return inputs of a model: texts with unlike numbers of tokens; of a causal model some tokens are no answer."""
    columns = configured.inputs(name, rows=count, seed=count)
    if "attention_mask" in columns:
        lengths = torch.arange(count) % 6 + 3
        columns["attention_mask"] = (torch.arange(9) < lengths[:, None]).long()
        columns["length"] = lengths
    labels = torch.arange(count) % 3
    if name == "tiny_llama":
        labels = columns["input_ids"].masked_fill(columns["attention_mask"] == 0, -100)
        labels[:, :2] = -100
    columns |= {"labels": labels}
    return datasets.Dataset.from_dict({key: value.numpy() for key, value in columns.items()}).with_format("torch")


def without_dropout(name: str) -> PeftModel:
    model = configured.load(name)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.manual_seed(0)
    head = configured.settings(name)["head"]
    return get_peft_model(
        model, LoraConfig(r=2, target_modules=TARGETS[name], modules_to_save=[head] if head else None)
    )


def in_parts(name: str, folder: Path, parts: int, **changes: object) -> Trainer:
    causal = name == "tiny_llama"
    length_grouped = changes.pop("length_grouped", name == "tiny_bert")
    settings = {"epochs": 2.0, "batch_size": BATCH, "eval_batch_size": 6, "learning_rate": 1e-2} | changes
    return build_trainer(
        without_dropout(name),
        TrainerConfig(**settings, gradient_accumulation_steps=parts),
        Computation(World("cpu"), folder, "no", 0, {}),
        rows={"train": inputs(name, ROWS), "validation": inputs(name, 6)},
        transform=SimpleNamespace(
            collate=lambda some: default_data_collator(
                [{key: value for key, value in row.items() if key != "length"} for row in some]
            ),
            lengths=length_grouped,
        ),
        judge=SimpleNamespace(
            loss=objectives.loss_of_tokens if causal else objectives.loss_of_batch,
            reduce=offline_metrics.log_likelihoods if causal else None,
            measure=lambda outputs: (
                {"perplexity": float(np.exp(-outputs.predictions[:, 0].sum() / outputs.predictions[:, 1].sum()))}
                if causal
                else offline_metrics.metrics_of(("accuracy",), outputs.predictions, np.asarray(outputs.label_ids))
            ),
            selects="perplexity" if causal else "accuracy",
        ),
    )


def first_gradient(training: Trainer) -> dict[str, torch.Tensor]:
    """Return the gradient of the first step, before it is taken."""
    training.args.max_grad_norm = 0.0  # as it is, not clipped
    found: dict[str, torch.Tensor] = {}

    def keep(optimizer, args, kwargs) -> None:
        for name, parameter in training.model.named_parameters():
            if parameter.requires_grad:
                found.setdefault(name, parameter.grad.clone())

    training.create_optimizer()
    training.optimizer.register_step_pre_hook(keep)
    training.train()
    return found


@pytest.mark.parametrize("name", ["tiny_bert", "tiny_llama"])  # losses of labels and of tokens
def test_parts_of_a_step_have_its_gradient_and_its_loss(name: str, tmp_path: Path) -> None:
    one, several = (in_parts(name, tmp_path / str(parts), parts, epochs=1.0) for parts in (1, 4))
    expected, found = first_gradient(one), first_gradient(several)
    assert expected.keys() == found.keys()
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, **TOLERANCE)
    steps, parted = (
        [(entry["step"], entry["loss"]) for entry in each.state.log_history if "loss" in entry]
        for each in (one, several)
    )
    assert [step for step, _ in steps] == [step for step, _ in parted]
    assert [loss for _, loss in parted] == pytest.approx([loss for _, loss in steps], abs=1e-6)


def test_texts_are_evaluated_in_parts_that_change_nothing(monkeypatch, tmp_path: Path) -> None:
    training, rows, seen = in_parts("tiny_llama", tmp_path, 1), inputs("tiny_llama", 6), []
    training.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    whole = training.evaluate(rows), training.predict(rows)
    monkeypatch.setattr(offline_metrics, "_TOKENS", 20)  # of 9 tokens two texts
    parts = training.evaluate(rows), training.predict(rows)
    assert [tuple(shape) for shape in seen] == [(6, 9)] * 2 + [(2, 9)] * 6
    np.testing.assert_allclose(parts[1].predictions, whole[1].predictions, rtol=1e-5)
    np.testing.assert_array_equal(parts[1].label_ids, whole[1].label_ids)
    for key in ("eval_loss", "eval_perplexity"):
        assert parts[0][key] == pytest.approx(whole[0][key], rel=1e-5)
    loss = -whole[1].predictions[:, 0].sum() / whole[1].predictions[:, 1].sum()
    assert whole[0]["eval_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("length_grouped", [False, True])
def test_every_step_of_every_epoch_has_the_rows_it_had(length_grouped: bool, tmp_path: Path) -> None:
    seen = []
    for parts in (1, 4):
        training = in_parts("tiny_bert", tmp_path / str(parts), parts, length_grouped=length_grouped)
        seen.append([])
        training.model.register_forward_pre_hook(
            lambda module, args, kwargs: seen[-1].extend(kwargs["input_ids"].tolist()) if module.training else None,
            with_kwargs=True,
        )
        assert training.train().global_step == 2 * (ROWS // BATCH)
    assert len(seen[0]) == 2 * (ROWS // BATCH) * BATCH
    assert seen[0] == seen[1]


def test_a_batch_in_parts_of_more_than_all_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PartialLoraError, match=r"trainer\.batch_size=64"):
        in_parts("tiny_vit", tmp_path, 4, batch_size=64)


def test_a_small_table_is_trained_for_some_hundred_steps_and_what_is_set_holds() -> None:
    usual = TrainerConfig(epochs=None, batch_size=16)
    for count in (5, 100, 504):
        assert usual.passes(count) == int(usual.passes(count)) >= 5
        assert 300 <= usual.steps(count) < 300 + usual.steps_of_epoch(count)
    assert (usual.passes(100_000), usual.steps(100_000)) == (5, 5 * 6250)
    assert TrainerConfig(epochs=0.5, batch_size=10).steps(100) == 5
    assert TrainerConfig(epochs=None, max_steps=7).steps(100) == 7
    assert TrainerConfig(epochs=None, max_steps=7).longer(100) == "trainer.max_steps=14"
    assert TrainerConfig(epochs=None, batch_size=10).longer(100) == "trainer.epochs=60"


@pytest.mark.parametrize(
    ("metric", "scores", "losses", "rising"),
    [
        ("accuracy", (0.2, 0.5, 0.7, 0.75), (2, 1.5, 1, 0.8), True),
        ("accuracy", (0.2, 0.5, 0.7, 0.71), (2, 1.5, 1, 0.8), False),
        ("accuracy", (0.2, 0.5, 0.7, 0.75), (2, 1.5, 1, 1), False),  # one row more, by chance
        ("mse", (2, 1.5, 1, 0.8), (2, 1.5, 1, 0.8), True),
        ("accuracy", (0.7,), (1,), False),
    ],
)
def test_a_training_that_is_too_short_is_known_by_its_last_quarter(metric, scores, losses, rising) -> None:
    measured = [
        {"step": 25 * number, f"eval_{metric}": score, "eval_loss": loss}
        for number, (score, loss) in enumerate(zip(scores, losses, strict=True), start=1)
    ]
    assert still_rising([{"step": 1, "loss": 3.0}, *measured], metric) is rising


def test_the_error_of_a_score_is_that_of_a_share_and_never_none_at_all() -> None:
    assert standard_error(0.5, 10_000) == pytest.approx(0.005, rel=1e-3)
    assert standard_error(0.8, 400) == pytest.approx(0.02, rel=0.02)
    assert standard_error(1.0, 48) == standard_error(7.0, 48) > 0.01
    assert standard_error(-0.3, 48) == standard_error(0.0, 48) > 0.01
