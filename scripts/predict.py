"""Classify many documents, however long, with a saved model: labels and probabilities in a table.

    python scripts/predict.py --model_name_or_path demo --input_file contracts/ --output_file labels.csv
    python scripts/predict.py --model_name_or_path output/contracts --input_file a.parquet b.jsonl.gz \\
        --text_column clause --id_column number --output_file labels.parquet --windows true
    cat lines.txt | python scripts/predict.py --model_name_or_path demo --input_file - --output_file labels.jsonl

Columns: `id`, `label`, `score` (the label's probability), the probability of each label, `tokens`, `cut` (whether the
text has more tokens than were read), `error` (why the document was skipped, else empty). A regression model gives
`value` in place of labels; a multi-label model gives every label of at least --threshold, and no `score`.

Documents are read, classified and written in chunks, in the order of the input, and memory does not grow with their
number. The output appears when it is whole; `<output_file>.progress.json` stays beside it and says what it is made of.
A run that was killed goes on with --resume true and ends with the same bytes.
"""

import csv
import hashlib
import io
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch
from huggingface_hub.errors import StrictDataclassError
from pyarrow import parquet
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

# Registers the model with the Auto classes: a Linformer then needs no remote code.
import hf_linformer  # noqa: F401
from common import UserError, format_table, longest_input, one_line, parse_arguments, run_main
from documents import Document, count_documents, find_columns, find_files, kind_of, read_documents


@dataclass
class Arguments:
    """Which model, which documents, and where the answers go."""

    model_name_or_path: str = field(
        metadata={"help": "Any classifier: a Hub name or a folder. Only safetensors are read."}
    )
    input_file: list[str] = field(
        metadata={
            "help": "Files or folders of csv, tsv, json, jsonl, parquet and txt (a document each), also with .gz; "
            "- is standard input, a document a line. Hidden files in folders are left out."
        }
    )
    output_file: str = field(metadata={"help": "A .csv, .jsonl or .parquet file."})
    text_column: str | None = field(
        default=None, metadata={"help": "Column that holds the text. Default: a usual name, or the only text."}
    )
    id_column: str | None = field(
        default=None, metadata={"help": "Column that names the documents. Default: file, or file:row."}
    )
    windows: bool = field(
        default=False,
        metadata={"help": "Read all of a long document, in even parts; the mean of their probabilities counts."},
    )
    threshold: float = field(
        default=0.5, metadata={"help": "The least probability of the labels that a multi-label model gives."}
    )
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
# The tokenizer takes some 500 bytes a token: texts go to it in pieces, so many characters of them at a time.
PIECE_CHARACTERS, TOKENIZED_CHARACTERS = 50_000, 500_000
Item = TypeVar("Item")


def grouped(items: Iterable[Item], size_of: Callable[[Item], int], limit: int, most: int) -> Iterator[list[Item]]:
    """Lists of the items as they come, each of up to `most` and up to the item with which they reach size `limit`."""
    group: list[Item] = []
    size = 0
    for item in items:
        group.append(item)
        size += size_of(item)
        if len(group) == most or size >= limit:
            yield group
            group, size = [], 0
    if group:
        yield group


# The model


class Classifier(NamedTuple):
    """A model with what its answers mean."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    names: list[str]
    problem_type: str


def load_classifier(name: str, dtype: str, max_length: int | None, trust_remote_code: bool) -> Classifier:
    """A trained classifier that reads max_length tokens, None: all that it can. Raises `UserError` for any other."""
    trust = {"trust_remote_code": trust_remote_code}
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True, **trust
        )
        tokenizer = AutoTokenizer.from_pretrained(name, **trust)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"cannot load the model {name}: {one_line(error)}") from error
    if lost := sorted(report["missing_keys"]):
        raise UserError(
            f"{name} is no trained classifier: it lacks {len(lost)} weights of a {type(model).__name__}, such as "
            f"{lost[0]}; scripts/finetune.py trains them"
        )
    if not tokenizer.is_fast or tokenizer.pad_token is None:
        raise UserError(f"the tokenizer of {name} must be a fast one, with a token to pad with")
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(f"the tokenizer of {name} has {len(tokenizer)} entries, the model {model.config.vocab_size}")

    positions = longest_input(model) or math.inf
    # The tokenizer knows the length of training; the model's table of positions may be longer.
    read = max_length or min(tokenizer.model_max_length, positions)
    special = tokenizer.num_special_tokens_to_add()
    if read > 2**31:
        raise UserError(f"{name} does not say how many tokens it reads; say it with --max_length")
    if not special < read <= positions:
        raise UserError(
            f"--max_length is {read}, and {name} reads {positions:,} tokens at most, {special} of them special"
        )
    id2label: dict[int, str] = model.config.id2label
    names = [str(id2label[index]) for index in range(len(id2label))]
    usual = "regression" if len(names) == 1 else "single_label_classification"
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return Classifier(model, tokenizer, int(read), names, model.config.problem_type or usual)


def identity_of(arguments: Arguments, classifier: Classifier) -> dict[str, Any]:
    """What a run has to have in common with the one that it goes on with."""
    sha256 = {name: hashlib.sha256() for name in ("configuration", "tokenizer", "weights")}
    sha256["configuration"].update(classifier.model.config.to_json_string().encode())
    sha256["tokenizer"].update(classifier.tokenizer.backend_tokenizer.to_str().encode())
    for weight in classifier.model.state_dict().values():
        sha256["weights"].update(weight.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return {
        **{name: value for name, value in asdict(arguments).items() if name not in FREE_ARGUMENTS},
        "max_length": classifier.max_length,
        **{f"SHA-256 of the {name}": value.hexdigest() for name, value in sha256.items()},
    }


def pieces_of(text: str) -> Iterator[str]:
    """A text in pieces of up to `PIECE_CHARACTERS`, which end before a space where there is one."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end = text.rfind(" ", start + 1, start + PIECE_CHARACTERS)
        end = end if end > 0 else start + PIECE_CHARACTERS
        yield text[start:end]
        start = end
    yield text[start:]


def tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """The tokens of each text, without special ones, in memory that is bounded however long a text is.

    The pieces of a text have the tokens of the whole wherever words are tokenized one by one.
    """
    tokens: list[list[np.ndarray]] = [[] for _ in texts]
    pieces = ((document, piece) for document, text in enumerate(texts) for piece in pieces_of(text))
    for group in grouped(pieces, lambda pair: len(pair[1]), TOKENIZED_CHARACTERS, sys.maxsize):
        encoded = tokenizer([piece for _, piece in group], add_special_tokens=False, verbose=False)["input_ids"]
        for (document, _), input_ids in zip(group, encoded):
            tokens[document].append(np.array(input_ids, dtype=np.int32))
    return [np.concatenate(parts) for parts in tokens]


def with_special_tokens(rows: Sequence[np.ndarray], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[list[int]]]:
    """What the model is given for rows of tokens: around each, what the tokenizer puts around a text."""
    example = dict(tokenizer("a", return_special_tokens_mask=True))
    special = example.pop("special_tokens_mask")
    start, end = special.index(0), len(special) - special[::-1].index(0)
    return {
        name: [
            values[:start]
            + (row.tolist() if name == "input_ids" else values[start : start + 1] * len(row))
            + values[end:]
            for row in rows
        ]
        for name, values in example.items()
    }


@torch.inference_mode()
def forward(rows: Sequence[np.ndarray], classifier: Classifier) -> Tensor:
    """Probabilities, or the values of a regression: (rows, labels)"""
    inputs = with_special_tokens(rows, classifier.tokenizer)
    batch = classifier.tokenizer.pad(inputs, return_tensors="pt").to(classifier.model.device)
    try:
        logits = classifier.model(**batch).logits.float().cpu()
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"a batch of {' x '.join(map(str, batch['input_ids'].shape))} tokens does not fit into memory: lower "
            "--per_device_eval_batch_tokens, and go on with --resume true"
        ) from error
    if classifier.problem_type == "regression":
        return logits
    return logits.sigmoid() if classifier.problem_type == "multi_label_classification" else logits.softmax(-1)


