"""Start and end of a process that torchrun started, and who is to blame when it ends early.

    torchrun --nproc-per-node 2 -m sft_edu train ...

Processes on one machine talk over its loopback interface alone. A launcher that restarts them (`--max-restarts`) is
best run with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: then each attempt has a store of its own to meet at.
"""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from sft_edu.ranks.distributed import Ranks
from sft_edu.training.one_process import OneProcess

TIMEOUT = timedelta(minutes=5)
"""How long one rank waits for another, which may be writing a checkpoint. One that ended is not waited for."""

_ANSWER = timedelta(seconds=5)


class RankError(RuntimeError):
    """Another rank failed, and this one cannot go on without it. The text says which, and why if that is known."""


def is_launched() -> bool:
    """Whether torchrun, or another launcher that sets the same variables, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def local_device() -> torch.device:
    """Where the model of this rank belongs: a GPU of its own if there are enough of them, else the CPU."""
    if torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 0:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


@contextmanager
def ranks_from_environment(*, shard: bool = False, timeout: timedelta = TIMEOUT) -> Iterator[OneProcess]:
    """Join the processes that torchrun started, and leave them at the end.

        with ranks_from_environment() as ranks:
            list(Training(model, examples, config, ranks=ranks))

    The model belongs on `ranks.device`. An error of this rank is noted for the others and for torchrun before it goes
    on its way.

    Args:
        shard: give each rank a part of the model (FSDP2) instead of the whole (DDP).
        timeout: how long to wait for a rank that neither answers nor ends.

    Yields:
        `Ranks` or `ShardedRanks`; `OneProcess` where no launcher was.

    Raises:
        ValueError: `shard` without a launcher.
        RankError: inside, another rank failed.
    """
    if not is_launched():
        if shard:
            raise ValueError("shard: got True in one process; expected several, such as torchrun starts")
        yield OneProcess()
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _warn_about_restarts(rank)
    store = _join(rank, world_size, timeout)
    try:
        ranks = _ranks(shard)
        ranks.device = local_device()
        yield ranks
    except Exception as error:
        named = _named(error, dist.PrefixStore("sft_edu", store), rank, world_size)
        get_error_handler().record_exception(named)
        raise named from (None if named is error else error)
    finally:
        dist.destroy_process_group()


def _ranks(shard: bool) -> Ranks:
    if not shard:
        return Ranks()
    from sft_edu.ranks.sharded import ShardedRanks  # FSDP2 takes a second

    return ShardedRanks()


def _join(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):  # all on this machine
        loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
        for engine in ("GLOO", "NCCL"):
            if loopback:
                os.environ.setdefault(f"{engine}_SOCKET_IFNAME", loopback)
    store = _store(rank, world_size, timeout)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    return store


def _store(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Where the processes find each other."""
    is_elsewhere = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # in the launcher
    if is_elsewhere or os.environ["MASTER_ADDR"] not in ("localhost", "127.0.0.1"):
        return next(dist.rendezvous("env://", timeout=timeout))[0]
    # Left to itself, the first rank would listen on every interface.
    port, options = int(os.environ["MASTER_PORT"]), {"timeout": timeout, "multi_tenant": True}
    if rank == 0:
        options["master_listen_fd"] = socket.create_server(("127.0.0.1", port)).detach()
    return dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0, **options)


def _named(error: Exception, store: dist.Store, rank: int, world_size: int) -> Exception:
    """The error, or the `RankError` that explains it."""
    is_own = not isinstance(error, dist.DistError) and "/gloo/" not in str(error)
    try:
        if is_own:
            store.compare_set("failed", "", f"rank {rank} failed: {type(error).__name__}: {error}")
            return error
        # Those who are there say so. It also gives a launcher the time to see who ended first.
        store.set(str(rank), "here")
        try:
            store.wait(["failed"], _ANSWER)
        except dist.DistStoreError:
            gone = [str(other) for other in range(world_size) if not store.check([str(other)])]
            seconds = f"{_ANSWER.seconds} seconds"
            return RankError(f"rank {', '.join(gone)} is gone: killed, or silent for {seconds}") if gone else error
        return RankError(store.get("failed").decode())
    except dist.DistNetworkError:
        if is_own:
            return error
        time.sleep(_ANSWER.seconds)  # as above
        return RankError("rank 0 is gone, or the launcher, whichever kept the store")


def _warn_about_restarts(rank: int) -> None:
    restarts, shares = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
    if rank == 0 and restarts != "0" and os.environ.get(shares) != "1":
        warnings.warn(
            f"--max-restarts: got {restarts} without {shares}=1 in the environment of torchrun; expected both, or a "
            "restart may fail to bring the ranks together",
            stacklevel=4,
        )
