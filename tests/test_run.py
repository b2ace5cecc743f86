"""A run in a folder can be killed at any moment and goes on bit for bit."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_train import encoded, tiny, weights

from sft_edu.data.tasks import make_examples
from sft_edu.tokens import ByteTokenizer
from sft_edu.training.checkpoint import load_checkpoint
from sft_edu.training.evaluate import Evaluation
from sft_edu.training.run import CHECKPOINTS, METRICS, RunFolder, as_json, read_metrics, stops_on_interrupt, train_into
from sft_edu.training.train import Training
from sft_edu.training.train_config import TrainConfig

CONFIG = TrainConfig(microbatch_size=2, gradient_accumulation_steps=3, warmup_steps=2)
EVALUATION = Evaluation(make_examples(3, split="test"), ByteTokenizer(), num_answers=1)
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
    train_into(run, checkpoint_every=2, evaluate=EVALUATION, evaluate_every=3, **options)
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


def test_the_first_step_the_last_and_every_kth_are_evaluated(tmp_path: Path):
    run, seen = RunFolder(tmp_path, training()), []
    train_into(run, evaluate=EVALUATION, evaluate_every=4, on_line=seen.append)
    assert [line["step"] for line in seen if "held_out_exact_match" in line] == [1, 4, 8, 10]
    assert all(answer["prompt"] and answer["expected"] for answer in seen[3]["answers"])
    assert as_json(seen) == as_json(run.records())
    assert seen[-1] | EVALUATION(run.training.model).as_dict() == seen[-1]


def test_the_lines_are_on_the_disk_before_their_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Or else a power cut could leave a checkpoint that knows steps without lines."""
    run, flushed, real = RunFolder(tmp_path, training()), [], os.fsync

    def fsync(descriptor: int) -> None:
        flushed.append(os.fstat(descriptor).st_ino == (tmp_path / METRICS).stat().st_ino)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    train_into(run, checkpoint_every=5)
    assert flushed == [True, False] * 2


def test_what_is_no_number_is_null(tmp_path: Path):
    line = {"step": 1, "nll": math.nan, "answers": [{"text": "NaN", "scores": (math.inf, 1.5)}]}
    (tmp_path / METRICS).write_text(as_json(line) + "\n")
    assert list(read_metrics(tmp_path / METRICS)) == [
        {"step": 1, "nll": None, "answers": [{"text": "NaN", "scores": [None, 1.5]}]}
    ]


@pytest.mark.parametrize("text", ["[1]", "{}", '{"step": "1"}', "\x00", "NaN", ""])
def test_a_line_that_no_run_writes_is_named(tmp_path: Path, text: str):
    path = tmp_path / METRICS
    path.write_text(f'{{"step": 1}}\n{text}\n')
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2: got ")):
        list(read_metrics(path))


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


def test_lines_without_a_checkpoint_are_not_begun_anew(tmp_path: Path):
    """A run has one from its beginning: somebody has taken it away."""
    go(str(tmp_path))
    for path in (tmp_path / CHECKPOINTS).iterdir():
        path.unlink()
    lines = (tmp_path / METRICS).read_bytes()
    words = f"{tmp_path / CHECKPOINTS}: got no checkpoint; expected one of the run, of which {METRICS} has 10 steps"
    with pytest.raises(ValueError, match=re.escape(words)):
        RunFolder(tmp_path, training(), resume=True)
    assert (tmp_path / METRICS).read_bytes() == lines
    assert not list((tmp_path / CHECKPOINTS).iterdir())


def test_a_run_has_a_checkpoint_before_its_first_step(tmp_path: Path):
    RunFolder(tmp_path, training())
    assert load_checkpoint(tmp_path / CHECKPOINTS)["step"] == 0


@pytest.mark.timeout(600)  # a minute, where nothing else runs
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
