"""Launchers of the pair losses' kernels, and the table that says in which shape."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from fastpo_kernels._shared.dispatch import MAX_TILE
from fastpo_kernels._shared.launch_cache import CachedLaunch, LaunchCache, described
from fastpo_kernels._shared.layout import device_guard, joint_layout
from fastpo_kernels.pair_loss.gpu.kernels import (
    pair_loss_bwd_kernel,
    pair_loss_finish_kernel,
    pair_loss_fwd_kernel,
)
from fastpo_kernels.pair_loss.gpu.objectives import OBJECTIVES
from fastpo_kernels.pair_loss.spec import LossSpec, PairTensors, PartialsLayout, StatsLayout


@dataclass(frozen=True)
class LaunchConfig:
    """Elements per tile, tiles' programs per pair, warps per program."""

    block_size: int
    programs_per_pair: int
    num_warps: int

    def __post_init__(self) -> None:
        assert self.block_size <= MAX_TILE, "positions in the last tile must fit 32 bits"


_forced: LaunchConfig | None = None


@contextmanager
def launches_as(config: LaunchConfig) -> Iterator[None]:
    """Inside, every launch has this shape: for tests, and the sweep that fills the table."""
    global _forced
    before, _forced = _forced, config
    _launches.clear()
    try:
        yield
    finally:
        _forced = before
        _launches.clear()


