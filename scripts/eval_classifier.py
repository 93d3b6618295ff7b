"""Judge a saved classifier, or a regression, on labelled texts: metrics and how sure they are, where it errs, and how.

    python scripts/eval_classifier.py --model_name_or_path demo --test_file data/sotu/dev.parquet \\
        --label_column label_text --output_dir output/judged
    python scripts/eval_classifier.py --model_name_or_path output/mrpc --task_name mrpc --output_dir output/judged
    python scripts/eval_classifier.py ... --compare_with output/twin_judged/predictions.csv

Writes to --output_dir: metrics.json; predictions.csv, a row for each text in the order of the data; for classes
confusion_matrix.png, accuracy_by_length.png and calibration.png, for numbers predictions.png.

Intervals are percentiles of the metric over rows drawn again with replacement (the bootstrap). --compare_with takes
the predictions of another model for the same rows and draws the same rows for both: the interval of the difference is
then far narrower than that of either. The calibration error is the mean, over rows, of the distance between confidence
and accuracy in 15 bins of confidence; Brier's score is the squared distance between probabilities and the truth.
"""

import csv
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset, DatasetDict
from scipy.stats import binomtest
from sklearn.metrics import ConfusionMatrixDisplay
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding

from common import UserError, append_result, format_table, one_line, parse_arguments, run_main, write_aside, write_json
from examples import LabelledArguments, load_labelled
from finetune import longest_first, outputs_of, predictions_of, tokenize
from metrics import ComputeMetrics, choose_metrics
from predict import load_classifier


matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402


