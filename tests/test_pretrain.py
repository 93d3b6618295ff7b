"""scripts/pretrain.py end to end: what is learnt, the same however it is run and whatever interrupts it."""

import csv
import errno
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaForMaskedLM,
    pipeline,
)

import checkpointing
import common
import packing
import pretrain
import training
import unigram
from checkpointing import is_intact, list_checkpoints
from common import UserError
from hf_linformer import LinformerConfig
from packing import EVALUATION_SEED, MaskingCollator
from tiny import WORDS, tiny_config, tiny_tokenizer
from twin import make_twin


SIZES = {"model_type": "linformer", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 32, "projected_length": 6}
WITHOUT_DROPOUT = ["--config_overrides", "hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0"]
# Of these words each document of what can be learnt has one only, again and again.
FEW_WORDS = WORDS[:8]


def no_measurement(*args: object, **kwargs: object) -> float:
    """The peak of the machine takes seconds to measure."""
    return 1e12


@pytest.fixture(autouse=True)
def one_package(monkeypatch):
    """Pytest imports the root's __init__.py too, under the folder's name; the scripts know the package alone."""
    AutoConfig.register("linformer", LinformerConfig, exist_ok=True)
    monkeypatch.setattr(pretrain, "measure_peak", no_measurement)


def write_texts(path: Path, texts: list[str | None]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def random_texts(words: list[int], seed: int) -> list[str | None]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=number)) for number in words]


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A tokenizer, a configuration with dropout, and texts."""
    folder = tmp_path_factory.mktemp("pretrain")
    tiny_tokenizer(1).save_pretrained(folder / "tokenizer")
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    (folder / "linformer.json").write_text(json.dumps(SIZES | dropout))
    # 56 blocks of 32 tokens, 14 steps of 4; 9 blocks to evaluate on.
    write_texts(folder / "train.jsonl", random_texts([5 + 3 * (index % 17) for index in range(60)], seed=0))
    write_texts(folder / "validation.jsonl", random_texts([27] * 10, seed=1))
    for name, number in {"easy": 60, "easy_validation": 8}.items():
        generator = random.Random(number)
        texts = [" ".join([generator.choice(FEW_WORDS)] * (20 + 3 * (index % 17))) for index in range(number)]
        write_texts(folder / f"{name}.jsonl", texts)
    return folder


class Runs:
    """Runs of steps of 4 blocks of 32 tokens, with a line of the log each."""

    def __init__(self, data: Path, folder: Path):
        self.data, self.folder = data, folder

    def options(self, *given: object, output: str = "out", without: tuple[str, ...] = ()) -> list[str]:
        """Those given come last and so override."""
        options = {"config_name": self.data / "linformer.json", "tokenizer_name": self.data / "tokenizer"}
        options |= {"train_file": self.data / "train.jsonl", "validation_file": self.data / "validation.jsonl"}
        options |= {"output_dir": self.folder / output, "per_device_train_batch_size": 4, "seed": 3}
        options |= {"learning_rate": 1e-2, "logging_steps": 1}
        kept = [part for name, value in options.items() if name not in without for part in (f"--{name}", value)]
        return [str(option) for option in [*kept, *given]]

    def pretrain(self, *given: object, output: str = "out", without: tuple[str, ...] = ()) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        pretrain.main(self.options(*given, output=output, without=without))
        return self.folder / output


@pytest.fixture
def runs(data, tmp_path) -> Runs:
    return Runs(data, tmp_path)


def results(output_dir: Path) -> dict:
    return json.loads((output_dir / "all_results.json").read_text())


def history(output_dir: Path) -> list[dict]:
    return results(output_dir)["history"]


def log(output_dir: Path) -> list[dict]:
    """What was logged of single steps."""
    rows = [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def assert_same_curve(one: Path, other: Path, tolerance: float) -> None:
    assert len(log(one)) == len(log(other)) > 0
    for ours, theirs in zip(log(one), log(other)):
        assert ours == pytest.approx(theirs, rel=0, abs=tolerance)
    for ours, theirs in zip(history(one), history(other)):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)
    losses = [row["loss"] for row in log(one)]
    # Nothing is compared where nothing has moved.
    assert max(losses) - min(losses) > 100 * tolerance


def assert_same_end(one: Path, other: Path) -> None:
    """Bit for bit, and nothing half done is left."""
    assert (one / "log.jsonl").read_text() == (other / "log.jsonl").read_text() != ""
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert history(one) == history(other)
    assert not list(one.glob(".*.partial"))


class Spy:
    """Batches that a run learns from, and what happens on the way."""

    def __init__(
        self, patch: pytest.MonkeyPatch, at: int = 0, happens: Callable[[Tensor], Tensor] = lambda loss: loss
    ):
        """happens: to the loss of the `at`-th batch, from 1"""
        self.batches: list[dict[str, Tensor]] = []
        real = pretrain.masked_lm_loss

        def watched(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
            self.batches.append({name: values.clone() for name, values in batch.items()})
            loss = real(model, batch)
            return happens(loss) if len(self.batches) == at else loss

        patch.setattr(pretrain, "masked_lm_loss", watched)


# What is learnt


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory) -> dict[str, Path]:
    """A run for each kind of model on texts whose words can be told from those around them."""
    changes = {"linear": "", "mean_pool": "projection_type=mean_pool,local_window=4,", "roberta": ""}
    kinds = {
        kind: ["--config_overrides", f"hidden_size=32,{change}{WITHOUT_DROPOUT[1]}"]
        for kind, change in changes.items()
    }
    kinds["roberta"] += ["--architecture", "roberta"]
    runs = Runs(data, tmp_path_factory.mktemp("trained"))
    given = ["--train_file", data / "easy.jsonl", "--validation_file", data / "easy_validation.jsonl"]
    given += ["--max_train_steps", 100, "--per_device_train_batch_size", 8, "--eval_steps", 50]
    given += ["--per_device_eval_batch_size", 2, "--max_eval_samples", 5]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "measure_peak", no_measurement)
        return {kind: runs.pretrain(*given, *more, output=kind) for kind, more in kinds.items()}


KINDS = ["linear", "mean_pool", "roberta"]


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns(kind, trained):
    first, last = history(trained[kind])
    losses = [row["loss"] for row in log(trained[kind])]
    assert [row["step"] for row in log(trained[kind])] == [*range(1, 101)]
    # Who knows how often each word comes, and nothing of the words around, has the logarithm of their number.
    alone = math.log(len(FEW_WORDS))
    assert losses[0] > 3.3 and sum(losses[-5:]) / 5 < alone - 0.5
    assert last["eval_loss"] < alone - 0.5 and last["eval_loss"] < first["eval_loss"]
    assert (first["step"], last["step"]) == (50, 100)
    for row, part in ((first, losses[:50]), (last, losses[50:])):
        assert row["eval_perplexity"] == pytest.approx(math.exp(row["eval_loss"]), rel=1e-6)
        assert row["train_loss"] == pytest.approx(sum(part) / 50, rel=1e-6)
    assert results(trained[kind])["tokens"] == log(trained[kind])[-1]["tokens"]


def literal_loss(folder: Path, file: Path, length: int, most: int) -> float:
    """The mean loss over the masked tokens of `most` blocks at even distances, one token after the other."""
    tokenizer = tiny_tokenizer(1)
    tokens: list[int] = []
    for line in file.read_text().splitlines():
        tokens += [*map(tokenizer.convert_tokens_to_ids, json.loads(line)["text"].split()), tokenizer.sep_token_id]
    number = len(tokens) // (length - 2)
    chosen = [round(index * (number - 1) / (most - 1)) for index in range(most)]
    assert most < number and len(set(chosen)) == most
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    losses = []
    for block in chosen:
        inside = tokens[block * (length - 2) : (block + 1) * (length - 2)]
        ids = torch.tensor([tokenizer.cls_token_id, *inside, tokenizer.sep_token_id])
        collate = MaskingCollator(tokenizer, 0.15, EVALUATION_SEED)
        batch = collate([{"input_ids": ids.numpy(), "documents": (0, 0), "key": (0, block)}])
        with torch.no_grad():
            logits = model(batch["input_ids"]).logits[0].double()
        for position, label in enumerate(batch["labels"][0].tolist()):
            if label != -100:
                scores = [math.exp(score) for score in logits[position].tolist()]
                losses.append(-math.log(scores[label] / sum(scores)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_measured_is_what_is_saved(kind, trained, data):
    literal = literal_loss(trained[kind], data / "easy_validation.jsonl", 32, 5)
    assert history(trained[kind])[-1]["eval_loss"] == pytest.approx(literal, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_folder_is_whole(kind, trained):
    names = {path.name for path in trained[kind].iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "training_args.json", "all_results.json"} <= names
    assert not [name for name in names if "partial" in name or name.startswith(".")]
    model, report = AutoModelForMaskedLM.from_pretrained(trained[kind], output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    config = json.loads((trained[kind] / "config.json").read_text())
    if kind == "roberta":
        assert type(model) is RobertaForMaskedLM and config["architectures"] == ["RobertaForMaskedLM"]
    else:
        assert {"configuration_linformer.py", "modeling_linformer.py"} <= names
        assert "AutoModelForMaskedLM" in config["auto_map"]
        assert config["architectures"] == ["LinformerForMaskedLM"]
    tokenizer = AutoTokenizer.from_pretrained(trained[kind])
    assert tokenizer.model_max_length == 32
    assert json.loads((trained[kind] / "training_args.json").read_text())["learning_rate"] == 1e-2

    filled = pipeline("fill-mask", model=str(trained[kind]))(f"{' to' * 12} {tokenizer.mask_token}{' to' * 12}")
    assert {filling["token_str"] for filling in filled} <= {*FEW_WORDS}


def test_the_best_evaluation_is_what_is_saved(runs, monkeypatch):
    values = iter([3.0, 2.0, 5.0, 4.0])

    def evaluate(accelerator: Accelerator, model: torch.nn.Module, loader: object) -> dict[str, float]:
        return {"loss": next(values), "perplexity": 1.0}

    monkeypatch.setattr(pretrain, "evaluate_model", evaluate)
    output_dir = runs.pretrain("--eval_steps", 2, "--early_stopping_patience", 2, "--max_train_steps", 20)
    assert [row["eval_loss"] for row in history(output_dir)] == [3.0, 2.0, 5.0, 4.0]
    weights = [load_file(output_dir / name / "model.safetensors") for name in ("", "checkpoint-4", "checkpoint-8")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


@pytest.mark.parametrize("kind", ["linear", "roberta"])
def test_it_goes_on_from_a_model(kind, trained, runs, data):
    """With the loss that it ended with: the first step has no learning rate yet."""
    given = ["--model_name_or_path", trained[kind], "--max_eval_samples", 5, "--max_train_steps", 1]
    given += ["--train_file", data / "easy.jsonl", "--validation_file", data / "easy_validation.jsonl"]
    output_dir = runs.pretrain(*given, without=("config_name", "tokenizer_name"))
    assert history(output_dir)[0]["eval_loss"] == pytest.approx(history(trained[kind])[-1]["eval_loss"], abs=1e-6)
    assert json.loads((output_dir / "config.json").read_text())["model_type"] == (
        "roberta" if kind == "roberta" else "linformer"
    )


def test_held_out_text_is_masked_alike_whatever_the_seed(trained, runs, data):
    losses = set()
    for seed in (1, 2):
        given = ["--model_name_or_path", trained["linear"], "--seed", seed, "--max_train_steps", 1]
        given += ["--validation_file", data / "easy_validation.jsonl", *WITHOUT_DROPOUT]
        output_dir = runs.pretrain(*given, output=str(seed), without=("config_name",))
        losses.add(history(output_dir)[0]["eval_loss"])
    assert len(losses) == 1
    # What it learns from is masked by the seed.
    assert log(runs.folder / "1")[0]["loss"] != log(runs.folder / "2")[0]["loss"]


def test_rows_of_results(runs, tmp_path, capsys):
    table = tmp_path / "results/pretraining.csv"
    given = ["--max_train_steps", 6, "--eval_steps", 4, "--results_file", table, "--run_name", "words"]
    output_dir = runs.pretrain(*given)
    printed = capsys.readouterr().out
    assert re.search(r"epoch +step +train_loss +eval_loss +eval_perplexity", printed) and str(output_dir) in printed
    # Gone on with, there is nothing to be added.
    runs.pretrain(*given, "--resume_from_checkpoint", "last")
    with table.open() as file:
        rows = list(csv.DictReader(file))
    weights = sum(weight.numel() for weight in load_file(output_dir / "model.safetensors").values())
    assert [row["step"] for row in rows] == ["4", "6"]
    for row, expected in zip(rows, history(output_dir)):
        assert (row["run_name"], row["model"], row["seed"], row["max_length"]) == ("words", "linformer", "3", "32")
        assert (row["projection_type"], row["projected_length"], row["tokens"]) == (
            "linear",
            "6",
            str(128 * expected["step"]),
        )
        assert int(row["parameters"]) == weights and "--run_name words" in row["command"]
        for name, key in {"train_loss": "train_loss", "validation_loss": "eval_loss"}.items():
            assert float(row[name]) == pytest.approx(expected[key], rel=1e-5)
        assert float(row["validation_perplexity"]) == pytest.approx(expected["eval_perplexity"], rel=1e-5)


# The twin


def test_the_twin_learns_from_the_same_blocks_with_the_same_masks(runs, monkeypatch):
    spy = Spy(monkeypatch)
    for architecture in ("linformer", "roberta"):
        given = ["--architecture", architecture, "--max_train_steps", 20, *WITHOUT_DROPOUT]
        output_dir = runs.pretrain(*given, output=architecture)
    seen = spy.batches[:20], spy.batches[20:]
    assert len(seen[0]) == len(seen[1]) == 20
    for ours, theirs in zip(*seen):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    # Nothing in the second epoch is as it was in the first.
    assert not torch.equal(seen[0][0]["labels"], seen[0][14]["labels"])

    ours, theirs = (AutoConfig.from_pretrained(runs.folder / name) for name in ("linformer", "roberta"))
    for name in SIZES.keys() - {"model_type", "max_position_embeddings", "projected_length"}:
        assert getattr(theirs, name) == getattr(ours, name), name
    assert theirs.pad_token_id == ours.pad_token_id == 1 and theirs.max_position_embeddings == 32 + 2
    assert log(output_dir)[-1]["tokens"] == log(runs.folder / "linformer")[-1]["tokens"] == 20 * 128


def test_token_frequencies_are_what_a_model_must_beat(data, tmp_path, capsys):
    given = ["--tokenizer_name", data / "tokenizer", "--train_file", data / "train.jsonl", "--max_length", 32]
    given += ["--validation_file", data / "validation.jsonl", "--results_file", tmp_path / "results.csv"]
    unigram.main([str(option) for option in given])
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    train, held_out = (
        [json.loads(line)["text"] for line in (data / f"{name}.jsonl").open()] for name in ("train", "validation")
    )
    counts = Counter(token for ids in tokenizer(train, add_special_tokens=False)["input_ids"] for token in ids)
    total = sum(counts.values()) + len(tokenizer)
    blocks = packing.PackedBlocks(
        packing.tokenize_documents(Dataset.from_dict({"text": held_out}), tokenizer, None, ""),
        32,
        packing.Frame.of(tokenizer),
    )
    batch = packing.MaskingCollator(tokenizer, 0.15, packing.EVALUATION_SEED)([blocks[i] for i in range(len(blocks))])
    asked = batch["labels"][batch["labels"] != -100].tolist()
    loss = sum(-math.log((counts[token] + 1) / total) for token in asked) / len(asked)
    (row,) = csv.DictReader((tmp_path / "results.csv").open())
    assert float(row["validation_loss"]) == pytest.approx(loss, rel=1e-5)
    assert f"perplexity {math.exp(loss):,.1f} on 9 blocks" in capsys.readouterr().out
    with pytest.raises(UserError, match="not enough for one block of 4000"):
        unigram.main([str(option) for option in [*given, "--max_length", 4000]])


@pytest.mark.parametrize("architecture", ["linformer", "roberta"])
def test_a_tokenizer_of_bert(architecture, runs, tmp_path):
    tiny_tokenizer(0).save_pretrained(tmp_path / "bert")
    given = ["--tokenizer_name", tmp_path / "bert", "--architecture", architecture, "--max_train_steps", 3]
    config = AutoConfig.from_pretrained(runs.pretrain(*given))
    assert config.pad_token_id == 0
    assert config.max_position_embeddings == (33 if architecture == "roberta" else 32)


def some_labels() -> tuple[Tensor, Tensor]:
    """Rows with different numbers of labels, one with none."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(2, 53, (4, 19), generator=generator)
    chosen = torch.rand(4, 19, generator=generator) < torch.tensor([[0.1], [0.5], [0.0], [0.9]])
    assert sorted(chosen.sum(dim=-1).tolist())[0] == 0 < sorted(chosen.sum(dim=-1).tolist())[1]
    return input_ids, input_ids.roll(1).where(chosen, -100)


