"""`make` on a fresh checkout, with a stand-in for Python that writes down what it is asked to do."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]

STAND_IN = """#!/bin/sh
echo "$*" >> "{log}"
case "$*" in
  *ensurepip*) exit {no_ensurepip} ;;
  *version_info*) echo "{version}" ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip install "*) {during_pip} ;;
esac
"""


@dataclass
class Checkout:
    """A copy of what `make` needs, and the calls that reached its Python."""

    folder: Path

    def python(self, version: str = "3 12 1", no_ensurepip: int = 0, during_pip: str = "true") -> None:
        script = STAND_IN.format(
            log=self.folder / "calls", version=version, no_ensurepip=no_ensurepip, during_pip=during_pip
        )
        # A Python that changes must change inside the environment too.
        inside = self.folder / ".venv" / "bin" / "python"
        for path in [self.folder / "python", inside]:
            if path.parent.exists():
                path.write_text(script)
                path.chmod(0o755)
                os.utime(path, (0, 0))

    def make(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Nothing of the outer `make` reaches the inner one: only PATH is kept."""
        (self.folder / "calls").write_text("")
        return subprocess.run(
            ["make", "PYTHON=./python", *arguments],
            cwd=self.folder,
            env={"PATH": os.environ["PATH"], "HOME": str(self.folder), **environment},
            capture_output=True,
            text=True,
        )

    def calls(self, part: str) -> list[str]:
        return [line for line in (self.folder / "calls").read_text().splitlines() if part in line]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    for name in ["Makefile", "pyproject.toml", "constraints.txt"]:
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    fresh = Checkout(tmp_path)
    fresh.python()
    return fresh


def test_first_lab_installs_and_opens_the_first_lesson(checkout: Checkout):
    done = checkout.make("lab", "PIP_FLAGS=--index-url x", "LAB_FLAGS=--port 8899")
    assert done.returncode == 0, done.stderr
    assert checkout.calls("-m venv") == ["-m venv .venv"]
    (install,) = checkout.calls("pip install")
    assert install.endswith("-c constraints.txt --index-url x -e .[lab]")
    assert checkout.calls("-m sft_edu lab") == ["-m sft_edu lab --in-place --port 8899"]


def test_second_lab_installs_nothing(checkout: Checkout):
    checkout.make("lab")
    assert checkout.make("lab").returncode == 0
    assert len(checkout.calls("")) == len(checkout.calls("-m sft_edu lab")) == 1


def test_what_the_tests_install_serves_the_lab_too(checkout: Checkout):
    checkout.make("test")
    assert checkout.calls("pip install")[0].endswith("-e .[test]")
    checkout.make("lab")
    assert not checkout.calls("pip install")


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_dependency_is_installed(checkout: Checkout, name: str):
    checkout.make("lab")
    os.utime(checkout.folder / name, (2**32, 2**32))
    checkout.make("lab")
    assert len(checkout.calls("pip install")) == 1
    assert not checkout.calls("-m venv")


def test_every_version_that_is_installed_runs_on_the_oldest_python_that_is_promised():
    """Debian 12 has Python 3.11.2: a patch release too new for it would be none that `make` can install there."""
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    oldest = re.fullmatch(r">=(\S+)", metadata.metadata("sft-edu")["Requires-Python"])[1] + ".0"
    there = {name: metadata.metadata(name)["Requires-Python"] for name in pins if _is_installed(name)}
    assert len(there) > 0.9 * len(pins)
    assert {name: needed for name, needed in there.items() if oldest not in SpecifierSet(needed or "")} == {}


def _is_installed(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:  # a package of another platform
        return False


def test_a_removed_python_is_noticed(checkout: Checkout):
    checkout.make("lab")
    (checkout.folder / ".venv/bin/python").unlink()
    assert checkout.make("lab").returncode == 0
    assert checkout.calls("-m venv")


def test_an_environment_of_somebody_else_is_kept(checkout: Checkout):
    theirs = checkout.folder / ".venv" / "bin" / "precious"
    theirs.parent.mkdir(parents=True)
    theirs.touch()
    done = checkout.make("lab")
    assert done.returncode != 0
    assert ".venv exists, has no pip, and was not made here." in done.stderr
    assert theirs.exists()


def test_a_killed_installation_starts_over(checkout: Checkout):
    checkout.python(during_pip="kill -9 $PPID")
    assert checkout.make("lab").returncode != 0
    checkout.python()
    assert checkout.make("lab").returncode == 0
    assert checkout.calls("-m venv")
    assert checkout.calls("pip install")


def test_a_failed_download_goes_on_where_it_stopped(checkout: Checkout):
    checkout.python(during_pip="exit 1")
    done = checkout.make("lab")
    assert done.returncode != 0
    assert "Run the same command again" in done.stderr
    checkout.python()
    assert checkout.make("lab").returncode == 0
    assert not checkout.calls("-m venv")
    assert checkout.calls("pip install")


@pytest.mark.parametrize("version", ["2 7 18", "3 6 15", "3 10 13"])
def test_an_old_python_is_named(checkout: Checkout, version: str):
    checkout.python(version=version)
    done = checkout.make("lab")
    assert done.returncode != 0
    assert f"is Python {version.replace(' ', '.')}. sft_edu needs Python 3.11 or newer." in done.stderr
    assert "make lab PYTHON=python3.12" in done.stderr
    assert not (checkout.folder / ".venv").exists()


def test_a_missing_python_is_named(checkout: Checkout):
    done = checkout.make("lab", "PYTHON=python3.99")
    assert done.returncode != 0
    assert "There is no python3.99 here. sft_edu needs Python 3.11 or newer." in done.stderr


def test_a_missing_venv_module_is_named(checkout: Checkout):
    checkout.python(no_ensurepip=1)
    done = checkout.make("lab")
    assert done.returncode != 0
    assert "sudo apt-get install python3.12-venv" in done.stderr
    assert not (checkout.folder / ".venv").exists()


def test_help_lists_every_target(checkout: Checkout):
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    listed = checkout.make().stdout.splitlines()
    assert [line.split()[0] for line in listed] == phony[1].split()


def test_no_file_names_a_place_on_somebodys_machine():
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    private = re.compile(rb"(?<![\w./~])/(?:home|root|Users|tmp|work|mnt)/\w")
    files = [ROOT / name for name in names if name and (ROOT / name).is_file()]
    assert [path.name for path in files if private.search(path.read_bytes())] == []
