"""Which keys of the configuration do not go together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastpo.config.fields import Section

if TYPE_CHECKING:
    from fastpo.config.sections import TrainConfig

STAGE_3 = ("zero3", "zero3_offload")
"""The packaged DeepSpeed settings that share weights out; of a file only its reader knows."""


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


def check_used(config: TrainConfig) -> None:
    """Refuses sections that the run would not look at.

    Raises:
        ValueError: Adapters are described for full fine-tuning, or a reference is to be read for an
            objective that has none.
    """
    if config.method == "full" and config.lora != type(config.lora)():
        raise ValueError(
            "train.lora is for train.method: lora, not full; take the section out (on the command "
            "line: --set train.lora={})"
        )
    if config.reference == "cached" and config.objective.name in ("mapo", "sft"):
        raise ValueError(
            f"train.reference: cached has no use for {config.objective.name}, which compares with "
            "no reference; leave it out (on the command line: --set train.reference=live)"
        )


def check_stage_3(config: TrainConfig) -> None:
    """Refuses what does not work where weights are shared out.

    Raises:
        ValueError: A key does not go with ZeRO-3.
    """
    if config.compile:
        raise ValueError(f"train.compile does not work with ZeRO-3 ({config.deepspeed})")
    if getattr(config.annotators, "batched", False) is True:
        raise ValueError(
            f"train.annotators.batched: true does not work with ZeRO-3 ({config.deepspeed})"
        )


def check_deepspeed(config: TrainConfig) -> None:
    """Refuses what DeepSpeed's engine would compute wrongly or not at all.

    Raises:
        ValueError: A key does not go with `train.deepspeed`.
    """
    if config.deepspeed is None:
        return
    if config.deepspeed in STAGE_3:
        check_stage_3(config)
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
