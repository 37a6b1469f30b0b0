"""Two processes on CPUs (gloo) that train masked adapters, and what each of them found.

Every check is a function of this process's rank and a folder both share; it returns numbers, names and booleans, which
the tests look at. One start runs several checks, since loading the libraries takes longer than any of them.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from accelerate.state import AcceleratorState
from adapter_models import KINDS, adapt, fill, layers, logits, loss_of, step
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from partial_lora.adapter import PartialLoraConfig, module_masks
from partial_lora.adapter.factor import OneHotA
from partial_lora.masks import AS_PEFT

WORLD = 2
STEPS = 3


@dataclass(frozen=True)
class Case:
    """A model and the adapter on it."""

    kind: str
    settings: dict = field(default_factory=dict)
    checkpointing: bool = False

    def build(self, seed: int = 1) -> torch.nn.Module:
        model = fill(adapt(KINDS[self.kind].build, seed=seed, **self.settings))
        if self.checkpointing:
            model.gradient_checkpointing_enable()
        return model

    def batches(self) -> list[dict]:
        return [KINDS[self.kind].batch(seed) for seed in range(STEPS)]

    def part(self, batch: dict, rank: int) -> dict:
        """This process's share of a batch."""
        return {name: tensor.chunk(WORLD)[rank] for name, tensor in batch.items()}


SPARSITY = {
    "q_proj": {"rows": 0.9, "columns": 0.5},
    "v_proj": 0.95,  # one row of B is left: the second process has none of it
    "down_proj": {"rows": 0.3, "columns": 0.8},
}
CASES = {
    "llama": Case("llama", {"sparsity": SPARSITY, "r": 3}),
    "llama_element": Case("llama", {"sparsity": SPARSITY, "granularity": "element"}),
    "llama_one_hot": Case("llama", {"sparsity": SPARSITY, "columns": "one_hot", "r": 3}),
    # At the scaling by density these rates are so large that the order of a sum shows.
    "vit": Case("wrapped_vit", {"sparsity": 0.87, **AS_PEFT}),
    "gpt2_checkpointed": Case("gpt2", {"sparsity": 0.5, "granularity": "element"}, checkpointing=True),
}
REPLICATED = ("llama_one_hot", "vit", "gpt2_checkpointed")  # rows and columns, a head that trains whole, entries
SHARDED = ("llama", *REPLICATED)


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What trains, whole, by its name."""
    return {
        name: whole(parameter).detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def difference(one: dict, other: dict) -> float:
    """The largest difference of two dictionaries of tensors with the same keys."""
    assert one.keys() == other.keys()
    return max((one[key] - other[key]).abs().max().item() for key in one)


ROUNDED = 1e-6  # relative, of B in a file of one alpha


def equal(one: dict, other: dict, rounded: float = 0) -> bool:
    """Whether two dictionaries of tensors are the same, but for a relative rounding."""
    return one.keys() == other.keys() and all(torch.allclose(one[key], other[key], rtol=rounded, atol=0) for key in one)


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW with two learning rates, in groups as Trainer has them where B has its own."""
    trains = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    of_b = [parameter for name, parameter in trains.items() if ".lora_B." in name]
    rest = [parameter for name, parameter in trains.items() if ".lora_B." not in name]
    groups = [{"params": rest, "lr": 0.01, "part": "adapter"}, {"params": of_b, "lr": 0.02, "part": "B"}]
    return torch.optim.AdamW(groups, weight_decay=0.1)


def reference(case: Case) -> torch.nn.Module:
    """The model after one process has taken all steps with whole batches."""
    model = case.build()
    optimizer = optimizer_of(model)
    for batch in case.batches():
        step(model, optimizer, batch)
    return model


def values_outside(model: torch.nn.Module, dense: dict[str, torch.Tensor]) -> int:
    """How many entries of the dense adapter are not zero though no mask keeps them."""
    kept = sum(int((tensor != 0).sum()) for name, tensor in dense.items() if "lora_" in name)
    kept -= sum(int((module.weight != 0).sum()) for module in model.modules() if isinstance(module, OneHotA))
    return kept - sum(p.numel() for name, p in trained(model).items() if name.endswith("kept"))


def digests(model: torch.nn.Module) -> dict[str, list[str]]:
    return {name: [masks.rows.digest, masks.columns.digest] for name, masks in module_masks(model).items()}


