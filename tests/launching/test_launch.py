"""Runs as processes: how one ends, which process failed first, what reaches workers, and that none is left behind."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import accelerate.commands.launch
import pytest
import yaml
from commands import is_alive, until
from torch._utils import ExceptionWrapper

from partial_lora import files, signals, worker
from partial_lora.errors import PartialLoraError
from partial_lora.launching import cluster, directory, first_failure, imports, launch
from partial_lora.launching.cluster import Cluster, cluster_environment, command
from partial_lora.launching.first_failure import Failure
from partial_lora.settings.compose import composed
from partial_lora.settings.schema import Config
from partial_lora.settings.versions import as_yaml, plain

WORKER = Path(__file__).parents[1].joinpath("launched_worker.py")


@pytest.mark.parametrize(("devices", "given"), [("3,5", ["3", "5", "3"]), ("", [""] * 3), (None, ["0", "1", "2"])])
def test_runs_of_one_process_side_by_side_are_spread_over_the_accelerators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: str | None, given: list[str]
) -> None:
    monkeypatch.setattr(cluster, "_accelerators", lambda on_cpu: 1 if on_cpu else 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if devices is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    config = composed("model=tiny_vit", "task=digits", f"results_dir={tmp_path}")
    variables = [launch._environment(config, tmp_path, Cluster(processes=1), slot) for slot in range(3)]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in variables] == given


# How a run ended


def test_a_machine_that_is_stopped_before_the_first_begins_tells_nothing_of_an_earlier_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, now = composed("model=tiny_vit", "task=digits", f"results_dir={tmp_path}"), {}
    place = launch.directory_of(config, "train")
    place.mkdir(parents=True)
    earlier = {"format": 1, "status": "failed", "error": "of the attempt before", "seed": 0, "config": {}}
    files.write_json(place / directory.RESULT, earlier)

    def stopped(*_, **__):
        files.write_json(place / directory.RESULT, earlier | now)
        return 130, None

    monkeypatch.setattr(launch, "_run_process", stopped)
    second = Cluster(processes=2, machines=2, rank=1, address="localhost", port=1)
    assert launch._follow(config, "train", place, second, tuple).status == "interrupted"
    now["error"] = "of this attempt"
    assert launch._follow(config, "train", place, second, tuple).error == "of this attempt"


@pytest.mark.parametrize(
    ("record", "status"),
    [
        ({"format": 1, "status": "finished"}, "finished"),  # in spite of the signal
        ({"format": 1, "status": "failed", "error": "checkpoint-3 cannot be written"}, "failed"),
        ({"format": 1, "status": "failed", "error": "interrupted"}, "interrupted"),
        ({"format": 1, "status": "running"}, "interrupted"),
    ],
)
def test_the_record_decides_how_a_run_ended_and_then_the_exit_code(tmp_path: Path, record: dict, status: str) -> None:
    files.write_json(tmp_path / "result.json", record)
    outcome = launch._outcome(tmp_path, 143)
    assert outcome.status == status
    assert outcome.exit_code == {"finished": 0, "failed": 1, "interrupted": 143}[status]


@pytest.mark.parametrize("keep", [False, True])
def test_records_that_stand_for_their_runs_are_not_run_again(keep: bool, tmp_path: Path) -> None:
    files.write_json(tmp_path / "result.json", {"format": 1, "status": "finished", "metrics": {"test": {}}})
    (tmp_path / "predictions.parquet").write_text("")
    for stage in ("train", "calibrate"):
        assert launch.is_done(Config(keep_records=keep), stage, tmp_path) is (keep and stage == "train")


def of_a_process_that_loads_data() -> PartialLoraError:
    """With the traceback of that process."""
    try:
        raise PartialLoraError("an image of the task cannot be read: row 1")
    except PartialLoraError:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(PartialLoraError) as raised:
        wrapped.reraise()
    return raised.value


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (of_a_process_that_loads_data(), "an image of the task cannot be read: row 1"),
        (PartialLoraError("model.head=x: expected y"), "model.head=x: expected y"),
        (KeyboardInterrupt(), directory.INTERRUPTED),
        (ValueError("two\nlines"), "ValueError: two lines"),
    ],
)
def test_an_error_is_one_line(error: BaseException, line: str) -> None:
    assert worker._in_one_line(error) == line


# Which of several processes failed first


LOST = "a connection was closed"


@pytest.mark.parametrize(
    ("words", "exits", "first"),
    [
        ({0: (LOST, 101.0), 1: ("out of memory", 100.5)}, {0: (1, 101), 1: (1, 100)}, Failure(1, "out of memory")),
        # One that was killed has caused its peers' failures; ended by the launcher after a failure it has not.
        ({0: (LOST, 100.2)}, {0: (1, 103), 1: (-9, 100)}, Failure(1, "was ended by SIGKILL", explained=False)),
        ({0: ("diverged", 100.2)}, {0: (1, 100), 1: (-15, 100)}, Failure(0, "diverged")),
        ({0: ("diverged", 100.2)}, {0: (1, 100), 1: (128 + 15, 100)}, Failure(0, "diverged")),
        ({0: ("diverged", 100.2)}, {0: (1, 100), 1: (-9, 131)}, Failure(0, "diverged")),
        ({}, {1: (3, 100)}, Failure(1, "ended with code 3 and did not say why", explained=False)),
        ({}, {}, None),
    ],
)
def test_the_first_to_fail_is_the_cause(words, exits, first, tmp_path: Path, monkeypatch) -> None:
    first_failure.report("nobody listens")
    monkeypatch.setenv(first_failure.VARIABLE, str(tmp_path))
    for rank, (reason, second) in words.items():
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setattr(time, "time", lambda second=second: second)
        first_failure.report(reason)
    if exits:
        first_failure.report_exits(exits)
    assert first_failure.first(tmp_path) == first


@pytest.mark.parametrize(
    ("status", "failure", "recorded"),
    [
        ("running", Failure(0, "was ended by SIGKILL", explained=False), "process 0 of 2 was ended by SIGKILL"),
        ("running", None, "the worker was ended by SIGKILL before it could say why"),
        ("failed", Failure(1, "was ended by SIGKILL", explained=False), "process 1 of 2 was ended by SIGKILL"),
        ("failed", Failure(1, "OSError: disk full"), "process 1 of 2 failed: OSError: disk full"),
        ("failed", Failure(0, "ValueError: no"), "its own account"),
        ("failed", None, "its own account"),
        ("finished", Failure(1, "was ended by SIGABRT", explained=False), None),
        (None, Failure(None, "accelerate launch: no such port"), "accelerate launch: no such port"),
    ],
)
def test_the_record_of_a_run_has_its_first_failure(status, failure, recorded, tmp_path: Path) -> None:
    (tmp_path / directory.CONFIG).write_text("format: 1\nseed: 3\n")
    if status is not None:
        own = {"error": "its own account"} if status == "failed" else {}
        files.write_json(tmp_path / directory.RESULT, {"format": 1, "status": status, "seed": 3, **own})
    launch._record_failure(tmp_path, failure, Cluster(processes=2), -signal.SIGKILL)
    result = directory.read_result(tmp_path)
    assert (result["status"], result["seed"]) == ("finished" if status == "finished" else "failed", 3)
    assert result.get("error") == recorded
    said_why = recorded is None or not recorded.endswith(("SIGKILL", "could say why"))
    assert ("killed" in result) != said_why  # a comparison tries its learning rate again


@pytest.mark.parametrize("measured", [True, False])
def test_a_run_that_is_refused_once_importance_is_measured_has_begun(
    measured: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(config: Config, place: Path, record: dict, stage: str) -> None:
        record["seconds"] |= {"importance": 2.0} if measured else {}
        raise PartialLoraError("method=ticket: not applicable")

    config = composed("model=tiny_vit", "task=digits", f"results_dir={tmp_path}")
    (tmp_path / directory.CONFIG).write_text(as_yaml(plain(config)))
    monkeypatch.setitem(sys.modules, "partial_lora.train", SimpleNamespace(run=refused))
    for module, name in ((signal, "signal"), (worker.gc, "freeze"), (imports, "hide_bitsandbytes")):
        monkeypatch.setattr(module, name, lambda *_: None)
    assert worker.work(tmp_path, "train") == 1
    assert ("refused" in directory.read_result(tmp_path)) != measured


# Signals, and the launcher between a parent and several workers


def test_nohup_is_heeded() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
    try:
        with signals.handling(signals.leave):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def launched(folder: Path, seconds: float, **changes: object) -> subprocess.Popen:
    """Two workers, started as a run's are."""
    pair = Cluster(processes=2, **changes)
    started = command(pair, [str(WORKER), str(folder), str(seconds)])
    variables = {first_failure.VARIABLE: str(folder / "words"), **cluster_environment(pair)}
    (folder / "words").mkdir()
    with open(folder / "log", "wb") as log:
        return subprocess.Popen(started, stdout=log, stderr=log, env=os.environ | variables, start_new_session=True)


