"""Words to commands. Nothing here imports torch unless the command needs it."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from partial_lora.errors import PartialLoraError

_USAGE_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and give its exit code: 0 done, 1 a run failed, 2 a wrong input, 130 and 143 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments and arguments[0] in ("train", "calibrate", "info"):
            return _composed(arguments[0], arguments[1:])  # what follows is Hydra's grammar, not argparse's
        return _parsed(arguments)
    except PartialLoraError as error:
        print(f"partial-lora: {error}", file=sys.stderr)
        return _USAGE_ERROR
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
    }
    for name, text in composed.items():
        commands.add_parser(name, help=text)
    report = commands.add_parser("report", help="tables over finished runs, grouped over seeds")
    report.add_argument("results_dir", nargs="?", default="results", type=Path, metavar="RESULTS_DIR")
    return _report(parser.parse_args(arguments))


def _report(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from partial_lora import report, runs

    frame, problems = runs.collect(arguments.results_dir)
    for problem in problems:
        print(f"partial-lora: {problem}", file=sys.stderr)
    command = f"partial-lora report {arguments.results_dir}"
    written = report.write(frame, arguments.results_dir, command=command, problems=problems)
    console = Console()
    console.print(report.on_screen(frame))
    for path in written:
        console.print(f"wrote {path}", highlight=False)
    return 1 if problems else 0


def _composed(command: str, arguments: list[str]) -> int:
    """Let Hydra compose one run or a sweep from the arguments, and do the command for each once all are checked."""
    from hydra.core.config_store import ConfigStore

    from partial_lora import config, schema

    _refuse_group_lists(arguments)
    ConfigStore.instance().store(name="schema", node=schema.Config)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here, instead of out of Hydra on several lines
    shows = {"--cfg", "-c", "--help", "-h", "--hydra-help", "--info", "-i"}
    if not shows & {
        argument.partition("=")[0] for argument in arguments
    }:  # a wrong run of a sweep is refused before the first one starts, whatever would launch them
        refused: list[str] = []

        def check(composed) -> None:
            try:
                config.resolve(composed)
            except PartialLoraError as error:  # collected: Hydra would add lines of its own
                refused.append(str(error))

        _hydra(command, [*arguments, "hydra/launcher=basic"], check)
        for line in dict.fromkeys(refused):
            print(f"partial-lora: {line}", file=sys.stderr)
        if refused:
            return _USAGE_ERROR
    codes: list[int] = []

    def job(composed) -> None:
        codes.append(_COMMANDS[command](config.resolve(composed)))
        if codes[-1] > _USAGE_ERROR:  # interrupted: no further run of a sweep starts
            raise SystemExit(codes[-1])

    _hydra(command, arguments, job)
    return max(codes, default=0)


def _hydra(command: str, arguments: list[str], job: Callable) -> None:
    """Call `job` with every config that Hydra composes from the arguments; raises PartialLoraError in one line."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from partial_lora import config

    GlobalHydra.instance().clear()
    sys.argv = [f"partial-lora {command}", *arguments]
    try:
        hydra.main(version_base="1.3", config_path=str(config.conf_dir()), config_name="config")(job)()
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: an override without a key
        raise PartialLoraError(_composition_error(error, arguments)) from error


def _refuse_group_lists(arguments: Sequence[str]) -> None:
    """Hydra would merge the files of a list of groups into one; nobody means that."""
    from partial_lora.config import GROUPS

    for argument in arguments:
        key, _, value = argument.partition("=")
        if key.lstrip("+") in GROUPS and value.startswith("["):
            raise PartialLoraError(f"{argument}: expected one name; for a run of each use -m {key}={value.strip('[]')}")


def _composition_error(error: BaseException, arguments: Sequence[str]) -> str:
    """One line that names the key or the argument, out of Hydra's and OmegaConf's messages of several."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    for argument in arguments:
        if argument.startswith("-"):
            continue
        try:
            OverridesParser.create().parse_override(argument)
        except HydraException:
            return f"{argument!r}: expected KEY=VALUE, with quotes around a value of special characters"
        if not argument.partition("=")[0]:
            return f"{argument!r}: expected KEY=VALUE"
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    key = getattr(cause, "full_key", None)
    if lines[0].startswith("Could not override"):
        return f"{lines[0].split(chr(39))[1]}: no such key; `partial-lora train --cfg job` lists the keys there are"
    if key:
        reason = str(getattr(cause, "msg", None) or cause).splitlines()[0]
        return f"{key}: {'expected a value, not null' if 'is not Optional' in reason else reason}"
    if any("Available options" in line for line in lines):
        missing = next(line for line in lines if "Could not" in line)
        start = next(index for index, line in enumerate(lines) if "Available options" in line) + 1
        options = [line for line in lines[start:] if "=" not in line and "search path" not in line]
        group = missing.split("'")[-2] if missing.count("'") >= 2 else missing
        return f"{group.replace('/', '=')}: no such file in the group; expected one of {', '.join(options)}"
    for argument in arguments:
        if "," in argument and "ambiguous" in " ".join(lines).lower():
            return f"{argument}: several values; for a run of each add -m"
    return " ".join(lines)


def _train(settings: dict) -> int:
    return _launched(settings, stage="train")


def _calibrate(settings: dict) -> int:
    return _launched(settings, stage="calibrate")


def _launched(settings: dict, stage: str) -> int:
    from rich.console import Console

    from partial_lora import config, launch, results, watch

    launch.refuse_foreign_world()
    directory = config.run_directory(settings) if stage == "train" else config.calibration_directory(settings)
    finished = results.is_finished if stage == "train" else results.is_calibrated
    console = Console()
    console.print(f"{stage} {directory}", highlight=False)
    with watch.Bars(console) as bars:
        outcome = launch.launch(settings, directory, stage=stage, watch=bars.update, finished=finished)
    if outcome.status == "interrupted":
        print(f"partial-lora: interrupted by {outcome.message}; run the command again to redo it", file=sys.stderr)
        return 128 + signal.Signals[outcome.message]
    if outcome.status == "failed":
        print(f"partial-lora: {outcome.message} (log: {directory / results.LOG})", file=sys.stderr)
        return 1
    if outcome.status == "skipped":
        console.print("finished before, not run again (overwrite=true runs it again)")
    console.print(_closing(directory, stage))
    return 0


def _closing(directory: Path, stage: str):
    """The short table a run or a calibration ends with."""
    from partial_lora import report, results

    result = results.read_result(directory)
    return report.summary(result, directory) if stage == "train" else report.calibration_summary(result, directory)


def _info(settings: dict) -> int:
    from rich.console import Console

    from partial_lora import methods, models, parameters

    model, rank = settings["model"], settings["method"]["rank"]
    classes = settings["task"]["classes"] or 2
    empty = models.empty(architecture=model["architecture"], model_args=model["model_args"], num_labels=classes)
    shapes = parameters.target_shapes(empty, model["target_modules"], model["head"])
    sparsity, said = methods.foreseen_sparsity(settings["method"]["name"], shapes, rank, settings["calibration"])
    described = parameters.describe(
        empty, target_modules=model["target_modules"], head=model["head"], rank=rank, sparsity=sparsity
    )
    console = Console()
    console.print(parameters.table(described))
    console.print(f"{said}; the head is for {classes} classes", highlight=False)
    return 0


_COMMANDS: dict[str, Callable[[dict], int]] = {"train": _train, "calibrate": _calibrate, "info": _info}
