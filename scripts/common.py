"""What the scripts share: arguments from options or a file, errors a user can mend, data sets, result rows."""

import csv
import errno
import glob
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetsError
from filelock import FileLock
from transformers import HfArgumentParser


ROOT = Path(__file__).resolve().parent.parent

# Suffix, without a trailing .gz, to the builder of `datasets` that reads it and that builder's options.
# `keep_default_na`: in a CSV the words "NA", "None" and "null" are text like any other.
FILE_TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}

# Tried in this order where --text_column is not given: the names of GLUE and of the usual Hub data sets.
TEXT_COLUMNS = [
    ["text"],
    ["sentence"],
    ["sentence1", "sentence2"],
    ["premise", "hypothesis"],
    ["question", "sentence"],
]
TEXT_COLUMNS += [["question1", "question2"], ["document"], ["content"], ["review"]]


class UserError(Exception):
    """Something the user can mend; its message is the one line that is shown, and the exit code is 2."""


def run_main(main: Callable[[], None]) -> NoReturn:
    """Run a script's `main` and exit: 0 done, 1 with a traceback, 2 with one line for a `UserError` or a full disk."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"error: {one_line(error)}; make room and begin again, or go on where it can resume", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def one_line(error: BaseException) -> str:
    """The message of an error on one line, or its name if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


# Arguments


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows the defaults, and a script's docstring as it is written."""


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def parse_arguments(
    dataclass_types: Iterable[Any],
    argv: Sequence[str] | None = None,
    positional: tuple[str, str] | None = None,
    **kwargs: Any,
) -> tuple[Any, ...]:
    """Fill the dataclasses from the command line (`argv`, default `sys.argv[1:]`).

    The first argument may be a .json, .yaml or .yml file of option names and values; options after it override it.
    `positional`, a name and its help, allows any number of plain arguments too; the list of them is returned last.
    `kwargs` go to the parser, e.g. `description=__doc__`.
    """
    # Results are of the code as it was when a script began.
    commit()
    dataclass_types = list(dataclass_types)
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and Path(argv[0]).suffix in (".json", ".yaml", ".yml"):
        known = {option.name for dataclass_type in dataclass_types for option in fields(dataclass_type) if option.init}
        argv = _options_from_file(argv[0], known) + argv[1:]
    parser = _Parser(dataclass_types, allow_abbrev=False, **{"formatter_class": _HelpFormatter, **kwargs})
    if positional:
        parser.add_argument(positional[0], nargs="*", help=positional[1])
    *filled, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown arguments {' '.join(unknown)}")
    if positional:
        filled[-1] = getattr(filled[-1], positional[0])
    return tuple(filled)


def _options_from_file(path: str, known: set[str]) -> list[str]:
    # YAML holds JSON. The base loader leaves numbers as they are written, since YAML 1.1 reads 1e-4 as text anyway.
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the arguments in {path}: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must map option names to values, found {type(values).__name__}")
    if unknown := sorted(values.keys() - known):
        raise UserError(f"{path} has unknown options {unknown}; the options are {sorted(known)}")
    options: list[str] = []
    for name, value in values.items():
        if isinstance(value, list):
            options += [f"--{name}", *value]
        elif value not in ("", "null"):
            options.append(f"--{name}={value}")
    return options


# Data


