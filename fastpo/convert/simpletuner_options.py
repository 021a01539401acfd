"""SimpleTuner's options: how they are read, and what becomes of each one alone."""

from __future__ import annotations

import json
import shlex
from typing import Any

from fastpo.config.load import parse_yaml
from fastpo.convert.launch import read_options
from fastpo.convert.rules import Rule, names, number, numbers, positive, read_value, whole
from fastpo.convert.scripts import PRECISIONS
from fastpo.errors import ConfigError, one_line

NAME = "simpletuner"
FAMILIES: dict[str, dict[str, str]] = {
    "sd1x": {
        "1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "1.4": "CompVis/stable-diffusion-v1-4",
        "dreamshaper": "Lykon/dreamshaper-8",
    },
    "sdxl": {"base-1.0": "stabilityai/stable-diffusion-xl-base-1.0"},
    "sd3": {
        "medium": "stabilityai/stable-diffusion-3.5-medium",
        "large": "stabilityai/stable-diffusion-3.5-large",
    },
    "flux": {
        "krea": "black-forest-labs/FLUX.1-Krea-dev",
        "dev": "black-forest-labs/FLUX.1-dev",
    },
    "flux2": {
        "klein-9b": "black-forest-labs/FLUX.2-klein-base-9B",
        "klein-4b": "black-forest-labs/FLUX.2-klein-base-4B",
        "dev": "black-forest-labs/FLUX.2-dev",
    },
    "qwen_image": {"v2.0": "Qwen/Qwen-Image-2512", "v1.0": "Qwen/Qwen-Image"},
    "z_image": {"base": "Tongyi-MAI/Z-Image"},
    "sana": {
        "sana1.5-4.8b-1024": "Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers",
        "sana1.5-1.6b-1024": "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers",
        "sana1.0-1.6b-1024": "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
    },
}
"""Its families that FastPO trains, and of each the flavors; those named in `DEFAULT_FLAVORS` are
taken where the configuration names none."""
DEFAULT_FLAVORS = {
    **{"sd1x": "dreamshaper", "sdxl": "base-1.0", "sd3": "medium", "flux": "krea"},
    **{"flux2": "klein-9b", "qwen_image": "v2.0", "z_image": "turbo-ostris-v2"},
    "sana": "sana1.5-4.8b-1024",
}
LATENTS = {"sana": (32, 32), "flux2": (32, 8)}
"""Channels of a latent, and pixels on a side of each of its elements; of all others 16 and 8."""
OPTIMIZERS = {
    **dict.fromkeys(("adamw_bf16", "torch-adamw", "optimi-adamw", "bnb-adamw"), "adamw"),
    **dict.fromkeys(("bnb-adamw8bit", "ao-adamw8bit"), "adamw_8bit"),
    **dict.fromkeys(("optimi-lion", "bnb-lion"), "lion"),
    **{"torch-adafactor": "adafactor", "prodigy": "prodigy", "adamw_schedulefree": "schedule_free"},
}
FLUX2_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj")
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "polynomial")
BITS = {"int8": "8bit", "int4": "4bit", "nf4": "4bit"}
"""Beginnings of `base_model_precision`, and what stands for them here."""
ENVIRONMENT = {
    "TRAINING_SEED": "seed",
    "DATALOADER_CONFIG": "data_backend_config",
    "MAX_NUM_STEPS": "max_train_steps",
    "NUM_EPOCHS": "num_train_epochs",
    "CHECKPOINTING_STEPS": "checkpoint_step_interval",
    "CHECKPOINTING_LIMIT": "checkpoints_total_limit",
    "HUB_MODEL_NAME": "hub_model_id",
    "MODEL_NAME": "pretrained_model_name_or_path",
    "USE_GRADIENT_CHECKPOINTING": "gradient_checkpointing",
    "RESUME_CHECKPOINT": "resume_from_checkpoint",
    "VALIDATION_STEPS": "validation_step_interval",
    "LR_SCHEDULE": "lr_scheduler",
    "MINIMUM_RESOLUTION": "minimum_image_size",
    "PUSH_CHECKPOINTS": "push_checkpoints_to_hub",
    "USE_XFORMERS": "enable_xformers_memory_efficient_attention",
    "TRAINING_NUM_PROCESSES": "num_processes",
    "TRAINING_NUM_MACHINES": "num_machines",
    "TRAINING_DYNAMO_BACKEND": "dynamo_backend",
    "ACCELERATE_CONFIG_PATH": "accelerate_config",
}
"""Variables of `config.env` that are not an option's name in capitals."""
ASIDE = (
    *("validation_", "num_eval_", "eval_", "hub_", "push_", "tracker_", "webhook_", "model_card_"),
    *("publishing_", "sdnq_", "quantize_", "ramtorch", "group_offload", "musubi_", "offload_"),
    *("enable_group_offload", "gradient_checkpointing_", "vae_", "text_cache_", "metadata_"),
    *("read_batch", "write_batch", "image_processing", "aws_", "disable_", "delete_", "skip_"),
)
"""Beginnings of options for what happens beside the training: memory, disk, hub, validation."""
NOTHING = (
    *(
        "flow_timesteps_mode",
        "prediction_type",
        "accelerate_config",
        "tracker_run_name",
        "allow_tf32",
        "ema_device",
        "ema_update_interval",
    ),
    *("logging_dir", "lycoris_config", "compress_disk_cache", "minimum_image_size"),
    *("aspect_bucket_rounding", "num_machines", "strict_epoch_limit", "text_encoder_batch_size"),
    *("base_model_default_dtype", "dynamo_backend", "fuse_qkv_projections", "lr_end"),
    *("accelerator_cache_clear_interval", "torch_num_threads"),
)
"""Options that change no result."""


