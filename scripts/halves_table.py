"""The table of results/halves.csv, for scripts/make_tables.py: halves of long documents that find each other."""

from make_tables import keys_of_a_query


def halves_table(rows: list[dict[str, str]]) -> list[str]:
    """A line for each run: what was read, how often the other half was found, and what a document took.

    In brackets the intervals of 95 %, of the recall and of how far it is above that of the same documents in windows.
    """
    header = ["documents", "model", "keys a query", "reads", "tokens of a half", "of them read", "recall@1"]
    header += ["above windows", "MRR", "ms a document"]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        length = f"{int(row['max_length']):,}"
        tokens, tokens_read = float(row["tokens"]), float(row["tokens_read"])
        lines.append(
            [
                f"{row['documents']} {row['data']}",
                row["run_name"],
                keys_of_a_query(row),
                f"windows of {length}" if row["method"] == "windows" else f"the first {length}",
                f"{tokens:,.0f}",
                f"{tokens_read / tokens:.0%}",
                with_interval(row, "recall_at_1", ".3f"),
                with_interval(row, "difference", "+.3f"),
                f"{float(row['mrr']):.3f}",
                f"{1000 * float(row['seconds_per_document']):,.0f}",
            ]
        )
    return [f"| {' | '.join(cells)} |" for cells in lines]


def with_interval(row: dict[str, str], column: str, form: str) -> str:
    """A number and its interval, as far as the row has them."""
    if not row.get(column):
        return ""
    value = format(float(row[column]), form)
    if not row.get(f"{column}_low"):
        return value
    low, high = (format(float(row[f"{column}_{end}"]), form) for end in ("low", "high"))
    return f"{value} ({low} to {high})"
