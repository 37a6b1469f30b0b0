"""What each format of an export is: how a run's adapter is written in it, and how one proves that it works."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, TimmWrapperForImageClassification
from transformers.utils import logging as transformers_logging

from partial_lora.adapter import PartialLoraConfig, load_compact, write_compact
from partial_lora.errors import PartialLoraError, ProofError
from partial_lora.runs import loading
from partial_lora.runs.finished import FinishedRun
from partial_lora.runs.proof import logits_elsewhere
from partial_lora.runs.saved_model import save_model
from partial_lora.tasks import task

# How far others' logits may be from the run's own, as a share of the largest of them (of 1, where none exceeds that).
# They compute the same in another order: PEFT multiplies with the zeros too, and a merged weight is W + BA rounded once
# to the model's number format. Measured on the real ViT-S at 98 pixels, with logits up to 28: 1.1e-6 (PEFT) and 1.6e-6
# (merged); in bf16, on a random Llama of three layers: 0.014 (PEFT) and 0.04 (merged). fp16 has eight times its digits.
_BOUND = {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.0125}

_SAMPLES = 4  # inputs that logits are compared on
_WORDS = ["the", "film", "was", "long", "but", "every", "scene", "of", "it", "had", "something", "to", "say"]


def base_model(run: FinishedRun, *, whole: bool = False) -> PreTrainedModel:
    """The run's base model as it was before training, but for its head, which the run's adapter has of its own.

    whole: quantised weights in the model's number format again, with the values that they stand for.
    """
    with _quiet():
        model = loading.model_of(run.settings["model"], run.labels())
        return model.dequantize() if whole and _is_quantised(run) else model


def adapted_model(run: FinishedRun, *, whole: bool = False) -> PeftModel:
    """The run's base model with its trained adapter, masked where the run's was, in evaluation mode.

    `whole` as in `base_model`. Raises PartialLoraError where the adapter is broken, lacks a tensor or has one too many.
    """
    folder = run.adapter
    try:
        config = PartialLoraConfig.from_pretrained(str(folder)) if run.is_masked else None
        with _quiet():
            adapted = PeftModel.from_pretrained(base_model(run, whole=whole), str(folder), config=config)
        saved = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise PartialLoraError(f"{folder}: cannot be loaded ({' '.join(str(error).split())[:300]})") from error
    for name in sorted(_tensors(adapted).keys() ^ saved.keys()):
        state = "has no place in the model" if name in saved else "is missing"
        raise PartialLoraError(f"{folder}/adapter_model.safetensors: {name} {state}; train the run again")
    return adapted.eval()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep PEFT from warning that it asks transformers for a name which is on its way out, and bars off the screen.

    transformers warns of a number format that was asked for.
    """
    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _tensors(adapted: PeftModel) -> dict[str, Tensor]:
    return get_peft_model_state_dict(adapted, save_embedding_layers=False)


def _write_peft(run: FinishedRun, folder: Path) -> None:
    adapted_model(run).save_pretrained(folder, save_embedding_layers=False)


def _write_compact(run: FinishedRun, folder: Path) -> None:
    write_compact(adapted_model(run), folder)


def _write_merged(run: FinishedRun, folder: Path) -> None:
    """Quantised weights are merged whole: rounded to four bits again, they would lose most of what was added."""
    merged = adapted_model(run, whole=True).merge_and_unload(safe_merge=True)
    with _quiet():
        save_model(merged, folder, run.settings["model"])
        if run.settings["model"]["family"] == "causal":  # texts come out of it, and the tokenizer's end ends them
            _transform(run).tokenizer.save_pretrained(folder)


def _prove_peft(run: FinishedRun, folder: Path) -> str:
    """Plain PEFT loads it on the base model without a warning, and computes the run's logits.

    Quantised weights are whole again for this: how they are multiplied differs from one library and device to another.
    """
    inputs = _inputs(run)
    with tempfile.TemporaryDirectory(prefix="partial-lora-") as base:
        with _quiet():
            save_model(base_model(run, whole=True), Path(base), run.settings["model"])
        others = {f"plain PEFT{_whole(run)}": lambda: logits_elsewhere(inputs, model=Path(base), adapter=folder)}
        return _compared(_logits(adapted_model(run, whole=True), inputs), others, folder, _bound(run))


