"""The command `sft-edu train`: what it leaves behind, what it refuses, and that nothing is lost however it ends."""

import argparse
import errno
import io
import itertools
import json
import os
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from test_encode import CHATML, hugging_face
from test_jsonl import REFUSED
from test_report_page import HOSTILE_PARTS, Elements
from transformers import LlamaConfig, LlamaForCausalLM

import sft_edu.commands.report_page
from sft_edu.cli import main
from sft_edu.commands import train as train_command
from sft_edu.commands.claim import LOCK, resume_command
from sft_edu.commands.prepare_run import PRETRAINED_DEFAULTS, prepare_run
from sft_edu.commands.run_results import MODEL, REPORT
from sft_edu.commands.run_settings import SETTINGS, RunSettings
from sft_edu.commands.train_options import add_options
from sft_edu.data.jsonl import load_jsonl
from sft_edu.model import TinyLM
from sft_edu.tokens import ByteTokenizer
from sft_edu.training.checkpoint import load_checkpoint
from sft_edu.training.evaluate import Evaluation
from sft_edu.training.pretrained import load_model
from sft_edu.training.run import CHECKPOINTS, METRICS, RunFolder, as_json, read_metrics
from sft_edu.training.tiny_run import load_tiny_model, tiny_examples
from sft_edu.training.train import Training
from sft_edu.training.train_config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
DOCS = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
# 36 examples to train on make 5 optimizer steps of 4 x 2 in an epoch, the last of them incomplete.
SHORT = [
    *("--microbatch-size", "4", "--gradient-accumulation-steps", "2", "--epochs", "2"),
    *("--evaluate-every", "4", "--checkpoint-every", "3"),
]
FILES = {"metrics.jsonl", "settings.json", "report.html", "model.pt", "checkpoints"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: it holds some data."""
    examples = [{"prompt": f"{number} + 1 =", "response": f" {number + 1}"} for number in range(40)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(capsys, *arguments: object, data: str = "mine.jsonl") -> tuple[int, str, str]:
    """Status, standard output and standard error of a short run."""
    arguments = list(map(str, arguments))
    given = [] if "--resume" in arguments else ["--data", data, *SHORT]
    try:
        status = main(["train", *given, *arguments])
    except SystemExit as left:
        status = left.code
    return status, *capsys.readouterr()


def command(*arguments: str, **options) -> subprocess.Popen:
    """The same in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    return subprocess.Popen([sys.executable, "-m", "sft_edu", "train", *arguments], **pipes, **options)


def content(folder: Path) -> dict[str, bytes]:
    """What a folder holds, file by file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_run(one: Path, other: Path) -> bool:
    """Whether two runs measured the same and trained to the same model, bit for bit."""
    equal = [(one / name).read_bytes() == (other / name).read_bytes() for name in ("metrics.jsonl", "model.pt")]
    return all(equal) and not list(one.rglob("*.unfinished"))


@pytest.fixture
def whole(folder: Path, capsys) -> Path:
    """A run that was never stopped."""
    assert train(capsys, "--out", "whole")[0] == 0
    return folder / "whole"


# --- what it leaves behind ---


def test_the_whole_command(folder: Path):
    process = command("--data", "mine.jsonl", *SHORT, "--out", "my run")
    out, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (0, "")
    assert {path.name for path in (folder / "my run").iterdir() if path.name[0] != "."} == FILES
    lines = list(read_metrics(folder / "my run" / METRICS))
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["step"] for line in lines if "held_out_nll" in line] == [1, 4, 8, 10]
    assert {"nll", "notes_loss", "grad_norm", "clipped_norm", "num_tokens", "entropy", "learning_rate"} <= set(lines[0])
    assert re.findall(r"^step +(\d+) of 10 ", out, re.MULTILINE) == ["1", "4", "8", "10"]
    assert "response tokens/s" in out
    assert "Finished after optimizer step 10 of 10." in out
    assert re.search(
        r"^40 examples, .*\.\n36 to train on, 4 held out \(--held-out changes that\)\.$", out, re.MULTILINE
    )
    assert load_checkpoint(folder / "my run" / CHECKPOINTS)["step"] == 10
    model = load_tiny_model(folder / "my run" / "model.pt")
    settings = json.loads((folder / "my run" / SETTINGS).read_text())
    assert settings["data"] == str(folder / "mine.jsonl")
    page = (folder / "my run" / "report.html").read_text(encoding="utf-8")
    assert "Finished after optimizer step 10 of 10." in page
    assert "sft-edu train, my run" in page
    assert lines[-1]["nll"] < lines[0]["nll"]
    held_out = [answer["prompt"] for answer in lines[-1]["answers"]]
    examples = [example for example in load_jsonl("mine.jsonl") if example.prompt in held_out]
    assert len(examples) == 4
    assert Evaluation(examples, ByteTokenizer())(model).as_dict() == {
        name: lines[-1][name] for name in ("held_out_exact_match", "held_out_nll", "answers")
    }


@pytest.mark.timeout(600)  # half a minute, where nothing else runs
def test_the_built_in_tasks_are_learned(folder: Path, capsys):
    assert main(["train"]) == 0
    out = capsys.readouterr().out
    lines = list(read_metrics(folder / "run" / METRICS))
    scored = [line["held_out_exact_match"] for line in lines if "held_out_exact_match" in line]
    assert scored[0] == 0
    assert scored[-1] >= 0.99
    assert f"{scored[-1]:.1%} right" in out
    assert all(answer["is_right"] for answer in lines[-1]["answers"])
    model = load_tiny_model(folder / "run" / "model.pt")
    fresh = Evaluation(tiny_examples("test", seed=1), ByteTokenizer())  # other words again
    assert fresh(model).exact_match >= 0.98


def test_a_real_model_with_its_chat_template(folder: Path, capsys):
    tokenizer = hugging_face(CHATML)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    capsys.readouterr()
    options = ["--model", "llama", "--device", "cpu", "--out", "run", "--learning-rate", "1e-3"]
    status, out, _ = train(capsys, *options)
    assert status == 0, out
    model, tokenizer = load_model(folder / "run" / "model", device="cpu")
    lines = list(read_metrics(folder / "run" / METRICS))
    assert lines[-1]["nll"] < lines[0]["nll"]
    assert "<|im_start|>assistant" in lines[-1]["answers"][0]["prompt"]
    state = load_checkpoint(folder / "run" / CHECKPOINTS)["model"]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert train(capsys, "--resume", "--out", "run")[0] == 0  # after its end: the model is there already
    assert train(capsys, *options, "--out", "long", "--max-length", "66")[0] == 2
    status, out, _ = train(capsys, *options, "--out", "cut", "--max-length", "20")
    assert status == 0
    assert "Cut to 20 tokens: 40 examples" in out
    status, out, _ = train(capsys, *options, "--dry-run", "--no-chat-template")
    assert "im_start" not in out


def test_a_trained_tiny_model_can_be_trained_on(whole: Path, capsys):
    status, _, err = train(capsys, "--model", "whole/model.pt", "--out", "more")
    assert status == 0, err
    first, later = (next(read_metrics(Path(name) / METRICS)) for name in ("whole", "more"))
    assert later["nll"] < first["nll"]
    Path("no.pt").write_bytes(b"nothing")
    status, _, err = train(capsys, "--model", "no.pt", "--out", "none")
    assert (status, err) == (2, "no.pt: got a file that holds no tiny model; expected what save_tiny_model wrote\n")


def test_hostile_texts_do_nothing(folder: Path, capsys):
    texts = [part for part in HOSTILE_PARTS if not {"\0", "\ud800"} & set(part)]
    data = "".join(
        json.dumps({"prompt": f"{n}{text}", "response": f"{text}."}) + "\n" for n, text in enumerate(texts * 3)
    )
    (folder / "hostile.jsonl").write_text(data)
    status, out, err = train(capsys, "--out", "<img src=x>", "--held-out", 0.4, data="hostile.jsonl")
    assert (status, err) == (0, "")
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", out)
    page = (folder / "<img src=x>" / "report.html").read_text(encoding="utf-8")
    assert Elements(page).tags.count("img") == 1
    assert "<img src=x>" not in page
    status, out, _ = train(capsys, "--dry-run", data="hostile.jsonl")
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", out)


def test_what_was_cut_is_told(folder: Path, capsys):
    status, out, _ = train(capsys, "--max-length", 6, "--out", "run")
    assert status == 0
    assert "Cut to 6 tokens: 40 examples" in out
    assert "Cut to 6 tokens: 40 examples" in (folder / "run" / "report.html").read_text(encoding="utf-8")


def test_fewer_examples_than_an_optimizer_step_takes_are_told(folder: Path, capsys):
    """With the built-in defaults; what it says of more examples is in another test."""
    data = [json.dumps({"prompt": f"{number}", "response": "b"}) + "\n" for number in range(3)]
    (folder / "few.jsonl").write_text("".join(data))
    assert main(["train", "--data", "few.jsonl", "--epochs", "1", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "\n2 to train on, 1 held out (--held-out changes that).\n" in out
    assert "\n16 x 4 = 64 sequences in an optimizer step at most, here 2, 1 step, token_mean" in out


def test_nothing_need_be_held_out(folder: Path, capsys):
    status, out, _ = train(capsys, "--held-out", 0, "--out", "run")
    assert status == 0
    assert "right" not in out
    assert not any("answers" in line for line in read_metrics(folder / "run" / METRICS))


def test_a_terminal_sees_a_bar(capsys, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    status, out, _ = train(capsys)
    assert status == 0
    assert re.search(r"100%\|[█#]+\| 10/10 .*NLL \d\.\d{4}, [\d,]+ response tokens/s", terminal.getvalue())
    assert out.count("response tokens/s") == 4  # a line for each evaluation


# --- before it begins ---


def test_a_dry_run_writes_nothing(folder: Path, capsys):
    before = content(folder)
    status, out, err = train(capsys, "--dry-run")
    assert (status, err) == (0, "")
    assert out.count("⟦") == out.count("⟧") == 5
    assert "4 sequences x 2 microbatches = 8 sequences" in out
    assert "\x1b" not in out  # no terminal
    assert content(folder) == before
    assert sorted(path.name for path in folder.iterdir()) == ["mine.jsonl"]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False), ({"NO_COLOR": ""}, True)],
)
def test_colour_is_for_terminals_that_want_it(monkeypatch, environment: dict[str, str], expected: bool):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert train_command._shows_colour() == expected
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    assert not train_command._shows_colour()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "missing.jsonl"], "missing.jsonl: No such file or directory"),
        (["--data", "."], ".: Is a directory"),
        (["--data", "bad.jsonl"], "bad.jsonl, line 2, response: got an empty text; expected"),
        (["--data", "empty.jsonl"], "empty.jsonl: got a file without examples"),
        (["--data", "alike.jsonl"], "--held-out: got 0.1 of 3 examples that all ask the same; expected 0"),
        (["--model", "no/such/model/anywhere"], "no/such/model/anywhere"),
        (["--microbatch-size", "0"], "--microbatch-size: got 0; expected an integer of at least 1"),
        (["--gradient-accumulation-steps", "0"], "--gradient-accumulation-steps: got 0"),
        (["--epochs", "0"], "--epochs: got 0; expected an integer of at least 1"),
        (["--learning-rate", "nan"], "--learning-rate: got nan; expected a finite number above 0"),
        (["--normalize-constant", "0"], "--normalize-constant: got 0"),
        (["--max-norm", "-1"], "--max-norm: got -1.0"),
        (["--max-length", "2"], "--max-length: got 2"),
        (["--max-length", "100000000000"], "--max-length: got 100000000000; expected an integer of at most 2147483647"),
        (["--microbatch-size", "9" * 20], f"--microbatch-size: got {'9' * 20}; expected an integer of at most"),
        (["--seed", "9" * 20], f"--seed: got {'9' * 20}; expected an integer of at most"),
        (["--threads", "9" * 11], f"--threads: got {'9' * 11}; expected an integer of at most"),
        (["--epochs", "9" * 20], f"--epochs: got {'9' * 20}; expected an integer of at most"),
        (["--held-out", "1"], "--held-out: got 1.0; expected a share from 0 up to 1"),
        (["--held-out", "nan"], "--held-out: got nan"),
        (["--threads", "0"], "--threads: got 0"),
        (["--evaluate-every", "0"], "--evaluate-every: got 0"),
        (["--device", "nonsense"], "--device: got nonsense; expected one that this machine has"),
        (["--device", "meta"], "--device: got meta"),
        (["--out", "mine.jsonl"], "mine.jsonl"),
        (["--out", "/sys/run"], "/sys/run"),
        (["--rule", "mean"], "invalid choice: 'mean'"),
        (["--microbatch-size", "many"], "invalid int value: 'many'"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_begin_is_named_and_leaves_nothing(folder: Path, capsys, arguments: list[str], words: str):
    (folder / "bad.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": ""}\n')
    (folder / "empty.jsonl").write_text("\n")
    (folder / "alike.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 3)
    before = content(folder)
    status, out, err = train(capsys, *arguments)
    assert (status, out) == (2, "")
    assert words in err
    assert "Traceback" not in err
    assert content(folder) == before
    assert not (folder / "run").exists()


def test_data_from_a_pipe_are_refused(folder: Path, capsys):
    os.mkfifo(folder / "pipe.jsonl")
    status, _, err = train(capsys, data="pipe.jsonl")  # it does not wait for somebody to write
    assert status == 2
    assert err == "--data: got pipe.jsonl, a pipe; expected a file, which a resumed run can read again\n"


@pytest.mark.parametrize("name", REFUSED)
def test_a_malformed_line_is_named_with_its_field(folder: Path, capsys, name: str):
    line, field, _ = REFUSED[name]
    line = line if isinstance(line, bytes) else json.dumps(line).encode()
    (folder / "bad.jsonl").write_bytes(b'{"prompt": "a", "response": "b"}\n' + line + b"\n")
    status, out, err = train(capsys, data="bad.jsonl")
    assert (status, out) == (2, "")
    assert err.startswith(f"bad.jsonl, line 2{', ' * bool(field)}{field}: ")
    assert err.count("\n") == 1
    assert not (folder / "run").exists()


def test_each_option_is_told_in_words_of_its_own():
    parser = argparse.ArgumentParser()
    add_options(parser)
    told = {action.dest: action.help.partition("(default")[0].strip() for action in parser._actions}
    assert [name for name, words in told.items() if len(words) < 15] == []
    assert "torchrun" in told["shard"]
    assert "template" in told["chat_template"]


def test_the_built_in_tasks_have_their_own_held_out_words(capsys):
    assert main(["train", "--dry-run"]) == 0
    assert "--held-out" not in capsys.readouterr().out
    assert main(["train", "--held-out", "0.5", "--dry-run"]) == 2
    assert capsys.readouterr().err.startswith("--held-out: got 0.5; expected none")


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr(train_command, "find_spec", lambda name: None if name == "tqdm" else name)
    status, _, err = train(capsys)
    assert (status, err) == (2, 'sft-edu train needs tqdm: pip install "sft-edu[train]"\n')


def test_another_run_is_not_touched(whole: Path, capsys):
    before = content(whole)
    status, out, err = train(capsys, "--out", whole)
    assert (status, out) == (2, "")
    assert f"sft-edu train --resume --out {whole}" in err
    assert "--out" in err
    assert content(whole) == before


@pytest.mark.parametrize("name", [SETTINGS, METRICS, CHECKPOINTS])
def test_any_trace_of_a_run_is_enough(folder: Path, capsys, name: str):
    (folder / "run" / name).mkdir(parents=True)
    assert train(capsys)[0] == 2


@pytest.mark.parametrize("name", [MODEL, f"{MODEL}.pt", REPORT])
def test_what_a_run_would_write_is_not_there_before(folder: Path, capsys, name: str):
    (folder / "run").mkdir()
    (folder / "run" / name).write_text("mine")
    before = content(folder)
    status, _, err = train(capsys)
    assert (status, content(folder)) == (2, before)
    assert err == f"{Path('run', name)}: is there already, and a run would write it; take another folder: --out\n"


def test_a_model_that_another_put_there_meanwhile_stays(whole: Path, folder: Path, capsys, monkeypatch):
    (folder / "run").mkdir()
    real = train_command.train_into

    def meanwhile(run: RunFolder, **options: object) -> bool:
        (run.folder / f"{MODEL}.pt").write_text("mine")
        return real(run, **options)

    monkeypatch.setattr(train_command, "train_into", meanwhile)
    for options in ((), ("--resume",)):
        status, out, _ = train(capsys, *options)
        assert status == 0
        assert f"Model: {Path('run', MODEL)}_2.pt" in out
        assert (folder / "run" / f"{MODEL}.pt").read_text() == "mine"
        assert (folder / "run" / f"{MODEL}_2.pt").read_bytes() == (whole / f"{MODEL}.pt").read_bytes()
    assert not (folder / "run" / f"{MODEL}_3.pt").exists()


def test_two_processes_do_not_share_a_folder(whole: Path, capsys):
    before = content(whole)
    with FileLock(whole / LOCK):
        status, _, err = train(capsys, "--resume", "--out", whole)
    assert status == 2
    assert "another process trains in it" in err
    assert content(whole) == before


# --- going on ---


def test_a_launcher_that_starts_again_goes_on_with_what_it_began_alone(whole: Path, folder: Path, capsys, monkeypatch):
    def attempt(number: int, launch: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(number))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / launch / f"attempt_{number}" / "0" / "error.json"))
        return train(capsys, *arguments)

    before = content(whole)
    for number in (0, 1):  # the first is refused; the second comes with the same words
        status, _, err = attempt(number, "none_a", "--out", "whole")
        assert status == 2
        assert "holds a run" in err
    assert content(whole) == before
    for number, status in ((1, 0), (2, 0)):  # the first attempt did not come so far as to begin
        assert attempt(number, "none_b")[0] == status
    assert attempt(1, "none_c")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "nowhere"], "nowhere: holds no run to go on with"),
        (["--rule", "notes"], "--rule: got notes; the run in whole began with token_mean"),
        (["--epochs", "3"], "--epochs: got 3; the run in whole began with 2"),
        (["--data", "other.jsonl"], "--data: got other.jsonl; the run in whole began with"),
    ],
)
def test_a_run_goes_on_as_it_began_or_not_at_all(whole: Path, capsys, arguments: list[str], words: str):
    before = content(whole)
    status, _, err = train(capsys, "--resume", "--out", "whole", *arguments)
    assert status == 2
    assert err.startswith(words)
    assert content(whole) == before


def test_the_same_may_be_said_again(whole: Path, capsys):
    before = content(whole)
    assert train(capsys, "--resume", "--data", "mine.jsonl", *SHORT, "--out", "whole")[0] == 0
    assert content(whole) == before  # the report too was written again, and is the same


def test_changed_data_and_damaged_settings_are_noticed(whole: Path, capsys):
    with Path("mine.jsonl").open("a") as file:
        file.write('{"prompt": "a", "response": "b"}\n')
    status, _, err = train(capsys, "--resume", "--out", "whole")
    assert status == 2
    assert err.startswith("--data: got ")
    assert "which has changed" in err
    for text in ("", "[]", "{}", '{"data": null'):
        (whole / SETTINGS).write_text(text)
        status, _, err = train(capsys, "--resume", "--out", "whole")
        assert status == 2
        assert "got a damaged file; expected the settings of a run" in err


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(whole: Path, folder: Path, capsys):
    newest = max((whole / CHECKPOINTS).iterdir())
    before = (whole / METRICS).read_bytes(), (whole / "model.pt").read_bytes()
    newest.write_bytes(newest.read_bytes()[:-7])
    status, _, err = train(capsys, "--resume", "--out", "whole")
    assert status == 0
    assert "is damaged; taking the one before" in err
    assert ((whole / METRICS).read_bytes(), (whole / "model.pt").read_bytes()) == before
    for path in (whole / CHECKPOINTS).iterdir():
        path.write_bytes(b"")
    status, _, err = train(capsys, "--resume", "--out", "whole")
    assert status == 2
    assert "got damaged checkpoints alone" in err


def test_infinity_is_remembered(folder: Path, capsys):
    assert train(capsys, "--max-norm", "inf")[0] == 0
    json.loads((folder / "run" / SETTINGS).read_text(), parse_constant=pytest.fail)
    assert train(capsys, "--resume", "--max-norm", "inf")[0] == 0


def test_steps_that_a_kill_took_are_told(whole: Path, capsys):
    for path in (whole / CHECKPOINTS).glob("step-00000010*"):  # as if it were killed in step 10
        path.unlink()
    for again in ("; a step that came after it is done again", ""):
        metrics = whole / METRICS
        _, _, err = train(capsys, "--resume", "--out", "whole")
        assert err == f"Goes on from the last checkpoint, after optimizer step 9 of 10{again}.\n"
        for path in (whole / CHECKPOINTS).glob("step-00000010*"):
            path.unlink()
        metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:9]))


def test_other_threads_are_told(whole: Path, capsys):
    _, _, err = train(capsys, "--resume", "--out", "whole", "--threads", 2)
    assert err == (
        "Already finished, 10 of 10 steps.\n"
        "Not bit for bit as if it had never stopped: the number of threads was 1 and is 2.\n"
    )
    assert torch.get_num_threads() == 1


# --- however it ends ---


def test_an_interrupt_keeps_everything_and_says_how_to_go_on(whole: Path, folder: Path, capsys):
    process = command("--data", "mine.jsonl", *SHORT, "--epochs", "400", "--out", "long run")
    for line in process.stdout:
        if line.startswith("step"):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (130, "")
    assert "Stopped after optimizer step" in out
    step = int(re.search(r"Stopped after optimizer step ([\d,]+) of", out)[1].replace(",", ""))
    assert [line["step"] for line in read_metrics(folder / "long run" / METRICS)] == list(range(1, step + 1))
    assert "Stopped after" in (folder / "long run" / "report.html").read_text(encoding="utf-8")
    assert not (folder / "long run" / "model.pt").exists()
    advice = shlex.split(re.search(r"Go on with: (.*)", out)[1])
    assert advice == ["sft-edu", "train", "--resume", "--out", "long run"]


@pytest.mark.parametrize(
    ("environment", "shard", "expected"),
    [
        ({}, False, "sft-edu train --resume --out 'my run'"),
        ({"LOCAL_WORLD_SIZE": "4"}, False, "torchrun --nproc-per-node 4 -m sft_edu train --resume --out 'my run'"),
        (
            {"LOCAL_WORLD_SIZE": "4"},
            True,
            "torchrun --nproc-per-node 4 -m sft_edu train --shard --resume --out 'my run'",
        ),
        ({"LOCAL_WORLD_SIZE": "2"}, False, "torchrun ... -m sft_edu train --resume --out 'my run'"),  # two machines
    ],
)
def test_a_run_goes_on_as_it_was_started(monkeypatch, environment: dict[str, str], shard: bool, expected: str):
    for name, value in (environment and {"RANK": "0", "WORLD_SIZE": "4"} | environment).items():
        monkeypatch.setenv(name, value)
    assert resume_command(Path("my run"), shard=shard) == expected


def test_one_microbatch_is_not_called_several(capsys, monkeypatch):
    monkeypatch.setattr(train_command, "stops_on_interrupt", lambda: nullcontext(lambda: next(stops)))
    stops = iter([False, True])
    assert train(capsys)[1].count("Stopped after optimizer step 0 of 10 and 1 microbatch of the next.") == 1


@pytest.mark.parametrize("microbatch", [1, 2, 7, 16])
def test_a_run_that_was_interrupted_goes_on_bit_for_bit(
    whole: Path, folder: Path, capsys, monkeypatch, microbatch: int
):
    calls, real = iter(range(1000)), Training.run_microbatch

    def interrupted(training):
        if next(calls) == microbatch:
            signal.raise_signal(signal.SIGINT)
        return real(training)

    monkeypatch.setattr(Training, "run_microbatch", interrupted)
    status, _, err = train(capsys)
    assert (status, err) == (130, "")
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    step = load_checkpoint(folder / "run" / CHECKPOINTS)["step"]
    status, _, err = train(capsys, "--resume")
    assert status == 0
    start = f"Goes on from the last checkpoint, after optimizer step {step} of 10"
    assert err in (f"{start}.\n", f"{start} and 1 microbatch of the next.\n")
    for _ in range(2):  # also when it is finished already
        page = (folder / "run" / REPORT).read_text(encoding="utf-8")
        assert f"<p>Went on after optimizer step {step}.</p>" in page
        assert train(capsys, "--resume")[0] == 0
    assert same_run(folder / "run", whole)


def test_a_second_interrupt_stops_at_once(folder: Path, capsys, monkeypatch):
    def interrupted(training):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Training, "run_microbatch", interrupted)
    status, _, err = train(capsys)
    assert (status, err) == (130, "Stopped at once. What was saved before is in run.\n")


def fails_at_call(monkeypatch, number: int, error: Exception) -> None:
    """The model's forward pass raises at its n-th call in training mode."""
    calls, real = iter(range(10_000)), TinyLM.forward

    def forward(model, *arguments):
        if next(calls) == number:
            raise error
        return real(model, *arguments)

    monkeypatch.setattr(TinyLM, "forward", forward)


no_memory = pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        MemoryError(),
    ],
    ids=["accelerator", "cpu", "python"],
)


