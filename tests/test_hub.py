"""Models and data sets by their names on the Hub: unmodified clients in fresh processes, against tests/hub_server.py.

python -m pytest tests/test_hub.py
"""

import io
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from transformers import AutoTokenizer

from hf_linformer import LinformerConfig, LinformerForMaskedLM
from hub_server import HubServer
from tiny import WORDS, save_classifier


# One process makes what they share.
pytestmark = pytest.mark.xdist_group("hub")

ROOT = Path(__file__).resolve().parent.parent
LABELS = ["law", "peace"]
TEXT = "our people and the law of the land"

# Each step runs, and says in a line of JSON what it found, or which error it met.
BEGINNING = """
import json, os, sys, time
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers import pipeline

TEXT = sys.argv[1]
trust = {"trust_remote_code": True}

def step(function):
    try:
        found = {"found": function()}
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps({"step": function.__name__, **found}), flush=True)

def logits(model, tokenizer):
    with torch.no_grad():
        return model.eval()(**tokenizer(TEXT, return_tensors="pt")).logits[0].tolist()

def classifier(name="me/classifier", **options):
    return AutoModelForSequenceClassification.from_pretrained(name, **trust, **options)

def mark(model):
    return sys.modules[type(model).__module__].MARK
"""


def steps(code: str, environment: dict[str, str], folder: Path, *arguments: str) -> dict[str, dict]:
    """What each step of a client in a process of its own found."""
    command = [sys.executable, "-I", "-c", BEGINNING + code, TEXT, *arguments]
    run = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"step"')]
    return {line.pop("step"): line for line in lines}


def found(answers: dict[str, dict], name: str) -> Any:
    """What a step found that is to end well."""
    assert "error" not in answers[name], f"{name}: {answers[name]['error']}"
    return answers[name]["found"]


def parquet(rows: list[dict]) -> bytes:
    file = io.BytesIO()
    pd.DataFrame(rows).to_parquet(file)
    return file.getvalue()


def jsonl(texts: list[str]) -> bytes:
    return "\n".join(json.dumps({"text": text}) for text in texts).encode()


def texts(count: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(5, 15))) for _ in range(count)]


def files_of(folder: Path, **changes: bytes) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files | {f"{name}.py": files[f"{name}.py"] + code for name, code in changes.items()}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A classifier in two revisions, also a private one and one whose downloads break; a masked-LM; two data sets."""
    folder = tmp_path_factory.mktemp("models")
    save_classifier(folder / "first", LABELS, initializer_range=0.5)
    save_classifier(folder / "second", LABELS, initializer_range=0.9)
    tokenizer = AutoTokenizer.from_pretrained(folder / "first")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": 32, "projected_length": 8}
    LinformerForMaskedLM(LinformerConfig(**sizes, pad_token_id=tokenizer.pad_token_id)).save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    with HubServer() as server:
        marked = files_of(folder / "first", modeling_linformer=b"\nMARK = 'first'\n")
        repository = server.add_repository("me/classifier", marked)
        repository.tags["v1"] = repository.head.sha
        repository.commit(files_of(folder / "second", modeling_linformer=b"\nMARK = 'second'\n"), "again")
        server.add_repository("me/private", files_of(folder / "first"), private=True)
        server.add_repository("me/breaking", files_of(folder / "first"))
        server.add_repository("me/lm", files_of(folder / "lm"))
        rows = [{"text": text, "label": LABELS[index % 2]} for index, text in enumerate(texts(40, seed=0))]
        data = {"train": parquet(rows[:32]), "validation": parquet(rows[32:])}
        letters = {f"data/{split}-00000-of-00001.parquet": content for split, content in data.items()}
        server.add_repository("me/letters", letters, kind="dataset")
        books = {f"{name}.jsonl": jsonl(texts(100, seed=1)) for name in ("train", "test")}
        server.add_repository("me/books", books | {"README.md": b"# Books\n"}, kind="dataset")
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The cache of the first client, which later ones go on with."""
    return tmp_path_factory.mktemp("home")


