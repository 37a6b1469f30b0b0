"""Two processes on CPUs that train a masked adapter in parts (FSDP2, by Trainer), as a worker of the package does.

Every process writes what it found into a folder that both share; the tests compare it with one process's run.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import tiny_trainer
import torch
import torch.multiprocessing
from accelerate.state import AcceleratorState
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_trainer import rows
from transformers import Trainer, TrainerCallback

from partial_lora.adapter import PartialLoraConfig, sharding
from partial_lora.launching import directory
from partial_lora.training import checkpoints, distributed, fsdp

WORLD = 2
STEPS = 6
HALF = 3  # where training goes on from a checkpoint
TINY = tiny_trainer.TINY | {"depth": 2}


def adapted(seed: int = 0) -> PeftModel:
    """A ViT of two blocks with masks of rows and columns, biases of B, and a new head."""
    targets = ["attn.proj", "mlp.fc2"]  # not qkv: the gradient of a bias of keys is rounding alone
    return tiny_trainer.adapted(
        seed=seed, method=PartialLoraConfig, depth=2, r=3, target_modules=targets, sparsity=0.6, lora_bias=True
    )


def trainer(model: PeftModel, folder: Path, *, processes: int, sharded: bool, **changes: object) -> Trainer:
    settings = {"max_steps": STEPS, "save_steps": HALF, "head_learning_rate": 3e-3, "loraplus_ratio": 4.0} | changes
    own = {"world_size": processes, "sharded": sharded, "heads": ["timm_model.head"]}
    built = tiny_trainer.trainer(model, folder, 40, **settings, **own)
    built.compute_metrics = lambda said: {"accuracy": 1.0}  # of equals the last checkpoint is the best
    return built


class Break(TrainerCallback):
    """Ends training half-way, after the checkpoint that is due there."""

    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = True


def main(rank: int, folder: Path, port: int) -> None:
    """One of the processes."""
    ranks = dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", distributed.EXPECTED), str(WORLD))
    os.environ.update({**ranks, **sizes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    AcceleratorState._reset_state(reset_partial_state=True)  # of trainings before the fork
    torch.set_num_threads(1)
    assert fsdp.ask("fsdp")
    own = distributed.join("cpu")
    model = adapted()
    fsdp.name_blocks(model, "timm_model.blocks")
    training = trainer(model, folder / "broken", processes=WORLD, sharded=True)
    training.add_callback(Break())
    training.train()
    own.gather(None)
    kept = fsdp.optimizer_state(training.optimizer)
    moments = [value for entry in training.optimizer.state_dict()["state"].values() for value in entry.values()]
    assert any(sharding.is_sharded(value) for value in moments)
    checkpoint = folder / "broken" / directory.CHECKPOINTS / f"checkpoint-{HALF}"
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    assert len(saved) == sum(parameter.requires_grad for parameter in training.model.parameters())
    for place, entry in saved.items():
        assert all(torch.equal(torch.as_tensor(kept["state"][place][name]), value) for name, value in entry.items())
    resumed = trainer(adapted(seed=7), folder / "broken", processes=WORLD, sharded=True)
    resumed.train(checkpoint)
    worse = iter((0.9, 0.1))
    early = trainer(adapted(), folder / "early", processes=WORLD, sharded=True)
    early.compute_metrics = lambda said: {"accuracy": next(worse)}
    early.train()
    first = load_file(folder / "early" / directory.CHECKPOINTS / f"checkpoint-{HALF}" / checkpoints.TRAINABLE)
    last = load_file(folder / "early" / directory.CHECKPOINTS / f"checkpoint-{STEPS}" / checkpoints.TRAINABLE)
    fsdp.reshard(early.model)
    left = checkpoints.trainable(early.model)
    assert all(torch.equal(value, first[name]) for name, value in left.items())
    assert not any(torch.equal(value, last[name]) for name, value in left.items())
    fsdp.reshard(resumed.model)
    held = sum(parameter.to_local().numel() for parameter in resumed.model.parameters())
    whole = sum(parameter.numel() for parameter in resumed.model.parameters())
    values = checkpoints.trainable(resumed.model)
    state = fsdp.adapter_state(resumed.model)
    resumed.model.save_pretrained(folder / "adapter", is_main_process=own.is_main, state_dict=state)
    said = resumed.predict(rows(13)).predictions
    save_file(
        values | {"share": torch.tensor(held / whole), "logits": torch.tensor(said)},
        folder / f"found_{rank}.safetensors",
    )
    own.gather(None)
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads sometimes abort a process that ends by itself


def start(folder: Path, port: int) -> None:
    """Let two processes train. An error in one of them is raised here."""
    torch.multiprocessing.start_processes(main, args=(folder, port), nprocs=WORLD, start_method="fork")
