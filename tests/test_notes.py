"""The statements of the course notes: the numbers that hold, and the twelve errata.

Each erratum asserts what is true and, in the same test, that the statement of the notes is not.
Equality is decided in float64: 1e-14, for gradients relative in the L2 norm. What must be exact is compared with `==`.
"""

import gc
import warnings
import weakref
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch.nn import functional as F

import sft_edu
from sft_edu import Trace, closed_form, masked_normalize, sft_microbatch_train_step

near = partial(pytest.approx, rel=1e-14, abs=1e-14)
allow_positive = pytest.mark.filterwarnings("ignore::sft_edu.PositiveLogProbWarning")

LOG_PROBS, MASK = [[-0.5, -0.3, -0.8, -0.2], [-0.4, -0.6, -0.3, -0.5]], [[1, 1, 0, 1], [1, 1, 1, 1]]
LOG_PROBS_2, MASK_2 = [[1.0, 0.5, -0.3, -0.8], [0.2, -0.4, -0.6, -0.2]], [[1, 1, 0, 1], [1, 1, 1, 0]]


def leaf(values):
    return torch.as_tensor(values, dtype=torch.float64).detach().clone().requires_grad_()


def example(log_probs=LOG_PROBS, mask=MASK):
    """Run an example of the notes, at G = 2 and c = 1: the gradient, the loss, the metadata and the trace."""
    log_probs, trace = leaf(log_probs), Trace()
    mask = torch.tensor(mask, dtype=torch.bool)
    loss, metadata = sft_microbatch_train_step(log_probs, mask, 2, 1.0, tap=trace)
    return log_probs.grad, loss, metadata, trace


def tiny_model():
    return sft_edu.TinyLM(d_model=16, num_layers=1, num_heads=2, context_length=32).double()


def minibatch(size):
    """Sequences whose responses have 1 to 11 tokens, tokenized together."""
    outputs = ["the quick brown fox"[i % 7 :][: 1 + 5 * i % 11] for i in range(size)]
    prompts = [f"say {i}:" for i in range(size)]
    return sft_edu.tokenize_prompt_and_output(prompts, outputs, sft_edu.ByteTokenizer())


def split(batch, steps):
    """The microbatches, all of one size."""
    parts = [value.split(len(value) // steps) for value in batch.values()]
    return [dict(zip(batch, part, strict=True)) for part in zip(*parts, strict=True)]


def forward(model, batch):
    return sft_edu.get_response_log_probs(model, batch["input_ids"], batch["labels"])["log_probs"]


def step(model, batch, steps, constant=1.0, **options):
    return sft_microbatch_train_step(forward(model, batch), batch["response_mask"], steps, constant, **options)


def total(model, batch):
    """L = -(sum of log-probs under the mask), independent of the step."""
    return -forward(model, batch)[batch["response_mask"]].sum()


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def flat_grad(model):
    return flat(parameter.grad for parameter in model.parameters())


def grad_total(model, batch):
    """dL / d parameters, independent of the step."""
    return flat(torch.autograd.grad(total(model, batch), list(model.parameters())))


def accumulate(model, microbatches, steps=None, **options):
    """The gradient after one step per microbatch. G is their number unless `steps` says other."""
    model.zero_grad()
    for batch in microbatches:
        step(model, batch, steps or len(microbatches), **options)
    return flat_grad(model)


def error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def basic_loop(model, optimizer, microbatches, steps):
    """Pattern 1 of the notes, with its unused forward pass and its test for the end of a window."""
    for index, batch in enumerate(microbatches):
        outputs = model(batch["input_ids"])  # noqa: F841
        loss, _ = step(model, batch, steps)
        if (index + 1) % steps == 0:
            optimizer.step()
            optimizer.zero_grad()
        print(f"Microbatch {index}, Loss: {loss.item():.4f}")


@contextmanager
def held_for_backward(model, batch):
    """Yields a function: the bytes that autograd holds at this moment, besides the parameters and the batch."""
    alive = weakref.WeakSet()
    given = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *batch.values())}

    class Saved:
        def __init__(self, tensor):
            self.storage, self.tensor = tensor.untyped_storage(), tensor.detach()
            alive.add(self)

    def held():
        gc.collect()
        sizes = {saved.storage.data_ptr(): saved.storage.nbytes() for saved in alive}
        return sum(size for pointer, size in sizes.items() if pointer not in given)

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        yield held


