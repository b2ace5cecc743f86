"""Log-probs under a response mask: the same numbers as without, from a head that is given fewer positions."""

import copy
import gc
import random
import runpy
import threading
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from sft_edu import TinyLM, compute_entropy, get_response_log_probs, head, saved_bytes

VOCAB, SHAPE = 97, (3, 9)
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
MODELS = {
    "TinyLM": lambda: TinyLM(VOCAB),
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "Qwen2, tied": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "Gemma 2, capped": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.05)),
    "Granite, divided": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=3.0)),
    "Cohere, multiplied": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.3)),
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().double().eval()


@pytest.fixture
def tiny():
    return TinyLM(VOCAB).double()


def batch(share=0.4):
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(VOCAB, (2, *SHAPE), generator=generator)
    return ids, labels, torch.rand(SHAPE, generator=generator) < share


def rows_at(layer):
    """How many positions each call gave to a layer."""
    rows = []
    layer.register_forward_hook(lambda _, arguments, __: rows.append(arguments[0][..., 0].numel()))
    return rows


def scored(model, ids, labels, mask, *, under_mask):
    """Log-probs and entropy, 0 where the mask is, and every gradient of a weighted sum of the log-probs."""
    model.zero_grad()
    result = get_response_log_probs(model, ids, labels, True, response_mask=mask if under_mask else None)
    result = {name: torch.where(mask != 0, value, 0) for name, value in result.items()}
    weights = torch.linspace(-1, 2, ids.numel(), dtype=torch.float64).view(ids.shape)
    (result["log_probs"] * weights).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return result["log_probs"].detach(), result["token_entropy"], gradient


def assert_equal(model, *tensors):
    under_mask, plain = (scored(model, *tensors, under_mask=choice) for choice in (True, False))
    for ours, theirs in zip(under_mask, plain, strict=True):
        assert theirs.norm() > 0
        assert (ours - theirs).norm() <= 1e-14 * theirs.norm()


