"""The commands: their parsers, their bars and what they print.

Heavy imports stay inside the functions that need them: neither `--help` nor a wrong argument waits for torch.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import inspect
import io
import json
import math
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from partial_lora import credentials
from partial_lora.errors import PartialLoraError, ProofError, escaped, require
from partial_lora.finished.export_forms import FORMS
from partial_lora.finished.inputs import is_stream, read_inputs
from partial_lora.finished.run import finished_run
from partial_lora.finished.target_task import evaluation_settings, one_task
from partial_lora.launching import cluster, directory, imports, launch, packs
from partial_lora.progress import Bars, bar
from partial_lora.report import EXAMPLES
from partial_lora.settings.arguments import is_file, settings_of
from partial_lora.settings.compose import USAGE_ERROR, compose, composed
from partial_lora.settings.rates import trainer_of
from partial_lora.settings.schema import Config
from partial_lora.settings.versions import plain
from partial_lora.signals import handling, leave
from partial_lora.tasks.kinds import kind_of

if TYPE_CHECKING:
    from rich.console import Console

    from partial_lora.building.info import Outline
    from partial_lora.compare.judge_options import Judging
    from partial_lora.finished.inputs import Input
    from partial_lora.finished.predict import Prediction
    from partial_lora.finished.run import FinishedRun

_RUN = "a finished run: its path, `latest`, or the start of its id (`partial-lora runs` lists them)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; return its exit code: 0 done, 1 a run failed, 2 a wrong input, above 128 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name, others = (arguments[0], arguments[1:]) if arguments else (None, [])
    if {"-sc", "--shell-completion"} & {*arguments}:
        return guarded(lambda: _complete(arguments))
    return guarded(lambda: COMMANDS[name][0](others) if name in COMMANDS else _overview(arguments))


def guarded(command: Callable[[], int]) -> int:
    """Return the exit code of a command, whose wrong inputs become one line, and whose output shows no credentials."""
    credentials.redact_output()
    imports.refuse_hub_code()
    try:
        # So that nothing is left half-written, and nothing runs that a folder holds beside its settings.
        with handling(leave, (signal.SIGTERM, signal.SIGHUP)), imports.none_of_this_folder():
            return command()
    except PartialLoraError as error:
        print(f"partial-lora: {error}", file=sys.stderr)
        return 1 if isinstance(error, ProofError) else USAGE_ERROR
    except BrokenPipeError:  # of a reader that has seen enough (`| head`)
        _forget_stdout()
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno is None:  # of a library
            raise
        place = escaped(str(error.filename or ("a file")))
        print(f"partial-lora: {place}: {error.strerror}; check its name, rights and disk", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def script(main: Callable[..., int | None]) -> Callable[..., int]:
    """Make a function the command of a script: `guarded`, and with exit code 0 unless it returns another.

    A function without parameters is a script without arguments, whose --help is its docstring.
    """

    def run(*arguments) -> int:
        if not inspect.signature(main).parameters:
            about = sys.modules[main.__module__].__doc__
            argparse.ArgumentParser(
                description=about, formatter_class=argparse.RawDescriptionHelpFormatter
            ).parse_args()
        return guarded(lambda: main(*arguments) or 0)

    return functools.wraps(main)(run)


def _complete(arguments: list[str]) -> int:
    """Print the shell's completion script, or the words that may come next; return the exit code."""
    from partial_lora.completion import complete

    print(complete(arguments[-1], list(COMMANDS), parser_of))
    return 0


def parser_of(command: str) -> argparse.ArgumentParser | None:
    """Return the parser of a command, caught before it reads a word; None for a command whose words Hydra reads."""
    if command in ("train", "calibrate", "info"):
        return None
    _Parser.is_wanted = True
    try:
        COMMANDS[command][0]([])
    except _WantedError as wanted:
        return wanted.args[0]
    finally:
        _Parser.is_wanted = False
    return None


