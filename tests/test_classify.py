"""scripts/classify.py, also in fresh processes, on a Linformer that was saved with its code."""

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, RobertaConfig, RobertaForSequenceClassification

from common import UserError, run_main
from hf_linformer import LinformerConfig, LinformerForSequenceClassification
from tiny import save_classifier


ROOT = Path(__file__).resolve().parent.parent
LABELS = ["1790-1860", "1861-1912", "1913-1945"]
TEXTS = [
    "Our farmers ask for canals.",
    "The railroads and the silver coinage.",
    "We shall build aeroplanes – and ships.",
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A Linformer with random weights that are large enough to tell texts apart, cut at 24 tokens."""
    folder = tmp_path_factory.mktemp("classify") / "model"
    return save_classifier(folder, LABELS, classifier_pooling="mean", initializer_range=0.5)


@pytest.fixture(scope="module")
def expected(saved) -> list[list[float]]:
    """The probabilities of the classes for TEXTS, one text at a time."""
    model = LinformerForSequenceClassification.from_pretrained(saved).eval()
    tokenizer = AutoTokenizer.from_pretrained(saved)
    with torch.no_grad():
        logits = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in TEXTS]
    return [row.softmax(-1).tolist() for row in logits]


def in_process(saved: Path, *options: str) -> None:
    import classify

    classify.main(["--model_name_or_path", str(saved), *options])


def test_arguments_in_a_fresh_process(saved, expected):
    command = [sys.executable, str(ROOT / "scripts" / "classify.py"), "--model_name_or_path", str(saved), *TEXTS[:2]]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    for line, row in zip(done.stdout.splitlines(), expected[:2], strict=True):
        assert line == f"{LABELS[row.index(max(row))]} {max(row):.3f}"


def test_standard_input_in_a_fresh_process_with_the_saved_code(saved, expected, tmp_path):
    # A package of the same name that cannot be imported: the code in the model's folder is what runs.
    (tmp_path / "hf_linformer.py").write_text("raise ImportError('the saved code must do')\n")
    command = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.path.insert(1, {str(ROOT / 'scripts')!r})\n"
    command += "import classify; classify.main()"
    options = ["--model_name_or_path", str(saved), "--output_format", "jsonl", "--top_k", "9"]
    options += ["--per_device_eval_batch_size", "2"]
    lines = f"{TEXTS[0]}\n\n{TEXTS[1]}\n{TEXTS[2]}\n"
    done = subprocess.run(
        [sys.executable, "-c", command, *options], input=lines, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == ["warning: text 2 is empty and is left out"]
    for line, text, row in zip(done.stdout.splitlines(), TEXTS, expected, strict=True):
        found = json.loads(line)
        assert found["text"] == text
        scores = {prediction["label"]: prediction["score"] for prediction in found["predictions"]}
        assert scores == pytest.approx(dict(zip(LABELS, row)), abs=1e-5)
        assert list(scores.values()) == sorted(scores.values(), reverse=True)


def test_nothing_to_classify_is_refused(saved, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n  \n")))
    with pytest.raises(UserError, match="there is nothing to classify"):
        in_process(saved)
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("is empty and is left out") == 2


def test_lines_that_are_no_utf_8_are_left_out(saved, expected, monkeypatch, capsys):
    content = "\ufeff".encode() + "caf\u00e9 of the people\n".encode("latin1") + TEXTS[0].encode() + b"\r\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    in_process(saved, "--output_format", "jsonl")
    printed = capsys.readouterr()
    problem = "not valid UTF-8: byte 0xe9 at position 3 of the text"
    assert printed.err == f"warning: text 1 is {problem} and is left out\n"
    (row,) = map(json.loads, printed.out.splitlines())
    assert row["text"] == TEXTS[0]
    assert row["predictions"][0]["score"] == pytest.approx(max(expected[0]), abs=1e-5)


def test_names_of_files_are_no_texts(saved, tmp_path, monkeypatch, capsys):
    (tmp_path / "law").mkdir()
    (tmp_path / "law" / "a.txt").write_text("of the court")
    monkeypatch.chdir(tmp_path)
    for name in ("law/a.txt", "law/"):
        with pytest.raises(UserError, match=f"{name} is there as a file or folder, .* scripts/predict.py reads files"):
            in_process(saved, TEXTS[0], name)
    in_process(saved, "law", "law/b.txt", "a/" * 3000)
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize(
    ("options", "line"), [({}, "interrupted"), ({"resume": "--resume true"}, "interrupted; --resume true goes on")]
)
def test_ctrl_c_is_one_line(options, line, capsys):
    # Shells start what runs in the background with the signal ignored, these tests too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as exit_code:
            run_main(lambda: signal.raise_signal(signal.SIGINT), **options)
    finally:
        signal.signal(signal.SIGINT, before)
    assert exit_code.value.code == 130 and capsys.readouterr().err == line + "\n"


def test_top_k(saved, expected, capsys):
    in_process(saved, TEXTS[0], "--top_k", "2")
    best = sorted(zip(expected[0], LABELS), reverse=True)[:2]
    assert capsys.readouterr().out == "  ".join(f"{label} {score:.3f}" for score, label in best) + "\n"


def test_a_long_text_is_cut_and_says_how_much(saved, capsys):
    tokenizer = AutoTokenizer.from_pretrained(saved)
    long = "canals " * 60
    count = len(tokenizer(long, verbose=False)["input_ids"])
    kept = tokenizer.decode(tokenizer(long, truncation=True)["input_ids"], skip_special_tokens=True)
    in_process(saved, long, kept)
    printed = capsys.readouterr()
    assert (
        f"text 1 has {count} tokens, of which the model reads the first 24; {1 - 24 / count:.0%} is cut" in printed.err
    )
    assert "text 2" not in printed.err
    first, second = printed.out.splitlines()
    assert first == second


def test_a_roberta_is_cut_at_the_positions_that_it_has(saved, tmp_path, capsys):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    tokenizer = AutoTokenizer.from_pretrained(saved, model_max_length=10_000)
    tokenizer.save_pretrained(tmp_path)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=40,
        num_labels=2,
        **sizes,
    )
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    in_process(tmp_path, "canals " * 60)
    read = 40 - tokenizer.pad_token_id - 1
    assert f"the model reads the first {read}; " in capsys.readouterr().err


def test_pairs(saved, capsys):
    in_process(saved, "one\ttwo", "--pairs")
    model = LinformerForSequenceClassification.from_pretrained(saved).eval()
    with torch.no_grad():
        logits = model(**AutoTokenizer.from_pretrained(saved)("one", "two", return_tensors="pt")).logits[0]
    best = int(logits.argmax())
    assert capsys.readouterr().out == f"{LABELS[best]} {logits.softmax(-1)[best]:.3f}\n"
    with pytest.raises(UserError, match="text 1 must be two with one tab between them"):
        in_process(saved, "one", "--pairs")


@pytest.mark.parametrize("problem_type", ["regression", None])
def test_regression_prints_the_number(problem_type, saved, tmp_path, capsys):
    torch.manual_seed(1)
    config = LinformerConfig.from_pretrained(saved, num_labels=1, problem_type=problem_type)
    model = LinformerForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    tokenizer.save_pretrained(tmp_path)
    in_process(tmp_path, TEXTS[0])
    with torch.no_grad():
        value = model(**tokenizer(TEXTS[0], return_tensors="pt")).logits.item()
    assert capsys.readouterr().out == f"value {value:.3f}\n"


def test_several_labels_have_a_probability_each(saved, tmp_path, capsys):
    model = LinformerForSequenceClassification.from_pretrained(saved, problem_type="multi_label_classification").eval()
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    tokenizer.save_pretrained(tmp_path)
    in_process(tmp_path, TEXTS[0], "--top_k", "3")
    with torch.no_grad():
        scores = model(**tokenizer(TEXTS[0], return_tensors="pt")).logits[0].sigmoid().tolist()
    ranked = sorted(zip(scores, LABELS), reverse=True)
    assert capsys.readouterr().out == "  ".join(f"{label} {score:.3f}" for score, label in ranked) + "\n"


def test_a_model_whose_head_was_never_trained_is_refused(saved, tmp_path):
    LinformerForSequenceClassification.from_pretrained(saved).linformer.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(saved).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is no trained classifier: it lacks 4 weights .* classifier.dense.bias"):
        in_process(tmp_path, "text")


def test_bad_input_is_refused(saved, tmp_path):
    with pytest.raises(UserError, match="the text to classify is empty"):
        in_process(saved, "  ")
    with pytest.raises(UserError, match="cannot load the model .*nowhere"):
        in_process(tmp_path / "nowhere", "text")
    with pytest.raises(UserError, match="--top_k must be at least 1, not 0"):
        in_process(saved, "text", "--top_k", "0")
    half = tmp_path / "half"
    half.mkdir()
    for path in saved.iterdir():
        if path.is_file():
            half.joinpath(path.name).write_bytes(path.read_bytes()[: -200 if path.suffix == ".safetensors" else None])
    with pytest.raises(UserError, match="cannot load the model .*half"):
        in_process(half, "text")
