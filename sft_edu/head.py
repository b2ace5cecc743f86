"""Run a language model so that its head, the projection onto the vocabulary, is given some positions alone.

The model's own forward runs, whatever it is wrapped in and whatever it does with its logits; only what reaches the
head is shorter. So soft-capping, scaling, adapters, DDP and FSDP stay as they are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sft_edu.global_state import random_state_kept

_CUTS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Whether a model gives the same logits when its head is given fewer positions. Found out once for each."""


def logits_at(
    model: Callable[[torch.Tensor], object], input_ids: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, bool]:
    """The logits at some positions, if the model allows it, or else at all.

    The head is what `model.get_output_embeddings()` returns: Hugging Face models and `TinyLM` have it. It is given
    fewer positions if that has been seen to give the same logits: the first call runs the model twice on six tokens,
    without gradient, and compares. Random number generators are then as before, but hooks of the model are called. No
    positions are left out if there is no such method, if it is compiled, if its head is called more than once, or if
    the model does something to its logits that needs the others.

    Args:
        model: called as `model(input_ids)`; returns logits, or an object whose `.logits` they are. It must not run
            again in backward, as whole under activation checkpointing it would: only this call knows of the positions.
        input_ids: `[B, T]`, int64.
        rows: int64, `[n]`, positions in `input_ids.flatten()`, ascending, on the same device.

    Returns:
        The logits, and whether they are those at `rows`, `[1, n, V]`; else they are what the model gives.
    """
    inner: Any = model.module if isinstance(model, DistributedDataParallel) else model
    head = None if len(rows) == input_ids.numel() else _head(inner)
    if head is None or not _can_cut(inner, head, input_ids):
        return _logits(model(input_ids)), False
    with _cut(head, input_ids.shape, rows) as calls:
        logits = _logits(model(input_ids))
    return logits, bool(calls)


def selected_logits(
    model: Callable[[torch.Tensor], object], input_ids: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """The logits at some positions and no others, `[n, V]`; see `logits_at`."""
    logits, only_rows = logits_at(model, input_ids, rows)
    logits = logits.flatten(0, 1)
    return logits if only_rows else logits[rows]


def _logits(output: Any) -> Any:
    return getattr(output, "logits", output)


def _head(model: Any) -> nn.Module | None:
    is_compiled = hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None
    if not isinstance(model, nn.Module) or is_compiled:  # a compiled model may not see a hook that comes later
        return None
    with suppress(AttributeError, NotImplementedError):
        head = model.get_output_embeddings()  # type: ignore[operator]
        return head if isinstance(head, nn.Module) else None
    return None


def _can_cut(model: nn.Module, head: nn.Module, input_ids: torch.Tensor) -> bool:
    if model not in _CUTS:
        _CUTS[model] = _gives_the_same(model, head, input_ids)
    return _CUTS[model]


@torch.no_grad()
def _gives_the_same(model: nn.Module, head: nn.Module, input_ids: torch.Tensor) -> bool:
    # 4 positions of 2 x 3: whatever is added to each sequence, or each place in it, does not fit to 4.
    count = torch.arange(6, device=input_ids.device)
    ids, rows = input_ids.flatten()[count % input_ids.numel()].view(2, 3), count[[0, 2, 3, 5]]
    # On another thread, putting a generator back would take back what the main one has drawn meanwhile.
    kept = random_state_kept if threading.current_thread() is threading.main_thread() else nullcontext
    try:
        with kept():
            expected = _logits(model(ids)).flatten(0, 1)[rows]
        with kept(), _cut(head, ids.shape, rows) as calls:
            logits = _logits(model(ids))
        if len(calls) != 1 or logits.shape != (1, *expected.shape):
            return False
        error, size = (logits[0] - expected).abs().max(), expected.abs().max()
        # A product of fewer rows may be rounded differently. Only values tell, and a meta tensor has none.
        return logits.is_meta or bool(error <= torch.finfo(logits.dtype).eps ** 0.5 * size)
    except Exception:  # whatever a model says to fewer positions, it is called with all
        return False
    finally:
        # Some versions of autocast keep casts of weights for the next forward pass; those made here have no gradient.
        torch.clear_autocast_cache()


@contextmanager
def _cut(head: nn.Module, shape: torch.Size, rows: torch.Tensor) -> Iterator[list[bool]]:
    """Inside, the head is given `rows` alone. The list has an entry for each time."""
    thread = threading.get_ident()
    calls: list[bool] = []

    def select(_: nn.Module, arguments: tuple[Any, ...]) -> torch.Tensor | None:
        # Another thread may run the same model.
        if threading.get_ident() != thread or not arguments or arguments[0].shape[:-1] != shape:
            return None
        calls.append(True)
        return arguments[0].flatten(0, 1).index_select(0, rows).unsqueeze(0)

    handle = head.register_forward_pre_hook(select)
    try:
        yield calls
    finally:
        handle.remove()
