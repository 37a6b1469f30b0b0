"""The forms of an export: for `--help`, and which functions write and prove each. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """A form in which a run's adapter is written for other programs.

    words: for `--help`. write, prove: MODULE:NAME in this package, of what writes it into a folder, and of what proves
    that others can use what lies there.
    """

    words: str
    write: str
    prove: str


FORMS = {
    "peft": Form("an ordinary LoRA adapter, zeros where masked", "export:write_peft", "export:prove_peft"),
    "compact": Form("the kept values alone", "export:write_compact_file", "export:prove_compact"),
    "merged": Form(
        "the whole model in the format of transformers or timm", "export:write_merged", "export:prove_merged"
    ),
    "gguf": Form(
        "an adapter for llama.cpp, of a Llama, Mistral or Qwen",
        "export_to_servers:write_gguf",
        "export_to_servers:prove_gguf",
    ),
    "serve": Form("a LoRA for vLLM, SGLang and LoRAX", "export_to_servers:write_serve", "export:prove_serve"),
}
