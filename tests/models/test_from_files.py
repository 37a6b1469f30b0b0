"""A model is what its own files say: architecture, geometry, precision, inputs, head and targets, whatever its type."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from peft import LoraConfig, get_peft_model
from PIL import Image
from refusals import refusal

from partial_lora import models
from partial_lora.building import build
from partial_lora.errors import PartialLoraError
from partial_lora.models import fetch, from_files
from partial_lora.models.config import ModelConfig
from partial_lora.models.from_files import settings_of
from partial_lora.models.skeleton import ALL_LINEAR, skeleton_of
from partial_lora.settings.compose import composed, plan
from partial_lora.tasks.config import TaskConfig

WIDE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {**WIDE, "vocab_size": 40, "max_position_embeddings": 32, "pad_token_id": 0}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
CAUSAL = {**TEXT, **ENDS, "num_key_value_heads": 1, "head_dim": 8}
MAMBA = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, **ENDS}
IMAGE = {**WIDE, "image_size": 16, "patch_size": 8}
STAGES = {"image_size": 32, "num_labels": 3}
SAVED = {  # {class: the keys of its config}
    "BertForSequenceClassification": TEXT,
    "BertForMaskedLM": TEXT,
    "BertForTokenClassification": TEXT,
    "RobertaForMaskedLM": TEXT,
    "ElectraForSequenceClassification": TEXT | {"embedding_size": 8},
    "DebertaV2ForSequenceClassification": TEXT | {"relative_attention": True, "position_buckets": 4},
    "DistilBertForMaskedLM": {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    "AlbertForMaskedLM": TEXT | {"embedding_size": 8},
    "ModernBertForMaskedLM": TEXT | ENDS | {"cls_token_id": 1, "sep_token_id": 2},
    "LlamaForCausalLM": CAUSAL,
    "Qwen2ForCausalLM": CAUSAL,
    "Gemma4ForCausalLM": CAUSAL
    | {"vocab_size_per_layer_input": 40, "hidden_size_per_layer_input": 4, "global_head_dim": 16},
    "GPTNeoXForCausalLM": TEXT | ENDS,
    "MambaForCausalLM": MAMBA,
    "Mamba2ForCausalLM": MAMBA | {"num_heads": 4, "head_dim": 8, "n_groups": 1},
    "OPTForCausalLM": TEXT | ENDS | {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "BloomForCausalLM": {"vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 2, **ENDS},
    "ViTForImageClassification": IMAGE,
    "ViTModel": IMAGE,
    "DeiTForImageClassification": IMAGE,
    "BeitForImageClassification": IMAGE,
    "Dinov2ForImageClassification": IMAGE,
    "SwinForImageClassification": STAGES
    | {"patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
    "ConvNextForImageClassification": STAGES | {"depths": [1, 1], "hidden_sizes": [8, 16], "num_stages": 2},
}


def saved(folder: Path, name: str, keys: dict, dtype: torch.dtype = torch.float32) -> Path:
    """A folder with a model of random weights."""
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    kind(kind.config_class(**keys)).to(dtype).save_pretrained(folder)
    return folder


def loaded(folder: Path, settings: dict, labels: list[str]) -> transformers.PreTrainedModel:
    return models.load(ModelConfig(**settings | {"name": "own", "weights": str(folder)}), labels)


@pytest.mark.parametrize("name", SAVED)
def test_a_folder_loads_and_computes_by_its_config_alone(tmp_path: Path, name: str) -> None:
    settings = settings_of("own", str(saved(tmp_path, name, SAVED[name])))
    labels = ["a", "b", "c", "d"]
    model = loaded(tmp_path, settings, labels)
    counted = models.empty(
        **{key: settings[key] for key in ("family", "architecture", "model_args")}, num_labels=len(labels)
    )
    assert skeleton_of(counted).parameters == skeleton_of(model).parameters
    assert skeleton_of(model).targets(settings["target_modules"], settings["head"], settings["new_modules"])
    inputs = {"input_ids": torch.tensor([[3, 4, 5, 6]])}
    if settings["family"] == "image":
        inputs = {"pixel_values": torch.zeros(1, 3, settings["image_size"], settings["image_size"])}
    with torch.no_grad():
        logits = model(**inputs).logits
    if settings["family"] == "causal":
        assert (settings["head"], logits.shape) == (None, (1, 4, 40))
    else:
        assert logits.shape == (1, 4)
        assert models.head_name(model, settings["family"]) == settings["head"]
    trained = getattr(transformers, name).from_pretrained(tmp_path).state_dict()
    new = tuple(f"{module}." for module in (settings["head"], *settings["new_modules"]) if module)
    for key, value in model.state_dict().items():
        if not key.startswith(new):
            own = key if key in trained else key.removeprefix(f"{model.base_model_prefix}.")
            assert torch.equal(value, trained[own])


OF_HEADS = {  # by the class that tells heads apart: the task's kind
    "AutoModelForSequenceClassification": "label",
    "AutoModelForTokenClassification": "label",  # the head is replaced by one for whole texts
    "AutoModelForCausalLM": "generation",
    "AutoModelForImageClassification": None,
}
FEW = {"num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2}
FEW |= {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 8, "moe_num_experts": 4}


@pytest.mark.skipif("PARTIAL_LORA_TEST_TYPES" not in os.environ, reason="several minutes: make test-all")
@pytest.mark.parametrize("auto", OF_HEADS)
def test_every_type_of_transformers_is_read_or_refused(tmp_path: Path, auto: str) -> None:
    read = set()
    for config_class, classes in getattr(transformers, auto)._model_mapping.items():
        kind = classes[0] if isinstance(classes, tuple) else classes
        try:
            config = config_class()
            config = config_class(
                **{key: few for key, few in FEW.items() if isinstance(getattr(config, key, 0.0), int)}
            )
            with torch.device("meta"):
                kind(config)
        except Exception:  # of types whose own defaults build nothing, or that need packages that are not here
            continue
        config.architectures = [kind.__name__]
        config.save_pretrained(folder := tmp_path / config_class.__name__)
        with suppress(PartialLoraError):
            read.add(settings_of("own", str(folder), OF_HEADS[auto])["architecture"])
    assert len(read) > 20


def test_what_is_adapted_is_as_in_peft_or_every_linear_layer(tmp_path: Path) -> None:
    targets = {
        name: settings_of("own", str(saved(tmp_path / name, name, SAVED[name])))["target_modules"]
        for name in ("Qwen2ForCausalLM", "DeiTForImageClassification")
    }
    assert targets == {"Qwen2ForCausalLM": ["q_proj", "v_proj"], "DeiTForImageClassification": [ALL_LINEAR]}


@pytest.mark.parametrize("name", ["MambaForCausalLM", "Mamba2ForCausalLM"])
def test_what_is_adapted_in_mamba_is_what_peft_takes_there_and_a_record_can_hold_it(tmp_path: Path, name: str) -> None:
    settings = settings_of("own", str(saved(tmp_path, name, SAVED[name])))
    adapted = get_peft_model(loaded(tmp_path, settings, []), LoraConfig(target_modules=settings["target_modules"]))
    assert any("lora_B" in key for key in adapted.state_dict())
    json.dumps(settings, allow_nan=False)


def test_parts_without_trained_weights_train_whole(tmp_path: Path) -> None:
    new = {
        name: (settings["head"], settings["new_modules"])
        for name in ("RobertaForMaskedLM", "DistilBertForMaskedLM", "DebertaV2ForSequenceClassification")
        for settings in [settings_of("own", str(saved(tmp_path / name, name, SAVED[name])))]
    }
    assert new == {
        "RobertaForMaskedLM": ("classifier.out_proj", ["classifier.dense"]),
        "DistilBertForMaskedLM": ("classifier", ["pre_classifier"]),
        "DebertaV2ForSequenceClassification": ("classifier", ["pooler"]),
    }


def test_a_language_model_tells_labels_where_the_task_has_them(tmp_path: Path) -> None:
    keys = SAVED["Qwen2ForCausalLM"] | {"pad_token_id": None}
    settings = settings_of("own", str(saved(tmp_path, "Qwen2ForCausalLM", keys, dtype=torch.bfloat16)), "label")
    assert (settings["family"], settings["head"], settings["dtype"]) == ("encoder", "score", "bfloat16")
    padded = loaded(tmp_path, settings, ["a", "b"])(input_ids=torch.tensor([[3, 4, 2, 2], [3, 4, 5, 6]]))
    assert padded.logits.shape == (2, 2)


PLAIN = {"do_normalize": False}
MOBILE = {"hidden_sizes": [8, 8, 8], "neck_hidden_sizes": [4, 4, 4, 4, 4, 4, 4], "num_attention_heads": 1}
PROCESSORS = {  # {what it does: (class of the model, its config, the processor's file)}
    "one colour scale": (
        "ViTForImageClassification",
        IMAGE,
        {"size": {"height": 16, "width": 16}, "image_mean": [0.1] * 3, "image_std": [0.2] * 3, "resample": 2},
    ),
    "defaults": ("ViTForImageClassification", IMAGE, {"feature_extractor_type": "ViTFeatureExtractor", "size": 16}),
    "no scale": ("ViTForImageClassification", IMAGE, {"size": {"height": 16, "width": 16}, **PLAIN}),
    "no scale at all": ("ViTForImageClassification", IMAGE, {"size": 16, "do_rescale": False, **PLAIN}),
    "flipped": (
        "MobileViTForImageClassification",
        {"image_size": 64, **MOBILE},
        {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}},
    ),
    "scaled twice": (
        "EfficientNetForImageClassification",
        {"image_size": 32, "width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 64},
        {"size": {"height": 32, "width": 32}, "image_std": [0.47853944, 0.4732864, 0.47434163]},
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_images_enter_as_the_image_processor_makes_them(tmp_path: Path, name: str) -> None:
    kind, keys, file = PROCESSORS[name]
    config = getattr(transformers, kind).config_class(**keys)
    config.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(file))
    found = from_files._images(config, tmp_path, "own")
    model = ModelConfig("own", "image", "own", "own", target_modules=["all-linear"], head="classifier", **found)
    side = found["image_size"]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))
    transform = build.transform_of(model, TaskConfig(name="own", path="files"))

    def processed() -> torch.Tensor:
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
        return torch.as_tensor(np.asarray(processor([image]).pixel_values)).float()

    expected = processed()
    torch.testing.assert_close(transform.encode([image])["pixel_values"], expected, rtol=1e-3, atol=1e-5)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(build._processor(model)))  # as a saved model has it
    torch.testing.assert_close(processed(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("processor", ["Nothing", "Siglip2ImageProcessor"])
def test_an_image_processor_that_is_unknown_or_gives_no_image_is_refused(tmp_path: Path, processor: str) -> None:
    saved(tmp_path, "ViTForImageClassification", IMAGE)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": processor}))
    with refusal("model=.*processor", tmp_path):
        settings_of("own", str(tmp_path))


def test_an_image_of_a_size_that_the_model_does_not_take_is_refused(tmp_path: Path) -> None:
    settings = settings_of("own", str(saved(tmp_path, "ViTForImageClassification", IMAGE)))
    with refusal("model.image_size=24", "own"):
        loaded(tmp_path, settings | {"image_size": 24}, ["a", "b"])


def test_a_folder_of_timm_is_read_too(tmp_path: Path) -> None:
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, **size)
    timm.models.save_for_hf(model, str(tmp_path), model_args=size, safe_serialization=True)
    settings = settings_of("own", str(tmp_path))
    assert (settings["family"], settings["head"], settings["image_size"]) == ("timm", "timm_model.head", 32)
    found = loaded(tmp_path, settings, ["a", "b"])
    assert torch.equal(found.timm_model.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


def _changed(change: dict) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))

    return apply


@pytest.mark.parametrize(
    ("name", "change", "names"),
    [
        ("BertForMaskedLM", _changed({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}), ["auto_map"]),
        ("BertForMaskedLM", _changed({"model_type": "own"}), ["model_type"]),
        ("BertForMaskedLM", _changed({"quantization_config": {"quant_method": "gptq"}}), ["quantization_config"]),
        ("BertForMaskedLM", lambda folder: (folder / "config.json").unlink(), ["config.json"]),
        ("BertForMaskedLM", lambda folder: (folder / "config.json").write_text("{"), ["config.json"]),
        ("GPT2LMHeadModel", lambda folder: None, ["GPT2LMHeadModel"]),  # its layers are no nn.Linear
        ("CLIPTextModel", lambda folder: None, ["clip_text_model"]),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, name: str, change: Callable, names: list[str]) -> None:
    keys = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40} if name == "GPT2LMHeadModel" else TEXT
    change(saved(tmp_path, name, keys))
    with refusal("model=", tmp_path, *names):
        settings_of("own", str(tmp_path))


def test_a_masked_model_writes_no_texts(tmp_path: Path) -> None:
    with refusal("model=.*take another model", "task.kind=generation"):
        settings_of("own", str(saved(tmp_path, "BertForMaskedLM", TEXT)), "generation")


# The command line


def test_a_folder_is_a_model_whose_keys_can_be_set(tmp_path: Path) -> None:
    folder = saved(tmp_path / "my model", "BertForMaskedLM", TEXT, dtype=torch.bfloat16)
    given = ("task=text_table", "task.data_files=README.md")
    model = composed(f"model={folder}", *given).model
    assert (model.name, model.weights, model.dtype, model.max_length) == ("my_model", str(folder), "bfloat16", 32)
    model = composed(f"model={folder}", *given, "model.dtype=float32", "model.target_modules=[query]").model
    assert (model.dtype, model.target_modules, model.head) == ("float32", ["query"], "classifier")
    file = tmp_path / "own.yaml"
    file.write_text(f"model: {folder}\ntask: text_table\ntask.data_files: README.md\n")
    assert composed(str(file)).model.architecture == "bert"


def test_folders_are_swept_over_beside_names(tmp_path: Path) -> None:
    folders = [saved(tmp_path / name / "vit", "ViTForImageClassification", IMAGE) for name in ("a", "b")]
    runs = plan(["-m", f"model={folders[0]},tiny_vit,{folders[1]}"]).runs
    assert [config.model.weights for _, config in runs] == [str(folders[0]), "random", str(folders[1])]


def test_an_id_of_the_hub_is_pinned_or_refused_with_a_model_that_needs_none(tmp_path: Path, monkeypatch) -> None:
    snapshot = saved(tmp_path / "snapshots" / "0a1b", "BertForMaskedLM", TEXT)
    monkeypatch.setattr(fetch, "_download", lambda repo, *others: snapshot)
    model = composed("model=own/bert@main", "task=text_table", "task.data_files=README.md").model
    assert (model.name, model.weights) == ("bert", "own/bert@0a1b")
    monkeypatch.undo()
    monkeypatch.setattr(fetch, "_connection_error", lambda repo: OSError("no network"))
    for kind, instead in {"generation": "smollm2_135m", "label": "minilm_l6", None: "vit_s14"}.items():
        with refusal("model=", "own/other", instead):
            settings_of("other", "own/other", kind)


def test_a_repository_that_conf_model_names_is_that_model_and_needs_no_hub() -> None:
    assert composed("model=Qwen/Qwen2.5-0.5B", "task=text_generation") == composed(
        "model=qwen2_5_0_5b", "task=text_generation"
    )


@pytest.mark.parametrize("folder", ["./nowhere", "../nowhere", "/nowhere", "~/nowhere"])
def test_a_folder_that_is_not_there_is_no_name_of_a_model(folder: str) -> None:
    with refusal(f"model={folder}: "):
        composed(f"model={folder}")