@pytest.mark.parametrize("share", [0.1, 0.4, 1.0])
def test_log_probs_entropy_and_gradients_are_those_of_the_plain_path(model, share):
    ids, labels, mask = batch(share)
    rows = rows_at(model.get_output_embeddings())
    assert_equal(model, ids, labels, mask)
    assert rows[-2:] == [mask.sum(), mask.numel()]  # under the mask, then without


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16], ids=str)
def test_where_the_mask_is_0_so_is_the_result_and_nothing_flows(tiny, dtype):
    ids, labels, mask = batch()
    result = get_response_log_probs(tiny, ids, labels, True, response_mask=mask.to(dtype))
    for value in result.values():
        assert value.shape == SHAPE
        assert torch.equal(value != 0, mask)
    assert (result["token_entropy"].requires_grad, result["token_entropy"].grad_fn) == (False, None)
    result["log_probs"][~mask].sum().backward()
    assert all(not parameter.grad.any() for parameter in tiny.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_without_a_response_token_can_run_backward(model, training):
    ids, labels, mask = batch(0.0)
    model.train(training)
    result = get_response_log_probs(model, ids, labels, True, response_mask=mask)
    assert not result["log_probs"].any()
    assert not result["token_entropy"].any()
    result["log_probs"].sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_what_a_model_says_elsewhere_does_not_matter():
    ids, labels, mask = batch()
    logits = torch.randn(*SHAPE, VOCAB, dtype=torch.float64)
    logits[~mask] = torch.nan
    logits.requires_grad_()
    log_probs = get_response_log_probs(lambda _: logits, ids, labels, response_mask=mask)["log_probs"]
    log_probs.sum().backward()
    expected = logits.detach().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    assert torch.equal(log_probs[mask], expected[mask])
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[~mask].any()


def test_labels_matter_only_where_the_mask_is_1(tiny):
    ids, labels, mask = batch()
    expected = get_response_log_probs(tiny, ids, labels, response_mask=mask)["log_probs"]
    ignored = labels.masked_fill(~mask, -100)
    assert torch.equal(get_response_log_probs(tiny, ids, ignored, response_mask=mask)["log_probs"], expected)
    with pytest.raises(ValueError, match=r"^labels: got values from -100 to -100; expected 0 to 96"):
        get_response_log_probs(tiny, ids, labels.masked_fill(mask, -100), response_mask=mask)


class Strange(nn.Module):
    """A model that does something to its logits, or calls its head in its own way."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.embedding, self.head = kind, nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)
        self.double()

    def get_output_embeddings(self):
        if self.kind == "has none":
            raise NotImplementedError
        return None if self.kind == "knows none" else self.head

    def forward(self, ids):
        hidden = self.embedding(ids).cumsum(1)
        count = torch.arange(1.0, 20.0, dtype=torch.float64)
        if self.kind == "calls the head with rows":
            return self.head(hidden.flatten(0, 1)).view(*ids.shape, VOCAB)
        if self.kind == "does not call the head":
            return hidden @ self.head.weight.T
        if self.kind == "calls the head by name":
            return self.head(input=hidden)
        logits = self.head(hidden)
        return {
            "adds to each place": lambda: logits + count[: ids.shape[1], None],
            "adds nothing yet to each place": lambda: logits + 0 * count[: ids.shape[1], None],
            "adds to each sequence": lambda: logits + count[: len(ids), None, None],
            "looks at other places": lambda: logits - logits.mean(1, keepdim=True),
            "calls the head twice": lambda: logits + self.head(hidden.tanh()),
        }.get(self.kind, lambda: logits)()


@pytest.mark.parametrize(
    "kind",
    [
        "has none",
        "knows none",
        "calls the head with rows",
        "does not call the head",
        "calls the head by name",
        "adds to each place",
        "adds nothing yet to each place",
        "adds to each sequence",
        "looks at other places",
        "calls the head twice",
    ],
)
def test_a_model_whose_logits_need_every_position_gets_every_position(kind):
    torch.manual_seed(0)
    model = Strange(kind)
    rows = rows_at(model.head) if kind != "calls the head by name" else []
    assert_equal(model, *batch())
    ids, labels, mask = batch()
    rows.clear()
    get_response_log_probs(model, ids, labels, response_mask=mask)
    assert set(rows) <= {mask.numel()}
    assert not head._CUTS.get(model, False)


def test_a_compiled_model_gets_every_position(tiny):
    """It may have been compiled without the hook. Nothing is compiled before the first call."""
    assert head._head(tiny) is tiny.head
    assert head._head(torch.compile(tiny, backend="eager")) is None
    tiny.compile(backend="eager")
    assert head._head(tiny) is None


def test_an_ordinary_model_of_that_class_is_cut():
    model = Strange("ordinary")
    assert_equal(model, *batch())
    assert head._CUTS[model]


def test_the_models_own_forward_runs_once_after_a_first_comparison(tiny):
    ids, labels, mask = batch()
    calls = []
    tiny.register_forward_hook(lambda *_: calls.append(1))
    counts = []
    for _ in range(3):
        calls.clear()
        get_response_log_probs(tiny, ids, labels, response_mask=mask)
        counts.append(len(calls))
    assert counts == [3, 1, 1]
    assert not tiny.head._forward_pre_hooks


def test_the_comparison_leaves_random_numbers_modes_and_gradients_alone():
    """Dropout draws random numbers, in a model that is being trained."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
    model = GPT2LMHeadModel(config).double().train()
    ids, labels, mask = batch()
    states = []
    for under_mask in (None, mask):
        torch.manual_seed(1)
        random.seed(1)
        states.append(
            (get_response_log_probs(model, ids, labels, response_mask=under_mask)["log_probs"], random.random())
        )
        states[-1] += (torch.rand(()),)
    (plain, *drawn), (ours, *drawn_too) = states
    assert drawn == drawn_too
    assert head._CUTS[model]
    assert (torch.where(mask, plain, 0) - ours).norm() <= 1e-14 * ours.norm()
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_first_gradients_under_autocast_are_whole():
    """Autocast remembers casts of weights; those made without gradient must not be used again."""
    ids, labels, mask = batch()
    gradients = []
    model = TinyLM(VOCAB)
    for _ in range(2):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            log_probs = get_response_log_probs(model, ids, labels, response_mask=mask)["log_probs"]
        assert log_probs.dtype == torch.float32
        log_probs.sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)


