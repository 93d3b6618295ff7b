"""Classify many documents, however long, with a saved model: labels and probabilities in a table.

    python scripts/predict.py --model_name_or_path demo --input_file contracts/ --output_file labels.csv
    python scripts/predict.py --model_name_or_path output/contracts --input_file a.parquet b.jsonl.gz \\
        --text_column clause --id_column number --output_file labels.parquet --windows true
    python scripts/predict.py --model_name_or_path output/mrpc --input_file pairs.csv \\
        --text_column sentence1 sentence2 --output_file labels.csv
    cat lines.txt | python scripts/predict.py --model_name_or_path demo --input_file - --output_file labels.jsonl

Columns: `id`, `label`, `score` (the label's probability), the probability of each label, `tokens`, `cut` (whether the
text has more tokens than were read), `error` (why the document was skipped, else empty). A regression model gives
`value` in place of labels; a multi-label model gives every label of at least --threshold, and no `score`. Of pairs the
longer text is cut first.

Documents are read, classified and written in chunks, in the order of the input, and memory does not grow with their
number. The output appears when it is whole; `<output_file>.progress.json` stays beside it and says what it is made of.
A run that was killed goes on with --resume true and ends with the same bytes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

# Registers the model with the Auto classes: a Linformer then needs no remote code.
import hf_linformer  # noqa: F401
from answers import (
    AnswerArguments,
    Inputs,
    Output,
    check_answer_arguments,
    enough_memory,
    find_inputs,
    identity_of,
    rows_of,
    write_answers,
)
from common import UserError, no_such_folder, one_line, parse_arguments, run_main
from documents import Document, count_documents, kind_of, read_documents
from long_texts import (
    batches_of,
    check_tokenizer,
    longest_first,
    parts_of,
    tokenize,
    tokens_read,
    with_special_tokens,
)


@dataclass
class Arguments(AnswerArguments):
    """Which model, which documents, and where the answers go."""

    model_name_or_path: str = field(
        metadata={"help": "Any classifier: a Hub name or a folder. Only safetensors are read."}
    )
    output_file: str = field(metadata={"help": "A .csv, .jsonl or .parquet file."})
    text_column: list[str] | None = field(
        default=None,
        metadata={
            "help": "One column, or two for pairs of texts. Default: one of a usual name or, of a table that is named "
            "itself, the only text."
        },
    )
    windows: bool = field(
        default=False,
        metadata={"help": "Read all of a long document, in even parts; the mean of their probabilities counts."},
    )
    threshold: float = field(
        default=0.5, metadata={"help": "The least probability of the labels that a multi-label model gives."}
    )

    @property
    def reads_pairs(self) -> bool:
        return len(self.text_column or []) == 2


# Documents


class Pair(NamedTuple):
    """Two texts that are classified together, or the reason why they are not."""

    id: str
    text: str
    text_pair: str
    error: str


def read_pairs(inputs: Inputs) -> Iterator[Pair]:
    """The rows of all tables, each of which is read by both of its columns at once."""
    for name, path in inputs.files.items():
        # Where one of them cannot be read to its end, the file ends with the reason.
        for first, second in zip(*(read_documents({name: path}, columns) for columns in inputs.columns)):
            one = first if first.error else second
            yield Pair(one.id, first.text, second.text, one.error)


def check_columns(arguments: Arguments, files: Mapping[str, Path | None]) -> None:
    """Raises `UserError` for more columns than a pair has, and for pairs of no table."""
    columns = arguments.text_column or []
    if len(columns) > 2:
        raise UserError(f"--text_column takes one column, or two for pairs of texts, not {len(columns)}: {columns}")
    if not arguments.reads_pairs:
        return
    if arguments.windows:
        raise UserError("--windows divides a text, and --text_column names two: of pairs the longer text is cut")
    if plain := [file for file, path in files.items() if path is None or kind_of(path) == ".txt"]:
        raise UserError(f"--text_column {' '.join(columns)} are two columns, and {plain[0]} is no table")


# The model


class Classifier(NamedTuple):
    """A model with what its answers mean."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    names: list[str]
    problem_type: str
    # What scripts/finetune.py says that it was trained on; None: it does not say.
    reads_pairs: bool | None = None

    def check_pairs(self, are_pairs: bool, cure: str) -> None:
        """Raises `UserError` where single texts are given to a model of pairs, or pairs to one of single texts."""
        if self.reads_pairs not in (None, are_pairs):
            trained = "pairs of texts" if self.reads_pairs else "single texts"
            raise UserError(f"{self.model.name_or_path} was fine-tuned on {trained}: {cure}")


