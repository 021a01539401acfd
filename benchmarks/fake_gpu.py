"""Triton's own binder, compiler and launcher on CPU tensors, without a GPU.

Neither the interpreter nor a kernel compiled from a signature written by hand goes through what a
launch does first: binding the arguments, specializing on them, compiling what comes out, and the C
launcher. Here all of that is real, for the target named; only libcuda is not (`fake_cuda.c`), so
nothing runs, and outputs hold what their memory held, unless something executes launches in its
place (`tests/ptx_machine`). It shows that calls compile and launch, into what, how many launches
they are, and what they cost the host. For a process of its own, without TRITON_INTERPRET, before
`fastpo_kernels` launches anything.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).with_name("fake_cuda.c")
ARCHITECTURES = {f"sm_{c}": c for c in (80, 86, 89, 90, 100, 120)} | {"gfx942": "gfx942"}


@dataclass(frozen=True)
class Compiled:
    """A kernel that a launch compiled: its name, and Triton's object with all stages of code."""

    name: str
    kernel: Any


class FakeGpu:
    """The installed driver; `target` is one of `ARCHITECTURES`.

    Args:
        keep_arguments: fill `arguments`, which costs the host more than a launch.

    Attributes:
        compiled: the kernels of all first launches, in order.
        arguments: of every launch if kept, flat, tensors as their addresses.
        library: what stands for libcuda; None for AMD.
    """

    def __init__(self, target: str, *, keep_arguments: bool = False) -> None:
        self.target, self.keep_arguments = target, keep_arguments
        self.compiled: list[Compiled] = []
        self.arguments: list[list[Any]] = []
        self.library: ctypes.CDLL | None = None
        self._known: set[int] = set()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._install()

    @property
    def launches(self) -> int:
        """Kernel launches that reached libcuda; AMD's are not counted."""
        assert self.library is not None, "only NVIDIA's launcher is here"
        return ctypes.c_int.in_dll(self.library, "fake_cuda_launches").value

    def _install(self) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver

        architecture = ARCHITECTURES[self.target]
        nvidia = isinstance(architecture, int)
        made = GPUTarget("cuda" if nvidia else "hip", architecture, 32 if nvidia else 64)
        parts: Any = self._nvidia() if nvidia else (_NoLauncher, _NoUtils())
        if not nvidia:
            torch.version.hip = "none"  # the launch table asks

        class Driver:
            launcher_cls, utils = parts

            def get_current_target(self) -> GPUTarget:
                return made

            def get_current_device(self) -> int:
                return 0

            def get_current_stream(self, device: int) -> int:
                return 0

            def get_active_torch_device(self) -> torch.device:
                return torch.device("cpu")

        active: Any = Driver()
        driver.set_active(active)
        self._record()

    def _nvidia(self) -> tuple[type, Any]:
        """Triton's launcher for NVIDIA, built against a libcuda that does nothing."""
        # Triton links a launcher against it whenever it compiles one: it lasts as long as this.
        self._folder = tempfile.TemporaryDirectory(prefix="fastpo-fake-gpu-")
        library = Path(self._folder.name) / "libcuda.so.1"
        name = "-Wl,-soname,libcuda.so.1"  # by which the launcher finds the loaded one
        subprocess.run(["gcc", "-shared", "-fPIC", name, "-o", library, SOURCE], check=True)
        self.library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        os.environ["TRITON_LIBCUDA_PATH"] = self._folder.name
        from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

        gpu = self

        class Launcher(CudaLauncher):
            def __call__(self, *given: Any) -> None:
                gpu.arguments.append(_flat(given[9:]))  # behind grid, stream, function, hooks
                super().__call__(*given)

        return (Launcher if self.keep_arguments else CudaLauncher), CudaUtils()

    def _record(self) -> None:
        from triton.runtime.jit import JITFunction

        run, gpu = JITFunction.run, self

        def recorded(function: Any, *args: Any, **kwargs: Any) -> Any:
            kernel = run(function, *args, **kwargs)
            if id(kernel) not in gpu._known:
                gpu._known.add(id(kernel))
                gpu.compiled.append(Compiled(function.__name__, kernel))
            return kernel

        JITFunction.run = recorded


def _flat(arguments: Any) -> list[Any]:
    if isinstance(arguments, tuple):
        return [one for argument in arguments for one in _flat(argument)]
    return [arguments.data_ptr() if isinstance(arguments, torch.Tensor) else arguments]


class _NoUtils:
    """Loads nothing."""

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 64, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 64 * 1024}


class _NoLauncher:
    """Launches nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, *_: Any) -> None:
        pass


def install(target: str = "sm_90", *, keep_arguments: bool = False) -> FakeGpu:
    """Makes Triton take this process for one with a GPU, and the losses take CPU tensors for its.

    Raises:
        RuntimeError: Kernels would be interpreted.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 interprets kernels; unset it to compile them")
    gpu = FakeGpu(target, keep_arguments=keep_arguments)
    from fastpo_kernels._shared import dispatch

    dispatch._triton_runs_on_cpu = lambda: True
    return gpu
