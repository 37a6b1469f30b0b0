"""How a task is trained on, what selects a checkpoint, and what is reported: by labels, by options, by texts.

A judge gives Trainer its rows, its loss and what it measures on validation, and judges a split once training is over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import pandas
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import EvalPrediction, Trainer

from partial_lora import progress
from partial_lora.calibration.peers import Peers
from partial_lora.calibration.score import IGNORED, starts, within
from partial_lora.errors import PartialLoraError
from partial_lora.tasks import Joined, Mixture, Task
from partial_lora.tasks.metrics import LOWER_IS_BETTER
from partial_lora.training import metrics as evaluation
from partial_lora.training.fsdp import is_shared_out
from partial_lora.training.metrics import exact_match, generate, log_likelihoods, option_metrics, predictions, rouge_l

# --- What training makes smaller: sums over the examples, or tokens, of a whole optimizer step, divided by their nu


def loss_of_batch(outputs, labels: Tensor, num_items_in_batch: int | Tensor | None = None) -> Tensor:
    """The cross entropy of classes, or squared error of real labels, of a batch (N, outputs) against labels (N,).

    num_items_in_batch: the number of examples of the whole step, over all processes; None stands for this batch's.
    """
    logits = outputs.logits.float()
    if labels.is_floating_point():
        total = F.mse_loss(logits.view(labels.shape), labels.float(), reduction="sum")
    else:
        total = F.cross_entropy(logits, labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def loss_of_batch_within(sizes: Sequence[int]) -> Callable[..., Tensor]:
    """`loss_of_batch` of classes, each row's over the outputs of its own task (`slices`)."""

    def loss(outputs, labels: Tensor, num_items_in_batch: int | Tensor | None = None) -> Tensor:
        total = F.cross_entropy(within(outputs.logits, labels, sizes), labels, reduction="sum")
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    return loss


def loss_of_tokens(outputs, labels: Tensor, num_items_in_batch: int | Tensor | None = None) -> Tensor:
    """The cross entropy of the tokens that are asked for, each from those before it; labels (N, L), else -100.

    num_items_in_batch: the number of such tokens in the whole step; None stands for this batch's. Of the logits only
    those that foretell one are made float32: prompts are longer than answers.
    """
    following = labels[:, 1:]
    asked = following != IGNORED
    total = F.cross_entropy(outputs.logits[:, :-1][asked].float(), following[asked], reduction="sum")
    return total / (asked.sum() if num_items_in_batch is None else num_items_in_batch)


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


def judge_of(
    task: Task,
    transform: object,
    peers: Peers,
    *,
    batch_size: int,
    cache_bytes: int,
    stop: Sequence[str] = (),
    max_new_tokens: int = 256,
    answer: str | None = None,
) -> Judge:
    """Return the judge of one task.

    batch_size, stop, max_new_tokens: of what a model writes. answer: of a generation, what has to match.
    """
    given = (task, transform, cache_bytes)
    if task.kind == "choice":
        return ByOptions(*given)
    if task.kind == "generation":
        writing = {"stop": stop, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
        return ByTexts(*given, peers, writing, answer)
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


# --- What a mixture is trained on and judged by: its members' judges, each on its own rows and its own outputs.

AVERAGE = "average"


class ByMembers:
    """Metrics by member, as MEMBER/METRIC, and the average of the members' main ones, which selects.

    sizes: how many classes each member has; none where members have no outputs of their own.
    """

    def __init__(self, names: Sequence[str], each: Sequence[Judge], sizes: Sequence[int]) -> None:
        self._names, self._each, self._sizes = list(names), list(each), sizes
        self._starts = starts(sizes) if sizes else [0] * len(each)
        self.selects = _average_of([judge.selects for judge in each])
        self.loss: Callable[..., Tensor] = loss_of_batch_within(sizes) if sizes else each[0].loss
        self.reduce = each[0].reduce

    def train(self) -> Joined:
        return Joined([judge.train() for judge in self._each], self._starts)

    def validation(self) -> Joined:
        return self._validation

    def test(self) -> Joined:
        return Joined([judge.test() for judge in self._each], self._starts)

    def measure(self, said: EvalPrediction) -> dict[str, float]:
        found, start = [], 0
        for number, count in enumerate(self._validation.sizes):
            rows = slice(start, start + count)
            labels = np.asarray(said.label_ids)[rows] - self._starts[number]
            own = EvalPrediction(predictions=self._own(number, said.predictions[rows]), label_ids=labels)
            found.append(self._each[number].measure(own))
            start += count
        main = [each[judge.selects] for each, judge in zip(found, self._each, strict=True)]
        return self._by_name(found) | {self.selects: float(np.mean(main))}

    def judged(self, predict: Predict, model: nn.Module, split: str) -> Judged:
        """Also the loss, averaged over the members; predictions have a column `member`, the index is the member's."""
        found = [judge.judged(self._predict(predict, number), model, split) for number, judge in enumerate(self._each)]
        primary = _average_of([each.metrics["primary"] for each in found])
        means = {
            primary: float(np.mean([each.metrics[each.metrics["primary"]] for each in found])),
            "loss": float(np.mean([each.metrics["loss"] for each in found])),
        }
        by_name = self._by_name(
            [{key: value for key, value in each.metrics.items() if key != "primary"} for each in found]
        )
        frames = [each.predictions for each in found]
        for name, frame in zip(self._names, frames, strict=True):
            frame.insert(0, "member", name)
        return Judged({"primary": primary, **means, **by_name}, pandas.concat(frames, ignore_index=True))

    @cached_property
    def _validation(self) -> Joined:
        return Joined([judge.validation() for judge in self._each], self._starts)

    def _own(self, number: int, logits: np.ndarray) -> np.ndarray:
        """Of logits (N, outputs) a member's own."""
        if not self._sizes:
            return logits
        return logits[:, self._starts[number] : self._starts[number] + self._sizes[number]]

    def _predict(self, predict: Predict, number: int) -> Predict:
        def own(rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
            logits, labels = predict(rows)
            return self._own(number, logits), labels

        return own

    def _by_name(self, found: Sequence[Mapping[str, float]]) -> dict[str, float]:
        pairs = zip(self._names, found, strict=True)
        return {f"{name}/{metric}": value for name, each in pairs for metric, value in each.items()}


def _average_of(metrics: Sequence[str]) -> str:
    """What an average of metrics is called: what they all are where the smallest is the best, else an average."""
    return metrics[0] if metrics[0] in LOWER_IS_BETTER and len(set(metrics)) == 1 else AVERAGE


def judge_of_members(task: Mixture, judges: Sequence[Judge]) -> Judge:
    """Return the judge of a mixture, given its members'. Raises PartialLoraError for metrics without an average."""
    main = {member.name: member.metrics[0] for member in task.members}
    if len({metric in LOWER_IS_BETTER for metric in main.values()}) > 1:
        raise PartialLoraError(f"task.members: expected first metrics that are all the better the larger, found {main}")
    return ByMembers(list(main), judges, task.sizes)
