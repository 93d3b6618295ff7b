"""scripts/predict.py: many documents of every kind, on tiny models with random weights.

python -m pytest tests/test_predict.py
"""

import csv
import gzip
import io
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from tokenizers import normalizers, processors
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForSequenceClassification,
)

import answers
import long_texts
import predict
from common import UserError, run_main
from documents import rows_of
from hf_linformer import LinformerConfig
from tiny import WORDS, save_classifier, save_source, tiny_tokenizer


ROOT = Path(__file__).resolve().parent.parent
# What the models read at most, two special tokens included.
N = 24
LABELS = ["law", "war", "land"]
MODELS = ["linformer", "bert"]


@pytest.fixture(autouse=True)
def one_package():
    """Pytest imports the root's __init__.py too, under the folder's name; the scripts know the package alone."""
    AutoConfig.register("linformer", LinformerConfig, exist_ok=True)


def save_bert(folder: Path, labels: list[str] = LABELS, **changes) -> Path:
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: index for index, name in enumerate(labels)}}
    save_source(folder, changes.pop("model_type", "bert"), "sequence_classification", **names, **changes)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    pooled = {"classifier_pooling": "mean", "initializer_range": 0.5, "local_window": 4}
    linformer = save_classifier(folder / "linformer", LABELS, vocab_size=53, pad_token_id=0, **pooled)
    for path in linformer.glob("*token*"):
        path.unlink()
    tiny_tokenizer(0).save_pretrained(linformer)
    return {"linformer": linformer, "bert": save_bert(folder / "bert")}


@pytest.fixture(scope="module")
def bert(models) -> Path:
    return models["bert"]


