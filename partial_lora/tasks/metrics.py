"""Metrics: what each is, and which labels it fits."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal

import numpy as np

IGNORED = -100  # the label of a token that does not count, as in transformers


def standard_error(score: float, count: int) -> float:
    """Return about how far off a score is that was measured on so many rows: that of a share, also for correlations.

    One right and one wrong row are added, so that it is not 0 for a perfect score (Agresti and Coull, 1998).
    """
    share = (min(max(score, 0.0), 1.0) * count + 1) / (count + 2)
    return math.sqrt(share * (1 - share) / (count + 2))


def accuracy(predictions: np.ndarray, references: np.ndarray) -> float:
    """Return the share of predictions that equal their reference."""
    return float(np.mean(predictions == references))


def mse(predictions: np.ndarray, references: np.ndarray) -> float:
    """Return the mean squared error."""
    return float(np.mean((predictions - references) ** 2))


def f1(predictions: np.ndarray, references: np.ndarray, classes: int | None = None) -> float:
    """Return F1 of the second of two classes, as GLUE has it; of more classes, the mean over those that occur (macro).

    classes: how many there are; None for as many as are seen.
    """
    from sklearn.metrics import f1_score  # slow to import, as scipy.stats is: only runs with such a metric do

    if (classes or max(predictions.max(), references.max()) + 1) == 2:
        return float(f1_score(references, predictions, pos_label=1, zero_division=0))
    return float(f1_score(references, predictions, average="macro", zero_division=0))


def matthews(predictions: np.ndarray, references: np.ndarray) -> float:
    """Return Matthews' correlation of two or more classes; 0 for a constant."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(references, predictions))


def pearson(predictions: np.ndarray, references: np.ndarray) -> float:
    """Return the linear correlation; 0 for a constant, which says nothing of the labels."""
    return _correlation("pearsonr", predictions, references)


def spearman(predictions: np.ndarray, references: np.ndarray) -> float:
    """Return the correlation of the ranks; 0 for a constant."""
    return _correlation("spearmanr", predictions, references)


def _correlation(name: str, predictions: np.ndarray, references: np.ndarray) -> float:
    from scipy import stats

    if np.ptp(predictions) == 0 or np.ptp(references) == 0:
        return 0.0
    return float(getattr(stats, name)(predictions, references).statistic)


# --- How close texts come to their references.

_WORD = r"[^\W_]+"  # in ASCII the words of rouge_score's own tokenizer, which finds none in other alphabets
_MARK = "####"  # before the answer, in GSM8K
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]%])[-+−])?"  # after a digit or a bracket it is an operator: 16-3 has no number -3
    r"(?:[$€£](?P<inner>[-+−])?)?"
    r"(?P<digits>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
)


def final_number(text: str) -> Decimal | None:
    """Return the number that is the answer: the first one after ####, or the last one where there is no ####.

    Signs, commas between thousands, decimals and a currency's sign are understood: "-$1,234.50" is -1234.50. None for a
    text without a number.
    """
    _, mark, after = text.partition(_MARK)
    numbers = list(_NUMBER.finditer(after if mark else text))
    if not numbers:
        return None
    number = numbers[0 if mark else -1]
    size = Decimal(number["digits"].replace(",", ""))
    return -size if (number["sign"] or number["inner"] or "+") in "-−" else size


def exact_match(texts: Sequence[str], references: Sequence[str], answer: str | None) -> np.ndarray:
    """Return 1 for a text whose answer equals its reference's, else 0 (N,).

    answer: "number", the final number in a text (`final_number`), or None, all of it but space around it.
    """
    extract = final_number if answer == "number" else str.strip
    pairs = [(extract(text), extract(reference)) for text, reference in zip(texts, references, strict=True)]
    return np.array([text is not None and text == reference for text, reference in pairs], dtype=np.float64)


