"""Transformers' Trainer and TRL's SFTTrainer save, resume and pick the best of masked adapters."""

from __future__ import annotations

import pytest
import torch
from adapter_models import (
    LLAMA_TARGETS,
    MIXED,
    VIT_TARGETS,
    adapt,
    images,
    layers,
    llama,
    logits,
    trainable_parameters,
    vit,
)
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from partial_lora.adapter import PartialLoraConfig, module_masks
from partial_lora.errors import PartialLoraError


def arguments(folder, **settings):
    return TrainingArguments(
        str(folder),
        per_device_train_batch_size=8,
        learning_rate=0.02,
        num_train_epochs=3,
        seed=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        **{"eval_strategy": "epoch", "save_strategy": "epoch", **settings},
    )


class StopAfter(TrainerCallback):
    """Ends training after a number of epochs, without touching the schedule."""

    def __init__(self, epochs):
        self.epochs = epochs

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.epoch >= self.epochs


def train(folder, model, resume=None, callbacks=(), **settings):
    batch = images(count=24)
    rows = [{"pixel_values": p, "labels": y} for p, y in zip(batch["pixel_values"], batch["labels"], strict=True)]
    trainer = Trainer(
        model, arguments(folder, **settings), train_dataset=rows, eval_dataset=rows[:8], callbacks=list(callbacks)
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_trainer_loads_the_best_model_at_the_end(tmp_path):
    model = adapt(sparsity=MIXED)
    trainer = train(tmp_path, model, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True)
    best = trainer.state.best_model_checkpoint
    last = sorted(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))[-1]
    assert best != str(last)  # the worst counts as best here, so that loading it makes a difference
    assert (tmp_path / last / "partial_lora.json").is_file()
    again = PeftModel.from_pretrained(vit(), best, config=PartialLoraConfig.from_pretrained(best), is_trainable=True)
    expected = state(again)
    assert all(torch.equal(value, expected[name]) for name, value in state(model).items())
    assert module_masks(model) == module_masks(again)
    assert len(layers(model)) == len(VIT_TARGETS)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"sparsity": 0.87}, {"sparsity": 0.5}),  # the smaller mask lies in the larger one, so that its values fit
        ({"sparsity": 0.87}, {"sparsity": 0.0}),
        ({"sparsity": 0.87, "columns": "frozen"}, {"sparsity": 0.5, "columns": "frozen"}),
        ({"sparsity": 0.5}, {"sparsity": 0.87}),
        ({"sparsity": 0.5}, {"sparsity": 0.5, "mask_seed": 1}),
        ({"sparsity": 0.5}, {"sparsity": 0.5, "target_modules": VIT_TARGETS[:2]}),
        ({}, {"sparsity": 0.5}),
    ],
)
def test_a_checkpoint_of_other_masks_is_refused_before_anything_is_loaded(tmp_path, before, after):
    train(tmp_path, adapt(**before), callbacks=[StopAfter(1)])
    model = adapt(**after)
    expected = state(model)
    with pytest.raises(PartialLoraError, match=r"mask|no target module"):
        train(tmp_path, model, resume=True)
    assert all(torch.equal(value, expected[name]) for name, value in state(model).items())


SPARSITY = {"q_proj": {"rows": 0.9, "columns": 0.5}, "v_proj": 0.8, "down_proj": {"rows": 0.3, "columns": 0.8}}
WORDS = ["<pad>", "</s>", "<unk>", "a", "b", "c", "d", "e", "f"]


def tokenizer():
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def sft_trainer(folder, seed=1, callbacks=(), sparsity=SPARSITY):
    """TRL's trainer of twelve prompts and their completions; the loss is on the completions alone."""
    import trl  # two seconds

    settings = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.1, "target_modules": LLAMA_TARGETS}
    config = PartialLoraConfig(sparsity=sparsity, task_type="CAUSAL_LM", **settings)
    rows = [{"prompt": f"{first} {second}", "completion": f" {second} {first}"} for first in "abc" for second in "cdef"]
    arguments = trl.SFTConfig(
        str(folder),
        per_device_train_batch_size=4,
        num_train_epochs=2,
        learning_rate=0.02,
        save_strategy="epoch",
        seed=1,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
    )
    base = llama()
    torch.manual_seed(seed)  # of A
    return trl.SFTTrainer(
        base,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=config,
        callbacks=list(callbacks),
    )


def test_sft_trains_what_masks_keep_resumes_and_saves_an_ordinary_adapter(tmp_path):
    whole = sft_trainer(tmp_path / "whole")
    before = state(whole.model)
    assert sum(value.numel() for value in before.values()) == trainable_parameters(whole.model)
    whole.train()
    after = state(whole.model)
    assert all(not torch.equal(value, before[name]) for name, value in after.items())

    sft_trainer(tmp_path / "parts", callbacks=[StopAfter(1)]).train()
    with pytest.raises(PartialLoraError, match="mask"):
        sft_trainer(tmp_path / "parts", sparsity=0.25).train(resume_from_checkpoint=True)
    resumed = sft_trainer(tmp_path / "parts", seed=9)  # whatever A was drawn as, the checkpoint decides
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step
    for name, value in state(resumed.model).items():  # a checkpoint is an ordinary file, in which B is rounded
        torch.testing.assert_close(value, after[name], atol=1e-5, rtol=1e-5)

    whole.save_model(tmp_path / "saved")
    batch = {"input_ids": torch.tensor([[3, 4, 5, 6]])}
    dense = PeftModel.from_pretrained(llama(), tmp_path / "saved")
    config = PartialLoraConfig.from_pretrained(tmp_path / "saved")
    masked = PeftModel.from_pretrained(llama(), tmp_path / "saved", config=config)
    assert type(dense.peft_config["default"]) is LoraConfig
    for each in (dense, masked):
        torch.testing.assert_close(logits(each, batch), logits(whole.model, batch), rtol=1e-5, atol=1e-5)
    assert module_masks(masked) == module_masks(whole.model)
