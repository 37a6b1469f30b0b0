"""Records in the shape of PEFT's method_comparison: every field that its reader takes, of the kind that it takes."""

from __future__ import annotations

import json

from test_report import place, record

from partial_lora.report import records, tables

# What method_comparison/processing.py of PEFT takes out of a file, and the type it casts a column to.
TRAIN = {
    "accelerator_memory_reserved_avg": int,
    "accelerator_memory_max": int,
    "accelerator_memory_reserved_99th": int,
    "train_time": float,
    "file_size": int,
    "num_trainable_params": int,
    "num_total_params": int,
}
LAST = {"test accuracy": float, "train loss": float, "train samples": int, "train total tokens": int}
PACKAGES = ("peft", "transformers", "datasets", "torch", "bitsandbytes")
HISTORY = [
    {"step": 10, "loss": 0.5},
    {"step": 10, "eval_accuracy": 0.8, "eval_runtime": 1.5},
    {"step": 20, "loss": 0.25},
    {"step": 20, "eval_accuracy": 0.9, "eval_runtime": 1.5},
]


def written(tmp_path, *results):
    for result in results:
        place(tmp_path, result)
    folders = tables.write_method_comparison(records.read(tmp_path)[0], tmp_path)
    return {file.name: json.loads(file.read_text()) for folder in folders for file in folder.iterdir()}


def test_a_file_has_all_that_the_reader_takes(tmp_path):
    result = record(history=HISTORY, cost={"adapter_bytes": 81_000})
    result["config"]["trainer"]["batch_size"] = 32
    ((name, content),) = written(tmp_path, result).items()
    assert name == "partial-lora-partial--vit_s14-0a1b2c3d-seed0.json"
    assert content["run_info"]["experiment_name"] == "partial-lora-partial/vit_s14-0a1b2c3d-seed0"
    assert content["run_info"]["created_at"] == result["started"]
    assert content["run_info"]["train_config"]["model_id"] == "vit_s14"
    assert content["run_info"]["peft_config"]["peft_type"] == "LORA"
    train = content["train_info"]
    assert train["status"] == "success"
    assert all(isinstance(train[key], kind) for key, kind in TRAIN.items())
    assert (train["file_size"], train["num_trainable_params"]) == (81_000, 700 + 3850)
    last = train["metrics"][-1]
    assert all(isinstance(last[key], kind) for key, kind in LAST.items())
    assert (last["test accuracy"], last["train loss"], last["train samples"]) == (0.9861, 0.25, 640)
    assert [(each["step"], each["valid accuracy"]) for each in train["metrics"][:-1]] == [(10, 0.8), (20, 0.9)]
    packages = content["meta_info"]["package_info"]
    assert all(f"{package}-version" in packages for package in PACKAGES)
    assert content["meta_info"]["system_info"]["accelerator"] == "cpu"


def test_how_it_was_trained_is_what_the_run_did(tmp_path):
    result, lorafa, element = record(mixed_precision="no"), record("lorafa", mixed_precision="bf16"), record()
    result["config"]["trainer"]["mixed_precision"] = lorafa["config"]["trainer"]["mixed_precision"] = "auto"
    element["config"]["mask"] = {"granularity": "element"}
    found = written(tmp_path, result, lorafa)
    place(tmp_path, element, id="ffffffff")
    trained = {name.split("--")[0]: content["run_info"]["train_config"] for name, content in found.items()}
    own, other = trained["partial-lora-partial"], trained["partial-lora-lorafa"]
    assert (own["use_amp"], own["optimizer_type"], own["lr_scheduler"]) == (False, "AdamW", "cosine")
    assert (other["use_amp"], other["optimizer_type"]) == (True, "lora-fa")
    names = [tables.shaped(run)["run_info"]["experiment_name"] for run in records.read(tmp_path)[0]]
    assert "partial-lora-partial-element/vit_s14-ffffffff-seed0" in names


def test_only_adapters_measured_by_accuracy_are_written_and_old_files_go(tmp_path):
    matthews = record("targeted", metrics={"test": {"primary": "matthews", "matthews": 0.6}})
    names = written(tmp_path, record(), record("probe"), matthews, record("full"))
    assert sorted(names) == [
        "partial-lora-full--vit_s14-0a1b2c3d-seed0.json",
        "partial-lora-partial--vit_s14-0a1b2c3d-seed0.json",
    ]
    assert names["partial-lora-full--vit_s14-0a1b2c3d-seed0.json"]["run_info"]["peft_config"] is None
    stale = tmp_path / "report" / tables.FOLDER / "digits" / "stale.json"
    stale.write_text("{}")
    tables.write_method_comparison(records.read(tmp_path)[0], tmp_path)
    assert not stale.exists()


def test_the_adapters_own_settings_are_taken_where_they_are(tmp_path):
    folder = place(tmp_path, record("dora")) / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "use_dora": true}')
    (run,) = records.read(tmp_path)[0]
    assert tables.shaped(run)["run_info"]["peft_config"] == {"peft_type": "LORA", "use_dora": True}
