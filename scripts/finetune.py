"""Fine-tune an encoder, or train one from scratch, to classify texts or pairs of texts or to predict a number.

The tasks of GLUE and IMDB by name, with their own metrics; several seeds in one call give mean and spread:

    python scripts/finetune.py --task_name mrpc --model_name_or_path google-bert/bert-base-uncased --seeds 1 2 3 \\
        --do_predict true --output_dir output/mrpc

Any data set (Hub name, local folder, csv, tsv, json, jsonl or parquet files), any AutoModelForSequenceClassification:

    python scripts/finetune.py --config_name configs/tiny.json --train_file data/sotu/train.parquet \\
        --validation_file data/sotu/dev.parquet --label_column label_text --max_length 1024 --output_dir output/sotu
    python scripts/finetune.py --model_name_or_path output/linformer --train_file letters.csv --label_column topics \\
        --label_separator ";" --output_dir output/letters                  # texts with several labels, or none
    python scripts/finetune.py --teacher_name_or_path output/bert --model_name_or_path output/linformer ...
    accelerate launch scripts/finetune.py ...                          # several GPUs, the same options

With a teacher, a classifier that was fine-tuned for the same labels, its answers are learned beside them. All options
can stand in one file: `python scripts/finetune.py configs/demo.yaml --seed 1`. A run that was killed goes on with
`--resume_from_checkpoint last` and ends with the weights, bit for bit on a CPU, that it would have had.
"""

import csv
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from datasets import Dataset, DatasetDict
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from common import (
    UserError,
    append_result,
    format_table,
    longest_input,
    one_line,
    parse_arguments,
    run_main,
    write_aside,
    write_json,
)
from conversion import exact_length
from examples import (
    DataArguments,
    count_empty,
    describe_classes,
    is_multi_label,
    load_examples,
    load_unlabelled,
    with_task,
)
from hf_linformer import LinformerConfig
from loading import ModelArguments, load_config_and_tokenizer
from metrics import ComputeMetrics, choose_metrics
from teacher import ClassifierTeacher, load_classifier_teacher
from training import (
    Batch,
    Rows,
    RowTrainingArguments,
    grouped_by_length,
    identity_of,
    prepare_output_dir,
    save_model,
    start_accelerator,
    train,
)


@dataclass
class ClassifierArguments(ModelArguments):
    """What is trained."""

    classifier_pooling: str | None = field(
        default=None,
        metadata={"help": "What a Linformer classifies by: its first token (cls) or the mean of all (mean)."},
    )


@dataclass
class FinetuningArguments(RowTrainingArguments):
    """How it is trained, and what is written."""

    run_name: str = field(default="finetune", metadata={"help": "The run's name in trackers and --results_file."})
    seeds: list[int] | None = field(
        default=None,
        metadata={"help": "Instead of --seed: a run for each, in seed-N of --output_dir; then mean and spread."},
    )
    label_smoothing_factor: float = field(
        default=0.0, metadata={"help": "This much of a label is spread over all classes."}
    )
    teacher_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A fine-tuned classifier that is imitated beside the labels, such as the softmax twin."},
    )
    logits_weight: float = field(
        default=1.0,
        metadata={"help": "With a teacher: weight of its answers: divergence, or square error in regression."},
    )
    hidden_states_weight: float = field(
        default=0.0,
        metadata={"help": "With a teacher of the same layers: weight of their squared relative error, of 0 to 1."},
    )
    do_predict: bool = field(
        default=False,
        metadata={"help": "Answer the test sets of a task of GLUE, in the files that its server takes: submission/."},
    )
    metric_for_best_model: str | None = field(
        default=None,
        metadata={
            "help": "What chooses the model. Default: score, the mean of a task's metrics; without --task_name "
            "accuracy, f1_micro where texts have several labels, or pearson in regression."
        },
    )
    metric_name: str | None = field(
        default=None, metadata={"help": "One more metric: a name of scripts/metrics.py, a local path or a Hub name."}
    )


# What a results file says of a Linformer.
DESCRIBED_KEYS = ("model_type", "projection_type", "projection_sharing", "projected_length", "local_window")


# Data and model


