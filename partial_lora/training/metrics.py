"""How good a model is: metrics computed offline, and what it said about every example."""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas
import torch
from scipy.special import log_softmax, softmax
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig

from partial_lora.calibration import score
from partial_lora.calibration.score import IGNORED
from partial_lora.files import write_atomic
from partial_lora.tasks import CausalTransform, final_number


def _accuracy(predictions: np.ndarray, references: np.ndarray) -> float:
    return float(np.mean(predictions == references))


def _mse(predictions: np.ndarray, references: np.ndarray) -> float:
    return float(np.mean((predictions - references) ** 2))


_FUNCTIONS: dict[str, Callable[..., float]] = {
    "accuracy": _accuracy,
    "f1": score.f1,
    "matthews": score.matthews,
    "pearson": score.pearson,
    "spearman": score.spearman,
    "mse": _mse,
}
_SAID = {
    "accuracy": "Share of predictions that equal their reference.",
    "f1": "Harmonic mean of precision and recall of the second of two classes, or averaged over more.",
    "matthews": "Matthews' correlation of predicted and true classes.",
    "pearson": "Linear correlation.",
    "spearman": "Correlation of the ranks.",
    "mse": "Mean squared error.",
}


@cache
def offline(name: str):
    """A metric of `evaluate` by its name.

    evaluate fetches its own metric scripts from the hub; a subclass in the package needs no network. Its import is
    slow and must not share a line with that of datasets, hence here.
    """
    import datasets
    import evaluate

    kind = datasets.Value("float64" if name in ("pearson", "spearman", "mse") else "int64")

    class Offline(evaluate.Metric):
        def _info(self) -> evaluate.MetricInfo:
            return evaluate.MetricInfo(
                description=_SAID[name],
                citation="",
                inputs_description="predictions and references: class indices, or numbers",
                features=datasets.Features({"predictions": kind, "references": kind}),
            )

        def _compute(self, predictions: Sequence, references: Sequence, **options: int) -> dict[str, float]:
            return {name: _FUNCTIONS[name](np.asarray(predictions), np.asarray(references), **options)}

    with tempfile.TemporaryDirectory() as unused:  # evaluate makes a folder even for what it keeps in memory
        return Offline(keep_in_memory=True, cache_dir=unused)


def function_of(name: str, classes: int | None = None) -> Callable[[np.ndarray, np.ndarray], float]:
    """The bare function (predictions, references) -> float of a metric, for who calls it thousands of times."""
    options = {"classes": classes} if name == "f1" else {}
    return partial(_FUNCTIONS[name], **options)


def predicted(logits: np.ndarray, references: np.ndarray) -> np.ndarray:
    """What logits (N, outputs) say: the class, or the one output where references are real numbers (N,)."""
    if np.issubdtype(references.dtype, np.floating):
        return logits.reshape(len(references))
    return logits.argmax(axis=-1)


