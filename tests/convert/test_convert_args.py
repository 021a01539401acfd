"""Launch commands as their authors give them, as configurations that `fastpo plan` accepts."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fastpo.cli import main
from fastpo.config import Config, load_config
from fastpo.convert.command import NAMES, convert, find_script
from fastpo.convert.launch import read_launch
from fastpo.errors import ConfigError
from fastpo.plan import make_plan
from fastpo.plan.architecture import resolve_architecture
from fastpo.testing import tiny_sd15_folder, tiny_sdxl_folder

MODELS = """export MODEL_NAME="{model}"
export VAE="madebyollin/sdxl-vae-fp16-fix"
export DATASET_NAME="yuvalkirstain/pickapic_v2"
"""
SHARED = """ \\
  --dataset_name=$DATASET_NAME \\
  --train_batch_size=1 \\
  --dataloader_num_workers=16 \\
  --gradient_accumulation_steps=128 \\
  --max_train_steps=2000 \\
  --learning_rate=1e-8 --scale_lr \\
  --cache_dir="/export/share/datasets/vision_language/pick_a_pic_v2/" \\
  --lr_scheduler="constant_with_warmup" \\
  --beta_dpo 5000"""
SALESFORCE_SD15 = (
    MODELS.format(model="runwayml/stable-diffusion-v1-5")
    + "\n# Paper used 2048.\naccelerate launch train.py --pretrained_model_name_or_path=$MODEL_NAME"
    + SHARED
    + ' --lr_warmup_steps=500 --checkpointing_steps 500 \\\n   --output_dir="tmp-sd15"\n'
)
SALESFORCE_SDXL = (
    MODELS.format(model="stabilityai/stable-diffusion-xl-base-1.0")
    + "accelerate launch train.py --pretrained_model_name_or_path=$MODEL_NAME \\\n"
    + "  --pretrained_vae_model_name_or_path=$VAE"
    + SHARED
    + ' --lr_warmup_steps=200 --checkpointing_steps 200 \\\n   --sdxl  \\\n --output_dir="tmp-sdxl"'
)
SCRIPT = """accelerate launch {script} \\
  --pretrained_model_name_or_path={model}  \\
  --output_dir="{out}" \\
  --mixed_precision="fp16" \\
  --dataset_name=kashif/pickascore \\
  --train_batch_size=8 \\
  --gradient_accumulation_steps=2 \\
  --gradient_checkpointing \\
  --use_8bit_adam \\
  --learning_rate=1e-5 \\
  --lr_scheduler="constant" \\
  --lr_warmup_steps=0 \\
  --max_train_steps=2000 \\
  --checkpointing_steps=500 \\
  --seed="0" """
SD15, SDXL = "runwayml/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0"
EXTRA = (
    '--rank=8 --report_to="wandb" --run_validation --validation_steps=50 --report_to="wandb" '
    "--push_to_hub"
)
VAE = "--pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix"
COMMANDS = {
    "salesforce-sd15": SALESFORCE_SD15,
    "salesforce-sdxl": SALESFORCE_SDXL,
    "diffusers-sd15": SCRIPT.format(
        script="train_diffusion_dpo.py", model=SD15, out="diffusion-dpo"
    )
    + f"--resolution=512 {EXTRA}",
    "diffusers-sdxl": SCRIPT.format(
        script="train_diffusion_dpo_sdxl.py", model=SDXL, out="diffusion-sdxl-dpo"
    )
    + f"{VAE} {EXTRA}",
    "mapo": SCRIPT.format(script="train.py", model=SDXL, out="mapo") + VAE,
    "mapo-lora": SCRIPT.format(script="train_with_lora.py", model=SDXL, out="mapo")
    + f"{VAE} --lora_rank=8",
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    folder = tmp_path_factory.mktemp("converted")
    for name, command in COMMANDS.items():
        convert(command, folder / f"{name}.yaml")
    return {name: load_config(folder / f"{name}.yaml") for name in COMMANDS}


def test_salesforce_s_launchers(converted: dict[str, Config]) -> None:
    sd15, sdxl = converted["salesforce-sd15"], converted["salesforce-sdxl"]
    for config in (sd15, sdxl):
        train = config.train
        assert train.method == "full" and train.objective.name == "dpo"
        assert train.objective.beta == 2500.0 and train.empty_prompt_rate == 0.2
        assert (train.micro_batch_size, train.accumulation_steps) == (1, 128)
        assert train.optim.lr == pytest.approx(1.28e-6) and train.max_steps == 2000
        assert train.optim.schedule == "constant_with_warmup" and train.precision == "fp16"
        assert config.data.path == "yuvalkirstain/pickapic_v2" and not config.prepare.buckets
    assert (sd15.train.optim.name, sdxl.train.optim.name) == ("adamw", "adafactor")
    assert (sd15.prepare.resolution, sdxl.prepare.resolution) == (512, 1024)
    assert (sd15.train.optim.warmup_steps, sdxl.train.optim.warmup_steps) == (500, 200)
    assert sdxl.train.gradient_checkpointing and not sd15.train.gradient_checkpointing
    assert sdxl.model.vae == "madebyollin/sdxl-vae-fp16-fix" and sd15.model.path == SD15


def test_diffusers_scripts_read_one_flag_two_ways(converted: dict[str, Config]) -> None:
    sd15, sdxl = converted["diffusers-sd15"], converted["diffusers-sdxl"]
    assert sd15.train.objective.beta == sdxl.train.objective.beta == 2500.0
    assert sd15.prepare.resolution == 512 and sdxl.prepare.resolution == 1024
    for config in (sd15, sdxl):
        assert config.train.method == "lora" and config.train.optim.name == "adamw_8bit"
        assert config.train.lora.rank == 8 and config.train.lora.alpha == 8.0
        assert config.data.split == "validation" and config.train.trackers == ("wandb",)
        assert config.train.optim.warmup_steps == 0 and config.seed == 0


def test_mapo_s_scripts(converted: dict[str, Config]) -> None:
    full, lora = converted["mapo"], converted["mapo-lora"]
    for config in (full, lora):
        objective = config.train.objective
        assert objective.name == "mapo" and (objective.beta, objective.snr) == (0.1, 0.5)
        assert config.train.gradient_checkpointing and config.train.checkpoint_every == 500
    assert (full.train.method, lora.train.method) == ("full", "lora")


def test_the_planner_knows_their_models(converted: dict[str, Config]) -> None:
    families = {name: resolve_architecture(one).family for name, one in converted.items()}
    assert {name for name, family in families.items() if family == "sd15"} == {
        *("salesforce-sd15", "diffusers-sd15")
    }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models to put in the place of SD1.5 and SDXL, whose passes take minutes to count."""
    folder = tmp_path_factory.mktemp("tiny")
    return {
        "sd15": tiny_sd15_folder(folder / "sd15"),
        "sdxl": tiny_sdxl_folder(folder / "sdxl"),
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_plan_accepts_it(converted: dict[str, Config], tiny: dict[str, Path], name: str) -> None:
    config = converted[name]
    model = {"path": str(tiny[resolve_architecture(config).family]), "vae": None}
    small = config.model_copy(
        update={
            "model": config.model.model_copy(update=model),
            "prepare": config.prepare.model_copy(update={"resolution": 32}),
        }
    )
    planned = make_plan(small, gpu="h100", world_size=8, pairs=100_000)
    assert planned.method == config.train.method and planned.verdict
    assert planned.objective == config.train.objective.name


def test_what_cannot_be_carried_over_is_named_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out.yaml"
    command = f"{SALESFORCE_SD15.strip()} --random_crop --choice_model hps --noise_offset 0.1 --new"
    with pytest.raises(ConfigError) as refused:
        convert(command, out)
    text = str(refused.value)
    assert text.startswith("salesforce: cannot carry over: ") and "\n" not in text
    for name in ("--random_crop", "--choice_model", "--noise_offset", "--new (unknown"):
        assert name in text
    assert not out.exists()
    convert(f"{SALESFORCE_SD15.strip()} --noise_offset 0", out)
    ipo = f"{COMMANDS['diffusers-sd15']} --loss_type ipo"
    with pytest.raises(ConfigError, match="--loss_type ipo"):
        convert(ipo, tmp_path / "ipo.yaml")
    with pytest.raises(ConfigError, match="--lr_num_cycles"):
        convert(f"{COMMANDS['mapo']} --lr_num_cycles 3", tmp_path / "cycles.yaml")


def test_options_that_depend_on_others(tmp_path: Path) -> None:
    def made(command: str, name: str, **options: int | str) -> Config:
        convert(command, tmp_path / f"{name}.yaml", **options)
        return load_config(tmp_path / f"{name}.yaml")

    launcher = "accelerate launch --multi_gpu --num_processes 16 --mixed_precision bf16"
    several = made(
        SALESFORCE_SD15.replace("accelerate launch", launcher) + " --mixed_precision bf16", "a"
    )
    assert several.train.optim.lr == pytest.approx(2.048e-5) and several.train.precision == "bf16"
    assert made(SALESFORCE_SD15, "b", processes=4).train.optim.lr == pytest.approx(5.12e-6)
    text = (tmp_path / "a.yaml").read_text()
    assert "torchrun --nproc_per_node 16" in text and text.startswith("# From salesforce:")
    hinge = made(f"{COMMANDS['diffusers-sd15']} --loss_type hinge --beta_dpo 100", "c")
    assert hinge.train.objective.name == "hinge" and hinge.train.objective.beta == 100.0
    turbo = made(f"{COMMANDS['diffusers-sdxl']} --is_turbo --resolution 512", "d")
    assert turbo.train.timesteps.kind == "list" and turbo.prepare.resolution == 512
    sft = made(f"{SALESFORCE_SD15.strip()} --sft --adam_beta2 0.99", "e")
    assert sft.train.objective.name == "sft" and sft.train.optim.betas == (0.9, 0.99)
    style = made(COMMANDS["mapo"], "f", data="mapo-t2i/pick-style-cartoon")
    assert style.data.source == "pickstyle"
    stage = COMMANDS["mapo"].replace("launch", "launch --use_deepspeed --zero_stage 3")
    stage = stage.replace('"fp16"', '"bf16"').replace("--use_8bit_adam", "")
    with pytest.raises(ConfigError, match=r"fp16 does not work with train\.deepspeed"):
        made(stage.replace('"bf16"', '"fp16"'), "fp16", trainer="mapo")
    assert made(stage, "g", trainer="mapo").train.deepspeed == "zero3"
    noisy = made(f"{COMMANDS['mapo']} --label_noise_prob 0.2 --snr_value 0.3", "h")
    assert noisy.data.flip_rate == 0.2 and noisy.train.objective.snr == 0.3


def test_launches_are_taken_apart() -> None:
    launch = read_launch(
        "A=3\nCUDA_VISIBLE_DEVICES=0 torchrun --nproc_per_node=$A dir/x.py --b -1.5 -c"
    )
    assert launch.script == "x.py" and launch.processes == 3
    assert launch.arguments == {"b": "-1.5", "c": None}
    with pytest.raises(ConfigError, match=r"uses \$MODEL, which it does not set"):
        read_launch("accelerate launch train.py --model $MODEL")
    with pytest.raises(ConfigError, match="no launch of a script"):
        read_launch("ls -l")
    with pytest.raises(ConfigError, match="empty"):
        read_launch("# nothing\n")


def test_scripts_of_one_name_are_told_by_their_options() -> None:
    assert find_script(read_launch(COMMANDS["mapo"])).name == "mapo"
    assert find_script(read_launch(SALESFORCE_SDXL)).name == "salesforce"
    plain = read_launch("accelerate launch train.py --seed 0")
    with pytest.raises(ConfigError, match="salesforce and mapo by its name"):
        find_script(plain)
    assert find_script(plain, "mapo").name == "mapo"
    with pytest.raises(ConfigError, match="none of the known trainers"):
        find_script(read_launch("python other.py"))
    with pytest.raises(ConfigError, match="'x' is none of"):
        find_script(plain, "x")


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, script = tmp_path / "out.yaml", tmp_path / "sdxl.sh"
    script.write_text(SALESFORCE_SDXL)
    with pytest.raises(SystemExit) as ended:
        main(["convert-args", str(script), str(out)])
    assert ended.value.code == 0
    told = capsys.readouterr()
    assert told.out.strip() == str(out) and "--scale_lr" in told.err
    assert yaml.safe_load(out.read_text())["train"]["objective"] == {"name": "dpo", "beta": 2500.0}
    with pytest.raises(SystemExit) as ended:
        main(["convert-args", SALESFORCE_SDXL, str(out)])
    assert ended.value.code == 2 and "exists and is not replaced" in capsys.readouterr().err


def test_the_page_names_every_trainer() -> None:
    page = (Path(__file__).parents[2] / "docs" / "from-your-trainer.md").read_text()
    assert all(f"`{name}`" in page for name in NAMES)
