"""scripts/push_to_hub.py: what it refuses, what it shows, and what becomes of a Hub, which is tests/hub_server.py.

python -m pytest tests/test_push_to_hub.py
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import push_to_hub
from common import UserError
from hub_server import READER, HubServer
from tiny import save_classifier


ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "checkpoints/linformer-all-MiniLM-L6-v2"
LABELS = ["law", "peace", "war"]


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A tiny classifier as `finetune.py` and `Trainer` leave it, with all that a training leaves beside it."""
    folder = save_classifier(tmp_path_factory.mktemp("saved") / "classifier", LABELS)
    (folder / "log.jsonl").write_text("{}\n")
    (folder / "training_args.bin").write_bytes(b"\x80\x04")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    (folder / "checkpoint-30").mkdir()
    for name in ("optimizer.bin", "model.safetensors"):
        (folder / "checkpoint-30" / name).write_bytes(b"")
    return folder


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "classifier")


def dry_run(folder: Path | str, *options: object, name: str = "me/model") -> None:
    given = ["--model_name_or_path", folder, "--hub_model_id", name, "--dry_run", "true", *options]
    push_to_hub.main([str(option) for option in given])


def run(command: list[str], **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, **options)


# What is refused


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def spoil_code(folder: Path) -> None:
    with (folder / "modeling_linformer.py").open("a") as file:
        file.write("import os\n")


SPOILT = {
    r"no config\.json": lambda folder: (folder / "config.json").unlink(),
    r"cannot read config\.json": lambda folder: (folder / "config.json").write_text("{"),
    "of type 'bert'": lambda folder: change_config(folder, model_type="bert"),
    r"no \*\.safetensors": rename_weights,
    r"no tokenizer\.json, and a model": lambda folder: (folder / "tokenizer.json").unlink(),
    r"modeling_linformer\.py of .* is not this repository's": spoil_code,
    "auto_map .* must name classes": lambda folder: change_config(
        folder, auto_map={"AutoConfig": "you/code--configuration_linformer.LinformerConfig"}
    ),
    r"auto_map in tokenizer_config\.json": lambda folder: (folder / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["you/code--tokenization.Tokenizer", null]}}'
    ),
    "architecture LinformerForOtherThings": lambda folder: change_config(
        folder, architectures=["LinformerForOtherThings"]
    ),
    "cannot read the model card": lambda folder: (folder / "README.md").write_text("---\na: [\n---\n"),
    r"cannot read modules\.json": lambda folder: (folder / "modules.json").write_text("[{}]"),
}


@pytest.mark.parametrize("message", SPOILT)
def test_a_folder_that_is_not_whole(copied, message):
    SPOILT[message](copied)
    with pytest.raises(UserError, match=message):
        dry_run(copied)


def test_options_that_cannot_be_meant(saved, tmp_path):
    card = tmp_path / "card.md"
    card.write_text("---\nlicense: mit\n---\n")
    for options, message in {
        ("--card", str(tmp_path / "none.md")): "is no file",
        ("--revision_tag", "v 1"): "is no tag",
        ("--allow_files", "*.bin"): r"training_args\.bin can run code",
        ("--allow_files", "*.csv"): "no file of",
        ("--card", str(card), "--license", "apache-2.0"): "the card says mit",
    }.items():
        with pytest.raises(UserError, match=message):
            dry_run(saved, *options)
    for name, message in {"model": "whose it is", "me/mo del": "is no name", "me//model": "is no name"}.items():
        with pytest.raises(UserError, match=message):
            dry_run(saved, name=name)
    with pytest.raises(UserError, match="does not exist"):
        dry_run(tmp_path / "none")
    with pytest.raises(UserError, match="is a file"):
        dry_run(card)
    with pytest.raises(UserError, match="git tracks"):
        dry_run(ROOT, "--allow_files", "*.csv")


def test_weights_that_are_not_whole_are_found_by_loading(copied):
    weights = load_file(copied / "model.safetensors")
    lost = next(name for name in weights if name.startswith("classifier."))
    del weights[lost]
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"AutoModelForSequenceClassification in .*: 1 weights are missing.*{lost}"):
        dry_run(copied)


