"""Time, memory and operations of Linformers beside full attention and other models, at the same sizes.

    python scripts/benchmark.py --lengths 4096                       # one column; minutes on two cores
    python scripts/benchmark.py --lengths 4096 --dry_run true        # what would be measured, and what not and why
    python scripts/benchmark.py --lengths 4096 --mode training --dtype bfloat16 --device cuda
    python scripts/benchmark.py --lengths 1024 --mode training --head masked_lm \\
        --models mean_pool mean_pool:sparse_prediction=true mean_pool:gradient_checkpointing=true

An entry of --models is a family, or a family with options, family:key=value,key=value: keys of its configuration
(local_window=32, chunk_size_feed_forward=512, ...), or dtype=bfloat16, compile=true, gradient_checkpointing=true.
Families: those of Linformer (linear, mean_pool, max_pool, convolution, random), roberta_eager, roberta_sdpa,
roberta_sdpa_tiled, bert_sdpa, modernbert_sdpa, longformer, nystromformer, and the packages linformer_package and
linformer_pytorch_package where they are installed. scripts/benchmark_models.py says how each is made.

How it is measured. For each length every cell gets a process of its own, which builds its model with random weights
and warms it up: one step in which matrix-product operations are counted, one in which peak memory is measured, above
what the process held before (on a CPU the highest resident size, on CUDA `max_memory_allocated`; in training the
optimizer's state is there before, gradients are not). Then one process at a time runs a step, in turn, --repeats
times, while all others wait. If the processes of a length do not fit into memory together they are measured in
groups, each with roberta_sdpa in it; what does not fit beside that one runs alone. `fraction_of_peak` is the share of
the fastest matrix product that torch does on this machine with the same type and threads, measured before each length.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from select import select
from typing import Any

import torch
from tqdm.auto import tqdm

from benchmark_plan import (
    REFERENCE,
    CellArguments,
    Planned,
    cells_of,
    check_arguments,
    columns_of,
    free_memory,
    gib,
    plan_cell,
)
from common import append_results, format_table, parse_arguments, run_main
from operations import measure_peak


WORKER = Path(__file__).with_name("benchmark_worker.py")
# Left free when processes wait side by side.
SPARE_BYTES = 2**30


@dataclass
class BenchmarkArguments(CellArguments):
    """How it is measured."""

    repeats: int = field(default=5, metadata={"help": "Timed steps of each cell, taken in turn."})
    max_seconds: float = field(
        default=60.0, metadata={"help": "Fewer repeats, at least one, for a cell that would take longer in all."}
    )
    max_wait_seconds: float = field(
        default=1800.0, metadata={"help": "A cell that takes longer to warm up or for a step is given up."}
    )
    max_memory_gib: float | None = field(
        default=None, metadata={"help": "Memory to stay within, also of a GPU. Default: 90 %% of what is free."}
    )
    dry_run: bool = field(default=False, metadata={"help": "List the cells, and those skipped with the reason."})
    results_file: str | None = field(default=None, metadata={"help": "Add a row for each cell to this CSV."})


def memory_limit(arguments: BenchmarkArguments) -> int:
    """Bytes that one cell may take."""
    free = 0.9 * free_memory(arguments.device or "cpu")
    return int(min(free, (arguments.max_memory_gib or float("inf")) * 2**30))


class WorkerFailed(Exception):
    """A worker ended or did not answer; the message is the reason."""


class Worker:
    """One cell in a process of its own. It does nothing but when it is asked to."""

    def __init__(self, plan: Planned, max_wait_seconds: float):
        self.plan = plan
        self.max_wait_seconds = max_wait_seconds
        self.known: dict[str, Any] = {}
        self.seconds: list[float] = []
        self.failure = ""
        self.stderr = tempfile.TemporaryFile("w+", encoding="utf-8")
        threads = str(plan.cell.num_threads)
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            text=True,
            encoding="utf-8",
            env=os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        )

    def warm_up(self) -> None:
        self.known = self.try_to_ask(asdict(self.plan.cell))

    def run(self) -> None:
        """One timed step."""
        if answer := self.try_to_ask("run"):
            self.seconds.append(answer["seconds"])

    def try_to_ask(self, message: Any) -> dict[str, Any]:
        """The answer; of a worker that fails nothing, its process is ended and `failure` says why."""
        try:
            return self.ask(message)
        except WorkerFailed as failure:
            self.failure = str(failure)
            self.process.kill()
            return {}

    def ask(self, message: Any) -> dict[str, Any]:
        """Sends a line and waits for the answer. Raises `WorkerFailed`."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(json.dumps(message), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise WorkerFailed(self.reason()) from None
        ready, _, _ = select([self.process.stdout], [], [], self.max_wait_seconds)
        if not ready:
            raise WorkerFailed(f"no answer in {self.max_wait_seconds:g} s (--max_wait_seconds)")
        if not (line := self.process.stdout.readline()):
            raise WorkerFailed(self.reason())
        return json.loads(line)

    def reason(self) -> str:
        """Why the process ended."""
        code = self.process.wait()
        if code < 0:
            return f"killed by signal {-code}" + (", as for want of memory" if code == -9 else "")
        self.stderr.seek(0)
        last = self.stderr.read().strip().rpartition("\n")[2]
        return f"failed: {last}" if last else f"ended with code {code}"

    def repeats(self, arguments: BenchmarkArguments) -> int:
        """How many timed steps fit into --max_seconds."""
        return max(1, min(arguments.repeats, int(arguments.max_seconds / self.known["warm_seconds"])))

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.stderr.close()


