"""Typed configuration: one frozen model per stage, read from YAML, changed by `--set a.b=c`.

Unknown or ill-typed keys are refused with the key's full name and the nearest valid one. The
resolved configuration is saved into the run folder and into every checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from fastpo.config.checks import check_deepspeed, check_gate, check_running, check_used
from fastpo.config.fields import (
    Count,
    Decay,
    Name,
    NotNegative,
    Positive,
    PositiveInt,
    Precision,
    Rate,
    Real,
    Section,
    Seed,
    Whole,
)
from fastpo.config.messages import explain
from fastpo.config.objectives import AdaptiveOptions, ObjectiveConfig
from fastpo.config.timesteps import ListTimesteps, TimestepsConfig, UniformTimesteps
from fastpo.errors import ConfigError


class ModelConfig(Section):
    """The diffusers pipeline to align: a local folder or a hub id, SD1.5 or SDXL."""

    path: Name
    revision: str | None = None  # branch, tag or commit of a hub id
    variant: str | None = None
    vae: str | None = None  # another VAE folder or hub id, e.g. an fp16-safe one


class DataConfig(Section):
    """The preference data and its labels."""

    source: Literal["pickapic", "hpdv2", "pickstyle", "picksafety", "folder"]
    path: Name  # local folder or hub id
    split: Name = "train"
    limit: PositiveInt | None = None
    flip_rate: Rate = 0.0
    flip_seed: Count = 0  # which labels flip_rate exchanges


class PrepareConfig(Section):
    """How images and prompts become the cache."""

    cache_dir: Path
    resolution: Annotated[Whole, Field(ge=8)] = 1024
    buckets: bool = True  # aspect-ratio buckets of about resolution² pixels; else one square
    batch_size: PositiveInt = 8
    vae_precision: Precision = "fp32"
    text_precision: Precision = "fp32"
    store_precision: Precision = "fp16"
    shard_size: PositiveInt = 1024  # pairs per shard
    workers: Count = 2


class LoraConfig(Section):
    """Low-rank adapters on the UNet's attention."""

    rank: PositiveInt = 8
    alpha: Positive = 8.0
    dropout: Decay = 0.0  # of the adapters' inputs, below 1; judges run without it
    # how the names of the adapted layers end; these are the attention's projections
    target_modules: tuple[str, ...] = ("to_k", "to_q", "to_v", "to_out.0")


class EmaAnnotators(Section):
    """Moving averages of the trainable weights judge the same noisy pair (as released)."""

    kind: Literal["ema"]
    decays: Annotated[tuple[Decay, ...], Field(min_length=1)] = (0.9999, 0.5)
    warmup_steps: Count = 2  # optimiser steps in which nothing is judged
    batched: bool | Literal["auto"] = "auto"  # one forward with the reference (LoRA only)


class LedgerAnnotators(Section):
    """The pair's own past margins judge it; costs no forward pass."""

    kind: Literal["ledger"]
    min_visits: PositiveInt = 1  # earlier visits a pair needs before it is judged


AnnotatorsConfig = Annotated[EmaAnnotators | LedgerAnnotators, Field(discriminator="kind")]


class OptimConfig(Section):
    """Optimiser, schedule and clipping."""

    # adamw_8bit: moments in 8 bits, by bitsandbytes (pip install fastpo[8bit])
    name: Literal["adamw", "adamw_8bit", "adafactor"] = "adamw"
    lr: Positive = 1e-5
    betas: tuple[Decay, Decay] = (0.9, 0.999)  # adamw and adamw_8bit
    eps: Positive = 1e-8  # likewise
    weight_decay: NotNegative = 1e-2
    schedule: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant_with_warmup"
    warmup_steps: Count = 0
    max_grad_norm: Positive = 1.0  # of all gradients together; longer ones are shortened to it

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


