"""The calls whose kernels `aot_report.py` compiles: every objective, and what launches differ in.

Each is a public call on tensors that hold nothing; the launch table, the layout and the
specialization are those of a real call.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastpo import loss as fl
from fastpo.bench.cases import count_of
from fastpo_kernels.pair_noise import noised_pair

SDXL, SD15 = (4, 128, 128), (4, 64, 64)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """A call.

    Attributes:
        variant: what sets it apart.
        dtype: a name in `DTYPES`.
        run: makes the call, and the gradient where it is a loss.
        forward: bytes of a pair-element that the call's first kernel must load and store.
        backward: those of the backward kernel.
        heavy: whether it keeps most in registers of all that are like it.
        strided: whether layouts differ, so that elements are read one by one.
    """

    variant: str
    dtype: str
    run: Callable[[], object]
    forward: int
    backward: int = 0
    heavy: bool = False
    strided: bool = False


@dataclass(frozen=True)
class Batch:
    """Tensors of one case.

    Attributes:
        pairs: number of pairs.
        dims: of a sample.
        dtype: of the predictions.
        layout: applied to the policy and what is like it.
    """

    pairs: int
    dims: tuple[int, ...]
    dtype: torch.dtype
    layout: Callable[[Tensor], Tensor] = lambda t: t

    def rows(self, dtype: torch.dtype | None = None) -> Tensor:
        """One row a sample, in the layout."""
        return self.layout(torch.empty(2 * self.pairs, *self.dims, dtype=dtype or self.dtype))

    def shared(self, dtype: torch.dtype | None = None) -> Tensor:
        """One row a pair, contiguous."""
        return torch.empty(self.pairs, *self.dims, dtype=dtype or self.dtype)


OBJECTIVES: dict[str, Callable[..., Any]] = {
    "dpo": partial(fl.dpo, beta=2500.0),
    "robust_dpo": partial(fl.robust_dpo, beta=2500.0, label_smoothing=0.1),
    "ipo": partial(fl.ipo, tau=5.0),
    "hinge": partial(fl.hinge, beta=2500.0),
    "kto": partial(fl.kto, beta=2500.0),
    "dmpo": partial(fl.dmpo, beta=2500.0),
    "linear_dpo": partial(fl.linear_dpo, beta=2500.0),
    "sdpo": partial(fl.sdpo, beta=2500.0, mu=0.9),
    "adaptive_dpo": partial(fl.adaptive_dpo, beta=1000.0),
    "adaptive_ipo": partial(fl.adaptive_ipo, tau=5.0, beta=1000.0),
}
ALONE = {"sft": fl.sft, "mapo": fl.mapo}


def loss_case(
    variant: str,
    dtype: str,
    call: Callable[..., Any],
    batch: Batch,
    *,
    target: Tensor | None = None,
    sources: Sequence[Tensor] = (),
    heavy: bool = False,
    **options: Any,
) -> Case:
    """A loss and its gradient; `sources` are the reference and, last, annotators."""
    policy = batch.rows().requires_grad_()
    target = batch.shared() if target is None else target
    reference, annotators = list(sources[:1]), list(sources[1:])
    if annotators:
        options["annotators"] = annotators
    size, read = policy.itemsize, target.itemsize * len(target) // batch.pairs
    full = sum(s.ndim > 1 for s in sources)

    def run() -> object:
        out = call(policy, *reference, target, impl="triton", **options)
        total = out if isinstance(out, Tensor) else out.loss
        return torch.autograd.grad(total.sum(), policy)

    forward, backward = 2 * size * (1 + full) + read, 4 * size + read
    strided = not policy.is_contiguous()
    return Case(variant, dtype, run, forward, backward, heavy, strided)


def noise_case(dtype: str, prediction: Any, *, drawn: bool, layout: Any = None) -> Case:
    """The noise kernel's one launch."""
    batch = Batch(16, SDXL, DTYPES[dtype], layout or (lambda t: t))
    latents, logvar = batch.rows(), batch.rows() if drawn else None
    keys, table = torch.zeros(batch.pairs, dtype=torch.int64), torch.ones(1000)

    def run() -> object:
        return noised_pair(
            latents, keys, keys, table, table, seed=1, low=0, high=1000, prediction=prediction,
            logvar=logvar, dtype=torch.bfloat16, impl="triton",
        )  # fmt: skip

    size = 2 * latents.itemsize * (2 if drawn else 1) + 2 * 2
    size += 4 if prediction == "epsilon" else 8
    way = "posterior drawn" if drawn else "means"
    variant = f"{prediction}, {way}" + (", channels-last" if layout else "")
    heavy = drawn and prediction == "flow"
    return Case(variant, dtype, run, size, heavy=heavy, strided=layout is not None)


