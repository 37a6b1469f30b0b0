"""Predictions of a finished run for new inputs: labels and options with probabilities, numbers, texts.

Predictor("results/runs/…/seed0").predict(["a.png", "b.png"])
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import datasets
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from scipy.special import log_softmax
from torch import Tensor

from partial_lora.building import build
from partial_lora.errors import PartialLoraError, of_type, one_line, require
from partial_lora.files import with_an_end
from partial_lora.finished import export
from partial_lora.finished.inputs import problem_of_question
from partial_lora.finished.run import FinishedRun, finished_run
from partial_lora.finished.target_task import OneTask, one_task
from partial_lora.tasks.config import TaskConfig
from partial_lora.tasks.kinds import kind_of
from partial_lora.tasks.prompt_inputs import ChoiceTransform
from partial_lora.training.distributed import device_of
from partial_lora.training.generation import generate
from partial_lora.training.offline_metrics import in_parts, log_likelihoods

_DECODERS = min(8, os.cpu_count() or 1)  # threads; Pillow releases the interpreter's lock while it decodes
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_AHEAD = 16  # batches that a window of texts has: enough to find texts of like length, few enough to print soon


@dataclass(frozen=True)
class Prediction:
    """The prediction for one input.

    input: its words: a path, a text, texts with tabs between them; "" for an image without a file.
    label, score: the most probable label or option and its probability; of a regression None and the predicted number;
        of a generation the text that was written and None.
    scores: the probability of every label or option, the most probable first; empty for a regression or generation.
    """

    input: str
    label: str | None
    score: float | None
    scores: dict[str, float]


class RunModel:
    """A finished run's model on a device: tensors in, logits out, in the number format that its own evaluation had.

    adapted: false for the untouched model that was adapted, loaded anew.
    """

    def __init__(self, run: FinishedRun, device: str = "auto", *, adapted: bool = True) -> None:
        self.device = device_of(device, "device")
        precision = run.result.get("mixed_precision", "no")
        self.precision = precision if run.result.get("device") == self.device and precision in _AUTOCAST else "no"
        self.model = (export.adapted_model(run) if adapted else export.base_model(run).eval()).to(self.device)

    @torch.inference_mode()
    def logits(
        self, batch: Mapping[str, Tensor], reduce: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> np.ndarray:
        """Return the logits (N, outputs), float32, of a batch that a transform made of N inputs.

        reduce: makes something smaller of the logits and labels of each part of a batch, which then needs labels.
        """
        if reduce is None:
            return self.forward(batch).float().cpu().numpy()
        parts = [reduce(self.forward(part), part["labels"].to(self.device)) for part in in_parts(batch)]
        return torch.cat(parts).cpu().numpy()

    @torch.inference_mode()
    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the logits of a whole batch, in the number format that the run was trained in."""
        inputs = {name: tensor.to(self.device) for name, tensor in batch.items() if name != "labels"}
        dtype = _AUTOCAST.get(self.precision)
        with contextlib.nullcontext() if dtype is None else torch.autocast(self.device, dtype=dtype):
            return self.model(**inputs).logits


class Predictor:
    """A finished run, ready to predict. Raises PartialLoraError where there is none, or not on that device.

    device: "cpu", "cuda", or "auto" for cuda if there is such a device. max_new_tokens: the most that a generation
    writes, None for as many as the run's task has. member: of a mixture, the task that the inputs are of. `labels` is
    empty unless there are classes.
    """

    def __init__(
        self,
        run: FinishedRun | Path | str,
        *,
        device: str = "auto",
        max_new_tokens: int | None = None,
        member: str | None = None,
    ) -> None:
        if not isinstance(run, FinishedRun):
            expected = "a finished run: its path, latest, or the start of its id"
            require(isinstance(run, (str, os.PathLike)), "run", run, expected)
            run = finished_run(Path(run))
        of_type("member", member, str | None)
        _whole_or_none("max_new_tokens", max_new_tokens)
        chosen = one_task(run, member)
        self.labels = chosen.labels
        self._batch_size = run.config.trainer.eval_batch_size
        transform = build.transform_of(run.config.model, chosen.config.task)
        predicted = PREDICTED[kind_of(chosen.config.task).reads]
        self._of: Any = predicted(chosen, transform, RunModel(run, device), max_new_tokens)

    def predict(self, inputs: Iterable, batch_size: int | None = None) -> list[Prediction]:
        """Return a prediction for every input, in order.

        Args:
            inputs: paths of images or PIL images; texts or pairs of texts; prompts; or (prompt, options) of a choice.
            batch_size: None takes the batch size of the run's own evaluation.

        Raises PartialLoraError that names the first input that cannot be read.
        """
        is_list = isinstance(inputs, Iterable) and not isinstance(inputs, (str, bytes))  # of a text, letters are none
        require(is_list, "inputs", inputs, "a list of inputs")
        _whole_or_none("batch_size", batch_size)
        inputs = list(inputs)
        size = self.window(batch_size)
        predictions = []
        for start in range(0, len(inputs), size):
            for outcome in self.outcomes(inputs[start : start + size], batch_size):
                if isinstance(outcome, PartialLoraError):
                    raise outcome
                predictions.append(outcome)
        return predictions

    def window(self, batch_size: int | None = None) -> int:
        """Return how many inputs `outcomes` takes at once: a batch, or several of texts that get labels or numbers."""
        return (batch_size or self._batch_size) * self._of.ahead

    def outcomes(self, inputs: Sequence, batch_size: int | None = None) -> list[Prediction | PartialLoraError]:
        """Return a prediction for every input of one window, in order, or what is wrong with it.

        Texts of like length share a batch, so that little of it is padding.
        """
        size = batch_size or self._batch_size
        outcomes: list = self._of.read(inputs)
        readable = [place for place, outcome in enumerate(outcomes) if not isinstance(outcome, PartialLoraError)]
        if self._of.by_length:
            readable.sort(key=lambda place: len(_words(inputs[place])), reverse=True)
        for start in range(0, len(readable), size):
            places = readable[start : start + size]
            predictions = self._of.predict([inputs[place] for place in places], [outcomes[place] for place in places])
            for place, prediction in zip(places, predictions, strict=True):
                outcomes[place] = prediction
        return outcomes


