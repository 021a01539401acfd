"""Sweeps launch configurations on a GPU: what the table in `pair_loss/gpu/launch.py` should hold.

    python -m fastpo.bench.tune --out launch_configs.csv [--budget-seconds 90]

Every row is one kernel (forward or backward), shape and configuration; `best` marks the fastest of
its kernel and shape, `default` the one that `gpu/launch.py` chooses now, and `of_best` says what
share of the best one's speed a configuration reaches. The shapes of the speed targets come first.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastpo.bench import losses
from fastpo.bench.cases import Case
from fastpo.bench.measure import Clock, copy_bandwidth, environment, make_clock
from fastpo.bench.table import write_records
from fastpo.system.process import default_device

SHAPES = tuple(
    Case("pair_loss", name, latents, "bf16", pairs)
    for latents, pairs in (("sdxl", 16), ("sdxl", 256), ("video", 16), ("sdxl", 1), ("sd15", 4))
    for name in ("dpo", "adaptive_dpo")
)
BLOCKS = (1024, 2048, 4096, 8192)
WARPS = (4, 8, 16)
# Programs in all: below, at and above what fills a GPU of some 130 multiprocessors once.
PROGRAMS = (256, 1024, 4096)
_RUNS = 9


@dataclass(frozen=True)
class Trial:
    """One configuration of one kernel on one shape."""

    kernel: str
    case: str
    latents: str
    dtype: str
    pairs: int
    block_size: int
    programs_per_pair: int
    num_warps: int
    us_p50: float | str
    share_of_copy: float | str
    default: bool
    best: bool
    of_best: float | str
    note: str
    device: str
    torch: str
    triton: str
    commit: str
    date: str


def configurations(n_pairs: int, n_elements: int, direction: str) -> Iterator[tuple[int, int, int]]:
    """Block size, programs per pair, warps; the backward pass has a program for every tile."""
    for block, warps in itertools.product(BLOCKS, WARPS):
        # Elements a thread: one 16-byte load of bf16 at least, and registers for the sums left.
        if not 8 <= block // (32 * warps) <= 32:
            continue
        tiles = -(-n_elements // block)
        if direction == "bwd":
            yield block, tiles, warps
            continue
        yield from sorted({(block, min(tiles, max(1, p // n_pairs)), warps) for p in PROGRAMS})


def sweep(case: Case, clock: Clock, copy: float, where: dict[str, Any], stop: float) -> list[Trial]:
    """All configurations of both kernels on one shape, until `stop` on the monotonic clock."""
    from fastpo_kernels.pair_loss.gpu import launch

    x = losses.inputs(case)
    call, n_elements = losses.OBJECTIVES[case.name].call, math.prod(case.dims)
    n_streams = losses.OBJECTIVES[case.name].streams
    n_bytes = losses.least_bytes(case)

    def forward() -> torch.Tensor:
        return call(x, "triton").loss

    value = forward()

    def backward() -> torch.Tensor:
        return torch.autograd.grad(value, x.policy, retain_graph=True)[0]

    calls = {"fwd": forward, "bwd": backward}
    expected = {"fwd": call(x, "reference").loss.detach(), "bwd": backward()}
    found = []
    defaults = {
        "fwd": launch.forward_config(case.pairs, n_elements, n_streams),
        "bwd": launch.backward_config(n_elements),
    }
    for direction, default in defaults.items():
        chosen = dataclasses.astuple(default)
        every = [c for c in configurations(case.pairs, n_elements, direction) if c != chosen]
        new = []
        for configuration in [chosen, *every]:
            if time.monotonic() > stop:
                break
            config = launch.LaunchConfig(*configuration)
            us, note = _timed(config, calls[direction], expected[direction], clock)
            share = "" if us == "" else round(n_bytes[direction] / float(us) / 1e3 / copy, 4)
            trial = Trial(
                direction, case.name, case.latents, case.dtype, case.pairs, *configuration,
                us_p50=us, share_of_copy=share, default=configuration == chosen, best=False,
                of_best="", note=note, **where,
            )  # fmt: skip
            new.append(trial)
        found += _ranked(new)
    return found


def _timed(
    config: Any,
    call: Callable[[], torch.Tensor],
    expected: torch.Tensor,
    clock: Clock,
) -> tuple[float | str, str]:
    """Median microseconds of one configuration, or why there are none."""
    from fastpo_kernels.pair_loss.gpu import launch

    try:
        with launch.launches_as(config):
            for _ in range(2):
                found = call().detach()
            error = (found.float() - expected.float()).abs().max().item()
            scale = expected.float().abs().max().item()
            if not error <= 2e-2 * scale:
                return "", f"wrong by {error:.3g} of {scale:.3g}"
            runs = [clock(call).ms for _ in range(_RUNS)]
    except Exception as error:
        return "", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    return round(1e3 * statistics.median(runs), 2), ""


def _ranked(trials: list[Trial]) -> list[Trial]:
    """The trials of one kernel and shape, the fastest first and marked."""
    timed = sorted((t for t in trials if t.us_p50 != ""), key=lambda t: float(t.us_p50))
    rest = [t for t in trials if t.us_p50 == ""]
    least = float(timed[0].us_p50) if timed else math.nan
    return [
        dataclasses.replace(t, best=k == 0, of_best=round(least / float(t.us_p50), 3))
        for k, t in enumerate(timed)
    ] + rest


def write(trials: list[Trial], path: Path) -> None:
    """Writes all trials anew, whole or not at all."""
    names = [f.name for f in dataclasses.fields(Trial)]
    write_records(map(dataclasses.asdict, trials), names, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("launch_configs.csv"))
    parser.add_argument("--budget-seconds", type=float, default=math.inf)
    parser.add_argument("--commit")
    args = parser.parse_args()
    if default_device().type == "cpu":
        print("error: a sweep of launch configurations needs a GPU", file=sys.stderr)
        return 2
    stop = time.monotonic() + args.budget_seconds
    clock = make_clock()
    copy, told = copy_bandwidth(clock), environment(args.commit)
    where = {name: told[name] for name in ("device", "torch", "triton", "commit", "date")}
    trials: list[Trial] = []
    for case in SHAPES:
        if time.monotonic() > stop:
            print(f"out of time before {case}")
            break
        new = sweep(case, clock, copy, where, stop)
        trials += new
        write(trials, args.out)
        for t in new:
            if t.best or t.default:
                which = "best" if t.best else "default"
                print(f"{case} {t.kernel} {which}: {t.us_p50} us, {t.share_of_copy} of copy,"
                      f" block {t.block_size}, {t.programs_per_pair} programs a pair,"
                      f" {t.num_warps} warps {t.note}", flush=True)  # fmt: skip
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
