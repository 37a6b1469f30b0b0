"""Metrics, computed offline; a model's predictions, one row an example; and the texts that it generates."""

from __future__ import annotations

import io
import itertools
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pandas
import torch
from scipy.special import log_softmax, softmax
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig

from partial_lora.files import write_atomic
from partial_lora.tasks import CausalTransform
from partial_lora.tasks.metrics import FUNCTIONS, IGNORED, mse
from partial_lora.tasks.prompts import Prompt


@cache
def offline(name: str):
    """Return a metric of `evaluate` by its name.

    evaluate fetches its own metric scripts from the hub; a subclass in the package needs no network. It is imported
    here because that is slow.
    """
    import datasets
    import evaluate

    kind = datasets.Value("float64" if name in ("pearson", "spearman", "mse") else "int64")

    class Offline(evaluate.Metric):
        def _info(self) -> evaluate.MetricInfo:
            return evaluate.MetricInfo(
                description=FUNCTIONS[name].__doc__,
                citation="",
                inputs_description="predictions and references: class indices, or numbers",
                features=datasets.Features({"predictions": kind, "references": kind}),
            )

        def _compute(self, predictions: Sequence, references: Sequence, **options: int) -> dict[str, float]:
            return {name: FUNCTIONS[name](np.asarray(predictions), np.asarray(references), **options)}

    with tempfile.TemporaryDirectory() as unused:  # evaluate makes a folder even for what it keeps in memory
        return Offline(keep_in_memory=True, cache_dir=unused)


def predicted(logits: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Return the classes of logits (N, outputs), or the one output where references are real numbers (N,)."""
    if np.issubdtype(references.dtype, np.floating):
        return logits.reshape(len(references))
    return logits.argmax(axis=-1)


def metrics_of(names: Sequence[str], logits: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """Return the named metrics of logits (N, classes) or (N, 1) against class indices or real numbers (N,)."""
    predictions, values = predicted(logits, references), {}
    for name in names:
        options = {"classes": logits.shape[-1]} if name == "f1" else {}
        values |= offline(name).compute(predictions=predictions, references=references, **options)
    return values


def mean_loss(logits: np.ndarray, references: np.ndarray) -> float:
    """Return the cross entropy, or squared error of real numbers, averaged over examples.

    Trainer's own average is over batches, which differs where the last batch is smaller or, with several processes,
    padded.
    """
    if np.issubdtype(references.dtype, np.floating):
        return mse(predicted(logits, references), references)
    return float(-np.take_along_axis(log_softmax(logits, axis=-1), references[:, None], axis=-1).mean())


def predictions_of(logits: np.ndarray, references: np.ndarray, labels: Sequence[str]) -> pandas.DataFrame:
    """Return one row an example, in the order of the split, so that two methods can be compared by example.

    Columns: index, label, prediction (class indices), their names, score (the softmax probability of the prediction)
    and the logits. A regression, which has no labels, has index, label, prediction and score (the same number), and
    the logits.
    """
    predictions = predicted(logits, references)
    columns = {"index": np.arange(len(logits)), "label": references, "prediction": predictions}
    if labels:
        columns["label_name"] = [labels[index] for index in references]
        columns["prediction_name"] = [labels[index] for index in predictions]
        columns["score"] = np.exp(log_softmax(logits, axis=-1)).max(axis=-1)
    else:
        columns["score"] = predictions
    columns["logits"] = list(logits.astype(np.float32))
    return pandas.DataFrame(columns)


def write_predictions(path: Path, frame: pandas.DataFrame) -> None:
    """Write predictions as parquet, atomically."""
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    write_atomic(path, buffer.getvalue())


# Options: the share of questions whose right option is the most likely one, as lm-evaluation-harness counts it.


def log_likelihoods(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Return the log likelihood of each row's answer and the number of its tokens (rows, 2), float64.

    Args:
        logits: (rows, length, vocabulary), or a model's outputs, whose first item they are.
        labels: (rows, length), -100 for tokens outside the answer; each is predicted at the place before it.

    As Trainer's preprocess_logits_for_metrics it keeps two numbers a row instead of a vocabulary a token.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    following = labels[:, 1:]
    is_answer = following != IGNORED
    # Only the logits of answers are copied: prompts are longer than answers, and vocabularies larger than either.
    losses = F.cross_entropy(logits[:, :-1][is_answer].float(), following[is_answer], reduction="none").double()
    sums = losses.new_zeros(is_answer.shape).masked_scatter(is_answer, losses).sum(1)
    return torch.stack([-sums, is_answer.sum(1).double()], dim=1)


def option_predictions(
    log_likelihoods: np.ndarray, items: np.ndarray, right: np.ndarray, characters: np.ndarray
) -> dict[str, list]:
    """Return the columns label, prediction, prediction_norm and scores of all questions, in the order of their numbers.

    Args:
        log_likelihoods: (rows,), of one option each, a sum over its tokens.
        items: the number of the question (rows,); the options of a question are in their order.
        right: True for the right option (rows,).
        characters: the length of the option (rows,).

    label, prediction and prediction_norm are places of options: the right one, the most likely in sum and per
    character (of equals the first). scores: the softmax over a question's options, an array each.
    """
    columns: dict[str, list] = {"label": [], "prediction": [], "prediction_norm": [], "scores": []}
    order = np.argsort(items, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(items[order])) + 1):
        sums = np.asarray(log_likelihoods[rows], dtype=np.float64)
        columns["label"].append(int(np.argmax(right[rows])))
        columns["prediction"].append(int(np.argmax(sums)))
        columns["prediction_norm"].append(int(np.argmax(sums / np.maximum(characters[rows], 1))))
        columns["scores"].append(softmax(sums))
    return columns


def option_metrics(columns: dict[str, list]) -> dict[str, float]:
    """Return lm-evaluation-harness's acc and acc_norm of `option_predictions`."""
    label = np.asarray(columns["label"])
    return {
        "accuracy": float(np.mean(np.asarray(columns["prediction"]) == label)),
        "accuracy_norm": float(np.mean(np.asarray(columns["prediction_norm"]) == label)),
    }


# Generation.


def generation_config(
    model: nn.Module, transform: CausalTransform, max_new_tokens: int, stop: Sequence[str], temperature: float = 0.0
) -> GenerationConfig:
    """Return how texts are generated: at temperature 0 the most likely token, else one drawn at that temperature."""
    tokenizer, own = transform.tokenizer, model.generation_config.eos_token_id
    # The tokens that end a text: the tokenizer's, which the model was trained on here, and the model's own.
    ends = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        num_beams=1,
        repetition_penalty=1.0,  # a model's own settings would make another token the most likely
        no_repeat_ngram_size=0,
        min_length=0,
        temperature=temperature or 1.0,
        top_p=1.0,
        top_k=0 if temperature > 0 else 50,
        eos_token_id=ends or None,
        pad_token_id=next(end for end in (tokenizer.pad_token_id, *ends, 0) if end is not None),
        stop_strings=list(stop) or None,
    )


