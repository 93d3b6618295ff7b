"""scripts/eval_classifier.py: its arithmetic on cases worked out by hand, and whole runs with small models."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import eval_classifier
import predict
from common import UserError
from metrics import choose_metrics
from tiny import WORDS, save_classifier


LABELS = ["law", "peace", "war"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A classifier with random weights, whose answers vary from text to text."""
    return save_classifier(tmp_path_factory.mktemp("model"), LABELS, initializer_range=0.6)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Texts of 1 to 40 words with a label each."""
    generator = np.random.default_rng(0)
    rows = [
        {"text": " ".join(generator.choice(WORDS, size=1 + 7 * row % 40)), "label": LABELS[generator.integers(3)]}
        for row in range(60)
    ]
    path = tmp_path_factory.mktemp("texts") / "texts.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def judge(model: Path, texts: Path, output_dir: Path, *more: object) -> dict:
    given = ["--model_name_or_path", model, "--test_file", texts, "--output_dir", output_dir]
    eval_classifier.main([str(word) for word in [*given, "--bootstrap_resamples", 200, *more]])
    return json.loads((output_dir / "metrics.json").read_text())


# Arithmetic


def test_calibration_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.3, 0.7]])
    measured = eval_classifier.calibration(probabilities, np.array([0, 1, 1, 1]), bins=10)
    # Bins 0.6, 0.7 and 0.9: |1 - 0.6| / 4 + |1 - 0.7| / 4 + 2 |0.5 - 0.9| / 4
    assert measured["expected_calibration_error"] == pytest.approx(0.1 + 0.075 + 0.2)
    assert measured["brier_score"] == pytest.approx((0.02 + 1.62 + 0.32 + 0.18) / 4)
    assert [row["rows"] for row in measured["bins"]] == [1, 1, 2]
    certain = eval_classifier.calibration(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0, 1]))
    assert certain["expected_calibration_error"] == certain["brier_score"] == 0


def test_lengths_fall_into_powers_of_two():
    lengths = np.array([1, 64, 65, 128, 1000])
    right = np.array([True, False, True, True, False])
    table = eval_classifier.by_length(right, lengths, max_length=100, confidence=0.95)
    assert [(row["tokens"], row["rows"], row["accuracy"], row["cut"]) for row in table] == [
        ("1 to 64", 2, 0.5, 0.0),
        ("65 to 128", 2, 1.0, 0.5),
        ("513 to 1,024", 1, 0.0, 1.0),
    ]
    assert all(0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1 for row in table)


def test_intervals_hold_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(1)
    held = 0

    def compute(predictions, labels):
        return {"accuracy": float((predictions == labels).mean())}

    for seed in range(100):
        right = generator.random(80) < 0.7
        labels = generator.integers(0, 2, 80)
        predictions = np.where(right, labels, 1 - labels)
        (drawn,) = eval_classifier.resampled(compute, [predictions], labels, 100, seed)
        low, high = eval_classifier.interval(drawn["accuracy"], 0.9)
        held += low <= 0.7 <= high
    assert 80 <= held <= 98


def test_both_models_are_judged_on_the_same_rows():
    generator = np.random.default_rng(2)
    labels = generator.integers(0, 3, 50)
    predictions = generator.integers(0, 3, 50)
    compute = choose_metrics(3, is_checked=False)
    one, other = eval_classifier.resampled(compute, [predictions, predictions], labels, 20, 0)
    assert all((one[name] == other[name]).all() and one[name].std() > 0 for name in one)


# Whole runs


def test_metrics_predictions_and_pictures(model, texts, tmp_path, capsys):
    found = judge(model, texts, tmp_path / "out", "--results_file", tmp_path / "results.csv")
    rows = list(csv.DictReader((tmp_path / "out" / "predictions.csv").open()))
    given = pd.read_csv(texts)
    assert [row["label"] for row in rows] == list(given["label"])

    classifier = AutoModelForSequenceClassification.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    for text, row in zip(given["text"], rows):
        with torch.no_grad():
            alone = classifier(**tokenizer(text, return_tensors="pt", truncation=True)).logits.softmax(-1)[0]
        assert [float(row[f"probability of {name}"]) for name in LABELS] == pytest.approx(alone.tolist(), abs=1e-5)
        assert row["prediction"] == LABELS[alone.argmax()]
        assert int(row["tokens"]) == len(tokenizer(text, verbose=False)["input_ids"])
    predictions, labels = ([row[name] for row in rows] for name in ("prediction", "label"))
    assert len(set(predictions)) > 1
    metrics = found["metrics"]
    assert metrics["accuracy"]["value"] == pytest.approx(accuracy_score(labels, predictions))
    assert metrics["f1_macro"]["value"] == pytest.approx(f1_score(labels, predictions, average="macro"))
    assert all(metric["low"] < metric["value"] < metric["high"] for metric in metrics.values())
    assert found["majority_accuracy"] == pytest.approx(given["label"].value_counts().max() / 60)
    assert sum(row["rows"] for row in found["by_length"]) == 60
    for name in ("confusion_matrix", "accuracy_by_length", "calibration"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 5_000
    (row,) = csv.DictReader((tmp_path / "results.csv").open())
    assert float(row["accuracy"]) == pytest.approx(metrics["accuracy"]["value"], rel=1e-5)
    assert float(row["accuracy_low"]) <= float(row["accuracy"])
    assert "expected_calibration_error" in capsys.readouterr().out

    again = judge(model, texts, tmp_path / "again", "--per_device_eval_batch_size", 7)
    assert again["metrics"] == metrics
    cut = judge(model, texts, tmp_path / "cut", "--max_length", 8)
    assert [row["cut"] for row in csv.DictReader((tmp_path / "cut" / "predictions.csv").open())].count("true") > 30
    assert sum(row["cut"] for row in cut["by_length"]) > 0


def test_two_models_on_the_same_rows(model, texts, tmp_path, capsys):
    judge(model, texts, tmp_path / "one")
    same = judge(model, texts, tmp_path / "same", "--compare_with", tmp_path / "one" / "predictions.csv")
    assert all(value == {"value": 0, "low": 0, "high": 0} for value in same["differences"].values())
    assert same["mcnemar"] == {"only_this": 0, "only_the_other": 0, "p_value": 1.0}

    rows = list(csv.DictReader((tmp_path / "one" / "predictions.csv").open()))
    right = sum(row["prediction"] == row["label"] for row in rows)
    for row in rows:
        row["prediction"] = row["label"]
    eval_classifier.write_predictions(tmp_path / "oracle.csv", rows)
    behind = judge(model, texts, tmp_path / "behind", "--compare_with", tmp_path / "oracle.csv")
    assert behind["differences"]["accuracy"]["value"] == pytest.approx(right / 60 - 1)
    assert behind["differences"]["accuracy"]["high"] < 0
    assert behind["mcnemar"]["only_the_other"] == 60 - right and behind["mcnemar"]["p_value"] < 1e-3

    with pytest.raises(UserError, match="must be judged on the same rows in the same order"):
        judge(model, texts, tmp_path / "x", "--compare_with", tmp_path / "oracle.csv", "--max_eval_samples", 5)
    swapped = pd.read_csv(texts)
    swapped["text"] = swapped["text"][::-1].to_list()
    swapped.to_csv(tmp_path / "swapped.csv", index=False)
    with pytest.raises(UserError, match="has 60 rows, of which .* have another fingerprint than the 60 judged here"):
        judge(model, tmp_path / "swapped.csv", tmp_path / "x", "--compare_with", tmp_path / "oracle.csv")
    with pytest.raises(UserError, match="nowhere.csv does not exist"):
        judge(model, texts, tmp_path / "x", "--compare_with", "nowhere.csv")
    rows[0]["prediction"] = "tax"
    eval_classifier.write_predictions(tmp_path / "other.csv", rows)
    with pytest.raises(UserError, match="the prediction 'tax', and the classes are"):
        judge(model, texts, tmp_path / "x", "--compare_with", tmp_path / "other.csv")


def test_whole_texts_in_windows_are_judged_as_predict_answers(model, texts, tmp_path):
    """The texts have up to 40 words, and the model reads 24 tokens."""
    measured = judge(model, texts, tmp_path / "judged", "--windows", "true", "--per_device_eval_batch_size", 7)
    rows = pd.read_csv(tmp_path / "judged" / "predictions.csv")
    predict.main(
        ["--model_name_or_path", str(model), "--input_file", str(texts), "--windows", "true"]
        + ["--output_file", str(tmp_path / "answers.csv")]
    )
    answers = pd.read_csv(tmp_path / "answers.csv")
    assert rows["prediction"].to_list() == answers["label"].to_list()
    for name in LABELS:
        np.testing.assert_allclose(rows[f"probability of {name}"], answers[name], atol=1e-5)
    truth = pd.read_csv(texts)["label"]
    assert measured["metrics"]["accuracy"]["value"] == pytest.approx((answers["label"] == truth).mean())
    assert not rows["cut"].any() and not answers["cut"].any()
    judge(model, texts, tmp_path / "cut")
    cut = pd.read_csv(tmp_path / "cut" / "predictions.csv")
    differ = (cut[f"probability of {LABELS[0]}"] - rows[f"probability of {LABELS[0]}"]).abs() > 1e-4
    assert (differ == cut["cut"]).all() and 10 < differ.sum() < 50


@pytest.mark.parametrize("kind", ["several labels", "numbers"])
def test_other_answers_in_windows_are_those_of_predict_too(kind, texts, tmp_path):
    frame = pd.read_csv(texts)
    if kind == "several labels":
        names, problem_type, more = LABELS, "multi_label_classification", ["--label_separator", ";"]
        frame["label"] += ";" + LABELS[1]
    else:
        names, problem_type, more = ["value"], "regression", []
        frame["label"] = frame["text"].str.len() / 10
    saved = save_classifier(tmp_path / "model", names, problem_type=problem_type, initializer_range=0.6)
    frame.to_csv(tmp_path / "texts.csv", index=False)
    judge(saved, tmp_path / "texts.csv", tmp_path / "judged", "--windows", "true", *more)
    rows = pd.read_csv(tmp_path / "judged" / "predictions.csv")
    predict.main(
        ["--model_name_or_path", str(saved), "--input_file", str(tmp_path / "texts.csv"), "--windows", "true"]
        + ["--output_file", str(tmp_path / "answers.csv")]
    )
    answers = pd.read_csv(tmp_path / "answers.csv")
    assert (rows["tokens"] > 24).sum() > 20
    for name in names:
        column = "prediction" if kind == "numbers" else f"probability of {name}"
        np.testing.assert_allclose(rows[column].astype(float), answers[name], atol=1e-5)


def test_windows_that_cannot_be_judged(model, texts, tmp_path):
    frame = pd.read_csv(texts)
    frame.assign(other=frame["text"]).to_csv(tmp_path / "pairs.csv", index=False)
    pairs = ["--windows", "true", "--text_column", "text", "other"]
    with pytest.raises(UserError, match="--windows true divides one text, and these are pairs"):
        judge(model, tmp_path / "pairs.csv", tmp_path / "pairs", *pairs)
    frame.assign(text=["", *frame["text"][1:]]).to_csv(tmp_path / "empty.csv", index=False)
    with pytest.raises(UserError, match="1 of 60 texts have no tokens"):
        judge(model, tmp_path / "empty.csv", tmp_path / "empty", "--windows", "true")
    broken = AutoModelForSequenceClassification.from_pretrained(shutil.copytree(model, tmp_path / "broken"))
    torch.nn.init.constant_(broken.classifier.output.bias, math.nan)
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(UserError, match="60 of the model's answers are not finite numbers"):
        judge(tmp_path / "broken", texts, tmp_path / "nothing", "--windows", "true")
    assert not (tmp_path / "nothing").exists()


def test_numbers(texts, tmp_path):
    numbers = save_classifier(tmp_path / "numbers", ["value"], problem_type="regression", initializer_range=0.6)
    pd.read_csv(texts).assign(label=np.linspace(0, 5, 60)).to_csv(tmp_path / "numbers.csv", index=False)
    found = judge(numbers, tmp_path / "numbers.csv", tmp_path / "out")
    assert set(found["metrics"]) == {"pearson", "spearman", "mse"} and "calibration" not in found
    assert (tmp_path / "out" / "predictions.png").stat().st_size > 5_000


def test_several_labels(texts, tmp_path):
    several = save_classifier(
        tmp_path / "several", LABELS, problem_type="multi_label_classification", initializer_range=0.6
    )
    labels = ["law; war", "", "peace"] * 20
    pd.read_csv(texts).assign(label=labels).to_csv(tmp_path / "several.csv", index=False)
    found = judge(several, tmp_path / "several.csv", tmp_path / "out", "--label_separator", ";")
    assert set(found["metrics"]) == {"accuracy", "f1_micro", "f1_macro"}
    rows = list(csv.DictReader((tmp_path / "out" / "predictions.csv").open()))
    assert [row["label"] for row in rows] == labels
    same = judge(
        *(several, tmp_path / "several.csv", tmp_path / "same", "--label_separator", ";"),
        *("--compare_with", tmp_path / "out" / "predictions.csv"),
    )
    assert same["differences"]["f1_micro"]["value"] == 0
    with pytest.raises(UserError, match="the model gives a text several labels: lists, or --label_separator"):
        judge(several, texts, tmp_path / "x")


@pytest.mark.parametrize("count", [2, 300])
def test_many_labels_and_names_that_look_like_formulas_are_drawn(tmp_path, count):
    names = ["US$ and CA$", "$^", *(f"class {index}" for index in range(2, count))]
    classes = np.arange(6) % count
    eval_classifier.draw_confusion(classes, classes[::-1].copy(), names, tmp_path / "many.png")
    assert (tmp_path / "many.png").stat().st_size > 5_000


def test_a_folder_for_each_class(model, texts, tmp_path):
    rows = pd.read_csv(texts).sort_values("label", kind="stable")
    for number, row in enumerate(rows.itertuples()):
        (tmp_path / "folders" / row.label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "folders" / row.label / f"{number:02}.txt").write_text(row.text)
    rows.to_csv(tmp_path / "rows.csv", index=False)
    found = [judge(model, tmp_path / "rows.csv", tmp_path / "table")]
    found.append(judge(model, tmp_path / "folders", tmp_path / "out", "--id_column", "file"))
    assert found[0]["metrics"] == found[1]["metrics"] and found[1]["rows"] == 60
    written = list(csv.DictReader((tmp_path / "out" / "predictions.csv").open()))
    assert [row["id"] for row in written[::59]] == ["law/00.txt", "war/59.txt"]


def test_rows_are_those_of_the_data_and_have_names(model, texts, tmp_path):
    names = [f"no. {number}" for number in range(1, 61)]
    pd.read_csv(texts).assign(number=names).to_csv(tmp_path / "rows.csv", index=False)
    drawn = ["--id_column", "number", "--max_eval_samples", 20]
    for output, count, more in (("all", 60, []), ("drawn", 20, drawn)):
        judge(model, tmp_path / "rows.csv", tmp_path / output, *more)
        rows = list(csv.DictReader((tmp_path / output / "predictions.csv").open()))
        numbers = [int(row["row"]) for row in rows]
        assert len(rows) == count and (numbers == list(range(1, 61))) == (count == 60)
        labels = pd.read_csv(texts)["label"]
        assert [row["label"] for row in rows] == [labels[number - 1] for number in numbers]
        assert [row.get("id") for row in rows] == [f"no. {number}" if more else None for number in numbers]
    with pytest.raises(UserError, match=r"has no column 'name'; it has \['text', 'label', 'number'\]"):
        judge(model, tmp_path / "rows.csv", tmp_path / "x", "--id_column", "name")


def test_empty_texts_are_counted(model, texts, tmp_path, capsys):
    rows = pd.read_csv(texts)
    rows.loc[3:4, "text"] = ["", " "]
    rows.to_csv(tmp_path / "rows.csv", index=False)
    judge(model, tmp_path / "rows.csv", tmp_path / "out")
    assert "warning: 2 of 60 texts are empty\n" in capsys.readouterr().err


def test_bad_input_is_refused(model, texts, tmp_path):
    judge(model, texts, tmp_path / "out")
    with pytest.raises(UserError, match="holds metrics.json, predictions.csv, .* already"):
        judge(model, texts, tmp_path / "out")
    # What a user made is not replaced either.
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "predictions.csv").write_text("mine")
    with pytest.raises(UserError, match="holds predictions.csv already"):
        judge(model, texts, tmp_path / "mine")
    assert (tmp_path / "mine" / "predictions.csv").read_text() == "mine"
    judge(model, texts, tmp_path / "out", "--overwrite_output_dir")
    pd.read_csv(texts).replace({"war": "tax"}).to_csv(tmp_path / "tax.csv", index=False)
    with pytest.raises(UserError, match=r"labels \['tax'\], and the model knows \['law', 'peace', 'war'\]"):
        judge(model, tmp_path / "tax.csv", tmp_path / "x")
    with pytest.raises(UserError, match="no column 'kind'"):
        judge(model, texts, tmp_path / "x", "--label_column", "kind")
    (tmp_path / "broken.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot read --compare_with .*broken.csv"):
        judge(model, texts, tmp_path / "x", "--compare_with", tmp_path / "broken.csv")
    with pytest.raises(UserError, match="--output_dir .*broken.csv is a file"):
        judge(model, texts, tmp_path / "broken.csv")
    for option in ("--max_length", "--max_eval_samples"):
        with pytest.raises(UserError, match=f"{option} must be at least 1, not 0"):
            judge(model, texts, tmp_path / "x", option, 0)
    with pytest.raises(UserError, match="--confidence must lie between 0 and 1, and is 95"):
        judge(model, texts, tmp_path / "x", "--confidence", 95)
    with pytest.raises(UserError, match="nothing to judge on"):
        eval_classifier.main(["--model_name_or_path", str(model), "--output_dir", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()


def test_a_task_and_numbered_labels(tmp_path, texts):
    rows = pd.read_csv(texts).rename(columns={"text": "sentence"})
    rows["label"] = [row % 2 for row in range(60)]
    (tmp_path / "sst2").mkdir()
    rows.to_parquet(tmp_path / "sst2" / "validation.parquet")
    rows.to_parquet(tmp_path / "sst2" / "train.parquet")
    named = save_classifier(tmp_path / "named", ["negative", "positive"])
    output = ["--output_dir", str(tmp_path / "named_out"), "--bootstrap_resamples", "20"]
    given = ["--task_name", "sst2", "--dataset_name", str(tmp_path / "sst2"), *output]
    eval_classifier.main(["--model_name_or_path", str(named), *given])
    written = list(csv.DictReader((tmp_path / "named_out" / "predictions.csv").open()))
    assert [row["label"] for row in written][:2] == ["negative", "positive"]
    numbered = save_classifier(tmp_path / "numbered", ["LABEL_0", "LABEL_1"])
    judge(numbered, tmp_path / "sst2" / "validation.parquet", tmp_path / "numbered_out")
    written = list(csv.DictReader((tmp_path / "numbered_out" / "predictions.csv").open()))
    assert [row["label"] for row in written][:2] == ["LABEL_0", "LABEL_1"]
