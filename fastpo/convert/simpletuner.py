"""SimpleTuner's configuration: `config.json`, `config.env`, or the options of `simpletuner train`.

Its preference training is Flow-DPO (`distillation_method: flow_dpo`), of LoRA on flow-matching
models; everything else that it trains is supervised, which is our objective `sft`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastpo.convert.rules import (
    NO,
    Draft,
    apply_rules,
    number,
    numbers,
    positive,
    read_data,
    read_key,
    read_value,
    truth,
    whole,
)
from fastpo.convert.simpletuner_options import (
    ASIDE,
    BITS,
    DEFAULT_FLAVORS,
    DEFAULTS,
    DPO_DEFAULTS,
    FAMILIES,
    FLUX2_TARGETS,
    LATENTS,
    OPTIMIZERS,
    RULES,
    SCHEDULES,
    read_mapping,
)


def convert_simpletuner(
    options: Mapping[str, str | None], draft: Draft, *, processes: int | None, data: str | None
) -> None:
    """Puts SimpleTuner's options into a draft.

    Args:
        options: By their names without dashes.
        draft: What to fill.
        processes: How many processes train; None: as the options say, else one.
        data: The pairs, which its data backend configuration does not list.
    """
    given = {**DEFAULTS, **options}
    known = {name: text for name, text in given.items() if not name.startswith(ASIDE)}
    known |= {name: given[name] for name in given if name in RULES}
    apply_rules(RULES, known, draft, dashes="")
    keys = draft.keys
    if keys["train.output_dir"]:
        keys["prepare.cache_dir"] = f"caches/{str(keys['train.output_dir']).rstrip('/')}"
    family = given.get("model_family")
    if family not in FAMILIES:
        draft.refused.append(f"model_family {family} (FastPO trains {', '.join(FAMILIES)})")
        return
    _model(family, given, draft)
    _data(given, data, draft)
    _length_and_rate(given, draft)
    _timesteps(family, given, draft)
    _objective(family, given, draft)
    _samples(given, draft)
    count = processes or read_key(given, "num_processes", 1, whole)
    if count > 1:
        draft.notes.append(f"launch: torchrun --nproc_per_node {count} -m fastpo.train CONFIG")


def _model(family: str, given: Mapping[str, str | None], draft: Draft) -> None:
    keys = draft.keys
    flavor = given.get("model_flavour") or DEFAULT_FLAVORS[family]
    if "model.path" not in keys:
        path = FAMILIES[family].get(flavor)
        if path is None:
            draft.refused.append(
                f"model_flavour {flavor} (give pretrained_model_name_or_path; of {family} these "
                f"are known: {', '.join(FAMILIES[family])})"
            )
            path = "unknown"
        keys["model.path"] = path
    if keys["train.method"] == "full":
        for name in ("rank", "dropout", "use_dora", "target_modules"):
            keys.pop(f"train.lora.{name}", None)
    elif keys["train.method"] == "lora":
        rank = float(keys["train.lora.rank"])
        keys["train.lora.alpha"] = read_key(given, "lora_alpha", rank, number)
        if family == "flux2":
            keys.setdefault("train.lora.target_modules", list(FLUX2_TARGETS))
    else:
        draft.refused.append(f"model_type {keys['train.method']} (lora or full)")
    precision = (given.get("base_model_precision") or "no_change").lower()
    bits = next((b for start, b in BITS.items() if precision.startswith(start)), None)
    if bits is not None:
        keys["train.quantize_base"] = bits
        draft.notes.append(
            f"base_model_precision {precision}: the frozen base in {bits} by bitsandbytes"
        )
    elif precision not in ("no_change", *NO):
        draft.refused.append(f"base_model_precision {precision} (a base is held in 4 or 8 bits)")


def _data(given: Mapping[str, str | None], data: str | None, draft: Draft) -> None:
    """Its listing of folders names winners and losers by equal file names, which ours does not."""
    if data is None:
        backend = given.get("data_backend_config")
        draft.refused.append(
            f"data_backend_config {backend} (list the pairs of its preferred and rejected folders "
            "in a pairs.jsonl, one line each with prompt, winner and loser, and name its folder "
            "by --data)"
        )
    else:
        draft.keys |= read_data(data)
    if "resolution" not in given:
        draft.notes.append("resolution: 1024, unless the data backend's own says otherwise")
    size = read_key(given, "resolution", 1024.0, positive)
    if (given.get("resolution_type") or "pixel_area") == "area":
        size = 64 * round(math.sqrt(size * 1e6) / 64)
    draft.keys["prepare.resolution"] = int(size)


def _length_and_rate(given: Mapping[str, str | None], draft: Draft) -> None:
    keys = draft.keys
    steps, epochs = (read_key(given, n, 0, whole) for n in ("max_train_steps", "num_train_epochs"))
    if steps:
        keys["train.max_steps"] = steps
    else:
        keys["train.epochs"] = epochs or 1
    schedule = given["lr_scheduler"]
    if schedule not in SCHEDULES:
        draft.refused.append(f"lr_scheduler {schedule} (one of {', '.join(SCHEDULES)})")
    elif schedule == "polynomial" and read_key(given, "lr_power", 0.8, number) != 1.0:
        draft.refused.append("lr_power, 0.8 by default (only power 1 is made)")
    keys["train.optim.schedule"] = schedule
    if schedule == "constant":
        keys["train.optim.warmup_steps"] = 0
    optimizer = str(given["optimizer"])
    keys["train.optim.name"] = OPTIMIZERS.get(optimizer, "adamw")
    if optimizer not in OPTIMIZERS:
        draft.refused.append(f"optimizer {optimizer} (one of {', '.join(OPTIMIZERS)})")
    if optimizer == "adamw_bf16":
        keys.setdefault("train.optim.eps", 1e-6)
        draft.notes.append("optimizer adamw_bf16: trained weights are float32 here")
    betas = [
        read_key(
            given, f"optimizer_beta{i}", read_key(given, f"adam_beta{i}", beta, number), number
        )
        for i, beta in ((1, 0.9), (2, 0.999))
    ]
    if betas != [0.9, 0.999]:
        keys["train.optim.betas"] = betas
    for part in filter(None, (given.get("optimizer_config") or "").split(",")):
        name, _, value = part.partition("=")
        if name.strip() == "weight_decay":
            shown = "optimizer_config weight_decay"
            keys["train.optim.weight_decay"] = read_value(number, value, shown)
        else:
            draft.refused.append(f"optimizer_config {name.strip()} (only weight_decay is read)")
    if truth(given.get("use_ema", "false")):
        keys["train.ema_decay"] = read_key(given, "ema_decay", 0.995, number)


def _timesteps(family: str, given: Mapping[str, str | None], draft: Draft) -> None:
    keys = draft.keys
    if family in ("sd1x", "sdxl"):
        if "snr_gamma" in given:
            keys["train.snr_gamma"] = read_key(given, "snr_gamma", 5.0, number)
        return
    values = read_key(given, "flow_custom_timesteps", [], numbers)
    if values:
        scale = 1.0 if max(values) <= 1.0 else 1000.0
        keys["train.timesteps"] = {"kind": "sigmas", "values": [v / scale for v in values]}
        draft.notes.append("flow_custom_timesteps: drawn at random, each as often, not in turn")
        return
    if not truth(given.get("flow_use_uniform_schedule", "false")):
        std = read_key(given, "flow_sigmoid_scale", 1.0, number)
        keys["train.timesteps"] = {"kind": "logit_normal", "std": std}
    if not truth(given.get("flow_schedule_auto_shift", "false")):
        shift = read_key(given, "flow_schedule_shift", 3.0, number)
        keys["train.flow_shift"] = shift if shift > 0 else 1.0


def _objective(family: str, given: Mapping[str, str | None], draft: Draft) -> None:
    keys, method = draft.keys, given.get("distillation_method")
    if method in (None, *NO):
        keys["train.objective.name"] = "sft"
        draft.notes.append("supervised training, on the winners of the pairs: objective sft")
        return
    if method != "flow_dpo":
        draft.refused.append(f"distillation_method {method} (of preferences it is flow_dpo)")
        return
    if family in ("sd1x", "sdxl") or keys["train.method"] != "lora":
        draft.refused.append("distillation_method flow_dpo (it is of LoRA on flow-matching models)")
    here = read_key(given, "distillation_config", {}, read_mapping)
    own = here.get("flow_dpo")
    _flow_dpo(family, {**DPO_DEFAULTS, **(own if isinstance(own, dict) else here)}, draft)


def _flow_dpo(family: str, config: Mapping[str, Any], draft: Draft) -> None:
    """Its slope, `beta / 2` of errors summed over a latent's N elements, as that of their mean."""
    keys = draft.keys
    values = {
        name: read_value(number, str(config[name] or 0), f"flow_dpo.{name}")
        for name, default in DPO_DEFAULTS.items()
        if isinstance(default, int | float) and not isinstance(default, bool)
    }
    for name, harmless, why in (
        ("anchor_alpha", 0, "nothing holds the policy to the reference but the objective"),
        ("sft_loss_weight", 0, "no term on the winner is added in a configuration"),
        ("loss_weight", 1, "the loss has no factor"),
    ):
        if values[name] != harmless:
            draft.refused.append(f"flow_dpo.{name} ({why})")
    strange = [name for name in config if name not in DPO_DEFAULTS]
    draft.refused += [f"flow_dpo.{name} (unknown)" for name in strange]
    kind = str(config["norm_type"])
    if kind not in ("sum", "mean"):
        draft.refused.append(f"flow_dpo.norm_type {kind} (errors have no mask)")
    channels, factor = LATENTS.get(family, (16, 8))
    size = channels * (int(keys["prepare.resolution"]) / factor) ** 2 if kind == "sum" else 1.0
    keys["train.objective.name"] = "dpo"
    share = values["auto_beta_target_gf"]
    if not truth(str(config["auto_beta"])) or share <= 0.0:
        keys["train.objective.beta"] = 0.5 * values["beta"] * size
    elif share >= 0.5:
        draft.refused.append("flow_dpo.auto_beta_target_gf (it must be below 0.5)")
    else:
        keys["train.objective.beta"] = 0.5 * values["auto_beta_max"] * size
        wanted = math.log((1.0 - share) / share)
        keys["train.auto_slope"] = round(math.exp(-4.0 / wanted), 6)
        draft.notes.append(
            f"flow_dpo.auto_beta: both hold the mean size of the logit at {wanted:.3g}; "
            "train.auto_slope names it by the share of pairs beyond 4, and the slope stays within "
            "a factor of 100 of objective.beta, where it begins"
        )
    if kind == "sum":
        draft.notes.append(
            f"flow_dpo.norm_type sum: times the {int(size):,} elements of a latent of "
            f"{keys['prepare.resolution']} pixels on a side"
        )


def _samples(given: Mapping[str, str | None], draft: Draft) -> None:
    """Images while training, where there is a prompt."""
    prompt = given.get("validation_prompt")
    every = read_key(given, "validation_steps", 0, whole)
    every = read_key(given, "validation_step_interval", every, whole)
    if not prompt or not every:
        return
    keys = draft.keys
    keys |= {"train.sample_prompts": [prompt], "train.sample_every": every}
    if "validation_num_inference_steps" in given:
        steps = read_key(given, "validation_num_inference_steps", 0, whole)
        keys["evaluate.num_inference_steps"] = steps
    if "validation_guidance" in given:
        keys["evaluate.guidance_scale"] = read_key(given, "validation_guidance", 0.0, number)
