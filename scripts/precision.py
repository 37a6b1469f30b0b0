"""Time a training step in fp32 and bf16 on this processor: does trainer.mixed_precision=bf16 pay here?

`python scripts/precision.py` prints processor seconds of a step (forward and backward, dense LoRA on vit_s14, one
thread) in fp32 and bf16, interleaved, and the ratio of their medians.
"""

from __future__ import annotations

import time
from statistics import median

import torch
from peft import LoraConfig, get_peft_model

from partial_lora import models

REPEATS = 5


def main() -> None:
    torch.set_num_threads(1)
    model = models.load(
        name="vit_s14",
        weights="bundled:vit_s14",
        architecture="vit_small_patch14_dinov2",
        model_args={"img_size": 518, "dynamic_img_size": True},
        labels=[str(digit) for digit in range(10)],
        image_size=56,
    )
    targets = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    model = get_peft_model(model, LoraConfig(r=16, target_modules=targets, modules_to_save=["timm_model.head"]))
    print(f"AVX512-BF16 {torch.cpu._is_avx512_bf16_supported()}, AMX {torch.cpu._is_amx_tile_supported()}")
    for size, batch in ((56, 32), (224, 8)):
        pixels, labels = torch.randn(batch, 3, size, size), torch.arange(batch) % 10
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(REPEATS + 1):
            for bf16, spent in seconds.items():
                start = time.process_time()
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss = model(pixel_values=pixels, labels=labels).loss
                loss.backward()
                spent.append(time.process_time() - start)
        full, half = (median(spent[1:]) for spent in seconds.values())  # the first of each warms up
        print(f"{size} pixels, batch {batch}: fp32 {full:.2f} s, bf16 {half:.2f} s, ratio {half / full:.2f}")


if __name__ == "__main__":
    main()
