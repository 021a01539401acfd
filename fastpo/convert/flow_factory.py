"""Flow-Factory's YAML for offline DPO (`train.trainer_type: offline-dpo`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastpo.config.load import parse_yaml
from fastpo.convert.rules import (
    NO,
    Draft,
    Rule,
    apply_rules,
    names,
    number,
    numbers,
    positive,
    read_data,
    read_key,
    read_value,
    truth,
    whole,
)
from fastpo.convert.scripts import PRECISIONS
from fastpo.errors import ConfigError, one_line

NAME = "flow-factory"
TRAINER = "offline-dpo"
MODELS = ("sd3-5", "flux1", "flux2", "flux2-klein", "flux2-klein-base", "qwen-image", "z-image")
"""Its `model.model_type`s that FastPO trains."""
JOINT = ("to_q", "to_k", "to_v", "to_out.0")
TEXTS = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
DEFAULT_TARGETS = {
    "sd3-5": (*JOINT, *TEXTS),
    "flux1": (
        *(*JOINT, *TEXTS, "ff.net.0.proj", "ff.net.2"),
        *("ff_context.net.0.proj", "ff_context.net.2"),
    ),
}
"""Layers that `model.target_modules: default` means."""
NOTHING = (
    *("launcher", "main_process_port"),
    *("data.force_reprocess", "data.enable_preprocess", "data.cache_dir", "data.sampler_type"),
    *("data.sampler_subgroup_size", "model.resume_type", "model.target_components"),
    *("model.master_weight_dtype", "model.attn_backend", "log.project", "log.save_freq"),
    *("log.save_model_only", "log.verbose", "train.guidance_scale", "train.num_inference_steps"),
    *("train.ref_param_device", "train.ema_device", "train.ema_update_interval"),
    *("train.ema_decay_schedule", "train.latent_storage_dtype", "optimizers.name"),
    *("train.offload_samples_to_cpu", "train.shuffle_samples", "train.gradient_step_per_epoch"),
)
"""Keys that change no result of an offline run."""


def _fractions(text: str) -> tuple[float, float]:
    """Reads a share of the way, from 0 on, or two: `0.99` or `[0.1, 0.9]`."""
    low, high = [0.0, *numbers(text)][-2:]
    if not 0.0 <= low < high <= 1.0 or text.count(",") > 1:
        raise ValueError("no part of the way")
    return low, high


def _sides(text: str) -> list[int]:
    """Reads a side's pixels, or height and width: `512` or `[512, 768]`."""
    sides = [whole(part) for part in text.strip("[] ").split(",")]
    if len(sides) > 2:
        raise ValueError("more than two sides")
    return [sides[0], sides[-1]]


SIDES = ("height", "width")
_SIZE = ("prepare.resolution",)
_SPREAD = ("train.timesteps",)
TOGETHER = {
    "num_processes": Rule(read=whole, about="how the run is launched"),
    "train.trainer_type": Rule(about=f"`{TRAINER}` alone"),
    "model.model_type": Rule(about=f"one of {', '.join(MODELS)}"),
    "config_file": Rule(sets=("train.deepspeed",), about="of accelerate, told by its name"),
    "data.datasets": Rule(sets=("data.path", "data.sources"), about="or `--data`"),
    "model.lora_alpha": Rule(read=number, sets=("train.lora.alpha",), about="else twice the rank"),
    "model.target_modules": Rule(read=names, sets=("train.lora.target_modules",)),
    "log.run_name": Rule(sets=("train.output_dir", "prepare.cache_dir")),
    "log.save_dir": Rule(sets=("train.output_dir",)),
    "train.beta": Rule(read=number, sets=("train.objective.beta",), about="half of it"),
    "train.weighting_scheme": Rule(sets=_SPREAD),
    "train.logit_mean": Rule(read=number, sets=_SPREAD, about="with the other sign"),
    "train.logit_std": Rule(read=number, sets=_SPREAD),
    "train.timestep_range": Rule(
        read=_fractions,
        sets=("train.min_timestep", "train.max_timestep"),
        about="from the other end, in thousandths",
    ),
    "train.time_shift": Rule(read=positive, sets=("train.flow_shift",), about="its inverse"),
    "train.ema_decay": Rule(read=number, sets=("train.ema_decay",)),
    "train.resolution": Rule(read=_sides, sets=_SIZE),
    **{f"train.{side}": Rule(read=whole, sets=_SIZE) for side in SIDES},
}
"""Keys that are read together."""
RULES = {
    **dict.fromkeys(NOTHING, Rule()),
    **TOGETHER,
    "mixed_precision": Rule("train.precision", PRECISIONS.__getitem__),
    "data.preprocessing_batch_size": Rule("prepare.batch_size", whole),
    "data.dataloader_num_workers": Rule("train.loader_workers", whole),
    "model.model_name_or_path": Rule("model.path"),
    "model.finetune_type": Rule("train.method"),
    "model.lora_rank": Rule("train.lora.rank", whole, sets=("train.lora.alpha",)),
    "model.resume_path": Rule(refuse="start from earlier adapters by model.lora"),
    "log.logging_backend": Rule(
        "train.trackers",
        {"none": [], "wandb": ["wandb"], "tensorboard": ["tensorboard"]}.__getitem__,
    ),
    "train.max_epochs": Rule("train.epochs", whole),
    "train.per_device_batch_size": Rule("train.micro_batch_size", whole),
    "train.gradient_accumulation_steps": Rule("train.accumulation_steps", whole),
    "train.num_train_timesteps": Rule(
        harmless=("1",), refuse="a visit of a pair has one timestep; give more epochs"
    ),
    "train.enable_gradient_checkpointing": Rule("train.gradient_checkpointing", switch=True),
    "train.seed": Rule("seed", whole),
    "train.learning_rate": Rule("train.optim.lr", number),
    "train.adam_weight_decay": Rule("train.optim.weight_decay", number),
    "train.adam_epsilon": Rule("train.optim.eps", number),
    "train.adam_betas": Rule("train.optim.betas", numbers),
    "train.max_grad_norm": Rule("train.optim.max_grad_norm", number),
    "optimizers.learning_rate": Rule("train.optim.lr", number),
    "optimizers.weight_decay": Rule("train.optim.weight_decay", number),
    "optimizers.eps": Rule("train.optim.eps", number),
    "optimizers.betas": Rule("train.optim.betas", numbers),
    "optimizers.max_grad_norm": Rule("train.optim.max_grad_norm", number),
    "optimizers.type": Rule(harmless=("adamw",), refuse="the optimizer is AdamW there"),
}
DEFAULTS = {
    **{"mixed_precision": "bf16", "train.max_epochs": "1", "train.per_device_batch_size": "1"},
    **{"train.gradient_accumulation_steps": "1", "train.seed": "42", "train.max_grad_norm": "1.0"},
    **{"train.learning_rate": "1e-5", "train.adam_weight_decay": "1e-4", "model.lora_rank": "8"},
    **{"model.finetune_type": "full", "log.logging_backend": "none"},
}
SECTIONS = ("data", "model", "log", "train")
ASIDE = ("scheduler", "eval", "rewards", "eval_rewards")
"""Sections of what happens beside the training."""


