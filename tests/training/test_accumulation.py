"""A step that is computed in parts is the step: its loss, its gradient and the rows of its batch."""

from __future__ import annotations

from pathlib import Path

import configured
import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, default_data_collator

from partial_lora.errors import PartialLoraError
from partial_lora.training import metrics, objectives
from partial_lora.training.config import TrainerConfig
from partial_lora.training.trainer import build_trainer

BATCH, ROWS = 8, 44  # 44 rows are five batches and half of one
ADAPTED = {"tiny_bert": ["query", "dense"], "tiny_llama": ["q_proj", "down_proj"], "tiny_vit": ["attn.qkv", "mlp.fc1"]}
# Sums over parts are taken in another order; Adam makes of that what its small denominators let it.
TOLERANCE = {"atol": 1e-6, "rtol": 1e-5}


def rows(name: str, count: int) -> datasets.Dataset:
    """Inputs of a model, of texts with unlike numbers of tokens; a causal model is asked for some of its tokens."""
    inputs = configured.inputs(name, rows=count, seed=count)
    if "attention_mask" in inputs:
        lengths = torch.arange(count) % 6 + 3
        inputs["attention_mask"] = (torch.arange(9) < lengths[:, None]).long()
        inputs["length"] = lengths
    labels = torch.arange(count) % 3
    if name == "tiny_llama":
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        labels[:, :2] = -100
    columns = inputs | {"labels": labels}
    return datasets.Dataset.from_dict({key: value.numpy() for key, value in columns.items()}).with_format("torch")


def adapted(name: str) -> PeftModel:
    model = configured.load(name)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.manual_seed(0)
    head = configured.settings(name)["head"]
    return get_peft_model(
        model, LoraConfig(r=2, target_modules=ADAPTED[name], modules_to_save=[head] if head else None)
    )


def trainer(name: str, folder: Path, parts: int, **changes: object) -> Trainer:
    causal = name == "tiny_llama"
    length_grouped = changes.pop("length_grouped", name == "tiny_bert")
    settings = {"epochs": 2.0, "batch_size": BATCH, "eval_batch_size": 6, "learning_rate": 1e-2} | changes
    return build_trainer(
        adapted(name),
        TrainerConfig(**settings, gradient_accumulation_steps=parts),
        train=rows(name, ROWS),
        validation=rows(name, 6),
        directory=folder,
        collate=lambda some: default_data_collator(
            [{key: value for key, value in row.items() if key != "length"} for row in some]
        ),
        loss=objectives.loss_of_tokens if causal else objectives.loss_of_batch,
        reduce=metrics.log_likelihoods if causal else None,
        measure=lambda said: (
            {"perplexity": float(np.exp(-said.predictions[:, 0].sum() / said.predictions[:, 1].sum()))}
            if causal
            else metrics.metrics_of(("accuracy",), said.predictions, np.asarray(said.label_ids))
        ),
        selects="perplexity" if causal else "accuracy",
        device="cpu",
        precision="no",
        world_size=1,
        seed=0,
        versions={},
        length_grouped=length_grouped,
    )


def of_first_step(training: Trainer) -> dict[str, torch.Tensor]:
    """The gradient of the first step, before it is taken."""
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


@pytest.mark.parametrize("name", ADAPTED)
def test_parts_of_a_step_have_its_gradient_and_its_loss(name: str, tmp_path: Path) -> None:
    one, several = (trainer(name, tmp_path / str(parts), parts) for parts in (1, 4))
    expected, found = of_first_step(one), of_first_step(several)
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


@pytest.mark.parametrize("length_grouped", [False, True])
def test_every_step_of_every_epoch_has_the_rows_it_had(length_grouped: bool, tmp_path: Path) -> None:
    seen = []
    for parts in (1, 4):
        training = trainer("tiny_bert", tmp_path / str(parts), parts, length_grouped=length_grouped)
        seen.append([])
        training.model.register_forward_pre_hook(
            lambda module, args, kwargs: seen[-1].extend(kwargs["input_ids"].tolist()) if module.training else None,
            with_kwargs=True,
        )
        assert training.train().global_step == 2 * (ROWS // BATCH)
    assert len(seen[0]) == 2 * (ROWS // BATCH) * BATCH
    assert seen[0] == seen[1]


@pytest.mark.parametrize(("given", "said"), [({"batch_size": 6}, "multiple of"), ({"batch_size": 64}, "at most 44")])
def test_a_batch_that_does_not_divide_into_parts_is_refused(given: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(PartialLoraError, match=rf"trainer\.batch_size=.*{said}.*gradient_accumulation_steps=4"):
        trainer("tiny_vit", tmp_path, 4, **given)
