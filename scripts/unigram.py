"""What a masked language model must beat: guessing tokens by how often they occur, blind to their context.

    python scripts/unigram.py --train_file books/train.parquet --validation_file books/validation.parquet \\
        --results_file results/pretraining.csv

The blocks, the masks and the options are those of scripts/pretrain.py, so that the perplexities compare: what is below
this one is what a model makes of the context. Every token of the vocabulary is counted once more than it occurs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from common import (
    TextArguments,
    UserError,
    append_result,
    load_data_files,
    load_texts,
    only_texts,
    parse_arguments,
    run_main,
)
from loading import load_tokenizer
from packing import EVALUATION_SEED, Frame, MaskingCollator, PackedBlocks, spread_evenly, tokenize_documents


@dataclass
class Arguments:
    """What is counted, and what is guessed."""

    validation_file: list[str] = field(metadata={"help": "Held-out text to evaluate on."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Default: this repository's tokenizer/."})
    max_length: int = field(default=512, metadata={"help": "Tokens of a block."})
    max_eval_samples: int = field(
        default=500, metadata={"help": "Evaluate on at most so many blocks, spread evenly over the held-out text."}
    )
    mlm_probability: float = field(
        default=0.15, metadata={"help": "Share of the tokens that are masked, as --eval_mlm_probability."}
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    seed: int = field(default=42, metadata={"help": "For the results; nothing is drawn by it."})
    run_name: str = field(default="unigram", metadata={"help": "The run's name in --results_file."})
    results_file: str | None = field(default=None, metadata={"help": "Add a row to this CSV."})


def count_tokens(blocks: PackedBlocks, vocab_size: int) -> np.ndarray:
    """How often each token of the vocabulary occurs in the documents of the blocks: (vocab,)"""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for document in tqdm(blocks.documents, desc="Counting tokens"):
        counts += np.bincount(document["input_ids"], minlength=vocab_size)
    return counts


def main(argv: Sequence[str] | None = None) -> None:
    texts, arguments = parse_arguments((TextArguments, Arguments), argv, description=__doc__)
    if not 0 < arguments.mlm_probability < 1:
        raise UserError(f"--mlm_probability must lie between 0 and 1, and is {arguments.mlm_probability}")
    for name, least in {"max_length": 8, "max_eval_samples": 1}.items():
        if getattr(arguments, name) < least:
            raise UserError(f"--{name} must be at least {least}, and is {getattr(arguments, name)}")
    tokenizer = load_tokenizer(arguments.tokenizer_name)
    frame, workers = Frame.of(tokenizer), arguments.preprocessing_num_workers
    files = arguments.validation_file
    held_out = load_data_files({"validation": files}, texts.sample_by)["validation"]
    held_out = only_texts(held_out, texts.text_column, " ".join(files))
    tokenized = {
        "training": tokenize_documents(load_texts(texts), tokenizer, workers, "Tokenizing documents"),
        "held-out": tokenize_documents(held_out, tokenizer, workers, "Tokenizing held-out documents"),
    }
    blocks = {name: PackedBlocks(documents, arguments.max_length, frame) for name, documents in tokenized.items()}
    if not len(blocks["held-out"]):
        raise UserError(f"the held-out text is not enough for one block of {arguments.max_length}; lower --max_length")

    counts = count_tokens(blocks["training"], len(tokenizer)) + 1
    losses = -np.log(counts / counts.sum())
    collate = MaskingCollator(tokenizer, arguments.mlm_probability, EVALUATION_SEED)
    chosen = spread_evenly(blocks["held-out"], arguments.max_eval_samples)
    asked = [batch["labels"][batch["labels"] != -100].numpy() for batch in DataLoader(chosen, 32, collate_fn=collate)]
    loss = float(losses[np.concatenate(asked)].mean())
    print(f"perplexity {math.exp(loss):,.1f} on {len(chosen):,} blocks, of {blocks['training'].num_tokens:,} tokens")
    if arguments.results_file:
        row = {"run_name": arguments.run_name, "model": "token frequencies", "max_length": arguments.max_length}
        row |= {"parameters": len(tokenizer), "tokens": blocks["training"].num_tokens, "step": 0}
        row |= {"validation_loss": loss, "validation_perplexity": math.exp(loss)}
        append_result(arguments.results_file, row, arguments.seed, argv)


if __name__ == "__main__":
    run_main(main)
