"""From command-line arguments to checked settings: what Hydra composes, and its errors in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from partial_lora.errors import PartialLoraError
from partial_lora.runs import plan
from partial_lora.runs.unknown_key import no_such_key

USAGE_ERROR = 2
_SWEEPS = "pip install 'partial-lora[sweeps]'"
_PLUG_INS = {  # of Hydra, by the launchers and sweepers that they bring
    "joblib": _SWEEPS,
    "submitit_local": _SWEEPS,
    "submitit_slurm": _SWEEPS,
    "ray": "pip install 'partial-lora[ray]'",
    "optuna": _SWEEPS,
}


def compose(
    command: str,
    arguments: list[str],
    work: Callable[[dict], int],
    *,
    stage: str | None = None,
) -> int:
    """Let Hydra compose one run or a sweep from the arguments, and `work` with each once all are checked.

    stage: what the runs of a sweep are to do, "train" or "calibrate", by whatever launches them; None for work that is
    done here, one after another.

    Gives the exit code: the highest of the runs, USAGE_ERROR where one was refused. No further run starts after one
    that was interrupted. Raises PartialLoraError for arguments that do not compose.
    """
    from hydra.core.config_store import ConfigStore

    from partial_lora.runs import config, schema, sweep

    refuse_group_lists(arguments)
    ConfigStore.instance().store(name="schema", node=schema.Config)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here, instead of out of Hydra on several lines
    shows = {"--cfg", "-c", "--help", "-h", "--hydra-help", "--info", "-i"}
    if not shows & {argument.partition("=")[0] for argument in arguments}:
        with _in_one_line(arguments):
            planned = plan.plan(arguments, config.conf_dir(), config.resolve)
        for line in planned.refused:
            print(f"partial-lora: {line}", file=sys.stderr)
        if planned.refused:
            return USAGE_ERROR
        if planned.is_sweep and stage:
            return sweep.sweep(planned, stage, config.resolve, partial(_hydra, command, arguments))
        for key, name in (("launcher", planned.launcher), ("sweeper", planned.sweeper)):
            if planned.is_sweep and name != "basic":
                raise PartialLoraError(f"hydra/{key}={name}: expected basic; {command} has no runs to be launched")
    codes: list[int] = []

    def job(composed) -> None:
        try:
            codes.append(work(config.resolve(composed)))
        except PartialLoraError as error:  # said here: Hydra would add lines of its own
            print(f"partial-lora: {error}", file=sys.stderr)
            codes.append(USAGE_ERROR)
        if codes[-1] > USAGE_ERROR:  # interrupted: no further run of a sweep starts
            raise SystemExit(codes[-1])

    _hydra(command, arguments, job)
    return max(codes, default=0)


def _hydra(command: str, arguments: list[str], job: Callable) -> None:
    """Call `job` with every config that Hydra composes from the arguments; raises PartialLoraError in one line."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    from partial_lora.runs import config

    GlobalHydra.instance().clear()
    sys.argv = [f"partial-lora {command}", *arguments]
    with _in_one_line(arguments):
        hydra.main(version_base="1.3", config_path=str(config.conf_dir()), config_name=plan.CONFIG_NAME)(job)()


@contextmanager
def _in_one_line(arguments: Sequence[str]) -> Iterator[None]:
    """Make PartialLoraErrors of Hydra's and OmegaConf's errors."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: an override without a key
        if isinstance(error, PartialLoraError):
            raise
        raise PartialLoraError(composition_error(error, arguments)) from error


def refuse_group_lists(arguments: Sequence[str]) -> None:
    """Hydra would merge the files of a list of groups into one, or take a plug-in's name for its settings."""
    from partial_lora.runs.config import GROUPS

    for argument in arguments:
        key, _, value = argument.partition("=")
        if key.lstrip("+") in GROUPS and value.startswith("["):
            raise PartialLoraError(f"{argument}: expected one name; for a run of each use -m {key}={value.strip('[]')}")
        if key in ("hydra.launcher", "hydra.sweeper"):
            raise PartialLoraError(f"{argument}: expected {key.replace('.', '/')}={value}, with a slash")


def composition_error(error: BaseException, arguments: Sequence[str]) -> str:
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
        key = lines[0].split("'")[1]
        return no_such_key(key, "hydra" if key.startswith("hydra.") else "job")
    if key:
        reason = str(getattr(cause, "msg", None) or cause).splitlines()[0]
        return f"{key}: {'expected a value, not null' if 'is not Optional' in reason else reason}"
    if any("Available options" in line for line in lines):
        missing = next(line for line in lines if "Could not" in line)
        start = next(index for index, line in enumerate(lines) if "Available options" in line) + 1
        options = [line for line in lines[start:] if "=" not in line and "search path" not in line]
        group = missing.split("'")[-2] if missing.count("'") >= 2 else missing
        folder, _, name = group.rpartition("/")
        said = f"{folder}={name}: no such file in the group; expected one of {', '.join(options)}"
        return said + (f"; {_PLUG_INS[name]} brings it" if name in _PLUG_INS else "")
    for argument in arguments:
        if "," in argument and "ambiguous" in " ".join(lines).lower():
            return f"{argument}: several values; for a run of each add -m"
    return " ".join(lines)