def test_too_little_memory_is_told_with_what_to_try(folder: Path, capsys, monkeypatch):
    real = Training._accumulate

    def accumulate(training, *arguments):
        if training.step == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(training, *arguments)

    monkeypatch.setattr(Training, "_accumulate", accumulate)
    status, _, err = train(capsys)
    assert status == 1
    assert err.startswith("Failed at optimizer step 5 of 10. --microbatch-size: 4 sequences of up to ")
    assert "Try --microbatch-size 2 with --gradient-accumulation-steps 4" in err
    assert "Failed at optimizer step 5" in (folder / "run" / "report.html").read_text(encoding="utf-8")
    assert load_checkpoint(folder / "run" / CHECKPOINTS)["step"] == 3


@no_memory
def test_too_little_memory_for_an_evaluation_is_told(folder: Path, capsys, monkeypatch, error: Exception):
    def fails(evaluation, model):
        raise error

    monkeypatch.setattr(Evaluation, "__call__", fails)
    status, _, err = train(capsys)
    assert status == 1
    assert err.startswith("Failed after optimizer step 1 of 10. Too little memory on cpu")
    assert "Take a smaller --microbatch-size or --max-length" in err
    assert "Traceback" not in err
    assert "Too little memory" in (folder / "run" / "report.html").read_text(encoding="utf-8")


