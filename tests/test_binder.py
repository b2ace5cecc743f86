"""The binder/ folder, as far as it can be tried without docker."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def dockerfile() -> str:
    """The build that repo2docker plans for this repository."""
    command = [sys.executable, "-m", "repo2docker", "--no-build", "--debug", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_python_is_the_one_we_name(dockerfile: str):
    # Beside a binder/ folder repo2docker does not read requires-python and would take 3.10.
    version = (ROOT / "binder" / "runtime.txt").read_text().strip().removeprefix("python-")
    assert f"Building conda environment for python={version}" in dockerfile


def test_requirements_are_installed_where_the_project_lies(dockerfile: str):
    copied = re.search(r"COPY --chown=\S+ src/ \$\{REPO_DIR\}/", dockerfile).start()
    installed = dockerfile.index('pip install --no-cache-dir -r "binder/requirements.txt"')
    assert copied < installed < dockerfile.index("RUN ./binder/postBuild")


def test_requirements_can_be_met(tmp_path: Path):
    """With every pin, against what is installed here; only PyTorch's own index is left out."""
    lines = (ROOT / "binder" / "requirements.txt").read_text().splitlines()
    (tmp_path / "binder").mkdir()
    requirements = tmp_path / "binder" / "requirements.txt"
    requirements.write_text("\n".join(line for line in lines if not line.startswith("--extra-index-url")))
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--no-build-isolation",
        "-r",
        requirements,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # pip only warns of an extra that does not exist.
    assert "does not provide the extra" not in done.stdout + done.stderr


def test_post_build_installs_the_settings(tmp_path: Path):
    environment = os.environ | {"NB_PYTHON_PREFIX": str(tmp_path)}
    subprocess.run(["./binder/postBuild"], cwd=ROOT, env=environment, check=True)
    settings = ROOT / "sft_edu" / "jupyter_settings"
    files = [path.relative_to(settings) for path in settings.rglob("*.*") if "__pycache__" not in path.parts]
    assert len(files) == 3
    for file in files:
        assert (tmp_path / "etc/jupyter" / file).read_text() == (settings / file).read_text()