def load_model(
    arguments: ClassifierArguments, label_names: list[str] | None, several: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model with a head for these labels, one or several of them (None: regression), and its tokenizer."""
    changes = {"classifier_pooling": arguments.classifier_pooling} if arguments.classifier_pooling else {}
    config, tokenizer = load_config_and_tokenizer(arguments, changes)
    name = arguments.model_name_or_path
    trust = {"trust_remote_code": arguments.trust_remote_code}
    has_other_head = config.num_labels != len(label_names or [""])
    if label_names is None:
        config.num_labels, config.problem_type = 1, "regression"
    else:
        config.problem_type = "multi_label_classification" if several else "single_label_classification"
        # A classifier that knows these labels keeps its order of them.
        if set(config.label2id or {}) != set(label_names):
            config.id2label = dict(enumerate(label_names))
            config.label2id = {name: index for index, name in enumerate(label_names)}

    if name is None:
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
        # A bias by distance is new where the source has none, and begins as nothing.
        encoder, is_new = f"{model.base_model_prefix}.", (".pooler.", ".position_bias.")
        missing = [key for key in report["missing_keys"] if key.startswith(encoder)]
        if lost := [key for key in missing if not any(part in key for part in is_new)]:
            raise UserError(f"the model {name} is incomplete: {len(lost)} weights are missing, such as {lost[0]}")
    if arguments.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model, tokenizer


def choose_max_length(arguments: RowTrainingArguments, model: PreTrainedModel) -> int:
    """`--max_length`, or all that the model can take."""
    limit = longest_input(model)
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
    """Texts to `input_ids` of at most `max_length`; `length` and `is_cut` say what came of each.

    label_ids: the model's id of each label; None for numbers. Of several labels each row becomes 0 and 1 for all.
    """

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = [batch[name] for name in ("text", "text_pair") if name in batch]
        encoded = tokenizer(*texts, truncation=True, max_length=max_length)
        return {
            **encoded,
            **({"labels": [target(label) for label in batch["label"]]} if "label" in batch else {}),
            "length": [len(input_ids) for input_ids in encoded["input_ids"]],
            "is_cut": [bool(encoding.overflowing) for encoding in encoded.encodings],
        }

    def target(label: Any) -> Any:
        if label_ids is None:
            return label
        if isinstance(label, list):
            chosen = {label_ids[one] for one in label}
            return [float(index in chosen) for index in range(len(label_ids))]
        return label_ids[label]

    columns = next(iter(splits.values())).column_names
    return splits.map(encode, batched=True, remove_columns=columns, num_proc=num_workers, desc="Tokenizing")


def describe_data(
    splits: DatasetDict,
    label_names: Sequence[str] | None,
    tokenized: DatasetDict,
    max_length: int,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Say how many rows the classes have, warn of odd ones and of empty and cut texts.

    Returns the share of cut texts of each split. Raises `UserError` if no training text has a letter.
    """
    if count_empty(splits["train"]) == len(splits["train"]):
        raise UserError(
            f"all {len(splits['train'])} training texts are empty: there is nothing to learn; --text_column names "
            "the column that holds the text"
        )
    if label_names is not None:
        line, odd = describe_classes(splits["train"]["label"], label_names)
        accelerator.print(f"training rows: {line}")
        for what in odd:
            accelerator.print(f"warning: {what}", file=sys.stderr)
    shares = {}
    for split, dataset in splits.items():
        if empty := count_empty(dataset):
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


def longest_first(rows: Dataset, collate: DataCollatorWithPadding, batch_size: int) -> tuple[DataLoader, np.ndarray]:
    """A loader of rows of about one length together, and which row comes when."""
    order = np.argsort(rows["length"][:], kind="stable")[::-1]
    rows = rows.select(order).remove_columns(["length", "is_cut"])
    return DataLoader(rows, batch_size, collate_fn=collate), order


def make_loaders(
    tokenized: DatasetDict, collate: DataCollatorWithPadding, arguments: RowTrainingArguments, num_processes: int
) -> tuple[dict[str, DataLoader], torch.Generator]:
    """A loader for each split, and the generator that the order of the training rows is drawn from."""
    sampler, generator = grouped_by_length(tokenized["train"]["length"], arguments, num_processes)
    train_set = tokenized["train"].remove_columns(["length", "is_cut"])
    loaders = {
        "train": DataLoader(train_set, arguments.per_device_train_batch_size, sampler=sampler, collate_fn=collate)
    }
    for split in tokenized.keys() - {"train"}:
        # Metrics do not mind the order.
        loaders[split], _ = longest_first(tokenized[split], collate, arguments.per_device_eval_batch_size)
    return loaders, generator


# Loss and evaluation


def loss_of(model: nn.Module, batch: Batch, smoothing: float, teacher: ClassifierTeacher | None) -> Tensor:
    """The loss of the labels, of which `smoothing` is spread over all classes, and the distance from a teacher."""
    wants_states = {"output_hidden_states": True} if teacher and teacher.hidden_states_weight else {}
    output = model(**batch, **wants_states)
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    loss = output.loss
    if smoothing:
        loss = nn.functional.cross_entropy(output.logits.float(), batch["labels"], label_smoothing=smoothing)
    return loss if teacher is None else loss + teacher.disagreement(output, inputs)


@torch.no_grad()
def outputs_of(accelerator: Accelerator, model: nn.Module, loader: DataLoader) -> tuple[Tensor, Tensor | None]:
    """Logits, and labels where there are any, of all rows in the order of the loader."""
    model.eval()
    parts: dict[str, list[Tensor]] = {}
    for batch in tqdm(loader, desc="Evaluating", leave=False, disable=not accelerator.is_main_process):
        labels = {"labels": batch.pop("labels")} if "labels" in batch else {}
        values = accelerator.gather_for_metrics({"logits": model(**batch).logits.float(), **labels})
        for name, value in values.items():
            parts.setdefault(name, []).append(value.cpu())
    model.train()
    outputs = {name: torch.cat(values) for name, values in parts.items()}
    return outputs["logits"], outputs.get("labels")


LOSSES = {
    "regression": lambda logits, labels: nn.functional.mse_loss(logits.squeeze(-1), labels),
    "single_label_classification": nn.functional.cross_entropy,
    "multi_label_classification": nn.functional.binary_cross_entropy_with_logits,
}


def predictions_of(logits: Tensor, problem_type: str) -> Tensor:
    """Numbers (B,), classes (B,), or 0 and 1 for each label (B, labels), from logits (B, labels)"""
    if problem_type == "regression":
        return logits.squeeze(-1)
    return (logits > 0).long() if problem_type == "multi_label_classification" else logits.argmax(-1)


def evaluate_model(
    accelerator: Accelerator, model: nn.Module, loader: DataLoader, compute_metrics: ComputeMetrics
) -> dict[str, float]:
    """Loss and metrics over a whole split."""
    problem_type = accelerator.unwrap_model(model).config.problem_type
    logits, labels = outputs_of(accelerator, model, loader)
    assert labels is not None
    if not logits.isfinite().all():
        raise UserError("the model's outputs are not finite: training has diverged; lower --learning_rate")
    predictions = predictions_of(logits, problem_type)
    loss = LOSSES[problem_type](logits, labels).item()
    return {"loss": loss, **compute_metrics(predictions.numpy(), labels.to(predictions.dtype).numpy())}


def write_submission(path: Path, predictions: Sequence[float], names: Mapping[Any, str] | None) -> None:
    """A file that GLUE's server takes: the number of each row, from 0, and the answer: a name, a class or a number."""
    with write_aside(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["index", "prediction"])
        for index, value in enumerate(predictions):
            answer = names[int(value)] if names else f"{value:.3f}" if isinstance(value, float) else value
            writer.writerow([index, answer])


def run(
    data_arguments: DataArguments,
    model_arguments: ClassifierArguments,
    arguments: FinetuningArguments,
    argv: Sequence[str] | None,
) -> dict[str, Any]:
    """Train, choose and save one model, and return its results."""
    accelerator, checkpoint = start_accelerator(arguments)
    output_dir = Path(arguments.output_dir)
    _, task = with_task(data_arguments)

    with accelerator.main_process_first():
        unlabelled = load_unlabelled(data_arguments) if arguments.do_predict else {}
        examples, label_names = load_examples(data_arguments, arguments.seed)
    num_labels = None if label_names is None else len(label_names)
    several = is_multi_label(examples)
    is_classes = num_labels is not None and not several
    if not 0 <= arguments.label_smoothing_factor < 1:
        raise UserError(
            f"--label_smoothing_factor must be at least 0 and below 1, and is {arguments.label_smoothing_factor}"
        )
    if arguments.label_smoothing_factor and not is_classes:
        raise UserError("--label_smoothing_factor spreads one label over the others: a text must have one class")
    compute_metrics = choose_metrics(num_labels, arguments.metric_name, several, task.metrics if task else ())
    sample = np.eye(2, num_labels, dtype=int) if several else np.array([0, 1])
    known = [*compute_metrics(sample, sample), "loss"]
    default = "score" if task else "accuracy" if is_classes else "f1_micro" if several else "pearson"
    arguments.metric_for_best_model = arguments.metric_for_best_model or default
    if arguments.metric_for_best_model not in known:
        raise UserError(f"--metric_for_best_model {arguments.metric_for_best_model} is not one of {known}")

    model, tokenizer = load_model(model_arguments, label_names, several)
    max_length = choose_max_length(arguments, model)
    teacher = None
    if arguments.teacher_name_or_path:
        weights = (arguments.logits_weight, arguments.hidden_states_weight)
        multiple = arguments.pad_to_multiple_of or 1
        longest = math.ceil(max_length / multiple) * multiple
        teacher = load_classifier_teacher(
            *(arguments.teacher_name_or_path, model, tokenizer, longest, *weights, model_arguments.trust_remote_code)
        )
        teacher.model.to(accelerator.device)
    elif arguments.hidden_states_weight:
        raise UserError("--hidden_states_weight learns from a teacher: give --teacher_name_or_path")
    label2id: dict[str, int] = model.config.label2id  # type: ignore[assignment]
    label_ids = None if label_names is None else [label2id[name] for name in label_names]
    tokenizing = (tokenizer, max_length, label_ids, arguments.preprocessing_num_workers)
    with accelerator.main_process_first():
        tokenized = tokenize(examples, *tokenizing)
        unanswered = tokenize(DatasetDict(unlabelled), *tokenizing) if unlabelled else {}
    cut_shares = describe_data(examples, label_names, tokenized, max_length, accelerator)
    collate = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=arguments.pad_to_multiple_of)
    loaders, generator = make_loaders(tokenized, collate, arguments, accelerator.num_processes)

    all_arguments = {**asdict(data_arguments), **asdict(model_arguments), **asdict(arguments)}
    identity = identity_of(accelerator, all_arguments) | {"training tokens": sum(tokenized["train"]["length"])}
    prepare_output_dir(accelerator, arguments, identity, checkpoint)
    eval_loader = accelerator.prepare(loaders["validation"])

    def compute_loss(model: nn.Module, batch: Batch) -> Tensor:
        # What accelerate did not prepare, the teacher, computes in the precision of training too.
        with accelerator.autocast():
            return loss_of(model, batch, arguments.label_smoothing_factor, teacher)

    progress, wrapped = train(
        *(accelerator, model, Rows(accelerator, loaders["train"], generator, arguments.seed)),
        compute_loss,
        lambda model: evaluate_model(accelerator, model, eval_loader, compute_metrics),
        *(arguments, identity, checkpoint),
    )

    best = next(row for row in progress.history if row["step"] == progress.best_step)
    results = {"best_epoch": best["epoch"], **{name: best[name] for name in best if name.startswith("eval_")}}
    if is_classes:
        majority = Counter(examples["train"]["label"]).most_common(1)[0][0]
        labels = list(examples["validation"]["label"])
        results["majority_accuracy"] = labels.count(majority) / len(labels)
    for split in sorted(loaders.keys() - {"train", "validation"}):
        loader = accelerator.prepare(loaders[split])
        values = evaluate_model(accelerator, wrapped, loader, compute_metrics)
        prefix = split.replace("validation", "eval")
        results |= {f"{prefix}_{name}": value for name, value in values.items()}
    for file, rows in unanswered.items():
        loader, order = longest_first(rows, collate, arguments.per_device_eval_batch_size)
        logits, _ = outputs_of(accelerator, wrapped, accelerator.prepare(loader))
        predictions = predictions_of(logits, str(model.config.problem_type))[np.argsort(order)].tolist()
        if accelerator.is_main_process:
            names = model.config.id2label if task and task.submits_names else None
            write_submission(output_dir / "submission" / file, predictions, names)
    results |= {f"cut_share_{split}": share for split, share in cut_shares.items()}
    if isinstance(model.config, LinformerConfig):
        # Texts that are not longer get full softmax attention.
        exact = exact_length(model.config)
        results["compressed_share_validation"] = float(np.mean(np.array(tokenized["validation"]["length"]) > exact))
    results |= {"parameters": model.num_parameters(), "seconds": progress.seconds}
    results["tokens_per_second"] = progress.tokens / progress.train_seconds
    # Wherever the model is used, it says whether it reads single texts, and cuts them where they were cut in training.
    model.config.reads_pairs = "text_pair" in examples["train"].column_names
    tokenizer.model_max_length = max_length
    save_model(accelerator, wrapped, tokenizer, output_dir)
    if accelerator.is_main_process:
        write_json(output_dir / "training_args.json", all_arguments)
        finished = output_dir / "all_results.json"
        if arguments.results_file and not finished.exists():
            row = {
                "run_name": arguments.run_name,
                "model": model_arguments.model_name_or_path or model_arguments.config_name,
                "task": data_arguments.task_name,
                "data": data_arguments.dataset_name or " ".join(data_arguments.train_file or []),
                "dataset_config": data_arguments.dataset_config_name,
                **{name: getattr(model.config, name, None) for name in DESCRIBED_KEYS},
                "teacher": arguments.teacher_name_or_path,
                "max_length": max_length,
                "training_rows": len(examples["train"]),
                "evaluated_rows": len(examples["validation"]),
                "learning_rate": arguments.learning_rate,
                "epochs": progress.history[-1]["epoch"],
                **results,
            }
            append_result(arguments.results_file, row, arguments.seed, argv)
        write_json(finished, {**results, "history": progress.history})
        print(format_table(progress.history))
        print(format_table([{"result": name, "value": value} for name, value in results.items()]))
        print(f"the model of epoch {best['epoch']} is in {output_dir}")
    for tracker in accelerator.trackers:
        tracker.finish()
    return results


