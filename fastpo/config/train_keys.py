"""The training's keys; `fastpo.config.train` says which of them do not go together."""

from __future__ import annotations

from typing import Annotated, Literal

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
from fastpo.config.objectives import ObjectiveConfig
from fastpo.config.sections import (
    AnnotatorsConfig,
    EmaAnnotators,
    LedgerAnnotators,
    LoraConfig,
    OptimConfig,
)
from fastpo.config.timesteps import (
    TimestepsConfig,
    UniformTimesteps,
)


class TrainKeys(Section):
    """The training's keys."""

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
    geometric mean of their sizes by tenths of the schedule, over that of all tenths. So no timestep
    saturates before others (arXiv 2505.18736)."""
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
    rounds_draws: Annotated[Literal["new", "same"], decides("run")] = "new"
    """`same`: each round takes the first one's batches, timesteps and noise again, so that cached
    reference errors of one round serve all of them; `new`: each has its own."""
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
    gradient_checkpointing: Annotated[bool | Literal["offload"], decides("run")] = False
    """Less memory for activations, for a second forward pass of each block. `offload`: what is kept
    of each block for it, its inputs, waits in host memory. No result changes, so a run may resume
    with another value; under `compile` and `backward: alive` or `sampled` by --change alone."""
    attention: Annotated[Literal["sdpa", "flash", "xformers"], decides("reference", "run")] = "sdpa"
    """`sdpa`: torch chooses the kernel; `flash`: torch's flash kernel or an error; `xformers`."""
    channels_last: Annotated[bool, decides("run")] = False
    """The weights' memory format; convolutions on tensor cores like it."""
    backward: Annotated[Literal["all", "alive", "sampled"], decides("run")] = "all"
    """Which pairs get a backward pass. `alive`: those whose gradient is not exactly zero;
    `sampled`: of small gradients a part, drawn at random and weighed up, so that the mean stays."""
    backward_threshold: Annotated[Positive, decides("run")] = 0.2
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
