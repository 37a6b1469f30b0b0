"""How many processes a run has, where, and what of that a file of `accelerate config` says."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
import yaml
from refusals import refusal

from partial_lora.commands.common import libraries
from partial_lora.launching import cluster
from partial_lora.settings.accelerate_file import accelerate_file
from partial_lora.training.config import TrainerConfig

WORKER = ["-m", "partial_lora.worker", "somewhere"]


def settings(**trainer: object) -> TrainerConfig:
    return TrainerConfig(device="cpu", **trainer)


def file(folder: Path, **content: object) -> str:
    path = folder / "accelerate.yaml"
    path.write_text(yaml.safe_dump({"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU"} | content))
    return str(path)


def flags(command: list[str]) -> dict[str, str]:
    own = command[: command.index("partial_lora.worker")]
    return {name: value for name, value in itertools.pairwise(own) if name.startswith("--")}


def test_one_process_needs_no_launcher_and_those_of_one_machine_no_address() -> None:
    found = cluster.cluster_of(settings())
    assert found == cluster.Cluster(processes=1)
    assert cluster.command(found, WORKER)[1:] == WORKER
    several = flags(cluster.command(cluster.cluster_of(settings(num_processes=2)), WORKER))
    assert several["--main_process_port"] == "0"  # where nobody else meets


def test_every_machine_has_as_many_processes_and_knows_where_to_meet() -> None:
    address = {"main_process_ip": "10.0.0.1", "main_process_port": 1234}
    found = cluster.cluster_of(settings(num_machines=2, machine_rank=1, num_processes=6, batch_size=6, **address))
    assert (found.processes, found.here, found.rank) == (6, 3, 1)
    said = flags(cluster.command(found, WORKER))
    assert {"--num_processes": "6", "--num_machines": "2", "--machine_rank": "1"}.items() <= said.items()
    assert {"--main_process_ip": "10.0.0.1", "--main_process_port": "1234"}.items() <= said.items()
    assert cluster.cluster_of(settings(num_machines=2, main_process_ip="10.0.0.1")).processes == 2  # one CPU on each


def test_a_file_says_what_the_keys_do_not(tmp_path: Path) -> None:
    said = {"num_processes": 4, "num_machines": 2, "machine_rank": 1, "main_process_ip": "a", "main_process_port": 5}
    named = {"accelerate_config": file(tmp_path, **said)}
    found = cluster.cluster_of(settings(**named))
    assert (found.processes, found.machines, found.rank, found.address, found.port) == (4, 2, 1, "a", 5)
    found = cluster.cluster_of(settings(**named, num_processes=8, main_process_ip="b"))
    assert (found.processes, found.machines, found.rank, found.address, found.port) == (8, 2, 1, "b", 5)


def test_a_file_says_how_a_model_is_shared_out(tmp_path: Path) -> None:
    given = file(tmp_path, distributed_type="FSDP", fsdp_config={"fsdp_version": 2}, num_processes=2)
    found = cluster.cluster_of(settings(accelerate_config=given))
    assert found.kind == "fsdp"
    command = cluster.command(found, WORKER)
    assert "--multi_gpu" not in command  # accelerate would then not look at what kind the file says
    assert flags(command)["--config_file"] == given
    plain = cluster.cluster_of(settings(accelerate_config=file(tmp_path, num_processes=2)))
    assert "--multi_gpu" in cluster.command(plain, WORKER)


TWO = {"num_machines": 2, "main_process_ip": "a"}


@pytest.mark.parametrize(
    ("content", "given", "key"),
    [
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 1}}, {}, "accelerate_config: fsdp_version=1"),
        ({"distributed_type": "FSDP"}, {}, "accelerate_config: fsdp_version=1"),
        ({"distributed_type": "MEGATRON_LM"}, {}, "accelerate_config: distributed_type=MEGATRON_LM"),
        ({"compute_environment": "AMAZON_SAGEMAKER"}, {}, "accelerate_config: compute_environment=AMAZON_SAGEMAKER"),
        ({"num_processes": "two"}, {}, "accelerate_config: num_processes=two"),
        ({"num_processes": True}, {}, "accelerate_config: num_processes=true"),
        ({"num_machines": 0}, {}, "accelerate_config: num_machines=0"),
        ({"commands": "ls"}, {}, "accelerate_config: commands=ls"),
        ({"use_cpu": True, "mpirun_config": "a"}, {}, "accelerate_config: mpirun_config=a"),
        ({"deepspeed_config": {"deepspeed_hostfile": "a"}}, {}, "accelerate_config: deepspeed_hostfile=a"),
        ({"deepspeed_config": 1}, {}, "accelerate_config: deepspeed_config=1"),
        ({"num_machines": 2}, {}, "main_process_ip=null"),
        (TWO, {"machine_rank": 2}, "machine_rank=2"),
        (TWO, {"num_processes": 3, "batch_size": 3}, "num_processes=3"),
        ({}, {"strategy": "fsdp"}, "strategy=fsdp"),
    ],
)
def test_what_no_run_can_follow_is_refused(content: dict, given: dict, key: str, tmp_path: Path) -> None:
    with refusal(rf"trainer\.{key}: "):
        cluster.cluster_of(settings(accelerate_config=file(tmp_path, **content), **given))


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe\x00", b"", b"- 1\n", b"num_processes: 2\n", None])
def test_a_file_that_is_none_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    if content is not None:
        path.write_bytes(content)
    with refusal(rf"trainer\.accelerate_config={path}: "):
        accelerate_file(path)


def test_a_quantised_model_is_not_shared_out() -> None:
    with refusal(r"model\.quantization=nf4: "):
        cluster.cluster_of(settings(strategy="fsdp", num_processes=2), "nf4")


@pytest.mark.parametrize("section", ["optimizer", "scheduler", None])
@pytest.mark.parametrize("own", [{"head_learning_rate": 1e-3}, {"loraplus_ratio": 4.0}])
def test_an_optimizer_of_deepspeeds_own_has_one_learning_rate(monkeypatch, tmp_path: Path, section, own: dict) -> None:
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: name)
    (tmp_path / "zero.json").write_text(
        json.dumps({"zero_optimization": {"stage": 2}} | ({section: {}} if section else {}))
    )
    named = {"deepspeed_config_file": str(tmp_path / "zero.json")}
    given = {"accelerate_config": file(tmp_path, distributed_type="DEEPSPEED", deepspeed_config=named)}
    assert cluster.cluster_of(settings(**given)).kind == "deepspeed"
    if section is None:
        assert cluster.cluster_of(settings(**given, **own)).kind == "deepspeed"
    else:
        (key,) = own
        with refusal(rf"trainer\.{key}="):
            cluster.cluster_of(settings(**given, **own))


def test_workers_have_their_share_of_this_machines_threads(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("joblib.cpu_count", lambda: 8)
    assert cluster.cluster_environment(cluster.Cluster(processes=4, machines=2))["OMP_NUM_THREADS"] == "4"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "OMP_NUM_THREADS" not in cluster.cluster_environment(cluster.Cluster(processes=4, machines=2))
    on_cpu = cluster.cluster_of(settings(accelerate_config=file(tmp_path, use_cpu=True)))
    assert cluster.cluster_environment(on_cpu)["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    ("used", "set_by_user", "added"),
    [
        (1.0, {}, {"GOMP_SPINCOUNT": "10000"}),
        (60.0, {}, {"OMP_WAIT_POLICY": "PASSIVE"}),
        (1.0, {"OMP_WAIT_POLICY": "ACTIVE"}, {}),
        (60.0, {"GOMP_SPINCOUNT": "5"}, {}),
    ],
)
def test_threads_spin_where_the_cores_are_free_and_sleep_where_they_are_not(
    used, set_by_user, added, monkeypatch
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in set_by_user.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: used)
    assert cluster.openmp() == added


def test_what_this_process_needs_of_openmp_is_not_for_those_it_starts(monkeypatch) -> None:
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    with libraries():
        assert "OMP_NUM_THREADS" in os.environ
    assert not {*names} & os.environ.keys()


def test_a_batch_that_the_accelerators_cannot_share_is_refused_before_anything_is_paid_for(monkeypatch) -> None:
    monkeypatch.setattr(cluster, "has_accelerator", lambda: True)
    monkeypatch.setattr(cluster, "_counted", lambda: 3)
    with refusal(r"trainer\.batch_size=16: ", 3):
        cluster.cluster_of(TrainerConfig())
