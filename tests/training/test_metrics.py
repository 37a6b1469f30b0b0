"""Metrics without a network; predictions by example; options and generated texts against one sequence at a time."""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path

import datasets
import evaluate
import numpy as np
import pandas
import pytest
import torch
from scipy.special import softmax
from sklearn import metrics as sklearn_metrics
from tiny_causal import bytes_tokenizer, llama, merging_tokenizer

from partial_lora import tasks
from partial_lora.tasks import questions
from partial_lora.tasks.metrics import exact_match, rouge_l
from partial_lora.training import metrics

LOGITS = np.array([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [0.0, 4.0], [0.0, 1.0]])
CLASSES = np.array([0, 1, 1, 1, 0])
OUTPUTS, NUMBERS = np.array([[0.5], [1.0], [2.0], [4.0]]), np.array([0.0, 1.0, 4.0, 3.0])


def test_metrics_need_no_network_and_keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", "/dev/null/metrics")  # no folder can be made there
    metrics.offline.cache_clear()
    for _ in range(2):
        assert metrics.metrics_of(["accuracy"], LOGITS, CLASSES) == {"accuracy": 0.6}


def test_metrics_of_classes_are_those_of_scikit_learn() -> None:
    classes = LOGITS.argmax(-1)
    assert metrics.metrics_of(["matthews", "f1"], LOGITS, CLASSES) == {
        "matthews": sklearn_metrics.matthews_corrcoef(CLASSES, classes),
        "f1": sklearn_metrics.f1_score(CLASSES, classes),
    }
    three = np.eye(3)[[0, 1, 2, 2, 0]]
    macro = sklearn_metrics.f1_score(CLASSES, three.argmax(-1), average="macro")
    assert metrics.metrics_of(["f1"], three, CLASSES) == {"f1": pytest.approx(macro)}


def test_metrics_of_numbers() -> None:
    found = metrics.metrics_of(["pearson", "spearman", "mse"], OUTPUTS, NUMBERS)
    assert found["pearson"] == pytest.approx(np.corrcoef(OUTPUTS[:, 0], NUMBERS)[0, 1])
    assert found["spearman"] == pytest.approx(0.8)  # ranks 1 2 3 4 against 1 2 4 3
    assert found["mse"] == pytest.approx((0.25 + 0 + 4 + 1) / 4)


def test_the_loss_is_averaged_over_examples() -> None:
    expected = sklearn_metrics.log_loss(CLASSES, softmax(LOGITS, axis=-1))
    assert metrics.mean_loss(LOGITS, CLASSES) == pytest.approx(expected)
    assert metrics.mean_loss(OUTPUTS, NUMBERS) == pytest.approx(1.3125)


def test_predictions_of_a_regression_are_numbers(tmp_path: Path) -> None:
    metrics.write_predictions(tmp_path / "predictions.parquet", metrics.predictions_of(OUTPUTS, NUMBERS, ()))
    frame = pandas.read_parquet(tmp_path / "predictions.parquet")
    assert list(frame) == ["index", "label", "prediction", "score", "logits"]
    assert frame["label"].tolist() == NUMBERS.tolist()
    assert frame["prediction"].tolist() == frame["score"].tolist() == OUTPUTS[:, 0].tolist()


def test_predictions_are_one_row_an_example(tmp_path: Path) -> None:
    logits = np.array([[0.0, np.log(3.0)], [1000.0, 0.0]])
    frame = metrics.predictions_of(logits, np.array([1, 1]), ("cat", "dog"))
    metrics.write_predictions(tmp_path / "predictions.parquet", frame)
    frame = pandas.read_parquet(tmp_path / "predictions.parquet")
    assert frame[["index", "label", "prediction"]].values.tolist() == [[0, 1, 1], [1, 1, 0]]
    assert frame["label_name"].tolist() == ["dog", "dog"]
    assert frame["prediction_name"].tolist() == ["dog", "cat"]
    assert frame["score"].tolist() == pytest.approx([0.75, 1.0])
    assert np.allclose(np.stack(frame["logits"]), logits)


# Options

