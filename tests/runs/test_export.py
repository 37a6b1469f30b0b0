"""A finished run leaves in three formats: each works without this package and is there whole or not at all."""

from __future__ import annotations

import json
import re
import shutil
import signal
import stat
from pathlib import Path

import numpy as np
import pandas
import peft
import pytest
import timm
import torch
from adapter_models import adapt, convnext, fill, images, llama, logits, tokens
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageClassification

from partial_lora import cli, files, tasks, train
from partial_lora.errors import PartialLoraError, ProofError
from partial_lora.runs import directory as record
from partial_lora.runs import export, finished
from partial_lora.runs.compose import composed
from partial_lora.runs.config import plain
from partial_lora.runs.export import save_model

TINY = ("model=tiny_vit", "trainer.max_steps=3", "trainer.device=cpu", "calibration.shots=4")
RUNS = {
    "partial": ("method=partial",),
    "element": ("method=partial", "mask.granularity=element", "mask.count=bernoulli"),
    "targeted": ("method=targeted",),
    "lora": ("method=lora",),
    "probe": ("method=probe",),
}
MASKED = ("partial", "element", "targeted")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def runs(place: Path) -> dict[str, finished.FinishedRun]:
    """A finished run of every kind, its values moved far enough from their start to matter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PARTIAL_LORA_CACHE", str(place / "cache"))
        patch.setenv("WANDB_DISABLED", "true")
        return {name: trained_run(place / name, *overrides) for name, overrides in RUNS.items()}


def trained_run(directory: Path, *overrides: str) -> finished.FinishedRun:
    """What a worker does with a run, in this process."""
    config = composed(*TINY, "trainer.learning_rate=0.05", *overrides)
    directory.mkdir()
    (directory / record.CONFIG).write_text(json.dumps(plain(config)))
    entry = record.new(plain(config))
    train.run(config, directory, entry, "train")
    files.write_json(directory / record.RESULT, entry | {"status": "finished"})
    return finished.finished_run(directory)


@pytest.fixture
def run(runs, tmp_path: Path) -> finished.FinishedRun:
    """A copy of the Partial-LoRA run that a test may spoil."""
    return finished.finished_run(shutil.copytree(runs["partial"].directory, tmp_path / "run"))


@pytest.fixture
def own(runs):
    """The logits of a run's own model, and the inputs they are for."""

    def compute(name: str):
        inputs = images(3)["pixel_values"]
        with torch.no_grad():
            return inputs, export.adapted_model(runs[name])(inputs).logits

    return compute


def close(found: torch.Tensor, own: torch.Tensor) -> None:
    torch.testing.assert_close(found, own, atol=1e-5 * max(1, own.abs().max().item()), rtol=0)


def nothing_left(folder: Path) -> bool:
    """Whether neither an export nor a part of one is there."""
    return not folder.exists() and not list(folder.parent.glob(".*"))


# The three formats


