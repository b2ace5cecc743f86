"""Call somebody else's step and watch: what reached `.grad`, what came back, what was changed.

Nothing here judges. A call never raises but for KeyboardInterrupt, and leaves the process as it was (see
`global_state.py`); what the step prints goes nowhere.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from sft_edu.audit.probe_cases import Case
from sft_edu.global_state import plain_settings

_TOKEN_NAMES = ("minibatch_tokens", "num_items_in_batch")
_LONGEST_TEXT = 200
_MOST_CONTAINERS = 1000  # looked at in what a step returns; it may contain itself


class Form(NamedTuple):
    """How a step wants to be called.

    `constant` is "position", "keyword" or "" where it takes none; `tokens` the keyword for N or "". With `is_leaf` the
    log-probs are themselves the leaf, otherwise they are computed from it, as a model does.
    """

    constant: str
    may_omit_constant: bool
    tokens: str
    dtype: torch.dtype
    mask_dtype: torch.dtype
    is_leaf: bool = True


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one call did.

    `gradient` `[B, T]` is `.grad` of the leaf afterwards, None if there is none. `accumulated` has what `.grad` was
    after each time that autograd itself added to it. `loss` is None if no number came back, and `returned` says what
    did. `attached` names the returned tensors that still have a graph, the loss as "loss". `changed` names the
    arguments that the step changed. Where it raised, `error` says what, and all else is empty.
    """

    error: str = ""
    gradient: torch.Tensor | None = None
    accumulated: tuple[torch.Tensor, ...] = ()
    loss: float | None = None
    returned: str = ""
    attached: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()


@dataclass
class Probe:
    """A step, the form of call that it accepts, and how often it was called."""

    step: Callable[..., object]
    form: Form | None = None
    calls: int = field(default=0, init=False)

    def fit(self, case: Case) -> Outcome:
        """Find the first form in which the step does not raise, and return what it did. The first error if none."""
        errors = []
        for form in _forms(self.step):
            outcome = self._call(form, case)
            if not outcome.error:
                self.form = form
                return outcome
            errors.append(outcome)
        return errors[0]

    def __call__(self, case: Case, earlier: torch.Tensor | None = None, from_parameter: bool = False) -> Outcome:
        """One call in the form that fits. `earlier` is in `.grad` before; `from_parameter` makes it no leaf."""
        return self._call(self.form._replace(is_leaf=self.form.is_leaf and not from_parameter), case, earlier)

    def _call(self, form: Form, case: Case, earlier: torch.Tensor | None = None) -> Outcome:
        self.calls += 1
        leaf = case.log_probs.to(form.dtype, copy=True).requires_grad_()
        leaf.grad = None if earlier is None else earlier.to(form.dtype, copy=True)
        accumulated: list[torch.Tensor] = []
        leaf.register_post_accumulate_grad_hook(lambda tensor: accumulated.append(tensor.grad.detach().clone()))
        given = leaf if form.is_leaf else leaf.clone()
        mask = case.mask.to(form.mask_dtype, copy=True)
        arguments, keywords = _arguments(form, case)
        with plain_settings():
            try:
                result = self.step(given, mask, *arguments, **keywords)
                return Outcome(
                    gradient=None if leaf.grad is None else leaf.grad.detach().to_dense().double().clone(),
                    accumulated=tuple(gradient.to_dense().double() for gradient in accumulated),
                    changed=tuple(_changed(form, case, given, mask)),
                    **_read(result),
                )
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # SystemExit too: no step may end the audit
                return Outcome(error=describe(error))


def describe(error: BaseException) -> str:
    """An exception in one line of printable text."""
    try:
        text, kind = str(error), type(error).__name__
        return printable(f"{kind}: {text}" if text else kind)
    except KeyboardInterrupt:
        raise
    except BaseException:
        return "an exception whose own text cannot be read"


def name_of(function: Callable[..., object]) -> str:
    """The name of a function, of what a partial calls, or of an object's class, in one line of printable text."""
    try:
        named = function if hasattr(function, "__name__") else getattr(function, "func", function)
        return printable(str(getattr(named, "__name__", type(named).__name__)))
    except KeyboardInterrupt:
        raise
    except BaseException:
        return "a function whose name cannot be read"


def printable(text: str) -> str:
    """One line: white space becomes a space, and what does not print, or would change its direction, is escaped."""
    text = " ".join(text[:10_000].split())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 1] + "…"


def _forms(step: Callable) -> Iterator[Form]:
    """Every way to call the step that its signature allows, the likeliest first."""
    parameters = _parameters(step)
    constants, tokens = _ways_to_give_constant(parameters), _names_for_tokens(parameters)
    masks = (torch.bool, torch.int64, None)  # None: the dtype of the log-probs
    for is_leaf, dtype in itertools.product((True, False), (torch.float64, torch.float32)):
        for (way, may_omit), name, mask in itertools.product(constants, tokens, masks):
            yield Form(way, may_omit, name, dtype, mask or dtype, is_leaf)


