#!/bin/bash
# results/pretraining.csv: does a Linformer reach the perplexity of its softmax twin (the paper's Figure 3)? The same
# blocks, order, masks and seed for all. About half an hour a model on two cores. A run whose rows are in the CSV is not
# repeated, one that was killed goes on.
#     bash runs/pretraining_study.sh FOLDER SEED...        # default ../shared/data 1
# FOLDER has gutenberg/train.parquet and gutenberg/validation.parquet. STEPS=2000 is the number of steps of 4,096 tokens,
# MODELS="twin linear_128" runs only these, RESULTS is another CSV.
set -euo pipefail
cd "$(dirname "$0")/.."
results=${RESULTS:-results/pretraining.csv}
data=${1:-../shared/data}
seeds=${*:2}
steps=${STEPS:-2000}
export HF_HUB_OFFLINE=1

# Dropout is of no use before text repeats.
none=hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0

# What is above this has learned nothing of context. Not a model, and left out where some are named.
[[ -n ${MODELS:-} ]] || grep -qs -e "--run_name unigram " "$results" || .venv/bin/python scripts/unigram.py --run_name unigram \
    --train_file "$data/gutenberg/train.parquet" --validation_file "$data/gutenberg/validation.parquet" \
    --results_file "$results"

pretrain() { # name, overrides, further options
    name=$1
    [[ -z ${MODELS:-} || " $MODELS " == *" $name "* ]] || return 0
    for seed in ${seeds:-1}; do
        if grep -qs -e "--run_name $name --seed $seed --max_train_steps $steps " "$results"; then continue; fi
        .venv/bin/python scripts/pretrain.py --run_name "$name" --seed "$seed" --max_train_steps "$steps" \
            --config_name configs/small.json --config_overrides "$none${2:+,$2}" --train_file "$data/gutenberg/train.parquet" \
            --validation_file "$data/gutenberg/validation.parquet" --learning_rate 1e-3 --eval_steps $((steps / 4)) \
            --checkpointing_steps 200 --mixed_precision bf16 --output_dir "output/pretraining/$name-$seed-$steps" \
            --resume_from_checkpoint last --results_file "$results" "${@:3}"
    done
}

pretrain twin "" --architecture roberta
pretrain linear_128 ""
pretrain mean_128_window_32 projection_type=mean_pool,local_window=32
pretrain mean_128 projection_type=mean_pool
pretrain mean_64_window_32 projection_type=mean_pool,projected_length=64,local_window=32
# With another optimizer: what is near in one may not be in the other.
pretrain mean_128_window_32_muon projection_type=mean_pool,local_window=32 --optim muon --learning_rate 2e-3
pretrain twin_muon "" --architecture roberta --optim muon --learning_rate 2e-3
# Each head learns where to look. Softmax is the same with a slot for every token.
learned_place="projection_type=mean_pool,local_window=32,local_position_bias=true"
quick="--optim muon --learning_rate 2e-3 --mlm_probability 0.3"
# shellcheck disable=SC2086
{
    pretrain mean_128_window_32_bias_quick $learned_place $quick
    pretrain softmax_window_32_bias_quick $learned_place,projected_length=512 $quick
    # Two slots, of the first token and of the mean of all else: what the window is worth without the others.
    pretrain mean_2_window_32_bias_quick $learned_place,projected_length=2 $quick
    # Without the bias, and without the rest.
    pretrain mean_128_window_32_quick projection_type=mean_pool,local_window=32 $quick
    pretrain mean_128_window_32_bias $learned_place
    pretrain softmax_window_32_bias $learned_place,projected_length=512
}
# A single slot tells a token next to nothing of its context: what is above this is what attention is worth.
pretrain linear_1 projected_length=1
pretrain linear_128_segments projection_init=segment_mean
pretrain linear_32 projected_length=32
pretrain linear_256 projected_length=256
pretrain headwise_128 projection_sharing=headwise
pretrain key_value_128 projection_sharing=key_value
pretrain convolution_128 projection_type=convolution
pretrain random_128 projection_type=random
long="--per_device_train_batch_size 2 --per_device_eval_batch_size 8 --max_eval_samples 125"
# shellcheck disable=SC2086
{
    pretrain twin_2048 max_position_embeddings=2048 --architecture roberta $long
    pretrain linear_128_2048 max_position_embeddings=2048 $long
    pretrain mean_128_window_32_2048 max_position_embeddings=2048,projection_type=mean_pool,local_window=32 $long
}