def ddp(case: Case, rank: int, folder: Path) -> dict:
    """DistributedDataParallel: steps, what is sent, masks, and saving once."""
    model = case.build(seed=1 + 10 * rank)  # as drawn, the processes differ; the masks must not
    parallel = DistributedDataParallel(model, find_unused_parameters=False)
    sent = []

    def count_and_average(_, bucket):
        sent.append(bucket.buffer().numel())
        work = dist.all_reduce(bucket.buffer().div_(WORLD), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    parallel.register_comm_hook(None, count_and_average)
    optimizer = optimizer_of(parallel)
    for batch in case.batches():
        step(parallel, optimizer, case.part(batch, rank))
    expected = reference(case)
    probe = KINDS[case.kind].batch(9)
    found = {
        "parameters": difference(trained(model), trained(expected)),
        "logits": (logits(model, probe) - logits(expected, probe)).abs().max().item(),
        "sent_each_step": sum(sent) / STEPS,
        "trained": sum(p.numel() for p in trained(model).values()),
        "buffers": [name for name, _ in parallel.named_buffers() if "lora" in name],
        "masks": digests(model),
    }
    model.save_pretrained(folder, is_main_process=rank == 0)
    dist.barrier()
    found["loaded"] = equal(trained(loaded(case, folder)), trained(model), ROUNDED)
    return found


def loaded(case: Case, folder: Path) -> torch.nn.Module:
    config = PartialLoraConfig.from_pretrained(folder)
    return PeftModel.from_pretrained(KINDS[case.kind].build(), folder, config=config, is_trainable=True)


def shard(model: torch.nn.Module, **settings) -> torch.nn.Module:
    """FSDP2: every block of the model on its own, then the rest."""
    mesh = init_device_mesh("cpu", (WORLD,))
    blocks = [module for module in model.modules() if type(module).__name__ in BLOCKS]
    for module in [*blocks, model]:
        fully_shard(module, mesh=mesh, **settings)
    return model


def describe_launch(rank: int) -> None:
    """Set the variables that a launcher sets for libraries; the processes have met already."""
    ranks = dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"), str(WORLD))
    os.environ.update({**ranks, **sizes})


BLOCKS = ("LlamaDecoderLayer", "GPT2Block", "Block")


def fsdp2(case: Case, rank: int, folder: Path) -> dict:
    """fully_shard: steps, what each process holds, and the dense adapter it saves and loads."""
    model = shard(case.build())
    optimizer = optimizer_of(model)
    held = {name: p.to_local().numel() for name, p in model.named_parameters() if p.requires_grad}
    for batch in case.batches():
        step(model, optimizer, case.part(batch, rank))
    expected = reference(case)
    whole_state = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(model, options=whole_state)
    dense = get_peft_model_state_dict(model)
    probe = KINDS[case.kind].batch(9)
    found = {
        "parameters": difference(trained(model), trained(expected)),
        "logits": (logits(model, probe) - logits(expected, probe)).abs().max().item(),
        "held": held,
        "whole": {name: p.numel() for name, p in trained(expected).items()},
        "state_dict": difference(state, expected.state_dict()),
        "adapter": difference({k: whole(v) for k, v in dense.items()}, get_peft_model_state_dict(expected)),
        "outside": values_outside(expected, dense),
        "masks": digests(model),
    }
    head = case.kind == "wrapped_vit"  # its entries are sharded tensors, which no file takes: gathered first
    model.save_pretrained(folder, is_main_process=rank == 0, state_dict=dict(state) if head else None)
    dist.barrier()
    found["saved"] = equal(trained(loaded(case, folder)), trained(model), ROUNDED)

    other = shard(case.build(seed=7))
    set_model_state_dict(other, dict(state), options=whole_state)
    found["loaded"] = equal(trained(other), trained(model), ROUNDED)
    other = shard(case.build(seed=8))
    result = set_peft_model_state_dict(other, {name: whole(tensor) for name, tensor in dense.items()})
    found["loaded_by_peft"] = not result.unexpected_keys and (head or equal(trained(other), trained(model), ROUNDED))

    half = shard(case.build(), mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    loss = loss_of(half, case.part(case.batches()[0], rank))
    loss.backward()
    gradients = [p.grad for p in half.parameters() if p.requires_grad]
    found["bfloat16"] = all(g.dtype == torch.float32 and g.to_local().isfinite().all().item() for g in gradients)
    return found


def accelerate_fsdp2(case: Case, rank: int, folder: Path) -> dict:
    """FSDP2 as accelerate and Trainer set it up: prepare from rank 0's values, steps, saving, loading.

    On CPUs accelerate leaves the plugin out and takes DistributedDataParallel. So its state is set to FSDP by hand;
    everything after that is its own code.
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType
    from accelerate.utils.fsdp_utils import load_fsdp_model, load_fsdp_optimizer, save_fsdp_model, save_fsdp_optimizer

    describe_launch(rank)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=True,
        state_dict_type="SHARDED_STATE_DICT",
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    found = {"on_cpu": accelerator.distributed_type.value}
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin

    model = case.build()
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    for batch in case.batches():
        model.train()
        accelerator.backward(loss_of(model, case.part(batch, rank)))
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    expected = reference(case)
    found["sharded"] = all(isinstance(p, DTensor) for p in model.parameters())
    found["parameters"] = difference(trained(model), trained(expected))
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        model.save_pretrained(folder / "adapter", state_dict=state)
    save_fsdp_model(plugin, accelerator, model, folder / "checkpoint", adapter_only=True)
    save_fsdp_optimizer(plugin, accelerator, optimizer, model, folder / "checkpoint")
    dist.barrier()
    before = trained(model)
    found["saved"] = equal(trained(loaded(case, folder / "adapter")), before, ROUNDED)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    load_fsdp_model(plugin, accelerator, model, folder / "checkpoint", adapter_only=True)
    load_fsdp_optimizer(plugin, accelerator, optimizer, model, folder / "checkpoint")
    found["restored"] = equal(trained(model), before, ROUNDED)
    return found


def deepspeed_zero(stage: int, case: Case, rank: int, folder: Path) -> dict:
    """DeepSpeed's ZeRO stages: steps with clipping, what is seen from outside, saving, checkpoints."""
    describe_launch(rank)
    import deepspeed

    model = case.build()
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        optimizer=optimizer_of(model),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.5,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        },
    )
    for batch in case.batches():
        engine.train()
        engine.backward(loss_of(engine, case.part(batch, rank)))
        engine.step()
    expected = reference(case)
    wanted = get_peft_model_state_dict(expected)
    probe = KINDS[case.kind].batch(9)
    computed = logits(engine, probe)
    found = {
        "logits": (computed - logits(expected, probe)).abs().max().item(),
        "adapter": difference(get_peft_model_state_dict(model), wanted),
        "weights": max(
            (seen.weight - known.weight).abs().max().item()
            for name, layer in layers(model).items()
            for seen, known in zip(factors(layer), factors(layers(expected)[name]), strict=True)
        ),
        "masks": digests(model),
    }
    model.save_pretrained(folder / "direct", is_main_process=rank == 0)
    # What accelerate's get_state_dict, and so Trainer, takes under stage 3.
    state = engine._zero3_consolidated_16bit_state_dict() if stage == 3 else model.state_dict()
    if rank == 0:
        model.save_pretrained(folder / "gathered", state_dict=state)
    dist.barrier()
    for name in ("direct", "gathered"):
        found[name] = difference(trained(loaded(case, folder / name)), trained(expected))
    engine.save_checkpoint(folder / "checkpoint")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.zero_()
    engine.load_checkpoint(folder / "checkpoint")
    found["restored"] = torch.equal(logits(engine, probe), computed)
    return found


