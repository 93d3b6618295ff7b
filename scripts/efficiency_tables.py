"""The tables of results/efficiency.csv and profile.csv: rows to lines of Markdown, for scripts/make_tables.py.

Every ratio is between two rows of one run of scripts/benchmark.py, so of one machine at one time; where a run was
divided into groups, of one group if it has both. Of cells measured more than once the fullest run counts.
"""

from collections.abc import Collection, Sequence

import numpy as np


Row = dict[str, str]
# Length, entry of --models and k: what makes a cell within one setting.
CellKey = tuple[int, str, int]

# Wang et al. 2020 (arXiv 2006.04768), Table 3: time and memory saved by n and k, against the materialised attention of
# 2020 on a V100 of 16 GB; memory as the ratio of the largest batches that fit.
PAPER_TIME = {
    512: {128: "1.5", 256: "1.3"},
    1024: {128: "1.7", 256: "1.6", 512: "1.3"},
    2048: {128: "2.6", 256: "2.4", 512: "2.1"},
    4096: {128: "3.4", 256: "3.2", 512: "2.8"},
    8192: {128: "5.5", 256: "5.0", 512: "4.4"},
    16384: {128: "8.6", 256: "7.8", 512: "7.0"},
    32768: {128: "13", 256: "12", 512: "11"},
    65536: {128: "20", 256: "18", 512: "16"},
}
PAPER_MEMORY = {
    512: {128: "1.7", 256: "1.5"},
    1024: {128: "3.0", 256: "2.9", 512: "1.8"},
    2048: {128: "6.1", 256: "5.6", 512: "3.6"},
    4096: {128: "14", 256: "13", 512: "8.3"},
    8192: {128: "28", 256: "26", 512: "17"},
    16384: {128: "56", 256: "48", 512: "32"},
    32768: {128: "56", 256: "48", 512: "36"},
    65536: {128: "60", 256: "52", 512: "40"},
}
PAPER_SLOTS = (128, 256, 512)

LINFORMERS = ("linear", "mean_pool", "max_pool", "convolution", "random")

NAMES = {
    "linear": "Linformer, linear",
    "mean_pool": "Linformer, mean_pool",
    "max_pool": "Linformer, max_pool",
    "convolution": "Linformer, convolution",
    "random": "Linformer, random",
    "roberta_eager": "RoBERTa, eager",
    "roberta_sdpa": "RoBERTa, SDPA",
    "roberta_sdpa_tiled": "RoBERTa, SDPA, tiled",
    "bert_sdpa": "BERT, SDPA",
    "modernbert_sdpa": "ModernBERT, SDPA",
    "longformer": "Longformer",
    "nystromformer": "Nyströmformer",
    "linformer_package": "package `linformer`",
    "linformer_pytorch_package": "package `linformer-pytorch`",
}
# The short table: some lengths, and entries of --models with what they are to a reader who knows none of them.
COST_LENGTHS = (4096, 16384, 65536)
COST_ENTRIES = {
    "roberta_sdpa": "RoBERTa, full attention (SDPA): the twin",
    "modernbert_sdpa": "ModernBERT, SDPA",
    "longformer": "Longformer",
    "linformer_package": "package `linformer`",
    "mean_pool:local_window=32": "this Linformer, 128 means and a window of 3 x 32",
    "mean_pool": "this Linformer, 128 means alone",
}
# Shorter rows are mostly feed-forward layers, whose time does not depend on n.
FIRST_OF_GROWTH = 1024
# Columns of the CSV that rows share where they may stand in one table.
SETTING = (
    *("mode", "head", "base_dtype", "device", "hardware", "num_threads", "tokens_per_batch", "num_hidden_layers"),
    *("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"),
)
# Options that change how a model is run or trained, and not what it computes.
TRAINING_OPTIONS = ("dtype", "compile", "gradient_checkpointing", "sparse_prediction")


def entry_of(row: Row) -> str:
    """The entry of --models that a row came from."""
    return f"{row['model']}:{row['options']}" if row["options"] else row["model"]


def options_of(row: Row) -> list[str]:
    return row["options"].split(",") if row["options"] else []


