"""Draw the figures of results/spectrum.csv, which scripts/spectrum.py makes.

    python scripts/plot_spectrum.py --results_file results/spectrum.csv --output_dir results/figures

For each model in the file, as PNG:

  spectrum_MODEL_curves.png   cumulative singular values by layer, and the first quarter of them by layer and head
  spectrum_MODEL_rank.png     effective rank and rank of 90 % of the energy against n
  spectrum_MODEL_error.png    error of the approximations of P V against k, and what Theorem 1 grants
"""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from approximations import SMALLEST_GRANTED, bound_epsilon
from common import UserError, parse_arguments, run_main, write_aside


Row = dict[str, str]

COLUMNS = ("model", "weights", "data", "measure", "n", "layer", "head", "method", "k", "value")
# Colours that are told apart with any kind of sight (Okabe and Ito).
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PINK, GREY = (
    *("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"),
    "#888888",
)
# Each method's name in the legend, its colour and its line.
METHODS = {
    "best_output": ("best rank k of P V (lower bound)", BLACK, "-"),
    "best_attention": ("best rank k of P, times V", GREY, "-"),
    "segment_means_window": ("segment means + exact window (not rank k)", GREEN, "-"),
    "segment_means_log": ("segment means, log(size) added", SKY, "-"),
    "learned": ("learned E", BLUE, "--"),
    "segment_means": ("segment means", SKY, ":"),
    "random": (r"random, $P R^\top R V$ (Theorem 1)", RED, "-"),
    "theorem_2": ("random, in the softmax, scaled as Theorem 2's proof", ORANGE, "-"),
    "random_slots": ("random, in the softmax", PINK, "-"),
}


