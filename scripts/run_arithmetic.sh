#!/usr/bin/env bash
# LoRA-SB on arithmetic: train on 50,000 rows of MetaMathQA, then score GSM8K and MATH (needs pip install 'lora-one[math]').
#   BASE_MODEL=google/gemma-2-9b SEEDS="1 2 3" scripts/run_arithmetic.sh --dry-run
# TASKS: gsm8k, math.  DATA_DIR: folder with meta_math/, gsm8k/ and math/; without it the data come from the hub.
# With Mistral-7B: not run yet. The three ranks of the paper: add peft.lora_r=32 (64, 96).
source "$(dirname "$0")/lora_sb.sh" "$@"
BASE_MODEL=${BASE_MODEL:-mistralai/Mistral-7B-v0.1}
TASKS=${TASKS:-gsm8k math}
DATA_DIR=${DATA_DIR:-}

for seed in $SEEDS; do
    train experiment=lora_sb_arithmetic "model.name=$BASE_MODEL" init.iters=50 \
        ${DATA_DIR:+"dataset.path=$DATA_DIR/meta_math"} "seed=$seed"
    for task in $TASKS; do
        evaluate "$task" ${DATA_DIR:+"--data_path=$DATA_DIR/$task"}
    done
done
