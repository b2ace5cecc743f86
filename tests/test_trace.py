"""A trace shows every value and gradient of a step, and the step does not notice it."""

import re
from html.parser import HTMLParser

import pytest
import torch

from sft_edu import RULES, Trace, closed_form, no_tap, sft_microbatch_train_step
from sft_edu.trace import STAGES, explain_gradient

LOG_PROBS = [[-0.5, -0.3, -0.8, -0.2], [-0.4, -0.6, -0.3, -0.5]]
MASK = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]])
STEPS, CONSTANT, TOKENS = 3, 2.5, 11

WORKED_EXAMPLE = """
step  name              symbol     formula                          value                      gradient
----  ----------------  ---------  -------------------------------  -------------------------  -------------------
in    policy_log_probs  log p      log p(label | tokens before it)  [2, 4] -0.8000 to -0.2000  [2, 4] -0.2500 to 0
in    response_mask     m          1 response, 0 prompt or padding  [2, 4] 0 to 1              -
1     num_tokens        n          Σ m = 3 + 4                      7                          -
2     masked_sum        S          Σ m·log p / c = -2.8000 / 1      -2.8000                    -0.2500
3     loss              L          -S / G = -(-2.8000) / 2          1.4000                     0.5000
4     scaled_loss       ℓ          L / G = 1.4000 / 2               0.7000                     1.0000
5     backward          ∂ℓ/∂log p  -m / (c·G²) = -m / 4             [2, 4] -0.2500 to 0        -
6     returned_loss     ℓ          ℓ without its graph              0.7000                     -

policy_log_probs
-0.5000  -0.3000  -0.8000  -0.2000
-0.4000  -0.6000  -0.3000  -0.5000

response_mask
1  1  0  1
1  1  1  1

gradient of policy_log_probs
-0.2500  -0.2500   0.0000  -0.2500
-0.2500  -0.2500  -0.2500  -0.2500
"""


def leaf(dtype=torch.float64):
    return torch.tensor(LOG_PROBS, dtype=dtype, requires_grad=True)


def step(log_probs, rule, tap):
    return sft_microbatch_train_step(log_probs, MASK, STEPS, CONSTANT, rule=rule, minibatch_tokens=TOKENS, tap=tap)


def traced(log_probs, rule="notes"):
    trace = Trace()
    return trace, step(log_probs, rule, trace)


def test_the_rows_follow_the_six_steps_of_the_notes():
    trace, _ = traced(leaf())
    names = [(row.step, row.name) for row in trace]
    stages = [name for name in STAGES if name != "returned_loss"]
    assert names == [*zip(["in", "in", "1", "2", "3", "4"], stages, strict=True), ("5", "backward"), ("6", STAGES[-1])]


@pytest.mark.parametrize(
    ("rule", "loss", "scaled_loss", "backward"),
    [
        ("notes", "-S / G = -(-1.1200) / 3", "L / G = 0.3733 / 3", "-m / (c·G²) = -m / 22.5000"),
        ("microbatch_mean", "-S / 1 = -(-1.1200) / 1", "L / G = 1.1200 / 3", "-m / (c·G) = -m / 7.5000"),
        ("sequence_mean", "-S / B = -(-1.1200) / 2", "L / G = 0.5600 / 3", "-m / (c·B·G) = -m / 15"),
        ("microbatch_token_mean", "-c·S / n = -(2.5000 · -1.1200) / 7", "L / G = 0.4000 / 3", "-m / (n·G) = -m / 21"),
        ("token_mean", "-c·S / N = -(2.5000 · -1.1200) / 11", "L / 1 = 0.2545 / 1", "-m / N = -m / 11"),
    ],
)
def test_the_formulas_have_the_numbers_put_in(rule, loss, scaled_loss, backward):
    formula = {row.name: row.formula for row in traced(leaf(), rule)[0]}
    assert formula["num_tokens"] == "Σ m = 3 + 4"
    assert formula["masked_sum"] == "Σ m·log p / c = -2.8000 / 2.5000"
    assert (formula["loss"], formula["scaled_loss"], formula["backward"]) == (loss, scaled_loss, backward)


