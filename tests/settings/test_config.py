"""Settings: what is refused, by which key, and what they become."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from finished_runs import override, written
from omegaconf import OmegaConf
from refusals import refusal

from partial_lora import files, methods
from partial_lora.calibration import importance
from partial_lora.errors import PartialLoraError
from partial_lora.launching import directory
from partial_lora.models import skeleton
from partial_lora.settings import compose, identity, keys, resolving, schema, study_commands, versions
from partial_lora.settings.compose import composed
from partial_lora.settings.schema import Config

OUT_OF_RANGE = yaml.safe_load("""
calibration: {threshold: 1.01, budget: 1.5, max_sparsity: 1.0, shots: 0, share: 0.6, levels: 0.0, seed: -1, memory: -1,
  max_samples: 0, search: binary, axes: both, scope: backward, chance: "0.1", score: precision}
importance: {k: 0, energy: 1.5, rounds: 0, fraction: 1.0, steps: -1, learning_rate: 0.0}
mask: {granularity: block, count: bernoulli}  # the latter of single entries alone
method: {rank: 0, alpha: 0.0, dropout: 1.0}
model: {name: ../up, image_size: 0, target_modules: [], mean: [0.5], std: [0, 1, 1], max_length: 1, head: null,
  family: diffusion, dtype: int8, prompts: [a photo], text_weights: random, quantization: nf4, interpolation: lanczos,
  attn_implementation: hub/kernel, text_args: {hidden_size: 24}}
task: {name: ../up, validation_share: 1.0, label_noise: 1.0, text_columns: [a, b, c], modality: sound, metrics: [bleu],
  train_samples: 0, test_samples: 0, data_files: {training: rows.parquet}, kind: regression, members: [sst2],
  mixing: even, max_new_tokens: 0, answer: word, split_seed: -1, cache_bytes: -1}
trainer: {learning_rate: 0.0, epochs: .inf, mixed_precision: fp8, device: tpu, warmup_ratio: 1.0,
  schedule: wavy, batch_size: 0, num_workers: -1, strategy: pipeline, report_to: [comet], machine_rank: 1,
  weight_decay: -1, max_grad_norm: 0, head_learning_rate: 0.0, loraplus_ratio: .inf, start: spoon}
