"""Every kind of call through Triton's own binder, compiler and launcher; run by test_launches.py.

Prints one JSON line a call: its name, launches and new kernels of the first call and of the second,
on other tensors that lie alike, with other numbers.
"""

import json
import sys
from pathlib import Path

# ruff: noqa: E402 (the driver comes before what launches)
ROOT = Path(__file__).parents[2]
sys.path[:0] = [
    str(ROOT),
    str(ROOT / "kernels"),
    str(ROOT / "benchmarks"),
    str(Path(__file__).parent),
]

from fake_gpu import install

GPU = install(sys.argv[1] if len(sys.argv) > 1 else "sm_90", keep_arguments=True)

import objectives as losses
import test_pair_loss as layouts
import torch

from fastpo import loss as fl
from fastpo_kernels.pair_noise import noised_pair
from fastpo_kernels.testing import pair_inputs


def step(call, x, **options):
    """The loss and its gradient."""
    losses.run(call, x, "triton", **options)


def batches():
    """Names, and functions that make a fresh batch and step on it."""
    for name, call in losses.CASES.items():
        for n_pairs in (3, 5):  # a part of `stats` begins at another alignment
            yield (
                f"{name}, {n_pairs} pairs",
                lambda call=call, n=n_pairs: step(
                    call, pair_inputs(n, (4, 8, 12), torch.bfloat16, n_annotators=2)
                ),
            )
    for size in (1, 7, 65537):
        yield (
            f"{size} elements",
            lambda size=size: step(losses.CASES["dpo"], pair_inputs(2, (size,), torch.float16)),
        )
    for layout, laid in layouts.STRIDED.items():

        def strided(laid=laid):
            x = pair_inputs(2, (4, 6, 10))
            x.policy, x.reference, x.target = laid(x)
            step(losses.CASES["sdpo"], x)

        yield layout, strided

    def ready():
        x = pair_inputs(3, (4, 50))
        step(losses.CASES["dpo"], losses.PairInputs(x.policy, torch.rand(6), x.target))

    yield "ready errors, weights", ready
    for name in ("kto", "sdpo", "adaptive_dpo-annotators"):
        yield (
            f"{name}, all processes",
            lambda name=name: step(
                losses.CASES[name],
                pair_inputs(3, (4, 50), n_annotators=2),
                reduce=lambda sums: 2 * sums,
            ),
        )
    for layout in ("interleaved", "separate"):

        def sides(separate=layout == "separate"):
            x = pair_inputs(3, (4, 50))
            if separate:
                x.policy = tuple(side.clone() for side in x.policy.chunk(2))
            parts = x.policy if separate else (x.policy,)
            for part in parts:
                part.requires_grad_()
            name = "halves" if separate else "interleaved"
            out = fl.hinge(
                x.policy, x.reference, x.target, beta=torch.ones(3), sft_weight=0.1, safeguard=0.9,
                reduction="none", layout=name, impl="triton",
            )  # fmt: skip
            torch.autograd.grad(out.loss.sum(), parts)

        yield f"all terms, {layout}", sides
    yield "pair_errors", lambda: fl.pair_errors(torch.rand(4, 50), torch.rand(2, 50), impl="triton")
    yield "noised_pair, channels-last", lambda: noised_pair(
        torch.rand(4, 4, 6, 10).to(memory_format=torch.channels_last), torch.tensor([2**62, 1]),
        torch.tensor([0, 2**31]), torch.ones(9), torch.ones(9), seed=2**32 - 1, low=0, high=9,
        prediction="flow", logvar=torch.rand(4, 4, 6, 10), impl="triton",
    )  # fmt: skip


def repeated():
    """The arguments of a step's launches, and of the same step again: only outputs may move."""
    x = pair_inputs(3, (4, 8, 12), torch.bfloat16, n_annotators=2)
    weight = torch.rand(3)
    steps = {
        "annotators": lambda: step(losses.CASES["adaptive_dpo-annotators"], x, pair_weight=weight),
        "all processes": lambda: step(losses.CASES["sdpo"], x, reduce=lambda sums: sums),
    }
    for name, run in steps.items():
        launches = []
        for _ in range(3):
            before = len(GPU.arguments)
            run()
            launches.append(GPU.arguments[before:])
        # Where all three are alike, nothing moved; an output's address is large in each.
        yield {
            "repeats": name,
            "same": all(
                len(one) == len(two)
                and all(a == b or min(a, b) > 2**20 for a, b in zip(one, two, strict=True))
                for again in launches[1:]
                for one, two in zip(launches[0], again, strict=True)
            ),
            "moved": max(
                sum(a != b for a, b in zip(one, two, strict=True))
                for again in launches[1:]
                for one, two in zip(launches[0], again, strict=True)
            ),
        }


for found in repeated():
    print(json.dumps(found), flush=True)

for name, run in batches():
    found = {"name": name}
    for which in ("first", "again"):
        launches, kernels = GPU.launches, len(GPU.compiled)
        run()
        found[which] = [GPU.launches - launches, len(GPU.compiled) - kernels]
    print(json.dumps(found), flush=True)
