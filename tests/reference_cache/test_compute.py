"""Reference errors: computed once, kept in blocks, refused by name where others are needed."""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fastpo.reference_cache.compute as module
from fastpo.cli import main
from fastpo.config import decides_result, flatten
from fastpo.data.cache import PairCache
from fastpo.data.sampler import PairSampler
from fastpo.errors import CacheError, ConfigError, ModelError
from fastpo.models.folder import ModelFolder
from fastpo.models.unet import UNetFamily
from fastpo.noise import setup_noise
from fastpo.reference_cache import open_for_run, prepare_reference, reference_identity
from fastpo.reference_cache.store import MANIFEST, reference_root
from fastpo.train import train
from tests.faults.two_ranks import two_ranks
from tests.forked import FORK

PAIRS = 11  # of the tiny data; with micro-batches of two an epoch has six


def opened(config, processes=1):
    """What a training run of this configuration opens."""
    model = ModelFolder.resolve(config.model)
    cache = PairCache.open(config, model=model)
    noise = setup_noise(config, model)
    sampler = PairSampler(cache.bucket, config.train.micro_batch_size, config.seed)
    errors = open_for_run(config, model, cache, noise, sampler, processes)
    assert errors is not None
    return errors


CHANGES = {
    "seed": ["seed=8"],
    "min_timestep": ["train.min_timestep=10"],
    "timesteps": ["train.timesteps={kind: list, values: [249, 999]}"],
    "sample_latents": ["train.sample_latents=false"],
    "empty_prompt_rate": ["train.empty_prompt_rate=0.1"],
    "flip_rate": ["data.flip_rate=0.2"],
    "precision": ["train.precision=bf16"],
    "attention": ["train.attention=xformers"],
}


@pytest.mark.parametrize(("name", "overrides"), CHANGES.items(), ids=CHANGES)
def test_errors_of_other_settings_are_refused_by_name(single, settle, name, overrides):
    prepare_reference(settle(single), 1, progress=False)
    with pytest.raises(CacheError, match=rf"{name}: the configuration gives .*made with") as error:
        opened(settle(single, overrides=overrides))
    differing = str(error.value).split(" do not fit the configuration: ")[1].split(". Restore")[0]
    assert [text.split(":")[0].split(".")[-1] for text in differing.split("; ")] == [
        *(["empty_prompt"] if name == "empty_prompt_rate" else []),  # only then does it matter
        name,
    ]
    assert "`fastpo prepare CONFIG --reference 1`" in str(error.value)


def test_several_differences_are_told_in_one_error(single, settle):
    prepare_reference(settle(single), 1, progress=False)
    config = settle(single, overrides=["seed=9", "train.min_timestep=3"])
    with pytest.raises(CacheError, match=r"seed: .*gives '9'.*with '7'.*min_timestep: .*'3'.*'0'"):
        opened(config)


def other_model(config, folder, part, change):
    """A copy of the configuration's pipeline with one file changed."""
    copy = shutil.copytree(config.model.path, folder)
    change(copy / part)
    return copy


def nudge(path):
    from safetensors.torch import save_file

    weights = load_file(path)
    weights["conv_in.bias"] = weights["conv_in.bias"] + 1e-3
    save_file(weights, path, metadata={"format": "pt"})


