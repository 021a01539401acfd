"""Pair losses: ours against eager and torch.compile.

    python benchmarks/bench_pair_loss.py [--objectives dpo] [--latents sdxl] [--pairs 1 16] ...

Without a GPU our kernels do not run; eager and compiled CPU paths are timed and the CSV says so.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from common import (
    DEVICE,
    DTYPES,
    LATENTS,
    PASSES,
    Call,
    Clock,
    copy_bandwidth,
    environment,
    graphed,
    measure,
    require_tests,
    results_path,
    rows_of,
    write,
)  # fmt: skip
from torch._functorch import config as functorch_config

from fastpo import loss as fl
from fastpo_kernels.testing import PairInputs

OBJECTIVES: dict[str, Callable] = {
    "dpo": lambda x, impl: fl.dpo(x.policy, x.reference, x.target, beta=2500.0, impl=impl),
    "mapo": lambda x, impl: fl.mapo(x.policy, x.target, impl=impl),
    "sdpo": lambda x, impl: fl.sdpo(
        x.policy, x.reference, x.target, beta=2500.0, mu=0.9, impl=impl
    ),
    "adaptive_dpo": lambda x, impl: fl.adaptive_dpo(
        x.policy, x.reference, x.target, beta=1000.0, annotators=x.annotators, impl=impl
    ),
}
STREAMS = {"dpo": 2, "mapo": 1, "sdpo": 2, "adaptive_dpo": 4}
PROVIDERS = ["eager", "compile", "compile-max", "ours", "ours-graph"]
MODES = {"compile": None, "compile-max": "max-autotune-no-cudagraphs"}


def inputs(n_pairs: int, dims: tuple[int, ...], dtype: torch.dtype, streams: int) -> PairInputs:
    """Predictions near a shared target, drawn where they are used."""
    torch.manual_seed(0)
    target = torch.randn(n_pairs, *dims, device=DEVICE, dtype=dtype)
    shape = (2 * n_pairs, *dims)
    full = [0.3 * torch.randn(shape, device=DEVICE, dtype=dtype) for _ in range(streams)]
    for t in full:
        t.unflatten(0, (2, n_pairs)).add_(target)
    return PairInputs(full[0].requires_grad_(), full[min(1, streams - 1)], target, full[2:])


def moved_bytes(n_pairs: int, dims: tuple[int, ...], dtype: torch.dtype, streams: int) -> dict:
    """Least traffic: forward reads every stream and the target; backward reads two, writes one."""
    sample = n_pairs * dtype.itemsize * int(torch.tensor(dims).prod())
    found = {"fwd": (2 * streams + 1) * sample, "bwd": 5 * sample}
    return {**found, "both": found["fwd"] + found["bwd"]}


def call_of(loss: Callable[[], torch.Tensor], x: PairInputs, direction: str) -> Call:
    """The pass to time."""
    if direction == "fwd":
        return loss
    if direction == "both":
        return lambda: torch.autograd.grad(loss(), x.policy)
    value = loss()
    return lambda: torch.autograd.grad(value, x.policy, retain_graph=True)


def provider_calls(
    name: str, x: PairInputs, direction: str, providers: list[str]
) -> dict[str, Call]:
    """The calls of every provider that this machine can run."""
    objective, calls = OBJECTIVES[name], {}
    for provider in providers:
        if provider == "eager":
            calls[provider] = call_of(lambda: objective(x, "reference").loss, x, direction)
        elif provider in MODES:
            compiled = torch.compile(
                lambda: objective(x, "reference").loss, mode=MODES[provider], dynamic=False
            )
            calls[provider] = call_of(compiled, x, direction)
        elif provider == "ours":
            calls[provider] = call_of(lambda: objective(x, "triton").loss, x, direction)
        elif direction != "bwd":
            ours = call_of(lambda: objective(x, "triton").loss, x, direction)
            calls[provider] = graphed(ours)
    return calls


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--latents", nargs="+", choices=LATENTS, default=list(LATENTS))
    parser.add_argument("--pairs", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--directions", nargs="+", choices=PASSES, default=list(PASSES))
    default = PROVIDERS if DEVICE == "cuda" else ["eager", "compile"]
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=default)
    parser.add_argument("--seconds", type=float, default=0.3, help="per case and direction")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds in all")
    parser.add_argument("--skip-tests", action="store_true", help="they have just passed")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if DEVICE == "cpu" and any(p.startswith("ours") for p in args.providers):
        sys.exit("our kernels need a GPU; on a CPU time --providers eager compile")
    if not args.skip_tests:
        require_tests("tests/fastpo/test_loss.py", "tests/kernels/test_pair_loss.py")
    # A saved graph is replayed to time the backward pass alone.
    functorch_config.donated_buffer = False
    clock, stop, rows = Clock(), time.perf_counter() + args.budget, []
    copy, where, path = copy_bandwidth(clock), environment(), results_path("pair_loss")
    print(f"{where['device']}: copy {copy:.1f} GB/s; writing {path}")
    cases = [
        (o, la, d, b) for o in args.objectives for la in args.latents
        for d in args.dtypes for b in args.pairs
    ]  # fmt: skip
    for k, (objective, latents, dtype, pairs) in enumerate(cases):
        if time.perf_counter() > stop:
            print(f"out of time: {len(cases) - k} of {len(cases)} cases not measured")
            break
        torch._dynamo.reset()
        streams, dims = STREAMS[objective], LATENTS[latents]
        x = inputs(pairs, dims, DTYPES[dtype], streams)
        n_bytes = moved_bytes(pairs, dims, DTYPES[dtype], streams)
        for direction in args.directions:
            calls = provider_calls(objective, x, direction, args.providers)
            timings = measure(calls, args.seconds, clock)
            labels = {"op": "pair_loss", "case": objective, "latents": latents, "pairs": pairs,
                      "dtype": dtype, "direction": direction, **where}  # fmt: skip
            rows += rows_of(timings, n_bytes[direction], copy, labels)
            medians = " ".join(f"{r.provider} {r.ms_p50:.4f}" for r in rows[-len(calls) :])
            print(objective, latents, dtype, f"B={pairs} {direction} [ms]: {medians}", flush=True)
        write(rows, path)


if __name__ == "__main__":
    main()
