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
        assert resumed == {"differences": [], "same": True, "steps": [5, 6, 12], "empty": first_alone}


@pytest.mark.parametrize("world_size", SIZES)
def test_a_checkpoint_goes_on_elsewhere_and_says_what_that_changes(world_size: int):
    found = figures(world_size)["checkpoints"]
    places = {"one": "1 process", "ddp": f"{world_size} ranks", "fsdp": f"{world_size} ranks with shards"}
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
        "num_examples": f"ValueError: num_examples: got 23 on rank {last}; expected 24, as on rank 0",
        "examples": f"on rank {last}; expected checksum",
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
    if torchrun is None:
        command = [sys.executable, *script, "--fork", "2"]
    else:
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", str(folder / "rdzv"), "--rdzv-conf", "store_type=file"]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        command = [*launcher, *meeting, *torchrun, *script]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    if (folder / "fault_at").exists() and done.returncode:
        assert time.time() - float((folder / "fault_at").read_text()) < 30
    mine = [one for one in psutil.process_iter(["cmdline"]) if str(folder) in (one.info["cmdline"] or [])]
    assert not mine
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


@pytest.mark.parametrize("options", [(), ("--shard",)], ids=ENGINES)
def test_torchrun_restarts_a_killed_run_from_its_checkpoint_bit_for_bit(tmp_path: Path, options: tuple[str, ...]):
    straight = attempt(tmp_path, "none", 1, *options)
    folder = tmp_path / "killed"
    folder.mkdir()
    killed = attempt(folder, "kill", 1, *options, torchrun=["--max-restarts", "1"])
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