class TrainConfig(Section):
    """The run."""

    output_dir: Path
    method: Literal["lora", "full"] = "lora"
    lora: LoraConfig = LoraConfig()
    objective: ObjectiveConfig
    annotators: AnnotatorsConfig | None = None
    # Over which pairs KTO's baseline, SDPO's factor, Adaptive-DPO's mean and scales run.
    statistics: Literal["micro_batch", "processes", "running"] = "processes"
    # cached: its errors come from `fastpo prepare CONFIG --reference K`, no reference model is held
    reference: Literal["live", "cached"] = "live"
    optim: OptimConfig = OptimConfig()
    epochs: Positive | None = None
    max_steps: PositiveInt | None = None
    micro_batch_size: PositiveInt = 1  # pairs per process and forward pass
    accumulation_steps: PositiveInt = 1
    precision: Precision = "bf16"
    # Of full fine-tuning: fp32 master weights, or bf16, whose updates are computed in fp32 and
    # rounded at random, on average exactly; 4 bytes less per weight and gradient. Gradients are
    # summed over micro-batches in bf16 too: off by 1.3 % (rms) after 128, 2.7 % after 512
    weights: Literal["fp32", "bf16"] = "fp32"
    # zero1 | zero2 | zero3 | zero2_offload | zero3_offload | a DeepSpeed JSON file; else plain DDP
    deepspeed: Name | None = None
    gradient_checkpointing: bool = False
    # sdpa: torch chooses the kernel; flash: torch's flash kernel or an error; xformers
    attention: Literal["sdpa", "flash", "xformers"] = "sdpa"
    channels_last: bool = False  # the weights' memory format; convolutions on tensor cores like it
    # torch.compile of the transformer blocks; a reference or averages that share the policy's
    # weights run without it
    compile: bool = False
    sample_latents: bool = True  # draw from the VAE's posterior; else its mean
    empty_prompt_rate: Rate = 0.0  # of the visits, the same for both sides of a pair
    min_timestep: Count = 0  # the first that is drawn
    max_timestep: PositiveInt | None = None  # exclusive; default: the schedule's length
    timesteps: TimestepsConfig = UniformTimesteps()  # how often each of the range is drawn
    # min-SNR weighting (arXiv 2303.09556), usually 5: min(snr, gamma) / snr of the pair's timestep
    # (v prediction: / (snr + 1)) multiplies the pair's loss, outside the log-sigmoid; None: 1
    snr_gamma: Positive | None = None
    ema_decay: Annotated[Real, Field(gt=0.0, lt=1.0)] | None = None  # exported moving average
    checkpoint_every: PositiveInt = 500
    keep_checkpoints: PositiveInt = 2  # the newest ones; older ones are removed
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    # None: triton where the tensors are on a GPU that it supports
    loss_impl: Literal["triton", "reference"] | None = None
    loader_workers: Count = 2  # threads that read ahead; 0 reads when the step asks

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("give exactly one of train.epochs and train.max_steps")
        if self.annotators is not None and not isinstance(self.objective, AdaptiveOptions):
            raise ValueError(
                f"train.annotators is used by adaptive_dpo and adaptive_ipo only, "
                f"not by {self.objective.name}"
            )
        if self.statistics == "running":
            check_running(self.objective)
        if self.method == "full" and getattr(self.annotators, "batched", False) is True:
            raise ValueError("train.annotators.batched: true needs train.method: lora")
        check_gate(self)
        check_used(self)
        check_deepspeed(self)
        if self.max_timestep is not None and self.max_timestep <= self.min_timestep:
            raise ValueError("train.max_timestep must be greater than train.min_timestep")
        master = (self.method, self.weights) == ("full", "fp32")
        if self.channels_last and master and self.optim.name == "adamw_8bit":
            raise ValueError(
                "train.channels_last: adamw_8bit would turn fp32 weights back to the contiguous "
                "format; use train.weights: bf16, or another train.optim.name"
            )
        if self.weights == "bf16" and (self.method, self.precision) != ("full", "bf16"):
            raise ValueError(
                "train.weights: bf16 is for train.method: full with train.precision: bf16; "
                "adapters are always trained in fp32"
            )
        ranged = self.min_timestep or self.max_timestep is not None
        if ranged and isinstance(self.timesteps, ListTimesteps):
            raise ValueError(
                "train.timesteps: a list is the whole choice; leave train.min_timestep and "
                "train.max_timestep out"
            )
        return self


class EvaluateConfig(Section):
    """What is sampled from the base and from the aligned model, and who judges it."""

    prompts: tuple[str, ...] = ()
    prompts_file: Path | None = None  # one prompt per line, after those above
    seeds_per_prompt: PositiveInt = 4
    first_seed: Count = 0
    num_inference_steps: PositiveInt = 30
    guidance_scale: NotNegative = 5.0
    height: PositiveInt | None = None  # default: prepare.resolution
    width: PositiveInt | None = None
    batch_size: PositiveInt = 4
    precision: Precision = "fp32"
    scorers: tuple[str, ...] = ()  # names from `fastpo.evaluate.scorers`
    confidence: Annotated[Real, Field(gt=0.0, lt=1.0)] = 0.95  # of the win rates' intervals


class Config(Section):
    """A whole experiment."""

    seed: Seed = 0
    model: ModelConfig
    data: DataConfig
    prepare: PrepareConfig
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies `key.path=value` overrides (values are parsed as YAML).

    Raises:
        ConfigError: The file is missing or not a mapping, an override has no `=`, or a key stands
            there twice, is unknown, ill-typed or out of range; the text names the key and the
            nearest valid one.
    """
    try:
        raw = _read_yaml(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"config file not found: {path}") from None
    except IsADirectoryError:
        raise ConfigError(f"expected a YAML file, got a folder: {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, got {type(raw).__name__}")
    for text in overrides:
        _override(raw, text)
    return parse_config(raw, where=str(path))


def parse_config(raw: dict[str, Any], where: str = "config") -> Config:
    """Validates a nested mapping; `where` stands in front of every complaint."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        lines = [explain(e, Config) for e in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(dict.fromkeys(lines))) from None


def dump_config(config: Config) -> str:
    """Returns the resolved configuration as YAML; `load_config` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _override(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set takes key.path=value, got {text!r}")
    *parents, leaf = key.strip().split(".")
    node = raw
    for parent in parents:
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"--set {text}: {parent!r} is a value, not a section")
        node = child
    try:
        node[leaf] = _number(_read_yaml(value)) if value else None
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text}: the value is not valid YAML: {error}") from None


class _Loader(yaml.SafeLoader):
    """YAML in which a key may stand once: of two, the first would be ignored silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Builds one mapping.

        Raises:
            YAMLError: A key stands in it twice.
        """
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise yaml.YAMLError(f"line {line}: the key {key.value} stands there twice")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


def _number(value: Any) -> Any:
    """Reads `1e-5`, which YAML 1.1 takes for text, as the number everybody means."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
