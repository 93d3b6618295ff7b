"""Find the second half of a document by its first, among all second halves: what an embedding of long text is worth.

    python scripts/match_halves.py --model_name_or_path checkpoints/linformer-all-MiniLM-L6-v2 \\
        --validation_file data/sotu/dev.parquet
    python scripts/match_halves.py --model_name_or_path path/to/bert --method windows --max_length 256 \\
        --validation_file speeches.parquet --max_words 6000

Every document is cut in two at its middle word. An embedding is the mean of the last hidden states of all real tokens,
of the first --max_length of them (truncate) or of all, read in windows one after the other (windows). Halves are
ranked by their cosine; what ties with the right one counts as before it. `recall_at_1`, and `mrr`, the mean of
1 / rank, are taken over both directions: first halves that look for second ones, and the reverse. The interval of
`recall_at_1` is of 95 %, by texts drawn again with replacement (the bootstrap), each with all its pieces. --ranks_file
keeps the ranks, and --compare_with takes those of another model on the same documents: `difference` is then how much
more of the halves are found, with an interval that is far narrower than those of the two.

`seconds_per_document` is the model's time for both halves, without the tokenizer's, after a batch to warm up. `tokens`
and `tokens_read` are those of a half on average, special ones left out.
"""

import csv
import math
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

# Registers the model with AutoModel.
import hf_linformer  # noqa: F401
from common import (
    UserError,
    append_result,
    format_table,
    load_data_files,
    one_line,
    only_texts,
    parse_arguments,
    run_main,
    write_aside,
)


