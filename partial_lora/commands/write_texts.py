"""generate, chat and serve: what a finished run of a language model writes."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from partial_lora.commands.common import (
    add_device,
    add_member,
    libraries,
    named_run,
    parser_of_run,
    port_number,
    positive,
    temperature,
    whole,
)
from partial_lora.errors import PartialLoraError
from partial_lora.finished.target_task import one_task
from partial_lora.launching import directory


def generate(arguments: Sequence[str]) -> int:
    """Print what a causal run writes after a prompt, as it is written; return the exit code.

    Raises PartialLoraError for a run that is none, or whose model writes no texts.
    """
    parser = parser_of_run(
        "generate",
        "Continue a prompt with a finished run of a causal language model, word by word. The prompt goes "
        "into the chat template if the prompts of the run's task did.",
    )
    parser.add_argument("prompt", metavar="PROMPT", help="a text; - reads one from standard input")
    _add_writing(parser)
    parsed = parser.parse_args(list(arguments))

    def prompts() -> list[str]:
        prompt = parsed.prompt if parsed.prompt != "-" else sys.stdin.read() if sys.stdin else ""
        if not prompt.strip():
            raise PartialLoraError("PROMPT: expected a text, not an empty one")
        return [prompt]

    return _write(parsed, prompts)


def chat(arguments: Sequence[str]) -> int:
    """Converse with a causal run, whose answers are printed as they are written; return the exit code.

    Raises PartialLoraError as `generate` does.
    """
    parser = parser_of_run(
        "chat",
        "Converse with a finished run of a causal language model. Each line of standard input is a turn, which the "
        "model reads with all before it; Ctrl-D ends the conversation.",
    )
    _add_writing(parser)
    return _write(parser.parse_args(list(arguments)), _turns)


def _add_writing(parser: argparse.ArgumentParser) -> None:
    """Add the options of how texts are written."""
    parser.add_argument(
        "--temperature",
        type=temperature,
        default=0.0,
        metavar="T",
        help="0, the default: always the likeliest token; larger: more chance",
    )
    parser.add_argument(
        "--seed", type=whole, metavar="N", help="draws the tokens above temperature 0 (default: no seed)"
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="a string that ends the text, beside the run's task.stop",
    )
    parser.add_argument("--max-new-tokens", type=positive, metavar="N", help="default: the run's task.max_new_tokens")
    add_member(parser)
    add_device(parser)


def _write(parsed: argparse.Namespace, prompts: Callable[[], Iterable[str]]) -> int:
    """Print what a run writes after each prompt of one conversation."""
    run = named_run(parsed.run)
    run.check_causal(run.directory)
    one_task(run, parsed.member)
    if "" in parsed.stop:
        raise PartialLoraError("--stop: expected a text, not an empty one")
    turns = prompts()
    with libraries():
        from partial_lora.finished.generate import Writer
    writer = Writer(
        run,
        member=parsed.member,
        device=parsed.device,
        max_new_tokens=parsed.max_new_tokens,
        stop=parsed.stop,
        temperature=parsed.temperature,
        seed=parsed.seed,
    )
    for _ in writer.converse(turns, lambda text: print(text, end="", flush=True)):
        print(flush=True)
    return 0


def _turns() -> Iterator[str]:
    """Yield the lines that a person writes, or those of standard input."""
    if sys.stdin is None or not sys.stdin.isatty():
        yield from (line.rstrip("\r\n") for line in sys.stdin or ())
        return
    print("Each line is a turn of a conversation. Ctrl-D ends it.", file=sys.stderr)
    with contextlib.suppress(EOFError):
        while True:
            yield input("> ")


def serve(arguments: Sequence[str]) -> int:
    """Become an OpenAI-compatible server of a causal run on this machine; raises PartialLoraError where none can be."""
    from partial_lora.finished import server

    parser = parser_of_run(
        "serve",
        "Serve a finished run of a causal language model on this machine, as OpenAI's API does (/v1), by a server that "
        "is installed: that of transformers, vLLM or llama.cpp. It serves RUN_DIR/export/merged, of llama.cpp "
        "RUN_DIR/export/gguf, and makes it if it is not there. Ctrl-C ends it.",
    )
    parser.add_argument(
        "--server", choices=tuple(server.SERVERS), help="default: transformers, else vllm; with --base llama.cpp"
    )
    parser.add_argument("--base", type=Path, metavar="FILE", help="llama.cpp: a GGUF file of the base model")
    parser.add_argument(
        "--port", type=port_number, default=8000, metavar="N", help="default: 8000; 0: any that is free"
    )
    add_device(parser)
    parsed = parser.parse_args(list(arguments))
    run = named_run(parsed.run)
    run.check_causal(run.directory)
    chosen, port = server.chosen(parsed.server, parsed.base), server.free(parsed.port)
    with libraries():
        from partial_lora.building import build
        from partial_lora.finished import export
        from partial_lora.report import run_card
    folder = run.directory.resolve() / "export" / chosen.form
    if not directory.tensor_files(folder):
        export.export(run, chosen.form, describe=run_card.write)
    task = next(iter(run.config.task.members.values())) if run.config.task.members else run.config.task
    is_chat = build.transform_of(run.config.model, task).chat
    print(f"http://{server.HOST}:{port}/v1, once it has loaded {folder}; Ctrl-C ends it")
    print(server.question(folder.name, port, chat=is_chat, max_tokens=task.max_new_tokens, stop=task.stop), flush=True)
    server.become(chosen, folder, port, parsed.device, parsed.base)
