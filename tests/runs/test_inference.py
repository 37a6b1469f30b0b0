"""A finished run predicts what its own evaluation said, in any batch, and names what it cannot read."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import datasets
import finished_runs
import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from scipy.special import softmax

from partial_lora import tasks
from partial_lora.errors import PartialLoraError
from partial_lora.models.texts import byte_tokenizer
from partial_lora.runs import predict
from partial_lora.runs.finished import FinishedRun
from partial_lora.runs.predict import Predictor, RunModel
from partial_lora.tasks import questions as choices


@pytest.fixture(scope="module")
def run() -> FinishedRun:
    return finished_runs.image_run()


@pytest.fixture(scope="module")
def predictor(run: FinishedRun) -> Predictor:
    return Predictor(run.directory, device="cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The run's own test images, as files."""
    return finished_runs.photographs(tmp_path_factory.mktemp("photos"))


def recorded(run: FinishedRun) -> pandas.DataFrame:
    return pandas.read_parquet(run.directory / "predictions.parquet")


def test_it_predicts_what_the_run_said_of_the_same_images(run, predictor, photos) -> None:
    own, found = recorded(run), predictor.predict(photos)
    assert own["prediction_name"].nunique() > 1  # it has learned something, so that a mistake would show
    assert [each.input for each in found] == photos
    assert [each.label for each in found] == list(own["prediction_name"])
    np.testing.assert_allclose([each.score for each in found], own["score"], atol=1e-5)
    chances = softmax(np.stack(own["logits"]), axis=-1)
    scores = [[each.scores[label] for label in finished_runs.COLOURS] for each in found]
    np.testing.assert_allclose(scores, chances, atol=1e-5)


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_the_size_of_a_batch_changes_no_label(predictor, photos, size) -> None:
    found, own = predictor.predict(photos, batch_size=size), predictor.predict(photos)
    assert [each.label for each in found] == [each.label for each in own]
    np.testing.assert_allclose([each.score for each in found], [each.score for each in own], atol=1e-5)


def test_scores_are_probabilities_with_the_most_probable_first(predictor, photos) -> None:
    for prediction in predictor.predict(photos[:4]):
        scores = list(prediction.scores.values())
        assert set(prediction.scores) == set(finished_runs.COLOURS)
        assert scores == sorted(scores, reverse=True)
        assert sum(scores) == pytest.approx(1, abs=1e-6)
        assert next(iter(prediction.scores.items())) == (prediction.label, prediction.score)


def test_images_in_memory_are_predicted_as_their_files_are(predictor, photos) -> None:
    opened = [datasets.Image().decode_example({"path": path, "bytes": None}) for path in photos[:5]]
    assert [each.scores for each in predictor.predict(opened)] == [
        each.scores for each in predictor.predict(photos[:5])
    ]
    assert predictor.predict([Image.new("RGB", (9, 9))])[0].input == ""
    assert predictor.predict([Path(photos[0])])[0].input == photos[0]


def test_nothing_is_predicted_of_nothing(predictor) -> None:
    assert predictor.predict([]) == []
    assert predictor.outcomes([]) == []


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "I;16", "I", "F", "CMYK", "RGBA"])
def test_images_of_every_kind_can_be_read(predictor, mode, tmp_path) -> None:
    suffix = ".tif" if mode in ("I", "F", "CMYK", "I;16") else ".png"
    Image.new(mode, (1, 40)).save(tmp_path / f"image{suffix}")
    assert predictor.predict([str(tmp_path / f"image{suffix}")])[0].label in finished_runs.COLOURS


