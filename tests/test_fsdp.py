"""scripts/pretrain.py with its weights divided over two processes (FSDP), which accelerate knows on accelerators only.

python -m pytest tests/test_fsdp.py
"""

import os
from pathlib import Path

import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

import test_pretrain
from checkpointing import is_intact, list_checkpoints
from test_pretrain import (  # noqa: F401  (fixtures)
    WITHOUT_DROPOUT,
    assert_same_curve,
    assert_same_end,
    data,
    history,
    newest,
    one_package,
    run_two,
    runs,
    some_time_after,
)


# What `accelerate launch --config_file configs/accelerate/fsdp.yaml` sets.
SETTINGS = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
SETTINGS |= {"FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
SETTINGS |= {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_OFFLOAD_PARAMS": "false"}


def one_of_two(rank: int, port: int, arguments: list[str]) -> None:
    """As torchrun and accelerate set it up, but for the kind of machine: what is divided are weights on the CPU."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", **SETTINGS}
    torch.set_num_threads(1)
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    output_dir = Path(arguments[arguments.index("--output_dir") + 1])
    test_pretrain.run_script(arguments, report=output_dir.with_name(f"error-{rank}.txt"))


@pytest.fixture(autouse=True)
def divided(monkeypatch):
    monkeypatch.setattr(test_pretrain, "one_of_two", one_of_two)


@pytest.mark.slow
def test_divided_weights_learn_as_whole_ones(runs):  # noqa: F811
    given = [*WITHOUT_DROPOUT, "--max_train_steps", 14, "--eval_steps", 7]
    alone = runs.pretrain(*given, "--per_device_train_batch_size", 4, output="alone")
    assert run_two(runs.options(*given, "--per_device_train_batch_size", 2, output="together")) == [0, 0]
    together = runs.folder / "together"
    assert_same_curve(alone, together, tolerance=1e-4)
    assert [row["step"] for row in history(together)] == [7, 14]
    # Weights were divided, and what is saved is a whole model and its own code only.
    assert len(list((together / "checkpoint-14").glob("pytorch_model_fsdp_0/*.distcp"))) == 2
    assert {path.name for path in together.glob("*.py")} == {path.name for path in alone.glob("*.py")}
    weights = [load_file(path / "model.safetensors") for path in (alone, together)]
    assert weights[0].keys() == weights[1].keys()
    off = torch.cat([(weights[0][name] - weights[1][name]).abs().flatten() for name in weights[0]])
    assert off.mean() < 1e-5
    model = AutoModelForMaskedLM.from_pretrained(together)
    assert torch.equal(model.lm_head.decoder.weight, model.linformer.embeddings.word_embeddings.weight)


@pytest.mark.slow
def test_divided_weights_resume_exactly_after_being_killed(runs):  # noqa: F811
    given = ["--max_train_steps", 14, "--per_device_train_batch_size", 2, "--eval_steps", 7]
    assert run_two(runs.options(*given, output="whole")) == [0, 0]
    arguments = runs.options(*given, "--checkpointing_steps", 2, "--resume_from_checkpoint", "last")
    output_dir = runs.folder / "out"
    # The second may find the first one gone before it is killed itself.
    exit_codes = run_two(arguments, until=some_time_after(output_dir, 4, 0.01))
    assert exit_codes[0] == -9 and exit_codes[1] in (-9, 1)
    step = newest(output_dir)
    assert 4 <= step < 14 and is_intact(list_checkpoints(output_dir)[step])
    assert run_two(arguments) == [0, 0]
    assert_same_end(output_dir, runs.folder / "whole")


def test_the_twin_is_refused(runs):  # noqa: F811
    assert run_two(runs.options("--max_train_steps", 2, "--architecture", "roberta")) == [2, 2]
    assert (runs.folder / "error-0.txt").read_text().startswith("FSDP refuses the bias")
