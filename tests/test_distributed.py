"""The loop on 1, 2 and 4 ranks, by DDP and FSDP2: the numbers of one process, and a fault is never silent.

The processes are those of `ranks/checks.py` and `ranks/faulty.py`. They talk over the loopback interface.
"""

import json
import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import psutil
import pytest

from sft_edu.cli import main
from sft_edu.training.checkpoint import load_checkpoint
from sft_edu.training.run import read_metrics
from sft_edu.training.tiny_run import load_tiny_model

HERE = Path(__file__).parent / "ranks"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
SIZES = (1, 2, 4)
FEW = SIZES[:2]
ENGINES = ("ddp", "fsdp")

pytestmark = pytest.mark.timeout(300)


@cache
def figures(world_size: int) -> dict:
    """All that the ranks measured, in one start of processes for each number of them."""
    command = [sys.executable, str(HERE / "checks.py"), str(world_size)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("world_size", SIZES)
@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_are_those_of_one_process(world_size: int, engine: str):
    found = figures(world_size)["gradients"]
    assert found[f"{engine} float64"] <= 1e-14
    assert found[f"{engine} float32"] <= 2e-6
    for dtype in ("float64", "float32"):
        for wrong in ("no world size", "local counts"):
            error = found[f"{engine} {dtype} {wrong}"]
            assert error >= 1e-2 if world_size > 1 else error <= 2e-6


@pytest.mark.parametrize("world_size", SIZES)
def test_loss_curves_are_those_of_one_process(world_size: int):
    found = figures(world_size)["curves"]
    assert max(found[engine] for engine in ENGINES) <= 1e-5
    if world_size > 1:
        assert min(found["no world size"], found["local counts"]) >= 1e-2


@pytest.mark.parametrize("world_size", SIZES)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_rank_has_the_metrics_of_one_process(world_size: int, engine: str):
    found = figures(world_size)["metrics"][engine]
    assert found["worst"] <= 1e-13
    assert found["same"]


def test_gradients_travel_once_in_an_optimizer_step_whatever_g_is():
    found = figures(2)["traffic"]
    # The number of tokens, the gradient, the sums of the metrics.
    assert all(found[f"ddp {rounds}"] == {"c10d::allreduce_": 3} for rounds in (1, 2, 5))
    for rounds in (1, 2, 5):
        counted = found[f"fsdp {rounds}"]
        assert counted["c10d::_reduce_scatter_base_"] == 3  # two blocks, and what is in none
        assert counted["c10d::allreduce_"] == 3  # tokens, metrics, the length of the gradient
        assert counted["c10d::_allgather_base_"] == 5 * rounds  # each forward and backward needs the weights


@pytest.mark.parametrize("world_size", SIZES)
def test_every_microbatch_is_run_once_and_all_ranks_wait_together(world_size: int):
    for count, found in figures(world_size)["data"].items():
        assert found == {"same": True, "rounds": True, "empty": -int(count) % world_size}


@pytest.mark.parametrize("world_size", SIZES)
def test_a_checkpoint_goes_on_bit_for_bit_also_with_dropout(world_size: int):
    found = figures(world_size)["checkpoints"]
    for engine in ENGINES:
        resumed = found[f"{engine} {engine}"]
        first_alone = [rank > 0 for rank in range(world_size)]
        assert resumed == {"differences": [], "same": True, "steps": [5, 6, 8], "empty": first_alone}


@pytest.mark.parametrize("world_size", SIZES)
def test_a_checkpoint_goes_on_elsewhere_and_says_what_that_changes(world_size: int):
    found = figures(world_size)["checkpoints"]
    ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
    places = {"one": "1 process", "ddp": ranks, "fsdp": f"{ranks} with shards"}
    for before in places:
        for after in places:
            text = (
                f"the run was on {places[before]} and is on {places[after]}, so that sums are added up in another order"
            )
            assert found[f"{before} {after}"]["differences"] == ([text] if before != after else [])


@pytest.mark.parametrize("world_size", FEW)
def test_on_another_number_of_ranks_the_losses_go_on_the_same(world_size: int):
    assert max(figures(world_size)["changed_ranks"].values()) <= 1e-12


def test_ranks_that_were_given_something_else_do_not_begin():
    world_size, last = 2, 1
    found = figures(world_size)["refusals"]
    expected = {
        "rule": f"ValueError: rule: got notes on rank {last}; expected token_mean, as on rank 0",
        "learning_rate": f"ValueError: learning_rate: got 0.1 on rank {last}; expected 0.003, as on rank 0",
        "pad_token_id": f"ValueError: pad_token_id: got 5 on rank {last}; expected 0, as on rank 0",
        "num_examples": "ValueError: examples: got 23, checksum",
        "examples": f"on rank {last}; expected 24, checksum",
        "model": f"ValueError: model.token_embedding.weight: got [259, 32] torch.float64 on rank {last}; expected",
        "engine": f"ValueError: layout: got {world_size} ranks with shards on rank {last}; expected {world_size} ranks",
        "in the middle": "RuntimeError: state_dict: got a call after 1 microbatches of a minibatch",
    }
    assert found.keys() == expected.keys()
    for what, texts in found.items():
        assert len(texts) == world_size
        assert all(expected[what] in text for text in texts), what


@pytest.mark.parametrize("world_size", SIZES)
def test_nan_on_one_rank_stops_all_before_the_optimizer(world_size: int):
    for found in figures(world_size)["bad_values"].values():
        assert found["same"]
        assert len(found["texts"]) == world_size
        begin = f"ValueError: rank {world_size - 1}: policy_log_probs: got nan"
        assert all(text.startswith(begin) for text in found["texts"])


@pytest.mark.parametrize("world_size", FEW)
@pytest.mark.parametrize("engine", ENGINES)
def test_ranks_begin_alike_and_stop_together(world_size: int, engine: str):
    found = figures(world_size)["weights_and_stops"]
    assert found[engine]
    assert found[f"{engine} stops"] == [[False, True, False]] * world_size


def attempt(folder: Path, fault: str, rank: int, *options: str, torchrun: list[str] | None = None):
    """A run of two ranks with a fault, which must be over within 30 seconds of it and leave no process behind."""
    script = [str(HERE / "faulty.py"), str(folder), fault, str(rank), *options]
    done = start(folder, [*script, "--fork", "2"] if torchrun is None else [*launcher(folder, *torchrun), *script])
    if (folder / "fault_at").exists() and done.returncode:
        assert time.time() - float((folder / "fault_at").read_text()) < 30
    return done


def launcher(folder: Path, *options: str) -> list[str]:
    """Without a port that anybody could reach: torchrun's processes meet at a file."""
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", str(folder / "rdzv"), "--rdzv-conf", "store_type=file"]
    return ["-m", "torch.distributed.run", "--nproc-per-node", "2", *meeting, *options]


def start(folder: Path, arguments: list[str], **environment: str) -> subprocess.CompletedProcess:
    command, environment = [sys.executable, *arguments], ENVIRONMENT | environment
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert not [one for one in psutil.process_iter(["cmdline"]) if str(folder) in str(one.info["cmdline"])]
    return done


@pytest.mark.parametrize(
    ("fault", "rank", "said"),
    [
        ("kill", 1, {0: "RankError: rank 1 is gone: killed, or silent for 5 seconds"}),
        ("kill", 0, {1: "RankError: rank 0 is gone"}),
        ("raise", 1, {0: "RankError: rank 1 failed: OSError: the disk is full", 1: "OSError: the disk is full"}),
        ("nan", 1, dict.fromkeys((0, 1), "ValueError: rank 1: policy_log_probs: got nan")),
        ("config", 1, dict.fromkeys((0, 1), "ValueError: learning_rate: got 0.1 on rank 1; expected 0.001")),
    ],
)
def test_a_fault_ends_the_run_on_all_ranks_and_names_its_rank(tmp_path: Path, fault: str, rank: int, said: dict):
    done = attempt(tmp_path, fault, rank)
    assert done.returncode == 1
    for number, text in said.items():
        assert f"[rank {number}] {text}" in done.stderr
    assert "weights" not in done.stdout


def test_a_rank_without_data_works_along(tmp_path: Path):
    done = attempt(tmp_path, "no-data", 1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "weights" in done.stdout


def test_torchrun_restarts_a_killed_run_from_its_checkpoint_bit_for_bit(tmp_path: Path):
    straight = attempt(tmp_path, "none", 1, "--shard")
    folder = tmp_path / "killed"
    folder.mkdir()
    killed = attempt(folder, "kill", 1, "--shard", torchrun=["--max-restarts", "1"])
    assert killed.returncode == 0, killed.stderr[-3000:]
    assert (folder / "fault_at").exists()
    lines = [line for line in killed.stdout.splitlines() if line.startswith("weights")]
    assert lines == [line for line in straight.stdout.splitlines() if line.startswith("weights")] != []
    records = (folder / "run" / "metrics.jsonl").read_text()
    assert records == (tmp_path / "run" / "metrics.jsonl").read_text() != ""
    listening = {line for line in killed.stdout.splitlines() if line.startswith("listening")}
    assert listening == {"listening on 127.0.0.1"}


def test_torchrun_names_the_rank_and_the_cause(tmp_path: Path):
    done = attempt(tmp_path, "raise", 1, torchrun=["--max-restarts", "0"])
    assert done.returncode == 1
    cause = done.stderr[done.stderr.index("Root Cause") :]
    assert "rank      : 1 (local_rank: 1)" in cause
    assert "OSError: the disk is full" in cause


def arguments(folder: Path, out: str) -> list[str]:
    """`sft-edu train`, 9 optimizer steps of up to 3 microbatches."""
    examples = [{"prompt": f"{number} + 1 =", "response": f" {number + 1}"} for number in range(20)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    short = ["--microbatch-size", "2", "--gradient-accumulation-steps", "3", "--evaluate-every", "4"]
    return ["train", "--data", "mine.jsonl", *short, "--checkpoint-every", "3", "--out", out]


def command(folder: Path, fault: str, out: str, *options: str, torchrun: list[str] | None = None):
    """The same on two ranks, one of which may meet a fault."""
    script = [str(HERE / "command.py"), fault, *arguments(folder, out), *options]
    if torchrun is None:
        return start(folder, script, FORK="1")
    return start(folder, [*launcher(folder, *torchrun), *script])


def test_the_command_does_the_same_on_two_ranks_with_shards_and_after_a_kill(tmp_path: Path, monkeypatch, capsys):
    whole = command(tmp_path, "none", "whole")
    sharded = command(tmp_path, "none", "sharded", "--shard")
    killed = command(tmp_path, "kill", "killed", torchrun=["--max-restarts", "1"])
    for done in (whole, sharded, killed):
        assert done.returncode == 0, done.stderr[-3000:]
    assert whole.stdout.count("Finished after optimizer step 9 of 9.") == 1  # only the first rank speaks
    assert "on cpu, by 2 ranks with shards." in sharded.stdout
    assert (tmp_path / "killed" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    monkeypatch.chdir(tmp_path)
    assert main(arguments(tmp_path, "alone")) == 0
    expected = list(read_metrics("alone/metrics.jsonl"))
    for name in ("whole", "sharded"):
        lines = list(read_metrics(f"{name}/metrics.jsonl"))
        assert [line["num_tokens"] for line in lines] == [line["num_tokens"] for line in expected]
        assert [line["nll"] for line in lines] == pytest.approx([line["nll"] for line in expected], abs=1e-5)
        assert lines[-1]["held_out_nll"] == pytest.approx(expected[-1]["held_out_nll"], abs=1e-4)
        models = [load_tiny_model(f"{one}/model.pt") for one in ("alone", name)]
        assert models[0].state_dict().keys() == models[1].state_dict().keys()
    capsys.readouterr()
    # What two ranks began, one process finishes, and says what that changes.
    assert main(["train", "--resume", "--out", "sharded"]) == 0
    assert "the run was on 2 ranks with shards and is on 1 process" in capsys.readouterr().err


def test_the_command_names_the_rank_that_computes_nan(tmp_path: Path):
    done = command(tmp_path, "nan", "run")
    assert done.returncode == 1
    assert "Failed at optimizer step 5 of 9. rank 1: policy_log_probs: got nan" in done.stderr
    assert "rank 1 ended with a report" in done.stdout


def test_ranks_that_stop_wait_for_the_one_that_writes(tmp_path: Path):
    done = command(tmp_path, "stop", "run")
    assert done.returncode == 130, done.stderr[-3000:]
    assert "Stopped after optimizer step 5 of 9." in done.stdout
    assert "Go on with: torchrun --nproc-per-node 2 -m sft_edu train --resume --out run\n" in done.stdout
    assert "rank 1 ended with a report" in done.stdout
    assert load_checkpoint(tmp_path / "run" / "checkpoints")["step"] == 5


def test_shards_need_several_processes(capsys):
    assert main(["train", "--shard"]) == 2
    assert "--shard: got it in one process" in capsys.readouterr().err
