"""Checkpoints that survive a kill at any moment, and that know when they are damaged."""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from sft_edu.training.whole_file import remove_unfinished, write_whole

KEPT = 2  # the newest and the one before
_NAME = re.compile(r"step-(\d{8,})\.(\d{4,})-([0-9a-f]{64})\.pt")
_DAMAGED = ".damaged"


class DamagedCheckpointWarning(UserWarning):
    """A checkpoint is not what was written; an older one is used."""


def save_checkpoint(folder: str | os.PathLike, state: Mapping[str, object], *, step: int, microbatch: int = 0) -> Path:
    """Write a checkpoint beside the one before, which is deleted only when a newer pair is complete.

    The file is either whole or not there, see `write_whole`, and its name holds the SHA-256 of its content. What is in
    it: `state`, tensors and plain values that `torch.load(weights_only=True)` reads, the states of the random number
    generators, and the versions that `environment_differences` compares.

    Args:
        folder: made if missing.
        state: such as `Training.state_dict()`.
        step: optimizer steps done.
        microbatch: microbatches done of the unfinished optimizer step.

    Returns:
        The path of the checkpoint.

    Raises:
        OSError: it could not be written (a full disk, a read-only folder); the checkpoints that were there still are.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    buffer = io.BytesIO()
    torch.save({**state, "random": _random_state(), "environment": _environment()}, buffer)
    content = buffer.getbuffer()
    path = folder / f"step-{step:08d}.{microbatch:04d}-{hashlib.sha256(content).hexdigest()}.pt"
    write_whole(path, content)
    for old in _checkpoints(folder)[KEPT:]:
        if old != path:  # newer ones may be damaged
            old.unlink(missing_ok=True)
    return path


def load_checkpoint(folder: str | os.PathLike, *, map_location: torch.device | str = "cpu") -> dict[str, object] | None:
    """The newest checkpoint that is whole, or None where there is none.

    Newer ones, which are damaged, get another name: `save_checkpoint` must not count them among those that it keeps.
    Random number generators are left alone; see `set_random_state`.

    Args:
        folder: where `save_checkpoint` wrote.
        map_location: where tensors go.

    Raises:
        ValueError: there are checkpoints, and all are damaged.

    Warns:
        DamagedCheckpointWarning: a newer one is damaged.
    """
    checkpoints = _checkpoints(Path(folder))
    for index, path in enumerate(checkpoints):
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() == _NAME.fullmatch(path.name)[3]:
            _set_aside(checkpoints[:index])
            return torch.load(io.BytesIO(content), map_location=map_location, weights_only=True)
        warnings.warn(f"{path} is damaged; taking the one before", DamagedCheckpointWarning, stacklevel=2)
    if checkpoints:
        raise ValueError(f"{folder}: got damaged checkpoints alone; expected a whole one")
    return None


def set_random_state(state: Mapping[str, object]) -> None:
    """Put Python's, NumPy's (if it is in use) and PyTorch's random number generators where the checkpoint had them."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"].cpu())
    if "accelerator" in state and torch.accelerator.is_available():
        _set_accelerator_state(state["accelerator"])
    if "numpy" in state and "numpy" in sys.modules:
        kind, keys, *rest = state["numpy"]
        sys.modules["numpy"].random.set_state((kind, keys.cpu().numpy(), *rest))


def environment_differences(state: Mapping[str, object]) -> list[str]:
    """What is not as it was when the checkpoint was written, and keeps a resumed run from being equal bit for bit."""
    return [
        f"{name} was {before} and is {_environment()[name]}"
        for name, before in state["environment"].items()
        if before != _environment()[name]
    ]


def _environment() -> dict[str, object]:
    return {"the number of threads": torch.get_num_threads(), "the version of torch": str(torch.__version__)}


def _random_state() -> dict[str, object]:
    version, internal, gauss = random.getstate()
    state = {"python": [version, list(internal), gauss], "torch": torch.get_rng_state()}
    if torch.accelerator.is_available():
        state["accelerator"] = _accelerator_state()
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        # weights_only reads tensors, not arrays.
        state["numpy"] = [kind, torch.from_numpy(keys.copy()), *rest]
    return state


def _accelerator_state() -> list[torch.Tensor]:
    module = torch.get_device_module()
    return module.get_rng_state_all() if hasattr(module, "get_rng_state_all") else [module.get_rng_state()]  # mps: one


def _set_accelerator_state(states: list[torch.Tensor]) -> None:
    module = torch.get_device_module()
    if hasattr(module, "set_rng_state_all"):
        module.set_rng_state_all([state.cpu() for state in states])
    else:
        module.set_rng_state(states[0].cpu())


def _checkpoints(folder: Path) -> list[Path]:
    """The newest first."""
    found = {path: match for path in folder.glob("step-*.pt") if (match := _NAME.fullmatch(path.name))}
    return sorted(found, key=lambda path: (int(found[path][1]), int(found[path][2])), reverse=True)


def _set_aside(damaged: Sequence[Path]) -> None:
    for path in damaged:
        with suppress(OSError):  # whoever only reads may not write there
            path.replace(path.with_name(path.name + _DAMAGED))
