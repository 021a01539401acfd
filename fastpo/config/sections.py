"""The sections of model, preparation and evaluation, and parts of the training's."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fastpo.config.fields import (
    Count,
    Decay,
    Fraction,
    Name,
    NotNegative,
    Positive,
    PositiveInt,
    Precision,
    Section,
    UserPath,
    Whole,
    decides,
)

Schedule = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
]
CONSTANT_SCHEDULES = ("constant", "constant_with_warmup")
ATTENTION_PROJECTIONS = ("to_k", "to_q", "to_v", "to_out.0")


class ModelConfig(Section):
    """The model to align, SD1.5 or SDXL: a diffusers folder, a hub id, or a single file."""

    path: Annotated[Name, decides("cache", "reference", "run", "images")]
    """A diffusers folder, the id of a repository on the Hugging Face hub, a checkpoint in one
    `.safetensors` file, or `RUN/final` of a run that trained the whole model."""
    lora: Annotated[UserPath | None, decides("run")] = None
    """An earlier LoRA that training goes on with: `RUN/final`, or a file of diffusers, peft or
    kohya, with the layers, ranks and alphas of `train.lora`. The reference stays the base."""
    config: Annotated[str | None, decides("cache", "reference", "run", "images")] = None
    """Of a checkpoint in one file, which holds weights alone: the diffusers folder or hub id that
    gives configurations, tokenizers and scheduler."""
    revision: Annotated[str | None, decides("cache", "reference", "run", "images")] = None
    """Branch, tag or commit of a hub id."""
    variant: Annotated[str | None, decides("cache", "reference", "run", "images")] = None
    """Which weight files to read, e.g. fp16 for `*.fp16.safetensors`."""
    vae: Annotated[str | None, decides("cache", "reference", "run", "images")] = None
    """Another VAE folder, `.safetensors` file or hub id, e.g. an fp16-safe one."""


class PrepareConfig(Section):
    """How images and prompts become the cache."""

    cache_dir: Annotated[UserPath, decides("nothing")]
    """The folder of the cache; runs with the same data and model share it."""
    resolution: Annotated[Whole, Field(ge=8), decides("cache", "run", "images")] = 1024
    """Side of a square of as many pixels as an image is resized to."""
    buckets: Annotated[bool, decides("cache", "run")] = True
    """Aspect-ratio buckets of about resolution² pixels; else one square."""
    batch_size: Annotated[PositiveInt, decides("nothing")] = 8
    """Images in one pass of the VAE."""
    vae_precision: Annotated[Precision, decides("cache", "run")] = "fp32"
    """SDXL's own VAE overflows in fp16."""
    text_precision: Annotated[Precision, decides("cache", "run")] = "fp32"
    """Precision in which the text encoders run."""
    store_precision: Annotated[Precision, decides("cache", "run")] = "fp16"
    """Precision of what the cache holds."""
    prompt_chunks: Annotated[PositiveInt, decides("cache", "run", "images")] = 1
    """How many chunks of the text encoders' length each prompt is encoded in, one after the other;
    what is longer is cut, and counted. With 1, as the pipelines do, 75 tokens remain."""
    clip_skip: Annotated[Count, decides("cache", "run", "images")] = 0
    """How many of the text encoders' last layers are left out, counted as diffusers does: 1 is
    A1111's `Clip skip: 2`. SDXL leaves one out by itself, and this many more."""
    text_length: Annotated[
        PositiveInt | None, Field(le=4096), decides("cache", "run", "images")
    ] = None
    """Tokens of each prompt for the text encoders of flow-matching models, beside CLIP's; what is
    longer is cut, and counted. None: as the model's pipeline."""
    shard_size: Annotated[PositiveInt, decides("run")] = 1024
    """Pairs per shard."""
    reuse: Annotated[UserPath | None, decides("nothing")] = None
    """An earlier cache: pairs of the same two images and prompts of the same text are copied from
    it instead of encoded. For data that grew or changed, with a new `prepare.cache_dir`."""
    workers: Annotated[Count, decides("nothing")] = 2
    """Processes that decode images; 0 decodes them in the command's own."""


class LoraConfig(Section):
    """Low-rank adapters on the denoiser's attention."""

    rank: Annotated[PositiveInt, decides("run")] = 8
    """Rank of the adapters' matrices."""
    alpha: Annotated[Positive, decides("run")] = 8.0
    """The adapters' output is multiplied by alpha / rank."""
    dropout: Annotated[Decay, decides("run")] = 0.0
    """Dropout of the adapters' inputs; annotators run without it."""
    target_modules: Annotated[tuple[str, ...], decides("run")] = ATTENTION_PROJECTIONS
    """How the names of the adapted layers end; these are the attention's projections."""
    rank_pattern: Annotated[dict[str, PositiveInt], decides("run")] = Field(default_factory=dict)
    """Other ranks, by how names of layers end (or a regular expression), as peft reads it:
    `{attn2.to_k: 16}`."""
    alpha_pattern: Annotated[dict[str, Positive], decides("run")] = Field(default_factory=dict)
    """Other alphas, likewise; a layer of another rank keeps alpha unless it is named here too."""
    use_rslora: Annotated[bool, decides("run")] = False
    """Multiplies by alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732)."""
    use_dora: Annotated[bool, decides("run")] = False
    """Trains a magnitude of each output beside its direction (DoRA, arXiv 2402.09353); slower."""


class EmaAnnotators(Section):
    """Moving averages of the trainable weights vote on the same noisy pair (as released)."""

    kind: Annotated[Literal["ema"], decides("run")]
    decays: Annotated[tuple[Decay, ...], Field(min_length=1), decides("run")] = (0.9999, 0.5)
    """One moving average each."""
    warmup_steps: Annotated[Count, decides("run")] = 2
    """Optimizer steps before the averages vote."""
    batched: Annotated[bool | Literal["auto"], decides("run")] = "auto"
    """One forward pass with the reference (LoRA only)."""


