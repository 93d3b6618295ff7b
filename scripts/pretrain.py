"""Pretrain a Linformer, or its softmax twin, by masked language modelling on any text.

    python scripts/pretrain.py --config_name configs/small.json --train_file notes/*.txt --sample_by document \\
        --max_train_steps 2000 --output_dir output/mine
    python scripts/pretrain.py --config_name configs/base.json --dataset_name allenai/c4 --dataset_config_name en \\
        --streaming true --validation_split validation --max_train_steps 100000 --output_dir output/base
    accelerate launch --config_file configs/accelerate/ddp.yaml scripts/pretrain.py ...   # several GPUs or machines

Documents are packed into blocks of n tokens without waste (scripts/packing.py). --architecture roberta trains the
twin: a RoBERTa of the same sizes on the same blocks in the same order with the same masks. Held-out text is masked the
same way in every run, whatever its seed, so that perplexities compare.

A run that was killed goes on with --resume_from_checkpoint last and ends with the weights and the log, bit for bit on
a CPU, that it would have had. SIGTERM and Ctrl-C write a checkpoint before they end it.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from datasets.distributed import split_dataset_by_node
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from common import (
    TextArguments,
    UserError,
    append_results,
    format_table,
    load_data_files,
    load_texts,
    longest_input,
    one_line,
    only_texts,
    parse_arguments,
    run_main,
    write_json,
)
from loading import ModelArguments, load_config_and_tokenizer
from operations import count_operations, measure_peak
from packing import (
    EVALUATION_SEED,
    Blocks,
    BlockStream,
    Frame,
    MaskingCollator,
    PackedBlocks,
    StreamedBlocks,
    encode,
    spread_evenly,
    tokenize_documents,
)
from training import (
    Batch,
    TrainingArguments,
    TrainingData,
    identity_of,
    prepare_output_dir,
    save_model,
    start_accelerator,
    train,
)
from twin import RobertaForMaskedLM, make_twin


@dataclass
class PretrainedArguments(ModelArguments):
    """What is trained."""

    architecture: str = field(
        default="linformer",
        metadata={
            "help": "From scratch: what --config_name says, or a RoBERTa of the same sizes.",
            "choices": ["linformer", "roberta"],
        },
    )
    sparse_prediction: bool = field(
        default=True, metadata={"help": "Compute logits only where tokens are masked: the same loss, faster."}
    )


@dataclass
class PretrainingArguments:
    """What it learns from."""

    streaming: bool = field(
        default=False, metadata={"help": "Read and tokenize as training goes, for text that is too much to keep."}
    )
    shuffle_window: int = field(
        default=1000, metadata={"help": "With --streaming: blocks are shuffled among so many that follow each other."}
    )
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the tokens that are to be predicted."})
    eval_mlm_probability: float = field(
        default=0.15, metadata={"help": "Share of the held-out tokens. Perplexities compare where it is the same."}
    )
    validation_file: list[str] | None = field(default=None, metadata={"help": "Held-out text to evaluate on."})
    validation_split: str | None = field(
        default=None, metadata={"help": "Instead of a file: a split of --dataset_name."}
    )
    validation_split_percentage: float = field(
        default=5.0,
        metadata={"help": "Without either: the share of the documents that is held out, at least a block."},
    )
    max_eval_samples: int = field(
        default=500, metadata={"help": "Evaluate on at most so many blocks, spread evenly over the held-out text."}
    )
    dataloader_num_workers: int = field(
        default=0,
        metadata={"help": "Processes that read ahead; 0 for none. With --streaming their number changes the order."},
    )


@dataclass
class LoopArguments(TrainingArguments):
    """How it is trained, and what is written."""

    run_name: str = field(default="pretrain", metadata={"help": "The run's name in trackers and --results_file."})
    learning_rate: float = field(default=5e-4, metadata={"help": "The highest learning rate."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay, not applied to biases and norms."})
    num_warmup_steps: float = field(
        default=0.06, metadata={"help": "Steps of rising learning rate; below 1, their share of all steps."}
    )
    num_train_epochs: int = field(default=1, metadata={"help": "Passes over the training set."})
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens of a block. Default: all that the model takes."}
    )
    metric_for_best_model: str | None = field(
        default="loss", metadata={"help": "What chooses the model, of what an evaluation prints."}
    )
    eval_steps: int | None = field(default=500, metadata={"help": "Evaluate every so many optimizer steps."})
    checkpointing_steps: str = field(
        default="500", metadata={"help": "A checkpoint is written at evaluations, and every so many steps."}
    )
    torch_compile: bool = field(default=False, metadata={"help": "Compile the model; worth it for long runs."})


# What a results file says of a model.
DESCRIBED_KEYS: tuple[str, ...] = ("projection_type", "projection_sharing", "projection_init", "projected_length")
DESCRIBED_KEYS += ("local_window", "local_position_bias", "exact_short_sequences", "max_position_embeddings")


def load_model(arguments: PretrainedArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A masked-LM model, new or to go on from, and its tokenizer. Raises `UserError` where they do not fit."""
    config, tokenizer = load_config_and_tokenizer(arguments)
    name, trust = arguments.model_name_or_path, {"trust_remote_code": arguments.trust_remote_code}
    if name is None:
        for token in ("bos", "eos"):
            setattr(config, f"{token}_token_id", getattr(tokenizer, f"{token}_token_id"))
        if arguments.architecture == "roberta" and config.model_type != "linformer":
            raise UserError(f"--architecture roberta is the twin of a Linformer, and {arguments.config_name} is none")
        try:
            is_twin = arguments.architecture == "roberta"
            model = make_twin(config) if is_twin else AutoModelForMaskedLM.from_config(config, **trust)
        except ValueError as error:
            raise UserError(f"cannot make a masked-LM model of {arguments.config_name}: {one_line(error)}") from error
    else:
        if arguments.architecture == "roberta":
            raise UserError("--architecture roberta makes a new model; leave it out with --model_name_or_path")
        auto_class: Any = RobertaForMaskedLM if config.model_type == "roberta" else AutoModelForMaskedLM
        options: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
        try:
            model, report = auto_class.from_pretrained(name, config=config, **options, **trust)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"cannot load the model {name}, which may be incomplete: {one_line(error)}") from error
        # A bias by distance is new where the source has none, and begins as nothing.
        if lost := sorted(key for key in report["missing_keys"] if not key.endswith("position_bias.weight")):
            raise UserError(f"{name} is no whole masked-LM model: {len(lost)} weights are missing, such as {lost[0]}")
    if arguments.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model, tokenizer


