"""The lab of ranks: what it shows is what the simulator computes, by hand and from code."""

import gc
import threading
import weakref

import ipywidgets
import pytest
import torch
import traitlets
from test_widgets import close, find

from sft_edu import TinyLM, compare, full_batch_gradient, split_minibatch
from sft_edu.ragged import ragged_minibatch
from sft_edu.ranks.simulated import RANK_DENOMINATORS, deal, microbatch_sums
from sft_edu.widgets import Bars, RanksLab, SavePicture

OPENING = """\
RanksLab: W=2 sequences=32 skew=1 denominator=local
denominator        D    off by  length   cosine
local              n    0.0411  1.0014x  0.9992
local_times_world  n·W  0.5001  0.5007x  0.9992
global             N    0.5000  0.5000x  1.0000
global_over_world  N/W  0.0000  1.0000x  1.0000
A rank holds 327 to 441 response tokens. Each divides by its own tokens, and the engine averages.
The result points elsewhere: it is off by 0.0411 of the length of the right gradient."""


def control(lab, description):
    return next(found for found in find(lab, ipywidgets.Widget) if getattr(found, "description", "") == description)


def test_it_opens_on_two_ranks_that_count_for_themselves():
    assert repr(RanksLab()) == OPENING


@pytest.mark.parametrize(("world_size", "sequences", "skew"), [(3, 9, 0.7), (16, 12, 1.0), (64, 64, 0.3)])
def test_what_it_shows_is_what_the_simulator_computes(world_size, sequences, skew):
    lab = RanksLab(world_size, sequences, skew, "local")
    model = TinyLM(d_model=16, num_layers=1, num_heads=2).double()
    minibatch = ragged_minibatch(sequences, skew)
    sums, single = microbatch_sums(model, split_minibatch(minibatch, sequences)), full_batch_gradient(model, minibatch)

    def error(world, name):
        return compare(deal(sums, world, name).gradient, single).relative_error

    every, followed = find(lab, Bars)
    names = [row["label"].removesuffix(", followed below") for row in every.rows]
    assert names == list(RANK_DENOMINATORS)
    for name, row in zip(names, every.rows, strict=True):
        assert row["value"] == pytest.approx(error(world_size, name), abs=1e-12)
        assert row["text"] == f"{row['value']:.4f}"
    worlds = sorted({1, 2, 4, 8, 16, 32, 64, world_size})
    assert [row["label"] for row in followed.rows] == [f"W = {world}" for world in worlds]
    for world, row in zip(worlds, followed.rows, strict=True):
        assert row["value"] == pytest.approx(error(world, "local"), abs=1e-12)
        assert row["note"] == ("this one" if world == world_size else "")
    assert every.words == lab.words()
    assert lab.relative_error == pytest.approx(error(world_size, "local"), abs=1e-12)


def test_the_right_denominator_is_right_whatever_is_dragged():
    lab = RanksLab(denominator="global_over_world")
    for lab.world_size in (1, 7, 33, 64):
        for lab.num_sequences in (8, 64):
            assert lab.relative_error <= 1e-13
            assert "That is the gradient of a single process, whatever the ranks hold." in lab.words()


def test_every_control_moves_its_setting_and_follows_code():
    lab = RanksLab()
    for description, value in {"W": 5, "sequences": 16, "skew": 0.5, "D": "global"}.items():
        control(lab, description).value = value
    assert lab.state == "W=5 sequences=16 skew=0.5 denominator=global"
    lab.reset()
    assert repr(lab) == OPENING
    assert [control(lab, name).value for name in ("W", "sequences", "skew", "D")] == [2, 32, 1.0, "local"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("world_size", 0),
        ("world_size", 65),
        ("num_sequences", 7),
        ("num_sequences", 65),
        ("skew", 1.5),
        ("skew", float("nan")),
        ("denominator", "notes"),
    ],
)
def test_a_wrong_setting_is_refused_and_changes_nothing(name, value):
    lab = RanksLab()
    with pytest.raises(traitlets.TraitError, match=f"{name}: got"):
        setattr(lab, name, value)
    assert repr(lab) == OPENING


def test_a_state_can_be_handed_on():
    lab = RanksLab.from_state("W=64 sequences=8 skew=0.2 denominator=global")
    other = RanksLab()
    other._state_box.value = lab.state
    assert repr(other) == repr(lab) == repr(RanksLab(64, 8, 0.2, "global"))
    other._state_box.value = "W=0"
    assert "world_size: got 0" in other._state_complaint.value


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ((64, 32, 1.0, "local"), "A rank holds 4 to 70 response tokens; 32 of 64 hold none."),
        ((8, 32, 0.0, "local"), "Every rank holds 96 response tokens. Each divides by its own tokens"),
        ((8, 32, 0.0, "local"), "the gradient of a single process, because all ranks hold as many tokens."),
        ((1, 32, 1.0, "local_times_world"), "the gradient of a single process, because there is one rank."),
        ((1, 32, 1.0, "global"), "One rank holds all 768 response tokens."),
        ((4, 32, 1.0, "global"), "The direction is right, the length is 0.2500 of what it should be."),
        ((4, 32, 1.0, "local"), "The result points elsewhere: it is off by"),
    ],
)
def test_the_words_say_what_the_bars_show(settings, words):
    assert words in RanksLab(*settings).words()


def test_what_is_followed_has_the_same_colour_in_both_pictures_and_no_other():
    every, followed = find(RanksLab(8, denominator="global"), Bars)
    stands_out = [row["label"] for row in (*every.rows, *followed.rows) if row["colour"] == "gradient"]
    assert stands_out == ["global, followed below", "W = 8"]
    assert {row["colour"] for row in (*every.rows, *followed.rows)} == {"gradient", "neutral"}


def test_the_picture_has_the_same_bars(tmp_path):
    lab = RanksLab(5)
    widths = [[bar.get_width() for bar in axes.patches] for axes in lab.figure().axes]
    assert widths == [[row["value"] for row in bars.rows] for bars in find(lab, Bars)]
    save = find(lab, SavePicture)[0]
    assert save.to_file(tmp_path / "lab.png").read_bytes().startswith(b"\x89PNG")


def test_eight_threads_in_every_mood_leave_it_in_step():
    lab, failures = RanksLab(), []

    def drive(thread):
        try:
            with torch.no_grad(), torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
                for turn in range(5):
                    lab.world_size = 1 + (8 * thread + turn) % 64
                    lab.num_sequences = 8 + turn
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=drive, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert repr(lab) == repr(RanksLab.from_state(lab.state))
    assert control(lab, "W").value == lab.world_size
    assert find(lab, Bars)[0].words == lab.words()


def test_a_closed_lab_is_let_go():
    lab = RanksLab()
    reference = weakref.ref(lab)
    close(lab)
    del lab
    gc.collect()
    assert reference() is None
