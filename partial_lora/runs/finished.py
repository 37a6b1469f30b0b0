"""A finished run, the task it is used on and the inputs it is shown, as commands are given them; none needs torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from partial_lora.errors import PartialLoraError, one_line
from partial_lora.runs import directory as results
from partial_lora.runs.arguments import in_grammar, parsed, refuse_group_lists
from partial_lora.runs.compose import composition_error
from partial_lora.runs.config import check_files, conf_dir, load, plain
from partial_lora.runs.schema import Config, TaskConfig
from partial_lora.tasks.folders import split_folders
from partial_lora.training.config import TrainerConfig


@dataclass(frozen=True)
class FinishedRun:
    """A run that ended well: its directory, its settings and its record.

    Settings that were recorded before a key was there have its default.
    """

    directory: Path
    config: Config
    result: dict

    @property
    def adapter(self) -> Path:
        """The folder of the trained adapter."""
        return self.directory / results.ADAPTER

    @property
    def method(self) -> str:
        return self.config.method.name

    @property
    def is_masked(self) -> bool:
        """True where its adapter has masks."""
        return (self.adapter / "partial_lora.json").is_file()

    def labels(self) -> list[str]:
        """Return the names of the classes, in the order of the logits; of a regression none.

        An early record lacks labels, which its predictions alone have; there a class that no test row has and that was
        never predicted is called by its index.
        """
        if "labels" in self.result:
            return list(self.result["labels"])
        import pandas

        path = self.directory / results.PREDICTIONS
        try:
            frame = pandas.read_parquet(path)
            names = dict(zip(frame["label"], frame["label_name"], strict=True))
            names |= dict(zip(frame["prediction"], frame["prediction_name"], strict=True))
            return [str(names.get(index, index)) for index in range(len(frame["logits"].iloc[0]))]
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            reason = one_line(error)
            raise PartialLoraError(f"{path} cannot be read ({reason}): run the training again") from error


def finished_run(directory: Path) -> FinishedRun:
    """Return the finished run in a directory, or that `latest` or the start of its id names (`directory.find`).

    Raises PartialLoraError, in one line, for a directory that holds no run, a run that failed, was interrupted or has
    only calibrated, and one that has lost files.
    """
    directory = results.find(directory)
    if not directory.is_dir():
        raise PartialLoraError(
            f"{directory}: no such directory, expected that of a run (results/runs/…/seed0), latest, or the start of "
            "its id; `partial-lora runs` lists them"
        )
    if not (directory / results.RESULT).is_file():
        raise PartialLoraError(f"{directory}: expected the directory of a run, with a {results.RESULT} in it")
    result = results.read_result(directory)
    if result is None:
        raise PartialLoraError(f"{directory / results.RESULT}: no record of a run, or a broken one")
    if result["status"] != "finished":
        error = f" ({result['error']})" if result.get("error") else ""
        raise PartialLoraError(f"{directory}: the run is {result['status']}{error}, expected a finished one")
    if not result.get("metrics"):
        raise PartialLoraError(f"{directory}: only calibrated, nothing was trained; `partial-lora train` makes a run")
    missing = results.missing(directory, result)
    if missing:
        raise PartialLoraError(
            f"{directory}: {missing}; the same `partial-lora train` with overwrite=true does the run again"
        )
    settings = result.get("config")
    try:
        _ = settings["model"]["architecture"], settings["method"]["name"], settings["seed"]
        return FinishedRun(directory, _with_found_files(load(settings), directory), result)
    except (KeyError, TypeError, AttributeError) as error:
        raise PartialLoraError(f"{directory / results.RESULT}: no settings of a run in it") from error


def _with_found_files(config: Config, run: Path) -> Config:
    """Return settings whose files of rows are found from any directory, where they still lie beside the results."""
    depth = len(Path(config.results_dir).parts) + len(Path(results.RUNS).parts)
    parents = run.resolve().parents
    if Path(config.results_dir).is_absolute() or len(parents) < depth:
        return config

    def found(files: str | Mapping | None) -> str | dict | None:
        if files is None:
            return None
        if isinstance(files, Mapping):
            return {split: found(file) for split, file in files.items()}
        here = parents[depth - 1] / files
        return files if Path(files).exists() or not here.exists() else str(here)

    def of(task: TaskConfig) -> TaskConfig:
        members = {name: of(member) for name, member in (task.members or {}).items()}
        return replace(task, data_files=found(task.data_files), members=members or task.members)

    return replace(config, task=of(config.task))


# --- The one task that a finished run is used on: its own or, of a mixture, the member that is named.


@dataclass(frozen=True)
class OneTask:
    """A single task, and the places of its classes among the outputs of the run's model.

    member: its name in the run's mixture; None where it is the run's own task.
    config: the run's settings, with this task.
    labels: the names of its classes; none of a regression, a choice or a generation.
    outputs: the places of its classes among the model's logits; None for all that there are.
    """

    member: str | None
    config: Config
    labels: list[str]
    outputs: list[int] | None


def one_task(run: FinishedRun, member: str | None = None, *, of_another: bool = False) -> OneTask:
    """Return the task that a run is used on.

    of_another: it is another task than the run's; a causal language model, having no heads, then needs no member.
    Raises PartialLoraError, in one line that lists the members, for a mixture without one, a name that is none of them,
    and a member of a run that is no mixture.
    """
    task = run.config.task
    members = task.members or {}
    if not members:
        if member is not None:
            raise PartialLoraError(f"--member {member}: the run has one task, {task.name}; leave it out")
        return OneTask(None, run.config, run.labels(), None)
    if member is None and of_another and task.kind != "label":
        return OneTask(None, run.config, [], None)
    listed = " or ".join(filter(None, [", ".join(list(members)[:-1]), list(members)[-1]]))
    if member is None:
        raise PartialLoraError(f"{run.directory}: the run has several tasks; name one: --member {listed}")
    if member not in members:
        raise PartialLoraError(f"--member {member}: no member of the run's mixture, expected --member {listed}")
    config = replace(run.config, task=members[member])
    if task.kind != "label":
        return OneTask(member, config, [], None)
    prefix = f"{config.task.name}/"
    own = {place: label for place, label in enumerate(run.result.get("labels", [])) if label.startswith(prefix)}
    if not own:
        raise PartialLoraError(f"{run.directory / results.RESULT}: no labels of {member} in it; train the run again")
    return OneTask(member, config, [label.removeprefix(prefix) for label in own.values()], list(own))


# --- The task that a finished run is evaluated on: its own, or what Hydra overrides make of it.

_TRAINER = ("device", "eval_batch_size")  # the keys that may be set beside the task
# Splits that are cut in another way would hold rows that the run was trained on.
_CUTS = ("split_seed", "validation_share", "test_share", "train_samples", "train_split")


def evaluation_settings(
    run: FinishedRun, overrides: Sequence[str], member: str | None = None
) -> tuple[TaskConfig, TrainerConfig]:
    """Return the task and the trainer of a finished run's settings, changed by Hydra overrides.

    `task=NAME` takes that group file in place of the run's own task. member: as `one_task` takes it. Raises
    PartialLoraError, in one line, for any other key, and as `config.resolve` does.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    overrides = [in_grammar(each) for each in overrides]
    keys = {override.partition("=")[0] for override in overrides}
    of_another = "task" in keys
    own = one_task(run, member, of_another=of_another)
    if own.member and of_another and own.outputs is None:
        raise PartialLoraError(
            f"--member {own.member}: the run's model has no heads; leave it out to evaluate another task"
        )
    allowed = {f"trainer.{key}" for key in _TRAINER}
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise PartialLoraError(f"{override!r}: expected KEY=VALUE")
        if key != "task" and not key.startswith("task.") and key not in allowed:
            others = ", ".join(sorted(allowed))
            raise PartialLoraError(f"{key}: a finished run keeps it; expected task=NAME, task.KEY=VALUE, {others}")
    refuse_group_lists(overrides)
    recorded = own.config.task
    trainer = {key: getattr(own.config.trainer, key) for key in _TRAINER}
    if trainer["device"] == "cuda":  # where it trained; here is perhaps none
        trainer["device"] = "auto"
    node = {"trainer": trainer}
    if not of_another:
        for name in _CUTS:
            if f"task.{name}" in keys:
                raise PartialLoraError(
                    f"task.{name}: a finished run keeps it, else splits would hold rows it was trained on"
                )
        files, overrides = _with_files(recorded.data_files, overrides)
        node["task"] = plain(recorded) | {"data_files": files}
    ConfigStore.instance().store(name="schema", node=Config)
    ConfigStore.instance().store(name="evaluated", node={"defaults": ["schema", "_self_", {"task": None}], **node})
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            composed = compose("evaluated", overrides)
        for group in ("task", "trainer"):
            for key in sorted(OmegaConf.missing_keys(composed[group])):
                raise PartialLoraError(f"{group}.{key}: expected a value, its group file sets none")
        task, trainer = (OmegaConf.to_object(composed[group]) for group in ("task", "trainer"))  # runs __post_init__
        check_files(task)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise PartialLoraError(composition_error(error, overrides)) from error
    if not of_another:
        _refuse_another_cut(recorded.data_files, task.data_files)
    return task, trainer