def test_models_are_remembered_apart_and_only_while_they_live(tiny):
    ids, labels, mask = batch()
    for kind in ("ordinary", "looks at other places"):
        model = Strange(kind)
        get_response_log_probs(model, ids, labels, response_mask=mask)
        get_response_log_probs(copy.deepcopy(model), ids, labels, response_mask=mask)
        assert head._CUTS[model] == (kind == "ordinary")
    before = len(head._CUTS)
    del model
    gc.collect()
    assert len(head._CUTS) < before


def test_another_thread_may_run_the_model_meanwhile(tiny):
    ids, labels, mask = batch()
    get_response_log_probs(tiny, ids, labels, response_mask=mask)
    seen = []

    def meanwhile(*_):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: seen.append(tiny(ids).shape))
            thread.start()
            thread.join()

    tiny.final_norm.register_forward_hook(meanwhile)  # when the head is already waiting for fewer positions
    get_response_log_probs(tiny, ids, labels, response_mask=mask)
    assert seen == [(*SHAPE, VOCAB)]


def test_a_model_that_fails_is_left_whole(tiny):
    ids, labels, mask = batch()
    get_response_log_probs(tiny, ids, labels, response_mask=mask)
    handle = tiny.head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        get_response_log_probs(tiny, ids, labels, response_mask=mask)
    handle.remove()
    assert tiny(ids).shape == (*SHAPE, VOCAB)


def test_a_model_that_fails_at_once_says_why(tiny):
    ids, labels, mask = batch()
    with pytest.raises(IndexError):
        get_response_log_probs(tiny, ids + VOCAB, labels, response_mask=mask)


