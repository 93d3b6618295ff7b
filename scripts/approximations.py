"""The output P V of softmax attention, P = softmax(Q K^T / sqrt(d)), approximated with k slots or at rank k.

Methods, by the names they have in results (R: k x n, entries from N(0, 1/k), drawn anew at each call):

  best_output            the best rank-k matrix for P V itself: no P~ of rank k, and nothing with k slots, does better
  best_attention         P_k V, P_k the best rank-k matrix for P; what is least is ||P_k - P||, not the error of P_k V
  random                 P R^T R V: Theorem 1 of the paper
  random_slots           softmax(Q (R K)^T) R V
  theorem_2              the same with the proof's E = R / n and F = exp(-1 / n) R
  segment_means          softmax(Q (E K)^T) E V, E the means of k segments, the first token alone: `mean_pool`
  segment_means_log      and log(size of the segment) added to the scores
  segment_means_window   and an exact neighbourhood in the same softmax: `local_window`. Not of rank k
  learned                E trained by Adam on other texts, one for all heads of a layer, from segment means
  zero                   nothing at all
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from scipy.optimize import brentq
from torch import Tensor

from hf_linformer.modeling_linformer import segment_bounds, segment_means


# Theorem 1 takes k = 5 ln(n) / (eps^2 - eps^3). The denominator is largest, 4/27, at eps = 2/3: for a k below
# 5 * 27/4 * ln(n) there is no eps.
LARGEST_EPSILON = 2 / 3
SMALLEST_GRANTED = 5 * 27 / 4


@dataclass(eq=False)
class AttentionHeads:
    """What goes into the attention of one layer for one text: three of (H, n, d), the query divided by sqrt(d)."""

    query: Tensor
    key: Tensor
    value: Tensor

    @property
    def n(self) -> int:
        return self.key.shape[-2]

    @cached_property
    def probabilities(self) -> Tensor:
        """P, (H, n, n)"""
        return torch.softmax(self.query @ self.key.mT, dim=-1)

    @cached_property
    def output(self) -> Tensor:
        """P V, (H, n, d)"""
        return attend(self.query, self.key, self.value)

    @cached_property
    def attention_directions(self) -> Tensor:
        """The right singular vectors of P, (H, n, n)"""
        return right_singular_vectors(self.probabilities)

    @cached_property
    def output_directions(self) -> Tensor:
        """The right singular vectors of P V, (H, d, d)"""
        return right_singular_vectors(self.output)


def right_singular_vectors(matrix: Tensor) -> Tensor:
    """As columns, that of the largest singular value first: (..., n, m) -> (..., m, m)"""
    try:
        return torch.linalg.svd(matrix, full_matrices=False).Vh.mT
    except torch.linalg.LinAlgError:
        # LAPACK's fast SVD does not converge for some real P. The eigenvectors of M^T M are the same, but slow.
        precise = matrix.double()
        return torch.linalg.eigh(precise.mT @ precise).eigenvectors.flip(-1).to(matrix.dtype)


def attend(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(Q K'^T + bias) V': query (H, n, d), keys and values (H, k, d), bias (n, k) -> (H, n, d)"""
    scores = query @ keys.mT
    return torch.softmax(scores if bias is None else scores + bias, dim=-1) @ values


def attend_to_slots(heads: AttentionHeads, E: Tensor, F: Tensor | None = None) -> Tensor:
    """Equation 7 of the paper, softmax(Q (E K)^T) F V: E and F (k, n) -> (H, n, d)"""
    return attend(heads.query, E @ heads.key, (E if F is None else F) @ heads.value)


def best_output(heads: AttentionHeads, k: int) -> Tensor:
    kept = heads.output_directions[..., :k]
    return heads.output @ kept @ kept.mT


def best_attention(heads: AttentionHeads, k: int) -> Tensor:
    kept = heads.attention_directions[..., :k]
    return heads.probabilities @ (kept @ (kept.mT @ heads.value))


def random_projection(k: int, n: int) -> Tensor:
    """R of Johnson and Lindenstrauss: (k, n), entries from N(0, 1/k), so that R^T R is the identity in the mean."""
    return torch.randn(k, n) / math.sqrt(k)


def theorem_1(heads: AttentionHeads, k: int) -> Tensor:
    R = random_projection(k, heads.n)
    return (heads.probabilities @ R.T) @ (R @ heads.value)


def random_slots(heads: AttentionHeads, k: int) -> Tensor:
    return attend_to_slots(heads, random_projection(k, heads.n))


