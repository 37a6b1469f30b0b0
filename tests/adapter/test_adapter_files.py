"""A saved adapter is an ordinary LoRA adapter, on disk and on the hub, and can be masked again for further training."""

from __future__ import annotations

import builtins
import dataclasses
import functools
import importlib.metadata
import json
import multiprocessing
import operator
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import peft
import peft.tuners.lora
import peft.utils.other
import peft.utils.save_and_load
import pytest
import torch
import transformers.utils.hub
from adapter_models import (
    HEAD,
    LLAMA_TARGETS,
    MIXED,
    VIT_TARGETS,
    adapt,
    fill,
    images,
    llama,
    logits,
    optimizer_of,
    step,
    trainable_parameters,
    vit,
)
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from refusals import refusal
from safetensors.torch import load_file, save_file
from torch import nn

import partial_lora
from partial_lora.adapter import PEFT, PartialLoraConfig, load_compact, module_masks, warm_start
from partial_lora.adapter.registration import REACHES, check_peft
from partial_lora.errors import PartialLoraError

QKV = "timm_model.blocks.0.attn.qkv"


def trained(**settings):
    model = adapt(**{"sparsity": MIXED, **settings})
    optimizer = optimizer_of(model)
    for seed in range(2):
        step(model, optimizer, images(seed))
    return model


