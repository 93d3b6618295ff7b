"""Write the model card of each checkpoint from model_cards/NAME.yaml, results/*.csv and what its code blocks print.

    python scripts/make_model_card.py                    # checkpoints/NAME/README.md of every model_cards/NAME.yaml
    python scripts/make_model_card.py --name linformer-all-MiniLM-L6-v2
    python scripts/make_model_card.py --check true       # exit 2 if a card does not say what its sources say

A new checkpoint needs a model_cards/NAME.yaml and no code. It has the keys of `Description`, at the head of this file,
and what can be read from the checkpoint or from a CSV is not typed there: `{max_position_embeddings:,}` in prose is
that key of config.json, or `{parameters:,}`; `{recall_at_1:.3f}` in a cell of a table is that column of the CSV. What
a row lacks is a dash, and a brace that is meant is written twice. `where` is a query of pandas (`data == "speeches"`);
every row that it selects is shown, and all rows without it.

The code blocks run one by one, each in a fresh process without network, in a folder with nothing but `checkpoints`;
what they print stands below them. --check true takes that from the card as it is, unless --check_code true runs them
again. A card that this script did not make is not replaced without --overwrite true.
"""

import hashlib
import os
import re
import string
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args, get_type_hints

import pandas as pd
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, get_local_safetensors_metadata
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError, StrictDataclassError
from tqdm.auto import tqdm

from common import ROOT, UserError, one_line, parse_arguments, run_main, write_aside
from hf_linformer import LinformerConfig


@dataclass
class Arguments:
    """Which cards, and where their sources are."""

    name: list[str] | None = field(default=None, metadata={"help": "Checkpoints. Default: all of --checkpoints_dir."})
    check: bool = field(default=False, metadata={"help": "Change nothing; fail if a card is out of date."})
    check_code: bool = field(default=False, metadata={"help": "With --check: run the code blocks too."})
    overwrite: bool = field(
        default=False, metadata={"help": "Replace cards and pictures that this script did not make."}
    )
    cards_dir: str = field(
        default=str(ROOT / "model_cards"),
        metadata={"help": "Folder of NAME.yaml and of template.md, a jinja template."},
    )
    checkpoints_dir: str = field(default=str(ROOT / "checkpoints"), metadata={"help": "Folder of the checkpoints."})
    results_dir: str = field(default=str(ROOT / "results"), metadata={"help": "Folder of the CSVs and pictures."})


# What a YAML file says


@strict
@dataclass(kw_only=True)
class Selection:
    """Rows of a CSV of results. `computed` gives them further columns, as expressions of pandas over theirs."""

    results_file: str
    where: str | None = None
    computed: dict[str, str] = field(default_factory=dict)


@strict
@dataclass(kw_only=True)
class Table(Selection):
    """`columns`: the head of each column, and what stands in its cells."""

    heading: str
    text: str
    columns: dict[str, str]


@strict
@dataclass(kw_only=True)
class Evaluation(Selection):
    """One row of a CSV, for the metadata. `metrics`: the Hub's name of each metric, and its column."""

    task_type: str
    task_name: str
    dataset_type: str
    dataset_name: str
    dataset_split: str | None = None
    metrics: dict[str, str]


@strict
@dataclass(kw_only=True)
class Run(Selection):
    """One row of a CSV, of the run that made the weights. `columns`: what is told of it."""

    columns: dict[str, str]


@strict
@dataclass(kw_only=True)
class CodeBlock:
    text: str
    code: str


@strict
@dataclass(kw_only=True)
class Figure:
    """A picture in --results_dir, which is copied beside the card."""

    file: str
    caption: str


@strict
@dataclass(kw_only=True)
class Recipe:
    """How the weights were made. `facts` are those that no CSV holds; `command` makes them again."""

    text: str
    command: str
    facts: dict[str, str] = field(default_factory=dict)
    run: Run | None = None


@strict
@dataclass(kw_only=True)
class Licences:
    code: str
    weights: str
    data: str


@strict
@dataclass(kw_only=True)
class Description:
    """All of a card that its checkpoint and the results do not say themselves."""

    title: str
    # The two sentences that say what it is, then what it is for and not for.
    summary: str
    intended_use: str
    # Metadata, in the words of the Hub. `datasets`: names on the Hub, of all that was trained on; may be empty.
    license: str
    language: list[str]
    pipeline_tag: str
    tags: list[str]
    datasets: list[str]
    base_model: str | None = None
    usage: list[CodeBlock]
    numbers: list[Table]
    figure: Figure | None = None
    evaluations: list[Evaluation]
    recipe: Recipe
    limits: str
    licences: Licences
    # Further works to cite, as BibTeX, below the Linformer's paper.
    citation: str = ""


