"""A finished run as a repository of a hub: what is in it, and how it gets there; a small server stands for the hub."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import finished_runs
import huggingface_hub
import peft
import pytest
import torch
import yaml
from finished_runs import choice_run, generation_run, image_run
from huggingface_hub import ModelCard
from refusals import refusal

from partial_lora import cli, load_compact
from partial_lora.finished import export, push
from partial_lora.report import card

pytestmark = pytest.mark.usefixtures("same_cache")

TOKEN = "hf_" + "AbCd1234" * 4


class Hub(ThreadingHTTPServer):
    """What of the hub's API an upload takes. `files` are those committed; `asked` has method, path and token."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[tuple[str, str, str]] = []
        self.created: dict = {}
        self.status = 200

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *given: object) -> None:
        pass

    def _answer(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append((self.command, path, self.headers.get("Authorization", "")))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content: object = {}
        if hub.status != 200:
            content = {"error": "no"}
        elif path == "/api/repos/create":
            hub.created = json.loads(body)
            content = {"url": f"{hub.address}/me/mine", "id": "me/mine", "name": "me/mine"}
        elif path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            modes = {each["path"]: "lfs" if each["path"].endswith(".safetensors") else "regular" for each in files}
            content = {
                "files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
            }
        elif path.endswith("/info/lfs/objects/batch"):
            given = json.loads(body)
            upload = [
                each | {"actions": {"upload": {"href": f"{hub.address}/large/{each['oid']}"}}}
                for each in given["objects"]
            ]
            content = {"transfer": "basic", "objects": upload}
        elif path.startswith("/large/"):
            hub.large[path.rpartition("/")[2]] = body
        elif path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.large[value["oid"]]
                    assert hashlib.sha256(hub.large[value["oid"]]).hexdigest() == value["oid"]
            content = {"commitUrl": f"{hub.address}/me/mine/commit/0", "commitOid": "0" * 40, "success": True}
        reply = json.dumps(content).encode()
        self.send_response(hub.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    do_GET = do_POST = do_PUT = _answer  # noqa: N815


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for name, value in (("ENDPOINT", server.address), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_push_uploads_the_adapter_its_settings_and_its_page(hub, capsys) -> None:
    run = choice_run()
    assert cli.main(["push", str(run.directory), "me/mine", "--private", "--license", "apache-2.0"]) == 0
    printed = capsys.readouterr()
    assert f"{hub.address}/me/mine" in printed.out
    assert hub.created["name"] == "mine"
    assert hub.created.get("private") or hub.created.get("visibility") == "private"
    folder = run.directory / "export" / "hub"
    assert {path: content for path, content in hub.files.items() if path != ".gitattributes"} == {
        file.name: file.read_bytes() for file in folder.iterdir()
    }
    assert {"adapter_model.safetensors", "adapter_config.json", "config.yaml", "README.md"} <= hub.files.keys()
    assert hub.files["adapter_model.safetensors"] == (run.adapter / "adapter_model.safetensors").read_bytes()
    # the token goes to the hub's own API, and nowhere else
    own = ("/api/repos/", "/api/models/")
    assert {token for _, path, token in hub.asked if path.startswith(own)} == {f"Bearer {TOKEN}"}
    assert {token for _, path, token in hub.asked if path.startswith("/large/")} == {""}
    seen = [printed.out.encode(), printed.err.encode(), *hub.files.values()]
    assert not any(TOKEN.encode() in each for each in seen)


@pytest.mark.parametrize(("status", "token"), [(401, TOKEN), (403, TOKEN), (500, TOKEN), (200, None)])
def test_a_refusal_of_the_hub_is_one_line_without_the_token(hub, monkeypatch, capsys, status, token) -> None:
    hub.status = status
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
        hub.status = 401
    assert cli.main(["push", str(choice_run().directory), "me/mine"]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.strip().splitlines()
    assert line.startswith("partial-lora: me/mine: ")
    assert TOKEN not in line


def test_what_is_wrong_is_refused_before_anything_is_written(tmp_path) -> None:
    for repo in ("mine", "me/mine/other", "me/-mine", "me/m ine", "/mine"):
        with refusal(""):
            push.check(repo)
    with refusal(f"{generation_run().directory}", "method=lora"):  # there is nothing to leave out
        push.write(generation_run(), lambda folder: pytest.fail("written"), compact=True)
    assert not (generation_run().directory / "export" / "hub").exists()


def test_a_dry_run_reaches_nothing_and_its_folder_is_what_the_page_says(hub, capsys) -> None:
    run = choice_run()
    assert cli.main(["push", str(run.directory), "me/mine", "--compact", "--dry-run"]) == 0
    assert hub.asked == []
    folder = Path(capsys.readouterr().out.removesuffix(": written\n"))
    page = ModelCard.load(folder / "README.md")
    assert 'load_compact(base, "me/mine")' in page.text
    found = load_compact(export.base_model(run), folder)
    inputs = export._samples(run).inputs
    torch.testing.assert_close(
        export._logits(found, inputs), export._logits(export.adapted_model(run), inputs), atol=0, rtol=0
    )


def test_the_page_has_the_score_its_interval_and_how_many_examples(tmp_path) -> None:
    run = choice_run()
    page = card.card(run, "me/mine", run.adapter)
    data, test = page.data, run.result["metrics"]["test"]
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", test["accuracy"])
    assert (data.model_name, data.library_name, data.pipeline_tag) == ("mine", "peft", "text-generation")
    assert data.base_model is None  # random weights are on no hub
    (row,) = [line for line in page.text.splitlines() if line.startswith("| accuracy |")]
    _, _, score, between, count, _ = (cell.strip() for cell in row.split("|"))
    low, high = (float(each.removesuffix(" %")) for each in between.split(" to "))
    assert low <= float(score.removesuffix(" %")) <= high
    assert high - low > 20  # of 11 examples, also where none is wrong
    assert int(count) == 11
    assert f"{run.result['parameters']['adapter_trainable']:,} parameters" in page.text
    without = dataclasses.replace(run, directory=tmp_path)  # its predictions are gone
    assert f"| accuracy | {score} | – | – |" in card.card(without, "me/mine", run.adapter).text
    assert f"{(run.adapter / 'adapter_model.safetensors').stat().st_size:,} bytes" in page.text


def test_the_page_names_base_model_and_data_of_the_hub_and_the_lines_that_load_them() -> None:
    run = finished_runs.changed(choice_run(), "model", weights="Qwen/Qwen2.5-0.5B@main", architecture="qwen2")
    run = finished_runs.changed(run, "task", path="allenai/ai2_arc")
    page = card.card(run, "me/mine", run.adapter, license="mit")
    assert (page.data.base_model, page.data.datasets, page.data.license) == (
        "Qwen/Qwen2.5-0.5B",
        ["allenai/ai2_arc"],
        "mit",
    )
    code = page.text.partition("```python\n")[2].partition("```")[0]
    compile(code, "page", "exec")
    assert 'base = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B")' in code
    assert 'model = PeftModel.from_pretrained(base, "me/mine")' in code


def test_settings_have_no_place_of_this_machine(hub, tmp_path) -> None:
    run = choice_run()
    folder = push.write(run, lambda built: card.card(run, "me/mine", built))
    settings = (folder / "config.yaml").read_text()
    files = finished_runs.question_files()
    assert all(Path(path).is_absolute() for path in files.values())
    assert yaml.safe_load(settings)["task"]["data_files"] == {split: Path(each).name for split, each in files.items()}
    assert str(Path(files["train"]).parent) not in settings
    peft.PeftModel.from_pretrained(export.base_model(run), str(folder))


def test_an_adapter_and_every_export_hold_the_page_of_their_run(tmp_path) -> None:
    run = choice_run()
    for form in ("peft", "compact", "merged", "serve"):
        assert cli.main(["export", str(run.directory), "--to", form, "--out", str(tmp_path / form)]) == 0
    for folder in (run.adapter, *tmp_path.iterdir()):
        page = ModelCard.load(folder / "README.md")
        assert "More Information Needed" not in page.text
        assert "| accuracy |" in page.text
        settings = yaml.safe_load(page.text.partition("```yaml\n")[2].partition("```")[0])
        assert settings["model.name"] == run.config.model.name
        assert not [value for value in settings.values() if isinstance(value, str) and value.startswith("/")]
        code = page.text.partition("```python\n")[2].partition("```")[0]
        compile(code, str(folder), "exec")
        assert ("load_compact" in code, "pipeline(" in code) == (folder.name == "compact", folder.name == "merged")
    labels = ", ".join(image_run().labels())
    assert f"Its labels: {labels}." in ModelCard.load(image_run().adapter / "README.md").text


def test_a_run_whose_score_is_no_number_keeps_the_page_that_is_there(tmp_path) -> None:
    run = choice_run()
    shutil.copytree(run.adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text("PEFT's")
    test = run.result["metrics"]["test"] | {"accuracy": None}
    metrics = run.result["metrics"] | {"test": test}
    broken = dataclasses.replace(run, result=run.result | {"metrics": metrics})
    card.write(broken, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "README.md").read_text() == "PEFT's"
    with refusal(f"{run.directory}/result.json"):
        push.write(broken, lambda folder: card.card(broken, "me/mine", folder))
