"""Launchers of the pair losses' kernels, and the table that says in which shape."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from fastpo_kernels._shared.dispatch import MAX_TILE
from fastpo_kernels._shared.launch_cache import Plan, Plans, described
from fastpo_kernels._shared.layout import device_guard
from fastpo_kernels._shared.target import EncodedTarget, KernelTarget
from fastpo_kernels.pair_loss.gpu import objectives
from fastpo_kernels.pair_loss.gpu.kernels import (
    pair_loss_bwd_kernel,
    pair_loss_finish_kernel,
    pair_loss_fwd_kernel,
)


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
    _plans.clear()
    try:
        yield
    finally:
        _forced = before
        _plans.clear()


def launch_config(n_pairs: int, n_elements: int, n_streams: int, n_dims: int = 1) -> LaunchConfig:
    """Small tiles while the batch is too small to fill a GPU; about a thousand programs at most.

    `n_streams` counts what a program holds: policy, reference and annotators that are read as
    predictions, latents and drawn noise of a target that is formed. `n_dims` is what layouts could
    be merged to; more than one is indexed element by element, in registers. Chosen from compiled
    register counts (benchmarks/results/aot.csv, 2026-11); not yet tuned on a GPU.
    """
    if _forced is not None:
        return _forced
    # Five streams over 8 warps spill: ptxas stays at 128 registers, over 4 warps it need not.
    small = n_streams > 4 or n_dims > 1 or n_pairs * n_elements < 1 << 20
    block_size, num_warps = (1024, 4) if small else (2048 if n_streams > 2 else 4096, 8)
    if n_pairs > 1024 and n_streams <= 4:
        # The last program holds vectors of all pairs. 16 warps have 128 registers a thread.
        block_size, num_warps = 4096, 16
    if torch.version.hip is not None:
        num_warps //= 2
    programs = max(1, 1024 // max(n_pairs, 1))
    return LaunchConfig(block_size, min(-(-n_elements // block_size), programs), num_warps)


_plans = Plans()
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


def _target_numbers(scalars: Sequence[float]) -> tuple[int, float, float, int]:
    """Seed, shift, scale; and what the seed's type depends on, for the plan's key."""
    seed = int(scalars[0])
    return seed, float(scalars[1]), float(scalars[2]), seed >> 31


def _numbers(
    options: Sequence[float], adaptive_scalars: Sequence[float], safeguard: float | None
) -> tuple[tuple[float, ...], tuple[float, ...], float]:
    """The kernels' parameters of these names: floats, since a plan is for their types."""
    adaptive = tuple(map(float, adaptive_scalars)) or (0.0,)
    return tuple(map(float, options)), adaptive, float(safeguard or 0.0)


def launch_forward(
    sources: Sequence[Tensor],
    target: EncodedTarget,
    minority: Tensor | None,
    statistics: Tensor | None,
    pair_weight: Tensor | None,
    loss: Tensor | None,
    stats: Tensor,
    objective: str,
    options: Sequence[float],
    adaptive_kinds: Sequence[str],
    adaptive_scalars: Sequence[float],
    has_reference: bool,
    safeguard: float | None,
    ticket_counter: Tensor,
) -> None:
    """Fills `loss` and `stats`; without an objective, `stats` with errors `[S, 2B]` and sums."""
    policy, n_sources = sources[0], len(sources)
    parts, kind, scalars = target
    facts, at = described((*sources, *parts, minority, statistics, pair_weight))
    choices = (objective, loss is None, tuple(adaptive_kinds), has_reference, safeguard is None)
    *drawn, wide = _target_numbers(scalars)
    key = ("forward", policy.device, facts, n_sources, kind, choices, wide)
    numbers = (*_numbers(options, adaptive_scalars, safeguard), *drawn)
    with device_guard(policy):
        plan = _plans.get(key) or _plan_forward(sources, target, *choices)
        partials = torch.empty(plan.scratch, dtype=torch.float32, device=policy.device)
        outputs = (partials, ticket_counter, loss, stats)
        if plan.again is None:
            formed = KernelTarget.decode(*target).tensors
            tensors = (tuple(sources), formed, minority, statistics, pair_weight, *outputs)
            _plans.keep(key, plan.first(pair_loss_fwd_kernel, tensors, numbers))
        else:
            placed = [None if t is None else t.data_ptr() for t in outputs]
            formed = plan.placed(at[n_sources:])
            plan.repeat((tuple(at[:n_sources]), formed, *at[-3:], *placed), numbers)


