"""Publish a saved Linformer, or this whole repository, on the Hugging Face Hub.

    python scripts/push_to_hub.py --model_name_or_path output/sotu --hub_model_id me/sotu --dry_run true
    python scripts/push_to_hub.py --model_name_or_path output/sotu --hub_model_id me/sotu --revision_tag v1.0
    python scripts/push_to_hub.py --model_name_or_path . --hub_model_id me/hf-linformer --public true

Log in first with `hf auth login`, or set HF_TOKEN to a token with the right to write.

Of a model's folder goes up what a model is made of; what training leaves behind stays here, and is named. Before that
a fresh process loads the very files that would go up, through the tokenizer and every Auto class of config.json. Of
this repository goes up what git tracks. All files become visible in one commit, or none does. Run again: nothing
changed is no new commit. A model without a README.md gets a short one, on the Hub alone.
"""

import fnmatch
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    ModelCardData,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash
from tqdm.auto import tqdm

from common import ROOT, UserError, format_table, one_line, parse_arguments, run_main


@dataclass
class Arguments:
    """What is published, and where."""

    model_name_or_path: str = field(
        metadata={"help": "The folder of a saved Linformer, or the root of this repository: all that git tracks."}
    )
    hub_model_id: str = field(metadata={"help": "The repository on the Hub: user/name, or organization/name."})
    public: bool = field(
        default=False, metadata={"help": "Everybody may see it. A repository that exists keeps its visibility."}
    )
    revision_tag: str | None = field(default=None, metadata={"help": "A tag for what is published, such as v1.0."})
    card: str | None = field(default=None, metadata={"help": "The model card. Default: README.md of the folder."})
    license: str | None = field(
        default=None, metadata={"help": "Where the card names no licence: its name on the Hub, such as apache-2.0."}
    )
    allow_files: list[str] | None = field(
        default=None, metadata={"help": "Patterns of more files of the folder to publish, such as '*.csv'."}
    )
    delete_files: list[str] | None = field(
        default=None, metadata={"help": "Patterns of files to delete on the Hub, of those that the folder lacks."}
    )
    commit_message: str = field(default="Upload a Linformer", metadata={"help": "Of the commit on the Hub."})
    dry_run: bool = field(
        default=False, metadata={"help": "Check everything here, show what would go up, and use no network."}
    )


CODE = ("configuration_linformer.py", "modeling_linformer.py")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
# The names, at the top of a folder, of what a model is made of.
MODEL_FILES = (
    *("README.md", "LICENSE*", "config.json", "*.safetensors", "*.safetensors.index.json", *CODE),
    *(*TOKENIZER, "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt"),
    *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
)
# Loading one of these can run code.
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
# What the Hub keeps as large files, also by their size.
LARGE_FILES = ("*.safetensors", "*.parquet", "*.arrow", "*.onnx", "*.npy", "*.npz", "*.gz", "*.zip", "*.tar")
LARGE_SIZE = 10 * 1000**2
PIPELINES = {
    "LinformerModel": "feature-extraction",
    "LinformerForMaskedLM": "fill-mask",
    "LinformerForSequenceClassification": "text-classification",
    "LinformerForTokenClassification": "token-classification",
    "LinformerForQuestionAnswering": "question-answering",
    "LinformerForMultipleChoice": "multiple-choice",
}


class Model(NamedTuple):
    """A saved Linformer: where it lies in what is published, its config.json, and the Auto class that it is of."""

    folder: str
    config: dict[str, Any]
    auto_class: str

    @property
    def architecture(self) -> str:
        return self.config["architectures"][0]


class Remote(NamedTuple):
    """What the Hub has: the commit on top, its files, the tags and their commits."""

    head: str
    private: bool
    files: dict[str, RepoFile]
    tags: dict[str, str]


