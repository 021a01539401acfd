"""What `train.backward` saves: a pair's cost at a share of pairs that need a backward pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastpo.config import Config, TrainConfig
from fastpo.config.load import read_yaml
from fastpo.errors import ConfigError
from fastpo.plan.schema import Backward, Cost, LiveCost
from fastpo.report import load_metrics
from fastpo.train.live_share import passes_at_once

QUARTERS = (0.25, 0.5, 0.75, 1.0)
"""Shares that are told where none is known."""
OPTION = "--live-share"


@dataclass(frozen=True)
class Passes:
    """What a pair takes on average, through the policy.

    Attributes:
        forward: Forward passes: one, and one more for each pair that is looked at first and then
            differentiated in a second pass.
        backward: Backward passes, with what checkpointing repeats. Of a run on several processes
            both count as these wait for the one with the most.
        share: The share of the pairs that have one.
        live: The share of pairs that need one, where that is where the numbers come from.
    """

    forward: float
    backward: float
    share: float
    live: float | None = None


def check_share(share: float | None, train: TrainConfig) -> None:
    """Refuses a share that is none, and one that the configuration has no use for.

    Raises:
        ConfigError: The text names the option.
    """
    if share is None:
        return
    if not 0.0 < share <= 1.0:
        raise ConfigError(f"{OPTION} must be in (0, 1], got {share:g}")
    if train.backward == "all":
        raise ConfigError(
            f"{OPTION} is for train.backward: alive or sampled; with all every pair has a backward "
            "pass"
        )


def plan_backward(config: Config, own: Cost, share: float | None, world: int) -> Backward | None:
    """What a pair costs where some have no backward pass; None with `train.backward: all`.

    With s the share of live pairs and D = 3 (4 with gradient checkpointing) a pair takes
    `min(D, 1 + D s)` passes, a forward pass being 1; the run chooses by these, and where processes
    wait for one another takes more. TFLOP and hours are those of the passes that it then makes, as
    counted.

    Args:
        config: The experiment. Without `share`, what a run in its `train.output_dir` has noted of
            its steps is taken; without such a run each quarter of live pairs is told.
        own: The configuration's cost with every backward pass.
        share: The user's share s, which comes first.
        world: Processes.

    Raises:
        DataError: The run's metrics are damaged.
    """
    if config.train.backward == "all":
        return None
    steps, source = None, None
    if share is not None:
        ways, source = (_passes(config.train, share),), OPTION
    elif (noted := _noted(config.train)) is not None:
        ways, steps = (noted[0],), noted[1]
        source = str(config.train.output_dir / "metrics.jsonl")
    else:
        ways = tuple(_passes(config.train, quarter) for quarter in QUARTERS)
    dense = passes_at_once(config.train.gradient_checkpointing)
    costs = tuple(_cost(passes, own, dense, world) for passes in ways)
    return Backward(mode=config.train.backward, source=source, steps=steps, costs=costs)


def _passes(train: TrainConfig, live: float) -> Passes:
    """Passes at a share of live pairs: the run looks first where that is cheaper."""
    dense = passes_at_once(train.gradient_checkpointing)
    if 1.0 + dense * live < dense:
        return Passes(forward=1.0 + live, backward=live, share=live, live=live)
    return Passes(forward=1.0, backward=1.0, share=1.0, live=live)


def _noted(train: TrainConfig) -> tuple[Passes, int] | None:
    """The mean passes of the steps that a run of this folder has noted, and how many these are.

    None where there is no such run, or one that left out backward passes by another rule.
    """
    folder = train.output_dir
    if not all((folder / name).is_file() for name in ("metrics.jsonl", "config.yaml")):
        return None
    then = read_yaml(folder / "config.yaml").get("train")
    rule = ("backward", "backward_threshold")
    if not isinstance(then, dict) or any(then.get(key) != getattr(train, key) for key in rule):
        return None
    metrics = load_metrics(folder)
    if not {"backward/share", "backward/cost"} <= metrics.keys():
        return None
    share, cost = metrics["backward/share"], metrics["backward/cost"]
    known = np.isfinite(share) & np.isfinite(cost)
    if not known.any():
        return None
    share, cost = share[known], cost[known]
    dense = passes_at_once(then.get("gradient_checkpointing"))  # as that run has counted
    # A step that looks first takes 1 + D s, more where processes wait; another way takes less.
    looked = cost >= 1.0 + dense * share - 1e-9
    backward = (cost - 1.0) / np.where(looked, dense, dense - 1.0)
    forward = 1.0 + looked * backward
    passes = Passes(float(forward.mean()), float(backward.mean()), float(share.mean()))
    return passes, int(known.sum())


def _cost(passes: Passes, own: Cost, dense: float, world: int) -> LiveCost:
    """The passes in TFLOP and time; all that this configuration runs has one precision."""
    flops = own.flops
    policy = passes.forward * flops.policy_forward
    policy += passes.backward * (flops.policy_backward + flops.policy_recompute)
    tflop = flops.total - flops.policy + policy
    part = tflop / flops.total
    seconds = own.seconds_per_pair * part
    return LiveCost(
        live=passes.live,
        share=passes.share,
        passes=passes.forward + (dense - 1.0) * passes.backward,
        tflop=tflop,
        seconds_per_pair=seconds,
        pairs_per_second=world / seconds,
        hours=None if own.hours is None else own.hours * part,
    )


def tell_backward(backward: Backward, own: Cost) -> str:
    """The plan's sentence about it."""
    first, mode = backward.costs[0], f"train.backward: {backward.mode}"
    if backward.source is None:
        live = ", ".join(f"{cost.live:.0%}" for cost in backward.costs)
        passes = ", ".join(f"{cost.passes:.3g}" for cost in backward.costs)
        took = ", ".join(_took(cost) for cost in backward.costs)
        return (
            f"{mode}, with {live} of the pairs live: {passes} passes through the policy a pair, "
            f"{took}; {OPTION} 0.25 plans with 25%"
        )
    if backward.steps is None:
        what = f"with {first.live:.0%} of the pairs live ({backward.source})"
    else:
        steps = "step" if backward.steps == 1 else "steps"
        what = (
            f"by {backward.steps:,} {steps} in {backward.source}, where {first.share:.0%} of the "
            "pairs had a backward pass"
        )
    return (
        f"{mode}, {what}: {first.passes:.3g} passes through the policy a pair, {first.tflop:.3g} "
        f"TFLOP, {_took(first)}; with a backward pass for every pair {own.tflop:.3g} TFLOP, "
        f"{_took(own)}"
    )


def _took(cost: Cost | LiveCost) -> str:
    """Hours, or seconds a pair where the run's length is not known."""
    return f"{cost.seconds_per_pair:.3g} s a pair" if cost.hours is None else f"{cost.hours:.3g} h"
