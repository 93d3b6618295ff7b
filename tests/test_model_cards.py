"""Model cards say what the results and the code say, and scripts/make_model_card.py notices where they do not.

python -m pytest tests/test_model_cards.py
"""

import csv
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoTokenizer
from transformers.pipelines import PIPELINE_REGISTRY

import make_model_card
from common import UserError
from hf_linformer import LinformerConfig, LinformerForMaskedLM
from make_tables import read_rows


ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "model_cards").glob("*.yaml"))
# The packages that the code blocks of the cards import.
USED = ("sentence_transformers",)
SMALL = """
title: small
summary: A Linformer of {hidden_size} numbers a token and {parameters:,} parameters. It reads {{braces}} too.
intended_use: Tests.
license: apache-2.0
language: [en]
pipeline_tag: fill-mask
tags: [linformer]
datasets: []
usage:
  - text: "What stands in place of the mask:"
    code: |
      from transformers import pipeline

      fill = pipeline("fill-mask", "checkpoints/small", trust_remote_code=True)
      print(len(fill("The state of the<mask> is strong.")), "guesses")
numbers:
  - heading: Perplexity beside the twin
    text: Of the same budget.
    results_file: pretraining.csv
    where: command.str.contains("--max_train_steps 2000 ") and step == 2000
    columns:
      model: "{run_name}"
      k: "{projected_length}"
      tokens: "{tokens:,}"
      perplexity: "{validation_perplexity:.1f}"
evaluations:
  - results_file: pretraining.csv
    where: &run run_name == "mean_128_window_32" and step == 6100
    task_type: fill-mask
    task_name: Masked language modelling
    dataset_type: books
    dataset_name: Held-out novels
    metrics: {perplexity: validation_perplexity}
recipe:
  text: Pretrained from scratch.
  facts: {data: novels | old}
  run:
    results_file: pretraining.csv
    where: *run
    computed: {hours: tokens / tokens_per_second / 3600}
    columns: {tokens: "{tokens:,}", hours: "{hours:.2f}", command: "`{command}`", of the commit: "{commit}"}
  command: bash runs/pretraining_study.sh
limits: It knows nothing.
licences: {code: Apache 2.0, weights: Apache 2.0, data: public domain}
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint with a masked-LM head and random weights."""
    folder = tmp_path_factory.mktemp("checkpoints") / "small"
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = LinformerConfig(max_position_embeddings=32, projected_length=8, **sizes)
    LinformerForMaskedLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "tokenizer").save_pretrained(folder)
    return folder


