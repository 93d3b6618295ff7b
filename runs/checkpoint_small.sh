#!/bin/bash
# checkpoints/linformer-small, made again: the run of the pretraining study, then as long again twice over other blocks of
# the same books with other masks; in half precision. Two hours on two cores, and what is in output/ is not repeated. The
# model card stays.
#     bash runs/checkpoint_small.sh FOLDER          # default ../shared/data; see runs/pretraining_study.sh
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:-../shared/data}
export HF_HUB_OFFLINE=1
name=mean_128_window_32_bias_quick
start=output/pretraining/$name-1-2000
# The study passes over a run whose row is in its CSV, and the weights may be gone.
[[ -f $start/model.safetensors ]] ||
    RESULTS=$(mktemp) MODELS=$name STEPS=2000 bash runs/pretraining_study.sh "$data" 1
run=output/pretraining/further-2-4000
results=results/pretraining.csv
if grep -qsF -e "--run_name further --seed 2 --max_train_steps 4000 " "$results"; then results=$(mktemp); fi
[[ -f $run/model.safetensors ]] ||
    .venv/bin/python scripts/pretrain.py --run_name further --seed 2 --max_train_steps 4000 --model_name_or_path "$start" \
        --config_overrides hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0 \
        --train_file "$data/gutenberg/train.parquet" --validation_file "$data/gutenberg/validation.parquet" \
        --optim muon --learning_rate 2e-3 --mlm_probability 0.3 --eval_steps 500 --checkpointing_steps 200 \
        --mixed_precision bf16 --output_dir "$run" --resume_from_checkpoint last \
        --results_file "$results"
.venv/bin/python - "$run" checkpoints/linformer-small <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from hf_linformer import LinformerForMaskedLM

source, folder = sys.argv[1:]
LinformerForMaskedLM.from_pretrained(source, dtype=torch.float16).save_pretrained(folder)
AutoTokenizer.from_pretrained(source).save_pretrained(folder)
# A small file, which is used in single precision; and dropout, of no use in one pass over much text, for tasks.
path = Path(folder, "config.json")
dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
config = json.loads(path.read_text()) | {"dtype": "float32", **dropout}
path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
PYTHON