def _with_files(recorded: str | Mapping | None, overrides: list[str]) -> tuple[str | dict | None, list[str]]:
    """Return the files of the run's task with those of single splits that overrides name, and the other overrides.

    One PATH that a run had for all its splits is that of training rows where another file is named for a split; a
    folder with one sub-folder a split is these.
    """
    prefix = "task.data_files."
    named = dict(_path(each.removeprefix(prefix)) for each in overrides if each.startswith(prefix))
    others = [each for each in overrides if not each.startswith(prefix)]
    if not named:
        return recorded, others
    if recorded is None and "train" not in named:
        split = next(iter(named))
        raise PartialLoraError(
            f"task.data_files.{split}: the run's rows came without files; expected task.data_files={{train: FILE, "
            "test: FILE}"
        )
    return files_by_split(recorded) | named, others


def _path(override: str) -> tuple[str, str]:
    """Return the key and the text of KEY=PATH, which may be in quotes."""
    key, _, text = override.partition("=")
    read = parsed(override)
    return key, read.value() if read is not None and isinstance(read.value(), str) else text


def files_by_split(data_files: str | Mapping | None) -> dict[str, str]:
    """Return the file or folder of each split that has its own; others are cut from that of the training rows."""
    if not isinstance(data_files, str):
        return dict(data_files or {})
    of_splits = split_folders(Path(data_files)) if Path(data_files).is_dir() else {}
    return {split: str(part) for split, part in of_splits.items()} or {"train": data_files}


