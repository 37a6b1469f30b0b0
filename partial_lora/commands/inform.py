"""info, env and schema: what is known without a run."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from partial_lora.commands.common import libraries, parser_for
from partial_lora.errors import require
from partial_lora.settings.arguments import is_file, settings_of
from partial_lora.settings.compose import compose, composed
from partial_lora.settings.rates import trainer_of
from partial_lora.settings.schema import Config
from partial_lora.settings.versions import plain

if TYPE_CHECKING:
    from partial_lora.building.info import Outline


def info(arguments: list[str]) -> int:
    """Print a run's trainable parameters, memory and file size, without running it; return the exit code.

    --memory also counts what a step keeps for its backward pass, on a model without memory.

    A text model without a named task is counted with a task of two classes.
    """
    shown = _print_json_outline if "--json" in arguments else _print_outline
    keys = [key for each in arguments for key in (settings_of(each) if is_file(each) else [each])]
    named = any(re.match(r"\+*task\b", str(key)) for key in keys)

    def outlined(config: Config) -> int:
        from partial_lora.building.info import outline, without_task

        config = config if named else without_task(config)
        with libraries():  # some methods are counted with them
            run = outline(config, memory="--memory" in arguments)
        shown(config, run)
        return 0

    options = ("--json", "--memory")
    return compose("info", [argument for argument in arguments if argument not in options], outlined)


def _print_json_outline(config: Config, run: Outline) -> None:
    names = {group: getattr(config, group).name for group in ("model", "task", "method")}
    rates = _rates(config, run)
    of_rates = {"learning_rate": rates, "first_learning_rate": rates["adapter"]}
    print(json.dumps(names | dataclasses.asdict(run) | of_rates, allow_nan=False))


def _rates(config: Config, run: Outline) -> dict[str, float]:
    known = {"width": run.width, "density": run.density, "has_head": config.model.trains_whole}
    return trainer_of(plain(config), config.trainer, **known).learning_rates


def _print_outline(config: Config, run: Outline) -> None:
    from rich.console import Console

    from partial_lora.building import size

    Console().print(size.table(run.counts, run.memory, run.kept, masked=config.method.traits.masked))
    heads = {0: "there is no head", 1: "the head is for one number"}
    head = heads.get(run.outputs, f"the head is for {run.outputs} classes")
    head += "" if run.is_known else ", a guess: the task does not say how many there are"
    passes = f"calibration takes at most {run.passes:,} passes" if run.passes else "nothing is calibrated"
    text = f"{run.sparsity_is}; {head}; {passes}"
    if run.memory:
        sequences, length = config.trainer.local_batch_size, config.model.max_length
        text += f"; memory is for {sequences} sequences of {length} tokens at once, and an estimate"
        text += "\nfor less memory: model.gradient_checkpointing=true, model.quantization=nf4, a smaller"
        text += " model.max_length, or the same batch in parts: trainer.gradient_accumulation_steps"
    rates = ", ".join(f"{part} {rate:.3g}" for part, rate in _rates(config, run).items())
    text += f"\nlearning rate: {rates}"
    print(text, *(f"beware: {line}" for line in config.warnings), sep="\n")


def env(arguments: list[str]) -> int:
    """Print versions, platform and devices, as a report of a bug needs them; return the exit code."""
    parser = parser_for("env", "Print what a report of a bug needs: versions, platform, devices. It prints no paths.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parsed = parser.parse_args(arguments)
    from partial_lora.launching.env import surroundings

    with libraries():
        found = surroundings()
    lines = [f"{name:<16} {value}" for name, value in found.items()]
    print(json.dumps(found) if parsed.json else "\n".join(lines))
    return 0


def schema(arguments: Sequence[str]) -> int:
    """Print the JSON Schema of a settings file; return the exit code."""
    parser = parser_for(
        "schema",
        "Print the JSON Schema of a settings file: keys, types, ranges, choices and what each key means. The first "
        "line of a file names it to an editor with a YAML language server: # yaml-language-server: $schema=schema.json",
        epilog="For example: partial-lora schema > schema.json",
    )
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="a folder of group files of your own")
    place = parser.parse_args(list(arguments)).config_dir
    require(place is None or place.is_dir(), "--config-dir", place, "a folder of group files")
    from partial_lora.settings.editor import json_schema

    known = json_schema(plain(composed()), [place] if place else [])
    print(json.dumps(known, indent=1, ensure_ascii=False))
    return 0
