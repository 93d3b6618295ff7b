"""The hidden states of a source model, also for texts longer than it can read: the target of a conversion.

Shared by scripts/convert.py, which compares, and scripts/distill.py, which trains.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel


def encoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The encoder of a model with or without a head."""
    return getattr(model, model.base_model_prefix, model)


def window_starts(length: int, size: int) -> list[int]:
    """Where windows of `size` tokens begin that overlap by half and cover `length` tokens, the last at the end."""
    if length <= size:
        return [0]
    return [*range(0, length - size, max(size // 2, 1)), length - size]


def states_of(encoder: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Embeddings and every layer's output, of rows that the encoder can read: (B, N) -> (B, layers + 1, N, D)"""
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    output = encoder(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
    return torch.stack(output.hidden_states, dim=1)


def states_of_windows(encoder: PreTrainedModel, row: Tensor, n: int) -> Tensor:
    """States of one row of any length from windows of n tokens: (N,) -> (layers + 1, N, D)

    Each window is read between the row's first and last token, which are special ones. Windows overlap by half, and a
    token's states are those of the window that it stands nearest to the middle of.
    """
    N = len(row)
    if N <= n:
        return states_of(encoder, row[None])[0]
    inner, size = row[1:-1], n - 2
    starts = torch.tensor(window_starts(len(inner), size), device=row.device)
    windows = inner[starts[:, None] + torch.arange(size, device=row.device)]  # (W, n - 2)
    special = row[[0, -1]].expand(len(starts), 2)
    windows = torch.cat([special[:, :1], windows, special[:, 1:]], dim=1)
    states = torch.cat([states_of(encoder, window[None]) for window in windows])  # (W, layers + 1, n, D)

    token = torch.arange(len(inner), device=row.device)
    middle = starts + (size - 1) / 2
    nearest = (token[:, None] - middle).abs().argmin(dim=1)
    inner_states = states[nearest, :, token - starts[nearest] + 1]  # (N - 2, layers + 1, D)
    return torch.cat([states[:1, :, 0], inner_states, states[-1:, :, -1]]).transpose(0, 1)
