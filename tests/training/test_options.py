"""Likelihoods of options: those of a loop over tokens, and the two accuracies made of them."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from tiny_causal import llama, merging_tokenizer
from transformers import Trainer, TrainingArguments

from partial_lora import tasks
from partial_lora.calibration.score import OptionLikelihood
from partial_lora.tasks import questions
from partial_lora.training.metrics import log_likelihoods, option_metrics, option_predictions

PROMPTS = ["Question: which of these is a bird?\nAnswer:", "the man", "two and two is", "the end\nthe start"]
OPTIONS = [
    [" the robin", " snow", " a bird, and four"],
    [" writes", " drives on"],
    [" four", " two"],
    [" of it", " is"],
]
LABELS = [0, 0, 1, 1]


def rows() -> datasets.Dataset:
    prompts = [[prompt] * len(options) for prompt, options in zip(PROMPTS, OPTIONS, strict=True)]
    data = {"prompts": prompts, "options": OPTIONS, "label": LABELS}
    return datasets.Dataset.from_dict(data, features=questions.CHOICE_FEATURES)


@torch.no_grad()
def literal(model, row: dict) -> float:
    """The log probability of an option: token after token, one sequence, no padding."""
    total = 0.0
    for place in range(row["answer_start"], row["length"]):
        logits = model(input_ids=torch.tensor([row["input_ids"][:place]])).logits[0, -1]
        total += float(logits.double().log_softmax(0)[row["input_ids"][place]])
    return total


@pytest.fixture(scope="module")
def scored() -> tuple:
    tokenizer = merging_tokenizer()
    transform, model = tasks.CausalTransform(tokenizer, 64, kind="choice"), llama(tokenizer, seed=2)
    options = transform.options(rows(), cache_bytes=0)
    return model, transform, options, np.array([literal(model, row) for row in options])


def test_likelihoods_are_those_of_a_loop_over_tokens(scored) -> None:
    model, transform, options, expected = scored
    batch = transform.collate(options.to_list())
    assert len(set(options["length"])) > 2  # so there is padding
    with torch.no_grad():
        logits = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
    found = log_likelihoods(logits, batch["labels"])
    assert found.shape == (len(options), 2)
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-4)
    assert found[:, 1].tolist() == [row["length"] - row["answer_start"] for row in options]
    assert torch.equal(log_likelihoods((logits, "cache"), batch["labels"]), found)


def test_a_trainer_keeps_two_numbers_an_option(scored, tmp_path) -> None:
    model, transform, options, expected = scored
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        per_device_eval_batch_size=4,
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=transform.collate,
        preprocess_logits_for_metrics=log_likelihoods,
    )
    said = trainer.predict(options).predictions
    assert said.shape == (len(options), 2)
    np.testing.assert_allclose(said[:, 0], expected, rtol=1e-4)


def test_accuracies_are_those_of_a_loop_over_questions(scored) -> None:
    *_, options, likelihoods = scored
    columns = [np.asarray(options[name]) for name in ("item", "right", "characters")]
    at, hits, normed, said = 0, [], [], option_predictions(likelihoods, *columns)
    for number, (texts, label) in enumerate(zip(OPTIONS, LABELS, strict=True)):
        sums = likelihoods[at : at + len(texts)]
        a_character = [value / len(text[1:]) for value, text in zip(sums, texts, strict=True)]
        hits.append(max(range(len(texts)), key=lambda place: sums[place]) == label)
        normed.append(max(range(len(texts)), key=lambda place: a_character[place]) == label)
        assert said["label"][number] == label
        np.testing.assert_allclose(said["scores"][number], np.exp(sums) / np.exp(sums).sum())
        at += len(texts)
    assert np.mean(hits) != np.mean(normed)
    assert said["prediction"] == [int(np.argmax(likelihoods[columns[0] == item])) for item in range(len(OPTIONS))]
    assert option_metrics(said) == {"accuracy": np.mean(hits), "accuracy_norm": np.mean(normed)}


def test_calibration_counts_the_same_questions(scored) -> None:
    model, transform, options, likelihoods = scored
    rubric, right = OptionLikelihood(), 0.0
    for batch in transform.batches(rows(), 4):
        with torch.no_grad():
            logits = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
        right += float(rubric.values(logits, batch).sum())
    columns = [np.asarray(options[name]) for name in ("item", "right", "characters")]
    assert right / len(LABELS) == option_metrics(option_predictions(likelihoods, *columns))["accuracy"]


def test_of_equally_likely_options_the_first_counts_and_length_is_in_characters() -> None:
    items, right = np.array([0, 0, 1, 1]), np.array([True, False, False, True])
    likelihoods, characters = np.array([-4.0, -4.0, -4.0, -6.0]), np.array([4, 4, 2, 6])
    columns = option_predictions(likelihoods, items, right, characters)
    assert option_metrics(columns) == {"accuracy": 0.5, "accuracy_norm": 1.0}
