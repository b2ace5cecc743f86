"""Every fault many times, each under torchrun: `python tests/ranks/many_times.py 20 [FAULT...]` prints a line for each.

Out of the test suite: it takes some ten seconds for each start of torchrun.
"""

import sys
import tempfile
import time
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_distributed import attempt

SAID = {
    "kill": ["rank      : {rank} (local_rank: {rank})", "Signal 9 (SIGKILL)"],
    "raise": ["rank      : {rank} (local_rank: {rank})", "OSError: the disk is full"],
    "nan": ["ValueError: rank {rank}: policy_log_probs: got nan"],
    "config": ["ValueError: learning_rate: got", "on rank 1; expected", "as on rank 0"],
}


def weights(done) -> str:
    return next(line for line in done.stdout.splitlines() if line.startswith("weights"))


@cache
def unfaulted(options: tuple[str, ...]) -> str:
    with tempfile.TemporaryDirectory() as name:
        return weights(attempt(Path(name), "none", 0, *options))


def once(fault: str, number: int) -> bool:
    rank, options = number % 2, ("--shard",) if number % 4 > 1 else ()
    with tempfile.TemporaryDirectory() as name:
        if fault == "restart":
            done = attempt(Path(name), "kill", rank, *options, torchrun=["--max-restarts", "1"])
            return done.returncode == 0 and weights(done) == unfaulted(options)
        done = attempt(Path(name), fault, rank, *options, torchrun=["--max-restarts", "0"])
        if fault == "no-data":
            return done.returncode == 0
        cause = done.stderr[done.stderr.find("Root Cause") :]
        return done.returncode == 1 and all(text.format(rank=rank) in cause for text in SAID[fault])


def main() -> int:
    times, faults = int(sys.argv[1]), sys.argv[2:] or [*SAID, "no-data", "restart"]
    failed = 0
    for fault in faults:
        started = time.perf_counter()
        good = sum(once(fault, number) for number in range(times))
        failed += times - good
        print(f"{fault:8} {good} of {times}, {(time.perf_counter() - started) / times:.0f} s each", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
