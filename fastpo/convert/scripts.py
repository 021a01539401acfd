"""The training scripts that share diffusers' options: diffusers, Salesforce's, MaPO's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from fastpo.convert.launch import Launch
from fastpo.convert.rules import Draft, Rule, apply_rules, number, read_option, truth, whole

Given = Mapping[str, str | None]

PRECISIONS = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}
TRACKERS = {"tensorboard": ["tensorboard"], "wandb": ["wandb"], "all": ["tensorboard", "wandb"]}
TURBO_STEPS = [249, 499, 749, 999]
SOURCES = {"pick-style": "pickstyle", "pick-safety": "picksafety"}
"""Of a data set's name; all others have Pick-a-Pic's columns, which these scripts read."""

_HUB = "nothing is pushed to the hub; `final/` is what diffusers loads"
_IMAGES = (
    "images while training need prompts of your own: train.sample_prompts and train.sample_every"
)
COMMON = {
    "pretrained_model_name_or_path": Rule("model.path"),
    "pretrained_vae_model_name_or_path": Rule("model.vae"),
    "revision": Rule("model.revision"),
    "variant": Rule("model.variant"),
    "dataset_name": Rule("data.path", sets=("data.source",), about="or `--data`"),
    "max_train_samples": Rule("data.limit", whole, note="data.limit takes the first, not a draw"),
    "output_dir": Rule("train.output_dir", sets=("prepare.cache_dir",)),
    "cache_dir": Rule(note="the hub's own cache is chosen by HF_HOME"),
    "seed": Rule("seed", whole),
    "resolution": Rule("prepare.resolution", whole),
    "random_crop": Rule(refuse="images are encoded once, cut in the center", switch=True),
    "no_hflip": Rule(switch=True),
    "train_batch_size": Rule("train.micro_batch_size", whole),
    "num_train_epochs": Rule("train.epochs", whole),
    "max_train_steps": Rule(
        "train.max_steps", whole, sets=("train.epochs",), about="goes before epochs"
    ),
    "gradient_accumulation_steps": Rule("train.accumulation_steps", whole),
    "gradient_checkpointing": Rule("train.gradient_checkpointing", switch=True),
    "learning_rate": Rule("train.optim.lr", number),
    "scale_lr": Rule(
        switch=True, sets=("train.optim.lr",), about="times the pairs of a step of all processes"
    ),
    "lr_scheduler": Rule(
        "train.optim.schedule",
        sets=("train.optim.warmup_steps",),
        about="`constant` warms nothing up",
    ),
    "lr_warmup_steps": Rule("train.optim.warmup_steps", whole),
    "dataloader_num_workers": Rule("train.loader_workers", whole),
    "adam_weight_decay": Rule("train.optim.weight_decay", number),
    "adam_epsilon": Rule("train.optim.eps", number),
    "adam_beta1": Rule(read=number, sets=("train.optim.betas",)),
    "adam_beta2": Rule(read=number, sets=("train.optim.betas",)),
    "max_grad_norm": Rule("train.optim.max_grad_norm", number),
    "mixed_precision": Rule("train.precision", PRECISIONS.__getitem__),
    "report_to": Rule("train.trackers", TRACKERS.__getitem__),
    "checkpointing_steps": Rule("train.checkpoint_every", whole),
    "resume_from_checkpoint": Rule(note="`fastpo train CONFIG --resume` goes on"),
    "allow_tf32": Rule(note="torch.backends is left as it is", switch=True),
    "logging_dir": Rule(),
    "local_rank": Rule(),
    "hub_model_id": Rule(note=_HUB),
}
_LATER = {
    "dataset_split_name": Rule("data.split"),
    "run_validation": Rule(switch=True, note=_IMAGES),
    "validation_steps": Rule(read=whole),
    "checkpoints_total_limit": Rule("train.keep_checkpoints", whole),
    "lr_num_cycles": Rule(refuse="only one cycle is made", harmless=("1",)),
    "lr_power": Rule(refuse="only power 1 is made", harmless=("1", "1.0")),
    "use_8bit_adam": Rule(switch=True, sets=("train.optim.name",), about="`adamw_8bit`"),
    "push_to_hub": Rule(switch=True, note=_HUB),
    "enable_xformers_memory_efficient_attention": Rule(
        switch=True, sets=("train.attention",), about="`xformers`"
    ),
    "tracker_name": Rule(),
}
_DIFFUSERS = {
    **COMMON,
    **_LATER,
    "beta_dpo": Rule(
        read=number, sets=("train.objective.beta",), about="as it is of SD1.5, half of SDXL"
    ),
    "hub_token": Rule(note=_HUB),
    "vae_encode_batch_size": Rule("prepare.batch_size", whole),
    "prior_generation_precision": Rule(),
    "rank": Rule("train.lora.rank", whole, sets=("train.lora.alpha",), about="alpha is equal"),
}
_LOSS = Rule(sets=("train.objective.name",), about="`sigmoid` is `dpo`; `hinge`; not `ipo`")
SD15_RULES = {**_DIFFUSERS, "loss_type": _LOSS}
_TURBO = Rule(switch=True, sets=("train.timesteps",), about="249, 499, 749, 999 alone")
SDXL_RULES = {**_DIFFUSERS, "is_turbo": _TURBO}
MAPO_RULES = {
    **COMMON,
    **_LATER,
    "vae_encode_batch_size": Rule("prepare.batch_size", whole),
    "beta_mapo": Rule("train.objective.beta", number),
    "snr_value": Rule("train.objective.snr", number),
    "label_noise_prob": Rule(
        "data.flip_rate", number, note="the same pairs stay flipped; there they are drawn each time"
    ),
    "remove_ties": Rule(harmless=("true", "1"), refuse="ties are always left out"),
    "lora_rank": Rule("train.lora.rank", whole, sets=("train.lora.alpha",), about="alpha is equal"),
}
SALESFORCE_RULES = {
    **COMMON,
    "split": Rule("data.split"),
    "beta_dpo": Rule(read=number, sets=("train.objective.beta",), about="half of it"),
    "sdxl": Rule(
        switch=True,
        sets=("train.optim.name", "train.gradient_checkpointing", "prepare.resolution"),
        about="`adafactor`, `true`, 1024 (else 512)",
    ),
    "sft": Rule(switch=True, sets=("train.objective.name", "train.objective.beta"), about="`sft`"),
    "use_adafactor": Rule(switch=True, sets=("train.optim.name",), about="`adafactor`"),
    "proportion_empty_prompts": Rule("train.empty_prompt_rate", number),
    "tracker_project_name": Rule(),
    "hard_skip_resume": Rule(switch=True),
    "caption_column": Rule(harmless=("caption",), refuse="the column is caption"),
    "image_column": Rule(),
    "dataset_config_name": Rule(refuse="data sets are read by files, not configurations"),
    "train_data_dir": Rule(refuse="imagefolder has no pairs: see data.source"),
    "noise_offset": Rule(harmless=("0", "0.0"), refuse="noise has no offset"),
    "input_perturbation": Rule(harmless=("0", "0.0"), refuse="inputs are not perturbed"),
    "unet_init": Rule(refuse="make it the UNet of the folder that model.path names"),
    "choice_model": Rule(refuse="labels are decided before training, not while it runs"),
    "dreamlike_pairs_only": Rule(refuse="filter the data set before", switch=True),
}


@dataclass(frozen=True)
class Script:
    """A training script.

    Attributes:
        name: What `--trainer` calls it.
        files: File names it has.
        rules: What becomes of its options.
        defaults: Its parser's defaults, where they are not ours.
        finish: Sets what depends on several options.
    """

    name: str
    files: tuple[str, ...]
    rules: Mapping[str, Rule]
    defaults: Mapping[str, str]
    finish: Callable[[Given, Draft], None]


_LATER_DEFAULTS = {
    **{"learning_rate": "5e-4", "lr_scheduler": "constant", "train_batch_size": "4"},
    **{"dataset_split_name": "validation", "num_train_epochs": "1", "dataloader_num_workers": "0"},
    "lr_warmup_steps": "500",
    "resolution": "1024",
}


def convert_script(script: Script, launch: Launch, *, processes: int | None, draft: Draft) -> None:
    """Puts a launch of a script into a draft.

    Args:
        script: The script.
        launch: Its launch.
        processes: How many processes train; None: as the launcher says, else one.
        draft: What to fill.
    """
    given = {**script.defaults, **launch.arguments}
    if launch.options.get("mixed_precision") and "mixed_precision" not in launch.arguments:
        given["mixed_precision"] = launch.options["mixed_precision"]
    given.setdefault("mixed_precision", "no")
    count = processes or launch.processes or 1
    apply_rules(script.rules, given, draft)
    _common(given, count, draft)
    _launcher(launch, count, draft)
    script.finish(given, draft)


def _common(given: Given, processes: int, draft: Draft) -> None:
    """What follows from several of the shared options."""
    keys = draft.keys
    name = str(keys.get("data.path", "")).lower()
    keys["data.source"] = next((s for part, s in SOURCES.items() if part in name), "pickapic")
    keys["prepare.cache_dir"] = f"caches/{PurePosixPath(str(keys['train.output_dir'])).name}"
    keys["prepare.buckets"] = False
    if "max_train_steps" in given:
        keys.pop("train.epochs", None)
    if keys["train.optim.schedule"] == "constant":
        keys["train.optim.warmup_steps"] = 0
    if "scale_lr" in given and truth(given["scale_lr"]):
        each = keys["train.micro_batch_size"] * keys.get("train.accumulation_steps", 1)
        keys["train.optim.lr"] *= each * processes
        draft.notes.append(
            f"--scale_lr: the rate is times {each} pairs and {processes} process(es); give "
            "--processes if others train"
        )
    betas = [
        read_option(given, f"adam_beta{i}", default, number)
        for i, default in ((1, 0.9), (2, 0.999))
    ]
    if betas != [0.9, 0.999]:
        keys["train.optim.betas"] = betas
    if "use_8bit_adam" in given and truth(given["use_8bit_adam"]):
        keys["train.optim.name"] = "adamw_8bit"
    xformers = "enable_xformers_memory_efficient_attention"
    if xformers in given and truth(given[xformers]):
        keys["train.attention"] = "xformers"
    if "no_hflip" not in given:
        draft.notes.append("images are not flipped: they are encoded once")


def _launcher(launch: Launch, processes: int, draft: Draft) -> None:
    """What the launcher's own options say."""
    options = launch.options
    if "use_fsdp" in options:
        draft.refused.append("--use_fsdp (processes share weights by train.deepspeed: zero3)")
    if "use_deepspeed" in options or "zero_stage" in options:
        stage = options.get("zero_stage") or "2"
        draft.keys["train.deepspeed"] = f"zero{stage}" if stage in ("1", "2", "3") else stage
    if options.get("deepspeed_config_file"):
        draft.keys["train.deepspeed"] = options["deepspeed_config_file"]
    if "config_file" in options:
        draft.notes.append(
            f"--config_file {options['config_file']}: of accelerate, not read; its processes, "
            "precision and DeepSpeed are launcher options, train.precision and train.deepspeed here"
        )
    if processes > 1:
        draft.notes.append(
            f"launch: torchrun --nproc_per_node {processes} -m fastpo.train CONFIG (of several "
            "nodes: processes of each)"
        )


