"""scripts/embed.py: the vectors of many documents beside those of SentenceTransformer.encode, on tiny models.

What it shares with scripts/predict.py, how files are read and how a table is written, is in tests/test_predict.py.

python -m pytest tests/test_embed.py
"""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from tokenizers import normalizers
from transformers import AutoConfig, AutoTokenizer

import answers
import embed
from common import UserError, run_main
from hf_linformer import LinformerConfig, LinformerModel
from tiny import WORDS, build, save_source, tiny_tokenizer


sentence_transformers = pytest.importorskip("sentence_transformers")
from sentence_transformers.sentence_transformer.modules import (  # noqa: E402
    Dense,
    Normalize,
    Pooling,
    Transformer,
)


ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "checkpoints/linformer-all-MiniLM-L6-v2"
# What the models read at most, two special tokens included, and how long their embeddings are.
N, D = 24, 20
MODELS = ["normalized", "mean", "dense"]


@pytest.fixture(autouse=True)
def one_package():
    """Pytest imports the root's __init__.py too, under the folder's name; the scripts know the package alone."""
    AutoConfig.register("linformer", LinformerConfig, exist_ok=True)


def save_model(folder: Path, *more: torch.nn.Module, prompts=None, **pooling) -> Path:
    """A tiny Linformer, the mean of its tokens and more modules, as sentence-transformers saves them."""
    shape = {"projection_type": "mean_pool", "projected_length": 8, "local_window": 4, "pad_token_id": 0}
    build(LinformerModel, **shape).save_pretrained(folder.with_name(folder.name + "_encoder"))
    tiny_tokenizer(0).save_pretrained(folder.with_name(folder.name + "_encoder"))
    encoder = Transformer(str(folder.with_name(folder.name + "_encoder")))
    modules = [encoder, Pooling(D, **{"pooling_mode": "mean", **pooling}), *more]
    sentence_transformers.SentenceTransformer(modules=modules, prompts=prompts, device="cpu").save(str(folder))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    AutoConfig.register("linformer", LinformerConfig, exist_ok=True)
    torch.manual_seed(0)
    return {
        "normalized": save_model(folder / "normalized", Normalize()),
        "mean": save_model(folder / "mean"),
        # Seven numbers, of the first token and the mean.
        "dense": save_model(folder / "dense", Dense(2 * D, 7), Normalize(), pooling_mode=("cls", "mean")),
    }


@pytest.fixture
def model(models) -> Path:
    return models["normalized"]


