"""Trackers hold what a run measured, continue a run that was ended, and never end one."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from tiny_trainer import RESUMED, EndAfter, EndedError, masked, resumable, trainer
from tracked import client_of, in_mlflow, points_of, scalars, stored, without_clock

from partial_lora import files as sealed
from partial_lora.credentials import HIDDEN
from partial_lora.errors import PartialLoraError
from partial_lora.launching import directory as results
from partial_lora.settings import resolving
from partial_lora.settings.compose import composed
from partial_lora.training.tracking import Tracking

MEASURED = {
    "test": {"primary": "accuracy", "accuracy": 0.75, "members": {"cola": {"f1": 0.5}}},
    "parameters": {"head": 9},
}
SECRET = "hf_AbCdEfGhIjKlMnOpQrStUvWx"


def run_directory(place: Path) -> Path:
    directory = place / "runs" / "digits" / "tiny" / "partial-01234567" / "seed0"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def tracking(place: Path, *names: str) -> Tracking:
    parameters = {"task.name": "digits", "task.metrics": ["accuracy"], "model.weights": f"https://host/?token={SECRET}"}
    parameters |= {f"model.key{number}": number for number in range(150)}  # more than one request takes
    return Tracking(names, run_directory(place), parameters | {"results_dir": str(place)})


def in_tensorboard(place: Path) -> dict[str, dict[int, float]]:
    return {name: dict(points) for name, points in scalars(run_directory(place)).items()}


@pytest.fixture(scope="module", autouse=True)
def own_environment():
    """Undo the environment variables that trackers are set up by."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def ended_twice(tmp_path_factory: pytest.TempPathFactory):
    """A training that was ended after its 3rd and its 7th step, with a checkpoint every 2, and then finished."""
    place = tmp_path_factory.mktemp("tracked")
    names, status = ("tensorboard", "mlflow"), []
    for step in (3, 7, None):
        tracker = tracking(place, *names)
        training = trainer(masked(), run_directory(place), **RESUMED, callbacks=[tracker])
        resumed = resumable(run_directory(place))
        if step is None:
            with tracker:
                training.train(resumed)
            status.append(stored(place).info.status)
            tracker.finish(MEASURED, training.state.global_step)
        else:
            training.add_callback(EndAfter(step))
            with pytest.raises(EndedError), tracker:
                training.train(resumed)
            sealed.write_json(run_directory(place) / results.RESULT, {"format": 1, "status": "failed"})
            results.prepare(run_directory(place), overwrite=False)
        status.append(stored(place).info.status)
    return SimpleNamespace(place=place, history=training.state.log_history, status=status)


def test_trackers_hold_the_history_and_the_results(ended_twice) -> None:
    expected = without_clock(points_of(ended_twice.history))
    assert max(expected["train/loss"]) == RESUMED["max_steps"]
    assert len(expected["eval/accuracy"]) == RESUMED["max_steps"] / RESUMED["save_steps"]
    last = {RESUMED["max_steps"]: 0.75}
    for found in (in_mlflow(ended_twice.place), in_tensorboard(ended_twice.place)):
        assert found.pop("test/accuracy") == last
        assert set(found.pop("test/members/cola/f1").values()) == {0.5}
        assert set(found.pop("parameters/head").values()) == {9.0}
        found = without_clock(found)
        assert found.keys() == expected.keys()
        for name, points in expected.items():
            assert found[name] == pytest.approx(points, rel=1e-6), name


def test_a_resumed_run_is_one_run_of_each_tracker(ended_twice) -> None:
    run = stored(ended_twice.place)
    assert run.info.run_name == "digits/tiny/partial-01234567/seed0"
    assert ended_twice.status == ["FAILED", "FAILED", "RUNNING", "FINISHED"]
    assert (
        json.loads((run_directory(ended_twice.place) / results.TRACKERS_FILE).read_text())["mlflow"] == run.info.run_id
    )
    steps = [step for step, _ in scalars(run_directory(ended_twice.place))["train/loss"]]
    assert steps == sorted(set(steps))  # what came after the checkpoint is not there twice


def test_parameters_are_the_settings_without_their_credentials(ended_twice) -> None:
    parameters = stored(ended_twice.place).data.params
    assert parameters["task.name"] == "digits"
    assert parameters["task.metrics"] == "['accuracy']"
    assert parameters["model.key149"] == "149"
    assert parameters["model.weights"] == f"https://host/?token={HIDDEN}"
    files = [path for path in ended_twice.place.rglob("*") if path.is_file()]
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_a_run_from_the_start_is_another_one(tmp_path: Path) -> None:
    tracking(tmp_path, "tensorboard", "mlflow").finish(MEASURED, 3)
    first = stored(tmp_path).info.run_id
    results.prepare(run_directory(tmp_path), overwrite=True)
    client_of(tmp_path).delete_run(first)
    tracking(tmp_path, "tensorboard", "mlflow").finish(MEASURED, 4)
    assert stored(tmp_path).info.run_id != first
    assert in_tensorboard(tmp_path)["test/accuracy"] == in_mlflow(tmp_path)["test/accuracy"] == {4: 0.75}


