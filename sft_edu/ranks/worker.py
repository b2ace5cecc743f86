"""One of W processes: `python -m sft_edu.ranks.worker FOLDER RANK WORLD_SIZE TIMEOUT`, started by `real.py`.

Reads the model and its share of the microbatches from the folder, runs them under PyTorch's own engines, and leaves
there what it saw, or why it failed. It talks to its peers over the loopback interface alone, and ends when the process
that started it does.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from sft_edu.accumulate import Batch
from sft_edu.log_probs import get_response_log_probs
from sft_edu.model import TinyLM
from sft_edu.ranks.simulated import RANK_DENOMINATORS
from sft_edu.ranks.socket_bytes import received_bytes

RIGHT = "global_over_world"
DIVIDE_FACTORS = ("default", "root_only", "every_module")
"""Where FSDP2 is told to divide by 1: nowhere (it divides by W), on the outermost module alone, or on every one."""


class _Watch:
    """Stands in DDP's place of communication: looks at each bucket of gradients, and lets DDP average it."""

    def __init__(self) -> None:
        self.reductions, self.bytes, self.squares = 0, 0, 0.0

    def __call__(self, group: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        self.reductions += 1
        self.bytes += bucket.buffer().nbytes
        self.squares += bucket.buffer().square().sum().item()
        return allreduce_hook(group, bucket)


def main(folder: Path, rank: int, world_size: int, timeout: float) -> None:
    """Do the work of one rank, and leave `rank<r>.pt` in the folder."""
    task = torch.load(folder / "task.pt", weights_only=True)
    store = dist.FileStore(str(folder / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout))
    model = TinyLM(**task["sizes"]).to(task["dtype"])
    model.load_state_dict(task["weights"])
    microbatches = task["microbatches"][rank::world_size]
    counted = torch.tensor([sum(int(batch["response_mask"].sum()) for batch in microbatches), len(microbatches)])
    result = {"num_tokens": int(counted[0]), "sequences": sum(len(batch["labels"]) for batch in microbatches)}
    dist.all_reduce(counted)  # N: once for the whole minibatch
    if not microbatches:
        if task["skip_empty"]:
            time.sleep(2 * timeout)  # as a loop that has nothing to do would: no backward, and no word to the peers
        microbatches = [_without_tokens(task["microbatches"][0])]
    counts = (max(result["num_tokens"], 1), max(int(counted[0]), 1), world_size)
    result |= _data_parallel(model, microbatches, counts) | _sharded(model, microbatches, counts)
    torch.save(result, folder / f"rank{rank}.pt")
    dist.barrier()  # nobody leaves while a peer still reads
    dist.destroy_process_group()


def _without_tokens(batch: Batch) -> Batch:
    """For a rank without sequences: every rank has to run a backward, or the others wait for its gradient."""
    return {**batch, "response_mask": torch.zeros_like(batch["response_mask"])}


def _data_parallel(model: nn.Module, microbatches: Sequence[Batch], counts: tuple[int, int, int]) -> dict:
    model = copy.deepcopy(model)
    replica = DistributedDataParallel(model, gradient_as_bucket_view=True)
    watch = _Watch()
    replica.register_comm_hook(dist.group.WORLD, lambda group, bucket: watch(group, bucket))
    runs = {}
    for name, one in RANK_DENOMINATORS.items():
        replica.zero_grad()
        watch = _Watch()
        with _traffic() as received:
            start = time.perf_counter()
            loss = _accumulate(replica, microbatches, one.denominator(*counts), replica.no_sync)
            seconds = time.perf_counter() - start
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        runs[name] = {"loss": loss, "grad_norm": watch.squares**0.5, "gradient": gradient}
    seen = {"reductions": watch.reductions, "reduced_bytes": watch.bytes}
    return {"runs": runs, **seen, "ddp": {"received": received[0], "state": _state_bytes(model), "seconds": seconds}}


def _sharded(model: nn.Module, microbatches: Sequence[Batch], counts: tuple[int, int, int]) -> dict:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        FSDPModule,
        fully_shard,
    )  # late: half a second, which a failing rank need not wait

    _, minibatch_tokens, world_size = counts
    mesh = init_device_mesh("cpu", (world_size,))
    gradients = {}
    for where in DIVIDE_FACTORS:
        shards = copy.deepcopy(model)
        for module in (*shards.blocks, shards):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
        every_module = [module for module in shards.modules() if isinstance(module, FSDPModule)]
        for module in every_module:
            module.set_force_sum_reduction_for_comms(True)  # gloo can only sum; FSDP2 divides by itself then
        for module in {"default": [], "root_only": [shards], "every_module": every_module}[where]:
            module.set_gradient_divide_factor(1.0)
        # Averaged over the ranks, the loss needs the factor W; summed, it does not.
        divisor = minibatch_tokens / (world_size if where == "default" else 1)
        with _traffic() as received:
            start = time.perf_counter()
            _accumulate(shards, microbatches, divisor, lambda shards=shards: _unsynchronised(shards))
            seconds = time.perf_counter() - start
        gradients[where] = torch.cat([parameter.grad.full_tensor().flatten() for parameter in shards.parameters()])
    return {"sharded": gradients, "fsdp": {"received": received[0], "state": _state_bytes(shards), "seconds": seconds}}


def _accumulate(
    model: nn.Module,
    microbatches: Sequence[Batch],
    divisor: float,
    unsynchronised: Callable[[], contextlib.AbstractContextManager],
) -> float:
    """Run all microbatches; only the last one's backward sends gradients. Returns the sum of the losses."""
    total = 0.0
    for index, batch in enumerate(microbatches):
        is_last = index == len(microbatches) - 1
        with contextlib.nullcontext() if is_last else unsynchronised():
            log_probs = get_response_log_probs(model, batch["input_ids"], batch["labels"])["log_probs"]
            loss = -log_probs.masked_fill(batch["response_mask"] == 0, 0.0).sum() / divisor
            loss.backward()
        total += loss.item()
    return total


@contextlib.contextmanager
def _unsynchronised(model: nn.Module) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)


@contextlib.contextmanager
def _traffic() -> Iterator[list[int | None]]:
    """The bytes that this process received meanwhile; None where the system does not tell."""
    dist.barrier()
    before, received = received_bytes(), []
    yield received
    after = received_bytes()
    received.append(None if before is None or after is None else after - before)
    dist.barrier()


def _state_bytes(model: nn.Module) -> int:
    """Weights, gradients and AdamW's two moments that this process holds after an optimizer step."""
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    held = [tensor for p in model.parameters() for tensor in (p, p.grad, *optimizer.state[p].values())]
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in held]
    return sum(tensor.nbytes for tensor in local if tensor.ndim)  # not the step counts


def _end_with_parent(folder: Path) -> None:
    """The parent holds the other end of standard input, which closes however the parent ends."""
    os.read(0, 1)  # not sys.stdin, whose lock would be in the way of an exit
    shutil.rmtree(folder, ignore_errors=True)  # which the parent could not do
    os._exit(1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    where, own_rank = Path(sys.argv[1]), int(sys.argv[2])
    threading.Thread(target=_end_with_parent, args=(where,), daemon=True).start()
    try:
        main(where, own_rank, int(sys.argv[3]), float(sys.argv[4]))
    except BaseException as error:
        told = {"time": time.time(), "text": f"{type(error).__name__}: {error}"}
        partial = where / f"error{own_rank}.tmp"
        partial.write_text(json.dumps(told), encoding="utf-8")
        partial.replace(where / f"error{own_rank}.json")
        os._exit(1)  # not through the engine's own shutdown, which may wait for a peer
    os._exit(0)  # likewise
