"""The best learning rate of a search on validation, searches that are not the same for all, and the command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tune
from refusals import refusal
from searched_rates import RATES, best, run, search, settings

from partial_lora import files
from partial_lora.launching import directory, paths
from partial_lora.report.rows import operating_point
from partial_lora.settings import tuned, versions
from partial_lora.tasks import metrics

LORA = ("method=lora",)


def refused(*parts: str):
    """A refusal that names these, in this order."""
    return refusal(".*".join(["", *map(re.escape, parts)]))


def test_the_rate_is_that_of_the_best_validation() -> None:
    unscaled = ["mask.fan_in=dense", "mask.row_exponent=0"]
    budget = search([0.5, 0.6, 0.7, 0.8], "calibration.budget=0.13", *unscaled)
    (lora, partial), left_out = tune.best_rates([*search([0.5, 0.9, 0.8, None], *LORA), *budget])
    assert left_out == []
    own = lora.pop("settings")
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
    assert {"trainer.epochs": None, "trainer.max_steps": None, "trainer.batch_size": 16}.items() <= own.items()
    assert own["model.architecture"] == settings()["model"]["architecture"]
    assert partial["settings"] == own | {"mask.fan_in": "dense", "mask.row_exponent": 0.0}
    assert (partial["operating_point"], partial["learning_rate"], partial["at_edge"]) == ("budget 0.13", 3e-2, True)


def test_equals_are_decided_by_loss_and_seeds_are_averaged() -> None:
    assert best(*search([0.9] * 4, *LORA, losses=(3, 1, 1, 2)))[0]["learning_rate"] == 3e-3
    two = [*search([0.2, 0.9, 0.5, 0.4], *LORA), *search([0.2, 0.1, 0.7, 0.4], *LORA, seed=1)]
    (entry,) = best(*two)
    assert (entry["learning_rate"], entry["validation"], entry["seeds"]) == (1e-2, pytest.approx(0.6), [0, 1])
    two[2] |= {"status": "failed", "error": "the loss is not finite", "metrics": {}}
    assert best(*two)[0]["learning_rate"] == 3e-3  # a rate that one seed fails at is none


@pytest.mark.parametrize("metric", sorted(metrics.LOWER_IS_BETTER))
def test_the_best_may_be_the_lowest(metric: str) -> None:
    runs = search([0.5, 0.9, 0.2, 0.7], *LORA)
    for each in runs:
        each["metrics"]["validation"] |= {"primary": metric, metric: each["metrics"]["validation"]["accuracy"]}
    assert best(*runs)[0]["learning_rate"] == 1e-2


@pytest.mark.parametrize(
    ("others", "names"),
    [
        (lambda: search([0.5] * 4, "method=dora"), None),
        (lambda: search([0.5] * 4, "trainer.eval_batch_size=8", "calibration.reliability=true", "method.rank=4"), None),
        *(
            (
                lambda key=key, value=value: search([0.5] * 4, "method=dora", f"{key}={value}"),
                (f"{key}={value}", f"{key}={own}"),
            )
            for key, value, own in (
                ("trainer.epochs", "9", "null"),
                ("trainer.max_steps", "3", "null"),
                ("trainer.batch_size", "8", "16"),
                ("task.train_samples", "90", "null"),
            )
        ),
        (
            lambda: [run(rate, 0.5, "method=dora") for rate in (*RATES, 1e-1)],
            ("dora", "5 learning rates", "lora", "4 learning rates"),
        ),
        (lambda: search([0.5] * 4, "method=dora", seed=7), ("dora", "seeds [7]", "lora", "seeds [0]")),
        (lambda: search([0.5] * 4, "method=dora")[:3], ("dora", "3 learning rates")),
        (lambda: search([None] * 4, "method=dora"), ("dora", "finite")),
    ],
)
def test_every_method_is_searched_for_as_long(others, names) -> None:
    lora = search([0.5, 0.9, 0.8, 0.7], *LORA)
    if names is None:
        best(*lora, *others())
    else:
        with refused(*names):
            best(*lora, *others())


@pytest.mark.parametrize(
    ("override", "own", "other"),
    [
        ("trainer.epochs=50", "trainer.epochs=null", "50"),
        ("importance=random", "importance.name=svd", "random"),
        ("model.target_modules=[attn.qkv]", "model.target_modules=[", "[attn.qkv]"),
    ],
)
def test_the_runs_of_one_search_agree_in_settings_and_seeds(override: str, own: str, other: str) -> None:
    alike = search([0.5, 0.6, 0.7, 0.6])
    for mixed in ([alike[0], run(3e-3, 0.9, override), *alike[2:]], [*alike, run(3e-3, 0.9, override)]):
        with refused("partial (rows_columns, threshold 0.9)", own, "0.001", other, "0.003"):
            best(*mixed)
    with refused("partial", "seeds [0]", "0.001", "[0,1]", "0.01"):
        best(*alike, run(1e-2, 0.1, seed=1))


def test_what_is_not_calibrated_has_neither_masks_nor_points() -> None:
    masked = search([0.5] * 4, *LORA, "mask=element", "calibration=budget", seed=1)
    (entry,) = best(*search([0.5, 0.9, 0.8, 0.7], *LORA), *masked)
    assert (entry["masks"], entry["operating_point"], entry["seeds"]) == ("–", "–", [0, 1])


def test_a_search_with_a_calibration_file_is_at_its_point(tmp_path: Path) -> None:
    content = {"threshold": 0.42, "budget": 0.13, "axes": "joint", "search": "scan"}
    files.write_json(tmp_path / "calibration.json", content)
    runs = search([0.5, 0.6, 0.9, 0.8], f"calibration.file={tmp_path / 'calibration.json'}")
    (entry,) = best(*(each | {"calibration": content} for each in runs))
    assert entry["operating_point"] == operating_point(runs[0] | {"calibration": content}) == "budget 0.13"
    assert entry["settings"]["calibration.axes"] == "joint"


def test_a_run_that_failed_in_another_way_is_left_out_and_named() -> None:
    interrupted = run(1e-1, None, *LORA) | {"error": "interrupted"}
    (entry,), (line,) = tune.best_rates([*search([0.5, 0.9, 0.8, 0.7], *LORA), interrupted])
    assert len(entry["tried"]) == 4
    assert "lora, learning rate 0.1: interrupted" in line


def test_a_search_goes_on_with_what_the_file_has_tried() -> None:
    before = best(*search([0.5, 0.0, 0.9, None], *LORA))
    (entry,) = best(run(1e-1, 0.8, *LORA, loss=2.0), before=before)
    assert entry["tried"] == {"0.001": 0.5, "0.003": 0.0, "0.01": 0.9, "0.03": None, "0.1": 0.8}
    assert entry["losses"] == before[0]["losses"] | {"0.1": 2.0}
    assert (entry["learning_rate"], entry["at_edge"]) == (1e-2, False)
    (entry,) = best(run(3e-4, 0.95, *LORA), before=before)
    assert (entry["learning_rate"], entry["at_edge"]) == (3e-4, True)
    (entry,) = best(*search([0.5, 0.6, 0.7, 0.8], "method=dora"), before=before)
    assert list(entry["tried"]) == ["0.001", "0.003", "0.01", "0.03"]
    with refused("trainer.epochs=null", "9"):
        best(run(1e-1, 0.5, *LORA, "trainer.epochs=9"), before=before)
    with refused("seeds=[0]", "[1]"):
        best(run(1e-1, 0.5, *LORA, seed=1), before=before)


def test_where_losses_are_not_in_the_file_the_choice_among_equals_stands() -> None:
    (before,) = best(*search([0.9] * 4, *LORA, losses=(3, 1, 2, 2)))
    del before["losses"]
    (entry,) = best(run(3e-4, 0.9, *LORA, loss=0.01), before=[before])
    assert entry["learning_rate"] == before["learning_rate"] == 3e-3
    assert entry["losses"] == dict.fromkeys(before["tried"]) | {"0.0003": 0.01}


def test_the_command_reads_runs_and_writes_the_file_or_goes_on_with_it(tmp_path: Path, capsys) -> None:
    def results(name: str, runs: list[dict]) -> str:
        for each in runs:
            place = tmp_path / name / paths.run_directory(versions.load(each["config"]))
            place.mkdir(parents=True)
            files.write_json(place / directory.RESULT, each)
        return str(tmp_path / name / "results")

    out = tmp_path / "tuning.json"
    assert tune.main([results("four", search([0.5, 0.9, 0.8, None], *LORA)), "--out", str(out)]) == 0
    assert "lora: 0.003   [0.001: 0.5000  0.003: 0.9000  0.01: 0.8000  0.03: not finite]" in capsys.readouterr().out
    content = out.read_bytes()
    assert json.loads(content)["entries"][0]["learning_rate"] == 3e-3
    one = results("one", [run(3e-4, 0.95, *LORA)])
    longer = results("longer", search([0.5, 0.9, 0.8, None], "method=dora", "trainer.epochs=9"))
    for wrong, names in (
        (str(tmp_path / "none"), str(tmp_path / "none")),
        (longer, "trainer.epochs=null"),
        (one, "lora"),
    ):
        assert tune.main([wrong, "--out", str(out)]) == 2
        assert names in capsys.readouterr().err
        assert out.read_bytes() == content
    assert tune.main([one, "--out", str(out), "--extend"]) == 1  # the best is at the edge
    assert "lora: 0.0003   [0.0003: 0.9500  0.001: " in capsys.readouterr().out
    assert [len(entry["tried"]) for entry in tuned.load(out)] == [5]
