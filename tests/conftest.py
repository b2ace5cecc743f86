"""What every test shares."""

import json
import os
import shutil
import subprocess

import pytest
import torch

# The models here are tiny: a second thread costs more than it brings, and much more where tests share the machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def node():
    """Runs node with arguments, and a text on its standard input."""
    path = shutil.which("node")
    if path is None:
        complain = pytest.fail if os.environ.get("CI") else pytest.skip
        complain("node is missing; on Debian and Ubuntu: sudo apt-get install nodejs")

    def run(*arguments, text=None):
        return subprocess.run([path, *arguments], input=text, capture_output=True, text=True, timeout=60)

    return run


@pytest.fixture(scope="session")
def evaluate(node):
    """The value of an expression over the exports of `module`, given as its text."""

    def value(source, expression):
        program = f"""
        const text = {json.dumps(source)};
        const module = await import("data:text/javascript," + encodeURIComponent(text));
        console.log(JSON.stringify({expression}));
        """
        answer = node("--input-type=module", "-", text=program)
        assert answer.returncode == 0, answer.stderr
        return json.loads(answer.stdout)

    return value
