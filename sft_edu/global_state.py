"""Run somebody else's code and leave the process as it was.

Covered, of torch: random number generators on the CPU and on an accelerator that is in use, grad mode, inference mode,
autocast, anomaly detection, default dtype and device, threads, deterministic algorithms, precision of float32 products,
the switches of cuDNN, oneDNN, opt_einsum and the attention kernels, print options, hooks of all modules, modes and
saved-tensor hooks that were entered and not left.
Of Python: its random number generator, warning filters, the root logger, the hooks, streams and limits in `sys`,
`sys.path` and the finders of modules, garbage collection, the current folder, the environment and signal handlers. Of
numpy, if it is loaded: its random number generator, error handling and print options.

Out of reach: files, what a started program prints, timers, threads that were started, what other modules keep (such as
the context of `decimal`, a logger that is not the root, the sharing strategy of `torch.multiprocessing`), functions of
theirs that were replaced, and code that ends the process.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import partial
from typing import Any

import torch
from torch import overrides
from torch.nn.modules import module
from torch.utils import _device, _python_dispatch

Setting = tuple[Callable[[], Any], Callable[[Any], object]]


def _attribute(owner: object, name: str) -> Setting:
    return partial(getattr, owner, name), partial(setattr, owner, name)


def _contents(owner: object, name: str) -> Setting:
    """A list by its items; afterwards the attribute is the very list that it was."""
    kept = getattr(owner, name)

    def put(items: list[object]) -> None:
        kept[:] = items
        setattr(owner, name, kept)

    return lambda: list(getattr(owner, name)), put


def _entries(kept: dict) -> Setting:
    """A dict by its entries; afterwards it is the very dict that it was."""

    def put(entries: dict) -> None:
        kept.clear()
        kept.update(entries)

    return lambda: dict(kept), put


def _put_environment(found: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(found)


def _put_handlers(found: list[Any]) -> None:
    if threading.current_thread() is threading.main_thread():  # elsewhere nothing could have changed them
        for number, handler in zip(_SIGNALS, found, strict=True):
            signal.signal(number, handler)


_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGALRM") if hasattr(signal, name)]
_SYS = ("argv", "displayhook", "dont_write_bytecode", "excepthook", "stdin", "unraisablehook")
_LISTS = ("path", "meta_path", "path_hooks")
_CUDNN = ("allow_tf32", "benchmark", "deterministic", "enabled")
_ATTENTION = ("flash", "mem_efficient", "math", "cudnn")

_MODULE_HOOKS = [
    hooks for name, hooks in vars(module).items() if name.startswith("_global_") and isinstance(hooks, dict)
]

_PROCESS: tuple[Setting, ...] = (
    (os.getcwd, os.chdir),
    (lambda: dict(os.environ), _put_environment),
    (gc.isenabled, lambda found: gc.enable() if found else gc.disable()),
    (lambda: [signal.getsignal(number) for number in _SIGNALS], _put_handlers),
    (sys.getrecursionlimit, sys.setrecursionlimit),
    (sys.gettrace, sys.settrace),
    (sys.getprofile, sys.setprofile),
    (lambda: logging.root.level, logging.root.setLevel),
    _attribute(logging.root.manager, "disable"),
    *(_attribute(sys, name) for name in _SYS),
)
_SETTINGS: tuple[Setting, ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (lambda: dict(vars(torch._tensor_str.PRINT_OPTS)), lambda found: vars(torch._tensor_str.PRINT_OPTS).update(found)),
    (torch.is_warn_always_enabled, torch.set_warn_always),
    (torch._C._is_multithreading_enabled, torch._C._set_multithreading_enabled),
    *(_attribute(torch.backends.cudnn, name) for name in _CUDNN),
    *(_attribute(library, "enabled") for library in (torch.backends.mkldnn, torch.backends.opt_einsum)),
    *(_entries(hooks) for hooks in _MODULE_HOOKS),
    _attribute(module, "_global_is_full_backward_hook"),
    *(
        (getattr(torch.backends.cuda, f"{name}_sdp_enabled"), getattr(torch.backends.cuda, f"enable_{name}_sdp"))
        for name in _ATTENTION
    ),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda found: torch.use_deterministic_algorithms(found[0], warn_only=found[1]),
    ),
    (
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        lambda found: torch.autograd.set_detect_anomaly(*found),
    ),
)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Every random number generator is afterwards in the state that it was in."""
    found = random.getstate(), torch.get_rng_state()
    accelerators = _accelerator_generators()
    numpy_random = sys.modules["numpy"].random if "numpy" in sys.modules else None  # if it is loaded
    numpy_state = numpy_random.get_state() if numpy_random else None
    try:
        yield
    finally:
        random.setstate(found[0])
        torch.set_rng_state(found[1])
        for restore, state in accelerators:
            restore(state)
        if numpy_random:
            numpy_random.set_state(numpy_state)


