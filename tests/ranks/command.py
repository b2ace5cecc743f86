"""`sft-edu` on two ranks: `command.py FAULT ARGUMENT...`, under torchrun or with FORK=1 in the environment.

FAULT is none, or one that rank 1 meets after the fourth optimizer step of the first attempt: kill, nan or stop. Each
rank says at its end whether the report is there.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from processes import run_ranks

from sft_edu.cli import main
from sft_edu.training.train import Training


def run(rank: int) -> None:
    fault, *arguments = sys.argv[1:]
    if rank == 1 and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        meet(fault)
    status = main(arguments)
    report = Path(arguments[arguments.index("--out") + 1], "report.html")
    print(f"rank {rank} ended {'with' if report.exists() else 'without'} a report", flush=True)
    sys.exit(status)


def meet(fault: str) -> None:
    run_microbatch = Training.run_microbatch

    def faulty(training: Training):
        if training.step == 4 and fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if training.step == 4 and training.microbatch == 0 and fault == "stop":
            signal.raise_signal(signal.SIGINT)
        if training.step == 4 and fault == "nan":
            with torch.no_grad():
                training.model.head.weight.fill_(float("nan"))
        return run_microbatch(training)

    Training.run_microbatch = faulty


if __name__ == "__main__":
    if "FORK" in os.environ:
        sys.exit(max(run_ranks(run, 2, seconds=100)))
    run(int(os.environ["RANK"]))
