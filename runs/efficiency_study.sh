#!/bin/bash
# Time and memory against length, forward and training: results/efficiency.csv and its figures, and where the time goes:
# results/profile.csv. Two hours on two cores; run it alone on the machine. A command whose rows are in the CSV is not
# repeated, so it goes on where it was ended.
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

twins=(roberta_sdpa roberta_eager)
ours=(linear mean_pool mean_pool:local_window=32)
packages=(linformer_package linformer_pytorch_package)

# bfloat16, forward: every model, then what grows with k, as in the paper's table.
for n in 4096 512 8192 2048 1024; do
    measure --lengths "$n" --dtype bfloat16
    measure --lengths "$n" --dtype bfloat16 --models "${twins[@]}" "${ours[@]}" --projected_lengths 256 512
done
# Where full attention takes minutes a step: three steps at most of the others, and one of its own.
measure --lengths 65536 --dtype bfloat16 --repeats 3 --models roberta_sdpa "${ours[@]}" --projected_lengths 128 256 512
measure --lengths 16384 --dtype bfloat16 --repeats 3 --models "${twins[@]}" modernbert_sdpa longformer "${packages[@]}" \
    "${ours[@]}" --projected_lengths 128 256 512
measure --lengths 32768 --dtype bfloat16 --repeats 3 --models roberta_sdpa longformer "${packages[@]}" "${ours[@]}" \
    --projected_lengths 128 256 512
# One text at a time.
for n in 512 1024 2048; do
    measure --lengths "$n" --dtype bfloat16 --batch_size 1 --models "${twins[@]}" "${ours[@]}"
done

# float32, forward.
if [[ $device == cpu ]]; then
    for n in 512 4096; do measure --lengths "$n" --dtype float32 --repeats 3; done
    for n in 1024 2048 8192; do
        measure --lengths "$n" --dtype float32 --repeats 3 --models "${twins[@]}" roberta_sdpa_tiled "${packages[@]}" \
            "${ours[@]}"
    done
    measure --lengths 16384 --dtype float32 --repeats 3 --models roberta_sdpa "${ours[@]}"
fi

# Training: every length, and what else there is at the two ends.
for n in 512 4096; do
    measure --lengths "$n" --dtype bfloat16 --mode training --repeats 3 --models "${twins[@]}" modernbert_sdpa \
        longformer nystromformer "${packages[@]}" "${ours[@]}"
    [[ $device == cuda ]] ||
        measure --lengths "$n" --dtype float32 --mode training --repeats 3 --models "${twins[@]}" "${ours[@]}"
done
for n in 1024 2048 8192; do
    measure --lengths "$n" --dtype bfloat16 --mode training --repeats 3 --models "${twins[@]}" "${ours[@]}"
done
# What bounds all of them: results/profile.csv.
profile() { # options of scripts/profile_steps.py
    local options=("$@" --dtype bfloat16 --num_hidden_layers "$layers" --device "$device")
    options+=(--results_file results/profile.csv)
    if grep -qsF -e "scripts/profile_steps.py ${options[*]}" results/profile.csv; then return; fi
    $python scripts/profile_steps.py "${options[@]}"
}
profile --lengths 512 4096
profile --lengths 512 4096 --mode training

# What the tiles do that a layer is worked through in, and E before the linears of keys and values in place of behind.
for n in 512 4096; do
    measure --lengths "$n" --dtype bfloat16 --models roberta_sdpa linear linear:projection_sharing=none \
        linear:inference_chunk_size=0 mean_pool mean_pool:inference_chunk_size=0 mean_pool:local_window=32 \
        mean_pool:local_window=32,inference_chunk_size=0
done

# How large the tiles should be.
w=mean_pool:local_window=32
measure --lengths 4096 --dtype bfloat16 --models roberta_sdpa "$w" "$w,inference_chunk_size=1024" \
    "$w,inference_chunk_size=2048" "$w,inference_chunk_size=0" linear:inference_chunk_size=1024 linear

# What each option of training does to time and memory.
measure --lengths 4096 --mode training --head masked_lm --dtype bfloat16 --models roberta_sdpa mean_pool \
    mean_pool:dtype=float32 mean_pool:gradient_checkpointing=true mean_pool:sparse_prediction=true
# A whole model of BERT's size over one long text.
[[ $device == cuda ]] || layers=12 measure --lengths 65536 --dtype bfloat16 --repeats 1 --models mean_pool \
    mean_pool:local_window=32
# At the sizes of runs/pretraining_study.sh, and what its bias costs.
layers=4 measure --lengths 512 2048 --mode training --dtype bfloat16 --hidden_size 256 --num_attention_heads 4 \
    --intermediate_size 1024 --max_seconds 30 \
    --models roberta_sdpa "${ours[@]}" mean_pool:local_window=32,local_position_bias=true
# Rows that two blocks of a window hold, and those that they do not.
measure --lengths 64 --dtype bfloat16 --projected_lengths 32 --models roberta_sdpa mean_pool mean_pool:local_window=16 \
    mean_pool:local_window=32 mean_pool:local_window=64
# What torch.compile does.
measure --lengths 4096 --dtype bfloat16 --models roberta_sdpa linear mean_pool roberta_sdpa:compile=true linear:compile=true \
    mean_pool:compile=true

if [[ $device == cpu ]]; then
    for n in 32768 65536; do measure --lengths "$n" --dtype float32 --repeats 3 --models "${ours[@]}"; done
fi

$python scripts/plot_efficiency.py --device "$device" --dtype bfloat16 --num_hidden_layers "$layers"
# Few curves, for the head of the README.
if [[ $device == cpu ]]; then
    $python scripts/plot_efficiency.py --dtype bfloat16 --output_file results/figures/length.png \
        --models roberta_sdpa linformer_package mean_pool:local_window=32 mean_pool
fi
