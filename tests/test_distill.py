"""scripts/distill.py: a Linformer comes nearer to its source, and long_only leaves its short texts as they were."""

import csv
import json
import multiprocessing
import os
import random
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel

import convert
import distill
from checkpointing import list_checkpoints
from common import UserError
from distill import DistillationArguments, Pair, distillation_loss, divergence, load_pair, relative_errors, teach
from fidelity import draw_rows, measure_fidelity
from hf_linformer import LinformerConfig
from teacher import states_of, states_of_windows
from tiny import AUTO_CLASSES, WORDS, save_source, tiny_tokenizer


# What a source can read, and up to where its Linformer of 6 slots without a window is exact.
N, EXACT = 24, 6
POSITIONS = "embeddings.position_embeddings.weight"


@pytest.fixture(autouse=True)
def one_package():
    """Pytest imports the root's __init__.py too, under the folder's name; the scripts know the package alone."""
    AutoConfig.register("linformer", LinformerConfig, exist_ok=True)


def write_texts(path: Path, words: list[int], seed: int = 0) -> Path:
    """Texts of so many words each."""
    generator = random.Random(seed)
    texts = [" ".join(generator.choices(WORDS, k=count)) for count in words]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    lengths = [30 + 2 * (index % 20) for index in range(40)]
    return {
        "train": write_texts(folder / "train.jsonl", lengths),
        "validation": write_texts(folder / "validation.jsonl", [60] * 8, seed=1),
    }


class Folders:
    """A source without dropout, the Linformer that scripts/convert.py makes of it, and runs that teach it."""

    def __init__(self, folder: Path, files: dict[str, Path]):
        self.folder, self.files = folder, files
        self.teacher, self.student = folder / "teacher", folder / "student"

    def convert(self, *options, model_type: str = "bert", head: str = "base", **changes) -> "Folders":
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
        save_source(self.teacher, model_type, head, **dropout, **changes)
        given = ["--model_name_or_path", self.teacher, "--output_dir", self.student, "--max_eval_samples", 0]
        given += ["--projected_length", EXACT, "--local_window", 0, *options]
        convert.main([str(option) for option in given])
        return self

    def options(self, *given, output: str = "distilled") -> list[str]:
        """Options of a run of 14 steps; those given come last and so override."""
        options = ["--teacher_name_or_path", self.teacher, "--model_name_or_path", self.student]
        options += [part for name, path in self.files.items() for part in (f"--{name}_file", path)]
        options += ["--output_dir", self.folder / output, "--learning_rate", 3e-3, "--seed", 3]
        return [str(option) for option in [*options, *given]]

    def distill(self, *given, output: str = "distilled") -> Path:
        distill.main(self.options(*given, output=output))
        return self.folder / output

    def pair(self) -> Pair:
        pair = load_pair(DistillationArguments(str(self.teacher), str(self.student)))
        pair.student.eval()
        return pair


@pytest.fixture
def folders(tmp_path, files) -> Folders:
    return Folders(tmp_path, files)


def results(output_dir: Path) -> dict:
    return json.loads((output_dir / "all_results.json").read_text())


def changed_weights(before: Path, after: Path) -> set[str]:
    """Names of the weights that are not the same, bit for bit."""
    old, new = (load_file(path / "model.safetensors") for path in (before, after))
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


