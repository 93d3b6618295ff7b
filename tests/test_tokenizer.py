"""The tokenizer in `tokenizer/` and the script that makes such: python -m pytest tests/test_tokenizer.py"""

import csv
import gzip
import json
import os
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import datasets
import huggingface_hub
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import train_tokenizer
from common import run_main


ROOT = Path(__file__).resolve().parent.parent
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
SPECIAL_TEXT = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
FILES = ["tokenizer.json", "tokenizer_config.json"]

TOKENIZER = AutoTokenizer.from_pretrained(ROOT / "tokenizer")

any_text = st.text() | st.lists(st.sampled_from([*SPECIAL_TOKENS, " ", "\n", "<", "s>", "é", "\x00"])).map("".join)


# The tokenizer that ships


def test_vocabulary_and_special_tokens() -> None:
    assert len(TOKENIZER) == TOKENIZER.vocab_size == 32768
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(32768))
    assert TOKENIZER.convert_ids_to_tokens(list(range(5))) == SPECIAL_TOKENS
    assert set(TOKENIZER.all_special_tokens) == set(SPECIAL_TOKENS)
    assert (TOKENIZER.bos_token, TOKENIZER.cls_token) == ("<s>", "<s>")
    assert (TOKENIZER.eos_token, TOKENIZER.sep_token) == ("</s>", "</s>")
    assert (TOKENIZER.pad_token_id, TOKENIZER.unk_token_id, TOKENIZER.mask_token_id) == (1, 3, 4)
    # Every byte has an entry, so that nothing is unknown.
    assert set(pre_tokenizers.ByteLevel.alphabet()) < TOKENIZER.get_vocab().keys()


def test_settings_and_files() -> None:
    assert sorted(path.name for path in (ROOT / "tokenizer").iterdir()) == FILES
    assert TOKENIZER.model_max_length == 512
    assert TOKENIZER.model_input_names == ["input_ids", "attention_mask"]
    assert TOKENIZER.clean_up_tokenization_spaces is False
    assert TOKENIZER.backend_tokenizer.normalizer is None
    # The class rebuilds the pipeline from the vocabulary: it must come out as it stands in the file.
    assert TOKENIZER.backend_tokenizer.to_str() == Tokenizer.from_file(str(ROOT / "tokenizer/tokenizer.json")).to_str()


def test_saved_again_it_is_the_same(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (ROOT / "tokenizer/tokenizer.json").read_bytes()


def test_loads_beside_the_config_of_a_checkpoint(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "linformer"}')
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()


def test_template() -> None:
    first, second = (TOKENIZER.encode(text, add_special_tokens=False) for text in ("A state", "of the Union."))
    assert dict(TOKENIZER("A state")) == {"input_ids": [0, *first, 2], "attention_mask": [1] * (len(first) + 2)}
    pair = TOKENIZER("A state", "of the Union.")
    assert pair.keys() == {"input_ids", "attention_mask"}
    assert pair["input_ids"] == [0, *first, 2, 2, *second, 2]
    assert TOKENIZER.num_special_tokens_to_add(pair=False) == 2
    assert TOKENIZER.num_special_tokens_to_add(pair=True) == 4


def test_padding_and_offsets() -> None:
    batch = TOKENIZER(["A state", "A"], padding=True, return_offsets_mapping=True)
    assert batch["input_ids"][1][-1] == 1
    assert batch["attention_mask"] == [[1, 1, 1, 1], [1, 1, 1, 0]]
    # The space belongs to the token, not to the span of text that is handed back for it.
    assert batch["offset_mapping"][0] == [(0, 0), (0, 1), (2, 7), (0, 0)]


def test_truncation_keeps_the_template() -> None:
    text = "We the people " * 400
    single = TOKENIZER(text, truncation=True)["input_ids"]
    assert len(single) == 512 and (single[0], single[-1]) == (0, 2)
    assert single[1:-1] == TOKENIZER(text, add_special_tokens=False, verbose=False)["input_ids"][:510]
    pair = TOKENIZER("a question", text, truncation="only_second")["input_ids"]
    assert len(pair) == 512 and pair.count(2) == 3


def test_mask_takes_the_space_before_it() -> None:
    a, dot = (TOKENIZER.convert_tokens_to_ids(token) for token in ("a", "."))
    assert TOKENIZER("a <mask>.")["input_ids"] == [0, a, 4, dot, 2]
    ids = TOKENIZER.encode("The <mask> of the Union", add_special_tokens=False)
    ids[ids.index(TOKENIZER.mask_token_id)] = TOKENIZER.convert_tokens_to_ids("Ġstate")
    assert TOKENIZER.decode(ids) == "The state of the Union"


def test_words_that_come_split_can_have_their_spaces() -> None:
    whole = TOKENIZER.encode(" The state of the Union")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tokenizer", add_prefix_space=True)
    assert tokenizer.encode("The state of the Union".split(), is_split_into_words=True) == whole
    assert TOKENIZER.encode("The state of the Union".split(), is_split_into_words=True) != whole


@settings(deadline=None, max_examples=300)
@given(any_text.map(lambda text: SPECIAL_TEXT.sub("", text)).filter(lambda text: not SPECIAL_TEXT.search(text)))
def test_any_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text, add_special_tokens=False)) == text