QUESTIONS = ["Question: which of these is a bird?\nAnswer:", "the man", "two and two is", "the end\nthe start"]
OPTIONS = [
    [" the robin", " snow", " a bird, and four"],
    [" writes", " drives on"],
    [" four", " two"],
    [" of it", " is"],
]
LABELS = [0, 0, 1, 1]


def rows() -> datasets.Dataset:
    prompts = [[prompt] * len(options) for prompt, options in zip(QUESTIONS, OPTIONS, strict=True)]
    data = {"prompts": prompts, "options": OPTIONS, "label": LABELS}
    return datasets.Dataset.from_dict(data, features=questions.CHOICE_FEATURES)


@torch.no_grad()
def literal(model, row: dict) -> float:
    """Return the log probability of an option: token after token, one sequence, no padding."""
    total = 0.0
    for place in range(row["answer_start"], row["length"]):
        logits = model(input_ids=torch.tensor([row["input_ids"][:place]])).logits[0, -1]
        total += float(logits.double().log_softmax(0)[row["input_ids"][place]])
    return total


@pytest.fixture(scope="module")
def scored() -> tuple:
    tokenizer = merging_tokenizer()
    transform, model = tasks.CausalTransform(tokenizer, 64, kind="choice"), llama(tokenizer, seed=2)
    options = transform.options(rows(), cache_bytes=0)
    return model, transform, options, np.array([literal(model, row) for row in options])


def test_likelihoods_are_those_of_a_loop_over_tokens(scored) -> None:
    model, transform, options, expected = scored
    batch = transform.collate(options.to_list())
    assert len(set(options["length"])) > 2  # so there is padding
    with torch.no_grad():
        logits = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
    found = metrics.log_likelihoods(logits, batch["labels"])
    assert found.shape == (len(options), 2)
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-4)
    assert found[:, 1].tolist() == [row["length"] - row["answer_start"] for row in options]
    assert torch.equal(metrics.log_likelihoods((logits, "cache"), batch["labels"]), found)


def test_accuracies_are_those_of_a_loop_over_questions(scored) -> None:
    *_, options, likelihoods = scored
    columns = [np.asarray(options[name]) for name in ("item", "right", "characters")]
    at, hits, normed, predictions = 0, [], [], metrics.option_predictions(likelihoods, *columns)
    for number, (texts, label) in enumerate(zip(OPTIONS, LABELS, strict=True)):
        sums = likelihoods[at : at + len(texts)]
        a_character = [value / len(text[1:]) for value, text in zip(sums, texts, strict=True)]
        hits.append(max(range(len(texts)), key=lambda place: sums[place]) == label)
        normed.append(max(range(len(texts)), key=lambda place: a_character[place]) == label)
        assert predictions["label"][number] == label
        np.testing.assert_allclose(predictions["scores"][number], np.exp(sums) / np.exp(sums).sum())
        at += len(texts)
    assert np.mean(hits) != np.mean(normed)
    assert predictions["prediction"] == [
        int(np.argmax(likelihoods[columns[0] == item])) for item in range(len(OPTIONS))
    ]
    assert metrics.option_metrics(predictions) == {"accuracy": np.mean(hits), "accuracy_norm": np.mean(normed)}


def test_of_equally_likely_options_the_first_counts_and_length_is_in_characters() -> None:
    items, right = np.array([0, 0, 1, 1]), np.array([True, False, False, True])
    likelihoods, characters = np.array([-4.0, -4.0, -4.0, -6.0]), np.array([4, 4, 2, 6])
    columns = metrics.option_predictions(likelihoods, items, right, characters)
    assert metrics.option_metrics(columns) == {"accuracy": 0.5, "accuracy_norm": 1.0}


# Generation

PROMPTS = [
    "two",
    "Question: which of these is a bird?\nAnswer:",
    "the man  writes over the snow, then he",
    "a",
    "ab cd",
]


