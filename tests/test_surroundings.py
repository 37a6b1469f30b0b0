"""A run in surroundings that are not as they should be: secrets about, nothing to write to, no network."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from commands import command, here
from finished_runs import override, picture_files
from huggingface_hub import HfApi, constants
from tracked import in_mlflow, points_of, scalars, without_clock

from partial_lora import tasks
from partial_lora.credentials import HIDDEN
from partial_lora.errors import PartialLoraError
from partial_lora.launching import paths
from partial_lora.settings.compose import composed
from partial_lora.tasks import sources
from partial_lora.tasks.config import TaskConfig

SECRET = "correct-horse-battery-staple"  # without the shape of a token: only the environment says what it is
TINY = ("model=tiny_vit", "method=lora", "trainer.max_steps=4", "trainer.save_steps=2", "trainer.device=cpu")


@pytest.fixture(scope="module")
def secretive(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A finished run with a secret in its environment and in its settings, as the name of a folder of the user's."""
    place = tmp_path_factory.mktemp("place")
    (place / SECRET).mkdir()
    files = {split: shutil.copy(file, place / SECRET) for split, file in picture_files().items()}
    given = (*TINY, "task=cifar10", override(files))
    done = here(place, "train", *given, "trainer.report_to=[tensorboard,mlflow]", drawn=True, HF_TOKEN=SECRET)
    assert done.returncode == 0, done.stderr
    (directory,) = (path.parent for path in place.glob("results/runs/*/*/*/*/result.json"))
    return SimpleNamespace(place=place, done=done, directory=directory, given=given)


def holding(place: Path, text: str) -> list[Path]:
    return [path for path in place.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_a_run_leaves_no_trace_of_a_secret(secretive) -> None:
    assert holding(secretive.place / "results", SECRET) == []
    assert SECRET not in secretive.done.stdout + secretive.done.stderr
    read = yaml.safe_load((secretive.directory / "config.yaml").read_text())
    assert read["task"]["data_files"]["train"] == f"{secretive.place}/{HIDDEN}/train.parquet"
    assert json.loads((secretive.directory / "result.json").read_text())["config"] | {"format": 1} == read


def test_the_id_of_a_run_does_not_depend_on_what_is_hidden(secretive) -> None:
    assert paths.run_directory(composed(*secretive.given)).parts[-2] == secretive.directory.parts[-2]


def test_trackers_have_what_the_record_has(secretive, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # as whoever reads it has to
    result = json.loads((secretive.directory / "result.json").read_text())
    found = {name: dict(points) for name, points in scalars(secretive.directory).items()}
    expected = without_clock(points_of(result["history"]))
    for split in ("validation", "test"):
        metrics = {name: value for name, value in result["metrics"][split].items() if name != "primary"}
        assert "accuracy" in metrics
        expected |= {f"{split}/{name}": {4: value} for name, value in metrics.items()}
    for name, points in expected.items():
        for stored in (found, in_mlflow(secretive.place / "results")):
            assert stored[name] == pytest.approx(points, rel=1e-6), name


def test_what_goes_wrong_is_said_without_the_secret_and_needs_no_network_to_be(secretive) -> None:
    place = secretive.place

    def unreachable() -> None:
        constants.ENDPOINT, constants.HF_HUB_OFFLINE = "http://127.0.0.1:9", False
        constants.HUGGINGFACE_CO_URL_TEMPLATE = constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"

    given = (f"model.weights=someone/{SECRET}", "results_dir=failed")
    done = here(place, "train", *TINY, *given, first=unreachable, HF_TOKEN=SECRET)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert f"model=tiny_vit: cannot download someone/{HIDDEN} from the model hub (" in line
    assert "Connection refused" in line
    assert "model.weights" in line
    assert "model=vit_s14" in line
    assert not [*place.glob("failed/runs/digits/*/*/*")]  # it never began
    assert holding(place / "failed", SECRET) == []


def test_a_data_set_out_of_reach_says_what_to_do(monkeypatch) -> None:
    monkeypatch.setattr(sources, "HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9"))
    with pytest.raises(PartialLoraError, match=r"^task=own: .*no/such-rows.*refused"):
        tasks.load(TaskConfig(name="own", path="no/such-rows", modality="image"))


def test_a_traceback_of_a_worker_hides_secrets_too(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"{{broken: [{SECRET}")
    worker = [sys.executable, "-m", "partial_lora.worker", str(tmp_path), "--stage", "train"]
    done = subprocess.run(worker, env=os.environ | {"HF_TOKEN": SECRET}, capture_output=True, text=True, check=False)
    assert "Traceback" in done.stderr
    assert f"{{broken: [{HIDDEN}" in done.stderr
    assert SECRET not in done.stderr + done.stdout


@pytest.fixture(scope="module")
def read_only() -> tuple[str, ...]:
    """What goes before a command to have its folder `results` read-only, for root, too: a mount of its own."""
    mount = 'mount -o bind,ro results results && exec "$0" "$@"'
    for namespace in (("unshare", "--mount"), ("unshare", "--map-root-user", "--mount")):
        if (
            shutil.which("unshare")
            and not subprocess.run(
                [*namespace, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False
            ).returncode
        ):
            return (*namespace, "sh", "-c", mount)
    pytest.skip("this user may not mount anything, so no folder can be made read-only for certain")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("train", *TINY, "seed=1"), "results/runs/digits/tiny_vit/lora-"),
        (("train", "-m", *TINY, "seed=1,2"), "results/"),
    ],
)
def test_a_results_directory_that_cannot_be_written_is_named(secretive, read_only, arguments, named: str) -> None:
    before = sorted(secretive.place.rglob("*"))
    done = command(secretive.place, *arguments, before=read_only)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert lines
    for line in lines:
        assert line.startswith("partial-lora: results_dir: ")
        assert named in line
        assert os.strerror(errno.EROFS) in line
    assert len(lines) == 1 or "-m" in arguments  # of a sweep as many as it has runs, at most
    assert sorted(secretive.place.rglob("*")) == before


def test_a_report_that_cannot_be_written_is_one_line(secretive, read_only) -> None:
    done = command(secretive.place, "report", "results", before=read_only)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("partial-lora: ")
    assert f"results/report: {os.strerror(errno.EROFS)}" in line
