"""How a task is trained on, what selects a checkpoint, and what is reported: by labels, by options, by texts.

A judge gives Trainer its rows, its loss and what it measures on validation, and judges a split once training is over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pandas
from datasets import Dataset
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer

from partial_lora import progress
from partial_lora.calibration.peers import Peers
from partial_lora.tasks import Task
from partial_lora.training import evaluation
from partial_lora.training.fsdp import is_shared_out
from partial_lora.training.generation import exact_match, generate, rouge_l
from partial_lora.training.losses import loss_of_batch, loss_of_tokens
from partial_lora.training.options import log_likelihoods, option_metrics, predictions

# What is kept of a model's logits of rows, in their order, and the rows' labels.
Predict = Callable[[Dataset], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Judged:
    """What a model is worth on a split: metrics by name, `primary` naming the main one, and one row an example."""

    metrics: dict
    predictions: pandas.DataFrame


class Judge(Protocol):
    """selects: the metric of `measure` that a checkpoint is selected by. reduce: what is kept of a batch's logits.

    `judged` is given a model and what foretells with it.
    """

    selects: str
    loss: Callable[..., Tensor]
    reduce: Callable[[Tensor, Tensor], Tensor] | None

    def train(self) -> Dataset: ...

    def validation(self) -> Dataset: ...

    def test(self) -> Dataset: ...

    def measure(self, said: EvalPrediction) -> dict[str, float]: ...

    def judged(self, predict: Predict, model: nn.Module, split: str) -> Judged: ...


@dataclass
class _OfTask:
    """Every split of a task as its transform prepares it."""

    task: Task
    transform: object
    cache_bytes: int

    def train(self) -> Dataset:
        return self._rows("train")

    def validation(self) -> Dataset:
        return self._rows("validation")

    def test(self) -> Dataset:
        return self._rows("test")

    def _rows(self, split: str) -> Dataset:
        return self.transform.prepare(getattr(self.task, split), cache_bytes=self.cache_bytes)


@dataclass
class ByLabels(_OfTask):
    """Classes, or numbers: the loss is of the logits of an example, and a prediction is made of them."""

    loss = staticmethod(loss_of_batch)
    reduce = None

    @property
    def selects(self) -> str:
        return self.task.metrics[0]

    def measure(self, said: EvalPrediction) -> dict[str, float]:
        """The metrics of validation, and the loss over all its examples: Trainer's own is of one process's batches."""
        logits, references = said.predictions, np.asarray(said.label_ids)
        found = evaluation.metrics_of(self.task.metrics, logits, references)
        return found | {"loss": evaluation.mean_loss(logits, references)}

    def judged(self, predict: Predict, model: nn.Module, split: str) -> Judged:
        logits, references = predict(self._rows(split))
        return Judged(
            evaluation.split_metrics(self.task.metrics, logits, references),
            evaluation.predictions_of(logits, references, self.task.labels),
        )


@dataclass
class ByOptions(_OfTask):
    """Multiple choice: trained on the right option alone, judged by which of all is the likeliest."""

    loss = staticmethod(loss_of_tokens)
    reduce = staticmethod(log_likelihoods)

    @property
    def selects(self) -> str:
        return self.task.metrics[0]

    def validation(self) -> Dataset:
        return self._options("validation")

    def test(self) -> Dataset:
        return self._options("test")

    def measure(self, said: EvalPrediction) -> dict[str, float]:
        return option_metrics(said.predictions[:, 0], *_of_options(self._options("validation")))

    def judged(self, predict: Predict, model: nn.Module, split: str) -> Judged:
        rows = self._options(split)
        said, _ = predict(rows)
        columns = _of_options(rows)
        found = option_metrics(said[:, 0], *columns)
        right = columns[1]
        loss = -said[right, 0].sum() / said[right, 1].sum()  # of a token, as it is trained on
        frame = pandas.DataFrame(predictions(said[:, 0], *columns))
        frame.insert(0, "index", np.arange(len(frame)))
        frame["score"] = [max(scores) for scores in frame["scores"]]
        metrics = {name: found[name] for name in self.task.metrics}
        return Judged({"primary": self.task.metrics[0], **metrics, "loss": float(loss)}, frame)

    def _options(self, split: str) -> Dataset:
        return self.transform.options(getattr(self.task, split), cache_bytes=self.cache_bytes)


@dataclass
class ByTexts(_OfTask):
    """Generation: selected by the perplexity of the responses, reported by what the model writes on its own."""

    peers: Peers
    writing: Mapping[str, object] = field(default_factory=dict)  # stop, max_new_tokens, batch_size of `generate`
    answer: str | None = None
    selects = "perplexity"
    loss = staticmethod(loss_of_tokens)
    reduce = staticmethod(log_likelihoods)

    def measure(self, said: EvalPrediction) -> dict[str, float]:
        """The perplexity of validation, and the loss over all its tokens: Trainer's own depends on batches."""
        perplexity = _perplexity(said.predictions)
        return {"perplexity": perplexity, "loss": float(np.log(perplexity))}

    def judged(self, predict: Predict, model: nn.Module, split: str) -> Judged:
        """On test the model writes; on validation, which selects by perplexity, it does not."""
        said, _ = predict(self._rows(split))
        perplexity = _perplexity(said)
        known = {"perplexity": perplexity, "loss": float(np.log(perplexity))}
        if split != "test":
            return Judged({"primary": "perplexity", **known}, pandas.DataFrame())
        rows = getattr(self.task, split)
        prompts, references = list(rows["prompt"]), list(rows["response"])
        written = self._written(model, prompts)
        each = {"exact_match": exact_match(written, references, self.answer), "rouge_l": rouge_l(written, references)}
        frame = pandas.DataFrame({"index": np.arange(len(rows)), "label": references, "prediction": written, **each})
        metrics = {name: known.get(name) or float(each[name].mean()) for name in self.task.metrics}
        return Judged({"primary": self.task.metrics[0], **known, **metrics}, frame)

    def _written(self, model: nn.Module, prompts: Sequence[str]) -> list[str]:
        """What the model writes after every prompt; several processes share the prompts.

        Where they hold the model in parts they write as many texts each, and one too many is not looked at.
        """
        together = is_shared_out(model)
        own = list(prompts[self.peers.rank :: self.peers.size])
        if together and len(own) < -(-len(prompts) // self.peers.size):
            own.append(prompts[0])
        told = generate(
            model,
            self.transform,
            own,
            progress=lambda done, total: progress.emit("generate", done, total),
            together=together,
            **self.writing,
        )
        shares = self.peers.gather(told)
        return [shares[place % self.peers.size][place // self.peers.size] for place in range(len(prompts))]


def judge_of(task: Task, transform: object, settings: Mapping, peers: Peers) -> Judge:
    """The judge of a run's task."""
    chosen = settings["task"]
    given = (task, transform, chosen["cache_bytes"])
    if task.kind == "choice":
        return ByOptions(*given)
    if task.kind == "generation":
        writing = {name: chosen[name] for name in ("stop", "max_new_tokens")}
        writing["batch_size"] = settings["trainer"]["eval_batch_size"]
        return ByTexts(*given, peers, writing, chosen["answer"])
    return ByLabels(*given)


def predicts(trainer: Trainer) -> Predict:
    """What a trainer's model says of other rows than those of its validation; all of its processes ask."""

    def predict(rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
        measure, trainer.compute_metrics = trainer.compute_metrics, None  # it may be for the rows of validation alone
        try:
            output = trainer.predict(rows)
        finally:
            trainer.compute_metrics = measure
        return output.predictions, np.asarray(output.label_ids)

    return predict


def _of_options(rows: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return tuple(np.asarray(rows[name]) for name in ("item", "right", "characters"))


def _perplexity(said: np.ndarray) -> float:
    """Of a token of an answer, from (log likelihood, tokens) of each row."""
    return float(np.exp(-said[:, 0].sum() / said[:, 1].sum()))
