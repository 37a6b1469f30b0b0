"""Proof that others can use what was exported: a fresh interpreter, in which this package cannot be imported, does.

It builds the model with timm, transformers and PEFT alone, from files, and computes logits for inputs it is given.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from partial_lora.errors import ProofError

_SCRIPT = """
import json, sys, warnings
sys.modules["partial_lora"] = None  # from here on, importing it fails
import torch
from safetensors.torch import load_file, save_file

job = json.loads(sys.argv[1])
inputs = load_file(job["inputs"])

def transformers_model(folder):
    import transformers
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    names = config.architectures or ["AutoModelForImageClassification"]
    return getattr(transformers, names[0]).from_pretrained(folder)

def timm_model(folder):
    import timm
    return timm.create_model("local-dir:" + folder, pretrained=True)

model = (timm_model if job["library"] == "timm" else transformers_model)(job["model"])
said = []
if job["adapter"]:
    from peft import PeftModel
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(model, job["adapter"])
    assert type(model.base_model).__module__.startswith("peft."), type(model.base_model)
    # What libraries say of their own future has nothing to do with the adapter.
    ignored = (FutureWarning, DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
    said = [str(each.message) for each in caught if not issubclass(each.category, ignored)]
with torch.no_grad():
    output = model.eval()(*inputs.values()) if job["library"] == "timm" else model.eval()(**inputs).logits
assert not [name for name, module in sys.modules.items() if name.startswith("partial_lora") and module]
save_file({"logits": output.contiguous()}, job["logits"])
print(json.dumps(said))
"""


def logits_elsewhere(
    inputs: Mapping[str, Tensor], *, model: Path, adapter: Path | None = None, library: str = "transformers"
) -> Tensor:
    """The logits of the model in a folder for `inputs`, as a clean interpreter computes them.

    Args:
        inputs: tensors by the names of the model's arguments.
        model: a folder as `saved_model` writes it.
        adapter: a folder that plain PEFT is to load on the model; it must do so without a warning.
        library: what builds the model, "transformers" or "timm".

    Raises ProofError where the interpreter cannot do so, with the last line of what it said, and for a warning.
    """
    with tempfile.TemporaryDirectory(prefix="partial-lora-") as place:
        job = {
            "library": library,
            "model": str(Path(model).resolve()),
            "adapter": str(Path(adapter).resolve()) if adapter else None,
            "inputs": str(Path(place) / "inputs.safetensors"),
            "logits": str(Path(place) / "logits.safetensors"),
        }
        save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, job["inputs"])
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT, json.dumps(job)],
            cwd=place,  # where no checkout of this package lies
            env=os.environ | {"HF_HUB_OFFLINE": "1"},  # everything it needs is in the folders
            capture_output=True,
            text=True,
            check=False,
        )
        what = adapter or model
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
            raise ProofError(f"{what}: a clean interpreter cannot use it with {library} alone ({last})")
        said = json.loads(done.stdout.strip().splitlines()[-1])
        if said:
            raise ProofError(f"{what}: plain PEFT warns when it loads it: {' '.join(said[0].split())}")
        return load_file(job["logits"])["logits"]
