"""`partial-lora evaluate RUN_DIR [KEY=VALUE …]`: a finished run on another split or task, composed as a run is."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from partial_lora.errors import PartialLoraError
from partial_lora.runs import config, schema
from partial_lora.runs.compose import composition_error, refuse_group_lists
from partial_lora.runs.finished import asked_task, finished_run
from partial_lora.runs.schema import Config, TaskConfig
from partial_lora.training.config import TrainerConfig

if TYPE_CHECKING:
    from partial_lora.runs.evaluate import Evaluation

_TRAINER = ("device", "eval_batch_size")  # what may be told beside the task


def evaluate(arguments: Sequence[str]) -> int:
    """Evaluate what the arguments ask for, say how it went and where it is kept; gives the exit code.

    Raises PartialLoraError for a run that is none, a key that is not one of the task's, and labels of other names.
    """
    parsed = _evaluate_parser().parse_intermixed_args(list(arguments))
    run = finished_run(parsed.run)
    of_another = _names_a_task(parsed.overrides)
    known = asked_task(run, parsed.member, of_another=of_another)
    if known.member and of_another and known.outputs is None:
        raise PartialLoraError(
            f"--member {known.member}: the run's model has no heads, so that another task is asked without it"
        )
    task, trainer = composed(known.config, parsed.overrides)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is there
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from partial_lora.runs.evaluate import evaluate_run

    with _evaluate_bar() as advance:
        done = evaluate_run(
            run,
            task=task,
            member=parsed.member,
            split=parsed.split,
            device=trainer.device,
            batch_size=trainer.eval_batch_size,
            advance=advance,
        )
    if parsed.json:
        print(json.dumps({"folder": str(done.folder), **done.record}, allow_nan=False))
    else:
        _show(done)
    return 0


def composed(run: Config, overrides: Sequence[str]) -> tuple[TaskConfig, TrainerConfig]:
    """Return the task and the trainer of a finished run's settings, changed by Hydra overrides.

    `task=NAME` takes that group file in place of the run's own task. Raises PartialLoraError, in one line, for any
    other key, and as `config.resolve` does.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    _refuse_others(overrides)
    refuse_group_lists(overrides)
    trainer = {key: getattr(run.trainer, key) for key in _TRAINER}
    if trainer["device"] == "cuda":  # where it trained; here is perhaps none
        trainer["device"] = "auto"
    kept = {"trainer": trainer}
    if not _names_a_task(overrides):
        files, overrides = _files(run.task.data_files, overrides)
        kept["task"] = config.plain(run.task) | {"data_files": files}
        _refuse_other_rows(overrides)
    ConfigStore.instance().store(name="schema", node=schema.Config)
    ConfigStore.instance().store(name="evaluated", node={"defaults": ["schema", "_self_", {"task": None}], **kept})
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config.conf_dir()), version_base="1.3"):
            found = compose("evaluated", list(overrides))
        for group in ("task", "trainer"):
            for key in sorted(OmegaConf.missing_keys(found[group])):
                raise PartialLoraError(f"{group}.{key}: expected a value, its group file sets none")
        task, trainer = (OmegaConf.to_object(found[group]) for group in ("task", "trainer"))  # runs __post_init__
        config.check_files(task)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise PartialLoraError(composition_error(error, list(overrides))) from error
    if "task" in kept:
        _refuse_a_test_split_cut_anew(run.task.data_files, task.data_files)
    return task, trainer


def _names_a_task(overrides: Sequence[str]) -> bool:
    return any(override.partition("=")[0] == "task" for override in overrides)


def _files(recorded: str | Mapping | None, overrides: Sequence[str]) -> tuple[str | dict | None, list[str]]:
    """The files of the run's task with those of single splits that overrides name, and the other overrides.

    One PATH that a run had for all its splits is that of training rows where another file is named for a split.
    """
    prefix = "task.data_files."
    named = dict(each.removeprefix(prefix).split("=", 1) for each in overrides if each.startswith(prefix))
    others = [each for each in overrides if not each.startswith(prefix)]
    if not named:
        return recorded, others
    if recorded is None and "train" not in named:
        split = next(iter(named))
        raise PartialLoraError(
            f"task.data_files.{split}: the run's rows came without files; expected task.data_files={{train: FILE, "
            "test: FILE}"
        )
    known = {"train": recorded} if isinstance(recorded, str) else dict(recorded or {})
    return known | named, others


def _refuse_other_rows(overrides: Sequence[str]) -> None:
    """Splits of the run's own rows that are cut anew would hold rows that it was trained on."""
    for override in overrides:
        key = override.partition("=")[0]
        if key in {f"task.{name}" for name in ("split_seed", "validation_share", "train_samples", "train_split")}:
            raise PartialLoraError(f"{key}: a finished run keeps it, else splits would hold rows it was trained on")


def _refuse_a_test_split_cut_anew(recorded: str | Mapping | None, files: str | Mapping | None) -> None:
    """Other training rows may hold those that the run was trained on, and a test split cut from them would, too."""
    if isinstance(files, Mapping):
        is_cut = "test" not in files
    else:  # one file, or a folder of images that has none of its own for it
        is_cut = files is not None and Path(files).exists() and not Path(files, "test").is_dir()
    if is_cut and files != recorded:
        raise PartialLoraError(
            "task.data_files.train: a finished run keeps it, else splits would hold rows it was trained on; expected "
            "task.data_files.test=FILE"
        )


def _refuse_others(overrides: Sequence[str]) -> None:
    allowed = {f"trainer.{key}" for key in _TRAINER}
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise PartialLoraError(f"{override!r}: expected KEY=VALUE")
        if key != "task" and not key.startswith("task.") and key not in allowed:
            others = ", ".join(sorted(allowed))
            raise PartialLoraError(f"{key}: a finished run keeps it; expected task=NAME, task.KEY=VALUE, {others}")


def _evaluate_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="partial-lora evaluate",
        description="A finished run on another split or task. Without KEY=VALUE it is the run's own task. The labels "
        "of another task must have the names of the run's; a causal language model takes any task with options or "
        "responses. Kept in RUN_DIR/evaluations; what the run recorded stays.",
        epilog="For example: task=cifar10, task.data_files.test=FILE, task.test_samples=1000, trainer.device=cpu.",
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="task=NAME, task.KEY=VALUE, trainer.{device,eval_batch_size}"
    )
    parser.add_argument("--member", metavar="NAME", help="of a run of several tasks, the one that is meant")
    parser.add_argument("--split", choices=("test", "validation", "train"), default="test", help="default: test")
    parser.add_argument("--json", action="store_true", help="one object: folder, and all of evaluation.json")
    return parser


@contextmanager
def _evaluate_bar() -> Iterator[Callable[[int, int], None]]:
    """How far the evaluation is, on a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console

    from partial_lora.watch import Bars

    with Bars(Console(stderr=True)) as bars:
        yield lambda done, total: bars.update({"stage": "evaluate", "done": done, "total": total})


def _show(done: Evaluation) -> None:
    from rich.console import Console
    from rich.table import Table

    record: Mapping = done.record
    metrics = dict(record["metrics"])
    primary = metrics.pop("primary")
    drawn = Table(show_header=False, box=None, pad_edge=False)
    drawn.add_row("task", record["task"]["name"])
    drawn.add_row(record["split"], f"{record['examples']:,} examples")
    for name, value in metrics.items():
        drawn.add_row(name, "–" if value is None else f"{value:.4f}", style="bold" if name == primary else None)
    console = Console()
    console.print(drawn)
    console.print(f"wrote {done.folder}", highlight=False, markup=False, soft_wrap=True)
