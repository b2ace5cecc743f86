"""Does the audit find what a step does, whoever wrote it, and does it leave everything as it was?"""

import gc
import html
import inspect
import itertools
import logging
import math
import os
import pdb
import random
import signal
import sys
import time
import warnings
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from wild_steps import WILD, confusion, finish, label

from sft_edu import RULES, StepAudit, audit_step, sft_microbatch_train_step
from sft_edu.audit import report
from sft_edu.audit.denominator import Point, product_text, recover
from sft_edu.audit.probe import Probe
from sft_edu.audit.probe_cases import SYMBOLS, Cases
from sft_edu.audit.report import CONSEQUENCES, KNOWN, PROBLEMS, consequence_of

SEEDS, STEPS_PER_SEED = 200, 3


def found(audit):
    return audit.rule, audit.formula, audit.problems


# --- The table of steps ---


def test_there_are_many_steps_and_each_rule_and_problem_has_at_least_one():
    right = [one for one in WILD.values() if one.rule and not one.problems]
    assert (len(WILD) >= 100, len(right) >= 20) == (True, True)
    assert {one.rule for one in right} == set(KNOWN)
    assert {code for one in WILD.values() for code in one.problems} == set(PROBLEMS)
    assert len({one.formula for one in WILD.values()}) >= 25


def test_the_confusion_matrix_is_diagonal():
    started = time.perf_counter()
    audits = {name: audit_step(one.step) for name, one in WILD.items()}
    seconds = (time.perf_counter() - started) / len(WILD)
    pairs = [(WILD[name].expected, label(*found(audit))) for name, audit in audits.items()]
    print(f"\n{confusion(pairs)}\n{1000 * seconds:.0f} ms per audit")
    assert [pair for pair in pairs if pair[0] != pair[1]] == []
    assert {name: found(audit) for name, audit in audits.items()} == {name: one[1:] for name, one in WILD.items()}


@pytest.mark.timeout(600)  # some six hundred audits
def test_no_seed_gives_another_answer():
    """Three steps for each of 200 seeds, in turn. `python tests/wild_steps.py 200` does all for each."""
    names = itertools.cycle(WILD)
    wrong = []
    for seed in range(SEEDS):
        for name in itertools.islice(names, STEPS_PER_SEED):
            if found(audit_step(WILD[name].step, seed=seed)) != WILD[name][1:]:
                wrong.append((name, seed))
    assert wrong == []


@pytest.mark.parametrize("rule", RULES)
def test_our_own_step_is_what_it_says_under_every_rule(rule):
    audit = audit_step(partial(sft_microbatch_train_step, rule=rule))
    assert found(audit) == (rule, RULES[rule].formula, ())
    assert audit.ok
    assert audit.name == "sft_microbatch_train_step"
    assert audit.consequence == CONSEQUENCES[rule]


def test_the_formulas_of_the_known_rules_are_those_of_the_rules():
    assert {name: KNOWN[name].formula for name in RULES} == {name: rule.formula for name, rule in RULES.items()}


def test_d_of_c_alone_is_said_to_be_token_mean_where_c_is_the_tokens_of_the_minibatch():
    audit = audit_step(WILD["leaves_g_to_the_caller"].step)
    assert (
        "unless c is given as the response tokens of the whole minibatch: then this is token_mean" in audit.consequence
    )


def test_a_known_rule_without_g_is_not_said_to_ignore_it(monkeypatch):
    monkeypatch.setattr(report, "KNOWN", {**KNOWN, "by_c_alone": report.Known({}, True)})
    monkeypatch.setitem(CONSEQUENCES, "by_c_alone", "It is what it is.")
    audit = audit_step(WILD["leaves_g_to_the_caller"].step)
    assert (*found(audit), audit.consequence) == ("by_c_alone", "c", (), "It is what it is.")


# --- Denominators ---

POWERS = st.sampled_from([Fraction(half, 2) for half in range(-6, 7)])
COUNTED = ("c", "n_b", "n", "N", "B", "T", "G")


