"""Metrics as `evaluate.Metric`s that need no network: each is scikit-learn's or scipy's function behind one class.

`evaluate.load("accuracy")` fetches code from the Hub. These are used directly instead:

    Accuracy().compute(predictions=[0, 1, 1], references=[0, 1, 0])     # {'accuracy': 0.666...}
    F1().compute(predictions=[0, 1, 1], references=[0, 1, 0], average="macro")
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, mean_squared_error

from common import UserError, one_line


Values = Sequence[float] | np.ndarray
ComputeMetrics = Callable[[Values, Values], dict[str, float]]

# Of these a smaller value is the better one.
LOWER_IS_BETTER = ("loss", "mse")


class _Metric(evaluate.Metric):
    """Takes `predictions` and `references`, a number a row; the first line of the docstring is the description."""

    citation = ""
    dtype = "int64"

    def __init__(self, **kwargs: Any) -> None:
        # In memory there is no cache file for several processes to quarrel over.
        super().__init__(**{"keep_in_memory": True, **kwargs})

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=(self.__doc__ or "").splitlines()[0],
            citation=self.citation,
            inputs_description="predictions and references: one number a row, in the same order",
            features=datasets.Features({name: datasets.Value(self.dtype) for name in ("predictions", "references")}),
        )


class Accuracy(_Metric):
    """The share of rows whose predicted class is the true one."""

    def _compute(self, predictions: Values, references: Values) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class F1(_Metric):
    """The harmonic mean of precision and recall.

    `average="binary"` looks at class 1 of two, as GLUE does; `"macro"` is the plain mean over the classes that occur.
    A class that is never predicted counts as 0.
    """

    def _compute(self, predictions: Values, references: Values, average: str = "binary") -> dict[str, float]:
        return {"f1": float(f1_score(references, predictions, average=average, zero_division=0))}


class MultiLabel(_Metric):
    """For texts with several labels: the share of texts whose labels are all right, and F1 over labels.

    Takes a row of 0 and 1 for each text. `f1_micro` counts all labels of all texts alike, `f1_macro` is the mean over
    the labels; one that never occurs and is never predicted counts as 0.
    """

    def _info(self) -> evaluate.MetricInfo:
        info = super()._info()
        row = datasets.Sequence(datasets.Value(self.dtype))
        info.features = datasets.Features(dict.fromkeys(("predictions", "references"), row))
        return info

    def _compute(self, predictions: Values, references: Values) -> dict[str, float]:
        values = {"accuracy": float(accuracy_score(references, predictions))}
        for average in ("micro", "macro"):
            value = f1_score(references, predictions, average=average, zero_division=0)
            values[f"f1_{average}"] = float(value)
        return values


class MatthewsCorrelation(_Metric):
    """Matthews' correlation of predicted and true classes; 0 if either never varies."""

    def _compute(self, predictions: Values, references: Values) -> dict[str, float]:
        return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}


class PearsonSpearman(_Metric):
    """Pearson's and Spearman's correlation of two columns of numbers.

    0 if either never varies: the correlation is then undefined, and such predictions tell nothing. NaN stays NaN.
    """

    dtype = "float64"

    def _compute(self, predictions: Values, references: Values) -> dict[str, float]:
        if np.isnan(predictions).any() or np.isnan(references).any():
            return {"pearson": float("nan"), "spearman": float("nan")}
        if np.ptp(predictions) == 0 or np.ptp(references) == 0:
            return {"pearson": 0.0, "spearman": 0.0}
        return {
            "pearson": float(pearsonr(predictions, references).statistic),
            "spearman": float(spearmanr(predictions, references).statistic),
        }


class MeanSquaredError(_Metric):
    """The mean of the squared differences."""

    dtype = "float64"

    def _compute(self, predictions: Values, references: Values) -> dict[str, float]:
        return {"mse": float(mean_squared_error(references, predictions))}


OWN_METRICS: dict[str, type[_Metric]] = {
    "accuracy": Accuracy,
    "f1": F1,
    "matthews_correlation": MatthewsCorrelation,
    "multi_label": MultiLabel,
    "pearson_spearman": PearsonSpearman,
    "mse": MeanSquaredError,
}


def load_metric(name: str) -> evaluate.EvaluationModule:
    """A metric of this file by its name, else one that `evaluate.load` finds: a local path or a Hub name."""
    if name in OWN_METRICS and not Path(name).exists():
        return OWN_METRICS[name]()
    try:
        return evaluate.load(name, keep_in_memory=True)
    except Exception as error:
        # The metric's own code runs here, so anything may be raised.
        raise UserError(
            f"unknown metric {name!r}, neither one of {list(OWN_METRICS)} nor to be loaded: {one_line(error)}"
        ) from error


def choose_metrics(
    num_labels: int | None,
    metric_name: str | None = None,
    is_multi_label: bool = False,
    task_metrics: Sequence[str] = (),
    is_checked: bool = True,
) -> ComputeMetrics:
    """The metrics for classification into `num_labels` classes, or for regression (None), as one function.

    It takes predictions and references, a number each or with is_multi_label a row of 0 and 1, and returns a
    dictionary. `metric_name` adds one more metric. With `task_metrics` only these are given, and their mean, `score`.
    is_checked: by `evaluate`, which takes its time; not where the same rows are drawn a thousand times
    """
    extra = load_metric(metric_name) if metric_name else None

    def compute(metric: _Metric, both: dict[str, Values], **kwargs: Any) -> dict[str, float]:
        return metric.compute(**both, **kwargs) if is_checked else metric._compute(**both, **kwargs)

    def compute_metrics(predictions: Values, references: Values) -> dict[str, float]:
        both = {"predictions": predictions, "references": references}
        if num_labels is None:
            values = {**compute(PearsonSpearman(), both), **compute(MeanSquaredError(), both)}
        elif is_multi_label:
            values = compute(MultiLabel(), both)
        else:
            values = {**compute(Accuracy(), both), "f1_macro": compute(F1(), both, average="macro")["f1"]}
            if num_labels == 2:
                values |= compute(F1(), both)
            values |= compute(MatthewsCorrelation(), both)
        if task_metrics:
            values = {name: values[name] for name in task_metrics}
            values["score"] = sum(values.values()) / len(values)
        if extra is not None:
            values |= {key: float(value) for key, value in extra.compute(**both).items()}
        return values

    return compute_metrics
