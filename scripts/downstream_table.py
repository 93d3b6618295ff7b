"""The tables of results/downstream.csv, for scripts/make_tables.py: what is left of the twin's score in each task."""

from collections.abc import Sequence
from pathlib import Path

from make_tables import keys_of_a_query, name_of, spread


Row = dict[str, str]
# What models were made of, as runs/downstream_study.sh names them.
CONVERTED, FROM_NOVELS = "all-MiniLM-L6-v2", "novels"
# What needs no model, from scripts/baseline.py: the same rows, whatever models were made of.
WITHOUT_MODEL = ("majority class", "TF-IDF + logistic regression")
# A task: its name, on how many rows models were trained and judged, and what they were before that.
Task = tuple[str, str, str, str]
# A model: its name, keys a query and tokens read.
Model = tuple[str, str, str]


def task_of(row: Row) -> Task:
    name = row["task"] or Path(row["data"].split()[0]).parent.name
    start = FROM_NOVELS if row["run_name"].endswith(("-small", "-small_twin")) else CONVERTED
    return name, row["training_rows"], row["evaluated_rows"], start


def model_of(row: Row) -> Model:
    if row["model"] in WITHOUT_MODEL:
        return row["model"], "", ""
    name = name_of(row) + (", taught by the twin" if row.get("teacher") else "")
    return name, keys_of_a_query(row), row["max_length"]


def score_of(row: Row) -> float:
    """The task's own score in points, or the accuracy."""
    return 100 * float(row["eval_score"] if row.get("eval_score") else row["eval_accuracy"])


def grouped(rows: Sequence[Row]) -> dict[Task, dict[Model, dict[str, Row]]]:
    """The rows of each task, model and seed."""
    groups: dict[Task, dict[Model, dict[str, Row]]] = {}
    for row in rows:
        if row["model"] not in WITHOUT_MODEL:
            groups.setdefault(task_of(row), {}).setdefault(model_of(row), {})[row["seed"]] = row
    for row in rows:
        for task, models in groups.items():
            if row["model"] in WITHOUT_MODEL and task_of(row)[:3] == task[:3]:
                # The rows of a task are drawn by the seed.
                if any(row["seed"] in runs for runs in models.values()):
                    models.setdefault(model_of(row), {})[row["seed"]] = row
    return groups


def is_twin(model: Model) -> bool:
    return model[0].endswith("(k = n), the twin")


def order_of(model: Model) -> int:
    """The twin first, then what is compared with it, then what needs no model."""
    return 0 if is_twin(model) else 2 if model[0] in WITHOUT_MODEL else 1


def differences(runs: dict[str, Row], models: dict[Model, dict[str, Row]]) -> list[float]:
    """Points above the twin of the same task and seed, for each seed that it has too."""
    twin = next((runs for model, runs in models.items() if is_twin(model)), {})
    return [score_of(row) - score_of(twin[seed]) for seed, row in runs.items() if seed in twin]


def signed(values: Sequence[float]) -> str:
    """Mean and spread with a sign, or nothing."""
    return ("" if spread(values, 1).startswith("-") else "+") + spread(values, 1) if values else ""


def downstream_table(rows: Sequence[Row]) -> list[str]:
    """A line for each task and model, its seeds together, then the mean over tasks whose texts a model compresses."""
    header = ["from", "task", "trained on", "judged on", "model", "keys a query", "tokens read", "compressed texts"]
    header += ["seeds", "score", "beside the twin"]
    lines = [header, ["---"] * len(header)]
    compressing: dict[tuple[str, Model], list[float]] = {}
    for (task, trained, judged, start), models in grouped(rows).items():
        for model, runs in sorted(models.items(), key=lambda item: order_of(item[0])):
            shares = [float(row.get("compressed_share_validation") or 0) for row in runs.values()]
            above = [] if is_twin(model) else differences(runs, models)
            if above and max(shares) > 0:
                compressing.setdefault((start, model), []).append(sum(above) / len(above))
            counts = [f"{int(count):,}" for count in (trained, judged)]
            compressed = "" if model[0] in WITHOUT_MODEL else f"{max(shares):.0%}"
            cells = [start, task, *counts, *model, compressed, str(len(runs))]
            lines.append([*cells, spread([score_of(row) for row in runs.values()], 1), signed(above)])
    for (start, model), values in compressing.items():
        if len(values) > 1:
            name = f"mean of the {len(values)} tasks with compressed texts"
            lines.append([start, name, "", "", *model, "", "", "", signed([sum(values) / len(values)])])
    return [f"| {' | '.join(cells)} |" for cells in lines]


def scores_table(rows: Sequence[Row]) -> list[str]:
    """In short, of what was converted: a line for each model, a column for each task, with points above the twin."""
    groups = {task: models for task, models in grouped(rows).items() if task[3] == CONVERTED}
    models = sorted({model: None for of_task in groups.values() for model in of_task}, key=order_of)
    header = ["model", "keys a query", "tokens read"]
    header += [f"{task}, {int(judged):,} texts" for task, _, judged, _ in groups]
    lines = [header, ["---"] * len(header)]
    for model in models:
        scores = []
        for of_task in groups.values():
            runs = of_task.get(model, {})
            above = "" if is_twin(model) else signed(differences(runs, of_task))
            score = spread([score_of(row) for row in runs.values()], 1) if runs else "–"
            seeds = f", {len(runs)} seeds" if len(runs) > 1 else ""
            scores.append(f"{score}{seeds} ({above})" if above else score + seeds)
        lines.append([*model, *scores])
    return [f"| {' | '.join(cells)} |" for cells in lines]