def _overview(arguments: list[str]) -> int:
    """Print the help or the version, or refuse a command that does not exist."""
    from importlib.metadata import version

    parser = _Parser(
        prog="partial-lora",
        description="Train, compare and use low-rank adapters that keep a random subset of their rows and columns.",
        epilog="`partial-lora train` alone runs an example. `partial-lora COMMAND --help` explains each command.",
    )
    parser.add_argument("--version", action="version", version=f"partial-lora {version('partial-lora')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, words) in COMMANDS.items():
        commands.add_parser(name, help=words)
    parser.parse_args(arguments)  # prints what is asked for, and exits
    parser.error("expected a command first")


class _WantedError(Exception):
    """A parser that was asked for, on its way to who asked."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all others are, in place of a page.

    is_wanted: a parser that is about to read words is raised instead, for completion.
    """

    is_wanted = False

    def parse_known_args(self, *arguments, **settings):
        if _Parser.is_wanted:
            raise _WantedError(self)
        return super().parse_known_args(*arguments, **settings)

    def parse_known_intermixed_args(self, *arguments, **settings):
        if _Parser.is_wanted:
            raise _WantedError(self)
        return super().parse_known_intermixed_args(*arguments, **settings)

    def _print_message(self, message: str, file: TextIO | None = None) -> None:
        print(message, end="", file=file)  # argparse would say nothing of a disk that is full

    def error(self, message: str) -> NoReturn:
        raise PartialLoraError(f"{message}; `{self.prog} --help` says more")


def _parser(command: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    return _Parser(prog=f"partial-lora {command}", description=description, epilog=epilog)


# --- train, calibrate, info: one run, or a sweep of them, whose settings Hydra composes from the arguments.


def _stage(stage: str, arguments: list[str]) -> int:
    """Run `train` or `calibrate`, once or as a sweep; return the exit code."""

    def launched(plan, hydra) -> int:
        from partial_lora.launching import sweep

        return sweep.sweep(plan, stage, run, hydra)

    return compose(stage, arguments, lambda config: run(config, stage).exit_code, sweep=launched)


def run(config: Config, stage: str, *, shown: bool = True, **settings: Any) -> launch.Outcome:
    """Launch a run, draw its figures and page once it has finished, and return how it ended.

    shown: on the terminal, with bars while it lasts and a table at its end; else silently, where other runs use the
    terminal, too. settings: `stop` and `slot` of `launch.launch`. Raises PartialLoraError as `launch.launch` does.
    """
    launch.refuse_foreign_world()
    if not shown:
        return _ended(launch.launch(config, stage, **settings), config, stage)
    from rich.console import Console

    console = Console()
    print(f"{stage} {launch.directory_of(config, stage)}")
    with Bars(console) as bars:
        outcome = launch.launch(config, stage, watch=bars.update, note=bars.note, **settings)
    _print_outcome(_ended(outcome, config, stage), stage, config, console)
    return outcome


def _ended(outcome: launch.Outcome, config: Config, stage: str) -> launch.Outcome:
    """Return how a run ended; link it as `latest` if it was trained, and draw it, unless only its record is left."""
    is_whole = directory.is_finished if stage == "train" else directory.is_calibrated
    if not outcome.exit_code and not outcome.elsewhere and is_whole(outcome.directory):
        if stage == "train":
            directory.link_latest(config.results_dir, outcome.directory)
        if not directory.is_drawn(outcome.directory, stage):
            _draw(outcome.directory, config)
    return outcome


def _draw(place: Path, config: Config) -> None:
    with _libraries():  # a drawing that reads the rows of its task needs them, too
        from partial_lora.report import page

        page.draw_run(place, plain(config))


def _print_outcome(outcome: launch.Outcome, stage: str, config: Config, console: Console) -> None:
    """Print why a run did not end well, or the short table of its results and what can be done with them."""
    from partial_lora.report import summary

    if outcome.status in ("interrupted", "failed"):
        print(f"partial-lora: {outcome.reason}", file=sys.stderr)
        return
    if outcome.status == directory.PAUSED:
        print(f"paused (trainer.until={config.trainer.until:g}); the same command without it goes on from there")
        return
    if outcome.status == "skipped":
        print("finished before, not run again (overwrite=true runs it again)")
    if outcome.elsewhere:
        print(outcome.elsewhere)
        return
    closing = summary.summary if stage == "train" else summary.calibration_summary
    console.print(closing(packs.recorded(outcome.directory)))
    print(*_next_steps(outcome.directory, stage, config), sep="\n")


def _next_steps(place: Path, stage: str, config: Config) -> list[str]:
    """Return lines, unbroken: where a run's files are, a path each, and the commands that take the run."""
    drawn = (directory.PAGE, directory.PICTURE) if stage == "train" else (directory.CURVES,)
    lines = [str(place), *(str(place / name) for name in drawn if (place / name).is_file())]
    if stage == "calibrate":
        return [*lines, "next: `partial-lora train` with the same keys uses these sparsities"]
    results = Path(config.results_dir)
    link = results / directory.LATEST
    named = directory.LATEST if results == Path("results") else link
    from partial_lora.report.summary import next_commands

    is_latest = link.resolve() == place.resolve()
    example = place / directory.EXAMPLE
    commands = [f"partial-lora report {shlex.quote(str(results))}"]
    if directory.is_finished(place):  # else its record is all there is
        commands[:0] = next_commands(
            str(named if is_latest else place),
            plain(config),
            example=str((link if is_latest else place) / example.name) if example.is_file() else None,
        )
    return [*lines, f"next: {commands[0]}", *(f"      {command}" for command in commands[1:])]


def info(arguments: list[str]) -> int:
    """Print a run's trainable parameters, memory and file size, without running it; return the exit code.

    --memory also counts what a step keeps for its backward pass, on a model without memory.

    A text model without a named task is counted with a task of two classes.
    """
    shown = _print_json_outline if "--json" in arguments else _print_outline
    keys = [key for each in arguments for key in (settings_of(each) if is_file(each) else [each])]
    named = any(re.match(r"\+*task\b", str(key)) for key in keys)

    def outlined(config: Config) -> int:
        from partial_lora.building.info import outline, without_task

        config = config if named else without_task(config)
        with _libraries():  # some methods are counted with them
            run = outline(config, memory="--memory" in arguments)
        shown(config, run)
        return 0

    options = ("--json", "--memory")
    return compose("info", [argument for argument in arguments if argument not in options], outlined)


def _print_json_outline(config: Config, run: Outline) -> None:
    names = {group: getattr(config, group).name for group in ("model", "task", "method")}
    rates = _rates(config, run)
    of_rates = {"learning_rate": rates, "first_learning_rate": rates["adapter"]}
    print(json.dumps(names | dataclasses.asdict(run) | of_rates, allow_nan=False))


def _rates(config: Config, run: Outline) -> dict[str, float]:
    known = {"width": run.width, "density": run.density, "has_head": config.model.trains_whole}
    return trainer_of(plain(config), config.trainer, **known).learning_rates


def _print_outline(config: Config, run: Outline) -> None:
    from rich.console import Console

    from partial_lora.building import size

    Console().print(size.table(run.counts, run.memory, run.kept, masked=config.method.traits.masked))
    heads = {0: "there is no head", 1: "the head is for one number"}
    head = heads.get(run.outputs, f"the head is for {run.outputs} classes")
    head += "" if run.is_known else ", a guess: the task does not say how many there are"
    passes = f"calibration takes at most {run.passes:,} passes" if run.passes else "nothing is calibrated"
    text = f"{run.sparsity_is}; {head}; {passes}"
    if run.memory:
        sequences, length = config.trainer.local_batch_size, config.model.max_length
        text += f"; memory is for {sequences} sequences of {length} tokens at once, and an estimate"
        text += "\nfor less memory: model.gradient_checkpointing=true, model.quantization=nf4, a smaller"
        text += " model.max_length, or the same batch in parts: trainer.gradient_accumulation_steps"
    rates = ", ".join(f"{part} {rate:.3g}" for part, rate in _rates(config, run).items())
    text += f"\nlearning rate: {rates}"
    print(text, *(f"beware: {line}" for line in config.warnings), sep="\n")


def env(arguments: list[str]) -> int:
    """Print versions, platform and devices, as a report of a bug needs them; return the exit code."""
    parser = _parser("env", "Print what a report of a bug needs: versions, platform, devices. It prints no paths.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parsed = parser.parse_args(arguments)
    from partial_lora.launching.env import surroundings

    with _libraries():
        found = surroundings()
    lines = [f"{name:<16} {value}" for name, value in found.items()]
    print(json.dumps(found) if parsed.json else "\n".join(lines))
    return 0


def schema(arguments: Sequence[str]) -> int:
    """Print the JSON Schema of a settings file; return the exit code."""
    parser = _parser(
        "schema",
        "Print the JSON Schema of a settings file: keys, types, ranges, choices and what each key means. The first "
        "line of a file names it to an editor with a YAML language server: # yaml-language-server: $schema=schema.json",
        epilog="For example: partial-lora schema > schema.json",
    )
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="a folder of group files of your own")
    place = parser.parse_args(list(arguments)).config_dir
    require(place is None or place.is_dir(), "--config-dir", place, "a folder of group files")
    from partial_lora.settings.editor import json_schema

    known = json_schema(plain(composed()), [place] if place else [])
    print(json.dumps(known, indent=1, ensure_ascii=False))
    return 0


# --- compare: searches, seeds where they decide, a verdict.


def compare(arguments: Sequence[str]) -> int:
    """Find out which method is best at equal size, or what finished scores decide; return the exit code."""
    parser = _parser(
        "compare",
        "Find out which method is best on your task at one size or under one limit. Every method searches "
        "for its learning rate; of more than three, those that are behind after half a run go no further. The others "
        "are trained with two seeds. From there seeds go to what is undecided, until the best is known or the time is "
        "over. It ends with a verdict in words, a table, a page, and the files to act with. "
        "Finished runs are not run again. With FILE or FOLDER nothing is trained: it judges the scores that are there, "
        "of finished runs, tables, PEFT's method_comparison or lm-eval; then the exit code is 1 while not all is "
        "decided.",
        epilog="For example: partial-lora compare task=text_table task.data_files=mails.csv model=minilm_l6 "
        "methods=[lora,partial,entries] margin=2 hours=1; or: partial-lora compare scores.csv margin=2",
    )
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="FILE|FOLDER|KEY=VALUE",
        help="methods=[…] or auto; budgets=[0.13]: shares of dense LoRA's parameters, or numbers of parameters; or "
        "one limit.{served,kept,memory,seconds}: bytes of the file that is served, bytes kept for the backward pass, "
        "peak memory, seconds a step; serve=true: what servers load alone; margin=1: points within which a method is "
        "as good; hours=N: that it may take; jobs=N: runs side by side (as many as cores and memory allow); "
        "search=quick, or full; seeds=N: of every method, in place of two and more where they decide; "
        "rates=3: learning rates of a search; reference=NAME: the method from which the table's differences are "
        "(lora, else the first); forgets=FILE or TASK, or several in brackets: of a language model, its loss on other "
        "rows before and after training, too; results_dir=results/compare; all other keys are those of train. "
        "experiment=race stage=methods alone is that stage of the study that its file lists. Beside FILE or FOLDER: "
        "margin=1; reference=NAME: judge by it in place of the best; rows=N: test rows behind each score; metric=NAME; "
        "lower=true: less is better; results_dir=verdict",
    )
    _add_where(parser)
    parser.add_argument("--json", action="store_true", help="of finished scores: print one JSON object")
    parser.add_argument("--verify", action="store_true", help="derive the verdict of take/verdict.json again")
    parsed = parser.parse_intermixed_args(list(arguments))
    from partial_lora.compare.judge_options import Judging
    from partial_lora.compare.options import check, of_one, of_study, read

    if parsed.verify:
        return _verify(parsed.settings)
    if judging := Judging.of(parsed.settings):
        return _judge(judging, parsed.where, shlex.join(["partial-lora", "compare", *arguments]), parsed.json)
    if parsed.where or parsed.json:
        raise PartialLoraError("--where, --json: expected a file or folder of finished scores beside them")
    parts = [read(each) for each in of_study(parsed.settings)]
    options = of_one([chosen for chosen, _ in parts])
    for part in parts:
        check(*part)
    with _libraries():
        from partial_lora.compare.comparison import Comparison
    from rich.console import Console

    say = functools.partial(print, flush=True)
    comparison = Comparison.of(options, parts)
    comparison.measure(say)
    with Bars(Console()) as bars:
        code = comparison.run(say, watch=bars.update, note=bars.note, sweep=functools.partial(_stage, "train"))
    if code > 2:
        print("the same command goes on from here", file=sys.stderr)
        return code
    for line in comparison.remarks:
        print(f"partial-lora: {line}", file=sys.stderr)
    conclusion = comparison.conclude(shlex.join(["partial-lora", "compare", *arguments]))
    if conclusion is None:
        return 1
    Console().print(conclusion.table)
    for sentences, take in conclusion.verdicts:
        print(*sentences, take, sep="\n")
    print(conclusion.page)
    return code


def _judge(judging: Judging, where: Sequence[str], command: str, as_json: bool) -> int:
    """Judge finished scores; return 0 where all is decided, else 1."""
    with _libraries():
        from partial_lora.compare import judge, scores
    found = scores.read(judging.places, where=where, metric=judging.metric, lower=judging.lower, rows=judging.rows)
    judgements = judge.every(found, judging.margin, judging.reference)
    files = judge.write(judgements, found, Path(judging.results_dir), command=command)
    if as_json:
        print(json.dumps(judge.as_json(judgements, found), allow_nan=False))
    else:
        from rich.console import Console

        for line in found.left_out:
            print(f"partial-lora: {line}", file=sys.stderr)
        for judgement in judgements:
            Console().print(judge.on_screen(judgement))
            print(*judge.sentences(judgement), "", sep="\n")
        print(*files, sep="\n")
    return int(not all(judgement.is_decided for judgement in judgements))


def _verify(places: Sequence[str]) -> int:
    """Derive the verdict of a certificate again; return 0 where it holds, else 1."""
    require(len(places) == 1, "--verify", " ".join(places), "one take/verdict.json of a comparison")
    from partial_lora.report import certificate

    wrong = certificate.found_wrong(Path(places[0]))
    for line in wrong:
        print(f"partial-lora: {places[0]}: {line}", file=sys.stderr)
    if not wrong:
        print(f"{places[0]}: the scores beside it say the same")
    return int(bool(wrong))


# --- evaluate, predict, generate, chat, serve, export, merge, push: what is done with a finished run.


def _of_run(command: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    parser = _parser(command, description, epilog)
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help=_RUN)
    return parser


def _add_member(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--member", metavar="NAME", help="the task that you mean, if the run has several")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")


def _number(kind: type, fits: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    """Return what reads an option's number. kind: int or float."""

    def read(value: str) -> float:
        with contextlib.suppress(ValueError):
            if fits(number := kind(value)):
                return number
        raise argparse.ArgumentTypeError(f"expected {expected}, not {value!r}")

    return read


_whole = _number(int, lambda number: 0 <= number < 2**32, "a whole number of at least 0")
_positive = _number(int, lambda number: 1 <= number < 2**32, "a whole number of at least 1")
_port = _number(int, lambda number: 0 <= number < 2**16, "a port, 0 to 65535")
_temperature = _number(float, lambda number: number == 0 or 1e-3 <= number < math.inf, "0, or a number from 0.001 on")
_weight = _number(float, math.isfinite, "a finite number")
_share = _number(float, lambda number: 0 < number <= 1, "a share above 0 and at most 1")


def evaluate(arguments: Sequence[str]) -> int:
    """Evaluate a finished run on another split or task, print its metrics and where they are; return the exit code.

    Raises PartialLoraError for a run that is none, a key that is not one of the task's, and labels of other names.
    """
    parser = _of_run(
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
    _add_member(parser)
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
        with _libraries():
            from partial_lora.finished.harness import evaluate_by_harness
        folder, record = evaluate_by_harness(run, parsed.lm_eval, **means)
    else:
        with _libraries():
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


@contextlib.contextmanager
def _libraries() -> Iterator[None]:
    """Import torch, datasets and their kin inside the block, in the environment they need: no bars, OpenMP threads.

    OpenMP's variables are of this process alone: runs that it starts find their own.
    """
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with imports.variables(cluster.openmp()), imports.importing():
        yield


_WIDEST = 32  # columns that a label is padded to, at most
_QUOTED = 80  # characters of a line that an error repeats


def predict(arguments: Sequence[str]) -> int:
    """Predict what the arguments name and print it, as many inputs at a time as share batches (`Predictor.window`).

    Returns 0, or 1 where an input could not be predicted: it is named on stderr, and the others go on. Raises
    PartialLoraError for a run or an argument that is none.
    """
    parsed = _predict_parser().parse_intermixed_args(list(arguments))
    run = _answering(parsed.run)
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
    with _libraries():
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


def _answering(place: Path) -> FinishedRun:
    """Return the finished run that a user names; of `latest`, say on stderr which one it is."""
    run = finished_run(place)
    if place.name == directory.LATEST:
        test, config = run.result["metrics"]["test"], run.config
        score = test.get(test["primary"])
        shown = f"{score:.4f}" if isinstance(score, (int, float)) else "no number"
        of = f"{config.task.name}, {config.model.name}, {config.method.name}, test {test['primary']} {shown}"
        print(escaped(f"{place}: {of} ({run.directory})"), file=sys.stderr)
    return run


def _forget_stdout() -> None:
    """Let go of an output that nobody reads any more: Python would complain when it flushes it at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _predict_parser() -> argparse.ArgumentParser:
    parser = _of_run(
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
    _add_member(parser)
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object a line: input, label, score, scores, and member with --member",
    )
    parser.add_argument(
        "--top-k", type=_positive, metavar="N", help="print the N most probable labels (default: 1, with --json all)"
    )
    parser.add_argument(
        "--batch-size", type=_positive, metavar="N", help="inputs to predict at once (default: the run's)"
    )
    parser.add_argument(
        "--max-new-tokens", type=_positive, metavar="N", help="longest text to write (default: the run's)"
    )
    _add_device(parser)
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


def generate(arguments: Sequence[str]) -> int:
    """Print what a causal run writes after a prompt, as it is written; return the exit code.

    Raises PartialLoraError for a run that is none, or whose model writes no texts.
    """
    parser = _of_run(
        "generate",
        "Continue a prompt with a finished run of a causal language model, word by word. The prompt goes "
        "into the chat template if the prompts of the run's task did.",
    )
    parser.add_argument("prompt", metavar="PROMPT", help="a text; - reads one from standard input")
    _add_writing(parser)
    parsed = parser.parse_args(list(arguments))

    def prompts() -> list[str]:
        prompt = parsed.prompt if parsed.prompt != "-" else sys.stdin.read() if sys.stdin else ""
        if not prompt.strip():
            raise PartialLoraError("PROMPT: expected a text, not an empty one")
        return [prompt]

    return _write(parsed, prompts)


def chat(arguments: Sequence[str]) -> int:
    """Converse with a causal run, whose answers are printed as they are written; return the exit code.

    Raises PartialLoraError as `generate` does.
    """
    parser = _of_run(
        "chat",
        "Converse with a finished run of a causal language model. Each line of standard input is a turn, which the "
        "model reads with all before it; Ctrl-D ends the conversation.",
    )
    _add_writing(parser)
    return _write(parser.parse_args(list(arguments)), _turns)


def _add_writing(parser: argparse.ArgumentParser) -> None:
    """Add the options of how texts are written."""
    parser.add_argument(
        "--temperature",
        type=_temperature,
        default=0.0,
        metavar="T",
        help="0, the default: always the likeliest token; larger: more chance",
    )
    parser.add_argument(
        "--seed", type=_whole, metavar="N", help="draws the tokens above temperature 0 (default: no seed)"
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="a string that ends the text, beside the run's task.stop",
    )
    parser.add_argument("--max-new-tokens", type=_positive, metavar="N", help="default: the run's task.max_new_tokens")
    _add_member(parser)
    _add_device(parser)


def _write(parsed: argparse.Namespace, prompts: Callable[[], Iterable[str]]) -> int:
    """Print what a run writes after each prompt of one conversation."""
    run = _answering(parsed.run)
    run.check_causal(run.directory)
    one_task(run, parsed.member)
    if "" in parsed.stop:
        raise PartialLoraError("--stop: expected a text, not an empty one")
    turns = prompts()
    with _libraries():
        from partial_lora.finished.generate import Writer
    writer = Writer(
        run,
        member=parsed.member,
        device=parsed.device,
        max_new_tokens=parsed.max_new_tokens,
        stop=parsed.stop,
        temperature=parsed.temperature,
        seed=parsed.seed,
    )
    for _ in writer.converse(turns, lambda text: print(text, end="", flush=True)):
        print(flush=True)
    return 0


def _turns() -> Iterator[str]:
    """Yield the lines that a person writes, or those of standard input."""
    if sys.stdin is None or not sys.stdin.isatty():
        yield from (line.rstrip("\r\n") for line in sys.stdin or ())
        return
    print("Each line is a turn of a conversation. Ctrl-D ends it.", file=sys.stderr)
    with contextlib.suppress(EOFError):
        while True:
            yield input("> ")


def serve(arguments: Sequence[str]) -> int:
    """Become an OpenAI-compatible server of a causal run on this machine; raises PartialLoraError where none can be."""
    from partial_lora.finished import server

    parser = _of_run(
        "serve",
        "Serve a finished run of a causal language model on this machine, as OpenAI's API does (/v1), by a server that "
        "is installed: that of transformers, vLLM or llama.cpp. It serves RUN_DIR/export/merged, of llama.cpp "
        "RUN_DIR/export/gguf, and makes it if it is not there. Ctrl-C ends it.",
    )
    parser.add_argument(
        "--server", choices=tuple(server.SERVERS), help="default: transformers, else vllm; with --base llama.cpp"
    )
    parser.add_argument("--base", type=Path, metavar="FILE", help="llama.cpp: a GGUF file of the base model")
    parser.add_argument("--port", type=_port, default=8000, metavar="N", help="default: 8000; 0: any that is free")
    _add_device(parser)
    parsed = parser.parse_args(list(arguments))
    run = _answering(parsed.run)
    run.check_causal(run.directory)
    chosen, port = server.chosen(parsed.server, parsed.base), server.free(parsed.port)
    with _libraries():
        from partial_lora.building import build
        from partial_lora.finished import export
        from partial_lora.report import run_card
    folder = run.directory.resolve() / "export" / chosen.form
    if not directory.tensor_files(folder):
        export.export(run, chosen.form, describe=run_card.write)
    task = next(iter(run.config.task.members.values())) if run.config.task.members else run.config.task
    is_chat = build.transform_of(run.config.model, task).chat
    print(f"http://{server.HOST}:{port}/v1, once it has loaded {folder}; Ctrl-C ends it")
    print(server.question(folder.name, port, chat=is_chat, max_tokens=task.max_new_tokens, stop=task.stop), flush=True)
    server.become(chosen, folder, port, parsed.device, parsed.base)


def export(arguments: Sequence[str]) -> int:
    """Write a finished run's adapter for other programs; return the exit code: 1 where it does not pass its check."""
    parser = _of_run("export", "Write the adapter of a finished run for other programs.")
    parser.add_argument(
        "--to",
        required=True,
        choices=tuple(FORMS),
        help="; ".join(f"{name}: {form.words}" for name, form in FORMS.items()),
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: RUN_DIR/export/FORMAT")
    parser.add_argument(
        "--check",
        action="store_true",
        help="prove that the files load and compute the run's logits (peft, merged, serve: in an interpreter without "
        "this package; gguf: that the tensors are the run's)",
    )
    parsed = parser.parse_args(list(arguments))
    run = finished_run(parsed.run)
    with _libraries():
        from partial_lora.finished import export
        from partial_lora.report import run_card
    done = export.export(run, parsed.to, parsed.out, check=parsed.check, describe=run_card.write)
    written = "written again, as it was" if done.existed else "written"
    print(f"{done.folder}: {written} ({done.size:,} bytes)")
    if done.proof:
        print(f"checked: {done.proof}")
    return 0


def merge(arguments: Sequence[str]) -> int:
    """Write one adapter that combines those of several runs, print their overlaps, and return the exit code."""
    parser = _parser(
        "merge",
        "Merge the adapters of several finished runs into one, by PEFT's add_weighted_adapter. All runs "
        "must have been trained on the same base model.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="[BASE] RUN_DIR",
        help=f"{_RUN}; BASE may name the base model, to be sure: another one is refused",
    )
    parser.add_argument(
        "--weights", nargs="+", type=_weight, required=True, metavar="W", help="one number for each run"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--how",
        choices=("cat", "svd", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"),
        default="cat",
        help="cat (the default): exactly the weighted sum, with the sum of the ranks as its rank; svd: as close to it "
        "as the largest rank comes; the others combine the factors in place of their products",
    )
    parser.add_argument(
        "--density",
        type=_share,
        default=0.5,
        metavar="P",
        help="ties, dare_… and magnitude_prune: the share of each factor's entries to keep, zeros included (default: "
        "0.5)",
    )
    parsed = parser.parse_args(list(arguments))
    from rich.console import Console
    from rich.table import Table

    is_base = len(parsed.runs) == len(parsed.weights) + 1 and not _is_run(parsed.runs[0])
    base = parsed.runs.pop(0) if is_base else None
    runs = [finished_run(each) for each in parsed.runs]
    for run in runs if base else ():
        known = (run.config.model.name, run.config.model.weights.partition("@")[0])
        require(
            str(base).partition("@")[0] in known,
            "BASE",
            base,
            f"{' or '.join(known)}, which {run.directory} was trained over",
        )
    with _libraries():
        from partial_lora.finished import merge
    overlaps = merge.merge(runs, parsed.weights, parsed.out, way=parsed.how, density=parsed.density)
    table = Table("run", "and run", "rows", "columns", "entries of W", title="what both change, of the smaller one's")
    for each in overlaps:
        shares = (f"{share:.1%}" for share in (each.rows, each.columns, each.entries))
        table.add_row(str(each.first + 1), str(each.second + 1), *shares)
    Console().print(table)
    print(f"{parsed.out}: written")
    return 0


def _is_run(place: Path) -> bool:
    return (directory.find(place) / directory.RESULT).is_file()


def push(arguments: Sequence[str]) -> int:
    """Upload a finished run's adapter to the model hub, with a page on it; return the exit code."""
    parser = _of_run(
        "push",
        "Upload the adapter of a finished run to the model hub, with the settings that made it and a page "
        "with its scores and sizes. The token is the one of huggingface_hub (`hf auth login`, HF_TOKEN).",
    )
    parser.add_argument("repo", metavar="OWNER/NAME")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument(
        "--compact", action="store_true", help="upload the kept values alone, in place of an ordinary adapter"
    )
    parser.add_argument(
        "--license", metavar="NAME", help="a licence by the hub's name, such as apache-2.0 (default: none)"
    )
    parser.add_argument("--dry-run", action="store_true", help="write RUN_DIR/export/hub and upload nothing")
    parsed = parser.parse_args(list(arguments))
    from partial_lora.finished import push

    push.check(parsed.repo)
    run = finished_run(parsed.run)
    with _libraries():
        from partial_lora.report import run_card
    folder = push.write(
        run, lambda built: run_card.card(run, parsed.repo, built, license=parsed.license), compact=parsed.compact
    )
    place = folder if parsed.dry_run else push.upload(folder, parsed.repo, private=parsed.private)
    print(f"{place}: written")
    return 0


# --- runs, report: what runs there are, and what the finished ones come to.


def _of_results(command: str, description: str) -> argparse.ArgumentParser:
    """Return the parser of a command that takes a results directory."""
    parser = _parser(command, description)
    parser.add_argument("results_dir", nargs="?", default=Path("results"), type=Path, metavar="RESULTS_DIR")
    return parser


def runs(arguments: Sequence[str]) -> int:
    """List the runs of a results directory, the last one last; return the exit code."""
    parser = _of_results(
        "runs",
        "List the runs of a results directory, the last one last: when it began, task, model, method, "
        "operating point, seed, test score (or how the run stands), path. Other commands take the path, the start of "
        "the run's id, or `latest`.",
    )
    place = parser.parse_args(list(arguments)).results_dir
    from partial_lora.report import summary

    found = [(path, packs.recorded(path)) for path in packs.directories(place)]
    found.sort(key=lambda run: str((run[1] or {}).get("started") or ""))  # an ISO time in UTC
    rows = [[*map(escaped, summary.run_line(path, result))] for path, result in found]
    if not rows:
        raise PartialLoraError(f"{place}: expected runs in {place}/runs; `partial-lora train` makes them")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return 0


def pack(arguments: Sequence[str]) -> int:
    """Pack the finished runs of a results directory into two tables; return 1 where something broken is left out."""
    parser = _of_results(
        "pack",
        "Write the finished runs of a results directory into two tables: RESULTS_DIR/runs.parquet, a row a "
        "run with its whole record, and predictions.parquet, a row a test example. Runs that are packed already stay; "
        "report, runs, compare and train read them. Runs that failed or have not ended are counted and left out.",
    )
    parser.add_argument(
        "--remove",
        action="store_true",
        help="then remove the folders of packed runs, their weights included, once the pack is read back and compared",
    )
    parsed = parser.parse_args(list(arguments))
    with _libraries():
        from partial_lora.report import tables, write_pack
    done = write_pack.pack(parsed.results_dir, remove=parsed.remove)
    for line in tables.said_of(done.left_out):
        print(f"partial-lora: {line}", file=sys.stderr)
    removed = f", {len(done.removed)} folders removed" if parsed.remove else ""
    print(f"{parsed.results_dir / packs.RUNS_TABLE}: {done.runs} runs, {done.added} new{removed}")
    return int(any(each.is_broken for each in done.left_out))


def _add_where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--where",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="take only runs of this task, method, operating_point, seed, … or setting (method.rank=16); A,B: A or B",
    )


def report(arguments: Sequence[str]) -> int:
    """Write the report of a folder of results; return 1 where something had to be left out, which is named, else 0."""
    parser = _of_results(
        "report",
        "Make tables, figures and one self-contained page of the finished runs of a folder, in "
        "RESULTS_DIR/report. Runs that failed or have not ended are counted and left out. A record that is broken or "
        "foreign is named, and the exit code is then 1. For the directory of one run, its page is made: "
        "RUN_DIR/index.html. `partial-lora compare RESULTS_DIR` says who is better.",
    )
    _add_where(parser)
    parser.add_argument("--by", metavar="KEY,KEY", help="average over everything else than these keys")
    parser.add_argument(
        "--examples",
        type=_whole,
        default=EXAMPLES,
        metavar="N",
        help="how many of the hardest test examples the page shows for each row (default: %(default)s; 0: none)",
    )
    parsed = parser.parse_args(list(arguments))
    with _libraries():
        from partial_lora.report import make_report, page, records
    place = directory.find(parsed.results_dir)
    if (place / directory.RESULT).is_file():
        if parsed.where or parsed.by:
            raise PartialLoraError(f"{place}: --where and --by choose among runs, and this is one; leave them out")
        print(f"wrote {page.write_run(records.one(place), examples=parsed.examples)}")
        return 0
    made = make_report.report(
        place,
        where=parsed.where,
        by=parsed.by,
        examples=parsed.examples,
        command=" ".join(["partial-lora report", *map(shlex.quote, arguments or [str(place)])]),
        note=lambda line: print(f"partial-lora: {line}", file=sys.stderr),
    )
    from rich.console import Console

    Console().print(made.table)
    print(*made.remarks, *(f"wrote {path}" for path in made.files), sep="\n")
    return 0 if made.is_whole else 1


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "train": (
        functools.partial(_stage, "train"),
        "calibrate, mask, train and evaluate one run (FILE.yaml, KEY=VALUE …), or a sweep with -m",
    ),
    "calibrate": (functools.partial(_stage, "calibrate"), "find the sparsities alone (the keys of train)"),
    "info": (info, "count trainable parameters, memory and file size, and download nothing (the keys of train)"),
    "schema": (schema, "print the JSON Schema of a settings file, for an editor"),
    "compare": (compare, "say which method to take at one size or under one limit, or what finished scores decide"),
    "evaluate": (evaluate, "score a finished run on another split or task"),
    "predict": (predict, "predict images, texts or lines of a file with a finished run"),
    "runs": (runs, "list the runs of a results directory: when, task, model, method, seed, score, path"),
    "generate": (generate, "continue a prompt with a finished run of a language model"),
    "chat": (chat, "converse with a finished run of a language model"),
    "serve": (serve, "serve a finished run of a language model over HTTP, as OpenAI's API does"),
    "env": (env, "print versions, platform and devices, for a report of a bug"),
    "pack": (pack, "pack the finished runs of a results directory into two tables"),
    "report": (report, "make tables, figures and a page of finished runs"),
    "export": (export, "write the adapter of a finished run for other programs"),
    "merge": (merge, "merge the adapters of several finished runs into one"),
    "push": (push, "upload the adapter of a finished run to the model hub, with a page on it"),
}