def _refuse_another_cut(recorded: str | Mapping | None, files: str | Mapping | None) -> None:
    """Refuse a test split that is cut from other training rows: they may hold rows that the run was trained on."""
    if isinstance(files, Mapping):
        is_cut = "test" not in files
    else:  # one file, or a folder of images that has none of its own for it
        is_cut = files is not None and Path(files).exists() and not Path(files, "test").is_dir()
    if is_cut and files != recorded:
        raise PartialLoraError(
            "task.data_files.train: a finished run keeps it, else splits would hold rows it was trained on; expected "
            "task.data_files.test=FILE"
        )


# --- The inputs of a prediction: image files, folders, texts and lines, read one by one and never all held at once.

IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
STDIN = "-"


@dataclass(frozen=True)
class Input:
    """One thing to predict.

    text: its words on the command line or in a file: a path, a text, or texts with tabs between them.
    content: what the model is shown: the path, the text, the two texts, or a prompt and its options.
    problem: why there is nothing to show, in one line; None for an input that can be predicted.
    place: the line it was read from, "FILE, line 3"; "" for an argument.
    """

    text: str
    content: str | tuple[str, str] | tuple[str, tuple[str, ...]]
    problem: str | None = None
    place: str = ""


def read_inputs(
    arguments: Sequence[str], *, modality: str, pairs: bool, stdin: BinaryIO, kind: str = "label"
) -> tuple[Iterator[Input], int | None]:
    """Return an iterator over the inputs that arguments name, in order, and their number where it is known.

    Args:
        arguments: an image file, a folder of images or a text; @FILE for the lines of a file, - for those of `stdin`.
            A line is a text, several of them with tabs between them, or the path of an image; it is read when needed.
        modality: "image" or "text".
        pairs: whether texts come in pairs.
        kind: of the task; "choice" has a prompt and its options in a line, "generation" a prompt.

    Raises PartialLoraError, in one line, for an argument that is no such thing.
    """
    if sum(argument in (STDIN, f"@{STDIN}") for argument in arguments) > 1:
        raise PartialLoraError("-: standard input can be read once, and is named twice")
    parse = _image_path if modality == "image" else _question if kind == "choice" else _pair if pairs else _text
    sources: list[tuple[Iterable[Input], int | None]] = []
    for argument in arguments:
        if argument in (STDIN, f"@{STDIN}"):
            sources.append((_lines(stdin, "standard input", parse), None))
        elif argument.startswith("@"):
            sources.append((_lines_of_file(argument, modality, parse), None))
        elif modality == "image":
            images = [Input(file, file) for file in _images(argument)]
            sources.append((images, len(images)))
        else:
            sources.append(([_argument(argument, parse)], 1))
    totals = [total for _, total in sources]
    return chain.from_iterable(inputs for inputs, _ in sources), None if None in totals else sum(totals)