def load_classifier(name: str, dtype: str, max_length: int | None, trust_remote_code: bool) -> Classifier:
    """A trained classifier that reads max_length tokens, None: all that it can. Raises `UserError` for any other."""
    trust = {"trust_remote_code": trust_remote_code}
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True, **trust
        )
        tokenizer = AutoTokenizer.from_pretrained(name, **trust)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"{no_such_folder(name)}cannot load the model {name}: {one_line(error)}") from error
    if lost := sorted(report["missing_keys"]):
        raise UserError(
            f"{name} is no trained classifier: it lacks {len(lost)} weights of a {type(model).__name__}, such as "
            f"{lost[0]}; scripts/finetune.py trains them, and scripts/embed.py embeds with an encoder as it is"
        )
    check_tokenizer(name, tokenizer, model)
    read = tokens_read(name, model, tokenizer, max_length, tokenizer.num_special_tokens_to_add())
    id2label: dict[int, str] = model.config.id2label
    names = [str(id2label[index]) for index in range(len(id2label))]
    usual = "regression" if len(names) == 1 else "single_label_classification"
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    reads_pairs = getattr(model.config, "reads_pairs", None)
    return Classifier(model, tokenizer, read, names, model.config.problem_type or usual, reads_pairs)


@torch.inference_mode()
def forward(rows: Sequence[np.ndarray], classifier: Classifier, splits: Sequence[int] | None = None) -> Tensor:
    """Probabilities, or the values of a regression: (rows, labels)

    splits: where the second text of each row begins, None: a row is one text
    """
    inputs = with_special_tokens(rows, classifier.tokenizer, splits)
    batch = classifier.tokenizer.pad(inputs, return_tensors="pt").to(classifier.model.device)
    with enough_memory(batch["input_ids"].shape):
        logits = classifier.model(**batch).logits.float().cpu()
    if classifier.problem_type == "regression":
        return logits
    return logits.sigmoid() if classifier.problem_type == "multi_label_classification" else logits.softmax(-1)


def classify(
    texts: Sequence[str], classifier: Classifier, windows: bool, batch_tokens: int
) -> tuple[Tensor, list[int]]:
    """The answers to all texts (texts, labels), not finite where there is no token, and the tokens of each text."""
    tokenized = tokenize(texts, classifier.tokenizer)
    special = classifier.tokenizer.num_special_tokens_to_add()
    room, side = classifier.max_length - special, classifier.tokenizer.truncation_side
    rows = [
        (document, part) for document, tokens in enumerate(tokenized) for part in parts_of(tokens, room, windows, side)
    ]
    sums, counts = torch.zeros(len(texts), len(classifier.names)), torch.zeros(len(texts), 1)
    for documents, batch in batches_of(rows, special, batch_tokens):
        sums.index_add_(0, torch.tensor(documents), forward(batch, classifier))
        counts.index_add_(0, torch.tensor(documents), torch.ones(len(batch), 1))
    return sums / counts, [len(tokens) + special for tokens in tokenized]


def classify_pairs(
    pairs: Sequence[tuple[str, str]], classifier: Classifier, arguments: Arguments
) -> tuple[Tensor, list[int]]:
    """The same for pairs of texts, the longer of which is cut first."""
    firsts, seconds = (tokenize([pair[number] for pair in pairs], classifier.tokenizer) for number in (0, 1))
    special, side = classifier.tokenizer.num_special_tokens_to_add(pair=True), classifier.tokenizer.truncation_side
    rows, splits = [], []
    for document, texts in enumerate(zip(firsts, seconds)):
        left = longest_first(len(texts[0]), len(texts[1]), classifier.max_length - special)
        kept = [text[len(text) - count :] if side == "left" else text[:count] for text, count in zip(texts, left)]
        rows.append((document, np.concatenate(kept)))
        splits.append(len(kept[0]))
    answers = torch.zeros(len(pairs), len(classifier.names))
    for documents, batch in batches_of(rows, special, arguments.per_device_eval_batch_tokens):
        answers[list(documents)] = forward(batch, classifier, [splits[document] for document in documents])
    return answers, [len(first) + len(second) + special for first, second in zip(firsts, seconds)]


