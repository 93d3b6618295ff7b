#!/bin/bash
# Time and memory against length, forward and training: results/efficiency.csv and its figure. Hours on two cores; run it
# alone on the machine. A command whose rows are in the CSV is not repeated, so it goes on where it was ended.
#     bash runs/efficiency_study.sh                  # on a CPU
#     bash runs/efficiency_study.sh cuda             # on a GPU, in bfloat16, every length
set -euo pipefail
cd "$(dirname "$0")/.."
results=results/efficiency.csv
python=.venv/bin/python
export HF_HUB_OFFLINE=1
device=${1:-cpu}
# Layers are alike: three of them tell of any number, and a CPU takes its time.
layers=$([[ $device == cuda ]] && echo 12 || echo 3)

measure() { # options of scripts/benchmark.py
    local options=("$@" --num_hidden_layers "$layers" --device "$device" --results_file "$results")
    if grep -qsF -e "scripts/benchmark.py ${options[*]}" "$results"; then return; fi
    $python scripts/benchmark.py "${options[@]}"
}

twins=(roberta_sdpa roberta_sdpa_tiled roberta_eager)
dtypes=(float32 bfloat16)
if [[ $device == cuda ]]; then dtypes=(bfloat16); fi

for dtype in "${dtypes[@]}"; do
    for n in 512 1024 2048 4096 8192 16384 32768 65536; do
        measure --lengths "$n" --dtype "$dtype"
        measure --lengths "$n" --dtype "$dtype" --models linear "${twins[@]}" --projected_lengths 256 512
        # Without the tiles that a layer is worked through in.
        measure --lengths "$n" --dtype "$dtype" --models linear linear:inference_chunk_size=0 "${twins[@]:0:2}" \
            mean_pool mean_pool:inference_chunk_size=0
    done
    for n in 512 1024 2048; do
        measure --lengths "$n" --dtype "$dtype" --batch_size 1 --models linear mean_pool "${twins[@]}"
    done
    for n in 512 1024 2048 4096 8192; do
        measure --lengths "$n" --dtype "$dtype" --mode training --models linear mean_pool mean_pool:local_window=32 \
            "${twins[@]}" modernbert_sdpa longformer nystromformer linformer_package linformer_pytorch_package
    done
done

# What each option of training does to time and memory.
measure --lengths 4096 --mode training --head masked_lm --dtype bfloat16 --models roberta_sdpa mean_pool \
    mean_pool:dtype=float32 mean_pool:gradient_checkpointing=true mean_pool:sparse_prediction=true
# At the sizes of runs/pretraining_study.sh.
grep -qsF -e "--hidden_size 256" "$results" || $python scripts/benchmark.py --lengths 512 2048 --mode training \
    --dtype bfloat16 --hidden_size 256 --num_hidden_layers 4 --num_attention_heads 4 --intermediate_size 1024 \
    --models roberta_sdpa linear mean_pool mean_pool:local_window=32 --max_seconds 30 --device "$device" \
    --results_file "$results"
# What the bias of the pretraining study costs.
grep -qsF -e "local_position_bias" "$results" || $python scripts/benchmark.py --lengths 512 2048 --mode training \
    --dtype bfloat16 --hidden_size 256 --num_hidden_layers 4 --num_attention_heads 4 --intermediate_size 1024 \
    --models roberta_sdpa mean_pool:local_window=32 mean_pool:local_window=32,local_position_bias=true \
    --max_seconds 15 --device "$device" --results_file "$results"
# Rows that two blocks of a window hold, and those that they do not.
measure --lengths 64 --dtype bfloat16 --projected_lengths 32 --models roberta_sdpa mean_pool mean_pool:local_window=16 \
    mean_pool:local_window=32 mean_pool:local_window=64
# What torch.compile does.
measure --lengths 4096 --dtype bfloat16 --models roberta_sdpa linear mean_pool roberta_sdpa:compile=true linear:compile=true \
    mean_pool:compile=true

$python scripts/plot_efficiency.py --device "$device" --dtype bfloat16 --num_hidden_layers "$layers"
# Few curves, for the head of the README.
if [[ $device == cpu ]]; then
    $python scripts/plot_efficiency.py --dtype bfloat16 --output_file results/figures/length.png \
        --models roberta_sdpa linformer_package mean_pool:local_window=32 mean_pool
fi