# What is shown


def shown(printed: str) -> dict[str, str]:
    """The files of a plan to how the Hub is expected to store them."""
    return {file: stored for stored, file in re.findall(r"^ +(git|lfs) +[\d,]+ +(\S+)$", printed, re.MULTILINE)}


def test_a_dry_run_names_what_goes_up_and_what_stays(copied, capsys, monkeypatch):
    monkeypatch.setattr(push_to_hub, "HfApi", None)
    (copied / "modeling_linformer.py").unlink()
    (copied / "results.csv").write_text("accuracy\n0.9\n")
    (copied / "curve.png").write_bytes(b"")
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    dry_run(copied, "--allow_files", "results.*", "--revision_tag", "v1.0")
    printed = capsys.readouterr()
    assert shown(printed.out) == {
        **dict.fromkeys(("README.md", "config.json", "results.csv", *push_to_hub.CODE), "git"),
        **{"model.safetensors": "lfs", "tokenizer.json": "git", "tokenizer_config.json": "git"},
    }
    left_out = next(line for line in printed.out.splitlines() if line.startswith("left out"))
    for name in ("checkpoint-30/ (2 files)", ".git/ (1 files)", "log.jsonl", "training_args.bin", "curve.png"):
        assert name in left_out
    assert "modeling_linformer.py of this repository will go up" in printed.out
    assert "to me/model, private" in printed.out and "to be tagged v1.0" in printed.out
    assert "AutoModelForMaskedLM (lm_head)" in printed.out, "fresh heads are named"
    assert "the card lacks a licence" in printed.err
    assert before == {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}


def test_what_a_card_lacks_keeps_a_model_from_being_public(copied):
    (copied / "README.md").write_text("# A model\n")
    with pytest.raises(UserError, match=r"lacks a licence \(--license names one\) and a code block"):
        dry_run(copied, "--public", "true")


def test_the_written_card_says_what_is_known(saved, tmp_path):
    staged = tmp_path / "staged"
    staged.mkdir()
    arguments = push_to_hub.Arguments(str(saved), "me/model", license="mit")
    push_to_hub.stage(arguments, staged)
    models = push_to_hub.find_models(staged, str(saved))
    filled, missing = push_to_hub.make_card(arguments, staged, models)
    assert not missing
    card = ModelCard.load(staged / "README.md")
    known = {"library_name": "transformers", "license": "mit", "tags": ["linformer"]}
    assert card.data.to_dict() == known | {"pipeline_tag": "text-classification"}
    for words in ("up to\n32 tokens", "law, peace, war", 'from_pretrained("me/model", trust_remote_code=True)'):
        assert words in card.text
    assert not (saved / "README.md").exists()


def test_this_repository_goes_up_as_git_tracks_it(capsys):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip(f"this copy of the repository has no history: {listed.stderr}")
    tracked = listed.stdout.split()
    dry_run(ROOT)
    printed = capsys.readouterr().out
    assert sorted(shown(printed)) == sorted(tracked)
    assert "checkpoints/linformer-all-MiniLM-L6-v2 loads through AutoModel, whole" in printed
    assert "license filled in" in printed


# The Hub


