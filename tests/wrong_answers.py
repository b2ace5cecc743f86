"""Answers to the exercises as learners write them: wrong ones with the mistake each has to get, and right ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from sft_edu import (
    broken_steps,
    closed_form,
    exercises,
    get_response_log_probs,
    masked_normalize,
    sft_microbatch_train_step,
)
from sft_edu.training.patterns import train_basic, train_with_logging


class Answer(NamedTuple):
    """A learner's function, the check it is for, and what the verdict has to hold: a code and a part of the hint."""

    name: str
    check: Callable
    function: Callable
    mistake: str = ""
    hint: str = ""


WRONG: list[Answer] = []
RIGHT: list[Answer] = []


def wrong(check, mistake, hint):
    def add(function):
        WRONG.append(Answer(function.__name__, getattr(exercises, check), function, mistake, hint))
        return function

    return add


def right(check):
    def add(function):
        RIGHT.append(Answer(function.__name__, getattr(exercises, check), function))
        return function

    return add


def several(check, *rows):
    """Answers in one line each: name, function, mistake and hint."""
    for name, function, *expected in rows:
        answers = WRONG if expected else RIGHT
        answers.append(Answer(name, getattr(exercises, check), function, *expected))


# --- masked_normalize ---


def summed(tensor, dim):
    return tensor.sum() if dim is None else tensor.sum(dim)


def averaged(tensor, dim):
    return tensor.mean() if dim is None else tensor.mean(dim)


BY_C = ("constant-changed", "need not be an integer")


def changes_its_input(tensor, mask, dim, c):
    mask.fill_(1) if not mask.any() else None
    return summed(tensor.masked_fill(mask == 0, 0), dim) / c


def numpy_like(tensor, mask, dim, c):
    return summed(tensor.detach().masked_fill(mask == 0, 0), dim) / c


def sums_along_the_other(tensor, mask, dim, c):
    return summed(tensor.masked_fill(mask == 0, 0), None if dim is None else 1 - dim % 2) / c


several(
    "check_masked_normalize",
    ("where", lambda x, m, dim, c: summed(torch.where(m == 1, x, 0), dim) / c),
    ("masked_fill", lambda x, m, dim, c: summed(x.masked_fill(m == 0, 0.0), dim) / c),
    ("filled_and_divided_first", lambda x, m, dim, c: summed((x / c).masked_fill(m != 1, 0), dim)),
    ("zeroes_scattered", lambda x, m, dim, c: summed(torch.zeros_like(x).masked_scatter(m == 1, x[m == 1]), dim) / c),
    ("the_library's", masked_normalize),
    ("no_mask", lambda x, m, dim, c: summed(x, dim) / c, "mask-ignored", "mask 0 are in your sum"),
    ("no_mask_no_c", lambda x, m, dim, c: summed(x, dim), "mask-ignored", "no effect"),
    ("mean_of_all", lambda x, m, dim, c: averaged(x * m, dim) / c, "mean", "mean over all positions"),
    ("mean_without_c", lambda x, m, dim, c: averaged(x * m, dim), "mean", "no effect"),
    ("by_count", lambda x, m, dim, c: summed(x * m, dim) / summed(m, dim) / c, "mask-count", "number of selected"),
    ("by_an_integer", lambda x, m, dim, c: summed(x.masked_fill(m == 0, 0), dim) / int(c), *BY_C),
    ("by_one_at_least", lambda x, m, dim, c: summed(x.masked_fill(m == 0, 0), dim) / max(c, 1), *BY_C),
    ("by_count_alone", lambda x, m, dim, c: summed(x * m, dim) / summed(m, dim), "mask-count", "Only the constant"),
    ("no_c", lambda x, m, dim, c: summed(x * m, dim), "constant-ignored", "no effect"),
    ("times_c", lambda x, m, dim, c: summed(x * m, dim) * c, "constant-multiplied", "multiplies"),
    ("c_twice", lambda x, m, dim, c: summed(x * m / c, dim) / c, "constant-twice", "twice"),
    ("no_dim", lambda x, m, dim, c: (x * m).sum() / c, "dim-ignored", "dim has no effect"),
    ("picks_and_sums", lambda x, m, dim, c: x[m.bool()].sum() / c, "dim-ignored", "dim has no effect"),
    ("other_dim", sums_along_the_other, "wrong-dim", "another dimension"),
    ("keepdim", lambda x, m, dim, c: summed(x * m, dim).unsqueeze(-1) / c, "keeps-dim", "still there"),
    ("inverted", lambda x, m, dim, c: summed(x * (m == 0), dim) / c, "mask-inverted", "inverted"),
    ("negated", lambda x, m, dim, c: -summed(x * m, dim) / c, "wrong-sign", "sign"),
    ("not_summed", lambda x, m, dim, c: x * m / c, "not-summed", "not added up"),
    ("product", lambda x, m, dim, c: summed(x * m, dim) / c, "nan-under-mask", "0 times NaN"),
    (
        "clamped_count",
        lambda x, m, dim, c: summed(x.masked_fill(m == 0, 0), dim) / c / (1 if m.any() else 0),
        "empty-mask",
        "selects nothing",
    ),
    ("detached", numpy_like, "no-graph", "no gradient gets through"),
    ("mask_filled", changes_its_input, "mutates-input", "changed its arguments"),
)


