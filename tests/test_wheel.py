"""The wheel carries everything: installed elsewhere, the command composes, counts and refuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, *build], check=True, capture_output=True)
    (wheel,) = folder.glob("partial_lora-*.whl")
    target = folder / "site"
    zipfile.ZipFile(wheel).extractall(target)
    return target


def command(installed: Path, directory: Path, *arguments: str) -> subprocess.CompletedProcess:
    script = (
        "import sys, partial_lora; from partial_lora.cli import main; "
        f"assert partial_lora.__file__.startswith({str(installed)!r}), partial_lora.__file__; "
        "sys.exit(main(sys.argv[1:]))"
    )
    environment = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_installed_command_runs_from_any_directory(installed: Path, tmp_path: Path) -> None:
    composed = command(installed, tmp_path, "train", "--cfg", "job")
    assert composed.returncode == 0, composed.stderr
    assert "name: vit_s14" in composed.stdout
    counted = command(installed, tmp_path, "info", "model=tiny_vit", "method=lora")
    assert counted.returncode == 0, counted.stderr
    assert "100.0%" in counted.stdout
    refused = command(installed, tmp_path, "train", "model=none")
    assert refused.returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_the_wheel_holds_the_group_files_and_the_licence(installed: Path) -> None:
    shipped, own = (
        {str(path.relative_to(conf)) for path in conf.rglob("*.*")}
        for conf in (installed / "partial_lora" / "conf", ROOT / "conf")
    )
    assert shipped == own
    assert {"config.yaml", "schema.json"} <= shipped
    assert list(installed.glob("partial_lora-*.dist-info/licenses/LICENSE"))


def test_the_version_is_one_in_metadata_citation_and_changelog() -> None:
    def stated(file: str, pattern: str) -> list[str]:
        return re.findall(pattern, (ROOT / file).read_text(encoding="utf-8"), re.M)

    (version,) = stated("pyproject.toml", r'^version = "(.+)"$')
    assert stated("CITATION.cff", r"^version: (.+)$") == [version]
    entry, date = stated("CHANGELOG.md", r"^## (\S+) \((unreleased|\d{4}-\d\d-\d\d)\)$")[0]
    assert date == "unreleased" or (entry, [date]) == (version, stated("CITATION.cff", r"^date-released: (.+)$"))


def test_the_package_shows_its_names_its_version_and_that_it_is_typed(installed: Path) -> None:
    assert (installed / "partial_lora" / "py.typed").is_file()
    script = (
        "import sys, partial_lora; assert {*partial_lora.__all__, '__version__'} <= set(dir(partial_lora)); "
        "assert not {'torch', 'peft'} & sys.modules.keys(); print(partial_lora.__version__)"
    )
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    (metadata,) = installed.glob("partial_lora-*.dist-info")
    assert done.stdout.strip() == metadata.name.removeprefix("partial_lora-").removesuffix(".dist-info")