def check_arguments(arguments: Arguments) -> None:
    """Refuse what cannot be meant before anything else is done."""
    folder = Path(arguments.model_name_or_path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"--model_name_or_path {folder} {what}; give the folder of a saved model")
    try:
        validate_repo_id(arguments.hub_model_id)
    except HFValidationError as error:
        raise UserError(
            f"--hub_model_id {arguments.hub_model_id!r} is no name on the Hub: {one_line(error)}"
        ) from error
    if "/" not in arguments.hub_model_id:
        name = arguments.hub_model_id
        raise UserError(f"--hub_model_id {name!r} does not say whose it is; give user/{name}, or organization/{name}")
    if arguments.card and not Path(arguments.card).is_file():
        raise UserError(f"--card {arguments.card} is no file; without --card the folder's README.md is taken")
    if arguments.revision_tag is not None and not re.fullmatch(r"\w[\w.-]*", arguments.revision_tag):
        raise UserError(f"--revision_tag {arguments.revision_tag!r} is no tag; give letters, digits, dots and dashes")


# What goes up


def files_in(folder: Path) -> dict[str, Path]:
    """All files of a folder by their path in it."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def ask_git(*command: str) -> list[str]:
    """The files that a git command lists in this repository, with `-z` among its options."""
    try:
        listed = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        raise UserError(f"git cannot say what it tracks in {ROOT}: {' '.join(reason.split())}") from error
    return [name for name in listed.split("\0") if name]


def changed_files() -> list[str]:
    """What differs from the last commit, staged or not."""
    return ask_git("diff", "--name-only", "-z", "HEAD")


def tracked_files() -> set[str]:
    """What git tracks. Raises `UserError` where that is not what the Hub would get."""
    if ignored := ask_git("ls-files", "-z", "--cached", "--ignored", "--exclude-standard"):
        raise UserError(f"the Hub leaves out what .gitignore names, and git tracks {', '.join(ignored)}; mend either")
    if deleted := ask_git("ls-files", "-z", "--deleted"):
        raise UserError(f"git tracks {', '.join(deleted)}, which is no longer there; commit that, or restore it")
    return set(ask_git("ls-files", "-z"))


def model_files(folder: Path, card: Path) -> set[str]:
    """The paths that the files of a model can have, in a folder that may hold others."""
    names = [path.name for path in folder.iterdir()]
    chosen = {name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in MODEL_FILES)}
    if "modules.json" in chosen:
        try:
            parts = [module["path"] for module in json.loads((folder / "modules.json").read_text(encoding="utf-8"))]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"cannot read modules.json of {folder}: {one_line(error)}") from error
        chosen |= {f"{part}/{name}" for part in parts for name in ("config.json", "model.safetensors")}
    if card.is_file():
        # The pictures that the card shows.
        chosen |= set(re.findall(r"!\[[^]]*\]\(([^)\s]+)", card.read_text(encoding="utf-8", errors="replace")))
    return chosen


def stage(arguments: Arguments, staged: Path) -> list[str]:
    """Link all that goes up into an empty folder, so that what is checked is what is published.

    Returns the files that are left out.
    """
    folder = Path(arguments.model_name_or_path).resolve()
    card = Path(arguments.card or folder / "README.md").resolve()
    if folder == ROOT:
        if arguments.allow_files:
            raise UserError("--allow_files is for a model's folder; of this repository all goes up that git tracks")
        there = chosen = tracked_files()
    else:
        there = set(files_in(folder))
        chosen = model_files(folder, card) & there
    for pattern in arguments.allow_files or []:
        if not (allowed := fnmatch.filter(there, pattern)):
            raise UserError(f"--allow_files {pattern}: no file of {folder} is called so")
        chosen |= set(allowed)
    if pickles := sorted(name for name in chosen if name.lower().endswith(PICKLES)):
        raise UserError(f"{', '.join(pickles)} can run code when loaded, and is not published; save it as safetensors")
    links = {name: folder / name for name in chosen} | ({"README.md": card} if card.is_file() else {})
    if folder != ROOT and (absent := [name for name in CODE if name not in links]):
        print(f"{' and '.join(absent)} of this repository will go up, since the folder has none")
        links |= {name: ROOT / name for name in absent}
    for name, source in links.items():
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).symlink_to(source)
    return sorted(there - chosen)


# Checks


def read_model(staged: Path, folder: str, name: str) -> Model:
    """The model in a folder of what goes up. Raises `UserError`, with `name` for the folder, if it is not whole."""
    place = staged / folder
    try:
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{name} has no config.json; give the folder that a Linformer was saved in") from error
    except ValueError as error:
        raise UserError(f"cannot read config.json of {name}: {one_line(error)}") from error
    config = config if isinstance(config, dict) else {}
    if config.get("model_type") != "linformer":
        raise UserError(f"{name} holds a model of type {config.get('model_type')!r}; only a Linformer is published")
    if not any(place.glob("*.safetensors")):
        raise UserError(f"{name} has no *.safetensors; save the model there with save_pretrained")
    if missing := [file for file in TOKENIZER if not (place / file).is_file()]:
        raise UserError(
            f"{name} has no {' and no '.join(missing)}, and a model is used with a tokenizer beside it; put it there "
            "with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    for file in CODE:
        if not (place / file).is_file() or (place / file).read_bytes() != (ROOT / file).read_bytes():
            raise UserError(
                f"{file} of {name} is not this repository's; if the model is to run with it, copy {ROOT / file} "
                "there, or else publish with the commit of this repository that the model was saved by"
            )
    auto_map = config.get("auto_map") or {}
    foreign = [value for value in auto_map.values() if f"{str(value).split('.')[0]}.py" not in CODE]
    if "AutoConfig" not in auto_map or foreign:
        raise UserError(
            f"auto_map in config.json of {name} must name classes of {' and '.join(CODE)}, beginning with AutoConfig, "
            f"and is {auto_map}; save the model with save_pretrained"
        )
    if "auto_map" in json.loads((place / TOKENIZER[1]).read_text(encoding="utf-8")):
        raise UserError(f"auto_map in {TOKENIZER[1]} of {name} names code for a tokenizer; a Linformer's has none")
    architecture = (config.get("architectures") or [None])[0]
    # LinformerForMaskedLM is also what AutoModelForPreTraining gives.
    own = [key for key, value in auto_map.items() if value.endswith(f".{architecture}") and "PreTraining" not in key]
    if not own:
        raise UserError(f"config.json of {name} has the architecture {architecture}, which auto_map does not name")
    return Model(folder, config, own[0])


# Run where no other copy of the code can stand in for the one beside the weights. One line for each step.
LOADING = """
import json, sys
import torch, transformers
folder, own, *auto_classes = sys.argv[1:]
trust = {"trust_remote_code": True}
config = transformers.AutoConfig.from_pretrained(folder, **trust)
print("{}", flush=True)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **trust)
if len(tokenizer) > config.vocab_size:
    sys.exit(f"the tokenizer has {len(tokenizer)} entries, and the model only {config.vocab_size}")
