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

import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import DatasetDict
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from common import (
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
from loading import ModelArguments, load_config_and_tokenizer, longest_input
from metrics import ComputeMetrics, choose_metrics
from training import (
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
    metric_for_best_model: str | None = field(
        default=None, metadata={"help": "What chooses the model. Default: accuracy, or pearson in regression."}
    )
    metric_name: str | None = field(
        default=None, metadata={"help": "One more metric: a name of scripts/metrics.py, a local path or a Hub name."}
    )


# What a results file says of a Linformer.
DESCRIBED_KEYS = ("model_type", "projection_type", "projection_sharing", "projected_length", "local_window")


# Data and model


def load_model(
    arguments: ClassifierArguments, label_names: list[str] | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model with a head for these labels (None: regression), and its tokenizer."""
    changes = {"classifier_pooling": arguments.classifier_pooling} if arguments.classifier_pooling else {}
    config, tokenizer = load_config_and_tokenizer(arguments, changes)
    name = arguments.model_name_or_path
    trust = {"trust_remote_code": arguments.trust_remote_code}
    has_other_head = config.num_labels != len(label_names or [""])
    if label_names is None:
        config.num_labels, config.problem_type = 1, "regression"
    else:
        config.problem_type = "single_label_classification"
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
        encoder = f"{model.base_model_prefix}."
        if lost := [key for key in report["missing_keys"] if key.startswith(encoder) and ".pooler." not in key]:
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
    tokenized: DatasetDict, tokenizer: PreTrainedTokenizerBase, arguments: RowTrainingArguments, num_processes: int
) -> tuple[dict[str, DataLoader], torch.Generator]:
    """A loader for each split, and the generator that the order of the training rows is drawn from."""
    collate = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=arguments.pad_to_multiple_of)
    sampler, generator = grouped_by_length(tokenized["train"]["length"], arguments, num_processes)
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


# Evaluation


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


def main(argv: Sequence[str] | None = None) -> None:
    data_arguments, model_arguments, arguments = parse_arguments(
        (DataArguments, ClassifierArguments, FinetuningArguments), argv, description=__doc__
    )
    accelerator, checkpoint = start_accelerator(arguments)
    output_dir = Path(arguments.output_dir)

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
    identity = identity_of(accelerator, all_arguments) | {"training tokens": sum(tokenized["train"]["length"])}
    prepare_output_dir(accelerator, arguments, identity, checkpoint)
    eval_loader = accelerator.prepare(loaders["validation"])
    progress, wrapped = train(
        *(accelerator, model, Rows(accelerator, loaders["train"], generator, arguments.seed)),
        lambda model, batch: model(**batch).loss,
        lambda model: evaluate_model(accelerator, model, eval_loader, compute_metrics),
        *(arguments, identity, checkpoint),
    )

    best = next(row for row in progress.history if row["step"] == progress.best_step)
    results = {"best_epoch": best["epoch"], **{name: best[name] for name in best if name.startswith("eval_")}}
    if num_labels:
        majority = Counter(examples["train"]["label"]).most_common(1)[0][0]
        labels = list(examples["validation"]["label"])
        results["majority_accuracy"] = labels.count(majority) / len(labels)
    if "test" in loaders:
        loader = accelerator.prepare(loaders["test"])
        values = evaluate_model(accelerator, wrapped, loader, compute_metrics)
        results |= {f"test_{name}": value for name, value in values.items()}
    results |= {f"cut_share_{split}": share for split, share in cut_shares.items()}
    results |= {"parameters": model.num_parameters(), "seconds": progress.seconds}
    results["tokens_per_second"] = progress.tokens / progress.train_seconds
    # Texts are cut where they were cut in training wherever the model is used.
    tokenizer.model_max_length = max_length
    save_model(accelerator, wrapped, tokenizer, output_dir)
    if accelerator.is_main_process:
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
