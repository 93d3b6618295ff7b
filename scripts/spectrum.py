"""Low rank, seen: the spectra of real attention matrices, and the paper's theorems tried out on them.

    python scripts/spectrum.py --model_name_or_path path/to/bert --train_file reviews.parquet \\
        --results_file results/spectrum.csv

For texts of n tokens, P = softmax(Q K^T / sqrt(d)), n x n, one for each layer and head. Rows of `value` and `spread`
(mean and standard deviation over texts and heads), of these measures:

  cumulative         sum of the k largest singular values of P / sum of all: Figure 1 of the paper
  effective_rank     exp(entropy of the singular values / their sum), between 1 and n
  energy_rank_90     how many singular values hold 90 % of the sum of squares
  relative_error     ||approximation - P V|| / ||P V||, Frobenius, for each method and k
  norm_error         ||approximation - P V|| / (||P|| ||V||): the yardstick of the paper's Theorem 2
  columns_in_bound   share of the columns w of V with ||P~ w - P w|| < eps ||P w||, as Theorem 1 says

A row without a layer is over all layers; layers and heads count from 1. By layer, errors are given at k = n/4.
The matrix of the spectra is `attention`, or `shuffled`: the same numbers with each row in an order of its own, which
leaves nothing of P but how peaked its rows are. The methods are explained in scripts/approximations.py.
"""

import math
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from approximations import (
    AttentionHeads,
    attend_to_slots,
    bound_epsilon,
    columns_in_bound,
    learn_projection,
    methods_with,
    norm_error,
    relative_error,
)
from common import (
    TextArguments,
    UserError,
    append_results,
    format_table,
    load_texts,
    one_line,
    parse_arguments,
    run_main,
)


MEASURES = ("spectrum", "error")
PROJECTIONS = ("query", "key", "value")
# The methods that the theorems speak of, and two to compare them with.
NORM_ERROR_METHODS = ("random", "theorem_2", "segment_means", "zero")
# Characters kept for each token that is wanted: far more than a token has, far fewer than a book.
CHARACTERS_PER_TOKEN = 16