def read_mapping(text: str) -> dict[str, Any]:
    """Reads a mapping in YAML, which JSON is."""
    found = parse_yaml(text)
    if not isinstance(found, dict):
        raise ValueError("no mapping")
    return found


_SLOPE = ("train.objective.beta", "train.auto_slope")
_BETAS = Rule(read=number, sets=("train.optim.betas",))
_LENGTH = Rule(read=whole, sets=("train.max_steps", "train.epochs"))
_SIZE = Rule(
    read=positive,
    sets=("prepare.resolution", "train.objective.beta"),
    about="beta by the elements of a latent",
)
_EVERY = Rule(read=whole, sets=("train.sample_every",))
_SPREAD, _SHIFT = ("train.timesteps",), ("train.flow_shift",)
TOGETHER = {
    "data_backend_config": Rule(about="refused without `--data`, which names the pairs"),
    "num_processes": Rule(read=whole, about="how the run is launched"),
    "model_family": Rule(sets=("model.path",), about=f"one of {', '.join(FAMILIES)}"),
    "model_flavour": Rule(sets=("model.path",), about="with `model_family`"),
    "distillation_method": Rule(
        sets=("train.objective.name", *_SLOPE), about="`flow_dpo` is `dpo`; none is `sft`"
    ),
    "distillation_config": Rule(
        read=read_mapping,
        sets=_SLOPE,
        about="half of beta, times a latent's elements with `norm_type: sum`",
    ),
    "flow_custom_timesteps": Rule(read=numbers, sets=(*_SPREAD, *_SHIFT), about="no shift then"),
    "flow_use_uniform_schedule": Rule(switch=True, sets=_SPREAD),
    "flow_sigmoid_scale": Rule(read=number, sets=_SPREAD),
    "flow_schedule_shift": Rule(read=number, sets=_SHIFT),
    "flow_schedule_auto_shift": Rule(switch=True, sets=_SHIFT, about="the model's own"),
    "snr_gamma": Rule(read=number, sets=("train.snr_gamma",)),
    "lora_alpha": Rule(read=number, sets=("train.lora.alpha",)),
    "base_model_precision": Rule(sets=("train.quantize_base",)),
    "resolution": _SIZE,
    "resolution_type": Rule(sets=_SIZE.sets, about="`area`: of so many megapixels"),
    **{"num_train_epochs": _LENGTH, "max_train_steps": _LENGTH},
    "optimizer": Rule(
        sets=("train.optim.name", "train.optim.eps"), about="eps 1e-6 of `adamw_bf16`"
    ),
    "optimizer_config": Rule(sets=("train.optim.weight_decay",), about="`weight_decay` alone"),
    **{f"{name}_beta{i}": _BETAS for name in ("optimizer", "adam") for i in (1, 2)},
    "lr_scheduler": Rule(
        sets=("train.optim.schedule", "train.optim.warmup_steps"),
        about="`constant` warms nothing up",
    ),
    "lr_power": Rule(read=number, about="of `polynomial`, 1 alone"),
    "use_ema": Rule(switch=True, sets=("train.ema_decay",)),
    "ema_decay": Rule(read=number, sets=("train.ema_decay",)),
    "validation_prompt": Rule(sets=("train.sample_prompts",)),
    **{"validation_step_interval": _EVERY, "validation_steps": _EVERY},
    "validation_num_inference_steps": Rule(read=whole, sets=("evaluate.num_inference_steps",)),
    "validation_guidance": Rule(read=number, sets=("evaluate.guidance_scale",)),
}
"""Options that are read together."""
TRACKERS = {
    **{"tensorboard": ["tensorboard"], "wandb": ["wandb"], "none": []},
    "all": ["tensorboard", "wandb"],
}
_OFF = ("false", "0", "no")
RULES = {
    **dict.fromkeys(NOTHING, Rule()),
    **TOGETHER,
    "pretrained_model_name_or_path": Rule("model.path"),
    "pretrained_vae_model_name_or_path": Rule("model.vae"),
    "revision": Rule("model.revision"),
    "variant": Rule("model.variant"),
    "output_dir": Rule("train.output_dir", sets=("prepare.cache_dir",)),
    "seed": Rule("seed", whole),
    "model_type": Rule("train.method"),
    "lora_type": Rule(harmless=("standard",), refuse="adapters are LoRA, not LyCORIS"),
    "lora_rank": Rule(
        "train.lora.rank",
        whole,
        sets=("train.lora.alpha",),
        about="alpha is equal unless `lora_alpha` is given",
    ),
    "lora_dropout": Rule("train.lora.dropout", number),
    "lora_init_type": Rule(harmless=("default", "true"), refuse="adapters begin as peft's do"),
    "use_dora": Rule("train.lora.use_dora", switch=True),
    "init_lora": Rule("model.lora"),
    "peft_lora_target_modules": Rule("train.lora.target_modules", names),
    "flux_lora_target": Rule(note="which layers adapters go to is train.lora.target_modules here"),
    "flux_guidance_value": Rule("train.guidance", number),
    "flux_guidance_mode": Rule(harmless=("constant",), refuse="train.guidance is one number"),
    "flux_attention_masked_training": Rule(
        harmless=_OFF, refuse="FLUX.1 reads the padding of prompts, as its pipeline does"
    ),
    "controlnet": Rule(harmless=_OFF, refuse="control networks are not trained"),
    "control": Rule(harmless=_OFF, refuse="control inputs are not trained"),
    "train_text_encoder": Rule(harmless=_OFF, refuse="prompts are encoded once"),
    "train_batch_size": Rule("train.micro_batch_size", whole),
    "gradient_accumulation_steps": Rule("train.accumulation_steps", whole),
    "gradient_checkpointing": Rule("train.gradient_checkpointing", switch=True),
    "learning_rate": Rule("train.optim.lr", number),
    "lr_warmup_steps": Rule("train.optim.warmup_steps", whole),
    "lr_num_cycles": Rule(harmless=("1",), refuse="only one cycle is made"),
    "adam_weight_decay": Rule("train.optim.weight_decay", number),
    "adam_epsilon": Rule("train.optim.eps", number),
    "max_grad_norm": Rule("train.optim.max_grad_norm", number),
    "grad_clip_method": Rule(
        harmless=("norm",), note="gradients are clipped by their norm here, not value by value"
    ),
    "mixed_precision": Rule("train.precision", PRECISIONS.__getitem__),
    "report_to": Rule("train.trackers", TRACKERS.__getitem__),
    "checkpoint_step_interval": Rule("train.checkpoint_every", whole),
    "checkpointing_steps": Rule("train.checkpoint_every", whole),
    "checkpoints_total_limit": Rule("train.keep_checkpoints", whole),
    "resume_from_checkpoint": Rule(note="`fastpo train CONFIG --resume` goes on"),
    "caption_dropout_probability": Rule("train.empty_prompt_rate", number),
    "loss_type": Rule(harmless=("l2",), refuse="errors are squared"),
    "use_soft_min_snr": Rule(harmless=_OFF, refuse="the weight is min-SNR's"),
    "flow_use_beta_schedule": Rule(harmless=_OFF, refuse="timesteps follow no beta distribution"),
    "enable_xformers_memory_efficient_attention": Rule(switch=True),
    "pretrained_transformer_model_name_or_path": Rule(
        refuse="make it the transformer of the folder that model.path names"
    ),
    "pretrained_unet_model_name_or_path": Rule(
        refuse="make it the UNet of the folder that model.path names"
    ),
}
DEFAULTS = {
    **{"train_batch_size": "4", "learning_rate": "4e-7", "optimizer": "adamw_bf16"},
    **{"lr_scheduler": "constant_with_warmup", "max_grad_norm": "2.0", "lora_dropout": "0.1"},
    **{"mixed_precision": "bf16", "report_to": "none", "gradient_checkpointing": "true"},
    **{"output_dir": "simpletuner-results", "model_type": "full", "lora_rank": "16"},
    "checkpoints_total_limit": "5",
}
DPO_DEFAULTS = {
    **{"beta": 1.0, "loss_weight": 1.0, "sft_loss_weight": 0.0, "anchor_alpha": 0.0},
    **{"norm_type": "sum", "mask_dilate": 0, "auto_beta": True, "auto_beta_target_gf": 0.2},
    **{"auto_beta_decay": 0.99, "auto_beta_min": 1e-3, "auto_beta_max": 1.0},
    **{"auto_beta_eps": 1e-6, "distillation_type": "flow_dpo"},
}


