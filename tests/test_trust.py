"""The two files that ship and run as remote code: what they import, name and do, read, attacked and watched.

The lists say all that the files reach. A name that is added to one of them is looked at by a person.

python -m pytest tests/test_trust.py
"""

import ast
import builtins
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers

from hf_linformer import LinformerConfig, LinformerForMaskedLM
from tiny import tiny_config


ROOT = Path(__file__).parents[1]
SHIPPED = ["configuration_linformer.py", "modeling_linformer.py"]

IMPORTS = """
import math
import torch
from collections.abc import Callable
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, initialization as init
from transformers.activations import ACT2CLS, ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, MaskedLMOutput, MultipleChoiceModelOutput
from transformers.modeling_outputs import QuestionAnsweringModelOutput, SequenceClassifierOutput, TokenClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs
from typing import Any, Literal, NamedTuple
from .configuration_linformer import LinformerConfig
"""
MODULES = {"math", "torch", "nn", "functional", "init"}
FROM_MODULES = set(
    """
    functional.binary_cross_entropy_with_logits functional.cross_entropy functional.dropout functional.mse_loss
    functional.pad functional.softmax init.copy_ init.normal_ init.zeros_ math.inf nn.Buffer nn.Dropout nn.Embedding
    nn.LayerNorm nn.Linear nn.Module nn.ModuleList nn.Parameter torch.arange torch.as_tensor torch.bfloat16 torch.bool
    torch.cat torch.compiler.is_exporting torch.device torch.div torch.dtype torch.empty torch.float16 torch.float32
    torch.full torch.iinfo torch.is_grad_enabled torch.long torch.matmul torch.minimum torch.no_grad
    torch.promote_types torch.tanh torch.tensor torch.where torch.zeros_like
    """.split()
)
# What is taken from tensors, texts, base classes and outputs.
ATTRIBUTES = set(
    """
    __init__ __name__ __post_init__ _attn_implementation _forward_hooks _forward_pre_hooks _init_weights _replace all
    amax any argmax argsort attention attentions chunk_size_feed_forward clamp cumsum device dim dropout dtype expand
    expand_as flatten float gather get get_interface hidden_states int is_floating_point join last_hidden_state log
    loss_function masked_fill max mean min modules new_zeros norm num_labels numel out_features permute post_init
    problem_type register_for_auto_class reshape scatter_reduce setdefault shape split sqrt sum tensor_split to tolist
    training transpose type unbind unflatten unique validate view warn_if_padding_and_no_attention_mask where
    """.split()
)
SPECIAL_NAMES = set(
    """
    __all__ __init__ __post_init__ ValueError any bool dict divmod float getattr int isinstance len list max min
    property range set slice sorted str super tuple type zip
    """.split()
)
# The files may name their own things as they like, unless the name means something in one of these too.
LIBRARIES = [torch, torch.nn, torch.nn.functional, torch.Tensor, transformers.PreTrainedModel]
LIBRARIES += [transformers.PreTrainedConfig, str, types.CodeType, types.FrameType, types.GeneratorType]


def imports(tree: ast.AST) -> Iterator[str]:
    """Every import, a statement for each name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (ast.unparse(ast.Import([name])) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (ast.unparse(ast.ImportFrom(node.module, [name], node.level)) for name in node.names)


def is_of_a_module(name: str) -> bool:
    return name.split(".")[0] in MODULES and re.fullmatch(r"[\w.]+", name) is not None


def from_modules(tree: ast.AST) -> Iterator[str]:
    """What is taken from a module, `torch.compiler.is_exporting` as a whole; or the module, where it is handed on."""
    parts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and node not in parts and is_of_a_module(ast.unparse(node)):
            yield ast.unparse(node)


def attributes(tree: ast.AST) -> Iterator[str]:
    """What is taken from anything else. `match` takes attributes too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not is_of_a_module(ast.unparse(node)):
            yield node.attr
        elif isinstance(node, ast.Match):
            yield "match"


