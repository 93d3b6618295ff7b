"""scripts/documents.py: which files of a folder are documents, and which columns of a table are texts.

python -m pytest tests/test_documents.py
"""

import json
from pathlib import Path

import pytest

from common import UserError, load_data_files, only_texts
from documents import find_columns, find_files
from examples import DataArguments, load_examples


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def contracts(tmp_path) -> Path:
    folder = tmp_path / "contracts"
    folder.mkdir()
    (folder / "a.txt").write_text("of the court")
    write_rows(folder / "b.jsonl", {"id": 1, "content": "of the people"})
    return folder


def test_outputs_of_other_runs_are_no_documents(contracts, capsys):
    names = ["labels.csv", "labels.csv.progress.json", "more.jsonl.partial", "more.jsonl.progress.json"]
    names += ["rest.parquet.partial.parquet"]
    for name in names:
        (contracts / name).write_text("text\nnothing\n")
    (contracts / "notes.pdf").write_text("no document")
    assert list(find_files([str(contracts)], [])) == ["a.txt", "b.jsonl"]
    assert capsys.readouterr().err == (
        "warning: files of other types are left out: 1 of .pdf\n"
        f"warning: outputs of predict.py and embed.py are left out: {', '.join(names)}\n"
    )
    # The table of a run that has no record is a table like any other, and so is what was named.
    (contracts / "labels.csv.progress.json").unlink()
    assert list(find_files([str(contracts)], [])) == ["a.txt", "b.jsonl", "labels.csv"]
    assert list(find_files([str(contracts / "more.jsonl.progress.json")], []))


def test_a_table_in_a_folder_must_name_its_text(contracts, capsys):
    index = write_rows(contracts / "index.jsonl", {"number": 1, "file": "a.txt"})
    both = write_rows(contracts / "letters.jsonl", {"from": "Paris", "letter": "of the war"})
    (contracts / "broken.json").write_text("{")
    assert list(find_files([str(contracts)], [])) == ["a.txt", "b.jsonl", "broken.json"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "warning: tables without a column text or sentence or document or content or review (another is named with "
        "--text_column) are left out: index.jsonl, letters.jsonl"
    )
    assert list(find_files([str(contracts)], [], ["letter"])) == ["a.txt", "broken.json", "letters.jsonl"]
    assert "tables without a column letter (" in capsys.readouterr().err

    # By name the only text is taken, and what cannot be told is an error.
    assert list(find_files([str(index), str(both)], [])) == [str(index), str(both)]
    assert capsys.readouterr().err == ""
    assert find_columns("index", index, None, None) == ["file"]
    with pytest.raises(UserError, match=r"cannot tell which of \['from', 'letter'\] of letters holds the text"):
        find_columns("letters", both, None, None)


def test_the_columns_of_a_table_are_those_of_its_first_rows(contracts):
    late = write_rows(contracts / "late.jsonl", {"number": 1}, {"number": 2, "text": None}, {"text": "of the war"})
    assert "late.jsonl" in find_files([str(contracts)], [])
    assert find_columns("late", late, None, "number") == ["text", "number"]


def test_a_table_of_pairs_in_a_folder_has_both_columns(contracts):
    write_rows(contracts / "half.jsonl", {"claim": "of the war"})
    write_rows(contracts / "whole.jsonl", {"claim": "of the war", "source": "of the court"})
    assert list(find_files([str(contracts)], [], ["claim", "source"])) == ["a.txt", "whole.jsonl"]


def test_a_folder_of_nothing_to_read_is_refused(tmp_path):
    write_rows(tmp_path / "index.jsonl", {"number": 1, "file": "a.txt"})
    with pytest.raises(UserError, match="holds no file of .* with text"):
        find_files([str(tmp_path)], [])


@pytest.mark.parametrize(("sign", "word"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
def test_tables_with_other_separators_are_refused(sign, word, tmp_path):
    """Each row of one would be one text."""
    path = tmp_path / "contracts.csv"
    path.write_text(
        f"id{sign}text{sign}label\n1{sign}a lease{sign}lease\n2{sign}a secret{sign}nda\n", encoding="utf-8"
    )
    message = f"has one column, .*: its values seem to stand between {word}; save it with commas"
    with pytest.raises(UserError, match=message):
        find_columns("contracts.csv", path, None, None)
    (tmp_path / "a.txt").write_text("of the court")
    with pytest.raises(UserError, match=message):
        find_files([str(tmp_path)], [])
    with pytest.raises(UserError, match=message):
        load_examples(DataArguments(train_file=[str(path)], label_column="label"), seed=1)
    with pytest.raises(UserError, match=message):
        only_texts(load_data_files({"train": [str(path)]})["train"], "text", "contracts.csv")
