"""Out of memory: one line that names keys which this configuration can change, and what is kept."""

import re

import pytest
import torch
import yaml

from fastpo.config import load_config, with_keys
from fastpo.config.load import parse_config
from fastpo.errors import MemoryShortageError
from fastpo.train import Observer, train
from fastpo.train.memory import explain_shortage, is_shortage, savings

OPTIONS = [
    {},
    {"micro_batch_size": 5, "accumulation_steps": 3},
    {"method": "full", "precision": "bf16"},
    {"method": "full", "precision": "bf16", "weights": "bf16", "gradient_checkpointing": True},
    {"method": "full", "precision": "fp32", "channels_last": True},
    {"method": "full", "deepspeed": "zero2"},
    {"objective": {"name": "sft"}, "optim": {"name": "adafactor"}, "micro_batch_size": 1},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_what_is_advised_is_accepted(experiment, options):
    config = load_config(experiment(**options))
    advised = savings(config.train)
    keys = [re.match(r"(train\.[\w.]+): (\w+)", text) for text in advised]
    assert sum(key is not None for key in keys) >= 2
    for key in filter(None, keys):
        raw = with_keys(config.model_dump(mode="json"), {key[1]: yaml.safe_load(key[2])})
        changed = parse_config(raw)
        assert changed != config


def test_half_a_micro_batch_keeps_the_pairs_of_a_step(experiment):
    config = load_config(experiment(micro_batch_size=8, accumulation_steps=2))
    assert savings(config.train)[0] == (
        "train.micro_batch_size: 4 with train.accumulation_steps: 4"
    )


@pytest.mark.parametrize("kind", ["host", "GPU"])
def test_a_run_out_of_memory_names_its_last_checkpoint(experiment, kind):
    class Hungry(Observer):
        def on_step(self, step, table, metrics):
            if step == 3:
                if kind == "GPU":
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")
                torch.empty(1 << 46)

    config = load_config(experiment())
    with pytest.raises(MemoryShortageError) as raised:
        train(config, progress=False, observers=[Hungry()])
    told = str(raised.value)
    assert told.startswith(f"out of memory on the {kind} (")
    going_on, own = told.split("in a run of its own ")
    assert "\n" not in told and "train.gradient_checkpointing: true" in going_on
    assert going_on.endswith(", also with --resume; ")
    assert "train.optim.name: adamw_8bit" in own and "prepare.resolution: a smaller one" in own
    assert str(config.train.output_dir / "checkpoints" / "step-00000002") in told
    train(config, progress=False, resume=True)


def test_other_errors_are_left_alone(experiment):
    assert not is_shortage(RuntimeError("shapes differ"))
    assert is_shortage(MemoryError())
    told = explain_shortage(MemoryError(), load_config(experiment()).train)
    assert told.endswith("no checkpoint was written yet")