def metrics_of(names: Sequence[str], logits: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """The named metrics of logits (N, classes) or (N, 1) against class indices or real numbers (N,)."""
    said = predicted(logits, references)
    options = {"f1": {"classes": logits.shape[-1]}}
    found = {}
    for name in names:
        found |= offline(name).compute(predictions=said, references=references, **options.get(name, {}))
    return found


def mean_loss(logits: np.ndarray, references: np.ndarray) -> float:
    """The cross entropy, or squared error of real numbers, averaged over examples.

    Trainer's own average over batches is not that where the last batch is smaller or, with several processes, filled
    up.
    """
    if np.issubdtype(references.dtype, np.floating):
        return _mse(predicted(logits, references), references)
    log_chances = np.take_along_axis(log_softmax(logits, axis=-1), references[:, None], axis=-1)
    return float(-log_chances.mean())


def split_metrics(names: Sequence[str], logits: np.ndarray, references: np.ndarray) -> dict:
    """The metrics of a split under their plain names, and its loss; `primary` names the main one, the first."""
    found = metrics_of(names, logits, references)
    return {"primary": names[0], **found, "loss": mean_loss(logits, references)}


def predictions_of(logits: np.ndarray, references: np.ndarray, labels: Sequence[str]) -> pandas.DataFrame:
    """What was said about every example, so that two methods can be compared example by example.

    One row an example, in the order of the split: index, label, prediction (class indices), their names, score (the
    softmax probability of the prediction) and the logits. Of a regression, which has no labels: index, label,
    prediction and score (the same number), and the logits.
    """
    said = predicted(logits, references)
    columns = {"index": np.arange(len(logits)), "label": references, "prediction": said}
    if labels:
        columns["label_name"] = [labels[index] for index in references]
        columns["prediction_name"] = [labels[index] for index in said]
        columns["score"] = np.exp(log_softmax(logits, axis=-1)).max(axis=-1)
    else:
        columns["score"] = said
    columns["logits"] = list(logits.astype(np.float32))
    return pandas.DataFrame(columns)


def write_predictions(path: Path, frame: pandas.DataFrame) -> None:
    """Keep predictions as parquet, whole or not at all."""
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    write_atomic(path, buffer.getvalue())


# --- How often the right one of several options is the likeliest, as lm-evaluation-harness counts it.


def log_likelihoods(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """The log likelihood of each row's answer, and the number of its tokens (rows, 2), float64.

    Args:
        logits: (rows, length, vocabulary), or a model's outputs, of which they are the first.
        labels: (rows, length), -100 where no token is asked for; each is foretold at the place before it.

    As Trainer's preprocess_logits_for_metrics it keeps two numbers a row of what would be a vocabulary a token.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    following = labels[:, 1:]
    asked = following != IGNORED
    # Of the logits only those of answers are copied: prompts are longer than answers, vocabularies than either.
    losses = F.cross_entropy(logits[:, :-1][asked].float(), following[asked], reduction="none").double()
    sums = losses.new_zeros(asked.shape).masked_scatter(asked, losses).sum(1)
    return torch.stack([-sums, asked.sum(1).double()], dim=1)


def predictions(log_likelihoods: np.ndarray, items: np.ndarray, right: np.ndarray, characters: np.ndarray) -> dict:
    """What is said about every question, in the order of their numbers.

    Args:
        log_likelihoods: (rows,), one an option, a sum over its tokens. items: the question's number (rows,); the
            options of one are in their order. right: whether it is the right option (rows,). characters: how long it
            is (rows,).

    Returns label, prediction and prediction_norm (places of options: the right one, the likeliest, the likeliest a
    character; of equals the first), and scores: the softmax over a question's options, an array each.
    """
    columns: dict[str, list] = {"label": [], "prediction": [], "prediction_norm": [], "scores": []}
    for rows in _questions(items):
        said = np.asarray(log_likelihoods[rows], dtype=np.float64)
        columns["label"].append(int(np.argmax(right[rows])))
        columns["prediction"].append(int(np.argmax(said)))
        columns["prediction_norm"].append(int(np.argmax(said / np.maximum(characters[rows], 1))))
        columns["scores"].append(softmax(said))
    return columns


def option_metrics(
    log_likelihoods: np.ndarray, items: np.ndarray, right: np.ndarray, characters: np.ndarray
) -> dict[str, float]:
    """The share of questions whose right option is the likeliest, in sum and a character; arguments as above.

    They are lm-evaluation-harness's acc and acc_norm.
    """
    said = predictions(log_likelihoods, items, right, characters)
    label = np.asarray(said["label"])
    return {
        "accuracy": float(np.mean(np.asarray(said["prediction"]) == label)),
        "accuracy_norm": float(np.mean(np.asarray(said["prediction_norm"]) == label)),
    }


def _questions(items: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of every question."""
    order = np.argsort(items, kind="stable")
    yield from np.split(order, np.flatnonzero(np.diff(items[order])) + 1)


# --- Texts that a model writes, always the likeliest token next, and how close they come to what was asked for.

_WORD = r"[^\W_]+"  # ASCII texts have the words that the package's own tokenizer finds; others have words at all


def generate(
    model: nn.Module,
    transform: CausalTransform,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_size: int = 8,
    progress: Callable[[int, int], object] | None = None,
    together: bool = False,
) -> list[str]:
    """What the model writes after each prompt, without space around it.

    It ends before the first of the texts in `stop`, at the model's end token or after `max_new_tokens`. Prompts of like
    length share a batch, which changes no text but where two tokens are equally likely. `progress(done, total)` is told
    of every batch. `together`: processes that hold the model in parts write together, each as many texts as the others.
    The model is left in the mode it was in.
    """
    tokenizer, ends = transform.tokenizer, _ends(model, transform)
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,  # a model's own settings would make another token the likeliest
        no_repeat_ngram_size=0,
        min_length=0,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        eos_token_id=ends or None,
        pad_token_id=next(end for end in (tokenizer.pad_token_id, *ends, 0) if end is not None),
        stop_strings=list(stop) or None,
    )
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    texts = [""] * len(prompts)
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            inputs = {
                name: value.to(device) for name, value in transform.encode([prompts[at] for at in places]).items()
            }
            with torch.no_grad():
                written = model.generate(
                    **inputs,
                    generation_config=greedy,
                    tokenizer=tokenizer if stop else None,
                    synced_gpus=together,
                )
            for place, tokens in zip(places, written[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                texts[place] = _text(tokenizer.decode(_until(tokens, ends), skip_special_tokens=True), stop)
            if progress is not None:
                progress(start + len(places), len(order))
    finally:
        model.train(training)
    return texts


def exact_match(said: Sequence[str], references: Sequence[str], answer: str | None) -> np.ndarray:
    """1 for a text whose answer is that of its reference, 0 for another (N,).

    answer: "number", the number a text comes to (`tasks.final_number`), or None, all of it but space around it.
    """
    if answer == "number":
        pairs = [
            (final_number(text), final_number(reference)) for text, reference in zip(said, references, strict=True)
        ]
        return np.array([found is not None and found == asked for found, asked in pairs], dtype=np.float64)
    pairs = zip(said, references, strict=True)
    return np.array([text.strip() == reference.strip() for text, reference in pairs], dtype=np.float64)


def rouge_l(said: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """The F-measure of ROUGE-L of each text against its reference (N,): words in the same order (Lin 2004)."""
    from rouge_score.rouge_scorer import RougeScorer

    class _Words:
        def tokenize(self, text: str) -> list[str]:
            return re.findall(_WORD, text.lower())

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    pairs = zip(references, said, strict=True)
    return np.array([scorer.score(reference, text)["rougeL"].fmeasure for reference, text in pairs])


def _ends(model: nn.Module, transform: CausalTransform) -> list[int]:
    """The tokens that end a text, by the model's own account and by the tokenizer's, which it is trained on."""
    own = model.generation_config.eos_token_id
    ends = [transform.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return list(dict.fromkeys(end for end in ends if end is not None))


def _until(tokens: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The tokens before the first that ends a text: what follows is padding."""
    at = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[:at])


def _text(text: str, stop: Sequence[str]) -> str:
    """A text up to the first place where any of `stop` is."""
    places = [place for place in (text.find(each) for each in stop) if place >= 0]
    return text[: min(places, default=len(text))].strip()
