"""`partial-lora predict RUN_DIR INPUT…`: what a finished run says of images, texts or prompts, line by line."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from partial_lora.errors import PartialLoraError
from partial_lora.runs import predict as inputs
from partial_lora.runs.finished import FinishedRun, asked_task, finished_run
from partial_lora.runs.predict import Input, Inputs

if TYPE_CHECKING:
    from partial_lora.runs.predict import Prediction, Predictor

_WIDEST = 32  # columns that a label is padded to, at most
_QUOTED = 80  # characters of a line that an error repeats
_UNSHOWN = {"Cc", "Cs", "Zl", "Zp"}  # kinds of characters that move a cursor, end a line or cannot be written


def predict(arguments: Sequence[str]) -> int:
    """Predict what the arguments name and print it, batch by batch.

    Gives 0, or 1 where an input could not be predicted: it is named on stderr, and the others go on. Raises
    PartialLoraError for a run or an argument that is none. A reader that has seen enough (`| head`) ends it quietly.
    """
    parsed = _predict_parser().parse_intermixed_args(list(arguments))
    run = finished_run(parsed.run)
    task = asked_task(run, parsed.member).config.task
    if parsed.max_new_tokens and task.kind != "generation":
        raise PartialLoraError(f"--max-new-tokens: the run's model writes no texts, task={task.name} has none")
    given = inputs.read(
        [*parsed.inputs, *(f"@{file}" for file in parsed.lines)],
        modality=task.modality,
        pairs=len(task.text_columns) == 2,
        kind=task.kind,
        stdin=getattr(sys.stdin, "buffer", io.BytesIO()),  # there is none where it was closed
    )
    first = next(given.stream, None)  # before torch is there, which takes its time
    if first is None:
        raise PartialLoraError(
            "nothing to predict: expected an image, a folder, a text, @FILE or - as INPUT, and at least one line in it"
        )
    given = Inputs(chain([first], given.stream), given.total)
    try:
        return _predict(run, given, parsed)
    except BrokenPipeError:
        _close_stdout()
        return 0


def _predict_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="partial-lora predict",
        description="What a finished run says of images or texts it has not seen. An INPUT is an image file, a folder "
        "of images (with its sub-folders), a text, @FILE for a file of lines, or - for the lines of standard input. A "
        "line is a text (two with a tab between them where the run's texts are pairs), the path of an image, a prompt, "
        "or a prompt and its options with tabs between them where the run chooses among some.",
        epilog="Exit code: 0; 1 where an input could not be predicted (it is named on stderr, the others are "
        "predicted); 2 for a wrong argument.",
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument("inputs", nargs="*", metavar="INPUT")
    parser.add_argument("--lines", action="append", default=[], metavar="FILE", help="as @FILE; - is standard input")
    parser.add_argument("--member", metavar="NAME", help="of a run of several tasks, the one that the inputs are of")
    parser.add_argument(
        "--json", action="store_true", help="one object a line: input, label, score, scores; member, with --member"
    )
    parser.add_argument(
        "--top-k", type=_positive, metavar="N", help="the N most probable labels; default: 1, with --json all of them"
    )
    parser.add_argument(
        "--batch-size", type=_positive, metavar="N", help="inputs predicted, and printed, at once (default: the run's)"
    )
    parser.add_argument(
        "--max-new-tokens", type=_positive, metavar="N", help="the most that is written of a text (default: the run's)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    return parser


def _positive(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, not {value!r}")
    return int(value)


def _predict(run: FinishedRun, given: Inputs, parsed: argparse.Namespace) -> int:
    predictor = _predictor(run, parsed.device, parsed.max_new_tokens, parsed.member)
    size = parsed.batch_size or run.config.trainer.eval_batch_size
    readable = _readable_line(parsed.top_k or 1, predictor.labels)
    line = _json_line(parsed.top_k, parsed.member) if parsed.json else readable
    failed = False
    with _predict_bar(given.total) as advance:
        while batch := list(islice(given.stream, size)):
            lines = []
            for each, outcome in zip(batch, _outcomes(predictor, batch), strict=True):
                if isinstance(outcome, PartialLoraError):
                    failed = True
                    where = f"{each.place}: " if each.place else ""
                    print(f"partial-lora: {where}{outcome}", file=sys.stderr)
                else:
                    lines.append(line(outcome))
            _write("".join(lines))
            advance(len(batch))
    return 1 if failed else 0


def _predictor(run: FinishedRun, device: str, max_new_tokens: int | None, member: str | None) -> Predictor:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is there
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from partial_lora.runs.predict import Predictor

    return Predictor(run, device=device, max_new_tokens=max_new_tokens, member=member)


def _outcomes(predictor: Predictor, batch: Sequence[Input]) -> list[Prediction | PartialLoraError]:
    predicted = iter(predictor.outcomes([each.given for each in batch if each.problem is None]))
    return [next(predicted) if each.problem is None else _problem(each) for each in batch]


def _problem(given: Input) -> PartialLoraError:
    said = f"{given.said[:_QUOTED]!r}: " if given.said.strip() else ""
    return PartialLoraError(f"{said}{given.problem}")


def _json_line(top_k: int | None, member: str | None) -> Callable[[Prediction], str]:
    def line(prediction: Prediction) -> str:
        said = {
            "input": prediction.input,
            **({} if member is None else {"member": member}),
            "label": prediction.label,
            "score": prediction.score,
            "scores": dict(islice(prediction.scores.items(), top_k)),
        }
        return json.dumps(said, allow_nan=False) + "\n"

    return line


def _readable_line(top_k: int, labels: Sequence[str]) -> Callable[[Prediction], str]:
    """The labels first, in columns as wide as the run's labels need, so that a stream needs no look ahead."""
    from rich.cells import cell_len

    width = min(max(map(cell_len, labels), default=0), _WIDEST)

    def line(prediction: Prediction) -> str:
        if prediction.score is None:
            return f"{_plain(prediction.label)}  {_plain(prediction.input)}\n"
        best = islice(prediction.scores.items(), top_k) if prediction.scores else [("", prediction.score)]
        columns = [f"{_plain(label)}{' ' * (width - cell_len(label))}  {score:.4f}" for label, score in best]
        return "  ".join([*columns, _plain(prediction.input)]).lstrip() + "\n"

    return line


def _plain(text: str) -> str:
    """The text in one line, whatever is in it: a name of a file may hold what moves a terminal's cursor."""
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in _UNSHOWN and char != "\t" else char
        for char in text
    )


def _write(lines: str) -> None:
    sys.stdout.write(lines)
    sys.stdout.flush()


@contextlib.contextmanager
def _predict_bar(total: int | None) -> Iterator[Callable[[int], None]]:
    """How far the stream is, on a terminal, unless that is where the predictions go, which say it themselves."""
    if not sys.stderr.isatty() or sys.stdout.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("predict"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=False) as progress:
        task = progress.add_task("predict", total=total)
        yield lambda count: progress.advance(task, count)


def _close_stdout() -> None:
    """Nobody reads it any more; Python would complain when it flushes it at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
