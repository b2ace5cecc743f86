"""Run somebody else's code and leave the process as it was.

Covered: random number generators (Python's, torch's on the CPU and on an accelerator that is in use, numpy's if it is
loaded), grad mode, inference mode, autocast, anomaly detection, default dtype and device, number of threads,
deterministic algorithms, warning filters, `sys.stdout` and `sys.stderr`. Files, the environment, signal handlers and
code that ends the process are out of reach.
"""

from __future__ import annotations

import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from functools import partial

import torch
from torch import overrides
from torch.utils import _device

_SETTINGS: tuple[tuple[Callable[[], object], Callable[[object], object]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
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
    # Only if it is loaded: importing it here would change the process too.
    numpy_random = sys.modules["numpy"].random if "numpy" in sys.modules else None
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
    device the CPU. Warnings are ignored, and what is printed goes nowhere.
    """
    with ExitStack() as stack:
        stack.callback(_restorer(_SETTINGS))
        stack.callback(_restorer(_autocast_settings()))
        stack.enter_context(_no_default_device())
        # Leaving this one also undoes an inference mode or a grad mode that was entered inside and never left.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(warnings.catch_warnings())
        # A real file: it has a descriptor, a buffer and an encoding, as code that prints may expect.
        nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8", errors="replace"))  # noqa: PTH123
        stack.enter_context(redirect_stdout(nowhere))
        stack.enter_context(redirect_stderr(nowhere))
        warnings.simplefilter("ignore")
        torch.set_default_dtype(torch.float32)
        torch.autograd.set_detect_anomaly(False)
        for device_type in _autocast_devices():
            torch.set_autocast_enabled(device_type, False)
        yield


def _restorer(settings) -> Callable[[], None]:
    """A function that sets what differs from now. What is the same is left alone: some setters are slow."""
    found = [get() for get, _ in settings]

    def restore() -> None:
        for (get, put), value in zip(settings, found, strict=True):
            if get() != value:
                put(value)

    return restore


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
    module = torch.get_device_module(accelerator)
    if not getattr(module, "is_initialized", lambda: True)():
        return []
    if hasattr(module, "get_rng_state_all"):
        return [(module.set_rng_state_all, module.get_rng_state_all())]
    return [(module.set_rng_state, module.get_rng_state())]