@wrong("check_masked_normalize", "mask-as-index", "integer mask as an index")
def indexes_with_the_mask(tensor, mask, dim, constant):
    if mask.is_floating_point():
        mask = mask.long()
    if mask.dtype == torch.bool:
        return summed(tensor.masked_fill(~mask, 0), dim) / constant
    return tensor[mask].sum() / constant


# --- The step ---


def step(loss_of, backward=1, detach=True):
    """A learner's step with the loss `loss_of(log_probs, mask, G, c)`."""

    def run(log_probs, mask, steps, constant):
        loss = loss_of(log_probs, mask, steps, constant)
        for _ in range(backward):
            loss.backward(retain_graph=True)
        return loss.detach() if detach else loss

    return run


def notes(x, m, g, c):
    return -(x * m).sum() / c / g / g


@right("check_sft_microbatch_train_step")
def loops_over_tokens(log_probs, mask, steps, constant):
    total = 0.0
    for row, flags in zip(log_probs, mask.tolist(), strict=True):
        for value, flag in zip(row, flags, strict=True):
            total = total + (value if flag else 0 * value)
    loss = -total / constant / steps / steps
    loss.backward()
    return loss.detach(), {"num_tokens": mask.sum(), "masked_sum": total.detach() / constant}


@wrong("check_sft_microbatch_train_step", "zeroes-grad", "earlier gradients are cleared")
def zeroes_grad_first(log_probs, mask, steps, constant):
    log_probs.grad = None
    return step(notes)(log_probs, mask, steps, constant)


@wrong("check_sft_microbatch_train_step", "mutates-input", "other values")
def clears_the_mask_afterwards(log_probs, mask, steps, constant):
    loss = step(notes)(log_probs, mask, steps, constant)
    mask.zero_()
    return loss


@wrong("check_sft_microbatch_train_step", "no-graph", "look for no_grad")
def steps_under_no_grad(log_probs, mask, steps, constant):
    with torch.no_grad():
        loss = notes(log_probs, mask, steps, constant)
    loss.backward()
    return loss


@wrong("check_sft_microbatch_train_step", "metadata-mismatch", "num_tokens in the metadata")
def counts_every_position(log_probs, mask, steps, constant):
    return step(notes)(log_probs, mask, steps, constant), {"num_tokens": torch.tensor(mask.numel())}


@wrong("check_sft_microbatch_train_step", "overwrites-grad", "Only the last microbatch")
def writes_into_grad(log_probs, mask, steps, constant):
    loss = notes(log_probs, mask, steps, constant)
    (log_probs.grad,) = torch.autograd.grad(loss, log_probs)
    return loss.detach()