@contextmanager
def closing(workers: list[Worker]) -> Iterator[list[Worker]]:
    """Ends the processes, whatever happens."""
    try:
        yield workers
    finally:
        for worker in workers:
            worker.close()


def start_group(queue: list[Planned], workers: list[Worker], arguments: BenchmarkArguments, bar: tqdm) -> None:
    """Starts workers and warms them up, one after the other, as long as memory is left; takes them off the queue."""
    device = arguments.device or "cpu"
    while queue:
        alive = [worker for worker in workers if not worker.failure]
        # Any of those that wait may yet grow to its peak, though only one at a time.
        needed = max([queue[0].needed_bytes, *(worker.plan.needed_bytes for worker in alive)])
        if alive and free_memory(device) < needed + SPARE_BYTES:
            return
        worker = Worker(queue.pop(0), arguments.max_wait_seconds)
        workers.append(worker)
        bar.set_postfix_str(f"warming up {worker.plan.cell.name}")
        worker.warm_up()
        bar.update()


def run_in_turn(workers: list[Worker], arguments: BenchmarkArguments, bar: tqdm) -> None:
    """The timed steps: one of every worker, then the next of every worker."""
    for turn in range(arguments.repeats):
        for worker in workers:
            bar.update()
            if worker.failure or turn >= worker.repeats(arguments):
                continue
            bar.set_postfix_str(f"step {turn + 1} of {worker.plan.cell.name}")
            worker.run()


def measure_column(
    plans: Sequence[Planned], arguments: BenchmarkArguments, peaks: dict[str, float]
) -> list[dict[str, Any]]:
    """The rows of one length. `peaks`: the operations a second of the fastest matrix product, for each dtype."""
    pending = [plan for plan in plans if not plan.skipped]
    reference = next((plan for plan in pending if plan.cell.name == REFERENCE), None)
    rows = [result_row(plan, None, None, peaks, arguments) for plan in plans if plan.skipped]
    # A cell is one warm-up and the timed steps.
    steps = 1 + arguments.repeats
    group, fits_beside_reference = 0, True
    with tqdm(total=steps * len(pending), unit="step", desc=f"n = {plans[0].cell.sequence_length}") as bar:
        while pending:
            shared = reference if fits_beside_reference else None
            if shared is not None:
                bar.total += 0 if shared in pending else steps
                pending = [shared, *(plan for plan in pending if plan is not shared)]
            queue = pending if fits_beside_reference else [pending.pop(0)]
            with closing([]) as workers:
                start_group(queue, workers, arguments, bar)
                run_in_turn(workers, arguments, bar)
                rows += [result_row(worker.plan, worker, group, peaks, arguments) for worker in workers]
            fits_beside_reference = shared is None or len(workers) > 1
            group += 1
    return rows


