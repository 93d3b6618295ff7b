"""scripts/finetune.py and what it stands on, with real tiny models on tasks that can be learnt."""

import csv
import dataclasses
import gzip
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import ClassLabel, Dataset, DatasetDict
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    pipeline,
)

import baseline
import checkpointing
import classify
import common
import eval_classifier
import finetune
import training
from common import UserError
from examples import TASKS, DataArguments, describe_classes, load_examples, with_task
from teacher import load_classifier_teacher


ROOT = Path(__file__).resolve().parent.parent
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}
# A run of 4 epochs of 12 steps, about half a second; later options override.
FAST = ["--learning_rate", "1e-2", "--num_train_epochs", "4", "--per_device_train_batch_size", "8", "--seed", "3"]


def sentences(label: str, count: int, seed: int) -> list[str]:
    """Sentences of 4 to 16 words that name one of two colours once and so are told apart by it."""
    generator = random.Random(seed)
    words = "the a farmer river ship letter law bank road court peace war grain year".split()
    rows = []
    for _ in range(count):
        row = [generator.choice(words) for _ in range(generator.randint(3, 15))]
        row.insert(generator.randrange(len(row)), {"warm": "crimson", "cold": "azure"}[label])
        rows.append(" ".join(row))
    return rows


def frame(count: int, seed: int) -> pd.DataFrame:
    labels = ["warm", "cold"] * (count // 2)
    texts = [sentences(label, 1, seed + index)[0] for index, label in enumerate(labels)]
    return pd.DataFrame({"text": texts, "label": labels})


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A tokenizer, configurations and data files."""
    folder = tmp_path_factory.mktemp("finetune")
    train, validation = frame(96, seed=0), frame(16, seed=1000)
    train.to_csv(folder / "train.csv", index=False)
    validation.to_csv(folder / "validation.csv", index=False)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(train["text"], trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder / "tokenizer")

    linformer = {"model_type": "linformer", **SIZES, "projected_length": 8, "projection_type": "mean_pool"}
    linformer |= {"local_window": 4, "classifier_pooling": "mean"}
    (folder / "linformer.json").write_text(json.dumps(linformer))
    (folder / "bert.json").write_text(json.dumps({"model_type": "bert", **SIZES}))
    (folder / "roberta.json").write_text(json.dumps({"model_type": "roberta", **SIZES}))
    return folder


@pytest.fixture
def options(folder, tmp_path) -> Callable[..., list[str]]:
    """Options of a run from scratch; those given come last and so override."""

    def make(*given: str, model: str = "linformer", output: str = "out") -> list[str]:
        files = ["--train_file", str(folder / "train.csv"), "--validation_file", str(folder / "validation.csv")]
        scratch = ["--config_name", str(folder / f"{model}.json"), "--tokenizer_name", str(folder / "tokenizer")]
        return [*files, *scratch, *FAST, "--output_dir", str(tmp_path / output), *map(str, given)]

    return make


@pytest.fixture(scope="session")
def trained(folder) -> Path:
    """A run to its end, with a checkpoint every two steps."""
    AcceleratorState._reset_state(reset_partial_state=True)
    files = ["--train_file", str(folder / "train.csv"), "--validation_file", str(folder / "validation.csv")]
    scratch = ["--config_name", str(folder / "linformer.json"), "--tokenizer_name", str(folder / "tokenizer")]
    output = ["--output_dir", str(folder / "trained"), "--checkpointing_steps", "2"]
    finetune.main([*files, *scratch, *FAST, *output])
    return folder / "trained"


def results(output_dir: Path) -> dict:
    return json.loads((output_dir / "all_results.json").read_text())


def same_weights(first: Path, second: Path) -> bool:
    return (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


# What a run gives


def test_it_learns_and_says_so(options, tmp_path, capsys):
    finetune.main(options())
    found = results(tmp_path / "out")
    assert found["eval_accuracy"] >= 0.9 and found["majority_accuracy"] == 0.5
    assert found["cut_share_train"] == found["cut_share_validation"] == 0
    assert [row["step"] for row in found["history"]] == [12, 24, 36, 48]
    printed = capsys.readouterr().out
    assert re.search(r"epoch +step +train_loss +eval_loss +eval_accuracy", printed)
    assert re.search(r"best_epoch +" + str(found["best_epoch"]), printed)
    assert "majority_accuracy" in printed and "tokens_per_second" in printed
    assert printed.startswith("training rows: cold 48, warm 48\n")


def test_the_saved_folder_is_whole(trained):
    files = {path.name for path in trained.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "training_args.json", "all_results.json"} <= files
    assert {"configuration_linformer.py", "modeling_linformer.py"} <= files
    assert not [name for name in files if "partial" in name]
    config = json.loads((trained / "config.json").read_text())
    assert config["id2label"] == {"0": "cold", "1": "warm"} and config["label2id"] == {"cold": 0, "warm": 1}
    assert config["problem_type"] == "single_label_classification"
    assert "AutoModelForMaskedLM" in config["auto_map"]
    settings = json.loads((trained / "training_args.json").read_text())
    assert settings["learning_rate"] == 1e-2 and config["reads_pairs"] is False


@pytest.mark.parametrize("model", ["bert", "roberta"])
def test_twins_are_trained_by_the_same_code(options, tmp_path, model):
    finetune.main(options("--learning_rate", "3e-3", "--num_train_epochs", 8, model=model))
    assert results(tmp_path / "out")["eval_accuracy"] >= 0.9


def test_the_best_epoch_is_saved_and_not_the_last(options, folder, tmp_path):
    finetune.main(options("--num_train_epochs", 6))
    found = results(tmp_path / "out")
    history, best = found["history"], found["best_epoch"]
    accuracies = [row["eval_accuracy"] for row in history]
    assert best == accuracies.index(max(accuracies)) + 1 < 6
    assert history[best - 1]["eval_loss"] > 1.1 * history[-1]["eval_loss"]

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    rows = pd.read_csv(folder / "validation.csv")
    labels = torch.tensor([model.config.label2id[name] for name in rows["label"]])
    with torch.no_grad():
        loss = model(**tokenizer(list(rows["text"]), padding=True, return_tensors="pt"), labels=labels).loss.item()
    assert loss == pytest.approx(history[best - 1]["eval_loss"], rel=1e-4)
    kept = {history[best - 1]["step"], history[-2]["step"], history[-1]["step"]}
    assert set(checkpointing.list_checkpoints(tmp_path / "out")) == kept


def test_early_stopping(options, tmp_path):
    finetune.main(
        options(
            "--learning_rate", 0.1, "--num_train_epochs", 9, "--metric_for_best_model", "loss", "--max_grad_norm", 0
        )
        + ["--early_stopping_patience", "1"]
    )
    history = results(tmp_path / "out")["history"]
    assert len(history) < 9
    assert history[-1]["eval_loss"] >= min(row["eval_loss"] for row in history[:-1])


def test_going_on_from_a_saved_model_keeps_its_labels(options, trained, folder, tmp_path):
    rows = pd.read_csv(folder / "train.csv").replace({"warm": "hot", "cold": "arctic"})
    rows.to_csv(tmp_path / "renamed.csv", index=False)
    start = ["--model_name_or_path", str(trained), "--output_dir"]
    files = ["--train_file", str(folder / "train.csv"), "--validation_file", str(folder / "validation.csv")]
    finetune.main([*start, str(tmp_path / "a"), *files, "--learning_rate", "1e-6", "--num_train_epochs", "1"])
    assert results(tmp_path / "a")["eval_accuracy"] >= 0.9
    finetune.main(
        [*start, str(tmp_path / "b"), "--train_file", str(tmp_path / "renamed.csv"), "--max_train_steps", "1"]
    )
    assert AutoConfig.from_pretrained(tmp_path / "b").label2id == {"arctic": 0, "hot": 1}


def test_regression(options, tmp_path):
    rows = frame(96, seed=0)
    rows["score"] = [2.5 if label == "warm" else -2.5 for label in rows["label"]]
    rows[["text", "score"]].to_json(tmp_path / "scores.jsonl", orient="records", lines=True)
    files = ["--train_file", tmp_path / "scores.jsonl", "--validation_file", tmp_path / "scores.jsonl"]
    finetune.main(options(*files, "--label_column", "score", "--num_train_epochs", 6))
    found = results(tmp_path / "out")
    assert found["eval_pearson"] > 0.95 and "majority_accuracy" not in found
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["problem_type"] == "regression" and len(config["id2label"]) == 1


def test_pairs(options, tmp_path):
    # The second text tells the answer; the first, which comes before it, is chance.
    rows = frame(96, seed=0).rename(columns={"text": "sentence"})
    rows.insert(0, "question", frame(192, seed=7)["text"][::2].sample(frac=1, random_state=0).to_list())
    rows.to_parquet(tmp_path / "pairs.parquet")
    files = ["--train_file", tmp_path / "pairs.parquet", "--validation_file", tmp_path / "pairs.parquet"]
    finetune.main(options(*files, "--config_overrides", "max_position_embeddings=64", "--num_train_epochs", 24))
    assert results(tmp_path / "out")["eval_accuracy"] >= 0.9
    # Who uses the model is told, so that one text of two is not answered.
    assert json.loads((tmp_path / "out" / "config.json").read_text())["reads_pairs"] is True
    judged = {"--model_name_or_path": tmp_path / "out", "--output_dir": tmp_path / "judged"}
    judged |= {"--test_file": tmp_path / "pairs.parquet", "--text_column": "sentence"}
    with pytest.raises(UserError, match="out was fine-tuned on pairs of texts: name two columns with --text_column"):
        eval_classifier.main([str(word) for option in judged.items() for word in option])
    with pytest.raises(UserError, match="out was fine-tuned on pairs of texts: give --pairs"):
        classify.main(["--model_name_or_path", str(tmp_path / "out"), "a text"])


def test_real_documents_from_a_yaml_file(folder, tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"config_name: {folder / 'linformer.json'}\n"
        f"tokenizer_name: {folder / 'tokenizer'}\n"
        f"train_file: [{ROOT / 'data/sotu/train.parquet'}]\n"
        f"validation_file: [{ROOT / 'data/sotu/dev.parquet'}]\n"
        "label_column: label_text\n"
        "config_overrides: max_position_embeddings=1500,projection_type=linear,local_window=0\n"
        "max_train_samples: 12\nmax_eval_samples: 6\nmax_train_steps: 2\nlearning_rate: 1e-4\n"
        f"output_dir: {tmp_path / 'ignored'}\n"
    )
    finetune.main([str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "out"), "--max_length", "1400"])
    assert not (tmp_path / "ignored").exists()
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.projection_type == "linear" and config.max_position_embeddings == 1500
    assert list(config.label2id) == ["1790-1860", "1861-1912", "1913-1945", "1946-1980", "1981-2021"]
    assert results(tmp_path / "out")["cut_share_train"] == 1.0


def test_everything_at_once(options, folder, tmp_path):
    (tmp_path / "errors.py").write_text(
        "import datasets\nimport evaluate\n"
        "class Errors(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        features = datasets.Features({n: datasets.Value('int64') for n in ('predictions', 'references')})\n"
        "        return evaluate.MetricInfo(description='', citation='', features=features)\n"
        "    def _compute(self, predictions, references):\n"
        "        return {'errors': sum(p != r for p, r in zip(predictions, references))}\n"
    )
    finetune.main(
        options("--mixed_precision", "bf16", "--gradient_checkpointing", "--gradient_accumulation_steps", 2)
        + ["--with_tracking", "--report_to", "tensorboard", "--run_name", "all", "--weight_decay", "0.1"]
        + [
            "--lr_scheduler_type",
            "cosine",
            "--num_warmup_steps",
            "0.2",
            "--no_group_by_length",
            "--pad_to_multiple_of",
            "8",
        ]
        + ["--metric_name", str(tmp_path / "errors.py"), "--test_file", str(folder / "validation.csv")]
        + ["--preprocessing_num_workers", "2", "--results_file", str(tmp_path / "results.csv")]
    )
    found = results(tmp_path / "out")
    assert found["test_errors"] == round(16 * (1 - found["test_accuracy"]))
    assert list((tmp_path / "out" / "all").glob("events.*"))
    (row,) = csv.DictReader((tmp_path / "results.csv").open())
    assert row["projection_type"] == "mean_pool" and row["projected_length"] == "8" and row["local_window"] == "4"
    assert row["seed"] == "3" and "--mixed_precision bf16" in row["command"] and row["torch"] == torch.__version__
    assert float(row["eval_accuracy"]) == pytest.approx(found["eval_accuracy"])


# Tasks by name


GLUE = {
    "cola": (1, "matthews_correlation", ["0", "1"]),
    "sst2": (1, "accuracy", ["0", "1"]),
    "mrpc": (2, "accuracy f1", ["0", "1"]),
    "stsb": (2, "pearson spearman", None),
    "qqp": (2, "accuracy f1", ["0", "1"]),
    "mnli": (2, "accuracy", ["entailment", "neutral", "contradiction"]),
    "qnli": (2, "accuracy", ["entailment", "not_entailment"]),
    "rte": (2, "accuracy", ["entailment", "not_entailment"]),
    "wnli": (2, "accuracy", ["0", "1"]),
    "imdb": (1, "accuracy", None),
}


def save_task(name: str, path: Path, rows: int = 24) -> Path:
    """A data set with the task's splits and columns, integers for labels, and -1 in GLUE's test sets."""
    task = TASKS[name]
    splits = ["train", task.validation_split, task.other_validation_split, task.test_split]
    splits += [split for _, split in task.submissions.values()]
    made = {}
    for number, split in enumerate(filter(None, splits)):
        texts = {column: frame(rows, seed=97 * number + i)["text"] for i, column in enumerate(task.text_columns)}
        count = len(task.label_names or range(5))
        labels = [row % count if task.label_names else row % count / 1.25 for row in range(rows)]
        is_hidden = any(split == hidden for _, hidden in task.submissions.values())
        made[split] = Dataset.from_dict({**texts, "label": [-1] * rows if is_hidden else labels, "idx": range(rows)})
    DatasetDict(made).save_to_disk(path)
    return path


@pytest.mark.parametrize("name", GLUE)
def test_every_task_has_its_columns_labels_and_metrics(options, tmp_path, name):
    texts, metrics, answers = GLUE[name]
    data = ["--dataset_name", str(save_task(name, tmp_path / "data")), "--task_name", name]
    predict = ["--do_predict", "true"] * (name != "imdb")
    finetune.main(options("--config_overrides", "max_position_embeddings=64")[4:] + data + predict)
    found = results(tmp_path / "out")
    assert {key for key in found["history"][0] if key.startswith("eval_")} == {
        f"eval_{key}" for key in ["loss", "score", *metrics.split()]
    }
    own = [found[f"eval_{key}"] for key in metrics.split()]
    assert found["eval_score"] == pytest.approx(sum(own) / len(own))
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.id2label == dict(enumerate(TASKS[name].label_names or ["LABEL_0"]))
    assert ("eval_mismatched_accuracy" in found) == (name == "mnli")
    assert ("test_accuracy" in found) == (name == "imdb")
    files = {path.name for path in (tmp_path / "out" / "submission").glob("*")}
    # AX is a configuration of its own, which a folder of one task has not.
    assert files == {file for file in TASKS[name].submissions if file != "AX.tsv"}
    for file in files:
        rows = list(csv.reader((tmp_path / "out" / "submission" / file).open(), delimiter="\t"))
        assert rows[0] == ["index", "prediction"]
        assert [row[0] for row in rows[1:]] == [str(index) for index in range(24)]
        assert all(row[1] in answers if answers else re.fullmatch(r"-?\d\.\d{3}", row[1]) for row in rows[1:])


def test_a_submission_answers_its_rows_in_their_order(options, tmp_path):
    data = save_task("rte", tmp_path / "data", rows=96)
    given = ["--dataset_name", str(data), "--task_name", "rte", "--do_predict", "true"]
    finetune.main(options("--config_overrides", "max_position_embeddings=64")[4:] + given)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    rows = DatasetDict.load_from_disk(data)["test"]
    expected = []
    for row in rows:
        with torch.no_grad():
            logits = model(**tokenizer(row["sentence1"], row["sentence2"], return_tensors="pt")).logits
        expected.append(model.config.id2label[logits.argmax().item()])
    assert len(set(expected)) > 1, "a model that answers everything alike cannot show an order"
    written = list(csv.reader((tmp_path / "out" / "submission" / "RTE.tsv").open(), delimiter="\t"))[1:]
    assert [row[1] for row in written] == expected


def test_the_diagnostic_set_is_answered_by_the_model_of_mnli(options, tmp_path, monkeypatch):
    # A folder with two of the configurations of nyu-mll/glue stands in for it.
    made = DatasetDict.load_from_disk(save_task("mnli", tmp_path / "mnli"))
    lines = ["---", "configs:"]
    for name, splits, count in (("mnli", list(made), 24), ("ax", ["test"], 7)):
        lines += [f"- config_name: {name}", "  data_files:"]
        (tmp_path / "glue" / name).mkdir(parents=True)
        for split in splits:
            rows = made["test_matched" if name == "ax" else split].select(range(count))
            rows.to_parquet(tmp_path / "glue" / name / f"{split}.parquet")
            lines += [f"  - split: {split}", f"    path: {name}/{split}.parquet"]
    (tmp_path / "glue" / "README.md").write_text("\n".join([*lines, "---", ""]))
    monkeypatch.setitem(TASKS, "mnli", dataclasses.replace(TASKS["mnli"], dataset_name=str(tmp_path / "glue")))
    finetune.main(
        options("--config_overrides", "max_position_embeddings=64", "--max_train_steps", 1)[4:]
        + ["--task_name", "mnli", "--do_predict", "true"]
    )
    counts = {path.name: len(path.read_text().splitlines()) - 1 for path in (tmp_path / "out/submission").iterdir()}
    assert counts == {"MNLI-m.tsv": 24, "MNLI-mm.tsv": 24, "AX.tsv": 7}


def test_a_task_comes_from_the_hub_unless_its_data_are_given(tmp_path):
    for name in TASKS:
        filled, task = with_task(DataArguments(task_name=name))
        glue = ("nyu-mll/glue", name)
        assert (filled.dataset_name, filled.dataset_config_name) == (
            glue if name != "imdb" else (task.dataset_name, None)
        )
    files = with_task(DataArguments(task_name="imdb", train_file=["a.csv"]))[0]
    assert files.dataset_name is None and files.test_split_name is None and files.label_column == "label"
    other = with_task(DataArguments(task_name="mnli", dataset_name="x", validation_split_name="validation"))[0]
    assert (other.dataset_name, other.validation_split_name) == ("x", "validation")
    with pytest.raises(
        UserError, match=r"has no split 'validation_matched'; it has \['test', 'train', 'validation'\]"
    ):
        load_examples(DataArguments(task_name="mnli", dataset_name=str(save_task("rte", tmp_path / "rte"))), seed=0)
    with pytest.raises(UserError, match="has no split 'dev'; it has"):
        load_examples(DataArguments(dataset_name=str(tmp_path / "rte"), validation_split_name="dev"), seed=0)
    with pytest.raises(UserError, match="has labels outside 0 to 1 in rows 3, 6"):
        data = DatasetDict.load_from_disk(save_task("mnli", tmp_path / "mnli"))
        renamed = {"premise": "sentence1", "hypothesis": "sentence2"}
        data["train"].rename_columns(renamed).to_parquet(tmp_path / "three.parquet")
        load_examples(DataArguments(task_name="rte", train_file=[str(tmp_path / "three.parquet")]), seed=0)
    write_csv(tmp_path / "words.csv", "sentence,label\na,positive\nb,mixed\n")
    with pytest.raises(UserError, match=r"labels \['mixed'\]; those of sst2 are \['negative', 'positive'\]"):
        load_examples(DataArguments(task_name="sst2", train_file=[str(tmp_path / "words.csv")]), seed=0)


def test_several_seeds_are_runs_of_their_own(options, tmp_path, capsys):
    finetune.main(options("--seeds", 3, 4, "--num_train_epochs", 1, "--results_file", tmp_path / "results.csv"))
    runs = [results(tmp_path / "out" / f"seed-{seed}") for seed in (3, 4)]
    losses = [run["eval_loss"] for run in runs]
    summary = results(tmp_path / "out")
    assert summary["seeds"] == [3, 4] and losses[0] != losses[1]
    assert summary["eval_loss"] == pytest.approx({"mean": sum(losses) / 2, "std": abs(losses[0] - losses[1]) / 2**0.5})
    assert re.search(r"result +mean +std", capsys.readouterr().out)
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [row["seed"] for row in rows] == ["3", "4"]

    finetune.main(options("--num_train_epochs", 1, output="alone"))
    assert same_weights(tmp_path / "alone", tmp_path / "out" / "seed-3")
    # A run that is done is not done again, and a seed can be added.
    again = options("--seeds", 3, 4, 5, "--num_train_epochs", 1, "--resume_from_checkpoint", "last")
    finetune.main([*again, "--results_file", str(tmp_path / "results.csv")])
    assert [row["seed"] for row in csv.DictReader((tmp_path / "results.csv").open())] == ["3", "4", "5"]
    assert same_weights(tmp_path / "alone", tmp_path / "out" / "seed-3")
    with pytest.raises(UserError, match="alone holds the model of one run; give --seeds a folder of their own"):
        finetune.main(options("--seeds", 3, 4, output="alone"))
    with pytest.raises(UserError, match=r"--seeds must differ, and are \[3, 3\]"):
        finetune.main(options("--seeds", 3, 3, output="twice"))


# Several labels


# From small weights a model as small as this collapses on the label that it learns first.
TWO_LABELS = ["--config_overrides", "initializer_range=0.1,hidden_size=64", "--learning_rate", "3e-3"]


def labelled_twice(count: int, seed: int) -> pd.DataFrame:
    """Sentences that name none, one or both of two colours, and the names of those."""
    generator = random.Random(seed)
    rows = []
    for text in frame(count, seed)["text"]:
        words = [word for word in text.split() if word not in ("crimson", "azure")]
        topics = [topic for topic in ("warm", "cold") if generator.random() < 0.5]
        for topic in topics:
            words.insert(generator.randrange(len(words)), {"warm": "crimson", "cold": "azure"}[topic])
        rows.append({"text": " ".join(words), "topics": topics})
    return pd.DataFrame(rows)


@pytest.fixture
def topics(tmp_path) -> dict[str, list[str]]:
    """The same rows with lists of labels, and with labels in a text."""
    made = {}
    for split, count, seed in (("train", 384, 0), ("validation", 32, 5)):
        rows = labelled_twice(count, seed)
        rows.to_json(tmp_path / f"{split}.jsonl", orient="records", lines=True)
        rows.assign(topics=rows["topics"].map(" ; ".join)).to_csv(tmp_path / f"{split}.csv", index=False)
    for suffix, more in (("jsonl", []), ("csv", ["--label_separator", ";"])):
        files = [
            ["--train_file", tmp_path / f"train.{suffix}"],
            ["--validation_file", tmp_path / f"validation.{suffix}"],
        ]
        made[suffix] = [str(part) for part in [*files[0], *files[1], "--label_column", "topics", *more]]
    return made


def test_texts_with_several_labels(options, topics, tmp_path):
    finetune.main(options(*topics["jsonl"], *TWO_LABELS))
    found = results(tmp_path / "out")
    assert found["eval_accuracy"] >= 0.85 and found["eval_f1_micro"] >= 0.9 and found["eval_f1_macro"] >= 0.9
    assert "majority_accuracy" not in found
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.problem_type == "multi_label_classification" and config.label2id == {"cold": 0, "warm": 1}

    classify = pipeline("text-classification", str(tmp_path / "out"), top_k=None)
    for text, expected in [
        ("the crimson ship", {"warm"}),
        ("azure bank crimson road", {"warm", "cold"}),
        ("a law", set()),
    ]:
        assert {row["label"] for row in classify([text])[0] if row["score"] > 0.5} == expected
    finetune.main(options(*topics["csv"], *TWO_LABELS, output="csv"))
    assert same_weights(tmp_path / "out", tmp_path / "csv")


def test_several_labels_keep_the_order_of_the_model(options, topics, folder, tmp_path):
    finetune.main(options(*topics["jsonl"], *TWO_LABELS))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config |= {"id2label": {"0": "warm", "1": "cold"}, "label2id": {"warm": 0, "cold": 1}}
    weights = load_file(tmp_path / "out" / "model.safetensors")
    swapped = {name: t.flip(0) if name.startswith("classifier.output") else t for name, t in weights.items()}
    save_file(swapped, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    start = ["--model_name_or_path", str(tmp_path / "out"), "--learning_rate", "1e-7", "--max_train_steps", "1"]
    finetune.main([*topics["jsonl"], *start, "--output_dir", str(tmp_path / "again")])
    assert results(tmp_path / "again")["eval_f1_micro"] >= 0.9
    assert AutoConfig.from_pretrained(tmp_path / "again").label2id == {"warm": 0, "cold": 1}


def test_bad_lists_of_labels_are_refused(topics, tmp_path):
    files = {name: [topics["jsonl"][index]] for name, index in (("train_file", 1), ("validation_file", 3))}
    with pytest.raises(UserError, match="divides texts, and column 'topics' of the train set holds List"):
        load_examples(DataArguments(**files, label_column="topics", label_separator=";"), seed=0)
    rows = labelled_twice(8, 0)
    rows.at[2, "topics"] = ["hot"]
    rows.to_json(tmp_path / "unseen.jsonl", orient="records", lines=True)
    with pytest.raises(UserError, match=r"labels \['hot'\] not seen in training, which has \['cold', 'warm'\]"):
        load_examples(
            DataArguments(
                train_file=files["train_file"], validation_file=[str(tmp_path / "unseen.jsonl")], label_column="topics"
            ),
            seed=0,
        )
    rows.at[5, "topics"] = ["warm", None]
    rows.to_json(tmp_path / "none.jsonl", orient="records", lines=True)
    with pytest.raises(UserError, match="has no label in rows 6"):
        load_examples(DataArguments(train_file=[str(tmp_path / "none.jsonl")], label_column="topics"), seed=0)
    with pytest.raises(UserError, match="may have several labels"):
        baseline.main(["--train_file", files["train_file"][0], "--label_column", "topics"])


# Options of training


def test_label_smoothing_spreads_a_label_over_all_classes(options, trained, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(trained).eval()
    batch = {"input_ids": torch.tensor([[0, 7, 8, 2]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    log_probabilities = model(**batch).logits.log_softmax(-1)[0]
    loss = finetune.loss_of(model, {**batch, "labels": torch.tensor([1])}, 0.2, None)
    assert loss.item() == pytest.approx(-(0.9 * log_probabilities[1] + 0.1 * log_probabilities[0]).item(), rel=1e-5)
    assert model(**batch, labels=torch.tensor([1])).loss.item() != pytest.approx(loss.item(), rel=1e-3)
    finetune.main(options("--label_smoothing_factor", 0.2))
    # A loss that cannot fall below the entropy of the smoothed labels, where the plain one comes near to 0.
    assert results(tmp_path / "out")["history"][-1]["train_loss"] > 0.32


# With a teacher


def test_a_teacher_is_right_where_labels_are_not(options, trained, folder, tmp_path):
    data = pd.read_csv(folder / "train.csv")
    # Nothing can be learned of these labels but that they are evenly spread.
    data["label"] = [("warm", "cold")[index // 2 % 2] for index in range(len(data))]
    assert (data["label"] == pd.read_csv(folder / "train.csv")["label"]).mean() == 0.5
    data.to_csv(tmp_path / "wrong.csv", index=False)
    wrong = ["--train_file", tmp_path / "wrong.csv"]
    finetune.main(options(*wrong, "--metric_for_best_model", "loss", output="alone"))
    taught = ["--teacher_name_or_path", trained, "--logits_weight", 20, "--num_train_epochs", 12]
    finetune.main(options(*wrong, *taught, output="taught"))
    assert results(tmp_path / "alone")["eval_accuracy"] < 0.8
    assert results(tmp_path / "taught")["eval_accuracy"] > 0.9


def test_the_loss_with_a_teacher_is_what_it_says(trained):
    torch.manual_seed(0)
    teacher = AutoModelForSequenceClassification.from_pretrained(trained).eval()
    # The same classes in another order.
    names = [teacher.config.id2label[index] for index in (1, 0)]
    config = AutoConfig.from_pretrained(trained, id2label=dict(enumerate(names)), label2id={names[0]: 0, names[1]: 1})
    student = AutoModelForSequenceClassification.from_config(config).eval()
    ids = torch.tensor([[0, 7, 8, 9, 2], [0, 11, 2, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": (ids != 1).long(), "labels": torch.tensor([0, 1])}
    tokenizer = AutoTokenizer.from_pretrained(trained)
    loaded = load_classifier_teacher(str(trained), student, tokenizer, 32, 0.5, 3.0, False)
    with torch.no_grad():
        ours = student(**batch, output_hidden_states=True)
        theirs = teacher(**{**batch, "labels": None}, output_hidden_states=True)
    expected = ours.loss.item()
    for row in range(2):
        p, q = theirs.logits[row].flip(0).softmax(-1), ours.logits[row].softmax(-1)
        expected += 0.5 * sum(p[c].item() * math.log(p[c] / q[c]) for c in range(2)) / 2
    for left, right in zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True):
        for row, length in enumerate(batch["attention_mask"].sum(dim=1)):
            a, b = left[row, :length], right[row, :length]
            expected += 3 * ((a - b).square().sum() / b.square().sum()).item() / 4
    loss = finetune.loss_of(student, batch, 0.0, loaded).item()
    assert loss == pytest.approx(expected, rel=1e-5)
    # A batch may be divided.
    rows = [{name: values[row : row + 1] for name, values in batch.items()} for row in range(2)]
    assert sum(finetune.loss_of(student, row, 0.0, loaded).item() for row in rows) / 2 == pytest.approx(loss, rel=1e-5)


def test_a_teacher_of_several_labels_has_a_probability_for_each(trained, tmp_path):
    # Of a model that does not say so, its student does.
    teacher = AutoModelForSequenceClassification.from_pretrained(trained, problem_type=None).eval()
    teacher.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    tokenizer.save_pretrained(tmp_path)
    student = AutoModelForSequenceClassification.from_pretrained(trained, problem_type="multi_label_classification")
    loaded = load_classifier_teacher(str(tmp_path), student, tokenizer, 32, 2.0, 0.0, False)
    batch = {"input_ids": torch.tensor([[0, 7, 8, 2]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with torch.no_grad():
        ours, theirs = student.eval()(**batch), teacher(**batch)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(ours.logits, theirs.logits.sigmoid())
    assert loaded.disagreement(ours, batch).item() == pytest.approx(2 * expected.item(), rel=1e-5)


def test_a_teacher_that_does_not_fit_is_refused(options, trained, folder, tmp_path):
    def refused(message: str, *given: object, teacher: Path = trained) -> None:
        with pytest.raises(UserError, match=message):
            finetune.main(options("--teacher_name_or_path", teacher, *given))

    other = tmp_path / "other.csv"
    pd.read_csv(folder / "train.csv").replace({"label": {"warm": "hot"}}).to_csv(other, index=False)
    refused("knows the labels .*'warm'.*the data have .*'hot'", "--train_file", other, "--validation_file", other)
    foreign = shutil.copytree(trained, tmp_path / "foreign", ignore=shutil.ignore_patterns("checkpoint-*"))
    tokenizer = json.loads((foreign / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (foreign / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused("has another tokenizer than the model", teacher=foreign)
    refused("are 0: nothing is learned from the teacher", "--logits_weight", 0)
    with pytest.raises(UserError, match="--hidden_states_weight learns from a teacher"):
        finetune.main(options("--hidden_states_weight", 1))
    refused(
        "reads 32 tokens and the model 64; give --max_length 32", "--config_overrides", "max_position_embeddings=64"
    )
    uneven = ("--config_overrides", "num_hidden_layers=1", "--hidden_states_weight", 1)
    refused("has 2 of 32 numbers, the model 1 of 32; leave it at 0", *uneven)
    refused("--logits_weight must not be negative, and is -1", "--logits_weight", -1)
    refused("cannot load the teacher .*nowhere", teacher=tmp_path / "nowhere")
    AutoModelForSequenceClassification.from_pretrained(trained).linformer.save_pretrained(tmp_path / "headless")
    AutoTokenizer.from_pretrained(trained).save_pretrained(tmp_path / "headless")
    refused("is no trained classifier: .* weights are missing", teacher=tmp_path / "headless")


@pytest.mark.parametrize("model_type", ["linformer", "bert", "distilbert"])
def test_each_layer_learns_at_a_share_of_the_rate_of_the_one_above(folder, model_type):
    of_linformer = {"projected_length": 8, "local_window": 4, "local_position_bias": True}
    sizes = {**SIZES, "num_labels": 2} | (of_linformer if model_type == "linformer" else {})
    sizes |= {"n_layers": 2, "dim": 32, "n_heads": 2} if model_type == "distilbert" else {}
    config = AutoConfig.for_model(model_type, **sizes)
    model = AutoModelForSequenceClassification.from_config(config)
    arguments = training.TrainingArguments("nowhere", learning_rate=1e-3, layerwise_lr_decay=0.5, weight_decay=0.1)
    (optimizer,), _ = training.make_optimizers(model, arguments, max_steps=10)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        layer = re.search(r"layers?\.(\d)\.", name)
        below = 2 - int(layer[1]) if layer else 3 if "embeddings" in name or "projection.E" in name else 0
        decays = parameter.ndim >= 2 and not name.endswith("position_bias.weight")
        expected = (1e-3 * 0.5**below, 0.1 if decays else 0.0)
        assert rates[id(parameter)] == pytest.approx(expected), name
    (plain,), _ = training.make_optimizers(model, training.TrainingArguments("nowhere"), max_steps=10)
    assert len(plain.param_groups) == 2
    muon = training.TrainingArguments("nowhere", optim="muon", weight_decay=0.1)
    (adamw, muon), schedulers = training.make_optimizers(model, muon, max_steps=10)
    assert len(schedulers) == 2
    names = {parameter: name for name, parameter in model.named_parameters()}
    of_muon = [names[parameter] for group in muon.param_groups for parameter in group["params"]]
    assert len(of_muon) >= 12 and all(re.search(r"layers?\.\d.*weight$", name) for name in of_muon)
    of_adamw = [names[parameter] for group in adamw.param_groups for parameter in group["params"]]
    assert sorted(of_muon + of_adamw) == sorted(names.values())
    assert any("embeddings.weight" in name for name in of_adamw) and any("classifier" in name for name in of_adamw)


# Data sets


@pytest.fixture
def formats(folder, tmp_path) -> dict[str, DataArguments]:
    """The same rows in every form that is understood."""
    splits = {name: pd.read_csv(folder / f"{name}.csv") for name in ("train", "validation")}
    writers = {
        "csv": lambda rows, path: rows.to_csv(path, index=False),
        "csv.gz": lambda rows, path: rows.to_csv(path, index=False),
        "tsv": lambda rows, path: rows.to_csv(path, index=False, sep="\t"),
        "json": lambda rows, path: path.write_text(rows.to_json(orient="records")),
        "jsonl": lambda rows, path: rows.to_json(path, orient="records", lines=True),
        "jsonl.gz": lambda rows, path: rows.to_json(path, orient="records", lines=True),
        "parquet": lambda rows, path: rows.to_parquet(path),
    }
    made = {}
    for suffix, write in writers.items():
        paths = {name: tmp_path / f"{name}.{suffix}" for name in splits}
        for name, rows in splits.items():
            write(rows, paths[name])
        made[suffix] = DataArguments(train_file=[str(paths["train"])], validation_file=[str(paths["validation"])])
    (tmp_path / "folder").mkdir()
    for name in splits:
        shutil.copy(tmp_path / f"{name}.parquet", tmp_path / "folder" / f"{name}.parquet")
    made["folder"] = DataArguments(dataset_name=str(tmp_path / "folder"))
    saved = DatasetDict({name: Dataset.from_pandas(rows) for name, rows in splits.items()})
    feature = ClassLabel(names=["cold", "warm"])
    DatasetDict({name: rows.cast_column("label", feature) for name, rows in saved.items()}).save_to_disk(
        tmp_path / "saved"
    )
    made["save_to_disk, ClassLabel"] = DataArguments(dataset_name=str(tmp_path / "saved"))
    return made


def test_every_format_gives_the_same_examples(formats, folder):
    expected = pd.read_csv(folder / "train.csv")
    for name, arguments in formats.items():
        splits, label_names = load_examples(arguments, seed=0)
        assert label_names == ["cold", "warm"], name
        assert splits["train"]["text"][:] == list(expected["text"]), name
        assert [label_names[label] for label in splits["train"]["label"]] == list(expected["label"]), name
        assert len(splits["validation"]) == 16, name


@pytest.fixture
def class_folders(tmp_path) -> dict[str, Path]:
    """The rows of `frame` in a file each, in folders of their labels."""
    made = {}
    for split, count, seed in (("train", 96, 0), ("validation", 16, 1000)):
        made[split] = tmp_path / "by_class" / split
        for number, row in enumerate(frame(count, seed).itertuples()):
            path = made[split] / row.label / ("old" if number % 3 else "") / f"{number:03}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(row.text)
    return made


def test_a_folder_for_each_class(options, class_folders, folder, tmp_path, capsys):
    arguments = DataArguments(
        train_file=[str(class_folders["train"])], validation_file=[str(folder / "validation.csv")]
    )
    splits, label_names = load_examples(arguments, seed=0)
    rows = {(row["text"], label_names[row["label"]]) for row in splits["train"]}
    assert rows == set(frame(96, 0).itertuples(index=False, name=None)) and len(splits["train"]) == 96

    (class_folders["train"] / "index.csv").write_text("text,label\na,b\n")
    (class_folders["train"] / "cold" / ".hidden.txt").write_text("no text")
    packed = class_folders["train"] / "warm" / "packed.txt.gz"
    packed.write_bytes(gzip.compress(b"a crimson law"))
    files = [part for split in class_folders for part in (f"--{split}_file", str(class_folders[split]))]
    finetune.main(options(*files, "--test_file", class_folders["validation"]))
    found = results(tmp_path / "out")
    assert found["eval_accuracy"] == found["test_accuracy"] >= 0.9
    printed = capsys.readouterr()
    assert "training rows: warm 49, cold 48\n" in printed.out
    assert "train that are no .txt in a folder of a class are left out: index.csv\n" in printed.err
    baseline.main(files)
    assert re.search(r"TF-IDF \+ logistic regression +1.0000", capsys.readouterr().out)


def test_folders_that_cannot_be_read_are_refused(class_folders, folder):
    def refused(message: str, *given: Path) -> None:
        with pytest.raises(UserError, match=message):
            load_examples(DataArguments(train_file=list(map(str, given))), seed=0)

    train = class_folders["train"]
    refused("must all be folders, or none of them", train, folder / "train.csv")
    refused(r"holds no folder of .txt files for each class, such as .*/CLASS/FILE.txt", train / "cold" / "old")
    refused("one label only, 'old'", train / "cold")
    (train / "cold" / "latin1.txt").write_bytes("caf\u00e9".encode("latin1"))
    (train / "warm" / "broken.txt.gz").write_bytes(b"no gzip")
    refused(
        r"cannot read 2 of 98 files of .*: cold/latin1.txt: not valid UTF-8: byte 0xe9 .*; warm/broken.txt.gz", train
    )


def test_words_that_csv_readers_take_for_missing_are_texts(tmp_path):
    (tmp_path / "words.csv").write_text('text,label\nNA,1\nnull,2\n"None",1\n"",2\n')
    splits, label_names = load_examples(
        DataArguments(train_file=[str(tmp_path / "words.csv")], validation_file=[str(tmp_path / "words.csv")]), seed=0
    )
    assert splits["train"]["text"][:] == ["NA", "null", "None", ""]
    assert label_names == ["1", "2"] and splits["train"]["label"][:] == [0, 1, 0, 1]


def test_numbers_are_ordered_as_numbers(tmp_path):
    pd.DataFrame({"review": ["x"] * 22, "label": [10, 9, 2] * 7 + [2]}).to_csv(tmp_path / "stars.csv", index=False)
    splits, label_names = load_examples(DataArguments(train_file=[str(tmp_path / "stars.csv")]), seed=0)
    assert label_names == ["2", "9", "10"]
    assert len(splits["validation"]) == 2 and len(splits["train"]) == 20


def test_samples_are_drawn_by_the_seed(folder):
    files = {"train_file": [str(folder / "train.csv")], "validation_file": [str(folder / "validation.csv")]}
    arguments = DataArguments(**files, max_train_samples=10, max_eval_samples=4)
    drawn = [load_examples(arguments, seed=seed)[0] for seed in (1, 1, 2)]
    texts = [splits["train"]["text"][:] for splits in drawn]
    assert texts[0] == texts[1] != texts[2] and len(texts[0]) == 10
    assert len(drawn[0]["validation"]) == 4


def test_rows_are_held_out_by_class(tmp_path):
    def held_out(labels: list, seed: int, **options) -> tuple[list, list]:
        path = tmp_path / "rows.jsonl"
        rows = pd.DataFrame({"text": map(str, range(len(labels))), "label": labels})
        rows.to_json(path, orient="records", lines=True)
        splits, _ = load_examples(DataArguments(train_file=[str(path)], **options), seed=seed)
        texts = splits["train"]["text"][:] + splits["validation"]["text"][:]
        assert sorted(texts, key=int) == list(rows["text"])
        for row in [*splits["train"], *splits["validation"]] if isinstance(labels[0], str) else []:
            assert labels[int(row["text"])] == sorted(set(labels))[row["label"]]
        return splits["validation"]["text"][:], splits["validation"]["label"][:]

    labels = ["usual"] * 54 + ["rare"] * 6
    drawn = [held_out(labels, seed, validation_split_percentage=50) for seed in range(6)]
    assert all(sorted(ids) == [0] * 3 + [1] * 27 for _, ids in drawn)
    assert drawn[0] == held_out(labels, 0, validation_split_percentage=50) != drawn[1]

    # What there is one of is learned, whatever the seed.
    for seed in range(6):
        assert held_out([*labels, "only"], seed, validation_split_percentage=50)[1].count(0) == 0

    # Where there are more classes than rows to hold out, and of numbers, any rows are drawn.
    numbered = Dataset.from_dict({"text": [str(row) for row in range(20)]})
    as_before = numbered.train_test_split(test_size=2, seed=3)["test"]["text"][:]
    for others in (["a", "a", "b", "b", *"c" * 16], [0.5, 1.5] * 10):
        assert held_out(others, 3)[0] == as_before


def test_classes_are_counted_and_odd_ones_said():
    line, odd = describe_classes([1, 1, 0, 2, 2, 2], ["lease", "nda", "Lease "])
    assert line == "Lease  3, nda 2, lease 1"
    assert odd == [
        "there are fewer than 2 training rows of 'lease'",
        "'lease' and 'Lease ' differ in spaces and capitals alone, and are classes each",
    ]
    line, odd = describe_classes(
        [label for label in range(25) for _ in range(2)], [f"c{label}" for label in range(25)]
    )
    assert line.endswith("c18 2, c19 2 and 5 more classes") and not odd
    assert describe_classes([[0, 1], [], [1]], ["tax", "rent"])[0] == "rent 2, tax 1"


# One optimizer step


@pytest.mark.parametrize("model_type", ["linformer", "bert"])
@pytest.mark.parametrize("rows", [8, 7], ids=["full", "tail"])
def test_a_step_is_the_same_however_it_is_divided(folder, model_type, rows):
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    examples = pd.read_csv(folder / "train.csv")[:rows]
    encoded = tokenizer(list(examples["text"]), padding=True, return_tensors="pt")
    batch = {**encoded, "labels": torch.tensor([int(label == "warm") for label in examples["label"]])}
    batch.pop("token_type_ids", None)
    config = AutoConfig.from_pretrained(folder / f"{model_type}.json")
    stepped = {}
    for size in (8, 4, 2, 1):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config).eval()
        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
        starts = range(0, rows, size)
        micro_batches = [{name: value[start : start + size] for name, value in batch.items()} for start in starts]
        loss = training.optimizer_step(
            accelerator, model, [optimizer], lambda model, batch: model(**batch).loss, micro_batches, max_grad_norm=0.0
        )
        stepped[size] = torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), loss
    start = torch.manual_seed(0) and AutoModelForSequenceClassification.from_config(config)
    moved = stepped[8][0] - torch.cat([parameter.detach().flatten() for parameter in start.parameters()])
    assert moved.abs().max() > 1e-3
    for size in (4, 2, 1):
        torch.testing.assert_close(stepped[size][0], stepped[8][0], rtol=0, atol=1e-6)
        assert stepped[size][1] == pytest.approx(stepped[8][1], abs=1e-6)


def test_accumulation_takes_the_same_rows_in_the_same_order(options, tmp_path):
    without_dropout = "hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0"
    for size, steps in ((8, 1), (2, 4)):
        finetune.main(
            options("--per_device_train_batch_size", size, "--gradient_accumulation_steps", steps, output=f"{size}")
            + ["--config_overrides", without_dropout, "--max_train_samples", "44", "--num_train_epochs", "1"]
        )
    whole, parts = (results(tmp_path / name)["history"] for name in ("8", "2"))
    assert whole[0]["step"] == parts[0]["step"] == 6
    assert parts[0]["train_loss"] == pytest.approx(whole[0]["train_loss"], abs=1e-4)


@pytest.mark.slow
def test_two_processes_train_as_one(options, tmp_path):
    without_dropout = ["--config_overrides", "hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0"]
    common_options = [*without_dropout, "--num_train_epochs", "1", "--max_train_samples", "88"]
    finetune.main(options(*common_options, output="one"))
    two = options(
        *common_options, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2, output="two"
    )
    two += ["--seeds", "3", "4"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(ROOT / "scripts" / "finetune.py"), *two], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (alone,), (together,) = (results(tmp_path / name)["history"] for name in ("one", "two/seed-3"))
    assert together == pytest.approx(alone, abs=1e-4) and together["step"] == 11
    assert results(tmp_path / "two")["eval_loss"]["std"] > 0


# Checkpoints


def test_it_resumes_exactly_after_being_killed_at_any_moment(options, trained, tmp_path):
    pytest.importorskip("fcntl", reason="processes are forked from a server that has imported torch already")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["finetune"])
    arguments = options("--checkpointing_steps", 2, "--resume_from_checkpoint", "last")
    output_dir, generator = tmp_path / "out", random.Random(0)

    def run(until: Callable[[], bool]) -> int | None:
        process = context.Process(target=finetune.main, args=(arguments,))
        process.start()
        deadline = time.monotonic() + 60
        while process.is_alive() and time.monotonic() < deadline and not until():
            time.sleep(0.0005)
        process.kill()
        process.join()
        return process.exitcode

    def writing_a_checkpoint() -> bool:
        return (output_dir / ".checkpoint.partial" / "model.safetensors").exists()

    def some_time_after(step: int) -> Callable[[], bool]:
        moment = generator.uniform(0, 0.1)
        seen: list[float] = []

        def until() -> bool:
            if not seen and (output_dir / f"checkpoint-{step}").exists():
                seen.append(time.monotonic())
            return bool(seen) and time.monotonic() - seen[0] > moment

        return until

    kills = [run(until) for until in (writing_a_checkpoint, some_time_after(16), some_time_after(30))]
    assert kills[0] == -9 and not (output_dir / "all_results.json").exists()
    assert run(lambda: False) == 0
    assert same_weights(output_dir, trained)
    kept = ("epoch", "step", "train_loss", "eval_loss", "eval_accuracy")
    histories = [[[row[name] for name in kept] for row in results(path)["history"]] for path in (output_dir, trained)]
    assert histories[0] == histories[1]
    assert not list(output_dir.glob(".*"))


@pytest.fixture
def interrupted(trained, tmp_path) -> Path:
    """The folder of the trained run as it was when its last checkpoint but one, in mid-epoch, had been written."""
    skip = shutil.ignore_patterns("checkpoint-48", "*.safetensors", "*.json")
    shutil.copytree(trained, tmp_path / "out", ignore=skip)
    for path in checkpointing.list_checkpoints(tmp_path / "out").values():
        shutil.copytree(trained / path.name, path, dirs_exist_ok=True)
    assert 46 in checkpointing.list_checkpoints(tmp_path / "out")
    return tmp_path / "out"


def test_both_optimizers_of_muon_resume_exactly(options, tmp_path):
    muon = ("--optim", "muon", "--checkpointing_steps", "20")
    finetune.main(options(*muon, "--save_total_limit", 10, output="whole"))
    assert results(tmp_path / "whole")["eval_accuracy"] > 0.9
    checkpoint = tmp_path / "whole" / "checkpoint-20"
    assert {"optimizer.bin", "optimizer_1.bin", "scheduler_1.bin"} <= {path.name for path in checkpoint.iterdir()}
    shutil.copytree(checkpoint, tmp_path / "parts" / "checkpoint-20")
    finetune.main(options(*muon, "--resume_from_checkpoint", "last", output="parts"))
    assert same_weights(tmp_path / "parts", tmp_path / "whole")


def test_a_damaged_checkpoint_is_passed_over(options, interrupted, trained, capsys):
    shutil.copytree(interrupted / "checkpoint-46", interrupted / "checkpoint-48")
    weights = interrupted / "checkpoint-48" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (interrupted / "checkpoint-50").mkdir()
    finetune.main(options("--resume_from_checkpoint", "last", "--checkpointing_steps", 2))
    warned = capsys.readouterr().err
    assert "checkpoint-50 is damaged" in warned and "checkpoint-48 is damaged" in warned
    assert same_weights(interrupted, trained)


def test_a_finished_run_resumes_to_itself(options, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    finetune.main(options("--resume_from_checkpoint", "last", "--results_file", tmp_path / "results.csv"))
    assert same_weights(tmp_path / "out", trained)
    assert not (tmp_path / "results.csv").exists()


def test_resuming_with_nothing_there_starts_from_the_beginning(options, tmp_path, capsys):
    finetune.main(options("--resume_from_checkpoint", "last", "--max_train_steps", 1))
    assert f"nothing to resume in {tmp_path / 'out'}: starting from the beginning" in capsys.readouterr().out
    assert results(tmp_path / "out")["history"][-1]["step"] == 1


def test_resuming_as_another_run_is_refused(options, interrupted):
    with pytest.raises(UserError, match="learning_rate was 0.01 and is 0.001; num_train_epochs was 4 and is 5"):
        finetune.main(options("--resume_from_checkpoint", "last", "--learning_rate", "1e-3", "--num_train_epochs", 5))


def test_a_checkpoint_older_than_an_option_is_gone_on_with(options, interrupted, trained):
    checkpoint = interrupted / "checkpoint-46"
    arguments = json.loads((checkpoint / "arguments.json").read_text())
    del arguments["optim"], arguments["logits_weight"]
    (checkpoint / "arguments.json").write_text(json.dumps(arguments))
    sums = json.loads((checkpoint / "checksums.json").read_text())
    sums["arguments.json"] = hashlib.sha256((checkpoint / "arguments.json").read_bytes()).hexdigest()
    (checkpoint / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(UserError, match="with other arguments: optim was adamw and is muon$"):
        finetune.main(options("--resume_from_checkpoint", "last", "--optim", "muon"))
    finetune.main(options("--resume_from_checkpoint", "last"))
    assert same_weights(interrupted, trained)


def test_a_checkpoint_of_elsewhere_or_damaged_is_refused(options, trained, interrupted, tmp_path):
    with pytest.raises(UserError, match="is not among the checkpoints of"):
        finetune.main(options("--resume_from_checkpoint", trained / "checkpoint-46"))
    (interrupted / "checkpoint-46" / "optimizer.bin").write_bytes(b"")
    with pytest.raises(UserError, match="checkpoint-46 is damaged"):
        finetune.main(options("--resume_from_checkpoint", interrupted / "checkpoint-46"))


def test_checkpoints_hold_no_code(trained):
    """Everything but the states of the random generators, which are not used, loads without unpickling objects."""
    checkpoint = trained / "checkpoint-48"
    assert {path.name for path in checkpoint.iterdir() if path.suffix in (".bin", ".pkl")} == {
        "optimizer.bin",
        "scheduler.bin",
        "random_states_0.pkl",
    }
    for name in ("optimizer.bin", "scheduler.bin"):
        assert torch.load(checkpoint / name, weights_only=True)
    assert load_file(checkpoint / "model.safetensors")


def test_a_folder_with_a_model_is_left_alone(options, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="already holds a model.*--overwrite_output_dir"):
        finetune.main(options("--seed", 9))
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    finetune.main(options("--seed", 9, "--overwrite_output_dir", "--max_train_steps", 1))
    assert not same_weights(tmp_path / "out", trained)
    assert set(checkpointing.list_checkpoints(tmp_path / "out")) == {1}


# Bad input


def write_csv(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


BAD_DATA = {
    "text,label\n": "holds no rows",
    "": "is empty",
    "words,label\na,x\nb,y\n": r"has no column 'text'; it has \['words', 'label'\]",
    "text,kind\na,x\nb,y\n": r"no label column found among \['text', 'kind'\]",
    "text,label\na,x\nb,x\n": "one label only, 'x'",
    "text,label\na,-1\nb,1\n": "labels outside 0 to any positive number in rows 1",
    "text,label\na,cold\nb,warm\nc,tepid\n": r"validation set has .*\['cold', 'tepid', 'warm'\] not seen in training",
    "text,label\n1,x\n2,y\n": "holds .*int64.*, not text",
}


@pytest.mark.parametrize(("content", "message"), BAD_DATA.items(), ids=range(len(BAD_DATA)))
def test_bad_data_is_refused(options, folder, tmp_path, content, message):
    bad = write_csv(tmp_path / "bad.csv", content)
    good = write_csv(tmp_path / "good.csv", "text,label\na,x\nb,y\n")
    files = ["--train_file", bad, "--validation_file", good]
    if "tepid" in content:
        files = ["--train_file", good, "--validation_file", bad]
    with pytest.raises(UserError, match=message):
        finetune.main(options(*files, "--text_column", "text"))
    assert not (tmp_path / "out").exists()


def test_bad_labels_and_texts_name_their_rows(tmp_path):
    rows = pd.DataFrame({"text": ["a", None, "c", None], "label": ["x", "y", "x", "y"]})
    rows.to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="'text' of the train set has no text in rows 2, 4"):
        load_examples(DataArguments(train_file=[str(tmp_path / "rows.parquet")]), seed=0)
    rows.assign(text="a", label=["x", None, "y", "x"]).to_parquet(tmp_path / "labels.parquet")
    with pytest.raises(UserError, match="'label' of the train set has no label in rows 2"):
        load_examples(DataArguments(train_file=[str(tmp_path / "labels.parquet")]), seed=0)
    rows.assign(text="a", label=[0.5, 1.5, float("inf"), 2]).to_parquet(tmp_path / "scores.parquet")
    with pytest.raises(UserError, match="must hold finite numbers; rows 3 do not"):
        load_examples(DataArguments(train_file=[str(tmp_path / "scores.parquet")]), seed=0)
    with pytest.raises(UserError, match="holds numbers such as 0.5, not classes"):
        arguments = DataArguments(train_file=[str(tmp_path / "scores.parquet")], do_regression=False)
        load_examples(arguments, seed=0)
    labels = Dataset.from_dict({"text": ["a", "b"], "label": [0, -1]}).cast_column(
        "label", ClassLabel(names=["x", "y"])
    )
    DatasetDict({"train": labels}).save_to_disk(tmp_path / "hub")
    with pytest.raises(UserError, match="labels outside 0 to 1 in rows 2"):
        load_examples(DataArguments(dataset_name=str(tmp_path / "hub")), seed=0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["x", "", "y", "  "], "'label' of the train set has no label in rows 2, 4"),
        (["1", "2", "NaN", ""], "'label' of the train set has no label in rows 3, 4"),
        (["0.5", "", "1.5", "nan"], "such as 0.5, written as text, and none in rows 2, 4: .*--do_regression true"),
        (["1.0", "2.0", "", "3.0"], "such as 1.0, written as text, and none in rows 3: "),
    ],
    ids=["words", "integers", "numbers", "round numbers"],
)
def test_an_empty_cell_is_no_label(tmp_path, labels, message):
    rows = "".join(f"a{label},{label}\n" for label in labels)
    arguments = DataArguments(train_file=[str(write_csv(tmp_path / "train.csv", "text,label\n" + rows))])
    with pytest.raises(UserError, match=message):
        load_examples(arguments, seed=0)


def test_numbers_that_are_written_as_text(tmp_path):
    def arguments(labels: list[str], do_regression: bool | None = None) -> DataArguments:
        path = tmp_path / "labels.jsonl"
        pd.DataFrame({"text": "a", "label": labels}).to_json(path, orient="records", lines=True)
        return DataArguments(train_file=[str(path)], validation_file=[str(path)], do_regression=do_regression)

    labels = ["0.5", "1e3", " -2", "3"]
    with pytest.raises(UserError, match="such as 0.5, written as text; to predict numbers give --do_regression true"):
        load_examples(arguments(labels), seed=0)
    splits, label_names = load_examples(arguments(labels, do_regression=True), seed=0)
    assert splits["train"]["label"][:] == [0.5, 1000, -2, 3] and label_names is None
    assert load_examples(arguments(labels, do_regression=False), seed=0)[1] == sorted(labels)
    for bad in ("n/a", "", "NaN", "1_0", "inf"):
        with pytest.raises(UserError, match="must hold finite numbers; rows 5 do not"):
            load_examples(arguments([*labels, bad], do_regression=True), seed=0)
    # A word among them makes them names, of which NaN is one.
    assert load_examples(arguments(["0.5", "NaN", "low"]), seed=0)[1] == ["0.5", "NaN", "low"]


BAD_OPTIONS = {
    "no data": ([], "no training data"),
    "missing file": (["--train_file", "nowhere.csv"], "nowhere.csv does not exist"),
    "unknown type": (["--train_file", "data.xlsx"], r"unknown type \['.xlsx'\]"),
    "no such data set": (["--dataset_name", "nobody/nothing"], "cannot load the data set nobody/nothing"),
    "three texts": (["--text_column", "a", "b", "c"], "one column, or two"),
    "too long": (["--max_length", "33"], "--max_length 33 .* 32 tokens, of max_position_embeddings 32"),
    "too long when padded": (["--max_length", "31", "--pad_to_multiple_of", "10"], "multiple of 10"),
    "unknown metric": (["--metric_name", "exactitude"], "unknown metric 'exactitude'"),
    "unknown best metric": (["--metric_for_best_model", "bleu"], r"bleu is not one of \['accuracy'"),
    "no model": (["--config_name", "nowhere.json"], "cannot use the configuration nowhere.json"),
    "both models": (["--model_name_or_path", "somewhere"], "either --model_name_or_path"),
    "unknown override": (["--config_overrides", "depth=3"], r"has no \['depth'\] to override"),
    "no override": (["--config_overrides", "depth"], "takes key=value"),
    "k > n": (["--config_overrides", "projected_length=64"], "projected_length.*n = 32"),
    "small vocabulary": (["--config_overrides", "vocab_size=50"], "entries, the model .* only 50"),
    "batch size": (["--per_device_train_batch_size", "0"], "must be at least 1, not 0"),
    "checkpointing": (["--checkpointing_steps", "often"], "'epoch' or a number of steps, not 'often'"),
    "split": (["--validation_split_percentage", "0.1"], "cannot hold out 0.1 %"),
    "tracker": (["--with_tracking", "--report_to", "paper"], "paper"),
    "scheduler": (["--lr_scheduler_type", "cosine_with_min_lr"], "cannot use --lr_scheduler_type"),
    "task": (["--task_name", "snli"], "invalid choice: 'snli' .*cola.*imdb"),
    "smoothing": (["--label_smoothing_factor", "1"], "--label_smoothing_factor must be at least 0 and below 1"),
    "submission": (["--do_predict"], "--do_predict answers the test sets of --task_name cola"),
    "submission of files": (["--do_predict", "--task_name", "sst2"], "--train_file has none"),
    "layers": (["--layerwise_lr_decay", "1.5"], "--layerwise_lr_decay must be above 0 and at most 1, and is 1.5"),
    "option": (["--learnin_rate", "1"], "unknown arguments --learnin_rate 1"),
    "value": (["--learning_rate", "fast"], "invalid float value: 'fast'"),
    "diverging": (["--learning_rate", "1e30", "--max_grad_norm", "0"], "training has diverged"),
}


@pytest.mark.parametrize(("given", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_bad_options_are_refused(options, folder, tmp_path, given, message):
    arguments = options(*given)
    drop = {"no data": 4, "no such data set": 4, "split": 2}
    for name, count in drop.items():
        if given == BAD_OPTIONS[name][0]:
            start = 0 if count == 4 else 2
            del arguments[start : start + count]
    with pytest.raises(UserError, match=message) as caught:
        finetune.main(arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("script", ["finetune", "classify", "convert", "eval_classifier", "predict"])
def test_a_folder_that_is_not_there_is_said_first(script, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    more = {
        "finetune": ["--train_file", str(folder / "train.csv"), "--output_dir", "out"],
        "classify": ["a text"],
        "convert": ["--output_dir", "out"],
        "eval_classifier": ["--test_file", str(folder / "train.csv"), "--output_dir", "out"],
        "predict": ["--input_file", str(folder / "train.csv"), "--output_file", "out.jsonl"],
    }
    for name in ("models/mistyped", "./mistyped", "output/mistyped", str(tmp_path / "mistyped")):
        with pytest.raises(UserError, match=f"^there is no folder {name}, nor a file; cannot .* {name}: "):
            import_module(script).main([*more[script], "--model_name_or_path", name])
    for name in ("mistyped", "nobody/nothing"):
        with pytest.raises(UserError, match=f"^cannot .* {name}: "):
            import_module(script).main([*more[script], "--model_name_or_path", name])


def test_a_broken_model_is_refused(trained, folder, tmp_path):
    files = ["--train_file", str(folder / "train.csv"), "--output_dir", str(tmp_path / "out")]

    def start_from(name: str, spoil: Callable[[Path], object]) -> list[str]:
        shutil.copytree(trained, tmp_path / name, ignore=shutil.ignore_patterns("checkpoint-*"))
        spoil(tmp_path / name)
        return [*files, "--model_name_or_path", str(tmp_path / name)]

    weights = (trained / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="cannot load the model .*half, which may be incomplete"):
        finetune.main(start_from("half", lambda path: (path / "model.safetensors").write_bytes(weights[:-1000])))
    with pytest.raises(UserError, match="cannot load the model .*weightless"):
        finetune.main(start_from("weightless", lambda path: (path / "model.safetensors").unlink()))
    with pytest.raises(UserError, match="cannot use the configuration .*nameless"):
        finetune.main(start_from("nameless", lambda path: (path / "config.json").unlink()))

    def lose_a_layer(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        kept = {name: tensor for name, tensor in tensors.items() if not re.search(r"\.1\.", name)}
        assert len(kept) < len(tensors)
        save_file(kept, path / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(UserError, match="is incomplete: .* weights are missing"):
        finetune.main(start_from("layerless", lose_a_layer))


def test_cut_and_empty_texts_are_counted(options, tmp_path, capsys):
    rows = frame(48, seed=0)
    rows.loc[:11, "text"] = ["crimson azure " * 40] * 12
    rows.loc[12:14, "text"] = ""
    rows.to_csv(tmp_path / "rows.csv", index=False)
    finetune.main(options("--train_file", tmp_path / "rows.csv", "--max_train_steps", 1))
    printed = capsys.readouterr().err
    assert "warning: 12 of 48 train texts (25.0%) are longer than 32 tokens and were cut" in printed
    assert "warning: 3 of 48 train texts are empty" in printed
    assert results(tmp_path / "out")["cut_share_train"] == 0.25
    rows.assign(text=" ").to_csv(tmp_path / "empty.csv", index=False)
    with pytest.raises(UserError, match="all 48 training texts are empty.*--text_column"):
        finetune.main(options("--train_file", tmp_path / "empty.csv", output="empty"))
    assert not (tmp_path / "empty").exists()


def test_the_command_exits_with_2_and_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "finetune.py"), "--output_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: no training data: give --task_name, --dataset_name or --train_file\n"


# Results and baselines


def append(path: Path, number: int) -> None:
    common.append_result(path, {"number": number, f"only_{number % 3}": 0.5}, seed=number, argv=["--x"])


def test_results_of_many_runs_are_all_kept(tmp_path):
    path = tmp_path / "results" / "runs.csv"
    append(path, 0)
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("fork")) as pool:
        list(pool.map(append, [path] * 23, range(1, 24)))
    rows = list(csv.DictReader(path.open()))
    assert sorted(int(row["number"]) for row in rows) == list(range(24))
    assert all(row[f"only_{int(row['number']) % 3}"] == "0.5" for row in rows)
    assert {"commit", "date", "hardware", "torch", "transformers", "seed", "command"} <= rows[0].keys()
    assert [name.name for name in path.parent.iterdir()] == ["runs.csv"]


def test_baselines(folder, tmp_path, capsys):
    files = ["--train_file", str(folder / "train.csv"), "--validation_file", str(folder / "validation.csv")]
    baseline.main([*files, "--results_file", str(tmp_path / "results.csv")])
    rows = {row["model"]: float(row["eval_accuracy"]) for row in csv.DictReader((tmp_path / "results.csv").open())}
    assert rows == {"majority class": 0.5, "TF-IDF + logistic regression": 1.0}
    assert "TF-IDF + logistic regression" in capsys.readouterr().out


def test_baselines_of_a_task_have_its_score(tmp_path):
    data, results = save_task("mrpc", tmp_path / "mrpc"), tmp_path / "results.csv"
    baseline.main(["--task_name", "mrpc", "--dataset_name", str(data), "--results_file", str(results)])
    for row in csv.DictReader(results.open()):
        assert float(row["eval_score"]) == pytest.approx((float(row["eval_accuracy"]) + float(row["eval_f1"])) / 2)
        assert (row["task"], row["training_rows"], row["evaluated_rows"]) == ("mrpc", "24", "24")


def test_baselines_refuse_numbers(tmp_path):
    write_csv(tmp_path / "scores.csv", "text,label\na,0.5\nb,0.7\nc,0.1\n")
    with pytest.raises(UserError, match="the labels are numbers"):
        baseline.main(["--train_file", str(tmp_path / "scores.csv"), "--validation_split_percentage", "40"])


def test_compressed_files_are_compressed(formats):
    with gzip.open(formats["jsonl.gz"].train_file[0]) as file:
        assert json.loads(file.readline())["label"] == "warm"
