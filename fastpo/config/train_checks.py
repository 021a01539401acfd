"""Which keys of the training's section do not go together, said at the key."""

from __future__ import annotations

from pathlib import Path

from fastpo.config.objectives import AdaptiveOptions
from fastpo.config.sections import LedgerAnnotators, LoraConfig
from fastpo.config.timesteps import ListTimesteps, SigmaTimesteps
from fastpo.config.train_keys import TrainKeys

STAGE_3 = ("zero3", "zero3_offload")
"""The packaged DeepSpeed settings that shard the weights; of a file only its reader knows."""


def check_stage_3(config: TrainKeys) -> None:
    """Refuses what does not work where the weights are sharded.

    Raises:
        ValueError: A key does not go with ZeRO-3.
    """
    if config.compile:
        raise ValueError(f"train.compile does not work with ZeRO-3 ({config.deepspeed})")
    if config.batches_annotators:
        raise ValueError(
            f"train.annotators.batched: true does not work with ZeRO-3 ({config.deepspeed})"
        )
    if config.sample_every is not None:
        raise ValueError(
            f"train.sample_every does not work with ZeRO-3 ({config.deepspeed}), where no process "
            "has whole weights; sample from checkpoints with fastpo evaluate --weights"
        )


def check_held_out(config: TrainKeys, share: float) -> None:
    """Refuses keys about held-out pairs where none are (`data.held_out` is 0).

    Raises:
        ValueError: The text names the key.
    """
    given = {
        "held_out_every": config.held_out_every is not None,
        "held_out_draws": config.held_out_draws > 1,
        "keep_best": config.keep_best,
        "early_stop": config.early_stop is not None,
    }
    for key, used in given.items():
        if used and not share:
            raise ValueError(
                f"train.{key} is about held-out pairs; set data.held_out to a share, such as 0.01"
            )


def check_lora_start(config: TrainKeys, lora: Path | None) -> None:
    """Refuses an earlier LoRA where no adapters are trained.

    Raises:
        ValueError: `model.lora` does not go with `train.method`.
    """
    if lora is not None and config.method != "lora":
        raise ValueError(
            "model.lora is continued by train.method: lora; to train the whole model from it, put "
            "it into the weights first (diffusers' fuse_lora and save_pretrained) and set "
            "model.path to that folder"
        )


def check_annotators(config: TrainKeys) -> None:
    """Refuses annotators that the objective or the method cannot use, and a gate without any.

    Without annotators a pair's margin alone gives u = 1/2 before the first update: behind a gate
    every weight, and with the weights the gradient, would be zero from then on.

    Raises:
        ValueError: The text names the key.
    """
    objective = config.objective
    adaptive = isinstance(objective, AdaptiveOptions)
    if config.annotators is not None and not adaptive:
        raise ValueError(
            f"train.annotators is used by adaptive_dpo and adaptive_ipo only, "
            f"not by {objective.name}"
        )
    if config.method == "full" and config.batches_annotators:
        raise ValueError("train.annotators.batched: true needs train.method: lora")
    if config.lora.use_dora and config.batches_annotators:
        raise ValueError(
            "train.annotators.batched: true does not work with train.lora.use_dora, whose outputs "
            "are no sum of the base's and a low-rank term"
        )
    if adaptive and objective.weight_kind == "gate" and config.annotators is None:
        raise ValueError(
            "train.objective.weight_kind: gate needs train.annotators (ledger, or ema): without "
            "them every pair starts outside and no weight ever changes"
        )


def check_rounds(config: TrainKeys) -> None:
    """Refuses rounds whose verdict nobody reads, and what a fresh start cannot do.

    Raises:
        ValueError: The text names the key.
    """
    asked = {
        "rounds": config.rounds > 1,
        "verdicts": config.verdicts is not None,
    }
    for key in [key for key, value in asked.items() if value]:
        if not isinstance(config.annotators, LedgerAnnotators):
            raise ValueError(
                f"train.{key} hands on what the ledger has found; set train.annotators: "
                "{kind: ledger} and train.objective: {name: adaptive_dpo, weight_kind: gate}"
            )
    if config.round_epochs is not None and config.rounds == 1:
        raise ValueError("train.round_epochs is about the rounds before the last; set train.rounds")
    if config.round_epochs is not None and config.epochs is None:
        raise ValueError("train.round_epochs goes with train.epochs, not with train.max_steps")
    if config.rounds_draws == "same" and config.rounds == 1:
        raise ValueError(
            "train.rounds_draws is about the rounds behind the first; set train.rounds"
        )
    if config.rounds_turn is not None and (config.rounds_turn < 0.5 or not any(asked.values())):
        raise ValueError(
            f"train.rounds_turn: {config.rounds_turn:g} turns labels round that a round before has "
            "doubted; it must be at least 0.5, and needs train.rounds or train.verdicts"
        )
    if config.rounds > 1 and config.deepspeed is not None:
        raise ValueError(
            "train.rounds does not begin anew within a run of DeepSpeed; make each round a run, "
            "with train.verdicts: the folder of the one before"
        )
    if config.rounds > 1 and config.early_stop is not None:
        raise ValueError(
            "train.early_stop would end the run in its first round; held-out accuracy already "
            "ends train.rounds where a round brings none"
        )