def _prove_compact(run: FinishedRun, folder: Path) -> str:
    """On another base model it loads with the values of the run's adapter, bit for bit, and computes its logits."""
    own = adapted_model(run)
    with _quiet():
        loaded = load_compact(base_model(run), folder)
    expected, found = _tensors(own), _tensors(loaded)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found or name not in expected or not torch.equal(expected[name], found[name]):
            raise ProofError(f"{folder}: {name} is not that of the run after loading")
    inputs = _inputs(run)
    others = {"a fresh base model": lambda: _logits(loaded, inputs)}
    return f"{len(found)} tensors equal bit for bit; {_compared(_logits(own, inputs), others, folder, bound=0.0)}"


def _prove_merged(run: FinishedRun, folder: Path) -> str:
    """The libraries that own the format load it on their own, and compute the run's logits."""
    own, inputs = adapted_model(run, whole=True), _inputs(run)
    libraries = ["transformers"]
    if isinstance(own.get_base_model(), TimmWrapperForImageClassification):
        libraries.append("timm")
    others = {
        f"{library} alone{_whole(run)}": lambda library=library: logits_elsewhere(inputs, model=folder, library=library)
        for library in libraries
    }
    return _compared(_logits(own, inputs), others, folder, _bound(run))


def _is_quantised(run: FinishedRun) -> bool:
    return run.settings["model"]["quantization"] is not None


def _whole(run: FinishedRun) -> str:
    return f" ({run.settings['model']['quantization']} weights whole again)" if _is_quantised(run) else ""


def _bound(run: FinishedRun) -> float:
    return _BOUND[run.settings["model"]["dtype"]]


def _transform(run: FinishedRun) -> task.Transform:
    """How inputs enter the run's model; of a mixture those of its first member, since all are read alike."""
    members = run.settings["task"].get("members") or {"": run.settings["task"]}
    return loading.transform_of({**run.settings, "task": next(iter(members.values()))})


def _inputs(run: FinishedRun) -> dict[str, Tensor]:
    """Random pixels, or sentences of unlike length; all but the longest of a batch are padded, on the right."""
    generator = torch.Generator().manual_seed(0)
    if loading.modality(run.settings["model"]) == "image":
        size = run.settings["model"]["image_size"]
        return {"pixel_values": torch.randn(_SAMPLES, 3, size, size, generator=generator)}
    transform = _transform(run)
    sentences = [" ".join(_WORDS[: 3 * count]) for count in range(1, _SAMPLES + 1)]
    if run.settings["model"]["family"] != "causal":
        return dict(transform.of_inputs(sentences))
    tokens = [each[: run.settings["model"]["max_length"]] for each in transform.tokenizer(sentences)["input_ids"]]
    batch = transform.collate([{"input_ids": each, "answer_start": len(each)} for each in tokens])
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def _logits(model: torch.nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits


def _compared(own: Tensor, others: Mapping[str, Callable[[], Tensor]], folder: Path, bound: float) -> str:
    """How far others' logits are from the run's own; raises ProofError beyond the bound."""
    scale = max(1.0, own.abs().max().item())
    said = []
    for who, compute in others.items():
        found = compute()
        difference = (found.float() - own.float()).abs().max().item() if found.shape == own.shape else float("inf")
        if not difference <= bound * scale:  # NaN too
            raise ProofError(
                f"{folder}: the logits of {who} differ from the run's by {difference:.2g}, at most {bound * scale:.2g}"
                " is allowed"
            )
        said.append(f"{who}: logits differ by at most {difference:.2g} (allowed {bound * scale:.2g})")
    return "; ".join(said)


WRITE = {"peft": _write_peft, "compact": _write_compact, "merged": _write_merged}
PROVE = {"peft": _prove_peft, "compact": _prove_compact, "merged": _prove_merged}
