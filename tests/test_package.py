"""The wheel and the sdist, installed far from here and used as others do; and that every file here is meant.

python -m pytest tests/test_package.py
"""

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest


# One process makes what they share.
pytestmark = pytest.mark.xdist_group("package")

ROOT = Path(__file__).parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
MODULES = ["__init__.py", "configuration_linformer.py", "modeling_linformer.py"]
LARGE = {f"checkpoints/linformer-{name}/model.safetensors" for name in ("all-MiniLM-L6-v2", "small")}
LARGE |= {"tokenizer/tokenizer.json", "checkpoints/linformer-small/tokenizer.json"}
# What a file of a type that is no text begins with.
BINARY = {".parquet": rb"PAR1", ".png": rb"\x89PNG\r\n", ".safetensors": rb'.{8}\{"'}
TEXT = {"", ".cff", ".csv", ".in", ".json", ".md", ".py", ".sh", ".toml", ".txt", ".typed", ".yaml"}


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What a command prints. It knows nothing of this process but where programs are."""
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout: git says which files belong to the repository")
    return run("git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", cwd=ROOT).strip("\0").split("\0")


@pytest.fixture(scope="module")
def built(tracked, tmp_path_factory) -> dict[str, Path]:
    """The sdist, the wheel that is made of it, and the wheel that is made of the repository."""
    folder = tmp_path_factory.mktemp("built")
    for name in tracked:
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir"]
    run(*build, folder / "direct", "--wheel", "source", cwd=folder)
    run(*build, folder / "dist", "source", cwd=folder)
    wheel, sdist = f"hf_linformer-{VERSION}-py3-none-any.whl", f"hf_linformer-{VERSION}.tar.gz"
    return {"wheel": folder / "dist" / wheel, "sdist": folder / "dist" / sdist, "direct": folder / "direct" / wheel}


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_the_package_and_nothing_else(built):
    held = contents(built["wheel"])
    information = f"hf_linformer-{VERSION}.dist-info"
    package = {f"hf_linformer/{name}": (ROOT / name).read_bytes() for name in [*MODULES, "py.typed"]}
    described = {"METADATA", "RECORD", "WHEEL", "licenses/LICENSE", "top_level.txt"}
    assert held.keys() == package.keys() | {f"{information}/{name}" for name in described}
    assert package.items() <= held.items()
    assert held[f"{information}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert held[f"{information}/top_level.txt"].split() == [b"hf_linformer"]


def test_the_sdist_holds_the_source_of_the_package(built):
    with tarfile.open(built["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if "egg-info" not in name}
    own = {"LICENSE", "MANIFEST.in", "README.md", "py.typed", "pyproject.toml", *MODULES}
    assert names == own | {"", "PKG-INFO", "setup.cfg"}
    assert built["sdist"].stat().st_size < 1e6
    assert contents(built["wheel"]) == contents(built["direct"])


@pytest.fixture(scope="module")
def libraries(tmp_path_factory) -> Path:
    """All packages of the environment that runs this, but for ours, as links in one folder."""
    folder = tmp_path_factory.mktemp("libraries")
    for place in map(Path, sys.path):
        # Only where packages are installed, not the standard library and the tests.
        for package in place.iterdir() if any(place.glob("*.dist-info")) else ():
            if "hf_linformer" not in package.name and not (folder / package.name).exists():
                (folder / package.name).symlink_to(package)
    return folder


def environment(folder: Path, libraries: Path) -> Path:
    """The interpreter of a fresh environment that has the libraries, and neither this repository nor our package."""
    venv.create(folder, symlinks=True)
    packages = next(folder.glob("lib/python3*/site-packages"))
    # The folder of libraries is added, its own .pth files are not read, which would bring the editable package in.
    (packages / "libraries.pth").write_text(f"{libraries}\n")
    return folder / "bin" / "python"


USE = """
import json, sys
from importlib.metadata import version
from pathlib import Path
import torch
import hf_linformer, linformer
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer, pipeline

def installed(module):
    return Path(sys.modules[module].__file__).resolve().is_relative_to(Path(sys.prefix).resolve())