print("{}", flush=True)
for name in auto_classes:
    load = getattr(transformers, name).from_pretrained
    # A head for other labels than the model has can have weights of the same name.
    options = trust | {"use_safetensors": True, "ignore_mismatched_sizes": name != own}
    model, info = load(folder, dtype=torch.float32, output_loading_info=True, **options)
    if "transformers_modules" not in type(model).__module__:
        sys.exit(f"{type(model)} is not the class beside the weights")
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    missing += [mismatch[0] for mismatch in info["mismatched_keys"]]
    if name == own and (missing or unexpected):
        sys.exit(f"{len(missing)} weights are missing, {len(unexpected)} unknown: {(missing + unexpected)[:3]}")
    if name == own:
        inputs = tokenizer("Fellow citizens of the Senate", return_tensors="pt")
        inputs = {key: value[None] if "MultipleChoice" in own else value for key, value in inputs.items()}
        with torch.no_grad():
            if not model.eval()(**inputs)[0].isfinite().all():
                sys.exit("its answers are not finite numbers")
    base = f"{model.base_model_prefix}."
    print(json.dumps(sorted({key.removeprefix(base).split(".")[0] for key in missing})), flush=True)
"""


def load_in_fresh_process(staged: Path, model: Model, name: str) -> dict[str, list[str]]:
    """Load a model by its own files alone: each Auto class, to the parts that a checkpoint of this head leaves fresh.

    Raises `UserError` for what does not load, and if the head that it was saved with is not whole.
    """
    auto_classes = [key for key in model.config["auto_map"] if key.startswith("AutoModel")]
    # Its own head first, which is the most likely to fail.
    auto_classes.sort(key=lambda auto_class: auto_class != model.auto_class)
    steps = ["AutoConfig", "AutoTokenizer", *auto_classes]
    fresh = []
    with tempfile.TemporaryDirectory() as aside, tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        # What is loaded has no business with the token, and none with code in the cache.
        environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": aside, "HF_MODULES_CACHE": aside}
        command = [sys.executable, "-I", "-c", LOADING, str(staged / model.folder), model.auto_class, *auto_classes]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, env=environment, cwd=aside, text=True
        ) as process:
            assert process.stdout
            for line in tqdm(process.stdout, desc=f"Loading {name}", total=len(steps), leave=False):
                fresh.append(json.loads(line))
        if process.returncode:
            errors.seek(0)
            reason = [line.strip() for line in errors if line.strip()][-1:] or [f"it ended with {process.returncode}"]
            raise UserError(f"{name} does not load through {steps[len(fresh)]} in a fresh process: {reason[0]}")
    return dict(zip(auto_classes, fresh[2:]))


# The card


def minimal_text(model: Model, repo_id: str) -> str:
    """What can be said of a model by its configuration alone."""
    config = model.config
    labels = list((config.get("id2label") or {}).values())
    # A regression has one label, which says nothing.
    classes = ", ".join(labels) if len(labels) > 1 else ""
    says = f" It tells apart: {classes}." if classes and model.architecture.endswith("Classification") else ""
    return f"""
