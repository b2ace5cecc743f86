"""Real architectures from a config: written, loaded by path, compared with transformers' own loss, trained."""

import json
import os
import resource
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from sft_edu import TinyLM, default_device, get_response_log_probs, head, sft_microbatch_train_step
from sft_edu.data.encode import collate, encode, padding_token
from sft_edu.data.examples import Example
from sft_edu.training.pretrained import ModelLoadError, context_length, load_model, save_model
from sft_edu.training.train import TrainConfig, Training

ROOT = Path(__file__).parents[1]
EXAMPLES = [Example("up: cat\n", "CAT"), Example("up: a\n", "A"), Example("up: horse\n", "HORSE"), Example("hi", "HI")]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PIECES = ["<|im_start|>", "<|im_end|>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
SIZES = {
    "vocab_size": len(PIECES) + 5,  # rows of the embedding that no token uses, as in many real models
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 2,
}


def byte_tokenizer(template=None, eos="</s>"):
    """A real tokenizer: one token for each byte, and three special ones. It has no pad token."""
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(PIECES)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"eos_token": eos} if eos else {}
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=[piece for piece in PIECES[:3] if piece != eos], **special
    )
    wrapped.chat_template = template
    return wrapped


def llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | changes))


def qwen2(**changes):
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SIZES | {"tie_word_embeddings": True} | changes))


@pytest.fixture
def saved(tmp_path):
    return save_model(llama(), byte_tokenizer(), tmp_path / "model")


def edit(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (content | changes).items() if value is not ...}))


@pytest.mark.parametrize("template", [None, CHATML], ids=["plain", "chat"])
@pytest.mark.parametrize("make", [llama, qwen2])
def test_what_was_written_is_loaded_by_path(tmp_path, make, template):
    model, tokenizer = make(), byte_tokenizer(template)
    folder = save_model(model, tokenizer, tmp_path / "new" / "model")
    loaded, its_tokenizer = load_model(str(folder))
    assert type(loaded) is type(model)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, weight in loaded.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight.cpu(), model.state_dict()[name])
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.device.type == default_device().type
    assert encode(EXAMPLES, its_tokenizer).sequences == encode(EXAMPLES, tokenizer).sequences
    assert context_length(loaded) == 64


@pytest.mark.parametrize("template", [None, CHATML], ids=["plain", "chat"])
@pytest.mark.parametrize("make", [llama, qwen2])
def test_the_token_mean_and_its_gradients_are_transformers_own(tmp_path, make, template):
    folder = save_model(make(), byte_tokenizer(template), tmp_path / "model")
    model, tokenizer = load_model(folder, device="cpu", dtype=torch.float64)
    encoded = encode(EXAMPLES, tokenizer)
    longest = max(len(one.input_ids) for one in encoded)
    ids, labels = torch.full((2, len(encoded), longest), -100)
    for row, one in enumerate(encoded):
        ids[row, : len(one.input_ids)] = torch.tensor(one.input_ids)
        labels[row, : len(one.input_ids)] = torch.where(
            torch.tensor(one.is_response), ids[row, : len(one.input_ids)], -100
        )
    theirs = model(ids.masked_fill(ids == -100, padding_token(tokenizer)), labels=labels).loss
    theirs.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    for parts in ([encoded[:]], [encoded[:1], encoded[1:]]):  # the full batch, and two unequal microbatches
        model.zero_grad()
        batches = [collate(part, padding_token(tokenizer)) for part in parts]
        num_tokens = sum(int(batch["response_mask"].sum()) for batch in batches)
        loss = 0.0
        for batch in batches:
            log_probs = get_response_log_probs(model, **batch)["log_probs"]
            loss += sft_microbatch_train_step(
                log_probs, batch["response_mask"], len(batches), rule="token_mean", minibatch_tokens=num_tokens
            )[0]
        # transformers computes the cross-entropy in float32, whatever the weights are.
        torch.testing.assert_close(loss, theirs.detach().double(), rtol=1e-6, atol=0)
        for name, parameter in model.named_parameters():
            assert (parameter.grad - expected[name]).norm() <= 2e-6 * expected[name].norm()
    assert head._CUTS[model]