class StandIn(ModuleType):
    """A tracker's package whose functions do what a test wants, and are remembered."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, dict]] = []
        self.fails: set[str] = set()

    def act(self, function: str, **arguments: object) -> StandIn:
        self.calls.append((function, arguments))
        if function in self.fails or arguments.get("mode", "online") + " " + function in self.fails:
            raise ConnectionError(f"no network for {SECRET}")
        return self

    def init(self, project: str | None = None, name: str | None = None, **arguments: object) -> StandIn:
        return self.act("init", project=project, name=name, **arguments)

    def log(self, metrics: dict, **arguments: object) -> None:
        self.act("log", metrics=metrics, **arguments)

    def finish(self, **arguments: object) -> None:
        self.act("finish", **arguments)

    def define_metric(self, *names: object, **arguments: object) -> None: ...

    def teardown(self) -> None: ...

    def Settings(self, **arguments: object) -> dict:  # noqa: N802
        return arguments

    def arguments(self, function: str) -> list[dict]:
        return [arguments for name, arguments in self.calls if name == function]


@pytest.fixture(params=["wandb", "trackio"])
def stand_in(request, monkeypatch) -> StandIn:
    module = StandIn(request.param)
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


def test_a_run_is_opened_logged_and_ended(stand_in: StandIn, tmp_path: Path) -> None:
    for failing in (True, False):
        tracker = tracking(tmp_path, stand_in.__name__)
        tracker.on_train_begin(None, SimpleNamespace(global_step=0), None)
        tracker.on_log(None, SimpleNamespace(global_step=1), None, logs={"loss": 0.5, "what": "words"})
        if failing:
            with pytest.raises(EndedError), tracker:
                raise EndedError
    tracker.finish(MEASURED, 2)
    first, second = stand_in.arguments("init")
    assert (first["project"], first["name"]) == ("partial-lora", "digits/tiny/partial-01234567/seed0")
    assert first["config"]["model.weights"] == f"https://host/?token={HIDDEN}"
    assert first.get("id") == second.get("id")
    assert second["resume"] == "allow"
    logged = [each["metrics"] for each in stand_in.arguments("log")]
    assert logged[0]["train/loss"] == 0.5
    assert "train/what" not in logged[0]
    assert logged[-1]["test/accuracy"] == 0.75
    assert len(stand_in.arguments("finish")) == 2


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_tracker_that_raises_is_named_once_and_ends_nothing(stand_in, tmp_path, caplog, fails: str) -> None:
    stand_in.fails = {fails}
    tracker = tracking(tmp_path, stand_in.__name__, "tensorboard")
    with caplog.at_level(logging.WARNING), tracker:
        tracker.on_train_begin(None, SimpleNamespace(global_step=0), None)
        for step in (1, 2):
            tracker.on_log(None, SimpleNamespace(global_step=step), None, logs={"loss": 1 / step})
        tracker.finish(MEASURED, 2)
    assert in_tensorboard(tmp_path)["train/loss"] == {1: 1.0, 2: 0.5}  # the other one goes on
    assert in_tensorboard(tmp_path)["test/accuracy"] == {2: 0.75}
    left_out = f"{stand_in.__name__} is left out from now on (ConnectionError: no network for {HIDDEN})"
    assert caplog.text.count("left out from now on") == caplog.text.count(left_out) == 1
    assert len(stand_in.arguments("log")) == {"init": 0, "log": 1, "finish": 3}[fails]


def test_without_a_network_wandb_keeps_the_run_in_files(tmp_path: Path, monkeypatch, caplog) -> None:
    module = StandIn("wandb")
    module.fails = {"online init"}
    monkeypatch.setitem(sys.modules, "wandb", module)
    tracking(tmp_path, "wandb").finish(MEASURED, 2)
    refused, kept = module.arguments("init")
    assert kept == refused | {"mode": "offline"}
    assert [each["metrics"]["test/accuracy"] for each in module.arguments("log")] == [0.75]
    assert "wandb sync" in caplog.text


def test_wandb_offline_for_real(tmp_path: Path, monkeypatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed (extra `trackers`)")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracking(tmp_path, "wandb").finish(MEASURED, 2)
    wandb.teardown()  # its service may still be writing
    (kept,) = (run_directory(tmp_path) / "wandb").glob("offline-run-*/*.wandb")
    assert b"test/accuracy" in kept.read_bytes()
    assert SECRET.encode() not in kept.read_bytes()


def test_trackio_for_real(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # it reads the variable when it is imported
    pytest.importorskip("trackio", reason="trackio is not installed (extra `trackers`)")
    tracking(tmp_path, "trackio").finish(MEASURED, 2)
    (kept,) = (tmp_path / "trackio").glob("*.db")
    assert b"test/accuracy" in b"".join(path.read_bytes() for path in kept.parent.iterdir())


def test_a_tracker_that_is_not_installed_is_refused_before_anything_else(monkeypatch) -> None:
    installed = composed("trainer.report_to=[tensorboard,mlflow]")
    assert installed.trainer.report_to == ["tensorboard", "mlflow"]
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not
    with pytest.raises(PartialLoraError, match=r"^trainer\.report_to=.*pip install wandb"):
        composed("trainer.report_to=[tensorboard,wandb]")
    with pytest.raises(PartialLoraError, match=r"^trainer\.report_to="):
        composed("trainer.report_to=[comet]")


def test_a_folder_that_a_tracker_left_behind_is_not_taken_for_its_package(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "left_by_a_tracker").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not resolving._installed("left_by_a_tracker")
