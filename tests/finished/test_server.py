"""The server of a run answers over HTTP what the run writes, and leaves nothing behind when it ends."""

from __future__ import annotations

import json
import shlex
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import finished_runs
import psutil
import pytest
import tiny_causal
from commands import environment, until
from refusals import refusal

from partial_lora import cli
from partial_lora.finished import generate, server
from partial_lora.finished.run import FinishedRun

PROMPT = "say red 7"


@contextmanager
def served(place: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen, list[str]]]:
    """`partial-lora serve` under way, and the words of the curl line that it has printed."""
    command = [sys.executable, "-m", "partial_lora", "serve", *arguments, "--port", "0", "--device", "cpu"]
    with (
        open(place / "log", "w") as log,
        subprocess.Popen(
            command, cwd=place, env=environment(place), stdout=subprocess.PIPE, stderr=log, text=True
        ) as run,
    ):
        try:
            address, curl = run.stdout.readline(), run.stdout.readline()
            assert address.startswith("http://127.0.0.1:"), (place / "log").read_text()
            yield run, shlex.split(curl)
        finally:
            run.kill()


def chat_run(place: Path) -> FinishedRun:
    """Over a folder whose tokenizer is as those of language models are: it has a chat template and adds no end."""
    tokenizer = tiny_causal.merging_tokenizer(chat=True)
    for part in (tokenizer, tiny_causal.llama(tokenizer)):
        part.save_pretrained(place / "tiny")
    short = ("method=lora", "task.max_new_tokens=12", "trainer.learning_rate=0.001", "trainer.max_steps=4")
    files = finished_runs.override(finished_runs.exchange_files())
    return finished_runs.trained(
        "served", f"model={place / 'tiny'}", "task=text_generation", *finished_runs.GENERATION, *short, files
    )


def answered(curl: list[str], prompt: str) -> dict:
    """What the curl line is answered, of another prompt."""
    body = json.loads(curl[curl.index("-d") + 1])
    (message,) = body["messages"]
    body["messages"] = [message | {"content": prompt}]
    request = urllib.request.Request(curl[1], json.dumps(body).encode())
    request.add_header(*curl[curl.index("-H") + 1].split(": "))
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((server.HOST, port)) == 0


@pytest.mark.skipif(not server.SERVERS["transformers"].is_installed, reason="transformers[serving]: its extra `serve`")
def test_the_server_answers_what_the_run_writes_and_ends_at_ctrl_c(tmp_path: Path) -> None:
    run = chat_run(tmp_path)
    with served(tmp_path, str(run.directory), "--server", "transformers") as (process, curl):
        port = int(curl[1].partition(":")[2].split(":")[1].split("/")[0])
        until(lambda: listens(port), process)
        listening = psutil.Process(process.pid).net_connections("tcp")
        assert port in {connection.laddr.port for connection in listening}  # the process is the server itself
        expected = generate.Writer(run, device="cpu").write(PROMPT, lambda part: None)
        (choice,) = answered(curl, PROMPT)["choices"]
        assert choice["message"]["content"].strip() == expected != ""
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 128 + signal.SIGINT
        assert not listens(port)
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("of", "arguments", "named"),
    [
        (finished_runs.image_run, [], "model=tiny_vit"),
        (finished_runs.generation_run, ["--port", "65536"], "--port"),
        (finished_runs.generation_run, ["--base", "no.gguf"], "--base no.gguf"),
        (finished_runs.generation_run, ["--server", "llama.cpp"], "--base"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(capsys, of, arguments, named) -> None:
    assert cli.main(["serve", str(of().directory), *arguments]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert named in printed.err


def test_a_port_in_use_and_a_missing_server_are_refused(monkeypatch, capsys) -> None:
    run = str(finished_runs.generation_run().directory)
    with socket.socket() as other:
        other.bind((server.HOST, 0))
        other.listen()
        monkeypatch.setattr(server, "find_spec", lambda name: True)
        port = other.getsockname()[1]
        assert cli.main(["serve", run, "--port", str(port)]) == 2
        assert f"--port {port}" in capsys.readouterr().err
        assert server.free(0) != port
    monkeypatch.setattr(server, "find_spec", lambda name: None)
    assert cli.main(["serve", run]) == 2
    assert "transformers[serving]" in capsys.readouterr().err
    for name in server.SERVERS:
        with refusal(f"--server {name}" if name != "llama.cpp" else "--base"):
            server.chosen(name, None)


def test_the_first_server_that_is_installed_is_taken(monkeypatch, tmp_path) -> None:
    base = tmp_path / "base.gguf"
    base.touch()
    there: set[str] = {"vllm"}
    monkeypatch.setattr(server, "find_spec", lambda name: name in there or None)
    assert server.chosen(None, None) is server.SERVERS["vllm"]
    there |= set(server.SERVERS["transformers"].packages) | set(server.SERVERS["llama.cpp"].packages)
    assert server.chosen(None, None) is server.SERVERS["transformers"]
    assert server.chosen(None, base) is server.SERVERS["llama.cpp"]
