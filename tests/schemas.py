"""Files of settings as an editor checks them: by the schema that their first line names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from jsonschema import Draft7Validator

from partial_lora.files import read_yaml


def schema_of(file: Path) -> dict:
    """The schema that a file's first line names."""
    first = file.read_text("utf-8").splitlines()[0]
    named = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)[1]
    assert not Path(named).is_absolute()
    schema = json.loads((file.parent / named).read_text("utf-8"))
    Draft7Validator.check_schema(schema)
    return schema


def faults(content: object, schema: dict, group: str | None = None) -> Iterator[str]:
    """The keys at which an editor marks content, that of a group's file alone where it has a group."""
    part = schema if group is None else {**schema["definitions"][group], "definitions": schema["definitions"]}
    for error in Draft7Validator(part).iter_errors(content):
        yield ".".join(map(str, error.absolute_path)) + ("" if error.validator != "additionalProperties" else ".*")


def marked(file: Path) -> list[str]:
    """The keys at which an editor marks a file."""
    return list(faults(read_yaml(file), schema_of(file)))