@dataclass
class Arguments:
    """Which model, how it reads long text, and which documents are matched."""

    model_name_or_path: str = field(
        metadata={"help": "Any encoder: a Hub name or a folder. Only safetensors are read."}
    )
    validation_file: list[str] = field(
        metadata={"help": "Documents: csv, tsv, json, jsonl or parquet, also with .gz; txt holds one a line."}
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    data_name: str | None = field(
        default=None, metadata={"help": "What the results call the documents. Default: the name of the file."}
    )
    method: str = field(
        default="truncate",
        metadata={
            "help": "Read the beginning of a half, or all of it in windows.",
            "choices": ["truncate", "windows"],
        },
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Tokens of one pass, special ones included. Default: all that the model reads."},
    )
    min_words: int = field(default=600, metadata={"help": "Leave out documents of fewer words, both halves together."})
    max_words: int | None = field(default=None, metadata={"help": "Cut documents of more words."})
    pieces_per_document: int = field(
        default=1,
        metadata={"help": "Take so many pieces of --max_words, one after the other, each for a document of its own."},
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Match so many documents, drawn by the seed."}
    )
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Rows of one forward pass."})
    dtype: str = field(
        default="float32", metadata={"help": "Of the weights and of the work.", "choices": ["float32", "bfloat16"]}
    )
    ranks_file: str | None = field(
        default=None, metadata={"help": "Write the rank of every half to this CSV, a new one."}
    )
    compare_with: str | None = field(
        default=None, metadata={"help": "The --ranks_file of another model, of the same documents."}
    )
    seed: int = field(default=42, metadata={"help": "Of the documents, and of what is drawn for the intervals."})
    run_name: str = field(default="halves", metadata={"help": "The run's name in --results_file."})
    results_file: str | None = field(default=None, metadata={"help": "Add a row to this CSV."})


# Documents


class Halves(NamedTuple):
    """A document cut in two, and the number of the text that it is, or is a piece of."""

    first: str
    second: str
    text_number: int


def halves_of(texts: Iterable[str | None], arguments: Arguments) -> list[Halves]:
    """The two halves of every document that is long enough; of equal documents one, as none could be told apart."""
    documents: dict[tuple[str, ...], int] = {}
    for number, text in enumerate(texts):
        words = (text or "").split()
        size = arguments.max_words or max(len(words), 1)
        for start in range(0, len(words), size)[: arguments.pieces_per_document]:
            piece = tuple(words[start : start + size])
            if len(piece) >= arguments.min_words:
                documents.setdefault(piece, number)
    drawn = list(documents.items())
    if arguments.max_eval_samples is not None and arguments.max_eval_samples < len(drawn):
        drawn = random.Random(arguments.seed).sample(drawn, arguments.max_eval_samples)
    return [
        Halves(" ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :]), number)
        for words, number in drawn
    ]


def load_halves(arguments: Arguments) -> list[Halves]:
    dataset = load_data_files({"validation": arguments.validation_file})["validation"]
    name = " ".join(arguments.validation_file)
    halves = halves_of(only_texts(dataset, arguments.text_column, name)[arguments.text_column], arguments)
    if len(halves) < 2:
        raise UserError(
            f"{name} has {len(halves)} different documents of --min_words {arguments.min_words}; at least 2 are needed"
        )
    return halves


# Embeddings


def load_model(arguments: Arguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, int]:
    """The encoder, its tokenizer, and how many tokens it reads in one pass."""
    name = arguments.model_name_or_path
    try:
        dtype = getattr(torch, arguments.dtype)
        model = AutoModel.from_pretrained(name, dtype=dtype, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"cannot load the model {name}: {one_line(error)}") from error
    if model.config.is_encoder_decoder:
        raise UserError(f"{name} is a {type(model).__name__}, which has a decoder; give an encoder")
    if not tokenizer.is_fast or tokenizer.pad_token is None:
        raise UserError(f"the tokenizer of {name} must be a fast one, with a token to pad with")
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or math.inf)
    special = tokenizer.num_special_tokens_to_add()
    if arguments.max_length is not None and not special < arguments.max_length <= limit:
        raise UserError(
            f"--max_length is {arguments.max_length}, and {name} reads {limit:,} tokens at most, {special} of them "
            "special ones"
        )
    if arguments.max_length is None and limit > 2**31:
        raise UserError(f"{name} does not say how many tokens it reads; say it with --max_length")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.eval().to(device), tokenizer, arguments.max_length or int(limit)


def rows_of(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
    """The text in windows of token ids, each with its special tokens."""
    return tokenizer(text, truncation=True, max_length=max_length, return_overflowing_tokens=True)["input_ids"]


@torch.inference_mode()
def sums_of_states(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[list[int]]) -> Tensor:
    """The last hidden states of the real tokens of each row, summed in float32: (B, D)"""
    batch = tokenizer.pad({"input_ids": list(rows)}, return_tensors="pt").to(model.device)
    states = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return torch.einsum("bnd,bn->bd", states.float(), batch["attention_mask"].float()).cpu()


def embed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[list[list[int]]], batch_size: int
) -> tuple[Tensor, float]:
    """Unit vectors for texts that are read in one or more rows, (texts, D), and the seconds that the model took."""
    rows = sorted(
        ((row, text) for text, of_text in enumerate(texts) for row in of_text), key=lambda pair: len(pair[0])
    )
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    sums_of_states(model, tokenizer, [row for row, _ in batches[-1]])
    started = time.perf_counter()
    found = [
        sums_of_states(model, tokenizer, [row for row, _ in batch]) for batch in tqdm(batches, desc="reading halves")
    ]
    seconds = time.perf_counter() - started
    # The sum over the rows of a text points where the mean of its tokens does.
    sums = torch.zeros(len(texts), found[0].shape[1])
    sums.index_add_(0, torch.tensor([text for _, text in rows]), torch.cat(found))
    return nn.functional.normalize(sums, dim=-1), seconds


# Ranks


def ranks_of(queries: Tensor, candidates: Tensor) -> Tensor:
    """At which place, from 1, query i finds candidate i; what ties with it is before it. (M, D) twice -> (M,)"""
    cosines = queries @ candidates.T
    # NaN is nowhere less: it is before it too.
    return len(cosines) - (cosines < cosines.diagonal()[:, None]).sum(dim=1)


def interval(values: np.ndarray, texts: np.ndarray, seed: int, resamples: int = 2000) -> tuple[float, float]:
    """Where 95 % of the means lie if the texts are drawn again, each with all its values. (M,), (M,) -> two numbers"""
    _, owner = np.unique(texts, return_inverse=True)
    sums, counts = np.bincount(owner, values), np.bincount(owner)
    drawn = np.random.default_rng(seed).integers(0, len(sums), (resamples, len(sums)))
    low, high = np.percentile(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1), [2.5, 97.5])
    return float(low), float(high)


