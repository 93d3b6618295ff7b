"""The Linformer's equations, literal and slow: one row, one head, one query, one key at a time.

Written from the paper (https://arxiv.org/abs/2006.04768, Eq. 7 and section 4) and from the definitions in the README,
without a look at how `modeling_linformer.py` does it: no batches, no padding, no matrices of masks. Works in any dtype
and is differentiable, so that outputs and gradients can be compared.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional


def encode(config, weights: dict[str, Tensor], input_ids: list[int], position_ids: list[int] | None = None) -> Tensor:
    """The last hidden state (L, D) of one row of real tokens.

    weights: the state dict of a `LinformerModel` (dropout is not applied).
    """
    positions = list(range(len(input_ids))) if position_ids is None else position_ids
    embeddings = [
        weights["embeddings.word_embeddings.weight"][token]
        + weights["embeddings.position_embeddings.weight"][position]
        + weights["embeddings.token_type_embeddings.weight"][0]
        for token, position in zip(input_ids, positions)
    ]
    X = layer_norm(config, weights, "embeddings.norm", torch.stack(embeddings))
    for layer in range(config.num_hidden_layers):
        prefix = f"layers.{layer}"
        X = layer_norm(config, weights, f"{prefix}.attention_norm", X + attend(config, weights, layer, X, positions))
        up = functional.gelu(linear(weights, f"{prefix}.mlp.up", X))
        X = layer_norm(config, weights, f"{prefix}.mlp_norm", X + linear(weights, f"{prefix}.mlp.down", up))
    return X


def attend(config, weights: dict[str, Tensor], layer: int, X: Tensor, positions: list[int]) -> Tensor:
    prefix = f"layers.{layer}.attention"
    d = config.hidden_size // config.num_attention_heads
    heads = []
    for head in range(config.num_attention_heads):
        columns = slice(head * d, (head + 1) * d)
        query = linear(weights, f"{prefix}.query", X)[:, columns]
        # X W without the bias, which comes after the projection of the sequence.
        XWk = X @ weights[f"{prefix}.key.weight"].T[:, columns]
        XWv = X @ weights[f"{prefix}.value.weight"].T[:, columns]
        bk, bv = weights[f"{prefix}.key.bias"][columns], weights[f"{prefix}.value.bias"][columns]

        slots = describe_slots(config, weights, layer, head, len(X), positions)
        key_slots = [project(config, slot["key"], XWk) + bk for slot in slots]
        value_slots = [project(config, slot["value"], XWv) + bv for slot in slots]
        if config.slot_projections:
            for i, slot in enumerate(slots):
                if len(slot["stands_for"]) > 1:
                    mean = project(config, slot["key"], X)
                    key_slots[i] = linear(weights, f"{prefix}.slot_key", mean)[columns]
                    value_slots[i] = linear(weights, f"{prefix}.slot_value", mean)[columns]
        rows = []
        for rank in range(len(X)):
            exact = neighbourhood(config.local_window, rank, len(X))
            keys, values, biases = [], [], []
            for slot, key, value in zip(slots, key_slots, value_slots):
                members = slot["stands_for"]
                if members is not None and set(members) <= set(exact):
                    continue
                counts = config.local_window and config.projection_type in ("mean_pool", "max_pool")
                keys.append(key)
                values.append(value)
                biases.append(X.new_tensor(math.log(len(members)) if counts else 0.0))
            for token in exact:
                keys.append(XWk[token] + bk)
                values.append(XWv[token] + bv)
                biases.append(position_bias(config, weights, prefix, head, token, rank))
            scores = torch.stack([query[rank] @ key / math.sqrt(d) + bias for key, bias in zip(keys, biases)])
            probabilities = torch.softmax(scores, dim=0)
            rows.append(sum(p * value for p, value in zip(probabilities, values)))
        heads.append(torch.stack(rows))
    return linear(weights, f"{prefix}.output", torch.cat(heads, dim=-1))


def neighbourhood(window: int, rank: int, length: int) -> list[int]:
    """The tokens that a query sees exactly: the first one, its own block and the two beside it."""
    if window == 0:
        return []
    block = rank // window
    return [token for token in range(length) if token == 0 or abs(token // window - block) <= 1]


def position_bias(config, weights: dict[str, Tensor], prefix: str, head: int, token: int, rank: int) -> Tensor:
    """What the token's score gains by its offset from the query. The first token, always seen, gains nothing."""
    if not config.local_position_bias or token == 0:
        return torch.tensor(0.0)
    farthest = 2 * config.local_window - 1
    return 64 * weights[f"{prefix}.position_bias.weight"][head, farthest + token - rank]


def describe_slots(config, weights, layer: int, head: int, length: int, positions: list[int]) -> list[dict]:
    """The slots that some token feeds: weight of each token for keys and for values, and what the slot stands for.

    "stands_for" is None for a slot that sees the whole row.
    """
    k = config.projected_length
    k = k[layer] if isinstance(k, list) else k
    k = k[head] if isinstance(k, list) else k
    n = config.max_position_embeddings
    pooling = config.projection_type in ("mean_pool", "max_pool")
    if pooling or (config.exact_short_sequences and length <= k):
        others, segments = length - 1, min(k, length) - 1
        members = [[0]]
        for i in range(segments):
            # As even as possible: one token more in each of the first `others % segments`.
            size = others // segments + (1 if i < others % segments else 0)
            first = members[-1][-1] + 1
            members.append(list(range(first, first + size)))
        return [
            {"key": {t: 1 / len(m) for t in m}, "value": {t: 1 / len(m) for t in m}, "stands_for": m} for m in members
        ]

    def matrix_of(name: str) -> Tensor:
        owner = "projection" if config.projection_sharing == "layerwise" else f"layers.{layer}.attention.projection"
        shared = config.projection_sharing in ("key_value", "layerwise")
        matrix = weights[f"{owner}.{'E' if shared else name}"]
        return matrix[head if config.projection_sharing == "none" else 0]

    slots = []
    for i in range(k):
        slot: dict = {"stands_for": None}
        for kind, name in (("key", "E"), ("value", "F")):
            matrix = matrix_of(name)
            if config.projection_type == "convolution":
                stride = math.ceil(n / k)
                slot[kind] = {
                    t: matrix[position - i * stride]
                    for t, position in enumerate(positions)
                    if i * stride <= position < (i + 1) * stride
                }
            else:
                slot[kind] = {t: matrix[i, position] for t, position in enumerate(positions)}
        if slot["key"]:
            slots.append(slot)
    return slots


def project(config, token_weights: dict, XW: Tensor) -> Tensor:
    """One row of E (X W): a weighted sum of tokens, or with max_pool their maximum."""
    if config.projection_type == "max_pool":
        return torch.stack([XW[token] for token in token_weights]).amax(dim=0)
    return sum(weight * XW[token] for token, weight in token_weights.items())


def linear(weights: dict[str, Tensor], name: str, X: Tensor) -> Tensor:
    return X @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def layer_norm(config, weights: dict[str, Tensor], name: str, X: Tensor) -> Tensor:
    centred = X - X.mean(dim=-1, keepdim=True)
    variance = (centred**2).mean(dim=-1, keepdim=True)
    return centred / torch.sqrt(variance + config.layer_norm_eps) * weights[f"{name}.weight"] + weights[f"{name}.bias"]
