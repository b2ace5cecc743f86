"""Log-probs and entropies against torch's own, and at logits where naive formulas fail."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from sft_edu import TinyLM, compute_entropy, get_response_log_probs

IDS = torch.tensor([[1, 4, 2], [3, 0, 5]])
LABELS = torch.tensor([[4, 2, 6], [0, 5, 1]])


def random_logits(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("scale", [1e-3, 1, 30])
@pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 3, 50)], ids=str)
def test_the_entropy_is_that_of_the_categorical_distribution(shape, scale):
    logits = random_logits(*shape) * scale
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(compute_entropy(logits), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("logits", "entropy"),
    [
        ([1e4, 1e4], math.log(2)),
        ([-1e4, -1e4, -1e4, -1e4], math.log(4)),
        ([1e4, -1e4, 0.0], 0.0),
        ([0.0, -math.inf, 0.0], math.log(2)),
        ([-math.inf, 5.0, -math.inf], 0.0),
        ([1e38, -1e38], 0.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_entropy_of_extreme_logits_is_exact_and_has_a_finite_gradient(logits, entropy, dtype):
    logits = torch.tensor(logits, dtype=dtype, requires_grad=True)
    result = compute_entropy(logits)
    assert result.item() == pytest.approx(entropy, abs=2 * torch.finfo(dtype).eps)
    result.backward()
    assert torch.isfinite(logits.grad).all()


def test_the_gradient_of_the_entropy_is_right():
    assert torch.autograd.gradcheck(compute_entropy, random_logits(2, 5).requires_grad_())


@pytest.mark.parametrize(
    "model",
    [lambda logits: lambda ids: logits, lambda logits: lambda ids: SimpleNamespace(logits=logits)],
    ids=["logits", "an object with logits"],
)
def test_log_probs_are_minus_the_cross_entropy(model):
    logits = random_logits(2, 3, 7).requires_grad_()
    log_probs = get_response_log_probs(model(logits), IDS, LABELS)["log_probs"]
    expected = -F.cross_entropy(logits.transpose(1, 2), LABELS, reduction="none")
    torch.testing.assert_close(log_probs, expected, rtol=1e-14, atol=0)
    gradients = [torch.autograd.grad(result.sum(), logits)[0] for result in (log_probs, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_logits_give_single_precision_log_probs(dtype):
    logits = random_logits(2, 3, 7, dtype=dtype)
    result = get_response_log_probs(lambda ids: logits, IDS, LABELS, return_token_entropy=True)
    exact = get_response_log_probs(lambda ids: logits.double(), IDS, LABELS, return_token_entropy=True)
    for name, value in result.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), exact[name], rtol=1e-6, atol=1e-6)


def test_a_hugging_face_model_is_scored_as_it_scores_itself():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=7, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    result = get_response_log_probs(model, IDS, LABELS, return_token_entropy=True)
    expected = -F.cross_entropy(model(IDS).logits.transpose(1, 2), LABELS, reduction="none")
    torch.testing.assert_close(result["log_probs"], expected)
    result["log_probs"].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_model_is_called_once_and_the_entropy_is_asked_for():
    calls = []
    model = TinyLM(vocab_size=7)
    model.register_forward_hook(lambda *_: calls.append(1))
    assert list(get_response_log_probs(model, IDS, LABELS)) == ["log_probs"]
    assert len(calls) == 1


def test_the_entropy_is_detached_and_the_log_probs_are_not():
    model = TinyLM(vocab_size=7)
    result = get_response_log_probs(model, IDS, LABELS, return_token_entropy=True)
    assert result["log_probs"].requires_grad
    assert (result["token_entropy"].requires_grad, result["token_entropy"].grad_fn) == (False, None)
    assert torch.equal(result["token_entropy"], compute_entropy(model(IDS)))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"labels": LABELS.masked_fill(LABELS == 6, -100)},
            ValueError,
            "labels: got values from -100 to 5; expected 0",
        ),
        ({"labels": LABELS + 1}, ValueError, "labels: got values from 1 to 7; expected 0 to 6"),
        ({"labels": LABELS[:, :2]}, ValueError, r"input_ids and labels: got shapes \[2, 3\] and \[2, 2\]; expected"),
        ({"input_ids": IDS[0], "labels": IDS[0]}, ValueError, r"input_ids and labels: got shapes \[3\] and \[3\]"),
        ({"input_ids": IDS[:, :0], "labels": IDS[:, :0]}, ValueError, r"input_ids and labels: got shapes \[2, 0\]"),
        ({"labels": LABELS.float()}, TypeError, "labels: got torch.float32; expected an int64 tensor"),
        ({"input_ids": IDS.tolist()}, TypeError, "input_ids: got list; expected an int64 tensor"),
        ({"model": lambda ids: (random_logits(2, 3, 7),)}, TypeError, "logits: got tuple; expected floats"),
        ({"model": lambda ids: ids}, TypeError, "logits: got torch.int64; expected floats"),
        (
            {"model": lambda ids: random_logits(2, 7)},
            ValueError,
            r"model: got logits of shape \[2, 7\]; expected \[2, 3",
        ),
        (
            {"model": lambda ids: random_logits(2, 2, 7)},
            ValueError,
            r"model: got logits of shape \[2, 2, 7\]; expected",
        ),
    ],
)
def test_ids_labels_and_logits_that_do_not_fit_are_refused(change, error, text):
    arguments = {"model": lambda ids: random_logits(2, 3, 7), "input_ids": IDS, "labels": LABELS}
    with pytest.raises(error, match=f"^{text}"):
        get_response_log_probs(**arguments | change)


@pytest.mark.parametrize("logits", [torch.tensor(1.0), torch.tensor([1, 2]), [1.0, 2.0]], ids=repr)
def test_an_entropy_needs_floats_with_a_vocabulary(logits):
    with pytest.raises(TypeError, match=r"^logits: got .*; expected floats \[\.\.\., V\]"):
        compute_entropy(logits)


def test_an_accelerator_is_not_asked_for_the_labels():
    ids = torch.empty(2, 3, dtype=torch.int64, device="meta")
    result = get_response_log_probs(TinyLM(vocab_size=7).to("meta"), ids, ids, return_token_entropy=True)
    assert all(value.is_meta and value.shape == (2, 3) for value in result.values())
