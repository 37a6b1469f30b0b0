"""A server of somebody else's that answers with a finished causal run over HTTP, as OpenAI's does. Imports no torch.

It takes the place of this process, so that Ctrl-C and every signal reach it and nothing is left behind. It listens to
this machine alone, and fetches nothing.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from partial_lora.errors import PartialLoraError

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Server:
    """A program that serves a model.

    packages: those that it needs, all of them installed. form: of the export that it serves. module, words: its module,
    and what follows that on a command line: of the model's name, which is its folder's, the port, the device and the
    base model.
    """

    packages: tuple[str, ...]
    form: str
    module: str
    words: Callable[[str, int, str, Path | None], list[str]]

    @property
    def is_installed(self) -> bool:
        return all(find_spec(package) for package in self.packages)


def _of_transformers(name: str, port: int, device: str, base: Path | None) -> list[str]:
    return ["serve", name, f"--host={HOST}", f"--port={port}", f"--device={device}"]


def _of_vllm(name: str, port: int, device: str, base: Path | None) -> list[str]:
    return ["serve", name, f"--host={HOST}", f"--port={port}", f"--served-model-name={name}"]


def _of_llama_cpp(name: str, port: int, device: str, base: Path | None) -> list[str]:
    model = [f"--model={base}", f"--lora_path={name}/adapter.gguf", f"--model_alias={name}"]
    return [*model, f"--host={HOST}", f"--port={port}", f"--n_gpu_layers={0 if device == 'cpu' else -1}"]


SERVERS = {  # in the order in which they are taken: the first serves every run, and wherever torch computes
    "transformers": Server(
        ("fastapi", "uvicorn", "openai"), "merged", "transformers.cli.transformers", _of_transformers
    ),
    "vllm": Server(("vllm",), "merged", "vllm.entrypoints.cli.main", _of_vllm),
    "llama.cpp": Server(
        ("llama_cpp", "fastapi", "uvicorn", "sse_starlette", "starlette_context", "pydantic_settings"),
        *("gguf", "llama_cpp.server", _of_llama_cpp),
    ),
}
_INSTALL = "partial-lora's extra `serve` (`pip install 'transformers[serving]'`) brings one; vllm will do, too"


def chosen(name: str | None, base: Path | None) -> Server:
    """Return the server of a name, or the first that is installed; of llama.cpp if there is a base model for it.

    Raises PartialLoraError where it is not installed, and where llama.cpp and a base model do not come together.
    """
    names = [name] if name else ["llama.cpp"] if base else [each for each in SERVERS if each != "llama.cpp"]
    if (base is None) == (names == ["llama.cpp"]):
        expected = "a GGUF file of the base model, for llama.cpp" if base is None else "no base beside another server"
        raise PartialLoraError(f"--base {base}: expected {expected}")
    if base is not None and not base.is_file():
        raise PartialLoraError(f"--base {base}: no such file, expected a GGUF file of the base model")
    server = next((SERVERS[each] for each in names if SERVERS[each].is_installed), None)
    if server is None:
        raise PartialLoraError(f"--server {name or 'auto'}: none is installed; {_INSTALL}")
    return server


def free(port: int) -> int:
    """Return a port that nothing listens to; 0 stands for any. Raises PartialLoraError for one in use."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise PartialLoraError(f"--port {port}: {error.strerror}; expected a free one, or 0 for any") from error
        return probe.getsockname()[1]


def question(name: str, port: int, *, chat: bool, max_tokens: int, stop: list[str]) -> str:
    """Return the curl command that asks a question as the run's task does: in its chat template, or as it is."""
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]} if chat else {"prompt": "Hello"}
    body = {"model": name, **asked, "max_tokens": max_tokens, "temperature": 0, **({"stop": stop} if stop else {})}
    url = f"http://{HOST}:{port}/v1/{'chat/completions' if chat else 'completions'}"
    return shlex.join(["curl", url, "-H", "Content-Type: application/json", "-d", json.dumps(body)])


# `-m` would import from the folder of the export, before Python 3.11 in spite of PYTHONSAFEPATH. A server that has shut
# down at Ctrl-C raises the signal again, and would print of it.
_START = """
import runpy, signal, sys
sys.path[:] = filter(None, sys.path)
signal.signal(signal.SIGINT, lambda number, frame: sys.exit(128 + number))
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def become(server: Server, folder: Path, port: int, device: str, base: Path | None) -> NoReturn:
    """Become the server of an export, from whose parent folder it runs: so the model's name is the folder's."""
    words = server.words(folder.name, port, device, base and base.absolute())
    # llama.cpp's would sooner listen where variables of these names say.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HOST": HOST, "PORT": str(port)}
    environment.pop("CONFIG_FILE", None)
    os.chdir(folder.parent)
    os.execve(sys.executable, [sys.executable, "-c", _START, server.module, *words], environment)
