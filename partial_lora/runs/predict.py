"""What a finished run says of inputs that it has never seen: labels and options with probabilities, numbers, texts.

Predictor("results/runs/…/seed0").predict(["a.png", "b.png"])
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import datasets
import numpy as np
import torch
from PIL import Image
from scipy.special import log_softmax
from torch import Tensor

from partial_lora.errors import PartialLoraError
from partial_lora.runs import build, export
from partial_lora.runs.finished import FinishedRun, asked_task, finished_run
from partial_lora.tasks import CausalTransform
from partial_lora.training.metrics import generate, log_likelihoods

# --- What a user wants predicted: image files, folders, texts and lines, read one by one and never all held at once

IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
STDIN = "-"


@dataclass(frozen=True)
class Input:
    """One thing to predict.

    said: as the user named it: a path, a text, or texts with tabs between them.
    given: what the model is shown: the path, the text, the two texts, or a prompt and its options.
    problem: why there is nothing to show, in one line; None for an input that can be predicted.
    place: the line it was read from, "FILE, line 3"; "" for an argument.
    """

    said: str
    given: str | tuple[str, str] | tuple[str, tuple[str, ...]]
    problem: str | None = None
    place: str = ""


@dataclass(frozen=True)
class Inputs:
    """The inputs in the order in which they were named, to be gone through once; how many, where that is known."""

    stream: Iterator[Input]
    total: int | None


@dataclass(frozen=True)
class _Source:
    """What one argument stands for."""

    inputs: Iterable[Input]
    total: int | None = 1


def read(arguments: Sequence[str], *, modality: str, pairs: bool, stdin: BinaryIO, kind: str = "label") -> Inputs:
    """The inputs that arguments name; lines are read as they are asked for.

    Args:
        arguments: an image file, a folder of images or a text; @FILE for the lines of a file, - for those of `stdin`.
            A line is a text, several of them with tabs between them, or the path of an image.
        modality: "image" or "text".
        pairs: whether texts come in pairs.
        kind: of the task; "choice" has a prompt and its options in a line, "generation" a prompt.

    Raises PartialLoraError, in one line, for an argument that is no such thing.
    """
    if sum(argument in (STDIN, f"@{STDIN}") for argument in arguments) > 1:
        raise PartialLoraError("-: standard input can be read once, and is named twice")
    parse = _image_path if modality == "image" else _question if kind == "choice" else _pair if pairs else _text
    sources = [_source(argument, modality, parse, stdin) for argument in arguments]
    totals = [source.total for source in sources]
    stream = chain.from_iterable(source.inputs for source in sources)
    return Inputs(stream, None if None in totals else sum(totals))


def _source(argument: str, modality: str, parse: Callable[[str], Input], stdin: BinaryIO) -> _Source:
    if argument in (STDIN, f"@{STDIN}"):
        return _Source(_lines(stdin, "standard input", parse), None)
    if argument.startswith("@"):
        return _Source(_file_lines(argument, modality, parse), None)
    return _image_source(argument) if modality == "image" else _text_source(argument, parse)


def _image_source(argument: str) -> _Source:
    if not os.path.exists(argument):
        hint = "" if Path(argument).suffix.lower() in IMAGES else "; the run's model reads images, not texts"
        raise PartialLoraError(f"{argument or repr(argument)}: no such image file or folder{hint}")
    if not os.path.isdir(argument):
        return _Source([Input(argument, argument)])
    files = list(_images_in(argument))
    if not files:
        raise PartialLoraError(f"{argument}: no image in this folder ({', '.join(IMAGES)})")
    return _Source((Input(file, file) for file in files), len(files))


def _text_source(argument: str, parse: Callable[[str], Input]) -> _Source:
    if os.path.isfile(argument) or (os.sep in argument and os.path.exists(argument)):
        raise PartialLoraError(
            f"{argument} is a file or folder, and the run's model reads texts: @{argument} stands for the lines of a "
            "file; a text of that very wording goes through standard input"
        )
    found = parse(argument)
    if found.problem:
        raise PartialLoraError(f"{argument!r}: {found.problem}")
    return _Source([found])


def _images_in(folder: str) -> Iterator[str]:
    """The image files under a folder, by name, those of a folder before those of its sub-folders; none are hidden."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGES:
                yield os.path.join(parent, name)


def _file_lines(argument: str, modality: str, parse: Callable[[str], Input]) -> Iterator[Input]:
    file = argument[1:]
    if os.path.isdir(file) or not os.access(file, os.R_OK):
        reason = "a folder" if os.path.isdir(file) else "cannot be read" if os.path.exists(file) else "no such file"
        hint = "; a text that starts with @ goes through standard input" if modality == "text" else ""
        raise PartialLoraError(f"{file or argument}: {reason}, expected a file of lines{hint}")

    def lines() -> Iterator[Input]:
        with open(file, "rb") as stream:
            yield from _lines(stream, file, parse)

    return lines()


