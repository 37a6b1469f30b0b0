"""Keys of the settings: what each means (`partial-lora train --help`), and which one a wrong key was meant to be."""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path

import yaml

from partial_lora.methods import called
from partial_lora.settings.schema import GROUPS, SECTIONS, Config, defaults

COMMON = (
    *("task.data_files", "task.text_columns", "task.label_column", "task.train_samples"),
    *("model.target_modules", "model.image_size", "model.max_length", "model.quantization"),
    *("method.rank", "method.alpha", "calibration.budget", "calibration.threshold", "calibration.sparsity"),
    *("trainer.learning_rate", "trainer.epochs", "trainer.max_steps", "trainer.batch_size"),
    *("trainer.gradient_accumulation_steps", "trainer.mixed_precision", "trainer.num_processes", "trainer.report_to"),
    *("seed", "results_dir", "overwrite"),
)

_HEAD = """\
partial-lora train|calibrate|info [KEY=VALUE …]: one run, from its settings.
partial-lora train FILE.yaml [KEY=VALUE …]: the settings of a file (KEY: VALUE), also of any run's config.yaml.
partial-lora train -m KEY=A,B …: one run for every combination.

A group is chosen by name, a key is set by its full name:
  partial-lora train model=vit_b16 task=cifar10 calibration.threshold=0.8
  partial-lora train -m calibration.threshold=0.7,0.8,0.9 seed=0,1,2
"""
_FOOT = (
    "Values are those of a run with the arguments beside --help. --cfg job prints them as YAML, --hydra-help the flags "
    "of Hydra, -sc install=bash (zsh, fish) a script by which the shell completes all of this. `info --json` prints "
    "one object, `info --memory` counts what a step keeps for its backward pass, too."
)


def page(settings: Mapping, groups: Mapping[str, Sequence[str]], methods: Mapping[str, Path], width: int) -> str:
    """Return the help.

    settings: nested, as composed. groups: the names that each may be set to. methods: the file of each.
    """

    def entry(key: str, value: str, meaning: str = "") -> str:
        return textwrap.fill(f"{key}={value}  {meaning}".rstrip(), width, **_WRAPPED)

    def of_keys(keys: Sequence[str]) -> list[str]:
        nodes = ((key, settings[group] if group else settings) for key in keys for group in [key.rpartition(".")[0]])
        return [entry(key, _in_yaml(node.get(key.rpartition(".")[2])), meaning_of[key]) for key, node in nodes]

    def of_methods(*, masked: bool) -> list[str]:
        headings = {name: heading(file).partition(". ")[0].rstrip(".") for name, file in methods.items()}
        column = max(map(len, headings)) + 2
        wrapped = _WRAPPED | {"subsequent_indent": " " * (column + 2)}
        rows = [f"  {name:{column}}{text}" for name, text in headings.items() if called(name).masked == masked]
        return [textwrap.fill(line, width, **wrapped) for line in rows]

    meaning_of = meanings()
    others = {group: names for group, names in groups.items() if group != "method"}
    lines = [_HEAD, "== Groups (GROUP=NAME)", *(entry(group, ", ".join(names)) for group, names in others.items())]
    lines += ["", "== Methods (method=NAME) that train a part of LoRA's A and B", *of_methods(masked=True)]
    lines += ["", "== Other methods, to compare with", *of_methods(masked=False)]
    lines += ["", "== Keys (KEY=VALUE), the common ones", *of_keys(COMMON)]
    lines += ["", "== All others", *of_keys([key for key in meaning_of if key not in (*COMMON, *groups)])]
    return "\n".join([*lines, "", textwrap.fill(_FOOT, width)])


def heading(file: Path) -> str:
    """Return the comment at the head of a file of conf/, which says what the file is, in one line."""
    lines = takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
    return " ".join(line.lstrip("# ") for line in lines if "@package" not in line)


_WRAPPED = {"subsequent_indent": " " * 6, "break_long_words": False, "break_on_hyphens": False}


def _in_yaml(value: object) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=2**20, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def meanings() -> dict[str, str]:
    """Return what every key means, by its full name, in the schema's order; those of no group come first."""
    ungrouped = {key: text for key, text in _comments(Config) if key not in SECTIONS}
    return ungrouped | {f"{group}.{key}": text for group, kind in SECTIONS.items() for key, text in _comments(kind)}


