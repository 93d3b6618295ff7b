"""Plain texts as blocks of n tokens without waste, masked anew each epoch.

Documents are tokenized, joined with a separator after each, and cut into blocks of n tokens, the first and last of
which are the special tokens that the model expects around a text. A block begins where the one before it ended,
whatever document or sentence that was in (RoBERTa's FULL-SENTENCES, without looking for the ends of sentences).

What is masked in a block is drawn by the seed, the epoch and the block alone: the same for every model, every number
of processes and every resumed run. Streams are the exception: each process, and each worker that reads ahead, has its
own part of the documents, packs it by itself, and has blocks of its own.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from datasets.exceptions import DatasetsError
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from common import UserError, one_line
from training import Batch, Rows


# The mask of held-out text is drawn by this, whatever --seed is, so that runs compare.
EVALUATION_SEED = 0


class Frame(NamedTuple):
    """The special tokens around a block; the last one also stands after each document."""

    first: int
    last: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Frame":
        """Raises `UserError` for a tokenizer that has none."""
        first = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
        last = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
        if first is None or last is None or tokenizer.mask_token_id is None:
            raise UserError(
                "the tokenizer must have a mask token and special tokens around a text, as BERT's and RoBERTa's have; "
                f"it has {tokenizer.special_tokens_map}"
            )
        return cls(first, last)


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids without special tokens, of any length; what a text spells as one, such as `<mask>`, is text."""
    options = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
    return tokenizer(list(texts), verbose=False, **options)["input_ids"]


def tokenize_documents(
    texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, num_workers: int | None, description: str
) -> datasets.Dataset:
    """One column of texts to `input_ids`, `length` and `document`, its number; empty ones are left out. Cached."""
    (column,) = texts.column_names

    def tokenize(batch: dict[str, list[str | None]], rows: list[int]) -> dict[str, list[Any]]:
        kept = [(row, text) for row, text in zip(rows, batch[column]) if text and text.strip()]
        input_ids = encode(tokenizer, [text for _, text in kept]) if kept else []
        return {
            "input_ids": input_ids,
            "length": [len(ids) for ids in input_ids],
            "document": [row for row, _ in kept],
        }

    return texts.map(
        tokenize,
        with_indices=True,
        batched=True,
        # Documents may be whole books.
        batch_size=64,
        writer_batch_size=64,
        remove_columns=texts.column_names,
        features=datasets.Features(
            {
                "input_ids": datasets.List(datasets.Value("int32")),
                "length": datasets.Value("int64"),
                "document": datasets.Value("int64"),
            }
        ),
        num_proc=num_workers,
        desc=description,
    )


class PackedBlocks(Dataset):
    """Blocks of tokenized documents, cut when they are asked for. The last tokens that fill no block are left out."""

    def __init__(self, documents: datasets.Dataset, block_length: int, frame: Frame):
        """documents: of `tokenize_documents`"""
        self.documents = documents.with_format("numpy")
        self.frame, self.room, self.epoch = frame, block_length - 2, 0
        # Where each document, with its separator, ends in the whole.
        self.ends = np.cumsum(np.asarray(documents["length"][:], dtype=np.int64) + 1)

    @property
    def num_tokens(self) -> int:
        """Of all documents with their separators."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def __len__(self) -> int:
        return self.num_tokens // self.room

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, stop = index * self.room, (index + 1) * self.room
        row = int(np.searchsorted(self.ends, start, side="right"))
        pieces, names = [], []
        while start < stop:
            document = self.documents[row]
            begin = self.ends[row - 1] if row else 0
            pieces.append(np.append(document["input_ids"], self.frame.last)[start - begin : stop - begin])
            names.append(int(document["document"]))
            start += len(pieces[-1])
            row += 1
        input_ids = np.concatenate([[self.frame.first], *pieces, [self.frame.last]])
        return {"input_ids": input_ids, "documents": (names[0], names[-1]), "key": (self.epoch, index)}


def spread_evenly(blocks: PackedBlocks, count: int) -> Subset:
    """At most `count` blocks, from the first to the last."""
    chosen = np.linspace(0, len(blocks) - 1, min(len(blocks), count)).round().astype(int)
    return Subset(blocks, chosen.tolist())


class BlockStream(IterableDataset):
    """Endless blocks of streamed documents, which are read again when they end.

    Blocks are shuffled in windows: as many documents are read as fill `window` blocks, which come in an order drawn by
    the seed. To go on, it is enough to know where the window began and how many of its blocks were given.
    """

    def __init__(
        self,
        documents: datasets.IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        block_length: int,
        seed: int,
        window: int,
        process_index: int = 0,
    ):
        """documents: those of this process, one column of texts"""
        self.documents, self.tokenizer, self.frame = documents, tokenizer, Frame.of(tokenizer)
        (self.column,) = documents.column_names
        self.room, self.seed, self.window, self.process_index = block_length - 2, seed, window, process_index
        # Of the window that is given out: what was left of the one before it, and what comes next.
        self.state: dict[str, Any] = {"window": 0, "given": 0, "documents": None, "next_document": 0}
        self.state |= {"rest": [], "rest_documents": []}

    def state_dict(self) -> dict[str, Any]:
        """What there is to know to go on after the block that was given last."""
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there."""
        self.state = dict(state)

    def texts(self) -> Iterator[tuple[int, str]]:
        """Documents that are not empty, with their numbers in the stream, without end."""
        self.documents.load_state_dict(self.state["documents"])
        first = self.state["next_document"]
        any_text = first > 0
        while True:
            number = first
            try:
                for number, row in enumerate(self.documents, start=first):
                    if row[self.column] and row[self.column].strip():
                        any_text = True
                        yield number, row[self.column]
            except (DatasetsError, OSError, EOFError, ValueError) as error:
                raise UserError(f"cannot read the stream after document {number}: {one_line(error)}") from error
            if not any_text:
                raise UserError("there is no text in the stream of documents")
            first, any_text = 0, False
            self.documents.load_state_dict(None)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        place = (self.process_index, worker.id if worker else 0)
        texts = self.texts()
        while True:
            state = self.state
            tokens, owners = list(state["rest"]), list(state["rest_documents"])
            next_document = state["next_document"]
            while len(tokens) < self.window * self.room:
                number, text = next(texts)
                ids = [*encode(self.tokenizer, [text])[0], self.frame.last]
                tokens += ids
                owners += [number] * len(ids)
                next_document = number + 1
            count = len(tokens) // self.room
            order = np.random.default_rng((self.seed, *place, state["window"])).permutation(count).tolist()
            for given in range(state["given"], count):
                part = slice(order[given] * self.room, (order[given] + 1) * self.room)
                state["given"] = given + 1
                yield {
                    "input_ids": np.array([self.frame.first, *tokens[part], self.frame.last]),
                    "documents": (owners[part][0], owners[part][-1]),
                    "key": (*place, state["window"], order[given]),
                }
            self.state = {
                "window": state["window"] + 1,
                "given": 0,
                "documents": self.documents.state_dict(),
                "next_document": next_document,
                "rest": tokens[count * self.room :],
                "rest_documents": owners[count * self.room :],
            }


