"""Whatever an option's value is, it is read or refused in one line that names the option."""

from __future__ import annotations

import ast
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastpo.cli import main
from fastpo.convert import flow_factory, rules, simpletuner_options
from fastpo.convert.command import MOST_BYTES, convert
from fastpo.convert.rules import MOST, Rule, number, positive, read_value, whole
from fastpo.convert.scripts import SCRIPTS
from fastpo.errors import ConfigError
from tests.convert.test_convert_args import COMMANDS, SALESFORCE_SD15
from tests.convert.test_trainer_configs import FACTORY, FLOW_DPO, SIMPLETUNER

RULES: Mapping[str, Mapping[str, Rule]] = {
    **{script.name: script.rules for script in SCRIPTS},
    simpletuner_options.NAME: simpletuner_options.RULES,
    flow_factory.NAME: flow_factory.RULES,
}
LAUNCHES = {**COMMANDS, "salesforce": SALESFORCE_SD15.strip()}
BAD = ("abc", "", "nan", "1e999")


def takes_numbers(rule: Rule) -> bool:
    try:
        value = rule.read("1")
    except (ValueError, KeyError):
        return False
    return all(isinstance(v, int | float) for v in (value if isinstance(value, list) else [value]))


def settings(trainer: str, name: str, value: Any) -> tuple[str, dict[str, str]]:
    """A working launch or configuration of a trainer with one option changed."""
    if trainer == simpletuner_options.NAME:
        base = {**SIMPLETUNER, **FLOW_DPO, name: value}
        text = {n: v if isinstance(v, str) else json.dumps(v) for n, v in base.items()}
        options = " ".join(f"--{n}={shlex.quote(v)}" for n, v in text.items())
        return f"simpletuner train {options}", {"data": "data/mine"}
    if trainer == flow_factory.NAME:
        raw = json.loads(json.dumps(FACTORY))
        section, dot, key = name.rpartition(".")
        (raw["optimizers"][0] if section == "optimizers" else raw[section] if dot else raw)[key] = (
            value
        )
        return yaml.safe_dump(raw), {"file": "default.yaml"}
    return f"{LAUNCHES[trainer]} --{name}={shlex.quote(value)}", {"trainer": trainer}


@pytest.mark.parametrize("value", BAD, ids=[repr(value) for value in BAD])
@pytest.mark.parametrize("trainer", RULES)
def test_a_value_that_is_no_number_is_refused_by_its_option_s_name(
    tmp_path: Path, trainer: str, value: str
) -> None:
    """Of numeric options always; of all others it may be a name, but never ends otherwise."""
    passed, unnamed = [], []
    for name, rule in RULES[trainer].items():
        if not takes_numbers(rule) and value != BAD[0]:
            continue
        out = tmp_path / "out.yaml"
        text, options = settings(trainer, name, value)
        try:
            convert(text, out, **options)
        except ConfigError as error:
            told = str(error)
            assert "\n" not in told and not out.exists()
            if takes_numbers(rule) and name not in told:
                unnamed.append(told)
            continue
        out.unlink()
        if takes_numbers(rule):
            passed.append(name)
    assert (passed, unnamed) == ([], [])


def test_what_is_numeric_is_known_to_be() -> None:
    found = {
        trainer: {n for n, r in rules.items() if takes_numbers(r)}
        for trainer, rules in RULES.items()
    }
    assert {"beta_dpo", "adam_beta2", "learning_rate", "rank", "seed"} <= found["diffusers-sd15"]
    assert {"beta_dpo", "adam_beta1", "proportion_empty_prompts"} <= found["salesforce"]
    assert {"beta_mapo", "snr_value", "lora_rank", "label_noise_prob"} <= found["mapo-lora"]
    assert {"lora_alpha", "ema_decay", "lr_power", "snr_gamma", "validation_steps"} <= found[
        "simpletuner"
    ]
    assert {"train.beta", "train.time_shift", "num_processes", "train.adam_betas"} <= found[
        "flow-factory"
    ]


