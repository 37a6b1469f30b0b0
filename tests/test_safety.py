"""Nothing that is fetched can run code here, or decide where a file is written."""

from __future__ import annotations

import ast
import contextlib
import json
import logging
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import configured
import pytest
from tiny_wheel import bundle, write_wheel
from transformers import AutoConfig, LlamaConfig

import partial_lora
from partial_lora import cli
from partial_lora.errors import PartialLoraError
from partial_lora.models import bundled, tokenizer
from partial_lora.models.language import byte_tokenizer
from partial_lora.settings import schema

PACKAGE = Path(partial_lora.__file__).parent


def calls() -> Iterator[tuple[str, str, dict[str, object]]]:
    """Where the package calls what, and with which named constants."""
    for file in sorted(PACKAGE.rglob("*.py")):
        source = file.read_text(encoding="utf-8")
        for text in (source, *scripts(ast.parse(source))):
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Call):
                    given = {each.arg: getattr(each.value, "value", each.value) for each in node.keywords}
                    yield f"{file.relative_to(PACKAGE)}:{node.lineno}", ast.unparse(node.func), given


def scripts(tree: ast.Module) -> Iterator[str]:
    """Programs that a module holds as text, for an interpreter of their own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\nimport " in node.value:
            yield from re.findall(r"```python\n(.*?)```", node.value, re.DOTALL) or [
                node.value
            ]  # of a page, its blocks


def test_no_call_reads_a_pickle_or_runs_what_it_reads() -> None:
    seen = list(calls())
    assert any(name == "AutoTokenizer.from_pretrained" for _, name, _ in seen)  # else nothing is looked at
    assert any(name == "transformers.AutoConfig.from_pretrained" for _, name, _ in seen)  # of a program in a text
    forbidden = {"eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "joblib.load", "yaml.load"}
    forbidden |= {"yaml.unsafe_load", "evaluate.load", "torch.hub.load", "torch.jit.load", "get_kernel"}
    found = [(place, name) for place, name, _ in seen if name in forbidden or name.rpartition(".")[2] == "extractall"]
    found += [(place, name) for place, name, given in seen if given.get("trust_remote_code", False) is not False]
    found += [(place, name) for place, name, given in seen if given.get("allow_pickle", False) is not False]
    for place, name, given in seen:
        owner, _, method = name.rpartition(".")
        if method == "from_pretrained" and owner.rpartition(".")[2].startswith("Auto"):
            found += [] if given.get("trust_remote_code") is False else [(place, name)]
        if name == "torch.load" or "weights_only" in given:
            found += [] if given.get("weights_only") is True else [(place, name)]
    assert not found


def test_trainer_reads_its_own_files_without_running_their_code() -> None:
    import transformers

    tree = ast.parse(Path(transformers.trainer.__file__).read_text(encoding="utf-8"))
    loads = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"]
    unsafe = [node.lineno for node in loads if "weights_only=True" not in map(ast.unparse, node.keywords)]
    assert loads
    assert not unsafe


EVIL = """
from pathlib import Path
Path(__file__).with_name("it_ran").touch()
Path({marker!r}).touch()
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model, PreTrainedTokenizerFast as Tokenizer
"""


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A Llama with its tokenizer whose configs name code of their own."""
    folder = tmp_path / "hostile"
    configured.load("tiny_llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "evil.py").write_text(EVIL.format(marker=str(tmp_path / "it_ran")))
    own = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": [None, "evil.Tokenizer"]}
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(content | {"auto_map": own}))
    return folder


def named(folder: Path, model_type: str) -> None:
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(content | {"model_type": model_type}))


@pytest.mark.parametrize("model_type", ["llama", "of_its_own"])
def test_code_that_comes_with_a_model_never_runs(hostile: Path, monkeypatch, model_type: str) -> None:
    monkeypatch.setattr("builtins.input", lambda *asked: "y")  # transformers would ask, and wait for an answer
    named(hostile, model_type)
    for read in (
        lambda: configured.load("tiny_llama", weights=str(hostile)),
        lambda: tokenizer(name="tiny_llama", weights=str(hostile), family="causal"),
    ):
        with contextlib.suppress(PartialLoraError):  # refused, or read as what it is without its code
            read()
    assert not list(hostile.parent.rglob("it_ran"))