@pytest.fixture
def one_rank():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("share", [0.4, 0.0])
def test_a_model_of_several_ranks_runs_its_own_forward(one_rank, share):
    ids, labels, mask = batch(share)
    inner = TinyLM(VOCAB).double()
    model = DistributedDataParallel(inner)
    rows, calls = rows_at(inner.head), []
    model.register_forward_hook(lambda *_: calls.append(1))
    log_probs = get_response_log_probs(model, ids, labels, response_mask=mask)["log_probs"]
    log_probs.sum().backward()
    assert (rows[-1], len(calls)) == (mask.sum(), 1)
    gradients = [parameter.grad.clone() for parameter in inner.parameters()]
    inner.zero_grad()
    torch.where(mask, get_response_log_probs(inner, ids, labels)["log_probs"], 0).sum().backward()
    for ours, parameter in zip(gradients, inner.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_single_precision(dtype):
    ids, labels, mask = batch()
    exact = torch.randn(*SHAPE, VOCAB).to(dtype).double().requires_grad_()
    half = exact.detach().to(dtype).requires_grad_()
    results = [
        get_response_log_probs(lambda _, x=logits: x, ids, labels, True, response_mask=mask) for logits in (half, exact)
    ]
    for name, value in results[0].items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), results[1][name], rtol=1e-6, atol=1e-6)
    for result in results:
        result["log_probs"].sum().backward()
    assert half.grad.dtype == dtype
    torch.testing.assert_close(half.grad.double(), exact.grad, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_many_rows_are_computed_a_few_at_a_time():
    """7 rows of 2**20 logits are two lots; a logit of -inf is a token without probability."""
    size = 2**20
    logits = torch.randn(1, 7, size, generator=torch.Generator().manual_seed(0))
    logits[0, :, 5] = -torch.inf
    logits.requires_grad_()
    ids = torch.zeros(1, 7, dtype=torch.int64)
    labels = torch.tensor([[0, 1, size - 1, 3, 4, 6, 7]])
    result = get_response_log_probs(lambda _: logits, ids, labels, True, response_mask=torch.ones(1, 7))
    expected = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    assert torch.equal(result["log_probs"], expected)
    assert torch.equal(result["token_entropy"], compute_entropy(logits))
    weights = torch.arange(1.0, 8.0)
    gradients = [
        torch.autograd.grad((log_probs * weights).sum(), logits)[0] for log_probs in (result["log_probs"], expected)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-9)


def test_derivatives_of_first_and_second_order_are_right():
    logits = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids, mask = torch.tensor([[1, 4, 2], [3, 0, 4]]), torch.tensor([[0, 1, 1], [1, 0, 1]])

    def log_probs(logits):
        return get_response_log_probs(lambda _: logits, ids, ids, response_mask=mask)["log_probs"].square()

    assert torch.autograd.gradcheck(log_probs, logits)
    assert torch.autograd.gradgradcheck(log_probs, logits)


@pytest.mark.parametrize(
    ("mask", "error", "text"),
    [
        ([[1]], TypeError, r"response_mask: got list; expected a bool, integer or float tensor \[B, T\]"),
        (torch.ones(SHAPE, dtype=torch.complex64), TypeError, "response_mask: got torch.complex64; expected a bool"),
        (torch.ones(9), ValueError, r"response_mask: got shape \[9\]; expected \[3, 9\], the shape of labels"),
        (torch.ones(9, 3), ValueError, r"response_mask: got shape \[9, 3\]; expected \[3, 9\]"),
        (torch.full(SHAPE, 2), ValueError, r"response_mask: got 2 at \[0, 0\]; expected 1 for a response token"),
        (torch.full(SHAPE, torch.nan), ValueError, r"response_mask: got nan at \[0, 0\]; expected 1"),
        (torch.ones(SHAPE, device="meta"), ValueError, "response_mask: got device meta; expected cpu, where labels is"),
    ],
    ids=str,
)
def test_a_mask_that_does_not_fit_is_refused_before_the_model_runs(mask, error, text):
    ids, labels, _ = batch()
    with pytest.raises(error, match=f"^{text}"):
        get_response_log_probs(lambda _: pytest.fail("ran"), ids, labels, response_mask=mask)


def test_with_a_mask_on_the_cpu_an_accelerator_is_asked_for_nothing():
    ids = torch.empty(SHAPE, dtype=torch.int64, device="meta")
    model = TinyLM(VOCAB).to("meta")
    result = get_response_log_probs(model, ids, ids, True, response_mask=batch()[2])
    assert all(value.is_meta and value.shape == SHAPE for value in result.values())
    result["log_probs"].sum().backward()
    assert head._CUTS[model]


def test_what_backward_needs_is_less_by_what_is_left_out():
    """Of the logits, the largest part by far, only the rows of responses are saved, once."""
    vocab = 20_000
    model, (ids, labels, mask) = TinyLM(vocab), batch(0.3)
    plain = saved_bytes(lambda: get_response_log_probs(model, ids, labels)["log_probs"], model)
    ours = saved_bytes(lambda: get_response_log_probs(model, ids, labels, response_mask=mask)["log_probs"], model)
    left_out = int((~mask).sum()) * vocab * 4
    assert plain - ours == pytest.approx(left_out, rel=0.05)


def test_it_is_faster_and_smaller_than_the_plain_way():
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "log_probs.py"
    measure = runpy.run_path(str(path))["measure"]
    model = TinyLM(32_000)
    # A busy machine can only make it look worse, so the best of three measurements counts.
    for _ in range(3):
        times, peaks = measure(model, 0.3, rounds=1)
        assert peaks["ours"] <= 0.4 * peaks["plain"]
        if min(times["plain"]) >= 2.5 * min(times["ours"]):
            return
    pytest.fail(f"{min(times['plain']) / min(times['ours']):.2f} times as fast as the plain way")