def result_row(
    plan: Planned, worker: Worker | None, group: int | None, peaks: dict[str, float], arguments: BenchmarkArguments
) -> dict[str, Any]:
    """A row of the CSV. Times in seconds, memory in MiB, operations in billions (1e9); empty where not measured."""
    cell = plan.cell
    row = columns_of(cell, arguments) | {
        "group": group,
        "skipped": worker.failure if worker else plan.skipped,
        "peak_gflops": peaks[cell.dtype] / 1e9,
    }
    known = worker.known if worker else {}
    row["parameters"] = known.get("parameters")
    row["gflop"] = known["operations"] / 1e9 if known else None
    row["peak_memory_mib"] = known["peak_bytes"] / 2**20 if known.get("peak_bytes") is not None else None
    row["compile_seconds"] = known.get("compile_seconds")
    seconds = worker.seconds if worker and not worker.failure else []
    row["repeats"] = len(seconds)
    row |= {"seconds_median": None, "seconds_min": None, "seconds_max": None}
    row |= {"tokens_per_second": None, "fraction_of_peak": None}
    if seconds:
        median = statistics.median(seconds)
        row |= {"seconds_median": median, "seconds_min": min(seconds), "seconds_max": max(seconds)}
        row["tokens_per_second"] = cell.batch_size * cell.sequence_length / median
        row["fraction_of_peak"] = known["operations"] / median / peaks[cell.dtype]
    return row


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """What was measured, for the terminal; what was not, and why, below it."""
    columns = ["seconds_median", "seconds_min", "seconds_max", "tokens_per_second", "peak_memory_mib", "gflop"]
    columns += ["fraction_of_peak"]
    lines, skipped = [], []
    for row in rows:
        name = row["model"] + (f":{row['options']}" if row["options"] else "")
        if row["skipped"]:
            k = f", k = {row['projected_length']}" if row["projected_length"] else ""
            skipped.append(f"skipped {name}{k}: {row['skipped']}")
        else:
            line = {"model": name, "k": row["projected_length"] or "", "batch": row["batch_size"]}
            values = {column: "" if row[column] is None else row[column] for column in columns}
            lines.append(line | values | {"repeats": row["repeats"]})
    return "\n".join([*([format_table(lines)] if lines else []), *skipped])


def show_plan(plans: Sequence[Planned]) -> None:
    for plan in plans:
        k = f" k={plan.cell.projected_length}" if plan.cell.projected_length else ""
        what = f"skipped: {plan.skipped}" if plan.skipped else f"about {gib(plan.needed_bytes)}"
        print(f"n={plan.cell.sequence_length} batch={plan.cell.batch_size} {plan.cell.name}{k}  {what}")


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments((BenchmarkArguments,), argv, description=__doc__)
    check_arguments(arguments)
    run_id = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
    for n in arguments.lengths:
        plans = [plan_cell(cell, memory_limit(arguments)) for cell in cells_of(arguments, n)]
        if arguments.dry_run:
            show_plan(plans)
            continue
        dtypes = {plan.cell.dtype: plan.cell.torch_dtype for plan in plans}
        torch.set_num_threads(arguments.num_threads)
        peaks = {name: measure_peak(arguments.device, dtype) for name, dtype in dtypes.items()}
        rows = measure_column(plans, arguments, peaks)
        print(summary(rows), flush=True)
        if arguments.results_file:
            append_results(arguments.results_file, [{"run_id": run_id, **row} for row in rows], arguments.seed, argv)


if __name__ == "__main__":
    run_main(main)
