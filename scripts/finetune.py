"""Fine-tune an encoder, or train one from scratch, to classify texts or pairs of texts or to predict a number.

Any data set (Hub name, local folder, csv, tsv, json, jsonl or parquet files), any AutoModelForSequenceClassification:

    python scripts/finetune.py --config_name configs/tiny.json --train_file data/sotu/train.parquet \\
        --validation_file data/sotu/dev.parquet --label_column label_text --max_length 1024 --output_dir output/sotu
    python scripts/finetune.py --model_name_or_path google-bert/bert-base-uncased --dataset_name nyu-mll/glue \\
        --dataset_config_name rte --output_dir output/rte
    accelerate launch scripts/finetune.py ...                          # several GPUs, the same options

All options can stand in one file: `python scripts/finetune.py configs/demo.yaml --seed 1`. A run that was killed goes
on with `--resume_from_checkpoint last` and ends with the weights, bit for bit on a CPU, that it would have had.
"""

import json
import math
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, skip_first_batches
from datasets import DatasetDict
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_model as load_weights
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SchedulerType,
    get_scheduler,
    set_seed,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

import hf_linformer  # noqa: F401  (registers Linformer with the Auto classes)
from checkpointing import find_checkpoint, is_intact, list_checkpoints, load_checkpoint, save_checkpoint
from common import (
    ROOT,
    DataArguments,
    UserError,
    append_result,
    format_table,
    load_examples,
    one_line,
    parse_arguments,
    run_main,
    write_json,
)
from metrics import LOWER_IS_BETTER, ComputeMetrics, choose_metrics


