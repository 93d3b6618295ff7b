"""The models that scripts/benchmark.py compares: one function a family, all of the same size, none with dropout.

Where the families differ:
  - RoBERTa tiled runs its feed-forward layers on about 512 tokens at a time, whose states stay in the cache.
  - ModernBERT has gated feed-forward layers of three matrices: its intermediate size is 2/3 of the others', so that it
    has as many feed-forward parameters. Every third layer attends to the whole row, the others to a window of 128.
  - Longformer has a window of 512 tokens and no global tokens.
  - Nyströmformer has 64 landmarks, averaged over the row's own length (its default takes the O(n^2) path).
  - The packages `linformer` and `linformer-pytorch` are encoders of embeddings; words and positions are put in front.
    The first has an E and an F in every layer and no sharing over layers, the second shares one E as ours does.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    LongformerConfig,
    ModernBertConfig,
    NystromformerConfig,
    PreTrainedConfig,
    RobertaConfig,
)

from hf_linformer import LinformerConfig


# Options of a cell that are not keys of the model's configuration.
HARNESS_OPTIONS = ("dtype", "compile", "gradient_checkpointing")
LONGFORMER_WINDOW = 512
NYSTROMFORMER_LANDMARKS = 64
TILE_TOKENS = 512
# Token ids below are special in one family or another; RoBERTa takes one of them for padding.
FIRST_WORD = 5


class UnknownOption(ValueError):
    """An option that the model does not have."""


@dataclass(frozen=True)
class Cell:
    """One measurement: which model, of what size, doing what with which input."""

    model: str
    sequence_length: int
    batch_size: int
    projected_length: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    mode: str = "forward"
    head: str = "none"
    dtype: str = "float32"
    device: str = "cpu"
    num_threads: int = 1
    seed: int = 42
    vocab_size: int = 32768
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072

    @property
    def name(self) -> str:
        """The entry of --models that the cell came from, e.g. `mean_pool:local_window=32`."""
        options = ",".join(f"{key}={str(value).lower()}" for key, value in self.options.items())
        return f"{self.model}:{options}" if options else self.model

    @property
    def config_options(self) -> dict[str, Any]:
        """The options that go to the model's configuration."""
        return {key: value for key, value in self.options.items() if key not in HARNESS_OPTIONS}

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32