def own_names(tree: ast.AST) -> Iterator[str]:
    """What a file defines: functions, classes, fields and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def special_names(tree: ast.AST) -> Iterator[str]:
    """Builtins, used or replaced, and names with a meaning for Python, in a module or in a class."""
    for node in ast.walk(tree):
        name = getattr(node, "id", getattr(node, "name", None))
        if isinstance(name, str) and (hasattr(builtins, name) or name.startswith("__")):
            yield name


def changes(tree: ast.AST) -> Iterator[str]:
    """What is set in something imported, and what is private and set in anything."""
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {name.asname or name.name for node in statements for name in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load):
            target = ast.unparse(node)
            if re.split(r"\W", target)[0] in imported or "._" in target:
                yield f"{target} = ..."


def computed_attributes(tree: ast.AST) -> Iterator[str]:
    """`getattr`, but for fields of `self` that are compared or put into a message: what it gives is never called."""
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "getattr":
            call = parents[node]
            use = parents[call]
            condition = isinstance(use, ast.BoolOp) and isinstance(parents[use], ast.If)
            harmless = condition or isinstance(use, ast.Compare | ast.FormattedValue)
            if not harmless or not ast.unparse(call).startswith("getattr(self, "):
                yield ast.unparse(call)


def annotations(tree: ast.AST) -> Iterator[str]:
    """Annotations of more than types, for libraries evaluate texts in them, and calls that make annotated classes."""
    nodes = list(ast.walk(tree))
    assigned = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}

    def is_type(part: ast.AST) -> bool:
        if isinstance(part, ast.Constant):
            return part.value is None or (isinstance(part.value, str) and part.value.isidentifier())
        if isinstance(part, ast.Name):
            return part.id not in assigned
        if isinstance(part, ast.Attribute):
            return is_of_a_module(ast.unparse(part))
        return isinstance(part, ast.Subscript | ast.Tuple | ast.List | ast.BinOp | ast.BitOr | ast.Load)

    for annotation in [getattr(node, field, None) for node in nodes for field in ("annotation", "returns")]:
        if annotation and not all(is_type(part) for part in ast.walk(annotation)):
            yield ast.unparse(annotation)
    for node in nodes:
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("type", "NamedTuple") and len(node.args) > 1:
            yield ast.unparse(node)


def texts(tree: ast.AST) -> Iterator[str]:
    """Texts like a path, an address or a repository, though not "n / k". What is put together is not seen."""
    documentation = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in documentation:
            if re.search("(?<! )/|/(?! )|--", node.value):
                yield node.value


def parse(source: bytes) -> ast.AST:
    # As bytes: a comment that declares an encoding is obeyed, as it is where the file runs.
    return ast.parse(source)


TREES = [parse((ROOT / name).read_bytes()) for name in SHIPPED]
REACHED = {name for library in LIBRARIES for name in dir(library)}
LISTS: list[tuple[Callable[[ast.AST], Iterator[str]], set[str]]] = [
    (imports, set(imports(ast.parse(IMPORTS)))),
    (from_modules, FROM_MODULES),
    (attributes, ATTRIBUTES),
    (special_names, SPECIAL_NAMES),
    (changes, set()),
    (computed_attributes, set()),
    (annotations, set()),
    (texts, set()),
]


def untrusted(tree: ast.AST) -> set[str]:
    """What a file holds that is on no list."""
    own = {name for file in (*TREES, tree) for name in own_names(file)} - REACHED
    return {
        found
        for collect, allowed in LISTS
        for found in collect(tree)
        if found not in (allowed | own if collect is attributes else allowed)
    }


@pytest.mark.parametrize("tree", TREES, ids=SHIPPED)
def test_what_ships_holds_nothing_that_is_not_listed(tree):
    assert untrusted(tree) == set()


@pytest.mark.parametrize("collect, allowed", LISTS, ids=[collect.__name__ for collect, _ in LISTS])
def test_the_lists_allow_nothing_that_is_not_used(collect, allowed):
    assert allowed <= {found for tree in TREES for found in collect(tree)}


# What is added to the imports, and what of it is seen.
ATTACKS = {
    "import os": "import os",
    "import torch.hub": "import torch.hub",
    "import torch as t": "import torch as t",
    "from torch.serialization import load": "from torch.serialization import load",
    "from torch import hub as nn": "from torch import hub as nn",
    "from typing import sys": "from typing import sys",
    "from huggingface_hub.dataclasses import inspect": "from huggingface_hub.dataclasses import inspect",
    "from transformers.utils.hub import Path": "from transformers.utils.hub import Path",
    "from .weights import Tile": "from .weights import Tile",
    "from math import *": "from math import *",
    "torch.load('x')": "torch.load",
    "torch.os.remove('x')": "torch.os.remove",
    "torch.sys.modules['os']": "torch.sys.modules",
    "torch.distributed.TCPStore('x', 80)": "torch.distributed.TCPStore",
    "torch.utils.cpp_extension.load_inline('x', 'y')": "torch.utils.cpp_extension.load_inline",
    "torch.compile(Tile)": "torch.compile",
    "nn.modules.module.warnings.sys": "nn.modules.module.warnings.sys",
    "functional.importlib.import_module('os')": "functional.importlib.import_module",
    "@torch.hub.load_state_dict_from_url\ndef f(): pass": "torch.hub.load_state_dict_from_url",
    "for t in [torch]:\n    t.hub": "torch",
    "torch.empty(1).numpy().tofile('x')": "tofile",
    "torch.empty(1).untyped_storage().from_file('x')": "from_file",
    "PreTrainedModel.from_pretrained('x')": "from_pretrained",
    "def f(self):\n    super().push_to_hub('x')": "push_to_hub",
    "is_tracing.__globals__['os']": "__globals__",
    "Tile.__class__.__base__.__subclasses__()": "__subclasses__",
    "(0 for _ in ()).gi_frame.f_builtins['open']('x')": "f_builtins",
    "class A:\n    gi_frame: int\n    f_builtins: int\n(0 for _ in ()).gi_frame.f_builtins": "f_builtins",
    "def load(): pass\ndef f(self):\n    return (lambda t: t)(torch).load": "torch",
    "'{0.__init__.__globals__[os].environ}'.format(PreTrainedModel)": "format",
    "match is_tracing:\n    case object(__globals__=f): pass": "match",
    "open('x')": "open",
    "eval('1')": "eval",
    "__builtins__['open']('x')": "__builtins__",
    "__loader__.get_data('x')": "__loader__",
    "class A(nn.Module):\n    def __reduce__(self):\n        return Tile, (1, 2, 3)": "__reduce__",
    "class A(nn.Module):\n    __reduce__ = LinformerModel.forward": "__reduce__",
    "torch.where = Tile": "torch.where = ...",
    "ACT2FN['gelu'] = Tile": "ACT2FN['gelu'] = ...",
    "PreTrainedModel.forward = Tile": "PreTrainedModel.forward = ...",
    "def f(config):\n    config._attn_implementation = config.kernel": "config._attn_implementation = ...",
    "getattr(torch, 'lo' + 'ad')('x')": "getattr(torch, 'lo' + 'ad')",
    "def f(self):\n    getattr(self, 'push' + '_to_hub')('x')": "getattr(self, 'push' + '_to_hub')",
    "def f(self):\n    (getattr(self, 'push_to_hub') or 0)('x')": "getattr(self, 'push_to_hub')",
    "g = getattr": "g = getattr",
    "AUTO_MAP = {'AutoModel': 'someone/else--modeling.Model'}": "someone/else--modeling.Model",
    "KERNEL = 'someone/kernel'": "someone/kernel",
    "def f(x: \"open('x')\"): pass": "\"open('x')\"",
    "class A(nn.Module):\n    x: list['Tensor | exit()'] = 1": "list['Tensor | exit()']",
    "Alias = list['exit' + '()']\nclass A(nn.Module):\n    x: Alias = 1": "Alias",
    "A = NamedTuple('A', [('x', 'exit()')])": "NamedTuple('A', [('x', 'exit()')])",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_reaches_outside_is_seen(attack):
    assert untrusted(parse(IMPORTS.encode())) == set()
    assert ATTACKS[attack] in untrusted(parse(f"{IMPORTS}\n{attack}\n".encode()))


def test_a_comment_that_is_code_is_seen():
    assert untrusted(parse(b"# coding: utf-7\n# +AAo-import os\n")) == {"import os"}


def test_models_name_no_code_but_their_own():
    assert {name.split(".")[0] + ".py" for name in LinformerConfig().auto_map.values()} == set(SHIPPED)


# What happens while one of the two files is on the stack is theirs, through whatever library; but for importing, which
# opens files by its nature, and for what classes are made with: their source is read, methods and hints are compiled.
WATCHED = """
import sys
import torch
from transformers import AutoModelForMaskedLM

