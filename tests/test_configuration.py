"""What the configuration refuses, and why; what it keeps through a file.

python -m pytest tests/test_configuration.py
"""

from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer

from hf_linformer import LinformerConfig, LinformerModel
from tiny import tiny_config


ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"projected_length": 38}, r"k = 38.*n = 37"),
        ({"projected_length": 0}, "between 1 and"),
        ({"projected_length": [6]}, "lists 1 layers.*num_hidden_layers=2"),
        ({"projected_length": [6, 38]}, "between 1 and"),
        ({"projected_length": [[6, 6, 6, 6], [6, 6, 6, 6]]}, "projection_sharing='none'"),
        ({"projected_length": [[6, 6], [6, 6]], "projection_sharing": "none"}, "lists 2 heads.*num_attention_heads=4"),
        ({"projection_type": "mean_pool", "projected_length": 1}, "needs `projected_length` >= 2"),
        ({"projection_type": "max_pool", "projected_length": [6, 1]}, "needs `projected_length` >= 2"),
        ({"projection_type": "mean_pool", "exact_short_sequences": True}, "by itself"),
        ({"projection_type": "convolution", "projected_length": [6, 4]}, "cannot share one"),
        ({"projection_type": "random", "projected_length": [6, 4]}, "cannot share them"),
        ({"projection_init": "segment_mean", "projected_length": [6, 4]}, "the beginning of the text only"),
        ({"problem_type": "foo"}, "problem_type"),
        ({"local_window": -1}, "between 0"),
        ({"local_window": 38}, r"max_position_embeddings` \(37\)"),
        ({"hidden_size": 21}, "multiple of `num_attention_heads`"),
        ({"hidden_act": "glue"}, "hidden_act.*'gelu'"),
        ({"hidden_dropout_prob": 1.5}, "probability"),
        ({"classifier_dropout": -0.1}, "probability"),
        ({"pad_token_id": 53}, "between 0 and 52"),
        ({"num_hidden_layers": 0}, "at least 1"),
        ({"is_decoder": True}, "cannot be a decoder"),
        ({"add_cross_attention": True}, "cannot be a decoder"),
        ({"projection_type": "conv"}, "mean_pool"),
        ({"projection_sharing": "kv"}, "key_value"),
        ({"classifier_pooling": "max"}, "mean"),
        ({"classifier_activation": "glue"}, "classifier_activation.*'tanh'"),
        ({"embedding_size": 0}, "`embedding_size` must be at least 1"),
        ({"local_position_bias": True}, "needs a `local_window`"),
        ({"slot_projections": True}, "needs `projection_type='mean_pool'` .not 'linear'"),
        (
            {
                "slot_projections": True,
                "projection_type": "mean_pool",
                "projection_sharing": "none",
                "projected_length": [[6, 5, 6, 6], [6, 6, 6, 6]],
            },
            "same k for all heads",
        ),
        ({"hidden_size": "20"}, "hidden_size"),
        ({"projected_length": 6.0}, "projected_length"),
    ],
)
def test_impossible_settings_are_refused_with_the_reason(changes, reason):
    with pytest.raises(StrictDataclassError, match=f"(?s){reason}"):
        tiny_config(**changes)


def test_survives_a_file(tmp_path):
    config = tiny_config(projected_length=[[5, 3, 7, 4], [6, 6, 6, 6]], projection_sharing="none", local_window=4)
    config.save_pretrained(tmp_path)
    loaded = LinformerConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.projected_length == [[5, 3, 7, 4], [6, 6, 6, 6]]
    assert set(loaded.auto_map) >= {"AutoConfig", "AutoModel", "AutoModelForMaskedLM", "AutoModelForQuestionAnswering"}


def test_refuses_a_file_that_was_edited_into_nonsense(tmp_path):
    config = tiny_config()
    config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"projected_length": 6', '"projected_length": 600'))
    with pytest.raises(StrictDataclassError, match="k = 600"):
        LinformerConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"projected_length": 1}, "needs `projected_length` >= 2"),
        ({"projected_length": [4]}, "lists 1 layers"),
        ({"projected_length": 500}, r"k = 500.*n = 37"),
        ({"local_window": -1}, "between 0"),
        ({"local_window": 38}, r"max_position_embeddings` \(37\)"),
        ({"local_position_bias": True}, "needs a `local_window`"),
        ({"exact_short_sequences": True}, "by itself"),
        ({"problem_type": "foo"}, "problem_type"),
    ],
)
def test_impossible_settings_are_refused_where_a_checkpoint_is_loaded(changes, reason, tmp_path):
    LinformerModel(tiny_config(projection_type="mean_pool")).save_pretrained(tmp_path)
    assert LinformerModel.from_pretrained(tmp_path, local_window=4).config.local_window == 4
    with pytest.raises(StrictDataclassError, match=f"(?s){reason}"):
        LinformerModel.from_pretrained(tmp_path, **changes)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_configurations_are_for_the_shipped_tokenizer(path):
    config, unknown = LinformerConfig.from_pretrained(path, return_unused_kwargs=True)
    assert not unknown
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tokenizer")
    assert config.vocab_size == len(tokenizer)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (1, 0, 2)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 0, 2)


def test_defaults_are_a_model_of_the_size_of_roberta_base():
    config = LinformerConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (768, 12, 12)
    assert (config.projected_length, config.projection_type, config.projection_sharing) == (128, "linear", "layerwise")
    assert (config.local_window, config.exact_short_sequences, config.projection_init) == (0, False, "normal")
