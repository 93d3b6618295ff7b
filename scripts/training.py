"""The training loop that the scripts share: options, optimizer, steps, evaluations, checkpoints, exact resume."""

import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, skip_first_batches
from safetensors.torch import load_model as load_weights
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, SchedulerType, get_scheduler, set_seed
from transformers.trainer_pt_utils import LengthGroupedSampler

from checkpointing import find_checkpoint, is_intact, list_checkpoints, load_checkpoint, save_checkpoint
from common import UserError, one_line
from metrics import LOWER_IS_BETTER


# The mean loss over the rows of a batch, with the gradient of the model.
ComputeLoss = Callable[[nn.Module, dict[str, Tensor]], Tensor]


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

    metric_for_best_model: str | None = field(
        default=None, metadata={"help": "What chooses the model, of what an evaluation prints. Default: by script."}
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
    run_name: str = field(default="run", metadata={"help": "The run's name in trackers and --results_file."})
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


def start_accelerator(arguments: TrainingArguments) -> tuple[Accelerator, Path | None]:
    """The accelerator, and the checkpoint to go on from. Raises `UserError` for what cannot be begun."""
    check_arguments(arguments)
    checkpoint = find_checkpoint(
        Path(arguments.output_dir), arguments.resume_from_checkpoint, arguments.overwrite_output_dir
    )
    try:
        accelerator = Accelerator(
            mixed_precision=arguments.mixed_precision,
            log_with=arguments.report_to if arguments.with_tracking else None,
            project_dir=arguments.output_dir,
            step_scheduler_with_optimizer=False,
            # A head that is not taught, and a projection that short rows do not meet, get no gradient.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"cannot use --mixed_precision or --report_to: {one_line(error)}") from error
    set_seed(arguments.seed)
    return accelerator, checkpoint


def prepare_output_dir(
    accelerator: Accelerator, arguments: TrainingArguments, identity: dict[str, Any], checkpoint: Path | None
) -> None:
    """Make the folder, remove what an earlier run left in it unless this one goes on with it, start the trackers."""
    output_dir = Path(arguments.output_dir)
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        if checkpoint is None:
            (output_dir / "all_results.json").unlink(missing_ok=True)
            for old in list_checkpoints(output_dir).values():
                shutil.rmtree(old)
    if arguments.with_tracking:
        accelerator.init_trackers(arguments.run_name, config={name: str(value) for name, value in identity.items()})


def grouped_by_length(
    lengths: Sequence[int], arguments: TrainingArguments, num_processes: int
) -> tuple[LengthGroupedSampler, torch.Generator]:
    """Draws rows of about one length for a step, or any with --group_by_length false; with its generator."""
    generator = torch.Generator()
    rows_of_a_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * num_processes
    lengths = list(lengths) if arguments.group_by_length else [0] * len(lengths)
    return LengthGroupedSampler(rows_of_a_step, lengths=lengths, generator=generator), generator


def optimizer_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    compute_loss: ComputeLoss,
    micro_batches: Sequence[dict[str, torch.Tensor]],
    max_grad_norm: float,
) -> float:
    """One step down the gradient of the mean loss over all rows of the micro-batches of all processes; returns it.

    Each micro-batch counts by its rows, so that a step is the same however it is divided, short last batches included.
    """
    rows = [len(batch["input_ids"]) for batch in micro_batches]
    all_rows = accelerator.reduce(torch.tensor(sum(rows), device=accelerator.device), "sum").item()
    loss = torch.zeros((), device=accelerator.device)
    for index, batch in enumerate(micro_batches):
        is_last = index == len(micro_batches) - 1
        with nullcontext() if is_last else accelerator.no_sync(model):
            # The gradients of the processes are averaged, hence their number.
            part = compute_loss(model, batch) * (rows[index] * accelerator.num_processes / all_rows)
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
    loader: DataLoader,
    generator: torch.Generator,
    compute_loss: ComputeLoss,
    evaluate: Callable[[nn.Module], dict[str, float]],
    arguments: TrainingArguments,
    identity: dict[str, Any],
    checkpoint: Path | None,
) -> Progress:
    """Train, evaluate each epoch, keep checkpoints; afterwards `model` has the weights of the best evaluation.

    generator: that of the loader's sampler, which is seeded for each epoch
    evaluate: takes the model as accelerate has wrapped it, in training mode, and leaves it so
    """
    train_loader = accelerator.prepare(loader)
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
            loss = optimizer_step(
                accelerator, wrapped, optimizer, compute_loss, micro_batches, arguments.max_grad_norm
            )
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

        values = evaluate(wrapped)
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


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output_dir: Path) -> None:
    """Save model, code and tokenizer to a folder beside, then move the files into place."""
    aside = output_dir / ".model.partial"
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    for path in aside.iterdir():
        path.replace(output_dir / path.name)
    aside.rmdir()
