"""Tables of evidence from literal records: the parts of decided.csv that are theirs, calibrations, mixtures, costs."""

from __future__ import annotations

import shlex
from pathlib import Path

import decided
import numpy as np
import pandas as pd
import paper_tables as tables
import pytest
from checkout import RESULTS, needs_results
from claims import FAILS, HOLDS, OPEN
from paper_tables import Table, gather
from recorded_runs import EXAMPLES, KEPT, leave
from refusals import refusal

TEXT = {"task__modality": "text"}
EQUAL = {"calibration": None, "fixed": {"budget": 0.13}}


def make(name: str, place: Path) -> Table:
    """Make a table as the command does: after decided.py."""
    assert decided.main([str(place)]) == 0
    return tables.TABLES[name](gather(place))


def row_of(table: Table | pd.DataFrame, **where: object) -> dict:
    frame = table.numbers if isinstance(table, Table) else table
    for name, value in where.items():
        frame = frame[frame[name] == value]
    (row,) = frame.to_dict("records")
    return row


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two sets of images and one of texts at both points: partial is worse at 13 % than dense LoRA."""
    place = tmp_path_factory.mktemp("evidence") / "decided"
    for seed in range(3):
        for task, wrong in (("digits", 10), ("gtsrb", 60), ("trec", 40)):
            own = {"task": task, "seed": seed, **(TEXT if task == "trec" else {})}
            leave(place, "dense", wrong=wrong, **own)
            for budget, more in ((None, 0), (0.13, 40)):
                for method, worse in (("partial", 2 * seed), ("targeted", 0)):
                    leave(place, method, wrong=wrong + more + worse, budget=budget, **own, **KEPT)
            leave(place, "uniform", wrong=150, budget=0.13, **own, **KEPT, **EQUAL)
        leave(place, "flow", seed=seed, task="trec", wrong=150, budget=0.13, **TEXT, **KEPT, **EQUAL)
        for method in ("partial", "targeted"):
            own = {"task": "trec", "seed": seed, "budget": 0.13, "importance__name": "snip"}
            leave(place, method, wrong=10, **own, **TEXT, **KEPT)
            leave(place, method, task="trec", seed=seed, wrong=90, budget=0.13, task__label_noise=0.4, **TEXT, **KEPT)
        members = {"digits": 12, "gtsrb": 66}
        leave(place, "dense", seed=seed, members=members)
        leave(place, "partial", seed=seed, members=members, budget=0.13, **KEPT)
    if RESULTS.is_dir():
        (place / "bench").mkdir()
        (place / "bench" / "adapter.json").write_bytes((RESULTS / "bench" / "adapter.json").read_bytes())
    return place


@pytest.fixture(scope="module")
def made(place: Path) -> dict[str, Table]:
    make("table1", place)
    evidence = gather(place)
    return {name: of(evidence) for name, of in tables.TABLES.items()}


@pytest.mark.parametrize(
    ("name", "tasks", "forms"),
    [
        ("table1", {"digits", "gtsrb"}, {"dense", "partial", "targeted"}),
        ("table2", {"digits", "gtsrb", "trec", "all sets"}, {"partial", "targeted"}),
        ("table3", {"trec"}, {"dense", "partial", "targeted"}),
        ("table4", {"digits", "gtsrb", "trec", "all sets"}, {"partial", "targeted", "uniform", "flow, equal shares"}),
    ],
)
def test_a_table_has_the_scores_and_differences_of_its_sets_and_forms_alone(name, tasks, forms, made, place) -> None:
    own, whole = made[name].numbers, pd.read_csv(place / "tables" / "decided.csv")
    assert set(own["task"]) == tasks
    scored, paired = own[own["part"] == "score"], own[own["part"] == "difference"]
    assert set(scored["method"]) == forms
    assert {*paired["first"], *paired["second"]} <= forms
    found = whole[(whole["part"] == "difference") & (whole["first"] == "partial") & (whole["second"] == "targeted")]
    both = paired.merge(found, on=["task", "operating_point", "first", "second", "difference", "low", "high"])
    assert len(both) == (paired["second"] == "targeted").sum() > 0


def test_verdicts_of_a_table_are_those_among_all_claims(made: dict, place: Path) -> None:
    every = pd.read_csv(place / "tables" / "verdicts.csv")
    assert {name: len(made[name].verdicts) for name in ("table1", "table2", "table3", "table4")} == {
        "table1": 1,  # of single sets: digits and gtsrb are no sample of all
        "table2": 2,
        "table3": 1,
        "table4": 2,
    }
    of_means, of_sets = made["table2"].verdicts
    assert of_means["found"].isin(every["found"]).all()
    assert set(of_sets["at"]) == {"budget 0.13", "threshold 0.9", "snip, budget 0.13"}
    assert list(made["table1"].verdicts[0].columns) == ["claim", "at", "digits", "gtsrb"]
    assert set(made["table4"].verdicts[1]["at"]) == {"budget 0.13", "snip, budget 0.13"}
    (flow,) = (row for row in made["table4"].verdicts[1].to_dict("records") if "flow" in row["claim"])
    assert flow["trec"].endswith(": holds")
    assert flow["digits"] == "–"


def test_table5_counts_a_calibration_once_however_many_runs_share_it(tmp_path: Path) -> None:
    for seed, cached in enumerate((True, False, True)):
        shared = {"joint": 0.76, "cached": cached}
        repaired = shared | {"repaired": {"joint_before": 0.1, "steps": 6}}
        leave(tmp_path, seed=seed, calibration=shared, calibration__seed=0, **KEPT)
        leave(tmp_path, seed=seed, calibration=repaired, calibration__seed=0, calibration__repair=True, **KEPT)
    again = {"joint": 0.73, "repaired": {"joint_before": 0.3, "steps": 7}}
    leave(tmp_path, seed=7, calibration=again, calibration__repair=True, **KEPT)
    table = make("table5", tmp_path)
    row = row_of(table, part="joint")
    assert (row["n"], row["ratio"], row["seconds"], np.isnan(row["high"])) == (1, pytest.approx(0.95), 60, True)
    repair = row_of(table, part="repair")
    assert (repair["n"], repair["before"], repair["steps"], repair["kept"]) == (2, 0.2, 6.5, pytest.approx(0.7))
    alone = next(each for each in tables.calibrations(tmp_path) if "repaired" in each["calibration"])
    assert np.isnan(tables.repairs([alone | {"parameters": None}])["kept"]).all()  # of `partial-lora calibrate`


@pytest.mark.parametrize(
    ("shares", "verdict"),
    [
        ({"a": 0.97, "b": 0.25}, FAILS),
        ({"a": 0.97, "b": 0.95}, HOLDS),
        ({"a": 0.97, "b": None}, OPEN),  # of one calibration there is no interval
    ],
)
def test_one_task_that_fails_refutes_that_a_score_is_kept(tmp_path: Path, shares: dict, verdict: str) -> None:
    for task, share in shares.items():
        for seed in range(2 if share else 1):
            leave(tmp_path, seed=seed, task=task, calibration={"joint": 0.8 * (share or 0.5)}, **KEPT)
            leave(tmp_path, seed=seed, task=task, calibration={"joint": 0.0, "threshold": 0.5}, budget=0.13, **KEPT)
    (shown,) = make("table5", tmp_path).verdicts
    assert shown["verdict"].tolist() == [verdict]


def test_table6_has_members_beside_runs_of_their_own(made: dict) -> None:
    scored = made["table6"].numbers[made["table6"].numbers["part"] == "score"]
    together = row_of(scored, method="partial", task="average")
    assert together["mean"] == pytest.approx(1 - (12 + 66) / 2 / EXAMPLES)
    row = row_of(made["table6"], part="difference", first="dense", second="dense, alone", task="average")
    assert (row["difference"], row["over"]) == (pytest.approx(-(2 + 6) / 2 / EXAMPLES), "seeds and examples")
    assert not scored.duplicated(["method", "operating_point", "task"]).any()
    (shown,) = made["table6"].verdicts
    assert shown.loc[shown["where"].str.contains("budget 0.13"), "verdict"].str.startswith(HOLDS).all()


@needs_results
def test_table7_has_costs_of_the_task_with_most_forms_and_of_the_benchmark(made: dict) -> None:
    runs = made["table7"].numbers[made["table7"].numbers["part"] == "runs"]
    assert set(runs["task"]) == {"trec"}
    assert row_of(runs, method="dense")["optimizer_bytes"] == 2001
    for method in ("partial", "targeted"):  # of usual labels, by svd
        assert row_of(runs, method=method, operating_point="budget 0.13")["n"] == 3
    bench = row_of(made["table7"], part="bench", model="vit_b16", rank=16, method="partial")
    assert (bench["parameters"], bench["file_bytes"]) == (306_816, 1_235_704)
    assert bench["step"] == pytest.approx(0.941, abs=1e-3)
    (shown,) = made["table7"].verdicts
    assert set(shown["verdict"]) == {HOLDS}


def test_files_have_their_command_and_numbers_and_claims_all_verdicts(place: Path, made: dict) -> None:
    assert tables.main(["table1", "claims", "--results", str(place)]) == 0
    folder, command = place / "tables", f"python scripts/paper_tables.py table1 --results {shlex.quote(str(place))}"
    page = (folder / "table1.md").read_text(encoding="utf-8")
    assert page.startswith(f"    {command}\n\nPreset: cpu. Commit: 0123456789ab. Device: cpu.\n")
    numbers = pd.read_csv(folder / "table1.csv", comment="#")
    assert numbers["difference"].tolist() == pytest.approx(made["table1"].numbers["difference"], nan_ok=True)
    claims = (folder / "claims.md").read_text(encoding="utf-8")
    assert all(claim in claims for table in made.values() for each in table.verdicts for claim in each["claim"])


def test_a_folder_without_the_decided_claims_is_refused(tmp_path: Path) -> None:
    leave(tmp_path)
    with refusal("--results", "decided.csv"):
        gather(tmp_path)


@pytest.mark.parametrize("name", tables.TABLES)
def test_a_table_of_sets_that_are_not_there_says_what_is_missing(name: str, tmp_path: Path) -> None:
    leave(tmp_path, "dense", task="trec", **TEXT)
    table = make(name, tmp_path)
    assert table.missing or name == "table7"
    assert tables.main([name, "--results", str(tmp_path)]) == 0
