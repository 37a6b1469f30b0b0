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
from partial_lora.errors import PartialLoraError, one_line, require
from partial_lora.files import with_an_end
from partial_lora.finished import export
from partial_lora.finished.inputs import problem_of_question
from partial_lora.finished.run import FinishedRun, finished_run
from partial_lora.finished.task import one_task
from partial_lora.tasks import CausalTransform
from partial_lora.training.distributed import device_of
from partial_lora.training.metrics import generate, log_likelihoods

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
    """A finished run's model on a device: tensors in, logits out, in the number format that its own evaluation had."""

    def __init__(self, run: FinishedRun, device: str = "auto") -> None:
        self.device = device_of(device, "device")
        precision = run.result.get("mixed_precision", "no")
        self.precision = precision if run.result.get("device") == self.device and precision in _AUTOCAST else "no"
        self.model = export.adapted_model(run).to(self.device)

    @torch.inference_mode()
    def logits(
        self, batch: Mapping[str, Tensor], reduce: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> np.ndarray:
        """Return the logits (N, outputs), float32, of a batch that a transform made of N inputs.

        reduce: makes something smaller of a batch's logits and labels; the batch then needs labels.
        """
        inputs = {name: tensor.to(self.device) for name, tensor in batch.items() if name != "labels"}
        dtype = _AUTOCAST.get(self.precision)
        with contextlib.nullcontext() if dtype is None else torch.autocast(self.device, dtype=dtype):
            logits = self.model(**inputs).logits
        output = logits.float() if reduce is None else reduce(logits, batch["labels"].to(self.device))
        return output.cpu().numpy()


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
        require(isinstance(run, (FinishedRun, Path, str)), "run", run, "a finished run, or its path")
        _at_least_one("max_new_tokens", max_new_tokens)
        run = run if isinstance(run, FinishedRun) else finished_run(Path(run))
        asked = one_task(run, member)
        task, self.labels, self._outputs = asked.config.task, asked.labels, asked.outputs
        self.modality, self.kind = task.modality, task.kind
        self._pairs = len(task.text_columns) == 2
        self._writing: dict[str, Any] = {"stop": task.stop, "max_new_tokens": max_new_tokens or task.max_new_tokens}
        self._layout = task.format
        self._batch_size = run.config.trainer.eval_batch_size
        self._transform: Any = build.transform_of(run.config.model, task)  # its methods depend on the kind of task
        self._model = RunModel(run, device)

    def predict(self, inputs: Iterable, batch_size: int | None = None) -> list[Prediction]:
        """Return a prediction for every input, in order.

        Args:
            inputs: paths of images or PIL images; texts or pairs of texts; prompts; or (prompt, options) of a choice.
            batch_size: None takes the batch size of the run's own evaluation.

        Raises PartialLoraError that names the first input that cannot be read, or a batch size below one.
        """
        _at_least_one("batch_size", batch_size)
        listed = isinstance(inputs, Iterable) and not isinstance(inputs, (str, bytes))  # of a text, letters are none
        require(listed, "inputs", type(inputs).__name__, "a list of inputs")
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
        size = batch_size or self._batch_size
        return size * _AHEAD if self.modality == "text" and self.kind == "label" else size

    def outcomes(self, inputs: Sequence, batch_size: int | None = None) -> list[Prediction | PartialLoraError]:
        """Return a prediction for every input of one window, in order, or what is wrong with it.

        Texts of like length share a batch, so that little of it is padding.
        """
        size = batch_size or self._batch_size
        outcomes: list = self._encode(inputs)
        readable = [place for place, outcome in enumerate(outcomes) if not isinstance(outcome, PartialLoraError)]
        if self.modality == "text":
            readable.sort(key=lambda place: len(_words(inputs[place])), reverse=True)
        for start in range(0, len(readable), size):
            places = readable[start : start + size]
            predictions = self._predict([inputs[place] for place in places], [outcomes[place] for place in places])
            for place, prediction in zip(places, predictions, strict=True):
                outcomes[place] = prediction
        return outcomes

    def _encode(self, inputs: Sequence) -> list:
        """Return images as pixels of the model's size, since their files may be far larger; texts as they are.

        Questions, which can be too long, come as the tokens of their options. An error stands for what cannot be read.
        """
        if self.kind == "choice":
            return [
                rows_of(self._transform, self._layout, *each)
                if is_question(each)
                else _unlike(each, "(prompt, options), texts in UTF-8")
                for each in inputs
            ]
        if self.kind == "generation":
            return [_prompt(each) for each in inputs]
        if self.modality == "text":
            expected = ("two texts" if self._pairs else "a text") + " in UTF-8"
            return [each if is_text(each, self._pairs) else _unlike(each, expected) for each in inputs]
        Image.init()  # before the threads, which would all do it
        with ThreadPoolExecutor(_DECODERS) as threads:
            return list(threads.map(self._pixels, inputs))

    def _pixels(self, image: object) -> Tensor | PartialLoraError:
        try:
            return self._transform.encode([read_image(image)])["pixel_values"]
        except PartialLoraError as error:
            return error
        except (OSError, ValueError, TypeError, RuntimeError, MemoryError) as error:  # it must not end a stream
            return PartialLoraError(f"{_words(image)}: cannot be made into what the model reads ({_reason(error)})")

    def _predict(self, inputs: list, encoded: list) -> list[Prediction | PartialLoraError]:
        """Return the predictions for inputs that can be read."""
        words = [_words(each) for each in inputs]
        if self.kind == "generation":
            texts = generate(self._model.model, self._transform, encoded, batch_size=len(encoded), **self._writing)
            return [Prediction(*each, None, {}) for each in zip(words, texts, strict=True)]
        if self.kind == "choice":
            scores = self._likelihoods(encoded)
            return [_outcome(*each) for each in zip(words, scores, (options for _, options in inputs), strict=True)]
        is_text = self.modality == "text"
        batch = self._transform.encode(encoded) if is_text else {"pixel_values": torch.cat(encoded)}
        logits = self._model.logits(batch)
        logits = logits if self._outputs is None else logits[:, self._outputs]
        return [_outcome(*each, self.labels) for each in zip(words, logits, strict=True)]

    def _likelihoods(self, questions: Sequence[Rows]) -> list[np.ndarray]:
        """Return the log likelihood of every option of every question, a sum over its tokens."""
        rows = [row for question in questions for row in question]
        size = max(len(questions), *map(len, questions))  # as large as the options of any one question need
        scores = [
            self._model.logits(self._transform.collate(rows[start : start + size]), log_likelihoods)[:, 0]
            for start in range(0, len(rows), size)
        ]
        ends = np.cumsum([len(question) for question in questions])
        return np.split(np.concatenate(scores), ends[:-1])


def _at_least_one(key: str, number: object) -> None:
    fits = number is None or (type(number) is int and number > 0)
    require(fits, key, number, "a whole number of at least 1, or None")


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
        if content:
            return datasets.Image().decode_example({"path": None, "bytes": content})
    except FileNotFoundError as error:
        raise PartialLoraError(f"{image}: no such image file") from error
    except Exception as error:  # Pillow's decoders raise whatever a broken file drives them into
        raise PartialLoraError(f"{image}: not an image that can be read ({_reason(error)})") from error
    raise PartialLoraError(f"{image}: not an image that can be read (an empty file)")


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

Rows = list[dict]  # one an option, as `CausalTransform.options` makes them


def is_question(content: object) -> TypeGuard[tuple[str, Sequence[str]]]:
    """Return whether something is a prompt and a list of options."""
    if not isinstance(content, (tuple, list)) or len(content) != 2:
        return False
    prompt, options = content
    return is_text(prompt) and isinstance(options, (tuple, list)) and all(map(is_text, options))


def rows_of(
    transform: CausalTransform, layout: str | None, prompt: str, options: Sequence[str]
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
