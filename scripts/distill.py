"""Bring a converted Linformer nearer to its source: it learns what every layer of the source makes of plain text.

    python scripts/convert.py --model_name_or_path path/to/bert --output_dir output/linformer
    python scripts/distill.py --teacher_name_or_path path/to/bert --model_name_or_path output/linformer \\
        --train_file texts.parquet --validation_file others.parquet --max_length 512 --output_dir output/distilled
    accelerate launch scripts/distill.py ...                           # several GPUs, the same options

Texts are cut into pieces of --max_length tokens. The loss is the squared relative error of the hidden states, averaged
over texts and layers: 0.01 is an error of a tenth. With --logits_weight the outputs of a head are learnt too, and with
--masked_lm_weight the words themselves. Pieces longer than the source can read are taught by windows of it.

--trainable long_only trains only what texts of up to k tokens never meet, so that the model stays exact on them:
`slot_projections`, learned projections, the positions behind. A run that was killed goes on with
--resume_from_checkpoint last.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import hf_linformer  # noqa: F401  (registers Linformer with the Auto classes)
from common import (
    ROOT,
    TextArguments,
    UserError,
    append_results,
    format_table,
    load_data_files,
    load_texts,
    one_line,
    only_texts,
    parse_arguments,
    run_main,
    write_json,
)
from conversion import HEADS, exact_length, find_family, longest_row
from fidelity import describe, draw_rows, length_buckets, measure_fidelity, printable, result_rows
from hf_linformer import LinformerConfig
from teacher import divergence, encoder_of, relative_errors, states_of_windows
from training import (
    Rows,
    RowTrainingArguments,
    TrainingArguments,
    grouped_by_length,
    identity_of,
    prepare_output_dir,
    save_model,
    start_accelerator,
    train,
)


@dataclass
class DistillationArguments:
    """Who learns what from whom."""

    teacher_name_or_path: str = field(metadata={"help": "The source of the conversion."})
    model_name_or_path: str = field(metadata={"help": "The Linformer that scripts/convert.py made of it."})
    trainable: str = field(
        default="all",
        metadata={"help": "long_only leaves short texts exact.", "choices": ["all", "long_only"]},
    )
    logits_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the head's outputs: divergence, or square error in regression."},
    )
    masked_lm_weight: float = field(
        default=0.0, metadata={"help": "Weight of predicting masked tokens; the source then reads them masked too."}
    )
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the tokens that is masked for it."})
    last_layer_weight: float = field(default=1.0, metadata={"help": "Weight of the last layer, others having 1."})
    validation_file: list[str] = field(
        default_factory=lambda: [str(ROOT / "data/sotu/dev.parquet")],
        metadata={"help": "Other texts, on which the two are compared after each epoch."},
    )
    data_name: str | None = field(
        default=None, metadata={"help": "What the results call these. Default: the name of the file."}
    )
    lengths: list[int] | None = field(
        default=None, metadata={"help": "Lengths to compare at. Default: 1/16 to 1 of what the source can read."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "So many pieces, drawn by the seed."})
    max_eval_samples: int = field(default=24, metadata={"help": "Texts to compare at each length."})


@dataclass
class LoopArguments(RowTrainingArguments):
    """How it is trained, and what is written."""

    run_name: str = field(default="distill", metadata={"help": "The run's name in trackers."})
    num_train_epochs: int = field(default=1, metadata={"help": "Passes over the training set."})
    learning_rate: float = field(default=2e-4, metadata={"help": "The highest learning rate."})
    metric_for_best_model: str | None = field(
        default=None, metadata={"help": "What chooses the model. Default: token_cosine, the mean over lengths."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Compute activations again in the backward pass: less memory, slower."}
    )


class Pair(NamedTuple):
    """A source and its conversion. source_n: the most tokens that the source can read."""

    teacher: PreTrainedModel
    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source_n: int

    @property
    def config(self) -> LinformerConfig:
        assert isinstance(self.student.config, LinformerConfig)
        return self.student.config


def load_pair(arguments: DistillationArguments) -> Pair:
    """Both models in float32 with the student's head. Raises `UserError` where they do not belong together."""
    models = []
    head = None
    for name in (arguments.model_name_or_path, arguments.teacher_name_or_path):
        try:
            config = AutoConfig.from_pretrained(name)
            if head is None:
                head = student_head(config, name)
            model, report = getattr(transformers, HEADS[head].auto_class).from_pretrained(
                name, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, StrictDataclassError) as error:
            raise UserError(f"cannot load the model {name}: {one_line(error)}") from error
        if lost := [weight for weight in sorted(report["missing_keys"]) if "pooler" not in weight]:
            raise UserError(f"the model {name} is incomplete: {len(lost)} weights are missing, such as {lost[0]}")
        if any("pooler" in weight for weight in report["missing_keys"]):
            model.pooler = None
        models.append(model)
    student, teacher = models
    find_family(teacher.config)
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        ours, theirs = getattr(student.config, name), getattr(teacher.config, name)
        if ours != theirs:
            raise UserError(
                f"{arguments.model_name_or_path} has {name} {ours} and {arguments.teacher_name_or_path} {theirs}: the "
                "one was not converted from the other"
            )
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot load the tokenizer of {arguments.model_name_or_path}: {one_line(error)}") from error
    return Pair(teacher.eval().requires_grad_(False), student, tokenizer, longest_row(teacher.config))