@dataclass
class ModelArguments:
    """What is trained."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A model to start from: a folder or a Hub name. Only safetensors are loaded."}
    )
    config_name: str | None = field(
        default=None,
        metadata={"help": "Instead, to train from scratch: a configuration (JSON file, folder or Hub name)."},
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Changes to the configuration, e.g. 'projection_type=mean_pool,projected_length=[64,32]'."},
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Default: the model's own, and this repository's tokenizer/ from scratch."}
    )
    classifier_pooling: str | None = field(
        default=None,
        metadata={"help": "What a Linformer classifies by: its first token (cls) or the mean of all (mean)."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run modelling code that comes with a model of the Hub."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Compute activations again in the backward pass: less memory, slower."}
    )


@dataclass
class TrainingArguments:
    """How it is trained, and what is written."""

    output_dir: str = field(metadata={"help": "Where the model, its checkpoints and all_results.json go."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the model that is there and remove its checkpoints."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Longer texts are cut to so many tokens. Default: all that the model takes."}
    )
    pad_to_multiple_of: int | None = field(
        default=None, metadata={"help": "Pad batches to a multiple of this, e.g. 8 for tensor cores."}
    )
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Rows of one forward and backward pass."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Rows of one forward pass in evaluation."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Passes to one optimizer step."})
    group_by_length: bool = field(
        default=True, metadata={"help": "Put texts of about the same length into one batch: less padding, faster."}
    )
    learning_rate: float = field(default=5e-5, metadata={"help": "The highest learning rate of AdamW."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay, not applied to biases and norms."})
    num_train_epochs: int = field(default=3, metadata={"help": "Passes over the training set."})
    max_train_steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps in all; overrides --num_train_epochs."}
    )
    lr_scheduler_type: SchedulerType = field(
        default=SchedulerType.LINEAR, metadata={"help": "How the learning rate goes on after the warm-up."}
    )
    num_warmup_steps: float = field(
        default=0, metadata={"help": "Steps of rising learning rate; below 1, their share of all steps."}
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "Scale gradients down to this norm; 0 for never."})
    mixed_precision: str = field(
        default="no", metadata={"help": "Compute in bf16 or fp16 where it is safe.", "choices": ["no", "bf16", "fp16"]}
    )
    seed: int = field(default=42, metadata={"help": "Of new weights, order of rows, dropout and drawn splits."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})

    metric_name: str | None = field(
        default=None, metadata={"help": "One more metric: a name of scripts/metrics.py, a local path or a Hub name."}
    )
    metric_for_best_model: str | None = field(
        default=None, metadata={"help": "What chooses the model. Default: accuracy, or pearson in regression."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations in a row that are no better than the best."}
    )
    checkpointing_steps: str = field(
        default="epoch", metadata={"help": "A checkpoint is written each epoch, and every N steps too if this is N."}
    )
    save_total_limit: int = field(
        default=2, metadata={"help": "Keep so many of the newest checkpoints, and the best one."}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "A checkpoint's folder, or 'last' for the newest one of --output_dir, if any."}
    )
    with_tracking: bool = field(default=False, metadata={"help": "Log to the trackers of --report_to."})
    report_to: str = field(
        default="all", metadata={"help": "tensorboard, wandb, ... or all that are installed; needs --with_tracking."}
    )
    run_name: str = field(default="finetune", metadata={"help": "The run's name in trackers and --results_file."})
    results_file: str | None = field(default=None, metadata={"help": "Add one row of results to this CSV."})


# Arguments that a resumed run may change, since they do not change what is learnt.
FREE_ARGUMENTS = {"output_dir", "overwrite_output_dir", "resume_from_checkpoint", "checkpointing_steps"}
FREE_ARGUMENTS |= {"save_total_limit", "with_tracking", "report_to", "run_name", "results_file"}
FREE_ARGUMENTS |= {"preprocessing_num_workers"}


@dataclass
class Progress:
    """Where a run stands: all that a checkpoint keeps beside the states of model, optimizer and schedule."""

    step: int = 0
    epoch_loss: float = 0.0
    tokens: int = 0
    train_seconds: float = 0.0
    seconds: float = 0.0
    best_step: int | None = None
    best_value: float | None = None
    evaluations_since_best: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


# What a results file says of a Linformer.
DESCRIBED_KEYS = ("model_type", "projection_type", "projection_sharing", "projected_length", "local_window")


# Data and model


def load_model(
    arguments: ModelArguments, label_names: list[str] | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model with a head for these labels (None: regression), and its tokenizer."""
    name = arguments.model_name_or_path or arguments.config_name
    if name is None or (arguments.model_name_or_path and arguments.config_name):
        raise UserError("give either --model_name_or_path, to go on from a model, or --config_name, for a new one")
    trust = {"trust_remote_code": arguments.trust_remote_code}
    tokenizer_name = str(arguments.tokenizer_name or arguments.model_name_or_path or ROOT / "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_name, **trust)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot load the tokenizer {tokenizer_name}: {one_line(error)}") from error
    if not tokenizer.is_fast or tokenizer.pad_token is None:
        raise UserError(f"the tokenizer {tokenizer_name} must be a fast one with a padding token")

    changes = parse_overrides(arguments)
    if arguments.model_name_or_path is None:
        changes = {"pad_token_id": tokenizer.pad_token_id} | changes
    try:
        config, unknown = AutoConfig.from_pretrained(name, return_unused_kwargs=True, **trust, **changes)
        # Made anew, so that what must fit together is checked together.
        config = type(config)(**config.to_dict())
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise UserError(f"cannot use the configuration {name}: {one_line(error)}") from error
    if unknown := sorted(unknown.keys() & changes.keys()):
        raise UserError(f"the configuration {name} of a {config.model_type} model has no {unknown} to override")
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer_name} has {len(tokenizer)} entries, the model {name} only {config.vocab_size}; "
            "use the model's own tokenizer, or from scratch --config_overrides vocab_size=..."
        )
    has_other_head = config.num_labels != len(label_names or [""])
    if label_names is None:
        config.num_labels, config.problem_type = 1, "regression"
    else:
        config.problem_type = "single_label_classification"
        # A classifier that knows these labels keeps its order of them.
        if set(config.label2id) != set(label_names):
            config.id2label = dict(enumerate(label_names))
            config.label2id = {name: index for index, name in enumerate(label_names)}

    if arguments.model_name_or_path is None:
        model = AutoModelForSequenceClassification.from_config(config, **trust)
    else:
        try:
            model, report = AutoModelForSequenceClassification.from_pretrained(
                name,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                ignore_mismatched_sizes=has_other_head,
                output_loading_info=True,
                **trust,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"cannot load the model {name}, which may be incomplete: {one_line(error)}") from error
        # A new head is what fine-tuning is for; any other weight that is missing would silently be noise.
        encoder = f"{model.base_model_prefix}."
        if lost := [key for key in report["missing_keys"] if key.startswith(encoder) and ".pooler." not in key]:
            raise UserError(f"the model {name} is incomplete: {len(lost)} weights are missing, such as {lost[0]}")
    if arguments.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model, tokenizer


