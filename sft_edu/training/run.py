"""A training run in a folder: metrics, checkpoints, a way to stop and to go on."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from torch import nn

from sft_edu.training import checkpoint
from sft_edu.training.evaluate import Scores
from sft_edu.training.train import Training
from sft_edu.training.whole_file import write_whole

METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"


class RunFolder:
    """What a run leaves behind: a line of `metrics.jsonl` for each optimizer step, and checkpoints, the first at once.

    Nothing is written into a folder that holds another run.

    Args:
        folder: made if missing.
        training: the run.
        resume: go on from the newest whole checkpoint in the folder, if there is one. Lines of steps that the
            checkpoint does not know are taken back; they come again.

    Raises:
        FileExistsError: the folder holds a run, and `resume` is False.
        ValueError: the run there had another config or other examples, or its checkpoints are gone or all damaged.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike, training: Training, *, resume: bool = False) -> None:
        self.folder, self.training = Path(folder), training
        self.differences: list[str] = []
        """What keeps a resumed run from being equal bit for bit to one that was never stopped."""
        self.folder.mkdir(parents=True, exist_ok=True)
        first = training.ranks.first
        if not resume and first(lambda: any((self.folder / name).exists() for name in (METRICS, CHECKPOINTS))):
            raise FileExistsError(f"{self.folder}: holds a run; go on with it (resume) or take another folder")
        state = first(self._load) if resume else None
        self.went_on: list[int] = []
        """The optimizer steps after which the run was resumed; a checkpoint knows those that led to it."""
        self._saved: tuple[int, int] | None = None
        if state is not None:
            checkpoint.set_random_state(state["random"])
            self.differences = training.load_state_dict(state) + checkpoint.environment_differences(state)
            self._saved = self._position()
            self.went_on = state.get("went_on", []) + [training.step] * (not training.finished)
        self.steps_again: int = first(self._take_back_metrics)
        """How many optimizer steps had been done after the checkpoint that a resumed run goes on from."""
        self.save()

    def records(self) -> list[dict[str, object]]:
        """The lines of `metrics.jsonl`."""
        return list(read_metrics(self.folder / METRICS))

    def log(self, line: Mapping[str, object]) -> None:
        """Append the line of an optimizer step. Of several ranks, the first does."""
        if self.training.ranks.rank:
            return
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(as_json(line) + "\n")

    def save(self) -> None:
        """Write a checkpoint of the run as it is now, also in the middle of a minibatch; unless there is one.

        Several ranks do it together, between optimizer steps; the first writes.
        """
        if self._saved == self._position():
            return
        training = self.training
        state = training.state_dict()
        if training.ranks.rank == 0:
            # The lines of its steps must be on the disk before it: they would be missing after a power cut.
            with (self.folder / METRICS).open("a", encoding="utf-8") as file:
                os.fsync(file.fileno())
            checkpoint.save_checkpoint(
                self.folder / CHECKPOINTS,
                state | {"went_on": self.went_on},
                step=training.step,
                microbatch=training.microbatch,
            )
        self._saved = self._position()

    def _load(self) -> dict[str, object] | None:
        """The newest whole checkpoint; None of a run that was killed before it had one."""
        state = checkpoint.load_checkpoint(self.folder / CHECKPOINTS)
        if state is None and (self.folder / METRICS).exists() and (steps := len(self.records())):
            expected = f"one of the run, of which {METRICS} has {steps} steps"
            raise ValueError(f"{self.folder / CHECKPOINTS}: got no checkpoint; expected {expected}")
        return state

    def _position(self) -> tuple[int, int]:
        return self.training.step, self.training.microbatch

    def _take_back_metrics(self) -> int:
        """Keep the lines up to the step at which the run stands, and count the others."""
        path = self.folder / METRICS
        lines = self.records() if path.exists() else []
        kept = [line for line in lines if line["step"] <= self.training.step]
        write_whole(path, "".join(as_json(line) + "\n" for line in kept).encode())
        return len(lines) - len(kept)


def as_json(value: object) -> str:
    """One line of JSON. It has no words for numbers that are not finite: they become null."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: str | os.PathLike) -> Iterator[dict[str, object]]:
    """The lines of a metrics file; a last one that was cut off by a kill is left out.

    Raises:
        ValueError: a line is none that a run writes. The text names it.
    """
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, start=1):
            if text.endswith("\n"):
                try:
                    line = json.loads(text)
                except ValueError:
                    line = None
                if not isinstance(line, dict) or type(line.get("step")) is not int:
                    raise ValueError(f"{path}, line {number}: got {text[:40]!r}; expected the JSON object of a step")
                yield line


def train_into(
    run: RunFolder,
    *,
    checkpoint_every: int = 50,
    evaluate: Callable[[nn.Module], Scores] | None = None,
    evaluate_every: int = 50,
    on_line: Callable[[dict[str, object]], object] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Train to the end, or until `should_stop`, which is asked after each microbatch. Then everything is saved.

    Args:
        run: see `RunFolder`.
        checkpoint_every: optimizer steps from one checkpoint to the next.
        evaluate: scores the model; the scores go into the line of that step. See `Evaluation`.
        evaluate_every: optimizer steps from one evaluation to the next; the first step and the last have one too.
        on_line: called with each line of the metrics, once it is written.
        should_stop: say True to stop.

    Returns:
        Whether the run is finished.

    Raises:
        OutOfMemory, ValueError: see `Training.run_microbatch`. The newest checkpoint is from before.
        OSError: the folder cannot be written; what was there still is.
    """
    training = run.training
    while not training.finished and not training.agree_to_stop(should_stop):
        record = training.run_microbatch()
        if record is None:
            continue
        line = asdict(record)
        if evaluate and (record.step in (1, training.num_steps) or record.step % evaluate_every == 0):
            line |= evaluate(training.model).as_dict()
        run.log(line)
        if on_line:
            on_line(line)
        if training.step % checkpoint_every == 0:
            run.save()
    run.save()
    return training.finished


@contextmanager
def stops_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl+C asks to stop after the microbatch; a second one stops at once. Outside the main thread nothing changes."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)