@pytest.mark.parametrize("name", RUNS)
def test_peft_is_an_ordinary_adapter_of_the_run(runs, own, tmp_path, name):
    done = export.export(runs[name], "peft", tmp_path / "out")
    settings = json.loads((done.folder / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    assert settings.keys() <= {*peft.LoraConfig().to_dict()}
    assert not settings["rank_pattern"]
    tensors = load_file(done.folder / "adapter_model.safetensors")
    targets = [] if name == "probe" else ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    for block in range(3):
        for target in targets:  # every module is there, with one rank
            module = f"base_model.model.timm_model.blocks.{block}.{target}"
            assert tensors.pop(f"{module}.lora_A.weight").shape[0] == 16
            assert tensors.pop(f"{module}.lora_B.weight").shape[1] == 16
    assert tensors.keys() == {f"base_model.model.timm_model.head.{each}" for each in ("weight", "bias")}
    plain = peft.PeftModel.from_pretrained(export.base_model(runs[name]), str(done.folder))
    assert type(plain.base_model) is peft.LoraModel
    inputs, expected = own(name)
    close(logits(plain, {"pixel_values": inputs}), expected)


@pytest.mark.parametrize("name", MASKED)
def test_compact_is_the_run_bit_for_bit(runs, tmp_path, name):
    done = export.export(runs[name], "compact", tmp_path / "out", check=True)
    assert "26 tensors equal bit for bit" in done.proof
    parameters = json.loads((runs[name].directory / record.RESULT).read_text())["parameters"]
    kept = parameters["adapter_trainable"] + parameters["head"]
    # Of `targeted`, rank 16: each index stands for 16 kept values.
    indices = parameters["adapter_trainable"] // 16 if name == "targeted" else 0
    (file,) = done.folder.iterdir()
    assert done.size == file.stat().st_size <= 4 * kept + 400 * 12 + 4 * indices


@pytest.mark.parametrize("name", RUNS)
def test_merged_loads_in_timm_and_transformers(runs, own, tmp_path, name):
    done = export.export(runs[name], "merged", tmp_path / "out")
    assert {file.name for file in done.folder.iterdir()} == {"config.json", "model.safetensors"}
    inputs, expected = own(name)
    in_timm = timm.create_model(f"local-dir:{done.folder}", pretrained=True).eval()
    in_transformers = AutoModelForImageClassification.from_pretrained(done.folder).eval()
    with torch.no_grad():
        close(in_timm(inputs), expected)
        close(in_transformers(inputs).logits, expected)
    assert in_transformers.config.id2label == {index: str(index) for index in range(10)}


def test_merged_says_what_its_images_must_look_like(runs, tmp_path):
    folder = export.export(runs["partial"], "merged", tmp_path / "out").folder
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (47, 61, 3), dtype=np.uint8))
    chosen, keys = runs["partial"].config.model, ("image_size", "mean", "std", "interpolation")
    transform = tasks.ImageTransform(**{key: getattr(chosen, key) for key in keys})
    expected = transform({"image": [image], "label": [0]})["pixel_values"][0]
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    torch.testing.assert_close(transform(image), expected)
    processed = AutoImageProcessor.from_pretrained(folder)(image)["pixel_values"][0]
    torch.testing.assert_close(processed, expected)


@pytest.mark.parametrize("name", ["lora", "probe"])
def test_what_masks_nothing_has_no_compact_form(runs, tmp_path, name):
    with pytest.raises(PartialLoraError, match=f"method={name} masks nothing"):
        export.export(runs[name], "compact", tmp_path / "out")
    assert nothing_left(tmp_path / "out")


# Proof


@pytest.mark.parametrize(("name", "to"), [("partial", "peft"), ("element", "merged")])
def test_a_clean_interpreter_agrees_with_the_run(runs, tmp_path, name, to):
    done = export.export(runs[name], to, tmp_path / "out", check=True)
    who = {"peft": ["plain PEFT"], "merged": ["transformers alone", "timm alone"]}[to]
    assert [part.partition(":")[0] for part in done.proof.split("; ")] == who


