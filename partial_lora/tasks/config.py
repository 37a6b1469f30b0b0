"""The settings of a task: every key, its default and its range."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Optional

from omegaconf import MISSING

from partial_lora.errors import one_of, require
from partial_lora.files import at_home, plain_name
from partial_lora.ranges import check
from partial_lora.tasks.kinds import KINDS, kind_of
from partial_lora.tasks.metrics import FITTING, METRICS


def _names(place: int) -> tuple[str, ...]:
    """Return the modalities (0) or the kinds (1) that there are."""
    return tuple(dict.fromkeys(key[place] for key in KINDS))


@dataclass
class TaskConfig:
    """A data set: where its rows are, which columns hold inputs and labels, and how validation is split off.

    `members` is {NAME: TaskConfig} once it is resolved.
    """

    name: str = MISSING  # the task's name in folders and tables
    # where the rows are: a hub data set, bundled:NAME (out of a package), files (see data_files), or members (a
    # mixture)
    path: str = MISSING
    # of a mixture: the names of its tasks, [NAME, …], or {NAME: settings}
    members: Annotated[Any, str | list | dict | None] = None
    # of a mixture: proportional, all rows of every member; equal, as many rows of each as the smallest member has
    mixing: Annotated[str, ("proportional", "equal")] = "proportional"
    subset: Optional[str] = None  # the part of the hub data set, if it has several
    revision: Optional[str] = None  # the commit of the hub data set
    train_split: str = "train"  # name of the training split of the hub data set
    test_split: str = "test"  # name of the test split of the hub data set
    # your files: {train: PATH, test: PATH}, perhaps with validation: PATH, or one PATH for all; null: the hub
    data_files: Annotated[Any, str | dict | None] = None
    modality: Annotated[str, _names(0)] = "image"  # what the model reads: image or text
    # what it answers: label, a class or a number; choice, one of some options; generation, a text
    kind: Annotated[str, _names(1)] = "label"
    classes: Optional[int] = None  # number of classes, for `info`, which reads no data
    # the column of texts, or the two columns of a pair; []: the only column of texts
    text_columns: list[str] = field(default_factory=list)
    image_column: Optional[str] = None  # the column of images; null: the only one
    label_column: Optional[str] = None  # the column of labels; null: the only column that can hold labels
    # choice: the known data set whose layout the rows have (tasks/prompt_formats.py); null: as the columns say
    format: Optional[str] = None
    prompt_columns: list[str] = field(default_factory=list)  # choice, generation: what comes before the answer
    # choice: one column of lists, or one column for each option
    option_columns: list[str] = field(default_factory=list)
    answer_column: Optional[str] = None  # choice: the place, letter or text of the right option
    response_column: Optional[str] = None  # generation: the text to write
    # generation: conversations, lists of {role, content}, in place of prompts and responses; null: `messages`, if
    # neither is given
    messages_column: Optional[str] = None
    # true: put texts into the tokenizer's chat template; null: do so with your own data, if there is a template
    chat_template: Optional[bool] = None
    # generation: what of a response has to match: number, its last number; null, all of it
    answer: Annotated[Optional[str], ("number",)] = None
    stop: list[str] = field(default_factory=list)  # generation: texts that end a response, beside the model's end token
    max_new_tokens: Annotated[int, "[1, inf)"] = 256  # generation: longest response in tokens
    # generation: of an answer beyond model.max_length tokens cut the end, drop the training row, or refuse the run
    too_long: Annotated[str, ("cut", "drop", "refuse")] = "cut"
    regression: Optional[bool] = None  # true: labels are numbers; false: classes; null: numbers if some are fractions
    # metrics to report; the first selects the checkpoint, or perplexity for generation; []: the usual ones of the kind
    metrics: Annotated[list[str], tuple(METRICS)] = field(default_factory=list)
    # training rows to use, validation included, the same share of every class; null: all
    train_samples: Annotated[Optional[int], "[1, inf)"] = None
    # test rows to use, the same share of every class; null: all
    test_samples: Annotated[Optional[int], "[1, inf)"] = None
    # share of the training rows that becomes validation, if there is no validation split
    validation_share: Annotated[float, "(0, 1)"] = 0.1
    test_share: Annotated[float, "(0, 1)"] = 0.2  # share of the rows that becomes test, if there is no test split
    # draws every split and sample of the rows; null: the run's seed, but test rows stay those of seed 0
    split_seed: Annotated[Optional[int], "[0, inf)"] = 0
    # share of the training rows that get a wrong class, drawn by split_seed
    label_noise: Annotated[float, "[0, 1)"] = 0.0
    # bytes of decoded images and tokenised texts to keep on disk; changes no result
    cache_bytes: Annotated[int, "[0, inf)"] = 2**32

    def __post_init__(self) -> None:
        self.path, self.data_files = at_home(self.path), at_home(self.data_files)
        plain_name("task.name", self.name)
        check(self, "task")
        columns = self.text_columns
        require(len(columns) <= 2, "task.text_columns", columns, "one column of texts, or the two of a pair")
        one_of("task.modality", self.modality, *(modality for modality, kind in KINDS if kind == self.kind))
        kind = kind_of(self)
        is_mixture = self.path == "members"
        expected = "names of tasks, such as [sst2,mrpc], for task=mixture, else null"
        require(is_mixture == bool(self.members), "task.members", self.members, expected)
        metrics = [metric for labels in kind.labelled_by for metric in FITTING[labels]]
        require(set(self.metrics) <= set(metrics), "task.metrics", self.metrics, f"some of {', '.join(metrics)}")
        one_of("task.answer", self.answer, None, *["number"] * (kind.answers == "text"))
        alone = not (self.messages_column and (self.prompt_columns or self.response_column))
        expected = "null, if task.prompt_columns or task.response_column is set"
        require(alone, "task.messages_column", self.messages_column, expected)
        noise = self.label_noise
        require(noise == 0 or kind.has_head, "task.label_noise", noise, "0, for a task without classes")
        if isinstance(self.data_files, Mapping) and not is_mixture:  # a mixture has files by member
            splits = set(self.data_files)
            valid = "train" in splits and splits <= {"train", "validation", "test"}
            expected = "a PATH, or {train: PATH, test: PATH}, with validation: PATH if there is one"
            require(valid, "task.data_files", self.data_files, expected)