class Place:
    """Folders of a card's sources, to change and to make cards of."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.checkpoint = folder / "checkpoints" / "small"
        self.readme = self.checkpoint / "README.md"
        self.description = folder / "cards" / "small.yaml"
        self.results = folder / "results"
        shutil.copytree(checkpoint, self.checkpoint)
        self.description.parent.mkdir()
        shutil.copy(ROOT / "model_cards" / "template.md", self.description.parent)
        self.results.mkdir()
        shutil.copy(ROOT / "results" / "pretraining.csv", self.results)
        self.describe()

    def describe(self, *keys: str | int, value: object = None, code: str | None = 'print("one")') -> None:
        """Write the description with the value at `keys` changed, or without the last of them."""
        described = yaml.load(SMALL, yaml.BaseLoader)
        if code is not None:
            described["usage"][0]["code"] = code
        *path, last = keys or ("title",)
        inner = described
        for key in path:
            inner = inner[key]
        if value is not None:
            inner[last] = value
        elif keys:
            del inner[last]
        self.description.write_text(yaml.safe_dump(described, sort_keys=False))

    def run(self, *more: object) -> str:
        folders = {"cards": self.description.parent, "checkpoints": self.checkpoint.parent, "results": self.results}
        options = [f"--{name}_dir={folder}" for name, folder in folders.items()]
        make_model_card.main([*options, *map(str, more)])
        return self.readme.read_text()


@pytest.fixture
def place(tmp_path, checkpoint) -> Place:
    return Place(tmp_path, checkpoint)


NUMBER = r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?![\w.])"


def numbers_of(line: str) -> list[str]:
    return re.findall(NUMBER, line)


def roundings(row: dict[str, str]) -> set[str]:
    """All that the numbers in a row of results may be written as, with up to four digits behind the point."""
    numbers = [float(cell) for cell in row.values() if re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", cell)]
    return {f"{number:,.{digits}f}" for number in numbers for digits in range(5)}


# The cards that ship


def test_cards_say_what_their_sources_say():
    make_model_card.main(["--check", "true"])
    assert NAMES == sorted(path.parent.name for path in (ROOT / "checkpoints").glob("*/config.json"))


@pytest.mark.skipif(not all(map(find_spec, USED)), reason=f"the code blocks of the cards import {', '.join(USED)}")
def test_code_blocks_print_what_the_cards_say():
    make_model_card.main(["--check", "true", "--check_code", "true"])


@pytest.mark.parametrize("name", NAMES)
def test_metadata(name):
    path = ROOT / "checkpoints" / name / "README.md"
    data = ModelCard.load(path).data
    assert data.library_name == "transformers" and data.license == "apache-2.0" and data.language == ["en"]
    # What the Hub offers to do with it is what the library can do.
    assert data.pipeline_tag in PIPELINE_REGISTRY.get_supported_tasks()
    assert "linformer" in data.tags
    again = ModelCard(str(ModelCard.load(path))).data
    assert again.model_name == data.model_name == name
    assert again.eval_results == data.eval_results and len(data.eval_results) > 0
    about = make_model_card.read_description(ROOT / "model_cards" / f"{name}.yaml")
    sources = [
        (one.results_file, metric, column) for one in about.evaluations for metric, column in one.metrics.items()
    ]
    for result, (file, metric, column) in zip(data.eval_results, sources, strict=True):
        assert result.metric_type == metric
        assert result.metric_value in [float(row[column]) for row in read_rows(ROOT / "results" / file) if row[column]]


@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_a_table_is_in_the_results(name):
    text = (ROOT / "checkpoints" / name / "README.md").read_text()
    tables = re.findall(r"((?:\|.*\|\n)+)\nFrom `(results/\S+)`", text)
    assert len(tables) >= 1
    for table, file in tables:
        rows = [roundings(row) for row in read_rows(ROOT / file)]
        lines = [numbers_of(line) for line in table.splitlines()[2:]]
        assert sum(map(len, lines)) > 10
        for line in lines:
            assert any(set(line) <= row for row in rows), f"no row of {file} holds {line}"


# A new checkpoint


def test_a_new_checkpoint_needs_a_description_and_no_code(place, capsys):
    place.describe(code=None)
    text = place.run()
    assert "wrote" in capsys.readouterr().out
    assert "```text\n5 guesses\n```" in text
    config = LinformerConfig.from_pretrained(place.checkpoint)
    assert f"A Linformer of {config.hidden_size} numbers" in text and "reads {braces} too" in text

    rows = list(csv.DictReader((ROOT / "results" / "pretraining.csv").open()))
    chosen = [row for row in rows if "--max_train_steps 2000 " in row["command"] and row["step"] == "2000"]
    lines = [
        f"| {row['run_name']} | {row['projected_length'].removesuffix('.0') or '–'} | {int(row['tokens']):,} | "
        f"{float(row['validation_perplexity']):.1f} |"
        for row in chosen
    ]
    assert len(lines) >= 4 and "\n".join(lines) in text
    (run,) = (row for row in rows if row["run_name"] == "mean_128_window_32" and row["step"] == "6100")
    hours = int(run["tokens"]) / float(run["tokens_per_second"]) / 3600
    assert "| data | novels \\| old |" in text
    assert f"| hours | {hours:.2f} |\n| command | `{run['command']}` |" in text
    (result,) = ModelCard.load(place.readme).data.eval_results
    assert result.metric_value == float(run["validation_perplexity"])
    assert ModelCard.load(place.readme).data.base_model is None
    place.run("--check", "true")


# Out of date


def test_a_changed_result_is_noticed(place):
    place.run()
    file = place.results / "pretraining.csv"
    rows = file.read_text()
    assert rows.count(",559.314") == 1
    file.write_text(rows.replace(",559.314", ",123.4"))
    with pytest.raises(UserError, match=r"small: .*README.md is out of date, line \d+ is '.*559.3 .*' and .*'.*123.4"):
        place.run("--check", "true")
    assert "123.4" in place.run()
    place.run("--check", "true")
    # A row that joins those that are selected.
    selected = next(line for line in reversed(rows.splitlines()) if ",6100," in line)
    file.write_text(file.read_text() + selected.replace("6100", "2000") + "\n")
    with pytest.raises(UserError, match="out of date"):
        place.run("--check", "true")


@pytest.mark.parametrize("name", make_model_card.CODE_FILES)
def test_changed_code_is_noticed(place, name):
    place.run()
    with (place.checkpoint / name).open("a") as file:
        file.write("# One more line.\n")
    with pytest.raises(UserError, match=f"out of date, line .*{name}.* and should be .*make it again"):
        place.run("--check", "true")
    (place.checkpoint / name).unlink()
    with pytest.raises(UserError, match=f"has no {name}"):
        place.run("--check", "true")


def test_a_changed_code_block_and_a_changed_output_are_noticed(place):
    text = place.run()
    place.readme.write_text(text.replace("```text\none\n", "```text\ntwo\n"))
    place.run("--check", "true")
    with pytest.raises(UserError, match="line .* is 'two' and should be 'one'"):
        place.run("--check", "true", "--check_code", "true")
    place.describe(code='print("another")')
    with pytest.raises(UserError, match="is 'print.\"one\".' and should be 'print.\"another\".'"):
        place.run("--check", "true")


def test_a_picture_goes_with_its_card(place):
    picture = place.results / "drawn.png"
    place.describe("figure", value={"file": "drawn.png", "caption": "Drawn."})
    with pytest.raises(UserError, match="there is no picture .*drawn.png"):
        place.run()
    picture.write_bytes(b"one")
    copy = place.checkpoint / "drawn.png"
    copy.write_bytes(b"of the user")
    with pytest.raises(UserError, match="drawn.png was not put there by this script; --overwrite true"):
        place.run()
    assert copy.read_bytes() == b"of the user"
    assert "![Drawn.](drawn.png)" in place.run("--overwrite", "true")
    place.run("--check", "true")
    picture.write_bytes(b"another")
    with pytest.raises(UserError, match="drawn.png is not the picture in"):
        place.run("--check", "true")
    place.run()
    assert copy.read_bytes() == b"another"
    picture.write_bytes(bytes(make_model_card.LARGEST_FIGURE + 1))
    with pytest.raises(UserError, match="100,001 bytes and may have 100,000"):
        place.run()


def test_what_others_made_stays(place):
    with pytest.raises(UserError, match="README.md does not exist"):
        place.run("--check", "true")
    place.readme.write_text("# Mine\n")
    with pytest.raises(UserError, match="README.md was not made by this script; --overwrite true"):
        place.run()
    assert place.readme.read_text() == "# Mine\n"
    with pytest.raises(UserError, match="out of date, line 1 is '# Mine' and should be '---'"):
        place.run("--check", "true")
    assert place.run("--overwrite", "true").startswith("---\n")
    # Its own card it replaces.
    place.describe("title", value="other")
    assert "# other" in place.run()


# Bad input


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("limits",), None, r"small.yaml lacks the keys \['limits'\]"),
        (("recipe", "command"), None, r"small.yaml, recipe, lacks the keys \['command'\]"),
        (("numbers", 0, "columns"), None, r"numbers 1, lacks the keys \['columns'\]"),
        (
            ("licences", "pictures"),
            "none",
            r"licences, has unknown keys \['pictures'\]; the keys are \['code', ",
        ),
        (("numbers",), "none", "numbers, must map keys to values, found str"),
        (("recipe",), ["none"], "recipe 1, must map keys to values, found str"),
        (("language",), "en", "small.yaml is not as it should be: .*'language'"),
        (("summary",), "Of {size} numbers", "asks for 'size', and config.json has .*'hidden_size'"),
        (
            ("summary",),
            "Of {hidden_size:d.} numbers",
            "'Of {hidden_size:d.} numbers' cannot be filled from",
        ),
        (("numbers", 0, "columns", "k"), "{size}", "asks for 'size', and pretraining.csv has .*'projected_length'"),
        (("numbers", 0, "columns", "k"), "{}", "cannot be filled from pretraining.csv"),
        (
            ("numbers", 0, "where"),
            "size == 3",
            "cannot be asked of .*'size' is not defined; its columns are",
        ),
        (("numbers", 0, "where"), "step ==", "'step =='.* cannot be asked of .*pretraining.csv"),
        (("numbers", 0, "where"), "step == 3", "no row of .*pretraining.csv is selected by 'step == 3'"),
        (("numbers", 0, "results_file"), "nowhere.csv", "there are no results in .*nowhere.csv"),
        (
            ("evaluations", 0, "where"),
            "step == 2000",
            r"\d rows of pretraining.csv are selected by 'step",
        ),
        (
            ("evaluations", 0, "metrics", "perplexity"),
            "size",
            "perplexity is the column 'size' .* no number",
        ),
        (("evaluations", 0, "metrics", "perplexity"), "run_name", "holds 'mean_128_window_32', no number"),
        (("recipe", "run", "computed", "hours"), "tokens / size", "'tokens / size'.* cannot be asked of"),
        (("usage", 0, "code"), "print(1 / 0)", "a code block ends with 1, ZeroDivisionError: division by zero"),
        (("usage", 0, "code"), "pass", "a code block prints nothing: 'pass"),
    ],
)
def test_bad_descriptions_are_refused(place, keys, value, message):
    place.describe(*keys, value=value)
    with pytest.raises(UserError, match=message):
        place.run()
    assert not place.readme.exists()


def test_bad_folders_are_refused(place, tmp_path):
    with pytest.raises(UserError, match=r"\['other'\] have no NAME.yaml in .*, which has \['small'\]"):
        place.run("--name", "other")
    shutil.copytree(place.checkpoint, place.checkpoint.with_name("second"))
    with pytest.raises(UserError, match=r"\['second'\] have no NAME.yaml"):
        place.run("--check", "true")
    place.description.write_text("title: [")
    with pytest.raises(UserError, match="cannot read .*small.yaml"):
        place.run("--name", "small")
    place.describe()
    (place.checkpoint / "model.safetensors").write_bytes(b"none")
    with pytest.raises(UserError, match="small is no checkpoint of a Linformer"):
        place.run("--name", "small")
    with pytest.raises(UserError, match="there are no checkpoints in"):
        make_model_card.main([f"--checkpoints_dir={tmp_path / 'x'}", f"--cards_dir={tmp_path / 'x'}"])
    with pytest.raises(UserError, match="--check_code true goes with --check true"):
        place.run("--check_code", "true")
