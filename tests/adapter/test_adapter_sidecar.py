"""partial_lora.json: masks of every kind come back from it, and a wrong value is refused by file and key."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from adapter_models import KINDS, adapt, fill, layers, logits, trainable_parameters, vit
from peft import LoHaConfig, PeftModel, get_peft_model
from refusals import refusal

from partial_lora.adapter import PartialLoraConfig, module_masks, sidecar
from partial_lora.errors import PartialLoraError

COMBINATIONS = [
    *({"selection": selection} for selection in ("random", "scores", "indices")),
    *({"granularity": "element", "selection": selection} for selection in ("random", "scores", "indices")),
    {"granularity": "element", "selection": "random", "count": "bernoulli"},
]


def with_selection(name, selection, seed=0, **settings):
    """An adapter whose masks are drawn, or have the highest of random scores: by score or by index."""
    base = KINDS[name].build
    sparsity = {KINDS[name].targets[0]: {"rows": 0.7, "columns": 0.4}, ".*": 0.6}
    if selection == "random":
        return fill(adapt(base, sparsity=sparsity, mask_seed=3, **settings))
    draw = np.random.default_rng(seed)
    scores = {
        module: {axis: torch.tensor(draw.normal(size=getattr(masks, axis).size)) for axis in ("rows", "columns")}
        for module, masks in module_masks(adapt(base, sparsity=sparsity, **settings)).items()
    }
    model = fill(adapt(base, sparsity=sparsity, selection="top", scores=scores, **settings))
    if selection == "scores":
        return model
    return fill(adapt(base, selection="top", indices=kept_of(model), **settings))


def kept_of(model):
    return {
        module: {"rows": masks.rows.kept.tolist(), "columns": masks.columns.kept.tolist()}
        for module, masks in module_masks(model).items()
    }


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *(("wrapped_vit", settings) for settings in COMBINATIONS),
        *(("timm_convnext", settings) for settings in COMBINATIONS[2:5]),
        ("gpt2", COMBINATIONS[0]),
    ],
)
def test_masks_of_every_kind_come_back_from_the_file(tmp_path, name, settings):
    model = with_selection(name, **settings)
    model.save_pretrained(tmp_path / "one")
    sidecar = json.loads((tmp_path / "one" / "partial_lora.json").read_text())
    chosen = [entry.get("indices") for entry in sidecar["modules"].values()]
    assert chosen == ([None] * len(chosen) if settings["selection"] == "random" else list(kept_of(model).values()))
    assert "scores" not in (tmp_path / "one" / "adapter_config.json").read_text()

    config = PartialLoraConfig.from_pretrained(str(tmp_path / "one"))
    again = PeftModel.from_pretrained(KINDS[name].build(), str(tmp_path / "one"), config=config, is_trainable=True)
    assert module_masks(again) == module_masks(model)
    assert trainable_parameters(again) == trainable_parameters(model)
    batch = KINDS[name].batch(0)
    torch.testing.assert_close(logits(again, batch), logits(model, batch), atol=1e-5, rtol=1e-5)

    again.save_pretrained(tmp_path / "two")  # and once more, with nothing lost on the way
    assert json.loads((tmp_path / "two" / "partial_lora.json").read_text()) == sidecar


def test_a_large_sidecar_is_read_and_one_that_would_be_too_large_is_refused_before_training(tmp_path, monkeypatch):
    with_selection("wrapped_vit", "scores", granularity="element").save_pretrained(tmp_path)
    file = tmp_path / "partial_lora.json"
    assert " " not in file.read_text()
    with open(file, "a") as end:
        end.write(" " * 2**26)
    PartialLoraConfig.from_pretrained(str(tmp_path))
    monkeypatch.setattr(sidecar, "LARGEST", 1000)
    with refusal("selection='top'"):
        with_selection("wrapped_vit", "scores", granularity="element")


GIVEN = {
    "number": {"sparsity": 0.5},
    "patterns": {"sparsity": {"qkv": {"rows": 0.7, "columns": 0.4}, ".*": 0.6}},
    "plain": {"sparsity": 0.0},
    "bernoulli": {"sparsity": 0.7, "granularity": "element", "count": "bernoulli"},
    "frozen": {"sparsity": 0.7, "columns": "frozen", "fan_in": "kept", "mask_seed": 3},
    "units": {"sparsity": 0.7, "granularity": "units", "fan_in": "kept"},
    "groups": {"sparsity": 0.7, "granularity": "groups"},
    "patterns of PEFT": {"sparsity": 0.7, "alpha_pattern": {"qkv": 3}, "rank_pattern": {"fc1": 8}, "use_rslora": True},
}


@pytest.mark.parametrize("form", GIVEN)
def test_the_config_read_from_a_folder_is_the_one_it_was_made_with(tmp_path, form):
    model = adapt(**GIVEN[form])
    own = model.peft_config["default"]
    model.save_pretrained(tmp_path)
    first, second = (PartialLoraConfig.from_pretrained(str(tmp_path)) for _ in range(2))
    assert first == second
    assert first == replace(own, inference_mode=True, auto_mapping=first.auto_mapping)  # as PEFT saves any
    assert first.sparsity == own.sparsity
    again = PeftModel.from_pretrained(vit(), str(tmp_path), config=first)
    again.add_adapter("second", second)
    again.load_adapter(str(tmp_path), "second")
    assert again.peft_config["second"] == again.peft_config["default"]
    assert module_masks(again, "second") == module_masks(again) == module_masks(model)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, {"granularity": "rows_columns", "count": "exact", "fan_in": "kept", "row_exponent": 1.0}),
        ({"granularity": "element", "count": "bernoulli"}, {"granularity": "element", "count": "bernoulli"}),
    ],
)
def test_the_sidecar_says_what_the_masks_are_made_of(tmp_path, settings, said):
    model = with_selection("timm_convnext", "random", **settings)
    model.save_pretrained(tmp_path)
    sidecar = json.loads((tmp_path / "partial_lora.json").read_text())
    modules = sidecar.pop("modules")
    own, others = {"rows": 0.7, "columns": 0.4}, {"rows": 0.6, "columns": 0.6}
    assert sidecar == {
        "format": 1,
        "selection": "random",
        "mask_seed": 3,
        "rows": "masked",
        "columns": "masked",
        "fan_in": "dense",
        "row_exponent": 0.0,
        "column_exponent": 0.0,
        "r": 4,
        "rank_pattern": {},
        "alpha_pattern": {},
        "sparsity": {KINDS["timm_convnext"].targets[0]: own, ".*": others},
        **said,
    }
    masks = module_masks(model)
    assert modules.keys() == masks.keys()
    name = "stages.1.downsample.1"
    rows, columns = masks[name].rows, masks[name].columns
    measured = {"rows": rows.sparsity, "columns": columns.sparsity}
    assert modules[name] == {
        **(others if settings else measured),  # as requested where the number kept is random
        "shape": [16, 8],
        **({"a": [4, 8, 2, 2], "b": [16, 4, 1, 1]} if settings else {}),
        "sha256": {"rows": rows.digest, "columns": columns.digest},
    }


QKV = "timm_model.blocks.0.attn.qkv"
FC2 = "timm_model.blocks.0.mlp.fc2"
GONE = object()


def change(folder, alter):
    path = folder / "partial_lora.json"
    sidecar = json.loads(path.read_text())
    alter(sidecar)
    path.write_text(json.dumps(sidecar))


def setting(*keys_and_value):
    """A change of the sidecar: the value at the given keys, of QKV where the first is none of the whole file."""
    *keys, last, value = keys_and_value

    def alter(sidecar):
        own = keys_and_value[0] in ("rows", "columns", "shape", "a", "b", "sha256", "indices", "more")
        at = sidecar["modules"][QKV] if own else sidecar
        for key in keys:
            at = at[key]
        if value is GONE:
            del at[last]
        else:
            at[last] = value

    return alter


def moved(sidecar):
    """As many other indices."""
    kept = sidecar["modules"][QKV]["indices"]["rows"]
    free = next(index for index in range(len(kept) + 1) if index not in kept)
    kept[:] = sorted([free, *kept[1:]])


BROKEN = [
    *(("random", setting(key, GONE), key) for key in ("granularity", "selection", "mask_seed", "modules", "rows")),
    ("random", setting("format", 2), "format 2"),
    ("random", setting("format", GONE), "version 0.20 reads it"),
    ("random", setting("extra", 1), "extra"),
    ("random", setting("granularity", "rows"), "granularity"),
    ("random", setting("granularity", "element"), f"{QKV}.* a"),
    ("random", setting("selection", "top"), f"{QKV}.* indices"),
    ("random", setting("mask_seed", "0"), "mask_seed"),
    *(("random", setting("sparsity", value), "sparsity") for value in (1.0, "calibration.json", {})),
    ("random", setting("fan_in", "some"), "fan_in"),
    ("random", setting("count", "bernoulli"), "count"),
    ("random", setting("modules", []), ""),
    ("random", lambda s: s["modules"].update({QKV: [1]}), ""),
    ("random", setting("rows", GONE), f"{QKV}.* rows"),
    ("random", setting("more", 1), f"{QKV}.* more"),
    ("random", setting("sha256", "abc"), ""),
    ("random", setting("sha256", "rows", GONE), f"{QKV}.*sha256.* rows"),
    ("scores", setting("indices", GONE), f"{QKV}.* indices"),
    ("scores", setting("indices", "rows", GONE), f"indices.*{QKV}"),
    ("scores", setting("indices", "rows", ["a"]), f"indices.*{QKV}.*rows"),
    ("scores", setting("selection", "random"), f"{QKV}.* indices"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One folder for each granularity and selection."""
    folders = {}
    for granularity, selection in (("rows_columns", "random"), ("rows_columns", "scores"), ("element", "random")):
        folders[granularity, selection] = tmp_path_factory.mktemp("saved")
        model = with_selection("wrapped_vit", selection, granularity=granularity)
        model.save_pretrained(folders[granularity, selection])
    return folders