def classify(texts: Sequence[str], classifier: Classifier, arguments: Arguments) -> tuple[Tensor, list[int]]:
    """The answers to all texts (texts, labels), not finite where there is no token, and the tokens of each text."""
    tokenized = tokenize(texts, classifier.tokenizer)
    special = classifier.tokenizer.num_special_tokens_to_add()
    room = classifier.max_length - special
    rows: list[tuple[int, np.ndarray]] = []
    for document, tokens in enumerate(tokenized):
        if arguments.windows:
            parts = np.array_split(tokens, max(1, math.ceil(len(tokens) / room)))
        else:
            parts = [tokens[-room:] if classifier.tokenizer.truncation_side == "left" else tokens[:room]]
        rows += [(document, part) for part in parts if len(part)]
    # Rows of about one length share a batch, so that little is padded.
    rows.sort(key=lambda row: len(row[1]), reverse=True)
    sums, counts = torch.zeros(len(texts), len(classifier.names)), torch.zeros(len(texts), 1)
    while rows:
        size = max(1, arguments.per_device_eval_batch_tokens // (len(rows[0][1]) + special))
        documents, batch = zip(*rows[:size])
        rows = rows[size:]
        sums.index_add_(0, torch.tensor(documents), forward(batch, classifier))
        counts.index_add_(0, torch.tensor(documents), torch.ones(len(batch), 1))
    return sums / counts, [len(tokens) + special for tokens in tokenized]


# The output


def schema_of(classifier: Classifier) -> tuple[pa.Schema, list[str]]:
    """The columns of the output, and those among them for the answers: one for each label, under its name.

    A name that another column has is made longer.
    """
    labels: list[tuple[str, pa.DataType]] = {
        "single_label_classification": [("label", pa.string()), ("score", pa.float64())],
        "multi_label_classification": [("label", pa.list_(pa.string()))],
    }.get(classifier.problem_type, [])
    taken = {"id", "label", "score", "tokens", "cut", "error"}
    columns = []
    for column in classifier.names if labels or len(classifier.names) > 1 else ["value"]:
        while column in taken:
            column = f"probability of {column}"
        taken.add(column)
        columns.append(column)
    answers = [(column, pa.float64()) for column in columns]
    rest = [("tokens", pa.int64()), ("cut", pa.bool_()), ("error", pa.string())]
    return pa.schema([("id", pa.string()), *labels, *answers, *rest]), columns


def predict(
    chunk: Sequence[Document], classifier: Classifier, columns: Sequence[str], arguments: Arguments
) -> list[dict[str, Any]]:
    """A row of the output for each document."""
    rows: list[dict[str, Any]] = [{"id": document.id, "error": document.error} for document in chunk]
    sound = [(row, document.text) for row, document in zip(rows, chunk) if not document.error]
    answers, lengths = classify([text for _, text in sound], classifier, arguments)
    for (row, _), scores, length in zip(sound, answers.tolist(), lengths):
        if length == classifier.tokenizer.num_special_tokens_to_add():
            row["error"] = "empty: it has no tokens"
            continue
        if not all(map(math.isfinite, scores)):
            row["error"] = "not finite: what the model answers"
            continue
        best = scores.index(max(scores))
        # What float32 tells apart.
        scores = [float(f"{score:.6g}") for score in scores]
        if classifier.problem_type == "single_label_classification":
            row |= {"label": classifier.names[best], "score": scores[best]}
        elif classifier.problem_type == "multi_label_classification":
            row["label"] = [name for name, score in zip(classifier.names, scores) if score >= arguments.threshold]
        row |= zip(columns, scores)
        row |= {"tokens": length, "cut": length > classifier.max_length and not arguments.windows}
    return rows


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
                while rows := [json.loads(line) for line in islice(lines, 10_000)]:
                    writer.write_table(pa.Table.from_pylist(rows, self.schema))
            os.replace(aside, self.path)
            self.part.unlink()


def digest_of(document: Document, before: str) -> str:
    """A digest of a document and of all that were before it."""
    return hashlib.sha256("\0".join([before, *document]).encode()).hexdigest()


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


def check_arguments(arguments: Arguments) -> None:
    for name in ("max_length", "per_device_eval_batch_tokens", "chunk_size"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}")
    if not 0 <= arguments.threshold <= 1:
        raise UserError(f"--threshold is a probability, from 0 to 1, not {arguments.threshold}")
    if arguments.resume and arguments.overwrite:
        raise UserError("--resume goes on and --overwrite begins again: give one of them")
    path = Path(arguments.output_file)
    if path.suffix not in (".csv", ".jsonl", ".parquet") or path.is_dir():
        raise UserError(f"--output_file {path} must be a file that ends in .csv, .jsonl or .parquet")


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments((Arguments,), argv, description=__doc__)
    check_arguments(arguments)
    output = Output(Path(arguments.output_file))
    written = [path.resolve() for path in (output.path, output.part, output.record)]
    files = find_files(arguments.input_file, written, arguments.text_column)
    tables = {name: path for name, path in files.items() if path and kind_of(path) != ".txt"}
    for name in ("text_column", "id_column"):
        if getattr(arguments, name) is not None and not tables:
            raise UserError(f"--{name} needs a table, and {' '.join(arguments.input_file)} holds plain text only")
    table_columns = {
        name: find_columns(name, path, arguments.text_column, arguments.id_column) for name, path in tables.items()
    }
    logging.disable_progress_bar()
    classifier = load_classifier(
        arguments.model_name_or_path, arguments.dtype, arguments.max_length, arguments.trust_remote_code
    )
    schema, columns = schema_of(classifier)
    output.start(schema, identity_of(arguments, classifier), arguments.resume, arguments.overwrite)
    if output.is_whole:
        print(f"{output.path} is whole: there is nothing to do")
        return

    documents, digest, done = read_documents(files, table_columns), "", output.progress["documents"]
    for document in islice(documents, done):
        digest = digest_of(document, digest)
    if digest != output.progress["digest"]:
        raise UserError(
            f"cannot resume {output.path}: the first {done:,} documents are not those that it was made of; begin "
            "again with --overwrite true"
        )
    started = time.perf_counter()
    with tqdm(total=count_documents(files), initial=done, unit=" documents") as bar:
        for chunk in grouped(documents, lambda document: len(document.text), CHUNK_CHARACTERS, arguments.chunk_size):
            for document in chunk:
                digest = digest_of(document, digest)
            output.write(predict(chunk, classifier, columns, arguments), digest)
            bar.update(len(chunk))
    if output.progress["documents"] == 0:
        output.part.unlink()
        output.record.unlink()
        raise UserError(f"{' '.join(arguments.input_file)} holds no documents")
    output.finish()
    seconds, count = time.perf_counter() - started, output.progress["documents"] - done
    print_summary(output.progress, classifier.max_length)
    print(f"{count:,} documents in {seconds:.1f} s, {count / seconds:.1f} a second: {output.path}")


if __name__ == "__main__":
    run_main(main, resume="--resume true")