def student_head(config: transformers.PreTrainedConfig, name: str) -> str:
    """The name in HEADS of a Linformer's head."""
    if config.model_type != "linformer":
        raise UserError(f"{name} is a {config.model_type} model; scripts/convert.py makes a Linformer of it")
    for head, kind in HEADS.items():
        if config.architectures and config.architectures[0] == kind.model_class.__name__:
            return head
    raise UserError(
        f"{name} is a {config.architectures}, which is none of the heads that can be taught: {list(HEADS)}"
    )


def choose_trainable(pair: Pair, trainable: str, weight_decay: float) -> int:
    """Freeze what is not to be trained; the number of weights that are. Raises `UserError` if there are none."""
    config = pair.config
    if trainable == "all":
        return sum(parameter.numel() for parameter in pair.student.parameters())
    if weight_decay:
        raise UserError("--weight_decay would move what --trainable long_only is to leave alone; leave it out")
    nothing = UserError(
        "--trainable long_only has nothing to train: it needs slot_projections or a learned projection, and a model "
        "that reads more than is exact, or more than its source"
    )
    exact, n = exact_length(config), config.max_position_embeddings
    if exact >= n:
        raise nothing
    count, first_new = 0, max(exact, pair.source_n)
    for name, parameter in pair.student.named_parameters():
        is_projection = ".slot_" in name or (name.endswith((".E", ".F")) and config.exact_short_sequences)
        has_new_rows = name.endswith("position_embeddings.weight") and first_new < n
        parameter.requires_grad_(is_projection or has_new_rows)
        if has_new_rows:
            # A row whose gradient is zero stays as it is.
            is_new = (torch.arange(n) >= first_new).to(parameter.dtype)[:, None]
            parameter.register_hook(lambda gradient, is_new=is_new: gradient * is_new.to(gradient.device))
            count += (n - first_new) * parameter.shape[1]
        elif is_projection:
            count += parameter.numel()
    if not count:
        raise nothing
    return count


