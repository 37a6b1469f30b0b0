"""Sweeps: by which launcher runs are started, what is told of them, how they are stopped, what is done again."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from commands import begun, command, here, is_alive, until
from rich.console import Console

from partial_lora import cli
from partial_lora.launching import directory, launch, sweep
from partial_lora.launching.sweep import Job, Ledger
from partial_lora.settings.compose import composed, plan

TINY = ("model=tiny_vit", "trainer.max_steps=8", "trainer.device=cpu", "calibration.shots=4", "calibration.levels=0.3")
RATES = "trainer.learning_rate=0.05,1e30"  # the second diverges
JOBLIB = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
LONG = ("train", "-m", "model=tiny_vit", "trainer.device=cpu", "method=lora", "trainer.epochs=200", "seed=0,1,2")


def records(place: Path, results_dir: str = "results") -> dict[float, dict]:
    """The records of the runs, by their learning rates."""
    found = [json.loads(path.read_text()) for path in place.glob(f"{results_dir}/runs/*/*/*/*/result.json")]
    return {result["config"]["trainer"]["learning_rate"]: result for result in found}


def statuses(out: str) -> list[tuple[str, str]]:
    """How each run of a printed table ended."""
    table = out[out.index(" run ") :]
    return re.findall(r"^ (\S+=\S+) +(finished|skipped|failed|refused|interrupted|not started) ", table, re.M)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweeps")


@pytest.fixture(scope="module")
def swept(place: Path) -> subprocess.CompletedProcess:
    """Three jobs side by side, of which two are the same run and one fails."""
    return command(place, "train", "-m", *TINY, f"{RATES},0.05", *JOBLIB[:1], "hydra.launcher.n_jobs=3")


@pytest.fixture(scope="module")
def made(place: Path, swept) -> dict[float, dict]:
    """The records that this sweep left: a later one makes the failed run again."""
    return records(place)


def test_one_run_that_fails_touches_no_other_and_the_end_says_which(place: Path, swept) -> None:
    assert swept.returncode == 1
    assert [records(place)[rate]["status"] for rate in (0.05, 1e30)] == ["finished", "failed"]
    assert statuses(swept.stdout)[1] == ("trainer.learning_rate=1e+30", "failed")
    accuracy = records(place)[0.05]["metrics"]["test"]["accuracy"]
    assert re.search(rf"^ trainer\.learning_rate=0\.05 .* {accuracy:.4f} ", swept.stdout, re.M)
    (line,) = swept.stderr.strip().splitlines()
    assert line.startswith("partial-lora: job 1: trainer.learning_rate=1e+30: failed: ")


def test_jobs_that_are_the_same_run_wait_for_each_other(place: Path, swept) -> None:
    (_, first), _, (_, third) = statuses(swept.stdout)
    assert {first, third} == {"finished", "skipped"}
    assert records(place)[0.05]["attempts"] == 1
    accuracy = records(place)[0.05]["metrics"]["test"]["accuracy"]
    assert swept.stdout.count(f"{accuracy:.4f}") == 4  # of each as it ends, and in the table


def test_runs_side_by_side_share_a_calibration(place: Path, made) -> None:
    assert len(list((place / "cache" / "calibrations").glob("*.json"))) == 1
    first, second = (made[rate] for rate in (0.05, 1e30))
    assert first["sparsity"] == second["sparsity"]
    assert {first["calibration"]["cached"], second["calibration"]["cached"]} == {False, True}  # one has waited


def test_nothing_is_left_outside_the_results(place: Path, swept) -> None:
    assert {path.name for path in place.iterdir()} == {"results", "cache"}
    assert "multirun.yaml" in {path.name for path in (place / "results" / "sweep").iterdir()}
    assert not list((place / "results" / "sweep").glob(".jobs-*"))


def test_the_same_sweep_again_by_another_launcher_does_what_is_missing(place: Path, made) -> None:
    again = begun(place, "train", "-m", *TINY, RATES, "hydra/launcher=submitit_local")
    out, _ = again.communicate(timeout=300)
    assert again.returncode == 1
    assert [status for _, status in statuses(out)] == ["skipped", "failed"]
    assert "job 0" not in out
    after = records(place)
    assert after[0.05] == made[0.05]
    assert (made[1e30]["attempts"], after[1e30]["attempts"]) == (1, 2)
    assert {path.name for path in place.iterdir()} == {"results", "cache"}
    assert (place / "results" / "sweep" / ".submitit").is_dir()


def test_a_sweep_of_recorded_runs_is_one_line(place: Path, swept) -> None:
    done = here(place, "train", "-m", *TINY, "trainer.learning_rate=0.05")
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    assert line.startswith("1 run ")
    assert "overwrite=true" in line


def workers(place: Path) -> list[int]:
    """The workers, on this machine, of runs below a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "partial_lora.worker" in words and any(word.startswith(str(place.resolve())) for word in words):
            found.append(int(process.name))
    return found


