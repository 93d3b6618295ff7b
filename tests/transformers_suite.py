"""Fetches the common test suite of the installed Transformers and makes it importable.

The suite is no part of the wheel, but PyPI's source distribution of the very same version holds it, so that is where
it comes from: `pip download`, once, into `.cache/transformers-<version>/` at the repository root (ignored by git). It
runs as it was released: not a byte of its files is changed and none of them is committed.

Its files import each other relatively, as a package `tests`. That name is too common to claim, and our own tests are
not a package, so the suite is imported as the package `transformers_tests`, which exists only in `sys.modules`.

    modeling = import_suite_module("test_modeling_common")

The source distribution has the files of `tests/` but none of its folders. `STAND_INS` below holds the four names that
the suite imports from those folders; `tests/__init__.py` is an empty file.
"""

import importlib
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers


PACKAGE = "transformers_tests"
CACHE = Path(__file__).resolve().parent.parent / ".cache"


class SuiteUnavailable(Exception):
    """The suite is neither in the cache nor downloadable; the message says why."""


# Module of the suite -> what is imported from it.
STAND_INS: dict[str, dict[str, Any]] = {
    # ModelTesterMixin derives from it. It adds the exports to ONNX and ExecuTorch, which therefore do not run.
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    # Only asked whether a test case of a model that generates text derives from it; an encoder does not generate.
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    # ConfigTester sets these and expects to read them back: the keys all configurations share, none at its default.
    "utils.test_configuration_utils": {
        "config_common_kwargs": {
            "architectures": ["SomeModel"],
            "chunk_size_feed_forward": 3,
            "dtype": "float16",
            "id2label": {0: "no", 1: "perhaps", 2: "yes"},
            "is_encoder_decoder": True,
            "label2id": {"no": 0, "perhaps": 1, "yes": 2},
            "output_hidden_states": True,
            "problem_type": "regression",
            "return_dict": False,
        }
    },
}


def import_suite_module(name: str) -> ModuleType:
    """Imports a file of the suite, `test_modeling_common` for instance, fetching the suite first if need be.

    Raises `SuiteUnavailable` if it cannot be had.
    """
    if PACKAGE not in sys.modules:
        _register_package(_fetch_suite(transformers.__version__))
    return importlib.import_module(f"{PACKAGE}.{name}")


def _register_package(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location(
        PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
    for name, attributes in STAND_INS.items():
        stand_in = ModuleType(f"{PACKAGE}.{name}")
        vars(stand_in).update(attributes)
        sys.modules[stand_in.__name__] = stand_in


def _fetch_suite(version: str) -> Path:
    """Returns the `tests` folder of the source distribution of `version`, downloading it the first time."""
    release = f"transformers-{version}"
    folder = CACHE / release
    if not folder.exists():
        if os.environ.get("LINFORMER_OFFLINE") == "1":
            raise SuiteUnavailable(f"LINFORMER_OFFLINE=1 and {folder} does not exist")
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as aside:
            with tarfile.open(_download_source(version, Path(aside))) as archive:
                suite = [member for member in archive if member.name.startswith(f"{release}/tests/")]
                archive.extractall(aside, members=suite, filter="data")
            (Path(aside) / release / "tests" / "__init__.py").touch()
            try:
                (Path(aside) / release).rename(folder)
            except OSError:
                # Another test process was faster; its copy is as good as ours.
                if not folder.exists():
                    raise
    return folder / "tests"


def _download_source(version: str, folder: Path) -> Path:
    # Without build isolation pip reads the metadata with the setuptools at hand, and downloads nothing else.
    command = [
        *(sys.executable, "-m", "pip", "download", f"transformers=={version}", "--no-deps"),
        *("--no-binary", "transformers", "--no-build-isolation", "--dest", str(folder)),
        *("--retries", "1", "--timeout", "30", "--disable-pip-version-check", "--progress-bar", "off"),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        last_line = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise SuiteUnavailable(f"`pip download transformers=={version}` failed: {last_line}")
    return next(folder.glob("transformers-*.tar.gz"))