def plain_entry(row: Row) -> str:
    """The entry without the options of training."""
    kept = [option for option in options_of(row) if option.partition("=")[0] not in TRAINING_OPTIONS]
    return ":".join(filter(None, [row["model"], ",".join(kept)]))


def display_name(row: Row) -> str:
    name = NAMES.get(row["model"], row["model"])
    return f"{name}, {' '.join(f'`{option}`' for option in options_of(row))}" if row["options"] else name


def slots_of(row: Row) -> int:
    """k, or 0 for a model without slots."""
    return int(row["projected_length"] or 0)


def is_measured(row: Row) -> bool:
    return bool(row["seconds_median"])


def settings_of(rows: Sequence[Row], mode: str) -> list[list[Row]]:
    """The rows of a mode, divided into those that may be compared."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row["mode"] == mode:
            # Without a fixed number of tokens the number of rows is what was given.
            batch = "" if row["tokens_per_batch"] else row["batch_size"]
            groups.setdefault((*(row[column] for column in SETTING), batch), []).append(row)
    return list(groups.values())


def caption(row: Row, batch: str = "") -> str:
    """What all rows of a table share."""
    mode = "Forward pass" if row["mode"] == "forward" else "Training step (forward, backward, AdamW)"
    head = ", masked-LM head" if row["head"] == "masked_lm" else ""
    machine = row["hardware"] if row["device"] == "cuda" else f"{row['num_threads']} threads ({row['hardware']})"
    batch = batch or (
        f"batches of {row['tokens_per_batch']} tokens"
        if row["tokens_per_batch"]
        else f"batch size {row['batch_size']}"
    )
    size = f"{row['num_hidden_layers']} layers of width {row['hidden_size']}"
    return f"{mode}{head}, {row['base_dtype']}, on {machine}, {batch}, {size}:"


def latest(rows: Sequence[Row]) -> dict[CellKey, Row]:
    """The row of every cell that counts, by length, as the models come, and by k.

    It is that of the run with the most twins, then models, which has all to compare with; of equal runs, the latest.
    """
    entries: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        entries.setdefault((row["run_id"], row["sequence_length"]), set()).add(entry_of(row))

    def fullness(row: Row) -> tuple[int, int]:
        measured = entries[row["run_id"], row["sequence_length"]]
        return sum(entry.startswith("roberta") for entry in measured), len(measured)

    fullest_last = sorted(rows, key=fullness)
    cells = {(int(row["sequence_length"]), entry_of(row), slots_of(row)): row for row in fullest_last}
    order = list(dict.fromkeys(map(entry_of, rows)))
    return dict(sorted(cells.items(), key=lambda cell: (cell[0][0], order.index(cell[0][1]), cell[0][2])))


def partner(row: Row, rows: Sequence[Row], entry: str) -> Row | None:
    """The row of another entry, of the same run and length, that a row is compared with; None if not measured."""
    found = [
        other
        for other in rows
        if entry_of(other) == entry
        and (other["run_id"], other["sequence_length"]) == (row["run_id"], row["sequence_length"])
        and slots_of(other) in (0, slots_of(row))
        and is_measured(other)
    ]
    return next((other for other in found if other["group"] == row["group"]), found[-1] if found else None)


def ratio(other: Row | None, row: Row, column: str) -> str:
    """How many times as much of a column the other row has, e.g. `2.1x`."""
    if other is None or not other[column] or not row[column] or float(row[column]) == 0:
        return "–"
    value = float(other[column]) / float(row[column])
    return f"{value:.0f}x" if value >= 10 else f"{value:.1f}x" if value >= 1 else f"{value:.2f}x"


def number(value: str, digits: int = 0) -> str:
    return f"{float(value):,.{digits}f}" if value else "–"


def seconds_with_spread(row: Row) -> str:
    """Median, and the fastest and slowest step."""
    return f"{float(row['seconds_median']):.3g} ({float(row['seconds_min']):.3g} to {float(row['seconds_max']):.3g})"


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *body]]


def not_measured(cells: dict[CellKey, Row]) -> list[str]:
    """A line for every cell that was skipped, with the reason."""
    lines = []
    for (n, _, k), row in cells.items():
        if not is_measured(row):
            slots = f", k = {k}" if k else ""
            lines.append(f"- {display_name(row)} at n = {n}{slots}: {row['skipped']}")
    return ["", "Not measured:", "", *lines] if lines else []


def gpu_note(rows: Sequence[Row]) -> list[str]:
    if any(row["device"] == "cuda" for row in rows):
        return []
    return ["", "Not measured on a GPU; `python scripts/benchmark.py --device cuda --dtype bfloat16` does it."]


def targets_table(rows: list[Row]) -> list[str]:
    """The paper's projection and the recommended one beside full attention, in the setting with the most lengths."""
    entries = ("linear", "mean_pool:local_window=32")
    settings = settings_of(rows, "forward")
    tables = [[*speedups([setting], entries), *growth(setting, (*entries, "roberta_sdpa"))] for setting in settings]
    return [*max(tables, key=len, default=[]), *gpu_note(rows)]