# The output


def schema_of(classifier: Classifier) -> tuple[pa.Schema, list[str]]:
    """The columns of the output, and those among them for the answers: one for each label, under its name.

    A name that another column has is made longer.
    """
    labels: list[tuple[str, pa.DataType]] = {
        "single_label_classification": [("label", pa.string()), ("score", pa.float64())],
        "multi_label_classification": [("label", pa.list_(pa.string()))],
    }.get(classifier.problem_type, [])
    taken = {"id", "label", "score", "tokens", "cut", "error"}
    columns = []
    for column in classifier.names if labels or len(classifier.names) > 1 else ["value"]:
        while column in taken:
            column = f"probability of {column}"
        taken.add(column)
        columns.append(column)
    answers = [(column, pa.float64()) for column in columns]
    rest = [("tokens", pa.int64()), ("cut", pa.bool_()), ("error", pa.string())]
    return pa.schema([("id", pa.string()), *labels, *answers, *rest]), columns


def columns_of(answer: Tensor, classifier: Classifier, columns: Sequence[str], threshold: float) -> dict[str, Any]:
    """What the output says of a document: its label or labels, and a number for each."""
    # What float32 tells apart.
    scores = [float(f"{score:.6g}") for score in answer.tolist()]
    row: dict[str, Any] = dict(zip(columns, scores))
    if classifier.problem_type == "single_label_classification":
        best = int(answer.argmax())
        row |= {"label": classifier.names[best], "score": scores[best]}
    elif classifier.problem_type == "multi_label_classification":
        row["label"] = [name for name, score in zip(classifier.names, scores) if score >= threshold]
    return row


def predict(
    chunk: Sequence[Document | Pair], classifier: Classifier, columns: Sequence[str], arguments: Arguments
) -> list[dict[str, Any]]:
    """A row of the output for each document."""

    def answer(documents: Sequence[Any]) -> tuple[Tensor, list[int]]:
        if arguments.reads_pairs:
            return classify_pairs([(pair.text, pair.text_pair) for pair in documents], classifier, arguments)
        texts = [document.text for document in documents]
        return classify(texts, classifier, arguments.windows, arguments.per_device_eval_batch_tokens)

    return rows_of(
        chunk,
        answer,
        lambda found: columns_of(found, classifier, columns, arguments.threshold),
        classifier.tokenizer.num_special_tokens_to_add(pair=arguments.reads_pairs),
        limit=None if arguments.windows else classifier.max_length,
    )


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments((Arguments,), argv, description=__doc__)
    check_answer_arguments(arguments, (".csv", ".jsonl", ".parquet"))
    if not 0 <= arguments.threshold <= 1:
        raise UserError(f"--threshold is a probability, from 0 to 1, not {arguments.threshold}")
    output = Output(Path(arguments.output_file))
    inputs = find_inputs(arguments, output)
    check_columns(arguments, inputs.files)
    logging.disable_progress_bar()
    classifier = load_classifier(
        arguments.model_name_or_path, arguments.dtype, arguments.max_length, arguments.trust_remote_code
    )
    number = "one column" if arguments.reads_pairs else "two columns"
    classifier.check_pairs(arguments.reads_pairs, cure=f"name {number} with --text_column")
    special = classifier.tokenizer.num_special_tokens_to_add(pair=arguments.reads_pairs)
    if classifier.max_length <= special:
        raise UserError(f"--max_length is {classifier.max_length}, and {special} tokens of a pair are special ones")
    schema, columns = schema_of(classifier)
    configuration, weights = classifier.model.config.to_json_string(), classifier.model.state_dict().values()
    identity = identity_of(arguments, classifier.max_length, configuration, classifier.tokenizer, weights)
    output.start(schema, identity, arguments.resume, arguments.overwrite)
    write_answers(
        output,
        read_pairs(inputs) if arguments.reads_pairs else read_documents(inputs.files, inputs.columns[0]),
        count_documents(inputs.files),
        lambda chunk: predict(chunk, classifier, columns, arguments),
        arguments,
        classifier.max_length,
    )


if __name__ == "__main__":
    run_main(main, resume="--resume true")
