"""Completion: what a shell's line may go on with, and that bash takes it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import environment
from refusals import refusal

from partial_lora import cli
from partial_lora.runs import directory
from partial_lora.runs.completion import candidates, complete


@pytest.mark.parametrize(
    ("line", "among", "whole"),
    [
        ("ev", ["evaluate"], True),
        ("train task=sst", ["task=sst2"], True),
        ("train ta", ["task=", "task."], True),
        ("calibrate calibration.thr", ["calibration.threshold="], True),
        ("info model.target", ["model.target_modules="], True),
        ("train method=lora trainer.", ["trainer.epochs=", "trainer.learning_rate="], False),
        ("train own.yaml method=lor", ["method=lora"], False),
        ("train own.yaml method.rank=", ["method.rank=4"], True),  # the value that it has
        ("train -m hydra/lau", ["hydra/launcher="], True),
        ("train task.data_files=./o", [], True),  # files are the shell's
        ("train own", [], True),
        ("evaluate latest task=trec task.test", ["task.test_samples=", "task.test_split="], True),
        ("predict ", ["latest", "0123abcd/seed0", "0123abcd/seed1", "4567abcd"], True),
        ("predict 4", ["4567abcd"], True),
        ("predict 4567abcd w", [], True),
    ],
)
def test_a_line_goes_on_with_commands_groups_keys_and_runs(line, among, whole, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text("method.rank: 4\nhydra.sweeper.params: {seed: 1}\n")
    for name in ("lora-0123abcd/seed0", "lora-0123abcd/seed1", "vera-4567abcd/seed0"):
        (tmp_path / "results" / "runs" / "digits" / "tiny_vit" / name).mkdir(parents=True)
    directory.link_latest("results", Path("results/runs/digits/tiny_vit/vera-4567abcd/seed0"))
    found = candidates(line.split(" "), list(cli.COMMANDS))
    assert set(found) == set(among) if whole else set(among) < set(found)


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_takes_what_stands_behind_the_last_end_of_a_word(tmp_path: Path) -> None:
    line = "partial-lora train task=sst"
    script = f"""
partial-lora() {{ '{sys.executable}' -m partial_lora "$@"; }}
eval "$(partial-lora train -sc install=bash)"
COMP_LINE='{line} and more' COMP_POINT={len(line)}
_partial_lora
printf '<%s>' "${{COMPREPLY[@]}}"
eval "$(partial-lora -sc uninstall=bash)"
complete -p partial-lora || true
"""
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, check=True
    )
    assert done.stdout == "<sst2 >"


def test_a_shell_that_is_not_known_is_refused() -> None:
    with refusal("--shell-completion install=ksh: "):
        complete("install=ksh", list(cli.COMMANDS))