def forward_config(n_pairs: int, n_elements: int, n_streams: int, n_dims: int = 1) -> LaunchConfig:
    """Tiles and warps by what a program holds; a thousand programs, fewer where the finish counts.

    `n_streams` counts the policy, reference and annotators that are read as predictions. `n_dims`
    is what layouts could be merged to; more than one is indexed element by element, in registers.
    """
    if _forced is not None:
        return _forced
    size, programs = n_pairs * n_elements, 1024
    if n_streams > 4 or n_dims > 1 or size < 1 << 20:
        # Five streams over 8 warps spill: ptxas stays at 128 registers, over 4 warps it need not.
        block_size, num_warps = 1024, 4
        if n_pairs > 1024 and n_streams <= 4:
            block_size, num_warps = 4096, 16
    elif n_pairs > 256:
        # The last program holds vectors of all pairs. 16 warps have 128 registers a thread.
        block_size, num_warps = (
            (2048 if n_streams > 2 else 4096, 8) if n_pairs <= 1024 else (4096, 16)
        )
    # NVIDIA H200, 2026-11-28 (benchmarks/results/nvidia-h200/launch_configs.csv), SDXL latents:
    elif n_streams <= 2:
        block_size, num_warps = 2048, 4  # 0.98 and 0.99 of the best at 256 and at 16 pairs
    elif size < 1 << 22:
        block_size, num_warps, programs = 2048, 8, 256  # the best at 16 pairs
    else:
        block_size, num_warps = 1024, 4  # the best at 256 pairs
    per_pair = min(-(-n_elements // block_size), max(1, programs // max(n_pairs, 1)))
    return LaunchConfig(block_size, per_pair, _wavefronts(num_warps))


def backward_config(n_elements: int) -> LaunchConfig:
    """A program for every tile."""
    if _forced is not None:
        return _forced
    # NVIDIA H200, 2026-11-28: 1.00 and 0.96 of the best at 256 and at 16 pairs of SDXL latents.
    return LaunchConfig(1024, -(-n_elements // 1024), _wavefronts(4))


def _wavefronts(num_warps: int) -> int:
    """AMD's have 64 threads."""
    return num_warps // 2 if torch.version.hip is not None else num_warps


Triple = tuple[Tensor, Tensor, Tensor]
_launches = LaunchCache()
_tickets: dict[tuple[int, int], Tensor] = {}


def ticket(device: torch.device, *, fresh: bool) -> Tensor:
    """A zeroed int32, left at zero by every launch.

    One a stream, kept, unless `fresh` or a graph is captured: graphs' replays may meet, and what
    is allocated inside a graph's memory pool must not outlive the call.
    """
    if fresh or device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = (device.index, driver.active.get_current_stream(device.index))  # pyright: ignore[reportAttributeAccessIssue]
    if key not in _tickets:
        _tickets[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _tickets[key]


def _numbers(spec: LossSpec) -> tuple[float, ...]:
    """The kernels' numbers, in their order: floats, since a launch is kept for their types."""
    a, b, c = (*spec.options, 0.0, 0.0, 0.0)[:3]
    share = 0.0 if spec.safeguard is None else 1.0 - float(spec.safeguard)
    adaptive = spec.adaptive
    if adaptive is None:
        return a, b, c, 0.0, 0.0, 0.0, 0.0, 0.0, share, float(spec.sft_weight)
    return (
        a,
        b,
        c,
        float(adaptive.rho),
        float(adaptive.weight_scale),
        float(adaptive.weight_intercept),
        float(adaptive.shift_scale),
        float(adaptive.beta),
        share,
        float(spec.sft_weight),
    )


class _Results(NamedTuple):
    """What a pass over the predictions fills: `PartialsLayout` where there is no loss to finish."""

    ticket: Tensor
    loss: Tensor | None
    stats: Tensor


def _empty(size: int | tuple[()], like: Tensor) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=like.device)


def _empty_loss(tensors: PairTensors, spec: LossSpec) -> Tensor:
    return _empty(tensors.n_pairs if spec.per_pair else (), tensors.policy)


def launch_forward(tensors: PairTensors, spec: LossSpec, ticket: Tensor) -> tuple[Tensor, Tensor]:
    """Loss `[]`, or `[B]` per pair, and the vector of `StatsLayout`, both float32."""
    policy = tensors.policy
    layout = StatsLayout(tensors.n_pairs, len(tensors.sources), spec.flags.safeguard)
    loss, stats = _empty_loss(tensors, spec), _empty(layout.size, policy)
    _launch_reduction(tensors, spec, _Results(ticket, loss, stats))
    return loss, stats


def launch_partials(tensors: PairTensors, spec: LossSpec, ticket: Tensor) -> Tensor:
    """The vector of `PartialsLayout`, float32; of `spec` nothing but its sums is asked."""
    n_sums = spec.n_sums(len(tensors.annotators))
    layout = PartialsLayout(tensors.n_pairs, len(tensors.sources), n_sums)
    partials = _empty(layout.size, tensors.policy)
    _launch_reduction(tensors, spec, _Results(ticket, None, partials))
    return partials


def _launch_reduction(tensors: PairTensors, spec: LossSpec, results: _Results) -> None:
    """One pass over the predictions."""
    policy, sources, losers = tensors.policy, tensors.sources, tensors.losers
    vectors = (
        tensors.mask,
        tensors.minority,
        tensors.statistics,
        tensors.pair_weight,
        tensors.beta,
    )
    facts, at = described((*sources, tensors.target, *vectors, *(losers or ())))
    finishes, has_reference = results.loss is not None, tensors.reference is not None
    key = ("forward", policy.device, facts, spec.flags, has_reference, finishes)
    numbers = _numbers(spec)
    with device_guard(policy):
        launch = _launches.get(key) or _prepare_reduction(tensors, spec, finishes=finishes)
        outputs = (_empty(launch.scratch, policy), *results)
        if launch.compiled is None:
            arguments = (sources, tensors.target, losers, *vectors, *outputs)
            _launches.keep(key, launch.launch(pair_loss_fwd_kernel, arguments, numbers))
        else:
            n, end = len(sources), len(sources) + 1 + len(vectors)
            filled = [None if t is None else t.data_ptr() for t in outputs]
            others = None if losers is None else tuple(at[end:])
            launch.relaunch((tuple(at[:n]), at[n], others, *at[n + 1 : end], *filled), numbers)


def _flags(spec: LossSpec, *, has_reference: bool) -> dict[str, Any]:
    """The kernels' constexprs of an objective, in their order."""
    flags = spec.flags
    return {
        "OBJECTIVE": OBJECTIVES[flags.objective],
        "HAS_REFERENCE": has_reference,
        "NORMALIZE": flags.normalize,
        "WEIGHT_KIND": flags.weight_kind,
        "MARGIN_KIND": flags.margin_kind,
        "BATCH_BASELINE": spec.has_baseline,
        "SAFEGUARD": flags.safeguard,
        "SFT": flags.sft,
        "PER_PAIR": flags.per_pair,
    }


def _shares(target: Tensor, n_pairs: int, losers: tuple[Tensor, ...] | None) -> bool:
    """Whether the sides of a pair have one target."""
    return target.shape[0] == n_pairs if losers is None else losers[-1] is target


def _prepare_reduction(tensors: PairTensors, spec: LossSpec, *, finishes: bool) -> CachedLaunch:
    """The launch for tensors that lie as these do."""
    n_pairs, sources = tensors.n_pairs, tensors.sources
    full = [s for s in sources if s.ndim > 1]
    masks = [] if tensors.mask is None else [tensors.mask]
    sizes, (*rows, target_strides) = joint_layout([*full, *masks, tensors.target])
    mask_strides = rows.pop() if masks else target_strides
    by_id = {id(s): r for s, r in zip(full, rows, strict=True)}
    n_elements = math.prod(sizes)
    config = forward_config(n_pairs, n_elements, len(full), len(sizes))
    n_chunks = config.programs_per_pair
    strides = tuple(by_id.get(id(s), target_strides) for s in sources)
    # Partials lie by source, the safeguard's behind all: none behind the last that is written.
    last = max(k for k, s in enumerate(sources) if s.ndim > 1)
    n_partials = len(sources) + 1 if spec.flags.safeguard else last + 1
    return CachedLaunch(
        programs=n_pairs * n_chunks,
        scratch=n_partials * n_chunks * 2 * n_pairs,
        sizes=(n_pairs, n_chunks, n_elements, sizes, strides, target_strides, mask_strides),
        constexprs={
            "READY": sum(1 << k for k, s in enumerate(sources) if s.ndim == 1),
            "SHARED_TARGET": _shares(tensors.target, n_pairs, tensors.losers),
            "SHARED_MASK": tensors.mask is None or tensors.mask.shape[0] == n_pairs,
            "FINISH": finishes,
            **_flags(spec, has_reference=tensors.reference is not None),
            "BLOCK_SIZE": config.block_size,
            "BLOCK_P": triton.next_power_of_2(n_chunks),
            "BLOCK_B": triton.next_power_of_2(n_pairs),
        },
        num_warps=config.num_warps,
    )


def launch_finish(errors: PairTensors, spec: LossSpec) -> tuple[Tensor, Tensor]:
    """Loss and the vector of `StatsLayout`, from errors and the sums of all processes.

    Every source of `errors` is `[2B]`, its `statistics` are the sums.
    """
    first, sources = errors.policy, errors.sources
    loss = _empty_loss(errors, spec)
    layout = StatsLayout(errors.n_pairs, len(sources), spec.flags.safeguard)
    stats = _empty(layout.size, first)
    vectors = (errors.minority, errors.statistics, errors.pair_weight, errors.beta)
    facts, at = described((*sources, *vectors))
    has_reference = errors.reference is not None
    key = ("finish", first.device, facts, spec.flags, has_reference)
    with device_guard(first):
        launch = _launches.get(key)
        if launch is not None:
            n = len(sources)
            filled = (loss.data_ptr(), stats.data_ptr())
            launch.relaunch((tuple(at[:n]), *at[n:], *filled), _numbers(spec))
            return loss, stats
        launch = CachedLaunch(
            programs=1,
            sizes=(errors.n_pairs,),
            constexprs={
                **_flags(spec, has_reference=has_reference),
                "N_SUMS": spec.n_sums(len(errors.annotators)),
                "BLOCK_B": triton.next_power_of_2(errors.n_pairs),
            },
            num_warps=4 if torch.version.hip is not None else 8,
        )
        arguments = (sources, *vectors, loss, stats)
        _launches.keep(key, launch.launch(pair_loss_finish_kernel, arguments, _numbers(spec)))
    return loss, stats


def launch_backward(
    policy: Tensor,
    target: Tensor,
    coefficients: Tensor,
    grad_loss: Tensor | None,
    mask: Tensor | None = None,
) -> Tensor:
    """The policy's gradient, in its dtype and, where it is dense, its layout."""
    with device_guard(policy):
        grad_policy = torch.empty_like(policy)
        _launch_gradient((policy, target, grad_policy), None, coefficients, grad_loss, mask)
    return grad_policy


def launch_gradients(
    winners: Triple,
    losers: Triple,
    coefficients: Tensor,
    grad_loss: Tensor | None,
    mask: Tensor | None = None,
) -> None:
    """Fills both sides' gradients; `winners` and `losers` are policy, target and gradient."""
    with device_guard(winners[0]):
        _launch_gradient(winners, losers, coefficients, grad_loss, mask)


def _launch_gradient(
    whole: Triple,
    losers: Triple | None,
    coefficients: Tensor,
    grad_loss: Tensor | None,
    mask: Tensor | None,
) -> None:
    """One pass over policy, target and gradient; without `losers` they hold both sides."""
    policy, target, grad_policy = whole
    # Without `losers` a gradient lies as the policy decides.
    sides = () if losers is None else (grad_policy, *losers)
    facts, at = described((policy, target, grad_loss, mask, *sides))
    key = ("backward", policy.device, facts)
    launch = _launches.get(key)
    if launch is not None:
        others = None if losers is None else tuple(at[5:])
        outputs = (coefficients.data_ptr(), at[2], grad_policy.data_ptr(), others, at[3])
        launch.relaunch((at[0], at[1], *outputs), ())
        return
    n_pairs = policy.shape[0] // (2 if losers is None else 1)
    sizes, (policy_strides, grad_strides, target_strides, *others) = joint_layout(
        [policy, grad_policy, target, *([] if mask is None else [mask])]
    )
    n_elements = math.prod(sizes)
    config = backward_config(n_elements)
    n_chunks = -(-n_elements // config.block_size)
    strides = (policy_strides, target_strides, grad_strides, *(others or [target_strides]))
    target_loser = None if losers is None else losers[1:2]
    launch = CachedLaunch(
        programs=n_pairs * n_chunks,
        sizes=(n_pairs, n_chunks, n_elements, sizes, *strides),
        constexprs={
            "SHARED_TARGET": _shares(target, n_pairs, target_loser),
            "SHARED_MASK": mask is None or mask.shape[0] == n_pairs,
            "BLOCK_SIZE": config.block_size,
        },
        num_warps=config.num_warps,
    )
    arguments = (policy, target, coefficients, grad_loss, grad_policy, losers, mask)
    _launches.keep(key, launch.launch(pair_loss_bwd_kernel, arguments, ()))
