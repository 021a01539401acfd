"""The training's section, and which of its keys do not go together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import model_validator

from fastpo.config.fields import (
    Chance,
    Count,
    Fraction,
    Name,
    NotNegative,
    Positive,
    PositiveInt,
    Precision,
    Section,
    Share,
    SomeShare,
    UserPath,
    decides,
)
from fastpo.config.objectives import AdaptiveOptions, ObjectiveConfig
from fastpo.config.sections import (
    AnnotatorsConfig,
    EmaAnnotators,
    LedgerAnnotators,
    LoraConfig,
    OptimConfig,
)
from fastpo.config.timesteps import (
    ListTimesteps,
    SigmaTimesteps,
    TimestepsConfig,
    UniformTimesteps,
)

STAGE_3 = ("zero3", "zero3_offload")
"""The packaged DeepSpeed settings that shard the weights; of a file only its reader knows."""


class TrainConfig(Section):
    """The training."""

    output_dir: Annotated[UserPath, decides("nothing")]
    """The run's folder."""
    method: Annotated[Literal["lora", "full"], decides("reference", "run")] = "lora"
    """Low-rank adapters beside frozen weights, or all of the denoiser's weights."""
    lora: LoraConfig = LoraConfig()
    objective: ObjectiveConfig
    annotators: AnnotatorsConfig | None = None
    statistics: Annotated[Literal["micro_batch", "processes", "running"], decides("run")] = (
        "processes"
    )
    """Over which pairs KTO's baseline, SDPO's factor, Adaptive-DPO's mean and scales are taken."""
    reference: Annotated[Literal["live", "cached"], decides("nothing")] = "live"
    """Of `cached`, its errors come from `fastpo prepare CONFIG --reference K`, no reference model
    is held; to rounding the errors are the same, and errors of other settings are refused."""
    auto_slope: Annotated[Fraction | None, decides("run")] = None
    """Share of the pairs whose logit shall be beyond 4: objective.beta then is where the slope
    begins, and follows the running mean of the margins' sizes. None: the slope stays."""
    slope_by_timestep: Annotated[bool, decides("run")] = False
    """Divides the slope by how large margins are at the pair's timestep, relative to all: a running
    mean by tenths of the schedule. So no timestep saturates before others (arXiv 2505.18736)."""
    optim: OptimConfig = OptimConfig()
    epochs: Annotated[Positive | None, decides("run")] = None
    """How often each pair is visited; may be a fraction. This or max_steps."""
    max_steps: Annotated[PositiveInt | None, decides("run")] = None
    """Updates of the weights. This or epochs."""
    rounds: Annotated[PositiveInt, decides("run")] = 1
    """How often, at most, training begins anew from the base with what the ledger has found so far:
    pairs that looked wrong stay closed, and are judged again. The last round is as long as epochs
    or max_steps say. It amplifies the majority's taste: `docs/rounds.md`."""
    round_epochs: Annotated[Positive | None, decides("run")] = None
    """Epochs of each round before the last; none: as long as the last."""
    rounds_carry: Annotated[Share, decides("run")] = 0.5
    """Share of its votes that the ledger keeps from round to round, or from `verdicts`: prior
    log-odds that a round's own votes may outweigh."""
    rounds_turn: Annotated[SomeShare | None, decides("run")] = None
    """Metric u from which on a round takes the pair with its label turned round instead of leaving
    it closed; at least 0.5; none: no label is ever turned. Needs rounds or verdicts."""
    rounds_settled: Annotated[Share, decides("run")] = 0.01
    """The next round is the last once fewer than this share of the verdicts has changed in one;
    0: only held-out accuracy, where it is measured, ends them earlier."""
    verdicts: Annotated[UserPath | None, decides("run")] = None
    """A finished run's folder, whose verdicts on the same pairs the first round begins with."""
    micro_batch_size: Annotated[PositiveInt, decides("run")] = 1
    """Pairs per process and forward pass."""
    accumulation_steps: Annotated[PositiveInt, decides("nothing")] = 1
    """Only its product with the number of processes matters, which a checkpoint compares."""
    precision: Annotated[Precision, decides("reference", "run")] = "bf16"
    """Autocast of the forward passes; trainable weights stay as `weights` says."""
    weights: Annotated[Literal["fp32", "bf16"], decides("run")] = "fp32"
    """Of full fine-tuning: fp32 master weights, or bf16, whose updates are computed in fp32 and
    rounded at random, on average exactly; 4 bytes less per weight and gradient. Gradients are
    summed over micro-batches in bf16 too: off by 1.3 % (rms) after 128, 2.7 % after 512."""
    quantize_base: Annotated[Literal["4bit", "8bit"] | None, decides("reference", "run")] = None
    """Of LoRA: stores the frozen weights of the denoiser's blocks in 4 or 8 bits (QLoRA), by
    bitsandbytes; the reference is the same base. Samples and evaluations take the whole weights."""
    deepspeed: Annotated[Name | None, decides("nothing")] = None
    """`zero1`, `zero2`, `zero3`, `zero2_offload`, `zero3_offload` or a DeepSpeed JSON file. None:
    plain data parallelism."""
    gradient_checkpointing: Annotated[bool, decides("run")] = False
    """Less memory for activations, for a second forward pass of each block."""
    attention: Annotated[Literal["sdpa", "flash", "xformers"], decides("reference", "run")] = "sdpa"
    """`sdpa`: torch chooses the kernel; `flash`: torch's flash kernel or an error; `xformers`."""
    channels_last: Annotated[bool, decides("run")] = False
    """The weights' memory format; convolutions on tensor cores like it."""
    backward: Annotated[Literal["all", "alive", "sampled"], decides("run")] = "all"
    """Which pairs get a backward pass. `alive`: those whose gradient is not exactly zero;
    `sampled`: of small gradients a part, drawn at random and weighed up, so that the mean stays."""
    backward_threshold: Annotated[Positive, decides("run")] = 0.5
    """Of `sampled`: a pair whose gradient scale c (1 where policy and reference agree) is below it
    is kept with probability c / threshold."""
    compile: Annotated[bool, decides("run")] = False
    """Compiles the transformer blocks by `torch.compile`; a reference or averages that share the
    policy's weights run without it."""
    sample_latents: Annotated[bool, decides("reference", "run")] = True
    """Latents are drawn from the VAE's posterior; else they are its mean."""
    empty_prompt_rate: Annotated[Chance, decides("reference", "run")] = 0.0
    """Share of the visits whose caption is dropped, the same for both sides of a pair."""
    empty_prompt: Annotated[Literal["pipeline", "encoded"], decides("reference", "run")] = (
        "pipeline"
    )
    """What a pair is conditioned on there. `pipeline`: what the pipeline samples its unconditional
    branch with, zeros where model_index.json sets force_zeros_for_empty_prompt (SDXL); encoded:
    always the empty prompt's embeddings, as the released trainers."""
    min_timestep: Annotated[Count, decides("reference", "run")] = 0
    """The first timestep that is drawn."""
    max_timestep: Annotated[PositiveInt | None, decides("reference", "run")] = None
    """Timesteps below it are drawn; none: the schedule's length."""
    timesteps: TimestepsConfig = UniformTimesteps()
    """How often each timestep of the range is drawn."""
    flow_shift: Annotated[Positive | None, decides("reference", "run")] = None
    """Of flow matching, `s -> shift s / (1 + (shift - 1) s)` moves the drawn factors of the noise
    toward noise; 1 leaves them. None: as the model's scheduler, which may go by the resolution."""
    guidance: Annotated[NotNegative | None, decides("reference", "run")] = None
    """The guidance scale that models distilled from guided predictions (FLUX.1-dev, FLUX.2-dev) are
    told while they train. None: 1, the model's own distribution."""
    snr_gamma: Annotated[Positive | None, decides("run")] = None
    """Min-SNR weighting (arXiv 2303.09556), usually 5: min(snr, gamma) / snr of the pair's timestep
    (v prediction: / (snr + 1)) multiplies the pair's loss, outside the log-sigmoid; None: 1. Not
    under flow matching."""
    ema_decay: Annotated[Fraction | None, decides("run")] = None
    """Decay of a moving average of the weights, which is exported as `ema/`."""
    checkpoint_every: Annotated[PositiveInt, decides("nothing")] = 500
    """Steps from one checkpoint to the next."""
    keep_checkpoints: Annotated[PositiveInt, decides("nothing")] = 2
    """How many checkpoints stay, the newest; others are removed."""
    held_out_every: Annotated[PositiveInt | None, decides("nothing")] = None
    """Steps from one measurement on the held-out pairs (`data.held_out`) to the next; none: as
    checkpoint_every. The last step has one too."""
    held_out_draws: Annotated[PositiveInt, decides("run")] = 1
    """Timesteps and noises of each held-out pair, the same at every measurement; a pair's margin is
    their mean."""
    keep_best: Annotated[bool, decides("nothing")] = False
    """Saves a checkpoint at every measurement with a higher held-out accuracy than all before,
    keeps the best one beside the newest, and exports it as `best/`."""
    early_stop: Annotated[PositiveInt | None, decides("nothing")] = None
    """The run ends after so many measurements in a row without a higher held-out accuracy."""
    sample_every: Annotated[PositiveInt | None, decides("nothing")] = None
    """Steps from one set of sample images to the next, base beside policy, as `evaluate` says but
    with one image a prompt; none: no images. Not with ZeRO-3, whose weights are shared out."""
    sample_prompts: Annotated[tuple[str, ...], decides("nothing")] = ()
    """What to sample while training; none: the first four of evaluate's prompts."""
    trackers: Annotated[tuple[Literal["tensorboard", "wandb"], ...], decides("nothing")] = (
        "tensorboard",
    )
    """Where metrics go besides metrics.jsonl."""
    loss_impl: Annotated[Literal["triton", "cpu", "reference"] | None, decides("run")] = None
    """Of the loss; none: `triton` where the tensors are on a GPU that it supports, else `cpu`."""
    loader_workers: Annotated[Count, decides("nothing")] = 2
    """Threads that read ahead; 0 reads when the step asks."""
    hang_timeout: Annotated[Positive, decides("nothing")] = 300.0
    """Seconds without progress of a process, or a sign of life, after which the others name it and
    end; six times as long while starting, compiling, saving."""

    @property
    def needs_reference(self) -> bool:
        """Whether the objective compares the policy with a frozen reference."""
        return self.objective.needs_reference

    @property
    def runs_reference(self) -> bool:
        """Whether training holds a reference model and runs it at each step."""
        return self.needs_reference and self.reference == "live"

    @property
    def reads_reference_errors(self) -> bool:
        """Whether the reference's errors are read from disk, so that none runs or is held."""
        return self.needs_reference and self.reference == "cached"

    @property
    def measures_every(self) -> int:
        """Steps from one measurement on held-out pairs to the next."""
        return self.held_out_every or self.checkpoint_every

    @property
    def ledger_min_visits(self) -> int:
        """Earlier visits that a pair needs before the ledger's metric counts."""
        ledger = self.annotators
        return ledger.min_visits if isinstance(ledger, LedgerAnnotators) else 1

    @property
    def batches_annotators(self) -> bool:
        """Whether one forward pass for all annotators is demanded, not only allowed."""
        return isinstance(self.annotators, EmaAnnotators) and self.annotators.batched is True

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("give exactly one of train.epochs and train.max_steps")
        _check_annotators(self)
        _check_rounds(self)
        if self.statistics == "running":
            self.objective.check_running()
        _check_used(self)
        _check_backward(self)
        _check_slope(self)
        _check_deepspeed(self)
        _check_weights(self)
        _check_timesteps(self)
        return self


