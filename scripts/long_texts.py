"""Tokens of texts, however long: found in bounded memory, divided into what a model reads, batched by length."""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common import UserError, longest_input


# The tokenizer takes some 500 bytes a token: texts go to it in pieces, so many characters of them at a time.
PIECE_CHARACTERS, TOKENIZED_CHARACTERS = 50_000, 500_000
Item = TypeVar("Item")


def grouped(items: Iterable[Item], size_of: Callable[[Item], int], limit: int, most: int) -> Iterator[list[Item]]:
    """Lists of the items as they come, each of up to `most` and up to the item with which they reach size `limit`."""
    group: list[Item] = []
    size = 0
    for item in items:
        group.append(item)
        size += size_of(item)
        if len(group) == most or size >= limit:
            yield group
            group, size = [], 0
    if group:
        yield group


def check_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raises `UserError` for a tokenizer that is not the model's, or that this module cannot use."""
    if not tokenizer.is_fast or tokenizer.pad_token is None:
        raise UserError(f"the tokenizer of {name} must be a fast one, with a token to pad with")
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(f"the tokenizer of {name} has {len(tokenizer)} entries, the model {model.config.vocab_size}")


def tokens_read(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int | None, special: int
) -> int:
    """How many tokens one pass reads, of them `special` that stand around every text: max_length, None: all it can.

    Raises `UserError` where the model cannot read so many, or none beside the special ones.
    """
    positions = longest_input(model) or math.inf
    # The tokenizer knows the length of training; the model's table of positions may be longer.
    read = max_length or min(tokenizer.model_max_length, positions)
    if read > 2**31:
        raise UserError(f"{name} does not say how many tokens it reads; say it with --max_length")
    if not special < read <= positions:
        raise UserError(
            f"--max_length is {read}, and {name} reads {positions:,} tokens at most, {special} of them special"
        )
    return int(read)


def pieces_of(text: str) -> Iterator[str]:
    """A text in pieces of up to `PIECE_CHARACTERS`, which end before a space where there is one."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end = text.rfind(" ", start + 1, start + PIECE_CHARACTERS)
        end = end if end > 0 else start + PIECE_CHARACTERS
        yield text[start:end]
        start = end
    yield text[start:]


def tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """The tokens of each text, without special ones, in memory that is bounded however long a text is.

    The pieces of a text have the tokens of the whole wherever words are tokenized one by one.
    """
    tokens: list[list[np.ndarray]] = [[] for _ in texts]
    pieces = ((document, piece) for document, text in enumerate(texts) for piece in pieces_of(text))
    for group in grouped(pieces, lambda pair: len(pair[1]), TOKENIZED_CHARACTERS, sys.maxsize):
        encoded = tokenizer([piece for _, piece in group], add_special_tokens=False, verbose=False)["input_ids"]
        for (document, _), input_ids in zip(group, encoded):
            tokens[document].append(np.array(input_ids, dtype=np.int32))
    return [np.concatenate(parts) for parts in tokens]


def parts_of(tokens: np.ndarray, room: int, windows: bool, truncation_side: str) -> list[np.ndarray]:
    """What is read of a text: all of it in even parts of up to `room` tokens (windows), or the one that is left."""
    if windows:
        parts = np.array_split(tokens, max(1, math.ceil(len(tokens) / room)))
    else:
        parts = [tokens[-room:] if truncation_side == "left" else tokens[:room]]
    return [part for part in parts if len(part)]


def batches_of(
    rows: Iterable[tuple[int, np.ndarray]], around: int, batch_tokens: int
) -> Iterator[tuple[tuple[int, ...], tuple[np.ndarray, ...]]]:
    """Rows of tokens, each with the number of its text, in batches of up to `batch_tokens`, pads included.

    around: tokens that are put around a row
    """
    # Rows of about one length share a batch, so that little is padded.
    rows = sorted(rows, key=lambda row: len(row[1]), reverse=True)
    while rows:
        size = max(1, batch_tokens // (len(rows[0][1]) + around))
        documents, batch = zip(*rows[:size])
        yield documents, batch
        rows = rows[size:]


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens are left of two texts of so many: the longer is cut first, as the library's tokenizers do it."""
    if first + second <= room:
        return first, second
    shorter = min(first, second)
    if 2 * shorter <= room:
        return (shorter, room - shorter) if first <= second else (room - shorter, shorter)
    half, more = room // 2, room - room // 2
    return (half, more) if first <= second else (more, half)


def with_special_tokens(
    rows: Sequence[np.ndarray], tokenizer: PreTrainedTokenizerBase, splits: Sequence[int] | None = None
) -> dict[str, list[list[int]]]:
    """What the model is given for rows of tokens: around each, what the tokenizer puts around a text.

    splits: where the second text of each row begins, None: a row is one text
    """
    texts = range(1 if splits is None else 2)
    example = tokenizer(*("a" for _ in texts))
    owners = example.sequence_ids(0)
    bounds = [(owners.index(text), len(owners) - owners[::-1].index(text)) for text in texts]
    inputs: dict[str, list[list[int]]] = {name: [] for name in example}
    for number, row in enumerate(rows):
        parts = [row] if splits is None else np.split(row, [splits[number]])
        for name, values in example.items():
            given, before = [], 0
            for part, (start, end) in zip(parts, bounds):
                given += values[before:start]
                given += part.tolist() if name == "input_ids" else values[start : start + 1] * len(part)
                before = end
            inputs[name].append(given + values[before:])
    return inputs
