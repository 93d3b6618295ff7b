"""The two files that ship and run as remote code: what they import, name and do, read and watched."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from hf_linformer import LinformerForMaskedLM
from tiny import tiny_config


ROOT = Path(__file__).parents[1]
SHIPPED = ["configuration_linformer.py", "modeling_linformer.py"]
# Beside torch, transformers and each other: what computes or describes, and reaches nothing outside of the process.
HARMLESS = {"math", "typing", "collections"}
FORBIDDEN = {"open", "exec", "eval", "compile", "__import__", "input", "breakpoint", "globals", "vars"}
# Attributes that read or write files, run code of a file, or fetch: torch.load, torch.hub, torch.save, pickle, ...
FORBIDDEN_ATTRIBUTES = {"load", "save", "hub", "system", "popen", "environ", "getenv", "from_file", "load_library"}


@pytest.mark.parametrize("name", SHIPPED)
def test_what_ships_imports_nothing_but_torch_and_transformers(name):
    roots = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or node.module == "configuration_linformer"
            roots |= set() if node.level else {str(node.module).split(".")[0]}
            assert not str(node.module).startswith("huggingface_hub") or node.module == "huggingface_hub.dataclasses"
    # Transformers checks its own configurations with a decorator of huggingface_hub.
    more = {"huggingface_hub"} if name.startswith("configuration") else set()
    assert {"transformers"} <= roots <= {"torch", "transformers"} | HARMLESS | more, roots


@pytest.mark.parametrize("name", SHIPPED)
def test_what_ships_names_nothing_that_reaches_outside(name):
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Name):
            assert node.id not in FORBIDDEN, f"line {node.lineno}: {node.id}"
        if isinstance(node, ast.Attribute):
            assert node.attr not in FORBIDDEN_ATTRIBUTES, f"line {node.lineno}: .{node.attr}"
            assert not node.attr.startswith("__") or node.attr in ("__init__", "__post_init__", "__name__"), node.attr


# What happens while one of the two files is on the stack is theirs, through whatever library; but for importing, which
# opens files by its nature, and for transformers reading the source of the class that it makes.
WATCHED = """
import sys
import torch
from transformers import AutoModelForMaskedLM

OURS = ("/modeling_linformer.py", "/configuration_linformer.py")
seen = []
def watch(event, arguments):
    if event == "open" and str(arguments[0]).endswith(OURS) and arguments[1] == "r":
        return
    if event == "open" or event.split(".")[0] in ("socket", "subprocess", "os", "shutil", "urllib", "ctypes"):
        frame = sys._getframe(1)
        while frame and "importlib" not in frame.f_code.co_filename:
            if frame.f_code.co_filename.endswith(OURS):
                return seen.append((event, str(arguments)))
            frame = frame.f_back

sys.addaudithook(watch)
model = AutoModelForMaskedLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "transformers_modules" in type(model).__module__, type(model).__module__
input_ids = torch.arange(5, 25).reshape(2, 10)
model(input_ids=input_ids, labels=input_ids).loss.backward()
print(seen)
"""


def watched(model: Path, folder: Path) -> str:
    """What a fresh process notes that loads the model with its code and trains it a step."""
    environment = {"HF_HOME": str(folder / "home"), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    # Isolated: no other copy of the code can stand in for the one beside the weights.
    command = [sys.executable, "-I", "-c", WATCHED, str(model)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.strip().splitlines()[-1]


def test_what_ships_touches_no_file_network_or_process(tmp_path):
    LinformerForMaskedLM(tiny_config()).save_pretrained(tmp_path / "model")
    assert watched(tmp_path / "model", tmp_path) == "[]"
    # The watch itself works, also through a library.
    code = tmp_path / "model" / "modeling_linformer.py"
    spoilt = "\n\nopen('/dev/null')\nimport pathlib\npathlib.Path('/dev/null').read_bytes()\n"
    code.write_text(code.read_text() + spoilt)
    assert watched(tmp_path / "model", tmp_path).count("'/dev/null'") >= 2