def theorem_2(heads: AttentionHeads, k: int) -> Tensor:
    R, delta = random_projection(k, heads.n), 1 / heads.n
    return attend_to_slots(heads, delta * R, math.exp(-delta) * R)


def mean_pool(k: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The model's `mean_pool` for a row of n >= k tokens: E (k, n), and where its segments start and end, (k,)"""
    start, end = segment_bounds(torch.tensor([n]), torch.tensor([[k]]), k)
    return segment_means(start, end, n, torch.float32)[0, 0], start[0, 0], end[0, 0]


def pooled(heads: AttentionHeads, k: int) -> Tensor:
    return attend_to_slots(heads, mean_pool(k, heads.n)[0])


def pooled_log(heads: AttentionHeads, k: int) -> Tensor:
    E, start, end = mean_pool(k, heads.n)
    return attend(heads.query, E @ heads.key, E @ heads.value, (end - start).log().expand(heads.n, k))


def pooled_window(heads: AttentionHeads, k: int, local_window: int) -> Tensor:
    """Slots and neighbourhood in one softmax, as the model's `local_window` computes it, here with an n x n mask."""
    E, start, end = mean_pool(k, heads.n)
    tokens = torch.arange(heads.n)
    low = (tokens[:, None] // local_window - 1) * local_window  # (n, 1), the first token that a query sees
    high = low + 3 * local_window
    sees_token = (tokens == 0) | ((low <= tokens) & (tokens < high))
    sees_slot = ~((end <= 1) | ((low <= start) & (end <= high)))
    bias = torch.cat([(end - start).log().expand(heads.n, k), torch.zeros(heads.n, heads.n)], dim=-1)
    bias = bias.masked_fill(~torch.cat([sees_slot, sees_token], dim=-1), -math.inf)
    keys, values = (torch.cat([E @ states, states], dim=-2) for states in (heads.key, heads.value))
    return attend(heads.query, keys, values, bias)


def relative_error(approximation: Tensor, heads: AttentionHeads) -> Tensor:
    """||approximation - P V|| / ||P V|| for each head: (H, n, d) -> (H,)"""
    return (approximation - heads.output).norm(dim=(-2, -1)) / heads.output.norm(dim=(-2, -1))


def norm_error(approximation: Tensor, heads: AttentionHeads) -> Tensor:
    """||approximation - P V|| / (||P|| ||V||) for each head: (H, n, d) -> (H,)"""
    norms = heads.probabilities.norm(dim=(-2, -1)) * heads.value.norm(dim=(-2, -1))
    return (approximation - heads.output).norm(dim=(-2, -1)) / norms


def columns_in_bound(approximation: Tensor, heads: AttentionHeads, epsilon: float) -> Tensor:
    """Share of the columns w of V with ||P~ w - P w|| < epsilon ||P w||, for each head: (H, n, d) -> (H,)"""
    inside = (approximation - heads.output).norm(dim=-2) < epsilon * heads.output.norm(dim=-2)
    return inside.float().mean(dim=-1)


def bound_epsilon(k: int, n: int) -> float | None:
    """The eps that Theorem 1 grants for k and n; None where it grants none."""
    if k < SMALLEST_GRANTED * math.log(n):
        return None
    target = 5 * math.log(n) / k
    return brentq(lambda epsilon: epsilon**2 - epsilon**3 - target, 0, LARGEST_EPSILON)


def learn_projection(texts: Sequence[AttentionHeads], k: int, steps: int, learning_rate: float) -> Tensor:
    """E (k, n), for the keys and values of all heads of a layer, that makes the relative error on the texts small."""
    E = mean_pool(k, texts[0].n)[0].requires_grad_()
    optimizer = torch.optim.Adam([E], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(steps):
        heads = texts[int(torch.randint(len(texts), ()))]
        loss = relative_error(attend_to_slots(heads, E), heads).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return E.detach()


Method = Callable[[AttentionHeads, int], Tensor]


def methods_with(local_window: int) -> dict[str, Method]:
    """Every method that needs no training, by its name: (heads, k) -> (H, n, d)"""
    return {
        "best_output": best_output,
        "best_attention": best_attention,
        "random": theorem_1,
        "random_slots": random_slots,
        "theorem_2": theorem_2,
        "segment_means": pooled,
        "segment_means_log": pooled_log,
        "segment_means_window": lambda heads, k: pooled_window(heads, k, local_window),
    }
