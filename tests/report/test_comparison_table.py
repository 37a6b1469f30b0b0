"""Methods beside the one they are compared with, at the same operating point, and what each costs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from partial_lora import files
from partial_lora.report import records, tables
from partial_lora.report.records import Predictions
from partial_lora.runs import directory

LABEL = np.arange(200) % 4


def leave(
    place: Path,
    method: str,
    *,
    wrong: int,
    seed: int = 0,
    budget: float | None = None,
    settings: dict | None = None,
    importance: str = "svd",
    mask_seed: int | None = None,
    **changes: str,
) -> None:
    """A run that is wrong about its first examples; settings: of its trainer, changes: of its mask."""
    calibrated = method not in ("lora", "probe")
    point = {"threshold": 0.9, "budget": budget}
    record = {
        "status": "finished",
        "seed": seed,
        "config": {
            "model": {"name": "vit"},
            "task": {"name": "digits"},
            "method": {"name": method},
            "importance": {"name": importance},
            "mask": {"granularity": "rows_columns", "seed": mask_seed},
            "calibration": point,
            "trainer": {"learning_rate": 1e-3} | (settings or {}),
        },
        "versions": {"partial-lora": "0.1.0"},
        "git_commit": "0123456789abcdef",
        "device": "cpu",
        "seconds": {"calibrate": 1.0, "train": 2.0, "evaluate": 3.0},
        "parameters": {
            "base": 5000,
            "adapter_dense": 1000,
            "adapter_trainable": 130,
            "head": 10,
            "adapter_sparsity": 0.87,
        },
        "calibration": {"reliability": {"spearman_brown": 0.75}} if calibrated else None,
        "metrics": {"test": {"primary": "accuracy", "accuracy": 1 - wrong / 200}},
        "history": [],
        "tuning": "tuned",
        "cost": {
            "adapter_bytes": 4000,
            "optimizer_bytes": 2000 + seed,
            "step_seconds": 0.25,
            "saved_activation_bytes": None,
        },
    }
    record["config"]["mask"] |= changes
    named = "".join(map(str, [*(settings or {}).values(), *changes.values()]))
    named += ("" if importance == "svd" else importance) + ("" if mask_seed is None else f"mask{mask_seed}")
    name = f"{method}-{budget}-{named}".replace(".", "")
    folder = place / "runs" / "digits" / "vit" / name / f"seed{seed}"
    folder.mkdir(parents=True)
    files.write_json(folder / directory.RESULT, record)
    said = np.where(np.arange(200) < wrong, (LABEL + 1) % 4, LABEL)
    pd.DataFrame({"label": LABEL, "prediction": said}).to_parquet(folder / directory.PREDICTIONS)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for seed in (0, 1):
        leave(tmp_path, "partial", wrong=20, seed=seed)
        leave(tmp_path, "partial", wrong=40, seed=seed, budget=0.13)
        leave(tmp_path, "uniform", wrong=70, seed=seed, budget=0.13)
        leave(tmp_path, "lora", wrong=20, seed=seed)
    leave(tmp_path, "partial", wrong=40, budget=0.13, granularity="element")
    return tmp_path


def compared(place: Path) -> tables.Differences:
    return tables.table(records.read(place)[0], Predictions(place))


def rows_and_problems(place: Path) -> tuple[pd.DataFrame, list[str]]:
    found = compared(place)
    return found.rows, list(found.uncompared)


def test_each_is_compared_with_the_reference_at_its_point(place: Path) -> None:
    found, problems = rows_and_problems(place)
    assert problems == []
    rows = {(row.operating_point, row.method): row for row in found.itertuples()}
    assert rows.keys() == {
        ("threshold 0.9", "partial"),
        ("threshold 0.9", "lora"),
        ("budget 0.13", "partial"),
        ("budget 0.13", "partial (element)"),
        ("budget 0.13", "uniform"),
        ("budget 0.13", "lora"),
    }
    lora, worse = rows["threshold 0.9", "lora"], rows["budget 0.13", "uniform"]
    assert (lora.difference, lora.low, lora.high, lora.verdict) == (0, 0, 0, "matches")
    assert worse.difference == pytest.approx(-0.15)
    assert worse.low < -0.15 < worse.high < 0
    assert (worse.verdict, worse.pairs, worse.n, worse.examples) == ("worse", 2, 2, 200)
    assert rows["budget 0.13", "partial (element)"].pairs == 1
    assert rows["budget 0.13", "lora"].verdict == "better"
    assert worse.optimizer_bytes == 2000.5
    assert worse.reliability == 0.75
    assert np.isnan(lora.reliability)
    assert np.isnan(worse.saved_activation_bytes)


def test_the_table_is_written_with_its_command_intervals_and_margin(place: Path) -> None:
    written = tables.write_comparison(compared(place), place, command="partial-lora report x")
    text, numbers = (path.read_text(encoding="utf-8") for path in written)
    assert text.startswith("    partial-lora report x\n")
    assert "matches: it is above −1 point" in text
    (row,) = [line for line in text.splitlines() if "| uniform" in line]
    cells = [each.strip() for each in row.strip("|").split("|")]
    assert cells[6].startswith("-15.00 [-")
    assert cells[7] == "worse"
    assert "| partial (element)" in text
    assert "0.75" in row
    assert "tuned" in row
    assert numbers.splitlines()[0] == "# partial-lora report x"
    assert len(pd.read_csv(written[1], comment="#")) == 6


def test_nothing_is_written_where_there_is_nothing_to_compare(tmp_path: Path) -> None:
    leave(tmp_path, "lora", wrong=1)
    assert tables.write_comparison(compared(tmp_path), tmp_path, command="x") == []
    leave(tmp_path, "partial", wrong=1)
    assert len(tables.write_comparison(compared(tmp_path), tmp_path, command="x")) == 2


def test_what_cannot_be_compared_is_said(place: Path) -> None:
    (place / "runs/digits/vit/uniform-013-/seed1" / directory.PREDICTIONS).unlink()
    leave(place, "targeted", wrong=3, seed=4)
    found, problems = rows_and_problems(place)
    assert len(problems) == 2
    assert any("uniform-013-" in each and "seed1 has no predictions.parquet" in each for each in problems)
    assert any("targeted" in each and "no seed that both have: [4] and [0, 1]" in each for each in problems)
    assert found.query("method == 'targeted'")["difference"].isna().all()
    (broken,) = compared(place).problems  # other seeds are nothing broken
    assert "uniform-013-" in broken


def test_what_was_trained_otherwise_is_named_once_and_not_compared(place: Path) -> None:
    for seed in (0, 1):
        leave(place, "probe", wrong=0, seed=seed, settings={"epochs": 50.0})
        leave(place, "lora", wrong=0, seed=seed, settings={"learning_rate": 0.1, "num_workers": 4})
    found, problems = rows_and_problems(place)
    assert "probe" not in set(found["method"])
    (problem,) = problems
    assert problem.startswith("runs/digits/vit/probe-None-500: ")
    assert problem.endswith("than partial at threshold 0.9 and budget 0.13: trainer.epochs 50 against 5")
    assert (found["method"] == "lora").sum() == 4  # another learning rate and other workers are no other conditions


def test_problems_alone_replace_an_earlier_comparison(tmp_path: Path) -> None:
    leave(tmp_path, "partial", wrong=20)
    leave(tmp_path, "lora", wrong=20)
    assert len(tables.write_comparison(compared(tmp_path), tmp_path, command="x")) == 2
    (tmp_path / "runs/digits/vit/lora-None-").rename(tmp_path / "runs/digits/vit/lora-of-yesterday")
    record = tmp_path / "runs/digits/vit/lora-of-yesterday/seed0" / directory.RESULT
    record.write_text(
        record.read_text(encoding="utf-8").replace('"learning_rate"', '"batch_size": 512, "learning_rate"')
    )
    (written,) = tables.write_comparison(compared(tmp_path), tmp_path, command="x")
    assert "trainer.batch_size 512 against 32" in written.read_text(encoding="utf-8")
    assert "|" not in written.read_text(encoding="utf-8")
    assert not (tmp_path / "report" / "comparison.csv").exists()


def test_several_references_are_each_compared_with_up_to_three(tmp_path: Path) -> None:
    rates = (0.1, 0.2, 0.3)
    for seed in (0, 1):
        leave(tmp_path, "lora", wrong=20, seed=seed)
        for rate in rates:
            leave(tmp_path, "partial", wrong=20, seed=seed, settings={"learning_rate": rate})
    found, problems = rows_and_problems(tmp_path)
    assert problems == []
    assert found.groupby("reference").size().tolist() == [4, 4, 4]
    shown = tables.readable_comparison(found)
    assert (shown["id"] == shown["against"]).sum() == 3
    assert shown["verdict"].tolist().count("reference") == 3
    leave(tmp_path, "partial", wrong=20, settings={"learning_rate": 0.4})
    found, problems = rows_and_problems(tmp_path)
    assert found.empty
    (problem,) = problems
    assert "4 to compare with, expected at most 3; choose with --where trainer.learning_rate=…" in problem


def test_of_many_references_the_one_nearest_to_the_schema_is_taken(tmp_path: Path) -> None:
    leave(tmp_path, "partial", wrong=20)
    leave(tmp_path, "lora", wrong=20)
    for number in range(3):
        leave(tmp_path, "partial", wrong=20, count=f"another {number}")
    found = compared(tmp_path)
    assert found.problems == ()
    assert set(found.rows["reference"]) == {"runs/digits/vit/partial-None-"}
    assert len(found.rows) == 5
    (remark,) = found.remarks
    assert remark.startswith("runs/digits/vit/partial-None-: compared with, of 4")
    assert f"{remark}." in tables.comparison_notes(found)


def test_references_are_of_the_same_measure_and_their_masks_go_by_the_run(tmp_path: Path) -> None:
    for measure in ("svd", "snip"):
        for method in ("partial", "targeted"):
            leave(tmp_path, method, wrong=20, importance=measure)
    leave(tmp_path, "lora", wrong=20)
    leave(tmp_path, "partial", wrong=30, mask_seed=5)
    found = compared(tmp_path).rows
    pairs = {(row.group.rpartition("/")[2], row.reference.rpartition("/")[2]) for row in found.itertuples()}
    for measure in ("", "snip"):
        assert (f"targeted-None-{measure}", f"partial-None-{measure}") in pairs
    assert ("targeted-None-snip", "partial-None-") not in pairs
    assert {reference for _, reference in pairs} == {"partial-None-", "partial-None-snip"}
    assert ("partial-None-mask5", "partial-None-") in pairs
    assert found["reference"].iloc[0].endswith("partial-None-")  # before that of snip
    assert ("lora-None-", "partial-None-snip") in pairs


@pytest.mark.parametrize(
    ("config", "metric", "said"),
    [({"members": {"a": {"name": "a"}}}, "average", "a mixture"), ({}, "perplexity", "measured by perplexity")],
)
def test_what_is_not_compared_by_examples_is_remarked(tmp_path: Path, config: dict, metric: str, said: str) -> None:
    for method in ("partial", "lora"):
        leave(tmp_path, method, wrong=20)
    for file in tmp_path.rglob(directory.RESULT):
        record = json.loads(file.read_text(encoding="utf-8"))
        record["config"]["task"] |= config
        record["metrics"]["test"] = {"primary": metric, metric: 3.0}
        file.write_text(json.dumps(record))
    found = compared(tmp_path)
    assert (found.problems, found.known) == ((), False)
    assert said in found.remarks[0]


def test_references_under_other_conditions_have_blocks_of_their_own(tmp_path: Path) -> None:
    for epochs in (2.0, 50.0):
        for method in ("partial", "lora"):
            leave(tmp_path, method, wrong=20, settings={"epochs": epochs})
    found, problems = rows_and_problems(tmp_path)
    assert problems == []
    pairs = found[found["group"] != found["reference"]]
    assert [(row.group[-3:], row.reference[-3:]) for row in pairs.itertuples()] == [("-20", "-20"), ("500", "500")]


def test_seeds_that_only_one_has_and_a_single_pair_are_said(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        leave(tmp_path, "partial", wrong=20, seed=seed)
        leave(tmp_path, "lora", wrong=60, seed=seed + 2)
    found = compared(tmp_path)
    shown = tables.readable_comparison(found.rows).set_index("method")
    assert shown.loc["lora", ["n", "verdict"]].tolist() == ["1 of 3", "undecided (one seed)"]
    assert shown.loc["partial", "n"] == "3"
    notes = " ".join(tables.comparison_notes(found))
    assert "n counts seeds: 1 of 3" in notes
    assert "one seed has an interval over examples alone" in notes
    for seed in (0, 1):
        leave(tmp_path, "lora", wrong=60, seed=seed)
    notes = " ".join(tables.comparison_notes(compared(tmp_path)))
    assert "1 of 3" in notes  # 3 of 5 by now
    assert "one seed" not in notes


def test_predictions_of_seeds_that_only_one_has_are_not_needed(tmp_path: Path) -> None:
    for seed in range(3):
        leave(tmp_path, "partial", wrong=20, seed=seed)
        leave(tmp_path, "lora", wrong=60, seed=seed) if seed < 2 else None
    (lost,) = tmp_path.glob(f"runs/*/*/partial*/seed2/{directory.PREDICTIONS}")
    lost.unlink()
    found = compared(tmp_path)
    assert found.problems == ()
    assert found.rows.set_index("method").loc["lora", "pairs"] == 2
    assert "reference has more seeds than a row" in " ".join(tables.comparison_notes(found))


def test_records_without_predictions_are_no_problem_but_said(place: Path) -> None:
    for file in place.rglob(directory.PREDICTIONS):
        file.unlink()
    found = compared(place)
    assert (found.problems, found.known) == ((), False)
    assert found.remarks == ("none of these runs has kept its predictions",)
    others = [run for run in records.read(place)[0] if run.row["method"] != "partial"]
    assert tables.table(others, Predictions(place)).remarks == ("none of these runs is of partial",)
    assert tables.table(others[:1], Predictions(place)).remarks == ()


def test_predictions_are_read_once_and_no_more_of_them_than_is_compared(tmp_path: Path) -> None:
    leave(tmp_path, "lora", wrong=5)
    (file,) = tmp_path.rglob(directory.PREDICTIONS)
    frame = pd.read_parquet(file)
    frame.assign(logits=[[0.0, 1.0]] * len(frame)).to_parquet(file)
    known, group = Predictions(tmp_path), str(file.parents[1].relative_to(tmp_path))
    assert set(known.of(group, [0], "accuracy")[0]) == {"label", "prediction"}
    assert "logits" in known.of(group, [0], "f1")[0]
    file.unlink()
    assert len(known.of(group, [0], "accuracy")[0]) == 200
    assert Predictions(tmp_path).said(group, 0) is None