def test_logits_of_labels_alone_give_the_same_loss_and_gradients():
    input_ids, labels = some_labels()
    found = []
    for sparse in (True, False):
        torch.manual_seed(0)
        twin = make_twin(tiny_config(sparse_prediction=sparse, pad_token_id=1)).eval()
        output = twin(input_ids, labels=labels)
        output.loss.backward()
        found.append((output, {name: parameter.grad for name, parameter in twin.named_parameters()}))
        assert twin(input_ids).logits.shape == (4, 19, 53)
    (sparse_output, sparse_gradients), (output, gradients) = found
    torch.testing.assert_close(sparse_output.loss, output.loss)
    assert sparse_output.logits.shape == ((labels != -100).sum(), 53)
    torch.testing.assert_close(sparse_output.logits, output.logits[labels != -100])
    assert any(gradient is not None and gradient.abs().max() > 1e-3 for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(sparse_gradients[name], gradient, msg=name)


def test_the_saved_twin_is_a_roberta(tmp_path):
    torch.manual_seed(0)
    twin = make_twin(tiny_config(sparse_prediction=True, pad_token_id=1)).eval()
    twin.save_pretrained(tmp_path)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert type(model) is RobertaForMaskedLM
    input_ids, labels = some_labels()
    with torch.no_grad():
        assert torch.equal(model(input_ids).logits, twin(input_ids).logits)
        torch.testing.assert_close(model(input_ids, labels=labels).loss, twin(input_ids, labels=labels).loss)
    # As many tokens as its Linformer takes, and not one more.
    assert model(torch.full((1, 37), 5)).logits.shape == (1, 37, 53)
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, 38), 5))


