"""From settings to all that a run needs: model, tokens, held-out examples, the training itself."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import nn

from sft_edu.commands.run_settings import RunSettings
from sft_edu.data.encode import SHORTEST, EncodedExamples, encode, padding_token
from sft_edu.data.examples import Conversation, Example, held_out
from sft_edu.data.jsonl import load_jsonl
from sft_edu.model import default_device
from sft_edu.tokens import ByteTokenizer, Tokenizer
from sft_edu.training.evaluate import Evaluation
from sft_edu.training.one_process import OneProcess
from sft_edu.training.pretrained import context_length, load_model
from sft_edu.training.tiny_run import TINY_CONFIG, TINY_LENGTH, load_tiny_model, tiny_examples, tiny_model
from sft_edu.training.train import Training
from sft_edu.training.train_config import TrainConfig

TINY = "tiny"
_WEIGHTS = ".pt"  # of a tiny model that was trained before
PRETRAINED_DEFAULTS = {"microbatch_size": 4, "gradient_accumulation_steps": 8, "learning_rate": 2e-5}
_LONGEST = 1024  # tokens, unless said otherwise
_HELD_OUT = 0.1
_EVALUATIONS = 10  # in a run, besides the first
_MOST = {"threads": 1024, "seed": 2**53}
_MOST |= dict.fromkeys(("microbatch_size", "num_epochs", "warmup_steps", "max_length"), 2**31 - 1)


@dataclass(frozen=True)
class PreparedRun:
    """A run that can begin.

    Attributes:
        settings: with nothing left open.
        tokenizer: of the model.
        examples: all of them as tokens; printed, they say what was cut.
        training: on those that are not held out.
        evaluation: on those that are; None if none are.
    """

    settings: RunSettings
    tokenizer: Tokenizer
    examples: EncodedExamples
    training: Training
    evaluation: Evaluation | None

    @property
    def split(self) -> str:
        """How many examples are trained on, and how many are not; of people's own they decide that."""
        trained = len(self.training.examples)
        words = f"{trained:,} to train on, {len(self.examples) - trained:,} held out"
        return words + " (--held-out changes that)" * (self.settings.data is not None)


def prepare_run(
    settings: RunSettings, device: torch.device | str | None = None, ranks: OneProcess | None = None
) -> PreparedRun:
    """Load data and model, make tokens, and decide what was left open.

    The defaults for the tiny model are those of `TINY_CONFIG` and one thread, for others 4 sequences in a microbatch, 8
    microbatches in an optimizer step and a learning rate of 2e-5. Of people's own data a tenth is held out, and the
    rest is seen three times.

    Args:
        settings: with the SHA-256 of the data, if the data must still be the same.
        device: the accelerator if there is one, else the CPU.
        ranks: who shares the work, see `Training`.

    Raises:
        ModelLoadError: see `load_model`.
        JsonlError: see `load_jsonl`.
        OSError: a file cannot be read.
        TypeError, ValueError: the text names the setting, what was given and what is expected.
    """
    for name in ("evaluate_every", "checkpoint_every", "threads"):
        if (value := getattr(settings, name)) is not None and value < 1:
            raise ValueError(f"{name}: got {value}; expected an integer of at least 1")
    for name, most in _MOST.items():  # what is computed with it would overflow
        if (value := getattr(settings, name)) is not None and value > most:
            raise ValueError(f"{name}: got {value}; expected an integer of at most {most}")
    settings = _with_defaults(settings)
    _config(settings)  # says what is wrong before anything large is loaded
    settings, examples, is_held_out = _load_examples(settings)
    model, tokenizer = _load_model(settings, usable_device(device))
    settings = replace(settings, max_length=_checked_length(settings, model))
    encoded = encode(examples, tokenizer, settings.max_length, chat_template=settings.chat_template)
    trained, tested = (
        EncodedExamples(tuple(one for one, is_held in zip(encoded, is_held_out, strict=True) if is_held is wanted))
        for wanted in (False, True)
    )
    minibatch_size = settings.microbatch_size * settings.gradient_accumulation_steps
    settings = _with_cadence(settings, settings.num_epochs * math.ceil(len(trained) / minibatch_size))
    training = Training(model, trained, _config(settings), pad_token_id=padding_token(tokenizer), ranks=ranks)
    evaluation = Evaluation(tested, tokenizer, batch_size=settings.microbatch_size) if tested else None
    return PreparedRun(settings, tokenizer, encoded, training, evaluation)


