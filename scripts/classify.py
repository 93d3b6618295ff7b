"""Classify texts with a saved model: given as arguments, piped in a line each, or typed at a prompt.

    python scripts/classify.py --model_name_or_path demo "Our farmers ask for canals to carry their corn to market."
    cat speeches.txt | python scripts/classify.py --model_name_or_path demo --output_format jsonl --top_k 5

The model is loaded as a stranger would load it: with the code that was saved beside its weights.
"""

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from common import UserError, longest_input, no_such_folder, one_line, parse_arguments, run_main
from documents import as_text, problem_of


@dataclass
class ClassifyArguments:
    """Which model, and how to print what it says."""

    model_name_or_path: str = field(metadata={"help": "A model that scripts/finetune.py saved, or one of the Hub."})
    top_k: int = field(default=1, metadata={"help": "Print so many of the likeliest labels of each text."})
    output_format: str = field(
        default="text", metadata={"help": "A line of words, or of JSON, for each text.", "choices": ["text", "jsonl"]}
    )
    pairs: bool = field(default=False, metadata={"help": "Each text is two, with a tab between them."})
    trust_remote_code: bool = field(
        default=True, metadata={"help": "Run the modelling code in the model's folder, as a Linformer needs."}
    )
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Texts of one forward pass."})


def load(name: str, trust_remote_code: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, ready to classify, and its tokenizer."""
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name, trust_remote_code=trust_remote_code, use_safetensors=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{no_such_folder(name)}cannot load the model {name}: {one_line(error)}") from error
    if lost := sorted(report["missing_keys"]):
        raise UserError(
            f"{name} is no trained classifier: it lacks {len(lost)} weights of a {type(model).__name__}, such as "
            f"{lost[0]}; scripts/finetune.py trains them"
        )
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def read_texts(given: Sequence[str]) -> Iterator[str]:
    """The texts given as arguments, else the lines of standard input, else one typed at a prompt."""
    if given:
        yield from given
    elif sys.stdin.isatty():
        yield input("text: ")
    else:
        yield from (line.rstrip("\r\n") for line in as_text(sys.stdin.buffer, newline="\n"))


def sound(texts: Iterable[str]) -> Iterator[tuple[int, str]]:
    """The texts that can be read, with their numbers from 1; warns of empty and broken ones.

    Raises `UserError` if there are no others.
    """
    found = False
    for number, text in enumerate(texts, start=1):
        if problem := problem_of(text):
            print(f"warning: text {number} is {problem} and is left out", file=sys.stderr)
        else:
            found = True
            yield number, text
    if not found:
        raise UserError("there is nothing to classify: give texts as arguments or pipe them in, one a line")


@torch.inference_mode()
def classify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    numbered: list[tuple[int, str]],
    pairs: bool,
    top_k: int,
) -> list[list[tuple[str, float]]]:
    """The likeliest labels of each text with their probabilities; of a regression model, the number it predicts."""
    texts: list[Any] = [text for _, text in numbered]
    if pairs:
        for number, text in numbered:
            if text.count("\t") != 1:
                raise UserError(f"text {number} must be two with one tab between them for --pairs: {text[:80]!r}")
        texts = [tuple(text.split("\t")) for text in texts]
    # The tokenizer knows the length of training; the model's table of positions may be longer.
    limit = min(tokenizer.model_max_length, longest_input(model) or math.inf)
    lengths = [len(input_ids) for input_ids in tokenizer(texts, verbose=False)["input_ids"]]
    for (number, _), length in zip(numbered, lengths):
        if length > limit:
            print(
                f"warning: text {number} has {length:,} tokens, of which the model reads the first {limit:,}; "
                f"{1 - limit / length:.0%} is cut",
                file=sys.stderr,
            )
    batch = tokenizer(texts, truncation=True, max_length=limit, padding=True, return_tensors="pt").to(model.device)
    logits = model(**batch).logits.float()
    usual = "regression" if logits.shape[-1] == 1 else "single_label_classification"
    problem_type = model.config.problem_type or usual
    if problem_type == "regression":
        return [[("value", value)] for value in logits.squeeze(-1).tolist()]
    # Of several labels at a time each has a probability of its own.
    scores = logits.sigmoid() if problem_type == "multi_label_classification" else logits.softmax(-1)
    best = scores.topk(min(top_k, logits.shape[-1]))
    names: dict[int, str] = model.config.id2label  # type: ignore[assignment]
    return [
        [(names[index], probability) for index, probability in zip(indices, probabilities)]
        for indices, probabilities in zip(best.indices.tolist(), best.values.tolist())
    ]


def main(argv: Sequence[str] | None = None) -> None:
    arguments, given = parse_arguments(
        [ClassifyArguments], argv, positional=("texts", "The texts to classify."), description=__doc__
    )
    for name in ("top_k", "per_device_eval_batch_size"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(arguments, name)}")
    if given and not any(text.strip() for text in given):
        raise UserError("the text to classify is empty")
    for text in given:
        # A word can be the name of a folder by chance; a path is not.
        if os.path.isfile(text) or "/" in text and os.path.isdir(text):
            raise UserError(
                f"{text} is there as a file or folder, and only its name would be classified: scripts/predict.py "
                "reads files, and `< FILE` gives the lines of one"
            )
    logging.disable_progress_bar()
    model, tokenizer = load(arguments.model_name_or_path, arguments.trust_remote_code)
    # What scripts/finetune.py says that it was trained on, if it says so.
    if getattr(model.config, "reads_pairs", None) not in (None, arguments.pairs):
        found = "single texts: leave --pairs out" if arguments.pairs else "pairs of texts: give --pairs"
        raise UserError(f"{arguments.model_name_or_path} was fine-tuned on {found}")
    numbered = sound(read_texts(given))
    # Read as they are needed, so that a long standard input takes no more memory than a batch.
    while batch := list(islice(numbered, arguments.per_device_eval_batch_size)):
        results = classify(model, tokenizer, batch, arguments.pairs, arguments.top_k)
        for (_, text), labels in zip(batch, results):
            if arguments.output_format == "jsonl":
                predictions = [{"label": label, "score": score} for label, score in labels]
                print(json.dumps({"text": text, "predictions": predictions}, ensure_ascii=False), flush=True)
            else:
                print("  ".join(f"{label} {score:.3f}" for label, score in labels), flush=True)


if __name__ == "__main__":
    run_main(main)