def _lines(stream: BinaryIO, name: str, parse: Callable[[str], Input]) -> Iterator[Input]:
    """One input a line. Only a newline ends a line: texts may hold other characters that Unicode calls line breaks."""
    for number, raw in enumerate(stream, 1):
        place = f"{name}, line {number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            found = parse(line) if line.strip() else Input(line, line, "an empty line")
        except UnicodeDecodeError:
            line = raw.decode("utf-8", errors="backslashreplace").rstrip("\r\n")
            found = Input(line, line, "not UTF-8")
        yield Input(found.said, found.given, found.problem, place)


def _image_path(line: str) -> Input:
    return Input(line, line)


def _text(line: str) -> Input:
    return Input(line, line, None if line.strip() else "an empty text")


def _pair(line: str) -> Input:
    parts = tuple(line.split("\t"))
    if len(parts) != 2 or not all(part.strip() for part in parts):
        return Input(line, line, "expected two texts with a tab between them")
    return Input(line, parts)


def _question(line: str) -> Input:
    prompt, *options = line.split("\t")
    problem = problem_of_question(prompt, options)
    return Input(line, line if problem else (prompt, tuple(options)), problem)


def problem_of_question(prompt: str, options: Sequence[str]) -> str | None:
    """Why there is nothing to choose among options, in a few words; None where there is."""
    texts = [text.strip() for text in (prompt, *options)]
    if len(options) < 2 or not all(texts):
        return "expected a prompt and two or more options, with tabs between them"
    twice = next((text for text in texts[1:] if texts[1:].count(text) > 1), None)
    return f"the option {twice!r} is there twice" if twice else None


# --- Questions that a user asks a causal language model: a prompt and its options, and how likely each option is.

_FEATURES = datasets.Features(
    {
        "prompts": datasets.List(datasets.Value("string")),
        "options": datasets.List(datasets.Value("string")),
        "label": datasets.Value("int64"),
    }
)
Rows = list[dict]  # one an option, as `CausalTransform.options` makes them


def is_question(given: object) -> bool:
    """Whether something is a prompt and a list of options."""
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        return False
    prompt, options = given
    listed = isinstance(options, (tuple, list)) and all(isinstance(option, str) for option in options)
    return isinstance(prompt, str) and listed


def rows_of(
    transform: CausalTransform, layout: str | None, questions: Sequence[tuple[str, Sequence[str]]]
) -> list[Rows | PartialLoraError]:
    """The options of every question as the model reads them, or what is wrong with the question.

    layout: the task's `format`. That of winogrande puts the options where the prompt has a _, and scores what follows.
    """
    outcomes: list = []
    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        for prompt, options in questions:
            problem = problem_of_question(prompt, options) or _problem_of_layout(layout, prompt)
            outcomes.append(_unfit(prompt, problem) if problem else _rows(transform, layout, prompt, options))
    finally:
        if not shown:
            datasets.enable_progress_bars()
    return outcomes


def likelihoods(
    questions: Sequence[Rows],
    logits: Callable[[Mapping[str, Tensor], Callable], np.ndarray],
    transform: CausalTransform,
    size: int,
) -> list[np.ndarray]:
    """The log likelihood of every option of every question, a sum over its tokens.

    Args:
        logits: of a batch, what a function keeps of them (`RunModel.logits`).
        size: how many options are in a batch.
    """
    rows = [row for question in questions for row in question]
    found = [
        logits(transform.collate(rows[start : start + size]), log_likelihoods)[:, 0]
        for start in range(0, len(rows), size)
    ]
    ends = np.cumsum([len(question) for question in questions])
    return np.split(np.concatenate(found), ends[:-1])


def _rows(
    transform: CausalTransform, layout: str | None, prompt: str, options: Sequence[str]
) -> Rows | PartialLoraError:
    if layout == "winogrande":
        before, _, after = prompt.partition("_")
        prompts, answers = [before + option for option in options], [f" {after.strip()}"] * len(options)
    else:
        space = "" if prompt[-1].isspace() else " "
        prompts, answers = [prompt] * len(options), [space + option for option in options]
    row = {"prompts": [prompts], "options": [answers], "label": [0]}
    try:
        return transform.options(datasets.Dataset.from_dict(row, features=_FEATURES), cache_bytes=0).to_list()
    except PartialLoraError:  # its words are about a row of a table
        return _unfit(prompt, "an option is longer than the run's model.max_length")


