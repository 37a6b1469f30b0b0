"""partial_lora.json: masks of every kind come back from it, and a wrong value is refused by file and key."""

from __future__ import annotations

import json
import shutil
from itertools import product

import numpy as np
import pytest
import torch
from adapter_models import KINDS, MIXED, adapt, fill, layers, logits, vit
from peft import LoHaConfig, PeftModel, get_peft_model

from partial_lora.adapter import PartialLoraConfig, module_masks, trainable_parameters
from partial_lora.errors import PartialLoraError


def test_the_sidecar_says_what_the_masks_are_made_of(tmp_path):
    model = adapt(sparsity=MIXED)
    model.save_pretrained(tmp_path)
    sidecar = json.loads((tmp_path / "partial_lora.json").read_text())
    modules = sidecar.pop("modules")
    assert sidecar == {"version": 1, "granularity": "rows_columns", "selection": "random", "mask_seed": 0}
    masks = module_masks(model)
    assert modules.keys() == masks.keys()
    name = "timm_model.blocks.0.attn.qkv"
    assert modules[name] == {
        "rows": masks[name].rows.sparsity,
        "columns": masks[name].columns.sparsity,
        "shape": [96, 32],
        "sha256": {"rows": masks[name].rows.digest, "columns": masks[name].columns.digest},
    }


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


@pytest.mark.parametrize("settings", COMBINATIONS)
@pytest.mark.parametrize("name", ["wrapped_vit", "gpt2", "timm_convnext"])
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
    assert torch.equal(logits(again, batch), logits(model, batch))

    again.save_pretrained(tmp_path / "two")  # and once more, with nothing lost on the way
    for file in ("partial_lora.json", "adapter_config.json"):
        one, two = (json.loads((tmp_path / folder / file).read_text()) for folder in ("one", "two"))
        for content in (one, two):
            content["target_modules"] = sorted(content.get("target_modules", ()))  # PEFT's set, in any order
        assert one == two
    masked = PartialLoraConfig.from_pretrained(str(tmp_path / "two"))
    assert module_masks(get_peft_model(KINDS[name].build(), masked)) == module_masks(model)


def test_the_sidecar_says_what_masks_of_single_entries_are_made_of(tmp_path):
    model = with_selection("timm_convnext", "random", granularity="element", count="bernoulli")
    model.save_pretrained(tmp_path)
    sidecar = json.loads((tmp_path / "partial_lora.json").read_text())
    modules = sidecar.pop("modules")
    assert sidecar == {
        "version": 1,
        "granularity": "element",
        "selection": "random",
        "mask_seed": 3,
        "count": "bernoulli",
    }
    masks = module_masks(model)
    assert modules.keys() == masks.keys()
    assert modules["stages.1.downsample.1"] == {
        "rows": 0.6,  # as asked for: the number kept is random
        "columns": 0.6,
        "shape": [16, 8],
        "a": [4, 8, 2, 2],
        "b": [16, 4, 1, 1],
        "sha256": {axis: getattr(masks["stages.1.downsample.1"], axis).digest for axis in ("rows", "columns")},
    }


def change(folder, alter):
    path = folder / "partial_lora.json"
    sidecar = json.loads(path.read_text())
    alter(sidecar)
    path.write_text(json.dumps(sidecar))


QKV = "timm_model.blocks.0.attn.qkv"
FC2 = "timm_model.blocks.1.mlp.fc2"
HERE = r"modules\['timm_model\.blocks\.0\.attn\.qkv'\]"


def setting(*keys_and_value):
    """A change of the sidecar: the value at the given keys, of QKV where the first is none of the whole file."""
    *keys, last, value = keys_and_value

    def alter(sidecar):
        at = sidecar["modules"][QKV] if keys_and_value[0] in ENTRY else sidecar
        for key in keys:
            at = at[key]
        if value is GONE:
            del at[last]
        else:
            at[last] = value

    return alter


