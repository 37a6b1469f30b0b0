"""A causal run's adapter as inference servers read it: a GGUF file, or a LoRA of one rank and one scaling.

Its own files and the shapes of its base model are all that this needs: no weight of the base model is loaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PretrainedConfig

from partial_lora import models
from partial_lora.adapter.config import scaling_of
from partial_lora.errors import PartialLoraError, ProofError
from partial_lora.files import read_json
from partial_lora.finished.run import FinishedRun

_PREFIX = "base_model.model."  # PEFT's, of every name in an adapter's file
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class Served:
    """An adapter that is a LoRA and nothing else, and the model that it is for.

    settings: PEFT's. factors: {module: (A, B)} in float32, A rank x in and B out x rank with the scaling in it, so that
    B A is what is added to W. linear: the base model's linear layers by name, which have shapes and no values.
    """

    settings: LoraConfig
    factors: dict[str, tuple[Tensor, Tensor]]
    linear: dict[str, nn.Linear]
    model: PretrainedConfig


def read(run: FinishedRun, to: str) -> Served:
    """Return the adapter of a finished run.

    Raises PartialLoraError, in one line, where the run is of no causal language model, or its adapter is more than a
    LoRA on linear layers.
    """
    run.check_causal(run.directory, f" for --to {to}; export it with --to merged")
    settings, model = _settings(run, to), models.empty(**run.config.model.geometry)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return Served(settings, _factors(run.adapter / _WEIGHTS, settings, linear), linear, model.config)


def _settings(run: FinishedRun, to: str) -> LoraConfig:
    content = read_json(run.adapter / _CONFIG)
    more = [key for key in ("modules_to_save", "use_dora", "lora_bias", "target_parameters") if content.get(key)]
    if content["peft_type"] == "LORA" and not more:
        return LoraConfig.from_pretrained(str(run.adapter))
    kind = f"an adapter with {more[0]}" if more else f"PEFT's {content['peft_type']}"
    raise PartialLoraError(
        f"{run.directory}: method={run.method} is {kind}, expected a LoRA alone for --to {to}; export it with"
        " --to merged"
    )


def _factors(path: Path, settings: LoraConfig, linear: Mapping[str, nn.Linear]) -> dict[str, tuple[Tensor, Tensor]]:
    tensors = {name.removeprefix(_PREFIX): tensor.float() for name, tensor in load_file(path).items()}
    factors = {}
    for module in dict.fromkeys(name.partition(".lora_")[0] for name in tensors):
        a, b = (tensors.get(f"{module}.lora_{factor}.weight") for factor in "AB")
        layer = linear.get(module)
        if layer is None or a is None or b is None or (b.shape[0], a.shape[1]) != layer.weight.shape:
            raise PartialLoraError(f"{path}: {module}: expected both factors of a linear layer; train the run again")
        factors[module] = a, b * scaling_of(settings, module, len(a))
    return factors


# --- llama.cpp and what stands on it: a GGUF file of the format's own keys.

GGUF_FILE = "adapter.gguf"
_ARCHITECTURES = {  # transformers' name of an architecture: llama.cpp's
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}


def write_gguf(run: FinishedRun, folder: Path) -> None:
    """Write the adapter as one GGUF file, float32, its rank as its alpha: llama.cpp scales B A by alpha / rank.

    Raises PartialLoraError, before it writes, for an architecture or a module that has no place in such a file.
    """
    tensors, rank = gguf_tensors(run)
    writer = gguf.GGUFWriter(folder / GGUF_FILE, gguf.MODEL_ARCH_NAMES[_ARCHITECTURES[run.config.model.architecture]])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, rank)
    writer.add_name(f"{run.config.task.name} {run.method}")
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, run.config.model.name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(run: FinishedRun) -> tuple[dict[str, Tensor], int]:
    """Return the factors by llama.cpp's names, in its order of rows, and the alpha that goes with them."""
    architecture = run.config.model.architecture
    if run.config.model.family == "causal" and architecture not in _ARCHITECTURES:
        raise PartialLoraError(
            f"{run.directory}: model.architecture={architecture}: expected one of {', '.join(_ARCHITECTURES)} for --to"
            " gguf; export it with --to merged, which llama.cpp's own converter reads"
        )
    served = read(run, "gguf")
    rank = served.settings.r
    names = gguf.get_tensor_name_map(_ARCHITECTURES[architecture], served.model.num_hidden_layers)
    tensors = {}
    for module, (a, b) in served.factors.items():
        name = names.get_name(module)
        if name is None or not name.startswith("blk."):
            raise PartialLoraError(
                f"{run.directory}: {module} is adapted, and llama.cpp adds an adapter to layers of the blocks alone;"
                " export it with --to merged"
            )
        order = rows_of_llama(module, served.model) if architecture in ("llama", "mistral") else slice(None)
        tensors[f"{name}.weight.lora_a"] = a
        tensors[f"{name}.weight.lora_b"] = b[order] * (len(a) / rank)
    return tensors, rank