def usable_device(name: torch.device | str | None) -> torch.device:
    """The device of that name; without one the accelerator, if this machine has one, or else the CPU.

    Raises:
        ValueError: this machine has no such device.
    """
    if name is None:
        return default_device()
    try:
        device = torch.empty(1, device=name).device
        torch.zeros(1).to(device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: torch without CUDA
        raise ValueError(
            f"device: got {name}; expected one that this machine has, such as {default_device()}"
        ) from error
    return device


def _with_defaults(settings: RunSettings) -> RunSettings:
    # So small a model loses more by a second thread than it gains, and much more where another program runs.
    suits_tiny = {name: getattr(TINY_CONFIG, name) for name in PRETRAINED_DEFAULTS} | {"threads": 1}
    defaults = suits_tiny if _is_tiny(settings) else PRETRAINED_DEFAULTS
    defaults = defaults | {"num_epochs": 3, "held_out": _HELD_OUT} if settings.data else defaults | {"num_epochs": 1}
    still_open = {name: value for name, value in defaults.items() if getattr(settings, name) is None}
    return replace(settings, **still_open)


def _with_cadence(settings: RunSettings, num_steps: int) -> RunSettings:
    """What depends on the length of the run: a short one has a short warm-up."""
    defaults = {
        "warmup_steps": min(TINY_CONFIG.warmup_steps, num_steps // 10),
        "evaluate_every": max(1, num_steps // _EVALUATIONS),
    }
    return replace(settings, **{name: value for name, value in defaults.items() if getattr(settings, name) is None})


def _config(settings: RunSettings) -> TrainConfig:
    names = {field.name for field in fields(TrainConfig)} & {field.name for field in fields(RunSettings)}
    values = {name: getattr(settings, name) for name in names}
    return TrainConfig(**{name: value for name, value in values.items() if value is not None})


def _is_tiny(settings: RunSettings) -> bool:
    return settings.model == TINY or settings.model.endswith(_WEIGHTS)


def _load_examples(settings: RunSettings) -> tuple[RunSettings, Sequence[Example | Conversation], list[bool]]:
    """The examples, and which of them are held out."""
    if settings.data is None:
        if settings.held_out is not None:
            raise ValueError(
                f"held_out: got {settings.held_out}; expected none, the built-in tasks have their own test"
            )
        trained, tested = (tiny_examples(split, settings.seed) for split in ("train", "test"))
        return settings, trained + tested, [False] * len(trained) + [True] * len(tested)
    if not 0 <= settings.held_out < 1:
        raise ValueError(f"held_out: got {settings.held_out}; expected a share from 0 up to 1")
    if Path(settings.data).is_fifo():
        raise ValueError(f"data: got {settings.data}, a pipe; expected a file, which a resumed run can read again")
    examples = load_jsonl(settings.data)
    with Path(settings.data).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if settings.data_sha256 not in (None, found):
        raise ValueError(f"data: got {settings.data}, which has changed; expected it as it was when the run began")
    return replace(settings, data_sha256=found), examples, held_out(examples, settings.held_out, seed=settings.seed)


def _load_model(settings: RunSettings, device: torch.device) -> tuple[nn.Module, Tokenizer]:
    if settings.model == TINY:
        length = settings.max_length or TINY_LENGTH
        return tiny_model(max(length, SHORTEST) - 1, settings.seed).to(device), ByteTokenizer()
    if _is_tiny(settings):
        return load_tiny_model(settings.model).to(device), ByteTokenizer()
    return load_model(settings.model, device=device)


def _checked_length(settings: RunSettings, model: nn.Module) -> int:
    reads = context_length(model)
    if settings.max_length is None:
        return min(_LONGEST, reads + 1) if reads else _LONGEST
    if reads and settings.max_length > max(reads + 1, SHORTEST):
        found = f"got {settings.max_length}; expected at most {reads + 1}, the model reads {reads} tokens"
        raise ValueError(f"max_length: {found}")
    return settings.max_length