def parse_overrides(arguments: ModelArguments) -> dict[str, Any]:
    """`a=1,b=[2,3],c=word` as a dictionary; values are read as JSON where they are JSON."""
    changes: dict[str, Any] = {}
    for override in re.split(r",(?=\s*\w+=)", arguments.config_overrides or ""):
        name, equals, value = override.strip().partition("=")
        if override and not equals:
            raise UserError(f"--config_overrides takes key=value,key=value, not {override!r}")
        if equals:
            try:
                changes[name] = json.loads(value)
            except json.JSONDecodeError:
                changes[name] = {"True": True, "False": False, "None": None}.get(value, value)
    if arguments.classifier_pooling:
        changes["classifier_pooling"] = arguments.classifier_pooling
    return changes


def choose_max_length(arguments: TrainingArguments, model: PreTrainedModel) -> int:
    """`--max_length`, or all that the model can take."""
    limit = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from pad_token_id + 1.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limit = module.num_embeddings - module.padding_idx - 1
    max_length = arguments.max_length or limit
    if max_length is None:
        raise UserError(f"a {model.config.model_type} model sets no limit to the length; give --max_length")
    multiple = arguments.pad_to_multiple_of or 1
    if limit is not None and math.ceil(max_length / multiple) * multiple > limit:
        raise UserError(
            f"--max_length {max_length} (padded to a multiple of {multiple}) is more than the model can take: "
            f"{limit} tokens, of max_position_embeddings {model.config.max_position_embeddings}"
        )
    return max_length


def tokenize(
    splits: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    label_ids: list[int] | None,
    num_workers: int | None,
) -> DatasetDict:
    """Texts to `input_ids` of at most `max_length`; `length` and `is_cut` say what came of each."""

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = [batch[name] for name in ("text", "text_pair") if name in batch]
        encoded = tokenizer(*texts, truncation=True, max_length=max_length)
        return {
            **encoded,
            "labels": batch["label"] if label_ids is None else [label_ids[label] for label in batch["label"]],
            "length": [len(input_ids) for input_ids in encoded["input_ids"]],
            "is_cut": [bool(encoding.overflowing) for encoding in encoded.encodings],
        }

    columns = splits["train"].column_names
    return splits.map(encode, batched=True, remove_columns=columns, num_proc=num_workers, desc="Tokenizing")


def describe_data(
    splits: DatasetDict, tokenized: DatasetDict, max_length: int, accelerator: Accelerator
) -> dict[str, float]:
    """Warn of empty and of cut texts; return the share of cut texts of each split."""
    shares = {}
    for split, dataset in splits.items():
        columns = [dataset[name] for name in dataset.column_names if name != "label"]
        if empty := sum(not any(text.strip() for text in texts) for texts in zip(*columns)):
            accelerator.print(f"warning: {empty} of {len(dataset)} {split} texts are empty", file=sys.stderr)
        cut = sum(tokenized[split]["is_cut"])
        shares[split] = cut / len(dataset)
        if cut:
            accelerator.print(
                f"warning: {cut} of {len(dataset)} {split} texts ({shares[split]:.1%}) are longer than {max_length} "
                "tokens and were cut",
                file=sys.stderr,
            )
    return shares


def make_loaders(
    tokenized: DatasetDict, tokenizer: PreTrainedTokenizerBase, arguments: TrainingArguments, num_processes: int
) -> tuple[dict[str, DataLoader], torch.Generator]:
    """A loader for each split, and the generator that the order of the training rows is drawn from."""
    collate = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=arguments.pad_to_multiple_of)
    lengths = tokenized["train"]["length"]
    generator = torch.Generator()
    sampler = LengthGroupedSampler(
        arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * num_processes,
        lengths=list(lengths) if arguments.group_by_length else [0] * len(lengths),
        generator=generator,
    )
    train_set = tokenized["train"].remove_columns(["length", "is_cut"])
    loaders = {
        "train": DataLoader(train_set, arguments.per_device_train_batch_size, sampler=sampler, collate_fn=collate)
    }
    for split in tokenized.keys() - {"train"}:
        # Metrics do not mind the order, so rows of about one length are evaluated together.
        longest_first = np.argsort(tokenized[split]["length"][:])[::-1]
        rows = tokenized[split].select(longest_first).remove_columns(["length", "is_cut"])
        loaders[split] = DataLoader(rows, arguments.per_device_eval_batch_size, collate_fn=collate)
    return loaders, generator


# Training and evaluation


