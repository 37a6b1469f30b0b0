"""The model card of a saved adapter: what is known of it, and how it is loaded."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

CARD = "README.md"
TAGS = ("lora", "partial-lora")
HEADING = "## Partial-LoRA"
VERSIONS = "### Framework versions"  # PEFT's last section
UNKNOWN = "[More Information Needed]"  # in PEFT's template, thirty times

USAGE = """{heading}

{size} `partial_lora.json` says which. The factors in this file are whole, so this is an ordinary LoRA adapter, and PEFT
alone loads it:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, {adapter})
```

With the package partial-lora imported, it trains the same entries further:

```python
import partial_lora
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, {adapter}, is_trainable=True)
```
"""


def complete_card(folder: Path, *, size: str) -> None:
    """Say what is known of the adapter in ``folder`` in the card that PEFT has just written.

    That is its base, its size and how it is loaded. PEFT's template, where nothing is filled in, goes; a path of this
    machine is no base for others. The card of a named adapter lies in the folder above. What is there already is not
    added again, and all else in a card stays. Where PEFT has written none (a README.md whose library_name is peft),
    none is written. size: how much trains of how much, in a sentence.
    """
    path, adapter = folder / CARD, '"path/or/hub-id"'
    if not path.is_file():
        path, adapter = folder.parent / CARD, f'"path/or/hub-id", subfolder="{folder.name}"'
    if not path.is_file():
        return
    card = ModelCard.load(path, ignore_metadata_errors=True)
    if card.data.get("library_name") != "peft":
        return
    base = card.data.get("base_model")
    tags = {*(card.data.tags or ()), *TAGS}
    if isinstance(base, str) and Path(base).exists():
        tags -= {f"base_model:adapter:{base}"}
        del card.data.base_model
        base = None
    card.data.tags = sorted(tags)
    lines = card.text.splitlines()
    if UNKNOWN in card.text:
        of = f" for `{base}`" if base else ""
        lines = [f"# A LoRA adapter{of}", "", *lines[lines.index(VERSIONS) if VERSIONS in lines else len(lines) :]]
    section = "" if HEADING in lines else USAGE.format(heading=HEADING, adapter=adapter, size=size)
    at = lines.index(VERSIONS) if VERSIONS in lines else len(lines)
    card.text = "\n".join([*lines[:at], *section.splitlines(), *[""] * bool(section), *lines[at:]])
    card.save(path)
