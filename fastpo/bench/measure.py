"""Timing: interleaved calls, the copy bandwidth, memory, the machine."""

from __future__ import annotations

import datetime
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from fastpo._version import __version__
from fastpo.system.process import default_device

ROOT = Path(__file__).parents[2]
MEASURED = ("kernels", "fastpo", "benchmarks", ":(exclude)benchmarks/results")  # as git's paths
Call = Callable[[], object]


def device() -> str:
    """`cuda` where there is a GPU, else `cpu`."""
    return default_device().type


@dataclass(frozen=True)
class Sample:
    """One call: milliseconds of work, milliseconds from an idle start to the end, host's share."""

    ms: float
    latency_ms: float
    host_us: float


class CpuClock:
    """Times a call on the CPU: by the thread's own time where one thread does all the work.

    Thread time leaves out waits for other processes of a shared machine. Before a call a write
    empties the core's own caches of data and code, as the model does in a step; else a call would
    be the faster, the more of its code the one before it shares.
    """

    def __init__(self) -> None:
        one = torch.get_num_threads() == 1
        self.name = "thread" if one else "wall"
        self._now = time.thread_time if one else time.perf_counter
        self._flush = torch.empty(16 << 20, dtype=torch.int8)

    def __call__(self, call: Call) -> Sample:
        self._flush.zero_()
        start = self._now()
        call()
        seconds = self._now() - start
        return Sample(1e3 * seconds, 1e3 * seconds, 1e6 * seconds)

    def peak_mib(self, call: Call) -> float | str:
        """Not known on a CPU."""
        return ""


class CudaClock:
    """Times a call on the GPU twice: its work alone, and from an idle start.

    The work is timed with events behind a spin that outlasts the host's share, so that it is the
    device's time whatever the host costs; a write that empties the L2 cache goes before. The
    latency is the host's clock from an idle device until the device is done.
    """

    name = "events"
    # More than any GPU's clock, so that the spin is never shorter than asked.
    CYCLES_PER_US = 2500

    def __init__(self) -> None:
        self._flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def __call__(self, call: Call) -> Sample:
        self._flush.zero_()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        host = time.perf_counter() - start
        torch.cuda.synchronize()
        latency = time.perf_counter() - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda._sleep(int((100 + 2e6 * host) * self.CYCLES_PER_US))
        first.record()
        call()
        last.record()
        torch.cuda.synchronize()
        return Sample(first.elapsed_time(last), 1e3 * latency, 1e6 * host)

    def peak_mib(self, call: Call) -> float | str:
        """Memory that one call takes above what was allocated before it."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 2)


Clock = CpuClock | CudaClock


def make_clock() -> Clock:
    """The clock of this machine."""
    return CudaClock() if device() == "cuda" else CpuClock()


@dataclass(frozen=True)
class Timing:
    """Every run of one provider, and the peak memory of one run in MiB (empty if not known)."""

    samples: list[Sample]
    peak_mib: float | str

    @property
    def ms(self) -> float:
        """Median milliseconds of work."""
        return statistics.median(sample.ms for sample in self.samples)

    @property
    def latency_ms(self) -> float:
        """Median milliseconds from an idle start to the end."""
        return statistics.median(sample.latency_ms for sample in self.samples)

    @property
    def host_us(self) -> float:
        """Median microseconds of the host's share."""
        return statistics.median(sample.host_us for sample in self.samples)


def measure(calls: Mapping[str, Call], seconds: float, clock: Clock) -> dict[str, Timing]:
    """Runs all providers turn by turn, so that a change of clock or load meets all of them.

    Every turn in another order: a call is slower behind one that shares none of its code.
    """
    peaks = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        peaks[name] = clock.peak_mib(call)
    found: dict[str, list[Sample]] = {name: [] for name in calls}
    stop, turns, rng = time.perf_counter() + seconds, 0, random.Random(0)
    while time.perf_counter() < stop or turns < 5:
        turns += 1
        for name in rng.sample(list(calls), len(calls)):
            found[name].append(clock(calls[name]))
    return {name: Timing(samples, peaks[name]) for name, samples in found.items()}


def copy_bandwidth(clock: Clock) -> float:
    """GB/s of a copy of 1 GiB on the device (32 MiB on a CPU), read and write counted."""
    where = device()
    size = (1024 if where == "cuda" else 32) << 20
    source = torch.zeros(size, dtype=torch.int8, device=where)
    target = torch.empty_like(source)
    runs = [clock(lambda: target.copy_(source)).ms for _ in range(23)][3:]
    return 2 * size / statistics.median(runs) / 1e6


def free_bytes() -> int:
    """Memory that a benchmark may take: nine tenths of what is free."""
    if device() == "cuda":
        return int(0.9 * torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 8 << 30
    found = {line.split(":")[0]: line.split()[1] for line in lines}
    return int(0.9 * 1024 * int(found.get("MemAvailable", 8 << 20)))


def _first_line(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    except OSError:
        return ""
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else ""


def environment(commit: str | None = None) -> dict[str, object]:
    """Device, versions, commit (with `+` if code in the tree differs from it) and date.

    Args:
        commit: what to write where the checkout's own history is not at hand.
    """
    if commit is None and (ROOT / ".git").exists():
        commit = _first_line("git", "rev-parse", "--short", "HEAD")
        if commit and _first_line("git", "status", "--porcelain", "--", *MEASURED):
            commit += "+"
    driver = ""
    if device() == "cuda":
        name = torch.cuda.get_device_name()
        driver = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    else:
        name = f"cpu ({platform.machine()})"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "version": __version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "driver": driver,
        "commit": commit or "",
        "date": datetime.date.today().isoformat(),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def graphed(call: Call) -> Call:
    """The call captured in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
