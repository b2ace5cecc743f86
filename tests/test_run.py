"""A run in a folder can be killed at any moment and goes on bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_train import encoded, tiny, weights

from sft_edu.checkpoint import load_checkpoint
from sft_edu.run import METRICS, RunFolder, read_metrics, stops_on_interrupt, train_into
from sft_edu.train import TrainConfig, Training

CONFIG = TrainConfig(microbatch_size=2, gradient_accumulation_steps=3, warmup_steps=2)
HERE = Path(__file__).parent
# Forks for each run, because an interpreter takes seconds to import torch.
KILLER = """
import os, signal, sys, time, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from test_run import go
for line in sys.stdin:
    folder, seconds = line.rsplit(maxsplit=1)
    child = os.fork()
    if not child:
        go(folder)
        os._exit(0)
    if float(seconds):
        time.sleep(float(seconds))
        os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def training() -> Training:
    return Training(tiny(), encoded(60), CONFIG)


def go(folder: str, **options) -> RunFolder:
    run = RunFolder(folder, training(), resume=True)
    train_into(run, checkpoint_every=2, **options)
    return run


def test_it_leaves_metrics_and_checkpoints(tmp_path: Path):
    run = go(str(tmp_path))
    assert run.training.finished
    assert [record["step"] for record in run.records()] == list(range(1, 11))
    assert load_checkpoint(tmp_path / "checkpoints")["step"] == 10


def test_another_run_is_not_overwritten(tmp_path: Path):
    go(str(tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="holds a run"):
        RunFolder(tmp_path, training())
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_what_is_measured_on_the_way_is_in_the_metrics(tmp_path: Path):
    run, seen = RunFolder(tmp_path, training()), []
    train_into(run, evaluate=lambda record: {"twice": 2 * record.step}, on_record=seen.append)
    assert seen == run.records()
    assert seen[3]["twice"] == 8


def test_a_stop_keeps_the_middle_of_a_minibatch(tmp_path: Path):
    whole = go(str(tmp_path / "whole"))
    microbatches = iter(range(100))
    stopped = go(str(tmp_path / "stopped"), should_stop=lambda: next(microbatches) == 7)
    assert (stopped.training.step, stopped.training.microbatch) == (2, 1)
    resumed = go(str(tmp_path / "stopped"))
    assert resumed.differences == []
    same(resumed, whole)


def same(run: RunFolder, other: RunFolder) -> None:
    assert torch.equal(weights(run.training.model), weights(other.training.model))
    assert (run.folder / METRICS).read_bytes() == (other.folder / METRICS).read_bytes()


def test_a_kill_at_any_moment_changes_nothing(tmp_path: Path):
    kills, chance = 100, random.Random(0)
    whole = go(str(tmp_path / "whole"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen([sys.executable, "-c", KILLER, str(HERE)], **pipes) as server:

        def attempt(folder: Path, seconds: float = 0) -> int:
            server.stdin.write(f"{folder} {seconds}\n")
            server.stdin.flush()
            return int(server.stdout.readline())

        assert attempt(tmp_path / "first") == 0
        start = time.perf_counter()
        assert attempt(tmp_path / "timed") == 0
        seconds, killed, number = time.perf_counter() - start, 0, 0
        while killed < kills:
            number += 1
            folder = tmp_path / str(number)
            for _ in range(2):  # the second may hit a resumed run
                killed += attempt(folder, chance.uniform(0, seconds)) == -signal.SIGKILL
            same(go(str(folder)), whole)
        server.stdin.close()
    assert not list(tmp_path.rglob("*.unfinished"))


def test_a_last_line_that_was_cut_is_left_out(tmp_path: Path):
    path = tmp_path / METRICS
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [record["step"] for record in read_metrics(path)] == [1, 2]


def test_lines_that_the_checkpoint_does_not_know_are_taken_back(tmp_path: Path):
    run = go(str(tmp_path))
    with (tmp_path / METRICS).open("a") as file:
        file.write(json.dumps({"step": 11}) + "\n")
    assert [record["step"] for record in RunFolder(tmp_path, training(), resume=True).records()] == list(range(1, 11))
    assert run.training.finished


def test_the_first_interrupt_asks_and_the_second_stops():
    with stops_on_interrupt() as asked:
        assert not asked()
        signal.raise_signal(signal.SIGINT)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
