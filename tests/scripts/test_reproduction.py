"""Commands of `make reproduce`: all compose, search for rates that are lacking, share runs; as many as documented."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from functools import cache
from itertools import product
from pathlib import Path

import analyses
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from partial_lora.launching import places
from partial_lora.settings import compose, schema
from partial_lora.settings import tuned as rate_settings
from partial_lora.settings.tuned import NO_POINT

ROOT = schema.conf_dir().parent
NAMES = [*(f"table{number}" for number in range(1, 8)), *(f"fig{number}" for number in range(1, 8))]
TASKS = ("cifar10", "signdigits", "gtsrb", "flowers17", "sst2", "trec", "qnli", "mrpc", "arc_easy", "piqa")
UNCALIBRATED = {"lora", "dora", "adalora", "lorafa", "vera", "probe", "full"}
MODELS = {"cpu": "vit_s14", "paper": "vit_b16"}  # of images
POINTS = {"threshold": "threshold 0.9", "budget": "budget 0.13"}
RATES = {"cpu": "results/tuning.json", "paper": "results/paper/tuning.json"}

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with files for all tasks and, for both presets, the rates that the search of `make` would find."""
    folder = tmp_path_factory.mktemp("reproduced")
    for name in ("Makefile", "reproduce.mk", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for name in TASKS:
        (folder / "data" / name).mkdir(parents=True)
        for split in ("train", "test"):
            (folder / "data" / name / f"{split}.parquet").write_text(f"{split} rows of {name}")
    before = Path.cwd()
    os.chdir(folder)
    try:
        for preset, file in RATES.items():
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            rate_settings.save(Path(file), [each for words in searches(preset) for each in entries(words, preset)])
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(autouse=True)
def there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


@cache
def commands(target: str, preset: str, data: str = "data", seeds: str = "") -> list[tuple[str, ...]]:
    """The words of what `make` would run of this project for a target."""
    given = [f"PRESET={preset}", f"DATA={data}", f"SEEDS={seeds}", "BIN=bin", "VENV=venv"]
    shown = subprocess.run(["make", "-n", *given, target], capture_output=True, text=True, check=True)
    lines = (line.partition(" || ")[0] for line in shown.stdout.replace("\\\n", " ").splitlines())
    words = (tuple(shlex.split(line)) for line in lines)
    return [each for each in words if each and each[0] in ("bin/partial-lora", "bin/python") and "pip" not in each]


def trainings(target: str, preset: str, data: str = "data", made=commands) -> list[tuple[str, ...]]:
    return [each[2:] for each in made(target, preset, data) if each[1] == "train"]


@pytest.mark.parametrize("target", ["race", "forms"])
def test_a_comparison_has_as_many_seeds_as_are_asked_for(target: str) -> None:
    asked = commands(target, "cpu", seeds="8")
    assert asked != commands(target, "cpu")
    assert all("seeds=8" in words for words in asked if words[1] == "compare")


@pytest.mark.parametrize("target", ["digits-rate", "sst2-rate"])
def test_what_was_made_in_one_preset_takes_its_sets_and_models_whatever_else_is_made(target: str) -> None:
    assert commands(target, "paper") == commands(target, "cpu")
    assert all("calibration.max_samples=160" in words for words in trainings(target, "cpu"))


def searches(preset: str) -> list[tuple[str, ...]]:
    return [each for each in trainings("reproduce-tune", preset) if "experiment=tune" in each]


def entries(words: tuple[str, ...], preset: str) -> list[dict]:
    """What scripts/tune.py would keep of a sweep that searches, by what its words say."""
    given = {"model": MODELS[preset], "calibration": "", "mask": "rows_columns"}
    given |= dict(word.split("=", 1) for word in words if "=" in word)
    points = [POINTS.get(point, NO_POINT) for point in given["calibration"].split(",")]
    if "calibration.budget" in given:
        points = [f"budget {budget}" for budget in given["calibration.budget"].split(",")]
    rates = []
    for task, method, point in product(given["task"].split(","), given["method"].split(","), points):
        placed = (given["mask"], point) if method not in UNCALIBRATED else (NO_POINT, NO_POINT)
        key = dict(zip(rate_settings.KEY, (task, given["model"], method, *placed), strict=True))
        rates.append(key | {"learning_rate": 1e-3, "tried": {"0.001": 0.5}, "seeds": [1000], "settings": {}})
    return rates


@cache
def combinations(words: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The overrides of every run of a sweep, by its words and the values that its experiment's file names."""
    (experiment,) = (word.partition("=")[2] for word in words if word.startswith("experiment="))
    file = yaml.safe_load((schema.conf_dir() / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8"))
    named = file.get("hydra", {}).get("sweeper", {}).get("params", {})
    overrides = [f"{key}={value}" for key, value in named.items()] + [word for word in words if "=" in word]
    return [tuple(each) for each in compose._combinations(OverridesParser.create().parse_overrides(overrides))]


settings = cache(lambda combination: compose.composed(*combination))


@pytest.mark.parametrize("preset", ["cpu", "paper"])
def test_every_search_composes_and_takes_no_rate_from_a_file(preset: str) -> None:
    for words in searches(preset):
        last = settings(combinations(words)[-1])
        assert last.seed >= 1000  # no run of a table has it
        assert last.trainer.tuned is None
        assert last.results_dir == str(Path(RATES[preset]).parent / "tune")
        rates = [word for word in combinations(words)[0] if word.startswith("trainer.learning_rate=")]
        assert len(rates) == 1


@pytest.mark.parametrize("preset", ["cpu", "paper"])
@pytest.mark.parametrize("name", NAMES)
def test_every_run_of_a_table_composes_and_there_are_as_many_as_its_header_says(name: str, preset: str) -> None:
    header = (schema.conf_dir() / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
    stated = {case: int(count) for case, count in re.findall(r"(cpu|without DATA|paper) (\d+)[,.]", header)}
    assert set(stated) == {"cpu", "without DATA", "paper"}
    counted = {preset: 0, "without DATA": 0}
    # What `make reproduce-NAME` runs before its last command is `make runs-NAME`.
    assert name != "table1" or trainings("runs-table1", preset) == trainings("reproduce-table1", preset)
    for words in trainings(f"reproduce-{name}", preset):
        counted[preset] += len(combinations(words))
        last = settings(combinations(words)[-1])
        if "experiment=causal" not in words:
            assert last.preset == preset
            assert last.results_dir == f"results/{preset}"
    assert counted[preset] == stated[preset]
    if preset == "cpu":
        bare = trainings(f"runs-{name}", preset, "nowhere")
        assert sum(len(combinations(words)) for words in bare) == stated["without DATA"]
    assert commands(f"reproduce-{name}", preset)[-1][1:] == (
        "scripts/reproduce.py",
        name,
        *(["claims"] if name.startswith("table") else []),
        "--results",
        f"results/{preset}",
    )


def searched_with(rates: list[dict], target: str, preset: str) -> set[tuple[str, ...]]:
    """The searches that a target begins with where its preset's file holds these rates; there is none of no rates."""
    file = Path(RATES[preset])
    kept = file.rename("kept.json")
    try:
        if rates:
            rate_settings.save(file, rates)
        return {words for words in trainings(target, preset, made=commands.__wrapped__) if "experiment=tune" in words}
    finally:
        kept.rename(file)


def test_sets_that_are_not_there_are_left_out_one_by_one(place: Path) -> None:
    (place / "few" / "trec").mkdir(parents=True)
    (place / "few" / "trec" / "train.parquet").touch()
    for target in ("forms", "decided", "reach"):
        words = {word for line in commands(target, "cpu", "few") for word in line if word.startswith("task=")}
        assert words == {"task=digits", "task=trec"}, target


@pytest.mark.parametrize("preset", ["cpu", "paper"])
def test_rates_are_searched_for_only_where_there_are_none(place: Path, preset: str) -> None:
    assert not any("experiment=tune" in words for words in trainings("reproduce", preset))
    assert searched_with([], "reproduce", preset) == set(searches(preset))


@pytest.mark.parametrize(("code", "ends"), [(2, True), (1, False)])
@pytest.mark.parametrize(("target", "runs"), [("forms", 12), ("race", 1)])
def test_what_is_refused_ends_a_target_and_a_run_that_failed_does_not(
    target: str, runs: int, code: int, ends: bool
) -> None:
    stubs = Path("stubs")  # from here, since make takes a path with a space for two
    stubs.mkdir(exist_ok=True)
    for name, text in {"partial-lora": f"echo $@ >> calls; exit {code}", "python": "exit 0"}.items():
        (stubs / name).write_text(f"#!/bin/sh\n{text}\n")
        (stubs / name).chmod(0o755)
    (stubs / ".installed").touch()
    given = ["BIN=stubs", "VENV=stubs", "DATA=nowhere"]
    Path("calls").unlink(missing_ok=True)
    done = subprocess.run(["make", *given, target], capture_output=True, check=False)
    calls = Path("calls").read_text().splitlines()
    assert ((done.returncode != 0), len(calls)) == (ends, 1 if ends else runs)


def of_kind(words: tuple[str, ...]) -> str:
    if any(word in ("task=digits", "task=cifar10") for word in words):
        return "studied"
    if "task=mixture" in words:
        return "mixtures"
    return "texts" if {"model=minilm_l6", "model=deberta_v3_base"} & set(words) else "images"


@pytest.mark.parametrize("preset", ["cpu", "paper"])
def test_a_table_searches_for_the_rates_of_its_own_runs_alone(place: Path, preset: str) -> None:
    """What a figure of digits costs is not the search on every other set."""
    of = {"fig4": set(), "table4": set(), "table1": {"images"}, "fig1": {"images"}, "table3": {"texts"}}
    of["table6"] = {"mixtures"} if preset == "paper" else set()  # the CPU's take the rates of digits
    for name, others in of.items():
        assert {of_kind(words) for words in searched_with([], f"runs-{name}", preset)} == {"studied", *others}


@pytest.mark.parametrize("rated", [(), ("lora",), ("lora", "partial")])
def test_a_task_of_which_not_every_method_has_a_rate_is_searched(place: Path, rated: tuple[str, ...]) -> None:
    """As after `make tune`, which searches on digits alone, or after a search that ended early."""
    whole = rate_settings.load(Path(RATES["cpu"]))
    known = [entry for entry in whole if entry["task"] != "gtsrb" or entry["method"] in rated]
    words = {word for words in searched_with(known, "runs-table1", "cpu") for word in words}
    assert {word for word in words if word.startswith("task=")} == {"task=gtsrb"}
    assert {word for word in words if word.startswith("method=")} == {"method=lora", "method=partial,targeted"}


def on_digits(target: str) -> set[Path]:
    """The directories of a target's runs on digits with seed 0, of three methods that stand for all."""
    runs, methods = set(), {f"method={name}" for name in ("lora", "partial", "uniform")}
    for words in trainings(target, "cpu"):
        chosen = [each for each in combinations(words) if "seed=0" in each and methods & {*each, *words}]
        runs |= {places.run_directory(settings(each)) for each in chosen if "task=digits" in words}
    return runs


def test_tables_share_the_runs_that_they_have_in_common() -> None:
    """Single ones of table1 are rank 16 of fig4, and fig7 without noise; experiment=methods has all of both points."""
    table1, table4, methods = (on_digits(f"runs-{name}") for name in ("table1", "table4", "methods"))
    assert (len(table1), len(table4), len(methods)) == (3, 4, 7)
    assert table1 | table4 < methods
    for name in ("fig4", "fig7"):
        firsts = (settings(combinations(words)[0]) for words in trainings(f"runs-{name}", "cpu"))
        assert len(table1 & set(map(places.run_directory, firsts))) == 1


def test_analyses_compose_and_leave_the_cpu_s_where_they_are() -> None:
    for preset, results in (("cpu", "results"), ("paper", "results/paper")):
        lines = [each[2:] for each in commands("runs-table5", preset) if each[1] == "scripts/analyses.py"]
        assert len(lines) == 4
        for words in lines:
            plan = compose.plan(analyses.parse(words)[2])
            assert not plan.refused
            assert [settings.results_dir for _, settings in plan.runs] == [results]
