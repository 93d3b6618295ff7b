"""What the README says is what happens: its snippets are run as printed, its tables are those of results/.

python -m pytest tests/test_readme.py
"""

import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest

import make_tables


ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
# A block whose output is printed below it is run; `...` stands for what differs from run to run.
LINES = r"((?:(?!```).*\n)*)```"
SNIPPETS = re.findall(rf"```(python|bash)\n{LINES}\n```text\n{LINES}", TEXT)
FOLDERS = ("tokenizer", "configs", "data", "checkpoints", "scripts", "CONTRIBUTING.md", "LICENSE")


def test_every_python_block_is_run_or_says_why_not():
    run = [language for language, _, _ in SNIPPETS]
    assert run.count("python") == len(re.findall(r"```python\n", TEXT)) >= 2
    assert len(re.findall(r"```python notest\n", TEXT)) == 1, "it needs a folder that only the reader has"


def test_every_quickstart_is_run():
    quickstarts = TEXT.split("## Quickstarts\n")[1].split("\n## ")[0]
    blocks = re.findall(rf"```(?:python|bash)\n{LINES}", quickstarts)
    assert len(blocks) == 4 and {code for _, code, _ in SNIPPETS} >= set(blocks)


@pytest.mark.parametrize(
    ("language", "code", "printed"), SNIPPETS, ids=[code.split("\n")[0][:40] for _, code, _ in SNIPPETS]
)
def test_snippets_print_what_the_page_says(language, code, printed, tmp_path):
    """In a clone: what the repository holds, and the environment that `make` installs."""
    for name in FOLDERS:
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euo", "pipefail", "-c", code]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    # Trainer prints its own log lines, which are no part of what the page shows.
    lines = [line for line in run.stdout.splitlines(keepends=True) if line.strip() and not line.startswith("{")]
    assert doctest.OutputChecker().check_output(printed, "".join(lines), doctest.ELLIPSIS), run.stdout


def test_tables_are_those_of_the_results():
    make_tables.main(["--check", "true"])


def test_every_file_the_page_maps_exists():
    file_map = TEXT.split("## The files")[1].split("```")[1]
    for line in file_map.strip().splitlines():
        assert list(ROOT.glob(line.split()[0])), line


def test_spread_over_seeds():
    assert make_tables.spread([0.5]) == "0.500"
    assert make_tables.spread([0.4, 0.6]) == "0.500 ± 0.141"