def _images(argument: str) -> list[str]:
    """Return an image file, or those in a folder: by name, before those of its sub-folders; no hidden ones."""
    if not os.path.exists(argument):
        hint = "" if Path(argument).suffix.lower() in IMAGES else "; the run's model reads images, not texts"
        raise PartialLoraError(f"{argument or repr(argument)}: no such image file or folder{hint}")
    if not os.path.isdir(argument):
        return [argument]
    found = []
    for parent, folders, names in os.walk(argument):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        images = [name for name in sorted(names) if os.path.splitext(name)[1].lower() in IMAGES]
        found += [os.path.join(parent, name) for name in images if not name.startswith(".")]
    if not found:
        raise PartialLoraError(f"{argument}: no image in this folder ({', '.join(IMAGES)})")
    return found


def _argument(argument: str, parse: Callable[[str], Input]) -> Input:
    if os.path.isfile(argument) or (os.sep in argument and os.path.exists(argument)):
        raise PartialLoraError(
            f"{argument} is a file or folder, and the run's model reads texts: @{argument} stands for the lines of a "
            "file; a text of that very wording goes through standard input"
        )
    parsed = parse(argument)
    if parsed.problem:
        raise PartialLoraError(f"{argument!r}: {parsed.problem}")
    return parsed


def _lines_of_file(argument: str, modality: str, parse: Callable[[str], Input]) -> Iterator[Input]:
    file = argument[1:]
    if os.path.isdir(file) or not os.access(file, os.R_OK):
        reason = "a folder" if os.path.isdir(file) else "cannot be read" if os.path.exists(file) else "no such file"
        hint = "; a text that starts with @ goes through standard input" if modality == "text" else ""
        raise PartialLoraError(f"{file or argument}: {reason}, expected a file of lines{hint}")

    def lines() -> Iterator[Input]:
        with open(file, "rb") as stream:
            yield from _lines(stream, file, parse)

    return lines()


def _lines(stream: BinaryIO, name: str, parse: Callable[[str], Input]) -> Iterator[Input]:
    """One input a line. Only a newline ends a line: texts may hold other characters that Unicode calls line breaks."""
    for number, raw in enumerate(stream, 1):
        place = f"{name}, line {number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            parsed = parse(line) if line.strip() else Input(line, line, "an empty line")
        except UnicodeDecodeError:
            line = raw.decode("utf-8", errors="backslashreplace").rstrip("\r\n")
            parsed = Input(line, line, "not UTF-8")
        yield Input(parsed.text, parsed.content, parsed.problem, place)


def _image_path(line: str) -> Input:
    return Input(line, line)


def _text(line: str) -> Input:
    return Input(line, line, None if line.strip() else "an empty text")


def _pair(line: str) -> Input:
    parts = tuple(line.split("\t"))
    if len(parts) != 2 or not all(part.strip() for part in parts):
        return Input(line, line, "expected two texts with a tab between them")
    return Input(line, parts)


def _question(line: str) -> Input:
    prompt, *options = line.split("\t")
    problem = problem_of_question(prompt, options)
    return Input(line, line if problem else (prompt, tuple(options)), problem)


def problem_of_question(prompt: str, options: Sequence[str]) -> str | None:
    """Return why there is nothing to choose among options, in a few words; None where there is."""
    texts = [text.strip() for text in (prompt, *options)]
    if len(options) < 2 or not all(texts):
        return "expected a prompt and two or more options, with tabs between them"
    twice = next((text for text in texts[1:] if texts[1:].count(text) > 1), None)
    return f"the option {twice!r} is there twice" if twice else None
