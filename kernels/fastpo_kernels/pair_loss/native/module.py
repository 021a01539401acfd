"""The compiled module, loaded when it is first asked for, or its absence, which is said once."""

from __future__ import annotations

import ctypes
import functools
import importlib
import warnings
from pathlib import Path
from types import ModuleType

import torch

_NAME = "fastpo_kernels.pair_loss.native._native"


@functools.cache
def loaded() -> ModuleType | None:
    """The module, with torch's threads; None where it was not built, with a warning."""
    try:
        found = importlib.import_module(_NAME)
    except ImportError:
        warnings.warn(
            "fastpo's C++ losses for a CPU were not built when it was installed (a C++ compiler is "
            "needed, then `pip install --force-reinstall --no-deps fastpo`); losses on a CPU run "
            "on torch's operators, which is slower",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    found.use_threads(_parallel_loop())
    return found


def _parallel_loop() -> int:
    """Address of `torch_parallel_for`, part of LibTorch's stable C interface; 0 without it."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        function = ctypes.CDLL(str(path)).torch_parallel_for
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0
