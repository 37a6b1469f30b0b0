"""A finished run's adapter as files for other programs: an ordinary LoRA adapter, a compact one, the merged model, or
what inference servers read.

An export is built in a folder beside its own and takes its name when it is whole and has passed its check, if any.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pkgutil import resolve_name

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TimmWrapperForImageClassification

from partial_lora.adapter import PartialLoraConfig, load_compact, write_compact
from partial_lora.building import build
from partial_lora.errors import PartialLoraError, ProofError, one_line
from partial_lora.files import building, file_sha256, written
from partial_lora.finished import export_to_servers
from partial_lora.finished.export_forms import FORMS
from partial_lora.finished.run import FinishedRun
from partial_lora.launching import directory
from partial_lora.models.weights import quiet
from partial_lora.tasks.kinds import kind_of
from partial_lora.tasks.task import Transform


@dataclass(frozen=True)
class Exported:
    """The folder of an export, its bytes, whether the same was there before, and the result of a check."""

    folder: Path
    size: int
    existed: bool
    proof: str | None


def export(
    run: FinishedRun,
    to: str,
    out: Path | None = None,
    *,
    check: bool = False,
    describe: Callable[[FinishedRun, Path], None] = lambda run, folder: None,
) -> Exported:
    """Write a finished run's adapter into a folder (default: export/FORMAT in the run's directory).

    Args:
        to: one of `FORMS`.
        describe: puts a page on the run into the folder of the export.
        check: prove, before the folder gets its name, that others can use it and compute what the run's adapter does.

    Raises PartialLoraError, leaving nothing behind, for a format that the run's method does not have, where the run's
    files are broken or the folder holds other files, and ProofError where the check fails.
    """
    folder = (run.directory / "export" / to if out is None else Path(out)).resolve()
    if folder == run.adapter.resolve():
        raise PartialLoraError(f"{folder} is the run's own adapter: choose another --out")
    if folder.exists() and not folder.is_dir():
        raise PartialLoraError(f"{folder} is a file, expected a folder to write to: choose another --out")
    foreign = PartialLoraError(f"{folder} holds other files than this export: choose another --out, or remove it")
    occupied = folder.is_dir() and any(folder.iterdir())
    if occupied and not directory.tensor_files(folder):
        raise foreign
    with written(folder, "make room there, or choose another --out"), building(folder) as built:
        WRITE[to](run, built)
        describe(run, built)
        try:
            proof = PROVE[to](run, built) if check else None
        except ProofError as error:  # it names the folder as it is called while it is built
            raise ProofError(str(error).replace(str(built), str(folder))) from error
        existed = _is_same(built, folder)
        if occupied and not existed:
            raise foreign
        size = sum(file.stat().st_size for file in built.rglob("*") if file.is_file())
    return Exported(folder, size, existed, proof)


def _is_same(built: Path, folder: Path) -> bool:
    """Return whether a folder holds the files of an export: no other names, and the same tensors to the last bit."""
    names = [{file.relative_to(parent).as_posix() for file in parent.rglob("*")} for parent in (built, folder)]
    tensors = directory.tensor_files(built)
    return names[0] == names[1] and all(file_sha256(file) == file_sha256(folder / file.name) for file in tensors)


# --- The formats: how a run's adapter is written in each, and what proves that others can use it.

# How far others' logits may be from the run's own. All compute the same in float32, in another order: PEFT multiplies
# with the zeros too. That moves logits by a share of the largest of them (of 1, where none exceeds that): on the real
# ViT-S at 98 pixels, with logits up to 28, by 1.1e-6 (PEFT) and 1.6e-6 (merged). A number format that rounds factors,
# or the weights that they are merged into, may cost a share of what the adapter changes; in bf16, on random models of
# three layers, it cost 0.003 at most.
_ROUNDING = 1e-5
_SHARE = 0.05
_TELLING = 0.25  # of what the adapter changes: where more is allowed, half an adapter would soon pass

_SAMPLES = 4  # inputs on which logits are compared
_WORDS = ["the", "film", "was", "long", "but", "every", "scene", "of", "it", "had", "something", "to", "say"]


def base_model(run: FinishedRun, *, whole: bool = False) -> PreTrainedModel:
    """Return the run's base model as it was before training. Its head is drawn anew; the adapter has the trained head.

    whole: quantised weights in the model's number format again, with the values that they stand for.
    Raises PartialLoraError where the files of its weights are not those that the run was trained over.
    """
    refuse_another_model(run)
    with quiet():
        model = build.model_of(run.config.model, run.labels())
        return model.dequantize() if whole and run.config.model.quantization else model


def refuse_another_model(run: FinishedRun) -> None:
    """Raise PartialLoraError where a folder of weights is not as it was when the run was trained."""
    key = run.changed("model")
    if key is not None:
        folder = getattr(run.config.model, key.partition(".")[2])
        raise PartialLoraError(
            f"{key}: a file in {folder} was added, removed or changed since {run.directory} was trained; restore the "
            "folder"
        )


@contextlib.contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Load an adapter in the block, quietly; raises PartialLoraError, naming its folder, where that fails."""
    try:
        with quiet():
            yield
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise PartialLoraError(f"{folder}: cannot be loaded ({one_line(error)})") from error


