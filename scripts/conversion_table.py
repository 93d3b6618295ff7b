"""The tables of results/conversion.csv, for scripts/make_tables.py: how near each conversion is to its source."""


def conversion_table(rows: list[dict[str, str]]) -> list[str]:
    """A line for each run: what was made and how it was taught, and the cosine of tokens by the length of the text."""
    lengths = sorted({int(row["length"]) for row in rows})
    runs: dict[tuple[str, str], dict[int, dict[str, str]]] = {}
    for row in rows:
        runs.setdefault((row["command"], row["seed"]), {})[int(row["length"])] = row
    header = ["texts", "projection", "k", "w", "taught", "keys a query"]
    header += [f"tokens, {length:,}" for length in lengths] + ["embedding"]
    lines = [header, ["---"] * len(header)]
    for run in runs.values():
        # What the source can read whole, if there is any.
        whole = {length: row for length, row in run.items() if row["target"] == "whole"} or run
        longest = whole[max(whole)]
        cosines = [f"{float(run[length]['token_cosine']):.3f}" if length in run else "–" for length in lengths]
        lines.append(
            [
                longest["data"],
                longest["projection_type"] + how_positions(longest),
                longest["projected_length"],
                longest["local_window"],
                how_taught(longest),
                f"{float(longest['keys_a_query']):.0f}",
                *cosines,
                f"{float(longest['embedding_cosine']):.3f}",
            ]
        )
    return [f"| {' | '.join(cells)} |" for cells in lines]


def shapes_table(rows: list[dict[str, str]]) -> list[str]:
    """Means on reviews that the source reads whole, as converted and as taught: the more keys a query, the lower."""
    runs: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for row in rows:
        if (row["data"], row["projection_type"], row["target"]) == ("reviews", "mean_pool", "whole"):
            taught = row["experiment"] if row["trainable"] in ("", "long_only") else row["trainable"]
            longest = runs.setdefault((row["projected_length"], row["local_window"]), {})
            best = longest.get(taught)
            if best is None or (int(row["length"]), float(row["token_cosine"])) > (
                int(best["length"]),
                float(best["token_cosine"]),
            ):
                longest[taught] = row
    header = ["k", "w", "exact up to", "keys a query", "tokens", "embedding", "tokens, taught", "embedding, taught"]
    lines = [header, ["---"] * len(header)]
    for (k, w), made in sorted(runs.items(), key=lambda run: float(next(iter(run[1].values()))["keys_a_query"])):
        keys = float(next(iter(made.values()))["keys_a_query"])
        cells = [k, w, str(max(int(k), 2 * int(w))), f"{keys:.0f}"]
        for taught in ("convert", "distill"):
            for column in ("token_cosine", "embedding_cosine"):
                cells.append(f"{float(made[taught][column]):.3f}" if taught in made else "–")
        lines.append(cells)
    return [f"| {' | '.join(cells)} |" for cells in lines]


def how_positions(row: dict[str, str]) -> str:
    """What was made of positions that the source has not, or was not trained on."""
    if row["target"] == "whole" and not row.get("trained_length"):
        return ""
    how = {"copy": "copied", "interpolate": "interpolated"}[row["position_extension"]]
    of = f" from the first {row['trained_length']}" if row.get("trained_length") else ""
    return f", positions {how}{of}"


def how_taught(row: dict[str, str]) -> str:
    if row["experiment"] == "convert":
        return "no"
    what = {"all": "everything", "long_only": "slots only" if row["slot_projections"] == "True" else "E only"}
    # A student that had been taught before.
    more = "after that, " if "--model_name_or_path output/distilled" in row["command"] else ""
    return f"{more}{what[row['trainable']]}, {int(row['train_tokens']) / 1e6:.1f} M tokens, lr {row['learning_rate']}"
