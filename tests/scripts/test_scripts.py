"""The scripts for a cluster and a GPU: commands whose settings compose and go together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from partial_lora.launching import cluster
from partial_lora.launching.paths import run_directory
from partial_lora.settings.compose import composed
from partial_lora.settings.schema import Config

SCRIPTS = Path(__file__).parents[2] / "scripts"
# What Slurm would have on its nodes, and a partial-lora that notes its arguments.
STUBS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": "echo node0; echo node1",
    "partial-lora": f'exec {sys.executable} -c "import json, sys; print(json.dumps(sys.argv[1:]))" "$@"',
}


@pytest.fixture
def called(tmp_path: Path):
    """What a script calls partial-lora with, on a node of a job."""
    for name, text in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)

    def call(script: str, *arguments: str, **job: object) -> list[str]:
        own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[0-1]"}
        own |= {f"SLURM_{name.upper()}": str(value) for name, value in job.items()}
        command = ["bash", "-u", str(SCRIPTS / script), *arguments]
        done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    return call


def config_of(arguments: list[str], where: Path, monkeypatch) -> Config:
    """The settings that the arguments compose to."""
    monkeypatch.chdir(where)
    assert arguments[0] == "train"
    return composed(*arguments[1:])


def test_a_job_array_is_a_sweep_of_runs_that_share_a_calibration(called, tmp_path: Path, monkeypatch) -> None:
    runs = [
        config_of(called("slurm_sweep.sh", "results_dir=here", array_task_id=task), tmp_path, monkeypatch)
        for task in range(9)
    ]
    points = [(run.calibration.threshold, run.seed) for run in runs]
    assert sorted(points) == [(threshold, seed) for threshold in (0.7, 0.8, 0.9) for seed in (0, 1, 2)]
    alike = replace(runs[0].calibration, threshold=0.5)
    assert len({str(replace(run, seed=0, calibration=alike)) for run in runs}) == 1  # in all else
    assert runs[0].results_dir == "here"


def test_two_nodes_share_one_run(called, tmp_path: Path, monkeypatch) -> None:
    nodes = [
        config_of(called("slurm_fsdp_llama3_1_8b.sh", "seed=3", nodeid=node), tmp_path, monkeypatch)
        for node in range(2)
    ]
    assert len({run_directory(config) for config in nodes}) == 1
    first, second = (cluster.cluster_of(config.trainer, config.model.quantization) for config in nodes)
    assert (first.processes, first.here, first.machines, first.kind) == (16, 8, 2, "fsdp")
    assert (first.rank, second.rank) == (0, 1)
    assert first.address == second.address == "node0"
    assert nodes[1].seed == 3


def test_one_gpu_trains_a_model_in_four_bits(called, tmp_path: Path, monkeypatch) -> None:
    config = config_of(called("nf4_qwen2_5_14b.sh"), tmp_path, monkeypatch)
    assert (config.model.name, config.model.quantization) == ("qwen2_5_14b", "nf4")
    assert cluster.cluster_of(replace(config.trainer, num_processes=1), "nf4").kind == "ddp"


@pytest.mark.parametrize("script", ["analyses", "density"])
def test_threads_are_counted_before_torch_is_there(script: str) -> None:
    counted = "cluster.openmp = lambda: sys.exit(str('torch' in sys.modules))"
    paths = {"PYTHONPATH": os.pathsep.join([str(SCRIPTS.parent), str(SCRIPTS)])}
    command = [
        sys.executable,
        "-c",
        f"import sys\nfrom partial_lora.launching import cluster\n{counted}\nimport {script}",
    ]
    done = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "False"