@pytest.mark.parametrize(("selection", "alter", "key"), BROKEN)
def test_a_sidecar_with_a_wrong_value_is_refused_by_file_and_key(tmp_path, saved, selection, alter, key):
    shutil.copytree(saved["rows_columns", selection], tmp_path, dirs_exist_ok=True)
    change(tmp_path, alter)
    with refusal(rf"{tmp_path}/partial_lora\.json:? .*{key}"):
        PartialLoraConfig.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "[" * 100_000, b"\xff\xfe", '{"format": 1}', "NaN", '{"format": 1, "gran', None],
)
def test_a_file_that_is_no_sidecar_is_refused(tmp_path, saved, content):
    shutil.copytree(saved["rows_columns", "random"], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "partial_lora.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with refusal(r".*partial_lora\.json"):
        PartialLoraConfig.from_pretrained(str(tmp_path))


def matching(kept):
    return rf"{QKV}: .*{kept} .*partial_lora\.json"


@pytest.mark.parametrize(
    ("granularity", "selection", "alter", "message"),
    [
        ("rows_columns", "random", setting("mask_seed", 1), "rows .*mask_seed"),
        ("element", "random", setting("mask_seed", 1), "rows .*mask_seed"),
        ("element", "random", setting("count", "bernoulli"), r"rows .*partial_lora\.json"),
        *(
            ("rows_columns", "random", setting("sparsity", share), r"sparsity .*trained with")
            for share in (0.25, {".*": 0.25})
        ),
        ("rows_columns", "random", setting("sha256", "columns", 5), matching("columns")),
        ("rows_columns", "random", setting("shape", [96, 33]), rf"{QKV}.*\[96, 32\].*\[96, 33\]"),
        ("rows_columns", "random", setting("shape", 96), rf"{QKV}.*\[96, 32\].*96"),
        ("element", "random", setting("a", [2, 32]), rf"{QKV}.* A .*\[4, 32\].*\[2, 32\]"),
        ("element", "random", setting("b", [96, 2]), rf"{QKV}.* B .*\[96, 4\].*\[96, 2\]"),
        *(
            ("rows_columns", "scores", setting("indices", "rows", kept), rf"^indices.*{QKV}.*rows")
            for kept in ([], [2, 1], [-1, 1], [0, 10**6])
        ),
        ("rows_columns", "scores", moved, matching("rows")),
        ("rows_columns", "random", lambda s: s["modules"].pop(FC2), f"{FC2} "),
        (
            "rows_columns",
            "random",
            lambda s: s["modules"].update(more=s["modules"][FC2]),
            r"adapter_model\.safetensors .*lora_A of more",
        ),
    ],
)
def test_a_sidecar_that_does_not_match_the_model_is_refused(tmp_path, saved, granularity, selection, alter, message):
    shutil.copytree(saved[granularity, selection], tmp_path, dirs_exist_ok=True)
    change(tmp_path, alter)
    model = vit()
    with pytest.raises(PartialLoraError, match=message):
        PeftModel.from_pretrained(model, str(tmp_path), config=PartialLoraConfig.from_pretrained(str(tmp_path)))
    assert not layers(model)


@pytest.mark.parametrize(("option", "value", "message"), [("mask_seed", 4, "digest"), ("r", 5, r"A .*\[5, 32\]")])
def test_masks_other_than_the_saved_ones_are_refused_however_they_came_about(saved, option, value, message):
    config = PartialLoraConfig.from_pretrained(str(saved["element", "random"]))
    setattr(config, option, value)
    with pytest.raises(PartialLoraError, match=message):
        get_peft_model(vit(), config)


def test_a_folder_of_another_method_is_refused(tmp_path):
    get_peft_model(vit(), LoHaConfig(r=2, target_modules=["qkv"])).save_pretrained(tmp_path)
    with refusal(r".*partial_lora\.json", "PeftModel.from_pretrained"):
        PartialLoraConfig.from_pretrained(str(tmp_path))
