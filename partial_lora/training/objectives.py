"""Objectives: the loss, the validation and the report of each kind of task - classes, options, texts, mixtures.

A judge gives Trainer its rows, its loss and its metrics of validation, and judges a split once training is over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol

import numpy as np
import pandas
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import EvalPrediction, Trainer

from partial_lora import progress
from partial_lora.calibration.peers import Peers
from partial_lora.errors import PartialLoraError
from partial_lora.tasks import Joined, Mixture, Task
from partial_lora.tasks.config import TaskConfig
from partial_lora.tasks.kinds import kind_of
from partial_lora.tasks.metrics import IGNORED, LOWER_IS_BETTER, OF_TEXTS
from partial_lora.tasks.mixture import starts, within
from partial_lora.tasks.prompt_inputs import Prompt
from partial_lora.tasks.task import Transform
from partial_lora.training import offline_metrics
from partial_lora.training.fsdp import is_sharded_model
from partial_lora.training.generation import generate

AVERAGE = "average"  # of the members' main metrics

# Losses: sums over the examples, or tokens, of a whole optimizer step, divided by their number.


def loss_of_batch(
    outputs, labels: Tensor, num_items_in_batch: int | Tensor | None = None, sizes: Sequence[int] = ()
) -> Tensor:
    """Return the cross entropy of classes, or squared error of real labels, of a batch (N, outputs); labels (N,).

    num_items_in_batch: the number of examples of the whole step, over all processes; None stands for this batch's.
    sizes: the numbers of classes of several tasks; each row's loss is over the outputs of its own (`mixture.within`).
    """
    logits = outputs.logits.float()
    if labels.is_floating_point():
        total = F.mse_loss(logits.view(labels.shape), labels.float(), reduction="sum")
    else:
        total = F.cross_entropy(within(logits, labels, sizes) if sizes else logits, labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def loss_of_tokens(outputs, labels: Tensor, num_items_in_batch: int | Tensor | None = None) -> Tensor:
    """Return the cross entropy of the answers' tokens, each given those before it; labels (N, L), -100 elsewhere.

    num_items_in_batch: the number of such tokens in the whole step; None stands for this batch's. Only the logits of
    answers are made float32: prompts are longer.
    """
    following = labels[:, 1:]
    is_answer = following != IGNORED
    total = F.cross_entropy(outputs.logits[:, :-1][is_answer].float(), following[is_answer], reduction="sum")
    return total / (is_answer.sum() if num_items_in_batch is None else num_items_in_batch)


# Judges.

# From rows to a model's logits, in order, or what `Judge.reduce` makes of the logits; and to the rows' labels.
Predict = Callable[[Dataset], tuple[np.ndarray, np.ndarray]]


def by_length(rows: Dataset) -> Dataset:
    """Return texts with those of like length in a row, the longest first, so that batches need little padding.

    The options of a question stay together and in their order. Images stay as they are.
    """
    return rows if (order := _longest_first(rows)) is None else rows.select(order)


def grouped(predict: Predict) -> Predict:
    """Return `predict` for rows in any order: it sees texts of like length together, and its outputs are put back.

    Labels that `predict` leaves out, as an empty array, stay left out.
    """

    def in_order(rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
        if (order := _longest_first(rows)) is None:
            return predict(rows)
        logits, labels = predict(rows.select(order))
        back = np.argsort(order)
        return logits[back], labels[back] if len(labels) else labels

    return in_order


def _longest_first(rows: Dataset) -> np.ndarray | None:
    """Return the order of `by_length`; None for images."""
    if "length" not in rows.column_names:
        return None
    lengths = np.asarray(rows["length"])
    if "item" in rows.column_names:  # the longest option stands for its question
        lengths = pandas.Series(lengths).groupby(np.asarray(rows["item"])).transform("max").to_numpy()
    return np.argsort(-lengths, kind="stable")


@dataclass(frozen=True)
class Judged:
    """Metrics of a split by name, `primary` naming the main one, and the predictions, one row an example."""

    metrics: dict
    predictions: pandas.DataFrame


class Judge(Protocol):
    """Rows, loss and metrics of a task. selects: what of `measure` selects a checkpoint. reduce: shrinks the logits."""

    selects: str
    loss: Callable[..., Tensor]
    reduce: Callable[[Tensor, Tensor], Tensor] | None

    def train(self) -> Dataset: ...

    def validation(self) -> Dataset: ...

    def test(self) -> Dataset: ...

    def measure(self, outputs: EvalPrediction) -> dict[str, float]: ...

    def judged(self, predict: Predict, model: nn.Module, split: str) -> Judged: ...


@dataclass
class _TaskJudge:
    """The rows of one task, prepared by its transform. batch_size: of texts that are generated together."""

    task: Task
    transform: Transform
    config: TaskConfig
    peers: Peers
    batch_size: int

    @property
    def selects(self) -> str:
        return kind_of(self.task).selects or self.task.metrics[0]

    def train(self) -> Dataset:
        return self.transform.prepare(self.task.train, cache_bytes=self.config.cache_bytes)

    def validation(self) -> Dataset:
        return by_length(self._rows("validation"))

    def test(self) -> Dataset:
        return self._rows("test")

    def _rows(self, split: str) -> Dataset:
        return self.transform.prepare(getattr(self.task, split), cache_bytes=self.config.cache_bytes)


class ByLabels(_TaskJudge):
    """Classes or real numbers, predicted by the logits of an example."""

    loss = staticmethod(loss_of_batch)
    reduce = None

    def measure(self, outputs: EvalPrediction) -> dict[str, float]:
        """Return the metrics and the loss over all examples: Trainer's own loss is of one process's batches."""
        logits, references = outputs.predictions, np.asarray(outputs.label_ids)
        loss = offline_metrics.mean_loss(logits, references)
        return offline_metrics.metrics_of(self.task.metrics, logits, references) | {"loss": loss}

    def judged(self, predict: Predict, model: nn.Module, split: str) -> Judged:
        logits, references = predict(self._rows(split))
        values = self.measure(EvalPrediction(logits, references))
        frame = offline_metrics.predictions_of(logits, references, self.task.labels)
        return Judged({"primary": self.task.metrics[0], **values}, frame)


class ByOptions(_TaskJudge):
    """Multiple choice: trained on the right option alone, judged by the most likely of all."""

    loss = staticmethod(loss_of_tokens)
    reduce = staticmethod(offline_metrics.log_likelihoods)

    def measure(self, outputs: EvalPrediction) -> dict[str, float]:
        columns = offline_metrics.option_predictions(outputs.predictions[:, 0], *self._of_validation)
        return offline_metrics.option_metrics(columns)

    def judged(self, predict: Predict, model: nn.Module, split: str) -> Judged:
        rows = self._rows(split)
        (likelihoods, tokens), (items, right, characters) = predict(rows)[0].T, _option_columns(rows)
        loss = -likelihoods[right].sum() / tokens[right].sum()  # a mean over tokens of right options, as in training
        columns = offline_metrics.option_predictions(likelihoods, items, right, characters)
        frame = pandas.DataFrame(columns)
        frame.insert(0, "index", np.arange(len(frame)))
        frame["score"] = [max(scores) for scores in frame["scores"]]
        values = offline_metrics.option_metrics(columns)
        chosen = {name: values[name] for name in self.task.metrics}
        return Judged({"primary": self.task.metrics[0], **chosen, "loss": float(loss)}, frame)

    @cached_property
    def _of_validation(self) -> tuple[np.ndarray, ...]:
        return _option_columns(self.validation())

    def _rows(self, split: str) -> Dataset:
        return self.transform.options(getattr(self.task, split), cache_bytes=self.config.cache_bytes)


class ByTexts(_TaskJudge):
    """Generation: selected by the perplexity of the responses, reported by the texts that the model generates.

    No text is generated where the task's metrics are of none.
    """

    loss = staticmethod(loss_of_tokens)
    reduce = staticmethod(offline_metrics.log_likelihoods)

    def measure(self, outputs: EvalPrediction) -> dict[str, float]:
        """Return the perplexity and the loss over all tokens: Trainer's own loss depends on the batches."""
        likelihoods, tokens = outputs.predictions.T
        perplexity = float(np.exp(-likelihoods.sum() / tokens.sum()))
        return {"perplexity": perplexity, "loss": float(np.log(perplexity))}

    def judged(self, predict: Predict, model: nn.Module, split: str) -> Judged:
        """Judge by the likelihood of the responses and, on test alone, by generated texts."""
        likelihoods, labels = predict(self._rows(split))
        values = self.measure(EvalPrediction(likelihoods, labels))
        if split != "test":
            return Judged({"primary": self.selects, **values}, pandas.DataFrame())
        rows = getattr(self.task, split)
        total, tokens = likelihoods.T
        references, columns = list(rows["response"]), {"loss": -total / tokens, "tokens": tokens}
        if OF_TEXTS.keys() & set(self.task.metrics):
            prompts = list(rows["prompt"])
            if "messages" in rows.column_names:
                prompts = [messages[:-1] for messages in rows["messages"]]
            texts = self._generate(model, prompts)
            scores = {name: score(texts, references, self.config.answer) for name, score in OF_TEXTS.items()}
            columns |= {"prediction": texts, **scores}
        frame = pandas.DataFrame({"index": np.arange(len(rows)), "label": references, **columns})
        means = {name: float(columns[name].mean()) for name in self.task.metrics if name in columns}
        return Judged({"primary": self.task.metrics[0], **values, **means}, frame)

    def _generate(self, model: nn.Module, prompts: Sequence[Prompt]) -> list[str]:
        """Generate a text after every prompt; several processes share the prompts.

        Processes with a sharded model must each generate the same number of texts: a surplus one is dropped.
        """
        together = is_sharded_model(model)
        assigned = list(prompts[self.peers.rank :: self.peers.size])
        if together and len(assigned) < -(-len(prompts) // self.peers.size):
            assigned.append(prompts[0])
        texts = generate(
            model,
            self.transform,
            assigned,
            progress=lambda done, total: progress.emit("generate", done, total),
            together=together,
            stop=self.config.stop,
            max_new_tokens=self.config.max_new_tokens,
            batch_size=self.batch_size,
        )
        shares = self.peers.gather(texts)
        return [shares[place % self.peers.size][place // self.peers.size] for place in range(len(prompts))]

    def _rows(self, split: str) -> Dataset:
        return self.transform.to_judge(getattr(self.task, split), cache_bytes=self.config.cache_bytes)


JUDGES = {"label": ByLabels, "option": ByOptions, "text": ByTexts}  # by the form of the answers (`kinds.Kind`)


def judge_of(task: Task, transform: Transform, config: TaskConfig, peers: Peers, *, batch_size: int) -> Judge:
    """Return the judge of one task. batch_size: of texts that are generated together."""
    return JUDGES[kind_of(task).answers](task, transform, config, peers, batch_size)


def predicts(trainer: Trainer) -> Predict:
    """Return a function that predicts any rows by a trainer's model; all of its processes call it."""

    def predict(rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
        measure, trainer.compute_metrics = trainer.compute_metrics, None  # it measures the validation rows alone
        try:
            output = trainer.predict(rows)
        finally:
            trainer.compute_metrics = measure
        return output.predictions, np.asarray(output.label_ids)

    return grouped(predict)


def _option_columns(rows: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return tuple(np.asarray(rows[name]) for name in ("item", "right", "characters"))


class ByMembers:
    """A mixture: each member by its own judge, on its own rows and outputs.

    Metrics are MEMBER/METRIC, and the average of the members' main metrics, which selects a checkpoint. sizes: the
    number of classes of each member; empty where members have no outputs of their own.
    """

    def __init__(self, names: Sequence[str], judges: Sequence[Judge], sizes: Sequence[int]) -> None:
        self._names, self._judges, self._sizes = list(names), list(judges), sizes
        self._starts = starts(sizes, len(judges))
        self.selects = _average_name([judge.selects for judge in judges])
        self.loss: Callable[..., Tensor] = partial(loss_of_batch, sizes=sizes) if sizes else judges[0].loss
        self.reduce = judges[0].reduce

    def train(self) -> Joined:
        return Joined([judge.train() for judge in self._judges], self._starts)

    def validation(self) -> Joined:
        return self._validation

    def test(self) -> Joined:
        return Joined([judge.test() for judge in self._judges], self._starts)

    def measure(self, outputs: EvalPrediction) -> dict[str, float]:
        values, start = [], 0
        for number, (judge, count) in enumerate(zip(self._judges, self._validation.sizes, strict=True)):
            rows = slice(start, start + count)
            labels = np.asarray(outputs.label_ids)[rows] - self._starts[number]
            values.append(judge.measure(EvalPrediction(self._own_outputs(number, outputs.predictions[rows]), labels)))
            start += count
        main = [metrics[judge.selects] for metrics, judge in zip(values, self._judges, strict=True)]
        return self._by_name(values) | {self.selects: float(np.mean(main))}

    def judged(self, predict: Predict, model: nn.Module, split: str) -> Judged:
        """Judge each member; the loss is averaged, and predictions have a column `member` and the member's index."""
        members = []
        for number, judge in enumerate(self._judges):

            def predict_member(rows: Dataset, number: int = number) -> tuple[np.ndarray, np.ndarray]:
                logits, labels = predict(rows)
                return self._own_outputs(number, logits), labels

            members.append(judge.judged(predict_member, model, split))
        for name, judged in zip(self._names, members, strict=True):
            judged.predictions.insert(0, "member", name)
        main = [judged.metrics.pop("primary") for judged in members]
        values = [judged.metrics for judged in members]
        primary = _average_name(main)
        means = {
            primary: float(np.mean([metrics[name] for metrics, name in zip(values, main, strict=True)])),
            "loss": float(np.mean([metrics["loss"] for metrics in values])),
        }
        return Judged(
            {"primary": primary, **means, **self._by_name(values)},
            pandas.concat([judged.predictions for judged in members], ignore_index=True),
        )

    @cached_property
    def _validation(self) -> Joined:
        return Joined([judge.validation() for judge in self._judges], self._starts)

    def _own_outputs(self, number: int, logits: np.ndarray) -> np.ndarray:
        if not self._sizes:
            return logits
        return logits[:, self._starts[number] : self._starts[number] + self._sizes[number]]

    def _by_name(self, values: Sequence[Mapping[str, float]]) -> dict[str, float]:
        members = zip(self._names, values, strict=True)
        return {f"{name}/{metric}": value for name, metrics in members for metric, value in metrics.items()}


def _average_name(main: Sequence[str]) -> str:
    """Return the name of an average of metrics: "average", or their own if all are one metric where less is better."""
    return main[0] if main[0] in LOWER_IS_BETTER and len(set(main)) == 1 else AVERAGE


def judge_of_members(task: Mixture, judges: Sequence[Judge]) -> Judge:
    """Return the judge of a mixture, given its members'. Raises PartialLoraError for metrics without an average."""
    main = {member.name: member.metrics[0] for member in task.members}
    if len({metric in LOWER_IS_BETTER for metric in main.values()}) > 1:
        raise PartialLoraError(f"task.members: expected first metrics that agree whether more is better, found {main}")
    return ByMembers(list(main), judges, task.sizes)
