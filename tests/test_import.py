"""What an import gives, what it does not load, and what it costs."""

import doctest
import importlib
import pkgutil
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import sft_edu

ROOT = Path(sft_edu.__file__).parents[1]
MODULES = [module.name for module in pkgutil.walk_packages(sft_edu.__path__, "sft_edu.")]

LOADED = "import sys; import torch; before = set(sys.modules); import sft_edu; print(*(set(sys.modules) - before))"


def test_the_names_of_the_lessons_come_from_the_top():
    from sft_edu import (  # noqa: F401
        RULES,
        Trace,
        compute_entropy,
        get_response_log_probs,
        masked_normalize,
        sft_microbatch_train_step,
        tokenize_prompt_and_output,
    )


@pytest.mark.parametrize("name", sft_edu.__all__)
def test_every_public_name_exists_and_is_documented(name):
    value = getattr(sft_edu, name)
    if not callable(value):  # a value is documented where it is defined, in a string below it
        source = Path(sft_edu.scaling.__file__).read_text(encoding="utf-8")
        _, _, rest = source.partition(f"\n{name}: ")
        assert rest.split("\n")[1].startswith('"""')
    else:
        assert len(value.__doc__.split()) >= 3
        assert value.__module__.startswith("sft_edu.")


def test_importing_loads_torch_and_nothing_else():
    """No numpy, widgets, plots or transformers that torch had not loaded: only this package and Python's own."""
    loaded = subprocess.run([sys.executable, "-c", LOADED], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    packages = {name.partition(".")[0] for name in loaded.split()}
    assert "sft_edu.step" in loaded.split()
    assert packages - sys.stdlib_module_names == {"sft_edu"} | ({"torch"} & packages)


def test_importing_prints_nothing_and_draws_no_random_number():
    program = (
        "import random, torch; before = torch.get_rng_state(), random.getstate(), torch.is_grad_enabled();"
        "import sft_edu; after = torch.get_rng_state(), random.getstate(), torch.is_grad_enabled();"
        "assert torch.equal(before[0], after[0]) and before[1:] == after[1:]"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_costs_little_beside_torch():
    measure = runpy.run_path(str(ROOT / "benchmarks" / "import_time.py"))["measure"]
    # A busy machine can only make it look worse, so the best of three measurements counts.
    ratios = (sft_edu / torch for torch, sft_edu in (measure(rounds=4) for _ in range(3)))
    assert any(ratio <= 1.15 for ratio in ratios)


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_in_the_docstrings_are_true(module):
    assert doctest.testmod(importlib.import_module(module)).failed == 0


def test_the_step_has_an_example():
    assert doctest.testmod(importlib.import_module("sft_edu.step")).attempted >= 5
