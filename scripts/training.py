"""The training loop that the scripts share: options, optimizer, steps, evaluations, checkpoints, exact resume."""

import ctypes
import json
import math
import re
import shutil
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, skip_first_batches
from accelerate.utils import DistributedType, InitProcessGroupKwargs, gather_object
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, SchedulerType, get_scheduler, set_seed
from transformers.trainer_pt_utils import LengthGroupedSampler

from checkpointing import find_checkpoint, is_intact, list_checkpoints, load_checkpoint, save_checkpoint
from common import UserError, one_line, write_aside
from metrics import LOWER_IS_BETTER


Batch = dict[str, Tensor]
# The mean loss of a batch, with the gradient of the model.
ComputeLoss = Callable[[nn.Module, Batch], Tensor]
# Of what it is the mean: so many rows, or so many labels.
CountOf = Callable[[Batch], int]


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
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Rows of one forward and backward pass."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Rows of one forward pass in evaluation."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Passes to one optimizer step."})
    optim: str = field(
        default="adamw",
        metadata={
            "help": "Or Muon for the matrices of the layers, with AdamW for all else.",
            "choices": ["adamw", "muon"],
        },
    )
    learning_rate: float = field(default=5e-5, metadata={"help": "The highest learning rate."})
    layerwise_lr_decay: float = field(
        default=1.0,
        metadata={
            "help": "Each layer learns at so much of the rate of the one above it, the embeddings at the least."
        },
    )
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay, not applied to biases and norms."})
    adam_beta1: float = field(default=0.9, metadata={"help": "Decay of AdamW's mean of gradients."})
    adam_beta2: float = field(default=0.999, metadata={"help": "Decay of AdamW's mean of their squares."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "What AdamW adds to the root of that."})
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
    mixed_precision: str | None = field(
        default=None,
        metadata={
            "help": "Compute in bf16 or fp16 where it is safe. Default: as `accelerate launch` says, else no.",
            "choices": ["no", "bf16", "fp16"],
        },
    )
    seed: int = field(default=42, metadata={"help": "Of new weights, order of rows, dropout and drawn splits."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})

    metric_for_best_model: str | None = field(
        default=None, metadata={"help": "What chooses the model, of what an evaluation prints. Default: by script."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations in a row that are no better than the best."}
    )
    eval_steps: int | None = field(
        default=None, metadata={"help": "Evaluate every so many optimizer steps. Default: each epoch."}
    )
    logging_steps: int = field(
        default=10, metadata={"help": "log.jsonl and trackers get a line, with the mean loss, every so many steps."}
    )
    checkpointing_steps: str = field(
        default="epoch",
        metadata={"help": "A checkpoint is written at evaluations, and every N steps too if this is N."},
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
    results_file: str | None = field(default=None, metadata={"help": "Add the results to this CSV."})


@dataclass
class RowTrainingArguments(TrainingArguments):
    """The same for rows of different lengths."""

    pad_to_multiple_of: int | None = field(
        default=None, metadata={"help": "Pad batches to a multiple of this, e.g. 8 for tensor cores."}
    )
    group_by_length: bool = field(
        default=True, metadata={"help": "Put texts of about the same length into one batch: less padding, faster."}
    )


# Arguments that a resumed run may change, since they do not change what is learnt.
FREE_ARGUMENTS = {"output_dir", "overwrite_output_dir", "resume_from_checkpoint", "checkpointing_steps"}
FREE_ARGUMENTS |= {"save_total_limit", "with_tracking", "report_to", "run_name", "results_file"}
FREE_ARGUMENTS |= {"preprocessing_num_workers", "dataloader_num_workers"}


@dataclass
class Progress:
    """Where a run stands: all that a checkpoint keeps beside the states of model, optimizer and schedule."""

    step: int = 0
    # Sums of losses since the last evaluation and the last line of the log.
    loss_since_evaluation: float = 0.0
    loss_since_log: float = 0.0
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
    counts += ["eval_steps", "logging_steps"]
    for name in [*counts, "pad_to_multiple_of", "preprocessing_num_workers"]:
        if getattr(arguments, name, None) is not None and getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(arguments, name)}")
    if not 0 <= arguments.seed < 2**32:
        raise UserError(f"--seed must lie between 0 and {2**32 - 1}, and is {arguments.seed}")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be at least 0 and below 1, and is {getattr(arguments, name)}")
    if not 0 < arguments.layerwise_lr_decay <= 1:
        raise UserError(f"--layerwise_lr_decay must be above 0 and at most 1, and is {arguments.layerwise_lr_decay}")
    steps = arguments.checkpointing_steps
    if steps != "epoch" and not (steps.isdecimal() and int(steps)):
        raise UserError(f"--checkpointing_steps must be 'epoch' or a number of steps, not {steps!r}")


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, for the next step; does nothing where it is not glibc.

    On a CPU every large tensor is otherwise fetched from the system and cleared anew: training a small model spends
    half of its time there. The process keeps the most that it ever needed.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(library, "gnu_get_libc_version"):
        return
    assert library is not None
    # M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD of <malloc.h>: no mappings of their own for large blocks, never give
    # back, grow by 256 MiB at a time.
    for option, value in ((-4, 0), (-1, -1), (-2, 2**28)):
        library.mallopt(option, value)


def start_accelerator(arguments: TrainingArguments, compiled: bool = False) -> tuple[Accelerator, Path | None]:
    """The accelerator, which compiles models if it is to, and the checkpoint to go on from.

    Raises `UserError` for what cannot be begun.
    """
    check_arguments(arguments)
    checkpoint = find_checkpoint(
        Path(arguments.output_dir), arguments.resume_from_checkpoint, arguments.overwrite_output_dir
    )
    try:
        accelerator = Accelerator(
            mixed_precision=arguments.mixed_precision,
            dynamo_backend="inductor" if compiled else None,
            log_with=arguments.report_to if arguments.with_tracking else None,
            project_dir=arguments.output_dir,
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[
                # A head that is not taught, and a projection that short rows do not meet, get no gradient.
                DistributedDataParallelKwargs(find_unused_parameters=True),
                # The others wait as the first process tokenizes.
                InitProcessGroupKwargs(timeout=timedelta(hours=6)),
            ],
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"cannot use --mixed_precision or --report_to: {one_line(error)}") from error
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise UserError("DeepSpeed is not supported; configs/accelerate/fsdp.yaml divides a model as it does")
    found = gather_object([str(checkpoint)])
    if len(set(found)) > 1:
        raise UserError(f"the processes see different checkpoints, {found}: all need the same --output_dir")
    set_seed(arguments.seed)
    return accelerator, checkpoint


def identity_of(accelerator: Accelerator, all_arguments: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for a run to go on: its arguments but for the free ones, and where it runs."""
    identity = {name: value for name, value in all_arguments.items() if name not in FREE_ARGUMENTS}
    identity["mixed_precision"] = accelerator.mixed_precision
    return identity | {"processes": accelerator.num_processes, "distributed": accelerator.distributed_type.value}


def prepare_output_dir(
    accelerator: Accelerator, arguments: TrainingArguments, identity: dict[str, Any], checkpoint: Path | None
) -> None:
    """Make the folder, remove what an earlier run left in it unless this one goes on with it, start the trackers."""
    output_dir = Path(arguments.output_dir)
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        if checkpoint is None:
            for name in ("all_results.json", "log.jsonl"):
                (output_dir / name).unlink(missing_ok=True)
            for old in list_checkpoints(output_dir).values():
                shutil.rmtree(old)
    if arguments.with_tracking:
        accelerator.init_trackers(arguments.run_name, config={name: str(value) for name, value in identity.items()})


def grouped_by_length(
    lengths: Sequence[int], arguments: RowTrainingArguments, num_processes: int
) -> tuple[LengthGroupedSampler, torch.Generator]:
    """Draws rows of about one length for a step, or any with --group_by_length false; with its generator."""
    generator = torch.Generator()
    rows_of_a_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * num_processes
    lengths = list(lengths) if arguments.group_by_length else [0] * len(lengths)
    return LengthGroupedSampler(rows_of_a_step, lengths=lengths, generator=generator), generator


class TrainingData(Protocol):
    """Where batches come from, so that those from any point on can be had again."""

    # None: there is no end to them.
    batches_per_epoch: int | None

    def batches(self, epoch: int, skipped: int) -> Iterator[Batch]:
        """Those of an epoch, from its `skipped`-th on."""

    def state_dict(self) -> dict[str, Any]:
        """What this process has to know, beside the number of batches, to go on; JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""

    def names_of(self, batch: Batch) -> list[str]:
        """What a person would call what a batch holds."""


class Rows:
    """Rows of a data set whose number is known, in an order that is drawn for each epoch."""

    def __init__(self, accelerator: Accelerator, loader: DataLoader, generator: torch.Generator, seed: int):
        """generator: that of the loader's sampler"""
        self.loader, self.generator, self.seed = accelerator.prepare(loader), generator, seed
        self.batches_per_epoch: int | None = len(self.loader)

    def batches(self, epoch: int, skipped: int) -> Iterator[Batch]:
        """In an order drawn by the seed and the epoch alone."""
        self.generator.manual_seed(self.seed + epoch)
        return iter(skip_first_batches(self.loader, skipped))

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the order is drawn again."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do."""

    def names_of(self, batch: Batch) -> list[str]:
        """They have no names."""
        return []


class NotFinite(Exception):
    """A loss or gradient that is no number; the weights are as they were before."""


def optimizer_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    compute_loss: ComputeLoss,
    micro_batches: Sequence[Batch],
    max_grad_norm: float,
    count_of: CountOf = lambda batch: len(batch["input_ids"]),
) -> tuple[float, float]:
    """One step down the gradient of the mean loss over the micro-batches of all processes.

    Each micro-batch counts by `count_of`, by default its rows, so that a step is the same however its rows are
    divided, also into unequal parts. Returns the loss and the norm of its gradient. Raises `NotFinite` before
    anything changes.
    """
    counts = [count_of(batch) for batch in micro_batches]
    count = accelerator.reduce(torch.tensor(sum(counts), device=accelerator.device), "sum").item()
    loss = torch.zeros((), device=accelerator.device)
    for index, batch in enumerate(micro_batches):
        is_last = index == len(micro_batches) - 1
        with nullcontext() if is_last else accelerator.no_sync(model):
            # The gradients of the processes are averaged, hence their number.
            part = compute_loss(model, batch) * (counts[index] * accelerator.num_processes / max(count, 1))
            accelerator.backward(part)
        loss += part.detach()
    mean_loss = accelerator.reduce(loss, "mean").item()
    norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm if max_grad_norm > 0 else math.inf)
    # Of sharded weights each process has a part.
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    # A scaler expects gradients that overflow: it leaves the step out and scales less.
    if not math.isfinite(mean_loss) or not (math.isfinite(norm) or accelerator.scaler is not None):
        raise NotFinite(f"the loss is {mean_loss} and the norm of its gradient {norm}")
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return mean_loss, norm