def words(count: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


# Of one token and of many, at the limit and one beside it, with what tables have to quote.
TEXTS = [words(count, seed) for seed, count in enumerate((30, 1, N - 2, 5, 70, N - 1, 11, N - 3))]
TEXTS += ['He said, "that, too – is\tlaw."', "caf\u00e9 \u6cd5 \U0001f600 of the people"]


def answer(folder: Path, text: str, **options) -> tuple[list[float], int]:
    """The logits of one text alone, as a reader of the library's documentation would get them, and its length."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(text, truncation=True, max_length=N, return_tensors="pt", **options)
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    return logits.tolist(), len(tokenizer(text, verbose=False)["input_ids"])


@pytest.fixture(scope="module")
def expected(models) -> dict[str, list[dict]]:
    """What every model has to say of TEXTS."""
    found: dict[str, list[dict]] = {name: [] for name in MODELS}
    for name in MODELS:
        for text in TEXTS:
            logits, length = answer(models[name], text)
            scores = torch.tensor(logits).softmax(-1).tolist()
            best = scores.index(max(scores))
            row = {"label": LABELS[best], "score": scores[best], **dict(zip(LABELS, scores))}
            found[name].append(row | {"tokens": length, "cut": length > N, "error": ""})
        assert len({round(row["score"], 3) for row in found[name]}) > len(TEXTS) / 2
        assert len({row["label"] for row in found[name]}) > 1
    return found


def assert_rows(rows: list[dict], expected: list[dict], ids: list[str] | None = None) -> None:
    for row, wanted in zip(rows, expected, strict=True):
        assert {name: row[name] for name in wanted} == pytest.approx(wanted, abs=1e-5)
    if ids is not None:
        assert [row["id"] for row in rows] == ids


def options(model: Path, given: list[Path] | Path, output: Path, *more) -> list[str]:
    files = given if isinstance(given, list) else [given]
    command = ["--model_name_or_path", model, "--input_file", *files, "--output_file", output, *more]
    return [str(part) for part in command]


def read(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def run(model: Path, given: list[Path] | Path, output: Path, *more) -> list[dict]:
    """The rows that the script writes to a new .jsonl file."""
    output.parent.mkdir(exist_ok=True)
    predict.main(options(model, given, output, "--overwrite", "true", *more))
    return read(output)


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def documents(tmp_path) -> Path:
    return write_lines(tmp_path / "documents.jsonl", [{"text": text} for text in TEXTS])


# Input


def packed(path: Path) -> Path:
    target = path.with_name(path.name + ".gz")
    target.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return target


def write_table(path: Path, texts: list) -> Path:
    """A table of two columns, the first of which numbers the rows."""
    rows = [{"number": f"no. {number}", "text": text} for number, text in enumerate(texts)]
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["number", "text"], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    elif path.suffix == ".jsonl":
        write_lines(path, rows)
    else:
        parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize("is_packed", [False, True], ids=["plain", "gz"])
def test_tables(suffix, is_packed, bert, expected, tmp_path):
    path = write_table(tmp_path / f"table{suffix}", TEXTS)
    path = packed(path) if is_packed else path
    # The text is the column of a usual name though all columns are text.
    rows = run(bert, path, tmp_path / "out.jsonl")
    assert_rows(rows, expected["bert"], [f"{path}:{number}" for number in range(1, len(TEXTS) + 1)])
    rows = run(bert, path, tmp_path / "out.jsonl", "--id_column", "number", "--text_column", "text")
    assert_rows(rows, expected["bert"], [f"no. {number}" for number in range(len(TEXTS))])


def test_a_json_file_can_hold_lines_and_long_lists(bert, expected, tmp_path, monkeypatch):
    path = write_lines(tmp_path / "lines.json", [{"text": text} for text in TEXTS])
    assert_rows(run(bert, path, tmp_path / "out.jsonl"), expected["bert"])
    # A block ends in the middle of every row, between rows, and in brackets that are text.
    texts = ["]}, {[", *TEXTS, '\\ " ]']
    for block in range(1, 60, 7):
        monkeypatch.setattr("documents.BLOCK", block)
        for indent in (None, 1):
            path.write_text(json.dumps([{"text": text} for text in texts], indent=indent))
            assert [row["text"] for row in rows_of(path)] == texts


def test_folders_are_read_in_order_and_all_through(bert, expected, tmp_path, capsys):
    folder = tmp_path / "contracts"
    (folder / "b").mkdir(parents=True)
    names = ["a.txt", "b/a.TXT", "b/c.txt", "c.txt.gz", "d.txt", "e.jsonl"]
    for name, text in zip(names[:5], TEXTS):
        # Line ends are the author's own.
        (folder / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    write_table(folder / names[5], TEXTS[5:])
    for name in (".hidden.txt", "b/.DS_Store", "notes.pdf", "b/more.pdf", "README"):
        (folder / name).write_text("no document")
    output = folder / "out.jsonl"
    ids = [*names[:5], *(f"e.jsonl:{number}" for number in range(1, 6))]
    # The second time the first output is there, and a third time what was left of a run.
    for _ in range(2):
        assert_rows(run(bert, folder, output), expected["bert"], ids)
    (folder / "out.jsonl.partial").write_text("")
    assert_rows(run(bert, folder, output), expected["bert"], ids)
    warning = "warning: files of other types are left out: 2 of .pdf, 1 of no suffix\n"
    assert capsys.readouterr().err.count(warning) == 3

    both = run(bert, [folder / "d.txt", folder / "b"], tmp_path / "out.jsonl")
    assert_rows(both, [expected["bert"][index] for index in (4, 1, 2)])
    assert [row["id"] for row in both] == [str(folder / name) for name in ("d.txt", "b/a.TXT", "b/c.txt")]


def test_standard_input(bert, expected, tmp_path, monkeypatch):
    content = "\ufeff" + "\r\n".join([*TEXTS[:3], "", *TEXTS[3:]])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    rows = run(bert, Path("-"), tmp_path / "out.jsonl")
    blank = rows.pop(3)
    assert blank["id"] == "stdin:4" and blank["error"] == "empty" and blank["label"] is None
    assert_rows(rows, expected["bert"], [f"stdin:{number}" for number in (1, 2, 3, *range(5, 12))])


def test_the_text_column_is_found_or_named(bert, tmp_path):
    only = write_lines(tmp_path / "only.jsonl", [{"n": 1, "id": "x", "clause": TEXTS[1]}])
    assert run(bert, only, tmp_path / "out.jsonl", "--id_column", "id")[0]["id"] == "x"
    with pytest.raises(UserError, match=r"cannot tell which of \['n', 'id', 'clause'\] of .*only.jsonl"):
        run(bert, only, tmp_path / "out.jsonl")
    with pytest.raises(UserError, match=r"only.jsonl has no column 'body'; it has \['n', 'id', 'clause'\]"):
        run(bert, only, tmp_path / "out.jsonl", "--text_column", "body")
    with pytest.raises(UserError, match=r"only.jsonl has no column 'name'"):
        run(bert, only, tmp_path / "out.jsonl", "--text_column", "clause", "--id_column", "name")


# Answers


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_each_document_alone(name, models, documents, expected, tmp_path, monkeypatch):
    """However documents are batched, in the order of the input."""
    shapes = []
    real = predict.forward

    def forward(rows, classifier):
        shapes.append((len(rows), max(map(len, rows)) + 2))
        return real(rows, classifier)

    monkeypatch.setattr(predict, "forward", forward)
    for tokens, chunk in ((1, 3), (60, 256), (60, 4), (16384, 256)):
        shapes.clear()
        settings = ["--per_device_eval_batch_tokens", tokens, "--chunk_size", chunk]
        rows = run(models[name], documents, tmp_path / "out.jsonl", *settings)
        assert_rows(rows, expected[name])
        assert all(count == 1 or count * length <= tokens for count, length in shapes)
        if chunk == 256:
            # Documents of about one length are read together.
            assert [length for _, length in shapes] == sorted((length for _, length in shapes), reverse=True)
        if tokens == 1:
            assert len(shapes) == len(TEXTS)
    assert shapes == [(len(TEXTS), N)]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_outputs(suffix, bert, expected, documents, tmp_path, capsys):
    documents.write_text(documents.read_text() + '{"text": " "}\n')
    output = tmp_path / "new" / f"labels{suffix}"
    predict.main(options(bert, documents, output))
    blank = dict.fromkeys(["label", "score", *LABELS, "tokens", "cut"]) | {"error": "empty"}
    columns = ["id", *blank]
    if suffix == ".csv":
        with output.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        as_read = {"": None, "true": True, "false": False}
        for row in rows:
            numbers = {name: float(row[name]) for name in ("score", *LABELS, "tokens") if row[name]}
            row |= {name: as_read.get(row[name], row[name]) for name in columns[:-1]} | numbers
    else:
        rows = read(output) if suffix == ".jsonl" else parquet.read_table(output).to_pylist()
    assert [list(row) for row in rows] == [columns] * len(rows)
    assert_rows(rows, [*expected["bert"], blank])
    assert sorted(path.name for path in output.parent.iterdir()) == [output.name, f"{output.name}.progress.json"]
    printed = capsys.readouterr().out
    cut = sum(row["cut"] for row in expected["bert"])
    assert f"{cut} of 10 ({cut / 10:.1%}) have more than 24 tokens and were cut" in printed
    assert "1 of 11 documents were skipped, see `error`: empty 1\n" in printed
    labels = [row["label"] for row in expected["bert"]]
    for label in set(labels):
        assert f"{label} {labels.count(label):>10} {labels.count(label) / 10:.4f}".split() in map(
            str.split, printed.splitlines()
        )
    assert f": {output}\n" in printed


@pytest.mark.parametrize("name", MODELS)
def test_windows_count_alike(name, models, documents, expected, tmp_path):
    rows = run(models[name], documents, tmp_path / "out.jsonl", "--windows", "true")
    model = AutoModelForSequenceClassification.from_pretrained(models[name]).eval()
    tokenizer = AutoTokenizer.from_pretrained(models[name])
    others = 0
    for row, text, whole in zip(rows, TEXTS, expected[name], strict=True):
        first, *inside, last = tokenizer(text, verbose=False)["input_ids"]
        count = math.ceil(len(inside) / (N - 2))
        scores = torch.zeros(len(LABELS))
        for number in range(count):
            # Some have a token more, the first ones.
            sizes = [len(inside) // count + (part < len(inside) % count) for part in range(count)]
            window = inside[sum(sizes[:number]) : sum(sizes[: number + 1])]
            assert 0 < len(window) <= N - 2
            with torch.no_grad():
                scores += model(torch.tensor([[first, *window, last]])).logits[0].softmax(-1) / count
        assert [row[label] for label in LABELS] == pytest.approx(scores.tolist(), abs=1e-5)
        assert row["label"] == LABELS[int(scores.argmax())] and row["score"] == row[row["label"]]
        assert row["tokens"] == whole["tokens"] and row["cut"] is False
        others += whole["cut"] and row["war"] != pytest.approx(whole["war"], abs=1e-3)
    assert others >= 2


def test_the_tokenizer_says_from_which_side_is_cut(bert, documents, tmp_path, monkeypatch):
    folder = shutil.copytree(bert, tmp_path / "left")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"truncation_side": "left"}))
    last = [answer(folder, text)[0] for text in TEXTS]
    assert last[0] != pytest.approx(answer(bert, TEXTS[0])[0], abs=1e-3)
    for characters in (long_texts.PIECE_CHARACTERS, 60):
        monkeypatch.setattr(long_texts, "PIECE_CHARACTERS", characters)
        rows = run(folder, documents, tmp_path / "out.jsonl")
        scores = [torch.tensor(logits).softmax(-1).tolist() for logits in last]
        assert [[row[label] for label in LABELS] for row in rows] == [pytest.approx(row, abs=1e-5) for row in scores]


@pytest.mark.parametrize("kind", ["words", "bytes"])
def test_long_texts_are_tokenized_in_pieces(kind, monkeypatch):
    """Without a loss, and not too many of them at a time."""
    tokenizer = tiny_tokenizer(0) if kind == "words" else AutoTokenizer.from_pretrained(ROOT / "tokenizer")
    texts = [*TEXTS, words(900, 1), "\n ".join(words(90, seed) for seed in range(9)), "people" * 400]
    whole = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    given = []
    real = type(tokenizer).__call__

    def call(self, text, **kwargs):
        given.append(text)
        return real(self, text, **kwargs)

    monkeypatch.setattr(type(tokenizer), "__call__", call)
    monkeypatch.setattr(long_texts, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(long_texts, "TOKENIZED_CHARACTERS", 300)
    tokens = predict.tokenize(texts, tokenizer)
    assert "".join(sum(given, [])) == "".join(texts) and max(map(len, sum(given, []))) == 100
    assert all(sum(map(len, some)) < 400 for some in given) and len(given) < len(sum(given, [])) / 2
    # The last text has no space to cut it at.
    assert [of_text.tolist() for of_text in tokens[:-1]] == whole[:-1]
    assert len(tokens[-1]) >= 24


@pytest.mark.parametrize("model_type", ["bert", "xlnet", "gpt2"])
def test_rows_are_given_as_the_tokenizer_would(model_type):
    """Also with types of tokens, special tokens at one end only, and none at all."""
    tokenizer = tiny_tokenizer(0)
    if model_type == "bert":
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    elif model_type == "xlnet":
        after = processors.TemplateProcessing("$A:0 [SEP]:0 [CLS]:2", special_tokens=[("[SEP]", 3), ("[CLS]", 2)])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]", padding_side="left"
        )
        tokenizer.backend_tokenizer.post_processor = after
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    else:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("$A:0")
    assert tokenizer.num_special_tokens_to_add() == (0 if model_type == "gpt2" else 2)
    rows = predict.tokenize(TEXTS, tokenizer)
    ours = tokenizer.pad(predict.with_special_tokens(rows, tokenizer), return_tensors="pt")
    theirs = tokenizer(TEXTS, padding=True, return_tensors="pt", verbose=False)
    assert ours.keys() == theirs.keys() and len(ours) == (2 if model_type == "gpt2" else 3)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_document_of_a_megabyte(bert, expected, tmp_path):
    (tmp_path / "big.txt").write_text(f"{TEXTS[0]} {'government ' * 100_000}")
    (row,) = run(bert, tmp_path / "big.txt", tmp_path / "out.jsonl")
    assert_rows([row], [expected["bert"][0] | {"tokens": 100_032}])


@pytest.fixture
def table_of_pairs(tmp_path) -> tuple[Path, list[tuple[str, str]]]:
    """Of which some fit, the first, the second or both are cut, and none of them is the other."""
    counts = [(5, 6), (10, 11), (11, 11), (30, 4), (4, 30), (10, 12), (12, 10), (40, 41), (41, 40), (1, 20), (21, 1)]
    pairs = [(words(first, number), words(second, 99 - number)) for number, (first, second) in enumerate(counts)]
    rows = [{"n": f"no. {number}", "claim": one, "source": two} for number, (one, two) in enumerate(pairs)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet", row_group_size=4)
    return tmp_path / "pairs.parquet", pairs


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_pairs_are_cut_and_answered_as_by_the_library(name, side, models, table_of_pairs, tmp_path):
    path, pairs = table_of_pairs
    folder = shutil.copytree(models[name], tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"truncation_side": side}
    if name == "bert":
        config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    columns = ["--text_column", "claim", "source", "--id_column", "n"]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Of an even and an odd number of tokens.
    for length in (N, N - 1):
        rows = run(folder, path, tmp_path / "out.jsonl", *columns, "--max_length", length, "--chunk_size", 4)
        assert [row["id"] for row in rows] == [f"no. {number}" for number in range(len(pairs))]
        for row, pair in zip(rows, pairs, strict=True):
            inputs = tokenizer(*pair, truncation="longest_first", max_length=length, return_tensors="pt")
            assert ("token_type_ids" in inputs and inputs["token_type_ids"].any()) == (name == "bert")
            with torch.no_grad():
                scores = model(**inputs).logits[0].softmax(-1).tolist()
            assert [row[label] for label in LABELS] == pytest.approx(scores, abs=1e-5)
            tokens = len(tokenizer(*pair, verbose=False)["input_ids"])
            assert (row["tokens"], row["cut"]) == (tokens, tokens > length)
    swapped = run(folder, path, tmp_path / "out.jsonl", "--text_column", "source", "claim")
    assert all(one["war"] != pytest.approx(other["war"], abs=1e-4) for one, other in zip(rows, swapped))


def test_a_pair_lacks_an_answer_where_either_text_cannot_be_read(bert, tmp_path):
    lines = [
        '{"a": "of", "b": "the"}',
        '{"a": "of", "b": " "}',
        '{"a": 1, "b": "the"}',
        "{",
        '{"b": "the", "a": "of"}',
    ]
    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines * 9).encode(), mtime=0)[:-9])
    (folder / "b.jsonl").write_text("\n".join(lines))
    rows = run(bert, folder, tmp_path / "out.jsonl", "--text_column", "a", "b")
    found = [(row["id"], row["error"]) for row in rows if row["id"].startswith("b.")]
    assert found == [
        ("b.jsonl:1", ""),
        ("b.jsonl:2", "empty"),
        ("b.jsonl:3", "not text: int"),
        ("b.jsonl:4", found[3][1]),
        ("b.jsonl:5", ""),
    ]
    assert found[3][1].startswith("cannot be read: Expecting")
    broken = [row for row in rows if row["id"].startswith("a.")]
    assert broken[-1]["id"] == "a.jsonl.gz" and "ended before the end-of-stream" in broken[-1]["error"]
    assert [row["label"] is not None for row in rows if row["id"].startswith("b.")] == [
        True,
        False,
        False,
        False,
        True,
    ]


def test_a_model_of_pairs_answers_pairs_only(bert, table_of_pairs, documents, tmp_path):
    path, _ = table_of_pairs
    folder = shutil.copytree(bert, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())

    def refused(reads_pairs: bool | None, given: Path, match: str, *more) -> None:
        (folder / "config.json").write_text(json.dumps(config | {"reads_pairs": reads_pairs}))
        with pytest.raises(UserError, match=match):
            predict.main(options(folder, given, tmp_path / "refused.jsonl", *more))

    two = ["--text_column", "claim", "source"]
    of_pairs = "model was fine-tuned on pairs of texts: name two columns with --text_column"
    refused(True, documents, of_pairs)
    refused(True, path, of_pairs, "--text_column", "claim")
    assert len(run(folder, path, tmp_path / "out.jsonl", *two)) == 11
    refused(False, path, "model was fine-tuned on single texts: name one column with --text_column", *two)
    assert len(run(folder, path, tmp_path / "out.jsonl", "--text_column", "claim")) == 11
    # A model that says nothing answers both; the rest concerns any model.
    refused(None, path, "--windows divides a text, and --text_column names two", *two, "--windows", "true")
    refused(None, path, "--max_length is 3, and 3 tokens of a pair are special ones", *two, "--max_length", 3)
    refused(None, path, "pairs.parquet has no column 'body'", "--text_column", "claim", "body")
    refused(None, path, "takes one column, or two for pairs of texts, not 3", *two, "n")
    texts = tmp_path / "texts"
    texts.mkdir()
    shutil.copy(path, texts)
    (texts / "a.txt").write_text("of")
    refused(None, texts, "--text_column claim source are two columns, and a.txt is no table", *two)
    assert not list(tmp_path.glob("refused*"))


def test_regression_gives_values(tmp_path, documents):
    folder = save_bert(tmp_path / "value", ["LABEL_0"], problem_type="regression")
    rows = run(folder, documents, tmp_path / "out.jsonl")
    assert list(rows[0]) == ["id", "value", "tokens", "cut", "error"]
    assert [row["value"] for row in rows] == [pytest.approx(answer(folder, text)[0][0], abs=1e-5) for text in TEXTS]
    # One label without a problem type is a regression for the library's loss too.
    other = save_bert(tmp_path / "untold", ["LABEL_0"])
    assert "problem_type" not in json.loads((other / "config.json").read_text())
    assert run(other, documents, tmp_path / "out.jsonl") == rows

    several = save_bert(tmp_path / "values", ["length", "age"], problem_type="regression")
    rows = run(several, documents, tmp_path / "out.jsonl")
    assert list(rows[0]) == ["id", "length", "age", "tokens", "cut", "error"]
    found = [[row["length"], row["age"]] for row in rows]
    assert found == [pytest.approx(answer(several, text)[0], abs=1e-5) for text in TEXTS]


def test_multi_label(tmp_path, documents, capsys):
    folder = save_bert(tmp_path / "labels", problem_type="multi_label_classification")
    scores = [torch.tensor(answer(folder, text)[0]).sigmoid().tolist() for text in TEXTS]
    for threshold in (0.5, 0.8):
        rows = run(folder, documents, tmp_path / "out.jsonl", "--threshold", threshold)
        assert list(rows[0]) == ["id", "label", *LABELS, "tokens", "cut", "error"]
        for row, wanted in zip(rows, scores, strict=True):
            assert [row[label] for label in LABELS] == pytest.approx(wanted, abs=1e-5)
            assert row["label"] == [label for label, score in zip(LABELS, wanted) if score >= threshold]
    assert {len(row["label"]) for row in rows} > {0}
    capsys.readouterr()
    predict.main(options(folder, documents, tmp_path / "out.csv", "--threshold", "0.5"))
    with (tmp_path / "out.csv").open(newline="") as file:
        cells = [row["label"] for row in csv.DictReader(file)]
    assert cells == ["; ".join(name for name, score in zip(LABELS, row) if score >= 0.5) for row in scores]
    assert any("; " in cell for cell in cells)
    counts = [sum(row[index] >= 0.5 for row in scores) for index in range(3)]
    printed = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert all([label, str(count)] in printed for label, count in zip(LABELS, counts) if count)
    predict.main(options(folder, documents, tmp_path / "out.parquet"))
    assert [row["label"] for row in parquet.read_table(tmp_path / "out.parquet").to_pylist()] == [
        [name for name, score in zip(LABELS, row) if score >= 0.5] for row in scores
    ]


def test_labels_with_the_names_of_columns(tmp_path, documents):
    labels = ["label", "error", "id", "probability of id", "twice", "twice"]
    folder = save_bert(tmp_path / "names", labels[:5])
    config = json.loads((folder / "config.json").read_text())
    # Saved by hand, as no dictionary of ids has one name twice.
    config["id2label"]["4"] = "error"
    (folder / "config.json").write_text(json.dumps(config))
    columns = ["probability of label", "probability of error", "probability of id"]
    columns += ["probability of probability of id", "probability of probability of error"]
    rows = run(folder, documents, tmp_path / "out.jsonl")
    assert list(rows[0]) == ["id", "label", "score", *columns, "tokens", "cut", "error"]
    for row, text in zip(rows, TEXTS):
        scores = torch.tensor(answer(folder, text)[0]).softmax(-1).tolist()
        assert [row[column] for column in columns] == pytest.approx(scores, abs=1e-5)
        assert row["label"] == [*labels[:4], "error"][scores.index(max(scores))]
        assert row["error"] == "" and row["id"].startswith(str(documents))


def test_the_table_of_positions_is_the_limit(tmp_path, documents):
    """RoBERTa's has two rows that belong to no token, and a tokenizer that knows no limit."""
    folder = save_bert(tmp_path / "roberta", model_type="roberta")
    tokenizer = tiny_tokenizer(1)
    tokenizer.model_max_length = 10**30
    tokenizer.save_pretrained(folder)
    rows = run(folder, documents, tmp_path / "out.jsonl")
    for row, text in zip(rows, TEXTS):
        scores = torch.tensor(answer(folder, text)[0]).softmax(-1).tolist()
        assert [row[label] for label in LABELS] == pytest.approx(scores, abs=1e-5)
    with pytest.raises(UserError, match="--max_length is 25, and .*roberta reads 24 tokens at most, 2 of them"):
        run(folder, documents, tmp_path / "out.jsonl", "--max_length", 25)
    shorter = run(folder, documents, tmp_path / "out.jsonl", "--max_length", 9)
    assert [row["cut"] for row in shorter] == [row["tokens"] > 9 for row in rows] != [row["cut"] for row in rows]


def test_bfloat16(bert, expected, documents, tmp_path):
    rows = run(bert, documents, tmp_path / "out.jsonl", "--dtype", "bfloat16")
    for row, wanted in zip(rows, expected["bert"], strict=True):
        assert row[wanted["label"]] == pytest.approx(wanted["score"], abs=0.05)
    assert any(row["war"] != pytest.approx(wanted["war"], abs=1e-5) for row, wanted in zip(rows, expected["bert"]))


# Documents that cannot be classified


def bad_parquet(path: Path) -> None:
    """Three strings, the second of which is no UTF-8."""
    values = pa.array([TEXTS[1].encode(), b"the \xe9 law", TEXTS[3].encode()])
    parquet.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 3, values.buffers())}), path)