def _problem_of_layout(layout: str | None, prompt: str) -> str | None:
    if layout == "winogrande" and not prompt.partition("_")[2].strip():
        return "expected a _ in the prompt, where the options go, and words after it"
    return None


def _unfit(prompt: str, problem: str, most: int = 80) -> PartialLoraError:
    said = f"{prompt[:most]!r}: " if prompt.strip() else ""
    return PartialLoraError(f"{said}{problem}")


_DECODERS = min(8, os.cpu_count() or 1)  # threads; Pillow lets go of the interpreter while it decodes
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Prediction:
    """What the run's model says of one input.

    input: as it was given: a path, a text, texts with tabs between them; "" for an image without a file.
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
        self.device = _device(device)
        precision = run.result.get("mixed_precision", "no")
        self.precision = precision if run.result.get("device") == self.device and precision in _AUTOCAST else "no"
        self.model = export.adapted_model(run).to(self.device)

    @torch.inference_mode()
    def logits(
        self, batch: Mapping[str, Tensor], reduce: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> np.ndarray:
        """The logits (N, outputs), float32, of what a transform made of N inputs; or what `reduce` keeps of them.

        reduce: of the logits and the labels of a batch, which then has some.
        """
        inputs = {name: tensor.to(self.device) for name, tensor in batch.items() if name != "labels"}
        with self._arithmetic():
            logits = self.model(**inputs).logits
        found = logits.float() if reduce is None else reduce(logits, batch["labels"].to(self.device))
        return found.cpu().numpy()

    def _arithmetic(self) -> contextlib.AbstractContextManager:
        if self.precision == "no":
            return contextlib.nullcontext()
        return torch.autocast(self.device, dtype=_AUTOCAST[self.precision])


class Predictor:
    """A finished run, ready to predict. Raises PartialLoraError where there is none, or not on that device.

    device: "cpu", "cuda", or "auto" for the second where there is one. max_new_tokens: the most that a generation
    writes, None for as many as the run's task has. member: of a mixture, the task that the inputs are of. `labels` is
    empty but where there are classes.
    """

    def __init__(
        self,
        run: FinishedRun | Path | str,
        *,
        device: str = "auto",
        max_new_tokens: int | None = None,
        member: str | None = None,
    ) -> None:
        run = run if isinstance(run, FinishedRun) else finished_run(Path(run))
        asked = asked_task(run, member)
        task, self.labels, self._outputs = asked.settings["task"], asked.labels, asked.outputs
        self.modality, self.kind = task["modality"], task["kind"]
        self._pairs = len(task["text_columns"]) == 2
        self._writing = {"stop": task["stop"], "max_new_tokens": max_new_tokens or task["max_new_tokens"]}
        self._layout = task["format"]
        self._batch_size = run.settings["trainer"]["eval_batch_size"]
        self._transform = build.transform_of(asked.settings)
        self._model = RunModel(run, device)

    def predict(self, inputs: Sequence, batch_size: int | None = None) -> list[Prediction]:
        """A prediction for every input, in order.

        inputs: paths of images or PIL images; texts or pairs of texts; prompts; or (prompt, options) of a choice.
        Batches are as large as in the run's own evaluation unless told otherwise. Raises PartialLoraError that names
        the first input that cannot be read.
        """
        size = batch_size or self._batch_size
        predictions = []
        for start in range(0, len(inputs), size):
            for outcome in self.outcomes(inputs[start : start + size]):
                if isinstance(outcome, PartialLoraError):
                    raise outcome
                predictions.append(outcome)
        return predictions

    def outcomes(self, inputs: Sequence) -> list[Prediction | PartialLoraError]:
        """One batch: a prediction for every input, in order, or what is wrong with it."""
        outcomes: list = self._encoded(inputs)
        readable = [place for place, outcome in enumerate(outcomes) if not isinstance(outcome, PartialLoraError)]
        if readable:
            given = [inputs[place] for place in readable]
            found = self._predicted(given, [outcomes[place] for place in readable])
            for place, prediction in zip(readable, found, strict=True):
                outcomes[place] = prediction
        return outcomes

    def _predicted(self, given: list, encoded: list) -> list[Prediction | PartialLoraError]:
        """What is said of inputs that can be read."""
        said = [_said(each) for each in given]
        if self.kind == "generation":
            texts = generate(self._model.model, self._transform, encoded, batch_size=len(encoded), **self._writing)
            return [Prediction(*each, None, {}) for each in zip(said, texts, strict=True)]
        if self.kind == "choice":
            size = max(len(encoded), *map(len, encoded))  # the options of one are not held back by a small batch
            found = likelihoods(encoded, self._model.logits, self._transform, size)
            return [_outcome(said[at], found[at], given[at][1]) for at in range(len(given))]
        logits = self._model.logits(self._batch(encoded))
        logits = logits if self._outputs is None else logits[:, self._outputs]
        return [_outcome(*each, self.labels) for each in zip(said, logits, strict=True)]

    def _encoded(self, inputs: Sequence) -> list:
        """Images as the pixels of the model's size, since as files they may be far larger; texts as they are.

        Of a question, which can be too long, the options as tokens. In place of what cannot be read, the error.
        """
        if self.kind == "choice":
            asked = [given for given in inputs if is_question(given)]
            rows = iter(rows_of(self._transform, self._layout, asked))
            expected = "(prompt, options)"
            return [next(rows) if is_question(given) else _unlike(given, expected) for given in inputs]
        if self.kind == "generation":
            return [_prompt(given) for given in inputs]
        if self.modality == "text":
            expected = "two texts" if self._pairs else "a text"
            return [given if _is_text(given, self._pairs) else _unlike(given, expected) for given in inputs]
        Image.init()  # before the threads, which would all do it
        with ThreadPoolExecutor(_DECODERS) as threads:
            return list(threads.map(self._pixels, inputs))

    def _pixels(self, given: object) -> Tensor | PartialLoraError:
        try:
            image = read_image(given)
            return self._transform.encode([image])["pixel_values"]
        except PartialLoraError as error:
            return error
        except (
            OSError,
            ValueError,
            TypeError,
            RuntimeError,
            MemoryError,
        ) as error:  # one odd image must not end a stream
            return PartialLoraError(f"{_said(given)}: cannot be made into what the model reads ({_reason(error)})")

    def _batch(self, encoded: list) -> dict[str, Tensor]:
        return self._transform.encode(encoded) if self.modality == "text" else {"pixel_values": torch.cat(encoded)}


def _outcome(said: str, logits: np.ndarray, labels: Sequence[str]) -> Prediction | PartialLoraError:
    if not np.isfinite(logits).all():
        return PartialLoraError(f"{said}: the model's output is not a finite number")
    if not labels:
        return Prediction(said, None, float(logits[0]), {})
    chances = np.exp(log_softmax(logits))
    order = np.argsort(-logits, kind="stable")  # the first of equals, as argmax takes it
    scores = {labels[index]: float(chances[index]) for index in order}
    return Prediction(said, labels[order[0]], float(chances[order[0]]), scores)


def read_image(given: object) -> Image.Image:
    """An image as the rows of a data set are decoded, turned as its EXIF says; one that is decoded stays as it is.

    Raises PartialLoraError, naming the file, for one that is not there or not an image.
    """
    if isinstance(given, Image.Image):
        return given
    if not isinstance(given, (str, Path)):
        raise _unlike(given, "the path of an image, or a PIL image")
    try:
        content = Path(given).read_bytes()  # read here: `datasets` would take some paths for addresses on the web
        if content:
            return datasets.Image().decode_example({"path": None, "bytes": content})
    except FileNotFoundError as error:
        raise PartialLoraError(f"{given}: no such image file") from error
    except Exception as error:  # Pillow's decoders raise whatever a broken file drives them into
        raise PartialLoraError(f"{given}: not an image that can be read ({_reason(error)})") from error
    raise PartialLoraError(f"{given}: not an image that can be read (an empty file)")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = " ".join(str(error).split()) or type(error).__name__
    return "its format is not known" if "cannot identify image file" in said else said[:200]


def _said(given: object) -> str:
    if isinstance(given, Image.Image):
        return str(getattr(given, "filename", ""))
    if is_question(given):
        return "\t".join([given[0], *given[1]])
    return "\t".join(given) if isinstance(given, (tuple, list)) else str(given)


def _prompt(given: object) -> str | PartialLoraError:
    if not isinstance(given, str):
        return _unlike(given, "a text")
    return given if given.strip() else PartialLoraError("an empty prompt: expected a text")


def _is_text(given: object, pairs: bool) -> bool:
    if not pairs:
        return isinstance(given, str)
    return isinstance(given, (tuple, list)) and len(given) == 2 and all(isinstance(part, str) for part in given)


def _unlike(given: object, expected: str) -> PartialLoraError:
    return PartialLoraError(f"an input of type {type(given).__name__}: expected {expected}")


def _device(requested: str) -> str:
    cuda = torch.cuda.is_available()
    if requested == "cuda" and not cuda:
        raise PartialLoraError("device=cuda: torch finds no CUDA device; use cpu")
    return "cuda" if cuda and requested != "cpu" else "cpu"
