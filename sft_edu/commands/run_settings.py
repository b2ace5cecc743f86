"""What a run was asked to do, kept in its folder, so that it can go on without being told again."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from sft_edu.training.whole_file import write_whole

SETTINGS = "settings.json"


@dataclass(frozen=True)
class RunSettings:
    """What to train on what and how. None stands for what suits the model and the data; see `prepare_run`.

    Args:
        data: a JSONL file, see `load_jsonl`; None for the built-in tasks.
        data_sha256: of the file, once it has been read.
        model: "tiny", or a folder or hub id, see `load_model`, or a file that `save_tiny_model` wrote.
        chat_template: whether to use the one of the tokenizer, see `encode`.
        max_length: tokens of the longest sequence, see `encode`.
        held_out: share of the data that is not trained on.
        evaluate_every, checkpoint_every: see `train_into`.
        threads: of PyTorch on the CPU.

    All others are those of `TrainConfig`.
    """

    data: str | None = None
    data_sha256: str | None = None
    model: str = "tiny"
    rule: str = "token_mean"
    microbatch_size: int | None = None
    gradient_accumulation_steps: int | None = None
    normalize_constant: float = 1.0
    num_epochs: int | None = None
    optimizer: str = "adamw"
    learning_rate: float | None = None
    warmup_steps: int | None = None
    weight_decay: float = 0.01
    max_norm: float = 1.0
    seed: int = 0
    chat_template: bool = True
    max_length: int | None = None
    held_out: float | None = None
    evaluate_every: int | None = None
    checkpoint_every: int = 50
    threads: int | None = None

    def write(self, folder: Path) -> None:
        """Into the folder of the run."""
        # Infinity is no JSON.
        values = {
            name: str(value) if isinstance(value, float) and math.isinf(value) else value
            for name, value in asdict(self).items()
        }
        write_whole(folder / SETTINGS, (json.dumps(values, indent=2) + "\n").encode())


def read_settings(folder: str | os.PathLike) -> RunSettings:
    """What the run in a folder was asked to do.

    Raises:
        ValueError: the file is not what `RunSettings.write` wrote.
        OSError: it cannot be read.
    """
    path = Path(folder) / SETTINGS
    names = {field.name for field in fields(RunSettings)}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if set(values) != names:
            raise ValueError("other fields")
        return RunSettings(**values | {name: float(value) for name, value in values.items() if value == "inf"})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: got a damaged file; expected the settings of a run") from error