def check_stage_3(config: TrainConfig) -> None:
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


def check_held_out(config: TrainConfig, share: float) -> None:
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


def check_lora_start(config: TrainConfig, lora: Path | None) -> None:
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


def _check_annotators(config: TrainConfig) -> None:
    """Refuses annotators that the objective or the method cannot use, and a gate without any.

    Without annotators a pair's margin alone gives u = 1/2 before the first update: behind a gate
    every weight, and with the weights the gradient, would be zero from then on.
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


def _check_rounds(config: TrainConfig) -> None:
    """Refuses rounds whose verdict nobody reads, and what a fresh start cannot do."""
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


def _check_used(config: TrainConfig) -> None:
    """Refuses adapters in full fine-tuning, and a cached reference where there is none."""
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


def _check_slope(config: TrainConfig) -> None:
    """Refuses a slope that depends on the margins where these are no logit."""
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


def _check_backward(config: TrainConfig) -> None:
    """Refuses a threshold that nobody reads, and dropout, whose mask no second pass repeats."""
    threshold = TrainConfig.model_fields["backward_threshold"].default
    if config.backward != "sampled" and config.backward_threshold != threshold:
        raise ValueError(
            f"train.backward_threshold is for train.backward: sampled, not {config.backward}"
        )
    if config.backward != "all" and config.lora.dropout > 0.0:
        raise ValueError(
            f"train.backward: {config.backward} decides by one forward pass and differentiates "
            "another, whose dropout would differ; use train.lora.dropout: 0, or train.backward: all"
        )


def _check_deepspeed(config: TrainConfig) -> None:
    """Refuses what DeepSpeed's engine would compute wrongly or not at all."""
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