def test_no_text_is_read_past_the_one_place_that_names_the_option() -> None:
    for file in sorted(Path(rules.__file__).parent.glob("*.py")):
        for call in ast.walk(ast.parse(file.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in ("int", "float"):
                argument = ast.unparse(call.args[0])
                assert not any(part in argument for part in ("given", "get(", "config", "raw")), (
                    f"{file.name}:{call.lineno}: {ast.unparse(call)}"
                )


NESTED = {
    "a slope in a mapping": (
        {**SIMPLETUNER, **FLOW_DPO, "distillation_config": {"flow_dpo": {"beta": "x"}}},
        *("config.json", r"flow_dpo\.beta: 'x'"),
    ),
    "no mapping": (
        {**SIMPLETUNER, **FLOW_DPO, "distillation_config": "a: ["},
        *("config.json", "distillation_config: 'a: ' is no|distillation_config: 'a: \\['"),
    ),
    "part of a text": (
        {**SIMPLETUNER, "optimizer_config": "weight_decay=abc"},
        *("config.json", "optimizer_config weight_decay: 'abc'"),
    ),
    "one of a list": (
        {**SIMPLETUNER, **FLOW_DPO, "flow_custom_timesteps": "801,x"},
        *("config.json", "flow_custom_timesteps: '801,x'"),
    ),
    "a shell's quotes": (
        'export TRAINER_EXTRA_ARGS="--seed \'1"',
        *("config.env", "TRAINER_EXTRA_ARGS: "),
    ),
    "a data set's limit": (
        {
            **FACTORY,
            "data": {"datasets": [{"dataset_dir": "d", "train": {"max_dataset_size": "x"}}]},
        },
        *("default.yaml", r"data\.datasets\.0\.train\.max_dataset_size: 'x'"),
    ),
    "a shift of zero": ({"time_shift": 0}, "train", r"train\.time_shift: '0'"),
    "one bound": ({"timestep_range": [1, 2]}, "train", r"train\.timestep_range: '\[1, 2\]'"),
    "three sides": ({"resolution": [8, 8, 8]}, "train", r"train\.resolution: '\[8, 8, 8\]'"),
    "a broken list": ({"target_modules": "a: ["}, "model", r"model\.target_modules: 'a: \['"),
    "an unknown logger": ({"logging_backend": "swanlab"}, "log", "log.logging_backend: 'swanlab'"),
}


@pytest.mark.parametrize(("raw", "file", "told"), NESTED.values(), ids=NESTED)
def test_so_is_one_within_another(tmp_path: Path, raw: Any, file: str, told: str) -> None:
    if file in FACTORY:
        raw, file = {**FACTORY, file: {**FACTORY[file], **raw}}, "default.yaml"
    text = raw if isinstance(raw, str) else json.dumps(raw)
    with pytest.raises(ConfigError, match=told) as refused:
        convert(text, tmp_path / "out.yaml", file=file, data=None if "yaml" in file else "mine")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("count", "told"), [("abc", "'abc' is no value"), ("0", "0 processes")])
def test_a_launcher_s_processes_are_a_number(tmp_path: Path, count: str, told: str) -> None:
    command = SALESFORCE_SD15.replace("launch", f"launch --num_processes {count}")
    with pytest.raises(ConfigError, match=f"--num_processes: {told}"):
        convert(command, tmp_path / "out.yaml")
    convert(SALESFORCE_SD15.replace("launch", "launch -n auto"), tmp_path / "auto.yaml")


def test_numbers_by_hand() -> None:
    assert whole("512.0") == 512 and number("-1e-8") == -1e-8 and positive("3") == 3.0
    for read, text in ((whole, "1.5"), (positive, "0"), (number, f"{MOST}1"), (whole, "1e31")):
        with pytest.raises(ConfigError, match=r"--x: .* is no value of it"):
            read_value(read, text, "--x")
    with pytest.raises(ConfigError, match="--x has no value"):
        read_value(number, None, "--x")


def call(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["convert-args", *map(str, arguments)])
    return int(ended.value.code or 0)


@pytest.mark.parametrize("characters", [352, 1 << 13])
def test_a_command_in_one_line_may_be_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], characters: int
) -> None:
    """More than 255 characters between slashes, which no file's name may have."""
    command = "accelerate launch train_diffusion_dpo.py --pretrained_model_name_or_path=model"
    command += " --dataset_name=data --output_dir=out --seed=1"
    command += f" --tracker_name={'x' * (characters - len(command) - 16)}"
    assert "/" not in command and len(command) == characters
    assert call(command, tmp_path / "out.yaml") == 0, capsys.readouterr().err
    assert yaml.safe_load((tmp_path / "out.yaml").read_text())["seed"] == 1


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\x7fELF\xff\xfe\x00", "it is no text"),
        (b"accelerate launch\0 train.py", "it is no text"),
        (b"#" * (MOST_BYTES + 1), "bytes, at most"),
        (b"", "the launch command is empty"),
    ],
    ids=["binary", "zero byte", "large", "empty"],
)
def test_a_file_that_is_no_script_is_told_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, told: str
) -> None:
    script = tmp_path / "run.sh"
    script.write_bytes(content)
    assert call(script, tmp_path / "out.yaml") == 2
    error = capsys.readouterr().err
    assert told in error and error.count("error:") == 1 and "Traceback" not in error
    assert not (tmp_path / "out.yaml").exists()


def test_a_command_with_half_a_character_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it is no text"):
        convert("accelerate launch train.py --output_dir=\udcff", tmp_path / "out.yaml")