def test_bad_documents_are_skipped_with_their_reasons(bert, expected, tmp_path, capsys):
    folder = tmp_path / "bad"
    folder.mkdir()
    good = TEXTS[1].encode()
    packed_rows = gzip.compress(b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS), mtime=0)
    files = {
        "a.txt": good,
        "b.txt": b"the \xc3\xa9 law\xff of",
        "c.txt": b" \n\t",
        "d.txt": b"",
        "e.txt": "the law".encode("utf-16"),
        "f.txt.gz": gzip.compress(b"the law" * 99)[:-12],
        "g.txt.gz": b"no gzip at all",
        "h.csv": b'text\nof\n"the ""law"""\n"of"the\n\xff\nin,by\n"",\n""\nof\n"never closed\nof\nof\n',
        "i.jsonl": b'{"text": "of"}\n{"text": \n{"text": null}\n{"text": 5}\n[1]\n"of"\n{"text": "\\ud83d law"}\n'
        b'{"body": "of"}\n\n{"text": "a\xfeb"}\n' + b"[" * 100_000 + b'\n{"text": "of"}\n',
        "j.json": b'[{"text": "of"}, 7, {"text": "of"}, {"text: ',
        "l.parquet": b"PAR1 and no more",
        "m.jsonl.gz": packed_rows[:-20],
        "n.csv": b"",
        "o.csv": b"text\n",
        "p.json": b"[]",
        "r.txt": "\u0001\u0002".encode(),
        "z.txt": good,
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    bad_parquet(folder / "k.parquet")
    (folder / "q.txt").symlink_to("nowhere.txt")
    with (folder / os.fsdecode(b"s\xff.txt")).open("wb") as file:
        file.write(good)
    with pytest.raises(SystemExit) as exit_code:
        run_main(lambda: predict.main(options(bert, folder, tmp_path / "out.jsonl", "--chunk_size", 5)))
    assert exit_code.value.code == 0
    rows = read(tmp_path / "out.jsonl")
    reasons = {row["id"]: row["error"] for row in rows if row["error"]}
    unread = "cannot be read: "
    assert reasons == {
        "b.txt": "not valid UTF-8: byte 0xff at position 10 of the text",
        "c.txt": "empty",
        "d.txt": "empty",
        "e.txt": "not valid UTF-8: byte 0xff at position 0 of the text",
        "f.txt.gz": unread + "Compressed file ended before the end-of-stream marker was reached",
        "g.txt.gz": unread + "Not a gzipped file (b'no')",
        "h.csv:3": unread + "lines 4 to 4: ',' expected after '\"'",
        "h.csv:4": "not valid UTF-8: byte 0xff at position 0 of the text",
        "h.csv:5": unread + "the row has 2 values for 1 columns",
        "h.csv:6": unread + "the row has 2 values for 1 columns",
        "h.csv:7": "empty",
        "h.csv:9": unread + "lines 10 to 12: unexpected end of data",
        "i.jsonl:2": unread + "Expecting value: line 2 column 1 (char 10)",
        "i.jsonl:3": "no text",
        "i.jsonl:4": "not text: int",
        "i.jsonl:5": unread + "the row is a list, which has no columns",
        "i.jsonl:6": unread + "the row is a str, which has no columns",
        "i.jsonl:7": "not valid UTF-8: half a character, U+D83D, at position 0 of the text",
        "i.jsonl:8": "no text",
        "i.jsonl:9": "not valid UTF-8: byte 0xfe at position 1 of the text",
        "i.jsonl:10": reasons["i.jsonl:10"],
        "j.json:2": unread + "the row is a int, which has no columns",
        "j.json": unread + "the list is broken, or has no end",
        "k.parquet:2": "not valid UTF-8: byte 0xe9 at position 4 of the text",
        "l.parquet": reasons["l.parquet"],
        "m.jsonl.gz": unread + "Compressed file ended before the end-of-stream marker was reached",
        "n.csv": unread + "the file holds no rows",
        "o.csv": unread + "the file holds no rows",
        "p.json": unread + "the file holds no rows",
        "q.txt": reasons["q.txt"],
    }
    for name in ("i.jsonl:10", "l.parquet", "q.txt"):
        assert reasons[name].startswith(unread) and "\n" not in reasons[name]
    assert all(row["label"] is None and row["tokens"] is None for row in rows if row["error"])
    sound = {row["id"]: row for row in rows if not row["error"]}
    one = ["a.txt", "k.parquet:1", "s\\udcff.txt", "z.txt"]
    assert_rows([sound[name] for name in one], [expected["bert"][1]] * 4)
    assert_rows([sound["k.parquet:3"]], [expected["bert"][3]])
    rest = {"h.csv:1", "h.csv:2", "h.csv:8", "i.jsonl:1", "i.jsonl:11", "j.json:1", "j.json:3", "r.txt"}
    assert {name for name in sound if not name.startswith("m.")} == {*one, "k.parquet:3", *rest}
    printed = capsys.readouterr().out
    kinds = {reason.partition(":")[0] for reason in reasons.values()}
    for kind in kinds:
        assert f"{kind} {sum(reason.startswith(kind) for reason in reasons.values())}" in printed
    assert f"{len(reasons)} of {len(rows)} documents were skipped, see `error`" in printed


def test_no_token_and_no_finite_number(bert, tmp_path, documents):
    folder = shutil.copytree(bert, tmp_path / "nan")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    torch.nn.init.constant_(model.classifier.bias, math.nan)
    model.save_pretrained(folder)
    unanswered = "no document was answered, most often for the reason '{}': see `error` in .*out.jsonl"
    with pytest.raises(UserError, match=unanswered.format("not finite")):
        run(folder, documents, tmp_path / "out.jsonl")
    assert {row["error"] for row in read(tmp_path / "out.jsonl")} == {"not finite: what the model answers"}
    # WordPiece drops control characters, after which nothing is left.
    tokenizer = tiny_tokenizer(0)
    tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.save_pretrained(folder)
    path = write_lines(tmp_path / "control.jsonl", [{"text": "\u0001\u0002"}])
    with pytest.raises(UserError, match=unanswered.format("empty")):
        run(folder, path, tmp_path / "out.jsonl")
    assert read(tmp_path / "out.jsonl")[0]["error"] == "empty: it has no tokens"
    # Nor does it become a success by being there.
    given = options(folder, path, tmp_path / "out.jsonl", "--resume", "true")
    with pytest.raises(SystemExit) as exit_code:
        run_main(lambda: predict.main(given))
    assert exit_code.value.code == 2


# What is written, and going on


class Stopped(Exception):
    pass


def stop_at(monkeypatch, nth: int) -> None:
    """Stop a run in its nth chunk."""
    real, calls = predict.classify, []

    def classify(*args):
        calls.append(1)
        if len(calls) == nth:
            raise Stopped
        return real(*args)

    monkeypatch.setattr(predict, "classify", classify)


def stop(model: Path, given: Path, output: Path, *more, nth: int = 3) -> None:
    """Run until the chunk of two documents with that number."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, nth)
        with pytest.raises(Stopped):
            predict.main(options(model, given, output, "--chunk_size", 2, *more))


def test_output_is_never_replaced_unasked_nor_half(bert, documents, tmp_path, capsys):
    output, part = tmp_path / "out.csv", tmp_path / "out.csv.partial"
    stop(bert, documents, output)
    assert not output.exists() and len(part.read_text().splitlines()) == 5
    with pytest.raises(UserError, match=r"out.csv.partial is there: go on with --resume true, or replace it with"):
        predict.main(options(bert, documents, output))
    predict.main(options(bert, documents, output, "--overwrite", "true"))
    whole = output.read_bytes()
    with pytest.raises(UserError, match=r"out.csv is there: go on"):
        predict.main(options(bert, documents, output))
    # Another run that does not come to its end.
    again = ["--chunk_size", 2, "--windows", "true", "--resume", "true"]
    stop(bert, documents, output, "--windows", "true", "--overwrite", "true")
    assert output.read_bytes() == whole and part.exists()
    capsys.readouterr()
    predict.main(options(bert, documents, output, *again))
    assert output.read_bytes() != whole and not part.exists()
    assert "6 documents in" in capsys.readouterr().out
    # A run that is at its end has nothing to do, if it is the same.
    whole = output.read_bytes()
    predict.main(options(bert, documents, output, *again))
    assert "out.csv is whole: there is nothing to do" in capsys.readouterr().out
    known = documents.read_text()
    for changed, message in (
        (
            known + '{"text": "new"}\n',
            "out.csv is whole, and there are more than its 10 documents now: answer the new",
        ),
        ('{"text": "new"}\n' + known, "cannot resume .*out.csv: the first 10 documents are not those"),
    ):
        documents.write_text(changed)
        with pytest.raises(UserError, match=message):
            predict.main(options(bert, documents, output, *again))
    documents.write_text(known)
    with pytest.raises(UserError, match="cannot resume .*out.csv with other arguments: windows was True and is False"):
        predict.main(options(bert, documents, output, "--resume", "true"))
    # What a run leaves that began to replace it and was killed before it had written down that it began.
    part.write_bytes(whole[:9])
    predict.main(options(bert, documents, output, *again))
    assert "nothing to resume for" in capsys.readouterr().err
    assert output.read_bytes() == whole and not part.exists()
    (tmp_path / "out.csv.progress.json").unlink()
    with pytest.raises(UserError, match="out.csv is there, but not .*out.csv.progress.json; replace it with"):
        predict.main(options(bert, documents, output, *again))
    assert output.read_bytes() == whole
    with pytest.raises(UserError, match="--resume goes on and --overwrite begins again"):
        predict.main(options(bert, documents, output, "--resume", "true", "--overwrite", "true"))


def test_only_the_same_run_is_resumed(bert, documents, tmp_path):
    model = shutil.copytree(bert, tmp_path / "model")
    output = tmp_path / "out.jsonl"
    run(model, documents, tmp_path / "whole.jsonl", "--chunk_size", 2)
    stop(model, documents, output)
    before = (tmp_path / "out.jsonl.partial").read_bytes()

    def refused(match: str, *more) -> None:
        with pytest.raises(UserError, match=match):
            predict.main(options(model, documents, output, "--chunk_size", 2, "--resume", "true", *more))
        assert (tmp_path / "out.jsonl.partial").read_bytes() == before

    refused("other arguments: threshold was 0.5 and is 0.7$", "--threshold", 0.7)
    refused("other arguments: max_length was 24 and is 9$", "--max_length", 9)
    refused("other arguments: dtype was float32 and is bfloat16; SHA-256 of the conf", "--dtype", "bfloat16")
    refused("text_column was None and is text$", "--text_column", "text")
    weights = (model / "model.safetensors").read_bytes()
    changed = AutoModelForSequenceClassification.from_pretrained(model)
    torch.nn.init.zeros_(changed.classifier.bias)
    changed.save_pretrained(model)
    refused("other arguments: SHA-256 of the weights was [0-9a-f]{64} and is [0-9a-f]{64}$")
    (model / "model.safetensors").write_bytes(weights)
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(config.replace('"land"', '"sea"'))
    refused("other arguments: SHA-256 of the configuration was")
    (model / "config.json").write_text(config)
    tokenizer = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").write_text(tokenizer.replace('"people": 29', '"persons": 29'))
    assert (model / "tokenizer.json").read_text() != tokenizer
    refused("other arguments: SHA-256 of the tokenizer was")
    (model / "tokenizer.json").write_text(tokenizer)

    lines = documents.read_text().splitlines(keepends=True)
    for other in (['{"text": "of"}\n', *lines[1:]], lines[1:], lines[:3], [lines[1], lines[0], *lines[2:]]):
        documents.write_text("".join(other))
        refused("the first 4 documents are not those that it was made of; begin again with --overwrite true")
    documents.write_text("".join(lines))
    (tmp_path / "out.jsonl.progress.json").write_text("{")
    refused("out.jsonl.progress.json is damaged; begin again with --overwrite true")


def test_a_resumed_run_may_take_other_batches(bert, documents, tmp_path, expected, capsys):
    output = tmp_path / "out.jsonl"
    stop(bert, documents, output)
    settings = ["--chunk_size", 5, "--per_device_eval_batch_tokens", 40, "--resume", "true"]
    predict.main(options(bert, documents, output, *settings))
    assert_rows(read(output), expected["bert"])
    # The summary is of all documents, the speed of those that were left.
    wanted = expected["bert"]
    counts = Counter(row["label"] for row in wanted)
    printed = capsys.readouterr().out
    assert [line.split()[:2] for line in printed.splitlines()[1 : 1 + len(counts)]] == [
        [label, str(count)] for label, count in counts.most_common()
    ]
    assert f"{sum(row['cut'] for row in wanted)} of 10 (" in printed and "\n6 documents in" in printed


def test_a_full_disk_is_said_and_survived(bert, documents, tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    whole = run(bert, documents, tmp_path / "whole.jsonl", "--chunk_size", 2)
    real, calls = os.fsync, []

    def fsync(number):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match="cannot write .*out.jsonl: .*No space left.* go on with --resume true"):
        predict.main(options(bert, documents, output, "--chunk_size", 2))
    predict.main(options(bert, documents, output, "--chunk_size", 2, "--resume", "true"))
    assert read(output) == whole


def test_a_device_that_is_full_is_said(bert, documents, tmp_path, monkeypatch):
    def forward(self, **inputs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(BertForSequenceClassification, "forward", forward)
    with pytest.raises(UserError, match="a batch of 10 x 24 tokens does not fit .* lower --per_device_eval_batch_tok"):
        run(bert, documents, tmp_path / "out.jsonl")


def forkserver():
    """Processes that begin with torch and the script imported."""
    pytest.importorskip("fcntl", reason="processes are forked from a server that has imported torch already")
    folders = [str(Path(predict.__file__).parent), str(Path(__file__).parent)]
    os.environ["PYTHONPATH"] = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["predict", __name__])
    return context


def die_when(moment: str, nth: int) -> None:
    """Make this process kill itself as it is about to do something for the nth time, or has done half of it."""
    owner, name, is_meant = {
        "rows are on the disk": (os, "fsync", lambda number: True),
        "the record is replaced": (os, "replace", lambda aside, path: path.suffix == ".json"),
        "the output is put in place": (os, "replace", lambda aside, path: path.suffix != ".json"),
        "the part is removed": (Path, "unlink", lambda path: path.suffix == ".partial"),
    }[moment]
    real, calls = getattr(owner, name), []

    def replaced(*args, **kwargs):
        calls.extend([1] * is_meant(*args))
        if len(calls) == nth:
            if moment == "rows are on the disk":
                # Half of a row.
                os.ftruncate(args[0], max(0, os.fstat(args[0]).st_size - 7))
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, replaced)


def run_script(arguments: list[str], moment: tuple[str, int] | None) -> None:
    torch.set_num_threads(1)
    if moment is not None:
        die_when(*moment)
    predict.main(arguments)


def run_until(arguments: list[str], until: Callable[[], bool] = lambda: False, moment=None) -> int | None:
    """The exit code of the script in a process of its own, which is killed once `until` is true."""
    process = forkserver().Process(target=run_script, args=(arguments, moment))
    process.start()
    deadline = time.monotonic() + 60
    while process.is_alive() and time.monotonic() < deadline and not until():
        time.sleep(0.0005)
    process.kill()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("suffix, name", [(".csv", "bert"), (".jsonl", "linformer"), (".parquet", "bert")])
def test_it_resumes_exactly_after_being_killed(suffix, name, models, tmp_path):
    generator = random.Random(suffix)
    texts = [words(generator.randint(1, 60), number) for number in range(180)]
    texts[17] = texts[100] = " "
    path = write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    settings = ["--chunk_size", 3, "--windows", "true"]
    whole, output = tmp_path / f"whole{suffix}", tmp_path / f"out{suffix}"
    predict.main(options(models[name], path, whole, *settings))
    record = tmp_path / f"out{suffix}.progress.json"
    arguments = options(models[name], path, output, *settings, "--resume", "true")

    def done() -> int:
        return json.loads(record.read_text())["progress"]["documents"] if record.exists() else -1

    def some_time_after(documents: int) -> Callable[[], bool]:
        moment, seen = generator.uniform(0, 0.02), []

        def until() -> bool:
            if not seen and done() >= documents:
                seen.append(time.monotonic())
            return bool(seen) and time.monotonic() - seen[0] >= moment

        return until

    kills: list[dict] = [{"until": some_time_after(20)}, {"moment": ("rows are on the disk", 4)}]
    if suffix == ".csv":
        kills = [{"moment": ("rows are on the disk", 1)}, {"moment": ("the record is replaced", 1)}, *kills]
        kills += [{"moment": ("the record is replaced", 3)}, {"until": some_time_after(90)}]
    kills += [{"moment": ("the output is put in place", 1)}]
    kills += [{"moment": ("the part is removed", 1)}] if suffix == ".parquet" else []
    before = -1
    for kill in kills:
        assert run_until(arguments, **kill) == -signal.SIGKILL, kill
        assert output.exists() == (kill.get("moment") == ("the part is removed", 1))
        assert done() >= before
        before = done()
    assert before == len(texts)
    assert run_until(arguments) == 0
    assert output.read_bytes() == whole.read_bytes()
    left = {path.name for path in tmp_path.iterdir() if path.name.startswith((".", "out"))}
    assert left == {output.name, record.name}
    records = [json.loads(path.read_text()) for path in (record, tmp_path / f"whole{suffix}.progress.json")]
    assert records[0]["progress"] == records[1]["progress"]


# Memory


def test_no_more_is_read_than_a_chunk(bert, tmp_path, monkeypatch):
    """By documents, and by characters."""
    ahead, read_by = [], []

    def count(documents):
        for document in documents:
            read_by.append(document)
            yield document

    real = predict.read_documents
    monkeypatch.setattr(predict, "read_documents", lambda *args: count(real(*args)))
    real_predict = predict.predict

    def predicted(chunk, *args):
        ahead.append((len(chunk), sum(len(document.text) for document in chunk), len(read_by)))
        return real_predict(chunk, *args)

    monkeypatch.setattr(predict, "predict", predicted)
    path = write_lines(tmp_path / "texts.jsonl", [{"text": words(10, number)} for number in range(50)])
    run(bert, path, tmp_path / "out.jsonl", "--chunk_size", 7)
    assert [read for _, _, read in ahead] == [7, 14, 21, 28, 35, 42, 49, 50]
    monkeypatch.setattr(answers, "CHUNK_CHARACTERS", 200)
    ahead.clear()
    run(bert, path, tmp_path / "out.jsonl", "--chunk_size", 7)
    longest = max(len(words(10, number)) for number in range(50))
    assert all(characters < 200 + longest for _, characters, _ in ahead) and len(ahead) > 8


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".json", ".jsonl", ".parquet", ".jsonl.gz"])
def test_memory_does_not_grow_with_the_documents(suffix, bert, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "CHUNK_CHARACTERS", 40_000)
    monkeypatch.setattr("documents.BLOCK", 2**13)

    def no_answers(texts, *args):
        return torch.zeros(len(texts), len(LABELS)), [9] * len(texts)

    monkeypatch.setattr(predict, "classify", no_answers)
    text = words(2000, 0)
    peaks = []
    for count in (20, 20, 160):
        folder = tmp_path / f"{len(peaks)}"
        folder.mkdir()
        if suffix == ".txt":
            for number in range(count):
                (folder / f"{number}.txt").write_text(text)
        else:
            path = write_table(folder / f"texts{suffix.removesuffix('.gz')}", [f"{text} {n}" for n in range(count)])
            path = packed(path) if suffix.endswith(".gz") else path
        tracemalloc.start()
        rows = run(bert, folder, tmp_path / "out.jsonl")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(rows) == count
    # The first run imports what it needs. All texts of the last are 1.4 MB.
    assert peaks[2] - peaks[1] < 3e5, peaks


# What the user can mend


def test_bad_input_is_refused(bert, documents, tmp_path):
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "notes.pdf").write_text("x")
    (tmp_path / "notes.docx").write_text("x")
    (tmp_path / "a.txt").write_text("of")
    output = tmp_path / "out.jsonl"
    refusals = [
        (tmp_path / "nowhere", [], "nowhere does not exist"),
        (tmp_path / "nothing", [], "nothing holds no file of"),
        (tmp_path / "notes.docx", [], "notes.docx is of unknown type '.docx'; known"),
        (
            tmp_path / "a.txt",
            ["--text_column", "text"],
            "needs a table, and .*a.txt holds none that has it",
        ),
        (tmp_path / "a.txt", ["--id_column", "id"], "--id_column needs a table"),
        (documents, ["--max_length", 2], "--max_length is 2, and .*bert reads 24 tokens at most, 2 of them special"),
        (documents, ["--max_length", 0], "--max_length must be at least 1, not 0"),
        (documents, ["--max_length", 25], "--max_length is 25, and"),
        (documents, ["--chunk_size", 0], "--chunk_size must be at least 1, not 0"),
        (documents, ["--per_device_eval_batch_tokens", 0], "--per_device_eval_batch_tokens must be at least 1"),
        (documents, ["--threshold", 1.5], "--threshold is a probability, from 0 to 1, not 1.5"),
        (documents, ["--output_file", tmp_path / "out.xlsx"], "out.xlsx must be a file that ends in .csv, .jsonl or"),
        (documents, ["--output_file", documents], "documents.jsonl is what --output_file would replace"),
        (documents, ["--output_file", documents / "out.csv"], "cannot write .*out.csv"),
    ]
    kept = documents.read_bytes()
    for given, more, message in refusals:
        with pytest.raises(UserError, match=message):
            predict.main(options(bert, given, output, *more))
    assert documents.read_bytes() == kept and not list(tmp_path.glob("out*"))


def test_no_documents_are_refused(bert, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(SystemExit) as exit_code:
        run_main(lambda: predict.main(options(bert, Path("-"), tmp_path / "out.csv")))
    assert exit_code.value.code == 2 and not list(tmp_path.iterdir())


def test_models_that_are_no_trained_classifiers_are_refused(bert, models, documents, tmp_path):
    def refused(folder: Path, match: str) -> None:
        with pytest.raises(UserError, match=match):
            predict.main(options(folder, documents, tmp_path / "out.jsonl"))

    refused(tmp_path / "nowhere", "cannot load the model .*nowhere")
    save_source(tmp_path / "base", "bert")
    refused(tmp_path / "base", "no trained classifier: it lacks 2 weights of a BertForSequenceClass.*classifier.bias;")
    linformer = shutil.copytree(models["linformer"], tmp_path / "linformer")
    weights = (linformer / "model.safetensors").read_bytes()
    (linformer / "model.safetensors").write_bytes(weights[:-200])
    refused(linformer, "cannot load the model .*linformer")
    (linformer / "model.safetensors").unlink()
    torch.save({}, linformer / "pytorch_model.bin")
    refused(linformer, "cannot load the model .*linformer")

    folder = shutil.copytree(bert, tmp_path / "other")
    tokenizer = tiny_tokenizer(0)
    tokenizer.add_tokens([f"word{number}" for number in range(30)])
    tokenizer.save_pretrained(folder)
    refused(folder, f"has {len(tokenizer)} entries, the model 53")
    tokenizer = tiny_tokenizer(0)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    refused(folder, "must be a fast one, with a token to pad with")

    t5 = T5Config(vocab_size=53, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, eos_token_id=3)
    T5ForSequenceClassification(t5).save_pretrained(tmp_path / "t5")
    tokenizer = tiny_tokenizer(0)
    tokenizer.model_max_length = 10**30
    tokenizer.save_pretrained(tmp_path / "t5")
    refused(tmp_path / "t5", "t5 does not say how many tokens it reads; say it with --max_length")