# {repo_id.split("/")[1]}

A [Linformer](https://arxiv.org/abs/2006.04768) ({model.architecture}) that reads up to
{config["max_position_embeddings"]:,} tokens: {config["num_hidden_layers"]} layers of width {config["hidden_size"]},
with the projection `{config["projection_type"]}`.{says}

```python
from transformers import {model.auto_class}, AutoTokenizer

model = {model.auto_class}.from_pretrained("{repo_id}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{repo_id}", trust_remote_code=True)
```

`trust_remote_code=True` runs `{CODE[0]}` and `{CODE[1]}` of this repository: read them, and pin a `revision`.

This page was written from the configuration. What the model was trained on, how good it is and what it must not be
used for are not known to it; whoever published the model can say.
"""


def make_card(arguments: Arguments, staged: Path, models: Sequence[Model]) -> tuple[list[str], list[str]]:
    """Complete the card in what goes up, or write a minimal one, by what is known for certain.

    Returns what was filled in, and what is still missing.
    """
    path = staged / "README.md"
    try:
        text = path.read_text(encoding="utf-8-sig") if path.is_file() else ""
        text = text or minimal_text(models[0], arguments.hub_model_id)
        card = ModelCard(text if text.startswith("---") else f"---\n\n---\n{text}")
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the model card {path.resolve()}: {one_line(error)}") from error
    known: dict[str, Any] = {"library_name": "transformers", "tags": ["linformer"], "license": arguments.license}
    if Path(arguments.model_name_or_path).resolve() == ROOT:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        known["license"] = arguments.license or project["license"].lower()
    else:
        known["pipeline_tag"] = PIPELINES.get(models[0].architecture)
    card_data = card.data
    assert isinstance(card_data, ModelCardData)
    if arguments.license and card_data.license not in (None, arguments.license):
        raise UserError(f"--license is {arguments.license}, and the card says {card_data.license}; mend either")
    filled = [key for key, value in known.items() if value and not getattr(card_data, key, None)]
    for key in filled:
        setattr(card_data, key, known[key])
    if filled:
        path.unlink(missing_ok=True)
        path.write_text(str(card), encoding="utf-8")
    wanted = {"license": "a licence (--license names one)", "library_name": "library_name"}
    missing = [words for key, words in wanted.items() if not getattr(card_data, key, None)]
    if not (card_data.pipeline_tag or card_data.tags):
        missing.append("a pipeline_tag or tags")
    if not re.search(r"```.*(from_pretrained|pipeline|SentenceTransformer)\(.*```", card.text, re.DOTALL):
        missing.append("a code block that says how the model is used")
    return filled, missing


# The plan


def is_large(name: str, size: int) -> bool:
    """Whether the Hub is expected to keep a file outside of git."""
    return size > LARGE_SIZE or any(fnmatch.fnmatch(name, pattern) for pattern in LARGE_FILES)


def print_plan(arguments: Arguments, files: Mapping[str, Path], left_out: Sequence[str]) -> None:
    """What goes up and what does not, and where to."""
    sizes = {name: path.stat().st_size for name, path in files.items()}
    rows = [
        {"stored": "lfs" if is_large(name, size) else "git", "bytes": size, "file": name}
        for name, size in sizes.items()
    ]
    print(format_table(rows))
    where = f"{len(rows)} files, {sum(sizes.values()):,} bytes, to {arguments.hub_model_id}"
    print(f"{where}, {'PUBLIC: everybody may see them' if arguments.public else 'private'}")
    if arguments.revision_tag:
        print(f"the commit is to be tagged {arguments.revision_tag}")
    if left_out:
        tops = Counter(name.split("/")[0] + ("/" if "/" in name else "") for name in left_out)
        names = [f"{top} ({count} files)" if top.endswith("/") else top for top, count in tops.items()]
        print(f"left out, no part of a model (--allow_files publishes more): {', '.join(names)}")


def print_fresh(model: Model, fresh: Mapping[str, Sequence[str]]) -> None:
    """Which heads a model loads with, and which parts of them nobody has trained."""
    print(f"{model.folder or 'the model'} loads through {model.auto_class}, whole", end="")
    others = [f"{name} ({', '.join(parts)})" for name, parts in fresh.items() if parts]
    print(f"; with fresh parts through {', '.join(others)}" if others else "")


# The Hub


@contextmanager
def mendable(repo_id: str, api: HfApi, state: str = "nothing was published") -> Iterator[None]:
    """Turn what the Hub and the network answer into a `UserError` that ends with the state of things."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise UserError("no token: log in with `hf auth login`, or set HF_TOKEN to a token that may write") from error
    except OfflineModeIsEnabled as error:
        raise UserError("HF_HUB_OFFLINE is set, and publishing needs the Hub; unset it, or give --dry_run") from error
    except HfHubHTTPError as error:
        reasons = {
            401: f"{api.endpoint} does not know this token; make one that may write, and `hf auth login --force`",
            403: f"this token has no right to write to {repo_id}; use one that may, or a repository of yours",
            412: f"{repo_id} was changed by others meanwhile; look at what they did, and run again",
        }
        reason = reasons.get(error.response.status_code, f"{api.endpoint} refuses: {one_line(error)}")
        raise UserError(f"{reason}; {state}") from error
    except HTTPError as error:
        broke = f"the connection to {api.endpoint} broke: {one_line(error)}"
        raise UserError(f"{broke}; {state}. Run the same command again") from error
    except ValueError as error:
        raise UserError(f"{api.endpoint} does not take it: {one_line(error)}; {state}") from error


def look(api: HfApi, repo_id: str) -> Remote | None:
    """What the Hub has under this name; None if it has nothing, or nothing that this user may see."""
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        return None
    assert info.sha
    tree = api.list_repo_tree(repo_id, recursive=True, revision=info.sha)
    files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(repo_id).tags}
    return Remote(info.sha, bool(info.private), files, tags)


