"""scripts/benchmark.py: real worker processes, what they count and measure, and what happens to those that fail.

And scripts/profile_steps.py, which measures the same cells.
"""

import csv
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import benchmark
import benchmark_models
import benchmark_worker
import operations
import profile_steps
from benchmark_models import BUILDERS, PACKAGES, Cell, build_model
from benchmark_plan import Planned, cells_of_length, parse_entry, plan_cell
from common import UserError
from efficiency_tables import profile_table


SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
SIZE_OPTIONS = [text for name, value in SIZES.items() for text in (f"--{name}", str(value))]
QUICK = ["--num_threads", "1", "--device", "cpu", "--tokens_per_batch", "256"]
# Far more than any cell of the tests needs.
ROOMY = 2**40


def tiny_cell(model: str, **changes) -> Cell:
    k = 16 if model in benchmark_models.HAS_SLOTS else None
    return replace(Cell(model, sequence_length=128, batch_size=2, projected_length=k, **SIZES), **changes)


def arguments_for(**changes) -> benchmark.BenchmarkArguments:
    return benchmark.BenchmarkArguments(device="cpu", num_threads=1, repeats=2, **changes)


def installed(model: str) -> None:
    if model in PACKAGES:
        pytest.importorskip(PACKAGES[model].replace("-", "_"))


def operations_of(cell: Cell) -> int:
    """As the worker counts them, in this process."""
    torch.manual_seed(0)
    model = build_model(cell).requires_grad_(cell.mode == "training")
    step = benchmark_worker.make_step(model, benchmark_worker.make_inputs(cell), cell)
    return operations.count_operations(step)


@pytest.fixture(scope="module")
def column(tmp_path_factory):
    """The rows of a small column and the order in which steps were timed."""
    results = tmp_path_factory.mktemp("benchmark") / "efficiency.csv"
    order = []
    run = benchmark.Worker.run

    def noted(worker):
        order.append(worker.plan.cell.name)
        run(worker)

    models = ["linear", "roberta_sdpa", "mean_pool:dtype=bfloat16", "roberta_eager"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark.Worker, "run", noted)
        patch.setattr(operations, "PRODUCTS", [(256, 256, 256)])
        argv = ["--lengths", "128", "--models", *models, "--projected_lengths", "16", "129", "--repeats", "3"]
        benchmark.main([*argv, *QUICK, *SIZE_OPTIONS, "--results_file", str(results)])
    with results.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file)), order


def test_steps_are_timed_in_turn(column):
    # The reference is started first, so that it is in the group whatever else is.
    turn = ["roberta_sdpa", "linear", "mean_pool:dtype=bfloat16", "roberta_eager"]
    assert column[1] == turn * 3


def test_a_row_says_what_was_measured(column):
    rows = {(row["model"], row["projected_length"]): row for row in column[0]}
    row = rows["linear", "16"]
    for name in ("commit", "date", "hardware", "torch", "transformers", "seed", "command", "run_id"):
        assert row[name], name
    assert (row["sequence_length"], row["batch_size"], row["repeats"], row["dtype"]) == ("128", "2", "3", "float32")
    assert float(row["seconds_min"]) <= float(row["seconds_median"]) <= float(row["seconds_max"])
    assert float(row["tokens_per_second"]) == pytest.approx(256 / float(row["seconds_median"]), rel=1e-4)
    assert float(row["gflop"]) * 1e9 == pytest.approx(operations_of(tiny_cell("linear")), rel=1e-5)
    rate = float(row["gflop"]) / float(row["seconds_median"])
    assert float(row["fraction_of_peak"]) == pytest.approx(rate / float(row["peak_gflops"]), rel=1e-4)
    assert int(row["parameters"]) == sum(weight.numel() for weight in build_model(tiny_cell("linear")).parameters())
    assert {row["run_id"] for row in column[0]} == {row["run_id"]}


def test_an_option_of_an_entry_holds_for_its_cell_alone(column):
    rows = {row["model"]: row for row in column[0] if row["projected_length"] != "129"}
    assert (rows["mean_pool"]["dtype"], rows["mean_pool"]["base_dtype"]) == ("bfloat16", "float32")
    assert rows["mean_pool"]["peak_gflops"] != rows["linear"]["peak_gflops"]