@dataclass
class DataArguments:
    """Where the texts and their labels come from."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "A data set on the Hub, or a local folder that `load_dataset` understands."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration, e.g. sst2 of glue."})
    train_split_name: str = field(default="train", metadata={"help": "The split of --dataset_name to train on."})
    validation_split_name: str = field(default="validation", metadata={"help": "Its split to choose the model by."})
    test_split_name: str | None = field(
        default=None, metadata={"help": "Its split to judge the chosen model on, once, at the end."}
    )
    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Instead of --dataset_name: csv, tsv, json, jsonl or parquet, also with .gz; several if need be."
        },
    )
    validation_file: list[str] | None = field(default=None, metadata={"help": "The same for validation."})
    test_file: list[str] | None = field(default=None, metadata={"help": "The same for the test at the end."})
    text_column: list[str] | None = field(
        default=None,
        metadata={"help": "One column, or two for pairs of texts. Default: a usual name, or the only text."},
    )
    label_column: str | None = field(default=None, metadata={"help": "Default: label, or labels."})
    do_regression: bool | None = field(
        default=None,
        metadata={"help": "Predict a number (true) or a class (false). Default: a number if labels are floats."},
    )
    validation_split_percentage: float = field(
        default=10.0, metadata={"help": "The share of the training rows held out where there is no validation set."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many rows, drawn by the seed."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "The same for validation and test."})


@dataclass
class TextArguments:
    """Where plain texts come from."""

    train_file: list[str] | None = field(
        default=None, metadata={"help": "The texts: csv, tsv, json, jsonl, parquet or txt, also with .gz."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Instead of files: a data set on the Hub, or a folder that `datasets` loads."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that data set."})
    dataset_split: str = field(default="train", metadata={"help": "Split of that data set."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    sample_by: str = field(
        default="line",
        metadata={"help": "What one text of a .txt file is.", "choices": ["line", "paragraph", "document"]},
    )


def load_data_files(
    data_files: Mapping[str, str | Sequence[str]], sample_by: str = "line", streaming: bool = False
) -> DatasetDict:
    """Load the files of each split, e.g. `{"train": "a.csv", "validation": ["b.jsonl.gz", "c.jsonl"]}`.

    Types: csv, tsv, json, jsonl, parquet and txt (column `text`), each also compressed as .gz. The files of one split
    are of one type.
    sample_by: what one row of a txt file is: a line, a paragraph (up to an empty line) or the whole file (document)
    streaming: give the splits as `IterableDataset`, which reads as it goes
    Raises `UserError` for a missing, empty or unreadable file and an unknown type.
    """
    splits = DatasetDict()
    for split, given in data_files.items():
        paths = [given] if isinstance(given, str) else list(given)
        types = {Path(path.removesuffix(".gz")).suffix.lower() for path in paths}
        if unknown := types - FILE_TYPES.keys():
            raise UserError(f"{split} file {paths} is of unknown type {sorted(unknown)}; known: {list(FILE_TYPES)}")
        if len(types) > 1:
            raise UserError(f"the {split} files {paths} must be of one type, found {sorted(types)}")
        for path in paths:
            if not Path(path).is_file():
                raise UserError(f"the {split} file {path} does not exist")
            if Path(path).stat().st_size == 0:
                raise UserError(f"the {split} file {path} is empty")
        builder, options = FILE_TYPES[types.pop()]
        if builder == "text":
            options = options | {"sample_by": sample_by}
        try:
            # `datasets` takes paths for patterns: without the escape `a[1].csv` is not found and `a*.csv` is many.
            files = {split: [glob.escape(path) for path in paths]}
            splits[split] = load_dataset(builder, data_files=files, split=split, streaming=streaming, **options)
        except (DatasetGenerationError, ValueError, OSError) as error:
            reason = one_line(error.__cause__ or error)
            if "corresponds to no data" in reason:
                raise UserError(f"the {split} file {', '.join(paths)} holds no rows") from error
            raise UserError(f"cannot read the {split} file {', '.join(paths)}: {reason}") from error
    return splits


def only_texts(dataset: Dataset, text_column: str, name: str) -> Dataset:
    """The column of the text alone, or a `UserError` that says what `name` holds in its place."""
    if text_column not in dataset.column_names:
        raise UserError(f"{name} has no column {text_column!r}; --text_column can be one of {dataset.column_names}")
    if dataset.features[text_column] not in TEXT_TYPES:
        raise UserError(f"column {text_column!r} of {name} holds {dataset.features[text_column]}, not text")
    return dataset.select_columns([text_column])


def load_texts(arguments: TextArguments, split: str | None = None, streaming: bool = False) -> Dataset:
    """The column of the texts alone, of --train_file or of a split of --dataset_name (default --dataset_split).

    streaming: as an `IterableDataset`, which reads as it goes. Raises `UserError` where there is no text.
    """
    if (arguments.train_file is None) == (arguments.dataset_name is None):
        found = "neither" if arguments.train_file is None else "both"
        raise UserError(f"give either --train_file or --dataset_name, got {found}")
    if arguments.train_file is not None:
        dataset = load_data_files({"train": arguments.train_file}, arguments.sample_by, streaming)["train"]
        name = ", ".join(arguments.train_file)
    else:
        split = split or arguments.dataset_split
        name = f"split {split} of --dataset_name {arguments.dataset_name}"
        try:
            dataset = load_dataset(
                arguments.dataset_name, arguments.dataset_config_name, split=split, streaming=streaming
            )
        except (DatasetsError, OSError, ValueError) as error:
            raise UserError(f"cannot load {name}: {one_line(error.__cause__ or error)}") from error
    if streaming:
        # What a stream holds is known once its first row is read.
        try:
            dataset = dataset._resolve_features() if dataset.features is None else dataset
        except StopIteration as error:
            raise UserError(f"{name} holds no rows") from error
        except (DatasetsError, OSError, EOFError, ValueError) as error:
            raise UserError(f"cannot read the stream of {name}: {one_line(error)}") from error
    return only_texts(dataset, arguments.text_column, name)


def _load_splits(arguments: DataArguments) -> DatasetDict:
    names = {
        "train": arguments.train_split_name,
        "validation": arguments.validation_split_name,
        "test": arguments.test_split_name,
    }
    if arguments.dataset_name is None:
        files = {split: getattr(arguments, f"{split}_file") for split in names}
        if files["train"] is None:
            raise UserError("no training data: give --dataset_name or --train_file")
        return load_data_files({split: paths for split, paths in files.items() if paths})
    try:
        if Path(arguments.dataset_name, "dataset_dict.json").is_file():
            available = load_from_disk(arguments.dataset_name)
        else:
            available = load_dataset(arguments.dataset_name, arguments.dataset_config_name)
    except (DatasetGenerationError, ValueError, OSError) as error:
        raise UserError(f"cannot load the data set {arguments.dataset_name}: {one_line(error)}") from error
    for split in ("train", "test"):
        if names[split] and names[split] not in available:
            raise UserError(f"{arguments.dataset_name} has no split {names[split]!r}; it has {sorted(available)}")
    splits = DatasetDict({split: available[name] for split, name in names.items() if name in available})
    files = {split: getattr(arguments, f"{split}_file") for split in ("validation", "test")}
    return DatasetDict(splits | load_data_files({split: paths for split, paths in files.items() if paths}))


def _find_columns(arguments: DataArguments, dataset: Dataset) -> tuple[list[str], str]:
    columns = dataset.column_names
    label = arguments.label_column or next((name for name in ("label", "labels") if name in columns), None)
    if label is None:
        raise UserError(f"no label column found among {columns}; name it with --label_column")
    texts = arguments.text_column or next((names for names in TEXT_COLUMNS if set(names) <= set(columns)), None)
    if texts is None:
        texts = [name for name, kind in dataset.features.items() if name != label and kind in TEXT_TYPES]
        if len(texts) != 1:
            raise UserError(f"cannot tell which of {columns} holds the text; name it, or two, with --text_column")
    if len(texts) > 2:
        raise UserError(f"--text_column takes one column, or two for pairs of texts, not {len(texts)}: {texts}")
    return texts, label


TEXT_TYPES = (Value("string"), Value("large_string"))


def _column(dataset: Dataset, name: str) -> list[Any]:
    return dataset.with_format("arrow")[:][name].to_pylist()


def _rows(values: Sequence[Any], wrong: Callable[[Any], bool]) -> str:
    """The numbers, from 1, of the rows whose value is wrong, the first ten of them; empty if there are none."""
    rows = [str(row) for row, value in enumerate(values, start=1) if wrong(value)]
    return ", ".join(rows[:10]) + (f" and {len(rows) - 10} more" if len(rows) > 10 else "")


def _label_names(split: str, dataset: Dataset, column: str) -> list[str]:
    """The labels of one split as names: the data set's own where it has them, else the values as text."""
    kind, labels = dataset.features[column], _column(dataset, column)
    if rows := _rows(labels, lambda label: label is None):
        raise UserError(f"column {column!r} of the {split} set has no label in rows {rows}")
    if isinstance(kind, Value) and "float" in kind.dtype:
        raise UserError(
            f"column {column!r} of the {split} set holds numbers such as {labels[0]}, not classes; "
            "to predict numbers give --do_regression true"
        )
    count = kind.num_classes if isinstance(kind, ClassLabel) else sys.maxsize
    if rows := _rows(labels, lambda label: isinstance(label, int) and not 0 <= label < count):
        limit = count - 1 if isinstance(kind, ClassLabel) else "any positive number"
        raise UserError(f"column {column!r} of the {split} set has labels outside 0 to {limit} in rows {rows}")
    return kind.int2str(labels) if isinstance(kind, ClassLabel) else [str(label) for label in labels]