def _whole_or_none(key: str, value: int | None) -> None:
    """Raise PartialLoraError, naming the argument, for what is neither None nor a whole number of at least 1."""
    of_type(key, value, int | None)
    require(value is None or value >= 1, key, value, "a whole number of at least 1, or None")


@dataclass
class _Predicted:
    """Predictions for inputs of one form.

    `read` returns what the model is shown of every input, or an error in its place, and `predict` the predictions for
    those without one.

    asked: the task, its labels and their places among the model's outputs. longest: of a text that is written, in
    tokens; None for as many as the task has.
    """

    asked: OneTask
    transform: Any  # its methods depend on the kind of task
    model: RunModel
    longest: int | None
    ahead = 1  # batches that a window has
    by_length = True  # inputs of like length share a batch

    @property
    def task(self) -> TaskConfig:
        return self.asked.config.task


class OfTexts(_Predicted):
    """Labels, or numbers, of texts and pairs of them."""

    ahead = _AHEAD

    def read(self, inputs: Sequence) -> list:
        pairs = len(self.task.text_columns) == 2
        expected = ("two texts" if pairs else "a text") + " in UTF-8"
        return [value if is_text(value, pairs) else _unlike(value, expected) for value in inputs]

    def predict(self, inputs: list, read: list) -> list[Prediction | PartialLoraError]:
        logits, places = self.model.logits(self._batch(read)), self.asked.outputs
        logits = logits if places is None else logits[:, places]
        return [_outcome(_words(value), row, self.asked.labels) for value, row in zip(inputs, logits, strict=True)]

    def _batch(self, read: list) -> dict[str, Tensor]:
        return self.transform.encode(read)


class OfImages(OfTexts):
    """Labels, or numbers, of images: pixels of the model's size are kept, since their files may be far larger."""

    ahead, by_length = 1, False

    def read(self, inputs: Sequence) -> list:
        Image.init()  # before the threads, which would all do it
        with ThreadPoolExecutor(_DECODERS) as threads:
            return list(threads.map(self._pixels, inputs))

    def _pixels(self, image: object) -> Tensor | PartialLoraError:
        try:
            return self.transform.encode([read_image(image)])["pixel_values"]
        except PartialLoraError as error:
            return error
        except (OSError, ValueError, TypeError, RuntimeError, MemoryError) as error:  # it must not end a stream
            return PartialLoraError(f"{_words(image)}: cannot be made into what the model reads ({_reason(error)})")

    def _batch(self, read: list) -> dict[str, Tensor]:
        return {"pixel_values": torch.cat(read)}


class OfPrompts(_Predicted):
    """Texts that the model writes after prompts."""

    def read(self, inputs: Sequence) -> list:
        return [_prompt(prompt) for prompt in inputs]

    def predict(self, inputs: list, read: list) -> list[Prediction | PartialLoraError]:
        texts = generate(
            self.model.model,
            self.transform,
            read,
            stop=self.task.stop,
            max_new_tokens=self.longest or self.task.max_new_tokens,
            batch_size=len(read),
        )
        return [Prediction(_words(prompt), text, None, {}) for prompt, text in zip(inputs, texts, strict=True)]