def _parameters(step: Callable) -> list[inspect.Parameter]:
    """Of its signature; where there is none to be had, that of a function that takes anything by position."""
    try:
        return list(inspect.signature(step).parameters.values())
    except KeyboardInterrupt:
        raise
    except BaseException:  # built-in, scripted, or hostile
        return [inspect.Parameter("arguments", inspect.Parameter.VAR_POSITIONAL)]


def _ways_to_give_constant(parameters: list[inspect.Parameter]) -> list[tuple[str, bool]]:
    """`Form.constant` and `Form.may_omit_constant`. Several ways where the signature does not say."""
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(by_position) > 3 and _is_constant(by_position[3]):
        # One with a default may still be something else than c.
        has_default = by_position[3].default is not inspect.Parameter.empty
        return [("position", True), ("", False)] if has_default else [("position", False)]
    for parameter in parameters:
        if parameter.name == "normalize_constant" and parameter.kind != parameter.POSITIONAL_ONLY:
            return [("keyword", parameter.default is not inspect.Parameter.empty)]
    takes_any = any(p.kind == p.VAR_POSITIONAL for p in parameters)
    return [("position", False), ("", False)] if takes_any else [("", False)]


def _names_for_tokens(parameters: list[inspect.Parameter]) -> list[str]:
    """The keywords to try for N. Where any keyword is taken, all of them, and then none."""
    named = [
        p.name for p in parameters if p.name in _TOKEN_NAMES and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters)
    return named[:1] or ([*_TOKEN_NAMES, ""] if takes_any else [""])


def _is_constant(parameter: inspect.Parameter) -> bool:
    """Whether the fourth parameter takes a number: `normalize_constant` by this or another name."""
    if parameter.name in _TOKEN_NAMES:
        return False
    default = parameter.default
    return default is parameter.empty or default is None or type(default) in (int, float)


def _arguments(form: Form, case: Case) -> tuple[list[float], dict[str, float]]:
    """What follows log-probs and mask."""
    arguments: list[float] = [case.steps]
    keywords = {form.tokens: case.minibatch_tokens} if form.tokens else {}
    if case.constant is not None and form.constant == "position":
        arguments.append(case.constant)
    elif case.constant is not None and form.constant == "keyword":
        keywords["normalize_constant"] = case.constant
    return arguments, keywords


def _changed(form: Form, case: Case, given: torch.Tensor, mask: torch.Tensor) -> Iterator[str]:
    same = given.dtype == form.dtype and torch.equal(given.detach(), case.log_probs.to(form.dtype))
    if not (same and given.requires_grad):
        yield "policy_log_probs"
    if mask.dtype != form.mask_dtype or not torch.equal(mask.detach(), case.mask.to(form.mask_dtype)):
        yield "response_mask"


def _read(result: object) -> dict[str, object]:
    """The loss, what it is, and which returned tensors still have a graph."""
    if isinstance(result, Mapping):
        loss, rest = result.get("loss"), {name: value for name, value in result.items() if name != "loss"}
    elif isinstance(result, tuple | list) and result:
        loss, rest = result[0], result[1] if len(result) == 2 else list(result[1:])
    else:
        loss, rest = result, None
    attached = ["loss"] if _is_attached(loss) else []
    return {
        "loss": _number(loss),
        "returned": printable(_kind(loss)),
        "attached": (*attached, *(printable(name) for name in _attached(rest, "", set()))),
    }


def _number(loss: object) -> float | None:
    if isinstance(loss, bool | complex) or loss is None or not hasattr(loss, "__float__"):
        return None
    if isinstance(loss, torch.Tensor):
        return float(loss.detach()) if loss.numel() == 1 else None
    return float(loss)


def _kind(value: object) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def _is_attached(value: object) -> bool:
    return isinstance(value, torch.Tensor) and (value.requires_grad or value.grad_fn is not None)


def _attached(value: object, name: str, seen: set[int]) -> Iterator[str]:
    """The places of tensors with a graph, such as `masked_sum` or `parts[1]`."""
    if _is_attached(value):
        yield name or "result 2"
    elif not isinstance(value, Mapping | tuple | list) or id(value) in seen or len(seen) > _MOST_CONTAINERS:
        return
    elif isinstance(value, Mapping):
        seen.add(id(value))
        for key, inner in itertools.islice(value.items(), _MOST_CONTAINERS):
            yield from _attached(inner, f"{name}.{key}" if name else str(key), seen)
    else:
        seen.add(id(value))
        for index, inner in enumerate(value[:_MOST_CONTAINERS]):
            yield from _attached(inner, f"{name}[{index}]" if name else f"result {index + 2}", seen)
