"""A run on several machines, or whose processes are killed, as a user sees it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pandas
import pytest
import yaml
from commands import begun, here, is_alive, until
from safetensors.torch import load_file

SETTINGS = (
    *("model=tiny_llama", "task=text_generation", "task.prompt_columns=[prompt]", "task.response_column=response"),
    *("task.max_new_tokens=4", "calibration.levels=0.45", "calibration.share=0.1", "calibration.reliability=false"),
    *("trainer.max_steps=6", "trainer.save_steps=3", "trainer.learning_rate=0.01", "trainer.eval_batch_size=4"),
    "trainer.mixed_precision=no",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prompts and responses; of the test rows there are so many that processes have unlike numbers."""
    folder = tmp_path_factory.mktemp("machines")
    for split, (count, first) in {"train": (80, 0), "test": (5, 1000)}.items():
        rows = [{"prompt": f"say {number}", "response": f"{number} it is"} for number in range(first, first + count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def generation(*arguments: str) -> tuple[str, ...]:
    return (*SETTINGS, "task.data_files={train: train.jsonl, test: test.jsonl}", *arguments)


def run_of(place: Path, results: str) -> tuple[Path, dict]:
    (path,) = place.glob(f"{results}/runs/*/*/*/*/result.json")
    return path.parent, json.loads(path.read_text())


@pytest.fixture(scope="module")
def alone(place: Path) -> tuple[Path, dict]:
    done = here(place, "train", *generation("results_dir=alone", "trainer.device=cpu"))
    assert done.returncode == 0, done.stderr
    return run_of(place, "alone")


@pytest.fixture(scope="module")
def together(place: Path, alone, port: int) -> list[tuple[int, str, str]]:
    """What two machines say whose run is described by a file: the model in parts, a step in two."""
    described = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "FSDP",
        "fsdp_config": {"fsdp_version": 2, "fsdp_cpu_ram_efficient_loading": True, "fsdp_reshard_after_forward": True},
        "mixed_precision": "bf16",
        "num_machines": 2,
        "num_processes": 2,
        "main_process_ip": "127.0.0.1",
        "main_process_port": port,
        "use_cpu": True,
    }
    (place / "accelerate.yaml").write_text(yaml.safe_dump(described))
    given = generation(
        "results_dir=together", "trainer.accelerate_config=accelerate.yaml", "trainer.gradient_accumulation_steps=2"
    )
    machines = [begun(place, "train", *given, f"trainer.machine_rank={rank}") for rank in (1, 0)]
    said = [machine.communicate(timeout=300) for machine in machines]
    return [(machine.returncode, *each) for machine, each in zip(machines, said, strict=True)][::-1]


def test_two_machines_find_what_one_process_finds(place: Path, alone, together) -> None:
    assert [code for code, _, _ in together] == [0, 0], together
    (_, one), (folder, two) = alone, run_of(place, "together")
    assert "parameters are shared out over the processes, LlamaDecoderLayer" in (folder / "train.log").read_text()
    assert two["status"] == "finished"
    assert two["mixed_precision"] == "no"
    assert two["sparsity"] == one["sparsity"]
    losses, shared = ([entry["loss"] for entry in of["history"] if "loss" in entry] for of in (one, two))
    assert shared == pytest.approx(losses, abs=1e-4)
    assert two["metrics"]["train"]["loss"] == pytest.approx(one["metrics"]["train"]["loss"], abs=1e-4)
    for split in ("validation", "test"):
        names = one["metrics"][split].keys() - {"primary"}
        assert {name: two["metrics"][split][name] for name in names} == pytest.approx(
            {name: one["metrics"][split][name] for name in names}, abs=1e-4, rel=1e-4
        )


def test_what_they_leave_is_what_one_process_leaves(place: Path, alone, together) -> None:
    own, shared = alone[0], run_of(place, "together")[0]
    assert {path.name for path in shared.iterdir()} - {path.name for path in own.iterdir()} == {"train.machine1.log"}
    assert shared.relative_to(place / "together") == own.relative_to(place / "alone")
    written = [list(pandas.read_parquet(folder / "predictions.parquet")["prediction"]) for folder in (own, shared)]
    assert written[0] == written[1]
    assert len(set(written[0])) > 1
    kept = [json.loads((folder / "adapter" / "partial_lora.json").read_text())["modules"] for folder in (own, shared)]
    assert kept[0] == kept[1]
    tensors = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (own, shared)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        assert (tensors[1][name] - tensor).abs().max() < 1e-4


def test_only_the_first_machine_has_more_than_a_line_to_say(place: Path, together) -> None:
    (_, first, _), (_, second, errors) = together
    assert "train done" in first
    (line,) = [line for line in second.splitlines()[1:] if line]
    assert line.startswith("machine 1 of 2: finished; the results are machine 0's: ")
    assert errors == ""


def test_a_machine_that_comes_back_to_a_finished_run_skips_it(place: Path, together) -> None:
    before = {path: path.stat().st_mtime_ns for path in run_of(place, "together")[0].rglob("*")}
    given = ("results_dir=together", "trainer.accelerate_config=accelerate.yaml", "trainer.machine_rank=1")
    again = here(place, "train", *generation(*given, "trainer.gradient_accumulation_steps=2"))
    assert again.returncode == 0
    assert "not run again" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in run_of(place, "together")[0].rglob("*")} == before


def test_a_killed_process_is_named_and_none_is_left(place: Path) -> None:
    results, ranks, rank = place / "killed", place / "ranks", "0"  # which can no longer write the record
    ranks.mkdir()

    def sign() -> None:
        (ranks / str(os.getpid())).write_text(os.environ.get("RANK", ""))

    long = ("model=tiny_vit", "method=lora", "trainer.epochs=300", "trainer.num_processes=2", "trainer.device=cpu")
    running = begun(place, "train", *long, f"results_dir={results}", first=sign)
    logs = "runs/*/*/*/*/train.log"
    until(lambda: any("step 10 " in path.read_text() for path in results.glob(logs)), running)
    processes = {int(path.name): path.read_text() for path in ranks.iterdir()}
    assert sorted(processes.values()) == ["", "", "0", "1"]  # the command, the launcher and the two that train
    (victim,) = (pid for pid, own in processes.items() if own == rank)
    os.kill(victim, signal.SIGKILL)
    said = running.communicate(timeout=60)[1]  # none of them waits longer for a peer that is gone
    assert running.returncode == 1
    (line,) = said.strip().splitlines()
    assert line.startswith(f"partial-lora: process {rank} of 2 was ended by SIGKILL (log: ")
    _, result = run_of(place, results.name)
    assert (result["status"], result["error"]) == ("failed", f"process {rank} of 2 was ended by SIGKILL")
    assert not any(map(is_alive, processes))
