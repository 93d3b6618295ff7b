"""scripts/make_tables.py and what it draws on: every table from a CSV written by hand, and the figure."""

import csv
from pathlib import Path

import pytest

import make_tables
import plot_downstream
import plot_efficiency
import plot_pretraining
from common import UserError
from conversion_table import conversion_table, shapes_table
from downstream_table import downstream_table, scores_table
from efficiency_tables import cost_table, paper_table, peers_table, speedups_table, targets_table, training_table
from pretraining_table import pretraining_table


PEAK = 100.0


def cell(model: str, n: int, seconds: float | None, memory: float = 100.0, gflop: float = 10.0, **changes) -> dict:
    """A row as scripts/benchmark.py writes it; seconds None: skipped."""
    k = changes.pop("k", 128 if model in ("linear", "mean_pool") else "")
    row = {
        **{"commit": "abc", "date": "2026-01-01", "hardware": "a CPU, 2 cores", "torch": "2.13", "seed": 42},
        **{"transformers": "5.24", "command": "scripts/benchmark.py", "run_id": "1", "group": 0, "model": model},
        **{"sequence_length": n, "batch_size": max(1, 4096 // n), "projected_length": k, "options": ""},
        **{"mode": "forward", "head": "none", "dtype": "float32", "base_dtype": "float32", "device": "cpu"},
        **{"num_threads": 2, "vocab_size": 100, "hidden_size": 768, "num_hidden_layers": 3, "skipped": ""},
        **{"num_attention_heads": 12, "intermediate_size": 3072, "tokens_per_batch": 4096, "gflop": gflop},
        **{
            "seconds_median": seconds,
            "seconds_min": seconds and seconds * 0.9,
            "seconds_max": seconds and seconds * 2,
        },
        **{"tokens_per_second": seconds and max(n, 4096) / seconds, "peak_memory_mib": memory},
        **{"fraction_of_peak": seconds and gflop / seconds / PEAK, "peak_gflops": PEAK},
    }
    if seconds is None:
        row |= {"skipped": "needs about 9 GiB", "peak_memory_mib": "", "gflop": ""}
    return row | changes


def written(rows: list[dict], path: Path) -> list[dict[str, str]]:
    """The rows as they come back from a CSV: text, and nothing for None."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return make_tables.read_rows(path)


def cells_of(lines: list[str]) -> list[list[str]]:
    """The body of the first Markdown table."""
    table = [line for line in lines if line.startswith("|")]
    return [[text.strip() for text in line.strip("|").split("|")] for line in table[2:]]


@pytest.fixture
def forward(tmp_path) -> list[dict[str, str]]:
    rows = [
        cell("roberta_sdpa", 4096, 2.0, memory=200, gflop=30.0),
        cell("roberta_sdpa_tiled", 4096, 1.6),
        cell("roberta_eager", 4096, 6.0, memory=1500, gflop=30.0),
        cell("linear", 4096, 1.0, memory=100, gflop=12.0),
        cell("linear", 4096, 1.25, memory=160, k=256),
        cell("mean_pool", 4096, 1.6, options="local_window=32"),
        cell("linformer_package", 4096, 0.9, k=128),
        cell("roberta_sdpa", 65536, 400.0, memory=3000, gflop=500.0),
        cell("roberta_eager", 65536, None),
        cell("linear", 65536, 20.0, memory=3000, gflop=200.0),
    ]
    return written(rows, tmp_path / "efficiency.csv")


def test_targets(forward):
    lines = targets_table(forward)
    assert cells_of(lines) == [
        # 12 operations at 100 a second would take 0.12 s of the 2 s of SDPA.
        ["4096", "Linformer, linear", "6.0x", "2.0x", "1.6x", "2.5x", "17x", "0.90x", "0.12", "3.4x"],
        ["4096", "Linformer, mean_pool, `local_window=32`"]
        + ["3.8x", "1.2x", "1.0x", "3.0x", "20x", "0.56x", "0.06", "3.4x"],
        ["65536", "Linformer, linear", "–", "20x", "–", "2.5x", "200x", "–", "0.10", "20x"],
    ]
    assert (
        lines[0]
        == "Forward pass, float32, on 2 threads (a CPU, 2 cores), batches of 4096 tokens, 3 layers of width 768:"
    )
    assert "- RoBERTa, eager at n = 65536: needs about 9 GiB" in lines
    assert "Not measured on a GPU" in lines[-1]


def test_growth_with_length(tmp_path):
    """Batches of 4,096 tokens: the seconds of a row are those of the batch by its rows."""
    lengths = (512, 1024, 2048, 4096, 8192)
    rows = [cell("linear", n, 1e-3 * max(n, 4096)) for n in lengths]
    rows += [cell("roberta_sdpa", n, 1e-6 * n * max(n, 4096)) for n in lengths[:-1]]
    rows += [cell("linear", 512, 9.0, run_id="2"), cell("linear", 8192, 9.0, k=256)]
    (line,) = [line for line in targets_table(written(rows, tmp_path / "rows.csv")) if line.startswith("From")]
    assert line == (
        "From 1,024 tokens on, time grows as n^1.00 to 8,192 (Linformer, linear), n^2.00 to 4,096 (RoBERTa, SDPA)."
    )


def test_speedups_are_of_every_setting(tmp_path):
    one_text = {"tokens_per_batch": "", "batch_size": 1}
    rows = [cell("linear", 512, 1.0), cell("roberta_sdpa", 512, 2.0), cell("convolution", 512, 0.5, k=128)]
    rows += [cell("linear", 512, 0.2, **one_text), cell("roberta_sdpa", 512, 0.3, **one_text)]
    # Nothing to compare with, another k, and a peer.
    rows += [cell("linear", 1024, 1.0), cell("linear", 512, 1.5, k=256), cell("longformer", 512, 9.0)]
    rows = written(rows, tmp_path / "rows.csv")
    lines = speedups_table(rows)
    assert [line[:4] for line in cells_of(lines) if len(line) > 3 and line[0] == "512"] == [
        ["512", "Linformer, linear", "–", "2.0x"],
        ["512", "Linformer, convolution", "–", "4.0x"],
        ["512", "Linformer, linear", "–", "1.5x"],
    ]
    assert not any(line.startswith("| 1024") for line in lines)
    assert [line for line in targets_table(rows) if line.endswith(":")] == [lines[0]]


def test_what_is_compiled_is_compared_with_what_is_compiled(tmp_path):
    compiled = {"options": "compile=true"}
    rows = [cell("roberta_sdpa", 4096, 2.0), cell("linear", 4096, 1.0), cell("linear", 4096, 0.8, **compiled)]
    table = cells_of(speedups_table(written(rows, tmp_path / "rows.csv")))
    assert [line[3] for line in table] == ["2.0x"]
    rows.append(cell("roberta_sdpa", 4096, 1.2, **compiled))
    table = cells_of(speedups_table(written(rows, tmp_path / "rows.csv")))
    assert [line[3] for line in table] == ["2.0x", "1.5x"]


def test_paper(forward):
    assert cells_of(paper_table(forward)) == [
        ["4096", "6.0x / 2.0x (3.4x)", "4.8x / 1.6x (3.2x)", "– (2.8x)"]
        + ["15x / 2.0x (14x)", "9.4x / 1.2x (13x)", "– (8.3x)"],
        ["65536", "– / 20x (20x)", "– (18x)", "– (16x)", "– / 1.0x (60x)", "– (52x)", "– (40x)"],
    ]


def test_peers(forward):
    body = cells_of(peers_table(forward))
    assert [line[:3] for line in body] == [
        *(["4096", "RoBERTa, SDPA", ""], ["4096", "RoBERTa, SDPA, tiled", ""], ["4096", "RoBERTa, eager", ""]),
        *(["4096", "Linformer, linear", "128"], ["4096", "Linformer, linear", "256"]),
        *(["4096", "Linformer, mean_pool, `local_window=32`", "128"], ["4096", "package `linformer`", "128"]),
        *(["65536", "RoBERTa, SDPA", ""], ["65536", "Linformer, linear", "128"]),
    ]
    assert body[2][3:] == ["6 (5.4 to 12)", "0.33x", "683", "1,500", "0.05"]
    assert "- RoBERTa, eager at n = 65536: needs about 9 GiB" in peers_table(forward)


def test_cost_of_one_text(tmp_path):
    rows = [
        cell("roberta_sdpa", 4096, 0.8, memory=80),
        cell("mean_pool", 4096, 0.2, memory=20),
        # Of a slower day, and without full attention: not beside those.
        *(cell(model, 4096, 1.0, run_id="2") for model in ("longformer", "linformer_package", "modernbert_sdpa")),
        cell("roberta_sdpa", 65536, 80.0, memory=1600),
        # Of another k, of several texts, of a length that is not shown, not measured.
        cell("mean_pool", 65536, 4.0, k=256),
        cell("mean_pool", 65536, 4.0, batch_size=2, run_id="3"),
        cell("longformer", 1024, 1.0),
        cell("linformer_package", 4096, None),
        cell("mean_pool", 16384, 9.0, num_hidden_layers=12),
    ]
    lines = cost_table(written(rows, tmp_path / "efficiency.csv"))
    assert cells_of(lines) == [
        ["RoBERTa, full attention (SDPA): the twin", "0.8 s, 80 MiB", "–", "80 s, 1,600 MiB"],
        ["this Linformer, 128 means alone", "0.2 s, 20 MiB", "–", "–"],
    ]
    assert "3 layers" in lines[0] and "12 layers" not in "".join(lines)


def test_training(tmp_path):
    training = {"mode": "training", "head": "masked_lm"}
    checkpointed = {"options": "local_window=32,gradient_checkpointing=true"}
    rows = [
        cell("roberta_sdpa", 1024, 4.0, memory=900, **training),
        cell("mean_pool", 1024, 2.0, memory=800, options="local_window=32", **training),
        cell("mean_pool", 1024, 2.5, memory=200, **training | checkpointed),
        cell("linear", 1024, 1.0, memory=100, **training | {"dtype": "bfloat16", "options": "dtype=bfloat16"}),
        cell("linear", 1024, 9.0),
    ]
    lines = training_table(written(rows, tmp_path / "rows.csv"))
    assert "Training step (forward, backward, AdamW), masked-LM head, float32" in lines[0]
    assert [line[6:] for line in cells_of(lines)] == [
        *(["1.0x", "–", "–"], ["2.0x", "–", "–"], ["1.6x", "0.80x", "4.0x"]),
        # Its plain model was measured in a forward pass alone.
        ["4.0x", "–", "–"],
    ]


def test_ratios_stay_within_a_run_and_a_group(tmp_path):
    rows = [
        cell("roberta_sdpa", 512, 2.0),
        cell("roberta_sdpa", 512, 3.0, group=1),
        cell("linear", 512, 1.0, group=1),
        cell("roberta_sdpa", 512, 50.0, run_id="2"),
    ]
    assert cells_of(targets_table(written(rows, tmp_path / "rows.csv")))[0][3] == "3.0x"
    alone = [cell("linear", 512, 1.0, run_id="1"), cell("roberta_sdpa", 512, 2.0, run_id="2")]
    assert cells_of(targets_table(written(alone, tmp_path / "rows.csv"))) == []


def test_the_latest_measurement_counts(tmp_path):
    rows = [cell("linear", 512, 1.0), cell("linear", 512, 7.0, run_id="2")]
    assert [line[3] for line in cells_of(peers_table(written(rows, tmp_path / "rows.csv")))] == ["7 (6.3 to 14)"]


def test_a_run_with_all_to_compare_with_counts_before_a_later_one_without(tmp_path):
    rows = [
        *(cell("linear", 512, 1.0), cell("roberta_sdpa", 512, 2.0), cell("roberta_eager", 512, 4.0)),
        *(cell("linear", 512, 1.5, run_id="2"), cell("roberta_sdpa", 512, 9.0, run_id="2")),
    ]
    assert cells_of(targets_table(written(rows, tmp_path / "rows.csv")))[0][2:4] == ["4.0x", "2.0x"]


def test_what_is_not_comparable_stands_in_tables_of_its_own(tmp_path):
    rows = [
        cell("linear", 4096, 1.0),
        cell("linear", 4096, 0.1, device="cuda", hardware="1 x a GPU", base_dtype="bfloat16", dtype="bfloat16"),
        cell("linear", 512, 0.2, tokens_per_batch="", batch_size=1),
        cell("linear", 1024, 0.3, tokens_per_batch="", batch_size=1),
        cell("linear", 1024, 0.6, tokens_per_batch="", batch_size=2),
    ]
    lines = peers_table(written(rows, tmp_path / "rows.csv"))
    assert [line for line in lines if line.endswith(":")] == [
        "Forward pass, float32, on 2 threads (a CPU, 2 cores), batches of 4096 tokens, 3 layers of width 768:",
        "Forward pass, bfloat16, on 1 x a GPU, batches of 4096 tokens, 3 layers of width 768:",
        "Forward pass, float32, on 2 threads (a CPU, 2 cores), batch size 1, 3 layers of width 768:",
        "Forward pass, float32, on 2 threads (a CPU, 2 cores), batch size 2, 3 layers of width 768:",
    ]
    assert not any("Not measured on a GPU" in line for line in lines)


def test_views_of_a_file_in_a_readme(forward, tmp_path, monkeypatch):
    monkeypatch.setattr(make_tables, "ROOT", tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(
        "before\n<!-- table: efficiency.csv -->\nold\n<!-- end of table -->\nbetween\n"
        "<!-- table: efficiency.csv peers -->\nold\n<!-- end of table -->\nafter\n"
    )
    with pytest.raises(UserError, match="does not say what results/ says"):
        make_tables.main(["--readme", str(readme), "--check", "true"])
    make_tables.main(["--readme", str(readme)])
    text = readme.read_text()
    first, second = text.split("between")
    assert text.startswith("before\n") and text.endswith("<!-- end of table -->\nafter\n") and "old" not in text
    assert "limit by operations" in first and "tokens/s" in second
    assert first.count("Measured with torch 2.13, transformers 5.24.") == 1
    make_tables.main(["--readme", str(readme), "--check", "true"])


def test_several_pages_are_written_and_checked(forward, tmp_path, monkeypatch):
    monkeypatch.setattr(make_tables, "ROOT", tmp_path)
    pages = [str(tmp_path / name) for name in ("first.md", "second.md")]
    for page in pages:
        Path(page).write_text("<!-- table: efficiency.csv peers -->\nold\n<!-- end of table -->\n")
    make_tables.main(["--readme", *pages])
    assert all("tokens/s" in Path(page).read_text() for page in pages)
    make_tables.main(["--readme", *pages, "--check", "true"])
    Path(pages[1]).write_text(Path(pages[1]).read_text().replace("tokens/s", "tokens"))
    with pytest.raises(UserError, match="second.md does not say what results/ says"):
        make_tables.main(["--readme", *pages, "--check", "true"])


def test_machines_are_named_with_where_to_look_them_up(downstream, tmp_path):
    path = tmp_path / "downstream.csv"
    assert make_tables.table_of(path).endswith("Measured on a CPU, torch 2.13, transformers 5.24.\n")
    written([row | {"hardware": f"CPU {index % 2}"} for index, row in enumerate(downstream)], path)
    last = make_tables.table_of(path).splitlines()[-1]
    assert (
        "on CPU 0, torch" in last
        and "; CPU 1, torch" in last
        and last.endswith("(downstream.csv says which row on which).")
    )


def test_the_table_of_a_file_is_printed(forward, tmp_path, capsys):
    make_tables.main(["--results_file", str(tmp_path / "efficiency.csv"), "--view", "paper"])
    assert "| 4096 | 6.0x / 2.0x (3.4x) |" in capsys.readouterr().out


def test_what_there_is_no_table_of_is_refused(forward, tmp_path):
    with pytest.raises(UserError, match="there is no table 'pears' of .*there are finetuning, efficiency, targets"):
        make_tables.main(["--results_file", str(tmp_path / "efficiency.csv"), "--view", "pears"])
    with pytest.raises(UserError, match="there are no results in .*nothing.csv"):
        make_tables.main(["--results_file", str(tmp_path / "nothing.csv")])
    (tmp_path / "empty.csv").write_text("model\n")
    with pytest.raises(UserError, match="empty.csv has no rows"):
        make_tables.main(["--results_file", str(tmp_path / "empty.csv")])


def test_the_figure(tmp_path, capsys):
    lengths = (512, 1024, 2048, 4096, 8192)
    rows = [cell("linear", n, 1e-3 * max(n, 4096), memory=0.1 * max(n, 4096)) for n in lengths]
    rows += [cell("roberta_sdpa", n, 1e-6 * n * max(n, 4096), memory=0.1 * max(n, 4096)) for n in lengths]
    rows += [cell("roberta_eager", 8192, None), cell("linear", 8192, 5.0, k=256), cell("mean_pool", 512, 1.0)]
    rows += [cell("roberta_sdpa", 512, 1.0, mode="training"), cell("linear", 8192, 9.0, num_hidden_layers=12)]
    written(rows, tmp_path / "efficiency.csv")
    figure = tmp_path / "figures" / "efficiency.png"
    argv = ["--results_file", str(tmp_path / "efficiency.csv"), "--output_file", str(figure)]
    plot_efficiency.main(argv)
    assert figure.read_bytes().startswith(b"\x89PNG") and list(figure.parent.iterdir()) == [figure]

    (arguments,) = plot_efficiency.parse_arguments((plot_efficiency.Arguments,), argv)
    curves = {
        name: curve for name, *curve in plot_efficiency.curves_of(make_tables.read_rows(Path(argv[1])), arguments)
    }
    assert list(curves) == ["Linformer, linear", "RoBERTa, SDPA", "Linformer, mean_pool"]
    powers = [plot_efficiency.exponent(curve[0], curve[1]) for curve in curves.values()]
    # One point alone has no slope.
    assert powers[:2] == pytest.approx([1, 2]) and powers[2] is None
    assert plot_efficiency.exponent(*curves["RoBERTa, SDPA"][::2]) == pytest.approx(1)
    with pytest.raises(UserError, match="has no measured rows of --mode forward, --dtype bfloat16"):
        plot_efficiency.main([*argv, "--dtype", "bfloat16"])
    written([*rows, cell("linear", 512, 1.0, hardware="another CPU")], tmp_path / "efficiency.csv")
    with pytest.raises(UserError, match="several machines .a CPU, 2 cores; another CPU."):
        plot_efficiency.main(argv)


# Conversion


def converted(k: int, w: int, length: int, keys: float, cosine: float, **changes) -> dict:
    """A row as scripts/convert.py writes it."""
    row = {"command": f"convert {k} {w}", "seed": 42, "experiment": "convert", "data": "reviews", "length": length}
    row |= {"projection_type": "mean_pool", "projected_length": k, "local_window": w, "slot_projections": True}
    row |= {"trainable": "", "train_tokens": "", "learning_rate": "", "target": "whole", "keys_a_query": keys}
    row |= {"position_extension": "copy", "trained_length": "", "token_cosine": cosine}
    return row | {"embedding_cosine": cosine + 0.01} | changes


def test_shapes_and_all_conversions(tmp_path):
    taught = {"experiment": "distill", "trainable": "long_only", "train_tokens": 2_100_000, "learning_rate": 0.001}
    rows = [
        converted(128, 32, 256, 100, 0.99),
        converted(128, 32, 512, 189, 0.95),
        converted(16, 64, 512, 180, 0.94),
        converted(128, 32, 512, 189, 0.96, command="less", **taught | {"train_tokens": 300_000}),
        converted(128, 32, 512, 189, 0.97, command="more", **taught),
        # None of these is of the same texts, taught so, of the same projection, or read whole by the source.
        converted(128, 32, 512, 189, 0.91, command="all", **taught | {"trainable": "all"}),
        converted(128, 32, 512, 189, 0.92, command="books", data="books"),
        converted(128, 32, 512, 189, 0.93, command="linear", projection_type="linear"),
        converted(128, 32, 1024, 200, 0.98, command="long", target="windows"),
    ]
    rows = written(rows, tmp_path / "conversion.csv")
    assert cells_of(shapes_table(rows)) == [
        ["16", "64", "128", "180", "0.940", "0.950", "–", "–"],
        ["128", "32", "128", "189", "0.950", "0.960", "0.970", "0.980"],
    ]
    lines = cells_of(conversion_table(rows))
    assert len(lines) == 8
    bert = ["reviews", "mean_pool", "128", "32", "no", "189", "0.990", "0.950", "–", "0.960"]
    assert lines[0] == bert
    assert lines[3][4:] == ["slots only, 2.1 M tokens, lr 0.001", "189", "–", "0.970", "–", "0.980"]
    assert lines[7] == ["reviews", "mean_pool, positions copied", "128", "32", "no", "200", "–", "–", "0.980", "0.990"]


# Downstream


def tuned(name: str, seed: int, score: float, k: int, w: int = 0, length: int = 512, **changes) -> dict:
    """A row as scripts/finetune.py writes it."""
    made = {"commit": "abc", "hardware": "a CPU", "torch": "2.13", "transformers": "5.24", "seed": seed}
    row = {**made, "run_name": name, "task": name.split("-")[0], "data": "data/glue/rte", "model": name}
    row |= {"model_type": "linformer", "projection_type": "mean_pool", "projection_sharing": "layerwise"}
    row |= {"projected_length": k, "local_window": w, "max_length": length, "training_rows": 2490}
    row |= {"evaluated_rows": 277, "eval_score": score, "eval_accuracy": "", "compressed_share_validation": 0.25}
    row |= {"teacher": ""}
    return row | changes


def words(name: str, seed: int, score: float) -> dict:
    """A row as scripts/baseline.py writes it."""
    made = tuned(name, seed, score, 0, model="TF-IDF + logistic regression", compressed_share_validation="")
    return made | dict.fromkeys(
        ("model_type", "projection_type", "projected_length", "local_window", "max_length"), ""
    )


@pytest.fixture
def downstream(tmp_path) -> list[dict[str, str]]:
    rows = [
        tuned("rte-slots", 1, 0.58, 32),
        tuned("rte-slots", 2, 0.61, 32),
        tuned("rte-twin", 1, 0.60, 512, compressed_share_validation=0),
        tuned("rte-twin", 2, 0.62, 512, compressed_share_validation=0),
        tuned("rte-window", 1, 0.605, 64, 32),
        tuned("rte-taught", 1, 0.595, 32, teacher="output/rte-twin-1"),
        # Twins of other data are no twins.
        tuned("mrpc-twin", 1, 0.80, 512, compressed_share_validation=0),
        tuned("mrpc-slots", 1, 0.785, 32),
        # Nothing is compressed here, so it says nothing of compression.
        tuned("cola-twin", 1, 0.30, 512, compressed_share_validation=0),
        tuned("cola-slots", 1, 0.50, 32, compressed_share_validation=0),
        # What was pretrained otherwise has a twin of its own.
        tuned("rte-small", 1, 0.55, 128, 32),
        tuned("rte-small_twin", 1, 0.54, 512, 32, compressed_share_validation=0),
        # Words are counted on the rows of a seed, for whatever was trained on them.
        words("rte-words", 2, 0.57),
        words("rte-words", 3, 0.99),
        words("qqp-words", 1, 0.99),
        tuned("-long", 1, "", 64, 32, 4096, task="", data="data/authors/train.parquet", eval_accuracy=0.9),
    ]
    return written(rows, tmp_path / "downstream.csv")


def test_downstream_beside_the_twin_of_the_same_task_and_seed(downstream):
    table = cells_of(downstream_table(downstream))
    slots, twin = "Linformer, mean_pool", "softmax attention (k = n), the twin"
    bert = "all-MiniLM-L6-v2"
    assert table == [
        [bert, "rte", "2,490", "277", twin, "512", "512", "0%", "2", "61.0 ± 1.4", ""],
        [bert, "rte", "2,490", "277", slots, "32", "512", "25%", "2", "59.5 ± 2.1", "-1.5 ± 0.7"],
        [bert, "rte", "2,490", "277", slots, "64 + 1 + 3 x 32", "512", "25%", "1", "60.5", "+0.5"],
        [bert, "rte", "2,490", "277", f"{slots}, taught by the twin", "32", "512", "25%", "1", "59.5", "-0.5"],
        [bert, "rte", "2,490", "277", "TF-IDF + logistic regression", "", "", "", "1", "57.0", "-5.0"],
        [bert, "mrpc", "2,490", "277", twin, "512", "512", "0%", "1", "80.0", ""],
        [bert, "mrpc", "2,490", "277", slots, "32", "512", "25%", "1", "78.5", "-1.5"],
        [bert, "cola", "2,490", "277", twin, "512", "512", "0%", "1", "30.0", ""],
        [bert, "cola", "2,490", "277", slots, "32", "512", "0%", "1", "50.0", "+20.0"],
        ["novels", "rte", "2,490", "277", twin, "512 + 1 + 3 x 32", "512", "0%", "1", "54.0", ""],
        ["novels", "rte", "2,490", "277", slots, "128 + 1 + 3 x 32", "512", "25%", "1", "55.0", "+1.0"],
        [bert, "authors", "2,490", "277", slots, "64 + 1 + 3 x 32", "4096", "25%", "1", "90.0", ""],
        [bert, "mean of the 2 tasks with compressed texts", "", "", slots, "32", "512", "", "", "", "-1.5"],
    ]


def test_scores_have_a_column_for_each_task(downstream):
    lines = scores_table(downstream)
    slots, twin = "Linformer, mean_pool", "softmax attention (k = n), the twin"
    assert "rte, 277 texts | mrpc, 277 texts | cola, 277 texts | authors, 277 texts" in lines[0]
    assert cells_of(lines) == [
        [twin, "512", "512", "61.0 ± 1.4, 2 seeds", "80.0", "30.0", "–"],
        [slots, "32", "512", "59.5 ± 2.1, 2 seeds (-1.5 ± 0.7)", "78.5 (-1.5)", "50.0 (+20.0)", "–"],
        [slots, "64 + 1 + 3 x 32", "512", "60.5 (+0.5)", "–", "–", "–"],
        [f"{slots}, taught by the twin", "32", "512", "59.5 (-0.5)", "–", "–", "–"],
        [slots, "64 + 1 + 3 x 32", "4096", "–", "–", "–", "90.0"],
        ["TF-IDF + logistic regression", "", "", "57.0 (-5.0)", "–", "–", "–"],
    ]


def test_the_downstream_figure_shows_what_has_a_twin(downstream, tmp_path):
    found = plot_downstream.points(downstream)
    slots = found["Linformer, mean_pool, 32 keys, reads 512"]
    assert slots["rte\n2,490 rows"] == pytest.approx([-2.0, -1.0])
    assert found["Linformer, mean_pool, 128 + 1 + 3 x 32 keys, reads 512, from novels"]["rte\n2,490 rows"] == (
        pytest.approx([1.0])
    )
    assert not any("authors" in task for values in found.values() for task in values)
    plot_downstream.main(
        ["--results_file", str(tmp_path / "downstream.csv"), "--output_file", str(tmp_path / "figure.png")]
    )
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="no task has both"):
        plot_downstream.draw(downstream[-1:])


# Pretraining


def test_perplexities_beside_the_twin_of_the_same_recipe():
    def pretrained(model: str, perplexity: float, *options: str, **changes: str) -> dict[str, str]:
        row = {"model": model, "projection_type": "mean_pool", "projection_init": "normal", "projected_length": "128"}
        row |= {"local_window": "32", "max_length": "512", "tokens": "8192000", "step": "2000", "seed": "1"}
        row |= {"parameters": "11800000", "learning_rate": "0.001", "validation_perplexity": str(perplexity)}
        return row | {"command": " ".join(["scripts/pretrain.py", model, *options, *changes.values()])} | changes

    muon = ("--optim", "muon", "--mlm_probability", "0.3")
    rows = [pretrained("roberta", 600), pretrained("linformer", 540), pretrained("linformer", 360, *muon)]
    rows += [pretrained("roberta", 400, *muon), pretrained("linformer", 100, *muon, local_position_bias="True")]
    rows += [pretrained("linformer", 110, *muon, local_position_bias="True", projected_length="512")]
    # What went on from a trained model is another one, and no curve of the figure.
    rows += [pretrained("linformer", 50, "--model_name_or_path", "output/trained", *muon, local_position_bias="True")]
    assert sum(len(models) for models in plot_pretraining.curves(rows).values()) == 6
    lines = {(cells[2], cells[4]): cells[6:] for cells in cells_of(pretraining_table(rows))}
    ours, twin = "mean_pool, k = 128, w = 32", "RoBERTa, the softmax twin"
    assert lines == {
        (twin, "AdamW, 0.001, 15%"): ["600.0", ""],
        (ours, "AdamW, 0.001, 15%"): ["540.0", "-10.0%"],
        (twin, "Muon, 0.001, 30%"): ["400.0", ""],
        (ours, "Muon, 0.001, 30%"): ["360.0", "-10.0%"],
        (f"{ours}, position bias", "Muon, 0.001, 30%"): ["100.0", "-9.1%"],
        ("softmax, w = 32, position bias", "Muon, 0.001, 30%"): ["110.0", ""],
        (f"a trained one, further: {ours}, position bias", "Muon, 0.001, 30%"): ["50.0", ""],
    }
