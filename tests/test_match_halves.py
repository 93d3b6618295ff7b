"""scripts/match_halves.py and scripts/halves_table.py, on tiny models with random weights."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast, T5Config, T5Model

import match_halves
from common import UserError
from halves_table import halves_table
from hf_linformer import LinformerConfig, LinformerModel
from match_halves import Arguments, embed, halves_of, interval, measure, ranks_of, rows_of


ROOT = Path(__file__).resolve().parent.parent
SIZES = {
    "vocab_size": 32768,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "initializer_range": 0.5,
}
WORDS = (ROOT / "LICENSE").read_text(encoding="utf-8").split()


def save(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "tokenizer").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(ROOT / "tokenizer")


@pytest.fixture(scope="module")
def bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES, max_position_embeddings=40, pad_token_id=1)).eval()


@pytest.fixture(scope="module")
def linformer() -> LinformerModel:
    torch.manual_seed(0)
    mean_pool = {"projection_type": "mean_pool", "projected_length": 8, "local_window": 4}
    return LinformerModel(LinformerConfig(**SIZES, **mean_pool, max_position_embeddings=200)).eval()


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> Path:
    """Eight documents of 60 words, one of them again, one that is too short, and a row without text."""
    texts = [" ".join(WORDS[start : start + 60]) for start in range(0, 480, 60)]
    path = tmp_path_factory.mktemp("halves") / "documents.parquet"
    Dataset.from_dict({"text": [*texts, texts[0], "too short", None]}).to_parquet(path)
    return path


def given(**options) -> Arguments:
    return Arguments(**{"model_name_or_path": "", "validation_file": [], "min_words": 2} | options)


# Documents


def test_a_document_is_cut_at_its_middle_word():
    assert halves_of(["a b\nc  d e"], given()) == [("a b", "c d e", 0)]


def test_short_empty_and_repeated_documents_are_left_out():
    texts = ["a b c d", "a b c", "", None, "a  b c\nd", "e f g h"]
    assert halves_of(texts, given(min_words=4)) == [("a b", "c d", 0), ("e f", "g h", 5)]


def test_long_documents_are_cut_or_give_pieces():
    texts = ["a b c d e f g h i", "j k"]
    assert halves_of(texts, given(max_words=4)) == [("a b", "c d", 0), ("j", "k", 1)]
    pieces = halves_of(texts, given(max_words=4, pieces_per_document=2))
    assert pieces == [("a b", "c d", 0), ("e f", "g h", 0), ("j", "k", 1)]
    # The ninth word is a piece that is too short.
    assert halves_of(texts, given(max_words=4, pieces_per_document=9)) == pieces


def test_documents_are_drawn_by_the_seed():
    texts = [f"{number} x" for number in range(50)]
    drawn = [halves_of(texts, given(max_eval_samples=5, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 5
    assert halves_of(texts, given(max_eval_samples=50)) == halves_of(texts, given())


# Ranks


def unit(*angles: float) -> torch.Tensor:
    """Vectors at so many degrees."""
    radians = torch.tensor(angles, dtype=torch.float64).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=1)


def test_ranks_by_hand():
    first, second = unit(0, 90, 180), unit(10, 20, 30)
    # At 0 degrees 10 is nearest, at 90 it is 30 and then 20, at 180 it is 30.
    assert ranks_of(first, second).tolist() == [1, 2, 1]
    # Of 10, 20 and 30 degrees 0 is nearest, then 90, then 180.
    assert ranks_of(second, first).tolist() == [1, 2, 3]
    values = measure(np.array([[1, 1], [2, 2], [1, 3]]), None, np.arange(3), seed=0)
    assert values["recall_at_1"] == pytest.approx(3 / 6)
    assert values["mrr"] == pytest.approx((1 + 1 / 2 + 1 + 1 + 1 / 2 + 1 / 3) / 6)


def test_intervals_are_those_of_texts_drawn_again():
    found = np.random.default_rng(0).integers(0, 2, 400).astype(float)
    low, high = interval(found, np.arange(400), seed=0)
    # Twice the standard error of a mean, nearly.
    assert (found.mean() - low, high - found.mean()) == pytest.approx((1.96 * 0.5 / 20,) * 2, rel=0.1)
    # Pieces of a text that are found together are worth one: ten of each, and the interval is wider by sqrt(10).
    together = np.repeat(found[:40], 10)
    low, high = interval(together, np.repeat(np.arange(40), 10), seed=0)
    assert high - low == pytest.approx(2 * 1.96 * found[:40].std() / 40**0.5, rel=0.1)
    # With as many values of one text as of all others, no draw is a mean of the 12 as they are.
    uneven = interval(np.array([1.0] * 6 + [0.0] * 6), np.array([0] * 6 + list(range(1, 7))), seed=0)
    assert uneven[0] == 0 and 0.5 < uneven[1] < 1


def test_a_model_compared_with_another_on_the_same_documents():
    ranks, others = np.array([[1, 1], [1, 2], [3, 1], [2, 2]] * 50), np.array([[1, 1], [2, 2], [3, 1], [2, 2]] * 50)
    values = measure(ranks, others, np.arange(200), seed=0)
    # One in eight is found that the other does not find, and none the other way.
    assert values["difference"] == pytest.approx(1 / 8)
    assert 0.09 < values["difference_low"] < 1 / 8 < values["difference_high"] < 0.16
    assert values["recall_at_1_low"] < 0.5 < values["recall_at_1_high"]
    same = measure(ranks, ranks, np.arange(200), seed=0)
    assert (same["difference"], same["difference_low"], same["difference_high"]) == (0, 0, 0)


def test_ties_and_what_is_no_number_count_against_the_model():
    equal = torch.ones(3, 1)
    assert ranks_of(equal, equal).tolist() == [3, 3, 3]
    broken = unit(0, 90)
    broken[0] = float("nan")
    assert ranks_of(broken, unit(0, 90)).tolist() == [2, 1]


# Embeddings


def means(model, rows: list[list[list[int]]]) -> torch.Tensor:
    """The direction of the mean over all tokens of each text, one row at a time."""
    with torch.no_grad():
        states = [torch.cat([model(torch.tensor([row])).last_hidden_state[0] for row in text]) for text in rows]
    return torch.stack([nn.functional.normalize(of_text.mean(dim=0), dim=0) for of_text in states])


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("name", ["bert", "linformer"])
def test_embeddings_are_means_of_tokens_in_any_batch(name, batch_size, tokenizer, request):
    """Of texts of one window and of several, the last of them short: each token counts the same."""
    model = request.getfixturevalue(name)
    rows = [rows_of(" ".join(WORDS[:count]), tokenizer, 24) for count in (30, 3, 77, 11)]
    assert len(rows[1]) == 1 and len(rows[2]) > 3 and len(rows[2][-1]) != len(rows[2][0])
    embeddings, seconds = embed(model, tokenizer, rows, batch_size)
    torch.testing.assert_close(embeddings, means(model, rows), atol=1e-5, rtol=0)
    assert seconds > 0
    # Texts are far enough apart for a mistake to be seen, as is what weighs a short window like a long one.
    assert torch.cdist(embeddings, embeddings).fill_diagonal_(1).min() > 1e-3
    of_windows = means(model, [[row] for row in rows[2]]).mean(dim=0)
    assert (embeddings[2] - nn.functional.normalize(of_windows, dim=0)).abs().max() > 1e-3


def test_windows_hold_every_token_once_between_special_ones(tokenizer):
    text = " ".join(WORDS[:77])
    whole = tokenizer(text)["input_ids"]
    windows = rows_of(text, tokenizer, 24)
    assert [token for row in windows for token in row[1:-1]] == whole[1:-1]
    assert {(row[0], row[-1]) for row in windows} == {(whole[0], whole[-1])}
    assert max(map(len, windows)) == 24
    assert rows_of(text, tokenizer, len(whole)) == [whole]


# The command line


def run(model: Path, documents: Path, results: Path, *options: str) -> dict[str, str]:
    """The last row of the results."""
    match_halves.main(
        ["--model_name_or_path", str(model), "--validation_file", str(documents), "--min_words", "20"]
        + ["--results_file", str(results), *options]
    )
    with results.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))[-1]


SCORES = ("documents", "tokens", "recall_at_1", "mrr")


def test_rows_of_results(bert, linformer, documents, tmp_path):
    saved, ours = save(bert, tmp_path / "bert"), save(linformer, tmp_path / "linformer")
    results = tmp_path / "halves.csv"
    whole = run(ours, documents, results, "--run_name", "ours", "--data_name", "parts")
    assert whole["documents"] == "8" and whole["max_length"] == "200" and whole["method"] == "truncate"
    assert (whole["model_type"], whole["projected_length"], whole["local_window"]) == ("linformer", "8", "4")
    assert whole["tokens"] == whole["tokens_read"] and float(whole["tokens"]) > 30
    assert 1 / 8 <= float(whole["mrr"]) <= 1 and float(whole["seconds_per_document"]) > 0

    # Windows that hold a whole half are no windows.
    windows = run(ours, documents, results, "--method", "windows")
    assert {name: windows[name] for name in SCORES} == {name: whole[name] for name in SCORES}

    first = run(saved, documents, results, "--max_length", "12", "--run_name", "first")
    assert float(first["tokens_read"]) == 10 and first["tokens"] == whole["tokens"]
    windows = run(saved, documents, results, "--max_length", "12", "--method", "windows", "--run_name", "bert")
    assert windows["tokens_read"] == windows["tokens"] == whole["tokens"]
    assert (windows["recall_at_1"], windows["mrr"]) != (first["recall_at_1"], first["mrr"])

    with results.open(newline="", encoding="utf-8") as file:
        lines = halves_table(list(csv.DictReader(file)))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    table = [dict(zip(cells[0], body, strict=True)) for body in cells[2:]]
    assert [line["reads"] for line in table] == ["the first 200", "windows of 200", "the first 12", "windows of 12"]
    assert [line["keys a query"] for line in table] == ["8 + 1 + 3 x 4", "8 + 1 + 3 x 4", "12", "12"]
    assert table[0]["documents"] == "8 parts" and table[1]["documents"] == "8 documents.parquet"
    assert table[0]["of them read"] == "100%" == table[3]["of them read"]
    assert table[2]["of them read"] == f"{10 / float(first['tokens']):.0%}"
    assert table[2]["model"] == "first" and float(table[2]["MRR"]) == round(float(first["mrr"]), 3)
    interval = " to ".join(f"{float(first[f'recall_at_1_{end}']):.3f}" for end in ("low", "high"))
    assert table[2]["recall@1"] == f"{float(first['recall_at_1']):.3f} ({interval})"


def test_ranks_are_kept_and_compared(bert, linformer, documents, tmp_path):
    saved, ours = save(bert, tmp_path / "bert"), save(linformer, tmp_path / "linformer")
    results, ranks = tmp_path / "halves.csv", tmp_path / "ranks" / "windows.csv"
    first = run(saved, documents, results, "--max_length", "12", "--ranks_file", str(ranks))
    with ranks.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = [int(row[name]) for row in rows for name in ("rank_of_first", "rank_of_second")]
    assert len(rows) == 8 and set(found) <= set(range(1, 9))
    assert float(first["mrr"]) == pytest.approx(sum(1 / rank for rank in found) / 16, abs=1e-5)
    assert float(first["recall_at_1_low"]) <= float(first["recall_at_1"]) <= float(first["recall_at_1_high"])
    assert "difference" not in first

    row = run(ours, documents, results, "--compare_with", str(ranks))
    assert row["compared_with"] == "windows"
    more = float(row["recall_at_1"]) - float(first["recall_at_1"])
    assert float(row["difference"]) == pytest.approx(more, abs=1e-5)
    assert float(row["difference_low"]) <= more <= float(row["difference_high"])
    of_first, of_second = ([cell.strip() for cell in line.split("|")] for line in halves_table([first, row])[2:])
    assert of_first[8] == "" and of_second[8].startswith(f"{more:+.3f} (") and " to " in of_second[8]

    before = results.read_text()
    short = tmp_path / "short.csv"
    short.write_text("begins,rank_of_first,rank_of_second\nof the war\n")
    fewer = ["--max_eval_samples", "3", "--compare_with", str(ranks)]
    for options, message in [
        (["--ranks_file", str(ranks)], "ranks_file .*windows.csv is there"),
        (fewer, "windows.csv is of 8 other documents than these 3"),
        (["--compare_with", str(documents)], "documents.parquet is no --ranks_file of this script"),
        (["--compare_with", str(results)], "halves.csv is no --ranks_file of this script"),
        (["--compare_with", str(short)], "short.csv is no --ranks_file of this script"),
    ]:
        with pytest.raises(UserError, match=message):
            run(ours, documents, results, *options)
    assert results.read_text() == before


def test_halves_with_the_same_words_find_each_other(linformer, documents, tmp_path):
    """Documents whose halves are equal: nothing is better found."""
    texts = [f"{' '.join(WORDS[start : start + 30])} " * 2 for start in range(0, 300, 30)]
    path = tmp_path / "twice.jsonl"
    Dataset.from_dict({"speech": texts}).to_json(path)
    options = ["--text_column", "speech", "--dtype", "bfloat16", "--per_device_eval_batch_size", "3"]
    row = run(save(linformer, tmp_path / "model"), path, tmp_path / "halves.csv", *options)
    assert (row["recall_at_1"], row["mrr"], row["dtype"]) == ("1", "1", "bfloat16")


def test_bad_input_is_refused(bert, documents, tmp_path):
    saved = save(bert, tmp_path / "bert")
    t5 = T5Model(T5Config(vocab_size=32768, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    refusals = [
        (tmp_path / "nowhere", [], "cannot load the model .*nowhere"),
        (save(t5, tmp_path / "t5"), [], "is a T5Model, which has a decoder"),
        (saved, ["--max_length", "41"], "--max_length is 41, and .* reads 40 tokens at most, 2 of them"),
        (saved, ["--max_length", "2"], "--max_length is 2, and"),
        (saved, ["--min_words", "61"], "documents.parquet has 0 different documents of --min_words 61"),
        (saved, ["--min_words", "1"], "--min_words must be at least 2, not 1"),
        (saved, ["--pieces_per_document", "2"], "--pieces_per_document needs --max_words"),
        (saved, ["--max_words", "10"], "--max_words 10 leaves no document of --min_words 20"),
        (saved, ["--per_device_eval_batch_size", "0"], "--per_device_eval_batch_size must be at least 1, not 0"),
        (saved, ["--text_column", "speech"], "has no column 'speech'"),
    ]
    for model, options, message in refusals:
        with pytest.raises(UserError, match=message):
            run(model, documents, tmp_path / "halves.csv", *options)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(saved)
    with pytest.raises(UserError, match="must be a fast one, with a token to pad with"):
        run(saved, documents, tmp_path / "halves.csv")
    assert not (tmp_path / "halves.csv").exists()