# --- The two examples, stage by stage ---


@allow_positive
@pytest.mark.parametrize(
    ("stage", "first", "second"),
    [
        ("num_tokens", 7, 6),
        ("masked_sum", -2.8, -0.1),
        ("loss", 2.8 / 2, 0.1 / 2),
        ("loss", 1.4, 0.05),
        ("scaled_loss", 1.4 / 2, 0.05 / 2),
        ("scaled_loss", 0.7, 0.025),
    ],
)
def test_stage(stage, first, second):
    """The notes give these numbers for the worked example, and in the trace of the second one. True."""
    for inputs, expected in (((LOG_PROBS, MASK), first), ((LOG_PROBS_2, MASK_2), second)):
        assert example(*inputs)[3][stage].item() == near(expected)


def test_masked_values():
    """The notes say: the mask, of dtype bool, turns the one -0.8 into 0 and keeps 3 + 4 values. True."""
    mask = example()[3]["response_mask"]
    assert (mask.dtype, mask.sum(1).tolist()) == (torch.bool, [3, 4])
    terms = masked_normalize(leaf([LOG_PROBS]), mask[None], dim=0)  # a sum over a size of 1 shows its terms
    assert terms.tolist() == [[-0.5, -0.3, 0.0, -0.2], [-0.4, -0.6, -0.3, -0.5]]


@allow_positive
def test_gradient_matrices():
    """The notes say: -1 / 2**2 = -0.25 at response tokens, 0 elsewhere, in both examples. True, and exact."""
    assert example()[0].tolist() == [[-0.25, -0.25, 0.0, -0.25], [-0.25, -0.25, -0.25, -0.25]]
    second = example(LOG_PROBS_2, MASK_2)[0]
    assert second.tolist() == [[-0.25, -0.25, 0.0, -0.25], [-0.25, -0.25, -0.25, 0.0]]


def test_return_values():
    """The notes say: 0.7 comes back, detached, and with it num_tokens 7 and masked_sum -2.8. True."""
    _, loss, metadata, _ = example()
    assert (loss.item(), loss.shape, loss.requires_grad) == (near(0.7), torch.Size([]), False)
    assert (metadata["num_tokens"].item(), metadata["masked_sum"].item()) == (7, near(-2.8))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 32])
def test_key_equation(steps):
    """The notes say: loss = -(masked_sum / G) / G, so a gradient of -1/G**2. True for every G, to the bit."""
    log_probs, by_hand, mask = leaf(LOG_PROBS), leaf(LOG_PROBS), torch.tensor(MASK)
    expected = -(masked_normalize(by_hand, mask) / steps) / steps
    expected.backward()
    assert sft_microbatch_train_step(log_probs, mask, steps)[0].item() == expected.item()
    assert torch.equal(log_probs.grad, by_hand.grad)
    assert error(log_probs.grad, closed_form.grad_log_probs(mask, steps**2, torch.float64)) < 1e-14


def test_only_response_tokens_contribute():
    """The notes say: prompt and padding are ignored. True: the logits there get a gradient of exactly 0."""
    batch = minibatch(5)
    mask, logits = batch["response_mask"], leaf(tiny_model()(batch["input_ids"]))
    step(lambda _: logits, batch, 3)
    assert logits.grad[~mask].abs().max() == 0
    assert error(logits.grad, closed_form.grad_logits(logits, batch["labels"], mask, 9)) < 1e-14


# --- Several microbatches ---


def test_accumulation_adds():
    """The notes say: after microbatch 2, `policy_log_probs.grad` is grad1 + grad2.

    True of what the microbatches share, the parameters. Not of the two tensors in the notes: each keeps its own.
    """
    model, batches = tiny_model(), split(minibatch(6), 2)
    grad1, grad2 = (accumulate(model, [batch], steps=2) for batch in batches)
    assert error(accumulate(model, batches), grad1 + grad2) < 1e-14
    first, second, mask = leaf(LOG_PROBS), leaf(LOG_PROBS), torch.tensor(MASK)
    for log_probs, expected in ((first, -0.25), (second, -0.25), (first, -0.5)):
        sft_microbatch_train_step(log_probs, mask, 2)
        assert torch.equal(log_probs.grad, expected * mask)


