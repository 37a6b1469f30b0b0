"""Table 1, images: dense LoRA beside calibrated masks of random and of the most important rows and columns."""

from __future__ import annotations

import pandas as pd

from partial_lora.evidence import finding, pivot
from partial_lora.evidence.artefact import Artefact
from partial_lora.evidence.assembled import assembled
from partial_lora.evidence.differences import differences
from partial_lora.evidence.gaps import missing, rows
from partial_lora.evidence.recorded import POINTS, WORDS, Evidence, at_points

TITLE = "Table 1: images, dense against sparse adapters"
CLAIM = "sparse subnetworks of LoRA match dense LoRA with up to 87 % fewer trainable parameters (eight sets of images)."
PLANNED = {"cpu": ("digits", "cifar10", "signdigits", "gtsrb", "flowers17")}
METHODS = ("lora", "targeted", "partial")
PAIRS = (("partial", "lora"), ("targeted", "lora"), ("partial", "targeted"))


def make(evidence: Evidence) -> Artefact:
    """The table of what runs there are."""
    runs = at_points(evidence.kept, METHODS, POINTS)
    runs = runs[(runs["kind"] == "images") & (runs["mixture"] == "")]
    numbers = pd.concat([pivot.scores(runs), differences(runs, PAIRS)], ignore_index=True)
    planned = PLANNED.get(evidence.results_dir.name, ())
    lacking = missing(runs, rows(METHODS, POINTS), planned, "make reproduce-table1")
    return assembled("table1", TITLE, CLAIM, verdict(numbers), numbers, runs, evidence, lacking)


def verdict(numbers: pd.DataFrame) -> str:
    """Whether partial is as good as dense LoRA."""
    found = finding.clauses(numbers, "partial", "lora", WORDS)
    return finding.sentence("Partial-LoRA matches dense LoRA on images, to within a point", *found, table="table 1")
