"""The processes of one run: how many there are, on which machines, and the command that starts those of this one."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from partial_lora.runs import accelerate_file
from partial_lora.runs.ranges import require
from partial_lora.runs.trainer_schema import TrainerConfig

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainerConfig)}
_FROM_FILE = ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port")

_GRACE = 600  # seconds that several workers have to end well once they are asked to; a second request ends them at once


@dataclass(frozen=True)
class Cluster:
    """The processes that share a run, over one machine or several.

    processes: of all machines together. rank: of this machine; machine 0 has the run's directory. kind: "ddp", a whole
    model in every process; "fsdp"; or "deepspeed", which only a file can ask for.
    """

    processes: int
    machines: int = 1
    rank: int = 0
    address: str | None = None
    port: int = 0
    kind: str = "ddp"
    file: str | None = None
    hides_accelerators: bool = False

    @property
    def here(self) -> int:
        """How many of the processes run on this machine."""
        return self.processes // self.machines

    @property
    def is_launched(self) -> bool:
        """True where accelerate starts the processes; a lone one needs no launcher."""
        return self.processes > 1 or self.kind == "deepspeed"


def cluster_of(settings: Mapping) -> Cluster:
    """The processes that a run's settings ask for.

    What `trainer.accelerate_config` says stands where a key has its default. Raises PartialLoraError where the two do
    not go together, or for a strategy that needs more processes, a library or another model.
    """
    trainer = settings["trainer"]
    said = accelerate_file.read(trainer["accelerate_config"]) if trainer["accelerate_config"] else {}
    given = {key: trainer[key] for key in _FROM_FILE}
    given |= {key: said[key] for key in _FROM_FILE if given[key] == _DEFAULTS[key] and said.get(key) is not None}
    machines, address = given["num_machines"], given["main_process_ip"]
    if said:  # else the schema has checked them
        TrainerConfig(**given, batch_size=given["num_processes"] or 1)
    on_cpu = trainer["device"] == "cpu" or bool(said.get("use_cpu"))
    processes = given["num_processes"] or machines * _accelerators(on_cpu)
    kind = {"FSDP": "fsdp", "DEEPSPEED": "deepspeed"}.get(said.get("distributed_type"), trainer["strategy"])
    parts = processes * trainer["gradient_accumulation_steps"]
    expected = f"a multiple of {parts}, of {processes} processes times trainer.gradient_accumulation_steps"
    require(trainer["batch_size"] % parts == 0, "trainer.batch_size", trainer["batch_size"], expected)
    if kind == "fsdp":
        require(processes > 1, "trainer.strategy", kind, "ddp for a run of one process, which has nothing to share out")
        quantization = settings["model"]["quantization"]
        require(quantization is None, "model.quantization", quantization, "null, for trainer.strategy=fsdp")
    if kind == "deepspeed":
        found = importlib.util.find_spec("deepspeed") is not None
        require(found, accelerate_file.KEY, "DEEPSPEED", "a machine with DeepSpeed (`pip install deepspeed`)")
    several = machines > 1
    return Cluster(
        processes=processes,
        machines=machines,
        rank=given["machine_rank"],
        address=address if several else None,
        port=given["main_process_port"] if several else 0,
        kind=kind,
        file=trainer["accelerate_config"],
        hides_accelerators=bool(said.get("use_cpu")),
    )


def command(cluster: Cluster, worker: list[str]) -> list[str]:
    """The command that starts this machine's workers, each of them `python *worker`."""
    if not cluster.is_launched:
        return [sys.executable, *worker]
    flags = {
        "num_processes": cluster.processes,
        "num_machines": cluster.machines,
        "machine_rank": cluster.rank,
        "main_process_port": cluster.port,  # 0: any that is free
        # The worker is told of its number format by the settings (trainer.mixed_precision), and compiles nothing.
        "mixed_precision": "no",
        "dynamo_backend": "no",
    }
    if cluster.address:
        flags["main_process_ip"] = cluster.address
    # Without a file named here accelerate takes the user's default one, which was made for other programs.
    flags |= {"config_file": Path(cluster.file).resolve()} if cluster.file else {"gpu_ids": "all"}
    launcher = [sys.executable, "-m", "partial_lora.runs.launcher"]
    if not (cluster.file and cluster.kind in ("fsdp", "deepspeed")):
        # This is what makes accelerate start several processes, on the CPU too, where the worker then sets use_cpu.
        launcher.append("--multi_gpu")
    return [*launcher, *(text for name, value in flags.items() for text in (f"--{name}", str(value))), *worker]


def environment(cluster: Cluster) -> dict[str, str]:
    """What the workers' environment has to have beside that of a lone worker on its own machine."""
    added = {"PET_SHUTDOWN_TIMEOUT": str(_GRACE)}
    if "OMP_NUM_THREADS" not in os.environ:
        added["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // cluster.here))
    if cluster.hides_accelerators:
        added["CUDA_VISIBLE_DEVICES"] = ""
    return added


def _accelerators(on_cpu: bool) -> int:
    """How many accelerators this machine shows, and at least one process."""
    if on_cpu or not any(Path("/dev").glob("nvidia[0-9]*")):
        return 1
    count = "import torch; print(max(1, torch.cuda.device_count()))"  # in a process of its own: the parent has no torch
    return int(subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, check=True).stdout)
