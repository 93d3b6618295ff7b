"""Tiny models and every variant of the projection, for the tests."""

from pathlib import Path

import torch
from transformers import AutoTokenizer

from hf_linformer import LinformerConfig, LinformerForSequenceClassification


TYPES = ("linear", "random", "mean_pool", "max_pool", "convolution")
LEARNED = ("linear", "random", "convolution")
SHARINGS = ("none", "headwise", "key_value", "layerwise")


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
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


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
    by_layer, by_head = [7, 4], [[5, 3, 7, 4], [6, 6, 6, 6]]
    for window in windows:
        settings += [
            {"projection_type": "linear", "projected_length": by_layer, "local_window": window},
            {"projection_type": "mean_pool", "projected_length": by_layer, "local_window": window},
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
    return settings + [exact | {"projection_type": "linear", "local_window": window} for window in (0, 3)]


def variant_id(settings: dict) -> str:
    k = settings.get("projected_length", 6)
    by = "" if isinstance(k, int) else "-k_by_head" if isinstance(k[0], list) else "-k_by_layer"
    exact = "-exact" if settings.get("exact_short_sequences") else ""
    sharing = settings.get("projection_sharing", "layerwise")
    return f"{settings.get('projection_type', 'linear')}-{sharing}-w{settings.get('local_window', 0)}{by}{exact}"


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