def adapted_model(run: FinishedRun, *, whole: bool = False) -> PeftModel:
    """Return the run's base model with its trained adapter, masked where the run's was, in evaluation mode.

    `whole` as in `base_model`. Raises PartialLoraError where the adapter is broken, lacks a tensor or has one too many.
    """
    folder = run.adapter
    with loading(folder):
        config = PartialLoraConfig.from_pretrained(str(folder)) if run.is_masked else None
        adapted = PeftModel.from_pretrained(base_model(run, whole=whole), str(folder), config=config)
        saved = load_file(folder / "adapter_model.safetensors")
    for name in sorted(_tensors(adapted).keys() ^ saved.keys()):
        state = "has no place in the model" if name in saved else "is missing"
        raise PartialLoraError(f"{folder}/adapter_model.safetensors: {name} {state}; train the run again")
    return adapted.eval()


def _tensors(adapted: PeftModel) -> dict[str, Tensor]:
    return get_peft_model_state_dict(adapted, save_embedding_layers=False)


def describe(model: PreTrainedModel, run: FinishedRun, folder: Path) -> None:
    """Write, beside weights, what prepares a run's inputs, and the names of its classes."""
    build.describe(model, run.config.model, _transform(run), folder)


def write_peft(run: FinishedRun, folder: Path) -> None:
    adapted = adapted_model(run)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    describe(adapted.get_base_model(), run, folder)


def write_compact_file(run: FinishedRun, folder: Path) -> None:
    if not run.is_masked:
        raise PartialLoraError(
            f"{run.directory}: method={run.method} masks nothing, so that there is nothing to leave out: export it with"
            " --to peft or merged"
        )
    adapted = adapted_model(run)
    write_compact(adapted, folder)
    describe(adapted.get_base_model(), run, folder)


def write_merged(run: FinishedRun, folder: Path) -> None:
    """Write the merged model, quantised weights whole: in four bits they would lose most of what was added."""
    adapted = adapted_model(run, whole=True)
    if run.config.model.family == "causal":
        _untie(adapted.get_base_model())
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except (NotImplementedError, ValueError) as error:  # a tuner that cannot, or weights that are no numbers
        raise PartialLoraError(
            f"{run.directory}: PEFT does not merge method={run.method} ({one_line(error)}); export it with --to peft"
        ) from error
    with quiet():
        _save(merged, run, folder)