def optimizer_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[dict[str, torch.Tensor]],
    max_grad_norm: float,
) -> float:
    """One step down the gradient of the mean loss over all rows of the micro-batches of all processes; returns it.

    Each micro-batch counts by its rows, so that a step is the same however it is divided, short last batches included.
    """
    rows = [len(batch["labels"]) for batch in micro_batches]
    all_rows = accelerator.reduce(torch.tensor(sum(rows), device=accelerator.device), "sum").item()
    loss = torch.zeros((), device=accelerator.device)
    for index, batch in enumerate(micro_batches):
        is_last = index == len(micro_batches) - 1
        with nullcontext() if is_last else accelerator.no_sync(model):
            # The gradients of the processes are averaged, hence their number.
            part = model(**batch).loss * (rows[index] * accelerator.num_processes / all_rows)
            accelerator.backward(part)
        loss += part.detach()
    mean_loss = accelerator.reduce(loss, "mean").item()
    if not math.isfinite(mean_loss):
        raise UserError(f"the loss is {mean_loss}: training has diverged; lower --learning_rate or warm up longer")
    if max_grad_norm > 0:
        accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return mean_loss


@torch.no_grad()
def evaluate_model(
    accelerator: Accelerator, model: nn.Module, loader: DataLoader, compute_metrics: ComputeMetrics
) -> dict[str, float]:
    """Loss and metrics over a whole split."""
    is_regression = accelerator.unwrap_model(model).config.problem_type == "regression"
    model.eval()
    parts = []
    for batch in tqdm(loader, desc="Evaluating", leave=False, disable=not accelerator.is_main_process):
        labels = batch.pop("labels")
        logits = model(**batch).logits.float()
        parts.append([values.cpu() for values in accelerator.gather_for_metrics((logits, labels))])
    model.train()
    logits, labels = (torch.cat(values) for values in zip(*parts))
    if not logits.isfinite().all():
        raise UserError("the model's outputs are not finite: training has diverged; lower --learning_rate")
    if is_regression:
        predictions = logits.squeeze(-1)
        loss = nn.functional.mse_loss(predictions, labels)
    else:
        predictions = logits.argmax(-1)
        loss = nn.functional.cross_entropy(logits, labels)
    return {"loss": loss.item(), **compute_metrics(predictions.numpy(), labels.numpy())}