OURS = ("/modeling_linformer.py", "/configuration_linformer.py")
HARMLESS = {"import", "compile", "exec", "builtins.id", "object.__getattr__", "object.__setattr__", "sys._getframe"}
seen = []
def watch(event, arguments):
    if event in HARMLESS or (event == "open" and str(arguments[0]).endswith(OURS) and arguments[1] == "r"):
        return
    frame = sys._getframe(1)
    while frame and not frame.f_code.co_filename.startswith("<frozen importlib"):
        if frame.f_code.co_filename.endswith(OURS):
            return seen.append((event, str(arguments)))
        frame = frame.f_back

sys.addaudithook(watch)
model = AutoModelForMaskedLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "transformers_modules" in type(model).__module__, type(model).__module__
input_ids = torch.arange(5, 25).reshape(2, 10)
model.train()(input_ids=input_ids, labels=input_ids).loss.backward()
with torch.no_grad():
    model.eval()(input_ids=input_ids, attention_mask=(input_ids > 7).int())
print(seen)
"""


def watched(model: Path, folder: Path) -> str:
    """What a fresh process notes that loads the model with its code, trains it a step and uses it on padded rows."""
    environment = {"HF_HOME": str(folder / "home"), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    # Isolated: no other copy of the code can stand in for the one beside the weights.
    command = [sys.executable, "-I", "-c", WATCHED, str(model)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.strip().splitlines()[-1]


def test_what_ships_touches_no_file_network_or_process(tmp_path):
    LinformerForMaskedLM(tiny_config()).save_pretrained(tmp_path / "model")
    assert watched(tmp_path / "model", tmp_path) == "[]"
    # The watch itself works, also through a library, in a call, and where code is found by hand.
    code = tmp_path / "model" / "modeling_linformer.py"
    spoilt = """
import importlib.resources, pathlib, pickle
open('/dev/null')
pathlib.Path('/dev/null').read_bytes()
importlib.resources.files('torch').joinpath('version.py').read_text()
forward = LinformerModel.forward
def listing(*arguments, **options):
    pickle.loads(pickle.dumps(pathlib.Path.cwd))
    return forward(*arguments, **options)
LinformerModel.forward = listing
"""
    code.write_text(code.read_text() + spoilt)
    noted = watched(tmp_path / "model", tmp_path)
    assert noted.count("'/dev/null'") >= 2 and "version.py" in noted and "pickle.find_class" in noted