ONLINE = """
@step
def main_revision():
    model, tokenizer = classifier(), AutoTokenizer.from_pretrained("me/classifier", **trust)
    return [type(model).__module__.split(".")[0], mark(model), logits(model, tokenizer)]

@step
def pinned_by_tag():
    model = classifier(revision="v1")
    return [mark(model), logits(model, AutoTokenizer.from_pretrained("me/classifier", revision="v1", **trust))]

@step
def pinned_by_commit():
    return mark(classifier(revision=sys.argv[2]))

@step
def code_of_another_revision():
    model = classifier(code_revision="v1")
    return [mark(model), logits(model, AutoTokenizer.from_pretrained("me/classifier", **trust))]

@step
def other_auto_classes():
    names = [type(auto.from_pretrained("me/classifier", **trust)).__name__ for auto in (AutoConfig, AutoModel)]
    return names + [type(AutoModelForMaskedLM.from_pretrained("me/lm", **trust)).__name__]

@step
def pipelines():
    classified = pipeline("text-classification", "me/classifier", **trust)(TEXT)
    filled = pipeline("fill-mask", "me/lm", **trust)("our people and the<mask>", top_k=2)
    return [classified[0]["label"], len(filled)]

@step
def without_trust():
    return type(AutoModelForMaskedLM.from_pretrained("me/lm", trust_remote_code=False)).__name__

@step
def private_without_a_token():
    return type(classifier("me/private", token=False)).__name__

@step
def private_with_a_token():
    return type(classifier("me/private")).__name__

@step
def wrong_token():
    return type(classifier("me/breaking", token="hf_wrong")).__name__

@step
def no_repository():
    return type(classifier("me/nothing")).__name__

@step
def no_revision():
    return type(classifier(revision="v9")).__name__

@step
def broken_download():
    return type(classifier("me/breaking")).__name__

@step
def broken_download_again():
    model = classifier("me/breaking")
    return logits(model, AutoTokenizer.from_pretrained("me/breaking", **trust))
"""


@pytest.fixture(scope="module")
def online(hub, home):
    """What a client with an empty cache meets. A download breaks once in the middle, and is then refused for good."""
    hub.cut("GET", r"me/classifier/.*model\.safetensors", after=1000)
    hub.cut("GET", r"me/breaking/.*model\.safetensors", after=0, times=6)
    return steps(ONLINE, hub.environment(home), home, hub.repository("me/classifier").head.sha)


def test_models_load_by_their_name_at_each_revision(online, hub):
    module, mark, second = found(online, "main_revision")
    assert (module, mark) == ("transformers_modules", "second")
    mark, first = found(online, "pinned_by_tag")
    assert mark == "first" and first != pytest.approx(second, abs=1e-2)
    assert found(online, "pinned_by_commit") == "second"
    mark, logits = found(online, "code_of_another_revision")
    assert mark == "first" and logits == pytest.approx(second), "code of the one, weights of the other"
    names = ["LinformerConfig", "LinformerModel", "LinformerForMaskedLM"]
    assert found(online, "other_auto_classes") == names
    label, filled = found(online, "pipelines")
    assert label == LABELS[second.index(max(second))] and filled == 2


def test_what_may_not_be_had_is_said(online):
    assert "trust_remote_code" in online["without_trust"]["error"]
    assert found(online, "private_with_a_token") == "LinformerForSequenceClassification"
    assert "private" in online["private_without_a_token"]["error"]
    assert "401" in online["wrong_token"]["error"] or "token" in online["wrong_token"]["error"]
    assert "me/nothing is not a" in online["no_repository"]["error"]
    assert "v9 is not a valid git identifier" in online["no_revision"]["error"]


def test_a_download_that_breaks_is_an_error_and_then_begins_anew(online, hub):
    assert "found" in online["main_revision"], "one that breaks once goes on where it was"
    ranges = [asked for asked in hub.requests if "me/classifier" in asked and "model.safetensors" in asked]
    assert ranges.count(next(asked for asked in ranges if asked.startswith("GET"))) == 2
    assert "me/breaking" in online["broken_download"]["error"]
    assert found(online, "broken_download_again") == pytest.approx(found(online, "pinned_by_tag")[1])


OFFLINE = """
@step
def from_the_cache():
    return logits(classifier(), AutoTokenizer.from_pretrained("me/classifier", **trust))

@step
def pinned():
    return mark(classifier(revision="v1"))

@step
def not_in_the_cache():
    return type(classifier("me/other")).__name__
"""