class LedgerAnnotators(Section):
    """The pair's own past margins vote; costs no forward pass."""

    kind: Annotated[Literal["ledger"], decides("run")]
    min_visits: Annotated[PositiveInt, decides("run")] = 1
    """Earlier visits that a pair needs before its margins count."""


AnnotatorsConfig = Annotated[EmaAnnotators | LedgerAnnotators, Field(discriminator="kind")]


class OptimConfig(Section):
    """Optimizer, schedule and clipping."""

    name: Annotated[
        Literal["adamw", "adamw_8bit", "adafactor", "prodigy", "lion", "schedule_free"],
        decides("run"),
    ] = "adamw"
    """`adamw_8bit` keeps moments in 8 bits, by bitsandbytes (`pip install fastpo[8bit]`); on a
    GPU: results on a CPU mean nothing. `prodigy` finds the rate, of which lr is a factor, usually
    1; `lion` takes about a tenth of AdamW's rate; `schedule_free` is AdamW with averaged weights
    and needs no schedule (the three by `pip install fastpo[optim]`)."""
    lr: Annotated[Positive, Field(le=1.0), decides("run")] = 1e-5
    """Learning rate after the warm-up."""
    betas: Annotated[tuple[Decay, Decay], decides("run")] = (0.9, 0.999)
    """Decay of the gradient's and its square's averages; adafactor has none."""
    eps: Annotated[Positive, decides("run")] = 1e-8
    """Added to the square root of the second; adafactor has none."""
    weight_decay: Annotated[NotNegative, decides("run")] = 1e-2
    """Weight decay, decoupled from the gradient as in AdamW."""
    schedule: Annotated[Schedule, decides("run")] = "constant_with_warmup"
    """Schedule of the learning rate, by diffusers' names; it ends with the run."""
    warmup_steps: Annotated[Count, decides("run")] = 0
    """Updates over which the rate grows from 0."""
    max_grad_norm: Annotated[Positive, decides("run")] = 1.0
    """Norm of all gradients together; longer ones are shortened to it."""

    @model_validator(mode="after")
    def _check(self) -> OptimConfig:
        if self.schedule == "constant" and self.warmup_steps:
            raise ValueError(
                "train.optim.schedule: constant has no warm-up; use constant_with_warmup, "
                "or leave train.optim.warmup_steps out"
            )
        if self.name == "prodigy" and self.lr < 0.01:
            raise ValueError(
                f"train.optim.lr: prodigy finds the rate, and lr is a factor of it: set 1.0, not "
                f"{self.lr:g}"
            )
        if self.name == "schedule_free" and self.schedule not in CONSTANT_SCHEDULES:
            raise ValueError(
                f"train.optim.schedule: schedule_free averages weights instead of a falling rate, "
                f"not with {self.schedule}; use {' or '.join(CONSTANT_SCHEDULES)}"
            )
        if self.schedule == "polynomial" and self.lr <= 1e-7:
            raise ValueError("train.optim.lr must exceed 1e-7, where schedule polynomial ends")
        return self


class EvaluateConfig(Section):
    """What is sampled from the base and from the aligned model, and how it is scored."""

    prompts: Annotated[tuple[str, ...], decides("images")] = ()
    """What to sample; none of them should be in the training data."""
    prompts_file: Annotated[UserPath | None, decides("images")] = None
    """One prompt per line, after those above; a `.jsonl` file has objects with `prompt` and, for
    models that edit, the path of the `source` image, such as a data set's `pairs.jsonl`."""
    prompt_sets: Annotated[tuple[str, ...], decides("images")] = ()
    """Published prompts: `pickapic`, `parti`, `hpdv2`, `geneval`, or `lines` for a text file, each
    with its file or folder after a colon."""
    prompts_per_set: Annotated[PositiveInt | None, decides("images")] = None
    """How many of each set's first prompts to take, of `hpdv2` of each style; none: all."""
    seeds_per_prompt: Annotated[PositiveInt, decides("images")] = 4
    """Images of each prompt."""
    first_seed: Annotated[Count, decides("images")] = 0
    """Seeds count up from here."""
    num_inference_steps: Annotated[PositiveInt, decides("images")] = 30
    """Steps of the pipeline's scheduler."""
    guidance_scale: Annotated[NotNegative, decides("images")] = 5.0
    """Scale of classifier-free guidance."""
    height: Annotated[PositiveInt | None, decides("images")] = None
    """Height in pixels; none: `prepare.resolution`."""
    width: Annotated[PositiveInt | None, decides("images")] = None
    """Width in pixels; none: `prepare.resolution`."""
    batch_size: Annotated[PositiveInt, decides("nothing")] = 4
    """Images sampled at once."""
    precision: Annotated[Precision, decides("images")] = "fp32"
    """Precision in which the pipeline samples."""
    scorers: Annotated[tuple[str, ...], decides("nothing")] = ()
    """What rates the images: `pickscore`, `hpsv2`, `hpsv2.1`, `hpsv3`, `imagereward`, `clip`,
    `aesthetic`, `clip_iqa`, `diversity`; after a colon the weights' folder, file or hub id."""
    score_batch_size: Annotated[PositiveInt, decides("nothing")] = 16
    """Images that a scorer rates at once."""
    score_precision: Annotated[Precision, decides("nothing")] = "fp32"
    """Precision of the scorers' networks."""
    confidence: Annotated[Fraction, decides("nothing")] = 0.95
    """Confidence of the win rates' intervals."""