def test_that_code_runs_where_it_is_trusted(hostile: Path, monkeypatch) -> None:
    """Else the test above would look for something that never is there."""
    named(hostile, "of_its_own")
    monkeypatch.setattr(LlamaConfig, "_auto_class", None)  # transformers leaves a mark on the class
    AutoConfig.from_pretrained(hostile, trust_remote_code=True)
    assert (hostile.parent / "it_ran").is_file()


def test_kernels_of_the_hub_are_not_fetched_even_where_they_could_be(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text("raise SystemExit('it ran')\n")
    program = "from partial_lora.launching.imports import refuse_hub_code; refuse_hub_code()\n"
    program += "import importlib.util as u, os; print(u.find_spec('kernels'), os.environ['USE_HUB_KERNELS'])\n"
    program += "try:\n    import kernels\nexcept ImportError:\n    print('refused')"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["None", "NO", "refused"], done.stderr


def test_a_library_s_advice_to_fetch_them_is_kept_from_the_terminal_and_nothing_else(caplog) -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "no module")
    logger.warning("something new")
    assert [record.getMessage() for record in caplog.records] == ["something new"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python heeds PYTHONSAFEPATH from 3.11 on")
def test_code_beside_the_settings_of_somebody_else_is_not_imported(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text("from pathlib import Path\nPath('it_ran').touch()\n")

    def worker() -> int:
        return subprocess.run([sys.executable, "-m", "partial_lora.errors"], check=False).returncode

    assert cli.guarded(worker) == 0
    assert not (tmp_path / "it_ran").exists()
    worker()
    assert (tmp_path / "it_ran").exists()  # as without it


def test_attention_out_of_a_repository_is_refused(monkeypatch) -> None:
    from partial_lora.settings.compose import composed

    with pytest.raises(PartialLoraError, match=r"^model\.attn_implementation=someone/attention: .*sdpa"):
        composed("model.attn_implementation=someone/attention")
    for key, value in {
        "_attn_implementation": "someone/attention",
        "checkpoint_path": "a.pth",
        "auto_map": "a.B",
    }.items():
        with pytest.raises(PartialLoraError, match=r"^model\.model_args=.*" + key):
            composed(f"model.model_args.{key}={value}")
    assert composed("model.attn_implementation=sdpa").model.attn_implementation == "sdpa"


def test_a_hostile_wheel_writes_nothing_but_what_is_asked_of_it(tmp_path: Path, monkeypatch) -> None:
    place = tmp_path / "deep" / "er"
    place.mkdir(parents=True)
    outside = ("../outside", "../../outside", "/outside", str(tmp_path / "outside"), "tiny/../../outside")
    files = {"tiny/config.json": b"{}", **dict.fromkeys(outside, b"it was written")}
    file = write_wheel(place / "index", files)
    with zipfile.ZipFile(file, "a") as archive:  # a link in the way of what is written
        link = zipfile.ZipInfo("tiny/link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, str(tmp_path))
    bundle(place, file, ["tiny/config.json"], bundled.folder_of_transformers, monkeypatch, "tiny")
    folder = bundled.fetch_model("tiny")
    assert {path.name for path in folder.iterdir()} == {"config.json", "complete.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    assert {path.name for path in place.iterdir()} == {"index", "cache"}
    assert not Path("/outside").exists()


def test_every_bundled_wheel_is_pinned_by_its_hash() -> None:
    pins = [model.sha256 for model in bundled.MODELS.values()]
    assert pins
    assert all(len(pin) == 64 and set(pin) <= set("0123456789abcdef") for pin in pins)


def test_every_data_set_of_the_hub_is_pinned_to_a_commit() -> None:
    import yaml

    read = {
        file.stem: yaml.safe_load(file.read_text(encoding="utf-8"))
        for file in (schema.conf_dir() / "task").glob("*.yaml")
    }
    on_the_hub = {name: task for name, task in read.items() if "/" in task["path"]}
    assert len(on_the_hub) > 20
    assert [name for name, task in on_the_hub.items() if len(str(task.get("revision"))) != 40] == []