@no_memory
def test_a_model_that_does_not_fit_is_told(folder: Path, capsys, monkeypatch, error: Exception):
    def to(model, *arguments, **options):
        raise error

    monkeypatch.setattr(TinyLM, "to", to)
    status, _, err = train(capsys)
    assert (status, err) == (2, "The model does not fit into memory; take a smaller one or another --device.\n")


def test_a_run_that_diverges_is_told(folder: Path, capsys):
    status, _, err = train(capsys, "--learning-rate", "1e30", "--max-norm", "inf", "--warmup-steps", 0)
    assert status == 1
    assert re.match(r"Failed at optimizer step \d+ of 10\. ", err)
    assert "A lower --learning-rate" in err
    assert (folder / "run" / "report.html").exists()
    for line in (folder / "run" / METRICS).read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_any_other_error_is_not_hidden(capsys, monkeypatch):
    fails_at_call(monkeypatch, 12, RuntimeError("a mistake of ours"))
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        train(capsys)


class Disk:
    """A disk on which the n-th write fails, and every one after it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, kind: int) -> None:
        self.writes, self.number, real = 0, number, Path.open
        disk = self

        class File(io.FileIO):
            def write(self, data):
                disk.writes += 1
                if disk.writes >= disk.number:
                    super().write(memoryview(data)[: len(data) // 2])  # as far as there was room
                    raise OSError(kind, os.strerror(kind), self.name)
                return super().write(data)

        def opened(path, mode="r", *arguments, encoding=None, **options):
            if not {"w", "a"} & set(mode):
                return real(path, mode, *arguments, encoding=encoding, **options)
            file = File(path, mode.replace("b", "") + "b")
            return file if "b" in mode else io.TextIOWrapper(io.BufferedWriter(file), encoding=encoding)

        monkeypatch.setattr(Path, "open", opened)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("kind", "every"), [(errno.ENOSPC, 1), (errno.EROFS, 6)])
def test_a_disk_that_fails_at_any_write_loses_nothing(whole: Path, folder: Path, capsys, kind: int, every: int):
    number, failures = 1, 0
    while True:
        run = folder / f"run-{number}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                sft_edu.commands.report_page, "_svg", lambda lines, **look: "data:"
            )  # writes nothing, and takes time
            disk = Disk(patch, number, kind)
            status, _, err = train(capsys, "--out", run)
            if disk.writes < number:
                break
            failures += 1
            # A run that could not leave its settings, make its metrics, or its first checkpoint, has not begun.
            assert status == (2 if number <= 3 else 1), (number, err)
            assert os.strerror(kind) in err
            disk.number = sys.maxsize
            arguments = ["--resume"] if (run / SETTINGS).exists() else []
            assert train(capsys, *arguments, "--out", run)[0] == 0, number
        assert same_run(run, whole), number
        number += every
    assert status == 0
    assert failures * every > 15


def test_a_real_limit_on_the_size_of_files_loses_nothing(whole: Path, folder: Path, capsys):
    """The kernel itself refuses a checkpoint with the optimizer's state, of about 3.6 MB."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))

    process = command("--data", "mine.jsonl", *SHORT, "--out", "run", preexec_fn=limit)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1, err
    assert "File too large" in err
    assert "Traceback" not in err
    assert train(capsys, "--resume", "--out", "run")[0] == 0
    assert same_run(folder / "run", whole)