@pytest.mark.parametrize("rule", RULES)
def test_values_and_gradients_are_those_of_the_closed_form(rule):
    trace, (loss, metadata) = traced(leaf(), rule)
    denominator = closed_form.denominator(rule, MASK, STEPS, CONSTANT, TOKENS)
    scaled_loss = closed_form.loss(trace["policy_log_probs"], MASK, denominator)
    second = 1 if rule == "token_mean" else STEPS
    values = {
        "policy_log_probs": torch.tensor(LOG_PROBS, dtype=torch.float64),
        "response_mask": MASK,
        "num_tokens": torch.tensor(7),
        "masked_sum": torch.tensor(-2.8 / CONSTANT, dtype=torch.float64),
        "loss": scaled_loss * second,
        "scaled_loss": scaled_loss,
        "returned_loss": scaled_loss,
    }
    gradients = {
        "scaled_loss": torch.tensor(1.0, dtype=torch.float64),
        "loss": torch.tensor(1.0 / second, dtype=torch.float64),
        "masked_sum": torch.tensor(-CONSTANT / denominator, dtype=torch.float64),
        "policy_log_probs": closed_form.grad_log_probs(MASK, denominator, torch.float64),
    }
    assert tuple(values) == STAGES
    for name, value in values.items():
        torch.testing.assert_close(trace[name], value, rtol=1e-14, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(trace.grad(name), gradient, rtol=1e-14, atol=0)
    assert torch.equal(trace["returned_loss"], loss)
    assert torch.equal(trace["masked_sum"], metadata["masked_sum"])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_traced_step_is_the_untraced_step_to_the_bit(dtype, rule):
    results = []
    for tap in (no_tap, Trace()):
        log_probs = leaf(dtype)
        loss, metadata = step(log_probs, rule, tap)
        results.append((loss, *metadata.values(), log_probs.grad))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_a_trace_leaves_nothing_behind_on_the_log_probs():
    log_probs = leaf()
    trace, _ = traced(log_probs)
    kept = trace.grad("policy_log_probs").clone()
    for _ in range(2):
        sft_microbatch_train_step(log_probs, MASK, 1)
    (log_probs * 5).sum().backward()
    assert torch.equal(trace.grad("policy_log_probs"), kept)
    assert not log_probs._backward_hooks


def test_a_second_step_overwrites_the_first_and_shows_its_own_gradient_alone():
    log_probs = leaf()
    trace, _ = traced(log_probs)
    first = trace.grad("policy_log_probs").clone()
    sft_microbatch_train_step(log_probs, MASK, 1, tap=trace)
    assert torch.equal(trace.grad("policy_log_probs"), -MASK.double())
    assert torch.equal(log_probs.grad, first - MASK)
    assert len(trace.rows()) == 8


def test_a_trace_sees_the_gradient_of_log_probs_that_are_not_a_leaf():
    log_probs = leaf() * 1
    trace, _ = traced(log_probs)
    assert log_probs.retains_grad is False  # its .grad stays None
    expected = -MASK.double() / (CONSTANT * STEPS**2)
    torch.testing.assert_close(trace.grad("policy_log_probs"), expected, rtol=1e-14, atol=0)


def test_what_a_trace_holds_is_a_copy_without_a_graph():
    log_probs = leaf()
    trace, _ = traced(log_probs)
    with torch.no_grad():
        log_probs.zero_()
        log_probs.grad.zero_()
    assert trace["policy_log_probs"].tolist() == LOG_PROBS
    assert (trace.grad("policy_log_probs") != 0).sum() == 7
    assert not any(trace[name].requires_grad or trace[name].grad_fn for name in STAGES)


def test_a_name_that_is_not_there_is_answered_with_those_that_are():
    with pytest.raises(KeyError, match="loss: no such value in this trace; it has none yet"):
        Trace()["loss"]
    trace, _ = traced(leaf())
    with pytest.raises(KeyError, match="lost: no such value in this trace; it has policy_log_probs, response_mask, "):
        trace["lost"]
    with pytest.raises(KeyError, match="num_tokens: no such gradient in this trace; it has scaled_loss, loss, "):
        trace.grad("num_tokens")


def test_a_trace_without_a_step_says_so():
    assert Trace().rows() == []
    assert repr(Trace()) == "Trace: no step recorded yet; pass it to one as tap=trace"
    assert Trace()._repr_html_() == "<p>Trace: no step recorded yet; pass it to one as tap=trace</p>"


def test_the_worked_example_prints_as_in_the_lessons():
    trace = Trace()
    sft_microbatch_train_step(leaf(), MASK, gradient_accumulation_steps=2, tap=trace)
    assert repr(trace) == WORKED_EXAMPLE.strip()


def test_masked_infinities_and_nan_can_be_printed():
    log_probs = torch.tensor([[-0.5, float("nan")], [float("-inf"), -0.5]], requires_grad=True)
    trace = Trace()
    sft_microbatch_train_step(log_probs, torch.eye(2), 2, tap=trace)
    assert "-inf  -0.5000" in repr(trace)
    assert "nan" in trace._repr_html_()


def test_a_large_matrix_is_summed_up_by_its_shape_and_range():
    trace = Trace()
    log_probs = torch.linspace(-2, -1, 18).view(9, 2).requires_grad_()
    sft_microbatch_train_step(log_probs, torch.ones(9, 2), 1, tap=trace)
    assert "[9, 2] -2 to -1" in repr(trace)
    assert "Σ m = over 9 sequences" in repr(trace)
    assert len(repr(trace).splitlines()) == 10  # the table alone


class Balanced(HTMLParser):
    """Collects tags and text, and insists that every tag is closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], set(), []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.add((tag, *attrs))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(html):
    parser = Balanced()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser


KNOWN_TAGS = {"table", "thead", "tbody", "tr", "th", "td", "p", "pre"}


@pytest.mark.parametrize("rule", RULES)
def test_the_html_is_well_formed_and_says_what_the_text_says(rule):
    trace, _ = traced(leaf(), rule)
    html = parsed(trace._repr_html_())
    assert {tag for tag, *_ in html.tags} == KNOWN_TAGS
    assert {name for _, *attributes in html.tags for name, _ in attributes} <= {"scope", "style"}
    words = [word for word in repr(trace).split() if not word.startswith("--")]
    assert " ".join(html.text).split() == words


@pytest.mark.parametrize("hostile", ["<img src=x onerror=alert(1)>", "</script><script>", "</td>&amp;\x00\u202e\ud800"])
def test_no_markup_gets_into_the_html(hostile, monkeypatch):
    monkeypatch.setattr("sft_edu.trace._short", lambda value: hostile)
    monkeypatch.setattr("sft_edu.trace._matrix", lambda value: hostile)
    trace, _ = traced(leaf())
    html = trace._repr_html_()
    assert set(re.findall(r"</?([^\s>]*)", html)) <= KNOWN_TAGS
    assert {tag for tag, *_ in parsed(html).tags} == KNOWN_TAGS


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_product_of_a_token_is_its_gradient_to_the_last_bit(rule, dtype):
    log_probs = torch.tensor([[-0.5, -0.3, -0.8], [-0.4, -0.6, -0.3]], dtype=dtype, requires_grad=True)
    mask, trace = torch.tensor([[0, 1, 1], [1, 0, 1]]), Trace()
    sft_microbatch_train_step(log_probs, mask, 3, 2.5, rule=rule, minibatch_tokens=11, tap=trace)
    for row, column in mask.nonzero().tolist() + (mask == 0).nonzero().tolist():
        text, product = explain_gradient(trace, row, column)
        assert product.equal(log_probs.grad[row, column])
        assert text.startswith("-1 × mask × 1/")


def test_the_product_is_written_out():
    trace = Trace()
    log_probs = torch.tensor([[-0.5, -0.3]], requires_grad=True)
    sft_microbatch_train_step(log_probs, torch.tensor([[1, 0]]), 4, 2.0, tap=trace)
    assert explain_gradient(trace, 0, 0)[0] == "-1 × mask × 1/G × 1/G × 1/c = -1 × 1 × 1/4 × 1/4 × 1/2 = -0.0312"
    assert explain_gradient(trace, 0, 1)[0] == "-1 × mask × 1/G × 1/G × 1/c = -1 × 0 × 1/4 × 1/4 × 1/2 = 0.0000"