def a_batch(lengths: list[int], seed: int = 0) -> dict[str, Tensor]:
    """Rows of so many random words between BERT's special tokens, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.stack([torch.arange(max(lengths)) < length for length in lengths])
    input_ids = torch.randint(5, 5 + len(WORDS), mask.shape, generator=generator)
    input_ids[:, 0] = 2
    for row, length in zip(input_ids, lengths):
        row[length - 1] = 3
    return {"input_ids": input_ids.where(mask, 0), "attention_mask": mask.long()}


def literal_errors(ours: Tensor, theirs: Tensor, lengths: list[int]) -> list[float]:
    """Squared relative error of every layer, token by token, the mean over rows: (B, layers, N, D)"""
    errors = []
    for layer in range(ours.shape[1]):
        of_rows = []
        for row, length in enumerate(lengths):
            difference = size = 0.0
            for token in range(length):
                for a, b in zip(ours[row, layer, token].tolist(), theirs[row, layer, token].tolist()):
                    difference += (a - b) ** 2
                    size += b**2
            of_rows.append(difference / size)
        errors.append(sum(of_rows) / len(of_rows))
    return errors


# What a run gives


@pytest.mark.parametrize("kind", ["mean_pool", "linear"])
@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_it_comes_nearer_to_its_source(model_type, kind, folders):
    folders.convert("--projection_type", kind, model_type=model_type)
    output_dir = folders.distill("--lengths", 12, N, "--num_train_epochs", 2)
    found = results(output_dir)
    for name in ("token_cosine_12", f"token_cosine_{N}"):
        assert found["history"][-1][f"eval_{name}"] > found["before"][name] + 0.03

    # What was measured is what was saved, and its layers are nearer too.
    tokenizer = AutoTokenizer.from_pretrained(output_dir)
    texts = [json.loads(line)["text"] for line in folders.files["validation"].open()]
    rows = draw_rows(texts, tokenizer, [N], count=24)
    teacher = AutoModel.from_pretrained(folders.teacher)
    before, after = (
        measure_fidelity(teacher, AutoModel.from_pretrained(path), rows, N)[0]
        for path in (folders.student, output_dir)
    )
    assert found["before"][f"token_cosine_{N}"] == pytest.approx(before["token_cosine"], abs=1e-5)
    best = max(found["history"], key=lambda row: row["eval_token_cosine"])
    assert best[f"eval_token_cosine_{N}"] == pytest.approx(after["token_cosine"], abs=1e-5)
    assert all(new < 0.95 * old for new, old in zip(after["layer_errors"], before["layer_errors"]))


@pytest.mark.parametrize("head", AUTO_CLASSES)
def test_the_saved_folder_is_whole(head, folders):
    output_dir = folders.convert(head=head).distill("--max_train_steps", 1, "--lengths", 8)
    names = {path.name for path in output_dir.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "training_args.json", "all_results.json"} <= names
    assert {"configuration_linformer.py", "modeling_linformer.py"} <= names
    assert not [name for name in names if "partial" in name]
    model, report = AUTO_CLASSES[head].from_pretrained(output_dir, output_loading_info=True)
    assert type(model).__name__.startswith("Linformer") and not report["missing_keys"]
    assert "AutoModelForMaskedLM" in model.config.auto_map
    assert json.loads((output_dir / "training_args.json").read_text())["learning_rate"] == 3e-3


def test_a_pooler_that_the_source_lacks_is_not_made_up(folders):
    output_dir = folders.convert(model_type="electra").distill("--max_train_steps", 1, "--lengths", 8)
    assert not [name for name in load_file(folders.student / "model.safetensors") if "pooler" in name]
    assert changed_weights(folders.student, output_dir)


def test_rows_of_results(folders, tmp_path, capsys):
    table = tmp_path / "results/distill.csv"
    folders.convert("--max_position_embeddings", 48)
    options = ["--lengths", 48, 8, N, "--max_length", 40, "--max_eval_samples", 3, "--data_name", "words"]
    output_dir = folders.distill(*options, "--results_file", table)
    with table.open() as file:
        rows = list(csv.DictReader(file))
    columns = "commit date hardware torch transformers seed command experiment source data projection_type "
    columns += "projected_length local_window slot_projections max_position_embeddings trainable "
    columns += "trained_weights train_tokens learning_rate seconds length texts target keys_a_query token_cosine "
    columns += "embedding_cosine layer_errors"
    assert list(rows[0]) == columns.split()
    assert [(row["length"], row["target"]) for row in rows] == [("8", "whole"), ("24", "whole"), ("48", "windows")]
    texts = [json.loads(line)["text"].split() for line in folders.files["train"].open()]
    # Every piece, of 38 words at most, stands between two special tokens.
    tokens = sum(len(text) + 2 * -(-len(text) // 38) for text in texts)
    weights = sum(weight.numel() for weight in load_file(output_dir / "model.safetensors").values())
    for row in rows:
        assert (row["experiment"], row["source"], row["data"]) == ("distill", str(folders.teacher), "words")
        assert (row["projection_type"], row["projected_length"], row["local_window"]) == ("mean_pool", "6", "0")
        assert (row["max_position_embeddings"], row["texts"], row["seed"]) == ("48", "3", "3")
        assert (row["trainable"], row["trained_weights"], row["learning_rate"]) == ("all", str(weights), "0.003")
        assert row["train_tokens"] == str(tokens) and float(row["seconds"]) > 0
        assert "--data_name words" in row["command"] and len(row["layer_errors"].split()) == 2
        measured = results(output_dir)["history"][-1][f"eval_token_cosine_{row['length']}"]
        assert float(row["token_cosine"]) == pytest.approx(measured, abs=1e-5)
    printed = capsys.readouterr().out
    assert f"{tokens:,} tokens in" in printed and str(output_dir) in printed


def test_pieces_hold_the_whole_text(folders):
    tokenizer = tiny_tokenizer(pad_token_id=0)
    dataset = distill.load_data_files({"train": str(folders.files["train"])})["train"]
    blank = dataset.from_dict({"text": ["", "  \n", None] * 40})
    texts = distill.Dataset.from_list([*blank, *dataset])
    pieces = distill.cut_into_pieces(texts, "text", tokenizer, 10, None)
    assert [len(piece) for piece in pieces["input_ids"]] == list(pieces["length"])
    assert max(pieces["length"]) == 10
    words: list[str] = []
    for piece in pieces["input_ids"]:
        assert (piece[0], piece[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        words += tokenizer.convert_ids_to_tokens(piece[1:-1])
    assert words == [word for text in dataset["text"] for word in text.split()]


# The loss


def test_relative_errors():
    lengths = [5, 3, 1]
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 3, 2, 5, 4, dtype=torch.float64)
    mask = torch.stack([torch.arange(5) < length for length in lengths]).long()
    errors = relative_errors(ours, theirs, mask)
    assert errors.tolist() == pytest.approx(literal_errors(ours, theirs, lengths), rel=1e-5)
    assert not relative_errors(theirs, theirs, mask).any()

    pads = ~mask.bool()[:, None, :, None]
    spoilt = relative_errors(ours.masked_fill(pads, 1e6), theirs.masked_fill(pads, -1e6), mask)
    assert torch.equal(spoilt, errors)
    # Both states are of every token that counts.
    for row, length in enumerate(lengths):
        changed = theirs.clone()
        changed[row, :, length - 1] += 1
        assert (relative_errors(ours, changed, mask) != errors).all()


@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0])
def test_the_loss_is_the_weighted_mean_over_layers(weight, folders):
    pair = folders.convert().pair()
    lengths = [N, 9, 14]
    batch = a_batch(lengths)
    states = [torch.stack(each(**batch, output_hidden_states=True).hidden_states[1:], dim=1) for each in pair[:2]]
    first, last = literal_errors(states[1], states[0], lengths)
    assert min(first, last) > 1e-2 and abs(first - last) > 1e-3
    arguments = DistillationArguments("", "", last_layer_weight=weight)
    loss = distillation_loss(pair, pair.student, batch, arguments)
    assert loss.item() == pytest.approx((first + weight * last) / (1 + weight), rel=1e-4)


def test_a_perfect_student_has_nothing_to_learn(folders):
    pair = folders.convert("--projected_length", N, head="sequence_classification", num_labels=3).pair()
    arguments = DistillationArguments("", "", logits_weight=1.0)
    loss = distillation_loss(pair, pair.student, a_batch([N, 9, 14]), arguments)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert max(float(p.grad.abs().max()) for p in pair.student.parameters() if p.grad is not None) < 1e-4


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_rows_longer_than_the_teacher_reads_are_taught_by_windows(model_type, folders):
    pair = folders.convert("--max_position_embeddings", 48, model_type=model_type).pair()
    assert pair.source_n == N
    lengths = [41, N + 1, N, 7]
    batch = a_batch(lengths)
    pads = ~batch["attention_mask"].bool()
    batch["input_ids"][pads] = pair.tokenizer.pad_token_id
    states, logits = teach(pair, batch)
    assert states.shape == (4, 2, 41, 20) and logits is None
    for row, length, taught in zip(batch["input_ids"], lengths, states):
        with torch.no_grad():
            alone = states_of_windows(pair.teacher, row[:length], N)[1:]
        torch.testing.assert_close(taught[:, :length], alone)
    assert not states.requires_grad


def test_rows_that_the_teacher_reads_are_taught_whole(folders):
    pair = folders.convert(head="token_classification", num_labels=3).pair()
    lengths = [N, 9]
    batch = a_batch(lengths)
    states, logits = teach(pair, batch)
    assert logits is not None and logits.shape == (2, N, 3)
    for row, length, taught, outputs in zip(batch["input_ids"], lengths, states, logits):
        with torch.no_grad():
            torch.testing.assert_close(taught[:, :length], states_of(pair.teacher.bert, row[None, :length])[0, 1:])
            torch.testing.assert_close(outputs[:length], pair.teacher(row[None, :length]).logits[0])


def test_divergence():
    torch.manual_seed(0)
    logits, expected = torch.randn(2, 4, 3, dtype=torch.float64)
    literal = 0.0
    for ours, theirs in zip(logits.softmax(dim=-1).tolist(), expected.softmax(dim=-1)):
        literal += sum(float(p * (p / q).log()) for q, p in zip(ours, theirs))
    assert divergence(logits, expected, "single_label_classification").item() == pytest.approx(literal / 4)
    assert divergence(logits, expected, None).item() == pytest.approx(literal / 4)
    square = sum((a - b) ** 2 for a, b in zip(logits.flatten().tolist(), expected.flatten().tolist())) / 12
    assert divergence(logits, expected, "regression").item() == pytest.approx(square)
    # Of several labels each is a distribution over yes and no, and the smallest loss is where they are equal.
    exact = expected.clone().requires_grad_()
    least = divergence(exact, expected, "multi_label_classification")
    assert divergence(logits, expected, "multi_label_classification") > least
    assert torch.autograd.grad(least, exact)[0].abs().max() < 1e-9


# Heads


@pytest.mark.parametrize("head", ["sequence_classification", "token_classification"])
def test_the_outputs_of_a_classifier(head, folders):
    pair = folders.convert(head=head, num_labels=8).pair()
    batch = a_batch([N, 17, 20], seed=5)

    def of_logits(student: PreTrainedModel) -> Tensor:
        with torch.no_grad():
            theirs, ours = (each(**batch).logits.double() for each in (pair.teacher, student))
        if head == "token_classification":
            theirs, ours = (logits[batch["attention_mask"].bool()] for logits in (theirs, ours))
        p, q = theirs.softmax(dim=-1), ours.softmax(dim=-1)
        return (p * (p.log() - q.log())).sum(dim=-1).mean()

    without, with_logits = (
        distillation_loss(pair, pair.student, batch, DistillationArguments("", "", logits_weight=weight)).item()
        for weight in (0.0, 0.5)
    )
    before = of_logits(pair.student).item()
    assert before > 0.05
    assert with_logits - without == pytest.approx(0.5 * before, rel=1e-3)

    output_dir = folders.distill("--logits_weight", 1, "--num_train_epochs", 3)
    assert of_logits(AUTO_CLASSES[head].from_pretrained(output_dir).eval()) < 0.7 * before


def test_logits_of_windows_are_not_taught(folders):
    pair = folders.convert("--max_position_embeddings", 48, head="sequence_classification").pair()
    for lengths, is_taught in (([N, 9], True), ([N + 1, 9], False)):
        without, with_logits = (
            distillation_loss(pair, pair.student, a_batch(lengths), DistillationArguments("", "", logits_weight=w))
            for w in (0.0, 1.0)
        )
        assert (with_logits > without) == is_taught


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_masked_words(model_type, folders):
    pair = folders.convert(model_type=model_type, head="masked_lm").pair()
    batch = a_batch([N, 17, 20], seed=5)
    batch["input_ids"][~batch["attention_mask"].bool()] = pair.tokenizer.pad_token_id
    labels = batch["input_ids"].clone()
    chosen = torch.zeros_like(labels, dtype=torch.bool)
    chosen[:, 2:16:3] = True
    batch |= {"labels": labels.where(chosen, -100)}
    batch["input_ids"] = batch["input_ids"].masked_fill(chosen, pair.tokenizer.mask_token_id)

    def of_words(student: PreTrainedModel) -> float:
        with torch.no_grad():
            logits = student(batch["input_ids"], batch["attention_mask"]).logits
        return functional.cross_entropy(logits[chosen], labels[chosen]).item()

    before = of_words(pair.student)
    without, with_words = (
        distillation_loss(pair, pair.student, batch, DistillationArguments("", "", masked_lm_weight=weight)).item()
        for weight in (0.0, 0.5)
    )
    assert with_words - without == pytest.approx(0.5 * before, rel=1e-3)

    # Without its weight nothing reaches the head.
    plain = folders.distill("--max_train_steps", 3, output="plain")
    assert not any(name.startswith("lm_head.dense") for name in changed_weights(folders.student, plain))
    output_dir = folders.distill("--masked_lm_weight", 1, "--num_train_epochs", 3, "--learning_rate", 1e-2)
    assert {"lm_head.dense.weight", "lm_head.dense.bias"} <= changed_weights(folders.student, output_dir)
    assert of_words(AUTO_CLASSES["masked_lm"].from_pretrained(output_dir).eval()) < 0.9 * before


def test_a_batch_without_a_masked_word_has_a_loss(folders, tmp_path):
    """Of 6 words none is masked in one row out of three."""
    short = write_texts(tmp_path / "short.jsonl", [6] * 12)
    folders.convert(head="masked_lm")
    options = ["--train_file", short, "--per_device_train_batch_size", 1, "--masked_lm_weight", 1, "--lengths", 8]
    (history,) = results(folders.distill(*options))["history"]
    assert history["step"] == 12 and 0 < history["train_loss"] < float("inf")


# long_only


def short_outputs(folder: Path) -> list[Tensor]:
    """Of rows of up to EXACT tokens, each length alone and all in a batch."""
    model = AutoModel.from_pretrained(folder).eval()
    batches = [a_batch([length] * 2, seed=length) for length in range(2, EXACT + 1)]
    batches.append(a_batch([*range(2, EXACT + 1)], seed=9))
    with torch.no_grad():
        return [model(**batch).last_hidden_state[batch["attention_mask"].bool()] for batch in batches]


@pytest.mark.parametrize(
    "n, options",
    [
        (N, ["--projection_type", "linear"]),
        (48, ["--projection_type", "linear", "--projection_sharing", "none"]),
        (N, ["--slot_projections"]),
        (48, ["--slot_projections", "--local_window", 2]),
    ],
    ids=["linear", "linear-48", "slot_projections", "slot_projections-48"],
)
def test_long_only_leaves_short_texts_exact(n, options, folders, tmp_path):
    folders.convert("--max_position_embeddings", n, *options)
    given = ["--trainable", "long_only", "--max_length", n, "--lengths", 4, EXACT, n, "--num_train_epochs", 2]
    output_dir = folders.distill(*given, "--results_file", tmp_path / "results.csv")
    found = results(output_dir)
    assert found["history"][-1][f"eval_token_cosine_{n}"] > found["before"][f"token_cosine_{n}"] + 0.03
    for after, before in zip(short_outputs(output_dir), short_outputs(folders.student)):
        assert torch.equal(after, before)

    old, new = (load_file(path / "model.safetensors") for path in (folders.student, output_dir))
    projections = {name for name in old if name.endswith((".E", ".F")) or ".slot_" in name}
    assert changed_weights(folders.student, output_dir) - {POSITIONS} == projections != set()
    # The source has positions of its own up to N.
    moved = (old[POSITIONS] != new[POSITIONS]).any(dim=1)
    assert moved.tolist() == [row >= N for row in range(n)]
    with (tmp_path / "results.csv").open() as file:
        row = next(csv.DictReader(file))
    count = sum(old[name].numel() for name in projections) + (n - N) * 20
    assert (row["trainable"], row["trained_weights"]) == ("long_only", str(count))


def test_long_only_without_learned_projections(folders):
    folders.convert("--local_window", 4, "--max_position_embeddings", 48)
    output_dir = folders.distill("--trainable", "long_only", "--max_length", 40, "--max_train_steps", 3)
    assert changed_weights(folders.student, output_dir) == {POSITIONS}
    old, new = (load_file(path / "model.safetensors")[POSITIONS] for path in (folders.student, output_dir))
    # There is no text of more than 40 tokens.
    assert (old != new).any(dim=1).tolist() == [N <= row < 40 for row in range(48)]


@pytest.mark.parametrize("kind, options", [("mean_pool", []), ("mean_pool", ["--local_window", 12]), ("linear", [])])
def test_long_only_with_nothing_to_train_is_refused(kind, options, folders):
    k = EXACT if options else N
    folders.convert("--projection_type", kind, "--projected_length", k, *options)
    with pytest.raises(UserError, match="long_only has nothing to train"):
        folders.distill("--trainable", "long_only")


# Going on


def forkserver():
    """Processes that begin with torch and the script imported."""
    pytest.importorskip("fcntl", reason="processes are forked from a server that has imported torch already")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(distill.__file__).parent), os.environ.get("PYTHONPATH", "")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distill"])
    return context


@pytest.mark.parametrize("head", ["base", "masked_lm"])
def test_it_resumes_exactly_after_being_killed(head, folders):
    folders.convert("--projection_type", "linear", head=head)
    given = ["--checkpointing_steps", 2, "--lengths", N, "--num_train_epochs", 2]
    given += ["--masked_lm_weight", 1] if head == "masked_lm" else []
    whole = folders.distill(*given, output="whole")
    arguments = folders.options(*given, "--resume_from_checkpoint", "last")
    output_dir = folders.folder / "distilled"

    def run(until: Callable[[], bool]) -> int | None:
        process = forkserver().Process(target=distill.main, args=(arguments,))
        process.start()
        deadline = time.monotonic() + 60
        while process.is_alive() and time.monotonic() < deadline and not until():
            time.sleep(0.0005)
        process.kill()
        process.join()
        return process.exitcode

    # In the middle of an epoch of 14 steps.
    assert run(lambda: any(step >= 4 for step in list_checkpoints(output_dir))) == -9
    assert not (output_dir / "all_results.json").exists()
    assert run(lambda: False) == 0
    assert changed_weights(folders.student, output_dir) and not changed_weights(whole, output_dir)
    histories = [results(path)["history"] for path in (whole, output_dir)]
    assert histories[0] == histories[1] and histories[0][-1]["step"] == 28
    assert not list(output_dir.glob(".*"))


def one_of_two(rank: int, port: int, arguments: list[str]) -> None:
    """What torchrun does for each process."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    distill.main(arguments)