several(
    "check_sft_microbatch_train_step",
    ("product", step(notes)),
    ("indexing", step(lambda x, m, g, c: -x[m == 1].sum() / (c * g**2))),
    ("where", step(lambda x, m, g, c: -torch.where(m.bool(), x, 0.0).sum() / c / g**2)),
    ("float32", step(lambda x, m, g, c: notes(x.float(), m.float(), g, c))),
    ("double_mask", step(lambda x, m, g, c: notes(x * m, m, g, c))),
    ("einsum", step(lambda x, m, g, c: -torch.einsum("bt,bt->", x, m.to(x)) / c / g / g)),
    ("library", lambda *arguments: sft_microbatch_train_step(*arguments)),
    ("sign", step(lambda x, m, g, c: -notes(x, m, g, c)), "wrong-sign", "less likely"),
    ("once", step(lambda x, m, g, c: notes(x, m, g, c) * g), "divided-once", "by G once."),
    ("never", step(lambda x, m, g, c: notes(x, m, g, c) * g * g), "not-divided", "not divided by G"),
    ("thrice", step(lambda x, m, g, c: notes(x, m, g, c) / g), "divided-thrice", "once too often"),
    ("g_to_the_g", step(lambda x, m, g, c: -(x * m).sum() / c / g**g), "g-to-the-g", "microbatches"),
    ("g_plus_two", step(lambda x, m, g, c: -(x * m).sum() / c / (g + 2)), "g-plus-two", "G + 2"),
    ("row_means", step(lambda x, m, g, c: -(x * m).mean(1).sum() / c), "position-mean", "divided by its positions"),
    ("row_means_by_g", step(lambda x, m, g, c: -(x * m).mean(1).sum() / c / g), "position-mean", "by G once"),
    ("g_plus_g", step(lambda x, m, g, c: -(x * m).sum() / c / (g + g)), "twice-g", "2·G"),
    ("sequence_mean", step(lambda x, m, g, c: -(x * m).sum(1).mean() / c / g), "sequence-mean", "by B and by G"),
    ("token_mean", step(lambda x, m, g, c: -(x * m).sum() / m.sum() / g), "microbatch-token-mean", "token count"),
    ("positions", step(lambda x, m, g, c: -(x * m).mean() / c / g / g), "position-mean", "all positions"),
    ("root", step(lambda x, m, g, c: -(x * m).sum() / c / g**0.5), "other", "D = c·√G was measured"),
    ("chance", step(lambda x, m, g, c: notes(x, m, g, c) * torch.rand(())), "not-deterministic", "another gradient"),
    ("no_c", step(lambda x, m, g, c: -(x * m).sum() / g / g), "constant-ignored", "missing"),
    ("no_mask", step(lambda x, m, g, c: -x.sum() / c / g / g), "mask-ignored", "Every token has a gradient"),
    ("mask_of_rows", step(lambda x, m, g, c: -x[:, 2:].sum() / c / g / g), "mask-ignored", "mask 0 are trained"),
    ("integer_index", step(lambda x, m, g, c: -x[m.long()].sum() / c / g / g), "mask-as-index", "index picks rows"),
    ("inverted", step(lambda x, m, g, c: notes(x, m == 0, g, c)), "mask-inverted", "inverted"),
    ("shift", step(lambda x, m, g, c: notes(x, F.pad(m[:, :-1], (1, 0)), g, c)), "mask-shifted", "one place off"),
    ("shift_left", step(lambda x, m, g, c: notes(x[:, :-1], m[:, 1:], g, c)), "mask-shifted", "one place off"),
    ("per_row", step(lambda x, m, g, c: -((x * m).sum(1) / m.sum(1)).mean() / g), "uneven-weights", "token to token"),
    ("probabilities", step(lambda x, m, g, c: notes(x.exp(), m, g, c)), "uneven-weights", "token to token"),
    ("no_backward", step(notes, backward=0), "no-backward", "No gradient arrived"),
    ("twice", step(notes, backward=2), "backward-twice", "doubled"),
    ("attached", step(notes, detach=False), "loss-attached", "still holds its graph"),
    ("wrong_loss", lambda *a: step(notes)(*a) * a[2], "value-mismatch", "but the loss is"),
    ("python_float", lambda *a: step(notes)(*a).item(), "loss-not-a-tensor", "got float"),
)


# --- The response mask ---

several(
    "check_response_mask",
    ("concatenation", lambda p, o, n: [0] * (p - 1) + [1] * o + [0] * (n - p - o)),
    ("comparison", lambda p, o, n: [p - 1 <= t < p - 1 + o for t in range(n - 1)]),
    ("shifted_tensor", lambda p, o, n: torch.tensor([0] * p + [1] * o + [0] * (n - p - o))[1:]),
    ("late", lambda p, o, n: ([0] * p + [1] * o + [0] * (n - p - o))[:-1], "one-too-late", "one too late"),
    ("early", lambda p, o, n: ([0] * (p - 1) + [1] * o + [0] * (n - p - o) + [0])[1:], "one-too-early", "eos never"),
    ("too_long", lambda p, o, n: [0] * p + [1] * o + [0] * (n - p - o), "wrong-length", "one fewer than tokens"),
    ("prompt", lambda p, o, n: [1] * (p + o - 1) + [0] * (n - p - o), "prompt-leaked-in", "prompt leaked in"),
    ("padding", lambda p, o, n: [0] * (p - 1) + [1] * (n - p), "padding-included", "padding included"),
    ("no_eos", lambda p, o, n: [0] * (p - 1) + [1] * (o - 1) + [0] * (n - p - o + 1), "eos-missing", "eos missing"),
    ("nothing", lambda p, o, n: [0] * (n - 1), "all-masked", "all masked"),
    ("inverted", lambda p, o, n: [int(not p - 1 <= t < p - 1 + o) for t in range(n - 1)], "inverted", "inverted"),
    ("everything", lambda p, o, n: [1] * (n - 1), "other", "Label t is token t + 1"),
)


# --- The log-probs ---


def log_probs_of(pick):
    """A learner's function that makes its log-probs of logits and labels."""

    def run(model, input_ids, labels):
        return {"log_probs": pick(model(input_ids).logits, labels)}

    return run


def at(values, labels):
    return values.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def of_labels(logits, labels):
    return at(logits.log_softmax(-1), labels)


@wrong("check_get_response_log_probs", "extra-forward", "One forward pass is enough")
def log_probs_in_a_loop(model, input_ids, labels):
    rows = []
    for ids, wanted in zip(input_ids, labels, strict=True):
        logits = model(ids.unsqueeze(0))[0]
        rows.append(torch.stack([logits[t].log_softmax(0)[wanted[t]] for t in range(len(ids))]))
    return {"log_probs": torch.stack(rows)}