def a_step_with(powers, factor):
    """A step whose D is the product of these powers of the counts."""

    def step(log_probs, mask, steps, constant, *, minibatch_tokens):
        rows, columns = mask.shape
        lengths = mask.sum(1).clamp(min=1).double()
        counts = {
            "c": constant,
            "n": mask.sum().clamp(min=1).double(),
            "N": minibatch_tokens,
            "B": rows,
            "T": columns,
            "G": steps,
        }
        denominator = factor * lengths ** float(powers["n_b"])
        for symbol, count in counts.items():
            denominator = denominator * count ** float(powers[symbol])
        return finish(-((log_probs * mask).sum(1) / denominator).sum())

    return step


@settings(max_examples=60, deadline=None)
@given(st.fixed_dictionaries(dict.fromkeys(COUNTED, POWERS)), st.sampled_from([1.0, 2.0, 0.5, 7.25]))
def test_any_product_of_powers_is_recovered_exactly(powers, factor):
    assert set(COUNTED) == set(SYMBOLS)
    audit = audit_step(a_step_with(powers, factor), seed=hash(tuple(powers.values())) % 1000)
    expected = {symbol: powers[symbol] for symbol in SYMBOLS if powers[symbol]}
    assert audit.formula == product_text(expected, factor)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 60),
    st.sampled_from([0, 1, 2, -1]),
    st.fixed_dictionaries({"c": POWERS, "B": POWERS, "n": POWERS}),
)
def test_any_line_in_g_is_named_as_one(slope, offset, own, powers):
    def step(log_probs, mask, steps, constant=1.0):
        others = constant ** float(powers["c"]) * len(mask) ** float(powers["B"])
        others = others * mask.sum().clamp(min=1).double() ** float(powers["n"])
        return finish(-(log_probs * mask).sum() / others / steps**own / (slope * steps + offset))

    offset = -1 if slope > 1 and offset == 1 else offset
    line = f"{'' if slope == 1 else f'{slope}·'}G{offset:+d}"
    present = {s: powers[s] for s in SYMBOLS if powers.get(s)} | ({"G": own} if own else {})
    expected = product_text(present, extra=f"({line})" if present else line)
    assert audit_step(step).formula == f"{expected} (not a product)"


@pytest.mark.parametrize(
    ("denominator", "formula"),
    [
        (lambda b, t, n, g, c: g + b, "8 at G = 3; 9 at G = 4; 11 at G = 6; 14 at G = 9 (not a product)"),
        (lambda b, t, n, g, c: max(g, 5), "5 at G = 3; 5 at G = 4; 5 at G = 5; 9 at G = 9 (not a product)"),
        (lambda b, t, n, g, c: c * g**2 if b > 1 else 9, "c·G², but 9 at B = 1, G = 1, c = 1.75 (not a product)"),
        (lambda b, t, n, g, c: g * (c if c != 1 else 4), "c·G, but 12 at B = 5, G = 3, c = 1 (not a product)"),
        (
            lambda b, t, n, g, c: c * (g - 1),
            "c·(G-1) (not a product)",
        ),
        (lambda b, t, n, g, c: 0.3 * g * c, "0.3·c·G"),
        (lambda b, t, n, g, c: g * c / 8, "c·G/8"),
        (lambda b, t, n, g, c: (g * b) ** 1.5 * c, "c·B^(3/2)·G^(3/2)"),
        (lambda b, t, n, g, c: 1e-9 * g * c, "1e-09·c·G"),
        (lambda b, t, n, g, c: g**2 * c * (t + 1), "c·G²·(T+1) (not a product)"),
        (lambda b, t, n, g, c: 3**g, "3^G (not a product)"),
    ],
)
def test_what_is_no_product_is_shown_with_measured_values(denominator, formula):
    def step(log_probs, mask, steps, constant=1.0):
        return finish(-(log_probs * mask).sum() / denominator(*mask.shape, mask.sum(), steps, constant))

    assert found(audit_step(step))[:2] == (None, formula)