ENTRY = ("rows", "columns", "shape", "a", "b", "sha256", "indices", "more")
GONE = object()
ANYWHERE = [
    (setting("granularity", GONE), "granularity is missing"),
    (setting("selection", GONE), "selection is missing"),
    (setting("mask_seed", GONE), "mask_seed is missing"),
    (setting("modules", GONE), "modules is missing"),
    (setting("version", GONE), "version is missing"),
    (setting("version", "1"), "version is '1', expected 1"),
    (setting("extra", 1), "extra is unknown, expected version, granularity"),
    (setting("granularity", "rows"), "granularity is 'rows', expected 'rows_columns' or 'element'"),
    (setting("selection", None), "selection is None, expected 'random' or 'top'"),
    (setting("mask_seed", "0"), "mask_seed is '0', expected a whole number"),
    (setting("mask_seed", True), "mask_seed is True, expected a whole number"),
    (setting("modules", {}), "modules is {}, expected an object with an entry for each module"),
    (setting("modules", []), r"modules is \[\], expected an object"),
    (lambda s: s["modules"].update({QKV: [1]}), rf"{HERE} is \[1\], expected an object with rows, columns"),
    (setting("rows", GONE), f"rows in {HERE} is missing"),
    (setting("more", 1), f"more in {HERE} is unknown"),
    (setting("rows", 1.0), rf"{HERE}\['rows'\] is 1.0, expected a sparsity in \[0, 1\)"),
    (setting("rows", -0.1), rf"{HERE}\['rows'\] is -0.1, expected a sparsity"),
    (setting("columns", "0.5"), rf"{HERE}\['columns'\] is '0.5', expected a sparsity"),
    (setting("columns", False), rf"{HERE}\['columns'\] is False, expected a sparsity"),
    (setting("columns", float("nan")), rf"{HERE}\['columns'\] is nan, expected a sparsity"),
    (setting("shape", [96]), rf"{HERE}\['shape'\] is \[96\], expected \[out, in\]"),
    (setting("shape", [96, 32, 1]), rf"{HERE}\['shape'\] is \[96, 32, 1\], expected"),
    (setting("shape", [96, 32.0]), rf"{HERE}\['shape'\] is \[96, 32.0\], expected"),
    (setting("shape", [0, 32]), rf"{HERE}\['shape'\] is \[0, 32\], expected"),
    (setting("sha256", "abc"), rf"{HERE}\['sha256'\] is 'abc', expected an object with rows, columns"),
    (setting("sha256", "rows", GONE), rf"rows in {HERE}\['sha256'\] is missing"),
    (setting("sha256", "rows", "ab" * 31), rf"{HERE}\['sha256'\]\['rows'\] is 'abab.*, expected 64 hexadecimal"),
    (setting("sha256", "columns", "AB" * 32), rf"{HERE}\['sha256'\]\['columns'\] is 'ABAB.*, expected 64"),
    (setting("sha256", "columns", 5), rf"{HERE}\['sha256'\]\['columns'\] is 5, expected 64"),
]
OF_ROWS = [
    (setting("count", "exact"), "count is unknown"),
    (setting("a", [4, 32]), f"a in {HERE} is unknown"),
    (setting("indices", {"rows": [0], "columns": [0]}), f"indices in {HERE} is unknown"),
    (setting("selection", "top"), f"indices in {HERE} is missing"),
    (setting("granularity", "element"), "count is missing"),
]
OF_ENTRIES = [
    (setting("count", GONE), "count is missing"),
    (setting("count", "about"), "count is 'about', expected 'exact' or 'bernoulli'"),
    (setting("a", GONE), f"a in {HERE} is missing"),
    (setting("a", [4]), rf"{HERE}\['a'\] is \[4\], expected the shape of a factor"),
    (setting("a", [4, 33]), rf"{HERE}\['a'\] is \[4, 33\], expected \[rank, 32, ...\]"),
    (setting("b", [95, 4]), rf"{HERE}\['b'\] is \[95, 4\], expected \[96, rank, ...\]"),
    (setting("b", [96, 3]), rf"{HERE}\['b'\] is \[96, 3\], expected"),
    (setting("b", [96, 4, 1]), rf"{HERE}\['b'\] is \[96, 4, 1\], expected"),
    (setting("granularity", "rows_columns"), "count is unknown"),
]
OF_TOP = [
    (setting("indices", GONE), f"indices in {HERE} is missing"),
    (setting("indices", [0]), rf"{HERE}\['indices'\] is \[0\], expected an object"),
    (setting("indices", "rows", GONE), rf"rows in {HERE}\['indices'\] is missing"),
    (setting("indices", "rows", 3), rf"{HERE}\['indices'\]\['rows'\] is 3, expected whole numbers"),
    (setting("indices", "rows", [0, 1.0]), rf"{HERE}\['indices'\]\['rows'\] is \[0, 1.0\], expected whole numbers"),
    (setting("indices", "rows", []), rf"{HERE}\['indices'\]\['rows'\]: a mask over .* needs a non-empty list"),
    (setting("indices", "rows", [2, 1]), rf"{HERE}\['indices'\]\['rows'\]: a mask over .* needs ascending"),
    (setting("indices", "rows", [-1, 1]), rf"{HERE}\['indices'\]\['rows'\]: a mask over .* needs ascending"),
    (setting("indices", "rows", [0, 10**6]), rf"{HERE}\['indices'\]\['rows'\]: a mask over .* from 0 to "),
    (setting("indices", "rows", [0, 10**30]), rf"{HERE}\['indices'\]\['rows'\]: a mask over "),
    (setting("indices", "rows", [0, 1]), rf"the number of {HERE}\['indices'\]\['rows'\] is 2, expected \d+, as by"),
    (setting("columns", 0.1), rf"the number of {HERE}\['indices'\]\['columns'\] is .*, as by the sparsity"),
    (
        lambda s: s["modules"][QKV]["indices"].update(rows=moved(s["modules"][QKV]["indices"]["rows"])),
        rf"{HERE}\['sha256'\]\['rows'\] is '.*, expected its indices'",
    ),
    (setting("selection", "random"), f"indices in {HERE} is unknown"),
]
OF_TOP_ENTRIES = [(setting("count", "bernoulli"), "count is 'bernoulli', expected 'exact'")]


