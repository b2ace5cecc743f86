"""Every intermediate value of one step, and its gradient, by name.

A tap is an identity function: the step calls `tap(name, value)` and goes on with what comes back. `no_tap` returns the
value and costs nothing to speak of; a `Trace` keeps a copy and asks autograd for the gradient.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch

from sft_edu.digits import compact, fixed

STAGES = ("policy_log_probs", "response_mask", "num_tokens", "masked_sum", "loss", "scaled_loss", "returned_loss")
"""The tensors a step taps: its two inputs, then steps 1 to 4 and 6 of the course notes. Step 5 is the backward pass,
whose result is `Trace.grad("policy_log_probs")`. One more tap, "scaling", names the rule and its counts."""


class Tap(Protocol):
    """Called with the name and the value at each stage; returns the value."""

    def __call__(self, name: str, value: Any) -> Any: ...


def no_tap(name: str, value: Any) -> Any:
    """The tap that does nothing.

    Args:
        name: of the value, one of the names that `Trace` knows.
        value: anything; it comes back as it is.
    """
    return value


class Row(NamedTuple):
    """One line of the table: `value` and `gradient` are detached copies, None where there is none."""

    step: str
    name: str
    symbol: str
    formula: str
    value: torch.Tensor | None
    gradient: torch.Tensor | None


class Trace:
    """Records one step. Use: `trace = Trace(); sft_microbatch_train_step(..., tap=trace); print(trace)`.

    `trace["masked_sum"]` is a value, `trace.grad("masked_sum")` the gradient of the scaled loss with respect to it.
    Names are those of `STAGES`. The gradient of `policy_log_probs` is that of this step alone, also when `.grad` has
    accumulated others or, because the log-probs are not a leaf, is None. A second step overwrites the first.
    """

    def __init__(self) -> None:
        self._clear()

    def __call__(self, name: str, value: Any) -> Any:
        if name in self._values:
            self._clear()
        if not isinstance(value, torch.Tensor):
            self._values[name] = value
            return value
        self._values[name] = value.detach().clone()
        if not value.requires_grad:
            return value
        # A view has its own node in the graph, so that the hook ends with this graph. On a leaf it would stay for good.
        value, gradients = value.view_as(value), self._gradients
        value.register_hook(lambda gradient: gradients.__setitem__(name, gradient.detach().clone()))
        return value

    def __getitem__(self, name: str) -> torch.Tensor:
        """The value of a stage; that of `backward` is the gradient of `policy_log_probs`."""
        if name == "backward":
            return self.grad("policy_log_probs")
        return self._look_up(self._values, name, "value")

    def grad(self, name: str) -> torch.Tensor:
        """d scaled_loss / d `name`, of the shape of `trace[name]`."""
        return self._look_up(self._gradients, name, "gradient")

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows())

    def rows(self) -> list[Row]:
        """The inputs and the six steps of the course notes, in order. Empty before a step has run."""
        if "returned_loss" not in self._values:
            return []
        formulas = _formulas(self)
        return [
            Row(step, name, symbol, formulas[name], self._values.get(name), self._gradients.get(name))
            if name != "backward"
            else Row(step, name, symbol, formulas[name], self._gradients["policy_log_probs"], None)
            for step, name, symbol in _TABLE
        ]

    def __repr__(self) -> str:
        rows = self.rows()
        if not rows:
            return "Trace: no step recorded yet; pass it to one as tap=trace"
        cells = [_HEADER, *([*row[:4], _short(row.value), _short(row.gradient)] for row in rows)]
        widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADER))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
        lines.insert(1, "  ".join("-" * width for width in widths))
        lines += [f"\n{title}\n{_matrix(value)}" for title, value in self._matrices()]
        return "\n".join(line.rstrip() for line in "\n".join(lines).splitlines())

    def _repr_html_(self) -> str:
        rows = [[*row[:4], _short(row.value), _short(row.gradient)] for row in self.rows()]
        if not rows:
            return f"<p>{html.escape(repr(self))}</p>"
        head = "".join(f'<th scope="col" {_CELL_STYLE}>{html.escape(cell)}</th>' for cell in _HEADER)
        body = "".join(
            "<tr>" + "".join(f"<td {_CELL_STYLE}>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
        )
        matrices = "".join(
            f"<p>{html.escape(title)}</p><pre>{html.escape(_matrix(value))}</pre>" for title, value in self._matrices()
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{matrices}"

    def _matrices(self) -> list[tuple[str, torch.Tensor]]:
        """The inputs and the gradient in full, where they are small enough to read."""
        log_probs = self._values["policy_log_probs"]
        if log_probs.shape[0] > 8 or log_probs.shape[1] > 12:
            return []
        return [
            ("policy_log_probs", log_probs),
            ("response_mask", self._values["response_mask"]),
            ("gradient of policy_log_probs", self._gradients["policy_log_probs"]),
        ]

    def _clear(self) -> None:
        self._values: dict[str, Any] = {}
        self._gradients: dict[str, torch.Tensor] = {}

    def _look_up(self, found: dict[str, torch.Tensor], name: str, what: str) -> torch.Tensor:
        if name not in found:
            raise KeyError(f"{name}: no such {what} in this trace; it has {', '.join(found) or 'none yet'}")
        return found[name]


_HEADER = ("step", "name", "symbol", "formula", "value", "gradient")
_CELL_STYLE = 'style="text-align: left; white-space: nowrap"'
_TABLE = (
    ("in", "policy_log_probs", "log p"),
    ("in", "response_mask", "m"),
    ("1", "num_tokens", "n"),
    ("2", "masked_sum", "S"),
    ("3", "loss", "L"),
    ("4", "scaled_loss", "ℓ"),
    ("5", "backward", "∂ℓ/∂log p"),
    ("6", "returned_loss", "ℓ"),
)


def _formulas(trace: Trace) -> dict[str, str]:
    """The formula of each stage with the numbers put in."""
    rule, counts = trace["scaling"]
    masked_sum, loss = _number(trace["masked_sum"]), _number(trace["loss"])
    per_sequence = (trace["response_mask"] != 0).sum(1).tolist()
    tokens = " + ".join(map(str, per_sequence)) if len(per_sequence) <= 8 else f"over {len(per_sequence)} sequences"
    constant = _number(counts["c"])
    total = _number(trace["masked_sum"] * counts["c"])
    first = ("-S", f"-({masked_sum})") if rule.uses_constant else ("-c·S", f"-({constant} · {masked_sum})")
    return {
        "policy_log_probs": "log p(label | tokens before it)",
        "response_mask": "1 response, 0 prompt or padding",
        "num_tokens": f"Σ m = {tokens}",
        "masked_sum": f"Σ m·log p / c = {total} / {constant}",
        "loss": f"{first[0]} / {rule.first} = {first[1]} / {_number(counts[rule.first])}",
        "scaled_loss": f"L / {rule.second} = {loss} / {_number(counts[rule.second])}",
        "backward": f"-m / {rule.after_slash} = -m / {_number(rule.denominator(counts))}",
        "returned_loss": "ℓ without its graph",
    }


def explain_gradient(trace: Trace, row: int, column: int) -> tuple[str, torch.Tensor]:
    """Where the gradient of one token comes from: a product of one factor for each operation of the step.

    Returns:
        The product with its numbers put in, and its value, 0-dim. Rebuilt in the order of autograd, it equals
        `trace.grad("policy_log_probs")[row, column]` to the last bit on the CPU.
    """
    rule, counts = trace["scaling"]
    first, second = rule.divisors(counts)
    value = torch.ones_like(trace["masked_sum"]) / second / first * -1 / counts["c"]
    is_selected = int(trace["response_mask"][row, column] != 0)
    first_symbol = rule.first if rule.uses_constant else f"({rule.first}/c)"
    divisors = ((rule.second, second), (first_symbol, first), ("c", counts["c"]))
    symbols = " × ".join(f"1/{symbol}" for symbol, _ in divisors)
    numbers = " × ".join(f"1/{_number(divisor)}" for _, divisor in divisors)
    product = (value * is_selected + 0.0).to(trace["policy_log_probs"].dtype)
    return f"-1 × mask × {symbols} = -1 × {is_selected} × {numbers} = {fixed(product.item())}", product


def _number(value: float | torch.Tensor) -> str:
    return compact(value.item() if isinstance(value, torch.Tensor) else value)


def _short(value: torch.Tensor | None) -> str:
    """A number, or the shape and range of a matrix."""
    if value is None:
        return "-"
    if value.ndim == 0:
        return fixed(value.item()) if value.is_floating_point() else _number(value)
    low, high = value.min(), value.max()
    return f"{list(value.shape)} {_number(low)} to {_number(high)}"


def _matrix(value: torch.Tensor) -> str:
    """Rows of aligned numbers."""
    cells = [[fixed(x) if value.is_floating_point() else str(int(x)) for x in row] for row in value.tolist()]
    width = max(len(cell) for row in cells for cell in row)
    return "\n".join("  ".join(cell.rjust(width) for cell in row) for row in cells)