def test_the_folder_is_an_ordinary_lora_adapter(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    allowed = {option.name for option in dataclasses.fields(LoraConfig)}
    assert config.keys() <= allowed
    assert not config["rank_pattern"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    expected = {f"base_model.model.{HEAD}.weight", f"base_model.model.{HEAD}.bias"}
    for name, masks in module_masks(model).items():
        a, b = (tensors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        assert (a.shape, b.shape) == ((4, masks.shape[1]), (masks.shape[0], 4))
        assert a.any(0).tolist() == masks.columns.dense().tolist()
        assert b.any(1).tolist() == masks.rows.dense().tolist()
        expected |= {f"base_model.model.{name}.lora_{factor}.weight" for factor in "AB"}
    assert tensors.keys() == expected


def test_weights_of_another_mask_are_refused(tmp_path):
    trained(sparsity=0.5, mask_seed=1).save_pretrained(tmp_path)
    model = adapt(sparsity=0.5, mask_seed=0)
    with pytest.raises(PartialLoraError, match="does not match the digest"):
        model.load_adapter(str(tmp_path), "default")
    (tmp_path / "partial_lora.json").unlink()  # which PEFT alone would not have written
    with pytest.raises(PartialLoraError, match=r"lora_A\.default\.weight"):
        model.load_adapter(str(tmp_path), "default")


def test_a_checkpoint_of_another_shape_or_with_a_missing_tensor_is_not_swallowed(tmp_path):
    trained(r=2).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"lora_A.default.weight: \(2, 32\) .*\(4, 32\)"):
        adapt(sparsity=MIXED).load_adapter(str(tmp_path), "default")
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[f"base_model.model.{QKV}.lora_B.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    result = adapt(sparsity=MIXED, r=2).load_adapter(str(tmp_path), "default")
    assert result.missing_keys == [f"base_model.model.{QKV}.lora_B.default.weight"]
    assert result.unexpected_keys == []


def test_a_saved_adapter_with_a_tensor_missing_or_cut_short_is_refused_before_a_model_is_touched(tmp_path):
    fill(adapt(sparsity=0.6)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    whole, tensors = path.read_bytes(), load_file(path)
    gone = next(key for key in tensors if key.endswith("0.mlp.fc1.lora_B.weight"))
    save_file({key: value for key, value in tensors.items() if key != gone}, path, metadata={"format": "pt"})
    with pytest.raises(PartialLoraError, match=r"adapter_model\.safetensors .*lora_B of .*0\.mlp\.fc1"):
        PartialLoraConfig.from_pretrained(tmp_path)
    path.write_bytes(whole[:-40])
    with pytest.raises(PartialLoraError, match=r"adapter_model\.safetensors"):
        PartialLoraConfig.from_pretrained(tmp_path)
    path.unlink()  # PEFT would look for it on the hub
    with pytest.raises(PartialLoraError, match=r"adapter_model\.safetensors"):
        PartialLoraConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [None, "", '{"peft_type": "LO', "[]", '{"peft_type": "NOPE"}'])
def test_an_adapter_whose_config_is_gone_or_broken_is_refused_by_its_name(tmp_path, content):
    adapt(sparsity=0.6).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.unlink() if content is None else path.write_text(content)
    with refusal(r".*adapter_config\.json"):
        PartialLoraConfig.from_pretrained(tmp_path)


def test_a_pipe_is_no_compact_adapter(tmp_path):
    """It may have no writer."""
    os.mkfifo(tmp_path / "partial_lora.safetensors")
    with pytest.raises(PartialLoraError, match=r"partial_lora\.safetensors cannot be read"):
        load_compact(vit(), tmp_path)


def imported_anew(place, found):
    """In a fork: import the adapter, first beside a PEFT without two things, then as it is, and use it."""
    os.chdir(place)
    for name in [name for name in sys.modules if name.split(".")[0] == "partial_lora"]:
        del sys.modules[name]
    sys.modules["fcntl"] = None  # as on Windows
    refusals, libraries, imports = [], set(), builtins.__import__

    def noted(name, scope=None, *others):
        if scope and scope["__name__"].startswith("partial_lora"):
            libraries.add(name.split(".")[0])
        return imports(name, scope, *others)

    builtins.__import__ = noted
    overridden = (peft.tuners.lora.LoraModel, "add_weighted_adapter")
    for holder, name in [(peft.utils.other, "get_pattern_key"), overridden]:
        value = getattr(holder, name)
        delattr(holder, name)
        try:
            import partial_lora.adapter  # noqa: F401
        except ImportError as error:
            (line,) = str(error).splitlines()
            refusals.append((type(error).__name__, name in line, "pip install" in line))
        setattr(holder, name, value)

    from partial_lora.adapter import PartialLoraConfig, load_compact, module_masks, write_compact

    builtins.__import__ = imports
    base = nn.Sequential(nn.Linear(8, 8))
    model = get_peft_model(base, PartialLoraConfig(r=2, target_modules=["0"], sparsity=0.5))
    model.save_pretrained("saved")
    write_compact(model, "compact")
    base = model.unload()
    again = PeftModel.from_pretrained(base, "saved", config=PartialLoraConfig.from_pretrained("saved"))
    same = module_masks(again) == module_masks(load_compact(again.unload(), "compact"))
    loaded = {name.split(".")[1] for name in sys.modules if name.startswith("partial_lora.")}
    found.put((refusals, libraries, loaded, same))


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Run code in a fork of this process that has not yet imported the adapter."""
    forks = multiprocessing.get_context("fork")
    found = forks.SimpleQueue()
    child = forks.Process(target=imported_anew, args=(tmp_path_factory.mktemp("imported"), found))
    child.start()
    child.join()
    assert child.exitcode == 0
    return found.get()


def test_the_adapter_loads_nothing_of_the_runner_and_needs_no_fcntl(imported):
    _, libraries, loaded, same = imported
    assert loaded == {"adapter", "errors", "files", "masks"}
    assert same
    required = {re.match(r"[\w-]+", each)[0].replace("-", "_") for each in importlib.metadata.requires("peft")}
    # The import costs what PEFT's does, which requires pyyaml for yaml.
    assert libraries - sys.stdlib_module_names <= {"partial_lora", "peft", "yaml", *required}


def test_a_peft_without_what_the_adapter_needs_is_refused_in_one_line(imported):
    assert imported[0] == [("UnfitPackageError", True, True)] * 2
    project = (Path(partial_lora.__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"{PEFT}"' in project


@pytest.mark.parametrize("reach", REACHES)
def test_what_peft_has_to_offer_is_asked_for_by_its_name(monkeypatch, reach):
    holder, _, name = reach.rpartition(".")
    monkeypatch.delattr(operator.attrgetter(holder)(peft), name)
    with pytest.raises(AttributeError, match=name):
        check_peft()


FILES = {"adapter_config.json", "adapter_model.safetensors", "partial_lora.json", "README.md"}


# The card


def card_of(folder):
    return ModelCard.load(folder / "README.md")


def test_the_card_says_what_is_known_and_nothing_else(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    cards, models = [], []
    for name, build in (("ours", PartialLoraConfig), ("plain", lambda **s: PartialLoraConfig(**s).as_lora())):
        base = llama().from_pretrained(tmp_path / "base")
        model = get_peft_model(base, build(target_modules=LLAMA_TARGETS, task_type="CAUSAL_LM"))
        model.save_pretrained(tmp_path / name)
        cards.append(card_of(tmp_path / name))
        models.append(model)
    ours, plain = (card.data.to_dict() for card in cards)
    of_this_machine = {f"base_model:adapter:{plain.pop('base_model')}"}
    assert of_this_machine == {f"base_model:adapter:{tmp_path / 'base'}"}
    assert set(ours.pop("tags")) == {*plain.pop("tags"), "partial-lora"} - of_this_machine
    assert ours == plain
    assert (ours["library_name"], ours["pipeline_tag"]) == ("peft", "text-generation")
    written = (tmp_path / "ours" / "README.md").read_text()
    assert str(tmp_path) not in written
    assert "Needed" not in written
    assert f"{trainable_parameters(models[0]):,}" in written
    assert written.index("## Partial-LoRA") < written.index("### Framework versions")


@pytest.mark.parametrize("form", [{"granularity": "groups"}, {"columns": "frozen"}])
def test_the_card_of_a_form_without_zeros_names_none(tmp_path, form):
    adapt(sparsity=0.6, **form).save_pretrained(tmp_path)
    assert "zero" not in card_of(tmp_path).text


def snippets(folder):
    return [part.partition("```")[0] for part in card_of(folder).text.split("```python\n")[1:]]


@pytest.mark.parametrize("names", [["default"], ["other"]])
def test_what_the_card_says_loads_the_adapter(tmp_path, names):
    config = PartialLoraConfig(r=4, target_modules=VIT_TARGETS, sparsity=0.6)
    model = fill(get_peft_model(vit(), config, adapter_name=names[0]))
    model.save_pretrained(tmp_path)
    plain, masked = snippets(tmp_path)
    for snippet, kind in ((plain, peft.LoraModel), (masked, partial_lora.PartialLoraModel)):
        scope = {"base_model": vit()}
        exec(snippet.replace("path/or/hub-id", str(tmp_path)), scope)
        assert type(scope["model"].base_model) is kind
        torch.testing.assert_close(logits(scope["model"], images()), logits(model, images()), atol=1e-5, rtol=1e-5)
    assert module_masks(scope["model"]) == module_masks(model, names[0])


def test_a_card_of_the_user_is_kept_and_completed_once(tmp_path):
    text = "# My adapter\n\nTrained on my own pictures.\n\n### Framework versions\n\n- mine 1.0"
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\n---\n{text}\n")
    for _ in range(2):
        adapt(sparsity=0.5).save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert (card.data.license, card.data.library_name) == ("mit", "peft")
    for part in ("## Partial-LoRA", "# My adapter", "Trained on my own", "- mine 1.0"):
        assert card.text.count(part) == 1
    assert card.data.tags.count("partial-lora") == 1


def test_a_readme_that_is_no_card_of_an_adapter_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("# A project")
    model = adapt(sparsity=0.5)
    model.peft_config["default"].save_pretrained(str(tmp_path / "inside"))  # the config alone has no card
    model.peft_config["default"].save_pretrained(str(tmp_path))
    assert (tmp_path / "README.md").read_text() == "# A project"
    assert not (tmp_path / "inside" / "README.md").exists()


# The hub


def test_push_to_hub_uploads_every_adapter_with_its_sidecar(monkeypatch):
    uploads = []
    monkeypatch.setattr(
        transformers.utils.hub,
        "hf_api",
        lambda: SimpleNamespace(
            create_repo=lambda repo_id, **settings: SimpleNamespace(repo_id=repo_id),
            create_commit=lambda repo_id, operations, **settings: uploads.extend(operations),
        ),
    )
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *_, **__: ModelCard("# A card"))
    model = adapt(sparsity=0.6)
    model.add_adapter("other", PartialLoraConfig(r=2, target_modules=["attn.qkv"], sparsity=0.5))
    model.push_to_hub("me/both")
    assert {each.path_in_repo for each in uploads} == FILES | {f"other/{name}" for name in FILES - {"README.md"}}


class Hub:
    """Repositories that are folders; remembers the downloads."""

    def __init__(self, repositories):
        self.repositories = repositories
        self.downloads = []

    def path(self, repo_id, filename, subfolder=None, revision=None):
        return self.repositories[repo_id, revision] / (subfolder or "") / filename

    def patch(self, monkeypatch):
        @functools.wraps(huggingface_hub.hf_hub_download)  # PEFT sorts keywords by its signature
        def download(repo_id, filename, *, subfolder=None, revision=None, **settings):
            path = self.path(repo_id, filename, subfolder, revision)
            self.downloads.append((filename, subfolder, revision, settings.get("token")))
            if not path.is_file():
                raise EntryNotFoundError(f"no {path}")
            return str(path)

        def file_exists(repo_id, filename, *, revision=None, **settings):
            return self.path(repo_id, filename, None, revision).is_file()

        for module in ("peft.config", "peft.utils.save_and_load", "partial_lora.adapter.config"):
            monkeypatch.setattr(f"{module}.hf_hub_download", download)
        monkeypatch.setattr(peft.utils.save_and_load, "file_exists", file_exists)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository whose revision v1 holds an adapter at its root and another in a folder, and nothing else."""
    model = fill(adapt(sparsity=0.6))
    model.add_adapter("other", PartialLoraConfig(r=2, target_modules=["attn.qkv"], sparsity=0.5))
    fill(model, seed=4, adapter_name="other")
    model.save_pretrained(tmp_path / "v1")
    hub = Hub({("me/ours", "v1"): tmp_path / "v1"})
    hub.patch(monkeypatch)
    hub.model = model
    return hub


def masked_from(where, **settings):
    config = PartialLoraConfig.from_pretrained(where, **settings)
    return PeftModel.from_pretrained(vit(), where, config=config, is_trainable=True, **settings)


@pytest.mark.parametrize(("adapter", "subfolder"), [("default", None), ("other", "other")])
def test_an_adapter_on_the_hub_is_loaded_masked_or_plain(hub, adapter, subfolder):
    settings = {"revision": "v1", "token": "secret"} | ({"subfolder": subfolder} if subfolder else {})
    masked = masked_from("me/ours", **settings)
    assert {name for name, *_ in hub.downloads} == FILES - {"README.md"}
    assert {tuple(rest) for _, *rest in hub.downloads} == {(subfolder, "v1", "secret")}
    plain = PeftModel.from_pretrained(vit(), "me/ours", **settings)
    hub.model.set_adapter(adapter)
    assert module_masks(masked) == module_masks(hub.model, adapter)
    for each in (masked, plain):
        torch.testing.assert_close(logits(each, images()), logits(hub.model, images()), atol=1e-5, rtol=1e-5)


def test_an_adapter_of_the_hub_trains_masked_beside_another(hub):
    model = adapt(sparsity=0.6)
    options = {"revision": "v1", "token": "secret"}
    model.load_adapter("me/ours", "again", is_trainable=True, **options)
    assert module_masks(model, "again") == module_masks(hub.model, "default")


def test_a_warm_start_from_the_hub(hub):
    model = get_peft_model(vit(), PartialLoraConfig(r=2, target_modules=["attn.qkv"], sparsity=0.5))
    warm_start(model, "me/ours", subfolder="other", revision="v1", token="secret")
    assert {tuple(rest) for _, *rest in hub.downloads} == {("other", "v1", "secret")}
    hub.model.set_adapter("other")
    assert torch.equal(logits(model, images()), logits(hub.model, images()))


def test_a_repository_without_a_sidecar_is_refused(hub, tmp_path):
    shutil.copytree(tmp_path / "v1", tmp_path / "plain")
    (tmp_path / "plain" / "partial_lora.json").unlink()
    hub.repositories["me/plain", None] = tmp_path / "plain"
    with refusal(r".*me/plain.*partial_lora\.json"):
        PartialLoraConfig.from_pretrained("me/plain")
