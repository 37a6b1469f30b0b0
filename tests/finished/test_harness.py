"""A finished run on a task of lm-evaluation-harness, from files of one's own: the numbers and their errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import finished_runs
import pytest
from refusals import refusal

from partial_lora import cli
from partial_lora.finished.harness import evaluate_by_harness

TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "say {{{{said}}}}"
doc_to_choice: [" red", " blue"]
doc_to_target: said
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A task of eight questions with two options."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"said": place % 2}) + "\n" for place in range(8)))
    file = tmp_path / "own.yaml"
    file.write_text(TASK.format(name="own_colours", rows=rows))
    return file


def test_the_numbers_of_the_harness_are_recorded_with_their_errors(task: Path, capsys) -> None:
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    run = finished_runs.generation_run()
    assert cli.main(["evaluate", str(run.directory), "--lm-eval", str(task), "--json", "trainer.device=cpu"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    folder = Path(printed.pop("folder"))
    assert json.loads((folder / "evaluation.json").read_text()) == printed
    measured = printed["metrics"]["own_colours"]["acc"]
    share = measured["value"]
    assert printed["examples"] == {"own_colours": 8}
    assert measured["error"] == pytest.approx((share * (1 - share) / 7) ** 0.5)
    group = task.with_name("group.yaml")
    group.write_text("group: all_colours\ntask: [own_colours]\naggregate_metric_list: [{metric: acc}]\n")
    _, of_group = evaluate_by_harness(run, [str(group)], device="cpu", batch_size=4)
    assert of_group["metrics"]["all_colours"]["acc"]["value"] == share
    group.write_text("task: [own_colours]\n")
    with refusal(f"--lm-eval {group}: "):
        evaluate_by_harness(run, [str(group)], device="cpu", batch_size=4)
    with refusal("--lm-eval: never_heard_of"):
        evaluate_by_harness(run, ["never_heard_of"], device="cpu", batch_size=4)


def test_a_run_that_writes_nothing_and_a_harness_that_is_missing_are_named(monkeypatch, task: Path) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with refusal("--lm-eval", "partial-lora"):
        evaluate_by_harness(finished_runs.generation_run(), [str(task)], device="cpu", batch_size=4)
    with refusal("--lm-eval", "--split"):
        cli.evaluate([str(finished_runs.generation_run().directory), "--lm-eval", str(task), "--split", "validation"])
    with refusal("--lm-eval", "tiny_vit"):
        evaluate_by_harness(finished_runs.image_run(), [str(task)], device="cpu", batch_size=4)
