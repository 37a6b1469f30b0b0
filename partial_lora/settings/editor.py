"""The JSON Schema of a settings file, by which an editor completes keys, explains them and marks what is wrong.

It is made of the dataclasses, their comments and the files of conf/. `SCHEMA` in conf/ is what `partial-lora schema`
writes without further files, so that a checkout and an installed package have it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from partial_lora.files import FORMAT, flatten, write_atomic
from partial_lora.ranges import values_of
from partial_lora.settings.arguments import CHOICES
from partial_lora.settings.keys import heading, meanings
from partial_lora.settings.schema import GROUPS, SECTIONS, Config, conf_dir
from partial_lora.settings.versions import as_yaml

SCHEMA = "schema.json"


def json_schema(usual: Mapping[str, Any], folders: Sequence[Path] = ()) -> dict[str, Any]:
    """Return the JSON Schema of settings files: a command line as YAML, a run's config.yaml, a file of an experiment.

    usual: the settings that a run has by default. folders: of the user's own group files (--config-dir).
    """
    usual, meaning = flatten(usual), meanings()

    def of_key(key: str, schema: Mapping[str, Any]) -> dict[str, Any]:
        default = {"default": usual[key]} if key in usual and not key.startswith(("model.", "task.")) else {}
        return {"description": meaning[key], **default, **schema}

    groups = {
        group: {
            "type": "object",
            "properties": {
                name: of_key(f"{group}.{name}", values.as_json()) for name, values in values_of(kind).items()
            },
            "additionalProperties": False,
        }
        for group, kind in SECTIONS.items()
    }
    members = {"type": ["array", "string", "null"], "items": {"type": "string"}}
    of_member = {"type": "object", "additionalProperties": {"$ref": "#/definitions/task"}}
    groups["task"]["properties"]["members"]["anyOf"] = [members, of_member]
    properties = {group: _of_group(group, folders) for group in GROUPS}
    for name, values in values_of(Config).items():
        if name not in properties:
            properties[name] = of_key(name, values.as_json())
    patterns = {"^hydra[./]": {}}
    for group, kind in SECTIONS.items():
        for name, values in values_of(kind).items():
            properties[f"{group}.{name}"] = {"$ref": f"#/definitions/{group}/properties/{name}"}
            if dict in values.kinds or Any in values.kinds:
                patterns[rf"^{group}\.{name}\."] = {}
    properties |= {name: {"enum": list(choices)} for name, choices in CHOICES.items()}
    # Of Hydra, of a run's config.yaml, and of conf/experiment.
    properties |= {"hydra": {"type": "object"}, "format": {"const": FORMAT}, "defaults": {}, "study": {}}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Settings of partial-lora",
        "type": "object",
        "properties": properties,
        "patternProperties": patterns,
        "additionalProperties": False,
        "definitions": {"reference": {"type": "string", "pattern": r"^\$\{[^{}]+\}$"}, **groups},
    }


def _of_group(group: str, folders: Sequence[Path]) -> dict[str, Any]:
    """Return the schema of a line GROUP: NAME, or GROUP: {KEY: VALUE}."""
    files = [file for place in (conf_dir(), *folders) for file in sorted((place / group).glob("*.yaml"))]
    about = {file.stem: heading(file).partition(". ")[0].rstrip(".") for file in files}
    found: list[dict[str, Any]] = [{"enum": list(about), "enumDescriptions": list(about.values())}]
    if group == "model":  # a folder, or a repository of the hub
        found.append({"type": "string", "pattern": "/"})
    found.append({"$ref": f"#/definitions/{group}"} if group in SECTIONS else {"type": "null"})
    return {"description": f"a file of conf/{group}", "anyOf": found}


def write_settings(file: Path, settings: Mapping, folder: Path) -> None:
    """Write a config.yaml, whose first line tells an editor that its schema lies in a folder, and put it there.

    The line has a relative path: a record does not say where it was made.
    """
    schema, content = folder / SCHEMA, (conf_dir() / SCHEMA).read_bytes()
    if not schema.is_file() or schema.read_bytes() != content:
        write_atomic(schema, content)
    line = f"# yaml-language-server: $schema={Path(os.path.relpath(schema, file.parent)).as_posix()}\n"
    write_atomic(file, line + as_yaml(settings))
