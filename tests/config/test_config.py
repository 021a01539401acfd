"""The configuration: reading, overriding, and complaints that name the key."""

import copy
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpo.config import dump_config, load_config, parse_config, with_keys
from fastpo.errors import ConfigError

MINIMAL = {
    "model": {"path": "m"},
    "data": {"source": "pickapic", "path": "d"},
    "prepare": {"cache_dir": "c"},
    "train": {
        "output_dir": "o",
        "epochs": 1,
        "objective": {"name": "adaptive_dpo"},
        "annotators": {"kind": "ledger"},
    },
}


def changed(key, value):
    raw = copy.deepcopy(MINIMAL)
    *parents, leaf = key.split(".")
    node = raw
    for parent in parents:
        node = node.setdefault(parent, {})
    node[leaf] = value
    return raw


def write(tmp_path, raw=MINIMAL):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_dump_and_load_give_the_same_configuration(tmp_path):
    config = parse_config(MINIMAL)
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


COMPLAINTS = [
    ("train.objective.betta", 1.0, r"unknown key train\.objective\.betta; did you mean .*\.beta\?"),
    ("train.annotators.min_visit", 2, r"did you mean train\.annotators\.min_visits\?"),
    ("trian", {}, r"unknown key trian; did you mean train\?"),
    ("train.optim.lrr", 1.0, r"did you mean train\.optim\.lr\?"),
    ("data.flip_rate", 1.5, r"data\.flip_rate: .*less than or equal to 1, got 1\.5"),
    ("train.objective.beta", "much", r"train\.objective\.beta: .*number.*got 'much'"),
    ("train.objective.name", "dpoo", r"train\.objective: .*'dpoo'.*'dpo'"),
    ("data.source", "pick", r"data\.source: .*'pickapic'"),
    ("train.max_steps", 3, r"exactly one of train\.epochs and train\.max_steps"),
    ("train.objective", {"name": "dpo"}, r"annotators is used by adaptive_dpo .* not by dpo"),
    ("train.max_timestep", 0, r"max_timestep"),
    ("train.weights", "bf16", r"train\.weights: bf16 is for train\.method: full"),
    ("train.timesteps", {"kind": "lst"}, r"train\.timesteps: .*'lst'.*'list'"),
    ("train.timesteps.kind", "list", r"missing key train\.timesteps\.values"),
    ("train.timesteps", {"kind": "bins", "weights": [0, 0]}, r"timesteps\.weights: at least one"),
    ("train.timesteps", {"kind": "logit_normal", "std": 0}, r"train\.timesteps\.std.*than 0"),
    ("train.optim", {"schedule": "constant", "warmup_steps": 5}, r"constant_with_warmup"),
    ("train.optim", {"schedule": "polynomial", "lr": 1e-8}, r"must exceed 1e-7"),
    ("train.optim", {"betas": [0.9, 1.0]}, r"train\.optim\.betas"),
    ("train.optim", {"betas": [True, 0.9]}, r"train\.optim\.betas\.0: .*not true or false"),
    ("train.optim.lr", float("inf"), r"train\.optim\.lr: .*finite"),
    ("train.epochs", float("inf"), r"train\.epochs: .*finite"),
    ("train.objective.beta", float("inf"), r"train\.objective\.beta: .*finite"),
    ("evaluate.guidance_scale", float("nan"), r"evaluate\.guidance_scale"),
    ("train.micro_batch_size", True, r"train\.micro_batch_size: .*not true or false, got True"),
    ("train.annotators.min_visits", True, r"train\.annotators\.min_visits: .*not true or false"),
    ("train.objective.beta", True, r"train\.objective\.beta: .*not true or false"),
    ("seed", 2**32, r"seed: .*less than 4294967296"),
    ("train.lr", 1e-5, r"unknown key train\.lr; did you mean train\.optim\.lr\?"),
    ("train.beta", 1.0, r"unknown key train\.beta; did you mean train\.objective\.beta\?"),
    ("resolution", 64, r"unknown key resolution; did you mean prepare\.resolution\?"),
    ("train.learning_rate", 1e-5, r"did you mean train\.optim\.lr\?"),
    ("train.max_train_steps", 5, r"did you mean train\.max_steps\?"),
    ("model", "path/of/it", r"model: this is a section with keys such as path, .*'path/of/it'"),
    ("train.objective", 5, r"train\.objective: this is a section with keys such as name, got 5"),
    ("train.objective", "dpoo", r"train\.objective: .*'dpoo'.*'dpo'"),
    ("train.objective", {"beta": 5}, r"missing key train\.objective\.name"),
    ("data.flip_rate", 1, r"data\.flip_rate: .*less than 1, which is all of them, got 1"),
    ("train.empty_prompt_rate", 1.0, r"train\.empty_prompt_rate: .*less than 1, which is all"),
    ("train.lora.dropout", 1, r"train\.lora\.dropout: .*less than 1, got 1"),
    ("train.optim.lr", 1e5, r"train\.optim\.lr: .*less than or equal to 1, got 100000"),
    ("train.method", "full", r"train\.lora is for train\.method: lora.*--set train\.lora=\{\}"),
]


