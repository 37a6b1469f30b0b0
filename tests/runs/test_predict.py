"""`partial-lora predict` as a user types it: what is printed where, in what order, and how it ends."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import finished_runs
import pytest
import torch

from partial_lora import cli
from partial_lora.errors import PartialLoraError
from partial_lora.runs.predict import Prediction, Predictor


@pytest.fixture(scope="module")
def run() -> str:
    return str(finished_runs.image_run().directory)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("photos")


@pytest.fixture(scope="module")
def photos(folder: Path) -> list[str]:
    return finished_runs.photographs(folder)


@pytest.fixture
def predict(run, photos, capsys):
    """A command line to its exit code, its lines and what it said on stderr."""

    def do(*arguments: str, directory: str = run) -> tuple[int, list[str], str]:
        code = cli.predict([directory, "--device", "cpu", *arguments])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return do


class Feed(io.RawIOBase):
    """Standard input, line by line; `seen` is called before each line is given."""

    def __init__(self, lines, seen=lambda: None) -> None:
        self.lines, self.seen = iter(lines), seen

    def __next__(self) -> bytes:
        self.seen()
        line = next(self.lines)
        if isinstance(line, BaseException):
            raise line
        return f"{line}\n".encode()


class Stdin:
    def __init__(self, *feed: object) -> None:
        self.buffer = Feed(*feed)


# What is printed


def test_json_has_one_object_a_line_in_the_order_of_the_inputs(run, folder, photos, predict) -> None:
    code, lines, err = predict("--json", str(folder))
    assert (code, err) == (0, "")
    objects = [json.loads(line) for line in lines]
    assert all(list(each) == ["input", "label", "score", "scores"] for each in objects)
    assert [each["input"] for each in objects] == photos
    expected = Predictor(run, device="cpu").predict(photos)
    assert objects == [vars(each) for each in expected]


def test_a_person_reads_label_score_and_input(photos, predict) -> None:
    code, lines, err = predict(*photos[:3])
    assert (code, err) == (0, "")
    assert [line.split(maxsplit=2)[2] for line in lines] == photos[:3]
    assert {line.split()[0] for line in lines} <= set(finished_runs.COLOURS)
    assert all(0 < float(line.split()[1]) <= 1 for line in lines)
    assert len({line.index(photo) for line, photo in zip(lines, photos, strict=False)}) == 1  # in columns


@pytest.mark.parametrize(("top_k", "count"), [("2", 2), ("99", 3)])
def test_top_k_says_the_most_probable_labels(photos, predict, top_k, count) -> None:
    whole = json.loads(predict("--json", photos[0])[1][0])
    best = dict(list(whole["scores"].items())[:count])
    assert json.loads(predict("--json", "--top-k", top_k, photos[0])[1][0]) == {**whole, "scores": best}
    (line,) = predict("--top-k", top_k, photos[0])[1]
    words = line.removesuffix(photos[0]).split()
    assert words[::2] == list(best)
    assert words[1::2] == [f"{score:.4f}" for score in best.values()]


def test_a_name_that_would_move_the_cursor_is_shown_as_it_is_written(folder, photos, predict, tmp_path) -> None:
    name = str(tmp_path / "a\x1b[2J\nb.png")
    Path(name).write_bytes(Path(photos[0]).read_bytes())
    assert predict(name)[1][0].endswith("a\\x1b[2J\\nb.png")
    assert json.loads(predict("--json", name)[1][0])["input"] == name


def test_a_name_that_is_no_text_can_be_predicted(photos, predict, tmp_path) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    Path(os.fsdecode(name)).write_bytes(Path(photos[0]).read_bytes())
    assert predict(os.fsdecode(name))[1][0].endswith("caf\\udce9.png")
    assert os.fsencode(json.loads(predict("--json", os.fsdecode(name))[1][0])["input"]) == name


def test_a_terminal_of_few_characters_ends_no_stream(photos, run, monkeypatch, tmp_path) -> None:
    photo = tmp_path / os.fsdecode("été.png".encode())  # in a locale of few characters the name is of bytes
    photo.write_bytes(Path(photos[0]).read_bytes())
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
    assert cli.main(["predict", run, "--device", "cpu", str(photo)]) == 0
    assert out.getvalue().endswith(photo.name.encode("ascii", "backslashreplace") + b"\n")


def test_options_may_stand_anywhere(run, photos, predict) -> None:
    assert predict(photos[0], "--json", photos[1]) == predict("--json", photos[0], photos[1])


# What cannot be predicted


def test_an_image_that_cannot_be_read_is_named_and_the_others_are_predicted(photos, predict, tmp_path) -> None:
    (tmp_path / "1.png").write_bytes(b"no image")
    (tmp_path / "list.txt").write_text(f"{photos[0]}\n\n{tmp_path}/2.png\n{photos[1]}\n")
    code, lines, err = predict("--json", str(tmp_path / "1.png"), f"@{tmp_path}/list.txt", photos[2])
    assert code == 1
    assert [json.loads(line)["input"] for line in lines] == photos[:3]
    assert err.splitlines() == [
        f"partial-lora: {tmp_path}/1.png: not an image that can be read (its format is not known)",
        f"partial-lora: {tmp_path}/list.txt, line 2: an empty line",
        f"partial-lora: {tmp_path}/list.txt, line 3: {tmp_path}/2.png: no such image file",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a red picture"], "a red picture: no such image file or folder; the run's model reads images, not texts"),
        ([], "nothing to predict: expected an image, a folder, a text, @FILE or - as INPUT"),
        (["-"], "nothing to predict"),
        (["--lines", os.devnull], "nothing to predict"),
        (["--lines", "nowhere.txt"], "nowhere.txt: no such file, expected a file of lines"),
    ],
)
def test_a_wrong_input_is_refused_before_the_model_is_there(run, monkeypatch, arguments, said) -> None:
    monkeypatch.setattr(
        "partial_lora.runs.predict.Predictor", lambda *given, **how: pytest.fail("the model was loaded")
    )
    monkeypatch.setattr(sys, "stdin", Stdin([]))
    with pytest.raises(PartialLoraError) as error:
        cli.predict([run, *arguments])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_that_is_not_there_is_refused(tmp_path) -> None:
    with pytest.raises(PartialLoraError, match="no such directory"):
        cli.predict([str(tmp_path / "none"), "a text"])


@pytest.mark.parametrize("option", [["--top-k", "0"], ["--batch-size", "-1"], ["--batch-size", "many"]])
def test_a_number_out_of_range_is_refused_by_name(run, capsys, option) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.predict([run, "x", *option])
    assert ended.value.code == 2
    assert f"argument {option[0]}: expected a whole number of at least 1, not {option[1]!r}" in capsys.readouterr().err


def test_neither_help_nor_a_mistake_imports_torch(run) -> None:
    script = (
        "import sys\nfrom partial_lora import cli\nfrom partial_lora.errors import PartialLoraError\n"
        "for arguments in (['--help'], [sys.argv[1], 'nowhere.png'], ['nowhere', 'x']):\n"
        "    try:\n        cli.predict(arguments)\n"
        "    except (SystemExit, PartialLoraError) as error:\n        print(type(error).__name__)\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, run], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-4:] == ["SystemExit", "PartialLoraError", "PartialLoraError", "False"]


# Streams


def test_a_stream_is_printed_batch_by_batch_and_never_read_ahead(photos, predict, monkeypatch) -> None:
    """When line n is read, all whole batches before it have been printed: what is in memory is one batch."""
    printed, when_read = io.StringIO(), []
    monkeypatch.setattr(sys, "stdout", printed)
    feed = [photos[number % len(photos)] for number in range(10)]
    monkeypatch.setattr(sys, "stdin", Stdin(feed, lambda: when_read.append(printed.getvalue().count("\n"))))
    assert predict("--json", "--batch-size", "3", "-")[0] == 0
    assert when_read == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9]
    assert [json.loads(line)["input"] for line in printed.getvalue().splitlines()] == feed


def test_every_batch_is_flushed(photos, predict, monkeypatch) -> None:
    class Stdout(io.StringIO):
        unflushed = False

        def reconfigure(self, **options: str) -> None: ...

        def write(self, text: str) -> int:
            self.unflushed = True
            return super().write(text)

        def flush(self) -> None:
            self.unflushed = False

    out = Stdout()
    monkeypatch.setattr(sys, "stdout", out)
    states = []
    monkeypatch.setattr(sys, "stdin", Stdin(photos[:4], lambda: states.append(out.unflushed)))
    predict("--batch-size", "1", "-")
    assert out.getvalue().count("\n") == 4
    assert not any(states)


def test_a_reader_that_has_seen_enough_ends_it_quietly(photos, run, monkeypatch, capfd) -> None:
    read, write = os.pipe()
    os.close(read)
    asked = []
    endless = iter(lambda: photos[0], None)
    with os.fdopen(write, "w") as closed, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        patch.setattr(sys, "stdin", Stdin(endless, lambda: asked.append(1)))
        assert cli.predict([run, "--device", "cpu", "--batch-size", "2", "-"]) == 0
        closed.flush()  # as the interpreter does at its end
    assert len(asked) == 2
    assert capfd.readouterr().err == ""


def test_an_interruption_leaves_what_was_printed(photos, run, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin([photos[0], photos[1], photos[2], KeyboardInterrupt()]))
    with pytest.raises(KeyboardInterrupt):
        cli.predict([run, "--device", "cpu", "--batch-size", "2", "-"])
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_progress_is_for_a_terminal_and_goes_to_stderr(photos, folder, predict, monkeypatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    code, lines, _ = predict(str(folder))
    assert code == 0
    assert len(lines) == len(photos)
    assert f"{len(photos)}/{len(photos)}" in terminal.getvalue()


def test_the_device_is_the_one_that_was_asked_for(run, photos, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PartialLoraError, match="torch finds no CUDA device"):
        cli.predict([run, photos[0], "--device", "cuda"])


# Texts


def test_a_sentence_is_predicted_and_so_are_the_lines_of_a_file(predict, monkeypatch, tmp_path) -> None:
    directory = str(finished_runs.text_run().directory)
    (tmp_path / "lines.txt").write_text("a fine film\n\ndull\tand loud\n")
    monkeypatch.setattr(sys, "stdin", Stdin(["so so"]))
    given = ("--json", "a lovely film", "--lines", str(tmp_path / "lines.txt"), "-")
    code, lines, err = predict(*given, directory=directory)
    assert code == 1
    assert err == f"partial-lora: {tmp_path}/lines.txt, line 2: an empty line\n"
    found = [json.loads(line) for line in lines]
    assert [each["input"] for each in found] == ["a lovely film", "so so", "a fine film", "dull\tand loud"]
    assert all(set(each["scores"]) == {"good", "bad"} for each in found)


def test_a_pair_is_predicted_as_a_number(predict) -> None:
    directory = str(finished_runs.pair_run().directory)
    code, lines, _ = predict("--json", "one\ttwo", directory=directory)
    found = json.loads(lines[0])
    assert code == 0
    assert (found["input"], found["label"], found["scores"]) == ("one\ttwo", None, {})
    assert predict("one\ttwo", directory=directory)[1] == [f"{found['score']:.4f}  one\ttwo"]
    with pytest.raises(PartialLoraError, match="expected two texts with a tab between them"):
        predict("alone", directory=directory)


# Questions and prompts


def test_the_likeliest_option_is_said_first(predict, monkeypatch) -> None:
    directory = str(finished_runs.choice_run().directory)
    row = finished_runs.questions(1, 101)[0]
    line = "\t".join([row["question"], *row["options"]])
    monkeypatch.setattr(sys, "stdin", Stdin([line, "which one?\tthis"]))
    code, lines, err = predict("--json", "-", directory=directory)
    found = json.loads(lines[0])
    assert (code, len(lines), found["input"]) == (1, 1, line)
    assert err == (
        "partial-lora: standard input, line 2: 'which one?\\tthis': expected a prompt and two or more options, with "
        "tabs between them\n"
    )
    assert set(found["scores"]) == set(row["options"])
    assert next(iter(found["scores"].items())) == (found["label"], found["score"])
    assert predict(line, directory=directory)[1] == [f"{found['label']}  {found['score']:.4f}  {line}"]
    told = [f"{option}  {score:.4f}" for option, score in list(found["scores"].items())[:2]]
    assert predict(line, "--top-k", "2", directory=directory)[1] == ["  ".join([*told, line])]


def test_a_text_is_written_after_a_prompt(predict) -> None:
    directory = str(finished_runs.generation_run().directory)
    code, lines, err = predict("--json", "say red 7\nor 8", "--max-new-tokens", "5", directory=directory)
    found = json.loads(lines[0])
    assert (code, err, found["input"], found["score"], found["scores"]) == (0, "", "say red 7\nor 8", None, {})
    assert len(found["label"]) == 5
    (line,) = predict("say red 7\nor 8", "--max-new-tokens", "5", directory=directory)[1]
    assert line == f"{found['label']}  say red 7\\nor 8"


def test_line_breaks_that_were_written_are_shown_as_they_are_written_down() -> None:
    line = cli._plain_line(1, [])(Prediction("a prompt", "one\ntwo\x1b[2J", None, {}))
    assert line == "one\\ntwo\\x1b[2J  a prompt\n"


@pytest.mark.parametrize("of", [finished_runs.image_run, finished_runs.choice_run])
def test_the_length_of_a_text_is_for_runs_that_write_some(of) -> None:
    with pytest.raises(PartialLoraError, match="--max-new-tokens: the run's model writes no texts"):
        cli.predict([str(of().directory), "a", "--max-new-tokens", "3"])
