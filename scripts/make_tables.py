"""Write the tables of README.md and results/README.md from the CSV files in results/: no number is typed by hand.

    python scripts/make_tables.py                       # rewrite them
    python scripts/make_tables.py --check true          # exit 2 if they do not say what results/ says
    python scripts/make_tables.py --results_file demo/results.csv   # print the table of one file

A table stands between `<!-- table: results/NAME.csv -->` and `<!-- end of table -->`. Where a file has several tables
the name of one follows it: `<!-- table: results/efficiency.csv peers -->`. In the table of fine-tuning, runs that
differ only in their seed become one row, as mean and standard deviation.
"""

import csv
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from common import ROOT, UserError, parse_arguments, run_main, write_aside


@dataclass
class Arguments:
    """What is read and written."""

    readme: list[str] = field(
        default_factory=lambda: [str(ROOT / name) for name in ("README.md", "results/README.md")],
        metadata={"help": "The files whose tables are written."},
    )
    check: bool = field(default=False, metadata={"help": "Change nothing; fail if a table is out of date."})
    results_file: str | None = field(
        default=None, metadata={"help": "Print the table of this CSV instead, and leave the README alone."}
    )
    view: str | None = field(
        default=None,
        metadata={"help": "Which table of --results_file. Default: the one of its name, else finetuning."},
    )


MARKED = re.compile(r"(<!-- table: (\S+)(?: (\S+))? -->\n).*?(<!-- end of table -->)", re.DOTALL)
# The name of a table, which is its file's or is given, to the module and function that make it: rows of the CSV to
# lines of Markdown. Each is imported only when it is asked for, with what it needs.
TABLES = {
    "finetuning": "make_tables:finetuning_table",
    "efficiency": "efficiency_tables:targets_table",
    "targets": "efficiency_tables:targets_table",
    "speedups": "efficiency_tables:speedups_table",
    "paper": "efficiency_tables:paper_table",
    "peers": "efficiency_tables:peers_table",
    "training": "efficiency_tables:training_table",
    "cost": "efficiency_tables:cost_table",
    "profile": "efficiency_tables:profile_table",
    "spectrum": "plot_spectrum:spectrum_table",
    "onnx": "onnx_table:onnx_table",
    "conversion": "conversion_table:conversion_table",
    "shapes": "conversion_table:shapes_table",
    "halves": "halves_table:halves_table",
    "pretraining": "pretraining_table:pretraining_table",
    "downstream": "downstream_table:downstream_table",
    "scores": "downstream_table:scores_table",
}


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise UserError(f"there are no results in {path}; a run with --results_file {path} writes them")
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation; one run has no spread."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def keys_of_a_query(row: dict[str, str]) -> str:
    """How many keys a query of the longest text has in the softmax."""
    if row.get("model_type") != "linformer":
        return row.get("max_length") or ""
    k, w = row["projected_length"], int(row["local_window"] or 0)
    return f"{k} + 1 + 3 x {w}" if w else k


def name_of(row: dict[str, str]) -> str:
    if row.get("model_type") != "linformer":
        return row["model"]
    if row["projection_type"].endswith("pool") and row["projected_length"] == row["max_length"]:
        return "softmax attention (k = n), the twin"
    sharing = "" if row["projection_type"].endswith("pool") else f", {row['projection_sharing']}"
    return f"Linformer, {row['projection_type']}{sharing}"


def finetuning_table(rows: list[dict[str, str]]) -> list[str]:
    """Accuracy and size of each model; the best first."""
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["data"], name_of(row), keys_of_a_query(row), row.get("max_length", "")), []).append(row)
    lines = []
    for (_, name, keys, length), runs in groups.items():
        accuracies = [float(run["eval_accuracy"]) for run in runs]
        parameters = runs[0].get("parameters")
        cells = [name, length, keys, f"{int(parameters) / 1e6:.1f} M" if parameters else "", str(len(runs))]
        cells += [spread(accuracies)]
        lines.append((statistics.mean(accuracies), cells))
    header = ["model", "tokens read", "keys a query", "parameters", "seeds", "accuracy"]
    body = [cells for _, cells in sorted(lines, key=lambda line: -line[0])]
    return [f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *body]]


def table_function(path: Path, view: str | None) -> Callable[[list[dict[str, str]]], list[str]]:
    """What makes the lines of a table. Raises `UserError` for a view that there is not."""
    name = view or (path.stem if path.stem in TABLES else "finetuning")
    if name not in TABLES:
        raise UserError(f"there is no table {name!r} of {path}; there are {', '.join(TABLES)}")
    module, function = TABLES[name].split(":")
    return getattr(import_module(module), function)


def table_of(path: Path, view: str | None = None) -> str:
    """The table and, below it, where its numbers come from."""
    rows = read_rows(path)
    if not rows:
        raise UserError(f"{path} has no rows")
    make = table_function(path, view)
    lines = make(rows)
    # Times are of one machine, which stands above each of their tables.
    is_named = make.__module__ == "efficiency_tables"
    made_with = sorted(
        {
            f"{'' if is_named else row['hardware'] + ', '}torch {row['torch']}, transformers {row['transformers']}"
            for row in rows
        }
    )
    which = f" ({path.name} says which row on which)" if len(made_with) > 1 else ""
    return "\n".join([*lines, "", f"Measured {'with' if is_named else 'on'} {'; '.join(made_with)}{which}."]) + "\n"


def with_table(place: re.Match[str]) -> str:
    """What stands between two marks, made anew."""
    before, path, view, after = place.groups()
    return "\n".join([before, table_of(ROOT / path, view), after])


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments((Arguments,), argv, description=__doc__)
    if arguments.results_file:
        print(table_of(Path(arguments.results_file), arguments.view), end="")
        return
    for readme in map(Path, arguments.readme):
        text = readme.read_text(encoding="utf-8")
        written = MARKED.sub(with_table, text)
        if arguments.check:
            if written != text:
                raise UserError(f"{readme} does not say what results/ says; run: python scripts/make_tables.py")
        elif written != text:
            with write_aside(readme) as aside:
                aside.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
