#!/usr/bin/env bash
# LoRA-SB on commonsense reasoning: train on commonsense_170k, then score each of the eight sets.
#   DATA_DIR=/data/commonsense SEEDS="1 2 3" scripts/run_cr.sh --dry-run
# TASKS: names of the sets, such as "boolq piqa".  DATA_DIR: folder with <set>/test.json and commonsense_170k.json, or a
# train.json in each set's folder.
# With Llama-3.2-3B: not run yet.
source "$(dirname "$0")/lora_sb.sh" "$@"
BASE_MODEL=${BASE_MODEL:-meta-llama/Llama-3.2-3B}
TASKS=${TASKS:-boolq piqa social_i_qa hellaswag winogrande ARC-Easy ARC-Challenge openbookqa}
: "${DATA_DIR:?set DATA_DIR to the folder of the commonsense sets, which are not on the hub}"

data=$DATA_DIR/commonsense_170k.json
[[ -e $data ]] || data=$DATA_DIR
for seed in $SEEDS; do
    train experiment=lora_sb_commonsense "model.name=$BASE_MODEL" init.iters=170 "dataset.path=$data" "seed=$seed"
    for task in $TASKS; do
        evaluate commonsense "--dataset=$task" "--data_path=$DATA_DIR"
    done
done
