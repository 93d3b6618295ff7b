"""Floating-point operations: how many a piece of work takes, and how many a second this machine can do."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


# (M, K, N) of the products that the peak is the best of: two of a layer of the models, and large squares.
PRODUCTS = [(4096, 768, 3072), (4096, 3072, 768), (2048, 2048, 2048), (4096, 4096, 4096)]
PRODUCTS_OF_CUDA = [*PRODUCTS, (8192, 8192, 8192)]


def measure_peak(
    device: str, dtype: torch.dtype, repeats: int = 3, products: Sequence[tuple[int, int, int]] | None = None
) -> float:
    """The most floating-point operations a second that torch reaches in a matrix product, the best of several."""
    best = 0.0
    synchronize = (lambda: None) if device == "cpu" else torch.accelerator.synchronize
    for rows, inner, columns in products or (PRODUCTS_OF_CUDA if device == "cuda" else PRODUCTS):
        left = torch.randn(rows, inner, device=device).to(dtype)
        right = torch.randn(inner, columns, device=device).to(dtype)
        for _ in range(repeats + 1):
            started = time.perf_counter()
            torch.matmul(left, right)
            synchronize()
            best = max(best, 2 * rows * inner * columns / (time.perf_counter() - started))
    return best


def count_operations(step: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products of a step; a multiplication and an addition are two."""
    return sum(operations_by_name(step).values())


def operations_by_name(step: Callable[[], Any]) -> dict[str, int]:
    """The same for each of torch's operators, such as `aten::addmm`."""

    def attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def attention_backward(gradient: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_backward_flop_count(gradient, query, key, value)

    # Torch has formulas for the fused attention of GPUs only.
    of_cpu = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=of_cpu) as counter:
        step()
    of_all = counter.get_flop_counts()["Global"]
    return {f"aten::{str(operator).rpartition('.')[2]}": count for operator, count in of_all.items()}
