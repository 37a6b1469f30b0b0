"""`partial-lora theory`: what is proved of sparse adapters of one size, beside what is simulated."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from partial_lora.errors import PartialLoraError
from partial_lora.theory_report import Report, Setting, report

_FORMATS = (".png", ".svg", ".pdf")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise PartialLoraError(f"{message.removeprefix('argument ')}; `partial-lora theory --help` lists the options")


def main(arguments: list[str]) -> int:
    """Print bounds and simulated values side by side, and draw them where asked; gives the exit code.

    Raises PartialLoraError, in one line, for arguments that are not what they should be.
    """
    parsed = _parser().parse_args(arguments)
    if parsed.target_rank > parsed.rank:
        raise PartialLoraError(
            f"--target-rank {parsed.target_rank}: expected at most --rank {parsed.rank}; an adapter has no more"
        )
    if parsed.figure and not parsed.figure.parent.is_dir():
        raise PartialLoraError(f"--figure {parsed.figure}: there is no folder {parsed.figure.parent}; make it first")
    names = ("rows", "columns", "rank", "target_rank", "delta", "draws", "seed")
    settings = [Setting(sparsity=one, **{name: getattr(parsed, name) for name in names}) for one in parsed.sparsity]
    reports = [report(setting) for setting in settings]
    _printed(reports, as_json=parsed.json)
    if parsed.figure:
        from partial_lora import theory_figures

        written = theory_figures.bounds(settings[0], reports, parsed.figure)
        print(f"figure: {written}", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="partial-lora theory",
        description="Bounds for sparse adapters, proved in docs/theory.md, and simulated values beside them.",
        allow_abbrev=False,
    )
    whole, least_two = _number(int, "a whole number from 1", lambda n: n >= 1), lambda n: n >= 2
    parser.add_argument("--rows", type=whole, default=768, metavar="M", help="outputs of the module (768)")
    parser.add_argument("--columns", type=whole, default=768, metavar="N", help="inputs of the module (768)")
    parser.add_argument("--rank", type=whole, default=16, metavar="R", help="of the adapter (16)")
    parser.add_argument("--target-rank", type=whole, default=4, metavar="T", help="of the dense target update (4)")
    parser.add_argument(
        "--sparsity",
        type=_number(float, "a share from 0 to below 1", lambda s: 0 <= s < 1),
        nargs="+",
        default=[0.5, 0.87],
        metavar="S",
        help="share removed of rows, of columns, and of B's entries; one table each (0.5 0.87)",
    )
    probability = _number(float, "a probability above 0 and below 1", lambda d: 0 < d < 1)
    parser.add_argument("--delta", type=probability, default=0.05, metavar="D", help="probability of failure (0.05)")
    draws = _number(int, "a whole number from 2", least_two)
    parser.add_argument("--draws", type=draws, default=500, metavar="K", help="of every simulation (500)")
    seed = _number(int, "a whole number from 0", lambda n: n >= 0)
    parser.add_argument("--seed", type=seed, default=0, metavar="SEED", help="of the simulations (0)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    figure = _number(Path, f"a file ending in {', '.join(_FORMATS)}", lambda path: path.suffix in _FORMATS)
    parser.add_argument("--figure", type=figure, metavar="FILE", help=f"draw them, too: {', '.join(_FORMATS)}")
    return parser


def _number(kind: type, expected: str, holds: Callable) -> Callable[[str], object]:
    def read(text: str) -> object:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"{text}: expected {expected}")
        return value

    return read


def _printed(reports: list[Report], *, as_json: bool) -> None:
    if as_json:
        print(
            json.dumps(
                [asdict(one.setting) | {"lines": [asdict(line) for line in one.lines]} for one in reports], indent=1
            )
        )
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for one in reports:
        setting = one.setting
        table = Table(
            title=f"{setting.rows} x {setting.columns}, rank {setting.rank}, target rank {setting.target_rank}, "
            f"sparsity {setting.sparsity:g}, delta {setting.delta:g}, {setting.draws} draws",
            title_justify="left",
        )
        table.add_column("what", overflow="fold")
        for column in ("bound", "holds", "simulated"):
            table.add_column(column, justify="right", no_wrap=True)
        for line in one.lines:
            simulated = "" if line.simulated is None else f"{line.simulated:.4g}"
            if line.standard_error is not None:
                simulated += f" ± {line.standard_error:.1g}"
            table.add_row(line.what, f"{line.bound:.4g}", line.holds, simulated)
        console.print(table)
        console.print(*one.said, sep="\n")
