"""Train a byte-level BPE tokenizer with RoBERTa's special tokens: any text in, the same text out, no unknown words.

Files, folders and patterns, all in one call (.parquet, and .txt .jsonl .json .csv .tsv as they are or with .gz):

    python scripts/train_tokenizer.py --train_file corpus/ more/*.jsonl.gz --output_dir my_tokenizer

The set that ships with the repository, in seconds:

    python scripts/train_tokenizer.py --train_file data/sotu --vocab_size 8192 --output_dir runs/tokenizer

All options can stand in one file: `python scripts/train_tokenizer.py options.yaml`. The same texts and options always
give the same tokenizer.json, byte for byte.
"""

import glob
import json
import os
import random
import re
import sys
import tempfile
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import RobertaTokenizer

from common import FILE_TYPES, UserError, load_data_files, one_line, only_texts, parse_arguments, run_main


# Their order is their ids, which are RoBERTa's. <mask> takes the space before it, so that what is predicted in its
# place is a word with its space.
MASK_TOKEN = AddedToken("<mask>", lstrip=True, normalized=False, special=True)
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", MASK_TOKEN]
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256

# Characters in a piece of a document: a few lines, so that the trainer's buffer of pieces stays small.
PIECE_LENGTH = 4096
# The last white space before a word opens that word's token or stands alone: a cut there changes no token.
CUT = re.compile(r"[ \n](?=\S)")

LINES_PER_READ = 1000
SAMPLE_PIECES = 1000

# The last two are of older versions of Transformers, which still reads them on top of the new ones.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclass
class Arguments:
    output_dir: str = field(metadata={"help": "Folder for tokenizer.json and tokenizer_config.json."})
    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Files, folders (searched to the bottom) or glob patterns. Types, told by the name: "
            f"{' '.join(FILE_TYPES)}, all but .parquet also with .gz. Their other columns may differ."
        },
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Instead of files: a data set on the Hub, or a folder that `datasets` loads."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that data set."})
    dataset_split: str = field(default="train", metadata={"help": "Split of that data set, e.g. train[:1%%]."})
    text_column: str = field(
        default="text", metadata={"help": "Column that holds the text; .txt files have none, all of them is text."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Read only so many rows (of .txt files: lines), drawn by the seed."}
    )
    vocab_size: int = field(
        default=32768,
        metadata={"help": f"Entries, with the special tokens and the 256 bytes; {SMALLEST_VOCABULARY} or more."},
    )
    allow_smaller_vocab: bool = field(
        default=False, metadata={"help": "Keep a tokenizer with fewer entries when the texts do not yield vocab_size."}
    )
    min_frequency: int = field(default=2, metadata={"help": "Merge only pairs that occur at least this often."})
    model_max_length: int = field(
        default=512, metadata={"help": "Tokens in the model's longest input: where `truncation=True` cuts."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace the tokenizer in output_dir."})
    seed: int = field(
        default=42,
        metadata={"help": "Draws the rows of --max_train_samples, and the texts to measure bytes per token on."},
    )


class Source(NamedTuple):
    dataset: Dataset
    text_column: str
    rows_are_lines: bool


class Corpus:
    """The texts of all sources, one after another, in pieces of some `PIECE_LENGTH` characters.

    A pass over it counts `num_bytes` and keeps a `sample` of the pieces, each as likely as any other.
    """

    def __init__(self, sources: list[Source], seed: int) -> None:
        self.sources = sources
        self.seed = seed
        self.num_bytes = 0
        self.sample: list[str] = []

    def __iter__(self) -> Iterator[str]:
        self.num_bytes, self.sample = 0, []
        rng = random.Random(self.seed)
        for number, piece in enumerate(self._pieces()):
            self.num_bytes += len(piece.encode())
            if number < SAMPLE_PIECES:
                self.sample.append(piece)
            elif (place := rng.randrange(number + 1)) < SAMPLE_PIECES:
                self.sample[place] = piece
            yield piece

    def _pieces(self) -> Iterator[str]:
        total = sum(len(source.dataset) for source in self.sources)
        # On a terminal one line below the trainer's own progress.
        with tqdm(total=total, desc="reading", unit=" rows", position=int(sys.stderr.isatty())) as progress:
            for dataset, text_column, rows_are_lines in self.sources:
                for rows in dataset.iter(batch_size=LINES_PER_READ if rows_are_lines else 1):
                    texts = rows[text_column]
                    yield from cut("".join(f"{line}\n" for line in texts) if rows_are_lines else texts[0] or "")
                    progress.update(len(texts))


def cut(text: str, length: int = PIECE_LENGTH) -> Iterator[str]:
    """Cut a text into pieces of `length` to `2 * length` characters (the last may be shorter; of "" there is none).

    The trainer counts the same words in the pieces as in the whole, unless `length` characters go by without a space
    or line end before a word: then the cut falls where it may.
    """
    start = 0
    while len(text) - start > 2 * length:
        place = CUT.search(text, start + length, start + 2 * length)
        end = place.start() if place else start + 2 * length
        yield text[start:end]
        start = end
    if text:
        yield text[start:]


def check_arguments(arguments: Arguments) -> None:
    if (arguments.train_file is None) == (arguments.dataset_name is None):
        found = "neither" if arguments.train_file is None else "both"
        raise UserError(f"give either --train_file or --dataset_name, got {found}")
    for name, smallest in (
        ("vocab_size", SMALLEST_VOCABULARY),
        ("min_frequency", 1),
        # A pair of texts needs four special tokens, and a token of its own.
        ("model_max_length", 5),
        ("max_train_samples", 1),
    ):
        value = getattr(arguments, name)
        if value is not None and value < smallest:
            raise UserError(f"--{name} is {value}, must be {smallest} or more")
    output_dir = Path(arguments.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file, must be a folder")
    for name in TOKENIZER_FILES:
        if (output_dir / name).exists() and not arguments.overwrite_output_dir:
            raise UserError(
                f"{output_dir / name} exists; pass --overwrite_output_dir to replace it or choose another --output_dir"
            )


def find_files(patterns: list[str]) -> list[str]:
    """The files that are meant, each once, those of a folder or pattern by name."""
    files: dict[str, None] = {}
    for pattern in patterns:
        if Path(pattern).is_dir():
            paths = [path for path in sorted(Path(pattern).rglob("*")) if path.is_file()]
            found = [str(path) for path in paths if _suffix(path) in FILE_TYPES]
            if not found:
                raise UserError(f"the folder {pattern} holds no file of a known type ({' '.join(FILE_TYPES)})")
        elif Path(pattern).exists():
            found = [pattern]
        else:
            found = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())
            if not found:
                raise UserError(f"--train_file {pattern} does not exist and matches no file")
        files |= dict.fromkeys(found)
    return list(files)


def _suffix(path: str | Path) -> str:
    return Path(str(path).removesuffix(".gz")).suffix.lower()


def load_sources(arguments: Arguments) -> list[Source]:
    column = arguments.text_column
    if arguments.dataset_name is not None:
        sources = [Source(only_texts(load_named_dataset(arguments), column, arguments.dataset_name), column, False)]
    else:
        sources = []
        # Each file is loaded on its own, because the others' columns may differ; text files have no columns.
        for is_text, files in groupby(find_files(arguments.train_file or []), lambda file: _suffix(file) == ".txt"):
            if is_text:
                sources.append(Source(load_data_files({"train": list(files)})["train"], "text", True))
            else:
                for file in files:
                    dataset = load_data_files({"train": file})["train"]
                    sources.append(Source(only_texts(dataset, column, file), column, False))
    total = sum(len(source.dataset) for source in sources)
    if arguments.max_train_samples is None or arguments.max_train_samples >= total:
        return sources
    drawn = sorted(random.Random(arguments.seed).sample(range(total), arguments.max_train_samples))
    start = 0
    for number, source in enumerate(sources):
        end = start + len(source.dataset)
        rows = [row - start for row in drawn[bisect_left(drawn, start) : bisect_left(drawn, end)]]
        sources[number] = source._replace(dataset=source.dataset.select(rows))
        start = end
    return sources


def load_named_dataset(arguments: Arguments) -> Dataset:
    try:
        return load_dataset(arguments.dataset_name, arguments.dataset_config_name, split=arguments.dataset_split)
    except (DatasetsError, OSError, ValueError) as error:
        name = f"split {arguments.dataset_split} of --dataset_name {arguments.dataset_name}"
        raise UserError(f"cannot load {name}: {one_line(error.__cause__ or error)}") from error


def train(corpus: Corpus, arguments: Arguments) -> RobertaTokenizer:
    # RoBERTa's own class sets the template, and is the one that obeys `add_prefix_space=True` when it is loaded, which
    # texts that come split into words need.
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=arguments.vocab_size,
        min_frequency=arguments.min_frequency,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        # Away from a terminal it would print empty lines among the report.
        show_progress=sys.stderr.isatty(),
    )
    backend.train_from_iterator(corpus, trainer)
    if not corpus.num_bytes:
        raise UserError("the corpus is empty: no row holds any text")
    entries = backend.get_vocab_size()
    if entries < arguments.vocab_size and not arguments.allow_smaller_vocab:
        raise UserError(
            f"the corpus is too small: it gives {entries} of the {arguments.vocab_size} entries asked for; add text, "
            "lower --vocab_size or --min_frequency, or pass --allow_smaller_vocab to keep what there is"
        )
    model = json.loads(backend.to_str())["model"]
    # Two annotations of the class are narrower than what it takes.
    return RobertaTokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],  # type: ignore[misc]
        mask_token=MASK_TOKEN,  # type: ignore[arg-type]
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=arguments.model_max_length,
        clean_up_tokenization_spaces=False,
    )


