"""Tables of evidence from literal records: means, paired differences, marks, verdicts, and what is missing."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import claims
import numpy as np
import pandas as pd
import paper_tables as tables
import pytest
from checkout import NEEDED, RESULTS
from claims import AS_GOOD, FAILS, HOLDS, OPEN
from comparable import gather
from paper_tables import Table, missing, planned
from recorded_runs import EXAMPLES, leave

CHOICE = {"task__kind": "choice", "task__modality": "text"}


def make(name: str, place: Path) -> Table:
    return tables.TABLES[name](gather(place))


def row_of(table: Table | pd.DataFrame, **where: object) -> dict:
    frame = table.numbers if isinstance(table, Table) else table
    for name, value in where.items():
        frame = frame[frame[name] == value]
    (row,) = frame.to_dict("records")
    return row


def part(table: Table, name: str, **where: object) -> pd.DataFrame:
    return table.numbers[(table.numbers[["part", *where]] == [name, *where.values()]).all(axis=1)]


def verdicts(table: Table) -> list[tuple[str, str]]:
    return [(each.where, each.verdict) for each in table.verdicts]


# Tables of one set of records


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two sets of images at both points: on digits all are alike at threshold 0.9, and partial is worse at 13 %."""
    if not RESULTS.is_dir():
        pytest.skip(NEEDED)
    root = tmp_path_factory.mktemp("evidence")
    place = root / "cpu"
    for seed in range(3):
        for task, wrong in (("digits", 10), ("cifar10", 60)):
            leave(place, "lora", seed=seed, wrong=wrong, task=task)
            for budget, more in ((None, 0), (0.13, 40)):
                own = {"task": task, "seed": seed, "budget": budget}
                leave(place, "partial", wrong=wrong + more + 2 * seed, **own)
                leave(place, "targeted", wrong=wrong + more, **own)
        leave(place, "dora", seed=seed, wrong=10)
        for method, wrong in (("uniform", 170), ("shuffled", 50 + 2 * seed), ("flow", 50 + 2 * seed)):
            leave(place, method, seed=seed, wrong=wrong, budget=0.13)
        for measure in ("snip", "imp"):
            for method in ("partial", "targeted"):
                leave(place, method, seed=seed, wrong=10, importance__name=measure)
        members = {"digits": 12, "cifar10": 66}
        leave(place, "lora", seed=seed, members=members)
        leave(place, "partial", seed=seed, members=members, budget=0.13, calibration__seed=0)
    for method, wrong in (("lora", 70), ("partial", 74)):
        leave(root / "causal", method, wrong=wrong, task="piqa", model="lm", **CHOICE)
    frozen = {"piqa": {"model": "lm", "questions": 200, "package": {"accuracy": 0.61, "accuracy_norm": 0.6}}}
    (root / "causal" / "zero_shot.json").write_text(json.dumps(frozen))
    (root / "bench").mkdir()
    (root / "bench" / "adapter.json").write_bytes((RESULTS / "bench" / "adapter.json").read_bytes())
    return place


@pytest.fixture(scope="module")
def made(place: Path) -> dict[str, Table]:
    evidence = gather(place)
    return {name: make(evidence) for name, make in tables.TABLES.items()}


def test_table1_has_means_and_differences_at_each_point_and_on_average(made: dict) -> None:
    scores = part(made["table1"], "score", operating_point="budget 0.13", method="partial")
    digits, cifar10 = (np.array([1 - (wrong + 2 * seed) / EXAMPLES for seed in range(3)]) for wrong in (50, 100))
    row, mean = row_of(scores, task="digits"), row_of(scores, task="average")
    assert (row["mean"], row["std"], row["n"]) == pytest.approx((digits.mean(), digits.std(ddof=1), 3))
    of_seeds = (digits + cifar10) / 2  # a seed is one draw on all tasks
    assert (mean["mean"], mean["std"]) == pytest.approx((of_seeds.mean(), of_seeds.std(ddof=1)))
    assert (mean["parameters"], mean["share"], mean["n"]) == (130, pytest.approx(0.13), 3)
    differences = part(made["table1"], "difference")
    row = row_of(differences, first="partial", second="lora", operating_point="budget 0.13", task="digits")
    assert row["difference"] == pytest.approx(-42 / EXAMPLES)
    assert row["low"] < row["difference"] < row["high"] < -0.08
    assert (row["verdict"], row["together"], row["among"]) == ("worse", "undecided", 18)
    row = row_of(differences, first="partial", second="lora", operating_point="budget 0.13", task="all sets")
    assert (row["tasks"], row["seeds"], row["examples"], row["up"], row["down"]) == (2, 3, 2 * EXAMPLES, 0, 2)
    assert len(differences) == 3 * 2 * 3  # pairs, points, two tasks and all sets
    assert not part(made["table1"], "score")["best"].any()  # lora is the best at 13 % alone


