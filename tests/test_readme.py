"""What the README says is what happens: its snippets are run as printed, its tables are those of results/.

python -m pytest tests/test_readme.py
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import make_tables


ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```\n```text\n(.*?)```", TEXT, re.DOTALL)


def test_every_python_block_is_run_or_says_why_not():
    assert len(SNIPPETS) == len(re.findall(r"```python\n", TEXT)) >= 2
    assert len(re.findall(r"```python notest\n", TEXT)) == 1, "it needs a folder that only the reader has"


@pytest.mark.parametrize(("code", "printed"), SNIPPETS)
def test_snippets_print_what_the_page_says(code, printed, tmp_path):
    for folder in ("tokenizer", "configs", "data", "checkpoints", "scripts"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    # Trainer prints its own log lines, which are no part of what the page shows.
    lines = [line for line in run.stdout.splitlines() if line.strip() and not line.startswith("{")]
    assert lines == printed.splitlines()


def test_tables_are_those_of_the_results():
    make_tables.main(["--check", "true"])


def test_every_file_the_page_maps_exists():
    file_map = TEXT.split("## The files")[1].split("```")[1]
    for line in file_map.strip().splitlines():
        assert list(ROOT.glob(line.split()[0])), line


def test_spread_over_seeds():
    assert make_tables.spread([0.5]) == "0.500"
    assert make_tables.spread([0.4, 0.6]) == "0.500 ± 0.141"