LOCKS = "results/runs/*/*/*/*/.lock"  # which name a worker before it is another program than its parent


def under_way(place: Path, *launcher: str) -> subprocess.Popen:
    """A sweep of which two runs have their workers."""
    running = begun(place, *LONG, *(launcher or JOBLIB))
    until(lambda: sum("worker" in lock.read_text() for lock in place.glob(LOCKS)) >= 2, running)
    until(lambda: len(workers(place)) >= 2, running)
    return running


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_sweep_that_is_stopped_takes_its_runs_with_it(tmp_path: Path, number: signal.Signals) -> None:
    running = under_way(tmp_path)
    if number == signal.SIGINT:  # as a terminal sends it: to the launcher's processes, too
        os.killpg(running.pid, number)
    else:
        running.send_signal(number)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 128 + number
    assert workers(tmp_path) == []
    assert dict(statuses(out)) == {"seed=0": "interrupted", "seed=1": "interrupted", "seed=2": "not started"}
    assert len(list(tmp_path.glob("results/runs/*/*/*/*"))) == 2
    assert "Traceback" not in err
    assert not list((tmp_path / "results" / "sweep").glob(".jobs-*"))


def test_when_a_launcher_gives_up_no_worker_is_left_behind(tmp_path: Path) -> None:
    running = under_way(tmp_path)
    holder = next(iter(tmp_path.glob(LOCKS))).read_text()
    os.kill(int(re.match(r"pid (\d+)", holder)[1]), signal.SIGKILL)  # the process of a job, not its worker
    out, err = running.communicate(timeout=60)
    assert running.returncode == 1
    assert workers(tmp_path) == []
    assert dict(statuses(out)) == {"seed=0": "failed", "seed=1": "failed", "seed=2": "not started"}
    assert "hydra/launcher=joblib: TerminatedWorkerError" in err


@pytest.mark.parametrize(
    "launcher",
    [
        ("hydra/launcher=joblib", "hydra.launcher.n_jobs=4"),  # a process more than there are jobs
        ("hydra/launcher=submitit_local",),  # whose processes are made to outlive their parent
    ],
)
def test_no_process_of_a_sweep_outlives_its_launcher(tmp_path: Path, launcher: tuple[str, ...]) -> None:
    running = under_way(tmp_path, *launcher)
    at_work = {*workers(tmp_path)}  # first: the third may start while its family is counted
    family = {child.pid for child in psutil.Process(running.pid).children(recursive=True)}
    assert family > at_work
    running.kill()
    running.wait()
    until(lambda: not any(map(is_alive, family)))
    assert not list((tmp_path / "results" / "sweep").glob(".jobs-*"))


def test_ray_runs_jobs_too(place: Path, swept) -> None:
    pytest.importorskip("ray", reason="ray is large and not among what tests need: pip install 'partial-lora[ray]'")
    cluster = ("+hydra.launcher.ray.init.num_cpus=2", "+hydra.launcher.ray.init.include_dashboard=false")
    done = command(place, "train", "-m", *TINY, "trainer.learning_rate=0.05,0.02", "hydra/launcher=ray", *cluster)
    assert done.returncode == 0, done.stderr
    assert [status for _, status in statuses(done.stdout)] == ["skipped", "finished"]
    assert records(place)[0.02]["status"] == "finished"


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["task=[digits,cifar10]"], "task=[digits,cifar10]: "),
        (["preset=null"], "preset=null: "),
        (["+preset=null"], "+preset=null: "),
        (["method=null"], "method=null: "),
        (["hydra/launcher=foo"], "hydra/launcher=foo: "),
        (["hydra/sweeper=foo"], "hydra/sweeper=foo: "),
        (["hydra.launcher=joblib"], "hydra.launcher=joblib: "),
        (["hydra.launcher.n_jobs=2"], "hydra.launcher.n_jobs: "),
        ([*JOBLIB, "method.rank=4,0"], "method.rank=0: expected"),
        (["method.rank=interval(2,4)"], "method.rank=interval(2,4): "),
        (["hydra/sweeper=optuna", "seed=0,1"], "hydra/sweeper=optuna: "),
        (["calibration=0.13,0.2"], "calibration=0.13: "),
    ],
)
def test_a_wrong_sweep_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, arguments, key) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "-m", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.strip().splitlines()
    assert line.startswith(f"partial-lora: {key}")
    assert list(tmp_path.iterdir()) == []