@contextmanager
def plain_settings() -> Iterator[None]:
    """PyTorch's own settings inside, the caller's afterwards, whatever happened inside.

    Inside, gradients are recorded, autocast and anomaly detection are off, the default dtype is float32 and the default
    device the CPU. There is one thread: for the small inputs here a second one costs more than it brings. Warnings are
    ignored, what is printed goes nowhere, and nothing can be typed in: `breakpoint()` raises instead of waiting.
    """
    with ExitStack() as stack:
        lists = (*(_contents(sys, name) for name in _LISTS), _contents(logging.root, "handlers"))
        for settings in (_PROCESS, lists, _numpy_settings(), _SETTINGS, _autocast_settings()):
            stack.callback(_restorer(settings))
        stack.enter_context(_no_default_device())
        stack.enter_context(_no_more_modes())
        # Leaving this one also undoes an inference mode or a grad mode that was entered inside and never left.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(warnings.catch_warnings())
        # A real file: it has a descriptor, a buffer and an encoding, as code that prints may expect.
        nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8", errors="replace"))  # noqa: PTH123
        stack.enter_context(redirect_stdout(nowhere))
        stack.enter_context(redirect_stderr(nowhere))
        sys.stdin = stack.enter_context(open(os.devnull, encoding="utf-8"))  # noqa: PTH123
        warnings.simplefilter("ignore")
        torch.set_default_dtype(torch.float32)
        if torch.get_num_threads() != 1:
            torch.set_num_threads(1)
        torch.autograd.set_detect_anomaly(False)
        for device_type in _autocast_devices():
            torch.set_autocast_enabled(device_type, False)
        yield


def _restorer(settings: Sequence[Setting]) -> Callable[[], None]:
    """A function that sets what differs from now. What is the same is left alone: some setters are slow."""
    found = [(get, put, value) for get, put in settings for value in _read(get)]

    def restore() -> None:
        for get, put, value in found:
            if _read(get) != [value]:
                with suppress(Exception):  # such as a folder that was deleted meanwhile: the others have to follow
                    put(value)

    return restore


def _read(get: Callable[[], object]) -> list[object]:
    """The value of a setting; nothing where it cannot be read, as of a current folder that was deleted."""
    with suppress(Exception):
        return [get()]
    return []


def _numpy_settings() -> list[Setting]:
    """Only if it is loaded: importing it here would change the process too."""
    if "numpy" not in sys.modules:
        return []
    numpy = sys.modules["numpy"]
    return [
        (numpy.geterr, lambda found: numpy.seterr(**found)),
        (numpy.get_printoptions, lambda found: numpy.set_printoptions(**found)),
    ]


@contextmanager
def _no_more_modes() -> Iterator[None]:
    """Dispatch modes and hooks of saved tensors that were entered inside and never left are taken off their stacks."""
    modes, hooks = _python_dispatch._get_current_dispatch_mode_stack(), _saved_tensors_hooks()
    try:
        yield
    finally:
        while len(_python_dispatch._get_current_dispatch_mode_stack()) > len(modes):
            _python_dispatch._pop_mode()
        while (found := _saved_tensors_hooks()) is not None and found != hooks:
            torch._C._autograd._pop_saved_tensors_default_hooks()


def _saved_tensors_hooks() -> tuple[Callable, Callable] | None:
    """Those of the innermost `saved_tensors_hooks`."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


@contextmanager
def _no_default_device() -> Iterator[None]:
    """As in a fresh process inside. The caller's modes are afterwards the same objects in the same order.

    A default device is a mode on a stack, whether it came from `torch.set_default_device` or a `with` statement, and no
    public function takes a stack apart that somebody left in disorder.
    """
    holder, modes = torch._GLOBAL_DEVICE_CONTEXT, overrides._get_current_function_mode_stack()
    found, current = getattr(holder, "device_context", None), _device.CURRENT_DEVICE
    try:
        _replace_modes([])
        holder.device_context = None
        yield
    finally:
        _replace_modes(modes)
        holder.device_context, _device.CURRENT_DEVICE = found, current


def _replace_modes(modes: Sequence[overrides.TorchFunctionMode]) -> None:
    for _ in overrides._get_current_function_mode_stack():
        overrides._pop_mode()
    for mode in modes:
        overrides._push_mode(mode)


def _autocast_devices() -> list[str]:
    accelerator = torch.accelerator.current_accelerator()
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def _autocast_settings() -> list[tuple[Callable, Callable]]:
    pairs = (
        (torch.is_autocast_enabled, torch.set_autocast_enabled),
        (torch.get_autocast_dtype, torch.set_autocast_dtype),
    )
    return [(partial(get, name), partial(put, name)) for name in _autocast_devices() for get, put in pairs]


def _accelerator_generators() -> list[tuple[Callable, object]]:
    """The accelerator's generators, if it is in use: looking at an idle one would start it."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return []
    device = torch.get_device_module(accelerator)
    if not getattr(device, "is_initialized", lambda: True)():
        return []
    if hasattr(device, "get_rng_state_all"):
        return [(device.set_rng_state_all, device.get_rng_state_all())]
    return [(device.set_rng_state, device.get_rng_state())]