def growth(setting: Sequence[Row], entries: Collection[str]) -> list[str]:
    """A line that says by which power of n the time of one text grows, from FIRST_OF_GROWTH tokens on."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for (n, entry, k), row in latest(setting).items():
        if entry in entries and k in (0, 128) and n >= FIRST_OF_GROWTH and is_measured(row):
            lengths, seconds = curves.setdefault(display_name(row), ([], []))
            lengths.append(n)
            seconds.append(float(row["seconds_median"]) / int(row["batch_size"]))
    powers = [(name, exponent(*curve), max(curve[0])) for name, curve in curves.items()]
    found = [f"n^{power:.2f} to {last:,} ({name})" for name, power, last in powers if power is not None]
    return ["", f"From {FIRST_OF_GROWTH:,} tokens on, time grows as {', '.join(found)}."] if found else []


def exponent(lengths: Sequence[int], values: Sequence[float]) -> float | None:
    """a of the power n^a that fits best; None for fewer than two lengths or values that are not there."""
    if len(lengths) < 2 or not all(value > 0 for value in values):
        return None
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def speedups_table(rows: list[Row]) -> list[str]:
    """The same in every setting, of every Linformer with 128 slots that has full attention beside it."""
    ours = {entry_of(row) for row in rows if row["model"] in LINFORMERS}
    return [*speedups(settings_of(rows, "forward"), ours), *gpu_note(rows)]


def speedups(settings: Sequence[list[Row]], entries: Collection[str]) -> list[str]:
    """How many times as fast as full attention, with k = 128, and what it could be at most.

    By operations: if every operation took the same time. At the peak: if ours ran at the machine's fastest product.
    """
    header = ["n", "model", "vs RoBERTa eager", "vs RoBERTa SDPA", "vs SDPA, tiled", "limit by operations"]
    header += ["limit at the peak", "vs `linformer`", "fraction of peak", "paper"]
    lines: list[str] = []
    for setting in settings:
        cells, body = latest(setting), []
        chosen = {}
        for key, row in cells.items():
            n, entry, k = key
            is_ours = entry in entries and k == 128
            if row["model"].startswith("roberta") or is_ours:
                chosen[key] = row
            if not is_ours or not is_measured(row):
                continue
            # What is compiled is compared with what is compiled.
            compiled = ":compile=true" if "compile=true" in options_of(row) else ""
            eager, sdpa, tiled, package = (
                partner(row, setting, name + compiled)
                for name in ("roberta_eager", "roberta_sdpa", "roberta_sdpa_tiled", "linformer_package")
            )
            if not (eager or sdpa):
                continue
            body.append(
                [
                    str(n),
                    display_name(row),
                    ratio(eager, row, "seconds_median"),
                    ratio(sdpa, row, "seconds_median"),
                    ratio(tiled, row, "seconds_median"),
                    ratio(sdpa, row, "gflop"),
                    limit_at_the_peak(sdpa, row),
                    ratio(package, row, "seconds_median"),
                    number(row["fraction_of_peak"], 2),
                    f"{PAPER_TIME[n][128]}x" if n in PAPER_TIME else "–",
                ]
            )
        if body:
            lines += ["", caption(setting[0]), "", *markdown(header, body), *not_measured(chosen)]
    return lines[1:]


def limit_at_the_peak(sdpa: Row | None, row: Row) -> str:
    """How many times as fast as SDPA a row would be if all of its time were matrix products at the machine's peak."""
    if sdpa is None:
        return "–"
    at_peak = {"seconds_median": str(float(row["gflop"]) / float(row["peak_gflops"]))}
    return ratio(sdpa, at_peak, "seconds_median")


