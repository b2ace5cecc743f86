"""How far a run is: a bar that moves, where there is a terminal, and a line for each evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from tqdm import tqdm

from sft_edu.digits import fixed
from sft_edu.tokens import visible_text
from sft_edu.training.train import Training

_LONGEST = 30  # characters of a prompt or an answer


@contextmanager
def progress_bar(training: Training) -> Iterator[Callable[[Mapping[str, object]], None]]:
    """What to call with each line of the metrics."""
    begun, tokens = time.perf_counter(), 0
    width = len(f"{training.num_steps:,}")
    # disable=None: no bar in a file.
    with tqdm(total=training.num_steps, initial=training.step, unit="step", disable=None, dynamic_ncols=True) as bar:

        def show(line: Mapping[str, object]) -> None:
            nonlocal tokens
            tokens += line["num_tokens"]
            speed = tokens / (time.perf_counter() - begun)
            bar.set_postfix_str(f"NLL {fixed(line['nll'])}, {speed:,.0f} response tokens/s", refresh=False)
            bar.update()
            if "held_out_exact_match" in line:
                step = f"step {line['step']:>{width},} of {training.num_steps:,}"
                scores = f"NLL {fixed(line['nll'])}, held out: {line['held_out_exact_match']:>6.1%} right"
                bar.write(f"{step}  {scores}, {speed:,.0f} response tokens/s{_example(line['answers'])}")

        yield show


def _example(answers: list[Mapping[str, object]]) -> str:
    if not answers:
        return ""
    prompt, answer = (_short(answers[0][name]) for name in ("prompt", "answer"))
    return f"  {prompt} -> {answer}"


def _short(text: str) -> str:
    """On one line, and nothing in it that a terminal obeys."""
    text = visible_text(text)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]}…{text[-_LONGEST // 2 :]}"
