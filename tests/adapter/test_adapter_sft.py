"""TRL's SFTTrainer trains, saves and resumes masked adapters given to it as `peft_config`, as it does LoRA's."""

from __future__ import annotations

import pytest
import torch
from adapter_models import LLAMA_TARGETS, llama, logits
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

from partial_lora import PartialLoraConfig
from partial_lora.adapter import module_masks, trainable_parameters

trl = pytest.importorskip("trl", reason="trl is not installed")

SPARSITY = {"q_proj": {"rows": 0.9, "columns": 0.5}, "v_proj": 0.8, "down_proj": {"rows": 0.3, "columns": 0.8}}
WORDS = ["<pad>", "</s>", "<unk>", "a", "b", "c", "d", "e", "f"]


def tokenizer():
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def trainer(folder, seed=1, callbacks=()):
    """Twelve prompts with their completions; the loss is on the completions alone."""
    settings = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.1, "target_modules": LLAMA_TARGETS}
    config = PartialLoraConfig(sparsity=SPARSITY, task_type="CAUSAL_LM", **settings)
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


class StopAfterOneEpoch(TrainerCallback):
    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


def trained(model):
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def test_sft_trains_what_masks_keep_resumes_to_the_last_bit_and_saves_an_ordinary_adapter(tmp_path):
    whole = trainer(tmp_path / "whole")
    before = trained(whole.model)
    assert sum(value.numel() for value in before.values()) == trainable_parameters(whole.model)
    whole.train()
    after = trained(whole.model)
    assert all(not torch.equal(value, before[name]) for name, value in after.items())

    trainer(tmp_path / "parts", callbacks=[StopAfterOneEpoch()]).train()
    resumed = trainer(tmp_path / "parts", seed=9)  # whatever A was drawn as, the checkpoint decides
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step
    assert all(torch.equal(value, after[name]) for name, value in trained(resumed.model).items())

    whole.save_model(tmp_path / "saved")
    batch = {"input_ids": torch.tensor([[3, 4, 5, 6]])}
    dense = PeftModel.from_pretrained(llama(), tmp_path / "saved")
    config = PartialLoraConfig.from_pretrained(tmp_path / "saved")
    masked = PeftModel.from_pretrained(llama(), tmp_path / "saved", config=config)
    assert type(dense.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(logits(dense, batch), logits(whole.model, batch), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(masked, batch), logits(whole.model, batch))
    assert module_masks(masked) == module_masks(whole.model)
