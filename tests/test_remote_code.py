"""What users do with a saved folder: fresh processes, Auto classes with `trust_remote_code`, pipelines, saving again.

python -m pytest tests/test_remote_code.py
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, pipeline

from hf_linformer import (
    LinformerForMaskedLM,
    LinformerForMultipleChoice,
    LinformerForQuestionAnswering,
    LinformerForSequenceClassification,
    LinformerForTokenClassification,
    LinformerModel,
)
from tiny import LEARNED, SHARINGS, TYPES, build


ROOT = Path(__file__).parents[1]
HEADS = {
    "AutoModel": LinformerModel,
    "AutoModelForPreTraining": LinformerForMaskedLM,
    "AutoModelForMaskedLM": LinformerForMaskedLM,
    "AutoModelForSequenceClassification": LinformerForSequenceClassification,
    "AutoModelForTokenClassification": LinformerForTokenClassification,
    "AutoModelForQuestionAnswering": LinformerForQuestionAnswering,
    "AutoModelForMultipleChoice": LinformerForMultipleChoice,
}
# Loads each folder by its Auto class, saves it again, loads that, and prints the sums of the first outputs.
LOAD_AND_SAVE = """
import json, sys, torch, transformers
for auto_class, folder in json.loads(sys.argv[1]).items():
    auto = getattr(transformers, auto_class)
    ids = torch.arange(3, 20)[None]
    ids = ids[:, None] if "MultipleChoice" in auto_class else ids
    for step in range(2):
        model, info = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        assert "transformers_modules" in type(model).__module__, type(model).__module__
        output = model.eval()(ids)[0]
        print(json.dumps([auto_class, step, type(model).__name__, output.flatten().tolist()]))
        folder = folder + "-again"
        model.save_pretrained(folder)
assert "hf_linformer" not in sys.modules
"""


def save(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("window", [0, 3])
def test_every_auto_class_loads_in_a_fresh_process(tmp_path, window):
    folders, models = {}, {}
    for auto_class, model_class in HEADS.items():
        models[auto_class] = build(
            model_class, local_window=window, projection_sharing="headwise", initializer_range=0.2
        )
        folders[auto_class] = str(save(models[auto_class], tmp_path / auto_class))
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    run = subprocess.run(
        [sys.executable, "-c", LOAD_AND_SAVE, json.dumps(folders)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(lines) == 2 * len(HEADS), run.stdout
    for auto_class, _, name, numbers in lines:
        assert name == HEADS[auto_class].__name__
        ids = torch.arange(3, 20)[None]
        output = models[auto_class](ids[:, None] if "MultipleChoice" in auto_class else ids)[0]
        torch.testing.assert_close(torch.tensor(numbers), output.flatten(), rtol=0, atol=1e-5)


def test_one_head_loads_into_another_from_the_same_encoder(tmp_path):
    masked_lm = build(LinformerForMaskedLM, projection_sharing="headwise")
    folder = save(masked_lm, tmp_path / "masked_lm")
    classifier, info = LinformerForSequenceClassification.from_pretrained(
        folder, num_labels=4, output_loading_info=True
    )
    assert all(name.startswith("classifier.") for name in info["missing_keys"])
    encoder = masked_lm.linformer.state_dict()
    assert all(torch.equal(weight, encoder[name]) for name, weight in classifier.linformer.state_dict().items())
    assert all(torch.isfinite(p).all() and p.abs().max() < 10 for p in classifier.parameters())


def test_a_missing_matrix_is_drawn_anew_and_the_others_stay(tmp_path):
    model = build(LinformerModel, projection_sharing="headwise")
    folder = save(model, tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["layers.0.attention.projection.F"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    loaded, info = LinformerModel.from_pretrained(folder, output_loading_info=True)
    assert set(info["missing_keys"]) == {"layers.0.attention.projection.F"}
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in weights.items())
    assert 0.3 < loaded.layers[0].attention.projection.F.std() < 0.7, "initializer_range is 0.5"


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("sharing", SHARINGS)
def test_safetensors_hold_every_matrix_once(tmp_path, kind, sharing):
    model = build(LinformerForMaskedLM, projection_type=kind, projection_sharing=sharing)
    folder = save(model, tmp_path)
    weights = load_file(folder / "model.safetensors")
    count = sum(name.endswith((".E", ".F")) for name in weights)
    expected = {"none": 4, "headwise": 4, "key_value": 2, "layerwise": 1}[sharing] if kind in LEARNED else 0
    assert count == expected
    assert "lm_head.decoder.weight" not in weights, "tied to the word embeddings"
    loaded = LinformerForMaskedLM.from_pretrained(folder)
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in loaded.state_dict().items())
    assert loaded.lm_head.decoder.weight is loaded.linformer.embeddings.word_embeddings.weight


def test_a_checkpoint_loads_with_any_window_and_pooling(tmp_path):
    folder = save(build(LinformerModel, projection_type="mean_pool"), tmp_path)
    for changes in ({"local_window": 4}, {"projected_length": 12}, {"projection_type": "max_pool"}):
        _, info = LinformerModel.from_pretrained(folder, output_loading_info=True, **changes)
        assert not info["missing_keys"] and not info["unexpected_keys"]


def test_resized_embeddings_are_saved_tied(tmp_path):
    model = build(LinformerForMaskedLM)
    model.resize_token_embeddings(60)
    loaded = LinformerForMaskedLM.from_pretrained(save(model, tmp_path))
    assert loaded(torch.tensor([[59, 58]])).logits.shape == (1, 2, 60)
    assert loaded.lm_head.decoder.weight is loaded.linformer.embeddings.word_embeddings.weight


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "tokenizer")


def saved_with_tokenizer(model_class, folder: Path, tokenizer, **changes) -> str:
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 64}
    model = build(model_class, initializer_range=0.02, **sizes, **changes)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_pipelines(tmp_path, tokenizer):
    text = "Fellow citizens of the Senate and of the House of Representatives"
    folder = saved_with_tokenizer(LinformerForMaskedLM, tmp_path / "mlm", tokenizer)
    fill = pipeline("fill-mask", folder, trust_remote_code=True)
    answers = fill(f"{text} and<mask> of the<mask>.", top_k=3)
    assert len(answers) == 2 and all(0 < answer["score"] <= 1 for mask in answers for answer in mask)

    labels = {"id2label": {0: "then", 1: "now"}, "label2id": {"then": 0, "now": 1}}
    folder = saved_with_tokenizer(LinformerForSequenceClassification, tmp_path / "text", tokenizer, **labels)
    classify = pipeline("text-classification", folder, trust_remote_code=True)
    alone = classify(text)[0]
    assert alone["label"] in ("then", "now")
    batched = classify([text, text * 4], batch_size=2)
    assert batched[0]["score"] == pytest.approx(alone["score"], abs=1e-5), "padded beside a longer text"

    folder = saved_with_tokenizer(LinformerForTokenClassification, tmp_path / "tokens", tokenizer, **labels)
    tags = pipeline("token-classification", folder, trust_remote_code=True, aggregation_strategy="simple")(text)
    assert tags and {tag["entity_group"] for tag in tags} <= {"then", "now"}

    folder = saved_with_tokenizer(LinformerModel, tmp_path / "features", tokenizer)
    features = pipeline("feature-extraction", folder, trust_remote_code=True, return_tensors=True)(text)
    assert features.shape == (1, len(tokenizer(text)["input_ids"]), 20)


def test_half_written_weights_are_refused(tmp_path):
    folder = save(build(LinformerModel), tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Exception, match="(?i)incomplete|invalid|header|buffer"):
        LinformerModel.from_pretrained(folder)