def build(kind: Any, values: Any, place: str) -> Any:
    """Make a `kind`, and the dataclasses in it, of what a YAML file says at `place`."""
    if not isinstance(values, dict):
        raise UserError(f"{place} must map keys to values, found {type(values).__name__}")
    known = {one.name: one for one in fields(kind)}
    required = [name for name, one in known.items() if one.default is MISSING and one.default_factory is MISSING]
    if missing := [name for name in required if name not in values]:
        raise UserError(f"{place} lacks the keys {missing}; it has {list(values)}")
    if unknown := [name for name in values if name not in known]:
        raise UserError(f"{place} has unknown keys {unknown}; the keys are {list(known)}")
    hints = get_type_hints(kind)
    built = {}
    for name, value in values.items():
        inner = next((part for part in (hints[name], *get_args(hints[name])) if is_dataclass(part)), None)
        if inner is None:
            built[name] = value
        elif isinstance(value, list):
            built[name] = [
                build(inner, one, f"{place}, {name} {number},") for number, one in enumerate(value, start=1)
            ]
        else:
            built[name] = build(inner, value, f"{place}, {name},")
    try:
        return kind(**built)
    except StrictDataclassError as error:
        raise UserError(f"{place} is not as it should be: {one_line(error)}") from error


def read_description(path: Path) -> Description:
    # The base loader leaves all values as they are written.
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error
    return build(Description, values, str(path))


# Numbers


