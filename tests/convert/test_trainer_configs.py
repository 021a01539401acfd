"""SimpleTuner's and Flow-Factory's own configurations, as configurations that `plan` accepts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

from fastpo.cli import main
from fastpo.config import Config, load_config
from fastpo.convert.command import convert
from fastpo.errors import ConfigError
from fastpo.plan import make_plan
from fastpo.plan.architecture import resolve_architecture
from fastpo.testing.flow import tiny_sd3_folder

SIMPLETUNER = {
    "base_model_precision": "no_change",
    "checkpoint_step_interval": 50,
    "data_backend_config": "config/examples/multidatabackend-small-dreambooth-1024px.json",
    "disable_bucket_pruning": True,
    "flow_schedule_shift": 3,
    "grad_clip_method": "value",
    "gradient_checkpointing": True,
    "hub_model_id": "simpletuner-example-sd3-peft-lora",
    "learning_rate": "1e-4",
    "lora_alpha": 128,
    "lora_rank": 128,
    "lora_type": "standard",
    "lr_scheduler": "constant",
    "max_train_steps": 100,
    "mixed_precision": "bf16",
    "model_family": "sd3",
    "model_type": "lora",
    "num_train_epochs": 0,
    "optimizer": "adamw_bf16",
    "output_dir": "output/examples/sd3.peft-lora",
    "push_to_hub": False,
    "quantize_via": "cpu",
    "report_to": "none",
    "seed": 42,
    "tracker_run_name": "example-training-run",
    "train_batch_size": 3,
    "use_ema": False,
    "validation_guidance": 1.0,
    "validation_guidance_skip_layers": [7, 8, 9],
    "validation_num_inference_steps": 30,
    "validation_prompt": "a sign that says hello world from sd3",
    "validation_steps": 50,
}
"""The options of its published example for Stable Diffusion 3.5 medium."""
FLOW_DPO = {
    "distillation_method": "flow_dpo",
    "flow_custom_timesteps": "801,694,548,338",
    "flow_timesteps_mode": "round-robin",
    "distillation_config": {
        "flow_dpo": {
            **{"beta": 1.0, "auto_beta": True, "auto_beta_target_gf": 0.2, "norm_type": "sum"},
            **{"auto_beta_decay": 0.99, "mask_dilate": 1, "anchor_alpha": 0.0},
            "sft_loss_weight": 0.0,
        }
    },
}
"""What its page on Flow-DPO sets."""
FACTORY = {
    "launcher": "accelerate",
    "config_file": None,
    "num_processes": 1,
    "main_process_port": 29501,
    "mixed_precision": "bf16",
    "data": {
        "datasets": [
            {
                "name": "offline_preferences",
                "dataset_dir": "dataset/offline_dpo_sd3_5",
                "train": {"weight": 1, "max_dataset_size": 2},
            }
        ],
        **{"enable_preprocess": True, "preprocessing_batch_size": 2, "dataloader_num_workers": 0},
        **{"force_reprocess": False, "sampler_type": "auto", "sampler_subgroup_size": None},
    },
    "model": {
        **{"finetune_type": "lora", "lora_rank": 16, "lora_alpha": 16},
        **{"target_modules": "default", "model_type": "sd3-5", "resume_path": None},
        "model_name_or_path": "stabilityai/stable-diffusion-3.5-medium",
    },
    "log": {
        **{"run_name": "sd3_5_offline_dpo_smoke", "project": "Flow-Factory"},
        **{"logging_backend": "none", "save_dir": "saves/", "save_freq": 0},
    },
    "train": {
        **{"trainer_type": "offline-dpo", "max_epochs": 1, "resolution": 512},
        **{"guidance_scale": 1.0, "per_device_batch_size": 1, "gradient_accumulation_steps": 1},
        **{"beta": 2000.0, "weighting_scheme": "logit_normal", "num_train_timesteps": 1},
        **{"timestep_range": 0.99, "time_shift": 1.0, "logit_mean": 0.0, "logit_std": 1.0},
        **{"ref_param_device": "cpu", "ema_decay": 0.0, "seed": 42},
        "enable_gradient_checkpointing": False,
    },
    "scheduler": {"dynamics_type": "ODE"},
    "eval": {"eval_freq": 0},
    "optimizers": [
        {
            **{"name": "default", "learning_rate": 1.0e-5, "weight_decay": 1.0e-4},
            **{"betas": [0.9, 0.999], "eps": 1.0e-8, "max_grad_norm": 1.0},
        }
    ],
}
"""Its published configuration for offline DPO of Stable Diffusion 3.5 medium."""


def changed(base, section=None, **changes):
    if section is None:
        return {**base, **changes}
    return {**base, section: {**base[section], **changes}}


@pytest.fixture
def made(tmp_path):
    """`made(settings, file)`: the configuration that it becomes, and the file's text."""

    def convert_it(settings, file="config.json", **options) -> tuple[Config, str]:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml"
        text = settings if isinstance(settings, str) else json.dumps(settings, indent=2)
        if file.endswith(".yaml") and not isinstance(settings, str):
            text = yaml.safe_dump(settings)
        convert(text, out, file=file, **options)
        return load_config(out), out.read_text()

    return convert_it


