"""What inference servers read of a run: every product B A is the run's own, under the server's names."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import finished_runs
import gguf
import numpy as np
import peft
import pytest
import torch
from finished_runs import choice_run, override, trained, with_other_values
from plain_libraries import in_this_process
from refusals import refusal
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from partial_lora import cli
from partial_lora.adapter import module_masks
from partial_lora.finished import export, merge
from partial_lora.finished.run import FinishedRun, finished_run

_PLACES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def causal(name: str, *given: str) -> FinishedRun:
    files = override(finished_runs.question_files())
    short = ("calibration=fixed", "calibration.sparsity=0.6", "trainer.save_steps=12")
    return trained(name, "task=choice_table", *finished_runs.CHOICE, *short, *given, files)


@functools.cache
def qwen_run() -> FinishedRun:
    """Masked, two kinds of modules of two ranks, each with its own scaling."""
    return causal("qwen", "model=tiny_qwen", "model.target_modules=[q_proj,down_proj]", "method.rank=auto")


@functools.cache
def low_rank_run() -> FinishedRun:
    return causal("low rank", "model=tiny_llama", "method=lora", "method.alpha=32")


RUNS = {"llama": choice_run, "qwen": qwen_run, "low rank": low_rank_run}


def changes(run: FinishedRun, adapter: Path | None = None) -> dict[str, torch.Tensor]:
    """Changes that plain PEFT makes to each weight of the run's base model, by the run's adapter or another."""
    model = peft.PeftModel.from_pretrained(export.base_model(run), str(adapter or run.adapter))
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


@functools.cache
def head_run() -> FinishedRun:
    """The layer that gives the logits is adapted, too."""
    return causal("logits", "model=tiny_qwen", "method=lora", "model.target_modules=[q_proj,lm_head]")


def with_adapter(**settings: object):
    """The run with other settings of its adapter, as PEFT writes them for other methods."""

    def run(folder: Path) -> FinishedRun:
        path = shutil.copytree(choice_run().directory, folder / "run") / "adapter" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return finished_run(folder / "run")

    return run


@pytest.mark.parametrize(
    ("run", "names"),
    [
        (
            lambda folder: finished_runs.changed(choice_run(), "model", family="encoder", head="score"),
            ["model=tiny_llama"],
        ),
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


@functools.cache
def units_run() -> FinishedRun:
    """Rows and columns of its own for each unit, in one layer of three and not of all the kinds that servers stack."""
    targets = "model.target_modules=[layers.1.self_attn.v_proj,layers.1.mlp.up_proj]"
    return causal("units", "model=tiny_llama", targets, "mask=units", "method.rank=12", "mask.row_exponent=1")


@pytest.mark.parametrize("name", ["llama", "qwen", "low rank", "units"])
def test_servers_find_one_rank_one_scaling_and_every_module_of_a_kind(tmp_path, name):
    run = RUNS.get(name, units_run)()
    folder = export.export(run, "serve", tmp_path / "out").folder
    settings = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    # vLLM: scaled by lora_alpha / r whatever the patterns say, r at most one of its max_lora_rank, LoRA tensors alone
    assert settings["r"] in (8, 16, 32, 64, 128, 256, 320, 512)
    assert settings["lora_alpha"] == settings["r"]
    unused = ("modules_to_save", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias")
    assert not any(settings[key] for key in unused)
    assert settings["bias"] == "none"
    # SGLang: a list of kinds, and of those that it stacks all, everywhere
    assert isinstance(settings["target_modules"], list)
    kinds = set(settings["target_modules"])
    assert all(
        group <= kinds or not group & kinds for group in ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
    )
    # LoRAX: a kind that one layer lacks is left out of all
    base = export.base_model(run)
    expected = {module for module, _ in base.named_modules() if module.rpartition(".")[2] in kinds}
    assert tensors.keys() == {f"base_model.model.{each}.lora_{ab}.weight" for each in expected for ab in "AB"}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert {min(tensor.shape) for tensor in tensors.values()} == {settings["r"]}
    for module, change in changes(run).items():
        a, b = (tensors.pop(f"base_model.model.{module}.lora_{ab}.weight").float() for ab in "AB")
        bound = 2 * 2**-8 * (b.abs() @ a.abs())  # each factor rounded to eight bits
        assert ((b @ a - change).abs() <= bound + 1e-7).all()
    assert not any(tensor.any() for tensor in tensors.values())  # only what servers want beside it


def test_units_that_add_nothing_take_no_place_and_512_are_the_most(tmp_path):
    folder = export.export(units_run(), "serve", tmp_path / "12").folder
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 16

    def widened(rank: int, kept: int) -> FinishedRun:
        folder = shutil.copytree(choice_run().directory, tmp_path / f"run{rank}-{kept}")
        path = folder / "adapter" / "adapter_model.safetensors"
        tensors = {}
        for name, tensor in load_file(path).items():
            shape = (rank, tensor.shape[1]) if "lora_A" in name else (tensor.shape[0], rank)
            tensors[name] = torch.ones(shape)
            tensors[name].transpose(0, int("lora_B" in name))[kept:] = 0
        save_file(tensors, path, metadata={"format": "pt"})
        return finished_run(folder)

    folder = export.export(widened(600, 8), "serve", tmp_path / "8").folder
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 8
    run = widened(600, 513)
    with refusal(f"{run.directory}: method.rank=513"):
        export.export(run, "serve", tmp_path / "513")
    assert not (tmp_path / "513").exists()


def test_several_chat_templates_go_along_to_servers(tmp_path):
    run = shutil.copytree(choice_run().directory, tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    tokenizer.chat_template = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    tokenizer.save_pretrained(run / "adapter")
    folder = export.export(finished_run(run), "serve", tmp_path / "out").folder
    assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template


@pytest.mark.parametrize(
    ("to", "dtype", "is_scaled"),
    [
        *((to, "float32", True) for to in export.WRITE),
        ("merged", "bfloat16", True),
        *((to, "float32", False) for to in ("compact", "gguf")),  # of another run: other tensors, too
    ],
)
def test_a_file_of_another_adapter_does_not_pass_in_any_format(tmp_path, monkeypatch, to, dtype, is_scaled):
    in_this_process(monkeypatch)
    another = with_other_values(choice_run(), tmp_path / "run", alpha=1.1) if is_scaled else other_run()
    write = export.WRITE[to]
    own, other = (finished_runs.changed(run, "model", dtype=dtype) for run in (choice_run(), another))
    monkeypatch.setitem(export.WRITE, to, lambda run, folder: write(other, folder))
    with pytest.raises(export.ProofError, match=str(tmp_path / "out")):
        export.export(own, to, tmp_path / "out", check=True)


@pytest.mark.parametrize("to", export.WRITE)
def test_where_an_adapter_changes_nothing_the_check_says_that_it_tells_nothing(tmp_path, monkeypatch, to):
    in_this_process(monkeypatch)
    run = with_other_values(choice_run(), tmp_path / "run", b=0.0)
    assert "tell" in export.export(run, to, tmp_path / "out", check=True).proof
    assert "tell" not in export.export(choice_run(), to, tmp_path / "other", check=True).proof


def test_the_scaling_in_a_gguf_file_is_checked(tmp_path, monkeypatch):
    add = gguf.GGUFWriter.add_float32
    monkeypatch.setattr(gguf.GGUFWriter, "add_float32", lambda self, key, value: add(self, key, 2 * value))
    with pytest.raises(export.ProofError, match=r"adapter\.lora\.alpha"):
        export.export(choice_run(), "gguf", tmp_path / "out", check=True)


# Several adapters as one


@functools.cache
def other_run() -> FinishedRun:
    """As `choice_run`, of other masks, in fewer modules."""
    given = ("mask.seed=7", "method.alpha=64", "model.target_modules=[q_proj,down_proj]")
    return causal("other masks", "model=tiny_llama", *given)


@functools.cache
def stabilised_run() -> FinishedRun:
    return causal("rank-stabilised", "model=tiny_llama", "method=rslora")


def test_cat_is_the_weighted_sum_and_what_both_change_is_that_of_their_masks(tmp_path) -> None:
    runs = [choice_run(), other_run()]
    (overlap,) = merge.merge(runs, [0.5, -2.0], tmp_path / "out")
    one, other = (changes(run) for run in runs)
    found = changes(choice_run(), tmp_path / "out")
    for module, change in found.items():
        expected = 0.5 * one[module] - 2 * other.get(module, torch.zeros(()))
        torch.testing.assert_close(change, expected, atol=1e-6, rtol=1e-5)
    masks = [module_masks(export.adapted_model(run)) for run in runs]
    kept = [{name: (each.rows.kept, each.columns.kept) for name, each in of_run.items()} for of_run in masks]
    common = {name: tuple(map(np.intersect1d, kept[0][name], both)) for name, both in kept[1].items()}

    def sizes(of_run) -> np.ndarray:
        return np.sum(
            [(len(rows), len(columns), len(rows) * len(columns)) for rows, columns in of_run.values()], axis=0
        )

    expected = sizes(common) / np.minimum(*map(sizes, kept))
    assert (overlap.rows, overlap.columns, overlap.entries) == tuple(expected)
    assert 0 < overlap.entries < overlap.rows < 1


@pytest.mark.parametrize("way", ["cat", "svd"])
def test_rank_stabilised_adapters_are_added_at_their_scales(tmp_path, way) -> None:
    run = stabilised_run()
    merge.merge([run, run], [0.5, 1.5], tmp_path / "out", way=way)
    alone = changes(run)
    for module, change in changes(run, tmp_path / "out").items():
        torch.testing.assert_close(change, 2 * alone[module], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("way", ["cat", "svd", "linear", "ties", "magnitude_prune"])
def test_every_way_of_peft_gives_an_adapter_that_it_loads(tmp_path, capsys, way) -> None:
    run, out = str(choice_run().directory), tmp_path / "out"
    line = ["merge", run, run, "--weights", "1", "1", "--how", way, "--density", "1", "--out", str(out)]
    assert cli.main(line) == 0
    assert capsys.readouterr().out.count("100.0%") == 3
    twice = {module: 2 * change for module, change in changes(choice_run()).items()}
    # Linear ways add both A and both B; of equal signs, ties takes the mean of both A and of both B.
    factor = {"linear": 2, "magnitude_prune": 2, "ties": 0.5}.get(way, 1)
    for module, change in changes(choice_run(), out).items():
        torch.testing.assert_close(change, twice[module] * factor, atol=1e-5, rtol=1e-3)
    assert cli.main(line) == 2  # there is something now
    assert str(out) in capsys.readouterr().err


def test_the_base_of_a_merge_is_that_of_the_runs(tmp_path, capsys) -> None:
    run = choice_run()
    line = [str(run.directory), str(run.directory), "--weights", "1", "1", "--out", str(tmp_path / "out")]
    assert cli.main(["merge", "smollm2_135m", *line]) == 2
    assert capsys.readouterr().err.startswith("partial-lora: BASE=smollm2_135m")
    assert cli.main(["merge", run.config.model.name, *line]) == 0


@pytest.mark.parametrize(
    ("runs", "weights", "begins"),
    [
        (lambda: [choice_run(), choice_run()], [1.0], "--weights: 1 for 2"),
        (lambda: [choice_run(), qwen_run()], [1.0, 1.0], ".*model.architecture=qwen2"),
        (lambda: [causal("dora", "model=tiny_llama", "method=dora")] * 2, [1.0, 1.0], ".*method=dora"),
    ],
)
def test_what_cannot_be_merged_is_refused_before_anything_is_written(tmp_path, runs, weights, begins) -> None:
    with refusal(begins):
        merge.merge(runs(), weights, tmp_path / "out")
    assert not list(tmp_path.iterdir())
