"""The best learning rate of a search on validation, and searches that are not the same for all."""

from __future__ import annotations

from pathlib import Path

import pytest
from searched_rates import RATES, known, run, search

from partial_lora import rate_search, results, runs
from partial_lora.errors import PartialLoraError


def test_the_rate_is_that_of_the_best_validation() -> None:
    found, left_out = rate_search.best_rates(
        [*search([0.5, 0.9, 0.8, None], "method=lora"), *search([0.5, 0.6, 0.7, 0.8], "calibration.budget=0.13")]
    )
    assert left_out == []
    lora, partial = found
    assert lora == {
        "task": "digits",
        "model": "tiny_vit",
        "method": "lora",
        "masks": "–",
        "operating_point": "–",
        "learning_rate": 3e-3,
        "metric": "accuracy",
        "validation": 0.9,
        "tried": {"0.001": 0.5, "0.003": 0.9, "0.01": 0.8, "0.03": None},
        "losses": {"0.001": 1.0, "0.003": 1.0, "0.01": 1.0, "0.03": None},
        "seeds": [0],
        "at_edge": False,
        "settings": lora["settings"],
    }
    of_lora, of_partial = lora["settings"], partial["settings"]
    length = {"trainer.epochs": 5.0, "trainer.max_steps": None, "trainer.batch_size": 32}
    assert length.items() <= of_lora.items()
    assert of_lora["model.architecture"] == known()["model"]["architecture"]
    assert of_partial == of_lora  # nothing of either is other than the schema has it
    assert (partial["operating_point"], partial["learning_rate"], partial["at_edge"]) == ("budget 0.13", 3e-2, True)


def test_equals_are_told_apart_by_loss_and_seeds_are_averaged() -> None:
    even = [run(rate, 0.9, "method=lora", loss=loss) for rate, loss in zip(RATES, (3, 1, 1, 2), strict=True)]
    assert rate_search.best_rates(even)[0][0]["learning_rate"] == 3e-3
    two = [*search([0.2, 0.9, 0.5, 0.4], "method=lora"), *search([0.2, 0.1, 0.7, 0.4], "method=lora", seed=1)]
    (found,), _ = rate_search.best_rates(two)
    assert (found["learning_rate"], found["validation"], found["seeds"]) == (1e-2, pytest.approx(0.6), [0, 1])
    two[1] |= {"status": "failed", "error": "the loss is not finite", "metrics": {}}
    two[2] |= {"status": "failed", "error": "the loss is not finite", "metrics": {}}
    assert rate_search.best_rates(two)[0][0]["learning_rate"] == 3e-2  # a rate that one seed fails at is none


def test_every_method_is_searched_for_as_long() -> None:
    lora = search([0.5, 0.9, 0.8, 0.7], "method=lora")

    def beside(*overrides: str, rates=RATES, seed: int = 0) -> None:
        rate_search.best_rates([*lora, *(run(rate, 0.5, *overrides, seed=seed) for rate in rates)])

    beside("method=dora")
    beside("method=partial", "trainer.eval_batch_size=8", "calibration.reliability=true", "method.rank=4")
    refused = {
        ("trainer.epochs=9",): r"dora was tuned with trainer\.epochs=9, .* lora with trainer\.epochs=5: a search",
        ("trainer.max_steps=3",): r"dora was tuned with trainer\.max_steps=3, .* lora with trainer\.max_steps=null",
        ("trainer.batch_size=8",): r"with trainer\.batch_size=8, .* with trainer\.batch_size=32: a search must be",
        ("task.train_samples=90",): r"with task\.train_samples=90, .* with task\.train_samples=null: a search must be",
    }
    for overrides, said in refused.items():
        with pytest.raises(PartialLoraError, match=said):
            beside("method=dora", *overrides)
    with pytest.raises(PartialLoraError, match=r"dora was tuned with 5 learning rates, .* with 4 learning rates: a"):
        beside("method=dora", rates=(*RATES, 1e-1))
    with pytest.raises(PartialLoraError, match=r"dora was tuned with seeds \[7\], .* with seeds \[0\]: a search"):
        beside("method=dora", seed=7)
    with pytest.raises(PartialLoraError, match="3 learning rates, expected at least 4"):
        rate_search.best_rates(lora[:3])
    with pytest.raises(PartialLoraError, match="no learning rate had a finite loss; search lower"):
        rate_search.best_rates(search([None] * 4, "method=lora"))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainer.epochs=50", r"trainer\.epochs=5 at learning rate 0\.001, 50 at 0\.003"),
        ("method.rank=4", r"method\.rank=16 at learning rate 0\.001, 4 at 0\.003"),
        ("importance=random", r"importance\.name=svd at learning rate 0\.001, random at 0\.003"),
        ("calibration.axes=joint", r"calibration\.axes=separate at learning rate 0\.001, joint at 0\.003"),
        ("task.train_samples=90", r"task\.train_samples=null at learning rate 0\.001, 90 at 0\.003"),
        ("model.target_modules=[attn.qkv]", r"model\.target_modules=\[.*\] at learning rate 0\.001, \[attn\.qkv\] at"),
    ],
)
def test_the_runs_of_one_search_agree_in_every_setting_that_matters(override: str, said: str) -> None:
    found = search([0.5, 0.6, 0.7, 0.6])
    for mixed in ([found[0], run(3e-3, 0.9, override), *found[2:]], [*found, run(3e-3, 0.9, override)]):
        with pytest.raises(PartialLoraError, match=rf"partial \(rows_columns, threshold 0\.9\): {said}.*a search must"):
            rate_search.best_rates(mixed)