def test_a_formula_agrees_with_every_measurement_or_is_not_given():
    counts = [{"G": g, "c": c} for g in (3, 4, 6, 7, 9) for c in (0.6, 1.75)]
    points = [Point(one, one["G"] ** 2 * one["c"]) for one in counts]
    assert recover(points, ("c", "G")).formula == "c·G²"
    points[-1] = Point(counts[-1], points[-1].value * 1.00001)
    assert recover(points, ("c", "G")).powers is None
    assert recover(points, ("c", "G")).predict is None


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["lattice", "wild", "tiny", "huge"]))
def test_no_denominator_takes_the_audit_down(seed, kind):
    scale = {"lattice": 1.0, "wild": 1.0, "tiny": 1e-200, "huge": 1e307}[kind]

    def step(log_probs, mask, steps, constant=1.0):
        generator = random.Random(hash((seed, mask.shape, int(mask.sum()), steps, constant)))
        value = generator.randint(1, 4) if kind == "lattice" else generator.expovariate(1) ** 9 + 1e-3
        return finish(-(log_probs * mask).sum() / (value * scale))

    audit = audit_step(step)
    assert audit.rule is None
    unknown = {"not a fixed weight per token"} | ({"no gradient"} if kind == "huge" else set())
    assert audit.formula.endswith("(not a product)") or audit.formula in unknown


# --- Cases ---


@pytest.mark.parametrize("seed", range(50))
def test_no_two_counts_and_no_two_rules_coincide_in_the_first_case(seed):
    cases = Cases(seed)
    first = cases.first
    assert len(set(first.lengths.tolist())) == len(first.lengths)
    assert cases.reference in first.lengths
    counts = first.counts(first.lengths.tolist().index(cases.reference))
    assert len(set(counts.values())) == len(counts)
    assert 2 not in (counts["B"], counts["G"])
    rows = [first.counts(row) for row in range(len(first.mask))]
    values = [[denominator(known, row) for row in rows] for known in KNOWN.values()]
    for one, other in itertools.permutations(values, 2):
        assert max(abs(a - b) / b for a, b in zip(one, other, strict=True)) > 0.01


def denominator(known, counts):
    constant = counts["c"] if known.uses_constant else 1
    return constant * math.prod(counts[symbol] ** power for symbol, power in known.powers.items())


def test_each_count_is_varied_alone_with_at_least_four_more_values():
    cases = Cases(0)
    varied = list(cases.varied(True, True))

    def reference_row(case):
        return case.counts(case.lengths.tolist().index(cases.reference))

    first = reference_row(cases.first)
    for symbol in set(SYMBOLS) - {"n_b"}:
        alone = {
            reference_row(case)[symbol]
            for case in varied
            if {s for s in SYMBOLS if reference_row(case)[s] != first[s]} == {symbol}
        }
        assert len(alone) >= 4, symbol
    for case in (cases.first, *varied):
        assert not case.mask[:, 0].any()
        assert not case.mask[:, -1].any()
        assert (case.log_probs < 0).all()


def test_the_same_seed_gives_the_same_audit_and_another_seed_other_inputs():
    one, same, other = (Cases(seed).first for seed in (3, 3, 4))
    assert torch.equal(one.log_probs, same.log_probs)
    assert torch.equal(one.mask, same.mask)
    assert not torch.equal(one.log_probs, other.log_probs)
    step = WILD["plus_two"].step
    assert repr(audit_step(step, seed=3)) == repr(audit_step(step, seed=3))


# --- What it does not do ---


MODULE_HOOKS = [
    hooks for name, hooks in vars(nn.modules.module).items() if name.startswith("_global_") and hasattr(hooks, "items")
]