def generate(
    model: nn.Module,
    transform: CausalTransform,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_size: int = 8,
    progress: Callable[[int, int], object] | None = None,
    together: bool = False,
) -> list[str]:
    """Return the text that the model generates after each prompt, without space around it.

    A text ends before the first of the strings in `stop`, at the model's end token or after `max_new_tokens`. Prompts
    of like length share a batch, which changes no text unless two tokens are equally likely. `progress(done, total)` is
    called after every batch. `together`: processes with a sharded model generate together, each the same number of
    texts. The model is left in the mode it was in.
    """
    tokenizer, greedy = transform.tokenizer, generation_config(model, transform, max_new_tokens, stop)
    ends = greedy.eos_token_id or []
    longest_first = sorted(range(len(prompts)), key=lambda place: -len(str(prompts[place])))
    texts = [""] * len(prompts)
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        for start in range(0, len(prompts), batch_size):
            places = longest_first[start : start + batch_size]
            encoded = transform.encode([prompts[place] for place in places])
            inputs = {name: value.to(device) for name, value in encoded.items()}
            with torch.no_grad():
                generated = model.generate(
                    **inputs,
                    generation_config=greedy,
                    tokenizer=tokenizer if stop else None,
                    synced_gpus=together,
                )
            for place, tokens in zip(places, generated[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                written = itertools.takewhile(lambda token: token not in ends, tokens)
                text = tokenizer.decode(list(written), skip_special_tokens=True)
                stops = [text.find(each) for each in stop if each in text]
                texts[place] = text[: min(stops, default=len(text))].strip()
            if progress is not None:
                progress(start + len(places), len(prompts))
    finally:
        model.train(training)
    return texts
