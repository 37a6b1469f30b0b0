"""The file of learning rates, what is let into it, and the runs that read it."""

from __future__ import annotations

import copy
import functools
import json
import sys
from pathlib import Path

import pytest
from searched_rates import RATES, composed, run, search

from partial_lora import config, rate_search, record, results, runs, tuning
from partial_lora.errors import PartialLoraError

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import tune


@functools.cache
def searched() -> list[dict]:
    found, _ = rate_search.best_rates(
        [
            *search([0.5, 0.9, 0.8, 0.7], "method=lora"),
            *search([0.5, 0.6, 0.9, 0.8]),
            *search([0.5, 0.6, 0.7, 0.8], "calibration=budget"),
        ]
    )
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "results" / "tuning.json"
    tuning.save(path, searched())
    return path


def test_runs_find_their_rate_in_the_file(file: Path) -> None:
    given = ("model=tiny_vit", f"trainer.tuned={file}")
    rates = {
        "method=lora": 3e-3,
        "method=lora calibration=budget mask=element importance=random": 3e-3,  # it reads none of these
        "method=partial": 1e-2,
        "calibration=budget": 3e-2,
        "calibration.reliability=true calibration.seed=3 mask.seed=2 seed=9 trainer.num_processes=2": 1e-2,
    }
    for overrides, rate in rates.items():
        settings = composed(*given, *overrides.split())
        assert settings["trainer"]["learning_rate"] == rate
        plain = composed("model=tiny_vit", f"trainer.learning_rate={rate}", *overrides.split())
        assert config.run_id(settings) != config.run_id(plain)  # they say of themselves how they got it
        assert record.new(settings)["tuning"] == "tuned"
        assert record.new(plain)["tuning"] == "untuned"
    for overrides, lacking in {
        "method=dora": "method=dora",
        "mask=element": "method=partial, masks=element, operating_point=threshold 0.9",
        "calibration.budget=1000": "method=partial, masks=rows_columns, operating_point=budget 1,000",  # of no share
    }.items():
        said = rf"trainer\.tuned=.*: no learning rate for task=digits, model=tiny_vit, .*{lacking}.*; search for one"
        with pytest.raises(PartialLoraError, match=said):
            composed(*given, *overrides.split())


