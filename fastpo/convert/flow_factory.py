"""Flow-Factory's YAML for offline DPO (`train.trainer_type: offline-dpo`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastpo.config.load import parse_yaml
from fastpo.convert.rules import NO, Draft, Rule, apply_rules, read_data, truth
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
    *("launcher", "main_process_port", "num_processes", "config_file", "data.datasets"),
    *("data.force_reprocess", "data.enable_preprocess", "data.cache_dir", "data.sampler_type"),
    *("data.sampler_subgroup_size", "model.model_type", "model.lora_alpha", "model.resume_type"),
    *("model.target_components", "model.master_weight_dtype", "model.attn_backend", "log.project"),
    *("log.run_name", "log.save_dir", "log.save_freq", "log.save_model_only", "log.verbose"),
    *("train.trainer_type", "train.guidance_scale", "train.num_inference_steps", "train.beta"),
    *("train.weighting_scheme", "train.timestep_range", "train.time_shift", "train.logit_mean"),
    *("train.logit_std", "train.ref_param_device", "train.ema_device", "train.ema_update_interval"),
    *("train.ema_decay", "train.ema_decay_schedule", "train.latent_storage_dtype"),
    *("train.resolution", "train.height", "train.width", "model.target_modules"),
    *("train.offload_samples_to_cpu", "train.shuffle_samples", "train.gradient_step_per_epoch"),
)
"""Keys that are read together, or that change no result of an offline run."""
RULES = {
    **dict.fromkeys(NOTHING, Rule()),
    "mixed_precision": Rule("train.precision", PRECISIONS.__getitem__),
    "data.preprocessing_batch_size": Rule("prepare.batch_size", int),
    "data.dataloader_num_workers": Rule("train.loader_workers", int),
    "model.model_name_or_path": Rule("model.path"),
    "model.finetune_type": Rule("train.method"),
    "model.lora_rank": Rule("train.lora.rank", int),
    "model.resume_path": Rule(refuse="start from earlier adapters by model.lora"),
    "log.logging_backend": Rule(
        "train.trackers", {"none": [], "wandb": ["wandb"], "tensorboard": ["tensorboard"]}.get
    ),
    "train.max_epochs": Rule("train.epochs", int),
    "train.per_device_batch_size": Rule("train.micro_batch_size", int),
    "train.gradient_accumulation_steps": Rule("train.accumulation_steps", int),
    "train.num_train_timesteps": Rule(
        harmless=("1",), refuse="a visit of a pair has one timestep; give more epochs"
    ),
    "train.enable_gradient_checkpointing": Rule("train.gradient_checkpointing", switch=True),
    "train.seed": Rule("seed", int),
    "train.learning_rate": Rule("train.optim.lr", float),
    "train.adam_weight_decay": Rule("train.optim.weight_decay", float),
    "train.adam_epsilon": Rule("train.optim.eps", float),
    "train.adam_betas": Rule("train.optim.betas", lambda text: parse_yaml(text)),
    "train.max_grad_norm": Rule("train.optim.max_grad_norm", float),
    "optimizers.learning_rate": Rule("train.optim.lr", float),
    "optimizers.weight_decay": Rule("train.optim.weight_decay", float),
    "optimizers.eps": Rule("train.optim.eps", float),
    "optimizers.betas": Rule("train.optim.betas", lambda text: parse_yaml(text)),
    "optimizers.max_grad_norm": Rule("train.optim.max_grad_norm", float),
    "optimizers.name": Rule(),
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
    _size(_section(raw, "train"), draft)
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
    alpha = given.get("model.lora_alpha")
    keys["train.lora.alpha"] = float(alpha or 2 * keys["train.lora.rank"])
    targets = given.get("model.target_modules") or "all"
    if targets == "all":
        draft.refused.append("model.target_modules all (list the layers)")
    elif targets != "default":
        listed = parse_yaml(targets)
        keys["train.lora.target_modules"] = [listed] if isinstance(listed, str) else listed
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
    for number, one in enumerate(listed):
        folder = one.get("dataset_dir") if isinstance(one, Mapping) else None
        if not isinstance(folder, str):
            draft.refused.append(f"data.datasets.{number} (it has no dataset_dir)")
            continue
        source: dict[str, Any] = {"source": "folder", "path": folder}
        train = one.get("train") or {}
        limit = train.get("max_dataset_size") if isinstance(train, Mapping) else None
        if limit is not None:
            source["limit"] = int(limit)
        if len(listed) > 1:
            source["name"] = str(one.get("name") or f"data-{number}")
        sources.append(source)
        draft.notes.append(
            f"`fastpo pairs {folder}/train.jsonl {folder}/pairs.jsonl` writes the listing that "
            "FastPO reads"
        )
    if len(sources) == 1:
        keys |= {f"data.{name}": value for name, value in sources[0].items()}
    else:
        keys["data.sources"] = sources


def _size(train: Mapping[str, Any], draft: Draft) -> None:
    """Height and width must be equal: `prepare.resolution` is a side."""
    size = train.get("resolution", [512, 512])
    sides = list(size) if isinstance(size, list) else [size]
    sides = [*sides, *sides][:2]
    sides = [train.get("height") or sides[0], train.get("width") or sides[1]]
    if sides[0] != sides[1]:
        draft.refused.append(
            f"train.resolution {sides} (prepare.resolution is the side of a square)"
        )
    draft.keys |= {"prepare.resolution": int(sides[0]), "prepare.buckets": False}


def _timesteps(given: Mapping[str, str | None], draft: Draft) -> None:
    """Its fraction runs from noise alone (0) to the image (1), against the noise's factor here."""
    keys = draft.keys
    bounds = parse_yaml(given.get("train.timestep_range") or "0.99")
    low, high = bounds if isinstance(bounds, list) else (0.0, bounds)
    least, most = round(1000 * (1.0 - float(high))), round(1000 * (1.0 - float(low)))
    if least > 0:
        keys["train.min_timestep"] = least
    if most < 1000:
        keys["train.max_timestep"] = most
    keys["train.flow_shift"] = 1.0 / float(given.get("train.time_shift") or 1.0)
    scheme = given.get("train.weighting_scheme") or "logit_normal"
    if scheme == "logit_normal":
        mean = -float(given.get("train.logit_mean") or 0.0) or 0.0
        std = float(given.get("train.logit_std") or 1.0)
        keys["train.timesteps"] = {"kind": "logit_normal", "mean": mean, "std": std}
    elif scheme != "uniform":
        draft.refused.append(f"train.weighting_scheme {scheme} (logit_normal or uniform)")


def _rest(given: Mapping[str, str | None], draft: Draft, processes: int | None) -> None:
    keys = draft.keys
    keys["train.objective.name"] = "dpo"
    keys["train.objective.beta"] = 0.5 * float(given.get("train.beta") or 2000.0)
    keys |= {"train.optim.schedule": "constant", "train.optim.warmup_steps": 0}
    decay = float(given.get("train.ema_decay") or 0.995)
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
    count = processes or int(given.get("num_processes") or 1)
    if count > 1:
        draft.notes.append(f"launch: torchrun --nproc_per_node {count} -m fastpo.train CONFIG")
    checkpointing = given.get("train.enable_gradient_checkpointing")
    if checkpointing and checkpointing not in ("true", "false") and not truth(checkpointing):
        draft.refused.append("train.enable_gradient_checkpointing (of all blocks, or of none)")
