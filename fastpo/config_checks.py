"""Which keys of the configuration do not go together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastpo.config_base import Section

if TYPE_CHECKING:
    from fastpo.config import TrainConfig


def check_running(objective: Section) -> None:
    """Refuses `statistics: running` for objectives that have none to run.

    Raises:
        ValueError: The objective needs the batch at hand.
    """
    if getattr(objective, "name", None) == "sdpo":
        raise ValueError(
            "train.statistics: sdpo's safeguard holds for the batch at hand; use processes or "
            "micro_batch, not running"
        )
    if getattr(objective, "normalize", "rms") == "l2":
        raise ValueError(
            "train.statistics: running has no batch over which to take an l2 norm; use "
            "train.objective.normalize: rms"
        )


def check_gate(config: TrainConfig) -> None:
    """Refuses a gate that nobody opens.

    A pair's margin alone gives u = 1/2 before the first update: every weight, and with them the
    gradient, would be zero from then on.

    Raises:
        ValueError: There are no annotators.
    """
    gated = getattr(config.objective, "weight_kind", None) == "gate"
    if gated and config.annotators is None:
        raise ValueError(
            "train.objective.weight_kind: gate needs train.annotators (ledger, or ema): without "
            "them every pair starts outside and no weight ever changes"
        )


def check_deepspeed(config: TrainConfig) -> None:
    """Refuses what DeepSpeed's engine would compute wrongly or not at all.

    Raises:
        ValueError: A key does not go with `train.deepspeed`.
    """
    if config.deepspeed is None:
        return
    if config.precision == "fp16":
        raise ValueError("train.precision: fp16 does not work with train.deepspeed; use bf16")
    if config.weights == "bf16":
        raise ValueError(
            "train.weights: bf16 does not work with train.deepspeed, whose weights are float32"
        )
    if config.channels_last:
        raise ValueError(
            "train.channels_last: train.deepspeed lays weights out in its own flat vectors"
        )
    if config.optim.name != "adamw":
        raise ValueError(
            f"train.optim.name: {config.optim.name} does not work with train.deepspeed, which "
            "shows the optimiser one flat vector instead of the weights; use adamw"
        )