@dataclass
class Arguments:
    """Which model, how it is judged, and what is written."""

    model_name_or_path: str = field(
        metadata={"help": "Any classifier: a Hub name or a folder. Only safetensors are read."}
    )
    output_dir: str = field(metadata={"help": "Where metrics, predictions and pictures go."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace the ones that are there."})
    max_length: int | None = field(
        default=None, metadata={"help": "Longer texts are cut to so many tokens. Default: all that the model reads."}
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


def lengths_of(rows: Dataset, tokenizer: Any) -> np.ndarray:
    """Tokens of each text, or pair, before it is cut."""

    def count(batch: dict[str, list[str]]) -> dict[str, list[int]]:
        texts = [batch[name] for name in ("text", "text_pair") if name in batch]
        return {"length": [len(input_ids) for input_ids in tokenizer(*texts, verbose=False)["input_ids"]]}

    columns = rows.column_names
    return np.array(rows.map(count, batched=True, batch_size=100, remove_columns=columns, desc="Counting")["length"])


def write_predictions(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with write_aside(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_predictions(path: Path, labels: Sequence[str]) -> list[str]:
    """Another model's predictions. Raises `UserError` where they are of other rows."""
    if not path.is_file():
        raise UserError(f"--compare_with {path} does not exist; scripts/eval_classifier.py writes predictions.csv")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read --compare_with {path}: {one_line(error)}") from error
    if not rows or not {"label", "prediction"} <= rows[0].keys():
        raise UserError(f"--compare_with {path} has no rows with the columns label and prediction")
    if [row["label"] for row in rows] != list(labels):
        raise UserError(
            f"--compare_with {path} has {len(rows)} rows, and not the labels of the {len(labels)} rows judged here: "
            "both models must be judged on the same rows in the same order"
        )
    return [row["prediction"] for row in rows]


def save_figure(figure: pyplot.Figure, path: Path) -> None:
    figure.tight_layout()
    with write_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=150)
    pyplot.close(figure)


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
            return np.isin(names, text.split("; ")).astype(int)
        return list(names).index(text)
    except ValueError as error:
        raise UserError(f"--compare_with has the prediction {text!r}, and the classes are {names}") from error


def main(argv: Sequence[str] | None = None) -> None:
    data_arguments, arguments = parse_arguments((LabelledArguments, Arguments), argv, description=__doc__)
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
    started = time.perf_counter()
    classifier = load_classifier(
        arguments.model_name_or_path, arguments.dtype, arguments.max_length, arguments.trust_remote_code
    )
    is_regression = classifier.problem_type == "regression"
    several = classifier.problem_type == "multi_label_classification"
    names = None if is_regression else classifier.names
    examples = load_labelled(data_arguments, names, several, arguments.seed)
    num_labels = len(classifier.names)
    label_ids = None if is_regression else list(range(num_labels))
    tokenized = tokenize(DatasetDict(test=examples), classifier.tokenizer, classifier.max_length, label_ids, None)
    lengths = lengths_of(examples, classifier.tokenizer)

    accelerator = Accelerator()
    collate = DataCollatorWithPadding(classifier.tokenizer)
    loader, order = longest_first(tokenized["test"], collate, arguments.per_device_eval_batch_size)
    model = accelerator.prepare_model(classifier.model, evaluation_mode=True)
    sorted_logits, sorted_labels = outputs_of(accelerator, model, accelerator.prepare(loader))
    assert sorted_labels is not None
    back = torch.from_numpy(np.argsort(order))
    logits, labels = sorted_logits[back], sorted_labels[back].numpy()
    predictions = predictions_of(logits, classifier.problem_type).numpy()
    labels = labels.astype(predictions.dtype)

    def chosen_metrics(is_checked: bool) -> ComputeMetrics:
        return choose_metrics(None if is_regression else num_labels, None, several, (), is_checked)

    texts = [as_text(label, names) for label in labels]
    models = [predictions]
    if arguments.compare_with:
        other = read_predictions(Path(arguments.compare_with), texts)
        models.append(np.array([from_text(text, names, several) for text in other]))
    drawn = resampled(chosen_metrics(False), models, labels, arguments.bootstrap_resamples, arguments.seed)
    values = chosen_metrics(True)(predictions, labels)
    results: dict[str, Any] = {"rows": len(labels), "confidence": arguments.confidence, "metrics": {}}
    for name, value in values.items():
        low, high = interval(drawn[0][name], arguments.confidence)
        results["metrics"][name] = {"value": value, "low": low, "high": high}
    if arguments.compare_with:
        others = chosen_metrics(True)(models[1], labels)
        results["compared_with"], results["differences"] = arguments.compare_with, {}
        for name in values:
            low, high = interval(drawn[0][name] - drawn[1][name], arguments.confidence)
            results["differences"][name] = {"value": values[name] - others[name], "low": low, "high": high}
        if not is_regression and not several:
            here, there = (predicted == labels for predicted in models)
            only_here, only_there = int((here & ~there).sum()), int((there & ~here).sum())
            only = only_here + only_there
            # McNemar's exact test: of the rows that one model alone gets right, is it as often the one as the other?
            p_value = float(binomtest(only_here, only).pvalue) if only else 1.0
            results["mcnemar"] = {"only_this": only_here, "only_the_other": only_there, "p_value": p_value}

    output_dir.mkdir(parents=True, exist_ok=True)
    columns: list[tuple[str, Any]] = [("prediction", [as_text(value, names) for value in predictions])]
    if names is not None:
        probabilities = (logits.sigmoid() if several else logits.softmax(-1)).numpy()
        columns += [(f"probability of {name}", probabilities[:, index].tolist()) for index, name in enumerate(names)]
    rows = [
        {"row": index, "label": texts[index], **{name: column[index] for name, column in columns}}
        | {"tokens": int(lengths[index]), "cut": str(bool(lengths[index] > classifier.max_length)).lower()}
        for index in range(len(labels))
    ]
    write_predictions(output_dir / "predictions.csv", rows)
    if is_regression:
        draw_numbers(predictions, labels, output_dir / "predictions.png")
    elif not several:
        assert names is not None
        results["majority_accuracy"] = Counter(labels.tolist()).most_common(1)[0][1] / len(labels)
        results["calibration"] = calibration(probabilities, labels)
        results["by_length"] = by_length(predictions == labels, lengths, classifier.max_length, arguments.confidence)
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
    print(format_table([{"metric": name, **value} for name, value in results["metrics"].items()]))
    if arguments.compare_with:
        print(format_table([{"difference": name, **value} for name, value in results["differences"].items()]))
    if "by_length" in results:
        print(format_table(results["by_length"]))
        measured = {name: results["calibration"][name] for name in ("expected_calibration_error", "brier_score")}
        print(format_table([{"calibration": name, "value": value} for name, value in measured.items()]))
    print(f"metrics, predictions and pictures are in {output_dir}")


if __name__ == "__main__":
    run_main(main)
