"""How does somebody's step want to be called? Read from its signature, and tried where that does not say."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from sft_edu.audit.probe_cases import Case

_NAMES = (
    ("policy_log_probs", "log_probs", "logprobs", "logps"),
    ("response_mask", "mask", "loss_mask"),
    ("gradient_accumulation_steps", "grad_accum_steps", "accumulation_steps", "num_microbatches", "steps", "G"),
)
"""What people call log-probs, mask and G; the first is the contract's name."""

_CONSTANT_NAMES = ("normalize_constant", "constant", "norm_constant", "c")
_TOKEN_NAMES = ("minibatch_tokens", "num_items_in_batch")

Parameters = Sequence[inspect.Parameter]


class Form(NamedTuple):
    """How a step wants to be called.

    `names` has the keywords of log-probs, mask and G, "" for each that goes by position. `constant` is "position", a
    keyword, or "" where it takes none; `tokens` the keyword for N or "", given as an int or as a 0-dim int64 tensor.
    With `is_leaf` the log-probs are themselves the leaf, otherwise they are computed from it, as a model does.
    """

    names: tuple[str, str, str]
    constant: str
    may_omit_constant: bool
    tokens: str
    tokens_as_tensor: bool
    dtype: torch.dtype
    mask_dtype: torch.dtype
    is_leaf: bool = True

    def call(self, step: Callable, log_probs: torch.Tensor, mask: torch.Tensor, case: Case) -> object:
        """What the step returns."""
        arguments, keywords = [], {}
        constant = "" if self.constant == "position" else self.constant
        named = [*zip(self.names, (log_probs, mask, case.steps), strict=True)]
        named += [(constant, case.constant)] if self.constant and case.constant is not None else []
        for name, value in named:
            if name:
                keywords[name] = value
            else:
                arguments.append(value)
        if self.tokens:
            tokens = case.minibatch_tokens
            keywords[self.tokens] = torch.tensor(tokens) if self.tokens_as_tensor else tokens
        return step(*arguments, **keywords)


def forms(step: Callable) -> Iterator[Form]:
    """Every way to call the step that its signature allows, the likeliest first."""
    parameters = _parameters(step)
    names = _names(parameters)
    constants = _ways_to_give_constant(parameters, names)
    tokens = [
        (name, is_tensor) for name in _token_names(parameters) for is_tensor in (False, True) if name or not is_tensor
    ]
    masks = (torch.bool, torch.int64, None)  # None: the dtype of the log-probs
    for is_leaf, dtype in itertools.product((True, False), (torch.float64, torch.float32)):
        for (way, may_omit), (name, is_tensor), mask in itertools.product(constants, tokens, masks):
            yield Form(names, way, may_omit, name, is_tensor, dtype, mask or dtype, is_leaf)


def _parameters(step: Callable) -> Parameters:
    """Of its signature; where there is none to be had, that of a function that takes anything by position."""
    try:
        return list(inspect.signature(step).parameters.values())
    except KeyboardInterrupt:
        raise
    except BaseException:  # built-in, scripted, or hostile
        return [inspect.Parameter("arguments", inspect.Parameter.VAR_POSITIONAL)]


def _names(parameters: Parameters) -> tuple[str, str, str]:
    """`Form.names`: by position where that is possible, unless the names stand in another order."""
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    by_name = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    known = [next((name for name in names if name in by_name), "") for names in _NAMES]
    if len(positional) >= 3 or _takes(parameters, inspect.Parameter.VAR_POSITIONAL):
        in_order = not all(known) or known == positional[:3]
        return ("", "", "") if in_order else tuple(known)
    if not by_name:
        only_by_position = len(positional)
        return tuple("" if place < only_by_position else names[0] for place, names in enumerate(_NAMES))
    # Some only by name. Those with unknown names are taken in the order in which they stand.
    by_position = [name for name in positional if name not in by_name]
    others = iter([name for name in by_name if name not in (*known, *_CONSTANT_NAMES, *_TOKEN_NAMES)])
    takes_any = _takes(parameters, inspect.Parameter.VAR_KEYWORD)
    rest = (name or next(others, names[0] if takes_any else "") for name, names in zip(known, _NAMES, strict=True))
    return tuple("" if place < len(by_position) else name for place, name in enumerate(rest))


def _ways_to_give_constant(parameters: Parameters, names: tuple[str, str, str]) -> list[tuple[str, bool]]:
    """`Form.constant` and `Form.may_omit_constant`. Several ways where the signature does not say."""
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    for parameter in parameters:
        if parameter.name in _CONSTANT_NAMES and parameter.kind != parameter.POSITIONAL_ONLY and _is_number(parameter):
            is_fourth = not any(names) and by_position[3:4] == [parameter]
            return _with_and_without("position" if is_fourth else parameter.name, parameter)
    if any(names):
        return _unnamed_constant(parameters, names)
    if len(by_position) > 3 and _is_number(by_position[3]):
        return _with_and_without("position", by_position[3])
    takes_any = _takes(parameters, inspect.Parameter.VAR_POSITIONAL)
    return [("position", False), ("", False)] if takes_any else [("", False)]


def _unnamed_constant(parameters: Parameters, names: tuple[str, str, str]) -> list[tuple[str, bool]]:
    """Where log-probs, mask and G go by name, another one that has to be given can only be the constant."""
    for parameter in parameters:
        has_to_be_given = parameter.kind == parameter.KEYWORD_ONLY and parameter.default is parameter.empty
        if has_to_be_given and parameter.name not in (*names, *_TOKEN_NAMES):
            return [(parameter.name, False)]
    takes_any = _takes(parameters, inspect.Parameter.VAR_KEYWORD)
    return [(_CONSTANT_NAMES[0], True), ("", False)] if takes_any else [("", False)]


def _with_and_without(way: str, parameter: inspect.Parameter) -> list[tuple[str, bool]]:
    """One with a default may still be something else than c."""
    return [(way, False)] if parameter.default is parameter.empty else [(way, True), ("", False)]


def _token_names(parameters: Parameters) -> list[str]:
    """The keywords to try for N. Where any keyword is taken, all of them, and then none."""
    named = [
        p.name for p in parameters if p.name in _TOKEN_NAMES and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    takes_any = _takes(parameters, inspect.Parameter.VAR_KEYWORD)
    return named[:1] or ([*_TOKEN_NAMES, ""] if takes_any else [""])


def _takes(parameters: Parameters, kind: object) -> bool:
    """Whether there is a `*arguments` or a `**keywords` among them."""
    return any(parameter.kind == kind for parameter in parameters)


def _is_number(parameter: inspect.Parameter) -> bool:
    """Whether the fourth parameter takes a number: `normalize_constant` by another name."""
    if parameter.name in _TOKEN_NAMES:
        return False
    default = parameter.default
    return default is parameter.empty or default is None or type(default) in (int, float)
