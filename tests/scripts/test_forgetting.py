"""Changes from the frozen model, of runs at the best rate alone, and no score made twice."""

from __future__ import annotations

import types
from pathlib import Path

import forgetting
import pandas as pd

from partial_lora.report import ranking


def test_changes_are_from_the_frozen_model_in_nats_and_points() -> None:
    rows = [[forgetting.FROZEN, forgetting.FROZEN, "own", 0, 0.0, "piqa", "loss", 3.0]]
    rows += [[forgetting.FROZEN, forgetting.FROZEN, "own", 0, 0.0, "arc_easy", "accuracy_norm", 0.5]]
    for seed, (loss, share) in enumerate([(3.1, 0.48), (3.3, 0.46)]):
        told = [f"seed{seed}", "lori", "0.13", seed, 1e-3]
        rows += [[*told, "piqa", "loss", loss], [*told, "arc_easy", "accuracy_norm", share]]
    line = forgetting.changes(pd.DataFrame(rows, columns=forgetting.COLUMNS)).splitlines()[-1]
    method, seeds, text, questions = (cell.strip() for cell in line.split("|")[2:6])
    assert (method, seeds) == ("lori", "2")
    assert (text.split()[0], questions.split()[0]) == ("+0.2", "-3")


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
    pd.DataFrame(known, columns=forgetting.COLUMNS).to_csv(tmp_path / "forgetting.csv", index=False)
    for _ in range(2):
        assert forgetting.main([str(tmp_path)]) == 0
        found = pd.read_csv(tmp_path / "forgetting.csv").set_index("run")["value"]
        assert found.to_dict() == {forgetting.FROZEN: 0.5, "runs/seed1": 0.25}
        assert scored == [runs[1].directory]
