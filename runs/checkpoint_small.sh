#!/bin/bash
# checkpoints/linformer-small, made again: the run of the pretraining study, about an hour on two cores, if its output is
# not there; then in half precision. The model card stays.
#     bash runs/checkpoint_small.sh FOLDER          # default ../shared/data; see runs/pretraining_study.sh
set -euo pipefail
cd "$(dirname "$0")/.."
name=mean_128_window_32_bias_quick
MODELS=$name bash runs/pretraining_study.sh "${1:-../shared/data}" 1
HF_HUB_OFFLINE=1 .venv/bin/python - "output/pretraining/$name-1-2000" checkpoints/linformer-small <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from hf_linformer import LinformerForMaskedLM

source, folder = sys.argv[1:]
LinformerForMaskedLM.from_pretrained(source, dtype=torch.float16).save_pretrained(folder)
AutoTokenizer.from_pretrained(source).save_pretrained(folder)
# A small file, which is used in single precision.
config = Path(folder, "config.json")
config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n")
PYTHON