def is_same(path: Path, there: RepoFile | None) -> bool:
    """Whether the Hub has the very same file."""
    if there is None or there.size != path.stat().st_size:
        return False
    if there.lfs is None:
        return there.blob_id == git_hash(path.read_bytes())
    with path.open("rb") as file:
        return there.lfs.sha256 == hashlib.file_digest(file, "sha256").hexdigest()


def changes(files: Mapping[str, Path], remote: Remote | None, patterns: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files to add or replace, and those to delete: of `patterns`, on the Hub and not here.

    Raises `UserError` if weights would stay that a loader could take for the new ones.
    """
    there = remote.files if remote else {}
    add = [name for name, path in files.items() if not is_same(path, there.get(name))]
    others = [name for name in there if name not in files and name != ".gitattributes"]
    delete = [name for name in others if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    kept = sorted(set(others) - set(delete))
    places = {Path(name).parent for name in files}
    suffixes = (".safetensors", ".safetensors.index.json", *PICKLES)
    if weights := [name for name in kept if name.endswith(suffixes) and Path(name).parent in places]:
        raise UserError(
            f"the Hub has weights that the folder has not, and that could be loaded instead: {', '.join(weights)}; "
            f"delete them in the same commit with --delete_files {' '.join(weights)}"
        )
    if kept:
        print(f"stays on the Hub, not in the folder (--delete_files deletes): {', '.join(kept)}")
    return add, delete


def check_remote(arguments: Arguments, remote: Remote | None) -> None:
    """Say what becomes of a repository that exists; refuse to publish what was not meant to be public."""
    if remote is None:
        return
    if not remote.private and not arguments.public:
        raise UserError(f"{arguments.hub_model_id} exists and is public; give --public true if that is meant")
    if remote.private and arguments.public:
        print(f"{arguments.hub_model_id} exists and is private, and stays so; its settings on the Hub can change that")


def commit_files(
    api: HfApi, arguments: Arguments, files: Mapping[str, Path], add: Sequence[str], delete: Sequence[str]
) -> str:
    """One commit of all changes; its SHA. Raises `UserError` that says what became of it where it went wrong."""
    repo_id = arguments.hub_model_id
    api.create_repo(repo_id, private=not arguments.public, exist_ok=True)
    before = look(api, repo_id)
    assert before
    additions = [CommitOperationAdd(name, str(files[name])) for name in add]
    deletions = [CommitOperationDelete(name, is_folder=False) for name in delete]
    message, parent = arguments.commit_message, before.head
    try:
        api.create_commit(repo_id, [*additions, *deletions], commit_message=message, parent_commit=parent)
        reason = "the Hub left files out"
    # Beside errors of the network: an upload ends with a RuntimeError that has one of them for its cause.
    except (HTTPError, OSError, RuntimeError) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise
        reason = f"the upload broke: {one_line(error)}" + (f" {one_line(error.__cause__)}" if error.__cause__ else "")
    with mendable(repo_id, api, f"{reason}; all becomes visible in one commit, or nothing does"):
        now = look(api, repo_id)
    if now is None or now.head == before.head:
        raise UserError(f"{reason}; nothing was published. Run the same command again")
    # Also the answer to a commit that was made can be lost.
    if lost := [name for name in add if not is_same(files[name], now.files.get(name))]:
        raise UserError(f"{reason}; {repo_id} is at commit {now.head} without {', '.join(lost)}: look at it there")
    return now.head


def publish(arguments: Arguments, files: dict[str, Path], card_is_written: bool) -> str:
    """Bring the repository on the Hub to these files, and tag it; the SHA of its commit."""
    api, repo_id, tag = HfApi(), arguments.hub_model_id, arguments.revision_tag
    with mendable(repo_id, api):
        user = api.whoami()
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise UserError(f"the token of {user['name']} may only read; make one that may write")
        remote = look(api, repo_id)
        check_remote(arguments, remote)
        if card_is_written and remote and "README.md" in remote.files:
            also = ", and --license changes nothing there" if arguments.license else ""
            print(f"the card on the Hub stays as it is, since the folder has none{also}")
            del files["README.md"], remote.files["README.md"]
        add, delete = changes(files, remote, arguments.delete_files or [])
        tagged = remote.tags.get(tag) if remote and tag else None
        if remote and tagged and (tagged != remote.head or add or delete):
            raise UserError(f"the tag {tag} of {repo_id} is on commit {tagged} already; choose another --revision_tag")
        if remote and not (add or delete):
            print(f"{repo_id} has all of this already: no new commit")
            sha = remote.head
        else:
            sha = commit_files(api, arguments, files, add, delete)
            print(f"published in {api.endpoint}/{repo_id}, commit {sha}")
    if tag and not tagged:
        with mendable(repo_id, api, f"commit {sha} is published, and not tagged"):
            api.create_tag(repo_id, tag=tag, revision=sha)
        print(f"tagged {tag}")
    return sha


def snippet(model: Model, repo_id: str, sha: str) -> str:
    """How the model is loaded, at exactly this commit."""
    where = f', subfolder="{model.folder}"' if model.folder else ""
    options = f'"{repo_id}"{where}, revision="{sha}", trust_remote_code=True'
    return (
        f"\nfrom transformers import {model.auto_class}, AutoTokenizer\n\n"
        f"model = {model.auto_class}.from_pretrained({options})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({options})"
    )


def find_models(staged: Path, given: str) -> list[Model]:
    """The models in what goes up: that of the folder, or all of this repository."""
    if Path(given).resolve() != ROOT:
        return [read_model(staged, "", given)]
    # A config.json without a tokenizer is of a part of a model, as for sentence-transformers.
    folders = [path.parent for path in sorted(staged.rglob("config.json")) if (path.parent / TOKENIZER[0]).is_file()]
    names = [folder.relative_to(staged).as_posix() for folder in folders]
    return [read_model(staged, name, name) for name in names]


def check_problems(arguments: Arguments, missing: Sequence[str]) -> None:
    """Warn of what a private repository may lack; refuse to show it to everybody."""
    problems = [f"the card lacks {' and '.join(missing)}"] if missing else []
    if Path(arguments.model_name_or_path).resolve() == ROOT and (modified := changed_files()):
        problems.append(f"changes are not committed in {', '.join(modified)}")
    if problems and arguments.public:
        raise UserError(f"{'; '.join(problems)}; mend that before all can see it, or leave out --public")
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)


def check_and_publish(arguments: Arguments, staged: Path) -> None:
    """Stage, check, show, publish; `staged` is an empty folder."""
    given = arguments.model_name_or_path
    left_out = stage(arguments, staged)
    models = find_models(staged, given)
    card_is_written = not (staged / "README.md").is_file()
    filled, missing = make_card(arguments, staged, models)
    check_problems(arguments, missing)
    for model in models:
        print_fresh(model, load_in_fresh_process(staged, model, model.folder or given))
    files = files_in(staged)
    print_plan(arguments, files, left_out)
    if card_is_written:
        print("README.md is written for the upload, from config.json; --card or a README.md in the folder says more")
    elif filled:
        print(f"README.md goes up with {', '.join(filled)} filled in; your file stays as it is")
    if arguments.dry_run:
        print("--dry_run: nothing was sent")
        return
    sha = publish(arguments, files, card_is_written)
    for model in models:
        print(snippet(model, arguments.hub_model_id, sha))


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments([Arguments], argv, description=__doc__)
    check_arguments(arguments)
    with tempfile.TemporaryDirectory() as staged:
        check_and_publish(arguments, Path(staged).resolve())


if __name__ == "__main__":
    run_main(main)
