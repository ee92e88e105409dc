#!/usr/bin/env bash
# LoRA-SB on GLUE: four learning rates for each set, each scored on the set's validation split after the last epoch.
#   TASKS="cola mrpc" SEEDS="1 2 3" scripts/run_glue.sh --dry-run
# TASKS: names of data sets.  DATA_DIR: folder with a folder of GLUE's files for each set (CoLA/, MRPC/, ...); without it the
# data come from the hub.  LEARNING_RATES: those to try. The published script reports the maximum over epochs and rates on the
# same split, which is too high: scripts/comparisons/paper/lora_sb_glue.yaml chooses the rate on other rows.
# With RoBERTa-large: not run yet.
source "$(dirname "$0")/lora_sb.sh" "$@"
BASE_MODEL=${BASE_MODEL:-FacebookAI/roberta-large}
TASKS=${TASKS:-cola mrpc rte}
LEARNING_RATES=${LEARNING_RATES:-1e-4 5e-4 1e-3 5e-3}
DATA_DIR=${DATA_DIR:-}

for task in $TASKS; do
    data=
    if [[ -n $DATA_DIR ]]; then
        data=$(find -L "$DATA_DIR" -maxdepth 1 -iname "${task/sst2/sst*2}" | head -n 1)
        : "${data:?DATA_DIR=$DATA_DIR has no folder for $task}"
    fi
    for rate in $LEARNING_RATES; do
        for seed in $SEEDS; do
            train experiment=lora_sb_glue "dataset=$task" "model.name=$BASE_MODEL" init.iters=2 \
                ${data:+"dataset.path=$data"} "model.learning_rate=$rate" "seed=$seed"
            evaluate glue "--dataset=$task" ${data:+"--data_path=$data"}
        done
    done
done