@dataclass
class Arguments:
    """What is read and written."""

    results_file: str = field(
        default="results/spectrum.csv", metadata={"help": "Results of scripts/spectrum.py, also of several models."}
    )
    output_dir: str = field(default="results/figures", metadata={"help": "Folder for the figures."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace figures that are there."})


def read_rows(path: str) -> list[Row]:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --results_file {path}: {error}") from error
    if not rows:
        raise UserError(f"{path} holds no results; python scripts/spectrum.py --results_file {path} adds some")
    if missing := [name for name in COLUMNS if name not in rows[0]]:
        raise UserError(f"{path} has no columns {missing}; it must be made by scripts/spectrum.py")
    return rows


def select(rows: Iterable[Row], **wanted: str) -> list[Row]:
    """The rows that have these values in these columns."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def names(rows: Iterable[Row], column: str) -> list[str]:
    """The different values of a column, numbers by size, words by first appearance; without the empty one."""
    found = dict.fromkeys(row[column] for row in rows if row[column])
    return sorted(found, key=int) if all(name.isdecimal() for name in found) else list(found)


def curve(rows: Iterable[Row], x: str) -> tuple[list[int], list[float]]:
    """Values against column x, those of several runs averaged."""
    values: dict[int, list[float]] = {}
    for row in rows:
        values.setdefault(int(row[x]), []).append(float(row["value"]))
    return sorted(values), [mean(values[place]) for place in sorted(values)]


def longest(rows: Iterable[Row]) -> str:
    return names(rows, "n")[-1]


def draw_cumulative(axes: Axes, trained: list[Row], untrained: list[Row], title: str) -> None:
    """Figure 1, left: a curve for each layer, and the controls."""
    n = longest(trained)
    curves = select(trained, measure="cumulative", n=n, head="")
    layers = names(curves, "layer")
    for number, layer in enumerate(layers):
        color = matplotlib.colormaps["viridis"](number / max(len(layers) - 1, 1))
        axes.plot(*curve(select(curves, layer=layer, method="attention"), "k"), color=color, label=f"layer {layer}")
    axes.plot(*curve(select(curves, layer="", method="shuffled"), "k"), color=RED, ls=":", label="rows shuffled")
    if control := select(untrained, measure="cumulative", n=n, head="", layer="", method="attention"):
        axes.plot(*curve(control, "k"), color=BLACK, ls="--", label="random weights")
    axes.axvline(int(n) // 4, color=GREY, lw=0.7)
    axes.set(title=title, xlabel="index k", ylabel="cumulative singular value / total", xlim=(1, int(n)), ylim=(0, 1))
    axes.legend(loc="lower right", frameon=False, fontsize=7, ncols=1 + len(layers) // 12)


def draw_heat_map(axes: Axes, trained: list[Row]) -> None:
    """Figure 1, right: the share of the first n/4 singular values, a cell for each layer and head."""
    n = longest(trained)
    cells = [row for row in select(trained, measure="cumulative", n=n) if row["head"]]
    layers, heads = names(cells, "layer"), names(cells, "head")
    shares = [[mean(curve(select(cells, layer=layer, head=head), "k")[1]) for head in heads] for layer in layers]
    image = axes.imshow(shares, cmap="viridis", aspect="auto", vmin=0, vmax=1, origin="lower")
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            color = "black" if share > 0.6 else "white"
            axes.text(x, y, f"{share:.2f}", ha="center", va="center", fontsize=6, color=color)
    axes.set_xticks(range(len(heads)), heads)
    axes.set_yticks(range(len(layers)), layers)
    axes.set(title=f"share at index {int(n) // 4} of {n}", xlabel="head", ylabel="layer")
    axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)


def draw_curves(rows: list[Row]) -> Figure:
    trained = select(rows, weights="trained")
    data = names(select(trained, measure="cumulative"), "data")
    figure = Figure(figsize=(10, 3.4 * len(data)), layout="constrained")
    grid = figure.subplots(len(data), 2, squeeze=False, width_ratios=(1, 1.25))
    for (left, right), name in zip(grid, data):
        of_data = select(trained, data=name)
        draw_cumulative(left, of_data, select(rows, weights="random", data=name), name)
        draw_heat_map(right, of_data)
    return figure


def draw_rank(rows: list[Row]) -> Figure:
    """Both ranks against n, the layers as a band; straight lines of slope 1 would be full rank."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    ranks = {"effective_rank": "effective rank", "energy_rank_90": "singular values for 90 % of their squares"}
    lines = {"attention": ("-", "o"), "shuffled": (":", "s")}
    for axes, (measure, title) in zip(figure.subplots(1, 2), ranks.items()):
        of_measure = select(rows, measure=measure)
        lengths = list(map(int, names(of_measure, "n")))
        sets = sorted_sets(of_measure)
        for place, (color, (weights, data)) in enumerate(zip((BLUE, ORANGE, GREEN, PINK, SKY, RED), sets)):
            of_set = select(of_measure, weights=weights, data=data)
            for method, (line, marker) in lines.items():
                label = f"{data}, {weights} weights{', rows shuffled' if method == 'shuffled' else ''}"
                means = curve(select(of_set, method=method, layer=""), "n")
                # Sets that coincide show as a thin line on a thick one.
                width = 1.5 + 1.5 * (len(sets) - place - 1)
                axes.plot(*means, color=color, ls=line, lw=width, marker=marker, ms=3 + width, label=label)
            by_layer = [select(of_set, method="attention", layer=layer) for layer in names(of_set, "layer")]
            bands = list(zip(*(curve(of_layer, "n")[1] for of_layer in by_layer)))
            axes.fill_between(lengths, list(map(min, bands)), list(map(max, bands)), color=color, alpha=0.12, lw=0)
        axes.plot(lengths, lengths, color=GREY, lw=0.8, label="n")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(lengths, map(str, lengths))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set(title=title, xlabel="n, tokens")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def sorted_sets(rows: list[Row]) -> list[tuple[str, str]]:
    """The pairs of weights and data there are, trained weights first."""
    pairs = dict.fromkeys((row["weights"], row["data"]) for row in rows)
    return sorted(pairs, key=lambda pair: pair[0] != "trained")


def draw_error(rows: list[Row]) -> Figure:
    """Relative error against k, a panel for each set of texts and weights, with the bound of Theorem 1."""
    errors = select(rows, measure="relative_error", layer="")
    sets = sorted_sets(errors)
    figure = Figure(figsize=(max(4 * len(sets), 9), 5), layout="constrained")
    panels = figure.subplots(1, len(sets), squeeze=False, sharey=True)[0]
    for axes, (weights, data) in zip(panels, sets):
        of_set = select(errors, weights=weights, data=data)
        n = int(longest(of_set))
        for method, (label, color, line) in METHODS.items():
            places, values = curve(select(of_set, method=method), "k")
            axes.plot(places, values, color=color, ls=line, marker="o", ms=3, label=label)
        axes.axhline(1, color=GREY, lw=0.8, ls=":", label="no attention at all: output 0")
        first = math.ceil(SMALLEST_GRANTED * math.log(n))
        granted = range(first, n + 1)
        axes.plot(granted, [bound_epsilon(k, n) for k in granted], color=RED, lw=3, alpha=0.4, label="Theorem 1's eps")
        axes.axvspan(axes.get_xlim()[0], first, color=GREY, alpha=0.1, lw=0, label=f"k < {first}: no eps granted")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(places := list(map(int, names(of_set, "k")))[1:], map(str, places))
        axes.set(title=f"{data}, {weights} weights", xlabel="k", xlim=(places[0], n), ylim=(1e-3, 50))
    panels[0].set_ylabel("||approximation - P V|| / ||P V||")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8
    )
    return figure


def spectrum_table(rows: list[Row]) -> list[str]:
    """A line for each model and set of texts: its ranks, and the errors at k = n/4. Markdown."""
    header = ["model", "texts", "effective rank", "rows shuffled", "share of the first n/4"]
    errors = {"random": "Theorem 1", "segment_means": "segment means", "learned": "learned E"}
    errors |= {"segment_means_window": "means + window", "best_attention": "best rank k of P"}
    lines = [header + [f"error: {name}" for name in errors.values()]]
    lines.append(["---"] * len(lines[0]))
    for model in names(rows, "model"):
        of_model = select(rows, model=model)
        for weights, data in sorted_sets(of_model):
            of_set = select(of_model, weights=weights, data=data)
            n = longest(of_set)
            overall = select(of_set, n=n, layer="", head="")
            quarter = {"k": str(int(n) // 4)}
            cells = [
                ({"measure": "effective_rank", "method": "attention"}, ".0f"),
                ({"measure": "effective_rank", "method": "shuffled"}, ".0f"),
                ({"measure": "cumulative", "method": "attention", **quarter}, ".2f"),
                *(({"measure": "relative_error", "method": method, **quarter}, ".2f") for method in errors),
            ]
            values = ([float(row["value"]) for row in select(overall, **wanted)] for wanted, _ in cells)
            shown = [f"{mean(found):{digits}}" if found else "" for found, (_, digits) in zip(values, cells)]
            name = f"{model}, random weights" if weights == "random" else model
            lines.append([name, f"{data}, n = {n}", *shown])
    return [f"| {' | '.join(line)} |" for line in lines]


FIGURES = {"curves": draw_curves, "rank": draw_rank, "error": draw_error}


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments((Arguments,), argv, description=__doc__)
    rows = read_rows(arguments.results_file)
    paths = {
        (model, kind): Path(arguments.output_dir, f"spectrum_{model}_{kind}.png")
        for model in names(rows, "model")
        for kind in FIGURES
    }
    if not arguments.overwrite_output_dir and (there := [str(path) for path in paths.values() if path.exists()]):
        raise UserError(f"{', '.join(there)} exist; give --overwrite_output_dir true to replace them")
    for (model, kind), path in paths.items():
        figure = FIGURES[kind](select(rows, model=model))
        with write_aside(path) as aside:
            figure.savefig(aside, format="png", dpi=150)
        print(path)


if __name__ == "__main__":
    run_main(main)
