#!/bin/bash
# The results of the README: data/sotu from scratch, the demo's recipe for every model, three seeds each.
# About an hour on one core. A run that is already in results/finetuning.csv is not repeated.
#     bash runs/finetuning_study.sh           # or, side by side: bash runs/finetuning_study.sh 1, ... 2, ... 3
set -euo pipefail
cd "$(dirname "$0")/.."
results=results/finetuning.csv
python=.venv/bin/python
# One thread a run: two runs side by side finish sooner than one after the other, and disturb each other less.
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

train() { # name, seed, config overrides
    local folder="output/finetuning_study/$1-$2"
    if grep -qs -e "--run_name $1 --seed $2 " "$results"; then return; fi
    $python scripts/finetune.py configs/demo.yaml --run_name "$1" --seed "$2" --config_overrides "$3" \
        --output_dir "$folder" --resume_from_checkpoint last --results_file "$results"
}

grep -qs baseline.py "$results" || $python scripts/baseline.py --train_file data/sotu/train.parquet \
    --validation_file data/sotu/dev.parquet --label_column label_text --results_file "$results"
for seed in ${*:-1 2 3}; do
    train demo "$seed" projected_length=64
    train slots_alone "$seed" local_window=0
    train linear "$seed" projection_type=linear,local_window=0,projected_length=128
    # Mean pooling with a slot for every token is full softmax attention: the twin, with the same head.
    train softmax "$seed" projected_length=1280,local_window=0
done
