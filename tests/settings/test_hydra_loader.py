"""Files of settings are data: nothing in them reaches what Hydra runs, reads or writes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from refusals import refusal

from partial_lora.errors import PartialLoraError
from partial_lora.settings import compose

TOUCH = {"_target_": "pathlib.Path.touch", "_args_": [{"_target_": "pathlib.Path", "_args_": ["it_ran"]}]}
LOGGED = {"version": 1, "handlers": {"file": {"()": "logging.FileHandler", "filename": "it_ran"}}}
DOORS = [  # all that Hydra instantiates, imports, writes to or reads from, and a value that would open it
    ("callbacks", {"x": TOUCH}),
    ("job_logging", LOGGED),
    ("hydra_logging", LOGGED),
    ("help", {"template": "$CONFIG"}),
    ("hydra_help", {"template": "$CONFIG"}),
    ("launcher", TOUCH),
    ("launcher", {"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher", "_partial_": True}),
    ("sweeper", TOUCH),
    ("sweeper", {"max_batch_size": TOUCH}),
    ("sweeper", {"params": {"seed": TOUCH}}),
    ("sweeper", {"params": {"+hydra/launcher": "joblib,basic"}}),
    ("sweeper", {"direction": [TOUCH]}),
    ("sweeper", {"storage": "sqlite:///it_ran"}),
    ("sweeper", {"custom_search_space": "pathlib.Path"}),
    ("launcher", {"setup": ["touch it_ran"]}),
    ("launcher", None),
    ("sweeper", None),
    ("job", {"env_set": {"LD_PRELOAD": "it_ran"}}),
    ("job", {"env_copy": ["HOME"]}),
    ("job", {"chdir": True}),
    ("job", {"name": "other"}),
    ("run", {"dir": "it_ran"}),
    ("sweep", {"dir": "it_ran"}),
    ("sweep", {"subdir": "it_ran"}),
    ("output_subdir", "it_ran"),
    ("verbose", True),
    ("searchpath", ["file://elsewhere"]),
    ("searchpath", ["pkg://it_ran"]),
    ("overrides", {"hydra": ["hydra.job.env_set={LD_PRELOAD: it_ran}"]}),
    ("overrides", {"task": ["seed=1"]}),
    ("runtime", {"output_dir": "it_ran"}),
]
GLOBAL = "# @package _global_\n"
SWEEP = {"mode": "MULTIRUN", "sweeper": {"params": {"seed": "0,1"}}}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a module and group files that settings could name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "it_ran.py").write_text("raise SystemExit('it ran')")
    return tmp_path


def written(file: Path, content: object, head: str = "") -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(head + yaml.safe_dump(content))
    return str(file)


def planned(*arguments: str) -> compose.Plan:
    with compose.in_one_line(arguments):
        found = compose.plan([*arguments, "model=tiny_vit"])
    for line in found.refused:
        raise PartialLoraError(line)
    return found


@pytest.mark.parametrize(("node", "value"), DOORS, ids=[f"{node}-{number}" for number, (node, _) in enumerate(DOORS)])
def test_no_file_reaches_what_hydra_runs_or_reads_or_writes(place: Path, node: str, value: object) -> None:
    for content in ({"hydra": {node: value}}, {f"hydra.{node}": value}):
        with refusal(rf"own\.yaml: hydra\.{node}\b"):
            planned(written(Path("own.yaml"), content))
    assert {each.name for each in place.iterdir()} == {"own.yaml", "it_ran.py"}


@pytest.mark.parametrize("node", dict(DOORS))
def test_no_group_file_does(place: Path, node: str) -> None:
    value = next(value for known, value in DOORS if known == node)
    written(Path("conf/experiment/own.yaml"), {"hydra": {node: value}}, GLOBAL)
    with refusal(rf"(--config-dir .*: )?.*\bhydra\.{node}\b"):
        planned("--config-dir=conf", "-m", "seed=0,1", "experiment=own")
    assert {each.name for each in place.iterdir()} == {"conf", "it_ran.py"}


SWEPT = {"+hydra.job.env_set.X": 1}
OF_CALLBACKS, CHOSEN = {"hydra": {"callbacks": {"x": TOUCH}}}, ["experiment=own"]
WAYS = {  # a file, its content, its head, and what chooses it
    "a package": ("experiment/own", {"x": TOUCH}, "# @package hydra.callbacks\n", CHOSEN),
    "a package in a list": ("experiment/own", {"defaults": [{"/trainer@hydra.callbacks.x": "own"}]}, GLOBAL, CHOSEN),
    "a choice": ("experiment/own", {"defaults": [{"override /hydra/launcher": "../../trainer/own"}]}, GLOBAL, CHOSEN),
    "a reference": ("experiment/own", {"hydra": {"callbacks": "${trainer}"}}, GLOBAL, CHOSEN),
    "one of several": ("experiment/own", OF_CALLBACKS, GLOBAL, ["-m", "experiment=demo,own"]),
    "a swept key": ("experiment/own", {"hydra": {"sweeper": {"params": SWEPT}}}, GLOBAL, ["-m", *CHOSEN]),
}


@pytest.mark.parametrize("way", WAYS)
def test_nor_does_a_file_by_any_other_way(place: Path, way: str) -> None:
    name, content, head, chosen = WAYS[way]
    written(Path(f"conf/{name}.yaml"), content, head)
    written(Path("conf/trainer/own.yaml"), TOUCH)
    with refusal(r"(--config-dir .*: )?.*\bhydra[./]"):
        planned("--config-dir=conf", *chosen)
    assert not Path("it_ran").exists()


@pytest.mark.parametrize("name", ["own", "schema", "config", "hydra/launcher/own", "hydra/env/default", "task/digits"])
def test_no_group_file_stands_in_for_one_of_the_package_or_of_hydras(place: Path, name: str) -> None:
    written(Path(f"conf/{name}.yaml"), {"hydra": {"searchpath": ["pkg://it_ran"]}})
    with refusal(rf"--config-dir conf: {name.partition('/')[0]}"):
        planned(written(Path("file.yaml"), {"seed": 1}), "--config-dir=conf")


@pytest.mark.parametrize("group", ["model", "task", "method", "importance", "calibration", "mask", "trainer"])
def test_a_target_is_no_key_of_a_run(place: Path, group: str) -> None:
    """Nor is what it would be given: no group of settings is instantiated."""
    with refusal(rf"own\.yaml: {group}\._"):
        planned(written(Path("own.yaml"), {f"{group}.{key}": value for key, value in TOUCH.items()}))
    assert not Path("it_ran").exists()


def test_a_member_of_a_mixture_is_a_task_and_nothing_else(place: Path) -> None:
    for key, value in (("hydra", {"callbacks": {"x": TOUCH}}), ("_target_", "pathlib.Path.touch")):
        with refusal(rf"task\.members\.a\.{key}: "):
            members = {"task": "mixture", "task.members": {"a": {"modality": "text", "path": "files", key: value}}}
            planned(written(Path("own.yaml"), members))


def test_a_file_says_how_its_runs_are_launched_by_names_and_numbers(place: Path) -> None:
    own = {"hydra": SWEEP, "hydra/launcher": "joblib", "hydra.launcher.n_jobs": 2}
    found = planned(written(Path("own.yaml"), own))
    assert (found.launcher, len(found.runs)) == ("joblib", 2)
    for choice, name in (("hydra/launcher", "ray_aws"), ("hydra/sweeper", "optuna")):
        with refusal(f".*{choice}={name}: "):
            planned(written(Path("own.yaml"), {choice: name, "hydra.mode": "MULTIRUN"}))


@pytest.mark.parametrize(
    "key", ["hydra.run.dir", "hydra.job.chdir", "++hydra.callbacks.x._target_", "hydra/env", "hydra"]
)
def test_a_key_of_hydras_that_no_run_heeds_is_refused(key: str) -> None:
    with refusal(rf"{key.replace('+', '.')}=own: "):
        planned(f"{key}=own")


def test_the_command_line_sets_every_field_of_a_launcher_beside_a_file(place: Path) -> None:
    own = written(Path("own.yaml"), {"seed": 3})
    fields = [
        "hydra.launcher.setup=[module load cuda]",
        "hydra.launcher.partition=gpu",
        "+hydra.launcher.additional_parameters.x=1",
    ]
    found = planned("-m", own, "hydra/launcher=submitit_slurm", *fields, "seed=0,1")
    assert (found.launcher, len(found.runs)) == ("submitit_slurm", 2)


def test_neither_a_device_nor_a_pipe_is_a_file(place: Path) -> None:
    os.mkfifo("pipe")
    Path("zero.yaml").symlink_to("/dev/zero")
    Path("pipe.yaml").symlink_to("pipe")
    for file in ("/dev/zero", "pipe"):
        for key in ("task.data_files", "calibration.file", "trainer.accelerate_config"):
            with refusal(f"{key}={file}: "):
                planned(f"{key}={file}")
    for file in ("zero.yaml", "pipe.yaml"):
        with refusal(f"{file}: "):
            planned(file)


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level + 1}: &a{level + 1} [{', '.join([f'*a{level}'] * 9)}]\n" for level in range(12)
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "a: &a [*a]",
        "[" * 500,
        "model: [",
        "a: 1\na: 2",
        "a: ${",
        "x" * 2**18 + ": 1",
        "a: !!python/name:os.system",
    ],
)
def test_a_file_that_is_no_yaml_or_has_no_end_is_one_line(place: Path, text: str) -> None:
    Path("own.yaml").write_text(text)
    with refusal(r"own\.yaml: "):
        planned("own.yaml")
    Path("conf/task").mkdir(parents=True)
    Path("conf/task/own.yaml").write_text(text)
    with refusal(r".*conf/task/own\.yaml: "):
        planned("--config-dir=conf", "task=own")


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "a/${ oc.env : HOME}", "${oc.${model.name}:HOME}", "${at_home:x}"])
def test_a_file_refers_to_keys_and_to_nothing_else(place: Path, value: str) -> None:
    """A token of the environment would be part of an address that the run asks for."""
    found = planned(written(Path("own.yaml"), {"seed": 3, "results_dir": "${model.name}/${seed}"}))
    assert found.runs[0][1].results_dir == "tiny_vit/3"
    for content in ({"task.data_files": {"train": value}}, {"hydra.sweeper.params": {"results_dir": [value]}}):
        with refusal(r"own\.yaml: \$\{"):
            planned(written(Path("own.yaml"), content))
    Path("own.yaml").write_text(f'results_dir: "\\x24{value[1:]}"')  # YAML's own way to write it
    with refusal(r"own\.yaml: \$\{"):
        planned("own.yaml")
    written(Path("conf/task/own.yaml"), {"name": value})
    with refusal(r".*conf/task/own\.yaml: \$\{"):
        planned("--config-dir=conf", "task=own")


def test_what_a_file_holds_neither_ends_a_line_nor_moves_a_cursor(place: Path) -> None:
    with refusal(r"task=a\\n\\x1b\[31mb: "):
        planned(written(Path("own.yaml"), {"task": "a\n\x1b[31mb"}))
