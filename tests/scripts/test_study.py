"""Commands of the studies in conf/experiment: all compose, leave out what is not there, and share their runs."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

import pytest
import study
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from partial_lora.compare import options
from partial_lora.errors import PartialLoraError
from partial_lora.settings import compose, schema
from partial_lora.settings import study_commands as studies

ROOT = schema.conf_dir().parent
FILES = {file.stem: yaml.safe_load(file.read_text("utf-8")) for file in (ROOT / "conf/experiment").glob("*.yaml")}
STUDIES = sorted(name for name, settings in FILES.items() if settings and "study" in settings)
SETS = ("cifar10", "signdigits", "gtsrb", "flowers17", "sst2", "trec")
SETS += ("qnli", "mrpc", "imdb", "rte", "arc_easy", "piqa")
OF_COMPARE = ("methods=", "forgets=", "budgets=", "rates=", "seeds=", "search=")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Files of all sets."""
    folder = tmp_path_factory.mktemp("data")
    for name in (*SETS, "gsm8k"):
        (folder / name).mkdir()
        for split in ("train", "test"):
            (folder / name / f"{split}.parquet").write_text(f"{split} rows of {name}")
    return folder


def commands(name: str, data: Path, **only: str) -> list[list[str]]:
    return list(studies.commands(name, data, {key: {value} for key, value in only.items()}))


def combinations(words: list[str]) -> list[tuple[str, ...]]:
    """The overrides of every run of a command of `train`, by its words and by what its experiment's file sweeps."""
    experiment = next(word.partition("=")[2] for word in words if word.startswith("experiment="))
    swept = (FILES[experiment].get("hydra") or {}).get("sweeper", {}).get("params", {})
    overrides = [f"{key}={value}" for key, value in swept.items()] + [word for word in words if "=" in word]
    return [tuple(each) for each in compose._combinations(OverridesParser.create().parse_overrides(overrides))]


settings = cache(lambda combination: compose.composed(*combination))