def _numbers(split: str, dataset: Dataset, column: str) -> list[float]:
    labels = _column(dataset, column)
    if rows := _rows(labels, lambda label: not (isinstance(label, (int, float)) and abs(label) < float("inf"))):
        raise UserError(f"column {column!r} of the {split} set must hold finite numbers; rows {rows} do not")
    return [float(label) for label in labels]


def load_examples(arguments: DataArguments, seed: int) -> tuple[DatasetDict, list[str] | None]:
    """Load, check and cut the splits `train`, `validation` and, if asked for, `test`.

    Returns them with the columns `text`, `text_pair` (for pairs) and `label`, and the names of the labels in the order
    of their ids; for regression labels are floats and the names are None. Raises `UserError` for anything amiss.
    """
    splits = _load_splits(arguments)
    for split, dataset in splits.items():
        if len(dataset) == 0:
            raise UserError(f"the {split} set is empty")
    text_columns, label_column = _find_columns(arguments, splits["train"])
    for split, dataset in splits.items():
        for column in [*text_columns, label_column]:
            if column not in dataset.column_names:
                raise UserError(f"the {split} set has no column {column!r}; it has {dataset.column_names}")
        for column in text_columns:
            if dataset.features[column] not in TEXT_TYPES:
                raise UserError(f"column {column!r} of the {split} set holds {dataset.features[column]}, not text")
            if rows := _rows(_column(dataset, column), lambda text: text is None):
                raise UserError(f"column {column!r} of the {split} set has no text in rows {rows}")

    kind = splits["train"].features[label_column]
    is_float = isinstance(kind, Value) and "float" in kind.dtype
    label_names = None
    if is_float if arguments.do_regression is None else arguments.do_regression:
        labels = {split: _numbers(split, dataset, label_column) for split, dataset in splits.items()}
    else:
        named = {split: _label_names(split, dataset, label_column) for split, dataset in splits.items()}
        is_integer = isinstance(kind, Value) and "int" in kind.dtype
        label_names = sorted(set(named["train"]), key=int if is_integer else None)
        if isinstance(kind, ClassLabel):
            label_names = kind.names
        if len(label_names) < 2:
            raise UserError(f"the training set has one label only, {label_names[0]!r}: there is nothing to learn")
        for split, names in named.items():
            if unseen := sorted(set(names) - set(named["train"])):
                raise UserError(f"the {split} set has labels {unseen} not seen in training, which has {label_names}")
        ids = {name: index for index, name in enumerate(label_names)}
        labels = {split: [ids[name] for name in names] for split, names in named.items()}

    renamed = dict(zip(text_columns, ["text", "text_pair"]))
    feature = Value("float32") if label_names is None else Value("int64")
    for split, dataset in splits.items():
        dataset = dataset.select_columns(text_columns).rename_columns(renamed)
        splits[split] = dataset.add_column("label", labels[split], feature=feature)

    if "validation" not in splits:
        held_out = round(len(splits["train"]) * arguments.validation_split_percentage / 100)
        if not 0 < held_out < len(splits["train"]):
            raise UserError(
                f"cannot hold out {arguments.validation_split_percentage} % of {len(splits['train'])} training rows; "
                "change --validation_split_percentage or give a validation set"
            )
        divided = splits["train"].train_test_split(test_size=held_out, seed=seed)
        splits["train"], splits["validation"] = divided["train"], divided["test"]
    for split, dataset in splits.items():
        limit = arguments.max_train_samples if split == "train" else arguments.max_eval_samples
        if limit is not None and limit < len(dataset):
            splits[split] = dataset.shuffle(seed=seed).select(range(limit))
    return splits, label_names