def read_factory(text: str) -> dict[str, Any]:
    """Returns a configuration of Flow-Factory.

    Raises:
        ConfigError: It is no YAML, or no mapping.
    """
    try:
        raw = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{NAME}: the YAML cannot be read: {one_line(error)}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{NAME}: the YAML holds no mapping")
    return raw


def convert_factory(
    raw: Mapping[str, Any], draft: Draft, *, processes: int | None, data: str | None
) -> None:
    """Puts a configuration of Flow-Factory into a draft.

    Args:
        raw: The configuration.
        draft: What to fill.
        processes: How many processes train; None: as the configuration says.
        data: The pairs instead of its data sets.
    """
    kind = _section(raw, "train").get("trainer_type", "grpo")
    if kind != TRAINER:
        draft.refused.append(f"train.trainer_type {kind} (of pairs on disk it is {TRAINER})")
        return
    given = {**DEFAULTS, **_flat(raw, draft)}
    apply_rules(RULES, given, draft, dashes="")
    _model(given, draft)
    _data(raw, data, draft)
    _size(given, draft)
    _timesteps(given, draft)
    _rest(given, draft, processes)


def _section(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = raw.get(name) or {}
    if not isinstance(section, Mapping):
        raise ConfigError(f"{NAME}: {name} is no mapping")
    return section


def _flat(raw: Mapping[str, Any], draft: Draft) -> dict[str, str | None]:
    """Keys by their full names, values as text; what is null counts as not given."""
    found: dict[str, Any] = {}
    for name, value in raw.items():
        if name in SECTIONS:
            found |= {f"{name}.{key}": value for key, value in _section(raw, name).items()}
        elif name == "optimizers":
            listed = value if isinstance(value, list) else [value]
            if len(listed) != 1 or not isinstance(listed[0], Mapping):
                draft.refused.append("optimizers (one optimizer trains all weights)")
            else:
                found |= {f"optimizers.{key}": value for key, value in listed[0].items()}
        elif name not in ASIDE:
            found[name] = value
    evaluates = _section(raw, "eval").get("eval_freq", 10)
    if evaluates or raw.get("rewards") or raw.get("eval_rewards"):
        draft.notes.append("eval, rewards: `fastpo evaluate` samples and scores after training")
    return {name: _text(value) for name, value in found.items() if value is not None}


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _model(given: Mapping[str, str | None], draft: Draft) -> None:
    keys, kind = draft.keys, given.get("model.model_type")
    if kind not in MODELS:
        draft.refused.append(f"model.model_type {kind} (FastPO trains {', '.join(MODELS)})")
    if "model.path" not in keys:
        draft.refused.append("model.model_name_or_path (it is missing)")
    if keys["train.method"] != "lora":
        keys.pop("train.lora.rank", None)
        return
    twice = 2.0 * keys["train.lora.rank"]
    keys["train.lora.alpha"] = read_key(given, "model.lora_alpha", twice, number)
    targets = given.get("model.target_modules") or "all"
    if targets == "all":
        draft.refused.append("model.target_modules all (list the layers)")
    elif targets != "default":
        keys["train.lora.target_modules"] = read_key(given, "model.target_modules", [], names)
    elif kind in DEFAULT_TARGETS:
        keys["train.lora.target_modules"] = list(DEFAULT_TARGETS[kind])
    else:
        draft.notes.append(
            f"model.target_modules default: of {kind} the attention's projections here, "
            "train.lora.target_modules"
        )


def _data(raw: Mapping[str, Any], data: str | None, draft: Draft) -> None:
    keys = draft.keys
    if data is not None:
        keys |= read_data(data)
        return
    listed = _section(raw, "data").get("datasets")
    if not isinstance(listed, list) or not listed:
        draft.refused.append("data.datasets (none is listed; name the pairs' folder by --data)")
        return
    sources = []
    for place, one in enumerate(listed):
        folder = one.get("dataset_dir") if isinstance(one, Mapping) else None
        if not isinstance(folder, str):
            draft.refused.append(f"data.datasets.{place} (it has no dataset_dir)")
            continue
        source: dict[str, Any] = {"source": "folder", "path": folder}
        train = one.get("train") or {}
        limit = train.get("max_dataset_size") if isinstance(train, Mapping) else None
        if limit is not None:
            shown = f"data.datasets.{place}.train.max_dataset_size"
            source["limit"] = read_value(whole, str(limit), shown)
        if len(listed) > 1:
            source["name"] = str(one.get("name") or f"data-{place}")
        sources.append(source)
        draft.notes.append(
            f"`fastpo pairs {folder}/train.jsonl {folder}/pairs.jsonl` writes the listing that "
            "FastPO reads"
        )
    if len(sources) == 1:
        keys |= {f"data.{name}": value for name, value in sources[0].items()}
    else:
        keys["data.sources"] = sources


def _size(given: Mapping[str, str | None], draft: Draft) -> None:
    """Height and width must be equal: `prepare.resolution` is a side."""
    sides = read_key(given, "train.resolution", [512, 512], _sides)
    sides = [read_key(given, f"train.{n}", s, whole) for n, s in zip(SIDES, sides, strict=True)]
    if sides[0] != sides[1]:
        draft.refused.append(
            f"train.resolution {sides} (prepare.resolution is the side of a square)"
        )
    draft.keys |= {"prepare.resolution": sides[0], "prepare.buckets": False}


def _timesteps(given: Mapping[str, str | None], draft: Draft) -> None:
    """Its fraction runs from noise alone (0) to the image (1), against the noise's factor here."""
    keys = draft.keys
    low, high = read_key(given, "train.timestep_range", (0.0, 0.99), _fractions)
    least, most = round(1000 * (1.0 - high)), round(1000 * (1.0 - low))
    if least > 0:
        keys["train.min_timestep"] = least
    if most < 1000:
        keys["train.max_timestep"] = most
    keys["train.flow_shift"] = 1.0 / read_key(given, "train.time_shift", 1.0, positive)
    scheme = given.get("train.weighting_scheme") or "logit_normal"
    if scheme == "logit_normal":
        mean = -read_key(given, "train.logit_mean", 0.0, number) or 0.0
        std = read_key(given, "train.logit_std", 1.0, number)
        keys["train.timesteps"] = {"kind": "logit_normal", "mean": mean, "std": std}
    elif scheme != "uniform":
        draft.refused.append(f"train.weighting_scheme {scheme} (logit_normal or uniform)")


def _rest(given: Mapping[str, str | None], draft: Draft, processes: int | None) -> None:
    keys = draft.keys
    keys["train.objective.name"] = "dpo"
    keys["train.objective.beta"] = 0.5 * read_key(given, "train.beta", 2000.0, number)
    keys |= {"train.optim.schedule": "constant", "train.optim.warmup_steps": 0}
    decay = read_key(given, "train.ema_decay", 0.995, number)
    if decay > 0.0:
        keys["train.ema_decay"] = decay
        draft.notes.append("train.ema_decay: the average follows every step here")
    run = given.get("log.run_name") or "flow-factory"
    keys["train.output_dir"] = f"{(given.get('log.save_dir') or 'saves').rstrip('/')}/{run}"
    keys["prepare.cache_dir"] = f"caches/{run}"
    if given.get("log.save_freq") not in (None, "0"):
        draft.notes.append("log.save_freq counts epochs; train.checkpoint_every counts steps")
    launcher = given.get("config_file") or ""
    stage = re.search(r"zero_?([123])", launcher)
    if stage is not None:
        keys["train.deepspeed"] = f"zero{stage[1]}"
    elif launcher and launcher not in NO:
        draft.notes.append(f"config_file {launcher}: of accelerate, not read")
    count = processes or read_key(given, "num_processes", 1, whole)
    if count > 1:
        draft.notes.append(f"launch: torchrun --nproc_per_node {count} -m fastpo.train CONFIG")
    checkpointing = given.get("train.enable_gradient_checkpointing")
    if checkpointing and checkpointing not in ("true", "false") and not truth(checkpointing):
        draft.refused.append("train.enable_gradient_checkpointing (of all blocks, or of none)")
