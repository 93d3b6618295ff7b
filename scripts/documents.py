"""Documents from files of every kind, one after the other; what cannot be read is among them, with its reason.

Memory holds a document at a time, not a file: rows of tables are parsed as they are needed.
"""

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO, cast

import pyarrow as pa
from pyarrow import parquet

from common import FILE_TYPES, UserError, first_of, one_line, refuse_other_separators


# Tried in this order where --text_column is not given: the names of GLUE and of the usual Hub data sets.
TEXT_COLUMNS = [
    ["text"],
    ["sentence1", "sentence2"],
    ["premise", "hypothesis"],
    ["question", "sentence"],
]
# A sentence alone comes after those that have a question beside them.
TEXT_COLUMNS += [["question1", "question2"], ["sentence"], ["document"], ["content"], ["review"]]

# Of one value in a csv or json file: more means a quote or a bracket that is never closed.
LARGEST_VALUE = 2**27
BLOCK = 2**20
# Of which the columns of a table are told: rows of json may leave some out.
HEAD_ROWS = 20
USUAL_TEXT_COLUMNS = [names[0] for names in TEXT_COLUMNS if len(names) == 1]
READ_ERRORS = (OSError, EOFError, ValueError, RecursionError, zlib.error, csv.Error, pa.ArrowException)


class Document(NamedTuple):
    """A text, or the reason why there is none."""

    id: str
    text: str = ""
    error: str = ""


