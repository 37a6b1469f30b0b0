"""Files to act with: what the best run of a comparison was made with, for `train` and for plain PEFT."""

from __future__ import annotations

from pathlib import Path

from partial_lora.compare.candidates import Candidate, Entrant
from partial_lora.files import read_json, write_json
from partial_lora.launching import directory
from partial_lora.settings.editor import write_settings

FOLDER = "take"  # in the results directory

_ARGUMENTS = {  # of transformers, by which key of `trainer` each is set
    "learning_rate": "learning_rate",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warmup_ratio",  # below 1, a share of the steps
    "per_device_train_batch_size": "batch_size",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
}


def write(one: Entrant, folder: Path) -> Path:
    """Write into a folder what the best run was made with, for `partial-lora train` and for plain PEFT; return it.

    config.yaml; adapter_config.json, unless the adapter is masked, and training_arguments.json, for transformers'
    Trainer or TRL; and a record like those of PEFT's method_comparison.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place, record = next((place, record) for place, record in one.records.items() if record is one.of_seed(0))
    config, trained = record["config"], record.get("training") or {}
    # To train anew, and to the end: its first quarter may have been a trial.
    settings = {key: value for key, value in config.items() if key not in ("results_dir", "keep_records")}
    settings["trainer"] = config["trainer"] | {"until": 1.0}
    write_settings(folder / directory.CONFIG, settings, folder)
    adapter, copied = place / directory.ADAPTER, folder / "adapter_config.json"
    copied.unlink(missing_ok=True)  # of an earlier winner
    if (adapter / copied.name).is_file() and not (adapter / "partial_lora.json").is_file():  # alone it is dense LoRA
        write_json(copied, read_json(adapter / copied.name) | {"inference_mode": False})  # else PEFT freezes it
    trainer = config["trainer"]
    arguments = {name: trainer[key] for name, key in _ARGUMENTS.items() if key in trainer}
    arguments |= {"max_steps": trained.get("steps") or trainer.get("max_steps"), "seed": record["seed"]}
    write_json(folder / "training_arguments.json", arguments)
    write_json(folder / "method_comparison.json", _of_peft(record, one.candidate, arguments))
    return folder


def _of_peft(record: dict, candidate: Candidate, arguments: dict) -> dict:
    """Return a record of a run with the keys that PEFT's method_comparison reads; what was not measured is None."""
    metrics, parameters, cost = record["metrics"], record["parameters"], record.get("cost") or {}
    test = {f"test {name}": value for name, value in metrics["test"].items() if name != "primary"}
    seen = {"step": arguments["max_steps"], "train loss": metrics.get("train", {}).get("loss")}
    if arguments["max_steps"]:
        seen["train samples"] = arguments["max_steps"] * arguments["per_device_train_batch_size"]
    return {
        "run_info": {
            "created_at": record["started"],
            "total_time": sum(record["seconds"].values()),
            "experiment_name": f"{candidate.method}/{candidate.size}",
            "peft_branch": "main",
            "train_config": {"model_id": record["config"]["model"]["name"], **arguments},
            "peft_config": {"peft_type": record["config"]["method"].get("peft_type") or "LORA"},
            "error_msg": "",
        },
        "train_info": {
            **dict.fromkeys(("accelerator_memory_reserved_avg", "accelerator_memory_reserved_99th")),
            "accelerator_memory_max": record["peak_memory_bytes"],
            "train_time": record["seconds"]["train"],
            "file_size": cost.get("adapter_bytes"),
            "num_trainable_params": parameters["adapter_trainable"] + parameters["head"],
            "num_total_params": parameters["base"] + parameters["adapter_trainable"] + parameters["head"],
            "status": "success",
            "metrics": [seen | test],
        },
        "meta_info": {
            "package_info": {f"{name}-version": version for name, version in record["versions"].items()},
            "system_info": {},
        },
    }
