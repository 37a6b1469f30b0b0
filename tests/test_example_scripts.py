"""Examples are short, say what they print and how long it takes, are listed, and run."""

from __future__ import annotations

import ast
import json
import re
import runpy
import subprocess
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted([*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.sh")])
NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))


def head(script: Path) -> str:
    """The docstring of a script, or the comment that a shell script begins with."""
    text = script.read_text(encoding="utf-8")
    if script.suffix == ".py":
        return ast.get_docstring(ast.parse(text)) or ""
    comment = re.match(r"#!/bin/sh\n((#.*\n)+)", text)
    return re.sub(r"^# ?", "", comment[1], flags=re.M) if comment else ""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_an_example_compiles_is_short_and_says_what_it_prints_and_takes(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    if script.suffix == ".py":
        compile(text, str(script), "exec")
    else:
        subprocess.run(["sh", "-n", str(script)], check=True)
    assert 20 <= len(text.splitlines()) <= 60
    assert re.search(r"^Prints: \S", head(script), re.M)
    assert re.search(r"^Takes: .*\d", head(script), re.M)


def test_the_page_of_the_examples_lists_all_of_them_and_nothing_that_is_not_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8"))
    assert all((EXAMPLES / link).exists() for link in links)
    listed = {(EXAMPLES / link).resolve() for link in links}
    expected = [*SCRIPTS, *NOTEBOOKS, *(EXAMPLES / "configs").glob("*.yaml")]
    assert [path.name for path in expected if path.resolve() not in listed] == []
    assert len(NOTEBOOKS) == 3


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)
def test_a_notebook_is_its_script_with_outputs_and_without_paths_of_a_machine(notebook: Path) -> None:
    content = json.loads(notebook.read_text(encoding="utf-8"))
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    script = ast.parse((EXAMPLES / f"{notebook.stem}.py").read_text(encoding="utf-8"))
    assert ast.dump(ast.parse("\n".join("".join(cell["source"]) for cell in code))) == ast.dump(
        ast.Module(body=script.body[1:], type_ignores=[])
    )
    printed = json.dumps([cell["outputs"] for cell in code])
    assert '"stdout"' in printed
    assert not re.search(r"/(tmp|home|root|usr|work)/|Traceback", printed)


@pytest.mark.parametrize("name", ["merge", "several_adapters"])
def test_the_quickest_examples_run(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{name}.py"))
    assert capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
