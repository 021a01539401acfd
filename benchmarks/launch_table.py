"""Launches and bytes per call: ours, eager and torch.compile, counted and not timed.

    python benchmarks/launch_table.py [--out benchmarks/results/cpu/launches.md]

Eager is the loss as trainers write it, reference our oracle: every operator that is not a view
counts as one launch and moves its tensors' bytes (a broadcast argument by its own size, a slice by
the slice's). torch.compile: Inductor's own count of kernels and of bytes. Ours: what Triton's
launcher hands to a libcuda that does nothing (`fake_gpu.py`), and the bytes that the kernels
address; `aot_report.py` finds the same bytes in their code. On a GPU the launches of all come from
the profiler.

The target is a tensor in the predictions' dtype, which eager has repeated for both sides. What
comes before the loss is not counted for anyone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch._inductor import config, metrics
from torch._logging._internal import set_logs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastpo.bench.cases import Case
from fastpo.bench.losses import OBJECTIVES, inputs, trainer_loss
from fastpo.bench.measure import Call, device
from fastpo_kernels.testing import PairInputs

SHOWN = ("dpo", "mapo", "sdpo", "adaptive_dpo")
PAIRS = 8


class Counter(TorchDispatchMode):
    """Counts operators that launch something, and the bytes of their inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        allocates = func.overloadpacket.__name__.startswith(("empty", "detach", "new_empty"))
        if not (func.is_view or allocates):
            leaves = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            self.launches += 1
            self.bytes += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in leaves)
        return out


def eager_counts(step: Call) -> tuple[int, int]:
    with Counter() as counter:
        step()
    return counter.launches, counter.bytes


def compiled_counts(loss: Callable, policy: Tensor) -> tuple[int, int]:
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


def our_bytes(case: Case, target: Tensor) -> int:
    """Predictions and the target, read forward and backward, and the gradient written."""
    streams = OBJECTIVES[case.name].streams
    return (2 * streams + 4) * case.sample_bytes + 2 * target.nbytes


def our_launches() -> dict[str, int]:
    """Launches of each row's step by Triton's launcher, from a process of its own."""
    command = [sys.executable, __file__, "--count-ours"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def count_ours() -> dict[str, int]:
    """What `our_launches` asks for; the second of two steps, which compiles nothing."""
    from fake_gpu import install

    gpu, found = install(), {}
    for case, x, _ in inputs_of_rows():
        for _ in range(2):
            before = gpu.launches
            torch.autograd.grad(OBJECTIVES[case.name].call(x, "triton").loss, x.policy)
            found[case.name] = gpu.launches - before
    return found


def counts(
    case: Case, x: PairInputs, eager: Callable[[], Tensor], ours: int
) -> Iterator[tuple[str, int | str, int]]:
    """Provider, launches (or why there are none) and bytes; `ours` are ours without a GPU."""
    call = OBJECTIVES[case.name].call

    def reference() -> Tensor:
        return call(x, "reference").loss

    def step(loss: Callable[[], Tensor]) -> Call:
        return lambda: torch.autograd.grad(loss(), x.policy)

    found: dict[str, tuple[Callable[[], tuple[int, int]], Callable[[], Tensor]]] = {
        "eager": (lambda: eager_counts(step(eager)), eager),
        "reference": (lambda: eager_counts(step(reference)), reference),
        "compile": (
            lambda: compiled_counts(reference, x.policy),
            torch.compile(reference, dynamic=False),
        ),
        "ours": (lambda: (ours, our_bytes(case, x.target)), lambda: call(x, "triton").loss),
    }
    for provider, (count, loss) in found.items():
        try:
            launches, n_bytes = count()
            if device() == "cuda":
                launches = device_launches(step(loss))
        except Exception as error:
            if provider == "ours":
                raise
            # The others are compared with, and not what the table is for.
            yield provider, f"{type(error).__name__}: {str(error).strip().splitlines()[0]:.80}", 0
        else:
            yield provider, launches, n_bytes


def inputs_of_rows() -> Iterator[tuple[Case, PairInputs, Callable[[], Tensor]]]:
    """Case, inputs and eager loss of every objective shown, SDXL latents in bf16."""
    for name in SHOWN:
        case = Case("pair_loss", name, "sdxl", "bf16", PAIRS)
        x = inputs(case)
        yield case, x, trainer_loss(name, x)


def rows() -> Iterator[list[str]]:
    """The table's lines for one objective, one a provider."""
    ours = {} if device() == "cuda" else our_launches()
    for case, x, eager in inputs_of_rows():
        least = our_bytes(case, x.target)
        yield [
            f"| {case.name} | {provider} | {launches} | "
            + (f"{n_bytes / 2**20:.1f} | {n_bytes / least:.2f} |" if n_bytes else " |  |")
            for provider, launches, n_bytes in counts(case, x, eager, ours.get(case.name, 0))
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--count-ours", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.count_ours:
        print(json.dumps(count_ours()))
        return
    kind = "the profiler on a GPU" if device() == "cuda" else "operators and generated CPU code"
    lines = [
        f"Launches and MiB per forward and backward, {PAIRS} pairs of SDXL latents, bf16; launches "
        f"from {kind}, torch {torch.__version__}.",
        "",
        "| objective | provider | launches | MiB | of ours |",
        "|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for found in rows():
        lines += found
        print("\n".join(found), flush=True)
        if args.out:
            # After every objective: a run that is cut short keeps what it has counted.
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