def moved(kept):
    """As many other indices."""
    free = next(index for index in range(len(kept) + 1) if index not in kept)
    return sorted([free, *kept[1:]])


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """One folder for each granularity and selection."""
    folders = {}
    for granularity in ("rows_columns", "element"):
        for selection in ("random", "scores"):
            folders[granularity, selection] = tmp_path_factory.mktemp("saved")
            model = with_selection("wrapped_vit", selection, granularity=granularity)
            model.save_pretrained(folders[granularity, selection])
    return folders


BROKEN = [
    *((*kind, *case) for kind in product(("rows_columns", "element"), ("random", "scores")) for case in ANYWHERE),
    *(("rows_columns", "random", *case) for case in OF_ROWS),
    *(("element", "random", *case) for case in OF_ENTRIES),
    *(("rows_columns", "scores", *case) for case in OF_TOP),
    *(("element", "scores", *case) for case in OF_TOP + OF_TOP_ENTRIES),
]


@pytest.mark.parametrize(("granularity", "selection", "alter", "message"), BROKEN)
def test_a_sidecar_with_a_wrong_value_is_refused_by_file_and_key(
    tmp_path, saved, granularity, selection, alter, message
):
    shutil.copytree(saved[granularity, selection], tmp_path, dirs_exist_ok=True)
    change(tmp_path, alter)
    with pytest.raises(PartialLoraError, match=rf"partial_lora\.json is broken: {message}") as refusal:
        PartialLoraConfig.from_pretrained(str(tmp_path))
    assert str(refusal.value).startswith(f"{tmp_path}/")
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000, b"\xff\xfe", '{"version": 1}', "NaN"])
def test_a_file_that_is_no_sidecar_is_refused(tmp_path, saved, content):
    shutil.copytree(saved["rows_columns", "random"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "partial_lora.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PartialLoraError, match=r"partial_lora\.json is broken: ") as refusal:
        PartialLoraConfig.from_pretrained(str(tmp_path))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("granularity", "alter", "message"),
    [
        ("rows_columns", setting("version", 2), r"partial_lora.json has version 2: this partial-lora reads version 1"),
        ("rows_columns", setting("mask_seed", 1), "the mask of its rows does not match the digest"),
        ("element", setting("mask_seed", 1), "the mask of its rows does not match the digest"),
        ("element", setting("count", "bernoulli"), "the mask of its rows does not match the digest"),
        ("rows_columns", setting("columns", 0.25), f"{QKV}: the mask of its columns does not match the digest"),
        ("rows_columns", setting("shape", [96, 33]), f"{QKV} has shape .96, 32. in this model, but .96, 33."),
        (
            "element",
            lambda s: s["modules"][QKV].update(a=[2, 32], b=[96, 2]),
            f"{QKV} has a factor A of shape .4, 32. in this model, but .2, 32. in the adapter",
        ),
        ("rows_columns", lambda s: s["modules"].pop(FC2), f"no entry for the target module {FC2}"),
        (
            "rows_columns",
            lambda s: s["modules"].update(more=s["modules"][FC2]),
            r"adapter_model\.safetensors has no lora_A of more, which its masks are for",
        ),
    ],
)
def test_a_sidecar_that_does_not_match_the_model_is_refused(tmp_path, saved, granularity, alter, message):
    shutil.copytree(saved[granularity, "random"], tmp_path, dirs_exist_ok=True)
    change(tmp_path, alter)
    model = vit()
    with pytest.raises(PartialLoraError, match=message):
        PeftModel.from_pretrained(model, str(tmp_path), config=PartialLoraConfig.from_pretrained(str(tmp_path)))
    assert not layers(model)


def test_masks_other_than_the_saved_ones_are_refused_however_they_came_about(saved):
    config = PartialLoraConfig.from_pretrained(str(saved["rows_columns", "random"]))
    config.mask_seed = 4
    with pytest.raises(PartialLoraError, match="the mask of its rows does not match the digest"):
        get_peft_model(vit(), config)
    config = PartialLoraConfig.from_pretrained(str(saved["element", "random"]))
    config.r = 5
    with pytest.raises(PartialLoraError, match=r"has a factor A of shape \[5, 32\] in this model, but \[4, 32\]"):
        get_peft_model(vit(), config)


def test_a_folder_without_a_whole_sidecar_is_refused(tmp_path, saved):
    shutil.copytree(saved["rows_columns", "random"], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "partial_lora.json"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(PartialLoraError, match=r"partial_lora\.json is broken: no JSON"):
        PartialLoraConfig.from_pretrained(str(tmp_path))
    path.unlink()
    with pytest.raises(PartialLoraError, match=r"partial_lora\.json cannot be read .*: the adapter has no masks"):
        PartialLoraConfig.from_pretrained(str(tmp_path))


def test_a_folder_of_another_method_is_refused(tmp_path):
    get_peft_model(vit(), LoHaConfig(r=2, target_modules=["qkv"])).save_pretrained(tmp_path)
    with pytest.raises(PartialLoraError, match="holds an adapter of peft_type LOHA: expected LORA"):
        PartialLoraConfig.from_pretrained(str(tmp_path))
