"""The page's tables of options are current, and say what the conversion does."""

from __future__ import annotations

import json
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fastpo.bench.table import with_section
from fastpo.config import Config
from fastpo.config.fields import keys_of
from fastpo.convert.flow_factory import convert_factory
from fastpo.convert.launch import Launch, read_launch
from fastpo.convert.rules import Draft, Rule
from fastpo.convert.scripts import SCRIPTS, convert_script
from fastpo.convert.simpletuner import convert_simpletuner
from fastpo.convert.simpletuner_options import read_json_options
from fastpo.errors import ConfigError
from tests.convert.test_trainer_configs import FACTORY, FLOW_DPO, SIMPLETUNER
from tests.convert.test_values import LAUNCHES, RULES

SCRIPT = Path(__file__).parents[2] / "scripts" / "update_options.py"
TRIED = (
    *(
        "2",
        "3",
        "0.25",
        "0.75",
        "64",
        "1",
        "true",
        "false",
        "x/y",
        "fp16",
        "bf16",
        "none",
        "tensorboard",
    ),
    *("linear", "constant_with_warmup", "adamw", "optimi-lion", "uniform", "hinge", "full", "area"),
    *("[to_q]", "[0.5, 0.9]", "0.5,0.9", "weight_decay=0.5", "int8-quanto", "klein-4b", "large"),
    *('{"beta": 3.0, "auto_beta": false}', "zero2.yaml", "zero_2.json"),
)
"""Values, of which each option takes some."""
FOLLOWS = {
    "train_batch_size": ("train.optim.lr",),
    "gradient_accumulation_steps": ("train.optim.lr",),
    "model.finetune_type": ("train.lora.*",),
    "model_type": ("train.lora.*",),
    "validation_prompt": ("train.*", "evaluate.*"),
}
"""What changes with a rate that is times the pairs of a step, and what is read with a prompt."""
NOT_ALONE = {
    *("num_train_epochs", "lr_warmup_steps", "lr_power", "validation_steps", "snr_gamma"),
    *("model_family", "data.datasets", "train.height", "train.width", "resolution_type"),
    *("model.finetune_type", "model_type", "ema_decay", "flow_schedule_auto_shift"),
    *("train.logit_mean", "use_adafactor", "adam_beta1", "adam_beta2"),
}


BASE = {**SIMPLETUNER, **FLOW_DPO}
del BASE["flow_custom_timesteps"], BASE["lora_alpha"]  # which others would be of no effect beside
TUNER = read_json_options(json.dumps(BASE))


def keys(trainer: str, changes: Mapping[str, str | None]) -> dict[str, Any] | None:
    """The keys of a launch or configuration with some options changed; None if it is refused."""
    draft = Draft()
    try:
        if trainer == "simpletuner":
            convert_simpletuner({**TUNER, **changes}, draft, processes=None, data="data/mine")
        elif trainer == "flow-factory":
            raw = json.loads(json.dumps(FACTORY))
            del raw["model"]["lora_alpha"]
            raw["optimizers"] = [{"name": "default"}]
            for name, value in changes.items():
                section, dot, key = name.rpartition(".")
                (raw["optimizers"][0] if section == "optimizers" else raw[section] if dot else raw)[
                    key
                ] = value
            convert_factory(raw, draft, processes=None, data=None)
        else:
            launch = read_launch(LAUNCHES[trainer])
            arguments = {**launch.arguments, **changes}
            launch = Launch(launch.command, launch.script, launch.options, arguments)
            script = next(one for one in SCRIPTS if one.name == trainer)
            convert_script(script, launch, processes=2, draft=draft)
    except ConfigError:
        return None
    return None if draft.refused else draft.keys


def test_the_page_is_current() -> None:
    script = runpy.run_path(str(SCRIPT))
    text = script["PAGE"].read_text()
    expected = with_section(text, script["SECTION"], script["tables"]())
    assert text == expected, "run python scripts/update_options.py"


def test_every_key_of_a_table_is_one_of_the_configuration() -> None:
    known = {key for key, _ in keys_of(Config)}
    known |= {key[:i] for key in known for i, letter in enumerate(key) if letter == "."}
    named = {
        key
        for rules in RULES.values()
        for rule in rules.values()
        for key in (rule.key, *rule.sets)
        if key is not None
    }
    assert named - known == set()


@pytest.mark.parametrize("trainer", RULES)
def test_an_option_changes_the_keys_that_its_row_names_and_no_others(trainer: str) -> None:
    """Every option with every value that it takes; what is said to change nothing does not."""
    before = keys(trainer, {})
    assert before is not None
    wrong, idle = [], []
    for name, rule in RULES[trainer].items():
        named = {*rule.sets, *([rule.key] if rule.key else [])}
        changed: set[str] = set()
        for value in (*TRIED, None):
            after = keys(trainer, {name: value})
            if after is not None:
                changed |= {k for k in before | after if before.get(k) != after.get(k)}
        extra = {k for k in changed - named if not _follows(name, k)}
        wrong += [f"{name}: {key}" for key in sorted(extra)]
        if named and not changed and name not in NOT_ALONE and rule != Rule():
            idle.append(name)
    assert (wrong, idle) == ([], [])


def _follows(name: str, key: str) -> bool:
    allowed = FOLLOWS.get(name, ())
    return key in allowed or f"{key.rpartition('.')[0]}.*" in allowed