def _check_weights(config: TrainConfig) -> None:
    """Refuses precisions and memory formats of the weights that do not work."""
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
        _check_quantized(config)
    if config.weights == "bf16" and (config.method, config.precision) != ("full", "bf16"):
        raise ValueError(
            "train.weights: bf16 is for train.method: full with train.precision: bf16; "
            "adapters are always trained in fp32"
        )


def _check_quantized(config: TrainConfig) -> None:
    """Refuses what a base in few bits does not go with."""
    if config.method != "lora":
        raise ValueError("train.quantize_base is for train.method: lora; whole weights are trained")
    for key, used in (
        ("train.deepspeed", config.deepspeed is not None),
        ("train.lora.use_dora", config.lora.use_dora),
        ("train.compile", config.compile),
    ):
        if used:
            raise ValueError(f"train.quantize_base does not work with {key}; leave one of them out")


def _check_timesteps(config: TrainConfig) -> None:
    """Refuses an empty range of timesteps, and a range beside a list."""
    if config.max_timestep is not None and config.max_timestep <= config.min_timestep:
        raise ValueError("train.max_timestep must be greater than train.min_timestep")
    ranged = config.min_timestep or config.max_timestep is not None
    if ranged and isinstance(config.timesteps, ListTimesteps | SigmaTimesteps):
        raise ValueError(
            "train.timesteps: a list is the whole choice; leave train.min_timestep and "
            "train.max_timestep out"
        )