LAYER = re.compile(r"\blayers?\.(\d+)\.")


def height_of(name: str, prefix: str, num_layers: int) -> int:
    """Where a parameter stands: 0 for embeddings and what all layers share, 1 ... L for a layer, L + 1 for a head.

    prefix: of the encoder's parameters, `base_model_prefix`
    """
    if layer := LAYER.search(name):
        return int(layer[1]) + 1
    is_below = name.startswith(f"{prefix}.") and any(part in name for part in ("embed", "projection"))
    return 0 if is_below else num_layers + 1


def make_optimizers(
    model: PreTrainedModel, arguments: TrainingArguments, max_steps: int
) -> tuple[list[torch.optim.Optimizer], list[torch.optim.lr_scheduler.LRScheduler]]:
    """AdamW, or Muon for the matrices of the layers and AdamW for all else; each with its schedule."""
    top = getattr(model.config, "num_hidden_layers", 0) + 1
    matrices: set[Tensor] = set()
    if arguments.optim == "muon":
        linear = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        matrices = {module.weight for name, module in linear.items() if LAYER.search(name)}
        if not matrices:
            raise UserError(f"--optim muon finds no linear layers in the layers of a {model.config.model_type} model")
    groups: dict[tuple[bool, float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        below = top - height_of(name, model.base_model_prefix, top - 1)
        learning_rate = arguments.learning_rate * arguments.layerwise_lr_decay**below
        # Biases and norms do not decay: the parameters that are vectors, and the bias of each offset.
        decays = parameter.ndim >= 2 and "position_bias" not in name
        group = {"params": [], "lr": learning_rate, "weight_decay": arguments.weight_decay if decays else 0.0}
        where = (parameter in matrices, learning_rate, decays)
        groups.setdefault(where, group)["params"].append(parameter)
    by_adamw = [group for (is_muon, _, _), group in groups.items() if not is_muon]
    by_muon = [group for (is_muon, _, _), group in groups.items() if is_muon]
    betas = (arguments.adam_beta1, arguments.adam_beta2)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(by_adamw, lr=arguments.learning_rate, betas=betas, eps=arguments.adam_epsilon)
    ]
    if by_muon:
        # Updates as large as AdamW's, so that one learning rate suits both.
        optimizers.append(torch.optim.Muon(by_muon, lr=arguments.learning_rate, adjust_lr_fn="match_rms_adamw"))
    warmup = arguments.num_warmup_steps
    warmup_steps = math.ceil(warmup * max_steps) if warmup < 1 else int(warmup)
    try:
        kind = arguments.lr_scheduler_type
        return optimizers, [get_scheduler(kind, optimizer, warmup_steps, max_steps) for optimizer in optimizers]
    except (TypeError, ValueError) as error:
        name = SchedulerType(arguments.lr_scheduler_type).value
        raise UserError(f"cannot use --lr_scheduler_type {name}: {one_line(error)}") from error


class Interruption(AbstractContextManager):
    """Notes SIGTERM or Ctrl-C, so that a run can end its step and keep what it has; a second Ctrl-C ends it at once.

    SIGTERM often comes twice: from who manages the job, and from torchrun, which passes its own on and kills its
    processes 30 seconds later.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        # Python takes signals in its first thread only.
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if number == signal.SIGINT:
            self.restore()

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __exit__(self, *details: object) -> None:
        self.restore()


def cannot_write(path: Path, error: BaseException) -> str:
    return (
        f"cannot write {path}: {one_line(error)}; the checkpoints are good: make room, then go on with "
        "--resume_from_checkpoint last"
    )


class Log:
    """`log.jsonl`: what was learnt when, without times, so that a resumed run writes the same; and the trackers."""

    def __init__(self, accelerator: Accelerator, path: Path, step: int):
        """step: lines after it are of a run that went on after the checkpoint, and are written again"""
        self.accelerator, self.path = accelerator, path
        if accelerator.is_main_process:
            lines = path.read_text().splitlines() if step and path.exists() else []
            # The last line may be half a line.
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            try:
                with write_aside(path) as aside:
                    aside.write_text("".join(f"{line}\n" for line in kept))
            except OSError as error:
                raise UserError(cannot_write(path, error)) from error

    def write(self, step: int, values: dict[str, float]) -> None:
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            # JSON has no infinity, which the norm of gradients may be that a scaler made overflow.
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            try:
                with self.path.open("a") as file:
                    file.write(json.dumps({"step": step} | finite) + "\n")
            except OSError as error:
                raise UserError(cannot_write(self.path, error)) from error


def steps_from(
    data: TrainingData, step: int, max_steps: int, steps_per_epoch: int, accumulation: int
) -> Iterator[list[Batch]]:
    """The micro-batches of each step after `step`."""
    while step < max_steps:
        epoch, done = divmod(step, steps_per_epoch)
        batches = data.batches(epoch, done * accumulation)
        end = min((epoch + 1) * steps_per_epoch, max_steps)
        for _ in range(step, end):
            yield list(islice(batches, accumulation))
        step = end


def train(
    accelerator: Accelerator,
    model: PreTrainedModel,
    data: TrainingData,
    compute_loss: ComputeLoss,
    evaluate: Callable[[nn.Module], dict[str, float]],
    arguments: TrainingArguments,
    identity: dict[str, Any],
    checkpoint: Path | None,
    count_of: CountOf = lambda batch: len(batch["input_ids"]),
    peak_tokens_per_second: float | None = None,
) -> tuple[Progress, nn.Module]:
    """Train, evaluate each epoch or every `eval_steps`, keep checkpoints.

    evaluate: takes the model as accelerate has wrapped it, in training mode, and leaves it so
    count_of: what of a batch `compute_loss` is the mean of
    peak_tokens_per_second: what the machine would do if it did nothing but multiply, to show how near it comes

    Returns where the run stands, and the wrapped model with the weights of the best evaluation. On SIGTERM and SIGINT
    a checkpoint is written, and the process exits with 128 and the signal's number.
    """
    accumulation = arguments.gradient_accumulation_steps
    if data.batches_per_epoch is None:
        assert arguments.max_train_steps is not None
        steps_per_epoch = max_steps = arguments.max_train_steps
    else:
        steps_per_epoch = math.ceil(data.batches_per_epoch / accumulation)
        max_steps = arguments.max_train_steps or arguments.num_train_epochs * steps_per_epoch
    if accelerator.is_fsdp2:
        # Embeddings that are tied to a decoder cannot be divided apart from it.
        layers = [name for name in model._no_split_modules or [] if not name.endswith("Embeddings")]
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = layers
    if arguments.optim == "muon" and (accelerator.is_fsdp2 or accelerator.scaler is not None):
        raise UserError("--optim muon needs whole matrices and gradients as they are: neither FSDP nor fp16")
    optimizers, schedulers = make_optimizers(model, arguments, max_steps)
    wrapped, *prepared = accelerator.prepare(model, *optimizers, *schedulers)
    optimizers, schedulers = prepared[: len(optimizers)], prepared[len(optimizers) :]
    progress = Progress()
    if checkpoint is not None:
        defaults = {option.name: option.default for option in fields(arguments)}
        loaded, data_state = load_checkpoint(accelerator, checkpoint, identity, defaults)
        progress = Progress(**loaded)
        data.load_state_dict(data_state)
        accelerator.print(f"resumed from {checkpoint}")
    output_dir = Path(arguments.output_dir)
    best_metric = str(arguments.metric_for_best_model)
    patience = arguments.early_stopping_patience or math.inf
    eval_every = arguments.eval_steps or steps_per_epoch
    save_every = math.inf if arguments.checkpointing_steps == "epoch" else int(arguments.checkpointing_steps)
    started = time.perf_counter() - progress.seconds
    log = Log(accelerator, output_dir / "log.jsonl", progress.step)
    durations: deque[float] = deque(maxlen=500)

    def save() -> None:
        progress.seconds = time.perf_counter() - started
        kept = asdict(progress), data.state_dict(), identity
        save_checkpoint(accelerator, output_dir, *kept, arguments.save_total_limit)

    bar = tqdm(total=max_steps, initial=progress.step, desc="Training", disable=not accelerator.is_main_process)
    wrapped.train()
    steps = steps_from(data, progress.step, max_steps, steps_per_epoch, accumulation)
    with Interruption() as interruption:
        while progress.step < max_steps and progress.evaluations_since_best < patience:
            step_started = time.perf_counter()
            micro_batches = next(steps)
            # Dropout is drawn by the seed and the step alone: a resumed run draws what it would have drawn. After the
            # rows are fetched, since a loader draws a number when it begins.
            seeds = np.random.SeedSequence((arguments.seed, progress.step, accelerator.process_index))
            set_seed(int(seeds.generate_state(1)[0]))
            try:
                loss, norm = optimizer_step(
                    *(accelerator, wrapped, optimizers, compute_loss, micro_batches, arguments.max_grad_norm, count_of)
                )
            except NotFinite as error:
                names = gather_object([name for batch in micro_batches for name in data.names_of(batch)])
                where = f", on {', '.join(names)}" if names else ""
                last = max(list_checkpoints(output_dir).values(), key=lambda path: path.stat().st_mtime, default=None)
                way_on = f"the loss was still finite at the last checkpoint, {last}; " if last else ""
                raise UserError(
                    f"{error} at step {progress.step + 1}{where}: training has diverged, or these rows are amiss; "
                    f"{way_on}lower --learning_rate, or warm up longer"
                ) from error
            learning_rate = schedulers[0].get_last_lr()[0]
            for scheduler in schedulers:
                scheduler.step()
            tokens = torch.stack([batch["attention_mask"].sum() for batch in micro_batches]).sum()
            # Whoever gets a signal, all processes stop after the same step.
            sums = torch.stack([tokens, torch.tensor(interruption.signal, device=tokens.device)])
            tokens, stopped = accelerator.reduce(sums, "sum").tolist()
            progress.tokens += tokens
            progress.step += 1
            progress.loss_since_evaluation += loss
            progress.loss_since_log += loss
            durations.append(time.perf_counter() - step_started)
            progress.train_seconds += durations[-1]
            tokens_per_second = tokens / statistics.median(durations)
            shown = {"loss": f"{loss:.4f}", "tokens/s": f"{tokens_per_second:,.0f}"}
            if peak_tokens_per_second is not None:
                shown["MFU"] = f"{tokens_per_second / peak_tokens_per_second:.0%}"
            bar.set_postfix(shown)
            bar.update()
            if progress.step % arguments.logging_steps == 0:
                mean_loss, progress.loss_since_log = progress.loss_since_log / arguments.logging_steps, 0.0
                values = {"loss": mean_loss, "learning_rate": learning_rate, "grad_norm": norm}
                log.write(progress.step, values | {"tokens": progress.tokens})

            if progress.step % eval_every == 0 or progress.step == max_steps:
                evaluated = evaluate(wrapped)
                value, best = evaluated[best_metric], progress.best_value
                sign = -1 if best_metric in LOWER_IS_BETTER else 1
                progress.evaluations_since_best += 1
                if best is None or math.isnan(best) or sign * value > sign * best:
                    progress.best_step, progress.best_value, progress.evaluations_since_best = progress.step, value, 0
                epoch, rest = divmod(progress.step, steps_per_epoch)
                since = (progress.step - 1) % eval_every + 1
                row = {
                    "epoch": epoch if rest == 0 else round(progress.step / steps_per_epoch, 3),
                    "step": progress.step,
                    "train_loss": progress.loss_since_evaluation / since,
                    **{f"eval_{name}": value for name, value in evaluated.items()},
                }
                progress.history.append(row)
                progress.loss_since_evaluation = 0.0
                log.write(progress.step, row)
                if accelerator.is_main_process:
                    when = f"epoch {row['epoch']}" if arguments.eval_steps is None else f"step {progress.step}"
                    bar.write(f"{when}: " + ", ".join(f"{name} {value:.4f}" for name, value in evaluated.items()))
                save()
            elif progress.step % save_every == 0 or stopped:
                save()
            if stopped and progress.step < max_steps:
                bar.close()
                accelerator.print(
                    f"stopped by a signal after step {progress.step}; --resume_from_checkpoint last goes on"
                )
                accelerator.end_training()
                raise SystemExit(128 + (interruption.signal or signal.SIGTERM))
    bar.close()

    if progress.best_step != progress.step:
        best_checkpoint = output_dir / f"checkpoint-{progress.best_step}"
        if not is_intact(best_checkpoint):
            raise UserError(f"{best_checkpoint}, the best one, is damaged: resume from one before it, or begin again")
        accelerator.load_state(str(best_checkpoint))
    return progress, wrapped


def save_model(
    accelerator: Accelerator, wrapped: nn.Module, tokenizer: PreTrainedTokenizerBase, output_dir: Path
) -> None:
    """Save model, code and tokenizer to a folder beside, then move the files into place. All processes call it."""
    weights = accelerator.get_state_dict(wrapped)
    if not accelerator.is_main_process:
        return
    model = accelerator.unwrap_model(wrapped, keep_torch_compile=False)
    if accelerator.is_fsdp2:
        # It has a class of its own and weights in parts: they are put together in a model as new.
        model_class = next(kind for kind in type(model).__mro__ if not kind.__module__.startswith("torch."))
        assert issubclass(model_class, PreTrainedModel)
        with torch.device("meta"):
            model = model_class(model.config)
        model.load_state_dict(weights, assign=True)
        model.tie_weights()
    aside = output_dir / ".model.partial"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        for path in aside.iterdir():
            path.replace(output_dir / path.name)
        aside.rmdir()
    # Safetensors has errors of its own for what the system refuses.
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(cannot_write(output_dir, error)) from error
