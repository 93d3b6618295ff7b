"""The masked language model that ships: whole, in half precision, and it has learned from its context.

python -m pytest tests/test_checkpoint_small.py
"""

from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline


CHECKPOINT = Path(__file__).parents[1] / "checkpoints/linformer-small"
SPEECHES = Path(__file__).parents[1] / "data/sotu/dev.parquet"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def model():
    return AutoModelForMaskedLM.from_pretrained(CHECKPOINT, trust_remote_code=True).eval()


def test_is_half_precision_and_whole(model):
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118
    assert (CHECKPOINT / "model.safetensors").stat().st_size < 50e6
    assert model.dtype == torch.float32 and model.config.local_position_bias
    for name in ("configuration_linformer.py", "modeling_linformer.py"):
        assert (CHECKPOINT / name).read_text() == (CHECKPOINT.parents[1] / name).read_text(), f"{name} is out of date"


def test_fills_masks_with_words_that_fit():
    fill = pipeline("fill-mask", str(CHECKPOINT), trust_remote_code=True, device="cpu")
    for text, fitting in {
        "He opened the<mask> and went in.": {" door", " gate", " window"},
        "She put her hand on his<mask>.": {" arm", " shoulder", " hand", " head"},
        "They had been there for three<mask>.": {" days", " weeks", " months", " years", " hours"},
    }.items():
        assert {guess["token_str"] for guess in fill(text)} & fitting, fill(text)


@torch.no_grad()
def test_predicts_words_of_speeches_by_their_order(model, tokenizer):
    """Words of speeches, which it has not read, are likelier in their context than with its words shuffled."""
    generator = torch.Generator().manual_seed(0)
    losses = {}
    texts = pd.read_parquet(SPEECHES)["text"][:8].tolist()
    inputs = tokenizer(texts, max_length=128, truncation=True, padding="max_length", return_tensors="pt")["input_ids"]
    assert (inputs != tokenizer.pad_token_id).all()
    masked = torch.rand(inputs.shape, generator=generator) < 0.15
    masked[:, [0, -1]] = False
    labels = inputs.masked_fill(~masked, -100)
    for order in ("as it is", "shuffled"):
        given = inputs.masked_fill(masked, tokenizer.mask_token_id)
        if order == "shuffled":
            for row in range(len(given)):
                seen = (~masked[row]).nonzero()[1:-1, 0]
                given[row, seen] = given[row, seen[torch.randperm(len(seen), generator=generator)]]
        losses[order] = model(given, labels=labels).loss.item()
    assert losses["as it is"] < losses["shuffled"] - 1
