"""A run in which one rank meets a fault: `faulty.py FOLDER FAULT RANK`, under torchrun or with `--fork WORLD_SIZE`.

Faults come at the seventh step, and only at the first attempt: kill, raise, nan, config, no-data, none.
"""

import argparse
import hashlib
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from processes import run_ranks
from runs import encoded, tiny

from sft_edu.ranks.torchrun import ranks_from_environment
from sft_edu.training.run import RunFolder, train_into
from sft_edu.training.train import Training
from sft_edu.training.train_config import TrainConfig

STEP = 7


def train(options: argparse.Namespace, rank: int) -> None:
    is_faulty = rank == options.rank and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    with ranks_from_environment(shard=options.shard, timeout=timedelta(seconds=25)) as ranks:
        learning_rate = 0.1 if is_faulty and options.fault == "config" else 1e-3
        steps = 1 if options.fault == "no-data" else 4
        config = TrainConfig(
            microbatch_size=2, gradient_accumulation_steps=steps, learning_rate=learning_rate, warmup_steps=2
        )
        if is_faulty and options.fault == "config":
            note_time(options.folder)
        training = Training(tiny(), encoded(12 * config.gradient_accumulation_steps * 2), config, ranks=ranks)
        run = RunFolder(options.folder / "run", training, resume=True)

        def meet_fault() -> bool:
            if is_faulty and training.step == STEP - 1 and training.microbatch == 0:
                note_time(options.folder)
                if options.fault == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if options.fault == "raise":
                    raise OSError("the disk is full")
                if options.fault == "nan":
                    training.model.register_forward_hook(lambda module, inputs, output: output * float("nan"))
            return False

        if rank == 0:
            print("listening on", *sorted(listening()), flush=True)
        train_into(run, checkpoint_every=2, should_stop=meet_fault)
        weights = [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in training.model.parameters()]
        if rank == 0:
            digest = hashlib.sha256(torch.cat([one.flatten() for one in weights]).numpy().tobytes()).hexdigest()
            print(f"weights {digest}", flush=True)


def listening() -> set[str]:
    """The addresses that this process, its siblings and their launcher listen on."""
    launcher = psutil.Process(os.getppid())
    found = [one for process in (launcher, *launcher.children()) for one in process.net_connections("inet")]
    return {one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN}


def note_time(folder: Path) -> None:
    (folder / "fault_at").write_text(str(time.time()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("fault")
    parser.add_argument("rank", type=int)
    parser.add_argument("--shard", action="store_true")
    parser.add_argument("--fork", type=int)
    given = parser.parse_args()
    if given.fork:
        sys.exit(any(run_ranks(lambda rank: train(given, rank), given.fork, seconds=60)))
    train(given, int(os.environ["RANK"]))