def written(folder: Path, what: str) -> list[dict]:
    """What both workers wrote, once they have."""
    paths = [folder / f"{what}_{rank}.json" for rank in range(2)]
    until(lambda: all(path.exists() for path in paths))
    return [json.loads(path.read_text()) for path in paths]


def test_asked_to_stop_again_and_again_workers_have_their_time_to_end_well(tmp_path: Path) -> None:
    launcher = launched(tmp_path, 60.0)
    written(tmp_path, "began")
    launcher.send_signal(signal.SIGTERM)
    written(tmp_path, "ending")
    launcher.send_signal(signal.SIGTERM)
    (tmp_path / "end").touch()
    assert launcher.wait(30) == 128 + signal.SIGTERM
    assert written(tmp_path, "ended") == [[signal.SIGTERM], [signal.SIGTERM]]
    assert first_failure.first(tmp_path / "words") is None


def test_a_request_to_stop_that_is_dropped_is_heard_when_it_is_repeated(monkeypatch) -> None:
    monkeypatch.setenv("PET_SIGNALS_TO_HANDLE", "")  # to be put back as it was
    waited = []

    def launched() -> None:
        with contextlib.suppress(Exception):  # as libraries do, and Python in a finalizer
            signal.raise_signal(signal.SIGTERM)
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception:  # torchrun's: here it waits for its workers
            signal.raise_signal(signal.SIGTERM)
            waited.append("to the end")
            raise

    monkeypatch.setattr(accelerate.commands.launch, "main", launched)
    with signals.handling(signal.SIG_DFL), pytest.raises(SystemExit) as ended:
        launch.main()
    assert (ended.value.code, waited) == (128 + signal.SIGTERM, ["to the end"])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_no_worker_outlives_a_launcher_that_is_killed(tmp_path: Path) -> None:
    launcher = launched(tmp_path, 60.0)
    workers = [each["pid"] for each in written(tmp_path, "began")]
    os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()
    until(lambda: not any(map(is_alive, workers)))


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_the_deepspeed_settings_of_a_file_reach_the_workers(tmp_path: Path) -> None:
    file = tmp_path / "accelerate.yaml"
    stage = {"zero_stage": 2, "gradient_accumulation_steps": 1}
    file.write_text(
        yaml.safe_dump({"distributed_type": "DEEPSPEED", "mixed_precision": "fp16", "deepspeed_config": stage})
    )
    launcher = launched(tmp_path, 0.0, kind="deepspeed", file=str(file))
    assert launcher.wait(60) == 0
    for each in written(tmp_path, "began"):
        assert each["WORLD_SIZE"] == "2"
        assert each["ACCELERATE_USE_DEEPSPEED"] == "true"
        assert each["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
        assert each["ACCELERATE_MIXED_PRECISION"] == "no"  # trainer.mixed_precision decides


@pytest.mark.parametrize(
    ("overrides", "may_need"),
    [
        (("model=vit_b16",), False),
        (("model=vit_b16", "trainer.optimizer=sgd"), True),  # transformers takes many of them from there
        (("model=smollm2_135m", "task=arc_easy"), False),
        (("model=tiny_llama", "task=arc_easy"), False),
        (("model=tiny_llama", "task=arc_easy", "model.quantization=nf4"), True),
        (("model=bert_base", "task=sst2"), True),  # what a config on the hub says is not known yet
        (("model=tiny_llama", "task=arc_easy", "model.weights=folder"), True),
    ],
)
def test_bitsandbytes_is_hidden_from_runs_that_cannot_need_it(overrides, may_need: bool) -> None:
    assert imports.may_need_bitsandbytes(composed(*overrides)) == may_need
