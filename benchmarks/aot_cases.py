"""The calls whose kernels `aot_report.py` compiles: every objective, and what launches differ in.

Each is a public call; the launch table, the layout and the specialization are those of a real one.
`calls` names them without their tensors, so that they can be made in any size and on any numbers:
`cases` makes them on tensors that hold nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
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


def channels_last(t: Tensor) -> Tensor:
    """As a channels-last denoiser answers."""
    return t.to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Batch:
    """Tensors of one case.

    Attributes:
        pairs: number of pairs.
        dims: of a sample.
        dtype: of the predictions.
        layout: of the policy and what is like it: `contiguous`, `channels-last` or `sliced`.
    """

    pairs: int
    dims: tuple[int, ...]
    dtype: torch.dtype
    layout: str = "contiguous"

    def rows(self, dtype: torch.dtype | None = None) -> Tensor:
        """One row a sample, in the layout."""
        *dims, width = self.dims
        sliced = self.layout == "sliced"
        whole = torch.empty(
            2 * self.pairs, *dims, 2 * width if sliced else width, dtype=dtype or self.dtype
        )
        if self.layout == "channels-last":
            return channels_last(whole)
        return whole[..., ::2] if sliced else whole

    def shared(self, dtype: torch.dtype | None = None) -> Tensor:
        """One row a pair, contiguous."""
        return torch.empty(self.pairs, *self.dims, dtype=dtype or self.dtype)


OBJECTIVES: dict[str, Callable[..., Any]] = {
    "dpo": partial(fl.dpo, beta=2500.0),
    "robust_dpo": partial(fl.robust_dpo, beta=2500.0, label_smoothing=0.1),
    "poly_dpo": partial(fl.poly_dpo, beta=2500.0, alpha=8.0),
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


@dataclass(frozen=True)
class LossTensors:
    """What a loss is called on.

    Attributes:
        policy: predictions, one row a sample.
        target: one row a pair or a sample.
        sources: reference and annotators, as many as there are.
        vectors: options that are tensors, by the call's names for them: one number a pair each, one
            an image for `labels`, and the `mask`.
    """

    policy: Tensor
    target: Tensor
    sources: list[Tensor]
    vectors: Mapping[str, Tensor]


@dataclass(frozen=True)
class LossCall:
    """A loss and its gradient.

    Attributes:
        variant: what sets it apart.
        dtype: a name in `DTYPES`.
        objective: the public function, with its numbers.
        batch: sizes and layout.
        streams: how many predictions besides the policy's there are: reference, then annotators.
        ready: whether the reference's are not read, but its errors known.
        separate: whether the sides of a pair have targets of their own.
        vectors: names of options that hold one number a pair, or an image for `labels`.
        options: others.
        heavy: whether it keeps most in registers of all that are like it.
        sides: how winners and losers lie: `halves`, `interleaved`, or as `tuples` of two tensors.
        mask: `pair` for weights of places, which sides and channels share, `sample` for weights of
            every element; or none.
    """

    variant: str
    dtype: str
    objective: Callable[..., Any]
    batch: Batch
    streams: int = 0
    ready: bool = False
    separate: bool = False
    vectors: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    heavy: bool = False
    sides: str = "halves"
    mask: str = ""

    def empty(self, batch: Batch) -> LossTensors:
        """Tensors that hold nothing, of a batch like the call's own."""
        sources = [batch.rows() for _ in range(self.streams)]
        if self.ready:
            sources = [torch.empty(2 * batch.pairs)]
        contiguous = Batch(batch.pairs, batch.dims, batch.dtype)
        target = contiguous.rows() if self.separate else contiguous.shared()
        lengths = {name: batch.pairs * (1 + (name == "labels")) for name in self.vectors}
        vectors = {name: torch.empty(length) for name, length in lengths.items()}
        if self.mask:
            own = self.mask == "sample"
            dims = batch.dims if own else (1, *batch.dims[1:])
            vectors["mask"] = torch.empty(batch.pairs * (1 + own), *dims)
        return LossTensors(batch.rows(), target, sources, vectors)

    def _laid(self, t: Tensor) -> Any:
        """A tensor of both sides' rows, winners first, as the call hands it over."""
        if self.sides == "halves":
            return t
        sides = t.chunk(2)
        return sides if self.sides == "tuples" else torch.stack(sides, 1).flatten(0, 1)

    def __call__(self, x: LossTensors, impl: str) -> Any:
        """The objective's result."""
        options = {**self.options, **x.vectors}
        if x.sources[1:]:
            options["annotators"] = [self._laid(s) for s in x.sources[1:]]
        if self.sides == "interleaved":
            options["layout"] = self.sides
        given = [self._laid(t) for t in (x.policy, *x.sources[:1])]
        return self.objective(*given, x.target, impl=impl, **options)

    def gradient(self, x: LossTensors, impl: str = "triton") -> tuple[Any, Tensor]:
        """The result, and the gradient of its sum, by the policy."""
        policy = x.policy.detach().requires_grad_()
        out = self(LossTensors(policy, x.target, x.sources, x.vectors), impl)
        total = out if isinstance(out, Tensor) else out.loss
        return out, torch.autograd.grad(total.sum(), policy)[0]

    def case(self, x: LossTensors | None = None) -> Case:
        """The call on tensors that hold nothing, unless others are given."""
        x = self.empty(self.batch) if x is None else x
        size, read = x.policy.itemsize, x.target.itemsize * len(x.target) // self.batch.pairs
        read += 8 if self.mask else 0
        full = 0 if "labels" in x.vectors else sum(s.ndim > 1 for s in x.sources)
        forward, backward = 2 * size * (1 + full) + read, 4 * size + read
        strided = self.batch.layout != "contiguous" or self.mask == "pair"
        return Case(
            self.variant, self.dtype, lambda: self.gradient(x), forward, backward, self.heavy,
            strided,
        )  # fmt: skip