def stop_dropout(model: PreTrainedModel) -> dict[str, Any]:
    """There is one right answer, without noise. Returns what the configuration said."""
    said = {name: getattr(model.config, name) for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")}
    for name in said:
        setattr(model.config, name, 0.0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return said


def cut_into_pieces(
    texts: Dataset, text_column: str, tokenizer: PreTrainedTokenizerBase, max_length: int, num_workers: int | None
) -> Dataset:
    """`input_ids` of consecutive pieces of at most `max_length` tokens, with special tokens, and their `length`."""

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [text for text in batch[text_column] if text and text.strip()]
        if not rows:
            return {"input_ids": [], "length": []}
        input_ids = tokenizer(rows, truncation=True, max_length=max_length, return_overflowing_tokens=True)[
            "input_ids"
        ]
        return {"input_ids": input_ids, "length": [len(piece) for piece in input_ids]}

    return texts.map(
        encode,
        batched=True,
        batch_size=100,
        remove_columns=texts.column_names,
        num_proc=num_workers,
        desc="Tokenizing",
    )


def draw_pieces(
    arguments: DistillationArguments, texts: TextArguments, loop: TrainingArguments, pair: Pair, max_length: int
) -> Dataset:
    """The pieces to learn from. Raises `UserError` if there are none."""
    workers = loop.preprocessing_num_workers
    pieces = cut_into_pieces(load_texts(texts), texts.text_column, pair.tokenizer, max_length, workers)
    longer = ""
    if arguments.trainable == "long_only":
        # Others have nothing to say of what is trained.
        exact = exact_length(pair.config)
        pieces = pieces.filter(lambda length: length > exact, input_columns="length")
        longer = f" longer than {exact} tokens"
    if not len(pieces):
        raise UserError(f"there is no text{longer} to learn from")
    if arguments.max_train_samples is None or arguments.max_train_samples >= len(pieces):
        return pieces
    return pieces.shuffle(seed=loop.seed).select(range(arguments.max_train_samples))


def draw_compared(
    arguments: DistillationArguments, texts: TextArguments, pair: Pair, max_length: int, seed: int
) -> dict[int, list[Tensor]]:
    """The rows on which both are compared, by length. Raises `UserError` if there are none."""
    files = " ".join(arguments.validation_file)
    held_out = load_data_files({"validation": arguments.validation_file})["validation"]
    held_out = only_texts(held_out, texts.text_column, files).shuffle(seed=seed)
    lengths = sorted(arguments.lengths or length_buckets(pair.source_n, max_length))
    found = [text for text in held_out[texts.text_column] if text]
    rows = draw_rows(found, pair.tokenizer, lengths, arguments.max_eval_samples)
    if not rows:
        raise UserError(f"there is no text to compare on in {files}")
    return rows


@torch.no_grad()
def teach(pair: Pair, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """What the source makes of a batch: states (B, layers, N, D), and its logits if it could read the rows whole."""
    input_ids, mask = batch["input_ids"], batch["attention_mask"]
    if input_ids.shape[1] <= pair.source_n:
        output = pair.teacher(input_ids=input_ids, attention_mask=mask, output_hidden_states=True)
        return torch.stack(output.hidden_states[1:], dim=1), output.get("logits")
    rows = []
    for row, real in zip(input_ids, mask.bool()):
        of_tokens = states_of_windows(encoder_of(pair.teacher), row[real], pair.source_n)[1:]
        states = of_tokens.new_zeros(len(of_tokens), len(row), of_tokens.shape[-1])
        states[:, real] = of_tokens
        rows.append(states)
    return torch.stack(rows), None


def distillation_loss(
    pair: Pair, model: nn.Module, batch: dict[str, Tensor], arguments: DistillationArguments
) -> Tensor:
    """The weighted sum of the losses that are asked for."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = {"labels": batch["labels"]} if arguments.masked_lm_weight else {}
    expected, expected_logits = teach(pair, inputs)
    output = model(**inputs, **labels, output_hidden_states=True)
    errors = relative_errors(torch.stack(output.hidden_states[1:], dim=1), expected, inputs["attention_mask"])
    weights = torch.ones_like(errors)
    weights[-1] = arguments.last_layer_weight
    loss = (errors * weights).sum() / weights.sum()
    # A small batch may have no masked token, and then no mean over them.
    if arguments.masked_lm_weight and (batch["labels"] != -100).any():
        loss = loss + arguments.masked_lm_weight * output.loss
    if arguments.logits_weight and expected_logits is not None:
        real = None if output.logits.dim() < 3 else inputs["attention_mask"].bool()
        logits, targets = (x.float() if real is None else x.float()[real] for x in (output.logits, expected_logits))
        loss = loss + arguments.logits_weight * divergence(logits, targets, pair.config.problem_type)
    return loss


def check_arguments(arguments: DistillationArguments, loop: TrainingArguments, pair: Pair) -> int:
    """Refuse what cannot be meant; the length of pieces."""
    for name in ("logits_weight", "masked_lm_weight", "last_layer_weight"):
        if getattr(arguments, name) < 0:
            raise UserError(f"--{name} must not be negative, and is {getattr(arguments, name)}")
    head = student_head(pair.config, arguments.model_name_or_path)
    if arguments.masked_lm_weight and head != "masked_lm":
        raise UserError(f"--masked_lm_weight needs a masked-LM head, and {arguments.model_name_or_path} has {head}")
    if arguments.logits_weight and head in ("base", "question_answering"):
        raise UserError(f"--logits_weight needs a head with logits, and {arguments.model_name_or_path} has {head}")
    if arguments.masked_lm_weight and not 0 < arguments.mlm_probability < 1:
        raise UserError(f"--mlm_probability must lie between 0 and 1, and is {arguments.mlm_probability}")
    for name in ("max_train_samples", "max_eval_samples"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, and is {value}")
    n = pair.config.max_position_embeddings
    for length in arguments.lengths or []:
        if not 2 < length <= n:
            raise UserError(f"--lengths {length} must lie between 3 and the {n} tokens that the model can read")
    max_length = loop.max_length or min(n, pair.source_n)
    if not 8 <= max_length <= n:
        raise UserError(f"--max_length {max_length} must lie between 8 and the {n} tokens that the model can read")
    return max_length


def main(argv: Sequence[str] | None = None) -> None:
    arguments, texts, loop = parse_arguments(
        (DistillationArguments, TextArguments, LoopArguments), argv, description=__doc__
    )
    accelerator, checkpoint = start_accelerator(loop)
    pair = load_pair(arguments)
    max_length = check_arguments(arguments, loop, pair)
    trained_weights = choose_trainable(pair, arguments.trainable, loop.weight_decay)
    dropout = stop_dropout(pair.student)
    if loop.gradient_checkpointing:
        pair.student.activation_checkpointing_enable()
    with accelerator.main_process_first():
        pieces = draw_pieces(arguments, texts, loop, pair, max_length)
    rows = draw_compared(arguments, texts, pair, max_length, loop.seed)

    sampler, generator = grouped_by_length(pieces["length"], loop, accelerator.num_processes)
    collate = DataCollatorWithPadding(pair.tokenizer)
    loader = DataLoader(
        pieces.remove_columns("length"), loop.per_device_train_batch_size, sampler=sampler, collate_fn=collate
    )
    masking = (
        DataCollatorForLanguageModeling(pair.tokenizer, mlm_probability=arguments.mlm_probability)
        if arguments.masked_lm_weight
        else None
    )
    pair.teacher.to(accelerator.device)
    pair.student.to(accelerator.device)
    # What accelerate prepares computes in the precision of training, and is compared in full.
    measured = copy.deepcopy(pair.student)

    def compute_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        if masking is not None:
            # Here rather than by the loader, which reads ahead: a resumed run then masks what it would have masked.
            input_ids, labels = masking.torch_mask_tokens(batch["input_ids"].cpu())
            batch = batch | {"input_ids": input_ids.to(accelerator.device), "labels": labels.to(accelerator.device)}
        with accelerator.autocast():
            return distillation_loss(pair, model, batch, arguments)

    def evaluate(model: nn.Module) -> dict[str, float]:
        measured.load_state_dict(accelerator.unwrap_model(model).state_dict())
        results = measure_fidelity(pair.teacher, measured, rows, pair.source_n)
        values = {f"token_cosine_{result['length']}": result["token_cosine"] for result in results}
        return {"token_cosine": sum(values.values()) / len(values), **values}

    loop.metric_for_best_model = loop.metric_for_best_model or "token_cosine"
    before = evaluate(pair.student)
    if loop.metric_for_best_model not in before:
        raise UserError(f"--metric_for_best_model {loop.metric_for_best_model} is not one of {list(before)}")
    all_arguments = {**asdict(arguments), **asdict(texts), **asdict(loop)}
    identity = identity_of(accelerator, all_arguments) | {"training tokens": sum(pieces["length"])}
    prepare_output_dir(accelerator, loop, identity, checkpoint)
    data = Rows(accelerator, loader, generator, loop.seed)
    progress, wrapped = train(accelerator, pair.student, data, compute_loss, evaluate, loop, identity, checkpoint)
    for name, value in dropout.items():
        setattr(pair.config, name, value)
    save_model(accelerator, wrapped, pair.tokenizer, Path(loop.output_dir))

    if accelerator.is_main_process:
        output_dir = Path(loop.output_dir)
        measured.load_state_dict(pair.student.state_dict())
        results = measure_fidelity(pair.teacher, measured, rows, pair.source_n)
        write_json(output_dir / "training_args.json", all_arguments)
        finished = output_dir / "all_results.json"
        if loop.results_file and not finished.exists():
            described = {
                "experiment": "distill",
                "source": arguments.teacher_name_or_path,
                "data": arguments.data_name or " ".join(Path(path).name for path in arguments.validation_file),
                **describe(pair.config),
                "trainable": arguments.trainable,
                "trained_weights": trained_weights,
                "train_tokens": progress.tokens,
                "learning_rate": loop.learning_rate,
                "seconds": progress.seconds,
            }
            append_results(loop.results_file, result_rows(results, described), loop.seed, argv)
        write_json(finished, {"before": before, "history": progress.history, "seconds": progress.seconds})
        print(format_table(printable(results)))
        print(f"{progress.tokens:,} tokens in {progress.seconds:,.0f} s; the model is in {output_dir}")
    accelerator.end_training()


if __name__ == "__main__":
    run_main(main, resume="--resume_from_checkpoint last")
