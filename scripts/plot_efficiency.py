"""Draw time and memory against length from the CSV of scripts/benchmark.py, with the exponents fitted to them.

    python scripts/plot_efficiency.py        # results/efficiency.csv -> results/figures/efficiency.png

Both are divided by the rows of the batch, so that they are what one text of n tokens costs. The legend says by which
power of n each model grows, the slope of a straight line through its points in the logarithms.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common import ROOT, UserError, parse_arguments, run_main
from efficiency_tables import Row, display_name, entry_of, exponent, is_measured, latest
from figures import pyplot, save_figure
from make_tables import read_rows


@dataclass
class Arguments:
    """Which rows are drawn, and where."""

    results_file: str = field(
        default=str(ROOT / "results" / "efficiency.csv"), metadata={"help": "The CSV of scripts/benchmark.py."}
    )
    output_file: str = field(
        default=str(ROOT / "results" / "figures" / "efficiency.png"), metadata={"help": "The figure, a .png."}
    )
    mode: str = field(default="forward", metadata={"help": "Steps to draw.", "choices": ["forward", "training"]})
    dtype: str = field(default="float32", metadata={"help": "Their type.", "choices": ["float32", "bfloat16"]})
    device: str = field(default="cpu", metadata={"help": "Where they ran.", "choices": ["cpu", "cuda"]})
    num_hidden_layers: int = field(default=3, metadata={"help": "Layers of all models."})
    projected_length: int = field(default=128, metadata={"help": "k of the models with slots."})
    models: list[str] | None = field(
        default=None,
        metadata={"help": "Entries as of benchmark.py --models. Default: all without options but a window."},
    )


Curve = tuple[str, list[int], list[float], list[float]]


def is_drawn(row: Row, arguments: Arguments) -> bool:
    wanted = (arguments.mode, arguments.dtype, arguments.device, str(arguments.num_hidden_layers), "none")
    found = tuple(row[name] for name in ("mode", "dtype", "device", "num_hidden_layers", "head"))
    if not is_measured(row) or found != wanted:
        return False
    # Shorter rows than k were measured with fewer slots.
    if int(row["sequence_length"]) < arguments.projected_length:
        return False
    if row["projected_length"] not in ("", str(arguments.projected_length)):
        return False
    if arguments.models is not None:
        return entry_of(row) in arguments.models
    return re.fullmatch(r"(local_window=\d+)?", row["options"]) is not None


def curves_of(rows: Sequence[Row], arguments: Arguments) -> list[Curve]:
    """Name, lengths, seconds a row and MiB a row of every model."""
    curves: dict[str, Curve] = {}
    for (n, entry, _), row in latest([row for row in rows if is_drawn(row, arguments)]).items():
        _, lengths, seconds, memory = curves.setdefault(entry, (display_name(row), [], [], []))
        lengths.append(n)
        seconds.append(float(row["seconds_median"]) / int(row["batch_size"]))
        memory.append(float(row["peak_memory_mib"] or "nan") / int(row["batch_size"]))
    return list(curves.values())


def draw(curves: Sequence[Curve], title: str, output_file: Path) -> None:
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 7), layout="constrained")
    colors = pyplot.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for panel, (axis, label) in enumerate(zip(axes, ("seconds a row", "peak memory a row, MiB"))):
        for index, (name, lengths, *values) in enumerate(curves):
            power = exponent(lengths, values[panel])
            fitted = name.replace("`", "") + (f": n^{power:.2f}" if power is not None else "")
            style = "o-" if name.startswith("Linformer") else "s--"
            axis.plot(lengths, values[panel], style, color=colors[index % len(colors)], label=fitted, markersize=4)
        axis.set(xscale="log", yscale="log", xlabel="n, tokens a row", ylabel=label)
        axis.set_xscale("log", base=2)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    save_figure(figure, output_file)


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments((Arguments,), argv, description=__doc__)
    rows = read_rows(Path(arguments.results_file))
    curves = curves_of(rows, arguments)
    if not curves:
        raise UserError(
            f"{arguments.results_file} has no measured rows of --mode {arguments.mode}, --dtype {arguments.dtype}, "
            f"--device {arguments.device}, {arguments.num_hidden_layers} layers and k = {arguments.projected_length}; "
            "scripts/benchmark.py makes them"
        )
    machines = sorted({row["hardware"] for row in rows if is_drawn(row, arguments)})
    if len(machines) > 1:
        raise UserError(
            f"{arguments.results_file} has rows of several machines ({'; '.join(machines)}), which do not compare; "
            "give --results_file with those of one"
        )
    layers = f"{arguments.num_hidden_layers} layers"
    title = f"{arguments.mode}, {arguments.dtype}, {layers}, k = {arguments.projected_length}, {machines[0]}"
    draw(curves, title, Path(arguments.output_file))
    print(arguments.output_file)


if __name__ == "__main__":
    run_main(main)
