"""What a file of `accelerate config` says of the processes of a run."""

from __future__ import annotations

from pathlib import Path

import yaml

from partial_lora.errors import PartialLoraError
from partial_lora.runs.ranges import require

KEY = "trainer.accelerate_config"
_ALIKE = {"NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_MLU", "MULTI_XPU"}  # a whole model in every process


def read(file: str | Path) -> dict:
    """The content of such a file (YAML or JSON), checked as far as a run depends on it.

    Raises PartialLoraError, in one line that names the key, for a file that cannot be read, is no mapping, says how
    many processes or machines there are in anything but a whole number, or asks for what no run here does.
    """
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise PartialLoraError(f"{KEY}={file}: cannot be read as YAML: {reason}") from error
    expected = "a file that `accelerate config` makes"
    require(
        isinstance(content, dict) and "distributed_type" in content, KEY, file, f"{expected}, with distributed_type"
    )
    where = content.get("compute_environment", "LOCAL_MACHINE")
    require(where == "LOCAL_MACHINE", f"{KEY}: compute_environment", where, "LOCAL_MACHINE")
    kind = content["distributed_type"]
    known = sorted(_ALIKE | {"FSDP", "DEEPSPEED"})
    require(kind in known, f"{KEY}: distributed_type", kind, f"one of {', '.join(known)}")
    for name in ("num_processes", "num_machines", "machine_rank", "main_process_port"):
        value = content.get(name)
        whole = value is None or (isinstance(value, int) and value >= (name in ("num_processes", "num_machines")))
        require(whole, f"{KEY}: {name}", value, "a whole number")
    if kind == "FSDP":
        version = (content.get("fsdp_config") or {}).get("fsdp_version", 1)
        require(str(version) == "2", f"{KEY}: fsdp_version", version, "2")
    return content
