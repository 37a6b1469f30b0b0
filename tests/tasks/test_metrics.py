"""Metrics of texts: the number that is an answer, and how close a text comes to its reference."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pytest

from partial_lora.tasks.metrics import exact_match, final_number, rouge_l


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 1,234", "1234"),
        ("$5.00", "5"),
        ("so it is -7.", "-7"),
        ("−3 degrees", "-3"),
        ("+4", "4"),
        ("-$1,234.50 is lost", "-1234.50"),
        ("$-2", "-2"),
        ("16-3", "3"),
        ("(2+5)-3=4", "4"),
        ("= -3", "-3"),
        ("50%-5", "5"),
        ("2 pens, 3 cups", "3"),
        ("1,234,567.8", "1234567.8"),
        ("1,2,3", "3"),
        ("12,3456", "3456"),
        (".5", "0.5"),
        ("18.", "18"),
        ("#### 18\nThat is 3 more", "18"),
        ("9 apples #### none", None),
        ("none", None),
    ],
)
def test_the_final_number_of_a_text(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


def test_exact_matches_are_of_numbers_or_of_whole_texts() -> None:
    texts = ["It is $5.00.", "#### 1,234", "no idea", "7 or 8", "5"]
    references = ["2+3=<<2+3=5>>5\n#### 5", "#### 1234", "#### 3", "#### 7", "#### -5"]
    assert exact_match(texts, references, "number").tolist() == [1, 1, 0, 0, 0]
    assert exact_match([" a b\n", "a  b", ""], ["a b", "a b", "x"], None).tolist() == [1, 0, 0]


def test_rouge_l_is_that_of_the_longest_common_words() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    draw, package = np.random.default_rng(0), RougeScorer(["rougeL"])
    texts, references = ([" ".join(draw.choice(list("abcde"), draw.integers(40))) for _ in range(50)] for _ in range(2))
    texts += ["the cat sat on the mat", "On the mat, sat the CAT!", ""]
    references += ["the cat lay on a mat", "the cat sat on the mat", "something"]
    expected = [package.score(b, a)["rougeL"].fmeasure for a, b in zip(texts, references, strict=True)]
    assert rouge_l(texts, references).tolist() == expected
    assert rouge_l(["größe und maß"], ["Größe und Maß"]).tolist() == [1.0]