# The same however it is run


def test_a_compiled_model_is_saved_under_its_own_names(runs, monkeypatch):
    def without_compiler(**given: object) -> Accelerator:
        return Accelerator(**given | {"dynamo_backend": "eager" if given["dynamo_backend"] else None})

    monkeypatch.setattr(training, "Accelerator", without_compiler)
    given = ["--max_train_steps", 4, *WITHOUT_DROPOUT]
    plain, compiled = runs.pretrain(*given), runs.pretrain(*given, "--torch_compile", "true", output="compiled")
    assert_same_curve(plain, compiled, tolerance=1e-5)
    weights = [load_file(path / "model.safetensors") for path in (plain, compiled)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", ["linformer", "roberta"])
@pytest.mark.parametrize(
    "more",
    [["--sparse_prediction", "false"], ["--gradient_checkpointing", "true"], ["--dataloader_num_workers", 2]],
    ids=["full_prediction", "gradient_checkpointing", "workers"],
)
def test_options_that_change_no_number(architecture, more, runs):
    given = ["--architecture", architecture, "--max_train_steps", 16, "--eval_steps", 5]
    if "--sparse_prediction" in more:
        # The head draws no dropout, but torch does not promise that it draws the same for other shapes.
        given += WITHOUT_DROPOUT
    plain, other = runs.pretrain(*given, output="plain"), runs.pretrain(*given, *more, output="other")
    assert_same_curve(plain, other, tolerance=1e-5)


@pytest.mark.parametrize("architecture", ["linformer", "roberta"])
def test_a_step_is_the_same_however_it_is_divided(architecture, runs, monkeypatch):
    spy = Spy(monkeypatch)
    given = ["--architecture", architecture, "--num_train_epochs", 2, "--train_file", runs.data / "train.jsonl"]
    # 53 blocks: the last step of an epoch has 5 of them.
    write_texts(runs.folder / "train.jsonl", random_texts([53 * 30 - 1], seed=5))
    given += [*WITHOUT_DROPOUT, "--train_file", runs.folder / "train.jsonl"]
    whole = runs.pretrain(*given, "--per_device_train_batch_size", 8, output="whole")
    parts = runs.pretrain(
        *given, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 4, output="parts"
    )
    assert_same_curve(whole, parts, tolerance=1e-5)
    assert [len(log(path)) for path in (whole, parts)] == [14, 14]
    counts = {int((batch["labels"] != -100).sum()) for batch in spy.batches[14:]}
    # A mean of the parts' means would be something else.
    assert len(counts) > 5 and max(counts) > 2 * min(counts)


def test_a_step_may_have_no_masked_token(runs, monkeypatch):
    spy = Spy(monkeypatch)
    given = ["--per_device_train_batch_size", 1, "--max_length", 8, "--mlm_probability", 0.1, "--max_train_steps", 30]
    output_dir = runs.pretrain(*given)
    counts = [int((batch["labels"] != -100).sum()) for batch in spy.batches]
    empty = [row for row, masked in zip(log(output_dir), counts) if masked == 0]
    assert 0 < len(empty) < 30
    assert {(row["loss"], row["grad_norm"]) for row in empty} == {(0.0, 0.0)}
    assert all(0 < row["loss"] < 10 for row, masked in zip(log(output_dir), counts) if masked)


@pytest.mark.parametrize("architecture", ["linformer", "roberta"])
def test_bf16(architecture, runs):
    given = ["--max_train_steps", 12, *WITHOUT_DROPOUT, "--architecture", architecture]
    exact = runs.pretrain(*given, output="exact")
    output_dir = runs.pretrain(*given, "--mixed_precision", "bf16")
    ours, theirs = ([row["loss"] for row in log(path)] for path in (output_dir, exact))
    assert ours == pytest.approx(theirs, abs=0.05) and ours[-1] < ours[0] - 0.1
    assert ours != pytest.approx(theirs, abs=1e-5)
    assert {weight.dtype for weight in load_file(output_dir / "model.safetensors").values()} == {torch.float32}


def test_what_a_tracker_gets(runs):
    given = ["--max_train_steps", 6, "--eval_steps", 3, "--with_tracking", "true", "--report_to", "tensorboard"]
    output_dir = runs.pretrain(*given, "--run_name", "mine")
    events = EventAccumulator(str(output_dir / "mine"))
    events.Reload()
    for name in ("loss", "learning_rate", "grad_norm", "tokens"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in log(output_dir)]
    found = [(event.step, event.value) for event in events.Scalars("eval_loss")]
    assert found == [(row["step"], pytest.approx(row["eval_loss"], rel=1e-6)) for row in history(output_dir)]


def test_the_work_is_counted_as_training_masks(runs, monkeypatch):
    """The head of a sparse prediction sees what is masked; held-out text is masked at another rate."""
    shares = []

    def noted(accelerator, model, batch):
        shares.append((batch["labels"] != -100).float().mean().item())
        return 1.0

    monkeypatch.setattr(pretrain, "tokens_per_second_at_peak", noted)
    runs.pretrain("--mlm_probability", 0.8, "--max_train_steps", 1)
    assert len(shares) == 1 and 0.6 < shares[0] < 0.95


def test_how_near_the_peak_it_is():
    """The tokens of a second at a peak of one operation a second are the inverse of a token's operations."""
    accelerator = Accelerator(cpu=True)
    n, d, i, layers, v = 24, 20, 27, 2, 53
    twin = make_twin(tiny_config(sparse_prediction=False, pad_token_id=1))
    batch = {"input_ids": torch.full((3, n), 5), "labels": torch.full((3, n), 5)}
    speed = pretrain.tokens_per_second_at_peak(accelerator, twin, batch)
    # Products of a token: queries, keys, values and output; scores and their sum; two of the feed-forward layer; head.
    operations = 2 * (layers * (4 * d * d + 2 * n * d + 2 * d * i) + d * d + d * v)
    assert speed == pytest.approx(1e12 / (3 * operations), rel=1e-6)
    assert all(parameter.grad is None for parameter in twin.parameters())


# Where texts come from


def test_what_a_text_of_a_file_is(runs, capsys):
    files = {"a.txt": "the of and\nto in\n\na that\n\n\nfor\n", "b.txt": "be our we\n\n\nis this by\nit\n"}
    for name, content in files.items():
        (runs.folder / name).write_text(content)
    words = sum(len(content.split()) for content in files.values())
    given = ["--train_file", *(runs.folder / name for name in files), "--max_length", 8, "--max_train_steps", 1]
    for sample_by, number in {"line": 7, "paragraph": 5, "document": 2}.items():
        runs.pretrain(*given, "--sample_by", sample_by, output=sample_by)
        # A separator after each.
        blocks = (words + number) // 6
        assert f"{words + number} tokens in {blocks} blocks of 8 to train on" in capsys.readouterr().out


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_held_out_text_can_be_a_split_of_a_data_set(streaming, runs):
    folder = runs.folder / "texts"
    folder.mkdir()
    for name in ("train", "validation"):
        pd.read_json(runs.data / f"{name}.jsonl", lines=True).to_parquet(folder / f"{name}.parquet")
    without = ("train_file", "validation_file")
    given = ["--max_train_steps", 8, "--streaming", streaming]
    by_split = runs.pretrain(
        *given, "--dataset_name", folder, "--validation_split", "validation", output="split", without=without
    )
    by_file = runs.pretrain(*given, output="file")
    assert_same_end(by_split, by_file)


def test_a_share_is_held_out_and_not_learnt_from(runs, monkeypatch, capsys):
    """Each document has words of its own number, so that those of a block tell which documents it is of."""
    spy = Spy(monkeypatch)
    texts = [" ".join([WORDS[index]] * 30) for index in range(20)]
    write_texts(runs.folder / "texts.jsonl", texts)
    given = ["--train_file", runs.folder / "texts.jsonl", "--validation_split_percentage", 25, "--num_train_epochs", 1]
    evaluated: list[Tensor] = []
    real = pretrain.inputs_of

    def watched(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        evaluated.append(batch["input_ids"].where(batch["labels"] == -100, batch["labels"]))
        return real(batch)

    monkeypatch.setattr(pretrain, "inputs_of", watched)
    runs.pretrain(*given, without=("validation_file",))
    learnt = torch.cat([batch["input_ids"].where(batch["labels"] == -100, batch["labels"]) for batch in spy.batches])
    # What is looked at, and not learnt from, is held out.
    everything = {token for rows in evaluated for token in rows.flatten().tolist() if token >= 5}
    in_training = {token for token in learnt.flatten().tolist() if token >= 5}
    assert len(in_training) == 15 and len(everything) == 20
    assert f"{15 * 31} tokens in 15 blocks" in capsys.readouterr().out


def test_a_stream_learns_from_all_its_text_and_evaluates_on_the_file(runs, monkeypatch):
    spy = Spy(monkeypatch)
    output_dir = runs.pretrain(
        "--streaming", "true", "--max_train_steps", 40, "--shuffle_window", 10, "--eval_steps", 20, *WITHOUT_DROPOUT
    )
    texts = [json.loads(line)["text"].split() for line in (runs.data / "train.jsonl").open()]
    tokens = sum(len(words) + 1 for words in texts)
    rows = torch.cat([batch["input_ids"].where(batch["labels"] == -100, batch["labels"]) for batch in spy.batches])
    learnt = rows[: tokens // 30].flatten().tolist()
    tokenizer = tiny_tokenizer(1)
    found = {word: learnt.count(tokenizer.convert_tokens_to_ids(word)) for word in WORDS}
    expected = {word: sum(words.count(word) for words in texts) for word in WORDS}
    # But for a window at the end of the pass, each word as often as it is written.
    assert sum(abs(found[word] - expected[word]) for word in WORDS) < 0.25 * tokens
    assert results(output_dir)["tokens"] == 40 * 128
    assert [row["epoch"] for row in history(output_dir)] == [0.5, 1]
    assert history(output_dir)[-1]["eval_loss"] < history(output_dir)[0]["eval_loss"]


def test_more_workers_than_files_are_not_started(runs):
    output_dir = runs.pretrain("--streaming", "true", "--max_train_steps", 3, "--dataloader_num_workers", 3)
    assert len(log(output_dir)) == 3


# Going on


def forkserver():
    """Processes that begin with torch and the script imported."""
    folders = [str(Path(pretrain.__file__).parent), str(Path(__file__).parent)]
    os.environ["PYTHONPATH"] = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pretrain", __name__])
    return context


def half_written(path: Path) -> None:
    Path(path).write_text('{"half": [1, ')


def half_removed(path: Path) -> None:
    for index, file in enumerate(sorted(path.iterdir())):
        if index % 2 and file.is_file():
            file.unlink()


def half_a_line(writer: training.Log) -> None:
    with writer.path.open("a") as file:
        file.write('{"step": 1')


# What a process may be doing as it is killed: a function, which of its calls are meant, and what it has done by then.
MOMENTS: dict[str, tuple] = {
    "states are written": (torch, "save", lambda *args: True, lambda *args: None),
    "progress is written": (checkpointing, "write_json", lambda path, _: path.name == "progress.json", half_written),
    "checksums are written": (
        checkpointing,
        "write_json",
        lambda path, _: path.name == "checksums.json",
        half_written,
    ),
    "a checkpoint is put in place": (Path, "rename", lambda path, _: "checkpoint" in path.name, lambda path: None),
    "an old one is removed": (shutil, "rmtree", lambda path, **_: path.name[0] == "c" and path.exists(), half_removed),
    "a line is logged": (training.Log, "write", lambda *args: True, half_a_line),
    "the log is cut": (training, "write_aside", lambda path: path.name == "log.jsonl", lambda path: None),
    "the model is put in place": (Path, "replace", lambda path, _: path.parent.name == ".model.partial", lambda _: 0),
}


def die_when(moment: str, nth: int) -> None:
    """Make this process kill itself at the `nth` time of something."""
    owner, name, is_meant, happens = MOMENTS[moment]
    real, calls = getattr(owner, name), count(1)

    def replaced(*args: object, **kwargs: object) -> object:
        if is_meant(*args, **kwargs) and next(calls) == nth:
            happens(args[0])
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, replaced)


def run_script(
    arguments: list[str], moment: tuple[str, int] | None = None, limit: int | None = None, report: Path | None = None
) -> None:
    """In a process of its own: the script. limit: bytes that a file can have, report: where its error goes"""
    pretrain.measure_peak = no_measurement
    # As where a command began it: processes that read ahead are forked from it, not from the server.
    multiprocessing.set_start_method("fork", force=True)
    # A terminal sends its signals to a group.
    os.setpgid(0, 0)
    if moment is not None:
        die_when(*moment)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        pretrain.main(arguments)
    except UserError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if report is not None:
            report.write_text(str(error))
        sys.exit(2)


def run(arguments: list[str], until: Callable[[], bool] = lambda: False, **how: object) -> int | None:
    """The exit code of the script, which is killed once `until` is true; 0: it came to its end."""
    process = forkserver().Process(target=run_script, args=(arguments,), kwargs=how)
    process.start()
    deadline = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < deadline and not until():
        time.sleep(0.001)
    process.kill()
    process.join()
    return process.exitcode


def newest(output_dir: Path) -> int:
    return max(list_checkpoints(output_dir), default=0)


def some_time_after(output_dir: Path, step: int, seconds: float) -> Callable[[], bool]:
    seen: list[float] = []

    def until() -> bool:
        if not seen and newest(output_dir) >= step:
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() - seen[0] >= seconds

    return until


# 40 steps over three epochs, with an evaluation in between.
LONG = ["--max_train_steps", 40, "--eval_steps", 9, "--save_total_limit", 2]


@pytest.fixture(scope="session")
def whole(data, tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    runs = Runs(data, tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "measure_peak", no_measurement)
        output_dir = runs.pretrain(*LONG)
    shutil.rmtree(output_dir / "checkpoint-36")
    assert [row["step"] for row in history(output_dir)] == [9, 18, 27, 36, 40]
    return output_dir


def seconds_or_steps(output_dir: Path, seconds: float, steps: int) -> Callable[[], bool]:
    """Whichever comes first: a fast machine would be at its end."""
    deadline, step = time.monotonic() + seconds, newest(output_dir) + steps
    return lambda: time.monotonic() >= deadline or newest(output_dir) >= step


@pytest.mark.slow
def test_it_resumes_exactly_after_being_killed_twenty_times(runs):
    given = ["--max_train_steps", 150, "--eval_steps", 25]
    whole = runs.pretrain(*given, output="whole")
    generator = random.Random(0)
    arguments = runs.options(*given, "--checkpointing_steps", 2, "--resume_from_checkpoint", "last")
    output_dir = runs.folder / "out"
    moments = [
        *[("states are written", 2), ("progress is written", 3), ("an old one is removed", 1)],
        *[("a line is logged", 4), ("checksums are written", 2), ("a checkpoint is put in place", 2)],
        *[("the log is cut", 1), ("states are written", 5)],
    ]
    for index in range(20):
        if index % 5 in (1, 3):
            code = run(arguments, moment=moments.pop(0))
        elif index % 5 == 4:
            # While it begins, or a little later.
            code = run(arguments, until=seconds_or_steps(output_dir, generator.uniform(0, 0.6), 4))
        else:
            seen = some_time_after(output_dir, newest(output_dir) + 2, generator.uniform(0, 0.02))
            code = run(arguments, until=seen)
        assert code == -signal.SIGKILL, f"kill {index}"
        assert not (output_dir / "all_results.json").exists()
    # Eight of the runs went on for two steps at least.
    assert not moments and 16 <= newest(output_dir) < 150
    assert run(arguments, moment=("the model is put in place", 2)) == -signal.SIGKILL
    assert run(arguments) == 0
    assert_same_end(output_dir, whole)
    # The checkpoints that are left: the newest two and those that they call the best.
    assert all(is_intact(path) for path in list_checkpoints(output_dir).values())
    rows = [row for row in history(whole) if row["step"] <= 148], history(whole)
    bests = {min(known, key=lambda row: row["eval_loss"])["step"] for known in rows}
    assert set(list_checkpoints(output_dir)) == {148, 150, *bests}


@pytest.mark.slow
@pytest.mark.parametrize("architecture, workers", [("linformer", 0), ("roberta", 0), ("linformer", 2)])
def test_a_stream_resumes_exactly_after_being_killed(architecture, workers, runs):
    generator = random.Random(workers)
    halves = (runs.data / "train.jsonl").read_text().splitlines(keepends=True)
    files = [runs.folder / "first.jsonl", runs.folder / "second.jsonl"]
    for path, lines in zip(files, (halves[:35], halves[35:])):
        path.write_text("".join(lines))
    given = ["--streaming", "true", "--train_file", *files, "--shuffle_window", 7, "--max_train_steps", 48]
    given += ["--dataloader_num_workers", workers, "--architecture", architecture, "--eval_steps", 15]
    whole = runs.pretrain(*given, output="whole")
    arguments = runs.options(*given, "--checkpointing_steps", 1, "--resume_from_checkpoint", "last")
    output_dir = runs.folder / "out"
    for step in (3, 9, 16, 27):
        until = some_time_after(output_dir, step, generator.uniform(0, 0.02))
        assert run(arguments, until=until) == -signal.SIGKILL
        assert step <= newest(output_dir) < 48
    assert run(arguments, moment=("progress is written", 2)) == -signal.SIGKILL
    assert run(arguments) == 0
    assert_same_end(output_dir, whole)


def test_a_finished_run_resumes_to_itself(runs, whole):
    shutil.copytree(whole, runs.folder / "out")
    runs.pretrain(*LONG, "--resume_from_checkpoint", "last")
    assert_same_end(runs.folder / "out", whole)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_signal_ends_it_with_a_checkpoint(number, code, streaming, runs, whole, monkeypatch, capsys):
    def send(loss: Tensor) -> Tensor:
        os.kill(os.getpid(), number)
        return loss

    handler = signal.getsignal(number)
    given = [*LONG, "--streaming", streaming]
    if streaming == "true":
        whole = runs.pretrain(*given, output="whole")
    with pytest.MonkeyPatch.context() as patch:
        Spy(patch, 5, send)
        with pytest.raises(SystemExit) as caught:
            runs.pretrain(*given)
    assert caught.value.code == code and signal.getsignal(number) is handler
    output_dir = runs.folder / "out"
    assert [*list_checkpoints(output_dir)] == [5] and is_intact(output_dir / "checkpoint-5")
    assert [row["step"] for row in log(output_dir)] == [1, 2, 3, 4, 5]
    assert "stopped by a signal after step 5; --resume_from_checkpoint last goes on" in capsys.readouterr().out
    runs.pretrain(*given, "--resume_from_checkpoint", "last")
    assert_same_end(output_dir, whole)


def test_a_signal_during_an_evaluation_waits_for_the_next_step(runs, whole):
    real = pretrain.evaluate_model

    def evaluate(*given: object) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "evaluate_model", evaluate)
        with pytest.raises(SystemExit):
            runs.pretrain(*LONG)
    assert [*list_checkpoints(runs.folder / "out")] == [9, 10]
    runs.pretrain(*LONG, "--resume_from_checkpoint", "last")
    assert_same_end(runs.folder / "out", whole)


def test_a_signal_in_the_last_step_lets_it_end(runs, monkeypatch):
    def send(loss: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return loss

    Spy(monkeypatch, 4, send)
    output_dir = runs.pretrain("--max_train_steps", 4)
    assert history(output_dir)[-1]["step"] == 4 and (output_dir / "model.safetensors").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_signal_to_all_processes_that_read_ahead_too(number, streaming, runs):
    """As Ctrl-C does, and whoever else signals a process group."""
    files = [runs.folder / "first.jsonl", runs.folder / "second.jsonl"]
    for path in files:
        shutil.copy(runs.data / "train.jsonl", path)
    given = ["--max_train_steps", 300, "--eval_steps", 150, "--dataloader_num_workers", 2, "--streaming", streaming]
    arguments = runs.options(*given, "--train_file", *files)
    output_dir = runs.folder / "out"
    report = runs.folder / "report"
    process = forkserver().Process(target=run_script, args=(arguments,), kwargs={"report": report})
    process.start()
    deadline = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
        if (output_dir / "log.jsonl").exists() and len(log(output_dir)) >= 3:
            break
    os.killpg(process.pid, number)
    process.join(120)
    process.kill()
    assert process.exitcode == 128 + number, report.read_text() if report.exists() else "a traceback"
    (step,) = list_checkpoints(output_dir)
    assert step == log(output_dir)[-1]["step"] < 300 and is_intact(output_dir / f"checkpoint-{step}")


@pytest.fixture
def stopped(runs, data) -> Path:
    """The folder of a run that was stopped after step 13, with checkpoints of 10, 12 and 13."""
    with pytest.MonkeyPatch.context() as patch:
        Spy(patch, 13, lambda loss: [loss, os.kill(os.getpid(), signal.SIGTERM)][0])
        with pytest.raises(SystemExit):
            runs.pretrain(*LONG, "--checkpointing_steps", 2, "--save_total_limit", 3)
    assert {10, 12, 13} <= set(list_checkpoints(runs.folder / "out"))
    return runs.folder / "out"


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: spoil(folder / "model.safetensors"),
        lambda folder: (folder / "optimizer.bin").unlink(),
        lambda folder: spoil(folder / "progress.json"),
        lambda folder: [path.unlink() for path in folder.iterdir()],
    ],
    ids=["weights", "optimizer", "progress", "everything"],
)
def test_a_damaged_checkpoint_is_passed_over(damage, runs, stopped, whole, capsys):
    damage(stopped / "checkpoint-13")
    runs.pretrain(*LONG, "--checkpointing_steps", 2, "--resume_from_checkpoint", "last")
    shown = capsys.readouterr()
    assert f"warning: {stopped / 'checkpoint-13'} is damaged; trying the one before it" in shown.err
    assert f"resumed from {stopped / 'checkpoint-12'}" in shown.out
    assert_same_end(stopped, whole)


def test_what_a_resumed_run_may_change_and_what_not(runs, stopped, whole, data):
    more = write_texts(runs.folder / "more.jsonl", random_texts([50] * 60, seed=2))
    changed = {
        "learning_rate was 0.01 and is 0.02; mlm_probability was 0.15 and is 0.2": [
            *("--mlm_probability", 0.2, "--learning_rate", 0.02)
        ],
        "sparse_prediction was True and is False": ["--sparse_prediction", "false"],
        "train_file was .*train.jsonl.* and is .*more.jsonl.*; training tokens was 1692 and is 3060": [
            *("--train_file", more)
        ],
        "streaming was False and is True": ["--streaming", "true"],
        "seed was 3 and is 4": ["--seed", 4],
    }
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    for message, given in changed.items():
        with pytest.raises(UserError, match=f"cannot resume .*checkpoint-13 with other arguments: .*{message}") as e:
            runs.pretrain(*LONG, "--resume_from_checkpoint", "last", *given)
        assert "\n" not in str(e.value)
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before
    free = ["--checkpointing_steps", 5, "--save_total_limit", 1, "--run_name", "other", "--dataloader_num_workers", 2]
    runs.pretrain(*LONG, "--resume_from_checkpoint", "last", *free)
    assert_same_end(stopped, whole)


def test_other_texts_under_the_same_name_are_seen(runs):
    file = write_texts(runs.folder / "texts.jsonl", random_texts([50] * 20, seed=2))
    given = ["--train_file", file, "--max_train_steps", 6]
    with pytest.MonkeyPatch.context() as patch:
        Spy(patch, 3, lambda loss: [loss, os.kill(os.getpid(), signal.SIGTERM)][0])
        with pytest.raises(SystemExit):
            runs.pretrain(*given)
    write_texts(file, random_texts([50] * 21, seed=2))
    with pytest.raises(UserError, match="training tokens was 1020 and is 1071"):
        runs.pretrain(*given, "--resume_from_checkpoint", "last")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_cannot_go_on_with_another_number_of_workers(workers, runs):
    files = [shutil.copy(runs.data / "train.jsonl", runs.folder / f"{name}.jsonl") for name in "ab"]
    given = ["--streaming", "true", "--train_file", *files, "--max_train_steps", 6]
    with pytest.MonkeyPatch.context() as patch:
        Spy(patch, 3, lambda loss: [loss, os.kill(os.getpid(), signal.SIGTERM)][0])
        with pytest.raises(SystemExit):
            runs.pretrain(*given, "--dataloader_num_workers", 2)
    with pytest.raises(UserError, match=f"cannot resume .*workers.* was 2 and is {workers}"):
        runs.pretrain(*given, "--resume_from_checkpoint", "last", "--dataloader_num_workers", workers)


# What goes wrong on the way


def not_finite(loss: Tensor) -> Tensor:
    return loss * math.nan


def finite_with_a_bad_gradient(loss: Tensor) -> Tensor:
    return loss + (loss.detach() * 0 * loss).sqrt() * 0


@pytest.mark.parametrize("happens", [not_finite, finite_with_a_bad_gradient], ids=["loss", "gradient"])
def test_a_loss_or_gradient_that_is_no_number_ends_it(happens, runs, whole):
    with pytest.MonkeyPatch.context() as patch:
        spy = Spy(patch, 5, happens)
        with pytest.raises(UserError, match="nan at step 5, on document") as caught:
            runs.pretrain(*LONG, "--checkpointing_steps", 2)
    message, output_dir = str(caught.value), runs.folder / "out"
    assert "\n" not in message and f"{output_dir / 'checkpoint-4'}" in message
    for first, last in spy.batches[-1]["documents"].tolist():
        assert (f"document {first}" if first == last else f"documents {first} to {last}") in message
    assert not (output_dir / "model.safetensors").exists()
    assert [*list_checkpoints(output_dir)] == [2, 4]
    for path in list_checkpoints(output_dir).values():
        assert all(weight.isfinite().all() for weight in load_file(path / "model.safetensors").values())
    # What went wrong was not in the texts.
    runs.pretrain(*LONG, "--resume_from_checkpoint", "last")
    assert_same_end(output_dir, whole)


def test_a_run_that_diverges_ends(runs):
    given = ["--learning_rate", 1e30, "--max_grad_norm", 0, "--checkpointing_steps", 1, "--max_train_steps", 9]
    with pytest.raises(UserError, match=r"at step \d, on documents? .*lower --learning_rate") as caught:
        runs.pretrain(*given)
    output_dir = runs.folder / "out"
    assert list_checkpoints(output_dir) and not (output_dir / "model.safetensors").exists()
    for path in list_checkpoints(output_dir).values():
        assert all(weight.isfinite().all() for weight in load_file(path / "model.safetensors").values())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("held_out, streaming", [("file", "false"), ("share", "false"), ("file", "true")])
def test_documents_are_called_by_their_number_in_the_file(held_out, streaming, runs, monkeypatch):
    texts = [" ".join([word] * 28) for word in WORDS]
    write_texts(runs.folder / "texts.jsonl", texts)
    spy = Spy(monkeypatch, 1, not_finite)
    given = ["--train_file", runs.folder / "texts.jsonl", "--validation_split_percentage", 20]
    given += ["--streaming", streaming]
    without = ("validation_file",) if held_out == "share" else ()
    with pytest.raises(UserError) as caught:
        runs.pretrain(*given, "--max_train_steps", 5, without=without)
    batch = spy.batches[0]
    tokens = batch["input_ids"].where(batch["labels"] == -100, batch["labels"])
    words = tiny_tokenizer(1).convert_ids_to_tokens(tokens.flatten().tolist())
    inside = {WORDS.index(word) for word in words if word in WORDS}
    named = re.findall(r"documents? (\d+)(?: to (\d+))?", str(caught.value))
    numbers = {int(number) for pair in named for number in pair if number}
    # Of a span its ends are named.
    assert len(numbers) > 3 and numbers <= inside


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.bin", "log.jsonl"])
def test_a_full_disk_costs_nothing_that_was_written(file, runs, stopped, whole):
    """A file can have fewer bytes than this one needs."""
    size = (stopped / file if file == "log.jsonl" else stopped / "checkpoint-13" / file).stat().st_size
    before = (stopped / "checkpoint-13" / "model.safetensors").read_bytes()
    arguments = runs.options(*LONG, "--checkpointing_steps", 2, "--resume_from_checkpoint", "last")
    report = runs.folder / "report"
    assert run(arguments, limit=size - 1, report=report) == 2
    message = report.read_text()
    assert "cannot write" in message and "\n" not in message
    assert is_intact(stopped / "checkpoint-13") and newest(stopped) == 13
    assert (stopped / "checkpoint-13" / "model.safetensors").read_bytes() == before
    if file != "log.jsonl":
        assert "--resume_from_checkpoint last" in message and "checkpoint-14" in message
    assert run(arguments) == 0
    assert_same_end(stopped, whole)


def test_a_full_disk_at_the_end(runs, whole, monkeypatch):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", full)
        with pytest.raises(UserError, match="cannot write .*No space left on device") as caught:
            runs.pretrain(*LONG)
    assert "\n" not in str(caught.value)
    output_dir = runs.folder / "out"
    assert is_intact(output_dir / "checkpoint-40") and not (output_dir / "all_results.json").exists()
    runs.pretrain(*LONG, "--resume_from_checkpoint", "last")
    assert_same_end(output_dir, whole)


# Several processes


def one_of_two(rank: int, port: int, arguments: list[str]) -> None:
    """What torchrun does for each process."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    run_script(arguments)


def run_two(
    arguments: list[str], until: Callable[[], bool] = lambda: False, then: Callable[[list], None] | None = None
) -> list[int | None]:
    """The exit codes of two processes; once `until` is true both are killed, or what `then` does is done."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [forkserver().Process(target=one_of_two, args=(rank, port, arguments)) for rank in (0, 1)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 120
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if until():
            if then is None:
                break
            then(processes)
            until = bool
        time.sleep(0.001)
    for process in processes:
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["linformer", "roberta"])
def test_two_processes_learn_as_one(architecture, runs):
    """Also where neither steps nor held-out blocks can be halved."""
    given = [*WITHOUT_DROPOUT, "--architecture", architecture, "--max_train_steps", 16, "--eval_steps", 6]
    given += ["--per_device_eval_batch_size", 2]
    alone = runs.pretrain(*given, "--per_device_train_batch_size", 4, output="alone")
    arguments = runs.options(*given, "--per_device_train_batch_size", 2, output="together")
    assert run_two(arguments) == [0, 0]
    together = runs.folder / "together"
    assert_same_curve(alone, together, tolerance=1e-4)
    assert [row["step"] for row in history(together)] == [6, 12, 16]
    weights = [load_file(path / "model.safetensors") for path in (alone, together)]
    # Gradients are summed in another order, which AdamW enlarges where they are nearly zero.
    off = torch.cat([(weights[0][name] - weights[1][name]).abs().flatten() for name in weights[0]])
    assert off.mean() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("streaming", ["false", "true"])