def rouge_l(texts: Sequence[str], references: Sequence[str], answer: str | None = None) -> np.ndarray:
    """Return the F-measure of ROUGE-L of each text against its reference (N,): words in the same order (Lin 2004)."""
    scores = []
    for text, reference in zip(texts, references, strict=True):
        words, expected = (re.findall(_WORD, line.lower()) for line in (text, reference))
        common = _longest_common(words, expected)
        precision, recall = (common / max(len(sequence), 1) for sequence in (words, expected))
        scores.append(2 * precision * recall / (precision + recall) if common else 0.0)
    return np.array(scores)


def _longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the number of words of the longest sequence that both have, with any others between."""
    longest = [0] * (len(second) + 1)  # of the words of `first` so far and the first few of `second`
    for word in first:
        before, longest = longest, [0]
        for place, second_word in enumerate(second):
            longest.append(before[place] + 1 if word == second_word else max(before[place + 1], longest[-1]))
    return longest[-1]


# --- What there is of each metric.

_CLASSES, _NUMBERS, _OPTIONS, _TEXTS = "classes", "real numbers", "places of options", "texts"  # what labels are
_CORRELATION = (-1.0, 1.0)


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        of: what the labels of a task are that may have it.
        function: (predictions, references) -> the metric, each an array of one dimension; None for one of tokens.
        of_texts: (texts, references, what is compared of them: `task.answer`) -> a score for each.
        range: the least and the most that it can be; None for a share, which is read as a percentage.
        lower_is_better: less of it is better.
        of_all_together: it is no mean over examples.
        of_examples: the predictions of single examples tell it.
    """

    of: tuple[str, ...]
    function: Callable[..., float] | None = None
    of_texts: Callable[..., np.ndarray] | None = None
    range: tuple[float, float] | None = None
    lower_is_better: bool = False
    of_all_together: bool = False
    of_examples: bool = True


METRICS = {  # of the metrics of one kind of labels, the first is the usual one
    "accuracy": Metric((_CLASSES, _OPTIONS), accuracy),
    "accuracy_norm": Metric((_OPTIONS,)),
    "f1": Metric((_CLASSES,), f1, of_all_together=True),
    "matthews": Metric((_CLASSES,), matthews, range=_CORRELATION, of_all_together=True),
    "pearson": Metric((_NUMBERS,), pearson, range=_CORRELATION, of_all_together=True),
    "spearman": Metric((_NUMBERS,), spearman, range=_CORRELATION, of_all_together=True),
    "mse": Metric((_NUMBERS,), mse, range=(0.0, math.inf), lower_is_better=True),
    "exact_match": Metric((_TEXTS,), of_texts=exact_match),
    "rouge_l": Metric((_TEXTS,), of_texts=rouge_l),
    "perplexity": Metric((_TEXTS,), range=(1.0, math.inf), lower_is_better=True, of_examples=False),
}
FITTING = {
    labels: tuple(name for name, metric in METRICS.items() if labels in metric.of)
    for labels in (_CLASSES, _NUMBERS, _OPTIONS, _TEXTS)
}
GUESSES = {  # the best prediction that is the same for all examples, by metric: what has learnt anything beats it
    name: "the mean" if _NUMBERS in metric.of else "the largest class"
    for name, metric in METRICS.items()
    if _TEXTS not in metric.of
}
OF_TEXTS = {name: metric.of_texts for name, metric in METRICS.items() if metric.of_texts}
FUNCTIONS = {name: metric.function for name, metric in METRICS.items() if metric.function}
SHARES = {name for name, metric in METRICS.items() if metric.range is None}
LOWER_IS_BETTER = {name for name, metric in METRICS.items() if metric.lower_is_better}
OF_ALL_TOGETHER = {name for name, metric in METRICS.items() if metric.of_all_together}
OF_EXAMPLES = {name for name, metric in METRICS.items() if metric.of_examples}


def within(ends: Sequence[float], metric: str, *, difference: bool = False, room: float = 0.0) -> tuple[float, float]:
    """Return the ends of an interval that reach no further, but for `room`, than a metric or a difference of it can."""
    low, high = (METRICS[metric].range or (0.0, 1.0)) if metric in METRICS else (-math.inf, math.inf)
    low, high = (low - high, high - low) if difference else (low, high)
    return max(ends[0], low - room), min(ends[1], high + room)