def _plan_forward(
    sources: Sequence[Tensor],
    target: EncodedTarget,
    objective: str,
    partial: bool,
    adaptive_kinds: Sequence[str],
    has_reference: bool,
    unguarded: bool,
) -> Plan:
    """The launch for tensors that lie as these do."""
    n_pairs, n_sources = sources[0].shape[0] // 2, len(sources)
    full = [s for s in sources if s.ndim > 1]
    formed = KernelTarget.decode(*target)
    sizes, rows, target_strides = formed.layout(full)
    by_id = {id(s): r for s, r in zip(full, rows, strict=True)}
    n_elements = math.prod(sizes)
    config = launch_config(n_pairs, n_elements, len(full) + formed.n_streams, len(sizes))
    n_chunks = config.programs_per_pair
    normalize, weight_kind, margin_kind = adaptive_kinds or (None, None, None)
    strides = tuple(by_id.get(id(s), target_strides[0]) for s in sources)
    return Plan(
        programs=n_pairs * n_chunks,
        scratch=(n_sources + 1) * n_chunks * 2 * n_pairs,
        slots=formed.slots,
        sizes=(n_pairs, n_chunks, n_elements, sizes, strides, target_strides),
        constexprs={
            "READY": sum(1 << k for k, s in enumerate(sources) if s.ndim == 1),
            "OBJECTIVE": None if partial else objectives.OBJECTIVES[objective],
            "HAS_REFERENCE": has_reference,
            "TARGET": formed.kind,
            "NORMALIZE": normalize,
            "WEIGHT_KIND": weight_kind,
            "MARGIN_KIND": margin_kind,
            "BATCH_BASELINE": objective == "kto",
            "SAFEGUARD": not unguarded,
            "BLOCK_SIZE": config.block_size,
            "BLOCK_P": triton.next_power_of_2(n_chunks),
            "BLOCK_B": triton.next_power_of_2(n_pairs),
        },
        num_warps=config.num_warps,
    )


def launch_finish(
    errors: Sequence[Tensor],
    minority: Tensor | None,
    sums: Tensor,
    pair_weight: Tensor | None,
    loss: Tensor,
    stats: Tensor,
    objective: str,
    options: Sequence[float],
    adaptive_kinds: Sequence[str],
    adaptive_scalars: Sequence[float],
    has_reference: bool,
    safeguard: float | None,
) -> None:
    """Fills `loss` and `stats` from the errors `[2B]` of every source and sums of all processes."""
    first, n_errors = errors[0], len(errors)
    facts, at = described((*errors, minority, sums, pair_weight))
    kinds = tuple(adaptive_kinds)
    key = ("finish", first.device, facts, objective, kinds, has_reference, safeguard is None)
    numbers = _numbers(options, adaptive_scalars, safeguard)
    with device_guard(first):
        plan = _plans.get(key)
        if plan is not None:
            outputs = (loss.data_ptr(), stats.data_ptr())
            plan.repeat((tuple(at[:n_errors]), *at[n_errors:], *outputs), numbers)
            return
        n_pairs = first.shape[0] // 2
        normalize, weight_kind, margin_kind = kinds or (None, None, None)
        plan = Plan(
            programs=1,
            sizes=(n_pairs,),
            constexprs={
                "OBJECTIVE": objectives.OBJECTIVES[objective],
                "HAS_REFERENCE": has_reference,
                "NORMALIZE": normalize,
                "WEIGHT_KIND": weight_kind,
                "MARGIN_KIND": margin_kind,
                "BATCH_BASELINE": objective == "kto",
                "SAFEGUARD": safeguard is not None,
                "N_SUMS": sums.shape[0],
                "BLOCK_B": triton.next_power_of_2(n_pairs),
            },
            num_warps=4 if torch.version.hip is not None else 8,
        )
        tensors = (tuple(errors), minority, sums, pair_weight, loss, stats)
        _plans.keep(key, plan.first(pair_loss_finish_kernel, tensors, numbers))


def launch_backward(
    policy: Tensor,
    target: EncodedTarget,
    coefficients: Tensor,
    grad_loss: Tensor | None,
) -> Tensor:
    """The policy's gradient, in its dtype and, where it is dense, its layout."""
    parts, kind, scalars = target
    with device_guard(policy):
        grad_policy = torch.empty_like(policy)
        facts, at = described((policy, *parts, grad_loss))
        *numbers, wide = _target_numbers(scalars)
        key = ("backward", policy.device, facts, kind, wide)
        plan = _plans.get(key)
        if plan is not None:
            outputs = (coefficients.data_ptr(), at[-1], grad_policy.data_ptr())
            plan.repeat((at[0], plan.placed(at[1:]), *outputs), tuple(numbers))
            return grad_policy
        formed = KernelTarget.decode(*target)
        sizes, rows, target_strides = formed.layout([policy, grad_policy])
        n_pairs, n_elements = policy.shape[0] // 2, math.prod(sizes)
        config = launch_config(n_pairs, n_elements, 1, len(sizes))
        n_chunks = -(-n_elements // config.block_size)
        plan = Plan(
            programs=n_pairs * n_chunks,
            slots=formed.slots,
            sizes=(n_pairs, n_chunks, n_elements, sizes, rows[0], target_strides, rows[1]),
            constexprs={"TARGET": formed.kind, "BLOCK_SIZE": config.block_size},
            num_warps=config.num_warps,
        )
        tensors = (policy, formed.tensors, coefficients, grad_loss, grad_policy)
        _plans.keep(key, plan.first(pair_loss_bwd_kernel, tensors, tuple(numbers)))
    return grad_policy
