"""W ranks in W real processes on this machine, from a notebook: started, watched, and never left behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sft_edu.accumulate import Batch
from sft_edu.model import TinyLM
from sft_edu.ranks.simulated import RANK_DENOMINATORS, RankShare, RanksResult, check_world_size

_STARTING = 40.0  # seconds that processes may take to import torch, on a busy machine
_POLL = 0.02


class RankFailed(RuntimeError):
    """A process failed. The text names its rank and the cause."""


@dataclass(frozen=True)
class EngineCosts:
    """What an engine cost each rank for one optimizer step, in bytes and in seconds.

    Each is the most of all ranks. `received` is what came in over the network, None where the system does not tell;
    `state` is what a rank holds from one step to the next: weights, gradients and AdamW's two moments; `seconds` counts
    forwards, backwards and their traffic, and not the start of the processes.
    """

    received: int | None
    state: int
    seconds: float


@dataclass(frozen=True, eq=False)
class RealRanks:
    """What W processes did with one minibatch.

    `results` has, under DDP, the outcome with each of `RANK_DENOMINATORS`. `sharded` has flat gradients under FSDP2,
    where it was told to divide by 1 on no module ("default"; it divides by W), on the outermost alone ("root_only") and
    on each ("every_module"). `reductions` counts the all-reduces of gradients in one optimizer step, `reduced_bytes`
    what each rank put into them.
    """

    world_size: int
    results: Mapping[str, RanksResult]
    sharded: Mapping[str, torch.Tensor] = field(repr=False)
    reductions: int
    reduced_bytes: int
    ddp: EngineCosts
    fsdp: EngineCosts


def run_ranks(
    model: TinyLM,
    microbatches: Sequence[Batch],
    world_size: int = 2,
    *,
    timeout: float = 20.0,
    skip_empty: bool = False,
) -> RealRanks:
    """Start W processes, deal the microbatches to them like cards, and collect what they saw.

    The processes talk over the loopback interface, through PyTorch's gloo. All of them have ended when this returns
    or raises, and they end by themselves if this process is killed. The model is not changed.

    Args:
        model: on the CPU, in float64 where results are to be compared to the last digits.
        microbatches: G >= 1 of them, as `split_minibatch` makes them; rank r runs r, r + W, r + 2W, ...
        world_size: W, from 1 to 8.
        timeout: seconds that a rank waits for its peers in a collective operation.
        skip_empty: a rank without microbatches runs no backward: a mistake, to see what comes of it.

    Raises:
        RankFailed: a process failed or did not come back in time.
        TypeError, ValueError: the text names the argument, what was given and what is expected.
    """
    check_world_size(world_size)
    if world_size > 8:
        raise ValueError(f"world_size: got {world_size}; expected at most 8 processes on one machine")
    if not isinstance(model, TinyLM):
        raise TypeError(f"model: got {type(model).__name__}; expected a TinyLM")
    if isinstance(microbatches, Mapping) or not microbatches:
        given = "a single batch" if microbatches else "none"
        raise ValueError(f"microbatches: got {given}; expected a list of at least one")
    if not timeout > 0:
        raise ValueError(f"timeout: got {timeout}; expected seconds above 0")
    with tempfile.TemporaryDirectory(prefix="sft_edu_ranks_") as name:
        folder = Path(name)
        # Views would be stored with the whole minibatch behind each.
        own = [{name: tensor.clone() for name, tensor in batch.items()} for batch in microbatches]
        task = {"sizes": _sizes(model), "dtype": model.head.weight.dtype, "weights": model.state_dict()}
        torch.save({**task, "microbatches": own, "skip_empty": skip_empty}, folder / "task.pt")
        _run_processes(folder, world_size, timeout)
        ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world_size)]
    return RealRanks(
        world_size,
        {name: _result(ranks, name) for name in RANK_DENOMINATORS},
        ranks[0]["sharded"],
        ranks[0]["reductions"],
        ranks[0]["reduced_bytes"],
        *(_costs([rank[engine] for rank in ranks]) for engine in ("ddp", "fsdp")),
    )


def _run_processes(folder: Path, world_size: int, timeout: float) -> None:
    environment = os.environ | {
        "GLOO_SOCKET_IFNAME": _loopback(),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-W", "ignore", "-m", "sft_edu.ranks.worker", str(folder)]
    processes: list[subprocess.Popen] = []
    try:
        for rank in range(world_size):
            with (folder / f"output{rank}.txt").open("wb") as output:
                processes.append(
                    subprocess.Popen(
                        [*command, str(rank), str(world_size), str(timeout)],
                        stdin=subprocess.PIPE,
                        stdout=output,
                        stderr=output,
                        env=environment,
                    )
                )
        _wait(processes, folder, timeout)
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdin.close()


def _wait(processes: Sequence[subprocess.Popen], folder: Path, timeout: float) -> None:
    """Until all have ended well, or the first has not."""
    deadline = time.monotonic() + _STARTING + 3 * timeout
    while any(process.poll() is None for process in processes):
        if any(process.returncode for process in processes):
            break
        if time.monotonic() > deadline:
            still = [str(rank) for rank, process in enumerate(processes) if process.poll() is None]
            raise RankFailed(f"rank {', '.join(still)}: not finished after {_STARTING + 3 * timeout:g} s; ended")
        time.sleep(_POLL)
    if any(process.returncode for process in processes):
        raise RankFailed(_cause([process.poll() for process in processes], folder, timeout))


def _cause(codes: Sequence[int | None], folder: Path, timeout: float) -> str:
    """The rank that failed first, and why. Its peers fail too, as soon as they miss it."""
    told = {}
    for rank in range(len(codes)):
        path = folder / f"error{rank}.json"
        if path.exists():
            told[rank] = json.loads(path.read_text(encoding="utf-8"))
    for rank, code in enumerate(codes):
        if code and rank not in told:
            last = (folder / f"output{rank}.txt").read_text(encoding="utf-8", errors="replace").strip()
            how = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            return f"rank {rank}: {how}, without an error of its own{': ' + last[-300:] if last else ''}"
    rank = min(told, key=lambda rank: told[rank]["time"])
    text = told[rank]["text"]
    if "imed out" in text or "imeout" in text:
        text = (
            f"waited {timeout:g} s for another rank in a collective operation, and gave up. Every rank has to take "
            "part in each: one that has no tokens runs a backward too"
        )
    return f"rank {rank}: {text}"


def _sizes(model: TinyLM) -> dict[str, int]:
    """What `TinyLM` has to be told for a model of the same shape."""
    vocab_size, d_model = model.token_embedding.weight.shape
    return {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "num_layers": len(model.blocks),
        "num_heads": model.blocks[0].num_heads,
        "context_length": model.context_length,
    }


def _loopback() -> str:
    """The interface that leads nowhere else: lo on Linux, lo0 on macOS."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if name.startswith("lo")), "lo")


def _result(ranks: Sequence[Mapping], name: str) -> RanksResult:
    shares = []
    for number, rank in enumerate(ranks):
        run = rank["runs"][name]
        shares.append(RankShare(number, rank["sequences"], rank["num_tokens"], run["loss"], run["grad_norm"]))
    return RanksResult(ranks[0]["runs"][name]["gradient"], tuple(shares))


def _costs(ranks: Sequence[Mapping]) -> EngineCosts:
    received = [rank["received"] for rank in ranks]
    state, seconds = (max(rank[name] for rank in ranks) for name in ("state", "seconds"))
    return EngineCosts(None if None in received else max(received), state, seconds)
