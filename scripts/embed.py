"""Embed many documents, however long, with a model of sentence-transformers: a vector for each in a table.

    python scripts/embed.py --model_name_or_path checkpoints/linformer-all-MiniLM-L6-v2 --input_file contracts/ \\
        --output_file vectors.parquet
    python scripts/embed.py --model_name_or_path checkpoints/linformer-all-MiniLM-L6-v2 --input_file a.parquet \\
        b.jsonl.gz --text_column clause --id_column number --output_file vectors.jsonl --windows true

Columns: `id`, `embedding` (float32; in parquet lists of one fixed size), `tokens`, `cut` (whether the text has more
tokens than were read), `error` (why the document was skipped, else empty; it then has no embedding). The vectors are
those of `SentenceTransformer.encode`. With --windows true a longer document is read in even parts, and its embedding
is the mean of theirs, weighted by their tokens, and of length 1 where the model's are.

Documents are read, embedded and written in chunks, in the order of the input, and memory does not grow with their
number. The output appears when it is whole; `<output_file>.progress.json` stays beside it and says what it is made of.
A run that was killed goes on with --resume true and ends with the same bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

# Registers the model with the Auto classes: a Linformer then needs no remote code.
import hf_linformer  # noqa: F401
from answers import (
    AnswerArguments,
    Output,
    check_answer_arguments,
    enough_memory,
    find_inputs,
    identity_of,
    rows_of,
    write_answers,
)
from common import UserError, no_such_folder, one_line, parse_arguments, run_main
from documents import count_documents, read_documents
from long_texts import batches_of, check_tokenizer, parts_of, tokenize, tokens_read, with_special_tokens


if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


@dataclass
class Arguments(AnswerArguments):
    """Which model, which documents, and where the embeddings go."""

    model_name_or_path: str = field(
        metadata={"help": "A model of sentence-transformers, or any encoder: a Hub name or a folder, in safetensors."}
    )
    output_file: str = field(metadata={"help": "A .parquet or .jsonl file; csv has no lists of numbers."})
    windows: bool = field(
        default=False,
        metadata={"help": "Read all of a long document, in even parts; the mean of their embeddings counts."},
    )
    prompt_name: str | None = field(
        default=None,
        metadata={"help": "The prompt of the model that stands before every text. Default: the model's own, if any."},
    )


# The model


class Encoder(NamedTuple):
    """A model with what is put around a text, and what it says of its embeddings."""

    model: "SentenceTransformer"
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    # What stands before every text, and before every part of one; its tokens, and its length as the library counts it.
    prompt: str
    prompt_tokens: int
    prompt_length: int
    # Whether embeddings have length 1.
    is_normalized: bool
    # How tokens become an embedding where the model does not say it; else nothing.
    usual_pooling: str

    @property
    def around(self) -> int:
        """Tokens of every pass that are none of the document's."""
        return self.tokenizer.num_special_tokens_to_add() + self.prompt_tokens