def choose_block_length(max_length: int | None, model: PreTrainedModel) -> int:
    """Tokens of a block, `--max_length` or what the model can take."""
    limit = longest_input(model)
    length = max_length or limit
    if length is None:
        raise UserError(f"a {model.config.model_type} model sets no limit to the length; give --max_length")
    if not 8 <= length <= (limit or length):
        raise UserError(f"--max_length {length} must lie between 8 and the {limit} tokens that the model can take")
    return length


def load_held_out(
    arguments: PretrainingArguments, texts: TextArguments, tokenizer: PreTrainedTokenizerBase, length: int
) -> datasets.Dataset | None:
    """The texts to evaluate on, None if some of the training texts are to be held out."""
    if arguments.validation_file is not None and arguments.validation_split is not None:
        raise UserError("give either --validation_file or --validation_split, got both")
    if arguments.validation_file is not None:
        files = " ".join(arguments.validation_file)
        held_out = load_data_files({"validation": arguments.validation_file}, texts.sample_by)["validation"]
        return only_texts(held_out, texts.text_column, files)
    if arguments.validation_split is None:
        if arguments.streaming:
            raise UserError(
                "with --streaming, give --validation_file or --validation_split: a stream cannot be divided"
            )
        return None
    if texts.dataset_name is None:
        raise UserError("--validation_split names a split of --dataset_name; with files, give --validation_file")
    if not arguments.streaming:
        return load_texts(texts, split=arguments.validation_split)
    # As much of the stream as is used.
    kept: list[str] = []
    tokens = 0
    for row in load_texts(texts, split=arguments.validation_split, streaming=True):
        kept.append(row[texts.text_column] or "")
        tokens += len(encode(tokenizer, kept[-1:])[0])
        if tokens >= arguments.max_eval_samples * length:
            break
    return datasets.Dataset.from_dict({texts.text_column: kept})


def pack(documents: datasets.Dataset, length: int, frame: Frame, name: str) -> PackedBlocks:
    """Blocks of tokenized documents. Raises `UserError` if there is not one."""
    blocks = PackedBlocks(documents, length, frame)
    if not len(blocks):
        raise UserError(
            f"the {len(documents)} {name} documents have {blocks.num_tokens} tokens, not enough for one block of "
            f"{length}; lower --max_length or give more text"
        )
    return blocks


