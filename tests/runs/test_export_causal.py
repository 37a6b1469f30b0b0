"""Exports of causal language models, of quantised ones too: others compute a run's logits from the files alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from finished_runs import cache, changed, choice_run, generation_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from partial_lora.runs import export
from partial_lora.runs.finished import FinishedRun
from partial_lora.runs.predict import Predictor


@pytest.fixture(autouse=True)
def same_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARTIAL_LORA_CACHE", cache())


def with_base(run: FinishedRun, **changes: object) -> FinishedRun:
    """The run's adapter on its base model with other settings; what it predicts there is nobody's record."""
    return changed(run, "model", **changes)


@pytest.mark.parametrize(
    ("to", "by"), [("peft", "plain PEFT"), ("compact", "a fresh base model"), ("merged", "transformers alone")]
)
def test_a_causal_run_is_computed_by_others_from_its_files(tmp_path: Path, to: str, by: str) -> None:
    done = export.export(choice_run(), to, tmp_path / to, check=True)  # raises where the logits differ
    assert f"{by}: logits differ by at most" in done.proof


def test_the_merged_model_writes_what_the_run_does_with_the_tokenizer_beside_it(tmp_path: Path) -> None:
    run, prompts = generation_run(), ["say red 7", "say so so so blue 12"]
    folder = export.export(run, "merged", tmp_path / "merged").folder
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for prompt, prediction in zip(prompts, Predictor(run, device="cpu").predict(prompts), strict=True):
        tokens = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
        written = model.generate(tokens, max_new_tokens=12, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        assert tokenizer.decode(written[0, tokens.shape[1] :], skip_special_tokens=True).strip() == prediction.label


@pytest.mark.parametrize(
    ("changes", "to"),
    [({"quantization": "nf4"}, "peft"), ({"quantization": "nf4", "dtype": "bfloat16"}, "merged")],
)
def test_a_quantised_base_is_proven_with_its_weights_whole(tmp_path: Path, changes: dict, to: str) -> None:
    done = export.export(with_base(choice_run(), **changes), to, tmp_path / to, check=True)
    assert "(nf4 weights whole again): logits differ by at most" in done.proof


def test_a_quantised_base_is_merged_with_the_values_that_its_weights_stand_for(tmp_path: Path) -> None:
    """Neither rounded again, which would lose the adapter, nor the weights before they were quantised."""
    run = with_base(choice_run(), quantization="nf4")
    export.export(run, "merged", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}
    inputs = export._inputs(run)
    own = export._logits(export.adapted_model(run), inputs)  # in four bits, as it runs
    apart = {
        "merged": export._logits(merged, inputs) - own,
        "not quantised": export._logits(export.adapted_model(choice_run()), inputs) - own,
        "without the adapter": export._logits(export.base_model(run), inputs) - own,
    }
    far = {name: float(difference.abs().max()) for name, difference in apart.items()}
    assert far["merged"] < 1e-5 < 1e-3 < min(far["not quantised"], far["without the adapter"])
