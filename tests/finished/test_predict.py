"""A finished run predicts what its own evaluation did, in any batch; what is printed where; how a stream ends."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import json
import os
import random
import re
import signal
import sys
from pathlib import Path

import datasets
import finished_runs
import numpy as np
import pandas
import pytest
import tiny_causal
import torch
from PIL import Image
from refusals import refusal
from scipy.special import softmax

from partial_lora import cli, tasks
from partial_lora.commands import evaluate_or_predict
from partial_lora.errors import in_yaml
from partial_lora.finished import generate
from partial_lora.finished import predict as predicting
from partial_lora.finished.predict import Prediction, Predictor, RunModel
from partial_lora.finished.run import FinishedRun
from partial_lora.models.language import byte_tokenizer
from partial_lora.tasks import CausalTransform, prompt_formats, questions

HALF = "\ud83d"  # of a character: bytes on a command line that are no UTF-8 come as such
SIZES = (1, 7, 100)  # of a batch: texts are padded to other lengths each time


@pytest.fixture(scope="module")
def run() -> FinishedRun:
    return finished_runs.image_run()


@functools.cache
def predictor_of(run: str) -> Predictor:
    return Predictor(getattr(finished_runs, run)().directory, device="cpu")


@pytest.fixture
def predictor() -> Predictor:
    return predictor_of("image_run")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("photos")


@pytest.fixture(scope="module")
def photos(folder: Path) -> list[str]:
    """The run's own test images, as files."""
    return finished_runs.photographs(folder)


def recorded(run: FinishedRun) -> pandas.DataFrame:
    return pandas.read_parquet(run.directory / "predictions.parquet")


# Predictions


def test_images_are_predicted_as_the_run_itself_did(run, predictor, photos) -> None:
    own = recorded(run)
    assert own["prediction_name"].nunique() > 1  # it has learned something, so that a mistake would show
    for size in SIZES:
        predictions = predictor.predict(photos, batch_size=size)
        assert [(each.input, each.label) for each in predictions] == list(
            zip(photos, own["prediction_name"], strict=True)
        )
        np.testing.assert_allclose([each.score for each in predictions], own["score"], atol=1e-5)
        scores = [[each.scores[label] for label in finished_runs.COLOURS] for each in predictions]
        np.testing.assert_allclose(scores, softmax(np.stack(own["logits"]), axis=-1), atol=1e-5)
    for each in predictions:  # the most probable first
        assert list(each.scores.values()) == sorted(each.scores.values(), reverse=True)
        assert next(iter(each.scores.items())) == (each.label, each.score)
    opened = [datasets.Image().decode_example({"path": path, "bytes": None}) for path in photos[:5]]
    assert [each.scores for each in predictor.predict(opened)] == [
        each.scores for each in predictor.predict(photos[:5])
    ]
    assert [each.input for each in predictor.predict([Image.new("RGB", (9, 9)), Path(photos[0])])] == ["", photos[0]]
    assert predictor.predict([]) == predictor.outcomes([]) == []


def test_texts_of_like_length_share_a_batch(predictor, monkeypatch) -> None:
    """A window of texts is padded no more than if it came sorted; one of images is a batch."""
    assert predictor.window(4) == 4
    predictor, texts = predictor_of("text_run"), finished_runs.sentences(10, 100)["text"]
    shapes, logits = [], predictor._of.model.logits
    monkeypatch.setattr(
        predictor._of.model, "logits", lambda batch: shapes.append(tuple(batch["input_ids"].shape)) or logits(batch)
    )
    shown = random.Random(0).sample(list(texts), len(texts))
    predictions = predictor.predict(shown, batch_size=4)
    assert [each.input for each in predictions] == shown
    assert [examples for examples, _ in shapes] == [4] * 5
    widths = [width for _, width in shapes]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > widths[-1]
    assert predictor.window(4) > len(texts)


def test_pairs_are_predicted_as_the_number_that_the_run_itself_had() -> None:
    run, rows = finished_runs.pair_run(), finished_runs.scored_pairs(20, 100)
    predictor, pairs = predictor_of("pair_run"), list(zip(rows["first"], rows["second"], strict=True))
    predictions = predictor.predict(pairs)
    assert [each.input for each in predictions] == [f"{first}\t{second}" for first, second in pairs]
    np.testing.assert_allclose([each.score for each in predictions], recorded(run)["prediction"], atol=1e-5)
    assert all((each.label, each.scores) == (None, {}) for each in predictions)
    assert predictor.labels == []
    swapped = predictor.predict([(second, first) for first, second in pairs])
    assert [each.score for each in swapped] != [each.score for each in predictions]


