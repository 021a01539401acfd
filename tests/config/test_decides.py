"""What each key decides: stated at the key, and the same as in earlier versions."""

import copy
from typing import Annotated, get_args

import pytest
import yaml
from pydantic import BaseModel

from fastpo.config import (
    Config,
    Section,
    decided_values,
    decides,
    decides_result,
    dump_config,
    flatten,
    parse_config,
)
from fastpo.config.fields import Decides, Positive
from fastpo.train.changes import differing_keys

RAW = {
    "model": {"path": "m"},
    "data": {"source": "pickapic", "path": "d"},
    "prepare": {"cache_dir": "c"},
    "train": {
        "output_dir": "o",
        "epochs": 1,
        "objective": {"name": "adaptive_dpo"},
        "annotators": {"kind": "ledger"},
        "optim": {"schedule": "cosine"},
    },
}
# A checkpoint may be resumed with other values of these; found in release 0.1.0.
FREE_ON_RESUME = {
    *(f"train.{key}" for key in ("output_dir", "checkpoint_every", "keep_checkpoints")),
    *(f"train.{key}" for key in ("trackers", "loader_workers", "deepspeed", "hang_timeout")),
    *(f"train.{key}" for key in ("accumulation_steps", "reference")),
    *(f"train.{key}" for key in ("held_out_every", "keep_best", "early_stop")),  # came later
    *(f"train.{key}" for key in ("sample_every", "sample_prompts")),  # came later
    "train.gradient_checkpointing",  # of `backward: all`, not compiled
    *(f"prepare.{key}" for key in ("cache_dir", "batch_size", "workers", "reuse")),
    *(f"data.{key}" for key in ("verify", "allow_outside", "max_bad")),  # came later
}
VARIANTS = [
    {},
    {"annotators": {"kind": "ema"}, "objective": {"name": "adaptive_ipo"}},
    {"annotators": None, "objective": {"name": "dpo"}, "timesteps": {"kind": "logit_normal"}},
    {"annotators": None, "objective": {"name": "mapo"}},
]


@pytest.mark.parametrize("train", VARIANTS)
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_keys_that_may_differ_on_resume_are_those_of_earlier_versions(train, schedule):
    raw = copy.deepcopy(RAW)
    raw["train"] |= {**train, "optim": {"schedule": schedule}}
    config = parse_config(raw)
    free, written = set(), yaml.safe_load(dump_config(config))
    for key in flatten(config.model_dump(mode="json")):
        saved = copy.deepcopy(written)
        *parents, leaf = key.split(".")
        section = saved
        for parent in parents:
            section = section[parent]
        section[leaf] = "another value"
        differing = differing_keys(saved, config)
        assert len(differing) <= 1
        if not differing:
            free.add(key)
        else:
            assert differing[0].startswith(f"{key}: 'another value' there")
    evaluation = {f"evaluate.{key}" for key in type(config.evaluate).model_fields}
    lasting = {"train.epochs", "train.max_steps"} if schedule == "constant" else set()
    assert free == FREE_ON_RESUME | evaluation | lasting


@pytest.mark.parametrize(
    ("key", "differs"), [("evaluate.gone", False), ("train.gone", True), ("gone", True)]
)
def test_a_key_that_a_later_version_has_no_more(key, differs):
    config = parse_config(RAW)
    saved = yaml.safe_load(dump_config(config))
    *parents, leaf = key.split(".")
    (saved[parents[0]] if parents else saved)[leaf] = 3
    assert differing_keys(saved, config) == ([f"{key}: 3 there, None here"] if differs else [])


def leaves(section, prefix=""):
    """Every key that holds no section, with its metadata; found without the package's own walk."""
    for name, field in section.model_fields.items():
        inner = [field.annotation]
        for part in inner:
            inner.extend(get_args(part))
        sections = [p for p in inner if isinstance(p, type) and issubclass(p, BaseModel)]
        for below in sections:
            yield from leaves(below, f"{prefix}{name}.")
        if not sections:
            yield prefix + name, field.metadata


def test_every_key_says_what_it_decides():
    keys = list(leaves(Config))
    assert len({key for key, _ in keys}) > 80
    silent = [k for k, metadata in keys if sum(isinstance(m, Decides) for m in metadata) != 1]
    assert not silent


def test_a_key_that_says_nothing_cannot_be_added():
    with pytest.raises(TypeError, match=r"Renewed\.factor does not say what it decides"):

        class Renewed(Section):
            name: Annotated[str, decides("run")]
            factor: Positive = 1.0


@pytest.mark.parametrize("results", [(), ("nothing", "run"), ("training",)])
def test_what_a_key_decides_is_one_of_the_known_results(results):
    with pytest.raises(ValueError, match="decides takes"):
        decides(*results)


def test_a_key_of_two_sections_decides_what_either_says():
    assert decides_result("train.objective.beta", "run")
    assert not decides_result("train.objective.beta", "reference")


@pytest.mark.parametrize(
    ("key", "run"), [("train", True), ("train.annotators", True), ("evaluate", False), ("x", True)]
)
def test_a_section_and_an_unknown_key_decide_too(key, run):
    assert decides_result(key, "run") == run
    assert decides_result("evaluate.x", "run") is False


def test_values_are_left_out_where_their_content_is_named():
    config = parse_config(RAW)
    values = decided_values(config, "reference", named=("model", "train.timesteps"))
    assert values["train.precision"] == "bf16"
    assert not any(key.startswith(("model.", "train.timesteps")) for key in values)
    assert "train.timesteps.kind" in decided_values(config, "reference", named=())
