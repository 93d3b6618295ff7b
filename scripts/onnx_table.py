"""The table of results/onnx.csv, for scripts/make_tables.py: what an exported model gains, and what 8 bits cost."""


def lengths(rows: list[dict[str, str]]) -> list[int]:
    """The lengths that were timed, in order."""
    names = {name for row in rows for name in row if name.startswith("milliseconds_")}
    return sorted(int(name.removeprefix("milliseconds_")) for name in names)


def onnx_table(rows: list[dict[str, str]]) -> list[str]:
    """A line for each model and engine, with the milliseconds that one text takes and, of a classifier, accuracy."""
    timed = lengths(rows)
    times = [f"ms, {length} tokens" for length in timed]
    header = ["model", "runs in", "MB", "largest difference", *times, "accuracy"]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        milliseconds = [row.get(f"milliseconds_{length}") for length in timed]
        accuracy = row.get("eval_accuracy")
        lines.append(
            [
                row["run_name"],
                row["engine"],
                f"{float(row['megabytes']):.1f}",
                "" if row["engine"] == "PyTorch" else f"{float(row['max_difference']):.0e}",
                *(f"{float(value):.1f}" if value else "" for value in milliseconds),
                f"{float(accuracy):.3f}" if accuracy else "",
            ]
        )
    return [f"| {' | '.join(cells)} |" for cells in lines]
