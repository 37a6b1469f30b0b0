"""What trackers hold of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run
from transformers.integrations.integration_utils import rewrite_logs


def stored(place: Path) -> Run:
    """The one run of MLflow's local store."""
    client = MlflowClient((place / "mlruns").as_uri())
    (experiment,) = (each for each in client.search_experiments() if each.name == "partial-lora")
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def in_mlflow(place: Path) -> dict[str, dict[int, float]]:
    client, run = MlflowClient((place / "mlruns").as_uri()), stored(place)
    metrics = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    return {name: {each.step: each.value for each in points} for name, points in metrics.items()}


def points_of(history: list[dict]) -> dict[str, dict[int, float]]:
    """Return a history as trackers should have it: by metric and step."""
    metrics: dict[str, dict[int, float]] = {}
    for entry in history:
        for name, value in rewrite_logs({key: value for key, value in entry.items() if key != "step"}).items():
            metrics.setdefault(name, {})[entry["step"]] = value
    return metrics


def without_clock(points: Mapping[str, dict]) -> dict[str, dict]:
    return {name: of for name, of in points.items() if not any(word in name for word in ("second", "runtime", "flos"))}
