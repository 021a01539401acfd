"""The sections of the experiment but training: model, data, preparation, evaluation; and parts."""

from __future__ import annotations

from pathlib import Path
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
    Rate,
    Section,
    Whole,
    decides,
)

Schedule = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
]
Verify = Literal["always", "first", "never"]
ATTENTION_PROJECTIONS = ("to_k", "to_q", "to_v", "to_out.0")


class ModelConfig(Section):
    """The diffusers pipeline to align: a local folder or a hub id, SD1.5 or SDXL."""

    path: Annotated[Name, decides("cache", "reference", "run", "images")]
    # branch, tag or commit of a hub id
    revision: Annotated[str | None, decides("cache", "reference", "run", "images")] = None
    variant: Annotated[str | None, decides("cache", "reference", "run", "images")] = None
    # another VAE folder or hub id, e.g. an fp16-safe one
    vae: Annotated[str | None, decides("cache", "reference", "run", "images")] = None


class DataConfig(Section):
    """The preference data and its labels."""

    source: Annotated[
        Literal["pickapic", "hpdv2", "pickstyle", "picksafety", "folder"], decides("cache", "run")
    ]
    path: Annotated[Name, decides("cache", "run")]  # local folder or hub id
    split: Annotated[Name, decides("cache", "run")] = "train"
    limit: Annotated[PositiveInt | None, decides("cache", "run")] = None
    # share of the labels that are exchanged on purpose, to study noisy labels
    flip_rate: Annotated[Rate, decides("reference", "run")] = 0.0
    flip_seed: Annotated[Count, decides("reference", "run")] = 0  # which labels these are
    # whether a listing may name images outside of data.path, by its text or by links
    allow_outside: Annotated[bool, decides("nothing")] = False
    # when prepared files are checked: a row when it is first read, all at the start, or sizes alone
    verify: Annotated[Verify, decides("nothing")] = "first"


class PrepareConfig(Section):
    """How images and prompts become the cache."""

    cache_dir: Annotated[Path, decides("nothing")]
    resolution: Annotated[Whole, Field(ge=8), decides("cache", "run", "images")] = 1024
    # aspect-ratio buckets of about resolution² pixels; else one square
    buckets: Annotated[bool, decides("cache", "run")] = True
    batch_size: Annotated[PositiveInt, decides("nothing")] = 8
    vae_precision: Annotated[Precision, decides("cache", "run")] = "fp32"
    text_precision: Annotated[Precision, decides("cache", "run")] = "fp32"
    store_precision: Annotated[Precision, decides("cache", "run")] = "fp16"
    shard_size: Annotated[PositiveInt, decides("run")] = 1024  # pairs per shard
    workers: Annotated[Count, decides("nothing")] = 2


class LoraConfig(Section):
    """Low-rank adapters on the denoiser's attention."""

    rank: Annotated[PositiveInt, decides("run")] = 8
    alpha: Annotated[Positive, decides("run")] = 8.0
    # of the adapters' inputs, below 1; annotators run without it
    dropout: Annotated[Decay, decides("run")] = 0.0
    # how the names of the adapted layers end; these are the attention's projections
    target_modules: Annotated[tuple[str, ...], decides("run")] = ATTENTION_PROJECTIONS


class EmaAnnotators(Section):
    """Moving averages of the trainable weights vote on the same noisy pair (as released)."""

    kind: Annotated[Literal["ema"], decides("run")]
    decays: Annotated[tuple[Decay, ...], Field(min_length=1), decides("run")] = (0.9999, 0.5)
    # optimizer steps before the averages vote
    warmup_steps: Annotated[Count, decides("run")] = 2
    # one forward pass with the reference (LoRA only)
    batched: Annotated[bool | Literal["auto"], decides("run")] = "auto"


class LedgerAnnotators(Section):
    """The pair's own past margins vote; costs no forward pass."""

    kind: Annotated[Literal["ledger"], decides("run")]
    # earlier visits that a pair needs before its margins count
    min_visits: Annotated[PositiveInt, decides("run")] = 1


AnnotatorsConfig = Annotated[EmaAnnotators | LedgerAnnotators, Field(discriminator="kind")]


class OptimConfig(Section):
    """Optimizer, schedule and clipping."""

    # adamw_8bit: moments in 8 bits, by bitsandbytes (pip install fastpo[8bit])
    name: Annotated[Literal["adamw", "adamw_8bit", "adafactor"], decides("run")] = "adamw"
    lr: Annotated[Positive, decides("run")] = 1e-5
    betas: Annotated[tuple[Decay, Decay], decides("run")] = (0.9, 0.999)  # not of adafactor
    eps: Annotated[Positive, decides("run")] = 1e-8  # not of adafactor
    weight_decay: Annotated[NotNegative, decides("run")] = 1e-2
    schedule: Annotated[Schedule, decides("run")] = "constant_with_warmup"
    warmup_steps: Annotated[Count, decides("run")] = 0
    # of all gradients together; longer ones are shortened to it
    max_grad_norm: Annotated[Positive, decides("run")] = 1.0

    @model_validator(mode="after")
    def _check(self) -> OptimConfig:
        if self.schedule == "constant" and self.warmup_steps:
            raise ValueError(
                "train.optim.schedule: constant has no warm-up; use constant_with_warmup, "
                "or leave train.optim.warmup_steps out"
            )
        if self.schedule == "polynomial" and self.lr <= 1e-7:
            raise ValueError("train.optim.lr must exceed 1e-7, where schedule polynomial ends")
        return self


class EvaluateConfig(Section):
    """What is sampled from the base and from the aligned model, and how it is scored."""

    prompts: Annotated[tuple[str, ...], decides("images")] = ()
    # one prompt per line, after those above
    prompts_file: Annotated[Path | None, decides("images")] = None
    seeds_per_prompt: Annotated[PositiveInt, decides("images")] = 4
    first_seed: Annotated[Count, decides("images")] = 0
    num_inference_steps: Annotated[PositiveInt, decides("images")] = 30
    guidance_scale: Annotated[NotNegative, decides("images")] = 5.0
    # pixels; default: prepare.resolution
    height: Annotated[PositiveInt | None, decides("images")] = None
    width: Annotated[PositiveInt | None, decides("images")] = None
    batch_size: Annotated[PositiveInt, decides("nothing")] = 4
    precision: Annotated[Precision, decides("images")] = "fp32"
    # names from `fastpo.evaluate.scorers`
    scorers: Annotated[tuple[str, ...], decides("nothing")] = ()
    confidence: Annotated[Fraction, decides("nothing")] = 0.95  # of the win rates' intervals
