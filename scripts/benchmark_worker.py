"""Measures one cell of scripts/benchmark.py, in a process of its own so that its peak memory is its own.

Reads lines of JSON from stdin and answers each with one on stdout. The first line is the cell; the answer says how
much memory and how many operations a step takes. Every further line is answered with the seconds of one more step:

    echo '{"model": "linear", "sequence_length": 512, "batch_size": 8, "projected_length": 128}' \\
        | python scripts/benchmark_worker.py
"""

import contextlib
import ctypes
import gc
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from benchmark_models import FIRST_WORD, Cell, build_model
from operations import count_operations


MASKED_SHARE = 0.15
CLEAR_REFS = Path("/proc/self/clear_refs")


def make_inputs(cell: Cell) -> dict[str, Tensor]:
    """Random words without padding (B, N) and, for a masked-LM head, labels at 15 % of them and -100 elsewhere."""
    generator = torch.Generator().manual_seed(cell.seed)
    shape = (cell.batch_size, cell.sequence_length)
    inputs = {"input_ids": torch.randint(FIRST_WORD, cell.vocab_size, shape, generator=generator)}
    if cell.head == "masked_lm":
        is_masked = torch.rand(shape, generator=generator) < MASKED_SHARE
        inputs["labels"] = torch.where(is_masked, inputs["input_ids"], -100)
    return {name: tensor.to(cell.device) for name, tensor in inputs.items()}


def ready_model(cell: Cell) -> nn.Module:
    """The model on its device, in the mode and the precision that it is measured in."""
    model = build_model(cell).to(cell.device)
    if cell.mode == "training":
        return model.train()
    # The counter of operations hooks modules whose inputs require gradients, which inference mode cannot.
    return model.to(cell.torch_dtype).requires_grad_(False)


def make_step(model: nn.Module, inputs: dict[str, Tensor], cell: Cell) -> Callable[[], None]:
    """One forward pass, or one forward, backward and optimizer step. bfloat16 training is autocast of float32."""

    def forward() -> None:
        with torch.inference_mode():
            model(**inputs)

    if cell.mode == "forward":
        return forward

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    autocast = torch.autocast(cell.device, torch.bfloat16, enabled=cell.dtype == "bfloat16")

    def train() -> None:
        with autocast:
            output = model(**inputs)[0]
            loss = output if cell.head == "masked_lm" else output.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return train


def resident(field: str) -> int:
    """A line of /proc/self/status, such as VmRSS or VmHWM, in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, f"/proc/self/status has no {field}"
    return int(found[1]) * 1024


def return_free_memory() -> None:
    """Gives back to the system what the allocator keeps of freed memory, where the C library can (glibc)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def seconds_of(step: Callable[[], None], device: str) -> float:
    """Wall time of one step."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_memory(step: Callable[[], None], device: str) -> tuple[int | None, float]:
    """How far a step raises the memory in use above what it was before, in bytes, and the seconds it took.

    None in place of the bytes where they cannot be told: on a CPU that takes Linux.
    """
    if device == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        seconds = seconds_of(step, device)
        return torch.cuda.max_memory_allocated() - before, seconds
    return_free_memory()
    try:
        # Sets VmHWM, the highest resident size so far, back to the present one.
        CLEAR_REFS.write_text("5")
    except OSError:
        return None, seconds_of(step, device)
    before = resident("VmRSS")
    seconds = seconds_of(step, device)
    return resident("VmHWM") - before, seconds


def prepare(cell: Cell) -> tuple[dict[str, Any], Callable[[], None]]:
    """Builds the model and warms it up: what is known of the cell before it is timed, and the step to time."""
    torch.set_num_threads(cell.num_threads)
    torch.manual_seed(cell.seed)
    model = ready_model(cell)
    inputs = make_inputs(cell)
    step = make_step(model, inputs, cell)
    # The first step also makes all that is made once, such as the optimizer's state.
    known: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "operations": count_operations(step),
    }
    if cell.options.get("compile"):
        model.compile()
        known["compile_seconds"] = seconds_of(step, cell.device)
    known["peak_bytes"], known["warm_seconds"] = peak_memory(step, cell.device)
    return known, step


def answer(channel: TextIO, message: dict[str, Any]) -> None:
    print(json.dumps(message), file=channel, flush=True)


def main() -> None:
    # Whatever a library prints goes to stderr; stdout is for answers alone.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    cell = Cell(**json.loads(sys.stdin.readline()))
    known, step = prepare(cell)
    answer(channel, known)
    with contextlib.suppress(BrokenPipeError):
        for _ in sys.stdin:
            answer(channel, {"seconds": seconds_of(step, cell.device)})


if __name__ == "__main__":
    main()
