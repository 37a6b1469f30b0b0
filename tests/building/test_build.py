"""What groups of settings stand for: models whose head trains in float32, draws by shots or by share."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace

import datasets
import PIL.Image
import pytest
import torch
from configured import inputs, settings
from refusals import refusal
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from partial_lora import methods
from partial_lora.building import build
from partial_lora.calibration.config import CalibrationConfig
from partial_lora.launching import paths
from partial_lora.methods.config import MaskConfig, MethodConfig
from partial_lora.methods.setting import Setting
from partial_lora.models import longest_text
from partial_lora.models.config import ModelConfig
from partial_lora.models.targets import target_linears
from partial_lora.settings import compatibility, compose
from partial_lora.settings.schema import Config
from partial_lora.tasks.config import TaskConfig


def model_of(name: str, **changes: object):
    return build.model_of(ModelConfig(**settings(name, **changes)), ["a", "b"])


@pytest.mark.parametrize(("model", "task"), [("tiny_vit", "text"), ("tiny_bert", "image")])
def test_a_model_that_cannot_read_the_task_is_refused_by_both_names(model: str, task: str) -> None:
    with refusal(f"model={model} ", "task=mine ", task):
        compatibility.check_modality(ModelConfig(**settings(model)), TaskConfig("mine", modality=task))


@pytest.mark.parametrize(
    ("name", "changes", "key"),
    [
        ("tiny_bert", {"max_length": 129}, ".*max_length=129"),  # it has positions for 128 tokens
        ("tiny_vit", {"head": "timm_model.norm"}, r"model\.head=timm_model\.norm"),
        ("tiny_vit", {"new_modules": ["pool"]}, r"model\.new_modules"),
    ],
)
def test_a_model_without_positions_or_modules_for_its_settings_is_refused(name: str, changes: dict, key: str) -> None:
    model_of(name)
    with refusal(key):
        model_of(name, **changes)


def test_relative_positions_have_no_longest_text() -> None:
    tokens = torch.randint(3, 250, (1, 256))
    assert model_of("tiny_deberta", max_length=1280)(input_ids=tokens).logits.shape == (1, 2)


BLOCKS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 12}
GPT = {"n_embd": 16, "n_layer": 1, "n_head": 4, "n_positions": 12, "rotary_dim": 4}
WITH_TABLES = {  # by type: keys of its config, and how its positions are kept
    "opt": BLOCKS | {"ffn_dim": 24, "word_embed_proj_dim": 16},  # after an offset
    "biogpt": BLOCKS | {"intermediate_size": 24},
    "roberta": BLOCKS | {"intermediate_size": 24, "is_decoder": True, "pad_token_id": 1},  # after the padding's
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "openai-gpt": GPT,
    "gptj": GPT,  # sines, in a tensor
    "ctrl": GPT | {"dff": 16},
}


@functools.cache
def causal(name: str) -> nn.Module:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, vocab_size=50, **WITH_TABLES[name])).eval()


@pytest.mark.parametrize("name", WITH_TABLES)
@torch.no_grad()
def test_a_model_reads_as_many_tokens_as_its_table_of_positions_has_room_for(name: str) -> None:
    model = causal(name)
    tokens = torch.full((1, longest_text(model) + 1), 5)
    inputs = {"attention_mask": torch.ones_like(tokens)}
    model(tokens[:, 1:], attention_mask=inputs["attention_mask"][:, 1:])
    with pytest.raises((IndexError, RuntimeError)):
        model(tokens, **inputs)


@pytest.mark.parametrize("is_mixture", [False, True])
def test_a_task_whose_texts_a_model_has_no_positions_for_is_refused(is_mixture: bool) -> None:
    chosen, task = TaskConfig("one", max_new_tokens=13), SimpleNamespace(name="one", metrics=("rouge_l",))
    loaded = SimpleNamespace(members=[task]) if is_mixture else task
    config = SimpleNamespace(task=SimpleNamespace(members={"one": chosen}) if is_mixture else chosen)
    with refusal(r"task\.max_new_tokens=13: "):
        build.check_room(config.task, loaded, causal("gpt2"))
    task.metrics = ("perplexity",)  # of no texts
    build.check_room(config.task, loaded, causal("gpt2"))


@pytest.mark.parametrize(
    ("modality", "share", "drawn"),
    [
        ("image", 0.03, {"shots": 4, "max_samples": 9}),
        ("text", 0.03, {"share": 0.03, "max_samples": 9}),
        ("text", 0.0, {"shots": 4, "max_samples": 9}),
    ],
)
def test_texts_are_drawn_by_share_unless_that_is_nothing(modality: str, share: float, drawn: dict) -> None:
    calibration = CalibrationConfig(shots=4, share=share, max_samples=9)
    assert build.draw_settings(Config(calibration=calibration, task=TaskConfig(modality=modality))) == drawn


@pytest.mark.parametrize(("name", "dtype"), [("tiny_deberta", torch.bfloat16), ("tiny_vit", torch.float16)])
def test_what_trains_is_in_float32_whatever_the_frozen_weights_are(name: str, dtype: torch.dtype) -> None:
    chosen = ModelConfig(**settings(name, dtype=str(dtype).removeprefix("torch.")))
    model = build.model_of(chosen, ["a", "b"])
    frozen = target_linears(model, **chosen.trained_modules)
    assert {module.weight.dtype for module in frozen.values()} == {dtype}
    chosen_method = MethodConfig(name="lora", rank=2, alpha=2.0)
    setting = Setting(chosen_method, MaskConfig(), mask_seed=0, **chosen.trained_modules)
    adapted = methods.METHODS["lora"](model, setting)
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs(name).items()}
    adapted(**batch).logits.sum().backward()
    trained = [value for value in adapted.parameters() if value.requires_grad]
    assert {value.dtype for value in trained} == {value.grad.dtype for value in trained} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "pixels", "warned"),
    [
        ("vit_b16", 32, True),
        ("vit_b16", 65, False),
        ("convnext_tiny", 64, True),
        ("vit_s14", 8, False),  # 98 pixels
        ("tiny_vit", 8, False),
    ],
)
def test_small_images_that_are_made_much_larger_are_said(name: str, pixels: int, warned: bool) -> None:
    images = [PIL.Image.new("RGB", (pixels, 5))] * 3
    rows = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
    chosen = settings(name)
    chosen["image_size"] = chosen["image_size"] or 98
    found = build._enlarged(ModelConfig(**chosen), SimpleNamespace(modality="image", train=rows))
    assert [line.partition("=")[0] for line in found] == ["model.image_size"] * warned


def test_a_training_says_which_files_of_a_folder_are_no_images(tmp_path: Path) -> None:
    for label in ("dog", "cat"):
        (tmp_path / label).mkdir()
        for number in range(9):
            PIL.Image.new("RGB", (8, 8), (25 * number, len(label), 0)).save(tmp_path / label / f"{number}.png")
    (tmp_path / "dog" / "9.heic").write_text("an image that Pillow does not read")
    config = compose.composed("model=tiny_vit", "task=image_folder", f"task.data_files='{tmp_path}'")
    said = build.warnings_of(config, build.task_of(config))
    assert [line for line in said if line.startswith("task.data_files=") and "dog/9.heic" in line]


def test_a_setting_has_the_shrunk_shares_of_a_calibration_at_its_size() -> None:
    shapes, sparsity = (
        {"a": (40, 30), "b": (50, 20)},
        {"a": {"rows": 0.9, "columns": 0.5}, "b": {"rows": 0.8, "columns": 0.9}},
    )
    plain, half = (
        build.setting_of(compose.composed("model=tiny_vit", f"calibration.shrink={shrink}"), shapes, sparsity)
        for shrink in (0, 0.5)
    )
    assert plain.sparsity == sparsity
    kept = half.counts()
    assert abs(sum(kept.values()) - sum(plain.counts().values())) < 2 * half.rank
    assert half.sparsity["a"]["rows"] < 0.9 < 0.5 + half.sparsity["a"]["columns"]
    for settings_of_it in ("calibration.sparsity=0.5", "calibration=fixed"):
        with refusal("calibration.shrink"):
            compose.composed("model=tiny_vit", settings_of_it, "calibration.shrink=0.5")


def test_seeds_have_training_rows_of_their_own_and_the_same_test_rows_where_the_split_follows_them() -> None:
    def rows(*words: str) -> tuple[list, list]:
        chosen = compose.composed(
            "model=tiny_vit", "task=digits", "task.train_samples=300", "task.test_share=0.5", *words
        )
        task = build.task_of(chosen)
        assert (len(task.train) + len(task.validation), len(task.test)) == (300, 899)
        return [list(task.train["label"]), list(task.test["label"])], task.train[0]["image"].tobytes()

    own = [rows("task.split_seed=null", f"seed={seed}") for seed in (0, 3)]
    assert own[0][0][1] == own[1][0][1]  # labels of the test rows, in order
    assert own[0][1] != own[1][1]
    assert rows("task.split_seed=0", "seed=3") == own[0]
    first, second = (compose.composed("task.split_seed=null", f"seed={seed}") for seed in (0, 3))
    assert paths.run_directory(first).parent == paths.run_directory(second).parent