def rows_of_llama(module: str, model: PretrainedConfig) -> Tensor | slice:
    """Return, for each row of llama.cpp's layer, the row of ours: its Llama rotates neighbours, ours halves."""
    heads = {"q_proj": model.num_attention_heads, "k_proj": model.num_key_value_heads}.get(module.rpartition(".")[2])
    if heads is None:
        return slice(None)
    return torch.arange(heads * model.head_dim).view(heads, 2, model.head_dim // 2).mT.flatten()


def prove_gguf(run: FinishedRun, folder: Path) -> str:
    """Prove that gguf's own reader finds the run's factors and their scaling in the file, bit for bit."""
    expected, rank = gguf_tensors(run)
    path = folder / GGUF_FILE
    reader = gguf.GGUFReader(path)
    actual = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    count, alpha = prove_equal(path, expected, actual), reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents()
    if alpha != rank:
        raise ProofError(f"{path}: {gguf.Keys.Adapter.LORA_ALPHA} is {alpha:g}, expected {rank}, for a scaling of 1")
    changes = any(tensor.any() for name, tensor in expected.items() if name.endswith("lora_b"))
    effect = "" if changes else "; all B are zero: the adapter changes nothing, so that this check can tell nothing"
    return f"{count} tensors and alpha read back equal bit for bit{effect}"


def prove_equal(place: Path, expected: Mapping[str, Tensor], actual: Mapping[str, Tensor]) -> int:
    """Return the number of tensors; raise ProofError for one that is not the run's bit for bit, missing or too many."""
    for name in sorted(expected.keys() | actual.keys()):
        if name not in actual or name not in expected or not torch.equal(expected[name], actual[name]):
            raise ProofError(f"{place}: {name} is not that of the run")
    return len(actual)


# --- vLLM, SGLang and LoRAX: an ordinary adapter of one rank and one scaling, with all modules that they expect.

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values that vLLM's max_lora_rank may have, apart from 1
_FUSED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})  # SGLang stacks these, and expects all of a group
_OURS = {_WEIGHTS, _CONFIG, "partial_lora.json", "README.md"}  # files that an export does not copy as they are


def write_serve(run: FinishedRun, folder: Path) -> None:
    """Write a LoRA in bf16 (fp16 over an fp16 base model), the scaling in B, zeros where a server expects more.

    Units of the rank that add nothing are left out, and the rank is the next that servers have; each kind of module is
    there in every layer. Raises PartialLoraError, before it writes, where no such rank is large enough.
    """
    served = read(run, "serve")
    factors = {module: _without_empty_units(*both) for module, both in served.factors.items()}
    highest = max(len(a) for a, _ in factors.values())
    rank = next((size for size in _RANKS if size >= highest), None)
    if rank is None:
        raise PartialLoraError(f"{run.directory}: method.rank={highest}: expected at most {_RANKS[-1]} for --to serve")
    kinds = {module.rpartition(".")[2] for module in factors}
    kinds = kinds.union(*(group for group in _FUSED if group & kinds))
    dtype = torch.float16 if run.config.model.dtype == "float16" else torch.bfloat16
    tensors = {}
    for module, layer in served.linear.items():
        if module.rpartition(".")[2] not in kinds:
            continue
        none = torch.zeros(0, layer.in_features), torch.zeros(layer.out_features, 0)
        a, b = factors.get(module, none)
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = pad(a, (0, 0, 0, rank - len(a))).to(dtype)
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = pad(b, (0, rank - len(a))).to(dtype)
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(kinds),
        task_type="CAUSAL_LM",
        base_model_name_or_path=served.settings.base_model_name_or_path,
        inference_mode=True,
    ).save_pretrained(folder)
    for file in run.adapter.iterdir():
        if file.name not in _OURS:
            copy = shutil.copytree if file.is_dir() else shutil.copyfile  # a tokenizer's further templates are a folder
            copy(file, folder / file.name)


def _without_empty_units(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return A and B without the units of the rank whose row of A or column of B is zero."""
    units = a.any(dim=1) & b.any(dim=0)
    return a[units], b[:, units]
