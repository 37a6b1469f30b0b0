"""Records of runs in the shape of PEFT's method_comparison, whose tables and pages then show them beside PEFT's own.

The shape is that of method_comparison/*/results/*.json in PEFT's repository, read by method_comparison/processing.py:
run_info, train_info, meta_info. What this project does not measure and that reader wants as a whole number (averages of
reserved memory, tokens) is 0.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from partial_lora.report.runs import Run
from partial_lora.runs.results import ADAPTER

FOLDER = "peft_method_comparison"
_ACCURACY = ("accuracy", "exact_match")  # what may stand as "test accuracy" there
_OPTIMIZERS = {"lorafa": "lora-fa"}  # in the words of that reader's TrainConfig
_PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")


def write(found: Sequence[Run], results_dir: Path) -> list[Path]:
    """Write results_dir/report/peft_method_comparison/TASK/EXPERIMENT.json for every run; gives the folders.

    Left out are runs without an adapter, and those that are measured by something else than accuracy or exact match.
    """
    place = Path(results_dir) / "report" / FOLDER
    shutil.rmtree(place, ignore_errors=True)  # what an earlier report wrote of runs that are no longer there
    folders = {}
    for run in found:
        if run.row["metric"] not in _ACCURACY or not run.row["adapter_parameters"]:
            continue
        folder = folders.setdefault(run.row["task"], place / run.row["task"])
        folder.mkdir(parents=True, exist_ok=True)
        content = shaped(run)
        name = content["run_info"]["experiment_name"].replace("/", "--")
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return list(folders.values())


def shaped(run: Run) -> dict:
    """One record in that shape."""
    record, config = run.record, run.record["config"]
    parameters, seconds = record["parameters"], record["seconds"]
    metrics = _metrics(run)
    size = run.row["adapter_bytes"]
    if size != size:  # of an earlier record: its file has the dense adapter, zeros where masked, in float32
        size = 4 * (parameters["adapter_dense"] + parameters["head"])
    return {
        "run_info": {
            "created_at": record.get("started"),
            "total_time": sum(value for value in seconds.values() if value),
            "experiment_name": _name(run),
            "peft_branch": "main",
            "train_config": _train_config(record, metrics[-1]["step"]),
            "peft_config": _peft_config(run),
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": 0,
            "accelerator_memory_max": record.get("peak_memory_bytes") or 0,
            "accelerator_memory_reserved_99th": 0,
            "train_time": seconds["train"],
            "file_size": int(size),
            "num_trainable_params": parameters["adapter_trainable"] + parameters["head"],
            "num_total_params": parameters["base"] + parameters["adapter_trainable"] + parameters["head"],
            "status": "success",
            "metrics": metrics,
        },
        "meta_info": {
            "model_info": {"sha": None, "created_at": None},
            "dataset_info": {run.row["task"]: {"sha": config["task"].get("revision"), "created_at": None}},
            "package_info": {
                **{f"{name}-version": record["versions"].get(name) for name in _PACKAGES},
                **{f"{name}-commit-hash": None for name in _PACKAGES},
                "partial-lora-version": record["versions"].get("partial-lora"),
                "partial-lora-commit-hash": record.get("git_commit"),
            },
            "system_info": {"accelerator": record.get("device")},
            "pytorch_info": "",
        },
    }


def _name(run: Run) -> str:
    """METHOD/MODEL-ID-seedK: PEFT names an experiment by its method and what it is of that method."""
    named = re.sub(r"\W+", "-", run.row["method"]).strip("-")  # a method's masks stand in brackets
    method = "lora" if named == "lora" else f"partial-lora-{named}"
    identifier = run.row["group"].rpartition("-")[2]
    return f"{method}/{run.row['model']}-{identifier}-seed{run.row['seed']}"


def _metrics(run: Run) -> list[dict]:
    """What validation said, with the training loss last logged before; and, as the last, the test."""
    history, metric = run.record["history"], run.row["metric"]
    size, loss, step, said = run.record["config"]["trainer"].get("batch_size") or 0, None, 0, []
    for entry in history:
        step, loss = entry.get("step", step), entry.get("loss", loss)
        if f"eval_{metric}" in entry:
            said.append(
                {
                    "step": step,
                    "valid accuracy": entry[f"eval_{metric}"],
                    "train loss": loss,
                    "train samples": step * size,
                    "eval time": entry.get("eval_runtime"),
                }
            )
    tokens = max((entry.get("num_input_tokens_seen") or 0 for entry in history), default=0)
    last = {"step": step, "test accuracy": run.row["test"], "train loss": loss, "train samples": step * size}
    return [*said, last | {"train total tokens": int(tokens)}]


def _train_config(record: Mapping, steps: int) -> dict:
    config = record["config"]
    model, trainer = config["model"], config["trainer"]
    return {
        "model_id": model.get("weights") or model["name"],
        "dtype": model.get("dtype"),
        "max_seq_length": model.get("max_length"),
        "batch_size": trainer.get("batch_size"),
        "batch_size_eval": trainer.get("eval_batch_size"),
        "max_steps": steps,
        "eval_steps": trainer.get("save_steps"),
        "compile": False,
        "use_gc": bool(model.get("gradient_checkpointing")),
        "query_template": None,
        "seed": config.get("seed"),
        "grad_norm_clip": trainer.get("max_grad_norm"),
        "optimizer_type": _OPTIMIZERS.get(config["method"]["name"], "AdamW"),
        "optimizer_kwargs": {"lr": trainer["learning_rate"], "weight_decay": trainer.get("weight_decay")},
        "lr_scheduler": "cosine",  # after a warm-up, as theirs
        "use_amp": record.get("mixed_precision") not in (None, "no"),  # what "auto" came to
        "autocast_adapter_dtype": True,
        "generation_kwargs": {"max_new_tokens": config["task"].get("max_new_tokens")},
        "attn_implementation": model.get("attn_implementation"),
    }


def _peft_config(run: Run) -> dict | None:
    """The adapter's own file; of a record alone what it says. None stands for training everything."""
    if run.row["method"] == "full":
        return None
    try:
        return json.loads((run.directory / ADAPTER / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        method = run.record["config"]["method"]
        return {
            "peft_type": "LORA",
            "base_model_name_or_path": run.record["config"]["model"].get("weights"),
            "r": method.get("rank"),
            "lora_alpha": method.get("alpha"),
            "lora_dropout": method.get("dropout"),
            "target_modules": run.record["config"]["model"].get("target_modules"),
        }