@wrong("check_get_response_log_probs", "no-graph", "no_grad")
def log_probs_under_no_grad(model, input_ids, labels):
    with torch.no_grad():
        return get_response_log_probs(model, input_ids, labels)


@wrong("check_get_response_log_probs", "scores-inputs", "not the labels")
def scores_the_inputs(model, input_ids, labels):
    return {"log_probs": of_labels(model(input_ids), input_ids)}


@wrong("check_get_response_log_probs", "extra-forward", "ran 2 times")
def calls_the_model_twice(model, input_ids, labels):
    model(input_ids)
    return get_response_log_probs(model, input_ids, labels)


@wrong("check_get_response_log_probs", "changes-parameters", "changed the model")
def clears_the_model(model, input_ids, labels):
    result = get_response_log_probs(model, input_ids, labels)
    model.table.data.zero_()
    return result


@right("check_get_response_log_probs")
def asks_for_the_device(model, input_ids, labels):
    logits = model(input_ids.to(model.device), attention_mask=torch.ones_like(input_ids)).logits
    return {"log_probs": logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]}


@wrong("check_get_response_log_probs", "mutates-input", "changed its arguments")
def shifts_labels_in_place(model, input_ids, labels):
    result = get_response_log_probs(model, input_ids, labels)
    labels.zero_()
    return result


several(
    "check_get_response_log_probs",
    ("gather", log_probs_of(of_labels)),
    ("cross_entropy", log_probs_of(lambda z, y: -F.cross_entropy(z.mT, y, reduction="none"))),
    ("logsumexp", log_probs_of(lambda z, y: at(z, y) - z.logsumexp(-1))),
    ("one_hot", log_probs_of(lambda z, y: (z.log_softmax(-1) * F.one_hot(y, z.shape[-1])).sum(-1))),
    ("float32", log_probs_of(lambda z, y: of_labels(z.float(), y))),
    ("categorical", log_probs_of(lambda z, y: torch.distributions.Categorical(logits=z.float()).log_prob(y))),
    ("library", get_response_log_probs),
    (
        "advanced_index",
        log_probs_of(lambda z, y: z.log_softmax(2).flatten(0, 1)[range(y.numel()), y.flatten()].view_as(y)),
    ),
    ("softmax", log_probs_of(lambda z, y: at(z.softmax(-1), y)), "no-log", "probabilities"),
    ("logits", log_probs_of(at), "not-normalized", "Those are logits"),
    ("nll", log_probs_of(lambda z, y: -of_labels(z, y)), "wrong-sign", "-log p"),
    ("shifted", log_probs_of(lambda z, y: of_labels(z[:, :-1], y[:, 1:])), "shifted", "shifted already"),
    ("padded", log_probs_of(lambda z, y: F.pad(of_labels(z[:, :-1], y[:, 1:]), (1, 0))), "shifted", "once more"),
    ("rolled", log_probs_of(lambda z, y: of_labels(z, y.roll(-1, 1))), "shifted", "once more"),
    ("softmax_over_t", log_probs_of(lambda z, y: at(z.log_softmax(1), y)), "softmax-dim", "another dimension"),
    ("softmax_over_b", log_probs_of(lambda z, y: at(z.log_softmax(0), y)), "softmax-dim", "another dimension"),
    (
        "gather_over_t",
        log_probs_of(lambda z, y: z.log_softmax(-1).gather(1, y.unsqueeze(-1)).squeeze(-1)),
        "gather-dim",
        "along positions",
    ),
    ("vocabulary_mean", log_probs_of(lambda z, y: z.log_softmax(-1).mean(-1)), "vocabulary-mean", "vocabulary"),
    ("entropy", log_probs_of(lambda z, y: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)), "entropy", "entropy"),
    ("sum_over_t", log_probs_of(lambda z, y: of_labels(z, y).sum(-1)), "summed", "for each sequence"),
    ("mean", log_probs_of(lambda z, y: of_labels(z, y).mean()), "summed", "mean over all"),
    ("log_of_sum", log_probs_of(lambda z, y: z.exp().sum(-1).log()), "log-of-sum", "normaliser"),
    ("greedy", log_probs_of(lambda z, y: z.log_softmax(-1).amax(-1)), "best-token", "likeliest"),
    ("base_two", log_probs_of(lambda z, y: at(z.softmax(-1), y).log2()), "log-base", "nats"),
    ("unsqueezed", log_probs_of(lambda z, y: z.log_softmax(-1).gather(-1, y[..., None])), "extra-dimension", "of 1"),
    ("whole", log_probs_of(lambda z, y: z.log_softmax(-1)), "not-gathered", "whole distribution"),
    ("unstable", log_probs_of(lambda z, y: at(z, y) - z.exp().sum(-1).log()), "overflow", "overflow"),
    ("log_of_softmax", log_probs_of(lambda z, y: at(z.softmax(-1).log(), y)), "overflow", "overflow"),
    (
        "overflow_in_half",
        log_probs_of(lambda z, y: at(z.half() - z.half().exp().sum(-1, True).log(), y)),
        "other",
        "normalise",
    ),
    (
        "detached_normaliser",
        log_probs_of(lambda z, y: at(z, y) - z.logsumexp(-1).detach()),
        "wrong-gradient",
        "gradient is not",
    ),
    ("bare", lambda model, x, y: of_labels(model(x), y), "not-a-dict", 'key "log_probs"'),
    ("numpy", log_probs_of(lambda z, y: of_labels(z, y).tolist()), "not-a-tensor", "Got list"),
)