@pytest.mark.parametrize(("key", "value", "complaint"), COMPLAINTS)
def test_a_wrong_key_is_named(key, value, complaint):
    raw = changed(key, value)
    if key == "train.method":
        raw["train"]["lora"] = {"rank": 4}
    with pytest.raises(ConfigError, match=complaint):
        parse_config(raw)


@pytest.mark.parametrize(
    ("key", "word", "meant"),
    [
        ("train.objective", "adaptive_ipo", {"name": "adaptive_ipo"}),
        ("train.annotators", "ema", {"kind": "ema"}),
        ("train.timesteps", "uniform", {"kind": "uniform"}),
        ("evaluate.scorers", "clip", ["clip"]),
        ("evaluate.prompts", "a cat", ["a cat"]),
        ("train.trackers", "wandb", ["wandb"]),
        ("train.lora.target_modules", "to_q", ["to_q"]),
    ],
)
def test_a_plain_word_stands_for_a_section_or_a_list_of_one(tmp_path, key, word, meant):
    long = parse_config(changed(key, meant))
    assert parse_config(changed(key, word)) == long
    assert load_config(write(tmp_path), [f"{key}={word}"]) == long


def test_a_key_is_set_in_a_section_that_the_file_names_by_a_word(tmp_path):
    path = write(tmp_path, changed("train.objective", "adaptive_ipo"))
    config = load_config(path, ["train.objective.tau=3"])
    assert (config.train.objective.name, config.train.objective.tau) == ("adaptive_ipo", 3.0)


def test_truth_values_are_taken_where_they_are_meant():
    raw = changed("train.annotators", {"kind": "ema", "batched": True})
    raw["train"]["compile"] = True
    assert parse_config(raw).train.annotators.batched is True


def test_options_of_adapters_that_are_the_default_s_go_with_full_fine_tuning():
    """A file's `lora` section need not go when the method is changed on the command line."""
    raw = changed("train.lora", {"rank": 8, "alpha": 8})
    raw["train"]["method"] = "full"
    config = parse_config(raw)
    assert parse_config(yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize("name", ["mapo", "sft"])
def test_a_cached_reference_of_a_reference_free_objective_is_refused(name):
    raw = changed("train.objective", {"name": name})
    raw["train"] |= {"annotators": None, "reference": "cached"}
    with pytest.raises(ConfigError, match=rf"train\.reference: cached has no use for {name}"):
        parse_config(raw)


@pytest.mark.parametrize("stage", ["zero3", "zero3_offload"])
@pytest.mark.parametrize(
    "options",
    [{"compile": True}, {"annotators": {"kind": "ema", "batched": True}, "method": "lora"}],
    ids=["compile", "batched"],
)
def test_what_zero_3_cannot_do_is_refused_at_load(stage, options):
    raw = changed("train.deepspeed", stage)
    raw["train"] |= options
    with pytest.raises(ConfigError, match=rf"train\..* does not work with ZeRO-3 \({stage}\)"):
        parse_config(raw)
    raw["train"]["deepspeed"] = "zero2"
    assert parse_config(raw)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("seed: 1\nmodel: {}\nseed: 2\n", 3),
        ("train:\n  optim:\n    lr: 1\n    eps: 1\n    lr: 2\n", 5),
        ("seed: 1\ntrain: {lr: 1, lr: 1}\n", 2),
    ],
)
def test_a_key_that_occurs_twice_is_refused(tmp_path, text, line):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"config\.yaml .*line {line}: the key (seed|lr) occurs"):
        load_config(path)


def test_a_key_that_occurs_twice_on_the_command_line_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--set train\.optim.*the key lr occurs twice"):
        load_config(write(tmp_path), ["train.optim={lr: 1e-5, lr: 1e-6}"])


