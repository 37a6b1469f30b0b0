"""Completion of a command line by the shell: commands, options, groups and keys, and runs; files are the shell's."""

from __future__ import annotations

import os
import re
import shlex
from argparse import Action, ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from partial_lora.errors import PartialLoraError
from partial_lora.files import grouped
from partial_lora.launching import directory
from partial_lora.settings.compose import hydra_of
from partial_lora.settings.schema import list_keys

# Where nothing is found, all three complete names of files. Bash ends a word at `=` and `:`, so that it completes what
# stands behind them. A space tells zsh and bash which words are whole; fish knows by itself.
_INSTALL = {
    "bash": """\
_partial_lora()
{
    local line="${COMP_LINE:0:COMP_POINT}" IFS=$'\\n'
    local word="${line##* }"
    COMPREPLY=($(COMP_LINE="$line" partial-lora -sc query=bash 2> /dev/null))
    COMPREPLY=("${COMPREPLY[@]#"${word%"${word##*[=:]}"}"}")
}
complete -o nospace -o default -F _partial_lora partial-lora""",
    "zsh": """\
_partial_lora()
{
    local -a found
    found=(${(f)"$(COMP_LINE="$LBUFFER" partial-lora -sc query=zsh 2> /dev/null)"})
    if (( ! $#found )); then
        compset -P '*='
        _files
        return
    fi
    compadd -Q -S ' ' -- ${${(M)found:#* }% }
    compadd -Q -S '' -- ${found:#* }
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _partial_lora partial-lora""",
    "fish": """\
function _partial_lora
    set -lx COMP_LINE (commandline -cp | string collect)
    set -g _partial_lora (partial-lora -sc query=fish 2> /dev/null | string match -r .+)
    set -q _partial_lora[1]
end
complete -c partial-lora -f -n _partial_lora -a '$_partial_lora'""",
}
_PLAIN = re.compile(r"[\w.,:=/+@%~-]*")  # a shell takes such a word as it is; a folder's name may hold a command
_COMPOSED = ("train", "calibrate", "info", "compare")  # commands that take groups and keys; others take a run


ParserOf = Callable[[str], ArgumentParser | None]  # of a command's options; None for one that Hydra reads


def _none(command: str) -> None:
    """Return no parser."""


def complete(action: str | None, commands: Sequence[str], parser_of: ParserOf = _none) -> str:
    """Return what `-sc ACTION` prints: the script that a shell is to run, or the words that its line may go on with.

    Raises PartialLoraError for an action that is none.
    """
    what, _, shell = (action or "").partition("=")
    if what not in ("install", "query") or shell not in _INSTALL:
        known = ", ".join(f"install={shell_name}" for shell_name in _INSTALL)
        raise PartialLoraError(f"--shell-completion {action}: expected {known}")
    if what == "install":
        return _INSTALL[shell]
    words = candidates(_words(os.environ.get("COMP_LINE", ""))[1:], commands, parser_of)
    is_part = ("=", ".", "/")
    return "\n".join(word if shell == "fish" or word.endswith(is_part) else f"{word} " for word in words)


def candidates(words: Sequence[str], commands: Sequence[str], parser_of: ParserOf = _none) -> list[str]:
    """Return what the last of a command line's words may become; the first is the name of a command."""
    *before, word = words or [""]
    command, before = (before[0], [earlier for earlier in before[1:] if earlier]) if before else (None, [])
    parser = parser_of(command) if command in commands else None
    takes, places = _read(parser, before)
    name, equals, _ = word.partition("=")
    if command is None:
        found = list(commands)
    elif takes is not None and not word.startswith("-"):
        found = [str(choice) for choice in takes.choices or ()]
    elif parser and equals and (option := _options(parser).get(name)):
        found = [f"{name}={choice}" for choice in option.choices or ()]
    elif parser and word.startswith("-"):
        found = [option for option in _options(parser) if option.startswith("--") and option not in before]
    elif command in _COMPOSED:
        found = _settings(before, word)
    elif command in commands and (not places or command == "merge"):
        found = list(_runs(Path("results")))
    elif command == "evaluate":
        found = [candidate for candidate in _settings([], word) if candidate.startswith("task")]
    else:
        found = []
    return [candidate for candidate in found if candidate.startswith(word) and _PLAIN.fullmatch(candidate)]


def _options(parser: ArgumentParser) -> dict[str, Action]:
    return {string: action for action in parser._actions for string in action.option_strings}


def _read(parser: ArgumentParser | None, words: Sequence[str]) -> tuple[Action | None, list[str]]:
    """Return the option whose value comes next on a line, None for none, and the words that are no option's."""
    takes, places = None, []
    for word in words:
        option = _options(parser).get(word) if parser else None
        if option is not None:
            takes = option if option.nargs != 0 else None
        elif takes is None:
            places.append(word)
        elif takes.nargs not in ("*", "+"):
            takes = None
    return takes, places


def _words(line: str) -> list[str]:
    """Return the words of a line as a shell reads them; behind a space a new one, which is empty yet, begins."""
    try:
        words = shlex.split(line)
    except ValueError:  # in a quotation
        return line.split(" ")
    return [*words, *[""] * line.endswith(" ")]


def _runs(results: Path) -> Iterator[str]:
    """Yield the names of runs that a command takes: `latest`, and ids, with the seed behind one that has several."""
    if (results / directory.LATEST).is_dir():
        yield directory.LATEST
    for identifier, runs in grouped(sorted(results.glob(directory.RUNS)), directory.id_of).items():
        yield from [identifier] if len(runs) == 1 else [f"{identifier}/{run.name}" for run in runs]


def _settings(before: Sequence[str], word: str) -> list[str]:
    """Return the groups, their files, the keys and their values that a word may become, as Hydra completes it."""
    from hydra._internal.core_plugins.bash_completion import BashCompletion  # its public class prints for bash alone

    if word.partition("=")[2].startswith((".", "/", "~")):  # a file, which the shell quotes where it has to
        return []
    flags = {"-m", "--multirun"} & {*before}
    settings = [
        earlier
        for previous, earlier in pairwise(["", *before])
        if "=" in earlier or earlier.endswith((".yaml", ".yml")) or {"--config-dir", "-cd"} & {previous, earlier}
    ]
    with hydra_of(settings) as known:
        hydra, name, overrides, _ = known
        found = BashCompletion(hydra.config_loader)._query(config_name=name, line=" ".join([*flags, *overrides, word]))
    lists = {f"{key}." for key in list_keys()}  # Hydra would complete a list by the places of its items
    return [f"{candidate[:-1]}=" if candidate in lists else candidate for candidate in found if candidate != "hydra"]
