"""A checkpoint is whole or not there, and a damaged one is never loaded."""

import errno
import io
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from sft_edu.training import checkpoint
from sft_edu.training.checkpoint import DamagedCheckpointWarning, load_checkpoint, save_checkpoint, set_random_state


def state_of(number: int) -> dict[str, object]:
    return {"weights": torch.arange(300.0) + number, "config": {"rule": "token_mean", "max_norm": 1.0}, "sums": {}}


def save(folder: Path, step: int, microbatch: int = 0) -> Path:
    return save_checkpoint(folder, state_of(step), step=step, microbatch=microbatch)


def weights(folder: Path) -> torch.Tensor:
    return load_checkpoint(folder)["weights"]


def test_what_was_saved_is_loaded(tmp_path: Path):
    save(tmp_path / "new" / "folder", 3)
    state = load_checkpoint(tmp_path / "new" / "folder")
    assert torch.equal(state.pop("weights"), state_of(3)["weights"])
    assert {key: state[key] for key in ("config", "sums")} == {key: state_of(3)[key] for key in ("config", "sums")}


def test_an_empty_folder_has_none(tmp_path: Path):
    assert load_checkpoint(tmp_path) is None
    assert load_checkpoint(tmp_path / "missing") is None


def test_it_is_plain_data_for_torch(tmp_path: Path):
    random.gauss(0, 1)  # leaves a float in the state
    assert set(torch.load(save(tmp_path, 1), weights_only=True)) >= {"weights", "random", "environment"}


def test_the_newest_and_the_one_before_are_kept(tmp_path: Path):
    for step, microbatch in ((1, 0), (1, 3), (2, 0), (10, 1)):
        save(tmp_path, step, microbatch)
    assert sorted(path.name[:18] for path in tmp_path.iterdir()) == ["step-00000002.0000", "step-00000010.0001"]
    assert weights(tmp_path)[0] == 10


def names(folder: Path) -> list[str]:
    """Step and microbatch of each checkpoint, and whether it was set aside."""
    return sorted(re.sub(r"-[0-9a-f]{64}", "", path.name) for path in folder.iterdir())


def test_damaged_ones_are_set_aside_and_push_nothing_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "KEPT", 3)
        for step in (5, 10, 15):
            path = save(tmp_path, step)
            if step > 5:
                path.write_bytes(b"damaged")
    with pytest.warns(DamagedCheckpointWarning):
        assert weights(tmp_path)[0] == 5
    aside = ["step-00000010.0000.pt.damaged", "step-00000015.0000.pt.damaged"]
    for step in (6, 7, 8):
        save(tmp_path, step)
        assert names(tmp_path) == [f"step-0000000{step - 1}.0000.pt", f"step-0000000{step}.0000.pt", *aside]
        assert weights(tmp_path)[0] == step


def test_what_was_just_saved_is_never_deleted(tmp_path: Path):
    for step in (10, 15):
        save(tmp_path, step).write_bytes(b"damaged, and nobody has looked")
    assert save(tmp_path, 6).exists()
    with pytest.warns(DamagedCheckpointWarning):
        assert weights(tmp_path)[0] == 6


def test_a_damaged_one_that_cannot_be_set_aside_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path, 1)
    save(tmp_path, 2).write_bytes(b"")

    def refuse(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.warns(DamagedCheckpointWarning):
        assert weights(tmp_path)[0] == 1


def test_numbers_may_have_any_length(tmp_path: Path):
    for step, microbatch in ((3, 9_999), (3, 10_000), (99_999_999, 0), (100_000_000, 0)):
        save(tmp_path, step, microbatch)
        assert weights(tmp_path)[0] == step
    assert names(tmp_path) == ["step-100000000.0000.pt", "step-99999999.0000.pt"]


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path: Path):
    older, newest = save(tmp_path, 1), save(tmp_path, 2)
    content, chance = newest.read_bytes(), random.Random(0)
    for trial in range(300):
        if trial % 3:
            damaged = bytearray(content)
            damaged[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        else:
            damaged = content[: chance.randrange(len(content))]
        newest.write_bytes(damaged)
        with pytest.warns(DamagedCheckpointWarning, match=re.escape(newest.name)):
            assert weights(tmp_path)[0] == 1, trial
    older.write_bytes(b"")
    with (
        pytest.warns(DamagedCheckpointWarning),
        pytest.raises(ValueError, match="got damaged checkpoints alone; expected a whole one"),
    ):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("moment", ["write", "flush", "fsync", "replace"])
def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str):
    save(tmp_path, 1)
    before = sorted(tmp_path.iterdir())

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    if moment == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    elif moment == "replace":
        monkeypatch.setattr(Path, "replace", full)
    else:
        on_a_full_disk = type("OnAFullDisk", (io.FileIO,), {moment: full})
        monkeypatch.setattr(Path, "open", lambda path, mode: on_a_full_disk(path, mode))
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert sorted(tmp_path.iterdir()) == before
    assert weights(tmp_path)[0] == 1


def test_a_folder_that_cannot_be_written_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path, 1)

    def refuse(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr(Path, "open", refuse)  # root may write anywhere
    with pytest.raises(PermissionError):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert weights(tmp_path)[0] == 1


def test_what_a_killed_save_left_is_removed(tmp_path: Path):
    (tmp_path / "abc.unfinished").write_bytes(b"half")
    save(tmp_path, 1)
    assert [path.suffix for path in tmp_path.iterdir()] == [".pt"]


def test_random_numbers_go_on_where_they_were(tmp_path: Path):
    random.gauss(0, 1)  # leaves a second number behind
    save(tmp_path, 1)

    def draw() -> tuple:
        of_numpy = np.random.random_sample()  # noqa: NPY002 (the generator whose state is global)
        return random.random(), random.gauss(0, 1), float(of_numpy), float(torch.rand(1))

    expected = draw()
    assert draw() != expected
    set_random_state(load_checkpoint(tmp_path)["random"])
    assert draw() == expected


def test_other_threads_and_versions_are_named(tmp_path: Path):
    save(tmp_path, 1)
    state = load_checkpoint(tmp_path)
    assert checkpoint.environment_differences(state) == []
    state["environment"] |= {"the number of threads": 7, "the version of torch": "2.0"}
    assert checkpoint.environment_differences(state) == [
        f"the number of threads was 7 and is {torch.get_num_threads()}",
        f"the version of torch was 2.0 and is {torch.__version__}",
    ]
