"""Logits of an export by the libraries that own its format, in this process."""

from __future__ import annotations

from pathlib import Path

import peft
import timm
import torch
import transformers
from transformers import AutoImageProcessor, AutoTokenizer

from partial_lora.finished import export


def in_this_process(samples: export.Samples, *, model: Path, adapter: Path | None = None, library="transformers"):
    """Compute what a clean interpreter would (`export.logits_elsewhere`), without the seconds of its start."""
    inputs, kind = samples.inputs, samples.pipeline
    with torch.no_grad():
        if library == "timm":
            return timm.create_model(f"local-dir:{model}", pretrained=True).eval()(*inputs.values())
        read = AutoImageProcessor if kind == "image-classification" else AutoTokenizer
        own = {"image_processor" if "image" in kind else "tokenizer": read.from_pretrained(adapter or model)}
        pipeline = transformers.pipeline(kind, model=str(model), **own)
        if adapter:
            adapted = peft.PeftModel.from_pretrained(pipeline.model, str(adapter))
            assert type(adapted.base_model) is peft.LoraModel
        if kind == "text-generation":
            return pipeline.model.eval()(**inputs).logits
        options = {"top_k": len(samples.labels)} if "image" in kind else {"top_k": None, "truncation": True}
        found = [pipeline(each, function_to_apply="none", **options) for each in samples.raw]
    scores = [{each["label"]: each["score"] for each in answer} for answer in found]
    return torch.tensor([[each[label] for label in samples.labels or each] for each in scores])
