"""What frameworks divide by: our formulas beside the rules, and beside the framework that is installed here."""

import itertools
import re
from html import unescape

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from sft_edu import RULES, TinyLM, accumulate, compare, full_batch_gradient, split_minibatch
from sft_edu.frameworks import FRAMEWORKS, Framework
from sft_edu.passport import accumulated_gradients, passport
from sft_edu.ragged import ragged_minibatch

BATCH = ragged_minibatch(8, imbalance=1.0)
UNEQUAL = split_minibatch(BATCH, sizes=(3, 3, 2))
BY_NAME = {framework.name: framework for framework in FRAMEWORKS}
BEFORE, SINCE = BY_NAME["HF Trainer to 10/2024"], BY_NAME["HF Trainer since then"]

TABLE = """\
Each accumulated gradient beside the full batch's mean over tokens: length, cosine, where equal.
framework              D      rule                   length, cos G=1   length, cos G=3   equal at
CS336, assignment 5    c·B·G  sequence_mean          24.0000x, 1.0000  27.6879x, 0.9926  no G
HF Trainer to 10/2024  n·G    microbatch_token_mean  1.0000x, 1.0000   1.0558x, 0.9382   G = 1 only
HF Trainer since then  N      token_mean             1.0000x, 1.0000   1.0000x, 1.0000   every G
TRL SFTTrainer         N      token_mean             1.0000x, 1.0000   1.0000x, 1.0000   every G
TRL SFTTrainer, dft    N/p    none                   0.0047x, 0.7609   0.0047x, 0.7609   no G
torchtune              N      token_mean             1.0000x, 1.0000   1.0000x, 1.0000   every G
nanochat               n·G    microbatch_token_mean  1.0000x, 1.0000   1.0558x, 0.9382   G = 1 only"""


@pytest.fixture(scope="module")
def model():
    return TinyLM(d_model=16, num_layers=1, num_heads=2).double()


@pytest.fixture(scope="module")
def measured(model):
    return passport(model=model)


def test_the_table_is_the_same_everywhere(measured):
    assert str(measured) == TABLE
    assert max(map(len, TABLE.splitlines())) <= 100


@pytest.mark.parametrize("sizes", [(8,), (3, 3, 2), (1, 6, 1), (1,) * 8])
@pytest.mark.parametrize("framework", [one for one in FRAMEWORKS if one.rule], ids=lambda one: one.name)
def test_a_formula_is_the_rule_that_it_names(model, framework, sizes):
    microbatches = split_minibatch(BATCH, sizes=sizes)
    [gradient] = accumulated_gradients([framework], model, microbatches)
    assert framework.denominator == RULES[framework.rule].formula
    assert compare(gradient, accumulate(model, microbatches, rule=framework.rule).gradient).relative_error < 1e-13


def test_who_is_exact_at_every_g_is_exact_for_every_split(model):
    """All 16 ways to cut five sequences of unequal lengths into microbatches."""
    batch = {name: tensor[:5] for name, tensor in BATCH.items()}
    reference, worst = full_batch_gradient(model, batch), [0.0] * len(FRAMEWORKS)
    for cuts in itertools.product((False, True), repeat=4):
        edges = [0, *(place for place, cut in enumerate(cuts, start=1) if cut), 5]
        microbatches = split_minibatch(batch, sizes=[end - start for start, end in itertools.pairwise(edges)])
        gradients = accumulated_gradients(FRAMEWORKS, model, microbatches)
        worst = [max(old, compare(new, reference).relative_error) for old, new in zip(worst, gradients, strict=True)]
    exact = {framework.name for framework, error in zip(FRAMEWORKS, worst, strict=True) if error < 1e-12}
    assert exact == {row.framework.name for row in passport(batch=batch, model=model).rows if len(row.exact_at) == 5}
    assert exact == {framework.name for framework in FRAMEWORKS if framework.rule == "token_mean"}


def test_dft_is_another_objective_and_the_same_for_every_split(model):
    one, three = (
        accumulated_gradients([BY_NAME["TRL SFTTrainer, dft"]], model, split_minibatch(BATCH, steps))[0]
        for steps in (1, 3)
    )
    assert compare(three, one).relative_error < 1e-13


def test_a_framework_of_ones_own_is_measured_too(model):
    nearly = Framework(
        "nearly", "N/1.001", None, lambda log_probs, counts: -1.001 * log_probs.sum() / counts["N"], (), ""
    )
    [row] = passport([nearly], model=model, shown=(8,)).rows
    assert {round(comparison.ratio, 12) for comparison in row.measured.values()} == {1.001}
    assert row.exact_at == []