def test_the_checkpoint_goes_up_and_loads_by_the_printed_snippet(hub, tmp_path):
    environment = hub.environment(tmp_path / "home")
    command = [str(ROOT / "scripts/push_to_hub.py"), "--model_name_or_path", str(CHECKPOINT)]
    command += ["--hub_model_id", "me/mini", "--public", "true", "--revision_tag", "v1.0"]
    first = run(command, env=environment, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    there = hub.repository("me/mini")
    assert not there.private and len(there.commits) == 2, "one beside that of the empty repository"
    local = {name: path.read_bytes() for name, path in push_to_hub.files_in(CHECKPOINT).items()}
    assert {name: content for name, content in there.head.files.items() if name != ".gitattributes"} == local
    assert there.tags == {"v1.0": there.head.sha}

    snippet = first.stdout[first.stdout.index("\nfrom transformers") :]
    assert snippet.count(f'revision="{there.head.sha}"') == 2
    code = snippet + "\nprint(tuple(model(**tokenizer('Canal.', return_tensors='pt')).last_hidden_state.shape))"
    loaded = run(["-I", "-c", code], env=hub.environment(tmp_path / "other", token=None), cwd=tmp_path)
    assert loaded.stdout.strip() == "(1, 4, 384)", loaded.stderr[-2000:]
    assert hub.unknown == []

    second = run(command, env=environment, cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert "has all of this already: no new commit" in second.stdout and len(there.commits) == 2
    assert snippet == second.stdout[second.stdout.index("\nfrom transformers") :]


# Publishes as the script does once its checks are passed: a list of steps, each with options, files and a token.
CLIENT = """
import contextlib, io, json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import push_to_hub
from common import UserError

for line in sys.stdin:
    step = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    os.environ.update({"HF_TOKEN": step["token"]} if step["token"] else {})
    arguments = push_to_hub.Arguments("unused", **step["options"])
    files = {path.name: path for path in sorted(Path(step["folder"]).iterdir())}
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            answer = {"sha": push_to_hub.publish(arguments, files, step["card_is_written"])}
    except UserError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer | {"said": said.getvalue()}), flush=True)
"""


@pytest.fixture(scope="module")
def publish(hub, tmp_path_factory):
    """Calls `push_to_hub.publish` in a process of its own, with folders of a few small files."""
    home = tmp_path_factory.mktemp("home")
    errors = home / "stderr.txt"
    process = subprocess.Popen(
        [sys.executable, "-c", CLIENT, str(ROOT / "scripts")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors.open("w"),
        env=hub.environment(home, token=None),
        text=True,
    )

    def call(name, files, token="hf_writer", card_is_written=False, **options):
        folder = tmp_path_factory.mktemp("files")
        for path, content in files.items():
            (folder / path).write_bytes(content)
        step = {"options": {"hub_model_id": name, **options}, "folder": str(folder), "token": token}
        process.stdin.write(json.dumps(step | {"card_is_written": card_is_written}) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, errors.read_text()[-3000:]
        return json.loads(answer)

    yield call
    process.stdin.close()
    process.wait()


FILES = {"README.md": b"# A model\n", "config.json": b"{}", "model.safetensors": bytes(range(256)) * 2000}


def test_a_token_that_may_not_write(hub, publish):
    assert "no token: log in with `hf auth login`" in publish("me/tokens", FILES, token=None)["error"]
    assert "does not know this token" in publish("me/tokens", FILES, token="hf_wrong")["error"]
    assert "the token of me may only read" in publish("me/tokens", FILES, token=READER)["error"]
    assert "no right to write to me/tokens" in publish("me/tokens", FILES, token="hf_other")["error"]
    assert ("model", "me/tokens") not in hub.repositories


def test_a_repository_is_private_unless_told_and_keeps_what_it_is(hub, publish):
    assert "sha" in publish("me/private", FILES)
    assert hub.repository("me/private").private
    said = publish("me/private", FILES | {"config.json": b"{} "}, public=True)["said"]
    assert "exists and is private, and stays so" in said and hub.repository("me/private").private

    hub.add_repository("me/public", {})
    assert "exists and is public; give --public true" in publish("me/public", FILES)["error"]
    assert hub.repository("me/public").head.files == {}
    assert "sha" in publish("me/public", FILES, public=True)


def test_tags(hub, publish):
    first = publish("me/tags", FILES, revision_tag="v1")
    there = hub.repository("me/tags")
    assert there.tags == {"v1": first["sha"]}
    assert publish("me/tags", FILES, revision_tag="v1")["sha"] == first["sha"], "it is there already"
    refused = publish("me/tags", FILES | {"config.json": b'{"a": 1}'}, revision_tag="v1")["error"]
    assert f"the tag v1 of me/tags is on commit {first['sha']} already" in refused
    assert there.head.sha == first["sha"]
    second = publish("me/tags", FILES | {"config.json": b'{"a": 1}'}, revision_tag="v2")
    assert there.tags == {"v1": first["sha"], "v2": second["sha"]}
    # The files are there, and the tag is what is missing.
    hub.cut("POST", "/tag/", after=0)
    failed = publish("me/tags", FILES, revision_tag="v3")["error"]
    assert f"commit {there.head.sha} is published, and not tagged" in failed
    assert publish("me/tags", FILES, revision_tag="v3")["sha"] == there.tags["v3"]


def test_what_the_folder_lacks_stays_unless_told_or_dangerous(hub, publish):
    publish("me/others", FILES | {"notes.txt": b"kept"})
    publish("me/others", {"config.json": b'{"a": 1}', "model.safetensors": b"2"})
    there = hub.repository("me/others")
    assert there.head.files["notes.txt"] == b"kept" and there.head.files["config.json"] == b'{"a": 1}'
    shards = {"config.json": b"{}", "model-00001-of-00001.safetensors": b"3"}
    refused = publish("me/others", shards)["error"]
    assert "could be loaded instead: model.safetensors" in refused and "--delete_files" in refused
    publish("me/others", shards, delete_files=["model.safetensors", "*.txt"])
    assert set(there.head.files) == {".gitattributes", "README.md", *shards}


def test_a_card_on_the_hub_is_not_replaced_by_a_written_one(hub, publish):
    publish("me/card", FILES)
    written = FILES | {"README.md": b"written from config.json"}
    for patterns in ([], ["*"]):
        said = publish("me/card", written, card_is_written=True, delete_files=patterns)["said"]
        assert "no new commit" in said and "stays as it is" in said
    assert hub.repository("me/card").head.files["README.md"] == FILES["README.md"]


def test_an_upload_that_breaks_leaves_nothing_and_goes_on(hub, publish):
    # In the commit, which is sent once.
    hub.cut("POST", "/commit/", after=100)
    failed = publish("me/broken", FILES)["error"]
    assert "the upload broke" in failed and "nothing was published. Run the same command again" in failed
    there = hub.repository("me/broken")
    assert set(there.head.files) == {".gitattributes"}
    sent_before = len(hub.requests)
    sha = publish("me/broken", FILES)["sha"]
    assert there.head.sha == sha and FILES.items() <= there.head.files.items()
    assert not any(asked.startswith("PUT") for asked in hub.requests[sent_before:]), "the weights had arrived"
    # In the weights, which the client sends again.
    weights = {"model.safetensors": FILES["model.safetensors"][::-1]}
    cut = hub.cut("PUT", "/lfs/", after=1000)
    assert publish("me/broken", FILES | weights)["sha"] == there.head.sha and cut.times == 0
    assert there.head.files["model.safetensors"] == weights["model.safetensors"]


@pytest.mark.slow
def test_a_hub_that_dies_under_the_weights_leaves_nothing(hub, publish):
    # The client tries six times, and waits 23 seconds between.
    hub.cut("PUT", "/lfs/", after=1000, times=6)
    files = FILES | {"model.safetensors": FILES["model.safetensors"][1:]}
    failed = publish("me/dying", files)["error"]
    assert "Error while uploading 'model.safetensors'" in failed and "nothing was published" in failed
    assert set(hub.repository("me/dying").head.files) == {".gitattributes"}
    assert publish("me/dying", files)["sha"] == hub.repository("me/dying").head.sha


def test_a_commit_whose_answer_is_lost_is_found(hub, publish):
    hub.cut("POST", "/commit/", after=None)
    sha = publish("me/lost", FILES)["sha"]
    assert hub.repository("me/lost").head.sha == sha and len(hub.repository("me/lost").commits) == 2


def test_a_hub_that_is_gone(publish, hub):
    hub.cut("GET", "/api/whoami-v2", after=0)
    assert "broke" in (failed := publish("me/gone", FILES)["error"]) and "nothing was published" in failed
    hub.cut("POST", "/commit/", after=0)
    hub.cut("GET", "/api/models/me/gone", after=0, times=9)
    failed = publish("me/gone", FILES)["error"]
    assert "connection" in failed
