"""Scores of runs at the best rate alone, none made twice, and those of a model as a run has them."""

from __future__ import annotations

import types
from pathlib import Path

import forgetting
import pandas as pd
import pytest
from finished_runs import CHOICE, override, question_files, trained

from partial_lora.finished.predict import RunModel
from partial_lora.report import ranking


def test_only_runs_at_the_best_rate_are_scored_and_none_twice(tmp_path: Path, monkeypatch) -> None:
    config = {"data_dir": "data", "model": {"name": "tiny_llama", "dtype": "float32"}}
    places = [tmp_path / "runs" / f"seed{seed}" for seed in range(2)]
    runs = [types.SimpleNamespace(directory=place, record={"config": config}) for place in places]
    usual, scored = {"form": "lori", "size": "0.13", "learning_rate": 1e-3}, []
    table = pd.DataFrame([usual | {"run": run, "seed": seed} for seed, run in enumerate(runs)])
    monkeypatch.setattr(forgetting, "OTHER", {"arc_easy": ("accuracy_norm", ("task=arc_easy",))})
    monkeypatch.setattr(forgetting.records, "read", lambda place: (runs, []))
    monkeypatch.setattr(ranking, "rows_of", lambda runs: table)
    monkeypatch.setattr(ranking, "at_best_rates", lambda rows: rows.iloc[1:])
    monkeypatch.setattr(forgetting, "finished_run", lambda place: place)

    def evaluated(run: Path, task, **more) -> types.SimpleNamespace:
        scored.append(run)
        return Path("evaluations"), {"metrics": {"accuracy_norm": 0.25}}

    monkeypatch.setattr(forgetting, "evaluate_run", evaluated)
    known = [[forgetting.FROZEN, forgetting.FROZEN, "own", 0, 0.0, "arc_easy", "accuracy_norm", 0.5]]
    known.append(["runs/seed0", "lori", "0.13", 0, 2e-3, "arc_easy", "accuracy_norm", 0.9])  # once the best rate
    file, stale = tmp_path / "forgetting.csv", pd.DataFrame(known, columns=forgetting.COLUMNS)
    stale.to_csv(file, index=False)
    for _ in range(2):  # the second time nothing new is scored
        assert forgetting.main([str(tmp_path)]) == 0
        found = pd.read_csv(file)
        assert found.set_index("run")["value"].to_dict() == {forgetting.FROZEN: 0.5, "runs/seed1": 0.25}
        assert scored == [runs[1].directory]
        pd.concat([found, stale.iloc[1:]]).to_csv(file, index=False)


def test_a_model_is_scored_as_a_run_with_it_is() -> None:
    settings = ("model=tiny_llama", "task=choice_table", "method=lora", "trainer.max_steps=1", *CHOICE)
    run = trained("scored", *settings, override(question_files()))
    found = forgetting.scored(run.config, RunModel(run, "cpu").model.eval()).metrics
    recorded = run.result["metrics"]["test"]
    assert found == pytest.approx({key: recorded[key] for key in found})
