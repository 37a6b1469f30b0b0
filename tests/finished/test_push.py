"""A finished run as a repository of a hub: what is in it, and how it gets there."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path, PurePath
from types import SimpleNamespace

import finished_runs
import mixed_runs
import numpy as np
import peft
import pytest
import torch
import yaml
from finished_runs import choice_run, generation_run, image_run
from huggingface_hub import HfApi, ModelCard, RepoUrl
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError
from refusals import refusal

from partial_lora import cli, load_compact
from partial_lora.finished import export, push
from partial_lora.report import certificate, run_card
from partial_lora.report.sequential import decide

TOKEN = "hf_" + "AbCd1234" * 4


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A hub that takes everything: what was created, and the files that were uploaded."""
    taken = SimpleNamespace(created={}, files={})

    def create_repo(api: HfApi, repo: str, **settings: object) -> RepoUrl:
        taken.created = {"repo": repo} | settings
        return RepoUrl(f"https://huggingface.co/{repo}")

    def upload_folder(
        api: HfApi, *, repo_id: str, folder_path: Path, commit_message: str, delete_patterns: list[str]
    ) -> None:
        assert repo_id == taken.created["repo"]
        left = {name: file for name, file in taken.files.items() if not any(map(PurePath(name).match, delete_patterns))}
        taken.files = left | {file.name: file.read_bytes() for file in folder_path.iterdir()}

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return taken


def test_a_push_uploads_the_adapter_its_settings_and_its_page(hub, capsys) -> None:
    run = choice_run()
    assert cli.main(["push", str(run.directory), "me/mine", "--private", "--license", "apache-2.0"]) == 0
    assert "https://huggingface.co/me/mine" in capsys.readouterr().out
    assert hub.created == {"repo": "me/mine", "private": True, "exist_ok": True}
    assert hub.files == {file.name: file.read_bytes() for file in (run.directory / "export" / "hub").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "config.yaml", "README.md"} <= hub.files.keys()
    assert hub.files["adapter_model.safetensors"] == (run.adapter / "adapter_model.safetensors").read_bytes()
    hub.files["LICENSE"] = b"the owner's"
    assert cli.main(["push", str(run.directory), "me/mine", "--compact"]) == 0
    assert hub.files.keys() >= {"LICENSE", "partial_lora.safetensors"}
    assert not {"adapter_model.safetensors", "partial_lora.json"} & hub.files.keys()  # PEFT would load the former


