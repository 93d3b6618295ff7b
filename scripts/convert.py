"""Turn a BERT, RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT or ELECTRA checkpoint into a Linformer, without training.

    python scripts/convert.py --model_name_or_path FacebookAI/roberta-base --output_dir output/linformer-roberta
    python scripts/convert.py --model_name_or_path path/to/bert --output_dir output/long \\
        --max_position_embeddings 4096 --projected_length 128 --local_window 32

The source is a Hub name or a folder with safetensors: an encoder, or one with a masked-LM, sequence or token
classification or question answering head. What comes out has its tokenizer, its labels and the code to load it
anywhere, and equals the source on texts of up to max(k, 2 w) tokens; that is tried out before anything is written.
Files of sentence-transformers are taken over.

Then the two are compared on texts, by length: the relative error of every layer's hidden states, and the cosines of
the last layer's tokens and of their mean. Where a text is longer than the source can read, the target is what the
source says of windows of it. `fidelity.png`, beside the model, shows it.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import cached_file

from common import (
    ROOT,
    UserError,
    append_results,
    format_table,
    load_data_files,
    no_such_folder,
    one_line,
    only_texts,
    parse_arguments,
    run_main,
    write_json,
)
from conversion import HEADS, convert_config, convert_model, exact_length, find_family, find_head, longest_row
from fidelity import describe, draw_rows, length_buckets, measure_fidelity, plot_fidelity, printable, result_rows
from hf_linformer import LinformerConfig


@dataclass
class ConversionArguments:
    """What is converted, and to what."""

    model_name_or_path: str = field(
        metadata={"help": "The source: a Hub name or a folder. Only safetensors are read."}
    )
    output_dir: str = field(metadata={"help": "Where the Linformer goes."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Default: the source's own."})
    head: str = field(
        default="auto",
        metadata={"help": "Default: the source's. base takes the encoder alone.", "choices": ["auto", *HEADS]},
    )
    projection_type: str = field(
        default="mean_pool",
        metadata={"help": "mean_pool, max_pool, linear, convolution or random (no use untrained)."},
    )
    projected_length: int = field(default=128, metadata={"help": "k, the number of slots."})
    local_window: int = field(default=32, metadata={"help": "w, the exact neighbourhood; 0 for slots alone."})
    projection_sharing: str = field(
        default="layerwise", metadata={"help": "Of a learned E: none, headwise, key_value or layerwise."}
    )
    max_position_embeddings: int | None = field(
        default=None, metadata={"help": "n, the longest text in tokens. Default: that of the source."}
    )
    position_extension: str = field(
        default="copy",
        metadata={
            "help": "Positions beyond the source's: its own again (copy), or those beyond the exact length stretched "
            "(interpolate).",
            "choices": ["copy", "interpolate"],
        },
    )
    trained_length: int | None = field(
        default=None,
        metadata={
            "help": "The source was trained on so many tokens (all-MiniLM-L6-v2 on 256, of the 512 it can read): "
            "positions beyond are made of those before, as with --position_extension. Default: all that it reads."
        },
    )
    slot_projections: bool = field(
        default=False,
        metadata={
            "help": "Give means of several tokens linear layers of their own, for scripts/distill.py to train while "
            "short texts stay exact. They begin as the source's, so that without training nothing changes."
        },
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Of the saved weights. Default: the source's.",
            "choices": ["auto", "float32", "float16", "bfloat16"],
        },
    )
    loaded_dtype: str | None = field(
        default=None,
        metadata={
            "help": "What they are loaded as unless something else is asked for, such as float32 for a small file of "
            "float16 that is used on CPUs. Default: what they are saved as.",
            "choices": ["float32", "float16", "bfloat16"],
        },
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace the model that is there."})


@dataclass
class ComparisonArguments:
    """On what the two are compared."""

    validation_file: list[str] = field(
        default_factory=lambda: [str(ROOT / "data/sotu/dev.parquet")],
        metadata={
            "help": "Texts: csv, tsv, json, jsonl, parquet or txt, also with .gz. Default: the bundled speeches."
        },
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    data_name: str | None = field(
        default=None, metadata={"help": "What the results call the texts. Default: the name of the file."}
    )
    max_eval_samples: int = field(default=24, metadata={"help": "Texts to compare at each length; 0 for none."})
    lengths: list[int] | None = field(
        default=None,
        metadata={"help": "Lengths to compare at. Default: 1/16 to 1 of what the source can read, and twice that."},
    )
    seed: int = field(default=42, metadata={"help": "Of the texts that are drawn, and of random projections."})
    results_file: str | None = field(default=None, metadata={"help": "Add a row for each length to this CSV."})


# Source


def how_to_unpickle(folder: Path) -> str:
    """Two lines of Python for the user, where a local folder has its weights in a pickle alone; else nothing."""
    pickled = folder / "pytorch_model.bin"
    if not pickled.is_file() or any(folder.glob("*.safetensors")):
        return ""
    load = f"import torch, safetensors.torch; weights = torch.load({str(pickled)!r}, weights_only=True)"
    # Weights that share memory cannot be saved as they are.
    copies = "{name: weight.clone().contiguous() for name, weight in weights.items()}"
    save = f'safetensors.torch.save_file({copies}, {str(folder / "model.safetensors")!r}, {{"format": "pt"}})'
    return f"; here two lines of Python do: `{load}` and `{save}`"


def load_source(
    arguments: ConversionArguments,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, PreTrainedConfig, str, list[str], list[str]]:
    """The source in float32, its tokenizer and configuration, its head, and weights it lacks and does not know."""
    name = arguments.model_name_or_path
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise UserError(f"{no_such_folder(name)}cannot read the configuration of {name}: {one_line(error)}") from error
    head = find_head(config, find_family(config), arguments.head)
    try:
        model, report = getattr(transformers, HEADS[head].auto_class).from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"cannot load the weights of {name}: {one_line(error)}. They must be whole, fit the configuration, and be "
            f"safetensors: for a checkpoint of pickles the Hub's converter makes them{how_to_unpickle(Path(name))}"
        ) from error
    if report["mismatched_keys"]:
        weight, found, expected = sorted(report["mismatched_keys"])[0]
        raise UserError(
            f"weights of {name} do not fit its configuration: {weight} has the shape {tuple(found)}, not "
            f"{tuple(expected)}"
        )
    tokenizer_name = arguments.tokenizer_name or name
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{no_such_folder(tokenizer_name)}cannot load the tokenizer {tokenizer_name}: {one_line(error)}"
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # What Transformers makes of a folder without the files of one.
        raise UserError(f"the tokenizer {tokenizer_name} has no vocabulary; name the right one with --tokenizer_name")
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer_name} has {len(tokenizer)} entries, the model {name} only {config.vocab_size}: "
            "they do not belong together; name the right one with --tokenizer_name"
        )
    if tokenizer.pad_token_id != config.pad_token_id:
        raise UserError(
            f"the tokenizer {tokenizer_name} pads with {tokenizer.pad_token_id}, the model {name} with "
            f"{config.pad_token_id}: they do not belong together; name the right one with --tokenizer_name"
        )
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    return model.eval(), tokenizer, config, head, missing, unexpected


def choose_config(arguments: ConversionArguments, source: PreTrainedConfig, head: str) -> LinformerConfig:
    """The configuration of the Linformer. Raises `UserError` where its numbers do not fit together."""
    source_n = longest_row(source)
    n = source_n if arguments.max_position_embeddings is None else arguments.max_position_embeddings
    if n < source_n:
        raise UserError(
            f"--max_position_embeddings {n} is less than the {source_n} tokens that the source reads; leave it out, "
            "or cut texts in the tokenizer"
        )
    changes: dict[str, Any] = {
        "projection_type": arguments.projection_type,
        "projected_length": arguments.projected_length,
        "projection_sharing": arguments.projection_sharing,
        "local_window": arguments.local_window,
        "slot_projections": arguments.slot_projections,
        "max_position_embeddings": n,
    }
    if arguments.projection_type not in ("mean_pool", "max_pool"):
        changes |= {"exact_short_sequences": True, "projection_init": "segment_mean"}
    try:
        return convert_config(source, find_family(source), head, **changes)
    except (ValueError, StrictDataclassError) as error:
        raise UserError(f"such a Linformer cannot be: {one_line(error)}") from error


# Proof


@torch.no_grad()
def largest_difference(source: PreTrainedModel, model: PreTrainedModel, length: int) -> float:
    """Between the outputs of both for random tokens, in rows of `length`, up to which it is exact, and shorter ones.

    Of outputs beyond 1 it is the share: they are rounded the more, the larger they are.
    """
    if length < 1:
        return 0.0
    differences = [0.0]
    for row_length in {1, length // 2 + 1, length}:
        input_ids = torch.randint(model.config.vocab_size, (2, row_length))
        # RoBERTa counts no position for an id that pads.
        pad = source.config.pad_token_id
        input_ids[input_ids == pad] = (pad + 1) % model.config.vocab_size
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        expected, output = source(**inputs), model(**inputs)
        for name in output:
            largest = expected[name].abs().max().clamp(min=1)
            differences.append(float((output[name] - expected[name]).abs().max() / largest))
    return max(differences)


# Results


def check_output_dir(path: Path, overwrite: bool) -> None:
    if path.exists() and not path.is_dir():
        raise UserError(f"--output_dir {path} is a file; choose a folder")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UserError(f"--output_dir {path} is not empty; choose another, or replace it with --overwrite_output_dir")


def copy_sentence_transformers(name: str, folder: Path, n: int) -> bool:
    """Take over the files that make a checkpoint one of sentence-transformers, if the source is one."""

    def source_file(path: str) -> str | None:
        return cached_file(
            name, path, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )

    if (modules := source_file("modules.json")) is None:
        return False
    shutil.copyfile(modules, folder / "modules.json")
    files = ["config_sentence_transformers.json"]
    for module in json.loads(Path(modules).read_text(encoding="utf-8")):
        if module["path"]:
            if Path(module["path"]).name != module["path"]:
                raise UserError(f"modules.json of {name} names {module['path']!r}, which is no folder beside it")
            (folder / module["path"]).mkdir()
            # A dense layer has weights too.
            files += [f"{module['path']}/{name}" for name in ("config.json", "model.safetensors")]
    for name_of_file in files:
        if file := source_file(name_of_file):
            shutil.copyfile(file, folder / name_of_file)
    settings = source_file("sentence_bert_config.json")
    kept = json.loads(Path(settings).read_text(encoding="utf-8")) if settings else {}
    write_json(folder / "sentence_bert_config.json", kept | {"max_seq_length": n})
    return True


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: ConversionArguments, dtype: torch.dtype
) -> bool:
    """Write the model aside and then into place; whether it is one of sentence-transformers."""
    folder = Path(arguments.output_dir)
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    model.to(dtype=dtype)  # type: ignore[call-arg]
    model.save_pretrained(aside)
    if arguments.loaded_dtype:
        config = json.loads((aside / "config.json").read_text(encoding="utf-8"))
        write_json(aside / "config.json", config | {"dtype": arguments.loaded_dtype})
    n = model.config.max_position_embeddings
    tokenizer.model_max_length = n
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        # What the source's file says of cutting and padding would hold for whoever reads it without Transformers.
        backend.no_truncation()
        backend.no_padding()
    for name in ("is_local", "local_files_only", "max_length", "stride", "truncation_strategy"):
        # How the source happened to be loaded, and to be cut, is no property of the tokenizer.
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.save_pretrained(aside)
    is_sentence_transformer = copy_sentence_transformers(arguments.model_name_or_path, aside, n)
    folder.mkdir(exist_ok=True)
    for pattern in ("*.safetensors*", "modules.json", "*sentence*.json", "fidelity.png"):
        for old in folder.glob(pattern):
            old.unlink()
    shutil.copytree(aside, folder, dirs_exist_ok=True)
    shutil.rmtree(aside)
    return is_sentence_transformer


def draw_texts(arguments: ComparisonArguments) -> list[str]:
    """All texts of the files, in an order drawn by the seed."""
    dataset = load_data_files({"validation": arguments.validation_file})["validation"]
    dataset = only_texts(dataset, arguments.text_column, " ".join(arguments.validation_file))
    return [text for text in dataset.shuffle(seed=arguments.seed)[arguments.text_column] if text]


def main(argv: Sequence[str] | None = None) -> None:
    arguments, comparison = parse_arguments((ConversionArguments, ComparisonArguments), argv, description=__doc__)
    output_dir = Path(arguments.output_dir)
    check_output_dir(output_dir, arguments.overwrite_output_dir)
    set_seed(comparison.seed)
    texts = draw_texts(comparison) if comparison.max_eval_samples else []

    source, tokenizer, source_config, head, missing, unexpected = load_source(arguments)
    config = choose_config(arguments, source_config, head)
    source_n = longest_row(source_config)
    for length in comparison.lengths or []:
        if not 2 <= length <= config.max_position_embeddings:
            raise UserError(
                f"--lengths {length} must lie between 2, for the special tokens, and the "
                f"{config.max_position_embeddings} tokens that the Linformer reads"
            )
    if arguments.trained_length is not None and not 2 <= arguments.trained_length <= source_n:
        raise UserError(f"--trained_length {arguments.trained_length} must lie between 2 and the source's {source_n}")
    trained_length = arguments.trained_length or source_n
    model, left_out, new = convert_model(
        source, head, config, arguments.position_extension, missing, arguments.trained_length
    )
    exact = min(exact_length(config), trained_length)
    difference = largest_difference(source, model, exact)
    if difference > 1e-4:
        raise UserError(
            f"the conversion differs from {arguments.model_name_or_path} by {difference:.1e} on {exact} tokens or "
            "fewer, where it should be exact. Nothing was written; please report it, with the source's config.json"
        )

    results = []
    if texts:
        lengths = sorted(comparison.lengths or length_buckets(source_n, config.max_position_embeddings))
        rows = draw_rows(texts, tokenizer, lengths, comparison.max_eval_samples)
        results = measure_fidelity(source, model, rows, source_n)
    saved_dtype = (source_config.dtype or torch.float32) if arguments.dtype == "auto" else arguments.dtype
    saved_dtype = getattr(torch, saved_dtype) if isinstance(saved_dtype, str) else saved_dtype
    is_sentence_transformer = save(model, tokenizer, arguments, saved_dtype)

    name = comparison.data_name or " ".join(Path(path).name for path in comparison.validation_file)
    if results:
        print(format_table(printable(results)))
        plot_fidelity(results, f"{arguments.model_name_or_path} on {name}", output_dir / "fidelity.png")
    if comparison.results_file:
        described = {"experiment": "convert", "source": arguments.model_name_or_path, "data": name} | describe(config)
        described |= {"position_extension": arguments.position_extension, "trained_length": arguments.trained_length}
        append_results(comparison.results_file, result_rows(results, described), comparison.seed, argv)

    for kind, names in (("left out of the source", [*left_out, *unexpected]), ("new, untrained", new)):
        if names:
            print(f"weights {kind}: {', '.join(names)}")
    if exact:
        print(
            f"equal to the source on texts of up to {exact} tokens; largest difference of any output {difference:.1e}"
        )
    print(f"a {type(model).__name__} for up to {config.max_position_embeddings:,} tokens is in {output_dir}")
    if arguments.max_position_embeddings is None and config.max_position_embeddings == source_n:
        print(f"its source reads as many; --max_position_embeddings {2 * source_n} makes it read twice that")
    if is_sentence_transformer:
        print(f'SentenceTransformer("{output_dir}", trust_remote_code=True) loads it')


if __name__ == "__main__":
    run_main(main)
