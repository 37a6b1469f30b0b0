"""Learning rates: operating points, the file of rates, and the runs that read it."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import tune
from searched_rates import RATES, run, search

from partial_lora import files
from partial_lora.errors import PartialLoraError
from partial_lora.runs import config, directory, rates
from partial_lora.runs.compose import composed
from partial_lora.runs.schema import Config


@pytest.mark.parametrize(
    ("point", "others", "expected"),
    [
        ("threshold 0.9", ["threshold 0.9", "threshold 0.91"], "threshold 0.9"),
        ("threshold 0.6", ["threshold 0.9", "threshold 0.7", "budget 0.6"], "threshold 0.7"),
        ("threshold 0.7", ["threshold 0.6", "threshold 0.8"], "threshold 0.8"),  # as near, though not in binary
        ("budget 0.05", ["budget 0.01", "budget 0.13"], "budget 0.13"),  # by ratio; by difference it were 0.01
        ("budget 20,000", ["budget 0.13", "budget 10,000", "budget 2,000,000"], "budget 10,000"),
        ("budget 0.13", ["threshold 0.9", "budget 10,000"], None),
    ],
)
def test_the_nearest_operating_point(point: str, others: list[str], expected: str | None) -> None:
    assert rates.nearest(point, others) == expected


def test_a_point_in_words() -> None:
    assert rates.operating_point({"threshold": 0.9}) == "threshold 0.9"
    assert rates.operating_point({"threshold": 0.42, "budget": 0.13}) == "budget 0.13"
    assert rates.operating_point({"threshold": 0.9, "budget": 153344.0}) == "budget 153,344"  # to the last parameter


@functools.cache
def searched() -> list[dict]:
    found, _ = tune.best_rates(
        [
            *search([0.5, 0.9, 0.8, 0.7], "method=lora"),
            *search([0.5, 0.6, 0.9, 0.8]),
            *search([0.5, 0.6, 0.7, 0.8], "calibration=budget"),
        ]
    )
    return found


def tuning_of(chosen: Config) -> str:
    """Return what a record says of where the rate of a run is from."""
    return directory.new(config.plain(chosen))["tuning"]


def test_what_spends_a_budget_without_a_calibration_has_rates_by_budget(tmp_path: Path) -> None:
    entries = [search(worths, "method=entries", f"calibration.budget={share}") for share, worths in WORTHS.items()]
    rates.save(tmp_path / "tuning.json", tune.best_rates([run for each in entries for run in each])[0])
    given = ("model=tiny_vit", "method=entries", f"trainer.tuned={tmp_path / 'tuning.json'}")
    found = {share: composed(*given, f"calibration.budget={share}") for share in (0.13, 0.02)}
    assert {share: each.trainer.learning_rate for share, each in found.items()} == {0.13: 3e-3, 0.02: 3e-2}
    assert {tuning_of(each) for each in found.values()} == {"tuned"}
    assert tuning_of(composed(*given, "calibration.budget=0.015")) == "tuned at budget 0.02"


WORTHS = {0.13: [0.5, 0.9, 0.8, 0.7], 0.02: [0.5, 0.6, 0.7, 0.8]}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "results" / "tuning.json"
    rates.save(path, searched())
    return path


def test_runs_find_their_rate_in_the_file(file: Path) -> None:
    given = ("model=tiny_vit", f"trainer.tuned={file}")
    expected = {
        "method=lora": 3e-3,
        "method=lora calibration=budget mask=element importance=random": 3e-3,  # it reads none of these
        "method=partial": 1e-2,
        "calibration=budget": 3e-2,
        "calibration.reliability=true calibration.seed=3 mask.seed=2 seed=9 trainer.num_processes=2": 1e-2,
    }
    for overrides, rate in expected.items():
        settings = composed(*given, *overrides.split())
        assert settings.trainer.learning_rate == rate
        plain = composed("model=tiny_vit", f"trainer.learning_rate={rate}", *overrides.split())
        assert config.run_id(settings) != config.run_id(plain)  # they say of themselves how they got it
        assert tuning_of(settings) == "tuned"
        assert tuning_of(plain) == "untuned"
    for overrides, lacking in {
        "method=dora": "method=dora",
        "mask=element": "method=partial, masks=element, operating_point=threshold 0.9",
        "calibration.budget=1000": "method=partial, masks=rows_columns, operating_point=budget 1,000",  # of no share
    }.items():
        with pytest.raises(PartialLoraError, match=rf"trainer\.tuned=.* task=digits, model=tiny_vit, .*{lacking}"):
            composed(*given, *overrides.split())


@pytest.mark.parametrize(
    ("overrides", "rate", "where"),
    [
        ("calibration.threshold=0.7", 1e-2, "tuned at threshold 0.9"),
        ("calibration.budget=0.05", 3e-2, "tuned at budget 0.13"),
        ("trainer.epochs=100", 1e-2, "tuned elsewhere (trainer.epochs=5)"),
        ("method=lora method.rank=1", 3e-3, "tuned elsewhere (method.rank=16)"),
        ("importance=random mask.seed=1", 1e-2, "tuned elsewhere (importance.name=svd)"),
        (
            "calibration.threshold=0.7 trainer.batch_size=512",
            1e-2,
            "tuned elsewhere (threshold 0.9, trainer.batch_size=32)",
        ),
        (
            "method=lora method.rank=1 method.alpha=999 trainer.batch_size=512 trainer.epochs=9 task.train_samples=90",
            3e-3,
            "tuned elsewhere (trainer.batch_size=32, trainer.epochs=5, method.alpha=16, 2 more)",
        ),
    ],
)
def test_a_run_says_where_its_rate_was_found_if_not_for_such_a_run(file: Path, overrides, rate, where) -> None:
    settings = composed("model=tiny_vit", f"trainer.tuned={file}", *overrides.split())
    assert settings.trainer.learning_rate == rate
    assert tuning_of(settings) == where
    again = replace(settings, trainer=replace(settings.trainer, tuned_elsewhere=None))
    assert config.run_id(again) != config.run_id(settings)  # found for it later, the same rate is another fact
    with pytest.raises(Exception, match=r"trainer\.tuned_elsewhere=here"):
        composed("model=tiny_vit", "trainer.tuned_elsewhere=here")


@pytest.mark.parametrize(
    ("overrides", "rate", "where"),
    [
        ("method=lora", 3e-3, "tuned on digits"),
        ("calibration=budget", 3e-2, "tuned on digits"),
        ("calibration.threshold=0.7 task.train_samples=90", 1e-2, "tuned on digits at threshold 0.9"),
        (
            "calibration.budget=0.05 trainer.epochs=9",
            3e-2,
            "tuned elsewhere (task=digits, budget 0.13, trainer.epochs=5)",
        ),
    ],
)
def test_another_tasks_rates_stand_in_where_that_is_asked_for(file: Path, overrides, rate, where) -> None:
    given = ("model=tiny_vit", "task=cifar10", f"trainer.tuned={file}", *overrides.split())
    with pytest.raises(PartialLoraError, match=r"trainer\.tuned=.* task=cifar10.*trainer\.tuned_on"):
        composed(*given)
    settings = composed(*given, "trainer.tuned_on=digits")
    assert settings.trainer.learning_rate == rate
    assert tuning_of(settings) == where
    with pytest.raises(PartialLoraError, match=r"trainer\.tuned=.* task=cifar10"):
        composed(*given, "trainer.tuned_on=gtsrb")


def test_a_tuned_rate_is_that_of_the_adapter(file: Path) -> None:
    own = ("trainer.head_learning_rate=2e-3", "trainer.loraplus_ratio=4")
    settings = composed("model=tiny_vit", f"trainer.tuned={file}", *own)
    assert settings.trainer.learning_rates == {"adapter": 1e-2, "B": 4e-2, "head": 2e-3}
    assert tuning_of(settings) == "tuned elsewhere (trainer.head_learning_rate=null, trainer.loraplus_ratio=1)"
    rates.save(file, tune.best_rates(search([0.9, 0.8, 0.7, 0.6], *own))[0])
    settings = composed("model=tiny_vit", f"trainer.tuned={file}", *own)
    assert settings.trainer.learning_rates == {"adapter": 1e-3, "B": 4e-3, "head": 2e-3}
    assert tuning_of(settings) == "tuned"


def test_a_task_with_rates_of_its_own_needs_none_to_stand_in(file: Path) -> None:
    rates.save(file, tune.best_rates(search([0.9, 0.8, 0.7, 0.6], "task=cifar10"))[0])
    given = ("model=tiny_vit", f"trainer.tuned={file}", "trainer.tuned_on=digits")
    own, none = composed(*given, "task=cifar10"), composed(*given)
    assert (own.trainer.learning_rate, none.trainer.learning_rate) == (1e-3, 1e-2)
    assert {tuning_of(each) for each in (own, none)} == {"tuned"}
    assert config.run_id(none) == config.run_id(composed(*given[:2]))  # what might have stood in changes nothing


def test_a_calibration_file_has_its_own_operating_point(file: Path, tmp_path: Path) -> None:
    calibration = tmp_path / "calibration.json"
    content = {"version": 1, "threshold": 0.42, "budget": 0.13, "axes": "separate", "scope": "independent"}
    files.write_json(calibration, content)
    given = ("model=tiny_vit", f"trainer.tuned={file}", f"calibration.file={calibration}")
    settings = composed(*given)
    assert settings.trainer.learning_rate == 3e-2  # of budget 0.13, though the settings have threshold 0.9
    assert tuning_of(settings) == "tuned"
    files.write_json(calibration, content | {"axes": "joint", "budget": 0.2})
    assert tuning_of(composed(*given)) == "tuned elsewhere (budget 0.13, calibration.axes=separate)"
    files.write_json(calibration, {})
    with pytest.raises(PartialLoraError, match=r"calibration\.file=.*calibration\.json"):
        composed(*given)
    assert composed(*given, "method=lora").trainer.learning_rate == 3e-3  # which reads no such file


def test_a_runs_id_is_of_the_rate_and_not_of_the_file(file: Path) -> None:
    given = ("model=tiny_vit", "method=lora")
    before = config.run_id(composed(*given, f"trainer.tuned={file}"))
    other = file.with_name("other.json")
    other.write_bytes(file.read_bytes())
    rates.save(other, tune.best_rates(search([0.9, 0.8, 0.8, 0.7], "method=dora"))[0])  # beside what was there
    assert config.run_id(composed(*given, f"trainer.tuned={other}")) == before
    rates.save(other, tune.best_rates(search([0.5, 0.8, 0.9, 0.7], "method=lora"))[0])
    assert config.run_id(composed(*given, f"trainer.tuned={other}")) != before
    assert [entry["method"] for entry in rates.load(other)] == ["dora", "lora", "partial", "partial"]


def test_a_file_takes_only_what_was_searched_for_alike(file: Path) -> None:
    before = file.read_bytes()
    longer = tune.best_rates([run(rate, 0.5, "method=dora", "trainer.epochs=9") for rate in RATES])[0]
    more = tune.best_rates([run(rate, 0.5, "method=lora") for rate in (*RATES, 1e-1)])[0]
    again = tune.best_rates(search([0.5] * 4, "method=lora", seed=3))[0]
    for entries, values in (
        (longer, r"lora .*trainer\.epochs=5, .*dora .*trainer\.epochs=9"),
        (more, r"lora .*5 learning rates, .*partial \(rows_columns, budget 0\.13\) with 4"),
        (again, r"lora .*seeds \[3\], .* seeds \[0\]"),
    ):
        with pytest.raises(PartialLoraError, match=values):
            rates.save(file, entries)
        assert file.read_bytes() == before
    elsewhere = [entry | {"task": "trec"} for entry in longer]
    rates.save(file, elsewhere)  # of another task, as long as it likes
    assert len(rates.load(file)) == 4
    assert [entry for entry in rates.load(file) if entry["task"] == "trec"] == elsewhere


@pytest.mark.parametrize(
    "content",
    [
        "{",
        '{"version": 2}',
        '{"version": 1, "entries": [{"learning_rate": 0.1}]}',
        '{"version": 2, "entries": [{"learning_rate": 0.1}]}',
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "it.json").write_text(content)
    with pytest.raises(PartialLoraError, match=r"trainer\.tuned=.*it\.json"):
        composed("model=tiny_vit", f"trainer.tuned={tmp_path / 'it.json'}")
    with pytest.raises(Exception, match=r"trainer\.tuned=nowhere\.json"):
        composed("trainer.tuned=nowhere.json")


def test_experiments_compose(file: Path) -> None:
    searched = composed("experiment=tune", "method=lora")
    assert searched.trainer.tuned is None
    compared = composed("experiment=methods", "model=tiny_vit", "method=lora", f"trainer.tuned={file}")
    assert compared.trainer.epochs == searched.trainer.epochs
    assert compared.trainer.learning_rate == 3e-3