def test_two_processes_resume_exactly_after_being_killed(streaming, runs):
    given = ["--max_train_steps", 16, "--per_device_train_batch_size", 2, "--eval_steps", 7, "--streaming", streaming]
    given += ["--shuffle_window", 5]
    assert run_two(runs.options(*given, output="whole")) == [0, 0]
    arguments = runs.options(*given, "--checkpointing_steps", 2, "--resume_from_checkpoint", "last")
    output_dir, whole = runs.folder / "out", runs.folder / "whole"
    # The second may find the first one gone before it is killed itself.
    exit_codes = run_two(arguments, until=some_time_after(output_dir, 4, 0.01))
    assert exit_codes[0] == -9 and exit_codes[1] in (-9, 1)

    def stop_one(processes: list) -> None:
        os.kill(processes[1].pid, signal.SIGTERM)

    # A signal to one of them is one to both, and to both in the same step.
    assert run_two(arguments, until=lambda: newest(output_dir) >= 8, then=stop_one) == [143, 143]
    step = newest(output_dir)
    assert 8 <= step < 16 and is_intact(output_dir / f"checkpoint-{step}")
    assert log(output_dir)[-1]["step"] == step
    assert run_two(arguments) == [0, 0]
    assert_same_end(output_dir, whole)


# What is refused


