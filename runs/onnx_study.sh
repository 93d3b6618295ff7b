#!/bin/bash
# results/onnx.csv: the demo's classifier, and encoders of BERT-base's size with random weights, in PyTorch, onnxruntime
# and onnxruntime with 8-bit weights. About ten minutes on two cores, best left alone; needs `make demo` once.
#     bash runs/onnx_study.sh
set -euo pipefail
cd "$(dirname "$0")/.."
results=results/onnx.csv
python=.venv/bin/python
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}

study() { # name, model, options
    if grep -qs -e "--run_name $1 " "$results"; then return; fi
    $python scripts/export_onnx.py --run_name "$1" --model_name_or_path "$2" --output_dir "output/onnx_study/$1" \
        --overwrite_output_dir true --quantize int8 --results_file "$results" "${@:3}"
}

random_base() { # folder, window
    $python - "$1" "$2" <<'PYTHON'
import sys

import torch
from transformers import AutoTokenizer

from hf_linformer import LinformerConfig, LinformerModel

torch.manual_seed(0)
config = LinformerConfig.from_pretrained(
    "configs/base.json",
    max_position_embeddings=2048,
    projection_type="mean_pool",
    projected_length=128,
    local_window=int(sys.argv[2]),
)
LinformerModel(config, add_pooling_layer=False).save_pretrained(sys.argv[1])
AutoTokenizer.from_pretrained("tokenizer").save_pretrained(sys.argv[1])
PYTHON
}

study demo demo --validation_file data/sotu/dev.parquet --label_column label_text
for window in 0 32; do
    folder=output/onnx_study/random_base_$window
    [[ -d $folder ]] || random_base "$folder" "$window"
    study "base_window_$window" "$folder" --num_repeats 5
done