def check_used(config: TrainKeys) -> None:
    """Refuses adapters in full fine-tuning, and a cached reference where there is none.

    Raises:
        ValueError: The text names the key.
    """
    if config.method == "full" and config.lora != LoraConfig():
        raise ValueError(
            "train.lora is for train.method: lora, not full; take the section out (on the command "
            "line: --set train.lora={})"
        )
    if config.reference == "cached" and not config.needs_reference:
        raise ValueError(
            f"train.reference: cached has no use for {config.objective.name}, which compares with "
            "no reference; leave it out (on the command line: --set train.reference=live)"
        )


def check_slope(config: TrainKeys) -> None:
    """Refuses a slope that depends on the margins where these are no logit.

    Raises:
        ValueError: The text names the key.
    """
    if config.objective.has_logit:
        return
    asked = {
        "train.auto_slope": config.auto_slope is not None,
        "train.slope_by_timestep": config.slope_by_timestep,
    }
    for key in [key for key, value in asked.items() if value]:
        raise ValueError(
            f"{key} changes the beta of a logit beta d, which {config.objective.name} has not; "
            "leave it out"
        )


def check_backward(config: TrainKeys) -> None:
    """Refuses a threshold that nobody reads, and dropout, whose mask no second pass repeats.

    Raises:
        ValueError: The text names the key.
    """
    threshold = type(config).model_fields["backward_threshold"].default
    if config.backward != "sampled" and config.backward_threshold != threshold:
        raise ValueError(
            f"train.backward_threshold is for train.backward: sampled, not {config.backward}"
        )
    if config.backward != "all" and config.lora.dropout > 0.0:
        raise ValueError(
            f"train.backward: {config.backward} decides by one forward pass and differentiates "
            "another, whose dropout would differ; use train.lora.dropout: 0, or train.backward: all"
        )


def check_deepspeed(config: TrainKeys) -> None:
    """Refuses what DeepSpeed's engine would compute wrongly or not at all.

    Raises:
        ValueError: The text names the key.
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
            "shows the optimizer one flat vector instead of the weights; use adamw"
        )


def check_weights(config: TrainKeys) -> None:
    """Refuses precisions and memory formats of the weights that do not work.

    Raises:
        ValueError: The text names the key.
    """
    name = config.optim.name
    if config.weights == "bf16" and name in ("prodigy", "lion", "schedule_free"):
        raise ValueError(
            f"train.weights: bf16 does not work with train.optim.name: {name}; use adamw, "
            "adamw_8bit or adafactor"
        )
    if name == "schedule_free" and config.ema_decay is not None:
        raise ValueError(
            "train.ema_decay: schedule_free averages the weights itself, and exports the average "
            "as final/; leave ema_decay out"
        )
    master = (config.method, config.weights) == ("full", "fp32")
    if config.channels_last and master and config.optim.name == "adamw_8bit":
        raise ValueError(
            "train.channels_last: adamw_8bit would turn fp32 weights back to the contiguous "
            "format; use train.weights: bf16, or another train.optim.name"
        )
    if config.quantize_base is not None:
        check_quantized(config)
    if config.weights == "bf16" and (config.method, config.precision) != ("full", "bf16"):
        raise ValueError(
            "train.weights: bf16 is for train.method: full with train.precision: bf16; "
            "adapters are always trained in fp32"
        )


def check_quantized(config: TrainKeys) -> None:
    """Refuses what a base in few bits does not go with.

    Raises:
        ValueError: The text names the key.
    """
    if config.method != "lora":
        raise ValueError("train.quantize_base is for train.method: lora; whole weights are trained")
    for key, used in (
        ("train.deepspeed", config.deepspeed is not None),
        ("train.lora.use_dora", config.lora.use_dora),
        ("train.compile", config.compile),
    ):
        if used:
            raise ValueError(f"train.quantize_base does not work with {key}; leave one of them out")


def check_timesteps(config: TrainKeys) -> None:
    """Refuses an empty range of timesteps, and a range beside a list.

    Raises:
        ValueError: The text names the key.
    """
    if config.max_timestep is not None and config.max_timestep <= config.min_timestep:
        raise ValueError("train.max_timestep must be greater than train.min_timestep")
    ranged = config.min_timestep or config.max_timestep is not None
    if ranged and isinstance(config.timesteps, ListTimesteps | SigmaTimesteps):
        raise ValueError(
            "train.timesteps: a list is the whole choice; leave train.min_timestep and "
            "train.max_timestep out"
        )
