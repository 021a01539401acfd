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
_LIBRARIES = "libtorch_cpu.so", "libtorch_cpu.dylib"  # of Linux, of macOS


@functools.cache
def loaded() -> ModuleType | None:
    """The module, with torch's threads; None where it cannot be loaded.

    Warns of its absence, and where torch has threads that it cannot use.
    """
    try:
        found = importlib.import_module(_NAME)
    except ImportError as error:
        warnings.warn(_why_not(error), RuntimeWarning, stacklevel=2)
        return None
    loop = _parallel_loop()
    found.use_threads(loop)
    if not loop and torch.get_num_threads() > 1:
        warnings.warn(
            f"fastpo's C++ losses for a CPU run on one thread, not on torch's "
            f"{torch.get_num_threads()}: torch {torch.__version__} has no torch_parallel_for in "
            f"{_folder()}/{' or '.join(_LIBRARIES)}",
            RuntimeWarning,
            stacklevel=2,
        )
    return found


def _why_not(error: ImportError) -> str:
    """The warning that the module is not there, or that it is and cannot be loaded."""
    missing = isinstance(error, ModuleNotFoundError)
    what = "were not built when it was installed" if missing else "cannot be loaded"
    how = "a C++ compiler is needed, then" if missing else "to build them here:"
    text = " ".join(str(error).split())
    return (
        f"fastpo's C++ losses for a CPU {what} ({text}; {how} `pip install --force-reinstall "
        "--no-deps fastpo`); losses on a CPU run on torch's operators, which is slower"
    )


def _folder() -> Path:
    """Where torch has its libraries."""
    return Path(torch.__file__).parent / "lib"


def _parallel_loop() -> int:
    """Address of `torch_parallel_for`, part of LibTorch's stable C interface; 0 without it."""
    for name in _LIBRARIES:
        try:
            function = ctypes.CDLL(str(_folder() / name)).torch_parallel_for
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0
