"""The documentation: the site builds strictly, its links lead somewhere, and no page loads anything over a network."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from checkout import needs_results
from mkdocs.commands.build import build
from mkdocs.config import load_config

from partial_lora.settings import schema
from partial_lora.settings.keys import meanings
from partial_lora.settings.schema import defaults

ROOT = schema.conf_dir().parent
LOADED = {"script": "src", "img": "src", "source": "src", "iframe": "src", "video": "src", "object": "data"}
MENTIONED = re.compile(r"\bdocs/[\w./-]+\.(?:md|svg)")
PATHS = re.compile(r"`((?:scripts|tests|conf|docs|examples|partial_lora)/[\w./-]+\.\w+)`")

pytestmark = needs_results


class Page(HTMLParser):
    """What a page links to, what it loads, and the anchors it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links, self.loads, self.anchors = [], [], {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        of = {name: value or "" for name, value in attributes}
        self.anchors |= {of[name] for name in ("id", "name") if name in of}
        if tag == "a" and "href" in of:
            self.links.append(of["href"])
        relations = of.get("rel", "").split()
        if tag in LOADED and LOADED[tag] in of:
            self.loads.append(of[LOADED[tag]])
        elif tag == "link" and {"stylesheet", "icon", "preload", "preconnect", "modulepreload"} & {*relations}:
            self.loads.append(of["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a broken link, anchor or reference to an object ends the build."""
    place = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(place), strict=True))
    return place


def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text("utf-8")) for path in site.rglob("*.html")}


def test_every_link_of_the_site_leads_to_a_file_and_an_anchor(site: Path) -> None:
    known = pages(site)
    for path, page in known.items():
        if path.name == "404.html":  # served at any address, so its links begin at the root
            continue
        for link in [*page.links, *page.loads]:
            parts = urlsplit(link)
            if parts.scheme in ("https", "http", "mailto", "data"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.exists(), (path, link)
            if target in known and parts.fragment:
                assert unquote(parts.fragment) in known[target].anchors, (path, link)


def test_no_page_loads_anything_over_a_network(site: Path) -> None:
    for path in site.rglob("*.html"):
        loads = [link for link in Page(path.read_text("utf-8")).loads if urlsplit(link).netloc]
        assert not loads, (path, loads)
    for path in site.rglob("*.css"):
        text = path.read_text("utf-8")
        assert not re.search(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//", text), path


def test_every_key_is_in_the_reference_with_its_default_and_meaning(site: Path) -> None:
    text = (site / "reference" / "keys.html").read_text("utf-8")
    rows = dict(re.findall(r"<tr>\s*<td><code>([\w.]+)</code></td>(.*?)</tr>", text, re.DOTALL))
    assert rows.keys() == meanings().keys()
    assert f"<code>{defaults()['calibration.shots']}</code>" in rows["calibration.shots"]
    assert "in (0, 1]" in rows["calibration.threshold"]


def test_formulas_are_drawn_without_a_script(site: Path) -> None:
    text = (site / "evidence" / "theory.html").read_text("utf-8")
    assert text.count("<math") > 100
    assert "arithmatex" not in text


def test_paths_that_pages_and_code_name_are_there() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for path in PATHS.findall(page.read_text("utf-8")):
            assert (ROOT / path).exists(), (page, path)
    names = ("partial_lora", "conf", "scripts", "tests", "examples")
    files = [file for name in names for file in (ROOT / name).rglob("*") if file.suffix in (".py", ".yaml", ".sh")]
    for file in [*files, ROOT / "Makefile", ROOT / "reproduce.mk"]:
        for path in MENTIONED.findall(file.read_text("utf-8")):
            assert (ROOT / path).exists(), (file, path)