def paper_table(rows: list[Row]) -> list[str]:
    """Table 3 of the paper: time and memory saved by n and k; with layerwise sharing, as there."""
    header = ["n", *(f"time saved, k = {k}" for k in PAPER_SLOTS), *(f"memory saved, k = {k}" for k in PAPER_SLOTS)]
    lines = [
        "Each cell: against RoBERTa eager / against RoBERTa SDPA (the paper's). Ours is the peak above the model's"
    ]
    lines += ["memory, the paper's the largest batch."]
    for setting in settings_of(rows, "forward"):
        cells = latest(setting)
        chosen = {key: row for key, row in cells.items() if key[1] in ("linear", "roberta_eager", "roberta_sdpa")}
        body = []
        for n in dict.fromkeys(n for n, entry, _ in chosen if entry == "linear"):
            line = [str(n)]
            for column, paper in (("seconds_median", PAPER_TIME), ("peak_memory_mib", PAPER_MEMORY)):
                for k in PAPER_SLOTS:
                    theirs = paper.get(n, {}).get(k)
                    line.append(saved(chosen.get((n, "linear", k)), setting, column, theirs))
            body.append(line)
        if body:
            lines += ["", caption(setting[0]), "", *markdown(header, body), *not_measured(chosen)]
    return [*lines, *gpu_note(rows)]


def saved(row: Row | None, rows: Sequence[Row], column: str, paper: str | None) -> str:
    """A cell of the paper's table: `7.1x / 3.2x (3.4x)`."""
    theirs = f"({paper}x)" if paper else "(–)"
    if row is None or not is_measured(row):
        return f"– {theirs}"
    eager, sdpa = (ratio(partner(row, rows, f"roberta_{name}"), row, column) for name in ("eager", "sdpa"))
    return f"{eager} / {sdpa} {theirs}"


def peers_table(rows: list[Row]) -> list[str]:
    """Every model at every length: its time beside that of RoBERTa with SDPA, its speed and its memory."""
    header = ["n", "model", "k", "seconds (min to max)", "vs RoBERTa SDPA", "tokens/s", "peak memory, MiB"]
    header += ["fraction of peak"]
    lines: list[str] = []
    for setting in settings_of(rows, "forward"):
        cells = latest(setting)
        body = [
            [
                str(n),
                display_name(row),
                str(k or ""),
                seconds_with_spread(row),
                ratio(partner(row, setting, "roberta_sdpa"), row, "seconds_median"),
                number(row["tokens_per_second"]),
                number(row["peak_memory_mib"]),
                number(row["fraction_of_peak"], 2),
            ]
            for (n, _, k), row in cells.items()
            if is_measured(row)
        ]
        lines += ["", caption(setting[0]), "", *markdown(header, body), *not_measured(cells)]
    return [*lines[1:], *gpu_note(rows)]


def cost_table(rows: list[Row]) -> list[str]:
    """In short what one text of each length costs, in time and in memory: full attention, peers, ours.

    Of the setting that has the most. A column is of one run, for machines are faster on some days: of one
    with full attention, if there is any, that has the most models.
    """
    header = ["model", *(f"{n:,} tokens" for n in COST_LENGTHS)]
    tables: list[list[str]] = []
    for setting in settings_of(rows, "forward"):
        runs: dict[int, dict[str, dict[str, Row]]] = {n: {} for n in COST_LENGTHS}
        for row in setting:
            n, entry = int(row["sequence_length"]), entry_of(row)
            is_shown = n in runs and entry in COST_ENTRIES and slots_of(row) in (0, 128)
            if is_shown and is_measured(row) and row["batch_size"] == "1":
                runs[n].setdefault(row["run_id"], {})[entry] = row
        columns = [
            max(of_length.values(), key=lambda run: ("roberta_sdpa" in run, len(run)), default={})
            for of_length in runs.values()
        ]
        body = [
            [name, *(cost_of(column.get(entry)) for column in columns)]
            for entry, name in COST_ENTRIES.items()
            if any(entry in column for column in columns)
        ]
        if body:
            tables.append([caption(setting[0], "one text"), "", *markdown(header, body)])
    return max(tables, key=len, default=[])


