"""Draw held-out perplexity against the tokens seen, from the CSV of scripts/pretrain.py (the paper's Figure 3).

    python scripts/plot_pretraining.py       # results/pretraining.csv -> results/figures/pretraining.png

Runs of one length, one number of steps and one recipe are in one panel, seeds as their mean.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common import ROOT, UserError, parse_arguments, run_main
from figures import pyplot, save_figure
from make_tables import read_rows
from pretraining_table import Row, describe, goes_on, recipe_of


@dataclass
class Arguments:
    """What is drawn, and where."""

    results_file: str = field(
        default=str(ROOT / "results" / "pretraining.csv"), metadata={"help": "The CSV of scripts/pretrain.py."}
    )
    output_file: str = field(
        default=str(ROOT / "results" / "figures" / "pretraining.png"), metadata={"help": "The figure, a .png."}
    )


Panel = tuple[int, int, str]


def curves(rows: list[Row]) -> dict[Panel, dict[str, dict[int, float]]]:
    """By length, last step and recipe: of each model the mean perplexity of its seeds by the tokens seen."""
    last_step = {row["command"]: int(row["step"]) for row in rows}
    values: dict[Panel, dict[str, dict[int, list[float]]]] = {}
    for row in rows:
        # Only what began with nothing is compared by the tokens it has seen.
        if not row["learning_rate"] or goes_on(row):
            continue
        where = int(row["max_length"]), last_step[row["command"]], recipe_of(row)
        panel = values.setdefault(where, {})
        points = panel.setdefault(describe(row), {})
        points.setdefault(int(row["tokens"]), []).append(float(row["validation_perplexity"]))
    return {
        panel: {
            name: {tokens: statistics.mean(perplexities) for tokens, perplexities in points.items()}
            for name, points in models.items()
        }
        for panel, models in values.items()
    }


def draw(rows: list[Row]) -> pyplot.Figure:
    """A panel for each length, number of steps and recipe; softmax attention is dashed and black."""
    panels = sorted(curves(rows).items())
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6.5 * len(panels), 4.5), squeeze=False, sharey=True)
    for axis, ((length, _, recipe), models) in zip(axes[0], panels):
        for name, points in models.items():
            style = {"color": "black", "linestyle": "--"} if name.startswith(("RoBERTa", "softmax")) else {}
            axis.plot([tokens / 1e6 for tokens in points], list(points.values()), marker=".", label=name, **style)
        for row in rows:
            # Token frequencies, which nothing has to train.
            if not row["learning_rate"] and int(row["max_length"]) == length:
                axis.axhline(float(row["validation_perplexity"]), color="gray", linestyle=":", label=row["model"])
        axis.set(xlabel="million tokens seen", ylabel="perplexity on held-out books", yscale="log")
        axis.set_title(f"n = {length:,}, {recipe}")
        for of_ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            of_ticks("{x:,.0f}")
        axis.grid(True, which="both", alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments((Arguments,), argv, description=__doc__)
    rows = read_rows(Path(arguments.results_file))
    if not rows:
        raise UserError(f"{arguments.results_file} has no rows to draw")
    figure = draw(rows)
    save_figure(figure, arguments.output_file)
    print(f"wrote {arguments.output_file}")


if __name__ == "__main__":
    run_main(main)