BROKEN = {
    "text.png": (b"these are words", "not an image that can be read (its format is not known)"),
    "empty.png": (b"", "not an image that can be read (an empty file)"),
    "half.jpg": (None, "not an image that can be read (image file is truncated"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_is_named_and_the_others_of_its_batch_go_on(predictor, photos, name, tmp_path) -> None:
    content, said = BROKEN[name]
    broken = tmp_path / name
    if content is None:
        whole = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(whole, "JPEG")
        content = whole.getvalue()[: len(whole.getvalue()) // 2]
    broken.write_bytes(content)
    found = predictor.outcomes([photos[0], str(broken), photos[1]])
    assert isinstance(found[1], PartialLoraError)
    assert str(found[1]).startswith(f"{broken}: {said}")
    assert [found[0], found[2]] == predictor.predict(photos[:2])
    with pytest.raises(PartialLoraError, match=name):
        predictor.predict([photos[0], broken])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nowhere.png", "nowhere.png: no such image file"),
        ("http://localhost/a.png", "http://localhost/a.png: no such image file"),  # never fetched
        (".", "not an image that can be read (Is a directory)"),
        ("a\0b", "not an image that can be read"),
        (17, "an input of type int: expected the path of an image, or a PIL image"),
    ],
)
def test_what_is_no_image_is_named(predictor, given, said) -> None:
    assert said in str(predictor.outcomes([given])[0])


def test_an_image_that_would_fill_the_memory_is_refused(predictor, photos, monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "exceeds limit" in str(predictor.outcomes(photos[:1])[0])


def test_an_output_that_is_no_number_is_not_a_prediction(predictor, photos, monkeypatch) -> None:
    monkeypatch.setattr(predictor._model, "logits", lambda batch: np.array([[0.0, 1.0, 0.0], [0.0, np.nan, 0.0]]))
    first, second = predictor.outcomes(photos[:2])
    assert first.label == finished_runs.COLOURS[1]
    assert str(second) == f"{photos[1]}: the model's output is not a finite number"


def test_a_run_that_was_evaluated_in_bf16_predicts_in_it_on_the_same_kind_of_device(run) -> None:
    batch = {"pixel_values": torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    plain = RunModel(run, "cpu")
    half = RunModel(dataclasses.replace(run, result=run.result | {"mixed_precision": "bf16"}), "cpu")
    elsewhere = run.result | {"mixed_precision": "bf16", "device": "cuda"}
    assert (plain.precision, half.precision) == ("no", "bf16")
    assert RunModel(dataclasses.replace(run, result=elsewhere), "cpu").precision == "no"
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = plain.model(**batch).logits.float().numpy()
    np.testing.assert_array_equal(half.logits(batch), expected)
    assert (half.logits(batch) != plain.logits(batch)).any()


def test_a_device_that_is_not_there_is_refused(run, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PartialLoraError, match="device=cuda: torch finds no CUDA device"):
        Predictor(run, device="cuda")
    assert predict._device("auto") == "cpu"


def test_a_folder_without_a_run_is_refused(tmp_path) -> None:
    with pytest.raises(PartialLoraError, match="expected the directory of a run"):
        Predictor(tmp_path)


# Texts


def test_texts_are_predicted_as_the_run_said_of_them() -> None:
    run = finished_runs.text_run()
    own, rows = recorded(run), finished_runs.sentences(10, 100)
    predictor = Predictor(run, device="cpu")
    for size in (1, 7, 8):  # padded to other lengths each time
        found = predictor.predict(rows["text"], batch_size=size)
        assert [each.input for each in found] == list(rows["text"])
        assert [each.label for each in found] == list(own["prediction_name"])
        np.testing.assert_allclose([each.score for each in found], own["score"], atol=1e-5)
    for wrong in (["one", "two"], Path("a"), None):
        assert "expected a text" in str(predictor.outcomes(["fine", wrong])[1])


def test_a_regression_on_pairs_predicts_the_number_that_the_run_said() -> None:
    run = finished_runs.pair_run()
    own, rows = recorded(run), finished_runs.scored_pairs(20, 100)
    predictor = Predictor(run, device="cpu")
    pairs = list(zip(rows["first"], rows["second"], strict=True))
    found = predictor.predict(pairs)
    assert [each.input for each in found] == [f"{first}\t{second}" for first, second in pairs]
    np.testing.assert_allclose([each.score for each in found], own["prediction"], atol=1e-5)
    assert all(each.label is None and each.scores == {} for each in found)
    assert predictor.labels == []
    swapped = predictor.predict([(second, first) for first, second in pairs])
    assert [each.score for each in swapped] != [each.score for each in found]
    for wrong in ("alone", ("a", "b", "c"), ("a", 1)):
        assert "expected two texts" in str(predictor.outcomes([pairs[0], wrong])[1])


# Questions and prompts


def asked(count: int) -> list[tuple[str, list[str]]]:
    """The questions that the choice run was tested on, as a user asks them."""
    return [(row["question"], row["options"]) for row in finished_runs.questions(count, 100)]


def test_options_are_as_likely_as_the_run_said() -> None:
    run = finished_runs.choice_run()
    own, questions = recorded(run), asked(11)
    predictor = Predictor(run, device="cpu")
    assert own["prediction"].nunique() > 1
    for size in (1, 4, 100):
        found = predictor.predict(questions, batch_size=size)
        for each, (prompt, options), row in zip(found, questions, own.itertuples(), strict=True):
            assert each.input == "\t".join([prompt, *options])
            assert each.label == options[row.prediction] == next(iter(each.scores))
            assert each.score == pytest.approx(row.score, abs=1e-5)
            np.testing.assert_allclose([each.scores[option] for option in options], row.scores, atol=1e-5)
            assert list(each.scores.values()) == sorted(each.scores.values(), reverse=True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("a question", "expected (prompt, options)"),
        (("a question", "an option"), "expected (prompt, options)"),
        (("a question", ["one", 2]), "expected (prompt, options)"),
        (("a question", ["one"]), "'a question': expected a prompt and two or more options"),
        ((" ", ["one", "two"]), "expected a prompt and two or more options"),
        (("a question", ["one", "two", "one"]), "'a question': the option 'one' is there twice"),
        (("a question", ["one", "two " * 50]), "'a question': an option is longer than the run's model.max_length"),
    ],
)
def test_what_is_no_question_is_named_and_the_others_are_answered(given, said) -> None:
    predictor = Predictor(finished_runs.choice_run(), device="cpu")
    found = predictor.outcomes([asked(1)[0], given, asked(2)[1]])
    assert said in str(found[1])
    assert [each.label in options for each, (_, options) in zip(found[::2], asked(2), strict=True)] == [True, True]


def test_a_question_is_read_as_the_rows_of_its_task_are() -> None:
    """Of known data sets, whose options have their space from the layout; winogrande's are a part of the prompt."""
    transform = tasks.CausalTransform(byte_tokenizer(), 128, kind="choice")
    arc = {"question": "what is red?", "choices": {"text": ["a rose", "coal"], "label": ["A", "B"]}, "answerKey": "A"}
    wino = {"sentence": "The cup fits not the box as the _ is too big.", "option1": "cup", "option2": "box"}
    cases = (
        (choices.arc(arc), None, ("Question: what is red?\nAnswer:", ["a rose", "coal"])),
        (choices.winogrande(wino | {"answer": 1}), "winogrande", (wino["sentence"], ["cup", "box"])),
    )
    for choice, layout, question in cases:
        row = {"prompts": [choice.prompts], "options": [choice.options], "label": [0]}
        expected = transform.options(datasets.Dataset.from_dict(row, features=choices.CHOICE_FEATURES), cache_bytes=0)
        (found,) = predict.rows_of(transform, layout, [question])
        assert found == expected.to_list()
    (found,) = predict.rows_of(transform, "winogrande", [("no place for a name", ["cup", "box"])])
    assert "expected a _ in the prompt" in str(found)


def test_texts_are_what_the_run_wrote() -> None:
    run = finished_runs.generation_run()
    prompts, own = [row["prompt"] for row in finished_runs.exchanges(9, 100)], list(recorded(run)["prediction"])
    assert len(set(own)) > 1
    predictor = Predictor(run, device="cpu")
    for size in (1, 4, 100):
        found = predictor.predict(prompts, batch_size=size)
        assert [(each.input, each.label, each.score, each.scores) for each in found] == [
            (prompt, text, None, {}) for prompt, text in zip(prompts, own, strict=True)
        ]
    short = Predictor(run, device="cpu", max_new_tokens=3).predict(prompts)
    assert max(len(each.label) for each in short) == 3  # bytes, one a token
    assert all(text.startswith(each.label) for text, each in zip(own, short, strict=True))
    longest = max(range(9), key=lambda row: len(own[row]))
    end = own[longest][1]
    stopped = finished_runs.changed(run, "task", stop=[end])
    assert (
        Predictor(stopped, device="cpu").predict([prompts[longest]])[0].label == own[longest].partition(end)[0].strip()
    )
    for wrong, said in ((7, "expected a text"), (" ", "an empty prompt")):
        good, bad = predictor.outcomes([prompts[0], wrong])
        assert (good.label, said in str(bad)) == (own[0], True)
