"""The metrics of scripts/metrics.py against hand-made numbers: `pytest tests/test_metrics.py`."""

import math

import evaluate
import pytest

from common import UserError
from metrics import F1, Accuracy, MatthewsCorrelation, MeanSquaredError, PearsonSpearman, choose_metrics, load_metric


# True positives 2, false positives 1, false negatives 1, true negatives 2.
PREDICTIONS = [1, 1, 1, 0, 0, 0]
REFERENCES = [1, 1, 0, 1, 0, 0]

METRIC_FILE = """
import datasets
import evaluate


class ErrorCount(evaluate.Metric):
    def _info(self):
        features = datasets.Features({name: datasets.Value("int64") for name in ("predictions", "references")})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        return {"errors": sum(p != r for p, r in zip(predictions, references))}
"""


def test_classification_values():
    assert Accuracy().compute(predictions=PREDICTIONS, references=REFERENCES) == {"accuracy": pytest.approx(4 / 6)}
    # Precision = recall = 2 / 3 for class 1, and for class 0.
    assert F1().compute(predictions=PREDICTIONS, references=REFERENCES) == {"f1": pytest.approx(2 / 3)}
    macro = F1().compute(predictions=[0, 1, 2, 2], references=[0, 1, 1, 2], average="macro")
    assert macro == {"f1": pytest.approx((1 + 2 / 3 + 2 / 3) / 3)}
    matthews = MatthewsCorrelation().compute(predictions=PREDICTIONS, references=REFERENCES)
    assert matthews == {"matthews_correlation": pytest.approx((2 * 2 - 1 * 1) / math.sqrt(3 * 3 * 3 * 3))}


def test_regression_values():
    correlation = PearsonSpearman().compute(predictions=[1.0, 2.0, 3.0, 10.0], references=[2.0, 4.0, 6.0, 5.0])
    # Deviations from the means 4 and 4.25; the ranks differ by 1 in the last two places.
    pearson = (-3 * -2.25 + -2 * -0.25 + -1 * 1.75 + 6 * 0.75) / math.sqrt(50 * 8.75)
    assert correlation == {"pearson": pytest.approx(pearson), "spearman": pytest.approx(1 - 6 * 2 / (4 * 15))}
    assert MeanSquaredError().compute(predictions=[1.0, 2.0], references=[2.0, 4.0]) == {"mse": 2.5}


def test_constant_predictions_have_honest_values(recwarn):
    assert choose_metrics(2)([0, 0, 0, 0], [0, 1, 1, 0]) == {
        "accuracy": 0.5,
        "f1_macro": pytest.approx(1 / 3),
        "f1": 0.0,
        "matthews_correlation": 0.0,
    }
    values = choose_metrics(None)([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])
    assert values == {"pearson": 0.0, "spearman": 0.0, "mse": pytest.approx(5 / 3)}
    assert not [warning for warning in recwarn if "constant" in str(warning.message).lower()]


def test_not_a_number_is_not_hidden():
    values = PearsonSpearman().compute(predictions=[1.0, math.nan, 3.0], references=[1.0, 2.0, 3.0])
    assert math.isnan(values["pearson"]) and math.isnan(values["spearman"])


def test_metrics_take_batches_and_combine():
    metric = Accuracy()
    metric.add_batch(predictions=PREDICTIONS[:3], references=REFERENCES[:3])
    metric.add_batch(predictions=PREDICTIONS[3:], references=REFERENCES[3:])
    assert metric.compute() == {"accuracy": pytest.approx(4 / 6)}
    combined = evaluate.combine([Accuracy(), MatthewsCorrelation()])
    values = combined.compute(predictions=PREDICTIONS, references=REFERENCES)
    assert values == {"accuracy": pytest.approx(4 / 6), "matthews_correlation": pytest.approx(1 / 3)}


def test_the_choice_follows_the_problem():
    assert [*choose_metrics(5)([0, 1], [0, 2])] == ["accuracy", "f1_macro", "matthews_correlation"]
    assert "f1" in choose_metrics(2)([0, 1], [0, 1])
    assert [*choose_metrics(None)([0.0, 1.0], [0.0, 2.0])] == ["pearson", "spearman", "mse"]


def test_own_and_local_metrics_load_by_name(tmp_path):
    (tmp_path / "errors.py").write_text(METRIC_FILE)
    assert isinstance(load_metric("accuracy"), Accuracy)
    assert choose_metrics(3, str(tmp_path / "errors.py"))([0, 1, 2], [0, 1, 1])["errors"] == 1.0


def test_an_unknown_metric_is_refused_by_name():
    with pytest.raises(UserError, match="unknown metric 'exactitude'.*accuracy"):
        load_metric("exactitude")
