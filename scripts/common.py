"""What the scripts share: arguments from options or a file, errors a user can mend, plain texts, result rows."""

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
from datasets import Dataset, DatasetDict, Value, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetsError
from filelock import FileLock
from transformers import HfArgumentParser, PreTrainedModel


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


class UserError(Exception):
    """Something the user can mend; its message is the one line that is shown, and the exit code is 2."""


def run_main(main: Callable[[], None], resume: str = "") -> NoReturn:
    """Run a script's `main` and exit: 0 done, 1 with a traceback, 2 with one line for a `UserError` or a full disk.

    Ctrl-C gives one line and 130. resume: the option by which the script goes on after that, if it has one
    """
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted" + (f"; {resume} goes on" if resume else ""), file=sys.stderr)
        sys.exit(130)
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


def first_of(names: Sequence[str], most: int = 10, separator: str = ", ") -> str:
    """The names on one line; of many the first, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def no_such_folder(name: str) -> str:
    """How the message begins about a model that could not be loaded and was meant to be a local one; else nothing.

    A name such as `a/b` is looked for on the Hub where there is no such folder.
    """
    is_local = name.startswith(("./", "../", "/", "output/")) or "/" in name and Path(name).parent.is_dir()
    return f"there is no folder {name}, nor a file; " if is_local and not Path(name).exists() else ""


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
        if folders := [path for path in paths if Path(path).is_dir()]:
            raise UserError(f"the {split} file {folders[0]} is a folder: name files in it, such as {folders[0]}/*.txt")
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


TEXT_TYPES = (Value("string"), Value("large_string"))


def refuse_other_separators(columns: Sequence[str], name: str) -> None:
    """Raises `UserError` for a table whose only column has separators in its name: all of a row would be one text."""
    found = {";": "semicolons", "\t": "tabs", "|": "bars"}
    if len(columns) == 1 and (separators := [word for sign, word in found.items() if sign in str(columns[0])]):
        raise UserError(
            f"{name} has one column, {columns[0]!r}: its values seem to stand between {separators[0]}; save it with "
            "commas (.csv) or tabs (.tsv)"
        )


def only_texts(dataset: Dataset, text_column: str, name: str) -> Dataset:
    """The column of the text alone, or a `UserError` that says what `name` holds in its place."""
    refuse_other_separators(dataset.column_names or [], name)
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


def longest_input(model: PreTrainedModel) -> int | None:
    """The most tokens that a model can take, None if it sets no limit."""
    limit = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from pad_token_id + 1.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limit = module.num_embeddings - module.padding_idx - 1
    return limit


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