class MaskingCollator:
    """Blocks to a batch: `input_ids` with masks, `labels` (-100 where nothing is asked), both (B, n), `documents`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, mlm_probability: float, seed: int):
        self.masking = DataCollatorForLanguageModeling(tokenizer, mlm_probability=mlm_probability)
        self.special = torch.tensor(tokenizer.all_special_ids)
        self.seed = seed

    def __call__(self, blocks: list[dict[str, Any]]) -> Batch:
        masked = []
        for block in blocks:
            drawn = np.random.SeedSequence((self.seed, *block["key"])).generate_state(1, np.uint64)[0]
            self.masking.generator = torch.Generator().manual_seed(int(drawn >> np.uint64(1)))
            # A copy, since tokens are masked in place.
            input_ids = torch.tensor(block["input_ids"], dtype=torch.int64)[None]
            masked.append(self.masking.torch_mask_tokens(input_ids, torch.isin(input_ids, self.special)))
        input_ids, labels = (torch.cat(parts) for parts in zip(*masked))
        return {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "labels": labels,
            "documents": torch.tensor([block["documents"] for block in blocks]),
        }


class Shuffled(Sampler):
    """All indices in an order drawn by a generator."""

    def __init__(self, length: int, generator: torch.Generator):
        self.length, self.generator = length, generator

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.length, generator=self.generator).tolist())


def documents_of(batch: Batch) -> list[str]:
    """The documents that the blocks of a batch come from."""
    spans = batch["documents"].tolist()
    return [f"document {first}" if first == last else f"documents {first} to {last}" for first, last in spans]


def leave_group(worker: int) -> None:
    """Out of the processes that Ctrl-C reaches: a run ends its step first, and needs those that read ahead for it."""
    os.setpgid(0, 0)


class Blocks(Rows):
    """The training data where all of it is tokenized before training begins."""

    def __init__(self, accelerator: Accelerator, blocks: PackedBlocks, collate: MaskingCollator, **options: Any):
        """options: of the loader"""
        generator = torch.Generator()
        options |= {"collate_fn": collate, "worker_init_fn": leave_group if hasattr(os, "setpgid") else None}
        loader = DataLoader(blocks, sampler=Shuffled(len(blocks), generator), **options)
        super().__init__(accelerator, loader, generator, collate.seed)
        self.blocks = blocks

    def batches(self, epoch: int, skipped: int) -> Iterator[Batch]:
        """With masks of that epoch."""
        self.blocks.epoch = epoch
        return super().batches(epoch, skipped)

    names_of = staticmethod(documents_of)


class StreamedBlocks:
    """The training data where documents are read as training goes."""

    batches_per_epoch: int | None = None

    def __init__(self, accelerator: Accelerator, stream: BlockStream, collate: MaskingCollator, **options: Any):
        """options: of the loader"""
        # Not through accelerate, which keeps the state of one process only.
        options |= {"collate_fn": collate, "worker_init_fn": leave_group if hasattr(os, "setpgid") else None}
        self.loader = StatefulDataLoader(stream, **options)
        self.device = accelerator.device

    def batches(self, epoch: int, skipped: int) -> Iterator[Batch]:
        """From where the state says."""
        try:
            for batch in self.loader:
                yield send_to_device(batch, self.device)
        except UserError as error:
            # That of a worker has a traceback for a message, at the end of which is what it said.
            raise UserError(str(error).rpartition("UserError: ")[2].strip()) from error

    def state_dict(self) -> dict[str, Any]:
        """Of the loader, and of the stream in each of its workers."""
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there."""
        self.loader.load_state_dict(state)

    names_of = staticmethod(documents_of)