sizes = {"hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 27}
config = AutoConfig.for_model("linformer", max_position_embeddings=64, projected_length=8, **sizes)
model = AutoModel.from_config(config)
model.save_pretrained("encoder")
AutoModelForMaskedLM.from_config(config).save_pretrained("saved")
AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained("saved")
ids = torch.arange(3, 33)[None]
print(json.dumps({
    "installed": [installed(name) for name in sys.modules if name.split(".")[0] == "hf_linformer"],
    "other": hasattr(linformer, "LinformerSelfAttention"),
    "version": version("hf-linformer"),
    "same": torch.equal(AutoModel.from_pretrained("encoder").eval()(ids)[0], model.eval()(ids)[0]),
    "class": type(AutoModelForMaskedLM.from_pretrained("saved")).__module__,
    "filled": len(pipeline("fill-mask", "saved")("The state of the<mask> is strong.", top_k=2)),
    "output": model.eval()(ids)[0].flatten().tolist(),
}))
"""
# What somebody does who got the folders and never heard of the package.
USE_WITHOUT = """
import importlib.util, json, sys
import torch
from transformers import AutoModel, pipeline

assert importlib.util.find_spec("hf_linformer") is None
fill = pipeline("fill-mask", "saved", trust_remote_code=True)
model = AutoModel.from_pretrained("encoder", trust_remote_code=True).eval()
print(json.dumps({
    "class": type(model).__module__,
    "filled": len(fill("The state of the<mask> is strong.", top_k=2)),
    "output": model(torch.arange(3, 33)[None])[0].flatten().tolist(),
}))
"""


def use(package: Path, libraries: Path, folder: Path) -> dict:
    """What the package does, installed into an environment of its own in `folder`, where it saves two models."""
    python = environment(folder / "environment", libraries)
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    run(*install, "--no-build-isolation", package, cwd=folder)
    # Isolated: neither the folder it starts in nor PYTHONPATH counts.
    return json.loads(run(python, "-I", "-c", USE, ROOT / "tokenizer", cwd=folder, HF_HOME=str(folder / "home")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("far")


@pytest.fixture(scope="module")
def wheel_used(built, libraries, folder) -> dict:
    return use(built["wheel"], libraries, folder)


@pytest.fixture(scope="module")
def sdist_used(built, libraries, tmp_path_factory) -> dict:
    return use(built["sdist"], libraries, tmp_path_factory.mktemp("sdist"))


@pytest.mark.parametrize("package", ["wheel_used", "sdist_used"])
def test_installed_it_needs_no_remote_code(package, request):
    used = request.getfixturevalue(package)
    assert used["installed"] == [True] * 3, "another copy of the package was imported"
    assert used["version"] == VERSION
    assert used["class"] == "hf_linformer.modeling_linformer" and used["same"] and used["filled"] == 2
    assert used["other"], "the package `linformer` is not what it was"


def test_what_it_saves_needs_no_package(wheel_used, libraries, folder):
    for saved in ("saved", "encoder"):
        for name in MODULES[1:]:
            assert (folder / saved / name).read_bytes() == (ROOT / name).read_bytes()
    python = environment(folder / "without", libraries)
    used = json.loads(run(python, "-I", "-c", USE_WITHOUT, cwd=folder, HF_HOME=str(folder / "home")))
    assert used["class"].startswith("transformers_modules.") and used["filled"] == 2
    assert used["output"] == pytest.approx(wheel_used["output"], abs=1e-5)


def test_its_types_are_seen(built, tmp_path):
    """A type checker reads the package only where it says that it is typed."""
    with zipfile.ZipFile(built["wheel"]) as archive:
        archive.extractall(tmp_path / "lib")
    # Torch and Transformers take a minute to check.
    skipped = "[mypy-torch.*,transformers.*,huggingface_hub.*]\nfollow_imports = skip\nignore_missing_imports = true\n"
    (tmp_path / "mypy.ini").write_text(f"[mypy]\n{skipped}")
    (tmp_path / "wrong.py").write_text(
        "from hf_linformer import LinformerConfig\n\nwindow: str = LinformerConfig().local_window\n"
    )
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), "wrong.py"]
    search = os.environ | {"PYTHONPATH": str(tmp_path / "lib")}
    checked = subprocess.run(command, cwd=tmp_path, env=search, capture_output=True, text=True)
    assert 'has type "int", variable has type "str"' in checked.stdout, checked.stdout + checked.stderr


def test_every_file_is_meant(tracked):
    large = {name for name in tracked if (ROOT / name).stat().st_size > 1e6}
    assert large <= LARGE, f"larger than a megabyte: {large - LARGE}"
    ignored = run("git", "-c", f"safe.directory={ROOT}", "ls-files", "-ci", "--exclude-standard", cwd=ROOT)
    assert not ignored, f"in the repository although .gitignore names them: {ignored}"


def test_every_file_is_of_a_type_that_runs_nothing_when_read(tracked):
    unknown = {name for name in tracked if Path(name).suffix not in TEXT | BINARY.keys()}
    assert not unknown, f"a type that no file had so far; a pickle runs code when it is read: {unknown}"
    for name in tracked:
        data = (ROOT / name).read_bytes()
        if beginning := BINARY.get(Path(name).suffix):
            assert re.match(beginning, data, re.DOTALL), f"{name} is not what its suffix says"
        else:
            data.decode()


def test_no_file_names_a_folder_of_somebody_s_machine(tracked):
    folder = re.compile(rb"/(work|home|root|Users)/\w+")
    found = {name: match[0] for name in tracked if (match := folder.search((ROOT / name).read_bytes()))}
    assert not found