def factors(layer: torch.nn.Module) -> list[torch.nn.Module]:
    return [layer.lora_A["default"], layer.lora_B["default"]]


CHECKS = {
    "torch": {
        **{f"ddp {name}": (ddp, CASES[name]) for name in REPLICATED},
        **{f"fsdp2 {name}": (fsdp2, CASES[name]) for name in SHARDED},
        "accelerate": (accelerate_fsdp2, CASES["llama"]),  # last: it tells accelerate that this is FSDP
    },
    "deepspeed": {
        f"zero{stage} {name}": (lambda *given, stage=stage: deepspeed_zero(stage, *given), CASES[name])
        for stage in (1, 2, 3)
        for name in ("llama", "llama_element")
    },
}


def main(rank: int, group: str, folder: Path) -> None:
    """One of the processes: run a group of checks and write down what they found."""
    AcceleratorState._reset_state(reset_partial_state=True)  # of trainings before the fork
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=120),
    )
    found = {}
    for number, (name, (check, case)) in enumerate(CHECKS[group].items()):
        own = folder / str(number)
        own.mkdir(exist_ok=True)
        found[name] = check(case, rank, own)
    (folder / f"found_{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads sometimes abort a process that ends by itself


def start(group: str, folder: Path) -> list[dict]:
    """What each process found, by the name of the check. An error in one of them is raised here."""
    torch.multiprocessing.start_processes(main, args=(group, folder), nprocs=WORLD, start_method="fork")
    return [json.loads((folder / f"found_{rank}.json").read_text()) for rank in range(WORLD)]