@pytest.mark.parametrize("name", STUDIES)
def test_the_last_runs_of_a_study_compose_in_either_preset(name: str, data: Path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    of_runs = [words for words in commands(name, data) if words[0] in studies.OF_RUNS]
    for of_paper in (False, True):
        for words in [words for words in of_runs if ("preset=paper" in words) == of_paper][-1:]:
            words = [word for word in words if not word.startswith(OF_COMPARE)]
            assert settings(combinations(words)[-1])


def test_sets_that_are_not_there_are_left_out_one_by_one_but_those_of_the_hub_are_there(data: Path, tmp_path) -> None:
    (tmp_path / "trec").mkdir()
    (tmp_path / "trec" / "train.parquet").touch()

    def tasks(name: str, **only: str) -> set[str]:
        return {word for words in commands(name, tmp_path, **only) for word in words if word.startswith("task=")}

    assert tasks("decided", preset="cpu") == {"task=digits", "task=trec"}
    assert tasks("race") == {"task=trec"}
    assert tasks("table3", preset="cpu") == {"task=trec"}
    assert tasks("decided", stage="mixture", preset="cpu") == set()  # of trec and sst2
    assert tasks("decided", stage="mixture", preset="paper") == {"task=mixture"}
    assert tasks("table6", preset="paper") > {"task=mixture", "task=cifar10", "task=mrpc"}  # and an adapter for each
    assert "task=cifar100" in tasks("table1", preset="paper")


def test_what_is_chosen_leaves_out_other_values_alone(data: Path) -> None:
    found = commands("decided", data, stage="shares", task="trec", method="shuffled")
    (words,) = [words for words in found if words[0] != "python"]
    assert words[:2] == ["train", "-m"]
    assert {"task=trec", "method=shuffled", "experiment=decided", f"data_dir={data}"} < set(words)
    assert not any(word.startswith("stage=") for word in words)
    last = commands("decided", data, task="trec", preset="cpu")[-1]
    assert last == ["python", "scripts/decided.py", "results/decided"]


def test_compare_of_an_experiment_alone_is_its_study(data: Path, tmp_path: Path) -> None:
    stage = ["experiment=race", "stage=methods", f"data_dir={data}"]
    whole = [words[1:] for words in commands("race", data, stage="methods") if words[0] == "compare"]
    assert len(whole) == 2
    assert options.of_study(stage) == whole
    (trec,) = options.of_study([*stage, "task=trec", "seeds=8"])
    assert {"task=trec", "model=minilm_l6", "experiment=race", "seeds=8"} < set(trec)
    limited = options.of_study([*stage, "limit.served=40MB"])
    assert [options.read(each)[0].limit for each in limited] == [{"served": 40e6}] * 2
    own = ["experiment=race", "methods=[partial]"]
    assert options.of_study(own) == [own]
    for other in ("demo", "race"):  # no study, and one without its sets
        with pytest.raises(PartialLoraError, match="experiment"):
            options.of_study([f"experiment={other}", f"data_dir={tmp_path}"])
    for unknown in (f"data_dir={data / 'nowhere'}", "preset=paper"):
        with pytest.raises(PartialLoraError, match=unknown):
            options.of_study(["experiment=race", unknown])


def test_an_entry_without_words_is_what_the_file_sweeps_by_itself(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "own.yaml").write_text("study: ['', [[seed=1, '']]]")
    monkeypatch.setattr(studies, "conf_dir", lambda: tmp_path)
    found = list(studies.commands("own", tmp_path / "nowhere"))
    assert found == [["train", "-m", "seed=1", "experiment=own"], ["train", "-m", "experiment=own"]]
    assert studies.keys("own") == {"seed"}


def test_comparisons_of_one_study_have_the_same_settings(data: Path) -> None:
    found = options.of_study(["experiment=race", "stage=methods,leaders", f"data_dir={data}"])
    chosen = [options.read(each)[0] for each in found]
    assert options.of_one(chosen[:2]) is chosen[0]
    with pytest.raises(PartialLoraError, match="seeds=3 and 8"):
        options.of_one(chosen)


@pytest.mark.parametrize(
    ("of_runs", "of_script", "ends"), [(2, 0, 2), (-9, 0, 137), (1, 0, 0), (0, 1, 1), (1, 1, 1), (0, 0, 0)]
)
def test_what_is_refused_or_killed_ends_a_study_and_of_what_failed_a_script_alone_is_told(
    of_runs: int, of_script: int, ends: int, monkeypatch, data: Path
) -> None:
    calls = []

    def run(command: list[str], check: bool, env: dict) -> subprocess.CompletedProcess:
        calls.append(command)
        is_script = command[1].startswith("scripts/")  # which imports what lies beside it; a run nothing of there
        assert ("PYTHONSAFEPATH" in env) == (not is_script)
        return subprocess.CompletedProcess(command, of_script if is_script else of_runs)

    monkeypatch.setattr(subprocess, "run", run)
    chosen = ["--only", "stage=methods", "task=trec", "--with", "trainer.epochs=1"]
    assert study.main(["race", "--data", str(data), *chosen]) == ends
    assert calls[0][-1] == "trainer.epochs=1"
    assert len(calls) == 1 if ends > 1 else calls[1][1:3] == ["scripts/race.py", "results/race"]


def test_a_view_has_those_commands_of_its_study_that_its_values_choose_each_once(data: Path) -> None:
    def without_methods(name: str) -> list[tuple[str, ...]]:
        every = commands(name, data, preset="cpu")
        return [tuple(word for word in words if not word.startswith("method")) for words in every]

    whole = {name: set(without_methods(name)) for name in ("decided", "race")}
    views = [name for name in STUDIES if name.startswith(("table", "fig"))]
    assert len(views) == 14
    for name in views:
        own = without_methods(name)
        assert set(own) <= whole["race" if name == "fig6" else "decided"]
        assert own.count(("python", "scripts/decided.py", "results/decided")) == (name != "fig6")
        assert own[-1][0] == "python"  # after all runs
    assert "methods=[dense,partial,targeted]" in commands("table3", data, task="sst2")[0]
    assert commands("table3", data, methods="lora", preset="cpu", task="sst2") == []  # a form that it has not
    assert commands("fig6", data, preset="paper") == []  # a study of one preset, whose words name none


@pytest.mark.parametrize("name", ["decided", "table2", "table3"])
def test_compare_of_a_study_in_two_presets_is_that_of_one(name: str, data: Path) -> None:
    for more in ([], ["task=trec"]):
        found = options.of_study([f"experiment={name}", f"data_dir={data}", *more])
        assert found
        assert options.of_one([options.read(each)[0] for each in found]).seeds == 8


@pytest.mark.parametrize("name", ["table3", "fig4", "fig1"])  # fig1 is a view of table 4
def test_a_run_of_a_view_that_sets_nothing_is_refused(name: str) -> None:
    with pytest.raises(PartialLoraError, match="experiment: expected decided"):
        compose.composed(f"experiment={name}", "task=digits")


@pytest.mark.parametrize("name", ["table1", "decided", "race"])
def test_a_choice_by_a_key_that_no_entry_names_is_refused(name: str, capsys) -> None:
    assert study.main([name, "--only", "preset=cpu", "stgae=first", "--list"]) == 2
    assert "stgae" in capsys.readouterr().err
    assert {"task", "methods"} <= studies.keys(name)


def test_a_preset_that_a_study_does_not_have_is_refused(capsys) -> None:
    assert study.main(["race", "--only", "preset=paper", "--list"]) == 2
    assert "preset=paper" in capsys.readouterr().err