def test_two_processes_learn_as_one(folders):
    """Errors are relative to a batch, so that two batches a step are compared, and not one of twice the rows."""
    folders.convert("--projection_type", "linear")
    given = ["--per_device_train_batch_size", 4, "--lengths", N, "--max_train_steps", 6]
    alone = folders.distill(*given, "--gradient_accumulation_steps", 2, output="alone")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = folders.options(*given, output="together")
    processes = [forkserver().Process(target=one_of_two, args=(rank, port, arguments)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    together = folders.folder / "together"
    (one,), (two,) = (results(path)["history"] for path in (alone, together))
    assert two == pytest.approx(one, abs=1e-4) and two["step"] == 6
    weights = [load_file(path / "model.safetensors") for path in (alone, together)]
    start = load_file(folders.student / "model.safetensors")
    moved = max(float((weights[0][name] - start[name]).abs().max()) for name in start)
    # Gradients are summed in another order, which AdamW enlarges where they are nearly zero.
    off = torch.cat([(weights[0][name] - weights[1][name]).abs().flatten() for name in start])
    assert moved > 1e-2 and off.mean() < 1e-5


def test_gradient_checkpointing_changes_nothing(folders):
    folders.convert("--projection_type", "linear")
    given = ["--max_train_steps", 3, "--lengths", N]
    plain, recomputed = (
        folders.distill(*given, *more, output=name)
        for name, more in (("plain", []), ("recomputed", ["--gradient_checkpointing"]))
    )
    assert changed_weights(folders.student, plain) and not changed_weights(plain, recomputed)


# What is refused


@pytest.mark.parametrize(
    "changes", [{"vocab_size": 54}, {"hidden_size": 24}, {"num_hidden_layers": 3}], ids=lambda changes: [*changes][0]
)
def test_a_teacher_of_another_size_is_refused(changes, folders, tmp_path):
    folders.convert()
    save_source(tmp_path / "other", "bert", **changes)
    ((name, value),) = changes.items()
    with pytest.raises(UserError, match=rf"student has {name} \d+ and .*other {value}: the one was not converted"):
        folders.distill("--teacher_name_or_path", tmp_path / "other")


def test_models_that_are_no_pair_are_refused(folders, tmp_path):
    folders.convert()
    with pytest.raises(UserError, match="teacher is a bert model; scripts/convert.py makes a Linformer of it"):
        folders.distill("--model_name_or_path", folders.teacher)
    with pytest.raises(UserError, match="the source is a Linformer already"):
        folders.distill("--teacher_name_or_path", folders.student)
    with pytest.raises(UserError, match="cannot load the model .*nowhere"):
        folders.distill("--teacher_name_or_path", tmp_path / "nowhere")
    # A teacher without the student's head would be taught from by random weights.
    classifier = Folders(tmp_path / "classifier", folders.files).convert(head="sequence_classification")
    with pytest.raises(UserError, match="teacher is incomplete: 2 weights are missing, such as classifier.bias"):
        classifier.distill("--teacher_name_or_path", folders.teacher)


@pytest.mark.parametrize(
    "head, option",
    [
        ("base", "masked_lm_weight"),
        ("sequence_classification", "masked_lm_weight"),
        ("base", "logits_weight"),
        ("question_answering", "logits_weight"),
    ],
)
def test_losses_that_a_head_does_not_have_are_refused(head, option, folders):
    folders.convert(head=head)
    with pytest.raises(UserError, match=f"--{option} needs a .*head.*student has {head}"):
        folders.distill(f"--{option}", 0.5)


BAD_OPTIONS = {
    "too long": (["--max_length", 25], "--max_length 25 .* 24 tokens"),
    "too short": (["--max_length", 7], "--max_length 7 must lie between 8"),
    "length beyond n": (["--lengths", 8, 25], "--lengths 25 .* 24 tokens"),
    "no length": (["--lengths", 0, 8], "--lengths 0"),
    "negative weight": (["--logits_weight", -1], "--logits_weight must not be negative, and is -1"),
    "decay": (["--trainable", "long_only", "--weight_decay", 0.1], "--weight_decay would move"),
    "trainable": (["--trainable", "some"], "--trainable.*'some'"),
    "metric": (["--metric_for_best_model", "bleu"], r"bleu is not one of \['token_cosine'"),
    "column": (["--text_column", "words"], r"no column 'words'; --text_column can be one of \['text'\]"),
    "no files": (["--train_file", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
    "no pieces": (["--max_train_samples", 0], "--max_train_samples .* 0"),
    "no comparison": (["--max_eval_samples", 0], "--max_eval_samples .* 0"),
    "batch size": (["--per_device_train_batch_size", 0], "must be at least 1, not 0"),
}


@pytest.mark.parametrize("given, message", BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_bad_options_are_refused(given, message, folders):
    folders.convert()
    with pytest.raises(UserError, match=message) as caught:
        folders.distill(*given)
    assert "\n" not in str(caught.value)
    assert not (folders.folder / "distilled").exists()


def test_a_share_of_masked_tokens_that_is_none_is_refused(folders):
    folders.convert(head="masked_lm")
    with pytest.raises(UserError, match="--mlm_probability .* 1.5"):
        folders.distill("--masked_lm_weight", 1, "--mlm_probability", 1.5)


@pytest.mark.parametrize("name", ["train", "validation"])
def test_files_without_text_are_refused(name, folders, tmp_path):
    folders.convert()
    blank = write_texts(tmp_path / "blank.jsonl", [0, 0, 0])
    with pytest.raises(UserError, match="there is no text"):
        folders.distill(f"--{name}_file", blank)
    other = tmp_path / "other.jsonl"
    other.write_text('{"words": "the of and"}\n')
    with pytest.raises(UserError, match=r"other.jsonl has no column 'text'; .* \['words'\]"):
        folders.distill(f"--{name}_file", other)


def test_a_model_that_is_there_is_not_overwritten(folders):
    folders.convert()
    (folders.folder / "distilled").mkdir()
    kept = folders.folder / "distilled/config.json"
    kept.write_text("mine")
    with pytest.raises(UserError, match="distilled already holds a model"):
        folders.distill()
    assert kept.read_text() == "mine"