class OfQuestions(_Predicted):
    """Options of questions; they are read as the tokens of their options, which can be too many."""

    def read(self, inputs: Sequence) -> list:
        expected = "(prompt, options), texts in UTF-8"
        return [
            rows_of(self.transform, self.task.format, *pair) if is_question(pair) else _unlike(pair, expected)
            for pair in inputs
        ]

    def predict(self, inputs: list, read: list) -> list[Prediction | PartialLoraError]:
        pairs = zip(inputs, self._likelihoods(read), strict=True)
        return [_outcome(_words(pair), likelihoods, pair[1]) for pair, likelihoods in pairs]

    def _likelihoods(self, questions: Sequence[Rows]) -> list[np.ndarray]:
        """Return the log likelihood of every option of every question, a sum over its tokens."""
        rows = [row for question in questions for row in question]
        size = max(len(questions), *map(len, questions))  # as large as the options of any one question need
        scores = [
            self.model.logits(self.transform.collate(rows[start : start + size]), log_likelihoods)[:, 0]
            for start in range(0, len(rows), size)
        ]
        ends = np.cumsum([len(question) for question in questions])
        return np.split(np.concatenate(scores), ends[:-1])


PREDICTED = {"image": OfImages, "text": OfTexts, "prompt": OfPrompts, "question": OfQuestions}  # by what a kind reads


def _outcome(words: str, logits: np.ndarray, labels: Sequence[str]) -> Prediction | PartialLoraError:
    if not np.isfinite(logits).all():
        return PartialLoraError(f"{words}: the model's output is not a finite number")
    if not labels:
        return Prediction(words, None, float(logits[0]), {})
    chances = np.exp(log_softmax(logits))
    order = np.argsort(-logits, kind="stable")  # the first of equals, as argmax takes it
    scores = {labels[index]: float(chances[index]) for index in order}
    return Prediction(words, labels[order[0]], float(chances[order[0]]), scores)


def read_image(image: object) -> Image.Image:
    """Return an image decoded as the rows of a data set are, turned as its EXIF says; a decoded image as it is.

    Raises PartialLoraError, naming the file, for one that is not there or not an image.
    """
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, (str, Path)):
        raise _unlike(image, "the path of an image, or a PIL image")
    try:
        content = with_an_end(image).read_bytes()  # here: `datasets` would take some paths for addresses on the web
        return datasets.Image().decode_example({"path": None, "bytes": content})
    except Exception as error:  # Pillow's decoders raise whatever a broken file drives them into
        raise PartialLoraError(f"{image}: not an image that can be read ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "its format is not known" if isinstance(error, UnidentifiedImageError) else one_line(error)


def _words(content: object) -> str:
    """Return an input as a user would name it on the command line."""
    if isinstance(content, Image.Image):
        return str(getattr(content, "filename", ""))
    if is_question(content):
        return "\t".join([content[0], *content[1]])
    return "\t".join(content) if isinstance(content, (tuple, list)) else str(content)


def _prompt(content: object) -> str | PartialLoraError:
    if not (isinstance(content, str) and is_text(content)):
        return _unlike(content, "a text in UTF-8")
    return content if content.strip() else PartialLoraError("an empty prompt: expected a text")


def is_text(content: object, pairs: bool = False) -> bool:
    """Return whether something is a text, or two, that a tokenizer reads: half a character it does not."""
    if pairs:
        return isinstance(content, (tuple, list)) and len(content) == 2 and all(map(is_text, content))
    try:
        return isinstance(content, str) and bool(content.encode() or True)
    except UnicodeEncodeError:
        return False


def _unlike(content: object, expected: str) -> PartialLoraError:
    return PartialLoraError(f"an input of type {type(content).__name__}: expected {expected}")


# --- Questions to a causal language model: a prompt and its options, and the likelihood of each option.

Rows = list[dict]  # one an option, as `ChoiceTransform.options` makes them


def is_question(content: object) -> TypeGuard[tuple[str, Sequence[str]]]:
    """Return whether something is a prompt and a list of options."""
    if not isinstance(content, (tuple, list)) or len(content) != 2:
        return False
    prompt, options = content
    return is_text(prompt) and isinstance(options, (tuple, list)) and all(map(is_text, options))


def rows_of(
    transform: ChoiceTransform, layout: str | None, prompt: str, options: Sequence[str]
) -> Rows | PartialLoraError:
    """Return the options of a question as the model reads them, or what is wrong with the question.

    layout: the task's `format`; winogrande's puts the options where the prompt has a _, and scores what follows.
    """
    problem, options = problem_of_question(prompt, options), [option.strip() for option in options]
    if layout == "winogrande":
        before, _, after = prompt.partition("_")
        prompts, answers = [before + option for option in options], [f" {after.strip()}"] * len(options)
        if not after.strip():
            problem = problem or "expected a _ in the prompt, where the options go, and words after it"
    else:
        space = "" if prompt[-1:].isspace() else " "
        prompts, answers = [prompt] * len(options), [space + option for option in options]
    if problem is None:
        try:
            columns = transform.option_columns({"prompts": [prompts], "options": [answers], "label": [0]}, [0])
            return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        except PartialLoraError:  # its message is about a row of a table
            problem = "an option is longer than the run's model.max_length"
    quoted = f"{prompt[:80]!r}: " if prompt.strip() else ""
    return PartialLoraError(f"{quoted}{problem}")
