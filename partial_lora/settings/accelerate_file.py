"""A file of `accelerate config`, which describes the machines of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from partial_lora.errors import require
from partial_lora.files import read_yaml

ACCELERATE_CONFIG = "trainer.accelerate_config"
_STARTING = {  # keys of the file that name commands, or machines to start processes on
    *("command_file", "commands", "mpirun_config", "deepspeed_hostfile", "deepspeed_multinode_launcher"),
    *("tpu_env", "tpu_name", "tpu_use_cluster", "tpu_use_sudo", "tpu_vm", "tpu_zone"),
}
_ALIKE = {"NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_MLU", "MULTI_XPU"}  # a whole model in every process


def accelerate_file(file: str | Path) -> dict:
    """Return the content of a file of `accelerate config` (YAML or JSON), checked as far as a run depends on it.

    Raises PartialLoraError, in one line that names the key, for a file that cannot be read, is no mapping, has a number
    of processes or machines, a rank or a port that is not whole, asks for what no run here does, or names commands.
    """
    content = read_yaml(file, f"{ACCELERATE_CONFIG}={file}")
    expected = "a file that `accelerate config` makes"
    require(
        isinstance(content, dict) and "distributed_type" in content,
        ACCELERATE_CONFIG,
        file,
        f"{expected}, with distributed_type",
    )
    where = content.get("compute_environment", "LOCAL_MACHINE")
    require(where == "LOCAL_MACHINE", f"{ACCELERATE_CONFIG}: compute_environment", where, "LOCAL_MACHINE")
    kind = content["distributed_type"]
    kinds = sorted(_ALIKE | {"FSDP", "DEEPSPEED"})
    require(kind in kinds, f"{ACCELERATE_CONFIG}: distributed_type", kind, f"one of {', '.join(kinds)}")
    for name, least in {"num_processes": 1, "num_machines": 1, "machine_rank": 0, "main_process_port": 0}.items():
        value = content.get(name)
        whole = value is None or (type(value) is int and value >= least)
        require(whole, f"{ACCELERATE_CONFIG}: {name}", value, f"a whole number, at least {least}")
    sections = {name: content.get(name) or {} for name in ("fsdp_config", "deepspeed_config")}
    for name, section in sections.items():
        require(isinstance(section, Mapping), f"{ACCELERATE_CONFIG}: {name}", section, "keys and values")
    for name, value in (content | sections["deepspeed_config"]).items():
        alone = not value or name not in _STARTING or value == "standard"
        require(alone, f"{ACCELERATE_CONFIG}: {name}", value, "no such line: it starts other programs")
    if kind == "FSDP":
        version = sections["fsdp_config"].get("fsdp_version", 1)
        require(str(version) == "2", f"{ACCELERATE_CONFIG}: fsdp_version", version, "2")
    return content