def load_encoder(arguments: Arguments) -> Encoder:
    """A model that embeds texts of --max_length tokens, default: all that it reads. Raises `UserError` for others."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise UserError(
            f"scripts/embed.py needs sentence-transformers ({one_line(error)}): .venv/bin/pip install "
            "sentence-transformers, or make .venv/installed"
        ) from error
    name, dtype = arguments.model_name_or_path, getattr(torch, arguments.dtype)
    try:
        model = SentenceTransformer(
            name,
            device="cuda" if torch.cuda.is_available() else "cpu",
            trust_remote_code=arguments.trust_remote_code,
            model_kwargs={"dtype": dtype, "use_safetensors": True},
        )
    except (
        *(OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError),
        *(SafetensorError, StrictDataclassError),
    ) as error:
        raise UserError(f"{no_such_folder(name)}cannot load the model {name}: {one_line(error)}") from error
    encoder, tokenizer = getattr(model[0], "auto_model", None), getattr(model[0], "tokenizer", None)
    if not isinstance(encoder, PreTrainedModel) or not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError(f"{name} begins with a {type(model[0]).__name__}, not with a model that reads tokens of text")
    check_tokenizer(name, tokenizer, encoder)
    prompt_name = arguments.prompt_name or model.default_prompt_name
    prompts = {known: text for known, text in model.prompts.items() if text}
    # Names that the library gives to every model stand for no text.
    if arguments.prompt_name and arguments.prompt_name not in prompts:
        raise UserError(
            f"{name} has no prompt {arguments.prompt_name!r} for --prompt_name; it has {prompts or 'none'}"
        )
    prompt = prompts.get(prompt_name, "") if prompt_name else ""
    # A space at its end may be part of the next word's first token.
    prompt_tokens, with_space = map(len, tokenize([prompt.rstrip(), prompt], tokenizer))
    before = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"].index(0)
    around = tokenizer.num_special_tokens_to_add() + prompt_tokens
    read = tokens_read(name, encoder, tokenizer, arguments.max_length, around)
    # In the library's older models the class has another path.
    is_normalized = any(type(module).__name__ == "Normalize" for module in model)
    # The library knows modules by the names in modules.json, and without it none.
    usual_pooling = "" if model.module_kwargs else getattr(model[-1], "pooling_mode", "")
    lengths = (prompt_tokens, before + with_space)
    return Encoder(model.eval(), tokenizer, read, prompt, *lengths, is_normalized, usual_pooling)


def configuration_of(model: "SentenceTransformer") -> str:
    """What the modules are, and how they are set."""
    encoder: Any = model[0]
    return repr(model) + encoder.auto_model.config.to_json_string()


@torch.inference_mode()
def forward(rows: Sequence[np.ndarray], encoder: Encoder) -> Tensor:
    """The embedding of each row of tokens: (rows, D)"""
    inputs = with_special_tokens(rows, encoder.tokenizer)
    features: dict[str, Any] = dict(encoder.tokenizer.pad(inputs, return_tensors="pt").to(encoder.model.device))
    shape = features["input_ids"].shape
    if encoder.prompt:
        # Some models leave the prompt, and what stands before it, out of their mean.
        features["prompt_length"] = encoder.prompt_length
    with enough_memory(shape):
        return encoder.model(features)["sentence_embedding"].float().cpu()


def dimension_of(encoder: Encoder, name: str) -> int:
    """How many numbers an embedding has. Raises `UserError` for a model that gives none."""
    try:
        return forward(tokenize([encoder.prompt + "a"], encoder.tokenizer), encoder).shape[1]
    except KeyError as error:
        raise UserError(
            f"{name} gives no embedding of a text: its modules are {[*map(type, encoder.model)]}"
        ) from error


def embed(texts: Sequence[str], encoder: Encoder, dimension: int, arguments: Arguments) -> tuple[Tensor, list[int]]:
    """The embeddings of all texts, (texts, dimension), and the tokens of each text with what stands around it."""
    tokenized = tokenize([encoder.prompt + text for text in texts], encoder.tokenizer)
    bodies = [tokens[encoder.prompt_tokens :] for tokens in tokenized]
    room, side = encoder.max_length - encoder.around, encoder.tokenizer.truncation_side
    rows = [
        (document, part)
        for document, body in enumerate(bodies)
        for part in parts_of(body, room, arguments.windows, side)
    ]
    embeddings = torch.zeros(len(texts), dimension)
    for documents, parts in batches_of(rows, encoder.around, arguments.per_device_eval_batch_tokens):
        heads = [tokenized[document][: encoder.prompt_tokens] for document in documents]
        found = forward([np.concatenate(row) for row in zip(heads, parts)], encoder)
        # What a part counts for, by its tokens.
        shares = [
            len(part) / len(bodies[document]) if arguments.windows else 1.0 for document, part in zip(documents, parts)
        ]
        embeddings.index_add_(0, torch.tensor(documents), found * torch.tensor(shares)[:, None])
    if arguments.windows and encoder.is_normalized:
        embeddings = nn.functional.normalize(embeddings, dim=-1)
    return embeddings, [len(body) + encoder.around for body in bodies]


# The output


def columns_of(embedding: Tensor) -> dict[str, Any]:
    # The shortest number that float32 reads as the same.
    return {"embedding": [float(str(value)) for value in embedding.numpy()]}


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments((Arguments,), argv, description=__doc__)
    if arguments.output_file.endswith(".csv"):
        raise UserError(f"--output_file {arguments.output_file}: csv has no lists of numbers; give .parquet or .jsonl")
    check_answer_arguments(arguments, (".parquet", ".jsonl"))
    if arguments.text_column and len(arguments.text_column) > 1:
        raise UserError(f"--text_column takes one column here: a text is embedded alone; got {arguments.text_column}")
    output = Output(Path(arguments.output_file))
    inputs = find_inputs(arguments, output)
    logging.disable_progress_bar()
    encoder = load_encoder(arguments)
    dimension = dimension_of(encoder, arguments.model_name_or_path)
    columns = [("id", pa.string()), ("embedding", pa.list_(pa.float32(), dimension))]
    columns += [("tokens", pa.int64()), ("cut", pa.bool_()), ("error", pa.string())]
    configuration, weights = configuration_of(encoder.model), encoder.model.state_dict().values()
    identity = identity_of(arguments, encoder.max_length, configuration, encoder.tokenizer, weights)
    output.start(pa.schema(columns), identity | {"prompt": encoder.prompt}, arguments.resume, arguments.overwrite)
    write_answers(
        output,
        read_documents(inputs.files, inputs.columns[0]),
        count_documents(inputs.files),
        lambda chunk: rows_of(
            chunk,
            lambda documents: embed([document.text for document in documents], encoder, dimension, arguments),
            columns_of,
            special=encoder.around,
            limit=None if arguments.windows else encoder.max_length,
        ),
        arguments,
        encoder.max_length,
    )
    if encoder.usual_pooling:
        print(
            f"{arguments.model_name_or_path} has no modules.json, which says how to embed: taken was the "
            f"{encoder.usual_pooling} of its last hidden states"
        )


if __name__ == "__main__":
    run_main(main, resume="--resume true")