def save_tokenizer_without_mask(folder: Path) -> Path:
    tokenizer = tiny_tokenizer(1).backend_tokenizer
    names = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


SPLIT = ("validation_file",)
BAD_OPTIONS: dict[str, tuple[list, tuple, str]] = {
    "no text": ([], ("train_file",), "give either --train_file or --dataset_name, got neither"),
    "two texts": (["--dataset_name", "x"], (), "give either --train_file or --dataset_name, got both"),
    "missing file": (["--train_file", "nowhere.jsonl"], (), "nowhere.jsonl does not exist"),
    "no data set": (["--dataset_name", "nobody/none"], ("train_file",), "cannot load split train .*nobody/none"),
    "column": (["--text_column", "words"], (), r"has no column 'words'; --text_column can be one of \['text'\]"),
    "column of a stream": (
        ["--text_column", "words", "--streaming", "true", "--max_train_steps", 2],
        (),
        "has no column 'words'",
    ),
    "too long": (["--max_length", 33], (), "--max_length 33 must lie between 8 and the 32 tokens"),
    "twin too long": (["--architecture", "roberta", "--max_length", 33], (), "--max_length 33 .* the 32 tokens"),
    "too short": (["--max_length", 7], (), "--max_length 7 must lie between 8"),
    "no mask": (["--mlm_probability", 0], (), "--mlm_probability must lie between 0 and 1, and is 0.0"),
    "all mask": (["--mlm_probability", 1], (), "--mlm_probability must lie between 0 and 1, and is 1.0"),
    "mask of no number": (["--mlm_probability", "nan"], (), "--mlm_probability must lie between 0 and 1, and is nan"),
    "no mask in evaluation": (["--eval_mlm_probability", 0], (), "--eval_mlm_probability must lie between 0 and 1"),
    "hardly a mask": (["--eval_mlm_probability", 1e-6], (), "raise --eval_mlm_probability"),
    "window": (["--shuffle_window", 0], (), "--shuffle_window must be at least 1, and is 0"),
    "evaluation": (["--max_eval_samples", 0], (), "--max_eval_samples must be at least 1, and is 0"),
    "workers": (["--dataloader_num_workers", -1], (), "--dataloader_num_workers must be at least 0, and is -1"),
    "batch size": (["--per_device_train_batch_size", 0], (), "must be at least 1, not 0"),
    "metric": (["--metric_for_best_model", "accuracy"], (), "must be loss or perplexity, not accuracy"),
    "endless": (["--streaming", "true"], (), "with --streaming, give --max_train_steps"),
    "stream without held-out text": (
        ["--streaming", "true", "--max_train_steps", 2],
        SPLIT,
        "with --streaming, give --validation_file or --validation_split",
    ),
    "split of a file": (["--validation_split", "test"], SPLIT, "--validation_split names a split of --dataset_name"),
    "two held-out texts": (["--validation_split", "test"], (), "either --validation_file or --validation_split"),
    "nothing held out": (["--validation_split_percentage", 0], SPLIT, "cannot hold out 0.0 % of 60 documents"),
    "all held out": (["--validation_split_percentage", 100], SPLIT, "cannot hold out 100.0 % of 60 documents"),
    "less than nothing": (["--validation_split_percentage", -5], SPLIT, "cannot hold out -5.0 % of 60 documents"),
    "share of no number": (["--validation_split_percentage", "nan"], SPLIT, "--validation_split_percentage|hold out"),
    "vocabulary": (["--config_overrides", "vocab_size=20"], (), "has 30 entries, the model .* only 20"),
    "override": (["--config_overrides", "depth=3"], (), r"has no \['depth'\] to override"),
    "no model": (["--config_name", "nowhere.json"], (), "cannot use the configuration nowhere.json"),
    "both models": (["--model_name_or_path", "somewhere"], (), "give either --model_name_or_path"),
    "neither model": ([], ("config_name",), "give either --model_name_or_path"),
    "tokenizer": (["--tokenizer_name", "nowhere"], (), "cannot load the tokenizer nowhere"),
    "seed": (["--seed", -1], (), "--seed"),
    "diverging schedule": (["--lr_scheduler_type", "cosine_with_min_lr"], (), "cannot use --lr_scheduler_type"),
    "tracker": (["--with_tracking", "true", "--report_to", "paper"], (), "cannot use .*--report_to.*paper"),
    "option": (["--learnin_rate", 1], (), "unknown arguments --learnin_rate 1"),
}


