"""The best learning rate of a search on validation, searches that are not the same for all, and the command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tune
from searched_rates import RATES, known, run, search

from partial_lora import files
from partial_lora.errors import PartialLoraError
from partial_lora.report import records as runs
from partial_lora.runs import config, directory
from partial_lora.runs import rates as tuning
from partial_lora.tasks import metrics


def refused(*parts: str):
    """A refusal that names these, in this order."""
    return pytest.raises(PartialLoraError, match=".*".join(map(re.escape, parts)))


def write(folder: Path, records: list[dict]) -> str:
    """Write records as runs and return their results_dir."""
    for record in records:
        place = folder / config.run_directory(config.load(record["config"]))
        place.mkdir(parents=True)
        files.write_json(place / directory.RESULT, record)
    return str(folder / "results")


def test_the_rate_is_that_of_the_best_validation() -> None:
    (lora, partial), left_out = tune.best_rates(
        [*search([0.5, 0.9, 0.8, None], "method=lora"), *search([0.5, 0.6, 0.7, 0.8], "calibration.budget=0.13")]
    )
    assert left_out == []
    settings = lora.pop("settings")
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
    }
    assert {"trainer.epochs": 5.0, "trainer.max_steps": None, "trainer.batch_size": 32}.items() <= settings.items()
    assert settings["model.architecture"] == known()["model"]["architecture"]
    assert partial["settings"] == settings  # nothing of either is other than the schema has it
    assert (partial["operating_point"], partial["learning_rate"], partial["at_edge"]) == ("budget 0.13", 3e-2, True)


def test_equals_are_decided_by_loss_and_seeds_are_averaged() -> None:
    even = [run(rate, 0.9, "method=lora", loss=loss) for rate, loss in zip(RATES, (3, 1, 1, 2), strict=True)]
    assert tune.best_rates(even)[0][0]["learning_rate"] == 3e-3
    two = [*search([0.2, 0.9, 0.5, 0.4], "method=lora"), *search([0.2, 0.1, 0.7, 0.4], "method=lora", seed=1)]
    (entry,), _ = tune.best_rates(two)
    assert (entry["learning_rate"], entry["validation"], entry["seeds"]) == (1e-2, pytest.approx(0.6), [0, 1])
    for record in two[1:3]:  # a rate that one seed fails at is none
        record |= {"status": "failed", "error": "the loss is not finite", "metrics": {}}
    assert tune.best_rates(two)[0][0]["learning_rate"] == 3e-2


@pytest.mark.parametrize("metric", sorted(metrics.LOWER_IS_BETTER))
def test_the_best_may_be_the_lowest(metric: str) -> None:
    records = search([0.5, 0.9, 0.2, 0.7], "method=lora")
    for record in records:
        record["metrics"]["validation"] |= {"primary": metric, metric: record["metrics"]["validation"]["accuracy"]}
    assert tune.best_rates(records)[0][0]["learning_rate"] == 1e-2


def test_every_method_is_searched_for_as_long() -> None:
    lora = search([0.5, 0.9, 0.8, 0.7], "method=lora")

    def beside(*overrides: str, rates=RATES, seed: int = 0) -> None:
        tune.best_rates([*lora, *(run(rate, 0.5, *overrides, seed=seed) for rate in rates)])

    beside("method=dora")
    beside("method=partial", "trainer.eval_batch_size=8", "calibration.reliability=true", "method.rank=4")
    for key, other, own in (
        ("trainer.epochs", "9", "5"),
        ("trainer.max_steps", "3", "null"),
        ("trainer.batch_size", "8", "32"),
        ("task.train_samples", "90", "null"),
    ):
        with refused("dora", f"{key}={other}", "lora", f"{key}={own}"):
            beside("method=dora", f"{key}={other}")
    with refused("dora", "5 learning rates", "4 learning rates"):
        beside("method=dora", rates=(*RATES, 1e-1))
    with refused("dora", "seeds [7]", "seeds [0]"):
        beside("method=dora", seed=7)
    with refused("lora", "3 learning rates, expected at least 4"):
        tune.best_rates(lora[:3])
    with refused("lora", "finite"):
        tune.best_rates(search([None] * 4, "method=lora"))


@pytest.mark.parametrize(
    ("override", "own", "other"),
    [
        ("trainer.epochs=50", "trainer.epochs=5", "50"),
        ("importance=random", "importance.name=svd", "random"),
        ("model.target_modules=[attn.qkv]", "model.target_modules=[", "[attn.qkv]"),
    ],
)
def test_the_runs_of_one_search_agree_in_settings_and_seeds(override: str, own: str, other: str) -> None:
    alike = search([0.5, 0.6, 0.7, 0.6])
    for mixed in ([alike[0], run(3e-3, 0.9, override), *alike[2:]], [*alike, run(3e-3, 0.9, override)]):
        with refused("partial (rows_columns, threshold 0.9)", own, "at learning rate 0.001", other, "at 0.003"):
            tune.best_rates(mixed)
    with refused("partial", "seeds [0] at learning rate 0.001, [0,1] at 0.01"):
        tune.best_rates([*alike, run(1e-2, 0.1, seed=1)])


def test_what_is_not_calibrated_has_neither_masks_nor_points() -> None:
    masked = [run(rate, 0.5, "method=lora", "mask=element", "calibration=budget", seed=1) for rate in RATES]
    (entry,), _ = tune.best_rates([*search([0.5, 0.9, 0.8, 0.7], "method=lora"), *masked])
    assert (entry["masks"], entry["operating_point"], entry["seeds"]) == ("–", "–", [0, 1])


def test_a_search_with_a_calibration_file_is_at_its_point(tmp_path: Path) -> None:
    calibration = tmp_path / "calibration.json"
    files.write_json(calibration, {"threshold": 0.42, "budget": 0.13})
    records = search([0.5, 0.6, 0.9, 0.8], f"calibration.file={calibration}")
    for record in records:
        record["calibration"] = {"threshold": 0.42, "budget": 0.13, "axes": "joint", "search": "scan"}
    ((entry,), _) = tune.best_rates(records)
    assert entry["operating_point"] == runs.operating_point(records[0]) == "budget 0.13"
    assert entry["settings"]["calibration.axes"] == "joint"


def test_a_run_that_failed_in_another_way_is_left_out_and_named() -> None:
    interrupted = run(1e-1, None, "method=lora") | {"error": "interrupted"}
    (entry,), (line,) = tune.best_rates([*search([0.5, 0.9, 0.8, 0.7], "method=lora"), interrupted])
    assert len(entry["tried"]) == 4
    assert "lora, learning rate 0.1: interrupted" in line


def test_a_search_goes_on_with_what_the_file_has_tried() -> None:
    before, _ = tune.best_rates(search([0.5, 0.0, 0.9, None], "method=lora"))
    (entry,), _ = tune.best_rates([run(1e-1, 0.8, "method=lora", loss=2.0)], before)
    assert entry["tried"] == {"0.001": 0.5, "0.003": 0.0, "0.01": 0.9, "0.03": None, "0.1": 0.8}
    assert entry["losses"] == before[0]["losses"] | {"0.1": 2.0}
    assert (entry["learning_rate"], entry["at_edge"]) == (1e-2, False)
    (entry,), _ = tune.best_rates([run(3e-4, 0.95, "method=lora")], before)
    assert (entry["learning_rate"], entry["at_edge"]) == (3e-4, True)
    (entry,), _ = tune.best_rates(search([0.5, 0.6, 0.7, 0.8], "method=dora"), before)
    assert list(entry["tried"]) == ["0.001", "0.003", "0.01", "0.03"]
    with refused("trainer.epochs=5 in the file, 9 in the runs"):
        tune.best_rates([run(1e-1, 0.5, "method=lora", "trainer.epochs=9")], before)
    with refused("seeds=[0] in the file, [1] in the runs"):
        tune.best_rates([run(1e-1, 0.5, "method=lora", seed=1)], before)


def test_where_losses_were_not_kept_the_choice_among_equals_stands() -> None:
    even = [run(rate, 0.9, "method=lora", loss=loss) for rate, loss in zip(RATES, (3, 1, 2, 2), strict=True)]
    (before,), _ = tune.best_rates(even)
    del before["losses"]
    (entry,), _ = tune.best_rates([run(3e-4, 0.9, "method=lora", loss=0.01)], [before])
    assert entry["learning_rate"] == before["learning_rate"] == 3e-3
    assert entry["losses"] == dict.fromkeys(before["tried"]) | {"0.0003": 0.01}


def test_the_command_reads_runs_and_writes_the_file(tmp_path: Path, capsys) -> None:
    runs_of = write(tmp_path, search([0.5, 0.9, 0.8, None], "method=lora"))
    out = tmp_path / "tuning.json"
    assert tune.main([runs_of, "--out", str(out)]) == 0
    assert "lora: 0.003   [0.001: 0.5000  0.003: 0.9000  0.01: 0.8000  0.03: not finite]" in capsys.readouterr().out
    content = out.read_bytes()
    assert json.loads(content)["entries"][0]["learning_rate"] == 3e-3
    assert tune.main([str(tmp_path / "nothing"), "--out", str(out)]) == 2
    assert str(tmp_path / "nothing") in capsys.readouterr().err
    longer = write(tmp_path / "longer", search([0.5, 0.9, 0.8, None], "method=dora", "trainer.epochs=9"))
    assert tune.main([longer, "--out", str(out)]) == 2
    assert "trainer.epochs=5" in capsys.readouterr().err
    assert out.read_bytes() == content


def test_the_command_goes_on_with_a_search(tmp_path: Path, capsys) -> None:
    out = tmp_path / "tuning.json"
    tuning.save(out, tune.best_rates(search([0.5, 0.9, 0.8, 0.7], "method=lora"))[0])
    runs_of = write(tmp_path, [run(3e-4, 0.95, "method=lora")])
    assert tune.main([runs_of, "--out", str(out)]) == 2  # one rate is no search
    assert tune.main([runs_of, "--out", str(out), "--extend"]) == 1
    assert "lora: 0.0003   [0.0003: 0.9500  0.001: " in capsys.readouterr().out
    assert [len(entry["tried"]) for entry in tuning.load(out)] == [5]