def test_simpletuners_flow_dpo(made):
    """The slope is that of errors summed over the 262,144 elements of a latent of 1024 pixels."""
    config, text = made({**SIMPLETUNER, **FLOW_DPO}, data="data/mine")
    train = config.train
    assert config.model.path == "stabilityai/stable-diffusion-3.5-medium"
    assert (config.data.source, config.data.path) == ("folder", "data/mine")
    assert train.objective.name == "dpo" and train.objective.beta == 0.5 * 16 * 128 * 128
    # beta / 2 of the mean size of the margins is held at -logit(0.2) = ln 4, and so is ours:
    assert 4.0 / math.log(1.0 / train.auto_slope) == pytest.approx(math.log(4.0), rel=1e-5)
    assert train.timesteps.kind == "sigmas" and train.timesteps.values == (
        0.801,
        0.694,
        0.548,
        0.338,
    )
    assert (train.method, train.lora.rank, train.lora.alpha, train.lora.dropout) == (
        *("lora", 128, 128.0),
        0.1,
    )
    assert (train.optim.name, train.optim.lr, train.optim.eps) == ("adamw", 1e-4, 1e-6)
    assert (train.optim.schedule, train.max_steps, train.micro_batch_size) == ("constant", 100, 3)
    assert train.sample_prompts and train.sample_every == 50 and train.checkpoint_every == 50
    assert "auto_beta: both hold the mean size of the logit at 1.39" in " ".join(text.split("\n# "))


def test_its_slope_without_sum_and_without_following(made):
    fixed = {"flow_dpo": {"beta": 500.0, "auto_beta": False, "norm_type": "mean"}}
    settings = {**SIMPLETUNER, "distillation_method": "flow_dpo", "distillation_config": fixed}
    config, _ = made({**settings, "flow_sigmoid_scale": 0.8}, data="data/mine")
    assert config.train.objective.beta == 250.0 and config.train.auto_slope is None
    assert config.train.timesteps.kind == "logit_normal" and config.train.timesteps.std == 0.8
    assert config.train.flow_shift == 3.0


def test_its_supervised_training_is_the_objective_sft(made):
    config, text = made(SIMPLETUNER, data="data/mine")
    assert config.train.objective.name == "sft" and "on the winners of the pairs" in text
    lower = made({**SIMPLETUNER, "base_model_precision": "int8-quanto"}, data="data/mine")[0]
    assert lower.train.quantize_base == "8bit"


def test_its_other_forms_say_the_same(made):
    """A JSON file with dashes and a last comma, variables of the shell, and a command."""
    expected, _ = made(SIMPLETUNER, data="data/mine")
    dashed = json.dumps({f"--{name}": value for name, value in SIMPLETUNER.items()}, indent=4)
    assert made(dashed.replace("\n}", ",\n}"), data="data/mine")[0] == expected
    names = {"max_train_steps": "MAX_NUM_STEPS", "seed": "TRAINING_SEED"}
    plain = {n: v for n, v in SIMPLETUNER.items() if not isinstance(v, list | bool)}
    lines = [
        f"export {names.get(name, name.upper())}='{value}'"
        for name, value in plain.items()
        if name not in ("lora_rank", "lora_alpha", "flow_schedule_shift", "validation_steps")
    ]
    lines += ['TRAINER_EXTRA_ARGS="--lora_rank=128 --lora_alpha=128 --flow_schedule_shift=3"']
    lines += ["export VALIDATION_STEPS=50", "export USE_GRADIENT_CHECKPOINTING=true"]
    assert made("\n".join(lines), "config.env", data="data/mine")[0] == expected
    options = " ".join(f"--{name}='{value}'" for name, value in plain.items())
    assert made(f"simpletuner train {options}", "", data="data/mine")[0] == expected


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lora_type": "lycoris"}, r"lora_type \(adapters are LoRA, not LyCORIS\)"),
        ({"model_family": "wan"}, r"model_family wan \(FastPO trains sd1x, sdxl"),
        ({"model_flavour": "tiny"}, r"model_flavour tiny \(give pretrained_model"),
        ({"optimizer": "soap"}, r"optimizer soap \(one of adamw_bf16"),
        ({"base_model_precision": "int2-quanto"}, "base_model_precision int2-quanto"),
        ({"distillation_method": "dmd"}, "distillation_method dmd"),
        ({"controlnet": True}, r"controlnet \("),
        ({"crepa_enabled": True}, r"crepa_enabled \(unknown"),
        ({**FLOW_DPO, "model_type": "full"}, r"flow_dpo \(it is of LoRA"),
        (
            {**FLOW_DPO, "distillation_config": {"flow_dpo": {"anchor_alpha": 0.1}}},
            r"flow_dpo\.anchor_alpha",
        ),
    ],
)
def test_what_simpletuner_has_more_is_refused_by_name(made, changes, told):
    with pytest.raises(ConfigError, match=rf"^simpletuner: cannot carry over: .*{told}"):
        made({**SIMPLETUNER, **changes}, data="data/mine")


