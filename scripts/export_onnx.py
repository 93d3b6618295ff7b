"""Export a Linformer to ONNX, prove that onnxruntime computes the same as PyTorch, and time one beside the other.

    python scripts/export_onnx.py --model_name_or_path demo --output_dir demo_onnx
    python scripts/export_onnx.py --model_name_or_path demo --output_dir demo_onnx --quantize int8 \\
        --validation_file data/sotu/dev.parquet --label_column label_text

model.onnx takes what the tokenizer gives (int64, batch x length) and returns what the model does, for every batch size
and every length up to the model's. Tokenizer and configuration are saved beside it. It is run on batches of mixed
lengths, padded left, right and in between; a graph that differs from PyTorch by more than --atol is not kept.
"""

import contextlib
import importlib.util
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from common import UserError, append_result, format_table, one_line, parse_arguments, run_main
from examples import DataArguments, load_examples
from metrics import choose_metrics


class Head(NamedTuple):
    """A task's Auto class, how the names of its classes end, and whether it answers for every token."""

    auto_class: Any
    suffix: str
    per_token: bool


TASKS = {
    "feature-extraction": Head(AutoModel, "Model", True),
    "fill-mask": Head(AutoModelForMaskedLM, "ForMaskedLM", True),
    "text-classification": Head(AutoModelForSequenceClassification, "ForSequenceClassification", False),
    "token-classification": Head(AutoModelForTokenClassification, "ForTokenClassification", True),
    "question-answering": Head(AutoModelForQuestionAnswering, "ForQuestionAnswering", True),
    "multiple-choice": Head(AutoModelForMultipleChoice, "ForMultipleChoice", False),
}
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
DESCRIBED_KEYS = ("projection_type", "projection_sharing", "projected_length", "local_window")

Inputs = dict[str, Tensor]
# Runs a batch: inputs by name to outputs by name.
Engine = Callable[[Inputs], Mapping[str, np.ndarray]]


class Subject(NamedTuple):
    """What is exported. `names` are the inputs of the graph: those that the tokenizer gives."""

    model: PreTrainedModel
    task: str
    names: list[str]

    def axes(self) -> list[str]:
        return ["batch", "choices", "length"] if self.task == "multiple-choice" else ["batch", "length"]

    def inputs(self, real: Tensor, generator: torch.Generator) -> Inputs:
        """Random tokens where `real`, of the shape of the inputs, is True, and pads elsewhere."""
        config = self.model.config
        tokens = torch.randint(config.vocab_size, real.shape, generator=generator)
        types = torch.randint(config.type_vocab_size, real.shape, generator=generator)
        inputs = {
            "input_ids": tokens.where(real, config.pad_token_id or 0),
            "attention_mask": real.long(),
            "token_type_ids": types.where(real, 0),
        }
        return {name: inputs[name] for name in self.names}


