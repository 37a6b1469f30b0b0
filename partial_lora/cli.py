"""The command line: which command it names, and how it ends."""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import os
import signal
import sys
from collections.abc import Callable, Sequence

from partial_lora import credentials
from partial_lora.commands.common import Parser, WantedError
from partial_lora.commands.compare_or_judge import compare
from partial_lora.commands.evaluate_or_predict import evaluate, predict
from partial_lora.commands.hand_over import export, merge, push
from partial_lora.commands.inform import env, info, schema
from partial_lora.commands.list_and_report import pack, report, runs
from partial_lora.commands.train_or_calibrate import stage_command
from partial_lora.commands.write_texts import chat, generate, serve
from partial_lora.errors import PartialLoraError, ProofError, escaped
from partial_lora.launching import imports
from partial_lora.settings.compose import USAGE_ERROR
from partial_lora.signals import handling, leave


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
    Parser.is_wanted = True
    try:
        COMMANDS[command][0]([])
    except WantedError as wanted:
        return wanted.args[0]
    finally:
        Parser.is_wanted = False
    return None


def _overview(arguments: list[str]) -> int:
    """Print the help or the version, or refuse a command that does not exist."""
    from importlib.metadata import version

    parser = Parser(
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


def _forget_stdout() -> None:
    """Let go of an output that nobody reads any more: Python would complain when it flushes it at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "train": (
        functools.partial(stage_command, "train"),
        "calibrate, mask, train and evaluate one run (FILE.yaml, KEY=VALUE …), or a sweep with -m",
    ),
    "calibrate": (functools.partial(stage_command, "calibrate"), "find the sparsities alone (the keys of train)"),
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