def bytes_per_token(tokenizer: RobertaTokenizer, texts: list[str]) -> float:
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return sum(len(text.encode()) for text in texts) / sum(map(len, encoded))


def save(tokenizer: RobertaTokenizer, output_dir: Path) -> None:
    """Write aside, then put each file in its place; what an older tokenizer left and this one has not is removed."""
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".tokenizer-") as aside:
        tokenizer.save_pretrained(aside)
        for name in TOKENIZER_FILES:
            if Path(aside, name).exists():
                os.replace(Path(aside, name), output_dir / name)
            else:
                (output_dir / name).unlink(missing_ok=True)


def main() -> None:
    (arguments,) = parse_arguments([Arguments], description=__doc__)
    check_arguments(arguments)
    corpus = Corpus(load_sources(arguments), arguments.seed)
    output_dir = Path(arguments.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make --output_dir {output_dir}: {one_line(error)}") from error
    if not os.access(output_dir, os.W_OK):
        raise UserError(f"cannot write to --output_dir {output_dir}: permission denied")
    tokenizer = train(corpus, arguments)
    try:
        save(tokenizer, output_dir)
    except OSError as error:
        raise UserError(f"cannot write to --output_dir {output_dir}: {one_line(error)}") from error
    ratio = bytes_per_token(tokenizer, corpus.sample)
    print(f"entries          {len(tokenizer)}")
    print(f"bytes read       {corpus.num_bytes}")
    print(f"bytes per token  {ratio:.2f}, on {len(corpus.sample)} pieces of what was read")
    print(f"saved in         {output_dir}")
    print(f'load it with     AutoTokenizer.from_pretrained("{output_dir}")')


if __name__ == "__main__":
    run_main(main)