def _untie(model: PreTrainedModel) -> None:
    """Give an adapted output layer weights of its own where it shares the embedding's, which the adapter leaves."""
    output = model.get_output_embeddings()
    if isinstance(output, BaseTunerLayer) and output.weight is model.get_input_embeddings().weight:
        output.get_base_layer().weight = nn.Parameter(output.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def _save(model: PreTrainedModel, run: FinishedRun, folder: Path) -> None:
    """Write a whole model, without adapters, in the format of the library that it comes from."""
    if isinstance(model, TimmWrapperForImageClassification):
        tensors = {name: tensor.detach().contiguous() for name, tensor in model.timm_model.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        model.save_pretrained(folder)
    describe(model, run, folder)


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """Give a folder for what a check writes, and remove it in the end."""
    remedy = "make room there, or set TMPDIR to a folder on another disk"
    with tempfile.TemporaryDirectory(prefix="partial-lora-") as place, written(Path(place), remedy):
        yield Path(place)


def prove_peft(run: FinishedRun, folder: Path, *, is_rounded: bool = False) -> str:
    """Prove that plain PEFT loads the export on the base model without a warning, and computes the run's logits.

    Quantised weights are whole again for this: libraries and devices differ in how they multiply them.
    """
    samples = _samples(run)
    with _scratch() as base:
        with quiet():
            _save(base_model(run, whole=True).float(), run, base)
        elsewhere = {f"plain PEFT{_whole(run)}": logits_elsewhere(samples, model=base, adapter=folder)}
    adapted, share = adapted_model(run, whole=True).float(), _SHARE if is_rounded else _share(run)
    return _compared(adapted, samples.inputs, elsewhere, folder, share=share)


def prove_compact(run: FinishedRun, folder: Path) -> str:
    """Prove that the export, on a fresh base model, has the values of the run's adapter bit for bit, and its logits."""
    adapted = adapted_model(run)
    with quiet():
        loaded = load_compact(base_model(run), folder)
    count, inputs = export_to_servers.prove_equal(folder, _tensors(adapted), _tensors(loaded)), _samples(run).inputs
    elsewhere = {"a fresh base model": _logits(loaded, inputs)}
    return f"{count} tensors equal bit for bit; {_compared(adapted, inputs, elsewhere, folder, rounding=0.0)}"


def prove_merged(run: FinishedRun, folder: Path) -> str:
    """Prove that the libraries that own the format load it on their own, and compute the run's logits.

    transformers does so by a pipeline on raw texts or images, with its own tokenizer or image processor and labels.
    """
    samples, libraries = _samples(run), ["transformers", *["timm"] * (run.config.model.family == "timm")]
    elsewhere = {
        f"{library} alone{_whole(run)}": logits_elsewhere(samples, model=folder, library=library)
        for library in libraries
    }
    adapted = adapted_model(run, whole=True).float()  # now, so that one model at a time is in memory
    return _compared(adapted, samples.inputs, elsewhere, folder, share=_share(run))


def _share(run: FinishedRun) -> float:
    """Return the share of what the adapter changes that the number format of the run's model may cost."""
    return 0.0 if run.config.model.dtype == "float32" else _SHARE


def _whole(run: FinishedRun) -> str:
    return f" ({run.config.model.quantization} weights whole again)" if run.config.model.quantization else ""


def _transform(run: FinishedRun) -> Transform:
    """Return the transform of the run's inputs; a mixture's first member has it, since all members are read alike."""
    task = run.config.task
    return build.transform_of(run.config.model, next(iter(task.members.values())) if task.members else task)


@dataclass(frozen=True)
class Samples:
    """Inputs on which logits are compared.

    pipeline: the kind of transformers' pipeline for them. raw: images or texts. inputs: tensors by the names of the
    model's arguments. labels: of the logits, in order; none of a number or of a causal model.
    """

    pipeline: str
    raw: list
    inputs: dict[str, Tensor]
    labels: list[str]


def _samples(run: FinishedRun) -> Samples:
    """Return images of noise, or sentences of unlike length, all but the longest padded on the right."""
    transform, labels, kind = _transform(run), run.labels(), kind_of(run.config.task)
    if kind.reads == "image":
        size, noise = run.config.model.image_size, np.random.default_rng(0)
        images = [Image.fromarray(noise.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(_SAMPLES)]
        return Samples(kind.pipeline, images, dict(transform.encode(images)), labels)
    sentences = [" ".join(_WORDS[: 3 * count]) for count in range(1, _SAMPLES + 1)]
    if kind.has_head:
        return Samples(kind.pipeline, sentences, dict(transform.encode(sentences)), labels)
    tokens = [ids[: run.config.model.max_length] for ids in transform.tokenizer(sentences)["input_ids"]]
    batch = transform.collate([{"input_ids": ids, "answer_start": len(ids)} for ids in tokens])
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return Samples(kind.pipeline, sentences, inputs, [])


def _logits(model: torch.nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    device = next(model.parameters()).device  # transformers loads quantised weights onto a GPU if there is one
    with torch.no_grad():
        return model.eval()(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits.cpu()


def _logits_without(adapted: PeftModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the logits with the adapter off; a head that trained beside it stays, unless it is all that trained."""
    layers = [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    with contextlib.nullcontext() if layers else adapted.disable_adapter():
        return _logits(adapted, inputs)


def _compared(
    run: PeftModel,
    inputs: Mapping[str, Tensor],
    elsewhere: Mapping[str, Tensor],
    folder: Path,
    *,
    rounding: float = _ROUNDING,
    share: float = 0.0,
) -> str:
    """Return how far others' logits are from the run's own, in words; raises ProofError where they are too far.

    rounding: as a share of the largest logit. share: of what the adapter changes. The larger of the two is allowed. The
    model of the run is left with its adapter off.
    """
    expected = _logits(run, inputs).float()
    changed = (expected - _logits_without(run, inputs).float()).abs().max().item()
    allowed = max(rounding * max(1.0, expected.abs().max().item()), share * changed)
    compared = []
    for who, logits in elsewhere.items():
        difference = (logits.float() - expected).abs().max().item() if logits.shape == expected.shape else float("inf")
        if not difference <= allowed:  # NaN too
            raise ProofError(
                f"{folder}: the logits of {who} differ from the run's by {difference:.2g}, at most {allowed:.2g} is"
                f" allowed; the adapter changes them by {changed:.2g}"
            )
        compared.append(f"{who}: logits differ by at most {difference:.2g} (allowed {allowed:.2g})")
    effect = f"the adapter changes them by {changed:.2g}"
    if not changed or allowed > _TELLING * changed:
        effect += ", so little that this check cannot tell it from none"
    return "; ".join([*compared, effect])


prove_serve = partial(prove_peft, is_rounded=True)  # of the LoRA for servers
WRITE = {name: resolve_name(f"{__package__}.{form.write}") for name, form in FORMS.items()}
PROVE = {name: resolve_name(f"{__package__}.{form.prove}") for name, form in FORMS.items()}


# --- Logits of an export by a fresh interpreter in which this package cannot be imported.

_SCRIPT = """
import json, sys, warnings
sys.modules["partial_lora"] = None  # from here on, importing it fails
import torch
from safetensors.torch import load_file, save_file

job = json.loads(sys.argv[1])
inputs, labels, adapter = load_file(job["inputs"]), job["labels"], job["adapter"]
warned = []

def timm_logits():
    import timm
    with torch.no_grad():
        return timm.create_model("local-dir:" + job["model"], pretrained=True).eval()(*inputs.values())

def transformers_logits():
    import transformers
    kind, read = job["pipeline"], adapter or job["model"]
    processor = transformers.AutoImageProcessor if kind == "image-classification" else transformers.AutoTokenizer
    processor = processor.from_pretrained(read, trust_remote_code=False)
    own = {"image_processor" if "image" in kind else "tokenizer": processor}
    pipeline = transformers.pipeline(
        kind, model=job["model"], dtype=torch.float32, trust_remote_code=False, **own
    )
    if adapter:
        from peft import PeftModel
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adapted = PeftModel.from_pretrained(pipeline.model, adapter)
        assert type(adapted.base_model).__module__.startswith("peft."), type(adapted.base_model)
        # What libraries warn of their own future has nothing to do with the adapter.
        ignored = (FutureWarning, DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
        warned.extend(str(each.message) for each in caught if not issubclass(each.category, ignored))
        pipeline.model = adapted.get_base_model()
        read_labels = transformers.AutoConfig.from_pretrained(read, trust_remote_code=False).id2label
        assert not labels or list(read_labels.values()) == labels, "config.json has other labels"
    if kind == "text-generation":
        found = pipeline.tokenizer(job["raw"])["input_ids"]
        masks = inputs["attention_mask"].sum(1).tolist()
        known = [row[:length].tolist() for row, length in zip(inputs["input_ids"], masks)]
        assert [row[: len(own)] for row, own in zip(found, known)] == known, "other tokens"
        with torch.no_grad():
            return pipeline.model.eval()(**inputs).logits
    options = {"top_k": None, "truncation": True} if kind == "text-classification" else {"top_k": len(labels) or 1}
    answers = pipeline(job["raw"], function_to_apply="none", **options)
    by_label = [{each["label"]: each["score"] for each in answer} for answer in answers]
    return torch.tensor([[each[label] for label in labels or each] for each in by_label])

logits = timm_logits() if job["library"] == "timm" else transformers_logits()
assert not [name for name, module in sys.modules.items() if name.startswith("partial_lora") and module]
save_file({"logits": logits.contiguous()}, job["logits"])
print(json.dumps(warned))
"""


def logits_elsewhere(
    samples: Samples, *, model: Path, adapter: Path | None = None, library: str = "transformers"
) -> Tensor:
    """Return the logits of the model in a folder for samples, as a clean interpreter computes them.

    Args:
        model: a folder as `_save` writes it.
        adapter: a folder that plain PEFT is to load on the model; it must do so without a warning.
        library: what builds the model, "transformers" or "timm".

    Raises ProofError where the interpreter cannot do so, with the last line of its errors, and for a warning.
    """
    with _scratch() as place:
        job = {
            "library": library,
            "model": str(Path(model).resolve()),
            "adapter": str(Path(adapter).resolve()) if adapter else None,
            "pipeline": samples.pipeline,
            "raw": samples.raw,
            "labels": samples.labels,
            "inputs": str(place / "inputs.safetensors"),
            "logits": str(place / "logits.safetensors"),
        }
        if samples.pipeline == "image-classification":
            job["raw"] = [str(place / f"{number}.png") for number in range(len(samples.raw))]
            for image, file in zip(samples.raw, job["raw"], strict=True):
                image.save(file)
        save_file({name: tensor.contiguous() for name, tensor in samples.inputs.items()}, job["inputs"])
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT, json.dumps(job)],
            cwd=place,  # where no checkout of this package lies
            env=os.environ | {"HF_HUB_OFFLINE": "1"},  # everything it needs is in the folders
            capture_output=True,
            text=True,
            check=False,
        )
        source = adapter or model
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
            raise ProofError(f"{source}: a clean interpreter cannot use it with {library} alone ({last})")
        warned = json.loads(done.stdout.strip().splitlines()[-1])
        if warned:
            raise ProofError(f"{source}: plain PEFT warns when it loads it: {' '.join(warned[0].split())}")
        return load_file(job["logits"])["logits"]