def load_blocks(
    arguments: PretrainingArguments,
    texts: TextArguments,
    loop: LoopArguments,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
) -> tuple[PackedBlocks | None, PackedBlocks]:
    """Blocks to train on, None if they are streamed, and held-out ones. Raises `UserError` where there are none."""
    frame, workers = Frame.of(tokenizer), loop.preprocessing_num_workers
    held_out_texts = load_held_out(arguments, texts, tokenizer, length)
    train_set = held_out = None
    if held_out_texts is not None:
        held_out = tokenize_documents(held_out_texts, tokenizer, workers, "Tokenizing held-out documents")
    if not arguments.streaming:
        train_set = tokenize_documents(load_texts(texts), tokenizer, workers, "Tokenizing documents")
    if held_out is None:
        assert train_set is not None
        share, rows = arguments.validation_split_percentage / 100, len(train_set)
        # The same for every --seed, so that perplexities compare.
        drawn = np.random.default_rng(EVALUATION_SEED).permutation(rows)
        lengths = np.asarray(train_set["length"][:], dtype=np.int64)[drawn] + 1
        enough_for_a_block = int(np.searchsorted(np.cumsum(lengths), length)) + 1
        count = max(enough_for_a_block, round(rows * share)) if 0 < share < 1 else 0
        if not 0 < count < rows:
            raise UserError(
                f"cannot hold out {arguments.validation_split_percentage} % of {rows} documents; change "
                "--validation_split_percentage, give --validation_file, or divide .txt files by --sample_by paragraph"
            )
        held_out, train_set = (train_set.select(np.sort(part)) for part in (drawn[:count], drawn[count:]))
    blocks = None if train_set is None else pack(train_set, length, frame, "training")
    return blocks, pack(held_out, length, frame, "held-out")


@torch.no_grad()
def evaluate_model(accelerator: Accelerator, model: nn.Module, loader: DataLoader) -> dict[str, float]:
    """The mean loss of all masked tokens of the held-out blocks, and its exponential."""
    model.eval()
    parts = []
    for batch in tqdm(loader, desc="Evaluating", leave=False, disable=not accelerator.is_main_process):
        labels = batch["labels"]
        is_predicted = labels != -100
        logits = model(**inputs_of(batch)).logits
        logits = (logits if logits.dim() == 2 else logits[is_predicted]).float()
        losses = nn.functional.cross_entropy(logits, labels[is_predicted], reduction="none")
        rows = is_predicted.nonzero()[:, 0]
        sums = torch.zeros(len(labels), device=losses.device).index_add(0, rows, losses)
        # Of rows, since accelerate repeats some where processes do not divide them evenly, and drops them here.
        gathered = accelerator.gather_for_metrics((sums, is_predicted.sum(dim=-1)))
        parts.append([values.cpu().double() for values in gathered])
    model.train()
    all_sums, all_counts = (torch.cat(values).sum() for values in zip(*parts))
    if not all_counts:
        raise UserError("no held-out token is masked: raise --eval_mlm_probability or give more held-out text")
    loss = float(all_sums / all_counts)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def inputs_of(batch: Batch) -> Batch:
    """What of a batch the model takes. Blocks are full, so no mask is needed."""
    return {name: batch[name] for name in ("input_ids", "labels")}


