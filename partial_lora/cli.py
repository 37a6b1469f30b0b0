"""Words to commands. Nothing here imports torch unless the command needs it."""

from __future__ import annotations

import argparse
import errno
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

from partial_lora.errors import PartialLoraError
from partial_lora.files import redact_output
from partial_lora.runs import launch
from partial_lora.runs.compose import USAGE_ERROR, Plan, compose
from partial_lora.runs.schema import Config

_UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and give its exit code: 0 done, 1 a run failed, 2 a wrong input, 130 and 143 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)

    def command() -> int:
        if arguments and arguments[0] in ("train", "calibrate", "info"):
            sweep = None if arguments[0] == "info" else partial(_sweep, arguments[0])
            return compose(arguments[0], arguments[1:], _COMMANDS[arguments[0]], sweep=sweep)  # Hydra's grammar
        if arguments and arguments[0] in ("evaluate", "predict", "report"):  # each has a parser of its own
            return getattr(import_module(f"partial_lora.{arguments[0]}_command"), arguments[0])(arguments[1:])
        return _parsed(arguments)

    return guarded(command)


def guarded(command: Callable[[], int]) -> int:
    """Return the exit code of a command, whose wrong inputs become one line, and whose output shows no credentials."""
    redact_output()
    launch.refuse_hub_code()
    try:
        return command()
    except PartialLoraError as error:
        print(f"partial-lora: {error}", file=sys.stderr)
        return USAGE_ERROR
    except OSError as error:
        if error.errno not in _UNWRITABLE or error.filename is None:
            raise
        place = f"cannot write to {error.filename}: {error.strerror}"
        print(f"partial-lora: results_dir: {place}; set it to a folder that can be written", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return 130


def _parsed(arguments: list[str]) -> int:
    from importlib.metadata import version

    parser = argparse.ArgumentParser(
        prog="partial-lora",
        description="Partial-LoRA: low-rank adapters of which only a random subset of rows and columns trains.",
        epilog="`partial-lora train` with nothing else runs the embedded default; every command has its own --help.",
    )
    parser.add_argument("--version", action="version", version=f"partial-lora {version('partial-lora')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    composed = {
        "train": "calibrate, mask, train and evaluate (KEY=VALUE …; -m for a sweep)",
        "calibrate": "find the sparsities alone (the same keys)",
        "info": "trainable parameters, memory and file size; downloads nothing (the same keys)",
        "evaluate": "a finished run on another split or task",
        "predict": "what a finished run says of images, texts or lines of a file",
        "report": "tables, figures and a page over finished runs",
    }
    for name, text in composed.items():
        commands.add_parser(name, help=text)
    export = commands.add_parser("export", help="a finished run's adapter as files for other programs")
    export.add_argument("run", type=Path, metavar="RUN_DIR")
    export.add_argument(
        "--to",
        required=True,
        choices=("peft", "compact", "merged"),
        help="peft: an ordinary LoRA adapter, zeros where masked; compact: the kept values alone; merged: the whole "
        "model in the format of transformers or timm",
    )
    export.add_argument("--out", type=Path, metavar="DIR", help="default: RUN_DIR/export/FORMAT")
    export.add_argument(
        "--check",
        action="store_true",
        help="prove that it loads and computes the run's logits (peft, merged: in an interpreter without this package)",
    )
    export.set_defaults(do=_export)
    parsed = parser.parse_args(arguments)
    return parsed.do(parsed)


def _export(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from partial_lora import errors
    from partial_lora.runs import export, finished

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    try:
        run = finished.finished_run(arguments.run)
        done = export.export(run, arguments.to, arguments.out, check=arguments.check)
    except errors.ProofError as error:
        print(f"partial-lora: {error}", file=sys.stderr)
        return 1
    console = Console()
    said = "written again, as it was" if done.existed else "written"
    console.print(f"{done.folder}: {said} ({done.size:,} bytes)", highlight=False, soft_wrap=True)
    if done.proof:
        console.print(f"checked: {done.proof}", highlight=False, soft_wrap=True)
    return 0


def _leave(number: int, frame: object) -> None:
    """End by way of exceptions, which leave nothing half-written behind."""
    sys.exit(128 + number)


def _train(config: Config) -> int:
    return launch.code(launch.run(config, "train"))


def _calibrate(config: Config) -> int:
    return launch.code(launch.run(config, "calibrate"))


def _sweep(stage: str, plan: Plan, hydra: Callable) -> int:
    from partial_lora.runs.sweep import sweep

    return sweep(plan, stage, hydra)


def _info(config: Config) -> int:
    from rich.console import Console

    from partial_lora.runs.info import outline
    from partial_lora.training import cost

    found = outline(config)
    console = Console()
    console.print(cost.table(found.counts, found.memory))
    heads = {0: "there is no head", 1: "the head is for one number"}.get(
        found.outputs, f"the head is for {found.outputs} classes"
    )
    said = f"{found.sparsity_is}; {heads}; a calibration takes at most {found.passes:,} passes"
    if found.memory:
        sequences, length = config.trainer.local_batch_size, config.model.max_length
        said += f"; memory is for {sequences} sequences of {length} tokens at once, and an estimate"
    console.print(said, highlight=False, soft_wrap=True)
    return 0


_COMMANDS: dict[str, Callable[[Config], int]] = {"train": _train, "calibrate": _calibrate, "info": _info}
