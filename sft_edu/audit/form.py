"""How does somebody's step want to be called? Read from its signature, and tried where that does not say.

One rule: parameters are known by their names. One whose name is not known is taken by its place if it has to be given,
and left alone if it has a default.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from sft_edu.audit.probe_cases import Case

_STEPS = (
    *("gradient_accumulation_steps", "grad_accumulation_steps", "grad_accum_steps", "grad_acc_steps", "ga_steps"),
    *("accumulation_steps", "accum_steps", "acc_steps", "num_accumulation_steps"),
    *("gradient_accumulation", "grad_accum"),
    *("num_microbatches", "num_micro_batches", "n_microbatches", "steps", "num_steps", "G", "g"),
)
_NAMES = {
    "log_probs": ("policy_log_probs", "log_probs", "logprobs", "logps", "logp", "policy_logprobs", "token_log_probs"),
    "mask": ("response_mask", "mask", "loss_mask", "completion_mask", "response_masks"),
    "steps": _STEPS,
    "constant": ("normalize_constant", "constant", "norm_constant", "normalizer", "c"),
    "tokens": (
        *("minibatch_tokens", "num_items_in_batch", "total_tokens", "num_tokens", "n_tokens", "total_num_tokens"),
        *("token_count", "total_token_count", "N"),
    ),
}
"""What people call log-probs, mask, G, c and N; the first is the name in the contract."""

_NEEDED = ("log_probs", "mask", "steps")
_BY_PLACE = (*_NEEDED, "constant")
_LOOP_NAMES = {"model", "microbatches", "micro_batches", "minibatch", "minibatches", "batches", "dataloader", "loader"}

Parameters = Sequence[inspect.Parameter]


class Given(NamedTuple):
    """What an argument is, a key of `_NAMES`, and the keyword it goes by, "" where it can go by position alone."""

    what: str
    keyword: str
    by_position: bool


class Form(NamedTuple):
    """How a step wants to be called: its arguments in order, and their dtypes.

    `constant` is the parameter that is c, whether it is given or not, None where the signature has none. N is given as
    an int or as a 0-dim int64 tensor. With `is_leaf` the log-probs are themselves the leaf, otherwise they are computed
    from it, as a model does.
    """

    given: tuple[Given, ...]
    constant: inspect.Parameter | None
    tokens_as_tensor: bool
    dtype: torch.dtype
    mask_dtype: torch.dtype
    is_leaf: bool = True

    def takes(self, what: str) -> bool:
        return any(one.what == what for one in self.given)

    @property
    def may_omit_constant(self) -> bool:
        """It is given, and might be left to its default."""
        by_any_name = self.constant is None and any(one.what == "constant" and one.keyword for one in self.given)
        return self.takes("constant") and (by_any_name or _has_default(self.constant))

    @property
    def default_constant(self) -> float | None:
        """What the signature says that c is where it is left out, None where it does not say a number."""
        default = self.constant.default if self.constant is not None else None
        return float(default) if type(default) in (int, float) else None

    def call(self, step: Callable, log_probs: torch.Tensor, mask: torch.Tensor, case: Case) -> object:
        """What the step returns."""
        tokens = torch.tensor(case.minibatch_tokens) if self.tokens_as_tensor else case.minibatch_tokens
        values = {
            "log_probs": log_probs,
            "mask": mask,
            "steps": case.steps,
            "constant": case.constant,
            "tokens": tokens,
        }
        given = self.given if case.constant is not None else _without(self.given, "constant")
        arguments = [values[one.what] for one in given if one.by_position]
        return step(*arguments, **{one.keyword: values[one.what] for one in given if not one.by_position})


def forms(step: Callable) -> Iterator[Form]:
    """Every way to call the step that its signature allows, the likeliest first."""
    parameters = _parameters(step)
    assigned = _assigned(parameters)
    constant = next((p for p in parameters if assigned.get(p.name) == "constant"), None)
    ways = _ways(parameters, assigned, _has_default(constant))
    masks = (torch.bool, torch.int64, None)  # None: the dtype of the log-probs
    for is_leaf, dtype in itertools.product((True, False), (torch.float64, torch.float32)):
        for given, mask in itertools.product(ways, masks):
            for as_tensor in (False, True) if any(one.what == "tokens" for one in given) else (False,):
                yield Form(given, constant, as_tensor, dtype, mask or dtype, is_leaf)


def unknown(step: Callable) -> str:
    """Why a step cannot be called with what a step is given, in words; "" if nothing speaks against it."""
    parameters = _parameters(step)
    names = [p.name for p in parameters if not _takes_any(p) and not _has_default(p)]
    if _LOOP_NAMES & {*names}:
        return " It looks like a whole loop: audit_accumulation is for those."
    assigned = _assigned(parameters)
    rest = [name for name in names if name not in assigned]
    wrap = "wrap the step in a function of log-probs, mask, G and c"
    return f" It has to be given {' and '.join(rest)}, too: {wrap}." if rest else ""


def _parameters(step: Callable) -> Parameters:
    """Of its signature; where there is none to be had, that of a function that takes anything by position."""
    try:
        return list(inspect.signature(step).parameters.values())
    except KeyboardInterrupt:
        raise
    except BaseException:  # built-in, scripted, or hostile
        return [inspect.Parameter("arguments", inspect.Parameter.VAR_POSITIONAL)]


def _assigned(parameters: Parameters) -> dict[str, str]:
    """What each parameter is, by name; those that are left alone are not in it."""
    names = [p.name for p in parameters if not _takes_any(p) and _may_be_number(p)]
    found = {what: next((name for name in known if name in names), None) for what, known in _NAMES.items()}
    by_name = {name: what for what, name in found.items() if name is not None}
    others = [p.name for p in parameters if not (_takes_any(p) or _has_default(p) or p.name in by_name)]
    return by_name | dict(zip(others, [what for what in _BY_PLACE if found[what] is None], strict=False))


def _ways(parameters: Parameters, assigned: dict[str, str], may_omit_constant: bool) -> list[tuple[Given, ...]]:
    """The arguments to give, the likeliest way first. Several where c has a default, or where anything is taken."""
    given, in_order = [], True
    for parameter in parameters:
        if parameter.name in assigned:
            in_order = in_order and parameter.kind != parameter.KEYWORD_ONLY
            given.append(Given(assigned[parameter.name], parameter.name, in_order))
        elif not _takes_any(parameter):
            in_order = False
    missing = [what for what in _NEEDED if what not in assigned.values()]
    more = ["constant"] if missing and "constant" not in assigned.values() else []
    takes_any_place, takes_any_name = (
        any(p.kind == kind for p in parameters)
        for kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    )
    if takes_any_place and in_order:
        given += [Given(what, "", True) for what in (*missing, *more)]
    elif takes_any_name:
        given += [Given(what, _NAMES[what][0], False) for what in (*missing, *more)]
    may_drop = may_omit_constant or any(one.what in more for one in given)
    ways = [tuple(given), _without(given, "constant")] if may_drop else [tuple(given)]
    if takes_any_name and "tokens" not in assigned.values():
        names = (*_NAMES["tokens"][:2], "")
        return [(*way, *([Given("tokens", name, False)] if name else [])) for way in ways for name in names]
    return ways


def _without(given: Sequence[Given], what: str) -> tuple[Given, ...]:
    """Those before it as they were, those behind it by name."""
    place = next((place for place, one in enumerate(given) if one.what == what), len(given))
    return (*given[:place], *(one._replace(by_position=not one.keyword) for one in given[place + 1 :]))


def _may_be_number(parameter: inspect.Parameter) -> bool:
    """Something like `constant=False` is a switch, whatever its name."""
    return not (_has_default(parameter) and isinstance(parameter.default, bool | str))


def _has_default(parameter: inspect.Parameter | None) -> bool:
    return parameter is not None and parameter.default is not parameter.empty


def _takes_any(parameter: inspect.Parameter) -> bool:
    """Whether it is `*arguments` or `**keywords`."""
    return parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