class Wording(string.Formatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        return "–" if pd.isna(value) else super().format_field(value, format_spec)


def fill(text: str, values: Mapping[str, Any], source: str) -> str:
    """Put the values of a source into `{name:format}`."""
    try:
        return Wording().vformat(text, (), values)
    except KeyError as error:
        raise UserError(f"{text!r} asks for {error}, and {source} has {sorted(values)}") from error
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{text!r} cannot be filled from {source}: {one_line(error)}") from error


def select(selection: Selection, results_dir: Path) -> pd.DataFrame:
    """The rows, in the order of the file, with numbers as numbers."""
    path = results_dir / selection.results_file
    if not path.is_file():
        raise UserError(f"there are no results in {path}")
    try:
        # A commit such as 12e4567 is no number.
        rows = pd.read_csv(path, dtype={"commit": str}, keep_default_na=False, na_values=[""])
    except ValueError as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error
    columns = list(rows.columns)
    rows = rows.convert_dtypes()
    try:
        if selection.where is not None:
            rows = rows.query(selection.where, engine="python")
        for name, expression in selection.computed.items():
            rows = rows.assign(**{name: rows.eval(expression, engine="python")})
    # What may go wrong in an expression is anything.
    except Exception as error:
        asked = [selection.where, *selection.computed.values()]
        raise UserError(f"{asked} cannot be asked of {path}: {one_line(error)}; its columns are {columns}") from error
    if rows.empty:
        raise UserError(f"no row of {path} is selected by {selection.where!r}")
    return rows


def select_one(selection: Selection, results_dir: Path) -> dict[str, Any]:
    rows = select(selection, results_dir)
    if len(rows) > 1:
        raise UserError(f"{len(rows)} rows of {selection.results_file} are selected by {selection.where!r}, not one")
    return rows.to_dict("records")[0]


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    head, *body = ([" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *body])


def number_table(table: Table, results_dir: Path) -> str:
    """A line for each row, and below them where they come from."""
    rows = select(table, results_dir).to_dict("records")
    lines = [[fill(cell, row, table.results_file) for cell in table.columns.values()] for row in rows]
    machines = sorted({f"{row['hardware']}, torch {row['torch']}, transformers {row['transformers']}" for row in rows})
    commits = list(dict.fromkeys(row["commit"] for row in rows))
    origin = f"From `results/{table.results_file}`, measured on {'; '.join(machines)} (commits {', '.join(commits)})."
    return markdown_table([list(table.columns), *lines]) + f"\n\n{origin}"


def eval_results(evaluation: Evaluation, results_dir: Path) -> list[EvalResult]:
    row = select_one(evaluation, results_dir)
    results = []
    for metric, column in evaluation.metrics.items():
        if not isinstance(row.get(column), int | float):
            raise UserError(
                f"the metric {metric} is the column {column!r} of {evaluation.results_file}, and it holds "
                f"{row.get(column)!r}, no number; the columns are {list(row)}"
            )
        results.append(
            EvalResult(
                task_type=evaluation.task_type,
                task_name=evaluation.task_name,
                dataset_type=evaluation.dataset_type,
                dataset_name=evaluation.dataset_name,
                dataset_split=evaluation.dataset_split,
                metric_type=metric,
                metric_name=metric,
                metric_value=row[column],
            )
        )
    return results


# Code blocks

# Of the template's making.
PRINTED = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)


def run_code(code: str, checkpoints_dir: Path) -> str:
    """What a code block prints."""
    with TemporaryDirectory() as folder:
        Path(folder, "checkpoints").symlink_to(checkpoints_dir.resolve())
        # One thread: sums are then taken in one order.
        environment = os.environ | {"HF_HOME": folder, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
    if run.returncode:
        last = (run.stderr.strip() or "nothing on stderr").splitlines()[-1]
        raise UserError(f"a code block ends with {run.returncode}, {last}: {code!r}")
    if not run.stdout.strip():
        raise UserError(f"a code block prints nothing: {code!r}")
    return run.stdout


def run_all(codes: Sequence[str], checkpoints_dir: Path) -> list[str]:
    return [run_code(code, checkpoints_dir) for code in tqdm(codes, desc="running code blocks", leave=False)]


# Cards

MARKER = "<!-- Made by scripts/make_model_card.py"
CODE_FILES = ("configuration_linformer.py", "modeling_linformer.py")
# Bytes of a picture: a card is opened on telephones, and a clone keeps every version.
LARGEST_FIGURE = 100_000


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """What may be said of a checkpoint: its configuration, and the number and type of its parameters."""
    # What is no folder would be looked for on the Hub.
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json, and is no checkpoint")
    try:
        config = LinformerConfig.from_pretrained(folder).to_dict()
        parameters = get_local_safetensors_metadata(folder).parameter_count
    except (
        OSError,
        ValueError,
        StrictDataclassError,
        NotASafetensorsRepoError,
        SafetensorsParsingError,
    ) as error:
        raise UserError(f"{folder} is no checkpoint of a Linformer: {one_line(error)}") from error
    return config | {"parameters": sum(parameters.values()), "weights_dtype": ", ".join(sorted(parameters))}


def checksums(folder: Path) -> str:
    lines = [["file", "SHA-256"]]
    for name in CODE_FILES:
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}, which loads it; copy it there from the repository")
        lines.append([f"`{name}`", f"`{hashlib.sha256((folder / name).read_bytes()).hexdigest()}`"])
    return markdown_table(lines)


def recipe_table(recipe: Recipe, results_dir: Path) -> str:
    facts = dict(recipe.facts)
    if recipe.run:
        row = select_one(recipe.run, results_dir)
        facts |= {name: fill(cell, row, recipe.run.results_file) for name, cell in recipe.run.columns.items()}
    return markdown_table([["", ""], *(list(fact) for fact in facts.items())])


def make_card(name: str, about: Description, arguments: Arguments, run: Callable[[Sequence[str]], list[str]]) -> str:
    """The text of a card. `run` gives what each of the code blocks prints."""
    results_dir = Path(arguments.results_dir)
    folder = Path(arguments.checkpoints_dir) / name
    checkpoint = read_checkpoint(folder)

    def prose(text: str) -> str:
        return fill(text, checkpoint, "config.json").strip()

    data = ModelCardData(
        library_name="transformers",
        license=about.license,
        language=about.language,
        pipeline_tag=about.pipeline_tag,
        base_model=about.base_model,
        datasets=about.datasets or None,
        tags=about.tags,
        model_name=about.title,
        eval_results=[result for one in about.evaluations for result in eval_results(one, results_dir)],
    )
    tables = [(table.heading, prose(table.text), number_table(table, results_dir)) for table in about.numbers]
    parts: dict[str, Any] = {
        "marker": f"{MARKER} from model_cards/{name}.yaml and results/: change those, not this. -->",
        "title": about.title,
        "summary": prose(about.summary),
        "intended_use": prose(about.intended_use),
        "checkpoint": checkpoint,
        "numbers": tables,
        "figure": about.figure and (Path(about.figure.file).name, prose(about.figure.caption)),
        "recipe": prose(about.recipe.text),
        "recipe_table": recipe_table(about.recipe, results_dir),
        "command": about.recipe.command.strip(),
        "limits": prose(about.limits),
        "licences": markdown_table([["", ""], *([kind, prose(text)] for kind, text in vars(about.licences).items())]),
        "checksums": checksums(folder),
        "citation": about.citation.strip(),
    }
    # Last, since it takes long.
    codes = [block.code.strip() + "\n" for block in about.usage]
    parts["usage"] = list(zip([prose(block.text) for block in about.usage], codes, run(codes)))
    card = ModelCard.from_template(data, template_path=str(Path(arguments.cards_dir) / "template.md"), **parts)
    return f"{card}\n"


def figure_of(about: Description, results_dir: Path) -> bytes | None:
    if about.figure is None:
        return None
    path = results_dir / about.figure.file
    if not path.is_file():
        raise UserError(f"there is no picture {path}")
    if (size := path.stat().st_size) > LARGEST_FIGURE:
        raise UserError(
            f"the picture {path} has {size:,} bytes and may have {LARGEST_FIGURE:,}; draw it smaller, or leave it out"
        )
    return path.read_bytes()


def first_difference(standing: str, made: str) -> str:
    lines = enumerate(zip_longest(standing.split("\n"), made.split("\n")), start=1)
    return next(f"line {number} is {one!r} and should be {other!r}" for number, (one, other) in lines if one != other)


def choose(arguments: Arguments) -> list[str]:
    """The names of the cards. A checkpoint without a description is an error, and so is the reverse, later."""
    described = {path.stem for path in Path(arguments.cards_dir).glob("*.yaml")}
    names = arguments.name or sorted(
        described | {config.parent.name for config in Path(arguments.checkpoints_dir).glob("*/config.json")}
    )
    if not names:
        raise UserError(f"there are no checkpoints in {arguments.checkpoints_dir}")
    if missing := [name for name in names if name not in described]:
        raise UserError(f"{missing} have no NAME.yaml in {arguments.cards_dir}, which has {sorted(described)}")
    return names


def process(name: str, arguments: Arguments) -> None:
    """Write a card and its picture, or compare them with what is there."""
    about = read_description(Path(arguments.cards_dir) / f"{name}.yaml")
    readme = Path(arguments.checkpoints_dir) / name / "README.md"
    standing = readme.read_text(encoding="utf-8") if readme.is_file() else None
    figure = figure_of(about, Path(arguments.results_dir))
    copy = readme.with_name(Path(about.figure.file).name) if about.figure else None
    copied = copy.read_bytes() if copy and copy.is_file() else None

    if arguments.check and standing is None:
        raise UserError(f"{readme} does not exist")
    if not arguments.check and not arguments.overwrite:
        if standing is not None and MARKER not in standing:
            raise UserError(f"{readme} was not made by this script; --overwrite true replaces it")
        if copy and copied not in (None, figure) and f"]({copy.name})" not in (standing or ""):
            raise UserError(f"{copy} was not put there by this script; --overwrite true replaces it")

    if arguments.check and not arguments.check_code:
        printed = dict(PRINTED.findall(standing or ""))
        made = make_card(name, about, arguments, lambda codes: [printed.get(code, "") for code in codes])
    else:
        made = make_card(name, about, arguments, lambda codes: run_all(codes, Path(arguments.checkpoints_dir)))

    if arguments.check:
        again = f"make it again: python scripts/make_model_card.py --name {name}"
        if made != standing:
            raise UserError(f"{readme} is out of date, {first_difference(standing or '', made)}; {again}")
        if copied != figure:
            raise UserError(f"{copy} is not the picture in {arguments.results_dir}; {again}")
        return
    if copy and figure is not None:
        with write_aside(copy) as aside:
            aside.write_bytes(figure)
    with write_aside(readme) as aside:
        aside.write_text(made, encoding="utf-8")
    print(f"wrote {readme}")


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments((Arguments,), argv, description=__doc__)
    if arguments.check_code and not arguments.check:
        raise UserError("--check_code true goes with --check true; without it all code blocks are run anyway")
    for name in choose(arguments):
        try:
            process(name, arguments)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error


if __name__ == "__main__":
    run_main(main)
