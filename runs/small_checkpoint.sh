#!/bin/bash
# checkpoints/linformer-small: the best variant of runs/pretraining_study.sh, its weights in half the bytes. The training
# takes an hour on a core; one that was killed goes on.
#     bash runs/small_checkpoint.sh FOLDER                 # default ../shared/data, which has gutenberg/
set -euo pipefail
cd "$(dirname "$0")/.."
export STEPS=3000 MODELS=mean_128_window_32_muon
bash runs/pretraining_study.sh "${1:-../shared/data}" 1
.venv/bin/python - "output/pretraining/$MODELS-1-$STEPS" checkpoints/linformer-small <<'END'
import json
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from hf_linformer import LinformerForMaskedLM

trained, folder = sys.argv[1], Path(sys.argv[2])
LinformerForMaskedLM.from_pretrained(trained, dtype=torch.bfloat16).save_pretrained(folder)
AutoTokenizer.from_pretrained(trained).save_pretrained(folder)
# Kept in two bytes, used in four, which is what CPUs are good at.
config = json.loads((folder / "config.json").read_text())
(folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
END
