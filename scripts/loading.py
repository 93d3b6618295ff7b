"""What the scripts that train a model share: which one it is, its configuration and its tokenizer."""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

import hf_linformer  # noqa: F401  (registers Linformer with the Auto classes)
from common import ROOT, UserError, no_such_folder, one_line


@dataclass
class ModelArguments:
    """What is trained."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A model to start from: a folder or a Hub name. Only safetensors are loaded."}
    )
    config_name: str | None = field(
        default=None,
        metadata={"help": "Instead, to train from scratch: a configuration (JSON file, folder or Hub name)."},
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Changes to the configuration, e.g. 'projection_type=mean_pool,projected_length=[64,32]'."},
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Default: the model's own, and this repository's tokenizer/ from scratch."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run modelling code that comes with a model of the Hub."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Compute activations again in the backward pass: less memory, slower."}
    )


def parse_overrides(overrides: str | None) -> dict[str, Any]:
    """`a=1,b=[2,3],c=word` as a dictionary; values are read as JSON where they are JSON."""
    changes: dict[str, Any] = {}
    for override in re.split(r",(?=\s*\w+=)", overrides or ""):
        name, equals, value = override.strip().partition("=")
        if override and not equals:
            raise UserError(f"--config_overrides takes key=value,key=value, not {override!r}")
        if equals:
            try:
                changes[name] = json.loads(value)
            except json.JSONDecodeError:
                changes[name] = {"True": True, "False": False, "None": None}.get(value, value)
    return changes


def load_tokenizer(name: str | None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A fast tokenizer with a padding token, by default this repository's. Raises `UserError` for any other."""
    name = name or str(ROOT / "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{no_such_folder(name)}cannot load the tokenizer {name}: {one_line(error)}") from error
    if not tokenizer.is_fast or tokenizer.pad_token is None:
        raise UserError(f"the tokenizer {name} must be a fast one with a padding token")
    return tokenizer


def load_config_and_tokenizer(
    arguments: ModelArguments, more_overrides: dict[str, Any] | None = None
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """The configuration with its overrides, and a fast tokenizer with a padding token that fits it.

    Raises `UserError` for what cannot be loaded and for what does not belong together.
    """
    name = arguments.model_name_or_path or arguments.config_name
    if name is None or (arguments.model_name_or_path and arguments.config_name):
        raise UserError("give either --model_name_or_path, to go on from a model, or --config_name, for a new one")
    trust = {"trust_remote_code": arguments.trust_remote_code}
    tokenizer_name = str(arguments.tokenizer_name or arguments.model_name_or_path or ROOT / "tokenizer")
    tokenizer = load_tokenizer(tokenizer_name, **trust)

    changes = parse_overrides(arguments.config_overrides) | (more_overrides or {})
    if arguments.model_name_or_path is None:
        changes = {"pad_token_id": tokenizer.pad_token_id} | changes
    try:
        config, unknown = AutoConfig.from_pretrained(name, return_unused_kwargs=True, **trust, **changes)
        # Made anew, so that what must fit together is checked together.
        config = type(config)(**config.to_dict())
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise UserError(f"{no_such_folder(name)}cannot use the configuration {name}: {one_line(error)}") from error
    if unknown := sorted(unknown.keys() & changes.keys()):
        raise UserError(f"the configuration {name} of a {config.model_type} model has no {unknown} to override")
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer_name} has {len(tokenizer)} entries, the model {name} only {config.vocab_size}; "
            "use the model's own tokenizer, or from scratch --config_overrides vocab_size=..."
        )
    return config, tokenizer
