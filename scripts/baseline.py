"""What a model must beat: the most frequent class, and logistic regression on TF-IDF, on the same data and splits.

    python scripts/baseline.py --train_file data/sotu/train.parquet --validation_file data/sotu/dev.parquet \\
        --label_column label_text
    python scripts/baseline.py --task_name mrpc

The data options are those of scripts/finetune.py; for the same --seed the same rows are drawn.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from common import UserError, append_result, format_table, parse_arguments, run_main
from examples import DataArguments, is_multi_label, load_examples, with_task
from metrics import choose_metrics


@dataclass
class BaselineArguments:
    """How the baselines are fitted, and what is written."""

    seed: int = field(default=42, metadata={"help": "Of drawn splits and samples."})
    ngram_max: int = field(default=1, metadata={"help": "TF-IDF of word n-grams up to this n."})
    regularization: float = field(
        default=10.0, metadata={"help": "C of the logistic regression; smaller is stronger."}
    )
    run_name: str = field(default="baseline", metadata={"help": "The run's name in --results_file."})
    results_file: str | None = field(default=None, metadata={"help": "Add a row for each baseline to this CSV."})


def join_pair(dataset: Dataset) -> list[str]:
    """One text a row; the two of a pair become one, since words are all that is counted."""
    columns = [dataset[name] for name in ("text", "text_pair") if name in dataset.column_names]
    return ["\n".join(texts) for texts in zip(*columns)]


def main(argv: Sequence[str] | None = None) -> None:
    data_arguments, arguments = parse_arguments((DataArguments, BaselineArguments), argv, description=__doc__)
    _, task = with_task(data_arguments)
    examples, label_names = load_examples(data_arguments, arguments.seed)
    if label_names is None:
        raise UserError("the baselines are classifiers, and the labels are numbers; give --do_regression false if not")
    if is_multi_label(examples):
        raise UserError("the baselines give a text one class, and here it may have several labels")
    compute_metrics = choose_metrics(len(label_names), task_metrics=task.metrics if task else ())
    models = {
        "majority class": DummyClassifier(strategy="most_frequent"),
        "TF-IDF + logistic regression": make_pipeline(
            TfidfVectorizer(sublinear_tf=True, min_df=2, ngram_range=(1, arguments.ngram_max)),
            LogisticRegression(C=arguments.regularization, max_iter=1000),
        ),
    }
    train_texts, train_labels = join_pair(examples["train"]), examples["train"]["label"][:]
    rows = []
    for name, model in models.items():
        started = time.perf_counter()
        try:
            model.fit(train_texts, train_labels)
        except ValueError as error:
            # scikit-learn's word for texts of which no word is left to count.
            raise UserError(f"cannot fit {name}: {error}") from error
        row: dict[str, Any] = {"model": name}
        for split in sorted(examples.keys() - {"train"}, reverse=True):
            values = compute_metrics(model.predict(join_pair(examples[split])), examples[split]["label"][:])
            prefix = "eval" if split == "validation" else split
            row |= {f"{prefix}_{metric}": value for metric, value in values.items()}
        row["seconds"] = time.perf_counter() - started
        rows.append(row)
        if arguments.results_file:
            data = data_arguments.dataset_name or " ".join(data_arguments.train_file or [])
            described = {
                "run_name": arguments.run_name,
                "task": data_arguments.task_name,
                "data": data,
                "dataset_config": data_arguments.dataset_config_name,
                "training_rows": len(examples["train"]),
                "evaluated_rows": len(examples["validation"]),
            }
            append_result(arguments.results_file, described | row, arguments.seed, argv)
    print(format_table(rows))


if __name__ == "__main__":
    run_main(main)