@settings(deadline=None, max_examples=300)
@given(any_text)
def test_any_text_comes_back_where_special_tokens_are_text(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert not set(ids) & set(range(5))
    assert TOKENIZER.decode(ids) == text


def test_special_tokens_in_a_text_are_tokens_by_default() -> None:
    assert TOKENIZER.encode("x</s>y", add_special_tokens=False)[1] == 2
    assert TOKENIZER.decode(TOKENIZER.encode("x <mask>", add_special_tokens=False)) == "x<mask>"


# The script


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """The script, called in this process from an empty folder, without a network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["train_tokenizer.py", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_main(train_tokenizer.main)
        assert isinstance(ended.value.code, int)
        return Result(ended.value.code, *capfd.readouterr())

    return call


def sentences(seed: int = 0, rows: int = 120) -> list[str]:
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyzé", k=rng.randint(2, 9))) for _ in range(80)]
    return [" ".join(rng.choices(words, k=12)) + "." for _ in range(rows)]


def write(path: str, texts: list[str]) -> None:
    """The texts as the type that the name tells, with another column where there are columns."""
    rows = [{"number": number, "text": text} for number, text in enumerate(texts)]
    opened = gzip.open if path.endswith(".gz") else open
    match Path(path.removesuffix(".gz")).suffix:
        case ".parquet":
            Dataset.from_list(rows).to_parquet(path)
            return
        case ".txt":
            content = "".join(f"{text}\n" for text in texts)
        case ".jsonl":
            content = "".join(json.dumps(row) + "\n" for row in rows)
        case ".json":
            content = json.dumps(rows)
        case suffix:
            with opened(path, "wt", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, ["number", "text"], delimiter="\t" if suffix == ".tsv" else ",")
                writer.writeheader()
                writer.writerows(rows)
            return
    with opened(path, "wt", encoding="utf-8") as file:
        file.write(content)


def report(result: Result) -> dict[str, str]:
    """The lines that the script prints at the end: what is measured, two spaces or more, the value."""
    assert result.code == 0, result.err
    return dict(re.split("  +", line, maxsplit=1) for line in result.out.splitlines())


def load(path: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(path)


def test_trains_what_it_says(run: Run) -> None:
    write("a.txt", sentences())
    result = run("--train_file", "a.txt", "--vocab_size", "400", "--model_max_length", "64", "--output_dir", "new/out")
    told = report(result)
    assert sorted(os.listdir("new/out")) == FILES
    tokenizer = load("new/out")
    assert len(tokenizer) == 400
    assert tokenizer.model_max_length == 64
    assert len(tokenizer("word " * 100, truncation=True)["input_ids"]) == 64
    assert tokenizer.convert_ids_to_tokens(list(range(5))) == SPECIAL_TOKENS
    a, b, dot = (tokenizer.convert_tokens_to_ids(token) for token in ("a", "b", "."))
    assert tokenizer("a <mask>.", "b")["input_ids"] == [0, a, 4, dot, 2, 2, b, 2]

    content = Path("a.txt").read_text(encoding="utf-8")
    assert told["entries"] == "400"
    assert told["bytes read"] == str(len(content.encode()))
    ratio = len(content.encode()) / len(tokenizer.encode(content, add_special_tokens=False))
    assert float(told["bytes per token"].split(",")[0]) == pytest.approx(ratio, abs=0.005)
    assert told["saved in"] == "new/out"
    assert told["load it with"] == 'AutoTokenizer.from_pretrained("new/out")'
    assert "reading: 100%" in result.err


def test_the_files_get_the_usual_rights(run: Run) -> None:
    write("a.txt", sentences())
    assert run("--train_file", "a.txt", "--vocab_size", "261", "--output_dir", "out").code == 0
    assert {Path("out", name).stat().st_mode for name in FILES} == {Path("a.txt").stat().st_mode}


@pytest.mark.parametrize("suffix", [".txt.gz", ".jsonl", ".jsonl.gz", ".json", ".csv", ".csv.gz", ".tsv", ".parquet"])
def test_every_type_of_file_gives_the_same(run: Run, suffix: str) -> None:
    write("a.txt", sentences())
    write(f"a{suffix}", sentences())
    for file, output_dir in (("a.txt", "expected"), (f"a{suffix}", "out")):
        result = run("--train_file", file, "--vocab_size", "350", "--output_dir", output_dir)
        assert result.code == 0, result.err
    assert Path("out/tokenizer.json").read_bytes() == Path("expected/tokenizer.json").read_bytes()


def test_files_folders_and_patterns_in_one_call(run: Run) -> None:
    texts = sentences()
    os.makedirs("folder/deep")
    Path("folder/README.md").write_text("not a text to read")
    write("folder/a.parquet", texts[:30])
    write("folder/deep/b.txt", texts[30:60])
    write("c1.jsonl.gz", texts[60:90])
    # The same column beside others, and a name that is no pattern.
    Dataset.from_dict({"year": [1790] * 30, "text": texts[90:], "party": [None] * 30}).to_parquet("d[1].parquet")
    write("all.txt", texts)
    options = ["--vocab_size", "350", "--output_dir"]
    inputs = ["folder", "c*.gz", "d[1].parquet", "folder/a.parquet"]
    mixed, expected = (
        run("--train_file", *inputs, *options, "out"),
        run("--train_file", "all.txt", *options, "expected"),
    )
    assert (mixed.code, expected.code) == (0, 0), mixed.err
    assert Path("out/tokenizer.json").read_bytes() == Path("expected/tokenizer.json").read_bytes()
    # Each file once, though folder/a.parquet is named twice; a line end belongs to each of the lines of b.txt only.
    assert report(mixed)["bytes read"] == str(sum(len(text.encode()) for text in texts) + 30)


def test_a_named_data_set(run: Run) -> None:
    os.makedirs("set")
    write("set/train.jsonl", sentences())
    write("set/test.jsonl", sentences(seed=1))
    result = run("--dataset_name", "set", "--dataset_split", "test", "--vocab_size", "350", "--output_dir", "out")
    assert result.code == 0, result.err
    assert run("--train_file", "set/test.jsonl", "--vocab_size", "350", "--output_dir", "expected").code == 0
    assert Path("out/tokenizer.json").read_bytes() == Path("expected/tokenizer.json").read_bytes()


def test_another_text_column_and_rows_without_text(run: Run) -> None:
    texts = sentences()
    Dataset.from_dict({"text": [1] * 123, "body": [None, "", None, *texts]}).to_parquet("a.parquet")
    options = ["--train_file", "a.parquet", "--text_column", "body", "--vocab_size", "350", "--output_dir", "out"]
    assert report(run(*options))["bytes read"] == str(sum(len(text.encode()) for text in texts))


def test_options_from_a_file(run: Run) -> None:
    write("a.txt", sentences())
    Path("options.yaml").write_text("train_file: a.txt\nvocab_size: 300\noutput_dir: one\n")
    Path("options.json").write_text('{"train_file": ["a.txt"], "vocab_size": 300, "output_dir": "two"}')
    assert run("options.yaml").code == 0
    assert run("options.json", "--vocab_size", "310").code == 0
    assert (len(load("one")), len(load("two"))) == (300, 310)


def test_max_train_samples_are_drawn_by_the_seed(run: Run) -> None:
    # Each row has a length of its own, so that the bytes read tell which were.
    Path("a.jsonl").write_text("".join(json.dumps({"text": "x" * 2**n}) + "\n" for n in range(8)))
    Path("b.txt").write_text("".join("x" * (2**n - 1) + "\n" for n in range(8, 14)))

    def rows(seed: int) -> str:
        options = ["--max_train_samples", "5", "--seed", str(seed), "--vocab_size", "261", "--overwrite_output_dir"]
        told = report(run("--train_file", "a.jsonl", "b.txt", "--output_dir", "out", *options))
        return f"{int(told['bytes read']):014b}"

    drawn = [rows(seed) for seed in (1, 1, 2)]
    assert [digits.count("1") for digits in drawn] == [5, 5, 5]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_command_of_the_docs_gives_the_same_on_any_number_of_threads(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = re.search(r"^ +python (scripts/train_tokenizer.py .*data/sotu.*)$", train_tokenizer.__doc__ or "", re.M)
    assert line
    script, *arguments, _ = shlex.split(line[1])
    assert arguments[-1] == "--output_dir"
    more_threads = {"RAYON_NUM_THREADS": str(3 + (os.cpu_count() or 1)), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    ended = subprocess.run(
        [sys.executable, script, *arguments, str(tmp_path / "one")],
        cwd=ROOT,
        env=os.environ | more_threads,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    monkeypatch.chdir(ROOT)
    assert report(run(*arguments, str(tmp_path / "two")))["entries"] == "8192"
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


# \x1c is white space to Python and not to the tokenizer; \x85 and the wide spaces are to both.
short_words = st.tuples(st.sampled_from("ab1.'é漢"), st.text("ab1.'é漢\x1c", max_size=4)).map("".join)
gaps = st.text(" \n\t\r\xa0\u2003\x85", min_size=1, max_size=3).map(lambda gap: gap + " ") | st.sampled_from(" \n")


@settings(deadline=None)
@given(st.lists(st.tuples(short_words, gaps), max_size=60).map(lambda parts: "".join(map("".join, parts))))
def test_cutting_a_text_changes_no_token(text: str) -> None:
    pieces = list(train_tokenizer.cut(text, length=16))
    assert "".join(pieces) == text
    assert all(16 <= len(piece) <= 32 for piece in pieces[:-1])
    split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    assert [word for piece in pieces for word, _ in split(piece)] == [word for word, _ in split(text)]


def test_no_piece_is_long() -> None:
    text = "x" * 100_000
    pieces = list(train_tokenizer.cut(text))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 2 * train_tokenizer.PIECE_LENGTH


# What the user can mend


def broken_files() -> None:
    write("a.txt", sentences())
    write("a.jsonl", sentences())
    Path("empty.txt").touch()
    Path("header.csv").write_text("number,text\n")
    Path("blank.jsonl").write_text('{"text": ""}\n{"text": null}\n')
    Path("latin.txt").write_bytes("Zürich".encode("latin-1"))
    Path("broken.parquet").write_bytes(b"PAR1, but no more")
    Path("a.docx").write_text("text")
    os.makedirs("images")
    Path("images/a.png").touch()


ERRORS = {
    "no input": ("", ["--train_file", "--dataset_name", "neither"]),
    "two inputs": ("--train_file a.txt --dataset_name a", ["--train_file", "--dataset_name", "both"]),
    "missing file": ("--train_file a.txt nowhere.txt", ["nowhere.txt", "does not exist"]),
    "no match": ("--train_file no*.txt", ["no*.txt", "matches no file"]),
    "folder without texts": ("--train_file images", ["images", ".parquet"]),
    "unknown type": ("--train_file a.docx", ["a.docx", ".jsonl"]),
    "no such column": ("--train_file a.jsonl --text_column body", ["'body'", "['number', 'text']"]),
    "no text in the column": ("--train_file a.jsonl --text_column number", ["'number'", "int64", "not text"]),
    "empty file": ("--train_file empty.txt", ["empty.txt", "empty"]),
    "no rows": ("--train_file header.csv", ["header.csv"]),
    "rows without text": ("--train_file blank.jsonl", ["corpus is empty"]),
    "not UTF-8": ("--train_file latin.txt", ["latin.txt", "utf-8"]),
    "not parquet": ("--train_file broken.parquet", ["broken.parquet"]),
    "no such data set": ("--dataset_name nowhere/nothing", ["nowhere/nothing"]),
    "vocabulary too small": ("--train_file a.txt --vocab_size 260", ["--vocab_size", "260", "261"]),
    "corpus too small": ("--train_file a.txt --vocab_size 30000", ["too small", "30000", "--allow_smaller_vocab"]),
    "min_frequency": ("--train_file a.txt --min_frequency 0", ["--min_frequency", "0", "1 or more"]),
    "model_max_length": ("--train_file a.txt --model_max_length 4", ["--model_max_length", "4", "5 or more"]),
    "max_train_samples": ("--train_file a.txt --max_train_samples 0", ["--max_train_samples", "0", "1 or more"]),
    "not a number": ("--train_file a.txt --vocab_size many", ["vocab_size", "many"]),
    "unknown option": ("--train_file a.txt --vocabulary 300", ["--vocabulary"]),
}


@pytest.mark.parametrize(("arguments", "words"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_are_one_line_and_write_nothing(run: Run, arguments: str, words: list[str]) -> None:
    broken_files()
    result = run(*arguments.split(), "--output_dir", "out")
    message = result.err.splitlines()[-1]
    assert result.code == 2
    assert message.startswith("error: ") and "Traceback" not in result.err
    assert [word for word in words if word not in message] == []
    assert not Path("out").exists() or os.listdir("out") == []


def test_no_such_split(run: Run) -> None:
    os.makedirs("set")
    write("set/train.jsonl", sentences())
    result = run("--dataset_name", "set", "--dataset_split", "dev", "--output_dir", "out")
    assert result.code == 2
    assert "split dev" in result.err.splitlines()[-1] and "train" in result.err.splitlines()[-1]


def test_output_dir_must_be_a_folder(run: Run) -> None:
    write("a.txt", sentences())
    for output_dir in ("a.txt", "a.txt/below"):
        result = run("--train_file", "a.txt", "--vocab_size", "300", "--output_dir", output_dir)
        assert result.code == 2
        assert output_dir in result.err.splitlines()[-1]


def test_a_small_corpus_says_how_far_it_went(run: Run) -> None:
    write("a.txt", sentences())
    options = ["--train_file", "a.txt", "--vocab_size", "30000", "--output_dir", "out"]
    refused = run(*options)
    assert refused.code == 2
    result = run(*options, "--allow_smaller_vocab")
    assert 261 < len(load("out")) < 30000
    assert f"gives {len(load('out'))} of the 30000 entries" in refused.err
    assert report(result)["entries"] == str(len(load("out")))


@pytest.mark.parametrize("old", [*FILES, "special_tokens_map.json", "added_tokens.json"])
def test_an_old_tokenizer_is_not_replaced_unasked(run: Run, old: str) -> None:
    write("a.txt", sentences())
    os.makedirs("out")
    Path("out", old).write_text('{"mask_token": "[MASK]"}')
    Path("out/notes.md").write_text("mine")
    options = ["--train_file", "a.txt", "--output_dir", "out", "--vocab_size"]
    refused = run(*options, "300")
    assert refused.code == 2
    assert f"out/{old} exists" in refused.err and "--overwrite_output_dir" in refused.err
    # Nor is it when the run that was to replace it fails.
    assert run(*options, "30000", "--overwrite_output_dir").code == 2
    assert Path("out", old).read_text() == '{"mask_token": "[MASK]"}'
    assert sorted(os.listdir("out")) == sorted([old, "notes.md"])

    assert run(*options, "300", "--overwrite_output_dir").code == 0
    assert sorted(os.listdir("out")) == ["notes.md", *FILES]
    assert Path("out/notes.md").read_text() == "mine"
    assert (len(load("out")), load("out").mask_token) == (300, "<mask>")
