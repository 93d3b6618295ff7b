"""Write the tables of the README from the CSV files in results/, so that no number is typed by hand.

    python scripts/make_tables.py                       # rewrite the README
    python scripts/make_tables.py --check true          # exit 2 if the README does not say what results/ says
    python scripts/make_tables.py --results_file demo/results.csv   # print the table of one file

A table stands between `<!-- table: results/NAME.csv -->` and `<!-- end of table -->`; runs that differ only in their
seed become one row, as mean and standard deviation.
"""

import csv
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common import ROOT, UserError, parse_arguments, run_main, write_aside


@dataclass
class Arguments:
    """What is read and written."""

    readme: str = field(default=str(ROOT / "README.md"), metadata={"help": "The file whose tables are written."})
    check: bool = field(default=False, metadata={"help": "Change nothing; fail if a table is out of date."})
    results_file: str | None = field(
        default=None, metadata={"help": "Print the table of this CSV instead, and leave the README alone."}
    )


MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


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


def table_of(path: Path) -> str:
    """The table and, below it, where its numbers come from."""
    rows = read_rows(path)
    made_with = sorted(
        {f"{row['hardware']}, torch {row['torch']}, transformers {row['transformers']}" for row in rows}
    )
    return "\n".join([*finetuning_table(rows), "", f"Measured on {'; '.join(sorted(made_with))}."]) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments((Arguments,), argv, description=__doc__)
    if arguments.results_file:
        print(table_of(Path(arguments.results_file)), end="")
        return
    readme = Path(arguments.readme)
    text = readme.read_text(encoding="utf-8")
    written = MARKED.sub(lambda match: match[1] + "\n" + table_of(ROOT / match[2]) + "\n" + match[3], text)
    if arguments.check:
        if written != text:
            raise UserError(f"{readme} does not say what results/ says; run: python scripts/make_tables.py")
    elif written != text:
        with write_aside(readme) as aside:
            aside.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