def state():
    return {
        "torch rng": torch.get_rng_state().tolist(),
        "python rng": random.getstate(),
        "numpy rng": repr(np.random.get_state()),  # noqa: NPY002
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "anomaly": (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        "autocast": (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
        ),
        "filters": list(warnings.filters),
        "showwarning": warnings.showwarning,
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "float32 products": torch.get_float32_matmul_precision(),
        "print options": (repr(torch._tensor_str.PRINT_OPTS), np.get_printoptions()),
        "numpy errors": np.geterr(),
        "cudnn": [getattr(torch.backends.cudnn, name) for name in ("benchmark", "deterministic", "enabled")],
        "attention": torch.backends.cuda.flash_sdp_enabled(),
        "one thread backward": torch._C._is_multithreading_enabled(),
        "modes": torch.utils._python_dispatch._get_current_dispatch_mode_stack(),
        "saved tensors": torch._C._autograd._top_saved_tensors_default_hooks(True),
        "path": (id(sys.path), list(sys.path)),
        "arguments": sys.argv,
        "hooks": (sys.excepthook, sys.displayhook, sys.gettrace(), sys.getprofile()),
        "recursion": sys.getrecursionlimit(),
        "garbage": gc.isenabled(),
        "folder": Path.cwd(),
        "environment": dict(os.environ),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "hooks of modules": [list(hooks) for hooks in MODULE_HOOKS],
        "kernels": (torch.backends.mkldnn.enabled, torch.backends.opt_einsum.enabled),
        "finders": (list(sys.meta_path), list(sys.path_hooks)),
        "logging": (logging.root.level, list(logging.root.handlers), logging.root.manager.disable),
    }


def right(log_probs, mask, steps, constant):
    return finish(-(log_probs * mask).sum() / constant / steps**2)


def enter(context):
    context.__enter__()


class CountsNothing(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        return function(*arguments, **(keywords or {}))


class FindsNothing:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None


def no_hook(path):
    raise ImportError(path)


VANDALISM = {
    "seeds everything": lambda: (torch.manual_seed(0), random.seed(0), np.random.seed(0)),  # noqa: NPY002
    "draws random numbers": lambda: (torch.rand(9), random.random(), np.random.rand()),  # noqa: NPY002
    "disables gradients": lambda: torch.set_grad_enabled(False),
    "enters no_grad": lambda: enter(torch.no_grad()),
    "enters inference mode": lambda: enter(torch.inference_mode()),
    "changes the default dtype": lambda: torch.set_default_dtype(torch.float64),
    "changes the default device": lambda: torch.set_default_device("meta"),
    "enters a device": lambda: enter(torch.device("meta")),
    "changes the threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "wants determinism": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "detects anomalies": lambda: torch.autograd.set_detect_anomaly(True),
    "casts": lambda: (torch.set_autocast_enabled("cpu", True), torch.set_autocast_dtype("cpu", torch.float16)),
    "turns the autocast cache off": lambda: torch.set_autocast_cache_enabled(False),
    "turns warnings into errors": lambda: warnings.simplefilter("error"),
    "warns": lambda: warnings.warn("look here", stacklevel=1),
    "prints": lambda: (print("\udce4" * 1000), print("to stderr", file=sys.stderr), sys.stdout.buffer.write(b"x")),
    "closes stdout": lambda: sys.stdout.close(),
    "replaces stdout": lambda: setattr(sys, "stdout", None),
    "waits for input": lambda: sys.stdin.read(),
    "replaces stdin": lambda: setattr(sys, "stdin", None),
    "wants coarse products": lambda: torch.set_float32_matmul_precision("medium"),
    "prints few digits": lambda: (torch.set_printoptions(precision=1), np.set_printoptions(precision=1)),
    "lets numpy raise": lambda: np.seterr(all="raise"),
    "sets flags of cuDNN": lambda: setattr(torch.backends.cudnn, "benchmark", True),
    "chooses an attention kernel": lambda: torch.backends.cuda.enable_flash_sdp(False),
    "wants one thread backward": lambda: torch.autograd.set_multithreading_enabled(False),
    "enters a dispatch mode": lambda: enter(CountsNothing()),
    "enters saved tensor hooks": lambda: enter(torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)),
    "extends the path": lambda: sys.path.insert(0, "/nowhere"),
    "replaces the path": lambda: setattr(sys, "path", ["/nowhere"]),
    "replaces the arguments": lambda: setattr(sys, "argv", ["me"]),
    "hooks into errors": lambda: setattr(sys, "excepthook", print),
    "recurses deeper": lambda: sys.setrecursionlimit(sys.getrecursionlimit() + 1000),
    "stops the garbage collector": lambda: gc.disable(),
    "changes the folder": lambda: os.chdir("/"),
    "changes the environment": lambda: os.environ.update(SFT_EDU_TEST="1"),
    "ignores signals": lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "hooks into every module": lambda: (
        nn.modules.module.register_module_forward_hook(lambda *arguments: None),
        nn.modules.module.register_module_full_backward_hook(lambda *arguments: None),
    ),
    "turns off oneDNN": lambda: setattr(torch.backends.mkldnn, "enabled", not torch.backends.mkldnn.enabled),
    "finds modules its own way": lambda: (sys.meta_path.insert(0, FindsNothing), sys.path_hooks.append(no_hook)),
    "sets up a log": lambda: (
        logging.root.addHandler(logging.StreamHandler()),
        logging.root.setLevel(1),
        logging.disable(),
    ),
}


@pytest.mark.parametrize("what", VANDALISM)
def test_a_step_that_changes_global_state_is_audited_as_if_it_did_not_and_leaves_no_trace(what, capfd):
    def step(log_probs, mask, steps, constant=1.0):
        result = right(log_probs, mask, steps, constant)
        VANDALISM[what]()
        return result

    before = state()
    audit = audit_step(step)
    assert state() == before
    assert found(audit) == ("notes", "c·G²", ())
    assert capfd.readouterr() == ("", "")


def test_a_step_that_deletes_the_folder_it_is_in_leaves_everything_else_as_it_was(tmp_path, monkeypatch):
    def step(log_probs, mask, steps, constant=1.0):
        tmp_path.joinpath("here").rmdir() if tmp_path.joinpath("here").exists() else None
        torch.set_default_dtype(torch.float64)
        os.chdir("/")
        return right(log_probs, mask, steps, constant)

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert found(audit_step(step)) == ("notes", "c·G²", ())
    assert torch.get_default_dtype() == torch.float32


class FakeAccelerator:
    """A device module that counts its generator up, as drawing from it would."""

    def __init__(self, in_use):
        self.in_use, self.drawn = in_use, 7

    def is_initialized(self):
        return self.in_use

    def get_rng_state_all(self):
        assert self.in_use, "this would start an idle accelerator"
        return self.drawn

    def set_rng_state_all(self, drawn):
        self.drawn = drawn


@pytest.mark.parametrize("in_use", [True, False])
def test_the_generators_of_an_accelerator_are_kept_if_it_is_in_use_and_it_is_not_started_if_not(in_use, monkeypatch):
    accelerator = FakeAccelerator(in_use)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(torch, "get_device_module", lambda *_: accelerator)

    def step(log_probs, mask, steps, constant=1.0):
        accelerator.drawn += 1
        return right(log_probs, mask, steps, constant)

    assert found(audit_step(step)) == ("notes", "c·G²", ())
    assert (accelerator.drawn == 7) == in_use


CALLERS = {
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "meta device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "anomaly detection": lambda: torch.autograd.detect_anomaly(check_nan=True),
}


@pytest.mark.parametrize("where", CALLERS)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_the_caller_may_be_in_any_mode(where):
    def step(log_probs, mask, steps, constant=1.0):
        one = torch.ones((), requires_grad=True)
        assert torch.einsum("bt,bt->", log_probs.float(), mask.float()).dtype == one.dtype == torch.float32
        return right(log_probs, mask, steps, torch.tensor(constant))

    with CALLERS[where]():
        before = state()
        audit, empty = audit_step(step), audit_step(WILD["divides_by_zero_tokens"].step)
        assert state() == before
    assert found(audit) == ("notes", "c·G²", ())
    assert empty.problems == ("nan-on-empty-mask",)


def test_the_defaults_of_the_caller_are_his_own_afterwards():
    try:
        torch.set_default_dtype(torch.float16)
        torch.set_default_device("meta")
        before = state()
        audit = audit_step(WILD["by_a_hand_written_gradient"].step)
        assert state() == before
        assert torch.empty(2).device.type == "meta"
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert found(audit) == ("notes", "c·G²", ())
    assert torch.empty(2).device.type == "cpu"


class Unreadable(BaseException):
    def __str__(self):
        raise SystemExit("no")


class Hostile:
    """Raises whatever is asked of it."""

    def __getattr__(self, name):
        raise RuntimeError(name)

    def __call__(self, log_probs, mask, steps, constant=1.0):
        return right(log_probs, mask, steps, constant)


def raising(error):
    def step(log_probs, mask, steps, constant=1.0):
        raise error

    return step


def returning(make):
    def step(log_probs, mask, steps, constant=1.0):
        right(log_probs, mask, steps, constant)
        return make()

    return step


def itself():
    one = []
    one.extend([one] * 50)
    return torch.zeros(()), {"self": one}


HOSTILE = {
    "raises SystemExit": (raising(SystemExit(0)), "raises"),
    "raises an exception that is none": (raising(Unreadable()), "raises"),
    "raises with a huge text": (raising(ValueError("<b>" * 10**6)), "raises"),
    "raises with a lone surrogate": (raising(ValueError("\udcff\x00\u202e<img src=x onerror=alert(1)>")), "raises"),
    "recurses": (lambda *arguments: HOSTILE["recurses"][0](*arguments), "raises"),
    "returns a metadata that holds itself": (returning(itself), "value-mismatch"),
    "returns a string": (returning(lambda: "1.5"), "value-mismatch"),
    "returns NaN": (returning(lambda: (float("nan"), {})), "value-mismatch"),
    "returns infinity": (returning(lambda: (float("inf"), {})), "value-mismatch"),
    "returns a type": (returning(lambda: type("<script>", (), {})()), "value-mismatch"),
    "is a class": (Hostile, "no-backward"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_step_is_reported_and_nothing_it_says_becomes_markup(what):
    step, code = HOSTILE[what]
    before = state()
    audit = audit_step(step)
    assert state() == before
    assert audit.problems[0] == code or what == "is a class"
    assert not audit.ok
    for text in (str(audit), audit._repr_html_()):
        text.encode("utf-8")
        assert all(character.isprintable() or character == "\n" for character in text)
        assert len(text) < 3000
    markup = audit._repr_html_()
    for tag in ("<b>", "<img", "<script"):
        assert tag not in markup


def test_an_object_without_attributes_is_still_a_step():
    assert found(audit_step(Hostile())) == ("notes", "c·G²", ())


def test_a_coroutine_function_is_told_that_nothing_ran():
    async def step(log_probs, mask, steps, constant=1.0):
        return right(log_probs, mask, steps, constant)

    audit = audit_step(step)
    assert audit.problems[0] == "no-backward"
    assert "It returns a coroutine: nothing of it ran." in audit.details["no-backward"]


def test_a_breakpoint_does_not_wait(capfd):
    def step(log_probs, mask, steps, constant=1.0):
        pdb.Pdb(nosigint=True).set_trace()
        return right(log_probs, mask, steps, constant)

    assert audit_step(step).problems == ("raises",)
    assert capfd.readouterr() == ("", "")


def test_a_keyboard_interrupt_passes_through_and_the_state_is_as_before():
    def step(log_probs, mask, steps, constant=1.0):
        torch.set_default_dtype(torch.float64)
        random.seed(0)
        raise KeyboardInterrupt

    before = state()
    with pytest.raises(KeyboardInterrupt):
        audit_step(step)
    assert state() == before


@pytest.mark.parametrize("seed", [1.0, "1", True, None])
def test_a_seed_is_an_integer(seed):
    with pytest.raises(TypeError, match=r"^seed: got"):
        audit_step(sft_microbatch_train_step, seed=seed)


@pytest.mark.parametrize("step", [42, None, "step"])
def test_what_cannot_be_called_is_refused(step):
    with pytest.raises(TypeError, match=r"^step: got .*; expected a function"):
        audit_step(step)


# --- Forms of call ---


CONTRACT = list(inspect.signature(sft_microbatch_train_step).parameters)[:4]


def test_the_form_that_fits_is_found_and_the_likeliest_is_first():
    def form_of(step):
        probe = Probe(step)
        probe.fit(Cases(0).first)
        return probe.form

    def given(name):
        """The arguments that go by position, and the keywords of the others."""
        form = form_of(WILD[name].step)
        by_name = {one.what: one.keyword for one in form.given if not one.by_position}
        return [one.what for one in form.given if one.by_position], by_name

    first = ["log_probs", "mask", "steps"]
    contract = dict(zip([*first, "constant"], CONTRACT, strict=True))
    assert form_of(WILD["the_reference"].step)[2:] == (False, torch.float64, torch.bool, True)
    assert given("the_reference") == given("by_position_only") == ([*first, "constant"], {})
    assert given("without_the_constant") == (first, {})
    assert given("constant_by_keyword_only") == (first, {"constant": "normalize_constant"})
    assert given("by_name_only") == ([], contract)
    assert given("takes_any_name") == ([], contract | {"tokens": "minibatch_tokens"})
    assert given("by_other_names") == ([], {"log_probs": "logps", "mask": "m", "steps": "steps", "constant": "c"})
    assert given("in_another_order") == (["mask", "log_probs", "constant", "steps"], {})
    assert given("mask_and_steps_by_name") == (["log_probs"], {"mask": "mask", "steps": "G"})
    assert given("takes_anything") == ([*first, "constant"], {"tokens": "minibatch_tokens"})
    assert given("as_the_trainer_does") == given("wants_n_as_a_tensor") == ([*first, "tokens"], {})
    assert given("takes_n_third") == given("as_the_trainer_does_without_g") == (["log_probs", "mask", "tokens"], {})
    assert given("counts_its_calls") == given("takes_a_reference") == (first, {})
    assert form_of(WILD["wants_n_as_a_tensor"].step).tokens_as_tensor
    assert not form_of(WILD["as_the_trainer_does"].step).tokens_as_tensor
    assert form_of(WILD["with_an_integer_mask"].step).mask_dtype == torch.int64
    assert form_of(WILD["with_a_float_mask"].step).mask_dtype == torch.float64
    assert not form_of(WILD["masks_the_log_probs_in_place"].step).is_leaf
    defaults = {
        name: (form.may_omit_constant, form.default_constant)
        for name in ("the_reference", "by_position_only", "takes_any_name", "has_another_default", "a_partial")
        for form in [form_of(WILD[name].step)]
    }
    assert defaults == {
        "the_reference": (True, 1.0),
        "by_position_only": (False, None),
        "takes_any_name": (True, None),
        "has_another_default": (True, 512.0),
        "a_partial": (True, 1024.0),
    }


def test_a_constant_in_the_middle_can_be_left_to_its_default():
    seen = []

    def step(log_probs, mask, normalize_constant=8.0, grad_acc_steps=1):
        seen.append((normalize_constant, grad_acc_steps))
        return finish(-(log_probs * mask).sum() / normalize_constant / grad_acc_steps)

    assert found(audit_step(step)) == ("microbatch_mean", "c·G", ())
    assert (8.0, 3) in seen


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("is_a_loop", "It looks like a whole loop: audit_accumulation is for those."),
        ("wants_an_optimizer", "It has to be given optimizer, too: wrap the step"),
        ("cannot_take_its_constant", "Whenever normalize_constant is given: NameError"),
    ],
)
def test_a_step_that_cannot_be_called_as_a_step_is_told_why(name, words):
    assert words in audit_step(WILD[name].step).details["raises"]


def test_a_fourth_argument_that_is_not_the_constant_is_left_alone():
    def logs(log_probs, mask, steps, logger=None):
        if logger is not None:
            logger.info("step")
        return finish(-(log_probs * mask).sum() / steps)

    def flags(log_probs, mask, steps, length_normalize=False):
        assert length_normalize is False
        return finish(-(log_probs * mask).sum() / steps)

    def single(log_probs, mask, steps, constant=1.0):
        assert log_probs.dtype == torch.float32
        return right(log_probs, mask, steps, constant)

    assert found(audit_step(logs)) == found(audit_step(flags)) == ("microbatch_mean", "G", ())
    assert found(audit_step(single)) == ("notes", "c·G²", ())


# --- Reports ---


def test_the_report_reads_well_and_says_what_was_measured():
    assert str(audit_step(WILD["shifts_the_mask_left"].step)) == (
        "shifts_the_mask_left: sequence_mean, D = c·B·G\n"
        "1 problem found in 38 calls:\n"
        "  prompt-tokens-trained  A gradient reaches 5 of 65 prompt, 0 of 50 padding tokens and 1 of 1 gap token in a "
        "response; the mask is one position too early.\n"
        "Tokens outside the mask are trained: as far as they weigh, the model learns to write prompts or padding."
    )
    two = audit_step(WILD["just_the_sum"].step)
    assert str(two).splitlines()[1:4] == [
        "2 problems found in 38 calls:",
        "  constant-ignored  D = 1 at c = 0.6 and at c = 3.2.",
        "  steps-ignored     D = 1 at G = 3 and at G = 9.",
    ]


def test_the_html_says_what_the_text_says():
    audit = audit_step(WILD["just_the_sum"].step)
    markup = audit._repr_html_()
    for words in (audit.formula, *audit.problems, *audit.details.values(), audit.consequence):
        assert html.escape(words) in markup
    assert "<table>" not in audit_step(sft_microbatch_train_step)._repr_html_()


def test_every_text_of_a_report_is_escaped():
    evil = "<img src=x onerror=alert(1)>&\"'"
    audit = StepAudit(evil, evil, evil, (evil,), {evil: evil}, evil, 1)
    markup = audit._repr_html_()
    assert "<img" not in markup
    assert markup.count(html.escape(evil)) == 6


def test_details_and_dict_hold_every_problem_in_the_documented_order():
    for name in ("keeps_everything", "just_the_sum", "takes_a_logarithm_too_many"):
        audit = audit_step(WILD[name].step)
        assert list(audit.problems) == [code for code in PROBLEMS if code in audit.problems]
        assert tuple(audit.details) == audit.problems
        assert audit.as_dict()["problems"] == list(audit.problems)
        assert audit.consequence.splitlines()[0] == PROBLEMS[audit.problems[0]]


@pytest.mark.parametrize("rule", CONSEQUENCES)
def test_what_a_rule_does_is_said_beside_problems_that_leave_its_gradient(rule):
    said = [
        consequence_of(rule, problems, "") for problems in ((), ("loss-attached",), ("zeroes-grad", "loss-attached"))
    ]
    alone, beside, other = said
    assert alone == CONSEQUENCES[rule]
    assert beside.splitlines() == [PROBLEMS["loss-attached"], CONSEQUENCES[rule]]
    assert other == PROBLEMS["zeroes-grad"]  # the gradient is no longer what the rule makes of it


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("forgets_backward", "call .backward() on it"),
        ("writes_the_gradient_by_hand", "parameters behind them get no gradient"),
        ("returns_the_loss_before_the_second_division", "3 times as much"),
        ("keeps_a_nested_entropy", "statistics[0].entropy"),
        ("inverts_the_mask", "the mask is inverted"),
        ("shifts_the_mask_right", "one position too late"),
        ("weighs_the_prompt_a_little", "0.1 times that of a response token"),
        ("leaks_next_to_nothing", "1e-08 times that of a response token"),
        ("mean_over_all_positions", "at T = 27 and 402.857 at T = 47. Only the padding differs."),
        ("freezes_the_log_probs", "policy_log_probs"),
        ("clears_the_mask", "response_mask"),
        ("squeezes_a_single_sequence", "B = 1"),
        ("raises_always", "NotImplementedError: TODO"),
        ("leaves_the_program", "SystemExit: 3"),
        ("refuses_a_large_g", "G = 9"),
        ("takes_a_square_root", "With B = 5"),
        ("divides_by_the_steps_to_come", "G = 1, c = 1.75 the gradient is not finite"),
        ("skips_long_microbatches", "n = 39, G = 3, c = 1.75 no gradient arrived"),
        ("takes_log_probs_and_mask_alone", "It takes no G, under any name that is known."),
        ("has_a_ratio_of_one", "With other log-probs that does not change; going by the gradient it changes by"),
        ("returns_a_running_mean", "The same arguments gave one gradient, and the losses"),
        ("returns_an_array", "What is returned first is ndarray; a loss is one number."),
        ("calls_the_loss_something_else", 'a dict without the key "loss"'),
        ("clips_every_gradient", "what had accumulated is scaled too, as when clipping inside the step"),
    ],
)
def test_the_evidence_names_what_to_look_for(name, words):
    audit = audit_step(WILD[name].step)
    assert words in " ".join(audit.details.values())