@pytest.mark.parametrize("template", [None, CHATML], ids=["plain", "chat"])
@pytest.mark.parametrize("make", [llama, qwen2])
def test_a_loaded_model_learns_and_is_written_back(tmp_path, make, template):
    folder = save_model(make(), byte_tokenizer(template), tmp_path / "model")
    model, tokenizer = load_model(folder, device="cpu")
    config = TrainConfig(
        microbatch_size=1, gradient_accumulation_steps=2, num_epochs=15, learning_rate=1e-2, warmup_steps=2
    )
    encoded = encode(EXAMPLES, tokenizer, max_length=context_length(model) + 1)
    training = Training(model, encoded, config, pad_token_id=padding_token(tokenizer))
    losses = [record.nll for record in training]
    assert losses[0] == pytest.approx(torch.tensor(SIZES["vocab_size"]).log().item(), rel=0.1)
    assert losses[-1] < 0.5 * losses[0]
    again, _ = load_model(save_model(model, tokenizer, tmp_path / "trained"), device="cpu")
    ids = torch.tensor([encoded[0].input_ids])
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert not torch.equal(again(ids).logits, load_model(folder, device="cpu")[0](ids).logits)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
def test_weights_are_trained_in_the_asked_precision_whatever_they_are_stored_in(tmp_path, stored):
    folder = save_model(llama().to(stored), byte_tokenizer(), tmp_path / "model")
    for dtype in (torch.float32, torch.bfloat16):
        model, _ = load_model(folder, device="cpu", dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    loaded = load_model(folder, device="cpu")[0].state_dict()
    assert all(torch.equal(value, loaded[name].to(stored)) for name, value in llama().to(stored).state_dict().items())


def test_a_tokenizer_without_eos_gets_the_one_that_the_model_knows(tmp_path):
    model = llama()
    model.generation_config.eos_token_id = [1, 2]  # as chat models have it: end of turn, end of text
    _, tokenizer = load_model(save_model(model, byte_tokenizer(eos=None), tmp_path / "model"))
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 1)
    assert encode(EXAMPLES[:1], tokenizer)[0].input_ids[-1] == 1


def test_without_a_pad_token_eos_fills_up(saved):
    _, tokenizer = load_model(saved)
    assert tokenizer.pad_token_id is None
    assert padding_token(tokenizer) == tokenizer.eos_token_id == 2


# --- what cannot be loaded ---


def refused(name, **options):
    with pytest.raises(ModelLoadError) as refusal:
        load_model(name, **options)
    text = str(refusal.value)
    assert "\n" not in text
    assert len(text) < 500 + len(str(name))
    return text.removeprefix(f"{name}: ")


