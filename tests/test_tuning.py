"""Learning rates found on validation, the file they are kept in, and the runs that read it."""

from __future__ import annotations

import copy
import functools
import json
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from partial_lora import config, record, results, runs, schema, tuning
from partial_lora.errors import PartialLoraError

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import tune

RATES = (1e-3, 3e-3, 1e-2, 3e-2)


def composed(*overrides: str) -> dict:
    ConfigStore.instance().store(name="schema", node=schema.Config)
    with initialize_config_dir(str(config.conf_dir()), version_base="1.3"):
        return config.resolve(compose("config", list(overrides)))


@functools.cache
def known(*overrides: str) -> dict:
    return composed("model=tiny_vit", *overrides)


def run(rate: float, worth: float | None, *overrides: str, loss: float = 1.0, seed: int = 0) -> dict:
    """What a run of the search leaves; `worth` None for one that diverged."""
    settings = copy.deepcopy(known(*overrides)) | {"seed": seed}
    settings["trainer"]["learning_rate"] = rate
    calibrated = settings["method"]["name"] in ("partial", "uniform")
    entry = record.new(settings) | {"calibration": {"threshold": 0.9} if calibrated else None}
    if worth is None:
        return entry | {"status": "failed", "error": "the loss is not finite at step 3 with learning rate 0.03: lower"}
    validation = {"primary": "accuracy", "accuracy": worth, "loss": loss}
    return entry | {"status": "finished", "metrics": {"validation": validation, "test": {"accuracy": 0.0}}}


def search(worths, *overrides: str, seed: int = 0) -> list[dict]:
    return [run(rate, worth, *overrides, seed=seed) for rate, worth in zip(RATES, worths, strict=True)]


def test_the_rate_is_that_of_the_best_validation() -> None:
    found, left_out = tuning.best_rates(
        [*search([0.5, 0.9, 0.8, None], "method=lora"), *search([0.5, 0.6, 0.7, 0.8], "calibration.budget=0.13")]
    )
    assert left_out == []
    lora, partial = found
    assert lora == {
        "task": "digits",
        "model": "tiny_vit",
        "method": "lora",
        "masks": "rows_columns",
        "operating_point": "–",
        "learning_rate": 3e-3,
        "metric": "accuracy",
        "validation": 0.9,
        "tried": {"0.001": 0.5, "0.003": 0.9, "0.01": 0.8, "0.03": None},
        "seeds": [0],
        "epochs": 5.0,
        "max_steps": None,
        "batch_size": 32,
        "at_edge": False,
    }
    assert (partial["operating_point"], partial["learning_rate"], partial["at_edge"]) == ("budget 0.13", 3e-2, True)


def test_equals_are_told_apart_by_loss_and_seeds_are_averaged() -> None:
    even = [run(rate, 0.9, "method=lora", loss=loss) for rate, loss in zip(RATES, (3, 1, 1, 2), strict=True)]
    assert tuning.best_rates(even)[0][0]["learning_rate"] == 3e-3
    two = [*search([0.2, 0.9, 0.5, 0.4], "method=lora"), *search([0.2, 0.1, 0.7, 0.4], "method=lora", seed=1)]
    (found,), _ = tuning.best_rates(two)
    assert (found["learning_rate"], found["validation"], found["seeds"]) == (1e-2, pytest.approx(0.6), [0, 1])
    two[1] |= {"status": "failed", "error": "the loss is not finite", "metrics": {}}
    two[2] |= {"status": "failed", "error": "the loss is not finite", "metrics": {}}
    assert tuning.best_rates(two)[0][0]["learning_rate"] == 3e-2  # a rate that one seed fails at is none


def test_every_method_is_searched_for_as_long() -> None:
    lora = search([0.5, 0.9, 0.8, 0.7], "method=lora")
    longer = [run(rate, 0.5, "method=dora", "trainer.epochs=9") for rate in RATES]
    with pytest.raises(PartialLoraError, match=r"lora \(rows_columns\) was tuned with 5.0 epochs, .*dora .* with 9.0"):
        tuning.best_rates([*lora, *longer])
    more = [*search([0.5, 0.9, 0.8, 0.7], "method=dora"), run(1e-1, 0.1, "method=dora")]
    with pytest.raises(PartialLoraError, match=r"was tuned with 4 learning rates, .* with 5: a search must be"):
        tuning.best_rates([*lora, *more])
    with pytest.raises(PartialLoraError, match="3 learning rates, expected at least 4"):
        tuning.best_rates(lora[:3])
    with pytest.raises(PartialLoraError, match="no learning rate had a finite loss; search lower"):
        tuning.best_rates(search([None] * 4, "method=lora"))