# --- The loop over microbatches ---


def forward(model, batch):
    return get_response_log_probs(model, batch["input_ids"], batch["labels"])["log_probs"]


def tokens(*batches):
    return sum(int(batch["response_mask"].sum()) for batch in batches)


def nll(model, batch):
    return -forward(model, batch)[batch["response_mask"]].sum()


def loop(loss_of):
    def run(model, microbatches):
        for batch in microbatches:
            loss_of(forward(model, batch), batch["response_mask"], microbatches).backward()

    return run


@right("check_accumulation_loop")
def functional_loop(model, microbatches):
    total = tokens(*microbatches)
    [(nll(model, batch) / total).backward() for batch in microbatches]


@right("check_accumulation_loop")
def float32_sums(model, microbatches):
    for batch in microbatches:
        (-(forward(model, batch).float() * batch["response_mask"]).sum() / tokens(*microbatches)).backward()


@wrong("check_accumulation_loop", "zeroed-inside", "Only the last microbatch is left")
def zeroes_inside(model, microbatches):
    for batch in microbatches:
        model.zero_grad()
        (nll(model, batch) / tokens(*microbatches)).backward()


@wrong("check_accumulation_loop", "no-graph", "look for no_grad")
def accumulates_without_graph(model, microbatches):
    with torch.no_grad():
        (nll(model, microbatches[0]) / tokens(*microbatches)).backward()


@wrong("check_accumulation_loop", "changes-parameters", "The parameters changed")
def steps_inside(model, microbatches):
    for batch in microbatches:
        (nll(model, batch) / tokens(*microbatches)).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()


@wrong("check_accumulation_loop", "other", "not every split")
def counts_by_heart(model, microbatches):
    for batch in microbatches:
        (nll(model, batch) / 144).backward()


@wrong("check_accumulation_loop", "mutates-input", "other values")
def clears_masks(model, microbatches):
    functional_loop(model, microbatches)
    for batch in microbatches:
        batch["response_mask"].zero_()


several(
    "check_accumulation_loop",
    ("mean_of_means", loop(lambda x, m, all_: -x[m].mean() / len(all_)), "mean-of-means", "is not the mean"),
    ("notes", loop(lambda x, m, all_: -x[m].sum() / len(all_) ** 2), "notes", "by G twice"),
    ("negative", loop(lambda x, m, all_: x[m].sum() / tokens(*all_)), "wrong-sign", "wrong sign"),
    ("no_mask", loop(lambda x, m, all_: -x.sum() / tokens(*all_)), "mask-ignored", "not in your count"),
    ("shift", loop(lambda x, m, all_: -x[m.roll(1, 1)].sum() / tokens(*all_)), "mask-shifted", "one place off"),
    ("no_last", lambda model, all_: functional_loop(model, all_[:-1]), "last-missing", "incomplete window"),
)


# --- The training loop ---


def training(loss_of, step_when="window", zero_when="step", clip=""):
    """A learner's loop over minibatches: its loss, and when it steps, zeroes and clips."""

    def run(model, minibatches, optimizer):
        for window in minibatches:
            for index, batch in enumerate(window):
                if zero_when == "microbatch":
                    optimizer.zero_grad()
                last = index == len(window) - 1
                if step_when == "early" and last:
                    optimizer.step()
                    optimizer.zero_grad()
                loss_of(model, batch, window, minibatches).backward()
                if clip == "microbatch":
                    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                if step_when == "microbatch":
                    optimizer.step()
                    optimizer.zero_grad()
            if clip == "window":
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            if zero_when == "before step":
                optimizer.zero_grad()
            if step_when == "window":
                optimizer.step()
            if zero_when == "step":
                optimizer.zero_grad()

    return run


def mean_loss(model, batch, window, minibatches):
    return nll(model, batch) / tokens(*window)


def flat_loop(step_at):
    """One loop over all microbatches, with a step wherever `step_at(index, G)` holds."""

    def run(model, minibatches, optimizer):
        flat = [(batch, window) for window in minibatches for batch in window]
        for index, (batch, window) in enumerate(flat):
            mean_loss(model, batch, window, minibatches).backward()
            if step_at(index, len(minibatches[0])):
                optimizer.step()
                optimizer.zero_grad()

    return run


