"""Which cells scripts/benchmark.py and scripts/profile_steps.py measure, and how much memory each would take."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import psutil
import torch
import yaml

from benchmark_models import BUILDERS, HAS_SLOTS, LONGFORMER_WINDOW, PACKAGES, Cell, UnknownOption, build_model
from common import UserError, one_line


REFERENCE = "roberta_sdpa"
MODELS = [
    *("linear", "mean_pool", "max_pool", "convolution", "random"),
    *("mean_pool:local_window=32", "mean_pool:local_window=64"),
    *("roberta_eager", REFERENCE, "roberta_sdpa_tiled", "bert_sdpa", "modernbert_sdpa"),
    *("longformer", "nystromformer", "linformer_package", "linformer_pytorch_package"),
]
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


@dataclass
class CellArguments:
    """Which models do what, of what size and with which input."""

    lengths: list[int] = field(
        default_factory=lambda: [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536],
        metadata={"help": "Tokens a row, n; one column after the other."},
    )
    models: list[str] = field(
        default_factory=lambda: list(MODELS), metadata={"help": "Families, or family:key=value,... (see above)."}
    )
    projected_lengths: list[int] = field(
        default_factory=lambda: [128], metadata={"help": "Slots k, for the models that have them."}
    )
    mode: str = field(
        default="forward",
        metadata={"help": "A forward pass, or forward, backward and AdamW step.", "choices": ["forward", "training"]},
    )
    head: str = field(
        default="none",
        metadata={
            "help": "none: the encoder, trained on the mean square of its output. masked_lm: the masked-LM head, with "
            "labels at 15 %% of the tokens.",
            "choices": ["none", "masked_lm"],
        },
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "bfloat16: weights too in a forward pass, autocast of float32 weights in training.",
            "choices": ["float32", "bfloat16"],
        },
    )
    device: str | None = field(
        default=None, metadata={"help": "Default: cuda if there is one, else cpu.", "choices": ["cpu", "cuda"]}
    )
    tokens_per_batch: int = field(
        default=4096, metadata={"help": "The batch is so many tokens, and at least one row, at every length."}
    )
    batch_size: int | None = field(default=None, metadata={"help": "Instead: so many rows at every length."})
    num_threads: int | None = field(
        default=None, metadata={"help": "Threads. Default: torch's own, OMP_NUM_THREADS or one a core."}
    )
    vocab_size: int = field(default=32768, metadata={"help": "Entries of the vocabulary."})
    hidden_size: int = field(default=768, metadata={"help": "Width of the hidden states."})
    num_hidden_layers: int = field(
        default=3,
        metadata={
            "help": "Number of layers; all have the same cost, but of every three of ModernBERT's one is global."
        },
    )
    num_attention_heads: int = field(default=12, metadata={"help": "Number of heads."})
    intermediate_size: int = field(default=3072, metadata={"help": "Width of the feed-forward layers."})
    seed: int = field(default=42, metadata={"help": "Of weights and inputs."})


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


def check_arguments(arguments: CellArguments) -> None:
    """Fills the defaults that depend on the machine, and refuses what cannot be measured."""
    for option in fields(arguments):
        given = getattr(arguments, option.name)
        for value in given if isinstance(given, list) else [given]:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and value <= 0 and option.name != "seed":
                raise UserError(f"--{option.name} must be above 0, not {value}")
    if arguments.hidden_size % arguments.num_attention_heads:
        raise UserError(
            f"--hidden_size {arguments.hidden_size} must be a multiple of --num_attention_heads "
            f"{arguments.num_attention_heads}"
        )
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; use --device cpu, or a CUDA build of torch")
    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    arguments.num_threads = arguments.num_threads or torch.get_num_threads()


def cells_of(arguments: CellArguments, n: int) -> list[Cell]:
    """The cells of one column. `arguments` have been through `check_arguments`."""
    common = Cell(
        model="",
        sequence_length=n,
        batch_size=arguments.batch_size or max(1, arguments.tokens_per_batch // n),
        mode=arguments.mode,
        head=arguments.head,
        dtype=arguments.dtype,
        device=arguments.device or "cpu",
        num_threads=arguments.num_threads or 1,
        seed=arguments.seed,
        vocab_size=arguments.vocab_size,
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.num_hidden_layers,
        num_attention_heads=arguments.num_attention_heads,
        intermediate_size=arguments.intermediate_size,
    )
    return cells_of_length(arguments.models, arguments.projected_lengths, common)


def columns_of(cell: Cell, arguments: CellArguments) -> dict[str, Any]:
    """What a row of results says of its cell."""
    row: dict[str, Any] = asdict(cell) | {
        "options": cell.name.partition(":")[2],
        "base_dtype": arguments.dtype,
        "tokens_per_batch": None if arguments.batch_size else arguments.tokens_per_batch,
    }
    del row["seed"]
    return row


def free_memory(device: str) -> int:
    """Bytes that a new process could have."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available


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
