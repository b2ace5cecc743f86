"""Work in the background: one at a time, stopped when told, gone when the process ends."""

import threading
import time

import pytest

from sft_edu.widgets.background import Background


def until(is_true, seconds=10) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Worker:
    """Counts for as long as it may, and knows whether two were ever at it together."""

    def __init__(self):
        self.count, self.at_work, self.most, self.ends = 0, 0, 0, 0

    def __call__(self, should_stop, limit=float("inf")):
        self.at_work += 1
        self.most = max(self.most, self.at_work)
        before = self.count
        while not should_stop() and self.count < before + limit:
            self.count += 1
            time.sleep(0.001)
        self.at_work -= 1
        return self.count

    def ended(self) -> None:
        self.ends += 1


@pytest.fixture
def worker():
    return Worker()


@pytest.fixture
def background(worker):
    made = Background(worker.ended, "TestWork")
    yield made
    made.stop()
    made.wait()


def test_it_works_until_it_is_stopped(worker, background):
    assert not background.running
    background.start(worker)
    assert background.running
    until(lambda: worker.count > 3)
    background.stop()
    background.wait()
    done = worker.count
    assert not background.running
    time.sleep(0.02)
    assert (worker.count, worker.ends) == (done, 1)
    until(lambda: "TestWork" not in [thread.name for thread in threading.enumerate()])


def test_what_runs_is_not_started_twice_and_gives_way_to_what_is_done_here(worker, background):
    background.start(worker)
    background.start(lambda should_stop: worker(should_stop, limit=0))
    assert background.running
    assert background.here(lambda should_stop: worker(should_stop, limit=5)) == worker.count
    assert not background.running
    assert (worker.most, worker.ends) == (1, 2)


def test_an_error_ends_the_work_and_nothing_else(worker, background):
    with pytest.raises(ZeroDivisionError):
        background.here(lambda should_stop: 1 / 0)
    assert (background.running, worker.ends) == (False, 1)
    assert background.here(lambda should_stop: 3) == 3


def test_many_threads_never_work_at_once_and_all_can_be_stopped(worker, background):
    def drive(thread: int) -> None:
        for turn in range(20):
            if (thread + turn) % 3 == 0:
                background.start(worker)
            elif (thread + turn) % 3 == 1:
                background.here(lambda should_stop: worker(should_stop, limit=2))
            else:
                background.stop()

    threads = [threading.Thread(target=drive, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    background.stop()
    background.wait()
    assert worker.most == 1
    assert not background.running