def measure(ranks: np.ndarray, others: np.ndarray | None, texts: np.ndarray, seed: int) -> dict[str, float]:
    """Recall at 1 and mean reciprocal rank over both directions. ranks, others: (M, 2), others of another model"""
    found = (ranks == 1).mean(axis=1)
    low, high = interval(found, texts, seed)
    values = {"recall_at_1": float(found.mean()), "recall_at_1_low": low, "recall_at_1_high": high}
    values["mrr"] = float((1 / ranks).mean())
    if others is not None:
        more = found - (others == 1).mean(axis=1)
        low, high = interval(more, texts, seed)
        values |= {"difference": float(more.mean()), "difference_low": low, "difference_high": high}
    return values


def read_ranks(path: Path, halves: Sequence[Halves]) -> np.ndarray:
    """What another run wrote of the same documents: (M, 2). Raises `UserError` if it is of others."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        ranks = np.array([[int(row["rank_of_first"]), int(row["rank_of_second"])] for row in rows])
        begun = [row["begins"] for row in rows]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"--compare_with {path} is no --ranks_file of this script: {one_line(error)}") from error
    if begun != [beginning(pair) for pair in halves]:
        raise UserError(f"--compare_with {path} is of {len(rows)} other documents than these {len(halves)}")
    return ranks


def write_ranks(path: Path, halves: Sequence[Halves], ranks: np.ndarray) -> None:
    with write_aside(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["begins", "rank_of_first", "rank_of_second"])
        writer.writerows([beginning(pair), *of_pair] for pair, of_pair in zip(halves, ranks.tolist()))


def beginning(pair: Halves) -> str:
    """What a document is known by in a file of ranks."""
    return pair.first[:80]


def check_arguments(arguments: Arguments) -> None:
    least = {"max_length": 1, "min_words": 2, "max_words": 2, "pieces_per_document": 1, "max_eval_samples": 2}
    for name, limit in (least | {"per_device_eval_batch_size": 1}).items():
        if (value := getattr(arguments, name)) is not None and value < limit:
            raise UserError(f"--{name} must be at least {limit}, not {value}")
    if arguments.pieces_per_document > 1 and arguments.max_words is None:
        raise UserError("--pieces_per_document needs --max_words, the size of a piece")
    if arguments.max_words is not None and arguments.max_words < arguments.min_words:
        raise UserError(f"--max_words {arguments.max_words} leaves no document of --min_words {arguments.min_words}")
    if arguments.ranks_file is not None and Path(arguments.ranks_file).exists():
        raise UserError(f"--ranks_file {arguments.ranks_file} is there; remove it or choose another name")


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments((Arguments,), argv, description=__doc__)
    check_arguments(arguments)
    halves = load_halves(arguments)
    others = read_ranks(Path(arguments.compare_with), halves) if arguments.compare_with else None
    model, tokenizer, max_length = load_model(arguments)

    texts = [pair.first for pair in halves] + [pair.second for pair in halves]
    rows = [rows_of(text, tokenizer, max_length) for text in tqdm(texts, desc="tokenizing")]
    read = [of_text[:1] for of_text in rows] if arguments.method == "truncate" else rows
    special = tokenizer.num_special_tokens_to_add()
    tokens, tokens_read = (
        sum(len(row) - special for of_text in of_texts for row in of_text) / len(texts) for of_texts in (rows, read)
    )
    embeddings, seconds = embed(model, tokenizer, read, arguments.per_device_eval_batch_size)

    first, second = embeddings[: len(halves)], embeddings[len(halves) :]
    ranks = torch.stack([ranks_of(first, second), ranks_of(second, first)], dim=1).numpy()
    if arguments.ranks_file:
        write_ranks(Path(arguments.ranks_file), halves, ranks)
    row: dict[str, Any] = {
        "documents": len(halves),
        "tokens": tokens,
        "tokens_read": tokens_read,
        **measure(ranks, others, np.array([pair.text_number for pair in halves]), arguments.seed),
        "seconds_per_document": seconds / len(halves),
    }
    print(format_table([row]))
    if arguments.results_file:
        described = {
            "run_name": arguments.run_name,
            "model": arguments.model_name_or_path,
            **{key: getattr(model.config, key, "") for key in ("model_type", "projected_length", "local_window")},
            "data": arguments.data_name or " ".join(Path(path).name for path in arguments.validation_file),
            "method": arguments.method,
            "max_length": max_length,
            "dtype": arguments.dtype,
            "num_threads": torch.get_num_threads(),
        }
        if arguments.compare_with:
            described["compared_with"] = Path(arguments.compare_with).stem
        append_result(arguments.results_file, described | row, arguments.seed, argv)


if __name__ == "__main__":
    run_main(main)