def test_verdicts_of_the_tables(made: dict) -> None:
    assert ("vit, svd, budget 0.13", OPEN) in verdicts(made["table1"])  # two sets, of which t is 12.7
    assert ("vit, imp, threshold 0.9", HOLDS) in verdicts(made["table2"])
    assert ("lm, svd, threshold 0.9", OPEN) in verdicts(made["table3"])  # one seed
    by_claim = {each.claim: each.verdict for each in made["table4"].verdicts}
    assert by_claim["partial is better than uniform"] == HOLDS
    assert by_claim["partial is better than shuffled"] == FAILS
    assert by_claim["partial is better than inverted"] == OPEN  # no runs
    assert by_claim["partial is as good as flow, to within a point"] == HOLDS
    assert verdicts(made["table5"]) == [("threshold 0.9", FAILS)]
    assert ("vit, digits+cifar10, svd, budget 0.13", HOLDS) in verdicts(made["table6"])
    assert {each.verdict for each in made["table7"].verdicts} == {HOLDS}


def test_table2_averages_over_the_measures_that_have_both_methods_on_a_task(made: dict, tmp_path: Path) -> None:
    differences = part(made["table2"], "difference", operating_point="threshold 0.9")
    row = row_of(differences, importance="mean over svd, snip and imp")
    each = differences.query("task == 'digits' and importance in ['svd', 'snip', 'imp']")["difference"]
    assert (row["task"], row["difference"], len(each)) == ("digits", pytest.approx(each.mean()), 3)
    for method in ("partial", "targeted"):  # of svd on one task and of snip on another there is no mean
        for measure, task in {"svd": "a", "snip": "b"}.items():
            leave(tmp_path, method, task=task, importance__name=measure)
    leave(tmp_path, "partial", task="a", importance__name="imp")  # without its other half
    assert set(part(make("table2", tmp_path), "difference")["importance"]) == {"svd", "snip"}


def test_table3_has_the_frozen_model_beside_its_own_runs_and_no_generated_answers(made: dict, tmp_path: Path) -> None:
    shown = next(iter(made["table3"].shown.values())).set_index("method")
    assert shown["piqa"].to_dict() == {"zero-shot": "61.00", "lora": "65.00", "partial": "63.00"}
    for model in ("small", "large"):
        for task in ("piqa", "boolq"):
            leave(tmp_path, "lora", wrong=70, task=task, model=model, **CHOICE)
    leave(tmp_path, "lora", task="gsm8k", task__kind="generation", task__modality="text")
    scores = {"piqa": 0.75, "boolq": 0.5}
    frozen = {task: {"model": "small", "package": {"accuracy": score}} for task, score in scores.items()}
    (tmp_path / "zero_shot.json").write_text(json.dumps(frozen))
    table = make("table3", tmp_path)
    zero_shot = part(table, "score", method="zero-shot").set_index(["model", "task"])["mean"].to_dict()
    assert zero_shot == {("small", "boolq"): 0.5, ("small", "piqa"): 0.75, ("small", "average"): 0.625}
    lacking = {line for line in table.missing if line.endswith("zero-shot")}
    assert lacking == {"large, boolq: zero-shot", "large, piqa: zero-shot"}
    assert set(table.numbers["task"]) == {"boolq", "piqa", "average"}
    assert any("1 run on gsm8k" in note for note in table.notes)


def test_table4_has_controls_beside_partial_with_their_reliability(made: dict) -> None:
    (shown,) = made["table4"].shown.values()
    rows = shown.set_index("method")
    assert rows.loc["uniform", ["partial is", "n"]].tolist() == ["better", "3"]
    assert rows.loc["partial", ["partial is", "reliability"]].tolist() == ["–", "0.75"]
    assert "cifar10" not in set(made["table4"].numbers["task"])  # it has no controls
    assert made["table4"].missing[0].startswith("vit, digits: inverted svd budget 0.13, low_rank svd budget 0.13, ")