def bert_sizes(cell: Cell) -> dict[str, Any]:
    """The keys that BERT and all of its relatives have."""
    return {
        "vocab_size": cell.vocab_size,
        "hidden_size": cell.hidden_size,
        "num_hidden_layers": cell.num_hidden_layers,
        "num_attention_heads": cell.num_attention_heads,
        "intermediate_size": cell.intermediate_size,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def from_config(
    config_class: type[PreTrainedConfig], cell: Cell, attention: str | None = None, **values: Any
) -> nn.Module:
    """A model of Transformers with random weights. `attention` is its back end; None: the family's only one."""
    known = config_class()
    for key in cell.config_options:
        if not hasattr(known, key):
            raise UnknownOption(f"{cell.model} has no option {key!r}")
    config = config_class(**values | cell.config_options)
    auto_class = AutoModelForMaskedLM if cell.head == "masked_lm" else AutoModel
    model = auto_class.from_config(config, attn_implementation=attention)
    if cell.options.get("gradient_checkpointing"):
        model.activation_checkpointing_enable()
    return model


def linformer(cell: Cell) -> nn.Module:
    values = {"max_position_embeddings": cell.sequence_length, "projected_length": cell.projected_length}
    return from_config(LinformerConfig, cell, "sdpa", projection_type=cell.model, **values, **bert_sizes(cell))


def roberta(cell: Cell) -> nn.Module:
    attention = "eager" if cell.model == "roberta_eager" else "sdpa"
    # Its positions count from padding_idx + 1 = 2.
    values = {"max_position_embeddings": cell.sequence_length + 2, **bert_sizes(cell)}
    if cell.model == "roberta_sdpa_tiled":
        # The library cuts along the row and takes only divisors of its length.
        values["chunk_size_feed_forward"] = math.gcd(cell.sequence_length, max(1, TILE_TOKENS // cell.batch_size))
    return from_config(RobertaConfig, cell, attention, **values)


def bert(cell: Cell) -> nn.Module:
    n = cell.sequence_length
    return from_config(BertConfig, cell, "sdpa", max_position_embeddings=n, **bert_sizes(cell))


def modernbert(cell: Cell) -> nn.Module:
    sizes = {key: value for key, value in bert_sizes(cell).items() if "dropout" not in key}
    sizes["intermediate_size"] = cell.intermediate_size * 2 // 3
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
    values = {"max_position_embeddings": cell.sequence_length, **special, **sizes}
    return from_config(ModernBertConfig, cell, "sdpa", **values)


def longformer(cell: Cell) -> nn.Module:
    window = min(LONGFORMER_WINDOW, cell.sequence_length)
    values = {"max_position_embeddings": cell.sequence_length + 2, **bert_sizes(cell)}
    return from_config(LongformerConfig, cell, attention_window=window, **values)


def nystromformer(cell: Cell) -> nn.Module:
    n = cell.sequence_length
    if n % NYSTROMFORMER_LANDMARKS or n == NYSTROMFORMER_LANDMARKS:
        raise ValueError(f"Nyströmformer needs more than {NYSTROMFORMER_LANDMARKS} tokens and a multiple of it")
    values = {"segment_means_seq_len": n, "max_position_embeddings": n, **bert_sizes(cell)}
    return from_config(NystromformerConfig, cell, num_landmarks=NYSTROMFORMER_LANDMARKS, **values)


class EmbeddedEncoder(nn.Module):
    """Word and position embeddings with a layer norm, before an encoder that takes hidden states."""

    def __init__(self, cell: Cell, encoder: nn.Module):
        super().__init__()
        self.word_embeddings = nn.Embedding(cell.vocab_size, cell.hidden_size)
        self.position_embeddings = nn.Embedding(cell.sequence_length, cell.hidden_size)
        self.norm = nn.LayerNorm(cell.hidden_size)
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        """input_ids (B, N) -> last hidden states (B, N, D), alone in a tuple as the library's models give them"""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        return (self.encoder(self.norm(self.word_embeddings(input_ids) + self.position_embeddings(positions))),)


def refuse_options(cell: Cell) -> None:
    """The packages are measured as they are: plain encoders without a head."""
    for key in cell.options:
        if key not in ("dtype", "compile"):
            raise UnknownOption(f"{cell.model} has no option {key!r}")
    if cell.head != "none":
        raise ValueError(f"{cell.model} has no masked-LM head")


def linformer_package(cell: Cell) -> nn.Module:
    refuse_options(cell)
    if cell.intermediate_size != 4 * cell.hidden_size:
        raise ValueError("the feed-forward layers of the package linformer are always 4 x hidden_size wide")
    from linformer import Linformer

    encoder = Linformer(
        dim=cell.hidden_size,
        seq_len=cell.sequence_length,
        depth=cell.num_hidden_layers,
        k=cell.projected_length,
        heads=cell.num_attention_heads,
        dropout=0.0,
    )
    return EmbeddedEncoder(cell, encoder)


def linformer_pytorch_package(cell: Cell) -> nn.Module:
    refuse_options(cell)
    from linformer_pytorch import Linformer

    encoder = Linformer(
        input_size=cell.sequence_length,
        channels=cell.hidden_size,
        dim_k=cell.projected_length,
        dim_ff=cell.intermediate_size,
        nhead=cell.num_attention_heads,
        depth=cell.num_hidden_layers,
        activation="gelu",
        parameter_sharing="layerwise",
        dropout=0.0,
        dropout_ff=0.0,
    )
    return EmbeddedEncoder(cell, encoder)


PROJECTIONS = ("linear", "mean_pool", "max_pool", "convolution", "random")
PACKAGES = {"linformer_package": "linformer", "linformer_pytorch_package": "linformer-pytorch"}
BUILDERS: dict[str, Callable[[Cell], nn.Module]] = {
    **dict.fromkeys(PROJECTIONS, linformer),
    "roberta_eager": roberta,
    "roberta_sdpa": roberta,
    "roberta_sdpa_tiled": roberta,
    "bert_sdpa": bert,
    "modernbert_sdpa": modernbert,
    "longformer": longformer,
    "nystromformer": nystromformer,
    "linformer_package": linformer_package,
    "linformer_pytorch_package": linformer_pytorch_package,
}
# The models with k slots; the others do not depend on --projected_lengths.
HAS_SLOTS = (*PROJECTIONS, *PACKAGES)


def build_model(cell: Cell) -> nn.Module:
    """The model of a cell with random weights, in float32 and eval mode, on the default device.

    Raises `UnknownOption`, `ImportError` for a package that is not installed, and `ValueError` for what cannot be.
    """
    return BUILDERS[cell.model](cell).eval()
