"""A finished run leaves in three formats: each works without this package and is there whole or not at all."""

from __future__ import annotations

import functools
import itertools
import json
import resource
import shutil
import signal
import stat
from dataclasses import replace
from pathlib import Path

import finished_runs
import numpy as np
import pytest
import timm
import torch
from finished_runs import GENERATION, changed, choice_run, generation_run, image_run, override, pictures, trained
from PIL import Image
from plain_libraries import in_this_process
from refusals import refusal
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer

from partial_lora import cli, tasks
from partial_lora.errors import ProofError
from partial_lora.finished import export, merge
from partial_lora.finished.predict import Predictor
from partial_lora.finished.run import FinishedRun, finished_run
from partial_lora.launching import directory as record
from partial_lora.models.language import byte_tokenizer
from partial_lora.report import records
from partial_lora.settings.identity import digests
from partial_lora.settings.versions import plain

B = "base_model.model.timm_model.blocks.2.mlp.fc2.lora_B.weight"


@functools.cache
def run_of(method: str) -> FinishedRun:
    """A finished run of another method on the pictures."""
    paths = override(finished_runs.picture_files())
    given = ("model=tiny_vit", "task=cifar10", "calibration.shots=4", f"method={method}")
    return trained(f"export-{method}", *given, paths)


@functools.cache
def encoder_run() -> FinishedRun:
    """A masked adapter of a text encoder, whose pooler trains beside the head."""
    given = ("model=tiny_deberta", "task=text_table", "calibration.levels=0.45", "trainer.learning_rate=0.05")
    return trained("masked texts", *given, override(finished_runs.sentence_files()))


EXPERTS = {
    "qwen3_moe": "num_key_value_heads: 2, moe_intermediate_size: 24, num_experts: 4, head_dim: 8",
    "mixtral": "num_key_value_heads: 2, num_local_experts: 4",
    "gpt_oss": "num_key_value_heads: 2, num_local_experts: 4, head_dim: 8",
    "deepseek_v3": "num_key_value_heads: 4, moe_intermediate_size: 24, n_routed_experts: 4, n_group: 1, topk_group: 1,"
    " q_lora_rank: 8, kv_lora_rank: 8, qk_rope_head_dim: 4, qk_nope_head_dim: 4,"
    " v_head_dim: 8, first_k_dense_replace: 0, n_shared_experts: 1",
}


@functools.cache
def experts_run(kind: str) -> FinishedRun:
    """A masked adapter of a class whose experts are fused, over its attention and its experts."""
    sizes = "vocab_size: 260, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 4,"
    sizes += " num_experts_per_tok: 2"
    targets = "[o_proj,experts.gate_up_proj,experts.down_proj]"
    model = ("model=tiny_qwen", f"model.architecture={kind}", f"++model.model_args={{{sizes}, {EXPERTS[kind]}}}")
    given = ("calibration=fixed", "method.rank=4", "task=text_generation", "task.max_new_tokens=2", *GENERATION)
    paths = override(finished_runs.exchange_files())
    return trained(f"experts {kind}", *model, f"model.target_modules={targets}", *given, paths)


@pytest.fixture
def run(tmp_path: Path) -> FinishedRun:
    """A copy of the Partial-LoRA run that a test may spoil."""
    return finished_run(shutil.copytree(image_run().directory, tmp_path / "run"))


def nothing_left(folder: Path) -> bool:
    """Whether neither an export nor a part of one is there."""
    return not folder.exists() and not list(folder.parent.glob(".*"))


# The three formats


CHECKED = {
    "peft": ["plain PEFT: "],
    "compact": ["tensors equal bit for bit", "a fresh base model: "],
    "merged": ["transformers alone: "],
}


@pytest.mark.parametrize(
    ("of", "to"),
    [
        *itertools.product((image_run, encoder_run), CHECKED),
        *itertools.product((functools.partial(experts_run, kind) for kind in EXPERTS), CHECKED),
        (functools.partial(run_of, "probe"), "peft"),
        (functools.partial(run_of, "probe"), "merged"),
        (functools.partial(run_of, "targeted"), "compact"),  # which is as `partial` is once it is dense
    ],
)
def test_others_compute_the_run_s_logits_from_its_files(tmp_path, monkeypatch, of, to):
    in_this_process(monkeypatch)
    run, out = of(), tmp_path / "out"
    done = export.export(run, to, out, check=True)  # raises where the logits differ
    assert done.size == sum(file.stat().st_size for file in out.iterdir())
    assert all(words in done.proof for words in CHECKED[to])
    assert ("timm alone: " in done.proof) == (to == "merged" and run.config.model.family == "timm")


