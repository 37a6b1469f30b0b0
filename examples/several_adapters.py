"""Keep several masked adapters on one base model: switch between them, add them up, switch all of them off.

    python examples/several_adapters.py

Prints: the name of each adapter, how many numbers it trains, and the sum of the logits with it; then without any.
Takes: about 7 s of one CPU core.
"""

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from partial_lora import PartialLoraConfig, load_compact, write_compact

TARGETS = ["q_proj", "v_proj"]


def base() -> LlamaForCausalLM:
    """Return the base model: a tiny Llama of random weights, the same at every call.

    Yours is AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B"), or any other hub id.
    """
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    ).eval()


# Two adapters, trained apart and written as compact files. The mask seeds differ, so they change different entries.
for seed, name in enumerate(("german", "french")):
    config = PartialLoraConfig(r=8, target_modules=TARGETS, task_type="CAUSAL_LM", sparsity=0.87, mask_seed=seed)
    model = get_peft_model(base(), config)
    with torch.no_grad():  # in place of a training
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    write_compact(model, f"out/several_adapters/{name}")

# Both on one base model, and a third that is half of each. PEFT adds up whole factors, so that one is not masked.
model = load_compact(base(), "out/several_adapters/german", "german")
load_compact(model, "out/several_adapters/french", "french")
model.add_weighted_adapter(["german", "french"], [0.5, 0.5], "both", combination_type="cat")
tokens = torch.arange(4, 20)[None]
with torch.no_grad():
    for name in model.peft_config:
        model.set_adapter(name)
        count = sum(each.numel() for each in model.parameters() if each.requires_grad)
        print(f"{name}: {count:,} numbers, logits {model(tokens).logits.sum().item():.4f}")
    with model.disable_adapter():
        print(f"none: logits {model(tokens).logits.sum().item():.4f}")