def test_options_are_as_likely_as_the_run_itself_had_them() -> None:
    run, rows = finished_runs.choice_run(), finished_runs.questions(11, 100)
    own, predictor = recorded(run), predictor_of("choice_run")
    assert own["prediction"].nunique() > 1
    for size in SIZES:
        predictions = predictor.predict([(row["question"], row["options"]) for row in rows], batch_size=size)
        for each, row, expected in zip(predictions, rows, own.itertuples(), strict=True):
            assert each.input == "\t".join([row["question"], *row["options"]])
            assert each.label == row["options"][expected.prediction] == next(iter(each.scores))
            np.testing.assert_allclose([each.scores[option] for option in row["options"]], expected.scores, atol=1e-5)


def test_texts_are_written_as_the_run_itself_wrote_them() -> None:
    run, prompts = finished_runs.generation_run(), [row["prompt"] for row in finished_runs.exchanges(9, 100)]
    own, predictor = list(recorded(run)["prediction"]), predictor_of("generation_run")
    assert len(set(own)) > 1
    for size in SIZES:
        predictions = predictor.predict(prompts, batch_size=size)
        assert predictions == [Prediction(prompt, text, None, {}) for prompt, text in zip(prompts, own, strict=True)]
    short = Predictor(run, device="cpu", max_new_tokens=3).predict(prompts)
    assert max(len(each.label) for each in short) == 3  # bytes, one a token
    assert all(text.startswith(each.label) for text, each in zip(own, short, strict=True))
    longest = max(range(9), key=lambda row: len(own[row]))
    end = own[longest][1]
    stopped = Predictor(finished_runs.changed(run, "task", stop=[end]), device="cpu").predict([prompts[longest]])
    assert stopped[0].label == own[longest].partition(end)[0].strip()


def test_a_question_is_read_as_the_rows_of_its_task_are() -> None:
    """Of known data sets, whose options have their space from the layout; winogrande's are a part of the prompt."""
    transform = tasks.ChoiceTransform(byte_tokenizer(), 128)
    arc = {"question": "what is red?", "choices": {"text": ["a rose", "coal"], "label": ["A", "B"]}, "answerKey": "A"}
    wino = {"sentence": "The cup fits not the box as the _ is too big.", "option1": "cup", "option2": "box"}
    cases = (
        (prompt_formats.arc(arc), None, ("Question: what is red?\nAnswer:", ["a rose", "coal"])),
        (prompt_formats.winogrande(wino | {"answer": 1}), "winogrande", (wino["sentence"], ["cup", "box"])),
    )
    for choice, layout, question in cases:
        row = {"prompts": [choice.prompts], "options": [choice.options], "label": [0]}
        expected = transform.options(datasets.Dataset.from_dict(row, features=questions.CHOICE_FEATURES), cache_bytes=0)
        assert predicting.rows_of(transform, layout, *question) == expected.to_list()
        prompt, options = question  # space around an option is none of it, as in training
        padded = [f" {option} " for option in options]
        assert predicting.rows_of(transform, layout, prompt, padded) == expected.to_list()
    problem = predicting.rows_of(transform, "winogrande", "no place for a name", ["cup", "box"])
    assert "_" in str(problem)


@pytest.mark.parametrize(
    ("of", "given", "names"),
    [
        ("image_run", "nowhere.png", "nowhere.png"),
        ("image_run", "http://localhost/a.png", "http://localhost/a.png"),  # never fetched
        ("image_run", ".", "."),
        ("image_run", "a\0b", r"a\x00b"),
        ("image_run", 17, "type int"),
        *(("text_run", wrong, "a text") for wrong in (["one", "two"], Path("a"), None, HALF)),
        *(("pair_run", wrong, "two texts") for wrong in ("alone", ("a", "b", "c"), ("a", 1), ("a", HALF))),
        *(("choice_run", wrong, "(prompt, options)") for wrong in ("a?", ("a?", ["one", 2]), ("a?", ["one", HALF]))),
        ("choice_run", ("a question", ["one"]), "'a question': "),
        ("choice_run", (" ", ["one", "two"]), "a prompt and two or more options"),
        ("choice_run", ("a question", ["one", "two", "one"]), "'one'"),
        ("choice_run", ("a question", ["one", "two " * 50]), "model.max_length"),
        ("generation_run", 7, "a text"),
        ("generation_run", HALF, "a text"),
        ("generation_run", " ", "a text"),
    ],
)
def test_what_is_no_input_is_named_and_the_others_go_on(photos, of, given, names) -> None:
    fine = {"image_run": photos[0], "pair_run": ("a", "b"), "choice_run": ("which?", ["a", "b"])}.get(of, "fine")
    predictor = predictor_of(of)
    answer, error = predictor.outcomes([fine, given])
    assert isinstance(answer, Prediction)
    assert names in str(error)
    with refusal(re.escape(str(error))):
        predictor.predict([fine, given])


