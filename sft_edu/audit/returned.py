"""What a step gave back: its loss, and whatever else in there still has a graph."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import NamedTuple

import torch
from torch import nn

from sft_edu.audit.words import printable

_MOST = 1000  # containers, and values in each, that are looked at; one may contain itself
_OPAQUE = (type, ModuleType, FunctionType, nn.Module, nn.Parameter, torch.optim.Optimizer)
"""Not looked into: a model's parameters require grad, and hold no graph."""
_LOSS_ELSEWHERE = 'metadata["loss"]'


class Returned(NamedTuple):
    """The loss as a number, None if it is none; what came back, in words; the places of tensors with a graph.

    Of these, "loss" is the one that was returned as the loss, or if there was none, the one of that name.
    """

    loss: float | None
    returned: str
    attached: tuple[str, ...]


def read(result: object) -> Returned:
    """What a step returned. Never raises but for KeyboardInterrupt: an object may raise when it is looked at."""
    loss, rest = None, None
    with _suppressed():
        loss, rest = _loss_and_rest(result)
    number, words = None, "an object that cannot be read"
    with _suppressed():
        number = _number_of(loss)
    with _suppressed():
        is_missing = loss is None and isinstance(result, Mapping)
        words = 'a dict without the key "loss"' if is_missing else _what_it_is(loss)
    return Returned(number, words, _attached_in(loss, rest))


@contextmanager
def _suppressed() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException:  # SystemExit too
        return


def _loss_and_rest(result: object) -> tuple[object, object]:
    """What is returned first, or as "loss" of a dict, a dataclass or a namedtuple, and what else."""
    if isinstance(result, Mapping):
        return result.get("loss"), {name: value for name, value in result.items() if name != "loss"}
    if not isinstance(result, torch.Tensor) and hasattr(result, "loss"):
        return result.loss, {name: value for name, value in _inside(result, "") if name != "loss"}
    if isinstance(result, tuple | list) and result:
        return result[0], result[1] if len(result) == 2 else list(result[1:])
    return result, None


def _number_of(loss: object) -> float | None:
    if isinstance(loss, bool | complex) or loss is None or not hasattr(loss, "__float__"):
        return None
    if isinstance(loss, torch.Tensor):
        return float(loss.detach()) if loss.numel() == 1 else None
    return float(loss)


def _what_it_is(value: object) -> str:
    """In words, for a loss that is no number."""
    return printable(f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else _kind(value))


def _attached_in(loss: object, rest: object) -> tuple[str, ...]:
    """The places of tensors with a graph, such as `loss`, `masked_sum` or `parts[1]`, each once.

    Looked into are mappings, sequences, sets, and the attributes of objects: dataclasses, namedtuples and others.
    """
    found = ["loss"] if _has_graph(loss) else []
    with _suppressed():  # what was found before counts
        for place in map(printable, _attached(rest, "", set())):
            found.append(_LOSS_ELSEWHERE if place == "loss" and loss is not None else place)
    return tuple(dict.fromkeys(found))


def _kind(value: object) -> str:
    return type(value).__name__


def _has_graph(value: object) -> bool:
    return isinstance(value, torch.Tensor) and (value.requires_grad or value.grad_fn is not None)


def _attached(value: object, name: str, seen: set[int]) -> Iterator[str]:
    if isinstance(value, _OPAQUE) or id(value) in seen or len(seen) > _MOST:
        return
    if isinstance(value, torch.Tensor | torch.autograd.graph.Node):
        if _has_graph(value) or not isinstance(value, torch.Tensor):
            yield name or "result 2"
        return
    seen.add(id(value))
    for inner_name, inner in itertools.islice(_inside(value, name), _MOST):
        yield from _attached(inner, inner_name, seen)


def _inside(value: object, name: str) -> Iterator[tuple[str, object]]:
    """What a value holds, each with its place."""
    if isinstance(value, Mapping):
        yield from ((f"{name}.{key}" if name else str(key), inner) for key, inner in value.items())
    elif isinstance(value, tuple | list | deque):
        names = getattr(value, "_fields", None) or itertools.repeat(None)
        for index, (field, inner) in enumerate(zip(names, value, strict=False)):
            place = f"{name}.{field}" if name else field
            yield (place if field else f"{name}[{index}]" if name else f"result {index + 2}"), inner
    elif isinstance(value, Set):
        yield from ((name or "a set", inner) for inner in value)
    elif not isinstance(value, str | bytes | int | float | None):
        slots = [slot for kind in type(value).__mro__ for slot in _names_of_slots(kind)]
        attributes = {slot: getattr(value, slot) for slot in slots if hasattr(value, slot)}
        attributes |= getattr(value, "__dict__", {})
        yield from ((f"{name}.{key}" if name else str(key), inner) for key, inner in attributes.items())


def _names_of_slots(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)