def test_minibatch_of_32():
    """The notes say: 32 = 4 x 8, samples 0-7, 8-15, 16-23, 24-31; update after the fourth; then zero. True."""
    model, batch, expected = tiny_model(), minibatch(32), 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, batches = flat(model.parameters()), split(batch, 4)
    for microbatch, (first, last) in zip(batches, ((0, 7), (8, 15), (16, 23), (24, 31)), strict=True):
        samples = {name: value[first : last + 1] for name, value in batch.items()}
        expected = expected + grad_total(model, samples) / 4**2
        step(model, microbatch, 4)
        assert error(flat_grad(model), expected) < 1e-14
        assert torch.equal(flat(model.parameters()), before)
    optimizer.step()
    assert error(before - flat(model.parameters()), 0.1 * expected) < 1e-13  # the subtraction rounds as well
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_scaling_of_two_losses():
    """The notes say: 0.5 / 2 = 0.25 and 0.6 / 2 = 0.3 accumulate (grad1 + grad2) / 2; unscaled, grad1 + grad2.

    True of one division, the rule `microbatch_mean`. The step of the notes makes it 0.125, 0.15 and a quarter.
    """

    def run(steps, **options):
        theta, mask = leaf([[1.0]]), torch.ones(1, 1)  # the losses are 0.5 theta and 0.6 theta
        losses = [sft_microbatch_train_step(x * theta, mask, steps, **options)[0] for x in (-0.5, -0.6)]
        return [*(loss.item() for loss in losses), theta.grad.item()]

    assert run(2, rule="microbatch_mean") == near([0.25, 0.3, (0.5 + 0.6) / 2])
    assert run(1) == near([0.5, 0.6, 0.5 + 0.6])
    assert run(2) == near([0.125, 0.15, (0.5 + 0.6) / 4])


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_each_microbatch_contributes_one_over_g_squared(steps):
    """The notes say: each microbatch contributes 1/G**2 of its gradient, and these add up. True."""
    model, batches = tiny_model(), split(minibatch(12), steps)
    gradients = [grad_total(model, batch) for batch in batches]
    for batch, gradient in zip(batches, gradients, strict=True):
        assert error(accumulate(model, [batch], steps=steps), gradient / steps**2) < 1e-14
    assert error(accumulate(model, batches), sum(gradients) / steps**2) < 1e-14


# --- The three loops: 8 microbatches, G = 4 ---


def test_basic_loop(capsys):
    """The notes say: update and zero every 4 microbatches, print each loss. True; AdamW at 1e-5, as they have it."""
    model, batches = tiny_model().train(), split(minibatch(24), 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    losses = [total(model, batch).item() / 4**2 for batch in batches[:4]]
    basic_loop(model, optimizer, batches, 4)
    lines = capsys.readouterr().out.splitlines()
    assert (len(lines), lines[:4]) == (8, [f"Microbatch {i}, Loss: {loss:.4f}" for i, loss in enumerate(losses)])
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_loop_with_logging():
    """The notes say: per minibatch, log the mean of the losses and the sum of the token counts. It runs."""
    model, metrics, logged = tiny_model(), {"loss": [], "num_tokens": []}, []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for index, batch in enumerate(split(minibatch(24), 8)):
        loss, metadata = step(model, batch, 4)
        metrics["loss"].append(loss.item())
        metrics["num_tokens"].append(metadata["num_tokens"].item())
        if (index + 1) % 4 == 0:
            logged.append((index // 4, sum(metrics["loss"][-4:]) / 4, sum(metrics["num_tokens"][-4:])))
            optimizer.step()
            optimizer.zero_grad()
    for number, window in enumerate(split(minibatch(24), 2)):
        tokens = window["response_mask"].sum().item()
        assert logged[number] == (number, near(total(model, window).item() / 4**3), tokens)


def test_loop_with_clipping():
    """The notes say: clip at 1.0 between the last backward and the update. True: length 1, the same direction."""
    model, norms, clipped = tiny_model(), [], []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: clipped.append(flat_grad(model)))
    for index, batch in enumerate(split(minibatch(24), 8)):
        step(model, batch, 4)
        if (index + 1) % 4 == 0:
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0).item())
            optimizer.step()
            optimizer.zero_grad()
    for window, norm, gradient in zip(split(minibatch(24), 2), norms, clipped, strict=True):
        expected = grad_total(model, window) / 4**2
        assert 1.5 < norm == near(expected.norm().item())
        assert error(gradient, expected / (norm + 1e-6)) < 1e-14  # torch adds the 1e-6


# --- Troubleshooting ---