@dataclass(frozen=True)
class NoiseCall:
    """The noise kernel's one launch: with `drawn`, the latents are drawn from their posterior."""

    prediction: Any
    dtype: str
    batch: Batch
    drawn: bool

    @property
    def variant(self) -> str:
        """What sets it apart."""
        way = "posterior drawn" if self.drawn else "means"
        layout = self.batch.layout
        return f"{self.prediction}, {way}" + ("" if layout == "contiguous" else f", {layout}")

    def __call__(self, latents: Tensor, logvar: Tensor | None, tables: Any, impl: Any) -> Any:
        """The noised pair; `tables` are keys, visits, and a schedule's two."""
        return noised_pair(
            latents, *tables, seed=1, low=0, high=len(tables[2]), prediction=self.prediction,
            logvar=logvar if self.drawn else None, dtype=torch.bfloat16, impl=impl,
        )  # fmt: skip

    def case(self) -> Case:
        """The call on tensors that hold nothing."""
        batch = self.batch
        latents, logvar = batch.rows(), batch.rows() if self.drawn else None
        keys, table = torch.zeros(batch.pairs, dtype=torch.int64), torch.ones(1000)
        tables = (keys, keys, table, table)
        size = 2 * latents.itemsize * (2 if self.drawn else 1) + 2 * 2
        size += 4 if self.prediction == "epsilon" else 8
        return Case(
            self.variant, self.dtype, lambda: self(latents, logvar, tables, "triton"), size,
            heavy=self.drawn and self.prediction == "flow", strided=batch.layout != "contiguous",
        )  # fmt: skip


def calls() -> Iterator[LossCall | NoiseCall]:
    """All of them."""
    yield from _objectives()
    yield from _launches()
    yield from _options()
    yield from _many_pairs()
    yield from _layouts()
    for dtype, drawn in itertools.product(DTYPES, (False, True)):
        for prediction in ("epsilon", "v_prediction", "flow"):
            yield NoiseCall(prediction, dtype, Batch(16, SDXL, DTYPES[dtype]), drawn)


def cases() -> Iterator[Case]:
    """All of them, ready to be made."""
    return (call.case() for call in calls())


def _objectives() -> Iterator[LossCall]:
    batch = Batch(16, SDXL, torch.bfloat16)
    for name, objective in OBJECTIVES.items():
        yield LossCall(name, "bf16", objective, batch, 1)
    for name, objective in ALONE.items():
        yield LossCall(name, "bf16", objective, batch)
    yield LossCall("pair_errors", "bf16", fl.pair_errors, batch)


