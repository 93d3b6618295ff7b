"""What scripts/predict.py and scripts/embed.py share: an answer for each of many documents, in a table.

Documents are read, answered and written in chunks, in the order of the input, and memory does not grow with their
number. The table appears when it is whole; `<output_file>.progress.json` stays beside it and says what it is made of.
A run that was killed goes on with --resume true and ends with the same bytes.
"""

import csv
import hashlib
import io
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from pyarrow import parquet
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from common import UserError, format_table, one_line
from documents import find_columns, find_files, kind_of
from long_texts import grouped


@dataclass
class AnswerArguments:
    """Which model, which documents, and where the answers go."""

    model_name_or_path: str = field(metadata={"help": "A Hub name or a folder. Only safetensors are read."})
    input_file: list[str] = field(
        metadata={
            "help": "Files or folders of csv, tsv, json, jsonl, parquet and txt (a document each), also with .gz; "
            "- is standard input, a document a line. Hidden files in folders are left out."
        }
    )
    output_file: str = field(metadata={"help": "A .jsonl or .parquet file."})
    text_column: list[str] | None = field(
        default=None,
        metadata={
            "help": "Column of the text. Default: one of a usual name or, of a table that is named itself, the "
            "only text."
        },
    )
    id_column: str | None = field(
        default=None, metadata={"help": "Column that names the documents. Default: file, or file:row."}
    )
    windows: bool = field(default=False, metadata={"help": "Read all of a long document, in even parts."})
    max_length: int | None = field(
        default=None,
        metadata={"help": "Tokens of one pass, special ones included. Default: all that the model reads."},
    )
    per_device_eval_batch_tokens: int = field(
        default=16384, metadata={"help": "Tokens of one forward pass, pads included; a longer row goes alone."}
    )
    chunk_size: int = field(
        default=256, metadata={"help": "Documents that are read, sorted by length and written together."}
    )
    dtype: str = field(
        default="float32", metadata={"help": "Of the weights and of the work.", "choices": ["float32", "bfloat16"]}
    )
    resume: bool = field(default=False, metadata={"help": "Go on where a run that was killed had come to."})
    overwrite: bool = field(default=False, metadata={"help": "Replace --output_file, or what there is of it."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run modelling code that comes with the model. A Linformer needs none."}
    )


# What a resumed run may change: other batches move the last digits at most.
FREE_ARGUMENTS = ("resume", "overwrite", "chunk_size", "per_device_eval_batch_tokens")
# A chunk ends with the document that reaches so many characters, whatever --chunk_size says.
CHUNK_CHARACTERS = 4_000_000
# Rows of a parquet file are parsed and written so many characters at a time, whatever is in them.
GROUP_CHARACTERS = 2**26


def check_answer_arguments(arguments: AnswerArguments, suffixes: Sequence[str]) -> None:
    """Raises `UserError` for options that cannot be meant. suffixes: what --output_file may end in"""
    for name in ("max_length", "per_device_eval_batch_tokens", "chunk_size"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}")
    if arguments.resume and arguments.overwrite:
        raise UserError("--resume goes on and --overwrite begins again: give one of them")
    path = Path(arguments.output_file)
    if path.suffix not in suffixes or path.is_dir():
        known = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"
        raise UserError(f"--output_file {path} must be a file that ends in {known}")


def identity_of(
    arguments: AnswerArguments,
    max_length: int,
    configuration: str,
    tokenizer: PreTrainedTokenizerBase,
    weights: Iterable[Tensor],
) -> dict[str, Any]:
    """What a run has to have in common with the one that it goes on with."""
    sha256 = {name: hashlib.sha256() for name in ("configuration", "tokenizer", "weights")}
    sha256["configuration"].update(configuration.encode())
    sha256["tokenizer"].update(tokenizer.backend_tokenizer.to_str().encode())
    for weight in weights:
        sha256["weights"].update(weight.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    given = {name: value for name, value in asdict(arguments).items() if name not in FREE_ARGUMENTS}
    if arguments.text_column and len(arguments.text_column) == 1:
        given["text_column"] = arguments.text_column[0]
    hashes = {f"SHA-256 of the {name}": value.hexdigest() for name, value in sha256.items()}
    return {**given, "max_length": max_length, **hashes}


@contextmanager
def enough_memory(shape: Iterable[int]) -> Iterator[None]:
    """Says what to do where a batch of this shape does not fit into the device."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"a batch of {' x '.join(map(str, shape))} tokens does not fit into memory: lower "
            "--per_device_eval_batch_tokens, and go on with --resume true"
        ) from error


# The output


def as_cell(value: Any) -> Any:
    """A value as csv can hold it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "; ".join(value) if isinstance(value, list) else value


class Output:
    """A table that appears when it is whole; until then its rows are in a part file.

    A record beside it says what it is made of and how far it goes. Rows are written first, then the record, which
    counts their bytes: what a kill leaves beyond them is cut off.
    """

    def __init__(self, path: Path):
        self.path = path
        self.part, self.record = (path.with_name(path.name + end) for end in (".partial", ".progress.json"))
        self.is_whole = False
        self.progress: dict[str, Any] = dict.fromkeys(("documents", "bytes", "cut"), 0)
        self.progress |= {"digest": "", "labels": {}, "skipped": {}}

    @contextmanager
    def writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {one_line(error)}; once it can be, go on with --resume true"
            ) from error

    def start(self, schema: pa.Schema, identity: dict[str, Any], resume: bool, overwrite: bool) -> None:
        """Go on with what there is, or begin; raises `UserError` where neither is allowed."""
        self.schema, self.identity = schema, identity
        found = [path for path in (self.path, self.part) if path.exists()]
        if found and not resume and not overwrite:
            raise UserError(f"{found[0]} is there: go on with --resume true, or replace it with --overwrite true")
        known = None
        if resume and self.record.exists():
            try:
                known = json.loads(self.record.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{self.record} is damaged; begin again with --overwrite true") from error
        self.is_whole = resume and found == [self.path]
        if self.is_whole and known is None:
            raise UserError(f"{self.path} is there, but not {self.record}; replace it with --overwrite true")
        # A part that is shorter is of a run that began anew and was killed before it could say so.
        if known and (self.is_whole or self.part in found and self.part.stat().st_size >= known["progress"]["bytes"]):
            before = known["identity"]
            changed = [
                f"{name} was {before.get(name)} and is {identity.get(name)}"
                for name in {**before, **identity}
                if before.get(name) != identity.get(name)
            ]
            if changed:
                raise UserError(f"cannot resume {self.path} with other arguments: {'; '.join(changed)}")
            self.progress = known["progress"]
        elif resume:
            print(f"nothing to resume for {self.path}: starting from the beginning", file=sys.stderr)
        if not self.is_whole:
            with self.writing():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.part.touch()
                os.truncate(self.part, self.progress["bytes"])
            if self.progress["documents"] == 0:
                self.write([], "")

    def write(self, rows: Sequence[dict[str, Any]], digest: str) -> None:
        """Add rows. digest: of all documents up to here"""
        before, text = self.progress, io.StringIO()
        if self.path.suffix == ".csv":
            writer = csv.DictWriter(text, self.schema.names, lineterminator="\n")
            if before["bytes"] == 0:
                writer.writeheader()
            writer.writerows({name: as_cell(value) for name, value in row.items()} for row in rows)
        else:
            for row in rows:
                line = {name: row.get(name) for name in self.schema.names}
                text.write(json.dumps(line, ensure_ascii=False) + "\n")
        content = text.getvalue().encode()
        labels, skipped = Counter(before["labels"]), Counter(before["skipped"])
        for row in rows:
            label = row.get("label", [])
            labels.update([label] if isinstance(label, str) else label)
        skipped.update(row["error"].partition(":")[0] for row in rows if row["error"])
        self.progress = {
            "documents": before["documents"] + len(rows),
            "digest": digest,
            "bytes": before["bytes"] + len(content),
            "cut": before["cut"] + sum(row.get("cut", False) for row in rows),
            "labels": labels,
            "skipped": skipped,
        }
        with self.writing():
            with self.part.open("ab") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            # Always under one name, so that kills leave one such file at most.
            aside = self.record.with_name(self.record.name + ".partial")
            state = {"identity": self.identity, "progress": self.progress}
            aside.write_text(json.dumps(state, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            os.replace(aside, self.record)

    def finish(self) -> None:
        with self.writing():
            if self.path.suffix != ".parquet":
                os.replace(self.part, self.path)
                return
            aside = self.part.with_name(self.part.name + ".parquet")
            with self.part.open(encoding="utf-8") as lines, parquet.ParquetWriter(aside, self.schema) as writer:
                for group in grouped(lines, len, GROUP_CHARACTERS, 10_000):
                    writer.write_table(pa.Table.from_pylist([json.loads(line) for line in group], self.schema))
            os.replace(aside, self.path)
            self.part.unlink()


# Documents


class Inputs(NamedTuple):
    """The files by the names they have in the output, None: standard input, and of each table the columns to read."""

    files: dict[str, Path | None]
    columns: list[dict[str, list[str]]]


def find_inputs(arguments: AnswerArguments, output: Output) -> Inputs:
    """What --input_file stands for, with the columns of the text and the id for each of --text_column.

    Raises `UserError` where there is nothing to read.
    """
    written = [path.resolve() for path in (output.path, output.part, output.record)]
    files = find_files(arguments.input_file, written, arguments.text_column or ())
    tables = {name: path for name, path in files.items() if path and kind_of(path) != ".txt"}
    for name in ("text_column", "id_column"):
        if getattr(arguments, name) is not None and not tables:
            raise UserError(f"--{name} needs a table, and {' '.join(arguments.input_file)} holds none that has it")
    text_columns: Sequence[str | None] = arguments.text_column or [None]
    columns = [
        {name: find_columns(name, path, column, arguments.id_column) for name, path in tables.items()}
        for column in text_columns
    ]
    return Inputs(files, columns)


def digest_of(document: Sequence[str], before: str) -> str:
    """A digest of a document and of all that were before it."""
    return hashlib.sha256("\0".join([before, *document]).encode()).hexdigest()


def rows_of(
    chunk: Sequence[Any],
    answer: Callable[[list[Any]], tuple[Tensor, list[int]]],
    columns_of: Callable[[Tensor], dict[str, Any]],
    special: int,
    limit: int | None,
) -> list[dict[str, Any]]:
    """A row of the output for each document: what `columns_of` makes of its answer, or why there is none.

    answer: the answers to documents, (documents, numbers), and the tokens of each
    special: the tokens of a text that has none of its own
    limit: how many tokens are read, None: all
    """
    rows: list[dict[str, Any]] = [{"id": document.id, "error": document.error} for document in chunk]
    sound = [(row, document) for row, document in zip(rows, chunk) if not document.error]
    answers, lengths = answer([document for _, document in sound])
    for (row, _), values, length in zip(sound, answers, lengths):
        if length == special:
            row["error"] = "empty: it has no tokens"
        elif not values.isfinite().all():
            row["error"] = "not finite: what the model answers"
        else:
            row |= columns_of(values) | {"tokens": length, "cut": limit is not None and length > limit}
    return rows


def write_answers(
    output: Output,
    documents: Iterator[Any],
    total: int | None,
    answer: Callable[[list[Any]], list[dict[str, Any]]],
    arguments: AnswerArguments,
    max_length: int,
) -> None:
    """Write the rows for the documents that an output which was started does not have yet, and a summary of all.

    documents: from the first one on, tuples of an id, one or two texts, and the reason why there are none
    total: how many there are, if that is known
    answer: the rows of the output for some documents
    Raises `UserError` for other documents than the output was begun with, for none, and where none has an answer.
    """
    digest, done = "", output.progress["documents"]
    for document in islice(documents, done):
        digest = digest_of(document, digest)
    if digest != output.progress["digest"]:
        raise UserError(
            f"cannot resume {output.path}: the first {done:,} documents are not those that it was made of; begin "
            "again with --overwrite true"
        )
    if output.is_whole:
        if next(documents, None) is not None:
            raise UserError(
                f"{output.path} is whole, and there are more than its {done:,} documents now: answer the new ones "
                "alone, or all again with --overwrite true"
            )
        print(f"{output.path} is whole: there is nothing to do")
        check_answered(output)
        return
    started = time.perf_counter()
    with tqdm(total=total, initial=done, unit=" documents") as bar:
        for chunk in grouped(documents, characters_of, CHUNK_CHARACTERS, arguments.chunk_size):
            for document in chunk:
                digest = digest_of(document, digest)
            output.write(answer(chunk), digest)
            bar.update(len(chunk))
    if output.progress["documents"] == 0:
        output.part.unlink()
        output.record.unlink()
        raise UserError(f"{' '.join(arguments.input_file)} holds no documents")
    output.finish()
    seconds, count = time.perf_counter() - started, output.progress["documents"] - done
    print_summary(output.progress, max_length)
    print(f"{count:,} documents in {seconds:.1f} s, {count / seconds:.1f} a second: {output.path}")
    check_answered(output)


def characters_of(document: Sequence[str]) -> int:
    return sum(map(len, document[1:]))


def print_summary(progress: Mapping[str, Any], max_length: int) -> None:
    skipped = Counter(progress["skipped"])
    answered = progress["documents"] - skipped.total()
    if progress["labels"]:
        counts = Counter(progress["labels"]).most_common()
        print(format_table([{"label": name, "documents": n, "share": n / answered} for name, n in counts]))
    if progress["cut"]:
        print(
            f"{progress['cut']:,} of {answered:,} ({progress['cut'] / answered:.1%}) have more than {max_length:,} "
            "tokens and were cut; --windows true reads all of them"
        )
    if skipped:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in skipped.most_common())
        print(f"{skipped.total():,} of {progress['documents']:,} documents were skipped, see `error`: {reasons}")


def check_answered(output: Output) -> None:
    """Raises `UserError` where every document was skipped."""
    skipped = Counter(output.progress["skipped"])
    if skipped.total() == output.progress["documents"]:
        reason = skipped.most_common(1)[0][0]
        raise UserError(
            f"no document was answered, most often for the reason {reason!r}: see `error` in {output.path}"
        )