def test_a_launcher_of_a_command_without_runs_is_refused(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["info", "-m", "hydra/launcher=joblib", "model=tiny_vit"]) == 2
    assert "hydra/launcher=joblib: " in capsys.readouterr().err


def test_a_plan_holds_every_combination_in_hydras_order() -> None:
    found = plan(["-m", "method=lora,partial", "seed=range(2)", "model=tiny_vit", *JOBLIB])
    expected = ["method=lora seed=0", "method=lora seed=1", "method=partial seed=0", "method=partial seed=1"]
    assert [found.name(overrides) for overrides, _ in found.runs] == expected
    assert [f"method={each.method.name} seed={each.seed}" for _, each in found.runs] == expected
    assert (found.launcher, found.sweep_dir) == ("joblib", Path("results/sweep"))
    assert not plan(["model=tiny_vit"]).is_sweep
    assert plan(["model=tiny_vit", "hydra.mode=MULTIRUN"]).is_sweep


def test_a_ledger_tells_jobs_to_stop_until_it_is_gone(tmp_path) -> None:
    ledger = Ledger.new(tmp_path / "sweep")
    assert ledger.stops() == []
    ledger.stop(signal.SIGINT)
    ledger.stop(signal.SIGTERM)
    assert ledger.stops() == [signal.SIGINT, signal.SIGTERM]
    ledger.write(10, status="running")
    ledger.write(2, status="running")
    ledger.write(10, status="finished")
    assert list(ledger.entries().items()) == [(2, {"status": "running"}), (10, {"status": "finished"})]
    ledger.close()
    assert ledger.stops() == [signal.SIGTERM]


def test_a_paused_job_has_an_entry_without_scores(tmp_path: Path) -> None:
    record = {"format": 1, "status": "paused", "metrics": {}, "calibration": None}
    (tmp_path / "result.json").write_text(json.dumps(record))
    job = Job("train", lambda *_, **__: launch.Outcome(tmp_path, "paused"), (), Ledger.new(tmp_path), ("", 0))
    assert job._end(0, composed(), {"directory": str(tmp_path), "is_new": True}, True) == {
        "status": "paused",
        "code": 0,
    }


def test_a_job_in_another_process_and_its_worker_are_waited_for(tmp_path: Path) -> None:
    ledger, run = Ledger.new(tmp_path), tmp_path / "run"
    entry = {"status": "running", "directory": str(run), "here": False}
    for before in (False, True):
        with ledger.claimed(run) as had_before:
            assert had_before == before
            assert not ledger.is_under_way(entry | {"here": True})  # who has a run does not wait for itself
    assert not ledger.is_under_way(entry)
    with directory.locked(run):
        assert ledger.is_under_way(entry)
        assert not ledger.is_under_way(entry | {"status": "finished"})
    script = "import sys, time; from pathlib import Path; from partial_lora.launching.sweep import Ledger\n"
    script += "with Ledger(Path(sys.argv[1])).claimed(Path(sys.argv[2])): print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", script, str(ledger.folder), str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        assert ledger.is_under_way(entry)
        holder.kill()
    assert not ledger.is_under_way(entry)


def test_the_table_says_of_every_run_what_became_of_it() -> None:
    entries = {
        0: {"status": "finished", "code": 0, "overrides": ["a=0"], "seconds": 3.04, "metric": "test f1", "test": 0.5},
        1: {"status": "skipped", "code": 0, "overrides": ["a=1"], "seconds": 0.1, "metric": "test f1", "test": 0.25},
        2: {"status": "refused", "code": 2, "overrides": ["a=2"], "seconds": 0.1, "reason": "in use by [pid 7]"},
        3: {"status": "running", "code": 0, "overrides": ["a=3"]},
    }
    names = {number: f"a={number}" for number in range(5)}
    found = sweep.rows(entries, names, [])
    assert [row["code"] for row in found] == [0, 0, 2, 1, 1]
    console = Console(file=io.StringIO(), width=120)
    console.print(sweep.table(found))
    lines = [line.split() for line in console.file.getvalue().splitlines() if "a=" in line]
    assert lines[0] == ["a=0", "finished", "3.0", "0.5000"]
    assert lines[1] == ["a=1", "skipped", "–", "0.2500"]
    assert lines[2] == ["a=2", "refused", "0.1", "–", "in", "use", "by", "[pid", "7]"]
    assert lines[3][:2] == ["a=3", "failed"]
    assert lines[4] == ["a=4", "not", "started", "–", "–"]
    stopped = sweep.rows(entries, names, [signal.SIGTERM])
    assert [row["code"] for row in stopped] == [0, 0, 2, 143, 0]
    assert sweep.counts(stopped).startswith(
        "5 runs: 1 finished, 1 skipped (finished before), 1 refused, 1 interrupted, 1 not started"
    )