def _comments(kind: type) -> Iterator[tuple[str, str]]:
    """Yield the name of each field of a dataclass and the comment beside it, else that above it."""
    source = inspect.getsource(kind)
    lines = source.splitlines()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            beside = range(node.lineno, node.end_lineno + 1)
            above = takewhile(lambda line: lines[line - 1].lstrip().startswith("#"), range(node.lineno - 1, 0, -1))
            texts = [comments[line] for line in beside if line in comments]
            yield node.target.id, " ".join(texts or [comments[line] for line in above][::-1])


# --- A key that no group of settings has.

_ELSEWHERE = {  # what other tools call it: PEFT, transformers, TRL, Lightning, timm, torchrun
    "trainer.learning_rate": "lr base_lr learning_rate",
    "trainer.loraplus_ratio": "loraplus_lr_ratio",
    "trainer.epochs": "num_train_epochs num_epochs n_epochs max_epochs",
    "trainer.max_steps": "num_training_steps train_steps",
    "trainer.batch_size": "per_device_train_batch_size train_batch_size bs",
    "trainer.eval_batch_size": "per_device_eval_batch_size",
    "trainer.gradient_accumulation_steps": "grad_accum accumulate_grad_batches",
    "trainer.max_grad_norm": "gradient_clip_val clip_grad",
    "trainer.warmup_ratio": "warmup",
    "trainer.schedule": "lr_scheduler_type lr_scheduler scheduler",
    "trainer.save_steps": "eval_steps save_freq",
    "trainer.mixed_precision": "precision amp",
    "trainer.mixed_precision=bf16": "bf16",
    "trainer.mixed_precision=fp16": "fp16",
    "trainer.num_processes": "gpus devices num_gpus nproc_per_node",
    "trainer.num_machines": "nnodes num_nodes",
    "trainer.num_workers": "dataloader_num_workers workers",
    "trainer.strategy": "fsdp",
    "trainer.accelerate_config": "deepspeed",
    "trainer.report_to": "logger",
    "method.rank": "r lora_r lora_rank",
    "method.alpha": "lora_alpha",
    "method.dropout": "lora_dropout",
    "model": "model_name model_name_or_path pretrained_model_name_or_path base_model",
    "model.target_modules": "lora_target_modules",
    "model.new_modules": "modules_to_save",
    "model.dtype": "torch_dtype",
    "model.quantization=nf4": "load_in_4bit",
    "model.quantization=int8": "load_in_8bit",
    "model.max_length": "max_seq_length max_seq_len cutoff_len",
    "task": "dataset dataset_name",
    "task.data_files": "data data_path dataset_path train_file",
    "task.metrics": "metric metric_for_best_model",
    "results_dir": "output_dir out_dir save_dir output",
    "overwrite": "overwrite_output_dir",
    "seed": "seed random_seed random_state data_seed",
}
_KEYS = {name: key for key, names in _ELSEWHERE.items() for name in names.split()}


def no_such_key(key: str) -> str:
    """Return one line that names the key, the one that was probably meant, and where all are listed."""
    if key.startswith("task.data_files."):  # Hydra adds no split to a task without files, or with one path for all
        return f"{key}: expected all files in one setting, task.data_files={{train: FILE, test: FILE}}"
    about, meant = ("hydra", None) if key.startswith("hydra.") else ("job", _meant(key))
    hint = "" if meant in (None, key) else f"did you mean {meant}? "
    return f"{key}: no such key; {hint}`partial-lora train --cfg {about}` lists the keys there are"


def no_such_option(option: str, value: str | None) -> str:
    """Return one line that names an unknown option, and the setting that was probably meant by it."""
    name = option.strip("-").replace("-", "_")
    if name in ("config", "config_file", "config_name", "config_path", "cn", "cp"):
        return f"{option}: no such option; a file of settings stands alone: {value or 'FILE.yaml'}"
    meant = name if name in GROUPS or name in defaults() else _meant(name)
    if meant and "=" not in meant:
        meant = f"{meant}={value or 'VALUE'}"
    hint = f", such as {meant}" if meant else ""
    return f"{option}: no such option; settings are KEY=VALUE{hint} (`partial-lora train --help` lists them)"


def _meant(key: str) -> str | None:
    """Return the key that another tool's name stands for, the only key of that name, or one of its group like it."""
    group, _, name = key.rpartition(".")
    if name in _KEYS:
        return _KEYS[name]
    names = {key: key.rpartition(".")[2] for key in defaults()}
    matches = [key for key, short in names.items() if short == name]
    if len(matches) == 1:
        return matches[0]
    of_group = {short: key for key, short in names.items() if key.rpartition(".")[0] == group}
    if not group:
        of_group |= {group_name: group_name for group_name in GROUPS}
    close = get_close_matches(name, of_group, n=1, cutoff=0.75)
    return of_group[close[0]] if close else None