def test_a_run_that_failed_in_another_way_is_left_out_and_said() -> None:
    interrupted = run(1e-1, None, "method=lora") | {"error": "interrupted"}
    found, left_out = tuning.best_rates([*search([0.5, 0.9, 0.8, 0.7], "method=lora"), interrupted])
    assert len(found[0]["tried"]) == 4
    assert left_out == ["digits, tiny_vit, lora (rows_columns), learning rate 0.1: interrupted"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    found, _ = tuning.best_rates(
        [
            *search([0.5, 0.9, 0.8, 0.7], "method=lora"),
            *search([0.5, 0.6, 0.9, 0.8]),
            *search([0.5, 0.6, 0.7, 0.8], "calibration=budget"),
        ]
    )
    path = tmp_path / "results" / "tuning.json"
    tuning.save(path, found)
    return path


def test_runs_find_their_rate_in_the_file(file: Path) -> None:
    given = ("model=tiny_vit", f"trainer.tuned={file}")
    rates = {
        "method=lora": 3e-3,
        "method=lora calibration=budget": 3e-3,  # of no operating point
        "method=partial": 1e-2,
        "calibration=budget": 3e-2,
    }
    for overrides, rate in rates.items():
        settings = composed(*given, *overrides.split())
        assert settings["trainer"]["learning_rate"] == rate
        plain = composed("model=tiny_vit", f"trainer.learning_rate={rate}", *overrides.split())
        assert config.run_id(settings) != config.run_id(plain)  # they say of themselves how they got it
        assert record.new(settings)["tuning"] == "tuned"
        assert record.new(plain)["tuning"] == "untuned"
    with pytest.raises(
        PartialLoraError,
        match=r"trainer\.tuned=.*: no learning rate for task=digits, model=tiny_vit, method=lora, masks=element, "
        r"operating_point=threshold 0\.9; search for one with experiment=tune",
    ):
        composed(*given, "method=lora", "mask=element")


def test_a_runs_id_is_of_the_rate_and_not_of_the_file(file: Path) -> None:
    given = ("model=tiny_vit", "method=lora")
    before = config.run_id(composed(*given, f"trainer.tuned={file}"))
    other = file.with_name("other.json")
    other.write_bytes(file.read_bytes())
    tuning.save(other, tuning.best_rates(search([0.9, 0.8, 0.8, 0.7], "method=dora"))[0])  # beside what was there
    assert config.run_id(composed(*given, f"trainer.tuned={other}")) == before
    tuning.save(other, tuning.best_rates(search([0.5, 0.8, 0.9, 0.7], "method=lora"))[0])
    assert config.run_id(composed(*given, f"trainer.tuned={other}")) != before
    assert [entry["method"] for entry in tuning.load(other)] == ["dora", "lora", "partial", "partial"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "no file of learning rates"),
        ('{"version": 2, "entries": []}', "no file of learning rates"),
        ('{"version": 1, "entries": [{"learning_rate": 0.1}]}', "an entry lacks a key"),
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
    assert "lora (rows_columns, –): 0.003   [0.001: 0.5000  0.003: 0.9000  0.01: 0.8000  0.03: not finite]" in (
        capsys.readouterr().out
    )
    assert json.loads(out.read_text())["entries"][0]["learning_rate"] == 3e-3
    assert tune.main([str(tmp_path / "nothing"), "--out", str(out)]) == 2
    assert "expected runs of experiment=tune" in capsys.readouterr().err


def test_experiments_compose(file: Path) -> None:
    searched = composed("experiment=tune", "method=lora")
    assert searched["trainer"]["tuned"] is None
    compared = composed("experiment=methods", "model=tiny_vit", "method=lora", f"trainer.tuned={file}")
    assert compared["trainer"]["epochs"] == searched["trainer"]["epochs"]
    assert compared["trainer"]["learning_rate"] == 3e-3


def test_words_for_what_does_not_apply_are_the_same() -> None:
    assert tuning.NO_POINT == runs.NONE
    assert set(tuning._LOWER_IS_BETTER) == runs.LOWER_IS_BETTER