def test_a_number_of_an_image_is_checked_as_classes_are(tmp_path, monkeypatch):
    in_this_process(monkeypatch)
    rows = {split: pictures(count, 0) for split, count in (("train", 8), ("test", 3))}
    numbers = {
        split: of.remove_columns("label").add_column("label", [each + 0.5 for each in of["label"]])
        for split, of in rows.items()
    }
    own = override(finished_runs.files(numbers, "numbers"))
    run = trained("numbers", "model=tiny_vit", "task=image_table", "method=lora", own)
    assert export.export(run, "merged", tmp_path / "out", check=True).proof


def test_a_tuner_that_peft_does_not_merge_is_exported_by_itself(tmp_path):
    lily = ("method=peft", "method.peft_type=LILY")
    run = trained("lily", "model=tiny_vit", "task=cifar10", *lily, override(finished_runs.picture_files()))
    with refusal(str(run.directory), "--to peft"):
        export.export(run, "merged", tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def test_the_adapter_has_the_pooler_that_trained():
    names = load_file(encoder_run().adapter / "adapter_model.safetensors").keys()
    assert {"base_model.model.pooler.dense.weight", "base_model.model.classifier.weight"} <= names
    assert encoder_run().result["parameters"]["head"] == 32 * 32 + 32 + 2 * 32 + 2


def test_a_merged_image_model_says_what_its_images_must_look_like(tmp_path):
    run = image_run()
    folder = export.export(run, "merged", tmp_path / "out").folder
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors"}
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (47, 61, 3), dtype=np.uint8))
    keys = ("image_size", "mean", "std", "interpolation")
    transform = tasks.ImageTransform(**{key: getattr(run.config.model, key) for key in keys})
    expected = transform.encode([image])["pixel_values"][0]
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    torch.testing.assert_close(transform(image), expected)
    torch.testing.assert_close(AutoImageProcessor.from_pretrained(folder)(image)["pixel_values"][0], expected)


