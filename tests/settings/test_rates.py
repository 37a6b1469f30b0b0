"""Learning rates: operating points, the file of rates, and the runs that read it."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest
import yaml
from checkout import RESULTS, needs_results
from refusals import refusal
from searched_rates import best, run, search

from partial_lora import files
from partial_lora.launching import directory
from partial_lora.settings import identity, rates, schema, tuned, versions
from partial_lora.settings.compose import composed
from partial_lora.settings.schema import Config
from partial_lora.training.config import AUTO


@pytest.mark.parametrize(
    ("point", "others", "expected"),
    [
        ("threshold 0.9", ["threshold 0.9", "threshold 0.91"], "threshold 0.9"),
        ("threshold 0.6", ["threshold 0.9", "threshold 0.7", "budget 0.6"], "threshold 0.7"),
        ("threshold 0.7", ["threshold 0.6", "threshold 0.8"], "threshold 0.8"),  # as near, though not in binary
        ("budget 0.05", ["budget 0.01", "budget 0.13"], "budget 0.13"),  # by ratio; by difference it were 0.01
        ("budget 20,000", ["budget 0.13", "budget 10,000", "budget 2,000,000"], "budget 10,000"),
        ("budget 0.13", ["threshold 0.9", "budget 10,000"], None),
        ("sparsity 0.95", ["sparsity 0.99", "sparsity 0.87", "budget 0.05"], "sparsity 0.87"),  # by what is kept
        ("sparsity of modules 0a1b2c", ["sparsity of modules 12e345", "sparsity 0.5"], None),
    ],
)
def test_the_nearest_operating_point(point: str, others: list[str], expected: str | None) -> None:
    assert tuned.nearest(point, others) == expected


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


def test_a_point_in_words() -> None:
    assert tuned.operating_point({"threshold": 0.9}) == "threshold 0.9"
    assert tuned.operating_point({"threshold": 0.42, "budget": 0.13}) == "budget 0.13"
    assert tuned.operating_point({"threshold": 0.9, "budget": 153344.0}) == "budget 153,344"  # to the last parameter
    assert tuned.operating_point({"threshold": 0.9, "budget": None, "sparsity": 0.87}) == "sparsity 0.87"
    assert tuned.operating_point({"threshold": 0.9, "budget": 0.05, "sparsity": "uniform"}) == "budget 0.05"
    modules = [tuned.operating_point({"sparsity": {"qkv": share}}) for share in (0.5, 0.5, 0.6)]
    assert modules[0] == modules[1] != modules[2]


@functools.cache
def searched() -> list[dict]:
    """The best rates: 0.003 of lora, 0.01 of partial at threshold 0.9 and 0.03 at budget 0.13."""
    budget = search([0.5, 0.6, 0.7, 0.8], "calibration=budget")
    return best(*search([0.5, 0.9, 0.8, 0.7], "method=lora"), *search([0.5, 0.6, 0.9, 0.8]), *budget)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "results" / "tuning.json"
    tuned.save(path, searched())
    return path


def composed_with(file: Path, overrides: str, *more: str) -> Config:
    """Compose with a file of rates; one of MORE may hold a path, and so a space."""
    return composed("model=tiny_vit", f"trainer.tuned={file}", *overrides.split(), *more)


def tuning_of(chosen: Config) -> str:
    """Return where the rate of a run is from, as its record has it."""
    return directory.new(versions.plain(chosen))["tuning"]


@pytest.mark.parametrize(
    ("overrides", "rate"),
    [
        ("method=lora", 3e-3),
        ("method=lora calibration=budget mask=element importance=random", 3e-3),  # it reads none of these
        ("method=partial", 1e-2),
        ("calibration=budget", 3e-2),
        ("calibration.reliability=true calibration.seed=3 mask.seed=2 seed=9 trainer.num_processes=2", 1e-2),
    ],
)
def test_runs_find_their_rate_in_the_file(file: Path, overrides: str, rate: float) -> None:
    chosen = composed_with(file, overrides)
    by_hand = composed("model=tiny_vit", f"trainer.learning_rate={rate}", *overrides.split())
    assert chosen.trainer.learning_rate == rate
    assert (tuning_of(chosen), tuning_of(by_hand)) == ("tuned", "untuned")
    assert identity.run_id(chosen) == identity.run_id(by_hand)  # how the rate was found changes nothing


def test_a_file_of_an_earlier_version_was_searched_by_what_was_usual_then(file: Path) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"version": 3}))  # before trainer.select_within
    assert tuning_of(composed_with(file, "trainer.select_within=0")) == "tuned"
    assert tuning_of(composed_with(file, "")) == "tuned elsewhere (trainer.select_within=0)"


@pytest.mark.parametrize(
    ("overrides", "missing"),
    [
        ("method=dora", "method=dora"),
        ("mask=element", "method=partial, masks=element, operating_point=threshold 0.9"),
        ("calibration.budget=1000", "operating_point=budget 1,000"),  # of no share
        ("task=cifar10", "task=cifar10"),
        ("task=cifar10 trainer.tuned_on=gtsrb", "task=cifar10"),
        ("trainer.tuned=nowhere.json", "nowhere.json"),
        ("trainer.tuned_elsewhere=here", "_elsewhere: no such key"),
    ],
)
def test_a_run_without_a_rate_is_refused_by_what_is_missing(file: Path, overrides: str, missing: str) -> None:
    with refusal(rf"trainer\.tuned.*{missing}"):
        composed_with(file, overrides)


def test_a_rate_beside_the_file_that_sets_it_is_refused(file: Path, tmp_path: Path) -> None:
    with refusal("trainer.learning_rate=0.1: "):
        composed_with(file, "trainer.learning_rate=0.1")
    own = tmp_path / "own.yaml"
    own.write_text("model: tiny_vit\ntrainer.learning_rate: 0.1\n")
    with refusal("trainer.learning_rate=0.1: "):
        composed_with(file, "", str(own))
    assert composed_with(file, "", str(own), "trainer.tuned=null").trainer.learning_rate == 0.1
    record = tmp_path / "config.yaml"
    record.write_text(yaml.safe_dump(versions.plain(composed_with(file, ""))))
    assert (
        composed(str(record), "importance=random").trainer.learning_rate
        == composed_with(file, "").trainer.learning_rate
    )
    assert composed_with(file, "trainer.tuned=null trainer.learning_rate=0.1").trainer.learning_rate == 0.1


@pytest.mark.parametrize(
    ("overrides", "rate", "where"),
    [
        ("calibration.threshold=0.7", 1e-2, "tuned at threshold 0.9"),
        ("calibration.budget=0.05", 3e-2, "tuned at budget 0.13"),
        ("trainer.epochs=100", 1e-2, "tuned elsewhere (trainer.epochs=null)"),
        ("method=lora method.rank=1", 3e-3, "tuned elsewhere (method.rank=16)"),
        ("importance=random mask.seed=1", 1e-2, "tuned elsewhere (importance.name=svd)"),
        (
            "method=lora method.rank=1 method.alpha=999 trainer.batch_size=512 trainer.epochs=9 task.train_samples=90",
            3e-3,
            "tuned elsewhere (trainer.batch_size=16, trainer.epochs=null, method.alpha=16, 2 more)",
        ),
        ("task=cifar10 method=lora", 3e-3, "tuned on digits"),
        ("task=cifar10 calibration.threshold=0.7 task.train_samples=90", 1e-2, "tuned on digits at threshold 0.9"),
        (
            "task=cifar10 calibration.budget=0.05 trainer.epochs=9",
            3e-2,
            "tuned elsewhere (task=digits, budget 0.13, trainer.epochs=null)",
        ),
    ],
)
def test_a_run_says_where_its_rate_was_found_if_not_for_such_a_run(file: Path, overrides, rate, where) -> None:
    chosen = composed_with(file, f"{overrides} trainer.tuned_on=digits")
    assert chosen.trainer.learning_rate == rate
    assert tuning_of(chosen) == where


def test_what_spends_a_budget_without_a_calibration_has_rates_by_budget(file: Path) -> None:
    values = {0.13: [0.5, 0.9, 0.8, 0.7], 0.02: [0.5, 0.6, 0.7, 0.8]}
    for share, each in values.items():
        tuned.save(file, best(*search(each, "method=entries", f"calibration.budget={share}")))
    chosen = [composed_with(file, f"method=entries calibration.budget={share}") for share in (0.13, 0.02, 0.015)]
    assert [each.trainer.learning_rate for each in chosen] == [3e-3, 3e-2, 3e-2]
    assert [tuning_of(each) for each in chosen] == ["tuned", "tuned", "tuned at budget 0.02"]


def test_a_tuned_rate_is_that_of_the_adapter(file: Path) -> None:
    own = "trainer.head_learning_rate=2e-3 trainer.loraplus_ratio=4"
    chosen = composed_with(file, own)
    assert chosen.trainer.learning_rates == {"adapter": 1e-2, "B": 4e-2, "head": 2e-3}
    assert tuning_of(chosen) == "tuned elsewhere (trainer.head_learning_rate=null, trainer.loraplus_ratio=1)"
    tuned.save(file, best(*search([0.9, 0.8, 0.7, 0.6], *own.split())))
    chosen = composed_with(file, own)
    assert chosen.trainer.learning_rates == {"adapter": 1e-3, "B": 4e-3, "head": 2e-3}
    assert tuning_of(chosen) == "tuned"


def test_a_task_with_rates_of_its_own_needs_none_to_stand_in(file: Path) -> None:
    tuned.save(file, best(*search([0.9, 0.8, 0.7, 0.6], "task=cifar10")))
    own, usual = (composed_with(file, f"{task} trainer.tuned_on=digits") for task in ("task=cifar10", "task=digits"))
    assert (own.trainer.learning_rate, usual.trainer.learning_rate) == (1e-3, 1e-2)
    assert {tuning_of(each) for each in (own, usual)} == {"tuned"}
    assert identity.run_id(usual) == identity.run_id(
        composed_with(file, "")
    )  # what might have stood in changes nothing


def test_a_calibration_file_has_its_own_operating_point(file: Path, tmp_path: Path) -> None:
    calibration = tmp_path / "calibration.json"
    content = {"version": 1, "threshold": 0.42, "budget": 0.13, "axes": "separate", "scope": "independent"}
    expected = {"tuned": content, "tuned elsewhere (budget 0.13, calibration.axes=separate)": {"axes": "joint"}}
    for where, changes in expected.items():
        files.write_json(calibration, content | changes | ({"budget": 0.2} if len(changes) == 1 else {}))
        chosen = composed_with(file, "", f"calibration.file={calibration}")
        assert chosen.trainer.learning_rate == 3e-2  # of budget 0.13, though the settings have threshold 0.9
        assert tuning_of(chosen) == where
    files.write_json(calibration, {})
    with refusal(f"calibration.file={calibration}: "):
        composed_with(file, "", f"calibration.file={calibration}")
    assert (
        composed_with(file, "method=lora", f"calibration.file={calibration}").trainer.learning_rate == 3e-3
    )  # it reads none


def test_a_runs_id_is_of_the_rate_and_not_of_the_file(file: Path) -> None:
    before, other = identity.run_id(composed_with(file, "method=lora")), file.with_name("other.json")
    other.write_bytes(file.read_bytes())
    tuned.save(other, best(*search([0.9, 0.8, 0.8, 0.7], "method=dora")))  # beside what was there
    assert identity.run_id(composed_with(other, "method=lora")) == before
    tuned.save(other, best(*search([0.5, 0.8, 0.9, 0.7], "method=lora")))
    assert identity.run_id(composed_with(other, "method=lora")) != before
    assert [entry["method"] for entry in tuned.load(other)] == ["dora", "lora", "partial", "partial"]


def test_a_file_takes_only_what_was_searched_for_alike(file: Path) -> None:
    before = file.read_bytes()
    longer = best(*search([0.5] * 4, "method=dora", "trainer.epochs=9"))
    more = best(*search([0.5] * 4, "method=lora"), run(1e-1, 0.5, "method=lora"))
    again = best(*search([0.5] * 4, "method=lora", seed=3))
    for entries, values in (
        (longer, r"lora .*trainer\.epochs=null, .*dora .*trainer\.epochs=9"),
        (more, r"lora .*5 learning rates, .*partial \(rows_columns, budget 0\.13\) with 4"),
        (again, r"lora .*seeds \[3\], .* seeds \[0\]"),
    ):
        with refusal(f".*{values}"):
            tuned.save(file, entries)
        assert file.read_bytes() == before
    tuned.save(file, [entry | {"task": "trec"} for entry in longer])  # of another task, as long as it likes
    assert [entry["task"] for entry in tuned.load(file)] == ["digits"] * 3 + ["trec"]


@pytest.mark.parametrize(
    "content",
    ["{", '{"version": 2}', '{"version": 1, "entries": []}', '{"version": 2, "entries": [{"learning_rate": 0.1}]}'],
)
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "it.json").write_text(content)
    with refusal(f"trainer.tuned={tmp_path / 'it.json'}: "):
        composed_with(tmp_path / "it.json", "")


def test_experiments_search_without_a_file_and_compare_with_it(file: Path) -> None:
    searching = composed("experiment=tune", "method=lora")
    assert searching.trainer.tuned is None
    comparing = composed_with(file, "experiment=methods method=lora")
    assert comparing.trainer.epochs == searching.trainer.epochs
    assert comparing.trainer.learning_rate == 3e-3


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
def test_rates_that_were_searched_for_are_within_a_step_of_the_one_to_try_first() -> None:
    entries = {tuned.key_in(entry): entry["learning_rate"] for entry in tuned.load(RESULTS / "tuning.json")}
    masked = {key: rate for key, rate in entries.items() if key[2] == "partial" and key[-1].startswith("budget")}
    assert len(masked) > 9
    for (task, model, *_, point), rate in masked.items():
        dense = entries[task, model, "lora", tuned.NO_POINT, tuned.NO_POINT]
        expected = rates.starting_rate(dense, float(point.removeprefix("budget ")))
        assert expected / 3.01 < rate < expected * 3.01


def test_the_dense_rate_falls_as_models_get_wider() -> None:
    found = [rates.dense_rate(width) for width in (32, 384, 768, 4096)]
    assert found == [2e-3, 2e-3, 1e-3, pytest.approx(1.9e-4, rel=0.02)]
    shapes = {"query": (8, 4), "key": (8, 4), "output": (4, 16), "convolution": (6, 2, 3, 3)}
    assert rates.width(shapes.values()) == 4


@pytest.mark.parametrize(
    ("overrides", "factor"),
    [
        (["method=lora"], 1.0),
        (["method=partial"], 1.0),  # drawn and scaled for its density
        (["method=partial", "mask.row_exponent=0", "mask.fan_in=dense"], 0.25**-0.5),
        (["method=entries"], 0.25 ** -(2 / 3)),
        (["method=partial", "mask.row_exponent=0"], 0.25 ** -(1 / 3)),
        (["method=random_weights"], 1.5 * 0.25**-0.5),
        (["method=shira", "mask.row_exponent=1"], 1.5 * 0.25**-0.5),  # which it has no use for
        (["method=lora", "trainer.loraplus_ratio=16"], 0.5),
        (["method=lokr"], 4.0),
        (["method=full"], 0.015),
    ],
)
def test_the_rate_by_default_suits_method_and_density(overrides: list[str], factor: float) -> None:
    chosen = versions.plain(composed(*overrides))
    assert chosen["trainer"]["learning_rate"] == AUTO
    assert rates.auto(chosen, width=768, density=0.25) == pytest.approx(factor * 1e-3)
    assert rates.auto(chosen, width=384, density=0.25) == pytest.approx(factor * 2e-3)


def test_a_rate_that_is_set_holds_and_the_head_has_the_dense_one_beside_auto() -> None:
    def of(*overrides: str) -> tuple[float, float | None]:
        chosen = composed(*overrides)
        trainer = rates.trainer_of(versions.plain(chosen), chosen.trainer, width=768, density=0.25, has_head=True)
        return trainer.learning_rate, trainer.head_learning_rate

    assert of("method=vera", "trainer.learning_rate=5") == (5.0, None)
    assert of("method=vera", "preset=cpu", "trainer.tuned=null") == (1e-3, None)  # records were made so
    assert of("method=lora") == (1e-3, None)
    assert of("method=lokr") == (4e-3, 1e-3)
    assert of("method=lokr", "trainer.head_learning_rate=0.5") == (4e-3, 0.5)
    assert of("method=probe") == (25e-3, None)  # whose head is what the rate is for


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
