"""Labelled examples: texts or pairs of texts with a class, several classes or a number; GLUE and IMDB by name."""

import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from common import TEXT_TYPES, UserError, first_of, load_data_files, one_line, refuse_other_separators
from documents import TEXT_COLUMNS, Document, kind_of, read_documents


@dataclass(frozen=True)
class Task:
    """A task that is known by name: where it is, what its labels are called, and what it is judged by."""

    text_columns: tuple[str, ...]
    # In the order of their ids; None for a number.
    label_names: tuple[str, ...] | None
    # What is reported of it; the mean of these is its score.
    metrics: tuple[str, ...] = ("accuracy",)
    dataset_name: str = "nyu-mll/glue"
    # None: some of the training rows are held out.
    validation_split: str | None = "validation"
    # A second validation set, which chooses nothing.
    other_validation_split: str | None = None
    test_split: str | None = None
    # What GLUE's server takes: the name of a file to the configuration and the split that it answers.
    submissions: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    submits_names: bool = False


ENTAILMENT = ("entailment", "not_entailment")
TASKS = {
    "cola": Task(
        *(("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
        submissions={"CoLA.tsv": ("cola", "test")},
    ),
    "sst2": Task(("sentence",), ("negative", "positive"), submissions={"SST-2.tsv": ("sst2", "test")}),
    "mrpc": Task(
        *(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("accuracy", "f1")),
        submissions={"MRPC.tsv": ("mrpc", "test")},
    ),
    "stsb": Task(
        *(("sentence1", "sentence2"), None, ("pearson", "spearman")), submissions={"STS-B.tsv": ("stsb", "test")}
    ),
    "qqp": Task(
        *(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
        submissions={"QQP.tsv": ("qqp", "test")},
    ),
    "mnli": Task(
        *(("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
        validation_split="validation_matched",
        other_validation_split="validation_mismatched",
        # GLUE's diagnostic sentences are answered by the model of MNLI.
        submissions={
            "MNLI-m.tsv": ("mnli", "test_matched"),
            "MNLI-mm.tsv": ("mnli", "test_mismatched"),
            "AX.tsv": ("ax", "test"),
        },
        submits_names=True,
    ),
    "qnli": Task(
        *(("question", "sentence"), ENTAILMENT), submissions={"QNLI.tsv": ("qnli", "test")}, submits_names=True
    ),
    "rte": Task(
        *(("sentence1", "sentence2"), ENTAILMENT), submissions={"RTE.tsv": ("rte", "test")}, submits_names=True
    ),
    "wnli": Task(
        *(("sentence1", "sentence2"), ("not_entailment", "entailment")), submissions={"WNLI.tsv": ("wnli", "test")}
    ),
    "imdb": Task(
        *(("text",), ("neg", "pos")), dataset_name="stanfordnlp/imdb", validation_split=None, test_split="test"
    ),
}


@dataclass
class DataArguments:
    """Where the texts and their labels come from."""

    task_name: str | None = field(
        default=None,
        metadata={
            "help": "A task of GLUE or imdb, with its data set on the Hub, columns, labels and metrics; "
            "--dataset_name or --train_file take its data from elsewhere.",
            "choices": list(TASKS),
        },
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "A data set on the Hub, or a local folder that `load_dataset` understands."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration, e.g. sst2 of glue."})
    train_split_name: str = field(default="train", metadata={"help": "The split of --dataset_name to train on."})
    validation_split_name: str | None = field(
        default=None, metadata={"help": "Its split to choose the model by. Default: validation, if there is one."}
    )
    test_split_name: str | None = field(
        default=None, metadata={"help": "Its split to judge the chosen model on, once, at the end."}
    )
    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Instead of --dataset_name: csv, tsv, json, jsonl or parquet, also with .gz, several if need be; "
            "or a folder that has a folder of .txt files for each class, whose name is the label."
        },
    )
    validation_file: list[str] | None = field(default=None, metadata={"help": "The same for validation."})
    test_file: list[str] | None = field(default=None, metadata={"help": "The same for the test at the end."})
    text_column: list[str] | None = field(
        default=None,
        metadata={"help": "One column, or two for pairs. Default: usual names, of pairs too, or the only text."},
    )
    label_column: str | None = field(default=None, metadata={"help": "Default: label, or labels."})
    label_separator: str | None = field(
        default=None,
        metadata={"help": "A text may have several labels, or none, and this stands between them, e.g. ';'."},
    )
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
class LabelledArguments:
    """Where the texts are that a model is judged on."""

    task_name: str | None = field(
        default=None,
        metadata={"help": "A task of scripts/finetune.py, with its columns and labels.", "choices": list(TASKS)},
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "A data set on the Hub, or a local folder that `load_dataset` understands."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration, e.g. sst2 of glue."})
    dataset_split: str | None = field(
        default=None, metadata={"help": "Its split. Default: test, or the one that a task is judged on."}
    )
    test_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Instead: csv, tsv, json, jsonl or parquet, also with .gz, several if need be; or a folder that "
            "has a folder of .txt files for each class."
        },
    )
    text_column: list[str] | None = field(
        default=None,
        metadata={"help": "One column, or two for pairs. Default: usual names, of pairs too, or the only text."},
    )
    label_column: str | None = field(default=None, metadata={"help": "Default: label, or labels."})
    label_separator: str | None = field(
        default=None, metadata={"help": "What stands between the labels of a text with several, e.g. ';'."}
    )
    id_column: str | None = field(
        default=None, metadata={"help": "A column that names the rows; of folders, `file` does."}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "So many rows, drawn by the seed."})


def with_task(arguments: DataArguments) -> tuple[DataArguments, Task | None]:
    """The arguments with what --task_name stands for, where they do not say otherwise; and the task."""
    if arguments.task_name is None:
        return arguments, None
    if arguments.task_name not in TASKS:
        raise UserError(f"--task_name {arguments.task_name} is not known; the tasks are {', '.join(TASKS)}")
    task = TASKS[arguments.task_name]
    changes: dict[str, Any] = {}
    if arguments.train_file is None:
        changes["test_split_name"] = arguments.test_split_name or task.test_split
        if arguments.validation_file is None:
            changes["validation_split_name"] = arguments.validation_split_name or task.validation_split
        if arguments.dataset_name is None:
            changes["dataset_name"] = task.dataset_name
            config_name = arguments.task_name if task.submissions else None
            changes["dataset_config_name"] = arguments.dataset_config_name or config_name
    changes["text_column"] = arguments.text_column or list(task.text_columns)
    changes["label_column"] = arguments.label_column or "label"
    changes["do_regression"] = task.label_names is None
    return replace(arguments, **changes), task


# Loading


def load_named(name: str, config_name: str | None) -> DatasetDict:
    """All splits of a data set on the Hub, of a folder, or of what `save_to_disk` wrote."""
    try:
        if Path(name, "dataset_dict.json").is_file():
            return load_from_disk(name)
        return load_dataset(name, config_name)
    except (DatasetGenerationError, ValueError, OSError) as error:
        raise UserError(f"cannot load the data set {name}: {one_line(error)}") from error


def _load_folder(folder: Path) -> Dataset:
    """The .txt files of a folder's folders: `text`, `label`, which is the name of the folder, and `file`, a name too.

    Warns of files beside them. Raises `UserError` where there are none and for one that cannot be read.
    """
    found: dict[str, Path | None] = {}
    others = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.is_dir() or any(part.startswith(".") for part in inside.parts):
            continue
        if len(inside.parts) > 1 and kind_of(path) == ".txt":
            found[str(inside)] = path
        else:
            others.append(str(inside))
    if not found:
        raise UserError(f"{folder} holds no folder of .txt files for each class, such as {folder}/CLASS/FILE.txt")
    if others:
        print(
            f"warning: files of {folder} that are no .txt in a folder of a class are left out: {first_of(others)}",
            file=sys.stderr,
        )

    documents: list[Document] = list(read_documents(found, {}))
    # Empty texts are counted with those of every other kind of file.
    if broken := [document for document in documents if document.error not in ("", "empty")]:
        reasons = first_of([f"{document.id}: {document.error}" for document in broken], most=3, separator="; ")
        raise UserError(f"cannot read {len(broken)} of {len(documents)} files of {folder}: {reasons}")
    return Dataset.from_dict(
        {
            "text": [document.text for document in documents],
            "label": [Path(name).parts[0] for name in found],
            "file": list(found),
        }
    )


def load_labelled_files(files: Mapping[str, Sequence[str]]) -> DatasetDict:
    """As `load_data_files`, also of folders that have a folder for each class."""
    splits = DatasetDict()
    for split, paths in files.items():
        folders = [Path(path) for path in paths if Path(path).is_dir()]
        if 0 < len(folders) < len(paths):
            raise UserError(f"the {split} files {list(paths)} must all be folders, or none of them")
        if folders:
            splits[split] = datasets.concatenate_datasets([_load_folder(folder) for folder in folders])
        else:
            splits |= load_data_files({split: paths})
    return splits


def _load_splits(arguments: DataArguments, task: Task | None) -> DatasetDict:
    names = {
        "train": arguments.train_split_name,
        "validation": arguments.validation_split_name or "validation",
        "validation_mismatched": task.other_validation_split if task else None,
        "test": arguments.test_split_name,
    }
    files = {split: getattr(arguments, f"{split}_file") for split in ("train", "validation", "test")}
    if arguments.dataset_name is None:
        if files["train"] is None:
            raise UserError("no training data: give --task_name, --dataset_name or --train_file")
        return load_labelled_files({split: paths for split, paths in files.items() if paths})
    available = load_named(arguments.dataset_name, arguments.dataset_config_name)
    asked = ["train", "test"] + ["validation"] * bool(arguments.validation_split_name)
    for split in asked:
        if names[split] and names[split] not in available:
            raise UserError(f"{arguments.dataset_name} has no split {names[split]!r}; it has {sorted(available)}")
    splits = DatasetDict({split: available[name] for split, name in names.items() if name in available})
    del files["train"]
    return DatasetDict(splits | load_labelled_files({split: paths for split, paths in files.items() if paths}))


def _find_columns(arguments: DataArguments | LabelledArguments, dataset: Dataset) -> tuple[list[str], str]:
    columns = dataset.column_names
    refuse_other_separators(columns, "the data")
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


def _column(dataset: Dataset, name: str) -> list[Any]:
    return dataset.with_format("arrow")[:][name].to_pylist()


def _rows(values: Sequence[Any], wrong: Callable[[Any], bool]) -> str:
    """The numbers, from 1, of the rows whose value is wrong, the first ten of them; empty if there are none."""
    return first_of([str(row) for row, value in enumerate(values, start=1) if wrong(value)])


def _checked(
    where: str, dataset: Dataset, text_columns: Sequence[str], label_column: str | None, separator: str | None = None
) -> Dataset:
    """The set if it has rows, the columns, and a text in each row; with `separator`, its labels as lists."""
    if len(dataset) == 0:
        raise UserError(f"the {where} set is empty")
    for column in [*text_columns, *([label_column] if label_column else [])]:
        if column not in dataset.column_names:
            raise UserError(f"the {where} set has no column {column!r}; it has {dataset.column_names}")
    for column in text_columns:
        if dataset.features[column] not in TEXT_TYPES:
            raise UserError(f"column {column!r} of the {where} set holds {dataset.features[column]}, not text")
        if rows := _rows(_column(dataset, column), lambda text: text is None):
            raise UserError(f"column {column!r} of the {where} set has no text in rows {rows}")
    if label_column is None or separator is None:
        return dataset
    return _split_labels(where, dataset, label_column, separator)


# Labels


def is_multi_label(splits: DatasetDict) -> bool:
    """Whether examples as `load_examples` gives them have lists of labels."""
    return not isinstance(splits["train"].features["label"], Value)


def _split_labels(split: str, dataset: Dataset, column: str, separator: str) -> Dataset:
    """A column of texts such as `tax;rent` as a column of lists."""
    if dataset.features[column] not in TEXT_TYPES:
        raise UserError(
            f"--label_separator {separator!r} divides texts, and column {column!r} of the {split} set holds "
            f"{dataset.features[column]}"
        )
    divided = [
        None if text is None else [name.strip() for name in text.split(separator) if name.strip()]
        for text in _column(dataset, column)
    ]
    dataset = dataset.remove_columns(column)
    return dataset.add_column(column, divided, feature=datasets.List(Value("string")))


def _is_blank(label: Any) -> bool:
    """Whether a cell holds nothing: an empty one of a csv file is a text without a letter."""
    return label is None or isinstance(label, str) and not label.strip()


def _number(label: Any) -> float:
    """The number that a label is, or that its text says; NaN for any other."""
    try:
        return math.nan if isinstance(label, str) and "_" in label else float(label)
    except (TypeError, ValueError):
        return math.nan


def _are_numbers(labels: Sequence[Any]) -> bool:
    """Whether labels are texts that all say a number; blanks and NaN are the ones that are missing."""
    texts = {label.strip().casefold() for label in labels if isinstance(label, str) and not _is_blank(label)} - {"nan"}
    return bool(texts) and all(math.isfinite(_number(text)) for text in texts)


def _label_names(split: str, dataset: Dataset, column: str, task_names: Sequence[str] | None) -> list[list[str]]:
    """The names of each row's labels: the task's or the data's own where there are any, else the values as text."""
    kind, labels = dataset.features[column], _column(dataset, column)
    if isinstance(kind, datasets.List):
        kind = kind.feature
    else:
        if _are_numbers(labels):
            labels = [label if math.isfinite(_number(label)) else None for label in labels]
        labels = [[label] for label in labels]
    if rows := _rows(labels, lambda row: row is None or any(map(_is_blank, row))):
        raise UserError(f"column {column!r} of the {split} set has no label in rows {rows}")
    if isinstance(kind, Value) and "float" in kind.dtype:
        example = next((label for row in labels for label in row), 0.0)
        raise UserError(
            f"column {column!r} of the {split} set holds numbers such as {example}, not classes; "
            "to predict numbers give --do_regression true"
        )
    known = list(task_names or (kind.names if isinstance(kind, ClassLabel) else []))
    count = len(known) if known else sys.maxsize
    if rows := _rows(labels, lambda row: any(isinstance(label, int) and not 0 <= label < count for label in row)):
        limit = count - 1 if known else "any positive number"
        raise UserError(f"column {column!r} of the {split} set has labels outside 0 to {limit} in rows {rows}")
    return [[known[label] if known and isinstance(label, int) else str(label) for label in row] for row in labels]


def _numbers(split: str, dataset: Dataset, column: str) -> list[float]:
    numbers = [_number(label) for label in _column(dataset, column)]
    if rows := _rows(numbers, lambda number: not math.isfinite(number)):
        raise UserError(f"column {column!r} of the {split} set must hold finite numbers; rows {rows} do not")
    return numbers


def _refuse_numbers_as_text(dataset: Dataset, column: str) -> None:
    """A cell without a number makes texts of a column of them, and every number would be a class."""
    labels = _column(dataset, column)
    numbers = [label.strip() for label in labels if isinstance(label, str) and math.isfinite(_number(label))]
    if not _are_numbers(labels) or all(re.fullmatch(r"[+-]?\d+", number) for number in numbers):
        return
    rows = _rows(labels, lambda label: not math.isfinite(_number(label)))
    raise UserError(
        f"column {column!r} of the train set holds numbers such as {numbers[0]}, written as text"
        + (f", and none in rows {rows}: mend these" if rows else "")
        + "; to predict numbers give --do_regression true, to take each for a class --do_regression false"
    )


def _label_ids(
    splits: DatasetDict, column: str, task_name: str | None, do_regression: bool | None
) -> tuple[dict[str, list[Any]], Any, list[str] | None]:
    """The labels of each split as ids, lists of ids or numbers, their feature, and the names of the ids.

    The names are the task's or the data's own in their order, else those of the training set, sorted.
    """
    kind = splits["train"].features[column]
    several = isinstance(kind, datasets.List)
    is_float = isinstance(kind, Value) and "float" in kind.dtype
    if is_float if do_regression is None else do_regression:
        return {split: _numbers(split, dataset, column) for split, dataset in splits.items()}, Value("float32"), None
    if do_regression is None and not several:
        _refuse_numbers_as_text(splits["train"], column)

    task_names = TASKS[task_name].label_names if task_name else None
    named = {split: _label_names(split, dataset, column, task_names) for split, dataset in splits.items()}
    seen = {split: {name for row in names for name in row} for split, names in named.items()}
    kind = kind.feature if several else kind
    is_integer = isinstance(kind, Value) and "int" in kind.dtype
    if task_names or isinstance(kind, ClassLabel):
        names = list(task_names or kind.names)
    else:
        names = sorted(seen["train"], key=int) if is_integer else sorted(seen["train"])
    if len(names) < (1 if several else 2):
        found_labels = f"one label only, {names[0]!r}" if names else "no label"
        raise UserError(f"the training set has {found_labels}: there is nothing to learn")
    for split, found in seen.items():
        if task_names and (unknown := sorted(found - set(names))):
            raise UserError(f"the {split} set has labels {unknown}; those of {task_name} are {names}")
        if unseen := sorted(found - seen["train"]):
            raise UserError(f"the {split} set has labels {unseen} not seen in training, which has {names}")
    ids = {name: index for index, name in enumerate(names)}
    labels = {
        split: [[ids[name] for name in row] if several else ids[row[0]] for row in rows]
        for split, rows in named.items()
    }
    return labels, datasets.List(Value("int64")) if several else Value("int64"), names


def count_empty(dataset: Dataset) -> int:
    """How many examples have nothing in their text, or in either text of a pair."""
    columns = [dataset[name] for name in ("text", "text_pair") if name in dataset.column_names]
    return sum(not any(text.strip() for text in texts) for texts in zip(*columns))


def describe_classes(labels: Iterable[Any], label_names: Sequence[str]) -> tuple[str, list[str]]:
    """How many rows each class has, as a line, and what is odd about the classes.

    labels: of each row an id, or a list of ids
    """
    counts = Counter(dict.fromkeys(range(len(label_names)), 0))
    for label in labels:
        counts.update(label if isinstance(label, list) else [label])
    shown, others = counts.most_common(20), len(counts) - 20
    line = ", ".join(f"{label_names[label]} {count:,}" for label, count in shown)
    line += f" and {others} more classes" if others > 0 else ""
    odd = []
    if few := [label_names[label] for label, count in counts.items() if count < 2]:
        odd.append(f"there are fewer than 2 training rows of {first_of(list(map(repr, few)))}")
    alike: dict[str, list[str]] = {}
    for name in label_names:
        alike.setdefault(" ".join(name.casefold().split()), []).append(name)
    for names in alike.values():
        if len(names) > 1:
            odd.append(f"{' and '.join(map(repr, names))} differ in spaces and capitals alone, and are classes each")
    return line, odd


def _with_labels(dataset: Dataset, text_columns: Sequence[str], labels: list[Any], feature: Any) -> Dataset:
    """The columns `text`, `text_pair` (for pairs) and `label`."""
    renamed = dict(zip(text_columns, ["text", "text_pair"]))
    return dataset.select_columns(text_columns).rename_columns(renamed).add_column("label", labels, feature=feature)


def _hold_out(examples: Dataset, rows: int, is_classes: bool, seed: int) -> tuple[Dataset, Dataset]:
    """The examples without so many rows, and these.

    Each class gives its share; one of a single row gives none, so that it can be learned. Any rows are drawn where
    there are more classes than rows to hold out, and of several labels and numbers.
    """
    labels = examples["label"][:] if is_classes else []
    counts = Counter(labels)
    single = [row for row, label in enumerate(labels) if counts[label] == 1]
    several = [row for row, label in enumerate(labels) if counts[label] > 1]
    classes = len(counts) - len(single)
    if classes == 0 or min(rows, len(several) - rows) < classes:
        divided = examples.train_test_split(test_size=rows, seed=seed)
        return divided["train"], divided["test"]
    # `datasets` divides by a ClassLabel alone; the rows are divided by number, so that no text is copied.
    features = datasets.Features({"row": Value("int64"), "label": ClassLabel(num_classes=max(counts) + 1)})
    numbered = Dataset.from_dict({"row": several, "label": [labels[row] for row in several]}, features)
    divided = numbered.train_test_split(test_size=rows, seed=seed, stratify_by_column="label")
    return examples.select([*divided["train"]["row"], *single]), examples.select(divided["test"]["row"])


def load_examples(arguments: DataArguments, seed: int) -> tuple[DatasetDict, list[str] | None]:
    """Load, check and cut the splits `train`, `validation` and, if asked for, `test`; of MNLI `validation_mismatched`.

    Returns them with the columns `text`, `text_pair` (for pairs) and `label`, and the names of the labels in the order
    of their ids; for regression labels are floats and the names are None, and where a text may have several labels
    they are lists of ids (`is_multi_label`). Raises `UserError` for anything amiss.
    """
    arguments, task = with_task(arguments)
    splits = _load_splits(arguments, task)
    if len(splits["train"]) == 0:
        raise UserError("the train set is empty")
    text_columns, label_column = _find_columns(arguments, splits["train"])
    for split, dataset in splits.items():
        splits[split] = _checked(split, dataset, text_columns, label_column, arguments.label_separator)
    labels, feature, label_names = _label_ids(splits, label_column, arguments.task_name, arguments.do_regression)
    for split, dataset in splits.items():
        splits[split] = _with_labels(dataset, text_columns, labels[split], feature)

    if "validation" not in splits:
        held_out = round(len(splits["train"]) * arguments.validation_split_percentage / 100)
        if not 0 < held_out < len(splits["train"]):
            raise UserError(
                f"cannot hold out {arguments.validation_split_percentage} % of {len(splits['train'])} training rows; "
                "change --validation_split_percentage or give a validation set"
            )
        is_classes = label_names is not None and not is_multi_label(splits)
        splits["train"], splits["validation"] = _hold_out(splits["train"], held_out, is_classes, seed)
    for split, dataset in splits.items():
        limit = arguments.max_train_samples if split == "train" else arguments.max_eval_samples
        if limit is not None and limit < len(dataset):
            splits[split] = dataset.shuffle(seed=seed).select(range(limit))
    return splits, label_names


def _load_labelled_set(arguments: LabelledArguments, task: Task | None) -> tuple[Dataset, str]:
    """The rows to judge on, as they come, and what to call them."""
    if arguments.test_file:
        return load_labelled_files({"test": arguments.test_file})["test"], ", ".join(arguments.test_file)
    name = arguments.dataset_name or (task.dataset_name if task else None)
    if name is None:
        raise UserError("nothing to judge on: give --task_name, --dataset_name or --test_file")
    config_name = arguments.dataset_config_name
    if task and task.submissions and arguments.dataset_name is None:
        config_name = config_name or arguments.task_name
    split = arguments.dataset_split or (task and (task.test_split or task.validation_split)) or "test"
    available = load_named(name, config_name)
    if split not in available:
        raise UserError(f"{name} has no split {split!r}; it has {sorted(available)}: name one with --dataset_split")
    return available[split], split


def load_labelled(arguments: LabelledArguments, names: Sequence[str] | None, several: bool, seed: int) -> Dataset:
    """One set of texts with the labels that a model knows: the columns `text`, `text_pair` (for pairs) and `label`.

    Beside them `row`, the number of each in the data, from 1, and, with --id_column, `id`.
    names: the model's labels in the order of their ids, None for numbers
    several: whether the model gives a text several labels
    Labels are ids, lists of them, or numbers. Raises `UserError` for anything amiss.
    """
    task = TASKS[arguments.task_name] if arguments.task_name else None
    dataset, where = _load_labelled_set(arguments, task)
    if task:
        columns = arguments.text_column or list(task.text_columns)
        arguments = replace(arguments, text_column=columns, label_column=arguments.label_column or "label")
    text_columns, column = _find_columns(arguments, dataset)
    if arguments.id_column and arguments.id_column not in dataset.column_names:
        raise UserError(f"the {where} set has no column {arguments.id_column!r}; it has {dataset.column_names}")
    dataset = _checked(where, dataset, text_columns, column, arguments.label_separator)
    if isinstance(dataset.features[column], datasets.List) != several:
        raise UserError(
            f"column {column!r} holds {dataset.features[column]}, and the model gives a text "
            f"{'several labels: lists, or --label_separator' if several else 'one label'}"
        )
    if names is None:
        labels: list[Any] = _numbers(where, dataset, column)
    else:
        rows = _label_names(where, dataset, column, task.label_names if task else None)
        numbers = {name: index for index, name in enumerate(names)}
        if all(re.fullmatch(r"LABEL_\d+", name) for name in names):
            # Names that nobody gave: labels are numbered.
            numbers |= {str(index): index for index in range(len(names))}
        if unknown := sorted({name for row in rows for name in row} - numbers.keys()):
            raise UserError(f"the {where} set has labels {unknown}, and the model knows {list(names)}")
        labels = [[numbers[name] for name in row] if several else numbers[row[0]] for row in rows]
    feature = Value("float32") if names is None else Value("int64")
    ids = _column(dataset, arguments.id_column) if arguments.id_column else None
    dataset = _with_labels(dataset, text_columns, labels, datasets.List(feature) if several else feature)
    dataset = dataset.add_column("row", list(range(1, len(dataset) + 1)), feature=Value("int64"))
    if ids is not None:
        dataset = dataset.add_column(
            "id", ["" if name is None else str(name) for name in ids], feature=Value("string")
        )
    if arguments.max_eval_samples is not None and arguments.max_eval_samples < len(dataset):
        dataset = dataset.shuffle(seed=seed).select(range(arguments.max_eval_samples))
    return dataset


def load_unlabelled(arguments: DataArguments) -> dict[str, Dataset]:
    """What GLUE's server wants answers for: the name of the file of each to `text` and `text_pair`, in order.

    Raises `UserError` for a task without such sets and for data that have no name.
    """
    arguments, task = with_task(arguments)
    if task is None or not task.submissions:
        known = [name for name, known_task in TASKS.items() if known_task.submissions]
        raise UserError(f"--do_predict answers the test sets of --task_name {', '.join(known)}; predict.py any texts")
    if arguments.dataset_name is None:
        raise UserError("--do_predict takes the test set of --dataset_name, and --train_file has none")
    found = {}
    for file, (config_name, split) in task.submissions.items():
        is_hub = arguments.dataset_name == task.dataset_name
        if config_name != arguments.task_name and not is_hub:
            continue
        available = load_named(arguments.dataset_name, config_name if is_hub else arguments.dataset_config_name)
        if split not in available:
            raise UserError(f"{arguments.dataset_name} has no split {split!r} for {file}; it has {sorted(available)}")
        columns = list(arguments.text_column or task.text_columns)
        _checked(split, available[split], columns, None)
        renamed = dict(zip(columns, ["text", "text_pair"]))
        found[file] = available[split].select_columns(columns).rename_columns(renamed)
    return found
