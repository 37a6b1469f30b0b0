#!/bin/bash
# Qwen2.5 14B on one GPU, its frozen weights in 4 bits (bitsandbytes), on gsm8k. `partial-lora info` with the same keys
# says what training needs; calibration is of the weights that the 4 bits stand for, in bf16, which take
# four times the memory and are there beside the 4 bits (about 34 GiB).
#     bash scripts/nf4_qwen2_5_14b.sh [KEY=VALUE …]
partial-lora train model=qwen2_5_14b model.quantization=nf4 task=gsm8k trainer.batch_size=16 \
    trainer.gradient_accumulation_steps=8 trainer.eval_batch_size=8 "$@"
