"""Merge a trained adapter into its base model: the result is a model of the usual format, without an adapter.

    python examples/merge.py

Prints: that the merged model, loaded again from its folder, computes what the adapted model computed.
Takes: about 7 s of one CPU core.
"""

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from partial_lora import PartialLoraConfig


def base() -> LlamaForCausalLM:
    """Return the base model: a tiny Llama of random weights, the same at every call.

    Yours is AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B"), or any other hub id.
    """
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    ).eval()


# An adapter that was trained. Its B is zero before training, so it gets some values here.
config = PartialLoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", sparsity=0.87)
model = get_peft_model(base(), config)
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=0.1)
model.save_pretrained("out/merge/adapter")

# In a new process: load it into a base model of its own, since merging changes the weights of that base.
adapted = PeftModel.from_pretrained(base(), "out/merge/adapter")
tokens = torch.arange(4, 36).reshape(2, 16)
with torch.no_grad():
    expected = adapted(tokens).logits
    merged = adapted.merge_and_unload(safe_merge=True)  # safe_merge refuses weights that are no numbers
    merged.save_pretrained("out/merge/model")
    again = AutoModelForCausalLM.from_pretrained("out/merge/model").eval()
    distance = (again(tokens).logits - expected).abs().max().item()
assert distance < 1e-4, distance
print("the merged model computes what the adapted one did")

# Of a run of the command line: partial-lora export RUN_DIR --to merged --check
# Several adapters as one:       partial-lora merge RUN_DIR RUN_DIR --weights 0.7 0.3 --out DIR
