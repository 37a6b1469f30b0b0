"""Learning rates: the best that was tried, the one to try first, and those of earlier versions."""

from __future__ import annotations

import re

import pytest
import torch
import yaml
from checkout import RESULTS, needs_results
from evidence import raced
from peft import get_peft_model
from refusals import refusal

from partial_lora import PartialLoraConfig, learning_rate
from partial_lora.settings import identity, rates, schema, versions
from partial_lora.settings.compose import composed
from partial_lora.training.config import AUTO


def test_the_best_rate_has_the_best_mean_over_the_seeds_of_all_that_compete() -> None:
    scores = {1e-3: (0.1, 0.2, 0.3), 2e-3: (0.3, 0.2, 0.1), 4e-3: (0.9, None, 0.9), 8e-3: (0.99,)}
    losses = {1e-3: 1.0, 2e-3: 2.0}

    def ranked() -> list[float]:
        return rates.ranked(
            {
                rate: {seed: value and (value, -losses.get(rate, 0)) for seed, value in enumerate(values)}
                for rate, values in scores.items()
            }
        )

    assert ranked() == [1e-3, 2e-3]  # equal, though not in binary: the loss decides; others failed or went out
    losses[2e-3] = 1.0
    assert ranked() == [1e-3, 2e-3]  # the lower one
    losses[2e-3] = 0.5
    assert ranked() == [2e-3, 1e-3]
    assert rates.ranked({1e-3: {0: (0.1, 0.0), 1: (0.9, 0.0)}, 2e-3: {1: (0.5, 0.0), 2: (0.5, 0.0)}}) == [1e-3, 2e-3]
    assert rates.ranked({1e-3: {0: None}}) == []


# A learning rate to try first


@pytest.mark.parametrize(("dense", "density"), [(1e-3, 1.0), (1e-3, 0.25), (3e-3, 0.01)])
def test_a_masked_adapter_starts_from_the_dense_rate_as_its_mask_knows_its_density(dense, density) -> None:
    assert rates.starting_rate(dense, density) == pytest.approx(dense * density**-0.5)
    known = dense if density >= 0.12 else pytest.approx(dense * (density / 0.12) ** 0.5)
    for aware in ({"row_exponent": 1.0}, {"row_exponent": 0.5, "column_exponent": 0.5}):
        assert rates.starting_rate(dense, density, fan_in="kept", **aware) == known
        assert rates.starting_rate(dense, density, columns="frozen", **aware) == known
    assert rates.starting_rate(dense, density, row_exponent=1.0, column_exponent=1.0) == known
    for form, factor in {"units": 1.0, "element": density ** (-1 / 6)}.items():  # which reach more rows
        assert rates.starting_rate(dense, density, granularity=form, fan_in="kept", row_exponent=1.0) == factor * dense
    assert rates.starting_rate(dense, density, granularity="groups") == dense  # which set nothing to zero
    for row in (0.3, 0.7):  # whose sum is 1 in either order, but not in binary
        assert rates.starting_rate(dense, density, fan_in="kept", row_exponent=row, column_exponent=1 - row) == known
    between = [rates.starting_rate(dense, density, fan_in="kept", row_exponent=power) for power in (0.0, 0.3, 0.6)]
    assert between == sorted(between, reverse=True)
    assert dense <= between[-1] <= between[0] <= rates.starting_rate(dense, density)


@needs_results
def test_the_best_rates_of_rows_and_columns_are_near_the_one_to_try_first() -> None:
    cells = raced(RESULTS)
    dense = cells[cells["form"] == "dense"].set_index("task")["learning_rate"]
    masked = cells[cells["form"] == "partial"]
    assert len(masked) >= 15
    for cell in masked.itertuples():
        expected = rates.starting_rate(dense[cell.task], float(cell.size), fan_in="kept", row_exponent=1.0)
        assert expected / 2.5 < cell.learning_rate < expected * 2.5


def test_the_dense_rate_falls_as_models_get_wider() -> None:
    found = [rates.dense_rate(width) for width in (32, 384, 768, 4096)]
    assert found == [2e-3, 2e-3, 1e-3, pytest.approx(1.9e-4, rel=0.02)]
    shapes = {"query": (8, 4), "key": (8, 4), "output": (4, 16), "convolution": (6, 2, 3, 3)}
    assert rates.width(shapes.values()) == 4


