"""What one process holds: ZeRO's shares by hand, and DeepSpeed's file as training reads it."""

import json

import pytest
import torch
from torch import nn

from fastpo.config import parse_config
from fastpo.errors import ConfigError
from fastpo.train.sharding import Sharding, Trained, count_trained, held, read_sharding


def train_config(**options):
    raw = {
        "model": {"path": "m"},
        "data": {"source": "folder", "path": "d"},
        "prepare": {"cache_dir": "c"},
        "train": {"output_dir": "o", "objective": {"name": "dpo"}, "max_steps": 1, **options},
    }
    return parse_config(raw).train


THOUSAND = Trained(1000, 1500, trainable=4000, frozen=1000, states=8000, step=0)


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [
        (0, 5000, 4000, 8000),
        (1, 5000, 4000, 1500),  # (8000 + 4000) / 8
        (2, 5000, 500, 1500),
        (3, 625, 500, 1500),
    ],
)
def test_zero_shares_what_its_paper_says(stage, weights, gradients, optimizer):
    """1,000 trainable float32 weights and 500 frozen bf16 ones on 8 processes, by hand."""
    parts = held(THOUSAND, Sharding(8, stage, bucket=10, live=150))
    assert (parts["weights"], parts["gradients"]) == (weights, gradients)
    assert parts["optimizer"] == optimizer
    # The copies of DDP's buckets; DeepSpeed's bucket; 150 of 1,500 weights of 10/3 bytes each.
    assert parts["communication"] == {0: 4000, 1: 40, 2: 40, 3: 40 + 500}[stage]


def test_offloading_moves_parts_to_the_host():
    one = held(THOUSAND, Sharding(8, 2, offload_optimizer=True))
    assert (one["optimizer"], one["gradients"], one["host"]) == (0, 0, 2000)
    two = held(THOUSAND, Sharding(8, 3, offload_optimizer=True, offload_param=True))
    assert (two["weights"], two["host"]) == (0, 2625)


def test_every_stage_and_every_process_holds_less():
    def held_by(processes, stage):
        parts = held(THOUSAND, Sharding(processes, stage, bucket=0, live=0))
        return sum(parts[k] for k in ("weights", "gradients", "optimizer"))

    by_stage = [held_by(16, stage) for stage in (0, 1, 2, 3)]
    assert by_stage == sorted(by_stage, reverse=True)
    by_processes = [held_by(n, 3) for n in (1, 2, 4, 8, 16)]
    assert by_processes == sorted(by_processes, reverse=True)


def settings(tmp_path, **zero):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    return str(path)


def test_deepspeed_s_file_is_read(tmp_path):
    train = train_config()
    away = {"device": "cpu"}
    name = settings(tmp_path, stage=2, overlap_comm=True, offload_optimizer=away)
    sharding = read_sharding(train.model_copy(update={"deepspeed": name}), 4)
    assert sharding == Sharding(4, 2, offload_optimizer=True, buckets=2)
    assert "ZeRO-2" in str(sharding)
    assert read_sharding(train, 4) == Sharding(4)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "not json",
        '{"zero_optimization": {"stage": 7}}',
        '{"zero_optimization": {"stage": 2}, "train_batch_size": 3}',
    ],
)
def test_a_deepspeed_file_that_training_refuses_is_refused(tmp_path, text):
    path = tmp_path / "bad.json"
    path.write_text(text)
    train = train_config().model_copy(update={"deepspeed": str(path)})
    with pytest.raises(ConfigError, match="bad"):
        read_sharding(train, 1)


def test_a_compiled_policy_is_not_planned_under_stage_3(tmp_path):
    train = train_config(compile=True, deepspeed=settings(tmp_path, stage=3))
    with pytest.raises(ConfigError, match=r"train\.compile does not work with ZeRO-3"):
        read_sharding(train, 1)


def test_a_weight_of_which_a_part_is_here_counts_whole():
    """Under ZeRO-3 a parameter is empty and knows its whole size."""
    whole, part = nn.Parameter(torch.zeros(30, 10)), nn.Parameter(torch.zeros(0))
    part.ds_numel = 300  # pyright: ignore[reportAttributeAccessIssue]
    assert count_trained([part], train_config()) == count_trained([whole], train_config())