def words(count: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


# Of one token and of many, at the limit and one beside it, with what the library might take for nothing.
TEXTS = [words(count, seed) for seed, count in enumerate((30, 1, N - 2, 5, 70, N - 1, 11, N - 3))]
TEXTS += ["  the law,\n\n of\tthe people \n", "caf\u00e9 \u6cd5 \U0001f600 of the people"]
LENGTHS = [32, 3, N, 7, 72, N + 1, 13, N - 1, 8, 8]


def encode(folder: Path, texts: list[str], **options) -> np.ndarray:
    """The embeddings as a reader of the library's documentation would get them, each text alone: (texts, D)"""
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    assert model.max_seq_length == N
    return np.stack([model.encode(text, **options) for text in texts])


def options(model: Path, given: Path, output: Path, *more) -> list[str]:
    command = ["--model_name_or_path", model, "--input_file", given, "--output_file", output, *more]
    return [str(part) for part in command]


def read(path: Path) -> list[dict]:
    if path.suffix == ".parquet":
        return parquet.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(model: Path, given: Path, output: Path, *more) -> list[dict]:
    """The rows that the script writes, whatever was there."""
    embed.main(options(model, given, output, "--overwrite", "true", *more))
    return read(output)


def embeddings_of(rows: list[dict]) -> np.ndarray:
    return np.array([row["embedding"] for row in rows], dtype=np.float32)


def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def documents(tmp_path) -> Path:
    return write_texts(tmp_path / "documents.jsonl", TEXTS)


# Embeddings


@pytest.mark.parametrize("name", MODELS)
def test_embeddings_are_those_of_the_library(name, models, documents, tmp_path, monkeypatch):
    """However documents are batched, in the order of the input."""
    expected = encode(models[name], TEXTS)
    others = np.abs(expected[:, None] - expected[None]).max(-1) + np.eye(len(TEXTS))
    assert others.min() > 1e-3, "rows in another order would not be seen"
    shapes = []
    real = embed.forward

    def forward(rows, encoder):
        shapes.append((len(rows), max(map(len, rows)) + 2))
        return real(rows, encoder)

    monkeypatch.setattr(embed, "forward", forward)
    for tokens, chunk in ((1, 3), (60, 256), (16384, 256)):
        shapes.clear()
        settings = ["--per_device_eval_batch_tokens", tokens, "--chunk_size", chunk]
        rows = run(models[name], documents, tmp_path / "out.jsonl", *settings)
        assert np.abs(embeddings_of(rows) - expected).max() < 1e-5
        assert [row["id"] for row in rows] == [f"{documents}:{number}" for number in range(1, len(TEXTS) + 1)]
        assert [row["tokens"] for row in rows] == LENGTHS
        assert [row["cut"] for row in rows] == [length > N for length in LENGTHS]
        # The first is of one token, by which the size of the embeddings is known.
        assert all(count == 1 or count * length <= tokens for count, length in shapes) and len(shapes) > 1
    assert shapes[1:] == [(len(TEXTS), N)]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_outputs(suffix, model, documents, tmp_path, capsys):
    documents.write_text(documents.read_text() + '{"text": " "}\n')
    output = tmp_path / "new" / f"vectors{suffix}"
    embed.main(options(model, documents, output))
    rows = read(output)
    assert [list(row) for row in rows] == [["id", "embedding", "tokens", "cut", "error"]] * 11
    assert [row["error"] for row in rows] == [""] * 10 + ["empty"]
    assert [rows[-1][name] for name in ("embedding", "tokens", "cut")] == [None] * 3
    assert np.abs(embeddings_of(rows[:-1]) - encode(model, TEXTS)).max() < 1e-5
    if suffix == ".parquet":
        assert parquet.read_schema(output).field("embedding").type == pa.list_(pa.float32(), D)
    else:
        # As few digits as float32 needs, and no fewer.
        numbers = [number for row in rows[:-1] for number in row["embedding"]]
        assert all(float(str(np.float32(number))) == number for number in numbers)
        assert max(len(str(number)) for number in numbers) < 16
        assert any(round(number, 6) != number for number in numbers)
    assert sorted(path.name for path in output.parent.iterdir()) == [output.name, f"{output.name}.progress.json"]
    printed = capsys.readouterr().out
    assert "3 of 10 (30.0%) have more than 24 tokens and were cut; --windows true reads all of them" in printed
    assert "1 of 11 documents were skipped, see `error`: empty 1\n" in printed
    assert f": {output}\n" in printed and "modules.json" not in printed


def test_both_formats_hold_the_same_numbers(model, documents, tmp_path):
    assert (
        embeddings_of(run(model, documents, tmp_path / "out.jsonl")).tobytes()
        == embeddings_of(run(model, documents, tmp_path / "out.parquet")).tobytes()
    )


@pytest.mark.parametrize("name", MODELS)
def test_windows_are_weighted_by_their_tokens(name, models, documents, tmp_path):
    rows = run(models[name], documents, tmp_path / "out.jsonl", "--windows", "true")
    model = sentence_transformers.SentenceTransformer(str(models[name]), device="cpu")
    others = 0
    for row, text, cut in zip(rows, TEXTS, encode(models[name], TEXTS), strict=True):
        first, *inside, last = model.tokenizer(text, verbose=False)["input_ids"]
        count = math.ceil(len(inside) / (N - 2))
        mean, unweighted = np.zeros(len(cut)), np.zeros(len(cut))
        for number in range(count):
            # Some have a token more, the first ones.
            sizes = [len(inside) // count + (part < len(inside) % count) for part in range(count)]
            window = inside[sum(sizes[:number]) : sum(sizes[: number + 1])]
            input_ids = torch.tensor([[first, *window, last]])
            with torch.no_grad():
                found = model({"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)})
            vector = found["sentence_embedding"][0].numpy()
            mean += vector * len(window) / len(inside)
            unweighted += vector / count
        if name != "mean":
            mean, unweighted = mean / np.linalg.norm(mean), unweighted / np.linalg.norm(unweighted)
        assert np.abs(row["embedding"] - mean).max() < 1e-5
        assert row["tokens"] == len(inside) + 2 and row["cut"] is False
        others += np.abs(mean - cut).max() > 1e-3
        if len(inside) % count:
            assert np.abs(mean - unweighted).max() > 1e-4, "weights would not be seen"
    assert others == 3 and any((length - 2) % math.ceil((length - 2) / (N - 2)) for length in LENGTHS)


def test_only_models_that_normalize_give_vectors_of_length_1(models, documents, tmp_path):
    for name, is_one in (("normalized", True), ("mean", False)):
        for windows in ("false", "true"):
            rows = run(models[name], documents, tmp_path / "out.jsonl", "--windows", windows)
            norms = np.linalg.norm(embeddings_of(rows), axis=1)
            assert np.allclose(norms, 1, atol=1e-5) == is_one


def test_shorter_and_other_types(model, documents, tmp_path):
    short = sentence_transformers.SentenceTransformer(str(model), device="cpu")
    short.max_seq_length = 9
    rows = run(model, documents, tmp_path / "out.jsonl", "--max_length", 9)
    assert np.abs(embeddings_of(rows) - short.encode(TEXTS)).max() < 1e-5
    assert [row["cut"] for row in rows] == [length > 9 for length in LENGTHS]
    whole = encode(model, TEXTS)
    rough = embeddings_of(run(model, documents, tmp_path / "out.jsonl", "--dtype", "bfloat16"))
    assert 1e-4 < np.abs(rough - whole).max() < 0.1


def test_a_prompt_stands_before_every_text_and_every_part(tmp_path, documents):
    prompts = {"question": "the law: ", "none": ""}
    folder = save_model(tmp_path / "asked", Normalize(), prompts=prompts, include_prompt=False)
    asked = run(folder, documents, tmp_path / "out.jsonl", "--prompt_name", "question")
    assert np.abs(embeddings_of(asked) - encode(folder, TEXTS, prompt_name="question")).max() < 1e-5
    # Three tokens of the prompt are read too.
    assert [row["tokens"] for row in asked] == [length + 3 for length in LENGTHS]
    plain = run(folder, documents, tmp_path / "out.jsonl")
    assert np.abs(embeddings_of(plain) - encode(folder, TEXTS)).max() < 1e-5
    assert np.abs(embeddings_of(plain) - embeddings_of(asked)).max() > 1e-2
    parts = run(folder, documents, tmp_path / "out.jsonl", "--prompt_name", "question", "--windows", "true")
    inside = TEXTS[4].split()
    # Four parts of 70 words, as 19 find room beside the prompt.
    halves = [" ".join(part) for part in np.array_split(inside, 4)]
    mean = np.array([18, 18, 17, 17]) @ encode(folder, halves, prompt_name="question")
    assert np.abs(parts[4]["embedding"] - mean / np.linalg.norm(mean)).max() < 1e-5
    for name in ("nothing", "none", "query"):
        with pytest.raises(UserError, match=f"asked has no prompt '{name}' for --prompt_name; it has {{'question'"):
            run(folder, documents, tmp_path / "out.jsonl", "--prompt_name", name)

    # One that the model always uses.
    path = folder / "config_sentence_transformers.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"default_prompt_name": "question"}))
    always = run(folder, documents, tmp_path / "out.jsonl")
    assert np.abs(embeddings_of(always) - embeddings_of(asked)).max() < 1e-6


def test_an_encoder_that_says_nothing_of_embeddings(tmp_path, documents, capsys):
    folder = tmp_path / "bert"
    save_source(folder, "bert")
    rows = run(folder, documents, tmp_path / "out.jsonl")
    said = "bert has no modules.json, which says how to embed: taken was the mean of its last hidden states\n"
    assert said in capsys.readouterr().out
    assert np.abs(embeddings_of(rows) - encode(folder, TEXTS)).max() < 1e-5


def test_the_checkpoint_that_ships(tmp_path):
    texts = [(ROOT / "CONTRIBUTING.md").read_text()[:1500], "Send a patch.", "Canals carry the corn to market."]
    path = write_texts(tmp_path / "texts.jsonl", texts)
    rows = run(CHECKPOINT, path, tmp_path / "out.parquet", "--max_length", 300)
    model = sentence_transformers.SentenceTransformer(str(CHECKPOINT), device="cpu")
    model.max_seq_length = 300
    assert np.abs(embeddings_of(rows) - model.encode(texts)).max() < 1e-5
    assert [row["cut"] for row in rows] == [True, False, False]
    vectors = embeddings_of(rows)
    assert vectors.shape == (3, 384) and vectors[1] @ vectors[0] > vectors[2] @ vectors[0]


# Documents that cannot be embedded


def test_bad_documents_are_skipped_with_their_reasons(model, tmp_path):
    folder = tmp_path / "bad"
    folder.mkdir()
    files = {"a.txt": TEXTS[1].encode(), "b.txt": b"the law\xff of", "c.txt": b" \n", "d.txt.gz": b"no gzip"}
    files |= {"e.jsonl": b'{"text": 5}\n{"text": \n{"text": "of"}\n', "f.txt": TEXTS[3].encode()}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    # In chunks of which some hold nothing that is sound.
    rows = run(model, folder, tmp_path / "out.parquet", "--chunk_size", 2)
    assert {row["id"]: row["error"] for row in rows} == {
        "a.txt": "",
        "b.txt": "not valid UTF-8: byte 0xff at position 7 of the text",
        "c.txt": "empty",
        "d.txt.gz": "cannot be read: Not a gzipped file (b'no')",
        "e.jsonl:1": "not text: int",
        "e.jsonl:2": "cannot be read: Expecting value: line 2 column 1 (char 10)",
        "e.jsonl:3": "",
        "f.txt": "",
    }
    sound = [row for row in rows if not row["error"]]
    assert np.abs(embeddings_of(sound) - encode(model, [TEXTS[1], "of", TEXTS[3]])).max() < 1e-5
    assert all(row[name] is None for row in rows if row["error"] for name in ("embedding", "tokens", "cut"))


def test_no_token_and_no_finite_number(models, documents, tmp_path):
    output = tmp_path / "out.jsonl"
    folder = shutil.copytree(models["mean"], tmp_path / "nan")
    changed = LinformerModel.from_pretrained(folder)
    torch.nn.init.constant_(changed.get_input_embeddings().weight, math.nan)
    changed.save_pretrained(folder)
    with pytest.raises(UserError, match="no document was answered, most often for the reason 'not finite'"):
        run(folder, documents, output)
    assert {row["error"] for row in read(output)} == {"not finite: what the model answers"}
    assert {row["embedding"] for row in read(output)} == {None}

    folder = shutil.copytree(models["mean"], tmp_path / "control")
    # WordPiece drops control characters, after which nothing is left.
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.save_pretrained(folder)
    rows = run(folder, write_texts(tmp_path / "control.jsonl", ["\u0001\u0002", "of"]), output)
    assert [row["error"] for row in rows] == ["empty: it has no tokens", ""]


# What is written, and going on


def test_it_resumes_exactly_after_being_killed(model, tmp_path):
    generator = random.Random(0)
    texts = [words(generator.randint(1, 60), number) for number in range(40)]
    texts[17] = " "
    path = write_texts(tmp_path / "texts.jsonl", texts)
    settings = ["--chunk_size", 3, "--windows", "true"]
    whole, output = tmp_path / "whole.parquet", tmp_path / "out.parquet"
    embed.main(options(model, path, whole, *settings))
    arguments = options(model, path, output, *settings, "--resume", "true")
    # In a process of its own, which dies as half a row of its fifth chunk is on the disk.
    dying = (
        "import os, signal, sys, torch, embed\n"
        "torch.set_num_threads(1)\n"
        "real, calls = os.fsync, []\n"
        "def fsync(number):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 5:\n"
        "        os.ftruncate(number, os.fstat(number).st_size - 7)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    real(number)\n"
        "os.fsync = fsync\n"
        "embed.main(sys.argv[1:])\n"
    )
    folders = [str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    process = subprocess.run([sys.executable, "-c", dying, *arguments], env=environment, capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    assert not output.exists() and (tmp_path / "out.parquet.partial").exists()
    record = json.loads((tmp_path / "out.parquet.progress.json").read_text())
    assert 0 < record["progress"]["documents"] < len(texts)
    embed.main(arguments)
    assert output.read_bytes() == whole.read_bytes()
    assert {path.name for path in tmp_path.glob("out*")} == {output.name, "out.parquet.progress.json"}


class Stopped(Exception):
    pass


def stop(model: Path, given: Path, output: Path, *more) -> None:
    """Run until the third chunk of two documents."""
    real, calls = embed.embed, []

    def stopped(*args):
        calls.append(1)
        if len(calls) == 3:
            raise Stopped
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed, "embed", stopped)
        with pytest.raises(Stopped):
            embed.main(options(model, given, output, "--chunk_size", 2, *more))


def test_output_is_never_replaced_unasked_nor_mixed(model, documents, tmp_path, capsys):
    model, output = shutil.copytree(model, tmp_path / "model"), tmp_path / "out.jsonl"
    whole = run(model, documents, output)
    kept = output.read_bytes()
    with pytest.raises(UserError, match="out.jsonl is there: go on with --resume true, or replace it with"):
        embed.main(options(model, documents, output))
    with pytest.raises(UserError, match="--resume goes on and --overwrite begins again"):
        embed.main(options(model, documents, output, "--resume", "true", "--overwrite", "true"))
    embed.main(options(model, documents, output, "--resume", "true"))
    assert "out.jsonl is whole: there is nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="with other arguments: windows was False and is True$"):
        embed.main(options(model, documents, output, "--resume", "true", "--windows", "true"))
    stop(model, documents, output, "--overwrite", "true")
    assert output.read_bytes() == kept and (tmp_path / "out.jsonl.partial").exists()

    # How tokens are pooled makes another run, though no weight is another.
    settings = model / "1_Pooling" / "config.json"
    before = settings.read_text()
    settings.write_text(before.replace('"mean"', '"cls"'))
    with pytest.raises(UserError, match="other arguments: SHA-256 of the configuration was"):
        embed.main(options(model, documents, output, "--resume", "true"))
    settings.write_text(before)
    output.unlink()
    embed.main(options(model, documents, output, "--resume", "true"))
    assert np.abs(embeddings_of(read(output)) - embeddings_of(whole)).max() < 1e-6


def test_parquet_is_written_some_rows_at_a_time(model, documents, tmp_path, monkeypatch):
    whole = run(model, documents, tmp_path / "whole.parquet")
    monkeypatch.setattr(answers, "GROUP_CHARACTERS", 1000)
    rows = run(model, documents, tmp_path / "out.parquet")
    assert rows == whole
    assert parquet.ParquetFile(tmp_path / "out.parquet").num_row_groups > 2


# What the user can mend


def test_bad_input_is_refused(model, documents, tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    refusals = [
        (model, ["--output_file", tmp_path / "out.csv"], "out.csv: csv has no lists of numbers; give .parquet or"),
        (model, ["--output_file", tmp_path / "out.npy"], "out.npy must be a file that ends in .parquet or .jsonl"),
        (model, ["--text_column", "text", "title"], "takes one column here: a text is embedded alone"),
        (model, ["--text_column", "body"], "has no column 'body'"),
        (model, ["--max_length", 38], "--max_length is 38, and .* reads 37 tokens at most"),
        (model, ["--max_length", 2], "--max_length is 2, and .* 37 tokens at most, 2 of them special"),
        (model, ["--chunk_size", 0], "--chunk_size must be at least 1"),
        (model, ["--prompt_name", "query"], "has no prompt 'query' for --prompt_name; it has none"),
        (tmp_path / "nowhere", [], "there is no folder .*nowhere, nor a file; cannot load the model"),
    ]
    for folder, more, message in refusals:
        with pytest.raises(UserError, match=message):
            embed.main(options(folder, documents, output, *more))
    assert not list(tmp_path.glob("out*"))
    # As Python says that a module is not there.
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(SystemExit) as exit_code:
        run_main(lambda: embed.main(options(model, documents, output)))
    assert exit_code.value.code == 2
    with pytest.raises(UserError, match="embed.py needs sentence-transformers .*: .venv/bin/pip install sentence-tr"):
        embed.main(options(model, documents, output))


def test_models_that_give_no_embedding_are_refused(models, documents, tmp_path):
    folder = shutil.copytree(models["mean"], tmp_path / "tokens")
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(modules[:1]))
    with pytest.raises(UserError, match="tokens gives no embedding of a text: its modules are .*Transformer"):
        run(folder, documents, tmp_path / "out.jsonl")
    tokenizer = tiny_tokenizer(0)
    tokenizer.add_tokens([f"word{number}" for number in range(30)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=f"has {len(tokenizer)} entries, the model 53"):
        run(folder, documents, tmp_path / "out.jsonl")
