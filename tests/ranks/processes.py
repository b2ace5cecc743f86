"""Processes as torchrun starts them, but forked: importing torch once instead of once for each."""

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable

import torch

torch.set_num_threads(1)


def run_ranks(work: Callable[[int], None], world_size: int, seconds: int) -> list[int]:
    """Call `work` with its rank in each of the processes, and return their exit codes. Nobody ends the others."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    children = []
    for rank in range(world_size):
        child = os.fork()
        if not child:
            os.environ |= {name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            os._exit(_status(work, rank, seconds))
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _status(work: Callable[[int], None], rank: int, seconds: int) -> int:
    signal.alarm(seconds)  # nobody stays behind
    try:
        work(rank)
    except SystemExit as ended:
        sys.stdout.flush()
        return ended.code
    except Exception as error:
        print(f"[rank {rank}] {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    sys.stdout.flush()
    return 0