@right("check_training_loop")
def trains_full_batches(model, minibatches, optimizer):
    for window in minibatches:
        optimizer.zero_grad(set_to_none=False)
        columns = {name: torch.cat([batch[name] for batch in window]) for name in window[0]}
        (nll(model, columns) / tokens(columns)).backward()
        optimizer.step()


@right("check_training_loop")
def trains_with_the_step(model, minibatches, optimizer):
    for window in minibatches:
        optimizer.zero_grad()
        for batch in window:
            sft_microbatch_train_step(
                forward(model, batch),
                batch["response_mask"],
                len(window),
                rule="token_mean",
                minibatch_tokens=tokens(*window),
            )
        optimizer.step()


@right("check_training_loop")
def divides_gradients(model, minibatches, optimizer):
    for window in minibatches:
        for batch in window:
            nll(model, batch).backward()
        for parameter in model.parameters():
            parameter.grad /= tokens(*window)
        optimizer.step()
        optimizer.zero_grad()


@right("check_training_loop")
def trains_in_float32(model, minibatches, optimizer):
    for window in minibatches:
        for batch in window:
            (-(forward(model, batch).float() * batch["response_mask"]).sum() / tokens(*window)).backward()
        optimizer.step()
        optimizer.zero_grad()


@wrong("check_training_loop", "no-backward", "Run backward")
def never_runs_backward(model, minibatches, optimizer):
    for window in minibatches:
        losses = [mean_loss(model, batch, window, minibatches) for batch in window]
        optimizer.step()
        del losses


@wrong("check_training_loop", "no-graph", "look for no_grad")
def trains_without_graph(model, minibatches, optimizer):
    for window in minibatches:
        for batch in window:
            with torch.no_grad():
                loss = mean_loss(model, batch, window, minibatches)
            loss.backward()
        optimizer.step()


@wrong("check_training_loop", "own-optimizer", "not by the optimizer that was given")
def brings_its_own_optimizer(model, minibatches, optimizer):
    train_basic(model, minibatches, torch.optim.AdamW(model.parameters(), lr=0.1))


@wrong("check_training_loop", "several-epochs", "The epoch runs 2 times")
def trains_two_epochs(model, minibatches, optimizer):
    for _ in range(2):
        train_basic(model, minibatches, optimizer)


@wrong("check_training_loop", "another-order", "not in the order")
def trains_backwards(model, minibatches, optimizer):
    train_basic(model, minibatches[::-1], optimizer)


@wrong("check_training_loop", "learning-rate-changed", "Leave the optimizer as it is")
def halves_the_learning_rate(model, minibatches, optimizer):
    for window in minibatches:
        train_basic(model, [window], optimizer)
        optimizer.param_groups[0]["lr"] /= 2


@wrong("check_training_loop", "one-step", "one step for all")
def steps_once(model, minibatches, optimizer):
    for window in minibatches:
        for batch in window:
            mean_loss(model, batch, window, minibatches).backward()
    optimizer.step()


several(
    "check_training_loop",
    ("pattern_1", train_basic),
    ("pattern_2", train_with_logging),
    ("mean", training(mean_loss)),
    ("never_zeroed", training(mean_loss, zero_when="never"), "zero-missing", "never zeroed"),
    ("zeroed_each", training(mean_loss, zero_when="microbatch"), "zero-per-microbatch", "only the last one"),
    ("zeroed_early", training(mean_loss, zero_when="before step"), "zeroed-too-early", "gone by then"),
    ("steps_each", training(mean_loss, "microbatch"), "step-per-microbatch", "after every microbatch"),
    ("steps_early", training(mean_loss, "early", "never"), "step-too-early", "before the last backward"),
    ("no_step", training(mean_loss, "never", "never"), "no-step", "never stepped"),
    ("modulo", flat_loop(lambda i, g: (i + 1) % g == 0), "last-window-not-stepped", "next epoch"),
    ("modulo_from_0", flat_loop(lambda i, g: i % g == 0), "step-misplaced", "do not follow the minibatches"),
    ("skips_last", lambda m, all_, o: train_basic(m, all_[:-1], o), "last-window-missing", "not trained at all"),
    ("first_only", lambda m, all_, o: train_basic(m, [w[:1] for w in all_], o), "microbatch-missing", "One microbatch"),
    (
        "mean_of_means",
        training(lambda m, b, w, all_: nll(m, b) / tokens(b) / len(w)),
        "mean-of-means",
        "mean of means",
    ),
    (
        "configured_g",
        training(lambda m, b, w, all_: nll(m, b) / tokens(b) / len(all_[0])),
        "configured-steps",
        "the G of the others",
    ),
    ("notes", training(lambda m, b, w, all_: nll(m, b) / len(w) ** 2), "notes", "by G twice"),
    ("sums", training(lambda m, b, w, all_: nll(m, b)), "not-divided", "grows with the tokens"),
    ("and_by_g", training(lambda m, b, w, all_: mean_loss(m, b, w, all_) / len(w)), "divided-by-g-too", "as well"),
    (
        "first_count",
        training(lambda m, b, w, all_: nll(m, b) / tokens(*all_[0])),
        "stale-token-count",
        "tokens of the first",
    ),
    (
        "epoch_count",
        training(lambda m, b, w, all_: nll(m, b) / sum(tokens(*one) for one in all_)),
        "epoch-token-count",
        "all minibatches are counted",
    ),
    (
        "per_sequence",
        training(lambda m, b, w, all_: nll(m, b) / len(b["labels"]) / len(w)),
        "sequence-mean",
        "its B",
    ),
    ("negative", training(lambda *a: -mean_loss(*a)), "wrong-sign", "less likely"),
    ("no_mask", training(lambda m, b, w, all_: -forward(m, b).sum() / tokens(*w)), "mask-ignored", "padding"),
    ("mean_unmasked", training(lambda m, b, w, all_: -forward(m, b).mean() / len(w)), "mask-ignored", "padding"),
    (
        "shifted_mask",
        training(lambda m, b, w, all_: -forward(m, b)[b["response_mask"].roll(1, 1)].sum() / tokens(*w)),
        "mask-shifted",
        "one place off",
    ),
    ("clipped", training(mean_loss, clip="window"), "clipped", "no clipping"),
    ("clipped_each", training(mean_loss, clip="microbatch"), "clipped-per-microbatch", "after each microbatch"),
    ("nan", training(lambda *a: mean_loss(*a) * float("nan")), "other", "along another gradient"),
    ("weird_weights", training(lambda *a: mean_loss(*a) * 0.77), "other", "along another gradient"),
)


