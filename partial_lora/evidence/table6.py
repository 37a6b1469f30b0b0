"""Table 6, several tasks at once: one adapter for all, by member and on average, beside an adapter for each."""

from __future__ import annotations

import pandas as pd

from partial_lora.evidence import finding, pivot
from partial_lora.evidence.artefact import Artefact
from partial_lora.evidence.assembled import assembled
from partial_lora.evidence.differences import differences
from partial_lora.evidence.gaps import missing, rows
from partial_lora.evidence.recorded import POINTS, WORDS, Evidence, at_points

TITLE = "Table 6: one adapter for several tasks"
CLAIM = "sparse subnetworks of LoRA match dense LoRA where one adapter learns several tasks, too."
PLANNED = {"cpu": ("digits+signdigits",)}
METHODS = ("lora", "partial")
ALONE = ", alone"
PAIRS = (("partial", "lora"), *((method, method + ALONE) for method in METHODS))
_NOTE = "alone: an adapter for each task by itself, in runs of one task; its parameters are those of one adapter."


def make(evidence: Evidence) -> Artefact:
    """The table of what mixtures there are."""
    kept = at_points(evidence.kept, METHODS, POINTS)
    mixed = kept[kept["mixture"] != ""]
    runs = pd.concat([mixed, alone(kept, mixed)], ignore_index=True)
    numbers = pd.concat([pivot.scores(runs), differences(runs, PAIRS)], ignore_index=True)
    how = "make reproduce-table6"
    planned = [name for name in PLANNED.get(evidence.results_dir.name, ()) if name not in set(mixed["mixture"])]
    wanted = rows(METHODS, POINTS)
    lacking = [f"{name}: no runs; {how}" for name in planned]
    lacking += missing(mixed, wanted, (), how) if len(mixed) or not planned else []
    has_alone = runs["method"].str.endswith(ALONE).any()
    notes = [_NOTE] if has_alone else []
    return assembled("table6", TITLE, CLAIM, verdict(numbers), numbers, runs, evidence, lacking, notes)


def alone(kept: pd.DataFrame, mixed: pd.DataFrame) -> pd.DataFrame:
    """The runs of one task that is a member of a mixture of the same model, as methods beside that mixture."""
    single = kept[kept["mixture"] == ""]
    found = []
    for (model, mixture), part in mixed.groupby(["model", "mixture"], sort=False):
        own = single[(single["model"] == model) & single["task"].isin(part["task"])]
        found.append(own.assign(mixture=mixture, method=own["method"] + ALONE))
    return pd.concat(found) if found else single.head(0)


def verdict(numbers: pd.DataFrame) -> str:
    """Whether partial is as good as dense LoRA on average over the members, for every mixture."""
    mixtures = list(dict.fromkeys(numbers.loc[numbers["mixture"] != "", "mixture"])) or [None]
    found = []
    for mixture in mixtures:
        where = {} if mixture is None else {"mixture": mixture}
        for clause in finding.clauses(numbers, "partial", "lora", WORDS, **where):
            found.append(f"{mixture}: {clause}" if mixture else clause)
    claim = "One Partial-LoRA for several tasks matches one dense LoRA for them, to within a point"
    return finding.sentence(claim, *found, table="table 6")