KILLER = """
import os, signal, sys, time, torch
torch.set_num_threads(1)
import torch._dynamo, sft_edu.commands.report_page  # slow to import, and needed by all
from sft_edu.cli import main
sft_edu.commands.report_page._svg([{"step": 1}], dark=False, columns=2)
for line in sys.stdin:
    seconds, *arguments = line.split()
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main(["train", *arguments]))
    end, ended = time.perf_counter() + float(seconds), 0
    while float(seconds) and not ended and time.perf_counter() < end:
        time.sleep(0.002)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        if float(seconds):
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@pytest.mark.timeout(600)
def test_the_whole_command_survives_kills(whole: Path, folder: Path):
    chance, killed = random.Random(0), 0
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen([sys.executable, "-c", KILLER], **pipes) as server:

        def attempt(run: Path, seconds: float = 0) -> int:
            arguments = ["--resume"] if (run / SETTINGS).exists() else ["--data", "mine.jsonl", *SHORT]
            server.stdin.write(" ".join([str(seconds), *arguments, "--out", run.name]) + "\n")
            server.stdin.flush()
            return int(server.stdout.readline())

        assert attempt(folder / "first") == 0
        start = time.perf_counter()
        assert attempt(folder / "timed") == 0
        seconds, number = time.perf_counter() - start, 0
        while killed < 8:
            number += 1
            run = folder / f"run-{number}"
            for _ in range(2):
                killed += attempt(run, chance.uniform(0.05, seconds)) == -signal.SIGKILL
            assert attempt(run) == 0
            assert same_run(run, whole)
            assert "Finished after" in (run / "report.html").read_text(encoding="utf-8")
        server.stdin.close()


def test_lines_of_metrics_are_json(whole: Path):
    for line in (whole / METRICS).read_text(encoding="utf-8").splitlines():
        assert as_json(json.loads(line, parse_constant=pytest.fail)) == line


def test_the_defaults_are_those_of_the_config(whole: Path):
    settings = json.loads((whole / SETTINGS).read_text())
    config = TrainConfig()
    for name in ("rule", "normalize_constant", "optimizer", "weight_decay", "max_norm", "seed"):
        assert settings[name] == getattr(config, name)


# --- The page ---


def sums(folder: Path) -> None:
    """The examples that docs/training.md speaks of."""
    examples = [{"prompt": f"{number} + 1 =", "response": f" {number + 1}"} for number in range(20)]
    (folder / "my.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))


def indented_after(start: str) -> str:
    """The indented lines of the page from this one on; blank lines between them belong to them."""
    lines = DOCS[DOCS.index(f"    {start}") :].splitlines()
    block = itertools.takewhile(lambda line: not line or line.startswith("    "), lines)
    return "\n".join(line[4:] for line in block).strip() + "\n"


def test_the_forms_on_the_page_load(folder: Path):
    (folder / "forms.jsonl").write_text(indented_after('{"prompt": "2 + 2'))
    assert len(load_jsonl("forms.jsonl")) == 4


def test_the_error_on_the_page_is_the_real_one(folder: Path, capsys):
    (folder / "my.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 2 + '{"prompt": "a", "response": ""}\n')
    assert main(["train", "--data", "my.jsonl"]) == 2
    assert capsys.readouterr().err == indented_after("my.jsonl, line 3")


def test_the_dry_run_on_the_page_is_the_real_one(folder: Path, capsys):
    sums(folder)
    (options,) = re.findall(r"`(--microbatch-size 2 .*?)`", DOCS)
    assert main(["train", "--data", "my.jsonl", "--dry-run", "--device", "cpu", *options.split()]) == 0
    assert capsys.readouterr().out == indented_after("The first microbatch")


def test_the_python_on_the_page_runs_after_the_command_on_it(folder: Path, capsys):
    sums(folder)
    (line,) = re.findall(r"^    sft-edu (train --data my.jsonl --out my_run)$", DOCS, re.MULTILINE)
    assert main(shlex.split(line)) == 0
    written = list(read_metrics("my_run/metrics.jsonl"))
    capsys.readouterr()
    (example,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    exec(compile(example, "docs/training.md", "exec"), {})
    assert capsys.readouterr().out.startswith("".join(f"{line['step']} {line['nll']}\n" for line in written))
    (again,) = re.findall(r"^    sft-edu (train --resume .*)$", DOCS, re.MULTILINE)
    assert main(shlex.split(again)) == 0


def test_the_page_lists_what_a_run_leaves_and_what_a_line_holds(whole: Path):
    fields = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", DOCS[DOCS.index("| field |") :], re.MULTILINE)
    line = list(read_metrics(whole / METRICS))[-1]
    assert sorted(name.strip("`") for field in fields for name in field.split(", ")) == sorted(line)
    assert all(f"| `{name}" in DOCS for name in FILES)


def test_the_options_and_defaults_of_the_page_are_those_of_the_command(folder: Path, capsys):
    rows = re.findall(r"^\| `(--[\w-]+)` \| (.*?) \|", DOCS, re.MULTILINE)
    assert [name for name, _ in rows][:3] == ["--rule", "--microbatch-size", "--gradient-accumulation-steps"]
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    help_text = capsys.readouterr().out
    assert all(name in help_text for name, _ in rows)
    sums(folder)
    tiny, data = (prepare_run(RunSettings(data=data), "cpu").settings for data in (None, "my.jsonl"))
    defaults = dict(rows)
    assert (tiny.num_epochs, data.num_epochs) == (1, 3)
    assert defaults["--epochs"] == f"{data.num_epochs}, or {tiny.num_epochs} without `--data`"
    for name in ("microbatch_size", "gradient_accumulation_steps"):
        assert defaults["--" + name.replace("_", "-")] == f"{getattr(tiny, name)}, or {PRETRAINED_DEFAULTS[name]}"
    assert [float(rate) for rate in defaults["--learning-rate"].split(", or ")] == [
        tiny.learning_rate,
        PRETRAINED_DEFAULTS["learning_rate"],
    ]
    assert (defaults["--rule"], defaults["--optimizer"]) == (f"`{tiny.rule}`", f"`{tiny.optimizer}`")
    assert float(defaults["--max-norm"]) == tiny.max_norm


def test_help_says_the_exit_statuses(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "0 if the run is finished, 1 if it failed, 2 if it could not begin, 130 if Ctrl+C stopped it" in words
    assert [int(row) for row in re.findall(r"^\| (\d+) \|", DOCS, re.MULTILINE)] == [0, 1, 2, 130]