def test_inputs_that_are_no_list_are_refused(predictor) -> None:
    """Each letter of a text would be an input."""
    for inputs in ("photo.png", None, 3):
        with refusal(f"inputs={in_yaml(inputs)}: "):
            predictor.predict(inputs)
    with refusal("batch_size=0: "):
        predictor.predict([], batch_size=0)


@pytest.mark.parametrize(
    ("name", "value"), [("run", None), ("run", 3), ("member", 3), ("max_new_tokens", "many"), ("device", None)]
)
def test_a_predictor_names_the_argument_that_is_none(run, name, value) -> None:
    with refusal(f"{name}={in_yaml(value)}: expected "):
        Predictor(**({"run": run, "device": "cpu"} | {name: value}))


def test_an_image_that_would_fill_the_memory_and_an_output_that_is_no_number_are_errors(
    predictor, photos, monkeypatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        assert "limit" in str(predictor.outcomes(photos[:1])[0])
    monkeypatch.setattr(predictor._of.model, "logits", lambda batch: np.array([[0.0, 1.0, 0.0], [0.0, np.nan, 0.0]]))
    first, second = predictor.outcomes(photos[:2])
    assert first.label == finished_runs.COLOURS[1]
    assert str(second).startswith(photos[1])


def test_a_run_that_was_evaluated_in_bf16_predicts_in_it_on_the_same_kind_of_device(run) -> None:
    batch = {"pixel_values": torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    plain, half, elsewhere = (
        RunModel(dataclasses.replace(run, result=run.result | changes), "cpu")
        for changes in ({}, {"mixed_precision": "bf16"}, {"mixed_precision": "bf16", "device": "cuda"})
    )
    assert [each.precision for each in (plain, half, elsewhere)] == ["no", "bf16", "no"]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = plain.model(**batch).logits.float().numpy()
    np.testing.assert_array_equal(half.logits(batch), expected)
    assert (half.logits(batch) != plain.logits(batch)).any()


# The command


@pytest.fixture
def predict(run, photos, capsys):
    """Give the exit code of a command line, its lines, and what is on stderr."""

    def do(*arguments: str, of: FinishedRun = run) -> tuple[int, list[str], str]:
        capsys.readouterr()  # what its training printed, where this is the first test that needs it
        code = cli.predict([str(of.directory), "--device", "cpu", *arguments])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return do


class Stdin(io.RawIOBase):
    """Standard input, line by line; `seen` is called before each line is given."""

    def __init__(self, lines, seen=lambda: None) -> None:
        self.buffer, self.lines, self.seen = self, iter(lines), seen

    def readline(self, size: int = -1) -> bytes:
        self.seen()
        line = next(self.lines, None)
        if isinstance(line, BaseException):
            raise line
        return b"" if line is None else f"{line}\n".encode()


def test_json_has_one_object_a_line_in_the_order_of_the_inputs(predictor, folder, photos, predict) -> None:
    code, lines, err = predict("--json", str(folder))
    assert (code, err) == (0, "")
    assert [json.loads(line) for line in lines] == [vars(each) for each in predictor.predict(photos)]
    assert list(json.loads(lines[0])) == ["input", "label", "score", "scores"]
    assert predict(photos[0], "--json", photos[1])[1] == predict("--json", *photos[:2])[1]  # options anywhere


@pytest.mark.parametrize("top_k", [1, 2, 99])
def test_a_person_reads_labels_scores_and_the_input_in_columns(predictor, photos, predict, top_k) -> None:
    code, lines, err = predict(*photos[:3], "--top-k", str(top_k))
    assert (code, err) == (0, "")
    for line, photo, expected in zip(lines, photos, predictor.predict(photos[:3]), strict=False):
        best = list(expected.scores.items())[:top_k]
        words = [word for label, score in best for word in (label, f"{score:.4f}")]
        assert line.split(maxsplit=len(words)) == [*words, photo]
        assert json.loads(predict(photo, "--json", "--top-k", str(top_k))[1][0])["scores"] == pytest.approx(dict(best))
    assert len({line.index(photo) for line, photo in zip(lines, photos, strict=False)}) == 1


def test_names_are_shown_as_they_are_written_whatever_they_hold(run, photos, predict, tmp_path, monkeypatch) -> None:
    moving, bytes_alone = str(tmp_path / "a\x1b[2J\nb.png"), os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    for name, shown in ((moving, "a\\x1b[2J\\nb.png"), (bytes_alone, "caf\\udce9.png")):
        Path(name).write_bytes(Path(photos[0]).read_bytes())
        assert predict(name)[1][0].endswith(shown)
        assert json.loads(predict("--json", name)[1][0])["input"] == name
    photo, out = tmp_path / os.fsdecode("été.png".encode()), io.BytesIO()
    photo.write_bytes(Path(photos[0]).read_bytes())
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))  # a terminal of few characters
    assert cli.main(["predict", str(run.directory), "--device", "cpu", str(photo)]) == 0
    assert out.getvalue().endswith(photo.name.encode("ascii", "backslashreplace") + b"\n")
    text = evaluate_or_predict._plain_line(1, [])(Prediction("a prompt", "one\ntwo\x1b[2J", None, {}))
    assert text == "one\\ntwo\\x1b[2J  a prompt\n"