def test_no_grad_is_touched(model):
    kept = [torch.full_like(parameter, 7.0) for parameter in model.parameters()]
    for parameter, gradient in zip(model.parameters(), kept, strict=True):
        parameter.grad = gradient
    with torch.no_grad():
        passport(FRAMEWORKS[:1], model=model)
    for parameter, gradient in zip(model.parameters(), kept, strict=True):
        assert parameter.grad is gradient
        assert (gradient == 7).all()
        parameter.grad = None


def test_what_cannot_be_measured_is_refused(model):
    silent = {**BATCH, "response_mask": BATCH["response_mask"].clone()}
    silent["response_mask"][3] = 0
    with pytest.raises(ValueError, match="batch: got a sequence without response tokens"):
        passport(batch=silent, model=model)
    with pytest.raises(ValueError, match=r"shown: got \(9,\); expected numbers of microbatches from 1 to 8"):
        passport(model=model, shown=(9,))


def test_the_html_has_the_cells_of_the_text_the_notes_and_links(measured):
    html = measured._repr_html_()
    text = unescape(re.sub(r"<[^>]*>", " ", html))
    for row in measured.rows:
        for cell in (*measured._cells(row), row.framework.note):
            assert cell in text
        assert all(f'<a href="{url}">' in html for url in row.framework.sources)
    assert '/pull/34191">pull 34191</a>' in html
    hostile = passport([Framework("<img src=x>", "<b>", None, SINCE.loss, ('x/"><script>',), "<i>")], shown=())
    tags = set(re.findall(r"<(\w+)", hostile._repr_html_()))
    assert tags <= {"table", "caption", "thead", "tbody", "tr", "th", "td", "a", "div", "ul", "li", "b"}


# The Hugging Face library that is installed here.


def tiny_llama():
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def as_hugging_face(microbatch):
    """Labels that are not shifted yet, -100 where no token is trained: the model shifts them itself."""
    tokens = torch.cat([microbatch["input_ids"][:, :1], microbatch["labels"]], dim=1)
    trained = torch.nn.functional.pad(microbatch["response_mask"], (1, 0)) != 0
    return {"input_ids": tokens, "labels": tokens.masked_fill(~trained, -100)}


def gradient_of(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def assert_is_formula(gradient, framework, other):
    """float32, and the frameworks compute their loss in float32 whatever the model is."""
    ours, others = accumulated_gradients([framework, other], tiny_llama(), UNEQUAL)
    assert compare(gradient, ours).relative_error < 1e-5
    assert compare(gradient, others).relative_error > 1e-2


def test_the_loss_of_a_real_model_is_the_formula_with_and_without_num_items():
    count = int(BATCH["response_mask"].sum())
    since, before = tiny_llama(), tiny_llama()
    for microbatch in map(as_hugging_face, UNEQUAL):
        since(**microbatch, num_items_in_batch=count).loss.backward()
        (before(**microbatch).loss / len(UNEQUAL)).backward()
    assert_is_formula(gradient_of(since), SINCE, BEFORE)
    assert_is_formula(gradient_of(before), BEFORE, SINCE)


def real_trainer_gradient(folder, *, model_takes_num_items):
    """What the real Trainer has accumulated over three unequal microbatches when its optimizer is about to step."""
    seen = {}

    class Capture(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen["gradient"] = gradient_of(kwargs["model"]).clone()

    arguments = transformers.TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        max_steps=1,
        gradient_accumulation_steps=len(UNEQUAL),
        per_device_train_batch_size=1,  # an item of the data set is a whole microbatch
        max_grad_norm=0.0,  # no clipping
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model=tiny_llama(),
        args=arguments,
        train_dataset=[as_hugging_face(microbatch) for microbatch in UNEQUAL],
        data_collator=lambda items: items[0],
        callbacks=[Capture()],
    )
    if not model_takes_num_items:
        trainer.model_accepts_loss_kwargs = False
    trainer.train()
    return seen["gradient"]


@pytest.mark.parametrize(("model_takes_num_items", "is_now", "is_not"), [(True, SINCE, BEFORE), (False, BEFORE, SINCE)])
def test_the_real_trainer_accumulates_what_the_formula_says(tmp_path, model_takes_num_items, is_now, is_not):
    gradient = real_trainer_gradient(tmp_path, model_takes_num_items=model_takes_num_items)
    print(f"transformers {transformers.__version__}: {is_now.name}")
    assert_is_formula(gradient, is_now, is_not)
