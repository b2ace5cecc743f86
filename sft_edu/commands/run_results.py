"""What is left of a run in the end: the model, a report, and a few sentences."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path

from sft_edu.commands.prepare_run import PreparedRun
from sft_edu.digits import fixed
from sft_edu.model import TinyLM
from sft_edu.training.pretrained import save_model
from sft_edu.training.run import RunFolder
from sft_edu.training.tiny_run import save_tiny_model
from sft_edu.training.train import Training
from sft_edu.training.whole_file import write_whole

REPORT = "report.html"
MODEL = "model"  # a folder, or with .pt the file of a tiny model
_NAME = ".model"  # holds the name that the model has got


def save_final_model(prepared: PreparedRun, folder: Path) -> Path:
    """Write the trained model, unless this run has done so: it was resumed after its end. Nothing else is replaced."""
    model = prepared.training.model
    if isinstance(model, TinyLM):
        return save_tiny_model(model, _own_path(folder, ".pt"))
    path = _own_path(folder)
    return path if path.exists() else save_model(model, prepared.tokenizer, path)


def _own_path(folder: Path, suffix: str = "") -> Path:
    """Where the model goes. The name is noted while it is free: what has it afterwards is of this run."""
    note = folder / _NAME
    if not note.exists():
        paths = (folder / f"{MODEL}{f'_{number}' * (number > 1)}{suffix}" for number in count(1))
        free = next(path for path in paths if not os.path.lexists(path))
        write_whole(note, free.name.encode())
    return folder / note.read_text(encoding="utf-8")


def how_far(training: Training) -> str:
    """Such as "after optimizer step 3 of 10 and 1 microbatch of the next"."""
    words = f"after optimizer step {training.step:,} of {training.num_steps:,}"
    several = "es" * (training.microbatch > 1)
    return words + f" and {training.microbatch} microbatch{several} of the next" * bool(training.microbatch)


def final_words(prepared: PreparedRun, run: RunFolder, model: Path | None) -> list[str]:
    """How far the run got and where it was resumed, how good the model is, what was cut, and where the model lies."""
    training, lines = prepared.training, run.records()
    how = "Finished" if training.finished else "Stopped"
    sentences = [f"{how} {how_far(training)}.", *_went_on(run.went_on), f"Data: {prepared.examples}"]
    scored = [line for line in lines if "held_out_exact_match" in line]
    if scored:
        share, step, total = scored[-1]["held_out_exact_match"], scored[-1]["step"], len(prepared.evaluation.examples)
        nll = scored[-1]["held_out_nll"]
        sentences.append(
            f"Held out, after step {step:,}: {share:.1%} right, {round(share * total):,} of {total:,}; NLL per "
            f"response token {'no number' if nll is None else fixed(nll)}."
        )
    if model:
        how = (
            "sft_edu.training.tiny_run.load_tiny_model" if model.is_file() else "sft_edu.training.pretrained.load_model"
        )
        sentences.append(f"Model: {model}; {how} reads it, and so does --model.")
    return sentences


def _went_on(steps: Sequence[int]) -> list[str]:
    if not steps:
        return []
    return [f"Went on after optimizer step{'s' * (len(steps) > 1)} {', '.join(f'{step:,}' for step in steps)}."]


def write_report(prepared: PreparedRun, run: RunFolder, words: Sequence[str]) -> Path:
    """Write `report.html` into the folder of the run."""
    from sft_edu.commands.report_page import report_page  # matplotlib takes a second

    page = report_page(f"sft-edu train, {run.folder.resolve().name}", words, run.records(), asdict(prepared.settings))
    return write_whole(run.folder / REPORT, page.encode())
