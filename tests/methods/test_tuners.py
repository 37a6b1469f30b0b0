"""PEFT's tuners by their configurations: sized for a budget, trained, saved, merged and loaded by plain PEFT."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from configured import inputs, load
from finished_runs import override, picture_files, trained
from method_settings import adapted, setting_of
from peft import PeftModel
from plain_libraries import in_this_process
from refusals import refusal
from torch import nn

from partial_lora.building.info import outline
from partial_lora.errors import PartialLoraError
from partial_lora.finished import export
from partial_lora.methods import tuners
from partial_lora.settings.compose import composed
from partial_lora.training.cost import measured

SIZED = ("FOURIERFT", "GRALORA", "HIRA", "LOHA", "LOKR", "LORA", "MISS", "OFT", "PSOFT", "RANDLORA", "UNILORA", "VERA")
OPTIONS = {"LOKR": {"decompose_factor": 4}}


def trainable(model, setting) -> int:
    return measured(model, setting.head, dense=1)["adapter_trainable"]


def of_kind(kind: str, **changes):
    return adapted("peft", "tiny_vit", **{"peft_type": kind, "peft": OPTIONS.get(kind, {})} | changes)


@pytest.mark.parametrize(
    ("kind", "given"), [*((kind, OPTIONS.get(kind, {})) for kind in SIZED), ("LORA", {"init_lora_weights": "mica"})]
)
def test_the_parameters_are_counted_before_the_tuner_is_built(kind: str, given: dict) -> None:
    """The size is solved on modules without memory: what is built in the end has as many parameters."""
    model = load("tiny_vit")
    setting = setting_of("tiny_vit", model, peft_type=kind, peft=given, size=2500)
    options = tuners.sized(setting, lambda each: tuners.counts(setting, each, model))
    built, _ = of_kind(kind, peft=given, size=2500)
    assert trainable(built, setting) == sum(tuners.counts(setting, options, model).values())
    assert abs(trainable(built, setting) / 2500 - 1) <= tuners.FARTHEST


@pytest.mark.parametrize("kind", ["LORA", "LOHA", "LOKR", "VERA"])
def test_no_other_value_of_the_size_comes_nearer(kind: str) -> None:
    model = load("tiny_vit")
    setting = setting_of("tiny_vit", model, peft_type=kind, peft=OPTIONS.get(kind, {}), size=2500)
    key = tuners.size_key(kind)
    options = tuners.sized(setting, lambda each: tuners.counts(setting, each, model))
    found = abs(trainable(of_kind(kind, size=2500)[0], setting) - 2500)
    around = range(max(1, options[key] - 3), options[key] + 4)
    others = [abs(sum(tuners.counts(setting, {key: value}, model).values()) - 2500) for value in around]
    assert found <= min(others)


def test_some_modules_have_one_rank_more_where_that_comes_nearer() -> None:
    built, setting = of_kind("LORA", size=2500)
    config = built.peft_config["default"]
    assert 0 < len(config.rank_pattern) < len(setting.shapes)
    assert set(config.rank_pattern.values()) == {config.r + 1}
    scalings = {
        layer.scaling["default"] for layer in built.modules() if isinstance(getattr(layer, "scaling", None), dict)
    }
    assert scalings == {setting.method.alpha / setting.rank}  # whatever the rank is


def test_some_modules_have_no_adapter_where_one_rank_is_too_much_for_all() -> None:
    every, setting = of_kind("LORA", peft={"r": 1})
    less = trainable(every, setting) // 3
    few, _ = of_kind("LORA", size=less)
    other, _ = of_kind("LORA", size=less, seed=1)
    assert few.peft_config["default"].r == 1
    assert 0 < trainable(few, setting) <= less
    targets = [set(each.peft_config["default"].target_modules) for each in (few, other)]
    assert targets[0] < set(setting.shapes)
    assert targets[0] != targets[1]  # drawn by the mask seed


def test_without_a_budget_the_options_decide() -> None:
    built, setting = of_kind("LORA", peft={"use_rslora": True})
    assert (built.peft_config["default"].r, built.peft_config["default"].use_rslora) == (setting.rank, True)
    built, _ = of_kind("LOHA", peft={"r": 3, "alpha": 6})
    assert (built.peft_config["default"].r, built.peft_config["default"].alpha) == (3, 6)


@pytest.mark.parametrize(
    ("kind", "options", "size", "names"),
    [
        ("NOPE", {}, None, "method.peft_type=NOPE"),
        ("ADALORA", {}, None, "method=adalora"),
        ("LOKR", {"nope": 1}, None, "nope"),
        ("LORA", {"init_lora_weights": "eva"}, None, "init_lora_weights=eva"),
        ("LORA", {"r": 4}, 2500, "method.peft.r"),
        ("C3A", {"block_size": 7}, None, "C3A"),  # does not divide the weights
        ("IA3", {}, 100_000, "not applicable"),
        ("FROD", {}, 2500, "calibration.budget"),  # looks at the weights
        ("LILY", {}, 2500, "calibration.budget"),  # shares factors between modules
    ],
)
def test_what_peft_cannot_build_is_refused_by_name(kind: str, options: dict, size: int | None, names: str) -> None:
    with refusal("", names):
        of_kind(kind, **({"peft": options} if options else {}), size=size)


def test_a_tuner_of_blocks_is_not_applicable_where_no_block_fits_all_modules() -> None:
    model = nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 4))
    setting = setting_of("tiny_vit", load("tiny_vit"), peft_type="OFT", size=20)
    setting = dataclasses.replace(setting, shapes={"0": (9, 4), "1": (4, 9)}, target_modules=("0", "1"))
    with pytest.raises(PartialLoraError, match="not applicable"):
        tuners.sized(setting, lambda each: tuners.counts(setting, each, model))


def test_a_dropout_goes_to_the_tuner_that_has_one() -> None:
    assert of_kind("VERA", dropout=0.5)[0].peft_config["default"].vera_dropout == 0.5
    with pytest.raises(PartialLoraError, match=r"^method\.dropout"):
        of_kind("LOKR", dropout=0.5)


@pytest.mark.parametrize("kind", ["LORA", "LOKR", "OFT", "VERA", "FOURIERFT", "IA3", "BOFT"])
def test_a_trained_tuner_merges_and_comes_back_by_plain_peft(kind: str, tmp_path: Path) -> None:
    model, _ = of_kind(kind, peft={"boft_block_size": 4} if kind == "BOFT" else OPTIONS.get(kind, {}))
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.02)
    for _ in range(3):
        model(**inputs("tiny_vit"), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**inputs("tiny_vit")).logits
        plain = PeftModel.from_pretrained(load("tiny_vit"), str(tmp_path)).eval()
        torch.testing.assert_close(plain(**inputs("tiny_vit")).logits, expected, rtol=1e-4, atol=1e-4)
        merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
        torch.testing.assert_close(merged(**inputs("tiny_vit")).logits, expected, rtol=1e-3, atol=1e-3)
        assert (load("tiny_vit")(**inputs("tiny_vit")).logits - expected).abs().max() > 1e-3


# --- In a run.


def run_of(method: str, *more: str):
    place = ("model=tiny_vit", "task=cifar10", override(picture_files()))
    return trained(f"tuner-{method}", *place, f"method={method}", *more)


@pytest.mark.parametrize(("method", "budget", "to"), [("lokr", 0.05, "merged"), ("pissa", 0.3, "peft")])
def test_a_run_exports_what_it_was_evaluated_with(
    method: str, budget: float, to: str, tmp_path: Path, monkeypatch
) -> None:
    """PiSSA changes the base: what is saved fits the model as it was."""
    in_this_process(monkeypatch)
    run = run_of(method, f"calibration.budget={budget}")
    parameters = run.result["parameters"]
    assert abs(parameters["adapter_trainable"] / (budget * parameters["adapter_dense"]) - 1) < 0.05
    assert run.result["fixed"] == {"budget": budget}
    assert export.export(run, to, tmp_path / to, check=True).proof
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert config["peft_type"] == ("LOKR" if method == "lokr" else "LORA")
    assert method != "pissa" or config["init_lora_weights"] is True


def test_what_is_saved_of_pissa_is_what_was_trained() -> None:
    model, _ = adapted("peft", "tiny_vit", peft_type="LORA", peft={"init_lora_weights": "pissa"}, size=2500)
    start = tuners.taken_out(model)
    with torch.no_grad():
        torch.testing.assert_close(
            model(**inputs("tiny_vit")).logits, load("tiny_vit")(**inputs("tiny_vit")).logits, rtol=1e-4, atol=1e-4
        )
    assert start
    assert not any(tensor.requires_grad for tensor in start.values())
    assert tuners.taken_out(of_kind("LORA")[0]) is None


# --- On the command line.


def test_a_tuner_is_a_method_of_its_own_name() -> None:
    generic = composed("method=peft", "method.peft_type=lokr", "method.peft={decompose_factor: 8}")
    assert (generic.method.name, generic.method.peft_type, generic.method.function) == ("peft_lokr", "LOKR", "peft")
    named = composed("method=lokr", "+method.peft.decompose_both=true")
    assert (named.method.name, named.method.peft) == ("lokr", {"decompose_factor": 8, "decompose_both": True})
    assert composed("method=loraplus").trainer.loraplus_ratio == 16
    assert composed("method=shira").method.name == "random_weights"


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["method=peft"], "method.peft_type"),
        (["method=partial", "method.peft_type=LOKR"], "method.peft_type"),
        (["method=lora", "method.peft={r: 4}"], "method.peft"),
        (["method=peft", "method.peft_type=LOKR", "method.peft=[1]"], "method.peft"),
        (["method=lokr", "trainer.loraplus_ratio=4"], "trainer.loraplus_ratio"),
    ],
)
def test_settings_that_clash_are_refused(overrides: list[str], key: str) -> None:
    with pytest.raises(PartialLoraError, match=rf"^{key}[=: ]"):
        composed(*overrides)


@pytest.mark.parametrize("method", ["unilora", "pissa", "psoft", "ia3"])  # some look at the weights once they are there
def test_info_counts_the_solved_size(method: str) -> None:
    budget = 0.03 if method == "ia3" else 0.3
    given = ("model=tiny_vit", "task=cifar10", f"method={method}", f"calibration.budget={budget}")
    counted = outline(composed(*given)).counts
    assert counted["adapter_trainable"] == pytest.approx(budget * counted["adapter_dense"], rel=tuners.FARTHEST)
