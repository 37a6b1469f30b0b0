"""Masked adapters train on several processes as on one: DistributedDataParallel, FSDP, accelerate, DeepSpeed."""

from __future__ import annotations

import importlib.util
import sys

import distributed_worker
import pytest
import torch
from distributed_worker import CASES, REPLICATED, SHARDED
from peft import get_peft_model_state_dict
from torch.distributed import fsdp

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What two processes found, each with half of every batch."""
    return distributed_worker.start("torch", tmp_path_factory.mktemp("torch"))


@pytest.mark.parametrize("case", REPLICATED)
def test_ddp_takes_the_steps_of_one_process_and_sends_what_is_kept(found, case):
    expected = distributed_worker.digests(CASES[case].build())
    for process in found:
        seen = process[f"ddp {case}"]
        assert max(seen["parameters"], seen["logits"]) < TOLERANCE
        assert seen["sent_each_step"] == seen["trained"]
        assert seen["buffers"] == []
        assert seen["masks"] == expected  # though nobody sends them
        assert seen["loaded"]  # what one process has saved for all


@pytest.mark.parametrize("case", SHARDED)
def test_fsdp2_takes_the_steps_of_one_process_and_saves_the_dense_adapter(found, case):
    expected = distributed_worker.digests(CASES[case].build())
    for process in found:
        seen = process[f"fsdp2 {case}"]
        assert max(seen[name] for name in ("parameters", "logits", "state_dict", "adapter")) < TOLERANCE
        assert seen["outside"] == 0
        assert seen["masks"] == expected
        assert all(seen[name] for name in ("bfloat16", "saved", "loaded", "loaded_by_peft"))


@pytest.mark.parametrize("case", SHARDED)
def test_fsdp2_spreads_the_kept_entries(found, case):
    first, second = (process[f"fsdp2 {case}"] for process in found)
    assert first["whole"].keys() == first["held"].keys() == second["held"].keys()
    for name, size in first["whole"].items():
        assert first["held"][name] + second["held"][name] == size
        assert first["held"][name] >= second["held"][name]
    if case == "llama":
        assert 0 in second["held"].values()  # the shares are uneven, up to none
        assert any(0 < second["held"][name] < first["held"][name] for name in first["held"])


def test_accelerate_shards_trains_saves_and_restores(found):
    for process in found:
        seen = process["accelerate"]
        assert seen["on_cpu"] == "MULTI_CPU"  # what it would take by itself: see the worker
        assert seen["sharded"]
        assert seen["parameters"] < TOLERANCE
        assert seen["saved"]
        assert seen["restored"]


def test_fsdp_1_gives_the_dense_adapter_and_takes_its_state_back(monkeypatch):
    """In one process: torch's own FSDP 1 ends with a fault where two processes of a CPU offload their state."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # a process group leaves its own
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        case = CASES["llama"]
        model = case.build()
        expected = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
        sharded = fsdp.FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        with sharded.state_dict_type(sharded, fsdp.StateDictType.FULL_STATE_DICT):
            state = {name: tensor.clone() for name, tensor in sharded.state_dict().items()}
            adapter = get_peft_model_state_dict(model, state_dict=state)
            sharded.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in state.items()})
            assert not any(parameter.any() for parameter in sharded.parameters())
            sharded.load_state_dict(state)
            again = sharded.state_dict()
    finally:
        torch.distributed.destroy_process_group()
    assert adapter.keys() == expected.keys()
    assert all(torch.equal(adapter[name], tensor) for name, tensor in expected.items())
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


@pytest.fixture(scope="module")
def found_by_deepspeed(tmp_path_factory) -> list[dict]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("DS_ACCELERATOR", "cpu")
        return distributed_worker.start("deepspeed", tmp_path_factory.mktemp("deepspeed"))


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed; it compiles its communication for a minute, so the tests do not require it",
)
@pytest.mark.parametrize("case", ["llama", "llama_element"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_trains_saves_and_restores(found_by_deepspeed, stage, case):
    expected = distributed_worker.digests(CASES[case].build())
    for process in found_by_deepspeed:
        seen = process[f"zero{stage} {case}"]
        assert seen["masks"] == expected
        assert seen["restored"]
        assert max(seen[name] for name in ("logits", "adapter", "weights", "direct", "gathered")) < TOLERANCE
