"""One microbatch under the hand: its tokens with their mask and gradients, and the six steps as a chain."""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets
import torch
import traitlets
from matplotlib.figure import Figure

from sft_edu.digits import fixed
from sft_edu.masks import token_roles
from sft_edu.plots import StepPicture
from sft_edu.step import sft_microbatch_train_step
from sft_edu.trace import Trace, explain_gradient
from sft_edu.widgets.lab import Lab, between
from sft_edu.widgets.stage_chain import StageChain
from sft_edu.widgets.step_view import describe, draw, stages
from sft_edu.widgets.token_mask import TokenMask

Matrix = tuple[tuple[float, ...], ...]


class MicrobatchLab(Lab):
    """A lab with one microbatch `[B, T]`. Subclasses add controls and words."""

    gradient_accumulation_steps = traitlets.Int(1)
    normalize_constant = traitlets.Float(1.0)
    rule = traitlets.Unicode("notes")
    # Not Any: that would let None pass without a check.
    mask = traitlets.TraitType(())
    log_probs = traitlets.TraitType(())

    def __init__(
        self, log_probs: torch.Tensor, mask: torch.Tensor, tokens: Sequence[Sequence[str]] | None, **settings: object
    ) -> None:
        self._shape = mask.shape
        self._roles = token_roles(mask != 0)
        self._tokens = tokens
        self._first_mask, self._first_log_probs = as_matrix(mask.int()), as_matrix(log_probs.detach().float())
        super().__init__(mask=self._first_mask, log_probs=self._first_log_probs, **settings)

    def reset(self) -> None:
        """Back to the settings with which the lab was made, and no step is selected."""
        with self._lock:
            self._chain.selected = ""
            super().reset()

    @property
    def num_tokens(self) -> int:
        """Ones in the mask."""
        return int(self._trace["num_tokens"])

    @property
    def loss(self) -> float:
        """What the step returned."""
        return float(self._trace["returned_loss"])

    @property
    def gradient(self) -> torch.Tensor:
        """d scaled_loss / d policy_log_probs, `[B, T]`."""
        return self._trace.grad("policy_log_probs")

    def figure(self) -> Figure:
        picture = StepPicture(self._roles, self._tokens)
        draw(picture, self._trace)
        return picture.figure

    def numbers(self) -> list[str]:
        return [describe(self._trace)]

    def _make(self) -> list[ipywidgets.Widget]:
        self._token_mask = TokenMask(self._texts(self._first_log_probs), self._first_mask, value_name="gradient")
        self._token_mask.observe(lambda change: self._by_hand("mask", change["new"]), "mask")
        self._token_mask.observe(self._explain, "focused")
        self._chain = StageChain()
        self._chain.observe(self._explain, "selected")
        return [self._token_mask, self._chain]

    def _texts(self, log_probs: Matrix) -> Sequence[Sequence[str]]:
        """What stands on the tokens: their text or, where there is none, their log-prob."""
        return self._tokens or [[f"{value:.1f}" for value in row] for row in log_probs]

    @traitlets.validate("gradient_accumulation_steps")
    def _check_steps(self, proposal) -> int:
        return between("gradient_accumulation_steps", proposal["value"], 1, 32)

    @traitlets.validate("mask")
    def _check_mask(self, proposal) -> Matrix:
        mask = _tensor("mask", proposal["value"], self._shape, "0 or 1")
        if not ((mask == 0) | (mask == 1)).all():
            raise traitlets.TraitError(f"mask: got {proposal['value']!r}; expected {list(self._shape)} values 0 or 1")
        return as_matrix(mask.int())

    @traitlets.validate("log_probs")
    def _check_log_probs(self, proposal) -> Matrix:
        log_probs = _tensor("log_probs", proposal["value"], self._shape, "up to 0")
        if not (torch.isfinite(log_probs) & (log_probs <= 0)).all():
            raise traitlets.TraitError(
                f"log_probs: got {proposal['value']!r}; expected {list(self._shape)} finite values up to 0"
            )
        return as_matrix(log_probs.float())

    def _compute(self) -> None:
        """One real step on a fresh leaf. For `token_mean`, the other microbatches hold as many tokens as this one."""
        mask, trace = torch.tensor(self.mask), Trace()
        sft_microbatch_train_step(
            torch.tensor(self.log_probs, dtype=torch.float32).requires_grad_(),
            mask,
            self.gradient_accumulation_steps,
            self.normalize_constant,
            rule=self.rule,
            minibatch_tokens=max(int(mask.sum()), 1) * self.gradient_accumulation_steps,
            tap=trace,
        )
        self._trace = trace

    def _show(self) -> None:
        with self._chain.hold_sync():
            self._chain.stages = stages(self._trace)
            self._chain.inputs = self._inputs()
            self._chain.words = self.words()
            self._chain.detail = self._detail()
            self._chain.drawn = self._drawn
        with self._token_mask.hold_sync():
            self._token_mask.mask = self.mask
            self._token_mask.values = self.gradient.tolist()
            self._token_mask.tokens = self._texts(self.log_probs)
            self._token_mask.notes = [[f"log p {value:.4f}" for value in row] for row in self.log_probs]

    def _inputs(self) -> dict[str, object]:
        """For a chain that is drawn ahead of the kernel: see `StageChain.inputs`."""
        return {}

    def _explain(self, change) -> None:
        with self._lock:
            if self._writing:
                return
            if change["name"] == "focused":
                self._chain.selected = ""  # who goes to a token wants to read about the token
            self._chain.detail = self._detail()

    def _detail(self) -> list[str]:
        """The chosen stage in full and, without one or where it is `backward`, the gradient of the token in focus."""
        chosen = {row.name: row for row in self._trace.rows()}.get(self._chain.selected)
        lines = [f"{chosen.name}, in symbols {chosen.symbol}", chosen.formula] if chosen else []
        if chosen is None or chosen.name == "backward":
            return [*lines, f"Gradient of token {list(self._token_mask.focused)}, the one in focus:", self._product()]
        if chosen.gradient is not None:
            lines.append(f"its gradient, d scaled_loss / d {chosen.name}: {fixed(chosen.gradient.item())}")
        return lines

    def _product(self) -> str:
        text, product = explain_gradient(self._trace, *self._token_mask.focused)
        arrived = self.gradient[tuple(self._token_mask.focused)]
        return f"{text}, and autograd gave {'the same' if product.equal(arrived) else fixed(arrived.item())}"


def as_matrix(tensor: torch.Tensor) -> Matrix:
    """A tensor as a value: equal matrices are equal, and nobody can change one from outside."""
    return tuple(tuple(row) for row in tensor.tolist())


def _tensor(name: str, value: object, shape: torch.Size, expected: str) -> torch.Tensor:
    try:
        # Default dtype and device are those of whoever sets it.
        tensor = torch.as_tensor(value, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise traitlets.TraitError(f"{name}: got {value!r}; expected {list(shape)} values {expected}") from error
    if tensor.shape != shape:
        raise traitlets.TraitError(f"{name}: got shape {list(tensor.shape)}; expected {list(shape)}")
    return tensor