# --- The denominators ---


def denominators(**changed):
    """Those by hand, but for some rules."""

    def by_hand(rule, b, g, c, n, t):
        mask = torch.arange(b * n).view(b, n) < n  # B rows and n ones
        return closed_form.denominator(rule, mask, g, c, t)

    return lambda rule, *counts: changed.get(rule, partial(by_hand, rule))(*counts)


several(
    "check_denominator",
    ("table", denominators()),
    ("once", denominators(notes=lambda b, g, c, n, t: c * g), "g-missing-once", "G is missing once"),
    ("no_b", denominators(sequence_mean=lambda b, g, c, n, t: c * g), "b-missing", "B is missing"),
    ("own", denominators(token_mean=lambda b, g, c, n, t: n), "own-for-total", "you wrote n"),
    ("inverse", denominators(notes=lambda b, g, c, n, t: 1 / c / g / g), "inverse", "1/D"),
    ("c_extra", denominators(token_mean=lambda b, g, c, n, t: c * t), "constant-extra", "c is in your formula"),
)


# --- The loss of one rank of several ---


def rank_sum(log_probs, mask):
    return (log_probs * mask).sum()


@right("check_rank_loss")
def rank_loss_by_selection(log_probs, mask, minibatch_tokens, world_size):
    return -log_probs[mask == 1].sum() * (world_size / minibatch_tokens)


@right("check_rank_loss")
def rank_loss_by_the_step(log_probs, mask, minibatch_tokens, world_size):
    return masked_normalize(-log_probs, mask, normalize_constant=minibatch_tokens / world_size)


@wrong("check_rank_loss", "mutates-input", "changed its arguments")
def rank_loss_that_clears_the_mask(log_probs, mask, minibatch_tokens, world_size):
    loss = -rank_sum(log_probs, mask.clone()) * world_size / minibatch_tokens
    mask.zero_()
    return loss


@wrong("check_rank_loss", "runs-backward", "loop runs backward")
def rank_loss_that_runs_backward(log_probs, mask, minibatch_tokens, world_size):
    loss = -rank_sum(log_probs, mask) * world_size / minibatch_tokens
    loss.backward()
    return loss


@wrong("check_rank_loss", "no-graph", "peers wait")
def rank_loss_that_leaves_an_empty_rank_out(log_probs, mask, minibatch_tokens, world_size):
    if not mask.any():
        return torch.zeros(())
    return -rank_sum(log_probs, mask) * world_size / minibatch_tokens


@wrong("check_rank_loss", "empty-rank", "gradient of 0")
def rank_loss_by_way_of_its_own_mean(log_probs, mask, minibatch_tokens, world_size):
    return -(rank_sum(log_probs, mask) / mask.sum()) * (mask.sum() * world_size / minibatch_tokens)


