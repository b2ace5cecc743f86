"""`sft-edu lab`: a learner's own folder, the check of the machine, and the same from a wheel."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from pathlib import Path

import pytest

import sft_edu.commands.lab
import sft_edu.commands.lab_check
import sft_edu.course.lesson_folder
from sft_edu.cli import main
from sft_edu.course.lesson_folder import MANIFEST, copy_lessons
from sft_edu.course.lessons import course_folder
from sft_edu.course.progress import VARIABLE

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ROOT / "sft_edu" / "jupyter_settings"


def run(capsys, *arguments):
    status = main(["lab", *map(str, arguments)])
    return (status, *capsys.readouterr())


# --- The folder ---


@pytest.fixture
def course(tmp_path, monkeypatch) -> Path:
    """A small course, to be shipped in several versions."""
    folder = tmp_path / "course"
    (folder / "notebooks" / ".ipynb_checkpoints").mkdir(parents=True)
    (folder / "docs").mkdir()
    for name in ("notebooks/00.ipynb", "notebooks/01.ipynb", "docs/audit.md", "notebooks/.ipynb_checkpoints/00.ipynb"):
        (folder / name).write_text(f"{name}, version 1")
    monkeypatch.setattr(sft_edu.course.lesson_folder, "course_folder", lambda: folder)
    return folder


@pytest.fixture
def mine(tmp_path) -> Path:
    return tmp_path / "mine"


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def test_a_new_folder_gets_all_lessons(course, mine):
    copied = copy_lessons(mine)
    assert str(copied) == "New files: 3."
    assert contents(mine) == {
        name: f"{name}, version 1" for name in ("notebooks/00.ipynb", "notebooks/01.ipynb", "docs/audit.md")
    }
    assert str(copy_lessons(mine)) == ""


def test_what_was_edited_is_kept_and_the_rest_is_updated(course, mine):
    copy_lessons(mine)
    (mine / "notebooks/00.ipynb").write_text("my answers")
    (mine / "notebooks/note.ipynb").write_text("my own")
    assert str(copy_lessons(mine)) == "Kept as you left them: 1."
    for version in (2, 3):
        for name in ("notebooks/00.ipynb", "notebooks/01.ipynb"):
            (course / name).write_text(f"{name}, version {version}")
        copied = str(copy_lessons(mine))
        beside = "notebooks/00_new.ipynb" if version == 2 else "notebooks/00_new_2.ipynb"
        assert copied.splitlines() == [
            "Updated, as you had not edited them: 1.",
            "Kept as you left them: 1.",
            f"The new version of notebooks/00.ipynb is {beside}",
        ]
        assert contents(mine)[beside] == f"notebooks/00.ipynb, version {version}"
        assert contents(mine)["notebooks/01.ipynb"] == f"notebooks/01.ipynb, version {version}"
        assert str(copy_lessons(mine)) == "Kept as you left them: 1."
    assert contents(mine)["notebooks/00.ipynb"] == "my answers"
    assert contents(mine)["notebooks/note.ipynb"] == "my own"


def test_what_was_removed_comes_again(course, mine):
    copy_lessons(mine)
    (mine / "notebooks/00.ipynb").rename(mine / "notebooks/old.ipynb")
    assert copy_lessons(mine).new == ["notebooks/00.ipynb"]
    assert len(contents(mine)) == 4


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff"])
def test_without_its_manifest_every_file_counts_as_edited(course, mine, content):
    copy_lessons(mine)
    (mine / MANIFEST).write_bytes(content)
    (mine / "notebooks/00.ipynb").write_text("my answers")
    assert copy_lessons(mine).kept == {"notebooks/00.ipynb": "notebooks/00_new.ipynb"}
    assert contents(mine)["notebooks/00.ipynb"] == "my answers"


def test_an_interrupted_copy_goes_on(course, mine, monkeypatch):
    """Stopped before each of its writes in turn, in a new folder and in an update."""
    replace = sft_edu.course.lesson_folder._replace
    for version in (1, 2):
        for name in ("notebooks/00.ipynb", "notebooks/01.ipynb", "docs/audit.md"):
            (course / name).write_text(f"{name}, version {version}")
        if version == 2:
            (mine / "notebooks/01.ipynb").write_text("my answers")
        for writes in range(5):
            left = iter(range(writes))

            def stopping(path, content, left=left):
                if next(left, None) is None:
                    raise KeyboardInterrupt
                replace(path, content)

            monkeypatch.setattr(sft_edu.course.lesson_folder, "_replace", stopping)
            try:
                copy_lessons(mine)
            except KeyboardInterrupt:
                assert not list(mine.rglob("*.unfinished"))
        monkeypatch.setattr(sft_edu.course.lesson_folder, "_replace", replace)
        copy_lessons(mine)
        assert contents(mine)["notebooks/00.ipynb"] == f"notebooks/00.ipynb, version {version}"
    assert contents(mine)["notebooks/01.ipynb"] == "my answers"
    assert [name for name in contents(mine) if "_new" in name] == ["notebooks/01_new.ipynb"]  # once, not at each try


def test_folders_of_others_are_refused(course, tmp_path, capsys):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("years of work")
    status, _, err = run(capsys, "--folder", theirs)
    assert (status, err) == (
        2,
        f"folder: got {theirs}, which holds other files; expected an empty folder or a new name\n",
    )
    assert contents(theirs) == {"thesis.tex": "years of work"}

    status, _, err = run(capsys, "--folder", theirs / "thesis.tex")
    assert (status, err) == (
        2,
        f"folder: got {theirs / 'thesis.tex'}, which is a file; expected a folder or a new name\n",
    )
    status, _, err = run(capsys, "--folder", theirs / "thesis.tex" / "below")
    assert status == 2
    assert "Not a directory" in err


def test_a_folder_that_cannot_be_written_is_named(course, mine, capsys, monkeypatch):
    def read_only(self, *arguments, **keywords):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", read_only)
    status, _, err = run(capsys, "--folder", mine)
    assert status == 2
    assert err == f"[Errno 13] Permission denied: '{mine}'\n"


# --- The start ---


@pytest.fixture
def started(monkeypatch):
    """The commands that would have started JupyterLab, each with its environment."""
    calls = []
    monkeypatch.setattr(
        sft_edu.commands.lab, "_start", lambda command, environment: calls.append((command, environment)) or 0
    )
    return calls


def test_the_lessons_open_with_our_settings(tmp_path, capsys, started, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", "theirs")
    status, out, err = run(capsys)
    ((command, environment),) = started
    folder = tmp_path / "sft_edu_lessons"
    assert (status, err) == (0, "")
    assert out.startswith(f"Lessons: {folder / 'notebooks'}\n")
    assert command[:3] == [sys.executable, "-m", "jupyterlab"]
    assert {f"--ServerApp.root_dir={folder}", "--LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb"} < {
        *command
    }
    assert environment["JUPYTER_CONFIG_PATH"].split(os.pathsep) == [str(SETTINGS), "theirs"]
    assert Path(shutil.which("sft-edu", path=environment["PATH"])).parent == Path(sysconfig.get_path("scripts"))
    assert environment[VARIABLE] == str(folder)
    assert contents(folder) == {
        path.relative_to(ROOT).as_posix(): path.read_text()
        for part in ("notebooks", "docs")
        for path in (ROOT / part).rglob("*")
        if path.suffix in (".ipynb", ".md") and ".ipynb_checkpoints" not in path.parts
    }


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        (["--port", "8899"], ["--port=8899"]),
        (["--no-browser"], ["--no-browser"]),
        (["--", "--ip=0.0.0.0", "--no-browser"], ["--ip=0.0.0.0", "--no-browser"]),
        (["--port", "1", "--", "--debug"], ["--port=1", "--debug"]),
    ],
)
def test_options_reach_jupyter(tmp_path, capsys, started, monkeypatch, given, passed):
    monkeypatch.setenv("DISPLAY", ":0")
    assert run(capsys, "--folder", tmp_path / "mine", *given)[0] == 0
    assert started[0][0][-len(passed) :] == passed


def test_root_and_a_missing_screen_are_told_to_jupyter(tmp_path, capsys, started, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "WSL_DISTRO_NAME"):
        monkeypatch.delenv(name, raising=False)
    run(capsys, "--folder", tmp_path / "mine")
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    run(capsys, "--folder", tmp_path / "mine")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    run(capsys, "--folder", tmp_path / "mine")
    flags = [{"--no-browser", "--allow-root"} & {*command} for command, _ in started]
    assert ("--no-browser" in flags[0]) == sys.platform.startswith("linux")
    assert flags[1:] == [{"--allow-root"}, set()]


def test_in_place_opens_the_repository_and_copies_nothing(tmp_path, capsys, started, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "--in-place")[0] == 0
    assert f"--ServerApp.root_dir={ROOT}" in started[0][0]
    assert started[0][1][VARIABLE] == str(ROOT)
    assert not list(tmp_path.iterdir())
    assert not (ROOT / MANIFEST).exists()
    monkeypatch.setattr(sft_edu.commands.lab, "course_folder", lambda: tmp_path)
    assert run(capsys, "--in-place")[0] == 2


def test_a_missing_extra_is_named_with_the_line_that_installs_it(tmp_path, capsys, started, monkeypatch):
    version = sft_edu.commands.lab_check._version
    monkeypatch.setattr(
        sft_edu.commands.lab_check, "_version", lambda name: None if name == "jupyterlab" else version(name)
    )
    status, out, err = run(capsys, "--folder", tmp_path / "mine")
    assert (status, out, started) == (2, "", [])
    assert "Not installed: jupyterlab." in err
    assert err.endswith(f'    {sys.executable} -m pip install "sft-edu[lab]"\n')
    assert not (tmp_path / "mine").exists()
    status, out, _ = run(capsys, "--check")
    assert status == 1
    assert re.search(r"^NO +jupyterlab +missing\n +\S+ -m pip install \"sft-edu\[lab\]\"$", out, re.MULTILINE)


# --- The check ---


def lines(out: str) -> dict[str, str]:
    return {line.split()[1]: line for line in out.splitlines() if not line.startswith(" ")}


def test_the_check_finds_this_machine_ready_and_writes_nothing(tmp_path, capsys, started, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "--check")
    assert (status, err, started) == (0, "", [])
    found = lines(out)
    expected = {"Python", "torch", "jupyterlab", "ipywidgets", "anywidget", "matplotlib", "device", "kernel", "browser"}
    assert expected < set(found)
    assert all(found[name].startswith("ok") for name in expected - {"browser"})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "version", "range_"),
    [("jupyterlab", "3.6.8", "<5,>=4.2"), ("torch", "2.6.0", ">=2.7"), ("anywidget", "1.0.0", "<1,>=0.9")],
)
def test_a_version_out_of_range_is_told(capsys, monkeypatch, name, version, range_):
    real = sft_edu.commands.lab_check._version
    monkeypatch.setattr(sft_edu.commands.lab_check, "_version", lambda asked: version if asked == name else real(asked))
    status, out, _ = run(capsys, "--check")
    assert status == 1
    assert f"{version}, not {range_}" in lines(out)[name]
    assert f'-m pip install "{name}{range_}"' in out


def test_an_old_python_is_told(capsys, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 13))
    status, out, _ = run(capsys, "--check")
    assert status == 1
    assert lines(out)["Python"].startswith("NO")
    assert "Take a Python >=3.11." in out


def test_a_device_that_fails_or_computes_nonsense_is_told(capsys, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("CUDA driver version is insufficient")

    right = sft_edu.sft_microbatch_train_step
    for step in (broken, lambda log_probs, mask, steps: right(log_probs, mask, steps + 1)):
        monkeypatch.setattr(sft_edu, "sft_microbatch_train_step", step)
        status, out, _ = run(capsys, "--check")
        assert status == 1
        assert lines(out)["device"].startswith("NO")


def test_a_kernel_of_another_python_is_told(tmp_path, capsys, monkeypatch):
    kernel = tmp_path / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    for program, status in (("/elsewhere/bin/python", 1), (sys.executable, 0), ("python", 0)):
        kernel.write_text(json.dumps({"argv": [program, "-m", "ipykernel_launcher"], "display_name": "x"}))
        assert run(capsys, "--check")[0] == status


# --- From a wheel ---


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the package as a wheel installs it, without its dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT]
    subprocess.run([*pip, *build], check=True, capture_output=True)
    (wheel,) = folder.glob("sft_edu-*.whl")
    install = ["install", "--no-deps", "--no-index", "--target", folder / "site", wheel]
    subprocess.run([*pip, *install], check=True, capture_output=True)
    return folder / "site"


def test_a_wheel_holds_all_that_the_repository_has(installed):
    def files(folder: Path) -> set[str]:
        found = (path.relative_to(folder) for path in folder.rglob("*.*"))
        return {path.as_posix() for path in found if not {"__pycache__", ".ipynb_checkpoints"} & {*path.parts}}

    assert files(installed / "sft_edu/course/notebooks") == files(ROOT / "notebooks")
    assert files(installed / "sft_edu/course/docs") == files(ROOT / "docs")
    package = {
        name for name in files(installed / "sft_edu") if not name.startswith(("course/notebooks", "course/docs"))
    }
    assert package == files(ROOT / "sft_edu")
    assert {path.name for path in installed.iterdir()} <= {"sft_edu", "bin", "sft_edu-0.1.0.dist-info"}


def test_lessons_open_from_a_wheel_and_leave_other_settings_alone(installed, tmp_path):
    """In an empty home: a real server, with our settings, on a learner's copy of the lessons."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "SFT_EDU"))}
    home = tmp_path / "home"
    home.mkdir()
    environment = outside | {"HOME": str(home), "PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "sft_edu", "lab", "--port", str(port), "--no-browser", "--"]
    command += ["--IdentityProvider.token=t", "--ServerApp.port_retries=0"]
    log = tmp_path / "log"
    with log.open("w") as sink:
        server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=sink, stderr=sink)
    try:
        lab = fetch(server, log, port, "/lab")
        assert '"disabledExtensions": ["@jupyterlab/application-extension:faviconbusy"]' in lab
        tracker = json.loads(fetch(server, log, port, "/lab/api/settings/@jupyterlab/notebook-extension:tracker"))
        assert tracker["schema"]["properties"]["windowingMode"]["default"] == "none"
        start = json.loads(fetch(server, log, port, "/api/contents/notebooks/00_start_here.ipynb"))
        assert start["content"]["cells"][0]["source"].startswith("# 0. Start here")
    finally:
        server.terminate()
        server.wait(20)
    assert f"127.0.0.1:{port}/lab/tree/notebooks/00_start_here.ipynb" in log.read_text()
    # Jupyter notes there that it has looked for settings of its predecessor.
    assert {path.name for path in home.rglob("*") if ".jupyter" in path.parts} <= {".jupyter", "migrated"}
    assert contents(tmp_path / "sft_edu_lessons").keys() == {
        path.relative_to(course_folder()).as_posix() for path in sft_edu.course.lesson_folder._shipped()
    }


def fetch(server: subprocess.Popen, log: Path, port: int, path: str, seconds: float = 60) -> str:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}?token=t", timeout=10) as answer:
                return answer.read().decode()
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"no answer from JupyterLab:\n{log.read_text()}")


def test_the_server_takes_our_connection(tmp_path):
    """What `sft-edu lab` puts into the environment, read as Jupyter reads it."""
    environment = os.environ | sft_edu.commands.lab._environment(tmp_path) | {"HOME": str(tmp_path)}
    command = [sys.executable, "-m", "jupyterlab", "--show-config-json"]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert "PromptConnection" in shown