""")


@pytest.mark.parametrize(
    ("group", "key", "value"), [(group, *each) for group, keys in OUT_OF_RANGE.items() for each in keys.items()]
)
def test_a_value_out_of_range_is_refused_by_its_key(group: str, key: str, value: object) -> None:
    kinds = {field.name: field.default_factory for field in dataclasses.fields(Config)}
    with refusal(f"{group}.{key}="):
        kinds[group](**{key: value})


CAUSAL = ("model=tiny_llama", "task=arc_easy")


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["seed=-1"], ["seed=-1"]),
        (["calibration.file=/nowhere/calibration.json"], ["calibration.file"]),
        (["data_dir=/nowhere"], ["data_dir"]),
        (["task.data_files={train: /nowhere.parquet, test: /nowhere.parquet}"], ["task.data_files.train"]),
        (["task.data_files=/nowhere"], ["task.data_files"]),
        *(([f"{key}="], [f"{key}=: "]) for key in ("task.data_files", "results_dir", "data_dir")),
        (["method.name=foo"], ["method.name"]),
        (["method=lokr", "method.name=../elsewhere"], ["method.name"]),
        (["importance.name=foo"], ["importance.name"]),
        (["model.family=clip"], ["model.text_weights"]),
        ([*CAUSAL, "model.quantization=fp4"], ["model.quantization=fp4"]),
        *(([f"calibration.budget={each}"], [f"calibration.budget={each}"]) for each in ("nan", "inf", "0.0")),
        (["model=tiny_clip", "model.prompts=[]"], ["model.prompts"]),
        (["model=tiny_clip", "model.text_weights=."], ["model.text_args="]),
        (["+trainer.lr=1"], ["trainer.lr"]),
        (["+learning_rate=1"], ["learning_rate"]),
        *(([f"trainer.{key}={10**30}"], [f"trainer.{key}=1"]) for key in ("batch_size", "epochs", "max_steps")),
        (["trainer.optimizer=adamw_torch_npu_fused"], ["trainer.optimizer=adamw_torch_npu_fused"]),
        (["trainer.optimizer=grokadamw", "trainer.args={optim_args: 'lamb=two'}"], ["trainer.optimizer=grokadamw"]),
        (["trainer.schedule=cosine_with_min_lr"], ["trainer.schedule=cosine_with_min_lr", "lr_scheduler_kwargs"]),
        (
            ["trainer.schedule=linear", "trainer.args={lr_scheduler_kwargs: {least: 1}}"],
            ["trainer.schedule=linear", "least"],
        ),
        (["trainer.args={neftune_noise_alpha: 5}"], ["trainer.args.neftune_noise_alpha=5"]),  # images have no tokens
        ([*CAUSAL, "trainer.args={neftune_noise_alpha: nan}"], ["trainer.args.neftune_noise_alpha=nan"]),
        (["++model.model_args.sizes=[1,{most: -inf}]"], ["model.model_args.sizes.most=-inf"]),
        (
            ["method=peft", "method.peft_type=LORA", "method.peft={lora_alpha: inf}"],
            ["method.peft.lora_alpha=inf"],
        ),
        (["trainer.num_processes=3"], ["trainer.batch_size=16", "trainer.num_processes=3"]),
        (["calibration=budget", "calibration.repair=true"], ["calibration.repair", "calibration.budget=0.13"]),
        (["calibration.file={file}", "calibration.reliability=true"], ["calibration.reliability", "calibration.file"]),
        (["mask=element", "method=targeted"], ["mask.granularity=element"]),
        (["method=entries", "mask.granularity=rows_columns"], ["mask.granularity=rows_columns"]),
        (["method=entries", "calibration.threshold=0.5"], ["calibration.threshold=0.5", "method=entries"]),
        (["method=entries", "calibration.repair=true"], ["calibration.repair"]),
        (["method=ticket", "importance=svd"], ["importance.name=svd"]),
        (["method=ticket", "mask=frozen"], ["mask.columns=frozen"]),
        (["calibration=fixed", "calibration.sparsity=1"], ["calibration.sparsity=1"]),
        (["calibration=fixed", "calibration.sparsity=true"], ["calibration.sparsity=true"]),
        (["calibration=fixed", "calibration.sparsity=even"], ["calibration.sparsity=even"]),
        (["calibration.sparsity={}"], ["calibration.sparsity={}"]),
        (["calibration.sparsity={a: {rows: 0.3}}"], ["calibration.sparsity.a="]),
        (["calibration.sparsity={a: {rows: 0.3, columns: x}}"], ["calibration.sparsity.a.columns=x"]),
        (
            ["calibration.sparsity=0.5", "calibration.budget=0.1"],
            ["calibration.budget=0.1", "calibration.sparsity=0.5"],
        ),
        (["calibration=fixed", "calibration.threshold=0.8"], ["calibration.threshold=0.8", "calibration.sparsity"]),
        (["calibration=fixed", "calibration.file={file}"], ["calibration.file", "calibration.sparsity"]),
        (["calibration=fixed", "calibration.repair=true"], ["calibration.repair"]),
        (["calibration=fixed", "calibration.reliability=true"], ["calibration.reliability", "calibration.sparsity"]),
        (
            ["calibration=fixed", "calibration.sparsity=0.8", "calibration.budget=null", "calibration.kept=1e6"],
            ["calibration.kept", "calibration.sparsity"],
        ),
        (["calibration.sparsity=0.5", "method=entries"], ["calibration.sparsity=0.5", "method=entries"]),
        (["importance=adapter", "importance.steps=1"], ["importance.steps=1", "importance=adapter"]),
        (["method=entries", "calibration.reliability=true"], ["calibration.reliability", "method=entries"]),
        (["mask=frozen", "trainer.loraplus_ratio=4"], ["trainer.loraplus_ratio=4", "mask.columns=frozen"]),
        ([*CAUSAL, "trainer.head_learning_rate=1e-2"], ["trainer.head_learning_rate=0.01", "model=tiny_llama"]),
        (["trainer.packing=true"], ["trainer.packing=true: ", "model.family"]),
        (["task.answer=number"], ["task.answer=number: "]),  # digits has classes
        (["calibration.threshold=null"], ["calibration.threshold: "]),
        (["calibration=threshold,budget"], ["calibration=threshold,budget: "]),
        (["model.colour=red"], ["model.colour: "]),
        (["calibration=0.13"], ["calibration=0.13: ", "threshold"]),
        (["trainer.epochs=abc"], ["trainer.epochs=abc: "]),
        (["overwrite=maybe"], ["overwrite=maybe: "]),
        (["task.data_files=["], ["'task.data_files="]),
        (["experiment=nope"], ["experiment=nope: "]),
        (["method.rank=many"], ["method.rank=many: "]),
        (["calibration.threshold"], ["'calibration.threshold': "]),
        (["~trainer.max_steps"], ["~trainer.max_steps: ", "trainer.max_steps=VALUE"]),
        (["~trainer.max_stepz"], ["trainer.max_stepz: ", "trainer.max_steps?"]),
        (["results_dir=${oc.env:HOME"], ["results_dir: ", "${oc.env:HOME: ", "braces"]),
        (["results_dir=${nowhere}"], ["results_dir: ", "nowhere"]),
        (["model.weights=./nope"], ["model.weights=./nope: ", "folder"]),
        (["model=vit_b16", "model.weights=a/b/c"], ["model.weights=a/b/c: ", "folder"]),
        (["task.name=false"], ["task.name=false: ", "quoted"]),
        (["task=text_generation", "task.stop=[yes,true]"], ["task.stop=true: ", "quoted"]),
        (["=3"], ["'=3': "]),
        ([""], ["'': "]),
    ],
)
def test_a_run_that_cannot_be_is_refused_by_its_keys_before_it_starts(overrides: list[str], names: list[str]) -> None:
    with refusal(names[0], *names):
        composed(*(each.format(file=__file__) if "file}" in each else each for each in overrides))


def test_a_schedule_with_its_arguments_and_a_record_of_an_optimizer_that_is_missing_here_are_taken() -> None:
    needs = "trainer.args={lr_scheduler_kwargs: {num_decay_steps: 2}}"
    chosen = composed("trainer.schedule=warmup_stable_decay", "trainer.optimizer=adafactor", needs)
    stored = versions.plain(chosen)
    stored["trainer"]["optimizer"] = "adamw_torch_npu_fused"
    assert versions.load(stored).trainer.optimizer == "adamw_torch_npu_fused"


@pytest.mark.parametrize("text", ["", "study:", "seed: 1"])
def test_an_experiment_that_lists_no_runs_has_no_study(tmp_path: Path, monkeypatch, text: str) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "own.yaml").write_text(text)
    monkeypatch.setattr(study_commands, "conf_dir", lambda: tmp_path)
    assert study_commands.chosen_from(["own seed=1"]) == "own"
    assert list(study_commands.commands("own", tmp_path)) == []


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("method.ran", "method.rank"),
        ("trainer.lr", "trainer.learning_rate"),  # as other tools call it
        ("trainer.rank", "method.rank"),
        ("learning_rate", "trainer.learning_rate"),
        ("dataset", "task"),
        ("bf16", "trainer.mixed_precision=bf16"),
        ("mehtod", "method"),
        ("trainer.seed", "seed"),
        *((key, None) for key in ("model.colour", "colour", "trainer.name")),
    ],
)
def test_the_key_that_was_meant_is_named_and_nothing_is_guessed(key: str, meant: str | None) -> None:
    assert f"did you mean {meant}?" in keys.no_such_key(key) if meant else "mean" not in keys.no_such_key(key)
    assert "mean" not in keys.no_such_key(f"hydra.{key}")
    assert "{train: FILE" in keys.no_such_key("task.data_files.test")
    assert {each.partition("=")[0] for each in keys._ELSEWHERE} <= {*schema.defaults(), *schema.GROUPS}
    names = [name for names in keys._ELSEWHERE.values() for name in names.split()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["--lr", "1e-4"], "trainer.learning_rate=1e-4"),
        (["--lora-r=8"], "method.rank=8"),
        (["--bf16"], "trainer.mixed_precision=bf16"),
        (["--seed", "seed=1"], "seed=VALUE"),
        (["--method", "lora"], "method=lora"),
        (["--config", "my.yaml"], "my.yaml"),
        (["--colour", "red"], ""),
    ],
)
def test_an_option_of_other_tools_is_refused_with_the_setting_that_it_is(arguments: list[str], meant: str) -> None:
    with refusal(f"{arguments[0].partition('=')[0]}: ", meant):
        compose.compose("train", arguments, lambda config: 0)


@pytest.mark.parametrize(("wrong", "meant"), [("method=lroa", "mean lora?"), ("task=cifar", "mean cifar10?")])
def test_a_file_of_a_group_that_was_meant_is_named(wrong: str, meant: str) -> None:
    with refusal(wrong, meant):
        composed(wrong)


def test_a_run_is_resolved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    configs, resolve = [], resolving.resolve
    monkeypatch.setattr(compose, "resolve", lambda node: configs.append(resolve(node)) or configs[-1])
    assert compose.compose("info", ["-m", "model=tiny_vit", "seed=1,2"], lambda each: each.seed - 1) == 1
    assert [each.seed for each in configs] == [1, 2]


def test_settings_come_back_as_they_were_from_plain_data_even_without_their_files(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label")
    chosen = composed("model=tiny_bert", "task=mixture", "task.members=[sst2]", f"task.data_files={{sst2: {rows}}}")
    rows.unlink()
    assert versions.load(versions.plain(chosen)) == chosen
    older = versions.plain(chosen)
    del older["calibration"]["memory"], older["keep_records"]
    assert versions.load(older) == chosen


def test_a_size_that_changes_nothing_is_said(tmp_path: Path) -> None:
    (said,) = composed(
        "method=lora", "calibration=fixed", "calibration.budget=null", "calibration.sparsity=0.9"
    ).warnings
    assert said.startswith("calibration.sparsity=0.9 ")
    (tmp_path / "c.json").write_text("{}")
    for key in ("calibration.budget", "calibration.kept"):
        found = composed(f"calibration.file={tmp_path / 'c.json'}", f"{key}=2e6", "calibration.shrink=0.5")
        assert [each.split("=")[0] for each in found.warnings] == [key]
    for beside in (["calibration=budget", "calibration.threshold=0.8"], ["trainer.epochs=0.5", "trainer.max_steps=1"]):
        (said,) = composed("model=tiny_vit", *beside).warnings
        assert said.split("=")[0] == beside[-1].split("=")[0].replace("max_steps", "epochs")
    with refusal("hydra.sweeper.params.seed=0"):
        compose.refuse(["-m", "hydra.sweeper.params.seed=0"])


def test_a_budget_that_a_method_does_not_spend_is_said() -> None:
    spent = {"lora": True, "lokr": True, "lorafa": True, "dora": True, "dense": False, "adalora": False}
    for method, is_spent in spent.items():
        found = composed(f"method={method}", "calibration.budget=0.2").warnings
        assert [each.startswith("calibration.budget=0.2 ") for each in found] == [True] * (not is_spent)
        assert composed(f"method={method}", "calibration=threshold").warnings == []
        said = composed(f"method={method}", "calibration=fixed").warnings  # which has no budget
        unsaid = method in ("lorafa", "dense", "adalora")
        assert [each.split()[0] for each in said] == ["calibration.sparsity=uniform"] * (not unsaid)
    (warning,) = composed("method=dense", "calibration.budget=0.2").warnings
    advice = warning.partition("; ")[2].removesuffix(" has that size")
    assert composed(*shlex.split(advice), "calibration.budget=0.2").warnings == []


@pytest.mark.parametrize(("task", "family"), [("sst2", "encoder"), ("stsb", "encoder"), ("piqa", "causal")])
def test_a_language_model_of_a_name_tells_labels_where_the_task_has_them(task: str, family: str) -> None:
    model = composed("model=smollm2_135m", f"task={task}").model
    chosen = {"family": model.family, "architecture": model.architecture, "model_args": model.model_args}
    counted = skeleton.skeleton(**chosen, outputs=2)
    assert (model.family, model.head, model.trains_whole) == (
        family,
        *(("score", True) if family == "encoder" else (None, False)),
    )
    assert counted.targets(model.target_modules, model.head)


def test_entries_are_single_ones_and_spend_the_paper_s_budget_unless_another_is_given() -> None:
    chosen = composed("method=entries")
    assert (chosen.mask.granularity, chosen.calibration.budget) == ("element", 0.13)
    assert identity.run_id(chosen) == identity.run_id(composed("method=entries", "calibration=budget"))
    assert composed("calibration.budget=0.05", "method=entries", "calibration=threshold").calibration.budget == 0.05
    assert composed("method=partial").calibration.budget is None


def test_the_ratio_of_loraplus_is_of_methods_that_train_a_product() -> None:
    assert composed("method=dora", "trainer.loraplus_ratio=4").trainer.loraplus_ratio == 4
    assert composed("method=full", "trainer.head_learning_rate=1e-2").trainer.head_learning_rate == 1e-2
    with refusal("trainer.loraplus_ratio=4.0: ", "method=full"):
        composed("method=full", "trainer.loraplus_ratio=4")


def test_a_share_that_is_fixed_has_one_id_however_it_is_written_and_patterns_count_in_their_order() -> None:
    assert composed("calibration=fixed").calibration.budget == 0.13
    ids = [
        identity.run_id(composed("calibration=fixed", f"calibration.sparsity={share}")) for share in ("0", "0.0", "0.5")
    ]
    assert ids[0] == ids[1] != ids[2]
    patterns = ("{.*qkv: 0.9, .*: 0.5}", "{.*: 0.5, .*qkv: 0.9}")
    assert len({identity.run_id(composed(f"calibration.sparsity={each}")) for each in patterns}) == 2
    for method, other in (("entries", "quick"), ("ticket", "threshold")):  # which never calibrate
        ids = {identity.run_id(composed(f"method={method}", f"calibration={name}")) for name in ("fixed", other)}
        assert len(ids) == 1
    chosen = composed("calibration.sparsity={attn.qkv: {rows: 0.5, columns: 0}, .*: 0.9}")
    assert versions.load(versions.plain(chosen)) == chosen


def test_what_the_default_files_set_are_the_defaults_of_the_schema() -> None:
    primary = yaml.safe_load((schema.conf_dir() / "config.yaml").read_text())
    assert primary.keys() == {"defaults", "hydra"}
    taken = [pair for entry in primary["defaults"] if isinstance(entry, dict) for pair in entry.items()]
    for group, name in taken:
        name = "threshold" if group == "calibration" else name  # a command takes less time than the paper's definition
        if group in schema.SECTIONS and group not in ("model", "task"):  # an example of each
            shown = yaml.safe_load((schema.conf_dir() / group / f"{name}.yaml").read_text())
            usual = dataclasses.asdict(schema.SECTIONS[group]())
            assert shown == {key: usual[key] for key in shown}


@pytest.mark.parametrize(
    ("overrides", "search", "max_samples", "budget"),
    [
        ([], "gradient", 64, None),
        (["calibration.threshold=0.8"], "gradient", 64, None),
        (["calibration=budget"], "gradient", 64, 0.13),
        (["calibration=threshold"], "scan", None, None),
        (["calibration=budget", "calibration.search=bisect", "calibration.max_samples=null"], "bisect", None, 0.13),
        (["preset=paper"], "scan", None, None),
        (["preset=paper", "calibration=budget"], "scan", None, 0.13),
        (["preset=cpu"], "bisect", None, None),
        (["preset=cpu", "experiment=decided"], "bisect", 160, 0.13),
    ],
)
def test_gradients_are_the_default_and_the_scan_is_named(overrides, search, max_samples, budget) -> None:
    found = composed("task=digits", *overrides).calibration
    assert (found.search, found.max_samples, found.budget) == (search, max_samples, budget)


def test_a_mask_that_is_chosen_goes_before_the_one_that_a_method_would_choose() -> None:
    own = composed("method=ticket").mask
    assert (own.fan_in, own.column_exponent) == ("dense", 0.5)
    chosen = composed("method=ticket", "mask=rows_columns").mask
    assert (chosen.fan_in, chosen.column_exponent) == ("kept", 0.0)


def test_every_group_file_composes() -> None:
    folders = [each for each in schema.conf_dir().iterdir() if each.is_dir()]
    groups = {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}
    together = [("task", "model", "method", "trainer"), ("importance", "mask", "calibration")]  # any goes with any
    assert groups.keys() == {*together[0], *together[1], "experiment", "preset"}
    functions = set()
    for some in together:
        for number in range(max(len(groups[group]) for group in some)):
            choice = {group: groups[group][number % len(groups[group])] for group in some}
            needed = ["task.members=[sst2,mrpc]"] if choice.get("task") == "mixture" else []
            needed += ["method.peft_type=LOKR"] if choice.get("method") == "peft" else []
            found = composed(*(f"{group}={name}" for group, name in choice.items()), *needed)
            functions.add(found.method.function)
            other = {"shira": "random_weights", "peft": "peft_lokr"}  # what the file calls it
            choice = {group: other.get(name, name) for group, name in choice.items()}
            assert {group: getattr(getattr(found, group), "name", name) for group, name in choice.items()} == choice
    assert functions == methods.METHODS.keys()


def test_what_a_measure_takes_is_in_the_schema_with_its_own_defaults() -> None:
    shared = {"weight", "module", "model", "modules", "batches", "loss", "seed", "rank", "alpha"}
    for name, measure in (importance.MEASURES | importance.NEEDS_DATA).items():
        taken = {key: each.default for key, each in inspect.signature(measure).parameters.items() if key not in shared}
        chosen = composed(f"importance={name}").importance
        assert {key: getattr(chosen, key) for key in taken} == taken


# What a command line may say without a second pair of quotes


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("task.data_files=a (1).csv", "a (1).csv"),
        ("task.data_files=b, [c]", "b, [c]"),  # which is there
        ("task.data_files=2024", "2024"),
        ("task.data_files={train: a (1).csv, test: 'b, [c]'}", {"train": "a (1).csv", "test": "b, [c]"}),
        ("task.data_files={train: a.csv}", {"train": "a.csv"}),
        ('results_dir=jörg\'s \\ "results" = #1', 'jörg\'s \\ "results" = #1'),
        ("results_dir='quoted (1)'", "quoted (1)"),
        ("model.target_modules=all-linear", ["all-linear"]),
        ("model.target_modules=qkv,proj", ["qkv", "proj"]),
        ("model.target_modules=[qkv,proj]", ["qkv", "proj"]),
        ("task.metrics=accuracy", ["accuracy"]),
        ("task.text_columns=größe", ["größe"]),
        ("trainer.report_to=[]", []),
    ],
)
def test_an_argument_is_what_it_looks_like(argument: str, value: object, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.csv", "a (1).csv", "b, [c]", "2024", "accuracy"):
        (tmp_path / name).touch()
    key = argument.partition("=")[0]
    found = versions.plain(composed(argument))
    assert functools.reduce(lambda group, name: group[name], key.split("."), found) == value


def test_several_values_are_runs_where_these_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b").touch()
    swept = compose.plan(["-m", "model.target_modules=qkv,[qkv,proj]", "results_dir=a,b"])
    found = [(each.model.target_modules, each.results_dir) for _, each in swept.runs]
    assert found == [(names, place) for names in (["qkv"], ["qkv", "proj"]) for place in "ab"]


@pytest.mark.parametrize("argument", ["results_dir=[b", "results_dir={a: b (1)", "results_dir='a", "results_dir=a,b"])
def test_what_is_none_is_refused_with_the_words_that_make_it_a_text(argument: str) -> None:
    with pytest.raises(PartialLoraError) as refused:
        composed(argument)
    as_text = shlex.split(str(refused.value))[-1]
    assert composed(as_text).results_dir == argument.partition("=")[2]


# Paths and presets


def test_a_path_below_the_home_is_found_there_by_every_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    accelerate = "distributed_type: 'NO'"
    for name, text in {"rows.csv": "text,label", "c.json": "{}", "a.yaml": accelerate, "rates.json": "{}"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / "train.parquet").touch()
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.json").write_text('{"architecture": "vit_base_patch16_clip_224"}')
    keys = {
        "results_dir": "~/results",
        "data_dir": "~",
        "calibration.file": "~/c.json",
        "trainer.accelerate_config": "~/a.yaml",
        "model.weights": "~/weights",
        "model.text_weights": "~/weights",
        "task.data_files": "~/rows.csv",
    }
    found = files.flatten(
        versions.plain(composed("model=clip_vit_b16", *(f"{key}={path}" for key, path in keys.items())))
    )
    assert {key: found[key] for key in keys} == {key: path.replace("~", str(tmp_path)) for key, path in keys.items()}
    by_split = composed("task=text_table", "model=tiny_bert", "task.data_files={train: ~/rows.csv}")
    assert by_split.task.data_files == {"train": str(tmp_path / "rows.csv")}
    members = "{mine: {modality: text, path: files, data_files: ~/rows.csv}, sst2: {modality: text, path: sst2}}"
    mixture = composed("data_dir=~", "model=tiny_bert", "task=mixture", f"task.members={members}").task.members
    assert mixture["mine"].data_files == str(tmp_path / "rows.csv")
    assert mixture["sst2"].data_files == {"train": str(tmp_path / "sst2" / "train.parquet")}
    swept = compose.plan(["-m", "model=tiny_vit", "seed=0,1", "results_dir=~/results"])
    assert swept.sweep_dir == tmp_path / "results" / "sweep"


@pytest.mark.parametrize("empty", ["method=glob(zzz*)", "seed=range(3,0)"])
def test_a_sweep_over_nothing_is_refused_by_its_argument(empty: str) -> None:
    with refusal(re.escape(empty)):
        compose.plan(["-m", "model=tiny_vit", "trainer.epochs=1,2", empty])


def test_a_preset_is_recorded_and_no_setting() -> None:
    chosen = composed("preset=paper", "task=digits")
    assert directory.new(versions.plain(chosen))["preset"] == "paper"
    assert identity.run_id(chosen) == identity.run_id(dataclasses.replace(chosen, preset=None))


# A folder of many tasks' files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("sst2/train", "sst2/test", "cola/train", "cola/validation", "mine/train"):
        file = tmp_path / "data" / f"{name}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"rows of {name}")
    return tmp_path / "data"


def in_folder(folder: Path, name: str, *splits: str) -> dict[str, str]:
    return {split: str(folder / name / f"{split}.parquet") for split in splits}


def test_tasks_and_members_take_the_splits_that_are_there_unless_they_name_files_of_their_own(folder: Path) -> None:
    def files(*overrides: str):
        return composed(f"data_dir={folder}", *overrides).task

    mine = in_folder(folder, "mine", "train")
    assert files("task=sst2").data_files == in_folder(folder, "sst2", "train", "test")
    assert files("task=cola").data_files == in_folder(folder, "cola", "train", "validation")
    assert files("task=sst2", f"task.data_files={mine['train']}").data_files == mine["train"]
    assert files("task=digits").data_files is None  # which comes out of a package
    mixture = files("task=mixture", "task.members=[sst2,cola]", f"task.data_files={written({'cola': mine})}")
    assert [mixture.members[name].data_files for name in ("sst2", "cola")] == [
        in_folder(folder, "sst2", "train", "test"),
        mine,
    ]


def test_the_id_is_that_of_the_same_files_named_one_by_one_and_goes_by_their_content(folder: Path) -> None:
    by_folder = identity.run_id(composed(f"data_dir={folder}", "task=sst2"))
    files = in_folder(folder, "sst2", "train", "test")
    assert by_folder == identity.run_id(composed("task=sst2", override(files)))
    (folder / "sst2" / "train.parquet").write_text("edited rows")
    assert by_folder != identity.run_id(composed(f"data_dir={folder}", "task=sst2"))


@pytest.mark.parametrize("overrides", [["task=rte"], ["task=mixture", "task.members=[sst2,rte]"]])
def test_a_task_without_training_rows_there_is_refused_by_name(folder: Path, overrides: list[str]) -> None:
    with refusal("data_dir=.*/data: .*/data/rte/train.parquet"):
        composed(f"data_dir={folder}", *overrides)


# A file in place of config.yaml

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "configs").glob("*.yaml"))


def settings_file(folder: Path, text: str) -> str:
    (folder / "own.yaml").write_text(text)
    return str(folder / "own.yaml")


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_composes_to_what_it_says(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "reviews.csv", "chats.jsonl", "held_out.jsonl"):
        (tmp_path / name).touch()
    runs = [found for _, found in compose.plan([str(file)]).runs]
    assert len(runs) == (18 if file.stem == "sweep" else 1)
    content, found = OmegaConf.to_container(OmegaConf.load(file)), files.flatten(versions.plain(runs[0]))
    own = {key: value for key, value in content.items() if key in found and key != "task.data_files"}
    assert {key: found[key] for key in own} == own
    names = {group: content[group] for group in ("model", "task", "method") if group in content}
    assert found["model.name"] == names["model"]
    assert found["method.name"] == names.get("method", "lora" if file.stem == "sweep" else "partial")
    assert found["task.name"] == content.get("task.name", names["task"])


def test_the_command_line_goes_before_a_file_and_what_the_file_sets_before_its_groups(tmp_path: Path) -> None:
    own = settings_file(tmp_path, "model: tiny_bert\ntask: sst2\ntask.metrics: [f1]\ntrainer: {epochs: 2}\nseed: 3\n")
    found = composed(own, "trainer.epochs=4", "method=lora")
    assert (found.model.name, found.task.metrics, found.seed) == ("tiny_bert", ["f1"], 3)
    assert (found.trainer.epochs, found.method.name) == (4, "lora")
    assert composed(own, "model=minilm_l6").model.name == "minilm_l6"
    assert composed(own).mask == composed().mask  # of a group that the file does not name
    described = dataclasses.asdict(composed("model=tiny_vit").model) | {"name": "mine"}
    assert (
        composed(settings_file(tmp_path, yaml.safe_dump({"model": described}))).model.model_args
        == described["model_args"]
    )  # and nothing of the usual model's
    for flag_first in (True, False):
        words = ["-m"] * flag_first + [settings_file(tmp_path, "model: tiny_vit\n")] + ["-m"] * (not flag_first)
        swept = compose.plan([*words, "seed=0,1"])
        assert [(found.model.name, found.seed) for _, found in swept.runs] == [("tiny_vit", 0), ("tiny_vit", 1)]
    words = ["seed=0,1", "-m", settings_file(tmp_path, "trainer.epocs: 3\n")]
    with refusal(f"{tmp_path}/own.yaml: trainer.epocs"), compose.in_one_line(words):
        compose.plan(words)
    for empty in ("hydra:", "hydra: {sweeper: }", "hydra: {sweeper: {params: }}"):  # its lines are commented out
        with refusal(f"{tmp_path}/own.yaml: hydra"):
            compose.plan([settings_file(tmp_path, f"{empty}\n")])
    params = "{model.target_modules: [[qkv], [qkv, proj]], method: 'lora,full', seed: [7]}"
    swept = compose.plan([settings_file(tmp_path, f"hydra.mode: MULTIRUN\nhydra.sweeper.params: {params}\n")])
    found = [(each.model.target_modules, each.method.name, each.seed) for _, each in swept.runs]
    assert found == [(names, method, 7) for names in (["qkv"], ["qkv", "proj"]) for method in ("lora", "full")]
    params = "{results_dir: ['a,b', c], seed: ['range(0,2)']}"  # a text in a list is one value, or a function of some
    swept = compose.plan([settings_file(tmp_path, f"hydra.mode: MULTIRUN\nhydra.sweeper.params: {params}\n")])
    found = [(each.results_dir, each.seed) for _, each in swept.runs]
    assert found == [(place, seed) for place in ("a,b", "c") for seed in (0, 1)]


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=tiny_vit", "method=entries", "mask.seed=4", "preset=cpu", "seed=2"],
        ["model=tiny_bert", "task=mixture", "task.members=[sst2,mrpc]", "method=lora", "task.mixing=equal"],
        ["model=tiny_llama", "task=arc_easy", "method.rank=auto", "calibration=fixed", "overwrite=true"],
    ],
)
def test_the_settings_of_a_run_make_it_again_and_another_group_stands_in(tmp_path: Path, overrides: list[str]) -> None:
    first = composed(*overrides)
    own = settings_file(tmp_path, versions.as_yaml(versions.plain(first)))
    assert composed(own) == dataclasses.replace(first, overwrite=False)  # a finished run is not lost by it
    assert composed(own, "model=tiny_vit", "task=digits").task == composed("task=digits").task
    kept = {key: getattr(first.method, key) for key in ("rank", "alpha", "dropout")}
    assert composed(own, "method=uniform").method == dataclasses.replace(composed("method=uniform").method, **kept)


def test_another_mask_stands_in_for_a_runs_own_but_for_its_seed(tmp_path: Path) -> None:
    for own in ("rows_columns", "frozen"):
        file = settings_file(tmp_path, versions.as_yaml(versions.plain(composed(f"mask={own}", "mask.seed=4"))))
        for name in ("element", "rows_columns"):
            assert composed(file, f"mask={name}").mask == composed(f"mask={name}", "mask.seed=4").mask


def test_the_argument_that_has_several_values_is_the_one_that_is_named() -> None:
    with refusal("seed=0,1: "):
        composed("model=tiny_bert", "task=mixture", "task.members=[sst2,mrpc]", "seed=0,1")
    with refusal("model="):
        composed("model=")


def test_an_argument_that_the_models_file_does_not_name_can_be_given(tmp_path: Path) -> None:
    named = composed("model=vit_s14").model.model_args
    assert "depth" not in named
    for given in ("model.model_args.depth=6", "model.model_args={depth: 6}"):
        assert composed("model=vit_s14", given).model.model_args == named | {"depth": 6}
    swept = compose.plan(["-m", "model=tiny_vit", "model.model_args.depth=1,2"])
    names = [swept.name(overrides) for overrides, _ in swept.runs]
    assert names == ["model.model_args.depth=1", "model.model_args.depth=2"]


@pytest.mark.parametrize(
    ("overrides", "chosen"),
    [
        (["calibration=quick"], "calibration=threshold"),
        (["importance=imp"], "importance=svd"),
        (["method.rank=auto"], "method.rank=8"),
        (["method=lokr"], "method=oft"),
        (["mask.fan_in=dense", "mask.row_exponent=0"], "method=uniform"),
    ],
)
def test_a_group_beside_the_settings_of_a_run_is_as_it_is_by_itself(tmp_path: Path, overrides, chosen) -> None:
    own = settings_file(tmp_path, versions.as_yaml(versions.plain(composed("model=tiny_vit", *overrides))))
    assert composed(own, chosen) == composed("model=tiny_vit", chosen)


def test_masks_follow_the_method_that_stands_in_and_a_learning_rate_of_ones_own_stays(tmp_path: Path) -> None:
    first = composed("model=tiny_vit", "mask.seed=4", "trainer.learning_rate=3e-4", "method.rank=8")
    found = composed(settings_file(tmp_path, versions.as_yaml(versions.plain(first))), "method=entries")
    assert found.mask == composed("method=entries", "mask.seed=4").mask
    assert (found.trainer.learning_rate, found.method.rank) == (3e-4, 8)


@pytest.mark.parametrize(
    ("text", "begins"),
    [
        ("", ""),
        ("[model", ""),
        ("- model", ""),
        ("defaults: [config]", "defaults"),
        ("modl: tiny_vit", "modl: "),
        ("trainer.lr: 1", "trainer.lr: .*trainer.learning_rate"),
        ("trainer: {epochs: many}", "trainer.epochs=many: "),
        ("model: [tiny_vit]", "model="),
        ("model:", "model=null: "),
        ("model: tiny_vit\ntrainer:", "trainer=null: "),
        ("hydra/launcher:", "hydra/launcher=null: "),
        ("seed:", "seed: .*null"),
        ("trainer.epochs: 1\ntrainer: {epochs: 2}", "trainer.epochs: "),
        ("task.data_files.train: a.csv\ntask.data_files: b.csv", "task.data_files: "),
    ],
)
def test_a_wrong_file_is_refused_by_its_name_and_key(tmp_path: Path, text: str, begins: str) -> None:
    with refusal(f".*/own.yaml: {begins}"):
        composed(settings_file(tmp_path, text))


def test_a_text_that_yaml_reads_as_a_truth_value_is_refused_unless_it_is_quoted(tmp_path: Path) -> None:
    for key, word in (("task.name", "no"), ("trainer.mixed_precision", "no"), ("model.name", "on")):
        with refusal(f"{key}={'true' if word == 'on' else 'false'}: ", "quoted"):
            composed(settings_file(tmp_path, f"model: tiny_vit\ntask: digits\n{key}: {word}\n"))
    quoted = "task: digits\ntask.name: 'no'\ntrainer.mixed_precision: 'no'\n"
    assert composed(settings_file(tmp_path, quoted)).task.name == "no"
    with refusal(".*/own.yaml: results_dir: ", "braces"):
        composed(settings_file(tmp_path, "results_dir: ${seed\n"))


def test_of_two_values_of_a_key_the_one_that_does_not_count_is_named(capsys) -> None:
    rates = [f"trainer.learning_rate={rate}" for rate in ("0.1", "0.2", "0.2")]
    assert compose.compose("info", ["model=tiny_vit", *rates], lambda config: 0) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("partial-lora: beware: trainer.learning_rate=0.1 ")


def test_a_file_that_would_not_be_read_is_refused(tmp_path: Path) -> None:
    own = settings_file(tmp_path, "model: tiny_vit")
    for arguments in (["nowhere.yaml"], [own, "nowhere.yaml"]):
        with refusal("nowhere.yaml: "):
            composed(*arguments)
    for option in ("--config-name=mine", "-cn=mine", "--config-path=.", "--experimental-rerun=a.pickle"):
        with refusal(f"{option.partition('=')[0]}: "):
            composed(own, option)
    shutil.copy(own, tmp_path / "config.yaml")
    with refusal(f"'{tmp_path}': ", tmp_path / "config.yaml"):
        composed(str(tmp_path))
    with refusal("'a b=': "):
        composed("a b=")
    with refusal("--config-dir .*: config.yaml "):  # the package's own goes before it
        compose.compose("train", [f"--config-dir={tmp_path}"], lambda config: 0)
    with refusal("--config-dir nowhere: "):
        compose.compose("train", ["--config-dir", "nowhere"], lambda config: 0)


def test_results_among_the_rows_of_a_task_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would become rows of it, and change the ids of its runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    rows = ["model=tiny_vit", "task=image_folder"]
    for rows_at, place in (("photos", "photos/results"), (".", "results"), ("{train: photos}", "photos")):
        with refusal("results_dir="):
            composed(*rows, f"task.data_files={rows_at}", f"results_dir={place}")
    mixture = ["model=tiny_vit", "task=mixture", "task.members=[digits,image_folder]"]
    with refusal("results_dir="):
        composed(*mixture, "task.data_files={image_folder: photos}", "results_dir=photos/results")
    for place in ("results", "photos/.results"):
        assert composed(*rows, "task.data_files=photos", f"results_dir={place}").results_dir == place


@pytest.mark.parametrize(("task", "pixels"), [("signdigits", 56), ("digits", 56), ("image_folder", 98)])
def test_images_of_one_s_own_are_seen_larger_than_those_of_known_sets(task: str, pixels: int, tmp_path: Path) -> None:
    files = [] if task == "digits" else [f"task.data_files={tmp_path}"]
    assert composed(f"task={task}", *files).model.image_size == pixels