def run_seeds(
    data_arguments: DataArguments,
    model_arguments: ClassifierArguments,
    arguments: FinetuningArguments,
    argv: Sequence[str] | None,
) -> None:
    """A run for each seed, then the mean and the spread of their results."""
    seeds, output_dir = arguments.seeds or [], Path(arguments.output_dir)
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds must differ, and are {seeds}")
    if (output_dir / "config.json").exists():
        raise UserError(f"--output_dir {output_dir} holds the model of one run; give --seeds a folder of their own")
    runs = []
    for seed in seeds:
        one = replace(arguments, seed=seed, seeds=None, output_dir=str(output_dir / f"seed-{seed}"))
        runs.append(run(data_arguments, model_arguments, one, argv))
    names = [name for name in runs[0] if all(name in results for results in runs)]
    summary = {
        name: {
            "mean": mean(results[name] for results in runs),
            "std": stdev(results[name] for results in runs) if len(runs) > 1 else 0.0,
        }
        for name in names
    }
    if PartialState().is_main_process:
        write_json(output_dir / "all_results.json", {"seeds": seeds, **summary})
        print(format_table([{"result": name, **values} for name, values in summary.items()]))
        print(f"the models of seeds {', '.join(map(str, seeds))} are in {output_dir}")


def main(argv: Sequence[str] | None = None) -> None:
    data_arguments, model_arguments, arguments = parse_arguments(
        (DataArguments, ClassifierArguments, FinetuningArguments), argv, description=__doc__
    )
    make = run if arguments.seeds is None else run_seeds
    make(data_arguments, model_arguments, arguments, argv)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    run_main(main, resume="--resume_from_checkpoint last")
