"""evaluate and predict: a finished run on other rows."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING

from partial_lora import credentials
from partial_lora.commands.common import add_device, add_member, libraries, named_run, parser_of_run, positive
from partial_lora.errors import PartialLoraError, escaped
from partial_lora.finished.inputs import is_stream, read_inputs
from partial_lora.finished.run import finished_run
from partial_lora.finished.target_task import evaluation_settings, one_task
from partial_lora.progress import bar
from partial_lora.tasks.kinds import kind_of

if TYPE_CHECKING:
    from partial_lora.finished.inputs import Input
    from partial_lora.finished.predict import Prediction


def evaluate(arguments: Sequence[str]) -> int:
    """Evaluate a finished run on another split or task, print its metrics and where they are; return the exit code.

    Raises PartialLoraError for a run that is none, a key that is not one of the task's, and labels of other names.
    """
    parser = parser_of_run(
        "evaluate",
        "Score a finished run on another split or task. Without KEY=VALUE it is scored on its own task. "
        "Another task must have labels of the same names. A causal language model takes any task with options or "
        "responses. The scores go to RUN_DIR/evaluations, and the run's own record stays as it is.",
        epilog="For example: task=cifar10, task.data_files.test=FILE, task.test_samples=1000, trainer.device=cpu.",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="task=NAME and data_dir=FOLDER, task.KEY=VALUE, trainer.{device,eval_batch_size}",
    )
    add_member(parser)
    parser.add_argument("--split", choices=("test", "validation", "train"), default="test", help="default: test")
    parser.add_argument(
        "--lm-eval",
        type=lambda value: value.split(","),
        metavar="TASKS",
        help="tasks of EleutherAI's lm-evaluation-harness (partial-lora's extra lm-eval), by name or YAML file",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object: the folder and all of evaluation.json"
    )
    parsed = parser.parse_intermixed_args(list(arguments))
    run = finished_run(parsed.run)
    member = parsed.member
    if parsed.lm_eval:  # which asks the model, whatever task it was trained on
        member = member or next(iter(run.config.task.members or ()), None)
    task, trainer = evaluation_settings(run, parsed.overrides, member, reads_rows=not parsed.lm_eval)
    means = {"device": trainer.device, "batch_size": trainer.eval_batch_size}
    if parsed.lm_eval:
        if parsed.split != "test" or any(not each.startswith("trainer.") for each in parsed.overrides):
            raise PartialLoraError("--lm-eval: its tasks have rows of their own; leave out --split and task=")
        with libraries():
            from partial_lora.finished.harness import evaluate_by_harness
        folder, record = evaluate_by_harness(run, parsed.lm_eval, **means)
    else:
        with libraries():
            from partial_lora.finished.evaluate import evaluate_run
        with bar("evaluate") as advance:
            folder, record = evaluate_run(run, task, member=parsed.member, split=parsed.split, advance=advance, **means)
    if parsed.json:
        print(json.dumps({"folder": str(folder), **record}, allow_nan=False))
    else:
        (_print_harness if parsed.lm_eval else _print_evaluation)(record)
        print(f"wrote {folder}")
    return 0


def _print_evaluation(record: Mapping) -> None:
    from rich.console import Console
    from rich.table import Table

    metrics = dict(record["metrics"])
    primary = metrics.pop("primary")
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("task", record["task"]["name"])
    table.add_row(record["split"], f"{record['examples']:,} examples")
    for name, value in metrics.items():
        table.add_row(name, "–" if value is None else f"{value:.4f}", style="bold" if name == primary else None)
    Console().print(table)
    for warning in record["warnings"]:
        print(f"beware: {warning}")


def _print_harness(record: Mapping) -> None:
    """Print what the harness has measured, with its errors."""
    for task, metrics in record["metrics"].items():
        for name, measured in metrics.items():
            value, error = ("–" if each is None else f"{each:.4f}" for each in measured.values())
            print(f"{task}  {name}  {value} ± {error}")


_WIDEST = 32  # columns that a label is padded to, at most


_QUOTED = 80  # characters of a line that an error repeats


def predict(arguments: Sequence[str]) -> int:
    """Predict what the arguments name and print it, as many inputs at a time as share batches (`Predictor.window`).

    Returns 0, or 1 where an input could not be predicted: it is named on stderr, and the others go on. Raises
    PartialLoraError for a run or an argument that is none.
    """
    parsed = _predict_parser().parse_intermixed_args(list(arguments))
    run = named_run(parsed.run)
    task = one_task(run, parsed.member).config.task
    if parsed.max_new_tokens and kind_of(task).answers != "text":
        raise PartialLoraError(f"--max-new-tokens: task={task.name} generates no texts; leave it out")
    sources = [*parsed.inputs, *(f"@{file}" for file in parsed.lines)]
    stream, total = read_inputs(sources, task, getattr(sys.stdin, "buffer", io.BytesIO()))  # which may be closed
    first = next(stream, None)  # before torch is imported, which takes its time
    if first is None:
        raise PartialLoraError(
            "nothing to predict: expected an image, a folder, a text, @FILE or - as INPUT, and at least one line in it"
        )
    with libraries():
        from partial_lora.finished.predict import Predictor
    predictor = Predictor(run, device=parsed.device, max_new_tokens=parsed.max_new_tokens, member=parsed.member)
    size = parsed.batch_size or run.config.trainer.eval_batch_size
    window = size if any(map(is_stream, sources)) else predictor.window(size)  # who writes lines may wait for answers
    line = _json_line(parsed.top_k, parsed.member) if parsed.json else _plain_line(parsed.top_k, predictor.labels)
    stream, code, done = chain([first], stream), 0, 0
    # On a terminal the predictions themselves show how far the stream is.
    with bar("predict", shown=not sys.stdout.isatty()) as advance:
        while inputs := list(islice(stream, window)):
            problems, lines = _predictions(predictor, inputs, size, line)
            for problem in problems:
                code = 1
                print(f"partial-lora: {problem}", file=sys.stderr)
            credentials.as_it_is(sys.stdout).write("".join(lines))
            sys.stdout.flush()
            done += len(inputs)
            advance(done, total)
    return code


def _predict_parser() -> argparse.ArgumentParser:
    parser = parser_of_run(
        "predict",
        "Predict images or texts with a finished run. An INPUT is an image file, a folder of images (with "
        "its sub-folders), a text, @FILE for the lines of a file, or - for the lines of standard input. A line is a "
        "text, the path of an image, or a prompt. If the run's texts are pairs, a line has both, with a tab between "
        "them. If the run chooses among options, a line has a prompt and its options, with tabs between them.",
        epilog="Exit code: 0 if all inputs were predicted; 1 if one could not be (it is named on stderr, the others "
        "are predicted); 2 for a wrong argument.",
    )
    parser.add_argument("inputs", nargs="*", metavar="INPUT")
    parser.add_argument(
        "--lines", action="append", default=[], metavar="FILE", help="the same as @FILE; - is standard input"
    )
    add_member(parser)
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object a line: input, label, score, scores, and member with --member",
    )
    parser.add_argument(
        "--top-k",
        type=positive,
        metavar="N",
        help="print the N most probable labels (default: 1, with --json all)",
    )
    parser.add_argument(
        "--batch-size", type=positive, metavar="N", help="inputs to predict at once (default: the run's)"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, metavar="N", help="longest text to write (default: the run's)"
    )
    add_device(parser)
    return parser


def _predictions(
    predictor, inputs: Sequence[Input], batch_size: int, line: Callable[[Prediction], str]
) -> tuple[list[str], list[str]]:
    """Return the problems of inputs that cannot be predicted, and the lines of the others, in the inputs' order."""
    outcomes = iter(predictor.outcomes([each.content for each in inputs if each.problem is None], batch_size))
    problems, lines = [], []
    for each in inputs:
        outcome = next(outcomes) if each.problem is None else None
        where = f"{each.place}: " if each.place else ""
        if outcome is None:
            quoted = f"{each.text[:_QUOTED]!r}: " if each.text.strip() else ""
            problems.append(f"{where}{quoted}{each.problem}")
        elif isinstance(outcome, PartialLoraError):
            problems.append(f"{where}{outcome}")
        else:
            lines.append(line(outcome))
    return problems, lines


def _json_line(top_k: int | None, member: str | None) -> Callable[[Prediction], str]:
    def line(prediction: Prediction) -> str:
        content = {
            "input": prediction.input,
            **({} if member is None else {"member": member}),
            "label": prediction.label,
            "score": prediction.score,
            "scores": dict(islice(prediction.scores.items(), top_k)),
        }
        return json.dumps(content, allow_nan=False) + "\n"

    return line


def _plain_line(top_k: int | None, labels: Sequence[str]) -> Callable[[Prediction], str]:
    """Put the labels first, in columns as wide as the run's labels need, so that a stream needs no look ahead."""
    from rich.cells import cell_len

    width = min(max(map(cell_len, labels), default=0), _WIDEST)

    def line(prediction: Prediction) -> str:
        if prediction.score is None:
            return f"{escaped(prediction.label)}  {escaped(prediction.input)}\n"
        best = islice(prediction.scores.items(), top_k or 1) if prediction.scores else [("", prediction.score)]
        columns = [f"{escaped(label)}{' ' * (width - cell_len(label))}  {score:.4f}" for label, score in best]
        return "  ".join([*columns, escaped(prediction.input)]).lstrip() + "\n"

    return line