def _lora(given: Given, draft: Draft, rank: str, default: int) -> None:
    value = read_option(given, rank, default, whole)
    draft.keys |= {
        "train.method": "lora",
        "train.lora.rank": value,
        "train.lora.alpha": float(value),
    }


def _diffusers(factor: float, default: float) -> Callable[[Given, Draft], None]:
    """Sets the objective of a diffusers script, whose logit is `factor * beta_dpo * d`."""

    def finish(given: Given, draft: Draft) -> None:
        _lora(given, draft, "rank", 4)
        loss = given.get("loss_type") or "sigmoid"
        if loss == "ipo":
            draft.refused.append(
                "--loss_type ipo (it reads an argument that the script does not define; ours is "
                "objective ipo with tau)"
            )
        elif loss not in ("sigmoid", "hinge"):
            draft.refused.append(f"--loss_type {loss} (unknown)")
        draft.keys["train.objective.name"] = "hinge" if loss == "hinge" else "dpo"
        beta = read_option(given, "beta_dpo", default, number)
        draft.keys["train.objective.beta"] = factor * beta
        if "is_turbo" in given and truth(given["is_turbo"]):
            draft.keys["train.timesteps"] = {"kind": "list", "values": TURBO_STEPS}
        draft.notes.append("ties are left out; there the first image of a tie is the winner")

    return finish


