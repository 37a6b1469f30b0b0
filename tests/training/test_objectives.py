"""Objectives of options and texts, against one sequence at a time without padding, and losses of parts of a step."""

from __future__ import annotations

import math
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from judged_tasks import TOKENIZER, choices, exchanges, literal, trained
from tiny_causal import llama, merging_tokenizer
from torch import nn
from transformers import EvalPrediction

from partial_lora.calibration.peers import Alone
from partial_lora.tasks import CausalTransform, ChoiceTransform, Task
from partial_lora.tasks.config import TaskConfig
from partial_lora.tasks.questions import format_completions
from partial_lora.training import objectives

pytestmark = pytest.mark.usefixtures("cache")


def task(kind: str, metrics: tuple[str, ...]) -> Task:
    rows = {"choice": choices, "generation": exchanges}[kind]
    splits = {"train": rows(12, 0), "validation": rows(7, 50), "test": rows(5, 80)}
    return Task(name="mine", modality="text", labels=(), metrics=metrics, kind=kind, **splits)


def test_the_most_likely_option_is_the_prediction_and_selects(tmp_path: Path) -> None:
    chosen = task("choice", ("accuracy", "accuracy_norm"))
    judge = objectives.judge_of(chosen, ChoiceTransform(TOKENIZER, 64), TaskConfig(), Alone(), batch_size=2)
    trainer = trained(judge, tmp_path / "run")
    model = trainer.model.eval()
    for split in ("validation", "test"):
        found = judge.judged(objectives.predicts(trainer), model, split)
        right, normed, told, tokens = [], [], 0.0, 0
        for row in getattr(chosen, split):
            said = [literal(model, *pair) for pair in zip(row["prompts"], row["options"], strict=True)]
            sums = np.array([total for total, _ in said])
            lengths = np.array([len(option.strip()) for option in row["options"]])
            right.append(sums.argmax() == row["label"])
            normed.append((sums / lengths).argmax() == row["label"])
            told, tokens = told + said[row["label"]][0], tokens + said[row["label"]][1]
        assert found.metrics["primary"] == judge.selects == "accuracy"
        assert found.metrics["accuracy"] == pytest.approx(np.mean(right))
        assert found.metrics["accuracy_norm"] == pytest.approx(np.mean(normed))
        assert found.metrics["loss"] == pytest.approx(-told / tokens, rel=1e-4)
        assert (found.predictions["prediction"] == found.predictions["label"]).tolist() == right
    selected = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert max(selected) == judge.judged(objectives.predicts(trainer), model, "validation").metrics["accuracy"]


def test_options_of_validation_are_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    transform = ChoiceTransform(TOKENIZER, 64)
    judge = objectives.judge_of(task("choice", ("accuracy",)), transform, TaskConfig(), Alone(), batch_size=2)
    outputs = EvalPrediction(np.zeros((len(judge.validation()), 2)), None)
    first = judge.measure(outputs)
    monkeypatch.setattr(ChoiceTransform, "options", None)
    assert judge.measure(outputs) == first


def test_texts_are_selected_by_perplexity_and_reported_by_generation(tmp_path: Path) -> None:
    chosen = task("generation", ("rouge_l", "exact_match"))
    config = TaskConfig(max_new_tokens=8)
    judge = objectives.judge_of(chosen, CausalTransform(TOKENIZER, 64), config, Alone(), batch_size=2)
    trainer = trained(judge, tmp_path / "run")
    predict = objectives.predicts(trainer)
    validation, test = (judge.judged(predict, trainer.model, split) for split in ("validation", "test"))
    told = [literal(trainer.model.eval(), row["prompt"], f" {row['response']}", ends=True) for row in chosen.validation]
    perplexity = math.exp(-sum(total for total, _ in told) / sum(count for _, count in told))
    assert validation.metrics == {
        "primary": "perplexity",
        "perplexity": pytest.approx(perplexity, rel=1e-4),
        "loss": pytest.approx(math.log(perplexity), rel=1e-4),
    }
    logged = [entry["eval_perplexity"] for entry in trainer.state.log_history if "eval_perplexity" in entry]
    assert min(logged) == pytest.approx(perplexity, rel=1e-6)  # the smallest one is what was selected
    assert test.metrics["primary"] == "rouge_l"
    assert test.metrics["rouge_l"] == pytest.approx(test.predictions["rouge_l"].mean())
    assert test.predictions["label"].tolist() == list(chosen.test["response"])
    losses, tokens = test.predictions["loss"], test.predictions["tokens"]
    assert (losses * tokens).sum() / tokens.sum() == pytest.approx(test.metrics["loss"], rel=1e-4)
    for prompt, written in zip(chosen.test["prompt"], test.predictions["prediction"], strict=True):
        alone = judge.transform.encode([prompt])
        tokens = trainer.model.generate(**alone, max_new_tokens=8, do_sample=False)[0, alone["input_ids"].shape[1] :]
        assert TOKENIZER.decode(tokens, skip_special_tokens=True).strip() == written


def test_no_text_is_generated_where_no_metric_is_of_texts() -> None:
    chosen, config = (
        task("generation", ("perplexity",)),
        TaskConfig("mine", "files", modality="text", kind="generation"),
    )
    judge = objectives.judge_of(chosen, CausalTransform(TOKENIZER, 64), config, Alone(), batch_size=2)
    told = judge.judged(lambda rows: (np.array([[-1.0, 2.0]] * len(rows)), np.zeros(len(rows))), nn.Module(), "test")
    loss = pytest.approx(0.5)
    assert told.metrics == {"primary": "perplexity", "perplexity": pytest.approx(math.exp(0.5)), "loss": loss}
    assert list(told.predictions) == ["index", "label", "loss", "tokens"]
    assert told.predictions["loss"].tolist() == [0.5] * len(chosen.test)