def test_texts_pairs_questions_and_prompts_on_a_command_line(predict, monkeypatch, tmp_path) -> None:
    (tmp_path / "lines.txt").write_text("a fine film\n\ndull\tand loud\n")
    monkeypatch.setattr(sys, "stdin", Stdin(["so so"]))
    words = ("--json", "a lovely film", "--lines", str(tmp_path / "lines.txt"), "-")
    code, lines, err = predict(*words, of=finished_runs.text_run())
    assert [json.loads(line)["input"] for line in lines] == ["a lovely film", "so so", "a fine film", "dull\tand loud"]
    assert code == 1
    assert err == f"partial-lora: {tmp_path}/lines.txt, line 2: an empty line\n"

    number = json.loads(predict("--json", "one\ttwo", of=finished_runs.pair_run())[1][0])
    assert predict("one\ttwo", of=finished_runs.pair_run())[1] == [f"{number['score']:.4f}  one\ttwo"]

    row = finished_runs.questions(1, 101)[0]
    question = "\t".join([row["question"], *row["options"]])
    monkeypatch.setattr(sys, "stdin", Stdin([question, "which one?\tthis"]))
    code, lines, err = predict("--json", "-", of=finished_runs.choice_run())
    answer = json.loads(lines[0])
    assert (code, len(lines), answer["input"]) == (1, 1, question)
    assert err.startswith("partial-lora: standard input, line 2: 'which one?\\tthis': ")
    best = [f"{option}  {score:.4f}" for option, score in list(answer["scores"].items())[:2]]
    assert predict(question, "--top-k", "2", of=finished_runs.choice_run())[1] == ["  ".join([*best, question])]

    prompt = ("say red 7\nor 8", "--max-new-tokens", "5")
    text = json.loads(predict("--json", *prompt, of=finished_runs.generation_run())[1][0])["label"]
    assert len(text) == 5
    assert predict(*prompt, of=finished_runs.generation_run())[1] == [f"{text}  say red 7\\nor 8"]


def test_an_input_that_cannot_be_read_is_named_and_the_others_are_predicted(photos, predict, tmp_path) -> None:
    (tmp_path / "1.png").write_bytes(Path(photos[2]).read_bytes()[:-100])
    (tmp_path / "list.txt").write_text(f"{photos[0]}\n\n{tmp_path}/2.png\n{photos[1]}\n")
    code, lines, err = predict("--json", str(tmp_path / "1.png"), f"@{tmp_path}/list.txt", photos[2])
    assert code == 1
    assert [json.loads(line)["input"] for line in lines] == photos[:3]
    problems = (
        f"{tmp_path}/1.png: ",
        f"{tmp_path}/list.txt, line 2: ",
        f"{tmp_path}/list.txt, line 3: {tmp_path}/2.png: ",
    )
    for line, problem in zip(err.splitlines(), problems, strict=True):
        assert line.startswith(f"partial-lora: {problem}")