@pytest.mark.parametrize("name", ["", ".", "a/b/c", "./nothing", "/nothing/here", "-x", "a b", "owner/", "ümlaut/x"])
def test_a_name_that_can_be_no_model(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "there is no such folder" in refused(name) or "has no config.json" in refused(name)


@pytest.mark.parametrize(("name", "text"), [(3, "name_or_path: got 3"), (None, "name_or_path: got None")])
def test_a_name_is_text_or_a_path(name, text):
    with pytest.raises(TypeError, match=f"^{text}; expected a folder or the id of a model"):
        load_model(name)


@pytest.mark.parametrize("dtype", ["float32", torch.int8, None], ids=str)
def test_weights_are_floats(saved, dtype):
    with pytest.raises(TypeError, match=r"^dtype: got .*; expected a torch.dtype of floats"):
        load_model(saved, dtype=dtype)


def test_a_file_is_no_folder(saved):
    assert refused(saved / "model.safetensors").startswith("is a file; expected the folder with the model")


def test_a_folder_without_a_config(tmp_path):
    assert refused(tmp_path) == "has no config.json; expected a folder that save_pretrained wrote"


def test_a_folder_without_a_tokenizer(saved):
    for path in saved.glob("tokenizer*"):
        path.unlink()
    assert refused(saved).startswith("its tokenizer cannot be loaded: ")


def test_weights_that_are_cut_short(saved):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert refused(saved).startswith("its model cannot be loaded: Error while deserializing header")


def test_no_weights(saved):
    (saved / "model.safetensors").unlink()
    assert "no file named" in refused(saved)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model_type": "strange"}, "its model cannot be loaded: The checkpoint you are trying to load has model type"),
        ({"model_type": "t5"}, "its model cannot be loaded: Unrecognized configuration class"),
        ({"model_type": ...}, "its model cannot be loaded: Unrecognized model"),
        ({"hidden_size": 48}, "its model cannot be loaded: "),
        ({"num_hidden_layers": 3}, "has no weights for model.layers.2."),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit(saved, change, text):
    edit(saved / "config.json", **change)
    assert refused(saved).startswith(text)


def test_a_config_that_is_no_json(saved):
    (saved / "config.json").write_text("{")
    assert "is not a valid JSON file" in refused(saved)


def test_code_that_comes_with_a_model_is_not_run(saved, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # to a question that is not asked
    edit(
        saved / "config.json", model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.M"}
    )
    (saved / "own.py").write_text("raise SystemExit('ran')")
    assert refused(saved).startswith("it brings code of its own, which is not run here")


def test_a_model_without_a_head(tmp_path):
    folder = tmp_path / "model"
    LlamaModel(LlamaConfig(**SIZES)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    text = "has no weights for lm_head.weight; expected a whole causal language model"
    assert refused(folder) == text


def test_an_encoder_would_copy_what_it_is_to_predict(tmp_path):
    torch.manual_seed(0)
    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    encoder = BertLMHeadModel(BertConfig(**sizes, initializer_range=0.5))
    folder = save_model(encoder, byte_tokenizer(), tmp_path / "model")
    assert refused(folder) == "a token changes the logits before it; expected a causal language model"
    edit(folder / "config.json", is_decoder=True)
    assert load_model(folder)


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path):
    folder = save_model(llama(vocab_size=100), byte_tokenizer(), tmp_path / "model")
    assert refused(folder) == "its tokenizer has 259 tokens and the model only 100"


@pytest.mark.parametrize("known", [None, 261])
def test_no_eos_token_anywhere(tmp_path, known):
    model = llama(eos_token_id=None)
    model.generation_config.eos_token_id = known  # 261 is a row without a token
    folder = save_model(model, byte_tokenizer(eos=None), tmp_path / "model")
    assert refused(folder) == "its tokenizer has no eos token; name one in tokenizer_config.json"


def test_without_transformers_the_extra_is_named(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert refused(saved) == 'real models need transformers: pip install "sft-edu[hf]"'


# --- the hub ---

PROGRAM = """
import sys
from sft_edu.training.pretrained import ModelLoadError, load_model
for name in sys.argv[1:]:
    try:
        print(name, type(load_model(name)[0]).__name__)
    except ModelLoadError as error:
        print(error)
"""


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for what it does not give away."""

    asked: ClassVar = []

    def do_HEAD(self):
        self.asked.append(self.path)
        status, error = (403, "GatedRepo") if self.path.startswith("/gated/") else (404, "RepoNotFound")
        self.send_response(status)
        self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    Hub.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def loaded_elsewhere(*names, **environment):
    """Line by line what becomes of each name in a process with another environment."""
    command = [sys.executable, "-c", PROGRAM, *names]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_model_that_the_hub_does_not_give(hub, tmp_path):
    gated, missing = loaded_elsewhere("gated/model", "nobody/model", HF_ENDPOINT=hub, HF_HOME=str(tmp_path))
    assert gated == (
        "gated/model: needs permission: ask for it on https://huggingface.co/gated/model, then log in with "
        "`hf auth login`"
    )
    assert missing.startswith("nobody/model: there is no such folder, and no such model on the hub")


def test_what_was_downloaded_is_loaded_without_asking_the_hub(saved, hub, tmp_path):
    """The cache is laid out as the hub's client lays it out."""
    repository = tmp_path / "hub" / "models--owner--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    saved.rename(repository / "snapshots" / ("0" * 40))
    printed = loaded_elsewhere("owner/model", "owner/other", HF_HOME=str(tmp_path), HF_ENDPOINT=hub)
    assert printed[0] == "owner/model LlamaForCausalLM"
    assert printed[1].startswith("owner/other: there is no such folder, and no such model on the hub")
    assert Hub.asked
    assert not any("owner/model/" in path for path in Hub.asked)


def test_without_a_network_the_way_to_the_model_is_explained(tmp_path):
    (missing,) = loaded_elsewhere("nobody/model", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert missing == (
        "nobody/model: there is no such folder, it has not been downloaded before, and HF_HUB_OFFLINE is set. Where "
        "there is a network run `hf download nobody/model`, or take the path of a folder with the model"
    )


# --- writing ---


def test_what_is_there_is_not_overwritten(saved):
    before = {path: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(FileExistsError, match="is there already; take another folder"):
        save_model(llama(), byte_tokenizer(), saved)
    assert {path: path.read_bytes() for path in saved.iterdir()} == before
    assert list(saved.parent.iterdir()) == [saved]


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    monkeypatch.setattr(tokenizer, "save_pretrained", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_model(llama(), tokenizer, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_write_left_is_removed(tmp_path):
    (tmp_path / ".model.60xyymx2.unfinished" / "model").mkdir(parents=True)
    (tmp_path / ".model.60xyymx2.unfinished" / "model" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".models.unfinished").mkdir()  # of another
    save_model(llama(), byte_tokenizer(), tmp_path / "model")
    assert {path.name for path in tmp_path.iterdir()} == {"model", ".models.unfinished"}


def test_a_full_disk_leaves_nothing(tmp_path):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # no file may grow beyond; Python ignores the signal
    try:
        with pytest.raises(OSError, match=r"File too large|could not be written"):
            save_model(llama(), byte_tokenizer(), tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_appears_only_when_it_is_whole(tmp_path, monkeypatch):
    seen, rename = [], Path.rename
    monkeypatch.setattr(Path, "rename", lambda *paths: (seen.append(paths), rename(*paths))[1])
    tokenizer = byte_tokenizer()
    save_pretrained = tokenizer.save_pretrained
    monkeypatch.setattr(
        tokenizer, "save_pretrained", lambda to: (seen.append((tmp_path / "model").exists()), save_pretrained(to))
    )
    save_model(llama(), tokenizer, tmp_path / "model")
    assert seen[0] is False
    ((_, target),) = seen[1:]
    assert target == tmp_path / "model"
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_only_a_model_that_can_write_itself(tmp_path):
    with pytest.raises(TypeError, match=r"^model: got TinyLM; expected a Hugging Face model"):
        save_model(TinyLM(), byte_tokenizer(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


# --- how far a model reads ---


@pytest.mark.parametrize(
    ("model", "length"),
    [
        (lambda: TinyLM(context_length=48), 48),
        (llama, 64),
        (lambda: torch.nn.Linear(1, 1), None),
        (lambda: _from_config("gpt2", n_embd=8, n_layer=1, n_head=1, n_positions=77), 77),
        (lambda: _from_config("mamba", hidden_size=8, num_hidden_layers=1), None),
        (lambda: _from_config("mpt", d_model=8, n_layers=1, n_heads=1, max_seq_len=33), 33),
    ],
)
def test_how_far_a_model_reads(model, length):
    assert context_length(model()) == length


def _from_config(kind, **sizes):
    special = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.AutoConfig.for_model(kind, vocab_size=10, **special, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config)
