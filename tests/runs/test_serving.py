"""What inference servers read of a run: every product B A is the run's own, under the server's names."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import finished_runs
import gguf
import peft
import pytest
import torch
from finished_runs import choice_run, generation_run, image_run, override, trained
from refusals import refusal
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from partial_lora.runs import export, finished

pytestmark = pytest.mark.usefixtures("same_cache")

_PLACES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def causal(name: str, *given: str) -> finished.FinishedRun:
    files = override(finished_runs.question_files())
    short = ("calibration=fixed", "calibration.sparsity=0.6", "trainer.save_steps=12")
    return trained(name, "task=choice_table", *finished_runs.CHOICE, *short, *given, files)


@functools.cache
def qwen_run() -> finished.FinishedRun:
    """Masked, two kinds of modules of two ranks, each with its own scaling."""
    return causal("qwen", "model=tiny_qwen", "model.target_modules=[q_proj,down_proj]", "method.rank=auto")


@functools.cache
def low_rank_run() -> finished.FinishedRun:
    return causal("low rank", "model=tiny_llama", "method=low_rank", "method.alpha=32")


RUNS = {"llama": choice_run, "qwen": qwen_run, "low rank": low_rank_run, "dense": generation_run}


def changes(run: finished.FinishedRun) -> dict[str, torch.Tensor]:
    """What plain PEFT adds to each weight of the run's base model."""
    model = peft.PeftModel.from_pretrained(export.base_model(run), str(run.adapter))
    layers = {name: layer for name, layer in model.get_base_model().named_modules() if hasattr(layer, "lora_A")}
    return {name: layer.get_delta_weight("default") for name, layer in layers.items()}


@pytest.mark.parametrize("name", RUNS)
def test_gguf_s_own_reader_finds_what_the_run_adds_to_each_weight(tmp_path, name):
    run = RUNS[name]()
    done = export.export(run, "gguf", tmp_path / "out", check=True)
    (path,) = done.folder.iterdir()
    reader = gguf.GGUFReader(path)
    keys = {key: field.contents() for key, field in reader.fields.items()}
    assert (keys["general.type"], keys["adapter.type"]) == ("adapter", "lora")
    assert keys["general.architecture"] == run.config.model.architecture
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    expected = changes(run)
    assert len(found) == 2 * len(expected)
    for module, change in expected.items():
        place = f"blk.{module.split('.')[2]}.{_PLACES[module.rpartition('.')[2]]}.weight"
        a, b = found[f"{place}.lora_a"], found[f"{place}.lora_b"]
        product = (b @ a * (keys["adapter.lora.alpha"] / len(a))).numpy()
        heads = {"attn_q": 4, "attn_k": 2}.get(place.split(".")[2])
        if keys["general.architecture"] == "llama" and heads:  # as transformers reads the base model's file
            product = LlamaTensorProcessor()._reverse_permute_weights(product, heads)
        torch.testing.assert_close(torch.from_numpy(product), change, atol=1e-6, rtol=1e-5)
    assert all(change.abs().max() > 1e-4 for change in expected.values())


def test_the_same_file_is_written_again_and_a_spoilt_one_does_not_pass(tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert not export.export(qwen_run(), "gguf", out).existed
    assert export.export(qwen_run(), "gguf", out).existed
    with refusal(f"{out} "):
        export.export(choice_run(), "gguf", out)

    def spoil(run: finished.FinishedRun, folder: Path) -> None:
        write(run, folder)
        (path,) = folder.iterdir()
        path.write_bytes(path.read_bytes()[:-4] + b"\1\2\3\4")

    write = export.WRITE["gguf"]
    monkeypatch.setitem(export.WRITE, "gguf", spoil)
    with pytest.raises(export.ProofError):
        export.export(choice_run(), "gguf", tmp_path / "other", check=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@functools.cache
def head_run() -> finished.FinishedRun:
    """The layer that gives the logits is adapted, too."""
    return causal("logits", "model=tiny_qwen", "method=lora", "model.target_modules=[q_proj,lm_head]")


def with_adapter(**settings: object):
    """The run with other settings of its adapter, as PEFT writes them for other methods."""

    def run(folder: Path) -> finished.FinishedRun:
        path = shutil.copytree(choice_run().directory, folder / "run") / "adapter" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return finished.finished_run(folder / "run")

    return run


@pytest.mark.parametrize(
    ("run", "names"),
    [
        (lambda folder: image_run(), ["model=tiny_vit"]),
        (with_adapter(peft_type="VERA"), ["method=partial", "VERA"]),
        (with_adapter(use_dora=True), ["method=partial", "use_dora"]),
        (with_adapter(modules_to_save=["lm_head"]), ["method=partial", "modules_to_save"]),
        (lambda folder: head_run(), ["lm_head"]),
        (lambda folder: finished_runs.changed(choice_run(), "model", architecture="opt"), ["model.architecture=opt"]),
    ],
)
def test_what_a_gguf_file_cannot_hold_is_refused_before_anything_is_written(tmp_path, run, names):
    run = run(tmp_path)
    with refusal(f"{run.directory}", *names, "--to merged"):
        export.export(run, "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