def _salesforce(given: Given, draft: Draft) -> None:
    keys = draft.keys
    sdxl = "sdxl" in given and truth(given["sdxl"])
    keys["train.method"] = "full"
    if "sft" in given and truth(given["sft"]):
        keys["train.objective.name"] = "sft"
    else:
        keys["train.objective.name"] = "dpo"
        keys["train.objective.beta"] = 0.5 * read_option(given, "beta_dpo", 5000.0, number)
    if sdxl or ("use_adafactor" in given and truth(given["use_adafactor"])):
        keys["train.optim.name"] = "adafactor"
    if sdxl:
        keys["train.gradient_checkpointing"] = True
    keys.setdefault("prepare.resolution", 1024 if sdxl else 512)
    keys["train.attention"] = "xformers"
    draft.notes.append(
        "train.attention: xformers, which that script requires; sdpa needs no package"
    )


def _mapo(method: str) -> Callable[[Given, Draft], None]:
    def finish(given: Given, draft: Draft) -> None:
        draft.keys["train.objective.name"] = "mapo"
        if method == "lora":
            _lora(given, draft, "lora_rank", 8)
        else:
            draft.keys["train.method"] = "full"

    return finish


SCRIPTS = (
    Script(
        "diffusers-sd15",
        ("train_diffusion_dpo.py",),
        SD15_RULES,
        {**_LATER_DEFAULTS, "resolution": "512"},
        _diffusers(1.0, 2500.0),
    ),
    Script(
        "diffusers-sdxl",
        ("train_diffusion_dpo_sdxl.py",),
        SDXL_RULES,
        _LATER_DEFAULTS,
        _diffusers(0.5, 5000.0),
    ),
    Script(
        "salesforce",
        ("train.py",),
        SALESFORCE_RULES,
        {
            **{"learning_rate": "1e-8", "lr_scheduler": "constant_with_warmup"},
            **{"lr_warmup_steps": "500", "max_train_steps": "2000", "train_batch_size": "1"},
            **{"output_dir": "sd-model-finetuned", "mixed_precision": "fp16"},
            **{"proportion_empty_prompts": "0.2", "dataloader_num_workers": "0"},
        },
        _salesforce,
    ),
    Script(
        "mapo", ("train.py",), MAPO_RULES, {**_LATER_DEFAULTS, "output_dir": "mapo"}, _mapo("full")
    ),
    Script(
        "mapo-lora",
        ("train_with_lora.py",),
        MAPO_RULES,
        {**_LATER_DEFAULTS, "output_dir": "mapo"},
        _mapo("lora"),
    ),
)