@pytest.mark.parametrize(
    "error",
    [
        HfHubHTTPError(f"403 for {TOKEN}", response=SimpleNamespace(headers={}, request=None)),
        HTTPError(f"no route for {TOKEN}"),
        LocalTokenNotFoundError("log in"),
    ],
)
def test_a_refusal_of_the_hub_is_one_line_without_the_token(hub, monkeypatch, capsys, error) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    assert cli.main(["push", str(choice_run().directory), "me/mine"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
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
    assert (hub.created, hub.files) == ({}, {})
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
    page = run_card.card(run, "me/mine", run.adapter)
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
    assert f"| accuracy | {score} | – | – |" in run_card.card(without, "me/mine", run.adapter).text
    assert f"{(run.adapter / 'adapter_model.safetensors').stat().st_size:,} bytes" in page.text


def test_the_page_of_a_run_that_has_won_a_comparison_has_the_verdict_and_its_command(tmp_path) -> None:
    run = choice_run()
    outputs = {name: {seed: np.full(3, score) for seed in range(2)} for name, score in (("a", 0.9), ("b", 0.1))}
    decided = {
        "metric": "accuracy",
        "margin": 0.01,
        "looks": (2,),
        "forgotten": {},
        "verdict": ["Take a: nothing is better."],
    }
    settings = {"a": run.result["config"]}
    (tmp_path / "take").mkdir()
    certificate.write(tmp_path / "take", outputs, decide(outputs, 0.01, (2,)), settings=settings, **decided)
    won = dataclasses.replace(run, directory=tmp_path / "runs" / "task" / "model" / "method-id" / "seed0")
    page, other = (run_card.card(each, "me/mine", run.adapter).text for each in (won, run))
    assert "Take a: nothing is better." in page
    assert "partial-lora compare take/verdict.json --verify" in page
    assert "--verify" not in other


def test_the_page_of_a_mixture_has_the_share_of_each_member_in_percent() -> None:
    run = mixed_runs.image_mixture()
    page = run_card.card(run, "me/mine", run.adapter).text
    for member in ("colours", "digits"):
        assert re.search(rf"^\| {member}/accuracy \| \d+\.\d\d % ", page, re.MULTILINE)


def test_the_page_names_base_model_and_data_of_the_hub_and_the_lines_that_load_them() -> None:
    run = finished_runs.changed(choice_run(), "model", weights="Qwen/Qwen2.5-0.5B@main", architecture="qwen2")
    run = finished_runs.changed(run, "task", path="allenai/ai2_arc")
    page = run_card.card(run, "me/mine", run.adapter, license="mit")
    assert (page.data.base_model, page.data.datasets, page.data.license) == (
        "Qwen/Qwen2.5-0.5B",
        ["allenai/ai2_arc"],
        "mit",
    )
    code = page.text.partition("```python\n")[2].partition("```")[0]
    compile(code, "page", "exec")
    assert 'base = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B", revision="main")' in code
    assert 'model = PeftModel.from_pretrained(base, "me/mine")' in code


def test_settings_have_no_place_of_this_machine(hub, tmp_path) -> None:
    run = choice_run()
    folder = push.write(run, lambda built: run_card.card(run, "me/mine", built))
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
        settings = yaml.safe_load(page.text.partition("without their folders:")[2].partition("Made with")[0])
        assert settings["model.name"] == run.config.model.name
        assert not [value for value in settings.values() if isinstance(value, str) and value.startswith("/")]
        code = page.text.partition("```python\n")[2].partition("```")[0]
        compile(code, str(folder), "exec")
        assert ("load_compact" in code, "pipeline(" in code) == (folder.name == "compact", folder.name == "merged")
    labels = ", ".join(image_run().labels())
    assert f"Its labels: {labels}." in ModelCard.load(image_run().adapter / "README.md").text


def test_no_text_of_a_run_is_markup_on_its_page() -> None:
    run = image_run()
    evil = ["<script>alert(1)</script>", "[a](javascript:b)", "![c](https://d)", "a`b\n---\n# e", "```\n<img src=f>"]
    result = run.result | {"labels": evil, "device": evil[0], "versions": run.result["versions"] | {evil[2]: evil[4]}}
    run = dataclasses.replace(run, result=result)
    run = finished_runs.changed(run, "model", weights="a/<b>", architecture=evil[0], target_modules=[evil[3]])
    run = finished_runs.changed(run, "task", path="a/b)](c", text_columns=evil[3:])
    for repo in (None, "me/mine"):
        page = run_card.card(run, repo, run.adapter)
        shown = "\n".join(line for line in page.text.splitlines() if not line.startswith("    "))
        for markup in ("<", r"(?<!\\)\]\((javascript|c)", r"!\[", r"\n# e", r"\n---", r"(?<!\\)`\n"):
            assert not re.search(markup, shown.replace("```\n", "")), markup
        front = yaml.safe_load(str(page).split("---\n")[1])
        assert not {"base_model", "datasets"} & front.keys()


def test_a_run_whose_score_is_no_number_keeps_the_page_that_is_there(tmp_path) -> None:
    run = choice_run()
    shutil.copytree(run.adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text("PEFT's")
    test = run.result["metrics"]["test"] | {"accuracy": None}
    metrics = run.result["metrics"] | {"test": test}
    broken = dataclasses.replace(run, result=run.result | {"metrics": metrics})
    run_card.write(broken, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "README.md").read_text() == "PEFT's"
    with refusal(f"{run.directory}/result.json"):
        push.write(broken, lambda folder: run_card.card(broken, "me/mine", folder))
