"""Find somebody's function by name: `path/to/file.py:function` or `package.module:function`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import FunctionType, ModuleType

from sft_edu.global_state import plain_settings, random_state_kept

_MODULE_NAME = "_sft_edu_target"  # not "__main__", so that a guarded main part does not run


class TargetError(Exception):
    """The function cannot be had; the text says why, for people."""


@contextmanager
def target_function(target: str) -> Iterator[Callable[..., object]]:
    """The function that `target` names. Its module is run, its `if __name__ == "__main__"` part is not.

    Inside the block the folder of the file (for a dotted name the current one) comes first in `sys.path`, as when
    Python runs a file, `sys.argv` holds no arguments, and no byte code is written. What the module prints while it is
    loaded goes to standard error. Afterwards the process is as before, as `global_state.py` says, and `sys.modules` too
    but for installed packages: the next file has neighbours of its own, perhaps with the same names.

    Raises:
        TargetError: there is no such file, module or function, it is not callable, or the module fails; then the text
            is the traceback with the frames of that module and its neighbours alone.
    """
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise TargetError(f"{target}: expected path/to/file.py:function or package.module:function")
    folder, shown = Path(place).resolve().parent if _is_file(place) else Path.cwd(), sys.stderr
    with _own_neighbours(folder), random_state_kept(), plain_settings(), redirect_stderr(shown):
        sys.argv, sys.dont_write_bytecode = [place], True
        with redirect_stdout(shown):
            module = _load_file(Path(place)) if _is_file(place) else _load_module(place)
        yield _function(module, place, name)


@contextmanager
def _own_neighbours(folder: Path) -> Iterator[None]:
    """Modules that the folder has too, but which were loaded from elsewhere, are out of the way meanwhile.

    Modules that were loaded inside, and are not installed, are forgotten afterwards.
    """
    importlib.invalidate_caches()  # a file may have been written just now
    before = dict(sys.modules)
    neighbours = {entry.stem for entry in folder.iterdir()} if folder.is_dir() else set()
    for name, module in before.items():
        is_elsewhere = name.partition(".")[0] in neighbours and not Path(_file_of(module)).is_relative_to(folder)
        if is_elsewhere and _is_own(_file_of(module)):
            del sys.modules[name]
    try:
        yield
    finally:
        for name, module in list(sys.modules.items()):
            if name == _MODULE_NAME or (before.get(name) is not module and _is_own(_file_of(module))):
                del sys.modules[name]
        sys.modules.update({name: module for name, module in before.items() if name not in sys.modules})


def _file_of(module: ModuleType) -> str:
    """Where it was loaded from; "<frozen>" where from no file, as what is built in."""
    own = getattr(module, "__dict__", {})  # no attribute access: some modules answer any name
    file, paths = own.get("__file__"), own.get("__path__")  # a package without __init__.py has a path alone
    return file or next(iter(paths or ()), "<frozen>")


def _is_file(place: str) -> bool:
    return place.endswith(".py") or "/" in place or "\\" in place or Path(place).is_file()


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise TargetError(f"{path}: {'it is a folder' if path.is_dir() else 'there is no such file'}")
    if path.suffix == ".ipynb":
        raise TargetError(f"{path}: it is a notebook; expected a .py file, as `jupyter nbconvert --to script` writes")
    sys.path.insert(0, str(path.resolve().parent))
    loader = SourceFileLoader(_MODULE_NAME, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(_MODULE_NAME, loader))  # type: ignore[arg-type]
    module.__file__ = str(path)
    sys.modules[_MODULE_NAME] = module  # dataclasses and pickle look there
    try:
        loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a script may end itself
        is_relative = isinstance(error, ImportError) and "relative import" in str(error)
        hint = "\nA file of a package is named package.module:function, from the folder with the package in it."
        raise TargetError(_own_traceback(error) + hint * is_relative) from None
    return module


def _load_module(name: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{name}.".startswith(f"{missing}."):  # not one that the module itself wants
            raise TargetError(f"{name}: there is no module {missing}; a file is named with its path and .py") from None
        raise TargetError(_own_traceback(error)) from None


def _function(module: ModuleType, place: str, name: str) -> Callable[..., object]:
    found: object = module
    owner: object = None
    for part in name.split("."):
        try:
            owner, found = found, getattr(found, part)
        except AttributeError:
            raise TargetError(f"{place}: there is no {name} in it.{_what_it_has(module)}") from None
        except Exception as error:  # a module may have a __getattr__ of its own
            raise TargetError(_own_traceback(error)) from None
    if isinstance(owner, type) and isinstance(vars(owner).get(part), FunctionType):
        raise TargetError(f"{place}: {name} is a method; name a function that makes its object and calls it")
    if not callable(found):
        raise TargetError(f"{place}: {name} is {type(found).__name__}; expected a function")
    return found


def _what_it_has(module: ModuleType) -> str:
    """The functions that are defined in the module, as a hint."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    functions = [name for name in own if callable(vars(module)[name]) and not name.startswith("_")]
    return f" It has {', '.join(functions[:8])}." if functions else ""


def _own_traceback(error: BaseException) -> str:
    """The traceback without the frames of this package, of Python and of installed packages."""
    report = traceback.TracebackException.from_exception(error)
    waiting: list[traceback.TracebackException | None] = [report]
    seen: set[int] = set()
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            one.stack = traceback.StackSummary.from_list([frame for frame in one.stack if _is_own(frame.filename)])
            waiting += [one.__cause__, one.__context__, *(one.exceptions or ())]
    return "".join(report.format()).rstrip()


def _is_own(filename: str) -> bool:
    others = [Path(__file__).parents[1], *map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib"))]
    return not filename.startswith("<frozen") and not any(Path(filename).is_relative_to(str(other)) for other in others)
