"""The model card of a saved adapter: PEFT's README.md, and how a masked adapter is loaded."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

CARD = "README.md"
TAGS = ("lora", "partial-lora")
HEADING = "## Partial-LoRA"
VERSIONS = "### Framework versions"  # PEFT's last section

USAGE = """{heading}

Fewer numbers were trained than the low-rank factors have, and `partial_lora.json` says which. The factors in this file
are whole, so this is an ordinary LoRA adapter, and PEFT alone loads it:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, {adapter})
```

To train the same entries further, load it with its masks, by the package partial-lora:

```python
from partial_lora import PartialLoraConfig
from peft import PeftModel

config = PartialLoraConfig.from_pretrained({adapter})
model = PeftModel.from_pretrained(base_model, {adapter}, config=config, is_trainable=True)
```
"""


def complete_card(folder: Path) -> None:
    """Add our tags and a section on loading to the card that PEFT has just written for the adapter in ``folder``.

    The card of a named adapter lies in the folder above. What is there already is not added again, and all else in the
    card stays. Where PEFT has written no card (a README.md whose library_name is peft), none is written.
    """
    path, adapter = folder / CARD, '"path/or/hub-id"'
    if not path.is_file():
        path, adapter = folder.parent / CARD, f'"path/or/hub-id", subfolder="{folder.name}"'
    if not path.is_file():
        return
    card = ModelCard.load(path, ignore_metadata_errors=True)
    if card.data.get("library_name") != "peft":
        return
    card.data.tags = sorted({*(card.data.tags or ()), *TAGS})
    lines = card.text.splitlines()
    section = "" if HEADING in lines else USAGE.format(heading=HEADING, adapter=adapter)
    at = lines.index(VERSIONS) if VERSIONS in lines else len(lines)
    card.text = "\n".join([*lines[:at], *section.splitlines(), *[""] * bool(section), *lines[at:]])
    card.save(path)
