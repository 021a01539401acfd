"""Launches and bytes per call: ours, eager and torch.compile, counted and not timed.

    python benchmarks/launch_table.py [--out benchmarks/results/cpu/launches.md]

Eager is the loss as trainers write it, reference our oracle: every operator that is not a view
counts as one launch and moves its tensors' bytes (a broadcast argument by its own size).
torch.compile: Inductor's own count of kernels and of bytes. Ours: two launches, and the bytes that
the kernels address. On a GPU the launches of all come from the profiler.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch._inductor import config, metrics
from torch._logging._internal import set_logs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastpo.bench.cases import Case
from fastpo.bench.losses import OBJECTIVES, inputs, least_bytes, trainer_loss
from fastpo.bench.measure import Call, device

SHOWN = ("dpo", "mapo", "sdpo", "adaptive_dpo")


class Counter(TorchDispatchMode):
    """Counts operators that launch something, and the bytes of their inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        allocates = func.overloadpacket.__name__.startswith(("empty", "detach", "new_empty"))
        if not (func.is_view or allocates):
            leaves = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.launches += 1
            self.bytes += sum(t.untyped_storage().nbytes() for t in leaves)
        return out


def eager_counts(step: Call) -> tuple[int, int]:
    with Counter() as counter:
        step()
    return counter.launches, counter.bytes


def compiled_counts(loss: Callable, policy: torch.Tensor) -> tuple[int, int]:
    """Kernels that Inductor generated for forward and backward, and its count of their bytes."""
    torch._dynamo.reset()
    metrics.reset()
    # Inductor counts bytes only where it logs them.
    set_logs(inductor_metrics=True)
    with config.patch(force_disable_caches=True):
        torch.autograd.grad(torch.compile(loss, dynamic=False)(), policy)
    set_logs()
    return metrics.generated_kernel_count, metrics.num_bytes_accessed


def device_launches(step: Call) -> int:
    """Kernels, copies and fills that one call puts on the GPU."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    on_device = [e for e in profiler.events() or () if e.device_type == DeviceType.CUDA]
    return sum(e.name != "Activity Buffer Request" for e in on_device)


def rows(name: str, n_pairs: int) -> list[str]:
    """The table's lines for one objective at SDXL latents in bf16."""
    case, call = Case("pair_loss", name, "sdxl", "bf16", n_pairs), OBJECTIVES[name].call
    x = inputs(case)

    def reference():
        return call(x, "reference").loss

    eager, least = trainer_loss(name, x), least_bytes(case)["both"]

    def step(loss):
        return lambda: torch.autograd.grad(loss(), x.policy)

    counts = {
        "eager": eager_counts(step(eager)),
        "reference": eager_counts(step(reference)),
        "compile": compiled_counts(reference, x.policy),
        "ours": (2, least),
    }
    if device() == "cuda":
        calls = {
            "eager": eager,
            "reference": reference,
            "compile": torch.compile(reference, dynamic=False),
            "ours": lambda: call(x, "triton").loss,
        }
        counts = {
            k: (device_launches(step(calls[k])), n_bytes) for k, (_, n_bytes) in counts.items()
        }
    return [
        f"| {name} | {n_pairs} | {provider} | {launches} | {n_bytes / 2**20:.1f} | "
        f"{n_bytes / least:.2f} |"
        for provider, (launches, n_bytes) in counts.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    kind = "the profiler on a GPU" if device() == "cuda" else "operators and generated CPU code"
    lines = [
        f"Launches and MiB per forward and backward, SDXL latents, bf16; launches from {kind}, "
        f"torch {torch.__version__}.",
        "",
        "| objective | pairs | provider | launches | MiB | of ours |",
        "|---|---|---|---|---|---|",
    ]
    for name in SHOWN:
        lines += rows(name, 8)
    print("\n".join(lines))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