def make_optimizer(
    model: nn.Module, arguments: TrainingArguments, max_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW and the schedule of its learning rate."""
    # Biases and norms, the parameters that are vectors, do not decay.
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": arguments.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=arguments.learning_rate)
    warmup = arguments.num_warmup_steps
    warmup_steps = math.ceil(warmup * max_steps) if warmup < 1 else int(warmup)
    try:
        return optimizer, get_scheduler(arguments.lr_scheduler_type, optimizer, warmup_steps, max_steps)
    except (TypeError, ValueError) as error:
        name = SchedulerType(arguments.lr_scheduler_type).value
        raise UserError(f"cannot use --lr_scheduler_type {name}: {one_line(error)}") from error


def train(
    accelerator: Accelerator,
    model: nn.Module,
    loaders: dict[str, DataLoader],
    generator: torch.Generator,
    compute_metrics: ComputeMetrics,
    arguments: TrainingArguments,
    identity: dict[str, Any],
    checkpoint: Path | None,
) -> Progress:
    """Train, evaluate each epoch, keep checkpoints; afterwards `model` has the weights of the best evaluation."""
    train_loader, eval_loader = accelerator.prepare(loaders["train"], loaders["validation"])
    steps_per_epoch = math.ceil(len(train_loader) / arguments.gradient_accumulation_steps)
    max_steps = arguments.max_train_steps or arguments.num_train_epochs * steps_per_epoch
    wrapped, optimizer, scheduler = accelerator.prepare(model, *make_optimizer(model, arguments, max_steps))
    progress = Progress()
    if checkpoint is not None:
        progress = Progress(**load_checkpoint(accelerator, checkpoint, identity))
        accelerator.print(f"resumed from {checkpoint}")
    output_dir = Path(arguments.output_dir)
    best_metric = str(arguments.metric_for_best_model)
    patience = arguments.early_stopping_patience or math.inf
    save_every = None if arguments.checkpointing_steps == "epoch" else int(arguments.checkpointing_steps)
    started = time.perf_counter() - progress.seconds

    bar = tqdm(total=max_steps, initial=progress.step, desc="Training", disable=not accelerator.is_main_process)
    wrapped.train()
    while progress.step < max_steps and progress.evaluations_since_best < patience:
        epoch, done = divmod(progress.step, steps_per_epoch)
        # Rows are ordered by the seed and the epoch alone, dropout drawn by the seed and the step alone: a resumed run
        # draws what it would have drawn.
        generator.manual_seed(arguments.seed + epoch)
        batches = iter(skip_first_batches(train_loader, done * arguments.gradient_accumulation_steps))
        for _ in range(done, min(steps_per_epoch, max_steps - epoch * steps_per_epoch)):
            step_started = time.perf_counter()
            micro_batches = list(islice(batches, arguments.gradient_accumulation_steps))
            # After the rows are fetched, since a loader draws a number when it begins.
            seeds = np.random.SeedSequence((arguments.seed, progress.step, accelerator.process_index))
            set_seed(int(seeds.generate_state(1)[0]))
            loss = optimizer_step(accelerator, wrapped, optimizer, micro_batches, arguments.max_grad_norm)
            learning_rate = scheduler.get_last_lr()[0]
            scheduler.step()
            tokens = sum(batch["attention_mask"].sum() for batch in micro_batches)
            progress.tokens += int(accelerator.reduce(tokens, "sum"))
            progress.step += 1
            progress.epoch_loss += loss
            progress.train_seconds += time.perf_counter() - step_started
            accelerator.log({"loss": loss, "learning_rate": learning_rate}, step=progress.step)
            bar.set_postfix({"loss": f"{loss:.4f}", "tokens/s": f"{progress.tokens / progress.train_seconds:,.0f}"})
            bar.update()
            progress.seconds = time.perf_counter() - started
            if save_every and progress.step % save_every == 0 and progress.step % steps_per_epoch:
                save_checkpoint(accelerator, output_dir, asdict(progress), identity, arguments.save_total_limit)

        values = evaluate_model(accelerator, wrapped, eval_loader, compute_metrics)
        value, best = values[best_metric], progress.best_value
        sign = -1 if best_metric in LOWER_IS_BETTER else 1
        progress.evaluations_since_best += 1
        if best is None or math.isnan(best) or sign * value > sign * best:
            progress.best_step, progress.best_value, progress.evaluations_since_best = progress.step, value, 0
        steps = progress.step - epoch * steps_per_epoch
        row = {"epoch": epoch + 1, "step": progress.step, "train_loss": progress.epoch_loss / steps}
        progress.history.append({**row, **{f"eval_{name}": value for name, value in values.items()}})
        progress.epoch_loss = 0.0
        progress.seconds = time.perf_counter() - started
        accelerator.log(progress.history[-1], step=progress.step)
        if accelerator.is_main_process:
            bar.write(f"epoch {epoch + 1}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
        save_checkpoint(accelerator, output_dir, asdict(progress), identity, arguments.save_total_limit)
    bar.close()

    if progress.best_step != progress.step:
        best_checkpoint = output_dir / f"checkpoint-{progress.best_step}"
        if not is_intact(best_checkpoint):
            raise UserError(f"{best_checkpoint}, the best one, is damaged: resume from one before it, or begin again")
        load_weights(model, best_checkpoint / "model.safetensors")
    return progress


# Results


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output_dir: Path) -> None:
    """Save model, code and tokenizer to a folder beside, then move the files into place."""
    aside = output_dir / ".model.partial"
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    for path in aside.iterdir():
        path.replace(output_dir / path.name)
    aside.rmdir()


def check_arguments(arguments: TrainingArguments) -> None:
    """Refuse numbers that cannot be meant."""
    counts = ["per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "max_length"]
    counts += ["num_train_epochs", "max_train_steps", "save_total_limit", "early_stopping_patience"]
    for name in [*counts, "pad_to_multiple_of", "preprocessing_num_workers"]:
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(arguments, name)}")
    steps = arguments.checkpointing_steps
    if steps != "epoch" and not (steps.isdecimal() and int(steps)):
        raise UserError(f"--checkpointing_steps must be 'epoch' or a number of steps, not {steps!r}")


def main(argv: Sequence[str] | None = None) -> None:
    data_arguments, model_arguments, arguments = parse_arguments(
        (DataArguments, ModelArguments, TrainingArguments), argv, description=__doc__
    )
    check_arguments(arguments)
    output_dir = Path(arguments.output_dir)
    checkpoint = find_checkpoint(output_dir, arguments.resume_from_checkpoint, arguments.overwrite_output_dir)
    try:
        accelerator = Accelerator(
            mixed_precision=arguments.mixed_precision,
            log_with=arguments.report_to if arguments.with_tracking else None,
            project_dir=arguments.output_dir,
            step_scheduler_with_optimizer=False,
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"cannot use --mixed_precision or --report_to: {one_line(error)}") from error
    set_seed(arguments.seed)

    with accelerator.main_process_first():
        examples, label_names = load_examples(data_arguments, arguments.seed)
    num_labels = None if label_names is None else len(label_names)
    compute_metrics = choose_metrics(num_labels, arguments.metric_name)
    known = [*compute_metrics(np.array([0, 1]), np.array([0, 1])), "loss"]
    arguments.metric_for_best_model = arguments.metric_for_best_model or ("accuracy" if num_labels else "pearson")
    if arguments.metric_for_best_model not in known:
        raise UserError(f"--metric_for_best_model {arguments.metric_for_best_model} is not one of {known}")

    model, tokenizer = load_model(model_arguments, label_names)
    max_length = choose_max_length(arguments, model)
    label2id: dict[str, int] = model.config.label2id  # type: ignore[assignment]
    label_ids = None if label_names is None else [label2id[name] for name in label_names]
    with accelerator.main_process_first():
        tokenized = tokenize(examples, tokenizer, max_length, label_ids, arguments.preprocessing_num_workers)
    cut_shares = describe_data(examples, tokenized, max_length, accelerator)
    loaders, generator = make_loaders(tokenized, tokenizer, arguments, accelerator.num_processes)

    all_arguments = {**asdict(data_arguments), **asdict(model_arguments), **asdict(arguments)}
    identity = {name: value for name, value in all_arguments.items() if name not in FREE_ARGUMENTS}
    identity |= {"processes": accelerator.num_processes, "training tokens": sum(tokenized["train"]["length"])}
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        if checkpoint is None:
            (output_dir / "all_results.json").unlink(missing_ok=True)
            for old in list_checkpoints(output_dir).values():
                shutil.rmtree(old)
    if arguments.with_tracking:
        accelerator.init_trackers(arguments.run_name, config={name: str(value) for name, value in identity.items()})
    progress = train(accelerator, model, loaders, generator, compute_metrics, arguments, identity, checkpoint)

    best = next(row for row in progress.history if row["step"] == progress.best_step)
    results = {"best_epoch": best["epoch"], **{name: best[name] for name in best if name.startswith("eval_")}}
    if num_labels:
        majority = Counter(examples["train"]["label"]).most_common(1)[0][0]
        labels = list(examples["validation"]["label"])
        results["majority_accuracy"] = labels.count(majority) / len(labels)
    if "test" in loaders:
        loader = accelerator.prepare(loaders["test"])
        values = evaluate_model(accelerator, model, loader, compute_metrics)
        results |= {f"test_{name}": value for name, value in values.items()}
    results |= {f"cut_share_{split}": share for split, share in cut_shares.items()}
    results |= {"parameters": model.num_parameters(), "seconds": progress.seconds}
    results["tokens_per_second"] = progress.tokens / progress.train_seconds
    if accelerator.is_main_process:
        # Texts are cut where they were cut in training wherever the model is used.
        tokenizer.model_max_length = max_length
        save_model(model, tokenizer, output_dir)
        write_json(output_dir / "training_args.json", all_arguments)
        finished = output_dir / "all_results.json"
        if arguments.results_file and not finished.exists():
            row = {
                "run_name": arguments.run_name,
                "model": model_arguments.model_name_or_path or model_arguments.config_name,
                "data": data_arguments.dataset_name or " ".join(data_arguments.train_file or []),
                "dataset_config": data_arguments.dataset_config_name,
                **{name: getattr(model.config, name, None) for name in DESCRIBED_KEYS},
                "max_length": max_length,
                "epochs": progress.history[-1]["epoch"],
                **results,
            }
            append_result(arguments.results_file, row, arguments.seed, argv)
        write_json(finished, {**results, "history": progress.history})
        print(format_table(progress.history))
        print(format_table([{"result": name, "value": value} for name, value in results.items()]))
        print(f"the model of epoch {best['epoch']} is in {output_dir}")
    accelerator.end_training()


if __name__ == "__main__":
    run_main(main)
