"""The processes of one run: their number, their machines, and the command that starts those of this one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from partial_lora import files
from partial_lora.errors import require
from partial_lora.settings.accelerate_file import ACCELERATE_CONFIG, accelerate_file
from partial_lora.settings.compatibility import has_accelerator
from partial_lora.training.config import TrainerConfig

GRACE = 600  # seconds that several workers have to end well after a request to stop; a second request kills them
_IDLE = 10  # percent of all cores that other programs may use, at most, where threads spin
_WAITING = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
_FROM_FILE = ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port")


@dataclass(frozen=True)
class Cluster:
    """The processes that share a run, over one machine or several.

    processes: of all machines together. rank: of this machine; machine 0 has the run's directory. kind: "ddp", a whole
    model in every process; "fsdp"; or "deepspeed", which only a file can set.
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
        """The number of processes on this machine."""
        return self.processes // self.machines

    @property
    def is_launched(self) -> bool:
        """True where accelerate starts the processes; a lone one needs no launcher."""
        return self.processes > 1 or self.kind == "deepspeed"


def cluster_of(trainer: TrainerConfig, quantization: str | None = None) -> Cluster:
    """Return the processes of a run with these settings; quantization: that of its model.

    A value of the file `trainer.accelerate_config` counts where a key has its default. Raises PartialLoraError where
    the two do not go together, or for a strategy that needs more processes, a library or another model.
    """
    file = accelerate_file(trainer.accelerate_config) if trainer.accelerate_config else {}
    settings = {key: getattr(trainer, key) for key in _FROM_FILE}
    unset = [key for key in _FROM_FILE if settings[key] == getattr(TrainerConfig, key)]
    settings |= {key: file[key] for key in unset if file.get(key) is not None}
    machines, address = settings["num_machines"], settings["main_process_ip"]
    if file:  # else the schema has checked them
        TrainerConfig(**settings, batch_size=settings["num_processes"] or 1)
    on_cpu = trainer.device == "cpu" or bool(file.get("use_cpu"))
    processes = settings["num_processes"] or machines * _accelerators(on_cpu)
    kind = {"FSDP": "fsdp", "DEEPSPEED": "deepspeed"}.get(file.get("distributed_type"), trainer.strategy)
    parts = processes * trainer.gradient_accumulation_steps
    expected = f"a multiple of {parts}, of {processes} processes times trainer.gradient_accumulation_steps"
    require(trainer.batch_size % parts == 0, "trainer.batch_size", trainer.batch_size, expected)
    if kind == "fsdp":
        require(processes > 1, "trainer.strategy", kind, "ddp for a run of one process, which has nothing to share out")
        require(quantization is None, "model.quantization", quantization, "null, for trainer.strategy=fsdp")
    if kind == "deepspeed":
        installed = importlib.util.find_spec("deepspeed") is not None
        require(installed, ACCELERATE_CONFIG, "DEEPSPEED", "a machine with DeepSpeed (`pip install deepspeed`)")
        rate, ratio, one = trainer.head_learning_rate, trainer.loraplus_ratio, _has_one_rate(file)
        why = "an optimizer or scheduler in DeepSpeed's own file has one learning rate for all"
        require(rate is None or not one, "trainer.head_learning_rate", rate, f"null: {why}")
        require(ratio == 1 or not one, "trainer.loraplus_ratio", ratio, f"1: {why}")
    several = machines > 1
    return Cluster(
        processes=processes,
        machines=machines,
        rank=settings["machine_rank"],
        address=address if several else None,
        port=settings["main_process_port"] if several else 0,
        kind=kind,
        file=trainer.accelerate_config,
        hides_accelerators=bool(file.get("use_cpu")),
    )


def command(cluster: Cluster, worker: list[str]) -> list[str]:
    """Return the command that starts this machine's workers, each of them `python *worker`."""
    if not cluster.is_launched:
        return [sys.executable, *worker]
    flags = {
        "num_processes": cluster.processes,
        "num_machines": cluster.machines,
        "machine_rank": cluster.rank,
        "main_process_port": cluster.port,  # 0: any that is free
        # The worker takes its number format from the settings (trainer.mixed_precision), and compiles nothing.
        "mixed_precision": "no",
        "dynamo_backend": "no",
    }
    if cluster.address:
        flags["main_process_ip"] = cluster.address
    # Without a file named here accelerate takes the user's default one, which was made for other programs.
    flags |= {"config_file": Path(cluster.file).resolve()} if cluster.file else {"gpu_ids": "all"}
    launcher = [sys.executable, "-m", "partial_lora.launching.launch"]
    if not (cluster.file and cluster.kind in ("fsdp", "deepspeed")):
        # This is what makes accelerate start several processes, on the CPU too, where the worker then sets use_cpu.
        launcher.append("--multi_gpu")
    return [*launcher, *(text for name, value in flags.items() for text in (f"--{name}", str(value))), *worker]


def cluster_environment(cluster: Cluster) -> dict[str, str]:
    """Return the variables that a cluster decides: the time to shut down, OpenMP's, and hidden accelerators."""
    added = {"PET_SHUTDOWN_TIMEOUT": str(GRACE)} | openmp(cluster.here)
    if cluster.hides_accelerators:
        added["CUDA_VISIBLE_DEVICES"] = ""
    return added


def openmp(processes: int = 1) -> dict[str, str]:
    """Return the variables of OpenMP that each of so many processes on this machine needs and the user has not set.

    They share the cores there are for this process, by its affinity and its cgroup. Threads that spin for a moment
    before they sleep make a step of training a quarter shorter where these cores are free, and almost three times as
    long where another process computes on them (results/bench/runs.md); there they sleep at once.
    """
    import psutil
    from joblib import cpu_count

    added = {}
    if "OMP_NUM_THREADS" not in os.environ:
        added["OMP_NUM_THREADS"] = str(max(1, cpu_count() // processes))
    if not _WAITING & os.environ.keys():
        is_idle = psutil.cpu_percent(interval=0.1) < _IDLE
        added |= {"GOMP_SPINCOUNT": "10000"} if is_idle else {"OMP_WAIT_POLICY": "PASSIVE"}
    return added


def visible(*, counted: bool = True) -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES calls this machine's accelerators, at least one; "" for none at all.

    counted: where the variable is not set they are counted, which takes seconds; else the first stands for all.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(number) for number in range(_accelerators(not counted))]
    return [name for name in named.split(",") if name] or [""]


def _has_one_rate(file: Mapping) -> bool:
    """Return True where a file of `accelerate config` leaves the optimizer or the schedule to DeepSpeed."""
    named = (file.get("deepspeed_config") or {}).get("deepspeed_config_file")
    try:
        settings = files.read_json(named) if named else {}
    except (OSError, ValueError, TypeError):  # accelerate says what is wrong with it
        return False
    return isinstance(settings, Mapping) and ("optimizer" in settings or "scheduler" in settings)


def _accelerators(on_cpu: bool) -> int:
    """Return the number of accelerators that this machine shows, and at least one."""
    return _counted() if has_accelerator() and not on_cpu else 1


@cache
def _counted() -> int:
    """Return how many accelerators torch sees, at least one, in a process of its own: this one has no torch."""
    count = "import torch; print(max(1, torch.cuda.device_count()))"
    return int(subprocess.check_output([sys.executable, "-c", count], text=True))
