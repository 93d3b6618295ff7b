"""Judge a saved classifier, or a regression, on labelled texts: metrics and how sure they are, where it errs, and how.

    python scripts/eval_classifier.py --model_name_or_path demo --test_file data/sotu/dev.parquet \\
        --label_column label_text --output_dir output/judged
    python scripts/eval_classifier.py --model_name_or_path output/mrpc --task_name mrpc --output_dir output/judged
    python scripts/eval_classifier.py ... --compare_with output/twin_judged/predictions.csv

Writes to --output_dir: metrics.json; predictions.csv, a row for each text in the order of the data, with its number
there, from 1, and with --id_column its name; for classes confusion_matrix.png, accuracy_by_length.png and
calibration.png, for numbers predictions.png.

Intervals are percentiles of the metric over rows drawn again with replacement (the bootstrap). --compare_with takes
the predictions of another model for the same rows and draws the same rows for both: the interval of the difference is
then far narrower than that of either. The calibration error is the mean, over rows, of the distance between confidence
and accuracy in 15 bins of confidence; Brier's score is the squared distance between probabilities and the truth.
"""

import csv
import hashlib
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset, DatasetDict
from scipy.stats import binomtest
from sklearn.metrics import ConfusionMatrixDisplay
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from common import (
    UserError,
    append_result,
    format_table,
    one_line,
    parse_arguments,
    run_main,
    write_aside,
    write_json,
)
from examples import LabelledArguments, count_empty, load_labelled
from figures import pyplot, save_figure
from finetune import longest_first, outputs_of, predictions_of, tokenize
from long_texts import tokenize as tokens_of
from metrics import ComputeMetrics, choose_metrics
from predict import Classifier, classify, load_classifier