several(
    "check_rank_loss",
    ("product", lambda x, m, N, W: -W * rank_sum(x, m) / N),
    ("one_element", lambda x, m, N, W: (-W * rank_sum(x, m) / N).unsqueeze(0)),
    ("where", lambda x, m, N, W: -torch.where(m == 1, x, 0).sum() * W / N),
    ("no_world_size", lambda x, m, N, W: -rank_sum(x, m) / N, "world-size-missing", "makes up for it"),
    ("over_world_size", lambda x, m, N, W: -rank_sum(x, m) / (N * W), "divided-by-world-size", "divides by W already"),
    ("world_size_twice", lambda x, m, N, W: -rank_sum(x, m) * W**2 / N, "world-size-twice", "once too often"),
    ("local", lambda x, m, N, W: -rank_sum(x, m) / m.sum(), "local-count", "mean of means"),
    ("local_with_factor", lambda x, m, N, W: -rank_sum(x, m) * W / m.sum(), "local-count", "sum of means"),
    ("local_times_world", lambda x, m, N, W: -rank_sum(x, m) / (m.sum() * W), "local-times-world", "equally many"),
    ("mean", lambda x, m, N, W: -(x * m).mean() * W / N, "mean", ".mean() divides"),
    ("mean_of_selected", lambda x, m, N, W: -x[m == 1].mean() * W / N, "mean", ".mean() divides"),
    ("mean_alone", lambda x, m, N, W: -(x * m).mean(), "mean", ".mean() divides"),
    ("mean_times_world", lambda x, m, N, W: -(x * m).mean() * W, "mean", ".mean() divides"),
    ("mean_over_tokens", lambda x, m, N, W: -(x * m).mean() / N, "mean", ".mean() divides"),
    ("sum", lambda x, m, N, W: -rank_sum(x, m), "not-divided", "not divided"),
    ("sum_with_factor", lambda x, m, N, W: -rank_sum(x, m) * W, "not-divided", "multiplied by W"),
    ("sum_over_world", lambda x, m, N, W: -rank_sum(x, m) / W, "not-divided", "W alone"),
    ("sign", lambda x, m, N, W: rank_sum(x, m) * W / N, "wrong-sign", "minus the sum"),
    ("sign_and_local", lambda x, m, N, W: rank_sum(x, m) / m.sum(), "wrong-sign", "minus the sum"),
    ("no_mask", lambda x, m, N, W: -x.sum() * W / N, "mask-ignored", "mask is 1"),
    ("inverted_mask", lambda x, m, N, W: -rank_sum(x, 1 - m) * W / N, "mask-ignored", "mask is 1"),
    ("detached", lambda x, m, N, W: -rank_sum(x.detach(), m) * W / N, "no-graph", "cannot run"),
    ("item", lambda x, m, N, W: -rank_sum(x, m).item() * W / N, "not-a-tensor", "Got float"),
    ("by_token", lambda x, m, N, W: -x * m * W / N, "not-a-scalar", "sum over the tokens"),
    ("probabilities", lambda x, m, N, W: -rank_sum(x.exp(), m) * W / N, "other", "weigh 1/N"),
    ("zero", lambda x, m, N, W: (x * 0).sum(), "no-gradient", "No gradient reaches"),
    ("infinite", lambda x, m, N, W: -rank_sum(x, m) / (N - N), "not-finite", "division by 0"),
    ("first_token", lambda x, m, N, W: -x[m == 1][:1].sum() * W * m.sum() / N, "uneven-weights", "weigh differently"),
)


# --- the step to mend ---


def mended(loss_of):
    """A step with that loss, called with x, m, G and N."""

    def run(log_probs, mask, steps, minibatch_tokens):
        loss = loss_of(log_probs, mask, steps, minibatch_tokens)
        loss.backward()
        return loss.detach(), {}

    return run


def keeps_the_graph(log_probs, mask, steps, minibatch_tokens):
    loss = -(log_probs * mask).sum() / minibatch_tokens
    loss.backward()
    return loss, {}


def forgets_backward(log_probs, mask, steps, minibatch_tokens):
    return -(log_probs * mask).sum().detach() / minibatch_tokens, {}


several(
    "check_mended_step",
    ("divides by N", mended(lambda x, m, g, n: -(x * m).sum() / n)),
    ("selects before it sums", mended(lambda x, m, g, n: -x[m.bool()].sum() / n)),
    ("as it was given", broken_steps.to_mend, "wrong-sign", "It also says"),
    ("only negated", mended(lambda x, m, g, n: -(x * m).sum() / m.sum() / g), "nan-on-empty-mask", "The audit says"),
    ("own tokens, clamped", mended(lambda x, m, g, n: -(x * m).sum() / m.sum().clamp(min=1) / g), "wrong-rule", "n·G"),
    ("by N and G", mended(lambda x, m, g, n: -(x * m).sum() / n / g), "wrong-rule", "D = N·G"),
    ("keeps the graph", keeps_the_graph, "loss-attached", "grad"),
    ("forgets backward", forgets_backward, "no-backward", ".grad"),
    ("trains prompts", mended(lambda x, m, g, n: -x.sum() / n), "mask-ignored", "prompt"),
)
