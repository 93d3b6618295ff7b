"""Which cells scripts/benchmark.py measures, and how much memory each would take, told before it is started."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import yaml

from benchmark_models import BUILDERS, HAS_SLOTS, LONGFORMER_WINDOW, PACKAGES, Cell, UnknownOption, build_model
from common import UserError, one_line


# What --lengths and the other options say already, and what keeps the models of one size.
FIXED_OPTIONS = (
    "projected_length",
    "max_position_embeddings",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)
# A process that has imported torch and transformers, in bytes.
PROCESS_BYTES = 500 * 2**20


@dataclass(frozen=True)
class Planned:
    """A cell, what it would take, and the reason if it is not to be measured."""

    cell: Cell
    needed_bytes: int = 0
    skipped: str = ""


def parse_entry(entry: str) -> tuple[str, dict[str, Any]]:
    """`mean_pool:local_window=32,compile=true` -> the family and its options."""
    model, _, rest = entry.partition(":")
    if model not in BUILDERS:
        raise UserError(f"--models has no {model!r}; it takes {', '.join(BUILDERS)}")
    options: dict[str, Any] = {}
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        if not equals or not key or not value:
            raise UserError(f"--models {entry!r}: options are written key=value,key=value, and {pair!r} is not")
        if key in FIXED_OPTIONS:
            raise UserError(f"--models {entry!r}: {key} is the same for all models; give --{key} or its list instead")
        options[key] = yaml.safe_load(value)
    if options.get("dtype", "float32") not in ("float32", "bfloat16"):
        raise UserError(f"--models {entry!r}: dtype must be float32 or bfloat16")
    for key in ("compile", "gradient_checkpointing"):
        if not isinstance(options.get(key, False), bool):
            raise UserError(f"--models {entry!r}: {key} must be true or false")
    return model, options


def cells_of_length(entries: Sequence[str], projected_lengths: Sequence[int], common: Cell) -> list[Cell]:
    """The cells of one column: every entry, and those with slots for every k. `common` holds all that they share."""
    cells = []
    for model, options in map(parse_entry, entries):
        dtype = options.get("dtype", common.dtype)
        for k in projected_lengths if model in HAS_SLOTS else [None]:
            cells.append(replace(common, model=model, options=options, dtype=dtype, projected_length=k))
    return cells


def attention_bytes(cell: Cell) -> float:
    """The largest tensors of the attention of one layer, from the shapes that each family is known to make."""
    size = cell.torch_dtype.itemsize
    B, N, k, D = cell.batch_size, cell.sequence_length, cell.projected_length or 0, cell.hidden_size
    score = B * cell.num_attention_heads * N * size
    if cell.model == "roberta_eager":
        return 2 * score * N
    if cell.model == "modernbert_sdpa":
        # The mask of the window, for each pair of tokens: a byte and a number, both twice.
        return 2 * B * N * N * (1 + size)
    if cell.model == "longformer":
        return 4 * score * (2 * LONGFORMER_WINDOW + 1)
    if cell.model == "nystromformer":
        return 8 * score * 64
    if cell.model in PACKAGES:
        return 3 * score * k
    w = cell.options.get("local_window")
    # Each block of w has keys and values of its own.
    return 2 * B * N * (k + 3 * w) / w * D * size if w else 0


def needed_bytes(cell: Cell, parameters: int) -> int:
    """Memory of the cell's process, roughly: weights, and what is alive at once in a step."""
    size = cell.torch_dtype.itemsize
    tokens = cell.batch_size * cell.sequence_length
    layer = tokens * (6 * cell.hidden_size + 2 * cell.intermediate_size) * size + attention_bytes(cell)
    logits = tokens * cell.vocab_size * 4 if cell.head == "masked_lm" else 0
    if cell.mode == "forward":
        return round(PROCESS_BYTES + parameters * size + layer + logits)
    # Weights, gradients and the two moments of AdamW in float32; what the backward pass needs of every layer.
    layers = 1 if cell.options.get("gradient_checkpointing") else cell.num_hidden_layers
    return round(PROCESS_BYTES + parameters * 16 + 2 * layers * layer + 3 * logits)


def plan_cell(cell: Cell, memory_limit: int) -> Planned:
    """Says whether a cell can be measured within `memory_limit` bytes. Its weights are counted without making them."""
    if cell.projected_length is not None and cell.projected_length > cell.sequence_length:
        return Planned(cell, skipped=f"k = {cell.projected_length} slots are more than n = {cell.sequence_length}")
    try:
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in build_model(cell).parameters())
    except UnknownOption as error:
        raise UserError(f"--models {cell.name!r}: {error}") from error
    except ImportError as error:
        package = PACKAGES.get(cell.model, "")
        return Planned(cell, skipped=f"the package {package} cannot be imported ({one_line(error)}): pip install it")
    except ValueError as error:
        return Planned(cell, skipped=one_line(error))
    needed = needed_bytes(cell, parameters)
    if needed > memory_limit:
        return Planned(cell, needed, f"needs about {gib(needed)}, and {gib(memory_limit)} are free")
    return Planned(cell, needed)


def gib(size: float) -> str:
    return f"{math.ceil(size / 2**30 * 10) / 10:,.1f} GiB"
