"""Check a learner's `masked_normalize`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sft_edu.course.progress import remembered
from sft_edu.exercises.guard import Judged, as_floats, call, judged, reading, smallest
from sft_edu.exercises.verdict import Verdict, close, difference, numbers, right, wrong

_NAN = float("nan")


@dataclass(frozen=True)
class _Case:
    """One call. `code` and `hint` are for an answer that is right in every case before this one."""

    values: list
    mask: list
    dim: int | None = None
    constant: float = 1.0
    mask_dtype: torch.dtype = torch.bool
    dtype: torch.dtype = torch.float64
    code: str = "other"
    hint: str = "Sum the elements where the mask is 1, over the given dimension, then divide by the constant."

    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, int | None, float]:
        tensor = torch.tensor(self.values, dtype=self.dtype, requires_grad=True)
        return tensor, torch.tensor(self.mask, dtype=self.mask_dtype), self.dim, self.constant

    def expected(self) -> torch.Tensor:
        tensor, mask, _, _ = self.arguments()
        return _over(tensor.detach().double().masked_fill(mask == 0, 0), self.dim) / self.constant

    def __str__(self) -> str:
        kind = str(self.mask_dtype).removeprefix("torch.")
        mask = numbers(torch.tensor(self.mask, dtype=torch.int64))
        values = str(self.values).replace(".0", "")
        return f"tensor {values}, mask {mask} ({kind}), dim = {self.dim}, c = {numbers(self.constant)}"


def _over(tensor: torch.Tensor, dim: int | None) -> torch.Tensor:
    return tensor.sum() if dim is None else tensor.sum(dim)


# Two dimensions of different size, and no two mistakes that lead to one number.
_TELLING = _Case([[1.0, 2.5, -4.0], [8.0, 16.5, 33.0]], [[1, 0, 1], [0, 1, 0]], dim=1, constant=2.5)
_NAN_HINT = "A NaN under mask 0 got through: 0 times NaN is NaN. Elements with mask 0 must not be used at all."
_EMPTY_HINT = "Where the mask selects nothing the sum is 0, without division by a count."
_INTEGER_HINT = "An integer mask as an index picks rows. Turn it into a condition first."
_CHANGED_HINT = "The constant is changed before it divides. It may be less than 1, and need not be an integer."
_CASES = (
    _Case([[1.0, 2.0]], [[1, 1]]),
    _Case([[1.0, 2.0]], [[1, 0]]),
    _Case([[1.0, 2.0]], [[1, 1]], constant=4.0),
    _Case([[1.0, 2.0]], [[1, 1]], constant=0.5, code="constant-changed", hint=_CHANGED_HINT),
    _Case([[1.0, 2.0], [4.0, 8.0]], [[1, 1], [0, 1]], dim=0, code="dim-ignored"),
    _Case([[1.0, 2.0], [4.0, 8.0]], [[1, 1], [0, 1]], dim=1, code="dim-ignored"),
    _Case([[1.0, 2.0], [4.0, 8.0]], [[1, 1], [0, 1]], dim=-1, code="dim-ignored"),
    _Case([[1.0, 2.0]], [[1, 0]], mask_dtype=torch.int64, code="mask-as-index", hint=_INTEGER_HINT),
    _Case([[1.0, 2.0]], [[1, 0]], mask_dtype=torch.float32, code="mask-as-index", hint=_INTEGER_HINT),
    _Case([[1.0, _NAN]], [[1, 0]], code="nan-under-mask", hint=_NAN_HINT),
    _Case([[1.0, 2.0]], [[0, 0]], code="empty-mask", hint=_EMPTY_HINT),
    _Case([[1.0, 2.0]], [[1, 0]], dtype=torch.float32),
    _TELLING,
)


@remembered
@judged
def check_masked_normalize(function: Callable[..., torch.Tensor]) -> Verdict:
    """Check a `masked_normalize` written by the learner.

    Args:
        function: called as `function(tensor, mask, dim, normalize_constant)`, by position; the mask is bool, integer or
            float, `dim` an integer or None. Returns the sum over `dim` where the mask is 1, divided by the constant.
    """
    arguments = _TELLING.arguments()
    returned = call(function, *arguments)
    found = as_floats(returned, "a tensor")
    case, largest = smallest(_CASES, lambda one: _compare(function, one))
    if case:
        code, hint = _mistake(found) or _by_case(function)
        return wrong(code, hint, case, largest)
    return _graph_problem(returned, arguments) or right(
        f"{len(_CASES)} sums agree, with masks of three kinds, a NaN under mask 0 and an empty mask among them."
    )


def _mistake(found: torch.Tensor) -> tuple[str, str] | None:
    """The known mistake that leads to this result in the telling case, None if the result is right or unknown."""
    tensor, mask, dim, c = _TELLING.arguments()
    tensor, picked = tensor.detach(), tensor.detach() * mask
    total, count = _over(picked, dim), mask.sum(dim)
    ignored = "The constant has no effect: divide the sum by it."
    by_count = "It is divided by the number of selected elements. Only the constant divides."
    mean = "That is a mean over all positions; a sum is asked for."
    known = [
        ("constant-ignored", ignored, total),
        ("constant-multiplied", "The constant multiplies; it should divide.", total * c),
        ("constant-twice", "The constant divides twice.", total / c / c),
        ("mask-ignored", "Elements with mask 0 are in your sum.", _over(tensor, dim) / c),
        ("mask-ignored", f"Elements with mask 0 are in your sum. {ignored}", _over(tensor, dim)),
        ("mask-inverted", "The mask is inverted: 1 selects an element.", _over(tensor * ~mask, dim) / c),
        ("mask-count", by_count, total / count / c),
        ("mask-count", by_count, total / count),
        ("mean", mean, picked.mean(dim) / c),
        ("mean", f"{mean} {ignored}", picked.mean(dim)),
        ("dim-ignored", "dim has no effect: one number came back for dim = 1.", total.sum() / c),
        ("dim-ignored", f"dim has no effect: one number came back for dim = 1. {ignored}", total.sum()),
        ("wrong-dim", "The sum runs over another dimension than dim.", picked.sum(1 - dim) / c),
        ("keeps-dim", "The summed dimension is still there, with size 1.", total.unsqueeze(dim) / c),
        ("wrong-sign", "The sign is turned. The sum is not negated here; the loss is, later.", -total / c),
        ("not-summed", "The elements are not added up.", picked / c),
    ]
    return next(((code, hint) for code, hint, value in known if close(found, value)), None)


def _by_case(function: Callable) -> tuple[str, str]:
    """Code and hint of the smallest failing case."""
    for case in _CASES:
        try:
            if _compare(function, case) is not None:
                return case.code, case.hint
        except Judged as end:
            if case.mask_dtype is torch.bool:
                return end.verdict.mistake, end.verdict.message
            return case.code, f"{case.hint} {end.verdict.message}"
    raise AssertionError("a failing case fails again")


def _compare(function: Callable, case: _Case) -> tuple[str, float | None] | None:
    arguments = case.arguments()
    copies = [argument.detach().clone() for argument in arguments[:2]]
    found = as_floats(call(function, *arguments, quiet=True), "a tensor")
    if any(not given.equal(copy) for given, copy in zip(arguments, copies, strict=False) if not copy.isnan().any()):
        raise Judged(wrong("mutates-input", "Your function changed its arguments. Compute a new tensor.", str(case)))
    expected = case.expected()
    if close(found, expected):
        return None
    return f"{case}: got {numbers(found)}, expected {numbers(expected)}.", difference(found, expected)


def _graph_problem(returned: torch.Tensor, arguments: tuple) -> Verdict | None:
    """The numbers are right; does the gradient get through?"""
    tensor, mask, _, constant = arguments
    if not returned.requires_grad:
        return wrong("no-graph", "Numbers are right, but no gradient gets through: look for detach or no_grad.")
    with reading("a tensor whose graph is still there"):
        (gradient,) = torch.autograd.grad(returned.sum(), tensor)
    if close(gradient, mask.double() / constant):
        return None
    return wrong(
        "wrong-gradient", "Numbers are right, but the gradient is not 1/c where the mask is 1 and 0 elsewhere."
    )
