"""Where the time of a step goes: matrix products, softmax, activations, copies; by torch's profiler.

    python scripts/profile_steps.py --lengths 512 4096 --dtype bfloat16
    python scripts/profile_steps.py --lengths 4096 --mode training --models roberta_sdpa mean_pool:local_window=32

Entries of --models, sizes and inputs are those of scripts/benchmark.py. A cell is warmed up and then profiled for
--repeats steps. Of the matrix products, and of the fused attention that holds two of them, it also says how near they
come to the fastest product that torch does on this machine, in operations a second. The profiler takes time
itself, so that seconds here are a little more than those of scripts/benchmark.py.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

from benchmark_models import Cell
from benchmark_plan import CellArguments, cells_of, check_arguments, columns_of, free_memory, plan_cell
from benchmark_worker import make_inputs, make_step, ready_model, seconds_of
from common import UserError, append_results, format_table, parse_arguments, run_main
from operations import measure_peak, operations_by_name


# A part of the work, and how the names of its operators begin. What is in none of them is the rest.
PARTS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "attention": ("aten::_scaled_dot_product", "aten::_efficient_attention", "aten::_flash_attention"),
    "softmax": ("aten::_softmax",),
    "activation": ("aten::gelu",),
    "norm": ("aten::native_layer_norm",),
    "optimizer": ("aten::_fused_adamw",),
    "elementwise": ("aten::add", "aten::mul", "aten::div", "aten::sum"),
    "copies": ("aten::copy_", "aten::cat", "aten::constant_pad", "aten::fill_"),
}


@dataclass
class ProfileArguments(CellArguments):
    """How it is profiled."""

    lengths: list[int] = field(default_factory=lambda: [512, 4096], metadata={"help": "Tokens a row, n."})
    models: list[str] = field(
        default_factory=lambda: ["roberta_sdpa", "roberta_eager", "linear", "mean_pool", "mean_pool:local_window=32"],
        metadata={"help": "Families, or family:key=value,... as in scripts/benchmark.py."},
    )
    repeats: int = field(default=3, metadata={"help": "Profiled steps; the numbers are of one step, their mean."})
    results_file: str | None = field(default=None, metadata={"help": "Add a row for each cell to this CSV."})


def part_of(operator: str) -> str:
    return next((part for part, names in PARTS.items() if operator.startswith(names)), "rest")


def seconds_by_part(step: Callable[[], Any], device: str, repeats: int) -> tuple[float, dict[str, float]]:
    """The seconds of a step, and how they divide. The rest is also what is in no operator, such as Python itself."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities, acc_events=True) as profiler:
        whole = sum(seconds_of(step, device) for _ in range(repeats)) / repeats
    parts = dict.fromkeys(PARTS, 0.0)
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        if (part := part_of(event.key)) in parts:
            parts[part] += microseconds / 1e6 / repeats
    return whole, parts | {"rest": whole - sum(parts.values())}


def profile_cell(cell: Cell, arguments: ProfileArguments, peak: float) -> dict[str, Any]:
    """The row of a cell. Times in seconds, operations in billions (1e9)."""
    torch.manual_seed(cell.seed)
    step = make_step(ready_model(cell), make_inputs(cell), cell)
    operations: dict[str, int] = {}
    for operator, count in operations_by_name(step).items():
        operations[part_of(operator)] = operations.get(part_of(operator), 0) + count
    step()
    whole, parts = seconds_by_part(step, cell.device, arguments.repeats)
    row = columns_of(cell, arguments) | {"repeats": arguments.repeats, "peak_gflops": peak / 1e9, "seconds": whole}
    row |= {f"{part}_seconds": seconds for part, seconds in parts.items()}
    row |= {f"{part}_gflop": operations.get(part, 0) / 1e9 for part in ("products", "attention")}
    return row


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Shares of the time in per cent, for the terminal; of products with the fraction of the peak that they reach."""
    lines = []
    for row in rows:
        line = {"n": str(row["sequence_length"]), "model": row["model"], "options": row["options"]}
        line |= {"k": row["projected_length"] or "", "seconds": row["seconds"]}
        for part in [*PARTS, "rest"]:
            seconds = row[f"{part}_seconds"]
            line[part] = f"{seconds / row['seconds']:.1%}"
            if operations := row.get(f"{part}_gflop"):
                line[part] += f" at {operations / seconds / row['peak_gflops']:.2f}"
        lines.append(line)
    return format_table(lines)


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments((ProfileArguments,), argv, description=__doc__)
    check_arguments(arguments)
    torch.set_num_threads(arguments.num_threads)
    cells = [cell for n in arguments.lengths for cell in cells_of(arguments, n)]
    for cell in cells:
        if cell.options.get("compile"):
            raise UserError(f"--models {cell.name}: what is compiled has other operators; leave compile=true out")
        if reason := plan_cell(cell, memory_limit=free_memory(cell.device)).skipped:
            raise UserError(f"--models {cell.name} at n = {cell.sequence_length}: {reason}")
    rows = []
    for cell in tqdm(cells, unit="model"):
        rows.append(profile_cell(cell, arguments, measure_peak(cell.device, cell.torch_dtype)))
        gc.collect()
    print(summary(rows))
    if arguments.results_file:
        append_results(arguments.results_file, rows, arguments.seed, argv)


if __name__ == "__main__":
    run_main(main)