def test_anchors_and_merges_are_read(tmp_path):
    path = write(tmp_path)
    text = path.read_text() + "evaluate: &e {batch_size: 3}\n"
    path.write_text(text.replace("model:\n", "model: &m\n"))
    assert load_config(path).evaluate.batch_size == 3
    (tmp_path / "merged.yaml").write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n")
    with pytest.raises(ConfigError, match="unknown key a"):
        load_config(tmp_path / "merged.yaml")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: " + "[" * 33, "nested more than 32 levels deep"),
        ("a: &x y\nb: [" + "*x, " * 33 + "]", "more than 32 aliases"),
        ("a: &x {b: *x}", "undefined alias 'x'"),
        ("a: 2001-13-01", "month must be in 1..12"),
        ('a: "\\ud800"', "surrogates not allowed"),
        ('a: "\\0"', "a text has a zero byte"),
        ("a: !!python/object:collections.OrderedDict {}", "could not determine a constructor"),
        ("#" + "x" * (1 << 18), "it has 262,145 bytes, at most 262,144 are read"),
    ],
    ids=["depth", "aliases", "itself", "date", "surrogate", "zero", "object", "size"],
)
def test_yaml_is_bounded(tmp_path, text, complaint):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=complaint) as refusal:
        load_config(path)
    assert "\n" not in str(refusal.value)


def test_a_memory_format_that_an_optimizer_undoes_is_refused():
    raw = changed("train.optim", {"name": "adamw_8bit"})
    raw["train"] |= {"channels_last": True, "method": "full"}
    with pytest.raises(ConfigError, match=r"train\.channels_last: adamw_8bit.*weights: bf16"):
        parse_config(raw)
    assert parse_config({**raw, "train": {**raw["train"], "weights": "bf16"}})


def test_a_gate_without_annotators_is_refused():
    """Policy and reference agree at first, so a pair's margin alone would exclude it for good."""
    raw = changed("train.objective", {"name": "adaptive_ipo", "weight_kind": "gate"})
    raw["train"]["annotators"] = None
    with pytest.raises(ConfigError, match=r"weight_kind: gate needs train\.annotators \(ledger"):
        parse_config(raw)
    raw["train"]["annotators"] = {"kind": "ledger"}
    assert parse_config(raw)


def test_a_list_of_timesteps_and_a_range_are_refused_together():
    raw = changed("train.timesteps", {"kind": "list", "values": [249, 999]})
    assert parse_config(raw).train.timesteps.kind == "list"
    raw["train"]["min_timestep"] = 1
    with pytest.raises(ConfigError, match=r"a list is the whole choice.*train\.min_timestep"):
        parse_config(raw)


def test_a_missing_section_is_named():
    raw = {k: v for k, v in MINIMAL.items() if k != "data"}
    with pytest.raises(ConfigError, match="missing key data"):
        parse_config(raw)


def test_overrides_are_typed_and_may_make_sections(tmp_path):
    config = load_config(
        write(tmp_path),
        ["train.optim.lr=1e-6", "train.lora.rank=4", "evaluate.prompts=[a, b]", "model.vae=x"],
    )
    assert config.train.optim.lr == 1e-6
    assert config.train.lora.rank == 4
    assert config.evaluate.prompts == ("a", "b")
    assert config.model.vae == "x"


@pytest.mark.parametrize("text", ["train.optim.lr", "=3", "seed.x=3"])
def test_a_malformed_override_is_refused(tmp_path, text):
    raw = {**MINIMAL, "seed": 0}
    with pytest.raises(ConfigError, match="--set"):
        load_config(write(tmp_path, raw), [text])


def test_files_that_are_no_configuration_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="not found"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="folder"):
        load_config(tmp_path)
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(ConfigError, match="mapping"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="valid YAML"):
        load_config(tmp_path / "bad.yaml")


@settings(deadline=None)
@given(
    st.floats(1e-12, 1.0),
    st.integers(0, 2**31),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from(["fp32", "bf16"]),
)
def test_any_valid_value_survives_the_round_trip(lr, seed, rate, precision):
    raw = changed("train.optim", {"lr": lr})
    raw["seed"], raw["data"]["flip_rate"], raw["train"]["precision"] = seed, rate, precision
    config = parse_config(raw)
    assert parse_config(yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "fastpo" / "configs").glob("*.yaml")), ids=str
)
def test_every_shipped_configuration_loads(path):
    load_config(path)


def test_a_key_outside_of_all_sections_can_be_set():
    assert with_keys({"seed": 1, "data": {"limit": 2}}, {"seed": 3}) == {
        "seed": 3,
        "data": {"limit": 2},
    }
