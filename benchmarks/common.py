"""Measuring, shared by the benchmarks: interleaved timing, copy bandwidth, environment, CSV."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
LATENTS = {"sd15": (4, 64, 64), "sdxl": (4, 128, 128), "video": (16, 21, 60, 104)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PASSES = ("fwd", "bwd", "both")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Call = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One provider on one case; empty where the machine cannot tell."""

    op: str
    case: str
    latents: str
    pairs: int
    dtype: str
    direction: str
    provider: str
    ms_p20: float
    ms_p50: float
    ms_p80: float
    host_us: float
    gb_per_s: float
    share_of_copy: float
    peak_mib: float | str
    ratio_to_best_other: float | str
    runs: int
    device: str
    threads: int
    torch: str
    triton: str
    driver: str
    commit: str
    date: str


@dataclass(frozen=True)
class Timing:
    """Milliseconds of every run, host microseconds of the median run, peak memory of one run."""

    ms: list[float]
    host_us: float
    peak_mib: float | str


def _command(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    except OSError:
        return ""
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else ""


def environment() -> dict[str, object]:
    """Device, versions, commit (with `+` if the tree differs from it) and date."""
    from importlib import metadata

    commit = _command("git", "rev-parse", "--short", "HEAD") or os.environ.get("COMMIT", "")
    changed = _command("git", "status", "--porcelain", "--", "kernels", "fastpo/loss.py")
    driver = ""
    if DEVICE == "cuda":
        name = torch.cuda.get_device_name()
        driver = _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    else:
        name = f"cpu ({platform.machine()})"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": metadata.version("triton"),
        "driver": driver,
        "commit": commit + ("+" if changed else ""),
        "date": datetime.date.today().isoformat(),
    }


def results_path(op: str) -> Path:
    """`$OUT/<op>.csv` where OUT is set, else `results/<device>/<op>.csv`."""
    if "OUT" in os.environ:
        return Path(os.environ["OUT"]) / f"{op}.csv"
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return ROOT / "benchmarks" / "results" / slug / f"{op}.csv"


def require_tests(*files: str) -> None:
    """Refuses to measure an operation whose tests fail."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", *files]
    if subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode:
        sys.exit(f"tests fail, nothing measured: {' '.join(files)}")


class Clock:
    """Times calls one by one; on a GPU with events, behind a write that empties the L2 cache."""

    def __init__(self) -> None:
        size = 256 << 20 if DEVICE == "cuda" else 1
        self._flush = torch.empty(size, dtype=torch.int8, device=DEVICE)

    def __call__(self, call: Call) -> tuple[float, float]:
        """Milliseconds and, of these, the host's microseconds until everything was enqueued."""
        if DEVICE == "cpu":
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
            return 1e3 * seconds, 1e6 * seconds
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self._flush.zero_()
        first.record()
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last), 1e6 * seconds


def peak_mib(call: Call) -> float | str:
    """Memory that one call takes above what was allocated before it."""
    if DEVICE == "cpu":
        return ""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 2)


def measure(calls: Mapping[str, Call], seconds: float, clock: Clock) -> dict[str, Timing]:
    """Runs all providers turn by turn, so that a change of clock or load meets all of them."""
    peaks = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        peaks[name] = peak_mib(call)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(next(iter(found.values()))) < 5:
        for name, call in calls.items():
            found[name].append(clock(call))
    return {
        name: Timing([ms for ms, _ in runs], statistics.median(us for _, us in runs), peaks[name])
        for name, runs in found.items()
    }


def copy_bandwidth(clock: Clock) -> float:
    """GB/s of a device-to-device copy of 256 MiB (32 on a CPU), read and write counted."""
    size = (256 if DEVICE == "cuda" else 32) << 20
    source = torch.zeros(size, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    runs = [clock(lambda: target.copy_(source))[0] for _ in range(23)][3:]
    return 2 * size / statistics.median(runs) / 1e6


def rows_of(
    timings: Mapping[str, Timing], n_bytes: int, copy: float, labels: Mapping[str, object]
) -> list[Row]:
    """One row a provider; `ratio_to_best_other` above 1 means faster than the best of the rest."""
    medians = {name: statistics.median(t.ms) for name, t in timings.items()}
    rows = []
    for name, timing in timings.items():
        others = [ms for other, ms in medians.items() if other.split("-")[0] != name.split("-")[0]]
        quintiles = statistics.quantiles(timing.ms, n=5)
        speed = n_bytes / medians[name] / 1e6
        values = {
            "provider": name,
            "ms_p20": round(quintiles[0], 5),
            "ms_p50": round(medians[name], 5),
            "ms_p80": round(quintiles[3], 5),
            "host_us": round(timing.host_us, 1),
            "gb_per_s": round(speed, 2),
            "share_of_copy": round(speed / copy, 4),
            "peak_mib": timing.peak_mib,
            "ratio_to_best_other": round(min(others) / medians[name], 3) if others else "",
            "runs": len(timing.ms),
        }
        rows.append(Row(**{**labels, **values}))  # pyright: ignore[reportArgumentType]
    return rows


def write(rows: list[Row], path: Path) -> None:
    """Writes the CSV anew: one file a machine and an operation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


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