def _launches() -> Iterator[LossCall]:
    """Both tile sizes, both dtypes, and everything that changes what a program holds."""
    dpo, adaptive = OBJECTIVES["dpo"], OBJECTIVES["adaptive_dpo"]
    for dtype, (pairs, dims) in itertools.product(DTYPES, ((1, SD15), (16, SDXL))):
        batch = Batch(pairs, dims, DTYPES[dtype])
        where = count_of(pairs)
        yield LossCall(f"dpo, {where}", dtype, dpo, batch, 1)
        yield LossCall(f"mapo, {where}", dtype, fl.mapo, batch)
        yield LossCall(f"cached reference, {where}", dtype, dpo, batch, ready=True)
        yield LossCall(f"sdpo, {where}", dtype, OBJECTIVES["sdpo"], batch, 1)
        yield LossCall(f"separate targets, {where}", dtype, dpo, batch, 1, separate=True)
        yield LossCall(f"two annotators, {where}", dtype, adaptive, batch, 3, heavy=pairs > 1)
        yield LossCall(
            f"ledger, pair weights, {where}", dtype, adaptive, batch, 1,
            vectors=("minority", "pair_weight"), options={"weight_kind": "gate"},
        )  # fmt: skip
        yield LossCall(
            f"all terms, {where}", dtype, fl.hinge, batch, 1, vectors=("beta", "pair_weight"),
            options={"sft_weight": 0.1, "safeguard": 0.9},
        )  # fmt: skip
        yield LossCall(
            f"two annotators, all processes, {where}", dtype, adaptive, batch, 3,
            options={"reduce": lambda sums: sums},
        )  # fmt: skip


def _options() -> Iterator[LossCall]:
    """Options one by one, and pairs that lie not as halves: tuples run the interleaved's code."""
    dpo, batch = OBJECTIVES["dpo"], Batch(16, SDXL, torch.bfloat16)
    for name, options in {
        "loss of every pair": {"reduction": "none"},
        "safeguard": {"safeguard": 0.9},
        "winner's error added": {"sft_weight": 0.1},
    }.items():
        yield LossCall(name, "bf16", dpo, batch, 1, options=options)
    for sides in ("interleaved", "tuples"):
        yield LossCall(f"dpo, {sides}", "bf16", dpo, batch, 1, sides=sides)
    for mask in ("pair", "sample"):
        yield LossCall(f"dpo, mask of a {mask}", "bf16", dpo, batch, 1, mask=mask)
    kto = OBJECTIVES["kto"]
    yield LossCall("kto, labels", "bf16", kto, batch, 1, separate=True, vectors=("labels",))


def _many_pairs() -> Iterator[LossCall]:
    """The last program holds vectors of all pairs."""
    adaptive = OBJECTIVES["adaptive_dpo"]
    for pairs in (256, 2048):
        batch = Batch(pairs, (4, 32, 32), torch.bfloat16)
        for name, options in {"": {}, ", all processes": {"reduce": lambda sums: sums}}.items():
            yield LossCall(
                f"two annotators, {pairs} pairs{name}", "bf16", adaptive, batch, 3,
                options=options, heavy=pairs > 256 and bool(options),
            )  # fmt: skip


def _layouts() -> Iterator[LossCall | NoiseCall]:
    """Predictions that lie otherwise than their target; these need no wide loads."""
    dpo, adaptive = OBJECTIVES["dpo"], OBJECTIVES["adaptive_dpo"]
    for layout, dtype in itertools.product(("channels-last", "sliced"), DTYPES):
        batch = Batch(16, SDXL, DTYPES[dtype], layout)
        yield LossCall(f"dpo, {layout}", dtype, dpo, batch, 1)
        heavy = (layout, dtype) == ("channels-last", "bf16")
        yield LossCall(f"two annotators, {layout}", dtype, adaptive, batch, 3, heavy=heavy)
    batch = Batch(16, SDXL, torch.bfloat16, "channels-last")
    yield NoiseCall("v_prediction", "bf16", batch, drawn=True)