def read_json_options(text: str) -> dict[str, str | None]:
    """Returns the options of a `config.json`, whose names may begin with dashes.

    It is read as YAML, which JSON is, since published examples end lists with a comma.

    Raises:
        ConfigError: It is no mapping.
    """
    try:
        raw = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{NAME}: config.json cannot be read: {one_line(error)}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{NAME}: config.json holds no mapping of options")
    named = {str(key).lstrip("-").replace("-", "_"): value for key, value in raw.items()}
    return {name: _text(value) for name, value in named.items() if value not in (None, "")}


def read_env_options(text: str) -> dict[str, str | None]:
    """Returns the options of a `config.env`, of lines such as `export LEARNING_RATE=1e-4`.

    Raises:
        ConfigError: A line is none.
    """
    found: dict[str, str | None] = {}
    for line in text.splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise ConfigError(f"{NAME}: config.env: {line.strip()!r:.80}: {error}") from None
        for word in words[1:] if words[:1] == ["export"] else words:
            name, equals, value = word.partition("=")
            if not equals:
                raise ConfigError(f"{NAME}: config.env: {word!r:.80} is no NAME=VALUE")
            if name.rstrip("+") == "TRAINER_EXTRA_ARGS":
                found |= read_options(read_value(shlex.split, value, name))
            elif value:
                found[ENVIRONMENT.get(name, name.lower())] = value
    return found


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, list | dict) else str(value)
