"""The memory that backward needs: tensors that autograd saved in the forward pass and still holds.

It grows with the microbatch, not with the number of microbatches, because each backward lets go of what it used. Counts
are exact and the same on every run: they come from autograd itself (`torch.autograd.graph.saved_tensors_hooks`), not
from an allocator. What an operation keeps elsewhere, as a custom autograd function may, is not seen.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import nn

Given = nn.Module | torch.Tensor | Mapping[str, torch.Tensor]
"""Something whose memory is there with or without backward: a model, a tensor, a batch."""


class SavedForBackward:
    """Counts, in bytes, what graphs built inside a `with` block hold for backward.

    `now` is what is held at this moment, `peak` the most that was held at once. Each storage counts once and whole,
    however many views of it are saved. The parameters and buffers of a given model, and given tensors, do not count.
    Entering sets both numbers to 0. After the block `now` still falls when a graph of the block lets go.

    Example:
        >>> x, w = torch.ones(1000), torch.ones(1000, requires_grad=True)
        >>> with SavedForBackward(w) as saved:
        ...     loss = (w * x).exp().sum()  # keeps x for the product, and the result of exp
        ...     print(saved.now)
        ...     loss.backward()
        ...     print(saved.now, saved.peak)
        8000
        0 8000
    """

    def __init__(self, *given: Given) -> None:
        self._given = {tensor.untyped_storage().data_ptr() for one in given for tensor in _tensors(one)}
        self._ledger = _Ledger()

    def __enter__(self) -> SavedForBackward:
        self._ledger = _Ledger()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved.tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)

    @property
    def now(self) -> int:
        return self._ledger.now

    @property
    def peak(self) -> int:
        return self._ledger.peak

    def _pack(self, tensor: torch.Tensor) -> _Saved:
        is_given = tensor.untyped_storage().data_ptr() in self._given
        return _Saved(tensor, None if is_given else self._ledger)


def saved_bytes(function: Callable[[], object], *given: Given) -> int:
    """The most bytes that were held for backward at once while `function()` ran.

    Args:
        function: runs a forward pass, with or without its backward.
        given: models, tensors and batches whose own memory does not count.

    Raises:
        TypeError: something given is none of these.
    """
    with SavedForBackward(*given) as saved:
        function()
    return saved.peak


def retained_bytes(function: Callable[[], object], *given: Given) -> int:
    """The bytes that stay held for backward after `function()`, for as long as what it returned is kept.

    0 for a detached loss, and 0 for a loss that has run its own backward: only its graph nodes stay (see
    `graph_nodes`). The whole graph for a value whose branch never ran backward, or after `retain_graph=True`.

    Args:
        function: returns what a training loop would keep.
        given: models, tensors and batches whose own memory does not count.

    Raises:
        TypeError: something given is none of these.
    """
    with SavedForBackward(*given) as saved:
        kept = function()
    gc.collect()  # what only waits to be collected is not retained
    retained = saved.now
    del kept  # named, so that it lives until here
    return retained


def graph_nodes(value: torch.Tensor) -> int:
    """The autograd nodes that a tensor keeps alive: 0 for a detached one."""
    seen, waiting = set(), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return len(seen)


class _Ledger:
    """The storages that are held, by address; an address cannot be used again while its storage is held."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._uses: Counter[int] = Counter()

    def add(self, storage: torch.UntypedStorage) -> None:
        self._uses[storage.data_ptr()] += 1
        if self._uses[storage.data_ptr()] == 1:
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def remove(self, storage: torch.UntypedStorage) -> None:
        self._uses[storage.data_ptr()] -= 1
        if not self._uses[storage.data_ptr()]:
            self.now -= storage.nbytes()


class _Saved:
    """One saved tensor. Autograd drops it after the backward of the node that saved it, or with that node."""

    def __init__(self, tensor: torch.Tensor, ledger: _Ledger | None) -> None:
        # Detached: an operation's own result would hold its node, the node this object, and none would ever be freed.
        self.tensor, self.ledger = tensor.detach(), ledger
        if ledger is not None:
            ledger.add(self.tensor.untyped_storage())

    def __del__(self) -> None:
        if self.ledger is not None:
            self.ledger.remove(self.tensor.untyped_storage())


def _tensors(given: Given) -> list[torch.Tensor]:
    if isinstance(given, nn.Module):
        return [*given.parameters(), *given.buffers()]
    if isinstance(given, Mapping):
        return list(given.values())
    if not isinstance(given, torch.Tensor):
        raise TypeError(f"given: got {type(given).__name__}; expected a model, a tensor or a dict of tensors")
    return [given]