def scaled(file: str, key: str, factor: float):
    """What spoils a tensor of an export just written."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / file)
        tensors[key] = tensors[key] * factor
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return spoil


def extra_key(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sparsity": 0.5}))


B = "base_model.model.timm_model.blocks.2.mlp.fc2.lora_B.weight"


def in_this_process(inputs, *, model: Path, adapter: Path | None = None, library: str = "transformers"):
    """What a clean interpreter computes, without the seconds that one takes to start."""
    loaded = AutoModelForImageClassification.from_pretrained(model)
    if adapter:
        loaded = peft.PeftModel.from_pretrained(loaded, str(adapter))
    return logits(loaded, inputs)


def spoilt_export_fails(run, out: Path, monkeypatch: pytest.MonkeyPatch, to: str, spoil, said: str) -> None:
    write = export.WRITE[to]

    def spoilt(run, folder):
        write(run, folder)
        spoil(folder)

    monkeypatch.setitem(export.WRITE, to, spoilt)
    with pytest.raises(ProofError, match=said) as error:
        export.export(run, to, out, check=True)
    assert "\n" not in str(error.value)
    assert nothing_left(out)


@pytest.mark.parametrize(
    ("to", "spoil", "said"),
    [
        (
            "peft",
            scaled("adapter_model.safetensors", B, 1.01),
            r"logits of plain PEFT differ from the run's by .*allowed",
        ),
        (
            "merged",
            scaled("model.safetensors", "blocks.2.mlp.fc2.weight", 1.001),
            "logits of transformers alone differ",
        ),
        ("merged", scaled("model.safetensors", "head.bias", float("nan")), "logits of transformers alone differ"),
    ],
)
def test_a_spoilt_export_does_not_pass_the_check_and_is_not_left(run, tmp_path, monkeypatch, to, spoil, said):
    monkeypatch.setattr(export, "logits_elsewhere", in_this_process)
    spoilt_export_fails(run, tmp_path / "out", monkeypatch, to, spoil, said)


def test_an_adapter_that_plain_peft_warns_of_does_not_pass_the_check(run, tmp_path, monkeypatch):
    said = r"plain PEFT warns when it loads it: Unexpected keyword arguments \['sparsity'\]"
    spoilt_export_fails(run, tmp_path / "out", monkeypatch, "peft", extra_key, said)


def test_the_clean_interpreter_cannot_import_this_package(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_SCRIPT", export._SCRIPT.replace("job = ", "import partial_lora.adapter\njob = "))
    with pytest.raises(ProofError, match=r"a clean interpreter cannot use it .*partial_lora.*not a package"):
        export.logits_elsewhere({"x": torch.zeros(1)}, model=tmp_path)


def test_a_compact_export_with_another_bit_does_not_pass_the_check(run, runs, tmp_path, monkeypatch):
    write = export.write_compact

    def rounded(model, folder):
        return write(model, folder, dtype=torch.bfloat16)

    monkeypatch.setattr(export, "write_compact", rounded)
    with pytest.raises(ProofError, match=r"lora_A\.weight is not that of the run after loading"):
        export.export(run, "compact", tmp_path / "out", check=True)
    assert nothing_left(tmp_path / "out")


def test_a_merged_language_model_is_one_of_transformers(tmp_path):
    model = fill(adapt(llama, sparsity=0.5))
    expected = logits(model, tokens())
    save_model(model.merge_and_unload(), tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path), tokens()), expected)
    close(export.logits_elsewhere({"input_ids": tokens()["input_ids"]}, model=tmp_path), expected)


def test_a_merged_model_of_transformers_own_loads_by_its_auto_class(tmp_path):
    model = fill(adapt(convnext, sparsity=0.5))
    expected = logits(model, images())
    save_model(model.merge_and_unload(), tmp_path)
    close(logits(AutoModelForImageClassification.from_pretrained(tmp_path), images()), expected)


# Whole or not at all


def test_the_default_folder_is_in_the_run_and_can_be_read_by_others(run):
    done = export.export(run, "merged")
    assert done.folder == run.directory.resolve() / "export" / "merged"
    for path in (done.folder, *done.folder.iterdir()):
        assert path.stat().st_mode & stat.S_IROTH
    assert not done.existed


@pytest.mark.parametrize("to", ["peft", "compact", "merged"])
def test_the_same_export_is_written_again_and_another_one_refused(run, runs, tmp_path, to):
    out = tmp_path / "deep" / "out"
    first = export.export(run, to, out)
    bytes_of = {file.name: file.read_bytes() for file in out.glob("*.safetensors")}
    again = export.export(run, to, out)
    assert (first.existed, again.existed) == (False, True)
    assert {file.name: file.read_bytes() for file in out.glob("*.safetensors")} == bytes_of
    with pytest.raises(PartialLoraError, match="holds other files than this export: choose another --out"):
        export.export(runs["targeted"], to, out)
    assert {file.name: file.read_bytes() for file in out.glob("*.safetensors")} == bytes_of
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("names", [["notes.txt"], ["model.safetensors"]])
def test_a_folder_of_other_files_is_refused_and_left_alone(run, tmp_path, names):
    out = tmp_path / "out"
    out.mkdir()
    for name in names:
        (out / name).write_text("mine")
    with pytest.raises(PartialLoraError, match="out holds other files than this export"):
        export.export(run, "compact", out)
    assert [(file.name, file.read_text()) for file in out.iterdir()] == [(name, "mine") for name in names]


def test_an_empty_folder_is_filled(run, tmp_path):
    (tmp_path / "out").mkdir()
    assert not export.export(run, "compact", tmp_path / "out").existed


def test_what_cannot_be_a_folder_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("")
    for out, said in ((tmp_path / "file", "is a file"), (tmp_path / "file" / "out", r"cannot be written \(.*\)")):
        with pytest.raises(PartialLoraError, match=said):
            export.export(run, "compact", out)
    with pytest.raises(PartialLoraError, match="is the run's own adapter"):
        export.export(run, "peft", run.adapter)
    assert run.adapter.is_dir()


@pytest.mark.parametrize("when", ["WRITE", "PROVE"])
def test_an_interrupted_export_leaves_nothing(run, tmp_path, monkeypatch, when):
    def interrupted(run, folder):
        (folder / "half.safetensors").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setitem(getattr(export, when), "compact", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export.export(run, "compact", tmp_path / "out", check=True)
    assert nothing_left(tmp_path / "out")


def test_an_export_that_fails_at_the_last_step_leaves_the_one_before(run, tmp_path, monkeypatch):
    out = export.export(run, "compact", tmp_path / "out").folder
    rename = Path.rename

    def failing(self, target):
        if self.name.startswith(".") and not self.name.endswith(".replaced"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(PartialLoraError, match="No space left on device"):
        export.export(run, "compact", out)
    assert [entry.name for entry in out.iterdir()] == ["partial_lora.safetensors"]
    assert not list(tmp_path.glob(".*"))


# Runs that cannot be exported


def change_result(**changes):
    def change(directory: Path) -> None:
        path = directory / record.RESULT
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def remove(name: str):
    return lambda directory: (directory / name).unlink()


def truncate(name: str):
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:-100])


def of_old(spoil):
    """The same to a run that was recorded before labels were kept, when predictions alone had them."""

    def spoil_old(directory: Path) -> None:
        record = json.loads((directory / "result.json").read_text())
        del record["labels"]
        (directory / "result.json").write_text(json.dumps(record))
        spoil(directory)

    return spoil_old


def drop_tensor(directory: Path) -> None:
    path = directory / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[B]
    save_file(tensors, path, metadata={"format": "pt"})


def reseed(directory: Path) -> None:
    path = directory / "adapter" / "partial_lora.json"
    path.write_text(path.read_text().replace('"mask_seed": 0', '"mask_seed": 1'))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (shutil.rmtree, "no such directory, expected that of a run"),
        (remove("result.json"), "expected the directory of a run, with a result.json in it"),
        (truncate("result.json"), r"result\.json: no record of a run, or a broken one"),
        (
            change_result(status="failed", error="out of memory"),
            r"the run is failed \(out of memory\), expected a finished",
        ),
        (change_result(status="running"), "the run is running, expected a finished one"),
        (change_result(metrics={}), "only calibrated, nothing was trained"),
        (change_result(config={}), "no settings of a run in it"),
        (remove("adapter/adapter_model.safetensors"), "adapter/adapter_model.safetensors is missing"),
        (of_old(truncate("predictions.parquet")), r"predictions\.parquet cannot be read"),
        (truncate("adapter/adapter_model.safetensors"), r"adapter_model\.safetensors is broken or truncated"),
        (truncate("adapter/adapter_config.json"), r"adapter: cannot be loaded \("),
        (truncate("adapter/partial_lora.json"), r"partial_lora\.json is broken"),
        (reseed, "does not match the digest in"),
        (drop_tensor, r"adapter_model\.safetensors has no lora_B of \S+fc2, which its masks are for"),
    ],
)
def test_a_run_that_cannot_be_exported_is_one_line(run, tmp_path, capsys, monkeypatch, spoil, said):
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process keeps its own handlers
    spoil(run.directory)
    code = cli.main(["export", str(run.directory), "--to", "peft", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr()
    (line,) = printed.err.strip().splitlines()
    assert code == 2
    assert line.startswith("partial-lora: ")
    assert re.search(said, line), line
    assert printed.out == ""
    assert nothing_left(tmp_path / "out")


def test_a_class_that_no_row_has_is_called_by_its_index(run):
    path = run.directory / record.PREDICTIONS
    frame = pandas.read_parquet(path)
    frame[(frame["label"] != 7) & (frame["prediction"] != 7)].to_parquet(path)
    assert run.labels() == [str(index) for index in range(10)]