@pytest.mark.parametrize("to", ["adapter", "peft", "compact", "merged"])
def test_every_folder_has_what_makes_inputs_and_names_classes(tmp_path, to):
    for run in (image_run(), encoder_run(), choice_run()):
        kind = run.config.model.family
        folder = run.adapter if to == "adapter" else export.export(run, to, tmp_path / kind).folder
        config = AutoConfig.from_pretrained(folder)
        assert kind == "causal" or list(config.id2label.values()) == run.labels()
        if kind == "timm":
            assert (
                AutoImageProcessor.from_pretrained(folder)(Image.new("RGB", (50, 40)))["pixel_values"].shape[-1] == 32
            )
            continue
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer(["a lovely film"])["input_ids"] == byte_tokenizer()(["a lovely film"])["input_ids"]
        assert kind == "causal" or tokenizer.model_max_length == run.config.model.max_length


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def other_labels(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"good"', '"fine"'))


@pytest.mark.parametrize(("to", "dtype"), [("peft", "float32"), ("merged", "bfloat16")])
def test_a_quantised_base_is_proven_with_its_weights_whole(tmp_path, monkeypatch, to, dtype):
    in_this_process(monkeypatch)
    run = changed(choice_run(), "model", quantization="nf4", dtype=dtype)
    assert "(nf4 weights whole again)" in export.export(run, to, tmp_path / to, check=True).proof


def test_a_quantised_base_is_merged_with_the_values_that_its_weights_stand_for(tmp_path):
    """Neither rounded again, which would lose the adapter, nor the weights before they were quantised."""
    run = changed(choice_run(), "model", quantization="nf4")
    export.export(run, "merged", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}
    inputs = export._samples(run).inputs
    own = export._logits(export.adapted_model(run), inputs)  # in four bits, as it runs
    others = (merged, export.adapted_model(choice_run()), export.base_model(run))
    same, *apart = (float((export._logits(model, inputs) - own).abs().max()) for model in others)
    assert same < 1e-5 < 1e-3 < min(apart)


def test_an_adapted_output_that_shares_the_embedding_s_weights_is_merged_alone(tmp_path, monkeypatch):
    in_this_process(monkeypatch)
    tied = ("model=tiny_llama", "model.target_modules=[lm_head]", "method=lora", "task=choice_table")
    run = trained("tied", *tied, *finished_runs.CHOICE, override(finished_runs.question_files()))
    export.export(run, "merged", tmp_path / "merged", check=True)


# Proof


def test_a_clean_interpreter_of_peft_alone_agrees_with_the_run(tmp_path):
    """Checks PEFT's script; the scripts of other libraries are run in this process, elsewhere in this file."""
    assert export.export(image_run(), "peft", tmp_path / "peft", check=True).proof


def test_the_clean_interpreter_cannot_import_this_package(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_SCRIPT", export._SCRIPT.replace("import torch\n", "import partial_lora.adapter\n", 1))
    with pytest.raises(ProofError, match=r"partial_lora.*not a package"):
        export.logits_elsewhere(export._samples(image_run()), model=tmp_path)


def scaled(file: str, key: str, factor: float):
    """What spoils a tensor of an export just written."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / file)
        save_file(tensors | {key: tensors[key] * factor}, folder / file, metadata={"format": "pt"})

    return spoil


def extra_key(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sparsity": 0.5}))


@pytest.mark.parametrize(
    ("of", "to", "spoil", "names"),
    [
        (image_run, "peft", extra_key, r"\['sparsity'\]"),  # of which plain PEFT warns
        (image_run, "merged", scaled("model.safetensors", "blocks.2.mlp.fc2.weight", 1.001), "transformers"),
        (image_run, "merged", scaled("model.safetensors", "head.bias", float("nan")), "transformers"),
        (image_run, "compact", None, r"lora_A\.weight"),
        (encoder_run, "merged", without_tokenizer, "transformers"),
        (encoder_run, "peft", other_labels, "transformers"),
    ],
)
def test_a_spoilt_export_does_not_pass_the_check_and_is_not_left(tmp_path, monkeypatch, of, to, spoil, names):
    in_this_process(monkeypatch)
    write, compact = export.WRITE[to], export.write_compact
    if spoil is None:
        write = lambda run, folder: compact(export.adapted_model(run), folder, dtype=torch.bfloat16)  # noqa: E731
    monkeypatch.setitem(export.WRITE, to, lambda run, folder: (write(run, folder), spoil and spoil(folder)))
    with pytest.raises(ProofError, match=names) as error:
        export.export(of(), to, tmp_path / "out", check=True)
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)
    assert nothing_left(tmp_path / "out")


# Whole or not at all


def test_the_default_folder_is_in_the_run_and_can_be_read_by_others(run, usual_umask):
    done = export.export(run, "merged")
    assert done.folder == run.directory.resolve() / "export" / "merged"
    assert not done.existed
    assert all(path.stat().st_mode & stat.S_IROTH for path in (done.folder, *done.folder.iterdir()))


@pytest.mark.parametrize("to", ["peft", "compact", "merged", "gguf"])
def test_the_same_export_is_written_again_and_another_one_refused(tmp_path, to):
    out = tmp_path / "deep" / "out"
    own, other = (choice_run(), generation_run()) if to == "gguf" else (image_run(), run_of("targeted"))
    first = export.export(own, to, out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    again = export.export(own, to, out)
    assert (first.existed, again.existed) == (False, True)
    with refusal(f"{out} "):
        export.export(other, to, out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]


def test_a_folder_of_other_files_is_left_alone_and_an_empty_one_filled(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    assert not export.export(run, "compact", out).existed
    for name in ("notes.txt", "model.safetensors"):
        other = tmp_path / name.partition(".")[0]
        other.mkdir()
        (other / name).write_text("mine")
        with refusal(f"{other} "):
            export.export(run, "compact", other)
        assert [(file.name, file.read_text()) for file in other.iterdir()] == [(name, "mine")]
    (tmp_path / "file").write_text("")
    for impossible, to in ((tmp_path / "file", "compact"), (run.adapter, "peft")):
        with refusal(f"{impossible} "):
            export.export(run, to, impossible)
    assert run.adapter.is_dir()


@pytest.mark.parametrize("when", ["WRITE", "PROVE"])
def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch, when):
    def interrupted(run, folder):
        (folder / "half.safetensors").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setitem(getattr(export, when), "compact", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export.export(image_run(), "compact", tmp_path / "out", check=True)
    assert nothing_left(tmp_path / "out")


# Runs that cannot be exported


def recorded(**changes):
    def change(directory: Path) -> None:
        path = directory / record.RESULT
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


WRONG = (("config", "x"), ("labels", None), ("labels", [1]), ("files", [3]), ("digests", "x"), ("commits", [1]))


def test_a_report_and_a_use_of_a_run_refuse_the_same_records(run):
    record = run.directory / "result.json"
    whole = json.loads(record.read_text())
    for key, value in [*WRONG, ("config", None), ("metrics", {"test": {"primary": 3}})]:
        record.write_text(json.dumps({name: of for name, of in (whole | {key: value}).items() if of != {}}))
        for read in (finished_run, records.one):
            with refusal(f"{record}: foreign, ", key):
                read(run.directory)


@pytest.mark.parametrize("to", ["peft", "compact", "merged", "gguf", "serve", "merge"])
def test_a_full_disk_is_one_line_and_nothing_half_written_stays(tmp_path, to):
    run = image_run() if to in ("peft", "compact", "merged") else generation_run()
    out, before = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))  # for files of this process
    try:
        with refusal(f"{out} cannot be written", "--out"):
            if to == "merge":
                merge.merge([run, run], [1.0, 0.5], out)
            else:
                export.export(run, to, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert nothing_left(out)


def removed(name: str):
    return lambda directory: (directory / name).unlink()


def truncated(name: str):
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:-100])


def without_a_tensor(directory: Path) -> None:
    path = directory / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[B]
    save_file(tensors, path, metadata={"format": "pt"})


def with_another_seed(directory: Path) -> None:
    path = directory / "adapter" / "partial_lora.json"
    path.write_text(path.read_text().replace('"mask_seed":0', '"mask_seed":1'))


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (shutil.rmtree, ["/run: "]),
        (truncated("result.json"), ["result.json"]),
        (recorded(status="failed", error="out of memory"), ["failed", "out of memory"]),
        (recorded(metrics={}), ["calibrated"]),
        *((recorded(**{key: value}), ["result.json", f"{key} is"]) for key, value in WRONG),
        (recorded(config={"task": {"name": "t"}}), ["result.json", "config.model"]),
        (recorded(labels=["green", "red", "blue"]), ["result.json", "labels"]),
        (removed("adapter/adapter_model.safetensors"), ["adapter/adapter_model.safetensors"]),
        (truncated("adapter/adapter_model.safetensors"), ["adapter_model.safetensors"]),
        (truncated("adapter/adapter_config.json"), ["adapter_config.json"]),
        (truncated("adapter/partial_lora.json"), ["partial_lora.json"]),
        (with_another_seed, ["partial_lora.json", "digest"]),
        (without_a_tensor, ["adapter_model.safetensors", "lora_B", "fc2"]),
    ],
)
def test_a_run_that_cannot_be_exported_is_one_line(run, tmp_path, capsys, monkeypatch, spoil, names):
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process keeps its own handlers
    spoil(run.directory)
    code = cli.main(["export", str(run.directory), "--to", "peft", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr()
    (line,) = printed.err.strip().splitlines()
    assert (code, printed.out) == (2, "")
    assert line.startswith("partial-lora: ")
    assert all(name in line for name in names)
    assert nothing_left(tmp_path / "out")


def test_a_run_goes_over_the_very_files_that_it_was_trained_over(run, tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    export._save(export.base_model(run), run, folder)
    over = changed(run, "model", weights=str(folder))
    over = replace(over, result=over.result | {"digests": digests({"model": plain(over.config)["model"]})})
    assert not export.adapted_model(over).training
    tensors = load_file(folder / "model.safetensors")
    save_file({name: -tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    for spoil in (str, shutil.rmtree):  # of the same shapes, then gone
        spoil(folder)
        for use in (Predictor, export.adapted_model, lambda run: merge.merge([run, run], [1, 1], tmp_path / "out")):
            with refusal("model.weights: "):
                use(over)