def test_every_rate_is_tried_with_the_same_seeds() -> None:
    once = search([0.5, 0.6, 0.7, 0.6], "method=lora")
    said = r"lora: seeds \[0\] at learning rate 0\.001, \[0,1\] at 0\.01: a search must be the same for all; run"
    with pytest.raises(PartialLoraError, match=said):
        rate_search.best_rates([*once, run(1e-2, 0.1, "method=lora", seed=1)])
    assert rate_search.best_rates([*once, *search([0.5] * 4, "method=lora", seed=1)])[0][0]["seeds"] == [0, 1]


def test_what_is_not_calibrated_has_neither_masks_nor_points() -> None:
    plain = search([0.5, 0.9, 0.8, 0.7], "method=lora")
    masked = [run(rate, 0.5, "method=lora", "mask=element", "calibration=budget", seed=1) for rate in RATES]
    (found,), _ = rate_search.best_rates([*plain, *masked])
    assert (found["masks"], found["operating_point"], found["seeds"]) == ("–", "–", [0, 1])


def test_a_search_with_a_calibration_file_is_at_its_point(tmp_path: Path) -> None:
    calibration = tmp_path / "calibration.json"
    results.write_json(calibration, {"threshold": 0.42, "budget": 0.13})
    found = search([0.5, 0.6, 0.9, 0.8], f"calibration.file={calibration}")
    for each in found:
        each["calibration"] = {"threshold": 0.42, "budget": 0.13, "axes": "joint", "search": "scan"}
    ((entry,), _) = rate_search.best_rates(found)
    assert entry["operating_point"] == runs.operating_point(found[0]) == "budget 0.13"
    assert entry["settings"]["calibration.axes"] == "joint"


def test_a_run_that_failed_in_another_way_is_left_out_and_said() -> None:
    interrupted = run(1e-1, None, "method=lora") | {"error": "interrupted"}
    found, left_out = rate_search.best_rates([*search([0.5, 0.9, 0.8, 0.7], "method=lora"), interrupted])
    assert len(found[0]["tried"]) == 4
    assert left_out == ["digits, tiny_vit, lora, learning rate 0.1: interrupted"]


def test_a_search_goes_on_with_what_the_file_has_tried() -> None:
    before, _ = rate_search.best_rates(search([0.5, 0.9, 0.9, None], "method=lora"))
    higher = [run(1e-1, 0.8, "method=lora", loss=2.0)]
    (found,), _ = rate_search.best_rates(higher, before)
    assert found["tried"] == {"0.001": 0.5, "0.003": 0.9, "0.01": 0.9, "0.03": None, "0.1": 0.8}
    assert found["losses"] == before[0]["losses"] | {"0.1": 2.0}
    assert (found["learning_rate"], found["at_edge"]) == (3e-3, False)
    (found,), _ = rate_search.best_rates([run(3e-4, 0.95, "method=lora")], before)
    assert (found["learning_rate"], found["at_edge"]) == (3e-4, True)
    (found,), _ = rate_search.best_rates(search([0.5, 0.6, 0.7, 0.8], "method=dora"), before)
    assert list(found["tried"]) == ["0.001", "0.003", "0.01", "0.03"]


def test_where_losses_were_not_kept_the_choice_among_equals_stands() -> None:
    even = [run(rate, 0.9, "method=lora", loss=loss) for rate, loss in zip(RATES, (3, 1, 2, 2), strict=True)]
    (before,), _ = rate_search.best_rates(even)
    del before["losses"]
    (found,), _ = rate_search.best_rates([run(3e-4, 0.9, "method=lora", loss=0.01)], [before])
    assert found["learning_rate"] == before["learning_rate"] == 3e-3
    assert found["losses"] == dict.fromkeys(before["tried"]) | {"0.0003": 0.01}


@pytest.mark.parametrize(
    ("overrides", "seed", "said"),
    [
        (("trainer.epochs=9",), 0, "trainer.epochs=5 in the file, 9 in the runs"),
        ((), 1, r"seeds=\[0\] in the file, \[1\] in the runs"),
    ],
)
def test_a_search_goes_on_with_the_same_settings_and_seeds(overrides, seed: int, said: str) -> None:
    before, _ = rate_search.best_rates(search([0.5, 0.9, 0.8, 0.7], "method=lora"))
    with pytest.raises(PartialLoraError, match=said):
        rate_search.best_rates([run(1e-1, 0.5, "method=lora", *overrides, seed=seed)], before)
