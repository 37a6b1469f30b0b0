"""Kinds of tasks: what each reads, what its rows are labelled by and who gives its answers; an entry in `KINDS` each.

Settings are checked by these entries in processes that import no torch, so what an entry names is imported once it is
used. What a package above does in its own way it finds by the form of the answers, or of the inputs: the judge of a
training in `training.objectives.JUDGES`, a line of inputs in `finished.inputs.LINES`, a prediction in
`finished.predict.PREDICTED`. A kind of the same forms needs nothing there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Kind:
    """A kind of task.

    Attributes:
        name: what reports call it.
        reads: the form of an input: "image", "text", "prompt", or "question", a prompt and its options.
        answers: the form of an answer: "label", "option" or "text".
        families: of the models that give such answers (`model.family`).
        example, model: a task of the kind, and a model for it.
        rows: MODULE:NAME in this package, from a source's splits and the settings to rows as every task of it has them.
        transform: MODULE:NAME, from the settings and what decides a model's inputs to the rows' `Transform`.
        labelled_by: what labels are (`metrics.FITTING`); where there are two, the rows decide.
        metrics: those that are reported unless others are chosen; empty: the first that fits the labels.
        selects: the metric that selects a checkpoint; None: the first that is reported.
        score: what calibration.score=auto stands for; None: the first metric.
        draws_by: the key of calibration that says how many rows are drawn.
        pipeline: transformers' pipeline with such inputs and answers.
        typed: inputs as they are typed.
    """

    name: str
    reads: str
    answers: str
    families: tuple[str, ...]
    example: str
    model: str
    rows: str
    transform: str
    labelled_by: tuple[str, ...]
    pipeline: str
    typed: str
    metrics: tuple[str, ...] = ()
    selects: str | None = None
    score: str | None = None
    draws_by: str = "share"

    @property
    def asked(self) -> str:
        """Answers and inputs, in words."""
        return f"{self.answers}s of {self.reads}s"

    @property
    def has_head(self) -> bool:
        """True where a head that the task trains gives the answers, and no causal language model."""
        return "causal" not in self.families


_CLASSES: dict[str, Any] = {"answers": "label", "rows": "sources:labelled", "labelled_by": ("classes", "real numbers")}
_CAUSAL: dict[str, Any] = {"families": ("causal",), "model": "smollm2_135m", "pipeline": "text-generation"}
KINDS = {  # by task.modality and task.kind
    ("image", "label"): Kind(
        "images",
        "image",
        **_CLASSES,
        families=("timm", "clip", "image"),
        example="digits",
        model="vit_s14",
        transform="image_inputs:ImageTransform.of",
        pipeline="image-classification",
        typed="IMAGE …",
        draws_by="shots",
    ),
    ("text", "label"): Kind(
        "texts",
        "text",
        **_CLASSES,
        families=("encoder",),
        example="sst2",
        model="minilm_l6",
        transform="text_inputs:TextTransform.of",
        pipeline="text-classification",
        typed="TEXT …",
    ),
    ("text", "choice"): Kind(
        "causal",
        "question",
        "option",
        **_CAUSAL,
        example="arc_easy",
        rows="questions:format_choices",
        transform="prompt_inputs:ChoiceTransform.of",
        labelled_by=("places of options",),
        metrics=("accuracy", "accuracy_norm"),
        score="options",
        typed=r"$'PROMPT\tOPTION\tOPTION'",
    ),
    ("text", "generation"): Kind(
        "generation",
        "prompt",
        "text",
        **_CAUSAL,
        example="text_generation",
        rows="questions:format_completions",
        transform="prompt_inputs:CausalTransform.of",
        labelled_by=("texts",),
        metrics=("rouge_l", "perplexity"),
        selects="perplexity",
        score="loss",
        typed="TEXT …",
    ),
}


class OfKind(Protocol):
    """The settings of a task, or a task: what has a modality and a kind."""

    modality: str
    kind: str


def kind_of(task: OfKind) -> Kind:
    """Return the kind of a task; of a mixture, that of its members."""
    return KINDS[task.modality, task.kind]


def kind_in(settings: Mapping) -> Kind:
    """Return the kind of a task's recorded settings."""
    return KINDS[settings.get("modality", "image"), settings.get("kind", "label")]


def kinds_for(family: str) -> list[Kind]:
    """Return the kinds whose answers a family of models gives."""
    return [kind for kind in KINDS.values() if family in kind.families]