@pytest.mark.parametrize(
    ("of", "arguments", "begins"),
    [
        ("image_run", ["a red picture"], "^a red picture: "),
        ("image_run", [], "nothing to predict"),
        ("image_run", ["-"], "nothing to predict"),
        ("image_run", ["--lines", "nowhere.txt"], "^nowhere.txt: "),
        ("image_run", ["a", "--max-new-tokens", "3"], "^--max-new-tokens: "),
        ("pair_run", ["alone"], "^'alone': "),
    ],
)
def test_a_wrong_input_is_refused_before_the_model_is_there(monkeypatch, of, arguments, begins) -> None:
    monkeypatch.setattr(predicting, "Predictor", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setattr(sys, "stdin", Stdin([]))
    with refusal(begins):
        cli.predict([str(getattr(finished_runs, of)().directory), *arguments])


def test_a_run_or_a_device_that_is_not_there_is_refused(run, photos, monkeypatch, tmp_path) -> None:
    with refusal(str(tmp_path)):
        cli.predict([str(tmp_path / "none"), "a text"])
    with refusal(str(tmp_path)):
        Predictor(tmp_path)
    with refusal("device"):
        Predictor(run, device="tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with refusal("device=cuda: "):
        cli.predict([str(run.directory), photos[0], "--device", "cuda"])
    assert RunModel(run, "auto").device == "cpu"


def test_the_latest_run_says_which_it_is(run, photos, predict, tmp_path, capsys) -> None:
    os.symlink(run.directory, tmp_path / "latest")
    assert cli.predict([str(tmp_path / "latest"), photos[0], "--device", "cpu"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    test = run.result["metrics"]["test"]
    for said in (run.config.task.name, run.config.model.name, run.config.method.name, f"{test[test['primary']]:.4f}"):
        assert said in line


@pytest.mark.parametrize("option", [["--top-k", "0"], ["--batch-size", "-1"], ["--batch-size", "many"]])
def test_a_number_out_of_range_is_refused_by_name(run, option) -> None:
    with refusal(f"argument {option[0]}: "):
        cli.predict([str(run.directory), "x", *option])


# Streams


@pytest.mark.parametrize("source", ["images", "texts"])
def test_a_stream_is_printed_batch_by_batch_and_never_read_ahead(source, photos, predict, monkeypatch) -> None:
    """When line n is read, all whole batches before it have been printed and flushed: one batch is in memory."""

    class Stdout(io.StringIO):
        flushed = 0

        def flush(self) -> None:
            self.flushed = self.getvalue().count("\n")

    printed, when_read = Stdout(), []
    monkeypatch.setattr(sys, "stdout", printed)
    of = {} if source == "images" else {"of": finished_runs.text_run()}
    feed = photos[:10] if source == "images" else [f"{'so ' * (number % 3)}fine {number}" for number in range(10)]
    monkeypatch.setattr(sys, "stdin", Stdin(feed, lambda: when_read.append(printed.flushed)))
    assert predict("--json", "--batch-size", "3", "-", **of)[0] == 0
    assert when_read == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9]
    assert [json.loads(line)["input"] for line in printed.getvalue().splitlines()] == feed


def test_a_reader_that_has_seen_enough_ends_it_quietly(photos, run, monkeypatch, capfd) -> None:
    read, write = os.pipe()
    os.close(read)
    lines = []
    with os.fdopen(write, "w") as closed, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        patch.setattr(sys, "stdin", Stdin(iter(lambda: photos[0], None), lambda: lines.append(1)))
        code = cli.main(["predict", str(run.directory), "--device", "cpu", "--batch-size", "2", "-"])
        assert code == 128 + signal.SIGPIPE
        closed.flush()  # as the interpreter does at its end
    assert len(lines) == 2
    assert capfd.readouterr().err == ""


def test_an_interruption_leaves_what_was_printed(photos, run, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin([photos[0], photos[1], photos[2], KeyboardInterrupt()]))
    with pytest.raises(KeyboardInterrupt):
        cli.predict([str(run.directory), "--device", "cpu", "--batch-size", "2", "-"])
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_progress_is_for_a_terminal_and_goes_to_stderr(photos, folder, predict, monkeypatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    code, lines, _ = predict(str(folder))
    assert (code, len(lines)) == (0, len(photos))
    assert f"{len(photos)}/{len(photos)}" in terminal.getvalue()


# A text while it is written

PROMPTS = ["say so so so blue 12", "hello there", "say red 7"]


def written(prompt: str, **given: object) -> list[str]:
    parts: list[str] = []
    text = generate.Writer(finished_runs.generation_run(), device="cpu", **given).write(prompt, parts.append)
    assert "".join(parts) == text
    return parts


def test_the_parts_are_what_predict_writes_up_to_a_stop_string() -> None:
    whole = [each.label for each in predictor_of("generation_run").predict(PROMPTS)]
    assert ["".join(written(prompt)) for prompt in PROMPTS] == whole
    assert "".join(written(PROMPTS[0], max_new_tokens=3)) == whole[0][:3]  # a byte each


def test_a_text_ends_before_the_first_stop_string() -> None:
    drawn = {"temperature": 2.0, "seed": 0}
    text = "".join(written(PROMPTS[0], **drawn))
    stop = text[4:6]
    assert "".join(written(PROMPTS[0], stop=["never", stop], **drawn)) == text.partition(stop)[0].strip() != text


def test_a_temperature_draws_another_text_with_another_seed() -> None:
    texts = ["".join(written(PROMPTS[0], temperature=2.0, seed=seed)) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_a_part_never_holds_what_a_stop_string_will_take_back() -> None:
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choices("ab \n", k=draw.randrange(30)))
        count = draw.randrange(3)
        stop = ["".join(draw.choices("ab ", k=draw.randrange(1, 8 if count == 1 else 4))) for _ in range(count)]
        parts: list[str] = []
        words = generate._Words(None, [], stop, parts.append)
        rest = text
        while rest:
            size = draw.randrange(1, 5)
            words.on_finalized_text(rest[:size])
            rest = rest[size:]
        words.on_finalized_text("", stream_end=True)
        ends = [text.find(each) for each in stop if each in text]
        assert "".join(parts) == text[: min(ends, default=None)].strip(), (text, stop)


def test_generate_and_chat_print_the_texts_and_read_from_standard_input(monkeypatch, capsys) -> None:
    run, text = str(finished_runs.generation_run().directory), "".join(written(PROMPTS[0]))
    assert cli.main(["generate", run, PROMPTS[0], "--device", "cpu"]) == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPTS[0]))
    assert cli.main(["generate", run, "-", "--device", "cpu"]) == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPTS[0]}\n\n{PROMPTS[0]}\n"))
    assert cli.main(["chat", run, "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"{text}\n" * 4


def test_a_turn_of_a_conversation_is_read_with_all_before_it(monkeypatch) -> None:
    writer = generate.Writer(finished_runs.generation_run(), device="cpu", max_new_tokens=3)
    tokenizer = copy.deepcopy(writer._transform.tokenizer)
    tokenizer.chat_template = tiny_causal.CHAT
    writer._transform = CausalTransform(tokenizer, 128, chat=True)
    encode, read = writer._transform.encode, []
    monkeypatch.setattr(writer._transform, "encode", lambda asked, _: read.extend(map(list, asked)) or encode(asked))
    parts: list[str] = []
    first, second = writer.converse(["say red 7", " ", "say blue"], parts.append)
    assert "".join(parts) == first + second
    before = [{"role": "user", "content": "say red 7"}, {"role": "assistant", "content": first}]
    assert read == [before[:1], [*before, {"role": "user", "content": "say blue"}]]


@pytest.mark.parametrize(
    ("of", "arguments", "named"),
    [
        (finished_runs.image_run, ["a prompt"], "model=tiny_vit"),
        (finished_runs.generation_run, [" "], "PROMPT"),
        (finished_runs.generation_run, [], "PROMPT"),
        (finished_runs.generation_run, [HALF], "PROMPT"),
        (finished_runs.generation_run, ["a prompt", "--stop", ""], "--stop"),
        (finished_runs.generation_run, ["a prompt", "--member", "one"], "--member one"),
        (finished_runs.generation_run, ["a prompt", "--temperature", "nan"], "--temperature"),
        (finished_runs.generation_run, ["a prompt", "--temperature", "1e-320"], "--temperature"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(capsys, of, arguments, named) -> None:
    try:
        code = cli.main(["generate", str(of().directory), *arguments])
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    assert named in printed.err.strip().splitlines()[-1]