@pytest.mark.parametrize("given, without, message", BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_bad_options_are_refused(given, without, message, runs):
    with pytest.raises(UserError, match=message) as caught:
        runs.pretrain(*given, without=without)
    assert "\n" not in str(caught.value)
    assert not (runs.folder / "out" / "model.safetensors").exists()


BAD_TEXTS: dict[str, tuple[str, str]] = {
    "empty.jsonl": ("", "is empty"),
    "head.csv": ("text\n", "holds no rows"),
    "blank.jsonl": ('{"text": ""}\n{"text": " \\n"}\n', "documents have 0 tokens, not enough for one block of 32"),
    "short.jsonl": ('{"text": "the of"}\n' * 9, "9 .* documents have 27 tokens, not enough for one block of 32"),
    "numbers.jsonl": ('{"text": 3}\n', "holds .*int64.*, not text"),
    "broken.jsonl": ('{"text": "the"}\n{"text": \n', "cannot read the .* file"),
    "type.pdf": ("the", "is of unknown type"),
}


@pytest.mark.parametrize("option", ["train_file", "validation_file"])
@pytest.mark.parametrize("name", BAD_TEXTS)
def test_bad_texts_are_refused(name, option, runs):
    content, message = BAD_TEXTS[name]
    (runs.folder / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        runs.pretrain(f"--{option}", runs.folder / name)
    assert "\n" not in str(caught.value)
    assert not (runs.folder / "out").exists()


@pytest.mark.parametrize("name", [name for name in BAD_TEXTS if name != "short.jsonl"])
def test_bad_streams_are_refused(name, runs):
    content, message = BAD_TEXTS[name]
    (runs.folder / name).write_text(content)
    of_streams = {"blank.jsonl": "there is no text in the stream", "head.csv": "not text|no rows"}
    message = (of_streams | {"broken.jsonl": "cannot read"}).get(name, message)
    with pytest.raises(UserError, match=message) as caught:
        runs.pretrain("--train_file", runs.folder / name, "--streaming", "true", "--max_train_steps", 4)
    assert "\n" not in str(caught.value)


def test_a_stream_that_breaks_later_on_is_refused(runs):
    lines = (runs.data / "train.jsonl").read_text()
    (runs.folder / "good.jsonl").write_text(lines)
    (runs.folder / "later.jsonl").write_text('{"text": \n')
    files = [runs.folder / "good.jsonl", runs.folder / "later.jsonl"]
    with pytest.raises(UserError, match="cannot read") as caught:
        runs.pretrain("--train_file", *files, "--streaming", "true", "--max_train_steps", 40)
    assert "\n" not in str(caught.value)


def test_data_sets_without_a_row_are_refused(runs):
    for option in ("train_file", "validation_file"):
        pd.DataFrame({"text": pd.Series([], dtype=str)}).to_parquet(runs.folder / "none.parquet")
        with pytest.raises(UserError, match="cannot read|holds no rows"):
            runs.pretrain(f"--{option}", runs.folder / "none.parquet")


def test_a_tokenizer_without_a_mask_is_refused(runs):
    tokenizer = save_tokenizer_without_mask(runs.folder / "tokenizer")
    with pytest.raises(UserError, match="the tokenizer must have a mask token and special tokens") as caught:
        runs.pretrain("--tokenizer_name", tokenizer)
    assert "\n" not in str(caught.value) and not (runs.folder / "out").exists()


def test_models_that_cannot_be_gone_on_with_are_refused(runs, trained):
    without = ("config_name",)
    with pytest.raises(UserError, match="--architecture roberta makes a new model"):
        runs.pretrain("--model_name_or_path", trained["linear"], "--architecture", "roberta", without=without)
    broken = runs.folder / "broken"
    shutil.copytree(trained["linear"], broken, ignore=shutil.ignore_patterns("checkpoint-*"))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot load the model .*broken, which may be incomplete"):
        runs.pretrain("--model_name_or_path", broken, without=without)
    # The body of a classifier has no head for words.
    AutoModelForMaskedLM.from_pretrained(trained["linear"]).linformer.save_pretrained(runs.folder / "body")
    with pytest.raises(UserError, match="body is no whole masked-LM model: .* weights are missing, such as lm_head"):
        runs.pretrain("--model_name_or_path", runs.folder / "body", without=without)


def test_a_model_without_a_position_bias_goes_on_with_one(runs, trained):
    given = ["--config_overrides", "local_window=4,local_position_bias=true", "--max_train_steps", 2]
    runs.pretrain("--model_name_or_path", trained["linear"], *given, without=("config_name",))
    model = AutoModelForMaskedLM.from_pretrained(runs.folder / "out")
    assert all((layer.attention.position_bias.weight != 0).any() for layer in model.linformer.layers)


def test_a_model_that_is_there_is_not_overwritten(runs, whole):
    shutil.copytree(whole, runs.folder / "out")
    before = {path: path.read_bytes() for path in (runs.folder / "out").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="already holds a model.*--overwrite_output_dir"):
        runs.pretrain("--max_train_steps", 2)
    assert {path: path.read_bytes() for path in (runs.folder / "out").rglob("*") if path.is_file()} == before
    runs.pretrain("--max_train_steps", 2, "--overwrite_output_dir", "true")
    assert [*list_checkpoints(runs.folder / "out")] == [2] and len(log(runs.folder / "out")) == 2


def test_the_command_ends_with_2_and_one_line(runs, capsys):
    with pytest.raises(SystemExit) as caught:
        common.run_main(lambda: pretrain.main(runs.options("--max_length", 7)))
    assert caught.value.code == 2
    shown = capsys.readouterr().err
    assert shown == "error: --max_length 7 must lie between 8 and the 32 tokens that the model can take\n"
