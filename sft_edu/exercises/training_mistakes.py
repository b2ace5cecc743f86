"""Which wrong way of training leads to these weights?

The order of backward passes and steps names mistakes of the loop. Where it is right, the epoch is trained once more in
every known wrong way, and the one that ends at the same weights is the mistake.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch

from sft_edu.exercises.training_runs import (
    RIGHT,
    Context,
    Habits,
    Minibatches,
    expected_events,
    flat_weights,
    fresh_model,
    tokens,
    train_as,
)

_TOLERANCE = 1e-6

_DIVISORS: dict[tuple[str, str], Callable[[Context], float]] = {
    ("mean-of-means", "Each microbatch is divided by its own token count and by G: a mean of means is not the mean."): (
        lambda on: tokens(on.batch) * len(on.window)
    ),
    ("configured-steps", "The last minibatch is divided by the G of the others, though it has fewer microbatches."): (
        lambda on: tokens(on.batch) * len(on.minibatches[0])
    ),
    ("sum-of-means", "Each microbatch is divided by its own token count alone, and the means are added up."): (
        lambda on: tokens(on.batch)
    ),
    ("not-divided", "The sum is not divided at all: the step grows with the tokens."): lambda on: 1,
    ("divided-by-g", "The sum is divided by G alone; a mean over tokens is asked for."): lambda on: len(on.window),
    ("divided-by-g", "The sum is divided by G alone, the same G in the shorter last minibatch too."): (
        lambda on: len(on.minibatches[0])
    ),
    ("notes", "The sum is divided by G twice, as in the course notes; a mean over tokens is asked for."): (
        lambda on: len(on.window) ** 2
    ),
    ("notes", "The sum is divided by G twice, the same G in the shorter last minibatch too."): (
        lambda on: len(on.minibatches[0]) ** 2
    ),
    ("divided-by-g-too", "The mean over the minibatch's tokens is divided by G as well."): (
        lambda on: tokens(*on.window) * len(on.window)
    ),
    ("divided-by-g-too", "The mean over the minibatch's tokens is divided by the configured G as well."): (
        lambda on: tokens(*on.window) * len(on.minibatches[0])
    ),
    ("sequence-mean", "That is a mean over sequences; a mean over tokens is asked for."): (
        lambda on: sum(len(batch["labels"]) for batch in on.window)
    ),
    ("sequence-mean", "Each microbatch is divided by its B and by G; a mean over tokens is asked for."): (
        lambda on: len(on.batch["labels"]) * len(on.window)
    ),
    ("stale-token-count", "Every minibatch is divided by the tokens of the first."): (
        lambda on: tokens(*on.minibatches[0])
    ),
    ("epoch-token-count", "The tokens of all minibatches are counted; a step is made of one."): (
        lambda on: sum(tokens(*window) for window in on.minibatches)
    ),
}


def named_mistake(weights: torch.Tensor, events: str, minibatches: Minibatches) -> tuple[str, str]:
    """Code and hint for wrong weights, from them and from the backward passes and steps (`bbsbs`) that led there."""
    moved = not torch.equal(weights, flat_weights(fresh_model()))
    if "s" in events and not moved and "b" not in events:
        return "no-backward", "The optimizer stepped without a gradient. Run backward for each microbatch."
    return (
        _by_events(events, moved, minibatches)
        or _by_habits(weights, events, minibatches)
        or (("step-misplaced", _MISPLACED) if events != expected_events(minibatches) else ("other", _OTHER))
    )


_ZEROED = "The optimizer stepped, but the gradient was gone by then."
_MISPLACED = "The steps do not follow the minibatches. One step belongs after the last backward of each."
_OTHER = (
    "The optimizer stepped where it should, but along another gradient. Compare the gradient of one minibatch with "
    "that of the full batch."
)


def _by_events(events: str, moved: bool, minibatches: Minibatches) -> tuple[str, str] | None:
    """Mistakes that the order of events shows by itself."""
    expected, backwards = expected_events(minibatches), "b" * sum(map(len, minibatches))
    if "s" not in events:
        if moved:
            return "own-optimizer", "The weights moved, but not by the optimizer that was given."
        hint = "The optimizer never stepped." if "b" in events else "Neither a backward nor a step has run."
        return ("no-step" if "b" in events else "no-backward"), hint
    if events == expected or "b" not in events:
        return None
    if not moved:
        return "zeroed-too-early", _ZEROED
    patterns = {
        "bs" * len(backwards): ("step-per-microbatch", "The optimizer steps after every microbatch."),
        backwards + "s": ("one-step", "There is one step for all minibatches. Each has a step of its own."),
        expected[:-1]: (
            "last-window-not-stepped",
            "The last minibatch is not stepped: it has fewer microbatches than G, and its gradient leaks into the next "
            "epoch.",
        ),
        "".join("b" * (len(window) - 1) + "sb" for window in minibatches): (
            "step-too-early",
            "The optimizer steps before the last backward, so a part of each gradient comes a step late.",
        ),
        "".join("sb" + "b" * (len(window) - 1) for window in minibatches): (
            "step-too-early",
            "The optimizer steps before the backward passes, so each gradient comes a step late.",
        ),
        expected.replace("s", "ss"): ("steps-twice", "The optimizer steps twice for each minibatch."),
        expected.replace("b", "bb"): ("backward-twice", "Backward runs twice for each microbatch."),
        expected[: -len(minibatches[-1]) - 1]: ("last-window-missing", "The last minibatch is not trained at all."),
        "bs" * len(minibatches): (
            "microbatch-missing",
            "One microbatch of each minibatch is trained, not all of them.",
        ),
    }
    return patterns.get(events) or _by_epochs(events, expected) or _by_fixed_window(events, minibatches)


def _by_epochs(events: str, expected: str) -> tuple[str, str] | None:
    epochs = len(events) // len(expected)
    is_whole = events == expected * epochs
    return ("several-epochs", f"The epoch runs {epochs} times. Train on each minibatch once.") if is_whole else None


def _by_fixed_window(events: str, minibatches: Minibatches) -> tuple[str, str] | None:
    """A step after every k microbatches, whatever the minibatch has."""
    windows = {len(window) for window in events.split("s")[:-1]}
    sizes = [len(window) for window in minibatches]
    if len(windows) != 1 or windows <= {0, 1} or windows == set(sizes):
        return None
    return (
        "fixed-window",
        f"The optimizer steps after every {windows.pop()} microbatches. The minibatches here have "
        f"{', '.join(map(str, sizes))}; the end of each is where a step belongs.",
    )


def _by_habits(weights: torch.Tensor, events: str, minibatches: Minibatches) -> tuple[str, str] | None:
    """The first wrong way of training that ends at these weights."""
    start = flat_weights(fresh_model())
    for order in itertools.permutations(minibatches):
        if events == expected_events(order) and (weights - train_as(RIGHT, order)).norm() <= _TOLERANCE:
            return "another-order", "The minibatches are not in the order in which they came. Begin with the first one."
    same_order = events if events.count("b") == sum(map(len, minibatches)) else ""
    for code, hint, habits in _wrong_ways(same_order):
        expected = train_as(habits, minibatches)
        if (weights - expected).norm() <= _TOLERANCE * (expected - start).norm():
            return code, hint
    return None


def _wrong_ways(events: str) -> Iterator[tuple[str, str, Habits]]:
    never, each = "Gradients are never zeroed: every step contains those before.", "is zeroed before each microbatch"
    yield (
        "zero-per-microbatch",
        f"The gradient {each}: only the last one is left.",
        Habits(zero="backward", events=events),
    )
    yield "zero-missing", never, Habits(zero="never", events=events)
    yield "zeroed-too-early", _ZEROED, Habits(zero="end", events=events)
    yield "wrong-sign", "The responses are made less likely. The loss is minus log p.", Habits(sign=-1, events=events)
    yield from _with_other_masks(events)
    for (code, hint), divisor in _DIVISORS.items():
        yield code, hint, Habits(divisor=divisor, events=events)
        yield "wrong-sign", f"The responses are made less likely. {hint}", Habits(divisor, events, sign=-1)
        yield "zero-per-microbatch", f"The gradient {each}. {hint}", Habits(divisor, events, zero="backward")
        yield "zero-missing", f"{never} {hint}", Habits(divisor, events, zero="never")
    clipped = "The gradient is clipped"
    for norm in (1.0, 0.5, 0.1):
        yield "clipped", f"{clipped}; no clipping is asked for.", Habits(events=events, clip="step", max_norm=norm)
        yield (
            "clipped-per-microbatch",
            f"{clipped} after each microbatch. It is not asked for, and belongs after the last.",
            Habits(events=events, clip="backward", max_norm=norm),
        )


def _with_other_masks(events: str) -> Iterator[tuple[str, str, Habits]]:
    ignored = "Prompt and padding are trained too."
    shifted = "The response mask is one place off. It lies on the labels already."
    everywhere = torch.ones_like
    yield "mask-ignored", ignored, Habits(mask=everywhere, events=events)
    for divisor in (_positions, _own_positions):
        yield "mask-ignored", ignored, Habits(divisor, mask=everywhere, events=events)
    yield "mask-inverted", "The mask is inverted: 1 marks the response.", Habits(mask=torch.logical_not, events=events)
    for by in (1, -1):
        yield "mask-shifted", shifted, Habits(mask=lambda mask, by=by: mask.roll(by, 1), events=events)


def _positions(on: Context) -> float:
    return sum(batch["labels"].numel() for batch in on.window)


def _own_positions(on: Context) -> float:
    return on.batch["labels"].numel() * len(on.window)
