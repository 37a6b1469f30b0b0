"""Facts about this machine that a report of a bug needs (`partial-lora env`)."""

from __future__ import annotations

import os
import platform
import sys

from partial_lora.launching.directory import LIBRARIES, git_commit, version


def surroundings() -> dict[str, str]:
    """Return what a report of a bug needs to know of this machine: versions, platform, devices; no paths, no names."""
    import joblib
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "git commit": git_commit() or "none",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": f"{platform.machine()}, {joblib.cpu_count()} cores",
        "memory": f"{memory:.1f} GiB",
        "accelerators": ", ".join(devices) or "none",
        "CUDA of torch": torch.version.cuda or torch.version.hip or "none",
        "encoding": f"{sys.stdout.encoding}, {sys.getfilesystemencoding()}",
    } | {name: version(name) for name in (*LIBRARIES, "huggingface-hub", "hydra-core", "safetensors", "bitsandbytes")}