def test_table5_counts_a_calibration_once_however_many_seeds_and_methods_share_it(made: dict, tmp_path: Path) -> None:
    row = row_of(made["table5"], part="joint", task="cifar10", operating_point="threshold 0.9")
    assert (row["n"], row["ratio"], row["low"], row["seconds"]) == (3, pytest.approx(0.125), pytest.approx(0.125), 60)
    mixed = row_of(made["table5"], part="joint", task="digits+cifar10")
    assert (mixed["n"], mixed["operating_point"]) == (1, "budget 0.13")
    assert "calibrations with calibration.repair=true; make reproduce-table5" in made["table5"].missing
    for seed, cached in enumerate((True, False, True)):
        shared = {"joint": 0.76, "cached": cached}
        repaired = shared | {"repaired": {"joint_before": 0.1, "steps": 6}}
        leave(tmp_path, seed=seed, calibration=shared, calibration__seed=0)
        leave(tmp_path, seed=seed, calibration=repaired, calibration__seed=0, calibration__repair=True)
    again = {"joint": 0.73, "repaired": {"joint_before": 0.3, "steps": 7}}
    leave(tmp_path, seed=7, calibration=again, calibration__repair=True)
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
            leave(tmp_path, seed=seed, task=task, calibration={"joint": 0.8 * (share or 0.5)})
    assert verdicts(make("table5", tmp_path)) == [("threshold 0.9", verdict)]


def test_table6_has_members_beside_runs_of_their_own(made: dict) -> None:
    together = row_of(part(made["table6"], "score"), method="partial", task="average")
    assert together["mean"] == pytest.approx(1 - (12 + 66) / 2 / EXAMPLES)
    row = row_of(part(made["table6"], "difference"), first="lora", second="lora, alone", task="average")
    assert (row["difference"], row["over"]) == (pytest.approx(-(2 + 6) / 2 / EXAMPLES), "seeds and examples")
    assert any("partial svd threshold 0.9" in line for line in made["table6"].missing)


def test_table7_has_costs_of_the_task_with_most_methods_and_of_the_benchmark(made: dict) -> None:
    runs = part(made["table7"], "runs")
    assert set(runs["task"]) == {"digits"}
    assert row_of(runs, method="lora")["optimizer_bytes"] == 2001
    bench = row_of(made["table7"], part="bench", model="vit_b16", rank=16, method="partial")
    assert (bench["parameters"], bench["file_bytes"]) == (306_816, 1_235_704)
    assert bench["step"] == pytest.approx(0.941, abs=1e-3)
    assert "runs of vera; make reproduce-table7" in made["table7"].missing


def test_files_have_their_command_and_numbers_and_claims_all_verdicts(place: Path, made: dict, capsys) -> None:
    assert tables.main(["table1", "table4", "claims", "--results", str(place)]) == 0
    folder, command = place / "tables", f"python scripts/paper_tables.py table1 --results {shlex.quote(str(place))}"
    page = (folder / "table1.md").read_text(encoding="utf-8")
    assert page.startswith(f"    {command}\n\nPreset: cpu. Tuning: tuned. Commit: 0123456789ab. Device: cpu.\n")
    numbers = pd.read_csv(folder / "table1.csv", comment="#")
    assert numbers["difference"].tolist() == pytest.approx(made["table1"].numbers["difference"], nan_ok=True)
    claims = (folder / "claims.md").read_text(encoding="utf-8")
    assert all(each.found in claims and each.where in claims for table in made.values() for each in table.verdicts)
    printed = capsys.readouterr().out
    assert f"wrote {folder / 'table4.csv'}" in printed
    assert "missing: vit, digits: inverted svd budget 0.13, " in printed


@pytest.mark.parametrize("name", tables.TABLES)
def test_a_table_of_nothing_names_what_is_missing(name: str, tmp_path: Path) -> None:
    assert tables.main([name, "--results", str(tmp_path / "cpu")]) == 2  # a folder that is not there is mistyped
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "cpu").mkdir()
    assert tables.main([name, "--results", str(tmp_path / "cpu")]) == 0
    table = make(name, tmp_path / "cpu")
    assert table.missing
    assert {each.verdict for each in table.verdicts} == {OPEN}
    assert (tmp_path / "cpu" / "tables" / f"{name}.md").is_file()
    leave(tmp_path, "lora", method__rank=8)
    if name in ("table1", "table5", "table7"):  # which name the settings of those that are left out
        assert any("method.rank" in note for note in make(name, tmp_path).notes)


# Single cases


def test_an_analysis_that_has_not_ended_is_named_and_stops_no_table(tmp_path: Path) -> None:
    file = tmp_path / "analyses" / "cost" / "digits" / "vit-0" / "analysis.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"status": "running"}))
    assert any(line.startswith(f"{file}: ") for line in make("table5", tmp_path).missing)