def test_a_skipped_cell_is_a_row_with_the_reason(column):
    skipped = [row for row in column[0] if row["projected_length"] == "129"]
    assert [row["model"] for row in skipped] == ["linear", "mean_pool"]
    for row in skipped:
        assert row["skipped"] == "k = 129 slots are more than n = 128" and row["seconds_median"] == ""
    assert all(row["skipped"] == "" for row in column[0] if row not in skipped)


def test_workers_that_die_become_rows_and_the_others_go_on(monkeypatch):
    killed, fails, survives = (
        tiny_cell("linear"),
        tiny_cell("roberta_sdpa", options={"chunk_size_feed_forward": 100}),
        tiny_cell("mean_pool"),
    )
    warm_up = benchmark.Worker.warm_up

    def kill_first(worker):
        if worker.plan.cell == killed:
            os.kill(worker.process.pid, signal.SIGKILL)
        warm_up(worker)

    monkeypatch.setattr(benchmark.Worker, "warm_up", kill_first)
    plans = [Planned(cell) for cell in (killed, fails, survives)]
    rows = benchmark.measure_column(plans, arguments_for(), {"float32": 1e9})
    assert [row["model"] for row in rows] == ["linear", "roberta_sdpa", "mean_pool"]
    assert rows[0]["skipped"] == "killed by signal 9, as for want of memory"
    assert rows[1]["skipped"].startswith("failed: ValueError: The dimension to be chunked 128 has to be a multiple")
    assert rows[0]["seconds_median"] is rows[1]["seconds_median"] is None
    assert rows[2]["skipped"] == "" and rows[2]["repeats"] == 2
    shown = benchmark.summary(rows)
    assert "skipped linear, k = 16: killed by signal 9" in shown and "mean_pool" in shown.splitlines()[1]


def test_a_worker_that_does_not_answer_is_given_up(monkeypatch, tmp_path):
    silent = tmp_path / "silent.py"
    silent.write_text("import sys\nfor line in sys.stdin: pass\n")
    monkeypatch.setattr(benchmark, "WORKER", silent)
    rows = benchmark.measure_column(
        [Planned(tiny_cell("linear"))], arguments_for(max_wait_seconds=0.2), {"float32": 1e9}
    )
    assert rows[0]["skipped"] == "no answer in 0.2 s (--max_wait_seconds)"


def test_a_slow_cell_gets_fewer_steps():
    worker = benchmark.Worker.__new__(benchmark.Worker)
    worker.known = {"warm_seconds": 30.0}
    assert [worker.repeats(arguments_for(max_seconds=limit)) for limit in (1000, 65, 1)] == [2, 2, 1]


class SimulatedWorker:
    """A worker without a process, whose memory is taken from a common store as long as it lives."""

    free = 0

    def __init__(self, plan, max_wait_seconds):
        self.plan, self.failure, self.seconds = plan, "", [1.0]
        self.known = {"warm_seconds": 1.0, "operations": 10**9}
        SimulatedWorker.free -= plan.needed_bytes

    def warm_up(self):
        pass

    run = warm_up

    def repeats(self, arguments):
        return 1

    def close(self):
        SimulatedWorker.free += self.plan.needed_bytes


def groups_of(monkeypatch, needs: dict[str, int], free: int) -> list[list[str]]:
    """Which models wait side by side, given what each needs and what is free beyond the spare, both in GiB."""
    monkeypatch.setattr(SimulatedWorker, "free", free * 2**30 + benchmark.SPARE_BYTES)
    monkeypatch.setattr(benchmark, "Worker", SimulatedWorker)
    monkeypatch.setattr(benchmark, "free_memory", lambda device: SimulatedWorker.free)
    plans = [Planned(tiny_cell(model), needed * 2**30) for model, needed in needs.items()]
    rows = benchmark.measure_column(plans, arguments_for(), {"float32": 1e9})
    groups: dict[int, list[str]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row["model"])
    return list(groups.values())


def test_what_does_not_fit_together_is_measured_in_groups_with_the_reference(monkeypatch):
    needs = {"linear": 1, "mean_pool": 1, "roberta_sdpa": 1, "max_pool": 1}
    assert groups_of(monkeypatch, needs, free=10) == [["roberta_sdpa", "linear", "mean_pool", "max_pool"]]
    assert groups_of(monkeypatch, needs, free=3) == [
        ["roberta_sdpa", "linear", "mean_pool"],
        ["roberta_sdpa", "max_pool"],
    ]
    # The large one leaves no room even for the reference.
    assert groups_of(monkeypatch, needs | {"mean_pool": 10}, free=10) == [
        ["roberta_sdpa", "linear"],
        ["roberta_sdpa"],
        ["mean_pool"],
        ["roberta_sdpa", "max_pool"],
    ]


