"""Checkpoints of a training loop that survive a kill at any moment: written aside, renamed, checked before use.

A checkpoint is a folder `checkpoint-<step>` of what `Accelerator.save_state` writes and of `progress.json` (where the
run stands), `data-<process>.json` (where each process stands in its data), `arguments.json` (which run it is) and
`checksums.json` (the SHA-256 of all the others). Weights are safetensors; optimizer and schedule are torch files,
which `Accelerator.load_state` opens with `weights_only=True`. All processes write to one folder.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

from common import UserError, one_line, write_json


def list_checkpoints(output_dir: Path) -> dict[int, Path]:
    """The checkpoints of a folder by their step, oldest first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return dict(sorted((int(path.name.removeprefix("checkpoint-")), path) for path in folders))


def _checksums(folder: Path) -> dict[str, str]:
    sums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "checksums.json":
            with path.open("rb") as file:
                sums[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def is_intact(checkpoint: Path) -> bool:
    """Whether a checkpoint is, byte for byte, what was once written."""
    try:
        return json.loads((checkpoint / "checksums.json").read_text()) == _checksums(checkpoint)
    except (OSError, ValueError):
        return False


def _best_step(checkpoint: Path) -> int | None:
    """The step that a checkpoint calls the best; None if it knows of none, or cannot be read."""
    try:
        return json.loads((checkpoint / "progress.json").read_text())["best_step"]
    except (OSError, ValueError):
        return None


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    progress: dict[str, Any],
    data_state: dict[str, Any],
    identity: dict[str, Any],
    limit: int,
) -> None:
    """Write `checkpoint-<progress["step"]>`, then keep the newest `limit` and the ones they call their `best_step`.

    Raises `UserError` where it cannot be written, as on a full disk; the checkpoints before it stay as they are.
    """
    folder, aside = output_dir / f"checkpoint-{progress['step']}", output_dir / ".checkpoint.partial"
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(aside))
        write_json(aside / f"data-{accelerator.process_index}.json", data_state)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_json(aside / "progress.json", progress)
            write_json(aside / "arguments.json", identity)
            write_json(aside / "checksums.json", _checksums(aside))
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
    # Torch and safetensors have errors of their own for what the system refuses.
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"cannot write {folder}: {one_line(error)}; the checkpoints before it are good: make room, then go on "
            "with --resume_from_checkpoint last"
        ) from error
    if accelerator.is_main_process:
        # Later ones are there only if this run went back to an earlier one; they are replaced as it gets there.
        past = {step: path for step, path in list_checkpoints(output_dir).items() if step <= progress["step"]}
        newest = list(past)[-limit:]
        best = {_best_step(past[step]) for step in newest}
        for step in past.keys() - {*newest, *best}:
            shutil.rmtree(past[step])
    accelerator.wait_for_everyone()


def find_checkpoint(output_dir: Path, wanted: str | None, overwrite: bool) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` (`wanted`: None, "last" or a path) means, if there is one.

    Raises `UserError` if it cannot be used, and if a new run would overwrite a model without being allowed to.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file; choose a folder")
    checkpoints = list_checkpoints(output_dir)
    if wanted == "last":
        for checkpoint in reversed(checkpoints.values()):
            if is_intact(checkpoint):
                return checkpoint
            print(f"warning: {checkpoint} is damaged; trying the one before it", file=sys.stderr)
    elif wanted is not None:
        if Path(wanted).resolve() not in [path.resolve() for path in checkpoints.values()]:
            raise UserError(
                f"{wanted} is not among the checkpoints of {output_dir}: {[*map(str, checkpoints.values())]}"
            )
        if not is_intact(Path(wanted)):
            raise UserError(f"{wanted} is damaged; --resume_from_checkpoint last takes the newest one that is not")
        return Path(wanted)
    holds_model = checkpoints or any(output_dir.glob("*.safetensors")) or (output_dir / "config.json").exists()
    if holds_model and not overwrite:
        way_on = (
            "every checkpoint in it is damaged" if wanted and checkpoints else "there is no checkpoint to resume from"
        )
        raise UserError(
            f"--output_dir {output_dir} already holds a model"
            + (f" and {way_on}" if wanted else ", to go on with it give --resume_from_checkpoint last")
            + "; choose another folder or replace it with --overwrite_output_dir"
        )
    if wanted == "last":
        print(f"nothing to resume in {output_dir}: starting from the beginning")
    return None


def load_checkpoint(
    accelerator: Accelerator, checkpoint: Path, identity: dict[str, Any], defaults: dict[str, Any]
) -> tuple[dict, dict]:
    """Load all states; return the progress and where this process stands in its data.

    defaults: what options were, as good as, before there were any. Raises `UserError` if it was written by a run of
    another identity.
    """
    before = {name: value for name, value in defaults.items() if name in identity}
    before |= json.loads((checkpoint / "arguments.json").read_text())
    changed = [
        f"{name} was {before.get(name)} and is {identity.get(name)}"
        for name in sorted(before.keys() | identity.keys())
        if before.get(name) != identity.get(name)
    ]
    if changed:
        raise UserError(f"cannot resume {checkpoint} with other arguments: {'; '.join(changed)}")
    accelerator.load_state(str(checkpoint))
    names = ("progress.json", f"data-{accelerator.process_index}.json")
    progress, data_state = (json.loads((checkpoint / name).read_text()) for name in names)
    return progress, data_state
