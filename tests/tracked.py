"""What trackers hold of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.integrations.integration_utils import rewrite_logs

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


def client_of(place: Path) -> MlflowClient:
    """A client of MLflow's local store. Loading MLflow takes two seconds, which most tests need not wait for."""
    from mlflow import MlflowClient

    return MlflowClient((place / "mlruns").as_uri())


def stored(place: Path) -> Run:
    """The one run of MLflow's local store."""
    client = client_of(place)
    (experiment,) = (each for each in client.search_experiments() if each.name == "partial-lora")
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def in_mlflow(place: Path) -> dict[str, dict[int, float]]:
    client, run = client_of(place), stored(place)
    metrics = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    return {name: {each.step: each.value for each in points} for name, points in metrics.items()}


def scalars(run_directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values in a run's folder of TensorBoard, by name, as they were written."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_directory / "tensorboard"))
    events.Reload()
    return {name: [(each.step, each.value) for each in events.Scalars(name)] for name in events.Tags()["scalars"]}


def points_of(history: list[dict]) -> dict[str, dict[int, float]]:
    """Return a history as trackers should have it: by metric and step."""
    metrics: dict[str, dict[int, float]] = {}
    for entry in history:
        for name, value in rewrite_logs({key: value for key, value in entry.items() if key != "step"}).items():
            metrics.setdefault(name, {})[entry["step"]] = value
    return metrics


def without_clock(points: Mapping[str, dict]) -> dict[str, dict]:
    return {name: of for name, of in points.items() if not any(word in name for word in ("second", "runtime", "flos"))}