@pytest.mark.parametrize(
    ("overrides", "rate", "said"),
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
def test_a_run_says_where_its_rate_was_found_if_not_for_such_a_run(file: Path, overrides, rate, said) -> None:
    settings = composed("model=tiny_vit", f"trainer.tuned={file}", *overrides.split())
    assert settings["trainer"]["learning_rate"] == rate
    assert record.new(settings)["tuning"] == said
    again = copy.deepcopy(settings)
    again["trainer"]["tuned_elsewhere"] = None
    assert config.run_id(again) != config.run_id(settings)  # found for it later, the same rate is another fact
    with pytest.raises(Exception, match=r"trainer\.tuned_elsewhere=here: expected null"):
        composed("model=tiny_vit", "trainer.tuned_elsewhere=here")


@pytest.mark.parametrize(
    ("overrides", "rate", "said"),
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
def test_another_tasks_rates_stand_in_where_that_is_asked_for(file: Path, overrides, rate, said) -> None:
    given = ("model=tiny_vit", "task=cifar10", f"trainer.tuned={file}", *overrides.split())
    with pytest.raises(PartialLoraError, match=r"no learning rate for task=cifar10.*trainer\.tuned_on"):
        composed(*given)
    settings = composed(*given, "trainer.tuned_on=digits")
    assert settings["trainer"]["learning_rate"] == rate
    assert record.new(settings)["tuning"] == said
    with pytest.raises(PartialLoraError, match="no learning rate for task=cifar10"):
        composed(*given, "trainer.tuned_on=gtsrb")


def test_a_task_with_rates_of_its_own_needs_none_to_stand_in(file: Path) -> None:
    tuning.save(file, rate_search.best_rates(search([0.9, 0.8, 0.7, 0.6], "task=cifar10"))[0])
    given = ("model=tiny_vit", f"trainer.tuned={file}", "trainer.tuned_on=digits")
    own, none = composed(*given, "task=cifar10"), composed(*given)
    assert (own["trainer"]["learning_rate"], none["trainer"]["learning_rate"]) == (1e-3, 1e-2)
    assert {record.new(each)["tuning"] for each in (own, none)} == {"tuned"}
    assert config.run_id(none) == config.run_id(composed(*given[:2]))  # what might have stood in changes nothing


def test_a_calibration_file_has_its_own_operating_point(file: Path, tmp_path: Path) -> None:
    calibration = tmp_path / "calibration.json"
    content = {"version": 1, "threshold": 0.42, "budget": 0.13, "axes": "separate", "scope": "independent"}
    results.write_json(calibration, content)
    given = ("model=tiny_vit", f"trainer.tuned={file}", f"calibration.file={calibration}")
    settings = composed(*given)
    assert settings["trainer"]["learning_rate"] == 3e-2  # of budget 0.13, though the settings have threshold 0.9
    assert record.new(settings)["tuning"] == "tuned"
    results.write_json(calibration, content | {"axes": "joint", "budget": 0.2})
    said = "tuned elsewhere (budget 0.13, calibration.axes=separate)"
    assert record.new(composed(*given))["tuning"] == said
    results.write_json(calibration, {})
    with pytest.raises(PartialLoraError, match=r"calibration\.file=.*: no calibration\.json that says its threshold"):
        composed(*given)
    assert composed(*given, "method=lora")["trainer"]["learning_rate"] == 3e-3  # which reads no such file


def test_a_runs_id_is_of_the_rate_and_not_of_the_file(file: Path) -> None:
    given = ("model=tiny_vit", "method=lora")
    before = config.run_id(composed(*given, f"trainer.tuned={file}"))
    other = file.with_name("other.json")
    other.write_bytes(file.read_bytes())
    tuning.save(other, rate_search.best_rates(search([0.9, 0.8, 0.8, 0.7], "method=dora"))[0])  # beside what was there
    assert config.run_id(composed(*given, f"trainer.tuned={other}")) == before
    tuning.save(other, rate_search.best_rates(search([0.5, 0.8, 0.9, 0.7], "method=lora"))[0])
    assert config.run_id(composed(*given, f"trainer.tuned={other}")) != before
    assert [entry["method"] for entry in tuning.load(other)] == ["dora", "lora", "partial", "partial"]


def test_a_file_takes_only_what_was_searched_for_alike(file: Path) -> None:
    before = file.read_bytes()
    longer = rate_search.best_rates([run(rate, 0.5, "method=dora", "trainer.epochs=9") for rate in RATES])[0]
    more = rate_search.best_rates([run(rate, 0.5, "method=lora") for rate in (*RATES, 1e-1)])[0]
    again = rate_search.best_rates(search([0.5] * 4, "method=lora", seed=3))[0]
    for entries, said in (
        (
            longer,
            r"lora was tuned with trainer\.epochs=5, .*dora with trainer\.epochs=9: .*; write to another file",
        ),
        (
            more,
            r"lora was tuned with 5 learning rates, .*partial \(rows_columns, budget 0\.13\) with 4",
        ),
        (again, r"lora was tuned with seeds \[3\], .* with seeds \[0\]: .*, or remove the old entry from this one"),
    ):
        with pytest.raises(PartialLoraError, match=said):
            tuning.save(file, entries)
        assert file.read_bytes() == before
    elsewhere = [entry | {"task": "trec"} for entry in longer]
    tuning.save(file, elsewhere)  # of another task, as long as it likes
    assert len(tuning.load(file)) == 4
    assert [entry for entry in tuning.load(file) if entry["task"] == "trec"] == elsewhere


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "no file of learning rates"),
        ('{"version": 2}', "no file of learning rates"),
        ('{"version": 1, "entries": [{"learning_rate": 0.1}]}', "version 1, expected 2; remove it"),
        ('{"version": 2, "entries": [{"learning_rate": 0.1}]}', "an entry lacks a key"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "it.json").write_text(content)
    with pytest.raises(PartialLoraError, match=rf"trainer\.tuned=.*it\.json: {said}"):
        composed("model=tiny_vit", f"trainer.tuned={tmp_path / 'it.json'}")
    with pytest.raises(Exception, match=r"trainer\.tuned=nowhere\.json: expected a file that scripts/tune\.py makes"):
        composed("trainer.tuned=nowhere.json")


def test_the_command_reads_runs_and_writes_the_file(tmp_path: Path, capsys) -> None:
    for entry in search([0.5, 0.9, 0.8, None], "method=lora"):
        folder = tmp_path / config.run_directory(entry["config"])
        folder.mkdir(parents=True)
        results.write_json(folder / results.RESULT, entry)
    out = tmp_path / "tuning.json"
    assert tune.main([str(tmp_path / "results"), "--out", str(out)]) == 0
    assert "digits, tiny_vit, lora: 0.003   [0.001: 0.5000  0.003: 0.9000  0.01: 0.8000  0.03: not finite]" in (
        capsys.readouterr().out
    )
    assert json.loads(out.read_text())["entries"][0]["learning_rate"] == 3e-3
    assert tune.main([str(tmp_path / "nothing"), "--out", str(out)]) == 2
    assert "expected runs of experiment=tune" in capsys.readouterr().err
    for entry in search([0.5, 0.9, 0.8, None], "method=dora", "trainer.epochs=9"):
        folder = tmp_path / "longer" / config.run_directory(entry["config"])
        folder.mkdir(parents=True)
        results.write_json(folder / results.RESULT, entry)
    assert tune.main([str(tmp_path / "longer" / "results"), "--out", str(out)]) == 2
    assert "tuning.json: digits, tiny_vit, lora was tuned with trainer.epochs=5" in capsys.readouterr().err


def test_the_command_goes_on_with_a_search(file: Path, tmp_path: Path, capsys) -> None:
    lower = run(3e-4, 0.95, "method=lora")
    folder = tmp_path / config.run_directory(lower["config"])
    folder.mkdir(parents=True)
    results.write_json(folder / results.RESULT, lower)
    out = tmp_path / "one.json"
    tuning.save(out, [entry for entry in tuning.load(file) if entry["method"] == "lora"])
    assert tune.main([str(tmp_path / "results"), "--out", str(out)]) == 2  # one rate is no search
    assert "expected at least 4" in capsys.readouterr().err
    assert tune.main([str(tmp_path / "results"), "--out", str(out), "--extend"]) == 1
    assert "lora: 0.0003   [0.0003: 0.9500  0.001: " in capsys.readouterr().out
    assert [len(entry["tried"]) for entry in tuning.load(out)] == [5]


def test_experiments_compose(file: Path) -> None:
    searched = composed("experiment=tune", "method=lora")
    assert searched["trainer"]["tuned"] is None
    compared = composed("experiment=methods", "model=tiny_vit", "method=lora", f"trainer.tuned={file}")
    assert compared["trainer"]["epochs"] == searched["trainer"]["epochs"]
    assert compared["trainer"]["learning_rate"] == 3e-3


def test_metrics_where_less_is_better_are_those_of_reports() -> None:
    assert set(rate_search._LOWER_IS_BETTER) == runs.LOWER_IS_BETTER
