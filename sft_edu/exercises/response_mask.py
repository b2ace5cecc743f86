"""Check a learner's function that builds the response mask."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from sft_edu.audit.words import name_of
from sft_edu.course.progress import remembered
from sft_edu.exercises.guard import Judged, call, judged, reading, smallest
from sft_edu.exercises.verdict import Verdict, numbers, right, wrong
from sft_edu.masks import PRESETS
from sft_edu.tokens import ByteTokenizer, tokenize_prompt_and_output

_LENGTHS = [(3, 2), (1, 4), (5, 3), (2, 1)]
_MOST = 1000  # values read: an iterator need not end
# Prompt, output and longest, smallest first.
_SMALL = [(1, 1, 2), (2, 1, 3), (1, 2, 3), (2, 2, 4), (1, 1, 3), (2, 1, 4), *((*lengths, 8) for lengths in _LENGTHS)]


@remembered
@judged
def check_response_mask(make_mask: Callable[[int, int, int], list[int]]) -> Verdict:
    """Check a function that builds one row of the response mask.

    Args:
        make_mask: called with `prompt_length`, `output_length` and `longest`, the length of the longest joined
            sequence; returns `longest - 1` zeros and ones, one for each label.
    """
    expected, longest, name = _expected(_LENGTHS), max(map(sum, _LENGTHS)), name_of(make_mask)
    rows = [_row(make_mask, *lengths, longest) for lengths in _LENGTHS]
    problem = _problem(rows, expected, longest, name)
    case, difference = smallest(_SMALL, lambda small: _compare(make_mask, small, name))
    if problem is None and not case:
        return right(f"All {len(_LENGTHS)} rows match tokenize_prompt_and_output.")
    code, hint = problem or ("other", "These rows are right, but not those of other lengths.")
    return wrong(code, hint, case, difference)


def _expected(lengths: list[tuple[int, int]]) -> torch.Tensor:
    prompts, outputs = (["x" * length for length in column] for column in zip(*lengths, strict=True))
    return tokenize_prompt_and_output(prompts, outputs, ByteTokenizer())["response_mask"]


def _row(make_mask: Callable, *lengths: int, quiet: bool = False) -> list[float]:
    """One row as numbers. Ends the check where it is none."""
    row = call(make_mask, *lengths, quiet=quiet)
    try:
        with reading("a list of zeros and ones"):
            given = type(row).__name__
            return [float(value) for value in itertools.islice(row, _MOST)]
    except Judged:
        hint = f"Got {given}; expected a list of zeros and ones."
        raise Judged(wrong("not-a-list", hint)) from None


def _problem(rows: list[list[float]], expected: torch.Tensor, longest: int, name: str) -> tuple[str, str] | None:
    """Code and hint for wrong rows, None for right ones."""
    for lengths, row in zip(_LENGTHS, rows, strict=True):
        if not set(row) <= {0, 1}:
            other = min(set(row) - {0, 1})
            return "not-zeros-and-ones", f"Got {other:g} among the values; expected zeros and ones."
        if len(row) != longest - 1:
            given = f"{name}({lengths[0]}, {lengths[1]}, {longest}) gave {len(row)} values"
            hint = " There is no label for the first token, so labels are one fewer than tokens."
            return "wrong-length", f"{given}; expected {longest - 1}.{hint if len(row) == longest else ''}"
    if rows == expected.int().tolist():
        return None
    for preset in PRESETS.values():
        if rows == preset.make(expected).int().tolist():
            return preset.name.replace(" ", "-"), f"This is the mask {preset.name!r}. {preset.consequence}"
    if rows == (~expected).int().tolist():
        return "inverted", "The mask is inverted: 1 marks what is trained, the response."
    wrong_row = next(i for i, row in enumerate(rows) if row != expected[i].int().tolist())
    given, wanted = (numbers(row) for row in (rows[wrong_row], expected[wrong_row].int()))
    lengths = ", ".join(map(str, _LENGTHS[wrong_row]))
    return "other", (
        f"{name}({lengths}, {longest}) gave {given}; expected {wanted}. Label t is token t + 1: ask of token t + 1 "
        "whether it is response. eos is already counted in output_length."
    )


def _compare(make_mask: Callable, lengths: tuple[int, int, int], name: str) -> tuple[str, float | None] | None:
    prompt, output, longest = lengths
    row = _row(make_mask, *lengths, quiet=True)
    # The second sequence is there to be the longest.
    wanted = _expected([(prompt, output), (1, longest - 1)])[0].int().tolist()
    if row == wanted:
        return None
    largest = max(abs(a - b) for a, b in zip(row, wanted, strict=True)) if len(row) == len(wanted) else None
    arguments = ", ".join(map(str, lengths))
    return f"{name}({arguments}) gave {numbers(row)}; expected {numbers(wanted)}.", largest