def test_seeds_are_missing_beside_rows_that_are_planned_with_as_many(tmp_path: Path) -> None:
    for method, seeds in {"partial": 3, "targeted": 2, "flow": 1, "dora": 1}.items():
        for seed in range(seeds):
            leave(tmp_path, method, seed=seed, budget=None if method == "dora" else 0.13)
    runs, point = gather(tmp_path).comparable, ("budget 0.13",)
    (line,) = missing(runs, planned(("partial", "targeted", "lora"), point), "make")
    assert line == "vit, digits: targeted svd budget 0.13 seed 2, lora"
    assert missing(runs, planned(("flow", "dora"), point), "make") == []


def test_what_is_said_of_all_sets_is_of_those_with_a_common_seed(tmp_path: Path) -> None:
    for task, worse, seed in (("a", 0, 0), ("b", 80, 0), ("c", 0, 7)):
        for more in range(2):
            leave(tmp_path, "lora", seed=more, wrong=20, task=task)
            leave(tmp_path, "partial", seed=seed + more, wrong=20 + worse, task=task)
    leave(tmp_path, "targeted", wrong=20, task="a")
    table = make("table1", tmp_path)
    shown = next(iter(table.shown.values())).set_index("method")
    assert {score.strip("*") for score in shown.loc["lora", ["a", "b", "c", "average"]]} == {"90.00 ± 0.00"}
    assert shown.loc["targeted", ["a", "b", "c", "average"]].tolist() == ["90.00", "–", "–", "–"]
    rows = part(table, "difference", first="partial", second="lora").set_index("task")
    assert list(rows.index) == ["a", "b", "all sets"]
    assert (rows.loc["all sets", "difference"], rows.loc["all sets", "tasks"]) == (pytest.approx(-0.2, abs=0.01), 2)
    assert "2 sets (0 up, 1 down)" in table.shown["Differences"]["task"].tolist()
    without = rows.drop(index="all sets").reset_index()  # one of several tasks stands for none
    claim = ("partial", "lora", AS_GOOD, "threshold 0.9")
    assert {each.verdict for each in claims.judged(without, claim)} == {OPEN}


def test_only_what_beats_all_at_its_point_is_marked(tmp_path: Path) -> None:
    for seed in range(3):
        for method, wrong, budget in (("lora", 30, None), ("partial", 2, None), ("targeted", 40, None)):
            leave(tmp_path, method, seed=seed, wrong=wrong, budget=budget)
        leave(tmp_path, "partial", seed=seed, wrong=40, budget=0.13)  # beats targeted, not lora
        leave(tmp_path, "targeted", seed=seed, wrong=90, budget=0.13)
    table = make("table1", tmp_path)
    marked = part(table, "score", best=True)
    assert marked[["method", "operating_point"]].to_numpy().tolist() == [["partial", "threshold 0.9"]]
    assert [score for score in next(iter(table.shown.values()))["digits"] if "**" in score] == ["**99.00 ± 0.00**"]
    for file in tmp_path.rglob("predictions.parquet"):
        file.unlink()
    again = make("table1", tmp_path)
    assert not part(again, "score")["best"].any()
    assert set(part(again, "difference")["over"]) == {"seeds"}


def test_notes_name_rates_that_differ_calibrations_that_are_shared_and_ceilings(tmp_path: Path) -> None:
    for task, draw in (("digits", None), ("signdigits", 0)):
        for seed in range(2):
            leave(tmp_path, "lora", seed=seed, task=task, wrong=2)
            leave(tmp_path, seed=seed, task=task, calibration__seed=draw, trainer__learning_rate=0.25)
    leave(tmp_path, "dora", task="signdigits", method__rank=4)
    notes = "\n".join(make("table1", tmp_path).notes)
    for note in (
        "on digits, signdigits: 0.001: lora; 0.25: partial (threshold 0.9).",
        "On signdigits seeds share a calibration",
        "98 % or above on digits, signdigits",
        "signdigits, vit: 1 run left out",
    ):
        assert note in notes
    evidence = gather(tmp_path)
    of_digits = evidence.comparable.query("task == 'digits'")
    assert tables.left_out(of_digits, evidence) == []  # a note of signdigits is none
    leave(tmp_path, "lora", task="trec", trainer__learning_rate=0.5)  # a task with one rate beside others'
    assert "Learning rates of vit on trec: 0.5: lora." in tables.learning_rates(gather(tmp_path).comparable)