def masked_lm_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean loss of the masked tokens of a batch."""
    output = model(**inputs_of(batch))
    # A tiny batch may have no masked token, and then no mean over them.
    return output.loss if (batch["labels"] != -100).any() else output.logits.sum() * 0


def tokens_per_second_at_peak(accelerator: Accelerator, model: nn.Module, batch: Batch) -> float:
    """How many tokens a second all processes would train on at the peak of their matrix products."""
    names = {"bf16": torch.bfloat16, "fp16": torch.float16}
    peak = measure_peak(accelerator.device.type, names.get(accelerator.mixed_precision, torch.float32), repeats=1)
    with torch.no_grad(), accelerator.autocast():
        forward = count_operations(lambda: model(**inputs_of(batch)))
    # The backward pass takes two products for each of the forward pass.
    return accelerator.num_processes * peak / (3 * forward / batch["input_ids"].numel())


def check_arguments(arguments: PretrainingArguments, loop: LoopArguments) -> None:
    """Refuse numbers that cannot be meant."""
    for name in ("mlm_probability", "eval_mlm_probability"):
        if not 0 < getattr(arguments, name) < 1:
            raise UserError(f"--{name} must lie between 0 and 1, and is {getattr(arguments, name)}")
    for name, least in {"shuffle_window": 1, "max_eval_samples": 1, "dataloader_num_workers": 0}.items():
        if getattr(arguments, name) < least:
            raise UserError(f"--{name} must be at least {least}, and is {getattr(arguments, name)}")
    if arguments.streaming and loop.max_train_steps is None:
        raise UserError("with --streaming, give --max_train_steps: a stream has no known end")
    if loop.metric_for_best_model not in ("loss", "perplexity"):
        raise UserError(f"--metric_for_best_model must be loss or perplexity, not {loop.metric_for_best_model}")


def main(argv: Sequence[str] | None = None) -> None:
    model_arguments, texts, arguments, loop = parse_arguments(
        (PretrainedArguments, TextArguments, PretrainingArguments, LoopArguments), argv, description=__doc__
    )
    check_arguments(arguments, loop)
    accelerator, checkpoint = start_accelerator(loop, compiled=loop.torch_compile)
    model, tokenizer = load_model(model_arguments)
    if accelerator.is_fsdp2 and model.config.model_type == "roberta":
        raise UserError("FSDP refuses the bias that RoBERTa's head has under two names; train it with ddp.yaml")
    length = choose_block_length(loop.max_length, model)
    tokenizer.model_max_length = length
    # How it is trained is not how it is to be used.
    sparse_prediction = getattr(model.config, "sparse_prediction", False)
    model.config.sparse_prediction = model_arguments.sparse_prediction

    with accelerator.main_process_first():
        blocks, held_out = load_blocks(arguments, texts, loop, tokenizer, length)
    collate = MaskingCollator(tokenizer, arguments.mlm_probability, loop.seed)
    options = {"batch_size": loop.per_device_train_batch_size, "num_workers": arguments.dataloader_num_workers}
    data: TrainingData
    if blocks is not None:
        accelerator.print(f"{blocks.num_tokens:,} tokens in {len(blocks):,} blocks of {length} to train on")
        data = Blocks(accelerator, blocks, collate, **options)
    else:
        process = accelerator.process_index
        documents = load_texts(texts, streaming=True)
        documents = split_dataset_by_node(documents, process, accelerator.num_processes)
        options["num_workers"] = min(options["num_workers"], documents.num_shards)
        stream = BlockStream(documents, tokenizer, length, loop.seed, arguments.shuffle_window, process)
        data = StreamedBlocks(accelerator, stream, collate, **options)

    chosen = spread_evenly(held_out, arguments.max_eval_samples)
    accelerator.print(f"{len(chosen):,} blocks of {len(held_out):,} to evaluate on")
    eval_loader = accelerator.prepare(
        DataLoader(
            chosen,
            loop.per_device_eval_batch_size,
            collate_fn=MaskingCollator(tokenizer, arguments.eval_mlm_probability, EVALUATION_SEED),
        )
    )

    all_arguments = {**asdict(model_arguments), **asdict(texts), **asdict(arguments), **asdict(loop)}
    identity = identity_of(accelerator, all_arguments) | {"held-out tokens": held_out.num_tokens}
    if arguments.streaming:
        # Each worker has documents of its own.
        identity["dataloader_num_workers"] = options["num_workers"]
    identity["training tokens"] = blocks.num_tokens if blocks is not None else "streamed"
    prepare_output_dir(accelerator, loop, identity, checkpoint)
    model.to(accelerator.device)
    # Masked as training masks: the work of a sparse prediction depends on it.
    batch = collate([chosen[row] for row in range(min(len(chosen), loop.per_device_train_batch_size))])
    batch = {name: states.to(accelerator.device) for name, states in batch.items()}
    peak = tokens_per_second_at_peak(accelerator, model, batch)
    progress, wrapped = train(
        *(accelerator, model, data, masked_lm_loss),
        lambda model: evaluate_model(accelerator, model, eval_loader),
        *(loop, identity, checkpoint),
        count_of=lambda batch: int((batch["labels"] != -100).sum()),
        peak_tokens_per_second=peak,
    )

    model.config.sparse_prediction = sparse_prediction
    save_model(accelerator, wrapped, tokenizer, Path(loop.output_dir))
    if accelerator.is_main_process:
        output_dir = Path(loop.output_dir)
        write_json(output_dir / "training_args.json", all_arguments)
        finished = output_dir / "all_results.json"
        speed = progress.tokens / progress.train_seconds
        if loop.results_file and not finished.exists():
            described = {
                "run_name": loop.run_name,
                "model": model.config.model_type,
                **{name: getattr(model.config, name, None) for name in DESCRIBED_KEYS},
                "max_length": length,
                "parameters": model.num_parameters(),
                "learning_rate": loop.learning_rate,
                "tokens_per_second": speed,
            }
            tokens_per_step = progress.tokens / progress.step
            rows = [
                {
                    **described,
                    "tokens": round(row["step"] * tokens_per_step),
                    "step": row["step"],
                    "train_loss": row["train_loss"],
                    "validation_loss": row["eval_loss"],
                    "validation_perplexity": row["eval_perplexity"],
                }
                for row in progress.history
            ]
            append_results(loop.results_file, rows, loop.seed, argv)
        write_json(finished, {"history": progress.history, "tokens": progress.tokens, "tokens_per_second": speed})
        print(format_table(progress.history))
        print(f"{progress.tokens:,} tokens in {progress.seconds:,.0f} s; the model is in {output_dir}")
    accelerator.end_training()


if __name__ == "__main__":
    run_main(main, resume="--resume_from_checkpoint last")
