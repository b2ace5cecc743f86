"""Real processes: what they compute, what travels between them, and that none is left behind."""

import contextlib
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from sft_edu import TinyLM, compare, full_batch_gradient, split_minibatch
from sft_edu.ragged import ragged_minibatch
from sft_edu.ranks.costs import ddp_traffic, fsdp_traffic, state_bytes
from sft_edu.ranks.real import RankFailed, run_ranks
from sft_edu.ranks.simulated import RANK_DENOMINATORS, deal, microbatch_sums

pytestmark = pytest.mark.timeout(240)

RIGHT = "global_over_world"
MINIBATCH = ragged_minibatch(8, imbalance=1.0)
MICROBATCHES = split_minibatch(MINIBATCH, 4)


def tiny(dtype=torch.float64):
    return TinyLM(d_model=16, num_layers=1, num_heads=2).to(dtype)


MODEL = tiny()
SINGLE = full_batch_gradient(MODEL, MINIBATCH)
PARAMETER_BYTES = sum(parameter.nbytes for parameter in MODEL.parameters())


@pytest.fixture(scope="module", params=[2, 4])
def real(request):
    return run_ranks(MODEL, MICROBATCHES, request.param)


def workers(parent=None):
    """The processes of ranks that descend from a process, this one by default."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(parent).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "sft_edu.ranks.worker" in child.cmdline():
                    found.append(child)
    return found


def until(found, seconds=60):
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


@pytest.fixture(autouse=True)
def nothing_left_behind():
    yield
    assert workers() == []


def test_the_simulator_says_the_same_to_the_last_printed_digit(real):
    sums = microbatch_sums(MODEL, MICROBATCHES)
    for name, result in real.results.items():
        simulated = deal(sums, real.world_size, name)
        assert repr(simulated) == repr(result)
        assert compare(simulated.gradient, result.gradient).relative_error <= 1e-14
        for ours, theirs in zip(simulated.shares, result.shares, strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-13)
            assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-13)


def test_one_denominator_gives_the_gradient_of_one_process(real):
    errors = {name: compare(result.gradient, SINGLE).relative_error for name, result in real.results.items()}
    assert list(errors) == list(RANK_DENOMINATORS)
    assert errors.pop(RIGHT) <= 1e-14
    assert min(errors.values()) >= 1e-2


def test_fsdp_has_to_divide_alike_in_every_module(real):
    errors = {where: compare(gradient, SINGLE).relative_error for where, gradient in real.sharded.items()}
    assert errors["default"] <= 1e-14
    assert errors["every_module"] <= 1e-14
    assert errors["root_only"] >= 1e-2


def test_one_reduction_for_each_optimizer_step(real):
    assert (real.reductions, real.reduced_bytes) == (1, PARAMETER_BYTES)


def test_traffic_and_states_are_those_of_the_formulas(real):
    world, g = real.world_size, 4 // real.world_size
    for costs, sharded in ((real.ddp, False), (real.fsdp, True)):
        expected = state_bytes(PARAMETER_BYTES, world, sharded=sharded, per_parameter=4)
        assert costs.state == pytest.approx(expected, rel=0.01)
    if not sys.platform.startswith("linux"):
        assert real.ddp.received is None
        return
    ddp = ddp_traffic(PARAMETER_BYTES, world)
    fsdp = fsdp_traffic(PARAMETER_BYTES, world, g, scatters_by_all_reduce=True)
    assert real.ddp.received == pytest.approx(ddp, rel=0.03)
    assert real.fsdp.received == pytest.approx(fsdp, rel=0.04)
    # Told apart from what it would be with a reduce-scatter.
    assert abs(real.fsdp.received / fsdp_traffic(PARAMETER_BYTES, world, g) - 1) > 0.1


def test_a_rank_without_sequences_joins_in():
    result = run_ranks(MODEL, MICROBATCHES[:1], 2).results[RIGHT]
    assert compare(result.gradient, full_batch_gradient(MODEL, MICROBATCHES[0])).relative_error <= 1e-14
    assert (result.shares[1].sequences, result.shares[1].num_tokens, result.shares[1].grad_norm) == (0, 0, 0.0)


def test_a_rank_that_skips_its_backward_is_missed():
    before = time.monotonic()
    with pytest.raises(RankFailed, match=r"rank 0: waited 2 s for another rank .* runs a backward too"):
        run_ranks(MODEL, MICROBATCHES[:1], 2, timeout=2, skip_empty=True)
    assert time.monotonic() - before < 60


def test_single_precision_agrees_too():
    real = run_ranks(tiny(torch.float32), MICROBATCHES, 2)
    for gradient in (real.results[RIGHT].gradient, real.sharded["default"], real.sharded["every_module"]):
        assert gradient.dtype == torch.float32
        assert compare(gradient, SINGLE).relative_error <= 2e-6


def test_the_first_rank_that_raises_is_named_with_its_error():
    broken = [dict(batch) for batch in MICROBATCHES]
    broken[1]["input_ids"] = broken[1]["input_ids"] + 1000
    with pytest.raises(RankFailed, match=r"^rank 1: IndexError: index out of range in self$"):
        run_ranks(MODEL, broken, 2)


def test_a_killed_rank_is_named_and_its_peer_ended():
    def kill():
        # Not before it has peers to miss it: rank 1 is the one started second.
        victim = until(lambda: [one for one in workers() if one.cmdline()[-3] == "1"])[0]
        victim.send_signal(signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        with pytest.raises(RankFailed, match=r"^rank 1: ended by signal 9, without an error of its own"):
            run_ranks(MODEL, MICROBATCHES, 2)
    finally:
        thread.join()


def test_they_talk_over_loopback_alone():
    addresses, ended = set(), threading.Event()

    def watch():
        while not ended.wait(0.05):
            for one in workers():
                with contextlib.suppress(psutil.Error):
                    addresses.update(connection.laddr.ip for connection in one.net_connections("inet"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        run_ranks(MODEL, MICROBATCHES, 2)
    finally:
        ended.set()
        thread.join()
    assert addresses == {"127.0.0.1"}


def test_they_end_with_the_process_that_started_them():
    program = (
        "from sft_edu import TinyLM, split_minibatch\n"
        "from sft_edu.ragged import ragged_minibatch\n"
        "from sft_edu.ranks.real import run_ranks\n"
        "microbatches = split_minibatch(ragged_minibatch(2, 0.0), 1)\n"
        "run_ranks(TinyLM(d_model=16, num_layers=1, num_heads=2), microbatches, timeout=100, skip_empty=True)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    started = until(lambda: len(found := workers(parent.pid)) == 2 and found)
    folder = Path(started[0].cmdline()[-4])
    assert folder.is_dir()
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(started, timeout=20)
    for one in alive:
        one.kill()
    assert alive == []
    assert not folder.exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((torch.nn.Linear(2, 2), MICROBATCHES, 2), "model: got Linear; expected a TinyLM"),
        ((MODEL, [], 2), "microbatches: got none"),
        ((MODEL, MINIBATCH, 2), "microbatches: got a single batch"),
        ((MODEL, MICROBATCHES, 0), "world_size: got 0"),
        ((MODEL, MICROBATCHES, 9), "world_size: got 9; expected at most 8"),
    ],
)
def test_bad_input_is_refused_before_anything_is_started(arguments, text):
    with pytest.raises((TypeError, ValueError), match=text):
        run_ranks(*arguments)


def test_a_timeout_is_above_zero():
    with pytest.raises(ValueError, match="timeout: got 0; expected seconds above 0"):
        run_ranks(MODEL, MICROBATCHES, timeout=0)