def test_without_a_network_the_cache_is_enough(online, hub, home):
    asked = len(hub.requests)
    offline = steps(OFFLINE, hub.environment(home, HF_HUB_OFFLINE="1"), home)
    assert found(offline, "from_the_cache") == pytest.approx(found(online, "main_revision")[2])
    assert found(offline, "pinned") == "first"
    assert "couldn't find them in the cached files" in offline["not_in_the_cache"]["error"]
    assert len(hub.requests) == asked


TRAINER = """
from datasets import load_dataset
from transformers import Trainer, TrainingArguments

@step
def rows():
    plain = load_dataset("me/letters")
    streamed = load_dataset("me/letters", split="train", streaming=True)
    is_same = plain["train"]["text"][:] == [row["text"] for row in streamed]
    return [plain["train"].num_rows, plain["validation"].num_rows, is_same]

@step
def trained():
    tokenizer = AutoTokenizer.from_pretrained("me/classifier", **trust)
    ids = {"law": 0, "peace": 1}
    encode = lambda row: {**tokenizer(row["text"], truncation=True, max_length=24), "labels": ids[row["label"]]}
    data = load_dataset("me/letters", split="train").map(encode, remove_columns=["text", "label"])
    arguments = TrainingArguments(
        "trained", max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to="none", disable_tqdm=True,
        push_to_hub=True, hub_model_id="me/trained", hub_private_repo=True, save_steps=1,
    )
    trainer = Trainer(classifier(), arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.push_to_hub()
    return logits(trainer.model, tokenizer)
"""


def test_trainer_pushes_what_a_stranger_can_load(hub, tmp_path):
    online = steps(TRAINER, hub.environment(tmp_path / "home"), tmp_path)
    assert found(online, "rows") == [32, 8, True]
    trained = found(online, "trained")
    there = hub.repository("me/trained")
    assert there.private and {"modeling_linformer.py", "tokenizer.json", "README.md"} <= set(there.head.files)
    code = """
@step
def classified():
    answer = pipeline("text-classification", "me/trained", **trust)(TEXT)
    model, tokenizer = classifier("me/trained"), AutoTokenizer.from_pretrained("me/trained", **trust)
    return [answer[0]["label"], model.config.id2label[0], logits(model, tokenizer)]
"""
    stranger = steps(code, hub.environment(tmp_path / "other"), tmp_path)
    label, first, logits = found(stranger, "classified")
    assert first == LABELS[0] and label == LABELS[logits.index(max(logits))]
    assert logits == pytest.approx(trained, abs=1e-5)


def script(name: str, hub: HubServer, folder: Path, *options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, options)]
    run = subprocess.run(command, env=hub.environment(folder / "home"), cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return run


def test_fine_tuning_by_names_and_publishing_what_came_of_it(hub, tmp_path):
    output_dir = tmp_path / "out"
    given = ["--model_name_or_path", "me/lm", "--dataset_name", "me/letters", "--max_length", 24]
    script("finetune.py", hub, tmp_path, *given, "--max_train_steps", 2, "--output_dir", output_dir)
    assert json.loads((output_dir / "all_results.json").read_text())["history"]
    pushed = script("push_to_hub.py", hub, tmp_path, "--model_name_or_path", output_dir, "--hub_model_id", "me/tuned")
    there = hub.repository("me/tuned")
    assert there.private and there.head.files["model.safetensors"] == (output_dir / "model.safetensors").read_bytes()
    assert b"LinformerForSequenceClassification" in there.head.files["README.md"]
    assert not any("checkpoint" in name or name.endswith((".jsonl", ".bin")) for name in there.head.files)
    assert f'revision="{there.head.sha}"' in pushed.stdout


def test_pretraining_by_names_from_a_stream(hub, tmp_path):
    output_dir = tmp_path / "out"
    given = ["--model_name_or_path", "me/lm", "--dataset_name", "me/books", "--streaming", "true"]
    given += ["--validation_split", "test"]
    given += ["--max_train_steps", 2, "--max_length", 24, "--per_device_train_batch_size", 4]
    script("pretrain.py", hub, tmp_path, *given, "--output_dir", output_dir)
    assert json.loads((output_dir / "all_results.json").read_text())["tokens"] == 2 * 4 * 24
    assert hub.unknown == []
