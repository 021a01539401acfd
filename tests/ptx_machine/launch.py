"""Where a driver that does nothing would launch a kernel, the machine executes it.

The driver is a shared library that Triton takes for libcuda; `fake_cuda.c` says what it must hold.
Triton's own binder, compiler and launcher come before it: parameters are read from the bytes that
the launcher packs, the text of a kernel from the files that the compiler leaves.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import PtxError
from .machine import Machine
from .memory import LARGE, POISON, Space, host_space
from .parser import parse

_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
)
_ALLOCATORS = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"))
_ALLOCATORS += ((torch.Tensor, "new_empty"),)


class LaunchHook:
    """Installed for the rest of the process.

    A kernel may access the storages of tensors whose address somebody asked for since the launch
    before: that is how addresses come into parameters. What `torch.empty` gives is filled with a
    pattern, by which loads of what nobody wrote are found.

    Args:
        library: the driver.
        machine: executes; it may be exchanged later.

    Attributes:
        edit: changes the text of a kernel before it is executed, given its name.
        error: the last launch's, if it failed; Triton raises its text as a RuntimeError.
    """

    def __init__(self, library: ctypes.CDLL, machine: Machine) -> None:
        from triton import knobs

        self.machine = machine
        self.edit: Callable[[str, str], str] = lambda name, text: text
        self.error: Exception | None = None
        self._texts: dict[int, tuple[str, str]] = {}
        self._widths: dict[str, list[int]] = {}
        self._given: dict[int, tuple[Any, int]] = {}
        self._poisoned: dict[int, int] = {}
        self._text = ctypes.c_char_p.in_dll(library, "fake_cuda_error")
        self._callback = _LAUNCH(self._launch)  # kept: C holds only its address
        ctypes.c_void_p.in_dll(library, "fake_cuda_on_launch").value = ctypes.cast(
            self._callback, ctypes.c_void_p
        ).value
        knobs.runtime.kernel_load_end_hook.add(self._loaded)
        self._watch_addresses()
        for owner, name in _ALLOCATORS:
            setattr(owner, name, self._filling(getattr(owner, name)))

    def _loaded(self, _: Any, function: int, name: str, files: dict[str, str], __: str) -> None:
        path = next(path for file, path in files.items() if file.endswith(".ptx"))
        self._texts[function] = (name, Path(path).read_text())

    def _watch_addresses(self) -> None:
        data_ptr = torch.Tensor.data_ptr

        def recorded(tensor: torch.Tensor) -> int:
            if tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage.nbytes():
                    self._given[storage.data_ptr()] = (storage, storage.nbytes())
            return data_ptr(tensor)

        torch.Tensor.data_ptr = recorded  # pyright: ignore[reportAttributeAccessIssue]

    def _filling(self, allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = allocate(*args, **kwargs)
            if type(out) is torch.Tensor and out.device.type == "cpu":
                storage = out.untyped_storage()
                base, n_bytes = storage.data_ptr(), storage.nbytes()
                if 0 < n_bytes <= LARGE:
                    space = host_space(base, n_bytes, "")
                    space.view(2)[:] = POISON
                    self._poisoned[base] = n_bytes
            return out

        return filled

    def _spaces(self) -> list[Space]:
        spaces = []
        for base, (_, n_bytes) in self._given.items():
            space = host_space(base, n_bytes, f"a tensor at {base:#x}")
            space.poisoned = self._poisoned.get(base) == n_bytes
            spaces.append(space)
        return spaces

    def _launch(self, config: int, function: int, parameters: Any) -> int:
        """What the driver calls; 0 if all went well."""
        try:
            self.error = None
            numbers = np.frombuffer((ctypes.c_uint32 * 7).from_address(config), np.uint32)
            x, y, z, threads, *_, shared = map(int, numbers)
            name, text = self._texts[function]
            text = self.edit(name, text)
            if text not in self._widths:
                self._widths[text] = list(parse(text).parameters.values())
            given = [ctypes.string_at(parameters[k], w) for k, w in enumerate(self._widths[text])]
            self.machine.launch(text, (x, y, z), threads, given, self._spaces(), shared)
        except Exception as error:  # it must not reach C
            self.error = error
            told = str(error) if isinstance(error, PtxError) else repr(error)
            self._message = told.encode()[:900]
            self._text.value = self._message
            return 1
        finally:
            self._given.clear()
        return 0
