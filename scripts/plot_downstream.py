"""Draw how far Linformers are from their softmax twin in each task, from the CSV of scripts/finetune.py.

    python scripts/plot_downstream.py       # results/downstream.csv -> results/figures/downstream.png

A point is the mean over seeds, its bar their standard deviation; the twin is the line at 0.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common import ROOT, UserError, parse_arguments, run_main
from downstream_table import FROM_NOVELS, Row, differences, grouped, order_of
from figures import pyplot, save_figure
from make_tables import read_rows


@dataclass
class Arguments:
    """What is drawn, and where."""

    results_file: str = field(
        default=str(ROOT / "results" / "downstream.csv"), metadata={"help": "The CSV of scripts/finetune.py."}
    )
    output_file: str = field(
        default=str(ROOT / "results" / "figures" / "downstream.png"), metadata={"help": "The figure, a .png."}
    )


def points(rows: Sequence[Row]) -> dict[str, dict[str, list[float]]]:
    """Of each model, by task, its points above the twin, one a seed; tasks without a twin are left out."""
    found: dict[str, dict[str, list[float]]] = {}
    for (task, trained, _, start), models in grouped(rows).items():
        for model, runs in models.items():
            name, keys, length = model
            if order_of(model) == 1 and (values := differences(runs, models)):
                origin = f", from {start}" if start == FROM_NOVELS else ""
                label = f"{name}, {keys} keys, reads {int(length):,}{origin}"
                found.setdefault(label, {})[f"{task}\n{int(trained):,} rows"] = values
    return found


def draw(rows: Sequence[Row]) -> pyplot.Figure:
    """A column for each task, a colour for each model."""
    models = points(rows)
    tasks = list(dict.fromkeys(task for values in models.values() for task in values))
    if not tasks:
        raise UserError("no task has both a Linformer and its twin with the same seed")
    figure, axis = pyplot.subplots(figsize=(max(6.5, 1.1 * len(tasks) + 4), 4))
    for number, (label, values) in enumerate(models.items()):
        offset = (number - (len(models) - 1) / 2) * 0.6 / len(models)
        places = [tasks.index(task) + offset for task in values]
        spreads = [statistics.stdev(seeds) if len(seeds) > 1 else 0 for seeds in values.values()]
        means = [statistics.mean(seeds) for seeds in values.values()]
        axis.errorbar(places, means, yerr=spreads, fmt="o", capsize=3, label=label)
    axis.axhline(0, color="black", linestyle="--", label="the softmax twin")
    axis.set_xticks(range(len(tasks)), tasks)
    axis.set_ylabel("points above the twin")
    axis.grid(True, axis="y", alpha=0.3)
    axis.legend(fontsize=8, bbox_to_anchor=(1.01, 1), loc="upper left")
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
