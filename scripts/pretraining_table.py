"""The table of results/pretraining.csv, for scripts/make_tables.py: perplexities beside the softmax twin's."""

import itertools
import shlex
import statistics

from make_tables import spread


Row = dict[str, str]
# How the name of a model ends that learned where to look.
BIAS = ", position bias"


def last_rows(rows: list[Row]) -> list[Row]:
    """Of each run the evaluation after its last step."""
    last: dict[str, Row] = {}
    for row in rows:
        last[row["command"]] = row
    return list(last.values())


def goes_on(row: Row) -> bool:
    """Whether a run began with a trained model, so that its tokens are not all that the model has seen."""
    return option_of(row, "--model_name_or_path") is not None


def describe(row: Row) -> str:
    """What a model is, in words."""
    if row["model"] == "roberta":
        return "RoBERTa, the softmax twin"
    if row["model"] != "linformer":
        return row["model"]
    name = ("a trained one, further: " if goes_on(row) else "") + row["projection_type"]
    if name in ("linear", "random", "convolution"):
        name += f", {row['projection_sharing']}"
    if row["projection_init"] == "segment_mean":
        name += ", from segment means"
    if row["projection_type"] == "mean_pool" and row["projected_length"] == row["max_length"]:
        name = name.replace("mean_pool", "softmax")
    else:
        name += f", k = {row['projected_length']}"
    name += f", w = {row['local_window']}" if int(row["local_window"]) else ""
    return name + (BIAS if row.get("local_position_bias") == "True" else "")


def bias_of(name: str) -> str:
    """What the name says of a position bias and the window that it reaches over; empty without one."""
    return name[name.index(", w = ") :] if name.endswith(BIAS) else ""


def option_of(row: Row, name: str) -> str | None:
    """What the row's command gives as an option, the last time that it does; None where it gives none."""
    words = shlex.split(row["command"])
    given = [value for word, value in itertools.pairwise(words) if word == name]
    return given[-1] if given else None


def recipe_of(row: Row) -> str:
    """The optimizer, its highest learning rate and what is masked; nothing of what was not trained."""
    if not row["learning_rate"]:
        return ""
    optimizer = "Muon" if option_of(row, "--optim") == "muon" else "AdamW"
    masked = float(option_of(row, "--mlm_probability") or 0.15)
    return f"{optimizer}, {row['learning_rate']}, {masked:.0%}"


def pretraining_table(rows: list[Row]) -> list[str]:
    """A line for each model, length and number of tokens, its seeds together, beside the same seeds of the twin."""
    groups: dict[tuple[str, str, str, str], dict[str, Row]] = {}
    for row in last_rows(rows):
        key = (row["max_length"], row["step"], recipe_of(row), describe(row))
        groups.setdefault(key, {})[row["seed"]] = row
    # RoBERTa has no position bias: what has one is compared with softmax attention that has one too.
    twins = {
        (*key[:3], bias_of(key[3])): group
        for key, group in groups.items()
        if key[3].startswith("softmax" if bias_of(key[3]) else "RoBERTa")
    }
    header = ["n", "tokens", "model", "parameters", "optimizer, rate, masked", "seeds", "perplexity"]
    header.append("beside the twin")
    lines = [header, ["---"] * len(header)]
    for (length, step, recipe, name), group in sorted(
        groups.items(), key=lambda item: (int(item[0][0]), int(item[0][1]))
    ):
        one = next(iter(group.values()))
        twin = {} if goes_on(one) else twins.get((length, step, recipe, bias_of(name)), {})
        ratios = [
            float(row["validation_perplexity"]) / float(twin[seed]["validation_perplexity"]) - 1
            for seed, row in group.items()
            if seed in twin
        ]
        lines.append(
            [
                f"{int(length):,}",
                f"{int(one['tokens']) / 1e6:.1f} M",
                name,
                f"{int(one['parameters']) / 1e6:.1f} M",
                recipe,
                str(len(group)),
                spread([float(row["validation_perplexity"]) for row in group.values()], digits=1),
                "" if group is twin or not ratios else f"{statistics.mean(ratios):+.1%}",
            ]
        )
    return [f"| {' | '.join(cells)} |" for cells in lines]
