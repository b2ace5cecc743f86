"""Check a learner's `get_response_log_probs`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import one_hot

from sft_edu.course.progress import remembered
from sft_edu.exercises.guard import Judged, as_floats, call, judged, reading, smallest
from sft_edu.exercises.log_probs_mistakes import named_mistake
from sft_edu.exercises.verdict import Verdict, close, difference, numbers, right, wrong


class Bigrams(nn.Module):
    """A model that is a table: row i holds the logits after token i."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table.clone())
        self.calls = 0

    @property
    def device(self) -> torch.device:
        return self.table.device

    def forward(self, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        """An `attention_mask` changes nothing: no token looks at another."""
        self.calls += 1
        logits = self.table[input_ids]
        logits.logits = logits  # as models of transformers are read: either form is right
        return logits


@dataclass(frozen=True)
class _Case:
    """One call: a table of logits, `[V, V]`, and ids and labels, `[B, T]`."""

    table: torch.Tensor
    input_ids: list
    labels: list
    text: str
    absolute: float = 1e-9

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(self.input_ids), torch.tensor(self.labels)

    def expected(self) -> torch.Tensor:
        input_ids, labels = self.batch()
        return self.table.double()[input_ids].log_softmax(-1).gather(-1, labels[..., None])[..., 0]

    def __str__(self) -> str:
        return self.text


def _small(logits: list[float], labels: list[list[int]], dtype: torch.dtype = torch.float64) -> _Case:
    kind = "" if dtype is torch.float64 else f" in {str(dtype).removeprefix('torch.')}"
    text = f"logits {numbers(logits)}{kind} at every position, labels {numbers(labels)}"
    absolute = 2e-2 if dtype is torch.float16 else 1e-6
    table = torch.tensor([logits] * len(logits), dtype=dtype)
    return _Case(table, [[0] * len(row) for row in labels], labels, text, absolute)


# T is larger than V: a gather along the wrong dimension gives numbers, and no error.
_LABELS = [[3, 0, 2, 1, 3], [1, 2, 2, 0, 1]]
_TABLE = 3 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
_TELLING = _Case(_TABLE, [[2, 3, 0, 2, 1], [0, 1, 2, 2, 0]], _LABELS, "B = 2, T = 5, V = 4")
_CASES = (
    _small([0.0, 1.0], [[1]]),
    _small([0.0, 1.0], [[0, 1]]),
    _small([0.0, 1.0, 2.0], [[0, 1], [2, 0]]),
    _TELLING,
    _small([0.0, 1.0], [[0, 1]], torch.float32),
)
_LARGE = (
    _small([0.0, 1000.0], [[0, 1]], torch.float32),
    _small([0.0, 6.0, 12.0], [[0, 1, 2]], torch.float16),
)


@remembered
@judged
def check_get_response_log_probs(function: Callable[..., dict[str, torch.Tensor]]) -> Verdict:
    """Check a `get_response_log_probs` written by the learner.

    Args:
        function: called as `function(model, input_ids, labels)`; returns a dict with `log_probs`, `[B, T]`. The model
            returns logits, which are also their own attribute `logits`.
    """
    model, batch = Bigrams(_TELLING.table), _TELLING.batch()
    given = _TELLING.batch()
    log_probs = _log_probs(call(function, model, *given))
    with reading("the model that was given, with the parameters it had"):
        if not model.table.equal(_TELLING.table):
            return wrong("changes-parameters", "Your function changed the model. Only read what it returns.")
    if not all(ids.equal(copy) for ids, copy in zip(given, batch, strict=True)):
        return wrong("mutates-input", "Your function changed its arguments. Compute new tensors.")
    found = as_floats(log_probs, "a dict with the tensor log_probs, [B, T]")
    case, largest = smallest(_CASES, lambda one: _compare(function, one))
    if case:
        code, hint = named_mistake(found, _TABLE[batch[0]], *batch)
        return wrong(code, hint, case, largest)
    large, largest = smallest(_LARGE, lambda one: _compare(function, one))
    if large:
        hint = "Large logits overflow: their exponentials are too large for the dtype. One function does both at once."
        return wrong("overflow", hint, large, largest)
    verdict = _graph_problem(log_probs, model, batch)
    return verdict or right(f"All {found.numel()} log-probs match, and so does their gradient.")


def _log_probs(returned: object) -> object:
    with reading("a dict with the tensor log_probs"):
        if not isinstance(returned, Mapping):
            hint = f'Got {type(returned).__name__}; expected a dict with the key "log_probs".'
            raise Judged(wrong("not-a-dict", hint))
        if "log_probs" not in returned:
            raise Judged(wrong("not-a-dict", 'The key "log_probs" is not in the dict that came back.'))
        return returned["log_probs"]


def _compare(function: Callable, case: _Case) -> tuple[str, float | None] | None:
    model, expected = Bigrams(case.table), case.expected()
    log_probs = _log_probs(call(function, model, *case.batch(), quiet=True))
    found = as_floats(log_probs, "a tensor log_probs, [B, T]")
    if close(found, expected, absolute=case.absolute):
        return None
    if case is _TELLING:
        return f"{case}: shape {list(found.shape)}.", difference(found, expected)
    return f"{case}: got {numbers(found)}, expected {numbers(expected)}.", difference(found, expected)


def _graph_problem(log_probs: torch.Tensor, model: Bigrams, batch: tuple) -> Verdict | None:
    """The numbers are right; is the graph there, is it the right one, and was one forward pass enough?"""
    if not log_probs.requires_grad:
        hint = "Numbers are right, but no gradient gets through: look for no_grad, detach or item. Nothing would train."
        return wrong("no-graph", hint)
    with reading("log-probs whose graph is still there"):
        (gradient,) = torch.autograd.grad(log_probs.sum(), model.table, allow_unused=True)
    logits = _TABLE[batch[0]]
    by_hand = one_hot(batch[1], logits.shape[-1]) - logits.softmax(-1)
    expected = torch.zeros_like(_TABLE).index_add_(0, batch[0].flatten(), by_hand.flatten(0, 1))
    if gradient is None or not close(gradient, expected):
        hint = "Numbers are right, but their gradient is not: a part of the log-softmax has no graph."
        return wrong("wrong-gradient", hint)
    if model.calls > 1:
        hint = f"Numbers are right, but the model ran {model.calls} times. One forward pass is enough."
        return wrong("extra-forward", hint)
    return None
