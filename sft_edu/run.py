"""A training run in a folder: metrics, checkpoints, a way to stop and to go on."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from sft_edu import checkpoint
from sft_edu.train import Record, Training

METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"


class RunFolder:
    """What a run leaves behind: a line of `metrics.jsonl` for each optimizer step, and checkpoints.

    Nothing is written into a folder that holds another run.

    Args:
        folder: made if missing.
        training: the run.
        resume: go on from the newest whole checkpoint in the folder, if there is one. Lines of steps that the
            checkpoint does not know are taken back; they come again.

    Raises:
        FileExistsError: the folder holds a run, and `resume` is False.
        ValueError: the run there had another config or other examples, or all checkpoints are damaged.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike, training: Training, *, resume: bool = False) -> None:
        self.folder, self.training = Path(folder), training
        self.differences: list[str] = []
        """What keeps a resumed run from being equal bit for bit to one that was never stopped."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not resume and ((self.folder / METRICS).exists() or (self.folder / CHECKPOINTS).exists()):
            raise FileExistsError(f"{self.folder}: holds a run; go on with it (resume) or take another folder")
        state = checkpoint.load_checkpoint(self.folder / CHECKPOINTS, map_location=training.device) if resume else None
        if state is not None:
            training.load_state_dict(state)
            checkpoint.set_random_state(state["random"])
            self.differences = checkpoint.environment_differences(state)
        self._take_back_metrics()

    def records(self) -> list[dict[str, object]]:
        """The lines of `metrics.jsonl`."""
        return list(read_metrics(self.folder / METRICS))

    def log(self, record: Record, extra: dict[str, object] | None = None) -> None:
        """Append a line for an optimizer step."""
        line = json.dumps(asdict(record) | (extra or {}), ensure_ascii=False)
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def save(self) -> Path:
        """Write a checkpoint of the run as it is now, also in the middle of a minibatch."""
        training = self.training
        return checkpoint.save_checkpoint(
            self.folder / CHECKPOINTS, training.state_dict(), step=training.step, microbatch=training.microbatch
        )

    def _take_back_metrics(self) -> None:
        """Keep the lines up to the step at which the run stands."""
        path = self.folder / METRICS
        kept = (
            [record for record in read_metrics(path) if record["step"] <= self.training.step] if path.exists() else []
        )
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept), encoding="utf-8")
        unfinished.replace(path)


def read_metrics(path: str | os.PathLike) -> Iterator[dict[str, object]]:
    """The records of a metrics file; a last line that was cut off by a kill is left out."""
    with Path(path).open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def train_into(
    run: RunFolder,
    *,
    checkpoint_every: int = 50,
    evaluate: Callable[[Record], dict[str, object]] | None = None,
    on_record: Callable[[dict[str, object]], object] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Train to the end, or until `should_stop`, which is asked after each microbatch. Then everything is saved.

    Args:
        run: see `RunFolder`.
        checkpoint_every: optimizer steps from one checkpoint to the next.
        evaluate: called with each record; what it returns is added to the line of that step.
        on_record: called with each line, once it is written.
        should_stop: say True to stop.

    Returns:
        Whether the run is finished.
    """
    training = run.training
    while not training.finished and not should_stop():
        record = training.run_microbatch()
        if record is None:
            continue
        extra = evaluate(record) if evaluate else {}
        run.log(record, extra)
        if on_record:
            on_record(asdict(record) | extra)
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

    def ask(number, frame) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)
