"""The noised pair: ours against eager, torch.compile and a generator's `randn`.

    python benchmarks/bench_pair_noise.py [--predictions flow] [--latents sdxl] [--pairs 1 16] ...

`randn` is what trainers do: it draws from the generator and forms noisy latents and target in
eager; its numbers depend on the generator's state, not on the pair. The others' draws are equal.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from common import (
    DEVICE,
    DTYPES,
    LATENTS,
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

from fastpo_kernels.pair_noise import noised_pair

PREDICTIONS = ("epsilon", "v_prediction", "flow")
PROVIDERS = ["randn", "eager", "compile", "compile-max", "ours", "ours-graph"]
MODES = {"compile": None, "compile-max": "max-autotune-no-cudagraphs"}
OPTIONS = {"seed": 7, "low": 0, "high": 1000, "scale": 0.13}


def inputs(n_pairs: int, dims: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Latents, keys, visits and the schedule's two tables."""
    torch.manual_seed(0)
    latents = torch.randn(2 * n_pairs, *dims, device=DEVICE, dtype=dtype)
    keys = torch.randint(0, 2**62, (n_pairs,), device=DEVICE)
    power = torch.linspace(0.999, 0.005, 1000, device=DEVICE)
    return latents, keys, torch.zeros_like(keys), power.sqrt(), (1 - power).sqrt()


def randn(latents, keys, visits, signal, sigma, *, prediction: str):
    """A trainer's own lines."""
    n_pairs, ones = len(keys), [1] * (latents.ndim - 1)
    x = latents.float() * OPTIONS["scale"]
    noise = torch.randn(n_pairs, *latents.shape[1:], device=latents.device).repeat(2, *ones)
    t = torch.randint(0, 1000, (n_pairs,), device=latents.device).repeat(2)
    a, s = signal[t].view(-1, *ones), sigma[t].view(-1, *ones)
    noisy = a * x + s * noise
    if prediction == "epsilon":
        return noisy, noise
    return noisy, a * noise - s * x if prediction == "v_prediction" else noise - x


def moved_bytes(n_pairs: int, dims: tuple[int, ...], dtype: torch.dtype, prediction: str) -> int:
    """Least traffic: latents in, float32 noisy latents and target out."""
    elements = n_pairs * int(torch.tensor(dims).prod())
    return elements * (2 * dtype.itemsize + 8 + (4 if prediction == "epsilon" else 8))


def provider_calls(x, prediction: Any, providers: list[str]) -> dict[str, Call]:
    """The calls of every provider that this machine can run."""

    def run(impl):
        return noised_pair(*x, prediction=prediction, impl=impl, **OPTIONS)

    calls: dict[str, Call] = {
        "randn": lambda: randn(*x, prediction=prediction),
        "eager": lambda: run("reference"),
        "ours": lambda: run("triton"),
    }
    calls = {name: call for name, call in calls.items() if name in providers}
    for name, mode in MODES.items():
        if name in providers:
            calls[name] = torch.compile(lambda: run("reference"), mode=mode, dynamic=False)
    if "ours-graph" in providers:
        calls["ours-graph"] = graphed(lambda: run("triton"))
    return calls


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--predictions", nargs="+", choices=PREDICTIONS, default=list(PREDICTIONS))
    parser.add_argument("--latents", nargs="+", choices=LATENTS, default=list(LATENTS))
    parser.add_argument("--pairs", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    default = PROVIDERS if DEVICE == "cuda" else ["randn", "eager", "compile"]
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=default)
    parser.add_argument("--seconds", type=float, default=0.3, help="per case")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds in all")
    parser.add_argument("--skip-tests", action="store_true", help="they have just passed")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if not args.skip_tests:
        require_tests("tests/kernels/test_pair_noise.py", "tests/kernels/test_pair_noise_kernel.py")
    clock, stop, rows = Clock(), time.perf_counter() + args.budget, []
    copy, where, path = copy_bandwidth(clock), environment(), results_path("pair_noise")
    print(f"{where['device']}: copy {copy:.1f} GB/s; writing {path}")
    cases = [
        (p, la, d, b) for p in args.predictions for la in args.latents
        for d in args.dtypes for b in args.pairs
    ]  # fmt: skip
    for k, (prediction, latents, dtype, pairs) in enumerate(cases):
        if time.perf_counter() > stop:
            print(f"out of time: {len(cases) - k} of {len(cases)} cases not measured")
            break
        torch._dynamo.reset()
        x = inputs(pairs, LATENTS[latents], DTYPES[dtype])
        calls = provider_calls(x, prediction, args.providers)
        timings = measure(calls, args.seconds, clock)
        labels = {"op": "pair_noise", "case": prediction, "latents": latents, "pairs": pairs,
                  "dtype": dtype, "direction": "fwd", **where}  # fmt: skip
        n_bytes = moved_bytes(pairs, LATENTS[latents], DTYPES[dtype], prediction)
        rows += rows_of(timings, n_bytes, copy, labels)
        medians = " ".join(f"{r.provider} {r.ms_p50:.4f}" for r in rows[-len(calls) :])
        print(prediction, latents, dtype, f"B={pairs} [ms]: {medians}", flush=True)
        write(rows, path)


if __name__ == "__main__":
    main()