def test_its_data_must_be_named(made):
    with pytest.raises(ConfigError, match=r"data_backend_config config/examples/.* --data"):
        made({**SIMPLETUNER, **FLOW_DPO})


def test_flow_factorys_offline_dpo(made):
    config, text = made(FACTORY, "default.yaml")
    train = config.train
    assert (config.data.source, config.data.path) == ("folder", "dataset/offline_dpo_sd3_5")
    assert config.data.limit == 2 and "fastpo pairs dataset/offline_dpo_sd3_5/train.jsonl" in text
    assert train.objective.name == "dpo" and train.objective.beta == 1000.0
    assert (train.lora.rank, train.lora.alpha) == (16, 16.0) and "add_q_proj" in str(train.lora)
    assert (train.min_timestep, train.max_timestep, train.flow_shift) == (10, None, 1.0)
    assert (train.timesteps.kind, train.timesteps.mean, train.timesteps.std) == (
        *("logit_normal", 0.0),
        1.0,
    )
    assert (train.optim.lr, train.optim.weight_decay, train.optim.betas) == (
        1e-5,
        1e-4,
        (0.9, 0.999),
    )
    assert config.prepare.resolution == 512 and not config.prepare.buckets
    assert str(train.output_dir) == "saves/sd3_5_offline_dpo_smoke" and config.seed == 42
    assert train.ema_decay is None and train.epochs == 1


def test_its_fraction_of_the_way_runs_against_ours(made):
    """There 0 is noise alone: a mean toward the image is negative here, a shift its inverse."""
    settings = changed(FACTORY, "train", logit_mean=0.5, time_shift=4.0, timestep_range=[0.1, 0.9])
    settings = changed(settings, config_file="config/deepspeed/deepspeed_zero2.yaml")
    config, text = made({**settings, "num_processes": 8}, "default.yaml")
    train = config.train
    assert (train.timesteps.mean, train.flow_shift) == (-0.5, 0.25)
    assert (train.min_timestep, train.max_timestep) == (100, 900)
    assert train.deepspeed == "zero2" and "torchrun --nproc_per_node 8" in text


@pytest.mark.parametrize(
    ("section", "changes", "told"),
    [
        ("train", {"trainer_type": "grpo"}, r"train\.trainer_type grpo"),
        ("train", {"num_train_timesteps": 4}, r"train\.num_train_timesteps \(a visit"),
        ("train", {"resolution": [512, 768]}, r"train\.resolution \[512, 768\]"),
        ("train", {"new_key": 1}, r"train\.new_key \(unknown"),
        ("model", {"model_type": "wan2_t2v"}, r"model\.model_type wan2_t2v"),
        ("model", {"target_modules": "all"}, r"model\.target_modules all"),
        ("data", {"datasets": []}, r"data\.datasets \(none"),
        (None, {"optimizers": [{}, {}]}, r"optimizers \(one"),
    ],
)
def test_what_flow_factory_has_more_is_refused_by_name(made, section, changes, told):
    with pytest.raises(ConfigError, match=rf"^flow-factory: cannot carry over: .*{told}"):
        made(changed(FACTORY, section, **changes), "default.yaml")


def test_several_data_sets_stay_several(made):
    both = [{"name": name, "dataset_dir": f"dataset/{name}"} for name in ("a", "b")]
    config, _ = made(changed(FACTORY, "data", datasets=both), "default.yaml")
    assert [one.path for one in config.data.sources] == ["dataset/a", "dataset/b"]
    assert made(FACTORY, "x.yaml", data="org/pickapic")[0].data.source == "pickapic"


def test_plan_accepts_them(made, tmp_path):
    """With a tiny model in the place of SD3.5, whose passes take long to count."""
    tiny = tiny_sd3_folder(tmp_path / "sd3")
    simple, _ = made({**SIMPLETUNER, **FLOW_DPO}, data="data/mine")
    factory, _ = made(FACTORY, "default.yaml")
    for config in (simple, factory):
        assert resolve_architecture(config).family == "sd3"
        small = config.model_copy(
            update={
                "model": config.model.model_copy(update={"path": str(tiny)}),
                "prepare": config.prepare.model_copy(update={"resolution": 32}),
            }
        )
        planned = make_plan(small, gpu="h100", world_size=8, pairs=100_000)
        assert planned.method == "lora" and planned.verdict


def test_files_on_the_command_line(tmp_path, capsys):
    file, out = tmp_path / "default.yaml", tmp_path / "out.yaml"
    file.write_text(yaml.safe_dump(FACTORY))
    with pytest.raises(SystemExit) as ended:
        main(["convert-args", str(file), str(out)])
    assert ended.value.code == 0 and capsys.readouterr().out.strip() == str(out)
    assert out.read_text().startswith("# From flow-factory: default.yaml\n")
    file.write_text("a: [")
    with pytest.raises(SystemExit) as ended:
        main(["convert-args", str(file), str(Path(tmp_path) / "second.yaml")])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and "flow-factory: the YAML cannot be read" in told