def test_an_answer_too_long_to_train_on_is_dropped_from_training_alone() -> None:
    rows = datasets.Dataset.from_dict({"prompt": ["one", "two"], "response": ["a bird", "a bird " * 20]})
    splits = dict.fromkeys(("train", "validation", "test"), rows)
    chosen = Task(name="own", modality="text", labels=(), metrics=("perplexity",), kind="generation", **splits)
    transform = CausalTransform(TOKENIZER, 16, too_long="drop")
    judge = objectives.judge_of(chosen, transform, TaskConfig(), Alone(), batch_size=2)
    told = judge.judged(lambda rows: (np.array([[-1.0, 2.0]] * len(rows)), np.zeros(len(rows))), nn.Module(), "test")
    assert told.predictions["label"].tolist() == list(rows["response"])
    assert (len(judge.train()), len(judge.validation())) == (1, 2)


def test_of_a_conversation_the_last_answer_is_generated_after_all_before_it() -> None:
    tokenizer = merging_tokenizer(chat=True)
    messages = [{"role": role, "content": text} for role in ("user", "assistant") for text in ("what is two?", "two")]
    chats = [[messages[0], messages[2], messages[1], messages[3]], messages[::3]]
    rows = datasets.Dataset.from_dict({"messages": chats})
    config = TaskConfig("own", "files", modality="text", kind="generation", max_new_tokens=6, cache_bytes=0)
    rows = format_completions({"train": rows}, config)["train"]
    splits = dict.fromkeys(("train", "validation", "test"), rows)
    chosen = Task(name="own", modality="text", labels=(), metrics=("rouge_l",), kind="generation", **splits)
    judge = objectives.judge_of(chosen, CausalTransform(tokenizer, 64, chat=True), config, Alone(), batch_size=2)
    model = llama(tokenizer)
    told = judge.judged(lambda rows: (np.array([[-1.0, 2.0]] * len(rows)), np.zeros(len(rows))), model, "test")
    for chat, written in zip(chats, told.predictions["prediction"], strict=True):
        asked = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, return_tensors="pt")
        tokens = model.generate(**asked, max_new_tokens=6, do_sample=False)[0, asked["input_ids"].shape[1] :]
        assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == written
    assert told.predictions["label"].tolist() == [chat[-1]["content"] for chat in chats]


class Two:
    """One of two processes; the other one's share is computed by whoever asks."""

    def __init__(self, rank: int, shares: dict) -> None:
        self.rank, self.size, self._shares = rank, 2, shares

    def gather(self, value):
        self._shares[self.rank] = value
        return [self._shares.get(0, []), self._shares.get(1, [])]


def test_processes_share_prompts_and_put_the_texts_back_in_order() -> None:
    chosen = task("generation", ("rouge_l",))
    model, prompts = llama(TOKENIZER), list(chosen.test["prompt"])
    config = TaskConfig(max_new_tokens=8)

    def written(peers) -> list[str]:
        judge = objectives.judge_of(chosen, CausalTransform(TOKENIZER, 64), config, peers, batch_size=2)
        return judge._generate(model, prompts)

    shares: dict = {}
    with pytest.raises(IndexError):  # the other share is not there yet
        written(Two(1, shares))
    assert written(Two(0, shares)) == written(Alone())
    assert len(set(written(Alone()))) > 1


def test_the_loss_of_tokens_is_a_mean_over_the_answers_however_a_step_is_cut() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(4, 6, 9, generator=generator), torch.randint(0, 9, (4, 6), generator=generator)
    labels[:, :3] = -100
    labels[1, 4:] = -100
    asked = int((labels[:, 1:] != -100).sum())

    class Output:
        def __init__(self, part: torch.Tensor) -> None:
            self.logits = part

    terms = [
        torch.nn.functional.cross_entropy(logits[row, place - 1], labels[row, place])
        for row in range(4)
        for place in range(1, 6)
        if labels[row, place] != -100
    ]
    literal_mean = torch.stack(terms).mean()
    parts = [
        objectives.loss_of_tokens(Output(logits[part]), labels[part], asked) for part in (slice(0, 1), slice(1, 4))
    ]
    assert torch.allclose(sum(parts), literal_mean)
    assert torch.allclose(objectives.loss_of_tokens(Output(logits), labels), literal_mean)


def rows_of_lengths(lengths: list[int], **columns: list) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"place": list(range(len(lengths))), "length": lengths} | columns)


def test_texts_of_like_length_are_predicted_together_and_come_back_in_their_order() -> None:
    seen = []

    def predict(rows: datasets.Dataset) -> tuple[np.ndarray, np.ndarray]:
        seen.append(list(rows["length"]))
        return np.stack([rows["place"], rows["length"]], axis=1), np.asarray(rows["place"])

    rows = rows_of_lengths([3, 9, 1, 9, 4])
    logits, labels = objectives.grouped(predict)(rows)
    assert seen == [[9, 9, 4, 3, 1]]
    assert logits[:, 0].tolist() == labels.tolist() == rows["place"]
    assert logits[:, 1].tolist() == rows["length"]
    unlabelled = objectives.grouped(lambda rows: (predict(rows)[0], np.empty(0)))
    assert unlabelled(rows)[0][:, 0].tolist() == rows["place"]
    images = rows.remove_columns("length")
    assert objectives.by_length(images)["place"] == rows["place"]


def test_the_options_of_a_question_stay_together_and_in_their_order() -> None:
    rows = rows_of_lengths([5, 2, 3, 3, 8, 1], item=[0, 0, 1, 1, 2, 2])
    assert objectives.by_length(rows)["place"] == [4, 5, 0, 1, 2, 3]