# Files that are written


@contextmanager
def write_aside(path: str | Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; rename it to `path` if all went well, remove it if not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        yield Path(aside)
        # mkstemp makes files for the owner alone; give what open() would have given.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(aside, 0o666 & ~mask)
        os.replace(aside, path)
    finally:
        Path(aside).unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, aside first."""
    with write_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@cache
def commit() -> str:
    """The commit of the code that runs; `-dirty` where files of it differ from that. Known from the first call on."""

    def git(*command: str) -> str:
        try:
            return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "*.sh", "*.json", "*.yaml")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def hardware() -> str:
    """The device and the number of cores, e.g. `Intel(R) Xeon(R) Platinum 8481C, 2 cores`."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    name = platform.processor() or platform.machine()
    if (information := Path("/proc/cpuinfo")).is_file():
        models = [line.split(":")[1].strip() for line in information.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def append_result(path: str | Path, row: Mapping[str, Any], seed: int, argv: Sequence[str] | None = None) -> None:
    """Add one row to a CSV of results; see `append_results`."""
    append_results(path, [row], seed, argv)


def append_results(
    path: str | Path, rows: Iterable[Mapping[str, Any]], seed: int, argv: Sequence[str] | None = None
) -> None:
    """Add rows to a CSV of results, all at once: when, where and how they were made, then the row.

    Columns the file lacks are added to it, earlier rows staying empty there. Several runs may append at once.
    """
    path = Path(path)
    script = Path(sys.argv[0]).name
    made = {
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seed": seed,
        "command": shlex.join([f"scripts/{script}", *(sys.argv[1:] if argv is None else argv)]),
    }
    new = [
        made | {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
        for row in rows
    ]
    # The lock is kept out of the folder of results, where it would be one more file to wonder about.
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    with FileLock(Path(tempfile.gettempdir(), f"hf_linformer_{name}.lock")):
        earlier: list[dict[str, Any]] = []
        columns: list[str] = []
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                earlier = list(reader)
                columns = list(reader.fieldnames or [])
        columns = list(dict.fromkeys([*columns, *(key for row in new for key in row)]))
        with write_aside(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows([*earlier, *new])


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of numbers and words under the names of their columns, aligned."""

    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4f}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    lines = [list(rows[0]), *([text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines)
