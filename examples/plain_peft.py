"""Load a trained adapter where partial-lora is not installed: PEFT alone reads it.

    python examples/plain_peft.py

Prints: the files of the adapter, the type of adapter that PEFT sees, and how far its logits are from the trained ones.
Takes: about 7 s of one CPU core.
"""

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from partial_lora import PartialLoraConfig

FOLDER = "out/plain_peft"


# %%
def base() -> LlamaForCausalLM:
    """Return the base model: a tiny Llama of random weights, the same at every call.

    Yours is AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B"), or any other hub id.
    """
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    ).eval()


# %%
# With partial-lora: mask, train, save.
config = PartialLoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", sparsity=0.87)
model = get_peft_model(base(), config)
tokens = torch.arange(4, 36).reshape(2, 16)
optimizer = torch.optim.AdamW((each for each in model.parameters() if each.requires_grad), lr=1e-2)
for _ in range(5):
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.save_pretrained(FOLDER)
print(sorted(path.name for path in Path(FOLDER).iterdir()))

# %%
# Nothing from here on needs partial-lora, which may be missing on that machine.
loaded = PeftModel.from_pretrained(base(), FOLDER)
print(type(loaded.peft_config["default"]).__name__)
with torch.no_grad():
    distance = (loaded(tokens).logits - model.eval()(tokens).logits).abs().max().item()
print("the logits are those of the trained model" if distance < 1e-5 else f"the logits differ by {distance}")
assert distance < 1e-5