@pytest.mark.parametrize("model", ["roberta_sdpa", "roberta_eager", "roberta_sdpa_tiled", "bert_sdpa"])
def test_operations_of_full_attention(model):
    cell = tiny_cell(model)
    B, n, D, L = cell.batch_size, cell.sequence_length, cell.hidden_size, cell.num_hidden_layers
    N = B * n
    pooler = 2 * B * D * D
    assert operations_of(cell) == L * (24 * N * D**2 + 4 * N * n * D) + pooler


@pytest.mark.parametrize("model", ["linear", "mean_pool", "convolution", "random"])
def test_operations_of_a_linformer(model):
    cell = tiny_cell(model)
    B, D, L, k = cell.batch_size, cell.hidden_size, cell.num_hidden_layers, 16
    N = B * cell.sequence_length
    # Means are taken without a matrix product.
    projection = 0 if model == "mean_pool" else 2 * N * k * D
    layer = 20 * N * D**2 + projection + 4 * B * k * D**2 + 4 * N * k * D
    assert operations_of(cell) == L * layer + 2 * B * D * D


def test_operations_of_training():
    """Backward is twice forward; fused attention computes its scores once more."""
    cell = tiny_cell("roberta_sdpa", mode="training")
    B, n, D, L = cell.batch_size, cell.sequence_length, cell.hidden_size, cell.num_hidden_layers
    N = B * n
    # The pooler is not part of the loss, and so has no backward pass.
    expected = L * (3 * 24 * N * D**2 + (4 + 10) * N * n * D) + 2 * B * D * D
    assert operations_of(cell) == expected


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory of a CPU needs Linux")
def test_peak_memory_is_that_of_the_step():
    def step():
        torch.ones(64 * 2**18)

    first = torch.ones(200 * 2**18)
    del first
    peak, seconds = benchmark_worker.peak_memory(step, "cpu")
    # 64 MiB; the 200 MiB before it do not count, nor does much else.
    assert 62 * 2**20 < peak < 68 * 2**20 and seconds > 0


@pytest.mark.parametrize("model", BUILDERS)
def test_every_family_reads_and_learns(model):
    installed(model)
    cell = tiny_cell(model, mode="training")
    torch.manual_seed(0)
    network = build_model(cell)
    inputs = benchmark_worker.make_inputs(cell)
    hidden_states = network(**inputs)[0]
    assert hidden_states.shape == (2, 128, 32) and hidden_states.isfinite().all()
    # Every token is read: the words of a row change what comes out of it.
    assert not torch.allclose(hidden_states[0], hidden_states[1])
    before = {name: weight.clone() for name, weight in network.named_parameters()}
    benchmark_worker.make_step(network, inputs, cell)()
    changed = [name for name, weight in network.named_parameters() if not torch.equal(weight, before[name])]
    assert any("embedding" in name for name in changed) and len(changed) > len(before) / 2
    forward = benchmark_worker.make_step(network, inputs, replace(cell, mode="forward"))
    forward()


