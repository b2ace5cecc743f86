"""The passport of a framework: how near the gradient of its loss comes to that of the full batch.

The gradients are measured by autograd, not derived.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import torch
from torch import nn

from sft_edu.accumulate import Batch, Comparison, compare, full_batch_gradient, split_minibatch
from sft_edu.digits import fixed
from sft_edu.frameworks import FRAMEWORKS, Framework
from sft_edu.log_probs import get_response_log_probs
from sft_edu.model import TinyLM
from sft_edu.ragged import ragged_minibatch

_EXACT = 1e-12  # relative error, in float64
_CAPTION = "Each accumulated gradient beside the full batch's mean over tokens: length, cosine, where equal."
_STYLE = 'style="text-align: left; white-space: nowrap"'


@dataclass(frozen=True)
class Row:
    """A framework, and for each G its gradient beside that of the full batch, the mean over tokens."""

    framework: Framework
    measured: Mapping[int, Comparison]

    @property
    def exact_at(self) -> list[int]:
        """Every measured G at which the gradient is that of the full batch."""
        return [steps for steps, comparison in self.measured.items() if comparison.relative_error <= _EXACT]


@dataclass(frozen=True, repr=False)
class Passport:
    """The rows, and a table of them as text and as HTML. `shown` are the G that have columns of their own."""

    rows: tuple[Row, ...]
    shown: tuple[int, ...]

    def __repr__(self) -> str:
        lines = [self._head(), *map(self._cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join([_CAPTION, *("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)])

    def _repr_html_(self) -> str:
        head = "".join(f'<th scope="col" {_STYLE}>{escape(name)}</th>' for name in self._head())
        body = "".join(f"<tr>{self._html_cells(row)}</tr>" for row in self.rows)
        caption = f'<caption style="text-align: left">{escape(_CAPTION)}</caption>'
        table = f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f"<div>{table}<ul>{''.join(map(_html_note, self.rows))}</ul></div>"

    def _head(self) -> list[str]:
        return ["framework", "D", "rule", *(f"length, cos G={steps}" for steps in self.shown), "equal at"]

    def _cells(self, row: Row) -> list[str]:
        measured = [row.measured[steps] for steps in self.shown]
        numbers = [f"{fixed(one.ratio)}x, {fixed(one.cosine)}" for one in measured]
        return [row.framework.name, row.framework.denominator, row.framework.rule or "none", *numbers, _where(row)]

    def _html_cells(self, row: Row) -> str:
        name, *cells = map(escape, self._cells(row))
        return f'<th scope="row" {_STYLE}>{name}</th>' + "".join(f"<td {_STYLE}>{cell}</td>" for cell in cells)


def passport(
    frameworks: Sequence[Framework] = FRAMEWORKS,
    batch: Batch | None = None,
    model: nn.Module | None = None,
    *,
    shown: Sequence[int] = (1, 3),
) -> Passport:
    """Measure each framework's gradient on one minibatch, split into every possible number of microbatches.

    Length and cosine are those of `compare`, against the full batch's mean over tokens. No `.grad` is touched.

    Args:
        frameworks: whose losses are measured.
        batch: at least one response token in each sequence; eight sequences of very unequal lengths when None.
        model: see `get_response_log_probs`; a tiny one in float64 when None.
        shown: the G that have a column in the table, from 1 to the number of sequences.

    Raises:
        TypeError, ValueError: the text names the argument, what was given and what is expected.
    """
    batch = ragged_minibatch(8, imbalance=1.0) if batch is None else batch
    model = TinyLM(d_model=16, num_layers=1, num_heads=2).double() if model is None else model
    reference = full_batch_gradient(model, batch)
    if not (batch["response_mask"] != 0).any(-1).all():
        raise ValueError("batch: got a sequence without response tokens; expected at least one, or a mean is 0/0")
    every = range(1, len(batch["response_mask"]) + 1)
    if not set(shown) <= set(every):
        raise ValueError(f"shown: got {tuple(shown)}; expected numbers of microbatches from 1 to {len(every)}")
    measured: list[dict[int, Comparison]] = [{} for _ in frameworks]
    for steps in every:
        gradients = accumulated_gradients(frameworks, model, split_minibatch(batch, steps))
        for comparisons, gradient in zip(measured, gradients, strict=True):
            comparisons[steps] = compare(gradient, reference)
    return Passport(tuple(map(Row, frameworks, measured)), tuple(shown))


@torch.enable_grad()
def accumulated_gradients(
    frameworks: Sequence[Framework], model: nn.Module, microbatches: Sequence[Batch]
) -> list[torch.Tensor]:
    """For each framework the sum of its gradients over all microbatches, flat, in the order of the parameters.

    Args:
        frameworks: whose losses are differentiated.
        model: see `get_response_log_probs`; all its parameters take part.
        microbatches: as `split_minibatch` makes them.
    """
    parameters = list(model.parameters())
    totals = [[torch.zeros_like(parameter) for parameter in parameters] for _ in frameworks]
    minibatch_tokens = sum(int((microbatch["response_mask"] != 0).sum()) for microbatch in microbatches)
    for microbatch in microbatches:
        mask = microbatch["response_mask"] != 0
        log_probs = get_response_log_probs(model, microbatch["input_ids"], microbatch["labels"])["log_probs"][mask]
        counts = {"B": len(mask), "G": len(microbatches), "n": len(log_probs), "N": minibatch_tokens}
        for framework, total in zip(frameworks, totals, strict=True):
            loss = framework.loss(log_probs, counts)
            gradient = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
            for one, more in zip(total, gradient, strict=True):
                one += more
    return [torch.cat([one.flatten() for one in total]) for total in totals]


def _where(row: Row) -> str:
    exact = row.exact_at
    if len(exact) == len(row.measured):
        return "every G"
    return f"G = {', '.join(map(str, exact))} only" if exact else "no G"


def _html_note(row: Row) -> str:
    links = [f'<a href="{escape(url)}">{escape(_link_text(url))}</a>' for url in row.framework.sources]
    return f"<li><b>{escape(row.framework.name)}</b>: {escape(row.framework.note)} {', '.join(links)}</li>"


def _link_text(url: str) -> str:
    """The name of a file; else what it is, and its name or number."""
    *_, folder, name = url.split("/")
    return name if name.endswith(".py") else f"{folder} {name}"
