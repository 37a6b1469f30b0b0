"""Every model of conf/model in one table: what is frozen, what trains, what an adapter weighs. Downloads nothing.

    python scripts/model_table.py        # writes results/models/models.md and models.json
    make models                          # the same

The adapter is of rank 16 on all of a model's target modules, at the paper's 87 % (`calibration.budget=0.13`); heads are
for two classes, and causal models have none. The same numbers, one model at a time: `partial-lora info model=NAME`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tabulate import tabulate

from partial_lora import config
from partial_lora.composition import compose
from partial_lora.outline import outline
from partial_lora.results import write_atomic, write_json

FOLDER = Path("results/models")
_TASKS = {"encoder": "text_table", "causal": "text_generation"}  # of each family; images otherwise
_MIB = 2**20


def settings_of(model: str) -> dict:
    """The settings of a run of this model on the user's own data, with a head for two classes."""
    composed: list[dict] = []
    family = _family(model)
    task = [f"task={_TASKS.get(family, 'image_table')}", "task.classes=2", "calibration.budget=0.13"]
    compose("info", [f"model={model}", *task], lambda settings: composed.append(settings) or 0)
    return composed[0]


def _family(model: str) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.load(config.conf_dir() / "model" / f"{model}.yaml").get("family", "timm")


def table(counts: dict[str, dict]) -> str:
    """One line a model, in the order of their sizes."""
    rows = [
        [
            f"`{name}`",
            f"{each['base']:,}",
            each["targets"],
            f"{each['adapter_dense']:,}",
            f"{each['adapter_trainable']:,}",
            f"{each['head']:,}",
            f"{each['adapter_bytes'] / _MIB:.2f}",
            f"{each['compact_bytes'] / _MIB:.2f}",
            f"{(each['gradient_bytes'] + each['optimizer_bytes']) / _MIB:.2f}",
        ]
        for name, each in sorted(counts.items(), key=lambda item: item[1]["base"])
    ]
    headers = ["model", "frozen", "modules", "dense", "trainable", "head"]
    headers += ["PEFT file, MiB", "compact file, MiB", "gradients and AdamW, MiB"]
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True, colalign=["left"] + ["right"] * 8)


def main() -> int:
    """Count every model and write the table."""
    names = sorted(file.stem for file in (config.conf_dir() / "model").glob("*.yaml"))
    counts = {name: outline(settings_of(name)).counts for name in names}
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_json(FOLDER / "models.json", counts)
    said = __doc__.split("\n\n")
    write_atomic(FOLDER / "models.md", f"    python scripts/model_table.py\n\n{said[2].strip()}\n\n{table(counts)}\n")
    print(table(counts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