@dataclass
class ExportArguments:
    """What is exported, and what is measured."""

    model_name_or_path: str = field(metadata={"help": "A Linformer: a folder or a Hub name."})
    output_dir: str = field(metadata={"help": "Where model.onnx, the configuration and the tokenizer go."})
    task: str | None = field(
        default=None, metadata={"help": "Which head. Default: what the model was saved as.", "choices": list(TASKS)}
    )
    quantize: str = field(
        default="none",
        metadata={
            "help": "int8: also write model_int8.onnx, whose large weights are 8-bit integers.",
            "choices": ["none", "int8"],
        },
    )
    atol: float = field(
        default=1e-4, metadata={"help": "How far an output of model.onnx may be from PyTorch's, in absolute terms."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace the model that is there."})
    trust_remote_code: bool = field(
        default=True, metadata={"help": "Run the modelling code in the model's folder, as a Linformer needs."}
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "Labelled texts to judge a classifier on: csv, tsv, json, jsonl or parquet."}
    )
    text_column: list[str] | None = field(
        default=None,
        metadata={"help": "One column, or two for pairs. Default: usual names, of pairs too, or the only text."},
    )
    label_column: str | None = field(default=None, metadata={"help": "Default: label, or labels."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Judge it on so many rows, drawn by the seed."}
    )
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Rows of one forward pass in evaluation."})
    timed_lengths: list[int] = field(
        default_factory=lambda: [128, 512, 2048],
        metadata={"help": "Time one text of so many tokens each; lengths over the model's are left out."},
    )
    num_repeats: int = field(default=10, metadata={"help": "Time each so often, in turns, and give the median."})
    seed: int = field(default=42, metadata={"help": "Of the tokens and masks that the graph is checked with."})
    run_name: str = field(default="export_onnx", metadata={"help": "The run's name in --results_file."})
    results_file: str | None = field(
        default=None, metadata={"help": "Add a row for PyTorch and for each graph to this CSV."}
    )


# The model


def choose_task(config: PreTrainedConfig) -> str:
    """The task of the class that the model was saved as."""
    architecture = (config.architectures or [""])[0]
    for task, head in TASKS.items():
        if architecture.endswith(head.suffix):
            return task
    raise UserError(f"cannot tell the task of {architecture or 'this model'!r}; name it: --task, one of {list(TASKS)}")


def load(arguments: ExportArguments) -> tuple[Subject, PreTrainedTokenizerBase]:
    """The model in single precision, and its tokenizer; refused if weights of the head are missing."""
    name, trust = arguments.model_name_or_path, {"trust_remote_code": arguments.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, **trust)
        if config.model_type != "linformer":
            raise UserError(f"{name} is a {config.model_type} model, not a Linformer; `optimum` exports other models")
        task = arguments.task or choose_task(config)
        # The pooler of a model that was saved with another head would be noise.
        options = {"add_pooling_layer": False} if task == "feature-extraction" else {}
        model, report = TASKS[task].auto_class.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **trust,
            **options,
        )
        tokenizer = AutoTokenizer.from_pretrained(name, **trust)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot load the model {name}: {one_line(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{name} has no weights for {task} ({', '.join(missing[:3])}): fine-tune it, or choose another --task"
        )
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
    optional = [known for known in ("token_type_ids",) if known in tokenizer.model_input_names]
    return Subject(model.eval(), task, ["input_ids", "attention_mask", *optional]), tokenizer


# Export


def export(subject: Subject, path: Path) -> None:
    """Write the graph to `path`; weights over 2 GB, the limit of the format, go to a file beside it."""
    axes = subject.axes()
    # Sizes 0 and 1 would be taken for constants.
    real = torch.ones([2, 3, 5][-len(axes) :], dtype=torch.bool)
    inputs = subject.inputs(real, torch.Generator().manual_seed(0))
    with torch.no_grad(), quiet():
        program = torch.onnx.export(
            subject.model,
            kwargs=inputs,
            dynamo=True,
            input_names=subject.names,
            output_names=list(subject.model(**inputs)),
            dynamic_shapes={name: dict(enumerate(axes)) for name in subject.names},
            verbose=False,
        )
        assert program is not None
        program.save(path, external_data=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' remarks on torchvision, deprecated code of their own and names given twice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def quantize_int8(path: Path, quantized_path: Path) -> None:
    """Store the weights of linear layers and embeddings as 8-bit integers, those of linears with a scale a channel.

    Activations are rounded as they come, with one scale for a whole batch. Weights use 7 of the 8 bits: processors
    without VNNI add products of 8 bits in 16, which overflows in silence.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with quiet(), tempfile.TemporaryDirectory(dir=path.parent) as folder:
        # A weight that is used twice (keys, of tokens and of slots) is transposed in the graph; only constants are
        # quantized, so that has to be folded first.
        folded = Path(folder, path.name)
        is_large = path.with_name(f"{path.name}.data").exists()
        quant_pre_process(path, folded, skip_symbolic_shape=True, save_as_external_data=is_large)
        quantize_dynamic(folded, quantized_path, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)


# Running


def torch_engine(model: PreTrainedModel) -> Engine:
    @torch.inference_mode()
    def run(inputs: Inputs) -> Mapping[str, np.ndarray]:
        return {name: values.numpy() for name, values in model(**inputs).items()}

    return run


def onnx_engine(path: Path) -> Engine:
    """The graph in onnxruntime, with as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(inputs: Inputs) -> Mapping[str, np.ndarray]:
        return dict(zip(names, session.run(names, {name: values.numpy() for name, values in inputs.items()})))

    return run


# Verification


def checked_lengths(config: PreTrainedConfig) -> list[int]:
    """Lengths at which something changes: 1, 2, around every k, around the blocks of the window, odd ones, and n."""
    n, w = config.max_position_embeddings, config.local_window
    slots = {k for layer in range(config.num_hidden_layers) for k in config.slots_per_head(layer)}
    lengths = {1, 2, 3, n // 2 | 1, n, *(k + step for k in slots for step in (-1, 0, 1))}
    lengths |= {blocks * w + step for blocks in (1, 2, 3) for step in (0, 1)} if w else set()
    return sorted(length for length in lengths if 1 <= length <= n)


def checked_masks(length: int, generator: torch.Generator) -> Iterator[Tensor]:
    """One row without padding, and a batch of rows padded right, left and in between: (batch, length)."""
    yield torch.ones(1, length, dtype=torch.bool)
    if length > 1:
        position = torch.arange(length)
        real = int(torch.randint(1, length, (), generator=generator))
        holes = torch.rand(length, generator=generator) < 0.6
        # A row without any real token has no result to compare.
        holes[real] = True
        yield torch.stack([position < real, position >= length - real, holes])


def largest_difference(
    expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], real: np.ndarray | None
) -> float:
    """The largest absolute difference of any output; where `real` is given, at real tokens only. NaN stays NaN."""
    gaps = [np.abs(values - found[name]) for name, values in expected.items()]
    return float(np.max([np.max(gap if real is None else gap[real]) for gap in gaps]))


def compare(expected: Engine, found: Engine, subject: Subject, seed: int) -> dict[int, float]:
    """How far two engines are from each other at each of the checked lengths."""
    generator = torch.Generator().manual_seed(seed)
    differences = {}
    for length in tqdm(checked_lengths(subject.model.config), desc="Comparing", leave=False):
        gaps = []
        for mask in checked_masks(length, generator):
            real = mask.expand(2, *mask.shape) if subject.task == "multiple-choice" else mask
            inputs = subject.inputs(real, generator)
            compared = real.numpy() if TASKS[subject.task].per_token else None
            gaps.append(largest_difference(expected(inputs), found(inputs), compared))
        differences[length] = float(np.max(gaps))
    return differences


def refuse_difference(differences: Mapping[int, float], atol: float) -> None:
    """Raises `UserError` with the numbers if PyTorch and the graph differ at any length, or one of them is NaN."""
    if wrong := {length: gap for length, gap in differences.items() if not gap <= atol}:
        listed = ", ".join(f"{gap:.1e} at {length}" for length, gap in wrong.items())
        raise UserError(
            f"the graph is not kept: onnxruntime differs from PyTorch by more than {atol:g} at lengths ({listed}). "
            "If that is small beside the model's outputs, allow it with --atol"
        )


# Measurement


def time_engines(engines: Mapping[str, Engine], inputs: Inputs, num_repeats: int) -> dict[str, float]:
    """The median time of each engine in milliseconds, measured in turns so that all meet the same disturbances."""
    pause = 0.03
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(num_repeats):
        for name, engine in engines.items():
            # Idle threads of the engine before spin on for some milliseconds, on the cores that this one needs.
            time.sleep(pause)
            engine(inputs)
            started = time.perf_counter()
            engine(inputs)
            seconds[name].append(time.perf_counter() - started)
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


def load_validation(arguments: ExportArguments, config: PreTrainedConfig) -> tuple[list[list[str]], list[Any]]:
    """The columns of texts, one or two, and the labels as ids of the model, or numbers for a regression."""
    is_regression = config.problem_type == "regression"
    # One file plays both parts: the readers of training data check it, and nothing is drawn from it.
    data = DataArguments(
        train_file=arguments.validation_file,
        validation_file=arguments.validation_file,
        text_column=arguments.text_column,
        label_column=arguments.label_column,
        do_regression=is_regression,
        max_eval_samples=arguments.max_eval_samples,
    )
    splits, label_names = load_examples(data, arguments.seed)
    rows = splits["validation"]
    labels = rows["label"][:]
    if label_names is not None:
        ids: dict[str, int] = config.label2id or {}  # type: ignore[assignment]
        if unknown := sorted(set(label_names) - set(ids)):
            raise UserError(f"{arguments.validation_file} has labels {unknown}, the model knows {list(ids)}")
        labels = [ids[label_names[label]] for label in labels]
    return [rows[name][:] for name in ("text", "text_pair") if name in rows.column_names], labels


def predict(
    engine: Engine,
    subject: Subject,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Sequence[str]],
    batch_size: int,
) -> np.ndarray:
    """The outputs for all texts: (texts, labels)"""
    logits = []
    for start in tqdm(range(0, len(texts[0]), batch_size), desc="Evaluating", leave=False):
        batch = [column[start : start + batch_size] for column in texts]
        encoded = tokenizer(*batch, truncation=True, padding=True, return_tensors="pt")
        logits.append(engine({name: encoded[name] for name in subject.names})["logits"])
    return np.concatenate(logits)


def evaluate(
    engines: Mapping[str, Engine], subject: Subject, tokenizer: PreTrainedTokenizerBase, arguments: ExportArguments
) -> dict[str, dict[str, float]]:
    """The metrics of each engine on --validation_file."""
    config = subject.model.config
    texts, labels = load_validation(arguments, config)
    is_regression = config.problem_type == "regression"
    compute_metrics = choose_metrics(None if is_regression else config.num_labels)
    metrics = {}
    for name, engine in engines.items():
        logits = predict(engine, subject, tokenizer, texts, arguments.per_device_eval_batch_size)
        metrics[name] = compute_metrics(logits[:, 0] if is_regression else logits.argmax(-1), labels)
    return metrics


# The whole


def check_arguments(arguments: ExportArguments) -> None:
    """Raises `UserError` for what can be known to fail before the model is loaded."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(f"{' and '.join(missing)} must be installed: .venv/bin/pip install --editable '.[onnx]'")
    for name in ("num_repeats", "per_device_eval_batch_size", "atol"):
        if not getattr(arguments, name) > 0:
            raise UserError(f"--{name} must be more than 0, not {getattr(arguments, name)}")
    if min(arguments.timed_lengths, default=1) < 1:
        raise UserError(f"--timed_lengths must be at least 1, not {min(arguments.timed_lengths)}")
    output_dir = Path(arguments.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file; name a folder")
    if output_dir.is_dir() and any(output_dir.iterdir()) and not arguments.overwrite_output_dir:
        raise UserError(f"{output_dir} is not empty; empty it, or give --overwrite_output_dir true")


def publish(aside: Path, output_dir: Path) -> None:
    """Move all files to their place, and remove graphs of an earlier export that these would not belong to."""
    output_dir.mkdir(exist_ok=True)
    new = {path.name for path in aside.iterdir()}
    for stale in output_dir.glob("model*.onnx*"):
        if stale.name not in new:
            stale.unlink()
    for name in new:
        os.replace(aside / name, output_dir / name)


def megabytes(path: Path) -> float:
    """The size of a graph and of the weights beside it."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) / 1e6


def speed_and_quality(
    engines: Mapping[str, Engine], subject: Subject, tokenizer: PreTrainedTokenizerBase, arguments: ExportArguments
) -> dict[str, dict[str, Any]]:
    """What --timed_lengths and --validation_file ask for, of each engine."""
    measured: dict[str, dict[str, Any]] = {name: {} for name in engines}
    for length in arguments.timed_lengths:
        if length <= subject.model.config.max_position_embeddings:
            real = torch.ones([1] * (len(subject.axes()) - 1) + [length], dtype=torch.bool)
            inputs = subject.inputs(real, torch.Generator().manual_seed(arguments.seed))
            for name, milliseconds in time_engines(engines, inputs, arguments.num_repeats).items():
                measured[name][f"milliseconds_{length}"] = milliseconds
    if arguments.validation_file:
        for name, metrics in evaluate(engines, subject, tokenizer, arguments).items():
            measured[name] |= {f"eval_{metric}": value for metric, value in metrics.items()}
    return measured


def export_and_measure(
    subject: Subject, tokenizer: PreTrainedTokenizerBase, arguments: ExportArguments, folder: Path
) -> list[dict[str, Any]]:
    """Write all files into `folder`; a row of measurements for PyTorch and for each graph.

    Raises `UserError` if the graph is not PyTorch's model.
    """
    path, path_int8 = folder / "model.onnx", folder / "model_int8.onnx"
    export(subject, path)
    engines = {"PyTorch": torch_engine(subject.model), "onnxruntime": onnx_engine(path)}
    differences = compare(engines["PyTorch"], engines["onnxruntime"], subject, arguments.seed)
    refuse_difference(differences, arguments.atol)
    rows: dict[str, dict[str, Any]] = {
        "PyTorch": {"megabytes": subject.model.get_memory_footprint() / 1e6, "max_difference": 0.0},
        "onnxruntime": {"megabytes": megabytes(path), "max_difference": max(differences.values())},
    }
    if arguments.quantize == "int8":
        quantize_int8(path, path_int8)
        engines["onnxruntime int8"] = onnx_engine(path_int8)
        differences = compare(engines["PyTorch"], engines["onnxruntime int8"], subject, arguments.seed)
        worst = float(np.max(list(differences.values())))
        rows["onnxruntime int8"] = {"megabytes": megabytes(path_int8), "max_difference": worst}
    measured = speed_and_quality(engines, subject, tokenizer, arguments)
    subject.model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return [{"engine": name} | row | measured[name] for name, row in rows.items()]


def describe(subject: Subject, arguments: ExportArguments) -> dict[str, Any]:
    """What a results file says of the model and of how it was run."""
    return {
        "run_name": arguments.run_name,
        "model": arguments.model_name_or_path,
        "task": subject.task,
        "parameters": sum(parameter.numel() for parameter in subject.model.parameters()),
        **{key: getattr(subject.model.config, key) for key in DESCRIBED_KEYS},
        "num_threads": torch.get_num_threads(),
        **{package: version(package) for package in PACKAGES},
    }


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments([ExportArguments], argv, description=__doc__)
    check_arguments(arguments)
    subject, tokenizer = load(arguments)
    if arguments.validation_file and subject.task != "text-classification":
        raise UserError(f"--validation_file judges text-classification, and the task is {subject.task}")
    output_dir = Path(arguments.output_dir)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output_dir.name}.", dir=output_dir.parent) as name:
        rows = export_and_measure(subject, tokenizer, arguments, Path(name))
        publish(Path(name), output_dir)
    print(format_table([row | {"max_difference": f"{row['max_difference']:.1e}"} for row in rows]))
    if arguments.results_file:
        for row in rows:
            append_result(arguments.results_file, describe(subject, arguments) | row, arguments.seed, argv)


if __name__ == "__main__":
    run_main(main)