def cost_of(row: Row | None) -> str:
    """Seconds and peak memory, e.g. `0.45 s, 26 MiB`."""
    if row is None:
        return "–"
    memory = f", {float(row['peak_memory_mib']):,.0f} MiB" if row["peak_memory_mib"] else ""
    seconds = float(row["seconds_median"])
    return f"{seconds:.0f} s{memory}" if seconds >= 10 else f"{seconds:.2g} s{memory}"


def training_table(rows: list[Row]) -> list[str]:
    """Training steps: what each option does to time and memory beside the same model without it."""
    header = ["n", "model", "k", "seconds (min to max)", "tokens/s", "peak memory, MiB", "vs RoBERTa SDPA"]
    header += ["faster than plain", "less memory than plain"]
    lines: list[str] = []
    for setting in settings_of(rows, "training"):
        cells, body = latest(setting), []
        for (n, entry, k), row in cells.items():
            if not is_measured(row):
                continue
            plain = partner(row, setting, plain_entry(row)) if plain_entry(row) != entry else None
            line = [str(n), display_name(row), str(k or ""), seconds_with_spread(row)]
            line += [number(row["tokens_per_second"]), number(row["peak_memory_mib"])]
            line += [ratio(partner(row, setting, "roberta_sdpa"), row, "seconds_median")]
            line += [ratio(plain, row, "seconds_median"), ratio(plain, row, "peak_memory_mib")]
            body.append(line)
        lines += ["", caption(setting[0]), "", *markdown(header, body), *not_measured(cells)]
    return [*lines[1:], *gpu_note(rows)]


# The parts of scripts/profile_steps.py, as their columns are headed.
PROFILE_PARTS = {
    "softmax": "softmax",
    "activation": "GELU",
    "norm": "layer norm",
    "elementwise": "sums",
    "copies": "copies",
    "optimizer": "AdamW",
    "rest": "rest",
}


def profile_table(rows: list[Row]) -> list[str]:
    """Where the time of a step goes, in per cent, and how near to the peak its products are."""
    lines: list[str] = []
    settings = [setting for mode in ("forward", "training") for setting in settings_of(rows, mode)]
    for setting in settings:
        parts = {part: name for part, name in PROFILE_PARTS.items() if any(share(row, part) for row in setting)}
        header = ["n", "model", "k", "seconds", "were all products at the peak", "products", "fused attention"]
        body = [
            [
                row["sequence_length"],
                display_name(row),
                row["projected_length"],
                f"{float(row['seconds']):.3g}",
                f"{(float(row['products_gflop']) + float(row['attention_gflop'])) / float(row['peak_gflops']):.3g}",
                share_and_rate(row, "products"),
                share_and_rate(row, "attention"),
                *(f"{share(row, part):.0%}" for part in parts),
            ]
            for row in setting
        ]
        lines += ["", caption(setting[0]), "", *markdown([*header, *parts.values()], body)]
    return [*lines[1:], *gpu_note(rows)]


def share(row: Row, part: str) -> float:
    return float(row[f"{part}_seconds"]) / float(row["seconds"])


def share_and_rate(row: Row, part: str) -> str:
    """The share of the time, and the operations a second as a fraction of the peak, e.g. `81% at 0.93`."""
    if not float(row[f"{part}_gflop"]):
        return "–"
    rate = float(row[f"{part}_gflop"]) / float(row[f"{part}_seconds"])
    return f"{share(row, part):.0%} at {rate / float(row['peak_gflops']):.2f}"
