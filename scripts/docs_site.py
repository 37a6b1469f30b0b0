"""Pages of the documentation site beside those of docs/; mkdocs calls these functions (mkdocs.yml).

A file outside docs/ that a page links to (a table, a figure, a script) is part of the site, and so is what that links
to; code gets a page of its own. A figure that has a dark twin follows the site's theme. Pages get the schema's keys,
the choices of each group and the help of each command where they ask for them: `<!-- keys -->`, `<!-- choices -->`,
`<!-- help -->`. Formulas become MathML.
"""

from __future__ import annotations

import contextlib
import html
import io
import json
import logging
import os
import posixpath
import re
import unicodedata
from dataclasses import MISSING as DATACLASS_MISSING
from dataclasses import fields
from pathlib import Path
from unittest.mock import patch

from latex2mathml.converter import convert
from mkdocs.structure.files import File
from omegaconf import MISSING

from partial_lora import cli
from partial_lora.files import flatten
from partial_lora.ranges import values_of
from partial_lora.settings.compose import composed
from partial_lora.settings.keys import heading, meanings
from partial_lora.settings.schema import SECTIONS, Config
from partial_lora.settings.versions import plain

ROOT = Path(__file__).resolve().parent.parent
SHOWN = {".py": "python", ".sh": "sh", ".yaml": "yaml"}  # files that get a page of their own
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
PICTURE = re.compile(
    r'<picture><source .*?srcset="(?P<dark>\S+)">'
    r'<img alt="(?P<words>[^"]*)" src="(?P<light>\S+)" width="(?P<width>\d+)"></picture>'
)
THEMED = r"![\g<words>](\g<light>#only-light){ width=\g<width> }![\g<words>](\g<dark>#only-dark){ width=\g<width> }"
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
LETTER = re.compile(r'<mi mathvariant="(double-struck|script)">([A-Z])</mi>')  # browsers read letters, not this
BAR = re.compile(r'<mo(?: stretchy="false")?>(&#x02016;|&#x0007C;)</mo>')  # else with the spaces of a relation
log = logging.getLogger("mkdocs.hooks.docs_site")


def source(path: str) -> str:
    """Return the path inside the site of a file of the project, both as URIs from the root."""
    shown = path + ".md" if Path(path).suffix in SHOWN else path
    return "index.md" if path == "README.md" else shown.removeprefix("docs/")


def targets(path: str, text: str) -> list[str]:
    """Return what the links of a page point to, as paths from the project's root."""
    links = LINK.findall(PICTURE.sub(THEMED, text))
    return [posixpath.normpath(posixpath.join(posixpath.dirname(path), found[1])) for found in links]


def on_files(files, config):
    """Add, one after another, the files outside docs/ that the navigation names or pages link to."""
    pages = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    waiting = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    for page in pages:
        waiting += targets(page, (ROOT / page).read_text("utf-8"))
    while waiting:
        path = waiting.pop()
        uri = source(path)
        if path.startswith(("docs/", "../")) or uri in files.src_uris or not (ROOT / path).is_file():
            continue
        if language := SHOWN.get(Path(path).suffix):
            page = f"# {path}\n\n~~~~{language}\n{(ROOT / path).read_text('utf-8')}~~~~\n"
            files.append(File.generated(config, uri, content=page))
        else:
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
        if path.endswith(".md"):
            waiting += targets(path, (ROOT / path).read_text("utf-8"))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point links at the site's own files, and write what is generated into the page."""
    if page.file.abs_src_path is None:
        return markdown  # a file that is shown as it is
    path = Path(page.file.abs_src_path).relative_to(ROOT).as_posix()

    def pointed(link: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link[2]))
        if not (ROOT / target).exists() and target.startswith("docs/"):
            return link[0]  # mkdocs says so
        if not (ROOT / target).is_file():
            log.warning("%s: a link to %s, which is no file", path, link[2])
        return link[1] + os.path.relpath(source(target), posixpath.dirname(page.file.src_uri) or ".") + link[3]

    if not path.startswith("docs/") and path != "README.md":
        page.meta.setdefault("hide", ["toc"])  # the tables of records are wide
    for mark, made in GENERATED.items():
        if mark in markdown:
            markdown = markdown.replace(mark, made())
    return LINK.sub(pointed, PICTURE.sub(THEMED, markdown))


def on_page_content(content, page, config, files):
    """Render the formulas of a page as MathML, which browsers draw without a script."""

    def drawn(formula: re.Match) -> str:
        made = convert(html.unescape(formula[2]), display="block" if formula[1] == "div" else "inline")
        made = BAR.sub(r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>', LETTER.sub(lettered, made))
        return f'<{formula[1]} class="formula">{made}</{formula[1]}>'

    def lettered(letter: re.Match) -> str:
        name = f"{letter[1].upper()} CAPITAL {letter[2]}"
        try:
            return f"<mi>{unicodedata.lookup(name)}</mi>"
        except KeyError:  # all but those that were letters before the others
            return f"<mi>{unicodedata.lookup(f'MATHEMATICAL {name}')}</mi>"

    return FORMULA.sub(drawn, content)


# --- What is generated.


def keys() -> str:
    """Return a table for every group of the schema: its keys with their types, defaults, ranges and comments."""
    meaning, usual = meanings(), flatten(plain(composed()))
    tables = []
    for group, kind in {"": Config, **SECTIONS}.items():
        lines = [f"## {group or 'Of the run'}", "", kind.__doc__, "", "| key | type | default | range | meaning |"]
        lines.append("|---" * 5 + "|")
        for each in fields(kind):
            key = f"{group}.{each.name}".lstrip(".")
            if key in SECTIONS or key not in meaning:
                continue
            default = each.default if each.default_factory is DATACLASS_MISSING else each.default_factory()
            if group not in ("model", "task"):  # of these the schema's own; conf/ has them of each
                default = usual.get(key, default)
            values = values_of(kind)[each.name]
            cells = [f"`{key}`", values.types, _value(default), values.expected, meaning[key]]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _value(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "of its file" if value == MISSING else f"`{text}`"


def choices() -> str:
    """Return a table for every group of conf/: its files and the comments at their heads."""
    tables = []
    for group in ("model", "task", "method", "importance", "calibration", "mask", "preset", "experiment"):
        rows = [f"## {group}", "", "| | |", "|---|---|"]
        for file in sorted((ROOT / "conf" / group).glob("*.yaml")):
            rows.append(f"| `{group}={file.stem}` | {heading(file).replace('|', chr(92) + '|')} |")
        tables.append("\n".join(rows))
    return "\n\n".join(tables)


def help_texts() -> str:
    """Return the help of every command but of those that take the keys of a run."""
    texts = []
    for name in cli.COMMANDS:
        if name in ("train", "calibrate", "info"):
            continue
        wide = patch.dict(os.environ, COLUMNS="86")
        with wide, contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
            cli.COMMANDS[name][0](["--help"])
        texts.append(f"## {name}\n\n```text\n{printed.getvalue().rstrip()}\n```")
    return "\n\n".join(texts)


GENERATED = {"<!-- keys -->": keys, "<!-- choices -->": choices, "<!-- help -->": help_texts}
