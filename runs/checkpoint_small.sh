#!/bin/bash
# checkpoints/linformer-small, made again: the run of the pretraining study, about an hour on two cores, if its output is
# not there; then in half precision. The model card stays.
#     bash runs/checkpoint_small.sh FOLDER          # default ../shared/data; see runs/pretraining_study.sh
set -euo pipefail
cd "$(dirname "$0")/.."
name=mean_128_window_32_bias_quick
run=output/pretraining/$name-1-2000
# The study passes over a run whose row is in its CSV, and the weights may be gone.
[[ -f $run/model.safetensors ]] ||
    RESULTS=$(mktemp) MODELS=$name STEPS=2000 bash runs/pretraining_study.sh "${1:-../shared/data}" 1
HF_HUB_OFFLINE=1 .venv/bin/python - "$run" checkpoints/linformer-small <<'PYTHON'
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