def kind_of(path: Path) -> str:
    """The suffix that says how a file is read, .gz left out."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def is_output(path: Path) -> bool:
    """Whether scripts/predict.py or embed.py wrote this file, in this run or another."""
    parts = (".progress.json", ".partial", ".partial.parquet")
    return path.name.endswith(parts) or path.with_name(path.name + ".progress.json").exists()


def find_files(
    given: Sequence[str], written: Container[Path], text_columns: Sequence[str] = ()
) -> dict[str, Path | None]:
    """The files by the names they have in the output; None: standard input.

    written: files that are no input
    text_columns: those of the text in tables, two for pairs; none: one of a usual name
    What a folder holds beside documents is left out with a warning: files of other types, what scripts/predict.py and
    embed.py wrote, and tables without these columns. Raises `UserError` for a name that cannot be read and where
    nothing is left.
    """
    files: dict[str, Path | None] = {}
    others: Counter[str] = Counter()
    outputs: list[str] = []
    textless: list[str] = []
    for name in given:
        path = Path(name)
        if name == "-":
            files["stdin"] = None
        elif path.is_dir():
            for file in sorted(path.rglob("*")):
                inside = file.relative_to(path)
                if file.is_dir() or any(part.startswith(".") for part in inside.parts) or file.resolve() in written:
                    continue
                if is_output(file):
                    outputs.append(str(inside))
                elif kind_of(file) not in FILE_TYPES:
                    others[kind_of(file) or "no suffix"] += 1
                elif kind_of(file) != ".txt" and not may_hold_text(str(file), file, text_columns):
                    textless.append(str(inside))
                else:
                    files[str(inside if len(given) == 1 else file)] = file
        elif not path.exists():
            raise UserError(f"--input_file {name} does not exist")
        elif kind_of(path) not in FILE_TYPES:
            raise UserError(f"--input_file {name} is of unknown type {kind_of(path)!r}; known: {list(FILE_TYPES)}")
        elif path.resolve() in written:
            raise UserError(f"--input_file {name} is what --output_file would replace")
        else:
            files[name] = path
    known = " and ".join(text_columns) or " or ".join(USUAL_TEXT_COLUMNS)
    left_out = {
        "files of other types": [f"{count} of {suffix}" for suffix, count in others.most_common()],
        "outputs of predict.py and embed.py": outputs,
        f"tables without a column {known} (another is named with --text_column)": textless,
    }
    for what, names in left_out.items():
        if names:
            print(f"warning: {what} are left out: {first_of(names)}", file=sys.stderr)
    if not files:
        raise UserError(f"--input_file {' '.join(given)} holds no file of {list(FILE_TYPES)} with text")
    return files


def open_bytes(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.name.lower().endswith(".gz") else path.open("rb")


def as_text(file: BinaryIO, newline: str) -> TextIO:
    # Bytes that are no UTF-8 become lone surrogates, by which `problem_of` finds the documents that hold them.
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def rows_of_csv(path: Path) -> Iterator[Any]:
    csv.field_size_limit(LARGEST_VALUE)
    with as_text(open_bytes(path), newline="") as file:
        reader = csv.reader(file, delimiter="\t" if kind_of(path) == ".tsv" else ",", strict=True)
        columns = next(reader, [])
        while True:
            before = reader.line_num
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                # A quote that is not closed takes all that follows with it.
                yield ValueError(f"lines {before + 1:,} to {reader.line_num:,}: {error}")
                continue
            if len(values) == len(columns):
                yield dict(zip(columns, values))
            elif values:
                yield ValueError(f"the row has {len(values)} values for {len(columns)} columns")


def rows_of_lines(path: Path) -> Iterator[Any]:
    with as_text(open_bytes(path), newline="\n") as file:
        for line in filter(str.strip, file):
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                yield error


def rows_of_json(path: Path) -> Iterator[Any]:
    """The items of a list, parsed as they are needed, or a row a line."""
    with as_text(open_bytes(path), newline="\n") as file:
        text, start = file.read(BLOCK).lstrip(), 1
        if not text.startswith("["):
            yield from rows_of_lines(path)
            return
        decoder, between = json.JSONDecoder(), re.compile(r"[\s,]*")
        while not text.startswith("]", start := start + len(between.match(text, start)[0])):  # type: ignore[index]
            try:
                row, end = decoder.raw_decode(text, start)
            except ValueError:
                end = len(text)
            if end < len(text):
                yield row
                start = end
                continue
            # What has been read may end within a row. Twice as much each time, so that a long row is not parsed often.
            more = file.read(max(BLOCK, len(text) - start))
            if not more or len(text) - start > LARGEST_VALUE:
                raise ValueError("the list is broken, or has no end")
            text, start = text[start:] + more, 0


def rows_of_parquet(path: Path, columns: list[str] | None) -> Iterator[Any]:
    with open_bytes(path) as file:
        for batch in parquet.ParquetFile(file, buffer_size=BLOCK).iter_batches(batch_size=16, columns=columns):
            # As bytes, since one string that is no UTF-8 would make all of the batch unreadable.
            values = [
                column.cast(pa.large_binary()) if column.type in (pa.string(), pa.large_string()) else column
                for column in batch.columns
            ]
            yield from (dict(zip(batch.schema.names, row)) for row in zip(*(column.to_pylist() for column in values)))


def rows_of(path: Path, columns: list[str] | None = None) -> Iterator[Any]:
    """The rows of a table, of which some can be an exception, or no dictionary. columns: the ones that are needed"""
    kind = kind_of(path)
    if kind == ".parquet":
        return rows_of_parquet(path, columns)
    return {".jsonl": rows_of_lines, ".json": rows_of_json}.get(kind, rows_of_csv)(path)


def head_of(path: Path) -> dict[str, Any]:
    """The columns of the first rows of a table that can be read, each with a value; {} if there are none."""
    head: dict[str, Any] = {}
    try:
        for row in islice((row for row in rows_of(path) if isinstance(row, dict)), HEAD_ROWS):
            head |= {name: value for name, value in row.items() if head.get(name) is None}
    except READ_ERRORS:
        # What ends early has a head all the same; who reads the file reports it.
        return head
    return head


def may_hold_text(name: str, path: Path, text_columns: Sequence[str]) -> bool:
    """Whether a table has these columns, none: one of a usual name. One that cannot be read may, and is reported."""
    head = head_of(path)
    if not head:
        return True
    refuse_other_separators(list(head), name)
    return head.keys() >= set(text_columns) if text_columns else any(name in head for name in USUAL_TEXT_COLUMNS)


def find_columns(name: str, path: Path, text_column: str | None, id_column: str | None) -> list[str]:
    """The column of the text and, if wanted, that of the id, by the first rows; [] if none can be read."""
    head = head_of(path)
    if not head:
        return []
    refuse_other_separators(list(head), name)
    given = [column for column in (text_column, id_column) if column is not None]
    if unknown := [column for column in given if column not in head]:
        raise UserError(f"{name} has no column {unknown[0]!r}; it has {list(head)}")
    if text_column is not None:
        return given
    texts = [name for name in USUAL_TEXT_COLUMNS if name in head][:1]
    texts = texts or [key for key in head if isinstance(head[key], (str, bytes)) and key != id_column]
    if len(texts) != 1:
        raise UserError(f"cannot tell which of {list(head)} of {name} holds the text; name it with --text_column")
    return texts + given


def problem_of(text: Any) -> str:
    """Why something cannot be classified; empty if it can."""
    if text is None:
        return "no text"
    if not isinstance(text, str):
        return f"not text: {type(text).__name__}"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code, position = ord(text[error.start]), len(text[: error.start].encode())
        what = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"half a character, U+{code:04X},"
        return f"not valid UTF-8: {what} at position {position} of the text"
    return "" if text.strip() else "empty"


def document_of(name: Any, value: Any) -> Document:
    """The document that a value is, or cannot be."""
    name, value = (
        item.decode("utf-8", "surrogateescape") if isinstance(item, bytes) else item for item in (name, value)
    )
    problem = f"cannot be read: {one_line(value)}" if isinstance(value, Exception) else problem_of(value)
    # Names can hold what is no UTF-8, and have to be written all the same.
    name, problem = (str(text).encode("utf-8", "backslashreplace").decode() for text in (name, problem))
    return Document(name, "" if problem else value, problem)


def documents_of_table(name: str, path: Path, columns: list[str]) -> Iterator[Document]:
    number = 0
    for number, row in enumerate(rows_of(path, columns or None), start=1):
        row_id = None
        if isinstance(row, dict):
            row, row_id = [*(row.get(column) for column in columns), None, None][:2]
        elif not isinstance(row, Exception):
            row = ValueError(f"the row is a {type(row).__name__}, which has no columns")
        yield document_of(f"{name}:{number}" if row_id is None else row_id, row)
    if number == 0:
        yield document_of(name, ValueError("the file holds no rows"))


def read_documents(files: Mapping[str, Path | None], columns: Mapping[str, list[str]]) -> Iterator[Document]:
    """All documents, one after the other; what cannot be read is among them, with its reason."""
    for name, path in files.items():
        try:
            if path is None:
                lines = as_text(sys.stdin.buffer, newline="\n")
                yield from (document_of(f"{name}:{number}", line) for number, line in enumerate(lines, start=1))
            elif kind_of(path) == ".txt":
                with as_text(open_bytes(path), newline="") as file:
                    text = file.read()
                yield document_of(name, text)
            else:
                yield from documents_of_table(name, path, columns[name])
        except READ_ERRORS as error:
            yield document_of(name, error)


def count_documents(files: Mapping[str, Path | None]) -> int | None:
    """How many there are, if that is known without reading them: a txt file is one, and parquet files say it."""
    try:
        return sum(
            1 if path and kind_of(path) == ".txt" else parquet.read_metadata(path).num_rows for path in files.values()
        )
    except (*READ_ERRORS, TypeError):
        return None
