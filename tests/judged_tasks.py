"""Questions and exchanges, a tiny causal model trained on them, and likelihoods without a batch."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_causal import llama, merging_tokenizer

from partial_lora.training import objectives
from partial_lora.training.config import TrainerConfig
from partial_lora.training.distributed import World
from partial_lora.training.trainer import Computation, ResumableTrainer, build_trainer

TOKENIZER = merging_tokenizer()


def choices(count: int, first: int) -> Dataset:
    """Questions with two or three options of unlike lengths, the right one at a place that moves."""
    rows = []
    for number in range(first, first + count):
        options = [f" {number} is a bird", " the robin", " four and four"][: 2 + number % 2]
        prompt = f"Question: what is {number}? Answer:"
        rows.append({"prompts": [prompt] * len(options), "options": options, "label": number % len(options)})
    return Dataset.from_list(rows)


def exchanges(count: int, first: int) -> Dataset:
    numbers = range(first, first + count)
    return Dataset.from_dict(
        {"prompt": [f"what is {n}?" for n in numbers], "response": [f"{n} is a bird" for n in numbers]}
    )


def trained(judge: objectives.Judge, directory: Path, **changes: object) -> ResumableTrainer:
    model = get_peft_model(llama(TOKENIZER), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    trainer = build_trainer(
        model,
        TrainerConfig(
            **{"epochs": 2.0, "batch_size": 4, "eval_batch_size": 3, "learning_rate": 1e-2} | changes,
            weight_decay=0.0,
            warmup_ratio=0.0,
        ),
        Computation(World("cpu"), directory, "no", 0, {}),
        rows={"train": judge.train(), "validation": judge.validation()},
        transform=judge.transform,
        judge=judge,
    )
    trainer.train()
    return trainer


@torch.no_grad()
def literal(model, prompt: str, answer: str, ends: bool = False) -> tuple[float, int]:
    """The log likelihood of an answer after a prompt, token by token, and the number of its tokens."""
    context = TOKENIZER(prompt)["input_ids"]
    whole = TOKENIZER(prompt + answer)["input_ids"] + ([TOKENIZER.eos_token_id] if ends else [])
    chances = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    places = range(len(context), len(whole))
    return sum(float(chances[place - 1, whole[place]]) for place in places), len(places)