@pytest.mark.parametrize(
    ("overrides", "factor"),
    [
        (["method=dense"], 1.0),
        (["method=lora"], 0.25 ** -(1 / 3)),
        (["method=partial"], 1.0),  # drawn and scaled for its density
        (["method=partial", "mask.row_exponent=0", "mask.fan_in=dense"], 0.25**-0.5),
        (["method=entries"], 0.25 ** -(2 / 3)),
        (["method=partial", "mask.row_exponent=0"], 0.25 ** -(1 / 3)),
        (["method=random_weights"], 1.5 * 0.25**-0.5),
        (["method=shira", "mask.row_exponent=1"], 1.5 * 0.25**-0.5),  # which it has no use for
        (["method=dense", "trainer.loraplus_ratio=16"], 0.5),
        (["method=lokr"], 4.0),
        (["method=full"], 0.015),
    ],
)
def test_the_rate_by_default_suits_method_and_density(overrides: list[str], factor: float) -> None:
    chosen = versions.plain(composed(*overrides))
    assert chosen["trainer"]["learning_rate"] == AUTO
    assert rates.auto(chosen, width=768, density=0.25) == pytest.approx(factor * 1e-3, rel=1e-3)
    assert rates.auto(chosen, width=384, density=0.25) == pytest.approx(factor * 2e-3, rel=1e-3)


def test_a_rate_that_is_set_holds_and_the_head_has_the_dense_one_beside_auto() -> None:
    def of(*overrides: str) -> tuple[float, float | None]:
        chosen = composed(*overrides)
        trainer = rates.trainer_of(versions.plain(chosen), chosen.trainer, width=768, density=0.25, has_head=True)
        return trainer.learning_rate, trainer.head_learning_rate

    assert of("method=vera", "trainer.learning_rate=5") == (5.0, None)
    assert of("method=vera", "preset=cpu") == (1e-3, None)  # records were made so
    assert of("method=dense") == (1e-3, None)
    assert of("method=lokr") == (4e-3, 1e-3)
    assert of("method=lokr", "trainer.head_learning_rate=0.5") == (4e-3, 0.5)
    assert of("method=probe") == (25e-3, None)  # whose head is what the rate is for
    probe = versions.plain(composed("method=probe", "method.rate_power=0.5"))
    assert rates.auto(probe, width=768, density=0.0) == pytest.approx(25e-3)


def test_a_run_that_leaves_its_rate_open_has_an_id_that_knows_the_factor() -> None:
    ids = {
        identity.run_id(composed("method=lora", *more))
        for more in ([], ["method.rate_factor=2"], ["trainer.learning_rate=2e-3"])
    }
    assert len(ids) == 3
    beside = (composed("trainer.learning_rate=2e-3", f"method.rate_factor={factor}") for factor in (1, 2))
    assert len({identity.run_id(chosen) for chosen in beside}) == 1


@pytest.mark.parametrize("value", ["0", "-1", "fast", "null", "true", "inf"])
def test_what_is_no_learning_rate_is_refused(value: str) -> None:
    with refusal("trainer.learning_rate"):
        composed(f"trainer.learning_rate={value}")


def test_the_page_has_the_factors_of_the_methods() -> None:
    root = schema.conf_dir().parent
    page = (root / "docs" / "concepts" / "learning-rates.md").read_text(encoding="utf-8")
    table = page.split("| method | factor |")[1].split("\n\n")[0]
    shown = {
        name.strip("`").replace("(IA)³", "ia3").replace("-", "").lower(): float(factor)
        for names, factor in re.findall(r"^\| (.+?) \| ([\d.]+) \|", table, re.MULTILINE)
        for name in names.split(", ")
        if not names.startswith(("dense LoRA", "LoRA+"))
    }
    files = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in root.glob("conf/method/*.yaml")}
    own = {name: of.get("method", of) for name, of in files.items()}  # of a file that sets masks, too, its method
    assert shown == {name: of["rate_factor"] for name, of in own.items() if "rate_factor" in of}


@pytest.mark.parametrize(
    ("settings", "times_dense"),
    [
        ({"sparsity": 0.0}, 1.0),
        ({"sparsity": 0.87}, 1.0),
        ({"sparsity": 0.87, "granularity": "element"}, 3.9),
        ({"sparsity": 0.0, "columns": "frozen"}, 4.0),
        ({"sparsity": 0.0, "columns": "one_hot"}, 3.0),
        ({"sparsity": 0.74, "columns": "frozen", "granularity": "element"}, 2.0 * 0.13 ** (-1 / 2)),
    ],
)
def test_an_adapter_made_in_python_has_the_rate_of_the_command_line(settings, times_dense) -> None:
    base = torch.nn.Sequential(torch.nn.Linear(384, 384))
    model = get_peft_model(base, PartialLoraConfig(r=16, target_modules=["0"], **settings))
    expected = times_dense * rates.dense_rate(384)
    assert learning_rate(model) == pytest.approx(expected, rel=0.03)
