"""Tiny models and every variant of the projection, for the tests."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hf_linformer import LinformerConfig, LinformerForSequenceClassification
from hf_linformer.modeling_linformer import LinformerPositionBias


TYPES = ("linear", "random", "mean_pool", "max_pool", "convolution")
LEARNED = ("linear", "random", "convolution")
SHARINGS = ("none", "headwise", "key_value", "layerwise")
# The classes that a model to convert is of, and that it is afterwards.
AUTO_CLASSES = {
    "base": AutoModel,
    "masked_lm": AutoModelForMaskedLM,
    "sequence_classification": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
    "question_answering": AutoModelForQuestionAnswering,
}
WORDS = "the of and to in a that for be our we is this by it have with as on which not will are from people".split()


def tiny_config(**changes) -> LinformerConfig:
    """Two layers of four heads; odd sizes, so that a transposed shape cannot pass unseen."""
    sizes = {
        "vocab_size": 53,
        "hidden_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 27,
        "max_position_embeddings": 37,
        "projected_length": 6,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        # Weights of size 1 rather than 0.02: attention is then far from uniform, and a wrong score is seen.
        "initializer_range": 0.5,
    }
    return LinformerConfig(**{**sizes, **changes})


def build(model_class, seed: int = 0, attention: str = "sdpa", dtype: torch.dtype = torch.float32, **changes):
    """A seeded model in eval mode. Biases and norms are random too, for the same reason as above."""
    torch.manual_seed(seed)
    model = model_class._from_config(tiny_config(**changes), attn_implementation=attention, dtype=dtype)
    move_biases_and_norms(model)
    return model.eval()


@torch.no_grad()
def move_biases_and_norms(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name.lower():
            parameter.add_(0.3 * torch.randn_like(parameter))
        elif "position_bias" in name:
            parameter.add_(torch.randn_like(parameter) / LinformerPositionBias.gain)


def variants(windows=(0, 3)) -> list[dict]:
    """Every projection type, sharing mode and window; k by layer and by head; exact short rows."""
    settings = [
        {"projection_type": kind, "projection_sharing": sharing, "local_window": window}
        for kind in TYPES
        for sharing in SHARINGS
        for window in windows
        # The sharing mode has no effect on pooling.
        if kind in LEARNED or sharing == "layerwise"
    ]
    settings += [
        {"projection_type": kind, "projection_sharing": sharing, "local_window": window, "exact_short_sequences": True}
        for kind in LEARNED
        for sharing in ("none", "layerwise")
        for window in windows
    ]
    bias = {"local_window": 3, "local_position_bias": True}
    settings += [bias | {"projection_type": kind} for kind in ("linear", "mean_pool")]
    by_layer, by_head = [7, 4], [[5, 3, 7, 4], [6, 6, 6, 6]]
    for window in windows:
        settings += [
            {"projection_type": "linear", "projected_length": by_layer, "local_window": window},
            {"projection_type": "mean_pool", "projected_length": by_layer, "local_window": window},
            {"projection_type": "mean_pool", "local_window": window, "slot_projections": True},
        ]
        settings += [
            {
                "projection_type": kind,
                "projected_length": by_head,
                "projection_sharing": "none",
                "local_window": window,
                "exact_short_sequences": exact,
            }
            for kind in TYPES
            for exact in ((False, True) if kind in LEARNED else (False,))
        ]
    return settings


def core_variants() -> list[dict]:
    """One setting for every way through the code, for tests that take long: every type, with and without a window."""
    settings = [{"projection_type": kind, "local_window": window} for kind in TYPES for window in (0, 3)]
    by_head = {"projection_sharing": "none", "projected_length": [[5, 3, 7, 4], [6, 6, 6, 6]]}
    settings += [by_head | {"projection_type": kind, "local_window": 3} for kind in ("convolution", "mean_pool")]
    exact = {"projection_sharing": "headwise", "exact_short_sequences": True}
    settings += [{"projection_type": "mean_pool", "local_window": w, "slot_projections": True} for w in (0, 3)]
    settings += [{"projection_type": "mean_pool", "local_window": 3, "local_position_bias": True}]
    return settings + [exact | {"projection_type": "linear", "local_window": window} for window in (0, 3)]


def variant_id(settings: dict) -> str:
    k = settings.get("projected_length", 6)
    by = "" if isinstance(k, int) else "-k_by_head" if isinstance(k[0], list) else "-k_by_layer"
    exact = "-exact" if settings.get("exact_short_sequences") else ""
    sharing = settings.get("projection_sharing", "layerwise")
    own = "-slot_projections" if settings.get("slot_projections") else ""
    own += "-position_bias" if settings.get("local_position_bias") else ""
    return f"{settings.get('projection_type', 'linear')}-{sharing}-w{settings.get('local_window', 0)}{by}{exact}{own}"


def save_classifier(folder: Path, labels: list[str], **changes) -> Path:
    """A seeded one-layer classifier of up to 24 tokens, saved with the repository's tokenizer."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
        "projected_length": 8,
        "projection_type": "mean_pool",
        "id2label": dict(enumerate(labels)),
        "label2id": {name: index for index, name in enumerate(labels)},
        "problem_type": "single_label_classification",
    }
    LinformerForSequenceClassification(LinformerConfig(**{**sizes, **changes})).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "tokenizer")
    tokenizer.model_max_length = 24
    tokenizer.save_pretrained(folder)
    return folder


def tiny_tokenizer(pad_token_id: int) -> PreTrainedTokenizerFast:
    """Of some WORDS, with BERT's special tokens (pads are 0) or RoBERTa's (pads are 1)."""
    if pad_token_id == 0:
        special = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    else:
        special = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
    vocabulary = {token: index for index, token in enumerate([*special.values(), *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    first, last = special["cls"], special["sep"]
    tokenizer.post_processor = processors.BertProcessing((last, vocabulary[last]), (first, vocabulary[first]))
    names = {f"{name}_token": token for name, token in special.items()}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=24, **names)


def source_config(model_type: str, **changes) -> PreTrainedConfig:
    """Of a model to convert that reads up to 24 tokens, with the sizes of `tiny_config`."""
    sizes = {"vocab_size": 53, "hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"max_position_embeddings": 24, "pad_token_id": 0, "initializer_range": 0.5}
    if model_type == "distilbert":
        sizes |= {"hidden_dim": 27, "dropout": 0.03, "attention_dropout": 0.07, "seq_classif_dropout": 0.11}
    else:
        sizes |= {"intermediate_size": 27, "hidden_dropout_prob": 0.03, "attention_probs_dropout_prob": 0.07}
        sizes |= {"classifier_dropout": 0.11, "layer_norm_eps": 1e-3}
    if model_type in ("roberta", "xlm-roberta", "camembert"):
        # Their first two rows of positions belong to no token.
        sizes |= {"max_position_embeddings": 26, "pad_token_id": 1}
    return AutoConfig.for_model(model_type, **{**sizes, **changes})


def save_source(folder: Path, model_type: str, head="base", dtype=torch.float32, **changes) -> PreTrainedModel:
    """A seeded model to convert, saved with a tokenizer. head: one of AUTO_CLASSES, or a class"""
    torch.manual_seed(0)
    config = source_config(model_type, **changes)
    model = AUTO_CLASSES[head].from_config(config) if isinstance(head, str) else head(config)
    move_biases_and_norms(model)
    model = model.eval().to(dtype)
    model.save_pretrained(folder)
    tiny_tokenizer(config.pad_token_id).save_pretrained(folder)
    return model
