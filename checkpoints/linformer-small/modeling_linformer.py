# Copyright 2026 The Linformer founders.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Linformer: a BERT whose attention costs O(n), after Wang et al. 2020 (https://arxiv.org/abs/2006.04768).

The one idea: keys and values are projected along the sequence, from N rows to k slots, before the softmax (Eq. 7):

    K' = E (X W_K) + b_K        V' = F (X W_V) + b_V        head = softmax(Q K'^T / sqrt(d)) V'

E and F are `LinformerProjection`, their application is `project_sequence`, the rest is a post-LayerNorm RoBERTa.

What goes beyond the paper:
  - padding is exact. Pads are zeroed before every projection (`mask_padding`), and columns of E belong to positions
    among the real tokens. A row gives the same result alone, padded left or right, with holes, in any batch.
  - slots may be means or maxima of segments that follow the length of each row (`segment_bounds`); rows of up to k
    tokens then get exact softmax attention.
  - `local_window`: in the same softmax a query also attends exactly to its neighbourhood (`attend_nearby`), and with
    `local_position_bias` learns how far from it to look (`LinformerPositionBias`). Rows that are all neighbourhood get
    the plain attention of a BERT.

Letters: B rows in the batch, N tokens in a row, n = max_position_embeddings, k slots (projected_length), H heads,
d head size, D = H d hidden size, G = H if the heads have projections of their own and 1 if they share, w local window.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from .configuration_linformer import LinformerConfig


class Tile(NamedTuple):
    """The tokens start ... end - 1, in rank order, of some rows: few, so that a layer needs little memory."""

    rows: slice
    start: int
    end: int


class TokenLayout(NamedTuple):
    """Where the real tokens of a batch stand; worked out once, used by every layer.

    Attention sees every row in rank order: real tokens first, as they come, pads behind them.
    """

    lengths: Tensor  # (B,) or (1,), real tokens of each row
    mask: Tensor | None = None  # (B, N), True at real tokens, in rank order; None: no pads
    position_ids: Tensor | None = None  # (B, N), in rank order; None: the position is the rank
    order: Tensor | None = None  # (B, N), batch slot of every rank; None: already in rank order
    rank: Tensor | None = None  # (B, N), rank of every batch slot, the inverse of `order`
    known_lengths: list[int] | None = None  # `lengths` where reading them costs nothing: on CPUs, or without pads
    tiles: list[Tile] | None = None  # the parts that a layer is worked through in; None: all at once


class SharedKeys(NamedTuple):
    """What all queries of a row attend to: the slots and, with blocks of a window, behind them the first token."""

    key: Tensor  # (B, H, k, d)
    value: Tensor  # (B, H, k, d)
    bias: Tensor | None  # added to the scores (1 | B, G, 1, k), with blocks (1 | B, G, M, 1, k + 1)
    nearby_bias: Tensor | None = None  # of the neighbourhood of each block, (1 | B, 1, M, 1, 3 w); None: no blocks

    def of(self, tile: Tile, w: int) -> "SharedKeys":
        """What concerns the rows of a tile and, if there are blocks of w, its blocks."""
        blocks = slice(tile.start // w, -(-tile.end // w)) if w else slice(None)
        bias, nearby_bias = (
            bias if bias is None else bias[tile.rows if bias.shape[0] > 1 else slice(None), :, blocks]
            for bias in (self.bias, self.nearby_bias)
        )
        return SharedKeys(self.key[tile.rows], self.value[tile.rows], bias, nearby_bias)


class Slots(NamedTuple):
    """How the N tokens of each row feed the k slots of one layer."""

    E: Tensor | None  # (1 | B, G, k, N); None where segments of tokens are pooled, which takes no matrix
    F: Tensor | None
    fed: Tensor  # (1 | B, G, k), False where no real token feeds the slot
    start: Tensor | None = None  # (1 | B, G, k), the slot stands for the ranks start ... end - 1
    end: Tensor | None = None  # None: every slot sees the whole row
    all_fed: bool = False  # True if that is known without looking: attention then needs no mask
    one_token_each: bool = False  # True if slot i is token i in every row: there is nothing to project

    def cut(self, k: int) -> "Slots":
        """The first k slots, all of which are fed."""
        E = None if self.E is None else self.E[:, :, :k]
        F = E if self.F is self.E or self.F is None else self.F[:, :, :k]
        start, end = (None if bound is None else bound[..., :k] for bound in (self.start, self.end))
        return self._replace(E=E, F=F, fed=self.fed[..., :k], start=start, end=end, all_fed=True)


def batch_shape(input_ids: Tensor | None, inputs_embeds: Tensor | None, n: int) -> tuple[int, int]:
    """B and N of the input; refused if there is none, or if a row is longer than the model's n."""
    if input_ids is not None and inputs_embeds is None:
        name, dims, axes, shape = "input_ids", 2, "(batch, tokens)", tuple(input_ids.shape)
    elif inputs_embeds is not None and input_ids is None:
        name, dims, axes, shape = "inputs_embeds", 3, "(batch, tokens, hidden_size)", tuple(inputs_embeds.shape)
    else:
        raise ValueError("Give either `input_ids` or `inputs_embeds`, exactly one of them.")
    if len(shape) != dims or shape[1] == 0:
        raise ValueError(f"`{name}` must have the shape {axes} with at least one token, not {shape}.")
    B, N = shape[:2]
    if N > n:
        raise ValueError(
            f"A row has {N} tokens and the model takes at most n = {n} (`max_position_embeddings`). Truncate "
            "(`tokenizer(..., truncation=True, max_length=n)`), split the text, or use a model with a larger n."
        )
    return B, N


def token_mask(attention_mask: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """The mask as booleans, True at real tokens, or None if there are no pads."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != shape:
        got = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(
            f"`attention_mask` must be a tensor of shape (batch, tokens) = {tuple(shape)}, non-zero at real tokens, "
            f"and is {got}. Masks over pairs of tokens (3-D, 4-D) cannot work: every slot mixes all tokens of a row."
        )
    mask = attention_mask != 0
    return None if not is_tracing(mask) and bool(mask.all()) else mask


def checked_position_ids(position_ids: Tensor, mask: Tensor | None, shape: tuple[int, int], n: int) -> Tensor:
    """The caller's position ids (B, N) or (1, N), with 0 at pads; refused where they are in no table."""
    if position_ids.shape not in (shape, (1, shape[1])):
        raise ValueError(f"`position_ids` must have the shape {shape} or {(1, shape[1])}, not {position_ids.shape}.")
    if mask is not None:
        position_ids = mask_padding(position_ids.expand(shape), mask)
    if not is_tracing(position_ids) and bool(((position_ids < 0) | (position_ids >= n)).any()):
        raise ValueError(
            f"`position_ids` must lie between 0 and {n - 1} (`max_position_embeddings` is {n}), and reach from "
            f"{int(position_ids.min())} to {int(position_ids.max())}."
        )
    return position_ids


def default_position_ids(mask: Tensor | None, N: int, device: torch.device) -> Tensor:
    """How many real tokens stand before each token: (B, N), or (1, N) without pads."""
    if mask is None:
        return torch.arange(N, device=device)[None]
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)


def layout_tokens(mask: Tensor | None, position_ids: Tensor | None, N: int, device: torch.device) -> TokenLayout:
    """Finds the rank order of a batch. position_ids (B, N) or (1, N) are the caller's, None for the default."""
    if position_ids is None and torch.compiler.is_exporting():
        # An exported graph has to hold for every N up to n. Slicing E would tie it to N < n, a gather does not.
        position_ids = default_position_ids(mask, N, device)
    if mask is None:
        lengths = torch.full((1,), N, device=device)
        known_lengths = None if is_tracing(lengths) else [N]
        return TokenLayout(lengths, position_ids=position_ids, known_lengths=known_lengths)
    lengths = mask.sum(dim=-1)
    known_lengths = lengths.tolist() if device.type == "cpu" and not is_tracing(mask) else None
    if not is_tracing(mask) and bool((mask[:, 1:] <= mask[:, :-1]).all()):
        # Padded right only, as nearly always: the batch is in rank order as it is.
        return TokenLayout(lengths, mask, position_ids, known_lengths=known_lengths)
    rank_of_pad = lengths[:, None] + (~mask).cumsum(dim=-1) - 1
    rank = torch.where(mask, default_position_ids(mask, N, device), rank_of_pad)
    order = rank.argsort(dim=-1)
    position_ids = None if position_ids is None else reorder(position_ids, order)
    ordered_mask = torch.arange(N, device=device) < lengths[:, None]
    return TokenLayout(lengths, ordered_mask, position_ids, order, rank, known_lengths)


def cut_into_tiles(known_lengths: list[int], B: int, N: int, size: int, multiple: int) -> list[Tile]:
    """Divides a batch (B, N) in rank order into tiles of up to `size` tokens: some short rows, or part of a long one.

    They begin at multiples of `multiple`, and end with the last real token of their rows: pads cost nothing.

    known_lengths: the real tokens of every row, or of all
    """
    tiles = []
    rows_of_a_tile = max(1, size // N)
    lengths = known_lengths * B if len(known_lengths) == 1 else known_lengths
    for first_row in range(0, B, rows_of_a_tile):
        rows = slice(first_row, first_row + rows_of_a_tile)
        longest = max(lengths[rows])
        parts = max(1, -(-longest // size))
        tokens = max(1, -(-longest // (parts * multiple))) * multiple
        tiles += [Tile(rows, start, min(start + tokens, longest)) for start in range(0, longest, tokens)]
    return tiles


def join_tiles(tiles: list[Tile], B: int, N: int, make: Callable[[Tile], Tensor]) -> Tensor:
    """What is made of every tile, (rows, tokens, D), in its place: (B, N, D), 0 where no tile is."""
    joined = None
    for tile in tiles:
        made = make(tile)
        if joined is None:
            joined = made.new_zeros(B, N, made.shape[-1])
        joined[tile.rows, tile.start : tile.end] = made
    assert joined is not None
    return joined


def mask_padding(states: Tensor, mask: Tensor | None) -> Tensor:
    """Sets pads to zero, so that they add exactly nothing to a sequence projection, whatever they hold (NaN as well).

    states (B, N, ...), mask (B, N) with True at real tokens, or None if there are no pads.
    """
    if mask is None:
        return states
    mask = mask.reshape(*mask.shape, *[1] * (states.dim() - 2))
    return torch.where(mask, states, states.new_zeros(()))


def project_sequence(states: Tensor, projection: Tensor) -> Tensor:
    """The Linformer's idea, E X: N rows become k, each a weighted sum of them (paper, Eq. 7).

    projection (..., k, N) times states (..., N, C) -> (..., k, C)
    """
    return torch.matmul(projection.to(states.dtype), states)


def reorder(states: Tensor, index: Tensor | None, dim: int = 1) -> Tensor:
    """Takes the tokens, which lie along `dim`, in the order of index (B, N); None leaves them as they are."""
    if index is None:
        return states
    shape = [1] * states.dim()
    shape[0], shape[dim] = index.shape
    return states.gather(dim, index.view(shape).expand_as(states))


def segment_bounds(lengths: Tensor, head_slots: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Divides the real tokens of every row over its slots: slot i stands for the ranks start[i] ... end[i] - 1.

    Slot 0 is the first token's own; the other L - 1 tokens are cut, in order, into min(k, L) - 1 segments as even as
    possible, the longer ones first. For L <= k each slot stands for one token. Slots that are left over are empty
    (start = end = L).

    lengths (B,), head_slots (G, 1) with at most k slots -> start, end (B, G, k)
    """
    lengths = lengths[:, None, None]
    segments = (torch.minimum(lengths, head_slots) - 1).clamp(min=1)
    tokens = (lengths - 1).clamp(min=0)
    size = torch.div(tokens, segments, rounding_mode="floor")
    index = torch.arange(k, device=lengths.device)
    end = 1 + index * size + torch.minimum(index, tokens - size * segments)
    end = torch.minimum(end, lengths)
    return functional.pad(end[..., :-1], (1, 0)), end


def pool_segments(states: Tensor, length: int, k: int, pool: Callable[[Tensor], Tensor]) -> Tensor:
    """The slots of rows that have `length` tokens each: the segments of `segment_bounds` taken as views, no matrix.

    The first token, then segments of size + 1 tokens, then of size tokens. Slots that are left over get 0.

    states (B, N, C) in rank order, pool (B, segments, tokens, C) -> (B, segments, C); returns (B, k, C)
    """
    if length <= k:
        return functional.pad(states[:, :length], (0, 0, 0, k - length))
    size, longer = divmod(length - 1, k - 1)
    shorter = k - 1 - longer
    first, long, short, _ = states.split([1, longer * (size + 1), shorter * size, states.shape[1] - length], dim=1)
    long, short = long.unflatten(1, (longer, size + 1)), short.unflatten(1, (shorter, size))
    return torch.cat([first, pool(long), pool(short)], dim=1)


def mean_of_segments(segments: Tensor) -> Tensor:
    """(B, segments, tokens, C) -> (B, segments, C)"""
    # In bfloat16 a sum takes a tenth of the time of torch's mean on CPUs. In float16 that of a long segment overflows.
    if segments.dtype == torch.float16:
        return segments.mean(dim=2)
    return segments.sum(dim=2) / segments.shape[2]


def maximum_of_segments(segments: Tensor) -> Tensor:
    """(B, segments, tokens, C) -> (B, segments, C)"""
    return segments.amax(dim=2)


def segment_means(start: Tensor, end: Tensor, N: int, dtype: torch.dtype) -> Tensor:
    """The E of mean pooling: row i averages the tokens start[i] ... end[i] - 1. (B, G, k) -> (B, G, k, N)"""
    rank = torch.arange(N, device=start.device)
    member = (start[..., None] <= rank) & (rank < end[..., None])
    return member.to(dtype) / (end - start).clamp(min=1)[..., None]


def segment_maxima(states: Tensor, end: Tensor) -> Tensor:
    """Maximum over every segment, in place of a sequence projection. Empty slots get 0.

    states (B, H, N, d) in rank order, end (1 | B, G, k) -> (B, H, k, d)
    """
    B, H, N, d = states.shape
    k = end.shape[-1]
    # The slot of a token is the number of slots that end before it; pads come out at k, a slot that is thrown away.
    slot = (end[..., None] <= torch.arange(N, device=end.device)).sum(dim=-2)  # (1 | B, G, N)
    slot = slot[..., None].expand(B, H, N, d)
    maxima = states.new_zeros(B, H, k + 1, d).scatter_reduce(2, slot, states, "amax", include_self=False)
    return maxima[:, :, :k]


def fit_projection(projection: Tensor, k: int, position_ids: Tensor | None, N: int) -> Tensor:
    """The first k rows of E, and the columns that belong to the tokens' positions: (G, ., n) -> (1 | B, G, k, N)"""
    if position_ids is None:
        return projection[None, :, :k, :N]
    return projection[:, :k, position_ids].permute(2, 0, 1, 3)


def fed_by_convolution(layout: TokenLayout, stride: Tensor, k: int, N: int) -> Tensor:
    """Whether slot i has a real token at one of the positions i stride ... (i + 1) stride - 1: (1 | B, G, k)"""
    slot = torch.arange(k, device=stride.device)[:, None]
    position = torch.arange(N, device=stride.device)[None] if layout.position_ids is None else layout.position_ids
    feeds = (position[:, None] // stride)[:, :, None] == slot  # (1 | B, G, k, N)
    return (feeds if layout.mask is None else feeds & layout.mask[:, None, None]).any(dim=-1)


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """The precision for sums, softmax and logarithms: float32 for the half precisions."""
    return torch.promote_types(dtype, torch.float32)


def first_token(hidden_states: Tensor, mask: Tensor | None) -> Tensor:
    """The first real token of each row: (B, N, D) -> (B, D)"""
    if mask is None:
        return hidden_states[:, 0]
    first = mask.int().argmax(dim=-1)[:, None, None].expand(-1, 1, hidden_states.shape[-1])
    return hidden_states.gather(1, first)[:, 0]


def mean_of_tokens(hidden_states: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over the real tokens of each row: (B, N, D) -> (B, D); 0 for a row without any."""
    if mask is None:
        return hidden_states.mean(dim=1)
    total = mask_padding(hidden_states, mask).sum(dim=1, dtype=at_least_single(hidden_states.dtype))
    return (total / mask.sum(dim=1, keepdim=True).clamp(min=1)).to(hidden_states.dtype)


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, -inf elsewhere."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, -math.inf)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[Tensor, Tensor]:
    """query (B, H, N, d), key and value (B, H, k, d) -> output (B, N, H, d), probabilities (B, H, N, k)"""
    # The keys are fewer than the scores, so they are scaled. Softmax adds up in float32 for the half precisions.
    scores = torch.matmul(query, (key * scaling).transpose(2, 3))
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = functional.softmax(scores, dim=-1)
    probabilities = functional.dropout(probabilities, p=dropout, training=module.training)
    return torch.matmul(probabilities, value).transpose(1, 2), probabilities


class LinformerEmbeddings(nn.Module):
    def __init__(self, config: LinformerConfig):
        super().__init__()
        width = config.embedding_width
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.widen = nn.Linear(width, config.hidden_size) if width != config.hidden_size else None

    def forward(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.word_embeddings(mask_padding(input_ids, mask))
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(position_ids)
        embeddings = mask_padding(inputs_embeds, mask)  # (B, N, D)
        embeddings = embeddings + self.position_embeddings(position_ids)
        embeddings = embeddings + self.token_type_embeddings(mask_padding(token_type_ids, mask))
        embeddings = self.dropout(self.norm(embeddings))
        return embeddings if self.widen is None else self.widen(embeddings)


class LinformerProjection(nn.Module):
    """The matrices E and F of one layer or, with layerwise sharing, of the whole model (paper, section 4).

    Parameters (G, k, n). With `random` they are buffers: saved, not learned. With `convolution` they are its kernels,
    (G, stride) with stride = ceil(n / k), the longest if heads differ.
    """

    def __init__(self, config: LinformerConfig, slots_per_head: list[int]):
        super().__init__()
        n = config.max_position_embeddings
        self.slots_per_head = slots_per_head
        self.strides = [-(-n // k) for k in slots_per_head] if config.projection_type == "convolution" else None
        groups = config.num_attention_heads if config.projection_sharing == "none" else 1
        shape = (groups, max(slots_per_head), n) if self.strides is None else (groups, max(self.strides))
        new_matrix = nn.Buffer if config.projection_type == "random" else nn.Parameter
        self.n = n
        self.E = new_matrix(torch.empty(shape))
        self.F = None if config.projection_sharing in ("key_value", "layerwise") else new_matrix(torch.empty(shape))

    def forward(self) -> tuple[Tensor, Tensor]:
        """E and F as matrices (G, k, n); the same tensor twice if keys and values share it."""
        E = self.E if self.strides is None else self.unroll(self.E)
        if self.F is None:
            return E, E
        return E, self.F if self.strides is None else self.unroll(self.F)

    def unroll(self, kernel: Tensor) -> Tensor:
        """Convolution with kernel = stride as a matrix: E[i, p] = kernel[p mod stride] if p // stride = i, else 0."""
        position = torch.arange(self.n, device=kernel.device)
        stride = torch.tensor(self.strides, device=kernel.device)[:, None]
        slot = torch.arange(max(self.slots_per_head), device=kernel.device)[:, None]
        taps = (position % stride).expand(kernel.shape[0], -1)  # (G, n)
        feeds = (position // stride)[:, None] == slot  # (1 | G, k, n)
        return torch.where(feeds, kernel.gather(1, taps)[:, None], kernel.new_zeros(()))

    def initial_means(self) -> Tensor:
        """Weights with which slot i averages its share of the n positions, to start from: (1 | H, k, n)

        For a convolution (1 | H, 1): all taps are 1 / stride, also of a last slot that has fewer positions than taps.
        """
        if self.strides is not None:
            return 1 / torch.tensor(self.strides)[:, None]
        slots = torch.tensor(self.slots_per_head)[:, None]
        share = torch.arange(self.n) * slots // self.n  # (1 | H, n)
        member = share[:, None] == torch.arange(max(self.slots_per_head))[:, None]  # (1 | H, k, n)
        return member / member.sum(dim=-1, keepdim=True).clamp(min=1)


class LinformerPositionBias(nn.Module):
    """What a token's score gains by where it stands: a number for every head and offset (Raffel et al. 2020, 2.1).

    A query at i that sees a token at j adds b[j - i] to q k / sqrt(d); i and j count real tokens. The slots and the
    first token, which are seen from everywhere, gain nothing. All b are zero at first: attention as without.
    """

    # Adam moves a weight by hundredths while scores must move by whole numbers; the gain makes up for it.
    gain: int = 64

    def __init__(self, config: LinformerConfig):
        super().__init__()
        self.window = config.local_window
        self.weight = nn.Parameter(torch.empty(config.num_attention_heads, 4 * self.window - 1))

    def forward(self) -> Tensor:
        """For the queries of a block, and the tokens of it and of those on either side: (H, 1, w, 3 w)"""
        w, device = self.window, self.weight.device
        query = torch.arange(w, 2 * w, device=device)[:, None]  # (w, 1), counted from the block before
        token = torch.arange(3 * w, device=device)  # (3 w,)
        offset = token - query  # (w, 3 w), from 1 - 2 w to 2 w - 1
        return self.gain * self.weight[:, None, offset + 2 * w - 1]


class LinformerSelfAttention(nn.Module):
    """Linear attention: N queries, k slots and, with `local_window`, an exact neighbourhood (Eq. 7).

    What is done depends on what is known of the batch without looking at its values:

    | known | then |
    |---|---|
    | all rows have N tokens | only the slots in use are made, and attention needs no mask |
    | pooling, N <= k or N <= 2 w | slot i is token i: plain attention, no projection and no blocks |
    | pooling, the lengths, as on CPUs | segments are pooled where they lie, else by a matrix |
    | no gradient, many tokens | the layer works through them in tiles |
    | nothing (`torch.export`, k by head) | the general way, which holds for all |
    """

    def __init__(self, config: LinformerConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.slots_per_head = config.slots_per_head(layer_idx)
        self.num_slots = max(self.slots_per_head)
        # Called without a mask, attention interfaces take a module for a decoder unless it says otherwise.
        self.is_causal = False

        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)
        self.slot_key = nn.Linear(config.hidden_size, config.hidden_size) if config.slot_projections else None
        self.slot_value = nn.Linear(config.hidden_size, config.hidden_size) if config.slot_projections else None
        self.position_bias = LinformerPositionBias(config) if config.local_position_bias else None
        has_own_projection = not config.uses_pooling and config.projection_sharing != "layerwise"
        self.projection = LinformerProjection(config, self.slots_per_head) if has_own_projection else None

    def forward(
        self,
        hidden_states: Tensor,
        layout: TokenLayout,
        shared_projection: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states (B, N, D) -> output (B, N, D), attention probabilities (B, H, N, keys) if `eager`"""
        states = mask_padding(reorder(hidden_states, layout.order), layout.mask)
        shared = self.build_shared_keys(states, layout, shared_projection)
        # The order of the queries does not matter to slots: without blocks they stay in that of the batch.
        queries, rank = (hidden_states, None) if shared.nearby_bias is None else (states, layout.rank)
        context, probabilities = self.attend(queries, shared, nearby=states, **kwargs)
        if probabilities is not None:
            probabilities = self.pad_unused_slots(reorder(probabilities, rank, dim=2))
        return self.output(reorder(context, rank)), probabilities

    def forward_tile(
        self, states: Tensor, shared: SharedKeys, tile: Tile, **kwargs: Unpack[TransformersKwargs]
    ) -> Tensor:
        """`forward` for the tokens of a tile, of states (B, N, D) in rank order -> (rows, tokens, D)"""
        rows, start, end = tile
        w = 0 if shared.nearby_bias is None else self.config.local_window
        nearby = states[rows, max(start - w, 0) : end + w] if w else None
        context, _ = self.attend(states[rows, start:end], shared.of(tile, w), nearby, min(start, w), **kwargs)
        return self.output(context)

    def build_shared_keys(self, states: Tensor, layout: TokenLayout, shared_projection: Tensor | None) -> SharedKeys:
        """The slots of every row, and what is added to the scores: states (B, N, D) in rank order, 0 at pads."""
        E, F = (shared_projection, shared_projection) if self.projection is None else self.projection()
        slots = self.build_slots(E, F, layout, states)
        key, value = self.project_keys_and_values(states, slots, layout)  # (B, H, k, d)
        if not self.config.local_window or (slots.one_token_each and not self.always_needs_blocks):
            return SharedKeys(key, value, self.slot_bias(slots, key.dtype))
        first = states[:, :1]
        key = torch.cat([key, self.split_heads(self.key(first))], dim=2)
        value = torch.cat([value, self.split_heads(self.value(first))], dim=2)
        return SharedKeys(key, value, *self.neighbourhood_bias(slots, layout, states.shape[1], key.dtype))

    def attend(
        self,
        queries: Tensor,
        shared: SharedKeys,
        nearby: Tensor | None,
        before: int = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor | None]:
        """softmax(Q K^T / sqrt(d) + bias) V for states (B, N, D) -> (B, N, D), (B, H, N, keys) if `eager`

        nearby: the same tokens and, where there are any, w on either side; `before` of them stand before the first.
        """
        query = self.split_heads(self.query(queries))
        if shared.nearby_bias is not None:
            assert nearby is not None
            context, probabilities = self.attend_nearby(query, shared, nearby, before)
        else:
            interface = self.attention_interface(query, shared.key)
            context, probabilities = interface(
                self,
                query,
                shared.key,
                shared.value,
                shared.bias,
                scaling=self.scaling,
                dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
                **kwargs,
            )
        returns_probabilities = self.config._attn_implementation == "eager"
        return context.flatten(2), probabilities if returns_probabilities else None

    def attention_interface(self, query: Tensor, key: Tensor) -> Callable:
        """The function for `attn_implementation`: query (B, H, N, d), key (B, H, k, d)"""
        implementation = self.config._attn_implementation
        # In half precision the fused kernel of CPUs loses to two products and a softmax as long as the keys are few.
        is_half_on_cpu = query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16)
        if implementation == "sdpa" and is_half_on_cpu and key.shape[2] < 512:
            implementation = "eager"
        return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)

    def split_heads(self, states: Tensor) -> Tensor:
        """(B, N, D) -> (B, H, N, d)"""
        return states.reshape(*states.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2)

    def pad_unused_slots(self, probabilities: Tensor) -> Tensor:
        """Makes the columns of slots always k, whether or not there were as many tokens: (B, H, N, keys)"""
        w = self.config.local_window
        used = probabilities.shape[-1] - (1 + 3 * w if w else 0)
        if used == self.num_slots:
            # What is returned then is what the output was made from, and can retain a gradient.
            return probabilities
        of_slots, of_tokens = probabilities.tensor_split([used], dim=-1)
        return torch.cat([functional.pad(of_slots, (0, self.num_slots - used)), of_tokens], dim=-1)

    def build_slots(self, E: Tensor | None, F: Tensor | None, layout: TokenLayout, states: Tensor) -> Slots:
        """What the slots of this batch are: states (B, N, D) in rank order, E and F (G, k, n) or None with pooling."""
        N = states.shape[1]
        if E is None or F is None:
            slots = self.pool_tokens(layout, states)
        else:
            slots = self.fit_projections(E, F, layout, N)
            if self.config.exact_short_sequences:
                slots = self.make_short_rows_exact(slots, layout, states)

        # If every row has N tokens, the number of slots in use is known: attention gets only these, and no mask.
        known = layout.mask is None and layout.position_ids is None and len(self.slots_per_head) == 1
        return slots.cut(N if slots.one_token_each else self.num_slots_in_use(N)) if known else slots

    def pool_tokens(self, layout: TokenLayout, states: Tensor) -> Slots:
        """Slots that are means or maxima of segments; no parameters, and as long as the row."""
        N, k = states.shape[1], self.num_slots
        if self.gives_each_token_a_slot(N):
            start, end = segment_bounds(layout.lengths, torch.full((1, 1), N, device=states.device), N)
            return Slots(None, None, end > start, start, end, one_token_each=True)
        start, end = segment_bounds(layout.lengths, self.head_slots(states.device), k)
        needs_matrix = self.config.projection_type == "mean_pool" and not self.pools_views(layout)
        means = segment_means(start, end, N, states.dtype) if needs_matrix else None
        return Slots(means, means, end > start, start, end)

    def gives_each_token_a_slot(self, N: int) -> bool:
        """Whether slot i is token i in rows of N: up to k tokens, or as many as two blocks hold, which all see all."""
        # An exported graph has to hold for every N, so it takes the general way for all.
        if torch.compiler.is_exporting() or len(self.slots_per_head) > 1:
            return False
        return N <= self.num_slots or (N <= 2 * self.config.local_window and not self.always_needs_blocks)

    @property
    def always_needs_blocks(self) -> bool:
        """Whether short rows are cut into blocks too: a bias goes by places in them, attentions by their columns."""
        return self.position_bias is not None or self.config._attn_implementation == "eager"

    def pools_views(self, layout: TokenLayout) -> bool:
        """Whether the host knows where the segments lie, so that they can be pooled where they are."""
        return layout.known_lengths is not None and len(self.slots_per_head) == 1

    def fit_projections(self, E: Tensor, F: Tensor, layout: TokenLayout, N: int) -> Slots:
        """Slots of E and F, cut to this layer's k and to the positions of the tokens."""
        k, head_slots = self.num_slots, self.head_slots(E.device)
        fitted_E = fit_projection(E, k, layout.position_ids, N)
        fitted_F = fitted_E if F is E else fit_projection(F, k, layout.position_ids, N)
        if self.config.projection_type == "convolution":
            stride = (self.config.max_position_embeddings + head_slots - 1) // head_slots
            return Slots(fitted_E, fitted_F, fed_by_convolution(layout, stride, k, N))
        # A dense E sees the whole row; a slot is unfed only in a head that has fewer than the layer's k.
        fed = torch.arange(k, device=E.device) < head_slots
        return Slots(fitted_E, fitted_F, fed[None], all_fed=len(self.slots_per_head) == 1)

    def make_short_rows_exact(self, slots: Slots, layout: TokenLayout, states: Tensor) -> Slots:
        """Gives rows of up to k tokens the identity for E and F: their segments are their tokens."""
        assert slots.E is not None and slots.F is not None
        head_slots = self.head_slots(states.device)
        start, end = segment_bounds(layout.lengths, head_slots, self.num_slots)
        identity = segment_means(start, end, states.shape[1], states.dtype)
        short = layout.lengths[:, None, None] <= head_slots  # (1 | B, G, 1)
        E = torch.where(short[..., None], identity, slots.E)
        F = E if slots.F is slots.E else torch.where(short[..., None], identity, slots.F)
        # The slots of a longer row see all of it: they end in no neighbourhood.
        end_of_long = torch.iinfo(end.dtype).max
        fed = (short & (end > start)) | (~short & slots.fed)
        return Slots(E, F, fed, start, torch.where(short, end, end_of_long))

    def head_slots(self, device: torch.device) -> Tensor:
        """k of every head: (H, 1), or (1, 1) if all have the same."""
        if len(self.slots_per_head) == 1:
            return torch.full((1, 1), self.num_slots, device=device)
        return torch.tensor(self.slots_per_head, device=device)[:, None]

    def num_slots_in_use(self, N: int) -> int:
        """How many of the k slots a row of N tokens feeds."""
        if self.config.uses_pooling or (self.config.exact_short_sequences and N <= self.num_slots):
            return min(self.num_slots, N)
        if self.config.projection_type == "convolution":
            stride = -(-self.config.max_position_embeddings // self.num_slots)
            return -(-N // stride)
        return self.num_slots

    def project_keys_and_values(self, states: Tensor, slots: Slots, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """K' = E (X W_K) + b_K and V' = F (X W_V) + b_V: states (B, N, D) -> two of (B, H, k, d)."""
        E, F = slots.E, slots.F
        if self.config.projection_type == "max_pool" and not slots.one_token_each:
            # Over X W, as the paper writes it. A bias is the same for all tokens, so it may be added before.
            key = self.maximum_of_tokens(self.key(states), slots, layout)
            return key, self.maximum_of_tokens(self.value(states), slots, layout)
        if E is not None and E.shape[1] > 1:
            assert F is not None
            return self.project_by_head(self.key, states, E), self.project_by_head(self.value, states, F)
        # Shared by all heads: E (X W) + b == (E X) W + b, and the linears run on k rows instead of N.
        if slots.one_token_each:
            EX = FX = states
        elif E is None or F is None:
            EX = FX = self.pool_views(states, layout, mean_of_segments)
        else:
            EX = project_sequence(states, E[:, 0])
            FX = EX if F is E else project_sequence(states, F[:, 0])
        key, value = self.key(EX), self.value(FX)
        if self.slot_key is not None and self.slot_value is not None:
            assert slots.start is not None and slots.end is not None
            of_several = (slots.end - slots.start > 1)[:, 0, :, None]  # (1 | B, k, 1)
            key, value = self.slot_key(EX).where(of_several, key), self.slot_value(FX).where(of_several, value)
        return self.split_heads(key), self.split_heads(value)

    def pool_views(self, states: Tensor, layout: TokenLayout, pool: Callable[[Tensor], Tensor]) -> Tensor:
        """Segments pooled where they are: (B, N, C) -> (B, k, C)"""
        assert layout.known_lengths is not None
        # Rows of the same length are pooled together.
        rows = states.split(1) if len(layout.known_lengths) > 1 else [states]
        pooled = [pool_segments(row, length, self.num_slots, pool) for row, length in zip(rows, layout.known_lengths)]
        return torch.cat(pooled)

    def maximum_of_tokens(self, states: Tensor, slots: Slots, layout: TokenLayout) -> Tensor:
        """Keys or values of max pooling: (B, N, D) -> (B, H, k, d)"""
        if self.pools_views(layout):
            return self.split_heads(self.pool_views(states, layout, maximum_of_segments))
        assert slots.end is not None
        return segment_maxima(self.split_heads(states), slots.end)

    def project_by_head(self, linear: nn.Linear, states: Tensor, projection: Tensor) -> Tensor:
        """E_h (X W_h) + b_h: states (B, N, D), projection (1 | B, H, k, N) -> (B, H, k, d)"""
        # Only calls of the linear: adapters (LoRA) and offloading work by hooks on them.
        bias = linear(states.new_zeros(1, 1, states.shape[-1]))
        return project_sequence(self.split_heads(linear(states) - bias), projection) + self.split_heads(bias)

    def slot_bias(self, slots: Slots, dtype: torch.dtype) -> Tensor | None:
        """-inf at slots that no real token feeds: (1 | B, G, 1, k), or None if all are known to be fed."""
        if slots.all_fed:
            return None
        # A row without any real token attends to its first slot, which is finite, and not to nothing, which is NaN.
        nothing = ~slots.fed.any(dim=-1, keepdim=True)
        first = torch.arange(slots.fed.shape[-1], device=nothing.device) == 0
        return additive_mask(slots.fed | (nothing & first), dtype)[:, :, None]

    def attend_nearby(self, query: Tensor, shared: SharedKeys, nearby: Tensor, before: int) -> tuple[Tensor, Tensor]:
        """Attention to the slots, the first token and an exact neighbourhood, in one softmax.

        The tokens are cut into M blocks of w, and all queries of a block see the block and those on either side: two
        products of scores, with k + 1 and with 3 w columns, under one softmax. Cost: O(N (k + 3 w)).

        query (B, H, N, d), nearby as in `attend` -> (B, N, H, d), probabilities (B, H, N, k + 1 + 3 w)
        """
        assert shared.bias is not None and shared.nearby_bias is not None
        w, N, M = self.config.local_window, query.shape[2], shared.nearby_bias.shape[2]
        query = functional.pad(query * self.scaling, (0, 0, 0, M * w - N))  # (B, H, M w, d)
        key = self.neighbourhoods(self.key(nearby), before, M)
        value = self.neighbourhoods(self.value(nearby), before, M)

        blocks = query.reshape(*query.shape[:2], M, w, self.head_dim)
        of_shared = torch.matmul(query, shared.key.transpose(2, 3)).reshape(*blocks.shape[:4], -1) + shared.bias
        of_tokens = torch.matmul(blocks, key.transpose(3, 4)) + shared.nearby_bias
        if self.position_bias is not None:
            of_tokens = of_tokens + self.position_bias().to(of_tokens.dtype)
        scores = torch.cat([of_shared, of_tokens], dim=-1)  # (B, H, M, w, k + 1 + 3 w)
        probabilities = functional.softmax(scores, dim=-1)
        probabilities = functional.dropout(
            probabilities, p=self.config.attention_probs_dropout_prob, training=self.training
        )
        of_shared, of_tokens = probabilities.split([shared.key.shape[2], 3 * w], dim=-1)
        context = torch.matmul(of_shared.flatten(2, 3), shared.value) + torch.matmul(of_tokens, value).flatten(2, 3)
        return context[:, :, :N].transpose(1, 2), probabilities.flatten(2, 3)[:, :, :N]

    def neighbourhoods(self, tokens: Tensor, before: int, M: int) -> Tensor:
        """The tokens of each block and of those beside it, zeros where there are none: (B, N, D) -> (B, H, M, 3 w, d)

        The first block begins behind the first `before` tokens.
        """
        w = self.config.local_window
        left = w - before
        tokens = functional.pad(self.split_heads(tokens), (0, 0, left, (M + 2) * w - left - tokens.shape[1]))
        blocks = tokens.reshape(*tokens.shape[:2], M + 2, w, self.head_dim)
        return torch.cat([blocks[:, :, :-2], blocks[:, :, 1:-1], blocks[:, :, 2:]], dim=3)

    def neighbourhood_bias(
        self, slots: Slots, layout: TokenLayout, N: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Makes every token count once: what is added to the scores of each of the M blocks of queries.

        -inf at pads, at the first token inside the blocks (it has a key of its own), and at slots whose tokens are
        all seen exactly. log(c) at a mean or maximum over c tokens, so that it weighs as much as they do.

        Returns that of the slots and the first token (1 | B, G, M, 1, k + 1), and of the blocks (1 | B, 1, M, 1, 3 w).
        """
        w, device = self.config.local_window, layout.lengths.device
        # Torch exports a graph for one block or for several: a spare block makes it several for every N.
        M = -(-N // w) + int(torch.compiler.is_exporting())
        block_start = (torch.arange(M, device=device)[:, None] - 1) * w  # (M, 1), first rank of the neighbourhood
        rank = block_start + torch.arange(3 * w, device=device)  # (M, 3 w)
        sees_token = (rank > 0) & (rank < layout.lengths[:, None, None])  # (1 | B, M, 3 w)
        sees_slot = slots.fed[:, :, None].expand(-1, -1, M, -1)  # (1 | B, G, M, k)
        if slots.start is not None and slots.end is not None:
            start, end = slots.start[:, :, None], slots.end[:, :, None]  # (1 | B, G, 1, k)
            is_seen = (start >= block_start) & (end <= block_start + 3 * w)
            sees_slot = sees_slot & ~(is_seen | (end <= 1))
        slot_bias = additive_mask(sees_slot, dtype)
        if self.config.uses_pooling:
            size = (end - start).clamp(min=1).to(at_least_single(dtype))
            slot_bias = slot_bias + size.log().to(dtype)
        with_first_token = functional.pad(slot_bias, (0, 1))
        return with_first_token[:, :, :, None], additive_mask(sees_token, dtype)[:, None, :, None]


class LinformerMLP(nn.Module):
    def __init__(self, config: LinformerConfig):
        super().__init__()
        self.chunk_size = config.chunk_size_feed_forward
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not self.chunk_size:
            return self.feed_forward(hidden_states)
        return torch.cat([self.feed_forward(chunk) for chunk in hidden_states.split(self.chunk_size, dim=1)], dim=1)

    def feed_forward(self, hidden_states: Tensor) -> Tensor:
        return self.down(self.activation(self.up(hidden_states)))


class LinformerLayer(GradientCheckpointingLayer):
    def __init__(self, config: LinformerConfig, layer_idx: int):
        super().__init__()
        self.attention = LinformerSelfAttention(config, layer_idx)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = LinformerMLP(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: Tensor,
        layout: TokenLayout,
        shared_projection: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        if layout.tiles is not None:
            return self.forward_in_tiles(hidden_states, layout, shared_projection, **kwargs)
        attended, _ = self.attention(hidden_states, layout, shared_projection, **kwargs)
        return self.add_and_feed_forward(hidden_states, attended)

    def add_and_feed_forward(self, hidden_states: Tensor, attended: Tensor) -> Tensor:
        hidden_states = self.attention_norm(hidden_states + self.dropout(attended))
        return self.mlp_norm(hidden_states + self.dropout(self.mlp(hidden_states)))

    def forward_in_tiles(
        self,
        hidden_states: Tensor,
        layout: TokenLayout,
        shared_projection: Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        """`forward`, some tokens at a time: once the slots are known, a token needs its neighbourhood only."""
        assert layout.tiles is not None
        states = mask_padding(reorder(hidden_states, layout.order), layout.mask)
        shared = self.attention.build_shared_keys(states, layout, shared_projection)

        def forward_tile(tile: Tile) -> Tensor:
            attended = self.attention.forward_tile(states, shared, tile, **kwargs)
            return self.add_and_feed_forward(states[tile.rows, tile.start : tile.end], attended)

        B, N, _ = states.shape
        return reorder(join_tiles(layout.tiles, B, N, forward_tile), layout.rank)


class LinformerPooler(nn.Module):
    def __init__(self, config: LinformerConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, mask: Tensor | None) -> Tensor:
        return torch.tanh(self.dense(first_token(hidden_states, mask)))


class LinformerClassificationHead(nn.Module):
    """Pooling, a dense layer with its activation, and the output layer; with `cls` and `tanh`, BERT's."""

    def __init__(self, config: LinformerConfig, num_labels: int | None):
        super().__init__()
        self.pooling = config.classifier_pooling
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.classifier_activation]
        self.dropout = nn.Dropout(config.head_dropout_prob)
        self.output = nn.Linear(config.hidden_size, num_labels)  # type: ignore[arg-type]

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        """hidden_states (B, N, D), attention_mask (B, N) -> logits (B, num_labels)"""
        mask = None if attention_mask is None else attention_mask != 0
        pool = first_token if self.pooling == "cls" else mean_of_tokens
        pooled = self.activation(self.dense(self.dropout(pool(hidden_states, mask))))
        return self.output(self.dropout(pooled))


class LinformerLMHead(nn.Module):
    def __init__(self, config: LinformerConfig):
        super().__init__()
        # As wide as the embeddings that the decoder's weights are tied to.
        width = config.embedding_width
        self.dense = nn.Linear(config.hidden_size, width)
        self.activation = ACT2FN[config.hidden_act]
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(width, config.vocab_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.decoder(self.norm(self.activation(self.dense(hidden_states))))


class LinformerPreTrainedModel(PreTrainedModel):
    """Initialisation of all weights, and what this model can do, for [`PreTrainedModel`]."""

    config: LinformerConfig
    config_class = LinformerConfig
    base_model_prefix = "linformer"
    _input_embed_layer = "word_embeddings"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LinformerEmbeddings", "LinformerLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True
    # The ring scheme splits the sequence; a sequence projection needs all of it.
    _supports_context_parallel = False
    _can_record_outputs = {"hidden_states": LinformerLayer, "attentions": LinformerSelfAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, LinformerProjection):
            for weight in (module.E, module.F):
                if weight is not None:
                    self._init_projection(weight, module)
        elif isinstance(module, LinformerPositionBias):
            init.zeros_(module.weight)

    def _init_projection(self, weight: Tensor, module: LinformerProjection):
        slots = torch.tensor(module.slots_per_head)
        if self.config.projection_type == "random":
            # Entries from N(0, 1/k), the variance that preserves lengths (Johnson-Lindenstrauss; paper, theorem 1).
            init.normal_(weight)
            init.copy_(weight, weight / slots.to(weight.device).sqrt().view(-1, 1, 1))
        elif self.config.projection_init == "segment_mean":
            init.copy_(weight, module.initial_means().expand_as(weight))
        else:
            init.normal_(weight, std=self.config.initializer_range)


def refuse_unsupported(kwargs: dict):
    """Refuses what a sequence projection cannot do, rather than ignore it."""
    refused = ("encoder_hidden_states", "encoder_attention_mask", "past_key_values", "cache", "cu_seq_lens_q")
    given = [name for name in refused if kwargs.get(name) is not None] + ["is_causal"] * bool(kwargs.get("is_causal"))
    if given:
        raise ValueError(
            f"Linformer cannot take {', '.join(f'`{name}`' for name in given)}: its sequence projection mixes all "
            "tokens of a row into every slot, so there is no causal, cached, cross or packed attention."
        )


class LinformerModel(LinformerPreTrainedModel):
    """The encoder: embeddings and `num_hidden_layers` layers, without a task head.

    Args:
        config ([`LinformerConfig`]): What to build.
        add_pooling_layer (`bool`, defaults to `True`): Whether to add a dense layer with tanh over the first real
            token, `pooler_output`.
    """

    def __init__(self, config: LinformerConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        # `from_pretrained(..., key=value)` sets keys one by one, and nothing has looked at them together.
        config.validate()
        self.embeddings = LinformerEmbeddings(config)
        shares_projection = not config.uses_pooling and config.projection_sharing == "layerwise"
        most_slots = max(max(config.slots_per_head(layer_idx)) for layer_idx in range(config.num_hidden_layers))
        self.projection = LinformerProjection(config, [most_slots]) if shares_projection else None
        self.layers = nn.ModuleList(
            [LinformerLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.pooler = LinformerPooler(config) if add_pooling_layer else None
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            input_ids (`torch.Tensor` of shape `(B, N)`): Token ids, N <= `max_position_embeddings`.
            attention_mask (`torch.Tensor` of shape `(B, N)`, any dtype, *optional*): Non-zero at real tokens. Pads may
                stand anywhere and hold anything.
            token_type_ids (`torch.Tensor` of shape `(B, N)`, *optional*): Segment of each token, 0 if not given.
            position_ids (`torch.Tensor` of shape `(B, N)` or `(1, N)`, *optional*): Index into the position table and
                into the columns of E; the count of real tokens before each token if not given.
            inputs_embeds (`torch.Tensor` of shape `(B, N, D)`, *optional*): Word embeddings instead of `input_ids`.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` (B, N, D), `pooler_output` (B, D) and, if asked for,
            `hidden_states` and `attentions`. The latter need `attn_implementation="eager"` and have the shape
            (B, H, N, k), or (B, H, N, k + 1 + 3 w) with a local window: slots, first token, three blocks.

        Raises:
            ValueError: On rows longer than n, masks that are not (B, N), positions out of range, and on arguments that
                make no sense for an encoder with a sequence projection.
        """
        refuse_unsupported(kwargs)
        B, N = batch_shape(input_ids, inputs_embeds, self.config.max_position_embeddings)
        if input_ids is not None:
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
        mask = token_mask(attention_mask, (B, N))
        if position_ids is not None:
            position_ids = checked_position_ids(position_ids, mask, (B, N), self.config.max_position_embeddings)
        # Not `self.device`: with offloaded weights that is where the weights rest, not where they are used.
        device = (input_ids if input_ids is not None else inputs_embeds).device  # type: ignore[union-attr]
        layout = layout_tokens(mask, position_ids, N, device)
        layout = layout._replace(tiles=self.choose_tiles(layout, B, N, device))
        if position_ids is None:
            position_ids = default_position_ids(mask, N, device)

        inputs = (input_ids, inputs_embeds, token_type_ids, position_ids, mask)
        if layout.tiles is None or layout.order is not None:
            hidden_states = self.embeddings(*inputs)
        else:
            hidden_states = self.embed_in_tiles(layout.tiles, B, N, *inputs)
        shared_projection = self.projection()[0] if self.projection is not None else None
        for layer in self.layers:
            hidden_states = layer(hidden_states, layout, shared_projection, **kwargs)

        pooled = self.pooler(hidden_states, mask) if self.pooler is not None else None
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)

    def choose_tiles(self, layout: TokenLayout, B: int, N: int, device: torch.device) -> list[Tile] | None:
        """The tiles that layers are worked through in where nothing needs the whole: no gradient, no attentions."""
        size = self.config.inference_chunk_size
        if size is None:
            # The fewest that cost a CPU no time, and what keeps a GPU busy.
            size = 512 if device.type == "cpu" else 16384
        needs_whole = torch.is_grad_enabled() or self.config._attn_implementation == "eager"
        if size == 0 or needs_whole or is_tracing(layout.lengths) or B * N <= size:
            return None
        # What is hooked to attention expects to see all tokens, of long texts as of short ones.
        attention = [module for module in self.modules() if isinstance(module, LinformerSelfAttention)]
        if any(module._forward_hooks or module._forward_pre_hooks for module in attention):
            return None
        tiles = cut_into_tiles(layout.known_lengths or [N], B, N, size, multiple=max(1, self.config.local_window))
        return tiles or None

    def embed_in_tiles(self, tiles: list[Tile], B: int, N: int, *inputs: Tensor | None) -> Tensor:
        """The embeddings (B, N, D) of inputs (1 | B, N, ...), without a second tensor of their size."""
        inputs = tuple(part if part is None else part.expand(B, *part.shape[1:]) for part in inputs)

        def embed_tile(tile: Tile) -> Tensor:
            parts = [part if part is None else part[tile.rows, tile.start : tile.end] for part in inputs]
            return self.embeddings(*parts)

        return join_tiles(tiles, B, N, embed_tile)


def check_labels(labels: Tensor, num_labels: int):
    """Refuses classes that do not exist, which on a GPU are an assert that ends the process. -100: no label."""
    if is_tracing(labels):
        return
    wrong = labels[((labels < 0) & (labels != -100)) | (labels >= num_labels)]
    if wrong.numel():
        raise ValueError(
            f"Labels must lie between 0 and {num_labels - 1}, for this model tells {num_labels} classes apart, or be "
            f"-100 for none. Some are {wrong.unique().tolist()[:10]}: count classes from 0 and make the model with as "
            "many as there are."
        )


def sum_or_mean(loss: Callable, logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | None):
    """The mean loss, or the share of these rows in the mean over `num_items_in_batch` of an accumulated step."""
    if num_items_in_batch is None:
        return loss(logits.float(), labels)
    return loss(logits.float(), labels, reduction="sum") / torch.as_tensor(num_items_in_batch, device=logits.device)


def cross_entropy(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | None) -> Tensor:
    if labels.numel() != logits.shape[0] or labels.is_floating_point():
        raise ValueError(
            f"Classes must be one integer a row, {logits.shape[0]} in all, not {labels.dtype} of shape "
            f"{tuple(labels.shape)}. For several labels a row give floats and set `problem_type` to "
            "'multi_label_classification'."
        )
    labels = labels.view(-1).to(logits.device, torch.long)
    check_labels(labels, logits.shape[-1])
    return sum_or_mean(functional.cross_entropy, logits, labels, num_items_in_batch)


def position_loss(logits: Tensor, positions: Tensor, num_items_in_batch: Tensor | None) -> Tensor:
    """Cross entropy over the tokens of a row, logits (B, N), positions (B,); one outside the row adds 0.

    Divided by all rows and not only by those with an answer, so that it is the same however a batch is divided, and
    finite for a batch without any.
    """
    positions = positions.view(-1).to(logits.device)
    inside = (positions >= 0) & (positions < logits.shape[1])
    loss = functional.cross_entropy(logits.float(), positions.where(inside, -100), reduction="sum")
    return loss / (len(positions) if num_items_in_batch is None else num_items_in_batch)


def sequence_loss(
    logits: Tensor, labels: Tensor, config: LinformerConfig, num_items_in_batch: Tensor | None
) -> Tensor:
    """The loss of the problem type, right under gradient accumulation for each (the library's own is not for two).

    logits (B, num_labels); labels (B,) for classes, as many as logits for regression and several labels.
    """
    problem_type: str | None = config.problem_type
    if problem_type is None:
        integers = not (labels.is_floating_point() or labels.dtype == torch.bool)
        several = "single_label_classification" if integers else "multi_label_classification"
        problem_type = "regression" if config.num_labels == 1 else several
        if not is_tracing(labels):
            # Saved with the model: pipelines choose between sigmoid, softmax and neither by it.
            config.problem_type = problem_type  # type: ignore[assignment]
    if problem_type == "single_label_classification":
        return cross_entropy(logits, labels, num_items_in_batch)
    if labels.numel() != logits.numel():
        raise ValueError(
            f"`problem_type={problem_type!r}` needs a label for each of the {config.num_labels} outputs of a row: "
            f"shape {tuple(logits.shape)}, not {tuple(labels.shape)}."
        )
    loss = functional.mse_loss if problem_type == "regression" else functional.binary_cross_entropy_with_logits
    labels = labels.view(logits.shape).to(logits.device, torch.float32)
    return sum_or_mean(loss, logits, labels, num_items_in_batch)


class LinformerForMaskedLM(LinformerPreTrainedModel):
    """The encoder with a masked-LM head, tied to the word embeddings."""

    _tied_weights_keys = {"lm_head.decoder.weight": "linformer.embeddings.word_embeddings.weight"}

    def __init__(self, config: LinformerConfig):
        super().__init__(config)
        self.linformer = LinformerModel(config, add_pooling_layer=False)
        self.lm_head = LinformerLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module):
        self.lm_head.decoder = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        """
        Inputs as in [`LinformerModel.forward`].

        Args:
            labels (`torch.Tensor` of shape `(B, N)`, *optional*): Token ids to predict, -100 where there is nothing to
                predict.

        Returns:
            `MaskedLMOutput`: `logits` (B, N, V). With `config.sparse_prediction` and labels, (number of labels, V).
        """
        outputs = self.linformer(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        hidden_states = outputs.last_hidden_state
        if self.config.sparse_prediction and labels is not None:
            labels = labels.to(hidden_states.device)
            is_predicted = labels != -100
            hidden_states, labels = hidden_states[is_predicted], labels[is_predicted]
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            check_labels(labels, self.config.vocab_size)
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class LinformerForSequenceClassification(LinformerPreTrainedModel):
    """The encoder with a head over the whole row: one label, several labels, or regression."""

    def __init__(self, config: LinformerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.linformer = LinformerModel(config, add_pooling_layer=False)
        self.classifier = LinformerClassificationHead(config, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """
        Inputs as in [`LinformerModel.forward`].

        Args:
            labels (`torch.Tensor` of shape `(B,)` or `(B, num_labels)`, *optional*): Classes (integers), or targets of
                a regression or of several labels (floats). `config.problem_type` decides; if it is not set, one label
                means regression, integers one class a row, floats several labels.

        Returns:
            `SequenceClassifierOutput`: `logits` (B, num_labels).
        """
        outputs = self.linformer(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        logits = self.classifier(outputs.last_hidden_state, attention_mask)
        loss = None
        if labels is not None:
            loss = sequence_loss(logits, labels, self.config, kwargs.get("num_items_in_batch"))
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class LinformerForTokenClassification(LinformerPreTrainedModel):
    """The encoder with a linear layer over every token."""

    def __init__(self, config: LinformerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.linformer = LinformerModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(config.head_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        """
        Inputs as in [`LinformerModel.forward`].

        Args:
            labels (`torch.Tensor` of shape `(B, N)`, *optional*): Class of each token, -100 for none.

        Returns:
            `TokenClassifierOutput`: `logits` (B, N, num_labels).
        """
        outputs = self.linformer(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            check_labels(labels, self.classifier.out_features)
            loss = self.loss_function(logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class LinformerForQuestionAnswering(LinformerPreTrainedModel):
    """The encoder with a linear layer that marks the first and the last token of an answer."""

    def __init__(self, config: LinformerConfig):
        super().__init__(config)
        self.linformer = LinformerModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QuestionAnsweringModelOutput:
        """
        Inputs as in [`LinformerModel.forward`].

        Args:
            start_positions (`torch.Tensor` of shape `(B,)`, *optional*): Index of the answer's first token; one
                outside the row counts as no answer and adds nothing to the loss.
            end_positions (`torch.Tensor` of shape `(B,)`, *optional*): Index of its last token.

        Returns:
            `QuestionAnsweringModelOutput`: `start_logits` and `end_logits` (B, N).
        """
        outputs = self.linformer(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(dim=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            num_items = kwargs.get("num_items_in_batch")
            start_loss = position_loss(start_logits, start_positions, num_items)
            loss = (start_loss + position_loss(end_logits, end_positions, num_items)) / 2
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class LinformerForMultipleChoice(LinformerPreTrainedModel):
    """The encoder with a head that scores each of C choices by itself."""

    def __init__(self, config: LinformerConfig):
        super().__init__(config)
        self.linformer = LinformerModel(config, add_pooling_layer=False)
        self.classifier = LinformerClassificationHead(config, num_labels=1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MultipleChoiceModelOutput:
        """
        Inputs as in [`LinformerModel.forward`], with a dimension for the choices: (B, C, N), and (B, C, N, D).

        Args:
            labels (`torch.Tensor` of shape `(B,)`, *optional*): Index of the right choice, below C.

        Returns:
            `MultipleChoiceModelOutput`: `logits` (B, C).
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        choices = input_ids if input_ids is not None else inputs_embeds
        if choices is None or choices.dim() != 3 + (input_ids is None):
            raise ValueError("Give `input_ids` of shape (batch, choices, tokens), or `inputs_embeds` likewise.")
        C = choices.shape[1]
        flat = [None if states is None else states.flatten(0, 1) for states in inputs]  # (B C, N)
        outputs = self.linformer(*flat, return_dict=True, **kwargs)
        logits = self.classifier(outputs.last_hidden_state, flat[1]).view(-1, C)
        loss = None
        if labels is not None:
            loss = cross_entropy(logits, labels, kwargs.get("num_items_in_batch"))
        return MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


LinformerModel.register_for_auto_class("AutoModel")
LinformerForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
LinformerForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
LinformerForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
LinformerForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")
LinformerForMultipleChoice.register_for_auto_class("AutoModelForMultipleChoice")

__all__ = [
    "LinformerForMaskedLM",
    "LinformerForMultipleChoice",
    "LinformerForQuestionAnswering",
    "LinformerForSequenceClassification",
    "LinformerForTokenClassification",
    "LinformerModel",
    "LinformerPreTrainedModel",
]
