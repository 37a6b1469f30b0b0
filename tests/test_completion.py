"""Completion: what a shell's line may go on with, and that bash, zsh and fish take it."""

from __future__ import annotations

import contextlib
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from commands import environment
from refusals import refusal

from partial_lora import cli
from partial_lora.completion import candidates, complete
from partial_lora.finished.export_forms import FORMS
from partial_lora.launching import directory
from partial_lora.settings.schema import defaults

SECONDS = 60  # in which a shell has ended, or something is wrong


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
        ("evaluate latest task=trec task.test", [f"{key}=" for key in defaults() if key.startswith("task.test")], True),
        ("predict ", ["latest", "0123abcd/seed0", "0123abcd/seed1", "4567abcd"], True),
        ("predict 4", ["4567abcd"], True),
        ("predict 4567abcd w", [], True),
        ("export latest --to ", list(FORMS), True),
        ("export latest --to=g", ["--to=gguf"], True),
        ("export --to gguf l", ["latest"], True),
        ("export latest --to gguf --", ["--out", "--check", "--help"], True),
        ("evaluate latest --split v", ["validation"], True),
        ("merge latest 4567abcd --weights 1 2 --h", ["--help", "--how"], True),
        ("train --to ", ["method="], False),
    ],
)
def test_a_line_goes_on_with_commands_groups_keys_and_runs(line, among, whole, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text("method.rank: 4\nhydra.sweeper.params: {seed: 1}\n")
    for name in ("lora-0123abcd/seed0", "lora-0123abcd/seed1", "vera-4567abcd/seed0"):
        (tmp_path / "results" / "runs" / "digits" / "tiny_vit" / name).mkdir(parents=True)
    directory.link_latest("results", Path("results/runs/digits/tiny_vit/vera-4567abcd/seed0"))
    found = candidates(line.split(" "), list(cli.COMMANDS), cli.parser_of)
    assert set(found) == set(among) if whole else set(among) < set(found)


def test_names_that_a_shell_would_run_are_not_offered(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (
        "partial-$(touch ran)/seed0",
        "lora-`touch ran`/seed0",
        "lora-0123abcd/seed0",
        "lora-0123abcd/seed1;ran",
    ):
        (tmp_path / "results" / "runs" / "digits" / "tiny_vit" / name).mkdir(parents=True)
    (tmp_path / "own" / "task").mkdir(parents=True)
    for name in ("films", "films$(touch ran)"):
        (tmp_path / "own" / "task" / f"{name}.yaml").write_text("")
    assert candidates(["predict", ""], list(cli.COMMANDS)) == ["0123abcd/seed0"]
    for given in (["--config-dir=own"], ["--config-dir", "own"]):
        assert candidates(["train", *given, "task=film"], list(cli.COMMANDS)) == ["task=films"]


@pytest.mark.parametrize("line", ["--config-dir 'my own'", r"--config-dir=my\ own", '-cd "my own"'])
def test_group_files_are_found_in_a_folder_whose_name_has_a_space(line, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my own" / "task").mkdir(parents=True)
    (tmp_path / "my own" / "task" / "films.yaml").write_text("")
    monkeypatch.setenv("COMP_LINE", f"partial-lora train {line} task=film")
    assert complete("query=bash", list(cli.COMMANDS)) == "task=films "


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_takes_what_stands_behind_the_last_end_of_a_word(tmp_path: Path) -> None:
    line = "partial-lora train task=sst"
    script = f"""
partial-lora() {{ '{sys.executable}' -m partial_lora "$@"; }}
eval "$(partial-lora train -sc install=bash)"
COMP_LINE='{line} and more' COMP_POINT={len(line)}
_partial_lora
printf '<%s>' "${{COMPREPLY[@]}}"
"""
    assert said(["bash", "-c", script], tmp_path) == "<sst2 >"


def said(command: list[str], place: Path) -> str:
    done = subprocess.run(
        command, cwd=place, env=environment(place), capture_output=True, text=True, check=True, timeout=SECONDS
    )
    return done.stdout


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh")
def test_zsh_completes_words_keys_and_files_in_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "own rows.csv").write_text("")
    function = f"""partial-lora() {{
    if [[ "$1" == -sc ]]; then '{sys.executable}' -m partial_lora "$@"; else print -rl -- "<${{(j:|:)@}}>"; fi
}}"""
    # Behind a word that is whole there is a space, behind a part of one there is none.
    typed = ["train task=sst\ttask.label_n\t1", "calibrate task.data_files=./ow\t"]
    setup = ["autoload -Uz compinit; compinit -u -D", function, 'eval "$(partial-lora -sc install=zsh)"']
    lines = [*setup, *(f"partial-lora {line}" for line in typed)]
    shown = in_terminal(["zsh", "-f", "-i"], [*lines, "exit"], tmp_path)
    expected = ["<train|task=sst2|task.label_noise=1>", "<calibrate|task.data_files=./own rows.csv>"]
    assert [line for line in shown.splitlines() if line.startswith("<")] == expected


def in_terminal(command: list[str], lines: list[str], place: Path) -> str:
    """What a program shows on a terminal on which all lines are typed ahead."""
    own, its = pty.openpty()
    os.write(own, "".join(f"{line}\n" for line in lines).encode())
    running = subprocess.Popen(
        command,
        cwd=place,
        env=environment(place) | {"TERM": "dumb"},
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
    )
    os.close(its)
    end = threading.Timer(SECONDS, os.killpg, (running.pid, signal.SIGKILL))
    end.start()
    shown = b""
    with contextlib.suppress(OSError):  # its end, on Linux
        while part := os.read(own, 2**16):
            shown += part
    end.cancel()
    os.close(own)
    assert running.wait() == 0
    return shown.decode().replace("\r", "")


@pytest.mark.skipif(shutil.which("fish") is None, reason="there is no fish")
def test_fish_completes_words_keys_and_files(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("")
    script = f"""
function partial-lora; '{sys.executable}' -m partial_lora $argv; end
partial-lora -sc install=fish | source
for line in 'train ta' 'calibrate task.data_files=./ow'
    string join -- '|' (complete -C "partial-lora $line")
end
"""
    shown = said(["fish", "--no-config", "-c", script], tmp_path)
    assert shown.splitlines() == ["task.|task=", "task.data_files=./own.csv"]


def test_a_shell_that_is_not_known_is_refused() -> None:
    with refusal("--shell-completion install=ksh: "):
        complete("install=ksh", list(cli.COMMANDS))