def test_the_peak_is_the_best_product(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(operations.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(operations, "PRODUCTS", [(4, 5, 6), (8, 9, 10), (2, 3, 4)])
    # Every product takes one second by this clock, so that the largest has the highest rate.
    assert operations.measure_peak("cpu", torch.float32) == 2 * 8 * 9 * 10


def test_modernbert_has_as_many_feed_forward_parameters():
    def feed_forward(model: str, size: int) -> int:
        network = build_model(tiny_cell(model, intermediate_size=size))
        names = ("mlp", "intermediate", "output.dense")
        return sum(
            weight.numel()
            for name, weight in network.named_parameters()
            if weight.dim() == 2 and any(part in name for part in names) and "attention" not in name
        )

    assert feed_forward("modernbert_sdpa", 96) == feed_forward("bert_sdpa", 96) > 0


def test_options_reach_the_model():
    assert build_model(tiny_cell("mean_pool", options={"local_window": 8})).config.local_window == 8
    assert build_model(tiny_cell("roberta_sdpa_tiled", batch_size=16)).config.chunk_size_feed_forward == 32
    checkpointed = build_model(tiny_cell("linear", options={"gradient_checkpointing": True}))
    assert checkpointed.is_activation_checkpointing
    assert not build_model(tiny_cell("linear")).is_activation_checkpointing


def test_sparse_prediction_is_the_same_loss_for_less():
    losses, counts = [], []
    for sparse in (False, True):
        cell = tiny_cell("mean_pool", head="masked_lm", mode="training", options={"sparse_prediction": sparse})
        torch.manual_seed(0)
        losses.append(build_model(cell)(**benchmark_worker.make_inputs(cell)).loss)
        counts.append(operations_of(cell))
    assert torch.allclose(*losses) and counts[1] < counts[0]


def test_half_precision():
    cell = tiny_cell("linear", dtype="bfloat16", device="cpu")
    known, _ = benchmark_worker.prepare(replace(cell, num_threads=torch.get_num_threads()))
    assert known["operations"] == operations_of(tiny_cell("linear"))


def test_the_worker_alone_answers_every_line_and_prints_nothing_else():
    cell = {"model": "linear", "sequence_length": 64, "batch_size": 1, "projected_length": 8, **SIZES}
    done = subprocess.run(
        [sys.executable, str(Path(benchmark_worker.__file__))],
        input=json.dumps(cell) + "\nrun\nrun\n",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    known, *timed = map(json.loads, done.stdout.splitlines())
    assert known["operations"] > 0 and len(timed) == 2 and all(answer["seconds"] > 0 for answer in timed)


def test_what_would_not_fit_is_not_started():
    cell = replace(Cell("roberta_eager", sequence_length=65536, batch_size=1), num_hidden_layers=1)
    plan = plan_cell(cell, memory_limit=16 * 2**30)
    # Two matrices of 12 heads x 65,536^2 numbers of 4 bytes are 384 GiB.
    assert plan.skipped.startswith("needs about 38") and plan.skipped.endswith(" GiB, and 16.0 GiB are free")
    sdpa = plan_cell(replace(cell, model="roberta_sdpa"), memory_limit=16 * 2**30)
    assert sdpa.skipped == "" and sdpa.needed_bytes < 4 * 2**30


def test_what_cannot_be_is_skipped_with_the_reason(monkeypatch):
    assert "has no masked-LM head" in plan_cell(tiny_cell("linformer_package", head="masked_lm"), ROOMY).skipped
    assert "more than 64 tokens" in plan_cell(tiny_cell("nystromformer", sequence_length=64), ROOMY).skipped
    monkeypatch.setitem(sys.modules, "linformer_pytorch", None)
    missing = plan_cell(tiny_cell("linformer_pytorch_package"), ROOMY).skipped
    assert missing.startswith("the package linformer-pytorch cannot be imported")


def test_dry_run_starts_nothing(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "Worker", None)
    argv = ["--lengths", "128", "256", "--models", "linear", "roberta_sdpa", "--projected_lengths", "16", "200"]
    benchmark.main([*argv, *QUICK, *SIZE_OPTIONS, "--dry_run", "true"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        *("n=128 batch=2 linear k=16", "n=128 batch=2 linear k=200", "n=128 batch=2 roberta_sdpa"),
        *("n=256 batch=1 linear k=16", "n=256 batch=1 linear k=200", "n=256 batch=1 roberta_sdpa"),
    ]
    assert [("skipped: k = 200" in line) for line in lines] == [False, True, False, False, False, False]


def test_cells_of_a_length():
    common = tiny_cell("", projected_length=None)
    entries = ["linear", "roberta_sdpa", "mean_pool:local_window=8,compile=true"]
    cells = cells_of_length(entries, [16, 32], common)
    assert [(cell.name, cell.projected_length) for cell in cells] == [
        *(("linear", 16), ("linear", 32), ("roberta_sdpa", None)),
        *(("mean_pool:local_window=8,compile=true", 16), ("mean_pool:local_window=8,compile=true", 32)),
    ]
    assert cells[-1].config_options == {"local_window": 8}


@pytest.mark.parametrize(
    "entry, message",
    [
        ("performer", "has no 'performer'; it takes linear, mean_pool"),
        ("linear:local_window", "'local_window' is not"),
        ("linear:projected_length=8", "projected_length is the same for all models"),
        ("linear:dtype=float16", "dtype must be float32 or bfloat16"),
        ("linear:compile=2", "compile must be true or false"),
    ],
)
def test_bad_entries_are_refused(entry, message):
    with pytest.raises(UserError, match=message):
        parse_entry(entry)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--models", "roberta_sdpa:local_window=8"], "roberta_sdpa has no option 'local_window'"),
        (["--models", "linformer_package:local_window=8"], "linformer_package has no option 'local_window'"),
        (["--lengths", "0"], "--lengths must be above 0, not 0"),
        (["--repeats", "-1"], "--repeats must be above 0, not -1"),
        (["--num_attention_heads", "5"], "must be a multiple of --num_attention_heads 5"),
        (["--mode", "backward"], "invalid choice: 'backward'"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        benchmark.main(["--lengths", "128", *QUICK, *SIZE_OPTIONS, "--dry_run", "true", *options])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="--device cuda: torch finds no GPU here"):
        benchmark.main(["--lengths", "128", "--device", "cuda", "--dry_run", "true"])


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """The rows of a small profile."""
    results = tmp_path_factory.mktemp("profile") / "profile.csv"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operations, "PRODUCTS", [(256, 256, 256)])
        models = ["roberta_sdpa", "mean_pool:local_window=32"]
        argv = ["--lengths", "128", "--models", *models, "--projected_lengths", "16", "--repeats", "2", *QUICK]
        profile_steps.main([*argv, *SIZE_OPTIONS, "--results_file", str(results)])
        training = ["--lengths", "128", "--models", "roberta_eager", "--mode", "training", "--repeats", "2", *QUICK]
        profile_steps.main([*training, *SIZE_OPTIONS, "--results_file", str(results)])
    with results.open(newline="", encoding="utf-8") as file:
        return {row["model"]: row for row in csv.DictReader(file)}


def test_a_profile_divides_the_whole_step(profiled):
    for model, row in profiled.items():
        parts = {part: float(row[f"{part}_seconds"]) for part in (*profile_steps.PARTS, "rest")}
        # Operators that were counted twice, or of more steps than one, would leave less than nothing for the rest.
        assert all(seconds >= 0 for seconds in parts.values())
        absent = {"roberta_sdpa": {"softmax", "optimizer"}, "mean_pool": {"attention", "optimizer"}}
        expected = parts.keys() - absent.get(model, {"attention"})
        assert {part for part, seconds in parts.items() if seconds} == expected


def test_a_profile_has_all_operations(profiled):
    cells = {
        "roberta_sdpa": tiny_cell("roberta_sdpa"),
        "mean_pool": tiny_cell("mean_pool", options={"local_window": 32}),
        "roberta_eager": tiny_cell("roberta_eager", mode="training"),
    }
    for model, cell in cells.items():
        of_products, of_attention = (float(profiled[model][f"{part}_gflop"]) for part in ("products", "attention"))
        assert (of_products + of_attention) * 1e9 == pytest.approx(operations_of(cell), rel=1e-4)
        assert (of_attention > 0) == (model == "roberta_sdpa")


def test_the_table_of_a_profile(profiled):
    row = dict.fromkeys(profiled["mean_pool"], "") | profiled["mean_pool"]
    seconds = {f"{part}_seconds": "0" for part in profile_steps.PARTS}
    seconds |= {"products_seconds": "1.2", "softmax_seconds": "0.5", "rest_seconds": "0.3", "seconds": "2"}
    row |= seconds | {"products_gflop": "90", "attention_gflop": "0", "peak_gflops": "100"}
    header, _, line = profile_table([row])[2:5]
    assert header.split(" | ")[3:] == [
        *("seconds", "were all products at the peak", "products", "fused attention", "softmax", "rest |")
    ]
    # 90 of 100 billion a second would take 0.9 s; they took 1.2, which is at three quarters of the peak.
    assert line.split(" | ")[3:] == ["2", "0.9", "60% at 0.75", "–", "25%", "15% |"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--models", "linear:compile=true"], "leave compile=true out"),
        (["--models", "mean_pool", "--projected_lengths", "200"], "mean_pool at n = 128: .*200"),
        (["--repeats", "0"], "--repeats must be above 0, not 0"),
    ],
)
def test_what_cannot_be_profiled_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        profile_steps.main(["--lengths", "128", *QUICK, *SIZE_OPTIONS, *options])