@torch.no_grad()
def written(model, tokenizer, prompt: str, most: int, ends: tuple[int, ...]) -> list[int]:
    """Return the most likely tokens, each after the whole text so far: no batch, no padding, no cache."""
    context = [tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
    tokens: list[int] = []
    while len(tokens) < most:
        token = int(model(input_ids=torch.tensor([context + tokens]), use_cache=False).logits[0, -1].argmax())
        if token in ends:
            break
        tokens.append(token)
    return tokens


def literal_texts(model, tokenizer, most: int, *ends: int) -> list[str]:
    texts = [written(model, tokenizer, prompt, most, (tokenizer.eos_token_id, *ends)) for prompt in PROMPTS]
    return [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in texts]


def plain(text: str) -> str:
    """Return the first two letters or signs of a text that no other text is likely to have."""
    return re.search(r"[!-~]{2}", text).group()


@pytest.fixture(scope="module", params=["bytes", "merged"])
def writer(request):
    tokenizer = bytes_tokenizer() if request.param == "bytes" else merging_tokenizer()
    return llama(tokenizer, seed=3), tokenizer, tasks.CausalTransform(tokenizer, 64)


def test_a_batch_writes_what_each_prompt_gets_alone(writer) -> None:
    model, tokenizer, transform = writer
    expected = literal_texts(model, tokenizer, 12)
    assert len(set(expected)) == len(PROMPTS)
    for size in (1, 2, 5):
        seen = []
        texts = metrics.generate(
            model,
            transform,
            PROMPTS,
            max_new_tokens=12,
            batch_size=size,
            progress=lambda done, total, seen=seen: seen.append((done, total)),
        )
        assert texts == expected
        assert seen == [(min(start + size, 5), 5) for start in range(0, 5, size)]
    assert not model.training


def test_an_end_token_ends_its_own_text_alone(writer, monkeypatch) -> None:
    model, tokenizer, transform = writer
    whole = literal_texts(model, tokenizer, 12)
    end = written(model, tokenizer, PROMPTS[1], 12, ())[3]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [tokenizer.eos_token_id, end])  # the model's own
    expected = literal_texts(model, tokenizer, 12, end)
    assert 0 < sum(text != full for text, full in zip(expected, whole, strict=True)) < len(PROMPTS)
    model.train()
    assert metrics.generate(model, transform, PROMPTS, max_new_tokens=12, batch_size=5) == expected
    assert model.training
    model.eval()


def test_texts_are_cut_at_the_first_of_the_stops(writer) -> None:
    model, _, transform = writer
    whole = metrics.generate(model, transform, PROMPTS, max_new_tokens=12)
    stops = [plain(whole[1]), plain(whole[1][::-1])[::-1], plain(whole[4])]
    expected = [min((text.partition(stop)[0] for stop in stops), key=len).strip() for text in whole]
    assert 1 < sum(text != full for text, full in zip(expected, whole, strict=True)) < len(PROMPTS)
    assert metrics.generate(model, transform, PROMPTS, max_new_tokens=12, stop=stops, batch_size=3) == expected


def test_a_token_that_holds_two_stops_is_cut_at_the_first() -> None:
    tokenizer = merging_tokenizer()
    model, transform = llama(tokenizer, seed=3), tasks.CausalTransform(tokenizer, 64)
    first = tokenizer.decode(written(model, tokenizer, PROMPTS[1], 1, ()))
    assert len(set(first)) == len(first) >= 3
    assert metrics.generate(model, transform, PROMPTS[1:2], max_new_tokens=3, stop=[first[2], first[1]]) == [first[0]]


def test_nothing_more_is_written_after_a_stop(writer, monkeypatch) -> None:
    model, _, transform = writer
    (whole,) = metrics.generate(model, transform, PROMPTS[4:], max_new_tokens=40)
    calls, forward = [], model.forward

    def counted(*arguments: object, **named: object):
        calls.append(1)
        return forward(*arguments, **named)

    monkeypatch.setattr(model, "forward", counted)
    metrics.generate(model, transform, PROMPTS[4:], max_new_tokens=40, stop=[plain(whole)])
    assert len(calls) < 20


def test_a_model_s_own_generation_settings_change_nothing(writer, monkeypatch) -> None:
    model, _, transform = writer
    expected = metrics.generate(model, transform, PROMPTS, max_new_tokens=12)
    for name, value in {"repetition_penalty": 5.0, "do_sample": True, "temperature": 9.0}.items():
        monkeypatch.setattr(model.generation_config, name, value)
    assert metrics.generate(model, transform, PROMPTS, max_new_tokens=12) == expected


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
    assert tasks.final_number(text) == (None if number is None else Decimal(number))


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