def lower_noise(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_end": 0.011}))


PARTS = {
    "UNet": ("unet/diffusion_pytorch_model.safetensors", nudge),
    "schedule": ("scheduler/scheduler_config.json", lower_noise),
}


@pytest.mark.parametrize("name", PARTS)
def test_errors_of_another_model_are_refused_and_computed_beside(alone, settle, tmp_path, name):
    config = settle(alone)
    before = prepare_reference(config, 1, progress=False)
    model = other_model(config, tmp_path / "other", *PARTS[name])
    other = settle(alone, overrides=[f"model.path={model}"])
    with pytest.raises(CacheError, match=rf"fit the configuration: {name}: .*made with"):
        opened(other)
    after = prepare_reference(other, 1, progress=False)
    assert after.folder != before.folder
    assert opened(config).folder == before.folder


def test_without_drawn_latents_one_set_serves_all_flips(shared, settle, computed):
    plain = ["train.sample_latents=false"]
    errors = prepare_reference(settle(shared, overrides=plain), 1, progress=False)
    flips = [*plain, "data.flip_rate=0.5"]
    config = settle(shared, overrides=flips)
    again = prepare_reference(config, 1, progress=False)
    assert again.folder == errors.folder
    assert sum(computed) == PAIRS
    pairs = [i for i in range(PAIRS) if i not in (3, 7)]
    straight = errors.lookup(PairCache.open(settle(shared, overrides=plain)).read(pairs, 0))
    flipped = PairCache.open(config).read(pairs, 0)
    sides, expected = again.lookup(flipped).view(2, -1), straight.view(2, -1)
    assert 0 < flipped.flipped.sum() < len(pairs)
    assert torch.equal(sides[:, flipped.flipped], expected[:, flipped.flipped].flip(0))
    assert torch.equal(sides[:, ~flipped.flipped], expected[:, ~flipped.flipped])


def test_float32_serves_lora_and_full_alike_and_bf16_does_not(shared, settle):
    def folder(**options):
        return prepare_reference(settle(shared, **options), 1, progress=False).folder

    assert folder() == folder(method="full")
    assert folder() == folder(gradient_checkpointing=True), "it changes no prediction"
    assert folder(precision="bf16") != folder(precision="bf16", method="full")


def test_more_visits_compute_only_what_is_missing(alone, settle, computed):
    config = settle(alone)
    first = prepare_reference(config, 1, progress=False)
    batch = PairCache.open(config).read([0, 1], 0)
    before = first.lookup(batch)
    more = prepare_reference(config, 3, progress=False)
    assert sum(computed) == 3 * PAIRS
    assert more.complete_visits(PAIRS) == 3
    assert torch.equal(more.lookup(batch), before)
    prepare_reference(config, 2, progress=False)
    assert sum(computed) == 3 * PAIRS


def test_a_run_beyond_the_visits_is_refused_at_its_start(alone, settle, computed):
    config = settle(alone, max_steps=8)  # of six to an epoch
    with pytest.raises(CacheError, match=r"no reference errors in .*prepare CONFIG --reference 2`"):
        opened(config)
    prepare_reference(config, 1, progress=False)
    with pytest.raises(CacheError, match=r"1 whole visit .*need 2; .*CONFIG --reference 2`"):
        train(config, progress=False)
    assert not config.train.output_dir.exists()
    sum_before = sum(computed)
    prepare_reference(config, progress=False)
    assert 0 < sum(computed) - sum_before <= 4
    assert opened(config).complete_visits(PAIRS) == 1
    with pytest.raises(CacheError, match=r"auto --processes 2`"):
        opened(config, processes=2)
    prepare_reference(config, processes=2, progress=False)
    assert opened(config, processes=2).complete_visits(PAIRS) == 2


def test_pairs_beyond_a_smaller_limit_are_missing_until_computed(alone, settle, computed):
    few = settle(alone, overrides=["data.limit=6"])
    prepare_reference(few, 1, progress=False)
    with pytest.raises(CacheError, match=r"lacks 5 of 11 pairs"):
        opened(settle(alone, max_steps=6))
    prepare_reference(settle(alone), 1, progress=False)
    assert sum(computed) == PAIRS
    opened(settle(alone, max_steps=6))
    opened(settle(alone, overrides=["data.limit=6"]))


def test_blocks_of_a_larger_limit_are_merged_under_a_smaller_one(alone, settle, monkeypatch):
    """A killed preparation may leave blocks of pairs that the next run's `data.limit` ends before.

    What they hold stays; a run without the limit goes on from there.
    """
    monkeypatch.setattr(module, "BLOCK_PAIRS", 4)
    config = settle(alone)
    merge = module.merge_parts
    done = []

    def merge_once(*args):
        if done:
            raise KeyboardInterrupt
        done.append(args)
        return merge(*args)

    monkeypatch.setattr(module, "merge_parts", merge_once)
    with pytest.raises(KeyboardInterrupt):
        prepare_reference(config, 1, progress=False)
    monkeypatch.setattr(module, "merge_parts", merge)
    errors = prepare_reference(settle(alone, overrides=["data.limit=6"]), 1, progress=False)
    assert errors.complete_visits(PAIRS) == 1


def test_a_failing_block_leaves_the_finished_ones(alone, settle, computed, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_PAIRS", 4)
    config = settle(alone)
    expected = prepare_reference(settle(alone, seed=1), 2, progress=False)
    computed.clear()
    write, written = module.write_part, []

    def failing(*args):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(args)
        write(*args)

    monkeypatch.setattr(module, "write_part", failing)
    with pytest.raises(KeyboardInterrupt):
        prepare_reference(config, 2, progress=False)
    monkeypatch.setattr(module, "write_part", write)
    computed.clear()
    errors = prepare_reference(config, 2, progress=False)
    assert sum(computed) == 2 * PAIRS - sum(len(args[3]) for args in written)
    assert errors.complete_visits(PAIRS) == 2
    assert {p.suffix for p in errors.folder.iterdir() if p.name[0] != "."} == {".json", ".npy"}
    assert len(list(errors.folder.iterdir())) == len(list(expected.folder.iterdir()))


def test_a_block_without_finite_errors_names_the_pairs(alone, settle, monkeypatch):
    predict = UNetFamily.predict
    monkeypatch.setattr(UNetFamily, "predict", lambda *args: predict(*args) * torch.nan)
    with pytest.raises(ModelError, match=r"not finite on visit 0 of 11 pairs \(p3, p7, p0, p1"):
        prepare_reference(settle(alone), 1, progress=False)


def test_damaged_errors_are_named(alone, settle):
    config = settle(alone, max_steps=3)
    errors = prepare_reference(config, 1, progress=False)
    table = next(errors.folder.glob("visit-*.npy"))
    whole = table.read_bytes()
    table.write_bytes(whole[:-8])
    with pytest.raises(CacheError, match=r"visit-00000-11\.npy is damaged: \d+ bytes, expected"):
        opened(config)
    table.unlink()
    with pytest.raises(CacheError, match=r"missing file: .*visit-00000"):
        opened(config)
    (errors.folder / MANIFEST).write_text("{")
    with pytest.raises(CacheError, match=r"reference\.json is damaged"):
        opened(config)


def test_the_unet_is_hashed_once(alone, settle, monkeypatch):
    from fastpo.models import folder

    config = settle(alone, max_steps=3)
    hashed, digest = [], folder.digest_files
    monkeypatch.setattr(folder, "digest_files", lambda f: (hashed.append(f), digest(f))[1])
    prepare_reference(config, 1, progress=False)
    opened(config)
    assert sum("unet" in str(files[0]) for files in hashed) == 1


def test_fp16_without_a_gpu_is_refused(shared, settle):
    if torch.cuda.is_available():
        pytest.skip("fp16 runs on this machine")
    with pytest.raises(ConfigError, match="bf16 or fp32"):
        prepare_reference(settle(shared, precision="fp16"), 1, progress=False)


IDENTITIES = [
    ({"precision": "fp32"}, {}, {"train.method": "", "data.flip_seed": ""}),
    ({"precision": "bf16"}, {}, {"train.method": "lora", "data.flip_seed": ""}),
    (
        {"precision": "bf16", "method": "full", "attention": "flash", "empty_prompt_rate": 0.1},
        {"flip_rate": 0.2, "flip_seed": 3},
        {"train.method": "full", "data.flip_rate": "0.2", "data.flip_seed": "3"},
    ),
    (
        {"sample_latents": False},
        {"flip_rate": 0.2, "flip_seed": 3},
        {"train.method": "", "data.flip_rate": "", "data.flip_seed": ""},
    ),
    ({"timesteps": {"kind": "list", "values": [1, 5]}}, {}, {"data.flip_seed": ""}),
]


@pytest.mark.parametrize(("train", "data", "expected"), IDENTITIES)
def test_errors_on_disk_keep_their_identity(shared, settle, train, data, expected):
    """Field by field as release 0.1.0 wrote it, so that errors computed earlier are found again."""
    train = {"empty_prompt": "encoded", **train}  # as that release did
    config = settle(shared, overrides=[f"data.{k}={v}" for k, v in data.items()], **train)
    model = ModelFolder.resolve(config.model)
    cache, noise = PairCache.open(config, model=model), setup_noise(config, model)
    plain = {
        "train.precision": config.train.precision,
        "train.attention": config.train.attention,
        "train.empty_prompt_rate": str(config.train.empty_prompt_rate),
        "train.method": "",
        "data.flip_rate": str(config.data.flip_rate),
    }
    digests = {"UNet": model.digest("unet").sha256, "prepared latents": cache.fingerprint}
    assert reference_identity(config, model, cache, noise) == {
        **(digests | noise.identity() | plain),
        **expected,
    }


def test_every_key_that_decides_the_errors_is_in_their_identity(shared, settle):
    config = settle(shared, timesteps={"kind": "bins", "weights": [1, 2]}, empty_prompt_rate=0.1)
    model = ModelFolder.resolve(config.model)
    cache, noise = PairCache.open(config, model=model), setup_noise(config, model)
    identity = reference_identity(config, model, cache, noise)
    deciding = {k for k in flatten(config.model_dump()) if decides_result(k, "reference")}
    assert {"seed", "train.precision", "train.timesteps.weights", "data.flip_rate"} <= deciding
    missing = {k for k in deciding if not any(f"{k}.".startswith(f"{n}.") for n in identity)}
    # Models are there by the digests of the denoiser and of the prepared latents; the others came
    # later, and are there where they differ from what was done before.
    by_digest = {f"model.{key}" for key in ("path", "config", "revision", "variant", "vae")}
    assert missing == by_digest | {
        "train.flow_shift",
        "train.guidance",
        "train.quantize_base",
    }


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_a_wrong_number_of_visits_is_named(settle, shared, capsys, value):
    path = settle(shared).train.output_dir.parent / "run.yaml"
    with pytest.raises(SystemExit) as stopped:
        main(["prepare", str(path), f"--reference={value}"])
    assert stopped.value.code == 2
    assert "or auto" in capsys.readouterr().err


def test_processes_without_auto_are_refused(settle, shared, capsys):
    path = settle(shared).train.output_dir.parent / "run.yaml"
    for reference in ([], ["--reference=2"]):
        with pytest.raises(SystemExit) as stopped:
            main(["prepare", str(path), "--processes=2", *reference])
        assert stopped.value.code == 2
        assert "--reference auto" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_preparation_goes_on_in_two_processes(alone, settle, tmp_path):
    config = settle(alone)
    path = config.train.output_dir.parent / "run.yaml"
    settings = ["--set", f"prepare.cache_dir={config.prepare.cache_dir}"]
    arguments = ["prepare", str(path), *settings]
    root = reference_root(config.prepare.cache_dir)
    process = FORK.Process(target=main, args=([*arguments, "--reference", "60"],))
    process.start()
    deadline = time.monotonic() + 240
    while len(list(root.glob("*/part-*.safetensors"))) < 2:
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    killed = {p.name for p in root.glob("*/part-*.safetensors")}
    with two_ranks(tmp_path, lambda _: [*arguments, "--reference", "6"]) as ranks:
        assert ranks.exit_codes() == [0, 0], ranks.text(0) + ranks.text(1)
        told = ranks.text(0)
    assert "11 pairs in" in told
    errors = opened(settle(alone, max_steps=6 * 6))
    assert 2 <= len(killed)
    assert f"errors on them in {errors.folder}" in told
    assert not list(root.glob("*/part-*"))
    cache = PairCache.open(config)
    others = shutil.copytree(alone, alone.parent / "others")
    shutil.rmtree(reference_root(others / "sdxl"))
    expected = prepare_reference(settle(others), 6, progress=False)
    pairs = [i for i in range(PAIRS) if i not in (3, 7)]
    for visit in range(6):
        batch = cache.read(pairs, visit)
        got = errors.lookup(batch)
        np.testing.assert_array_equal(got, expected.lookup(batch))
        assert not torch.equal(got, errors.lookup(cache.read(pairs, (visit + 1) % 6)))