def cases() -> Iterator[Case]:
    """All of them."""
    yield from _objectives()
    yield from _launches()
    yield from _many_pairs()
    yield from _layouts()
    for dtype, drawn in itertools.product(DTYPES, (False, True)):
        for prediction in ("epsilon", "v_prediction", "flow"):
            yield noise_case(dtype, prediction, drawn=drawn)


def _objectives() -> Iterator[Case]:
    batch = Batch(16, SDXL, torch.bfloat16)
    for name, call in OBJECTIVES.items():
        yield loss_case(name, "bf16", call, batch, sources=[batch.rows()])
    for name, call in ALONE.items():
        yield loss_case(name, "bf16", call, batch)
    yield loss_case("pair_errors", "bf16", fl.pair_errors, batch)


def _launches() -> Iterator[Case]:
    """Both tile sizes, both dtypes, and everything that changes what a program holds."""
    dpo, adaptive = OBJECTIVES["dpo"], OBJECTIVES["adaptive_dpo"]
    for dtype, (pairs, dims) in itertools.product(DTYPES, ((1, SD15), (16, SDXL))):
        batch = Batch(pairs, dims, DTYPES[dtype])
        where = count_of(pairs)
        one, three = [batch.rows()], [batch.rows() for _ in range(3)]
        errors = torch.empty(2 * pairs)
        yield loss_case(f"dpo, {where}", dtype, dpo, batch, sources=one)
        yield loss_case(f"mapo, {where}", dtype, fl.mapo, batch)
        yield loss_case(f"cached reference, {where}", dtype, dpo, batch, sources=[errors])
        yield loss_case(f"sdpo, {where}", dtype, OBJECTIVES["sdpo"], batch, sources=one)
        yield loss_case(
            f"separate targets, {where}", dtype, dpo, batch, sources=one, target=batch.rows()
        )
        yield loss_case(
            f"two annotators, {where}", dtype, adaptive, batch, sources=three, heavy=pairs > 1
        )
        yield loss_case(
            f"ledger, pair weights, {where}", dtype, adaptive, batch, sources=one,
            minority=torch.empty(pairs), weight_kind="gate", pair_weight=torch.empty(pairs),
        )  # fmt: skip
        yield loss_case(
            f"two annotators, all processes, {where}", dtype, adaptive, batch, sources=three,
            reduce=lambda sums: sums,
        )  # fmt: skip


def _many_pairs() -> Iterator[Case]:
    """The last program holds vectors of all pairs."""
    adaptive = OBJECTIVES["adaptive_dpo"]
    for pairs in (256, 2048):
        batch = Batch(pairs, (4, 32, 32), torch.bfloat16)
        three = [batch.rows() for _ in range(3)]
        for name, options in {"": {}, ", all processes": {"reduce": lambda sums: sums}}.items():
            yield loss_case(
                f"two annotators, {pairs} pairs{name}", "bf16", adaptive, batch, sources=three,
                heavy=pairs > 256 and bool(options), **options,
            )  # fmt: skip


def channels_last(t: Tensor) -> Tensor:
    """As a channels-last denoiser answers."""
    return t.to(memory_format=torch.channels_last)


def _layouts() -> Iterator[Case]:
    """Predictions that lie otherwise than their target; these need no wide loads."""
    dpo, adaptive = OBJECTIVES["dpo"], OBJECTIVES["adaptive_dpo"]
    layouts = {"channels-last": channels_last, "sliced": lambda t: t[..., ::2]}
    for (name, layout), dtype in itertools.product(layouts.items(), DTYPES):
        dims = (*SDXL[:2], 2 * SDXL[2]) if name == "sliced" else SDXL
        batch = Batch(16, dims, DTYPES[dtype], layout)
        target = Batch(16, SDXL, DTYPES[dtype]).shared()
        three = [batch.rows() for _ in range(3)]
        yield loss_case(f"dpo, {name}", dtype, dpo, batch, sources=three[:1], target=target)
        yield loss_case(
            f"two annotators, {name}", dtype, adaptive, batch, sources=three, target=target,
            heavy=(name, dtype) == ("channels-last", "bf16"),
        )  # fmt: skip
    yield noise_case("bf16", "v_prediction", drawn=True, layout=channels_last)
