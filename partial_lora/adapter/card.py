"""The model card of a saved adapter: what PEFT writes into README.md, and how a masked adapter is loaded."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

FILE_NAME = "README.md"
TAGS = ("lora", "partial-lora")
HEADING = "## Partial-LoRA"
VERSIONS = "### Framework versions"  # PEFT's last section

USAGE = """{heading}

Of each low-rank factor, only some rows and columns (or single entries) were trained; the others are zero, and
`partial_lora.json` says which. So this is an ordinary LoRA adapter, and PEFT alone loads it:

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
    """Add our tags, and once a section on loading, to the card that PEFT has just written of the adapter in ``folder``.

    PEFT's card of an adapter with a name of its own lies in the folder above. Everything else in the card stays as it
    is. Where there is no card of PEFT's (a README.md whose library_name is peft), none is written.
    """
    for path, adapter in (
        (folder / FILE_NAME, '"path/or/hub-id"'),
        (folder.parent / FILE_NAME, f'"path/or/hub-id", subfolder="{folder.name}"'),
    ):
        if path.is_file():
            card = ModelCard.load(path, ignore_metadata_errors=True)
            if card.data.get("library_name") == "peft":
                _complete(card, adapter)
                card.save(path)
            return


def _complete(card: ModelCard, adapter: str) -> None:
    card.data.tags = sorted({*(card.data.tags or ()), *TAGS})
    lines = card.text.splitlines()
    if HEADING not in lines:
        at = lines.index(VERSIONS) if VERSIONS in lines else len(lines)
        section = USAGE.format(heading=HEADING, adapter=adapter)
        card.text = "\n".join([*lines[:at], *section.splitlines(), "", *lines[at:]])