def test_loss_not_decreasing():
    """The notes say: a tenth of the learning rate, clipping, or the right G cures it. True of three such runs."""
    batch = minibatch(8)

    def run(lr, steps=4, max_norm=float("inf")):
        model = tiny_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        before = total(model, batch)
        for _ in range(10):
            accumulate(model, split(batch, 4), steps=steps)
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
        return (total(model, batch) / before).item()

    assert run(lr=2.0) > 2
    assert run(lr=0.2) < 0.5
    assert run(lr=2.0, max_norm=1.0) < 0.5
    assert run(lr=0.2, steps=1) > 2  # G = 1, but four microbatches


@pytest.mark.parametrize("actual", [2, 4, 8])
def test_gradients_of_the_wrong_scale(actual):
    """The notes say: 2x or 4x off means that G is not the number of microbatches. True: half of it gives 4x.

    G is squared under the notes' rule; where it divides once, half of it gives 2x.
    """
    model, batches = tiny_model(), split(minibatch(8), actual)
    for rule, factor in (("notes", 4), ("microbatch_mean", 2)):
        right = accumulate(model, batches, rule=rule)
        assert error(accumulate(model, batches, steps=actual // 2, rule=rule), right * factor) < 1e-14
        assert error(accumulate(model, batches, steps=actual * 2, rule=rule), right / factor) < 1e-14


def test_loss_on_prompt_tokens():
    """The notes say: compare the sum of the mask with the number of output tokens. That finds a covered prompt.

    It does not find a mask that is off by one: the same sum, another loss. So look at the labels that are selected.
    """
    tokenizer, outputs, model = sft_edu.ByteTokenizer(), ["42", "seven"], tiny_model()
    batch = sft_edu.tokenize_prompt_and_output(["6 x 7 =", "six plus one:"], outputs, tokenizer)
    mask, labels = batch["response_mask"], batch["labels"]
    with_prompt, off_by_one = labels != tokenizer.pad_token_id, mask.roll(-1, dims=1)
    assert (mask.sum(), off_by_one.sum(), with_prompt.sum() > 7) == (7, 7, True)
    losses = {step(model, batch | {"response_mask": m}, 2)[0].item() for m in (mask, with_prompt, off_by_one)}
    assert len(losses) == 3
    assert [tokenizer.decode(row[m]) for row, m in zip(labels, mask, strict=True)] == outputs
    assert [tokenizer.decode(row[m]) for row, m in zip(labels, off_by_one, strict=True)] == ["=4", ":seve"]


# --- Errata ---


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_e1_two_divisions_are_not_the_mean(steps):
    """The notes say: dividing by G twice averages the gradients. True is 1/G of their mean; one division is it."""
    model, batches = tiny_model(), split(minibatch(4 * steps), steps)
    mean = sum(grad_total(model, batch) for batch in batches) / steps
    assert error(accumulate(model, batches), mean / steps) < 1e-14
    assert error(accumulate(model, batches), mean) == near(1 - 1 / steps)
    assert error(accumulate(model, batches, rule="microbatch_mean"), mean) < 1e-14


@allow_positive
def test_e2_printed_loss():
    """The notes print a loss of -0.175. True is 0.025; the other is what the first sequence alone gives."""
    loss = example(LOG_PROBS_2, MASK_2)[1].item()
    assert loss == near(0.025)
    assert loss != pytest.approx(-0.175, abs=0.1)
    assert example(LOG_PROBS_2[:1], MASK_2[:1])[1].item() == near(-0.175)


def test_e3_positive_log_probs():
    """The notes feed 1.0, 0.5 and 0.2 as log-probs. True is that none is above 0: a warning, which can be silenced."""
    assert forward(tiny_model(), minibatch(8)).max() < 0 < 1 < leaf(LOG_PROBS_2).exp().max()
    with pytest.warns(sft_edu.PositiveLogProbWarning, match=r"policy_log_probs: got 1 at \[0, 0\]") as caught:
        loss = example(LOG_PROBS_2, MASK_2)[1].item()
    assert (len(caught), loss) == (1, near(0.025))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        example()  # log-probs of probabilities: no warning
        warnings.simplefilter("ignore", sft_edu.PositiveLogProbWarning)
        assert example(LOG_PROBS_2, MASK_2)[1].item() == loss


def test_e4_mean_gradient_includes_masked_positions():
    """The notes say: grad.abs().mean() is 1/G**2. True is the share of ones times that; select by the mask first."""
    grad = example()[0].abs()
    assert grad.mean().item() == 0.21875 == 7 / 8 / 2**2 != 1 / 2**2
    assert grad[torch.tensor(MASK) == 1].mean().item() == 0.25


def test_e5_a_kept_loss_leaks_nothing():
    """The notes say: keeping the returned loss leaks. True is that it has no graph, and so holds nothing.

    A loss that was not detached holds nothing for backward either, once its backward has run. What leaks is a value
    whose own branch never ran backward: one whole graph at every step.
    """
    model, batch, kept = tiny_model(), minibatch(4), []
    with held_for_backward(model, batch) as held:
        for _ in range(3):
            loss, metadata = step(model, batch, 2)
            kept.append((loss, metadata))
            assert all(value.grad_fn is None for value in (loss, *metadata.values()))
            assert held() == 0

        not_detached = total(model, batch) / 4
        one_graph = held()
        not_detached.backward()
        assert (not_detached.grad_fn is None, held()) == (False, 0)

        assert one_graph > 100_000
        for count in (1, 2, 3):
            kept.append(masked_normalize(forward(model, batch), batch["response_mask"]))
            assert held() / count == pytest.approx(one_graph, rel=0.01)
        kept.clear()
        assert held() == 0


def test_e6_the_first_forward_pass_is_for_nothing():
    """The notes call model(input_ids) first. True is that nothing uses it: twice the forward passes, and its memory."""
    model, batches, calls = tiny_model(), split(minibatch(6), 2), []
    gradient = accumulate(model, batches, steps=4)
    model.zero_grad()
    model.register_forward_hook(lambda *_: calls.append(1))
    basic_loop(model, torch.optim.SGD(model.parameters()), batches, 4)  # two of four: no update yet
    assert len(calls) == 2 * len(batches)
    assert torch.equal(flat_grad(model), gradient)
    calls.clear()
    accumulate(model, batches)
    assert len(calls) == len(batches)

    with held_for_backward(model, batches[0]) as held:
        log_probs = forward(model, batches[0])
        needed = held()
        outputs = model(batches[0]["input_ids"])
        assert held() > 1.5 * needed
        del log_probs, outputs


def test_e7_incomplete_window():
    """The notes update when (i + 1) % G == 0. True is that of 10 microbatches at G = 4, two stay in `.grad`.

    They leak into the first update of the next epoch, and 1/4 is not the divisor of their mean.
    """
    model, batches, updates = tiny_model(), split(minibatch(20), 10), []
    gradients = [grad_total(model, batch) for batch in batches]
    window, left_over = sum(gradients[:4]), sum(gradients[8:])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # so that the gradients stay what they are
    optimizer.register_step_pre_hook(lambda *_: updates.append(flat_grad(model)))
    basic_loop(model, optimizer, batches, 4)
    assert len(updates) == 2
    assert error(flat_grad(model), left_over / 4**2) < 1e-14
    basic_loop(model, optimizer, batches, 4)
    assert error(updates[0], window / 4**2) < 1e-14
    assert error(updates[2], (window + left_over) / 4**2) < 1e-14
    assert error(updates[2], updates[0]) > 1e-2
    assert error(accumulate(model, batches[8:], 4, rule="microbatch_mean"), left_over / 2) == near(1 / 2)
    assert error(accumulate(model, batches[8:], 2, rule="microbatch_mean"), left_over / 2) < 1e-14


def test_e8_a_sum_and_not_a_mean():
    """The notes say: the loss is the mean over tokens. True is the sum, which grows with the length."""
    model, batch = tiny_model(), minibatch(5)
    mask, tokens = batch["response_mask"], int(batch["response_mask"].sum())
    logits, targets = model(batch["input_ids"]).mT, batch["labels"].masked_fill(~mask, -100)
    mean, summed = (F.cross_entropy(logits, targets, reduction=kind).item() for kind in ("mean", "sum"))

    log_probs = forward(model, batch)
    for repeats in (1, 2):  # responses of twice the length, each token as likely as before
        longer, longer_mask = leaf(log_probs.repeat(1, repeats)), mask.repeat(1, repeats)
        loss = sft_microbatch_train_step(longer, longer_mask, 1)[0].item()
        options = {"rule": "token_mean", "minibatch_tokens": repeats * tokens}
        assert loss == near(repeats * summed) == near(repeats * tokens * mean)
        assert loss != pytest.approx(mean, rel=0.5)
        assert sft_microbatch_train_step(longer, longer_mask, 1, **options)[0].item() == near(mean)


@pytest.mark.parametrize(("steps", "constant"), [(2, 1.0), (5, 1.0), (10, 1.0), (5, 3.0)])
def test_e9_the_returned_loss_is_not_for_logging(steps, constant):
    """The notes say: log the returned loss. True is that its mean depends on G: it is L / (c G**3).

    That is neither per token nor per sequence. Per token it is -sum(masked_sum) c / sum(num_tokens), for every G and c.
    """
    model, batch = tiny_model(), minibatch(10)
    summed = total(model, batch).item()
    per_token, per_sequence = summed / batch["response_mask"].sum().item(), summed / 10
    results = [step(model, part, steps, constant) for part in split(batch, steps)]
    averaged = sum(loss.item() for loss, _ in results) / steps
    assert averaged == near(summed / (constant * steps**3))
    assert averaged != pytest.approx(per_token, rel=0.05)
    assert averaged != pytest.approx(per_sequence, rel=0.05)
    sums = {name: sum(metadata[name].item() for _, metadata in results) for name in ("masked_sum", "num_tokens")}
    assert -sums["masked_sum"] * constant / sums["num_tokens"] == near(per_token)


def test_e10_a_test_with_b_equal_to_g_cannot_tell():
    """Unsaid in the notes: 1/G**2 passes a test with B = G = 2. True is 1/(B G); B != G tells them apart."""

    def run(rule, sequences, steps):
        values = -torch.rand(sequences, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        log_probs, mask = leaf(values), (torch.arange(10) % 3 > 0).expand(sequences, 10)
        loss, _ = sft_microbatch_train_step(log_probs, mask, steps, 1.7, rule=rule)
        return torch.cat([log_probs.grad.flatten(), loss[None]])

    assert torch.equal(run("notes", 2, 2), run("sequence_mean", 2, 2))
    for sequences, steps in ((3, 2), (2, 4), (5, 3), (1, 8)):
        notes, reference = run("notes", sequences, steps), run("sequence_mean", sequences, steps)
        assert error(notes, reference * sequences / steps) < 1e-14
        assert error(notes, reference) > 0.1


def test_e11_log_probs_of_a_model_keep_no_gradient():
    """The notes read policy_log_probs.grad. True is that it is None for a model's log-probs, unless retained."""
    model, batch, trace = tiny_model(), minibatch(5), Trace()
    log_probs, retained = forward(model, batch), forward(model, batch)
    retained.retain_grad()
    sft_microbatch_train_step(log_probs, batch["response_mask"], 2, tap=trace)
    sft_microbatch_train_step(retained, batch["response_mask"], 2)
    with pytest.warns(UserWarning, match="not a leaf"):
        assert log_probs.grad is None
    expected = closed_form.grad_log_probs(batch["response_mask"], 4, torch.float64)
    assert torch.equal(trace.grad("policy_log_probs"), expected)
    assert torch.equal(retained.grad, expected)


def test_e12_accumulation_is_the_large_batch():
    """The notes say: accumulation generalises better. True is the large batch's own gradient, when scaled right.

    So the weights are the same, and so is the loss on other data, however the minibatch is split.
    """
    batch, other = minibatch(8), minibatch(13)
    options = {"rule": "token_mean", "minibatch_tokens": int(batch["response_mask"].sum())}

    def loss_on_other_data(steps, **options):
        model = tiny_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(3):
            accumulate(model, split(batch, steps), **options)
            optimizer.step()
        return total(model, other).item()

    model, large = tiny_model(), loss_on_other_data(1, **options)
    full = grad_total(model, batch) / options["minibatch_tokens"]
    for steps in (1, 2, 4, 8):
        assert error(accumulate(model, split(batch, steps), **options), full) < 1e-14
        assert loss_on_other_data(steps, **options) == pytest.approx(large, rel=1e-12)
    # Scaled by each microbatch's own count, it is the mean of four means: another gradient and another model.
    parts = split(batch, 4)
    mean_of_means = sum(grad_total(model, part) / int(part["response_mask"].sum()) for part in parts) / 4
    assert error(accumulate(model, parts, rule="microbatch_token_mean"), mean_of_means) < 1e-14
    assert error(mean_of_means, full) > 1e-2
    assert loss_on_other_data(4, rule="microbatch_token_mean") != pytest.approx(large, rel=1e-3)