@dataclass
class Arguments:
    """Which model, how it is judged, and what is written."""

    model_name_or_path: str = field(
        metadata={"help": "Any classifier: a Hub name or a folder. Only safetensors are read."}
    )
    output_dir: str = field(metadata={"help": "Where metrics, predictions and pictures go."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace the ones that are there."})
    windows: bool = field(
        default=False,
        metadata={"help": "Read all of a long text, in even parts, as scripts/predict.py does with --windows."},
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Tokens of one pass, special ones included. Default: all that the model reads."},
    )
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Rows of one forward pass."})
    dtype: str = field(
        default="float32", metadata={"help": "Of the weights and of the work.", "choices": ["float32", "bfloat16"]}
    )
    confidence: float = field(default=0.95, metadata={"help": "How often an interval holds the true value."})
    bootstrap_resamples: int = field(default=1000, metadata={"help": "How often rows are drawn for the intervals."})
    compare_with: str | None = field(
        default=None, metadata={"help": "predictions.csv of another model, for the same texts in the same order."}
    )
    seed: int = field(default=42, metadata={"help": "Of drawn rows."})
    run_name: str = field(default="eval", metadata={"help": "The run's name in --results_file."})
    results_file: str | None = field(default=None, metadata={"help": "Add the results to this CSV."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run modelling code that comes with the model. A Linformer needs none."}
    )


OUTPUTS = ["metrics.json", "predictions.csv", "predictions.png", "confusion_matrix.png", "accuracy_by_length.png"]
OUTPUTS += ["calibration.png"]


def resampled(
    compute_metrics: ComputeMetrics, predictions: Sequence[np.ndarray], labels: np.ndarray, times: int, seed: int
) -> list[dict[str, np.ndarray]]:
    """The metrics of each model's predictions on rows drawn `times` times with replacement, the same rows for all."""
    generator = np.random.default_rng(seed)
    values: list[dict[str, list[float]]] = [{} for _ in predictions]
    for _ in tqdm(range(times), desc="Drawing rows", leave=False):
        rows = generator.integers(0, len(labels), len(labels))
        for collected, predicted in zip(values, predictions):
            for name, value in compute_metrics(predicted[rows], labels[rows]).items():
                collected.setdefault(name, []).append(value)
    return [{name: np.array(drawn) for name, drawn in collected.items()} for collected in values]


def interval(drawn: np.ndarray, confidence: float) -> tuple[float, float]:
    """The percentiles between which `confidence` of the drawn values lie."""
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def calibration(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> dict[str, Any]:
    """How far confidence is to be believed.

    probabilities: (rows, classes); labels: (rows,)
    Returns the expected calibration error over equal bins of confidence, Brier's score, and of each bin that is not
    empty its mean confidence, accuracy and number of rows.
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    places = np.minimum((confidence * bins).astype(int), bins - 1)
    table = [
        {"confidence": confidence[chosen].mean(), "accuracy": right[chosen].mean(), "rows": int(chosen.sum())}
        for chosen in (places == place for place in range(bins))
        if chosen.any()
    ]
    error = sum(row["rows"] * abs(row["accuracy"] - row["confidence"]) for row in table) / len(labels)
    truth = np.eye(probabilities.shape[1])[labels]
    brier = float(((probabilities - truth) ** 2).sum(axis=1).mean())
    bins_table = [{name: float(value) for name, value in row.items()} for row in table]
    return {"expected_calibration_error": float(error), "brier_score": brier, "bins": bins_table}


def by_length(right: np.ndarray, lengths: np.ndarray, max_length: int, confidence: float) -> list[dict[str, Any]]:
    """Accuracy of texts of up to 64 tokens, 65 to 128, ..., before they are cut; intervals by Wilson."""
    table = []
    lower, upper = 0, 64
    while lower < lengths.max():
        chosen = (lengths > lower) & (lengths <= upper)
        if chosen.any():
            count, hits = int(chosen.sum()), int(right[chosen].sum())
            wilson = binomtest(hits, count).proportion_ci(confidence, method="wilson")
            cut = float((lengths[chosen] > max_length).mean())
            row = {"tokens": f"{lower + 1:,} to {upper:,}", "rows": count, "cut": cut, "accuracy": hits / count}
            table.append(row | {"low": float(wilson.low), "high": float(wilson.high)})
        lower, upper = upper, 2 * upper
    return table


# What is read and written


def lengths_of(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Tokens of each text, or pair, before it is cut, in memory that does not grow with them: (rows,)"""
    columns = [name for name in ("text", "text_pair") if name in rows.column_names]
    special = tokenizer.num_special_tokens_to_add(pair=len(columns) == 2)
    lengths: list[int] = []
    batches = math.ceil(len(rows) / 100)
    for batch in tqdm(rows.iter(batch_size=100), desc="Counting tokens", total=batches, leave=False):
        counts = [[len(tokens) for tokens in tokens_of(batch[name], tokenizer)] for name in columns]
        lengths += [special + sum(of_row) for of_row in zip(*counts)]
    return np.array(lengths)


def fingerprint(*texts: str) -> str:
    """By which two models' rows are known to be of the same text."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def write_predictions(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with write_aside(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_predictions(path: Path, labels: Sequence[str], fingerprints: Sequence[str]) -> list[str]:
    """Another model's predictions. Raises `UserError` where they are of other texts, or judged by other labels."""
    if not path.is_file():
        raise UserError(f"--compare_with {path} does not exist; scripts/eval_classifier.py writes predictions.csv")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read --compare_with {path}: {one_line(error)}") from error
    if not rows or not {"label", "prediction", "fingerprint"} <= rows[0].keys():
        raise UserError(f"--compare_with {path} has no rows with the columns label, prediction and fingerprint")
    for name, here in (("label", labels), ("fingerprint", fingerprints)):
        there = [row[name] for row in rows]
        if there != list(here):
            different = sum(one != other for one, other in zip(there, here))
            raise UserError(
                f"--compare_with {path} has {len(rows)} rows, of which {different} have another {name} than the "
                f"{len(here)} judged here: both models must be judged on the same rows in the same order"
            )
    return [row["prediction"] for row in rows]


def draw_confusion(predictions: np.ndarray, labels: np.ndarray, names: Sequence[str], path: Path) -> None:
    """A row for each true class; the share of it in colour, the number of texts in words."""
    # Beyond some thirty classes numbers and names would not be read, and a picture has its limits.
    is_readable = len(names) <= 30
    size = max(4.5, 0.5 * min(len(names), 30) + 2)
    figure, axis = pyplot.subplots(figsize=(size, size))
    among = range(len(names))
    # Between two dollar signs matplotlib would read formulas.
    shown = [name.replace("$", r"\$") for name in names] if is_readable else None
    options: dict[str, Any] = {"labels": among, "display_labels": shown, "ax": axis, "xticks_rotation": 90}
    display = ConfusionMatrixDisplay.from_predictions(
        labels, predictions, normalize="true", cmap="Blues", include_values=False, colorbar=False, **options
    )
    if not is_readable:
        axis.set(xticks=[], yticks=[])
    for true in among if is_readable else []:
        for predicted in among:
            count = int(((labels == true) & (predictions == predicted)).sum())
            is_dark = display.confusion_matrix[true, predicted] > 0.5
            axis.text(predicted, true, f"{count:,}", ha="center", va="center", color="white" if is_dark else "black")
    save_figure(figure, path)


def draw_lengths(table: Sequence[dict[str, Any]], path: Path) -> None:
    figure, axis = pyplot.subplots(figsize=(6.5, 4))
    accuracy = np.array([row["accuracy"] for row in table])
    errors = np.abs(np.array([[row["low"] for row in table], [row["high"] for row in table]]) - accuracy)
    axis.errorbar(range(len(table)), accuracy, yerr=errors, fmt="o", capsize=3)
    axis.set_xticks(range(len(table)), [f"{row['tokens']}\n{row['rows']:,} texts" for row in table])
    axis.set(xlabel="tokens before the cut", ylabel="accuracy")
    axis.grid(True, axis="y", alpha=0.3)
    save_figure(figure, path)


def draw_calibration(measured: dict[str, Any], path: Path) -> None:
    figure, axis = pyplot.subplots(figsize=(4.5, 4.5))
    axis.plot([0, 1], [0, 1], color="black", linestyle="--", label="to be believed")
    bins = measured["bins"]
    axis.plot([row["confidence"] for row in bins], [row["accuracy"] for row in bins], marker="o", label="the model")
    axis.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    axis.set_title(f"expected calibration error {measured['expected_calibration_error']:.3f}")
    axis.legend()
    save_figure(figure, path)


def draw_numbers(predictions: np.ndarray, labels: np.ndarray, path: Path) -> None:
    figure, axis = pyplot.subplots(figsize=(4.5, 4.5))
    axis.scatter(labels, predictions, s=8, alpha=0.5)
    axis.axline((float(labels.mean()), float(labels.mean())), slope=1, color="black", linestyle="--")
    axis.set(xlabel="true value", ylabel="prediction")
    save_figure(figure, path)


def as_text(value: Any, names: Sequence[str] | None) -> str:
    """A class by its name, several by theirs, a number as it is."""
    if names is None:
        return f"{value:.6g}"
    if isinstance(value, np.ndarray):
        return "; ".join(names[index] for index in np.flatnonzero(value).tolist())
    return names[int(value)]


def from_text(text: str, names: Sequence[str] | None, several: bool) -> Any:
    """What `as_text` wrote. Raises `UserError` for a name that the model does not know."""
    try:
        if names is None:
            return float(text)
        if several:
            chosen = [list(names).index(name) for name in text.split("; ") if name]
            return np.isin(range(len(names)), chosen).astype(int)
        return list(names).index(text)
    except ValueError as error:
        raise UserError(f"--compare_with has the prediction {text!r}, and the classes are {names}") from error


def check(data_arguments: LabelledArguments, arguments: Arguments) -> None:
    """Refuse numbers that cannot be meant, and a folder whose files would be lost."""
    given = vars(data_arguments) | vars(arguments)
    for name in ("per_device_eval_batch_size", "bootstrap_resamples", "max_length", "max_eval_samples"):
        if given[name] is not None and given[name] < 1:
            raise UserError(f"--{name} must be at least 1, not {given[name]}")
    if not 0 < arguments.confidence < 1:
        raise UserError(f"--confidence must lie between 0 and 1, and is {arguments.confidence}")
    output_dir = Path(arguments.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file; give a folder, which is made if it is not there")
    there = [name for name in OUTPUTS if (output_dir / name).exists()]
    if there and not arguments.overwrite_output_dir:
        raise UserError(
            f"{output_dir} holds {', '.join(there)} already; choose another folder or give --overwrite_output_dir"
        )


def answer_in_windows(examples: Dataset, classifier: Classifier, batch_size: int) -> tuple[torch.Tensor, np.ndarray]:
    """As `answer`, of the means over all parts of each text: logits whose probabilities these are."""
    if "text_pair" in examples.column_names:
        raise UserError("--windows true divides one text, and these are pairs: leave it out")
    batch_tokens = batch_size * classifier.max_length
    means, lengths = classify(examples["text"][:], classifier, windows=True, batch_tokens=batch_tokens)
    if empty := lengths.count(classifier.tokenizer.num_special_tokens_to_add()):
        raise UserError(f"{empty} of {len(lengths)} texts have no tokens, and so no part to read: leave them out")
    refuse_not_finite(means)
    labels = examples["label"][:]
    if classifier.problem_type == "regression":
        return means, np.array(labels, dtype=float)
    if classifier.problem_type == "multi_label_classification":
        chosen = [[float(index in of_row) for index in range(len(classifier.names))] for of_row in labels]
        return means.logit(), np.array(chosen)
    return means.log(), np.array(labels)


def answer(examples: Dataset, classifier: Classifier, batch_size: int) -> tuple[torch.Tensor, np.ndarray]:
    """Logits (rows, labels) and labels (rows,) or (rows, labels), in the order of the data."""
    label_ids = None if classifier.problem_type == "regression" else list(range(len(classifier.names)))
    tokenized = tokenize(DatasetDict(test=examples), classifier.tokenizer, classifier.max_length, label_ids, None)
    loader, order = longest_first(tokenized["test"], DataCollatorWithPadding(classifier.tokenizer), batch_size)
    accelerator = Accelerator()
    model = accelerator.prepare_model(classifier.model, evaluation_mode=True)
    logits, labels = outputs_of(accelerator, model, accelerator.prepare(loader))
    assert labels is not None
    refuse_not_finite(logits)
    back = torch.from_numpy(np.argsort(order))
    return logits[back], labels[back].numpy()


def refuse_not_finite(answers: torch.Tensor) -> None:
    if not answers.isfinite().all():
        raise UserError(f"{(~answers.isfinite()).any(-1).sum()} of the model's answers are not finite numbers")


def with_interval(value: float, drawn: np.ndarray, confidence: float) -> dict[str, float]:
    low, high = interval(drawn, confidence)
    return {"value": value, "low": low, "high": high}


def mcnemar(predictions: Sequence[np.ndarray], labels: np.ndarray) -> dict[str, float]:
    """Of the rows that one model alone gets right, is it as often the one as the other? Exact, and two-sided."""
    here, there = (predicted == labels for predicted in predictions)
    only_here, only_there = int((here & ~there).sum()), int((there & ~here).sum())
    only = only_here + only_there
    p_value = float(binomtest(only_here, only).pvalue) if only else 1.0
    return {"only_this": only_here, "only_the_other": only_there, "p_value": p_value}


def print_results(results: dict[str, Any]) -> None:
    """The tables of what was measured."""
    for kind, title in (("metrics", "metric"), ("differences", "difference")):
        if kind in results:
            print(format_table([{title: name, **value} for name, value in results[kind].items()]))
    if "mcnemar" in results:
        print(format_table([results["mcnemar"]]))
    if "by_length" in results:
        print(format_table(results["by_length"]))
        measured = {name: results["calibration"][name] for name in ("expected_calibration_error", "brier_score")}
        print(format_table([{"calibration": name, "value": value} for name, value in measured.items()]))


def main(argv: Sequence[str] | None = None) -> None:
    data_arguments, arguments = parse_arguments((LabelledArguments, Arguments), argv, description=__doc__)
    check(data_arguments, arguments)
    if Accelerator().num_processes > 1:
        raise UserError("eval_classifier.py runs in one process, on one device; start it without accelerate launch")
    output_dir = Path(arguments.output_dir)
    started = time.perf_counter()
    name = arguments.model_name_or_path
    classifier = load_classifier(name, arguments.dtype, arguments.max_length, arguments.trust_remote_code)
    several = classifier.problem_type == "multi_label_classification"
    names = None if classifier.problem_type == "regression" else classifier.names
    examples = load_labelled(data_arguments, names, several, arguments.seed)
    are_pairs = "text_pair" in examples.column_names
    classifier.check_pairs(are_pairs, cure=f"name {'one column' if are_pairs else 'two columns'} with --text_column")
    if empty := count_empty(examples):
        print(f"warning: {empty} of {len(examples)} texts are empty", file=sys.stderr)
    lengths = lengths_of(examples, classifier.tokenizer)
    read = int(lengths.max()) if arguments.windows else classifier.max_length
    answer_all = answer_in_windows if arguments.windows else answer
    logits, labels = answer_all(examples, classifier, arguments.per_device_eval_batch_size)
    predictions = predictions_of(logits, classifier.problem_type).numpy()
    labels = labels.astype(predictions.dtype)
    label_texts = [as_text(label, names) for label in labels]
    columns = [examples[name] for name in ("text", "text_pair") if name in examples.column_names]
    fingerprints = [fingerprint(*texts) for texts in zip(*columns)]

    models = [predictions]
    if arguments.compare_with:
        other = read_predictions(Path(arguments.compare_with), label_texts, fingerprints)
        models.append(np.array([from_text(text, names, several) for text in other]))
    num_labels = None if names is None else len(names)
    checked, unchecked = (choose_metrics(num_labels, None, several, (), is_checked) for is_checked in (True, False))
    drawn = resampled(unchecked, models, labels, arguments.bootstrap_resamples, arguments.seed)
    values = [checked(predicted, labels) for predicted in models]
    confidence = arguments.confidence
    results: dict[str, Any] = {"rows": len(labels), "confidence": confidence}
    results["metrics"] = {name: with_interval(values[0][name], drawn[0][name], confidence) for name in values[0]}
    if arguments.compare_with:
        results["compared_with"] = arguments.compare_with
        results["differences"] = {
            name: with_interval(values[0][name] - values[1][name], drawn[0][name] - drawn[1][name], confidence)
            for name in values[0]
        }

    output_dir.mkdir(parents=True, exist_ok=True)
    probabilities = (logits.sigmoid() if several else logits.softmax(-1)).numpy()
    named_by = {name: examples[name][:] for name in ("row", "id") if name in examples.column_names}
    rows = [
        {name: values[row] for name, values in named_by.items()}
        | {"label": label_texts[row], "prediction": as_text(predictions[row], names)}
        | {f"probability of {name}": float(probabilities[row, index]) for index, name in enumerate(names or [])}
        | {"tokens": int(lengths[row]), "cut": str(bool(lengths[row] > read)).lower()}
        | {"fingerprint": fingerprints[row]}
        for row in range(len(labels))
    ]
    write_predictions(output_dir / "predictions.csv", rows)
    if names is None:
        draw_numbers(predictions, labels, output_dir / "predictions.png")
    elif not several:
        if arguments.compare_with:
            results["mcnemar"] = mcnemar(models, labels)
        results["majority_accuracy"] = Counter(labels.tolist()).most_common(1)[0][1] / len(labels)
        results["calibration"] = calibration(probabilities, labels)
        results["by_length"] = by_length(predictions == labels, lengths, read, confidence)
        draw_confusion(predictions, labels, names, output_dir / "confusion_matrix.png")
        draw_lengths(results["by_length"], output_dir / "accuracy_by_length.png")
        draw_calibration(results["calibration"], output_dir / "calibration.png")
    results["seconds"] = time.perf_counter() - started
    write_json(output_dir / "metrics.json", results)
    if arguments.results_file:
        flat = {name: value["value"] for name, value in results["metrics"].items()}
        flat |= {f"{name}_{end}": value[end] for name, value in results["metrics"].items() for end in ("low", "high")}
        where = data_arguments.task_name or data_arguments.dataset_name or " ".join(data_arguments.test_file or [])
        described = {"run_name": arguments.run_name, "model": arguments.model_name_or_path, "data": where}
        append_result(arguments.results_file, described | {"rows": len(labels)} | flat, arguments.seed, argv)
    print_results(results)
    print(f"metrics, predictions and pictures are in {output_dir}")


if __name__ == "__main__":
    run_main(main)