@dataclass
class Arguments:
    """Which model is measured, and how."""

    model_name_or_path: str = field(
        metadata={"help": "An encoder with n x n attentions; for `error` also BERT-like, with query, key and value."}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Default: that of the model."})
    random_weights: bool = field(
        default=False, metadata={"help": "Measure an untrained model of the same configuration, drawn by the seed."}
    )
    data_name: str | None = field(
        default=None, metadata={"help": "What the results call the texts. Default: the files or the data set."}
    )
    measures: list[str] = field(
        default_factory=lambda: list(MEASURES), metadata={"help": f"What to measure, of: {' '.join(MEASURES)}."}
    )
    max_length: int = field(
        default=512,
        metadata={"help": "n in tokens, a multiple of 8; spectra also at n/2, n/4, n/8. Shorter texts are left out."},
    )
    num_windows: int = field(default=16, metadata={"help": "Texts to measure on, drawn by the seed."})
    num_train_windows: int = field(default=64, metadata={"help": "Other texts, to learn E on."})
    max_train_steps: int = field(default=400, metadata={"help": "Steps of Adam for each E, a text a step."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Of the learned E, falling to 0."})
    local_window: int = field(default=32, metadata={"help": "w of `segment_means_window`."})
    seed: int = field(default=42, metadata={"help": "Of the texts, the random projections and random weights."})
    results_file: str | None = field(default=None, metadata={"help": "Add the rows to this CSV."})


# Models and texts


def load_model(arguments: Arguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    name = arguments.model_name_or_path
    try:
        model_type = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
        if model_type == "linformer":
            raise UserError(
                f"{name} is a Linformer, whose attentions are N x k and not n x n; give the BERT or RoBERTa that it "
                "is compared with"
            )
        config = AutoConfig.from_pretrained(name, attn_implementation="eager")
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer_name or name)
        set_seed(arguments.seed)
        if arguments.random_weights:
            model = AutoModel.from_config(config, dtype=torch.float32)
        else:
            model = AutoModel.from_pretrained(name, config=config, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot load the model {name}: {one_line(error)}") from error
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and arguments.max_length > longest:
        raise UserError(f"--max_length is {arguments.max_length}, but {name} reads {longest} tokens at most")
    return model.eval(), tokenizer


def draw_pieces(
    dataset: Dataset, text_column: str, tokenizer: PreTrainedTokenizerBase, n: int, count: int, seed: int
) -> list[str]:
    """`count` pieces of text of n tokens or more, each of a row of its own; of long texts from anywhere in them.

    Raises `UserError` if fewer rows are long enough.
    """
    rng = random.Random(seed)
    order = rng.sample(range(len(dataset)), len(dataset))
    pieces: list[str] = []
    with tqdm(total=count, desc="drawing texts") as progress:
        for row in order:
            text = dataset[row][text_column] or ""
            start = rng.randrange(max(len(text) - n * CHARACTERS_PER_TOKEN, 0) + 1)
            # From the beginning of a word.
            start = text.find(" ", start) + 1 if start else 0
            piece = text[start : start + n * CHARACTERS_PER_TOKEN]
            if len(tokenizer(piece, truncation=True, max_length=n)["input_ids"]) == n:
                pieces.append(piece)
                progress.update()
            if len(pieces) == count:
                return pieces
    raise UserError(
        f"{len(pieces)} of {len(dataset)} texts have {n} tokens, and {count} are needed; give more texts, or lower "
        "--max_length, --num_windows or --num_train_windows"
    )


def tokenized(pieces: Iterable[str], tokenizer: PreTrainedTokenizerBase, n: int) -> Iterator[Tensor]:
    """The first n tokens of each piece, special tokens included: (1, n)"""
    for piece in pieces:
        yield tokenizer(piece, truncation=True, max_length=n, return_tensors="pt")["input_ids"]


def attentions_of(model: PreTrainedModel, input_ids: Tensor) -> tuple[Tensor, ...]:
    """P of every layer: input_ids (1, n) -> L of (H, n, n)"""
    n = input_ids.shape[1]
    try:
        with torch.no_grad():
            attentions = model(input_ids, output_attentions=True).attentions
    except IndexError as error:
        raise UserError(f"the model cannot read --max_length {n} tokens: {one_line(error)}") from error
    name = type(model).__name__
    if not attentions:
        raise UserError(f"{name} returns no attentions; give an encoder such as BERT or RoBERTa")
    if wrong := next((tuple(layer.shape) for layer in attentions if layer.shape[2:] != (n, n)), None):
        raise UserError(f"{name} returns attentions of shape {wrong} for {n} tokens; they must be n x n")
    return tuple(layer[0] for layer in attentions)


@contextmanager
def recorded_projections(model: PreTrainedModel) -> Iterator[dict[str, list[Tensor]]]:
    """What the linears `query`, `key` and `value` of the self-attentions return, in order: lists of (1, n, D)"""
    calls: dict[str, list[Tensor]] = {name: [] for name in PROJECTIONS}
    hooks = []
    for module in model.modules():
        if all(isinstance(getattr(module, name, None), nn.Linear) for name in PROJECTIONS):
            for name, states in calls.items():
                record = partial(lambda states, linear, inputs, output: states.append(output), states)
                hooks.append(getattr(module, name).register_forward_hook(record))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def split_heads(states: Tensor, num_heads: int) -> Tensor:
    """(1, n, D) -> (H, n, d)"""
    return states[0].unflatten(-1, (num_heads, -1)).transpose(0, 1)


def read_heads(model: PreTrainedModel, input_ids: Tensor) -> list[AttentionHeads]:
    """Q, K and V of every layer for a text of input_ids (1, n).

    Raises `UserError` where P is not softmax(Q K^T / sqrt(d)) of these, as with rotary or relative positions.
    """
    unsupported = UserError(
        f"{type(model).__name__} is no model of which `error` can be measured: each layer must have linears `query`, "
        "`key` and `value` and attend by softmax(Q K^T / sqrt(d)), as BERT and RoBERTa do; --measures spectrum works"
    )
    with recorded_projections(model) as calls:
        attentions = attentions_of(model, input_ids)
    if any(len(states) != len(attentions) for states in calls.values()):
        raise unsupported
    layers = []
    for attention, *projected in zip(attentions, *calls.values()):
        query, key, value = (split_heads(states, attention.shape[0]) for states in projected)
        heads = AttentionHeads(query / math.sqrt(query.shape[-1]), key, value)
        if key.shape != query.shape or not torch.allclose(heads.probabilities, attention, atol=1e-4):
            raise unsupported
        layers.append(heads)
    return layers


# Spectra


def shuffle_rows(matrix: Tensor) -> Tensor:
    """Every row of the matrices (..., n, n) in a random order of its own."""
    return matrix.gather(-1, torch.rand(matrix.shape).argsort(dim=-1))


def cumulative(singular_values: Tensor) -> Tensor:
    """Share of the sum that the k largest hold, at index k - 1: (..., n) -> (..., n)"""
    return singular_values.cumsum(dim=-1) / singular_values.sum(dim=-1, keepdim=True)


def effective_rank(singular_values: Tensor) -> Tensor:
    """exp(H(p)) with p = sigma / sum(sigma): n for n equal values, 1 for a single one. (..., n) -> (...)"""
    return torch.special.entr(singular_values / singular_values.sum(dim=-1, keepdim=True)).sum(dim=-1).exp()


def energy_rank(singular_values: Tensor, share: float = 0.9) -> Tensor:
    """The least k whose k largest values hold `share` of the sum of squares: (..., n) -> (...)"""
    return (cumulative(singular_values.square()) < share).sum(dim=-1) + 1


def curve_indices(n: int) -> list[int]:
    """Where a curve of n singular values is written down: powers of two, 3/4 of n, and n."""
    powers = [2**i for i in range(n.bit_length()) if 2**i <= n]
    return sorted({*powers, 3 * n // 4, n})


def summary(values: Tensor, **row: Any) -> dict[str, Any]:
    """A row of results: mean and standard deviation of the values; one value has no spread."""
    values = values.float()
    return row | {"value": values.mean().item(), "spread": values.std().item() if values.numel() > 1 else ""}


def measure_spectrum(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pieces: list[str], max_length: int
) -> Iterator[dict[str, Any]]:
    """Spectra of P, and of P with shuffled rows, at four lengths; curves at the longest only."""
    for n in (max_length // 8, max_length // 4, max_length // 2, max_length):
        spectra: dict[str, list[Tensor]] = {"attention": [], "shuffled": []}
        for input_ids in tqdm(tokenized(pieces, tokenizer, n), total=len(pieces), desc=f"spectra, n = {n}"):
            attentions = torch.stack(attentions_of(model, input_ids))  # (L, H, n, n)
            spectra["attention"].append(torch.linalg.svdvals(attentions))
            spectra["shuffled"].append(torch.linalg.svdvals(shuffle_rows(attentions)))
        of_attention, of_shuffled = (torch.stack(of_texts, dim=2) for of_texts in spectra.values())  # (L, H, texts, n)
        yield from spectrum_rows(of_attention, with_curve=n == max_length, n=n, method="attention", layer="")
        yield from spectrum_rows(of_shuffled, with_curve=n == max_length, n=n, method="shuffled", layer="")
        for layer, of_layer in enumerate(of_attention, start=1):
            yield from spectrum_rows(of_layer, with_curve=n == max_length, n=n, method="attention", layer=layer)
    k = max_length // 4
    for layer, of_layer in enumerate(cumulative(of_attention)[..., k - 1], start=1):
        for head, of_head in enumerate(of_layer, start=1):
            named = {"n": max_length, "layer": layer, "head": head, "method": "attention", "k": k}
            yield summary(of_head, measure="cumulative", **named)


def spectrum_rows(singular_values: Tensor, with_curve: bool, **named: Any) -> Iterator[dict[str, Any]]:
    """The measures of singular values (..., n) that are one set, such as those of a layer."""
    yield summary(effective_rank(singular_values), measure="effective_rank", **named)
    yield summary(energy_rank(singular_values), measure="energy_rank_90", **named)
    if with_curve:
        shares = cumulative(singular_values)
        for k in curve_indices(shares.shape[-1]):
            yield summary(shares[..., k - 1], measure="cumulative", k=k, **named)


def learn_projections(
    model: PreTrainedModel, windows: Sequence[Tensor], slots: Sequence[int], arguments: Arguments
) -> dict[tuple[int, int], Tensor]:
    """The learned E of every layer, from 1, and k."""
    texts = []
    for window in tqdm(windows, desc="reading texts to learn from"):
        layers = read_heads(model, window)
        for heads in layers:
            # P is needed no more, and is most of the memory.
            del heads.probabilities
        texts.append(layers)
    by_layer = list(zip(*texts))
    keys = [(layer, k) for layer in range(1, len(by_layer) + 1) for k in slots]
    return {
        (layer, k): learn_projection(by_layer[layer - 1], k, arguments.max_train_steps, arguments.learning_rate)
        for layer, k in tqdm(keys, desc="learning E")
    }


def measure_error(
    model: PreTrainedModel, windows: Sequence[Tensor], train_windows: Sequence[Tensor], arguments: Arguments
) -> Iterator[dict[str, Any]]:
    """Errors of every method at k = n, n/2, n/4 and so on: over all layers, and by layer at n/4."""
    n = arguments.max_length
    # From the smallest that is 4 or more.
    slots = [n >> halvings for halvings in reversed(range(n.bit_length())) if n >> halvings >= 4]
    learned = learn_projections(model, train_windows, slots[:-1], arguments)
    methods = methods_with(arguments.local_window)
    # Measure, method, k and layer: the values of all heads, text after text.
    values: dict[tuple[str, str, int, int], list[Tensor]] = defaultdict(list)
    for window in tqdm(windows, desc="errors"):
        for layer, heads in enumerate(read_heads(model, window), start=1):
            found = {(name, k): method(heads, k) for k in slots for name, method in methods.items()}
            found |= {("learned", k): attend_to_slots(heads, learned[layer, k]) for k in slots[:-1]}
            found["zero", 0] = torch.zeros_like(heads.output)
            for (name, k), approximation in found.items():
                values["relative_error", name, k, layer].append(relative_error(approximation, heads))
                if name in NORM_ERROR_METHODS:
                    values["norm_error", name, k, layer].append(norm_error(approximation, heads))
                if name == "random" and (epsilon := bound_epsilon(k, n)):
                    inside = columns_in_bound(approximation, heads, epsilon)
                    values["columns_in_bound", name, k, layer].append(inside)
    over_layers: dict[tuple[str, str, int], list[Tensor]] = defaultdict(list)
    for (measure, name, k, layer), of_texts in values.items():
        over_layers[measure, name, k] += of_texts
        if measure == "relative_error" and k == n // 4:
            yield summary(torch.stack(of_texts), measure=measure, n=n, layer=layer, method=name, k=k)
    for (measure, name, k), of_texts in over_layers.items():
        yield summary(torch.stack(of_texts), measure=measure, n=n, layer="", method=name, k=k)


def check_arguments(arguments: Arguments) -> None:
    if unknown := sorted(set(arguments.measures) - set(MEASURES)):
        raise UserError(f"--measures has {unknown}, must be of {list(MEASURES)}")
    n = arguments.max_length
    if n < 16 or n % 8:
        raise UserError(f"--max_length is {n}, must be a multiple of 8 and at least 16")
    for name in ("num_windows", "num_train_windows", "max_train_steps", "local_window"):
        if (value := getattr(arguments, name)) < 1:
            raise UserError(f"--{name} is {value}, must be 1 or more")


def main(argv: Sequence[str] | None = None) -> None:
    arguments, texts = parse_arguments((Arguments, TextArguments), argv, description=__doc__)
    check_arguments(arguments)
    model, tokenizer = load_model(arguments)
    dataset = load_texts(texts)
    num_windows, n = arguments.num_windows, arguments.max_length
    needed = num_windows + (arguments.num_train_windows if "error" in arguments.measures else 0)
    pieces = draw_pieces(dataset, texts.text_column, tokenizer, n, needed, arguments.seed)
    rows: list[dict[str, Any]] = []
    if "spectrum" in arguments.measures:
        rows += measure_spectrum(model, tokenizer, pieces[:num_windows], n)
    if "error" in arguments.measures:
        windows = list(tokenized(pieces, tokenizer, n))
        rows += measure_error(model, windows[:num_windows], windows[num_windows:], arguments)
    described = {
        "model": Path(arguments.model_name_or_path).name,
        "weights": "random" if arguments.random_weights else "trained",
        "data": arguments.data_name or texts.dataset_name or " ".join(texts.train_file or []),
        "texts": num_windows,
    }
    # All rows have the same columns, in the same order.
    columns = ("measure", "n", "layer", "head", "method", "k", "value", "spread")
    rows = [{name: row.get(name, "") for name in columns} for row in rows]
    if arguments.results_file:
        append_results(arguments.results_file, [described | row for row in rows], arguments.seed, argv)
    print(format_table([row for row in rows if not row["layer"]]))


if __name__ == "__main__":
    run_main(main)
